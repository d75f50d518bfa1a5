"""A mail where it ended: at a remote mail server, or in a mailbox."""

from __future__ import annotations

from dataclasses import dataclass

from mailsite.model import IPAddress
from verify.mailauth import header_of


@dataclass(frozen=True)
class Mail:
    """A mail as its receiver got it.

    Attributes:
        mx: Which remote server has it, or :data:`verify.mailbox.MAILBOXES`.
        peer: Address that it came from.
        helo: Name that the peer gave.
        tls: Version of TLS; empty without.
        mail_from: Envelope sender; empty for a bounce.
        rcpt_to: Envelope recipients.
        accepted: Whether the server took it.
        raw: The mail as it came.
    """

    mx: str
    peer: IPAddress
    helo: str
    tls: str
    mail_from: str
    rcpt_to: tuple[str, ...]
    accepted: bool
    raw: bytes

    def header(self, name: str) -> list[str]:
        return header_of(self.raw, name)
