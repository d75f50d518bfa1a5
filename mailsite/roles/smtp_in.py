"""smtp-in: the MX. Takes mail for our domains from everyone, and sends it to where they say.

Mail for mailboxes goes on to the maildrop hosts as it came. Mail that an address forwards to
somebody else's server passes a second, local smtpd on its way, which gives it an SRS sender. What
the machine itself has to say goes to smtp-out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mailsite.aliases import (
    DISCARD_DOMAIN,
    limited_addresses,
    virtual_aliases,
    virtual_domains,
)
from mailsite.fragment import (
    CommandHealth,
    Fragment,
    MapBuild,
    PortRule,
    SecretFile,
    Service,
    TcpHealth,
    UnitHealth,
    templated,
)
from mailsite.loader import Problem, SiteError
from mailsite.model import Host, NetworkKind, Platform, Role, TlsLevel
from mailsite.records import own_names, senders
from mailsite.roles.null_client import LOGIN, login_file, own_mail
from mailsite.roles.postfix import (
    ALIASES,
    PACKAGES,
    Milter,
    aliases_map,
    certificate_check,
    certificate_file,
    certificate_path,
    checks,
    filter_relay,
    in_list,
    postfix_service,
    queue_files,
    queue_health,
    spam_filter,
)
from mailsite.secret_names import srs_key

ROLE = Role.SMTP_IN.value
SMTP = 25
SMTPS = 465
FORWARD = 10025
VIRTUAL = "/etc/postfix/virtual"
VIRTUAL_DOMAINS = "/etc/postfix/virtual-domains"
LIMITED = "/etc/postfix/limited-addresses"
POSTSRSD = "/etc/default/postsrsd"
SRS_SECRET = "/etc/postsrsd.secret"  # noqa: S105 - where it lies
SRS_ADDRESSES = "/etc/postfix/srs-addresses"
UNITS = "/etc/systemd/system"


@dataclass(frozen=True)
class Srs:
    """PostSRSd: the domain of rewritten senders, and where Postfix asks for them."""

    domain: str
    forward: int = 10001
    reverse: int = 10002
    secret: str = SRS_SECRET
    addresses: str = SRS_ADDRESSES

    @property
    def pattern(self) -> str:
        """Of the addresses that PostSRSd may know, for regexp_table(5)."""
        return f"/^(SRS[01][=+-].*@{re.escape(self.domain)})$/"


def milters() -> tuple[Milter, ...]:
    """The filters that mail from outside passes."""
    return (spam_filter(),)


def map_builds() -> tuple[MapBuild, ...]:
    """The tables of addresses, and of this machine's own aliases.

    LMDB: 50,000 addresses build in a fraction of a second, each daemon reads them in place, and
    one that finds the file replaced opens the new one before its next client.
    """
    tables = (
        MapBuild(("postmap", f"lmdb:{path}"), source=path, output=f"{path}.lmdb")
        for path in (VIRTUAL_DOMAINS, VIRTUAL, LIMITED)
    )
    return (aliases_map(), *tables)


def helo_name(platform: Platform, host: Host) -> str:
    """The name that ``host`` says towards the outside: what its public address resolves to."""
    leg = platform.leg(host, NetworkKind.PUBLIC) or host.interfaces[0]
    return next(own.name for own in own_names(platform) if leg.ipv4 in own.addresses)


def fragment(platform: Platform, host: Host) -> Fragment:
    """What makes ``host`` a member of smtp-in."""
    problems = [*_problems(platform, host)]
    if problems:
        raise SiteError(problems)
    inbound, outbound = platform.inbound, platform.outbound
    name = platform.names.smtp_in
    certificate = certificate_path(name)
    srs = Srs(inbound.srs_domain)
    relay = filter_relay(platform, host)
    files = dict(
        (
            templated(
                "smtp_in/etc/postfix/main.cf.j2",
                name=name,
                host=host.name,
                helo=helo_name(platform, host),
                internal_domain=platform.internal_domain,
                aliases=ALIASES,
                virtual=VIRTUAL,
                virtual_domains=VIRTUAL_DOMAINS,
                limited_addresses=LIMITED,
                maildrop=platform.maildrop_domain,
                discard=DISCARD_DOMAIN,
                forward=FORWARD,
                srs=srs,
                dnsbl=inbound.dnsbl,
                asked=tuple(
                    dict.fromkeys((x.kind.value, x.zone) for x in inbound.dnsbl if not x.warn_only)
                ),
                message_size_limit=outbound.message_size_limit,
                header_size_limit=outbound.header_size_limit,
                certificate=certificate,
                limits=inbound.limits,
                senders=[in_list(address) for address in senders(platform)],
                tls=outbound.tls.value,
                dane=outbound.tls is TlsLevel.DANE,
                milters=milters(),
            ),
            templated(
                "smtp_in/etc/postfix/master.cf.j2",
                host=host.name,
                forward=FORWARD,
                srs=srs,
                own=own_mail(platform, host, name),
            ),
            templated("smtp_in/etc/postfix/virtual.j2", aliases=virtual_aliases(platform)),
            templated("smtp_in/etc/postfix/virtual-domains.j2", domains=virtual_domains(platform)),
            templated(f"smtp_in{LIMITED}.j2", addresses=limited_addresses(platform)),
            templated(f"smtp_in{SRS_ADDRESSES}.j2", srs=srs),
            templated("postfix/etc/postfix/aliases.j2", domain=platform.domain),
            templated("smtp_in/etc/default/postsrsd.j2", srs=srs),
            templated(f"smtp_in{UNITS}/postsrsd.service.d/mail.conf.j2"),
            templated(f"smtp_in{UNITS}/postfix.service.d/mail.conf.j2", volume=host.vm is not None),
        )
    )
    keys = tuple(srs_key(key) for key in inbound.srs_keys)
    return Fragment(
        role=ROLE,
        files=files | dict(queue_files(host)) | dict(relay.files),
        secret_files={
            certificate: certificate_file(name),
            LOGIN: login_file(platform, host),
            SRS_SECRET: SecretFile(
                secrets=keys, template="smtp_in/etc/postsrsd.secret.j2", context={"keys": keys}
            ),
        },
        ports=(
            PortRule(SMTP, None, "smtp: mail for our domains, from everyone"),
            PortRule(SMTPS, None, "smtps: the same, with TLS from the start"),
        ),
        packages=(*PACKAGES, "postsrsd", *relay.packages),
        maps=map_builds(),
        checks=(*checks(), certificate_check(certificate), *relay.checks),
        services=(
            Service(
                "postsrsd.service",
                restart_on=(POSTSRSD, SRS_SECRET, f"{UNITS}/postsrsd.service.d/"),
                order=31,
            ),
            *relay.services,
            # Tables of addresses are not among these: Postfix notices by itself. Domains are: an
            # smtpd that was asked for one before keeps what it knows of it for as long as it lives.
            postfix_service("/etc/postfix/main.cf", SRS_ADDRESSES, VIRTUAL_DOMAINS, LOGIN),
        ),
        health=(
            *queue_health(host),
            UnitHealth("postsrsd.service"),
            TcpHealth("127.0.0.1", srs.forward),
            TcpHealth("127.0.0.1", srs.reverse),
            *relay.health,
            CommandHealth(("postfix", "status")),
            TcpHealth("127.0.0.1", SMTP, expect=f"220 {name} ESMTP"),
            TcpHealth("::1", SMTP, expect=f"220 {name} ESMTP"),
            # It speaks TLS first: that it listens is all that can be seen from here.
            TcpHealth("127.0.0.1", SMTPS),
            TcpHealth("::1", SMTPS),
            TcpHealth("127.0.0.1", FORWARD, expect=f"220 {host.name} ESMTP"),
        ),
    )


def _problems(platform: Platform, host: Host) -> Iterator[Problem]:
    if not host.is_managed:
        yield Problem(
            file="topology.yaml",
            line=0,
            value=host.name,
            message=f"{host.name} is smtp-in but stays the operator's machine, and smtp-in owns"
            " Postfix's and NGINX's main configuration",
            remedy="give it a 'vm', or write 'base: managed'",
        )
