"""The prod site: it loads, and says what the published records say."""

from __future__ import annotations

import re
from collections import defaultdict
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from mailsite.aliases import DISCARD_ADDRESS, virtual_aliases
from mailsite.loader import load_platform
from mailsite.model import (
    AddressTarget,
    Host,
    MailboxTarget,
    NetworkKind,
    Nowhere,
    Platform,
    Role,
    TlsLevel,
)
from mailsite.records import static_records

PROD = Path(__file__).parents[2] / "sites" / "prod"

Records = dict[tuple[str, str], list[str]]


@pytest.fixture(scope="module")
def prod() -> Platform:
    return load_platform(PROD)


def listing(kind: str) -> list[str]:
    """The lines of a published listing, from the site's own README."""
    text = (PROD / "README.md").read_text()
    (found,) = re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)
    return str(found).splitlines()


@pytest.fixture(scope="module")
def published() -> Records:
    """The published records."""
    records: Records = defaultdict(list)
    for line in listing("dns"):
        name, _ttl, _class, kind, data = line.split(maxsplit=4)
        records[name.rstrip("."), kind].append(data.rstrip("."))
    return records


def addresses(records: Records, name: str) -> set[object]:
    return {ip_address(a) for kind in ("A", "AAAA") for a in records[name, kind]}


def public(prod: Platform, hosts: tuple[Host, ...]) -> set[object]:
    legs = [prod.leg(h, NetworkKind.PUBLIC) for h in hosts]
    return {a for leg in legs if leg is not None for a in (leg.ipv4, leg.ipv6)}


def test_service_addresses_are_the_published_ones(prod: Platform, published: Records) -> None:
    internal = f"smtp-out.{prod.internal_domain}"
    assert set(prod.addresses_of(Role.SMTP_OUT)) == addresses(published, internal)
    assert public(prod, prod.members(Role.SMTP_IN)) == addresses(published, prod.names.smtp_in)
    assert public(prod, prod.members(Role.FRONTEND)) == addresses(published, prod.names.frontend)
    assert len(addresses(published, internal)) == 6


def test_the_program_publishes_the_published_records(prod: Platform) -> None:
    assert unpublished(prod) == []


def unpublished(prod: Platform) -> list[str]:
    """The published records that the program does not have."""
    found = {(r.name, str(r.ttl), r.type.value, r.rdata.rstrip(".")) for r in static_records(prod)}
    missing = []
    for line in listing("dns"):
        name, ttl, _class, kind, data = line.split(maxsplit=4)
        if (name.rstrip("."), ttl, kind, data.rstrip(".")) not in found:
            missing.append(f"{name} {kind}")
    return missing


def test_services_behind_the_frontends_point_there(prod: Platform, published: Records) -> None:
    for name in (prod.names.smtp_out, prod.names.imap):
        assert published[name, "CNAME"] == [prod.names.frontend]


def test_spf_blocks_are_the_published_ones_in_their_order(
    prod: Platform, published: Records
) -> None:
    label, _, parent = prod.names.spf.partition(".")
    for digit, blocks in (("4", prod.spf.ipv4), ("6", prod.spf.ipv6)):
        (text,) = published[f"{label}{digit}.{parent}", "TXT"]
        terms = text.strip('"').split()
        expected = [ip_network(t.partition(":")[2]) for t in terms[1:-1]]
        assert list(blocks) == expected
        assert prod.spf.all == terms[-1]


def test_published_mail_domains_receive_and_sign(prod: Platform, published: Records) -> None:
    for name, kind in published:
        if kind == "MX" and name != f"maildrop.{prod.internal_domain}":
            assert prod.domains[name].receives
    senders = [d for d in prod.domains.values() if d.sends]
    assert len(senders) == 4
    assert {k.selector for d in senders for k in d.dkim} == {"DKIM2022"}


def test_one_domain_never_sends(prod: Platform) -> None:
    (silent,) = [d for d in prod.domains.values() if not d.sends]
    assert not silent.dkim and not silent.receives


def test_published_addresses_lead_where_they_did(prod: Platform) -> None:
    table = virtual_aliases(prod)
    rows = [line.split() for line in listing("virtual")]
    assert len(rows) == 13
    for address, targets in rows:
        if address.startswith("@"):
            alias, target = address.removeprefix("@"), targets.removeprefix("@")
            assert prod.domains[alias].alias_of == target
            known = [k.rpartition("@")[0] for k in table if k.endswith(f"@{target}")]
            assert {f"{k}@{alias}": (f"{k}@{target}",) for k in known} == {
                k: v for k, v in table.items() if k.endswith(f"@{alias}")
            }
        else:
            expected = targets.replace("/dev/null", DISCARD_ADDRESS).split(",")
            assert list(table[address]) == expected


def test_block_lists_are_the_published_ones_in_their_order(prod: Platform) -> None:
    rows = listing("dnsbl")
    assert len(rows) == len(prod.inbound.dnsbl) == 7
    for row, dnsbl in zip(rows, prod.inbound.dnsbl, strict=True):
        zone, _, answers = row.split()[-1].partition("=")
        assert (f"reject_{dnsbl.kind}", dnsbl.zone) == (row.split()[-2], zone)
        assert dnsbl.warn_only == row.startswith("warn_if_reject ")
        assert dnsbl.answers == (answers or "127.0.0.2")


def test_doubtful_mail_is_greylisted_tagged_or_refused(prod: Platform) -> None:
    assert prod.spam.greylist
    assert 0 < prod.spam.scores.greylist < prod.spam.scores.add_header < prod.spam.scores.reject


def test_forwards_have_a_sender_domain_of_their_own(prod: Platform) -> None:
    assert prod.inbound.srs_domain.endswith(f".{prod.domain}")
    assert prod.inbound.srs_domain not in prod.domains


def test_inbound_mail_has_every_kind_of_address(prod: Platform) -> None:
    receiving = [d for d in prod.domains.values() if d.receives]
    targets = [t for d in receiving for ts in d.addresses.values() for t in ts]
    assert {type(t) for t in targets} == {MailboxTarget, AddressTarget, Nowhere}
    assert any(len(ts) > 1 for d in receiving for ts in d.addresses.values())
    assert any("*" in d.addresses for d in receiving)
    assert {t.mailbox for t in targets if isinstance(t, MailboxTarget)} == set(prod.mailboxes)


def test_maildrop_replicas_are_the_published_pair(prod: Platform, published: Records) -> None:
    targets = sorted(published[f"maildrop.{prod.internal_domain}", "MX"])
    assert [h.name for h in prod.replicas] == [t.split()[1] for t in targets]


def test_tiers_have_their_members(prod: Platform) -> None:
    counts = {role: len(prod.members(role)) for role in Role}
    assert counts[Role.SMTP_OUT] == counts[Role.SMTP_IN] == counts[Role.RSPAMD] == 3
    assert counts[Role.FRONTEND] == len(prod.egress) == 3
    assert counts[Role.MAILDROP] == counts[Role.WEBMAIL] == 2
    assert counts[Role.HYPERVISOR] == len(prod.hypervisors)
    assert counts[Role.ROUTER] and counts[Role.SERVER]


def test_smtp_out_is_three_equal_machines_at_three_sites(prod: Platform) -> None:
    members = prod.members(Role.SMTP_OUT)
    sizes = {(m.vm.cpus, m.vm.memory_mib, m.vm.root_gib) for m in members if m.vm is not None}
    assert sizes == {(4, 8192, 16)}
    assert len({m.site for m in members}) == 3
    assert prod.outbound.primary == members[0].name


def test_outbound_settings_are_the_published_ones(prod: Platform) -> None:
    outbound = prod.outbound
    assert outbound.tls is TlsLevel.ENCRYPT
    assert (outbound.message_size_limit, outbound.header_size_limit) == (52428800, 4096000)
    limits = outbound.limits
    assert (limits.connections, limits.connection_rate, limits.message_rate) == (4, 10, 60)


def test_smtp_out_is_site_local_alone(prod: Platform) -> None:
    for host in prod.members(Role.SMTP_OUT) + prod.members(Role.MAILDROP):
        assert prod.leg(host, NetworkKind.PUBLIC) is None


def test_frontends_are_existing_machines_between_both_worlds(prod: Platform) -> None:
    for host in prod.members(Role.FRONTEND):
        assert host.vm is None and not host.is_managed and host.ssh_host_key is not None
        assert [prod.network_of(i).kind for i in host.interfaces] == [
            NetworkKind.PUBLIC,
            NetworkKind.SITE_LOCAL,
        ]
        assert prod.site_local is not None
        routes = prod.routes(host, host.interfaces[1])
        assert {r.prefix for r in routes} == {prod.site_local.ipv4, prod.site_local.ipv6}


def test_operators_have_site_local_networks_of_their_own(prod: Platform) -> None:
    used = [s.prefix for n in prod.networks.values() for s in (n.ipv4, n.ipv6)]
    assert prod.site_local is not None
    for network in prod.management.networks:
        assert not any(network.overlaps(u) for u in used if u.version == network.version)
        assert network.num_addresses > 20
        whole = prod.site_local.ipv4 if network.version == 4 else prod.site_local.ipv6
        assert whole.network_address <= network.network_address  # type: ignore[operator]
        assert network.broadcast_address in whole


def test_egress_gateways_are_no_hosts_and_their_ipv6_is_on_no_network(prod: Platform) -> None:
    """A neighbour on the same network would look for the address there."""
    for egress in prod.egress.values():
        assert not any(egress.ipv6 in n.ipv6.prefix for n in prod.networks.values())


def test_there_are_logins_for_people_servers_and_webmail(prod: Platform) -> None:
    assert {"roundcube", "bastion"} < set(prod.sasl_users)
    assert any(u.suspended for u in prod.sasl_users.values())
    assert all(u.password_hash is None for u in prod.sasl_users.values())
