"""Where mail to the platform's own addresses goes: Postfix's virtual domains and aliases.

Pure functions of the site data; every member of smtp-in gets the same tables. Postfix looks an
address up as it is, then without its extension, then as ``@domain``, and looks up again what it
finds (virtual(5)); :class:`Directory` follows the same way, so that what the site data says can
be judged before a mail server sees it. No line has an extension, so the first lookup of an
address with one never finds anything.

Mail is never sent to ``/dev/null`` by name: a virtual alias leads to addresses only, and a
DISCARD from an access table would throw the whole message away, for its other recipients too.
Such addresses lead to :data:`DISCARD_ADDRESS` instead, whose domain the transport table gives to
discard(8). The domain is one that can never exist (RFC 2606), so that nothing outside is meant
by it; smtp-in takes no mail for it from outside, because it is no virtual domain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mailsite.model import (
    CATCH_ALL,
    DELIMITER,
    AddressTarget,
    MailboxTarget,
    MailDomain,
    Platform,
    Target,
)

DISCARD_DOMAIN = "discard.invalid"
DISCARD_ADDRESS = f"null@{DISCARD_DOMAIN}"

#: Local parts that every domain that takes mail must have (RFC 5321, section 4.5.1; RFC 2142).
REQUIRED = ("postmaster", "abuse")


class Entry(NamedTuple):
    """A line of the site data: a domain, and a local part or ``*`` in its ``addresses``."""

    domain: str
    local: str

    def __str__(self) -> str:
        return f"@{self.domain}" if self.local == CATCH_ALL else f"{self.local}@{self.domain}"


# -- The tables --------------------------------------------------------------------------------


def virtual_domains(platform: Platform) -> tuple[str, ...]:
    """The domains that smtp-in takes mail for, sorted; retired ones too."""
    return tuple(sorted(d.name for d in platform.domains.values() if d.receives))


def virtual_aliases(platform: Platform) -> dict[str, tuple[str, ...]]:
    """Address -> where its mail goes next, sorted by domain and local part.

    Keys are ``local@domain``, or ``@domain`` for a catch-all. A mailbox is written as its address
    on the maildrop hosts. A domain alias has one line for each address of its target, because
    ``@alias -> @target`` would accept every address and bounce most of them; it leads to the
    target's address, so that a change there is a change of one line.
    """
    tables = {name: _table(platform, platform.domains[name]) for name in virtual_domains(platform)}
    return {key: targets for table in tables.values() for key, targets in table.items()}


def _table(platform: Platform, domain: MailDomain) -> dict[str, tuple[str, ...]]:
    lines = {
        local: tuple(route(platform, target) for target in targets)
        for local, targets in domain.addresses.items()
    }
    if domain.alias_of is not None:
        target = platform.domains[domain.alias_of]
        for local, targets in target.addresses.items():
            if local == CATCH_ALL:
                lines.setdefault(local, tuple(route(platform, t) for t in targets))
            else:
                lines.setdefault(local, (f"{local}@{target.name}",))
    # '*' sorts before letters and digits: the catch-all stands first.
    return {str(Entry(domain.name, local)): lines[local] for local in sorted(lines)}


def route(platform: Platform, target: Target) -> str:
    """The address that stands for ``target`` in the table."""
    if isinstance(target, MailboxTarget):
        return f"{target}@{platform.maildrop_domain}"
    if isinstance(target, AddressTarget):
        return str(target)
    return DISCARD_ADDRESS


def limited_addresses(platform: Platform) -> tuple[str, ...]:
    """Addresses whose mail ends in one mailbox, and that has a quota; in alphabetical order.

    For them smtp-in asks whether there is room before it takes a mail. One of an address that
    leads to several mailboxes, or to anybody else, is not refused because one of them is full.
    """
    directory = Directory(platform)
    found = []
    for name in virtual_domains(platform):
        domain = platform.domains[name]
        known = dict.fromkeys(domain.addresses)
        if domain.alias_of is not None:
            known |= dict.fromkeys(platform.domains[domain.alias_of].addresses)
        for local in known:
            entry = directory.find(local, name) if local != CATCH_ALL else None
            if entry is not None and _is_limited(platform, directory.outcome(entry).ends):
                found.append(f"{local}@{name}")
    return tuple(sorted(found))


def _is_limited(platform: Platform, ends: Collection[Target]) -> bool:
    boxes = {end.mailbox if isinstance(end, MailboxTarget) else None for end in ends}
    box = platform.mailboxes.get(next(iter(boxes)) or "") if len(boxes) == 1 else None
    return box is not None and box.quota is not None


def main_address(platform: Platform, mailbox: str) -> str | None:
    """The address that the owner of ``mailbox`` is best known by; None where none leads there.

    One that is written like the mailbox comes before others, and the platform's own domain before
    others; then the order of the site data decides.
    """
    found = [
        (local != mailbox, name != platform.domain, str(Entry(name, local)))
        for name, domain in platform.domains.items()
        if domain.receives and not domain.retired
        for local, targets in domain.addresses.items()
        if local != CATCH_ALL
        and any(isinstance(t, MailboxTarget) and t.mailbox == mailbox for t in targets)
    ]
    return min(found, key=lambda rank: rank[:2])[2] if found else None


# -- What an address leads to ------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Where all copies of a mail to one entry end.

    ``loop`` is the way from an entry back to itself, empty where there is none; where there is
    one, ``ends`` holds what does not loop.
    """

    ends: frozenset[Target] = frozenset()
    loop: tuple[Entry, ...] = ()


class Directory:
    """All addresses of the platform, to ask what they lead to.

    Domains that take no mail have none. The site data may be wrong: an alias of a domain that
    does not exist has its own addresses alone.
    """

    def __init__(self, platform: Platform) -> None:
        self._domains = {d.name: d for d in platform.domains.values() if d.receives}
        self._outcomes: dict[Entry, Outcome] = {}

    def takes(self, domain: str) -> bool:
        """Whether the platform takes mail for ``domain``."""
        return domain in self._domains

    def entries(self) -> Iterator[Entry]:
        """Every line of the site data, in its order."""
        for domain in self._domains.values():
            for local in domain.addresses:
                yield Entry(domain.name, local)

    def targets(self, entry: Entry) -> tuple[Target, ...]:
        return self._domains[entry.domain].addresses[entry.local]

    def find(self, local: str, domain: str) -> Entry | None:
        """The line that answers for an address; None where the address does not exist.

        A domain alias has its own lines in front of those of its target.
        """
        here = self._domains.get(domain)
        there = self._domains.get(here.alias_of or "") if here is not None else None
        lines = tuple(d for d in (here, there) if d is not None)
        for key in (local.lower().partition(DELIMITER)[0], CATCH_ALL):
            for found in lines:
                if key in found.addresses:
                    return Entry(found.name, key)
        return None

    def outcome(self, entry: Entry) -> Outcome:
        """Follow ``entry`` to its ends."""
        self._follow(entry)
        return self._outcomes[entry]

    def _next(self, entry: Entry) -> tuple[list[Entry], list[Target]]:
        """What ``entry`` leads to: lines to look up again, and ends."""
        again: list[Entry] = []
        ends: list[Target] = []
        for target in self.targets(entry):
            found = None
            if isinstance(target, AddressTarget):
                found = self.find(target.local, target.domain)
            if found is None:
                ends.append(target)
            else:
                again.append(found)
        return again, ends

    def _follow(self, start: Entry) -> None:
        """Depth first and without recursion: a chain may be longer than Python's stack."""
        path: dict[Entry, Iterator[Entry]] = {}
        ends: dict[Entry, set[Target]] = {}
        loops: dict[Entry, tuple[Entry, ...]] = {}

        def enter(entry: Entry) -> None:
            again, final = self._next(entry)
            path[entry], ends[entry] = iter(again), set(final)

        if start not in self._outcomes:
            enter(start)
        while path:
            entry, rest = next(reversed(path.items()))
            following = next(rest, None)
            if following is None:
                del path[entry]
                self._outcomes[entry] = Outcome(frozenset(ends[entry]), loops.get(entry, ()))
                if path:
                    ends[next(reversed(path))] |= ends[entry]
            elif following in path:
                way = list(path)
                loops[entry] = (*way[way.index(following) :], following)
            elif following in self._outcomes:
                ends[entry] |= self._outcomes[following].ends
            else:
                enter(following)
