"""What every machine gets: firewall, resolver, ssh, certificate authorities, journal, the agent.

A managed machine (every VM) gets all of it. An existing machine that stays the operator's gets
only the agent and a firewall table of its own that restricts the platform's ports.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Network, collapse_addresses, ip_network
from pathlib import Path

from mailsite.fragment import (
    Check,
    CommandHealth,
    File,
    Fragment,
    PortRule,
    Service,
    TcpHealth,
    UnitHealth,
    templated,
)
from mailsite.model import Host, IPAddress, IPNetwork, Platform, Role
from mailsite.records import addresses_of, maildrop_exchanges, own_names

ROLE = "base"
AGENT = "/usr/local/sbin/mail-agent"
AGENT_SOURCE = "agent/mail_agent.py"
CA_FOLDER = "/usr/local/share/ca-certificates"
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"


def fragment(platform: Platform, host: Host, ports: Sequence[PortRule]) -> Fragment:
    """The base of ``host``. ``ports`` are what its roles serve."""
    if host.is_managed:
        return _managed(platform, host, ports)
    return _operators(ports)


# -- managed machines --------------------------------------------------------------------------


def _managed(platform: Platform, host: Host, ports: Sequence[PortRule]) -> Fragment:
    ssh = PortRule(22, platform.management.networks, "ssh: operators and the graph")
    names = internal_names(platform)
    leg = platform.internal_leg(host)
    certificates = {
        f"{CA_FOLDER}/mail-{number}.crt": File(content=_one_newline(pem))
        for number, pem in enumerate(platform.world.ca_certificates, start=1)
    }
    files = dict(
        (
            agent(),
            templated("base/etc/nftables.conf.j2", mode=0o755, rules=_filter_rules((ssh, *ports))),
            templated(
                "base/etc/ssh/sshd_config.d/10-mail.conf.j2",
                login=host.login,
                operators=platform.management.networks,
            ),
            templated(
                "base/etc/unbound/unbound.conf.j2",
                internal_domain=platform.internal_domain,
                names=names,
                pointers=pointers(platform),
                trust_anchors=platform.world.trust_anchors,
            ),
            templated("base/etc/default/unbound.j2"),
            templated("base/etc/systemd/system/unbound.service.d/mail.conf.j2"),
            templated("base/etc/systemd/system/systemd-resolved.service.d/mail.conf.j2"),
            templated("base/etc/resolv.conf.j2", internal_domain=platform.internal_domain),
            templated("base/etc/hostname.j2", short=host.short),
            templated(
                "base/etc/hosts.j2",
                addresses=(leg.ipv4, leg.ipv6),
                fqdn=host.name,
                short=host.short,
            ),
            templated("base/etc/cloud/cloud-init.disabled.j2"),
            templated("base/etc/systemd/journald.conf.d/mail.conf.j2"),
            templated(
                "base/etc/systemd/system/mail-ca-certificates.service.j2",
                folder=CA_FOLDER,
                bundle=CA_BUNDLE,
            ),
        )
    )
    return Fragment(
        role=ROLE,
        files=files | certificates,
        packages=("ca-certificates", "dns-root-data", "nftables", "openssh-server", "unbound"),
        checks=(
            Check("nftables", ("nft", "-c", "-f", "/etc/nftables.conf"), ("/etc/nftables.conf",)),
            Check("sshd", ("sshd", "-t"), ("/etc/ssh/",), stderr_is_failure=True),
            Check("unbound", ("unbound-checkconf",), ("/etc/unbound/",), stderr_is_failure=True),
        ),
        services=(
            Service(
                "systemd-journald.service", restart_on=("/etc/systemd/journald.conf.d/",), order=5
            ),
            Service(
                "mail-ca-certificates.service",
                restart_on=(CA_FOLDER, "/etc/systemd/system/mail-ca-certificates.service"),
                order=8,
            ),
            Service("nftables.service", reload_on=("/etc/nftables.conf",), order=10),
            Service(
                "unbound.service",
                reload_on=("/etc/unbound/",),
                restart_on=("/etc/default/unbound", "/etc/systemd/system/unbound.service.d/"),
                order=20,
            ),
            Service("ssh.service", reload_on=("/etc/ssh/",), order=90),
        ),
        health=(
            UnitHealth("nftables.service"),
            TcpHealth("127.0.0.1", 22, expect="SSH-2.0-"),
            # The resolver answers for the machine itself, which needs nothing from outside.
            CommandHealth(("getent", "-s", "dns", "ahosts", host.name)),
            TcpHealth("127.0.0.1", 53),
        ),
        guarded=("/etc/nftables.conf", "/etc/ssh/"),
    )


@dataclass(frozen=True)
class LocalName:
    """A name that every resolver of the platform answers by itself.

    ``exchanges``: preference and host name of each MX.
    """

    name: str
    addresses: tuple[IPAddress, ...]
    exchanges: tuple[tuple[int, str], ...] = ()


def internal_names(platform: Platform) -> tuple[LocalName, ...]:
    """The internal names: every host by its internal leg, every cluster by its members.

    Mail and webmail find the mailboxes by two more.
    """
    found = [
        LocalName(own.name, own.addresses)
        for own in own_names(platform)
        if own.name in platform.hosts
    ]
    for role in (Role.SMTP_OUT, Role.RSPAMD):
        legs = [platform.internal_leg(member) for member in platform.members(role)]
        if legs:
            found.append(LocalName(platform.internal_name(role), addresses_of(legs)))
    if platform.replicas:
        legs = [platform.internal_leg(replica) for replica in platform.replicas]
        found += [
            LocalName(platform.webmail_backend, addresses_of(legs)),
            LocalName(platform.maildrop_domain, (), maildrop_exchanges(platform)),
        ]
    return tuple(found)


def pointers(platform: Platform) -> Mapping[IPAddress, str]:
    """The reverse names of every address of the platform's machines."""
    found: dict[IPAddress, str] = {}
    for own in own_names(platform):
        for address in own.addresses:
            found.setdefault(address, own.name)
    return found


def internal_clients(platform: Platform) -> tuple[IPNetwork, ...]:
    """Where clients of the platform's own services are: operators, site-local, our machines."""
    found: list[IPNetwork] = list(platform.management.networks)
    if platform.site_local is not None:
        found += (platform.site_local.ipv4, platform.site_local.ipv6)
    for host in platform.hosts.values():
        leg = platform.internal_leg(host)
        found += (ip_network(leg.ipv4), ip_network(leg.ipv6))
    return tuple(found)


def internal_networks(platform: Platform, *roles: Role) -> tuple[IPNetwork, ...]:
    """The internal addresses of every host that serves in one of ``roles``, for firewall rules."""
    hosts = {host.name: host for role in roles for host in platform.serving(role)}
    return internal_networks_of(platform, hosts.values())


def internal_networks_of(platform: Platform, hosts: Iterable[Host]) -> tuple[IPNetwork, ...]:
    """The internal addresses of ``hosts``, for firewall rules."""
    legs = [platform.internal_leg(host) for host in hosts]
    return tuple(ip_network(a) for leg in legs for a in (leg.ipv4, leg.ipv6))


# -- existing machines -------------------------------------------------------------------------


def _operators(ports: Sequence[PortRule]) -> Fragment:
    if not ports:
        return Fragment(role=ROLE, files=dict((agent(),)))
    rules, unit = (
        templated("base/etc/mail-platform/nftables.conf.j2", rules=_filter_rules(ports)),
        templated("base/etc/systemd/system/mail-nftables.service.j2"),
    )
    return Fragment(
        role=ROLE,
        files=dict((agent(), rules, unit)),
        packages=("nftables",),
        checks=(Check("nftables", ("nft", "-c", "-f", rules[0]), (rules[0],)),),
        services=(
            Service(
                "mail-nftables.service", reload_on=(rules[0],), restart_on=(unit[0],), order=10
            ),
        ),
        health=(UnitHealth("mail-nftables.service"),),
        guarded=(rules[0], unit[0]),
    )


# -- parts -------------------------------------------------------------------------------------


def agent() -> tuple[str, File]:
    """The agent that applies bundles, as it stands in the checkout."""
    source = Path(__file__).resolve().parents[2] / AGENT_SOURCE
    return AGENT, File(content=source.read_text("utf-8"), mode=0o755, template=AGENT_SOURCE)


@dataclass(frozen=True)
class FilterRule:
    """One port as nftables sees it: the sources of each family; open to all if ``anyone``."""

    protocol: str
    port: int
    anyone: bool
    ipv4: tuple[str, ...]
    ipv6: tuple[str, ...]
    why: str


def _filter_rules(ports: Sequence[PortRule]) -> tuple[FilterRule, ...]:
    return tuple(
        FilterRule(
            protocol=rule.protocol,
            port=rule.port,
            anyone=rule.sources is None,
            ipv4=tuple(_elements(rule.sources or (), version=4)),
            ipv6=tuple(_elements(rule.sources or (), version=6)),
            why=rule.why,
        )
        for rule in sorted(ports, key=lambda rule: (rule.port, rule.protocol))
    )


def _elements(sources: Sequence[IPNetwork], version: int) -> Iterator[str]:
    """Elements of an nftables set, which must not overlap; host addresses without a length."""
    of_family = [source for source in sources if source.version == version]
    merged: Iterator[IPNetwork]
    if version == 4:
        merged = collapse_addresses([s for s in of_family if not isinstance(s, IPv6Network)])
    else:
        merged = collapse_addresses([s for s in of_family if isinstance(s, IPv6Network)])
    for network in merged:
        single = network.prefixlen == network.max_prefixlen
        yield str(network.network_address if single else network)


def _one_newline(text: str) -> str:
    return text.strip() + "\n"
