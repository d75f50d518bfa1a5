"""webmail: what makes a host show the mailboxes, and what leads there."""

from __future__ import annotations

import re
from ipaddress import ip_network

import pytest

from mailsite.bundle import compose, compose_secrets
from mailsite.fragment import CommandHealth
from mailsite.loader import SiteError, load_platform
from mailsite.model import Platform, Role
from mailsite.records import static_records
from mailsite.roles import frontend, webmail
from mailsite.secret_names import certificate_key, roundcube_key, sasl_hash, sasl_password
from mailsite.secrets import required
from tests.unit.test_loader import EXAMPLE

PLATFORM = load_platform(EXAMPLE)
FIRST, SECOND = PLATFORM.members(Role.WEBMAIL)
EDGE = PLATFORM.members(Role.FRONTEND)[0]
SITE = "/etc/nginx/sites-enabled/zz-webmail.conf"
assert PLATFORM.webmail is not None
LOGIN = PLATFORM.webmail.sasl_user
NAME = PLATFORM.names.webmail


def without_webmail() -> Platform:
    hosts = {n: h for n, h in PLATFORM.hosts.items() if Role.WEBMAIL not in h.roles}
    return PLATFORM.model_copy(update={"hosts": hosts, "webmail": None})


def settings(path: str = webmail.CONFIG) -> str:
    return compose(PLATFORM, FIRST).files[path].content


# -- the hosts ----------------------------------------------------------------------------------


def test_a_standby_is_what_the_primary_is() -> None:
    one, two = compose(PLATFORM, FIRST), compose(PLATFORM, SECOND)
    own = {"/etc/hostname", "/etc/hosts", "/etc/systemd/system/mail-upgrade.timer"}
    assert {p for p in one.files if one.files[p] != two.files[p]} <= own
    assert required(PLATFORM, FIRST) == required(PLATFORM, SECOND)
    values = {name: f"<{name}>" for name in required(PLATFORM, FIRST)}
    assert compose_secrets(PLATFORM, FIRST, values) == compose_secrets(PLATFORM, SECOND, values)


def test_secrets_are_webmails_key_its_password_and_its_certificate() -> None:
    found = required(PLATFORM, FIRST)
    assert {roundcube_key(), sasl_password(LOGIN), certificate_key(NAME)} < set(found)
    assert sasl_hash(LOGIN) not in found
    values = {name: f"<{name}>" for name in found}
    files = compose_secrets(PLATFORM, FIRST, values)
    for path, file in files.items():
        group, mode = ("www-data", 0o640) if path == webmail.SECRETS else ("root", 0o600)
        assert (file.owner, file.group, file.mode) == ("root", group, mode)
    assert f"'<{roundcube_key()}>'" in files[webmail.SECRETS].content
    assert f"'<{sasl_password(LOGIN)}>'" in files[webmail.SECRETS].content
    assert not any(
        "<" + s in f.content for s in found for f in compose(PLATFORM, FIRST).files.values()
    )


@pytest.mark.parametrize(
    ("path", "key", "peer"),
    [
        (webmail.CONFIG, "imap_conn_options", PLATFORM.webmail_backend),
        (webmail.CONFIG, "smtp_conn_options", PLATFORM.names.smtp_out),
        (webmail.SIEVE_CONFIG, "managesieve_conn_options", PLATFORM.webmail_backend),
    ],
)
def test_every_server_that_it_talks_to_must_prove_its_name(path: str, key: str, peer: str) -> None:
    (options,) = re.findall(rf"\['{key}'\] = \[(.*?)\n\];", settings(path), re.S)
    for row in ("'verify_peer' => true", "'verify_peer_name' => true", f"'peer_name' => '{peer}'"):
        assert row in options
    assert "'cafile' => '/etc/ssl/certs/ca-certificates.crt'" in options


@pytest.mark.parametrize(
    ("path", "row"),
    [
        (webmail.CONFIG, "['imap_host'] = 'ssl://127.0.0.1:993'"),
        (webmail.CONFIG, "['smtp_host'] = 'tls://127.0.0.1:587'"),
        (webmail.CONFIG, f"['smtp_user'] = '{LOGIN}'"),
        (webmail.CONFIG, "['skin'] = 'elastic'"),
        (webmail.CONFIG, "['default_list_mode'] = 'threads'"),
        (webmail.CONFIG, "['zipdownload_selection'] = true"),
        (webmail.CONFIG, "['enable_spellcheck'] = true"),
        (webmail.CONFIG, "['spellcheck_engine'] = 'pspell'"),
        (webmail.CONFIG, "['log_driver'] = 'syslog'"),
        (webmail.CONFIG, f"sqlite:///{webmail.DATA}/"),
        (webmail.SIEVE_CONFIG, "['managesieve_host'] = 'tls://127.0.0.1:4190'"),
    ],
)
def test_what_the_article_sets_is_set(path: str, row: str) -> None:
    assert row in settings(path)


def test_the_ways_lead_to_each_member_by_address_the_primary_first() -> None:
    found = {way.name: way for way in webmail.ways(PLATFORM)}
    assert PLATFORM.maildrop is not None
    primaries = {
        "imap": PLATFORM.maildrop.primary,
        "managesieve": PLATFORM.maildrop.primary,
        "submission": PLATFORM.outbound.primary,
    }
    assert {name: way.servers[0][0] for name, way in found.items()} == primaries
    text = settings(webmail.NGINX)
    for name, way in found.items():
        assert f"listen 127.0.0.1:{way.port};\n\t\tproxy_pass {name};" in text
        rows = [f"server {a}:{way.port} max_fails=1" for _, a in way.servers]
        assert all(row in text for row in rows)
    assert len(found["submission"].servers) == len(PLATFORM.members(Role.SMTP_OUT))
    assert text.count(" backup; #") == sum(len(w.servers) - 1 for w in found.values())


def test_only_frontends_reach_it_and_are_believed_who_the_client_is() -> None:
    legs = [PLATFORM.internal_leg(h) for h in PLATFORM.members(Role.FRONTEND)]
    addresses = [a for leg in legs for a in (leg.ipv4, leg.ipv6)]
    (rule,) = webmail.fragment(PLATFORM, FIRST).ports
    assert (rule.port, set(rule.sources or ())) == (443, {ip_network(a) for a in addresses})
    trusted = re.findall(r"set_real_ip_from (.*);", settings(webmail.NGINX))
    assert trusted == [str(a) for a in addresses]


def test_a_first_identity_is_the_mailboxs_main_address() -> None:
    assert webmail.identities(PLATFORM)["alice"] == f"alice@{PLATFORM.domain}"
    assert f"\nalice@{PLATFORM.domain} alice\n" in settings(webmail.IDENTITIES)


def test_without_the_data_volume_nothing_starts() -> None:
    files = compose(PLATFORM, FIRST).files
    unit = files["/etc/systemd/system/mail-webmail.service"].content
    drop_in = files[f"/etc/systemd/system/{webmail.FPM}.service.d/mail.conf"].content
    assert "Requires=mail-data.service" in unit and "Requires=mail-webmail.service" in drop_in


def test_health_is_the_page_itself() -> None:
    health = compose(PLATFORM, FIRST).health
    for address in ("127.0.0.1", "::1"):
        assert webmail.shows(address, NAME) in health
    (command,) = {
        h.command[3] for h in health if isinstance(h, CommandHealth) and NAME in h.command
    }
    assert "reply.status != 200 or mark not in page" in command


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"webmail": None}, "site.yaml has no 'webmail'"),
        ({"maildrop": None, "hosts": {FIRST.name: FIRST}}, "no host has the role 'maildrop'"),
        ({"hosts": {FIRST.name: FIRST.model_copy(update={"vm": None})}}, "no data volume"),
    ],
)
def test_a_platform_that_cannot_show_mailboxes_is_told_so(
    change: dict[str, object], words: str
) -> None:
    platform = PLATFORM.model_copy(update=change)
    with pytest.raises(SiteError) as caught:
        webmail.fragment(platform, platform.hosts[FIRST.name])
    assert any(words in p.message for p in caught.value.problems)
    assert all(p.remedy for p in caught.value.problems)


# -- the frontends ------------------------------------------------------------------------------


def site() -> str:
    return compose(PLATFORM, EDGE).files[SITE].content


def server(text: str, *words: str) -> str:
    (found,) = (s for s in re.findall(r"^server \{\n(.*?)^\}", text, re.M | re.S)
                if all(w in s for w in words))  # fmt: skip
    return found


def test_http_leads_to_https_by_every_name_of_the_article() -> None:
    plain = server(site(), "listen 80;", "listen [::]:80;")
    inside = f"webmail.{PLATFORM.internal_domain}"
    assert f"server_name {NAME} {inside} webmail;" in plain
    assert f"return 301 https://{NAME}$request_uri;" in plain
    other = server(site(), f"server_name {inside};", "listen 443 ssl;")
    assert f"return 301 https://{NAME}$request_uri;" in other


def test_who_is_not_allowed_is_led_to_the_home_page() -> None:
    assert PLATFORM.webmail is not None
    (rows,) = re.findall(r"geo \$mail_webmail_allowed \{\n(.*?)^\}", site(), re.M | re.S)
    allowed = {r.split()[0] for r in rows.splitlines() if r.strip().endswith(" 1;")}
    networks = {str(n) for n in PLATFORM.webmail.networks}
    assert allowed == networks | {"127.0.0.0/8", "::1"}
    assert "\tdefault 0;\n" in rows
    own = server(site(), f"server_name {NAME};", "listen 443 ssl;")
    refusal = f"if ($mail_webmail_allowed = 0) {{\n\t\treturn 302 {PLATFORM.home_page};"
    assert own.index(refusal) < own.index("proxy_pass")


def test_the_primary_is_in_front_and_proves_its_name() -> None:
    rows = re.findall(r"^\tserver (\S+):443 (.*);", site(), re.M)
    legs = [PLATFORM.internal_leg(h) for h in (FIRST, SECOND)]
    assert [address for address, _ in rows] == [str(leg.ipv4) for leg in legs]
    assert ["backup" in about for _, about in rows] == [False, True]
    own = server(site(), f"server_name {NAME};", "listen 443 ssl;")
    for row in ("proxy_ssl_verify on;", f"proxy_ssl_name {NAME};", "proxy_ssl_server_name on;"):
        assert row in own
    assert f"proxy_bind {PLATFORM.internal_leg(EDGE).ipv4};" in own


@pytest.mark.parametrize(
    "header",
    [
        "Strict-Transport-Security",
        "Content-Security-Policy",
        "X-Content-Type-Options nosniff",
        "X-Frame-Options",
        "Referrer-Policy",
    ],
)
def test_pages_come_with_the_headers_of_the_time(header: str) -> None:
    own = server(site(), f"server_name {NAME};", "listen 443 ssl;")
    assert re.search(rf"add_header {header}.* always;", own)
    # One in a location would replace all of them.
    assert "add_header" not in own[own.index("location /") :]


def test_no_server_of_ours_is_the_operators_default() -> None:
    """It stands behind the operator's own, and the first one of a port answers for all others."""
    assert "default_server" not in site()
    assert SITE.rpartition("/")[2] > "zy"


def test_authorities_of_a_rehearsal_reach_an_existing_machine() -> None:
    world = PLATFORM.world.model_copy(update={"ca_certificates": ("one\n", "two")})
    files = compose(PLATFORM.with_world(world), EDGE).files
    assert files[frontend.AUTHORITIES].content == "one\ntwo\n"
    assert f"proxy_ssl_trusted_certificate {frontend.AUTHORITIES};" in files[SITE].content
    assert "proxy_ssl_trusted_certificate /etc/ssl/certs/ca-certificates.crt;" in site()
    assert frontend.AUTHORITIES not in compose(PLATFORM, EDGE).files


def test_a_platform_without_webmail_has_no_page() -> None:
    found = frontend.fragment(without_webmail(), EDGE)
    assert SITE not in found.files and found.secret_files == {}
    assert not {80, 443} & {rule.port for rule in found.ports}
    names = {r.name for r in static_records(without_webmail())}
    assert not {NAME, PLATFORM.internal_name(Role.WEBMAIL)} & names


# -- what it needs elsewhere --------------------------------------------------------------------


def test_submission_does_not_count_webmail_as_one_client() -> None:
    member = PLATFORM.members(Role.SMTP_OUT)[0]
    main = compose(PLATFORM, member).files["/etc/postfix/main.cf"].content
    (row,) = re.findall(r"^smtpd_client_event_limit_exceptions = (.*)$", main, re.M)
    legs = [PLATFORM.internal_leg(h) for h in (FIRST, SECOND)]
    wanted = {str(leg.ipv4) for leg in legs} | {f"[{leg.ipv6}]" for leg in legs}
    assert set(row.split(", ")) == {"$mynetworks", *wanted}


def test_mailboxes_do_not_slow_webmail_down_for_one_wrong_password() -> None:
    text = compose(PLATFORM, PLATFORM.replicas[0]).files["/etc/dovecot/dovecot.conf"].content
    (row,) = re.findall(r"^login_trusted_networks = (.*)$", text, re.M)
    legs = [PLATFORM.internal_leg(h) for h in (FIRST, SECOND)]
    assert {str(a) for leg in legs for a in (leg.ipv4, leg.ipv6)} == set(row.split())
