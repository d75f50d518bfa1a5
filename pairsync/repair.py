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
import contextlib
import struct
from collections.abc import Mapping, Sequence, Set
from dataclasses import astuple, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pairsync import history, notify
from pairsync.doveadm import Doveadm, DovecotError
from pairsync.history import History, Life, Mail

Common = dict[str, int]
"""Folder (its GUID) -> highest UID up to which both had the same."""

Listing = dict[str, list[Mail]]
"""Folder (its GUID) -> UID and GUID of mails, in the order of their UIDs."""

_VERSION = 1
_HEADER, _CHECKSUM = 4, 4
_MAILBOX = struct.Struct("<16sIIQQI")
_FIELDS = ("mailbox-guid", "uid", "guid")


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
            found[folder] = missing
    return found


@dataclass(frozen=True)
class Mailbox:
    """Mails of a user here, newer than the last good run."""

    mails: Listing
    histories: Mapping[str, History]
    """Folder (its GUID) -> its history, of mails that are newer or there."""
    names: Mapping[str, str]
    """Folder (its GUID) -> its name."""
    present: Mapping[str, Set[Mail]]
    """Folder (its GUID) -> all of its mails."""

    def document(self) -> dict[str, Any]:
        """For the peer."""
        histories = {
            folder: [[*astuple(life)] for life in lives] for folder, lives in self.histories.items()
        }
        return {"mails": self.mails, "histories": histories}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Mailbox:
        """What the peer sent."""
        histories = {
            str(folder): [
                Life(int(uid), str(guid), bool(by_dsync), tuple(map(int, before)), *map(bool, more))
                for uid, guid, by_dsync, before, *more in lives
            ]
            for folder, lives in document["histories"].items()
        }
        return cls(_listing(document["mails"]), histories, {}, {})


def _listing(document: Mapping[str, Any]) -> Listing:
    return {
        str(folder): [(int(uid), str(guid)) for uid, guid in mails]
        for folder, mails in document.items()
    }


@dataclass(frozen=True)
class Plan:
    """What is to be done on one server.

    :param expunge: folder (its GUID) -> mails to delete; most of them are not there any more
    :param renumber: folder (its GUID) -> UIDs of mails to give new ones
    """

    expunge: Listing
    renumber: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Plan:
        """What the peer sent."""
        renumber = {str(f): list(map(int, uids)) for f, uids in document["renumber"].items()}
        return cls(_listing(document["expunge"]), renumber)


def plans(
    mine: Mailbox, theirs: Mailbox, after: Mapping[str, int] = _NOTHING, *, broken: bool = False
) -> tuple[Plan, Plan]:
    """What is to be done here and there.

    ``after`` is up to where both had the same, ``broken``: a run broke off since.
    """
    gone: Listing = {}
    both: Common = {}
    boxes = (mine, theirs)
    kept: tuple[dict[str, set[str]], ...] = ({}, {})
    for folder in {*mine.histories, *theirs.histories}:
        histories = [box.histories.get(folder, ()) for box in boxes]
        unwanted = history.unwanted(histories)
        if broken:
            left = [
                [life for life in h if (life.uid, life.guid) not in unwanted] for h in histories
            ]
            unwanted |= history.surplus(left, after.get(folder, 0))
        if unwanted:
            gone[folder] = sorted(unwanted)
        one, other = ({(life.uid, life.guid) for life in lives} for lives in histories)
        both[folder] = max((uid for uid, _ in one & other), default=0)
        for guids, lives in zip(kept, histories, strict=True):
            places = {(life.uid, life.guid) for life in lives if life.is_there} - unwanted
            guids[folder] = {guid for _, guid in places}
    here, there = (_without(box.mails, gone) for box in boxes)
    return (
        Plan(gone, holes(here, there, both, kept[1])),
        Plan(gone, holes(there, here, both, kept[0])),
    )


def _without(mails: Listing, gone: Listing) -> Listing:
    return {
        folder: [mail for mail in found if mail not in gone.get(folder, ())]
        for folder, found in mails.items()
    }


async def look(doveadm: Doveadm, user: str, after: Mapping[str, int]) -> Mailbox:
    """List mails newer than the UIDs in ``after``. Raises :class:`DovecotError`."""
    present: Listing = {}
    for folder, uid, guid in await _rows(doveadm, user, 3, "fetch", " ".join(_FIELDS), "all"):
        present.setdefault(folder, []).append((int(uid), guid))
    # Only then the logs: what is taken away meanwhile is neither in the list nor unexplained.
    histories: dict[str, History] = {}
    names = await _names(doveadm, user)
    for folder, name in names.items():
        logs = await _logs(doveadm, user, name)
        here, newest = present.get(folder, []), after.get(folder, 0)
        lives = await asyncio.to_thread(history.read, logs, here)
        wanted = {guid for _, guid in here} | {life.guid for life in lives if life.uid > newest}
        histories[folder] = [life for life in lives if life.guid in wanted]
    if names != await _names(doveadm, user):
        # The log of a folder that was renamed meanwhile was not where it was looked for.
        raise DovecotError(f"{user}: folders were renamed while their logs were read")
    mails = {
        folder: newer
        for folder, found in present.items()
        if (newer := [mail for mail in found if mail[0] > after.get(folder, 0)])
    }
    return Mailbox(mails, histories, names, {folder: set(f) for folder, f in present.items()})


async def _names(doveadm: Doveadm, user: str) -> dict[str, str]:
    """Folder (its GUID) -> its name."""
    rows = await _rows(doveadm, user, 2, "mailbox status", "guid", "*")
    return {folder: name for name, folder in rows}


async def _logs(doveadm: Doveadm, user: str, name: str) -> list[bytes]:
    rows = await _rows(doveadm, user, 1, "mailbox path", "-t", "index", name)
    found = []
    for log in history.LOGS:
        with contextlib.suppress(OSError):
            found.append(await asyncio.to_thread(Path(rows[0][0], log).read_bytes))
    return found


async def _rows(doveadm: Doveadm, user: str, width: int, *words: str) -> list[tuple[str, ...]]:
    reply = await doveadm.run(user, *words)
    if reply.code:
        raise DovecotError(f"doveadm {words[0]} for {user}: {reply.log or reply.code}")
    whole = len(reply.values) // width * width
    return [reply.values[at : at + width] for at in range(0, whole, width)]


async def mend(doveadm: Doveadm, user: str, box: Mailbox, plan: Plan) -> int:
    """Carry out a plan here; returns how many mails got new UIDs.

    Raises :class:`DovecotError`.
    """
    for folder, unwanted in plan.expunge.items():
        if gone := sorted(box.present.get(folder, set()) & set(unwanted)):
            name, which = box.names[folder], ",".join(str(uid) for uid, _ in gone)
            await _rows(doveadm, user, 1, "expunge", "mailbox-guid", folder, "uid", which)
            notify.log(notify.INFO, f"{user}: taken away by the user, in {name}: UIDs {which}")
    for folder, uids in plan.renumber.items():
        name, which = box.names[folder], ",".join(map(str, uids))
        await _rows(doveadm, user, 1, "move", name, "mailbox-guid", folder, "uid", which)
        notify.log(notify.INFO, f"{user}: left out by a broken run, in {name}: UIDs {which}")
    return sum(map(len, plan.renumber.values()))


async def bury(doveadm: Doveadm, user: str) -> None:
    """Delete what the user took away here while dsync was giving it another UID.

    Raises :class:`DovecotError`.
    """
    for folder, name in (await _names(doveadm, user)).items():
        lives = await asyncio.to_thread(history.read, await _logs(doveadm, user, name), ())
        copied = {(life.uid, life.guid) for life in lives if life.before}
        if copies := sorted(history.unwanted([lives]) & copied):
            query = ("mailbox-guid", folder, "uid", ",".join(str(uid) for uid, _ in copies))
            rows = await _rows(doveadm, user, 2, "fetch", "uid guid", *query)
            left = {(int(uid), guid) for uid, guid in rows}
            box = Mailbox({}, {}, {folder: name}, {folder: left})
            await mend(doveadm, user, box, Plan({folder: copies}, {}))
