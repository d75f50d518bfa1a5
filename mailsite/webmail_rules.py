"""Rules about webmail: what it needs of the platform, and who may see it."""

from __future__ import annotations

from collections.abc import Iterator

from mailsite.model import Platform, Role
from mailsite.rulebook import Finding, RuleBook, closest

BOOK = RuleBook()
rule = BOOK.rule


@rule("hosts", "webmail", "maildrop")
def webmail_has_hosts_and_mailboxes(platform: Platform) -> Iterator[Finding]:
    members = platform.serving(Role.WEBMAIL)
    if platform.webmail is None and members:
        yield Finding(
            ("webmail",),
            "",
            f"'webmail' is missing, and '{members[0].name}' has the role '{Role.WEBMAIL}'",
            "write 'webmail:' with 'sasl_user', the login that it sends mail with, and 'networks', "
            "from which it may be used",
        )
    elif platform.webmail is not None and not members:
        yield Finding(
            ("webmail",),
            "",
            f"there is 'webmail', and no host has the role '{Role.WEBMAIL}'",
            f"give two hosts 'roles: [{Role.WEBMAIL}]', or remove 'webmail'",
        )
    if members and not platform.serving(Role.MAILDROP):
        yield Finding(
            ("hosts", members[0].name, "roles"),
            Role.WEBMAIL.value,
            f"'{members[0].name}' is webmail, and the platform has no mailboxes to show",
            f"give two hosts 'roles: [{Role.MAILDROP}]'",
        )


@rule("webmail", "sasl_users")
def webmail_sends_for_everybody(platform: Platform) -> Iterator[Finding]:
    """Its login is its own: known to it in clear, not suspended, bound to no sender."""
    if platform.webmail is None:
        return
    name = platform.webmail.sasl_user
    where = ("webmail", "sasl_user")
    user = platform.sasl_users.get(name)
    if user is None:
        yield Finding(
            where,
            name,
            f"'{name}' is no login of sasl_users.yaml",
            closest(name, platform.sasl_users),
        )
        return
    about = ("sasl_users", name)
    if user.suspended:
        yield Finding(
            where,
            name,
            f"webmail sends mail as '{name}', which is suspended",
            "write another login, or remove 'suspended' there",
            about,
        )
    if user.senders:
        yield Finding(
            where,
            name,
            f"webmail sends mail as '{name}', which may use its own senders alone, for all users",
            "write another login, or remove 'senders' there",
            about,
        )
    if user.password_hash is not None:
        yield Finding(
            where,
            name,
            f"webmail logs in as '{name}' and needs the password, of which there is a hash alone",
            "remove 'password_hash' there: the password is generated",
            about,
        )


@rule("webmail")
def webmail_networks_are_listed_once(platform: Platform) -> Iterator[Finding]:
    networks = platform.webmail.networks if platform.webmail is not None else ()
    for index, network in enumerate(networks):
        if network in networks[:index]:
            yield Finding(
                ("webmail", "networks", index),
                str(network),
                f"'{network}' is listed twice",
                "keep one of them",
                ("webmail", "networks", networks.index(network)),
            )
