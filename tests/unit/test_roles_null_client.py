"""Own mail of every machine: by OpenSMTPD where there is no Postfix, by Postfix where there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mailsite.bundle import compose, compose_secrets
from mailsite.loader import load_platform
from mailsite.model import POSTFIX_ROLES, Host, Mta, Role
from mailsite.roles import certificates
from mailsite.secrets import required

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = load_platform(ROOT / "sites/prod")
HOSTS = tuple(PLATFORM.hosts.values())
CLIENTS = [h for h in HOSTS if POSTFIX_ROLES.isdisjoint(h.roles)]
SENDERS = [h for h in HOSTS if {Role.SMTP_IN, Role.MAILDROP} & {*h.roles}]
BY_NAME = {"ids": lambda h: h.name}


def login(host: Host) -> dict[str, str]:
    """The secret files that hold the password of the host's group."""
    values = {name: f"<{name}>" for name in required(PLATFORM, host)}
    word = f"<sasl-password/{PLATFORM.group_of(host)}>"
    files = compose_secrets(PLATFORM, host, values)
    return {path: f.content for path, f in files.items() if word in f.content}


def postfix_rows(host: Host, service: str) -> list[str]:
    text = compose(PLATFORM, host).files["/etc/postfix/master.cf"].content
    rows = re.split(r"\n(?=\S)", text)
    (found,) = (row for row in rows if row.startswith(f"{service} "))
    return [line.strip() for line in found.splitlines()]


def test_each_group_of_servers_has_a_login_of_its_own() -> None:
    groups = {h.name.partition(".")[0]: PLATFORM.group_of(h) for h in HOSTS}
    assert groups["squanchy"] == "bastion"
    assert groups["hvn0"] == "hypervisor"
    assert groups["msw0"] == "router"
    assert groups["rspamd"] == groups["nginx0"] == groups["smtp-in"] == "mail"


@pytest.mark.parametrize("host", CLIENTS, **BY_NAME)
def test_a_client_listens_on_localhost_and_sends_by_smtp_out(host: Host) -> None:
    bundle = compose(PLATFORM, host)
    lines = bundle.files["/etc/smtpd.conf"].content.splitlines()
    assert [line for line in lines if line.startswith("listen")] == ["listen on localhost"]
    (relay,) = (line for line in lines if line.startswith('action "outbound"'))
    group = PLATFORM.group_of(host)
    assert f'"smtp+tls://{group}@{PLATFORM.submission_host}:587" auth <secrets>' in relay
    assert relay.endswith(f'mail-from "@{PLATFORM.domain}"')
    # That would switch off the check of the certificate.
    assert "no-verify" not in relay
    assert {"opensmtpd", "postfix"} & {*bundle.packages} == {"opensmtpd"}
    assert list(login(host)) == ["/etc/mail/secrets"]


@pytest.mark.parametrize("host", SENDERS, **BY_NAME)
def test_mail_hosts_send_their_own_mail_with_their_postfix(host: Host) -> None:
    bundle = compose(PLATFORM, host)
    assert "opensmtpd" not in bundle.packages and "/etc/smtpd.conf" not in bundle.files
    nexthop = f"[{PLATFORM.submission_host}]:587"
    assert f"-o content_filter=own:{nexthop}" in postfix_rows(host, "pickup")
    own = postfix_rows(host, "own")
    assert {"-o smtp_tls_security_level=secure", "-o smtp_sasl_auth_enable=yes"} <= {*own}
    cleanup = " ".join(postfix_rows(host, "cleanup-own"))
    assert f"sender_canonical_maps=static:@{PLATFORM.domain}" in cleanup
    for name in (host.name, "localhost"):
        assert f"{{ @{name} = postmaster@{PLATFORM.domain} }}" in cleanup
    word = f"{nexthop} mail:<sasl-password/mail>"
    assert {path: word in text for path, text in login(host).items()} == {
        "/etc/postfix/own-login": True
    }


def test_forwards_of_smtp_in_keep_leaving_by_themselves() -> None:
    host = next(h for h in SENDERS if Role.SMTP_IN in h.roles)
    main = compose(PLATFORM, host).files["/etc/postfix/main.cf"].content
    assert "relayhost" not in main and "default_transport = forward:" in main


def test_what_filters_send_leaves_by_smtp_out() -> None:
    host = next(h for h in SENDERS if Role.MAILDROP in h.roles)
    main = compose(PLATFORM, host).files["/etc/postfix/main.cf"].content.splitlines()
    assert f"relayhost = [{PLATFORM.submission_host}]:587" in main
    assert "default_transport = own" in main


def test_smtp_out_delivers_by_itself() -> None:
    host = next(h for h in HOSTS if Role.SMTP_OUT in h.roles)
    assert postfix_rows(host, "pickup") == [postfix_rows(host, "pickup")[0]]
    assert login(host) == {}


def test_a_machine_whose_mail_is_the_operators_gets_none_of_ours() -> None:
    host = next(h for h in CLIENTS if h.vm is None and h.roles == (Role.SERVER,))
    bundle = compose(PLATFORM, host.model_copy(update={"mta": Mta.OPERATOR}))
    assert list(bundle.files) == ["/usr/local/sbin/mail-agent"]
    assert (bundle.secret_files, bundle.packages, bundle.services) == ({}, (), ())


@pytest.mark.parametrize(("word", "kept"), [(None, True), (Mta.REPLACE, False)])
def test_a_mail_server_goes_only_where_the_site_says_so(word: Mta | None, kept: bool) -> None:
    host = next(h for h in CLIENTS if h.vm is None)
    assert compose(PLATFORM, host.model_copy(update={"mta": word})).keep_packages is kept


def test_a_given_certificate_of_smtp_out_is_for_the_name_that_clients_know() -> None:
    names = PLATFORM.certificate_names(PLATFORM.names.smtp_out)
    assert names == (PLATFORM.names.smtp_out, PLATFORM.submission_host)
    example = load_platform(ROOT / "sites/example")
    assert example.certificates is None
    out = example.members(Role.SMTP_OUT)[0]
    (check,) = (c for c in compose(example, out).checks if c.name == "certificate-names")
    assert check.command[-2:] == example.certificate_names(example.names.smtp_out)


def test_a_certificate_of_the_platforms_own_has_the_name_that_clients_know() -> None:
    holder = PLATFORM.members(Role.CERTIFICATES)[0]
    config = json.loads(compose(PLATFORM, holder).files[certificates.CONFIG].content)
    assert f"*.{PLATFORM.internal_domain}" in config["names"]
    assert PLATFORM.submission_host == f"smtp-out.{PLATFORM.internal_domain}"
