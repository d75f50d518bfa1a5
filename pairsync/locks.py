"""Lock files that a server left when it lost its power.

Dovecot changes a user's subscriptions under a lock file that names its process. It takes such a
file for a dead one's where no process has that number; after a boot another one may have it, and
who wants to change subscriptions then waits for half a minute, each sync too.

And it begins an index's log anew in a file that keeps others from doing the same until it takes
the old one's place. One that is left there names nobody: for three minutes who wants to use the
folder waits (mail-transaction-log-private.h), and whoever waits may keep all of the user's folders
locked. It is used as soon as the file is gone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_SUBSCRIPTIONS = "subscriptions.lock"
_LOG = ".log.newlock"


def init_began() -> int:
    """When the first process began, in clock ticks since the kernel was booted (proc(5))."""
    stat = Path("/proc/1/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(stat[19])


def booted() -> float:
    """When this machine, or container, was started; seconds since 1970.

    A container's /proc/uptime may be its own, while that of its first process is the kernel's.
    """
    kernel = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return kernel + init_began() / os.sysconf("SC_CLK_TCK")


def remove(home: Path, before: float) -> int:
    """Remove those in a user's home that are older than ``before``; how many that were."""
    removed = 0
    for path in _left(home):
        with contextlib.suppress(OSError):
            if path.stat(follow_symlinks=False).st_mtime < before:
                path.unlink()
                removed += 1
    return removed


def _left(home: Path) -> Iterator[Path]:
    for folder, _, files in os.walk(home):
        for name in files:
            if name == _SUBSCRIPTIONS or name.endswith(_LOG):
                yield Path(folder, name)
