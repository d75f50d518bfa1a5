"""frontend: NGINX streams that lead clients from the internet to the clusters inside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mailsite.fragment import Check, Fragment, PortRule, Service, TcpHealth, UnitHealth, templated
from mailsite.loader import Problem, SiteError
from mailsite.model import Host, IPAddress, Platform, Role
from mailsite.roles.smtp_out import PROXIED_SUBMISSION, SUBMISSION

ROLE = Role.FRONTEND.value


@dataclass(frozen=True)
class Server:
    """A member behind a stream. NGINX uses a backup only while every primary is away."""

    name: str
    address: IPAddress
    port: int
    backup: bool


def servers(platform: Platform) -> tuple[Server, ...]:
    """The members of smtp-out: the site's primary first, then the others as backups.

    One line per member: with one per family a dead member would cost clients twice the connect
    timeout. IPv4, because every member has it and it needs no duplicate address detection after
    a boot; which family the client uses does not depend on it, the PROXY header says so.
    """
    primary = platform.outbound.primary
    members = sorted(platform.members(Role.SMTP_OUT), key=lambda host: host.name != primary)
    return tuple(
        Server(
            name=member.name,
            address=platform.internal_leg(member).ipv4,
            port=PROXIED_SUBMISSION,
            backup=member.name != primary,
        )
        for member in members
    )


def fragment(platform: Platform, host: Host) -> Fragment:
    """What makes ``host`` a frontend."""
    problems = [*_problems(platform)]
    if problems:
        raise SiteError(problems)
    files = dict(
        (
            templated("frontend/etc/nginx/modules-enabled/90-mail-streams.conf.j2"),
            templated(
                "frontend/etc/nginx/mail-streams.d/smtp-out.conf.j2",
                port=SUBMISSION,
                servers=servers(platform),
                source=platform.internal_leg(host).ipv4,
            ),
        )
    )
    return Fragment(
        role=ROLE,
        files=files,
        ports=(PortRule(SUBMISSION, None, "submission"),),
        packages=("libnginx-mod-stream", "nginx"),
        checks=(Check("nginx", ("nginx", "-t", "-q"), ("/etc/nginx/",)),),
        services=(
            Service(
                "nginx.service", reload_on=("/etc/nginx/",), order=40, foreign=not host.is_managed
            ),
        ),
        health=(
            UnitHealth("nginx.service"),
            # Through the stream to a member: what clients see.
            TcpHealth("127.0.0.1", SUBMISSION, expect=f"220 {platform.names.smtp_out} ESMTP"),
            TcpHealth("::1", SUBMISSION, expect=f"220 {platform.names.smtp_out} ESMTP"),
        ),
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
