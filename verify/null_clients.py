"""CLIENT: how every machine sends what it has to say itself."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address

from mailsite.model import Host, IPAddress, Role
from verify import mailauth, smtp_in
from verify.client import Client
from verify.context import Context, each, eventually, expect
from verify.lab import LabMachine
from verify.mail import Mail
from verify.registry import Failed, check
from verify.smtp_out import expect_signed

SMTP = 25
PROMPT = 40.0
"""Seconds that a mail may take: a client tries a dead way for some of them first."""
_SECRETS = {True: "/etc/mail/secrets", False: "/etc/postfix/own-login"}


@dataclass(frozen=True)
class Sender:
    """A machine and the mail server that it has.

    Attributes:
        machine: The machine.
        group: The SASL user of its group; empty for members of smtp-out, which log in nowhere.
        by_postfix: Postfix, not OpenSMTPD.
    """

    machine: LabMachine
    group: str
    by_postfix: bool

    def __str__(self) -> str:
        return self.machine.name

    def send(self, recipient: str, token: str) -> None:
        """What a program on the machine does that has something to say."""
        text = (
            f"Subject: {token}\nTo: {recipient}\n\nWhat a program on {self} has to say: {token}\n"
        )
        self.machine.run("sendmail", recipient, input=text)

    def waiting(self, recipient: str) -> str:
        """Why a mail waits in the queue.

        Raises:
            Failed: None waits that was tried.
        """
        if self.by_postfix:
            return self.machine.deferral(recipient)
        for row in self._rows():
            if recipient in row[5:8] and row[-1].strip():
                return row[-1]
        raise Failed(f"{self}: no mail for {recipient} waits")

    def has(self, recipient: str) -> bool:
        """Whether a mail is in the queue, whatever is done with it."""
        if self.by_postfix:
            return self.machine.queued(recipient) is not None
        return any(recipient in row[5:8] for row in self._rows())

    def _rows(self) -> list[list[str]]:
        """The queue of OpenSMTPD, as smtpctl(8) shows it."""
        return [
            line.split("|") for line in self.machine.run("smtpctl", "show", "queue").splitlines()
        ]

    def hurry(self) -> None:
        """Have what waits tried now."""
        if self.by_postfix:
            self.machine.hurry()
        else:
            self.machine.call("smtpctl", "schedule", "all")


def senders(ctx: Context) -> list[Sender]:
    """Every machine that the platform lets send its own mail."""
    found = []
    for machine in ctx.lab.machines:
        host = machine.host
        if host.has_postfix or host.has_null_client:
            logs_in = Role.SMTP_OUT not in host.roles
            group = ctx.platform.group_of(host) if logs_in else ""
            found.append(Sender(machine, group, host.has_postfix))
    return found


def _of_each_kind(ctx: Context) -> list[Sender]:
    """One of each group and role that logs in: the last, which is the nearest to nobody."""
    kinds = {(s.group, s.machine.host.main_role): s for s in senders(ctx) if s.group}
    return list(kinds.values())


@check("CLIENT-1", quick=True, long=True)
def machines_send_by_smtp_out(ctx: Context) -> str:
    """What any machine has to say leaves through smtp-out, with the login of its group, signed."""
    found = senders(ctx)
    expect(found, "no machine of the site data sends mail of its own")

    def look(sender: Sender) -> None:
        _to_the_outside(ctx, sender)
        _to_root(ctx, sender)

    each(found, look)
    forwarded = _forwards_leave_by_themselves(ctx)
    groups = sorted({sender.group for sender in found if sender.group})
    clients = [sender for sender in found if not sender.by_postfix]
    return (
        f"{len(found)} machines ({len(clients)} with OpenSMTPD): mail to root and to the outside "
        f"left through smtp-out as {', '.join(groups)}, from {ctx.platform.domain}, signed; "
        f"{forwarded}"
    )


def _to_the_outside(ctx: Context, sender: Sender) -> None:
    token = secrets.token_hex(8)
    recipient = f"{token}@{ctx.lab.world.domain('strict')}"
    sender.send(recipient, token)
    mail = ctx.lab.world.arrival("strict", recipient, PROMPT)
    _expect_ours(ctx, sender, mail)
    expect_signed(ctx, mail, mailauth.author_domain(mail.raw))
    verdict = mailauth.check_spf(ctx.lookup, mail.peer, mail.mail_from, mail.helo)
    expect(verdict.result == "pass", f"{sender}: SPF of {mail.mail_from}: {verdict.result}")


def _to_root(ctx: Context, sender: Sender) -> None:
    """Mail to root is read by people: it comes where mail to postmaster goes."""
    token = secrets.token_hex(8)
    sender.send("root", token)

    def arrived() -> Mail:
        copies = [c for c in ctx.lab.world.copies(token) if c.accepted]
        expect(copies, f"{sender}: mail to root did not arrive anywhere")
        return copies[0]

    mail = eventually(arrived, seconds=PROMPT, every=0.5)
    if sender.group:
        _expect_login(sender, mail)


def _expect_ours(ctx: Context, sender: Sender, mail: Mail) -> None:
    domain = mail.mail_from.rpartition("@")[2]
    own = ctx.platform.domain
    expect(
        domain == own or domain.endswith(f".{own}"),
        f"{sender}: the envelope sender is <{mail.mail_from}>, which is not in {own}",
    )
    if sender.group:
        expect(domain == own, f"{sender}: the envelope sender is <{mail.mail_from}>")
        _expect_login(sender, mail)
    expect(
        mail.helo == ctx.platform.names.smtp_out,
        f"{sender}: its mail was brought by {mail.helo} ({mail.peer}), not by smtp-out",
    )


def _expect_login(sender: Sender, mail: Mail) -> None:
    logins = _logins(mail)
    expect(
        logins == [sender.group],
        f"{sender}: smtp-out says that {' and '.join(logins) or 'nobody'} logged in, "
        f"not {sender.group}",
    )


def _logins(mail: Mail) -> list[str]:
    """The SASL users that smtp-out names in its Received lines."""
    text = "\n".join(mail.header("Received"))
    return re.findall(r"Authenticated sender: ([^)\s]+)", text)


def _forwards_leave_by_themselves(ctx: Context) -> str:
    """Mail that smtp-in forwards for others is none that the machine itself has to say."""
    members = smtp_in.members(ctx)
    if not members:
        return "no smtp-in"
    sender = ctx.lab.sender("careful")
    mail = smtp_in.write(sender, smtp_in.forward(ctx))
    door = smtp_in.remote_doors(ctx, sender)[0]
    with door.session(ctx) as session:
        session.ehlo()
        code, text = session.submit(mail.sender, [mail.recipient], mail.content)
        expect(code == 250, f"{door}: mail to {mail.recipient} is answered with {code} {text}")

    def arrived() -> list[Mail]:
        copies = [c for c in ctx.lab.world.copies(mail.token) if c.mx == "elsewhere"]
        expect(copies, f"{door.member.name}: a forward did not arrive")
        return copies

    for copy in eventually(arrived, seconds=PROMPT, every=0.5):
        expect(
            not _logins(copy) and copy.helo != ctx.platform.names.smtp_out,
            f"{door.member.name}: what it forwards leaves through smtp-out ({copy.helo})",
        )
    return f"what {door.member.name} forwards leaves by itself"


@check("CLIENT-2", disruptive=True)
def mail_waits_for_smtp_out(ctx: Context) -> str:
    """With no member of smtp-out to be reached mail waits on each machine, and leaves later."""
    found = _of_each_kind(ctx)
    world = ctx.lab.world
    sent = {str(s): secrets.token_hex(8) for s in found}

    def address(sender: Sender) -> str:
        return f"{sent[str(sender)]}@{world.domain('strict')}"

    def waits(sender: Sender) -> None:
        sender.send(address(sender), sent[str(sender)])
        eventually(lambda: sender.waiting(address(sender)), seconds=60, every=0.5)

    def leaves(sender: Sender) -> None:
        eventually(partial(_has_left, sender, address(sender)), seconds=120, every=2.0)
        world.arrival("strict", address(sender), PROMPT, poke=sender.hurry)

    with _smtp_out_stopped(ctx):
        each(found, waits)
        early = [str(s) for s in found if world.mails("strict", address(s))]
        expect(not early, f"{', '.join(early)}: mail left although smtp-out was stopped")
    each(found, leaves)
    for sender in found:
        copies = world.mails("strict", address(sender))
        expect(len(copies) == 1, f"{sender}: the mail that waited arrived {len(copies)} times")
    return f"mail of {', '.join(map(str, found))} waited there, and arrived once afterwards"


def _has_left(sender: Sender, recipient: str) -> None:
    sender.hurry()
    expect(not sender.has(recipient), f"{sender}: mail for {recipient} is still in the queue")


@contextmanager
def _smtp_out_stopped(ctx: Context) -> Iterator[None]:
    machines = [ctx.lab.machine(member) for member in ctx.members]
    try:
        for machine in machines:
            machine.run("systemctl", "stop", "postfix.service")
        yield
    finally:
        for machine in machines:
            machine.run("systemctl", "start", "postfix.service")


@check("CLIENT-3", quick=True)
def clients_are_closed(ctx: Context) -> str:
    """OpenSMTPD listens on localhost alone, and its daemon alone reads the login."""
    found = [sender for sender in senders(ctx) if sender.group]
    near = ctx.office or ctx.internet
    client = near.client()

    def look(sender: Sender) -> None:
        machine = sender.machine
        if not sender.by_postfix:
            _expect_local(machine)
            for address in (a for i in machine.host.interfaces for a in (i.ipv4, i.ipv6)):
                _expect_closed(client, machine.host, address)
        _expect_secret(machine, _SECRETS[not sender.by_postfix])

    each(found, look)
    clients = [sender for sender in found if not sender.by_postfix]
    return (
        f"{len(clients)} machines with OpenSMTPD listen on 127.0.0.1 and ::1, and nobody in "
        f"{near.place} reaches port {SMTP}; on {len(found)} the login is readable by root alone"
    )


def _expect_local(machine: LabMachine) -> None:
    """All sockets of smtpd(8) that listen are on loopback, and it does listen there."""
    rows = machine.run("ss", "-Hltnp").splitlines()
    local = [row.split()[3] for row in rows if '"smtpd"' in row]
    places = [place.rpartition(":") for place in local]
    found = {ip_address(host.strip("[]")) for host, _, port in places if int(port) == SMTP}
    expect(
        found >= {ip_address("127.0.0.1"), ip_address("::1")},
        f"{machine.name}: OpenSMTPD does not listen on localhost, but on {' '.join(local)}",
    )
    open_ = [
        place for place in local if not ip_address(place.rpartition(":")[0].strip("[]")).is_loopback
    ]
    expect(not open_, f"{machine.name}: OpenSMTPD listens on {' '.join(open_)}")


def _expect_closed(client: Client, host: Host, address: IPAddress) -> None:
    try:
        client.connect(address, SMTP, timeout=1.0).close()
    except OSError:
        return
    raise Failed(f"{host.name}: port {SMTP} answers at {address} from {client}")


def _expect_secret(machine: LabMachine, path: str) -> None:
    rights = machine.run("stat", "-c", "%U:%G %a", path).strip()
    expect(rights == "root:root 600", f"{machine.name}: {path} is {rights}, not root:root 600")
    other = machine.call(
        "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "cat", path
    )
    expect(other.returncode != 0, f"{machine.name}: everybody can read {path}")
