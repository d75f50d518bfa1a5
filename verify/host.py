"""HOST: what every machine must do, whatever its tier."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from shlex import quote

import dns.flags
import dns.rcode

from mailsite.bundle import compose
from mailsite.model import Host, Role
from mailsite.roles import webmail as webmail_role
from verify import addresses, host_state, maildrop, reachability, smtp_in, webmail
from verify.client import Client
from verify.context import Context, each, eventually, expect
from verify.lab import AGENT, LabMachine, RemoteSender
from verify.lookup import ask
from verify.registry import Failed, check
from verify.smtp import Letter, letter
from verify.smtp_out import Door, member_door, submit

RESOLVERS = ("127.0.0.1", "::1")


def _managed(ctx: Context) -> list[LabMachine]:
    return [m for m in ctx.lab.machines if m.host.is_managed]


@check("HOST-1", quick=True, alone=True, disturbs=("outside",))
def names_resolve_locally(ctx: Context) -> str:
    """Each host's own Unbound recurses and validates, and knows the internal names by itself."""
    machines = _managed(ctx)
    signed, bogus, unsigned = ctx.lab.world.example_names()

    def outside(machine: LabMachine) -> None:
        client = machine.observer.client()
        _expect_own_resolver(machine)
        for server in _resolvers(machine):
            answer = ask(client, server, signed, timeout=5.0, attempts=2)
            expect(answer.answer, f"{machine.name}: {signed} does not resolve at {server}")
            expect(
                answer.flags & dns.flags.AD,
                f"{machine.name}: {signed} is not validated at {server}",
            )
            forged = ask(client, server, bogus, timeout=5.0, attempts=2)
            expect(
                forged.rcode() == dns.rcode.SERVFAIL,
                f"{machine.name}: {bogus}, whose signatures are wrong, is answered with "
                f"{dns.rcode.to_text(forged.rcode())}",
            )
            plain = ask(client, server, unsigned, timeout=5.0, attempts=2)
            expect(
                plain.answer and not plain.flags & dns.flags.AD,
                f"{machine.name}: the unsigned {unsigned} does not resolve, or counts as signed",
            )
        missing = f"{secrets.token_hex(6)}.{signed}"
        nothing = ask(client, _resolvers(machine)[0], missing, timeout=5.0, attempts=2)
        expect(
            nothing.rcode() == dns.rcode.NXDOMAIN and nothing.flags & dns.flags.AD,
            f"{machine.name}: that {missing} does not exist is not validated",
        )

    with ctx.lab.providers_resolver_cut_off():
        each(machines, outside)
    names = _internal_names(ctx)

    def inside(machine: LabMachine) -> None:
        client = machine.observer.client()
        for name, kind, data in names:
            try:
                answer = ask(client, _resolvers(machine)[0], name, kind, timeout=3.0)
            except Failed as error:
                raise Failed(f"{machine.name}: with the outside cut off, {error}") from error
            found = {r.to_text() for rrset in answer.answer for r in rrset}
            expect(
                found == data,
                f"{machine.name}: with the outside cut off, {name} {kind} is "
                f"{' '.join(sorted(found)) or dns.rcode.to_text(answer.rcode())}, "
                f"not {' '.join(sorted(data))}",
            )
        _expect_cut(ctx, machine, client)

    with ctx.lab.outside_cut_off():
        each(machines, inside)
    return (
        f"{len(machines)} hosts: {signed} validated, {bogus} refused, {unsigned} resolved, "
        "non-existence proved, all without a provider's resolver; "
        f"{len({n for n, _, _ in names})} internal names resolve with the outside cut off"
    )


def _resolvers(machine: LabMachine) -> list[str]:
    """The addresses that the host's own programs ask (resolv.conf(5))."""
    lines = machine.run("cat", "/etc/resolv.conf").splitlines()
    return [line.split()[1] for line in lines if line.startswith("nameserver ")]


def _expect_own_resolver(machine: LabMachine) -> None:
    asked = _resolvers(machine)
    expect(
        asked and set(asked) <= set(RESOLVERS),
        f"{machine.name}: asks {' '.join(asked) or 'nobody'}, not its own resolver",
    )


def _expect_cut(ctx: Context, machine: LabMachine, client: Client) -> None:
    """A server outside does not answer: the outside is really cut off."""
    try:
        ask(client, ctx.lab.world.resolver, ctx.lab.world.example_names()[0], timeout=0.5)
    except Failed:
        return
    raise Failed(f"{machine.name}: the outside answers though it is cut off")


def _internal_names(ctx: Context) -> list[tuple[str, str, set[str]]]:
    """Every host's internal name and those of clusters, with what they must resolve to."""
    wanted = {h.name: ctx.internal(h) for h in ctx.platform.hosts.values()}
    for role in (Role.SMTP_OUT, Role.RSPAMD):
        legs = tuple(a for m in ctx.platform.members(role) for a in ctx.internal(m))
        if legs:
            wanted[f"{role}.{ctx.platform.internal_domain}"] = legs
    return [
        (name, kind, {str(a) for a in addresses if a.version == version})
        for name, addresses in wanted.items()
        for kind, version in (("A", 4), ("AAAA", 6))
    ]


@check("HOST-2", quick=True, calm=True)
def only_the_tiers_ports_answer(ctx: Context) -> str:
    """From anywhere only those ports answer that the host's tier serves to that place."""
    return reachability.probe_every_host(ctx)


@check("HOST-3", quick=True)
def machines_are_well(ctx: Context) -> str:
    """No unit has failed, no mail daemon warns, what runs is installed, and members are equal."""
    return host_state.read_the_books(ctx)


@check("HOST-6", disruptive=True)
def everything_comes_back(ctx: Context) -> str:
    """After a reboot of every machine, in an order that nobody chose, all services are back."""
    return host_state.reboot_every_machine(ctx)


@check(
    "HOST-4", quick=True, alone=True, disturbs=("files",), needs=("nginx_streams", "certificates")
)
def drift_is_reported(ctx: Context) -> str:
    """A fresh platform shows no drift; a file changed by hand is reported by name."""
    machines = list(ctx.lab.machines)

    def clean(machine: LabMachine) -> None:
        done = machine.call(AGENT, "drift")
        expect(
            done.returncode == 0,
            f"{machine.name}: drift on a fresh platform (exit {done.returncode}): "
            f"{done.stdout.strip() or done.stderr.strip()}",
        )

    each(machines, clean)
    changed = each(machines, lambda machine: _drifts(ctx, machine))
    each(machines, clean)
    paths = sorted({path for ways in changed for path in ways})
    return (
        f"{len(machines)} hosts clean; on each a changed, an opened and a removed file were "
        f"reported by name, and nothing else: {', '.join(paths)}"
    )


def _drifts(ctx: Context, machine: LabMachine) -> list[str]:
    """Change files by hand in three ways; each is reported, and nothing else."""
    bundle = compose(ctx.platform, ctx.platform.hosts[machine.name])
    paths = sorted(p for p in bundle.files if p.startswith("/etc/"))
    own = paths or sorted(bundle.files)
    ways = dict(zip(("content", "mode", "gone"), own, strict=False))
    with _by_hand(machine, ways):
        done = machine.call(AGENT, "drift")
        reported = done.stdout.splitlines()
        expect(
            done.returncode == 3,
            f"{machine.name}: {', '.join(ways.values())} changed by hand, but drift exits "
            f"{done.returncode}: {done.stdout.strip()}",
        )
        for path in ways.values():
            expect(
                any(path in line for line in reported),
                f"{machine.name}: drift does not name {path}: {' / '.join(reported)}",
            )
        expect(
            len(reported) == len(ways),
            f"{machine.name}: drift reports more than was changed: {' / '.join(reported)}",
        )
    return list(ways.values())


@contextmanager
def _by_hand(machine: LabMachine, ways: dict[str, str]) -> Iterator[None]:
    """Change a file's content, another's mode, and take a third away; put all back."""
    keep, change, restore = [], [], []
    for way, path in ways.items():
        file, kept = quote(path), quote(f"{path}.verify-kept")
        keep.append(f"cp -p -- {file} {kept}")
        restore.append(f"mv -f -- {kept} {file}")
        match way:
            case "content":
                change.append(f"echo >>{file}")
            case "mode":
                change.append(f"chmod g+w -- {file}")
            case _:
                change.append(f"rm -- {file}")

    def do(commands: list[str]) -> None:
        machine.run("sh", "-c", "; ".join(["set -e", *commands]))

    do(keep)
    try:
        do(change)
        yield
    finally:
        do(restore)


class Tier:
    """What a member of a tier must do when it comes back as a new machine.

    Attributes:
        role: The tier.
        packages: What its daemons need, among others.
    """

    role: Role
    packages: frozenset[str]

    def leave(self, ctx: Context, member: Host) -> str:
        """Have the member keep something that must survive. Returns what tells it."""
        raise NotImplementedError

    def find(self, ctx: Context, member: Host, left: str) -> None:
        """It is still there, and the member serves."""
        raise NotImplementedError

    def clear(self, ctx: Context) -> None:
        """Let the world be as before."""


class Outbound(Tier):
    """A mail waits in the queue for a remote that defers."""

    role = Role.SMTP_OUT
    packages = frozenset({"postfix", "opendkim", "dovecot-core"})

    def leave(self, ctx: Context, member: Host) -> str:
        world = ctx.lab.world
        world.set("flaky", "defer")
        mail = letter(f"{{token}}@{ctx.sending_domains[0]}", f"{{token}}@{world.domain('flaky')}")
        submit(ctx, member_door(ctx, member), mail)
        _expect_deferred(ctx.lab.machine(member), mail.recipient)
        return mail.recipient

    def find(self, ctx: Context, member: Host, left: str) -> None:
        lab = ctx.lab
        with lab.world.behaving("flaky", "accept"):
            lab.world.arrival("flaky", left, 60.0, poke=lab.machine(member).hurry)
        client = member_door(ctx, member).client
        for address in ctx.internal(member):
            mail = letter(
                f"{{token}}@{ctx.sending_domains[0]}", f"{{token}}@{lab.world.domain('strict')}"
            )
            submit(ctx, Door(client, member.name, address, member), mail)
            lab.world.arrival("strict", mail.recipient, 15.0)

    def clear(self, ctx: Context) -> None:
        ctx.lab.world.set("flaky", "defer")


class Inbound(Tier):
    """A mail waits in the queue for the end of a forward that defers."""

    role = Role.SMTP_IN
    packages = frozenset({"postfix", "postsrsd"})

    def leave(self, ctx: Context, member: Host) -> str:
        ctx.lab.world.set("elsewhere", "defer")
        sender = ctx.lab.sender("careful")
        mail = smtp_in.write(sender, smtp_in.forward(ctx))
        self._deliver(ctx, member, sender, mail)
        machine = ctx.lab.machine(member)
        way = addresses.way(ctx.platform, mail.recipient)
        assert way is not None
        for recipient in way.forwards:
            _expect_deferred(machine, recipient)
        return mail.token

    def find(self, ctx: Context, member: Host, left: str) -> None:
        lab = ctx.lab
        machine = lab.machine(member)

        def forwarded() -> None:
            machine.hurry()
            copies = [c for c in lab.world.copies(left) if c.mx == "elsewhere" and c.accepted]
            expect(copies, f"{member.name}: the forward that waited did not arrive")

        with lab.world.behaving("elsewhere", "accept"):
            eventually(forwarded, seconds=60, every=1.0)
        sender = lab.sender("careful")
        mail = smtp_in.write(sender, smtp_in.existing(ctx))
        self._deliver(ctx, member, sender, mail)

        def arrived() -> None:
            expect(lab.world.copies(mail.token), f"{member.name}: a mail did not arrive")

        eventually(arrived, seconds=15)

    def clear(self, ctx: Context) -> None:
        ctx.lab.world.set("elsewhere", "accept")

    @staticmethod
    def _deliver(ctx: Context, member: Host, sender: RemoteSender, mail: Letter) -> None:
        door = next(d for d in smtp_in.remote_doors(ctx, sender) if d.member is member)
        with door.session(ctx) as session:
            session.ehlo()
            code, text = session.submit(mail.sender, [mail.recipient], mail.content)
            expect(code == 250, f"{door}: mail to {mail.recipient} is answered with {code} {text}")


class Filter(Tier):
    """Its Redis joins the others again, and every mail server reaches the filter."""

    role = Role.RSPAMD
    packages = frozenset({"rspamd", "redis-server", "redis-sentinel"})

    def leave(self, ctx: Context, member: Host) -> str:
        return ""

    def find(self, ctx: Context, member: Host, left: str) -> None:
        machine = ctx.lab.machine(member)
        port = str(ctx.platform.spam.redis_port)

        def joined() -> None:
            told = machine.run("sh", "-c", _REPLICATION, port)
            expect(
                "role:master" in told or "master_link_status:up" in told,
                f"{member.name}: Redis is no copy of the writer's: {' '.join(told.split())[:300]}",
            )

        eventually(joined, seconds=30)
        clients = (*ctx.platform.members(Role.SMTP_IN), *ctx.platform.members(Role.SMTP_OUT))
        for host in clients:
            client = ctx.lab.machine(host).observer.client()
            for address in ctx.internal(member):
                client.connect(address, ctx.platform.spam.milter_port).close()


_REPLICATION = (
    "REDISCLI_AUTH=$(sed -n 's/^requirepass //p' /etc/redis/auth.conf)"
    ' redis-cli -p "$0" info replication'
)


class Mailboxes(Tier):
    """Its mail is still there, and both replicas are equal again."""

    role = Role.MAILDROP
    packages = frozenset({"postfix", "dovecot-core", "dovecot-imapd", "dovecot-lmtpd"})

    def leave(self, ctx: Context, member: Host) -> str:
        owner = maildrop.owners(ctx)[0]
        mail = maildrop.mail_for(ctx, owner)
        maildrop.hand_over(ctx, member, mail)
        return mail.token

    def find(self, ctx: Context, member: Host, left: str) -> None:
        owner = maildrop.owners(ctx)[0]
        mail = maildrop.mail_for(ctx, owner)
        maildrop.hand_over(ctx, member, mail)

        def complete(found: maildrop.Contents) -> None:
            names = " ".join(name for _, name, _ in found.mails)
            for token in (left, mail.token):
                expect(names.count(token) == 1, f"{member.name}: a mail of {owner.user} is lost")

        maildrop.await_equal(ctx, owner, complete, time.monotonic())


class Webmail(Tier):
    """What its users set is still there, and it shows its page."""

    role = Role.WEBMAIL
    packages = frozenset({"roundcube-core", webmail_role.FPM, "nginx"})

    def leave(self, ctx: Context, member: Host) -> str:
        token = secrets.token_hex(16)
        self._ask(ctx, member, f"insert into system values ('verify-{token}', 'kept')")
        return token

    def find(self, ctx: Context, member: Host, left: str) -> None:
        kept = self._ask(ctx, member, f"select value from system where name = 'verify-{left}'")
        expect(kept == "kept", f"{member.name}: Roundcube's database is not the one of before")
        self._ask(ctx, member, f"delete from system where name = 'verify-{left}'")
        client = ctx.lab.machine(ctx.frontends[0]).observer.client()
        for address in ctx.internal(member):
            webmail.expect_page(ctx, client, address, member.name)

    @staticmethod
    def _ask(ctx: Context, member: Host, statement: str) -> str:
        database = f"{webmail_role.DATA}/roundcube.sqlite"
        argv = ("runuser", "-u", "www-data", "--", "sqlite3", "-cmd", ".timeout 5000", database)
        return ctx.lab.machine(member).run(*argv, statement).strip()


TIERS: tuple[Tier, ...] = (Outbound(), Inbound(), Filter(), Mailboxes(), Webmail())


@check("HOST-5", disruptive=True)
def bare_machine_is_installed(ctx: Context) -> str:
    """A member of each tier, replaced by a bare Debian, is installed by the agent alone."""
    gone = [_Replaced(ctx, t) for t in TIERS if ctx.platform.members(t.role)]
    try:
        each(gone, lambda one: one.leave())
        # Of each cluster one: the others serve meanwhile.
        ctx.lab.replace_with_bare(*(one.member for one in gone))
        installed = each(gone, lambda one: one.find())
    finally:
        each(gone, lambda one: one.tier.clear(ctx))
    return (
        f"new machines from a bare Debian, installed by the agent: {'; '.join(installed)}; the data"
        " volumes and what lay on them survived; all serve"
    )


class _Replaced:
    """A member of a tier that becomes a new machine with the old data volume."""

    MARKER = "/srv/mail/verify-marker"

    def __init__(self, ctx: Context, tier: Tier) -> None:
        self._ctx, self.tier = ctx, tier
        self.member = ctx.platform.members(tier.role)[-1]
        self._text = secrets.token_hex(16)
        self._machine_id = self._left = ""

    def leave(self) -> None:
        """Have the old machine keep something that must survive."""
        machine = self._ctx.lab.machine(self.member)
        self._machine_id = machine.run("cat", "/etc/machine-id").strip()
        self._left = self.tier.leave(self._ctx, self.member)
        machine.run("sh", "-c", 'cat >"$1"', "sh", self.MARKER, input=self._text)

    def find(self) -> str:
        """It survived, and the new machine serves. Returns what the agent installed."""
        name, fresh = self.member.name, self._ctx.lab.machine(self.member)
        expect(
            fresh.run("cat", "/etc/machine-id").strip() != self._machine_id,
            f"{name} is still the same machine",
        )
        expect(fresh.run("cat", self.MARKER) == self._text, f"{name}: the data volume was not kept")
        installed = _packages_installed(self._ctx, fresh, self.tier.packages)
        self.tier.find(self._ctx, self.member, self._left)
        expect(fresh.call(AGENT, "drift").returncode == 0, f"{name}: drift after the install")
        fresh.run("rm", "-f", "--", self.MARKER)
        return f"{name} ({installed})"


def _expect_deferred(machine: LabMachine, recipient: str) -> None:
    eventually(lambda: machine.deferral(recipient), seconds=15, what="a mail that waits")


def _packages_installed(ctx: Context, machine: LabMachine, needed: frozenset[str]) -> str:
    """The role's packages, which the bare image lacks, with the log that says who put them in."""
    log = machine.call("cat", "/var/log/dpkg.log").stdout  # an image may have none
    wanted = compose(ctx.platform, machine.host).packages
    mine = [p for p in wanted if f" install {p}:" in log]
    expect(
        needed <= set(mine),
        f"{machine.name}: dpkg's log shows no installation of {', '.join(needed - set(mine))}",
    )
    return ", ".join(mine)
