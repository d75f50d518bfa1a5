"""The real engine for the tests, found once."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from rehearsal.engine import Engine, ensure
from rehearsal.progress import Progress, RehearsalError

from .project import scrubbed


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The Pulumi engine, as a rehearsal finds, fetches or builds it."""
    try:
        found = ensure(Progress())
    except RehearsalError as error:
        pytest.skip(f"no Pulumi engine: {error}")
    # A run that fails leaves its program talking to an engine that is gone.
    logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
    with scrubbed():
        yield found
