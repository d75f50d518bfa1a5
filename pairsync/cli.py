"""The command line."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pairsync import config as configuration
from pairsync import status
from pairsync.config import Config, ConfigError, read_secret
from pairsync.control import ask
from pairsync.daemon import Daemon
from pairsync.doveadm import Doveadm, DovecotError
from pairsync.link import LinkError, Tls, receive

FINE, WRONG, USAGE, NOT_RUNNING = 0, 1, 2, 3
_STATUS_SECONDS = 10.0
_CONNECT_SECONDS = 5.0


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="pairsync", description="Keeps two Dovecots equal.")
    parser.add_argument("--config", type=Path, default=configuration.PATH, metavar="FILE")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("daemon", help="keep this server equal to its peer, in the foreground")
    shown = commands.add_parser("status", help="how it is")
    shown.add_argument("--json", action="store_true", help="all of it, for programs")
    one = commands.add_parser("sync", help="a full run for a user, now")
    one.add_argument("user")
    commands.add_parser("refill", help="a full run for every user, with its progress")
    commands.add_parser("check", help="what is wrong with configuration, Dovecot and the peer")
    arguments = parser.parse_args(argv)
    try:
        config = configuration.load(arguments.config)
        match arguments.command:
            case "daemon":
                asyncio.run(_daemon(config))
                return FINE
            case "status":
                return asyncio.run(_status(config, as_json=arguments.json))
            case "sync":
                return asyncio.run(_sync(config, arguments.user))
            case "refill":
                return asyncio.run(_refill(config))
            case _:
                return asyncio.run(_check(config))
    except ConfigError as error:
        print(f"pairsync: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return WRONG


async def _daemon(config: Config) -> None:
    await Daemon(config).run()


async def _asked(config: Config, request: dict[str, Any]) -> Any:
    try:
        return await ask(config.files.run / "control", request)
    except OSError:
        print("pairsync: the daemon does not run: systemctl start pairsync", file=sys.stderr)
        return None


async def _status(config: Config, *, as_json: bool) -> int:
    connection = await _asked(config, {"do": "status"})
    if connection is None:
        return NOT_RUNNING
    try:
        document = await receive(connection[0], _STATUS_SECONDS)
    except LinkError as error:
        print(f"pairsync: the daemon does not answer: {error}", file=sys.stderr)
        return NOT_RUNNING
    print(json.dumps(document, indent=1) if as_json else status.page(document))
    return WRONG if status.problems(document) else FINE


async def _sync(config: Config, user: str) -> int:
    connection = await _asked(config, {"do": "sync", "user": user})
    if connection is None:
        return NOT_RUNNING
    answer = await receive(connection[0], None)
    took = f"{answer['seconds']:.2f} s, {answer['bytes']} bytes"
    print(f"{user}: {answer['result']}, {took}{_after(answer['words'])}")
    return FINE if answer["ok"] else WRONG


async def _refill(config: Config) -> int:
    connection = await _asked(config, {"do": "refill"})
    if connection is None:
        return NOT_RUNNING
    document: dict[str, Any] = {}
    shown = ""
    while True:
        try:
            document = await receive(connection[0], None)
        except LinkError:
            break
        line = _progress(document)
        if line != shown:
            print(line, flush=True)
            shown = line
    if not document or document["pass"] is not None:
        print("pairsync: the daemon ended before the refill did; it goes on when it is back")
        return WRONG
    return WRONG if document["failing"] else FINE


def _progress(document: dict[str, Any]) -> str:
    if document["pass"] is None:
        if not document["peer"]["up"]:
            return f"waiting for the peer: {document['peer']['problem']}"
        failing = sorted(document["failing"])
        if failing:
            return f"done, but for {len(failing)} that are tried again: {', '.join(failing[:5])}"
        return "done"
    done, total = document["pass"]["done"], document["pass"]["total"]
    seconds, size = document["pass"]["seconds"], document["pass"]["bytes"] / 1e6
    per_second = 1 / max(seconds, 0.1)
    line = f"{done} of {total} users, {size:.1f} MB, {seconds:.0f} s"
    line += f", {done * per_second:.1f} users/s, {size * per_second:.1f} MB/s"
    if failed := document["pass"]["failed"]:
        line += f", failed so far and tried again: {', '.join(failed[:5])}"
    return line


async def _check(config: Config) -> int:
    checks: list[tuple[str, Callable[[], Any]]] = [
        ("secret", lambda: read_secret(config.files.secret)),
        ("certificate", lambda: _check_certificate(config)),
        ("homes", lambda: _check_homes(config)),
    ]
    wrong = 0
    for name, check in checks:
        try:
            check()
        except (ConfigError, OSError) as error:
            wrong += 1
            print(f"{name}: {error}")
    wrong += await _check_dovecot(config)
    wrong += await _check_daemon(config)
    print("nothing is wrong" if not wrong else f"{wrong} things are wrong")
    return WRONG if wrong else FINE


def _check_certificate(config: Config) -> None:
    if problem := Tls(config.tls).problem:
        raise ConfigError(problem)


def _check_homes(config: Config) -> None:
    if not config.dovecot.homes.is_dir():
        raise ConfigError(f"{config.dovecot.homes} is no folder; see [dovecot] homes")


async def _check_dovecot(config: Config) -> int:
    try:
        async with asyncio.timeout(_STATUS_SECONDS):
            users = await Doveadm(config.dovecot.socket).users()
    except (DovecotError, TimeoutError) as error:
        print(f"dovecot: {error or 'no answer'}")
        return 1
    if not users:
        print("dovecot: it lists no users; its userdb must be one that can be iterated")
        return 1
    return 0


async def _check_daemon(config: Config) -> int:
    connection = await _asked(config, {"do": "status"})
    if connection is None:
        return 1
    document = await receive(connection[0], _STATUS_SECONDS)
    found = status.problems(document)
    for problem in found:
        print(f"daemon: {problem}")
    return len(found)


def _after(words: str) -> str:
    return f": {words}" if words else ""
