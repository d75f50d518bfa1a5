"""A door into the sealed network for a person's browser: webmail on a loopback port.

The browser speaks plain http to this machine, so that it need not know the rehearsal's names and
authorities. From here on it is as for any user: a connection from a network that may use webmail,
to a frontend, over https with the name verified.
"""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mailsite.model import IPAddress, NetworkKind, Platform, Role
from rehearsal import network
from rehearsal.observer import Observer, tls_context
from rehearsal.progress import RehearsalError
from rehearsal.state import State

LOOPBACK = "127.0.0.1"
_SECONDS = 150.0
#: Of one connection, not of the page (RFC 9110, section 7.6.1).
_HOP = frozenset({"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"})
#: What would bind a browser to https on this machine.
_BINDING = frozenset({"strict-transport-security", "content-length"})


class Door:
    """Opens connections to webmail as a user's browser does.

    Raises:
        RehearsalError: The site has no webmail, or nobody of the rehearsal may use it.
    """

    def __init__(self, platform: Platform, state: State) -> None:
        settings = platform.webmail
        if settings is None or not platform.members(Role.WEBMAIL):
            raise RehearsalError("the site has no webmail", "add hosts with the role 'webmail'")
        self.name = platform.names.webmail
        self._context = tls_context("".join(platform.world.ca_certificates) or None)
        self._entrances = tuple(_entrances(platform))
        sealed = network.Network(platform, state)
        for place in ("office", "local"):
            observer = Observer.at(sealed, f"obs-{place}")
            if all(
                any(a in n for n in settings.networks if n.version == a.version)
                for a in observer.addresses
            ):
                self._observer = observer
                return
        raise RehearsalError(
            "no place of the rehearsal is in a network that may use webmail",
            "add the operators' networks to webmail.networks in site.yaml",
        )

    def connect(self) -> http.client.HTTPSConnection:
        """A connection to the first frontend that answers."""
        refusals = []
        for address in self._entrances:
            try:
                plain = self._observer.connect(address, 443, timeout=_SECONDS)
            except OSError as error:
                refusals.append(f"{address}: {error}")
                continue
            connection = http.client.HTTPSConnection(self.name, timeout=_SECONDS)
            connection.sock = self._context.wrap_socket(plain, server_hostname=self.name)
            return connection
        raise ConnectionError("; ".join(refusals))


def _entrances(platform: Platform) -> Iterator[IPAddress]:
    for host in platform.members(Role.FRONTEND):
        leg = platform.leg(host, NetworkKind.PUBLIC)
        if leg is not None:
            yield leg.ipv4


class Server(ThreadingHTTPServer):
    """A server on the loopback that passes requests on. ``port`` 0: any that is free.

    :param connect: opens a connection to the web server that is called ``name``.
    """

    daemon_threads = True

    def __init__(
        self, connect: Callable[[], http.client.HTTPConnection], name: str, port: int
    ) -> None:
        self.open = connect
        self.name = name
        super().__init__((LOOPBACK, port), _Handler)

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._pass_on()

    do_HEAD = do_POST = do_GET

    def _pass_on(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else None
        own = f"https://{self.server.name}"
        here = self.server.address.rstrip("/")
        headers = {
            key: value.replace(here, own)
            for key, value in self.headers.items()
            if key.lower() not in _HOP and key.lower() != "host"
        }
        try:
            connection = self.server.open()
            connection.request(self.command, self.path, body, {**headers, "Host": self.server.name})
            reply = connection.getresponse()
            page = reply.read()
        except (OSError, ssl.SSLError, http.client.HTTPException) as error:
            self.send_error(http.client.BAD_GATEWAY, explain=str(error))
            return
        self.send_response(reply.status, reply.reason)
        for key, value in reply.getheaders():
            if key.lower() in _HOP | _BINDING:
                continue
            if key.lower() == "set-cookie":
                value = "; ".join(p for p in value.split("; ") if p.lower() != "secure")
            self.send_header(key, value.replace(own, here))
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)
        connection.close()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nobody reads it."""
