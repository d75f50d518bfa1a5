"""Carries a run's bytes between the local doveadm and the peer.

On the link they are in frames, so that it outlives the run and carries the next: four bytes of
length, big-endian, and as many of dsync's; a length of 0 ends the sender's stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from dataclasses import dataclass, field

from pairsync.link import Closed, LinkError, Reader, Writer

_CHUNK = 1 << 16
_END_SECONDS = 4.0
_LENGTH = struct.Struct(">I")
_STORED_AT_ONCE, _STORED_PER_SECOND = 1 << 22, 1 << 18
LONGEST_SILENCE = 600.0
"""After so long, the dsync that the other one asked ends by itself."""


@dataclass
class Traffic:
    """How much went through, and when something last did (monotonic seconds)."""

    size: int = 0
    last: float = field(default_factory=time.monotonic)

    def count(self, size: int) -> None:
        self.size += size
        self.last = time.monotonic()


def put_frame(link: Writer, data: bytes) -> None:
    """Write a frame; without data, the end of this side's stream."""
    link.write(_LENGTH.pack(len(data)) + data)


async def take_frame(link: Reader) -> bytes:
    """The next frame, empty: the end of the other side's stream. Raises :class:`LinkError`."""
    try:
        (length,) = _LENGTH.unpack(await link.readexactly(_LENGTH.size))
        if length > _CHUNK:
            raise LinkError("not a frame of pairsync")
        return await link.readexactly(length)
    except asyncio.IncompleteReadError:
        raise Closed("the other side closed the connection") from None
    except OSError as error:
        raise LinkError(str(error)) from error


async def relay(
    local: tuple[Reader, Writer], link: tuple[Reader, Writer], traffic: Traffic
) -> bool:
    """Carry bytes both ways until either side ends, and the other soon after.

    Returns whether both streams were ended, so that the link can carry another run.
    """
    ways = (
        asyncio.create_task(_send(local[0], link[1], traffic)),
        asyncio.create_task(_receive(link[0], local[1], traffic)),
    )
    try:
        done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        if all(way.result() for way in done):
            await asyncio.wait(ways, timeout=_END_SECONDS)
        return all(way.done() and way.result() for way in ways)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _send(local: Reader, link: Writer, traffic: Traffic) -> bool:
    try:
        while data := await _read(local):
            traffic.count(len(data))
            put_frame(link, data)
            await link.drain()
        put_frame(link, b"")
        await link.drain()
    except OSError:
        return False
    return True


async def _read(local: Reader) -> bytes:
    """What doveadm says; one that is gone has said all."""
    try:
        return await local.read(_CHUNK)
    except OSError:
        return b""


async def _receive(link: Reader, local: Writer, traffic: Traffic) -> bool:
    try:
        while data := await take_frame(link):
            traffic.count(len(data))
            # A doveadm that is gone wants no more; the other side learns it from our end.
            with contextlib.suppress(OSError):
                local.write(data)
                await local.drain()
        with contextlib.suppress(OSError):
            local.write_eof()
    except LinkError:
        return False
    return True


def patience(seconds: float, size: int) -> float:
    """How many seconds a run may be silent that has carried so many bytes.

    dsync stores most of what it was sent after the last of it has come, and writes the folder's
    index anew for each hundred mails: a minute or more for 30,000 mails on a loaded machine.
    """
    stored = max(0, size - _STORED_AT_ONCE) / _STORED_PER_SECOND
    return min(LONGEST_SILENCE, seconds + stored)


async def silence(traffic: Traffic, seconds: float) -> None:
    """Return when nothing has gone through for ``seconds``, or more where much has."""
    while (rest := traffic.last + patience(seconds, traffic.size) - time.monotonic()) > 0:
        await asyncio.sleep(rest)
