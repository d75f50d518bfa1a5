"""Rules about mail that comes in: addresses, mailboxes, block lists, the spam filter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from mailsite.aliases import DISCARD_DOMAIN, REQUIRED, Directory, Entry
from mailsite.model import (
    CATCH_ALL,
    NOWHERE,
    AddressTarget,
    MailboxTarget,
    NetworkKind,
    Nowhere,
    Platform,
    Role,
    Target,
    answer_octets,
)
from mailsite.records import find_zone, zones
from mailsite.rulebook import Finding, Location, RuleBook, closest

#: Addresses that one may lead to (postconf(5), virtual_alias_expansion_limit).
EXPANSION_LIMIT = 1000

#: Steps of a circle of addresses that an error shows.
STEPS_SHOWN = 8

#: Where lists answer that they were asked wrongly, and not that a client is listed.
ERROR_ANSWERS = answer_octets("127.255.255.[0..255]")

BOOK = RuleBook()
rule = BOOK.rule


def _targets(platform: Platform) -> Iterator[tuple[Location, str, Target]]:
    """Every target with its place and the address that it belongs to."""
    for name, domain in platform.domains.items():
        for local, targets in domain.addresses.items():
            for index, target in enumerate(targets):
                where: Location = ("domains", name, "addresses", local, index)
                yield where, f"{local}@{name}", target


# -- Hosts ------------------------------------------------------------------------------------


@rule("hosts", "domains")
def inbound_tiers_have_members(platform: Platform) -> Iterator[Finding]:
    if not any(d.receives for d in platform.domains.values()):
        return
    tiers = [(Role.SMTP_IN, "takes the mail of the domains"), (Role.RSPAMD, "looks for spam")]
    if platform.mailboxes:
        tiers.append((Role.MAILDROP, "holds the mailboxes"))
    for role, purpose in tiers:
        if not platform.serving(role):
            yield Finding(
                ("hosts",),
                "",
                f"no host has the role '{role}', which {purpose}",
                f"give at least one host 'roles: [{role}]'",
            )


@rule("networks")
def smtp_in_faces_the_internet(platform: Platform) -> Iterator[Finding]:
    """Block lists judge the client's own address, and forwards leave from the address that
    the host is known by: it is public, and the default route leads through it."""
    for host in platform.members(Role.SMTP_IN):
        leg = host.interfaces[0]
        network = platform.networks.get(leg.network)
        if network is not None and network.kind is not NetworkKind.PUBLIC:
            yield Finding(
                ("hosts", host.name, "interfaces", 0, "network"),
                leg.network,
                f"the first interface of '{host.name}' is in '{leg.network}', which is "
                f"{network.kind}, and '{Role.SMTP_IN}' talks to the internet",
                "write an interface in a public network in front of it",
            )


@rule("internal_domain")
def hosts_leave_the_names_of_tiers_alone(platform: Platform) -> Iterator[Finding]:
    roles = (Role.SMTP_OUT, Role.RSPAMD, Role.MAILDROP, Role.WEBMAIL)
    taken = {platform.internal_name(role): role for role in roles}
    taken[platform.webmail_backend] = Role.MAILDROP
    for name, role in taken.items():
        if name in platform.hosts:
            yield Finding(
                ("hosts", name),
                name,
                f"'{name}' stands for all hosts with the role '{role}'",
                "write another name for this one",
            )


# -- Addresses --------------------------------------------------------------------------------


@rule()
def domains_that_take_no_mail_have_no_addresses(platform: Platform) -> Iterator[Finding]:
    for name, domain in platform.domains.items():
        if domain.receives:
            continue
        for key, given in (
            ("addresses", bool(domain.addresses)),
            ("alias_of", domain.alias_of is not None),
            ("retired", domain.retired),
        ):
            if given:
                yield Finding(
                    ("domains", name, key),
                    "",
                    f"domain '{name}' takes no mail and has '{key}'",
                    f"remove '{key}', or write 'receives: true'",
                )


@rule("domain")
def own_domain_is_not_retired(platform: Platform) -> Iterator[Finding]:
    own = platform.domains.get(platform.domain)
    if own is not None and own.retired:
        yield Finding(
            ("domains", platform.domain, "retired"),
            "true",
            f"'{platform.domain}' is the platform's own domain, and answers to its mail come there",
            "remove the line",
        )


@rule()
def receiving_domains_have_postmaster_and_abuse(platform: Platform) -> Iterator[Finding]:
    """RFC 5321, section 4.5.1, and RFC 2142. A domain alias has those of its target."""
    for name, domain in platform.domains.items():
        missing = [local for local in REQUIRED if local not in domain.addresses]
        if domain.receives and domain.alias_of is None and missing:
            what = " and no ".join(f"{local}@" for local in missing)
            lines = " and ".join(f"'{local}: MAILBOX'" for local in missing)
            yield Finding(
                ("domains", name, "addresses"),
                "",
                f"domain '{name}' takes mail and has no {what}",
                f"add {lines} below 'addresses', or write 'receives: false'",
            )


@rule("domains")
def postmaster_and_abuse_are_read(platform: Platform) -> Iterator[Finding]:
    directory = Directory(platform)
    for entry in directory.entries():
        if entry.local not in REQUIRED:
            continue
        if set(directory.outcome(entry).ends) == {Nowhere()}:
            yield Finding(
                ("domains", entry.domain, "addresses", entry.local),
                NOWHERE,
                f"{entry} is thrown away, and others must be able to reach somebody there",
                "write a mailbox that somebody reads",
            )


@rule("domains")
def alias_domains_lead_to_a_domain_of_its_own(platform: Platform) -> Iterator[Finding]:
    for name, domain in platform.domains.items():
        if domain.alias_of is None:
            continue
        where: Location = ("domains", name, "alias_of")
        target = platform.domains.get(domain.alias_of)
        if target is None:
            others = [d.name for d in platform.domains.values() if d.receives and d is not domain]
            yield Finding(
                where,
                domain.alias_of,
                f"domain '{name}' is an alias of '{domain.alias_of}', which is no mail domain",
                closest(domain.alias_of, others),
            )
        elif target.alias_of is not None:
            remedy = f"write 'alias_of: {target.alias_of}'"
            yield Finding(
                where,
                target.name,
                f"domain '{name}' is an alias of '{target.name}', which is an alias itself",
                remedy if target.alias_of not in (name, target.name) else "remove one of the two",
                ("domains", target.name, "alias_of"),
            )
        elif not target.receives:
            yield Finding(
                where,
                target.name,
                f"domain '{name}' is an alias of '{target.name}', which takes no mail",
                "write a domain that does",
                ("domains", target.name, "receives"),
            )


@rule()
def alias_domains_have_no_catch_all(platform: Platform) -> Iterator[Finding]:
    for name, domain in platform.domains.items():
        if domain.alias_of is not None and CATCH_ALL in domain.addresses:
            yield Finding(
                ("domains", name, "addresses", CATCH_ALL),
                CATCH_ALL,
                f"domain '{name}' is an alias and takes every address: an alias knows only what "
                f"'{domain.alias_of}' knows",
                f"remove '{CATCH_ALL}' here, or 'alias_of'",
            )


@rule("mailboxes")
def mailboxes_exist(platform: Platform) -> Iterator[Finding]:
    for where, address, target in _targets(platform):
        if isinstance(target, MailboxTarget) and target.mailbox not in platform.mailboxes:
            remedy = closest(target.mailbox, platform.mailboxes)
            yield Finding(
                where,
                str(target),
                f"{address} leads to the unknown mailbox '{target.mailbox}'",
                f"{remedy} otherwise add it to mailboxes.yaml"
                if remedy.endswith("?")
                else f"add it to mailboxes.yaml; {remedy}",
            )


@rule("internal_domain")
def mailboxes_are_written_by_name(platform: Platform) -> Iterator[Finding]:
    """The name alone can be checked, and stays right when the internal domain changes."""
    inside = platform.maildrop_domain
    if inside in platform.domains:
        yield Finding(
            ("domains", inside),
            inside,
            f"'{inside}' is the domain of the mailboxes, and no mail domain beside it",
            f"remove the file domains/{inside}.yaml",
        )
    for where, address, target in _targets(platform):
        if not isinstance(target, AddressTarget):
            continue
        if target.domain == inside:
            yield Finding(
                where,
                str(target),
                f"{address} leads to a mailbox by its address on the maildrop hosts",
                f"write '{target.local}'",
            )
        elif target.domain == DISCARD_DOMAIN:
            yield Finding(
                where,
                str(target),
                f"{address} leads to '{DISCARD_DOMAIN}', which the platform keeps for itself",
                f"write '{NOWHERE}'",
            )


@rule()
def targets_are_listed_once(platform: Platform) -> Iterator[Finding]:
    for name, domain in platform.domains.items():
        for local, targets in domain.addresses.items():
            where: Location = ("domains", name, "addresses", local)
            for index, target in enumerate(targets):
                if target in targets[:index]:
                    yield Finding(
                        (*where, index),
                        str(target),
                        f"{local}@{name} leads to '{target}' twice",
                        "keep one of them",
                        (*where, targets.index(target)),
                    )
                elif isinstance(target, Nowhere) and len(targets) > 1:
                    yield Finding(
                        (*where, index),
                        NOWHERE,
                        f"{local}@{name} leads to {NOWHERE} and to somebody too",
                        f"remove '{NOWHERE}', or all others",
                    )


@rule("domains")
def forwards_within_the_platform_arrive(platform: Platform) -> Iterator[Finding]:
    directory = Directory(platform)
    for where, address, target in _targets(platform):
        if not isinstance(target, AddressTarget) or target.domain not in platform.domains:
            continue
        if not directory.takes(target.domain):
            yield Finding(
                where,
                str(target),
                f"{address} leads to '{target}', and '{target.domain}' takes no mail",
                "write an address of a domain that does",
                ("domains", target.domain, "receives"),
            )
        elif directory.find(target.local, target.domain) is None:
            domain = platform.domains[target.domain]
            known = dict.fromkeys(domain.addresses)
            if domain.alias_of in platform.domains:
                known |= dict.fromkeys(platform.domains[domain.alias_of].addresses)
            yield Finding(
                where,
                str(target),
                f"{address} leads to '{target}', which does not exist",
                closest(target.local, known),
            )


@rule("domains", "dmarc")
def reports_arrive(platform: Platform) -> Iterator[Finding]:
    """DMARC reports that are asked for at an address of ours reach somebody."""
    directory = Directory(platform)
    wanted: list[tuple[Location, str]] = [
        (("dmarc", "rua", index), address) for index, address in enumerate(platform.dmarc.rua)
    ]
    for name, domain in platform.domains.items():
        own = domain.dmarc.rua if domain.dmarc is not None else ()
        wanted += [(("domains", name, "dmarc", "rua", n), address) for n, address in enumerate(own)]
    for where, address in wanted:
        local, _, domain_name = address.rpartition("@")
        if domain_name in platform.domains and directory.find(local, domain_name) is None:
            yield Finding(
                where,
                address,
                f"DMARC reports are asked for at '{address}', which does not exist",
                f"add '{local}: MAILBOX' in domains/{domain_name}.yaml, or write another address",
            )


@rule("domains")
def addresses_do_not_lead_back(platform: Platform) -> Iterator[Finding]:
    directory = Directory(platform)
    for entry in directory.entries():
        loop = directory.outcome(entry).loop
        if loop:
            yield Finding(
                ("domains", loop[0].domain, "addresses", loop[0].local),
                str(loop[0]),
                f"mail to {loop[0]} comes back to it: {_way(loop)}",
                "write a mailbox or an address elsewhere at one of them",
            )


def _way(loop: Sequence[Entry]) -> str:
    steps = [str(entry) for entry in loop]
    if len(steps) > STEPS_SHOWN:
        steps[STEPS_SHOWN - 2 : -1] = ["..."]
    return " -> ".join(steps)


@rule("domains")
def addresses_lead_to_a_thousand_others_at_most(platform: Platform) -> Iterator[Finding]:
    directory = Directory(platform)
    for entry in directory.entries():
        ends = directory.outcome(entry).ends
        if len(ends) > EXPANSION_LIMIT:
            yield Finding(
                ("domains", entry.domain, "addresses", entry.local),
                str(len(ends)),
                f"{entry} leads to {len(ends)} addresses, and Postfix follows {EXPANSION_LIMIT}",
                "use a mailing list program for that many",
            )


# -- Sender rewriting -------------------------------------------------------------------------


@rule("inbound", "domain", "internal_domain", "names", "domains", "hosts")
def srs_domain_is_a_name_of_its_own(platform: Platform) -> Iterator[Finding]:
    """An address there is valid only if a member of smtp-in signed it; nothing else is."""
    name = platform.inbound.srs_domain
    owner = ""
    if name in platform.domains:
        owner = "a mail domain"
    elif name in dict(platform.names).values():
        owner = "the name of a service"
    elif name in platform.hosts:
        owner = "a host"
    elif name == platform.internal_domain or name.endswith(f".{platform.internal_domain}"):
        owner = "internal"
    if owner:
        message = f"'{name}' is {owner}, and forwarded mail needs a sender domain of its own"
    elif find_zone(platform, name) is None:
        listed = ", ".join(zones(platform)[:5])
        message = f"'{name}' lies in none of the platform's zones ({listed})"
    else:
        return
    yield Finding(
        ("inbound", "srs_domain"),
        name,
        message,
        f"write a name that nothing else has, such as 'srs.{platform.domain}'",
    )


@rule("inbound")
def srs_keys_are_listed_once(platform: Platform) -> Iterator[Finding]:
    keys = platform.inbound.srs_keys
    for index, key in enumerate(keys):
        if key in keys[:index]:
            yield Finding(
                ("inbound", "srs_keys", index),
                key,
                f"SRS key '{key}' is listed twice",
                "write a new name for each key",
            )


@rule("inbound", "domains")
def nothing_is_forwarded_to_the_srs_domain(platform: Platform) -> Iterator[Finding]:
    domain = platform.inbound.srs_domain
    if domain in platform.domains:
        return  # reported as such
    for where, address, target in _targets(platform):
        if isinstance(target, AddressTarget) and target.domain == domain:
            yield Finding(
                where,
                str(target),
                f"{address} leads to '{target}', and '{target.domain}' takes bounces of forwarded "
                "mail alone",
                "write another address",
            )


# -- Block lists ------------------------------------------------------------------------------


@rule("inbound")
def block_lists_are_asked_once(platform: Platform) -> Iterator[Finding]:
    for (_, one), (index, two) in combinations(enumerate(platform.inbound.dnsbl), 2):
        same = (one.kind, one.zone, one.answers) == (two.kind, two.zone, two.answers)
        if same:
            yield Finding(
                ("inbound", "dnsbl", index),
                two.zone,
                f"'{two.zone}' is asked for {two.kind} with answers {two.answers} already",
                "keep one of the two",
            )


@rule("inbound")
def answers_that_refuse_are_listings(platform: Platform) -> Iterator[Finding]:
    """Lists answer within 127.0.0.0/8 (RFC 5782, section 2.1), and report errors there too."""
    for index, dnsbl in enumerate(platform.inbound.dnsbl):
        octets = answer_octets(dnsbl.answers)
        where: Location = ("inbound", "dnsbl", index, "answers")
        if octets[0] != {127}:
            yield Finding(
                where,
                dnsbl.answers,
                f"'{dnsbl.answers}' is outside 127.0.0.0/8, where block lists answer",
                "write a filter like '127.0.0.[2..11]'",
            )
        elif not dnsbl.warn_only and all(
            mine & error for mine, error in zip(octets, ERROR_ANSWERS, strict=True)
        ):
            yield Finding(
                where,
                dnsbl.answers,
                f"'{dnsbl.answers}' has error codes in it (127.255.255.x): a list that is "
                "asked wrongly would refuse all mail",
                "leave them out, or write 'warn_only: true'",
            )


# -- Spam filter ------------------------------------------------------------------------------


@rule("spam")
def spam_scores_rise(platform: Platform) -> Iterator[Finding]:
    scores = platform.spam.scores
    for (low, below), (high, above) in (
        (("greylist", scores.greylist), ("add_header", scores.add_header)),
        (("add_header", scores.add_header), ("reject", scores.reject)),
    ):
        if below >= above:
            yield Finding(
                ("spam", "scores", high),
                f"{above:g}",
                f"{high} {above:g} is not above {low} {below:g}",
                "write scores that rise: greylist, add_header, reject",
                ("spam", "scores", low),
            )


@rule("spam")
def recipients_are_at_least_as_many_as_messages(platform: Platform) -> Iterator[Finding]:
    limits = platform.spam.user_limits
    if limits.recipients < limits.messages:
        yield Finding(
            ("spam", "user_limits", "recipients"),
            str(limits.recipients),
            f"{limits.recipients} recipients are fewer than {limits.messages} messages, "
            "and each message has one at least",
            "write a larger number of recipients in an hour",
        )


@rule("spam")
def spam_ports_differ(platform: Platform) -> Iterator[Finding]:
    keys = ("milter_port", "controller_port", "redis_port", "sentinel_port")
    first: dict[int, str] = {}
    for key in keys:
        port: int = getattr(platform.spam, key)
        other = first.setdefault(port, key)
        if other != key:
            yield Finding(
                ("spam", key),
                str(port),
                f"port {port} is the '{other}' already",
                "write another port",
                ("spam", other),
            )


# -- Logins -----------------------------------------------------------------------------------


@rule("domains")
def senders_are_in_domains_that_send(platform: Platform) -> Iterator[Finding]:
    sending = [d.name for d in platform.domains.values() if d.sends]
    for name, user in platform.sasl_users.items():
        for index, sender in enumerate(user.senders):
            where: Location = ("sasl_users", name, "senders", index)
            domain = sender.rpartition("@")[2]
            if sender in user.senders[:index]:
                yield Finding(where, sender, f"'{sender}' is listed twice", "keep one of them")
            elif not any(domain == d or domain.endswith(f".{d}") for d in sending):
                yield Finding(
                    where,
                    sender,
                    f"'{name}' may send as '{sender}', and '{domain}' is no domain that sends",
                    closest(domain, sending),
                )
