"""Secrets of a rehearsal are made once, whoever asks for them at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rehearsal import secrets
from rehearsal.ca import Authority
from rehearsal.state import State, write_atomic
from rehearsal.world.knot import UpdateKey

_TOGETHER = 8


@pytest.mark.parametrize(
    "ask",
    [
        lambda state: secrets.operator_key(state),
        lambda state: secrets.host_key(state, "a.example"),
        lambda state: secrets.passphrase(state).read_text(),
        lambda state: Authority(state.ca).root_pem,
        lambda state: UpdateKey.kept(state.world / "tsig.json").secret,
    ],
)
def test_threads_that_ask_at_once_get_the_same(tmp_path: Path, ask: Callable[[State], str]) -> None:
    state = State(tmp_path)
    start = threading.Barrier(_TOGETHER)

    def one(_: int) -> str:
        start.wait()
        return ask(state)

    with ThreadPoolExecutor(_TOGETHER) as pool:
        told = list(pool.map(one, range(_TOGETHER)))
    assert told == [ask(state)] * _TOGETHER


@pytest.mark.parametrize(("keep", "content"), [(True, "first"), (False, "second")])
def test_what_is_there_is_kept_where_that_was_asked_for(
    tmp_path: Path, keep: bool, content: str
) -> None:
    path = tmp_path / "file"
    for text in ("first", "second"):
        write_atomic(path, text, keep=keep)
    assert path.read_text() == content
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
