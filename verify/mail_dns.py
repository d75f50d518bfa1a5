"""DNS: what resolvers everywhere see of the platform's names."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key

from mailsite.model import DkimKey, Dmarc, Host, IPAddress, MailDomain, NetworkKind, Role
from mailsite.records import ptr_records
from verify import mailauth
from verify.context import Context, each, expect
from verify.registry import Failed, check

TXT_STRING = 255
SPF_LOOKUPS = 10
SPF_VOID_LOOKUPS = 2


@dataclass(frozen=True)
class Wanted:
    """What a name must say, derived from site data by the checks themselves."""

    name: str
    type: str
    data: frozenset[str]

    def __str__(self) -> str:
        return f"{self.name} {self.type}"


def wanted_addresses(ctx: Context) -> Iterator[Wanted]:
    """The names of hosts and services, as the seed publishes them."""
    platform = ctx.platform

    def both(name: str, addresses: tuple[IPAddress, ...]) -> Iterator[Wanted]:
        for kind, version in (("A", 4), ("AAAA", 6)):
            data = frozenset(str(a) for a in addresses if a.version == version)
            yield Wanted(name, kind, data)

    for host in platform.hosts.values():
        yield from both(host.name, ctx.internal(host))
    yield from both(platform.names.frontend, tuple(a for f in ctx.frontends for a in ctx.public(f)))
    yield from both(
        f"{Role.SMTP_OUT}.{platform.internal_domain}",
        tuple(a for m in ctx.members for a in ctx.internal(m)),
    )
    filters = platform.members(Role.RSPAMD)
    if filters:
        legs = tuple(a for m in filters for a in ctx.internal(m))
        yield from both(f"{Role.RSPAMD}.{platform.internal_domain}", legs)
    exchangers = platform.members(Role.SMTP_IN)
    if exchangers:
        yield from both(platform.names.smtp_in, tuple(a for m in exchangers for a in ctx.public(m)))
    for host in exchangers:
        yield from both(own_name(ctx, host), ctx.public(host))
    for name, egress in platform.egress.items():
        if any(name.endswith(f".{zone}") for zone in platform.domains):
            yield from both(name, (egress.ipv4, egress.ipv6))


def own_name(ctx: Context, host: Host) -> str:
    """The name of a host's public side: what it says in HELO, and what its PTR gives."""
    platform = ctx.platform
    if set(ctx.internal(host)) == set(ctx.public(host)):
        return host.name
    return host.name.removesuffix(platform.internal_domain) + platform.domain


@check("DNS-1", live=True, calm=True)
def names_are_published(ctx: Context) -> str:
    """Every name of the seed, of every host and of every domain is published, each record once."""
    wanted = list(wanted_addresses(ctx))
    each(wanted, lambda w: _expect_published(ctx, w))
    names = ctx.platform.names
    alias = ctx.lookup.texts(names.smtp_out, "CNAME")
    expect(
        alias == [f"{names.frontend}."],
        f"{names.smtp_out} CNAME: {' '.join(alias) or 'nothing'}, not {names.frontend}.",
    )
    _expect_shared_spf(ctx)
    domains = list(ctx.platform.domains.values())
    each(domains, lambda domain: _expect_policies(ctx, domain))
    each(domains, lambda domain: _expect_exchange(ctx, domain))
    _expect_senders_of_forwards(ctx)
    keys = [(d, k) for d in domains for k in d.dkim]
    if keys:
        each(keys, lambda case: _dkim_key(ctx, *case))
    told = (
        f"{len({w.name for w in wanted})} names of hosts and services, {len(domains)} domains, "
        f"{len(keys)} DKIM keys as the site data says"
    )
    if ctx.is_live:
        return told
    return f"{told}; {_expect_exactly_the_programs(ctx)}"


def _expect_published(ctx: Context, wanted: Wanted) -> None:
    found = ctx.lookup.texts(wanted.name, wanted.type)
    expect(
        frozenset(found) == wanted.data,
        f"{wanted}: {' '.join(found) or 'nothing'}, not {' '.join(sorted(wanted.data))}",
    )


def _expect_shared_spf(ctx: Context) -> None:
    """The shared record includes one record per family, which lists the site's blocks."""
    spf = ctx.platform.spf
    label, _, rest = ctx.platform.names.spf.partition(".")
    families = {
        f"{label}4.{rest}": [f"ip4:{b}" for b in spf.ipv4],
        f"{label}6.{rest}": [f"ip6:{b}" for b in spf.ipv6],
    }
    used = {name: terms for name, terms in families.items() if terms}
    records = {ctx.platform.names.spf: [f"include:{name}" for name in used], **used}
    for name, terms in records.items():
        found = mailauth.spf_records(ctx.lookup, name)
        expected = " ".join(["v=spf1", *terms, spf.all])
        expect(found == [expected], f"{name} SPF: {found or 'nothing'}, not {expected!r}")


def _expect_policies(ctx: Context, domain: MailDomain) -> None:
    """The domain's own SPF record and DMARC policy."""
    found = mailauth.spf_records(ctx.lookup, domain.name)
    expect(len(found) == 1, f"{domain.name} has {len(found)} SPF records")
    terms = found[0].split()[1:]
    if domain.sends:
        include = f"include:{ctx.platform.names.spf}"
        missing = [t for t in (*domain.spf, include) if t not in terms]
        expect(not missing, f"{domain.name} SPF {found[0]!r} lacks {' '.join(missing)}")
        expect(
            terms[-1] == domain.spf_all,
            f"{domain.name} SPF {found[0]!r} does not end with {domain.spf_all}",
        )
    else:
        expect(terms == ["-all"], f"{domain.name} never sends, but has SPF {found[0]!r}")
        if not domain.receives:
            mx = ctx.lookup.texts(domain.name, "MX")
            expect(mx == ["0 ."], f"{domain.name} MX: {' '.join(mx) or 'nothing'}, not '0 .'")
    dmarc = [t for t in ctx.lookup.txt(f"_dmarc.{domain.name}") if t.startswith("v=DMARC1")]
    expect(len(dmarc) == 1, f"_dmarc.{domain.name} has {len(dmarc)} DMARC records")
    tags = {k.strip(): v.strip() for k, _, v in (p.partition("=") for p in dmarc[0].split(";"))}
    policy: Dmarc = domain.dmarc or ctx.platform.dmarc
    expected = str(policy.policy) if domain.sends else "reject"
    expect(
        tags.get("p") == expected,
        f"_dmarc.{domain.name}: p={tags.get('p')}, not {expected}",
    )
    rua = {address.removeprefix("mailto:") for address in tags.get("rua", "").split(",") if address}
    expect(
        rua == set(policy.rua),
        f"_dmarc.{domain.name}: reports go to {', '.join(sorted(rua)) or 'nobody'}, "
        f"not to {', '.join(policy.rua) or 'nobody'}",
    )


def _expect_exchange(ctx: Context, domain: MailDomain) -> None:
    """The domain's mail comes in through smtp-in, unless it is retired or never used for mail."""
    found = ctx.lookup.texts(domain.name, "MX")
    wanted = _mx(ctx) if domain.receives and not domain.retired else []
    if domain.receives or domain.sends:
        expect(
            found == wanted,
            f"{domain.name} MX: {' '.join(found) or 'nothing'}, not {wanted or 'nothing'}",
        )


def _mx(ctx: Context) -> list[str]:
    exchangers = ctx.platform.members(Role.SMTP_IN)
    return [f"10 {ctx.platform.names.smtp_in}."] if exchangers else []


def _expect_senders_of_forwards(ctx: Context) -> None:
    """Rewritten senders, and the members' HELO names, are ours alone; bounces find the way back."""
    exchangers = ctx.platform.members(Role.SMTP_IN)
    if not exchangers:
        return
    srs = ctx.platform.inbound.srs_domain
    found = ctx.lookup.texts(srs, "MX")
    expect(found == _mx(ctx), f"{srs} MX: {' '.join(found) or 'nothing'}, not {_mx(ctx)[0]}")
    expected = f"v=spf1 include:{ctx.platform.names.spf} -all"
    for name in (srs, *(own_name(ctx, host) for host in exchangers)):
        records = mailauth.spf_records(ctx.lookup, name)
        expect(records == [expected], f"{name} SPF: {records or 'nothing'}, not {expected!r}")


def _dkim_key(ctx: Context, domain: MailDomain, key: DkimKey) -> RSAPublicKey:
    """The published key (RFC 6376, section 3.6.1)."""
    name = f"{key.selector}._domainkey.{domain.name}"
    records = ctx.lookup.strings(name)
    expect(len(records) == 1, f"{name} has {len(records)} TXT records")
    text = b"".join(records[0]).decode("ascii", "replace")
    tags = {k.strip(): v.strip() for k, _, v in (p.partition("=") for p in text.split(";"))}
    expect(
        tags.get("v") == "DKIM1" and tags.get("k", "rsa") == "rsa",
        f"{name}: {text[:40]!r} is no RSA key of DKIM",
    )
    try:
        public = load_der_public_key(base64.b64decode(tags.get("p", ""), validate=True))
    except (binascii.Error, ValueError, UnsupportedAlgorithm) as error:
        raise Failed(f"{name}: its strings do not join to a key: {error}") from error
    expect(isinstance(public, RSAPublicKey), f"{name} is no RSA key")
    assert isinstance(public, RSAPublicKey)
    expect(
        public.key_size == key.bits,
        f"{name} has {public.key_size} bits, the site data says {key.bits}",
    )
    return public


def _expect_exactly_the_programs(ctx: Context) -> str:
    """The zones hold what the program says, what was there before it, and nothing else."""
    lab = ctx.lab
    program = lab.program_records()
    zones = sorted(program)
    expect(zones, "the program has no zone in the stack's outputs")

    def compare(zone: str) -> int:
        served = lab.world.records(zone)
        there = set(served)
        own = set(program[zone])
        expected = own | set(lab.world.foreign_records(zone))
        lost = "; ".join(sorted(map(str, expected - there)))
        expect(not lost, f"zone {zone} lacks {lost}")
        extra = "; ".join(sorted(map(str, there - expected)))
        expect(not extra, f"zone {zone} has, beyond the program's records: {extra}")
        expect(len(served) == len(there), f"zone {zone} has records more than once")
        times = {entry: entry.ttl for entry in served}
        for entry in own:
            expect(
                times[entry] == entry.ttl,
                f"zone {zone}: {entry} lasts {times[entry]} s, not {entry.ttl} s",
            )
        return len(own)

    total = sum(each(zones, compare))
    return (
        f"{len(zones)} transferred zones hold the program's {total} records once each, and the "
        "operator's own as they were"
    )


@check("DNS-2", live=True)
def policies_are_valid(ctx: Context) -> str:
    """SPF is one valid record per name that covers every sender; TXT and MX are well formed."""
    senders = sending_addresses(ctx)
    domains = list(ctx.platform.domains.values())

    def look(domain: MailDomain) -> int:
        tree = mailauth.spf_tree(ctx.lookup, domain.name)
        expect(not tree.problems, f"{domain.name}: {'; '.join(tree.problems)}")
        expect(
            tree.lookups <= SPF_LOOKUPS,
            f"{domain.name}: SPF needs {tree.lookups} lookups, {SPF_LOOKUPS} are allowed",
        )
        expect(
            tree.void <= SPF_VOID_LOOKUPS,
            f"{domain.name}: SPF asks for {tree.void} names that do not exist",
        )
        helo = ctx.platform.names.smtp_out
        for address in senders:
            judged = mailauth.check_spf(ctx.lookup, address, f"probe@{domain.name}", helo)
            wanted = "pass" if domain.sends else "fail"
            expect(
                judged.result == wanted,
                f"{domain.name}: SPF of {address}: {judged.result} ({judged.reason}), not {wanted}",
            )
        stranger = mailauth.check_spf(ctx.lookup, _stranger(ctx), f"probe@{domain.name}", helo)
        expect(
            stranger.result in ("fail", "softfail"),
            f"{domain.name}: SPF of a stranger: {stranger.result} ({stranger.reason})",
        )
        for exchange in ctx.lookup.texts(domain.name, "MX"):
            target = exchange.split()[1].rstrip(".")
            expect(
                not target or not ctx.lookup.texts(target, "CNAME"),
                f"{domain.name}: its MX {target} is a CNAME (RFC 2181, section 10.3)",
            )
        names = [domain.name, f"_dmarc.{domain.name}"]
        names += [f"{k.selector}._domainkey.{domain.name}" for k in domain.dkim]
        for name in names:
            _expect_chunks(ctx, name)
        for key in domain.dkim:
            _dkim_key(ctx, domain, key)
        return tree.lookups

    lookups = each(domains, look)
    _expect_forwards_pass(ctx)
    for name in _shared_names(ctx):
        _expect_chunks(ctx, name)
    return (
        f"{len(domains)} domains: at most {max(lookups)} SPF lookups, pass for "
        f"{', '.join(str(a) for a in senders)}; no MX is a CNAME; TXT strings join"
    )


def _expect_forwards_pass(ctx: Context) -> None:
    """SPF of the domain of rewritten senders: one record, for the members' addresses alone."""
    exchangers = ctx.platform.members(Role.SMTP_IN)
    srs = ctx.platform.inbound.srs_domain
    if not exchangers:
        return
    tree = mailauth.spf_tree(ctx.lookup, srs)
    expect(not tree.problems, f"{srs}: {'; '.join(tree.problems)}")
    expect(tree.lookups <= SPF_LOOKUPS, f"{srs}: SPF needs {tree.lookups} lookups")
    for host in exchangers:
        for address in ctx.public(host):
            # With a sender, and for a bounce without one.
            for sender in (f"SRS0=x=y=z@{srs}", ""):
                judged = mailauth.check_spf(ctx.lookup, address, sender, own_name(ctx, host))
                expect(
                    judged.result == "pass",
                    f"SPF of {sender or own_name(ctx, host)} from {address}: {judged.result}"
                    f" ({judged.reason}), not pass",
                )
    stranger = mailauth.check_spf(ctx.lookup, _stranger(ctx), f"SRS0=x=y=z@{srs}", srs)
    expect(stranger.result == "fail", f"{srs}: SPF of a stranger: {stranger.result}, not fail")


def _stranger(ctx: Context) -> IPAddress:
    """An address that is in no block of the site's SPF."""
    candidates = map(IPv4Address, ("198.51.100.7", "203.0.113.7", "192.0.2.7"))
    return next(c for c in candidates if not any(c in block for block in ctx.platform.spf.ipv4))


def _shared_names(ctx: Context) -> tuple[str, ...]:
    label, _, rest = ctx.platform.names.spf.partition(".")
    return (ctx.platform.names.spf, f"{label}4.{rest}", f"{label}6.{rest}")


def _expect_chunks(ctx: Context, name: str) -> None:
    """Strings of at most 255 bytes, and an SPF record's terms are apart where strings join."""
    for strings in ctx.lookup.strings(name):
        long = [s for s in strings if len(s) > TXT_STRING]
        expect(not long, f"{name}: a TXT string has {len(long[0]) if long else 0} bytes")
        expect(all(strings), f"{name}: a TXT record has an empty string")


def sending_addresses(ctx: Context) -> tuple[IPAddress, ...]:
    """The addresses that mail to the outside comes from: the members' own, else the NAT's.

    Members of smtp-out submit what users write, members of smtp-in forward what comes in.
    """
    found: dict[IPAddress, None] = {}
    for member in ctx.members:
        leg = member.interfaces[0]
        if ctx.platform.network_of(leg).kind is NetworkKind.PUBLIC:
            found |= dict.fromkeys((leg.ipv4, leg.ipv6))
        else:
            for egress in ctx.platform.egress.values():
                found |= dict.fromkeys((egress.ipv4, egress.ipv6))
    for member in ctx.platform.members(Role.SMTP_IN):
        found |= dict.fromkeys(ctx.public(member))
    return tuple(found)


def _bind_text(ctx: Context) -> str:
    """The PTR records of every sending address; all others are in the stack's outputs."""
    wanted = ((r.name, r.ttl, r.content) for r in ptr_records(ctx.platform))
    needed = {a.reverse_pointer for a in sending_addresses(ctx)}
    lines = [f"{name}. {ttl} IN PTR {target}." for name, ttl, target in wanted if name in needed]
    return "\n".join(lines)


@check("DNS-3", live=True)
def senders_have_names(ctx: Context) -> str:
    """Every sending address has a PTR that resolves back, and the HELO name resolves."""
    ctx.note(f"the reverse records that mail needs, as BIND text:\n{_bind_text(ctx)}")
    helo = ctx.platform.names.smtp_out
    expect(ctx.lookup.addresses(helo), f"the HELO name {helo} does not resolve")

    def look(address: IPAddress) -> str:
        pointers = ctx.lookup.pointers(address)
        expect(
            len(pointers) == 1,
            f"{address} has {len(pointers)} PTR records: {' '.join(pointers) or 'none'}",
        )
        back = ctx.lookup.addresses(pointers[0])
        expect(
            address in back,
            f"{address} has the PTR {pointers[0]}, which resolves to "
            f"{' '.join(sorted(map(str, back))) or 'nothing'}",
        )
        return pointers[0]

    senders = sending_addresses(ctx)
    pointers = dict(zip(senders, each(senders, look), strict=True))
    for member in ctx.platform.members(Role.SMTP_IN):
        said = own_name(ctx, member)
        for address in ctx.public(member):
            expect(
                pointers.pop(address) == said,
                f"{member.name} says HELO {said}, but {address} has another PTR:"
                f" {ctx.lookup.pointers(address)}",
            )
    other = sorted({p for p in pointers.values() if p != helo})
    if other:
        ctx.note(
            f"warning: mail says HELO {helo}, but comes from {', '.join(other)}: some receivers "
            "count that against it; a NAT in between makes it unavoidable"
        )
    return (
        f"{len(senders)} addresses lead to names and back, smtp-in's to what it says in HELO; "
        f"HELO {helo} resolves{', but differs from the PTR (warning)' if other else ''}"
    )
