"""How a receiver judges mail: SPF by pyspf, DKIM by dkimpy, DMARC by RFC 7489.

Nothing here knows what the platform meant to publish: everything is read from DNS and from the
mail, as a stranger's mail server would.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.utils import parseaddr

import dkim  # type: ignore[import-untyped]
import spf  # type: ignore[import-untyped]
from dkim.util import (  # type: ignore[import-untyped]
    InvalidTagValueList,
    parse_tag_value,
)

from mailsite.model import IPAddress
from verify.lookup import Lookup
from verify.registry import Failed

_asking: ContextVar[Lookup] = ContextVar("_asking")


def _spf_lookup(
    name: str, kind: str, strict: object = True, timeout: float = 20
) -> list[tuple[tuple[str, str], object]]:
    """pyspf's questions, in the form that its dnspython driver answers them."""
    try:
        found = _asking.get().answer(name, kind)
    except Failed as error:
        raise spf.TempError(f"DNS {error}") from error
    values: list[object] = []
    for record in found or ():
        match kind:
            case "A" | "AAAA":
                values.append(record.address)
            case "MX":
                values.append((record.preference, record.exchange))
            case "PTR":
                values.append(record.target.to_text(True))
            case "TXT" | "SPF":
                values.append(record.strings)
    return [((name, kind), value) for value in values]


spf.DNSLookup = _spf_lookup  # the library's own way of exchanging its driver


@dataclass(frozen=True)
class Spf:
    """What pyspf makes of a connection: RFC 7208's result, and its reason."""

    result: str
    reason: str


def check_spf(lookup: Lookup, address: IPAddress, sender: str, helo: str) -> Spf:
    """SPF of a connection from ``address`` with the envelope sender ``sender``.

    Args:
        lookup: Resolves names.
        address: Who connected.
        sender: MAIL FROM; empty for a bounce, then the HELO name is checked.
        helo: Name in HELO or EHLO.
    """
    token = _asking.set(lookup)
    try:
        result, _, reason = spf.query(
            i=str(address), s=sender or f"postmaster@{helo}", h=helo, strict=2, timeout=10
        ).check()
    finally:
        _asking.reset(token)
    return Spf(result, reason)


@dataclass(frozen=True)
class Signature:
    """One DKIM-Signature field (RFC 6376, section 3.5) and what dkimpy says of it."""

    domain: str
    selector: str
    canonicalization: str
    algorithm: str
    headers: tuple[str, ...]
    valid: bool
    error: str = ""


def signatures(lookup: Lookup, message: bytes) -> list[Signature]:
    """Every DKIM signature of a mail, from the outermost inwards, each verified."""
    fields = message_from_bytes(message, policy=policy.compat32).get_all("DKIM-Signature", [])
    return [_signature(lookup, message, number, text) for number, text in enumerate(fields)]


def _signature(lookup: Lookup, message: bytes, number: int, text: str) -> Signature:
    def key(name: bytes | str, timeout: int = 5) -> bytes | None:
        wanted = name.decode("ascii") if isinstance(name, bytes) else name
        records = lookup.strings(wanted)
        return b"".join(records[0]) if len(records) == 1 else None

    try:
        tags = parse_tag_value(str(text).encode("ascii"))
    except (InvalidTagValueList, UnicodeEncodeError) as error:
        return Signature("", "", "", "", (), False, f"cannot be parsed: {error}")

    def tag(name: bytes, default: str = "") -> str:
        return re.sub(r"\s+", "", tags.get(name, default.encode()).decode("ascii"))

    try:
        valid = bool(dkim.DKIM(message, minkey=1024).verify(number, dnsfunc=key))
        problem = "" if valid else "does not verify"
    except dkim.DKIMException as error:
        valid, problem = False, str(error)
    return Signature(
        domain=tag(b"d").lower(),
        selector=tag(b"s"),
        canonicalization=tag(b"c", "simple/simple"),
        algorithm=tag(b"a"),
        headers=tuple(h.lower() for h in tag(b"h").split(":")),
        valid=valid,
        error=problem,
    )


@dataclass(frozen=True)
class DmarcVerdict:
    """Outcome of DMARC: the policy's domain, and through which mechanisms it passes."""

    domain: str
    policy: str
    through: tuple[str, ...]

    @property
    def passes(self) -> bool:
        return bool(self.through)


def check_dmarc(
    lookup: Lookup,
    organization: Callable[[str], str],
    message: bytes,
    sender: str,
    spf_result: Spf,
    found: list[Signature],
) -> DmarcVerdict | None:
    """DMARC of a mail (RFC 7489, section 6.6.2).

    Args:
        lookup: Resolves names.
        organization: Organizational domain of a domain.
        message: The mail.
        sender: Domain whose SPF was checked belongs to this address; a host name for bounces.
        spf_result: Outcome of SPF.
        found: Its DKIM signatures.

    Returns:
        The verdict; None where no domain publishes a policy.
    """
    author = author_domain(message)
    for domain in dict.fromkeys((author, organization(author))):
        records = [t for t in lookup.txt(f"_dmarc.{domain}") if t.startswith("v=DMARC1")]
        if len(records) == 1:
            break
    else:
        return None
    tags = dict(_pairs(records[0]))

    def aligned(other: str, mode: str) -> bool:
        if mode == "s":
            return other == author
        return organization(other) == organization(author)

    through = []
    if spf_result.result == "pass" and aligned(domain_of(sender), tags.get("aspf", "r")):
        through.append("spf")
    if any(s.valid and aligned(s.domain, tags.get("adkim", "r")) for s in found):
        through.append("dkim")
    return DmarcVerdict(domain, tags.get("p", ""), tuple(through))


def _pairs(record: str) -> list[tuple[str, str]]:
    parts = [p.partition("=") for p in record.split(";") if p.strip()]
    return [(key.strip(), value.strip()) for key, _, value in parts]


def author_domain(message: bytes) -> str:
    """Domain of the mail's From field (RFC 5322, section 3.6.2).

    Raises:
        Failed: There is not exactly one From field with one address.
    """
    fields = message_from_bytes(message, policy=policy.compat32).get_all("From", [])
    if len(fields) != 1:
        raise Failed(f"the mail has {len(fields)} From fields")
    return domain_of(parseaddr(str(fields[0]))[1])


def domain_of(address: str) -> str:
    return address.rpartition("@")[2].lower()


def header_of(message: bytes, name: str) -> list[str]:
    """Every field of that name, outermost first, unfolded."""
    fields = message_from_bytes(message, policy=policy.compat32).get_all(name, [])
    return [re.sub(r"\r?\n\s+", " ", str(f)) for f in fields]


@dataclass(frozen=True)
class SpfTree:
    """What evaluating a domain's SPF record needs (RFC 7208, section 4.6.4)."""

    lookups: int
    void: int
    terms: tuple[str, ...]
    problems: tuple[str, ...]


_SPF_LOOKUPS = ("include", "a", "mx", "ptr", "exists")
_SPF_MECHANISM = re.compile(
    r"[+?~-]?(?:all|include:[^\s:/]+|(?:a|mx|ptr)(?::[^\s:/]+)?(?:/\d+)?(?://\d+)?"
    r"|ip4:[0-9.]+(?:/\d+)?|ip6:[0-9a-fA-F:.]+(?:/\d+)?|exists:\S+)"
)
_SPF_MODIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*=\S*")


def spf_records(lookup: Lookup, name: str) -> list[str]:
    """The SPF records at ``name`` (RFC 7208, section 4.5)."""
    return [t for t in lookup.txt(name) if t == "v=spf1" or t.startswith("v=spf1 ")]


def spf_tree(lookup: Lookup, name: str, seen: frozenset[str] = frozenset()) -> SpfTree:
    """Walk a domain's SPF record by its grammar (RFC 7208, section 12)."""
    if name in seen:
        return SpfTree(0, 0, (), (f"{name}: includes itself",))
    records = spf_records(lookup, name)
    if len(records) != 1:
        return SpfTree(0, 1, (), (f"{name}: has {len(records)} SPF records",))
    lookups, void = 0, 0
    terms: list[str] = []
    problems: list[str] = []
    if "  " in records[0] or records[0] != records[0].strip():
        problems.append(f"{name}: blanks too many in {records[0]!r}")
    for term in records[0].split()[1:]:
        terms.append(term)
        if not (_SPF_MECHANISM.fullmatch(term) or _SPF_MODIFIER.fullmatch(term)):
            problems.append(f"{name}: {term!r} is no SPF term")
            continue
        bare = term.lstrip("+?~-")
        kind = re.split(r"[:/=]", bare)[0].lower()
        if kind in _SPF_LOOKUPS or kind == "redirect":
            lookups += 1
        if kind in ("include", "redirect"):
            target = re.split(r"[:=]", bare, maxsplit=1)[1]
            below = spf_tree(lookup, target, seen | {name})
            lookups += below.lookups
            void += below.void
            terms += below.terms
            problems += below.problems
        elif kind == "a" and not lookup.addresses(bare[2:].split("/")[0] or name):
            void += 1
    if (
        "all" not in [t.lstrip("+?~-") for t in records[0].split()]
        and "redirect=" not in records[0]
    ):
        problems.append(f"{name}: has neither 'all' nor 'redirect'")
    return SpfTree(lookups, void, tuple(terms), tuple(problems))
