"""EDGE: what clients see of the frontends in front of submission and the mailboxes."""

from __future__ import annotations

import http.client
import re
import smtplib
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, ip_address
from socket import AF_INET, AF_INET6, SOCK_DGRAM

from mailsite.bundle import compose
from mailsite.model import Host, IPAddress, Platform
from mailsite.roles.dovecot import PROXIED_IMAPS, PROXIED_MANAGESIEVE
from verify import imap, maildrop, managesieve
from verify.client import Observer
from verify.context import SUBMISSION, SUBMISSION_PROXY, Context, each, eventually, expect
from verify.registry import Failed, check
from verify.smtp import Refused, Session, letter
from verify.smtp_out import Door, enter, frontend_doors, submit

PATIENCE = 3.0
"""Seconds within which a login must be through (contract, EDGE-1)."""


@check(
    "EDGE-1",
    disruptive=True,
    disturbs=("smtp_out", "maildrop", "replication"),
    needs=("nginx_streams",),
)
def backups_take_over(ctx: Context) -> str:
    """With a primary dead logins go to a backup within 3 s, and back when it returns."""
    told = _submission_taken_over(ctx)
    return f"{told}; {_mailboxes_taken_over(ctx)}" if ctx.platform.replicas else told


def _submission_taken_over(ctx: Context) -> str:
    machine = ctx.lab.machine(ctx.platform.hosts[ctx.platform.outbound.primary])
    eventually(
        lambda: _all_reach(ctx, machine.name), seconds=30, every=1.0, what="the primary, alive"
    )
    slowest, reached, retries = 0.0, set[str](), 0
    machine.kill()
    try:
        for _ in range(2):
            logins = each(frontend_doors(ctx), lambda door: _login_or_retry(ctx, door))
            slowest = max(slowest, *(seconds for _, seconds, _ in logins))
            reached |= {member for member, _, _ in logins}
            retries += sum(retried for _, _, retried in logins)
        expect(machine.name not in reached, f"{machine.name} answers though it is dead")
    finally:
        machine.start()
    returned = time.monotonic()
    back = eventually(
        lambda: _all_reach(ctx, machine.name), seconds=60, every=1.0, what="the primary to return"
    )
    return (
        f"{machine.name} dead: {2 * len(ctx.doors)} logins through {len(ctx.frontends)} frontends "
        f"reached {', '.join(sorted(reached))}, slowest {slowest:.1f} s, {retries} of them on the "
        f"retry; back on the primary {back - returned:.0f} s after it started"
    )


def _mailboxes_taken_over(ctx: Context) -> str:
    """The same for 993 and 4190: the primary replica dies."""
    first, second = maildrop.replicas(ctx)
    machine = ctx.lab.machine(first)
    eventually(
        partial(_all_open, ctx, first), seconds=30, every=1.0, what="the primary replica, alive"
    )
    machine.kill()
    try:
        opened = each(_mailbox_doors(ctx), lambda door: _open_or_retry(ctx, door))
        opened += each(_mailbox_doors(ctx), lambda door: _open_or_retry(ctx, door))
        eventually(partial(_all_open, ctx, second), seconds=PATIENCE * 10, every=1.0)
    finally:
        machine.start()
    returned = time.monotonic()
    eventually(
        partial(_all_open, ctx, first), seconds=60, every=1.0, what="the primary replica to return"
    )
    back = time.monotonic() - returned
    slowest, retries = max(s for s, _ in opened), sum(retried for _, retried in opened)
    return (
        f"{first.name} dead: {len(opened)} logins on {imap.IMAPS} and {managesieve.MANAGESIEVE}"
        f" reached {second.name}, slowest {slowest:.1f} s, {retries} of them on the retry; back on"
        f" the primary {back:.0f} s after it started"
    )


@dataclass(frozen=True)
class _MailboxDoor:
    """A way to the mailboxes through a frontend, by IMAP or by ManageSieve."""

    door: maildrop.Door
    port: int

    def login(self, ctx: Context) -> None:
        """Log in and out. Raises OSError or :class:`Failed`."""
        owner = maildrop.owners(ctx)[0]
        if self.port == imap.IMAPS:
            try:
                with self.door.enter(ctx, owner):
                    return
            except imap.Error as error:
                raise Failed(f"{self}: {error}") from error
        with self.door.filters(ctx, owner):
            return

    def __str__(self) -> str:
        return f"{self.door}, port {self.port}"


def _mailbox_doors(ctx: Context) -> list[_MailboxDoor]:
    """Every frontend address by IMAP, and from where it is allowed by ManageSieve."""
    return [
        *(_MailboxDoor(d, imap.IMAPS) for d in maildrop.frontend_doors(ctx)),
        *(
            _MailboxDoor(d, managesieve.MANAGESIEVE)
            for d in maildrop.frontend_doors(ctx, maildrop.editor(ctx))
        ),
    ]


def _open_or_retry(ctx: Context, door: _MailboxDoor) -> tuple[float, bool]:
    """A client's login: it tries once more. Returns the slower try's seconds, and whether."""
    slower, failures = 0.0, []
    for retried in (False, True):
        started = time.monotonic()
        try:
            door.login(ctx)
        except (OSError, Failed) as error:
            failures.append(str(error))
        slower = max(slower, time.monotonic() - started)
        expect(slower <= PATIENCE, f"{door}: a login took {slower:.1f} s: {failures}")
        if len(failures) <= retried:
            return slower, retried
    raise Failed(f"{door}: two logins in a row failed: {'; '.join(failures)}")


def _all_open(ctx: Context, replica: Host) -> None:
    """Each login is one of ``replica``'s, whose log shows the client's own address."""
    doors = _mailbox_doors(ctx)
    began = time.time()
    each(doors, lambda door: door.login(ctx))

    def shows(host: Host, address: IPAddress) -> bool:
        login = rf"Logged in: user=.* rip={re.escape(str(address))},"
        return bool(ctx.lab.machine(host).journal(began, login))

    def logged(door: _MailboxDoor) -> None:
        address = door.door.client.source(door.door.address)
        assert address is not None  # the login was through a door of its family
        if not shows(replica, address):
            others = [h.name for h in maildrop.replicas(ctx) if h != replica and shows(h, address)]
            raise Failed(
                f"{door}: of {address} Dovecot's journal on {replica.name} shows no login,"
                f" that on {' and '.join(others) or 'no replica'} does"
            )

    each(doors, lambda door: eventually(partial(logged, door), seconds=5))


def _login(ctx: Context, door: Door) -> tuple[str, float]:
    """Log in through ``door``. Returns the member that answered, and the seconds it took."""
    started = time.monotonic()
    with enter(ctx, door) as session:
        return session.banner.inner, time.monotonic() - started


def _login_or_retry(ctx: Context, door: Door) -> tuple[str, float, bool]:
    """A client's login: it tries once more. Each try must be over within the patience.

    Returns:
        The member that answered, seconds of the slower try, and whether the retry was needed.
    """
    started = time.monotonic()
    try:
        member, seconds = _login(ctx, door)
        retried = False
    except (OSError, smtplib.SMTPException, Failed) as first:
        wasted = time.monotonic() - started
        expect(wasted <= PATIENCE, f"{door}: a login failed only after {wasted:.1f} s: {first}")
        try:
            member, seconds = _login(ctx, door)
        except (OSError, smtplib.SMTPException, Failed) as second:
            raise Failed(f"{door}: two logins in a row failed: {first}; {second}") from second
        seconds, retried = max(seconds, wasted), True
    expect(seconds <= PATIENCE, f"{door}: a login took {seconds:.1f} s")
    return member, seconds, retried


def _all_reach(ctx: Context, member: str) -> float:
    reached = set(each(frontend_doors(ctx), lambda door: _login(ctx, door)[0]))
    expect(reached == {member}, f"logins reach {', '.join(sorted(reached))}")
    return time.monotonic()


@check("EDGE-2", quick=True, long=True)
def clients_are_known(ctx: Context) -> str:
    """The real client address reaches logs and mail; nobody else may claim one."""
    lab = ctx.lab
    domain = ctx.sending_domains[0]
    strangers: list[Observer] = [
        *(o for o in (ctx.internet, ctx.office, ctx.local) if o is not None),
        *(lab.machine(m).observer for m in ctx.members),
    ]
    known = [partial(_is_known, ctx, door, domain) for door in frontend_doors(ctx)]
    claims = [
        partial(_cannot_claim, ctx, Door(client, m.name, address, m))
        for observer in strangers
        for client in (observer.client(),)
        for m in ctx.members
        for address in ctx.internal(m)
        if observer.place != m.name
    ]
    smuggled = [partial(_cannot_smuggle, ctx, door) for door in frontend_doors(ctx)]
    relays = [
        partial(_is_no_relay, ctx, Door(client, m.name, address, m), port)
        for f in ctx.frontends
        for client in (lab.machine(f).observer.client(),)
        for m in ctx.members
        for address in ctx.internal(m)
        for port in (SUBMISSION, SUBMISSION_PROXY)
    ]
    forged = [*_forgeries(ctx, strangers)] if ctx.platform.replicas else []
    if ctx.platform.replicas:
        _all_open(ctx, maildrop.replicas(ctx)[0])
    looks: list[Callable[[], None]] = [*known, *claims, *smuggled, *relays, *forged]
    # Most of them wait for an answer that must not come.
    each(looks, lambda look: look(), workers=len(looks))
    return (
        f"client addresses in Postfix's and Dovecot's logs and in Received on {len(known)} ways; "
        f"PROXY headers refused on {len(claims)} ways from elsewhere and {len(smuggled)} through "
        f"frontends, and for the mailboxes on {len(forged)}; the "
        f"{len(ctx.frontends)} frontends may not relay"
    )


def _forgeries(ctx: Context, strangers: list[Observer]) -> Iterator[Callable[[], None]]:
    """Each way to the mailboxes on which somebody claims another address."""
    ports = (imap.IMAPS, PROXIED_IMAPS, managesieve.MANAGESIEVE, PROXIED_MANAGESIEVE)
    for observer in strangers:
        client = observer.client()
        for replica in maildrop.replicas(ctx):
            for address in ctx.internal(replica):
                door = maildrop.Door(client, replica.name, address, replica)
                yield from (partial(_is_not_believed, ctx, door, port) for port in ports)
    for door in maildrop.frontend_doors(ctx):
        yield partial(_is_not_believed, ctx, door, imap.IMAPS)
    for door in maildrop.frontend_doors(ctx, maildrop.editor(ctx)):
        yield partial(_is_not_believed, ctx, door, managesieve.MANAGESIEVE)


def _is_not_believed(ctx: Context, door: maildrop.Door, port: int) -> None:
    """A PROXY header is no header: nobody greets after it, or it is taken for a command."""
    header = _proxy_header(_loopback(door.address), door.address)
    taken = f"{door}: port {port} takes a PROXY header"
    if port in (imap.IMAPS, PROXIED_IMAPS):
        try:
            session = imap.Session(
                door.client,
                door.address,
                port,
                tls=ctx.tls(),
                name=ctx.platform.names.imap,
                preamble=header,
                timeout=3.0,
            )
        except (OSError, imap.Error):
            return
        session.shutdown()
        raise Failed(taken)
    try:
        filters = managesieve.Session(door.client, door.address, port, preamble=header, timeout=3.0)
    except (OSError, Failed):
        return
    with filters:  # it greets before it reads
        expect(port == managesieve.MANAGESIEVE, taken)
        try:
            verdict = filters.answer().verdict
        except OSError:
            verdict = "silence"
        expect(verdict in ("NO", "BYE"), f"{taken}: it is answered with {verdict}")


def _is_known(ctx: Context, door: Door, domain: str) -> None:
    """A login, a wrong password and a mail through ``door`` show the client's own address."""
    lab = ctx.lab
    address = door.client.source(door.address)
    assert address is not None
    mail = letter(f"{{token}}@{domain}", f"{{token}}@{lab.world.domain('generic')}")
    submit(ctx, door, mail)
    with door.session(ctx) as session:
        member = session.banner.inner
        session.secure(ctx.tls(), ctx.platform.names.smtp_out)
        session.authenticate(ctx.probe.user, "wrong")
    arrived = lab.world.arrival("generic", mail.recipient, 10.0)
    shown = f"[{address}]" if address.version == 4 else f"[IPv6:{address}]"
    received = arrived.header("Received")
    expect(
        any(shown in line for line in received),
        f"{door}: Received shows another client than {shown}: {' / '.join(received)}",
    )
    machine = lab.machine(ctx.platform.hosts[member])

    def logged(unit: str, what: str) -> None:
        expect(
            machine.logged(unit, str(address)),
            f"{door}: {what} on {member} does not show the client {address}",
        )

    eventually(lambda: logged("postfix", "Postfix's journal"), seconds=5)
    eventually(lambda: logged("dovecot", "Dovecot's journal (a wrong password)"), seconds=5)


def _proxy_header(source: IPAddress, target: IPAddress) -> bytes:
    """PROXY protocol version 1 (haproxy.org, proxy-protocol.txt, section 2.1)."""
    kind = "TCP4" if source.version == 4 else "TCP6"
    return f"PROXY {kind} {source} {target} 40000 {SUBMISSION}\r\n".encode("ascii")


def _loopback(address: IPAddress) -> IPAddress:
    """What a forger would claim to be: a member of mynetworks."""
    return IPv4Address("127.0.0.1") if address.version == 4 else type(address)("::1")


def _cannot_claim(ctx: Context, door: Door) -> None:
    """A PROXY header from a stranger is refused, on the PROXY port and on the direct one."""
    header = _proxy_header(_loopback(door.address), door.address)
    with (
        suppress(OSError),
        Session(
            door.client, door.address, SUBMISSION_PROXY, say=ctx.say, preamble=header, timeout=2.0
        ) as session,
    ):
        raise Failed(
            f"{door}: port {SUBMISSION_PROXY} takes a PROXY header and answers {session.greeting!r}"
        )
    # The direct port, where it is reachable, takes the header for a command and not for an address.
    try:
        opened = Session(
            door.client, door.address, SUBMISSION, say=ctx.say, preamble=header, timeout=3.0
        )
    except (OSError, Refused):
        return
    with opened as session:
        code, text = _next_reply(session)
        expect(
            code in (-1, 221, 421) or code >= 500,
            f"{door}: a PROXY header on the direct port is answered with {code} {text}",
        )


def _next_reply(session: Session) -> tuple[int, str]:
    try:
        code, text = session.getreply()
    except (OSError, smtplib.SMTPException):
        return -1, "connection closed"
    return code, text.decode("ascii", "replace")


def _cannot_smuggle(ctx: Context, door: Door) -> None:
    """A header that a client sends through a frontend is no header any more."""
    header = _proxy_header(_loopback(door.address), door.address)
    with (
        suppress(OSError, Refused),
        Session(
            door.client, door.address, SUBMISSION, say=ctx.say, preamble=header, timeout=5.0
        ) as session,
    ):
        code, text = _next_reply(session)
        expect(
            code in (-1, 221, 421) or code >= 500,
            f"{door}: a client's own PROXY header is answered with {code} {text}",
        )
    with door.session(ctx) as session:
        code, reply = session.docmd(header.decode("ascii").strip())
        expect(code >= 500, f"{door}: PROXY as a command is answered with {code} {reply!r}")
        with suppress(OSError, smtplib.SMTPException):  # such a client may be hung up on
            session.secure(ctx.tls(), ctx.platform.names.smtp_out)
            code, text = session.envelope(ctx.probe.sender, _elsewhere(ctx))
            expect(code >= 500, f"{door}: a claimed address may relay: {code} {text}")


def _is_no_relay(ctx: Context, door: Door, port: int) -> None:
    """A frontend that submits a mail of its own, without AUTH, is refused like anybody."""
    source = door.client.source(door.address) or _own_address(door)
    preamble = _proxy_header(source, door.address) if port == SUBMISSION_PROXY else b""
    try:
        session = Session(
            door.client, door.address, port, say=ctx.say, preamble=preamble, timeout=10.0
        )
    except OSError:
        expect(
            port == SUBMISSION,
            f"{door}: port {port} does not answer a frontend",
        )
        return
    with session:
        session.secure(ctx.tls(), ctx.platform.names.smtp_out)
        code, text = session.envelope(ctx.probe.sender, _elsewhere(ctx))
        expect(
            500 <= code < 600,
            f"{door}, port {port}: a frontend relays without AUTH: {code} {text}",
        )


def _own_address(door: Door) -> IPAddress:
    """The address that the place connects from, as its kernel chooses it."""
    kind = AF_INET if door.address.version == 4 else AF_INET6
    with door.client.open_socket(kind, SOCK_DGRAM) as probe:
        probe.connect((str(door.address), 9))
        return ip_address(probe.getsockname()[0])


def _elsewhere(ctx: Context) -> str:
    return f"relay-probe@{ctx.lab.world.domain('strict')}"


@check(
    "EDGE-3",
    disruptive=True,
    disturbs=("nginx_streams",),
    needs=("smtp_out", "maildrop", "replication"),
)
def frontends_are_independent(ctx: Context) -> str:
    """Every frontend serves both families, and losing one leaves the others serving."""
    each(frontend_doors(ctx), lambda door: _login(ctx, door))
    boxes = _mailbox_doors(ctx) if ctx.platform.replicas else []
    for box in boxes:
        box.login(ctx)
    lost = []
    for frontend in ctx.frontends:
        machine = ctx.lab.machine(frontend)
        machine.kill()
        try:
            gone = [d for d in frontend_doors(ctx) if d.name == frontend.name]
            others = [d for d in frontend_doors(ctx) if d.name != frontend.name]
            each(gone, lambda door: _is_gone(door))
            each(others, lambda door: _login(ctx, door))
            for box in boxes:
                if box.door.name != frontend.name:
                    box.login(ctx)
        finally:
            machine.start()
        mine = [d for d in frontend_doors(ctx) if d.name == frontend.name]
        eventually(
            partial(each, mine, lambda door: _login(ctx, door)),
            seconds=60,
            every=0.5,
            what=f"{frontend.name} to serve again",
        )
        for box in boxes:
            if box.door.name == frontend.name:
                eventually(partial(box.login, ctx), seconds=60, every=0.5, what=f"{box} to serve")
        lost.append(frontend.name)
    return (
        f"{len(ctx.doors)} addresses serve submission, mailboxes and filters; lost in turn: "
        f"{', '.join(lost)}; the others served both families, and each came back"
    )


def _is_gone(door: Door) -> None:
    try:
        door.client.connect(door.address, SUBMISSION, timeout=1.0).close()
    except OSError:
        return
    raise Failed(f"{door}: still answers")


@check("EDGE-4", quick=True, alone=True, disturbs=("nginx_streams",), needs=("outside",))
def neighbours_are_left_alone(ctx: Context) -> str:
    """A foreign website and firewall table on the frontends outlive the role, and work."""
    lab = ctx.lab
    for frontend in ctx.frontends:
        _foreign_things_work(ctx, frontend)
    frontend = ctx.frontends[-1]
    machine = lab.machine(frontend)
    without_us = _without_the_role(ctx, frontend)
    ours = paths_of(ctx.platform, frontend) | paths_of(without_us, frontend)
    foreign = machine.foreign_state(ours)
    secrets = machine.kept_secrets()
    try:
        machine.apply(without_us)
        _foreign_things_work(ctx, frontend)
        _expect_same(frontend, foreign, machine.foreign_state(ours), "the role was removed")
        left = machine.present(paths_of(ctx.platform, frontend) - paths_of(without_us, frontend))
        expect(not left, f"{frontend.name}: still there without the role: {', '.join(left)}")
        for door in frontend_doors(ctx):
            if door.name == frontend.name:
                _is_gone(door)
    finally:
        machine.apply(ctx.platform, secrets)
    _expect_same(frontend, foreign, machine.foreign_state(ours), "the role came back")
    _foreign_things_work(ctx, frontend)
    each(
        [d for d in frontend_doors(ctx) if d.name == frontend.name],
        lambda door: _login(ctx, door),
    )
    return (
        f"website and firewall table of {len(ctx.frontends)} frontends work and are as the "
        f"operator left them, on {frontend.name} also with the role removed and back again"
    )


def _without_the_role(ctx: Context, frontend: Host) -> Platform:
    """The site data as it is when the operator retires ``frontend``."""
    without = frontend.model_copy(update={"retired": True})
    hosts = {**ctx.platform.hosts, frontend.name: without}
    return ctx.platform.model_copy(update={"hosts": hosts})


def paths_of(platform: Platform, host: Host) -> set[str]:
    """Every path on ``host`` that is the platform's."""
    bundle = compose(platform, platform.hosts[host.name])
    units = (f"/etc/systemd/system/{s.unit}" for s in bundle.services if not s.foreign)
    made = (*bundle.produced, *(m.output for m in bundle.maps))
    return {*bundle.files, *bundle.secret_files, *made, *units}


def _expect_same(frontend: Host, one: dict[str, str], other: dict[str, str], when: str) -> None:
    changed = sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))
    expect(not changed, f"{frontend.name}: changed when {when}: {', '.join(changed[:5])}")


def _foreign_things_work(ctx: Context, frontend: Host) -> None:
    """The operator's own website answers in both families, and his firewall table is loaded."""
    machine = ctx.lab.machine(frontend)
    for address in ctx.public(frontend):
        where = f"{frontend.name} [{address}]: the operator's website"
        connection = http.client.HTTPConnection(str(address), timeout=5)
        try:
            connection.sock = ctx.internet.client().connect(address, 80)
            connection.request("GET", "/")
            reply = connection.getresponse()
            page = reply.read().decode("utf-8", "replace")
        except OSError as error:
            raise Failed(f"{where} does not answer: {error}") from error
        finally:
            connection.close()
        expect(
            reply.status == http.client.OK and page == machine.FOREIGN_PAGE,
            f"{where} answers {reply.status} {page[:60]!r}",
        )
    tables = machine.foreign_tables()
    expect(
        machine.FOREIGN_TABLE in tables,
        f"{frontend.name}: the operator's firewall table is gone; there are: {', '.join(tables)}",
    )
