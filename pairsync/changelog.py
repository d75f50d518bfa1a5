"""What Dovecot's log of a user's folders (``dovecot.mailbox.log``) tells dsync.

Of two names of a folder dsync takes the one that was given later, in whole seconds. But where it
carries a rename it writes down its own time, and so does a rename by doveadm: a user who renames
the folder again within that second, or while a run is on, may get the name before. So the other
server writes down the user's time instead.

And Dovecot keeps the last 170 records, twice, and for up to a minute a session goes on writing into
a log that is gone. So where there are many changes a user's rename or deletion may not be in it any
more, and is added.

The log consists of records of one size (mailbox-log.h, Dovecot 2.4), which Dovecot appends and
never changes; of a name there is a digest in it. Dovecot reads it anew for each run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

LOGS = ("dovecot.mailbox.log.2", "dovecot.mailbox.log")
"""The older one first."""

_RECORD = struct.Struct(">B3x16sI")
_TIME = struct.Struct(">I")
_DELETE, _RENAME = 1, 3


class _Record(NamedTuple):
    """``what``: the folder's GUID where it was deleted, else the digest of its name."""

    place: int
    kind: int
    what: bytes
    seconds: int


def backdate(folder: Path, given: Mapping[str, float]) -> int:
    """Let names have been given no later than at a time; returns how many records changed.

    ``folder`` has the logs in it, ``given``: name -> seconds since 1970. Raises OSError.
    """
    times = {_digest(name): int(at) for name, at in given.items()}
    changed = 0
    for log in LOGS:
        try:
            handle = os.open(folder / log, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            data = os.pread(handle, os.fstat(handle).st_size, 0)
            for found in _records(data):
                if found.kind == _RENAME and found.seconds > times.get(found.what, found.seconds):
                    place = found.place + _RECORD.size - _TIME.size
                    os.pwrite(handle, _TIME.pack(times[found.what]), place)
                    changed += 1
        finally:
            os.close(handle)
    return changed


def attest(
    folder: Path, given: Mapping[str, float], gone: Mapping[str, float] = MappingProxyType({})
) -> int:
    """Add what the logs do not tell any more; returns how many records that are.

    Names of which they do not tell that they were given then, or later; and deletions that they
    told of before. ``gone``: folder (its GUID) -> when it was deleted; of one that is there, dsync
    does not believe it. The rest and errors as for :func:`backdate`.
    """
    named, deleted = _latest(folder, _RENAME), _latest(folder, _DELETE)
    missing = [
        _RECORD.pack(_RENAME, digest, int(at))
        for name, at in given.items()
        if named.get(digest := _digest(name), -1) < int(at)
    ]
    missing += [
        _RECORD.pack(_DELETE, guid, int(at))
        for which, at in gone.items()
        if (guid := bytes.fromhex(which)) not in deleted
    ]
    # A new log would let a session that writes into one that is gone do away with the older one.
    there = [folder / log for log in reversed(LOGS) if (folder / log).exists()]
    if not missing or not there:
        return 0
    _append(there[0], b"".join(missing))
    return len(missing)


def deletions(folder: Path) -> dict[str, int]:
    """Folders (their GUIDs) that were deleted -> when, as far as the logs tell."""
    return {what.hex(): seconds for what, seconds in _latest(folder, _DELETE).items()}


def _append(log: Path, data: bytes) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        size = os.fstat(handle).st_size
        if os.write(handle, data) < len(data):
            os.ftruncate(handle, size)
    finally:
        os.close(handle)


def _latest(folder: Path, kind: int) -> dict[bytes, int]:
    """What the records of a kind are about -> the time of the last one."""
    found: dict[bytes, int] = {}
    for log in LOGS:
        with contextlib.suppress(FileNotFoundError):
            data = (folder / log).read_bytes()
            found |= {r.what: r.seconds for r in _records(data) if r.kind == kind}
    return found


def _records(data: bytes) -> Iterator[_Record]:
    for place in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
        yield _Record(place, *_RECORD.unpack_from(data, place))


def _digest(name: str) -> bytes:
    return hashlib.sha1(name.encode(), usedforsecurity=False).digest()[:16]
