"""Faults of smtp-out that its checks must see."""

from __future__ import annotations

import pytest

from mailsite.model import Host
from verify.context import Context

from .faults import (
    changed_by_hand,
    changed_zone,
    edit,
    entry,
    expect_green,
    expect_red,
    setting,
)

POSTFIX = "postfix.service"
MASTER = "/etc/postfix/master.cf"


@pytest.fixture
def primary(platform_up: Context) -> Host:
    return platform_up.platform.hosts[platform_up.platform.outbound.primary]


def test_a_member_with_another_certificate_turns_out_1_and_6_red(platform_up: Context) -> None:
    lab = platform_up.lab
    name = platform_up.platform.names.smtp_out
    what, chain, key = next(iter(lab.wrong_certificates(name)))
    with lab.machine(platform_up.members[0]).presenting(chain, key):
        expect_red(platform_up, "OUT-1", f"(?i)hostname mismatch|not valid for '{name}'")
        expect_red(platform_up, "OUT-6", "(?i)not verified|unverified|untrusted|mismatch|trusted")
    assert what
    expect_green(platform_up, "OUT-1")


def test_auth_before_tls_turns_out_1_and_2_red(platform_up: Context, primary: Host) -> None:
    plain = edit(
        MASTER,
        "s/smtpd_tls_security_level=encrypt/smtpd_tls_security_level=may/",
    )
    options = setting("smtpd_tls_auth_only=no", "smtpd_sasl_security_options=noanonymous")
    with changed_by_hand(platform_up, primary, plain, options, restart=POSTFIX):
        expect_red(platform_up, "OUT-1", "AUTH is offered before TLS")
        expect_red(platform_up, "OUT-2", "plain text before TLS is answered with")


def test_an_open_relay_turns_out_2_red(platform_up: Context) -> None:
    """A network in mynetworks, as somebody might write who wants his servers to just send."""
    member = platform_up.members[-1]
    networks = " ".join(
        f"[{p.network_address}]/{p.prefixlen}" if p.version == 6 else str(p)
        for n in platform_up.platform.networks.values()
        for p in (n.ipv4.prefix, n.ipv6.prefix)
    )
    with changed_by_hand(
        platform_up, member, setting(f"mynetworks=127.0.0.0/8 [::1]/128 {networks}"),
        restart=POSTFIX,
    ):  # fmt: skip
        expect_red(platform_up, "OUT-2", f"{member.name}.*relay without AUTH")


def test_a_missing_row_of_the_signing_table_turns_out_3_red(
    platform_up: Context, primary: Host
) -> None:
    domain = platform_up.sending_domains[0]
    row = edit("/etc/opendkim/signers", rf"/^\*@{domain}[[:space:]]/d")
    with changed_by_hand(platform_up, primary, row, restart="opendkim.service"):
        expect_red(platform_up, "OUT-3", "DKIM: no signature|0 DKIM signatures")


def test_another_canonicalization_turns_out_3_red(platform_up: Context, primary: Host) -> None:
    """The seed's one word means relaxed headers and a simple body."""
    word = edit("/etc/opendkim.conf", "s#relaxed/relaxed#relaxed#")
    with changed_by_hand(platform_up, primary, word, restart="opendkim.service"):
        expect_red(platform_up, "OUT-3", "relaxed/simple, not relaxed/relaxed")


def test_a_signer_that_may_be_missing_turns_out_3_red(platform_up: Context) -> None:
    """Mail that leaves unsigned while OpenDKIM is down: Postfix's answer to a lost filter."""
    member = platform_up.members[-1]
    accept = edit("/etc/postfix/main.cf", "s/default_action=tempfail/default_action=accept/")
    with changed_by_hand(platform_up, member, accept, restart=POSTFIX):
        expect_red(platform_up, "OUT-3", "without OpenDKIM a mail is answered with 250")


def test_bounces_that_pass_no_filter_turn_out_3_red(platform_up: Context, primary: Host) -> None:
    with changed_by_hand(
        platform_up, primary, setting("internal_mail_filter_classes="), restart=POSTFIX
    ):
        expect_red(platform_up, "OUT-3", "0 DKIM signatures|DKIM: no signature")


def test_an_egress_outside_of_spf_turns_out_4_and_dns_2_red(platform_up: Context) -> None:
    zone = platform_up.platform.domain
    label, _, rest = platform_up.platform.names.spf.partition(".")
    for version in ("4", "6"):
        record = entry(platform_up, zone, f"{label}{version}.{rest}", "TXT")
        nothing = type(record)(record.owner, record.type, '"v=spf1 ~all"', record.ttl)
        with changed_zone(platform_up, zone, without=(record,), with_=(nothing,)):
            expect_red(platform_up, "OUT-4", rf"over IPv{version}: SPF of .*: softfail")
            expect_red(platform_up, "DNS-2", "SPF of .*: softfail .*, not pass")


def test_a_missing_policy_turns_out_4_and_dns_1_red(platform_up: Context) -> None:
    domain = platform_up.sending_domains[0]
    zone = platform_up.platform.domains[domain].dns_zone
    record = entry(platform_up, zone, f"_dmarc.{domain}", "TXT")
    with changed_zone(platform_up, zone, without=(record,)):
        expect_red(platform_up, "OUT-4", f"{domain} publishes no DMARC policy")
        expect_red(platform_up, "DNS-1", f"_dmarc.{domain} has 0 DMARC records")


def test_a_queue_that_gives_up_at_once_turns_out_5_red(platform_up: Context) -> None:
    member = platform_up.members[-1]
    with changed_by_hand(platform_up, member, setting("maximal_queue_lifetime=0"), restart=POSTFIX):
        expect_red(platform_up, "OUT-5", "not deferred")


def test_another_tls_level_turns_out_6_red(platform_up: Context) -> None:
    member = platform_up.members[-1]
    with changed_by_hand(
        platform_up, member, setting("smtp_tls_security_level=may"), restart=POSTFIX
    ):
        expect_red(platform_up, "OUT-6", "encrypt: mail to plain")


def test_no_limits_turn_out_7_red(platform_up: Context, primary: Host) -> None:
    with changed_by_hand(
        platform_up, primary, setting("smtpd_client_connection_count_limit=0"), restart=POSTFIX
    ):
        expect_red(platform_up, "OUT-7", "connections at once from .* answered with 220")
    with changed_by_hand(
        platform_up, primary, setting("smtpd_client_connection_rate_limit=0"), restart=POSTFIX
    ):
        expect_red(platform_up, "OUT-7", "opens more than .* connections in a minute")
