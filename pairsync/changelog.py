"""When names of folders were given, in Dovecot's log of a user's folders (``dovecot.mailbox.log``).

Of two names of a folder dsync takes the one that was given later, in whole seconds. But where it
carries a rename it writes down its own time, and so does a rename by doveadm: a user who renames
the folder again within that second, or while a run is on, may get the name before. So the other
server writes down the user's time instead.

The log consists of records of one size (mailbox-log.h, Dovecot 2.4), which are appended and never
changed; of the name there is a digest in it. Dovecot reads it anew for each run.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
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
            for at in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
                kind, name, seconds = _RECORD.unpack_from(data, at)
                if kind == _RENAME and seconds > times.get(name, seconds):
                    place = at + _RECORD.size - _TIME.size
                    os.pwrite(handle, _TIME.pack(times[name]), place)
                    changed += 1
        finally:
            os.close(handle)
    return changed


def _digest(name: str) -> bytes:
    return hashlib.sha1(name.encode(), usedforsecurity=False).digest()[:16]
