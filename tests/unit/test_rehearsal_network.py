"""The layout of the sealed network, computed from site data alone."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from mailsite.loader import load_platform
from rehearsal import network
from rehearsal.network import plan
from rehearsal.progress import RehearsalError
from rehearsal.state import CHECKOUT
from tests.rehearsal.sample import document, platform
from tests.rehearsal.sample import network as sample_network

EXAMPLE = load_platform(CHECKOUT / "sites/example")


def test_bridges_are_numbered_in_the_order_of_the_site_data() -> None:
    assert [(b.name, b.network) for b in plan(platform()).bridges] == [
        ("n0", "north-local"),
        ("n1", "south-local"),
        ("n2", "north-public"),
    ]


def test_a_network_added_in_front_leaves_the_others_where_they_are() -> None:
    known = {b.network: b.name for b in plan(platform()).bridges}
    networks = {"first": sample_network("north", "public", 9), **document()["networks"]}
    found = {b.network: b.name for b in plan(platform(networks=networks), known).bridges}
    assert found == {**known, "first": "n3"}


def test_operator_and_office_sit_in_the_management_networks() -> None:
    found = plan(platform())
    for name in ("operator", "obs-office"):
        seat = found.seat(name)
        assert [a.version for a in seat.addresses] == [4, 6]
        for address in seat.addresses:
            assert any(address in ip_network(n) for n in document()["management"]["networks"]), (
                address
            )
    assert found.seat("operator").addresses != found.seat("obs-office").addresses


def test_a_management_network_within_a_network_of_the_site_gives_a_place_there() -> None:
    found = plan(platform(management={"networks": ["10.70.1.0/24", "fd70:1::/64"]}))
    for bridge, address, gateway in found.seat("operator").legs:
        assert bridge == "n0"
        assert address.network.prefixlen in (24, 64)
        assert gateway in (ip_address("10.70.1.1"), ip_address("fd70:1::1"))


def test_a_management_network_of_one_address_cannot_seat_two() -> None:
    with pytest.raises(RehearsalError, match=r"management\.networks"):
        plan(platform(management={"networks": ["10.79.0.7/32"]}))


def test_the_internet_is_not_where_the_site_is() -> None:
    networks = document()["networks"]
    networks["north-public"]["ipv4"] = {"prefix": "203.0.113.0/24", "gateway": "203.0.113.1"}
    found = plan(platform(networks=networks)).seat("obs-internet")
    assert found.addresses[0] == ip_address("198.51.100.10")


def test_a_site_on_the_rehearsals_own_prefix_is_refused() -> None:
    networks = document()["networks"]
    networks["north-public"]["ipv4"] = {"prefix": "192.0.2.128/25", "gateway": "192.0.2.129"}
    with pytest.raises(RehearsalError, match=r"north-public .192\.0\.2\.128/25. overlaps"):
        plan(platform(networks=networks))


def test_each_site_leaves_through_its_own_egress() -> None:
    rules = plan(platform()).ruleset
    assert "ip saddr 10.70.1.0/24 ip daddr != @inside4 snat ip to 100.80.3.20\n" in rules
    assert "ip6 saddr fd70:2::/64 ip6 daddr != @inside6 snat ip6 to 2001:db8:9::20\n" in rules


def test_a_site_without_an_egress_uses_all_there_are() -> None:
    egress = {name: {**gateway, "site": "south"} for name, gateway in document()["egress"].items()}
    rules = plan(platform(egress=egress)).ruleset
    assert "mod 2 map { 0 : 100.80.3.20, 1 : 100.80.9.20 }" in rules


def test_an_egress_address_is_held_where_its_neighbours_ask_for_it() -> None:
    held = {str(address): device for address, device in plan(platform()).egress}
    assert held["100.80.3.20"] == "n2"
    assert held["2001:db8:9::20"] == "lo"


def test_a_platform_without_site_local_networks_has_no_translation() -> None:
    assert "snat" not in plan(EXAMPLE).ruleset
    assert "elements" not in plan(EXAMPLE).ruleset.partition("set inside4")[0]


def test_the_local_observer_takes_no_address_that_somebody_has() -> None:
    taken = {a for host in EXAMPLE.hosts.values() for a in host.addresses}
    assert not taken & set(plan(EXAMPLE).seat("obs-local").addresses)


def test_device_names_fit_the_kernel() -> None:
    assert len(network.cable_name("a" * 60 + ".example", 7)) <= 15
    assert all(len(network._port(s)) <= 15 for s in plan(EXAMPLE).seats)


def test_cables_of_different_machines_have_different_names() -> None:
    names = {network.cable_name(host, n) for host in EXAMPLE.hosts for n in range(3)}
    assert len(names) == 3 * len(EXAMPLE.hosts)
