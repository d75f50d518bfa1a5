"""Where connections of the checks come from.

A socket belongs to the network namespace in which it was made, whatever its thread does later,
so only the making happens inside. Postfix limits connections per client address; a
:class:`Client` therefore has addresses that no other one has used for a while.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import chain, islice

from mailsite.model import IPAddress

Enter = Callable[[], AbstractContextManager[object]]
Pair = tuple[IPv4Address, IPv6Address]


@dataclass(frozen=True)
class Client:
    """One computer as its peers see it.

    Attributes:
        place: Where it stands, for messages.
        enter: Takes the calling thread into its network.
        ipv4: Address that it connects from; None: whichever the kernel takes.
        ipv6: The same for IPv6.
    """

    place: str
    enter: Enter
    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None

    def source(self, towards: IPAddress) -> IPAddress | None:
        """The client's address in the family of ``towards``."""
        return self.ipv4 if towards.version == 4 else self.ipv6

    def __str__(self) -> str:
        known = [str(a) for a in (self.ipv4, self.ipv6) if a is not None]
        return f"{self.place} ({', '.join(known)})" if known else self.place

    def open_socket(
        self, family: socket.AddressFamily, kind: socket.SocketKind, protocol: int = -1
    ) -> socket.socket:
        """A socket in the client's network, not bound to an address."""
        with self.enter():
            return socket.socket(family, kind, protocol)

    def connect(
        self, address: IPAddress | str, port: int, *, timeout: float = 5.0
    ) -> socket.socket:
        """Open a TCP connection.

        Args:
            address: Where to, as an address.
            port: TCP port.
            timeout: Seconds, for the connection and for each operation on it.

        Raises:
            OSError: It could not be opened.
        """
        target = ip_address(str(address))
        family = socket.AF_INET if target.version == 4 else socket.AF_INET6
        opened = self.open_socket(family, socket.SOCK_STREAM)
        try:
            opened.settimeout(timeout)
            source = self.source(target)
            if source is not None:
                opened.bind((str(source), 0))
            opened.connect((str(target), port))
        except BaseException:
            opened.close()
            raise
        return opened


class Observer:
    """A place that clients connect from."""

    def __init__(
        self,
        place: str,
        enter: Enter = nullcontext,
        addresses: Callable[[], tuple[IPv4Address | None, IPv6Address | None]] | None = None,
    ) -> None:
        """
        Args:
            place: Its name, for messages.
            enter: Takes the calling thread into the place's network and back.
            addresses: Hands out the addresses of the next client; None: the kernel chooses.
        """
        self.place = place
        self.enter = enter
        self._addresses = addresses or (lambda: (None, None))

    def client(self) -> Client:
        """A client with addresses of its own."""
        ipv4, ipv6 = self._addresses()
        return Client(self.place, self.enter, ipv4, ipv6)

    def resident(self) -> Client:
        """A client with the place's own addresses, for servers that count nothing by them."""
        return Client(self.place, self.enter)


class Pool:
    """Source addresses, each handed out again only after the others, and after a rest.

    Postfix counts per IPv4 address and per IPv6 /84 over 60 seconds (anvil(8), and
    smtpd_client_ipv6_prefix_length in postconf(5)). Those begin with the first connection, which
    may be some seconds after the client was made.
    """

    REST = 75.0
    BLOCK = 16
    """Pairs that the place gets at once: one command for each would take longer than a check."""

    def __init__(
        self,
        pairs: Iterator[Pair],
        add: Callable[..., None],
        rest: float = REST,
    ) -> None:
        """
        Args:
            pairs: Addresses that nobody else uses.
            add: Makes the place have those that it is called with.
            rest: Seconds before an address is handed out again.
        """
        self._pairs = pairs
        self._rest = rest
        self._add = add
        self._fresh: deque[Pair] = deque()
        self._used: list[tuple[float, IPv4Address, IPv6Address]] = []
        self._lock = threading.Lock()

    def __call__(self) -> Pair:
        """The next pair; waits for one to have rested where there are no new ones.

        Raises:
            LookupError: The place has no address for clients at all.
        """
        with self._lock:
            pair = self._rested()
            self._used.append((time.monotonic(), *pair))
            return pair

    def _rested(self) -> Pair:
        if self._used and time.monotonic() - self._used[0][0] > self._rest:
            _, ipv4, ipv6 = self._used.pop(0)
            return ipv4, ipv6
        if not self._fresh:
            self._fresh.extend(islice(self._pairs, self.BLOCK))
            if self._fresh:
                self._add(*chain.from_iterable(self._fresh))
        if self._fresh:
            return self._fresh.popleft()
        if not self._used:
            raise LookupError("no address is left for a client")
        handed, ipv4, ipv6 = self._used.pop(0)
        time.sleep(max(0.0, handed + self._rest - time.monotonic()))
        return ipv4, ipv6
