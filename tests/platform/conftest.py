"""One platform for all tests that need a whole one: the rehearsal that is up, or a new one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rehearsal import cleanup, engine, network
from rehearsal.progress import Progress, RehearsalError
from rehearsal.state import CHECKOUT, State
from verify.context import Context
from verify.lab import context
from verify.stack import Stack

STACK = "prod"


@pytest.fixture(scope="package")
def platform_up() -> Iterator[Context]:
    """The platform of the stack ``prod``, up and unchanged. It stays up if it was up before."""
    if os.geteuid() != 0:
        pytest.skip("a rehearsal needs root")
    if shutil.which("systemd-nspawn") is None:
        pytest.skip("a rehearsal needs systemd-nspawn: apt-get install systemd-container")
    other = cleanup.owner()
    if other is not None and other != CHECKOUT / ".rehearsal" and network.namespaces():
        pytest.skip(f"a rehearsal of another checkout is up: {other}")
    try:
        engine.ensure(Progress())
    except RehearsalError as error:
        pytest.skip(f"no Pulumi engine: {error.message}")
    was_up = network.CORE in network.namespaces()
    _command("up", "--stack", STACK)
    try:
        yield context(Stack.read(STACK), State().root)
    finally:
        if not was_up:
            _command("down")


def _command(*words: str) -> None:
    """Run a command of the rehearsal as a user would; what it says goes to the test's output."""
    done = subprocess.run([sys.executable, "-m", "rehearsal", *words], cwd=CHECKOUT)
    if done.returncode != 0:
        pytest.fail(f"`python -m rehearsal {' '.join(words)}` ends with {done.returncode}")
