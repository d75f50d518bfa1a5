"""webmail: Roundcube, which shows the mailboxes in a browser, behind the frontends.

NGINX takes the pages' requests from the frontends, and PHP answers them. On its way to the
mailboxes and to submission Roundcube meets NGINX once more, which knows who of them lives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mailsite.aliases import main_address
from mailsite.fragment import (
    Check,
    CommandHealth,
    File,
    Fragment,
    PortRule,
    SecretFile,
    Service,
    TcpHealth,
    UnitHealth,
    templated,
)
from mailsite.loader import Problem, SiteError
from mailsite.model import Host, IPAddress, Platform, Role
from mailsite.roles.base import CA_BUNDLE, CA_FOLDER
from mailsite.roles.dovecot import IMAPS, MANAGESIEVE
from mailsite.roles.postfix import certificate_check, certificate_file, certificate_path
from mailsite.roles.smtp_out import SUBMISSION, proxy_sources
from mailsite.secret_names import roundcube_key, sasl_password

ROLE = Role.WEBMAIL.value
HTTPS = 443
UNITS = "/etc/systemd/system"
#: Debian 13's PHP.
PHP = "8.4"
FPM = f"php{PHP}-fpm"
POOL = f"/etc/php/{PHP}/fpm/pool.d/www.conf"
SOCKET = "/run/php/roundcube.sock"
ROUNDCUBE = "/etc/roundcube"
CONFIG = f"{ROUNDCUBE}/config.inc.php"
SECRETS = f"{ROUNDCUBE}/secrets.inc.php"
SIEVE_CONFIG = f"{ROUNDCUBE}/plugins/managesieve/config.inc.php"
IDENTITIES = f"{ROUNDCUBE}/identities"
NGINX = "/etc/nginx/nginx.conf"
PREPARE = "/usr/local/lib/mail-platform/mail-webmail"
DATA = "/srv/mail/webmail"
#: What the page that asks for a login has, and no error has.
MARK = "rcmloginuser"

# Whether the certificate fits is seen by those who know which name they came by.
_SHOWS = (
    "import http.client, socket, ssl, sys\n"
    "address, port, name, mark = sys.argv[1:]\n"
    "context = ssl.create_default_context()\n"
    "context.check_hostname, context.verify_mode = False, ssl.CERT_NONE\n"
    "connection = http.client.HTTPSConnection(name, int(port), timeout=8, context=context)\n"
    "plain = socket.create_connection((address, int(port)), 8)\n"
    "connection.sock = context.wrap_socket(plain, server_hostname=name)\n"
    "connection.request('GET', '/')\n"
    "reply = connection.getresponse()\n"
    "page = reply.read().decode('utf-8', 'replace')\n"
    "if reply.status != 200 or mark not in page:\n"
    "    sys.exit(f'{address}: {name} answers {reply.status} {page[:200]!r}')"
)

# PHP reads what Roundcube will read, and says where it does not understand it.
_LINT = 'for file; do php -l "$file" >/dev/null || exit 1; done'


def shows(address: str, name: str) -> CommandHealth:
    """The page that asks for a login is there, by ``name`` at ``address``."""
    command = ("python3", "-I", "-c", _SHOWS, address, str(HTTPS), name, MARK)
    return CommandHealth(command, timeout=20)


@dataclass(frozen=True)
class Way:
    """A port on the loopback that leads to the members of another tier, the primary first."""

    name: str
    port: int
    servers: tuple[tuple[str, IPAddress], ...]


def ways(platform: Platform) -> tuple[Way, ...]:
    """Where Roundcube finds the mailboxes, their filters, and submission."""
    preferred = platform.outbound.primary
    members = sorted(platform.members(Role.SMTP_OUT), key=lambda host: host.name != preferred)
    boxes, senders = (
        tuple((host.name, platform.internal_leg(host).ipv4) for host in hosts)
        for hosts in (platform.replicas, members)
    )
    return (
        Way("imap", IMAPS, boxes),
        Way("managesieve", MANAGESIEVE, boxes),
        Way("submission", SUBMISSION, senders),
    )


def identities(platform: Platform) -> Mapping[str, str]:
    """Mailbox -> the address that its owner writes from at first."""
    found = ((name, main_address(platform, name)) for name in sorted(platform.mailboxes))
    return {name: address for name, address in found if address is not None}


def fragment(platform: Platform, host: Host) -> Fragment:
    """What makes ``host`` serve webmail."""
    problems = [*_problems(platform, host)]
    if problems or platform.webmail is None:
        raise SiteError(problems)
    name = platform.names.webmail
    certificate = certificate_path(name)
    login = sasl_password(platform.webmail.sasl_user)
    return Fragment(
        role=ROLE,
        files=_files(platform, certificate, platform.webmail.sasl_user),
        secret_files={
            certificate: certificate_file(name),
            SECRETS: SecretFile(
                secrets=(roundcube_key(), login),
                group="www-data",
                mode=0o640,
                template=f"webmail{SECRETS}.j2",
                context={"key": roundcube_key(), "password": login},
            ),
        },
        ports=(PortRule(HTTPS, proxy_sources(platform), "https: frontends"),),
        packages=(
            *("aspell-en", "libnginx-mod-stream", "nginx"),
            *(FPM, f"php{PHP}-pspell", f"php{PHP}-zip"),
            *("roundcube-core", "roundcube-plugins", "roundcube-sqlite3"),
        ),
        checks=(
            # On standard error it also says that it cannot reach the journal, which is not there
            # for a checker.
            Check("nginx", ("nginx", "-t", "-q"), ("/etc/nginx/",)),
            certificate_check(certificate),
            Check("php-fpm", (f"php-fpm{PHP}", "-t"), (f"/etc/php/{PHP}/fpm/",)),
            Check(
                "roundcube",
                ("sh", "-c", _LINT, "sh", CONFIG, SECRETS, SIEVE_CONFIG),
                (f"{ROUNDCUBE}/",),
            ),
        ),
        services=(
            Service("mail-webmail.service", restart_on=(f"{UNITS}/mail-webmail.service", PREPARE)),
            Service(
                f"{FPM}.service",
                # A reload forgets what was compiled: files of Roundcube count at once.
                reload_on=(f"/etc/php/{PHP}/fpm/", f"{ROUNDCUBE}/", CA_FOLDER),
                restart_on=(f"{UNITS}/{FPM}.service.d/", f"{UNITS}/mail-webmail.service"),
                order=51,
            ),
            Service("nginx.service", reload_on=("/etc/nginx/", "/etc/certs/"), order=52),
            # Debian's own: old sessions, and what users deleted.
            Service("roundcube-cleandb.timer", order=60),
            Service("roundcube-gc.timer", order=60),
        ),
        health=(
            UnitHealth("mail-webmail.service"),
            UnitHealth(f"{FPM}.service"),
            UnitHealth("nginx.service"),
            shows("127.0.0.1", name),
            shows("::1", name),
            # Through the way that Roundcube takes.
            TcpHealth("127.0.0.1", SUBMISSION, expect=f"220 {platform.names.smtp_out} ESMTP"),
            TcpHealth("127.0.0.1", MANAGESIEVE, expect='"IMPLEMENTATION"'),
        ),
    )


def _files(platform: Platform, certificate: str, login: str) -> dict[str, File]:
    limit = platform.outbound.message_size_limit
    return dict(
        (
            templated(
                f"webmail{NGINX}.j2",
                name=platform.names.webmail,
                certificate=certificate,
                socket=SOCKET,
                limit=limit,
                ways=ways(platform),
                frontends=[source.network_address for source in proxy_sources(platform)],
            ),
            templated(f"webmail{POOL}.j2", socket=SOCKET, limit=limit),
            templated(
                f"webmail{CONFIG}.j2",
                database=f"{DATA}/roundcube.sqlite",
                secrets=SECRETS,
                authorities=CA_BUNDLE,
                mailboxes=platform.webmail_backend,
                submission=platform.names.smtp_out,
                imaps=IMAPS,
                port=SUBMISSION,
                login=login,
                domain=platform.domain,
                name=platform.names.webmail,
                identities=IDENTITIES,
            ),
            templated(
                f"webmail{SIEVE_CONFIG}.j2",
                port=MANAGESIEVE,
                mailboxes=platform.webmail_backend,
                authorities=CA_BUNDLE,
            ),
            templated(f"webmail{IDENTITIES}.j2", identities=identities(platform)),
            templated(f"webmail{PREPARE}.j2", mode=0o755, folder=DATA),
            templated(f"webmail{UNITS}/mail-webmail.service.j2", prepare=PREPARE),
            templated(f"webmail{UNITS}/{FPM}.service.d/mail.conf.j2"),
        )
    )


def _problems(platform: Platform, host: Host) -> Iterator[Problem]:
    if host.vm is None:
        yield Problem(
            "topology.yaml",
            0,
            host.name,
            f"{host.name} is webmail and has no data volume for what users set",
            "give it a 'vm'",
        )
    if platform.webmail is None:
        yield Problem(
            "site.yaml",
            0,
            host.name,
            "site.yaml has no 'webmail'",
            "write it, with 'sasl_user' and 'networks'",
        )
    if not platform.replicas:
        yield Problem(
            "topology.yaml",
            0,
            host.name,
            "no host has the role 'maildrop', which webmail shows the mailboxes of",
            "give two hosts 'roles: [maildrop]'",
        )
