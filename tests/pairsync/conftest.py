"""One pair for most tests here; each test has users of its own and leaves the pair whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rehearsal import image
from rehearsal.progress import Progress, RehearsalError
from tests.pairsync.pair import Pair

_USERS = 60


@contextmanager
def running(users: int) -> Iterator[Pair]:
    """A pair that is up; skips the test where none can be."""
    if os.geteuid() != 0:
        pytest.skip("a pair of Dovecots needs root: it runs on an image, in namespaces")
    missing = [t for t in ("unshare", "nsenter", "setpriv", "ip") if shutil.which(t) is None]
    if missing:
        pytest.skip(f"a pair of Dovecots needs {' '.join(missing)}")
    try:
        layers = image.ensure(Progress()).postfix
    except RehearsalError as error:
        pytest.skip(f"no image of a host: {error}")
    folder = Path(tempfile.mkdtemp(prefix="pairsync-", dir="/var/tmp"))
    pair = Pair(layers, folder, users)
    try:
        pair.up()
        yield pair
    finally:
        pair.close()
        shutil.rmtree(folder, ignore_errors=True)


def tell(pair: Pair) -> None:
    """Print how both are."""
    for server in pair.both:
        print(server.run("pairsync", "status", check=False))
        print(f"--- {server.name}\n{server.pairsync_log()[-3000:]}")
        print(server.shell("tail -n 30 /var/log/dovecot.log", check=False))


@pytest.fixture(scope="package")
def the_pair() -> Iterator[Pair]:
    with running(_USERS) as pair:
        yield pair


@pytest.fixture
def pair(the_pair: Pair, request: pytest.FixtureRequest) -> Iterator[Pair]:
    the_pair.wait_quiet()
    yield the_pair
    if request.session.testsfailed:
        tell(the_pair)
    the_pair.mend()


@pytest.fixture
def user(the_pair: Pair) -> str:
    """A user whom no other test has."""
    return the_pair.fresh(1)[0]
