"""What rules about a whole platform are made of, and how they are collected.

A rule is a generator of findings and names the parts of the site data that must be whole for it
to make sense: with a host that cannot be read, "no host has the role smtp-out" would mislead.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from mailsite.model import Platform

Location: TypeAlias = tuple[str | int, ...]

#: Known words that an error lists, where none is like the wrong one.
SHOWN = 12


@dataclass(frozen=True)
class Finding:
    """A rule that the site data breaks.

    ``location`` leads to the value that is to blame, ``other`` to a second one that it collides
    with. ``remedy`` says what to write instead.
    """

    location: Location
    value: str
    message: str
    remedy: str
    other: Location | None = None


Rule: TypeAlias = Callable[[Platform], Iterator[Finding]]


@dataclass(frozen=True)
class RuleBook:
    """Rules of one kind: the parts of the site data that each needs whole, and the rule."""

    rules: list[tuple[frozenset[str], Rule]] = field(default_factory=list)

    def rule(self, *whole: str) -> Callable[[Rule], Rule]:
        """Register a rule that needs the parts ``whole`` of the site data to be valid."""

        def register(function: Rule) -> Rule:
            self.rules.append((frozenset(whole), function))
            return function

        return register


def nearest(wrong: str, known: Iterable[str]) -> str | None:
    """The known word that ``wrong`` is most likely a misspelling of."""
    near = difflib.get_close_matches(wrong.lower(), list(known), n=1, cutoff=0.6)
    return near[0] if near else None


def closest(wrong: str, known: Iterable[str]) -> str:
    """The remedy for a misspelt word: the nearest known one, or all of them if they are few."""
    names = [str(k) for k in known]
    near = nearest(wrong, names)
    if near is not None:
        return f"did you mean '{near}'?"
    if len(names) > SHOWN:
        return f"known are {len(names)}, among them {', '.join(names[:SHOWN])}"
    return f"known are: {', '.join(names)}" if names else "there is none yet"
