"""Rules about what machines send themselves: the logins of their groups, the mail server there."""

from __future__ import annotations

from collections.abc import Iterator

from mailsite.model import Host, Platform, Role
from mailsite.rulebook import Finding, Location, RuleBook, closest

BOOK = RuleBook()
rule = BOOK.rule


def _senders(platform: Platform) -> Iterator[Host]:
    """Hosts that log in to smtp-out, one for each group; its members deliver by themselves."""
    seen: set[str] = set()
    for host in platform.hosts.values():
        by_postfix = host.has_postfix and Role.SMTP_OUT not in host.roles
        group = platform.group_of(host)
        if (host.has_null_client or by_postfix) and not host.retired and group not in seen:
            seen.add(group)
            yield host


def _word(host: Host) -> Location:
    """Where the group is written, or should be."""
    return ("hosts", host.name, "group") if host.group is not None else ("hosts", host.name)


@rule("sasl_users")
def groups_are_logins(platform: Platform) -> Iterator[Finding]:
    for host in _senders(platform):
        group = platform.group_of(host)
        if group not in platform.sasl_users:
            yield Finding(
                _word(host),
                group,
                f"'{host.name}' sends its own mail as '{group}', which is no login of "
                "sasl_users.yaml",
                f"add '{group}' there, or write 'group:' with another login here; "
                + closest(group, platform.sasl_users),
            )


@rule("sasl_users", "domain")
def groups_can_log_in_and_send(platform: Platform) -> Iterator[Finding]:
    for host in _senders(platform):
        user = platform.sasl_users.get(platform.group_of(host))
        if user is None:
            continue
        about = ("sasl_users", user.name)
        if user.suspended:
            yield Finding(
                _word(host),
                user.name,
                f"'{host.name}' sends its own mail as '{user.name}', which is suspended",
                "write 'group:' with another login, or remove 'suspended' there",
                about,
            )
        if user.password_hash is not None:
            yield Finding(
                _word(host),
                user.name,
                f"'{host.name}' logs in as '{user.name}' and needs the password, of which there is "
                "a hash alone",
                "remove 'password_hash' there: the password is generated",
                about,
            )
        if user.senders and f"@{platform.domain}" not in user.senders:
            yield Finding(
                _word(host),
                user.name,
                f"'{host.name}' sends its own mail from '@{platform.domain}', which is none of the "
                f"senders of '{user.name}'",
                f"add '@{platform.domain}' there",
                about,
            )


@rule("sasl_users")
def filters_send_from_any_address(platform: Platform) -> Iterator[Finding]:
    """What users' filters send bears the addresses of the mailboxes."""
    for host in platform.serving(Role.MAILDROP)[:1]:
        user = platform.sasl_users.get(platform.group_of(host))
        if user is not None and user.senders:
            yield Finding(
                _word(host),
                user.name,
                f"'{host.name}' sends what its users' filters send as '{user.name}', which may use "
                "its own senders alone",
                "write 'group:' with a login without 'senders'",
                ("sasl_users", user.name),
            )


@rule()
def only_existing_machines_have_another_mail_server(platform: Platform) -> Iterator[Finding]:
    for host in platform.hosts.values():
        where = ("hosts", host.name, "mta")
        if host.mta is not None and host.vm is not None:
            yield Finding(
                where,
                host.mta.value,
                f"'{host.name}' is a virtual machine of the platform, where no mail server was "
                "before",
                "remove 'mta'",
            )
        elif host.mta is not None and host.has_postfix:
            yield Finding(
                where,
                host.mta.value,
                f"'{host.name}' has the role '{host.main_role}', which brings Postfix",
                "remove 'mta'",
            )
