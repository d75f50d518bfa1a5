"""Faults of smtp-in that its checks must see."""

from __future__ import annotations

from pathlib import Path

import pytest

from mailsite.model import Host
from verify import addresses, runner, smtp_in
from verify.checks import checks
from verify.context import Context, eventually, expect
from verify.lab import Entry, Lab
from verify.report import Status

from .faults import changed_by_hand, changed_zone, edit, entry, expect_green, expect_red, setting

POSTFIX = "postfix.service"
MAIN = "/etc/postfix/main.cf"
MASTER = "/etc/postfix/master.cf"
VIRTUAL = "/etc/postfix/virtual"
BUILD = ("postmap", f"lmdb:{VIRTUAL}")


def _expect_passes(context: Context, identifier: str) -> None:
    result = runner.make(checks[identifier], context)
    expect(result.status is Status.PASS, f"{identifier}: {result.observed}")


@pytest.fixture
def member(platform_up: Context) -> Host:
    return smtp_in.members(platform_up)[-1]


@pytest.fixture
def alone(member: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A member that checks take for the only one: what they do is the same, and takes less time."""
    monkeypatch.setattr(smtp_in, "members", lambda context: (member,))
    return member


def test_a_member_with_another_certificate_turns_in_1_red(
    platform_up: Context, member: Host
) -> None:
    lab, name = platform_up.lab, platform_up.platform.names.smtp_in
    for _, chain, key in lab.wrong_certificates(name):
        with lab.machine(member).presenting(chain, key):
            expect_red(platform_up, "IN-1", f"(?i)mismatch|self-signed|not valid for '{name}'")
    # A process that serves somebody goes on with what it has read.
    eventually(lambda: _expect_passes(platform_up, "IN-1"), seconds=10)


def test_tls_for_everyone_turns_in_1_red(platform_up: Context, member: Host) -> None:
    with changed_by_hand(
        platform_up, member, setting("smtpd_tls_security_level=encrypt"), restart=POSTFIX
    ):
        expect_red(platform_up, "IN-1", "530 5.7.0 Must issue a STARTTLS command first")


def test_an_address_that_leads_elsewhere_turns_in_2_red(platform_up: Context, alone: Host) -> None:
    case = smtp_in.existing(platform_up)
    moved = edit(VIRTUAL, rf"s/^{case} .*/{case} other@{platform_up.lab.world.domain('generic')}/")
    with changed_by_hand(platform_up, alone, moved, BUILD):
        expect_red(platform_up, "IN-2", f"{alone.name}: mail to .*the site data says")
    expect_green(platform_up, "IN-2")


def test_an_address_that_swallows_mail_turns_in_2_red(platform_up: Context, alone: Host) -> None:
    case = smtp_in.existing(platform_up)
    gone = edit(VIRTUAL, rf"s/^{case} .*/{case} null@discard.invalid/")
    with changed_by_hand(platform_up, alone, gone, BUILD):
        expect_red(platform_up, "IN-2", f"{alone.name}: mail to .*arrived for nobody")


def test_a_domain_alias_that_takes_everything_turns_in_3_red(
    platform_up: Context, alone: Host
) -> None:
    """The article's one line for a whole domain, which accepts and then bounces."""
    site = platform_up.platform
    alias = next(d for d in addresses.receiving(site) if d.alias_of)
    line = ("sh", "-c", f"echo '@{alias.name} @{alias.alias_of}' >>{VIRTUAL}")
    with changed_by_hand(platform_up, alone, line, BUILD):
        expect_red(platform_up, "IN-3", f"{alone.name} .*@{alias.name}, who does not exist, .* 250")
    expect_green(platform_up, "IN-3")


def test_an_open_relay_for_our_own_networks_turns_in_3_red(platform_up: Context) -> None:
    """Networks in mynetworks, as somebody might write whose servers are to just send."""
    networks = " ".join(
        f"[{p.network_address}]/{p.prefixlen}" if p.version == 6 else str(p)
        for n in platform_up.platform.networks.values()
        for p in (n.ipv4.prefix, n.ipv6.prefix)
    )
    first = smtp_in.members(platform_up)[0]
    opened = setting(f"mynetworks=127.0.0.0/8 [::1]/128 {networks}")
    with changed_by_hand(platform_up, first, opened, restart=POSTFIX):
        expect_red(platform_up, "IN-3", f"{first.name} .*relays: MAIL FROM")


def test_a_list_that_is_not_asked_turns_in_4_and_7_red(platform_up: Context, alone: Host) -> None:
    zone = platform_up.platform.inbound.dnsbl[0].zone
    without = edit(MAIN, rf"/reject_[a-z_]+ {zone}/d")
    with changed_by_hand(platform_up, alone, without, restart=POSTFIX):
        expect_red(platform_up, "IN-4", f"{alone.name} .*{zone}=.*250 .*not refused")
        expect_red(platform_up, "IN-7", f"{zone} was not asked for")
    expect_green(platform_up, "IN-4")


def test_a_list_whose_every_answer_counts_turns_in_4_red(platform_up: Context, alone: Host) -> None:
    zone = platform_up.platform.inbound.dnsbl[0].zone
    any_answer = edit(MAIN, rf"s/^(    reject_rbl_client {zone})=[^,]*,/\1,/")
    with changed_by_hand(platform_up, alone, any_answer, restart=POSTFIX):
        expect_red(platform_up, "IN-4", f"{zone}=.* 554 .*though that is no verdict")


def test_answers_that_nobody_hears_of_turn_in_4_red(platform_up: Context, alone: Host) -> None:
    silent = edit(MAIN, r"/^    warn_if_reject /d")
    with changed_by_hand(platform_up, alone, silent, restart=POSTFIX):
        expect_red(platform_up, "IN-4", "no warning names")


def test_a_forward_with_the_senders_own_name_turns_in_5_red(
    platform_up: Context, alone: Host
) -> None:
    plain = edit(MASTER, r"s/sender_canonical_maps=tcp:.*/sender_canonical_maps=/")
    with changed_by_hand(platform_up, alone, plain, restart=POSTFIX):
        expect_red(platform_up, "IN-5", f"{alone.name}: the next hop refused .*SPF: fail")


def test_a_rewritten_sender_for_everything_turns_in_5_red(
    platform_up: Context, alone: Host
) -> None:
    """The article's maps, which rewrite the sender of mail for mailboxes too."""
    everything = setting(
        "sender_canonical_maps=tcp:127.0.0.1:10001", "sender_canonical_classes=envelope_sender"
    )
    with changed_by_hand(platform_up, alone, everything, restart=POSTFIX):
        expect_red(platform_up, "IN-5", f"{alone.name}: mail of .* with the sender 'SRS0=")


def test_a_member_with_a_secret_of_its_own_turns_in_5_red(
    platform_up: Context, member: Host
) -> None:
    machine = platform_up.lab.machine(member)
    secret, kept = "/etc/postsrsd.secret", "/etc/postsrsd.secret.kept"
    machine.run("cp", "-p", "--", secret, kept)
    try:
        machine.run("tee", secret, input="another secret than the others have\n")
        machine.run("systemctl", "restart", "postsrsd.service")
        expect_red(platform_up, "IN-5", "a bounce to SRS0=.* is answered with 550")
    finally:
        machine.run("mv", "-f", "--", kept, secret)
        machine.run("systemctl", "restart", "postsrsd.service")
    expect_green(platform_up, "IN-5")


def test_an_egress_outside_of_the_senders_domain_turns_in_5_and_dns_2_red(
    platform_up: Context,
) -> None:
    site = platform_up.platform
    srs = site.inbound.srs_domain
    zone = next(z for z in platform_up.lab.outside.zone_names if f"{srs}.".endswith(f".{z}"))
    record = entry(platform_up, zone.rstrip("."), srs, "TXT", "v=spf1")
    nothing = Entry(record.owner, record.type, '"v=spf1 -all"', record.ttl)
    with changed_zone(platform_up, zone.rstrip("."), without=(record,), with_=(nothing,)):
        expect_red(platform_up, "DNS-2", f"SPF of SRS0=.*@{srs} from .*: fail")
        expect_red(platform_up, "DNS-1", f"{srs} SPF")


def test_bare_newlines_turn_in_6_red(platform_up: Context, alone: Host) -> None:
    lenient = setting("smtpd_forbid_bare_newline=no")
    with changed_by_hand(platform_up, alone, lenient, restart=POSTFIX):
        expect_red(platform_up, "IN-6", f"{alone.name} .*LF . .*splits the message")
    expect_green(platform_up, "IN-6")


def test_each_rule_that_is_missing_turns_in_6_red(platform_up: Context, alone: Host) -> None:
    rules = "invalid_helo_hostname|non_fqdn_recipient|unknown_recipient_domain"
    without = edit(MAIN, rf"/^    reject_({rules}),/d")
    seen = (
        "HELO with a bad name is answered with 250",
        "a recipient without a domain is answered with 550",
        "a short domain is answered with 554",
        "an unknown domain is answered with 554",
    )
    with changed_by_hand(platform_up, alone, without, restart=POSTFIX):
        expect_red(platform_up, "IN-6", "(?s)" + "".join(f"(?=.*{words})" for words in seen))


def test_a_client_that_need_not_wait_turns_in_6_red(platform_up: Context, alone: Host) -> None:
    hurried = (
        edit(MAIN, "/reject_unauth_pipelining/d"),
        setting("smtpd_forbid_unauth_pipelining=no"),
    )
    with changed_by_hand(platform_up, alone, *hurried, restart=POSTFIX):
        expect_red(platform_up, "IN-6", "commands sent without waiting are answered with 250")


def test_a_proxy_in_front_turns_in_7_red(platform_up: Context, alone: Host) -> None:
    """Somebody translates the addresses of clients on their way in."""
    machine = platform_up.lab.machine(alone)
    address = alone.interfaces[0].ipv4
    rules = (
        "table ip fault {\n chain input {\n  type nat hook input priority 100;\n"
        f"  ip daddr {address} tcp dport 25 snat to 192.0.2.77\n }}\n}}\n"
    )
    machine.run("nft", "-f", "-", input=rules)
    try:
        expect_red(platform_up, "IN-7", f"{alone.name} .*(no Received names|was not asked for)")
    finally:
        machine.run("nft", "delete", "table", "ip", "fault")
    expect_green(platform_up, "IN-7")


def test_a_withdrawn_mx_turns_dns_1_red(platform_up: Context) -> None:
    domain = addresses.receiving(platform_up.platform)[0]
    zone = domain.dns_zone
    record = entry(platform_up, zone, domain.name, "MX")
    with changed_zone(platform_up, zone, without=(record,)):
        expect_red(platform_up, "DNS-1", f"{domain.name} MX: nothing, not")


def test_postfix_restarted_for_an_alias_turns_change_2_red(
    platform_up: Context, member: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_up = Lab.up

    def up(self: Lab, site: Path | None = None) -> dict[str, int]:
        summary = really_up(self, site)
        if site is not None:
            self.machine(member).run("systemctl", "restart", POSTFIX)
        return summary

    monkeypatch.setattr(Lab, "up", up)
    expect_red(platform_up, "CHANGE-2", f"{member.name}.*postfix|connections failed")
