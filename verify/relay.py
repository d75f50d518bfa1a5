"""The ways in which people try to send through servers that are not theirs, as data."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

FILE = Path(__file__).with_name("relay_attempts.yaml")
STRANGER = "someone@stranger.invalid"


class _Filler(string.Formatter):
    """Fills in ``{name}`` and ``{name:upper}``."""

    def format_field(self, value: Any, format_spec: str) -> str:
        return str(value).upper() if format_spec == "upper" else str(value)


@dataclass(frozen=True)
class Attempt:
    """An envelope with names to be filled in, and the sort of trick that it is."""

    sort: str
    sender: str
    recipient: str

    def filled(self, values: Mapping[str, str]) -> tuple[str, str]:
        """Sender and recipient. Raises ``KeyError`` where a name stands for nothing."""
        fill = _Filler().vformat
        return fill(self.sender, (), values), fill(self.recipient, (), values)


@cache
def attempts() -> tuple[Attempt, ...]:
    """All attempts of :data:`FILE`, in its order."""
    found = YAML(typ="safe").load(FILE.read_text(encoding="utf-8"))
    return tuple(
        Attempt(sort, one.get("sender", STRANGER), one["recipient"])
        for sort, ones in found.items()
        for one in ones
    )
