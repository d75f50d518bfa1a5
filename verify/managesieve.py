"""ManageSieve (RFC 5804) as a client speaks it, from wherever a check connects."""

from __future__ import annotations

import base64
import re
import ssl
from dataclasses import dataclass
from types import TracebackType

from mailsite.model import IPAddress
from verify.client import Client
from verify.registry import Failed
from verify.smtp import CertificateRefused

MANAGESIEVE = 4190

_LITERAL = re.compile(rb"\{(\d+)\+?\}\r\n$")
_STRING = re.compile(rb'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Reply:
    """What a command is answered with.

    Attributes:
        verdict: ``OK``, ``NO`` or ``BYE``.
        text: The words after it.
        lines: What came before it.
    """

    verdict: str
    text: str
    lines: tuple[bytes, ...]


class Session:
    """One connection. A context manager; the connection is open and greeted.

    Args:
        client: Who connects.
        address: The server's address.
        port: Its port.
        preamble: Bytes to send before anything else: a PROXY header.
        timeout: Seconds for each step.

    Raises:
        OSError: No connection, or no greeting.
        Failed: The greeting is not OK.
    """

    def __init__(
        self,
        client: Client,
        address: IPAddress | str,
        port: int = MANAGESIEVE,
        *,
        preamble: bytes = b"",
        timeout: float = 10.0,
    ) -> None:
        self.where = f"[{address}]:{port} from {client}"
        self._socket = client.connect(address, port, timeout=timeout)
        try:
            if preamble:
                self._socket.sendall(preamble)
            self._file = self._socket.makefile("rb")
            self.capabilities = self._expect_ok("the greeting", self._reply()).lines
        except BaseException:
            self._socket.close()
            raise

    def secure(self, context: ssl.SSLContext, name: str) -> None:
        """STARTTLS with ``name`` verified.

        Raises:
            CertificateRefused: The certificate does not verify, or is for another name.
            Failed: It is refused.
        """
        self._expect_ok("STARTTLS", self.command("STARTTLS"))
        try:
            self._socket = context.wrap_socket(self._socket, server_hostname=name)
        except ssl.SSLCertVerificationError as error:
            raise CertificateRefused(
                f"{self.where}: {error.verify_message} (wanted {name})"
            ) from error
        self._file = self._socket.makefile("rb")
        self.capabilities = self._expect_ok("TLS", self._reply()).lines

    def authenticate(self, user: str, password: str) -> Reply:
        """AUTHENTICATE PLAIN. The reply is returned, not judged."""
        word = base64.b64encode(f"\0{user}\0{password}".encode()).decode("ascii")
        return self.command(f'AUTHENTICATE "PLAIN" "{word}"')

    def put(self, name: str, script: str) -> Reply:
        """Upload a script. The reply is returned, not judged."""
        content = script.encode()
        return self.command(f'PUTSCRIPT "{name}" {{{len(content)}+}}', content)

    def activate(self, name: str) -> None:
        """Make a script the active one; an empty name: none."""
        self._expect_ok(f"SETACTIVE {name!r}", self.command(f'SETACTIVE "{name}"'))

    def delete(self, name: str) -> None:
        self._expect_ok(f"DELETESCRIPT {name!r}", self.command(f'DELETESCRIPT "{name}"'))

    def scripts(self) -> dict[str, bool]:
        """Name of each script -> whether it is the active one."""
        found = {}
        for line in self._expect_ok("LISTSCRIPTS", self.command("LISTSCRIPTS")).lines:
            name = _STRING.match(line)
            if name is not None:
                found[name[1].decode()] = line.rstrip().upper().endswith(b"ACTIVE")
        return found

    def get(self, name: str) -> str:
        """The text of a script."""
        reply = self._expect_ok(f"GETSCRIPT {name!r}", self.command(f'GETSCRIPT "{name}"'))
        return b"".join(reply.lines).decode("utf-8", "replace")

    def command(self, line: str, literal: bytes | None = None) -> Reply:
        """Send a command. Returns the reply.

        Raises:
            OSError: The server hung up.
        """
        sent = f"{line}\r\n".encode()
        if literal is not None:
            sent += literal + b"\r\n"
        self._socket.sendall(sent)
        return self._reply()

    def answer(self) -> Reply:
        """What the server says next by itself.

        Raises:
            OSError: It hung up, or says nothing.
        """
        return self._reply()

    def _expect_ok(self, what: str, reply: Reply) -> Reply:
        if reply.verdict != "OK":
            raise Failed(f"{self.where}: {what} is answered with {reply.verdict} {reply.text}")
        return reply

    def _reply(self) -> Reply:
        lines: list[bytes] = []
        while True:
            line = self._line()
            verdict = line.split(b" ", 1)[0].strip().upper()
            if verdict in (b"OK", b"NO", b"BYE"):
                text = line[len(verdict) :].strip().decode("utf-8", "replace")
                return Reply(verdict.decode(), text, tuple(lines))
            lines.append(line)

    def _line(self) -> bytes:
        """A line, with the literals in it."""
        whole = b""
        while True:
            line = self._file.readline()
            if not line:
                raise ConnectionError(f"{self.where}: hung up")
            whole += line
            literal = _LITERAL.search(line)
            if literal is None:
                return whole
            whole += self._file.read(int(literal[1]))

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()
