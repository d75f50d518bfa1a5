"""frontend: NGINX leads clients from the internet to the clusters inside.

Mail clients by streams that it does not look into, browsers by https of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mailsite.fragment import (
    Check,
    CommandHealth,
    File,
    Fragment,
    PortRule,
    Service,
    TcpHealth,
    UnitHealth,
    templated,
)
from mailsite.loader import Problem, SiteError
from mailsite.model import Host, IPAddress, IPNetwork, Platform, Role
from mailsite.roles import webmail
from mailsite.roles.base import CA_BUNDLE
from mailsite.roles.dovecot import (
    IMAPS,
    MANAGESIEVE,
    PROXIED_IMAPS,
    PROXIED_MANAGESIEVE,
    greets,
)
from mailsite.roles.postfix import certificate_check, certificate_file, certificate_path
from mailsite.roles.smtp_out import PROXIED_SUBMISSION, SUBMISSION

ROLE = Role.FRONTEND.value
HTTP = 80
#: What the machine has no other place for: it stays the operator's.
AUTHORITIES = "/etc/mail-platform/authorities.pem"


@dataclass(frozen=True)
class Server:
    """A member behind a stream. NGINX uses a backup only while every primary is away."""

    name: str
    address: IPAddress
    port: int
    backup: bool


@dataclass(frozen=True)
class Stream:
    """A port of the frontends that leads to a cluster: the primary, then the others as backups.

    ``name`` is the file's. ``networks``: who may come in; None: everyone. ``timeout`` is for
    NGINX: longer than any pause that ``daemon`` allows a client.
    """

    name: str
    port: int
    servers: tuple[Server, ...]
    daemon: str
    timeout: str
    why: str
    networks: tuple[IPNetwork, ...] | None = None

    @property
    def upstream(self) -> str:
        return self.name.replace("-", "_")


def streams(platform: Platform) -> tuple[Stream, ...]:
    """What every frontend serves."""
    outbound = Stream(
        name="smtp-out",
        port=SUBMISSION,
        servers=servers(platform),
        daemon="Postfix",
        timeout="10m",
        why="submission",
    )
    if platform.maildrop is None:
        return (outbound,)
    replicas = platform.replicas
    return (
        outbound,
        Stream(
            name="imap",
            port=IMAPS,
            servers=_servers(platform, replicas, PROXIED_IMAPS),
            daemon="Dovecot",
            # A client that waits for mail says something every 29 minutes (RFC 2177).
            timeout="35m",
            why="imaps",
        ),
        Stream(
            name="managesieve",
            port=MANAGESIEVE,
            servers=_servers(platform, replicas, PROXIED_MANAGESIEVE),
            daemon="Dovecot",
            timeout="35m",
            why="managesieve: the networks of the site data",
            networks=platform.maildrop.managesieve,
        ),
    )


def servers(platform: Platform) -> tuple[Server, ...]:
    """The members of smtp-out: the site's primary first, then the others as backups."""
    primary = platform.outbound.primary
    members = sorted(platform.members(Role.SMTP_OUT), key=lambda host: host.name != primary)
    return _servers(platform, members, PROXIED_SUBMISSION)


def _servers(platform: Platform, members: Sequence[Host], port: int) -> tuple[Server, ...]:
    """``members`` as NGINX sees them: all but the first are backups.

    One line per member: with one per family a dead member would cost clients twice the connect
    timeout. IPv4, because every member has it and it needs no duplicate address detection after
    a boot; which family the client uses does not depend on it, the PROXY header says so.
    """
    return tuple(
        Server(
            name=member.name,
            address=platform.internal_leg(member).ipv4,
            port=port,
            backup=number > 0,
        )
        for number, member in enumerate(members)
    )


def fragment(platform: Platform, host: Host) -> Fragment:
    """What makes ``host`` a frontend."""
    problems = [*_problems(platform)]
    if problems:
        raise SiteError(problems)
    served = streams(platform)
    source = platform.internal_leg(host).ipv4
    files = dict(
        (
            templated("frontend/etc/nginx/modules-enabled/90-mail-streams.conf.j2"),
            *(
                templated(
                    f"frontend/etc/nginx/mail-streams.d/{stream.name}.conf.j2",
                    stream=stream,
                    source=source,
                )
                for stream in served
            ),
        )
    )
    mailboxes = [stream for stream in served if stream.port == IMAPS]
    pages = _webmail(platform, host)
    # Where NGINX reads what it must be told of.
    watched = ["/etc/nginx/"]
    watched += ["/etc/certs/"] if pages.secret_files else []
    watched += [AUTHORITIES] if AUTHORITIES in pages.files else []
    return Fragment(
        role=ROLE,
        files=files | dict(pages.files),
        secret_files=pages.secret_files,
        ports=(
            *(PortRule(stream.port, stream.networks, stream.why) for stream in served),
            *pages.ports,
        ),
        packages=("libnginx-mod-stream", "nginx"),
        checks=(Check("nginx", ("nginx", "-t", "-q"), ("/etc/nginx/",)), *pages.checks),
        services=(
            Service(
                "nginx.service",
                reload_on=tuple(watched),
                order=40,
                foreign=not host.is_managed,
            ),
        ),
        health=(
            UnitHealth("nginx.service"),
            # Through the stream to a member: what clients see.
            TcpHealth("127.0.0.1", SUBMISSION, expect=f"220 {platform.names.smtp_out} ESMTP"),
            TcpHealth("::1", SUBMISSION, expect=f"220 {platform.names.smtp_out} ESMTP"),
            *(
                CommandHealth(greets(address, stream.port))
                for stream in mailboxes
                for address in ("127.0.0.1", "::1")
            ),
            *pages.health,
        ),
    )


def _webmail(platform: Platform, host: Host) -> Fragment:
    """The way to webmail, where the platform has it: redirects, and https to its hosts."""
    members = platform.members(Role.WEBMAIL)
    if platform.webmail is None or not members:
        return Fragment(role=ROLE)
    name = platform.names.webmail
    inside, short = platform.webmail_aliases
    certificates = {fqdn: certificate_path(fqdn) for fqdn in (name, inside)}
    given = platform.world.ca_certificates if not host.is_managed else ()
    authorities = {AUTHORITIES: File(content="".join(f"{pem.strip()}\n" for pem in given))}
    path, file = templated(
        # Behind the operator's: a request that is for nobody is answered by the first one.
        "frontend/etc/nginx/sites-enabled/zz-webmail.conf.j2",
        name=name,
        inside=inside,
        short=short,
        certificates=certificates,
        networks=platform.webmail.networks,
        home_page=platform.home_page,
        servers=_servers(platform, members, webmail.HTTPS),
        source=platform.internal_leg(host).ipv4,
        authorities=AUTHORITIES if given else CA_BUNDLE,
        limit=platform.outbound.message_size_limit,
    )
    return Fragment(
        role=ROLE,
        files={path: file, **(authorities if given else {})},
        secret_files={path: certificate_file(fqdn) for fqdn, path in certificates.items()},
        ports=(
            PortRule(HTTP, None, "http: leads to https"),
            PortRule(webmail.HTTPS, None, "https: webmail"),
        ),
        checks=tuple(certificate_check(path) for path in certificates.values()),
        health=(webmail.shows("127.0.0.1", name), webmail.shows("::1", name)),
    )


def _problems(platform: Platform) -> Iterator[Problem]:
    members = [member.name for member in platform.members(Role.SMTP_OUT)]
    primary = platform.outbound.primary
    if primary not in members:
        yield Problem(
            file="site.yaml",
            line=0,
            value=primary,
            message=f"outbound.primary is {primary}, which is no member of smtp-out",
            remedy=f"write one of {', '.join(members)}" if members else "add hosts with the role",
        )
