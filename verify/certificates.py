"""CERT: the certificates that the platform shows, where they come from, how they are renewed."""

from __future__ import annotations

import datetime
import json
import re
import smtplib
import ssl
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mailsite.model import Host, IPAddress, Platform, Role
from verify import imap, maildrop, smtp
from verify.client import Client
from verify.context import Context, each, eventually, expect
from verify.registry import Failed, Skipped, check

if TYPE_CHECKING:
    from verify.lab import LabMachine

DAY = 86400.0
MARGIN_DAYS = 14
"""Where the operator gives the certificates and the site data names no margin."""
SPREAD = 60.0
"""Seconds in which a renewed certificate is shown everywhere (contract, CERT-2)."""
PROGRAM = "mail-certificates"
ISSUE = "mail-certificates-issue.service"

# Shakes hands with each listener as a client does that trusts the authorities on standard input
# and no others, and prints what it was shown.
_LOOK = """\
import json, smtplib, socket, ssl, sys
wanted = json.load(sys.stdin)
context = ssl.create_default_context(cadata=wanted["trust"])

def line(stream):
    return stream.readline().decode(errors="replace")

def shake(address, port, how, name):
    opened = socket.create_connection((address, port), 5)
    opened.settimeout(5)
    if how == "smtp":
        with smtplib.SMTP() as client:
            client.sock, client.file = opened, None
            client._host = name
            code, _ = client.getreply()
            client.ehlo("localhost")
            client.starttls(context=context)
            found = client.sock.getpeercert()
            client.ehlo("localhost")
            return found
    if how == "sieve":
        stream = opened.makefile("rb")
        while not line(stream).startswith("OK"):
            pass
        opened.sendall(b"STARTTLS\\r\\n")
        assert line(stream).startswith("OK")
    with context.wrap_socket(opened, server_hostname=name) as stream:
        return stream.getpeercert()

def told(at):
    try:
        return shake(*at)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

json.dump([told(at) for at in wanted["at"]], sys.stdout)
"""


@dataclass(frozen=True)
class Listener:
    """A port of a daemon that shows a certificate.

    Attributes:
        host: The machine that it runs on.
        port: Its port.
        how: ``tls``, or what comes before TLS: ``smtp``, ``sieve``.
        name: A name that clients or hops verify there.
    """

    host: Host
    port: int
    how: str
    name: str

    def __str__(self) -> str:
        return f"{self.host.name} port {self.port} as {self.name}"


@dataclass(frozen=True)
class Shown:
    """A certificate as a client sees it.

    Attributes:
        serial: Lower-case hexadecimal.
        names: Its alternative names.
        ends: Seconds since the epoch.
    """

    serial: str
    names: frozenset[str]
    ends: float


# -- CERT-1 -----------------------------------------------------------------------------------


@check(
    "CERT-1",
    quick=True,
    alone=True,
    disturbs=("certificates",),
    needs=("nginx_streams", "webmail", "outside"),
)
def certificates_are_where_they_are_needed(ctx: Context) -> str:
    """Certificates from ACME, with exactly the names that are verified, reach every host."""
    holders = _holders(ctx)
    trust = ctx.lab.outside.acme_root
    groups = each(by_host(listeners(ctx.platform)), lambda x: look(ctx, x, trust))
    shown = {listener: found for group in groups for listener, found in group.items()}
    serials = {found.serial for found in shown.values()}
    expect(len(serials) == 1, f"{len(serials)} certificates are shown: {', '.join(serials)}")
    names = next(iter(shown.values())).names
    _expect_exact(ctx.platform, names)
    hosts = {listener.host.name: listener.host for listener in shown}
    each(hosts.values(), lambda host: _expect_in_place(ctx, host, serials))
    machines = [ctx.lab.machine(h) for h in (*hosts.values(), *holders)]
    keys = sum(each(machines, lambda machine: _expect_guarded(ctx, machine), workers=4))
    fresh = ctx.lab.machine(next(iter(hosts.values())))
    with _away(ctx.lab.machine(holders[0])):
        taken = _pull_anew(fresh)
    expect({taken} == serials, f"a new host is given {taken} by {holders[1].name}")
    return (
        f"{len(shown)} listeners on {len(hosts)} hosts show one certificate of the ACME server for"
        f" {', '.join(sorted(names))}, verified by name; {keys} files with keys closed to others;"
        f" with {holders[0].name} away a host without any gets it from {holders[1].name}"
    )


def listeners(platform: Platform) -> list[Listener]:
    """Every port that shows a certificate, once for each name that is verified there."""
    names = platform.names
    found = [
        Listener(host, 587, "smtp", name)
        for host in platform.members(Role.SMTP_OUT)
        for name in (names.smtp_out, platform.submission_host)
    ]
    for host in platform.members(Role.SMTP_IN):
        found += [
            Listener(host, 25, "smtp", names.smtp_in),
            Listener(host, 465, "tls", names.smtp_in),
        ]
    for host in platform.replicas:
        inside, webmail = platform.maildrop_domain, platform.webmail_backend
        found += [
            Listener(host, 25, "smtp", inside),
            Listener(host, 465, "tls", inside),
            Listener(host, 993, "tls", names.imap),
            Listener(host, 993, "tls", webmail),
            Listener(host, 4190, "sieve", names.imap),
            Listener(host, 63301, "tls", host.name),
        ]
    if platform.webmail is not None:
        found += [
            Listener(host, 443, "tls", names.webmail) for host in platform.members(Role.WEBMAIL)
        ]
        found += [
            Listener(host, 443, "tls", name)
            for host in platform.members(Role.FRONTEND)
            for name in (names.webmail, platform.webmail_aliases[0])
        ]
    return found


def look(ctx: Context, wanted: Sequence[Listener], trust: str) -> dict[Listener, Shown]:
    """Shake hands with listeners of one host, from the machine itself.

    Args:
        ctx: The platform.
        wanted: Listeners of one host.
        trust: Authorities to trust and no others, PEM.

    Raises:
        Failed: One does not answer, or its certificate does not verify.
    """
    host = wanted[0].host
    order = {"trust": trust, "at": [["::1", x.port, x.how, x.name] for x in wanted]}
    done = ctx.lab.machine(host).call("python3", "-I", "-c", _LOOK, input=json.dumps(order))
    if done.returncode != 0:
        raise Failed(f"{host.name}: {done.stderr.strip()}")
    found = dict(zip(wanted, json.loads(done.stdout), strict=True))
    failed = [f"{x}: {told}" for x, told in found.items() if isinstance(told, str)]
    if failed:
        raise Failed("\n".join(failed))
    return {listener: shown_of(told) for listener, told in found.items()}


def by_host(found: Iterable[Listener]) -> list[list[Listener]]:
    """Listeners in groups, one for each host."""
    groups: dict[str, list[Listener]] = {}
    for listener in found:
        groups.setdefault(listener.host.name, []).append(listener)
    return list(groups.values())


def shown_of(certificate: dict[str, Any]) -> Shown:
    """What :meth:`ssl.SSLSocket.getpeercert` says."""
    return Shown(
        serial=str(certificate["serialNumber"]).lower(),
        names=frozenset(v for kind, v in certificate["subjectAltName"] if kind == "DNS"),
        ends=ssl.cert_time_to_seconds(str(certificate["notAfter"])),
    )


def _expect_exact(platform: Platform, names: Iterable[str]) -> None:
    """Each name of the certificate is for something, and none is missing."""
    verified = {listener.name for listener in listeners(platform)}
    for name in names:
        used = {v for v in verified if v == name or f"*.{v.partition('.')[2]}" == name}
        expect(used, f"the certificate is for {name}, which nobody verifies")
        verified -= used
    expect(not verified, f"the certificate is not for {', '.join(sorted(verified))}")


def _expect_in_place(ctx: Context, host: Host, serials: set[str]) -> None:
    found = json.loads(ctx.lab.machine(host).run(PROGRAM, "status"))
    expect(found["in_place"], f"{host.name}: its daemons' files are not those of its copy: {found}")
    expect(
        {str(found["serial"]).lower()} == serials,
        f"{host.name}: has {found['serial']} and shows {', '.join(serials)}",
    )


# Every file with a private key below the folders of certificates, and those with a token.
_KEYS = (
    "{ grep -rl -- 'PRIVATE KEY-----' /etc/certs /etc/mail-certificates /var/lib/mail-certificates"
    " /var/lib/private; ls -d /etc/mail-certificates/acme-*; } 2>/dev/null"
    " | xargs -r stat -c '%a %U %G %n'"
)


def _expect_guarded(ctx: Context, machine: LabMachine) -> int:
    """Keys are for root alone; a holder's copy is for the login that hands it out, too."""
    lines = machine.run("sh", "-c", _KEYS).splitlines()
    expect(lines, f"{machine.name}: no file with a key")
    for line in lines:
        mode, owner, group, path = line.split(maxsplit=3)
        handed_out = path == "/var/lib/mail-certificates/certificate.pem" and group == "mail-certs"
        allowed = 0o640 if handed_out else 0o600
        expect(
            int(mode, 8) & ~allowed == 0 and (owner == "root" or "/private/" in path),
            f"{machine.name}: {path} is {mode} {owner}:{group}",
        )
    return len(lines)


@contextmanager
def _away(holder: LabMachine) -> Iterator[None]:
    """A holder hands nothing out."""
    unit = "mail-certificates-sshd.service"
    holder.run("systemctl", "stop", unit)
    try:
        yield
    finally:
        holder.run("systemctl", "start", unit)


def _pull_anew(machine: LabMachine) -> str:
    """What a host gets that has nothing yet: it looks at empty folders. Returns the serial."""
    folders = "/var/lib/mail-certificates", "/etc/certs"
    mounts = " && ".join(f"mount -t tmpfs tmpfs {folder}" for folder in folders)
    done = machine.call(
        *("unshare", "--mount", "sh", "-c"),
        f"{mounts} && {PROGRAM} pull >&2 && {PROGRAM} status",
    )
    if done.returncode != 0:
        raise Failed(f"{machine.name}: a host that has none gets none: {done.stderr.strip()}")
    return str(json.loads(done.stdout)["serial"]).lower()


def _holders(ctx: Context) -> tuple[Host, ...]:
    if ctx.platform.certificates is None:
        raise Skipped("the operator gives the certificates: site.yaml has no 'certificates'")
    return ctx.platform.members(Role.CERTIFICATES)


# -- CERT-2 -----------------------------------------------------------------------------------


@check("CERT-2", alone=True)
def renewal_reaches_every_listener(ctx: Context) -> str:
    """A renewed certificate is shown everywhere within 60 s, and no session ends for it."""
    first = ctx.lab.machine(_holders(ctx)[0])
    trust = ctx.lab.outside.acme_root
    wanted = listeners(ctx.platform)
    old = next(iter(look(ctx, wanted[:1], trust).values())).serial
    with ExitStack() as stack:
        sessions = [*_sessions(ctx, stack)]
        began = time.monotonic()
        first.run(PROGRAM, "issue", "--force")
        issued = time.monotonic()
        new = str(json.loads(first.run(PROGRAM, "status"))["serial"]).lower()
        expect(new != old, f"{first.name}: the renewed certificate is the old one, {old}")
        groups = by_host(wanted)
        slowest = max(
            each(groups, lambda x: _until_new(ctx, x, trust, new, issued), workers=len(groups))
        )
        for what, session in sessions:
            _expect_alive(what, session)
    return (
        f"issued in {issued - began:.0f} s; {len(wanted)} listeners show {new[:12]} after"
        f" {slowest:.0f} s at the latest; {len(sessions)} sessions of before go on:"
        f" {', '.join(what for what, _ in sessions)}"
    )


def _until_new(
    ctx: Context, wanted: Sequence[Listener], trust: str, new: str, since: float
) -> float:
    """Wait for all listeners of a host to show ``new``. Returns the seconds since ``since``."""

    def shows() -> None:
        for listener, found in look(ctx, wanted, trust).items():
            expect(found.serial == new, f"{listener}: still shows {found.serial}")

    eventually(shows, seconds=max(1.0, since + SPREAD - time.monotonic()), every=2.0)
    return time.monotonic() - since


Session = smtp.Session | imap.Session


def _sessions(ctx: Context, stack: ExitStack) -> Iterator[tuple[str, Session]]:
    """Sessions with TLS: through a frontend, and to the MX."""
    names, tls = ctx.platform.names, ctx.tls()
    door = ctx.doors[0][1]
    owner = maildrop.owners(ctx)[0]
    reader = imap.Session(ctx.internet.client(), door, 993, tls=tls, name=names.imap, timeout=60)
    stack.enter_context(reader)
    reader.enter(owner.user, owner.password)
    yield "IMAP", reader
    for what, address, port, name in (
        ("submission", door, 587, names.smtp_out),
        ("MX", ctx.public(ctx.platform.members(Role.SMTP_IN)[0])[0], 25, names.smtp_in),
    ):
        sender = smtp.Session(ctx.internet.client(), address, port, timeout=60)
        stack.enter_context(sender)
        sender.secure(tls, name)
        yield what, sender


def _expect_alive(what: str, session: Session) -> None:
    try:
        answer = session.noop()
    except (OSError, smtplib.SMTPException, imap.Error) as error:
        raise Failed(f"the {what} session of before the renewal has ended: {error}") from error
    expect(answer[0] in (250, "OK"), f"the {what} session of before answers {answer}")


# -- CERT-3 -----------------------------------------------------------------------------------


@check("CERT-3", live=True)
def no_certificate_ends_soon(ctx: Context) -> str:
    """No certificate that clients meet ends within the site's margin, and renewals succeed."""
    settings = ctx.platform.certificates
    margin = settings.margin_days if settings else MARGIN_DAYS
    found = each(_public(ctx), partial(_days_left, ctx))
    for where, left in found:
        expect(left > margin, f"{where}: its certificate ends in {left:.1f} days, not {margin}")
    if settings is not None and not ctx.is_live:
        each(_holders(ctx), lambda host: _expect_no_failed_renewal(ctx.lab.machine(host)))
    soonest = min(left for _, left in found)
    return f"{len(found)} public listeners; the certificate that ends first has {soonest:.0f} days"


@dataclass(frozen=True)
class _Door:
    """A port that clients on the internet meet."""

    where: str
    address: IPAddress
    port: int
    how: str
    name: str


def _public(ctx: Context) -> list[_Door]:
    names, platform = ctx.platform.names, ctx.platform
    found = []
    for host, address in ctx.doors:
        found.append(_Door(host, address, 587, "smtp", names.smtp_out))
        if platform.replicas:
            found.append(_Door(host, address, 993, "tls", names.imap))
    for member in platform.members(Role.SMTP_IN):
        for address in ctx.public(member):
            found.append(_Door(member.name, address, 25, "smtp", names.smtp_in))
            found.append(_Door(member.name, address, 465, "tls", names.smtp_in))
    return found


def _days_left(ctx: Context, door: _Door) -> tuple[str, float]:
    where = f"{door.where} [{door.address}]:{door.port}"
    shown = _met(ctx.internet.client(), door, ctx.tls(), where)
    return where, (shown.ends - datetime.datetime.now(datetime.UTC).timestamp()) / DAY


def _met(client: Client, door: _Door, tls: ssl.SSLContext, where: str) -> Shown:
    try:
        if door.how == "smtp":
            with smtp.Session(client, door.address, door.port) as session:
                return shown_of(dict(session.secure(tls, door.name).getpeercert() or {}))
        with tls.wrap_socket(
            client.connect(door.address, door.port), server_hostname=door.name
        ) as stream:
            return shown_of(dict(stream.getpeercert() or {}))
    except ssl.SSLCertVerificationError as error:
        raise Failed(f"{where}: {error.verify_message} (wanted {door.name})") from error


def _expect_no_failed_renewal(machine: LabMachine) -> None:
    state = machine.call("systemctl", "is-failed", ISSUE).stdout.strip()
    if state != "failed":
        return
    said = machine.run("journalctl", "-u", ISSUE, "-n", "8", "-o", "cat", "--no-pager")
    lines = [line for line in said.splitlines() if re.match(PROGRAM, line)]
    with suppress(IndexError):
        said = lines[-1]
    raise Failed(f"{machine.name}: the last renewal failed: {said}; see docs/certificates.md")
