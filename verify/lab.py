"""What a rehearsal offers to checks beside the view from outside: its machines and its world."""

from __future__ import annotations

import json
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any, TypeVar

import dns.name
import dns.rdatatype
import dns.zone

from mailsite.bundle import compose
from mailsite.loader import load_platform
from mailsite.model import Host, IPAddress, NetworkKind, Platform, Role
from rehearsal import cleanup, existing, network, platform_up
from rehearsal.ca import Authority
from rehearsal.image import Layers
from rehearsal.machine import Machine
from rehearsal.progress import Progress
from rehearsal.state import State, locked
from rehearsal.world import plan, zones
from rehearsal.world.world import Listed, Question, World
from verify.client import Client, Observer, Pool
from verify.context import Context, Probe, eventually, expect, public_addresses, trust
from verify.lookup import Lookup
from verify.mail import Mail
from verify.mailbox import MAILBOXES, Mailboxes
from verify.passwords import password_of
from verify.registry import Failed, Skipped
from verify.stack import Stack

A = TypeVar("A", IPv4Address, IPv6Address)

AGENT = "/usr/local/sbin/mail-agent"
OWN_TABLE = ("inet", "mail")
TRUSTED = "/etc/ssl/certs/ca-certificates.crt"


class LabWorld:
    """The remote mail servers, the name servers and the resolver of the world outside.

    Where mail is looked for, :data:`verify.mailbox.MAILBOXES` stands for the platform's own end.
    """

    def __init__(self, world: World, state: State, mailboxes: Mailboxes) -> None:
        self._world = world
        self._mailboxes = mailboxes
        self._folder = state.world / "mail"
        self._lock = threading.Lock()
        self._read: dict[Path, Mail] = {}

    def domain(self, mx: str) -> str:
        """The mail domain that the server takes mail for."""
        return plan.MAIL_SERVERS[mx].domain

    def addresses(self, mx: str) -> tuple[IPAddress, ...]:
        return tuple(plan.MAIL_SERVERS[mx].addresses)

    def mails(self, mx: str, recipient: str) -> list[Mail]:
        """The mails for ``recipient`` that the server got, refused ones too, oldest first."""
        wanted = recipient.lower()
        return [m for m in self._all(mx) if wanted in [r.lower() for r in m.rcpt_to]]

    def copies(self, token: str) -> list[Mail]:
        """The mails that say ``token`` anywhere, wherever they arrived."""
        wanted = token.encode()
        return [
            m for mx in (*plan.MAIL_SERVERS, MAILBOXES) for m in self._all(mx) if wanted in m.raw
        ]

    def server_of(self, domain: str) -> str:
        """The server that mail for a domain of others arrives at.

        Raises:
            Failed: The world has none.
        """
        for mx in plan.MAIL_SERVERS.values():
            if mx.domain == domain:
                return mx.name
        if domain in zones.forward_domains(self._world.platform):
            return plan.ELSEWHERE.name
        raise Failed(f"the world outside has no mail server for {domain}")

    def _all(self, mx: str) -> list[Mail]:
        if mx == MAILBOXES:
            return self._mailboxes.all()
        with self._lock:
            found = []
            for path in sorted((self._folder / mx).glob("[0-9]*.json")):
                if path not in self._read:
                    self._read[path] = _mail(path)
                found.append(self._read[path])
            return found

    def arrival(
        self,
        mx: str,
        recipient: str,
        seconds: float,
        poke: Callable[[], object] | None = None,
    ) -> Mail:
        """Wait for the mail for ``recipient``.

        Args:
            mx: Server that it must arrive at.
            recipient: Its envelope recipient.
            seconds: For how long to wait.
            poke: Called every two seconds, to hurry a queue along.

        Raises:
            Failed: It did not arrive in time, or the server refused it.
        """
        poked = time.monotonic()

        def look() -> Mail:
            nonlocal poked
            found = self.mails(mx, recipient)
            if not found and poke is not None and time.monotonic() - poked > 2.0:
                poked = time.monotonic()
                poke()
            expect(found, f"no mail for {recipient} at {mx}{self._last_reply(mx, recipient)}")
            return found[0]

        mail = eventually(look, seconds=seconds, every=0.05)
        expect(mail.accepted, f"{mx} refused mail for {recipient}{self._last_reply(mx, recipient)}")
        return mail

    def replies(self, mx: str, recipient: str, sender: str | None = None) -> list[str]:
        """What the server answered to mail for ``recipient``, at RCPT and at the end of DATA.

        Args:
            mx: The server.
            recipient: Envelope recipient.
            sender: Envelope sender; None: any.
        """
        if mx == MAILBOXES:  # none hears what is said to smtp-in
            return []
        wanted = recipient.lower()
        return [
            e.reply
            for e in self._world.events(mx)
            if wanted in e.rcpt_to.lower() and sender in (None, e.mail_from)
        ]

    def _last_reply(self, mx: str, recipient: str) -> str:
        replies = self.replies(mx, recipient)
        return f" (it answered {replies[-1]})" if replies else ""

    def set(self, mx: str, mode: str) -> None:
        """Make the server behave as ``mode`` says; returns when it does."""
        self._world.set(mx, mode)

    @contextmanager
    def behaving(self, mx: str, mode: str) -> Iterator[None]:
        """The server behaves as ``mode`` says, and as it does by itself afterwards."""
        self.set(mx, mode)
        try:
            yield
        finally:
            self.set(mx, plan.MAIL_SERVERS[mx].mode.value)

    # Block lists

    @contextmanager
    def listed(self, *entries: tuple[str, IPAddress | str, tuple[str, ...]]) -> Iterator[None]:
        """Block lists know an address or a domain for a while.

        Args:
            entries: List, address or domain, answers.
        """
        added = [Listed(*entry) for entry in entries]
        self._world.enlist(*added)
        try:
            yield
        finally:
            self._world.delist(*added)

    @contextmanager
    def list_behaving(self, zone: str, mode: str) -> Iterator[None]:
        """The block list answers, fails or is silent, and answers again afterwards."""
        self._world.set_list(zone, mode)
        try:
            yield
        finally:
            self._world.set_list(zone, plan.ListMode.ANSWER)

    def list_questions(self, zone: str, what: IPAddress | str) -> list[Question]:
        """When and by whom the block list was asked for an address or a domain."""
        wanted = f"{self.list_name(zone, what)}."
        return [q for q in self._world.list_questions(zone) if q.name == wanted]

    @staticmethod
    def list_name(zone: str, what: IPAddress | str) -> str:
        """The name that a block list is asked for an address or a domain by."""
        return f"{Listed(zone, what, ()).name}.{zone}"

    # DNS

    @property
    def resolver(self) -> IPAddress:
        """The resolver that people on the internet ask."""
        return plan.RESOLVER.ipv4

    def example_names(self) -> tuple[str, str, str]:
        """Names that are signed, signed wrongly, and not signed."""
        return (plan.MAIL_SERVERS["generic"].host, plan.BOGUS_DOMAIN, plan.UNSIGNED_DOMAIN)

    def records(self, zone: str) -> list[Entry]:
        """The records of an operator's zone as its name server has them, without DNSSEC's."""
        return entries(self._world.transfer(zone))

    def foreign_records(self, zone: str) -> list[Entry]:
        """What the zone held before the platform came."""
        return parsed("\n".join(str(r) for r in self._world.foreign_records(zone)))


@dataclass(frozen=True)
class RemoteSender:
    """Somebody on the internet with a mail server of its own, whose mail others can judge.

    Attributes:
        client: Connects from its addresses, which lead to ``helo`` and back.
        domain: Its mail domain. Answers and bounces reach the world's server ``origin``.
        helo: What it says in HELO.
        sign: Signs a mail if the domain has a key; else the mail stays as it is.
        seal: Passes a mail on with ARC headers, if the domain has a key.
    """

    client: Client
    domain: str
    helo: str
    sign: Callable[[bytes], bytes] = field(repr=False)
    seal: Callable[[bytes], bytes] = field(repr=False)


SERVERS_OWN = frozenset(
    dns.rdatatype.from_text(t)
    for t in ("SOA", "NS", "RRSIG", "DNSKEY", "NSEC", "NSEC3", "NSEC3PARAM", "CDS", "CDNSKEY")
)
"""What a name server adds to a zone by itself."""


@dataclass(frozen=True)
class Entry:
    """A record: ``owner`` is absolute and in lower case, ``data`` in presentation form."""

    owner: str
    type: str
    data: str
    ttl: int = field(compare=False)

    def __str__(self) -> str:
        return f"{self.owner} {self.type} {self.data}"

    def is_within(self, zone: str) -> bool:
        return f".{self.owner}".endswith(f".{zone}.")


def entries(zone: dns.zone.Zone) -> list[Entry]:
    """The records of a zone but those that its server adds."""
    origin = zone.origin or dns.name.root
    return [
        Entry(
            owner.derelativize(origin).to_text().lower(),
            dns.rdatatype.to_text(rdata.rdtype),
            rdata.to_text(origin=origin, relativize=False),
            ttl,
        )
        for owner, ttl, rdata in zone.iterate_rdatas()
        if rdata.rdtype not in SERVERS_OWN
    ]


def parsed(text: str) -> list[Entry]:
    """The records of BIND text with absolute names.

    Raises:
        Failed: A record stands in it twice.
    """
    found = entries(
        dns.zone.from_text(text, origin=dns.name.root, relativize=False, check_origin=False)
    )
    lines = [t for t in text.splitlines() if t.strip() and not t.lstrip().startswith((";", "$"))]
    if len(lines) != len(found):
        raise Failed(f"of {len(lines)} records in BIND text only {len(found)} are different")
    return found


def _mail(path: Path) -> Mail:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Mail(
        mx=str(found["mx"]),
        peer=ip_address(str(found["peer"])),
        helo=str(found["helo"]),
        tls=str((found["tls"] or {}).get("version", "")),
        mail_from=str(found["mail_from"]),
        rcpt_to=tuple(str(r) for r in found["rcpt_to"]),
        accepted=bool(found["accepted"]),
        raw=path.with_suffix(".eml").read_bytes(),
    )


@dataclass(frozen=True)
class Queued:
    """An entry of a Postfix queue (postqueue(1), option -j)."""

    id: str
    queue: str
    sender: str
    recipients: tuple[str, ...]
    reasons: tuple[str, ...]


class LabMachine:
    """A host of the platform as its operator at the console sees it."""

    def __init__(self, host: Host, state: State, platform: Platform) -> None:
        self.host = host
        self.name = host.name
        self._platform = platform
        self._state = state

    @cached_property
    def machine(self) -> Machine:
        found = Machine.load(self.name, self._state)
        if found is None:
            raise Failed(f"the rehearsal has no machine {self.name}; run: make rehearsal")
        return found

    @property
    def observer(self) -> Observer:
        """A place to connect from: the host itself."""
        return Observer(self.name, sealed(self.machine.namespace))

    def run(self, *argv: str, input: str | bytes | None = None, check: bool = True) -> str:
        """Run a command on the host as root. Returns what it printed."""
        return self.machine.run(argv, input=input, check=check).stdout

    def call(
        self, *argv: str, input: str | bytes | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The same, whatever the exit code."""
        return self.machine.run(argv, input=input, check=False)

    def kill(self) -> None:
        """Pull the plug."""
        self.machine.kill()

    def start(self) -> None:
        """Put the plug back in; returns when the machine has booted."""
        self.machine.boot()
        self.machine.wait_booted()

    # The agent

    def apply(self, platform: Platform | None = None, secrets: str = "") -> str:
        """Have the agent apply what ``platform`` says of this host, as a push does.

        Args:
            platform: Site data; by default the rehearsal's own.
            secrets: What :meth:`kept_secrets` returned; by default those in use.

        Returns:
            The agent's last line.

        Raises:
            Failed: The agent refused it or rolled it back.
        """
        wanted = platform or self._platform
        bundle = compose(wanted, wanted.hosts[self.name])
        argv = [AGENT, "apply"]
        if secrets:
            self.run(AGENT, "stage-secrets", input=secrets)
        if bundle.secret_files:
            digest = json.loads(secrets)["digest"] if secrets else self.active_secrets()
            argv += ["--secrets", str(digest)]
        done = self.call(*argv, input=bundle.public_json())
        if done.returncode != 0:
            raise Failed(f"{self.name}: the agent refuses: {done.stdout}{done.stderr}")
        self.run(AGENT, "confirm")
        return done.stdout.strip().splitlines()[-1]

    def kept_secrets(self) -> str:
        """The secret bundle in use, for later: the agent forgets one that nothing needs."""
        digest = self.active_secrets()
        return self.run("cat", f"/var/lib/mail-agent/secrets/{digest}.json") if digest else ""

    def active_secrets(self) -> str:
        """Digest of the secret bundle in use; empty where there is none."""
        label = str(json.loads(self.run(AGENT, "status"))["secrets"])
        staged = self.run("ls", "/var/lib/mail-agent/secrets").split()
        known = [name.removesuffix(".json") for name in staged]
        return next((k for k in known if label and k.startswith(label)), "")

    # Postfix

    def queue_entries(self) -> list[Queued]:
        entries = [json.loads(line) for line in self.run("postqueue", "-j").splitlines()]
        return [
            Queued(
                id=str(e["queue_id"]),
                queue=str(e["queue_name"]),
                sender=str(e["sender"]),
                recipients=tuple(str(r["address"]) for r in e["recipients"]),
                reasons=tuple(str(r.get("delay_reason", "")) for r in e["recipients"]),
            )
            for e in entries
        ]

    def queued(self, recipient: str) -> Queued | None:
        """The queue's entry for ``recipient``."""
        for entry in self.queue_entries():
            if recipient.lower() in [r.lower() for r in entry.recipients]:
                return entry
        return None

    def deferral(self, recipient: str) -> str:
        """Why a mail waits.

        Raises:
            Failed: It does not wait.
        """
        entry = self.queued(recipient)
        if entry is None or entry.queue != "deferred":
            where = f"in the {entry.queue} queue" if entry else "not queued"
            raise Failed(f"{self.name}: mail for {recipient} is {where}, not deferred")
        return " ".join(entry.reasons)

    def hurry(self) -> None:
        """Have the queue tried now, and locally submitted mail picked up."""
        self.run("postqueue", "-f")
        self.call("postkick", "public", "pickup", "W")  # pickup may hang up on it

    # TLS

    def verifies(self, address: IPAddress, port: int, name: str) -> tuple[bool, str]:
        """Whether Postfix's TLS client on this host accepts ``address`` as ``name``.

        Returns:
            The verdict, and what the client said.
        """
        done = self.call(
            "posttls-finger", "-c", "-T", "5", "-l", "secure", "-F", TRUSTED,
            f"[{address}]:{port}", name,
        )  # fmt: skip
        said = f"{done.stdout}{done.stderr}".strip()
        return done.returncode == 0 and "Verified TLS connection established" in said, said

    @contextmanager
    def presenting(self, chain: str, key: str) -> Iterator[None]:
        """The host's Postfix presents another certificate for a while.

        Args:
            chain: PEM.
            key: PEM.
        """
        path = self.run("postconf", "-hx", "smtpd_tls_chain_files").split(",")[0].strip()
        with self.replaced_certificate(path, chain, key):
            try:
                self._reload_postfix()
                yield
            finally:
                self.run("mv", "-f", "--", f"{path}.verify-kept", path)
                self._reload_postfix()

    @contextmanager
    def replaced_certificate(self, path: str, chain: str, key: str) -> Iterator[None]:
        """Another certificate lies at ``path``, and the host does not pull its own meanwhile.

        Whoever asks for it puts ``<path>.verify-kept`` back, and tells the daemons.
        """
        timer = "mail-certificates-pull.timer"
        pulls = self.call("systemctl", "is-active", "--quiet", timer).returncode == 0
        if pulls:
            self.run("systemctl", "stop", timer, "mail-certificates-pull.service")
        try:
            self.run("cp", "-p", "--", path, f"{path}.verify-kept")
            self.run("tee", path, input=key + chain)
            yield
        finally:
            if pulls:
                self.run("systemctl", "start", timer)

    def _reload_postfix(self) -> None:
        """Without the seconds of checking that `postfix reload` takes first.

        Returns when no process waits for a client that has read the old configuration.
        """
        old = self._smtpds()
        self.run("sh", "-c", "kill -HUP $(cat /var/spool/postfix/pid/master.pid)")

        def gone() -> None:
            busy = self.run("ss", "-Htnp", "state", "established")
            waiting = (old & self._smtpds()) - set(re.findall(r'"smtpd",pid=(\d+)', busy))
            expect(not waiting, f"{self.name}: of before the reload: {' '.join(waiting)}")

        eventually(gone, seconds=10)

    def _smtpds(self) -> set[str]:
        return set(self.call("pgrep", "-x", "smtpd").stdout.split())

    # What is not the platform's

    FOREIGN_PAGE = existing.WEBSITE
    FOREIGN_TABLE = "table {} {}".format(*existing.FIREWALL_TABLE)

    def foreign_tables(self) -> dict[str, str]:
        """Firewall tables that are not the platform's, with their rules without counters."""
        found = {}
        for line in self.run("nft", "list", "tables").splitlines():
            _, family, name = line.split()
            if (family, name) != OWN_TABLE:
                found[f"table {family} {name}"] = self.run(
                    "nft", "-s", "list", "table", family, name
                )
        return found

    def present(self, paths: set[str]) -> list[str]:
        """Those of ``paths`` that are there, and the platform's own firewall table."""
        found = self.call("find", *sorted(paths), "-maxdepth", "0").stdout.splitlines()
        tables = self.run("nft", "list", "tables").splitlines()
        return [*found, *(t for t in tables if t == "table {} {}".format(*OWN_TABLE))]

    def foreign_state(self, ours: set[str]) -> dict[str, str]:
        """Configuration and websites of others: path -> what tells a change; tables too.

        Args:
            ours: Paths to leave out.
        """
        listed = self.call(
            "find", "/etc", "/var/www", "-xdev", "-type", "f",
            "-printf", "%p\\t%i %s %T@ %u:%g %m\\n",
        ).stdout  # fmt: skip
        files = dict(line.split("\t", 1) for line in listed.splitlines())
        units = {Path(p).name for p in ours}
        listed = self.run("find", "/etc", "-xdev", "-type", "l", "-printf", "%p\\t%l\\n")
        links = dict(line.split("\t", 1) for line in listed.splitlines())
        files |= {p: target for p, target in links.items() if Path(target).name not in units}
        return {p: v for p, v in files.items() if p not in ours} | self.foreign_tables()

    # Its journal

    def logged(self, program: str, *texts: str) -> bool:
        """Whether ``program`` logged a line with all of ``texts`` in the last ten minutes."""
        grep = f"--grep={re.escape(texts[0])}"
        lines = self.machine.logs("--since=-10min", "--output=short", grep).splitlines()
        mine = (line for line in lines if f" {program}" in line.partition(": ")[0])
        return any(all(t in line for t in texts) for line in mine)

    def journal(self, since: float, pattern: str) -> list[str]:
        """The journal's lines that match a regular expression.

        Args:
            since: Seconds since the epoch.
            pattern: As journalctl(1) takes it, option -g.
        """
        when, grep = f"--since=@{since:.3f}", f"--grep={pattern}"
        return self.machine.logs(when, "--output=short", grep).splitlines()

    # Its resolver

    def forget(self, *zones: str, names: Iterable[str] = ()) -> None:
        """Let the host's Unbound forget names of zones, and which name servers did not answer.

        What lies in a zone only expires, and is still served where a server is slow (RFC 8767);
        of ``names`` nothing is left.
        """
        forget = 'for name; do unbound-control -q flush "$name" || exit; done'
        for zone in zones:
            self.run("unbound-control", "flush_zone", zone)
        self.run("sh", "-c", forget, "sh", *names)
        self.run("unbound-control", "flush_infra", "all")


class Lab:
    """The rehearsal that is up.

    Raises:
        Skipped: None is.
    """

    def __init__(self, state: State, platform: Platform) -> None:
        self.state = state
        self.platform = platform
        self.network = network.Network(platform, state)
        if not self.network.is_up:
            raise Skipped("no rehearsal is up; run: make rehearsal")
        zone_ids = platform_up.current(state).config.get("mail:zoneIds", {})
        no_layers = Layers((), (), (), (), Path())  # it is only looked at, not brought up
        self.outside = World(state, platform, self.network, no_layers, zone_ids)
        frontends = platform.members(Role.FRONTEND)
        mailboxes = Mailboxes(
            platform,
            state.root,
            doors=tuple(a for h in frontends for a in public_addresses(platform, h)),
            client=lambda: self.observer("internet", "the internet").client(),
            tls=trust(platform),
        )
        self.world = LabWorld(self.outside, state, mailboxes)
        self._senders: dict[str, RemoteSender] = {}

    def machine(self, host: Host) -> LabMachine:
        return LabMachine(host, self.state, self.platform)

    @property
    def machines(self) -> tuple[LabMachine, ...]:
        """Every host of the platform that the rehearsal runs."""
        return tuple(
            self.machine(host)
            for host in self.platform.hosts.values()
            if Machine.load(host.name, self.state) is not None
        )

    # Places

    def observer(self, name: str, place: str) -> Observer:
        """An observer's place, with clients that have addresses of their own.

        Args:
            name: ``internet``, ``office`` or ``local``.
            place: What messages call it.
        """
        namespace = self.network.namespace(f"obs-{name}")
        seats = self.network.addresses(f"obs-{name}")
        ipv4 = next(a for a in seats if isinstance(a, IPv4Address))
        ipv6 = next(a for a in seats if isinstance(a, IPv6Address))
        if name == "internet":
            pairs = zip(self._internet4(), self._internet6(), strict=False)
            rest = Pool.REST
        else:
            pairs = zip(self._neighbours4(ipv4), _neighbours6(ipv6), strict=False)
            # There are few addresses; these clients stay far below every limit.
            rest = Pool.REST / 3
        give = Seat(namespace, (ipv4, ipv6)).give
        return Observer(place, sealed(namespace), Pool(pairs, give, rest))

    def sender(self, name: str) -> RemoteSender:
        """One of the remote senders of :data:`rehearsal.world.plan.SENDERS`."""
        if name not in self._senders:
            self._senders[name] = self._sender(plan.SENDERS[name])
        return self._senders[name]

    def _sender(self, sender: plan.Sender) -> RemoteSender:
        namespace = self.network.namespace("obs-internet")
        ipv4, ipv6 = sender.addresses.ipv4, sender.addresses.ipv6
        Seat(namespace, self.network.addresses("obs-internet")).give(ipv4, ipv6)
        key = self.outside.sender_key

        def sign(message: bytes) -> bytes:
            return key.sign(message, sender.domain) if sender.dkim else message

        def seal(message: bytes) -> bytes:
            return key.seal(message, sender.domain) if sender.dkim else message

        client = Client(sender.host, sealed(namespace), ipv4, ipv6)
        return RemoteSender(client, sender.domain, sender.host, sign, seal)

    def _internet4(self) -> Iterator[IPv4Address]:
        """Addresses that are nobody's (RFC 5737), not ours and not the office's, in no order."""
        own = [n.ipv4.prefix for n in self.platform.networks.values()] + self._offices4()
        candidates = [a for network in _NOBODYS for a in network.hosts()]
        spare = [a for a in candidates if not any(a in prefix for prefix in own)]
        random.shuffle(spare)
        return self._free(spare)

    def _internet6(self) -> Iterator[IPv6Address]:
        """Addresses that are nobody's (RFC 3849), no two in one /48, in no order.

        Dovecot makes a whole /48 wait after a wrong password.
        """
        own = [n.ipv6.prefix for n in self.platform.networks.values()]
        own += [p for p in self.platform.management.networks if isinstance(p, IPv6Network)]
        prefixes = [IPv6Network((0x20010DB8 << 96 | n << 80, 48)) for n in range(0x1000, 0xF000)]
        random.shuffle(prefixes)
        return self._free(
            prefix[0x10] for prefix in prefixes if not any(prefix.overlaps(o) for o in own)
        )

    def _neighbours4(self, seat: IPv4Address) -> Iterator[IPv4Address]:
        """Addresses beside the seat's own, in no order."""
        around = [n.ipv4.prefix for n in self.platform.networks.values() if seat in n.ipv4.prefix]
        around += [p for p in self._offices4() if seat in p] if not around else []
        spare = [a for prefix in around for a in prefix.hosts()]
        random.shuffle(spare)
        return self._free(spare)

    def _offices4(self) -> list[IPv4Network]:
        return [p for p in self.platform.management.networks if isinstance(p, IPv4Network)]

    def _free(self, addresses: Iterable[A]) -> Iterator[A]:
        """Leave out what somebody has."""
        taken: set[IPAddress] = {a for h in self.platform.hosts.values() for a in h.addresses}
        networks = self.platform.networks.values()
        taken |= {g for n in networks for g in (n.ipv4.gateway, n.ipv6.gateway)}
        taken |= {a for e in self.platform.egress.values() for a in (e.ipv4, e.ipv6)}
        taken |= {a for s in self.network.plan.seats for a in s.addresses}
        return (a for a in addresses if a not in taken)

    # Certificates

    def wrong_certificates(self, name: str) -> Iterator[tuple[str, str, str]]:
        """Certificates that nobody may take for ``name``: what it is, chain and key."""
        authority = Authority(self.state.ca)
        other = authority.issue([f"not-{name}"])
        own = authority.self_signed([name])
        yield "a certificate for another name", other.chain, other.key
        yield "a self-signed certificate", own.chain, own.key

    # The program

    def program_records(self) -> dict[str, list[Entry]]:
        """Zone -> the records that the program says it holds, from the stack's outputs."""
        zones = [name.rstrip(".") for name in self.outside.zone_names]
        found: dict[str, list[Entry]] = {zone: [] for zone in zones}
        for entry in parsed(str(self.outputs()["zones"])):
            inside = [zone for zone in zones if entry.is_within(zone)]
            if inside:
                found[max(inside, key=len)].append(entry)
        return found

    def outputs(self) -> Mapping[str, object]:
        """The stack's outputs."""
        with self._alone():
            return platform_up.stack(self.state, Progress(quiet=True)).outputs()

    def up(self, site: Path | None = None) -> dict[str, int]:
        """Run `pulumi up` again. Returns how many resources the engine counts per kind of change.

        Args:
            site: Folder of site data to use this once; by default the stack's own.

        Raises:
            RehearsalError: The engine failed.
        """
        quiet = Progress(quiet=True)
        with self._alone():
            return platform_up.stack(self.state, quiet).up(quiet, site=site)

    def preview(self, site: Path) -> str:
        """What `pulumi preview --diff` says of other site data."""
        quiet = Progress(quiet=True)
        with self._alone():
            return platform_up.stack(self.state, quiet).preview(site=site, quiet=True)

    @contextmanager
    def using(self, site: Path) -> Iterator[None]:
        """``up`` takes its site data from the folder ``site`` meanwhile."""
        own = str(platform_up.current(self.state).config["mail:site"])
        try:
            self._configure("mail:site", str(site))
            yield
        finally:
            self._configure("mail:site", own)

    def _configure(self, key: str, value: str) -> None:
        with self._alone():
            program = platform_up.stack(self.state, Progress(quiet=True))
            arguments = ("config", "set", "--stack", program.stack, key, value)
            if program.pulumi(arguments) != 0:
                raise Failed(f"pulumi {' '.join(arguments)} fails")

    def replace_with_bare(self, *hosts: Host) -> None:
        """Have the engine replace hosts' machines by ones that start from a bare Debian."""
        marks = [self.state.bare / host.name for host in hosts]
        for mark in marks:
            mark.touch()
        try:
            self.replace(*hosts)
        finally:
            for mark in marks:
                mark.unlink()

    def replace(self, *hosts: Host) -> None:
        """Have the engine replace hosts' machines: new root volumes, the old data volumes."""
        with self._alone():
            program = platform_up.stack(self.state, Progress(quiet=True))
            program.up(Progress(quiet=True), replace=[f"{host.name}-root" for host in hosts])

    @staticmethod
    def _alone() -> AbstractContextManager[None]:
        """No other command works on the rehearsal meanwhile."""
        return locked(cleanup.RUN / "lock", Progress(), "another command works on the rehearsal")

    def outside_cut_off(self) -> AbstractContextManager[None]:
        """Nothing reaches the world outside, and nothing comes from there."""
        return self._dropping(f'{way} "{network.INET}"' for way in ("iifname", "oifname"))

    def providers_resolver_cut_off(self) -> AbstractContextManager[None]:
        """Nobody reaches the resolver that people on the internet ask."""
        families = {4: "ip", 6: "ip6"}
        return self._dropping(f"{families[a.version]} daddr {a}" for a in plan.RESOLVER)

    def link_cut(self, one: Host, other: Host) -> AbstractContextManager[None]:
        """The two hosts do not reach each other: packets are lost, nobody is told."""
        families = {4: "ip", 6: "ip6"}
        pairs = [(a, b) for a in one.addresses for b in other.addresses if a.version == b.version]
        return self._dropping(
            f"{families[a.version]} saddr {{ {a}, {b} }} {families[a.version]} daddr {{ {a}, {b} }}"
            for a, b in pairs
        )

    @classmethod
    def untracked(cls, addresses: Iterable[IPAddress]) -> AbstractContextManager[None]:
        """The routers between the networks do not remember what passes from and to ``addresses``.

        Each probe of a scan would be a connection to them, and there is room for so many.
        """
        families = {4: "ip", 6: "ip6"}
        ends = ("saddr", "daddr")
        rules = [f"{families[a.version]} {end} {a} notrack" for a in addresses for end in ends]
        hook = "prerouting priority raw"
        return cls._ruling("untracked", hook, rules)

    @classmethod
    def _dropping(cls, matches: Iterable[str]) -> AbstractContextManager[None]:
        """What a router forwards between the networks and matches is lost."""
        hook = "forward priority filter - 10"
        return cls._ruling("cut", hook, [f"{match} drop" for match in matches])

    @staticmethod
    @contextmanager
    def _ruling(table: str, hook: str, rules: Iterable[str]) -> Iterator[None]:
        """The routers between the networks have a table of rules more, at ``hook``."""
        chain = "\n".join([f"type filter hook {hook}; policy accept", *rules])
        text = f"table inet {table} {{\nchain rules {{\n{chain}\n}}\n}}\n"
        network.run_in(network.CORE, ["nft", "-f", "-"], input=text)
        try:
            yield
        finally:
            network.run_in(network.CORE, ["nft", "delete", "table", "inet", table])


def context(stack: Stack, folder: Path) -> Context:
    """The platform in the rehearsal that is up on this machine.

    Raises:
        Skipped: None is.
    """
    state = State(folder)
    platform = load_platform(stack.site, state.world_overlay)
    lab = Lab(state, platform)
    internet = lab.observer("internet", "the internet")
    office = lab.observer("office", "the office")
    kinds = {network.kind for network in platform.networks.values()}
    return Context(
        platform=platform,
        site=stack.site,
        stack=stack.name,
        state=state.root,
        internet=internet,
        lookup=Lookup(internet.client(), tuple(plan.RESOLVER)),
        office=office,
        # Without site-local networks nobody but the operators is near.
        local=lab.observer("local", "a site-local network")
        if NetworkKind.SITE_LOCAL in kinds
        else office,
        given_probe=_probe(state, platform),
        given_lab=lab,
    )


def _probe(state: State, platform: Platform) -> Probe | None:
    """The first login that is not suspended, and an address in the first domain that sends."""
    user = next((u.name for u in platform.sasl_users.values() if not u.suspended), None)
    domain = next((d.name for d in platform.domains.values() if d.signing_key), None)
    if user is None or domain is None:
        return None
    return Probe(user, password_of(state.root, user), f"probe@{domain}")


def sealed(namespace: str) -> Callable[[], AbstractContextManager[None]]:
    """Enters a namespace of the rehearsal, having made sure that it has no way out."""
    checked = False

    @contextmanager
    def enter() -> Iterator[None]:
        nonlocal checked
        with network.enter(namespace):
            if not checked:
                network.assert_sealed()
                checked = True
            yield

    return enter


_NOBODYS = tuple(map(IPv4Network, ("198.51.100.0/24", "203.0.113.0/24")))


def _neighbours6(seat: IPv6Address) -> Iterator[IPv6Address]:
    """Addresses in the seat's /64, no two in one /84, in no order."""
    network = int(seat) >> 64 << 64
    for number in random.sample(range(1, 1 << 16), 4096):
        yield IPv6Address(network | number << 48 | 0x10)


class Seat:
    """A namespace that gets further addresses.

    Args:
        namespace: Its name.
        addresses: The addresses that it has from the start.
    """

    def __init__(self, namespace: str, addresses: tuple[IPAddress, ...]) -> None:
        self._namespace = namespace
        self._addresses = addresses
        self._places: dict[IPAddress, tuple[str, int, str]] = {}

    def give(self, *more: IPAddress) -> None:
        """Let the namespace have ``more`` addresses, and core know the way to them."""
        addresses, routes = [], []
        for own in self._addresses:
            device, length, port = self._place(own)
            nodad = " nodad" if own.version == 6 else ""
            for address in (a for a in more if a.version == own.version):
                addresses.append(f"addr replace {address}/{length} dev {device}{nodad}")
                if port:
                    routes.append(f"route replace {address} dev {port}")
        for namespace, lines in ((self._namespace, addresses), (network.CORE, routes)):
            if lines:
                network.run_in(namespace, ["ip", "-batch", "-"], input="\n".join([*lines, ""]))

    def _place(self, own: IPAddress) -> tuple[str, int, str]:
        """The device that has an address, the prefix length, and core's device that leads there.

        The latter is empty where core has a route to a network, not to the address alone.
        """
        if own not in self._places:
            device, length = self._device(own)
            self._places[own] = (device, length, self._port(f"-{own.version}", own))
        return self._places[own]

    def _device(self, own: IPAddress) -> tuple[str, int]:
        for link in json.loads(self._ip(self._namespace, "-j", "addr", "show", "to", str(own))):
            for info in link.get("addr_info", ()):
                if info.get("local") == str(own):
                    return str(link["ifname"]), int(info["prefixlen"])
        raise LookupError(f"{self._namespace} has not {own}")

    def _port(self, family: str, own: IPAddress) -> str:
        routes = json.loads(
            self._ip(network.CORE, "-j", family, "route", "show", "exact", str(own))
        )
        return str(routes[0]["dev"]) if routes else ""

    @staticmethod
    def _ip(namespace: str, *arguments: str) -> str:
        return network.run_in(namespace, ["ip", *arguments]).stdout or "[]"
