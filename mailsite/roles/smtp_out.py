"""smtp-out: submission with authentication, DKIM signing, delivery to the internet.

Two listeners: 587 for our own networks, without a proxy in front, and 10587 for the frontends
alone, which speak the PROXY protocol, so that limits and logs see the real client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mailsite.fragment import (
    Check,
    CommandHealth,
    Fragment,
    PortRule,
    SecretFile,
    Service,
    TcpHealth,
    UnitHealth,
    templated,
)
from mailsite.loader import Problem, SiteError
from mailsite.model import Host, IPNetwork, MailDomain, Platform, Role, SaslUser, TlsLevel
from mailsite.roles.base import internal_clients, internal_networks
from mailsite.roles.postfix import (
    ALIASES,
    PACKAGES,
    QUEUE,
    QUEUE_UNITS,
    Milter,
    aliases_map,
    certificate_check,
    certificate_file,
    certificate_names_check,
    certificate_path,
    checks,
    filter_relay,
    in_list,
    postfix_service,
    queue_files,
    queue_health,
    spam_filter,
)
from mailsite.secret_names import dkim_key, mailbox_hash, sasl_hash

ROLE = Role.SMTP_OUT.value
SUBMISSION = 587
PROXIED_SUBMISSION = 10587
KEY_FOLDER = "/etc/opendkim/keys"
UNITS = "/etc/systemd/system"
CHECK_DKIM = "/usr/local/lib/mail-platform/check-dkim"


@dataclass(frozen=True)
class Signer:
    """A domain that OpenDKIM signs for: its name in the tables, and where its key lies."""

    domain: str
    selector: str
    key_path: str
    secret: str

    @property
    def key_name(self) -> str:
        return self.domain.replace(".", "-")


def signer() -> Milter:
    """OpenDKIM on this machine."""
    return Milter(
        address="inet:127.0.0.1:8891",
        default_action="tempfail",
        connect_timeout=5,
        why="OpenDKIM signs; without it nothing may leave",
    )


def milters() -> tuple[Milter, ...]:
    """The filters that submitted mail passes, in this order: what is signed has been looked at."""
    return (spam_filter(), signer())


def signers(platform: Platform) -> tuple[Signer, ...]:
    """Every domain that sends, with the one key that signs for it.

    Subdomains come before the domains that they belong to: the first row of the signing table
    that matches an address wins.
    """
    found = [
        Signer(
            domain=domain.name,
            selector=key.selector,
            key_path=f"{KEY_FOLDER}/{key.selector}-{domain.name}-private",
            secret=dkim_key(domain.name, key.selector),
        )
        for domain in platform.domains.values()
        if domain.sends and (key := domain.signing_key) is not None
    ]
    return tuple(sorted(found, key=lambda signer: -signer.domain.count(".")))


def logins(platform: Platform) -> Mapping[str, str]:
    """Who may log in, in alphabetical order, and the secret that holds the password's hash.

    Owners of mailboxes are among them. No name is both, see
    :func:`mailsite.mailbox_rules.a_login_is_one_person_with_one_password`.
    """
    found = {u.name: sasl_hash(u.name) for u in platform.sasl_users.values() if not u.suspended}
    found |= {
        box.name: mailbox_hash(box.name)
        for box in platform.mailboxes.values()
        if box.submission and not box.suspended
    }
    return {name: found[name] for name in sorted(found)}


def bound_users(platform: Platform) -> tuple[SaslUser, ...]:
    """SASL users that may send with their own addresses alone, in alphabetical order."""
    found = [u for u in platform.sasl_users.values() if u.senders and not u.suspended]
    return tuple(sorted(found, key=lambda user: user.name))


def owners(platform: Platform) -> Mapping[str, tuple[str, ...]]:
    """Envelope senders of the users that may use no other, with those who may use them."""
    found: dict[str, tuple[str, ...]] = {}
    for user in bound_users(platform):
        for sender in user.senders:
            found[sender] = (*found.get(sender, ()), user.name)
    return found


def proxy_sources(platform: Platform) -> tuple[IPNetwork, ...]:
    """The frontends' internal addresses: who may speak the PROXY protocol to us."""
    return internal_networks(platform, Role.FRONTEND)


def _names_checks(platform: Platform, path: str) -> Iterator[Check]:
    """Whether a given certificate has all names. The platform's own is looked at as it comes."""
    if platform.certificates is None:
        names = platform.certificate_names(platform.names.smtp_out)
        yield certificate_names_check(path, names)


def fragment(platform: Platform, host: Host) -> Fragment:
    """What makes ``host`` a member of smtp-out."""
    problems = [*_problems(platform, host)]
    if problems:
        raise SiteError(problems)
    outbound = platform.outbound
    name = platform.names.smtp_out
    certificate = certificate_path(name)
    relay = filter_relay(platform, host)
    files = dict(
        (
            templated(
                "smtp_out/etc/postfix/main.cf.j2",
                name=name,
                host=host.name,
                internal_domain=platform.internal_domain,
                certificate=certificate,
                limits=outbound.limits,
                webmail=[
                    in_list(source.network_address)
                    for source in internal_networks(platform, Role.WEBMAIL)
                ],
                message_size_limit=outbound.message_size_limit,
                header_size_limit=outbound.header_size_limit,
                tls=outbound.tls.value,
                dane=outbound.tls is TlsLevel.DANE,
                milters=milters(),
                signer=signer(),
                own_addresses=[user.name for user in bound_users(platform)],
                owners=owners(platform),
                aliases=ALIASES,
            ),
            templated(
                "smtp_out/etc/postfix/master.cf.j2",
                port=SUBMISSION,
                proxied=PROXIED_SUBMISSION,
                own=None,
            ),
            templated("postfix/etc/postfix/aliases.j2", domain=platform.domain),
            templated("smtp_out/etc/dovecot/dovecot.conf.j2"),
            templated("smtp_out/etc/opendkim.conf.j2"),
            templated("smtp_out/etc/opendkim/signers.j2", signers=signers(platform)),
            templated("smtp_out/etc/opendkim/keytable.j2", signers=signers(platform)),
            templated(f"smtp_out{CHECK_DKIM}.j2", mode=0o755, signers=signers(platform)),
            *(
                templated(
                    f"smtp_out{UNITS}/{unit}.service.d/mail.conf.j2", volume=host.vm is not None
                )
                for unit in ("postfix", "dovecot", "opendkim")
            ),
        )
    )
    users = logins(platform)
    secret_files = {
        certificate: certificate_file(name),
        "/etc/dovecot/sasl-users": SecretFile(
            secrets=tuple(users.values()),
            group="dovecot",
            mode=0o640,
            template="smtp_out/etc/dovecot/sasl-users.j2",
            context={"logins": users},
        ),
    } | {
        signer.key_path: SecretFile(secrets=(signer.secret,), owner="opendkim", group="opendkim")
        for signer in signers(platform)
    }
    return Fragment(
        role=ROLE,
        files=files | dict(queue_files(host)) | dict(relay.files),
        secret_files=secret_files,
        ports=(
            PortRule(SUBMISSION, internal_clients(platform), "submission: our own networks"),
            PortRule(
                PROXIED_SUBMISSION, proxy_sources(platform), "submission with PROXY: frontends"
            ),
        ),
        packages=("dovecot-core", "opendkim", *PACKAGES, *relay.packages),
        maps=(aliases_map(),),
        checks=(
            *checks(),
            Check("dovecot", ("doveconf", "-n"), ("/etc/dovecot/",), stderr_is_failure=True),
            certificate_check(certificate),
            *_names_checks(platform, certificate),
            Check("opendkim", ("opendkim", "-n"), ("/etc/opendkim.conf", "/etc/opendkim/")),
            Check("dkim", (CHECK_DKIM,), ("/etc/opendkim.conf", "/etc/opendkim/")),
            *relay.checks,
        ),
        services=(
            Service(
                "dovecot.service",
                reload_on=("/etc/dovecot/",),
                restart_on=(f"{UNITS}/dovecot.service.d/", *QUEUE_UNITS),
                order=30,
            ),
            Service(
                "opendkim.service",
                reload_on=("/etc/opendkim/",),
                restart_on=("/etc/opendkim.conf", f"{UNITS}/opendkim.service.d/"),
                order=31,
            ),
            *relay.services,
            postfix_service("/etc/postfix/"),
        ),
        health=(
            *queue_health(host),
            UnitHealth("dovecot.service"),
            UnitHealth("opendkim.service"),
            TcpHealth("127.0.0.1", 8891),
            *relay.health,
            CommandHealth(("postfix", "status")),
            TcpHealth("127.0.0.1", SUBMISSION, expect=f"220 {name} ESMTP"),
            TcpHealth("::1", SUBMISSION, expect=f"220 {name} ESMTP"),
            CommandHealth(("test", "-S", f"{QUEUE}/private/auth")),
        ),
    )


def _problems(platform: Platform, host: Host) -> Iterator[Problem]:
    if not host.is_managed:
        yield Problem(
            file="topology.yaml",
            line=0,
            value=host.name,
            message=f"{host.name} is smtp-out but stays the operator's machine, and smtp-out owns"
            " Postfix's main configuration",
            remedy="give it a 'vm', or write 'base: managed'",
        )
    if not any(_covers(d, platform.names.smtp_out) for d in platform.domains.values()):
        yield Problem(
            file="site.yaml",
            line=0,
            value=platform.names.smtp_out,
            message=f"bounces come from MAILER-DAEMON@{platform.names.smtp_out}, which no mail"
            " domain with a signing key covers",
            remedy=f"add a key to 'dkim' in domains/{platform.domain}.yaml",
        )


def _covers(domain: MailDomain, name: str) -> bool:
    signs = domain.sends and domain.signing_key is not None
    return signs and (name == domain.name or name.endswith(f".{domain.name}"))
