"""A connection between the two daemons that carries one run after the other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from pairsync.link import LinkError, Reader, Writer
from pairsync.relay import Traffic, patience, put_frame, relay, silence, take_frame

Ends = tuple[Reader, Writer]


async def _pipe() -> tuple[Ends, Ends]:
    one, other = socket.socketpair()
    return (
        await asyncio.open_connection(sock=one),
        await asyncio.open_connection(sock=other),
    )


async def _carried(
    here: Callable[[Reader, Writer], Awaitable[None]],
    there: Callable[[Reader, Writer], Awaitable[None]],
    link: tuple[Ends, Ends],
) -> tuple[bool, bool]:
    """Let two doveadms talk over a link. Returns what each daemon's relay says."""
    (doveadm, slot), (server, local) = await _pipe(), await _pipe()
    async with asyncio.timeout(10):
        *clean, _, _ = await asyncio.gather(
            relay(slot, link[0], Traffic()),
            relay(local, link[1], Traffic()),
            here(*doveadm),
            there(*server),
        )
    return clean[0], clean[1]


async def _ask(reader: Reader, writer: Writer) -> None:
    writer.write(b"question" * 50_000)
    await writer.drain()
    assert await reader.readexactly(6) == b"answer"
    writer.close()


async def _answer(reader: Reader, writer: Writer) -> None:
    assert await reader.readexactly(400_000) == b"question" * 50_000
    writer.write(b"answer")
    # What the other one's end brings here.
    assert await reader.read() == b""
    writer.close()


async def _hang_up(reader: Reader, writer: Writer) -> None:
    writer.transport.abort()


async def _wait(reader: Reader, writer: Writer) -> None:
    assert await reader.read() == b""
    writer.close()


def test_a_link_carries_one_run_after_the_other() -> None:
    async def work() -> None:
        link = await _pipe()
        for here, there in ((_ask, _answer), (_hang_up, _wait), (_wait, _hang_up), (_ask, _answer)):
            assert await _carried(here, there, link) == (True, True)
        link[0][1].write(b"a line\n")
        assert await link[1][0].readline() == b"a line\n"

    asyncio.run(work())


def test_a_link_that_breaks_off_carries_no_more() -> None:
    async def work() -> None:
        link = await _pipe()

        async def cut(reader: Reader, writer: Writer) -> None:
            put_frame(link[0][1], b"some")
            assert await reader.readexactly(4) == b"some"
            link[0][1].transport.abort()

        server, local = await _pipe()
        async with asyncio.timeout(10):
            clean, _ = await asyncio.gather(relay(local, link[1], Traffic()), cut(*server))
        assert not clean
        with pytest.raises(LinkError):
            await take_frame(link[1][0])

    asyncio.run(work())


def test_what_is_no_frame_is_refused() -> None:
    async def work() -> None:
        (_, writer), (reader, _) = await _pipe()
        writer.write(b'{"go": true}\n')
        with pytest.raises(LinkError, match="not a frame"):
            await take_frame(reader)

    asyncio.run(work())


def test_a_run_that_has_carried_much_may_be_silent_for_longer_but_not_for_good() -> None:
    """Seen: 100,000 mails were stored for 30 seconds after the last of them had come."""
    assert patience(5.0, 0) == patience(5.0, 1 << 22) == 5.0
    assert patience(30.0, 286_000_000) > 300
    assert patience(30.0, 1 << 40) == 600

    async def work() -> None:
        async with asyncio.timeout(5):
            await silence(Traffic(size=1000), 0.01)

    asyncio.run(work())
