"""After a run that broke off: keep dsync from taking what it did not carry for deleted.

dsync commits what it has of a run that breaks off, and it carries mails in no order. So a mail
can be missing on one server below others that both have, and the next run, a full one too, takes
it for deleted there and deletes it everywhere (Dovecot 2.4.1; tests/pairsync/test_faults.py
shows it). Before that run such mails get a new UID at the end of their folder, where dsync takes
them for new.

Only mails newer than the last good run count: what both had then and one has not now was deleted.

The other way round, a mail that a user deleted or moved away since then comes back where dsync
gave it another UID meanwhile, as it does to mails that came to both servers at once: then it is
there twice. The hook has noted the UIDs, Dovecot's log of the folder tells whose they were, and
such mails are deleted on the other server too.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from pairsync import notify
from pairsync.doveadm import Doveadm, DovecotError
from pairsync.markers import Expunged

Common = dict[str, int]
"""Folder (its GUID) -> highest UID up to which both had the same."""

Listing = Mapping[str, Sequence[tuple[int, str]]]
"""Folder (its GUID) -> UID and GUID of mails, in the order of their UIDs; GUID empty: unknown."""

_NOTHING: Mapping[str, Sequence[tuple[int, str]]] = {}
_VERSION = 1
_HEADER, _CHECKSUM = 4, 4
_MAILBOX = struct.Struct("<16sIIQQI")
_LOGS = ("dovecot.index.log.2", "dovecot.index.log")
_LOG_HEADER = struct.Struct("<xxH")
_LOG_RECORD = struct.Struct("<BBBBI")
_LOG_TYPE, _EXPUNGE_GUID = 0x0FFFFFFF, 0x2000 | 0xCD90
_EXPUNGED = struct.Struct("<I16s")
_FIELDS = "mailbox mailbox-guid uid guid"


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


def holes(mine: Listing, theirs: Listing, taken: Listing = _NOTHING) -> dict[str, list[int]]:
    """UIDs of mails here that the other one has not, below one that both have.

    ``taken``: what users took from the folders of the other one, which is no hole.
    """
    found = {}
    for folder, mails in mine.items():
        other = theirs.get(folder, [])
        guids = {guid for _, guid in other}
        matched = max((uid for uid, _ in set(mails) & set(other)), default=0)
        uids, gone = _both(taken, folder)
        missing = [
            uid
            for uid, guid in mails
            if uid < matched and guid not in guids and guid not in gone and uid not in uids
        ]
        if missing:
            found[folder] = missing
    return found


def strays(mine: Listing, theirs: Listing, taken: Listing, own: Listing) -> dict[str, list[int]]:
    """UIDs of mails here that users took from the folders of the other one (``taken``).

    But for those that they took from somewhere here (``own``): who had both hands on a mail
    rather has it twice than not at all.
    """
    touched = {guid for mails in own.values() for _, guid in mails}
    found = {}
    for folder, mails in mine.items():
        there = {guid for _, guid in theirs.get(folder, [])}
        gone = _both(taken, folder)[1] - there - touched
        left = [uid for uid, guid in mails if guid in gone]
        if left:
            found[folder] = left
    return found


def _both(taken: Listing, folder: str) -> tuple[set[int], set[str]]:
    mails = taken.get(folder, [])
    return {uid for uid, _ in mails}, {guid for _, guid in mails if guid}


def expunged_guids(log: bytes) -> dict[int, str]:
    """UID -> GUID of mails that a folder's transaction log tells were expunged.

    Of Dovecot's ``dovecot.index.log`` (mail-transaction-log.h), what could be read.
    """
    found: dict[int, str] = {}
    if len(log) < _LOG_HEADER.size:
        return found
    (at,) = _LOG_HEADER.unpack_from(log)
    while at + _LOG_RECORD.size <= len(log):
        *quarters, kind = _LOG_RECORD.unpack_from(log, at)
        size = 0
        for quarter in quarters:
            size = size << 7 | quarter & 0x7F
        size <<= 2
        # One that is being written has not all of these bits.
        if not all(quarter & 0x80 for quarter in quarters) or size < _LOG_RECORD.size:
            break
        body = log[at + _LOG_RECORD.size : at + size]
        if kind & _LOG_TYPE == _EXPUNGE_GUID and len(body) % _EXPUNGED.size == 0:
            found.update((uid, guid.hex()) for uid, guid in _EXPUNGED.iter_unpack(body))
        at += size
    return found


@dataclass(frozen=True)
class Mailbox:
    """Mails of a user here."""

    mails: Listing
    names: Mapping[str, str]
    """Folder (its GUID) -> its name."""
    taken: Listing
    """What users took from the folders since the last good run."""


async def look(
    doveadm: Doveadm, user: str, after: Mapping[str, int], expunged: Expunged
) -> Mailbox:
    """List mails newer than the UIDs in ``after``, and those of ``expunged``.

    Raises :class:`DovecotError`.
    """
    mails: dict[str, list[tuple[int, str]]] = {}
    names: dict[str, str] = {}
    for name, folder, uid, guid in await _rows(doveadm, user, 4, "fetch", _FIELDS, "all"):
        names[folder] = name
        if int(uid) > after.get(folder, 0):
            mails.setdefault(folder, []).append((int(uid), guid))
    return Mailbox(mails, names, await _taken(doveadm, user, expunged) if expunged else {})


async def _taken(doveadm: Doveadm, user: str, expunged: Expunged) -> Listing:
    found: dict[str, list[tuple[int, str]]] = {}
    # Whatever is asked for, it comes in doveadm's own order.
    folders = await _rows(doveadm, user, 3, "mailbox status", "uidvalidity guid", "*")
    for name, validity, folder in folders:
        uids = sorted(uid for of, uid in expunged if of == int(validity))
        if uids:
            guids: dict[int, str] = {}
            # Without the log they are known by their UIDs alone.
            with contextlib.suppress(DovecotError):
                rows = await _rows(doveadm, user, 1, "mailbox path", "-t", "index", name)
                for path, log in product([row[0] for row in rows if row[0]], _LOGS):
                    with contextlib.suppress(OSError):
                        guids |= expunged_guids(await asyncio.to_thread(Path(path, log).read_bytes))
            found[folder] = [(uid, guids.get(uid, "")) for uid in uids]
    return found


async def _rows(doveadm: Doveadm, user: str, width: int, *words: str) -> list[tuple[str, ...]]:
    """The table that a command prints."""
    reply = await doveadm.run(user, *words)
    if reply.code:
        raise DovecotError(f"doveadm {words[0]} for {user}: {reply.log or reply.code}")
    values = reply.values
    # Of no row there is one empty value.
    return [tuple(values[at : at + width]) for at in range(0, len(values) - width + 1, width)]


async def renumber(
    doveadm: Doveadm, user: str, box: Mailbox, found: Mapping[str, Sequence[int]]
) -> int:
    """Give mails new UIDs; returns how many. Raises :class:`DovecotError`."""
    for folder, uids in found.items():
        name, which = box.names[folder], ",".join(map(str, uids))
        await _rows(doveadm, user, 1, "move", name, "mailbox", name, "uid", which)
        notify.log(notify.INFO, f"{user}: left out by a run that broke off, {name}: UIDs {which}")
    return sum(map(len, found.values()))


async def expunge(
    doveadm: Doveadm, user: str, box: Mailbox, found: Mapping[str, Sequence[int]]
) -> None:
    """Delete mails. Raises :class:`DovecotError`."""
    for folder, uids in found.items():
        name, which = box.names[folder], ",".join(map(str, uids))
        await _rows(doveadm, user, 1, "expunge", "mailbox", name, "uid", which)
        notify.log(notify.INFO, f"{user}: deleted or moved by the user, {name}: UIDs {which}")


async def bury(doveadm: Doveadm, user: str, expunged: Expunged) -> None:
    """Delete what came back: mails that the user took away (``expunged``) while dsync was on.

    dsync gives mails that came to both servers at once new UIDs, by copying them. Where a user
    moved or deleted one since it looked, the copy is left (Dovecot 2.4.1), under a higher UID.
    What was taken from two folders meanwhile may have been moved back, and stays.

    Raises :class:`DovecotError`.
    """
    taken = await _taken(doveadm, user, expunged)
    places = Counter(guid for mails in taken.values() for guid in {guid for _, guid in mails})
    names: dict[str, str] = {}
    found: dict[str, list[int]] = {}
    for folder, mails in taken.items():
        for taken_uid, guid in mails:
            if not guid or places[guid] > 1:
                continue
            query = ("mailbox-guid", folder, "guid", guid)
            for name, uid in await _rows(doveadm, user, 2, "fetch", "mailbox uid", *query):
                if int(uid) > taken_uid:
                    names[folder] = name
                    found.setdefault(folder, []).append(int(uid))
    await expunge(doveadm, user, Mailbox({}, names, {}), found)
