"""Logs of a folder as Dovecot writes them (mail-transaction-log.h)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

APPEND, FLAGS, INTRO, DATA, EXPUNGE = 0x2, 0x4, 0x40, 0x200, 0x2000 | 0xCD90
BOUNDARY = 0x80000
DONE, DSYNC = 0x10000000, 0x20000000
BEGAN = 1_700_000_000
"""When each log was begun."""


def record(kind: int, body: bytes) -> bytes:
    size = (len(body) + 8) >> 2
    coded = bytes(0x80 | size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return coded + struct.pack("<I", kind) + body


def log(*records: bytes, number: int = 2, before: int = 0, began: int = BEGAN) -> bytes:
    """``before``: number of the log that it goes on from."""
    head = struct.pack("<BBHIIIII16x", 1, 3, 40, 7, number, before, 0, began)
    return head + b"".join(records)


def boundary() -> bytes:
    """A transaction begins."""
    return record(BOUNDARY | DONE, struct.pack("<I", 12))


def saved(uid: int, at: int) -> bytes:
    """Where mdbox has a mail, and since when."""
    intro = record(INTRO | DONE, struct.pack("<IIIHHHH", 4, 0, 0, 8, 4, 1, 0))
    return intro + record(DATA | DONE, struct.pack("<III", uid, 1, at))


def appends(mails: Sequence[tuple[int, str]], by: int = 0) -> bytes:
    """Several at once."""
    return (
        record(APPEND | DONE | by, b"".join(struct.pack("<IB3x", uid, 0) for uid, _ in mails))
        + record(INTRO | DONE, struct.pack("<IIIHHHH", 5, 0, 0, 16, 1, 1, 0))
        + record(
            DATA | DONE,
            b"".join(struct.pack("<I16s", uid, bytes.fromhex(guid)) for uid, guid in mails),
        )
    )


def append(uid: int, guid: str, by: int = 0) -> bytes:
    """As mdbox does it: the mail, then its GUID."""
    return appends([(uid, guid)], by)


def wish(uid: int, by: int = 0) -> bytes:
    """IMAP does not say which mail it is that it wants to be gone."""
    return record(EXPUNGE | by, struct.pack("<I16s", uid, bytes(16)))


def done(uid: int, guid: str, by: int = 0) -> bytes:
    return record(EXPUNGE | DONE | by, struct.pack("<I16s", uid, bytes.fromhex(guid)))
