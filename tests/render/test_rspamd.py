"""The spam filter, running: what it says of mail, and whom it lets in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest

from mailsite.fragment import File
from mailsite.model import Platform, Role
from mailsite.roles.postfix import spam_filter
from tests.render.conftest import all_files, cases
from tests.render.image import Image, Step

# Redis, Sentinel and Rspamd as their units start them, on a machine that has the member's address
# on its loopback interface and nothing else. Mail comes as Postfix hands it over: by the milter
# protocol, version 6, where a reply that the filter has declared to leave out is not waited for.
_LIVE = r"""
import json, os, shutil, socket, struct, subprocess, sys, time, urllib.error, urllib.request
order = json.load(sys.stdin)
log = open("/tmp/daemons", "w")
for address in order["addresses"]:
    subprocess.run(["ip", "address", "add", address, "dev", "lo"], check=True)
for folder, owner in (("/var/lib/redis", "redis"), ("/var/lib/rspamd", "_rspamd"),
                      ("/run/rspamd", "_rspamd"), ("/var/log/rspamd", "_rspamd")):
    os.makedirs(folder, exist_ok=True)
    shutil.chown(folder, owner)
daemons = []

def start(user, *command):
    prefix = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"] if user else []
    daemons.append(subprocess.Popen([*prefix, *command], stdout=log, stderr=log))

def wait(port):
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 5)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)

if order["resolver"]:
    start(None, "unbound", "-d")
else:
    # Nobody answers, nor says that nobody does.
    subprocess.run(["nft", "-f", "-"], check=True, text=True, input="table inet dead {"
                   " chain input { type filter hook input priority filter;"
                   " meta l4proto { tcp, udp } th dport 53 drop; }; }")
for name in ("redis", "sentinel"):
    subprocess.run([order["state"], name, "/var/lib/redis"], check=True)
for name in ("redis-server", "redis-sentinel"):
    conf = name.replace("redis-server", "redis").replace("redis-sentinel", "sentinel")
    start("redis", name, f"/var/lib/redis/{conf}.conf", "--daemonize", "no")
wait(order["redis"]).close()
wait(order["sentinel"]).close()
started = time.monotonic()
start(None, "rspamd", "-u", "_rspamd", "-g", "_rspamd", "-c", "/etc/rspamd/rspamd.conf", "-f")
wait(order["controller"]).close()

def ask(path, password=None):
    headers = {"Password": password} if password else {}
    address = f"http://127.0.0.1:{order['controller']}{path}"
    try:
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code

def redis(port, *command, password=None):
    with wait(port) as connection:
        lines = connection.makefile("rb")
        for words in ([("AUTH", password)] if password else []) + [command]:
            connection.sendall((" ".join(words) + "\r\n").encode())
            answer = lines.readline().decode().strip()
    return answer

def scan(mail):
    connection = wait(order["milter"])
    lines = connection.makefile("rb")

    def send(kind, data=b""):
        connection.sendall(struct.pack(">I", len(data) + 1) + kind + data)

    def read():
        data = lines.read(struct.unpack(">I", lines.read(4))[0])
        return data[:1].decode(), data[1:].decode("latin-1")

    send(b"O", struct.pack(">III", 6, 0x1FF, 0x1FFFFF))
    flags = struct.unpack(">I", read()[1].encode("latin-1")[8:12])[0]

    def step(kind, data, left_out):
        send(kind, data)
        if not flags & left_out:
            read()

    send(b"D", b"Cj\0mx.invented.example\0")
    step(b"C", b"host.there.example\0004" + struct.pack(">H", 4000) + b"192.0.2.9\0", 0x1000)
    step(b"H", b"host.there.example\0", 0x2000)
    login = f"{{auth_authen}}\0{mail['login']}\0{{auth_type}}\0PLAIN\0" if mail.get("login") else ""
    send(b"D", f"Mi\0ID\0{login}".encode())
    step(b"M", b"<someone@there.example>\0", 0x4000)
    for recipient in mail["to"]:
        step(b"R", f"<{recipient}>\0".encode(), 0x8000)
    headers = {"From": "someone@there.example", "To": "user@here.example", "Subject": "hello",
               "Date": "Sun, 22 Nov 2026 10:00:00 +0000", "Message-ID": "<1@there.example>",
               **mail.get("headers", {})}
    for name, value in headers.items():
        step(b"L", f"{name}\0{value}\0".encode(), 0x80)
    step(b"N", b"", 0x40000)
    step(b"B", mail.get("text", "hello\r\n").encode(), 0x80000)
    send(b"E")
    answers = []
    while True:
        answers.append(read())
        if answers[-1][0] in "acrtdy":
            connection.close()
            return answers

wait_until = time.monotonic() + 20
while "write servers" not in open("/tmp/rspamd.log").read() and time.monotonic() < wait_until:
    time.sleep(0.1)
seconds = time.monotonic() - started
# Redis gets its scripts with the first mails, which are not counted.
for _ in range(3):
    scan({"to": ["user@here.example"], "login": "first"})
scans, times = [], []
for mail in order["mails"]:
    began = time.monotonic()
    scans.append(scan(mail))
    times.append(time.monotonic() - began)
result = {
    "seconds": seconds,
    "scans": scans,
    "times": times,
    "controller": [ask("/stat"), ask("/stat", "wrong"), ask("/stat", "invented")],
    "redis": [redis(order[name], "PING") for name in ("redis", "sentinel")],
    "known": redis(order["redis"], "PING", password=order["password"]),
    "log": open("/tmp/rspamd.log").read(),
}
for daemon in daemons:
    daemon.kill()
json.dump(result, sys.stdout)
"""

GTUBE = "XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X\r\n"
PASSWORD = "inventedpassword0123456789abcdef"
LIMIT = 3


@dataclass(frozen=True)
class Outcome:
    seconds: float
    times: list[float]
    scans: list[list[tuple[str, str]]]
    controller: list[int]
    redis: list[str]
    known: str
    log: str


def machine(site: Platform) -> Mapping[str, File]:
    """The first member, alone and with one worker."""
    files = all_files(site, site.members(Role.RSPAMD)[0])
    worker = files["/etc/rspamd/local.d/worker-proxy.inc"]
    one = re.sub(r"(?m)^count = \d+;$", "count = 1;", worker.content)
    logging = 'type = "file"; filename = "/tmp/rspamd.log"; level = "info";\n'
    return {
        **files,
        "/etc/rspamd/local.d/worker-proxy.inc": replace(worker, content=one),
        "/etc/rspamd/local.d/logging.inc": replace(worker, content=logging),
    }


def live(image: Image, mails: list[dict[str, object]], *, resolver: bool = True) -> Outcome:
    """Let the first member look at ``mails``."""
    site = next(c for c in cases() if Role.RSPAMD in c.host.roles).platform
    limits = site.spam.user_limits.model_copy(update={"messages": LIMIT, "recipients": 10})
    spam = site.spam.model_copy(update={"user_limits": limits, "greylist": False})
    site = site.model_copy(update={"spam": spam})
    leg = site.internal_leg(site.members(Role.RSPAMD)[0])
    order = {
        "addresses": [f"{leg.ipv4}/32"],
        "state": "/usr/local/lib/mail-platform/redis-state",
        "redis": spam.redis_port,
        "sentinel": spam.sentinel_port,
        "controller": spam.controller_port,
        "milter": spam.milter_port,
        "password": PASSWORD,
        "resolver": resolver,
        "mails": mails,
    }
    step = Step(("python3", "-c", _LIVE), input=json.dumps(order))
    (result,) = image.run(machine(site), [step])
    assert result.status == 0, result.words
    return Outcome(**json.loads(result.out))


USER: dict[str, object] = {"to": ["user@here.example"]}


@pytest.fixture(scope="session")
def outcome(image: Image) -> Outcome:
    many: dict[str, object] = {"to": [f"user{n}@here.example" for n in range(6)], "login": "busy"}
    mails: list[dict[str, object]] = [
        {**USER, "headers": {"X-Spam": "Yes"}},
        {**USER, "text": GTUBE},
        {**USER, "text": GTUBE, "login": "someone"},
        *({"to": ["postmaster@here.example"], "login": "alice"} for _ in range(LIMIT + 1)),
        {**USER, "login": "bob"},
        many,
        many,
        *(USER for _ in range(LIMIT + 2)),
    ]
    return live(image, mails)


@pytest.fixture(scope="session")
def without_resolver(image: Image) -> Outcome:
    received = "from a (b [192.0.2.1]) by c; Sun, 22 Nov 2026 10:00:00 +0000"
    text = "see http://www.there.example/\r\n"
    mail = {**USER, "headers": {"Received": received}, "text": text}
    return live(image, [mail, mail, {**mail, "text": text + GTUBE}], resolver=False)


def verdict(scan: list[tuple[str, str]]) -> str:
    """How the filter ends a message: accept, or the reply that Postfix gives."""
    kind, text = scan[-1]
    return text.strip("\0") if kind == "y" else {"a": "accept", "c": "accept"}.get(kind, kind)


def test_gtube_is_refused_in_both_directions(outcome: Outcome) -> None:
    for scan in outcome.scans[1:3]:
        assert verdict(scan).startswith("554 5.7.1")


def test_what_others_found_is_replaced_by_what_we_found(outcome: Outcome) -> None:
    changes = outcome.scans[0]
    removed = [text[4:].split("\0")[0] for kind, text in changes if kind == "m"]
    assert "X-Spam" in removed
    (found,) = (text for kind, text in changes if kind == "i" and "Authentication-Res" in text)
    assert "mx.invented.example;" in found and "spf=" in found and "dkim=none" in found


def test_a_login_that_sends_too_much_is_slowed_down(outcome: Outcome) -> None:
    alice = [verdict(scan) for scan in outcome.scans[3 : 4 + LIMIT]]
    assert not [v for v in alice[:LIMIT] if "Ratelimit" in v]
    assert alice[-1].startswith("451 4.7.1") and "user_messages" in alice[-1]


def test_another_login_is_not(outcome: Outcome) -> None:
    assert "Ratelimit" not in verdict(outcome.scans[4 + LIMIT])


def test_recipients_are_counted_too(outcome: Outcome) -> None:
    first, second = (verdict(scan) for scan in outcome.scans[5 + LIMIT : 7 + LIMIT])
    assert "Ratelimit" not in first
    assert second.startswith("451 4.7.1") and "user_recipients" in second


def test_mail_from_outside_is_not_counted(outcome: Outcome) -> None:
    assert len(outcome.scans) == 9 + 2 * LIMIT
    assert not [v for v in map(verdict, outcome.scans[7 + LIMIT :]) if "Ratelimit" in v]


def test_nobody_gets_in_without_the_password(outcome: Outcome) -> None:
    assert outcome.controller == [401, 401, 200]
    assert all(answer.startswith("-NOAUTH") for answer in outcome.redis)
    assert outcome.known == "+OK" or outcome.known == "+PONG"


def test_rspamd_follows_sentinel_with_its_password(outcome: Outcome) -> None:
    assert "NOAUTH" not in outcome.log
    assert "replace write servers with new list" in outcome.log


def test_it_scans_promptly_without_its_map_servers(outcome: Outcome) -> None:
    assert "cannot resolve maps.rspamd.com" in outcome.log
    assert outcome.seconds < 20


def test_without_a_resolver_it_starts_as_fast(without_resolver: Outcome) -> None:
    assert without_resolver.seconds < 20


def test_without_a_resolver_it_answers_before_postfix_gives_up(without_resolver: Outcome) -> None:
    assert "query timed out" in without_resolver.log
    limit = spam_filter().content_timeout
    assert limit is not None
    assert max(without_resolver.times) < limit, without_resolver.times
    assert verdict(without_resolver.scans[-1]).startswith("554 5.7.1")
