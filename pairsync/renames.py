"""Folders that users renamed or deleted: told to the peer before each run.

dsync knows the second of a rename, and takes its own for a user's. So of two names it may take the
older one: where a folder is renamed within the second in which an earlier name was carried, or
while a run is on. And where one is renamed or deleted under its hands, or on one server before it
is made on the other, it may make the old name again. Dovecot's hook (notify.lua) therefore leaves a
file for each rename, each deletion and each new folder, with the names, whose time is that of the
change. The daemon finds out which folder it was, by its GUID, and remembers it until a run that
began afterwards has ended well. Before each run both servers give such folders the name that was
given last, and take away what only dsync made of the names before.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pairsync import changelog, history, notify
from pairsync.doveadm import Doveadm, DovecotError, NoUser, Reply, uid_set
from pairsync.markers import user_name
from pairsync.state import States, UserState

T = TypeVar("T")

_SIGN = "!"
_INBOX = "INBOX"
_SEPARATOR = "/"
_SECONDS = 20.0
_SEEN = 500
_CLOSE = 2.0
"""By so many seconds Dovecot's time of a deletion may differ from the hook's."""
_LOOKS, _PAUSE = 4, 0.05
"""A folder that is just being renamed is in no list."""

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


class Renames:
    """Those of all users, in ``folders`` as the hook left them and in ``states``."""

    def __init__(self, folders: Iterable[Path], states: States, doveadm: Doveadm) -> None:
        self._folders = tuple(folders)
        self._states = states
        self._doveadm = doveadm
        self._files: dict[str, set[Path]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._logs: dict[str, Path] = {}
        self._ended: dict[str, float] = {}
        """User -> when a dsync last ended here (seconds since 1970)."""
        self._seen: dict[str, dict[str, str]] = {}
        """User -> name of a folder that was there lately -> its GUID."""

    def scan(self) -> None:
        """Find what the hook left while nobody watched."""
        for folder in self._folders:
            for path in folder.glob(f"{_SIGN}*"):
                self.note(path.name)

    def note(self, name: str) -> str | None:
        """Take a file's name; the user of whom it tells, None where it is no such file."""
        if not name.startswith(_SIGN):
            return None
        user = user_name(name.split(_SIGN)[1])
        if user is not None:
            self._files.setdefault(user, set()).update(f / name for f in self._folders)
        return user

    async def learn(self, user: str) -> Told:
        """What the peer does not know yet. Raises :class:`DovecotError`."""
        async with self._locks.setdefault(user, asyncio.Lock()):
            state = self._states.of(user)
            if user not in self._files and not state.told:
                return NOTHING
            files = set(self._files.get(user, ()))
            changes = read(files)
            known = await self._know(user, changes) if changes else Told.of(state.told)
            if self._states.problem:
                return known
            for path in files:
                path.unlink(missing_ok=True)
            if later := self._files.get(user, set()) - files:
                self._files[user] = later
            else:
                self._files.pop(user, None)
            return known

    async def _know(self, user: str, changes: Sequence[Change]) -> Told:
        """What was known, with ``changes``. Raises :class:`DovecotError`."""
        state = self._states.of(user)
        seen = dict(self._seen.get(user, {}))
        concerned = sorted({name for c in changes for name in (c.old, c.new) if name})
        deleted = await self._deleted(user, changes)
        for look in range(_LOOKS):
            await asyncio.sleep(_PAUSE if look else 0)
            # dsync may be at work: whoever looks into a folder that it is just making keeps it
            # from giving that the GUID that the folder has on the other server.
            names = await self._names(user, *([] if look else concerned))
            # What was told meanwhile is not in the state any more.
            known, missing = add(Told.of(state.told), changes, names, seen)
            if not missing:
                break
        origins, gone = follow(changes, seen)
        known.gone.update({guid: at for guid, at in gone.items() if guid not in names})
        known.gone.update(deleted)
        self._remember(user, state, known)
        for name in set(concerned) - set(names.values()):
            # What has been renamed or deleted since is known by this when that is learned.
            self._seen[user].pop(name, None)
            if origins.get(name):
                self._seen[user][name] = origins[name]
        return known

    async def carry_out(
        self,
        user: str,
        mine: Told,
        theirs: Told,
        *,
        moves: bool,
        spared: Collection[str] = (),
    ) -> list[str]:
        """Give the folders that are here the names that they were given last.

        What is in the way is left to dsync. ``moves``: whether this server moves mails that are
        under an earlier name alone; the other one gets to know it by the run. ``spared``: names of
        folders that stay, since dsync would delete them on the other server, which told that
        there are mails in them. Returns names of folders that stay for that reason here. Raises
        :class:`DovecotError`.
        """
        if not mine and not theirs:
            return []
        wanted = latest(mine, theirs)
        names = await self._names(user)
        for _ in range(2 * len(wanted)):
            step = next_rename(names, wanted)
            if step is None:
                break
            reply = await self._run(user, "mailbox rename", "--", *step)
            if reply.code:
                notify.log(
                    notify.WARNING, f"{user}: {' is not renamed to '.join(step)}: {reply.log}"
                )
                break
            names = await self._names(user)
        there = {name: guid for guid, name in names.items()}
        stay = []
        unwanted = []
        for name, (guid, at) in relics(names, mine, theirs).items():
            if not self._just_made(user, name, at):
                if guid in names:
                    await self._empty(user, there[name], guid, names[guid], moves=moves)
                unwanted.append(name)
        # What was deleted on the other server is deleted by dsync.
        for guid, at in mine.gone.items():
            if guid in names and self._came_back(user, guid, names[guid], at, mine, theirs):
                await self._expunge_older(user, guid, names[guid], at)
                unwanted.append(names[guid])
        for name in unwanted:
            if name in spared:
                continue
            # Only if it is empty.
            reply = await self._run(user, "mailbox delete", "-e", "--", name)
            if reply.code:
                stay.append(name)
            else:
                notify.log(
                    notify.INFO, f"{user}: {name} is taken away: a user renamed or deleted it"
                )
        await self._backdate(user, mine, theirs)
        return stay

    async def ended(self, user: str, mine: Told, theirs: Told) -> None:
        """A dsync has ended here, well or not. Raises :class:`DovecotError`."""
        self._ended[user] = time.time()
        await self._backdate(user, mine, theirs)

    async def _backdate(self, user: str, mine: Told, theirs: Told) -> None:
        """Let a later rename by a user win over those that are carried, now or by a run before.

        Raises :class:`DovecotError`.
        """
        given = {name: at for name, at in theirs.renamed.values() if mine.made.get(name, 0.0) < at}
        if given and (folder := await self._logs_of(user)):
            with contextlib.suppress(OSError):
                await asyncio.to_thread(changelog.backdate, folder, given)

    async def attest(self, user: str) -> None:
        """See that dsync, which is about to begin, finds what was renamed here until now.

        Raises :class:`DovecotError`.
        """
        known = await self.learn(user)
        given = dict(known.renamed.values())
        # Looked for once more: one that was just being renamed is not gone.
        names = await self._names(user) if known.gone else {}
        gone = {guid: at for guid, at in known.gone.items() if guid not in names}
        if (given or gone) and (folder := await self._logs_of(user)):
            with contextlib.suppress(OSError):
                await asyncio.to_thread(changelog.attest, folder, given, gone)

    async def _logs_of(self, user: str) -> Path | None:
        """The folder with Dovecot's log of the user's folders; None where there is none yet."""
        if user not in self._logs:
            try:
                index = await _limited(user, self._doveadm.index(user, _INBOX))
            except NoUser:
                return None
            for folder in index.parents:
                if any((folder / log).exists() for log in changelog.LOGS):
                    self._logs[user] = folder
                    break
        return self._logs.get(user)

    def done(self, user: str, told: Told) -> None:
        """The peer knows ``told``."""
        if told:
            state = self._states.of(user)
            known = Told.of(state.told)
            for part in ("renamed", "left", "made", "gone"):
                now, then = getattr(known, part), getattr(told, part)
                for key in [key for key in now if then.get(key) == now[key]]:
                    del now[key]
            self._remember(user, state, known)

    def _remember(self, user: str, state: UserState, known: Told) -> None:
        document = known.document() if known else {}
        if document != state.told:
            state.told = document
            self._states.save(user, sync=bool(document))

    def _just_made(self, user: str, name: str, since: float) -> bool:
        """Whether a user gave a name while a run was being prepared."""
        known = Told.of(self._states.of(user).told).made
        news = {c.new: c.at for c in read(self._files.get(user, ()))}
        return max(given_at(known, name), given_at(news, name)) >= since

    async def _deleted(self, user: str, changes: Iterable[Change]) -> dict[str, float]:
        """Folders (their GUIDs) that went with the deletions among ``changes`` -> when.

        As Dovecot's log tells, which soon has no more room for them, and not always tells of them
        at all. Raises :class:`DovecotError`.
        """
        times = [change.at for change in changes if not change.new]
        folder = await self._logs_of(user) if times else None
        if folder is None:
            return {}
        with contextlib.suppress(OSError):
            told = await asyncio.to_thread(changelog.deletions, folder)
            first, last = min(times) - _CLOSE, max(times) + _CLOSE
            return {guid: float(at) for guid, at in told.items() if first <= at <= last}
        return {}

    def _came_back(
        self, user: str, guid: str, name: str, at: float, mine: Told, theirs: Told
    ) -> bool:
        """Whether dsync may have brought a folder back after its deletion.

        ``name``: the one that it has now. Whoever renamed it since wants it.
        """
        if mine.left.get(name, (guid, at))[0]:
            return False
        renamed = [told.renamed[guid][1] for told in (mine, theirs) if guid in told.renamed]
        return at <= self._ended.get(user, 0.0) and max(renamed, default=at) <= at + 1

    async def _expunge_older(self, user: str, guid: str, name: str, at: float) -> None:
        """Delete mails of a folder that were in it when it was deleted, and dsync brought back.

        Dovecot knows in whole seconds when a mail was saved, and dsync carries that with it; of
        those of the very second the folder's log tells which ones dsync has put there.
        """
        folder = ("mailbox-guid", guid)
        fields = "uid guid date.saved.unixtime"
        rows = await self._rows(user, 3, "fetch", fields, *folder)
        index = await _limited(user, self._doveadm.index(user, name, guid))
        present = [(int(uid), mail) for uid, mail, _ in rows]
        lives = await asyncio.to_thread(lambda: history.read(history.logs_of(index), present))
        carried = {life.uid for life in lives if life.by_dsync and not life.before}
        saved = {int(uid): int(when) for uid, _, when in rows}
        second = int(at)
        older = [
            uid
            for uid, when in saved.items()
            if when < second or (when == second and uid in carried)
        ]
        if older:
            await self._run(user, "expunge", *folder, "uid", uid_set(older))

    async def _empty(self, user: str, relic: str, guid: str, target: str, *, moves: bool) -> None:
        """Clear a folder that dsync made of an earlier name of another one.

        ``relic`` and ``guid`` are the GUIDs of the two, ``target`` is the name of the other one.
        """
        folder = ("mailbox-guid", relic)
        rows = await self._rows(user, 2, "fetch", "uid guid", *folder)
        there = await self._rows(user, 1, "fetch", "guid", "mailbox-guid", guid)
        known = {mail for (mail,) in there}
        copies = [int(uid) for uid, mail in rows if mail in known]
        others = [int(uid) for uid, mail in rows if mail not in known]
        if copies:
            await self._run(user, "expunge", *folder, "uid", uid_set(copies))
        if others and moves:
            await self._run(user, "move", "--", target, *folder, "uid", uid_set(others))

    async def _names(self, user: str, *only: str) -> dict[str, str]:
        """Folder (its GUID) -> its name; none of a user who is gone, as the run will tell.

        ``only``: names that matter; there may be others among the answer.
        """
        try:
            names = await _limited(user, self._doveadm.folders(user, *only))
        except NoUser:
            names = {}
        seen = {name: g for name, g in self._seen.get(user, {}).items() if g not in names}
        if len(seen) > _SEEN:
            seen.clear()
        self._seen[user] = seen | {name: guid for guid, name in names.items()}
        return names

    async def _rows(self, user: str, width: int, *words: str) -> list[tuple[str, ...]]:
        return await _limited(user, self._doveadm.rows(user, width, *words))

    async def _run(self, user: str, *words: str) -> Reply:
        return await _limited(user, self._doveadm.run(user, *words))


async def _limited(user: str, work: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(_SECONDS):
            return await work
    except TimeoutError:
        raise DovecotError(f"doveadm for {user}: no answer") from None


def read(files: Iterable[Path]) -> list[Change]:
    """What the hook's files tell, the earliest first."""
    found: list[Change] = []
    for path in files:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            at = path.stat().st_mtime
            lines = path.read_text(encoding="utf-8").split("\n")
            found += [Change(*pair, at) for pair in zip(lines[::2], lines[1::2], strict=False)]
    # A rename of the inbox makes a new folder of its mails.
    return sorted((c for c in found if c.old.upper() != _INBOX), key=lambda change: change.at)


def add(
    known: Told,
    changes: Sequence[Change],
    names: Mapping[str, str],
    seen: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Told, bool]:
    """``known`` with ``changes``, and whether folders of which they tell are not there.

    ``names``: GUID -> name now; ``seen``: name lately -> GUID, of folders that may be gone.
    """
    guids = {name: guid for guid, name in names.items()}
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
            found = origins[name] if origins[name] not in names else None
        if found:
            renamed[found] = (name, last.at)
            left |= {c.old: (found, c.at) for c in chain if made.get(c.old, 0.0) < c.at}
    return Told(renamed, left, made, dict(known.gone)), missing


def follow(
    changes: Iterable[Change], seen: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, float]]:
    """Which folder has a name after ``changes``, and which were deleted.

    ``seen``: name -> GUID of folders that were there before. Returns name -> GUID, empty where that
    is not known; and GUID -> when it was deleted.
    """
    origins, gone = dict(seen), {}
    for change in changes:
        origin = origins.pop(change.old, "")
        if change.new:
            origins[change.new] = origin
        elif origin:
            gone[origin] = change.at
    return origins, gone


def latest(one: Told, other: Told) -> dict[str, str]:
    """Folder (its GUID) -> the name that it was given last."""
    found = {}
    for guid in {*one.renamed, *other.renamed}:
        known = [side.renamed[guid] for side in (one, other) if guid in side.renamed]
        found[guid] = max(known, key=lambda named: (named[1], named[0]))[0]
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
    parts = name.split(_SEPARATOR)
    return max(made.get(_SEPARATOR.join(parts[:n]), 0.0) for n in range(1, len(parts) + 1))


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
