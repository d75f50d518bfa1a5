"""What keeps tests in several processes apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rehearsal.state import locked

LOCK = Path("/run/lock/mail-rehearsal-test")


@pytest.fixture(scope="module")
def names() -> Iterator[None]:
    """The names of a rehearsal's namespaces and cgroups, which are the whole computer's."""
    with locked(LOCK, None, ""):
        yield
