"""What every machine with a Postfix queue shares, and the way from Postfix to the spam filter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mailsite.fragment import (
    Check,
    File,
    Fragment,
    Health,
    MapBuild,
    SecretFile,
    Service,
    UnitHealth,
    templated,
)
from mailsite.model import Host, IPAddress, Platform, Role
from mailsite.roles.base import CA_FOLDER
from mailsite.secret_names import certificate_chain, certificate_key

QUEUE = "/var/spool/postfix"
QUEUE_MOUNT = "var-spool-postfix.mount"
ALIASES = "/etc/postfix/aliases"
NGINX = "/etc/nginx/nginx.conf"

#: Postfix, its maps, and what it logs in to smtp-out with.
PACKAGES = ("libsasl2-modules", "postfix", "postfix-lmdb")

#: Where NGINX on this machine takes mail for the spam filter.
FILTER_PORT = 11332

#: A change of one of these makes daemons restart that keep their state in the queue.
QUEUE_UNITS = (
    "/etc/systemd/system/mail-queue.service",
    f"/etc/systemd/system/{QUEUE_MOUNT}",
)

# OpenSSL reads the chain and finds out whether the key belongs to it.
_LOAD_CERTIFICATE = (
    "import ssl, sys\n"
    "try: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(sys.argv[1])\n"
    "except (OSError, ssl.SSLError) as error: sys.exit(f'{sys.argv[1]}: {error}')"
)


def queue_files(host: Host) -> Mapping[str, File]:
    """Units that put Postfix's queue on the data volume; none where there is no such volume."""
    if host.vm is None:
        return {}
    return dict(
        (
            templated("postfix/usr/local/lib/mail-platform/mail-queue.j2", mode=0o755),
            templated("postfix/etc/systemd/system/mail-queue.service.j2"),
            templated(f"postfix/etc/systemd/system/{QUEUE_MOUNT}.j2"),
        )
    )


def queue_health(host: Host) -> tuple[Health, ...]:
    """The queue lies on the data volume."""
    return () if host.vm is None else (UnitHealth(QUEUE_MOUNT),)


# -- certificate and checkers ------------------------------------------------------------------


def certificate_folder(fqdn: str) -> str:
    return f"/etc/certs/{fqdn}"


def certificate_path(fqdn: str) -> str:
    """Key and chain of a service name, in one file: a renewal switches both at once."""
    return f"{certificate_folder(fqdn)}/combined.pem"


# One line for each name, which says whether the certificate is for it.
_NAMES_CERTIFICATE = (
    'path=$1; shift; for name; do openssl x509 -in "$path" -noout -checkhost "$name"'
    " | grep -q ' does match ' || { echo \"$path: the certificate is not for $name\" >&2;"
    " exit 1; }; done"
)


def certificate_names_check(path: str, names: tuple[str, ...]) -> Check:
    """Whether the certificate at ``path`` is for all of ``names``."""
    command = ("sh", "-c", _NAMES_CERTIFICATE, "sh", path, *names)
    return Check("certificate-names", command, ("/etc/certs/",))


def certificate_file(fqdn: str) -> SecretFile:
    """What lies at :func:`certificate_path`, the key in front."""
    chain, key = certificate_chain(fqdn), certificate_key(fqdn)
    return SecretFile(
        secrets=(key, chain),
        template="postfix/etc/certs/combined.pem.j2",
        context={"key": key, "chain": chain},
    )


def certificate_check(path: str) -> Check:
    return Check("certificate", ("python3", "-I", "-c", _LOAD_CERTIFICATE, path), ("/etc/certs/",))


def checks() -> tuple[Check, ...]:
    """Postfix's own checkers; what it only warns of is an error here."""
    return (
        Check("postconf", ("postconf", "-n"), ("/etc/postfix/",), stderr_is_failure=True),
        Check("postconf-master", ("postconf", "-P"), ("/etc/postfix/",), stderr_is_failure=True),
        Check(
            "postfix",
            ("postfix", "check"),
            ("/etc/postfix/", "/etc/certs/"),
            stderr_is_failure=True,
        ),
    )


def postfix_service(*configuration: str) -> Service:
    """Postfix, reloaded when one of the files of ``configuration`` or a certificate changes."""
    return Service(
        "postfix.service",
        reload_on=(*configuration, "/etc/certs/", CA_FOLDER),
        # A reload does not open or close listeners reliably, and the copies of the resolver's
        # files in the chroot are made at start.
        restart_on=(
            "/etc/postfix/master.cf",
            "/etc/resolv.conf",
            "/etc/hosts",
            "/etc/systemd/system/postfix.service.d/",
            *QUEUE_UNITS,
        ),
        order=40,
    )


def in_list(address: IPAddress) -> str:
    """``address`` as it stands in a list of networks (postconf(5), mynetworks)."""
    return f"[{address}]" if address.version == 6 else str(address)


def aliases_map() -> MapBuild:
    return MapBuild(("postalias", f"lmdb:{ALIASES}"), source=ALIASES, output=f"{ALIASES}.lmdb")


# -- mail filters ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Milter:
    """A mail filter of Postfix. ``default_action`` is what happens to mail while it is away.

    Time-outs in seconds: to connect, to answer to a command, and to answer to the whole message
    (None: Postfix's own).
    """

    address: str
    default_action: str
    connect_timeout: int
    why: str
    command_timeout: int | None = None
    content_timeout: int | None = None

    @property
    def entry(self) -> str:
        """As it stands in smtpd_milters (postconf(5))."""
        parts = [f"default_action={self.default_action}"]
        for name in ("connect_timeout", "command_timeout", "content_timeout"):
            seconds = getattr(self, name)
            if seconds is not None:
                parts.append(f"{name}={seconds}s")
        return f"{{ {self.address}, {', '.join(parts)} }}"


def spam_filter() -> Milter:
    """Rspamd, by way of :func:`filter_relay`. Together no mail waits for it longer than 5 s."""
    return Milter(
        address=f"inet:127.0.0.1:{FILTER_PORT}",
        default_action="accept",
        connect_timeout=1,
        # NGINX gives up after 3 s, see nginx.conf; Rspamd's own limit for a scan is 3 s.
        command_timeout=4,
        content_timeout=4,
        why="Rspamd, the nearest member that lives; mail is taken while none does",
    )


@dataclass(frozen=True)
class FilterServer:
    """A member of the spam filter as NGINX sees it."""

    name: str
    address: str
    port: int
    backup: bool


def filter_servers(platform: Platform, host: Host) -> tuple[FilterServer, ...]:
    """The members of the spam filter: those of the host's own site, the others as backups."""
    members = platform.members(Role.RSPAMD)
    near = [member for member in members if member.site == host.site]
    return tuple(
        FilterServer(
            name=member.name,
            address=str(platform.internal_leg(member).ipv4),
            port=platform.spam.milter_port,
            backup=bool(near) and member not in near,
        )
        for member in members
    )


def filter_relay(platform: Platform, host: Host) -> Fragment:
    """NGINX in front of the spam filter, on a machine that is not a frontend."""
    relay = templated(
        "postfix/etc/nginx/nginx.conf.j2",
        servers=filter_servers(platform, host),
        port=FILTER_PORT,
    )
    return Fragment(
        role="filter-relay",
        files=dict((relay,)),
        packages=("libnginx-mod-stream", "nginx"),
        # On standard error it also says that it cannot reach the journal, which is not there for
        # a checker.
        checks=(Check("nginx", ("nginx", "-t", "-q"), ("/etc/nginx/",)),),
        services=(Service("nginx.service", reload_on=(NGINX,), order=32),),
        # Not its port: a connection there that says nothing is an error in Rspamd's log, and
        # mail is taken while all members are away.
        health=(UnitHealth("nginx.service"),),
    )
