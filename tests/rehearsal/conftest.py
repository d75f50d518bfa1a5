"""What keeps tests in several processes apart."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

LOCK = Path("/run/lock/mail-rehearsal-test")


@pytest.fixture(scope="module")
def names() -> Iterator[None]:
    """The names of a rehearsal's namespaces and cgroups, which are the whole computer's."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
