"""Sieve scripts: Dovecot notifies of no change to them, and dsync brings deleted ones back.

So the folders are watched. A change asks for a run. A deletion is remembered, and told to the
peer before each run until one has succeeded; the peer first deletes its copy, unless that is a
newer version than the deleted one. What happened while nobody watched is found by comparing with
what was there before.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pairsync import inotify
from pairsync.config import SieveConfig
from pairsync.doveadm import Doveadm
from pairsync.inotify import Inotify
from pairsync.state import States

_SUFFIX = ".sieve"
_GONE = inotify.DELETE | inotify.MOVED_FROM
_CAME = inotify.CREATE | inotify.MOVED_TO


def is_newer(here: float, deleted: float) -> bool:
    """Whether a script is newer than the version that was deleted on the other server.

    Both are times of last change; dsync carries whole seconds, so a copy's is cut off.
    """
    return math.floor(here) > deleted if deleted.is_integer() else here > deleted


class ScriptError(Exception):
    """A script cannot be deleted."""


@dataclass(frozen=True)
class _Place:
    """What a watch is on: a user's home, or the folder of scripts in it."""

    user: str
    is_home: bool


class Scripts:
    """Watches every home's scripts; ``notice`` is called with a user whose scripts changed."""

    def __init__(
        self,
        homes: Path,
        config: SieveConfig,
        states: States,
        doveadm: Doveadm,
        notice: Callable[[str], None],
    ) -> None:
        self._homes = homes
        self._config = config
        self._states = states
        self._doveadm = doveadm
        self._notice = notice
        self._inotify = Inotify()
        self._places: dict[int, _Place] = {}
        self._root = -1
        self._deleting: set[tuple[str, str]] = set()
        self.problem = ""

    def fileno(self) -> int:
        return self._inotify.fileno()

    def start(self) -> None:
        """Watch the homes that are there, and find what changed while nobody did."""
        self._root = self._inotify.add(self._homes, _CAME | inotify.ONLY_DIR)
        self.rescan()

    def rescan(self) -> None:
        """Look at every home; new ones are watched."""
        watched = {p.user for p in self._places.values() if p.is_home}
        with os.scandir(self._homes) as entries:
            users = [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]
        for user in users:
            if user not in watched:
                self._watch_home(user)
            self.compare(user)

    def handle_events(self) -> None:
        """Take the events that are there."""
        for event in self._inotify.read():
            if event.mask & inotify.OVERFLOW:
                self.rescan()
            elif event.mask & inotify.IGNORED:
                self._places.pop(event.watch, None)
            elif event.watch == self._root:
                if not event.name.startswith(".") and (self._homes / event.name).is_dir():
                    self._watch_home(event.name)
                    self.compare(event.name)
            elif place := self._places.get(event.watch):
                self._handle(place, event)

    def compare(self, user: str) -> None:
        """Compare a user's scripts with those remembered; note what changed."""
        state = self._states.of(user)
        scripts, active = self._look(user)
        if scripts == state.scripts and active == state.active:
            return
        gone = state.scripts.keys() - scripts.keys()
        for name in gone:
            state.deleted[name] = state.scripts[name]
        state.scripts, state.active = scripts, active
        self._states.save(user, sync=bool(gone))
        self._notice(user)

    async def delete(self, user: str, deleted: Mapping[str, float]) -> None:
        """Delete a user's scripts whose deleted version, or an older one, is here.

        Raises :class:`ScriptError`, and :class:`DovecotError` where Dovecot does not answer.
        """
        for name, version in deleted.items():
            path = self._folder(user) / f"{name}{_SUFFIX}"
            try:
                here = path.stat(follow_symlinks=False).st_mtime
            except OSError:
                continue
            if is_newer(here, version):
                continue
            self._deleting.add((user, name))
            try:
                self._states.of(user).scripts.pop(name, None)
                reply = await self._doveadm.run(user, "sieve delete", "-a", "--", name)
            finally:
                self._deleting.discard((user, name))
            if reply.code and path.exists():
                raise ScriptError(f"script {name} of {user}: {reply.log or reply.code}")
            self._states.save(user)

    def _handle(self, place: _Place, event: inotify.Event) -> None:
        if not place.is_home:
            if event.name.endswith(_SUFFIX):
                name = event.name.removesuffix(_SUFFIX)
                state = self._states.of(place.user)
                if event.mask & _GONE and name in state.scripts:
                    # It may be there again already: another version then.
                    state.deleted[name] = state.scripts.pop(name)
                    self._states.save(place.user, sync=True)
                    self._notice(place.user)
                self.compare(place.user)
        elif event.name == self._config.scripts and event.mask & _CAME:
            self._watch_scripts(place.user)
            self.compare(place.user)
        elif event.name == self._config.active:
            self.compare(place.user)

    def _look(self, user: str) -> tuple[dict[str, float], str]:
        found: dict[str, float] = {}
        with contextlib.suppress(OSError), os.scandir(self._folder(user)) as entries:
            for entry in entries:
                name = entry.name.removesuffix(_SUFFIX)
                if name == entry.name or (user, name) in self._deleting:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found[name] = entry.stat(follow_symlinks=False).st_mtime
        try:
            active = str((self._homes / user / self._config.active).readlink())
        except OSError:
            active = ""
        return found, active

    def _folder(self, user: str) -> Path:
        return self._homes / user / self._config.scripts

    def _watch_home(self, user: str) -> None:
        self._add(self._homes / user, _CAME | _GONE, _Place(user, is_home=True))
        self._watch_scripts(user)

    def _watch_scripts(self, user: str) -> None:
        mask = _CAME | _GONE | inotify.CLOSE_WRITE
        self._add(self._folder(user), mask, _Place(user, is_home=False))

    def _add(self, path: Path, mask: int, place: _Place) -> None:
        try:
            self._places[self._inotify.add(path, mask | inotify.ONLY_DIR)] = place
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self.problem = (
                    "too few inotify watches, scripts are only looked at once a minute; "
                    "raise the sysctl fs.inotify.max_user_watches to three per user"
                )
            elif error.errno not in (errno.ENOENT, errno.ENOTDIR):
                self.problem = f"{path} cannot be watched: {error.strerror}"
