"""The socket on which `pairsync status`, `sync` and `refill` ask the daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairsync.link import LinkError, Reader, Writer, receive, send
from pairsync.schedule import Outcome

if TYPE_CHECKING:
    from pairsync.daemon import Daemon

_ASK_SECONDS = 5.0
_PROGRESS_SECONDS = 0.5


class Control:
    def __init__(self, path: Path, daemon: Daemon) -> None:
        self._path = path
        self._daemon = daemon

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, str(self._path))
        self._path.chmod(0o600)

    async def _accept(self, reader: Reader, writer: Writer) -> None:
        try:
            await self._answer(await receive(reader, _ASK_SECONDS), writer)
        except (OSError, LinkError):
            return
        finally:
            writer.close()

    async def _answer(self, request: dict[str, Any], writer: Writer) -> None:
        match request.get("do"):
            case "status":
                await send(writer, self._daemon.document())
            case "sync":
                result = await self._daemon.sync(str(request.get("user")))
                await send(
                    writer,
                    {
                        "ok": result.outcome is Outcome.OK,
                        "result": result.outcome.value,
                        "words": result.words,
                        "seconds": result.seconds,
                        "bytes": result.bytes,
                    },
                )
            case "refill":
                self._daemon.forget()
                self._daemon.want_pass("asked for")
                await asyncio.sleep(_PROGRESS_SECONDS)
                began = False
                while True:
                    document = self._daemon.document()
                    await send(writer, {key: document[key] for key in ("pass", "peer", "failing")})
                    began |= document["pass"] is not None
                    if began and document["pass"] is None:
                        return
                    await asyncio.sleep(_PROGRESS_SECONDS)
            case what:
                await send(writer, {"error": f"what is {what!r}?"})


async def ask(path: Path, request: dict[str, Any]) -> tuple[Reader, Writer]:
    """Ask the daemon at ``path``; answers are lines to :func:`pairsync.link.receive`.

    Raises OSError where no daemon runs.
    """
    reader, writer = await asyncio.open_unix_connection(str(path), limit=1 << 24)
    await send(writer, request)
    return reader, writer
