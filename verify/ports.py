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
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_address

import dns.message

from mailsite.model import IPAddress
from verify.client import Client

SETTLE = 1.0
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


def scan(client: Client, targets: Iterable[Port]) -> Scan:
    """Probe ``targets`` from where ``client`` stands."""
    found = Scan()
    wanted: dict[tuple[Protocol, int], list[Port]] = {}
    for port in targets:
        wanted.setdefault((port.protocol, port.address.version), []).append(port)
    for (protocol, _), ports in wanted.items():
        (_tcp if protocol is Protocol.TCP else _udp)(client, ports, found)
    return found


def _bind(sock: socket.socket, client: Client) -> None:
    own = client.ipv4 if sock.family is socket.AF_INET else client.ipv6
    if own is not None:
        sock.bind((str(own), 0))


def _family(address: IPAddress) -> socket.AddressFamily:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


# -- TCP ---------------------------------------------------------------------------------------


def _tcp(client: Client, ports: Sequence[Port], found: Scan) -> None:
    family = _family(ports[0].address)
    sources = {a: source_of(client, a) for a in {port.address for port in ports}}
    own = random.randrange(20000, 28000)  # below the kernel's own (ip_local_port_range)
    with client.open_socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        _bind(raw, client)
        raw.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, 64 * 1024 * 1024)
        if family is socket.AF_INET6:
            raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, 16)
        raw.setblocking(False)
        for number, port in enumerate(ports):
            source = sources[port.address]
            if source is not None:
                _send(raw, _segment(source, port, own), port.address)
            if number % _BURST == 0:
                _answers(raw, own, found)
        _until_settled(raw, lambda: _answers(raw, own, found))


def _segment(source: IPAddress, port: Port, own: int) -> bytes:
    sequence = random.getrandbits(32)
    fields = [own, port.number, sequence, 0, 5 << 4, _SYN, 1024, 0, 0]
    if port.address.version == 4:
        packed = source.packed + port.address.packed + struct.pack("!HH", 6, _HEADER.size)
        fields[7] = _checksum(packed + _HEADER.pack(*fields))
    return _HEADER.pack(*fields)


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _send(raw: socket.socket, packet: bytes, target: IPAddress, number: int = 0) -> None:
    for _ in range(50):
        try:
            raw.sendto(packet, (str(target), number))
        except BlockingIOError:
            select.select([], [raw], [], 1.0)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                time.sleep(0.001)  # the device's queue is full, and nothing tells when it is not
                continue
            if error.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH):
                return  # what an earlier probe was told
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


def _udp(client: Client, ports: Sequence[Port], found: Scan) -> None:
    family = _family(ports[0].address)
    with client.open_socket(family, socket.SOCK_DGRAM) as probe:
        _bind(probe, client)
        probe.setsockopt(*_RECVERR[family], 1)
        probe.setblocking(False)
        for number, port in enumerate(ports):
            _send(probe, _QUESTION, port.address, port.number)
            if number % _BURST == 0:
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
