"""SPAM: what the spam filter does with mail, whom it answers, and what happens without it."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from secrets import token_hex
from typing import TYPE_CHECKING

from mailsite.model import DELIMITER, Host, IPAddress, MailboxTarget, Role
from verify import imap, maildrop
from verify.client import Client, Observer
from verify.context import Context, each, eventually, expect
from verify.mailbox import MAILBOXES
from verify.redis import Redis, Refused
from verify.registry import Failed, Skipped, check
from verify.smtp import Letter, Session, letter
from verify.smtp_out import enter, member_door
from verify.spam_filter import GTUBE, filters, keys, redis, writer

if TYPE_CHECKING:
    from verify.lab import RemoteSender
    from verify.mail import Mail

SMTP = 25
PROMPT = 20.0
"""Seconds in which a mail that nothing holds up is where it belongs."""
PATIENCE = 5.0
"""Seconds that mail may wait for the filter, whoever of it is dead."""
GREYLISTED = 61
"""Seconds after which a client that was greylisted may come again."""
REPLACED = 10.0
"""Seconds in which another Redis takes over as the writer."""
REACH = 2.0
"""Seconds after which a packet filter has answered, if only by silence."""
DOUBTFUL = 6.0, 15.0
"""What :func:`doubtful` scores lies between: the default scores of Rspamd's own rules."""
MAIL_FLOW = ("smtp_in", "smtp_out", "maildrop", "nginx_streams")
"""Tiers that mail passes, and by which its arrival is seen."""
RELAY = "inet:127.0.0.1:11332"
"""The filter as Postfix knows it on each host that takes mail."""


def mx_members(ctx: Context) -> tuple[Host, ...]:
    return ctx.platform.members(Role.SMTP_IN)


# -- Mail ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Door:
    """An address of the MX, and the remote sender that comes to it."""

    member: Host
    address: IPAddress
    sender: RemoteSender

    def session(self, ctx: Context, timeout: float = 30.0) -> Session:
        return Session(
            self.sender.client,
            self.address,
            SMTP,
            say=ctx.say,
            helo=self.sender.helo,
            timeout=timeout,
        )

    def __str__(self) -> str:
        return f"{self.member.name} [{self.address}] from {self.sender.helo}"


def doors(ctx: Context, sender: RemoteSender) -> list[Door]:
    """Every public address of every MX member."""
    return [Door(m, a, sender) for m in mx_members(ctx) for a in ctx.public(m)]


def first_doors(ctx: Context, sender: RemoteSender) -> list[Door]:
    """One address of every MX member, of both families in turn."""
    members = mx_members(ctx)
    return [Door(m, ctx.public(m)[n % 2], sender) for n, m in enumerate(members)]


def mailbox(ctx: Context) -> tuple[str, str]:
    """An address of the site whose mail goes to one mailbox, and the mailbox's own address.

    Both have ``{token}`` in them, as an extension (``user+token``).
    """
    for domain in ctx.platform.domains.values():
        for local, targets in domain.addresses.items() if domain.receives else ():
            match targets:
                case [MailboxTarget() as target] if local.isalnum():
                    extension = f"{DELIMITER}{{token}}"
                    there = f"{target}{extension}@{ctx.platform.maildrop_domain}"
                    return f"{local}{extension}@{domain.name}", there
    raise Skipped("no address of the site data leads to one mailbox alone")


def clean(ctx: Context, sender: RemoteSender) -> Letter:
    """A mail that nobody takes for spam, signed where the sender signs."""
    mail = letter(f"{{token}}@{sender.domain}", mailbox(ctx)[0])
    return replace(mail, content=sender.sign(mail.content))


def spam(ctx: Context, sender: RemoteSender) -> Letter:
    """A mail that the filter must refuse."""
    mail = letter(f"{{token}}@{sender.domain}", mailbox(ctx)[0])
    return replace(mail, content=mail.content + f"{GTUBE}\r\n".encode())


def doubtful(ctx: Context, sender: RemoteSender) -> Letter:
    """A mail that is neither: it says neither what it is called nor to whom it goes, and comes
    from next year. Rspamd's rules MISSING_MID, MISSING_TO and DATE_IN_FUTURE.

    Raises:
        Skipped: With the scores of the site data it is no doubtful mail.
    """
    scores, (low, high) = ctx.platform.spam.scores, DOUBTFUL
    if scores.add_header > low or scores.reject < high:
        raise Skipped(
            f"the check's doubtful mail scores between {low:g} and {high:g}, and the site data"
            f" tags from {scores.add_header:g} to {scores.reject:g}"
        )
    mail = letter(f"{{token}}@{sender.domain}", mailbox(ctx)[0])
    later = format_datetime(datetime.now(UTC) + timedelta(days=365))
    headers, _, body = mail.content.partition(b"\r\n\r\n")
    kept = [h for h in headers.split(b"\r\n") if not re.match(rb"(?i)(message-id|to|date):", h)]
    content = b"\r\n".join([*kept, f"Date: {later}".encode(), b"", body])
    return replace(mail, content=content)


def delivered(ctx: Context, mail: Letter) -> Mail:
    """The mail as it reached its mailbox."""
    there = mailbox(ctx)[1].replace("{token}", mail.token)
    return ctx.lab.world.arrival(MAILBOXES, there, PROMPT)


def offer(ctx: Context, door: Door, mail: Letter) -> tuple[int, str]:
    """Offer a mail to the MX. Returns the reply to the whole message.

    Raises:
        Failed: It is refused before the message was sent.
    """
    with door.session(ctx) as session:
        session.ehlo()
        code, text = session.envelope(mail.sender, mail.recipient)
        expect(code == 250, f"{door}: mail to {mail.recipient} is answered with {code} {text}")
        session.rset()
        return session.submit(mail.sender, [mail.recipient], mail.content)


def take(ctx: Context, door: Door, mail: Letter) -> None:
    code, text = offer(ctx, door, mail)
    expect(code == 250, f"{door}: a mail is answered with {code} {text}")


# -- The filter's memory ------------------------------------------------------------------------


GREYLIST_KEYS = "rg[bm]*"
FIRST_TRIES = threading.Lock()
"""Held from :func:`remembered` to :func:`let_it_be_later`, which moves everybody's new ones."""


def let_it_be_later(ctx: Context, known: set[str]) -> None:
    """Let all first attempts that are not in ``known`` lie :data:`GREYLISTED` seconds back.

    Greylisting keeps the time of a first attempt. Moved back, it is what it would be if the
    client had waited, and the check need not.
    """
    with redis(ctx, writer(ctx)) as memory:
        for key in keys(memory, GREYLIST_KEYS, "string") - known:
            first = memory.text("GET", key)
            if first.isdigit():
                memory.call("SET", key, int(first) - GREYLISTED, "KEEPTTL")
        # The filter reads its own site's copy.
        memory.call("WAIT", len(filters(ctx)) - 1, 1000)


def remembered(ctx: Context) -> set[str]:
    """The first attempts that the filter remembers."""
    with redis(ctx, writer(ctx)) as memory:
        return keys(memory, GREYLIST_KEYS, "string")


# -- Checks -------------------------------------------------------------------------------------


@check("SPAM-1", quick=True)
def verdicts_are_carried_out(ctx: Context) -> str:
    """GTUBE is refused after DATA; doubtful mail has X-Spam, clean mail not; results are told."""
    lab = ctx.lab
    bare = lab.sender("bare")

    def refused(door: Door) -> None:
        code, text = offer(ctx, door, spam(ctx, bare))
        expect(500 <= code < 600, f"{door}: GTUBE is answered with {code} {text}")

    def told(wanted: dict[str, str], name: str) -> str:
        sender = lab.sender(name)
        mail = clean(ctx, sender)
        mail = replace(mail, content=sender.seal(mail.content))
        forged = f"Authentication-Results: {ctx.platform.names.smtp_in}; dkim=pass (forged)\r\n"
        mail = replace(mail, content=forged.encode() + mail.content)
        take(ctx, first_doors(ctx, sender)[0], mail)
        arrived = delivered(ctx, mail)
        expect(not arrived.header("X-Spam"), f"clean mail of {name} arrived with X-Spam")
        return _expect_results(ctx, arrived, wanted, f"mail of {name}")

    def tagged(sender: RemoteSender) -> None:
        mail = doubtful(ctx, sender)
        mail = replace(mail, content=b"X-Spam: No\r\n" + mail.content)
        door = first_doors(ctx, sender)[-1]
        with FIRST_TRIES:
            known = remembered(ctx)
            code, text = offer(ctx, door, mail)
            if ctx.platform.spam.greylist and 400 <= code < 500:
                let_it_be_later(ctx, known)
                code, text = offer(ctx, door, mail)
        expect(code == 250, f"{door}: doubtful mail is answered with {code} {text}")
        found = delivered(ctx, mail).header("X-Spam")
        expect(found == ["Yes"], f"doubtful mail arrived with {len(found)} headers X-Spam: {found}")

    spf = {"spf": "pass", "dkim": "none"}
    dkim = {"spf": "none", "dkim": "pass", "dmarc": "pass", "arc": "pass"}
    steps: list[Callable[[], object]] = [
        *(lambda d=door: refused(d) for door in doors(ctx, bare)),
        lambda: told(spf, "careful"),
        lambda: told(dkim, "signer"),
        lambda: tagged(bare),
    ]
    each(steps, lambda step: step())
    return (
        f"GTUBE refused on {len(doors(ctx, bare))} addresses; doubtful mail arrives with X-Spam,"
        " clean mail without; SPF, DKIM, DMARC and ARC results told, forged ones removed"
    )


def _expect_results(ctx: Context, arrived: Mail, wanted: dict[str, str], what: str) -> str:
    """One Authentication-Results of our own (RFC 8601), with the results that are ``wanted``."""
    names = {ctx.platform.names.smtp_in, *(m.name for m in mx_members(ctx))}
    headers = [" ".join(h.split()) for h in arrived.header("Authentication-Results")]
    found = [h for h in headers if h.partition(";")[0].strip() in names]
    expect(
        len(found) == 1,
        f"{what} arrived with {len(found)} headers Authentication-Results of ours: {headers}",
    )
    results = found[0].partition(";")[2]
    told = dict(re.findall(r"(?:^|;)\s*(\w+)=(\w+)", results))
    wrong = [f"{k}={told.get(k, 'missing')}" for k, v in wanted.items() if told.get(k) != v]
    expect(not wrong, f"{what}: {', '.join(wrong)}, wanted {wanted}; it says: {found[0]}")
    return found[0]


@check("SPAM-2", quick=True)
def doubtful_mail_comes_twice(ctx: Context) -> str:
    """Greylisting: the first try on one member gets a 4xx, the retry on another passes."""
    if not ctx.platform.spam.greylist:
        raise Skipped("the site data turns greylisting off")
    sender = ctx.lab.sender("careful")
    first, *others = first_doors(ctx, sender)
    expect(others, "greylisting across members needs two of them")
    observed = []
    for other in others:
        mail = doubtful(ctx, sender)
        with FIRST_TRIES:
            known = remembered(ctx)
            code, text = offer(ctx, first, mail)
            expect(400 <= code < 500, f"{first}: a first try is answered with {code} {text}")
            # On the same member: another would remember this one, and need not know of the first.
            code, text = offer(ctx, first, mail)
            expect(400 <= code < 500, f"{first}: a retry at once is answered with {code} {text}")
            let_it_be_later(ctx, known)
            code, text = offer(ctx, other, mail)
        expect(code == 250, f"{other}: the retry after the wait is answered with {code} {text}")
        delivered(ctx, mail)
        observed.append(other.member.name)
    return (
        f"first try on {first.member.name} deferred; retries after a minute pass on"
        f" {' and '.join(observed)}"
    )


# -- SPAM-3 -------------------------------------------------------------------------------------


@check("SPAM-3", disruptive=True, disturbs=("rspamd",), needs=MAIL_FLOW)
def mail_does_not_wait_for_the_dead(ctx: Context) -> str:
    """With a member of the filter dead no mail waits, with all of them it is taken unseen."""
    lab = ctx.lab
    members = filters(ctx)
    slowest: dict[str, float] = {}

    def timed(what: str, expect_seen: bool) -> None:
        """Mail through every member, in and out, and GTUBE to see that somebody looks at it."""
        slowest[what] = max(slowest.get(what, 0.0), *_passages(ctx, what))
        for door in first_doors(ctx, lab.sender("bare")) if expect_seen else ():
            code, text = offer(ctx, door, spam(ctx, lab.sender("bare")))
            expect(500 <= code < 600, f"{door}, {what}: GTUBE is answered with {code} {text}")

    with _all_stopped(ctx):
        timed("all of them dead", False)
        for host in (*mx_members(ctx), *ctx.members):
            words = f"milter {RELAY}"
            expect(
                lab.machine(host).logged("postfix", "warning", words),
                f"{host.name}: with all members dead, no warning about {words} shows",
            )
    one = lab.machine(members[0])
    one.run("systemctl", "kill", "--signal=STOP", "--kill-whom=all", "rspamd.service")
    try:
        timed("one that hangs", False)
    finally:
        one.run("systemctl", "kill", "--signal=CONT", "--kill-whom=all", "rspamd.service")
    for member in members:
        machine = lab.machine(member)
        machine.kill()
        try:
            timed("one without power", True)
        finally:
            machine.start()
            _serving(ctx, member)
    _seen_again(ctx)
    times = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in slowest.items())
    return f"slowest mail with members of the filter dead: {times}; warned of, and looked at again"


def _passages(ctx: Context, what: str) -> list[float]:
    """Send mail through every MX and smtp-out member. Returns how long each session took."""
    lab = ctx.lab
    careful = lab.sender("careful")

    def come_in(door: Door) -> float:
        mail = clean(ctx, careful)
        began = time.monotonic()  # Postfix asks the filter before it greets
        with door.session(ctx) as session:
            session.ehlo()
            took = time.monotonic() - began
            # The first RCPT waits for block lists, and that is not the filter's doing.
            session.envelope(mail.sender, mail.recipient)
            session.rset()
            began = time.monotonic()
            code, text = session.submit(mail.sender, [mail.recipient], mail.content)
            took += time.monotonic() - began
        expect(code == 250, f"{door}, {what}: a mail is answered with {code} {text}")
        expect(took <= PATIENCE, f"{door}, {what}: a mail waited {took:.1f} s")
        delivered(ctx, mail)
        return took

    def go_out(member: Host) -> float:
        domain = ctx.sending_domains[0]
        mail = letter(f"{{token}}@{domain}", f"{{token}}@{lab.world.domain('generic')}")
        door = member_door(ctx, member)
        began = time.monotonic()
        with enter(ctx, door) as session:
            code, text = session.submit(mail.sender, [mail.recipient], mail.content)
            took = time.monotonic() - began
        expect(code == 250, f"{member.name}, {what}: a mail is answered with {code} {text}")
        expect(took <= PATIENCE, f"{member.name}, {what}: a mail waited {took:.1f} s")
        lab.world.arrival("generic", mail.recipient, 60.0, poke=lab.machine(member).hurry)
        return took

    ways: list[Callable[[], float]] = [
        *(lambda d=door: come_in(d) for door in first_doors(ctx, careful)),
        *(lambda m=member: go_out(m) for member in ctx.members),
    ]
    return each(ways, lambda way: way())


@contextmanager
def _all_stopped(ctx: Context) -> Iterator[None]:
    machines = [ctx.lab.machine(m) for m in filters(ctx)]
    each(machines, lambda m: m.run("systemctl", "stop", "rspamd.service"))
    try:
        yield
    finally:
        each(machines, lambda m: m.run("systemctl", "start", "rspamd.service"))
        # Whatever comes next, also after a failure, begins with mail that somebody looks at: the
        # way to the filter is not tried again for seconds after all its ends were dead.
        each(filters(ctx), lambda member: _serving(ctx, member))
        _seen_again(ctx)


def _serving(ctx: Context, member: Host) -> None:
    """Wait for a member's filter to answer."""
    port = ctx.platform.spam.milter_port
    client = ctx.lab.machine(ctx.members[0]).observer.client()

    def look() -> None:
        client.connect(ctx.internal(member)[0], port, timeout=REACH).close()

    eventually(look, seconds=60, every=0.3, what=f"{member.name} to be back")


def _seen_again(ctx: Context) -> None:
    """Wait for mail to be looked at again on every MX member."""
    bare = ctx.lab.sender("bare")

    def look(door: Door) -> None:
        code, text = offer(ctx, door, spam(ctx, bare))
        expect(500 <= code < 600, f"{door}: GTUBE is answered with {code} {text}")

    each(
        first_doors(ctx, bare),
        lambda door: eventually(lambda: look(door), seconds=30, every=1.0, what="the filter"),
    )


# -- SPAM-5 -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Service:
    """A port of the filter's hosts, and the roles whose hosts may reach it."""

    name: str
    port: int
    roles: tuple[Role, ...]


def services(ctx: Context) -> tuple[Service, ...]:
    spam_filter = ctx.platform.spam
    return (
        Service("redis", spam_filter.redis_port, (Role.RSPAMD,)),
        Service("sentinel", spam_filter.sentinel_port, (Role.RSPAMD,)),
        Service("controller", spam_filter.controller_port, (Role.MAILDROP,)),
        Service("milter", spam_filter.milter_port, (Role.SMTP_IN, Role.SMTP_OUT)),
    )


@check("SPAM-5", quick=True)
def memory_and_controller_are_closed(ctx: Context) -> str:
    """Redis, Sentinel and the controller answer those alone that need them, with a password."""
    lab = ctx.lab
    strangers = [o for o in (ctx.internet, ctx.office, ctx.local) if o]
    places: list[tuple[Observer, Host | None]] = [(o, None) for o in strangers]
    places += [(machine.observer, machine.host) for machine in lab.machines]
    # One client for each place: nobody counts these connections, and addresses are few.
    clients = [(place.client(), host) for place, host in places]

    def look(case: tuple[Client, Host | None, Host, Service, IPAddress]) -> bool:
        client, host, member, service, address = case
        allowed = host is not None and bool({*host.roles} & {*service.roles})
        where = f"{service.name} of {member.name} [{address}] from {client.place}"
        try:
            client.connect(address, service.port, timeout=REACH).close()
        except OSError as error:
            expect(not allowed, f"{where} does not answer: {error}")
            return False
        expect(allowed, f"{where} answers")
        return True

    cases = [
        (client, host, member, service, address)
        for client, host in clients
        for member in filters(ctx)
        if host is None or host.name != member.name
        for service in services(ctx)
        for address in ctx.internal(member)
    ]
    reached = each(cases, look, workers=len(cases))  # each waits for its own silence
    each(filters(ctx), lambda member: _expect_passwords(ctx, member))
    return (
        f"{len(cases)} ways from {len(places)} places: {sum(reached)} answer, as the roles say;"
        " without a password and with a wrong one nobody gets in"
    )


def _expect_passwords(ctx: Context, member: Host) -> None:
    """A member's own machine is the nearest that one can come: it needs the password too."""
    here = ctx.lab.machine(member).observer.client()
    spam_filter = ctx.platform.spam
    for name, port in (("redis", spam_filter.redis_port), ("sentinel", spam_filter.sentinel_port)):
        for password in ("", "wrong-password"):
            try:
                with Redis(here, ctx.internal(member)[0], port, password) as connection:
                    connection.call("PING")
            except Refused as refused:
                expect(
                    str(refused).startswith(("NOAUTH", "WRONGPASS")),
                    f"{name} of {member.name} refuses for another reason: {refused}",
                )
                continue
            raise Failed(f"{name} of {member.name} answers with {password or 'no password'}")
    with redis(ctx, member) as connection:
        expect(connection.text("PING") == "PONG", f"{member.name}: redis takes no password")
    for password in ("", "wrong-password"):
        status = _controller(here, spam_filter.controller_port, password)
        expect(
            status in (401, 403),
            f"controller of {member.name} answers {status} with {password or 'no password'}",
        )


def _controller(client: Client, port: int, password: str) -> int:
    """Ask the controller for its statistics. Returns the HTTP status."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.sock = client.connect("127.0.0.1", port)
    try:
        headers = {"Password": password} if password else {}
        connection.request("GET", "/stat", headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


# -- SPAM-6 -------------------------------------------------------------------------------------

COUNTER = "verify:acknowledged"


# Its seconds are counted: no other machine may boot meanwhile.
@check(
    "SPAM-6",
    disruptive=True,
    disturbs=("rspamd",),
    needs=(*MAIL_FLOW, "replication", "webmail"),
)
def memory_survives_its_writer(ctx: Context) -> str:
    """The Redis writer killed, its plug pulled, cut off: replaced, with all that it had."""
    observed = []
    ways: tuple[tuple[str, Callable[[Context, Host], Callable[[], None]]], ...] = (
        ("killed", _kill_redis),
        ("without power", _pull_the_plug),
    )
    for what, strike in ways:
        # One that has just come back is told within seconds that another one writes now.
        old = eventually(lambda: writer(ctx), seconds=30)
        others = tuple(m for m in filters(ctx) if m is not old)
        sender = ctx.lab.sender("careful")
        first, *rest = first_doors(ctx, sender)
        mail, known = doubtful(ctx, sender), remembered(ctx)
        if ctx.platform.spam.greylist:
            code, text = offer(ctx, first, mail)
            expect(400 <= code < 500, f"{first}: a first try is answered with {code} {text}")
            let_it_be_later(ctx, known)
        with _Counter(ctx, old, others[0]) as counter:
            began = time.monotonic()
            restore = strike(ctx, old)
            try:
                new = eventually(
                    partial(writer, ctx, others),
                    seconds=REPLACED,
                    every=0.2,
                    what=f"another writer than {old.name}, which is {what}",
                )
                seconds = time.monotonic() - began
                counter.finish()
                expect(seconds < REPLACED, f"{old.name} {what}: replaced after {seconds:.1f} s")
                _expect_kept(ctx, new, counter.acknowledged, f"{old.name} {what}")
                slowest = max(_passages(ctx, f"{old.name} {what}"))
                if ctx.platform.spam.greylist:
                    door = rest[0] if rest else first
                    code, text = offer(ctx, door, mail)
                    expect(
                        code == 250,
                        f"{door}: what {old.name} knew of a first try is lost: {code} {text}",
                    )
            finally:
                restore()
        _returned(ctx, old)
        _expect_kept(ctx, writer(ctx), counter.acknowledged, f"{old.name} is back")
        observed.append(
            f"{old.name} {what}: {new.name} writes after {seconds:.1f} s with all"
            f" {counter.acknowledged} acknowledged, mail taken within {slowest:.1f} s"
        )
    with redis(ctx, writer(ctx)) as memory:
        memory.call("DEL", COUNTER)
    return "; ".join(observed)


def _kill_redis(ctx: Context, member: Host) -> Callable[[], None]:
    """Kill the process, and let systemd not start another."""
    machine, unit = ctx.lab.machine(member), "redis-server.service"
    machine.run("systemctl", "mask", "--runtime", unit)
    machine.run("systemctl", "kill", "--signal=KILL", "--kill-whom=all", unit)

    def restore() -> None:
        machine.run("systemctl", "unmask", "--runtime", unit)
        machine.run("systemctl", "reset-failed", unit, check=False)
        machine.run("systemctl", "start", unit)

    return restore


def _pull_the_plug(ctx: Context, member: Host) -> Callable[[], None]:
    machine = ctx.lab.machine(member)
    machine.kill()

    def restore() -> None:
        machine.start()
        _serving(ctx, member)

    return restore


class _Counter:
    """A client of the writer that counts as fast as it is answered, until it is no more."""

    def __init__(self, ctx: Context, member: Host, seen_from: Host) -> None:
        self.acknowledged = 0
        self._stopping = threading.Event()
        self._counting = threading.Event()
        self._connection = redis(ctx, member, seen_from=seen_from)
        self._connection.call("DEL", COUNTER)
        self._thread = threading.Thread(target=self._count)

    def _count(self) -> None:
        with suppress(OSError, Refused):
            while not self._stopping.is_set():
                answer = self._connection.call("INCR", COUNTER)
                assert isinstance(answer, int)
                self.acknowledged = answer
                self._counting.set()

    def finish(self) -> None:
        """Wait until it has noticed that nobody answers any more."""
        self._thread.join()

    def __enter__(self) -> _Counter:
        self._thread.start()
        expect(self._counting.wait(REACH), "the writer acknowledges nothing")
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._connection.close()


def _expect_kept(ctx: Context, member: Host, acknowledged: int, what: str) -> None:
    with redis(ctx, member) as memory:
        kept = int(memory.text("GET", COUNTER) or 0)
    expect(kept >= acknowledged, f"{what}: {acknowledged - kept} of {acknowledged} writes are lost")


def _returned(ctx: Context, member: Host) -> None:
    """Wait for a former writer to follow the new one."""

    def look() -> None:
        with redis(ctx, member) as connection:
            role = connection.texts("ROLE")
            expect(
                role[:1] == ["slave"] and role[3:4] == ["connected"],
                f"{member.name} is {' '.join(role[:4])}",
            )

    eventually(look, seconds=60, every=0.3, what=f"{member.name} to follow the new writer")


# -- SPAM-4 -------------------------------------------------------------------------------------

LEARNED = 30.0
"""Seconds in which a message that was moved is learned, and known to all members."""


@check("SPAM-4", quick=True)
def moves_are_learned(ctx: Context) -> str:
    """A message moved into Junk is learned as spam once, out of it as ham; all members know."""
    owner = maildrop.owners(ctx)[0]
    mail = maildrop.mail_for(ctx, owner)
    words = " ".join(token_hex(4) for _ in range(60))  # too few would teach nothing
    mail = replace(mail, content=mail.content + f"{words}\r\n".encode())
    maildrop.hand_over(ctx, maildrop.replicas(ctx)[0], mail)
    before = _learned_everywhere(ctx)

    def counted(spam: int, ham: int) -> None:
        found = {m.name: _learned(ctx, m) for m in filters(ctx)}
        wanted = (before[0] + spam, before[1] + ham)
        wrong = [f"{name}: {got}" for name, got in found.items() if got != wanted]
        expect(not wrong, f"learned spam and ham are {'; '.join(wrong)}, not {wanted}")

    with maildrop.frontend_doors(ctx)[0].enter(ctx, owner) as session:
        _move(session, mail, "INBOX", "Junk")
        eventually(lambda: counted(1, 0), seconds=LEARNED, what="a message moved into Junk")
        # The move reaches the other replica, which must not learn it again.
        for replica in maildrop.replicas(ctx):
            with maildrop.direct(ctx, replica).enter(ctx, owner) as other:
                eventually(lambda s=other: _number(s, mail, "Junk"), seconds=LEARNED)  # type: ignore[misc]
        counted(1, 0)
        _move(session, mail, "Junk", "INBOX")
        # What was learned as spam and is none is taken back.
        eventually(lambda: counted(0, 1), seconds=LEARNED, what="a message moved out of Junk")
    return (
        f"a message of {owner.user} moved into Junk is learned as spam once, moved out as ham;"
        f" {', '.join(m.name for m in filters(ctx))} know it"
    )


def _move(session: imap.Session, mail: Letter, source: str, target: str) -> None:
    number = eventually(lambda: _number(session, mail, source), seconds=PROMPT)
    session.look_into(source, readonly=False)
    session.told("MOVE", session.xatom("MOVE", number, target))
    session.unselect()


def _number(session: imap.Session, mail: Letter, folder: str) -> str:
    session.look_into(folder)
    found = session.told("SEARCH", session.search(None, "HEADER", "X-Probe", mail.token))
    session.unselect()
    numbers = (found[0] or b"").split()
    expect(len(numbers) == 1, f"{len(numbers)} copies of a mail are in {folder}, not 1")
    return str(numbers[0].decode())


def _learned(ctx: Context, member: Host) -> tuple[int, int]:
    """How much spam and ham was learned, as a member's own copy of the memory says."""
    with redis(ctx, member) as memory:
        prefixes = {*memory.texts("SMEMBERS", "BAYES_SPAM_keys")}
        prefixes |= {*memory.texts("SMEMBERS", "BAYES_HAM_keys")}
        spam, ham = (
            sum(int(memory.text("HGET", prefix, what) or 0) for prefix in prefixes)
            for what in ("learns_spam", "learns_ham")
        )
    return spam, ham


def _learned_everywhere(ctx: Context) -> tuple[int, int]:
    """The same, once all members agree."""

    def look() -> tuple[int, int]:
        found = {_learned(ctx, member) for member in filters(ctx)}
        expect(len(found) == 1, f"the members know different numbers: {sorted(found)}")
        return found.pop()

    return eventually(look, seconds=LEARNED)
