"""Rules that span several objects of a platform."""

from __future__ import annotations

from dataclasses import dataclass

from mailsite.model import Platform


@dataclass(frozen=True)
class Finding:
    """A rule that the site data breaks. ``location`` leads to the value that is to blame."""

    location: tuple[str | int, ...]
    value: str
    message: str
    remedy: str


def check(platform: Platform, incomplete: frozenset[str] = frozenset()) -> list[Finding]:
    """Return what is wrong with ``platform``."""
    return []
