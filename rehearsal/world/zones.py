"""The DNS of the outside world, from the root down, as data.

Pure: site data in, zones out. Which keys sign them and where they are served is
:mod:`rehearsal.world.knot`'s business. Three sorts of zones come together here: those that the
world's own things need, the operator's zones as the operator's DNS provider holds them before
the platform exists (an old website and mail server, which must survive), and the parents of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address

import dns.name
import dns.zone

from mailsite import records
from mailsite.model import AddressTarget, IPAddress, Platform
from rehearsal.world import plan

TTL = 300
_TOP_LEVEL = ("arpa.", "com.", "example.", "net.", "org.")


@dataclass(frozen=True)
class Record:
    """One resource record; ``owner`` is absolute and in lower case, ``data`` presentation form."""

    owner: str
    type: str
    data: str
    ttl: int = TTL

    def __str__(self) -> str:
        return f"{self.owner} {self.ttl} IN {self.type} {self.data}"


@dataclass(frozen=True)
class Soa:
    """Timers of a zone (RFC 1035, section 3.3.13); ``minimum`` is the negative TTL (RFC 2308)."""

    server: str = "ada.dns.example."
    mailbox: str = "dns.dns.example."
    refresh: int = 3600
    retry: int = 600
    expire: int = 604800
    minimum: int = 60
    ttl: int = TTL

    def record(self, owner: str) -> Record:
        timers = f"{self.refresh} {self.retry} {self.expire} {self.minimum}"
        return Record(owner, "SOA", f"{self.server} {self.mailbox} 1 {timers}", self.ttl)


PROVIDER_SOA = Soa(refresh=10000, retry=2400, minimum=1800, ttl=1800)
"""As Cloudflare's: an answer of "no such name" is remembered for half an hour."""


@dataclass(frozen=True)
class Zone:
    """A zone as it is before anybody changed it.

    :ivar name: absolute, lower case; ``.`` is the root.
    :ivar records: everything but SOA, NS and what belongs to delegations.
    :ivar signed: with DNSSEC; its parent gets the DS record.
    :ivar bogus: the parent's DS record is of a key that does not exist.
    :ivar dynamic: the operator's; it takes DNS updates.
    :ivar children: zones delegated from this one.
    """

    name: str
    records: tuple[Record, ...] = ()
    signed: bool = True
    bogus: bool = False
    dynamic: bool = False
    soa: Soa = Soa()
    children: tuple[str, ...] = ()
    servers: tuple[str, ...] = field(
        default=tuple(f"{name}." for name in plan.NAME_SERVERS), repr=False
    )

    @property
    def text(self) -> str:
        """The zone in master-file format, without the DS records of its children."""
        lines = [self.soa.record(self.name), *self._name_servers()]
        for child in self.children:
            lines += (Record(child, "NS", f"{server}.", 3600) for server in plan.NAME_SERVERS)
        return "".join(f"{line}\n" for line in (*lines, *self.records))

    def _name_servers(self) -> Iterator[Record]:
        for server in self.servers:
            yield Record(self.name, "NS", server, 86400)


def world_zones(
    platform: Platform,
    *,
    operator_zones: Iterable[str] = (),
    tlsa: Mapping[str, str] | None = None,
    dkim: Mapping[str, str] | None = None,
    ptr_text: str | None = None,
) -> dict[str, Zone]:
    """Every zone of the outside world, by absolute name.

    :param operator_zones: zones that the operator's DNS provider holds, beside those that the
        mail domains and the platform's own domain lie in.
    :param tlsa: TLSA data for mail servers whose certificate DANE vouches for, by server name.
    :param dkim: public keys of the remote senders that sign, base64, by sender name.
    :param ptr_text: reverse records in BIND text that the operator published; by default those
        that the platform asks for (:func:`mailsite.records.ptr_text`).
    """
    if ptr_text is None:
        ptr_text = records.ptr_text(platform)
    zones: dict[str, Zone] = {}
    for zone in (
        *_operator_zones(platform, operator_zones),
        *_carrier_zones(platform, operator_zones),
        *_own_zones(tlsa or {}),
        *_sender_zones(dkim or {}),
        *_forward_zones(platform, operator_zones),
        *_reverse_zones(_own_pointers()),
        *_reverse_zones(_parsed(ptr_text)),
    ):
        if zone.name in zones:
            raise ValueError(f"zone {zone.name} of the site is also one of the rehearsal's world")
        zones[zone.name] = zone
    lists = list_zones(platform)
    above = (*_TOP_LEVEL, "in-addr.arpa.", "ip6.arpa.", *map(_top_level, (*zones, *lists)))
    for name in above:
        zones.setdefault(name, Zone(name))
    # The name servers' own addresses, without which nobody finds them (RFC 1034, section 4.2.1).
    zones["example."] = Zone("example.", records=tuple(_server_glue()))
    zones["."] = Zone(
        ".",
        records=tuple(_root_glue()),
        servers=tuple(f"{letter}.root-servers.net." for letter in plan.ROOT_SERVERS),
        soa=Soa(server="a.root-servers.net.", ttl=86400),
    )
    return _with_delegations(_with_lists(zones, lists))


def list_zones(platform: Platform) -> tuple[str, ...]:
    """The zones of the block lists that the site asks, absolute, sorted."""
    return tuple(sorted({_absolute(entry.zone) for entry in platform.inbound.dnsbl}))


def forward_domains(platform: Platform) -> tuple[str, ...]:
    """The domains of others that addresses of the site forward to, sorted."""
    found = {
        target.domain
        for domain in platform.domains.values()
        for targets in domain.addresses.values()
        for target in targets
        if isinstance(target, AddressTarget)
    }
    return tuple(sorted(found - platform.domains.keys()))


def foreign_records(platform: Platform, zone: str) -> tuple[Record, ...]:
    """Records of an operator's zone that were there before the platform, in no order.

    The apex, ``www`` and each mail domain point to the operator's old server, which therefore
    gets the domains' mail as long as no MX record exists (RFC 5321, section 5.1). It holds the
    mailboxes, too, as long as the platform has no hosts for them.
    """
    owners = {zone, f"www.{zone}"}
    owners |= {f"{d.name}." for d in platform.domains.values() if f"{d.dns_zone}." == zone}
    return (
        *(record for owner in sorted(owners) for record in _address(owner, plan.HOME.addresses)),
        Record(zone, "TXT", '"site-verification=5f1d7a0c2e9b"'),
        *_mailboxes(platform, zone),
        *(
            Record(f"{domain}.", "MX", f"10 {plan.ELSEWHERE.host}.")
            for domain in forward_domains(platform)
            if _enclosing(f"{domain}.", operator_zone_names(platform)) == zone
        ),
    )


def _mailboxes(platform: Platform, zone: str) -> Iterator[Record]:
    name = f"{platform.maildrop_domain}."
    own = records.static_records(platform)
    published = any(f"{r.name}." == name and r.type == records.RecordType.MX for r in own)
    if _enclosing(name, operator_zone_names(platform)) == zone and not published:
        yield Record(name, "MX", f"10 {plan.HOME.host}.")


def operator_zone_names(platform: Platform, more: Iterable[str] = ()) -> tuple[str, ...]:
    """Absolute names of the zones that the operator's DNS provider holds, sorted."""
    names = {_absolute(name) for name in (*records.zones(platform), *more)}
    return tuple(sorted(names))


def reverse_zone(address: IPAddress) -> str:
    """The reverse zone of an address: by /24 for IPv4, by /48 for IPv6."""
    labels = address.reverse_pointer.split(".")
    if isinstance(address, IPv4Address):
        return ".".join(labels[1:]) + "."
    return ".".join(labels[32 - 12 :]) + "."


def _operator_zones(platform: Platform, more: Iterable[str]) -> Iterator[Zone]:
    for name in operator_zone_names(platform, more):
        yield Zone(name, records=foreign_records(platform, name), dynamic=True, soa=PROVIDER_SOA)


def _carrier_zones(platform: Platform, more: Iterable[str]) -> Iterator[Zone]:
    """Names of the site's machines that others publish, such as a carrier's gateways."""
    operator = operator_zone_names(platform, more)
    found: dict[str, list[Record]] = {}
    for own in records.own_names(platform):
        name = _absolute(own.name)
        if not any(_is_within(name, zone) for zone in operator):
            zone = ".".join(name.split(".")[-3:])
            found.setdefault(zone, []).extend(
                Record(name, "A" if address.version == 4 else "AAAA", str(address))
                for address in own.addresses
            )
    for zone, of_zone in found.items():
        yield Zone(zone, records=tuple(of_zone))


def _own_zones(tlsa: Mapping[str, str]) -> Iterator[Zone]:
    for mx in plan.MAIL_SERVERS.values():
        yield Zone(f"{mx.domain}.", records=tuple(_mail_domain(mx, tlsa.get(mx.name))))
    somewhere = plan.MAIL_SERVERS["generic"].addresses
    bogus, unsigned = f"{plan.BOGUS_DOMAIN}.", f"{plan.UNSIGNED_DOMAIN}."
    yield Zone(bogus, records=tuple(_address(bogus, somewhere)), bogus=True)
    yield Zone(unsigned, records=tuple(_address(unsigned, somewhere)), signed=False)
    yield Zone(
        "debian.org.",
        records=tuple(r for n in plan.MIRROR_NAMES for r in _address(f"{n}.", plan.MIRROR)),
    )
    authority = plan.ACME_NAME.partition(".")[2]
    yield Zone(f"{authority}.", records=tuple(_address(f"{plan.ACME_NAME}.", plan.ACME)))
    yield Zone("root-servers.net.", records=tuple(_root_glue()))
    yield Zone(
        "dns.example.",
        records=(*_server_glue(), *_address("resolver.dns.example.", plan.RESOLVER)),
    )


def _sender_zones(keys: Mapping[str, str]) -> Iterator[Zone]:
    for sender in plan.SENDERS.values():
        apex, host = f"{sender.domain}.", f"{sender.host}."
        found = [Record(apex, "MX", f"10 {plan.ORIGIN.host}."), *_address(host, sender.addresses)]
        if sender.spf:
            allowed = " ".join(f"ip{a.version}:{a}" for a in sender.addresses)
            found += (Record(owner, "TXT", f'"v=spf1 {allowed} -all"') for owner in (apex, host))
        key = keys.get(sender.name)
        if key is not None:
            strings = " ".join(f'"{part}"' for part in (f"v=DKIM1; p={key[:200]}", key[200:]))
            found.append(Record(f"{plan.SENDER_SELECTOR}._domainkey.{apex}", "TXT", strings))
            found.append(Record(f"_dmarc.{apex}", "TXT", '"v=DMARC1; p=reject"'))
        yield Zone(apex, records=tuple(found))


def _forward_zones(platform: Platform, more: Iterable[str]) -> Iterator[Zone]:
    """The domains that the site forwards to, unless the operator or the world has them anyway."""
    operator = operator_zone_names(platform, more)
    known = {mx.domain for mx in plan.MAIL_SERVERS.values()}
    known |= {sender.domain for sender in plan.SENDERS.values()}
    for domain in forward_domains(platform):
        if domain not in known and not _enclosing(f"{domain}.", operator):
            mx = Record(f"{domain}.", "MX", f"10 {plan.ELSEWHERE.host}.")
            yield Zone(f"{domain}.", records=(mx,))


def _with_lists(zones: Mapping[str, Zone], lists: Iterable[str]) -> dict[str, Zone]:
    """Delegate the block lists, which are not signed, to their own name server."""
    found = dict(zones)
    for name in lists:
        if name in found:
            raise ValueError(f"block list {name} is also a zone of the rehearsal's world")
        parent = _parent(name, zones)
        delegation = Record(name, "NS", f"{plan.LISTS_SERVER}.", 3600)
        found[parent] = replace(found[parent], records=(*found[parent].records, delegation))
    return found


def _mail_domain(mx: plan.Mx, tlsa: str | None) -> Iterator[Record]:
    apex = f"{mx.domain}."
    yield Record(apex, "MX", f"10 {mx.host}.")
    yield Record(apex, "TXT", '"v=spf1 mx -all"')
    yield Record(f"_dmarc.{apex}", "TXT", '"v=DMARC1; p=reject"')
    yield Record(f"{mx.host}.", "TXT", '"v=spf1 a -all"')
    yield from _address(f"{mx.host}.", mx.addresses)
    if tlsa:
        yield Record(f"_25._tcp.{mx.host}.", "TLSA", tlsa)


def _own_pointers() -> Iterator[Record]:
    for mx in plan.MAIL_SERVERS.values():
        for address in mx.addresses:
            yield _pointer(address, mx.host)
    for name, pair in plan.NAME_SERVERS.items():
        for address in pair:
            yield _pointer(address, name)
    for sender in plan.SENDERS.values():
        for address in sender.addresses:
            yield _pointer(address, sender.host)


def _parsed(text: str) -> Iterator[Record]:
    zone = dns.zone.from_text(text, origin=dns.name.root, relativize=False, check_origin=False)
    for owner, ttl, rdata in zone.iterate_rdatas("PTR"):
        yield Record(str(owner).lower(), "PTR", rdata.to_text(), ttl)


def _reverse_zones(pointers: Iterable[Record]) -> Iterator[Zone]:
    found: dict[str, list[Record]] = {}
    for pointer in pointers:
        found.setdefault(reverse_zone(_address_of(pointer.owner)), []).append(pointer)
    for name, of_zone in found.items():
        yield Zone(name, records=tuple(dict.fromkeys(of_zone)))


def _with_delegations(zones: Mapping[str, Zone]) -> dict[str, Zone]:
    children: dict[str, list[str]] = {name: [] for name in zones}
    for name in sorted(zones):
        if name != ".":
            children[_parent(name, zones)].append(name)
    return {name: replace(zone, children=tuple(children[name])) for name, zone in zones.items()}


def _parent(name: str, zones: Mapping[str, Zone]) -> str:
    rest = name.partition(".")[2]
    while rest and rest not in zones:
        rest = rest.partition(".")[2]
    return rest or "."


def _root_glue() -> Iterator[Record]:
    for letter, pair in plan.ROOT_SERVERS.items():
        yield from _address(f"{letter}.root-servers.net.", pair)
    yield from _server_glue()


def _server_glue() -> Iterator[Record]:
    for name, pair in (*plan.NAME_SERVERS.items(), (plan.LISTS_SERVER, plan.LISTS)):
        yield from _address(f"{name}.", pair)


def _address(owner: str, pair: plan.Pair) -> Iterator[Record]:
    yield Record(owner, "A", str(pair.ipv4))
    yield Record(owner, "AAAA", str(pair.ipv6))


def _pointer(address: IPAddress, name: str) -> Record:
    return Record(f"{address.reverse_pointer}.", "PTR", f"{name}.")


def _address_of(pointer: str) -> IPAddress:
    labels = pointer.rstrip(".").split(".")
    if labels[-2:] == ["in-addr", "arpa"] and len(labels) == 6:
        return IPv4Address(".".join(reversed(labels[:4])))
    if labels[-2:] == ["ip6", "arpa"] and len(labels) == 34:
        return IPv6Address(int("".join(reversed(labels[:32])), 16))
    raise ValueError(f"{pointer!r} is no reverse name of one address")


def _top_level(name: str) -> str:
    return name.rstrip(".").rpartition(".")[2] + "."


def _absolute(name: str) -> str:
    return name.lower().rstrip(".") + "."


def _enclosing(name: str, zones: Iterable[str]) -> str | None:
    """The longest of ``zones`` that ``name`` lies in."""
    return max((zone for zone in zones if _is_within(name, zone)), key=len, default=None)


def _is_within(name: str, zone: str) -> bool:
    return name == zone or name.endswith(f".{zone}")
