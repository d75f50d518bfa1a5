"""What differs between two sets of inputs, as property paths.

The engine shows the paths in ``pulumi preview --diff``; a long string is then shown line by
line, and a JSON document as the tree that it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from .values import UNKNOWN, Properties, Value, plain

_SIMPLE_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Kind(Enum):
    ADD = "add"
    DELETE = "delete"
    UPDATE = "update"


@dataclass(frozen=True)
class Change:
    """One changed property. ``path`` is in Pulumi's notation: ``disks[0].volumeId``."""

    path: str
    kind: Kind

    @property
    def top(self) -> str:
        """The top-level property that the path starts with."""
        return re.split(r"[.\[]", self.path, maxsplit=1)[0]


def _join(path: str, key: str) -> str:
    if not _SIMPLE_KEY.fullmatch(key):
        escaped = key.replace("\\", "\\\\").replace('"', '\\"')
        return f'{path}["{escaped}"]'
    return f"{path}.{key}" if path else key


def _compare(path: str, old: Value, new: Value) -> Iterator[Change]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            where = _join(path, key)
            if old.get(key) is None and new.get(key) is None:
                continue
            if old.get(key) is None:
                yield Change(where, Kind.ADD)
            elif new.get(key) is None:
                yield Change(where, Kind.DELETE)
            else:
                yield from _compare(where, old[key], new[key])
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            where = f"{path}[{index}]"
            if index >= len(old):
                yield Change(where, Kind.ADD)
            elif index >= len(new):
                yield Change(where, Kind.DELETE)
            else:
                yield from _compare(where, old[index], new[index])
    elif new is UNKNOWN or old is UNKNOWN or type(old) is not type(new) or old != new:
        yield Change(path, Kind.UPDATE)


def changes(old: Properties, new: Properties, ignored: Collection[str] = ()) -> list[Change]:
    """All changes from ``old`` to ``new``, in the order of their paths.

    Secret marks do not count. Keys that start with ``__`` are the bridge's own notes. ``ignored``
    are paths (``ignoreChanges``) that count as unchanged, with everything below them.
    """

    def own(properties: Properties) -> Properties:
        return {key: plain(item) for key, item in properties.items() if not key.startswith("__")}

    return [
        change
        for change in _compare("", own(old), own(new))
        if not any(
            change.path == path or change.path.startswith((f"{path}.", f"{path}["))
            for path in ignored
        )
    ]
