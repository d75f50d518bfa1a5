"""certificates: who asks whom, for which names, and what a host does when there is a newer one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.mail_certificates import Settings
from mailsite.bundle import asked_names, compose, compose_secrets, fragments
from mailsite.fragment import CommandHealth
from mailsite.loader import SiteError, load_platform
from mailsite.model import Acme, AcmeAccess, Certificates, Host, Platform, Role
from mailsite.roles import certificates
from mailsite.roles.base import internal_networks_of
from mailsite.secrets import required
from tests.unit.test_loader import EXAMPLE

GIVEN = load_platform(EXAMPLE)
ACME = Acme(
    provider="cloudflare", secrets=("CLOUDFLARE_DNS_API_TOKEN",), email="hostmaster@example.org"
)
TOKEN = "/etc/mail-certificates/acme-CLOUDFLARE_DNS_API_TOKEN"


def with_acme(role: Role = Role.RSPAMD, **changes: Any) -> Platform:
    """The example with its own certificate, held by the hosts of ``role``."""
    hosts = dict(GIVEN.hosts)
    for host in GIVEN.members(role):
        roles = (Role.CERTIFICATES, *host.roles)
        hosts[host.name] = host.model_copy(update={"roles": roles})
    settings = Certificates(acme=ACME)
    return GIVEN.model_copy(update={"hosts": hosts, "certificates": settings, **changes})


PLATFORM = with_acme()
FIRST, SECOND = PLATFORM.members(Role.CERTIFICATES)
BOX = PLATFORM.members(Role.MAILDROP)[0]
OUT = PLATFORM.members(Role.SMTP_OUT)[0]
SHOWING = [h for h in PLATFORM.hosts.values() if asked_names(PLATFORM).get(h.name)]


def settings(host: Host, platform: Platform = PLATFORM) -> Settings:
    return Settings.parse(compose(platform, host).files[certificates.CONFIG].content)


# -- names ------------------------------------------------------------------------------------


def test_wildcards_for_what_lies_directly_below_our_domains() -> None:
    names = {
        "imap.example.org": "*.example.org",
        "a.hosts.example.org": "*.hosts.example.org",
        "a.b.hosts.example.org": "a.b.hosts.example.org",
        "example.org": "example.org",
        "imap.example.com": "imap.example.com",
    }
    for asked, issued in names.items():
        assert certificates.issued_names(PLATFORM, [asked]) == (issued,)


def test_the_certificate_is_for_every_name_that_is_asked_for() -> None:
    asked = {name for names in asked_names(PLATFORM).values() for name in names}
    assert {PLATFORM.names.smtp_out, PLATFORM.names.imap, PLATFORM.maildrop_domain} <= asked
    issued = settings(FIRST).names
    assert issued == ("*.example.org", "*.hosts.example.org")
    for name in asked:
        assert name in issued or f"*.{name.partition('.')[2]}" in issued


def test_both_holders_want_the_same_certificate() -> None:
    first, second = settings(FIRST), settings(SECOND)
    assert first.names == second.names
    assert first.issuing is not None
    assert second.issuing is not None
    assert (first.issuing.first, second.issuing.first) == (True, False)
    assert [h.name for h in first.holders] == [SECOND.name]
    assert [h.name for h in second.holders] == [FIRST.name]


def test_challenges_are_below_the_names_without_their_star() -> None:
    assert certificates.challenge_names(PLATFORM, ["imap.example.org", "x.y.example.org"]) == (
        "_acme-challenge.example.org",
        "_acme-challenge.x.y.example.org",
    )


# -- hosts that show it -----------------------------------------------------------------------


@pytest.mark.parametrize("host", SHOWING, ids=lambda h: h.name)
def test_each_file_that_was_given_is_pulled_instead(host: Host) -> None:
    given, pulled = compose(GIVEN, host), compose(PLATFORM, host)
    wanted = {p: f for p, f in given.secret_files.items() if "certificate/" in f.secrets[0]}
    assert wanted
    assert not set(wanted) & set(pulled.secret_files)
    assert not [name for name in required(PLATFORM, host) if name.startswith("certificate/")]
    found = {target.path: target for target in settings(host).targets}
    assert set(found) == set(wanted)
    assert set(pulled.produced) == {*wanted, certificates.COPY}
    for path, file in wanted.items():
        target = found[path]
        assert (target.owner, target.group, target.mode) == (file.owner, file.group, file.mode)
        assert target.mode & 0o077 == 0
        assert target.parts == ("key", "chain")
    assert [h.name for h in settings(host).holders] == [FIRST.name, SECOND.name]


def test_exactly_the_services_that_show_it_are_reloaded() -> None:
    units = {unit.name: unit for unit in settings(BOX).units}
    assert {name: unit.verb for name, unit in units.items()} == {
        "dovecot.service": "reload",
        "pairsync.service": "restart",
        "postfix.service": "reload",
    }
    assert units["pairsync.service"].paths == (f"/etc/certs/{BOX.name}/combined.pem",)
    assert [unit.name for unit in settings(OUT).units] == ["postfix.service"]


def test_daemons_start_after_it_is_there() -> None:
    bundle = compose(PLATFORM, BOX)
    orders = {service.unit: service.order for service in bundle.services}
    for unit in settings(BOX).units:
        assert orders["mail-certificates.service"] < orders[unit.name]
    text = bundle.files["/etc/systemd/system/mail-certificates.service"].content
    (before,) = [line for line in text.splitlines() if line.startswith("Before=")]
    assert {unit.name for unit in settings(BOX).units} <= set(
        before.removeprefix("Before=").split()
    )


def test_checkers_find_something_before_the_first_one_is_here() -> None:
    checks = compose(PLATFORM, BOX).checks
    first = next(check for check in checks if check.name != "systemd" and "sshd" not in check.name)
    names = [check.name for check in checks]
    assert names.index("certificates") < names.index("dovecot")
    assert names.index("certificates") < names.index("postfix")
    assert first.name
    (stand_in,) = [check for check in checks if check.name == "certificates"]
    assert stand_in.command[1:] == tuple(t.path for t in settings(BOX).targets)


def test_a_host_without_certificates_has_nothing_of_it() -> None:
    plain = PLATFORM.members(Role.FRONTEND)[0].model_copy(update={"roles": (Role.SERVER,)})
    platforms = [
        platform.model_copy(update={"hosts": {**platform.hosts, plain.name: plain}})
        for platform in (PLATFORM, GIVEN)
    ]
    assert compose(platforms[0], plain) == compose(platforms[1], plain)


def test_given_certificates_leave_no_trace_of_acme() -> None:
    for host in GIVEN.hosts.values():
        bundle = compose(GIVEN, host)
        assert not [path for path in bundle.files if "mail-certificates" in path]
        assert bundle.produced == ()


# -- holders ----------------------------------------------------------------------------------


def values(host: Host) -> dict[str, str]:
    return {name: f"<{name}>" for name in required(PLATFORM, host)}


@pytest.mark.parametrize("host", [FIRST, SECOND], ids=lambda h: h.name)
def test_each_host_has_a_key_that_is_good_for_one_command_from_its_own_addresses(
    host: Host,
) -> None:
    files = compose_secrets(PLATFORM, host, values(host))
    lines = files["/etc/mail-certificates/authorized_keys"].content.splitlines()
    keys = [line for line in lines if line and not line.startswith("#")]
    clients = [h for h in (*SHOWING, FIRST, SECOND) if h.name != host.name]
    assert len(keys) == len(clients)
    for client in clients:
        (line,) = [line for line in keys if line.endswith(f" {client.name}")]
        addresses = [str(n.network_address) for n in internal_networks_of(PLATFORM, [client])]
        assert line == (
            f'restrict,from="{",".join(addresses)}",command="{certificates.SERVE}"'
            f" <pull-key/{client.name}/public> {client.name}"
        )


@pytest.mark.parametrize("host", [OUT, FIRST, SECOND], ids=lambda h: h.name)
def test_holders_are_known_by_their_keys(host: Host) -> None:
    content = compose_secrets(PLATFORM, host, values(host))["/etc/mail-certificates/known_hosts"]
    others = [h.name for h in (FIRST, SECOND) if h.name != host.name]
    assert content.content.split() == [
        word for name in others for word in (name, f"<holder-key/{name}/public>")
    ]
    assert content.mode == 0o600


def test_its_port_is_open_to_those_who_show_it_alone() -> None:
    (rule,) = [
        rule
        for fragment in fragments(PLATFORM, FIRST)
        for rule in fragment.ports
        if rule.port == 2022
    ]
    assert set(rule.sources or ()) == set(internal_networks_of(PLATFORM, [*SHOWING, SECOND]))
    assert "tcp dport 2022" in compose(PLATFORM, FIRST).files["/etc/nftables.conf"].content


def test_the_token_is_for_the_acme_client_alone() -> None:
    for host in PLATFORM.hosts.values():
        holds = host in (FIRST, SECOND)
        names = {n for n in required(PLATFORM, host) if n.startswith("acme/")}
        assert names == ({"acme/CLOUDFLARE_DNS_API_TOKEN"} if holds else set())
    bundle = compose(PLATFORM, FIRST)
    token = bundle.secret_files[TOKEN]
    assert (token.owner, token.group, token.mode) == ("root", "root", 0o600)
    readers = {path for path, file in bundle.files.items() if TOKEN in file.content}
    assert readers == {"/etc/systemd/system/mail-acme.service"}
    unit = bundle.files["/etc/systemd/system/mail-acme.service"].content
    assert "DynamicUser=yes" in unit
    assert f"LoadCredential=CLOUDFLARE_DNS_API_TOKEN:{TOKEN}" in unit
    assert "Environment=CLOUDFLARE_DNS_API_TOKEN_FILE=%d/CLOUDFLARE_DNS_API_TOKEN" in unit


def test_a_push_of_a_holder_waits_for_a_certificate() -> None:
    for host in (FIRST, SECOND):
        health = compose(PLATFORM, host).health
        (ready,) = [h for h in health if isinstance(h, CommandHealth) and "ready" in h.command]
        assert ready.timeout >= 600


def test_the_world_says_which_authority_and_provider() -> None:
    access = AcmeAccess(
        directory="https://acme.pelican.example/dir",
        provider="rfc2136",
        environment={"RFC2136_NAMESERVER": "192.0.2.53:53"},
        secrets=("RFC2136_TSIG_SECRET",),
    )
    world = PLATFORM.world.model_copy(update={"acme": access})
    platform = PLATFORM.with_world(world)
    unit = compose(platform, FIRST).files["/etc/systemd/system/mail-acme.service"].content
    assert " --server https://acme.pelican.example/dir " in unit
    assert " --dns rfc2136 " in unit
    assert 'Environment="RFC2136_NAMESERVER=192.0.2.53:53"' in unit
    assert "CLOUDFLARE" not in unit
    assert " --email hostmaster@example.org " in unit


def test_a_holder_that_shows_one_itself_is_refused() -> None:
    platform = with_acme(Role.SMTP_OUT)
    holder = platform.members(Role.CERTIFICATES)[0]
    with pytest.raises(SiteError) as caught:
        compose(platform, holder)
    (problem,) = caught.value.problems
    assert problem.value == holder.name
    assert "could not start before the first one is issued" in problem.message


def test_a_retired_host_asks_for_nothing() -> None:
    edge = PLATFORM.members(Role.FRONTEND)[0].model_copy(update={"retired": True})
    assert compose(PLATFORM, edge).produced == ()


def test_the_documents_settings_are_what_the_program_reads() -> None:
    for host in (FIRST, OUT):
        document = json.loads(compose(PLATFORM, host).files[certificates.CONFIG].content)
        assert set(document) == {
            *("names", "port", "login", "holders", "targets", "units", "issuing"),
        }
