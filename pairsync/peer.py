"""The other server, as this one sees it: is it there, and connections to it for runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pairsync.config import Config
from pairsync.link import (
    LINE_LIMIT,
    Closed,
    Identity,
    LinkError,
    Reader,
    Tls,
    Writer,
    greet,
    receive,
    send,
)
from pairsync.told import Standing, Told

_CONNECT_SECONDS = 2.0
_ANSWER_SECONDS = 6.0
_RETRY_FIRST, _RETRY_MAX = 0.3, 1.5
_LINK_SECONDS = 300.0


class PeerBusy(Exception):
    """The peer is at this user itself."""


class PeerAway(Exception):
    """The peer cannot be reached at the moment."""


@dataclass(frozen=True)
class Link:
    """A connection to the peer that carries one run after the other; ``made`` (monotonic)."""

    made: float
    reader: Reader
    writer: Writer

    @property
    def is_over(self) -> bool:
        """Whether it is closed, or so old that secret and certificate should be shown again."""
        closed = self.reader.at_eof() or self.writer.is_closing()
        return closed or self.made < time.monotonic() - _LINK_SECONDS


@dataclass(frozen=True)
class Grant:
    """The peer agrees to a run.

    ``deleted``: Sieve scripts that were deleted there -> version. ``told``: of folders that were
    made, renamed and deleted there. ``standing``: what it found in them. ``repair``: None, or what
    both had after the last good run that the peer knows of; then it waits for
    :mod:`pairsync.repair`. ``broken``: as far as it knows, a run broke off since.
    """

    link: Link
    deleted: Mapping[str, float]
    told: Told
    standing: Standing
    repair: Mapping[str, int] | None
    broken: bool


class Peer:
    """Keeps one connection for heartbeats, and a few more that runs can take at once.

    ``on_up`` is called with who answers, ``on_down`` when the peer is lost.
    """

    def __init__(
        self,
        config: Config,
        tls: Tls,
        secret: Callable[[], bytes],
        me: Identity,
        on_up: Callable[[Identity], None],
        on_down: Callable[[], None],
    ) -> None:
        self._config = config
        self._tls = tls
        self._secret = secret
        self._me = me
        self._on_up = on_up
        self._on_down = on_down
        self._idle: deque[Link] = deque()
        self._taken = 0
        self._wanted = asyncio.Event()
        self.up = False
        self.changed_at = time.time()
        self.problem = "not tried yet"
        self.round_trip = 0.0

    async def keep(self) -> None:
        """Connect, send heartbeats, and begin anew whenever the peer is lost; never returns."""
        wait = _RETRY_FIRST
        while True:
            try:
                reader, writer, who = await self._connect()
            except (LinkError, PeerAway) as error:
                self.problem = str(error)
            else:
                wait = _RETRY_FIRST
                await self._watch(reader, writer, who)
            await asyncio.sleep(wait)
            wait = min(_RETRY_MAX, wait * 1.5)

    async def open_run(
        self,
        user: str,
        silence: float,
        deleted: Mapping[str, float],
        told: Told,
        *,
        suspect: bool,
    ) -> Grant:
        """Ask for a run. Raises :class:`PeerBusy`, :class:`PeerAway`, :class:`LinkError`."""
        request = {
            "do": "run",
            "user": user,
            "silence": silence,
            "deleted": dict(deleted),
            "told": told.document(),
            "suspect": suspect,
        }
        while True:
            kept, link = await self._take()
            try:
                await send(link.writer, request)
                answer = await receive(link.reader, _ANSWER_SECONDS)
            except (OSError, LinkError) as error:
                self._release(link, keep=False)
                if kept and isinstance(error, (Closed, OSError)):
                    continue
                raise error if isinstance(error, LinkError) else LinkError(str(error)) from error
            except BaseException:
                self._release(link, keep=False)
                raise
            if answer.get("busy"):
                self._release(link, keep=True)
                raise PeerBusy
            return Grant(
                link,
                _times(answer.get("deleted")),
                Told.of(answer.get("told")),
                Standing.of(answer),
                answer.get("repair"),
                bool(answer.get("broken")),
            )

    def finish(self, grant: Grant, *, clean: bool, well: bool, state: str) -> None:
        """A run has ended, ``well`` or not; a ``clean`` connection is kept for the next.

        Without that word the peer takes a run for broken off, if its dsync began. ``state``: what
        dsync gave as its state, if it did.
        """
        if clean:
            word = {"well": well, "state": state}
            grant.link.writer.write(json.dumps(word).encode() + b"\n")
        self._release(grant.link, keep=clean)

    async def keep_idle(self) -> None:
        """Have connections at hand, so that no run waits for a handshake; never returns."""
        while True:
            await self._wanted.wait()
            self._drop_old()
            if not self.up or len(self._idle) + self._taken >= self._config.sync.parallel:
                self._wanted.clear()
                continue
            try:
                link = await self._new()
            except (LinkError, PeerAway):
                await asyncio.sleep(_RETRY_FIRST)
                continue
            if self.up:
                self._idle.append(link)
            else:
                link.writer.transport.abort()

    async def _take(self) -> tuple[bool, Link]:
        self._drop_old()
        self._wanted.set()
        if self._idle:
            self._taken += 1
            return True, self._idle.popleft()
        if not self.up:
            raise PeerAway(self.problem)
        link = await self._new()
        self._taken += 1
        return False, link

    def _release(self, link: Link, *, keep: bool) -> None:
        self._taken -= 1
        if keep and self.up and not link.is_over:
            self._idle.append(link)
        elif keep:
            link.writer.close()  # What was written is still sent.
        else:
            link.writer.transport.abort()

    async def _new(self) -> Link:
        reader, writer, _ = await self._connect()
        return Link(time.monotonic(), reader, writer)

    def _drop_old(self) -> None:
        for _ in range(len(self._idle)):
            link = self._idle.popleft()
            if link.is_over:
                link.writer.transport.abort()
            else:
                self._idle.append(link)

    async def _connect(self) -> tuple[Reader, Writer, Identity]:
        peer = self._config.peer
        where = peer.address or peer.name
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(
                    where,
                    peer.port,
                    ssl=self._tls.client,
                    server_hostname=peer.name,
                    ssl_shutdown_timeout=1.0,
                    limit=LINE_LIMIT,
                )
        except TimeoutError:
            raise PeerAway(f"{where}: no answer within {_CONNECT_SECONDS:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise LinkError(f"{peer.name}: certificate refused: {error.verify_message}") from error
        except (OSError, ssl.SSLError) as error:
            raise PeerAway(f"{where}: {error.strerror or error}") from error
        try:
            without_delay(writer)
            who = await greet(reader, writer, self._secret(), self._me, _ANSWER_SECONDS)
            if who.name != peer.name:
                raise LinkError(f"it calls itself {who.name}, not {peer.name}: see both `name`s")
        except OSError as error:
            writer.transport.abort()
            raise PeerAway(f"{where}: {error}") from error
        except BaseException:
            writer.transport.abort()
            raise
        return reader, writer, who

    async def _watch(self, reader: Reader, writer: Writer, who: Identity) -> None:
        beat = self._config.heartbeat
        lost = ""
        try:
            await send(writer, {"do": "watch"})
            self.up, self.problem, self.changed_at = True, "", time.time()
            self._wanted.set()
            self._on_up(who)
            number = 0
            while True:
                number += 1
                began = time.monotonic()
                await send(writer, {"ping": number})
                await receive(reader, beat.lost_after)
                self.round_trip = time.monotonic() - began
                self._wanted.set()
                await asyncio.sleep(beat.interval)
        except (OSError, LinkError) as error:
            lost = str(error) or type(error).__name__
        finally:
            writer.transport.abort()
            self.up, self.changed_at = False, time.time()
            self.problem = f"lost: {lost}"
            while self._idle:
                self._idle.popleft().writer.transport.abort()
            self._on_down()


def _times(document: Any) -> dict[str, float]:
    if not isinstance(document, dict):
        return {}
    return {str(name): float(when) for name, when in document.items()}


def without_delay(writer: Writer) -> None:
    """Send small pieces at once, and notice dead connections that nobody writes to."""
    with contextlib.suppress(OSError):
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
