"""maildrop: what makes a host a replica of the mailboxes."""

from __future__ import annotations

import re
from ipaddress import ip_network

import pytest

from mailsite.aliases import main_address
from mailsite.bundle import compose, compose_secrets
from mailsite.fragment import CommandHealth
from mailsite.loader import SiteError, load_platform
from mailsite.model import Mailbox, Platform, Role
from mailsite.roles import maildrop, pairsync, smtp_out
from mailsite.roles.base import internal_names
from mailsite.secret_names import certificate_key, mailbox_hash, pairsync_secret, sasl_hash
from mailsite.secrets import required
from pairsync.config import parse
from tests.unit.test_bundle import lies_under
from tests.unit.test_loader import EXAMPLE

PLATFORM = load_platform(EXAMPLE)
FIRST, SECOND = PLATFORM.replicas


def with_mailbox(name: str, **about: object) -> Platform:
    box = Mailbox.model_validate({"name": name, "description": "invented", **about})
    return PLATFORM.model_copy(update={"mailboxes": {**PLATFORM.mailboxes, name: box}})


def test_both_replicas_have_the_same_mailboxes() -> None:
    one, two = compose(PLATFORM, FIRST), compose(PLATFORM, SECOND)
    for path in (maildrop.USERS, maildrop.VIRTUAL_MAILDROP, "/etc/sysusers.d/mail-vmail.conf"):
        assert one.files[path].content == two.files[path].content
    scripts = [path for path in one.files if path.startswith(maildrop.SIEVE)]
    assert sorted(scripts) == sorted(maildrop.scripts())
    for path in scripts:
        assert one.files[path] == two.files[path]


def test_a_new_mailbox_changes_two_lists_and_wakes_no_daemon() -> None:
    platform = with_mailbox("newcomer", quota="1 GiB")
    before, after = compose(PLATFORM, FIRST), compose(platform, FIRST)
    changed = {p for p in after.files if after.files[p] != before.files.get(p)}
    assert changed == {maildrop.USERS, maildrop.VIRTUAL_MAILDROP}
    for service in after.services:
        for path in (*changed, maildrop.PASSWORDS):
            assert not lies_under(path, (*service.reload_on, *service.restart_on))
    assert set(required(platform, FIRST)) - set(required(PLATFORM, FIRST)) == {
        mailbox_hash("newcomer")
    }
    for role in (Role.SMTP_IN, Role.RSPAMD, Role.FRONTEND):
        for host in PLATFORM.members(role):
            assert compose(PLATFORM, host) == compose(platform, host)
    # Its owner sends mail too: one more login there, among the secrets.
    for host in PLATFORM.members(Role.SMTP_OUT):
        assert compose(PLATFORM, host).public_json() == compose(platform, host).public_json()


def rows(platform: Platform, path: str) -> dict[str, str]:
    bundle = compose(platform, FIRST)
    if path in bundle.files:
        text = bundle.files[path].content
    else:
        values = {name: f"<{name}>" for name in required(platform, FIRST)}
        text = compose_secrets(platform, FIRST, values)[path].content
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: rest for name, _, rest in (line.partition(":") for line in lines)}


def test_a_suspended_mailbox_takes_mail_and_nobody_logs_in() -> None:
    platform = with_mailbox("away", suspended=True)
    assert "away" in rows(platform, maildrop.USERS)
    table = compose(platform, FIRST).files[maildrop.VIRTUAL_MAILDROP].content
    assert f"away@{platform.maildrop_domain} " in table
    assert "away" not in rows(platform, maildrop.PASSWORDS)
    assert mailbox_hash("away") not in required(platform, FIRST)


def test_passwords_stand_in_no_list_that_others_read() -> None:
    listed = rows(PLATFORM, maildrop.USERS)
    assert set(rows(PLATFORM, maildrop.PASSWORDS)) < set(listed) == set(PLATFORM.mailboxes)
    assert all(fields.startswith("::::::") for fields in listed.values())
    wanted = compose(PLATFORM, FIRST).secret_files
    for path in (maildrop.PASSWORDS, maildrop.CONTROLLER_PASSWORD):
        assert (wanted[path].owner, wanted[path].group, wanted[path].mode) == (
            "root",
            "dovecot",
            0o640,
        )
    assert wanted[pairsync.SECRET].mode == 0o600


def test_a_quota_is_in_the_list_to_the_byte() -> None:
    listed = rows(with_mailbox("small", quota="64 MiB"), maildrop.USERS)
    assert "userdb_quota_storage_size=67108864B" in listed["small"].split(":")[-1].split()
    assert "quota" not in listed["alice"]


def test_a_filter_writes_in_the_name_of_the_mailboxs_main_address() -> None:
    assert main_address(PLATFORM, "alice") == f"alice@{PLATFORM.domain}"
    assert main_address(PLATFORM, "nobody") is None
    assert (
        f"userdb_sieve_user_email=alice@{PLATFORM.domain}"
        in rows(PLATFORM, maildrop.USERS)["alice"].split(":")[-1].split()
    )


def test_each_name_that_somebody_verifies_has_a_certificate() -> None:
    names = {
        PLATFORM.names.imap,
        PLATFORM.maildrop_domain,
        PLATFORM.webmail_backend,
        FIRST.name,
    }
    assert {certificate_key(name) for name in names} <= set(required(PLATFORM, FIRST))
    assert set(maildrop.certificates(PLATFORM, FIRST)) == names


# -- who reaches what ---------------------------------------------------------------------------


def sources(port: int) -> set[str]:
    (found,) = (r for r in maildrop.fragment(PLATFORM, FIRST).ports if r.port == port)
    assert found.sources is not None
    return {str(source) for source in found.sources}


def legs(*roles: Role) -> set[str]:
    found = [PLATFORM.internal_leg(h) for role in roles for h in PLATFORM.members(role)]
    return {str(ip_network(a)) for leg in found for a in (leg.ipv4, leg.ipv6)}


def test_mail_comes_from_smtp_in_alone() -> None:
    assert sources(25) == sources(465) == legs(Role.SMTP_IN)
    main = compose(PLATFORM, FIRST).files["/etc/postfix/main.cf"].content
    (allowed,) = re.findall(r"smtpd_client_restrictions = .*cidr:\{(.*)\}, reject", main)
    listed = {str(ip_network(a)) for a in re.findall(r"\{ (\S+) permit \}", allowed)}
    assert listed == legs(Role.SMTP_IN)


def test_proxy_ports_are_for_the_frontends_alone() -> None:
    assert sources(10993) == sources(14190) == legs(Role.FRONTEND)
    text = compose(PLATFORM, FIRST).files["/etc/dovecot/dovecot.conf"].content
    (trusted,) = re.findall(r"haproxy_trusted_networks = (.*)", text)
    assert {str(ip_network(a)) for a in trusted.split()} == legs(Role.FRONTEND)


def test_filters_are_edited_from_the_listed_networks_and_webmail() -> None:
    assert PLATFORM.maildrop is not None
    assert sources(4190) == {str(n) for n in PLATFORM.maildrop.managesieve} | legs(Role.WEBMAIL)


def test_pairsync_listens_to_the_other_replica_alone() -> None:
    leg = PLATFORM.internal_leg(SECOND)
    assert sources(63301) == {str(ip_network(leg.ipv4)), str(ip_network(leg.ipv6))}
    text = compose(PLATFORM, FIRST).files[pairsync.CONFIG].content
    assert f'name = "{FIRST.name}"' in text and f'name = "{SECOND.name}"' in text
    assert pairsync_secret() in required(PLATFORM, FIRST)


def test_pairsync_reads_its_configuration() -> None:
    config = parse(compose(PLATFORM, FIRST).files[pairsync.CONFIG].content, pairsync.CONFIG)
    assert (config.name, config.peer.name) == (FIRST.name, SECOND.name)
    assert config.peer.address == str(PLATFORM.internal_leg(SECOND).ipv4)
    assert config.peer.port == config.listen.port == pairsync.PORT
    assert str(config.dovecot.homes) == maildrop.HOMES
    assert config.sieve is not None
    # Its key and its secret are copies that systemd makes for it, under these names.
    drop_in = compose(PLATFORM, FIRST).files[f"{maildrop.UNITS}/{pairsync.UNIT}.d/mail.conf"]
    given = dict(re.findall(r"LoadCredential=(\w+):(.*)", drop_in.content))
    for path in (config.tls.certificate, config.tls.key, config.files.secret):
        assert str(path.parent) == pairsync.CREDENTIALS
        assert given[path.name] in compose(PLATFORM, FIRST).secret_files


def test_pairsync_is_installed_as_it_stands_in_the_checkout() -> None:
    files = compose(PLATFORM, FIRST).files
    assert files[pairsync.HOOK].template == "pairsync/notify.lua"
    assert files[pairsync.COMMAND].mode == 0o755
    assert f"/etc/systemd/system/{pairsync.UNIT}" in files
    assert any(p.startswith(f"{pairsync.LIBRARY}/pairsync/") for p in files)
    config = files["/etc/dovecot/dovecot.conf"].content
    assert f"lua_file = {pairsync.HOOK}\n" in config


def test_spam_is_learned_at_one_member_of_the_filter() -> None:
    texts = {compose(PLATFORM, h).files[maildrop.TRAIN].content for h in PLATFORM.replicas}
    (text,) = texts
    assert len(re.findall(r"http://\S+:11334", text)) == 1


# -- what leads here ------------------------------------------------------------------------------


def test_owners_of_mailboxes_log_in_to_submission() -> None:
    on = smtp_out.logins(with_mailbox("owner"))
    assert on["owner"] == mailbox_hash("owner")
    # A login of their own, and nobody while suspended.
    assert on["alice"] == sasl_hash("alice")
    assert PLATFORM.mailboxes["dave"].suspended and "dave" not in on


def test_resolvers_know_the_mailboxes() -> None:
    backend, domain = internal_names(PLATFORM)[-2:]
    assert backend.name == PLATFORM.webmail_backend and len(backend.addresses) == 4
    assert domain.name == PLATFORM.maildrop_domain
    assert domain.exchanges == ((10, FIRST.name), (20, SECOND.name))


# -- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (Role.RSPAMD, "no host has the role 'rspamd'"),
        (Role.MAILDROP, "maildrop has 1 members"),
    ],
)
def test_a_platform_that_cannot_keep_mailboxes_is_told_so(gone: Role, words: str) -> None:
    hosts = {n: h for n, h in PLATFORM.hosts.items() if n == FIRST.name or gone not in h.roles}
    with pytest.raises(SiteError) as caught:
        compose(PLATFORM.model_copy(update={"hosts": hosts}), FIRST)
    assert any(words in p.message for p in caught.value.problems)
    assert all(p.remedy for p in caught.value.problems)


def test_mailboxes_do_not_go_where_there_is_no_data_volume() -> None:
    host = FIRST.model_copy(update={"vm": None})
    hosts = {**PLATFORM.hosts, host.name: host}
    with pytest.raises(SiteError) as caught:
        maildrop.fragment(PLATFORM.model_copy(update={"hosts": hosts}), host)
    (problem,) = caught.value.problems
    assert "data volume" in problem.message


def test_without_the_data_volume_nothing_starts() -> None:
    files = compose(PLATFORM, FIRST).files
    drop_in = files["/etc/systemd/system/dovecot.service.d/mail.conf"].content
    for place in ("/var/dovecot", "/var/lib/pairsync", "/var/spool/postfix"):
        assert re.search(rf"RequiresMountsFor=.*{place}(\s|$)", drop_in)
    for unit in maildrop.DATA_UNITS[1:]:
        assert "Requires=mail-mailboxes.service" in files[unit].content
    assert "Requires=mail-data.service" in files[maildrop.DATA_UNITS[0]].content


def test_health_reads_a_greeting_after_tls() -> None:
    health = compose(PLATFORM, FIRST).health
    greeted = [
        h.command[-2:] for h in health if isinstance(h, CommandHealth) and "993" in h.command
    ]
    assert greeted == [("127.0.0.1", "993"), ("::1", "993")]
