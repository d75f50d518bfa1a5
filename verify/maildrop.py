"""BOX: what owners of mailboxes see of them, and what the two replicas promise each other."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from socket import AF_INET, AF_INET6, SOCK_DGRAM
from typing import Any

from mailsite.model import Host, IPAddress, Mailbox, Role
from mailsite.roles.postfix import certificate_path
from verify import addresses, imap, managesieve, smtp_in, smtp_out
from verify.client import Client, Observer
from verify.context import Context, each, eventually, expect
from verify.imap import IMAPS
from verify.mailbox import MAILBOXES
from verify.managesieve import MANAGESIEVE
from verify.passwords import mailbox_password
from verify.registry import Failed, Skipped, check
from verify.smtp import Letter, Session, letter

IMAP = 143
SMTP = 25
REACH = 2.0
"""Seconds after which a packet filter has answered, if only by silence."""
PROMPT = 20.0
"""Seconds in which a mail that nothing holds up is where it belongs."""
EQUAL = 15.0
"""Seconds after the end of a disturbance in which both replicas are equal again (contract)."""
HOMES = "/var/dovecot/users"
FOLDERS = frozenset({"INBOX", "Drafts", "Sent", "Junk", "Trash", "Archive"})


@dataclass(frozen=True)
class Owner:
    """A mailbox and the password of its owner."""

    user: str
    password: str = field(repr=False)


def owners(ctx: Context) -> list[Owner]:
    """Those who may log in. On a live platform the probe alone.

    Raises:
        Skipped: There is nobody.
    """
    boxes = [box.name for box in ctx.platform.mailboxes.values() if not box.suspended]
    if ctx.is_live:
        if ctx.probe.user not in boxes:
            raise Skipped(f"the probe account {ctx.probe.user} has no mailbox: name one that has")
        return [Owner(ctx.probe.user, ctx.probe.password)]
    if not boxes:
        raise Skipped("the site data has no mailbox whose owner may log in")
    return [Owner(name, mailbox_password(ctx.state, name)) for name in boxes]


@dataclass(frozen=True)
class Door:
    """A way to the mailboxes: who connects, and to which address.

    Attributes:
        replica: The host behind it where it is reached directly; None behind a frontend.
    """

    client: Client
    name: str
    address: IPAddress
    replica: Host | None = None

    def session(self, ctx: Context, timeout: float = 10.0) -> imap.Session:
        return imap.Session(
            self.client,
            self.address,
            IMAPS,
            tls=ctx.tls(),
            name=ctx.platform.names.imap,
            timeout=timeout,
        )

    def enter(self, ctx: Context, owner: Owner) -> imap.Session:
        """A session that is logged in."""
        session = self.session(ctx)
        try:
            session.enter(owner.user, owner.password)
        except BaseException:
            session.shutdown()
            raise
        return session

    def filters(self, ctx: Context, owner: Owner) -> managesieve.Session:
        """A session of ManageSieve that is logged in."""
        session = managesieve.Session(self.client, self.address)
        try:
            session.secure(ctx.tls(), ctx.platform.names.imap)
            reply = session.authenticate(owner.user, owner.password)
            expect(reply.verdict == "OK", f"{self}: the right password: {reply.text}")
        except BaseException:
            session.__exit__(None, None, None)
            raise
        return session

    def __str__(self) -> str:
        return f"{self.name} [{self.address}] from {self.client.place}"


def frontend_doors(ctx: Context, observer: Observer | None = None) -> list[Door]:
    """Every frontend address in each family, each with a client of its own."""
    place = observer or ctx.internet
    return [Door(place.client(), name, address) for name, address in ctx.doors]


def replicas(ctx: Context) -> tuple[Host, ...]:
    """Both hosts of the mailboxes, the primary first.

    Raises:
        Skipped: The site has none.
    """
    if not ctx.platform.replicas:
        raise Skipped("the site data has no host with the role 'maildrop'")
    return ctx.platform.replicas


def replica_doors(ctx: Context) -> list[Door]:
    """Every replica's internal address in each family, from a site-local network."""
    if ctx.local is None:
        return []
    client = ctx.local.client()
    return [Door(client, r.name, a, r) for r in replicas(ctx) for a in ctx.internal(r)]


def direct(ctx: Context, replica: Host) -> Door:
    """A replica's first internal address, from a site-local network, for who has the password."""
    if ctx.local is None:
        raise Skipped("needs an observer in a site-local network")
    return Door(ctx.local.resident(), replica.name, ctx.internal(replica)[0], replica)


def _workers(ctx: Context) -> int:
    """Sessions side by side: few where all of them come from one address."""
    return 1 if ctx.is_live else 16


# -- BOX-1 --------------------------------------------------------------------------------------


@check("BOX-1", live=True)
def owners_read_their_mail(ctx: Context) -> str:
    """IMAPS on 993 through the public name: the right password opens, a wrong one does not."""
    name = ctx.platform.names.imap
    behind = {a for _, a in ctx.doors}
    resolved = ctx.lookup.addresses(name)
    expect(
        resolved == behind,
        f"{name} resolves to {_sorted(resolved)}, the frontends have {_sorted(behind)}",
    )
    owner = owners(ctx)[0]

    def right(door: Door) -> None:
        with door.enter(ctx, owner) as session:
            version = session.tls_version
            expect(version in ("TLSv1.2", "TLSv1.3"), f"{door}: speaks {version or 'no TLS'}")
            missing = FOLDERS - {folder.name for folder in session.folders()}
            expect(not missing, f"{door}: {owner.user} has no {', '.join(sorted(missing))}")

    def wrong(door: Door) -> None:
        with door.session(ctx) as session:
            try:
                session.login(owner.user, secrets.token_hex(8))
            except imap.Error as error:
                expect("AUTHENTICATIONFAILED" in str(error), f"{door}: a wrong password: {error}")
            else:
                raise Failed(f"{door}: a wrong password opens the mailbox {owner.user}")

    def closed(door: Door) -> None:
        _expect_closed(door.client, door.address, IMAP, f"{door}: port {IMAP}")

    # Dovecot makes an address that was wrong wait: those that try have addresses of their own.
    inner = replica_doors(ctx)
    ways = [(right, d) for d in (*frontend_doors(ctx), *inner)]
    ways += [(wrong, d) for d in (*frontend_doors(ctx), *replica_doors(ctx)[:1])]
    ways += [(closed, d) for d in (*frontend_doors(ctx), *inner)]
    each(ways, lambda way: way[0](way[1]), workers=_workers(ctx))
    directly = (
        f"{len(inner)} addresses of {len(replicas(ctx))} replicas"
        if ctx.local
        else "no replica directly from here"
    )
    return (
        f"{name}: {len(ctx.doors)} frontend addresses and {directly}: the right password opens"
        f" the mailbox with its folders, a wrong one does not; certificate verified; {IMAP} closed"
    )


def _expect_closed(client: Client, address: IPAddress, port: int, what: str) -> None:
    try:
        client.connect(address, port, timeout=REACH).close()
    except OSError:
        return
    raise Failed(f"{what} answers")


def _sorted(found: set[IPAddress]) -> str:
    return " ".join(sorted(str(a) for a in found)) or "nothing"


# -- Mail for one replica -----------------------------------------------------------------------


def hand_over(ctx: Context, replica: Host, mail: Letter) -> None:
    """Give a mail to one replica, as smtp-in does: from there, over TLS.

    Raises:
        Failed: It is not accepted.
    """
    place = ctx.lab.machine(ctx.platform.members(Role.SMTP_IN)[0])
    address = ctx.internal(replica)[0]
    with Session(place.observer.client(), address, SMTP, say=ctx.say, helo=place.name) as session:
        session.secure(ctx.tls(), ctx.platform.maildrop_domain)
        code, text = session.submit(mail.sender, [mail.recipient], mail.content)
        expect(code == 250, f"{replica.name}: mail to {mail.recipient}: {code} {text}")


def mail_for(ctx: Context, owner: Owner, extension: str = "") -> Letter:
    """A mail that is addressed to the mailbox itself, which smtp-in alone may do."""
    domain = ctx.platform.maildrop_domain
    tag = f"+{extension}" if extension else ""
    return letter(f"{{token}}@{ctx.lab.sender('careful').domain}", f"{owner.user}{tag}@{domain}")


def through_the_mx(ctx: Context, user: str) -> Letter:
    """A mail from outside to an address that leads to the mailbox ``user`` alone.

    Raises:
        Skipped: There is none.
    """
    sender = ctx.lab.sender("careful")
    mail = smtp_in.write(sender, address_of(ctx, user))
    door = smtp_in.remote_doors(ctx, sender)[0]
    with door.session(ctx) as session:
        session.ehlo()
        code, text = session.submit(mail.sender, [mail.recipient], mail.content)
        expect(code == 250, f"{door}: mail to {mail.recipient} is answered with {code} {text}")
    return mail


def address_of(ctx: Context, user: str) -> str:
    """An address of the site that leads to the mailbox ``user`` alone.

    Raises:
        Skipped: There is none.
    """
    for domain in addresses.receiving(ctx.platform):
        for local in addresses.users(ctx.platform, domain):
            way = addresses.way(ctx.platform, f"{local}@{domain.name}")
            if way is not None and not way.forwards and len(way.mailboxes) == 1:
                (mailbox,) = way.mailboxes
                if re.split(r"[+@]", mailbox)[0] == user:
                    return f"{local}@{domain.name}"
    raise Skipped(f"no address of the site data leads to the mailbox {user} alone")


# -- BOX-2 --------------------------------------------------------------------------------------


@check("BOX-2", quick=True)
def mail_lies_below_its_home(ctx: Context) -> str:
    """Mail comes by LMTP into mdbox below the user's home, and all files there are vmail's."""
    lab = ctx.lab
    owner = owners(ctx)[0]
    mail = through_the_mx(ctx, owner.user)

    def arrived() -> str:
        found = [m for m in lab.world.copies(mail.token) if m.mx == MAILBOXES]
        expect(found, f"mail to {mail.recipient} is in no mailbox")
        return " ".join(found[0].header("Received")[0].split())

    received = eventually(arrived, seconds=PROMPT)
    expect("with LMTP" in received, f"the mail came in another way than LMTP: {received}")
    home = f"{HOMES}/{owner.user}"

    def lies(replica: Host) -> int:
        machine = lab.machine(replica)
        files = machine.call(
            "grep", "-rlF", "--include=m.*", mail.token, f"{home}/mdbox/storage"
        ).stdout.split()
        expect(files, f"{replica.name}: no mdbox file below {home} has the mail")
        strangers = machine.run(
            "find", home, "(", "!", "-user", "vmail", "-o", "!", "-group", "vmail", ")"
        ).split()
        expect(not strangers, f"{replica.name}: not vmail's: {', '.join(strangers[:5])}")
        return len(machine.run("find", home).split())

    counts = each(replicas(ctx), lambda r: eventually(lambda: lies(r), seconds=EQUAL))
    return (
        f"a mail from outside lies in {home}/mdbox on {len(counts)} replicas, delivered by LMTP;"
        f" all {', '.join(map(str, counts))} files there are vmail's"
    )


# -- BOX-3 --------------------------------------------------------------------------------------


@dataclass
class Lags:
    """Seconds from a change on one replica until the other shows it."""

    mails: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return f"mails {_percentiles(self.mails)}; other changes {_percentiles(self.others)}"


def _percentiles(lags: list[float]) -> str:
    ordered = sorted(lags)
    picked = (ordered[min(len(ordered) - 1, int(len(ordered) * p))] for p in (0.5, 0.95, 0.99))
    p50, p95, p99 = picked
    return f"p50 {p50:.2f} s, p95 {p95:.2f} s, p99 {p99:.2f} s of {len(ordered)}"


ROUNDS = 3
LOST = 60.0
"""Seconds after which a change is taken for lost; what the lag may be depends on the machine."""


@check("BOX-3", quick=True, long=True)
def replicas_are_equal_at_once(ctx: Context) -> str:
    """Every sort of change on one replica is on the other within seconds, in both directions."""
    known = owners(ctx)
    first, second = replicas(ctx)
    lags = Lags()
    ways = [(first, second, known[0]), (second, first, known[-1])]
    each(ways, lambda way: _follow(ctx, *way, lags))
    return (
        f"mail, flag, keyword, move, delete, folder made, renamed and removed, subscription and"
        f" script, {ROUNDS} rounds in each direction, seen by polling every 20 ms: {lags}"
    )


def _follow(ctx: Context, here: Host, there: Host, owner: Owner, lags: Lags) -> None:
    """Make changes on ``here``, one after the other, and see each on ``there``."""
    with direct(ctx, here).enter(ctx, owner) as act, direct(ctx, there).enter(ctx, owner) as look:
        for _ in range(ROUNDS):
            _follow_folder(ctx, here, there, owner, act, look, lags)
        with (
            direct(ctx, here).filters(ctx, owner) as scripts,
            direct(ctx, there).filters(ctx, owner) as others,
        ):
            _follow_script(there, scripts, others, lags)


def _seen(what: str, lags: list[float], look: Callable[[], object]) -> None:
    """Wait for a change to be seen, and note how long that took."""
    began = time.monotonic()
    eventually(
        lambda: expect(look(), "the change is not there"), seconds=LOST, every=0.02, what=what
    )
    lags.append(time.monotonic() - began)


def _follow_folder(
    ctx: Context,
    here: Host,
    there: Host,
    owner: Owner,
    act: imap.Session,
    look: imap.Session,
    lags: Lags,
) -> None:
    folder = f"probe-{secrets.token_hex(6)}"
    other, renamed = f"{folder}-other", f"{folder}-renamed"
    at = f"{there.name}, mailbox {owner.user}, after a change on {here.name}"

    def names() -> set[str]:
        return {f.name for f in look.folders()}

    def fetched(items: str) -> bytes:
        look.noop()
        return b" ".join(_parts(look.fetch("1:*", items)[1]))

    def count(name: str) -> int:
        data = look.told("STATUS", look.status(name, "(MESSAGES)"))
        found = re.search(rb"MESSAGES (\d+)", data[0] or b"")
        return int(found[1]) if found else -1

    act.make(folder)
    _seen(f"{at}: a new folder", lags.others, lambda: folder in names())
    act.told("SUBSCRIBE", act.subscribe(folder))
    _seen(f"{at}: a subscription", lags.others, lambda: _subscribed(look, folder))
    # What is addressed to user+folder is filed there.
    mail = mail_for(ctx, owner, folder)
    hand_over(ctx, here, mail)
    _seen(f"{at}: a mail", lags.mails, lambda: count(folder) == 1)
    look.look_into(folder)
    act.look_into(folder, readonly=False)
    act.told("STORE", act.store("1", "+FLAGS", r"(\Flagged)"))
    _seen(f"{at}: a flag", lags.others, lambda: rb"\Flagged" in fetched("(FLAGS)"))
    act.told("STORE", act.store("1", "+FLAGS", "(probed)"))
    _seen(f"{at}: a keyword", lags.others, lambda: b"probed" in fetched("(FLAGS)"))
    look.close()
    act.make(other)
    _seen(f"{at}: another folder", lags.others, lambda: other in names())
    act.told("MOVE", act.xatom("MOVE", "1", other))
    _seen(f"{at}: a move", lags.others, lambda: (count(folder), count(other)) == (0, 1))
    look.look_into(other)
    body = b" ".join(_parts(look.fetch("1", "(FLAGS BODY.PEEK[])")[1]))
    expect(mail.token.encode() in body, f"{at}: the mail that was moved is another one")
    expect(rb"\Flagged" in body and b"probed" in body, f"{at}: a move loses flags: {body[:200]!r}")
    look.close()
    act.look_into(other, readonly=False)
    act.told("STORE", act.store("1", "+FLAGS.SILENT", r"(\Deleted)"))
    act.told("EXPUNGE", act.expunge())
    _seen(f"{at}: a delete", lags.others, lambda: count(other) == 0)
    act.close()
    act.told("RENAME", act.rename(other, renamed))
    _seen(f"{at}: a renamed folder", lags.others, lambda: names() & {renamed, other} == {renamed})
    act.told("UNSUBSCRIBE", act.unsubscribe(folder))
    for name in (renamed, folder):
        act.told("DELETE", act.delete(name))
        _seen(f"{at}: a removed folder", lags.others, lambda name=name: name not in names())  # type: ignore[misc]


def _parts(data: object) -> Iterator[bytes]:
    """All bytes of an answer to FETCH."""
    for part in data if isinstance(data, list) else []:
        if isinstance(part, bytes):
            yield part
        elif isinstance(part, tuple):
            yield from part


def _subscribed(session: imap.Session, folder: str) -> bool:
    return any(folder.encode() in (line or b"") for line in session.lsub('""', folder)[1])


def _follow_script(
    there: Host, scripts: managesieve.Session, others: managesieve.Session, lags: Lags
) -> None:
    name = f"probe-{secrets.token_hex(6)}"
    before = scripts.scripts()
    reply = scripts.put(name, 'require "fileinto";\nkeep;\n')
    expect(reply.verdict == "OK", f"a script is refused: {reply.text}")
    _seen(f"{there.name}: a script", lags.others, lambda: name in others.scripts())
    scripts.activate(name)
    _seen(f"{there.name}: an active script", lags.others, lambda: others.scripts().get(name))
    _next_second()
    scripts.activate("")
    _seen(f"{there.name}: no active script", lags.others, lambda: not others.scripts().get(name))
    scripts.delete(name)
    _seen(f"{there.name}: a deleted script", lags.others, lambda: name not in others.scripts())
    # The platform's default is active again by itself, a user's own script is not.
    own = next((script for script, active in before.items() if active), "")
    if own and not scripts.scripts().get(own):
        _next_second()
        scripts.activate(own)
        _seen(f"{there.name}: {own} active", lags.others, lambda: others.scripts().get(own))
    _expect_scripts(scripts, before)


def _expect_scripts(scripts: managesieve.Session, before: Mapping[str, bool]) -> None:
    """All scripts are as they were, and the same one is active."""

    def as_before() -> None:
        after = scripts.scripts()
        expect(after == before, f"scripts before: {before}, afterwards: {after}")

    # A sync that is under way brings back what is deleted meanwhile; the next one knows.
    eventually(as_before, seconds=15)


def _next_second() -> None:
    """A sync compares whole seconds: of two changes in one the newer is not known."""
    second = int(time.time())
    eventually(lambda: expect(time.time() >= second + 1, "the second is not over"), seconds=2)


# -- BOX-5 --------------------------------------------------------------------------------------


# Not beside BOX-3, which measures how long changes take: a folder that goes while a sync carries it
# breaks the sync off.
@check("BOX-5", quick=True, disturbs=("maildrop",))
def filters_file_mail(ctx: Context) -> str:
    """A user's script files mail, those before and after it run, and a bad one is refused."""
    owner = owners(ctx)[-1]
    replica = replicas(ctx)[0]
    place = editor(ctx)
    door = frontend_doors(ctx, place)[0]
    with door.filters(ctx, owner) as scripts, direct(ctx, replica).enter(ctx, owner) as session:
        before = scripts.scripts()
        mine = [name for name, active in before.items() if active and name != "default"]
        expect(not mine, f"the mailbox {owner.user} has a script of its own already: {mine}")
        said = _bad_script_is_refused(scripts)
        tagged = _tagged(mail_for(ctx, owner))
        hand_over(ctx, replica, tagged)
        keywords = _filed(session, "Junk", tagged)
        expect("$Junk" in keywords, f"tagged mail has the keywords {keywords}, and not $Junk")
        _own_script_runs(ctx, replica, owner, scripts, session)
        _expect_scripts(scripts, before)
    return (
        f"through {door}: a script of {owner.user} files mail into a folder; tagged mail gets $Junk"
        " before it, and goes into Junk by the default where there is none; after it user+tag goes"
        f" into the folder of that name; a bad script is refused: {said}"
    )


def editor(ctx: Context) -> Observer:
    """Somebody in a network from which filters may be edited."""
    if ctx.office is None or not _may_edit(ctx, ctx.office.client()):
        raise Skipped("the office is in no network that maildrop.managesieve in site.yaml lists")
    return ctx.office


def _may_edit(ctx: Context, client: Client) -> bool:
    sources = [client.ipv4, client.ipv6]
    allowed = ctx.platform.maildrop.managesieve if ctx.platform.maildrop else ()
    return all(
        any(s in network for network in allowed if network.version == s.version)
        for s in sources
        if s is not None
    )


def _bad_script_is_refused(scripts: managesieve.Session) -> str:
    name = f"probe-{secrets.token_hex(6)}"
    reply = scripts.put(name, 'require "fileinto";\nfileinto;\n')
    expect(reply.verdict == "NO", f"a script with a mistake is answered with {reply.verdict}")
    expect("line 2" in reply.text, f"a bad script is refused without its line: {reply.text}")
    expect(name not in scripts.scripts(), "a script that was refused is kept")
    return " ".join(reply.text.split())[:120]


def _tagged(mail: Letter) -> Letter:
    """The same as the spam filter passes it on when it has doubts."""
    return replace(mail, content=b"X-Spam: Yes\r\n" + mail.content)


def _filed(session: imap.Session, folder: str, mail: Letter) -> list[str]:
    """Wait for the mail to be in a folder. Returns its flags and keywords."""

    def look() -> list[str]:
        session.look_into(folder)
        found = session.told("SEARCH", session.search(None, "HEADER", "X-Probe", mail.token))
        numbers = (found[0] or b"").split()
        expect(len(numbers) == 1, f"{len(numbers)} copies of a mail are in {folder}, not 1")
        flags = b" ".join(_parts(session.fetch(numbers[0].decode(), "(FLAGS)")[1]))
        session.close()
        return re.findall(r"[\\$\w]+", flags.decode("ascii", "replace"))

    return eventually(look, seconds=PROMPT, what=f"a mail in {folder}")


def _own_script_runs(
    ctx: Context,
    replica: Host,
    owner: Owner,
    scripts: managesieve.Session,
    session: imap.Session,
) -> None:
    """A script of one's own, with the platform's before and after it."""
    unique = secrets.token_hex(6)
    name, folder, tag = f"probe-{unique}", f"probe-{unique}-mine", f"probe-{unique}-tag"
    mails = {"mine": mail_for(ctx, owner), "tag": mail_for(ctx, owner, tag)}
    script = (
        'require ["fileinto", "mailbox", "include"];\n'
        f'if header :is "X-Probe" "{mails["mine"].token}" {{\n'
        f'    fileinto :create "{folder}";\n    stop;\n}}\n'
        'include :global "default";\n'
    )
    reply = scripts.put(name, script)
    expect(reply.verdict == "OK", f"a script is refused: {reply.text}")
    try:
        scripts.activate(name)
        session.make(tag)
        for mail, where in ((_tagged(mails["mine"]), folder), (mails["tag"], tag)):
            hand_over(ctx, replica, mail)
            keywords = _filed(session, where, mail)
            wanted = mail.content.startswith(b"X-Spam")
            expect(("$Junk" in keywords) is wanted, f"a mail in {where} has {keywords}")
        spam = _tagged(mail_for(ctx, owner))
        hand_over(ctx, replica, spam)
        _filed(session, "Junk", spam)
    finally:
        scripts.activate("")
        scripts.delete(name)
        for made in (folder, tag):
            session.delete(made)


# -- BOX-6 --------------------------------------------------------------------------------------


@check("BOX-6", live=True)
def few_edit_filters(ctx: Context) -> str:
    """ManageSieve answers the networks of the site data, and nobody else."""
    replicas(ctx)
    allowed = ctx.platform.maildrop.managesieve if ctx.platform.maildrop else ()

    def look(door: Door) -> bool:
        source = door.client.source(door.address) or _own_address(door)
        may = any(source in n for n in allowed if n.version == source.version)
        answered = _greets(door)
        expect(
            answered is may,
            f"{door}: port {MANAGESIEVE} {'greets' if answered else 'does not greet'} {source},"
            f" which the site data {'lists' if may else 'does not list'}",
        )
        return may

    # From a site-local network a frontend is behind a NAT; there one goes to the replicas.
    places = [o for o in (ctx.internet, ctx.office) if o is not None]
    doors = [d for place in places for d in frontend_doors(ctx, place)]
    if not ctx.is_live:
        doors += replica_doors(ctx)
    served = each(doors, look, workers=_workers(ctx))
    expect(not all(served), "every place of the check is in a network of the site data")
    expect(ctx.is_live or any(served), "no place of the check is in a network of the site data")
    return (
        f"port {MANAGESIEVE} greets on {sum(served)} ways from {', '.join(map(str, allowed))}, and"
        f" on none of {len(served) - sum(served)} from elsewhere"
    )


def _greets(door: Door) -> bool:
    try:
        with managesieve.Session(door.client, door.address, timeout=REACH + 1):
            return True
    except OSError:
        return False


def _own_address(door: Door) -> IPAddress:
    """The address that the place connects from, as its kernel chooses it."""
    kind = AF_INET if door.address.version == 4 else AF_INET6
    with door.client.open_socket(kind, SOCK_DGRAM) as probe:
        probe.connect((str(door.address), 9))
        return ip_address(probe.getsockname()[0])


# -- BOX-7 --------------------------------------------------------------------------------------

FORGOTTEN = 60.0
"""Seconds in which the MX has asked again whether there is room."""


@check("BOX-7", quick=True, disturbs=("smtp_in", "maildrop"))
def full_mailboxes_refuse_mail(ctx: Context) -> str:
    """While a mailbox is full the MX refuses its mail at RCPT; with room again it arrives."""
    box = _limited(ctx)
    owner = Owner(box.name, mailbox_password(ctx.state, box.name))
    address = address_of(ctx, box.name)
    sender = ctx.lab.sender("careful")
    doors = [
        next(d for d in smtp_in.remote_doors(ctx, sender) if d.member is member)
        for member in smtp_in.members(ctx)
    ]
    first = smtp_in.write(sender, address)

    def answered(door: smtp_in.Door) -> tuple[int, str]:
        with door.session(ctx) as session:
            session.ehlo()
            return session.envelope(first.sender, address)

    def room(door: smtp_in.Door, full: bool) -> None:
        code, text = answered(door)
        if full:
            expect(
                code == 552 and "Mailbox is full" in text,
                f"{door}: mail for the full mailbox {box.name} is answered with {code} {text}",
            )
        else:
            expect(code == 250, f"{door}: with room, mail is answered with {code} {text}")

    def wait(full: bool) -> None:
        # Whoever asks more often meets the limit of a client's connections.
        each(
            doors,
            lambda d: eventually(lambda: room(d, full), seconds=FORGOTTEN, every=1.0),
        )

    with direct(ctx, replicas(ctx)[0]).enter(ctx, owner) as session:
        session.sock.settimeout(60.0)
        with _filled(session, box) as folder:
            # The mail that fills it is still taken, whatever its size.
            last = smtp_in.write(sender, address)
            with doors[0].session(ctx) as smtp:
                code, text = smtp.submit(last.sender, [address], last.content)
            expect(code == 250, f"{doors[0]}: the last mail with room is answered {code} {text}")
            eventually(
                lambda: expect(ctx.lab.world.copies(last.token), "the last mail is not there"),
                seconds=PROMPT,
            )
            wait(full=True)
            waits = _handed_over_all_the_same(ctx, owner)
            session.told("DELETE", session.delete(folder))
            wait(full=False)
        _arrives_late(ctx, waits)
    with doors[0].session(ctx) as smtp:
        smtp.ehlo()
        code, text = smtp.submit(first.sender, [address], first.content)
        expect(code == 250, f"{doors[0]}: mail is answered with {code} {text}")
    eventually(
        lambda: expect(ctx.lab.world.copies(first.token), "mail does not arrive again"),
        seconds=PROMPT,
    )
    bounces = ctx.lab.world.mails("origin", first.sender)
    expect(not bounces, f"a bounce left for {first.sender}")
    return (
        f"mailbox {box.name} full: mail to {address} is refused at RCPT with 552 on"
        f" {len(doors)} members; with room again mail arrives, also one that was refused for now;"
        " no bounce"
    )


def _limited(ctx: Context) -> Mailbox:
    """The mailbox with the smallest quota, whose owner may log in."""
    found = [
        box
        for box in ctx.platform.mailboxes.values()
        if box.quota is not None and not box.suspended
    ]
    if not found:
        raise Skipped("no mailbox of the site data has a quota")
    return min(found, key=lambda box: box.quota or 0)


@contextmanager
def _filled(session: imap.Session, box: Mailbox) -> Iterator[str]:
    """The mailbox is full: its owner put too much into a folder of its own."""
    folder = f"probe-{secrets.token_hex(6)}"
    session.make(folder)
    try:
        content = letter("owner@probe.invalid", "owner@probe.invalid").content
        line = b"x" * 76 + b"\r\n"
        assert box.quota is not None
        while True:
            # What is still free, but for what no further mail fits into.
            free = _free(session)
            if free < 1024:
                break
            size = min(free - 512, 24 * 1024**2)
            mail = content + line * max(0, (size - len(content)) // len(line))
            session.told("APPEND", session.append(folder, "", "", mail))
        yield folder
    finally:
        with suppress(imap.Error):
            session.delete(folder)


def _free(session: imap.Session) -> int:
    """Bytes that still fit in (RFC 9208)."""
    _, data = session.getquotaroot("INBOX")
    said = b" ".join(line or b"" for part in data for line in part)
    found = re.search(rb"STORAGE (\d+) (\d+)", said)
    if found is None:
        raise Failed(f"{session.where}: the mailbox shows no quota: {said!r}")
    return (int(found[2]) - int(found[1])) * 1024


def _handed_over_all_the_same(ctx: Context, owner: Owner) -> Letter:
    """A mail that smtp-in took before it knew: it is told to come again."""
    mail = mail_for(ctx, owner)
    place = ctx.lab.machine(ctx.platform.members(Role.SMTP_IN)[0])
    replica = replicas(ctx)[0]
    address = ctx.internal(replica)[0]
    with Session(place.observer.client(), address, SMTP, say=ctx.say, helo=place.name) as session:
        session.secure(ctx.tls(), ctx.platform.maildrop_domain)
        code, text = session.envelope(mail.sender, mail.recipient)
        expect(code == 452, f"{replica.name}: a full mailbox is answered with {code} {text}")
    return mail


def _arrives_late(ctx: Context, mail: Letter) -> None:
    hand_over(ctx, replicas(ctx)[0], mail)
    eventually(
        lambda: expect(ctx.lab.world.copies(mail.token), "mail that waited does not arrive"),
        seconds=PROMPT,
    )


# -- BOX-9 --------------------------------------------------------------------------------------


@check("BOX-9", quick=True)
def owners_send_mail(ctx: Context) -> str:
    """Owners of mailboxes send with their own login, unless the site data says otherwise."""
    boxes = [box for box in ctx.platform.mailboxes.values() if not box.suspended]
    senders = [box for box in boxes if box.submission]
    if not senders:
        raise Skipped("no mailbox of the site data sends with its own login")
    domain = ctx.sending_domains[0]
    outside = ctx.lab.world.domain("strict")

    def sends(box: Mailbox) -> None:
        password = mailbox_password(ctx.state, box.name)
        door = smtp_out.frontend_doors(ctx)[0]
        mail = letter(f"{{token}}@{domain}", f"{{token}}@{outside}")
        with smtp_out.enter(ctx, door, box.name, password) as session:
            code, text = session.submit(mail.sender, [mail.recipient], mail.content)
            expect(code == 250, f"{door}: mail of {box.name} is answered with {code} {text}")
        ctx.lab.world.arrival("strict", mail.recipient, PROMPT)

    def does_not(box: Mailbox) -> None:
        door = smtp_out.frontend_doors(ctx)[0]
        with door.session(ctx) as session:
            session.secure(ctx.tls(), ctx.platform.names.smtp_out)
            code, text = session.authenticate(box.name, mailbox_password(ctx.state, box.name))
        expect(code == 535, f"{door}: the mailbox's password of {box.name}: {code} {text}")

    apart = [box for box in boxes if not box.submission]
    ways = [(sends, box) for box in senders] + [(does_not, box) for box in apart]
    each(ways, lambda way: way[0](way[1]))
    return (
        f"{', '.join(b.name for b in senders)} sent mail to the outside with the mailbox's own"
        f" login; {', '.join(b.name for b in apart) or 'nobody'} may not"
    )


# -- Both replicas ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """All that an owner has on one replica.

    Attributes:
        folders: Name of each folder.
        subscribed: Those that are subscribed.
        mails: Folder, Message-ID and flags of each mail.
        scripts: Name of each script, and whether it is the active one.
    """

    folders: frozenset[str]
    subscribed: frozenset[str]
    mails: tuple[tuple[str, str, tuple[str, ...]], ...]
    scripts: tuple[tuple[str, bool], ...]


_MESSAGE_ID = re.compile(rb"(?im)^message-id:\s*(<[^>]*>)")
_FLAGS = re.compile(rb"FLAGS \(([^)]*)\)")


def contents(ctx: Context, replica: Host, owner: Owner) -> Contents:
    """What one replica serves to an owner."""
    door = direct(ctx, replica)
    mails = []
    with door.enter(ctx, owner) as session:
        folders = frozenset(folder.name for folder in session.folders())
        lines = session.lsub('""', "*")[1]
        subscribed = frozenset(
            name for name in folders if any(line and name.encode() in line for line in lines)
        )
        for folder in sorted(folders):
            session.look_into(folder)
            rows = session.told(
                "FETCH",
                session.uid("FETCH", "1:*", "(FLAGS BODY.PEEK[HEADER.FIELDS (MESSAGE-ID)])"),
            )
            for row in rows:
                if isinstance(row, tuple):
                    flags, name = _FLAGS.search(row[0]), _MESSAGE_ID.search(row[1])
                    words = sorted(flags[1].decode().split()) if flags else []
                    kept = tuple(word for word in words if word != r"\Recent")
                    mails.append((folder, name[1].decode() if name else "", kept))
            session.close()
    with door.filters(ctx, owner) as filters:
        scripts = tuple(sorted(filters.scripts().items()))
    return Contents(folders, subscribed, tuple(sorted(mails)), scripts)


def await_equal(
    ctx: Context, owner: Owner, complete: Callable[[Contents], object], since: float
) -> float:
    """Wait until both replicas serve the same, and it is ``complete``.

    Args:
        complete: Raises :class:`Failed` where something is missing or double.
        since: When the disturbance ended, by the monotonic clock.

    Returns:
        Seconds that it took.

    Raises:
        Failed: They differ after :data:`EQUAL` seconds.
    """

    def look() -> None:
        try:
            one, other = (contents(ctx, replica, owner) for replica in replicas(ctx))
        except imap.Error as error:  # a session ends when the folder that it reads is deleted
            raise Failed(f"{owner.user}: {error}") from error
        for what in ("folders", "subscribed", "mails", "scripts"):
            here, there = set(getattr(one, what)), set(getattr(other, what))
            only = [*sorted(map(str, here - there))[:2], *sorted(map(str, there - here))[:2]]
            expect(here == there, f"{owner.user}: {what} differ: {', '.join(only)}")
        expect(one.mails == other.mails, f"{owner.user}: a mail is on one replica twice")
        complete(one)

    eventually(look, seconds=max(0.0, since + EQUAL - time.monotonic()), every=0.5)
    return time.monotonic() - since


def status(ctx: Context, replica: Host) -> dict[str, Any]:
    """What pairsync says of itself.

    Raises:
        Failed: It does not answer.
    """
    done = ctx.lab.machine(replica).call("pairsync", "status", "--json")
    if not done.stdout:
        raise Failed(f"{replica.name}: pairsync status: {done.stderr.strip()}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


class Work:
    """Changes to a mailbox that both replicas get, each other ones: what must become of them.

    A folder of its own with mails that both replicas have, made before the disturbance.
    """

    COMMON = 6

    def __init__(self, ctx: Context, owner: Owner) -> None:
        self._ctx, self.owner = ctx, owner
        self.folder = f"probe-{secrets.token_hex(6)}"
        self._moved = f"{self.folder}-moved"
        self._common: list[Letter] = []
        self._wanted: dict[str, tuple[str, set[str]]] = {}
        self._gone: set[str] = set()

    def prepare(self) -> None:
        """Make the folders, and mails that both replicas have."""
        with direct(self._ctx, replicas(self._ctx)[0]).enter(self._ctx, self.owner) as session:
            for name in (self.folder, self._moved):
                session.make(name)
            for _ in range(self.COMMON):
                mail = mail_for(self._ctx, self.owner)
                session.told("APPEND", session.append(self.folder, "", "", mail.content))
                self._common.append(mail)
                self._wanted[mail.token] = (self.folder, set())
        await_equal(self._ctx, self.owner, self.expect_complete, time.monotonic())

    def change(self, number: int) -> None:
        """What only the replica of that number sees: a delivery, a flag, a move, a delete."""
        replica = replicas(self._ctx)[number]
        mail = mail_for(self._ctx, self.owner, self.folder)
        hand_over(self._ctx, replica, mail)
        self._wanted[mail.token] = (self.folder, set())
        with direct(self._ctx, replica).enter(self._ctx, self.owner) as session:
            session.look_into(self.folder, readonly=False)
            flagged, moved, deleted = self._common[number * 3 : number * 3 + 3]
            keyword = f"probed{number}"
            # The first is flagged on both, the others are changed on one alone.
            for token in (self._common[0].token, flagged.token):
                self._store(session, token, f"({keyword})")
                self._wanted[token][1].add(keyword)
            session.told("MOVE", session.uid("MOVE", self._uid(session, moved.token), self._moved))
            self._wanted[moved.token] = (self._moved, self._wanted[moved.token][1])
            self._store(session, deleted.token, r"(\Deleted)")
            session.told("EXPUNGE", session.expunge())
            self._wanted.pop(deleted.token)
            self._gone.add(deleted.token)

    def _store(self, session: imap.Session, token: str, flags: str) -> None:
        session.told(
            "STORE", session.uid("STORE", self._uid(session, token), "+FLAGS.SILENT", flags)
        )

    @staticmethod
    def _uid(session: imap.Session, token: str) -> str:
        found = session.told("SEARCH", session.uid("SEARCH", "HEADER", "X-Probe", token))
        numbers = (found[0] or b"").split()
        expect(len(numbers) == 1, f"{session.where}: {len(numbers)} mails are {token}")
        return str(numbers[0].decode())

    def expect_complete(self, found: Contents) -> None:
        """Every mail is where it must be, once, with its flags; those that were deleted are gone.

        Raises:
            Failed: They are not.
        """
        mine: dict[str, list[tuple[str, set[str]]]] = {}
        for folder, name, words in found.mails:
            token = name.strip("<>").partition("@")[0]
            if token in self._wanted or token in self._gone:
                mine.setdefault(token, []).append((folder, {w for w in words if w[:1] != "\\"}))
        back = mine.keys() & self._gone
        expect(not back, f"{self.owner.user}: {len(back)} mails that were deleted are back")
        for token, (folder, flags) in self._wanted.items():
            there = mine.get(token, [])
            expect(
                there == [(folder, flags)],
                f"{self.owner.user}: mail {token} is {there or 'lost'}, not in {folder} once with"
                f" {sorted(flags) or 'no keywords'}",
            )

    def clear(self) -> None:
        with (
            suppress(OSError, Failed, imap.Error),
            direct(self._ctx, replicas(self._ctx)[0]).enter(self._ctx, self.owner) as session,
        ):
            for name in (self.folder, self._moved):
                session.delete(name)


@contextmanager
def works(ctx: Context) -> Iterator[list[Work]]:
    """Work for every owner, and nothing of it afterwards."""
    found = [Work(ctx, owner) for owner in owners(ctx)]
    try:
        each(found, lambda work: work.prepare())
        yield found
    finally:
        each(found, lambda work: work.clear())


def _all_equal(ctx: Context, mine: list[Work], since: float) -> float:
    """Wait for both replicas to be equal. Returns the seconds of the slowest mailbox."""
    return max(each(mine, lambda w: await_equal(ctx, w.owner, w.expect_complete, since)))


# -- BOX-4 --------------------------------------------------------------------------------------


@check("BOX-4", disruptive=True, disturbs=("replication",), needs=("smtp_in", "maildrop"))
def both_sides_of_a_cut_are_kept(ctx: Context) -> str:
    """Both replicas written while they cannot reach each other: the union, nothing twice."""
    first, second = replicas(ctx)
    with works(ctx) as mine:
        with ctx.lab.link_cut(first, second):
            each([(w, n) for w in mine for n in (0, 1)], lambda one: one[0].change(one[1]))
            _expect_visible(ctx, first)
            _expect_visible(ctx, second)
        healed = time.monotonic()
        took = _all_equal(ctx, mine, healed)
    return (
        f"deliveries, keywords, moves and deletes on {first.name} and on {second.name} while the"
        f" link was cut, {len(mine)} mailboxes: both hold the union {took:.1f} s after it was"
        " back, nothing lost, nothing twice"
    )


def _expect_visible(ctx: Context, replica: Host) -> None:
    """The replica tells that it has changes which the other may not have, and since when."""

    def look() -> None:
        told = status(ctx, replica)
        trouble = not told["peer"]["up"] or told["failing"]
        expect(
            trouble and told["dirty"] > 0 and told["oldest"]["seconds"] > 0,
            f"{replica.name}: pairsync shows no trouble: peer up {told['peer']['up']},"
            f" {told['dirty']} dirty, {len(told['failing'])} failing",
        )

    eventually(look, seconds=EQUAL, every=0.5, what="pairsync to show what is not synchronised")


# -- BOX-8 --------------------------------------------------------------------------------------


@check(
    "BOX-8",
    disruptive=True,
    disturbs=("maildrop", "replication"),
    needs=("smtp_in", "rspamd", "nginx_streams"),
)
def mail_prefers_the_primary(ctx: Context) -> str:
    """Mail goes to the first replica by MX; while it is dead, to the second."""
    first, second = replicas(ctx)
    owner = owners(ctx)[0]

    def took() -> str:
        mail = through_the_mx(ctx, owner.user)

        def look() -> str:
            found = [m for m in ctx.lab.world.copies(mail.token) if m.mx == MAILBOXES]
            expect(found, f"mail to {mail.recipient} is in no mailbox")
            received = " ".join(found[0].header("Received"))
            by = [host.name for host in (first, second) if f"by {host.name}" in received]
            expect(len(by) == 1, f"a mail was taken by {by or 'no replica'}: {received}")
            return by[0]

        return eventually(look, seconds=FORGOTTEN)

    name = took()
    expect(name == first.name, f"mail goes to {name} while {first.name} is alive")
    machine = ctx.lab.machine(first)
    machine.kill()
    try:
        began = time.monotonic()
        name = took()
        seconds = time.monotonic() - began
        expect(name == second.name, f"mail goes to {name} while {first.name} is dead")
    finally:
        machine.start()
    eventually(
        lambda: expect(took() == first.name, f"mail does not go to {first.name} again"),
        seconds=120,
        every=2.0,
    )
    return (
        f"mail goes to {first.name}; with it dead to {second.name}, readable after {seconds:.1f} s;"
        " back to the first when it returns"
    )


# -- BOX-10 -------------------------------------------------------------------------------------


@check("BOX-10", disruptive=True, disturbs=("replication",), needs=("smtp_in", "maildrop"))
def nothing_stops_the_sync_for_long(ctx: Context) -> str:
    """Daemon killed, plug pulled, a run stalled, a wrong certificate: equal soon afterwards."""
    observed = []
    for what, trouble in _TROUBLES:
        with works(ctx) as mine:
            with trouble(ctx) as alive:
                for number in alive:
                    each(mine, lambda w, n=number: w.change(n))  # type: ignore[misc]
                if what != _HOT:
                    _expect_visible(ctx, replicas(ctx)[alive[0]])
            healed = time.monotonic()
            observed.append(f"{what}: {_all_equal(ctx, mine, healed):.1f} s")
    return f"equal after {'; '.join(observed)}; what waited was visible meanwhile"


Trouble = Callable[[Context], AbstractContextManager[tuple[int, ...]]]
"""Something that is wrong for a while, and the numbers of the replicas that serve meanwhile."""


@contextmanager
def _daemon_killed(ctx: Context) -> Iterator[tuple[int, ...]]:
    """On the second replica, and it does not come back by itself."""
    machine, unit = ctx.lab.machine(replicas(ctx)[1]), "pairsync.service"
    # Not masked: the unit lies in /etc, which a mask in /run does not hide.
    drop_in = f"/run/systemd/system/{unit}.d/verify.conf"
    machine.run("mkdir", "-p", "--", drop_in.rpartition("/")[0])
    machine.run("tee", drop_in, input="[Service]\nRestart=no\n")
    try:
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "kill", "--signal=KILL", unit)
        eventually(
            lambda: expect(
                machine.run("systemctl", "show", "--value", "--property=ActiveState", unit).strip()
                == "failed",
                f"{unit} still runs",
            ),
            seconds=EQUAL,
            what=f"{unit} to be dead",
        )
        yield (0, 1)
    finally:
        machine.run("rm", "-f", "--", drop_in)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "reset-failed", unit, check=False)
        machine.run("systemctl", "start", unit)


@contextmanager
def _plug_pulled(ctx: Context) -> Iterator[tuple[int, ...]]:
    replica = replicas(ctx)[1]
    machine = ctx.lab.machine(replica)
    machine.kill()
    try:
        yield (0,)
    finally:
        machine.start()
        eventually(
            lambda: direct(ctx, replica).client.connect(ctx.internal(replica)[0], IMAPS).close(),
            seconds=60,
            what=f"{replica.name} to serve again",
        )


@contextmanager
def _stalled(ctx: Context) -> Iterator[tuple[int, ...]]:
    """The other's daemon neither answers nor hangs up."""
    machine = ctx.lab.machine(replicas(ctx)[1])
    machine.run("systemctl", "kill", "--signal=STOP", "pairsync.service")
    try:
        yield (0, 1)
    finally:
        machine.run("systemctl", "kill", "--signal=CONT", "pairsync.service")


@contextmanager
def _wrong_certificate(ctx: Context) -> Iterator[tuple[int, ...]]:
    """The other replica proves to be somebody else."""
    replica = replicas(ctx)[1]
    _, chain, key = next(ctx.lab.wrong_certificates(replica.name))
    machine = ctx.lab.machine(replica)
    path = certificate_path(replica.name)
    with machine.replaced_certificate(path, chain, key):
        try:
            machine.run("systemctl", "restart", "pairsync.service")
            yield (0, 1)
        finally:
            machine.run("mv", "-f", "--", f"{path}.verify-kept", path)
            machine.run("systemctl", "restart", "pairsync.service")


@contextmanager
def _both_hot(ctx: Context) -> Iterator[tuple[int, ...]]:
    """Nothing is wrong, and both replicas get the same users' changes at once."""
    yield (0, 1)


_HOT = "both hot with the same users"
_TROUBLES: tuple[tuple[str, Trouble], ...] = (
    ("daemon killed", _daemon_killed),
    ("plug pulled", _plug_pulled),
    ("sync stalled", _stalled),
    ("wrong certificate", _wrong_certificate),
    (_HOT, _both_hot),
)
