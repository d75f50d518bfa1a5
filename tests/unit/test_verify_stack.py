"""Which platform a run is for, and what it refuses to touch."""

from __future__ import annotations

from pathlib import Path

import pytest

from verify import __main__ as program
from verify.registry import SelectionError
from verify.stack import Stack, StackError


def project(folder: Path, live: str = "") -> Path:
    (folder / "Pulumi.demo.yaml").write_text(
        f"config:\n  mail:site: sites/demo\n{live}", encoding="utf-8"
    )
    return folder


def test_a_stack_names_its_site_data(tmp_path: Path) -> None:
    stack = Stack.read("demo", project(tmp_path))
    assert (stack.name, stack.site, stack.live) == ("demo", tmp_path / "sites/demo", False)


def test_a_stack_that_nobody_called_live_is_not_contacted(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="not live, so nothing of it is contacted"):
        Stack.read("demo", project(tmp_path)).require_live()


@pytest.mark.parametrize("text", ["  mail:live: true\n", '  mail:live: "true"\n'])
def test_a_live_stack_is(tmp_path: Path, text: str) -> None:
    Stack.read("demo", project(tmp_path, text)).require_live()


def test_an_unknown_stack_is_answered_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="no stack 'prd'; there are: demo"):
        Stack.read("prd", project(tmp_path))


def test_a_stack_without_site_data_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "Pulumi.demo.yaml").write_text("config: {}\n", encoding="utf-8")
    with pytest.raises(StackError, match="pulumi config set mail:site"):
        Stack.read("demo", tmp_path)


def test_the_committed_prod_stack_is_refused_live(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("something was looked up")

    monkeypatch.setattr(program, "Lookup", touched)
    assert program.main(["--stack", "prod", "--live"]) == 2
    assert "not live" in capsys.readouterr().err


def test_a_section_stands_for_its_checks() -> None:
    assert sorted(program.expand("EDGE,OUT-1")) == ["EDGE-1", "EDGE-2", "EDGE-3", "EDGE-4", "OUT-1"]
    with pytest.raises(SelectionError, match="no check 'EDG'"):
        program.expand("EDG")


def test_the_list_names_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        program.main(["--all", "--list"])
    assert left.value.code == 0
    assert "EDGE-1" in capsys.readouterr().out
