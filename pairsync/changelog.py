"""When names of folders were given, in Dovecot's log of a user's folders (``dovecot.mailbox.log``).

Of two names of a folder dsync takes the one that was given later, in whole seconds. But where it
carries a rename it writes down its own time, and so does a rename by doveadm: a user who renames
the folder again within that second, or while a run is on, may get the name before. So the other
server writes down the user's time instead.

And Dovecot keeps the last 170 records, twice, and for up to a minute a session goes on writing into
a log that is gone. So where there are many changes a user's rename may not be in it.

The log consists of records of one size (mailbox-log.h, Dovecot 2.4), which are appended and never
changed; of the name there is a digest in it. Dovecot reads it anew for each run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

NAME = "dovecot.mailbox.log"
_OLDER = f"{NAME}.2"
_RECORD = struct.Struct(">B3x16sI")
_TIME = struct.Struct(">I")
_RENAME = 3


def backdate(folder: Path, given: Mapping[str, float]) -> int:
    """Let names have been given no later than at a time; returns how many records changed.

    ``folder`` has the logs in it, ``given``: name -> seconds since 1970. Raises OSError.
    """
    times = {_digest(name): int(at) for name, at in given.items()}
    changed = 0
    for log in (_OLDER, NAME):
        try:
            handle = os.open(folder / log, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            data = os.pread(handle, os.fstat(handle).st_size, 0)
            for place, name, seconds in _renames(data):
                if seconds > times.get(name, seconds):
                    os.pwrite(handle, _TIME.pack(times[name]), place + _RECORD.size - _TIME.size)
                    changed += 1
        finally:
            os.close(handle)
    return changed


def attest(folder: Path, given: Mapping[str, float]) -> int:
    """Add those of the names of which the log does not know that they were given then, or later.

    Arguments and errors as for :func:`backdate`; returns how many were added.
    """
    known: dict[bytes, int] = {}
    for log in (_OLDER, NAME):
        with contextlib.suppress(FileNotFoundError):
            known |= {name: at for _, name, at in _renames((folder / log).read_bytes())}
    missing = [
        _RECORD.pack(_RENAME, digest, int(at))
        for name, at in given.items()
        if known.get(digest := _digest(name), -1) < int(at)
    ]
    if missing:
        handle = os.open(folder / NAME, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(handle, b"".join(missing))
        finally:
            os.close(handle)
    return len(missing)


def _renames(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Place, digest of the name and time of each rename."""
    for place in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
        kind, name, seconds = _RECORD.unpack_from(data, place)
        if kind == _RENAME:
            yield place, name, seconds


def _digest(name: str) -> bytes:
    return hashlib.sha1(name.encode(), usedforsecurity=False).digest()[:16]
