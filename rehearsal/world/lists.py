"""The name server of block lists (DNSBL, RFC 5782), each with a will of its own.

``lists.py CONFIG``: the configuration is one JSON file (:class:`Settings`). What the lists know
and how they behave is changed while the program runs by replacing the control file, ``{"serial":
7, "lists": {zone: {"mode": "answer", "entries": {"2.0.0.127": ["127.0.0.2"]}}}}``; the program
answers in the state file with the serial it has carried out. Entries are names below the zone.
Every question leaves a line in the log.

Answers last a second, so that what is put into a list, or out of it, is seen at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

PORT = 53
TTL = 1
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Settings:
    """``server``: the name server's own name. ``zones``: absolute names of the lists."""

    addresses: tuple[str, ...]
    server: str
    zones: tuple[str, ...]
    control: Path
    state: Path
    log: Path

    @classmethod
    def read(cls, path: Path) -> Settings:
        value = json.loads(path.read_text(encoding="utf-8"))
        paths = {key: Path(value[key]) for key in ("control", "state", "log")}
        lists = {key: tuple(value[key]) for key in ("addresses", "zones")}
        return cls(**{**value, **paths, **lists})


@dataclass(frozen=True)
class BlockList:
    """What one list does: ``answer``, ``fail`` (SERVFAIL) or ``silent``; name -> answers."""

    mode: str = "answer"
    entries: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> BlockList:
        entries = {name.lower(): tuple(found) for name, found in value["entries"].items()}
        return cls(value["mode"], entries)


class Lists:
    """All lists, to ask."""

    def __init__(self, server: str, zones: tuple[str, ...]) -> None:
        self._server = server
        self._zones = {dns.name.from_text(zone): BlockList() for zone in zones}

    def obey(self, orders: Mapping[str, Mapping[str, Any]]) -> None:
        """Behave as the control file says; a list that it does not name knows nobody."""
        for zone in self._zones:
            value = orders.get(zone.to_text())
            self._zones[zone] = BlockList.parse(value) if value else BlockList()

    def answer(self, query: dns.message.Message) -> dns.message.Message | None:
        """The reply; None for silence."""
        reply = dns.message.make_response(query)
        question = query.question[0]
        zone = self._zone_of(question.name)
        if zone is None:
            reply.set_rcode(dns.rcode.REFUSED)
            return reply
        found = self._zones[zone]
        if found.mode == "silent":
            return None
        if found.mode == "fail":
            reply.set_rcode(dns.rcode.SERVFAIL)
            return reply
        reply.flags |= dns.flags.AA
        data = self._data(zone, found, question.name, question.rdtype)
        if data:
            kind = dns.rdatatype.to_text(question.rdtype)
            reply.answer.append(dns.rrset.from_text(question.name, TTL, "IN", kind, *data))
            return reply
        reply.authority.append(dns.rrset.from_text(zone, TTL, "IN", "SOA", self._soa))
        below = question.name.relativize(zone).to_text().lower()
        exists = question.name == zone or any(
            name == below or name.endswith(f".{below}") for name in found.entries
        )
        if not exists:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        return reply

    def _zone_of(self, name: dns.name.Name) -> dns.name.Name | None:
        inside = [zone for zone in self._zones if name.is_subdomain(zone)]
        return max(inside, key=len, default=None)

    def _data(
        self,
        zone: dns.name.Name,
        found: BlockList,
        name: dns.name.Name,
        kind: dns.rdatatype.RdataType,
    ) -> tuple[str, ...]:
        if name == zone:
            own = {dns.rdatatype.SOA: self._soa, dns.rdatatype.NS: f"{self._server}."}
            return (own[kind],) if kind in own else ()
        answers = found.entries.get(name.relativize(zone).to_text().lower(), ())
        if kind == dns.rdatatype.A:
            return answers
        if kind == dns.rdatatype.TXT and answers:
            return (f'"listed in the rehearsal with {" ".join(answers)}"',)
        return ()

    @property
    def _soa(self) -> str:
        return f"{self._server}. dns.{self._server}. 1 3600 600 604800 {TTL}"


class _Port(asyncio.DatagramProtocol):
    """One address that questions come to."""

    def __init__(self, lists: Lists, log: Path) -> None:
        self._lists = lists
        self._log = log
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport)
        self._transport = transport

    def datagram_received(self, data: bytes, peer: tuple[Any, ...]) -> None:
        try:
            query = dns.message.from_wire(data)
        except dns.exception.DNSException:
            return
        if not query.question:
            return
        question = query.question[0]
        line = {
            "at": time.time(),
            "peer": peer[0],
            "name": question.name.to_text().lower(),
            "type": dns.rdatatype.to_text(question.rdtype),
        }
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        reply = self._lists.answer(query)
        if reply is not None and self._transport is not None:
            self._transport.sendto(reply.to_wire(), peer)


async def serve(settings: Settings) -> None:
    """Serve until the task is cancelled."""
    lists = Lists(settings.server, settings.zones)
    loop = asyncio.get_running_loop()
    for address in settings.addresses:
        await loop.create_datagram_endpoint(
            lambda: _Port(lists, settings.log), local_addr=(address, PORT)
        )
    seen = None
    while True:
        stamp = _stamp(settings.control)
        if stamp != seen or seen is None:
            seen = stamp or (0, 0)
            orders: dict[str, Any] = {"serial": 0, "lists": {}}
            with contextlib.suppress(FileNotFoundError):
                orders = json.loads(settings.control.read_text(encoding="utf-8"))
            lists.obey(orders["lists"])
            new = settings.state.with_suffix(".new")
            new.write_text(json.dumps({"serial": orders["serial"]}), encoding="utf-8")
            new.replace(settings.state)
            _notify("READY=1")
        await asyncio.sleep(_POLL_SECONDS)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes whenever the file is replaced."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _notify(text: str) -> None:
    """Tell systemd (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.connect("\0" + address[1:] if address.startswith("@") else address)
            out.send(text.encode())


def main(arguments: list[str]) -> int:
    """Run until SIGTERM."""
    if len(arguments) != 1:
        print("usage: lists.py CONFIG", file=sys.stderr)
        return 2

    async def run() -> None:
        task = asyncio.ensure_future(serve(Settings.read(Path(arguments[0]))))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        await task

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
