"""Faults of single machines that the checks of every machine must see."""

from __future__ import annotations

import pytest

from mailsite.model import Host
from verify import host as hosts
from verify.context import Context
from verify.lab import Lab

from .faults import changed_by_hand, edit, expect_green, expect_red

UNBOUND = "/etc/unbound/unbound.conf"
NFTABLES = "/etc/nftables.conf"


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
    expect_red(platform_up, "HOST-5", "dpkg's log shows no installation of .*opendkim")


@pytest.fixture
def last(platform_up: Context) -> Host:
    return platform_up.members[-1]


def test_a_firewall_that_lets_everything_in_turns_host_2_red(
    platform_up: Context, last: Host
) -> None:
    opened = edit(NFTABLES, "s/(hook input .*policy) drop/\\1 accept/")
    with changed_by_hand(platform_up, last, opened, restart="nftables.service"):
        expect_red(platform_up, "HOST-2", f"{last.name}: .* is refused to .*, not dropped")


def test_a_port_that_is_open_to_more_turns_host_2_red(platform_up: Context, last: Host) -> None:
    wide = edit(NFTABLES, "s/ip saddr [{][^}]*[}] (tcp dport 10587 accept)/\\1/")
    with changed_by_hand(platform_up, last, wide, restart="nftables.service"):
        expect_red(platform_up, "HOST-2", f"{last.name}: 10587/tcp at .* answers to")


def test_a_port_that_is_shut_turns_host_2_red(platform_up: Context, last: Host) -> None:
    shut = edit(NFTABLES, "/dport 587 accept/d")
    with changed_by_hand(platform_up, last, shut, restart="nftables.service"):
        expect_red(platform_up, "HOST-2", f"{last.name}: 587/tcp at .* does not answer to")


def test_a_failed_unit_turns_host_3_red(platform_up: Context, last: Host) -> None:
    machine = platform_up.lab.machine(last)
    machine.call("systemd-run", "--quiet", "--wait", "--unit=verify-fails", "false")
    try:
        expect_red(platform_up, "HOST-3", f"{last.name}: failed: verify-fails.service")
    finally:
        machine.run("systemctl", "reset-failed", "verify-fails.service")


def test_a_warning_of_a_daemon_turns_host_3_red(platform_up: Context, last: Host) -> None:
    machine = platform_up.lab.machine(last)
    machine.run("logger", "-p", "mail.warning", "-t", "postfix/smtpd", "warning: never seen before")
    try:
        expect_red(platform_up, "HOST-3", f"{last.name}: .*\n.*warning: never seen before")
    finally:
        machine.run("journalctl", "--rotate")
        machine.run("journalctl", "--vacuum-time=1s")


def test_a_program_that_was_replaced_turns_host_3_red(platform_up: Context, last: Host) -> None:
    machine = platform_up.lab.machine(last)
    program = "/usr/sbin/unbound"
    machine.run("cp", "-p", program, f"{program}.new")
    machine.run("mv", f"{program}.new", program)
    try:
        expect_red(platform_up, "HOST-3", f"{last.name}: what runs was replaced .*{program}")
    finally:
        machine.run("systemctl", "restart", "unbound.service")


def test_a_member_with_another_version_turns_host_3_red(platform_up: Context, last: Host) -> None:
    machine = platform_up.lab.machine(last)
    status = "/var/lib/dpkg/status"
    machine.run("cp", "-p", status, f"{status}.kept")
    machine.run(
        "sed", "-i", "/^Package: opendkim$/,/^$/s/^Version: .*/Version: 2.11.0~invented/", status
    )
    try:
        expect_red(platform_up, "HOST-3", f"opendkim: .*2.11.0~invented on {last.name}")
    finally:
        machine.run("mv", f"{status}.kept", status)


def test_a_service_that_does_not_start_at_boot_turns_host_6_red(
    platform_up: Context, last: Host
) -> None:
    disabled = ("systemctl", "disable", "--quiet", "opendkim.service")
    with changed_by_hand(platform_up, last, disabled):
        expect_red(platform_up, "HOST-6", f"{last.name}: drift .* reboot: opendkim.*: disabled")
