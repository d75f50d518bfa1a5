"""IN: what other people's mail servers see of the MX, and where the mail goes that it takes."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import IPv4Address
from itertools import count
from secrets import token_hex
from typing import TYPE_CHECKING

from mailsite.model import (
    Dnsbl,
    DnsblKind,
    Host,
    IPAddress,
    MailboxTarget,
    Nowhere,
    Role,
)
from verify import addresses, mailauth
from verify.client import Client, Observer
from verify.context import SUBMISSION, SUBMISSION_PROXY, Context, each, eventually, expect
from verify.lookup import family
from verify.mailbox import MAILBOXES
from verify.registry import Failed, Skipped, check
from verify.relay import attempts
from verify.smtp import Letter, Session, letter

if TYPE_CHECKING:
    from verify.lab import LabMachine, RemoteSender
    from verify.mail import Mail

SMTP = 25
SMTPS = 465
REACH = 2.0
"""Seconds after which a packet filter has answered, if only by silence."""
PROMPT = 20.0
"""Seconds in which a mail that nothing holds up is where it belongs."""
ERRORS = 9
"""Refusals in one session that Postfix takes without a pause (smtpd_soft_error_limit)."""


@dataclass(frozen=True)
class Door:
    """An address of a member, and who connects to it.

    Attributes:
        helo: What the client says it is called.
    """

    member: Host
    address: IPAddress
    client: Client
    helo: str = "client.probe.invalid"

    def session(self, ctx: Context, port: int = SMTP) -> Session:
        """Connect; with TLS from the start where the port wants it."""
        tls = ctx.tls() if port == SMTPS else None
        return Session(
            self.client,
            self.address,
            port,
            say=ctx.say,
            helo=self.helo,
            tls=tls,
            name=ctx.platform.names.smtp_in,
            # A block list that is dead keeps RCPT waiting.
            timeout=60.0,
        )

    def __str__(self) -> str:
        return f"{self.member.name} [{self.address}] from {self.client.place}"


def members(ctx: Context) -> tuple[Host, ...]:
    return ctx.platform.members(Role.SMTP_IN)


def doors(ctx: Context, client: Client | None = None, helo: str = "") -> list[Door]:
    """Every public address of every member; one client does, each member counts by itself."""
    who = client or ctx.internet.client()
    found = [Door(m, a, who) for m in members(ctx) for a in ctx.public(m)]
    return [replace(d, helo=helo) for d in found] if helo else found


def remote_doors(ctx: Context, sender: RemoteSender) -> list[Door]:
    """The same, from the mail server of a remote sender."""
    return doors(ctx, sender.client, sender.helo)


def _workers(ctx: Context) -> int:
    """Sessions side by side: few where all of them come from one address."""
    return 4 if ctx.is_live else 16


def _expect_reachable(ctx: Context) -> None:
    """Tell a closed way out from a member that is away.

    Raises:
        Skipped: Port 25 out is closed here, as many providers have it.
    """
    if not ctx.is_live:
        return

    def opens(door: Door, port: int) -> bool:
        try:
            door.client.connect(door.address, port, timeout=5.0).close()
        except OSError:
            return False
        return True

    found = doors(ctx)
    if not any(opens(d, SMTP) for d in found) and any(opens(d, SMTPS) for d in found):
        raise Skipped("port 25 out is closed here: run it where mail may leave")


# -- IN-1 --------------------------------------------------------------------------------------


@check("IN-1", live=True)
def mx_answers(ctx: Context) -> str:
    """Ports 25 and 465 answer on every member with the MX's certificate; nobody can log in."""
    _expect_reachable(ctx)
    name = ctx.platform.names.smtp_in
    wanted = {a for m in members(ctx) for a in ctx.public(m)}
    resolved = ctx.lookup.addresses(name)
    expect(
        resolved == wanted,
        f"{name} resolves to {_sorted(resolved)}, the members have {_sorted(wanted)}",
    )
    recipient = existing(ctx)

    def plain(door: Door) -> None:
        with door.session(ctx) as session:
            _expect_banner(ctx, door, session)
            session.ehlo()
            expect(session.has_extn("starttls"), f"{door}: STARTTLS is not offered")
            _expect_no_login(door, session, "before TLS")
            code, text = session.envelope("", recipient)
            expect(
                code == 250,
                f"{door}: without TLS, mail to {recipient} is answered with {code} {text}",
            )
            session.rset()
            _expect_modern(door, session.secure(ctx.tls(), name).version())
            _expect_no_login(door, session, "after STARTTLS")

    def wrapped(door: Door) -> None:
        with door.session(ctx, SMTPS) as session:
            _expect_banner(ctx, door, session)
            session.ehlo()
            _expect_modern(door, getattr(session.sock, "version", lambda: None)())
            _expect_no_login(door, session, f"on port {SMTPS}")

    def closed(door: Door) -> None:
        for port in (SUBMISSION, SUBMISSION_PROXY):
            try:
                door.client.connect(door.address, port, timeout=REACH).close()
            except OSError:
                continue
            raise Failed(f"{door}: port {port} answers, but nobody submits mail here")

    found = doors(ctx)
    cases = [(look, d) for d in found for look in (plain, wrapped, closed)]
    each(cases, lambda case: case[0](case[1]), workers=len(cases) if not ctx.is_live else 4)
    return (
        f"{name}: {len(found)} addresses of {len(members(ctx))} members answer on 25, with STARTTLS"
        " that nobody has to use, and on 465; certificate verified, no AUTH, no submission"
    )


def _expect_banner(ctx: Context, door: Door, session: Session) -> None:
    banner, name = session.banner, ctx.platform.names.smtp_in
    expect(banner.name == name, f"{door}: the banner shows {banner.name!r}, not {name!r}")
    expect(
        banner.inner == door.member.name,
        f"{door}: the banner has {banner.inner!r} in parentheses, not {door.member.name!r}",
    )


def _expect_modern(door: Door, version: str | None) -> None:
    expect(version in ("TLSv1.2", "TLSv1.3"), f"{door}: speaks {version or 'no TLS'}")


def _expect_no_login(door: Door, session: Session, when: str) -> None:
    expect(not session.has_extn("auth"), f"{door}: AUTH is offered {when}")
    code, text = session.docmd("AUTH", "PLAIN AHgAeA==")
    expect(code in (502, 503), f"{door}: AUTH {when} is answered with {code} {text.decode()}")


def _sorted(found: Iterable[IPAddress]) -> str:
    return " ".join(sorted(str(a) for a in found)) or "nothing"


def existing(ctx: Context) -> str:
    """An address of a mailbox, in the first domain that has one."""
    for domain in addresses.receiving(ctx.platform):
        user = addresses.mailbox_user(ctx.platform, domain)
        if user is not None:
            return f"{user}@{domain.name}"
    raise Skipped("no address of the site data leads to one mailbox alone")


# -- IN-2 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A sort of address, and one of that sort."""

    what: str
    address: str


def cases(ctx: Context) -> list[Case]:
    """One address of each sort that the site data has."""
    platform = ctx.platform
    found: dict[str, str] = {}
    for domain in addresses.receiving(platform):
        for user in addresses.users(platform, domain):
            address = f"{user}@{domain.name}"
            for what in _sorts(ctx, domain.name, user):
                found.setdefault(what, address)
            if domain.alias_of is not None and user not in domain.addresses:
                found.setdefault("an address in a domain alias", address)
        if addresses.takes_everyone(platform, domain):
            found.setdefault("a catch-all", f"someone-{token_hex(4)}@{domain.name}")
    if "a mailbox" in found:
        user, _, name = found["a mailbox"].partition("@")
        found["a plus-address"] = f"{user}+{token_hex(4)}@{name}"
    return [Case(what, address) for what, address in found.items()]


def _sorts(ctx: Context, domain: str, user: str) -> Iterator[str]:
    targets = ctx.platform.domains[domain].addresses.get(user, ())
    way = addresses.way(ctx.platform, f"{user}@{domain}")
    if way is None or not targets:
        return
    if all(isinstance(target, Nowhere) for target in targets):
        yield "nowhere"
    elif len(targets) > 1:
        yield "several recipients"
    elif isinstance(targets[0], MailboxTarget):
        yield "a mailbox"
    elif way.forwards:
        yield "a forward elsewhere"
    else:
        yield "another address of ours"


@check("IN-2", quick=True)
def mail_arrives_where_it_belongs(ctx: Context) -> str:
    """Mail to each sort of address arrives where the site data says, once, through every member."""
    lab = ctx.lab
    sender = lab.sender("careful")
    sorts = cases(ctx)
    turn = count()
    sent: list[tuple[Case, Letter, Host]] = []

    def through(door: Door, mine: list[Case]) -> None:
        with door.session(ctx) as session:
            for case in mine:
                mail = write(sender, case.address)
                _expect_taken(door, session, sender, mail, case.what)
                sent.append((case, mail, door.member))

    everywhere = remote_doors(ctx, sender)
    shares: dict[int, list[Case]] = {n: [] for n in range(len(everywhere))}
    for member in members(ctx):
        mine = [n for n, d in enumerate(everywhere) if d.member is member]
        for case in sorts:  # each member takes each sort, over one family or the other
            shares[mine[next(turn) % len(mine)]].append(case)
    each(shares.items(), lambda share: through(everywhere[share[0]], share[1]))

    def settled() -> None:
        for case, mail, member in sent:
            _expect_where_it_belongs(ctx, case, mail, member)
        for member in members(ctx):
            left = [e for e in lab.machine(member).queue_entries() if _mentions(e.sender, sent)]
            expect(not left, f"{member.name}: mail of the check is still queued: {left[:1]}")

    eventually(settled, seconds=PROMPT, what="mail to be where it belongs")
    settled()  # nothing came on top of it
    return (
        f"{len(sent)} mails through {len(members(ctx))} members arrived once each where the site"
        f" data says: {', '.join(f'{c.what} ({c.address})' for c in sorts)}"
    )


def write(sender: RemoteSender, recipient: str, author: str = "") -> Letter:
    """A mail of a remote sender, whose envelope sender no other mail has."""
    mail = letter(author or f"{{token}}@{sender.domain}", recipient)
    return replace(mail, content=sender.sign(mail.content))


def _expect_taken(
    door: Door, session: Session, sender: RemoteSender, mail: Letter, what: str
) -> None:
    session.ehlo_or_helo_if_needed()
    code, text = session.submit(mail.sender, [mail.recipient], mail.content)
    expect(
        code == 250,
        f"{door}: mail of {sender.domain} to {what}, {mail.recipient}, is answered with"
        f" {code} {text}",
    )


def _expect_where_it_belongs(ctx: Context, case: Case, mail: Letter, member: Host) -> None:
    way = addresses.way(ctx.platform, case.address)
    assert way is not None
    found: Counter[tuple[str, str]] = Counter()
    for copy in ctx.lab.world.copies(mail.token):
        expect(
            copy.accepted,
            f"{member.name}: {case.what}: {copy.mx} refused a copy for {copy.rcpt_to}",
        )
        found.update((copy.mx, r) for r in copy.rcpt_to)
    wanted = Counter(
        [(MAILBOXES, r) for r in way.mailboxes] + [(_server(ctx, r), r) for r in way.forwards]
    )
    expect(
        found == wanted,
        f"{member.name}: mail to {case.what}, {case.address}: arrived for {_told(found)}, the site"
        f" data says {_told(wanted)}",
    )


def _server(ctx: Context, forward: str) -> str:
    return ctx.lab.world.server_of(forward.rpartition("@")[2])


def _told(found: Counter[tuple[str, str]]) -> str:
    return ", ".join(f"{r} at {mx} {n}x" for (mx, r), n in sorted(found.items())) or "nobody"


def _mentions(sender: str, sent: list[tuple[Case, Letter, Host]]) -> bool:
    return any(mail.token in sender for _, mail, _ in sent)


# -- IN-3 --------------------------------------------------------------------------------------


@check("IN-3", live=True)
def strangers_are_refused_at_once(ctx: Context) -> str:
    """Who does not exist is refused at RCPT with 550, other people's domains are not relayed."""
    _expect_reachable(ctx)
    platform = ctx.platform
    named = [d for d in addresses.receiving(platform) if not addresses.takes_everyone(platform, d)]
    plain, aliases = (
        [d.name for d in named if (d.alias_of is not None) is alias][:3] for alias in (False, True)
    )
    authors: list[str] = []

    def look(door: Door) -> None:
        # Whoever is told of a failure hears of it at an address of his own.
        author = "" if ctx.is_live else f"{token_hex(8)}@{ctx.lab.sender('careful').domain}"
        authors.append(author)
        with door.session(ctx) as session:
            session.ehlo()
            code, text = session.mail(author)
            expect(code == 250, f"{door}: MAIL is answered with {code} {text.decode()}")
            for name in (*plain, *aliases, platform.inbound.srs_domain):
                unknown = f"nobody-{token_hex(4)}@{name}"
                code, text = session.rcpt(unknown)
                expect(
                    code == 550,
                    f"{door}: RCPT {unknown}, who does not exist, is answered with {code}"
                    f" {text.decode()}, not with 550",
                )
            stranger = f"relay-probe@{_others(ctx)}"
            code, text = session.rcpt(stranger)
            expect(
                code in (550, 554) and b"5.7.1" in text,
                f"{door}: RCPT {stranger} is answered with {code} {text.decode()}, not refused as"
                " relaying",
            )

    found = doors(ctx)
    each(found, look, workers=_workers(ctx))
    told = (
        f"{len(found)} addresses: unknown users of {', '.join([*plain, *aliases])} get 550 at RCPT,"
        f" mail for {_others(ctx)} is not relayed"
    )
    if ctx.is_live:
        return told
    relayed = _nothing_is_relayed(ctx)
    for member in members(ctx):
        waiting = {r for e in ctx.lab.machine(member).queue_entries() for r in e.recipients}
        left = waiting & set(authors)
        expect(not left, f"{member.name}: a bounce waits for {', '.join(left)}")
    for author in authors:
        back = ctx.lab.world.mails("origin", author)
        expect(not back, f"a bounce left for {author}, whose mail could be refused at RCPT")
    return f"{told}; no bounce left; {relayed}"


def _others(ctx: Context) -> str:
    """A domain that is not the platform's, and takes mail: nothing else is wrong with it."""
    return "ietf.org" if ctx.is_live else ctx.lab.world.domain("generic")


@dataclass(frozen=True)
class Relay:
    """A way to a mail server that somebody might try to send through."""

    where: str
    server: str
    address: IPAddress
    open: Callable[[], Session] = field(repr=False)


def _nothing_is_relayed(ctx: Context) -> str:
    """Every attempt of relay_attempts.yaml, from everywhere, at every door."""
    shapes = attempts()
    ways = [*_ways_outside(ctx), *_ways_of_networks(ctx), *_ways_of_frontends(ctx)]
    victim = token_hex(8)

    def look(way: Relay) -> None:
        values = _values(ctx, way, victim)
        filled = [attempt.filled(values) for attempt in shapes]
        for first in range(0, len(filled), ERRORS):
            mine = filled[first : first + ERRORS]
            with way.open() as session:
                replies = _tried(session, mine)
            for (sender, recipient), (code, text) in zip(mine, replies, strict=True):
                expect(
                    code >= 400,
                    f"{way.where}: relays: MAIL FROM:<{sender}> RCPT TO:<{recipient}> is answered"
                    f" with {code} {text}",
                )

    # One session at a time on each way: servers need not start a process for each.
    each(ways, look, workers=12)
    arrived = ctx.lab.world.copies(victim)
    expect(not arrived, f"a mail for {victim} arrived at {[m.mx for m in arrived]}")
    places = sorted({way.where.rpartition(" from ")[2] for way in ways})
    return (
        f"{len(shapes)} shapes of relay attempts refused on {len(ways)} ways from"
        f" {', '.join(places)}"
    )


def _tried(session: Session, envelopes: Sequence[tuple[str, str]]) -> list[tuple[int, str]]:
    """MAIL and RCPT as written, letters beyond ASCII as UTF-8, all without waiting (RFC 2920).

    Returns:
        For each envelope the reply that decides.
    """
    lines = [
        line
        for sender, recipient in envelopes
        for line in (f"MAIL FROM:<{sender}>", f"RCPT TO:<{recipient}>", "RSET")
    ]
    session.send("".join(f"{line}\r\n" for line in lines).encode())
    replies = [session.getreply() for _ in lines]
    decisive = [
        mail if mail[0] != 250 else recipient
        for mail, recipient in zip(replies[0::3], replies[1::3], strict=True)
    ]
    return [(code, text.decode("utf-8", "replace")) for code, text in decisive]


def _values(ctx: Context, way: Relay, victim: str) -> dict[str, str]:
    platform = ctx.platform
    named = (d for d in addresses.receiving(platform) if not addresses.takes_everyone(platform, d))
    ours = next(named, None)
    there = _others(ctx)
    pair = {address.version: str(address) for address in ctx.public(members(ctx)[0])}
    return {
        "victim": f"{victim}@{there}",
        "user": victim,
        "there": there,
        "ours": ours.name if ours else platform.inbound.srs_domain,
        "known": next(addresses.users(platform, ours), "postmaster") if ours else "postmaster",
        "mx": platform.names.smtp_in,
        "member": way.server,
        "srs": platform.inbound.srs_domain,
        "internal": platform.internal_domain,
        "ipv4": pair[4],
        "ipv6": pair[6],
    }


def _way(ctx: Context, door: Door) -> Relay:
    def opened() -> Session:
        session = door.session(ctx)
        session.ehlo()
        return session

    return Relay(str(door), door.member.name, door.address, opened)


def _ways_outside(ctx: Context) -> Iterator[Relay]:
    for door in doors(ctx):
        yield _way(ctx, door)


def _ways_of_networks(ctx: Context) -> Iterator[Relay]:
    """From each network of the site, and the operators', in both families, at member by member."""
    seats: list[tuple[Client, bool]] = []
    for observer in (ctx.office, ctx.local):
        if observer is not None:
            seats.append((observer.client(), False))
    for name, network in ctx.platform.networks.items():
        for machine in ctx.lab.machines:
            leg = next((i for i in machine.host.interfaces if i.network == name), None)
            if leg is not None:
                place = f"{name} ({machine.name})"
                client = Client(place, machine.observer.enter, leg.ipv4, leg.ipv6)
                seats.append((client, network.kind.value == "site-local"))
                break
    for number, (client, inside) in enumerate(seats):
        member = members(ctx)[number % len(members(ctx))]
        for address in ctx.internal(member) if inside else ctx.public(member):
            yield _way(ctx, Door(member, address, client))


def _ways_of_frontends(ctx: Context) -> Iterator[Relay]:
    """Submission without a login: through each frontend, and as a frontend at its port."""

    def submission(observer: Observer, address: IPAddress) -> Session:
        # smtp-out counts a client's connections: each session has a client of its own.
        session = Session(observer.client(), address, SUBMISSION, say=ctx.say)
        session.secure(ctx.tls(), ctx.platform.names.smtp_out)
        return session

    def proxied(machine: LabMachine, address: IPAddress) -> Session:
        stranger = ctx.internet.client().source(address)
        kind = "TCP4" if address.version == 4 else "TCP6"
        header = f"PROXY {kind} {stranger} {address} 40000 {SUBMISSION}\r\n".encode()
        client = machine.observer.client()
        session = Session(client, address, SUBMISSION_PROXY, say=ctx.say, preamble=header)
        session.secure(ctx.tls(), ctx.platform.names.smtp_out)
        return session

    for name, address in ctx.doors:
        yield Relay(
            f"{name} [{address}]:{SUBMISSION} from {ctx.internet.place}",
            name,
            address,
            lambda address=address: submission(ctx.internet, address),  # type: ignore[misc]
        )
    if not ctx.frontends:
        return
    machine = ctx.lab.machine(ctx.frontends[0])
    member = ctx.members[0]
    for address in ctx.internal(member):
        yield Relay(
            f"{member.name} [{address}]:{SUBMISSION_PROXY} from {machine.name}",
            member.name,
            address,
            lambda address=address: proxied(machine, address),  # type: ignore[misc]
        )


# -- IN-4 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A client, and what a block list answers when it is asked for it.

    Attributes:
        what: In words, for people.
        zone: The list.
        name: What it is asked for.
        answer: What it answers.
        client: Who sends.
        versions: Of IP, that the client sends over.
        helo: What it says.
        sender: Of its mail.
        listed: The mail must be refused.
    """

    what: str
    zone: str
    name: IPAddress | str
    answer: str
    client: Client
    versions: tuple[int, ...]
    helo: str
    sender: str
    listed: bool


ERROR = "127.255.255.254"
"""What lists answer to those that they do not want to be asked by."""


# While block lists are dead, all mail that comes in takes seconds, but it comes.
@check("IN-4", quick=True, disturbs=("block_lists",))
def block_lists_refuse(ctx: Context) -> str:
    """Who is on a block list is refused by its name; an answer that is no verdict only warns."""
    lab = ctx.lab
    refusing = [entry for entry in ctx.platform.inbound.dnsbl if not entry.warn_only]
    if not refusing:
        raise Skipped("the site data names no block list; inbound.dnsbl in site.yaml does")
    zones = sorted({entry.zone for entry in refusing})
    trials = [t for entry in refusing for t in _trials(ctx, entry)]
    started = time.time()
    # Addresses are used again, and what was asked for one of them before would be served.
    names = {lab.world.list_name(t.zone, t.name) for t in trials}
    with _nothing_remembered(ctx, zones, names):
        with lab.world.listed(*((t.zone, t.name, (t.answer,)) for t in trials)):
            pairs = [
                (trial, door)
                for trial in trials
                for door in doors(ctx, trial.client, trial.helo)
                if door.address.version in trial.versions
            ]
            each(pairs, lambda pair: _expect_verdict(ctx, *pair), workers=16)
        unsure = [(t, d) for t, d in pairs if not t.listed]
        eventually(lambda: _expect_warned(ctx, unsure, started), seconds=5, what="warnings")
        dead = _dead_lists(ctx, zones)
    return (
        f"{sum(t.listed for t in trials)} listed clients refused with the name of"
        f" {', '.join(zones)} on {len(members(ctx))} members; {len(unsure)} answers that are none"
        f" (outside the range, {ERROR}) took the mail and warned; {dead}"
    )


@contextmanager
def _nothing_remembered(ctx: Context, zones: list[str], names: set[str]) -> Iterator[None]:
    """The members' resolvers know nothing of the lists, before and afterwards."""

    def forget(member: Host) -> None:
        ctx.lab.machine(member).forget(*zones, names=names)

    each(members(ctx), forget)
    try:
        yield
    finally:
        each(members(ctx), forget)


def _trials(ctx: Context, entry: Dnsbl) -> Iterator[Trial]:
    """A client that the list knows, one with an answer that does not count, one with an error."""
    spammer = ctx.lab.sender("spammer")
    versions = ((4,), (6,)) if entry.kind is DnsblKind.RBL_CLIENT else ((4, 6),)
    counted = [e.answers for e in ctx.platform.inbound.dnsbl
               if (e.kind, e.zone) == (entry.kind, entry.zone) and not e.warn_only]  # fmt: skip
    reverse = entry.kind is DnsblKind.RHSBL_REVERSE_CLIENT
    for answer, listed in ((first_answer(entry.answers), True), (_other_answer(counted), False),
                           (ERROR, False)):  # fmt: skip
        if reverse and not listed:
            continue  # there is one name to be listed by, and it is
        for of in versions:
            unique = token_hex(6)
            client = spammer.client if reverse else ctx.internet.client()
            helo, sender = f"{unique}.helo.invalid", f"someone@{unique}.sender.invalid"
            source = client.source(IPv4Address(0)) if of == (4,) else client.ipv6
            names: dict[DnsblKind, IPAddress | str | None] = {
                DnsblKind.RBL_CLIENT: source,
                DnsblKind.RHSBL_HELO: helo,
                DnsblKind.RHSBL_SENDER: sender.partition("@")[2],
                DnsblKind.RHSBL_REVERSE_CLIENT: spammer.helo,
            }
            name = names[entry.kind]
            assert name is not None
            what = f"{entry.kind} {entry.zone}={answer}"
            yield Trial(what, entry.zone, name, answer, client, of, helo, sender, listed)


def first_answer(pattern: str) -> str:
    """An address that a pattern like ``127.0.0.[2..11]`` or ``127.0.[1;3].2`` stands for."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", pattern)


def _other_answer(patterns: Iterable[str]) -> str:
    """An address of 127.0.0.0/8 that none of the patterns stands for, and no error code."""
    known = [_octets(p) for p in patterns]
    for last in range(1, 255):
        octets = (127, 0, 2, last)
        if not any(all(o in s for o, s in zip(octets, sets, strict=True)) for sets in known):
            return ".".join(map(str, octets))
    raise Failed(f"no answer is left beside {', '.join(patterns)}")


def _octets(pattern: str) -> list[set[int]]:
    """The numbers that stand for each octet (postconf(5), reject_rbl_client)."""
    found = []
    for part in re.findall(r"\[[^\]]*\]|\d+", pattern):
        numbers: set[int] = set()
        for one in part.strip("[]").split(";"):
            low, _, high = one.partition("..")
            numbers |= set(range(int(low), int(high or low) + 1))
        found.append(numbers)
    return found


def _expect_verdict(ctx: Context, trial: Trial, door: Door) -> None:
    with door.session(ctx) as session:
        session.ehlo()
        code, text = session.envelope(trial.sender, existing(ctx))
    said = f"{door}: {trial.what}: RCPT is answered with {code} {text}"
    if trial.listed:
        expect(500 <= code < 600, f"{said}, not refused")
        expect(trial.zone in text, f"{said}, which does not name {trial.zone}")
    else:
        expect(code == 250, f"{said}, though that is no verdict")


def _expect_warned(ctx: Context, unsure: list[tuple[Trial, Door]], since: float) -> None:
    lines = {m.name: _warnings(ctx, m, since) for m in members(ctx)}
    for trial, door in unsure:
        source = door.client.source(door.address)
        expect(
            any(f"[{source}]" in line and trial.zone in line for line in lines[door.member.name]),
            f"{door}: {trial.what}: no warning names [{source}] and {trial.zone}",
        )


def _warnings(ctx: Context, member: Host, since: float) -> list[str]:
    return ctx.lab.machine(member).journal(since, "reject_warning|RBL lookup error")


def _forget_client(ctx: Context, door: Door, zones: Iterable[str]) -> IPAddress:
    """The member's resolver forgets what the lists ``zones`` said of the door's client before.

    Returns the address that the client has there.
    """
    source = door.client.source(door.address)
    assert source is not None
    names = [ctx.lab.world.list_name(zone, source) for zone in zones]
    ctx.lab.machine(door.member).forget(names=names)
    return source


def _dead_lists(ctx: Context, zones: list[str]) -> str:
    """All lists fail, then one is silent: mail is taken, and a warning names the list."""
    world = ctx.lab.world

    def taken(doors_: list[Door], zones: list[str], since: float) -> float:
        def look(door: Door) -> float:
            # Names that no resolver remembers: it would serve yesterday's answer (RFC 8767).
            fresh = f"{token_hex(6)}.invalid"
            _forget_client(ctx, door, zones)
            started = time.monotonic()
            with replace(door, helo=f"helo.{fresh}").session(ctx) as session:
                session.ehlo()
                code, text = session.envelope(f"someone@{fresh}", existing(ctx))
                expect(
                    code == 250,
                    f"{door}: with {', '.join(zones)} dead, RCPT is answered with {code} {text}",
                )
            return time.monotonic() - started

        waited = each(doors_, look)

        def warned(door: Door) -> None:
            lines = ctx.lab.machine(door.member).journal(since, "RBL lookup error")
            missing = [z for z in zones if not any(z in line for line in lines)]
            expect(not missing, f"{door}: no warning that {', '.join(missing)} is dead")

        each(doors_, lambda door: eventually(lambda: warned(door), seconds=5))
        return max(waited)

    with ExitStack() as stack:
        for zone in zones:
            stack.enter_context(world.list_behaving(zone, "fail"))
        taken(doors(ctx), zones, time.time())
    silent = min(zones, key=lambda z: sum(e.zone == z for e in ctx.platform.inbound.dnsbl))
    each(members(ctx), lambda member: ctx.lab.machine(member).forget())
    with world.list_behaving(silent, "silent"):
        one = [next(d for d in doors(ctx) if d.member is m) for m in members(ctx)]
        waited = taken(one, [silent], time.time())
    return (
        f"SERVFAIL of all, and silence of {silent} (RCPT took {waited:.1f} s), took the mail and"
        " warned"
    )


# -- IN-5 --------------------------------------------------------------------------------------


@check("IN-5", quick=True)
def forwards_have_a_sender_of_ours(ctx: Context) -> str:
    """A forward passes SPF at the next hop, local mail keeps its sender, bounces find home."""
    lab = ctx.lab
    address = forward(ctx)
    seen: set[IPAddress] = set()
    rewritten: dict[str, tuple[Letter, str]] = {}

    def look(member: Host) -> None:
        sender = lab.sender("careful")
        door = next(d for d in remote_doors(ctx, sender) if d.member is member)
        versions: set[int] = set()
        with door.session(ctx) as session:
            for _ in range(16):  # which family a delivery takes is Postfix's throw of a coin
                mail = write(sender, address)
                _expect_taken(door, session, sender, mail, "a forward elsewhere")
                forwarded = _expect_rewritten(ctx, member, mail)
                rewritten[member.name] = (mail, forwarded.mail_from)
                versions.add(forwarded.peer.version)
                seen.add(forwarded.peer)
                if versions == {4, 6}:
                    break
            else:
                raise Failed(f"{member.name}: 16 forwards all left over IPv{versions.pop()}")
        signer = lab.sender("signer")
        with replace(door, client=signer.client, helo=signer.helo).session(ctx) as session:
            mail = write(signer, address)
            _expect_taken(door, session, signer, mail, "a forward elsewhere")
            _expect_rewritten(ctx, member, mail)

    each(members(ctx), look)
    each(members(ctx), lambda member: _expect_own_sender_kept(ctx, member))
    names = [m.name for m in members(ctx)]
    for number, name in enumerate(names):
        other = members(ctx)[(number + 1) % len(names)]
        _expect_bounce_comes_home(ctx, other, *rewritten[name])
    return (
        f"mail to {address} reaches the next hop from {_sorted(seen)} as SRS0=...@"
        f"{ctx.platform.inbound.srs_domain}, SPF passes, DMARC of a signed mail too; mailboxes see"
        f" the sender; bounces come home through another member"
    )


def forward(ctx: Context) -> str:
    """An address with a copy elsewhere, and if there is one, with one in a mailbox too."""
    found = []
    for domain in addresses.receiving(ctx.platform):
        for user in addresses.users(ctx.platform, domain):
            way = addresses.way(ctx.platform, f"{user}@{domain.name}")
            if way is not None and way.forwards:
                found.append((not way.mailboxes, f"{user}@{domain.name}"))
    if not found:
        raise Skipped("no address of the site data forwards elsewhere")
    return min(found)[1]


def _expect_rewritten(ctx: Context, member: Host, mail: Letter) -> Mail:
    """The copies elsewhere have a sender of ours that SPF allows, the others the sender's own."""
    way = addresses.way(ctx.platform, mail.recipient)
    assert way is not None

    def arrived() -> list[Mail]:
        copies = ctx.lab.world.copies(mail.token)
        refused = [c for c in copies if not c.accepted]
        expect(
            not refused,
            f"{member.name}: the next hop refused {mail.recipient}:"
            f" {[ctx.lab.world.replies(c.mx, c.rcpt_to[0], c.mail_from)[-1:] for c in refused]}",
        )
        found = {r for c in copies for r in c.rcpt_to}
        missing = (way.mailboxes | way.forwards) - found
        expect(not missing, f"{member.name}: nothing arrived for {', '.join(sorted(missing))}")
        return copies

    copies = eventually(arrived, seconds=PROMPT)
    srs = ctx.platform.inbound.srs_domain
    last = copies[0]
    for copy in copies:
        if set(copy.rcpt_to) <= way.mailboxes:
            _expect_sender(member, copy, mail)
            continue
        last = copy
        user, _, domain = mail.sender.partition("@")
        expect(
            re.fullmatch(
                rf"SRS0=[^=@]+=[^=@]+={re.escape(domain)}={re.escape(user)}@{re.escape(srs)}",
                copy.mail_from,
            ),
            f"{member.name}: a forward has the sender {copy.mail_from!r}, not SRS0=...@{srs}",
        )
        expect(
            copy.peer in ctx.public(member),
            f"{member.name}: a forward came from {copy.peer}, which is none of its addresses",
        )
        judged = mailauth.check_spf(ctx.lookup, copy.peer, copy.mail_from, copy.helo)
        expect(
            judged.result == "pass",
            f"{member.name}: SPF of {copy.mail_from} from {copy.peer} over {family(copy.peer)}:"
            f" {judged.result} ({judged.reason})",
        )
    return last


def _expect_sender(member: Host, copy: Mail, mail: Letter) -> None:
    expect(
        copy.mail_from == mail.sender,
        f"{member.name}: mail of {mail.sender} reached {', '.join(copy.rcpt_to)} with the sender"
        f" {copy.mail_from!r}",
    )


def _expect_own_sender_kept(ctx: Context, member: Host) -> None:
    sender = ctx.lab.sender("careful")
    door = next(d for d in remote_doors(ctx, sender) if d.member is member)
    mail = write(sender, existing(ctx))
    with door.session(ctx) as session:
        _expect_taken(door, session, sender, mail, "a mailbox")
    _expect_sender(member, _arrival(ctx, mail), mail)


def _arrival(ctx: Context, mail: Letter) -> Mail:
    """The first copy of a mail, wherever it arrives."""

    def look() -> Mail:
        copies = ctx.lab.world.copies(mail.token)
        expect(copies, f"mail to {mail.recipient} arrived nowhere")
        return copies[0]

    return eventually(look, seconds=PROMPT)


def _expect_bounce_comes_home(ctx: Context, member: Host, mail: Letter, rewritten: str) -> None:
    """A bounce to a rewritten sender, given to another member than the one that made it."""
    remote = ctx.lab.sender("signer")
    door = next(d for d in remote_doors(ctx, remote) if d.member is member)
    bounce = write(remote, rewritten, author=f"mailer-daemon@{remote.domain}")
    with door.session(ctx) as session:
        session.ehlo()
        code, text = session.submit("", [rewritten], bounce.content)
        expect(code == 250, f"{door}: a bounce to {rewritten} is answered with {code} {text}")
    back = _arrival(ctx, bounce)
    expect(
        (back.mx, back.mail_from, back.rcpt_to) == ("origin", "", (mail.sender,)),
        f"{member.name}: the bounce to {rewritten} arrived at {back.mx} for {back.rcpt_to} from"
        f" {back.mail_from!r}, not for {mail.sender}",
    )


# -- IN-6 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rude:
    """A dialogue that must be refused: its lines, the codes of the reply, and its words."""

    what: str
    lines: tuple[str, ...]
    codes: tuple[int, ...]
    words: str


ENDS = {
    "LF . LF": b"\n.\n",
    "LF . CRLF": b"\n.\r\n",
    "CRLF . LF": b"\r\n.\n",
    "CR . CR": b"\r.\r",
    "CRLF . CR": b"\r\n.\r",
    "CR . CRLF": b"\r.\r\n",
    "LF . CR": b"\n.\r",
    "CR . LF": b"\r.\n",
    "CRLF . CRCRLF": b"\r\n.\r\r\n",
    "CRCRLF . CRCRLF": b"\r\r\n.\r\r\n",
    "CRCRLF . LF": b"\r\r\n.\n",
    "CRLF NUL . CRLF": b"\r\n\0.\r\n",
    "CRLF . NUL CRLF": b"\r\n.\0\r\n",
}
"""What some server, somewhere, takes for the end of a message (CVE-2023-51764 and its kin)."""


@check("IN-6", quick=True)
def manners_are_asked_for(ctx: Context) -> str:
    """Bad HELO, short, unknown and pipelined recipients are refused; no message can be split."""
    known = existing(ctx)
    nowhere = f"someone@{token_hex(6)}.example"
    hello, mail = "EHLO client.probe.invalid", "MAIL FROM:<someone@sender.invalid>"
    rude = [
        Rude("no HELO", (mail,), (503,), "HELO"),
        Rude("HELO with a bad name", ("EHLO a..b", mail, f"RCPT TO:<{known}>"), (501,), "5.5.2"),
        Rude("HELO with a bad letter", ("EHLO a_b!c", mail, f"RCPT TO:<{known}>"), (501,), "5.5.2"),
        Rude("a recipient without a domain", (hello, mail, "RCPT TO:<someone>"), (504,), "5.5.2"),
        Rude("a short domain", (hello, mail, "RCPT TO:<someone@host>"), (504,), "5.5.2"),
        Rude("an unknown domain", (hello, mail, f"RCPT TO:<{nowhere}>"), (550,), "5.1.2"),
    ]
    members_doors = doors(ctx)

    def refused(case: tuple[Rude, Door]) -> None:
        one, door = case
        with door.session(ctx) as session:
            code, text = 0, ""
            for line in one.lines:
                code, text = session.raw(line.encode())
            expect(
                code in one.codes and one.words in text,
                f"{door}: {one.what} is answered with {code} {text}",
            )

    def pipelined(door: Door) -> None:
        """Who was not told that it may must wait for replies (RFC 2920)."""
        with door.session(ctx) as session:
            session.raw(b"HELO client.probe.invalid")
            session.send(f"{mail}\r\nRCPT TO:<{known}>\r\nDATA\r\n".encode())
            code, text = session.getreply()
            expect(
                code in (503, 554) and b"5.5.0" in text,
                f"{door}: commands sent without waiting are answered with {code} {text.decode()}",
            )

    each([(one, door) for one in rude for door in members_doors], refused, workers=16)
    each(members_doors, pipelined)
    ends = ctx.lab.sender("smuggler")
    pairs = [(what, next(d for d in remote_doors(ctx, ends) if d.member is m))
             for what in ENDS for m in members(ctx)]  # fmt: skip
    outer = each(pairs, lambda pair: _smuggle(ctx, ends, *pair), workers=12)
    _expect_not_split(ctx, [p for p in outer if p is not None])
    taken = sum(p is not None and p.accepted for p in outer)
    return (
        f"{', '.join(r.what for r in rude)} and pipelining refused on {len(members_doors)}"
        f" addresses; {len(ENDS)} false ends of a message on {len(members(ctx))} members split none"
        f" ({taken} arrived whole, {len(outer) - taken} were refused)"
    )


@dataclass(frozen=True)
class Smuggled:
    """A mail with a second one hidden in it, and whether the whole was accepted."""

    where: str
    outer: Letter
    hidden: Letter
    accepted: bool


def _smuggle(ctx: Context, sender: RemoteSender, what: str, door: Door) -> Smuggled:
    """Send a mail whose text goes on, after what is no end of it, as a second mail would."""
    recipient = existing(ctx)
    outer, hidden = write(sender, recipient), write(sender, recipient)
    inside = (
        f"MAIL FROM:<{hidden.sender}>\r\nRCPT TO:<{recipient}>\r\nDATA\r\n".encode()
        + hidden.content
    )
    where = f"{door}: {what}"
    with door.session(ctx) as session:
        session.ehlo()
        for line in (f"MAIL FROM:<{outer.sender}>", f"RCPT TO:<{recipient}>", "DATA"):
            code, text = session.raw(line.encode())
        expect(code == 354, f"{where}: DATA is answered with {code} {text}")
        session.send(outer.content.rstrip(b"\r\n") + ENDS[what] + inside + b"\r\n.\r\nQUIT\r\n")
        codes: list[int] = []
        while not codes or codes[-1] not in (221, 421):
            try:
                codes.append(session.getreply()[0])
            except OSError:  # closed
                break
    replies = [c for c in codes if c not in (221, 421)]
    expect(len(replies) <= 1, f"{where} splits the message: it is answered with {codes}")
    return Smuggled(where, outer, hidden, replies == [250])


def _expect_not_split(ctx: Context, sent: list[Smuggled]) -> None:
    """Each mail that was accepted arrives, once and with what was hidden in it."""

    def settled() -> None:
        for one in sent:
            copies = ctx.lab.world.copies(one.outer.token)
            expect(
                len(copies) == one.accepted,
                f"{one.where}: {len(copies)} mails arrived, {int(one.accepted)} was accepted",
            )
            alone = [c for c in ctx.lab.world.copies(one.hidden.token)
                     if one.outer.token.encode() not in c.raw]  # fmt: skip
            expect(not alone, f"{one.where}: the hidden mail arrived by itself")

    eventually(settled, seconds=PROMPT)


# -- IN-7 --------------------------------------------------------------------------------------


@check("IN-7", quick=True)
def clients_are_seen(ctx: Context) -> str:
    """The address that a mail came from is in its Received, and is what block lists are asked."""
    world = ctx.lab.world
    zones = [e.zone for e in ctx.platform.inbound.dnsbl if e.kind is DnsblKind.RBL_CLIENT]
    careful = ctx.lab.sender("careful")

    def look(door: Door) -> None:
        mail = write(careful, existing(ctx))
        with door.session(ctx) as session:
            _expect_taken(door, session, careful, mail, "a mailbox")
        source = door.client.source(door.address)
        assert source is not None
        topmost = _arrival(ctx, mail).header("Received")
        shown = f"[IPv6:{source}]" if source.version == 6 else f"[{source}]"
        seen = [r for r in topmost if f"from {careful.helo}" in r and shown in r]
        expect(
            len(seen) == 1,
            f"{door}: no Received names {careful.helo} and {shown}: {topmost[:2]}",
        )

    def asked(door: Door) -> None:
        """By a client that no resolver remembers."""
        source = _forget_client(ctx, door, zones)
        began = time.time()
        with door.session(ctx) as session:
            session.ehlo()
            code, text = session.envelope("someone@sender.invalid", existing(ctx))
            expect(code == 250, f"{door}: RCPT is answered with {code} {text}")
        for zone in dict.fromkeys(zones):
            questions = [q for q in world.list_questions(zone, source) if q.at >= began]
            expect(questions, f"{door}: {zone} was not asked for {source}")
            strangers = {q.peer for q in questions} - {str(a) for a in door.member.addresses}
            expect(
                not strangers,
                f"{door}: {zone} was asked for {source} by {', '.join(sorted(strangers))}",
            )

    found = remote_doors(ctx, careful)
    fresh = [replace(d, client=ctx.internet.client()) for d in doors(ctx)] if zones else []
    looks = [*(partial(look, door) for door in found), *(partial(asked, door) for door in fresh)]
    each(looks, lambda one: one(), workers=_workers(ctx))
    return (
        f"{len(found)} addresses: Received has the client's own address,"
        f" {', '.join(dict.fromkeys(zones)) or 'no list'} is asked for it by the member itself"
    )


__all__ = ["Door", "doors", "members", "remote_doors", "write"]
