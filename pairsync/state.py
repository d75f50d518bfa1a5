"""What is remembered of each user between runs, one JSON file each.

Losing such a file costs a full run, no more; so only what cannot be found again is forced onto
the disk: which scripts were deleted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pairsync.markers import file_name, user_name


@dataclass
class UserState:
    """Of one user.

    :param sync: what dsync gave as its state after the last successful run; empty: none
    :param full_at: when the last full run succeeded, seconds since 1970
    :param scripts: Sieve script -> time of its last change
    :param active: what the link to the active script says
    :param deleted: Sieve scripts deleted here, which the peer does not know yet -> time of the
        deleted version's last change
    :param told: what the hook told of new and renamed folders, and the peer does not know yet
        (pairsync.told.Told)
    :param doubles: folder (its GUID) -> UID and GUID of mails that pairsync deleted there, because
        the folder had them twice; its log tells of that as of a user's deletion
    :param renumbered: the same of mails that pairsync gave another UID
    """

    sync: str = ""
    full_at: float = 0.0
    scripts: dict[str, float] = field(default_factory=dict)
    active: str = ""
    deleted: dict[str, float] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    doubles: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    renumbered: dict[str, list[tuple[int, str]]] = field(default_factory=dict)


class States:
    """The states of all users, read when first asked for. ``problem``: why one is not written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, UserState] = {}
        self.problem = ""

    def prepare(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def of(self, user: str) -> UserState:
        if user not in self._known:
            self._known[user] = self._read(user)
        return self._known[user]

    def save(self, user: str, *, sync: bool = False) -> None:
        """Write a user's state; with ``sync`` it is on the disk afterwards."""
        text = json.dumps(asdict(self.of(user)), separators=(",", ":"))
        self.problem = _replace(self._folder / file_name(user), text, sync=sync)

    def doubles(self, user: str) -> dict[str, set[tuple[int, str]]]:
        """Mails that were deleted because their folder had them twice."""
        return _sets(self.of(user).doubles)

    def renumbered(self, user: str) -> dict[str, set[tuple[int, str]]]:
        """Mails that were given another UID, as they were before."""
        return _sets(self.of(user).renumbered)

    def note(
        self,
        user: str,
        doubles: Mapping[str, Set[tuple[int, str]]],
        renumbered: Mapping[str, Set[tuple[int, str]]],
    ) -> None:
        """They are on the disk afterwards."""
        state = self.of(user)
        noted = (_lists(doubles), _lists(renumbered))
        if noted != (state.doubles, state.renumbered):
            state.doubles, state.renumbered = noted
            self.save(user, sync=True)

    def forget_syncs(self) -> None:
        """One of the servers has another store: nothing that dsync said of it holds."""
        for user in self.users():
            state = self.of(user)
            if state.sync or state.full_at:
                state.sync, state.full_at = "", 0.0
                self.save(user)

    def users(self) -> Iterator[str]:
        """Users of whom something is remembered."""
        for path in sorted(self._folder.iterdir()):
            user = user_name(path.name)
            if user is not None:
                yield user

    def drop(self, user: str) -> None:
        self._known.pop(user, None)
        (self._folder / file_name(user)).unlink(missing_ok=True)

    def _read(self, user: str) -> UserState:
        try:
            document = json.loads((self._folder / file_name(user)).read_bytes())
            return UserState(**document)
        except (OSError, ValueError, TypeError):
            return UserState()


def _sets(listed: Mapping[str, list[tuple[int, str]]]) -> dict[str, set[tuple[int, str]]]:
    return {folder: {(uid, guid) for uid, guid in mails} for folder, mails in listed.items()}


def _lists(mails: Mapping[str, Set[tuple[int, str]]]) -> dict[str, list[tuple[int, str]]]:
    return {folder: sorted(found) for folder, found in mails.items() if found}


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def write_document(path: Path, document: dict[str, Any]) -> str:
    """Replace ``path``. Returns what went wrong, or an empty text."""
    return _replace(path, json.dumps(document), sync=True)


def _replace(path: Path, text: str, *, sync: bool) -> str:
    made = path.with_name(f".{path.name}.new")
    try:
        with made.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        made.replace(path)
    except OSError as error:
        return f"{path.parent} cannot be written: {error.strerror}"
    return ""
