"""After a run that broke off: keep dsync from taking what it did not carry for deleted.

dsync commits what it has of a run that breaks off, and it carries mails in no order. So a mail
can be missing on one server below others that both have, and the next run, a full one too, takes
it for deleted there and deletes it everywhere (Dovecot 2.4.1; tests/pairsync/test_faults.py
shows it). Before that run such mails get a new UID at the end of their folder, where dsync takes
them for new.

Only mails newer than the last good run count: what both had then and one has not now was deleted.
And what a user took from there since, which the hook noted, was deleted or moved: it would be
there twice.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pairsync.doveadm import Doveadm, DovecotError
from pairsync.markers import Expunged

Common = dict[str, int]
"""Folder (its GUID) -> highest UID up to which both had the same."""

Listing = dict[str, list[tuple[int, str]]]
"""Folder (its GUID) -> UID and GUID of mails, in the order of their UIDs."""

Taken = Mapping[str, Collection[int]]
"""Folder (its GUID) -> UIDs of mails that a user deleted there or moved away."""

_NOTHING: Taken = {}
_VERSION = 1
_HEADER, _CHECKSUM = 4, 4
_MAILBOX = struct.Struct("<16sIIQQI")
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


def holes(mine: Listing, theirs: Listing, gone: Taken = _NOTHING) -> dict[str, list[int]]:
    """UIDs of mails here that the other one has not, below one that both have.

    ``gone``: what users took from the folders of the other one, which is no hole.
    """
    found = {}
    for folder, mails in mine.items():
        other = theirs.get(folder, [])
        guids = {guid for _, guid in other}
        matched = max((uid for uid, _ in set(mails) & set(other)), default=0)
        left = gone.get(folder, frozenset())
        missing = [
            uid for uid, guid in mails if uid < matched and guid not in guids and uid not in left
        ]
        if missing:
            found[folder] = missing
    return found


@dataclass(frozen=True)
class Mailbox:
    """Mails of a user here."""

    mails: Listing
    names: Mapping[str, str]
    """Folder (its GUID) -> its name."""
    taken: Taken


async def look(
    doveadm: Doveadm, user: str, after: Mapping[str, int], expunged: Expunged
) -> Mailbox:
    """List mails newer than the UIDs in ``after``, and those of ``expunged``.

    Raises :class:`DovecotError`.
    """
    mails: Listing = {}
    names: dict[str, str] = {}
    for name, folder, uid, guid in await _rows(doveadm, user, 4, "fetch", _FIELDS, "all"):
        names[folder] = name
        if int(uid) > after.get(folder, 0):
            mails.setdefault(folder, []).append((int(uid), guid))
    taken: dict[str, list[int]] = {}
    if expunged:
        # Whatever is asked for, it comes in doveadm's own order.
        folders = await _rows(doveadm, user, 3, "mailbox status", "uidvalidity guid", "*")
        for _, validity, folder in folders:
            uids = sorted(uid for of, uid in expunged if of == int(validity))
            if uids:
                taken[folder] = uids
    return Mailbox(mails, names, taken)


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
        name = box.names[folder]
        which = ",".join(map(str, uids))
        reply = await doveadm.run(user, "move", name, "mailbox", name, "uid", which)
        if reply.code:
            raise DovecotError(f"doveadm move for {user} in {name}: {reply.log or reply.code}")
    return sum(map(len, found.values()))
