"""The example site: small, and unlike prod in every way that the code could take for granted."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from mailsite.loader import load_platform
from mailsite.model import NetworkKind, Platform, Role, TlsLevel

SITES = Path(__file__).parents[2] / "sites"

#: What a rehearsal uses for the outside world and for observers.
TAKEN = (
    "192.0.2.0/24",
    "203.0.113.0/24",
    "2001:db8:aaaa::/48",
    "2001:db8:ffff::/64",
)


@pytest.fixture(scope="module")
def example() -> Platform:
    return load_platform(SITES / "example")


def test_every_network_is_public_and_nothing_is_translated(example: Platform) -> None:
    assert {n.kind for n in example.networks.values()} == {NetworkKind.PUBLIC}
    assert not example.egress and example.site_local is None


def test_two_members_per_tier_at_two_sites(example: Platform) -> None:
    for role in Role:
        members = example.members(role)
        # Its certificates are given.
        if role in (Role.HYPERVISOR, Role.ROUTER, Role.SERVER, Role.CERTIFICATES):
            assert not members
        else:
            assert len({m.site for m in members}) == len(members) == 2
    assert len(example.hypervisors) == 2


def test_it_differs_from_prod_where_the_code_could_take_things_for_granted(
    example: Platform,
) -> None:
    prod = load_platform(SITES / "prod")
    assert example.outbound.tls is TlsLevel.DANE is not prod.outbound.tls
    assert not set(example.networks) & set(prod.networks)
    assert not set(example.hypervisors) & set(prod.hypervisors)
    assert {h.split(".")[0] for h in example.hosts}.isdisjoint(h.split(".")[0] for h in prod.hosts)
    assert {k.selector for d in example.domains.values() for k in d.dkim}.isdisjoint(
        k.selector for d in prod.domains.values() for k in d.dkim
    )
    assert any(d.zone and d.zone != d.name for d in example.domains.values())
    assert any(d.spf for d in example.domains.values())
    assert any(len(d.dkim) > 1 for d in example.domains.values())


def test_inbound_mail_differs_from_prod_too(example: Platform) -> None:
    prod = load_platform(SITES / "prod")
    assert example.spam.greylist is not prod.spam.greylist
    assert not {d.zone for d in example.inbound.dnsbl} & {d.zone for d in prod.inbound.dnsbl}
    assert not set(example.mailboxes) & set(prod.mailboxes)
    alias = example.domains["office.example.org"]
    assert alias.alias_of and alias.addresses and not alias.sends
    catching = [d for d in example.domains.values() if "*" in d.addresses]
    assert [d.dns_zone != d.name for d in catching] == [True]


def test_addresses_are_documentation_ones_and_leave_the_rehearsal_its_own(
    example: Platform,
) -> None:
    documentation = [ip_network(p) for p in ("198.51.100.0/24", "2001:db8::/32")]
    everything = [
        *(a for h in example.hosts.values() for a in h.addresses),
        *(s.gateway for n in example.networks.values() for s in (n.ipv4, n.ipv6)),
        *(n.network_address for n in example.management.networks),
    ]
    for address in everything:
        assert any(address in p for p in documentation), address
        assert not any(address in ip_network(p) for p in TAKEN), address
    assert ip_address("198.51.100.1") in everything


def test_operators_have_networks_of_their_own(example: Platform) -> None:
    used = [s.prefix for n in example.networks.values() for s in (n.ipv4, n.ipv6)]
    for network in example.management.networks:
        assert not any(network.overlaps(u) for u in used if u.version == network.version)
        assert network.num_addresses > 20
