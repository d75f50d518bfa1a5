"""Folders that users renamed or deleted: told to the peer before each run.

dsync knows the second of a rename, and takes its own for a user's. So of two names it may take the
older one: where a folder is renamed within the second in which an earlier name was carried, or
while a run is on. And where one is renamed or deleted under its hands, or on one server before it
is made on the other, it may make the old name again. Dovecot's hook therefore notes these changes
(pairsync.told). The daemon finds out which folder it was, and remembers it until a run that began
afterwards has ended well. Before each run both servers give such folders the name that was given
last, and take away what only dsync made of the names before.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pairsync import changelog, history, notify, repair
from pairsync.doveadm import Doveadm, DovecotError, NoUser, Reply, mails_of, uid_set
from pairsync.markers import user_name
from pairsync.state import States
from pairsync.told import (
    INBOX,
    NOTHING,
    SEPARATOR,
    Change,
    Named,
    Standing,
    Told,
    add,
    follow,
    given_at,
    latest,
    next_rename,
    read,
    relics,
)

T = TypeVar("T")

_SIGN = "!"
_SECONDS = 20.0
_SEEN, _ASKED, _LISTS = 500, 1000, 3
_CLOSE = 5.0
"""By so many seconds Dovecot's time of a deletion may differ from the hook's."""
_SLACK = 1.0
_TRIES = 8
"""So many runs in a row are begun for folders that stay, and then no more: something else is wrong
with them."""
_LOOKS, _PAUSE = 4, 0.05
"""A folder that is just being renamed is in no list."""
_APART = 10_000
"""By so many UIDs a mail that is moved here is above those that the other server may have given in
its folder since both had the same. There the same mail may just have been taken away under one of
them, and dsync would take that for a deletion of this one.
"""


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
        self._begun: set[str] = set()
        """Users with whom one is at work, or was when nobody saw its end."""
        self._unwanted: dict[str, dict[str, tuple[str, int]]] = {}
        """User -> folder (its GUID) that dsync made of an earlier name of another one -> that one,
        and the lowest UID of mails that came since, until dsync ends: the other server may have
        taken it away.
        """
        self._kept: dict[str, dict[str, tuple[int, list[str]]]] = {}
        """User -> folder (its GUID) -> UID below which nothing is unseen, and what was carried."""
        self._seen: dict[str, dict[str, Named]] = {}
        """User -> name of a folder that was there lately -> its GUID, and since when this is known.
        """
        self._tries: dict[str, int] = {}
        """User -> how many runs that ended well were begun for a folder that stays."""

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
            if user not in self._files and not self._states.of(user).told:
                return NOTHING
            files = set(self._files.get(user, ()))
            changes = read(files)
            known = await self._know(user, changes) if changes else self.known(user)
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
        seen = dict(self._seen.get(user, {}))
        concerned = {name for c in changes for name in (c.old, c.new) if name}
        # Dovecot takes no line of more than a megabyte.
        only = sorted(concerned) if len(concerned) < _ASKED else ()
        deleted = await self._deleted(user, changes)
        for look in range(_LOOKS):
            await asyncio.sleep(_PAUSE if look else 0)
            # dsync may be at work: whoever looks into a folder that it is just making keeps it
            # from giving that the GUID that the folder has on the other server.
            names, guids = await self._look(user, *(() if look else only))
            _, missing = add(self.known(user), changes, names, seen, guids)
            if not missing:
                break
        origins, gone = follow(changes, seen)
        guessed = {guid: at for guid, at in gone.items() if guid not in {*names, *deleted}}
        if guessed:
            # Whatever is there, under any name, has not been deleted.
            there = await self._names(user)
            guessed = {guid: at for guid, at in guessed.items() if guid not in there}
        back = {
            guid: at
            for guid, at in gone.items()
            if guid not in deleted and await self._is_back(user, guid, names.get(guid, ""), at)
        }
        # What was told meanwhile is not in the state any more.
        known, _ = add(self.known(user), changes, names, seen, guids)
        known.gone.update(guessed | deleted | back)
        self._remember(user, known)
        for name in concerned:
            guid, at = origins.get(name, ("", 0.0))
            if name in names.values():
                listed, _ = self._seen[user].get(name, ("", 0.0))
                if listed and name in origins and guid in ("", listed):
                    # A user gave it that name before it was listed.
                    self._seen[user][name] = (listed, at)
            elif guid:
                # What has been renamed or deleted since is known by this when that is learned.
                self._seen[user][name] = (guid, at)
            else:
                self._seen[user].pop(name, None)
        return known

    async def carry_out(
        self,
        user: str,
        mine: Told,
        theirs: Told,
        there: Standing | None = None,
    ) -> Standing:
        """Give the folders that are here the names that they were given last.

        What is in the way is left to dsync. ``there``: what the other server returned, where it was
        first; then this one also moves mails that are under an earlier name alone, which the other
        one gets to know by the run. Raises :class:`DovecotError`.
        """
        stands = Standing()
        if not mine and not theirs:
            return stands
        await self._part(user, mine, theirs)
        names = await self._give_names(user, mine, theirs)
        here = {name: guid for guid, name in names.items()}
        unwanted: list[tuple[str, str, float]] = []
        made = relics(names, mine, theirs)
        nexts = await _limited(user, self._doveadm.next_uids(user, *made)) if made else {}
        for name, (guid, at) in made.items():
            if self._just_made(user, name, at):
                stands.stay.append(name)
                continue
            relic, first = here[name], 1
            if guid in names:
                target = (names[guid], guid)
                if there is None:
                    # What is there by now is moved by the other server; by both, it would be twice.
                    first = nexts.get(relic, 1)
                put = await self._clear(user, (name, relic), target, there)
                stands.put.update({name: put} if put else {})
            unwanted.append((relic, name, at))
            self._unwanted.setdefault(user, {})[relic] = (guid, first)
        # What was deleted on the other server is deleted by dsync.
        stands.carried.update(await self._keep_unseen(user, names, mine, theirs, there))
        for guid, at in mine.gone.items():
            name = names.get(guid, "")
            deleted_at = self._came_back(user, guid, name, at, mine, theirs)
            if deleted_at is not None and await self._is_still(user, guid, name, deleted_at):
                known = there.carried.get(guid, ()) if there else ()
                await self._expunge_older(user, guid, name, at, known)
                unwanted.append((guid, name, deleted_at))
        for guid, name, at in unwanted:
            if there and name in there.stay:
                continue
            if not await self._is_still(user, guid, name, at):
                if name in made:
                    # A user has just renamed it, so he wants what is in it.
                    stands.stay.append(name)
                continue
            # Only if it is empty.
            reply = await self._run(user, "mailbox delete", "-e", "--", name)
            if reply.code:
                stands.stay.append(name)
            else:
                self._took_away(user, guid)
                stands.taken.append(guid)
                notify.log(
                    notify.INFO, f"{user}: {name} is taken away: a user renamed or deleted it"
                )
        await self._backdate(user, mine, theirs)
        tries = self._tries.get(user, 0)
        stands.is_unsure = there is None and bool(stands.stay) and tries < _TRIES
        return stands

    async def _part(self, user: str, mine: Told, theirs: Told) -> None:
        """Give what dsync made of an earlier name a GUID of its own.

        Where a folder is renamed under its hands, it makes the old name again with that folder's
        GUID, and gives it another one only when it begins anew. Until then neither Dovecot nor a
        log tells which of the two a mail is in.
        """
        known = {guid for told in (mine, theirs) for guid, _ in told.left.values() if guid}
        known |= {*mine.renamed, *theirs.renamed}
        if not known:
            return
        # To open a folder is to be in the way of who deletes it, so only those are that seem to be
        # two of one GUID. A user may have renamed either of them since.
        twins = _twins(await self._listed(user))
        if seeming := [name for guid in twins.keys() & known for name in twins[guid]]:
            mine = await self.learn(user) or mine
            statuses = await _limited(user, self._doveadm.statuses(user, *seeming))
            for guid, names in _twins((name, guid) for name, _, guid in statuses).items():
                kept = await self._renamed_one(user, guid, names, mine, theirs)
                given, _ = latest(mine, theirs).get(guid, ("", 0.0))
                if given in names and given != kept:
                    # A user has renamed what he saw under an earlier name. He means the folder.
                    earlier = await self._give_back(user, given, guid, mine, theirs)
                    names[names.index(given)] = earlier or given
                    kept = kept if earlier else given
                for name in sorted({*names} - {kept}):
                    which = ("-g", secrets.token_hex(16), "--", name)
                    await self._rows(user, 1, "mailbox update", *which)
                    notify.log(notify.INFO, f"{user}: {name} is told from {kept} now")

    async def _give_back(self, user: str, name: str, guid: str, mine: Told, theirs: Told) -> str:
        """Give what dsync made of a folder an earlier name of that again, so that the folder can
        have the one that a user gave; returns it, empty where there is none.
        """
        listed = {there for there, _ in await self._listed(user)}
        if any(there.startswith(f"{name}{SEPARATOR}") for there in listed):
            return ""  # those within it would go with it
        taken = {*listed, *(wanted for wanted, _ in latest(mine, theirs).values())}
        left = [(at, old) for t in (mine, theirs) for old, (g, at) in t.left.items() if g == guid]
        for _, old in sorted(left, reverse=True):
            of_whom, _ = relics({"": old}, mine, theirs).get(old, ("", 0.0))
            if old not in taken and of_whom == guid:
                reply = await self._run(user, "mailbox rename", "--", name, old)
                if not reply.code:
                    return old
        return ""

    async def _renamed_one(
        self, user: str, guid: str, names: Sequence[str], mine: Told, theirs: Told
    ) -> str:
        """Which of the folders (their names) of one GUID is none that dsync made.

        As their logs tell, if they do: what dsync made is younger than the other one, and than the
        rename.
        """
        both = (mine, theirs)
        logs = {name: await self._read_logs(user, guid, name) for name in names}
        made_at = {name: history.made_at(logs[name]) or 0 for name in names}
        old = [name for name in names if made_at[name] == min(made_at.values())]
        if len(old) == len(names):
            old = []
            for name in names:
                left = [told.left[name] for told in both if name in told.left]
                since = [at for origin, at in left if origin == guid]
                # Its log may have begun in the second before, and the hook tells a bit later.
                if not since or not history.is_made_since(logs[name], min(since) - _SLACK):
                    old.append(name)
        given = {told.renamed[guid] for told in both if guid in told.renamed}
        last_given = [n for n, _ in sorted(given, key=lambda named: named[1]) if n in names]
        # dsync leaves the GUID to the last one by its letters.
        choices = [name for name in (*sorted(names), *last_given) if name in (old or names)]
        return choices[-1]

    async def _give_names(self, user: str, mine: Told, theirs: Told) -> dict[str, str]:
        """Give folders the names that they were given last; returns which have which then.

        One that gets another name from a user meanwhile keeps that.
        """
        given = latest(mine, theirs)
        wanted = {guid: name for guid, (name, _) in given.items()}
        names = await self._names(user)
        for guid, (_, at) in given.items():
            if guid in names and self._just_made(user, names[guid], at):
                del wanted[guid]
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
            known = {guid: step[1] if name == step[0] else name for guid, name in names.items()}
            names = await self._names(user)
            wanted = {g: name for g, name in wanted.items() if names.get(g) == known.get(g)}
        return names

    def tried(self, user: str, stands: Standing) -> None:
        """A run of the other server, for which :meth:`carry_out` returned that, has ended well."""
        if stands.is_unsure:
            self._tries[user] = self._tries.get(user, 0) + 1
        elif not stands.stay:
            self._tries.pop(user, None)

    def began(self, user: str) -> None:
        """dsync is about to begin here, or was at work when the daemon ended."""
        self._begun.add(user)

    async def ended(self, user: str, mine: Told, theirs: Told) -> None:
        """A dsync has ended here, well or not. Raises :class:`DovecotError`."""
        self._begun.discard(user)
        self._ended[user] = time.time()
        self._kept.pop(user, None)
        self._unwanted.pop(user, None)
        await self._backdate(user, mine, theirs)

    async def _backdate(self, user: str, mine: Told, theirs: Told) -> None:
        """Let a later rename by a user win over those that are carried, now or by a run before.

        Raises :class:`DovecotError`.
        """
        given = {name: at for name, at in theirs.renamed.values() if mine.made.get(name, 0.0) < at}
        if given and (folder := await self._logs_of(user)):
            with contextlib.suppress(OSError):
                await asyncio.to_thread(changelog.backdate, folder, given)

    async def attest(
        self, user: str, told: Collection[str], theirs: Told, there: Standing | None = None
    ) -> bool:
        """See that dsync, which is about to begin, finds what was renamed here until now, and in
        the folders that it is to delete no mail that only this server has.

        ``told``: folders (their GUIDs) of which the other server knows that they are gone; others
        as for :meth:`carry_out`. Returns whether dsync may begin: not where another was deleted
        since, for the other server may have mails in it that nobody deleted. Raises
        :class:`DovecotError`.
        """
        known = await self.learn(user)
        given = dict(known.renamed.values())
        gone = {}
        unwanted = self._unwanted.get(user, {})
        if known.gone or theirs.gone or unwanted:
            names = await self._names(user)
            # Looked for once more: one that was just being renamed is not gone.
            gone = {guid: at for guid, at in known.gone.items() if guid not in names}
            await self._keep_unseen(user, names, known, theirs, there)
            await self._keep_of_unwanted(user, names, unwanted)
        if (given or gone) and (folder := await self._logs_of(user)):
            with contextlib.suppress(OSError):
                await asyncio.to_thread(changelog.attest, folder, given, gone)
        return all(guid in told for guid in known.gone)

    async def _logs_of(self, user: str) -> Path | None:
        """The folder with Dovecot's log of the user's folders; None where there is none yet."""
        if user not in self._logs:
            try:
                index = await _limited(user, self._doveadm.index(user, INBOX))
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
            known = self.known(user)
            for part in ("renamed", "left", "made", "gone"):
                now, then = getattr(known, part), getattr(told, part)
                for key in [key for key in now if then.get(key) == now[key]]:
                    del now[key]
            self._remember(user, known)

    def _remember(self, user: str, known: Told) -> None:
        state = self._states.of(user)
        document = known.document() if known else {}
        if document != state.told:
            state.told = document
            self._states.save(user, sync=bool(document))

    def _just_made(self, user: str, name: str, since: float) -> bool:
        """Whether a user gave a name while a run was being prepared."""
        known = self.known(user).made
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

    async def _is_back(self, user: str, guid: str, name: str, at: float) -> bool:
        """Whether a folder that a user deleted at that time is there because dsync has made it
        again since; it alone makes one of the same GUID.

        ``name``: the one that it has now; empty where it is not there. Raises
        :class:`DovecotError`.
        """
        if not name or not (user in self._begun or self._ended.get(user, 0.0) >= at):
            return False
        return history.is_made_since(await self._read_logs(user, guid, name), at)

    def _came_back(
        self, user: str, guid: str, name: str, at: float, mine: Told, theirs: Told
    ) -> float | None:
        """When a folder was deleted that dsync may have brought back; None where it did not.

        ``name``: the one that it has now; empty where it is not there. Whoever gave it that since,
        or renamed it, wants it.
        """
        folder, deleted_at = mine.left.get(name, (guid, 0.0))
        ended = user in self._begun or self._ended.get(user, 0.0) >= at
        if not name or folder or not ended:
            return None
        both = (mine, theirs)
        since = [given_at(told.made, name) for told in both]
        since += [told.renamed[guid][1] for told in both if guid in told.renamed]
        return deleted_at if max(since) < deleted_at else None

    async def _is_still(self, user: str, guid: str, name: str, since: float) -> bool:
        """Whether a folder is there by a name that nobody has given anew."""
        there = await self._names(user, name)
        return there.get(guid) == name and not self._just_made(user, name, since)

    async def _expunge_older(
        self, user: str, guid: str, name: str, at: float, known: Collection[str]
    ) -> None:
        """Delete mails of a folder that were in it when it was deleted, and dsync brought back.

        Dovecot knows in whole seconds when a mail was saved, and dsync carries that with it. Those
        of the very second came from here if dsync put them into the folder on both servers.
        ``known``: such mails (GUIDs) of the other one.
        """
        fields = "uid guid date.saved.unixtime"
        rows = await self._fetch(user, fields, name, guid)
        lives = history.read(await self._read_logs(user, guid, name), _present(rows))
        carried = {life.uid for life in lives if life.by_dsync and not life.before}
        carried &= {life.uid for life in lives if life.guid in known}
        saved = {int(uid): int(when) for uid, _, when in rows}
        second = int(at)
        older = [
            uid
            for uid, when in saved.items()
            if when < second or (when == second and uid in carried)
        ]
        if older:
            await self._run(user, "expunge", "--", *mails_of(name, guid, uid_set(older)))

    async def _keep_unseen(
        self,
        user: str,
        names: Mapping[str, str],
        mine: Told,
        theirs: Told,
        there: Standing | None,
    ) -> dict[str, list[str]]:
        """Move mails to the inbox that came into folders here, and that the other server, where
        they were deleted, did not have.

        Had this been known here, they would be there too. Returns what :class:`Standing` has as
        ``carried``. Raises :class:`DovecotError`.
        """
        doomed = [guid for guid in theirs.gone if guid in names and guid not in mine.gone]
        if there:
            doomed = [guid for guid in doomed if names[guid] not in there.stay]
        if not doomed:
            return {}
        had = repair.common(self._states.of(user).sync)
        kept = self._kept.setdefault(user, {})
        found: dict[str, list[str]] = {}
        which = [names[guid] for guid in doomed]
        nexts = await _limited(user, self._doveadm.next_uids(user, *which))
        for guid in doomed:
            if guid not in nexts:
                continue
            # What was looked into stays so until dsync ends, should it take too long for one run.
            below, found[guid] = kept.get(guid, (0, []))
            if nexts[guid] <= below:
                continue
            at, name = int(theirs.gone[guid]), names[guid]
            fields = "uid guid date.saved.unixtime"
            rows = await self._fetch(user, fields, name, guid)
            logs = await self._read_logs(user, guid, name)
            brought = history.from_there(history.read(logs, _present(rows)))
            if unseen := history.unseen(logs, _present(rows), brought, had.get(guid)):
                await self._move(user, name, guid, INBOX, unseen)
                text = f"moved to the inbox, {name} is deleted: UIDs {uid_set(unseen)}"
                notify.log(notify.INFO, f"{user}: {text}")
            found[guid] = [m for u, m, saved in rows if int(saved) == at and int(u) in brought]
            kept[guid] = (nexts[guid], found[guid])
        return {guid: carried for guid, carried in found.items() if carried}

    async def _move(
        self, user: str, name: str, guid: str, target: str, uids: Iterable[int]
    ) -> None:
        """Move mails of a folder into another one, by its name, under UIDs far above."""
        statuses = await _limited(user, self._doveadm.statuses(user, target))
        nexts = [uid for there, uid, _ in statuses if there == target]
        if nexts:
            above = ("-N", str(nexts[0] + _APART), "--", target)
            await self._rows(user, 1, "mailbox update", *above)
        await self._rows(user, 1, "move", "--", target, *mails_of(name, guid, uid_set(uids)))

    async def _read_logs(self, user: str, guid: str, name: str) -> list[bytes]:
        index = await _limited(user, self._doveadm.index(user, name, guid))
        return await asyncio.to_thread(history.logs_of, index)

    def known(self, user: str) -> Told:
        """What the peer does not know yet, as far as it is learned."""
        return Told.of(self._states.of(user).told)

    def _took_away(self, user: str, guid: str) -> None:
        """The other server has to know: dsync will delete that folder there."""
        known = self.known(user)
        known.gone[guid] = time.time()
        self._remember(user, known)

    async def _keep_of_unwanted(
        self, user: str, names: Mapping[str, str], unwanted: Mapping[str, tuple[str, int]]
    ) -> None:
        """Move mails to the folder that a user renamed, which came into what dsync made of its
        earlier name, whatever name that has by now: the other server may have taken it away, and
        dsync would here.

        Raises :class:`DovecotError`.
        """
        had = repair.common(self._states.of(user).sync)
        for guid, (origin, first) in unwanted.items():
            if (name := names.get(guid)) is None:
                continue
            rows = await self._fetch(user, "uid guid", name, guid)
            logs = await self._read_logs(user, guid, name)
            brought = history.from_there(history.read(logs, _present(rows)))
            unseen = history.unseen(logs, _present(rows), brought, had.get(guid))
            if came := [uid for uid in unseen if uid >= first]:
                await self._move(user, name, guid, names.get(origin, INBOX), came)

    async def _clear(
        self,
        user: str,
        relic: tuple[str, str],
        target: tuple[str, str],
        there: Standing | None,
    ) -> list[str]:
        """Clear a folder that dsync made of an earlier name of another one; both by name and GUID.

        ``there``: as for :meth:`carry_out`; without it, only of mails that dsync has from the other
        folder. Returns the mails (their GUIDs) that a user put into it here: those that the other
        folder has as well may just have been taken out of that.
        """
        name, guid = relic
        rows = await self._fetch(user, "uid guid", name, guid)
        logs = await self._read_logs(user, guid, name)
        mails = _present(await self._fetch(user, "uid guid", *target))
        renumbered = self._states.renumbered(user).get(guid, set())
        lives = history.linked(history.read(logs, _present(rows)), renumbered)
        put = sorted(history.put_by_users(lives, logs, mails))
        others = {*put, *(there.put.get(name, ()) if there else ())}
        known = {mail for _, mail in mails} - others
        copies = [int(uid) for uid, mail in rows if mail in known]
        moved = [int(uid) for uid, mail in rows if mail not in known]
        if copies:
            await self._run(user, "expunge", "--", *mails_of(name, guid, uid_set(copies)))
        if moved and there is not None:
            # What is not moved stays in there, and so does the folder.
            with contextlib.suppress(DovecotError):
                await self._move(user, name, guid, target[0], moved)
        return put

    async def _names(self, user: str, *only: str) -> dict[str, str]:
        """Folder (its GUID) -> its name; none of a user who is gone, as the run will tell.

        ``only``: names that matter; there may be others among the answer.
        """
        names, _ = await self._look(user, *only)
        return names

    async def _look(self, user: str, *only: str) -> tuple[dict[str, str], dict[str, str]]:
        """The same, and name -> GUID: there may be two of one."""
        guids = dict(await self._listed(user, *only))
        names = {guid: name for name, guid in guids.items()}
        known, now = self._seen.get(user, {}), time.time()
        seen = {name: (guid, at) for name, (guid, at) in known.items() if guid not in names}
        if len(seen) > _SEEN and not only:
            seen.clear()
        for guid, name in names.items():
            was, at = known.get(name, ("", now))
            seen[name] = (guid, at if was == guid else now)
        self._seen[user] = seen
        return names, guids

    async def _listed(self, user: str, *only: str) -> list[tuple[str, str]]:
        """Name and GUID of each folder, as for :meth:`_names`."""
        for tries_left in reversed(range(_LISTS)):
            try:
                return await _limited(user, self._doveadm.listed(user, *only))
            except NoUser:
                break
            except DovecotError:
                # As where a folder goes while Dovecot lists it.
                if not tries_left:
                    raise
        return []

    async def _fetch(self, user: str, fields: str, name: str, guid: str) -> list[tuple[str, ...]]:
        """Fields of each mail of a folder."""
        return await _limited(user, self._doveadm.fetch(user, fields, *mails_of(name, guid)))

    async def _rows(self, user: str, width: int, *words: str) -> list[tuple[str, ...]]:
        return await _limited(user, self._doveadm.rows(user, width, *words))

    async def _run(self, user: str, *words: str) -> Reply:
        return await _limited(user, self._doveadm.run(user, *words))


def _twins(listed: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """GUID -> the folders (their names) that have it, where there are several."""
    found: dict[str, list[str]] = {}
    for name, guid in listed:
        if name != INBOX:
            found.setdefault(guid, []).append(name)
    return {guid: names for guid, names in found.items() if len(names) > 1}


async def _limited(user: str, work: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(_SECONDS):
            return await work
    except TimeoutError:
        raise DovecotError(f"doveadm for {user}: no answer") from None


def _present(rows: Iterable[Sequence[str]]) -> list[history.Mail]:
    return [(int(uid), mail) for uid, mail, *_ in rows]
