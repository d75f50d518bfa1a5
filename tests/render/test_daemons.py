"""What the daemons make of what we render: values in force, names resolved, mail signed."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import dkim
import pytest
from cryptography.hazmat.primitives import serialization

from mailsite.bundle import compose
from mailsite.model import NetworkKind, Platform, Role
from mailsite.roles import smtp_out
from mailsite.roles.base import internal_names, pointers
from mailsite.roles.certificates import STAND_IN
from tests.render.conftest import Case, all_files, cases, key
from tests.render.image import Image, Step

CASES = cases()
OUT = [
    next(c for c in CASES if c.site == site and Role.SMTP_OUT in c.host.roles)
    for site in dict.fromkeys(c.site for c in CASES)
]


def settings(text: str) -> dict[str, str]:
    rows = (line.partition("=") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in rows}


@pytest.mark.parametrize("case", OUT, ids=lambda c: c.id)
def test_postfix_settings_in_force(image: Image, case: Case) -> None:
    result = image.run_one(all_files(case.platform, case.host), "postconf", "-x")
    found = settings(result.out)
    name, limits = case.platform.names.smtp_out, case.platform.outbound.limits
    # Webmail speaks for many.
    legs = [case.platform.internal_leg(h) for h in case.platform.members(Role.WEBMAIL)]
    many = [word for leg in legs for word in (str(leg.ipv4), f"[{leg.ipv6}]")]
    expected = {
        "myhostname": name,
        "smtp_helo_name": name,
        "smtpd_banner": f"{name} ESMTP Postfix ({case.host.name})",
        "mynetworks": "127.0.0.0/8, [::1]/128",
        "smtpd_tls_auth_only": "yes",
        "smtpd_sasl_security_options": "noanonymous, noplaintext",
        "smtpd_sasl_tls_security_options": "noanonymous",
        "smtpd_forbid_bare_newline": "normalize",
        "smtpd_forbid_bare_newline_exclusions": "",
        "internal_mail_filter_classes": "bounce",
        "smtp_tls_security_level": case.platform.outbound.tls.value,
        "smtpd_client_connection_count_limit": str(limits.connections),
        "smtpd_client_connection_rate_limit": str(limits.connection_rate),
        "smtpd_client_message_rate_limit": str(limits.message_rate),
        "smtpd_client_event_limit_exceptions": ", ".join(["127.0.0.0/8", "[::1]/128", *many]),
        "message_size_limit": str(case.platform.outbound.message_size_limit),
        "header_size_limit": str(case.platform.outbound.header_size_limit),
    }
    assert {key: found[key] for key in expected} == expected
    signer = "{ inet:127.0.0.1:8891, default_action=tempfail, connect_timeout=5s }"
    spam_filter = (
        "{ inet:127.0.0.1:11332, default_action=accept, connect_timeout=1s,"
        " command_timeout=4s, content_timeout=4s }"
    )
    assert found["smtpd_milters"] == f"{spam_filter} {signer}"
    # A bounce is signed, and not judged.
    assert found["non_smtpd_milters"] == signer


def test_only_submission_is_served(image: Image) -> None:
    case = OUT[0]
    result = image.run_one(all_files(case.platform, case.host), "postconf", "-M")
    inet = [row.split()[0] for row in result.out.splitlines() if row.split()[1] == "inet"]
    assert inet == ["587", "10587"]


def test_submission_without_a_login_is_for_this_machine_alone(image: Image) -> None:
    """Behind a frontend, where 127.0.0.1 is somebody else, not even for that address."""
    case = OUT[0]
    found = settings(image.run_one(all_files(case.platform, case.host), "postconf", "-P").out)
    assert found["587/inet/smtpd_client_restrictions"] == (
        "permit_sasl_authenticated,permit_mynetworks,reject"
    )
    for restriction in ("smtpd_client_restrictions", "smtpd_relay_restrictions"):
        assert found[f"10587/inet/{restriction}"] == "permit_sasl_authenticated,reject"
    assert found["10587/inet/smtpd_upstream_proxy_protocol"] == "haproxy"
    for port in ("587", "10587"):
        assert found[f"{port}/inet/smtpd_tls_security_level"] == "encrypt"
        assert found[f"{port}/inet/milter_macro_daemon_name"] == "ORIGINATING"


def test_ssh_takes_keys_of_the_deploy_user_alone(image: Image) -> None:
    case = OUT[0]
    text = image.run_one(all_files(case.platform, case.host), "sshd", "-T").out
    found = dict(line.split(" ", 1) for line in text.splitlines())
    assert found["allowusers"] == case.host.login
    assert found["permitrootlogin"] == "no"
    assert found["passwordauthentication"] == "no"
    assert found["kbdinteractiveauthentication"] == "no"
    assert found["maxstartups"] == "100:30:200"
    exempt = found["persourcepenaltyexemptlist"].split(",")
    assert {str(network) for network in case.platform.management.networks} < {*exempt}


# Unbound itself, on a machine that has no network at all.
_RESOLVE = """\
unbound
for _ in $(seq 100); do unbound-control status >/dev/null 2>&1 && break; sleep 0.05; done
for name in "$@"; do
    echo "$name $(getent -s dns ahosts "$name" | cut -d' ' -f1 | sort -u | xargs)"
done
"""
_REVERSE = _RESOLVE.replace("ahosts", "hosts").replace("cut -d' ' -f1", "awk '{print $2}'")


@pytest.mark.parametrize("case", OUT, ids=lambda c: c.id)
def test_internal_names_resolve_with_the_outside_cut_off(image: Image, case: Case) -> None:
    files = all_files(case.platform, case.host)
    expected = {
        own.name: " ".join(sorted(str(address) for address in own.addresses))
        for own in internal_names(case.platform)
        if own.addresses
    }
    assert set(case.platform.hosts) < set(expected)
    result = image.run_one(files, "sh", "-c", _RESOLVE, "sh", *expected)
    found = dict(line.split(" ", 1) for line in result.out.splitlines())
    assert {name: " ".join(sorted(value.split())) for name, value in found.items()} == expected


@pytest.mark.parametrize("case", OUT, ids=lambda c: c.id)
def test_internal_addresses_have_names_with_the_outside_cut_off(image: Image, case: Case) -> None:
    files = all_files(case.platform, case.host)
    expected = {str(address): name for address, name in pointers(case.platform).items()}
    result = image.run_one(files, "sh", "-c", _REVERSE, "sh", *expected)
    found = dict(line.split(" ", 1) for line in result.out.splitlines())
    assert found == expected


def sign(image: Image, case: Case, senders: list[str]) -> Mapping[str, bytes]:
    """A message of each sender with what OpenDKIM puts in front of it."""
    files = all_files(case.platform, case.host)
    messages = {
        sender: f"From: {sender}\r\nTo: someone@remote.invented\r\nSubject: A  subject\r\n"
        "Date: Sun, 22 Nov 2026 10:00:00 +0000\r\nMessage-ID: <1@here>\r\n\r\nbody \r\n\r\n"
        for sender in senders
    }
    command = ("runuser", "-u", "opendkim", "--", "opendkim", "-x", "/etc/opendkim.conf", "-t", "-")
    results = image.run(files, [Step(command, input=text) for text in messages.values()])
    signed = {}
    for (sender, text), result in zip(messages.items(), results, strict=True):
        header = (result.err + result.out).partition("(stdin):\n")[2].rstrip("\n")
        signed[sender] = (header.replace("\n", "\r\n") + "\r\n" + text).encode() if header else b""
    return signed


@pytest.mark.parametrize("case", OUT, ids=lambda c: c.id)
def test_each_domain_and_its_subdomains_are_signed_once_and_validly(
    image: Image, case: Case
) -> None:
    public = base64.b64encode(
        key()
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    asked: list[bytes] = []

    def txt(name: bytes, timeout: int = 5) -> bytes:
        asked.append(name)
        return b"v=DKIM1; k=rsa; p=" + public

    wanted = {}
    for signer in smtp_out.signers(case.platform):
        for domain in (signer.domain, f"deep.below.{signer.domain}"):
            wanted[f"someone@{domain}"] = signer
    wanted[f"MAILER-DAEMON@{case.platform.names.smtp_out}"] = next(
        s for s in smtp_out.signers(case.platform) if s.domain == case.platform.domain
    )
    for sender, message in sign(image, case, list(wanted)).items():
        signer = wanted[sender]
        assert message.count(b"DKIM-Signature:") == 1, sender
        assert b"c=relaxed/relaxed" in message
        asked.clear()
        assert dkim.verify(message, dnsfunc=txt), sender
        assert asked == [f"{signer.selector}._domainkey.{signer.domain}.".encode()]


def below_a_signer(platform: Platform, name: str) -> bool:
    """Subdomains of a domain that signs are signed with it, see the signing table."""
    return any(name.endswith(f".{signer.domain}") for signer in smtp_out.signers(platform))


def test_a_domain_that_does_not_send_is_not_signed(image: Image) -> None:
    silent = [
        (case, domain.name)
        for case in OUT
        for domain in case.platform.domains.values()
        if not domain.sends and not below_a_signer(case.platform, domain.name)
    ]
    assert silent
    for case, domain in silent:
        assert sign(image, case, [f"someone@{domain}"]) == {f"someone@{domain}": b""}


def test_streams_lead_from_both_families_to_the_primary_first(image: Image) -> None:
    for case in CASES:
        if Role.FRONTEND not in case.host.roles:
            continue
        produced = compose(case.platform, case.host).produced
        shown = [path for path in produced if path.startswith("/etc/certs/")]
        steps = [Step((STAND_IN, *shown))] if shown else []
        files = all_files(case.platform, case.host)
        result = image.run(files, [*steps, Step(("nginx", "-T", "-q"))])[-1]
        rows = [line.split("#")[0].strip() for line in result.out.splitlines()]
        servers = [row for row in rows if row.startswith("server ") and "fail_timeout" in row]
        upstream = [row for row in servers if ":10587 " in row]
        platform = case.platform
        legs = {h.name: platform.internal_leg(h).ipv4 for h in platform.members(Role.SMTP_OUT)}
        primary = legs.pop(platform.outbound.primary)
        assert upstream == [
            f"server {primary}:10587 fail_timeout=10s max_fails=2;",
            *(f"server {a}:10587 fail_timeout=10s max_fails=2 backup;" for a in legs.values()),
        ]
        assert {"listen [::]:587 so_keepalive=on;", "listen 0.0.0.0:587 so_keepalive=on;"} < {*rows}
        inside = platform.leg(case.host, NetworkKind.SITE_LOCAL) or case.host.interfaces[0]
        assert f"proxy_bind {inside.ipv4};" in rows
        assert "proxy_protocol on;" in rows


# A queue as a host left it whose postfix was user 4242 and whose postdrop was group 4343.
_OLD_QUEUE = """\
mkdir -p /srv/mail/postfix && cd /srv/mail/postfix
mkdir -p active deferred/A maildrop public private pid
touch deferred/A/mail maildrop/local
chown 4242 active deferred deferred/A deferred/A/mail maildrop public private
chgrp 4343 maildrop public maildrop/local
chown 1000 maildrop/local
"""
_PREPARE = "/usr/local/lib/mail-platform/mail-queue"
_OWNERS = "cd /srv/mail/postfix && find . | sort | xargs stat -c '%n %U:%G %u'"


def test_a_replaced_host_takes_over_the_queue_of_the_old_one(image: Image) -> None:
    case = OUT[0]
    files = all_files(case.platform, case.host)
    steps = [["sh", "-ec", _OLD_QUEUE], [_PREPARE], ["sh", "-c", _OWNERS], [_PREPARE]]
    results = image.run(files, [Step(command) for command in steps])
    assert [r.status for r in results] == [0, 0, 0, 0], results
    owners = {row.split()[0]: row.split()[1:] for row in results[2].out.splitlines()}
    for path in ("./active", "./deferred", "./deferred/A", "./deferred/A/mail", "./private"):
        assert owners[path][0] == "postfix:root", path
    assert owners["./maildrop"][0] == owners["./public"][0] == "postfix:postdrop"
    # Local mail that waits there belongs to who sent it.
    assert owners["./maildrop/local"] == ["UNKNOWN:postdrop", "1000"]
    assert owners["./pid"][0] == "root:root"


def test_a_new_host_gets_an_empty_queue(image: Image) -> None:
    case = OUT[0]
    files = all_files(case.platform, case.host)
    steps = [["mkdir", "-p", "/srv/mail"], [_PREPARE], ["sh", "-c", _OWNERS]]
    results = image.run(files, [Step(command) for command in steps])
    assert [r.status for r in results] == [0, 0, 0], results
    rows = [" ".join(row.split()[:2]) for row in results[2].out.splitlines()]
    assert rows == [". root:root", "./private postfix:root"]
