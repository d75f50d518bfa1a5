"""Changes that the checks of changes must see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mailsite.loader import Problem, SiteError
from mailsite.model import Platform
from verify import change
from verify.context import Context
from verify.lab import Lab

from .faults import expect_red

MAIN = "/etc/postfix/main.cf"


def meanwhile(context: Context, *command: str) -> Callable[[Lab], dict[str, int]]:
    """An ``up`` during which something else happens on a member."""

    def up(self: Lab) -> dict[str, int]:
        self.machine(context.members[0]).run(*command)
        return {"same": 1}

    return up


def test_a_restarted_service_turns_change_1_red(
    platform_up: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    happens = meanwhile(platform_up, "systemctl", "restart", "opendkim.service")
    monkeypatch.setattr(Lab, "up", happens)
    expect_red(platform_up, "CHANGE-1", "unit opendkim.service")


def test_a_file_written_again_turns_change_1_red(
    platform_up: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same content, owner and mode: only its times tell."""
    monkeypatch.setattr(Lab, "up", meanwhile(platform_up, "touch", MAIN))
    expect_red(platform_up, "CHANGE-1", MAIN)


def test_a_resource_that_is_never_settled_turns_change_1_red(
    platform_up: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lab, "up", lambda self: {"same": 100, "update": 2})
    expect_red(platform_up, "CHANGE-1", "the engine reports changes: 2 update")


def test_data_that_is_taken_turns_change_8_red(
    platform_up: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def credulous(folder: Path, world: Path | None = None) -> Platform:
        return platform_up.platform

    monkeypatch.setattr(change, "load_platform", credulous)
    expect_red(platform_up, "CHANGE-8", "unknown key .*not refused")


def test_an_error_that_names_no_line_turns_change_8_red(
    platform_up: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vague(folder: Path, world: Path | None = None) -> Platform:
        raise SiteError([Problem("topology.yaml", 0, "", "something is wrong", "mend it")])

    monkeypatch.setattr(change, "load_platform", vague)
    expect_red(platform_up, "CHANGE-8", "blames topology.yaml:0, not")


def test_a_program_that_reaches_out_first_turns_change_8_red(
    platform_up: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the program looked something up before it read its data."""
    eager = change.PROGRAM.replace(
        "runpy.run_path", "import socket; socket.getaddrinfo('localhost', 25); runpy.run_path"
    )
    assert eager != change.PROGRAM
    monkeypatch.setattr(change, "PROGRAM", eager)
    expect_red(platform_up, "CHANGE-8", "contacted something: socket.getaddrinfo")
