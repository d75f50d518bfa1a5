"""The ports of Dovecot, and how to see that it answers there."""

from __future__ import annotations

#: For our own networks, without a proxy in front.
IMAPS = 993
MANAGESIEVE = 4190

#: For the frontends alone, which put a PROXY header in front.
PROXIED_IMAPS = 10993
PROXIED_MANAGESIEVE = 14190

# Whether the certificate fits is seen by those who know which name they came by.
_GREETS = (
    "import socket, ssl, sys\n"
    "context = ssl.create_default_context()\n"
    "context.check_hostname, context.verify_mode = False, ssl.CERT_NONE\n"
    "with socket.create_connection((sys.argv[1], int(sys.argv[2])), 4) as connection:\n"
    "    with context.wrap_socket(connection) as stream:\n"
    "        sys.exit(not stream.recv(4).startswith(b'* OK'))"
)


def greets(address: str, port: int) -> tuple[str, ...]:
    """A command that exits with 0 if an IMAP server says hello at a port, after TLS."""
    return ("python3", "-I", "-c", _GREETS, address, str(port))
