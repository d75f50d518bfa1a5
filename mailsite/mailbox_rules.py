"""Rules about mailboxes: the two hosts that keep them, who logs in, who edits filters."""

from __future__ import annotations

from collections.abc import Iterator

from mailsite.model import Platform, Role
from mailsite.rulebook import Finding, RuleBook, closest

BOOK = RuleBook()
rule = BOOK.rule


# -- Hosts ------------------------------------------------------------------------------------


@rule()
def maildrop_is_not_more_than_a_pair(platform: Platform) -> Iterator[Finding]:
    members = platform.members(Role.MAILDROP)
    for host in members[2:]:
        yield Finding(
            ("hosts", host.name, "roles"),
            Role.MAILDROP.value,
            f"'{host.name}' is a maildrop replica beside {members[0].name} and {members[1].name}: "
            "mailboxes are kept equal between two, and with three a change that meets another "
            "on its way round can be lost or doubled",
            "keep two hosts with the role 'maildrop'",
        )


@rule("hosts")
def maildrop_is_not_less_than_a_pair(platform: Platform) -> Iterator[Finding]:
    members = platform.members(Role.MAILDROP)
    if len(members) == 1:
        yield Finding(
            ("hosts", members[0].name, "roles"),
            Role.MAILDROP.value,
            f"'{members[0].name}' is the only maildrop replica: with it every mailbox would be "
            "lost or out of reach",
            "give a second host, at another site, the role 'maildrop'",
        )


@rule("maildrop", "hosts")
def replicas_have_a_primary(platform: Platform) -> Iterator[Finding]:
    members = [host.name for host in platform.members(Role.MAILDROP)]
    if not members:
        return
    if platform.maildrop is None:
        yield Finding(
            ("maildrop",),
            "",
            "'maildrop' is missing, and there are hosts that keep mailboxes",
            f"write 'maildrop:' with 'primary: {members[0]}' and 'managesieve', the networks that "
            "filters may be edited from",
        )
    elif platform.maildrop.primary not in members:
        yield Finding(
            ("maildrop", "primary"),
            platform.maildrop.primary,
            f"'{platform.maildrop.primary}' is no host with the role '{Role.MAILDROP}'",
            closest(platform.maildrop.primary, members),
        )


# -- Mailboxes --------------------------------------------------------------------------------


@rule("sasl_users")
def a_login_is_one_person_with_one_password(platform: Platform) -> Iterator[Finding]:
    """On submission a mailbox and a SASL user of one name would be two passwords for one login."""
    for name, mailbox in platform.mailboxes.items():
        if mailbox.submission and name in platform.sasl_users:
            yield Finding(
                ("mailboxes", name),
                name,
                f"mailbox '{name}' logs in to submission with its own password, and there is a "
                "SASL user of that name too",
                f"remove '{name}' from sasl_users.yaml, or write 'submission: false' here",
                ("sasl_users", name),
            )


@rule("outbound")
def a_quota_holds_the_largest_message(platform: Platform) -> Iterator[Finding]:
    limit = platform.outbound.message_size_limit
    for name, mailbox in platform.mailboxes.items():
        if mailbox.quota is not None and mailbox.quota < limit:
            mib = -(-limit // 1024**2)
            yield Finding(
                ("mailboxes", name, "quota"),
                str(mailbox.quota),
                f"the quota of mailbox '{name}' is {mailbox.quota} bytes, and a message may have "
                f"{limit} (message_size_limit): it would never fit",
                f"write '{mib} MiB' or more",
            )


# -- Filters ----------------------------------------------------------------------------------


@rule("maildrop")
def filters_are_edited_from_networks_of_ours(platform: Platform) -> Iterator[Finding]:
    if platform.maildrop is None:
        return
    networks = platform.maildrop.managesieve
    for index, network in enumerate(networks):
        where = ("maildrop", "managesieve", index)
        if network.prefixlen == 0:
            yield Finding(
                where,
                str(network),
                f"'{network}' would open managesieve to everybody",
                "write the prefixes of the networks that your users are in",
            )
        elif network in networks[:index]:
            yield Finding(
                where,
                str(network),
                f"'{network}' is listed twice",
                "keep one of them",
                ("maildrop", "managesieve", networks.index(network)),
            )
