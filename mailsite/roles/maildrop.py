"""maildrop: the mailboxes. Postfix takes mail from smtp-in, Dovecot keeps it and serves it.

Both hosts have all mailboxes; pairsync keeps them equal. Mail and clients prefer the primary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from mailsite.aliases import main_address
from mailsite.fragment import (
    Check,
    CommandHealth,
    File,
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
from mailsite.model import Host, IPAddress, IPNetwork, Platform, Role
from mailsite.roles import pairsync, rspamd
from mailsite.roles.base import internal_clients, internal_networks
from mailsite.roles.dovecot import (
    IMAPS,
    MANAGESIEVE,
    PROXIED_IMAPS,
    PROXIED_MANAGESIEVE,
    greets,
)
from mailsite.roles.null_client import LOGIN, login_file, own_mail
from mailsite.roles.postfix import (
    ALIASES,
    PACKAGES,
    QUEUE,
    QUEUE_UNITS,
    aliases_map,
    certificate_check,
    certificate_file,
    certificate_path,
    checks,
    in_list,
    postfix_service,
    queue_files,
    queue_health,
)
from mailsite.roles.smtp_out import proxy_sources
from mailsite.secret_names import mailbox_hash, rspamd_controller_password

ROLE = Role.MAILDROP.value
SMTP = 25
SMTPS = 465
#: Where Postfix takes what filters send, on this machine.
INJECT = 10026
#: User and group of all mail: the same on every host, because the files on the volume bear it.
VMAIL = 5000
HOMES = "/var/dovecot/users"
DOVECOT = "/etc/dovecot"
USERS = f"{DOVECOT}/maildrop-users"
PASSWORDS = f"{DOVECOT}/maildrop-passwords"
CONTROLLER_PASSWORD = f"{DOVECOT}/rspamd-password"
SIEVE = f"{DOVECOT}/sieve"
VIRTUAL_MAILDROP = "/etc/postfix/virtual-maildrop"
#: Name of the answer to a recipient without room, in Dovecot's and Postfix's configuration.
MAILBOX_FULL = "mailbox_full"
UNITS = "/etc/systemd/system"
LIBRARY = "/usr/local/lib/mail-platform"
PREPARE = f"{LIBRARY}/mail-mailboxes"
TRAIN = f"{LIBRARY}/train"
SYSUSERS = "/etc/sysusers.d/mail-vmail.conf"
DATA_UNITS = (
    f"{UNITS}/mail-mailboxes.service",
    f"{UNITS}/var-dovecot.mount",
    f"{UNITS}/var-lib-pairsync.mount",
)
JUNK = "Junk"
TRASH = "Trash"
#: Folders that every mailbox has, and what they are for (RFC 6154).
FOLDERS: Mapping[str, str] = {name: name for name in ("Drafts", "Sent", JUNK, TRASH, "Archive")}
_SCRIPTS = (
    "before.d/10-junk-keyword",
    "default",
    "after.d/90-folder-of-the-tag",
    "report-spam",
    "report-ham",
)

# Each script alone, and nothing is kept: Dovecot compiles them by itself.
_COMPILES = 'for script; do sievec -d "$script" - >/dev/null || exit 1; done'


@dataclass(frozen=True)
class User:
    """A mailbox as Dovecot's list of users has it."""

    name: str
    fields: tuple[str, ...]


def users(platform: Platform) -> tuple[User, ...]:
    """Every mailbox, those that are suspended too, in alphabetical order."""
    return tuple(
        User(box.name, tuple(_fields(platform, box.name)))
        for box in sorted(platform.mailboxes.values(), key=lambda box: box.name)
    )


def _fields(platform: Platform, name: str) -> Iterator[str]:
    quota, address = platform.mailboxes[name].quota, main_address(platform, name)
    if quota is not None:
        yield f"userdb_quota_storage_size={quota}B"
    if address is not None:
        yield f"userdb_sieve_user_email={address}"


def logins(platform: Platform) -> Mapping[str, str]:
    """Mailboxes whose owners may log in -> the secret with the hash, in alphabetical order."""
    active = sorted(box.name for box in platform.mailboxes.values() if not box.suspended)
    return {name: mailbox_hash(name) for name in active}


def certificates(platform: Platform, host: Host) -> Mapping[str, str]:
    """Names that this host must prove to be -> where key and chain lie.

    Mail clients come by the public name, smtp-in by the domain of the mailboxes, webmail by the
    name of both replicas, the other replica by the host's own.
    """
    names = (
        platform.names.imap,
        platform.maildrop_domain,
        platform.webmail_backend,
        host.name,
    )
    return {name: certificate_path(name) for name in names}


def prober(platform: Platform) -> str:
    """The sender that smtp-in asks as whether there is room (postconf(5), address_verify_sender).

    It asks as ``double-bounce`` at its own ``myorigin``.
    """
    return f"double-bounce@{platform.names.smtp_in}"


def map_builds() -> tuple[MapBuild, ...]:
    """The table of mailboxes, and of this machine's own aliases."""
    return (
        aliases_map(),
        MapBuild(
            ("postmap", f"lmdb:{VIRTUAL_MAILDROP}"),
            source=VIRTUAL_MAILDROP,
            output=f"{VIRTUAL_MAILDROP}.lmdb",
        ),
    )


def scripts() -> tuple[str, ...]:
    """The Sieve scripts of the platform, by their paths."""
    return tuple(f"{SIEVE}/{name}.sieve" for name in _SCRIPTS)


def fragment(platform: Platform, host: Host) -> Fragment:
    """What makes ``host`` a replica of the mailboxes."""
    problems = [*_problems(platform, host)]
    if problems:
        raise SiteError(problems)
    peer = next(other for other in platform.replicas if other.name != host.name)
    paths = certificates(platform, host)
    sync = pairsync.fragment(platform, host, peer)
    return Fragment(
        role=ROLE,
        files={
            **_postfix_files(platform, host),
            **_dovecot_files(platform, host),
            **queue_files(host),
            **sync.files,
        },
        secret_files={
            **{path: certificate_file(name) for name, path in paths.items()},
            LOGIN: login_file(platform, host),
            PASSWORDS: SecretFile(
                secrets=tuple(logins(platform).values()),
                group="dovecot",
                mode=0o640,
                template="maildrop/etc/dovecot/maildrop-passwords.j2",
                context={"logins": logins(platform)},
            ),
            CONTROLLER_PASSWORD: SecretFile(
                secrets=(rspamd_controller_password(),), group="dovecot", mode=0o640
            ),
            **sync.secret_files,
        },
        ports=(*_ports(platform), *sync.ports),
        packages=(
            *("dovecot-core", "dovecot-imapd", "dovecot-lmtpd", "dovecot-managesieved"),
            "dovecot-sieve",
            *PACKAGES,
            *sync.packages,
        ),
        maps=map_builds(),
        checks=(
            *checks(),
            Check("dovecot", ("doveconf", "-n"), (f"{DOVECOT}/",), stderr_is_failure=True),
            Check(
                "sieve",
                ("sh", "-c", _COMPILES, "sh", *scripts()),
                (f"{SIEVE}/", f"{DOVECOT}/dovecot.conf"),
                stderr_is_failure=True,
            ),
            Check("sysusers", ("systemd-sysusers", "--dry-run", SYSUSERS), (SYSUSERS,)),
            *(certificate_check(path) for path in paths.values()),
            *sync.checks,
        ),
        services=(
            Service(
                "dovecot.service",
                reload_on=(f"{DOVECOT}/dovecot.conf", "/etc/certs/", pairsync.HOOK),
                restart_on=(f"{UNITS}/dovecot.service.d/", *DATA_UNITS, *QUEUE_UNITS),
                order=30,
            ),
            *sync.services,
            # The table of mailboxes is not among these: Postfix notices by itself.
            postfix_service("/etc/postfix/main.cf", LOGIN),
        ),
        health=(
            *queue_health(host),
            UnitHealth("var-dovecot.mount"),
            UnitHealth("dovecot.service"),
            CommandHealth(greets("127.0.0.1", IMAPS)),
            CommandHealth(greets("::1", IMAPS)),
            TcpHealth("127.0.0.1", MANAGESIEVE, expect='"IMPLEMENTATION"'),
            TcpHealth("::1", MANAGESIEVE, expect='"IMPLEMENTATION"'),
            CommandHealth(("test", "-S", f"{QUEUE}/private/dovecot-lmtp")),
            CommandHealth(("test", "-S", f"{QUEUE}/private/quota-status")),
            *sync.health,
            CommandHealth(("postfix", "status")),
            TcpHealth("127.0.0.1", SMTP, expect=f"220 {host.name} ESMTP"),
            TcpHealth("::1", SMTP, expect=f"220 {host.name} ESMTP"),
            # It speaks TLS first: that it listens is all that can be seen from here.
            TcpHealth("127.0.0.1", SMTPS),
            TcpHealth("::1", SMTPS),
            TcpHealth("127.0.0.1", INJECT, expect=f"220 {host.name} ESMTP"),
        ),
    )


def _postfix_files(platform: Platform, host: Host) -> dict[str, File]:
    outbound = platform.outbound
    return dict(
        (
            templated(
                "maildrop/etc/postfix/main.cf.j2",
                host=host.name,
                internal_domain=platform.internal_domain,
                aliases=ALIASES,
                maildrop=platform.maildrop_domain,
                virtual_maildrop=VIRTUAL_MAILDROP,
                clients=[
                    source.network_address for source in internal_networks(platform, Role.SMTP_IN)
                ],
                exceptions=[
                    in_list(source.network_address)
                    for source in internal_networks(platform, Role.SMTP_IN)
                ],
                prober=prober(platform),
                mailbox_full=MAILBOX_FULL,
                header_size_limit=outbound.header_size_limit,
                certificate=certificate_path(platform.maildrop_domain),
                own=own_mail(platform, host),
            ),
            templated(
                "maildrop/etc/postfix/master.cf.j2", inject=INJECT, own=own_mail(platform, host)
            ),
            templated(
                "maildrop/etc/postfix/virtual-maildrop.j2",
                maildrop=platform.maildrop_domain,
                mailboxes=sorted(platform.mailboxes),
            ),
            templated("postfix/etc/postfix/aliases.j2", domain=platform.domain),
            templated(f"maildrop{UNITS}/postfix.service.d/mail.conf.j2"),
        )
    )


def _dovecot_files(platform: Platform, host: Host) -> dict[str, File]:
    paths = certificates(platform, host)
    learner = platform.internal_leg(rspamd.learning_host(platform)).ipv4
    cpus = host.vm.cpus if host.vm is not None else 2
    path, listed = templated("maildrop/etc/dovecot/maildrop-users.j2", users=users(platform))
    return {
        path: replace(listed, group="dovecot", mode=0o640),
        **dict(
            (
                templated(
                    "maildrop/etc/dovecot/dovecot.conf.j2",
                    host=host.name,
                    domain=platform.domain,
                    certificate=paths[platform.names.imap],
                    more_certificates={platform.webmail_backend: paths[platform.webmail_backend]},
                    users=USERS,
                    passwords=PASSWORDS,
                    uid=VMAIL,
                    homes=HOMES,
                    hook=pairsync.HOOK,
                    folders=FOLDERS,
                    mailbox_full=MAILBOX_FULL,
                    # With the headers that it gets on its way.
                    grace=platform.outbound.message_size_limit + 1024**2,
                    sieve=SIEVE,
                    junk=JUNK,
                    inject=INJECT,
                    proxies=[_plain(source) for source in proxy_sources(platform)],
                    webmail=[
                        _plain(source) for source in internal_networks(platform, Role.WEBMAIL)
                    ],
                    imaps=IMAPS,
                    proxied_imaps=PROXIED_IMAPS,
                    managesieve=MANAGESIEVE,
                    proxied_managesieve=PROXIED_MANAGESIEVE,
                    cpus=cpus,
                    imap_processes=_imap_processes(host),
                    queue=QUEUE,
                    train=TRAIN,
                ),
                *(
                    templated(f"maildrop{SIEVE}/{script}.sieve.j2", junk=JUNK, trash=TRASH)
                    for script in _SCRIPTS
                ),
                templated(f"maildrop{SYSUSERS}.j2", uid=VMAIL),
                templated(f"maildrop{UNITS}/mail-mailboxes.service.j2", prepare=PREPARE),
                templated(f"maildrop{UNITS}/var-dovecot.mount.j2"),
                templated(f"maildrop{UNITS}/dovecot.service.d/mail.conf.j2"),
                templated(f"maildrop{PREPARE}.j2", mode=0o755, uid=VMAIL),
                templated(
                    f"maildrop{TRAIN}.j2",
                    mode=0o755,
                    password=CONTROLLER_PASSWORD,
                    controller=f"http://{learner}:{platform.spam.controller_port}",
                ),
                templated(
                    "maildrop/usr/local/sbin/mailbox.j2", mode=0o755, users=USERS, homes=HOMES
                ),
            )
        ),
    }


def _imap_processes(host: Host) -> int:
    """Connections that the memory holds, half of it for them: 2 MiB each, 1024 at least."""
    memory = host.vm.memory_mib if host.vm is not None else 2048
    return max(1024, memory // 4)


def _ports(platform: Platform) -> tuple[PortRule, ...]:
    inbound = internal_networks(platform, Role.SMTP_IN)
    editors = platform.maildrop.managesieve if platform.maildrop is not None else ()
    proxies = proxy_sources(platform)
    return (
        PortRule(SMTP, inbound, "smtp: smtp-in"),
        PortRule(SMTPS, inbound, "smtps: smtp-in"),
        PortRule(IMAPS, internal_clients(platform), "imaps: our own networks"),
        PortRule(PROXIED_IMAPS, proxies, "imaps with PROXY: frontends"),
        PortRule(
            MANAGESIEVE,
            (*editors, *internal_networks(platform, Role.WEBMAIL)),
            "managesieve: the networks of the site data, and webmail",
        ),
        PortRule(PROXIED_MANAGESIEVE, proxies, "managesieve with PROXY: frontends"),
    )


def _plain(source: IPNetwork) -> IPAddress:
    return source.network_address


def _problems(platform: Platform, host: Host) -> Iterator[Problem]:
    def problem(message: str, remedy: str) -> Problem:
        return Problem("topology.yaml", 0, host.name, message, remedy)

    if host.vm is None:
        yield problem(
            f"{host.name} is maildrop and has no data volume for the mailboxes",
            "give it a 'vm'",
        )
    members = platform.members(Role.MAILDROP)
    if len(members) != 2:
        yield problem(
            f"maildrop has {len(members)} members, and mailboxes are kept equal between two",
            "give two hosts the role 'maildrop'",
        )
    if platform.maildrop is None:
        yield problem("site.yaml has no 'maildrop'", "write it, with 'primary' and 'managesieve'")
    if not platform.members(Role.RSPAMD):
        yield problem(
            "no host has the role 'rspamd', which learns from what users move into Junk",
            "give at least one host 'roles: [rspamd]'",
        )
