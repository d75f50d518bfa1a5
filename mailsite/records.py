"""The platform's DNS, as typed records computed from site data alone.

Nothing here knows who publishes a record: :mod:`components.mail_dns` hands them to a provider,
:func:`zone_text` writes them as BIND text for people whose DNS is elsewhere. Names are FQDNs
without a trailing dot; every record carries the reason that it exists.

DKIM public keys are the one thing that site data does not hold. :func:`records` takes them as a
mapping; :func:`static_records` and :func:`dkim_record` build the two parts apart, for callers
that learn a key later than the rest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address

from mailsite.model import (
    DkimKey,
    Dmarc,
    DmarcPolicy,
    Host,
    Interface,
    IPAddress,
    MailDomain,
    NetworkKind,
    Platform,
    Role,
)

TXT_STRING = 255  # bytes in one character-string (RFC 1035, section 3.3)
TXT_LIMIT = 4096  # bytes that providers take in one TXT record
SPF_LOOKUPS = 10  # terms that cause a query (RFC 7208, section 4.6.4)
ZONES_SHOWN = 10  # in an error
WHY_LIMIT = 100  # characters of a record's comment that providers take

TTL_SHARED = 3600
TTL_HOST = 3600
TTL_FRONTEND = 600
TTL_MEMBERS = 60
TTL_MAILDROP = 300
TTL_MX = 86400
MX_PREFERENCE = 10
MX_STEP = 10

_SPF_TERM = re.compile(
    r"[+?~-]?(?:include:\S+|a|a[:/]\S+|mx|mx[:/]\S+|ptr|ptr:\S+|ip4:\S+|ip6:\S+|exists:\S+)"
    r"|(?:exp|redirect)=\S+",
    re.IGNORECASE,
)
_SPF_QUERY = re.compile(r"[+?~-]?(include|a|mx|ptr|exists)(?=[:/]|$)|(redirect)=", re.IGNORECASE)


class RecordError(ValueError):
    """Site data asks for DNS that cannot work. The text says what to write instead."""


class RecordType(StrEnum):
    A = "A"
    AAAA = "AAAA"
    CNAME = "CNAME"
    MX = "MX"
    TXT = "TXT"
    PTR = "PTR"


class Stage(StrEnum):
    """When a record may appear: with the machines, before they sign, or once they serve.

    ``MX`` is last: it moves a domain's mail here.
    """

    HOST = "host"
    POLICY = "policy"
    SERVICE = "service"
    MX = "mx"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One DNS record.

    ``content`` is the address, the target without a trailing dot (``.`` alone for a null MX),
    or the text of a TXT record as its readers join it; ``ttl`` is in seconds.
    """

    zone: str
    name: str
    type: RecordType
    ttl: int
    content: str
    why: str
    stage: Stage
    priority: int | None = None

    @property
    def key(self) -> str:
        """Identity that outlives a change of content, where a name has one such record only."""
        if self.type in (RecordType.A, RecordType.AAAA, RecordType.MX):
            return f"{self.name}-{self.type}-{self.content}"
        return f"{self.name}-{self.type}"

    @property
    def wire(self) -> str:
        """Content as providers take it: TXT quoted and split, names without a trailing dot."""
        return txt_content(self.content) if self.type is RecordType.TXT else self.content

    @property
    def rdata(self) -> str:
        """Content as a zone file takes it (RFC 1035, section 5.1)."""
        if self.type is RecordType.TXT:
            return txt_content(self.content)
        if self.type in (RecordType.A, RecordType.AAAA):
            return self.content
        target = self.content if self.content == "." else f"{self.content}."
        return target if self.priority is None else f"{self.priority} {target}"


# -- TXT ---------------------------------------------------------------------------------------


def txt_strings(text: str) -> tuple[str, ...]:
    """Split ``text`` into strings of 255 bytes or fewer that join to it without a separator.

    Splits fall after a space where one is near, so that a long SPF record stays readable; the
    space stays at the end of its string, because readers join strings as they are
    (RFC 7208, section 3.3).

    Raises:
        RecordError: ``text`` holds anything but printable ASCII, or is longer than 4096 bytes.
    """
    if not text.isascii() or not text.isprintable():
        raise RecordError(f"TXT record {text[:40]!r}...: write it in printable ASCII")
    if len(text) > TXT_LIMIT:
        raise RecordError(
            f"TXT record {text[:40]!r}... has {len(text)} bytes; {TXT_LIMIT} are possible"
        )
    strings = []
    while len(text) > TXT_STRING:
        space = text.rfind(" ", TXT_STRING // 2, TXT_STRING)
        cut = space + 1 if space >= 0 else TXT_STRING
        strings.append(text[:cut])
        text = text[cut:]
    return (*strings, text)


def txt_content(text: str) -> str:
    """Quoted strings of a TXT record, as zone files and Cloudflare's API take them."""
    escaped = (s.replace("\\", "\\\\").replace('"', '\\"') for s in txt_strings(text))
    return " ".join(f'"{s}"' for s in escaped)


# -- zones -------------------------------------------------------------------------------------


def zones(platform: Platform) -> tuple[str, ...]:
    """DNS zones that the platform writes to: of its own name and of every mail domain."""
    own = dict.fromkeys((platform.domain, *(d.dns_zone for d in platform.domains.values())))
    if not any(_within(platform.internal_domain, zone) for zone in own):
        own[platform.internal_domain] = None
    return tuple(own)


class ZoneMap:
    """Finds the platform's zone that a name lies in: the one with the longest match."""

    def __init__(self, platform: Platform) -> None:
        self._zones = dict.fromkeys(zones(platform))

    def find(self, name: str) -> str | None:
        zone = name
        while zone and zone not in self._zones:
            zone = zone.partition(".")[2]
        return zone or None

    def of(self, name: str, what: str) -> str:
        """Like :meth:`find`, but ``name`` is needed for ``what``.

        Raises:
            RecordError: none of the platform's zones holds ``name``.
        """
        zone = self.find(name)
        if zone is None:
            known = ", ".join(list(self._zones)[:ZONES_SHOWN])
            raise RecordError(
                f"{what} {name!r} lies in none of the platform's zones ({known}); choose a name in"
                " one of them, or add its domain under domains/"
            )
        return zone


def find_zone(platform: Platform, name: str) -> str | None:
    """The platform's zone that ``name`` lies in; to ask for many, make a :class:`ZoneMap`."""
    return ZoneMap(platform).find(name)


def _within(name: str, zone: str) -> bool:
    return name == zone or name.endswith(f".{zone}")


# -- names of hosts ----------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnName:
    """A name that belongs to one machine alone, and the addresses that it stands for."""

    name: str
    addresses: tuple[IPAddress, ...]
    why: str


def public_name(platform: Platform, host: Host) -> str:
    """Name of a host's public leg: its internal name, moved to the platform's public domain."""
    return host.name.removesuffix(platform.internal_domain) + platform.domain


def own_names(platform: Platform) -> Iterator[OwnName]:
    """Every machine's own names: hosts by their internal leg and public leg, and the gateways."""
    for host in platform.hosts.values():
        inside = platform.internal_leg(host)
        yield OwnName(host.name, (inside.ipv4, inside.ipv6), "A host by its internal name")
        outside = platform.leg(host, NetworkKind.PUBLIC)
        if outside is not None and outside != inside:
            name = public_name(platform, host)
            if name != host.name:
                addresses = (outside.ipv4, outside.ipv6)
                yield OwnName(name, addresses, "A host by its public side")
    for name, egress in platform.egress.items():
        yield OwnName(
            name,
            (egress.ipv4, egress.ipv6),
            "Gateway that site-local hosts send through; its PTR leads here",
        )


def inbound_legs(platform: Platform, *, draining: bool = False) -> Mapping[str, Interface]:
    """Host name -> public leg, where mail comes in and forwards leave: each member of smtp-in.

    ``draining``: also the hosts that take no new mail, and forward what they have.
    """
    hosts = (platform.serving if draining else platform.members)(Role.SMTP_IN)
    legs = ((host.name, platform.leg(host, NetworkKind.PUBLIC)) for host in hosts)
    return {name: leg for name, leg in legs if leg is not None}


def senders(platform: Platform) -> Mapping[IPAddress, str]:
    """Addresses that deliver mail to the outside, with the name that their PTR must give.

    Hosts of smtp-out with a site-local first leg leave through the egress gateways, others as
    themselves. Those of smtp-in forward as themselves; the name is what they say HELO with. A
    host that drains still sends what it has.
    """
    names = {a: own.name for own in own_names(platform) for a in own.addresses}
    found: dict[IPAddress, str] = {}
    for host in platform.serving(Role.SMTP_OUT):
        leg = host.interfaces[0]
        if platform.network_of(leg).kind is NetworkKind.PUBLIC:
            found |= {a: names.get(a, host.name) for a in (leg.ipv4, leg.ipv6)}
        else:
            for name, egress in platform.egress.items():
                found |= {egress.ipv4: name, egress.ipv6: name}
    for host_name, leg in inbound_legs(platform, draining=True).items():
        found |= {a: names.get(a, host_name) for a in (leg.ipv4, leg.ipv6)}
    return found


# -- SPF ---------------------------------------------------------------------------------------


def spf_text(terms: Sequence[str]) -> str:
    """An SPF record from its terms; exactly one space between them (RFC 7208, section 4.5)."""
    return " ".join(("v=spf1", *terms))


def family_name(platform: Platform, family: int) -> str:
    """Name of the SPF record with the blocks of one family: ``_spf4`` beside ``_spf``."""
    label, _, rest = platform.names.spf.partition(".")
    return f"{label}{family}.{rest}"


def domain_spf(platform: Platform, domain: MailDomain) -> str:
    """The one SPF record of a mail domain: the operator's own terms, then the platform's.

    Raises:
        RecordError: an own term is no SPF term, or would end the record before ours.
    """
    if not domain.sends:
        return spf_text(["-all"])
    include = f"include:{platform.names.spf}"
    for term in domain.spf:
        hint = f"domains/{domain.name}.yaml: spf: {term!r}"
        if not _SPF_TERM.fullmatch(term):
            raise RecordError(
                f"{hint} is no SPF term of its own; write one item per term, such as"
                " 'include:spf.example.net' or 'ip4:192.0.2.0/24', without 'v=spf1' and 'all'"
                " (spf_all sets the ending)"
            )
        if term.lower().startswith("redirect="):
            raise RecordError(f"{hint} has no effect beside 'all'; write it as 'include:...'")
    own = [term for term in dict.fromkeys(domain.spf) if term.lower() != include]
    return spf_text([*own, include, domain.spf_all])


def spf_lookups(text: str, known: Mapping[str, str]) -> int:
    """DNS queries that checking SPF record ``text`` costs, as far as ``known`` records tell.

    An include of a name that is not in ``known`` counts as the one query that it is at least.
    """
    return _lookups(text, known, frozenset())


def _lookups(text: str, known: Mapping[str, str], seen: frozenset[str]) -> int:
    count = 0
    for term in text.split()[1:]:
        match = _SPF_QUERY.match(term)
        if match is None:
            continue
        count += 1
        target = re.split(r"[:=]", term, maxsplit=1)[-1].lower()
        if (match[1] or match[2]).lower() in ("include", "redirect") and target in known:
            if target in seen:
                raise RecordError(f"SPF records include each other in a circle at {target!r}")
            count += _lookups(known[target], known, seen | {target})
    return count


# -- DMARC and DKIM ----------------------------------------------------------------------------


def dmarc_text(dmarc: Dmarc) -> str:
    """A DMARC policy record (RFC 7489, section 6.3)."""
    tags = ["v=DMARC1", f"p={dmarc.policy}"]
    if dmarc.subdomain_policy is not None:
        tags.append(f"sp={dmarc.subdomain_policy}")
    if dmarc.rua:
        tags.append("rua=" + ",".join(f"mailto:{address}" for address in dmarc.rua))
    return "; ".join(tags)


def domain_dmarc(platform: Platform, domain: MailDomain) -> Dmarc:
    """The policy of one mail domain; one that never sends rejects everything."""
    dmarc = domain.dmarc or platform.dmarc
    if domain.sends:
        return dmarc
    return dmarc.model_copy(update={"policy": DmarcPolicy.REJECT, "subdomain_policy": None})


def public_key_base64(key: str) -> str:
    """The ``p=`` value of a DKIM record from a public key: PEM, or already its base64."""
    lines = [line.strip() for line in key.strip().splitlines()]
    return "".join(line for line in lines if not line.startswith("-----"))


def dkim_keys(platform: Platform) -> Iterator[tuple[MailDomain, DkimKey]]:
    """Every DKIM key of every domain, also those that do not sign at present."""
    for domain in platform.domains.values():
        for key in domain.dkim:
            yield domain, key


def dkim_record(
    platform: Platform,
    domain: MailDomain,
    key: DkimKey,
    public: str,
    zone_map: ZoneMap | None = None,
) -> Record:
    """The published half of a DKIM key (RFC 6376, section 3.6.1).

    ``public`` is the public key as PEM or as base64 of its DER; ``zone_map`` is the platform's,
    for callers with many keys.
    """
    zone_map = zone_map or ZoneMap(platform)
    name = f"{key.selector}._domainkey.{domain.name}".lower()
    return Record(
        zone=zone_map.of(domain.name, "mail domain"),
        name=name,
        type=RecordType.TXT,
        ttl=TTL_SHARED,
        content=f"v=DKIM1; k=rsa; p={public_key_base64(public)}",
        why=f"DKIM key {key.selector}: receivers verify our signatures with it",
        stage=Stage.POLICY,
    )


# -- the whole ---------------------------------------------------------------------------------


def static_records(platform: Platform) -> tuple[Record, ...]:
    """Every record but the DKIM keys, in reading order. Checked by :func:`check`."""
    zone_map = ZoneMap(platform)
    found = (
        *_host_records(platform, zone_map),
        *_policy_records(platform, zone_map),
        *_service_records(platform, zone_map),
        *_inbound_records(platform, zone_map),
        *_maildrop_records(platform, zone_map),
        *_webmail_records(platform, zone_map),
    )
    check(found)
    return found


def records(platform: Platform, dkim_public: Mapping[str, str]) -> tuple[Record, ...]:
    """Every record of the platform. ``dkim_public``: ``domain/selector`` -> public key.

    Raises:
        RecordError: a key is missing, or the records contradict each other.
    """
    keys = []
    zone_map = ZoneMap(platform)
    for domain, key in dkim_keys(platform):
        label = f"{domain.name}/{key.selector}"
        if label not in dkim_public:
            raise RecordError(f"no public key given for DKIM key {label!r}")
        keys.append(dkim_record(platform, domain, key, dkim_public[label], zone_map))
    found = (*static_records(platform), *keys)
    check(found)
    return found


def _host_records(platform: Platform, zone_map: ZoneMap) -> Iterator[Record]:
    for own in own_names(platform):
        zone = zone_map.find(own.name)
        if zone is not None:  # a gateway's name may be somebody else's to publish
            yield from _addresses(zone, own.name, own.addresses, TTL_HOST, own.why, Stage.HOST)


def _policy_records(platform: Platform, zone_map: ZoneMap) -> Iterator[Record]:
    yield from _shared_spf(platform, zone_map)
    for domain in platform.domains.values():
        zone = zone_map.of(domain.name, "mail domain")
        if domain.sends:
            why = "SPF: who sends for this domain, the operator's own senders and the platform"
        else:
            why = "SPF: nobody sends for this domain"
            if not domain.receives:
                yield Record(
                    zone=zone,
                    name=domain.name,
                    type=RecordType.MX,
                    ttl=TTL_MX,
                    content=".",
                    priority=0,
                    why="Null MX: this domain takes no mail (RFC 7505)",
                    stage=Stage.POLICY,
                )
        yield _txt(zone, domain.name, domain_spf(platform, domain), why)
        dmarc = domain_dmarc(platform, domain)
        why = "DMARC: what receivers do with mail that fails SPF and DKIM, and where they report"
        yield _txt(zone, f"_dmarc.{domain.name}", dmarc_text(dmarc), why)
        yield from _report_consent(zone_map, domain, dmarc)


def _shared_spf(platform: Platform, zone_map: ZoneMap) -> Iterator[Record]:
    name = platform.names.spf
    zone = zone_map.of(name, "names.spf")
    blocks = {
        4: [f"ip4:{block}" for block in platform.spf.ipv4],
        6: [f"ip6:{block}" for block in platform.spf.ipv6],
    }
    used = {family: terms for family, terms in blocks.items() if terms}
    includes = [f"include:{family_name(platform, family)}" for family in used]
    why = "SPF that the mail domains include"
    yield _txt(zone, name, spf_text([*includes, platform.spf.all]), why)
    for family, terms in used.items():
        why = f"SPF: IPv{family} blocks that the platform sends from"
        text = spf_text([*terms, platform.spf.all])
        yield _txt(zone, family_name(platform, family), text, why)


def _report_consent(zone_map: ZoneMap, domain: MailDomain, dmarc: Dmarc) -> Iterator[Record]:
    """Consent to reports about ``domain`` at addresses of another zone (RFC 7489, 7.1)."""
    own = zone_map.find(domain.name)
    for receiver in dict.fromkeys(address.rpartition("@")[2] for address in dmarc.rua):
        zone = zone_map.find(receiver)
        if zone is not None and zone != own:
            name = f"{domain.name}._report._dmarc.{receiver}"
            yield _txt(zone, name, "v=DMARC1", "DMARC: reports about that domain are welcome here")


def _service_records(platform: Platform, zone_map: ZoneMap) -> Iterator[Record]:
    names = platform.names
    members = platform.members(Role.SMTP_OUT)
    if members:
        name = f"{Role.SMTP_OUT}.{platform.internal_domain}"
        legs = [platform.internal_leg(host) for host in members]
        yield from _addresses(
            zone_map.of(name, "internal name of smtp-out"),
            name,
            addresses_of(legs),
            TTL_MEMBERS,
            "All members of smtp-out, for servers inside",
            Stage.SERVICE,
        )
    frontends = platform.members(Role.FRONTEND)
    if not frontends:
        return
    legs = [leg for h in frontends if (leg := platform.leg(h, NetworkKind.PUBLIC)) is not None]
    if not legs:
        raise RecordError(
            f"topology.yaml: no frontend has a leg in a public network, so {names.frontend!r}"
            " would stand for nothing; add an interface to "
            + " or ".join(repr(host.name) for host in frontends)
        )
    zone = zone_map.of(names.frontend, "names.frontend")
    yield from _addresses(
        zone,
        names.frontend,
        addresses_of(legs),
        TTL_FRONTEND,
        "All frontends: the public entrance of the services behind them",
        Stage.SERVICE,
    )
    # Bounces have no sender: their SPF identity is the HELO name (RFC 7208, section 2.4), and
    # whoever asks for smtp-out's TXT is led here by its CNAME.
    text = spf_text([f"include:{names.spf}", "-all"])
    yield _txt(zone, names.frontend, text, "SPF of the HELO name, which bounces are checked by")
    if members and names.smtp_out != names.frontend:
        yield Record(
            zone=zone_map.of(names.smtp_out, "names.smtp_out"),
            name=names.smtp_out,
            type=RecordType.CNAME,
            ttl=TTL_SHARED,
            content=names.frontend,
            why="Submission (587) enters through the frontends",
            stage=Stage.SERVICE,
        )


def _inbound_records(platform: Platform, zone_map: ZoneMap) -> Iterator[Record]:
    """What leads mail to smtp-in: its names, the sender domain of forwards, and each MX."""
    names = platform.names
    filters = platform.members(Role.RSPAMD)
    if filters:
        name = platform.internal_name(Role.RSPAMD)
        legs = [platform.internal_leg(host) for host in filters]
        yield from _addresses(
            zone_map.of(name, "internal name of rspamd"),
            name,
            addresses_of(legs),
            TTL_MEMBERS,
            "All members of rspamd, for the mail servers that ask them",
            Stage.SERVICE,
        )
    outside = inbound_legs(platform).values()
    if not outside:
        return
    yield from _addresses(
        zone_map.of(names.smtp_in, "names.smtp_in"),
        names.smtp_in,
        addresses_of(outside),
        TTL_MEMBERS,
        "All members of smtp-in; no proxy in front, so that they see who sends",
        Stage.SERVICE,
    )
    # Bounces that are forwarded have no sender either, and each member has a HELO name of its own.
    text = spf_text([f"include:{names.spf}", "-all"])
    known = senders(platform)
    sending = inbound_legs(platform, draining=True).values()
    for name in dict.fromkeys(known[leg.ipv4] for leg in sending):
        zone = zone_map.of(name, "HELO name of smtp-in")
        yield _txt(zone, name, text, "SPF of the HELO name, which bounces are checked by")
    srs = platform.inbound.srs_domain
    srs_zone = zone_map.of(srs, "inbound.srs_domain")
    yield _txt(srs_zone, srs, text, "SPF: forwarded mail is sent from this domain, by us alone")
    yield _mx(platform, srs_zone, srs, "Bounces of forwarded mail come home through smtp-in")
    for domain in platform.domains.values():
        if domain.receives and not domain.retired:
            zone = zone_map.of(domain.name, "mail domain")
            yield _mx(platform, zone, domain.name, "Mail for this domain comes in through smtp-in")


def maildrop_exchanges(platform: Platform) -> tuple[tuple[int, str], ...]:
    """Where mail for the mailboxes goes: preference and host, the primary first."""
    return tuple(
        (MX_PREFERENCE + number * MX_STEP, host.name)
        for number, host in enumerate(platform.replicas)
    )


def _maildrop_records(platform: Platform, zone_map: ZoneMap) -> Iterator[Record]:
    """What leads mail, mail clients and webmail to the mailboxes."""
    replicas = platform.replicas
    if not replicas:
        return
    domain = platform.maildrop_domain
    zone = zone_map.of(domain, "domain of the mailboxes")
    for preference, target in maildrop_exchanges(platform):
        yield Record(
            zone=zone,
            name=domain,
            type=RecordType.MX,
            ttl=TTL_MAILDROP,
            content=target,
            priority=preference,
            why="smtp-in delivers to the first replica that answers",
            stage=Stage.SERVICE,
        )
    yield from _addresses(
        zone,
        platform.webmail_backend,
        addresses_of([platform.internal_leg(host) for host in replicas]),
        TTL_MAILDROP,
        "Both replicas of the mailboxes, for webmail",
        Stage.SERVICE,
    )
    names = platform.names
    if names.imap != names.frontend:
        yield Record(
            zone=zone_map.of(names.imap, "names.imap"),
            name=names.imap,
            type=RecordType.CNAME,
            ttl=TTL_MEMBERS,
            content=names.frontend,
            why="IMAP (993) and ManageSieve (4190) enter through the frontends",
            stage=Stage.SERVICE,
        )


def _webmail_records(platform: Platform, zone_map: ZoneMap) -> Iterator[Record]:
    """What leads browsers to webmail: its public name, and its name inside the platform."""
    if platform.webmail is None or not platform.members(Role.WEBMAIL):
        return
    names = platform.names
    for name in (names.webmail, platform.internal_name(Role.WEBMAIL)):
        if name != names.frontend:
            yield Record(
                zone=zone_map.of(name, "name of webmail"),
                name=name,
                type=RecordType.CNAME,
                ttl=TTL_MEMBERS,
                content=names.frontend,
                why="Webmail enters through the frontends",
                stage=Stage.SERVICE,
            )


def _mx(platform: Platform, zone: str, name: str, why: str) -> Record:
    return Record(
        zone=zone,
        name=name,
        type=RecordType.MX,
        ttl=TTL_MX,
        content=platform.names.smtp_in,
        priority=MX_PREFERENCE,
        why=why,
        stage=Stage.MX,
    )


def addresses_of(legs: Collection[Interface]) -> tuple[IPAddress, ...]:
    """The addresses of ``legs`` in the order of publication: all IPv4, then all IPv6."""
    return (*(leg.ipv4 for leg in legs), *(leg.ipv6 for leg in legs))


def _addresses(
    zone: str, name: str, addresses: Iterable[IPAddress], ttl: int, why: str, stage: Stage
) -> Iterator[Record]:
    for address in addresses:
        kind = RecordType.A if isinstance(address, IPv4Address) else RecordType.AAAA
        yield Record(
            zone=zone,
            name=name,
            type=kind,
            ttl=ttl,
            content=str(address),
            why=why,
            stage=stage,
        )


def _txt(zone: str, name: str, text: str, why: str) -> Record:
    return Record(
        zone=zone,
        name=name,
        type=RecordType.TXT,
        ttl=TTL_SHARED,
        content=text,
        why=why,
        stage=Stage.POLICY,
    )


def check(found: Iterable[Record]) -> None:
    """Refuse records that contradict each other.

    Raises:
        RecordError: two records are the same, a CNAME has company, an MX leads to a CNAME, a
            name has two SPF records or one that costs more than ten lookups, a text is too long.
    """
    found = tuple(found)
    by_name: dict[str, list[Record]] = {}
    keys: dict[str, Record] = {}
    for record in found:
        by_name.setdefault(record.name, []).append(record)
        if record.key in keys:
            raise RecordError(
                f"{record.name} {record.type}: two records ({keys[record.key].content!r} and"
                f" {record.content!r}); give one of the two another name in the site data"
            )
        keys[record.key] = record
        if not _within(record.name, record.zone):
            raise RecordError(f"{record.name} lies outside its zone {record.zone}")
        if len(record.why) > WHY_LIMIT:
            raise RecordError(f"{record.name}: the reason is longer than {WHY_LIMIT} characters")
        if record.type is RecordType.TXT:
            try:
                txt_strings(record.content)
            except RecordError as error:
                raise RecordError(f"{record.name}: {error}") from None
    spf = {r.name: r.content for r in found if r.content.startswith("v=spf1")}
    for name, group in by_name.items():
        kinds = {r.type for r in group}
        if RecordType.CNAME in kinds and len(group) > 1:
            raise RecordError(
                f"{name} is a CNAME and has other records too ({', '.join(sorted(kinds))}); a"
                " CNAME stands alone (RFC 1034, section 3.6.2): choose another name"
            )
        for record in group:
            target = by_name.get(record.content, [])
            if record.type is RecordType.MX and any(r.type is RecordType.CNAME for r in target):
                raise RecordError(f"{name}: its MX leads to {record.content}, which is a CNAME")
        if name in spf and (cost := spf_lookups(spf[name], spf)) > SPF_LOOKUPS:
            raise RecordError(
                f"{name}: its SPF record costs {cost} DNS lookups and receivers stop at"
                f" {SPF_LOOKUPS} (RFC 7208, section 4.6.4); remove include, a, mx or exists terms"
                f" from spf: in domains/{name}.yaml, or write their addresses as ip4: and ip6:"
            )


# -- BIND text ---------------------------------------------------------------------------------


def zone_text(found: Iterable[Record]) -> str:
    """``found`` as BIND text, zone by zone, to include in zones that carry their own SOA and NS."""
    by_zone: dict[str, list[Record]] = {}
    for record in found:
        by_zone.setdefault(record.zone, []).append(record)
    return "\n".join(_one_zone(zone, group) for zone, group in by_zone.items())


def _one_zone(zone: str, group: Sequence[Record]) -> str:
    lines = [f"$ORIGIN {zone}."]
    why = ""
    for record in group:
        if record.why != why:
            why = record.why
            lines.append(f"; {why}")
        lines.append(f"{record.name}.\t{record.ttl}\tIN\t{record.type}\t{record.rdata}")
    return "\n".join(lines) + "\n"


def ptr_records(platform: Platform) -> tuple[Record, ...]:
    """PTR records of every host and gateway, for whoever holds the reverse zones.

    Mail from an address whose PTR does not lead back to it is widely refused, over IPv6 above
    all. Reverse zones are cut at /24 and /64; whose zone is cut elsewhere moves the lines.
    """
    sending = senders(platform)
    found: dict[IPAddress, Record] = {}
    for own in own_names(platform):
        for address in own.addresses:
            why = "Sends mail: receivers look up this name" if address in sending else own.why
            found.setdefault(
                address,
                Record(
                    zone=reverse_zone(address),
                    name=address.reverse_pointer,
                    type=RecordType.PTR,
                    ttl=TTL_HOST,
                    content=own.name,
                    why=why,
                    stage=Stage.HOST,
                ),
            )
    return tuple(found.values())


def reverse_zone(address: IPAddress) -> str:
    """Name of the /24 or /64 reverse zone that ``address`` lies in."""
    kept = 16 if isinstance(address, IPv6Address) else 1
    return ".".join(address.reverse_pointer.split(".")[kept:])


def ptr_text(platform: Platform) -> str:
    """:func:`ptr_records` as BIND text."""
    return zone_text(ptr_records(platform))
