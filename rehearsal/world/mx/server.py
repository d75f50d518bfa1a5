"""Mail servers with a will of their own: each listens on its two addresses and has a mode.

The configuration is one JSON file (:class:`Settings`). Modes are changed while the program runs
by replacing the control file, ``{"serial": 7, "modes": {"flaky": "accept"}}``; the program
answers in the state file with the serial it has carried out.

For every message there are two files in the server's folder, the ``.eml`` as it was received
and then, complete from its first moment, the ``.json`` with the envelope, the connection and the
verdict. Every recipient and message that was answered leaves a line in ``log.jsonl`` too,
refused ones as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, Envelope, Session

from . import judge

PORT = 25
_POLL_SECONDS = 0.1
_LARGEST_MESSAGE = 64 * 1024 * 1024
_DEMANDS: dict[str, Callable[[judge.Verdict], str | None]] = {
    "nothing": lambda verdict: None,
    "authorized": judge.unauthorized,
    "everything": judge.objection,
}


@dataclass(frozen=True)
class Certificate:
    """Paths of a PEM chain and its key."""

    chain: str
    key: str

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.chain, self.key)
        return context


@dataclass(frozen=True)
class ServerSettings:
    """One mail server. ``domains``: it takes mail for these and what is below them.

    ``mailboxes``: in these domains only these users exist, with any extension (``user+tag``).
    ``certificate`` is None where STARTTLS is not offered; ``wrong`` is what it presents in the
    mode of that name. ``demands``: what it refuses for, see :data:`_DEMANDS`.
    """

    name: str
    host: str
    addresses: tuple[str, ...]
    domains: tuple[str, ...]
    mailboxes: dict[str, list[str]]
    mode: str
    demands: str
    certificate: Certificate | None
    wrong: Certificate | None

    @classmethod
    def parse(cls, value: dict[str, Any]) -> ServerSettings:
        certificates = {
            key: Certificate(**value[key]) if value[key] else None
            for key in ("certificate", "wrong")
        }
        lists = {key: tuple(value[key]) for key in ("addresses", "domains")}
        return cls(**{**value, **certificates, **lists})


@dataclass(frozen=True)
class Settings:
    """``mail``: folder with one folder per server. ``control``, ``state``: see the module."""

    mail: Path
    control: Path
    state: Path
    servers: tuple[ServerSettings, ...]

    @classmethod
    def read(cls, path: Path) -> Settings:
        value = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            Path(value["mail"]),
            Path(value["control"]),
            Path(value["state"]),
            tuple(ServerSettings.parse(server) for server in value["servers"]),
        )


class MailServer:
    """One mail server: its listeners, and aiosmtpd's handler for their sessions."""

    def __init__(
        self,
        settings: ServerSettings,
        mail: Path,
        judges: ThreadPoolExecutor,
        organizational_domain: Callable[[str], str],
    ) -> None:
        self.settings = settings
        self.mode = settings.mode
        self._folder = mail / settings.name
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._judges = judges
        self._organizational_domain = organizational_domain
        self._context = settings.certificate.context() if settings.certificate else None
        self._wrong = settings.wrong.context() if settings.wrong else None
        self._listeners: list[asyncio.Server] = []
        self._sessions: set[_Session] = set()
        self._count = 0

    async def set_mode(self, mode: str) -> None:
        """Change the mode; open sessions end, so that nothing of the old mode goes on."""
        if mode != self.mode:
            self.mode = mode
            for session in tuple(self._sessions):
                session.cut()
        await self.listen()

    async def listen(self) -> None:
        """Listen or stop listening, as the mode says."""
        if self.mode == "down":
            for listener in self._listeners:
                listener.close()
            self._listeners = []
        elif not self._listeners:
            loop = asyncio.get_running_loop()
            self._listeners = [
                await loop.create_server(self._session, address, PORT, backlog=256)
                for address in self.settings.addresses
            ]

    def _session(self) -> _Session:
        context = self._wrong if self.mode == "wrong-certificate" else self._context
        return _Session(self, self._sessions, self.settings.host, context)

    # aiosmtpd's handler -------------------------------------------------------------------

    async def handle_RCPT(
        self,
        server: SMTP,
        session: Session,
        envelope: Envelope,
        address: str,
        options: list[str],
    ) -> str:
        reply = self._recipient_reply(address)
        if reply.startswith("250"):
            envelope.rcpt_tos.append(address)
        self._log(session, envelope, "rcpt", address, reply)
        return reply

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        content = envelope.original_content or b""
        sender = _sender(envelope)
        peer = session.peer[0] if session.peer else ""
        helo = session.host_name or ""

        def verify() -> judge.Verdict:
            return judge.judge(
                content,
                peer=peer,
                helo=helo,
                sender=sender,
                organizational_domain=self._organizational_domain,
            )

        verdict = await asyncio.get_running_loop().run_in_executor(self._judges, verify)
        objection = _DEMANDS[self.settings.demands](verdict)
        self._count += 1
        name = f"{time.time_ns()}-{self._count:06d}"
        reply = objection or f"250 2.0.0 {name} kept"
        self._store(
            name,
            content,
            {
                "id": name,
                "mx": self.settings.name,
                "at": time.time(),
                "peer": peer,
                "helo": helo,
                "tls": _tls(server),
                "mail_from": sender,
                "rcpt_to": list(envelope.rcpt_tos),
                "size": len(content),
                "accepted": objection is None,
                "reply": reply,
                **verdict.record(),
            },
        )
        self._log(session, envelope, "data", ", ".join(envelope.rcpt_tos), reply)
        return reply

    async def handle_exception(self, error: Exception) -> str:
        logging.error("%s: a session failed", self.settings.name, exc_info=error)
        return "451 4.3.0 Error in the rehearsal's mail server"

    def _recipient_reply(self, address: str) -> str:
        local, _, domain = address.lower().rpartition("@")
        if not any(domain == d or domain.endswith(f".{d}") for d in self.settings.domains):
            return "550 5.7.1 Relaying denied"
        users = self.settings.mailboxes.get(domain)
        if users is not None and local.partition("+")[0] not in users:
            return "550 5.1.1 User unknown"
        if self.mode == "defer":
            return "451 4.3.0 Try again later"
        if self.mode == "refuse":
            return "550 5.1.1 User unknown"
        return "250 2.1.5 Recipient taken"

    def _store(self, name: str, content: bytes, record: dict[str, Any]) -> None:
        """Keep a message for good before its sender is told so."""
        for suffix, data in (
            (".eml", content),
            (".json", json.dumps(record, indent=1).encode()),
        ):
            path = self._folder / f"{name}{suffix}"
            new = path.with_name(f".{path.name}")
            with new.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)

    def _log(
        self, session: Session, envelope: Envelope, event: str, recipient: str, reply: str
    ) -> None:
        line = {
            "at": time.time(),
            "event": event,
            "peer": session.peer[0] if session.peer else "",
            "helo": session.host_name or "",
            "mail_from": _sender(envelope),
            "rcpt_to": recipient,
            "reply": reply,
        }
        with (self._folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class _Session(SMTP):
    """One connection; known to its server, which can cut it."""

    def __init__(
        self,
        handler: MailServer,
        known: set[_Session],
        host: str,
        context: ssl.SSLContext | None,
    ) -> None:
        super().__init__(
            handler,
            hostname=host,
            ident="ESMTP",
            tls_context=context,
            data_size_limit=_LARGEST_MESSAGE,
            auth_exclude_mechanism=("LOGIN", "PLAIN"),
            timeout=300,
        )
        self._known = known

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._known.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._known.discard(self)
        super().connection_lost(error)

    def cut(self) -> None:
        if isinstance(self.transport, asyncio.Transport):
            self.transport.abort()


def _sender(envelope: Envelope) -> str:
    """The envelope sender; empty for a bounce, where aiosmtpd says ``<>``."""
    return (envelope.mail_from or "").removeprefix("<>")


def _tls(server: SMTP) -> dict[str, str] | None:
    """What was negotiated; None without TLS."""
    transport = server.transport
    connection = transport.get_extra_info("ssl_object") if transport else None
    if connection is None:
        return None
    cipher = connection.cipher()
    return {"version": connection.version() or "", "cipher": cipher[0] if cipher else ""}


async def run(settings: Settings, organizational_domain: Callable[[str], str]) -> None:
    """Serve until the task is cancelled."""
    with ThreadPoolExecutor(4, thread_name_prefix="judge") as judges:
        servers = {
            server.name: MailServer(server, settings.mail, judges, organizational_domain)
            for server in settings.servers
        }
        for server in servers.values():
            await server.listen()
        seen = None
        while True:
            stamp = _stamp(settings.control)
            if stamp != seen or seen is None:
                seen = stamp or (0, 0)
                await _obey(settings, servers)
                _notify("READY=1")
            await asyncio.sleep(_POLL_SECONDS)


async def _obey(settings: Settings, servers: dict[str, MailServer]) -> None:
    """Carry out the control file, and say so."""
    orders: dict[str, Any] = {"serial": 0, "modes": {}}
    with contextlib.suppress(FileNotFoundError):
        orders = json.loads(settings.control.read_text(encoding="utf-8"))
    for name, server in servers.items():
        await server.set_mode(orders["modes"].get(name, server.settings.mode))
    answer = {
        "serial": orders["serial"],
        "modes": {name: server.mode for name, server in servers.items()},
    }
    new = settings.state.with_suffix(".new")
    new.write_text(json.dumps(answer), encoding="utf-8")
    new.replace(settings.state)


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
