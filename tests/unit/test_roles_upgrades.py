"""When machines are upgraded, and what stops it."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from mailsite.bundle import compose
from mailsite.loader import load_platform
from mailsite.model import Host, Role, Upgrades
from mailsite.roles import upgrades

PLATFORM = load_platform(Path(__file__).resolve().parents[2] / "sites" / "prod")
MANAGED = [h for h in PLATFORM.hosts.values() if h.is_managed]
OUT = PLATFORM.members(Role.SMTP_OUT)[1]


def test_no_two_members_of_a_cluster_have_one_hour() -> None:
    for one, other in combinations(MANAGED, 2):
        if {*one.roles} & {*other.roles}:
            assert upgrades.hour(PLATFORM, one) != upgrades.hour(PLATFORM, other)


def test_the_hours_begin_where_the_site_says() -> None:
    late = PLATFORM.model_copy(update={"upgrades": Upgrades(hour=23)})
    members = late.members(Role.SMTP_OUT)
    assert [upgrades.hour(late, m) for m in members] == [23, 0, 1]
    timer = compose(late, members[1]).files["/etc/systemd/system/mail-upgrade.timer"].content
    assert "OnCalendar=*-*-* 00:00:00 UTC\n" in timer


def test_only_security_is_upgraded_and_only_by_our_timer() -> None:
    text = compose(PLATFORM, OUT).files["/etc/apt/apt.conf.d/99mail-upgrades"].content
    assert re.findall(r'"origin=.*"', text) == [
        '"origin=Debian,codename=${distro_codename}-security,label=Debian-Security"'
    ]
    assert text.index("#clear Unattended-Upgrade::Origins-Pattern;") < text.index('"origin=')
    for setting in ("Update-Package-Lists", "Unattended-Upgrade"):
        assert f'APT::Periodic::{setting} "0";' in text


@pytest.mark.parametrize("reboot", [False, True])
def test_a_machine_reboots_by_itself_only_if_the_site_says_so(reboot: bool) -> None:
    platform = PLATFORM.model_copy(update={"upgrades": Upgrades(reboot=reboot)})
    files = compose(platform, OUT).files
    script = files[upgrades.SCRIPT].content
    assert f"\nREBOOT = {reboot}\n" in script
    assert 'Automatic-Reboot "false"' in files["/etc/apt/apt.conf.d/99mail-upgrades"].content


@pytest.mark.parametrize("host", MANAGED, ids=lambda h: h.name)
def test_a_member_looks_at_all_others_by_a_port_that_is_open_to_it(host: Host) -> None:
    # The two that hold the certificate wait for nobody.
    shared = [role for role in host.roles if role is not Role.CERTIFICATES]
    cluster = [m for role in shared for m in PLATFORM.serving(role) if m != host]
    found = upgrades.peers(PLATFORM, host)
    if host.main_role is Role.WEBMAIL:  # open to the frontends alone
        assert found == []
        return
    assert [name for name, _, _ in found] == [m.name for m in cluster]
    own = PLATFORM.internal_leg(host).ipv4
    for member, (_, address, port) in zip(cluster, found, strict=True):
        assert address == str(PLATFORM.internal_leg(member).ipv4)
        ruleset = compose(PLATFORM, member).files["/etc/nftables.conf"].content
        rules = re.findall(rf"^\s*(?:ip saddr {{ (.*) }} )?tcp dport {port} accept$", ruleset, re.M)
        assert any(not sources or _lets_in(sources, own) for sources in rules)


def _lets_in(sources: str, address: object) -> bool:
    from ipaddress import ip_address, ip_network

    return any(ip_address(str(address)) in ip_network(s) for s in sources.split(", "))


def test_nothing_is_upgraded_while_another_member_is_away(tmp_path: Path) -> None:
    """The script itself, with a peer that does not answer and with one that does."""
    script = compose(PLATFORM, OUT).files[upgrades.SCRIPT].content
    called = tmp_path / "called"
    for name in ("systemctl", "apt-get", "unattended-upgrade"):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho "{name} $*" >>{called}\n')
        tool.chmod(0o755)

    def run(port: int) -> subprocess.CompletedProcess[str]:
        called.write_text("")
        changed = re.sub(r"PEERS = .*", f'PEERS = [["other", "127.0.0.1", {port}]]', script)
        changed = re.sub(r"PORTS = .*", "PORTS = []", changed)
        changed = changed.replace('Path("/proc")', 'Path("/nowhere")')
        return subprocess.run(
            [sys.executable, "-I", "-c", changed],
            env={"PATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run(port)
        assert done.returncode == 0, done.stderr
        assert "unattended-upgrade --verbose" in called.read_text()
    done = run(port)
    assert done.returncode == 1
    assert "nothing is upgraded: other of this host's cluster does not answer" in done.stderr
    assert called.read_text() == ""


def test_existing_machines_are_upgraded_by_their_operator() -> None:
    for host in PLATFORM.hosts.values():
        if not host.is_managed:
            bundle = compose(PLATFORM, host)
            assert not any("upgrade" in path for path in bundle.files)
            assert "unattended-upgrades" not in bundle.packages
