"""Tell systemd how the daemon is (sd_notify(3)), and write a log that it understands."""

from __future__ import annotations

import os
import socket
import sys

ERROR, WARNING, INFO = 3, 4, 6


def tell(text: str) -> None:
    """Send a state such as ``READY=1`` to systemd, where it started us."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.connect(address)
        out.sendall(text.encode())


def log(level: int, text: str) -> None:
    """One line with its level in front (sd-daemon(3))."""
    line = " / ".join(text.splitlines())
    print(f"<{level}>{line}", file=sys.stderr, flush=True)
