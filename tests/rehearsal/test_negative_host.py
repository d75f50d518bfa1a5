"""Faults of single machines that the checks of every machine must see."""

from __future__ import annotations

import pytest

from mailsite.model import Host
from verify import host as hosts
from verify.context import Context
from verify.lab import Lab

from .faults import changed_by_hand, edit, expect_green, expect_red

UNBOUND = "/etc/unbound/unbound.conf"


def test_a_resolver_that_does_not_validate_turns_host_1_red(platform_up: Context) -> None:
    blind = ("sh", "-c", f'printf "server:\\n module-config: iterator\\n" >>{UNBOUND}')
    member = platform_up.members[-1]
    with changed_by_hand(platform_up, member, blind, restart="unbound.service"):
        expect_red(platform_up, "HOST-1", f"{member.name}: .* is not validated")


def test_internal_names_that_need_the_outside_turn_host_1_red(platform_up: Context) -> None:
    member = platform_up.members[-1]
    name = platform_up.frontends[0].name
    forgotten = edit(UNBOUND, f'/local-data: *"{name}\\.? /d')
    with changed_by_hand(platform_up, member, forgotten, restart="unbound.service"):
        expect_red(platform_up, "HOST-1", f"with the outside cut off, {name}")


def test_another_resolver_turns_host_1_red(platform_up: Context) -> None:
    member = platform_up.members[-1]
    other = ("sh", "-c", 'echo "nameserver 198.18.53.53" >/etc/resolv.conf')
    with changed_by_hand(platform_up, member, other):
        expect_red(platform_up, "HOST-1", "not its own resolver")


@pytest.mark.parametrize("place", ["member", "frontend"])
def test_a_file_changed_before_turns_host_4_red(platform_up: Context, place: str) -> None:
    host, path = {
        "member": (platform_up.members[0], "/etc/postfix/main.cf"),
        "frontend": (platform_up.frontends[0], "/etc/nginx/mail-streams.d/smtp-out.conf"),
    }[place]
    with changed_by_hand(platform_up, host, ("sh", "-c", f'echo "# by hand" >>{path}')):
        expect_red(platform_up, "HOST-4", f"{host.name}: drift on a fresh platform .*{path}")
    expect_green(platform_up, "HOST-4")


def test_a_machine_that_had_everything_turns_host_5_red(
    platform_up: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its packages come with the image, so the agent has nothing to show."""

    def from_the_full_image(self: Lab, *hosts: Host) -> None:
        self.replace(*hosts)

    monkeypatch.setattr(Lab, "replace_with_bare", from_the_full_image)
    monkeypatch.setattr(hosts, "TIERS", hosts.TIERS[:1])
    expect_red(platform_up, "HOST-5", "shows no installation of the mail daemons")
