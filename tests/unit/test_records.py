"""The DNS that follows from site data, read back by libraries that did not write it."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import dns.zone
import pytest
import spf
from hypothesis import given
from hypothesis import strategies as st

from mailsite.loader import load_platform
from mailsite.model import (
    Dmarc,
    DmarcPolicy,
    Interface,
    MailDomain,
    NetworkKind,
    Platform,
    Role,
)
from mailsite.records import (
    TXT_LIMIT,
    TXT_STRING,
    Record,
    RecordError,
    RecordType,
    Stage,
    check,
    dkim_keys,
    dmarc_text,
    domain_spf,
    find_zone,
    inbound_legs,
    ptr_records,
    ptr_text,
    public_key_base64,
    public_name,
    records,
    reverse_zone,
    senders,
    spf_lookups,
    spf_text,
    static_records,
    txt_content,
    txt_strings,
    zone_text,
    zones,
)

SITES = Path(__file__).parents[2] / "sites"
ZONE_FILE = Path(__file__).with_name("test_records_example.zone")
PUBLIC = base64.b64encode(bytes(range(256)) + bytes(38)).decode()


def load(site: str) -> Platform:
    return load_platform(SITES / site)


EXAMPLE = load("example")
PROD = load("prod")
BOTH = pytest.mark.parametrize("platform", [EXAMPLE, PROD], ids=lambda p: p.name)


def keys(platform: Platform) -> Mapping[str, str]:
    return {f"{d.name}/{k.selector}": PUBLIC for d, k in dkim_keys(platform)}


def everything(platform: Platform) -> tuple[Record, ...]:
    """All records of a platform."""
    return records(platform, keys(platform))


def changed(platform: Platform, **parts: Any) -> Platform:
    return platform.model_copy(update=parts)


def with_domain(domain: MailDomain, platform: Platform = EXAMPLE) -> Platform:
    return changed(platform, domains={**platform.domains, domain.name: domain})


def at(found: Sequence[Record], name: str, kind: RecordType) -> list[Record]:
    return [r for r in found if r.name == name and r.type is kind]


def text_at(found: Sequence[Record], name: str) -> str:
    (record,) = at(found, name, RecordType.TXT)
    return record.content


# -- TXT --------------------------------------------------------------------------------------

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=TXT_LIMIT)


@given(PRINTABLE)
def test_strings_of_a_txt_record_are_short_and_join_to_the_text(text: str) -> None:
    strings = txt_strings(text)
    assert "".join(strings) == text
    assert all(len(s.encode()) <= TXT_STRING for s in strings)
    assert len(strings) == 1 or all(strings)


@given(PRINTABLE)
def test_quoting_survives_a_dns_library(text: str) -> None:
    rdata: Any = dns.rdata.from_text(dns.rdataclass.IN, dns.rdatatype.TXT, txt_content(text))
    assert b"".join(rdata.strings) == text.encode()


IP6_TERMS = st.text("0123456789abcdef:", min_size=4, max_size=30).map("ip6:{}/48".format)


@given(st.lists(IP6_TERMS, min_size=1, max_size=90))
def test_terms_of_a_long_spf_record_stay_apart(terms: list[str]) -> None:
    text = spf_text([*terms, "~all"])
    joined = "".join(txt_strings(text))
    assert joined.split(" ") == ["v=spf1", *terms, "~all"]


def test_a_long_record_is_cut_after_a_space() -> None:
    strings = txt_strings(spf_text([f"ip4:192.0.2.{n}" for n in range(40)]))
    assert len(strings) > 1
    assert all(s.endswith(" ") for s in strings[:-1])


@pytest.mark.parametrize("bits", [2048, 3072, 4096])
def test_a_dkim_key_of_any_size_fits_and_joins(bits: int) -> None:
    public = base64.b64encode(bytes(bits // 8 + 38)).decode()
    strings = txt_strings(f"v=DKIM1; k=rsa; p={public}")
    assert all(len(s) <= 255 for s in strings)
    assert "".join(strings).endswith(public)


@pytest.mark.parametrize("text", ["tab\there", "Zürich", "line\nbreak", "x" * (TXT_LIMIT + 1)])
def test_a_text_that_no_record_can_hold_is_refused(text: str) -> None:
    with pytest.raises(RecordError):
        txt_strings(text)


# -- the whole, for both sites ----------------------------------------------------------------


@BOTH
def test_every_zone_is_read_by_a_dns_library_and_holds_each_record_once(
    platform: Platform,
) -> None:
    found = everything(platform)
    texts = zone_text(found).split("$ORIGIN ")[1:]
    assert len(texts) == len({r.zone for r in found})
    count = 0
    for text in texts:
        origin = text.split("\n", 1)[0]
        zone = dns.zone.from_text(
            f"$ORIGIN {text}", origin=origin, relativize=False, check_origin=False
        )
        count += sum(len(rdataset) for _, rdataset in zone.iterate_rdatasets())
    assert count == len(found)


def test_the_zones_of_the_example_are_as_on_file() -> None:
    assert zone_text(everything(EXAMPLE)) == ZONE_FILE.read_text()


@BOTH
def test_every_record_has_a_short_reason_and_a_valid_lifetime(platform: Platform) -> None:
    for record in everything(platform):
        assert 0 < len(record.why) <= 100
        assert 60 <= record.ttl <= 86400


@BOTH
def test_names_are_fqdns_without_a_trailing_dot_inside_their_zone(platform: Platform) -> None:
    for record in everything(platform):
        assert not record.name.endswith(".")
        assert record.name == record.zone or record.name.endswith(f".{record.zone}")
        assert record.content == "." or not record.content.endswith(".")


@BOTH
def test_every_host_and_gateway_has_its_own_names(platform: Platform) -> None:
    found = static_records(platform)
    for host in platform.hosts.values():
        leg = platform.internal_leg(host)
        assert [r.content for r in at(found, host.name, RecordType.A)] == [str(leg.ipv4)]
        assert [r.content for r in at(found, host.name, RecordType.AAAA)] == [str(leg.ipv6)]
        outside = platform.leg(host, NetworkKind.PUBLIC)
        if outside is not None and outside != leg:
            name = public_name(platform, host)
            assert [r.content for r in at(found, name, RecordType.A)] == [str(outside.ipv4)]
    for name, egress in platform.egress.items():
        assert [r.content for r in at(found, name, RecordType.AAAA)] == [str(egress.ipv6)]


@BOTH
def test_service_names_lead_to_all_members(platform: Platform) -> None:
    found = static_records(platform)
    inside = f"smtp-out.{platform.internal_domain}"
    members = [platform.internal_leg(h) for h in platform.members(Role.SMTP_OUT)]
    assert [r.content for r in at(found, inside, RecordType.A)] == [str(m.ipv4) for m in members]
    assert {r.ttl for r in found if r.name == inside} == {60}
    legs = [platform.leg(h, NetworkKind.PUBLIC) for h in platform.members(Role.FRONTEND)]
    frontend = platform.names.frontend
    assert [r.content for r in at(found, frontend, RecordType.AAAA)] == [
        str(leg.ipv6) for leg in legs if leg is not None
    ]
    assert {r.ttl for r in found if r.name == frontend and r.type != "TXT"} == {600}
    (alias,) = [r for r in found if r.name == platform.names.smtp_out]
    assert (alias.type, alias.content, alias.ttl) == (RecordType.CNAME, frontend, 3600)


@BOTH
def test_names_of_hosts_come_first_then_policies_then_services(platform: Platform) -> None:
    for record in everything(platform):
        if record.type is RecordType.TXT or record.content == ".":
            assert record.stage is Stage.POLICY
        elif record.name in platform.hosts or record.name in platform.egress:
            assert record.stage is Stage.HOST
        else:
            domain = record.name == platform.maildrop_domain
            assert (record.stage is Stage.MX) == (record.type is RecordType.MX and not domain)
    assert {r.stage for r in static_records(platform)} == set(Stage)


@BOTH
def test_every_domain_has_one_spf_one_dmarc_and_its_keys(platform: Platform) -> None:
    found = everything(platform)
    for domain in platform.domains.values():
        assert text_at(found, domain.name).startswith("v=spf1 ")
        assert text_at(found, f"_dmarc.{domain.name}").startswith("v=DMARC1; p=")
        for key in domain.dkim:
            name = f"{key.selector}._domainkey.{domain.name}".lower()
            assert text_at(found, name) == f"v=DKIM1; k=rsa; p={PUBLIC}"


@BOTH
def test_keys_of_records_tell_them_apart(platform: Platform) -> None:
    found = everything(platform)
    assert len({r.key for r in found}) == len(found)


@BOTH
def test_an_address_added_to_a_name_leaves_the_keys_of_the_others(platform: Platform) -> None:
    fewer = {n: h for n, h in platform.hosts.items() if Role.FRONTEND not in h.roles}
    one = next(h for h in platform.hosts.values() if Role.FRONTEND in h.roles)
    less = changed(platform, hosts={**fewer, one.name: one})
    assert {r.key for r in static_records(less)} < {r.key for r in static_records(platform)}


# -- SPF --------------------------------------------------------------------------------------


class FakeDns:
    """Answers pyspf from records alone; anything else does not exist."""

    def __init__(self, found: Sequence[Record]) -> None:
        self.found = found
        self.asked = 0

    def __call__(
        self, name: str, qtype: str, *_: object, **__: object
    ) -> list[tuple[tuple[str, str], Any]]:
        wanted = name.lower().rstrip(".")
        answers: list[tuple[tuple[str, str], Any]] = []
        for record in self.found:
            if record.name == wanted and record.type is RecordType.CNAME:
                return [((name, "CNAME"), record.content), *self(record.content, qtype)]
            if record.name == wanted and record.type.value == qtype:
                value: Any = record.content
                if qtype == "TXT":
                    value = tuple(s.encode() for s in txt_strings(record.content))
                answers.append(((name, qtype), value))
        return answers


def spf_result(
    monkeypatch: pytest.MonkeyPatch, platform: Platform, address: str, sender: str, helo: str
) -> str:
    monkeypatch.setattr(spf, "DNSLookup", FakeDns(everything(platform)))
    result, _ = spf.check2(i=address, s=sender, h=helo)
    return str(result)


@BOTH
def test_mail_from_every_sending_address_passes_spf(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    helo = platform.names.smtp_out
    for address in senders(platform):
        for domain in platform.domains.values():
            result = spf_result(monkeypatch, platform, str(address), f"x@{domain.name}", helo)
            assert result == ("pass" if domain.sends else "fail")


@BOTH
def test_a_bounce_passes_spf_by_its_helo_name(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    helo = platform.names.smtp_out
    for address in senders(platform):
        assert spf_result(monkeypatch, platform, str(address), "", helo) == "pass"
    assert spf_result(monkeypatch, platform, "203.0.113.99", "", helo) == "fail"


@BOTH
def test_mail_from_elsewhere_does_not_pass_spf(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    for domain in platform.domains.values():
        result = spf_result(monkeypatch, platform, "203.0.113.99", f"x@{domain.name}", "h.invalid")
        assert result in ("softfail", "fail")


def test_the_operators_own_senders_come_first_in_the_one_record() -> None:
    domain = MailDomain(
        name="example.org", spf=("mx", "include:spf.example.net", "mx"), spf_all="-all"
    )
    assert domain_spf(EXAMPLE, domain) == (
        "v=spf1 mx include:spf.example.net include:_spf.example.org -all"
    )


def test_the_platforms_include_stands_once_even_if_written_by_hand() -> None:
    domain = MailDomain(name="example.org", spf=("include:_spf.example.org",))
    assert domain_spf(EXAMPLE, domain) == "v=spf1 include:_spf.example.org ~all"


@pytest.mark.parametrize(
    "term",
    ["v=spf1", "-all", "all", "redirect=other.example.org", "ip4:1.2.3.4 mx", "", "include:"],
)
def test_a_term_that_would_break_the_record_is_refused(term: str) -> None:
    with pytest.raises(RecordError, match=r"domains/example\.org\.yaml"):
        domain_spf(EXAMPLE, MailDomain(name="example.org", spf=(term,)))


def test_a_family_without_blocks_has_no_record() -> None:
    only4 = changed(EXAMPLE, spf=EXAMPLE.spf.model_copy(update={"ipv6": ()}))
    found = static_records(only4)
    assert text_at(found, "_spf.example.org") == "v=spf1 include:_spf4.example.org ~all"
    assert at(found, "_spf6.example.org", RecordType.TXT) == []


@given(
    st.lists(st.ip_addresses(v=4), max_size=60, unique=True),
    st.lists(st.ip_addresses(v=6), max_size=60, unique=True),
)
def test_any_list_of_blocks_reads_back_in_order(v4: list[Any], v6: list[Any]) -> None:
    blocks = {
        "ipv4": tuple(IPv4Network(a) for a in v4),
        "ipv6": tuple(IPv6Network(a) for a in v6),
    }
    platform = changed(EXAMPLE, spf=EXAMPLE.spf.model_copy(update=blocks))
    found = static_records(platform)
    for family, prefix in ((4, "ip4:"), (6, "ip6:")):
        for record in at(found, f"_spf{family}.example.org", RecordType.TXT):
            joined = "".join(txt_strings(record.content))
            terms = joined.split()[1:-1]
            assert terms == [f"{prefix}{b}" for b in blocks[f"ipv{family}"]]


@given(st.integers(0, 12), st.integers(0, 3), st.booleans(), st.booleans())
def test_lookups_are_counted_as_the_rfc_counts(
    includes: int, addresses: int, mx: bool, a: bool
) -> None:
    own = [f"include:s{n}.example.net" for n in range(includes)]
    own += [f"ip4:192.0.2.{n}" for n in range(addresses)]
    own += ["mx"] * mx + ["a:mail.example.net"] * a
    known = {r.name: r.content for r in static_records(EXAMPLE) if r.type is RecordType.TXT}
    text = domain_spf(EXAMPLE, MailDomain(name="example.org", spf=tuple(own)))
    assert spf_lookups(text, known) == includes + mx + a + 3  # _spf, _spf4, _spf6


@pytest.mark.parametrize(("own", "fits"), [(7, True), (8, False)])
def test_ten_lookups_are_the_limit(own: int, fits: bool) -> None:
    terms = tuple(f"include:s{n}.example.net" for n in range(own))
    platform = with_domain(MailDomain(name="example.org", spf=terms))
    if fits:
        static_records(platform)
    else:
        with pytest.raises(RecordError, match=r"example\.org: .* 11 DNS lookups.*domains/"):
            static_records(platform)


def test_includes_in_a_circle_are_refused() -> None:
    known = {"a.example.org": "v=spf1 include:b.example.org", "b.example.org": ""}
    known["b.example.org"] = "v=spf1 include:a.example.org"
    with pytest.raises(RecordError, match="circle"):
        spf_lookups("v=spf1 include:a.example.org", known)


# -- DMARC, domains that never send -----------------------------------------------------------


def test_a_domain_that_never_sends_says_so_three_times() -> None:
    platform = with_domain(MailDomain(name="example.edu", sends=False, receives=False))
    found = static_records(platform)
    assert text_at(found, "example.edu") == "v=spf1 -all"
    assert text_at(found, "_dmarc.example.edu").startswith("v=DMARC1; p=reject")
    (mx,) = at(found, "example.edu", RecordType.MX)
    assert (mx.content, mx.priority, mx.rdata) == (".", 0, "0 .")


def test_a_domain_that_only_receives_gets_no_null_mx() -> None:
    platform = with_domain(MailDomain(name="example.edu", sends=False, receives=True))
    found = static_records(platform)
    (record,) = at(found, "example.edu", RecordType.MX)
    assert record.content == platform.names.smtp_in
    assert text_at(found, "example.edu") == "v=spf1 -all"


def test_dmarc_carries_every_part_of_the_policy() -> None:
    policy = Dmarc(
        policy=DmarcPolicy.QUARANTINE,
        subdomain_policy=DmarcPolicy.REJECT,
        rua=("a@example.org", "b@example.net"),
    )
    assert dmarc_text(policy) == (
        "v=DMARC1; p=quarantine; sp=reject; rua=mailto:a@example.org,mailto:b@example.net"
    )


def test_reports_to_another_zone_of_ours_are_welcome_there() -> None:
    found = static_records(EXAMPLE)
    name = "lists.example.net._report._dmarc.example.org"
    assert text_at(found, name) == "v=DMARC1"
    assert not any(r.name.startswith("example.org._report") for r in found)


def test_consent_for_reports_to_strangers_is_theirs_to_give() -> None:
    dmarc = Dmarc(rua=("reports@dmarc.invalid",))
    platform = with_domain(MailDomain(name="example.edu", dmarc=dmarc))
    assert not any("example.edu._report" in r.name for r in static_records(platform))


# -- zones ------------------------------------------------------------------------------------


def test_a_name_lies_in_the_deepest_zone_that_holds_it() -> None:
    platform = with_domain(MailDomain(name="sub.example.org"))
    assert find_zone(platform, "x.sub.example.org") == "sub.example.org"
    assert find_zone(platform, "xsub.example.org") == "example.org"
    assert find_zone(platform, "example.edu") is None


def test_an_internal_domain_of_its_own_is_a_zone_too() -> None:
    assert "hosts.example.edu" in zones(changed(EXAMPLE, internal_domain="hosts.example.edu"))
    assert "hosts.example.org" not in zones(EXAMPLE)


def test_a_service_name_outside_all_zones_is_refused() -> None:
    names = EXAMPLE.names.model_copy(update={"smtp_out": "submission.example.edu"})
    with pytest.raises(RecordError, match=r"names\.smtp_out 'submission\.example\.edu'"):
        static_records(changed(EXAMPLE, names=names))


def test_a_gateway_named_by_somebody_else_is_left_to_them() -> None:
    (name, egress), *rest = PROD.egress.items()
    platform = changed(PROD, egress={"gw.example.edu": egress, **dict(rest)})
    found = static_records(platform)
    assert not any(r.name in (name, "gw.example.edu") for r in found)
    assert "gw.example.edu." in ptr_text(platform)


# -- contradictions ---------------------------------------------------------------------------


def record(kind: RecordType, content: str, name: str = "a.example.org") -> Record:
    return Record(
        zone="example.org",
        name=name,
        type=kind,
        ttl=300,
        content=content,
        why="test",
        stage=Stage.HOST,
        priority=10 if kind is RecordType.MX else None,
    )


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([record(RecordType.A, "192.0.2.1")] * 2, "two records"),
        (
            [record(RecordType.TXT, "v=spf1 -all"), record(RecordType.TXT, "v=spf1 mx -all")],
            "two records",
        ),
        (
            [record(RecordType.CNAME, "b.example.org"), record(RecordType.A, "192.0.2.1")],
            "CNAME stands alone",
        ),
        (
            [
                record(RecordType.MX, "b.example.org"),
                record(RecordType.CNAME, "c.example.org", "b.example.org"),
            ],
            "which is a CNAME",
        ),
        ([record(RecordType.A, "192.0.2.1", "a.example.net")], "outside its zone"),
        ([record(RecordType.TXT, "x" * 5000)], "5000 bytes"),
    ],
)
def test_records_that_contradict_each_other_are_refused(found: list[Record], words: str) -> None:
    with pytest.raises(RecordError, match=words):
        check(found)


def test_a_frontend_name_that_is_a_mail_domain_too_is_refused() -> None:
    names = EXAMPLE.names.model_copy(update={"frontend": "example.org"})
    with pytest.raises(RecordError, match="two records"):
        static_records(changed(EXAMPLE, names=names))


def test_frontends_without_a_public_leg_are_refused() -> None:
    networks = {
        n: net.model_copy(update={"kind": NetworkKind.SITE_LOCAL})
        for n, net in EXAMPLE.networks.items()
    }
    with pytest.raises(RecordError, match="no frontend has a leg"):
        static_records(changed(EXAMPLE, networks=networks))


def test_a_missing_dkim_key_is_named() -> None:
    with pytest.raises(RecordError, match=r"'example\.org/s2026'"):
        records(EXAMPLE, {})


def test_a_public_key_may_come_as_pem() -> None:
    pem = f"-----BEGIN PUBLIC KEY-----\n{PUBLIC[:64]}\n{PUBLIC[64:]}\n-----END PUBLIC KEY-----\n"
    assert public_key_base64(pem) == public_key_base64(PUBLIC) == PUBLIC


# -- PTR --------------------------------------------------------------------------------------


@BOTH
def test_every_sending_address_has_a_ptr_that_leads_back_to_it(platform: Platform) -> None:
    forward = {(r.name, r.content) for r in static_records(platform)}
    pointers = {r.name: r.content for r in ptr_records(platform)}
    for address, name in senders(platform).items():
        owner = str(dns.reversename.from_address(str(address))).rstrip(".")
        assert pointers[owner] == name
        assert (name, str(address)) in forward


@BOTH
def test_every_address_of_every_host_has_one_ptr(platform: Platform) -> None:
    names = [r.name for r in ptr_records(platform)]
    wanted = {a.reverse_pointer for h in platform.hosts.values() for a in h.addresses}
    assert wanted <= set(names)
    assert len(names) == len(set(names))


@given(st.ip_addresses())
def test_a_reverse_zone_holds_its_address(address: Any) -> None:
    zone = reverse_zone(address)
    assert address.reverse_pointer.endswith(f".{zone}")
    assert zone.endswith(".ip6.arpa" if address.version == 6 else ".in-addr.arpa")
    assert zone.count(".") == (17 if address.version == 6 else 4)


@BOTH
def test_reverse_zones_are_read_by_a_dns_library(platform: Platform) -> None:
    for text in ptr_text(platform).split("$ORIGIN ")[1:]:
        origin = text.split("\n", 1)[0]
        dns.zone.from_text(f"$ORIGIN {text}", origin=origin, relativize=False, check_origin=False)


def test_members_behind_a_gateway_send_from_it_and_others_as_themselves() -> None:
    inbound = {a for leg in inbound_legs(PROD).values() for a in (leg.ipv4, leg.ipv6)}
    behind = {name for address, name in senders(PROD).items() if address not in inbound}
    assert behind == set(PROD.egress)
    member = EXAMPLE.members(Role.SMTP_OUT)[0]
    leg: Interface = member.interfaces[0]
    assert senders(EXAMPLE)[leg.ipv6] == member.name


def test_a_member_with_two_legs_sends_by_its_public_name() -> None:
    two_legs = PROD.members(Role.SMTP_IN)[0]
    member = two_legs.model_copy(update={"roles": (Role.SMTP_OUT,)})
    platform = changed(PROD, hosts={**PROD.hosts, member.name: member})
    leg = platform.leg(member, NetworkKind.PUBLIC)
    assert leg is not None
    assert senders(platform)[leg.ipv4] == public_name(PROD, member) != member.name


# -- inbound ----------------------------------------------------------------------------------


def mx(found: Iterable[Record]) -> dict[str, tuple[int | None, str, int]]:
    """Every MX but those of the mailboxes, which lead to the replicas."""
    return {
        r.name: (r.priority, r.content, r.ttl)
        for r in found
        if r.type is RecordType.MX and r.ttl == 86400
    }


@BOTH
def test_every_domain_that_takes_mail_has_its_mx_at_smtp_in(platform: Platform) -> None:
    found = static_records(platform)
    here = (10, platform.names.smtp_in, 86400)
    wanted = {d.name: here for d in platform.domains.values() if d.receives}
    wanted |= {d.name: (0, ".", 86400) for d in platform.domains.values() if not d.receives}
    assert mx(found) == wanted | {platform.inbound.srs_domain: here}
    assert {r.stage for r in found if r.content == platform.names.smtp_in} == {Stage.MX}


@BOTH
def test_smtp_in_is_all_members_by_their_public_side(platform: Platform) -> None:
    found = static_records(platform)
    name = platform.names.smtp_in
    legs = [platform.leg(h, NetworkKind.PUBLIC) for h in platform.members(Role.SMTP_IN)]
    wanted = [str(a) for leg in legs if leg for a in (leg.ipv4, leg.ipv6)]
    here = [r for r in found if r.name == name]
    assert sorted(r.content for r in here) == sorted(wanted)
    assert {(r.ttl, r.stage) for r in here} == {(60, Stage.SERVICE)}
    assert {r.type for r in here} == {RecordType.A, RecordType.AAAA}


@BOTH
def test_rspamd_is_all_members_by_their_internal_side(platform: Platform) -> None:
    found = static_records(platform)
    legs = [platform.internal_leg(h) for h in platform.members(Role.RSPAMD)]
    here = [r for r in found if r.name == f"rspamd.{platform.internal_domain}"]
    assert {r.content for r in here} == {str(a) for leg in legs for a in (leg.ipv4, leg.ipv6)}
    assert {r.ttl for r in here} == {60}


@BOTH
def test_forwards_and_bounces_pass_spf_at_each_member_of_smtp_in(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = f"SRS0=abcd=ef=elsewhere.example=user@{platform.inbound.srs_domain}"
    for leg in inbound_legs(platform).values():
        for address in (leg.ipv4, leg.ipv6):
            helo = senders(platform)[address]
            assert spf_result(monkeypatch, platform, str(address), sender, helo) == "pass"
            assert spf_result(monkeypatch, platform, str(address), "", helo) == "pass"
            assert spf_result(monkeypatch, platform, "203.0.113.99", "", helo) == "fail"
    assert spf_result(monkeypatch, platform, "203.0.113.99", sender, "x.example") == "fail"


def test_a_retired_domain_loses_its_mx_and_nothing_else() -> None:
    old = EXAMPLE.domains["lists.example.net"].model_copy(update={"retired": True})
    before = static_records(EXAMPLE)
    after = static_records(with_domain(old))
    (gone,) = set(before) - set(after)
    assert (gone.name, gone.type, set(after) < set(before)) == (old.name, RecordType.MX, True)


def test_a_platform_that_takes_no_mail_has_no_mx() -> None:
    hosts = {n: h for n, h in EXAMPLE.hosts.items() if Role.SMTP_IN not in h.roles}
    found = static_records(changed(EXAMPLE, hosts=hosts))
    assert all(content == "." for _, content, _ in mx(found).values())


def test_an_srs_domain_in_no_zone_of_ours_is_refused() -> None:
    inbound = EXAMPLE.inbound.model_copy(update={"srs_domain": "srs.example.edu"})
    with pytest.raises(RecordError, match=r"inbound.srs_domain 'srs.example.edu' lies in none"):
        static_records(changed(EXAMPLE, inbound=inbound))


def test_the_records_of_five_thousand_domains_are_no_effort() -> None:
    more = {f"d{n}.example": MailDomain(name=f"d{n}.example", sends=False) for n in range(5000)}
    platform = changed(EXAMPLE, domains={**EXAMPLE.domains, **more})
    start = time.process_time()
    found = static_records(platform)
    assert time.process_time() - start < 5
    assert len(mx(found)) > 5000


# -- mailboxes --------------------------------------------------------------------------------


@BOTH
def test_mail_for_mailboxes_prefers_the_primary(platform: Platform) -> None:
    assert platform.maildrop is not None
    found = at(static_records(platform), platform.maildrop_domain, RecordType.MX)
    assert [(r.priority, r.ttl) for r in found] == [(10, 300), (20, 300)]
    assert found[0].content == platform.maildrop.primary
    members = {host.name for host in platform.members(Role.MAILDROP)}
    assert {r.content for r in found} == members


def test_the_other_replica_can_be_the_primary() -> None:
    assert EXAMPLE.maildrop is not None
    other = EXAMPLE.members(Role.MAILDROP)[1].name
    settings = EXAMPLE.maildrop.model_copy(update={"primary": other})
    found = static_records(changed(EXAMPLE, maildrop=settings))
    first = min(at(found, EXAMPLE.maildrop_domain, RecordType.MX), key=lambda r: r.priority or 0)
    assert first.content == other


@BOTH
def test_webmail_finds_both_replicas_by_one_name(platform: Platform) -> None:
    found = static_records(platform)
    legs = [platform.internal_leg(host) for host in platform.members(Role.MAILDROP)]
    here = [r for r in found if r.name == platform.webmail_backend]
    assert {r.content for r in here} == {str(a) for leg in legs for a in (leg.ipv4, leg.ipv6)}
    assert {r.ttl for r in here} == {300}


@BOTH
def test_mail_clients_come_in_through_the_frontends(platform: Platform) -> None:
    (imap,) = at(static_records(platform), platform.names.imap, RecordType.CNAME)
    assert (imap.content, imap.ttl) == (platform.names.frontend, 60)


def test_a_platform_without_mailboxes_has_no_records_for_them() -> None:
    hosts = {n: h for n, h in EXAMPLE.hosts.items() if Role.MAILDROP not in h.roles}
    platform = changed(EXAMPLE, hosts=hosts, maildrop=None)
    names = {r.name for r in static_records(platform)}
    assert not names & {platform.maildrop_domain, platform.webmail_backend, platform.names.imap}
