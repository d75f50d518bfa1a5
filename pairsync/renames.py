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
from collections.abc import Awaitable, Callable, Iterable, Mapping
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
_SECONDS = 20.0
_SEEN = 500
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
    """

    renamed: dict[str, Named] = field(default_factory=dict)
    left: dict[str, Named] = field(default_factory=dict)
    made: dict[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.renamed or self.left or self.made)

    def document(self) -> dict[str, Any]:
        """For the peer."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any] | None) -> Told:
        """What the peer sent; nothing from one that knows of no renames."""
        if not document:
            return cls()
        return cls(
            _named(document["renamed"]),
            _named(document["left"]),
            {str(name): float(at) for name, at in document["made"].items()},
        )


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
            files = self._files.pop(user, set())
            try:
                changes, before = read(files), Told.of(state.told)
                for look in range(_LOOKS):
                    await asyncio.sleep(_PAUSE if look else 0)
                    names = await self._names(user)
                    known, missing = add(before, changes, names, self._seen.get(user, {}))
                    if not missing:
                        break
            except BaseException:
                self._files.setdefault(user, set()).update(files)
                raise
            self._remember(user, state, known)
            for name in {change.old for change in changes} - set(names.values()):
                self._seen[user].pop(name, None)
            for path in files:
                path.unlink(missing_ok=True)
            return known

    async def carry_out(self, user: str, mine: Told, theirs: Told, *, moves: bool) -> None:
        """Give the folders that are here the names that they were given last.

        What is in the way is left to dsync. ``moves``: whether this server moves mails that are
        under an earlier name alone; the other one gets to know it by the run. Raises
        :class:`DovecotError`.
        """
        if not mine and not theirs:
            return
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
        for name, (guid, at) in relics(names, mine, theirs).items():
            if self._just_made(user, name, at):
                continue
            if guid:
                await self._empty(user, name, guid, names.get(guid), moves=moves)
            else:
                here = mine.left.get(name) == (guid, at)
                if older := await self._older(user, name, at, here=here):
                    await self._run(user, "expunge", "mailbox", name, "uid", uid_set(older))
            # Only if it is empty.
            reply = await self._run(user, "mailbox delete", "-e", "--", name)
            if not reply.code:
                notify.log(
                    notify.INFO, f"{user}: {name} is taken away: a user renamed or deleted it"
                )
        await self.backdate(user, mine, theirs)

    async def backdate(self, user: str, mine: Told, theirs: Told) -> None:
        """Let a later rename by a user win over those that are carried, now or by a run before.

        Raises :class:`DovecotError`.
        """
        given = {name: at for name, at in theirs.renamed.values() if mine.made.get(name, 0.0) < at}
        await self._in_log(user, changelog.backdate, given)

    async def attest(self, user: str) -> None:
        """See that dsync, which is about to begin, finds what was renamed here until now.

        Raises :class:`DovecotError`.
        """
        told = await self.learn(user)
        await self._in_log(user, changelog.attest, dict(told.renamed.values()))

    async def _in_log(
        self,
        user: str,
        change: Callable[[Path, Mapping[str, float]], int],
        given: Mapping[str, float],
    ) -> None:
        if not given:
            return
        rows = await self._rows(user, 1, "mailbox path", "-t", "index", "--", _INBOX)
        for folder in Path(rows[0][0]).parents:
            if (folder / changelog.NAME).exists():
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(change, folder, given)
                return

    def done(self, user: str, told: Told) -> None:
        """The peer knows ``told``."""
        if told:
            state = self._states.of(user)
            known = Told.of(state.told)
            for part in ("renamed", "left", "made"):
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
        known = Told.of(self._states.of(user).told).made.get(name, 0.0)
        news = (c.at for c in read(self._files.get(user, ())) if c.new == name)
        return max((known, *news)) >= since

    async def _older(self, user: str, name: str, at: float, *, here: bool) -> list[int]:
        """UIDs of mails that were in a folder when a user deleted it.

        ``here``: whether on this server. dsync carries with a mail when it was saved, in whole
        seconds. What came from the other server within that of the deletion had been deleted there
        with the folder; what else was saved then may have come after it.
        """
        fields = "uid guid date.saved.unixtime"
        rows = [
            (int(uid), guid, int(saved))
            for uid, guid, saved in await self._rows(user, 3, "fetch", fields, "mailbox", name)
        ]
        older = [uid for uid, _, saved in rows if saved < int(at)]
        close = {uid for uid, _, saved in rows if saved == int(at)}
        if not close or here:
            return older
        ((index,), *_) = await self._rows(user, 1, "mailbox path", "-t", "index", "--", name)
        logs = await asyncio.to_thread(history.logs, Path(index))
        lives = history.read(logs, [(uid, guid) for uid, guid, _ in rows])
        return older + [life.uid for life in lives if life.by_dsync and life.uid in close]

    async def _empty(
        self, user: str, name: str, guid: str, target: str | None, *, moves: bool
    ) -> None:
        """Clear a folder that dsync made of an earlier name; what is in it is in ``guid``.

        ``target``: the name of that one; None where it is gone.
        """
        if target is None:
            return
        folder = ("mailbox", name)
        rows = await self._rows(user, 2, "fetch", "uid guid", *folder)
        there = await self._rows(user, 1, "fetch", "guid", "mailbox-guid", guid)
        known = {mail for (mail,) in there}
        copies = [int(uid) for uid, mail in rows if mail in known]
        others = [int(uid) for uid, mail in rows if mail not in known]
        if copies:
            await self._run(user, "expunge", *folder, "uid", uid_set(copies))
        if others and moves:
            await self._run(user, "move", "--", target, *folder, "uid", uid_set(others))

    async def _names(self, user: str) -> dict[str, str]:
        """Folder (its GUID) -> its name; none of a user who is gone, as the run will tell."""
        try:
            names = await _limited(user, self._doveadm.folders(user))
        except NoUser:
            names = {}
        seen = self._seen.setdefault(user, {})
        if len(seen) > len(names) + _SEEN:
            seen.clear()
        seen.update((name, guid) for guid, name in names.items())
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
    changes: Iterable[Change],
    names: Mapping[str, str],
    seen: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Told, bool]:
    """``known`` with ``changes``, and whether folders of which they tell are not there.

    ``names``: GUID -> name now; ``seen``: name lately -> GUID, of folders that may be gone.
    """
    guids = {name: guid for guid, name in names.items()}
    origins = dict(seen)
    renamed, left, made = dict(known.renamed), dict(known.left), dict(known.made)
    chains: dict[str, list[Change]] = {}
    for change in changes:
        before = chains.pop(change.old, [])
        origin = origins.pop(change.old, None)
        if change.new and (origin or not change.old):
            origins[change.new] = origin or ""
        if change.old:
            made.pop(change.old, None)
        if not change.new:
            gone = {c.old for c in (*before, change)}
            for which in [guid for guid, (name, _) in renamed.items() if name in gone]:
                del renamed[which]
                gone |= {name for name, (guid, _) in left.items() if guid == which}
            left |= dict.fromkeys(gone, ("", change.at))
            continue
        left.pop(change.new, None)
        made[change.new] = change.at
        if change.old:
            chains[change.new] = [*before, change]
    missing = False
    for name, chain in chains.items():
        first, last = chain[0], chain[-1]
        guid = guids.get(name)
        if guid is None and made.get(first.old, 0.0) < last.at:
            # dsync has taken the name back already.
            guid = guids.get(first.old)
        if guid is None:
            missing = True
            # It is gone: what the peer has of it has an earlier name.
            guid = origins.get(name)
        if guid:
            renamed[guid] = (name, last.at)
            left |= {c.old: (guid, c.at) for c in chain if made.get(c.old, 0.0) < c.at}
    return Told(renamed, left, made), missing


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


def relics(names: Mapping[str, str], one: Told, other: Told) -> dict[str, Named]:
    """Folders here that have a name which nobody gave them.

    Name -> which folder had it before, which may be gone, and when it was renamed; or an empty
    text, and when it was deleted.
    """
    found = {}
    for name in {*one.left, *other.left}:
        guid, at = max((t.left[name] for t in (one, other) if name in t.left), key=lambda n: n[1])
        made = max(told.made.get(name, 0.0) for told in (one, other))
        is_there = any(n == name and g != guid for g, n in names.items())
        if is_there and made < at:
            found[name] = (guid, at)
    return found
