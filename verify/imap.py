"""IMAP as a mail client speaks it, from wherever a check connects."""

from __future__ import annotations

import imaplib
import re
import ssl
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from mailsite.model import IPAddress
from verify.client import Client
from verify.registry import Failed
from verify.smtp import CertificateRefused

IMAPS = 993
"""RFC 8314."""

Error = imaplib.IMAP4.error
"""The server says NO or BAD, or hangs up."""

_FOLDER = re.compile(rb'^(?P<name>"(?:[^"\\]|\\.)*"|[^ ]+) \((?P<items>[^)]*)\)$')
_ITEM = re.compile(rb"([A-Z]+) (\d+)")


@dataclass(frozen=True)
class Folder:
    """What tells that something came into a folder.

    Attributes:
        name: As IMAP writes it, quoted where it has to be.
        validity: Changes when UIDs begin anew (RFC 9051, section 2.3.1.1).
        next: UID that the next mail gets.
    """

    name: str
    validity: int
    next: int


class Session(imaplib.IMAP4):
    """One connection, with TLS from the start. A context manager; the connection is open.

    Args:
        client: Who connects.
        address: The server's address.
        port: Its port.
        tls: What the client trusts.
        name: The server's name, which its certificate must be for.
        preamble: Bytes to send before TLS: a PROXY header.
        timeout: Seconds for each step.

    Raises:
        OSError: No connection.
        CertificateRefused: The certificate does not verify, or is for another name.
        Error: The server greets with something else than OK.
    """

    def __init__(
        self,
        client: Client,
        address: IPAddress | str,
        port: int,
        *,
        tls: ssl.SSLContext,
        name: str,
        preamble: bytes = b"",
        timeout: float = 10.0,
    ) -> None:
        self._client = client
        self._tls = tls
        self._name = name
        self._preamble = preamble
        self.where = f"[{address}]:{port} from {client}"
        super().__init__(str(address), port, timeout)

    def open(self, host: str = "", port: int = IMAPS, timeout: float | None = None) -> None:
        self.host, self.port = host, port
        opened = self._client.connect(host, port, timeout=timeout or 10.0)
        try:
            if self._preamble:
                opened.sendall(self._preamble)
            self.sock = self._tls.wrap_socket(opened, server_hostname=self._name)
        except ssl.SSLCertVerificationError as error:
            opened.close()
            raise CertificateRefused(
                f"{self.where}: {error.verify_message} (wanted {self._name})"
            ) from error
        except BaseException:
            opened.close()
            raise
        self.file = self.sock.makefile("rb")

    @property
    def tls_version(self) -> str | None:
        """Such as ``TLSv1.3``."""
        assert isinstance(self.sock, ssl.SSLSocket)
        return self.sock.version()

    def enter(self, user: str, password: str) -> None:
        """Log in.

        Raises:
            Failed: The server refuses.
        """
        try:
            self.login(user, password)
        except self.error as error:
            raise Failed(f"{self.where}: the right password of {user}: {error}") from error

    def folders(self) -> list[Folder]:
        """Every folder, and what it is like, asked for at once (RFC 5819)."""
        self.xatom("LIST", '""', '"*"', "RETURN", "(STATUS (UIDVALIDITY UIDNEXT))")
        self.response("LIST")
        found = []
        for line in self.response("STATUS")[1] or []:
            match = _FOLDER.match(line) if isinstance(line, bytes) else None
            if match is not None:
                items = {k.decode(): int(v) for k, v in _ITEM.findall(match["items"])}
                name = match["name"].decode("ascii")
                found.append(Folder(name, items["UIDVALIDITY"], items["UIDNEXT"]))
        return found

    def mails(self, folder: str, first: int) -> list[tuple[int, bytes]]:
        """UID and content of each mail of a folder from UID ``first`` on, of large ones the first
        megabyte; none is marked as read.

        Raises:
            Failed: The folder cannot be opened.
        """
        self.look_into(folder)
        rows = self.told("FETCH", self.uid("FETCH", f"{first}:*", "(UID BODY.PEEK[]<0.1048576>)"))
        # STATUS need not tell anything new of a folder that is open (RFC 9051, section 6.3.11).
        self.unselect()
        found = []
        for row in rows:
            uid = re.search(rb"UID (\d+)", row[0]) if isinstance(row, tuple) else None
            if uid is not None and int(uid[1]) >= first:
                found.append((int(uid[1]), row[1]))
        return found

    def make(self, folder: str) -> None:
        """Make a folder. Where a sync finds it half made, it may be the sync that makes it.

        Raises:
            Failed: It is not there afterwards.
        """
        answer = self.create(folder)
        if answer[0] != "OK" and folder not in {found.name for found in self.folders()}:
            self.told("CREATE", answer)

    def look_into(self, folder: str, *, readonly: bool = True) -> None:
        """Open a folder; without ``readonly`` to change it.

        Raises:
            Failed: The server refuses.
        """
        self.told(f"open {folder}", self.select(folder, readonly))

    def told(self, what: str, answer: tuple[str, Any]) -> Any:
        """The data of an answer.

        Raises:
            Failed: It is not OK.
        """
        verdict, data = answer
        if verdict != "OK":
            raise Failed(f"{self.where}: {what} is answered with {verdict} {data!r}")
        return data

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        with suppress(OSError, self.error):
            super().__exit__(kind, error, trace)
