"""null_client: how every machine sends what it has to say itself: by smtp-out, with a login.

Hosts without Postfix do it with OpenSMTPD, which listens on localhost alone. Debian's packages
exclude each other, so hosts of the mail tiers do it with the Postfix that they have: smtp-in for
locally submitted mail alone, its forwards keep leaving by themselves; maildrop for whatever
leaves, what its users' filters send among it. smtp-out delivers and signs its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from mailsite.fragment import (
    Check,
    Fragment,
    SecretFile,
    Service,
    TcpHealth,
    UnitHealth,
    templated,
)
from mailsite.model import Host, Platform
from mailsite.roles.smtp_out import SUBMISSION
from mailsite.secret_names import sasl_password

ROLE = "null-client"
CONFIGURATION = "/etc/smtpd.conf"
ALIASES = "/etc/mail/aliases"
SECRETS = "/etc/mail/secrets"
#: Where Postfix finds the login.
LOGIN = "/etc/postfix/own-login"
#: Where each machine takes its own mail, for itself alone.
PORT = 25


def fragment(platform: Platform, host: Host) -> Fragment:
    """OpenSMTPD on a machine without Postfix."""
    group = platform.group_of(host)
    files = dict(
        (
            templated(
                "null_client/etc/smtpd.conf.j2",
                aliases=ALIASES,
                secrets=SECRETS,
                group=group,
                relay=platform.submission_host,
                port=SUBMISSION,
                domain=platform.domain,
                message_size_limit=platform.outbound.message_size_limit,
            ),
            templated("null_client/etc/mail/aliases.j2", domain=platform.domain),
        )
    )
    login = sasl_password(group)
    return Fragment(
        role=ROLE,
        files=files,
        secret_files={
            SECRETS: SecretFile(
                secrets=(login,),
                template="null_client/etc/mail/secrets.j2",
                context={"group": group, "password": login},
            )
        },
        packages=("opensmtpd",),
        checks=(
            Check("smtpd", ("smtpd", "-n", "-f", CONFIGURATION), (CONFIGURATION, "/etc/mail/")),
        ),
        services=(
            # It has no reload; what waits lies in its queue.
            Service("opensmtpd.service", restart_on=(CONFIGURATION, "/etc/mail/"), order=40),
        ),
        health=(
            UnitHealth("opensmtpd.service"),
            TcpHealth("127.0.0.1", PORT, expect="220 "),
            TcpHealth("::1", PORT, expect="220 "),
        ),
    )


@dataclass(frozen=True)
class OwnMail:
    """How Postfix sends what a machine has to say itself.

    ``names`` are the machine's own: mail to them is for those who read ``reader``. ``nexthop`` as
    in transport(5), ``login``: where the login lies.
    """

    names: tuple[str, ...]
    domain: str
    nexthop: str
    login: str = LOGIN

    @property
    def reader(self) -> str:
        return f"postmaster@{self.domain}"


def own_mail(platform: Platform, host: Host, *names: str) -> OwnMail:
    """For the templates of a host with Postfix. ``names``: what it is called beside ``host``."""
    return OwnMail(
        names=(*names, host.name, f"localhost.{platform.internal_domain}", "localhost"),
        domain=platform.domain,
        nexthop=f"[{platform.submission_host}]:{SUBMISSION}",
    )


def login_file(platform: Platform, host: Host) -> SecretFile:
    """What lies at :data:`LOGIN`. Postfix reads it before it drops its privileges."""
    group = platform.group_of(host)
    password = sasl_password(group)
    return SecretFile(
        secrets=(password,),
        template=f"null_client{LOGIN}.j2",
        context={
            "group": group,
            "password": password,
            "nexthop": f"[{platform.submission_host}]:{SUBMISSION}",
        },
    )
