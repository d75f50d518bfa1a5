"""After a run that broke off: keep dsync from taking what it did not carry for deleted.

dsync commits what it has of a run that breaks off, and it carries mails in no order. So a mail
can be missing on one server below others that both have, and the next run, a full one too, takes
it for deleted there and deletes it everywhere (Dovecot 2.4.1; tests/pairsync/test_faults.py
shows it). Before that run such mails get a new UID at the end of their folder, where dsync takes
them for new.

Only mails newer than the last good run count: what both had then and one has not now was deleted.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pairsync.doveadm import Doveadm, DovecotError

Common = dict[str, int]
"""Folder (its GUID) -> highest UID up to which both had the same."""

Listing = dict[str, list[tuple[int, str]]]
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


def holes(mine: Listing, theirs: Listing) -> dict[str, list[int]]:
    """UIDs of mails here that the other one has not, below one that both have."""
    found = {}
    for folder, mails in mine.items():
        other = theirs.get(folder, [])
        guids = {guid for _, guid in other}
        matched = max((uid for uid, _ in set(mails) & set(other)), default=0)
        missing = [uid for uid, guid in mails if uid < matched and guid not in guids]
        if missing:
            found[folder] = missing
    return found


@dataclass(frozen=True)
class Mailbox:
    """Mails of a user here."""

    mails: Listing
    names: Mapping[str, str]
    """Folder (its GUID) -> its name."""


async def look(doveadm: Doveadm, user: str, after: Mapping[str, int]) -> Mailbox:
    """List mails newer than the UIDs in ``after``. Raises :class:`DovecotError`."""
    reply = await doveadm.run(user, "fetch", " ".join(("mailbox", *_FIELDS)), "all")
    if reply.code:
        raise DovecotError(f"doveadm fetch for {user}: {reply.log or reply.code}")
    mails: Listing = {}
    names: dict[str, str] = {}
    width = len(_FIELDS) + 1
    values = reply.values[: len(reply.values) // width * width]
    for at in range(0, len(values), width):
        name, folder, uid, guid = values[at : at + width]
        names[folder] = name
        if int(uid) > after.get(folder, 0):
            mails.setdefault(folder, []).append((int(uid), guid))
    return Mailbox(mails, names)


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
