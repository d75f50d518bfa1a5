"""Rules that span several objects of a platform.

The model says what one object may look like; here is what must be true of them together. Rules
about mail that comes in are in :mod:`mailsite.inbound_rules`, those about mailboxes in
:mod:`mailsite.mailbox_rules`, those about webmail in :mod:`mailsite.webmail_rules`, those about
the machines' own mail in :mod:`mailsite.client_rules`, those about certificates in
:mod:`mailsite.certificate_rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Network, ip_network
from itertools import combinations

from mailsite import certificate_rules, client_rules, inbound_rules, mailbox_rules, webmail_rules
from mailsite.model import (
    Host,
    Interface,
    IPAddress,
    IPNetwork,
    NetworkKind,
    Platform,
    Role,
    Subnet4,
    Subnet6,
)
from mailsite.rulebook import Finding, Location, RuleBook, closest

#: Roles whose daemons each want the whole file: a host can have one of them.
CLAIMS: Mapping[str, tuple[Role, ...]] = {
    "/etc/postfix/main.cf": (Role.SMTP_OUT, Role.SMTP_IN, Role.MAILDROP),
    "/etc/dovecot/dovecot.conf": (Role.SMTP_OUT, Role.MAILDROP),
}

#: Roles that carry mail: their hosts talk to each other.
MAIL_ROLES = frozenset(
    {
        *(Role.SMTP_OUT, Role.SMTP_IN, Role.RSPAMD, Role.MAILDROP, Role.WEBMAIL, Role.FRONTEND),
        Role.CERTIFICATES,
    }
)

#: Roles that a host can be relieved of by leading nobody to it.
DRAINABLE_ROLES = frozenset({Role.SMTP_OUT, Role.SMTP_IN, Role.FRONTEND})

#: Roles that keep state on the data volume, which only a virtual machine has.
STATEFUL_ROLES = MAIL_ROLES - {Role.FRONTEND, Role.CERTIFICATES}

#: Longest name of a network interface in Linux (IFNAMSIZ less the terminating zero).
INTERFACE_NAME_LENGTH = 15

#: Longest host name in Linux (__NEW_UTS_LEN).
HOST_NAME_LENGTH = 64

#: DNS lookups that one SPF check may cause (RFC 7208, section 4.6.4).
SPF_LOOKUPS = 10

#: What the platform's own part of every SPF record costs: the include and its two halves.
SPF_OWN_LOOKUPS = 3


BOOK = RuleBook()
rule = BOOK.rule


def check(platform: Platform, incomplete: frozenset[str] = frozenset()) -> list[Finding]:
    """Return everything that is wrong with ``platform`` as a whole.

    ``incomplete`` names parts (fields of :class:`Platform`) from which invalid objects were left
    out; rules that need them whole are not checked.
    """
    books = (
        *(BOOK, inbound_rules.BOOK, mailbox_rules.BOOK),
        *(webmail_rules.BOOK, client_rules.BOOK, certificate_rules.BOOK),
    )
    return [
        finding
        for whole, function in (rule for book in books for rule in book.rules)
        if not whole & incomplete
        for finding in function(platform)
    ]


def _inside(name: str, domain: str) -> bool:
    return name == domain or name.endswith(f".{domain}")


def _covered(address: IPAddress, prefixes: Iterable[IPNetwork]) -> bool:
    return any(address.version == p.version and address in p for p in prefixes)


def _legs(platform: Platform) -> Iterator[tuple[Host, int, Interface]]:
    for host in platform.hosts.values():
        for index, interface in enumerate(host.interfaces):
            yield host, index, interface


def _at(host: Host, index: int, *rest: str) -> Location:
    return ("hosts", host.name, "interfaces", index, *rest)


def _subnets(platform: Platform) -> Iterator[tuple[str, str, Subnet4 | Subnet6]]:
    for name, network in platform.networks.items():
        yield name, "ipv4", network.ipv4
        yield name, "ipv6", network.ipv6


# -- References ------------------------------------------------------------------------------


@rule("sites")
def sites_exist(platform: Platform) -> Iterator[Finding]:
    """Whatever stands at a site stands at one that is listed."""
    for part in ("networks", "egress", "hypervisors", "hosts"):
        for name, thing in getattr(platform, part).items():
            if thing.site not in platform.sites:
                yield Finding(
                    (part, name, "site"),
                    thing.site,
                    f"unknown site '{thing.site}'",
                    closest(thing.site, platform.sites),
                )


@rule("networks")
def networks_exist(platform: Platform) -> Iterator[Finding]:
    for host, index, interface in _legs(platform):
        if interface.network not in platform.networks:
            yield Finding(
                _at(host, index, "network"),
                interface.network,
                f"unknown network '{interface.network}'",
                closest(interface.network, platform.networks),
            )


@rule("hypervisors")
def hypervisors_exist(platform: Platform) -> Iterator[Finding]:
    for host in platform.hosts.values():
        if host.vm is not None and host.vm.hypervisor not in platform.hypervisors:
            yield Finding(
                ("hosts", host.name, "vm", "hypervisor"),
                host.vm.hypervisor,
                f"unknown hypervisor '{host.vm.hypervisor}'",
                closest(host.vm.hypervisor, platform.hypervisors),
            )


@rule()
def hypervisor_stands_at_the_site_of_its_machines(platform: Platform) -> Iterator[Finding]:
    for host in platform.hosts.values():
        hypervisor = platform.hypervisors.get(host.vm.hypervisor) if host.vm else None
        if host.vm is None or hypervisor is None or hypervisor.site == host.site:
            continue
        there = [n for n, h in platform.hypervisors.items() if h.site == host.site]
        yield Finding(
            ("hosts", host.name, "vm", "hypervisor"),
            host.vm.hypervisor,
            f"hypervisor '{host.vm.hypervisor}' stands at site '{hypervisor.site}', "
            f"the host at '{host.site}'",
            f"write one of {', '.join(there)}" if there else "change the host's site",
        )


@rule()
def networks_are_at_the_site_of_their_hosts(platform: Platform) -> Iterator[Finding]:
    for host, index, interface in _legs(platform):
        network = platform.networks.get(interface.network)
        if network is None or network.site == host.site:
            continue
        there = [n for n, x in platform.networks.items() if x.site == host.site]
        yield Finding(
            _at(host, index, "network"),
            interface.network,
            f"network '{interface.network}' is at site '{network.site}', the host at '{host.site}'",
            f"write one of {', '.join(there)}" if there else "change the host's site",
        )


@rule()
def libvirt_uris_differ(platform: Platform) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for name, hypervisor in platform.hypervisors.items():
        other = first.setdefault(hypervisor.uri, name)
        if other != name:
            yield Finding(
                ("hypervisors", name, "uri"),
                hypervisor.uri,
                f"'{hypervisor.uri}' is hypervisor '{other}' already",
                "write each hypervisor once",
                ("hypervisors", other, "uri"),
            )


# -- Networks and addresses -------------------------------------------------------------------


@rule()
def prefixes_can_hold_hosts(platform: Platform) -> Iterator[Finding]:
    for name, family, subnet in _subnets(platform):
        prefix = subnet.prefix
        where = ("networks", name, family, "prefix")
        if prefix.is_multicast or prefix.is_link_local or prefix.is_loopback:
            yield Finding(
                where, str(prefix), f"'{prefix}' is no prefix for hosts", "write a unicast one"
            )
        elif prefix.num_addresses < 4:
            longest = 30 if prefix.version == 4 else 126
            yield Finding(
                where,
                str(prefix),
                f"'{prefix}' has no room for a gateway and a host",
                f"write a prefix of /{longest} or shorter",
            )


@rule()
def gateways_are_inside_their_prefix(platform: Platform) -> Iterator[Finding]:
    for name, family, subnet in _subnets(platform):
        prefix, gateway = subnet.prefix, subnet.gateway
        if prefix.num_addresses < 4:
            continue
        where = ("networks", name, family, "gateway")
        remedy = f"write an address of it, such as '{prefix[1]}'"
        if gateway not in prefix:
            yield Finding(where, str(gateway), f"gateway '{gateway}' is outside {prefix}", remedy)
        elif _reserved(gateway, prefix):
            yield Finding(
                where, str(gateway), f"'{gateway}' is {_reserved(gateway, prefix)}", remedy
            )


def _reserved(address: IPAddress, prefix: IPNetwork) -> str:
    """What ``address`` is in ``prefix`` that no machine may be; empty if it is free."""
    if address == prefix.network_address:
        # RFC 4291, section 2.6.1, for IPv6.
        kind = "network address" if prefix.version == 4 else "subnet-router anycast address"
        return f"the {kind} of {prefix}"
    if isinstance(prefix, IPv4Network) and address == prefix.broadcast_address:
        return f"the broadcast address of {prefix}"
    return ""


@rule()
def addresses_are_inside_their_network(platform: Platform) -> Iterator[Finding]:
    for host, index, interface in _legs(platform):
        network = platform.networks.get(interface.network)
        if network is None:
            continue
        pairs: tuple[tuple[str, IPAddress, Subnet4 | Subnet6], ...] = (
            ("ipv4", interface.ipv4, network.ipv4),
            ("ipv6", interface.ipv6, network.ipv6),
        )
        for family, address, subnet in pairs:
            where = _at(host, index, family)
            remedy = f"write a free address of {subnet.prefix}"
            if address not in subnet.prefix:
                yield Finding(
                    where,
                    str(address),
                    f"'{address}' is outside network '{interface.network}', {subnet.prefix}",
                    remedy,
                )
            elif _reserved(address, subnet.prefix):
                yield Finding(
                    where,
                    str(address),
                    f"'{address}' is {_reserved(address, subnet.prefix)}",
                    remedy,
                )


@rule()
def addresses_are_used_once(platform: Platform) -> Iterator[Finding]:
    """No address belongs to two of: gateways of networks, egress gateways, hosts."""
    users: list[tuple[IPAddress, Location, str]] = []
    for name, family, subnet in _subnets(platform):
        users.append(
            (subnet.gateway, ("networks", name, family, "gateway"), f"the gateway of '{name}'")
        )
    for name, egress in platform.egress.items():
        users.append((egress.ipv4, ("egress", name, "ipv4"), f"egress gateway '{name}'"))
        users.append((egress.ipv6, ("egress", name, "ipv6"), f"egress gateway '{name}'"))
    for host, index, interface in _legs(platform):
        users.append((interface.ipv4, _at(host, index, "ipv4"), f"host '{host.name}'"))
        users.append((interface.ipv6, _at(host, index, "ipv6"), f"host '{host.name}'"))
    first: dict[IPAddress, tuple[Location, str]] = {}
    for address, location, user in users:
        if address not in first:
            first[address] = (location, user)
            continue
        other, owner = first[address]
        yield Finding(
            location,
            str(address),
            f"'{address}' belongs to {owner} already",
            f"write a free address for {user}",
            other,
        )


@rule()
def networks_do_not_overlap(platform: Platform) -> Iterator[Finding]:
    for (name, _, subnet), (other, family, second) in combinations(_subnets(platform), 2):
        a, b = subnet.prefix, second.prefix
        if name != other and a.version == b.version and a.overlaps(b):
            yield Finding(
                ("networks", other, family, "prefix"),
                str(b),
                f"'{b}' overlaps {a} of network '{name}'",
                "write a prefix of its own for each network",
                ("networks", name, family, "prefix"),
            )


@rule()
def bridges_have_a_name_that_fits(platform: Platform) -> Iterator[Finding]:
    for name, network in platform.networks.items():
        if len(network.bridge) > INTERFACE_NAME_LENGTH:
            yield Finding(
                ("networks", name, "bridge"),
                network.bridge,
                f"bridge '{network.bridge}' has {len(network.bridge)} characters",
                f"write at most {INTERFACE_NAME_LENGTH}, the most that Linux takes",
            )


@rule()
def bridges_differ_within_a_site(platform: Platform) -> Iterator[Finding]:
    first: dict[tuple[str, str], str] = {}
    for name, network in platform.networks.items():
        other = first.setdefault((network.site, network.bridge), name)
        if other != name:
            yield Finding(
                ("networks", name, "bridge"),
                network.bridge,
                f"bridge '{network.bridge}' of site '{network.site}' carries "
                f"network '{other}' already",
                "write another bridge",
                ("networks", other, "bridge"),
            )


@rule()
def a_host_has_one_leg_in_a_network(platform: Platform) -> Iterator[Finding]:
    for host in platform.hosts.values():
        first: dict[str, int] = {}
        for index, interface in enumerate(host.interfaces):
            other = first.setdefault(interface.network, index)
            if other != index:
                yield Finding(
                    _at(host, index, "network"),
                    interface.network,
                    f"host '{host.name}' has two interfaces in network '{interface.network}'",
                    "keep one of them",
                    _at(host, other, "network"),
                )


# -- Site-local networks ----------------------------------------------------------------------


@rule("networks", "site_local")
def site_local_space_is_declared(platform: Platform) -> Iterator[Finding]:
    """Site-local networks lie in the space that ``site_local`` gives, public ones outside."""
    space = platform.site_local
    for name, network in platform.networks.items():
        local = network.kind is NetworkKind.SITE_LOCAL
        if space is None:
            if local:
                yield Finding(
                    ("networks", name, "kind"),
                    network.kind.value,
                    f"network '{name}' is site-local, and site.yaml has no 'site_local'",
                    "write the prefixes of all site-local networks there",
                )
            continue
        for family, prefix, whole in (
            ("ipv4", network.ipv4.prefix, space.ipv4),
            ("ipv6", network.ipv6.prefix, space.ipv6),
        ):
            where = ("networks", name, family, "prefix")
            if local and not _within(prefix, whole):
                yield Finding(
                    where,
                    str(prefix),
                    f"'{prefix}' is outside the site-local space {whole}",
                    "write a prefix inside it, or widen 'site_local' in site.yaml",
                    ("site_local", family),
                )
            elif not local and prefix.overlaps(whole):
                yield Finding(
                    where,
                    str(prefix),
                    f"'{prefix}' is public, and the site-local space is {whole}",
                    "write 'kind: site-local', or a public prefix",
                    ("site_local", family),
                )


def _within(prefix: IPNetwork, whole: IPNetwork) -> bool:
    return prefix.version == whole.version and (
        prefix.network_address in whole and prefix.prefixlen >= whole.prefixlen
    )


@rule("networks", "egress")
def site_local_hosts_have_a_way_out(platform: Platform) -> Iterator[Finding]:
    if platform.egress:
        return
    for host in platform.hosts.values():
        kinds = {
            platform.networks[i.network].kind
            for i in host.interfaces
            if i.network in platform.networks
        }
        if kinds == {NetworkKind.SITE_LOCAL}:
            yield Finding(
                ("hosts", host.name),
                host.name,
                f"host '{host.name}' is site-local alone, and there is no egress gateway",
                "add one under 'egress', or give the host a public interface",
            )


@rule("site_local")
def egress_addresses_are_public(platform: Platform) -> Iterator[Finding]:
    if platform.site_local is None:
        return
    space = (platform.site_local.ipv4, platform.site_local.ipv6)
    for name, egress in platform.egress.items():
        for family, address in (("ipv4", egress.ipv4), ("ipv6", egress.ipv6)):
            if _covered(address, space):
                yield Finding(
                    ("egress", name, family),
                    str(address),
                    f"'{address}' is a site-local address",
                    "write the public address that the gateway translates to",
                )


@rule("networks")
def mail_hosts_reach_each_other(platform: Platform) -> Iterator[Finding]:
    """Where one mail host is site-local alone, every other one needs a leg there."""
    local: dict[str, bool] = {}
    alone = None
    for host in platform.hosts.values():
        kinds = [
            platform.networks[i.network].kind
            for i in host.interfaces
            if i.network in platform.networks
        ]
        if not MAIL_ROLES & set(host.roles) or len(kinds) < len(host.interfaces):
            continue
        local[host.name] = NetworkKind.SITE_LOCAL in kinds
        if alone is None and set(kinds) == {NetworkKind.SITE_LOCAL}:
            alone = host.name
    if alone is None:
        return
    for name, reaches in local.items():
        if not reaches:
            yield Finding(
                ("hosts", name, "interfaces"),
                name,
                f"host '{name}' has no site-local interface and cannot reach '{alone}', "
                "which has no other",
                "add an interface in a site-local network of its site",
            )


# -- Hosts and roles --------------------------------------------------------------------------


@rule()
def roles_are_listed_once(platform: Platform) -> Iterator[Finding]:
    for host in platform.hosts.values():
        for index, role in enumerate(host.roles):
            if role in host.roles[:index]:
                yield Finding(
                    ("hosts", host.name, "roles", index),
                    role.value,
                    f"role '{role}' of host '{host.name}' is listed twice",
                    "keep one of them",
                )


@rule()
def roles_do_not_claim_one_path(platform: Platform) -> Iterator[Finding]:
    for host in platform.hosts.values():
        conflicts: dict[tuple[Role, Role], str] = {}
        for path, claimants in CLAIMS.items():
            wanted = [r for r in dict.fromkeys(host.roles) if r in claimants]
            for pair in combinations(wanted, 2):
                conflicts.setdefault(pair, path)
        for (one, two), path in conflicts.items():
            yield Finding(
                ("hosts", host.name, "roles"),
                f"{one}, {two}",
                f"roles '{one}' and '{two}' of host '{host.name}' both own {path}",
                "give each role a host of its own",
            )


@rule()
def state_needs_a_data_volume(platform: Platform) -> Iterator[Finding]:
    for host in platform.hosts.values():
        stateful = [r for r in host.roles if r in STATEFUL_ROLES]
        if stateful and host.vm is None:
            yield Finding(
                ("hosts", host.name),
                host.name,
                f"host '{host.name}' has no 'vm', and role '{stateful[0]}' keeps its state on "
                "the data volume of one",
                "add 'vm:' with hypervisor, cpus, memory_mib, root_gib and data_gib",
            )


@rule()
def host_keys_are_pinned(platform: Platform) -> Iterator[Finding]:
    """ssh never trusts a host at first sight: a VM's key is ours, any other must be given."""
    for host in platform.hosts.values():
        if host.vm is not None and host.ssh_host_key is not None:
            yield Finding(
                ("hosts", host.name, "ssh_host_key"),
                host.ssh_host_key,
                f"host '{host.name}' is a virtual machine: its ssh host key is generated",
                "remove the line",
            )
        if host.vm is None and host.ssh_host_key is None and MAIL_ROLES & set(host.roles):
            yield Finding(
                ("hosts", host.name),
                host.name,
                f"'ssh_host_key' is missing: '{host.name}' is an existing machine",
                "write 'ssh_host_key: ssh-ed25519 AAAA...', "
                f"from 'ssh-keyscan -t ed25519 {host.name}'",
            )


@rule("hosts")
def tiers_have_members(platform: Platform) -> Iterator[Finding]:
    for role in (Role.SMTP_OUT, Role.FRONTEND):
        if not any(role in host.roles for host in platform.hosts.values()):
            yield Finding(
                ("hosts",),
                "",
                f"no host has the role '{role}'",
                f"give at least one host 'roles: [{role}]'",
            )


@rule("hosts")
def somebody_stays(platform: Platform) -> Iterator[Finding]:
    """Clients that are led away from a host are led to another one."""
    for role in sorted(DRAINABLE_ROLES):
        leaving = [h for h in platform.hosts.values() if role in h.roles and h.is_leaving]
        if leaving and not platform.members(role):
            last = leaving[-1]
            yield Finding(
                ("hosts", last.name, "retired" if last.retired else "draining"),
                "true",
                f"'{last.name}' is leaving, and no other host has the role '{role}'",
                f"keep it until another host has 'roles: [{role}]' and serves",
            )


@rule()
def hosts_leave_as_they_can(platform: Platform) -> Iterator[Finding]:
    """A queue has to be empty before its machine goes; an existing machine is given back."""
    for host in platform.hosts.values():
        if host.retired and host.vm is not None:
            yield Finding(
                ("hosts", host.name, "retired"),
                "true",
                f"'{host.name}' is a virtual machine: there is nobody to give it back to, and "
                "mail in its queue would be lost",
                "write 'draining: true', and remove the host when its queue is empty",
            )
        elif host.retired and host.draining:
            yield Finding(
                ("hosts", host.name, "draining"),
                "true",
                f"'{host.name}' is retired, and has nothing to drain any more",
                "keep 'retired'",
            )
        stays = [role for role in host.roles if role not in DRAINABLE_ROLES]
        if host.draining and stays:
            yield Finding(
                ("hosts", host.name, "draining"),
                "true",
                f"'{host.name}' has the role '{stays[0]}', and only "
                f"{', '.join(sorted(DRAINABLE_ROLES))} can be drained",
                "remove 'draining'",
            )


# -- Names ------------------------------------------------------------------------------------


@rule("domain", "internal_domain")
def internal_domain_is_inside_the_domain(platform: Platform) -> Iterator[Finding]:
    if not _inside(platform.internal_domain, platform.domain):
        yield Finding(
            ("internal_domain",),
            platform.internal_domain,
            f"'{platform.internal_domain}' is outside '{platform.domain}'",
            f"write a name that ends with '.{platform.domain}'",
        )


@rule("internal_domain")
def hosts_are_inside_the_internal_domain(platform: Platform) -> Iterator[Finding]:
    for host in platform.hosts.values():
        if not host.name.endswith(f".{platform.internal_domain}"):
            label = host.name.partition(".")[0]
            yield Finding(
                ("hosts", host.name),
                host.name,
                f"host '{host.name}' is outside the internal domain '{platform.internal_domain}'",
                f"write a name that ends with it, such as '{label}.{platform.internal_domain}'",
            )


@rule()
def host_names_have_no_underscore(platform: Platform) -> Iterator[Finding]:
    """Names of machines are letters, digits and dashes (RFC 1123, section 2.1)."""
    for name in platform.hosts:
        if "_" in name:
            yield Finding(
                ("hosts", name),
                name,
                f"host name '{name}' has an underscore",
                f"write '{name.replace('_', '-')}'",
            )


@rule()
def host_names_are_told_apart(platform: Platform) -> Iterator[Finding]:
    """The kernel's host name is the short one: of at most 64 characters (hostname(7)), unique."""
    first: dict[str, str] = {}
    for host in platform.hosts.values():
        where: Location = ("hosts", host.name)
        if len(host.short) > HOST_NAME_LENGTH:
            yield Finding(
                where,
                host.name,
                f"the short name '{host.short}' has {len(host.short)} characters",
                f"write a name whose first two labels have at most {HOST_NAME_LENGTH - 1} together",
            )
        other = first.setdefault(host.short, host.name)
        if other != host.name:
            yield Finding(
                where,
                host.name,
                f"'{host.name}' and '{other}' have the same short name '{host.short}'",
                "write names that differ in their first two labels",
                ("hosts", other),
            )


@rule("names", "domain")
def service_names_are_inside_the_domain(platform: Platform) -> Iterator[Finding]:
    for key, name in platform.names:
        if not name.endswith(f".{platform.domain}"):
            yield Finding(
                ("names", key),
                name,
                f"service name '{name}' is outside '{platform.domain}'",
                f"write a name that ends with '.{platform.domain}'",
            )


@rule("names")
def service_names_are_used_once(platform: Platform) -> Iterator[Finding]:
    """No service shares its name with another, a host or a mail domain: CNAME stands alone."""
    first: dict[str, tuple[Location, str]] = {}
    for key, name in platform.names:
        owner = first.get(name)
        if owner is None and name in platform.hosts:
            owner = (("hosts", name), "a host")
        if owner is None and name in platform.domains:
            owner = (("domains", name), "a mail domain")
        if owner is None:
            first[name] = (("names", key), f"'{key}'")
            continue
        yield Finding(
            ("names", key),
            name,
            f"'{name}' is the name of {owner[1]} already",
            "write another name",
            owner[0],
        )


@rule("names")
def service_names_have_no_underscore(platform: Platform) -> Iterator[Finding]:
    """Certificates are issued for names of hosts; the SPF record alone needs none."""
    for key, name in platform.names:
        if key != "spf" and "_" in name:
            yield Finding(
                ("names", key),
                name,
                f"service name '{name}' has an underscore, and no certificate is issued for it",
                f"write '{name.replace('_', '-')}'",
            )


# -- Outbound and management ------------------------------------------------------------------


@rule("hosts", "outbound")
def primary_is_a_member(platform: Platform) -> Iterator[Finding]:
    members = [h.name for h in platform.members(Role.SMTP_OUT)]
    primary = platform.outbound.primary
    if members and primary not in members:
        leaving = primary in platform.hosts and platform.hosts[primary].is_leaving
        role = f"host with the role '{Role.SMTP_OUT}'" + (" that stays" if leaving else "")
        yield Finding(
            ("outbound", "primary"),
            primary,
            f"'{primary}' is no {role}",
            closest(primary, members),
        )


@rule("probe", "domains", "sasl_users")
def probe_can_send(platform: Platform) -> Iterator[Finding]:
    probe = platform.probe
    if probe is None:
        return
    able = [user.name for user in platform.sasl_users.values() if not user.suspended]
    if probe.user not in able:
        yield Finding(
            ("probe", "user"),
            probe.user,
            f"'{probe.user}' is no login of sasl_users.yaml that may send",
            closest(probe.user, able),
        )
    domain = probe.sender.rpartition("@")[2]
    senders = [d.name for d in platform.domains.values() if d.sends]
    if domain not in senders:
        yield Finding(
            ("probe", "sender"),
            probe.sender,
            f"'{domain}' is no mail domain that sends",
            closest(domain, senders),
        )


@rule("outbound")
def header_limit_is_below_the_message_limit(platform: Platform) -> Iterator[Finding]:
    outbound = platform.outbound
    if outbound.header_size_limit > outbound.message_size_limit:
        yield Finding(
            ("outbound", "header_size_limit"),
            str(outbound.header_size_limit),
            f"header_size_limit {outbound.header_size_limit} is above message_size_limit "
            f"{outbound.message_size_limit}",
            "write a smaller number of bytes",
        )


@rule("management")
def management_networks_are_few_and_of_both_families(platform: Platform) -> Iterator[Finding]:
    networks = platform.management.networks
    for index, network in enumerate(networks):
        if network.prefixlen == 0:
            yield Finding(
                ("management", "networks", index),
                str(network),
                f"'{network}' would open ssh to everybody",
                "write the prefixes of the operators' own networks",
            )
    for version in (4, 6):
        if not any(n.version == version for n in networks):
            yield Finding(
                ("management", "networks"),
                "",
                f"no management network is IPv{version}",
                f"add the operators' IPv{version} prefix",
            )


# -- Mail domains and DNS ---------------------------------------------------------------------


@rule("domain", "domains")
def own_domain_sends(platform: Platform) -> Iterator[Finding]:
    """Hosts, bounces and reports write from the platform's own domain: it must be signed."""
    own = platform.domains.get(platform.domain)
    if own is None:
        yield Finding(
            ("domain",),
            platform.domain,
            f"'{platform.domain}' is no mail domain, and the platform's own mail comes from it",
            f"add the file domains/{platform.domain}.yaml",
        )
    elif not own.sends:
        yield Finding(
            ("domains", platform.domain, "sends"),
            "false",
            f"'{platform.domain}' never sends, and the platform's own mail comes from it",
            "write 'sends: true' and a DKIM key",
        )


@rule()
def zones_contain_their_domain(platform: Platform) -> Iterator[Finding]:
    for name, domain in platform.domains.items():
        if not _inside(name, domain.dns_zone):
            parent = name.partition(".")[2]
            yield Finding(
                ("domains", name, "zone"),
                domain.dns_zone,
                f"domain '{name}' is not inside zone '{domain.dns_zone}'",
                f"write a zone that contains it, such as '{parent if '.' in parent else name}'",
            )


@rule()
def senders_have_one_signing_key(platform: Platform) -> Iterator[Finding]:
    for name, domain in platform.domains.items():
        where: Location = ("domains", name, "dkim")
        signing = [k.selector for k in domain.dkim if k.signing]
        if not domain.sends:
            if domain.dkim:
                yield Finding(
                    where,
                    "",
                    f"domain '{name}' never sends and has DKIM keys",
                    "remove 'dkim', or write 'sends: true'",
                )
            if domain.spf:
                yield Finding(
                    ("domains", name, "spf"),
                    "",
                    f"domain '{name}' never sends and has SPF terms of its own",
                    "remove 'spf', or write 'sends: true'",
                )
        elif not signing:
            remedy = "write 'signing: true' at one" if domain.dkim else "add '- selector: NAME'"
            yield Finding(where, "", f"domain '{name}' sends and has no signing DKIM key", remedy)
        elif len(signing) > 1:
            yield Finding(
                where,
                ", ".join(signing),
                f"domain '{name}' signs with {len(signing)} DKIM keys: {', '.join(signing)}",
                "write 'signing: false' at all but one",
            )


@rule()
def selectors_are_used_once(platform: Platform) -> Iterator[Finding]:
    for name, domain in platform.domains.items():
        first: dict[str, int] = {}
        for index, key in enumerate(domain.dkim):
            # DNS does not tell upper from lower case.
            other = first.setdefault(key.selector.lower(), index)
            if other != index:
                yield Finding(
                    ("domains", name, "dkim", index, "selector"),
                    key.selector,
                    f"selector '{key.selector}' of domain '{name}' is there already",
                    "write a new selector for each key",
                    ("domains", name, "dkim", other, "selector"),
                )


@rule("spf")
def spf_blocks_are_listed_once(platform: Platform) -> Iterator[Finding]:
    families: tuple[tuple[str, tuple[IPNetwork, ...]], ...] = (
        ("ipv4", platform.spf.ipv4),
        ("ipv6", platform.spf.ipv6),
    )
    for family, blocks in families:
        for index, block in enumerate(blocks):
            if block in blocks[:index]:
                yield Finding(
                    ("spf", family, index),
                    str(block),
                    f"SPF block '{block}' is listed twice",
                    "keep one of them",
                )


@rule("spf", "networks")
def spf_covers_every_sender(platform: Platform) -> Iterator[Finding]:
    """Mail leaves from egress gateways, and from hosts whose default route is a public one."""
    blocks: tuple[IPNetwork, ...] = (*platform.spf.ipv4, *platform.spf.ipv6)
    senders: list[tuple[Location, IPAddress]] = []
    for name, egress in platform.egress.items():
        senders.append((("egress", name, "ipv4"), egress.ipv4))
        senders.append((("egress", name, "ipv6"), egress.ipv6))
    for host in platform.hosts.values():
        leg = host.interfaces[0]
        network = platform.networks.get(leg.network)
        if network is None or network.kind is NetworkKind.SITE_LOCAL:
            continue
        if {Role.SMTP_OUT, Role.SMTP_IN} & set(host.roles):
            senders.append((_at(host, 0, "ipv4"), leg.ipv4))
            senders.append((_at(host, 0, "ipv6"), leg.ipv6))
    for location, address in senders:
        if not _covered(address, blocks):
            yield Finding(
                location,
                str(address),
                f"mail leaves from '{address}', and no SPF block covers it",
                "add a block to 'spf' in site.yaml",
            )


_MACRO = r"%(?:\{[slodiphcrtv][0-9]*r?[.+,/_=-]*\}|[%_-])"
_TOP_LABEL = r"\.(?:[a-z0-9]*[a-z][a-z0-9]*|[a-z0-9]+-[a-z0-9-]*[a-z0-9])\.?"
_SPF_NAME = rf"(?:(?:{_MACRO}|[!-$&-.0-~])+{_TOP_LABEL}|(?:{_MACRO}|[!-$&-.0-~])*{_MACRO})"
_CIDR = r"(?:/\d{1,2})?(?://\d{1,3})?"
_SPF_TERM = re.compile(
    rf"[-+~?]?(?:include:{_SPF_NAME}|exists:{_SPF_NAME}|(?:a|mx)(?::{_SPF_NAME})?{_CIDR})"
    rf"|exp={_SPF_NAME}",
    re.IGNORECASE,
)


def spf_term_fault(term: str) -> tuple[str, str] | None:
    """What is wrong with a term of a domain's own (RFC 7208, section 4.6.1): words and remedy."""
    bare = term.lstrip("-+~?").lower()
    if bare.startswith("v=spf1") or bare == "all":
        return f"SPF term '{term}' is written by the platform", "remove it; see 'spf_all'"
    if bare.startswith("redirect="):
        return (
            f"SPF term '{term}' has no effect: the record ends with 'all'",
            "write an 'include:' instead",
        )
    if bare == "ptr" or bare.startswith("ptr:"):
        return f"SPF term '{term}' is not to be used (RFC 7208, section 5.5)", "list the addresses"
    for family, version in (("ip4:", 4), ("ip6:", 6)):
        if bare.startswith(family):
            try:
                prefix = ip_network(bare.removeprefix(family))
            except ValueError:
                return f"SPF term '{term}' has no valid prefix", f"write one like '{family}...'"
            if prefix.version != version:
                right = f"ip{prefix.version}:{prefix}"
                return f"SPF term '{term}' mixes the families", f"write '{right}'"
            return None
    if not _SPF_TERM.fullmatch(term):
        return f"'{term}' is no SPF term", "write one like 'ip4:192.0.2.0/24' or 'include:NAME'"
    return None


def spf_lookups(terms: Iterable[str]) -> int:
    """DNS lookups that the terms themselves cause (RFC 7208, section 4.6.4)."""
    costly = re.compile(r"(include:|exists:|redirect=|(a|mx|ptr)(?![^:/]))", re.IGNORECASE)
    return sum(1 for t in terms if costly.match(t.lstrip("-+~?")))


@rule("names")
def own_spf_terms_are_valid(platform: Platform) -> Iterator[Finding]:
    for name, domain in platform.domains.items():
        for index, term in enumerate(domain.spf):
            where = ("domains", name, "spf", index)
            fault = spf_term_fault(term)
            if fault is not None:
                yield Finding(where, term, *fault)
            elif term.lstrip("+").lower() == f"include:{platform.names.spf}":
                yield Finding(
                    where,
                    term,
                    f"SPF term '{term}' is in every record of a sending domain already",
                    "remove it",
                )
            elif term in domain.spf[:index]:
                yield Finding(where, term, f"SPF term '{term}' is listed twice", "keep one of them")
        lookups = SPF_OWN_LOOKUPS + spf_lookups(domain.spf)
        if lookups > SPF_LOOKUPS:
            yield Finding(
                ("domains", name, "spf"),
                str(lookups),
                f"the SPF record of '{name}' needs {lookups} DNS lookups "
                f"({SPF_OWN_LOOKUPS} of them the platform's), and {SPF_LOOKUPS} are allowed",
                "replace includes by the addresses that they stand for",
            )
