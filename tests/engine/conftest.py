"""The real engine for the tests, found once."""

from __future__ import annotations

import gc
import logging
import sys
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
    logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
    with scrubbed():
        yield found


@pytest.fixture(autouse=True)
def swept() -> Iterator[None]:
    """A run that fails leaves its program behind, talking to an engine that is gone.

    What remains of it complains when it is collected. The complaint is formatted by parsing
    source code; if the collector runs while something else is parsed, that fails with a
    SystemError (CPython 3.11). So it is collected here, in silence.
    """
    yield
    others, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = others
