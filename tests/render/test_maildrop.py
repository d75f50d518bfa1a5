"""maildrop, running: Postfix and Dovecot as they are configured, from RCPT to the mail client."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import bcrypt
import pytest

from mailsite.fragment import File
from mailsite.model import Mailbox, MailboxTarget, MailDomain, Platform, Role
from mailsite.roles import maildrop, rspamd
from tests.render.conftest import all_files, cases, certificate
from tests.render.image import Image, Step

# What runs in the machine: the daemons as their units start them, a stub where the spam filter
# learns, and clients. The addresses of other hosts lie on the loopback, to connect from. What is
# observed comes back as one JSON object, by name.
_LIVE = r"""
import base64, email, http.server, imaplib, json, os, re, smtplib, socket, ssl, subprocess, sys
import pathlib, threading, time

order = json.load(sys.stdin)
seen, learned = {}, []
log = open("/tmp/daemons", "w")

def shell(text):
    return subprocess.run(["sh", "-ec", text], check=True, capture_output=True, text=True).stdout

def wait(true, what, seconds=20):
    deadline = time.monotonic() + seconds
    while True:
        found = true()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}\n{journal()}")
        time.sleep(0.02)

def journal():
    return open("/var/log/mail.log").read() + open("/tmp/daemons").read()

def try_connect(address, source=None):
    try:
        return socket.create_connection(address, 10, source_address=(source, 0) if source else None)
    except OSError:
        return None

for address in order["addresses"]:
    shell(f"ip addr add {address}/32 dev lo")
shell('''
mkdir -p /srv/mail /var/dovecot /var/lib/pairsync
/usr/local/lib/mail-platform/mail-mailboxes
/usr/local/lib/mail-platform/mail-queue
mount --bind /srv/mail/dovecot /var/dovecot
mount --bind /srv/mail/postfix /var/spool/postfix
mount --bind /srv/mail/pairsync /var/lib/pairsync
: >/var/log/mail.log
chmod 666 /var/log/mail.log
''')

class Controller(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"]))
        learned.append([self.path, self.headers["Password"], text.decode()])
        self.send_response(Controller.status)
        self.end_headers()

    def log_message(self, *_):
        pass

controller = http.server.ThreadingHTTPServer(tuple(order["controller"]), Controller)
threading.Thread(target=controller.serve_forever, daemon=True).start()
tracer = []
if order["strace"]:
    os.mkdir("/tmp/strace")
    for name, content in order["strace"].items():
        with open(f"/tmp/strace/{name}", "wb") as file:
            file.write(base64.b64decode(content))
        os.chmod(file.name, 0o755)
    os.environ["LD_LIBRARY_PATH"] = "/tmp/strace"
    tracer = ["/tmp/strace/strace", "-f", "-yy", "-s", "80", "-o", "/tmp/trace",
        "-e", "trace=fsync,fdatasync,write,writev,sendto,sendmsg"]
commands = (["unbound", "-d"], [*tracer, "dovecot", "-F"])
daemons = [subprocess.Popen(command, stdout=log, stderr=log) for command in commands]
wait(lambda: os.path.exists("/var/spool/postfix/private/dovecot-lmtp"), "no LMTP socket")
subprocess.run(["postfix", "start"], check=True, stdout=log, stderr=log)
for port in (25, 10026):
    wait(lambda: try_connect(("127.0.0.1", port)), f"port {port} does not answer").close()

INBOUND, FRONTEND, STRANGER = order["inbound"], order["frontend"], order["stranger"]
DOMAIN, PASSWORD = order["domain"], order["password"]

# -- mail comes in

def mail_context(check_name=False):
    context = ssl.create_default_context(cafile=order["maildrop_certificate"])
    context.check_hostname = check_name
    return context

def smtp(source=INBOUND, port=25):
    client = smtplib.SMTP(timeout=20, source_address=(source, 0))
    client._host = DOMAIN
    client.connect("127.0.0.1", port)
    client.ehlo("in.invented.example")
    if port == 25:
        client.starttls(context=mail_context(check_name=True))
        client.ehlo("in.invented.example")
    return client

def send(recipient, text, sender="someone@sender.invented.example", source=INBOUND):
    client = smtp(source)
    replies = [client.mail(sender), client.rcpt(recipient)]
    if replies[-1][0] == 250:
        replies.append(client.data(text))
    client.close()
    return [[code, words.decode()] for code, words in replies]

def mail(subject, *headers, body="body"):
    lines = ["From: someone@sender.invented.example", f"Subject: {subject}", *headers, "", body, ""]
    return "\r\n".join(lines)

def settled():
    return shell("postqueue -j") == ""

def deliver(recipient, text, **more):
    replies = send(recipient, text, **more)
    wait(settled, f"the mail for {recipient} stays in the queue")
    return replies

# -- mail is read

def imap(user, password=PASSWORD, port=993):
    client = imaplib.IMAP4_SSL("localhost", port, ssl_context=order_context(), timeout=20)
    client.login(user, password)
    return client

def order_context():
    context = ssl.create_default_context(cafile=order["certificate"])
    context.check_hostname = False
    return context

def subjects(client, folder):
    status, data = client.select(f'"{folder}"')
    if status != "OK":
        return None
    found = client.search(None, "ALL")[1][0].split()
    what = "(FLAGS BODY.PEEK[HEADER.FIELDS (SUBJECT DELIVERED-TO)])"
    rows = [client.fetch(n, what)[1][0] for n in found]
    return [" ".join(header.decode().split()) + " " + about.decode() for about, header in rows]

def attempt(function, *arguments, **named):
    try:
        result = function(*arguments, **named)
        return "ok" if not isinstance(result, str) else result
    except Exception as error:
        return f"{type(error).__name__}: {error}"

class Sieve:
    # ManageSieve (RFC 5804), as much of it as is needed.
    def __init__(self, port=4190, header=b"", tls=True, source="127.0.0.1"):
        place, mine = ("127.0.0.1", port), (source, 0)
        self.connection = socket.create_connection(place, 20, source_address=mine)
        self.connection.sendall(header)
        self.file = self.connection.makefile("rb")
        self.greeting = self.answer()
        if tls:
            self.say("STARTTLS")
            context = order_context()
            self.connection = context.wrap_socket(self.connection, server_hostname="localhost")
            self.file = self.connection.makefile("rb")
            self.greeting = self.answer()

    def answer(self):
        text = ""
        while True:
            line = self.file.readline().decode()
            last = not line or re.match(r"(OK|NO|BYE)\b", line)
            while literal := re.search(r"\{(\d+)\+?\}\r\n$", line):
                line += self.file.read(int(literal[1])).decode() + self.file.readline().decode()
            text += line
            if last:
                return text

    def say(self, line):
        self.connection.sendall(line.encode() + b"\r\n")
        return self.answer()

    def login(self, user, password=PASSWORD):
        plain = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
        return self.say(f'AUTHENTICATE "PLAIN" "{plain}"')

    def put(self, name, script):
        return self.say(f'PUTSCRIPT "{name}" {{{len(script)}+}}\r\n{script}')

exec(order["scenario"])
shell("postqueue -j > /tmp/waiting")
seen["waiting"] = open("/tmp/waiting").read()
seen["learned"] = learned
seen["log"] = journal()
subprocess.run(["postfix", "stop"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
for daemon in daemons:
    daemon.kill()
json.dump(seen, sys.stdout)
"""

PASSWORD = "an invented password"


@cache
def site() -> Platform:
    """A site with mailboxes of every kind."""
    known = next(c for c in cases() if Role.MAILDROP in c.host.roles).platform
    boxes: Mapping[str, Mapping[str, Any]] = {
        "plain": {},
        "filtered": {},
        "small": {"quota": "1 MiB"},
        "mover": {},
        "late": {},
        "away": {"suspended": True},
    }
    mailboxes = {
        name: Mailbox.model_validate({"name": name, "description": "invented", **more})
        for name, more in boxes.items()
    }
    targets = {name: (MailboxTarget(name),) for name in mailboxes}
    domain = MailDomain.model_validate({"name": "invented.example", "addresses": targets})
    domains = {**known.domains, domain.name: domain}
    return known.model_copy(update={"mailboxes": mailboxes, "domains": domains})


def served_names(platform: Platform) -> list[str]:
    """The names that clients of Dovecot come by."""
    return [platform.names.imap, platform.webmail_backend]


def replica(platform: Platform) -> dict[str, File]:
    """The first replica, which logs to files, and whose users all have the same password."""
    files = all_files(platform, platform.replicas[0])
    digest = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    rows = "".join(f"{name}:{{BLF-CRYPT}}{digest}\n" for name in maildrop.logins(platform))
    changes = {
        maildrop.PASSWORDS: rows,
        "/etc/postfix/main.cf": files["/etc/postfix/main.cf"].content
        + "maillog_file = /var/log/mail.log\n",
        "/etc/dovecot/dovecot.conf": files["/etc/dovecot/dovecot.conf"].content
        + "log_path = /var/log/mail.log\n",
    }
    for path, content in changes.items():
        files[path] = replace(files[path], content=content)
    return files


def observe(
    image: Image,
    platform: Platform,
    scenario: str,
    *,
    strace: Mapping[str, str] | None = None,
    changes: Mapping[str, tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """What ``scenario``, a program for the machine, saw.

    ``strace``: the program and its libraries, in base64; Dovecot runs below it. ``changes``:
    what is replaced in a file.
    """
    files = replica(platform)
    for path, (old, new) in (changes or {}).items():
        assert old in files[path].content
        files[path] = replace(files[path], content=files[path].content.replace(old, new, 1))
    inbound = platform.internal_leg(platform.members(Role.SMTP_IN)[0]).ipv4
    frontend = platform.internal_leg(platform.members(Role.FRONTEND)[0]).ipv4
    learner = platform.internal_leg(rspamd.learning_host(platform)).ipv4
    paths = maildrop.certificates(platform, platform.replicas[0])
    order = {
        "scenario": scenario,
        "addresses": [str(a) for a in (inbound, frontend, learner, "203.0.113.77")],
        "inbound": str(inbound),
        "frontend": str(frontend),
        "stranger": "203.0.113.77",
        "controller": [str(learner), platform.spam.controller_port],
        "certificate": paths[platform.names.imap],
        "maildrop_certificate": paths[platform.maildrop_domain],
        "domain": platform.maildrop_domain,
        "names": served_names(platform),
        "prober": maildrop.prober(platform),
        "password": PASSWORD,
        "strace": strace,
    }
    builds = [Step(build.command) for build in maildrop.map_builds()]
    live = Step(("python3", "-c", _LIVE), input=json.dumps(order))
    *built, last = image.run(files, [*builds, live])
    assert [step.words for step in built if step.status] == []
    assert last.status == 0, last.words
    found: dict[str, Any] = json.loads(last.out)
    return found


# -- mail comes in -----------------------------------------------------------------------------

_DELIVERY = r"""
seen["greeting"] = smtp().ehlo_resp.decode()
seen["first"] = deliver(f"plain@{DOMAIN}", mail("first"))
seen["tagged"] = deliver(f"plain+Tag@{DOMAIN}", mail("tagged"))
seen["upper"] = deliver(f"Plain@{DOMAIN}", mail("upper"))
seen["suspended"] = deliver(f"away@{DOMAIN}", mail("suspended"))
seen["unknown"] = send(f"nobody@{DOMAIN}", mail("unknown"))
seen["elsewhere"] = send("other@there.invented.example", mail("elsewhere"))
seen["stranger"] = send(f"plain@{DOMAIN}", mail("stranger"), source=STRANGER)
seen["smtps"] = attempt(lambda: smtplib.SMTP_SSL("127.0.0.1", 465, timeout=20,
    source_address=(INBOUND, 0), context=mail_context()).ehlo()[1].decode())
seen["files"] = shell("find /var/dovecot/users/plain -type f | xargs stat -c '%n %U:%G %a'")
seen["top"] = shell("stat -c '%U %a' /var/dovecot/users /var/dovecot")
seen["inbox"] = subjects(imap("plain"), "INBOX")
seen["folders"] = [row.decode() for row in imap("plain").list()[1]]
seen["subscribed"] = [row.decode() for row in imap("plain").lsub()[1]]
dirty = pathlib.Path("/var/lib/pairsync/dirty")
seen["marked"] = sorted(file.name for file in dirty.iterdir() if file.name[0] != "!")
seen["noted"] = sorted([file.name.split("!")[1], file.read_text()] for file in dirty.glob("!*"))
"""


@pytest.fixture(scope="session")
def delivery(image: Image) -> dict[str, Any]:
    return observe(image, site(), _DELIVERY)


def test_mail_lies_in_mdbox_below_the_home_and_belongs_to_vmail(delivery: dict[str, Any]) -> None:
    assert [code for code, _ in delivery["first"]] == [250, 250, 250]
    rows = [row.split() for row in delivery["files"].splitlines()]
    assert any(path.startswith(f"{maildrop.HOMES}/plain/mdbox/storage/m.") for path, *_ in rows)
    assert {owner for _, owner, _ in rows} == {"vmail:vmail"}
    assert delivery["top"].split()[:2] == ["vmail", "700"]


def test_smtp_in_meets_the_certificate_of_the_domain(delivery: dict[str, Any]) -> None:
    """The client of the scenario verifies it, and STARTTLS is not a choice."""
    assert "AUTH" not in delivery["greeting"]
    assert "PIPELINING" in delivery["smtps"] and "STARTTLS" not in delivery["smtps"]


def test_a_tag_stays_to_be_seen_and_letters_may_be_upper_case(delivery: dict[str, Any]) -> None:
    inbox = "\n".join(delivery["inbox"])
    assert len(delivery["inbox"]) == 3
    assert f"Delivered-To: plain+Tag@{site().maildrop_domain}" in inbox
    assert "Subject: upper" in inbox


def test_unknown_mailboxes_and_strangers_are_refused_at_rcpt(delivery: dict[str, Any]) -> None:
    code, words = delivery["unknown"][-1]
    assert (code, "User unknown" in words) == (550, True)
    assert delivery["elsewhere"][-1][0] == 554 and "Relay access" in delivery["elsewhere"][-1][1]
    assert (
        delivery["stranger"][-1][0] == 554 and "Client host rejected" in delivery["stranger"][-1][1]
    )


def test_mail_comes_in_for_a_suspended_mailbox(delivery: dict[str, Any]) -> None:
    assert delivery["suspended"][-1][0] == 250
    assert delivery["waiting"] == ""


def test_a_new_user_finds_the_usual_folders(delivery: dict[str, Any]) -> None:
    for name, use in maildrop.FOLDERS.items():
        (row,) = [r for r in delivery["folders"] if r.endswith(f" {name}")]
        assert f"\\{use}" in row
        assert any(r.endswith(f" {name}") for r in delivery["subscribed"])


def test_pairsync_is_told_who_changed(delivery: dict[str, Any]) -> None:
    assert delivery["marked"] == ["away", "plain"]


def test_pairsync_is_told_of_the_folder_that_was_made(delivery: dict[str, Any]) -> None:
    assert delivery["noted"] == [["away", "\nINBOX\n"], ["plain", "\nINBOX\n"]]


def test_the_log_has_no_warning(delivery: dict[str, Any]) -> None:
    words = ("warning", "error", "panic", "fatal")
    rows = [r for r in delivery["log"].splitlines() if any(w in r.lower() for w in words)]
    assert rows == []


# -- mail is read ------------------------------------------------------------------------------

_LOGIN = r"""
def refused(port, data=b"", source="127.0.0.1"):
    # What a client hears that does not speak as it must, until the server hangs up.
    connection = socket.create_connection(("127.0.0.1", port), 20, source_address=(source, 0))
    connection.sendall(data)
    try:
        return connection.recv(100).decode("latin-1")
    except ConnectionResetError:
        return ""

def proxied(port, header, source):
    connection = socket.create_connection(("127.0.0.1", port), 20, source_address=(source, 0))
    connection.sendall(header)
    stream = order_context().wrap_socket(connection, server_hostname="localhost")
    greeting = stream.recv(200).decode()
    stream.sendall(f'a LOGIN plain "{PASSWORD}"\r\n'.encode())
    answer = ""
    while "a OK" not in answer and "a NO" not in answer:
        answer += stream.recv(4000).decode()
    return [greeting, answer]

def certificate(name):
    context = ssl.create_default_context(cafile=order["certificate"])
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = socket.create_connection(("127.0.0.1", 993), 20)
    stream = context.wrap_socket(connection, server_hostname=name)
    return ssl.DER_cert_to_PEM_cert(stream.getpeercert(binary_form=True))

HEADER = b"PROXY TCP4 198.51.100.200 198.51.100.9 4242 993\r\n"
HEADER6 = b"PROXY TCP6 2001:db8:9::200 2001:db8:9::9 4242 993\r\n"
seen["good"] = attempt(lambda: imap("plain"))
seen["names"] = [attempt(lambda: imap(n)) for n in ("PLAIN", "plain@any.invented.example")]
seen["143"] = try_connect(("127.0.0.1", 143)) is not None
seen["proxied"] = proxied(10993, HEADER, FRONTEND)
seen["proxied6"] = proxied(10993, HEADER6, FRONTEND)
seen["stranger"] = [attempt(lambda: proxied(10993, HEADER, s)) for s in (STRANGER, "127.0.0.1")]
seen["no_header"] = attempt(lambda: proxied(10993, b"", FRONTEND))
seen["sieve_proxied"] = Sieve(14190, HEADER, source=FRONTEND).login("plain")
seen["sieve_stranger"] = refused(14190, HEADER, source=STRANGER)
clear = Sieve(tls=False, source=STRANGER)
seen["sieve_clear"] = [clear.greeting, clear.login("plain")]
seen["certificates"] = [certificate(n) for n in order["names"]]
old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
old.set_ciphers("DEFAULT:@SECLEVEL=0")
old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
seen["old_tls"] = attempt(lambda: old.wrap_socket(socket.create_connection(("127.0.0.1", 993))))
held, seen["fifty"] = [], []
for _ in range(51):
    seen["fifty"].append(attempt(lambda: held.append(imap("mover"))))
# Last: each failure makes Dovecot slower towards the same address.
seen["wrong"] = attempt(lambda: imap("plain", "wrong"))
seen["suspended"] = attempt(lambda: imap("away"))
seen["unknown"] = attempt(lambda: imap("nobody"))
"""


@pytest.fixture(scope="session")
def login(image: Image) -> dict[str, Any]:
    return observe(image, site(), _LOGIN)


def test_the_right_password_opens_the_mailbox_and_nothing_else_does(login: dict[str, Any]) -> None:
    assert [login["good"], *login["names"]] == ["ok"] * 3
    for name in ("wrong", "suspended", "unknown"):
        assert "AUTHENTICATIONFAILED" in login[name]


def test_nobody_reads_without_tls(login: dict[str, Any]) -> None:
    assert login["143"] is False
    greeting, answer = login["sieve_clear"]
    assert '"STARTTLS"' in greeting and '"SASL" ""' in greeting
    assert answer.startswith("NO")
    assert "SSLError" in login["old_tls"] or "ConnectionReset" in login["old_tls"]


def test_behind_a_frontend_the_client_is_seen(login: dict[str, Any]) -> None:
    for name, client in (("proxied", "198.51.100.200"), ("proxied6", "2001:db8:9::200")):
        greeting, answer = login[name]
        assert greeting.startswith("* OK") and "a OK" in answer
        assert f"rip={client}, " in login["log"]
    assert login["sieve_proxied"].startswith("OK")


def test_a_proxy_header_of_anybody_else_is_refused(login: dict[str, Any]) -> None:
    assert len(login["stranger"]) == 2
    for heard in (*login["stranger"], login["no_header"]):
        assert "Error" in heard
    assert login["sieve_stranger"] == ""
    assert "haproxy: Client not trusted (rip=203.0.113.77)" in login["log"]


def test_each_name_has_its_own_certificate(login: dict[str, Any]) -> None:
    shown = [certificate(name) for name in served_names(site())]
    assert login["certificates"] == shown
    assert len({*shown}) == 2


def test_one_client_may_hold_fifty_connections(login: dict[str, Any]) -> None:
    assert login["fifty"][:50] == ["ok"] * 50
    assert "Maximum number of connections" in login["fifty"][50]


# -- filters -----------------------------------------------------------------------------------

_SIEVE = r"""
SPAM = "X-Spam: Yes"
seen["default"] = deliver(f"plain@{DOMAIN}", mail("tagged as spam", SPAM))
seen["plain"] = {name: subjects(imap("plain"), name) for name in ("INBOX", "Junk")}

reader = Sieve()
reader.login("plain")
seen["listed"] = reader.say("LISTSCRIPTS")
editor = Sieve()
seen["login"] = editor.login("filtered")
seen["bad"] = editor.put("bad", 'require "fileinto"; fileinto "Work')
seen["pipe"] = editor.put("pipe", 'require "vnd.dovecot.pipe"; pipe "train-spam";')
script = (
    'require ["fileinto", "mailbox", "editheader"]; addheader "X-Seen" "yes";'
    'if header :contains "Subject" "work" { fileinto :create "Work"; }'
    'elsif header :contains "Subject" "friend" { redirect "friend@there.invented.example"; }'
)
seen["put"] = [editor.put("mine", script), editor.say('SETACTIVE "mine"')]
deliver(f"filtered@{DOMAIN}", mail("for work", SPAM))
deliver(f"filtered@{DOMAIN}", mail("spam for me", SPAM))
imap("filtered").create("shop")
deliver(f"filtered+shop@{DOMAIN}", mail("for the shop"))
deliver(f"filtered+shop@{DOMAIN}", mail("for work in the shop"))
deliver(f"filtered+other@{DOMAIN}", mail("for nobody"))
names = ("INBOX", "Work", "Junk", "shop", "other")
seen["filtered"] = {name: subjects(imap("filtered"), name) for name in names}
client = imap("filtered")
client.select("INBOX")
seen["edited"] = client.fetch("1", "(BODY.PEEK[HEADER])")[1][0][1].decode()
seen["files"] = shell("find /var/dovecot/users/filtered -maxdepth 2 ! -type d -printf '%P %u %l\n'")

send(f"filtered@{DOMAIN}", mail("for a friend"))
forward = lambda: re.search(r"to=<friend@there[^\n]*", journal())
seen["forward"] = wait(forward, "nothing is forwarded")[0]
seen["forward_from"] = re.findall(r"from=<([^>]*)>", journal())
shell("postsuper -d ALL")
"""


@pytest.fixture(scope="session")
def sieve(image: Image) -> dict[str, Any]:
    return observe(image, site(), _SIEVE)


def test_a_user_without_a_script_gets_the_default(sieve: dict[str, Any]) -> None:
    assert sieve["plain"]["INBOX"] == []
    (row,) = sieve["plain"]["Junk"]
    assert "tagged as spam" in row
    assert sieve["listed"].startswith('"default" ACTIVE')


def test_a_bad_script_is_refused_with_a_message(sieve: dict[str, Any]) -> None:
    assert sieve["login"].startswith("OK")
    assert sieve["bad"].startswith("NO") and "line 1" in sieve["bad"]
    assert sieve["pipe"].startswith("NO") and "vnd.dovecot.pipe" in sieve["pipe"]
    assert all(answer.startswith("OK") for answer in sieve["put"])


def test_what_comes_before_and_after_the_users_script_runs(sieve: dict[str, Any]) -> None:
    folders = sieve["filtered"]
    # Before: the keyword, wherever the user's script files the message.
    (first, second) = folders["Work"]
    assert "for work" in first and "$Junk" in first
    # The user's script stands in for the default, and what it files stays there.
    assert "for work in the shop" in second
    assert folders["Junk"] == []
    inbox = " ".join(folders["INBOX"])
    assert "spam for me" in inbox and "$Junk" in inbox
    # After: the folder of the tag, for what would stay in the inbox, if there is one.
    (shop,) = folders["shop"]
    assert "for the shop" in shop and "$Junk" not in shop
    assert folders["other"] is None and "for nobody" in inbox
    assert "X-Seen: yes" in sieve["edited"]


def test_scripts_lie_where_pairsync_looks_for_them(sieve: dict[str, Any]) -> None:
    rows = [row.split() for row in sieve["files"].splitlines()]
    assert [".dovecot.sieve", "vmail", "sieve/mine.sieve"] in rows
    assert {row[1] for row in rows} == {"vmail"}


def test_redirected_mail_leaves_in_the_name_of_the_mailbox(sieve: dict[str, Any]) -> None:
    assert "there.invented.example" in sieve["forward"]
    assert "filtered@invented.example" in sieve["forward_from"]


# -- learning ----------------------------------------------------------------------------------

_LEARN = r"""
for n in range(4):
    deliver(f"mover@{DOMAIN}", mail(f"number {n}"))
client = imap("mover")

def count():
    return len(learned)

def step(name, function):
    before = count()
    answer = function()
    seen[name] = [str(answer[0]), [row[0] for row in learned[before:]]]

client.select("INBOX")
step("copy", lambda: client.copy("1", "Junk"))
step("move", lambda: client.uid("MOVE", "2", "Junk"))
client.select("Junk")
step("out", lambda: client.copy("1", "INBOX"))
step("thrown away", lambda: client.copy("1", "Trash"))
step("within", lambda: client.copy("1", "Junk"))
step("append", lambda: client.append("Junk", "", "", mail("appended").encode()))
step("flag", lambda: client.store("1", "+FLAGS", "Seen"))
client.select("INBOX")
Controller.status = 500
step("broken", lambda: client.copy("1", "Junk"))
controller.shutdown()
controller.server_close()
step("away", lambda: client.copy("1", "Junk"))
client.select("Junk")
seen["there"] = len(client.search(None, "ALL")[1][0].split())
seen["password_file"] = shell("stat -c '%U:%G %a' /etc/dovecot/rspamd-password")
read = ["runuser", "-u", "vmail", "--", "cat", "/etc/dovecot/rspamd-password"]
seen["as_vmail"] = subprocess.run(read, capture_output=True).returncode
"""


@pytest.fixture(scope="session")
def learn(image: Image) -> dict[str, Any]:
    return observe(image, site(), _LEARN)


def test_into_junk_is_learned_as_spam_once(learn: dict[str, Any]) -> None:
    assert learn["copy"] == ["OK", ["/learnspam"]]
    assert learn["move"] == ["OK", ["/learnspam"]]
    _path, password, text = learn["learned"][0]
    assert password.startswith("inventedcontroller-password")
    assert "Subject: number 0" in text and "body" in text


def test_out_of_junk_is_learned_as_ham_but_not_into_the_trash(learn: dict[str, Any]) -> None:
    assert learn["out"] == ["OK", ["/learnham"]]
    assert learn["thrown away"] == ["OK", []]


def test_nothing_else_is_learned(learn: dict[str, Any]) -> None:
    assert learn["append"] == ["OK", []]
    assert learn["flag"] == ["OK", []]
    assert learn["within"] == ["OK", []]


def test_a_filter_that_does_not_learn_is_not_the_users_trouble(learn: dict[str, Any]) -> None:
    assert learn["broken"] == ["OK", ["/learnspam"]]
    assert learn["away"] == ["OK", []]
    assert learn["there"] == 6
    assert "says 500 to a message of mover" in learn["log"]
    assert "a message of mover is not learned" in learn["log"]


def test_users_cannot_read_the_controllers_password(learn: dict[str, Any]) -> None:
    assert learn["password_file"] == "root:dovecot 640\n"
    assert learn["as_vmail"] != 0


# -- quota -------------------------------------------------------------------------------------

_QUOTA = r"""
PROBER = order["prober"]
big = mail("big", body=("x" * 70 + "\r\n") * 8000)

def probe(recipient=f"small@{DOMAIN}"):
    client = smtp()
    client.mail(PROBER)
    code, words = client.rcpt(recipient)
    client.close()
    return [code, words.decode()]

seen["before"] = probe()
# Two of them are more than there is room for.
seen["fill"] = [deliver(f"small@{DOMAIN}", big)[-1] for _ in range(2)]
client = imap("small")
seen["quota"] = client.getquotaroot("INBOX")[1][1][0].decode()
seen["append"] = attempt(lambda: client.append("INBOX", "", "", b"S: x")[1][0].decode())
seen["probe"], seen["mail"] = probe(f"Small+tag@{DOMAIN}"), send(f"small@{DOMAIN}", big)[-1]
seen["others"] = probe(f"plain@{DOMAIN}")
# What Postfix has taken before it was full, and Dovecot does not take any more.
# It comes in on this machine here, whose own mail would go another way.
shell(
    "postconf -e 'smtpd_recipient_restrictions = permit_mynetworks, reject'"
    " && postconf -P pickup/unix/content_filter= pickup/unix/cleanup_service_name=cleanup"
    " && postfix reload"
)
wait(lambda: send(f"small@{DOMAIN}", big)[-1][0] == 554, "the old restrictions")
held = mail("held")
command = ["sendmail", "-f", "someone@sender.invented.example", f"small@{DOMAIN}"]
subprocess.run(command, input=held.encode(), check=True)
delay = lambda: [json.loads(r)["recipients"][0].get("delay_reason") for r in
    shell("postqueue -j").splitlines()]
seen["waits"] = wait(lambda: any(delay()) and delay(), "nothing waits")
# A client deletes by a copy into the trash, and empties that.
client.select("INBOX")
seen["to_trash"] = [client.copy("1", "Trash")[0], client.store("1", "+FLAGS", "\\Deleted")[0]]
client.expunge()
seen["still"] = client.getquotaroot("INBOX")[1][1][0].decode()
client.select("Trash")
client.store("1", "+FLAGS", "\\Deleted")
client.expunge()
shell("postqueue -f")
wait(settled, "what waits does not arrive")
seen["arrived"] = subjects(client, "INBOX")
seen["bounces"] = re.findall(r"status=bounced.*", journal())
"""


@pytest.fixture(scope="session")
def quota(image: Image) -> dict[str, Any]:
    return observe(image, site(), _QUOTA)


def test_a_mailbox_with_room_takes_a_mail_of_any_size(quota: dict[str, Any]) -> None:
    assert quota["before"][0] == quota["others"][0] == 250
    assert [code for code, _ in quota["fill"]] == [250, 250]
    (used,) = re.findall(r"STORAGE (\d+) 1024", quota["quota"])
    assert int(used) > 1024


def test_a_full_mailbox_is_told_to_who_asks_and_lets_mail_wait(quota: dict[str, Any]) -> None:
    code, words = quota["probe"]
    assert code == 552 and words.startswith("5.2.2") and "Mailbox is full" in words
    code, words = quota["mail"]
    assert code == 452 and words.startswith("4.2.2") and "Mailbox is full" in words


def test_what_was_taken_waits_and_arrives_when_there_is_room(quota: dict[str, Any]) -> None:
    (reason,) = quota["waits"]
    assert "452 4.2.2" in reason and "Mailbox is full" in reason
    assert len(quota["arrived"]) == 2
    assert "Subject: held" in " ".join(quota["arrived"])
    assert quota["bounces"] == []


def test_mail_clients_see_the_quota_and_can_make_room(quota: dict[str, Any]) -> None:
    assert "OVERQUOTA" in quota["append"]
    assert quota["to_trash"] == ["OK", "OK"]


# -- on the disk -------------------------------------------------------------------------------

_TRACE = r"""
replies = deliver(f"plain@{DOMAIN}", mail("traced"))
seen["reply"] = replies[-1]
seen["trace"] = open("/tmp/trace").read()
"""


@pytest.fixture(scope="session")
def strace() -> dict[str, str]:
    """strace of this machine with the libraries that it needs."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("strace is not installed")
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    # The machine's own C library does.
    found = [Path(p) for p in re.findall(r"=> (/\S+)", listed) if "/libc.so" not in p]
    return {p.name: base64.b64encode(p.read_bytes()).decode() for p in (Path(program), *found)}


def steps_of_lmtp(trace: str) -> list[str]:
    """What the process did that took the mail, up to its 250: "sync" for each message file."""
    rows = [row.split(None, 1) for row in trace.splitlines()]
    (answered,) = (n for n, (_, call) in enumerate(rows) if " Saved" in call)
    process = rows[answered][0]
    calls = [call for pid, call in rows[:answered] if pid == process]
    # A new file of messages gets its name when it is on the disk.
    message_file = re.compile(r"f(data)?sync\(\d+<.*/mdbox/storage/(m\.\d+|\.temp\.\S+)>")
    synced = [call for call in calls if message_file.match(call)]
    return [*("sync" for _ in synced), "answer"]


@pytest.mark.parametrize(
    ("setting", "expected"), [("always", ["sync", "answer"]), ("never", ["answer"])]
)
def test_a_mail_is_on_the_disk_before_it_is_answered(
    image: Image, strace: dict[str, str], setting: str, expected: list[str]
) -> None:
    change = {"/etc/dovecot/dovecot.conf": ("mail_fsync = always", f"mail_fsync = {setting}")}
    outcome = observe(image, site(), _TRACE, strace=strace, changes=change)
    assert outcome["reply"][0] == 250
    assert list(dict.fromkeys(steps_of_lmtp(outcome["trace"]))) == expected


# -- the command on the host -------------------------------------------------------------------

_LEFT = """\
set -u
homes=/var/dovecot/users
mkdir -p $homes/plain/mdbox $homes/former/mdbox $homes/.hidden
echo mail >$homes/former/mdbox/m.1
for arguments in "list" "left" "remove plain" "remove ../users/plain" "remove" "remove nobody" \
    "remove former" "left" "anything"; do
    echo "== $arguments"
    /usr/local/sbin/mailbox $arguments 2>&1
    echo "-> $?"
done
ls $homes
"""


def test_the_mail_of_a_removed_mailbox_stays_until_it_is_deleted_by_name(image: Image) -> None:
    result = image.run_one(replica(site()), "sh", "-c", _LEFT)
    assert result.status == 0
    first, *parts = result.out.split("== ")
    told = {}
    for part in parts[:-1]:
        arguments, _, rest = part.partition("\n")
        words, _, status = rest.rpartition("-> ")
        told.setdefault(arguments, (words, int(status.split()[0])))
    words, status = told["list"]
    assert status == 0 and set(site().mailboxes) == {row.split()[1] for row in words.splitlines()}
    words, status = told["left"]
    assert status == 0 and [row.split()[1] for row in words.splitlines()] == ["former"]
    assert told["remove plain"][1] == 1 and "mailboxes.yaml" in told["remove plain"][0]
    assert told["remove ../users/plain"][1] == told["remove"][1] == 2
    assert told["remove nobody"][1] == 1
    assert told["remove former"][1] == 0 and "the other one" in told["remove former"][0]
    assert "mailbox list" in parts[-1] and "-> 2" in parts[-1]
    assert parts[-1].split("-> 2")[1].split() == ["plain"]
    assert parts[-2].partition("\n")[2].strip() == "-> 0"
    assert first == ""
