"""What users did to folders, and what two servers tell each other of it.

The hook (notify.lua) leaves a file for each folder that a user makes, renames or deletes, with its
names; the time of the file is that of the change. Which folder it was, by its GUID, the lists of
folders tell, now and before.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

INBOX = "INBOX"
SEPARATOR = "/"

Named = tuple[str, float]
"""A name or a GUID, and a time (seconds since 1970)."""


@dataclass(frozen=True)
class Change:
    """What the hook tells of: ``old`` is empty where a folder was made, ``new`` where one was
    deleted.
    """

    old: str
    new: str
    at: float


@dataclass(frozen=True)
class Told:
    """What the peer does not know yet of a user's folders on one server.

    :param renamed: folder (its GUID) -> its name, and when it was given that
    :param left: name that a folder had before -> that folder, and when it was renamed; or that of a
        deleted folder -> an empty text, and when
    :param made: name that a user gave, to a new folder or an old one -> when
    :param gone: folder (its GUID) that was deleted -> when
    """

    renamed: dict[str, Named] = field(default_factory=dict)
    left: dict[str, Named] = field(default_factory=dict)
    made: dict[str, float] = field(default_factory=dict)
    gone: dict[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.renamed or self.left or self.made or self.gone)

    def document(self) -> dict[str, Any]:
        """For the peer."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any] | None) -> Told:
        """What the peer sent, or a state: one of earlier releases may know less."""
        document = document or {}
        made, gone = (
            {str(what): float(at) for what, at in document.get(part, {}).items()}
            for part in ("made", "gone")
        )
        renamed, left = (_named(document.get(part, {})) for part in ("renamed", "left"))
        return cls(renamed, left, made, gone)


def _named(document: Mapping[str, Any]) -> dict[str, Named]:
    return {str(key): (str(name), float(at)) for key, (name, at) in document.items()}


NOTHING = Told()


@dataclass
class Standing:
    """What a server found that keeps the other one from taking something away.

    :param stay: names of folders that nobody gave them, with mails in them: dsync would delete them
        here too
    :param carried: folder (its GUID) that was deleted there -> mails (their GUIDs) that dsync
        brought from there, saved in the second of the deletion; others of that second are not
        known there
    :param put: name of a folder that nobody gave it -> mails (their GUIDs) that a user put into it
        here, whatever dsync makes of them
    :param is_unsure: whether such a folder may go in a run of this server, which then knows what
        the other one has in it; until then both remember what they told
    :param taken: folders (their GUIDs) that were taken away here just now; not for the peer
    """

    stay: list[str] = field(default_factory=list)
    carried: dict[str, list[str]] = field(default_factory=dict)
    put: dict[str, list[str]] = field(default_factory=dict)
    is_unsure: bool = False
    taken: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """For the peer."""
        return {
            "stay": self.stay,
            "carried": self.carried,
            "put": self.put,
            "unsure": self.is_unsure,
        }

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Standing:
        """What the peer sent; one of an earlier release may say less."""
        carried, put = (
            {str(key): list(map(str, mails)) for key, mails in document.get(part, {}).items()}
            for part in ("carried", "put")
        )
        stay = list(map(str, document.get("stay", ())))
        return cls(stay, carried, put, bool(document.get("unsure")))


def read(files: Iterable[Path]) -> list[Change]:
    """What the hook's files tell, the earliest first."""
    found: list[Change] = []
    for path in files:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            at = path.stat().st_mtime
            lines = path.read_text(encoding="utf-8").split("\n")
            found += [Change(*pair, at) for pair in zip(lines[::2], lines[1::2], strict=False)]
    # A rename of the inbox makes a new folder of its mails.
    return sorted((c for c in found if c.old.upper() != INBOX), key=lambda change: change.at)


def add(
    known: Told,
    changes: Sequence[Change],
    names: Mapping[str, str],
    seen: Mapping[str, Named] = MappingProxyType({}),
    guids: Mapping[str, str] | None = None,
) -> tuple[Told, bool]:
    """``known`` with ``changes``, and whether folders of which they tell are not there.

    ``names``: GUID -> name now; ``guids``: the other way round, where there are two of one GUID;
    ``seen``: as for :func:`follow`.
    """
    guids = {name: guid for guid, name in names.items()} if guids is None else guids
    origins, _ = follow(changes, seen)
    renamed, left, made = dict(known.renamed), dict(known.left), dict(known.made)
    chains: dict[str, list[Change]] = {}
    for change in changes:
        chain = [*chains.pop(change.old, []), change]
        if change.old:
            made.pop(change.old, None)
        if change.new:
            left.pop(change.new, None)
            made[change.new] = change.at
            if change.old:
                chains[change.new] = chain
            continue
        # A name that another folder got since is that one's.
        deleted = {c.old for c in chain if made.get(c.old, 0.0) < c.at}
        for guid in [g for g, (name, _) in renamed.items() if name == chain[0].old]:
            del renamed[guid]
            deleted |= {name for name, (which, _) in left.items() if which == guid}
        left |= dict.fromkeys(deleted, ("", change.at))
    missing = False
    for name, chain in chains.items():
        first, last = chain[0], chain[-1]
        found = guids.get(name)
        if found is None and made.get(first.old, 0.0) < last.at:
            # dsync has taken the name back already.
            found = guids.get(first.old)
        if found is None:
            missing = True
            # Where it is gone, what the peer has of it has an earlier name.
            origin, _ = origins.get(name, ("", 0.0))
            found = origin if origin not in names else None
        if found:
            renamed[found] = (name, last.at)
            left |= {c.old: (found, c.at) for c in chain if made.get(c.old, 0.0) < c.at}
    return Told(renamed, left, made, dict(known.gone)), missing


def follow(
    changes: Iterable[Change], seen: Mapping[str, Named]
) -> tuple[dict[str, Named], dict[str, float]]:
    """Which folder has a name after ``changes``, and which were deleted.

    ``seen``: name -> GUID of a folder that had it, and since when this is known; what was seen only
    after a change is not what that tells of. Returns the same, the GUID empty where it is not
    known; and GUID -> when it was deleted.
    """
    origins: dict[str, Named] = {}
    gone: dict[str, float] = {}
    later = sorted(seen.items(), key=lambda known: known[1][1], reverse=True)
    for change in changes:
        while later and later[-1][1][1] <= change.at:
            origins.update([later.pop()])
        guid, _ = origins.pop(change.old, ("", 0.0))
        if change.new:
            origins[change.new] = (guid, change.at)
        elif guid:
            gone[guid] = change.at
    origins.update(later)
    return origins, gone


def latest(one: Told, other: Told) -> dict[str, Named]:
    """Folder (its GUID) -> the name that it was given last, and when."""
    found = {}
    for guid in {*one.renamed, *other.renamed}:
        known = [side.renamed[guid] for side in (one, other) if guid in side.renamed]
        found[guid] = max(known, key=lambda named: (named[1], named[0]))
    return found


def next_rename(names: Mapping[str, str], wanted: Mapping[str, str]) -> tuple[str, str] | None:
    """What to rename next here: from, to; None where nothing is left that can be.

    ``names``: folder (its GUID) -> the name that it has. Folders that exchange their names get out
    of each other's way first.
    """
    wrong = {g: name for g, name in wanted.items() if names.get(g, name) != name}
    holders = {name: guid for guid, name in names.items()}
    for guid, name in wrong.items():
        if name not in holders:
            return names[guid], name
    for guid, name in wrong.items():
        if holders[name] in wrong:
            return names[guid], f"{name} {secrets.token_hex(4)}"
    return None


def given_at(made: Mapping[str, float], name: str) -> float:
    """When a user gave a folder its name: that folder, or one that it is in was made or renamed."""
    parts = name.split(SEPARATOR)
    return max(made.get(SEPARATOR.join(parts[:n]), 0.0) for n in range(1, len(parts) + 1))


def relics(names: Mapping[str, str], one: Told, other: Told) -> dict[str, Named]:
    """Folders here that have a name which nobody gave them.

    Name -> which folder had it before, which may be gone, and when it was renamed.
    """
    found = {}
    for name in {*one.left, *other.left}:
        guid, at = max((t.left[name] for t in (one, other) if name in t.left), key=lambda n: n[1])
        made = max(given_at(told.made, name) for told in (one, other))
        is_there = any(n == name and g != guid for g, n in names.items())
        if guid and is_there and made < at:
            found[name] = (guid, at)
    return found
