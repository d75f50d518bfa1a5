"""Before a run that follows one that broke off: keep dsync from losing mails, and from bringing
back what users took away.

dsync commits what it has of a run that breaks off, and it carries mails in no order. So a mail
can be missing on one server below others that both have, and the next run, a full one too, takes
it for deleted there and deletes it everywhere (Dovecot 2.4.1; tests/pairsync/test_faults.py
shows it). Before that run such mails get a new UID at the end of their folder, where dsync takes
them for new.

Only mails newer than the last good run count: what both had then and one has not now was deleted.
And what a user deleted or moved away since, as the folders' logs tell (pairsync.history), is
deleted on the other server as well: it would be there again, one that was moved in two folders.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import struct
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pairsync import history, notify
from pairsync.doveadm import Doveadm, DovecotError, uid_set
from pairsync.history import History, Life, Mail
from pairsync.state import States

Common = dict[str, int]
"""Folder (its GUID) -> highest UID up to which both had the same."""

Listing = Mapping[str, Sequence[Mail]]
"""Folder (its GUID) -> UID and GUID of mails."""

Guids = Mapping[str, Set[str]]
"""Folder (its GUID) -> GUIDs of mails."""

_VERSION = 1
_HEADER, _CHECKSUM = 4, 4
_MAILBOX = struct.Struct("<16sIIQQI")
_FIELDS = ("mailbox-guid", "uid", "guid")
_LOOKS = 5


def common(state: str) -> Common:
    """What dsync's state (dsync-mailbox-state.c) says; nothing where it is empty or unknown."""
    try:
        data = base64.b64decode(state, validate=True)
    except (binascii.Error, ValueError):
        return {}
    body = data[_HEADER:-_CHECKSUM]
    if len(data) < _HEADER + _CHECKSUM or data[0] != _VERSION or len(body) % _MAILBOX.size:
        return {}
    return {guid.hex(): uid for guid, _, uid, *_ in _MAILBOX.iter_unpack(body)}


def latest(one: Mapping[str, int], other: Mapping[str, int]) -> Common:
    """What both had after the later of two runs."""
    return {folder: max(one.get(folder, 0), other.get(folder, 0)) for folder in {*one, *other}}


_NOTHING: Common = {}


def holes(
    mine: Listing,
    theirs: Listing,
    both: Mapping[str, int] = _NOTHING,
    there: Mapping[str, Set[str]] = MappingProxyType({}),
) -> dict[str, list[int]]:
    """UIDs of mails here that the other one has not, below one that both have.

    ``both``: folder -> highest UID of a mail that both have or had; dsync finds it in their logs.
    ``there``: folder -> GUIDs of older mails that the other one has; dsync may have given one
    another UID here.
    """
    found = {}
    for folder, mails in mine.items():
        other = theirs.get(folder, [])
        guids = {guid for _, guid in other} | there.get(folder, set())
        matched = max((uid for uid, _ in set(mails) & set(other)), default=0)
        matched = max(matched, both.get(folder, 0))
        missing = [uid for uid, guid in mails if uid < matched and guid not in guids]
        if missing:
            found[folder] = sorted(missing)
    return found


@dataclass(frozen=True)
class Mailbox:
    """A user's mails on one server, or some of them.

    :param histories: folder (its GUID) -> its history
    :param names: folder (its GUID) -> its name
    """

    histories: Mapping[str, History]
    names: Mapping[str, str] = field(default_factory=dict)

    def here(self, folder: str) -> set[Mail]:
        """What is in a folder."""
        lives = self.histories.get(folder, ())
        return {(life.uid, life.guid) for life in lives if life.is_there}

    def moot(self, after: Mapping[str, int]) -> Guids:
        """Mails that may be left out or unwanted: newer than a UID, or taken away.

        Of all others, both servers have had the same since the last good run.
        """
        return {
            folder: {life.guid for life in lives if life.taken or life.uid > after.get(folder, 0)}
            for folder, lives in self.histories.items()
        }

    def only(self, guids: Guids) -> Mailbox:
        """Some mails, under all of their UIDs."""
        found = {
            folder: [life for life in lives if life.guid in wanted]
            for folder, lives in self.histories.items()
            if (wanted := guids.get(folder))
        }
        return Mailbox(found, self.names)

    def document(self) -> dict[str, Any]:
        """For the peer."""
        return {"histories": self.histories}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Mailbox:
        """What the peer sent."""
        histories = {
            str(folder): [
                Life(
                    int(uid),
                    str(guid),
                    bool(by_dsync),
                    tuple(map(int, before)),
                    bool(taken),
                    bool(is_there),
                    tuple(map(int, after)),
                )
                for uid, guid, by_dsync, before, taken, is_there, after in lives
            ]
            for folder, lives in document["histories"].items()
        }
        return cls(histories)


def all_of(*several: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """The union of GUIDs."""
    found: dict[str, set[str]] = {}
    for guids in several:
        for folder, some in guids.items():
            found.setdefault(folder, set()).update(some)
    return found


def listed(guids: Guids) -> dict[str, list[str]]:
    """For the peer."""
    return {folder: list(found) for folder, found in guids.items() if found}


@dataclass(frozen=True)
class Plan:
    """What is to be done on one server.

    :param expunge: folder (its GUID) -> mails to delete; most of them are not there any more
    :param renumber: folder (its GUID) -> UIDs of mails to give new ones
    :param doubles: folder (its GUID) -> mails to delete that are there under another UID as well
    """

    expunge: Listing
    renumber: Mapping[str, Sequence[int]]
    doubles: Listing = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """For the peer."""
        return {"expunge": self.expunge, "renumber": self.renumber, "doubles": self.doubles}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Plan:
        """What the peer sent."""
        expunge, doubles = (
            {
                str(folder): [(int(uid), str(guid)) for uid, guid in mails]
                for folder, mails in document[name].items()
            }
            for name in ("expunge", "doubles")
        )
        renumber = {str(f): list(map(int, uids)) for f, uids in document["renumber"].items()}
        return cls(expunge, renumber, doubles)


def plans(
    mine: Mailbox, theirs: Mailbox, after: Mapping[str, int] = _NOTHING, *, broken: bool = False
) -> tuple[Plan, Plan]:
    """What is to be done here and there.

    ``after`` is up to where both had the same, ``broken``: a run broke off since.
    """
    gone: dict[str, list[Mail]] = {}
    doubles: dict[str, list[Mail]] = {}
    both: Common = {}
    newer: tuple[dict[str, list[Mail]], ...] = ({}, {})
    kept: tuple[dict[str, set[str]], ...] = ({}, {})
    for folder in {*mine.histories, *theirs.histories}:
        newest = after.get(folder, 0)
        histories = [box.histories.get(folder, ()) for box in (mine, theirs)]
        unwanted = history.unwanted(histories)
        if unwanted:
            gone[folder] = sorted(unwanted)
        if broken:
            left = [
                [life for life in h if (life.uid, life.guid) not in unwanted] for h in histories
            ]
            if surplus := history.surplus(left, newest):
                doubles[folder] = sorted(surplus)
                unwanted |= surplus
        one, other = ({(life.uid, life.guid) for life in lives} for lives in histories)
        both[folder] = max((uid for uid, _ in one & other), default=0)
        for mails, guids, lives in zip(newer, kept, histories, strict=True):
            places = {(life.uid, life.guid) for life in lives if life.is_there} - unwanted
            guids[folder] = {guid for _, guid in places}
            mails[folder] = [(uid, guid) for uid, guid in places if uid > newest]
    return (
        Plan(gone, holes(newer[0], newer[1], both, kept[1]), doubles),
        Plan(gone, holes(newer[1], newer[0], both, kept[0]), doubles),
    )


async def look(doveadm: Doveadm, states: States, user: str) -> Mailbox:
    """All mails that are there, and what became of others. Raises :class:`DovecotError`."""
    rows = await doveadm.rows(user, 3, "fetch", " ".join(_FIELDS), "all")
    # Only then the logs: what is taken away meanwhile is neither in the list nor unexplained.
    unread = names = await doveadm.folders(user)
    doubles, renumbered = states.doubles(user), states.renumbered(user)
    histories: dict[str, History] = {}
    for _ in range(_LOOKS):
        paths = await _paths(doveadm, user, unread)
        histories |= await asyncio.to_thread(_histories, rows, paths, doubles, renumbered)
        now = await doveadm.folders(user)
        # The log of a folder that was renamed meanwhile was not where it was looked for.
        unread = {f: now[f] for f, name in names.items() if now.get(f, name) != name}
        names = {f: now[f] for f in names if f in now}
        if not unread:
            break
    else:
        raise DovecotError(f"{user}: folders were renamed all the time while their logs were read")
    histories = {folder: histories[folder] for folder in names}
    told = {
        folder: {(life.uid, life.guid) for life in histories.get(folder, ())}
        for folder in {*doubles, *renumbered}
    }
    states.note(
        user,
        {folder: doubles[folder] & told[folder] for folder in doubles},
        {folder: renumbered[folder] & told[folder] for folder in renumbered},
    )
    return Mailbox(histories, names)


def _histories(
    rows: Sequence[tuple[str, ...]],
    paths: Mapping[str, Path],
    doubles: Mapping[str, Set[Mail]],
    renumbered: Mapping[str, Set[Mail]],
) -> dict[str, History]:
    present: dict[str, list[Mail]] = {}
    for folder, uid, guid in rows:
        present.setdefault(folder, []).append((int(uid), guid))
    found = {}
    for folder, path in paths.items():
        lives = history.read(history.logs_of(path), present.get(folder, ()))
        lives = history.linked(lives, renumbered.get(folder, set()))
        found[folder] = history.spared(lives, doubles.get(folder, set()))
    return found


async def _paths(doveadm: Doveadm, user: str, names: Mapping[str, str]) -> dict[str, Path]:
    """Folder (its GUID) -> where its logs are."""
    return {folder: await doveadm.index(user, name, folder) for folder, name in names.items()}


async def mend(doveadm: Doveadm, states: States, user: str, box: Mailbox, plan: Plan) -> int:
    """Carry out a plan here; returns how many mails got new UIDs.

    Raises :class:`DovecotError`.
    """
    doubles, renumbered = states.doubles(user), states.renumbered(user)
    for folder, mails in plan.doubles.items():
        doubles.setdefault(folder, set()).update(box.here(folder) & set(mails))
    for folder, uids in plan.renumber.items():
        moved = {mail for mail in box.here(folder) if mail[0] in uids}
        renumbered.setdefault(folder, set()).update(moved)
    states.note(user, doubles, renumbered)
    for what, listing in (("taken away by the user", plan.expunge), ("twice", plan.doubles)):
        for folder, unwanted in listing.items():
            if gone := box.here(folder).intersection(unwanted):
                name, which = box.names[folder], uid_set(uid for uid, _ in gone)
                await doveadm.rows(user, 1, "expunge", "mailbox-guid", folder, "uid", which)
                notify.log(notify.INFO, f"{user}: {what}, in {name}: UIDs {which}")
    for folder, uids in plan.renumber.items():
        name, which = box.names[folder], uid_set(uids)
        await doveadm.rows(user, 1, "move", "--", name, "mailbox-guid", folder, "uid", which)
        notify.log(notify.INFO, f"{user}: left out by a broken run, in {name}: UIDs {which}")
    return sum(map(len, plan.renumber.values()))
