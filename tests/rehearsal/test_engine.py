"""The real engine, however it was got."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rehearsal import engine, tools
from rehearsal.progress import Progress, RehearsalError


@pytest.fixture(scope="module")
def found() -> engine.Engine:
    try:
        return engine.ensure(Progress())
    except RehearsalError as error:
        pytest.skip(f"no Pulumi engine: {error}")


def test_the_engine_runs_and_is_new_enough(found: engine.Engine) -> None:
    said = subprocess.run(
        [str(found.pulumi), "version"],
        env=tools.environment(PULUMI_SKIP_UPDATE_CHECK="true"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert said == f"v{found.version}"
    assert tuple(map(int, found.version.split("-")[0].split("."))) >= engine.OLDEST


def test_the_language_host_lies_beside_its_helper(found: engine.Engine) -> None:
    if found.language_host is None:
        pytest.skip("this engine has no Python language host: only inline programs run")
    assert found.language_host.with_name("pulumi-language-python-exec").exists()
    assert str(found.language_host.parent) in found.path


def test_the_second_time_it_is_not_got_again(found: engine.Engine) -> None:
    lines: list[str] = []

    class Heard(Progress):
        def say(self, text: str) -> None:
            lines.append(text)

    assert engine.ensure(Heard()) == found
    assert not lines


@pytest.mark.parametrize("name", ["pulumi", "language"])
def test_the_pinned_modules_are_tidy(name: str, tmp_path: Path) -> None:
    go = engine._go()
    if go is None:
        pytest.skip("no Go here that is new enough")
    for path in (engine.MODULES / name).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    done = subprocess.run(
        [str(go), "mod", "tidy", "-diff"],
        cwd=tmp_path,
        env=tools.environment(GOTOOLCHAIN="local", GOPROXY="off"),
        capture_output=True,
        text=True,
    )
    if "GOPROXY=off" in done.stderr or "go.mod requires go" in done.stderr:
        pytest.skip("the modules are not in this machine's module cache")
    assert done.returncode == 0, done.stdout + done.stderr
