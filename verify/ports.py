"""Which ports answer: a scan that opens no connection, from the network of an observer.

A TCP probe is a single SYN from a raw socket. The kernel, which knows nothing of it, resets what
answers, so no daemon ever sees a connection and no limit counts one. A UDP probe is a question to
a name server, which whatever listens may answer as it likes.
"""

from __future__ import annotations

import errno
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_address

import dns.message

from mailsite.model import IPAddress
from verify.client import Client

SETTLE = 0.5
"""Seconds that late answers get."""
_SYN, _ACK, _RST = 0x02, 0x10, 0x04
_BURST = 64
_HEADER = struct.Struct("!HHIIBBHHH")
_IPV6_CHECKSUM = 7  # linux/in6.h, not in Python's socket
_RCVBUFFORCE = 33  # asm-generic/socket.h
_RECVERR = {socket.AF_INET: (socket.IPPROTO_IP, 11), socket.AF_INET6: (socket.IPPROTO_IPV6, 25)}
_QUESTION = dns.message.make_query("scan.invalid", "A").to_wire()


class Protocol(StrEnum):
    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True)
class Port:
    """A port at an address."""

    protocol: Protocol
    address: IPAddress
    number: int

    def __str__(self) -> str:
        return f"{self.number}/{self.protocol} at {self.address}"


@dataclass
class Scan:
    """What answered. ``refused``: not even dropped, the machine says that nobody listens."""

    open: set[Port] = field(default_factory=set)
    refused: set[Port] = field(default_factory=set)


def source_of(client: Client, target: IPAddress) -> IPAddress | None:
    """The address that ``client`` speaks to ``target`` from; None: it knows no way there."""
    with client.open_socket(_family(target), socket.SOCK_DGRAM) as probe:
        _bind(probe, client)
        try:
            probe.connect((str(target), 9))
        except OSError:
            return None
        return ip_address(probe.getsockname()[0])


def scan(client: Client, targets: Mapping[IPAddress, Sequence[int]]) -> Scan:
    """Probe the ports of each address, TCP and UDP, from where ``client`` stands."""
    found = Scan()
    for version in (4, 6):
        mine = {a: numbers for a, numbers in targets.items() if a.version == version and numbers}
        if mine:
            _tcp(client, mine, found)
            _udp(client, mine, found)
    return found


def _bind(sock: socket.socket, client: Client) -> None:
    own = client.ipv4 if sock.family is socket.AF_INET else client.ipv6
    if own is not None:
        sock.bind((str(own), 0))


def _family(address: IPAddress) -> socket.AddressFamily:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


# -- TCP ---------------------------------------------------------------------------------------


def _tcp(client: Client, targets: Mapping[IPAddress, Sequence[int]], found: Scan) -> None:
    family = _family(next(iter(targets)))
    own = random.randrange(20000, 28000)  # below the kernel's own (ip_local_port_range)
    with client.open_socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        _bind(raw, client)
        raw.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 64 * 1024 * 1024)
        if family is socket.AF_INET6:
            raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, 16)
        raw.setblocking(False)
        for address, numbers in targets.items():
            source = source_of(client, address)
            if source is None:
                continue
            segment = _Segment(source, address, own)
            place = (str(address), 0)
            for count, number in enumerate(numbers):
                _send(raw, segment.to(number), place)
                if count % _BURST == 0:
                    _answers(raw, own, found)
        _until_settled(raw, lambda: _answers(raw, own, found))


class _Segment:
    """A SYN from ``source`` to any port of ``target``."""

    def __init__(self, source: IPAddress, target: IPAddress, own: int) -> None:
        self._own = own
        self._sequence = random.getrandbits(32)
        # Of all but the port, which is added; over IPv6 the kernel does it.
        pseudo = source.packed + target.packed + struct.pack("!HH", 6, _HEADER.size)
        self._sum = _words(pseudo + self._packed(0, 0)) if target.version == 4 else None

    def _packed(self, number: int, checksum: int) -> bytes:
        return _HEADER.pack(self._own, number, self._sequence, 0, 5 << 4, _SYN, 1024, checksum, 0)

    def to(self, number: int) -> bytes:
        return self._packed(number, 0 if self._sum is None else _checksum(self._sum + number))


def _words(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    return total


def _checksum(total: int) -> int:
    """The Internet checksum (RFC 1071) of a sum of words."""
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _send(raw: socket.socket, packet: bytes, place: tuple[str, int]) -> None:
    for _ in range(50):
        try:
            raw.sendto(packet, place)
        except BlockingIOError:
            select.select([], [raw], [], 1.0)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                time.sleep(0.001)  # the device's queue is full, and nothing tells when it is not
                continue
            # What an earlier probe was told; this one was not sent.
            if error.errno not in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH):
                raise
        else:
            return


def _answers(raw: socket.socket, own: int, found: Scan) -> bool:
    """Read what came back; whether anything did."""
    some = False
    while True:
        try:
            data, peer = raw.recvfrom(256)
        except BlockingIOError:
            return some
        except OSError:
            continue
        if raw.family is socket.AF_INET:
            data = data[(data[0] & 0x0F) * 4 :]
        theirs, ours = struct.unpack_from("!HH", data)
        flags = data[13]
        if ours != own:
            continue
        some = True
        port = Port(Protocol.TCP, ip_address(peer[0].partition("%")[0]), theirs)
        if flags & (_SYN | _ACK) == _SYN | _ACK:
            found.open.add(port)
        elif flags & _RST:
            found.refused.add(port)


# -- UDP ---------------------------------------------------------------------------------------


def _udp(client: Client, targets: Mapping[IPAddress, Sequence[int]], found: Scan) -> None:
    family = _family(next(iter(targets)))
    with client.open_socket(family, socket.SOCK_DGRAM) as probe:
        _bind(probe, client)
        probe.setsockopt(*_RECVERR[family], 1)
        probe.setblocking(False)
        for address, numbers in targets.items():
            place = str(address)
            for count, number in enumerate(numbers):
                _send(probe, _QUESTION, (place, number))
                if count % _BURST == 0:
                    _replies(probe, found)
        _until_settled(probe, lambda: _replies(probe, found))


def _replies(probe: socket.socket, found: Scan) -> bool:
    """Read what came back; whether anything did."""
    some = False
    for flags, kind in ((0, found.open), (socket.MSG_ERRQUEUE, found.refused)):
        while True:
            try:
                _, ancillary, _, peer = probe.recvmsg(512, 256, flags)
            except BlockingIOError:
                break
            except OSError:
                continue  # an error that waits in the queue, too
            some = True
            port = Port(Protocol.UDP, ip_address(peer[0].partition("%")[0]), peer[1])
            if not flags or _is_refusal(ancillary):
                kind.add(port)
    return some


def _is_refusal(ancillary: Sequence[tuple[int, int, bytes]]) -> bool:
    """Whether the error is the peer's own "port unreachable" (ip(7), struct sock_extended_err)."""
    return any(struct.unpack_from("=I", data)[0] == errno.ECONNREFUSED for _, _, data in ancillary)


def _until_settled(sock: socket.socket, read: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SETTLE
    while (left := deadline - time.monotonic()) > 0:
        with suppress(InterruptedError):
            select.select([sock], [], [sock], left)
        if read():
            deadline = max(deadline, time.monotonic() + SETTLE / 4)
