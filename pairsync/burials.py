"""Mails that a user took away while dsync gave them another UID: dsync has copied them then.

The copy is deleted as soon as dsync has ended. Where a run breaks off, or the daemon does not see
its end, the next run would do it; but that may have to wait for the peer, and meanwhile the user
has such a mail twice.

And where it was the other server on which dsync gave another UID to a mail that the user just took
away here, dsync finds a new mail there afterwards. So the next run compares (pairsync.repair).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path

from pairsync import history
from pairsync.doveadm import Doveadm, mails_of, uid_set
from pairsync.history import Life, Mail
from pairsync.repair import Mailbox, Plan, mend
from pairsync.state import States

_CLOCK_SECONDS = 1.0
"""By so much a file's time may be behind."""
_USERS = 1000


class Burials:
    """Users with whom dsync is at work here, or was when its run broke off; iterates over them."""

    def __init__(self, doveadm: Doveadm, states: States) -> None:
        self._doveadm = doveadm
        self._states = states
        self._since: dict[str, float] = {}
        self._logs: dict[str, dict[Path, tuple[int, int]]] = {}
        """User -> the logs of his folders -> inode and size when dsync last began."""
        self.disputed: set[str] = set()
        """Users whose next run has to compare."""

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._since))

    def __contains__(self, user: str) -> bool:
        return user in self._since

    def open(self, user: str, since: float) -> None:
        """dsync begins, or began then (seconds since 1970)."""
        if user not in self._since:
            for log in self._logs.get(user, ()):
                with contextlib.suppress(OSError):
                    now = log.stat()
                    self._logs[user][log] = (now.st_ino, now.st_size)
        self._since[user] = min(since, self._since.get(user, since))

    async def end(self, user: str, began: float, *, changed: bool) -> None:
        """One that began then has ended; ``changed``: the user changed something since.

        Raises :class:`DovecotError`.
        """
        if changed:
            self._since.setdefault(user, began)
            await self.bury(user)
        else:
            self._since.pop(user, None)

    async def bury(self, user: str) -> None:
        """Delete the copies, if there may be some. Raises :class:`DovecotError`."""
        since = self._since.pop(user, None)
        if since is None:
            return
        try:
            await self._bury(user, since)
        except BaseException:
            self.open(user, since)
            raise

    async def _bury(self, user: str, since: float) -> None:
        names = await self._doveadm.folders(user)
        paths = {
            folder: await self._doveadm.index(user, name, folder) for folder, name in names.items()
        }
        if await asyncio.to_thread(self._is_disputed, user, paths.values(), since):
            self.disputed.add(user)
        found = await asyncio.to_thread(_copies, paths, since, self._states.doubles(user))
        for folder, copies in found.items():
            which = uid_set(uid for uid, _ in copies)
            query = mails_of(names[folder], folder, which)
            rows = await self._doveadm.fetch(user, "uid guid", *query)
            left = [Life(int(uid), guid, is_there=True) for uid, guid in rows]
            box = Mailbox({folder: left}, names)
            await mend(self._doveadm, self._states, user, box, Plan({folder: copies}, {}))

    def _is_disputed(self, user: str, paths: Iterable[Path], since: float) -> bool:
        found = False
        known = self._logs.get(user, {})
        logs = [path / history.LOGS[-1] for path in paths]
        for log in logs:
            with contextlib.suppress(OSError):
                if _is_written(log, since):
                    inode, start = known.get(log, (0, 0))
                    is_same = log.stat().st_ino == inode
                    found |= history.disputed(log.read_bytes(), start if is_same else 0)
        if len(self._logs) >= _USERS:
            self._logs.clear()
        self._logs[user] = dict.fromkeys(logs, (0, 0))
        return found


def _is_written(log: Path, since: float) -> bool:
    """Whether it was since then. Raises OSError where it is not there."""
    return log.stat().st_mtime >= since - _CLOCK_SECONDS


def _copies(
    paths: Mapping[str, Path], since: float, doubles: Mapping[str, Set[Mail]]
) -> dict[str, list[Mail]]:
    """Unwanted copies that dsync made in folders whose logs were written since then."""
    found = {}
    for folder, path in paths.items():
        with contextlib.suppress(OSError):
            if _is_written(path / history.LOGS[-1], since):
                lives = history.read(history.logs_of(path), (), copied=True)
                lives = history.spared(lives, doubles.get(folder, set()))
                copied = {(life.uid, life.guid) for life in lives if life.before}
                if unwanted := history.unwanted([lives]) & copied:
                    found[folder] = sorted(unwanted)
    return found
