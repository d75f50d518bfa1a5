"""Where the records of the Cloudflare stand-in are served from.

:class:`NameServer` changes the zones of a real authoritative name server by dynamic updates
(RFC 2136) that are signed (TSIG, RFC 8945).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import dns.exception
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.tsig
import dns.tsigkeyring
import dns.update

from .base import ProviderError

TIMEOUT: Final = 10.0
"""Seconds to wait for an answer of the name server."""

CONNECTIONS: Final = 8
"""To the name server at once. Knot keeps no more than ten waiting, and a client that it leaves out
tries again after a second.
"""

_OF_SIGNING: Final = frozenset(
    {
        dns.rdatatype.RRSIG,
        dns.rdatatype.NSEC,
        dns.rdatatype.NSEC3,
        dns.rdatatype.NSEC3PARAM,
        dns.rdatatype.DNSKEY,
        dns.rdatatype.CDS,
        dns.rdatatype.CDNSKEY,
    }
)


@dataclass(frozen=True, order=True)
class Data:
    """One resource record of a name: its type and its data in presentation format."""

    type: str
    text: str


def canonical(type: str, text: str) -> Data:
    """The record in dnspython's spelling, names absolute, so that equal records compare equal.

    Raises :class:`dns.exception.DNSException` or ``ValueError`` for data that is no ``type``.
    """
    return Data(type, _rdata(Data(type, text)).to_text())


class Publisher(Protocol):
    """Serves the zones of the operator."""

    def zones(self) -> Mapping[str, str]:
        """Name of each zone by its id at the DNS provider."""

    def records(self, zone: str, name: str) -> frozenset[Data]:
        """What is served under ``name`` now, whoever put it there. DNSSEC's own is left out."""

    def change(
        self, zone: str, remove: tuple[str, Data] | None, add: tuple[str, int, Data] | None
    ) -> None:
        """In one step: take away a record (name, data), add one (name, TTL in seconds, data)."""


class NameServer:
    """The world's authoritative server.

    ``access`` is the file that says where it is and with which key it takes updates:
    ``{"address", "port", "key_name", "key_algorithm", "key_secret", "zones": {id: zone}}``.
    ``guard`` is called before anything is sent; it raises where a packet could get out.
    """

    def __init__(self, access: Path, guard: Callable[[], None]) -> None:
        self._access = access
        self._guard = guard
        self._free = threading.BoundedSemaphore(CONNECTIONS)

    def _read(self) -> dict[str, Any]:
        try:
            access: dict[str, Any] = json.loads(self._access.read_text())
        except FileNotFoundError:
            raise ProviderError(
                f"{self._access} is missing: the world's name server is not up; run: make rehearsal"
            ) from None
        return access

    def zones(self) -> Mapping[str, str]:
        zones: dict[str, str] = self._read()["zones"]
        return zones

    def _ask(self, query: dns.message.Message, access: Mapping[str, Any]) -> dns.message.Message:
        self._guard()
        where = f"{access['address']} port {access['port']}"
        try:
            with self._free:
                return dns.query.tcp(query, access["address"], port=access["port"], timeout=TIMEOUT)
        except dns.tsig.PeerError as error:
            raise ProviderError(f"name server {where} refuses the key: {error}") from error
        except (OSError, dns.exception.DNSException) as error:
            raise ProviderError(f"name server {where}: {error or type(error).__name__}") from error

    def records(self, zone: str, name: str) -> frozenset[Data]:
        # Over TCP Knot answers ANY with all it has.
        query = dns.message.make_query(name, dns.rdatatype.ANY)
        query.flags &= ~dns.flags.RD
        answer = self._ask(query, self._read())
        if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            raise ProviderError(f"{name}: {dns.rcode.to_text(answer.rcode())}")
        owner = dns.name.from_text(name)
        return frozenset(
            Data(dns.rdatatype.to_text(rrset.rdtype), rdata.to_text())
            for rrset in answer.answer
            if rrset.name == owner and rrset.rdtype not in _OF_SIGNING
            for rdata in rrset
        )

    def change(
        self, zone: str, remove: tuple[str, Data] | None, add: tuple[str, int, Data] | None
    ) -> None:
        access = self._read()
        update = dns.update.UpdateMessage(
            zone,
            keyring=dns.tsigkeyring.from_text({access["key_name"]: access["key_secret"]}),
            keyname=access["key_name"],
            keyalgorithm=access["key_algorithm"],
        )
        if remove is not None:
            name, data = remove
            update.delete(_absolute(name), _rdata(data))
        if add is not None:
            name, ttl, data = add
            update.add(_absolute(name), ttl, _rdata(data))
        answer = self._ask(update, access)
        if answer.rcode() != dns.rcode.NOERROR:
            raise ProviderError(
                f"update of zone {zone} refused: {dns.rcode.to_text(answer.rcode())}"
            )


def _absolute(name: str) -> dns.name.Name:
    return dns.name.from_text(name)


def _rdata(data: Data) -> dns.rdata.Rdata:
    return dns.rdata.from_text(
        dns.rdataclass.IN, data.type, data.text, origin=dns.name.root, relativize=False
    )


def types(records: Collection[Data]) -> set[str]:
    """The types among ``records``."""
    return {data.type for data in records}
