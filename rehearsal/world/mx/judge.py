"""What a careful receiver thinks of a message: SPF, DKIM and DMARC.

SPF by pyspf (RFC 7208, its limit of ten lookups enforced), DKIM by dkimpy (RFC 6376), both from
what the resolver says at that moment. DMARC (RFC 7489) is evaluated here: the policy record of
the From domain or else of its organizational domain, alignment in relaxed or strict mode,
``sp``; ``pct`` and reports are left out. The organizational domain comes from the public suffix
list of Debian; a top-level domain that is not in it counts as a public suffix, as the list's own
default rule says.
"""

from __future__ import annotations

import email
import email.policy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from email.headerregistry import AddressHeader
from typing import Any

import dkim  # type: ignore[import-untyped]
import dns.exception
import dns.resolver
import spf  # type: ignore[import-untyped]

_LOOKUP_SECONDS = 5
_SPF_SECONDS = 20


class TemporaryError(Exception):
    """The resolver gave no usable answer: try again later."""


class _TemporaryKeyError(dkim.DKIMException):  # type: ignore[misc]
    pass


@dataclass(frozen=True)
class Signature:
    """One DKIM-Signature header field and what became of its verification.

    ``result`` is pass, fail, permerror or temperror; the letters are the field's own tags.
    """

    d: str
    s: str
    a: str
    c: str
    i: str
    result: str
    reason: str


@dataclass(frozen=True)
class Dmarc:
    """``result`` is pass, fail, none, permerror or temperror; ``policy`` what the domain asks."""

    result: str
    policy: str = ""
    domain: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    spf: str
    spf_reason: str
    dkim: tuple[Signature, ...]
    dmarc: Dmarc

    def record(self) -> dict[str, Any]:
        """The verdict as it is written down."""
        return {
            "spf": self.spf,
            "spf_reason": self.spf_reason,
            "dkim": [asdict(signature) for signature in self.dkim],
            "dmarc": self.dmarc.result,
            "dmarc_policy": self.dmarc.policy,
            "dmarc_reason": self.dmarc.reason,
            "from_domain": self.dmarc.domain,
        }


TxtLookup = Callable[[str], list[str]]
"""Texts of a name's TXT records, the strings of each joined; empty where there are none."""


def judge(
    message: bytes,
    *,
    peer: str,
    helo: str,
    sender: str,
    organizational_domain: Callable[[str], str],
) -> Verdict:
    """Verify ``message`` as received from ``peer`` with the envelope ``sender`` (may be empty)."""
    spf_result, reason = spf.check2(i=peer, s=sender, h=helo, querytime=_SPF_SECONDS)
    signatures = signatures_of(message)
    spf_domain = (sender.rpartition("@")[2] or helo).lower()
    return Verdict(
        spf=spf_result,
        spf_reason=reason,
        dkim=signatures,
        dmarc=dmarc_of(
            message,
            spf_domain if spf_result == "pass" else None,
            tuple(s.d.lower() for s in signatures if s.result == "pass"),
            organizational_domain,
        ),
    )


def objection(verdict: Verdict) -> str | None:
    """The reply of a server that takes nothing but mail that passes everything; None: it passes.

    A sender without an SPF record (a bounce has no sender at all) may pass by DKIM alone.
    """
    if "temperror" in (verdict.spf, verdict.dmarc.result, *(s.result for s in verdict.dkim)):
        return "451 4.7.0 DNS gave no answer for SPF, DKIM or DMARC"
    if verdict.spf not in ("pass", "none"):
        return f"550 5.7.23 SPF: {verdict.spf}"
    if not verdict.dkim:
        return "550 5.7.20 DKIM: no signature"
    for signature in verdict.dkim:
        if signature.result != "pass":
            return f"550 5.7.20 DKIM: {signature.result} for {signature.d}"
    if verdict.dmarc.result != "pass":
        return f"550 5.7.1 DMARC: {verdict.dmarc.result} for {verdict.dmarc.domain}"
    return None


def unauthorized(verdict: Verdict) -> str | None:
    """The reply of a server that takes mail of authorized senders alone; None: it is authorized.

    SPF must pass, of the HELO name where there is no sender. Where the author's domain asks for
    more than reports, DMARC must pass.
    """
    if "temperror" in (verdict.spf, verdict.dmarc.result):
        return "451 4.7.0 DNS gave no answer for SPF or DMARC"
    if verdict.spf != "pass":
        return f"550 5.7.23 SPF: {verdict.spf}"
    if verdict.dmarc.result == "fail" and verdict.dmarc.policy in ("quarantine", "reject"):
        return f"550 5.7.1 DMARC: {verdict.dmarc.reason} for {verdict.dmarc.domain}"
    return None


def signatures_of(message: bytes) -> tuple[Signature, ...]:
    """Verify every DKIM signature, first to last."""
    try:
        count = sum(
            name.lower() == b"dkim-signature" for name, _ in dkim.DKIM(message, minkey=1024).headers
        )
    except dkim.DKIMException:
        return ()
    return tuple(_signature(message, index) for index in range(count))


def _signature(message: bytes, index: int) -> Signature:
    verifier = dkim.DKIM(message, minkey=1024, timeout=_LOOKUP_SECONDS)
    value = [v for name, v in verifier.headers if name.lower() == b"dkim-signature"][index]
    try:
        fields = dkim.util.parse_tag_value(value)
    except dkim.util.InvalidTagValueList as error:
        return Signature("", "", "", "", "", "permerror", str(error))
    tags = {k.decode("ascii", "replace"): v.decode("ascii", "replace") for k, v in fields.items()}
    problem = ""

    def key(name: bytes, timeout: int = _LOOKUP_SECONDS) -> bytes | None:
        """The key record; several at one name are no key (RFC 6376, section 3.6.2.2)."""
        nonlocal problem
        try:
            texts = txt(name.decode("ascii", "replace"))
        except TemporaryError as error:
            raise _TemporaryKeyError(str(error)) from error
        if len(texts) != 1:
            problem = f"{len(texts)} key records at {name.decode('ascii', 'replace')}"
            return None
        return texts[0].encode()

    try:
        if verifier.verify(idx=index, dnsfunc=key):
            result, reason = "pass", ""
        elif problem:
            result, reason = "permerror", problem
        else:
            result, reason = "fail", "the signature does not verify"
    except _TemporaryKeyError as error:
        result, reason = "temperror", str(error)
    except dkim.ValidationError as error:
        result, reason = "fail", str(error)
    except dkim.DKIMException as error:
        result, reason = "permerror", str(error)
    d, s, a, c, i = (tags.get(tag, "") for tag in "dsaci")
    return Signature(d, s, a, c, i, result, reason)


def txt(name: str) -> list[str]:
    """TXT records of ``name``; raises :class:`TemporaryError` where the resolver fails."""
    try:
        answer = dns.resolver.resolve(name, "TXT", lifetime=_LOOKUP_SECONDS)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return []
    except dns.exception.DNSException as error:
        raise TemporaryError(f"TXT {name}: {error}") from error
    return [b"".join(rdata.strings).decode("utf-8", "replace") for rdata in answer]


def dmarc_of(
    message: bytes,
    spf_domain: str | None,
    dkim_domains: tuple[str, ...],
    organizational_domain: Callable[[str], str],
    lookup: TxtLookup = txt,
) -> Dmarc:
    """Evaluate DMARC.

    :param spf_domain: the domain that SPF passed for; None where it did not pass.
    :param dkim_domains: ``d=`` of each signature that passed.
    """
    try:
        domain = from_domain(message)
    except ValueError as error:
        return Dmarc("permerror", reason=str(error))
    try:
        found = _policy(domain, organizational_domain(domain), lookup)
    except TemporaryError as error:
        return Dmarc("temperror", domain=domain, reason=str(error))
    if found is None:
        return Dmarc("none", domain=domain, reason="no policy record")
    tags, policy = found

    def aligned(other: str, mode: str) -> bool:
        if mode == "s":
            return other == domain
        return organizational_domain(other) == organizational_domain(domain)

    by_spf = spf_domain is not None and aligned(spf_domain, tags.get("aspf", "r"))
    by_dkim = any(aligned(d, tags.get("adkim", "r")) for d in dkim_domains)
    reason = ", ".join(
        f"{what} {'aligned' if yes else 'not aligned'}"
        for what, yes in (("spf", by_spf), ("dkim", by_dkim))
    )
    return Dmarc("pass" if by_spf or by_dkim else "fail", policy, domain, reason)


def from_domain(message: bytes) -> str:
    """The domain of the author; ``ValueError`` unless there is exactly one (RFC 7489, 6.6.1)."""
    headers = email.message_from_bytes(message, policy=email.policy.SMTP).get_all("From", [])
    if len(headers) != 1:
        raise ValueError(f"{len(headers)} From header fields")
    header = headers[0]
    addresses = header.addresses if isinstance(header, AddressHeader) else ()
    domains = {address.domain.lower().rstrip(".") for address in addresses}
    if len(domains) != 1 or "" in domains:
        raise ValueError(f"From names {len(domains)} domains")
    return str(domains.pop())


def _policy(domain: str, organization: str, lookup: TxtLookup) -> tuple[dict[str, str], str] | None:
    """Tags of the record that applies, and the policy it asks for mail of ``domain``."""
    for name in dict.fromkeys((domain, organization)):
        texts = [t for t in lookup(f"_dmarc.{name}") if t.replace(" ", "").startswith("v=DMARC1")]
        if len(texts) == 1:
            pairs = (part.partition("=") for part in texts[0].split(";"))
            tags = {tag.strip().lower(): value.strip() for tag, _, value in pairs if tag.strip()}
            policy = tags.get("p", "none")
            return tags, policy if name == domain else tags.get("sp", policy)
        if texts:
            return None
    return None
