"""Look at the platform from somewhere: an observer has a network namespace and addresses.

A check opens its connections through an :class:`Observer`, as the other party would. Names are
never resolved behind a check's back: connections go to addresses, and who wants a name resolved
asks a resolver by :meth:`Observer.ask`. A socket stays in the namespace that it was made in, so
it may be used outside :meth:`Observer.enter`.
"""

from __future__ import annotations

import smtplib
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address

import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdatatype

from rehearsal import network
from rehearsal.world import plan

IPAddress = IPv4Address | IPv6Address
_SECONDS = 10.0


def tls_context(ca: str | None = None, *, verify: bool = True) -> ssl.SSLContext:
    """A client's TLS settings.

    :param ca: PEM of the authorities to trust; None trusts the system's.
    :param verify: False takes any certificate, for checks that look at it themselves.
    """
    context = ssl.create_default_context(cadata=ca)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Smtp(smtplib.SMTP):
    """An SMTP client that connects to an address and verifies a name.

    After a reply that refuses the session :attr:`banner` says what the server greeted with.
    """

    banner: str = ""

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        helo: str,
        server_name: str,
        timeout: float,
    ) -> None:
        self._open = connect
        super().__init__(local_hostname=helo, timeout=timeout)
        self._host = server_name  # what starttls() verifies the certificate against

    def begin(self) -> Smtp:
        """Connect and read the greeting; :class:`smtplib.SMTPConnectError` unless it is 220."""
        self.sock = self._open()
        self.file = None
        code, text = self.getreply()
        self.banner = text.decode("utf-8", "replace")
        if code != 220:
            self.close()
            raise smtplib.SMTPConnectError(code, text)
        return self


@dataclass(frozen=True)
class Answer:
    """What a resolver or name server said.

    ``records`` are the records of the type asked for, in presentation form, sorted; ``secure``
    is the AD flag (RFC 4035, section 3.2.3); ``rcode`` is NOERROR, NXDOMAIN, SERVFAIL, ...
    """

    rcode: str
    records: tuple[str, ...]
    secure: bool
    authoritative: bool
    message: dns.message.Message = field(repr=False, compare=False)


class Observer:
    """Somebody at a place in the network.

    :param namespace: name of the network namespace, such as ``mail-obs-internet``.
    :param addresses: the observer's own addresses there.
    """

    def __init__(self, namespace: str, addresses: tuple[IPAddress, ...] = ()) -> None:
        self.namespace = namespace
        self.addresses = addresses
        self._sealed = False

    @classmethod
    def at(cls, sealed: network.Network, name: str) -> Observer:
        """The observer of the rehearsal's network called ``name``, such as ``obs-internet``."""
        return cls(sealed.namespace(name), sealed.addresses(name))

    def __repr__(self) -> str:
        return f"Observer({self.namespace!r})"

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Put the calling thread into the observer's network for the time of a ``with``.

        The first time, it is made sure that there is no way out of it.
        """
        with network.enter(self.namespace):
            if not self._sealed:
                network.assert_sealed()
                self._sealed = True
            yield

    def address(self, version: int) -> IPAddress:
        """The observer's first address of the family; :class:`LookupError` if it has none."""
        for address in self.addresses:
            if address.version == version:
                return address
        raise LookupError(f"{self.namespace} has no IPv{version} address")

    def connect(
        self,
        address: IPAddress | str,
        port: int,
        source: IPAddress | str | None = None,
        timeout: float = _SECONDS,
    ) -> socket.socket:
        """A TCP connection to ``address``, from ``source`` if one is given.

        Raises :class:`ConnectionRefusedError`, :class:`TimeoutError`, :class:`OSError` as the
        network answers.
        """
        target = ip_address(address)
        family = socket.AF_INET if target.version == 4 else socket.AF_INET6
        with self.enter():
            sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            if source is not None:
                sock.bind((str(source), 0))
            sock.connect((str(target), port))
        except BaseException:
            sock.close()
            raise
        return sock

    def smtp(
        self,
        address: IPAddress | str,
        port: int = 25,
        *,
        server_name: str = "",
        helo: str = "client.generic.example",
        source: IPAddress | str | None = None,
        timeout: float = _SECONDS,
        context: ssl.SSLContext | None = None,
    ) -> Smtp:
        """An SMTP session, greeted; with ``context`` it has done STARTTLS too.

        :param server_name: the name that the certificate is verified against.
        """
        session = Smtp(
            lambda: self.connect(address, port, source, timeout), helo, server_name, timeout
        ).begin()
        if context is not None:
            try:
                session.starttls(context=context)
            except BaseException:
                session.close()
                raise
        return session

    def ask(
        self,
        name: str,
        rdtype: str,
        server: IPAddress | str = plan.RESOLVER.ipv4,
        *,
        recursive: bool = True,
        dnssec: bool = True,
        timeout: float = _SECONDS,
        source: IPAddress | str | None = None,
    ) -> Answer:
        """Ask a DNS server, by UDP and, where the answer is cut off, by TCP.

        :param server: by default the resolver that people on the internet have.
        :param dnssec: ask for DNSSEC records and for the result of their validation.
        """
        query = dns.message.make_query(name, rdtype, want_dnssec=dnssec, use_edns=True)
        if dnssec:
            query.flags |= dns.flags.AD
        if not recursive:
            query.flags &= ~dns.flags.RD
        with self.enter():
            reply, _ = dns.query.udp_with_fallback(
                query, str(server), timeout=timeout, source=str(source) if source else None
            )
        wanted = dns.rdatatype.from_text(rdtype)
        return Answer(
            dns.rcode.to_text(reply.rcode()),
            tuple(
                sorted(
                    r.to_text() for rrset in reply.answer if rrset.rdtype == wanted for r in rrset
                )
            ),
            bool(reply.flags & dns.flags.AD),
            bool(reply.flags & dns.flags.AA),
            reply,
        )

    def resolve(
        self, name: str, rdtype: str, server: IPAddress | str = plan.RESOLVER.ipv4
    ) -> tuple[str, ...]:
        """The records alone; empty where there are none or no answer is to be had."""
        return self.ask(name, rdtype, server).records
