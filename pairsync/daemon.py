"""The daemon: puts the parts together and keeps them going."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import traceback
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from pairsync import __version__, inotify, locks, night, notify, repair, status
from pairsync.burials import Burials
from pairsync.config import Config, ConfigError, read_secret
from pairsync.control import Control
from pairsync.doveadm import Doveadm, DovecotError
from pairsync.inotify import Inotify
from pairsync.link import Identity, LinkError, Tls, boot_id, folder_id
from pairsync.markers import Markers, user_name
from pairsync.peer import Peer
from pairsync.renames import Renames
from pairsync.runner import Result, Runner
from pairsync.schedule import FAILURES, Job, Outcome, Queue, Turns
from pairsync.server import Server
from pairsync.settle import Unsettled
from pairsync.sieve import Scripts
from pairsync.state import States, read_document, write_document

_TICK_SECONDS = 1.0
_RESCAN_TICKS = 5
_SCRIPTS_TICKS = 60
_NIGHT_SECONDS = 30.0
_DOVECOT_SECONDS = 2.0
_BACKGROUND_AT_ONCE = 200
_CLOCKS_APART = 0.05
_DSYNC_ENDS = 0.3
"""Seconds that Dovecot needs to see that the other side of a run is gone."""
_PASS_TRIES = 5


@dataclass
class Pass:
    """A full run for every user.

    ``left`` are those that are not through, ``failed`` those whose last run failed. Who failed
    some times, or is not known to the peer, no longer keeps the pass from ending: such a user has
    a marker, and is tried again for as long as it takes. ``bytes_before``: moved when it began.
    """

    reason: str
    total: int
    left: set[str]
    bytes_before: int
    failed: set[str] = field(default_factory=set)
    began: float = field(default_factory=time.time)

    def document(self, moved: int) -> dict[str, Any]:
        """``moved``: all bytes so far, those of other runs meanwhile too."""
        return {
            "bytes": moved - self.bytes_before,
            "reason": self.reason,
            "total": self.total,
            "done": self.total - len(self.left),
            "failed": sorted(self.failed),
            "seconds": time.time() - self.began,
        }


class Daemon:
    """One of the two. Raises :class:`ConfigError` and OSError where it cannot start."""

    def __init__(self, config: Config) -> None:
        self.config = config
        read_secret(config.files.secret)
        self._tls = Tls(config.tls)
        if self._tls.problem:
            raise ConfigError(f"{self._tls.problem}; see [tls]")
        self._markers = Markers((config.files.state, config.files.run))
        self._states = States(config.files.state / "users")
        self._identity_path = config.files.state / "identity.json"
        self._markers.prepare()
        self._states.prepare()
        self._me = Identity(
            config.name,
            f"{boot_id()}.{folder_id(config.files.state)}",
            folder_id(config.dovecot.homes),
        )
        self._dirty: dict[str, float] = {}
        self._begun: dict[str, float] = {}
        dirty = self._markers.dirty()
        self._suspects = set(dirty)
        self._settling: set[str] = set()
        sync = config.sync
        self._queue = Queue(sync.parallel, sync.debounce, sync.retry_max)
        self._turns = Turns(config.precedence)
        self._released = asyncio.Condition()
        self._doveadm = Doveadm(config.dovecot.socket)
        self._counts = status.Counts()
        self._changes = Inotify()
        self._scripts: Scripts | None = None
        if config.sieve is not None:
            self._scripts = Scripts(
                config.dovecot.homes, config.sieve, self._states, self._doveadm, self._mark
            )
        self._renames = Renames(self._markers.folders, self._states, self._doveadm)
        self._burials = Burials(self._doveadm, self._states)
        for user, since in dirty.items():
            # Whose run broke off when the daemon died is among them.
            self._burials.open(user, since)
            self._renames.began(user)
        self._asides: set[asyncio.Task[None]] = set()
        self._peer = Peer(config, self._tls, self._secret, self._me, self._on_up, self._on_down)
        self._server = Server(
            config,
            self._tls,
            self._secret,
            self._me,
            self._doveadm,
            self._turns,
            self._released,
            self._states,
            self._deletions,
            self._renames,
            self._burials,
            self,
        )
        self._runner = Runner(
            config,
            self._doveadm,
            self._peer,
            self._turns,
            self._released,
            self._states,
            self._scripts,
            self._renames,
            self._burials,
            self._suspects,
            self._settling,
            self.rests,
            self._dirty.__contains__,
        )
        self._wake = asyncio.Event()
        self._runs: set[asyncio.Task[Result]] = set()
        self._words: dict[str, str] = {}
        self._asked: dict[str, list[asyncio.Future[Result]]] = {}
        self._pass: Pass | None = None
        self._pass_wanted = ""
        self._marker_problem = ""
        self._dovecot_problem = ""
        self._unflushed = False
        self._unsettled = Unsettled()

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        for folder in self._markers.folders:
            self._changes.add(folder, inotify.CLOSE_WRITE)
        loop.add_reader(self._changes.fileno(), self._take_changes)
        self._rescan()
        self._renames.scan()
        if self._scripts is not None:
            self._scripts.start()
            loop.add_reader(self._scripts.fileno(), self._scripts.handle_events)
        self._work(self._remove_locks())
        await self._runner.start()
        control = Control(self.config.files.run / "control", self)
        await control.start()
        await self._server.start()
        self._work(self._bury(*self._burials))
        notify.tell("READY=1")
        notify.log(notify.INFO, f"{self.config.name} keeps itself equal to {self.config.peer.name}")
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(work)
                for work in (
                    self._peer.keep(),
                    self._peer.keep_idle(),
                    self._schedule(),
                    self._tick(),
                    self._nights(),
                    self._passes(),
                )
            ]
            await stop.wait()
            notify.tell("STOPPING=1")
            for task in (*tasks, *self._runs):
                task.cancel()

    async def _remove_locks(self) -> None:
        """Of those first who have a marker: they were at work when the power went."""
        removed = 0
        try:
            homes = self.config.dovecot.homes.iterdir()
            for home in sorted(homes, key=lambda home: home.name not in self._dirty):
                # Asked each time: the clock may just be set right.
                removed += await asyncio.to_thread(locks.remove, home, locks.booted())
        except OSError as error:
            notify.log(notify.WARNING, f"locks of before this boot: {error}")
        if removed:
            notify.log(notify.INFO, f"{removed} locks of before this boot removed")

    # Changes -----------------------------------------------------------------------------------

    def _take_changes(self) -> None:
        for event in self._changes.read():
            if event.mask & inotify.OVERFLOW:
                self._rescan()
                self._renames.scan()
            elif user := user_name(event.name):
                self._notice(user, time.time())
            elif user := self._renames.note(event.name):
                self._work(self._learn(user))
            elif user := self._markers.take_subscribed(event.name):
                left, now = 1.0 - time.time() % 1.0 + _CLOCKS_APART, time.monotonic()
                self._queue.rest(user, now + left, now)
        self._wake.set()

    async def _learn(self, user: str) -> None:
        """Find out at once which folder was renamed, before anything else happens to it."""
        with contextlib.suppress(DovecotError, OSError):
            await self._renames.learn(user)

    async def _bury(self, *users: str) -> None:
        """Where a run broke off: what dsync has made is deleted without the peer, if it must be."""
        pause = _DSYNC_ENDS
        for user in users:
            # A run that has begun meanwhile does it again at its end.
            while user in self._burials:
                await asyncio.sleep(pause)
                pause = 0.0
                try:
                    await self._burials.bury(user)
                except (DovecotError, OSError):
                    pause = _DOVECOT_SECONDS

    def _work(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)

    def _notice(self, user: str, since: float) -> None:
        self._dirty.setdefault(user, since)
        self._queue.notice(user, time.monotonic())
        self._unflushed = True

    def _rescan(self) -> None:
        """Find markers that no event told of."""
        for user, since in self._markers.dirty().items():
            if not self._queue.has(user):
                self._notice(user, since)
            self._dirty[user] = min(since, self._dirty.get(user, since))

    def _mark(self, user: str) -> None:
        """A run is due: scripts of the user changed, or the peer's run has left something."""
        try:
            self._markers.mark(user)
        except OSError as error:
            self._marker_problem = f"changed users cannot be noted: {error.strerror}"
            self._notice(user, time.time())
            self._wake.set()

    async def _deletions(self, user: str, theirs: Mapping[str, float]) -> Mapping[str, float]:
        if self._scripts is None:
            return {}
        mine = dict(self._states.of(user).deleted)
        if mine or theirs:
            await self._scripts.delete(user, {**mine, **theirs})
        return mine

    def rests(self, user: str) -> bool:
        """Whether no run may begin now (:class:`pairsync.server.Guests`)."""
        return self._queue.rests(user, time.monotonic())

    def changes(self, user: str) -> bool:
        """:class:`pairsync.server.Guests`; a job of ours may be waiting for the peer's run."""
        return user in self._dirty or user in self._begun

    def came(self, user: str) -> bool:
        """A run of the peer's begins."""
        try:
            self._markers.receive(user)
        except OSError as error:
            self._marker_problem = f"changed users cannot be noted: {error.strerror}"
        return user in self._suspects

    def common(self, user: str) -> repair.Common:
        return repair.common(self._states.of(user).sync)

    def left(self, user: str, *, well: bool | None, state: str, again: bool) -> None:
        if well and state:
            # An own older one would hide flags of mails that were carried since: dsync takes them
            # for new on both servers, and compares no flags then.
            self._states.of(user).sync = state
            self._states.save(user)
        try:
            if well is not None:
                self._unsettled.guest(user, time.monotonic())
            if well is False:
                self._suspects.add(user)
                self._markers.broke_off(user)
            else:
                self._markers.left(user)
            if well:
                self._suspects.discard(user)
                self._queue.rested(user)
        except OSError as error:
            self._marker_problem = f"changed users cannot be noted: {error.strerror}"
        if user in self._burials:
            self._work(self._bury(user))
        if again:
            self._mark(user)
        if well is False:
            self._notice(user, time.time())
            self._wake.set()

    # The peer ----------------------------------------------------------------------------------

    def _secret(self) -> bytes:
        try:
            return read_secret(self.config.files.secret)
        except ConfigError as error:
            raise LinkError(str(error)) from error

    def _on_up(self, who: Identity) -> None:
        known = read_document(self._identity_path)
        now = {"me": self._me.document(), "peer": who.document()}
        if known != now:
            if _stores(known) != _stores(now):
                self._states.forget_syncs()
            reason = _reason(known, now)
            if self.config.precedence:
                self.want_pass(reason)
            else:
                write_document(self._identity_path, now)
        self._peer_identity = now
        notify.log(notify.INFO, f"{who.name} is there; {len(self._dirty)} users are dirty")
        self._queue.resume(time.monotonic())
        self._wake.set()

    def _on_down(self) -> None:
        notify.log(notify.WARNING, f"{self.config.peer.name}: {self._peer.problem}")
        self._queue.hold()
        for run in self._runs:
            run.cancel()

    # Runs --------------------------------------------------------------------------------------

    async def _schedule(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                self._wake.clear()
                now = time.monotonic()
                while job := self._queue.take(now):
                    group.create_task(self._do(job))
                due = self._queue.next_due()
                try:
                    async with asyncio.timeout(None if due is None else max(0.0, due - now)):
                        await self._wake.wait()
                except TimeoutError:
                    continue

    async def _do(self, job: Job) -> None:
        user = job.user
        try:
            begun = self._markers.begin(user)
        except OSError as error:
            # The marker stays, so the user gets another run.
            self._marker_problem = f"changed users cannot be noted: {error.strerror}"
            begun = None
        since = self._dirty.pop(user, None)
        first = min((t for t in (begun, since) if t is not None), default=None)
        if first is not None:
            self._begun[user] = first
        run = asyncio.create_task(self._runner.run(job))
        self._runs.add(run)
        try:
            result = await run
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if me is not None and me.cancelling():
                raise
            # Only the run was: the peer went away. It may be back by now.
            result = Result(Outcome.PUT_OFF, 0.0, 0, "the peer went away")
        except Exception as error:
            notify.log(notify.ERROR, f"{user}: a defect: {traceback.format_exc()}")
            result = Result(Outcome.FAILED, 0.0, 0, f"a defect of pairsync: {error!r}")
        finally:
            self._runs.discard(run)
        self._finish(job, result)

    def _finish(self, job: Job, result: Result) -> None:
        user, outcome, now = job.user, result.outcome, time.time()
        first = self._begun.pop(user, None)
        self._counts.run(outcome, result.seconds, result.bytes, now)
        if user in self._burials:
            self._work(self._bury(user))
        self._settle(user, outcome)
        if outcome is Outcome.OK:
            if first is not None:
                self._counts.lag(now - first)
            self._dovecot_problem = ""
        elif outcome is Outcome.GONE:
            self._unsettled.forget(user)
            notify.log(notify.WARNING, f"{user}: no such user any more, not synchronised")
        else:
            if first is not None:
                self._dirty[user] = min(first, self._dirty.get(user, first))
            if outcome is Outcome.PUT_OFF and self._peer.up:
                self._dovecot_problem = result.words
        self._queue.finish(user, outcome, time.monotonic())
        failures = self._queue.failing.get(user, 0)
        if outcome in FAILURES:
            self._words[user] = result.words
            if failures & (failures - 1) == 0:
                notify.log(notify.WARNING, f"{user}: run {failures} failed: {result.words}")
        elif outcome in (Outcome.OK, Outcome.GONE):
            self._words.pop(user, None)
        self._count_for_pass(job, outcome)
        if outcome in (Outcome.OK, Outcome.CHANGED):
            self._rate(job, changed=outcome is Outcome.CHANGED or result.after_broken)
        if outcome is Outcome.OK or outcome is Outcome.GONE or outcome in FAILURES:
            for future in self._asked.pop(user, []) if job.full or outcome in FAILURES else []:
                if not future.done():
                    future.set_result(result)
        self._wake.set()

    def _rate(self, job: Job, *, changed: bool) -> None:
        """Note whether a user needs a full run; the note outlives the daemon."""
        was = job.user in self._unsettled
        self._unsettled.ran(job.user, time.monotonic(), full=job.full, changed=changed)
        try:
            if was != (job.user in self._unsettled):
                (self._markers.settle if was else self._markers.unsettle)(job.user)
        except OSError as error:
            self._marker_problem = f"changed users cannot be noted: {error.strerror}"

    def _settle(self, user: str, outcome: Outcome) -> None:
        try:
            if outcome is Outcome.OK:
                self._markers.done(user)
            elif outcome is Outcome.GONE:
                self._markers.drop(user)
            else:
                self._markers.undone(user)
        except OSError as error:
            self._marker_problem = f"{user}: its marker cannot be changed: {error.strerror}"

    # Passes ------------------------------------------------------------------------------------

    def want_pass(self, reason: str) -> None:
        """Begin a full run for every user, as soon as Dovecot tells who they are."""
        self._pass_wanted = reason

    def _count_for_pass(self, job: Job, outcome: Outcome) -> None:
        if self._pass is None:
            return
        if outcome in FAILURES:
            self._pass.failed.add(job.user)
            failures = self._queue.failing.get(job.user, 0)
            if outcome is Outcome.UNKNOWN or failures >= _PASS_TRIES:
                self._pass.left.discard(job.user)
        elif (outcome is Outcome.OK and job.full) or outcome is Outcome.GONE:
            self._pass.left.discard(job.user)
            self._pass.failed.discard(job.user)

    async def _passes(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS / 4)
            if self._pass_wanted and self._peer.up:
                await self._begin_pass()
            elif self._pass is not None:
                self._feed_pass()

    async def _begin_pass(self) -> None:
        try:
            users = await self._users()
        except DovecotError as error:
            self._dovecot_problem = str(error)
            await asyncio.sleep(_DOVECOT_SECONDS)
            return
        self._pass = Pass(self._pass_wanted, len(users), set(users), self._runner.bytes)
        self._pass_wanted = ""
        notify.log(notify.INFO, f"a full run for {len(users)} users: {self._pass.reason}")

    def _feed_pass(self) -> None:
        """Keep the queue filled, not full; end the pass when all are through."""
        assert self._pass is not None  # noqa: S101
        now = time.monotonic()
        room = _BACKGROUND_AT_ONCE - self._queue.background
        for user in sorted(self._pass.left):
            if room <= 0:
                break
            if not self._queue.has(user):
                self._queue.add_background(user, now)
                room -= 1
        self._wake.set()
        if not self._pass.left:
            seconds, failed = time.time() - self._pass.began, sorted(self._pass.failed)
            done = self._pass.total - len(failed)
            notify.log(notify.INFO, f"{done} full runs done in {seconds:.1f} s")
            if failed:
                names = ", ".join(failed[:5])
                notify.log(notify.WARNING, f"{len(failed)} failed and are tried again: {names}")
            self._pass = None
            if self._peer.up and not self._pass_wanted:
                write_document(self._identity_path, self._peer_identity)

    async def _nights(self) -> None:
        while True:
            await asyncio.sleep(_NIGHT_SECONDS)
            if not (self.config.precedence and self._peer.up and self._pass is None):
                continue
            try:
                users = await self._users()
            except DovecotError as error:
                self._dovecot_problem = str(error)
                continue
            now = time.time()
            due = [
                user
                for user in users
                if self._states.of(user).full_at < night.last_slot(user, now, self.config.night)
                and not self._queue.has(user)
            ]
            for user in due[:_BACKGROUND_AT_ONCE]:
                self._queue.add_background(user, time.monotonic())
            self._wake.set()

    async def _users(self) -> list[str]:
        try:
            async with asyncio.timeout(self.config.sync.silence_full):
                return await self._doveadm.users()
        except TimeoutError:
            raise DovecotError("doveadm user: no answer") from None

    # Now and then ------------------------------------------------------------------------------

    async def _tick(self) -> None:
        ticks = 0
        while True:
            ticks += 1
            notify.tell("WATCHDOG=1")
            self._server.end_runs_of_the_lost()
            self._tls.refresh()
            if ticks % _RESCAN_TICKS == 0:
                self._rescan()
                await self._try_marker()
            if ticks % _SCRIPTS_TICKS == 0 and self._scripts is not None:
                self._scripts.rescan()
            if self._unflushed and self._dirty:
                self._unflushed = False
                await asyncio.to_thread(self._flush)
            if self._peer.up:
                for user in self._unsettled.due(time.monotonic()):
                    # What dsync brought back while the user took it away is found then, too.
                    self._settling.add(user)
                    self._queue.settle(user, time.monotonic())
            self._write_metrics()
            self._wake.set()
            await asyncio.sleep(_TICK_SECONDS)

    async def _try_marker(self) -> None:
        """Once markers can be written again, nobody knows who changed meanwhile."""
        try:
            await asyncio.to_thread(self._markers.probe)
        except OSError as error:
            self._marker_problem = f"changed users cannot be noted: {error.strerror}"
            return
        if self._marker_problem:
            self._marker_problem = ""
            self.want_pass("changed users could not be noted for a while")

    def _flush(self) -> None:
        try:
            self._markers.flush()
        except OSError as error:
            self._marker_problem = f"changed users cannot be noted: {error.strerror}"

    def _write_metrics(self) -> None:
        path = self.config.files.metrics
        made = path.with_name(f".{path.name}.new")
        try:
            made.write_text(status.metrics(self.document(), self._counts), encoding="utf-8")
            made.chmod(0o644)
            made.replace(path)
        except OSError as error:
            notify.log(notify.WARNING, f"{path}: {error.strerror}")

    # For the control socket --------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """How it is: what `pairsync status --json` shows."""
        now = time.time()
        ages = {**self._dirty}
        for user, since in self._begun.items():
            ages[user] = min(since, ages.get(user, since))
        oldest = min(ages, key=lambda user: ages[user], default="")
        found = [
            self._marker_problem,
            self._dovecot_problem,
            self._states.problem,
            self._tls.problem,
            self._scripts.problem if self._scripts else "",
        ]
        lag = self._counts
        return {
            "name": self.config.name,
            "version": __version__,
            "pid": os.getpid(),
            "peer": {
                "name": self.config.peer.name,
                "up": self._peer.up,
                "since": now - self._peer.changed_at,
                "problem": self._peer.problem,
                "round_trip": self._peer.round_trip,
            },
            "dirty": len(ages),
            "oldest": {
                "user": oldest,
                "seconds": max(0.0, now - ages[oldest]) if oldest else 0.0,
            },
            "waiting": self._queue.waiting,
            "background": self._queue.background,
            "running": self._queue.running,
            "running_peer": len(self._server.running),
            "failing": {
                user: {"failures": failures, "words": self._words.get(user, "")}
                for user, failures in self._queue.failing.items()
            },
            "runs": {o.value: lag.runs[o.value] for o in Outcome},
            "lag": {
                "p50": lag.percentile(0.5),
                "p95": lag.percentile(0.95),
                "p99": lag.percentile(0.99),
                "count": lag.lag_count,
            },
            "unsettled": len(self._unsettled),
            "renumbered": self._runner.renumbered,
            "refused": self._server.refused,
            "refused_last": self._server.problem,
            "markers_writable": not self._marker_problem,
            "pass": self._pass.document(self._runner.bytes) if self._pass else None,
            "pass_due": self._pass_wanted,
            "problems": [problem for problem in found if problem],
        }

    def sync(self, user: str) -> asyncio.Future[Result]:
        """Ask for a full run; the result is that of the next run that says something."""
        future = asyncio.get_running_loop().create_future()
        self._asked.setdefault(user, []).append(future)
        self._queue.ask(user, time.monotonic())
        self._wake.set()
        return future

    def forget(self) -> None:
        """Begin from nothing with every user."""
        self._states.forget_syncs()


def _stores(document: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(document.get(side, {}).get("store", "") for side in ("me", "peer"))


def _reason(known: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if not known:
        return "first contact"
    changed = []
    for side, name in (("me", "this server"), ("peer", "the peer")):
        if known[side].get("store") != now[side]["store"]:
            changed.append(f"{name} has another disk")
        elif known[side] != now[side]:
            changed.append(f"{name} was started anew")
    return " and ".join(changed)
