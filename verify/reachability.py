"""Which ports of which host answer to whom."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_network

from mailsite.model import Host, IPAddress, IPNetwork, NetworkKind, Platform, Role
from verify.client import Client
from verify.context import Context, each, expect
from verify.lab import LabMachine
from verify.ports import Port, Protocol, Scan, scan, source_of
from verify.registry import Failed

ANYONE = None
PAIRSYNC = 63301
SHOWN = 12

Networks = tuple[IPNetwork, ...] | None


@dataclass(frozen=True)
class Tables:
    """Who may reach which TCP port of a host, as the site data says; all other ports nobody."""

    platform: Platform

    def of(self, host: Host) -> Mapping[int, Networks]:
        """Port -> networks that it must answer to."""
        found: dict[int, Networks] = {22: self.operators if host.is_managed else ANYONE}
        for role in host.roles:
            found |= self._tier(role)
        return found

    def _tier(self, role: Role) -> Mapping[int, Networks]:
        spam, hosts = self.platform.spam, self._hosts
        match role:
            case Role.SMTP_OUT:
                return {587: self.inside, 10587: hosts(Role.FRONTEND)}
            case Role.SMTP_IN:
                return {25: ANYONE, 465: ANYONE}
            case Role.RSPAMD:
                members = hosts(Role.RSPAMD)
                return {
                    spam.milter_port: hosts(Role.SMTP_IN, Role.SMTP_OUT),
                    spam.controller_port: hosts(Role.MAILDROP),
                    spam.redis_port: members,
                    spam.sentinel_port: members,
                }
            case Role.MAILDROP:
                mx, frontends = hosts(Role.SMTP_IN), hosts(Role.FRONTEND)
                return {
                    25: mx,
                    465: mx,
                    993: self.inside,
                    4190: (*self.editors, *hosts(Role.WEBMAIL)),
                    10993: frontends,
                    14190: frontends,
                    PAIRSYNC: hosts(Role.MAILDROP),
                }
            case Role.WEBMAIL:
                return {443: hosts(Role.FRONTEND)}
            case Role.CERTIFICATES if self.platform.certificates is not None:
                roles = [Role.CERTIFICATES, Role.SMTP_OUT, Role.SMTP_IN, Role.MAILDROP]
                if self.platform.serving(Role.WEBMAIL):
                    roles += [Role.WEBMAIL, Role.FRONTEND]
                return {self.platform.certificates.port: hosts(*roles)}
            case Role.FRONTEND:
                mailboxes = {993: ANYONE, 4190: self.editors} if self.editors else {}
                web = {443: ANYONE} if self.platform.serving(Role.WEBMAIL) else {}
                # 80: the operator's own websites, and the way to webmail.
                return {80: ANYONE, 587: ANYONE, **mailboxes, **web}
            case _:
                return {}

    @property
    def operators(self) -> tuple[IPNetwork, ...]:
        return self.platform.management.networks

    @property
    def editors(self) -> tuple[IPNetwork, ...]:
        maildrop = self.platform.maildrop
        return maildrop.managesieve if maildrop is not None else ()

    @property
    def inside(self) -> tuple[IPNetwork, ...]:
        local = self.platform.site_local
        networks = (local.ipv4, local.ipv6) if local is not None else ()
        return (*self.operators, *networks, *self._hosts(*Role))

    def _hosts(self, *roles: Role) -> tuple[IPNetwork, ...]:
        hosts = {h.name: h for role in roles for h in self.platform.serving(role)}
        legs = [self.platform.internal_leg(h) for h in hosts.values()]
        return tuple(ip_network(a) for leg in legs for a in (leg.ipv4, leg.ipv6))


@dataclass(frozen=True)
class Place:
    """Somewhere to probe from. ``thorough``: every port, not only those that daemons have."""

    name: str
    client: Client
    host: Host | None = None
    thorough: bool = False


def probe_every_host(ctx: Context) -> str:
    """Probe every host from everywhere, and compare with :class:`Tables`. Says what was probed."""
    machines = list(ctx.lab.machines)
    tables = Tables(ctx.platform)
    daemons = sorted(_listening(machines).union(*(tables.of(m.host) for m in machines)))
    chance = random.Random(ctx.stack).sample(range(1025, 65536), 200)
    every = sorted({*range(1, 1025), *daemons, *chance})
    places = list(_places(ctx, machines))
    clients = [place.client for place in places]
    seats = [a for c in clients for a in (c.ipv4, c.ipv6) if a is not None]
    with ctx.lab.untracked(seats):
        counts = each(
            places,
            lambda place: _probed(ctx, place, machines, every if place.thorough else daemons),
            workers=4,
        )
    probed, answered = (sum(column) for column in zip(*counts, strict=True))
    return (
        f"{probed} probes of {len(machines)} hosts from {len(places)} places, TCP and UDP, IPv4 "
        f"and IPv6: {len(every)} ports from the internet, the office and inside, and from a host "
        f"of each tier the {len(daemons)} that any daemon has; {answered} must answer and do, no "
        "other does"
    )


def _listening(machines: list[LabMachine]) -> set[int]:
    """The ports that anything listens on anywhere, on loopback too."""

    def look(machine: LabMachine) -> set[int]:
        rows = machine.run("ss", "-Hltun").splitlines()
        return {int(row.split()[4].rpartition(":")[2]) for row in rows}

    return set().union(*each(machines, look))


def _places(ctx: Context, machines: list[LabMachine]) -> Iterator[Place]:
    yield Place("the internet", ctx.internet.client(), thorough=True)
    for observer in (ctx.office, ctx.local):
        if observer is not None:
            yield Place(observer.place, observer.client(), thorough=True)
    seen: set[Role] = set()
    for machine in reversed(machines):
        if machine.host.main_role not in seen:
            seen.add(machine.host.main_role)
            yield Place(machine.name, machine.observer.client(), machine.host)


def _probed(
    ctx: Context, place: Place, machines: list[LabMachine], numbers: list[int]
) -> tuple[int, int]:
    """Probe every host from one place. Returns how many probes, and how many had to answer."""
    tables = Tables(ctx.platform)
    hosts = {
        address: machine.host
        for machine in machines
        if machine.host != place.host
        for address in machine.host.addresses
    }
    outside = place.client.place == ctx.internet.place
    targets: dict[IPAddress, list[int]] = {}
    wanted = set()
    for address, host in hosts.items():
        source = source_of(place.client, address)
        if source is None or (_is_public(ctx, host, address) and _is_hidden(ctx, source)):
            continue  # no way, or by a gateway, behind which everybody is one of the internet
        routed = not outside or _is_public(ctx, host, address)
        # That nobody routes site-local addresses is seen with the ports that somebody has.
        targets[address] = numbers if routed else list(tables.of(host))
        wanted |= {
            Port(Protocol.TCP, address, number)
            for number, networks in tables.of(host).items()
            if routed and (networks is ANYONE or any(source in net for net in networks))
        }
    found = scan(place.client, targets)
    missing = wanted - found.open
    if missing:  # a probe may be lost on its way, and nobody sends it again
        again = {port.address: [p.number for p in missing] for port in missing}
        found.open |= scan(place.client, again).open & missing
    _expect_wanted(place, hosts, wanted, found)
    return len(Protocol) * sum(map(len, targets.values())), len(wanted)


def _is_hidden(ctx: Context, source: IPAddress) -> bool:
    """Whether a gateway puts its own address in the place of ``source`` on the way outside."""
    local = ctx.platform.site_local
    return local is not None and (source in local.ipv4 or source in local.ipv6)


def _is_public(ctx: Context, host: Host, address: IPAddress) -> bool:
    return any(
        address in (leg.ipv4, leg.ipv6)
        for leg in host.interfaces
        if ctx.platform.network_of(leg).kind is NetworkKind.PUBLIC
    )


def _expect_wanted(
    place: Place, hosts: Mapping[IPAddress, Host], wanted: set[Port], found: Scan
) -> None:
    lines = [
        f"{hosts[port.address].name}: {port} answers to {place.name}"
        for port in found.open - wanted
        if port.address in hosts
    ]
    lines += [
        f"{hosts[port.address].name}: {port} does not answer to {place.name}"
        for port in wanted - found.open
    ]
    # Where the firewall drops by default nobody even hears that nobody listens.
    lines += [
        f"{hosts[port.address].name}: {port} is refused to {place.name}, not dropped"
        for port in found.refused - wanted
        if port.address in hosts and hosts[port.address].is_managed
    ]
    lines.sort()
    more = f"\nand {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    if lines:
        raise Failed("\n".join(lines[:SHOWN]) + more)
    expect(wanted or place.host is not None, f"{place.name}: no port must answer there")
