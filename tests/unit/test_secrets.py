"""Secrets: each host gets those that it needs, and files that only their readers may read."""

from __future__ import annotations

import pytest

from mailsite.bundle import compose_secrets
from mailsite.loader import load_platform
from mailsite.model import Role
from mailsite.secrets import (
    certificate_chain,
    certificate_key,
    dkim_key,
    required,
    sasl_hash,
    ssh_host_key,
)
from tests.unit.test_loader import EXAMPLE

PLATFORM = load_platform(EXAMPLE)
OUT = PLATFORM.members(Role.SMTP_OUT)[0]
EDGE = PLATFORM.members(Role.FRONTEND)[0]
#: Logins of submission with the secrets that hold their hashes: users, and owners of mailboxes.
LOGINS = sorted(
    [(u.name, f"sasl/{u.name}") for u in PLATFORM.sasl_users.values() if not u.suspended]
    + [
        (box.name, f"mailbox/{box.name}")
        for box in PLATFORM.mailboxes.values()
        if box.submission and not box.suspended
    ]
)
VALUES = {name: f"<value of {name}>" for name in required(PLATFORM, OUT)}


def test_names() -> None:
    assert dkim_key("example.org", "s1") == "dkim/example.org/s1"
    assert sasl_hash("alice") == "sasl/alice"
    assert certificate_chain("out.example.org") == "certificate/out.example.org/chain"
    assert certificate_key("out.example.org") == "certificate/out.example.org/key"
    assert ssh_host_key("a.example.org") == "ssh-host-key/a.example.org"


def test_smtp_out_needs_signing_keys_logins_and_its_certificate() -> None:
    name = PLATFORM.names.smtp_out
    expected = {f"certificate/{name}/chain", f"certificate/{name}/key"}
    expected |= {secret for _, secret in LOGINS}
    expected |= {
        f"dkim/{domain.name}/{key.selector}"
        for domain in PLATFORM.domains.values()
        for key in domain.dkim
        if domain.sends and key.signing
    }
    found = required(PLATFORM, OUT)
    assert found == tuple(sorted(expected))


def test_the_example_has_what_must_be_left_out() -> None:
    """Without these the test above could not fail."""
    assert any(user.suspended for user in PLATFORM.sasl_users.values())
    assert any(not key.signing for d in PLATFORM.domains.values() for key in d.dkim if d.sends)


def test_a_domain_that_stops_sending_needs_no_key() -> None:
    name, domain = next(
        (n, d)
        for n, d in PLATFORM.domains.items()
        if d.signing_key and not PLATFORM.names.smtp_out.endswith(n)
    )
    silent = domain.model_copy(update={"sends": False})
    platform = PLATFORM.model_copy(update={"domains": PLATFORM.domains | {name: silent}})
    gone = set(required(PLATFORM, OUT)) - set(required(platform, OUT))
    assert gone == {f"dkim/{name}/{domain.signing_key.selector}"}


def test_a_frontend_needs_the_login_of_its_group_and_the_certificates_of_webmail() -> None:
    names = (PLATFORM.names.webmail, PLATFORM.internal_name(Role.WEBMAIL))
    assert set(required(PLATFORM, EDGE)) == {"sasl-password/mail"} | {
        secret for name in names for secret in (certificate_chain(name), certificate_key(name))
    }
    without = PLATFORM.model_copy(update={"webmail": None})
    assert required(without, EDGE) == ("sasl-password/mail",)
    (path,) = compose_secrets(without, EDGE, {"sasl-password/mail": "word"})
    assert path == "/etc/mail/secrets"


def test_files_are_readable_by_their_daemons_alone() -> None:
    files = compose_secrets(PLATFORM, OUT, VALUES)
    for path, file in files.items():
        rights = (file.owner, file.group, file.mode)
        if path.startswith("/etc/opendkim/keys/"):
            assert rights == ("opendkim", "opendkim", 0o600)
        elif path.startswith("/etc/certs/"):
            assert rights == ("root", "root", 0o600)
        else:
            assert (path, rights) == ("/etc/dovecot/sasl-users", ("root", "dovecot", 0o640))
    assert len(files) == 2 + sum(1 for d in PLATFORM.domains.values() if d.sends)


def test_the_key_is_in_front_of_its_chain() -> None:
    """As smtpd_tls_chain_files wants it, see postconf(5)."""
    name = PLATFORM.names.smtp_out
    content = compose_secrets(PLATFORM, OUT, VALUES)[f"/etc/certs/{name}/combined.pem"].content
    assert content == (f"<value of certificate/{name}/key>\n<value of certificate/{name}/chain>\n")


def test_each_login_is_a_line_and_a_suspended_one_is_not() -> None:
    content = compose_secrets(PLATFORM, OUT, VALUES)["/etc/dovecot/sasl-users"].content
    rows = [line for line in content.splitlines() if not line.startswith("#")]
    assert rows == [f"{login}:<value of {secret}>" for login, secret in LOGINS]


@pytest.mark.parametrize("missing", sorted(VALUES))
def test_a_missing_value_is_an_error_that_names_it(missing: str) -> None:
    values = {name: value for name, value in VALUES.items() if name != missing}
    with pytest.raises(KeyError, match=missing):
        compose_secrets(PLATFORM, OUT, values)
