"""The DNS of the outside world as data."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_address
from pathlib import Path

import dns.name
import dns.zone
import pytest

from mailsite.loader import load_platform
from mailsite.model import Platform, Role
from rehearsal.world import knot, plan, zones

SITES = Path(__file__).parents[2] / "sites"


@pytest.fixture(scope="module", params=["example", "prod"])
def platform(request: pytest.FixtureRequest) -> Platform:
    return load_platform(SITES / request.param)


@pytest.fixture(scope="module")
def world(platform: Platform) -> dict[str, zones.Zone]:
    return zones.world_zones(platform, tlsa={"dane": "3 1 1 " + "ab" * 32})


def parsed(zone: zones.Zone) -> dns.zone.Zone:
    return dns.zone.from_text(zone.text, origin=zone.name, relativize=False)


def test_every_zone_is_a_valid_zone_file(world: dict[str, zones.Zone]) -> None:
    for zone in world.values():
        found = parsed(zone)
        assert found.get_soa() is not None
        for owner in found:
            assert owner.is_subdomain(dns.name.from_text(zone.name)), zone.name


def test_every_zone_is_delegated_by_its_nearest_parent_alone(world: dict[str, zones.Zone]) -> None:
    parents = {child: [z.name for z in world.values() if child in z.children] for child in world}
    assert parents.pop(".") == []
    for child, found in parents.items():
        assert len(found) == 1, child
        above = dns.name.from_text(child).parent()
        while str(above) not in world:
            above = above.parent()
        assert found == [str(above)]


def test_every_name_server_is_found_from_the_root(world: dict[str, zones.Zone]) -> None:
    servers = {server for zone in world.values() for server in zone.servers}
    root = {(r.owner, r.type) for r in world["."].records}
    assert {(server, kind) for server in servers for kind in ("A", "AAAA")} <= root


def test_each_domain_of_the_site_leads_to_the_old_server(
    platform: Platform, world: dict[str, zones.Zone]
) -> None:
    for domain in platform.domains.values():
        zone = world[f"{domain.dns_zone}."]
        assert zone.dynamic
        assert zone.signed
        found = {r.data for r in zone.records if r.owner == f"{domain.name}."}
        assert {str(a) for a in plan.HOME.addresses} <= found


def test_an_operator_zone_says_like_the_provider_that_there_is_no_such_name(
    platform: Platform, world: dict[str, zones.Zone]
) -> None:
    soa = parsed(world[f"{platform.domain}."]).get_soa()
    assert (soa.minimum, world[f"{platform.domain}."].soa.ttl) == (1800, 1800)


def test_zones_that_the_provider_holds_beside_those_of_the_site_data(platform: Platform) -> None:
    found = zones.world_zones(platform, operator_zones=["Elsewhere.Invalid-TLD"])
    assert found["elsewhere.invalid-tld."].dynamic
    assert "elsewhere.invalid-tld." in found["invalid-tld."].children
    assert "invalid-tld." in found["."].children


def test_every_pointer_lies_in_a_reverse_zone(
    platform: Platform, world: dict[str, zones.Zone]
) -> None:
    pointers = {r.owner: r.data for z in world.values() for r in z.records if r.type == "PTR"}
    for name, egress in platform.egress.items():
        for address in (egress.ipv4, egress.ipv6):
            assert pointers[f"{address.reverse_pointer}."] == f"{name}."
    for host in platform.hosts.values():
        for host_address in host.addresses:
            assert f"{host_address.reverse_pointer}." in pointers
    for mx in plan.MAIL_SERVERS.values():
        for address in mx.addresses:
            assert pointers[f"{address.reverse_pointer}."] == f"{mx.host}."
    assert parsed(world[zones.reverse_zone(plan.HOME.addresses.ipv6)])


def test_pointers_are_what_the_operator_published(platform: Platform) -> None:
    text = "$ORIGIN 2.1.185.in-addr.arpa.\n; why\n7 600 IN PTR gw.carrier.example.\n"
    found = zones.world_zones(platform, ptr_text=text)
    zone = found["2.1.185.in-addr.arpa."]
    assert [str(r) for r in zone.records] == [
        "7.2.1.185.in-addr.arpa. 600 IN PTR gw.carrier.example."
    ]


@pytest.mark.parametrize(
    ("address", "zone"),
    [
        ("185.1.2.7", "2.1.185.in-addr.arpa."),
        ("2001:db8:1:2::3", "1.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa."),
    ],
)
def test_reverse_zone(address: str, zone: str) -> None:
    assert zones.reverse_zone(ip_address(address)) == zone


def test_the_world_has_what_must_not_resolve_and_what_is_not_signed(
    world: dict[str, zones.Zone],
) -> None:
    assert world["bogus.example."].bogus
    assert world["bogus.example."].signed
    assert not world["unsigned.example."].signed
    assert {z.name for z in world.values() if not z.signed} == {"unsigned.example."}


def test_dane_is_published_for_its_server_alone(world: dict[str, zones.Zone]) -> None:
    found = [r for z in world.values() for r in z.records if r.type == "TLSA"]
    assert [r.owner for r in found] == ["_25._tcp.mx.dane.example."]


def test_a_site_that_uses_a_zone_of_the_world_is_refused(platform: Platform) -> None:
    with pytest.raises(ValueError, match=r"strict\.example\. of the site is also one"):
        zones.world_zones(platform, operator_zones=["strict.example"])


def test_the_world_keeps_out_of_the_sites_networks(platform: Platform) -> None:
    assert plan.collisions(platform) == ()
    networks = dict(platform.networks)
    name, network = next(iter(networks.items()))
    taken = network.ipv4.model_copy(update={"prefix": IPv4Network("198.18.53.0/24")})
    networks[name] = network.model_copy(update={"ipv4": taken})
    bad = platform.model_copy(update={"networks": networks})
    assert f"198.18.53.53 (of the rehearsal's outside world) lies in network {name}" in "\n".join(
        plan.collisions(bad)
    )


def test_addresses_of_the_world_are_its_own_each_once() -> None:
    found = plan.service_addresses()
    assert len(found) == len(set(found))
    assert not set(found) & {*plan.LEG, *plan.GATEWAY}


def knot_conf(world: dict[str, zones.Zone], challenges: tuple[str, ...] = ()) -> str:
    return knot.configuration(
        world,
        plan.name_server_addresses(),
        knot.UpdateKey("k.", "c2VjcmV0"),
        acme=knot.UpdateKey("a.", "YW5vdGhlcg=="),
        challenges=challenges,
        folder="/k",
        run="/r",
    )


def test_the_acme_clients_key_is_for_challenges_alone(world: dict[str, zones.Zone]) -> None:
    text = knot_conf(world, ("_acme-challenge.pelican.example",))
    (acl,) = [b for b in text.split("  - id: ") if b.startswith("challenges")]
    assert "    key: a.\n" in acl
    assert "    action: update\n    update-type: TXT\n" in acl
    assert "update-owner-match: equal\n    update-owner-name: [_acme-challenge.pelican.ex" in acl
    assert "challenges" not in knot_conf(world)


def test_only_operator_zones_take_updates(world: dict[str, zones.Zone]) -> None:
    text = knot_conf(world)
    blocks = text.split("  - domain: ")[1:]
    dynamic = {b.splitlines()[0] for b in blocks if "template: dynamic" in b}
    assert dynamic == {z.name for z in world.values() if z.dynamic}
    assert len(blocks) == len(world)


def test_the_update_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first = knot.UpdateKey.kept(tmp_path / "tsig.json")
    assert knot.UpdateKey.kept(tmp_path / "tsig.json") == first
    assert (tmp_path / "tsig.json").stat().st_mode & 0o777 == 0o600
    assert first.secret not in repr(first)


def test_each_block_list_is_delegated_to_its_own_name_server(
    platform: Platform, world: dict[str, zones.Zone]
) -> None:
    lists = zones.list_zones(platform)
    assert {f"{entry.zone}." for entry in platform.inbound.dnsbl} == set(lists)
    for name in lists:
        assert name not in world
        (found,) = [
            r for z in world.values() for r in z.records if (r.owner, r.type) == (name, "NS")
        ]
        assert found.data == f"{plan.LISTS_SERVER}."


def test_a_block_list_in_the_worlds_own_zone_is_refused(platform: Platform) -> None:
    (first, *rest) = platform.inbound.dnsbl
    taken = first.model_copy(update={"zone": "generic.example"})
    inbound = platform.inbound.model_copy(update={"dnsbl": (taken, *rest)})
    with pytest.raises(ValueError, match=r"block list generic\.example\. is also a zone"):
        zones.world_zones(platform.model_copy(update={"inbound": inbound}))


def test_what_the_site_forwards_to_leads_to_a_careful_server(
    platform: Platform, world: dict[str, zones.Zone]
) -> None:
    outside = zones.forward_domains(platform)
    assert outside
    assert not set(outside) & set(platform.domains)
    for domain in outside:
        (mx,) = [r.data for z in world.values() for r in z.records
                 if (r.owner, r.type) == (f"{domain}.", "MX")]  # fmt: skip
        assert mx == f"10 {plan.ELSEWHERE.host}."
    assert plan.ELSEWHERE.demands is plan.Demand.AUTHORIZED


def test_the_mailboxes_are_on_the_old_server_where_the_platform_has_none(
    platform: Platform,
) -> None:
    name = f"{platform.maildrop_domain}."

    def led(site: Platform) -> list[str]:
        found = zones.world_zones(site).values()
        return [r.data for z in found for r in z.records if (r.owner, r.type) == (name, "MX")]

    hosts = {n: h for n, h in platform.hosts.items() if Role.MAILDROP not in h.roles}
    without = platform.model_copy(update={"hosts": hosts, "maildrop": None})
    assert led(without) == [f"10 {plan.HOME.host}."]
    assert led(platform) == []


def test_remote_senders_publish_what_vouches_for_them(platform: Platform) -> None:
    found = zones.world_zones(platform, dkim={"signer": "A" * 300})
    texts = {
        name: [r.data for r in found[f"{sender.domain}."].records if r.type == "TXT"]
        for name, sender in plan.SENDERS.items()
    }
    address = plan.SENDERS["careful"].addresses.ipv4
    assert f'"v=spf1 ip4:{address}' in texts["careful"][0] and texts["careful"][0].endswith('-all"')
    assert any("v=DKIM1" in text for text in texts["signer"])
    assert texts["bare"] == texts["spammer"] == texts["smuggler"] == []
    pointers = {r.owner: r.data for z in found.values() for r in z.records if r.type == "PTR"}
    for sender in plan.SENDERS.values():
        for one in sender.addresses:
            assert pointers[f"{one.reverse_pointer}."] == f"{sender.host}."
