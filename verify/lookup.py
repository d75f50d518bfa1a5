"""Names as a client outside resolves them: DNS through dnspython."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdatatype
import dns.resolver
import dns.reversename

from mailsite.model import IPAddress
from verify.client import Client
from verify.registry import Failed


class Lookup:
    """Asks one resolver from one place.

    Args:
        client: Who asks.
        servers: Addresses of the resolver; empty: those of this machine.
        port: UDP and TCP port of the resolver.
    """

    def __init__(self, client: Client, servers: tuple[IPAddress, ...] = (), port: int = 53) -> None:
        self._client = client
        self._resolver = dns.resolver.Resolver(configure=not servers)
        if servers:
            self._resolver.nameservers = [str(s) for s in servers]
        self._resolver.port = port
        self._resolver.lifetime = 5.0

    def answer(self, name: str, kind: str) -> dns.resolver.Answer | None:
        """The answer to a question; None where the name or the type does not exist.

        Raises:
            Failed: No answer: servers fail, or not in time.
        """
        try:
            with self._client.enter():
                return self._resolver.resolve(dns.name.from_text(name), kind, search=False)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return None
        except (dns.resolver.NoNameservers, dns.exception.Timeout) as error:
            raise Failed(f"{name} {kind}: {error}") from error

    def texts(self, name: str, kind: str) -> list[str]:
        """The records' data as text, sorted; empty where there are none."""
        found = self.answer(name, kind)
        return sorted(r.to_text() for r in found) if found is not None else []

    def strings(self, name: str) -> list[tuple[bytes, ...]]:
        """The TXT records at ``name``, each as its strings."""
        found = self.answer(name, "TXT")
        return [tuple(r.strings) for r in found] if found is not None else []

    def txt(self, name: str) -> list[str]:
        """The TXT records at ``name``, strings joined as SPF and DKIM do (RFC 7208, 3.3)."""
        return [b"".join(s).decode("ascii", "replace") for s in self.strings(name)]

    def addresses(self, name: str) -> set[IPAddress]:
        """A and AAAA of ``name``, aliases followed."""
        return {ip_address(text) for kind in ("A", "AAAA") for text in self.texts(name, kind)}

    def canonical(self, name: str) -> str:
        """Where the CNAMEs from ``name`` end, lower case, without trailing dot."""
        found = self.answer(name, "A") or self.answer(name, "AAAA")
        if found is None:
            return name
        return found.canonical_name.to_text(omit_final_dot=True).lower()

    def pointers(self, address: IPAddress) -> list[str]:
        """The names that the address' PTR records give, without trailing dot."""
        reverse = dns.reversename.from_address(str(address)).to_text()
        return [t.rstrip(".").lower() for t in self.texts(reverse, "PTR")]


def ask(
    client: Client,
    server: IPAddress | str,
    name: str,
    kind: str = "A",
    *,
    timeout: float = 5.0,
    recurse: bool = True,
    attempts: int = 1,
) -> dns.message.Message:
    """One question to one server, with DNSSEC asked for (RFC 4035, section 3.2).

    Raises:
        Failed: No answer in time.
    """
    query = dns.message.make_query(name, kind, want_dnssec=True)
    if not recurse:
        query.flags &= ~dns.flags.RD
    for attempt in range(attempts):
        try:
            with client.enter():
                reply, _ = dns.query.udp_with_fallback(query, str(server), timeout=timeout)
                return reply
        except (dns.exception.Timeout, OSError) as error:
            if attempt + 1 == attempts:
                raise Failed(f"{name} {kind} at {server}: {describe_dns(error)}") from error
    raise AssertionError("attempts must be 1 or more")


def describe_dns(error: Exception) -> str:
    return "no answer" if isinstance(error, dns.exception.Timeout) else str(error)


def family(address: IPAddress) -> str:
    return "IPv4" if isinstance(address, IPv4Address) else "IPv6"
