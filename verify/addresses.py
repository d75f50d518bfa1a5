"""Where mail to the platform's addresses must end, read off the site data by the checks themselves.

Nothing here looks at the tables that the platform renders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mailsite.model import AddressTarget, MailboxTarget, MailDomain, Platform, Target

EVERYONE = "*"


@dataclass(frozen=True)
class Way:
    """Where a mail to one address goes.

    Attributes:
        mailboxes: Addresses of the mailboxes that get a copy each.
        forwards: Addresses of others that get a copy each.
    """

    mailboxes: frozenset[str]
    forwards: frozenset[str]


def way(platform: Platform, address: str) -> Way | None:
    """Where mail to ``address`` goes; None where the address does not exist.

    An extension (``user+extension``) goes along, but not where a catch-all took the mail.
    """
    local, _, domain = address.lower().rpartition("@")
    user, plus, extension = local.partition("+")
    found = _line(platform, domain, user)
    if found is None:
        return None
    targets, by_name = found
    more = plus + extension if by_name else ""
    mailboxes: set[str] = set()
    forwards: set[str] = set()
    for target in targets:
        if isinstance(target, MailboxTarget):
            mailboxes.add(f"{target}{more}@{platform.maildrop_domain}")
        elif isinstance(target, AddressTarget):
            further = f"{target.local}{more}@{target.domain}"
            beyond = way(platform, further) if target.domain in platform.domains else None
            if beyond is None:
                forwards.add(further)
            else:
                mailboxes |= beyond.mailboxes
                forwards |= beyond.forwards
    return Way(frozenset(mailboxes), frozenset(forwards))


def _line(platform: Platform, domain: str, user: str) -> tuple[tuple[Target, ...], bool] | None:
    """The targets of ``user``, and whether the user is named. Own lines go before the target's."""
    here = platform.domains.get(domain)
    if here is None or not here.receives:
        return None
    there = platform.domains.get(here.alias_of or "")
    for name in (user, EVERYONE):
        for lines in (here.addresses, there.addresses if there else {}):
            if name in lines:
                return lines[name], name != EVERYONE
    return None


def receiving(platform: Platform) -> tuple[MailDomain, ...]:
    """The domains that take mail."""
    return tuple(d for d in platform.domains.values() if d.receives)


def takes_everyone(platform: Platform, domain: MailDomain) -> bool:
    """Whether every address of the domain exists."""
    return _line(platform, domain.name, EVERYONE) is not None


def users(platform: Platform, domain: MailDomain) -> Iterator[str]:
    """The users that the domain names, its target's too."""
    target = platform.domains.get(domain.alias_of or "")
    named = {**domain.addresses, **(target.addresses if target else {})}
    yield from (user for user in named if user != EVERYONE)


def mailbox_user(platform: Platform, domain: MailDomain) -> str | None:
    """A user of the domain whose mail goes to one mailbox alone, with any extension."""
    for user in users(platform, domain):
        found = way(platform, f"{user}@{domain.name}")
        if found is not None and len(found.mailboxes) == 1 and not found.forwards:
            return user
    return None
