"""webmail in a browser: Roundcube as configured, before a replica of the mailboxes.

One machine has both, and a submission server that keeps what it is given. No rehearsal is needed:
what a person does in the browser is the same that the contract's checks do there.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from mailsite.fragment import File
from mailsite.model import Platform, Role
from mailsite.roles import webmail
from rehearsal import image as layers
from rehearsal import network
from rehearsal.ca import Authority
from rehearsal.progress import Progress
from tests.render.conftest import all_files
from tests.render.image import _ENTER, Image
from tests.render.test_maildrop import PASSWORD, replica, site
from verify import browser
from verify import webmail as checks
from verify.client import Client
from verify.context import eventually, expect
from verify.lab import LabMachine
from verify.maildrop import Owner
from verify.registry import Failed
from verify.roundcube import Roundcube

TRUSTED = "/etc/ssl/certs/ca-certificates.crt"

# What runs in the machine, until standard input ends. The addresses of other hosts lie on the
# loopback. What the submission server is given lies in /tmp/sent, one JSON object for each mail.
_MACHINE = r"""
import base64, imaplib, json, os, re, socket, ssl, subprocess, sys, threading, time

order = json.loads(sys.stdin.readline())
log = open("/tmp/daemons", "w")

def shell(text):
    done = subprocess.run(["sh", "-ec", text], stdout=log, stderr=log)
    if done.returncode:
        sys.exit(open("/tmp/daemons").read())

for address in order["addresses"]:
    shell(f"ip addr add {address}/32 dev lo")
shell('''
mkdir -p /srv/mail /var/dovecot /var/lib/pairsync /var/spool/postfix/private /run/php /tmp/sent
ln -s /var/spool/postfix /srv/mail/postfix
/usr/local/lib/mail-platform/mail-mailboxes
mount --bind /srv/mail/dovecot /var/dovecot
mount --bind /srv/mail/pairsync /var/lib/pairsync
''' + order["prepare"])

class Submission(threading.Thread):
    def __init__(self, client):
        super().__init__(daemon=True)
        self.client = client

    def run(self):
        try:
            self.serve()
        except OSError:
            pass  # it only looked whether somebody is here

    def serve(self):
        self.file = self.client.makefile("rwb")
        self.say("220 submission ESMTP")
        login, sender, recipients = None, None, []
        while line := self.file.readline().decode().strip():
            verb, _, rest = line.partition(" ")
            match verb.upper():
                case "EHLO":
                    self.say("250-submission\r\n250-STARTTLS\r\n250 AUTH PLAIN")
                case "STARTTLS":
                    self.say("220 go on")
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(order["submission"])
                    self.client = context.wrap_socket(self.client, server_side=True)
                    self.file = self.client.makefile("rwb")
                case "AUTH":
                    words = rest.split()
                    if len(words) == 1:
                        self.say("334 ")
                        words.append(self.file.readline().decode().strip())
                    login = base64.b64decode(words[1]).decode().split("\0")[1:]
                    self.say("235 welcome")
                case "DATA":
                    self.say("354 go on")
                    text = b""
                    while (row := self.file.readline()) != b".\r\n":
                        text += row
                    name = f"/tmp/sent/{time.time_ns()}"
                    with open(f"{name}.new", "w") as file:
                        json.dump([login, sender, recipients, text.decode()], file)
                    os.rename(f"{name}.new", f"{name}.json")
                    self.say("250 taken")
                case "MAIL":
                    sender, recipients = rest, []
                    self.say("250 ok")
                case "RCPT":
                    recipients.append(rest)
                    self.say("250 ok")
                case _:
                    self.say("221 bye" if verb.upper() == "QUIT" else "250 ok")

    def say(self, words):
        self.file.write(words.encode() + b"\r\n")
        self.file.flush()

def submission(address):
    with socket.create_server((address, 587)) as server:
        while True:
            Submission(server.accept()[0]).start()

for address in order["senders"]:
    threading.Thread(target=submission, args=(address,), daemon=True).start()
daemons = [
    subprocess.Popen(command, stdout=log, stderr=log)
    for command in (["dovecot", "-F"], order["fpm"], ["nginx", "-g", "daemon off;"])
]

def ready():
    for address, port in order["ports"]:
        socket.create_connection((address, port), 5).close()
    context = ssl.create_default_context()
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    client = imaplib.IMAP4_SSL(order["name"], 993, ssl_context=context, timeout=20)
    client.login(order["user"], order["password"])
    for mail in order["mails"]:
        assert client.append("INBOX", None, None, mail.encode())[0] == "OK"
    client.logout()

deadline = time.monotonic() + 60
while True:
    try:
        ready()
        break
    except (OSError, imaplib.IMAP4.error) as error:
        if time.monotonic() > deadline:
            sys.exit(f"{error}\n{open('/tmp/daemons').read()}")
        time.sleep(0.1)
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    done = subprocess.run(asked["argv"], input=asked["input"], capture_output=True, text=True)
    print(json.dumps([done.returncode, done.stdout, done.stderr]), flush=True)
for daemon in daemons:
    daemon.kill()
"""


@dataclass(frozen=True)
class Machine:
    """The machine while it runs. ``folder``: what it wrote lies below."""

    client: Client
    authority: Authority
    folder: Path
    process: subprocess.Popen[str]
    name: str = "the machine"

    def call(
        self, *argv: str, input: str | bytes | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there, as checks do on a host of a rehearsal."""
        assert self.process.stdin is not None and self.process.stdout is not None
        words = input.decode() if isinstance(input, bytes) else input
        self.process.stdin.write(json.dumps({"argv": argv, "input": words or ""}) + "\n")
        self.process.stdin.flush()
        status, out, err = json.loads(self.process.stdout.readline())
        return subprocess.CompletedProcess(argv, status, out, err)

    def run(self, *argv: str, input: str | bytes | None = None) -> str:
        done = self.call(*argv, input=input)
        if done.returncode:
            raise Failed(f"{argv}: {done.stdout}{done.stderr}")
        return done.stdout

    def sent(self) -> list[tuple[list[str], str, list[str], str]]:
        """Each mail that was submitted: login and password, sender, recipients, text."""
        found = sorted((self.folder / "tmp/sent").glob("*.json"))
        return [tuple(json.loads(p.read_text("utf-8"))) for p in found]  # type: ignore[misc]


def letter(subject: str, *headers: str) -> str:
    rows = [
        "From: Somebody <somebody@sender.invented.example>",
        "To: plain@invented.example",
        f"Subject: {subject}",
        f"Message-ID: <{subject}@sender.invented.example>",
        *headers,
    ]
    return "\r\n".join([*rows, "", f"The text of {subject}.", ""])


MAILS = (letter("first"), letter("second", "References: <first@sender.invented.example>"))


def both(platform: Platform, authority: Authority) -> dict[str, File]:
    """The files of a replica and of webmail together, with certificates of one authority."""
    host = platform.members(Role.WEBMAIL)[0]
    files = {**replica(platform), **all_files(platform, host)}
    # Of the two mail servers the replica's is there: they exclude each other.
    for path in ("/etc/smtpd.conf", "/etc/mail/aliases", "/etc/mail/secrets"):
        files.pop(path, None)
    for path in [p for p in files if p.startswith("/etc/certs/")]:
        issued = authority.issue([path.split("/")[3]])
        files[path] = replace(files[path], content=issued.key + issued.chain)
    submission = authority.issue([platform.names.smtp_out])
    files["/etc/certs/submission.pem"] = File(submission.key + submission.chain, mode=0o600)
    files[TRUSTED] = File(authority.root_pem)
    dovecot = files["/etc/dovecot/dovecot.conf"]
    inside = platform.internal_leg(platform.replicas[0]).ipv4
    # The loopback is NGINX's here.
    own = dovecot.content.replace("listen = *, ::", f"listen = {inside}")
    files["/etc/dovecot/dovecot.conf"] = replace(dovecot, content=own)
    return files


@contextmanager
def running(image: Image, platform: Platform, folder: Path) -> Iterator[Machine]:
    authority = Authority(folder)
    inside = str(platform.internal_leg(platform.replicas[0]).ipv4)
    senders = [str(platform.internal_leg(h).ipv4) for h in platform.members(Role.SMTP_OUT)]
    order = {
        "addresses": [inside, *senders],
        "senders": senders[:1],
        "submission": "/etc/certs/submission.pem",
        "prepare": webmail.PREPARE,
        "fpm": [f"php-fpm{webmail.PHP}", "--nodaemonize"],
        "ports": [(inside, 993), (inside, 4190), ("127.0.0.1", 587), ("127.0.0.1", 443)],
        "name": platform.webmail_backend,
        "user": "plain",
        "password": PASSWORD,
        "mails": MAILS,
    }
    hosts = f"127.0.0.1 localhost\n{inside} {platform.webmail_backend}\n"
    files = both(platform, authority) | {"/etc/hosts": File(hosts)}
    with image.prepared(files) as (lower, top):
        argv = [
            *("unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child"),
            *("sh", "-c", _ENTER, "sh", lower),
            *(str(top / part) for part in ("upper", "work", "root")),
        ]
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "RUN": _MACHINE},
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "ready\n", (top / "upper/tmp/daemons").read_text()
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            place = f"/proc/{children.split()[0]}/ns/net"
            client = Client("the machine", partial(network.enter, place))
            yield Machine(client, authority, top / "upper", process)
        finally:
            process.stdin.close()
            process.wait(timeout=30)


@contextmanager
def visit(machine: Machine, platform: Platform) -> Iterator[Roundcube]:
    name = platform.names.webmail
    said: list[str] = []
    shots = os.environ.get("MAIL_SHOTS")
    try:
        with browser.opened(
            machine.client,
            layers=layers.ensure(Progress(quiet=True)).browser,
            authorities=[machine.authority.root_pem],
            resolver="127.0.0.1",
            names={name: "127.0.0.1"},
        ) as page:
            where = Path(shots) if shots else None
            yield Roundcube(page, f"https://{name}", where, said.append)
    except Failed as error:
        daemons = (machine.folder / "tmp/daemons").read_text("utf-8", "replace")
        raise AssertionError(
            "\n".join(
                [
                    str(error),
                    *said[-40:],
                    "\n".join(r for r in daemons.splitlines() if "/dev/log" not in r)[-3000:],
                ]
            )
        ) from error


@pytest.fixture(scope="module")
def machine(image: Image) -> Iterator[Machine]:
    with (
        tempfile.TemporaryDirectory() as folder,
        running(image, site(), Path(folder)) as found,
    ):
        yield found


def test_a_person_reads_answers_and_filters(machine: Machine) -> None:
    with visit(machine, site()) as rc:
        rc.login("plain", PASSWORD)
        assert rc.setting("skin") == "elastic"
        assert rc.setting("threading")
        assert "The text of first." in rc.read("first")
        rc.answer("This is the answer.")

        def submitted() -> tuple[list[str], str, list[str], str]:
            expect(machine.sent(), "no mail was submitted")
            return machine.sent()[0]

        (login, _), sender, recipients, text = eventually(submitted, seconds=30)
        assert login == site().webmail.sasl_user  # type: ignore[union-attr]
        assert "<plain@invented.example>" in sender
        assert "somebody@sender.invented.example" in recipients[0]
        assert "In-Reply-To: <first@sender.invented.example>" in text
        rc.add_filter("probe", "a word", "Archive")
        active = machine.folder / "srv/mail/dovecot/users/plain/.dovecot.sieve"
        script = (active.parent / active.readlink()).read_text("utf-8")
        assert "# rule:[probe]" in script and 'fileinto "Archive"' in script
        rc.remove_filter("probe")
        rc.logout()


def test_a_wrong_password_opens_nothing(machine: Machine) -> None:
    with (
        pytest.raises(AssertionError, match="Roundcube says: Login failed"),
        visit(machine, site()) as rc,
    ):
        rc.login("plain", "wrong")


def wrong_certificates(authority: Authority, names: list[str]) -> list[tuple[str, str, str]]:
    """As :meth:`verify.lab.Lab.wrong_certificates`."""
    found = []
    for name in names:
        other, own = authority.issue([f"not-{name}"]), authority.self_signed([name])
        found.append((f"another name than {name}", other.chain, other.key))
        found.append((f"{name}, self-signed", own.chain, own.key))
    return found


def test_servers_that_cannot_prove_their_name_are_told_nothing(machine: Machine) -> None:
    platform = site()
    names = [platform.webmail_backend, platform.names.smtp_out]
    wrong = wrong_certificates(machine.authority, names)
    owner = Owner("plain", PASSWORD)
    assert checks.refuses_impostors(cast(LabMachine, machine), owner, wrong) == 3 * len(wrong)


@pytest.mark.parametrize(
    ("path", "protocol"), [(webmail.CONFIG, "imap|smtp"), (webmail.SIEVE_CONFIG, "sieve")]
)
def test_a_configuration_that_does_not_ask_for_the_name_is_seen(
    machine: Machine, path: str, protocol: str
) -> None:
    wrong = wrong_certificates(machine.authority, [site().webmail_backend])
    kept = machine.run("cat", path)
    try:
        machine.run("tee", path, input=kept.replace("_name' => true", "_name' => false"))
        with pytest.raises(Failed, match=f"({protocol}) tells a server with another name"):
            checks.refuses_impostors(cast(LabMachine, machine), Owner("plain", PASSWORD), wrong)
    finally:
        machine.run("tee", path, input=kept)
