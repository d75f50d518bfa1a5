"""The mailboxes as their owners see them: what arrived, read over IMAP through the frontends."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from mailsite.model import IPAddress, Platform
from verify.client import Client
from verify.imap import IMAPS, Error, Session
from verify.mail import Mail
from verify.mailauth import header_of
from verify.passwords import mailbox_password
from verify.registry import Failed

MAILBOXES = "mailboxes"
"""Where a mail is that is in a mailbox of the platform (:attr:`verify.mail.Mail.mx`)."""

# The hop to the mailboxes as Postfix writes it down.
_HOP = re.compile(
    r"from (?P<helo>\S+) \(\S+ \[(?:IPv6:)?(?P<peer>[0-9A-Fa-f.:]+)\]\)"
    r"(?:\s*\(using (?P<tls>TLSv[\d.]+))?"
)


def mail_of(raw: bytes) -> Mail | None:
    """A mail of a mailbox: the envelope stands in the headers that its delivery added.

    None for a mail that was not delivered, such as a draft.
    """
    hops = (_HOP.search(line) for line in header_of(raw, "Received"))
    hop = next((h for h in hops if h is not None), None)
    sender, recipient = (_topmost(raw, name) for name in ("Return-Path", "Delivered-To"))
    if hop is None or sender is None or recipient is None:
        return None
    return Mail(
        mx=MAILBOXES,
        peer=ip_address(hop["peer"]),
        helo=hop["helo"],
        tls=hop["tls"] or "",
        mail_from=sender,
        rcpt_to=(recipient,),
        accepted=True,
        raw=raw,
    )


def _topmost(raw: bytes, name: str) -> str | None:
    """The address in the header that was added last."""
    found = header_of(raw, name)
    return found[0].strip().strip("<>") if found else None


@dataclass
class _Box:
    """What is known of one mailbox: folder and its validity -> the next UID."""

    password: str = field(repr=False)
    session: Session | None = None
    seen: dict[tuple[str, int], int] = field(default_factory=dict)
    mails: list[Mail] = field(default_factory=list)


class Mailboxes:
    """All mailboxes. Each is read on when it is asked for; what is moved counts again.

    Args:
        platform: Whose.
        state: The rehearsal's state folder, which has the passwords.
        doors: Addresses of the frontends, in the order to try them.
        client: Makes a client somewhere on the internet.
        tls: What it trusts.
    """

    def __init__(
        self,
        platform: Platform,
        state: Path,
        doors: tuple[IPAddress, ...],
        client: Callable[[], Client],
        tls: ssl.SSLContext,
    ) -> None:
        self._name = platform.names.imap
        self._state = state
        self._users = [box.name for box in platform.mailboxes.values() if not box.suspended]
        self._doors = doors
        self._client = client
        self._tls = tls
        self._lock = threading.Lock()
        self._boxes: dict[str, _Box] = {}

    def all(self) -> list[Mail]:
        """Every mail that was seen in a folder of a mailbox, those of one mailbox in order.

        Raises:
            Failed: No frontend leads to the mailboxes.
        """
        with self._lock:
            return [mail for user in self._users for mail in self._read(user)]

    def _read(self, user: str) -> list[Mail]:
        if user not in self._boxes:
            self._boxes[user] = _Box(mailbox_password(self._state, user))
        box = self._boxes[user]
        try:
            self._read_on(user, box)
        except (OSError, Error):  # a frontend or a replica went away: once more, from the start
            self._hang_up(box)
            try:
                self._read_on(user, box)
            except (OSError, Error) as error:
                self._hang_up(box)
                raise Failed(f"the mailbox {user} cannot be read: {error}") from error
        return box.mails

    def _read_on(self, user: str, box: _Box) -> None:
        if box.session is None:
            box.session = self._open(user, box.password)
        for folder in box.session.folders():
            key = (folder.name, folder.validity)
            if folder.next <= box.seen.get(key, 1):
                continue
            try:
                found = box.session.mails(folder.name, box.seen.get(key, 1))
            except Failed:
                if folder.name in {there.name for there in box.session.folders()}:
                    raise
                # Its owner has renamed or deleted it since it was listed.
                continue
            for uid, raw in found:
                box.seen[key] = uid + 1
                mail = mail_of(raw)
                box.mails += [mail] if mail is not None else []

    @staticmethod
    def _hang_up(box: _Box) -> None:
        """Forget what was read: the other replica may have given the numbers to other mails."""
        box.seen.clear()
        box.mails.clear()
        if box.session is not None:
            box.session.shutdown()
            box.session = None

    def _open(self, user: str, password: str) -> Session:
        client = self._client()
        failures = []
        for door in self._doors:
            try:
                session = Session(client, door, IMAPS, tls=self._tls, name=self._name, timeout=5.0)
            except OSError as error:
                failures.append(f"[{door}]: {error}")
                continue
            session.enter(user, password)
            return session
        raise Failed(f"no frontend leads to the mailboxes: {'; '.join(failures)}")
