"""WEB: webmail as its users meet it, in a browser and behind it."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from urllib.parse import urlsplit

from mailsite.model import Host, IPAddress, Platform, Role
from rehearsal import image
from rehearsal.progress import Progress
from verify import browser, mailauth, maildrop, smtp_in
from verify.client import Client, Observer
from verify.context import Context, each, eventually, expect
from verify.lab import LabMachine
from verify.mail import Mail
from verify.mailbox import MAILBOXES
from verify.maildrop import Owner
from verify.registry import Failed, Skipped, check
from verify.roundcube import Roundcube
from verify.smtp import Letter, letter

HTTP, HTTPS = 80, 443
PROMPT = 60.0
"""Seconds after which a mail is taken for lost; hosts may be away, and each is asked in turn."""
SOON = 5.0
"""Seconds in which the standby serves (contract: within seconds)."""
LOGIN_FORM = "rcmloginuser"


def hosts(ctx: Context) -> tuple[Host, ...]:
    """The hosts of webmail, the primary first.

    Raises:
        Skipped: The site has none.
    """
    found = ctx.platform.members(Role.WEBMAIL)
    if ctx.platform.webmail is None or not found:
        raise Skipped("the site data has no host with the role 'webmail'")
    return found


def user(ctx: Context) -> Observer:
    """Somebody in a network that may use webmail."""
    for place in (ctx.office, ctx.local):
        if place is not None and _may_use(ctx.platform, place.client()):
            return place
    raise Skipped("nobody here is in a network that webmail.networks in site.yaml lists")


def _may_use(platform: Platform, client: Client) -> bool:
    return all(_allowed(platform, client))


def _allowed(platform: Platform, client: Client) -> list[bool]:
    """For each known address of ``client``, whether it is in a network that may use webmail."""
    networks = platform.webmail.networks if platform.webmail is not None else ()
    sources = [a for a in (client.ipv4, client.ipv6) if a is not None]
    return [any(s.version == n.version and s in n for n in networks) for s in sources]


def _stranger(ctx: Context) -> Client:
    """Somebody on the internet who may not use webmail, by either address."""
    for _ in range(32):
        client = ctx.internet.client()
        if not any(_allowed(ctx.platform, client)):
            return client
    raise Skipped("webmail.networks in site.yaml lists the whole internet of the rehearsal")


# -- Pages without a browser --------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What a web server says: ``headers`` by their names in lower case."""

    status: int
    headers: Mapping[str, str]
    page: str

    @property
    def target(self) -> str:
        return self.headers.get("location", "")


def get(
    ctx: Context,
    client: Client,
    address: IPAddress,
    url: str,
    *,
    name: str = "",
    timeout: float = 20.0,
) -> Reply:
    """Ask ``address`` for ``url``, whose host must prove its name.

    Args:
        name: What the certificate must be for, where it is not the host in ``url``.

    Raises:
        OSError: No connection, or a certificate that does not verify.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = HTTPS if parts.scheme == "https" else HTTP
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    sock = client.connect(address, port, timeout=timeout)
    with closing(connection):
        connection.sock = sock
        if parts.scheme == "https":
            connection.sock = ctx.tls().wrap_socket(sock, server_hostname=name or host)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target)
        try:
            found = connection.getresponse()
            page = found.read().decode("utf-8", "replace")
        except http.client.HTTPException as error:
            raise Failed(f"{url} at {address}: {type(error).__name__}: {error}") from error
    headers = {key.lower(): value for key, value in found.getheaders()}
    ctx.say(f"{client}: {url} at {address}: {found.status} {headers.get('location', '')}")
    return Reply(found.status, headers, page)


def expect_page(ctx: Context, client: Client, address: IPAddress, where: str) -> float:
    """The page that asks for a login comes. Returns the seconds that it took."""
    began = time.monotonic()
    reply = get(ctx, client, address, f"https://{ctx.platform.names.webmail}/")
    expect(
        reply.status == http.client.OK and LOGIN_FORM in reply.page,
        f"{where}: webmail answers {reply.status} {reply.target} {reply.page[:80]!r}",
    )
    return time.monotonic() - began


# -- WEB-2 --------------------------------------------------------------------------------------

HEADERS: Mapping[str, str] = {
    "strict-transport-security": "max-age=",
    "content-security-policy": "frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "referrer-policy": "same-origin",
}


@check("WEB-2", live=True)
def strangers_are_led_to_the_home_page(ctx: Context) -> str:
    """From elsewhere webmail leads to the site's home page, and http to https."""
    hosts(ctx)
    platform = ctx.platform
    name = platform.names.webmail
    inside, short = platform.webmail_aliases
    behind = {a for _, a in ctx.doors}
    for known in (name, inside):
        resolved = ctx.lookup.addresses(known)
        expect(resolved == behind, f"{known} resolves to {resolved}, the frontends have {behind}")

    def encrypted(client: Client, door: tuple[str, IPAddress], host: str) -> None:
        reply = get(ctx, client, door[1], f"http://{host}/?_task=mail")
        expect(
            (reply.status, reply.target) == (301, f"https://{name}/?_task=mail"),
            f"{door[0]} [{door[1]}]: http://{host}/ answers {reply.status} {reply.target}",
        )

    def renamed(client: Client, door: tuple[str, IPAddress]) -> None:
        reply = get(ctx, client, door[1], f"https://{inside}/")
        expect(
            (reply.status, reply.target) == (301, f"https://{name}/"),
            f"{door[0]} [{door[1]}]: https://{inside}/ answers {reply.status} {reply.target}",
        )

    def stranger(client: Client, door: tuple[str, IPAddress]) -> None:
        where = f"{door[0]} [{door[1]}] from {client}"
        for path in ("/", "/?_task=login", "/skins/elastic/styles/styles.min.css"):
            reply = get(ctx, client, door[1], f"https://{name}{path}")
            if ctx.is_live and reply.status == http.client.OK:
                raise Skipped("this machine is in a network that may use webmail")
            expect(
                (reply.status, reply.target) == (302, platform.home_page),
                f"{where}: https://{name}{path} answers {reply.status} {reply.target}",
            )

    def guest(client: Client, door: tuple[str, IPAddress]) -> None:
        where = f"{door[0]} [{door[1]}] from {client}"
        expect_page(ctx, client, door[1], where)
        reply = get(ctx, client, door[1], f"https://{name}/")
        for header, value in HEADERS.items():
            found = reply.headers.get(header, "nothing")
            expect(value in found, f"{where}: the header {header} says {found}")

    client = _stranger(ctx)
    looks = [partial(encrypted, client, d, h) for d in ctx.doors for h in (name, inside, short)]
    looks += [partial(renamed, client, d) for d in ctx.doors]
    looks += [partial(stranger, client, d) for d in ctx.doors]
    allowed = None if ctx.is_live else user(ctx).client()
    if allowed is not None:
        looks += [partial(guest, allowed, d) for d in ctx.doors]
    each(looks, lambda look: look(), workers=1 if ctx.is_live else 8)
    seen = f"; {allowed.place} sees the page, with its headers" if allowed is not None else ""
    return (
        f"{len(ctx.doors)} frontend addresses: http://{name}, {inside} and {short} lead to https,"
        f" and from {client.place} https leads to {platform.home_page}{seen}"
    )


# -- WEB-1 --------------------------------------------------------------------------------------


@contextmanager
def visit(ctx: Context, shots: str = "") -> Iterator[Roundcube]:
    """A browser in a network that may use webmail.

    Args:
        shots: Folder for pictures of the pages, in the folder of the state; empty: none.
    """
    layers = image.ensure(Progress(quiet=True)).browser
    with browser.opened(
        user(ctx).client(),
        layers=layers,
        authorities=ctx.platform.world.ca_certificates,
        resolver=ctx.lab.world.resolver,
    ) as page:
        yield Roundcube(
            page,
            f"https://{ctx.platform.names.webmail}",
            ctx.state / "webmail" / shots if shots else None,
            ctx.say,
        )


def _mail_from_outside(ctx: Context, owner: Owner) -> Letter:
    """A mail from the internet that lies in the owner's inbox."""
    sender = ctx.lab.sender("careful")
    token = token_hex(8)
    mail = letter(
        f"{{token}}@{sender.domain}",
        maildrop.address_of(ctx, owner.user),
        subject=f"Probe {token}",
        token=token,
    )
    door = smtp_in.remote_doors(ctx, sender)[0]
    with door.session(ctx) as session:
        session.ehlo()
        code, text = session.submit(mail.sender, [mail.recipient], sender.sign(mail.content))
        expect(code == 250, f"{door}: mail to {mail.recipient} is answered with {code} {text}")
    eventually(
        lambda: expect(ctx.lab.world.copies(mail.token), "the mail is in no mailbox"),
        seconds=PROMPT,
    )
    return mail


def _read_and_answer(ctx: Context, rc: Roundcube, owner: Owner) -> Mail:
    """Read a mail from outside and answer it. Returns the answer as it arrived outside."""
    mail = _mail_from_outside(ctx, owner)
    body = rc.read(mail.token)
    expect(f"Token: {mail.token}" in body, f"the mail's page shows {body[:200]!r}")
    rc.answer(f"This is the answer to {mail.token}.")

    def arrived() -> Mail:
        copies = ctx.lab.world.copies(f"answer to {mail.token}")
        found = [m for m in copies if m.mx != MAILBOXES and m.accepted]
        expect(found, f"no answer to {mail.sender} arrived")
        return found[0]

    answer = eventually(arrived, seconds=PROMPT)
    expect(
        f"<{mail.token}@" in " ".join(answer.header("In-Reply-To")),
        "the answer does not say what it answers (In-Reply-To)",
    )
    found = mailauth.signatures(ctx.lookup, answer.raw)
    author = mailauth.author_domain(answer.raw)
    expect(
        [(s.domain, s.valid) for s in found] == [(author, True)],
        f"the answer of {author} has the DKIM signatures {found}",
    )
    return answer


# A browser gives up what it loads when an address comes to its network, as clients get.
@check("WEB-1", quick=True, still=True)
def a_browser_reads_and_answers(ctx: Context) -> str:
    """In a browser: log in, read a mail from outside, answer it, edit a filter, log out."""
    hosts(ctx)
    owner = maildrop.owners(ctx)[0]
    name = f"probe-{time.time_ns():x}"
    with visit(ctx, "web-1") as rc:
        rc.login(owner.user, owner.password)
        expect(rc.setting("skin") == "elastic", f"the skin is {rc.setting('skin')}")
        expect(rc.setting("threading"), "mails are not shown in threads")
        answer = _read_and_answer(ctx, rc, owner)
        rc.add_filter(name, "Probe of a filter", "Archive")
        _expect_filter(ctx, owner, name)
        rc.remove_filter(name)
        rc.logout()
    sender = mailauth.author_domain(answer.raw)
    return (
        f"{owner.user} logged in, read a mail from outside in a list of threads (elastic), answered"
        f" it, and the answer came DKIM-signed by {sender}; made a filter and took it away; logged"
        f" out; pictures in {ctx.state / 'webmail' / 'web-1'}"
    )


def _expect_filter(ctx: Context, owner: Owner, name: str) -> None:
    """The filter is in the owner's active script, as ManageSieve shows it."""

    def there() -> None:
        with maildrop.direct(ctx, maildrop.replicas(ctx)[0]).filters(ctx, owner) as scripts:
            listed = scripts.scripts()
            active = [script for script, is_active in listed.items() if is_active]
            expect(active, f"no script of {owner.user} is active; there are {', '.join(listed)}")
            text = scripts.get(active[0])
        expect(name in text, f"the script {active[0]} of {owner.user} has no filter {name}")

    eventually(there, seconds=10)


# -- WEB-3 --------------------------------------------------------------------------------------


@check(
    "WEB-3",
    disruptive=True,
    disturbs=("webmail",),
    needs=("maildrop", "replication", "nginx_streams"),
)
def the_standby_takes_over(ctx: Context) -> str:
    """With the first webmail host dead the standby serves within seconds, and lets users in."""
    first, *others = hosts(ctx)
    expect(others, f"{first.name} is the only host of webmail")
    owner = maildrop.owners(ctx)[0]
    client = user(ctx).client()
    machine = ctx.lab.machine(first)

    def serves(door: tuple[str, IPAddress]) -> float:
        return expect_page(ctx, client, door[1], f"{door[0]} [{door[1]}]")

    each(ctx.doors, serves)
    machine.kill()
    killed = time.monotonic()
    try:
        slowest = 0.0
        for _ in range(3):
            slowest = max(slowest, *each(ctx.doors, serves))
        through = time.monotonic() - killed
        expect(slowest <= SOON, f"{first.name} dead: a page took {slowest:.1f} s")
        with visit(ctx) as rc:
            rc.login(owner.user, owner.password)
            rc.logout()
        standby = others[0].name
        expect(
            ctx.lab.machine(others[0]).journal(
                time.time() - 60, f"Successful login for {owner.user} "
            ),
            f"{standby}: its journal shows no login of {owner.user}",
        )
    finally:
        machine.start()
    returned = time.monotonic()
    eventually(partial(each, ctx.doors, serves), seconds=60, what="webmail with its first host")
    # All of them: who has a session on one host is asked to log in by the other.
    each(
        ctx.doors,
        lambda door: eventually(
            partial(_reaches, ctx, client, door, first),
            seconds=60,
            every=1.0,
            what=f"{door[0]} [{door[1]}] to lead to the first host",
        ),
    )
    return (
        f"{first.name} dead: {3 * len(ctx.doors)} pages through {len(ctx.doors)} addresses came in"
        f" {through:.1f} s, the slowest in {slowest:.1f} s; {owner.user} logged in at {standby};"
        f" back on {first.name} {time.monotonic() - returned:.0f} s after it started"
    )


def _reaches(ctx: Context, client: Client, door: tuple[str, IPAddress], host: Host) -> None:
    """A page that is asked for at ``door`` now is served by ``host``."""
    path = f"/{token_hex(8)}"
    name, address = door
    get(ctx, client, address, f"https://{ctx.platform.names.webmail}{path}")
    expect(
        ctx.lab.machine(host).journal(time.time() - 30, path),
        f"a page through {name} was not served by {host.name}",
    )


# -- WEB-4 --------------------------------------------------------------------------------------

PROTOCOLS: Mapping[str, int] = {"imap": 993, "sieve": 4190, "smtp": 587}
"""Who Roundcube talks to, and at which port of its own host."""
IMPOSTOR = 20000
"""An impostor listens this far above the real port."""
_HERE = Path(__file__).parent


@check("WEB-4", quick=True, alone=True, disturbs=("webmail",), needs=("outside", "smtp_out"))
def webmail_knows_whom_it_talks_to(ctx: Context) -> str:
    """Webmail sends by a login of its own, and refuses servers with a wrong certificate."""
    known = hosts(ctx)
    assert ctx.platform.webmail is not None
    login = ctx.platform.webmail.sasl_user
    owner = maildrop.owners(ctx)[0]
    wrong = [*_wrong_certificates(ctx)]
    refused = sum(each(known, lambda host: refuses_impostors(ctx.lab.machine(host), owner, wrong)))
    recipient = f"{token_hex(8)}@{ctx.lab.world.domain('strict')}"
    sender = f"probe@{ctx.sending_domains[0]}"
    _connect(ctx.lab.machine(known[0]), owner, recipient=recipient, sender=sender)
    mail = ctx.lab.world.arrival("strict", recipient, PROMPT)
    received = " ".join(" ".join(line.split()) for line in mail.header("Received"))
    expect(
        f"(Authenticated sender: {login})" in received,
        f"webmail's mail was submitted by another login than {login}: {received}",
    )
    return (
        f"mail is submitted by {login}; {len(known)} hosts refuse wrong certificates of IMAP, Sieve"
        f" and SMTP ({refused} connections), and tell such servers nothing"
    )


def refuses_impostors(
    machine: LabMachine, owner: Owner, wrong: Iterable[tuple[str, str, str]]
) -> int:
    """Roundcube on the host takes the real servers, and none with a wrong certificate."""
    for protocol, verdict in _connect(machine, owner).items():
        expect(verdict == "taken", f"{machine.name}: {protocol} with the real server: {verdict}")
    refused = 0
    for what, chain, key in wrong:
        with _impostor(machine, chain, key) as heard:
            for protocol, verdict in _connect(machine, owner).items():
                expect(verdict != "taken", f"{machine.name}: {protocol} takes a server with {what}")
                refused += 1
            told = eventually(partial(_told, heard), seconds=10, what=f"{machine.name}: {what}")
        for protocol, words in told.items():
            expect(not words, f"{machine.name}: {protocol} tells a server with {what}: {words!r}")
    return refused


def _wrong_certificates(ctx: Context) -> Iterator[tuple[str, str, str]]:
    """Certificates that Roundcube may take for none of its servers."""
    for name in (ctx.platform.webmail_backend, ctx.platform.names.smtp_out):
        yield from ctx.lab.wrong_certificates(name)


def _connect(
    machine: LabMachine, owner: Owner, recipient: str = "", sender: str = ""
) -> dict[str, str]:
    """Have Roundcube connect to each of its servers. Returns protocol -> ``taken``, or why not."""
    script = "/run/verify-roundcube.php"
    machine.run("tee", script, input=(_HERE / "roundcube_probe.php").read_text("utf-8"))
    order = {"user": owner.user, "password": owner.password} | {
        "recipient": recipient,
        "sender": sender,
    }
    try:
        said = machine.run(
            "runuser", "-u", "www-data", "--", "php", "-d", "display_errors=stderr", script,
            input=json.dumps(order),
        )  # fmt: skip
    finally:
        machine.run("rm", "-f", script)
    found: dict[str, object] = json.loads(said.splitlines()[-1])
    expect(found.pop("sent", True), f"{machine.name}: Roundcube cannot send a mail: {said}")
    return {protocol: str(verdict) for protocol, verdict in found.items()}


@contextmanager
def _impostor(machine: LabMachine, chain: str, key: str) -> Iterator[Callable[[], str]]:
    """Whoever on the host connects to one of the real ports meets an impostor.

    Yields a function that returns what the impostor wrote.
    """
    folder, started = "/run/verify-impostor", ""
    ports = [f"{name}:{port + IMPOSTOR}" for name, port in PROTOCOLS.items()]
    rules = "\n".join(
        f"ip daddr 127.0.0.1 tcp dport {port} redirect to :{port + IMPOSTOR}"
        for port in PROTOCOLS.values()
    )
    machine.run("install", "-d", "-m", "0700", folder)
    machine.run("tee", f"{folder}/server.py", input=(_HERE / "impostor.py").read_text("utf-8"))
    machine.run("tee", f"{folder}/server.pem", input=key + chain)
    try:
        started = machine.run(
            "sh", "-c", 'setsid "$@" >"$0" 2>&1 </dev/null & echo $!', f"{folder}/out",
            "python3", "-I", f"{folder}/server.py", f"{folder}/server.pem", *ports,
        )  # fmt: skip

        def heard() -> str:
            return machine.run("cat", f"{folder}/out")

        def listening() -> None:
            expect(heard().count("listening") == len(ports), "the impostor does not listen")

        eventually(listening, seconds=10)
        hook = "type nat hook output priority dstnat; policy accept;"
        table = f"table ip verify_impostor {{\nchain output {{\n{hook}\n{rules}\n}}\n}}\n"
        machine.run("nft", "-f", "-", input=table)
        yield heard
    finally:
        machine.call("nft", "delete", "table", "ip", "verify_impostor")
        if started:
            machine.call("kill", started.strip())
        machine.run("rm", "-rf", folder)


def _told(heard: Callable[[], str]) -> dict[str, str]:
    """Protocol -> what a client said to the impostor after TLS; each came once at least."""
    lines = [json.loads(line) for line in heard().splitlines()]
    found: dict[str, str] = {}
    for line in lines:
        if "protocol" in line:
            found[line["protocol"]] = found.get(line["protocol"], "") + line["said"]
    missing = PROTOCOLS.keys() - found.keys()
    expect(not missing, f"nobody came to the impostor by {', '.join(sorted(missing))}")
    return found


# -- WEB-5 --------------------------------------------------------------------------------------


@check(
    "WEB-5",
    disruptive=True,
    disturbs=("maildrop", "replication", "smtp_out"),
    needs=("webmail", "nginx_streams", "smtp_in", "rspamd"),
)
def webmail_outlives_what_is_behind_it(ctx: Context) -> str:
    """With the first maildrop, then the first smtp-out dead, webmail logs in, reads and sends."""
    hosts(ctx)
    owner = maildrop.owners(ctx)[0]
    victims = (maildrop.replicas(ctx)[0], ctx.platform.hosts[ctx.platform.outbound.primary])
    told = []
    for victim in victims:
        machine = ctx.lab.machine(victim)
        machine.kill()
        try:
            began = time.monotonic()
            with visit(ctx) as rc:
                opened = time.monotonic()
                rc.login(owner.user, owner.password)
                took = time.monotonic() - opened
                _read_and_answer(ctx, rc, owner)
                rc.logout()
            told.append(
                f"{victim.name} dead: logged in within {took:.1f} s, read, answered and left within"
                f" {time.monotonic() - began:.0f} s"
            )
        finally:
            machine.start()
    eventually(
        lambda: maildrop.direct(ctx, victims[0]).enter(ctx, owner).shutdown(),
        seconds=60,
        every=1.0,
        what=f"{victims[0].name} to serve again",
    )
    return "; ".join(told)
