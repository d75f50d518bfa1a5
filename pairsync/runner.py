"""One run: from the marker to dsync's answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pairsync import repair
from pairsync.burials import Burials
from pairsync.config import Config
from pairsync.doveadm import Doveadm, DovecotError, Reply
from pairsync.link import LinkError, Reader, Writer, receive, send
from pairsync.peer import Grant, Peer, PeerAway, PeerBusy
from pairsync.relay import LONGEST_SILENCE, Traffic, patience, relay, silence
from pairsync.renames import Renames
from pairsync.schedule import Job, Outcome, Turns
from pairsync.sieve import ScriptError, Scripts
from pairsync.state import States
from pairsync.told import Told

_TURN_SECONDS = 2.0
_REPAIR_SECONDS = 60.0
_SLACK_SECONDS = 2
_LARGE = 1 << 20
_LINE = 100
"""Bytes, about, in which dsync lists a mail."""


@dataclass(frozen=True)
class Result:
    """How a run ended. ``seconds`` it took, ``bytes`` it moved, ``words`` say what went wrong.

    ``after_broken``: mails were compared before it, for a run had broken off. Dovecot may have
    repaired the mailbox only since.
    """

    outcome: Outcome
    seconds: float
    bytes: int
    words: str
    after_broken: bool = False


class _Slot:
    """A unix socket that one run at a time hands to doveadm as its destination."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._came: asyncio.Future[tuple[Reader, Writer]] | None = None
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, str(self.path))
        self.path.chmod(0o600)

    def expect(self) -> asyncio.Future[tuple[Reader, Writer]]:
        self._came = asyncio.get_running_loop().create_future()
        return self._came

    def _accept(self, reader: Reader, writer: Writer) -> None:
        if self._came is None or self._came.done():
            writer.transport.abort()
            return
        self._came.set_result((reader, writer))


class _Carrier:
    """The part of a run in which dsync works. ``clean``: the link can carry another run."""

    def __init__(self, slot: _Slot, grant: Grant, traffic: Traffic, seconds: float) -> None:
        self._slot = slot
        self._grant = grant
        self._traffic = traffic
        self._seconds = seconds
        self.clean = False

    async def sync(self, doveadm: Doveadm, user: str, state: str) -> Reply | None:
        """What dsync answers; None where nothing was sent for too long."""
        seconds = max(1, round(self._seconds))
        # The silence is noticed here first: dsync's own limit would make it any failure.
        limits = ("-l", str(seconds), "-T", str(round(LONGEST_SILENCE) + _SLACK_SECONDS))
        words = ["sync", *([] if state else ["-f"]), *limits, "-s", state]
        came = self._slot.expect()
        command = asyncio.create_task(doveadm.run(user, *words, f"tcp:{self._slot.path}"))
        carrying = asyncio.create_task(self._carry(came))
        waiting = asyncio.create_task(silence(self._traffic, self._seconds))
        try:
            await asyncio.wait((command, waiting), return_when=asyncio.FIRST_COMPLETED)
            if not command.done():
                return None
            if came.done():
                # It limits its own time, now that one side has ended.
                await asyncio.wait((carrying,))
            return command.result()
        finally:
            for task in (command, carrying, waiting):
                task.cancel()
            await asyncio.gather(command, carrying, waiting, return_exceptions=True)

    async def _carry(self, came: asyncio.Future[tuple[Reader, Writer]]) -> None:
        local = await came
        try:
            link = (self._grant.link.reader, self._grant.link.writer)
            self.clean = await relay(local, link, self._traffic)
        finally:
            local[1].transport.abort()


class Runner:
    """Does runs. ``released`` is notified when a turn ends."""

    def __init__(
        self,
        config: Config,
        doveadm: Doveadm,
        peer: Peer,
        turns: Turns,
        released: asyncio.Condition,
        states: States,
        scripts: Scripts | None,
        renames: Renames,
        burials: Burials,
        suspects: set[str],
        settling: set[str],
        rests: Callable[[str], bool],
        changes: Callable[[str], bool],
    ) -> None:
        self._config = config
        self._doveadm = doveadm
        self._peer = peer
        self._turns = turns
        self._released = released
        self._states = states
        self._scripts = scripts
        self._renames = renames
        self._burials = burials
        self._suspects = suspects
        self._settling = settling
        self._rests = rests
        self._changes = changes
        self._large: set[str] = set()
        """Users whose last full run moved much, and no other has succeeded since."""
        self._listed: dict[str, int] = {}
        """User -> bytes, about, of a full run in which little is new."""
        self._slow: set[str] = set()
        """Whose last run was ended for its silence: the next may have longer."""
        self._compared: set[str] = set()
        """Users with a run that compared mails, for one had broken off."""
        self.renumbered = 0
        self._bytes = 0
        self._traffics: list[Traffic] = []
        self._slots = [
            _Slot(config.files.run / f"slot-{number}") for number in range(config.sync.parallel)
        ]

    @property
    def bytes(self) -> int:
        """Of dsync, in both directions, with the runs that are on."""
        return self._bytes + sum(traffic.size for traffic in self._traffics)

    async def start(self) -> None:
        """Make the sockets. Raises OSError."""
        for slot in self._slots:
            await slot.open()

    async def run(self, job: Job) -> Result:
        """Do a run; whatever happens is in the result. Cancelled, it leaves nothing behind."""
        began = time.monotonic()
        traffic = Traffic()
        self._traffics.append(traffic)
        slot = self._slots.pop()
        try:
            outcome, words = await self._run(job, slot, traffic)
        except PeerBusy:
            outcome, words = Outcome.BUSY, ""
        except (LinkError, ScriptError, OSError) as error:
            outcome, words = Outcome.FAILED, str(error)
        except (PeerAway, DovecotError) as error:
            outcome, words = Outcome.PUT_OFF, str(error)
        finally:
            self._slots.append(slot)
            self._traffics.remove(traffic)
            self._bytes += traffic.size
        after_broken = job.user in self._compared
        self._compared.discard(job.user)
        return Result(outcome, time.monotonic() - began, traffic.size, words, after_broken)

    async def _run(self, job: Job, slot: _Slot, traffic: Traffic) -> tuple[Outcome, str]:
        if not await self._begin(job.user):
            return Outcome.BUSY, ""
        try:
            deleted = dict(self._states.of(job.user).deleted)
            state = "" if job.full else self._states.of(job.user).sync
            seconds = await self._silence(job.user, full=not state)
            broken = job.user in self._suspects
            disputed = job.user in self._burials.disputed
            suspect = broken or disputed or job.user in self._settling
            told = await self._renames.learn(job.user)
            grant = await self._peer.open_run(job.user, seconds, deleted, told, suspect=suspect)
            carrier: _Carrier | None = None
            given = ""
            try:
                self._turns.granted(job.user)
                await self._delete_scripts(job.user, {**deleted, **grant.deleted})
                stands = await self._renames.carry_out(job.user, told, grant.told, grant.standing)
                gone, theirs = {*told.gone, *stands.taken}, grant.told
                if grant.repair is not None:
                    more, theirs = await self._repair(
                        job.user, grant, broken=broken or grant.broken
                    )
                    gone |= more
                    if broken or grant.broken:
                        self._compared.add(job.user)
                    state, seconds = "", await self._silence(job.user, full=True)
                if self._rests(job.user):
                    return Outcome.BUSY, ""
                if not await self._renames.attest(job.user, gone, theirs, grant.standing):
                    return Outcome.BUSY, ""
                traffic.count(0)
                self._suspects.add(job.user)
                # What is disputed from now on is for the next run.
                self._burials.disputed.discard(job.user)
                began = time.time()
                self._renames.began(job.user)
                self._burials.open(job.user, began)
                carrier = _Carrier(slot, grant, traffic, seconds)
                reply = await carrier.sync(self._doveadm, job.user, state)
                with contextlib.suppress(DovecotError):
                    await self._renames.ended(job.user, told, grant.told)
                if reply is None:
                    self._slow.add(job.user)
                    seconds = patience(seconds, traffic.size)
                    return Outcome.STALLED, f"nothing moved for {seconds:.0f} s"
                await self._burials.end(job.user, began, changed=self._changes(job.user))
                outcome, words = self._judge(job, reply, deleted, state, traffic)
                if disputed and outcome is not Outcome.OK:
                    self._burials.disputed.add(job.user)
                if outcome is Outcome.OK:
                    given = self._states.of(job.user).sync
                    if not grant.standing.is_unsure:
                        self._renames.done(job.user, told)
                return outcome, words
            finally:
                well = job.user not in self._suspects
                clean = carrier is not None and carrier.clean
                self._peer.finish(grant, clean=clean, well=well, state=given)
        finally:
            self._turns.end(job.user)
            async with self._released:
                self._released.notify_all()

    def _judge(
        self,
        job: Job,
        reply: Reply,
        deleted: Mapping[str, float],
        began_with: str,
        traffic: Traffic,
    ) -> tuple[Outcome, str]:
        if reply.code == "CHANGED":
            self._suspects.discard(job.user)
            return Outcome.CHANGED, ""
        if reply.code == "NOUSER":
            self._suspects.discard(job.user)
            # Where the peer's dsync was reached, it is the peer that does not know the user.
            return (Outcome.UNKNOWN if traffic.size else Outcome.GONE), reply.log
        if reply.code:
            return Outcome.FAILED, reply.log or f"doveadm says {reply.code}; see Dovecot's log"
        self._suspects.discard(job.user)
        self._settling.discard(job.user)
        state = self._states.of(job.user)
        state.sync = reply.values[0]
        self._large.discard(job.user)
        if not began_with:
            state.full_at = time.time()
            if traffic.size > _LARGE:
                self._large.add(job.user)
            # Who was too slow for the short silence keeps the long one.
            self._listed[job.user] = _LARGE + 1 if job.user in self._slow else traffic.size
        self._slow.discard(job.user)
        for name, version in deleted.items():
            if state.deleted.get(name) == version:
                del state.deleted[name]
        self._states.save(job.user, sync=bool(deleted))
        return Outcome.OK, ""

    async def _silence(self, user: str, *, full: bool) -> float:
        """For how many seconds a run may be silent: for long where much is to be read."""
        limits = self._config.sync
        if full and user not in self._listed:
            with contextlib.suppress(DovecotError, TimeoutError):
                async with asyncio.timeout(limits.silence):
                    self._listed[user] = await self._doveadm.messages(user) * _LINE
        # What follows a full run lists every mail once more.
        much = self._listed.get(user, _LARGE + 1) > _LARGE if full else user in self._large
        return limits.silence_full if much or user in self._slow else limits.silence

    async def _repair(self, user: str, grant: Grant, *, broken: bool) -> tuple[set[str], Told]:
        """It takes a while. Returns the folders (their GUIDs) of which the other server knows by
        then that they are gone here, and what that one has told by then.

        Of these, it has carried out nothing: the next run tells them again.
        """
        after = repair.latest(repair.common(self._states.of(user).sync), grant.repair or {})
        await send(grant.link.writer, {"after": after})
        mine = await repair.look(self._doveadm, self._states, user)
        said = await receive(grant.link.reader, _REPAIR_SECONDS)
        here = sum(life.is_there for lives in mine.histories.values() for life in lives)
        there = sum(map(len, said["moot"].values()))
        self._listed[user] = max(here, there) * _LINE
        # All of this may be about a hundred thousand mails: the heartbeats go on meanwhile.
        moot = await asyncio.to_thread(lambda: repair.all_of(mine.moot(after), dict(said["moot"])))
        await send(grant.link.writer, {"moot": await asyncio.to_thread(repair.listed, moot)})
        said = await receive(grant.link.reader, _REPAIR_SECONDS)
        plan, for_peer = await asyncio.to_thread(
            lambda: repair.plans(mine.only(moot), repair.Mailbox.of(said), after, broken=broken)
        )
        told = await self._renames.learn(user)
        await send(grant.link.writer, {**for_peer.document(), "told": told.document()})
        self.renumbered += await repair.mend(self._doveadm, self._states, user, mine, plan)
        said = await receive(grant.link.reader, _REPAIR_SECONDS)
        return set(told.gone), Told.of(said["told"]) if "told" in said else grant.told

    async def _begin(self, user: str) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TURN_SECONDS), self._released:
                await self._released.wait_for(lambda: self._turns.begin(user))
                return True
        return False

    async def _delete_scripts(self, user: str, deleted: Mapping[str, float]) -> None:
        if self._scripts is not None and deleted:
            await self._scripts.delete(user, deleted)
