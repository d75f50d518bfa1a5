"""Serve: ``python3 -m mx CONFIG``."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path

from publicsuffix2 import PublicSuffixList  # type: ignore[import-not-found,unused-ignore]

from .server import Settings, run


def main(arguments: list[str]) -> int:
    """Run until SIGTERM."""
    if len(arguments) != 1:
        print("usage: python3 -m mx CONFIG", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    suffixes = PublicSuffixList()

    def organizational_domain(domain: str) -> str:
        return suffixes.get_sld(domain) or domain

    async def serve() -> None:
        task = asyncio.ensure_future(run(Settings.read(Path(arguments[0])), organizational_domain))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        await task

    try:
        asyncio.run(serve())
    except asyncio.CancelledError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
