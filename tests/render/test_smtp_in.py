"""smtp-in, running: what it takes, what it refuses, and with which envelope it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest

from mailsite.fragment import File
from mailsite.model import MailDomain, Platform, Role
from mailsite.roles import smtp_in
from tests.render.conftest import Case, all_files, cases
from tests.render.image import Image, Step

# The daemons as their units start them, a server elsewhere at 127.0.0.2, and one connection per
# conversation. What a conversation says, and what arrives, is told as JSON.
_LIVE = r"""
import json, socket, subprocess, sys, threading, time
order = json.load(sys.stdin)
arrived, lock = [], threading.Lock()

def reader(connection):
    return connection.makefile("rb")

def serve(connection):
    lines, say = reader(connection), lambda text: connection.sendall(text.encode() + b"\r\n")
    mail = {"to": []}
    say("220 elsewhere ESMTP")
    for line in lines:
        word = line.decode().strip()
        verb = word[:4].upper()
        if verb == "EHLO":
            mail["helo"] = word[5:]
            say("250 elsewhere")
        elif verb == "MAIL":
            mail["from"] = word.partition("<")[2].partition(">")[0]
            say("250 ok")
        elif verb == "RCPT":
            to = word.partition("<")[2].partition(">")[0]
            if to in order["refused"]:
                say("550 5.1.1 nobody here")
            else:
                mail["to"].append(to)
                say("250 ok")
        elif verb == "DATA" and not mail["to"]:
            say("554 no recipients")
        elif verb == "DATA":
            say("354 go")
            text = b""
            while not text.endswith(b"\r\n.\r\n"):
                text += lines.readline()
            with lock:
                arrived.append({**mail, "text": text.decode()})
            mail = {"to": [], "helo": mail["helo"]}
            say("250 ok")
        elif verb == "QUIT":
            say("221 bye")
            return
        else:
            say("250 ok")

def accept(listener):
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()

listener = socket.create_server(("127.0.0.2", 25))
threading.Thread(target=accept, args=(listener,), daemon=True).start()
log = open("/tmp/daemons", "w")
daemons = [subprocess.Popen(c, stdout=log, stderr=log) for c in order["start"]]
subprocess.run(["postfix", "start"], check=True, stdout=log, stderr=log)

def connect(port):
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 20)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)

def answer(lines):
    text = ""
    while True:
        line = lines.readline().decode()
        text += line
        if line[3:4] != "-":
            return text.strip()

for port in order["ports"]:
    connect(port).close()
told = []
for say in order["conversations"]:
    if say == "stop":
        daemons[-1].kill()
        continue
    if say[0] == "replace":
        subprocess.run(["sh", "-c", say[1]], check=True)
        continue
    connection = connect(25)
    lines = reader(connection)
    started = time.monotonic()
    heard = [answer(lines)]
    for line in say:
        line = line.replace("{last}", arrived[-1]["from"] if arrived else "")
        connection.sendall(line.encode("latin-1") + b"\r\n")
        heard.append(answer(lines))
    told.append({"heard": heard, "seconds": time.monotonic() - started})
    connection.close()
    # Nothing is under way any more when the queue is empty, but for what waits for a retry.
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        waiting = subprocess.run(["postqueue", "-j"], capture_output=True, text=True).stdout
        queues = [json.loads(row)["queue_name"] for row in waiting.splitlines()]
        if not {*queues} - {"deferred"}:
            break
        time.sleep(0.1)
log = open("/var/log/mail.log").read() + open("/tmp/daemons").read()
subprocess.run(["postfix", "stop"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
for daemon in daemons:
    daemon.kill()
json.dump({"told": told, "arrived": arrived, "log": log, "waiting": waiting}, sys.stdout)
"""


@dataclass(frozen=True)
class Outcome:
    told: list[Mapping[str, list[str]]]
    arrived: list[Mapping[str, str]]
    log: str
    waiting: str


OURS = "ours.invented.example"
ALIAS = "alias.invented.example"
THERE = "there.invented.example"
ADDRESSES = {
    "postmaster": ["box"],
    "abuse": ["box+abuse"],
    "someone": ["box+tag"],
    "several": ["box", f"other@{THERE}"],
    "forward": [f"other@{THERE}"],
    "refused": [f"nobody@{THERE}"],
    "noreply": ["/dev/null"],
}


def platform() -> Platform:
    """A site with addresses of every kind."""
    known = next(c for c in cases() if Role.SMTP_IN in c.host.roles).platform
    ours = MailDomain.model_validate({"name": OURS, "addresses": ADDRESSES})
    alias = MailDomain.model_validate({"name": ALIAS, "alias_of": OURS})
    return known.model_copy(update={"domains": {**known.domains, OURS: ours, ALIAS: alias}})


def machine(site: Platform) -> dict[str, File]:
    """A member of smtp-in, of which only 127.0.0.1 is itself and 127.0.0.2 everything else."""
    files = all_files(site, site.members(Role.SMTP_IN)[0])

    def changed(path: str, *pairs: tuple[str, str]) -> None:
        content = files[path].content
        for old, new in pairs:
            assert old in content, old
            content = content.replace(old, new, 1)
        files[path] = replace(files[path], content=content)

    names = "".join(
        f'    local-zone: "{name}." static\n    local-data: "{name}. MX 10 mx.{name}."\n'
        f'    local-data: "mx.{name}. A 127.0.0.2"\n'
        for name in (THERE, site.maildrop_domain, "sender.invented.example")
    )
    changed("/etc/unbound/unbound.conf", ("\nremote-control:", f"\n{names}\nremote-control:"))
    changed(
        "/etc/postfix/main.cf",
        ("inet_interfaces = all", "inet_interfaces = 127.0.0.1\nmaillog_file = /var/log/mail.log"),
        # No client is ourselves, or everything would be allowed.
        ("mynetworks = 127.0.0.0/8, [::1]/128", "mynetworks = 192.0.2.77"),
        ("smtp_tls_security_level = ", "smtp_tls_security_level = none\n#"),
        (" = secure }", " = none }"),
    )
    return files


def run(
    image: Image, files: Mapping[str, File], conversations: Sequence[object], *start: Sequence[str]
) -> Outcome:
    daemons = (
        ("unbound", "-d"),
        ("nginx", "-g", "daemon off;"),
        ("/usr/share/postsrsd/postsrsd-systemd-launcher",),
    )
    order = {
        "conversations": conversations,
        "start": [*daemons, *start],
        "ports": [53, 10001, 10002, smtp_in.SMTP, smtp_in.FORWARD],
        "refused": [f"nobody@{THERE}"],
    }
    builds = [Step(build.command) for build in smtp_in.map_builds()]
    live = Step(("python3", "-c", _LIVE), input=json.dumps(order))
    *_, last = image.run(files, [*builds, live])
    assert last.status == 0, last.words
    return Outcome(**json.loads(last.out))


def mail(sender: str, *recipients: str, text: str = "Subject: x\r\n\r\nbody") -> list[str]:
    return [
        "EHLO mx.sender.invented.example",
        f"MAIL FROM:<{sender}>",
        *(f"RCPT TO:<{recipient}>" for recipient in recipients),
        "DATA",
        f"{text}\r\n.",
    ]


SENDER = "someone@sender.invented.example"


@pytest.fixture(scope="session")
def outcome(image: Image) -> Outcome:
    site = platform()
    no_lists = site.inbound.model_copy(update={"dnsbl": ()})
    site = site.model_copy(update={"inbound": no_lists})
    srs = site.inbound.srs_domain
    return run(
        image,
        machine(site),
        [
            mail(SENDER, f"several@{OURS}"),
            mail(SENDER, f"forward@{ALIAS}"),
            mail("", "{last}"),
            mail(SENDER, f"noreply@{OURS}"),
            mail(SENDER, f"someone+more@{OURS}"),
            mail(SENDER, f"unknown@{OURS}", f"unknown@{ALIAS}", f"other@{THERE}"),
            mail("", f"SRS0=aaaa=bb={THERE}=other@{srs}", f"nonsense@{srs}"),
            mail(SENDER, f"refused@{OURS}"),
            ["replace", f"echo 'new@{OURS} box@{site.maildrop_domain}' >> /etc/postfix/virtual;"
             " cp /etc/postfix/virtual /etc/postfix/next; postmap lmdb:/etc/postfix/next;"
             " mv /etc/postfix/next.lmdb /etc/postfix/virtual.lmdb"],
            mail(SENDER, f"new@{OURS}"),
            "stop",
            mail(SENDER, f"someone@{OURS}"),
        ],
    )  # fmt: skip


def arrivals(outcome: Outcome, recipient: str) -> list[str]:
    """The envelope senders that mail for ``recipient`` came with."""
    return [mail["from"] for mail in outcome.arrived if recipient in mail["to"]]


def test_mail_for_a_mailbox_keeps_its_sender_and_a_forward_does_not(outcome: Outcome) -> None:
    site = platform()
    box, other = outcome.arrived[:2]
    if box["to"] != [f"box@{site.maildrop_domain}"]:
        box, other = other, box
    assert (box["to"], box["from"]) == ([f"box@{site.maildrop_domain}"], SENDER)
    assert other["to"] == [f"other@{THERE}"]
    assert other["from"].startswith("SRS0=")
    assert other["from"].endswith(f"=sender.invented.example=someone@{site.inbound.srs_domain}")


def test_both_ways_out_say_the_members_own_name(outcome: Outcome) -> None:
    site = platform()
    name = smtp_in.helo_name(site, site.members(Role.SMTP_IN)[0])
    assert {mail["helo"] for mail in outcome.arrived} == {name}


def test_a_domain_alias_knows_what_its_target_knows(outcome: Outcome) -> None:
    assert len(arrivals(outcome, f"other@{THERE}")) == 2
    for refusal in outcome.told[5]["heard"][3:5]:
        assert refusal.startswith("550 5.1.1") and "User unknown" in refusal


def test_other_peoples_domains_are_refused_for_good(outcome: Outcome) -> None:
    assert (
        outcome.told[5]["heard"][5].startswith("554 5.7.1")
        and "Relay access denied" in (outcome.told[5]["heard"][5])
    )


def test_a_bounce_to_a_rewritten_sender_comes_home(outcome: Outcome) -> None:
    # The one that was sent to it, and one that this machine made of a refused forward.
    assert arrivals(outcome, SENDER) == ["", ""]


def test_a_forged_srs_address_is_unknown(outcome: Outcome) -> None:
    for refusal in outcome.told[6]["heard"][3:5]:
        assert refusal.startswith("550 5.1.1") and "User unknown" in refusal


def test_nowhere_swallows(outcome: Outcome) -> None:
    assert outcome.told[3]["heard"][-1].startswith("250 2.0.0 Ok: queued")
    assert "to=<null@discard.invalid>" in outcome.log
    assert not [to for mail in outcome.arrived for to in mail["to"] if "discard" in to]


def test_an_extension_reaches_the_mailbox(outcome: Outcome) -> None:
    assert arrivals(outcome, f"box+tag+more@{platform().maildrop_domain}") == [SENDER]


def test_a_replaced_table_is_in_force_without_a_reload(outcome: Outcome) -> None:
    assert outcome.told[8]["heard"][3].startswith("250")
    assert "reload" not in outcome.log and "refresh" not in outcome.log


def test_without_postsrsd_mail_for_mailboxes_goes_on(outcome: Outcome) -> None:
    assert arrivals(outcome, f"box+tag@{platform().maildrop_domain}") == [SENDER]


def test_mail_is_taken_with_a_warning_while_no_spam_filter_lives(outcome: Outcome) -> None:
    assert "warning: milter inet:127.0.0.1:11332: " in outcome.log
    assert max(told["seconds"] for told in outcome.told) < 5


def test_no_login_is_offered(outcome: Outcome) -> None:
    greeting = outcome.told[0]["heard"][1]
    assert "STARTTLS" in greeting and "AUTH" not in greeting


def test_nothing_waits_in_the_end(outcome: Outcome) -> None:
    assert outcome.waiting == ""


# -- settings ----------------------------------------------------------------------------------

MEMBERS = [c for c in cases() if Role.SMTP_IN in c.host.roles]


@pytest.mark.parametrize("case", MEMBERS, ids=lambda c: c.id)
def test_postfix_settings_in_force(image: Image, case: Case) -> None:
    files = all_files(case.platform, case.host)
    text, services = image.run(files, [Step(("postconf", "-x")), Step(("postconf", "-M"))])
    found = dict(line.split(" = ", 1) for line in text.out.splitlines() if " = " in line)
    name, limits = case.platform.names.smtp_in, case.platform.inbound.limits
    expected = {
        "myhostname": name,
        "smtpd_banner": f"{name} ESMTP Postfix ({case.host.name})",
        "smtpd_sasl_auth_enable": "no",
        "smtpd_relay_restrictions": "permit_mynetworks, reject_unauth_destination",
        "smtpd_relay_before_recipient_restrictions": "no",
        "unknown_address_reject_code": "550",
        "smtpd_forbid_bare_newline": "normalize",
        "milter_default_action": "accept",
        "smtpd_milters": "{ inet:127.0.0.1:11332, default_action=accept, connect_timeout=1s,"
        " command_timeout=4s, content_timeout=4s }",
        "smtpd_tls_security_level": "may",
        "smtpd_client_connection_count_limit": str(limits.connections),
        "smtp_tls_policy_maps": f"inline:{{ {{ {case.platform.maildrop_domain} = secure }} }}",
    }
    assert {key: found[key] for key in expected} == expected
    restrictions = [r.strip() for r in found["smtpd_recipient_restrictions"].split(",")]
    assert restrictions[:6] == [
        "permit_mynetworks",
        "reject_invalid_helo_hostname",
        "reject_non_fqdn_recipient",
        "reject_unknown_recipient_domain",
        "reject_unauth_pipelining",
        "reject_unauth_destination",
    ]
    lists = case.platform.inbound.dnsbl
    assert restrictions[6 : 6 + len(lists)] == [
        f"{'warn_if_reject ' if x.warn_only else ''}reject_{x.kind.value} {x.zone}={x.answers}"
        for x in lists
    ]
    # What a list says beside what counts is logged, and refuses nobody.
    *warnings, room, end = restrictions[6 + len(lists) :]
    assert warnings == list(
        dict.fromkeys(
            f"warn_if_reject reject_{x.kind.value} {x.zone}" for x in lists if not x.warn_only
        )
    )
    # Whether a mailbox has room is asked of it last, for mail that would be accepted.
    assert room.startswith("check_recipient_access lmdb:")
    assert end == "permit"
    inet = [row.split()[0] for row in services.out.splitlines() if row.split()[1] == "inet"]
    assert inet == ["25", "465", "127.0.0.1:10025"]


def test_fifty_thousand_addresses_are_built_in_seconds(image: Image) -> None:
    case = MEMBERS[0]
    files = all_files(case.platform, case.host)
    rows = [f"user{n}@d{n % 5000}.invented.example box{n}@{THERE}\n" for n in range(50_000)]
    big = replace(files[smtp_in.VIRTUAL], content="".join(rows))
    script = (
        "import subprocess, time; t = time.monotonic();"
        "subprocess.run(['postmap', 'lmdb:/etc/postfix/virtual'], check=True);"
        "print(time.monotonic() - t)"
    )
    ask = ("postmap", "-q", "user49999@d4999.invented.example", "lmdb:/etc/postfix/virtual")
    built, found = image.run(
        {**files, smtp_in.VIRTUAL: big}, [Step(("python3", "-c", script)), Step(ask)]
    )
    assert found.out == f"box49999@{THERE}\n"
    assert float(built.out) < 10
