"""Carries a run's bytes between the local doveadm and the peer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field

from pairsync.link import Reader, Writer

_CHUNK = 1 << 16
_CLOSE_SECONDS = 2.0


@dataclass
class Traffic:
    """How much went through, and when something last did (monotonic seconds)."""

    size: int = 0
    last: float = field(default_factory=time.monotonic)

    def count(self, size: int) -> None:
        self.size += size
        self.last = time.monotonic()


async def relay(one: tuple[Reader, Writer], other: tuple[Reader, Writer], traffic: Traffic) -> None:
    """Carry bytes both ways until either side ends; what was read is delivered, then both close."""
    ways = (
        asyncio.create_task(_carry(one[0], other[1], traffic)),
        asyncio.create_task(_carry(other[0], one[1], traffic)),
    )
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await asyncio.gather(*map(_close, (one[1], other[1])))


async def _close(writer: Writer) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _carry(reader: Reader, writer: Writer, traffic: Traffic) -> None:
    try:
        while data := await reader.read(_CHUNK):
            traffic.count(len(data))
            writer.write(data)
            await writer.drain()
    except OSError:
        return


async def silence(traffic: Traffic, seconds: float) -> None:
    """Return when nothing has gone through for ``seconds``."""
    while (rest := traffic.last + seconds - time.monotonic()) > 0:
        await asyncio.sleep(rest)
