"""SMTP as a client speaks it, with every line kept for the transcript."""

from __future__ import annotations

import re
import smtplib
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from secrets import token_hex
from types import TracebackType

from mailsite.model import IPAddress
from verify.client import Client
from verify.registry import Failed

_BANNER = re.compile(r"(?P<name>\S+) ESMTP (?P<software>.*?)(?: \((?P<inner>[^()]+)\))?$")


@dataclass(frozen=True)
class Banner:
    """The greeting: the public name, and the internal one in parentheses."""

    name: str
    inner: str
    text: str


class Session(smtplib.SMTP):
    """One connection to a mail server. A context manager; the connection is open.

    Args:
        client: Who connects.
        address: The server's address.
        port: Its port.
        say: Takes the lines of the dialogue; passwords are not among them.
        preamble: Bytes to send before anything else: a PROXY header.
        helo: Name to give in EHLO.
        tls: Speak TLS from the start (smtps), with ``name`` verified.
        name: The server's name, for ``tls``.
        timeout: Seconds for each step.

    Raises:
        OSError: No connection.
        Failed: The server greets with something else than 220.
    """

    def __init__(
        self,
        client: Client,
        address: IPAddress | str,
        port: int,
        *,
        say: Callable[[str], None] = lambda line: None,
        preamble: bytes = b"",
        helo: str = "client.probe.invalid",
        tls: ssl.SSLContext | None = None,
        name: str = "",
        timeout: float = 10.0,
    ) -> None:
        self._client = client
        self._say = say
        self._preamble = preamble
        self._tls = tls
        self._name = name
        self._secret = False
        self.where = f"[{address}]:{port} from {client}"
        super().__init__(local_hostname=helo, timeout=timeout)
        say(f"-- {self.where}")
        code, text = self.connect(str(address), port)
        self.greeting = text.decode("ascii", "replace")
        if code != 220:
            self.close()
            raise Refused(f"{self.where}: greeted with {code} {self.greeting}", code)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        opened: socket.socket = self._client.connect(host, port, timeout=timeout)
        if self._preamble:
            opened.sendall(self._preamble)
        if self._tls is None:
            return opened
        try:
            return self._tls.wrap_socket(opened, server_hostname=self._name)
        except ssl.SSLCertVerificationError as error:
            opened.close()
            raise CertificateRefused(
                f"{self.where}: {error.verify_message} (wanted {self._name})"
            ) from error
        except OSError:
            opened.close()
            raise

    def putcmd(self, cmd: str, args: str = "") -> None:
        shown = "(secret)" if self._secret or cmd.upper() == "AUTH" else f"{cmd} {args}".strip()
        self._say(f"C: {shown}")
        super().putcmd(cmd, args)

    def getreply(self) -> tuple[int, bytes]:
        code, text = super().getreply()
        shown = text.decode("ascii", "replace").replace("\n", "\n       ")
        self._say(f"S: {code} {shown}")
        return code, text

    @property
    def banner(self) -> Banner:
        """The greeting in its parts.

        Raises:
            Failed: It has another form.
        """
        match = _BANNER.fullmatch(self.greeting)
        if match is None:
            raise Failed(f"{self.where}: greets with {self.greeting!r}")
        return Banner(match["name"], match["inner"] or "", self.greeting)

    def secure(self, context: ssl.SSLContext, name: str) -> ssl.SSLSocket:
        """STARTTLS with ``name`` verified, then EHLO again.

        Raises:
            Failed: Not offered, or the certificate does not verify.
        """
        self.ehlo_or_helo_if_needed()
        self._host = name
        try:
            code, text = self.starttls(context=context)
        except ssl.SSLCertVerificationError as error:
            raise CertificateRefused(
                f"{self.where}: {error.verify_message} (wanted {name})"
            ) from error
        except smtplib.SMTPNotSupportedError as error:
            raise Failed(f"{self.where}: STARTTLS is not offered") from error
        if code != 220:
            raise Failed(f"{self.where}: STARTTLS answered {code} {text!r}")
        self._say("-- TLS")
        self.ehlo()
        secured = self.sock
        assert isinstance(secured, ssl.SSLSocket)
        return secured

    def authenticate(self, user: str, password: str) -> tuple[int, str]:
        """AUTH PLAIN, whatever the server offered. The reply is returned, not judged."""
        self._secret = True
        try:
            self.user, self.password = user, password
            code, text = self.auth("PLAIN", self.auth_plain, initial_response_ok=True)
        except smtplib.SMTPAuthenticationError as error:
            code, text = error.smtp_code, _bytes(error.smtp_error)
        finally:
            self._secret = False
        return code, text.decode("ascii", "replace")

    def envelope(self, sender: str, recipient: str) -> tuple[int, str]:
        """MAIL and RCPT. The reply that decides is returned: MAIL's if refused, else RCPT's."""
        code, text = self.mail(sender)
        if code == 250:
            code, text = self.rcpt(recipient)
        return code, text.decode("ascii", "replace")

    def raw(self, line: bytes) -> tuple[int, str]:
        """Send a line as it is. Returns the reply."""
        self._say(f"C: {line!r}")
        self.send(line + b"\r\n")
        code, text = self.getreply()
        return code, text.decode("utf-8", "replace")

    def submit(self, sender: str, recipients: list[str], message: bytes) -> tuple[int, str]:
        """A whole transaction. The first reply that is no success is returned, else DATA's."""
        self.ehlo_or_helo_if_needed()
        code, text = self.mail(sender)
        for recipient in recipients if code == 250 else ():
            code, text = self.rcpt(recipient)
            if code not in (250, 251):
                break
        if code in (250, 251):
            try:
                code, text = self.data(message)
            except smtplib.SMTPDataError as error:
                code, text = error.smtp_code, _bytes(error.smtp_error)
        return code, text.decode("ascii", "replace")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError, smtplib.SMTPException):
            super().__exit__(kind, error, trace)
        self.close()


class CertificateRefused(Failed):
    """The server's certificate does not verify, or is for another name."""


class Refused(Failed):
    """The server did not even greet. ``code`` is what it said instead."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Letter:
    """A mail that a check sends, told apart from all others by its token."""

    sender: str
    recipient: str
    token: str
    content: bytes


def letter(sender: str, recipient: str, *, subject: str = "Probe", token: str = "") -> Letter:
    """Write a mail.

    Args:
        sender: Address in From and in the envelope; ``{token}`` in it becomes the token.
        recipient: Address in To and in the envelope; the same.
        subject: Subject.
        token: Unique part; by default a new one.
    """
    unique = token or token_hex(8)
    from_, to = sender.replace("{token}", unique), recipient.replace("{token}", unique)
    message = EmailMessage()
    message["From"] = f"Probe <{from_}>"
    message["To"] = to
    message["Subject"] = subject
    message["Date"] = format_datetime(datetime.now(UTC))
    message["Message-ID"] = f"<{unique}@{from_.rpartition('@')[2]}>"
    message["X-Probe"] = unique
    message.set_content(f"This mail was sent by a check of the mail platform.\nToken: {unique}\n")
    return Letter(from_, to, unique, message.as_bytes().replace(b"\n", b"\r\n"))


def _bytes(text: bytes | str) -> bytes:
    return text if isinstance(text, bytes) else text.encode("ascii", "replace")
