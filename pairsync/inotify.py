"""inotify(7), as much of it as is needed here."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CLOSE_WRITE = 0x8
MOVED_FROM = 0x40
MOVED_TO = 0x80
CREATE = 0x100
DELETE = 0x200
IS_DIR = 0x40000000
ONLY_DIR = 0x01000000
OVERFLOW = 0x4000
IGNORED = 0x8000

_HEADER = struct.Struct("iIII")


@dataclass(frozen=True)
class Event:
    """``watch`` is -1 where ``mask`` has OVERFLOW: events were lost."""

    watch: int
    mask: int
    name: str


class Inotify:
    """One inotify instance; ``fileno`` becomes readable when there are events."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")

    def fileno(self) -> int:
        return self._fd

    def add(self, path: Path, mask: int) -> int:
        """Watch ``path``; returns the watch. Raises OSError; ENOSPC: the user has too many."""
        watch: int = self._libc.inotify_add_watch(self._fd, os.fsencode(path), mask)
        if watch < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
        return watch

    def read(self) -> Iterator[Event]:
        """The events that are there; does not wait."""
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return
            at = 0
            while at < len(data):
                watch, mask, _, length = _HEADER.unpack_from(data, at)
                at += _HEADER.size
                name = data[at : at + length].rstrip(b"\0")
                at += length
                yield Event(watch, mask, os.fsdecode(name))

    def close(self) -> None:
        os.close(self._fd)
