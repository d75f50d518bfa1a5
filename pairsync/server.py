"""The listening side: admits the peer's runs to the local doveadm."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from pairsync.burials import Burials
from pairsync.config import Config
from pairsync.doveadm import Doveadm, DovecotError
from pairsync.link import (
    LINE_LIMIT,
    Closed,
    Identity,
    LinkError,
    Reader,
    Tls,
    Writer,
    be_greeted,
    receive,
    send,
)
from pairsync.peer import without_delay
from pairsync.relay import Traffic, relay, silence, take_frame
from pairsync.renames import Renames
from pairsync.repair import Common, Plan, all_of, listed, look, mend
from pairsync.schedule import Turns
from pairsync.sieve import ScriptError
from pairsync.state import States
from pairsync.told import NOTHING, Standing, Told

_GREETING_SECONDS = 5.0
_TURN_SECONDS = 2.0
_STRANGERS = 16
_SLACK_SECONDS = 2.0
_ON_ITS_WAY_SECONDS = 32.0
"""The peer, which is to give up first, is patient for what it has sent, also for what has not come
yet: the buffers between may have megabytes of it (pairsync.relay.patience).
"""
_WORD_SECONDS = 2.0
_ENDS_SECONDS = 2.0
_REPAIR_SECONDS = 60.0

Deletions = Callable[[str, Mapping[str, float]], Awaitable[Mapping[str, float]]]
"""(user, deleted there) -> deleted here; those of the peer are carried out before it returns."""


class Guests(Protocol):
    """Notes the peer's runs, and whether they ended well."""

    def rests(self, user: str) -> bool:
        """Whether no run may begin at the moment."""

    def changes(self, user: str) -> bool:
        """Whether it was changed since a run began, or before and no run of this server did."""

    def came(self, user: str) -> bool:
        """A run begins. Whether mails may have been left out by an earlier one."""

    def common(self, user: str) -> Common:
        """What both had after the last good run that this server knows of."""

    def left(self, user: str, *, well: bool | None, state: str, again: bool) -> None:
        """The run has ended; None: before dsync began, so nothing is better or worse.

        ``state``: what dsync gave as its state, if it did. ``again``: this server has to do one
        itself.
        """


class Server:
    """Listens for the peer; ``turns`` says when a run of it may begin.

    ``released`` is notified when a turn ends.
    """

    def __init__(
        self,
        config: Config,
        tls: Tls,
        secret: Callable[[], bytes],
        me: Identity,
        doveadm: Doveadm,
        turns: Turns,
        released: asyncio.Condition,
        states: States,
        deletions: Deletions,
        renames: Renames,
        burials: Burials,
        guests: Guests,
    ) -> None:
        self._config = config
        self._tls = tls
        self._secret = secret
        self._me = me
        self._doveadm = doveadm
        self._turns = turns
        self._released = released
        self._states = states
        self._deletions = deletions
        self._renames = renames
        self._burials = burials
        self._guests = guests
        self._strangers = 0
        self._runs: dict[asyncio.Task[None], str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard = float("-inf")
        self.refused = 0
        self.problem = ""
        self.bytes = 0

    @property
    def running(self) -> tuple[str, ...]:
        """Users with a run of the peer's."""
        return tuple(self._runs.values())

    async def start(self) -> None:
        """Listen. Raises OSError."""
        listen = self._config.listen
        self._listening = [
            await asyncio.start_server(
                self._accept,
                address,
                listen.port,
                ssl=self._tls.server,
                ssl_handshake_timeout=_GREETING_SECONDS,
                ssl_shutdown_timeout=1.0,
                limit=LINE_LIMIT,
            )
            for address in listen.addresses
        ]

    def end_runs_of_the_lost(self) -> None:
        """End runs of a peer whose heartbeats are missing; call it now and then."""
        if time.monotonic() - self._heard > self._config.heartbeat.lost_after:
            for task in self._runs:
                task.cancel()

    async def _accept(self, reader: Reader, writer: Writer) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, LinkError) as error:
            self.problem = str(error)
        except asyncio.CancelledError:
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: Reader, writer: Writer) -> None:
        if self._strangers >= _STRANGERS:
            return
        without_delay(writer)
        self._strangers += 1
        try:
            who = await be_greeted(reader, writer, self._secret(), self._me, _GREETING_SECONDS)
            if who.name != self._config.peer.name:
                raise LinkError(f"{who.name} connects, which is not the peer")
        except LinkError:
            self.refused += 1
            raise
        finally:
            self._strangers -= 1
        while True:
            try:
                request = await receive(reader, None)
            except Closed:
                return
            if request.get("do") == "watch":
                await self._answer_heartbeats(reader, writer)
            elif request.get("do") != "run":
                await send(writer, {"error": f"what is {request.get('do')!r}?"})
            elif await self._run(reader, writer, request):
                continue
            return

    async def _answer_heartbeats(self, reader: Reader, writer: Writer) -> None:
        while True:
            self._heard = time.monotonic()
            said = await receive(reader, self._config.heartbeat.lost_after * 2)
            await send(writer, {"pong": said.get("ping")})

    async def _run(self, reader: Reader, writer: Writer, request: Mapping[str, Any]) -> bool:
        """Whether the connection can carry another run."""
        user = str(request["user"])
        if self._guests.rests(user) or not await self._admit(user):
            await send(writer, {"busy": True})
            return True
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        self._runs[task] = user
        try:
            deleted = {str(k): float(v) for k, v in dict(request["deleted"]).items()}
            broken = self._guests.came(user)
            return await self._carry(reader, writer, request, deleted, broken)
        finally:
            del self._runs[task]
            self._turns.leave(user)
            await self._notify()

    async def _carry(
        self,
        reader: Reader,
        writer: Writer,
        request: Mapping[str, Any],
        deleted: Mapping[str, float],
        broken: bool,
    ) -> bool:
        user, seconds = str(request["user"]), float(request["silence"]) + _SLACK_SECONDS
        local: Writer | None = None
        traffic = Traffic()
        well: bool | None = None
        state = ""
        mine, standing = NOTHING, Standing()
        try:
            scripts = await self._deletions(user, deleted)
            mine = await self._renames.learn(user)
            theirs = Told.of(request.get("told"))
            standing = await self._renames.carry_out(user, mine, theirs)
            # With what was taken away just now.
            mine = self._renames.known(user)
            told = {"deleted": dict(scripts), "told": mine.document(), **standing.document()}
            later, gone = theirs, set(mine.gone)
            local_reader, local = await self._doveadm.connect()
            if self._guests.rests(user):
                await send(writer, {"busy": True})
                return True
            if broken or request.get("suspect"):
                common = self._guests.common(user)
                await send(writer, {"repair": common, "broken": broken, **told})
                # It takes a while, and both tell what happened meanwhile: the next run carries it.
                later = await self._repair(reader, writer, user) or theirs
                known = await self._renames.learn(user)
                gone |= set(known.gone)
                await send(writer, {"go": True, "told": known.document()})
                # A full run follows, whatever was asked for.
                seconds = max(seconds, self._config.sync.silence_full + _SLACK_SECONDS)
            else:
                await send(writer, {"go": True, **told})
            async with asyncio.timeout(seconds):
                first = await take_frame(reader)
            if not first:
                return False
            try:
                if not await self._renames.attest(user, gone, later):
                    return False
            except DovecotError:
                # Without it dsync does not begin here.
                return False
            well = False
            began = time.time()
            self._renames.began(user)
            self._burials.open(user, began)
            traffic.count(len(first))
            local.write(first)
            clean = await self._relay((local_reader, local), (reader, writer), traffic, seconds)
            if clean:
                word = await receive(reader, _WORD_SECONDS)
                well, state = bool(word["well"]), str(word["state"])
            else:
                await _ended(local_reader, local)
            # If Dovecot is gone by now, the next run does this, or that of a user who has settled.
            with contextlib.suppress(DovecotError):
                await self._renames.ended(user, mine, theirs)
                await self._burials.end(user, began, changed=self._guests.changes(user))
            return clean
        except (DovecotError, ScriptError) as error:
            await send(writer, {"error": f"its Dovecot: {error}"})
            return False
        except TimeoutError:
            return False
        finally:
            if well and state:
                self._renames.tried(user, standing)
                # Without a state, something changed meanwhile: the peer has not done with it.
                if not standing.is_unsure:
                    self._renames.done(user, mine)
            self._guests.left(user, well=well, state=state, again=standing.is_unsure)
            if local is not None and traffic.size:
                local.transport.abort()
            elif local is not None:
                self._doveadm.leave(local)

    async def _relay(
        self,
        local: tuple[Reader, Writer],
        link: tuple[Reader, Writer],
        traffic: Traffic,
        seconds: float,
    ) -> bool:
        carrying = asyncio.create_task(relay(local, link, traffic))
        waiting = asyncio.create_task(silence(traffic, seconds + _ON_ITS_WAY_SECONDS))
        try:
            await asyncio.wait((carrying, waiting), return_when=asyncio.FIRST_COMPLETED)
            return carrying.done() and carrying.result()
        finally:
            self.bytes += traffic.size
            for task in (carrying, waiting):
                task.cancel()
            await asyncio.gather(carrying, waiting, return_exceptions=True)

    async def _repair(self, reader: Reader, writer: Writer, user: str) -> Told:
        """Returns what the peer has told by then; nothing if it is of an earlier release."""
        after = dict((await receive(reader, _REPAIR_SECONDS))["after"])
        box = await look(self._doveadm, self._states, user)
        await send(writer, {"moot": await asyncio.to_thread(lambda: listed(box.moot(after)))})
        moot = (await receive(reader, _REPAIR_SECONDS))["moot"]
        found = await asyncio.to_thread(lambda: box.only(all_of(moot)))
        await send(writer, found.document())
        said = await receive(reader, _REPAIR_SECONDS)
        await mend(self._doveadm, self._states, user, box, Plan.of(said))
        return Told.of(said.get("told"))

    async def _admit(self, user: str) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TURN_SECONDS), self._released:
                await self._released.wait_for(lambda: self._turns.admit(user))
                return True
        return False

    async def _notify(self) -> None:
        async with self._released:
            self._released.notify_all()


async def _ended(reader: Reader, writer: Writer) -> None:
    """Wait for a doveadm whose run broke off: it may be at work with what it has got."""
    with contextlib.suppress(OSError, TimeoutError):
        writer.write_eof()
        async with asyncio.timeout(_ENDS_SECONDS):
            while await reader.read(1 << 16):
                pass
