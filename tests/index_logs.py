"""Logs of a folder as Dovecot writes them (mail-transaction-log.h)."""

from __future__ import annotations

import struct

APPEND, INTRO, DATA, EXPUNGE = 0x2, 0x40, 0x200, 0x2000 | 0xCD90
DONE, DSYNC = 0x10000000, 0x20000000


def record(kind: int, body: bytes) -> bytes:
    size = (len(body) + 8) >> 2
    coded = bytes(0x80 | size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return coded + struct.pack("<I", kind) + body


def log(*records: bytes) -> bytes:
    return struct.pack("<BBH36x", 1, 3, 40) + b"".join(records)


def append(uid: int, guid: str, by: int = 0) -> bytes:
    """As mdbox does it: the mail, then its GUID."""
    return (
        record(APPEND | DONE | by, struct.pack("<IB3x", uid, 0))
        + record(INTRO | DONE, struct.pack("<IIIHHHH", 5, 0, 0, 16, 1, 1, 0))
        + record(DATA | DONE, struct.pack("<I16s", uid, bytes.fromhex(guid)))
    )


def wish(uid: int, by: int = 0) -> bytes:
    """IMAP does not say which mail it is that it wants to be gone."""
    return record(EXPUNGE | by, struct.pack("<I16s", uid, bytes(16)))


def done(uid: int, guid: str, by: int = 0) -> bytes:
    return record(EXPUNGE | DONE | by, struct.pack("<I16s", uid, bytes.fromhex(guid)))
