"""The sealed network of a rehearsal: every network of the site data, with no way out.

::

    mail-operator   mail-obs-internet  mail-obs-office  mail-obs-local
         |                 |                 |                |
    +----+-----------------+-----------------+----------------+----+
    | mail-core: one bridge per network (n0, n1, ...) with the     |
    | gateways' addresses, forwarding, source NAT, bridge `inet`   |
    +----+-----------------+-----------------+---------------------+
         |                 |                 |
    mail-m-<machine> ...                mail-m-world

All of them are network namespaces under ``/run/netns`` whose names start with ``mail-``; none
has a link to the namespace of the host. So the addresses and names of production can be used,
and no packet can reach production. Tools that send call :func:`assert_sealed` first.
"""

from __future__ import annotations

import ctypes
import hashlib
import ipaddress
import itertools
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from pathlib import Path
from typing import Any

from mailsite.model import NetworkKind, Platform
from rehearsal.progress import RehearsalError
from rehearsal.state import ProcessId, State

IPAddress = IPv4Address | IPv6Address
IPInterface = IPv4Interface | IPv6Interface
IPNetwork = IPv4Network | IPv6Network

NETNS = Path("/run/netns")
CORE = "mail-core"
OPERATOR = "mail-operator"
OBSERVERS = ("internet", "office", "local")
MACHINE_PREFIX = "mail-m-"

INET = "inet"
INET_CORE: tuple[IPInterface, ...] = (
    IPv4Interface("192.0.2.1/24"),
    IPv6Interface("2001:db8:ffff::1/64"),
)
INET_WORLD: tuple[IPInterface, ...] = (
    IPv4Interface("192.0.2.2/24"),
    IPv6Interface("2001:db8:ffff::2/64"),
)

# Next hop of the namespaces that hang on core by a cable of their own: link-local, so that it
# can collide with no address of the site data.
_HOP: tuple[IPAddress, ...] = (IPv4Address("169.254.77.1"), IPv6Address("fe80::1"))
_INTERNET4 = ("203.0.113.10", "198.51.100.10", "100.64.77.10")
_INTERNET6 = ("2001:db8:aaaa::10", "2001:db8:abba::10", "100::77:10")
_KINDS = frozenset({"veth", "bridge", "ifb"})


@dataclass(frozen=True)
class Bridge:
    """A layer-2 network in core. ``addresses`` are the gateways' with their prefix lengths."""

    name: str
    network: str
    kind: NetworkKind
    addresses: tuple[IPInterface, ...]


@dataclass(frozen=True)
class Seat:
    """A namespace from which something of ours, or an observer, talks.

    ``bridge`` empty: it hangs on core by a cable of its own, and its addresses are host routes
    there. Otherwise it is a station in that bridge's network like any host.
    """

    namespace: str
    legs: tuple[tuple[str, IPInterface, IPAddress], ...]
    """One per family: bridge or "", address, gateway."""

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        return tuple(address.ip for _, address, _ in self.legs)


@dataclass(frozen=True)
class Plan:
    """What is to be built; made from site data alone."""

    bridges: tuple[Bridge, ...]
    seats: tuple[Seat, ...]
    egress: tuple[tuple[IPAddress, str], ...]
    """Address and the device in core that holds it."""
    ruleset: str

    def seat(self, name: str) -> Seat:
        return next(s for s in self.seats if s.namespace.removeprefix("mail-") == name)


def plan(platform: Platform, names: Mapping[str, str] | None = None) -> Plan:
    """Lay out the sealed network for ``platform``.

    ``names`` gives the bridge names of a network that is already built (network -> bridge), so
    that a network added later leaves the others where machines are plugged in.
    Raises :class:`RehearsalError` where the site data uses addresses of the rehearsal's own.
    """
    given = dict(names or {})
    fresh = (f"n{i}" for i in itertools.count() if f"n{i}" not in given.values())
    bridges = tuple(
        Bridge(
            name=given.get(name) or next(fresh),
            network=name,
            kind=network.kind,
            addresses=(
                IPv4Interface((network.ipv4.gateway, network.ipv4.prefix.prefixlen)),
                IPv6Interface((network.ipv6.gateway, network.ipv6.prefix.prefixlen)),
            ),
        )
        for name, network in platform.networks.items()
    )
    for bridge in bridges:
        for address, own in itertools.product(bridge.addresses, INET_CORE):
            if address.version == own.version and _overlap(address.network, own.network):
                raise RehearsalError(
                    f"network {bridge.network} ({address.network}) overlaps {own.network}, which "
                    "the rehearsal uses between its core and the outside world",
                    f"use another prefix than {own.network} in topology.yaml",
                )
    seats = _seats(platform, bridges)
    egress = tuple(
        (address, _holder(address, bridges))
        for gateway in platform.egress.values()
        for address in (gateway.ipv4, gateway.ipv6)
    )
    return Plan(bridges, seats, egress, _ruleset(platform, bridges, seats))


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    if isinstance(one, IPv4Network):
        return isinstance(other, IPv4Network) and one.overlaps(other)
    return isinstance(other, IPv6Network) and one.overlaps(other)


def _bridge_at(address: IPAddress, bridges: Iterable[Bridge]) -> tuple[Bridge, IPInterface] | None:
    for bridge in bridges:
        for gateway in bridge.addresses:
            if address in gateway.network:
                return bridge, gateway
    return None


def _holder(address: IPAddress, bridges: Iterable[Bridge]) -> str:
    """Device in core for an egress address: neighbours ask for it where its network is."""
    found = _bridge_at(address, bridges)
    return found[0].name if found else "lo"


def _taken(platform: Platform) -> set[IPAddress]:
    taken: set[IPAddress] = {a for host in platform.hosts.values() for a in host.addresses}
    for network in platform.networks.values():
        taken |= {network.ipv4.gateway, network.ipv6.gateway}
    for gateway in platform.egress.values():
        taken |= {gateway.ipv4, gateway.ipv6}
    return taken


def _seats(platform: Platform, bridges: tuple[Bridge, ...]) -> tuple[Seat, ...]:
    taken = _taken(platform)

    def seat(
        namespace: str, candidates: Callable[[int], Iterator[IPAddress]], *, on_bridge: bool
    ) -> Seat:
        legs: list[tuple[str, IPInterface, IPAddress]] = []
        for hop in _HOP:
            leg = _first_leg(candidates(hop.version), hop, on_bridge=on_bridge)
            if leg is not None:
                taken.add(leg[1].ip)
                legs.append(leg)
        if not legs:
            raise RehearsalError(
                f"no address is free for {namespace}",
                "add a network to management.networks in site.yaml that has a free address",
            )
        return Seat(namespace, tuple(legs))

    def _first_leg(
        candidates: Iterator[IPAddress], hop: IPAddress, *, on_bridge: bool
    ) -> tuple[str, IPInterface, IPAddress] | None:
        fallback: tuple[str, IPInterface, IPAddress] | None = None
        for address in candidates:
            if address in taken:
                continue
            found = _bridge_at(address, bridges)
            if found is None:
                return "", ipaddress.ip_interface(address), hop
            bridge, gateway = found
            station = ipaddress.ip_interface(f"{address}/{gateway.network.prefixlen}")
            if on_bridge:
                return bridge.name, station, gateway.ip
            fallback = fallback or (bridge.name, station, gateway.ip)
        return fallback

    def management(offset: int) -> Callable[[int], Iterator[IPAddress]]:
        def candidates(version: int) -> Iterator[IPAddress]:
            for prefix in platform.management.networks:
                if prefix.version == version:
                    size = min(prefix.num_addresses, 512)
                    for step in range(size):
                        yield prefix[(offset + step) % size]

        return candidates

    def internet(version: int) -> Iterator[IPAddress]:
        yield from map(ipaddress.ip_address, _INTERNET4 if version == 4 else _INTERNET6)

    def local(version: int) -> Iterator[IPAddress]:
        kinds = sorted(bridges, key=lambda b: b.kind is not NetworkKind.SITE_LOCAL)
        for bridge in kinds:
            for gateway in bridge.addresses:
                if gateway.version == version:
                    network = gateway.network
                    size = min(network.num_addresses - 2, 2**16 - 2)
                    for offset in range(size, max(size - 512, 0), -1):
                        yield network[offset]

    return (
        seat(OPERATOR, management(10), on_bridge=False),
        seat("mail-obs-internet", internet, on_bridge=False),
        seat("mail-obs-office", management(20), on_bridge=False),
        seat("mail-obs-local", local, on_bridge=True),
    )


def _ruleset(platform: Platform, bridges: tuple[Bridge, ...], seats: tuple[Seat, ...]) -> str:
    """nft rules of core: source NAT of site-local networks, and their inaccessibility."""
    local = [b for b in bridges if b.kind is NetworkKind.SITE_LOCAL]
    inner = [s for s in seats if s.namespace in (OPERATOR, "mail-obs-office")]
    space: list[IPNetwork] = []
    if platform.site_local is not None:
        space = [platform.site_local.ipv4, platform.site_local.ipv6]
    lines = ["table inet mail", "delete table inet mail", "table inet mail {"]
    for version in (4, 6):
        prefixes = [a.network for b in local for a in b.addresses if a.version == version]
        whole = [p for p in space if p.version == version]
        seated = [a for s in inner for a in s.addresses if a.version == version]
        for name, elements in (
            ("local", [str(p) for p in prefixes]),
            ("inside", [str(e) for e in (*prefixes, *whole, *seated)]),
        ):
            lines.append(f"  set {name}{version} {{")
            lines.append(f"    type ipv{version}_addr; flags interval; auto-merge;")
            if elements:
                lines.append(f"    elements = {{ {', '.join(elements)} }}")
            lines.append("  }")
    trusted = [b.name for b in local] + [_port(s) for s in inner]
    for hook in ("input", "forward"):
        lines += [
            f"  chain {hook} {{",
            f"    type filter hook {hook} priority filter; policy accept;",
            "    ct state established,related accept",
            f"    iifname {{ lo, {', '.join(trusted)} }} accept",
            "    ip daddr @local4 drop",
            "    ip6 daddr @local6 drop",
            "  }",
        ]
    lines += [
        "  chain postrouting {",
        "    type nat hook postrouting priority srcnat; policy accept;",
    ]
    everywhere = list(platform.egress.values())
    for bridge in local:
        site = platform.networks[bridge.network].site
        gateways = [g for g in everywhere if g.site == site] or everywhere
        for gateway in bridge.addresses:
            family = "ip" if gateway.version == 4 else "ip6"
            targets: list[IPAddress] = [
                g.ipv4 if gateway.version == 4 else g.ipv6 for g in gateways
            ]
            if not targets:
                continue
            to = str(targets[0])
            if len(targets) > 1:
                pairs = ", ".join(f"{i} : {t}" for i, t in enumerate(targets))
                hashed = f"jhash {family} saddr . {family} daddr mod {len(targets)}"
                to = f"{hashed} map {{ {pairs} }}"
            lines.append(
                f"    {family} saddr {gateway.network} "
                f"{family} daddr != @inside{gateway.version} snat {family} to {to}"
            )
    return "\n".join([*lines, "  }", "}", ""])


def _port(seat: Seat) -> str:
    """Device name of a seat's own cable in core (at most 15 characters)."""
    return "c-" + seat.namespace.removeprefix("mail-").removeprefix("obs-")


# Doing it ------------------------------------------------------------------------------------


def namespaces() -> tuple[str, ...]:
    """Names of the rehearsal's namespaces that exist on this machine."""
    try:
        names = sorted(p.name for p in NETNS.iterdir())
    except FileNotFoundError:
        return ()
    fixed = fixed_namespaces()
    return tuple(n for n in names if n in fixed or n.startswith(MACHINE_PREFIX))


def fixed_namespaces() -> tuple[str, ...]:
    """Names of the namespaces that every rehearsal has."""
    return (CORE, OPERATOR, *(f"mail-obs-{o}" for o in OBSERVERS))


def machine_namespace(name: str) -> str:
    """Name of the network namespace of the machine ``name``."""
    return MACHINE_PREFIX + name


def run_in(
    namespace: str,
    argv: Sequence[str],
    *,
    input: str | bytes | None = None,
    check: bool = True,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in a network namespace of the rehearsal (not in a machine: see Machine.run).

    Only the network is entered; files and processes are the host's. (``ip netns exec`` would
    remount /sys and hide the cgroups that machines need.)
    """
    text = input.decode() if isinstance(input, bytes) else input
    return subprocess.run(
        ["nsenter", f"--net={NETNS / namespace}", "--", *argv],
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        check=check,
        timeout=timeout,
        env=env,
        text=True,
        capture_output=True,
    )


_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _setns(handle: int) -> None:
    if _libc.setns(handle, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


@contextmanager
def enter(namespace: str) -> Iterator[None]:
    """Let the calling thread use the network of ``namespace``, and come back afterwards.

    Sockets made inside stay there. Other threads are not affected; threads started inside
    inherit the namespace and keep it.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            there = os.open(NETNS / namespace, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise RehearsalError(
                f"there is no network {namespace}: no rehearsal is up", "run: make rehearsal"
            ) from None
        try:
            _setns(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(before)
    finally:
        os.close(before)


def _host_inode() -> int | None:
    """Network namespace of the machine's first process, where that may be asked."""
    try:
        return Path("/proc/1/ns/net").stat().st_ino
    except OSError:
        return None


def assert_sealed() -> None:
    """Raise unless the calling thread is in a network of the rehearsal that has no way out.

    Refuses in the namespace of the host's first process, in any namespace that is not one of
    :func:`namespaces`, and where any of ours holds a device that is not a bridge or one end of
    a cable whose other end is in another of ours. Everything that sends calls this first.
    """
    here = Path("/proc/thread-self/ns/net").stat().st_ino
    if here == _host_inode() or here not in _inodes(namespaces()):
        raise RehearsalError(
            "this would send to real networks: it does not run in a sealed network of a rehearsal",
            "start a rehearsal with: make rehearsal, and run this through python -m rehearsal",
        )
    _seal.make_sure()


class _Seal:
    """Whether the namespaces are sealed, all of them at once.

    One look serves every thread for a while: many connections are opened in a row.
    """

    SECONDS = 2.0
    PLUGGING_SECONDS = 15.0
    """On a busy machine one look at all namespaces takes seconds."""

    def __init__(self) -> None:
        self._seen = -self.SECONDS
        self._lock = threading.Lock()

    def make_sure(self) -> None:
        with self._lock:
            if time.monotonic() - self._seen < self.SECONDS:
                return
            # While a machine is plugged in or out, one of its cables may seem to lead nowhere.
            deadline = time.monotonic() + self.PLUGGING_SECONDS
            while leak := _leak():
                if time.monotonic() > deadline:
                    raise RehearsalError(leak, "run: make down")
                time.sleep(0.02)
            self._seen = time.monotonic()

    def forget(self) -> None:
        """Look again next time."""
        self._seen = -self.SECONDS


_seal = _Seal()


def _inodes(names: Iterable[str]) -> set[int]:
    found: set[int] = set()
    for name in names:
        with suppress(FileNotFoundError):
            found.add((NETNS / name).stat().st_ino)
    return found


def _leak() -> str:
    """A device that leads out of our namespaces, in words; empty if there is none."""
    ours = namespaces()
    for name in ours:
        try:
            known, links = _look_into(name)
        except (subprocess.CalledProcessError, RehearsalError):
            return f"{name} cannot be looked into"
        peers = {e["nsid"]: e.get("name", "") for e in known}
        for link in links:
            device = f"{link['ifname']} in {name}"
            if link["link_type"] == "loopback":
                continue
            kind = link.get("linkinfo", {}).get("info_kind", "")
            if kind not in _KINDS:
                return f"{device} leads out of the sealed network"
            if kind == "veth" and "link_netnsid" in link:
                peer = peers.get(link["link_netnsid"], "")
                if peer not in ours:
                    return f"{device} leads out of the sealed network, to {peer or 'the host'}"
    return ""


def _look_into(namespace: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The namespaces that a namespace has cables to, and its devices.

    By one command, which inherits the network: ``ip -n`` would copy all mounts of the machine.
    """
    with enter(namespace):
        done = subprocess.run(
            ["ip", "-json", "-details", "-batch", "-"],
            input="netns list-id\nlink\n",
            check=True,
            text=True,
            capture_output=True,
        )
    peers, links = (
        [entry for entry in json.loads(line) if entry] for line in done.stdout.splitlines()
    )
    return peers, links


def _ip(namespace: str, commands: Iterable[str]) -> None:
    """Run a batch of ip(8) commands in a namespace."""
    batch = "".join(c + "\n" for c in commands)
    if not batch:
        return
    done = subprocess.run(
        ["ip", "-n", namespace, "-batch", "-"], input=batch, text=True, capture_output=True
    )
    if done.returncode != 0:
        raise RehearsalError(
            f"the sealed network cannot be built in {namespace}: {done.stderr.strip()}",
            "run: make down, then try again",
        )


def _remove_link(port: str) -> None:
    """Remove a cable from core whose other end is gone.

    The kernel takes such a cable away by itself when it gets to clean up the namespace, perhaps
    between our look and our command.
    """
    done = subprocess.run(
        ["ip", "-n", CORE, "link", "del", port], check=False, text=True, capture_output=True
    )
    if done.returncode != 0 and port in _links(CORE):
        raise RehearsalError(
            f"the cable {port} cannot be removed from {CORE}: {done.stderr.strip()}",
            "run: make down, then try again",
        )


def _ip_json(namespace: str, *arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["ip", "-n", namespace, "-j", *arguments], check=True, text=True, capture_output=True
    )
    found: list[dict[str, Any]] = json.loads(done.stdout or "[]")
    return [entry for entry in found if entry]


def _links(namespace: str) -> set[str]:
    return {str(link["ifname"]) for link in _ip_json(namespace, "link")}


_SYSCTLS = {
    # Addresses are usable at once, not after duplicate address detection's second.
    "ipv6/conf/all/accept_dad": "0",
    "ipv6/conf/default/accept_dad": "0",
    "ipv6/conf/default/dad_transmits": "0",
    "ipv6/conf/all/accept_ra": "0",
    "ipv6/conf/default/accept_ra": "0",
    "ipv4/conf/all/rp_filter": "0",
    "ipv4/conf/default/rp_filter": "0",
}
_ROUTER_SYSCTLS = {
    "ipv4/ip_forward": "1",
    "ipv6/conf/all/forwarding": "1",
    "ipv6/conf/default/forwarding": "1",
    "ipv4/conf/all/send_redirects": "0",
    "ipv4/conf/default/send_redirects": "0",
    "ipv4/icmp_ratelimit": "0",
    "ipv6/icmp/ratelimit": "0",
    # Frames within one bridge are no business of the router's rules.
    "bridge/bridge-nf-call-iptables": "0",
    "bridge/bridge-nf-call-ip6tables": "0",
    "bridge/bridge-nf-call-arptables": "0",
}


def _add_namespace(name: str, *, router: bool = False) -> None:
    if not (NETNS / name).exists():
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
    values = {**_SYSCTLS, **(_ROUTER_SYSCTLS if router else {})}
    with enter(name):
        for key, value in values.items():
            path = Path("/proc/thread-self/root/proc/sys/net") / key
            if path.exists():
                path.write_text(value, encoding="ascii")
    _ip(name, ["link set lo up"])


def _own_mac(device: str) -> str:
    """A locally administered MAC address that is always the same for a device's name."""
    return ":".join(
        ["02", *(f"{octet:02x}" for octet in hashlib.sha256(device.encode()).digest()[:5])]
    )


def cable_name(machine: str, leg: int) -> str:
    """Device name in core of the cable to a machine's interface number ``leg``."""
    return f"v{hashlib.sha256(machine.encode()).hexdigest()[:9]}-{leg}"


def plug(machine: str, legs: Sequence[tuple[str, str]]) -> str:
    """Make the network namespace of a machine, with one interface per leg (eth0, eth1, ...).

    ``legs`` are pairs (bridge in core, MAC address). Any namespace that the machine had before
    goes away with its cables. Returns the namespace's name.
    """
    unplug(machine)
    namespace = machine_namespace(machine)
    _add_namespace(namespace)
    commands: list[str] = []
    for number, (bridge, mac) in enumerate(legs):
        cable = cable_name(machine, number)
        commands += [
            f"link add {cable} type veth peer name eth{number} address {mac} netns {namespace}",
            f"link set {cable} master {bridge} up",
        ]
    _ip(CORE, commands)
    return namespace


def cut(machine: str, leg: int = 0) -> None:
    """Pull the cable of a machine's interface; nothing that it sends arrives any more."""
    _ip(CORE, [f"link set {cable_name(machine, leg)} down"])


def heal(machine: str, leg: int = 0) -> None:
    """Put the cable back in."""
    _ip(CORE, [f"link set {cable_name(machine, leg)} up"])


def unplug(machine: str) -> None:
    """Remove a machine's namespace with its cables; a namespace that is not there is fine.

    The cables go first and at once: a dying process says goodbye (FIN, RST) on its way out, and
    a machine whose plug was pulled does not.
    """
    if (NETNS / CORE).exists():
        mine = {cable_name(machine, n) for n in range(8)} & _links(CORE)
        _ip(CORE, [f"link del {name}" for name in sorted(mine)])
    remove_namespace(machine_namespace(machine))


def remove_namespace(name: str) -> None:
    if (NETNS / name).exists():
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def inhabitants(names: Iterable[str]) -> tuple[ProcessId, ...]:
    """Every process whose network is one of the namespaces, this one excepted."""
    inodes = _inodes(names)
    found: list[ProcessId] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if (entry / "ns/net").stat().st_ino in inodes:
                identity = ProcessId.of(int(entry.name))
                if identity is not None:
                    found.append(identity)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return tuple(found)


class Network:
    """The sealed network of one platform."""

    def __init__(self, platform: Platform, state: State) -> None:
        self._state = state
        self.plan = plan(platform, state.read_json("network.json").get("bridges"))

    @property
    def is_up(self) -> bool:
        wanted = {CORE, *(s.namespace for s in self.plan.seats)}
        return wanted <= set(namespaces())

    def up(self) -> None:
        """Build what is missing and set what differs; running machines keep their cables."""
        self._state.write(
            "network.json",
            json.dumps({"bridges": {b.network: b.name for b in self.plan.bridges}}, indent=1),
        )
        _add_namespace(CORE, router=True)
        there = _links(CORE)
        commands: list[str] = []
        bridges = [(b.name, b.addresses) for b in self.plan.bridges] + [(INET, INET_CORE)]
        for name, addresses in bridges:
            if name not in there:
                # Without an address of its own it would have that of a cable, and another one when
                # that machine dies: its neighbours would look for the gateway for ten seconds.
                commands.append(
                    f"link add {name} address {_own_mac(name)} type bridge"
                    " stp_state 0 forward_delay 0"
                )
                commands.append(f"link set {name} type bridge mcast_snooping 0")
            commands += [f"addr replace {a} dev {name} {_nodad(a.ip)}" for a in addresses]
            commands.append(f"link set {name} up")
        for address, device in self.plan.egress:
            commands.append(f"addr replace {address} dev {device} {_nodad(address)}")
        for world in INET_WORLD:
            commands.append(f"route replace default via {world.ip} dev {INET}")
        _ip(CORE, commands)
        for seat in self.plan.seats:
            self._seat_up(seat, there)
        done = run_in(CORE, ["nft", "-f", "-"], input=self.plan.ruleset, check=False)
        if done.returncode != 0:
            raise RehearsalError(f"nft in {CORE}: {done.stderr.strip()}", "run: make down")

    def _seat_up(self, seat: Seat, there: set[str]) -> None:
        _add_namespace(seat.namespace)
        mine = _links(seat.namespace)
        outer: list[str] = []
        inner: list[str] = []
        for number, bridge in enumerate(dict.fromkeys(leg[0] for leg in seat.legs)):
            port = _port(seat) + (f"-{number}" if number else "")
            device = f"eth{number}"
            if port in there and device not in mine:
                _remove_link(port)
            if port not in there or device not in mine:
                outer.append(f"link add {port} type veth peer name {device} netns {seat.namespace}")
            outer.append(f"link set {port} {f'master {bridge} ' if bridge else ''}up")
            inner.append(f"link set {device} up")
            for attached, address, gateway in seat.legs:
                if attached != bridge:
                    continue
                inner.append(f"addr replace {address} dev {device} {_nodad(address.ip)}")
                if not bridge:
                    whole = f"{gateway}/{gateway.max_prefixlen}"
                    outer.append(f"addr replace {whole} dev {port} {_nodad(gateway)}")
                    outer.append(f"route replace {address.ip} dev {port}")
                    inner.append(f"route replace {gateway} dev {device} src {address.ip}")
                inner.append(f"route replace default via {gateway} dev {device} src {address.ip}")
        _ip(CORE, outer)
        _ip(seat.namespace, inner)

    def down(self) -> None:
        """End whatever still runs in the fixed namespaces and remove them."""
        tear_down()
        (self._state.root / "network.json").unlink(missing_ok=True)

    def bridge_of(self, network: str) -> str:
        """Bridge in core of a network of the site data (or ``inet``)."""
        if network == INET:
            return INET
        for bridge in self.plan.bridges:
            if bridge.network == network:
                return bridge.name
        raise KeyError(network)

    def namespace(self, name: str) -> str:
        """Namespace of ``core``, ``operator``, ``obs-internet``, ``obs-office``, ``obs-local``."""
        full = f"mail-{name}"
        if full != CORE and full not in {s.namespace for s in self.plan.seats}:
            raise KeyError(name)
        return full

    def addresses(self, name: str) -> tuple[IPAddress, ...]:
        """Addresses of ``operator``, ``obs-internet``, ...: IPv4 first."""
        return self.plan.seat(name).addresses


def _nodad(address: IPAddress) -> str:
    return "nodad" if address.version == 6 else ""


def forget_folder() -> None:
    """Unmount the folder of named namespaces, which `ip netns add` mounts, once it is empty."""
    if NETNS.is_dir() and not any(NETNS.iterdir()):
        subprocess.run(["umount", str(NETNS)], check=False, capture_output=True)


def tear_down(names: Iterable[str] = fixed_namespaces()) -> None:
    """Remove namespaces, and end what runs in them; by default those of every rehearsal."""
    there = [n for n in names if (NETNS / n).exists()]
    for process in inhabitants(there):
        process.end(grace=2.0)
    for name in there:
        remove_namespace(name)
