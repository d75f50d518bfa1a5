"""OUT: what users and remote mail servers see of the submission service and its mail."""

from __future__ import annotations

import secrets
import smtplib
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mailsite.model import Host, IPAddress, NetworkKind, SaslUser, TlsLevel
from verify import addresses, mailauth
from verify.client import Client, Observer
from verify.context import (
    SUBMISSION,
    Context,
    each,
    eventually,
    expect,
)
from verify.lookup import family
from verify.mail import Mail
from verify.mailbox import MAILBOXES
from verify.passwords import password_of
from verify.registry import Failed, Skipped, check
from verify.smtp import CertificateRefused, Letter, Refused, Session, letter
from verify.spam_filter import GTUBE, keys, redis, writer

if TYPE_CHECKING:
    from verify.lab import LabMachine

OPENDKIM = 8891
"""Where OpenDKIM takes mail from Postfix, on its host alone."""
TOO_MANY = 421
"""What Postfix answers to a client that is over its limit (RFC 5321, section 3.8)."""
LIVE_PATIENCE, LIVE_PAUSE = 180.0, 5.0
REACH = 2.0
"""Seconds after which a packet filter has answered, if only by silence."""
PROMPT = 10.0
"""Seconds in which a mail that nothing holds up reaches the remote server."""


@dataclass(frozen=True)
class Door:
    """A way to the submission service: who connects, and to which address."""

    client: Client
    name: str
    address: IPAddress
    member: Host | None = None
    """The member behind it where it is reached directly; None behind a frontend."""

    def session(self, ctx: Context) -> Session:
        """Connect. On a live platform all doors share one address, and so wait for its limits."""
        deadline = time.monotonic() + (LIVE_PATIENCE if ctx.is_live else 0.0)
        while True:
            try:
                return Session(self.client, self.address, SUBMISSION, say=ctx.say)
            except Refused as refused:
                if refused.code != TOO_MANY or time.monotonic() > deadline:
                    raise
            time.sleep(LIVE_PAUSE)

    def is_open(self) -> bool:
        """Whether the network lets the client through at all."""
        try:
            self.client.connect(self.address, SUBMISSION, timeout=REACH).close()
        except OSError:
            return False
        return True

    def __str__(self) -> str:
        return f"{self.name} [{self.address}] from {self.client.place}"


def frontend_doors(ctx: Context) -> list[Door]:
    """Every frontend address in each family, each with a client of its own on the internet."""
    return [Door(ctx.internet.client(), name, address) for name, address in ctx.doors]


def member_doors(ctx: Context, observer: Observer | None = None) -> list[Door]:
    """Every member's internal address in each family, from a site-local network.

    One client does for all of them: each member counts by itself.
    """
    place = observer or ctx.local
    if place is None:
        return []
    client = place.client()
    return [
        Door(client, member.name, address, member)
        for member in ctx.members
        for address in ctx.internal(member)
    ]


def member_door(ctx: Context, member: Host, client: Client | None = None) -> Door:
    """A member's first internal address, from a client of its own in a site-local network."""
    if ctx.local is None:
        raise Skipped("needs an observer in a site-local network")
    return Door(client or ctx.local.client(), member.name, ctx.internal(member)[0], member)


def _doors_of_one(ctx: Context) -> list[Door]:
    """Every member's first internal address, all from one client: there are few of them, and each
    member counts by itself.
    """
    doors = [member_door(ctx, ctx.members[0])]
    return doors + [member_door(ctx, member, doors[0].client) for member in ctx.members[1:]]


def enter(ctx: Context, door: Door, user: str = "", password: str = "") -> Session:
    """Open a session through ``door``, secure it and log in.

    Raises:
        Failed: Any of it is refused.
    """
    session = door.session(ctx)
    try:
        session.secure(ctx.tls(), ctx.platform.names.smtp_out)
        code, text = session.authenticate(user or ctx.probe.user, password or ctx.probe.password)
        expect(code == 235, f"{door}: the right password is answered with {code} {text}")
    except BaseException:
        session.close()
        raise
    return session


def submit(ctx: Context, door: Door, mail: Letter) -> str:
    """Submit a mail as the probe account. Returns the server's words.

    Raises:
        Failed: It is not accepted.
    """
    with enter(ctx, door) as session:
        code, text = session.submit(mail.sender, [mail.recipient], mail.content)
        expect(code == 250, f"{door}: mail from {mail.sender} is answered with {code} {text}")
        return text


def _workers(ctx: Context) -> int:
    """Sessions side by side: few where all of them come from one address."""
    return 1 if ctx.is_live else 16


@check("OUT-1", live=True)
def submission_answers(ctx: Context) -> str:
    """Submission answers through every frontend and at every member, AUTH only after STARTTLS."""
    public = ctx.platform.names.smtp_out
    behind = {a for _, a in ctx.doors}
    resolved = ctx.lookup.addresses(public)
    expect(
        resolved == behind,
        f"{public} resolves to {_sorted(resolved)}, the frontends have {_sorted(behind)}",
    )
    members = {m.name for m in ctx.members}

    def look(door: Door) -> str:
        with door.session(ctx) as session:
            banner = session.banner
            expect(
                banner.name == public,
                f"{door}: the banner shows {banner.name!r}, not {public!r}",
            )
            wanted = {door.member.name} if door.member else members
            expect(
                banner.inner in wanted,
                f"{door}: the banner has {banner.inner!r} in parentheses, "
                f"not {' or '.join(sorted(wanted))}",
            )
            session.ehlo()
            expect(not session.has_extn("auth"), f"{door}: AUTH is offered before TLS")
            expect(session.has_extn("starttls"), f"{door}: STARTTLS is not offered")
            secured = session.secure(ctx.tls(), public)
            expect(
                secured.version() in ("TLSv1.2", "TLSv1.3"),
                f"{door}: speaks {secured.version()}",
            )
            offered = session.esmtp_features.get("auth", "").upper().split()
            expect("PLAIN" in offered, f"{door}: after TLS, AUTH offers {offered or 'nothing'}")
        return banner.inner

    doors = frontend_doors(ctx) + member_doors(ctx)
    served = each(doors, look, workers=_workers(ctx))
    through = sorted({s for s, d in zip(served, doors, strict=True) if d.member is None})
    direct = (
        "members not reachable from here"
        if ctx.local is None
        else (f"{len(ctx.members)} members directly in both families")
    )
    return (
        f"{public}: {len(ctx.doors)} frontend addresses lead to {', '.join(through)}; {direct}; "
        "certificate verified, AUTH only after STARTTLS"
    )


def _sorted(found: set[IPAddress]) -> str:
    return " ".join(sorted(str(a) for a in found)) or "nothing"


@check("OUT-2", live=True)
def only_users_may_send(ctx: Context) -> str:
    """Only the right password opens the relay, from wherever one connects."""
    probe = ctx.probe
    recipient = f"relay-probe@{_outside_domain(ctx)}"

    def passwords(door: Door) -> None:
        with door.session(ctx) as session:
            session.ehlo()
            # Whoever listens must not learn the real one; 535 would mean that it was looked at.
            code, text = session.authenticate(probe.user, secrets.token_hex(8))
            expect(
                code in (502, 503, 530, 538),
                f"{door}: AUTH in plain text before TLS is answered with {code} {text}",
            )
            code, text = session.envelope(probe.sender, recipient)
            expect(
                code >= 500, f"{door}: MAIL in plain text before TLS is answered with {code} {text}"
            )
        with door.session(ctx) as session:
            session.secure(ctx.tls(), ctx.platform.names.smtp_out)
            code, text = session.authenticate(probe.user, probe.password)
            expect(code == 235, f"{door}: the right password is answered with {code} {text}")
            code, text = session.envelope(probe.sender, recipient)
            expect(code == 250, f"{door}: a user's mail is answered with {code} {text}")

    def wrong_password(door: Door) -> None:
        with door.session(ctx) as session:
            session.secure(ctx.tls(), ctx.platform.names.smtp_out)
            code, text = session.authenticate(probe.user, probe.password + "x")
            expect(code == 535, f"{door}: a wrong password is answered with {code} {text}")
            _expect_refused(session, probe.sender, recipient, f"{door}, after a wrong password")

    def relay(door: Door) -> bool:
        if not ctx.is_live and not door.is_open():
            return False  # even better
        with door.session(ctx) as session:
            session.secure(ctx.tls(), ctx.platform.names.smtp_out)
            _expect_refused(session, probe.sender, recipient, str(door))
        return True

    doors = frontend_doors(ctx) + member_doors(ctx)
    strangers = frontend_doors(ctx)
    if not ctx.is_live:
        strangers += [
            Door(observer.client(), name, address)
            for observer in (ctx.office, ctx.local)
            if observer
            for name, address in ctx.doors[:2]
        ]
        insiders = [ctx.lab.machine(m).observer for m in ctx.members]
        strangers += [
            d
            for o in (ctx.internet, ctx.office, ctx.local, *insiders)
            if o
            for d in member_doors(ctx, o)
            if d.member is None or o.place != d.member.name
        ]
    # Dovecot makes an address that was wrong wait: those that try have addresses of their own.
    attempts = [(passwords, d) for d in doors]
    attempts += [(wrong_password, d) for d in frontend_doors(ctx) + member_doors(ctx)]
    each(attempts, lambda attempt: attempt[0](attempt[1]), workers=_workers(ctx))
    reached = each(strangers, relay, workers=_workers(ctx))
    expect(all(reached[: len(ctx.doors)]), "a frontend does not answer")
    places = sorted({d.client.place for d, r in zip(strangers, reached, strict=True) if r})
    return (
        f"{len(doors)} ways in: right password accepted, a wrong one and one in plain text "
        f"refused; relay without AUTH refused on {sum(reached)} ways from {', '.join(places)}"
    )


def _expect_refused(session: Session, sender: str, recipient: str, where: str) -> None:
    code, text = session.envelope(sender, recipient)
    expect(
        500 <= code < 600,
        f"{where}: relay without AUTH to {recipient} is answered with {code} {text}",
    )
    with suppress(smtplib.SMTPException):
        session.rset()


def _outside_domain(ctx: Context) -> str:
    """A domain that is not the platform's."""
    if ctx.is_live:
        return "example.com"
    return ctx.lab.world.domain("strict")


# Late, for it waits for mail that comes in, which takes seconds while IN-4 is at work.
@check("OUT-3", quick=True, disturbs=("smtp_out",), late=True)
def mail_is_signed(ctx: Context) -> str:
    """One valid, aligned DKIM signature for each domain, for bounces too, or nothing leaves."""
    lab = ctx.lab
    domains = ctx.sending_domains[:4]
    expect(domains, "no domain of the site data has a DKIM key that signs")
    subdomain = f"probe.{domains[0]}"
    door = frontend_doors(ctx)[0]
    strict = lab.world.domain("strict")

    def signed(author: str) -> Mail:
        mail = letter(f"{{token}}@{author}", f"{{token}}@{strict}")
        submit(ctx, Door(ctx.internet.client(), door.name, door.address), mail)
        arrived = lab.world.arrival("strict", mail.recipient, PROMPT)
        expect_signed(ctx, arrived, author)
        return arrived

    authors = [*domains, subdomain]
    each(authors, signed, workers=3)
    bounce = _bounce_of(ctx)
    helo = ctx.platform.names.smtp_out
    expect_signed(ctx, bounce, mailauth.author_domain(bounce.raw))
    without = _with_the_signer_stopped(ctx, ctx.members[-1], domains[0])
    return (
        f"one valid relaxed/relaxed signature on mail of {', '.join(authors)} and on the bounce "
        f"of {helo}; {without}"
    )


def expect_signed(ctx: Context, mail: Mail, author: str) -> None:
    """Exactly one DKIM signature, as the contract words it, and DMARC's alignment."""
    found = mailauth.signatures(ctx.lookup, mail.raw)
    expect(len(found) == 1, f"mail of {author} arrived with {len(found)} DKIM signatures")
    one = found[0]
    expect(one.valid, f"mail of {author}: signature of {one.domain}: {one.error}")
    expect(
        mailauth.author_domain(mail.raw) == author,
        f"mail of {author} arrived as from {mailauth.author_domain(mail.raw)}",
    )
    expect(
        author == one.domain or author.endswith(f".{one.domain}"),
        f"mail of {author}: d={one.domain} is not aligned with From",
    )
    domain = ctx.platform.domains.get(one.domain)
    expect(domain, f"mail of {author}: d={one.domain} is no domain of the site data")
    key = domain.signing_key if domain else None
    expect(
        key is not None and one.selector == key.selector,
        f"mail of {author}: selector {one.selector}, the site data has "
        f"{key.selector if key else 'none'}",
    )
    expect(
        one.canonicalization == "relaxed/relaxed",
        f"mail of {author}: canonicalization {one.canonicalization}, not relaxed/relaxed",
    )
    expect(one.algorithm == "rsa-sha256", f"mail of {author}: algorithm {one.algorithm}")
    missing = {"from", "to", "subject", "date"} - set(one.headers)
    expect(not missing, f"mail of {author}: {', '.join(sorted(missing))} not signed")


def _author_with_a_mailbox(ctx: Context) -> str:
    """An author whose bounces end in a mailbox, told apart by the token in the address."""
    for name in ctx.sending_domains:
        user = addresses.mailbox_user(ctx.platform, ctx.platform.domains[name])
        if user is not None:
            return f"{user}+{{token}}@{name}"
    raise Skipped("no address of a domain that sends leads to one mailbox alone")


def _mailbox_of(ctx: Context, author: str) -> str:
    """The mailbox that mail to ``author`` ends in, as the hosts of the mailboxes see it."""
    way = addresses.way(ctx.platform, author)
    expect(way is not None and len(way.mailboxes) == 1, f"{author} does not lead to one mailbox")
    assert way is not None
    (mailbox,) = way.mailboxes
    return mailbox


def _bounce_of(ctx: Context) -> Mail:
    """Send a mail that the remote server refuses, and return the bounce that its author gets.

    It comes in through the MX like any other mail, and ends in the author's mailbox.
    """
    world = ctx.lab.world
    mail = letter(_author_with_a_mailbox(ctx), f"{{token}}@{world.domain('refusing')}")
    submit(ctx, frontend_doors(ctx)[0], mail)
    bounce = world.arrival(MAILBOXES, _mailbox_of(ctx, mail.sender), PROMPT)
    expect(bounce.mail_from == "", f"the bounce has the envelope sender {bounce.mail_from!r}")
    text = bounce.raw.decode("ascii", "replace").lower()
    expect("action: failed" in text, "the bounce does not say 'Action: failed' (RFC 3464)")
    expect(mail.recipient.lower() in text, f"the bounce does not name {mail.recipient}")
    return bounce


def _with_the_signer_stopped(ctx: Context, member: Host, domain: str) -> str:
    """Stop OpenDKIM on ``member``: nothing may leave unsigned, and all of it leaves later."""
    lab = ctx.lab
    machine = lab.machine(member)
    strict = lab.world.domain("strict")
    client = member_door(ctx, member).client

    def door() -> Door:
        return member_door(ctx, member, client)

    submitted = letter(f"{{token}}@{domain}", f"{{token}}@{strict}")
    local = letter(f"{{token}}@{domain}", f"{{token}}@{strict}")
    refused = letter(_author_with_a_mailbox(ctx), f"{{token}}@{lab.world.domain('refusing')}")
    returned = _mailbox_of(ctx, refused.sender)
    # A mail that is in the queue already, whose bounce must be made while nothing can sign.
    with lab.world.behaving("refusing", "defer"):
        submit(ctx, door(), refused)
        eventually(
            lambda: machine.deferral(refused.recipient),
            seconds=PROMPT,
            what="the mail to wait in the queue",
        )
        try:
            _stop_signer(machine)
            code, text = _offered(ctx, door(), submitted)
            expect(
                400 <= code < 500,
                f"{member.name}: without OpenDKIM a mail is answered with {code} {text}",
            )
            machine.run(
                "sendmail", "-i", "-f", local.sender, local.recipient,
                input=local.content.replace(b"\r\n", b"\n"),
            )  # fmt: skip
            lab.world.set("refusing", "refuse")
            machine.run("postqueue", "-f")
            eventually(
                lambda: expect(
                    any(
                        r.startswith("550")
                        for r in lab.world.replies("refusing", refused.recipient)
                    ),
                    "not refused yet",
                ),
                seconds=PROMPT,
                what="the remote server's refusal",
            )
            _expect_nothing(ctx, "strict", local.recipient, 2.0)
            _expect_nothing(ctx, "strict", submitted.recipient, 0.0)
            _expect_nothing(ctx, MAILBOXES, returned, 0.0)
        finally:
            machine.run("systemctl", "start", "opendkim.service")
    # The client tries again, as clients do; what the queue holds is hurried along.
    eventually(
        lambda: submit(ctx, door(), submitted),
        seconds=PROMPT,
        what="OpenDKIM to sign again",
        every=0.3,
    )
    machine.hurry()
    late = [
        ("strict", submitted.recipient),
        ("strict", local.recipient),
        (MAILBOXES, returned),
    ]
    for mx, recipient in late:
        arrived = lab.world.arrival(mx, recipient, 20.0, poke=machine.hurry)
        expect_signed(ctx, arrived, mailauth.author_domain(arrived.raw))
    return (
        f"with OpenDKIM stopped on {member.name} a submission is deferred, a local mail and a "
        "bounce wait, and all three leave signed afterwards"
    )


def _stop_signer(machine: LabMachine) -> None:
    """libmilter looks every five seconds whether it is to end, and whenever somebody connects."""
    machine.run("systemctl", "stop", "--no-block", "opendkim.service")

    def is_over() -> None:
        machine.call("bash", "-c", f": < /dev/tcp/127.0.0.1/{OPENDKIM}")
        state = machine.call("systemctl", "is-active", "opendkim.service").stdout.strip()
        expect(state == "inactive", f"OpenDKIM is {state}")

    eventually(is_over, seconds=PROMPT, what="OpenDKIM to end")


def _offered(ctx: Context, door: Door, mail: Letter) -> tuple[int, str]:
    """Try to submit a mail. Returns the reply that decided, at whichever command it came."""
    try:
        with enter(ctx, door) as session:
            return session.submit(mail.sender, [mail.recipient], mail.content)
    except smtplib.SMTPResponseException as error:
        return error.smtp_code, str(error.smtp_error)


def _expect_nothing(ctx: Context, mx: str, recipient: str, seconds: float) -> None:
    """No mail for ``recipient`` may reach ``mx`` for ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        found = ctx.lab.world.mails(mx, recipient)
        expect(not found, f"a mail for {recipient} left though nothing could sign it")
        if time.monotonic() >= deadline:
            return
        time.sleep(0.2)


@check("OUT-4", quick=True)
def senders_are_authorized(ctx: Context) -> str:
    """SPF passes for the address that each mail came from, in both families, and so does DMARC."""
    domain = ctx.sending_domains[0]
    seen: set[IPAddress] = set()

    def look(member: Host) -> None:
        versions: set[int] = set()
        with enter(ctx, member_door(ctx, member)) as session:
            for _ in range(16):  # which family a delivery takes is Postfix's throw of a coin
                arrived = _delivered(ctx, session, domain)
                _expect_authorized(ctx, member, domain, arrived)
                versions.add(arrived.peer.version)
                seen.add(arrived.peer)
                if versions == {4, 6}:
                    return
        raise Failed(f"{member.name}: 16 mails all left over IPv{versions.pop()}")

    each(ctx.members, look)
    return (
        f"mail of {len(ctx.members)} members from {_sorted(seen)}: SPF and DMARC pass, SPF and "
        "DKIM aligned"
    )


def _delivered(ctx: Context, session: Session, domain: str) -> Mail:
    """Send a mail. Returns it as the remote server got it."""
    world = ctx.lab.world
    mail = letter(f"{{token}}@{domain}", f"{{token}}@{world.domain('generic')}")
    code, text = session.submit(mail.sender, [mail.recipient], mail.content)
    expect(code == 250, f"{session.where}: a mail is answered with {code} {text}")
    return world.arrival("generic", mail.recipient, PROMPT)


def _expect_authorized(ctx: Context, member: Host, domain: str, arrived: Mail) -> None:
    where = f"{member.name} over {family(arrived.peer)}"
    allowed = _leaves_from(ctx, member, arrived.peer.version)
    expect(
        arrived.peer in allowed,
        f"{where}: the mail came from {arrived.peer}, not from {_sorted(allowed)}",
    )
    judged = mailauth.check_spf(ctx.lookup, arrived.peer, arrived.mail_from, arrived.helo)
    expect(
        judged.result == "pass",
        f"{where}: SPF of {arrived.mail_from} from {arrived.peer}: "
        f"{judged.result} ({judged.reason})",
    )
    verdict = mailauth.check_dmarc(
        ctx.lookup,
        lambda name: _organization(ctx, name),
        arrived.raw,
        arrived.mail_from,
        judged,
        mailauth.signatures(ctx.lookup, arrived.raw),
    )
    if verdict is None:
        raise Failed(f"{where}: {domain} publishes no DMARC policy")
    expect(
        set(verdict.through) == {"spf", "dkim"},
        f"{where}: DMARC of {domain} passes through {', '.join(verdict.through) or 'nothing'}, "
        "not through SPF and DKIM",
    )


def _leaves_from(ctx: Context, member: Host, version: int) -> set[IPAddress]:
    """The addresses that the outside may see of a member: its own public ones, else the NAT's."""
    own = {a for a in ctx.public(member) if a.version == version}
    if own and ctx.platform.network_of(member.interfaces[0]).kind is NetworkKind.PUBLIC:
        return own
    egress = ctx.platform.egress.values()
    return {a for e in egress for a in (e.ipv4, e.ipv6) if a.version == version}


def _organization(ctx: Context, name: str) -> str:
    """Organizational domain: the site data's domain that ``name`` is in, else two labels."""
    inside = [d for d in ctx.platform.domains if name == d or name.endswith(f".{d}")]
    return min(inside, key=len) if inside else ".".join(name.split(".")[-2:])


@check("OUT-5")
def late_mail_is_not_lost(ctx: Context) -> str:
    """A remote that defers or is down gets the mail later, each once; a refusal bounces."""
    lab = ctx.lab
    world = lab.world
    domain = ctx.sending_domains[0]
    doors = [member_door(ctx, m) for m in ctx.members]

    def hurry() -> None:
        for member in ctx.members:
            lab.machine(member).hurry()

    observed = []
    for mode, words in (("defer", "answers 4xx"), ("down", "is down")):
        with world.behaving("flaky", mode):
            mails = [letter(f"{{token}}@{domain}", f"{{token}}@{world.domain('flaky')}")
                     for _ in range(2 * len(doors))]  # fmt: skip
            for number, mail in enumerate(mails):
                submit(ctx, doors[number % len(doors)], mail)

            def waits(mails: list[Letter] = mails) -> None:
                waiting = _recipients(ctx, "deferred")
                missing = [m.recipient for m in mails if m.recipient not in waiting]
                expect(not missing, f"not deferred: {', '.join(missing)}")

            eventually(waits, seconds=15, what=f"mail to a remote that {words}", every=0.5)
            early = [m.recipient for m in mails if world.mails("flaky", m.recipient)]
            expect(not early, f"delivered though the remote {words}: {', '.join(early)}")
        with world.behaving("flaky", "accept"):
            for mail in mails:
                arrived = world.arrival(
                    "flaky", mail.recipient, 60.0,
                    poke=hurry,
                )  # fmt: skip
                expect(mail.token.encode() in arrived.raw, f"{mail.recipient}: another mail")

            def empty(mails: list[Letter] = mails) -> None:
                queued = _recipients(ctx)
                left = [m.recipient for m in mails if m.recipient in queued]
                expect(not left, f"still queued: {', '.join(left)}")

            eventually(empty, seconds=10, what="the queues to be empty")
            copies = {m.recipient: len(world.mails("flaky", m.recipient)) for m in mails}
            twice = [r for r, n in copies.items() if n != 1]
            expect(not twice, f"not exactly once: {', '.join(twice)}")
        observed.append(f"{len(mails)} mails waited while a remote {words} and arrived once each")
    _bounce_of(ctx)
    return "; ".join([*observed, "a mail refused with 5xx came back as a bounce"])


def _recipients(ctx: Context, queue: str = "") -> set[str]:
    """Recipients of the mails in all members' queues, or in one of the queues."""
    return {
        recipient
        for member in ctx.members
        for entry in ctx.lab.machine(member).queue_entries()
        if not queue or entry.queue == queue
        for recipient in entry.recipients
    }


@check("OUT-6", quick=True, disturbs=("smtp_out",))
def tls_level_holds(ctx: Context) -> str:
    """The TLS level of the site data holds outbound, each level does; wrong names are refused."""
    own = ctx.platform.outbound.tls
    left = [own, *(other for other in TlsLevel if other is not own)]
    observed = []
    doors = list(zip(ctx.members, _doors_of_one(ctx), strict=True))[::-1]
    while left:
        trials = [_TlsTrial(ctx, *way, tried) for way, tried in zip(doors, left, strict=False)]
        del left[: len(trials)]
        observed += _try_levels(ctx, trials)
    each(ctx.members, lambda member: _drop_probes(ctx, member))
    observed.append(_internal_hops_verify(ctx))
    return f"as configured {'; '.join(observed)}"


def _try_levels(ctx: Context, trials: Sequence[_TlsTrial]) -> list[str]:
    """Make trials, each on a member of its own, which has that level for so long."""
    changed = [trial for trial in trials if trial.level is not ctx.platform.outbound.tls]
    try:
        if changed:
            each(changed, _TlsTrial.configure)
        each(trials, _TlsTrial.sends_where_it_may)
        with ctx.lab.world.behaving("dane", "wrong-certificate"):
            said = each(trials, _TlsTrial.minds_a_forged_remote)
    finally:
        if changed:
            each(changed, lambda trial: ctx.lab.machine(trial.member).apply())
    return [f"{trial.level}: {words}" for trial, words in zip(trials, said, strict=True)]


@dataclass(frozen=True)
class _TlsTrial:
    """A member with one of the levels sends to remotes, and is judged by the level's rules."""

    ctx: Context
    member: Host
    door: Door
    level: TlsLevel

    def configure(self) -> None:
        """Give the member the level."""
        outbound = self.ctx.platform.outbound.model_copy(update={"tls": self.level})
        platform = self.ctx.platform.model_copy(update={"outbound": outbound})
        self.ctx.lab.machine(self.member).apply(platform)

    def _send(self, mx: str) -> Letter:
        domain = self.ctx.sending_domains[0]
        mail = letter(f"{{token}}@{domain}", f"{{token}}@{self.ctx.lab.world.domain(mx)}")
        submit(self.ctx, self.door, mail)
        return mail

    def _arrives(self, mx: str, mail: Letter, encrypted: bool) -> None:
        arrived = self.ctx.lab.world.arrival(mx, mail.recipient, PROMPT)
        expect(
            bool(arrived.tls) == encrypted,
            f"{self.level}: mail to {mx} arrived {'with' if arrived.tls else 'without'} TLS",
        )

    def _waits(self, mx: str, mail: Letter) -> str:
        machine = self.ctx.lab.machine(self.member)
        reason = eventually(
            lambda: machine.deferral(mail.recipient),
            seconds=PROMPT,
            what=f"{self.level}: mail to {mx}",
        )
        expect(
            not self.ctx.lab.world.mails(mx, mail.recipient),
            f"{self.level}: mail to {mx} was delivered",
        )
        return reason

    def sends_where_it_may(self) -> None:
        """To remotes that are what they say they are, with TLS and without."""
        strict, plain, dane = self._send("strict"), self._send("plain"), self._send("dane")
        self._arrives("strict", strict, True)
        self._arrives("dane", dane, True)
        if self.level is not TlsLevel.ENCRYPT:
            self._arrives("plain", plain, False)
            return
        reason = self._waits("plain", plain)
        expect(
            "TLS is required" in reason,
            f"{self.level}: mail to plain waits for another reason: {reason}",
        )

    def minds_a_forged_remote(self) -> str:
        """Whose certificate is not the one that its TLSA records name. Returns what was seen."""
        if self.level is TlsLevel.ENCRYPT:
            return "a remote without STARTTLS gets nothing, the others get it encrypted"
        forged = self._send("dane")
        if self.level is TlsLevel.MAY:
            self._arrives("dane", forged, True)
            return "a remote without STARTTLS gets mail in the clear, the others encrypted"
        reason = self._waits("dane", forged)
        expect(
            "not trusted" in reason.lower() or "not verified" in reason.lower(),
            f"{self.level}: mail to a forged remote waits for another reason: {reason}",
        )
        return (
            "a remote with TLSA records gets mail, not with another certificate; "
            "one without STARTTLS gets it in the clear"
        )


def _drop_probes(ctx: Context, member: Host) -> None:
    """Take the mails that were meant to wait out of the member's queue."""
    machine = ctx.lab.machine(member)
    for entry in machine.queue_entries():
        if any("plain" in r or "dane" in r for r in entry.recipients):
            machine.run("postsuper", "-d", entry.id)


def _internal_hops_verify(ctx: Context) -> str:
    """A host that verifies names reaches every member, and none that has another certificate.

    Seen with Postfix's own TLS client on another member, which trusts what hosts trust.
    """
    lab = ctx.lab
    name = ctx.platform.names.smtp_out

    def look(member: Host) -> None:
        other = lab.machine(next(m for m in ctx.members if m is not member))
        for address in ctx.internal(member):
            verified, said = other.verifies(address, SUBMISSION, name)
            expect(verified, f"{other.name} to {member.name} [{address}]: {said}")

    each(ctx.members, look)
    victim = ctx.members[-1]
    door = member_door(ctx, victim)
    peer = lab.machine(ctx.members[0])
    address = ctx.internal(victim)[0]
    refused = []

    def expect_refused(what: str) -> None:
        verified, _ = peer.verifies(address, SUBMISSION, name)
        expect(not verified, f"{peer.name} accepts {what} for {name}")
        try:
            enter(ctx, door).close()
        except CertificateRefused:
            return
        raise Failed(f"a client accepts {what} for {name}")

    def expect_verified() -> None:
        verified, said = peer.verifies(address, SUBMISSION, name)
        expect(verified, f"{peer.name} to {victim.name}: {said}")

    for what, chain, key in lab.wrong_certificates(name):
        with lab.machine(victim).presenting(chain, key):
            eventually(partial(expect_refused, what), seconds=PROMPT)
        refused.append(what)
    eventually(expect_verified, seconds=PROMPT, what="its own certificate to be back")
    return f"hosts verify {name} at every member; refused: {', '.join(refused)}"


@check("OUT-7", quick=True)
def limits_count_clients(ctx: Context) -> str:
    """A client over its limit is slowed down, another one behind the same frontend is not."""
    limits = ctx.platform.outbound.limits

    def look(door: Door) -> str:
        greedy, other = door.client, ctx.internet.client()
        with ExitStack() as held:
            for number in range(limits.connections):
                try:
                    held.enter_context(door.session(ctx))
                except Refused as refused:
                    raise Failed(
                        f"{door}: connection {number + 1} of {limits.connections} is refused: "
                        f"{refused}"
                    ) from refused
            too_many = _refusal(ctx, door)
            expect(
                too_many == TOO_MANY,
                f"{door}: {limits.connections + 1} connections at once from {greedy} are "
                f"answered with {too_many}",
            )
            _expect_welcome(ctx, Door(other, door.name, door.address), greedy)
        refusals = []
        for _ in range(limits.connection_rate - limits.connections + 1):
            refusals.append(_refusal(ctx, door))
        expect(
            refusals[-1] == TOO_MANY,
            f"{door}: {greedy} opens more than {limits.connection_rate} connections in a minute",
        )
        _expect_welcome(ctx, Door(other, door.name, door.address), greedy)
        return str(greedy)

    doors = frontend_doors(ctx)
    wanted = [doors[0], next(d for d in doors if d.address.version != doors[0].address.version)]
    greedy = each(wanted, look)
    return (
        f"{' and '.join(greedy)} got 421 beyond {limits.connections} connections at once and "
        f"{limits.connection_rate} a minute; others through the same frontend got in"
    )


@check("OUT-8", quick=True, disturbs=("smtp_out",))
def users_are_held_to_their_limits(ctx: Context) -> str:
    """GTUBE, too much mail, a suspended user and foreign senders are refused on the way out."""
    observed = [_gtube_is_refused(ctx)]
    # Of these, only what is counted is mail: the others get no further than its envelope.
    parts = [_mail_is_counted, _suspended_users_are_refused]
    parts += [partial(_senders_are_own, user=user) for user in _bound_users(ctx)]
    return "; ".join([*observed, *each(parts, lambda part: part(ctx))])


def _gtube_is_refused(ctx: Context) -> str:
    domain, outside = ctx.sending_domains[0], ctx.lab.world.domain("generic")

    def look(door: Door) -> None:
        mail = letter(f"{{token}}@{domain}", f"{{token}}@{outside}")
        with enter(ctx, door) as session:
            content = mail.content + f"{GTUBE}\r\n".encode()
            code, text = session.submit(mail.sender, [mail.recipient], content)
        expect(500 <= code < 600, f"{door}: GTUBE is answered with {code} {text}")

    doors = [frontend_doors(ctx)[0], *member_doors(ctx)]
    each(doors, look)
    return f"GTUBE refused on {len(doors)} ways out"


def _mail_is_counted(ctx: Context) -> str:
    """What one login sends through any member counts, and too much is refused for it alone.

    The buckets of the limits are watched while they fill, and then filled but for one message:
    the site's limits would take hundreds of mails to reach.
    """
    limits = ctx.platform.spam.user_limits
    user, other = _free_users(ctx)[:2]
    doors = _doors_of_one(ctx)
    recipients = 3

    def send(login: str, door: Door) -> tuple[int, str]:
        domain, outside = ctx.sending_domains[0], ctx.lab.world.domain("generic")
        mail = letter(f"{{token}}@{domain}", f"{{token}}@{outside}")
        local, _, rest = mail.recipient.partition("@")
        everyone = [f"{local}-{n}@{rest}" for n in range(recipients)]
        with enter(ctx, door, login, password_of(ctx.state, login)) as session:
            return session.submit(mail.sender, everyone, mail.content)

    def sent(login: str, door: Door) -> None:
        code, text = send(login, door)
        expect(code == 250, f"{door}: mail of {login} is answered with {code} {text}")

    with redis(ctx, writer(ctx)) as memory:

        def levels() -> dict[str, tuple[float, float]]:
            """How full each bucket was, and when, in seconds since 1970."""
            found = {
                k: (memory.text("HGET", k, "b"), memory.text("HGET", k, "l"))
                for k in keys(memory, "RL*", "hash")
            }
            return {k: (float(b), float(at) / 1000) for k, (b, at) in found.items() if b and at}

        began, before = time.time(), levels()
        for door in doors:
            sent(user, door)

        def filled(amount: int, limit: int) -> str:
            """The bucket that took ``amount``, but for what leaked meanwhile."""
            each_second = limit / 3600
            leaked = each_second * (time.time() - began)

            def rest(bucket: str) -> float:
                """What an earlier mail left in it; it leaks when the next one comes."""
                level, at = before.get(bucket, (0.0, began))
                return max(0.0, level - each_second * (began - at))

            now = levels()
            rise = {k: now[k][0] - rest(k) for k in now if now[k] != before.get(k)}
            found = [k for k, v in rise.items() if amount - leaked - 0.01 < v < amount + 0.01]
            expect(len(found) == 1, f"{len(doors)} mails of {user} are counted as {rise}")
            return found[0]

        def fill(bucket: str, level: float) -> None:
            memory.call("HSET", bucket, "b", level, "l", round(time.time() * 1000))

        wanted = {
            "messages": (len(doors), limits.messages, 1),
            "recipients": (len(doors) * recipients, limits.recipients, recipients),
        }
        buckets = {
            what: eventually(partial(filled, amount, limit), seconds=PROMPT, what=what)
            for what, (amount, limit, _) in wanted.items()
        }
        for what, (_, limit, one) in wanted.items():
            bucket = buckets[what]
            kept = float(memory.text("HGET", bucket, "b"))
            try:
                fill(bucket, limit - one)
                sent(user, doors[0])
                for door in doors:
                    fill(bucket, limit)
                    code, text = send(user, door)
                    expect(
                        400 <= code < 500 and f"user_{what}" in text,
                        f"{door}: more than {limit} {what} an hour are answered with {code} {text}",
                    )
                sent(other, doors[-1])
            finally:
                fill(bucket, kept)
    return (
        f"{user} beyond {limits.messages} messages or {limits.recipients} recipients an hour gets"
        f" 4xx on all {len(doors)} members, {other} does not"
    )


def _free_users(ctx: Context) -> list[str]:
    """Logins that may use any sender, others than the probe first: they have counts too."""
    users = [u.name for u in ctx.platform.sasl_users.values() if not u.suspended and not u.senders]
    if len(users) < 2:
        raise Skipped("needs two logins that may use any sender")
    return sorted(users, key=lambda name: name == ctx.probe.user)


def _suspended_users_are_refused(ctx: Context) -> str:
    suspended = [u.name for u in ctx.platform.sasl_users.values() if u.suspended]
    if not suspended:
        return "no user is suspended"

    def look(case: tuple[Door, str]) -> None:
        door, user = case
        with door.session(ctx) as session:
            session.secure(ctx.tls(), ctx.platform.names.smtp_out)
            code, text = session.authenticate(user, password_of(ctx.state, user))
        expect(code == 535, f"{door}: suspended {user} is answered with {code} {text}")

    each([(door, user) for door in member_doors(ctx) for user in suspended], look)
    return f"suspended {', '.join(suspended)} refused"


def _bound_users(ctx: Context) -> list[SaslUser]:
    return [u for u in ctx.platform.sasl_users.values() if u.senders and not u.suspended]


def _senders_are_own(ctx: Context, user: SaslUser) -> str:
    """A login that has senders may use those alone, however it writes its name."""
    first = user.senders[0]
    own = first if not first.startswith("@") else f"probe{first}"
    domain = own.rpartition("@")[2]
    foreign = next(d for d in (*ctx.sending_domains, "example.com") if f"@{d}" not in user.senders)
    recipient = f"probe@{ctx.lab.world.domain('generic')}"

    def look(case: tuple[Door, str]) -> None:
        door, login = case
        for sender, wanted in ((own, 2), (f"probe@{foreign}", 5), (f"probe@sub.{domain}", 5)):
            with enter(ctx, door, login, password_of(ctx.state, user.name)) as session:
                code, text = session.envelope(sender, recipient)
                expect(
                    code // 100 == wanted,
                    f"{door}: {login} as {sender} is answered with {code} {text}",
                )

    logins = (user.name, f"{user.name}@{foreign}", user.name.upper())
    each([(door, login) for login in logins for door in _doors_of_one(ctx)], look)
    return f"{user.name} sends as {', '.join(user.senders)} alone"


def _refusal(ctx: Context, door: Door) -> int:
    """Connect and leave. Returns the greeting's code."""
    try:
        with door.session(ctx):
            return 220
    except Refused as refused:
        return refused.code


def _expect_welcome(ctx: Context, door: Door, greedy: Client) -> None:
    try:
        with enter(ctx, door):
            pass
    except Failed as error:
        raise Failed(f"while {greedy} is over its limit, another client fails: {error}") from error


__all__ = ["Door", "enter", "frontend_doors", "member_door", "member_doors", "submit"]
