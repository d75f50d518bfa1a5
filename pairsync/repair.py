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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pairsync import history, notify
from pairsync.doveadm import Doveadm, DovecotError, mails_of, uid_set
from pairsync.history import History, Life, Mail, Repair
from pairsync.state import States

Common = dict[str, int]
"""Folder (its GUID) -> highest UID up to which both had the same."""

Listing = Mapping[str, Sequence[Mail]]
"""Folder (its GUID) -> UID and GUID of mails."""

Guids = Mapping[str, Set[str]]
"""Folder (its GUID) -> GUIDs of mails."""

Uids = Mapping[str, Set[int]]
"""Folder (its GUID) -> UIDs of mails."""

_Found = tuple[History, tuple[set[int], set[int]], Set[Repair]]
"""Of a folder: its history, what its repairs did, and these."""

_VERSION = 1
_HEADER, _CHECKSUM = 4, 4
_MAILBOX = struct.Struct("<16sIIQQI")
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
    :param unclear: folder (its GUID) -> UIDs of mails of which nobody knows who put them there
    :param restored: folder (its GUID) -> UIDs of mails that Dovecot put there in a repair
    :param repairs: where a folder's logs are -> repairs of it that are known; this server's own
    """

    histories: Mapping[str, History]
    names: Mapping[str, str] = field(default_factory=dict)
    unclear: Uids = field(default_factory=dict)
    restored: Uids = field(default_factory=dict)
    repairs: Mapping[Path, Set[Repair]] = field(default_factory=dict)

    def here(self, folder: str) -> set[Mail]:
        """What is in a folder."""
        lives = self.histories.get(folder, ())
        return {(life.uid, life.guid) for life in lives if life.is_there}

    def moot(self, after: Mapping[str, int]) -> Guids:
        """Mails that may be left out or unwanted: newer than a UID, taken away, or more than once
        in a folder of which nobody knows how they came there. And what Dovecot put back.

        Of all others, both servers have had the same since the last good run.
        """
        again = {
            life.guid
            for folder, uids in self.restored.items()
            for life in self.histories.get(folder, ())
            if life.uid in uids
        }
        found = {}
        for folder, lives in self.histories.items():
            anyway, newest = again | self._several(folder), after.get(folder, 0)
            found[folder] = {
                life.guid
                for life in lives
                if life.taken or life.uid > newest or life.guid in anyway
            }
        return found

    def _several(self, folder: str) -> set[str]:
        """Mails that are in a folder more than once, where Dovecot repaired it."""
        unclear = self.unclear.get(folder, ())
        if not unclear:
            return set()
        lives = self.histories[folder]
        there = Counter(life.guid for life in lives if life.is_there)
        return {life.guid for life in lives if life.uid in unclear and there[life.guid] > 1}

    def only(self, guids: Guids) -> Mailbox:
        """Some mails, under all of their UIDs."""
        found = {
            folder: [life for life in lives if life.guid in wanted]
            for folder, lives in self.histories.items()
            if (wanted := guids.get(folder))
        }
        unclear, restored = (
            {
                folder: uids & {life.uid for life in found[folder]}
                for folder, uids in which.items()
                if folder in found
            }
            for which in (self.unclear, self.restored)
        )
        return Mailbox(found, self.names, unclear, restored)

    def document(self) -> dict[str, Any]:
        """For the peer."""
        unclear, restored = (
            {folder: sorted(uids) for folder, uids in which.items() if uids}
            for which in (self.unclear, self.restored)
        )
        return {"histories": self.histories, "unclear": unclear, "restored": restored}

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
        # One of an earlier release does not tell.
        unclear, restored = (
            {str(f): set(map(int, uids)) for f, uids in document.get(part, {}).items()}
            for part in ("unclear", "restored")
        )
        return cls(histories, {}, unclear, restored)

    def by_users(self, folder: str) -> set[str]:
        """Mails of which one is in a folder that a user may have put there, or did."""
        uids = {*self.unclear.get(folder, ()), *self.restored.get(folder, ())}
        lives = [life for life in self.histories.get(folder, ()) if life.is_there]
        return {life.guid for life in lives if not life.by_dsync and life.uid not in uids}


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
    :param used: folder (its GUID) -> highest UID that dsync gave on the other server to one of the
        mails that are here, which is not there any more: to dsync, one that gets that UID here is
        the same, so it would delete it
    """

    expunge: Listing
    renumber: Mapping[str, Sequence[int]]
    doubles: Listing = field(default_factory=dict)
    used: Common = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """For the peer."""
        return {
            "expunge": self.expunge,
            "renumber": self.renumber,
            "doubles": self.doubles,
            "used": self.used,
        }

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
        # One of an earlier release does not tell.
        used = {str(f): int(uid) for f, uid in document.get("used", {}).items()}
        return cls(expunge, renumber, doubles, used)


def plans(
    mine: Mailbox, theirs: Mailbox, after: Mapping[str, int] = _NOTHING, *, broken: bool = False
) -> tuple[Plan, Plan]:
    """What is to be done here and there.

    ``after`` is up to where both had the same, ``broken``: a run broke off since.
    """
    boxes = (mine, theirs)
    folders = {*mine.histories, *theirs.histories}
    gone = {
        folder: history.unwanted([box.histories.get(folder, ()) for box in boxes])
        for folder in folders
    }
    doubles = _needless(boxes, gone, after)
    for folder in folders:
        unwanted = gone[folder] | doubles[folder]
        doubles[folder] |= _surplus(boxes, folder, unwanted, after.get(folder, 0), broken=broken)
    unwanted_of = {folder: gone[folder] | doubles[folder] for folder in folders}
    both: Common = {}
    newer: tuple[dict[str, list[Mail]], ...] = ({}, {})
    kept: tuple[dict[str, set[str]], ...] = ({}, {})
    for folder in folders:
        histories = [box.histories.get(folder, ()) for box in boxes]
        one, other = ({(life.uid, life.guid) for life in lives} for lives in histories)
        both[folder] = max((uid for uid, _ in one & other), default=0)
        for latest_of, guids, box in zip(newer, kept, boxes, strict=True):
            places = box.here(folder) - unwanted_of[folder]
            guids[folder] = {guid for _, guid in places}
            latest_of[folder] = [mail for mail in places if mail[0] > after.get(folder, 0)]
    expunged, doubled = (
        {folder: sorted(mails) for folder, mails in some.items() if mails}
        for some in (gone, doubles)
    )

    def plan(here: int, there: int) -> Plan:
        return Plan(
            expunged,
            holes(newer[here], newer[there], both, kept[there]),
            doubled,
            _used(boxes[here], boxes[there], unwanted_of, after),
        )

    return plan(0, 1), plan(1, 0)


def _needless(
    boxes: Sequence[Mailbox], gone: Mapping[str, Set[Mail]], after: Mapping[str, int]
) -> dict[str, set[Mail]]:
    """Folder -> what Dovecot put back there since the last good run, or what is there when it
    repaired the folder and a user took away on the other server, of mails that are in another
    folder as well, where dsync takes them for no deleted ones.
    """
    safe: dict[str, set[str]] = {}
    doubtful = [uids for box in boxes for of in (box.restored, box.unclear) for uids in of.values()]
    if not any(doubtful):
        return {folder: set() for folder in gone}
    one, other = boxes
    again = {
        folder: (_again(one, other, folder, newest), _again(other, one, folder, newest))
        for folder in gone
        for newest in (after.get(folder, 0),)
    }
    for folder in gone:
        known = [box.here(folder) - gone[folder] for box in boxes]
        # What goes from one server goes from both.
        needless = set().union(*again[folder])
        for here in known:
            both = known[0] & known[1]
            for mail in here:
                if mail[0] not in needless and (mail in both or mail[0] > after.get(folder, 0)):
                    safe.setdefault(mail[1], set()).add(folder)
    return {
        folder: {
            (uid, guid)
            for box, needless in zip(boxes, again[folder], strict=True)
            for uid, guid in box.here(folder) - gone[folder]
            if uid in needless and uid > after.get(folder, 0) and safe.get(guid, set()) - {folder}
        }
        for folder in gone
    }


def _again(here: Mailbox, there: Mailbox, folder: str, newest: int) -> set[int]:
    """UIDs of mails of a folder that are here because Dovecot put them back, or of which its repair
    has forgotten how they came here while a user took them away there, for good and since both had
    the same up to ``newest``.
    """
    lives = there.histories.get(folder, ())
    taken = {life.guid for life in lives if life.taken and life.uid > newest}
    taken -= there.by_users(folder)
    lives, unclear = here.histories.get(folder, ()), here.unclear.get(folder, ())
    forgotten = {life.uid for life in lives if life.uid in unclear and life.guid in taken}
    return {*here.restored.get(folder, ()), *forgotten}


def _surplus(
    boxes: Sequence[Mailbox], folder: str, unwanted: Set[Mail], newest: int, *, broken: bool
) -> set[Mail]:
    """What is in a folder more than once, but for one of it; nothing that a user has copied since
    Dovecot repaired it, and its log tells all.

    ``newest`` is up to where both had the same, ``broken``: a run broke off since.
    """
    if not broken and not any(box.unclear.get(folder) for box in boxes):
        return set()
    by_users = set().union(*(box.by_users(folder) for box in boxes))
    left = [
        [
            life if life.guid in by_users else life._replace(by_dsync=True)
            for life in box.histories.get(folder, ())
            if life[:2] not in unwanted
        ]
        for box in boxes
    ]
    found = history.surplus(left, newest) if broken else set()
    done = {guid for _, guid in found}
    known = [box.here(folder) - unwanted for box in boxes]
    there = Counter(guid for _, guid in known[0] | known[1])
    unclear = {
        life.guid
        for box in boxes
        for life in box.histories.get(folder, ())
        if life.uid in box.unclear.get(folder, ())
    }
    for guid in unclear - by_users - done:
        # Both have had it, so dsync takes it for no deleted one.
        kept = max((uid for uid, g in known[0] & known[1] if g == guid), default=None)
        if there[guid] > 1 and kept is not None:
            found |= {mail for mail in known[0] | known[1] if mail[1] == guid and mail[0] != kept}
    return found


def _used(
    here: Mailbox, there: Mailbox, unwanted: Mapping[str, Set[Mail]], after: Mapping[str, int]
) -> Common:
    """As :class:`Plan` has it; of those that dsync had made there. Others are far above mostly, and
    whatever is below gets a new UID then.
    """
    has = {life.guid for lives in here.histories.values() for life in lives if life.is_there}
    found = {}
    for folder, lives in there.histories.items():
        last = max((life.uid for life in here.histories.get(folder, ())), default=0)
        over = [
            life.uid
            for life in lives
            if life.by_dsync
            and life.uid > max(last, after.get(folder, 0))
            and life.guid in has
            and (not life.is_there or (life.uid, life.guid) in unwanted[folder])
        ]
        if over:
            found[folder] = max(over)
    return found


async def look(doveadm: Doveadm, states: States, user: str) -> Mailbox:
    """All mails that are there, and what became of others. Raises :class:`DovecotError`."""
    box = await _look(doveadm, states, user)
    if any(uids - {uid for uid, _ in box.here(folder)} for folder, uids in box.restored.items()):
        # Dovecot may have repaired the storage because it was looked at.
        box = await _look(doveadm, states, user)
    return box


async def _look(doveadm: Doveadm, states: States, user: str) -> Mailbox:
    rows = await doveadm.fetch(user, "mailbox-guid uid guid", "all")
    # Only then the logs: what is taken away meanwhile is neither in the list nor unexplained.
    unread = names = await doveadm.folders(user)
    doubles, renumbered = states.doubles(user), states.renumbered(user)
    histories: dict[str, History] = {}
    unclear: dict[str, set[int]] = {}
    restored: dict[str, set[int]] = {}
    repairs: dict[Path, Set[Repair]] = {}
    for _ in range(_LOOKS):
        paths = await _paths(doveadm, user, unread)
        found = await asyncio.to_thread(_histories, rows, paths, doubles, renumbered, repairs)
        for folder, (histories[folder], repaired, repairs[paths[folder]]) in found.items():
            unclear[folder], restored[folder] = repaired
        now = await doveadm.folders(user)
        # The log of a folder that was renamed meanwhile was not where it was looked for.
        unread = {f: now[f] for f, name in names.items() if now.get(f, name) != name}
        names = {f: now[f] for f in names if f in now}
        if not unread:
            break
    else:
        raise DovecotError(f"{user}: folders were renamed all the time while their logs were read")
    histories = {folder: histories[folder] for folder in names}
    # One that is just being renamed may be in no list: what is known of its mails holds.
    told = {f: {(life.uid, life.guid) for life in lives} for f, lives in histories.items()}
    states.note(
        user,
        {folder: mails & told.get(folder, mails) for folder, mails in doubles.items()},
        {folder: mails & told.get(folder, mails) for folder, mails in renumbered.items()},
    )
    return Mailbox(histories, names, unclear, restored, repairs)


def _histories(
    rows: Sequence[tuple[str, ...]],
    paths: Mapping[str, Path],
    doubles: Mapping[str, Set[Mail]],
    renumbered: Mapping[str, Set[Mail]],
    repairs: Mapping[Path, Set[Repair]],
) -> dict[str, _Found]:
    """Folder (its GUID) -> what its logs tell; ``repairs`` are those of other folders."""
    logs_of = {folder: history.logs_of(path) for folder, path in paths.items()}
    repairs_of = {folder: history.repairs(logs) for folder, logs in logs_of.items()}
    began = {r.began for some in (*repairs_of.values(), *repairs.values()) for r in some}
    present: dict[str, list[Mail]] = {}
    for folder, uid, guid in rows:
        present.setdefault(folder, []).append((int(uid), guid))
    found: dict[str, _Found] = {}
    for folder, logs in logs_of.items():
        lives = history.read(logs, present.get(folder, ()))
        lives = history.linked(lives, renumbered.get(folder, set()))
        lives = history.spared(lives, doubles.get(folder, set()))
        found[folder] = (lives, history.repaired(logs, began), repairs_of[folder])
    return found


async def _paths(doveadm: Doveadm, user: str, names: Mapping[str, str]) -> dict[str, Path]:
    """Folder (its GUID) -> where its logs are."""
    return {folder: await doveadm.index(user, name, folder) for folder, name in names.items()}


async def mend(doveadm: Doveadm, states: States, user: str, box: Mailbox, plan: Plan) -> int:
    """Carry out a plan here; returns how many mails got new UIDs.

    Raises :class:`DovecotError`, also where Dovecot repaired the storage when something was changed
    in it: it may have put back what it found in no folder.
    """
    changed = False
    moving = {
        folder: {mail for mail in box.here(folder) if mail[0] in uids}
        for folder, uids in plan.renumber.items()
    }
    for folder, uid in plan.used.items():
        if folder in box.names:
            came = await _pass_over(doveadm, user, box, folder, uid)
            moving.setdefault(folder, set()).update(came)
    doubles, renumbered = states.doubles(user), states.renumbered(user)
    for folder, mails in plan.doubles.items():
        doubles.setdefault(folder, set()).update(box.here(folder) & set(mails))
    for folder, moved in moving.items():
        renumbered.setdefault(folder, set()).update(moved)
    states.note(user, doubles, renumbered)
    for what, listing in (("taken away by the user", plan.expunge), ("twice", plan.doubles)):
        for folder, unwanted in listing.items():
            if gone := box.here(folder).intersection(unwanted):
                which = uid_set(uid for uid, _ in gone)
                name = await _in_folder(doveadm, user, box.names[folder], folder, which, "expunge")
                notify.log(notify.INFO, f"{user}: {what}, in {name}: UIDs {which}")
                changed = True
    for folder, moved in moving.items():
        if moved:
            which = uid_set(uid for uid, _ in moved)
            name = await _in_folder(doveadm, user, box.names[folder], folder, which, "move")
            notify.log(notify.INFO, f"{user}: left out by a broken run, in {name}: UIDs {which}")
            changed = True
    if changed and await asyncio.to_thread(_is_repaired_since, box):
        raise DovecotError(f"{user}: Dovecot repaired the storage while mails were seen to")
    return sum(map(len, moving.values()))


def _is_repaired_since(box: Mailbox) -> bool:
    """Whether Dovecot repaired the storage since it was looked at. It begins all logs anew then."""
    return any(
        history.repairs(history.logs_of(index, history.HEAD)) - known
        for index, known in box.repairs.items()
    )


async def _in_folder(
    doveadm: Doveadm, user: str, name: str, folder: str, which: str, command: str
) -> str:
    """Expunge mails of a folder, or move them to its end; returns the name that it had.

    Raises :class:`DovecotError`.
    """
    for _ in range(_LOOKS):
        target = (name,) if command == "move" else ()
        reply = await doveadm.run(user, command, "--", *target, *mails_of(name, folder, which))
        there = await doveadm.folders(user, name)
        if there.get(folder) == name:
            if reply.code:
                raise DovecotError(f"doveadm {command} for {user}: {reply.log or reply.code}")
            return name
        # It was renamed meanwhile. If it was deleted, the next comparison does not see it.
        name = (await doveadm.folders(user)).get(folder, name)
    raise DovecotError(f"{user}: {name} was renamed or deleted while mails in it were seen to")


async def _pass_over(
    doveadm: Doveadm, user: str, box: Mailbox, folder: str, used: int
) -> set[Mail]:
    """Let mails of a folder get UIDs above ``used``; returns those that just got one below it.

    Raises :class:`DovecotError`.
    """
    last = max((life.uid for life in box.histories.get(folder, ())), default=0)
    if last >= used:
        return set()
    which = ("-N", str(used + 1), "--", box.names[folder])
    await doveadm.rows(user, 1, "mailbox update", *which)
    query = mails_of(box.names[folder], folder, f"{last + 1}:{used}")
    rows = await doveadm.fetch(user, "uid guid", *query)
    return {(int(uid), guid) for uid, guid in rows}
