"""Lock files that a server left when it lost its power.

Dovecot changes a user's subscriptions under a lock file that names its process. It takes such a
file for a dead one's where no process has that number; after a boot another one may have it, and
who wants to change subscriptions then waits for half a minute, each sync too.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_LOCK = "subscriptions.lock"


def init_began() -> int:
    """When the first process began, in clock ticks since the kernel was booted (proc(5))."""
    stat = Path("/proc/1/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(stat[19])


def booted() -> float:
    """When this machine, or container, was started; seconds since 1970."""
    up = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    return time.time() - up + init_began() / os.sysconf("SC_CLK_TCK")


def remove(homes: Path, before: float) -> int:
    """Remove those that are older than ``before``, in any home or a folder in it; how many."""
    removed = 0
    for path in (*homes.glob(f"*/{_LOCK}"), *homes.glob(f"*/*/{_LOCK}")):
        with contextlib.suppress(OSError):
            if path.stat(follow_symlinks=False).st_mtime < before:
                path.unlink()
                removed += 1
    return removed
