"""What the two daemons say to each other, and how each proves who it is.

TLS 1.3; the one that connects verifies the other's certificate and name. Then one JSON document a
line. Each proves that it knows the shared secret, without showing it, before it says more::

    server: {"pairsync": 1, "nonce": N}
    client: {"nonce": M, "proof": HMAC("client" N M), "name": ...}
    server: {"proof": HMAC("server" N M), "name": ..., "boot": ..., "store": ...}
    client: {"do": "watch"} and then {"ping": i} again and again, each answered; or
            {"do": "run", "user": ..., "silence": seconds, "deleted": {script: version},
             "told": of folders made, renamed and deleted (pairsync.told.Told),
             "suspect": whether to compare first}
    server: {"go": true, "deleted": {...}, "told": {...}, "stay": folders, "carried": mails by
             folder, "unsure": whether it has to do a run of its own (the three:
             pairsync.told.Standing)}, or {"busy": true}, or,
            where one of the two suspects that mails were left out (pairsync.repair),
            {"repair": {folder: uid}, "broken": whether a run broke off}, and the rest as before
    client: {"after": {folder: uid}}
    server: {"moot": {folder: [guid]}}
    client: {"moot": {folder: [guid]}}, with its own
    server: {"histories": {folder: [[uid, guid, ...]]}} of those
    client: {"expunge": {folder: [[uid, guid]]}, "renumber": {folder: [uid]},
             "doubles": {folder: [[uid, guid]]}, "used": {folder: uid}} (pairsync.repair.Plan),
             and "told" once more
    server: {"go": true, "told": once more}
    both:   the bytes of dsync in frames (pairsync.relay), until both have ended
    client: {"well": whether the run ended well, "state": dsync's after it}, then the next "run"
    server: {"error": ...} in place of any of its lines
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairsync import locks
from pairsync.config import TlsConfig

PROTOCOL = 2
LINE_LIMIT = 1 << 26
Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter


class LinkError(Exception):
    """The other daemon cannot be reached, or does not say what it should."""


class Closed(LinkError):
    """The other side closed the connection."""


@dataclass(frozen=True)
class Identity:
    """Who somebody is: name, the machine's boot, and the folder of homes that it has."""

    name: str
    boot: str
    store: str

    def document(self) -> dict[str, str]:
        return {"name": self.name, "boot": self.boot, "store": self.store}

    @classmethod
    def of(cls, document: dict[str, Any]) -> Identity:
        try:
            return cls(str(document["name"]), str(document["boot"]), str(document["store"]))
        except KeyError as error:
            raise LinkError(f"no {error} in what the other side says of itself") from error


async def send(writer: Writer, document: dict[str, Any]) -> None:
    """Send one line. Raises OSError."""
    writer.write(json.dumps(document, separators=(",", ":")).encode() + b"\n")
    await writer.drain()


async def receive(reader: Reader, timeout: float | None) -> dict[str, Any]:
    """The next line, waited for at most ``timeout`` seconds.

    Raises :class:`LinkError`; also with the words of an ``error`` that the other side sent.
    """
    try:
        async with asyncio.timeout(timeout):
            line = await reader.readuntil(b"\n")
    except TimeoutError:
        raise LinkError(f"no answer within {timeout:g} s") from None
    except asyncio.IncompleteReadError:
        raise Closed("the other side closed the connection") from None
    except asyncio.LimitOverrunError:
        raise LinkError("a line without end") from None
    except OSError as error:
        raise LinkError(str(error)) from error
    try:
        document = json.loads(line)
    except ValueError:
        raise LinkError(f"not a line of pairsync: {line[:80]!r}") from None
    if not isinstance(document, dict):
        raise LinkError("not a line of pairsync")
    if "error" in document:
        raise LinkError(str(document["error"]))
    return document


def _proof(secret: bytes, role: str, server_nonce: str, client_nonce: str) -> str:
    text = f"pairsync {PROTOCOL} {role} {server_nonce} {client_nonce}"
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


async def greet(
    reader: Reader, writer: Writer, secret: bytes, me: Identity, timeout: float
) -> Identity:
    """The connecting side's half of the proof. Returns who answers."""
    hello = await receive(reader, timeout)
    if hello.get("pairsync") != PROTOCOL:
        raise LinkError(f"another version of pairsync: {hello.get('pairsync')}")
    theirs, mine = str(hello.get("nonce")), secrets.token_hex(16)
    proof = _proof(secret, "client", theirs, mine)
    await send(writer, {"nonce": mine, "proof": proof, **me.document()})
    answer = await receive(reader, timeout)
    if not hmac.compare_digest(str(answer.get("proof")), _proof(secret, "server", theirs, mine)):
        raise LinkError("the other side does not know the shared secret")
    return Identity.of(answer)


async def be_greeted(
    reader: Reader, writer: Writer, secret: bytes, me: Identity, timeout: float
) -> Identity:
    """The listening side's half. Returns who connects."""
    mine = secrets.token_hex(16)
    await send(writer, {"pairsync": PROTOCOL, "nonce": mine})
    hello = await receive(reader, timeout)
    theirs = str(hello.get("nonce"))
    if not hmac.compare_digest(str(hello.get("proof")), _proof(secret, "client", mine, theirs)):
        # A stranger that does not stay for the answer is one all the same.
        with contextlib.suppress(OSError):
            await send(writer, {"error": "wrong secret: the two servers' secret files differ"})
        raise LinkError("somebody with a wrong secret")
    await send(writer, {"proof": _proof(secret, "server", mine, theirs), **me.document()})
    return Identity.of(hello)


class Tls:
    """Contexts for both directions; files that changed are read again by :meth:`refresh`."""

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._seen: dict[Path, tuple[int, int]] = {}
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.minimum_version = ssl.TLSVersion.TLSv1_3
        self.client = _client(config.ca)
        self.problem = ""
        self.refresh()

    def refresh(self) -> None:
        """Read what changed. ``problem`` says what cannot be read; the old one stays in use."""
        try:
            stamps = {path: _stamp(path) for path in self._files()}
            if stamps == self._seen:
                return
            self.server.load_cert_chain(self._config.certificate, self._config.key)
            self.client = _client(self._config.ca)
            self._seen = stamps
            self.problem = ""
        except (OSError, ssl.SSLError) as error:
            self.problem = f"certificate, key or ca cannot be read: {error}"

    def _files(self) -> tuple[Path, ...]:
        return (self._config.certificate, self._config.key, self._config.ca)


def _client(ca: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # A site's own authority may lack what RFC 5280 wants; no mail daemon asks for it either.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return (about.st_mtime_ns, about.st_ino)


def boot_id() -> str:
    """What changes with every boot, of a container too: its first process began at another time."""
    kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{kernel}.{locks.init_began()}"


def folder_id(folder: Path) -> str:
    """What tells this folder from one on a new disk; made where it is missing. Raises OSError."""
    path = folder / ".pairsync-id"
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="ascii").strip()
    made = secrets.token_hex(16)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as stream:
        stream.write(made + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return made
