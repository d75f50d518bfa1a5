"""smtp-out: which keys sign, who may log in, and site data that it cannot work with."""

from __future__ import annotations

import pytest

from mailsite.bundle import compose
from mailsite.fragment import TcpHealth
from mailsite.loader import SiteError, load_platform
from mailsite.model import Base, Host, Platform, Role
from mailsite.roles import smtp_out
from tests.unit.test_loader import EXAMPLE

PLATFORM = load_platform(EXAMPLE)
OUT = PLATFORM.members(Role.SMTP_OUT)[0]


def test_one_key_of_each_sending_domain_signs() -> None:
    assert {(s.domain, s.selector) for s in smtp_out.signers(PLATFORM)} == {
        (d.name, d.signing_key.selector)
        for d in PLATFORM.domains.values()
        if d.sends and d.signing_key
    }


def test_subdomains_stand_before_what_they_belong_to() -> None:
    """The first row of the signing table that matches wins, and `*@*.parent` matches both."""
    some = next(d for d in PLATFORM.domains.values() if d.signing_key)
    names = ("invented.example", "lists.invented.example", "a.lists.invented.example")
    domains = {n: some.model_copy(update={"name": n, "zone": names[0]}) for n in names}
    platform = PLATFORM.model_copy(update={"domains": PLATFORM.domains | domains})
    table = compose(platform, OUT).files["/etc/opendkim/signers"].content
    patterns = [line.split()[0] for line in table.splitlines() if line.startswith("*")]
    places = [patterns.index(f"*@{name}") for name in names]
    assert places == sorted(places, reverse=True)
    assert patterns.index(f"*@*.{names[0]}") > patterns.index(f"*@{names[1]}")


def test_every_row_of_the_signing_table_has_its_key() -> None:
    bundle = compose(PLATFORM, OUT)
    rows = {
        path: [
            line.split()
            for line in bundle.files[path].content.splitlines()
            if not line.startswith("#")
        ]
        for path in ("/etc/opendkim/signers", "/etc/opendkim/keytable")
    }
    keys = {name: value.split(":") for name, value in rows["/etc/opendkim/keytable"]}
    assert {name for _, name in rows["/etc/opendkim/signers"]} == set(keys)
    for domain, selector, path in keys.values():
        assert bundle.secret_files[path].secrets == (f"dkim/{domain}/{selector}",)


def test_the_queue_lies_on_the_data_volume() -> None:
    bundle = compose(PLATFORM, OUT)
    mount = bundle.files["/etc/systemd/system/var-spool-postfix.mount"].content
    assert "What=/srv/mail/postfix\nWhere=/var/spool/postfix\n" in mount
    folder = bundle.files["/etc/systemd/system/mail-queue.service"].content
    assert "Requires=mail-data.service" in folder and "After=mail-data.service" in folder
    for unit in ("postfix", "dovecot"):
        drop_in = bundle.files[f"/etc/systemd/system/{unit}.service.d/mail.conf"].content
        assert "\nRequiresMountsFor=/var/spool/postfix\n" in drop_in


def existing(host: Host, base: Base) -> tuple[Platform, Host]:
    changed = host.model_copy(update={"vm": None, "base": base})
    hosts = PLATFORM.hosts | {changed.name: changed}
    return PLATFORM.model_copy(update={"hosts": hosts}), changed


def test_an_existing_machine_has_no_data_volume_to_wait_for() -> None:
    bundle = compose(*existing(OUT, Base.MANAGED))
    assert not [p for p in bundle.files if p.endswith((".mount", "mail-queue.service"))]
    assert "RequiresMountsFor" not in "".join(f.content for f in bundle.files.values())


def test_it_does_not_go_on_a_machine_that_stays_the_operators() -> None:
    with pytest.raises(SiteError) as caught:
        compose(*existing(OUT, Base.OPERATOR))
    (problem,) = caught.value.problems
    assert problem.value == OUT.name
    assert "base: managed" in problem.remedy


def test_bounces_must_come_from_a_name_that_a_key_signs_for() -> None:
    names = PLATFORM.names.model_copy(update={"smtp_out": "out.unsigned.example"})
    platform = PLATFORM.model_copy(update={"names": names})
    with pytest.raises(SiteError) as caught:
        compose(platform, OUT)
    (problem,) = caught.value.problems
    assert problem.value == "out.unsigned.example"
    assert "dkim" in problem.remedy


def test_health_asks_for_the_public_name_in_the_banner() -> None:
    health = compose(PLATFORM, OUT).health
    banner = f"220 {PLATFORM.names.smtp_out} ESMTP"
    for address in ("127.0.0.1", "::1"):
        assert TcpHealth(address, 587, expect=banner) in health
    # A connection to it without a PROXY header is an error in the log.
    assert not [h for h in health if isinstance(h, TcpHealth) and h.port == 10587]


def test_postfix_restarts_for_what_a_reload_does_not_take_over() -> None:
    (postfix,) = (s for s in compose(PLATFORM, OUT).services if s.unit == "postfix.service")
    assert "/etc/postfix/master.cf" in postfix.restart_on
    assert not any("/etc/postfix/main.cf".startswith(p) for p in postfix.restart_on)
    assert "/etc/certs/" in postfix.reload_on


def test_postfix_starts_after_what_it_asks() -> None:
    services = {s.unit: s.order for s in compose(PLATFORM, OUT).services}
    for unit in ("nftables.service", "unbound.service", "dovecot.service", "opendkim.service"):
        assert services[unit] < services["postfix.service"]


def test_a_login_with_senders_may_use_no_other() -> None:
    person, server = (
        PLATFORM.sasl_users[next(iter(smtp_out.logins(PLATFORM)))].model_copy(
            update={"name": name, "senders": senders}
        )
        for name, senders in (("person", ()), ("server", ("@one.example", "a@two.example")))
    )
    other = server.model_copy(update={"name": "other", "senders": ("@one.example",)})
    gone = server.model_copy(update={"name": "gone", "suspended": True})
    users = {user.name: user for user in (person, server, other, gone)}
    platform = PLATFORM.model_copy(update={"sasl_users": users})
    assert smtp_out.owners(platform) == {
        "@one.example": ("other", "server"),
        "a@two.example": ("server",),
    }
    main = [line.strip() for line in rendered(platform)]
    assert "{ @one.example = other server }" in main
    assert [line for line in main if line.endswith("= own_addresses }")] == [
        "{ other = own_addresses }",
        "{ server = own_addresses }",
    ]


def test_without_such_logins_no_sender_is_looked_up() -> None:
    users = {
        name: user.model_copy(update={"senders": ()}) for name, user in PLATFORM.sasl_users.items()
    }
    platform = PLATFORM.model_copy(update={"sasl_users": users})
    assert not [line for line in rendered(platform) if line.startswith("smtpd_sender_")]


def rendered(platform: Platform) -> list[str]:
    """Lines of smtp-out's main.cf."""
    return smtp_out.fragment(platform, OUT).files["/etc/postfix/main.cf"].content.splitlines()
