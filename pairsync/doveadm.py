"""Commands to the local Dovecot, over the unix socket of its doveadm service.

The protocol is doveadm's own (``doveadm-server``, version 1.2): tab-separated words, tab-escaped;
the answer comes in packets of two channels, the command's output and what it logged. A listener
of mode 0600 asks for no password. Other than the HTTP API it tells why a command failed, and
gives the state of a run that saw changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

_HELLO = "VERSION\tdoveadm-server\t1\t2\n"
_LOG = ord("L")
_PACKET = struct.Struct(">BI")
_ERRORS = "\x04\x05\x06"
_CONNECT_SECONDS = 5.0
_LIMIT = 1 << 20
_PATHS = 50_000
_GUID = 16
_ESCAPES = {"\x01": "\x011", "\t": "\x01t", "\r": "\x01r", "\n": "\x01n"}


class DovecotError(Exception):
    """Dovecot's doveadm service does not answer as it should."""


class NoUser(DovecotError):
    """Dovecot knows no such user."""


@dataclass(frozen=True)
class Reply:
    """``code``: doveadm's name of the exit code, empty for success. ``log``: its errors."""

    code: str
    values: tuple[str, ...]
    log: str


def escape(word: str) -> str:
    return "".join(_ESCAPES.get(c, c) for c in word)


def unescape(word: str) -> str:
    for plain, escaped in reversed(_ESCAPES.items()):
        if plain != "\x01":
            word = word.replace(escaped, plain)
    return word.replace("\x011", "\x01")


class Doveadm:
    """The doveadm service behind ``socket``."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._indexes: dict[tuple[str, str, str], Path] = {}

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that nothing was sent on. Raises :class:`DovecotError`."""
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                return await asyncio.open_unix_connection(str(self.socket), limit=_LIMIT)
        except TimeoutError:
            raise DovecotError(f"{self.socket}: no answer; is Dovecot overloaded?") from None
        except OSError as error:
            raise DovecotError(
                f"{self.socket}: {error.strerror}; does Dovecot run, with the listener that "
                "pairsync/README.md shows?"
            ) from error

    @staticmethod
    def leave(writer: asyncio.StreamWriter) -> None:
        """Close a connection that nothing was sent on, so that Dovecot logs no error."""
        writer.write(_HELLO.encode())
        writer.close()

    async def run(self, user: str, *words: str) -> Reply:
        """Run a command for a user (empty: none) and return its answer.

        Raises :class:`DovecotError`. The caller limits the time.
        """
        reader, writer = await self.connect()
        try:
            return await self._run(reader, writer, ("", user, *words))
        except (OSError, asyncio.IncompleteReadError) as error:
            raise DovecotError(f"{self.socket}: the connection broke off") from error
        finally:
            writer.transport.abort()

    async def rows(self, user: str, width: int, *words: str) -> list[tuple[str, ...]]:
        """What a command for a user tells, ``width`` values a row. Raises :class:`DovecotError`."""
        reply = await self.run(user, *words)
        if reply.code:
            error = NoUser if reply.code == "NOUSER" else DovecotError
            raise error(f"doveadm {words[0]} for {user}: {reply.log or reply.code}")
        columns = [reply.values[at::width] for at in range(width)]
        return list(zip(*columns, strict=False))

    async def fetch(self, user: str, fields: str, *query: str) -> list[tuple[str, ...]]:
        """Fields of the mails that a query finds, GUIDs as :func:`guid_of` gives them.

        Raises :class:`DovecotError`.
        """
        names = fields.split()
        # Else a folder whose name begins with a dash would be an option.
        rows = await self.rows(user, len(names), "fetch", "--", fields, *query)
        if "guid" not in names:
            return rows
        at = names.index("guid")
        return [(*row[:at], guid_of(row[at]), *row[at + 1 :]) for row in rows]

    async def folders(self, user: str, *names: str) -> dict[str, str]:
        """Folder (its GUID) -> its name. Raises :class:`DovecotError`.

        ``names``: of no others, but that ``*`` and ``%`` in a name stand for more of them.
        """
        return {folder: name for name, folder in await self.listed(user, *names)}

    async def listed(self, user: str, *names: str) -> list[tuple[str, str]]:
        """Name and GUID of each folder, which is not opened for it; names as for :meth:`folders`.

        There may be two of one GUID. Raises :class:`DovecotError`.
        """
        # Alone, a name that is not there is an error.
        which = ("INBOX", *names) if names else ("*",)
        rows = await self.rows(user, 2, "mailbox status", "--", "guid", *which)
        return [(name, folder) for name, folder in rows]

    async def next_uids(self, user: str, *names: str) -> dict[str, int]:
        """Folder (its GUID) -> UID that the next mail gets; names as for :meth:`folders`."""
        return {folder: uid for _, uid, folder in await self.statuses(user, *names)}

    async def statuses(self, user: str, *names: str) -> list[tuple[str, int, str]]:
        """Name of a folder, UID that its next mail gets, and its GUID, which Dovecot looks for in
        the folder itself; names as for :meth:`folders`.
        """
        which = ("uidnext guid", "INBOX", *names)
        rows = await self.rows(user, 3, "mailbox status", "--", *which)
        return [(name, int(uid), folder) for name, uid, folder in rows]

    async def messages(self, user: str) -> int:
        """How many mails there are, as far as the index tells. Raises :class:`DovecotError`."""
        rows = await self.rows(user, 2, "mailbox status", "--", "messages", "*")
        return sum(int(count) for _, count in rows)

    async def index(self, user: str, name: str, folder: str = "") -> Path:
        """Where the index of a folder is, with its logs. Raises :class:`DovecotError`.

        Dovecot makes the path of the name, or of ``folder``, its GUID. So it is asked once.
        """
        key = (user, folder, name)
        if key not in self._indexes:
            rows = await self.rows(user, 1, "mailbox path", "-t", "index", "--", name)
            if len(self._indexes) >= _PATHS:
                self._indexes.clear()
            self._indexes[key] = Path(rows[0][0])
        return self._indexes[key]

    async def users(self) -> list[str]:
        """Every user that Dovecot knows."""
        reply = await self.run("", "user", "*")
        if reply.code:
            raise DovecotError(f"doveadm user: {reply.log or reply.code}")
        try:
            return [str(user) for user in json.loads(reply.values[0])["userList"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DovecotError(f"doveadm user: {reply.values[0][:80]!r} is no list") from error

    async def _run(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, words: Sequence[str]
    ) -> Reply:
        writer.write(_HELLO.encode())
        while True:
            line = await reader.readuntil(b"\n")
            if line == b"+\n":
                break
            if not line.startswith(b"VERSION\tdoveadm-client\t1\t"):
                raise DovecotError(
                    f"{self.socket}: {line.decode(errors='replace').strip()!r} instead of a "
                    "greeting; the listener must have mode 0600 exactly, else it wants a password"
                )
        writer.write(("\t".join(map(escape, words)) + "\n").encode())
        output, log = bytearray(), bytearray()
        while (code := _ending(output)) is None:
            channel, length = _PACKET.unpack(await reader.readexactly(_PACKET.size))
            (log if channel == _LOG else output).extend(await reader.readexactly(length))
        text = bytes(output[: output.rindex(b"\n", 0, len(output) - 1)]).decode(errors="replace")
        # Each value ends with a tab, but for what is a document by itself.
        values = text.strip("\n").removesuffix("\t").split("\t")
        if "\x01" in text:
            values = list(map(unescape, values))
        return Reply(code, tuple(values), _errors(log.decode(errors="replace")))


def _ending(output: bytearray) -> str | None:
    """The exit code's name where the output is whole: its last line is ``+`` or ``-CODE``."""
    if not output.endswith(b"\n"):
        return None
    lines = output[:-1].rsplit(b"\n", 1)
    if len(lines) < 2:
        return None
    last = lines[1]
    if last == b"+":
        return ""
    if last.startswith(b"-"):
        return last[1:].decode(errors="replace") or "UNKNOWN"
    return None


def _errors(log: str) -> str:
    lines = [line[1:] for line in log.splitlines() if line[:1] and line[0] in _ERRORS]
    return " / ".join(lines[-3:])


def mails_of(name: str, folder: str, uids: str = "") -> tuple[str, ...]:
    """A query for the mails of a folder, or for some of them.

    By its name, for by its GUID alone Dovecot looks into every folder, and there may be another one
    of that for a while (:mod:`pairsync.renames`).
    """
    return ("mailbox", name, "mailbox-guid", folder, *(("uid", uids) if uids else ()))


def guid_of(mail: str) -> str:
    """A mail's GUID as Dovecot's logs have it: a digest where it has another form, as that of a
    mail that was taken from a Maildir (mail_generate_guid_128_hash, Dovecot 2.4).
    """
    with contextlib.suppress(ValueError):
        if len(mail) == 2 * _GUID:
            return bytes.fromhex(mail).hex()
    return hashlib.sha1(mail.encode(), usedforsecurity=False).digest()[-_GUID:].hex()


def uid_set(uids: Iterable[int]) -> str:
    """As IMAP writes a set of UIDs: Dovecot takes no line of more than a megabyte."""
    runs = [
        [uid for _, uid in found]
        for _, found in groupby(enumerate(sorted(uids)), lambda pair: pair[1] - pair[0])
    ]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}:{run[-1]}" for run in runs)
