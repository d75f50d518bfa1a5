"""Who changed: one empty file per user, written by Dovecot's hook (notify.lua).

``dirty/USER``: changed, and no run has begun since. ``running/USER``: changed before the run that
is on now began. ``guest/USER``: a run of the peer's is on. ``unsettled/USER``: no change is left,
but a full run is due (pairsync.settle). A run's begin renames the first to the
second, so a change during the run makes a marker of its own; success removes the second; anything
else, a crash too, renames it back. Hence a marker is gone only after a successful run that began
after the change.

``dirty/~USER``: subscriptions changed just now. dsync knows the second of such a change, no more,
and of two in the same second it takes that which subscribes. So one that was carried within its
second could not be taken back within it, on either server: the daemon takes this file away, and
lets no run for the user begin before the second is over.

There are two places: the state on disk, and /run for when that disk is full.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@_+=.-")
_PROBE = ".probe"
_SUBSCRIBED = "~"
_BEGUN = ("running", "guest", "unsettled")


def file_name(user: str) -> str:
    """The marker's name of a user: other bytes than letters, digits and ``@_+=.-`` as ``%XX``."""
    text = "".join(chr(b) if b in _PLAIN else f"%{b:02X}" for b in user.encode())
    return f"%2E{text[1:]}" if text.startswith(".") else text


def user_name(name: str) -> str | None:
    """The user of a marker's name; None where it is no marker's name."""
    raw = bytearray()
    at = 0
    while at < len(name):
        if name[at] == "%":
            try:
                raw.append(int(name[at + 1 : at + 3], 16))
            except ValueError:
                return None
            at += 3
        else:
            raw += name[at].encode("utf-8", "surrogateescape")
            at += 1
    try:
        user = raw.decode()
    except UnicodeDecodeError:
        return None
    return user if user and file_name(user) == name else None


class Markers:
    """The markers in several places. ``mark`` and ``begin`` raise OSError on a bad disk."""

    def __init__(self, places: Iterable[Path]) -> None:
        self._places = tuple(places)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where markers appear."""
        return tuple(place / "dirty" for place in self._places)

    def prepare(self) -> None:
        """Make the folders; take what a dead daemon's runs left as not done."""
        for place in self._places:
            for name in ("dirty", *_BEGUN):
                (place / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in _BEGUN:
                for left in (place / name).iterdir():
                    left.rename(place / "dirty" / left.name)
            for old in (place / "dirty").glob(f"{_SUBSCRIBED}*"):
                old.unlink()

    def dirty(self) -> dict[str, float]:
        """Users with a marker whose run has not begun -> time of the first change."""
        found: dict[str, float] = {}
        for folder in self.folders:
            with os.scandir(folder) as entries:
                for entry in entries:
                    user = user_name(entry.name)
                    if user is None:
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        changed = entry.stat(follow_symlinks=False).st_mtime
                        found[user] = min(changed, found.get(user, changed))
        return found

    def take_subscribed(self, name: str) -> str | None:
        """The user whose subscriptions changed; None where ``name`` is no such file's."""
        user = user_name(name[1:]) if name.startswith(_SUBSCRIBED) else None
        if user is not None:
            for folder in self.folders:
                (folder / name).unlink(missing_ok=True)
        return user

    def mark(self, user: str) -> None:
        (self._places[0] / "dirty" / file_name(user)).touch()

    def begin(self, user: str) -> float | None:
        """A run begins. Returns the time of the first change, None where there was none.

        Also a run without a change has a marker while it is on: should it break off.
        """
        first: float | None = None
        for dirty, running in self._pairs(user):
            try:
                dirty.rename(running)
            except FileNotFoundError:
                continue
            changed = running.stat().st_mtime
            first = changed if first is None else min(first, changed)
        if first is None:
            self._pairs(user)[0][1].touch()
        return first

    def done(self, user: str) -> None:
        for _, running in self._pairs(user):
            running.unlink(missing_ok=True)

    def undone(self, user: str) -> None:
        for dirty, running in self._pairs(user):
            with contextlib.suppress(FileNotFoundError):
                running.rename(dirty)

    def receive(self, user: str) -> None:
        """A run of the peer's begins."""
        self._guest(user).touch()

    def left(self, user: str) -> None:
        """It ended well."""
        self._guest(user).unlink(missing_ok=True)

    def broke_off(self, user: str) -> None:
        """It did not: the user needs another."""
        self._guest(user).rename(self._pairs(user)[0][0])

    def unsettle(self, user: str) -> None:
        """A full run is due."""
        self._unsettled(user).touch()

    def settle(self, user: str) -> None:
        """No more."""
        self._unsettled(user).unlink(missing_ok=True)

    def drop(self, user: str) -> None:
        """Forget a user who is gone."""
        self.settle(user)
        for dirty, running in self._pairs(user):
            dirty.unlink(missing_ok=True)
            running.unlink(missing_ok=True)

    def flush(self) -> None:
        """Bring the markers of the first place onto the disk."""
        handle = os.open(self._places[0] / "dirty", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def probe(self) -> None:
        """Raise OSError where a marker could not be written to the first place."""
        path = self._places[0] / "dirty" / _PROBE
        try:
            with path.open("wb") as stream:
                stream.write(b"\0" * 4096)
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            path.unlink(missing_ok=True)

    def _guest(self, user: str) -> Path:
        return self._places[0] / "guest" / file_name(user)

    def _unsettled(self, user: str) -> Path:
        return self._places[0] / "unsettled" / file_name(user)

    def _pairs(self, user: str) -> list[tuple[Path, Path]]:
        name = file_name(user)
        return [(place / "dirty" / name, place / "running" / name) for place in self._places]
