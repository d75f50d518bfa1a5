"""The base of a machine: who may reach which port, names, and what stays the operator's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

import pytest

from mailsite.bundle import ROLES, compose
from mailsite.fragment import PortRule
from mailsite.loader import load_platform
from mailsite.model import Base, Host, NetworkKind, Platform, Role, SiteLocal, World
from mailsite.roles import base
from tests.unit.test_loader import EXAMPLE

PLATFORM = load_platform(EXAMPLE)
OUT = PLATFORM.members(Role.SMTP_OUT)[0]
EDGE = PLATFORM.members(Role.FRONTEND)[0]
OPERATORS = [str(network[10]) for network in PLATFORM.management.networks]
STRANGERS = ["203.0.113.9", "2001:db8:ffff::9"]


@dataclass(frozen=True)
class Rule:
    """A line of the input chain that decides on a port. ``sources``: None for everyone."""

    protocol: str
    port: int
    sources: tuple[str, ...] | None
    verdict: str
    version: int | None


def parse(ruleset: str) -> tuple[str, list[Rule]]:
    """The policy of the input chain and its rules on ports; no other part is looked at."""
    (policy,) = re.findall(r"hook input .*policy (\w+);", ruleset)
    pattern = re.compile(
        r"^\s*(?:(ip6?) saddr \{ ([^}]*) \} )?(tcp|udp) dport (\d+) (?:counter )?(accept|drop)$",
        re.M,
    )
    rules = []
    for family, elements, protocol, port, verdict in pattern.findall(ruleset):
        sources = tuple(elements.split(", ")) if family else None
        version = {"ip": 4, "ip6": 6}.get(family)
        rules.append(Rule(protocol, int(port), sources, verdict, version))
    assert len(rules) == len(re.findall(r"^[^#\n]*dport", ruleset, re.M))
    return policy, rules


def may(ruleset: str, source: str, port: int, protocol: str = "tcp") -> bool:
    """Whether a new connection from ``source`` to ``port`` is let in: the first match decides."""
    policy, rules = parse(ruleset)
    address = ip_address(source)
    for rule in rules:
        if (rule.protocol, rule.port) != (protocol, port):
            continue
        if rule.sources is None or (
            rule.version == address.version and any(address in ip_network(x) for x in rule.sources)
        ):
            return rule.verdict == "accept"
    return policy == "accept"


def ruleset(platform: Platform, host: Host) -> str:
    return compose(platform, host).files["/etc/nftables.conf"].content


def own(host: Host) -> list[str]:
    leg = PLATFORM.internal_leg(host)
    return [str(leg.ipv4), str(leg.ipv6)]


# -- managed machines --------------------------------------------------------------------------


def test_smtp_out_opens_ssh_and_the_two_submission_ports() -> None:
    policy, rules = parse(ruleset(PLATFORM, OUT))
    assert policy == "drop"
    assert {(rule.protocol, rule.port) for rule in rules} == {
        ("tcp", 22),
        ("tcp", 587),
        ("tcp", 10587),
    }
    assert all(rule.sources for rule in rules)


def test_a_machine_without_a_role_of_ours_opens_ssh_alone() -> None:
    host = OUT.model_copy(update={"roles": (Role.SERVER,)})
    assert not set(host.roles) & set(ROLES)
    assert {rule.port for rule in parse(ruleset(PLATFORM, host))[1]} == {22}


@pytest.mark.parametrize("port", [22, 25, 53, 80, 587, 8891, 10587])
def test_the_internet_reaches_nothing(port: int) -> None:
    text = ruleset(PLATFORM, OUT)
    for source in STRANGERS:
        for protocol in ("tcp", "udp"):
            assert not may(text, source, port, protocol)


@pytest.mark.parametrize("source", OPERATORS)
def test_operators_reach_ssh_and_submission_but_not_the_proxy_port(source: str) -> None:
    text = ruleset(PLATFORM, OUT)
    assert [may(text, source, port) for port in (22, 587, 10587)] == [True, True, False]


def test_frontends_alone_reach_the_proxy_port() -> None:
    text = ruleset(PLATFORM, OUT)
    for host in PLATFORM.hosts.values():
        for source in own(host):
            assert may(text, source, 10587) == (Role.FRONTEND in host.roles), source
            assert may(text, source, 587), source
            assert not may(text, source, 22), source


def test_a_frontends_public_leg_does_not_reach_the_proxy_port() -> None:
    """A process there may bind to it; the streams use the internal one."""
    outside = EDGE.interfaces[0]
    local = SiteLocal.model_validate({"ipv4": "10.0.0.0/8", "ipv6": "fd00::/16"})
    networks = dict(PLATFORM.networks)
    public = networks[outside.network]
    networks["inner"] = public.model_copy(update={"kind": NetworkKind.SITE_LOCAL})
    leg = outside.model_copy(
        update={"network": "inner", "ipv4": ip_address("10.1.1.1"), "ipv6": ip_address("fd00::1")}
    )
    edge = EDGE.model_copy(update={"interfaces": (outside, leg)})
    platform = PLATFORM.model_copy(
        update={
            "site_local": local,
            "networks": networks,
            "hosts": PLATFORM.hosts | {edge.name: edge},
        }
    )
    text = ruleset(platform, OUT)
    assert may(text, "10.1.1.1", 10587) and may(text, "fd00::1", 10587)
    assert not may(text, str(outside.ipv4), 10587)
    assert not may(text, str(outside.ipv6), 10587)
    # Every site-local machine may submit, also one that is not in the site data.
    assert may(text, "10.200.0.1", 587) and may(text, "fd00:0:0:9::1", 587)
    assert not may(text, "10.200.0.1", 22)


def test_both_families_have_the_same_rules() -> None:
    _, rules = parse(ruleset(PLATFORM, OUT))
    by_family = {
        version: {(r.port, r.verdict) for r in rules if r.version == version} for version in (4, 6)
    }
    assert by_family[4] == by_family[6]


def test_overlapping_sources_become_one_element() -> None:
    """nft refuses a set whose elements overlap."""
    networks = [ip_network(x) for x in ("10.0.0.0/8", "10.1.0.0/16", "10.1.1.1/32", "fd00::/8")]
    fragment = base.fragment(PLATFORM, EDGE, [PortRule(4190, tuple(networks), "sieve")])
    _, rules = parse(fragment.files["/etc/mail-platform/nftables.conf"].content)
    assert [rule.sources for rule in rules] == [("10.0.0.0/8",), ("fd00::/8",), None]


def test_a_change_of_firewall_or_ssh_is_guarded() -> None:
    bundle = compose(PLATFORM, OUT)
    for path in ("/etc/nftables.conf", "/etc/ssh/sshd_config.d/10-mail.conf"):
        assert any(path == p or path.startswith(p) for p in bundle.guarded)
    assert not any("/etc/postfix/main.cf".startswith(p) for p in bundle.guarded)


# -- the resolver ------------------------------------------------------------------------------


def unbound(platform: Platform) -> str:
    return compose(platform, OUT).files["/etc/unbound/unbound.conf"].content


def test_unbound_recurses_by_itself_and_validates() -> None:
    text = unbound(PLATFORM)
    assert "forward-zone" not in text and "forward-addr" not in text
    assert re.findall(r"^ +trust-anchor.*$", text, re.M) == [
        '    trust-anchor-file: "/usr/share/dns/root.key"'
    ]
    assert 'module-config: "validator iterator"' in text
    assert "domain-insecure" not in text and "permissive" not in text


def test_the_world_may_have_another_trust_anchor() -> None:
    anchor = ". 86400 IN DS 12345 13 2 " + "AB" * 32
    world = World.model_validate(PLATFORM.world.model_dump() | {"trust_anchors": (anchor,)})
    found = re.findall(r"^ +trust-anchor.*$", unbound(PLATFORM.with_world(world)), re.M)
    assert found == [f'    trust-anchor: "{anchor}"']


def test_every_host_is_known_by_name_and_address() -> None:
    text = unbound(PLATFORM)
    for host in PLATFORM.hosts.values():
        for address, kind in zip(own(host), ("A", "AAAA"), strict=True):
            assert f'local-data: "{host.name}. 300 IN {kind} {address}"' in text
            assert f'local-data-ptr: "{address} 300 {host.name}."' in text


@pytest.mark.parametrize("role", [Role.SMTP_OUT, Role.RSPAMD])
def test_a_cluster_has_one_internal_name_for_all_members(role: Role) -> None:
    name = f"{role}.{PLATFORM.internal_domain}"
    (cluster,) = (n for n in base.internal_names(PLATFORM) if n.name == name)
    members = PLATFORM.members(role)
    assert {str(a) for a in cluster.addresses} == {a for m in members for a in own(m)}


def test_the_machine_asks_its_own_resolver() -> None:
    text = compose(PLATFORM, OUT).files["/etc/resolv.conf"].content
    assert re.findall(r"^nameserver (.*)$", text, re.M) == ["127.0.0.1", "::1"]
    # Without it the C library hides from Postfix that an answer was validated.
    assert "trust-ad" in text


# -- authorities -------------------------------------------------------------------------------


def test_authorities_of_the_world_are_files_of_their_own() -> None:
    world = PLATFORM.world.model_dump() | {"ca_certificates": ("first\n\n", "second")}
    bundle = compose(PLATFORM.with_world(World.model_validate(world)), OUT)
    folder = "/usr/local/share/ca-certificates"
    found = {p: f.content for p, f in bundle.files.items() if p.startswith(folder)}
    assert found == {f"{folder}/mail-1.crt": "first\n", f"{folder}/mail-2.crt": "second\n"}
    (service,) = (s for s in bundle.services if s.unit == "mail-ca-certificates.service")
    assert folder in service.restart_on
    readers = [s for s in bundle.services if folder in s.reload_on]
    assert readers and all(service.order < reader.order for reader in readers)


def test_the_real_world_needs_no_authority_of_ours() -> None:
    assert not [p for p in compose(PLATFORM, OUT).files if "ca-certificates/" in p]


# -- existing machines -------------------------------------------------------------------------


def test_an_existing_machine_stays_the_operators() -> None:
    """Nothing but files that are the platform's own by their name or folder."""
    assert EDGE.base is Base.OPERATOR and EDGE.vm is None
    allowed = (
        "/etc/mail-platform/",
        # Of a package that is there for the platform alone.
        "/etc/mail/",
        "/etc/smtpd.conf",
        "/etc/nginx/mail-streams.d/",
        "/etc/nginx/modules-enabled/90-mail-streams.conf",
        "/etc/nginx/sites-enabled/zz-webmail.conf",
        "/etc/systemd/system/mail-",
        "/usr/local/sbin/mail-agent",
    )
    bundle = compose(PLATFORM, EDGE)
    assert [p for p in bundle.files if not p.startswith(allowed)] == []
    assert set(bundle.packages) == {"libnginx-mod-stream", "nftables", "nginx", "opensmtpd"}
    assert bundle.keep_packages and not compose(PLATFORM, OUT).keep_packages
    assert {s.unit for s in bundle.services} == {
        *("mail-nftables.service", "nginx.service", "opensmtpd.service")
    }
    (nginx,) = (s for s in bundle.services if s.unit == "nginx.service")
    assert nginx.restart_on == ()
    # When the role goes, the operator's web server stays.
    assert {s.unit for s in bundle.services if s.foreign} == {"nginx.service"}
    assert not any(s.foreign for s in compose(PLATFORM, OUT).services)


def test_the_table_on_an_existing_machine_drops_nothing_of_the_operators() -> None:
    text = compose(PLATFORM, EDGE).files["/etc/mail-platform/nftables.conf"].content
    policy, rules = parse(text)
    assert policy == "accept"
    assert Rule("tcp", 587, None, "accept", None) in rules
    assert {rule.port for rule in rules} == {80, 443, 587, 993, 4190}
    assert "flush ruleset" not in text
    assert set(re.findall(r"^(?:delete )?table (.*?)(?: \{)?$", text, re.M)) == {"inet mail"}


def restricted(sources: Sequence[str]) -> str:
    rule = PortRule(4190, tuple(ip_network(x) for x in sources), "sieve")
    return base.fragment(PLATFORM, EDGE, [rule]).files["/etc/mail-platform/nftables.conf"].content


def test_a_restricted_port_on_an_existing_machine_drops_strangers_there_alone() -> None:
    text = restricted(["198.51.100.0/24", "2001:db8:1::/48"])
    assert may(text, "198.51.100.1", 4190) and may(text, "2001:db8:1::1", 4190)
    assert not may(text, "203.0.113.9", 4190) and not may(text, "2001:db8:2::1", 4190)
    assert may(text, "203.0.113.9", 443) and may(text, "203.0.113.9", 22)


def test_a_family_without_an_allowed_source_is_dropped_too() -> None:
    text = restricted(["198.51.100.0/24"])
    assert not may(text, "2001:db8:1::1", 4190)


def test_an_existing_machine_without_a_port_of_ours_gets_no_table() -> None:
    fragment = base.fragment(PLATFORM, EDGE, [])
    assert set(fragment.files) == {"/usr/local/sbin/mail-agent"}
    assert fragment.services == () and fragment.packages == ()


def test_an_existing_machine_that_is_managed_gets_the_whole_base() -> None:
    managed = EDGE.model_copy(update={"base": Base.MANAGED})
    platform = PLATFORM.model_copy(update={"hosts": PLATFORM.hosts | {managed.name: managed}})
    text = ruleset(platform, managed)
    assert may(text, STRANGERS[0], 587) and may(text, STRANGERS[1], 587)
    assert not may(text, STRANGERS[0], 22)
    assert may(text, OPERATORS[0], 22)
