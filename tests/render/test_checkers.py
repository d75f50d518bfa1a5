"""Each daemon's own checker reads what we render, and refuses what is broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest

from mailsite.bundle import Check, compose
from mailsite.fragment import File
from mailsite.model import Platform, Role, TlsLevel
from mailsite.roles import rspamd, webmail
from tests.render.conftest import Case, all_files, cases, in_rehearsal
from tests.render.image import Image, Result, Step
from tests.unit.test_roles_certificates import with_acme

CASES = cases()


def steps(platform: Platform, case: Case) -> tuple[list[Check], list[Step]]:
    """The checks of the bundle, and the commands as the agent runs them: maps first."""
    bundle = compose(platform, platform.hosts[case.host.name])
    maps = [Step(build.command) for build in bundle.maps]
    return list(bundle.checks), [*maps, *(Step(check.command) for check in bundle.checks)]


def refusals(checks: Sequence[Check], results: Sequence[Result]) -> dict[str, str]:
    """Checks that refuse, with their words. ``results`` has those of the maps in front."""
    offset = len(results) - len(checks)
    failed = {f"map {n}": r.words for n, r in enumerate(results[:offset]) if r.status}
    for check, result in zip(checks, results[offset:], strict=True):
        if result.status != 0 or (check.stderr_is_failure and result.err.strip()):
            failed[check.name] = result.words
    return failed


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_every_checker_accepts_every_host(image: Image, case: Case) -> None:
    checks, commands = steps(case.platform, case)
    assert checks
    results = image.run(all_files(case.platform, case.host), commands)
    assert refusals(checks, results) == {}


def first(role: Role) -> Case:
    return next(c for c in CASES if role in c.host.roles)


@pytest.mark.parametrize(
    "role",
    [Role.SMTP_OUT, Role.FRONTEND, Role.SMTP_IN, Role.RSPAMD, Role.MAILDROP, Role.WEBMAIL],
)
def test_every_checker_accepts_a_host_of_a_rehearsal(image: Image, role: Role) -> None:
    case = first(role)
    platform = in_rehearsal(case.platform)
    checks, commands = steps(platform, case)
    files = all_files(platform, case.host)
    assert refusals(checks, image.run(files, commands)) == {}


def test_checkers_look_at_a_host_before_its_first_certificate_is_there(image: Image) -> None:
    """What they find instead goes with the machine that they look at."""
    platform = with_acme()
    case = Case("acme", platform, platform.members(Role.MAILDROP)[0])
    bundle = compose(case.platform, case.host)
    files = all_files(case.platform, case.host)
    paths = [path for path in bundle.produced if path.startswith("/etc/certs/")]
    assert paths
    assert not set(paths) & set(files)
    checks, commands = steps(case.platform, case)
    assert refusals(checks, image.run(files, commands)) == {}
    offset = len(commands) - len(checks)
    plain = [
        (check, step)
        for check, step in zip(checks, commands[offset:], strict=True)
        if check.name != "certificates"
    ]
    some = [*commands[:offset], *(step for _, step in plain)]
    told = refusals([check for check, _ in plain], image.run(files, some))
    assert "certificate" in told


def test_every_checker_accepts_a_holder_of_the_certificate(image: Image) -> None:
    platform = in_rehearsal(with_acme())
    case = Case("acme", platform, platform.members(Role.CERTIFICATES)[0])
    checks, commands = steps(platform, case)
    assert "certificates-sshd" in [check.name for check in checks]
    assert refusals(checks, image.run(all_files(platform, case.host), commands)) == {}


@pytest.mark.parametrize("level", TlsLevel)
def test_every_tls_level_is_accepted_and_in_force(image: Image, level: TlsLevel) -> None:
    case = first(Role.SMTP_OUT)
    outbound = case.platform.outbound.model_copy(update={"tls": level})
    platform = case.platform.model_copy(update={"outbound": outbound})
    checks, commands = steps(platform, case)
    ask = ("postconf", "-h", "smtp_tls_security_level", "smtp_dns_support_level")
    *results, told = image.run(all_files(platform, case.host), [*commands, Step(ask)])
    assert refusals(checks, results) == {}
    support = "dnssec" if level is TlsLevel.DANE else ""
    assert told.out.split("\n") == [level.value, support, ""]


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in a file; ``check`` must refuse that and say ``words``."""

    check: str
    path: str
    old: str
    new: str
    words: str

    def broken(self, files: Mapping[str, File]) -> str:
        content = files[self.path].content
        assert self.old in content, f"{self.path} has no {self.old!r} to break"
        return content.replace(self.old, self.new, 1)

    @property
    def id(self) -> str:
        return f"{self.check}-{self.new.strip()}"


OUT_FAULTS = (
    Fault("nftables", "/etc/nftables.conf", "dport 22", "dport 220000", "/etc/nftables.conf:"),
    Fault("sshd", "/etc/ssh/sshd_config.d/10-mail.conf", "UseDNS", "UseDNSS", "10-mail.conf"),
    Fault("unbound", "/etc/unbound/unbound.conf", "IN A ", "IN A x", "local-data"),
    Fault("unbound", "/etc/unbound/unbound.conf", "    prefetch:", "    prefech:", "prefech"),
    Fault("postconf", "/etc/postfix/main.cf", "biff = no", "bif = no", "bif=no"),
    Fault(
        "postconf-master",
        "/etc/postfix/master.cf",
        "smtpd_sasl_auth_enable=",
        "smtpd_sasl_auth_enabled=",
        "smtpd_sasl_auth_enabled",
    ),
    Fault(
        "postfix", "/etc/postfix/main.cf", "message_size_limit = ", "message_size_limit = x", "x"
    ),
    Fault("postfix", "/etc/postfix/master.cf", "pickup    unix", "pickup    unicks", "unicks"),
    Fault("dovecot", "/etc/dovecot/dovecot.conf", "auth_verbose", "auth_verbos", "auth_verbos"),
    Fault("dovecot", "/etc/dovecot/dovecot.conf", "mode = 0660", "mode = rw", "line"),
    Fault("opendkim", "/etc/opendkim.conf", "LogWhy", "LogWhi", "/etc/opendkim.conf"),
    Fault("dkim", "/etc/opendkim/keytable", "/etc/opendkim/keys", "/nowhere", "/etc/opendkim"),
    Fault("dkim", "/etc/opendkim/signers", "*@*.", "*@", "signers"),
    Fault(
        "systemd",
        "/etc/systemd/system/var-spool-postfix.mount",
        "Where=",
        "Were=",
        "var-spool-postfix.mount",
    ),
    Fault(
        "systemd",
        "/etc/systemd/system/opendkim.service.d/mail.conf",
        "RuntimeMaxSec=1d",
        "RuntimeMaxSec=often",
        "opendkim.service.d/mail.conf",
    ),
)

FRONTEND_FAULTS = (
    Fault(
        "nginx",
        "/etc/nginx/mail-streams.d/smtp-out.conf",
        "proxy_protocol on;",
        "proxy_protocol on",
        "/etc/nginx/mail-streams.d/smtp-out.conf:",
    ),
    Fault(
        "nginx",
        "/etc/nginx/modules-enabled/90-mail-streams.conf",
        "access_log",
        "acces_log",
        "/etc/nginx/modules-enabled/90-mail-streams.conf:",
    ),
    Fault(
        "nginx",
        "/etc/nginx/sites-enabled/zz-webmail.conf",
        "proxy_ssl_verify on;",
        "proxy_ssl_verify yes;",
        "/etc/nginx/sites-enabled/zz-webmail.conf:",
    ),
    Fault(
        "nftables",
        "/etc/mail-platform/nftables.conf",
        "policy accept",
        "policy accpt",
        "/etc/mail-platform/nftables.conf:",
    ),
    Fault(
        "systemd",
        "/etc/systemd/system/mail-nftables.service",
        "Type=oneshot",
        "Type=onshot",
        "mail-nftables.service",
    ),
)

IN_FAULTS = (
    Fault("postconf", "/etc/postfix/main.cf", "smtpd_helo_required", "smtpd_hello_required", "he"),
    Fault(
        "postconf-master",
        "/etc/postfix/master.cf",
        "-o content_filter=",
        "-o contents_filter=",
        "contents_filter",
    ),
    Fault("nginx", "/etc/nginx/nginx.conf", "max_fails=1", "max_fail=1", "/etc/nginx/nginx.conf:"),
)

RSPAMD_FAULTS = (
    Fault("rspamd", "/etc/rspamd/local.d/actions.conf", "reject = ", "reject = {", "actions.conf"),
    Fault(
        "rspamd-password", rspamd.CONTROLLER, '\npassword = "$1$', '\npassword = "$1$"; #', "hashes"
    ),
    Fault("redis", "/etc/redis/redis.conf", "tcp-keepalive", "tcp-keepalife", "redis.conf"),
    Fault("redis", "/etc/redis/sentinel.conf", "down-after", "down-before", "sentinel.conf"),
    Fault("redis", "/etc/redis/auth.conf", "requirepass ", "# requirepass ", "auth.conf"),
    Fault(
        "systemd",
        "/etc/systemd/system/rspamd.service.d/mail.conf",
        "TimeoutStopSec=10",
        "TimeoutStopSec=soon",
        "rspamd.service.d/mail.conf",
    ),
)

MAILDROP_FAULTS = (
    Fault("dovecot", "/etc/dovecot/dovecot.conf", "mail_fsync", "mail_fsinc", "mail_fsinc"),
    Fault("sysusers", "/etc/sysusers.d/mail-vmail.conf", "u vmail", "u v!mail", "mail-vmail.conf"),
    Fault("postconf", "/etc/postfix/main.cf", "virtual_transport", "virtual_transprt", "transprt"),
    Fault(
        "systemd",
        "/etc/systemd/system/pairsync.service.d/mail.conf",
        "RequiresMountsFor=",
        "RequiresMountFor=",
        "pairsync.service.d/mail.conf",
    ),
    Fault(
        "systemd",
        "/etc/systemd/system/var-dovecot.mount",
        "Where=",
        "Were=",
        "var-dovecot.mount",
    ),
)

WEBMAIL_FAULTS = (
    Fault("nginx", "/etc/nginx/nginx.conf", "real_ip_header", "reel_ip_header", "nginx.conf:"),
    Fault("php-fpm", webmail.POOL, "pm = dynamic", "pm = dinamic", "www.conf:"),
    Fault("roundcube", webmail.CONFIG, "= 'elastic';", "= 'elastic'", "config.inc.php on line"),
    Fault("roundcube", webmail.SIEVE_CONFIG, "= 1;", "= 1", "managesieve/config.inc.php"),
    Fault(
        "systemd",
        f"/etc/systemd/system/{webmail.FPM}.service.d/mail.conf",
        "PrivateTmp=yes",
        "PrivateTmp=often",
        f"{webmail.FPM}.service.d/mail.conf",
    ),
)

FAULTS = {
    Role.SMTP_OUT: OUT_FAULTS,
    Role.FRONTEND: FRONTEND_FAULTS,
    Role.SMTP_IN: IN_FAULTS,
    Role.RSPAMD: RSPAMD_FAULTS,
    Role.MAILDROP: MAILDROP_FAULTS,
    Role.WEBMAIL: WEBMAIL_FAULTS,
}


@pytest.fixture(scope="session")
def verdicts(image: Image) -> Mapping[tuple[Role, Fault], Result]:
    """What each fault's checker says; one machine per role, each file mended before the next."""
    found: dict[tuple[Role, Fault], Result] = {}
    for role, faults in FAULTS.items():
        case = first(role)
        files = all_files(case.platform, case.host)
        checks, _ = steps(case.platform, case)
        command = {check.name: check.command for check in checks}
        order = []
        for fault in faults:
            order.append(Step(command[fault.check], files={fault.path: fault.broken(files)}))
            order.append(Step(("true",), files={fault.path: files[fault.path].content}))
        for fault, result in zip(faults, image.run(files, order)[::2], strict=True):
            found[role, fault] = result
    return found


@pytest.mark.parametrize(
    ("role", "fault"),
    [pytest.param(r, f, id=f"{r.value}-{f.id}") for r, faults in FAULTS.items() for f in faults],
)
def test_a_fault_is_refused(
    verdicts: Mapping[tuple[Role, Fault], Result], role: Role, fault: Fault
) -> None:
    """The same files without the fault are accepted: test_every_checker_accepts_every_host."""
    case = first(role)
    (check,) = (c for c in compose(case.platform, case.host).checks if c.name == fault.check)
    result = verdicts[role, fault]
    assert refusals([check], [result]) != {}
    assert fault.words in result.words


def test_a_key_that_is_not_the_certificates_is_refused(image: Image) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    case = first(Role.SMTP_OUT)
    files = all_files(case.platform, case.host)
    (path,) = (p for p in files if p.startswith("/etc/certs/"))
    other = (
        rsa.generate_private_key(public_exponent=65537, key_size=2048)
        .private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        .decode()
    )
    _, _, chain = files[path].content.partition("-----END RSA PRIVATE KEY-----\n")
    files[path] = replace(files[path], content=other + chain)
    checks, commands = steps(case.platform, case)
    told = refusals(checks, image.run(files, commands))
    assert path in told["certificate"]


def test_a_signing_key_that_others_can_read_is_refused(image: Image) -> None:
    case = first(Role.SMTP_OUT)
    files = all_files(case.platform, case.host)
    path = next(p for p in files if p.startswith("/etc/opendkim/keys/"))
    files[path] = replace(files[path], mode=0o644)
    checks, commands = steps(case.platform, case)
    assert path in refusals(checks, image.run(files, commands))["dkim"]


def test_a_filter_with_a_mistake_is_refused(image: Image) -> None:
    case = first(Role.MAILDROP)
    files = all_files(case.platform, case.host)
    path = next(p for p in sorted(files) if p.endswith("/default.sieve"))
    files[path] = replace(files[path], content=files[path].content.replace("fileinto", "filinto"))
    checks, commands = steps(case.platform, case)
    told = refusals(checks, image.run(files, commands))
    assert [*told] == ["sieve"]
    assert "default: line" in told["sieve"] and "filinto" in told["sieve"]


def test_resolvers_lead_to_the_mailboxes(image: Image) -> None:
    inbound = first(Role.SMTP_IN)
    checks, commands = steps(inbound.platform, inbound)
    files = all_files(inbound.platform, inbound.host)
    exchange = f"{inbound.platform.maildrop_domain}. 300 IN MX 10 "
    assert exchange in files["/etc/unbound/unbound.conf"].content
    assert refusals(checks, image.run(files, commands)) == {}
