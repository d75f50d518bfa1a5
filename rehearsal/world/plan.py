"""What there is in the outside world: its names, its addresses and how each mail server behaves.

Addresses come from the benchmarking prefixes 198.18.0.0/15 (RFC 2544) and 2001:2::/48 (RFC 5180):
nobody uses them on the internet, and, unlike the documentation prefixes, a resolver asks the
network for their reverse names (Unbound answers for 192.0.2.0/24 and its like by itself).
The root servers alone have their real addresses, so that hosts keep the root hints of Debian.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_network

from mailsite.model import IPAddress, Platform


@dataclass(frozen=True)
class Pair:
    """An IPv4 and an IPv6 address of one thing."""

    ipv4: IPv4Address
    ipv6: IPv6Address

    def __iter__(self) -> Iterator[IPAddress]:
        yield self.ipv4
        yield self.ipv6


def _pair(ipv4: str, ipv6: str) -> Pair:
    return Pair(IPv4Address(ipv4), IPv6Address(ipv6))


class Mode(StrEnum):
    """What a mail server does with a mail. It can be changed at any time."""

    ACCEPT = "accept"
    DEFER = "defer"
    """451 to every recipient."""
    REFUSE = "refuse"
    """550 to every recipient."""
    DOWN = "down"
    """Nothing listens: the connection is refused."""
    WRONG_CERTIFICATE = "wrong-certificate"
    """Accepts, but its certificate is for another name and has another key."""


class Tls(StrEnum):
    """Where a mail server's certificate comes from."""

    NONE = "none"
    AUTHORITY = "authority"
    DANE = "dane"
    """Self-signed; a TLSA record vouches for it (RFC 7672)."""


class Demand(StrEnum):
    """What a mail server refuses for. All of them write down what they found."""

    NOTHING = "nothing"
    AUTHORIZED = "authorized"
    """SPF must pass, and DMARC where the author's domain asks for it: a careful forward's end."""
    EVERYTHING = "everything"
    """SPF, DKIM and DMARC must pass."""


@dataclass(frozen=True)
class Mx:
    """A mail server of the outside and the mail domain that it serves."""

    name: str
    addresses: Pair
    mode: Mode = Mode.ACCEPT
    tls: Tls = Tls.AUTHORITY
    demands: Demand = Demand.NOTHING

    @property
    def domain(self) -> str:
        return f"{self.name}.example"

    @property
    def host(self) -> str:
        return f"mx.{self.domain}"


def _mx(
    name: str,
    number: int,
    mode: Mode = Mode.ACCEPT,
    tls: Tls = Tls.AUTHORITY,
    demands: Demand = Demand.NOTHING,
) -> Mx:
    return Mx(name, _pair(f"198.18.25.{number}", f"2001:2:0:25::{number}"), mode, tls, demands)


MAIL_SERVERS = {
    mx.name: mx
    for mx in (
        _mx("strict", 11, demands=Demand.EVERYTHING),
        _mx("flaky", 12, Mode.DEFER),
        _mx("refusing", 13, Mode.REFUSE),
        _mx("plain", 14, tls=Tls.NONE),
        _mx("home", 15),
        _mx("dane", 16, tls=Tls.DANE),
        _mx("generic", 17),
        _mx("elsewhere", 18, demands=Demand.AUTHORIZED),
        _mx("origin", 19),
    )
}
"""``home`` is the operator's old server: it takes the mail of the site's own domains, and holds
the mailboxes. ``elsewhere`` is where addresses of the site forward to, ``origin`` where the remote
senders get their answers and bounces."""

HOME = MAIL_SERVERS["home"]
ELSEWHERE = MAIL_SERVERS["elsewhere"]
ORIGIN = MAIL_SERVERS["origin"]


@dataclass(frozen=True)
class Sender:
    """Somebody on the internet who sends mail: a mail server of its own, and what vouches for it.

    ``spf``: the domain allows its own addresses and no others (``-all``). ``dkim``: it publishes
    a key, with which its mail is signed.
    """

    name: str
    addresses: Pair
    spf: bool = False
    dkim: bool = False

    @property
    def domain(self) -> str:
        return f"{self.name}.example"

    @property
    def host(self) -> str:
        """What it says in HELO; its addresses lead to this name and back."""
        return f"mail.{self.domain}"


def _sender(name: str, number: int, *, spf: bool = False, dkim: bool = False) -> Sender:
    # Postfix counts per /84: none of them is taken for another.
    pair = _pair(f"198.18.26.{number}", f"2001:2:0:26:{number}::1")
    return Sender(name, pair, spf, dkim)


SENDERS = {
    sender.name: sender
    for sender in (
        _sender("careful", 11, spf=True),
        _sender("signer", 12, dkim=True),
        _sender("bare", 13),
        _sender("spammer", 14),
        _sender("smuggler", 15),
    )
}
"""They have no machine: checks connect from their addresses."""

SENDER_SELECTOR = "s1"
"""Of the key of those that sign."""

ROOT_SERVERS = {
    "a": _pair("198.41.0.4", "2001:503:ba3e::2:30"),
    "b": _pair("170.247.170.2", "2801:1b8:10::b"),
    "c": _pair("192.33.4.12", "2001:500:2::c"),
    "d": _pair("199.7.91.13", "2001:500:2d::d"),
    "e": _pair("192.203.230.10", "2001:500:a8::e"),
    "f": _pair("192.5.5.241", "2001:500:2f::f"),
    "g": _pair("192.112.36.4", "2001:500:12::d0d"),
    "h": _pair("198.97.190.53", "2001:500:1::53"),
    "i": _pair("192.36.148.17", "2001:7fe::53"),
    "j": _pair("192.58.128.30", "2001:503:c27::2:30"),
    "k": _pair("193.0.14.129", "2001:7fd::1"),
    "l": _pair("199.7.83.42", "2001:500:9f::42"),
    "m": _pair("202.12.27.33", "2001:dc3::35"),
}

FORMER_ROOT_SERVERS = (_pair("199.9.14.201", "2001:500:200::b"),)
"""Still in the root hints of some resolvers: the addresses that ``b`` had until 2023."""

NAME_SERVERS = {
    "ada.dns.example": _pair("198.18.53.1", "2001:2:0:53::1"),
    "bob.dns.example": _pair("198.18.53.2", "2001:2:0:53::2"),
}
"""Serve every zone but the root."""

LISTS_SERVER = "lists.dns.example"
LISTS = _pair("198.18.53.10", "2001:2:0:53::10")
"""The name server of every block list that the site asks."""


class ListMode(StrEnum):
    """How a block list behaves."""

    ANSWER = "answer"
    FAIL = "fail"
    """SERVFAIL to everything."""
    SILENT = "silent"
    """No answer at all."""


RESOLVER = _pair("198.18.53.53", "2001:2:0:53::53")
"""The resolver that people on the internet get from their provider. It validates."""

MIRROR = _pair("198.18.80.1", "2001:2:0:80::1")
MIRROR_NAMES = ("deb.debian.org", "security.debian.org")

ACME = _pair("198.18.90.1", "2001:2:0:90::1")
ACME_NAME = "acme.authority.example"
"""The certificate authority that the operator's hosts ask for certificates."""

LEG = _pair("192.0.2.2", "2001:db8:ffff::2")
"""The world's own leg towards the platform's routers; DNS updates and transfers go there."""
LEG_PREFIXES = (24, 64)
GATEWAY = _pair("192.0.2.1", "2001:db8:ffff::1")

BOGUS_DOMAIN = "bogus.example"
"""Signed, but the parent vouches for another key: must not resolve for a validating resolver."""
UNSIGNED_DOMAIN = "unsigned.example"


def service_addresses() -> tuple[IPAddress, ...]:
    """Every address that the world's machine answers on, but for its leg."""
    pairs = (
        *ROOT_SERVERS.values(),
        *FORMER_ROOT_SERVERS,
        *NAME_SERVERS.values(),
        LISTS,
        RESOLVER,
        MIRROR,
        ACME,
        *(mx.addresses for mx in MAIL_SERVERS.values()),
    )
    return tuple(address for pair in pairs for address in pair)


def sender_addresses() -> tuple[IPAddress, ...]:
    """Every address that a remote sender connects from."""
    return tuple(address for sender in SENDERS.values() for address in sender.addresses)


def name_server_addresses() -> tuple[IPAddress, ...]:
    """The addresses that the authoritative server answers on."""
    pairs = (LEG, *ROOT_SERVERS.values(), *FORMER_ROOT_SERVERS, *NAME_SERVERS.values())
    return tuple(address for pair in pairs for address in pair)


def collisions(platform: Platform) -> tuple[str, ...]:
    """Addresses of the world that lie in a network of the platform, as text for an error."""
    networks = [
        (f"network {name}", prefix)
        for name, network in platform.networks.items()
        for prefix in (network.ipv4.prefix, network.ipv6.prefix)
    ]
    networks += [
        (f"egress {name}", ip_network(address))
        for name, egress in platform.egress.items()
        for address in (egress.ipv4, egress.ipv6)
    ]
    networks += [("a management network", prefix) for prefix in platform.management.networks]
    return tuple(
        f"{address} (of the rehearsal's outside world) lies in {what} {prefix}"
        for address in (*service_addresses(), *sender_addresses(), *LEG, *GATEWAY)
        for what, prefix in networks
        if address.version == prefix.version and address in prefix
    )
