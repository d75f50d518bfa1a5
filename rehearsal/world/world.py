"""The outside world of a rehearsal: one machine that is the whole internet.

It is the DNS from the root down, remote mail servers, a resolver for the people out there, and
the package mirror. :class:`World` brings the machine up, and is the way in which checks look at
what the outside received.
"""

from __future__ import annotations

import email
import email.policy
import hashlib
import http.client
import json
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from email.message import EmailMessage
from functools import cached_property, partial
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Any

import dns.exception
import dns.query
import dns.rcode
import dns.update
import dns.zone

from mailsite.bundle import asked_names
from mailsite.model import IPAddress, Platform
from mailsite.roles.certificates import challenge_names
from rehearsal import network
from rehearsal.ca import Authority
from rehearsal.image import Layers
from rehearsal.machine import Machine, MachineError
from rehearsal.observer import Answer, Observer
from rehearsal.progress import RehearsalError, wait_for
from rehearsal.state import State, write_atomic
from rehearsal.world import files, knot, plan, zones
from rehearsal.world.plan import ListMode, Mode
from rehearsal.world.sender_key import SenderKey

NAME = "world"
_MAC = "52:54:00:00:02:02"
_READY_SECONDS = 30.0


@dataclass(frozen=True)
class Signature:
    """One DKIM signature of a received message: its tags, and ``result`` (pass, fail, ...)."""

    d: str
    s: str
    a: str
    c: str
    i: str
    result: str
    reason: str


@dataclass(frozen=True)
class Message:
    """A message that a mail server of the outside received, refused ones as well.

    :ivar mx: which server, see :data:`rehearsal.world.plan.MAIL_SERVERS`.
    :ivar at: when, in seconds since the epoch.
    :ivar peer: the address that it came from.
    :ivar tls: protocol version and cipher; None without TLS.
    :ivar spf: pass, fail, softfail, neutral, none, permerror or temperror.
    :ivar dmarc: pass, fail, none, permerror or temperror.
    :ivar dmarc_policy: what the author's domain asks for: none, quarantine, reject.
    :ivar accepted: whether the sender was told that it arrived; ``reply`` is what it was told.
    """

    id: str
    mx: str
    at: float
    peer: IPAddress
    helo: str
    tls: Mapping[str, str] | None
    mail_from: str
    rcpt_to: tuple[str, ...]
    size: int
    accepted: bool
    reply: str
    spf: str
    spf_reason: str
    dkim: tuple[Signature, ...]
    dmarc: str
    dmarc_policy: str
    dmarc_reason: str
    from_domain: str
    path: Path = field(repr=False, compare=False)

    @classmethod
    def read(cls, path: Path) -> Message:
        """The message whose JSON is at ``path``."""
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(cls)}
        return cls(
            **{
                **{key: entry for key, entry in value.items() if key in known},
                "peer": ip_address(value["peer"]),
                "rcpt_to": tuple(value["rcpt_to"]),
                "dkim": tuple(Signature(**signature) for signature in value["dkim"]),
                "path": path.with_suffix(".eml"),
            }
        )

    @property
    def content(self) -> bytes:
        """The message exactly as received."""
        return self.path.read_bytes()

    @property
    def parsed(self) -> EmailMessage:
        return email.message_from_bytes(self.content, policy=email.policy.default)

    @property
    def subject(self) -> str:
        return str(self.parsed["Subject"] or "")


@dataclass(frozen=True)
class Event:
    """An answer that a mail server gave: ``event`` is ``rcpt`` or ``data``."""

    at: float
    event: str
    peer: str
    helo: str
    mail_from: str
    rcpt_to: str
    reply: str


@dataclass(frozen=True)
class Listed:
    """An entry of a block list.

    :ivar zone: the list.
    :ivar what: an address or a domain.
    :ivar answers: what the list answers, such as 127.0.0.2.
    """

    zone: str
    what: IPAddress | str
    answers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its name below the zone (RFC 5782, section 2)."""
        if isinstance(self.what, str):
            return self.what.rstrip(".").lower()
        return self.what.reverse_pointer.removesuffix(".in-addr.arpa").removesuffix(".ip6.arpa")


@dataclass(frozen=True)
class Question:
    """What a block list was asked, and by whom; ``name`` is absolute and in lower case."""

    at: float
    peer: str
    name: str
    type: str


class World:
    """The outside world.

    :param layers: the machine's image layers, and what its package mirror serves.
    :param zone_ids: ids of the operator's zones at the DNS provider, by zone name; zones that
        are missing there get an id of their own.
    """

    def __init__(
        self,
        state: State,
        platform: Platform,
        sealed: network.Network,
        layers: Layers,
        zone_ids: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._state = state
        self._platform = platform
        self._network = sealed
        self._layers = layers
        self._folder = state.world
        self._zone_ids = {name.rstrip("."): zone_id for name, zone_id in zone_ids.items()}

    @property
    def platform(self) -> Platform:
        """The site that it is the outside of."""
        return self._platform

    # Bringing it up -----------------------------------------------------------------------

    def up(self) -> None:
        """Start the world, or bring a running one up to date; returns when all of it answers.

        Keys, the operator's zones with their changes, and received mail outlive the machine.
        """
        found = plan.collisions(self._platform)
        if found:
            raise RehearsalError("; ".join(found), "choose other addresses in topology.yaml")
        contents = self._files()
        machine = self._machine()
        running = Machine.load(NAME, self._state)
        if running is not None and running != machine:
            running.destroy()  # its image layers or its interfaces are others now
        if machine.alive():
            machine.wait_booted()  # an interrupted run may have started it a moment ago
            changed = files.install(machine.root, contents)
            files.restart(machine, changed)
        else:
            files.install(machine.mount(), contents)
            machine.boot()
            # The kernel numbers the namespace at a cable's other end when its link is first
            # listed; until then network.assert_sealed() does not know where the cable leads.
            network.run_in(machine.namespace, ["ip", "link"])
        self._write_dns_access()
        self._wait_ready(machine)

    def down(self) -> None:
        """Remove the machine, what it received and what was changed in the operator's zones.

        Keys stay, so that the next world has the same trust anchor and certificates.
        """
        machine = Machine.load(NAME, self._state)
        if machine is not None:
            machine.destroy()
        for name in ("mail", "run", "knot/zones", "knot/journal", "knot/timers"):
            shutil.rmtree(self._folder / name, ignore_errors=True)

    @property
    def machine(self) -> Machine:
        """The world's machine; :class:`MachineError` where there is none."""
        machine = Machine.load(NAME, self._state)
        if machine is None:
            raise MachineError("the outside world is not up", "run: make rehearsal")
        return machine

    def _machine(self) -> Machine:
        binds = {
            self._state.folder("world", "knot"): files.KNOT,
            self._state.folder("world", "mail"): files.MAIL,
            self._state.folder("world", "run"): files.RUN,
            self._layers.aptrepo: files.MIRROR,
        }
        return Machine(
            name=NAME,
            layers=self._layers.world,
            legs=((network.INET, _MAC),),
            state=self._state,
            binds=binds,
        )

    def _files(self) -> dict[str, str]:
        """Every file of the machine."""
        site = self._platform
        authority = Authority(self._state.ca)
        dane = authority.self_signed([plan.MAIL_SERVERS["dane"].host], days=3650)
        return files.contents(
            zones=self._zones(),
            key=self.update_key,
            acme=self.acme_key,
            challenges=self._challenges(),
            authority=authority,
            dane=dane,
            takes={
                plan.HOME.name: [name.rstrip(".") for name in self.zone_names],
                plan.ELSEWHERE.name: zones.forward_domains(site),
                plan.ORIGIN.name: [sender.domain for sender in plan.SENDERS.values()],
            },
            mailboxes={site.maildrop_domain: sorted(site.mailboxes)},
            lists=zones.list_zones(site),
        )

    def _challenges(self) -> tuple[str, ...]:
        if self._platform.certificates is None:
            return ()
        asked = asked_names(self._platform).values()
        return challenge_names(self._platform, (name for names in asked for name in names))

    def _zones(self) -> dict[str, zones.Zone]:
        authority = Authority(self._state.ca)
        tlsa = {
            mx.name: f"3 1 1 {authority.self_signed([mx.host], days=3650).public_key_sha256}"
            for mx in plan.MAIL_SERVERS.values()
            if mx.tls is plan.Tls.DANE
        }
        key = self.sender_key.public
        dkim = {sender.name: key for sender in plan.SENDERS.values() if sender.dkim}
        try:
            return zones.world_zones(
                self._platform, operator_zones=self._zone_ids, tlsa=tlsa, dkim=dkim
            )
        except ValueError as error:
            raise RehearsalError(str(error), "choose another name in the site data") from error

    def _write_dns_access(self) -> None:
        """What the stand-in of the DNS provider needs, in ``world/dns.json``."""
        key = self.update_key
        access = {
            "address": str(plan.LEG.ipv4),
            "port": 53,
            "key_name": key.name,
            "key_algorithm": knot.ALGORITHM,
            "key_secret": key.secret,
            "zones": {self.zone_id(name): name.rstrip(".") for name in self.zone_names},
        }
        write_atomic(self._folder / "dns.json", json.dumps(access, indent=1))

    def _wait_ready(self, machine: Machine) -> None:
        missing = ""

        def answers(condition: Callable[[], str]) -> bool:
            nonlocal missing
            if not machine.alive():
                raise MachineError(
                    "the outside world died while it started", f"look into {machine.console}"
                )
            missing = condition()
            return not missing

        for what, condition in (
            ("validated DNS", self._dns_missing),
            ("block lists", self._lists_missing),
            ("mail servers", self._mail_missing),
            ("package mirror", self._mirror_missing),
            ("certificate authority", self._acme_missing),
        ):
            try:
                wait_for(partial(answers, condition), timeout=_READY_SECONDS, what=what)
            except MachineError:
                raise
            except RehearsalError as error:
                raise RehearsalError(
                    f"the outside world's {what} did not come up: {missing}",
                    "look into its journal: python -m rehearsal logs world",
                ) from error

    # The parts that have to answer --------------------------------------------------------

    @cached_property
    def _insider(self) -> Observer:
        """Somebody who may always reach the world, to see whether it answers."""
        return Observer.at(self._network, "operator")

    def _dns_missing(self) -> str:
        for name in (".", *self.zone_names):
            try:
                answer = self._insider.ask(name, "SOA", timeout=0.5)
            except (dns.exception.DNSException, OSError) as error:
                return f"{name} SOA: {error or type(error).__name__}"
            if not (answer.secure and answer.records):
                return f"{name} SOA: {answer.rcode}, not validated"
        return ""

    def _lists_missing(self) -> str:
        orders = self._read(files.LISTS_CONTROL_FILE).get("lists", {})
        for name in zones.list_zones(self._platform):
            if orders.get(name, {}).get("mode", ListMode.ANSWER) != ListMode.ANSWER:
                continue
            for server in plan.LISTS:
                try:
                    answer = self._insider.ask(name, "SOA", server, recursive=False, timeout=0.5)
                except (dns.exception.DNSException, OSError) as error:
                    return f"{name} SOA at {server}: {error or type(error).__name__}"
                if not (answer.authoritative and answer.records):
                    return f"{name} SOA at {server}: {answer.rcode}"
        return ""

    def _mail_missing(self) -> str:
        modes = self._read(files.STATE_FILE).get("modes", {})
        for mx in plan.MAIL_SERVERS.values():
            if modes.get(mx.name) == Mode.DOWN:
                continue
            for address in mx.addresses:
                try:
                    self._insider.smtp(address, timeout=1).close()
                except OSError as error:
                    return f"{mx.name} ({address}): {error}"
        return ""

    def _mirror_missing(self) -> str:
        for address in plan.MIRROR:
            try:
                status = self.fetch(address, "/debian/dists/trixie/InRelease")
            except OSError as error:
                return f"{address}: {error}"
            if status != http.client.OK:
                return f"{address}: status {status}"
        return ""

    def _acme_missing(self) -> str:
        trusted = ssl.create_default_context(cadata=Authority(self._state.ca).root_pem)
        for address in plan.ACME:
            try:
                connection = self._insider.connect(address, 443, timeout=5)
                status = _get(
                    trusted.wrap_socket(connection, server_hostname=plan.ACME_NAME), "/dir"
                )
            except (OSError, http.client.HTTPException) as error:
                return f"{address}: {error}"
            if status != http.client.OK:
                return f"{address}: status {status}"
        return ""

    def fetch(self, address: IPAddress, path: str, host: str = plan.MIRROR_NAMES[0]) -> int:
        """Status of a GET request to the mirror."""
        return _get(self._insider.connect(address, 80, timeout=5), path, host)

    # Certificates -------------------------------------------------------------------------

    @property
    def acme_key(self) -> knot.UpdateKey:
        """The key that the ACME client changes challenge records with."""
        return knot.UpdateKey.of_acme(self._folder / "acme-tsig.json")

    @property
    def acme_access(self) -> dict[str, Any]:
        """How certificates are got here, for :class:`mailsite.model.AcmeAccess`."""
        server = next(iter(plan.NAME_SERVERS.values())).ipv4
        return {
            "directory": f"https://{plan.ACME_NAME}/dir",
            "provider": "rfc2136",
            "environment": {
                "RFC2136_NAMESERVER": f"{server}:53",
                "RFC2136_TSIG_KEY": self.acme_key.name,
                "RFC2136_TSIG_ALGORITHM": f"{knot.ALGORITHM}.",
                "RFC2136_PROPAGATION_TIMEOUT": "30",
                # What is changed is served at once.
                "RFC2136_POLLING_INTERVAL": "0",
                "RFC2136_SEQUENCE_INTERVAL": "0",
            },
            "secrets": list(self.acme_secrets),
        }

    @property
    def acme_secrets(self) -> dict[str, str]:
        """Variable of the ACME client -> secret."""
        return {"RFC2136_TSIG_SECRET": self.acme_key.secret}

    @property
    def acme_root(self) -> str:
        """The root certificate of the authority, PEM: another one each time that it starts."""
        read = (
            "import ssl, sys, urllib.request as web\n"
            "unverified = ssl._create_unverified_context()\n"
            "with web.urlopen(sys.argv[1], context=unverified) as answer:\n"
            "    sys.stdout.write(answer.read().decode())\n"
        )
        url = f"https://127.0.0.1:{files.ACME_MANAGEMENT_PORT}/roots/0"
        return self.machine.run(["python3", "-I", "-c", read, url]).stdout

    # DNS ----------------------------------------------------------------------------------

    @property
    def trust_anchors(self) -> tuple[str, ...]:
        """DS records of the root zone, for :class:`mailsite.model.World`."""
        found = self._state.read_json("world/knot/ds.json")
        if not found:
            raise MachineError("the outside world was never up", "run: make rehearsal")
        return (f". IN DS {found['.']}",)

    @property
    def update_key(self) -> knot.UpdateKey:
        """The key for updates and transfers of the operator's zones."""
        return knot.UpdateKey.kept(self._folder / "tsig.json")

    @property
    def sender_key(self) -> SenderKey:
        """The key of the remote senders that sign."""
        return SenderKey.kept(self._folder / "sender.key")

    @property
    def zone_names(self) -> tuple[str, ...]:
        """The operator's zones, absolute."""
        return zones.operator_zone_names(self._platform, self._zone_ids)

    def zone_id(self, zone: str) -> str:
        """The id of an operator's zone at the DNS provider."""
        name = zone.rstrip(".")
        made_up = hashlib.sha256(f"zone {name}".encode()).hexdigest()[:32]
        return self._zone_ids.get(name, made_up)

    def foreign_records(self, zone: str) -> tuple[zones.Record, ...]:
        """What an operator's zone held before the platform, and must go on to hold."""
        return zones.foreign_records(self._platform, zone.rstrip(".") + ".")

    def transfer(self, zone: str) -> dns.zone.Zone:
        """The zone as its name server has it now (AXFR), owners relative to it."""
        name = dns.name.from_text(zone)
        copy = dns.zone.Zone(name)
        query, _ = dns.xfr.make_query(copy, keyring=self.update_key.keyring)
        with self._insider.enter():
            dns.query.inbound_xfr(str(plan.LEG.ipv4), copy, query, timeout=10, lifetime=30)
        return copy

    def new_update(self, zone: str) -> dns.update.UpdateMessage:
        """An empty update of an operator's zone, to be filled and given to :meth:`update`."""
        return dns.update.UpdateMessage(zone, keyring=self.update_key.keyring)

    def update(self, message: dns.update.UpdateMessage) -> None:
        """Carry out an update; :class:`RehearsalError` where the name server refuses it."""
        refused = f"the name server refuses the DNS update of {message.zone[0].name}"
        with self._insider.enter():
            try:
                reply = dns.query.tcp(message, str(plan.LEG.ipv4), timeout=10)
            except dns.exception.FormError as error:  # an answer without our signature
                raise RehearsalError(f"{refused}: {error}") from error
        if reply.rcode() != dns.rcode.NOERROR:
            raise RehearsalError(f"{refused}: {dns.rcode.to_text(reply.rcode())}")

    def ask(self, name: str, rdtype: str) -> Answer:
        """Ask the resolver that people on the internet have."""
        return self._insider.ask(name, rdtype)

    # Block lists ------------------------------------------------------------------------------

    @property
    def lists(self) -> tuple[str, ...]:
        """The zones of the block lists that the site asks, without trailing dot."""
        return tuple(name.rstrip(".") for name in zones.list_zones(self._platform))

    def enlist(self, *entries: Listed) -> None:
        """Put entries into block lists; returns when the lists answer so."""

        def put(lists: dict[str, Any]) -> None:
            for entry in entries:
                self._of_list(lists, entry.zone)["entries"][entry.name] = list(entry.answers)

        self._change_lists(put)

    def delist(self, *entries: Listed) -> None:
        """Take entries out of block lists; returns when the lists answer so."""

        def take(lists: dict[str, Any]) -> None:
            for entry in entries:
                self._of_list(lists, entry.zone)["entries"].pop(entry.name, None)

        self._change_lists(take)

    def set_list(self, zone: str, mode: ListMode | str) -> None:
        """Change how a block list behaves; returns when it does so."""

        def change(lists: dict[str, Any]) -> None:
            self._of_list(lists, zone)["mode"] = str(ListMode(mode))

        self._change_lists(change)

    def list_questions(self, zone: str, since: float = 0.0) -> tuple[Question, ...]:
        """What a block list was asked since a time, oldest first."""
        path = self._run_folder / files.LISTS_LOG
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found = (Question(**json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines())
        return tuple(q for q in found if q.at >= since and q.name.endswith(f".{zone.rstrip('.')}."))

    def _of_list(self, lists: dict[str, Any], zone: str) -> dict[str, Any]:
        if zone.rstrip(".") not in self.lists:
            known = ", ".join(self.lists) or "none"
            raise ValueError(f"the outside has no block list {zone!r}; there are {known}")
        name = zone.rstrip(".") + "."
        found: dict[str, Any] = lists.setdefault(name, {"mode": "answer", "entries": {}})
        return found

    def _change_lists(self, change: Callable[[dict[str, Any]], None]) -> None:
        self._order(
            files.LISTS_CONTROL_FILE, files.LISTS_STATE_FILE, "lists", change, "block lists"
        )

    def _order(
        self,
        control: str,
        state: str,
        what: str,
        change: Callable[[dict[str, Any]], None],
        who: str,
    ) -> None:
        """Change ``what`` in a program's control file; returns when the program obeys it."""
        with self._state.lock("world-control"):
            orders = self._read(control) or {"serial": 0, what: {}}
            orders["serial"] += 1
            change(orders[what])
            write_atomic(self._run_folder / control, json.dumps(orders))
        wait_for(
            lambda: self._read(state).get("serial", 0) >= orders["serial"],
            timeout=10,
            what=f"the {who} of the outside to do as told",
        )

    # Mail ---------------------------------------------------------------------------------

    @property
    def names(self) -> dict[str, str]:
        """An address to mail to for each mail server: ``strict`` -> ``someone@strict.example``."""
        return {
            mx.name: f"someone@{self._platform.domain if mx is plan.HOME else mx.domain}"
            for mx in plan.MAIL_SERVERS.values()
        }

    @property
    def addresses(self) -> dict[str, plan.Pair]:
        """Addresses of each mail server."""
        return {mx.name: mx.addresses for mx in plan.MAIL_SERVERS.values()}

    def messages(self, mx: str, **filters: object) -> tuple[Message, ...]:
        """Messages that ``mx`` received, oldest first.

        Each filter names an attribute of :class:`Message` and the value that it has:
        ``messages("strict", mail_from="a@example.org", accepted=True)``.
        """
        folder = self._mail_folder(mx)
        found = (Message.read(path) for path in sorted(folder.glob("[0-9]*.json")))
        return tuple(
            m for m in found if all(getattr(m, name) == value for name, value in filters.items())
        )

    def wait_message(
        self,
        mx: str,
        predicate: Callable[[Message], bool] = lambda _: True,
        timeout: float = 30.0,
        count: int = 1,
    ) -> Message:
        """The first message at ``mx`` that ``predicate`` holds for, waited for if need be.

        :param count: wait until there are so many of them.
        """

        def arrived() -> list[Message]:
            found = [m for m in self.messages(mx) if predicate(m)]
            return found if len(found) >= count else []

        return wait_for(
            arrived, timeout=timeout, what=f"a message at the mail server {mx} of the outside"
        )[0]

    def events(self, mx: str, since: float = 0.0) -> tuple[Event, ...]:
        """Answers to recipients and messages that ``mx`` gave since a time, oldest first."""
        return tuple(event for event in self._events(mx) if event.at >= since)

    def _events(self, mx: str) -> Iterator[Event]:
        path = self._mail_folder(mx) / "log.jsonl"
        if path.exists():
            text = path.read_text(encoding="utf-8")
            for line in text[: text.rfind("\n") + 1].splitlines():
                yield Event(**json.loads(line))

    def set(self, mx: str, mode: Mode | str) -> None:
        """Change what a mail server does; returns when it does so."""
        self._mail_folder(mx)

        def change(modes: dict[str, Any]) -> None:
            modes[mx] = str(Mode(mode))

        self._order(files.CONTROL_FILE, files.STATE_FILE, "modes", change, f"mail server {mx}")

    def reset(self) -> None:
        """Give every mail server and block list the mode again that it began with, empty lists."""
        if self._read(files.LISTS_CONTROL_FILE).get("lists"):
            self._change_lists(dict.clear)
        for mx in plan.MAIL_SERVERS.values():
            if self.mode(mx.name) is not mx.mode:
                self.set(mx.name, mx.mode)

    def mode(self, mx: str) -> Mode:
        """What a mail server does at present."""
        default = plan.MAIL_SERVERS[mx].mode
        return Mode(self._read(files.STATE_FILE).get("modes", {}).get(mx, default))

    @property
    def _run_folder(self) -> Path:
        return self._state.folder("world", "run")

    def _read(self, name: str) -> dict[str, Any]:
        return self._state.read_json(f"world/run/{name}")

    def _mail_folder(self, mx: str) -> Path:
        if mx not in plan.MAIL_SERVERS:
            known = ", ".join(plan.MAIL_SERVERS)
            raise ValueError(f"the outside has no mail server {mx!r}; there are {known}")
        return self._folder / "mail" / mx


def _get(connected: socket.socket, path: str, host: str = plan.ACME_NAME) -> int:
    """Status of a GET request."""
    connection = http.client.HTTPConnection(host, timeout=5)
    connection.sock = connected
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()
