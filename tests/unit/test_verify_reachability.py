"""What the scan expects, against what the firewalls are told; and the packets that it sends."""

from __future__ import annotations

import struct
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from mailsite.bundle import fragments
from mailsite.loader import load_platform
from mailsite.model import Host
from verify.ports import _checksum, _Segment, _words
from verify.reachability import ANYONE, Tables

SITES = Path(__file__).resolve().parents[2] / "sites"
PLATFORMS = [load_platform(SITES / name) for name in ("prod", "example")]
MANAGED = [(p, h) for p in PLATFORMS for h in p.hosts.values() if h.is_managed]
IDS = [f"{p.name}-{h.name}" for p, h in MANAGED]
SPOTS = [
    *("203.0.113.9", "2001:db8:ffff::9", "192.0.2.77", "127.0.0.1"),
]


def _spots(index: int) -> list[str]:
    platform = MANAGED[index][0]
    own = [str(a) for h in platform.hosts.values() for a in h.addresses]
    operators = [str(network[10]) for network in platform.management.networks]
    return [*SPOTS, *own, *operators]


@pytest.mark.parametrize("index", range(len(MANAGED)), ids=IDS)
def test_the_scan_expects_what_the_firewall_is_told(index: int) -> None:
    """Two books of the same thing, kept apart: a port in one alone shows here."""
    platform, host = MANAGED[index]
    told = {r.port: r.sources for part in fragments(platform, host) for r in part.ports}
    expected = dict(Tables(platform).of(host))
    assert expected.pop(22) == platform.management.networks
    assert set(expected) == set(told)
    for port, networks in expected.items():
        for spot in map(ip_address, _spots(index)):
            if spot in host.addresses:
                continue  # by way of loopback
            sources = told[port]
            is_open = sources is None or any(spot in ip_network(s) for s in sources)
            assert is_open == (networks is ANYONE or any(spot in n for n in networks)), (port, spot)


def test_existing_machines_serve_ssh_to_everyone_and_nothing_unknown() -> None:
    for platform in PLATFORMS:
        for host in platform.hosts.values():
            if not host.is_managed:
                assert Tables(platform).of(host)[22] is ANYONE
                told = {r.port for part in fragments(platform, host) for r in part.ports}
                assert told <= set(Tables(platform).of(host))


@pytest.mark.parametrize("port", [1, 25, 587, 65535])
def test_a_probe_over_ipv4_has_a_valid_checksum(port: int) -> None:
    source, target = ip_address("192.0.2.1"), ip_address("198.51.100.7")
    segment = _Segment(source, target, 20001).to(port)
    pseudo = source.packed + target.packed + struct.pack("!HH", 6, len(segment))
    assert _checksum(_words(pseudo + segment)) == 0
    assert struct.unpack_from("!HH", segment) == (20001, port)
    assert segment[13] == 0x02, "SYN, and nothing else"


def test_a_host_of_no_tier_serves_nothing_but_ssh() -> None:
    (platform, _) = MANAGED[0]
    bare: Host = next(h for h in platform.hosts.values() if h.main_role.value == "server")
    assert set(Tables(platform).of(bare)) == {22}
