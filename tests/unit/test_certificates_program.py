"""What a host does with the platform's certificate: take it, refuse it, switch to it, renew it."""

from __future__ import annotations

import datetime
import getpass
import grp
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pytest

from agent import mail_certificates as program
from agent.mail_certificates import Busy, Certificate, Failed, Holder, Settings, Store
from rehearsal.ca import Authority, Issued

DAY = datetime.timedelta(days=1)
NOW = datetime.datetime.now(datetime.UTC)
READ = cache(program.read)
NAMES = ("*.pelican.example", "mx.deep.pelican.example")
ME, GROUP = getpass.getuser(), grp.getgrgid(os.getgid()).gr_name


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def issued(authority: Authority) -> Issued:
    return authority.issue(NAMES)


def text(issued: Issued) -> str:
    return f"{issued.key}{issued.chain}"


def aged(authority: Authority, days: int, names: Sequence[str] = NAMES) -> str:
    """A certificate that began ``days`` ago."""
    then = Authority(authority.folder, now=lambda: NOW - days * DAY)
    return text(then.issue(names, days=400 + days))


def config(**changes: Any) -> Settings:
    document = {
        "names": ["imap.pelican.example", "mx.deep.pelican.example"],
        "port": 2022,
        "login": "mail-certs",
        "holders": [
            {"name": "one", "address": "192.0.2.1"},
            {"name": "two", "address": "192.0.2.2"},
        ],
        "targets": [
            {
                "path": "/etc/certs/imap/combined.pem",
                "owner": ME,
                "group": GROUP,
                "mode": "0600",
                "parts": ["key", "chain"],
            },
            {
                "path": "/etc/certs/web/chain.pem",
                "owner": ME,
                "group": GROUP,
                "mode": "0644",
                "parts": ["chain"],
            },
        ],
        "units": [
            {"name": "imap.service", "verb": "reload", "paths": ["/etc/certs/imap/combined.pem"]},
            {"name": "web.service", "verb": "restart", "paths": ["/etc/certs/web/chain.pem"]},
            {"name": "other.service", "verb": "reload", "paths": ["/etc/certs/other.pem"]},
        ],
        "issuing": None,
    }
    return Settings.parse(json.dumps(document | changes))


def holding(*, first: bool) -> Settings:
    issuing = {"first": first, "renew": 30, "takeover": 20, "group": GROUP}
    other = {"name": "two" if first else "one", "address": "192.0.2.9"}
    return config(names=list(NAMES), targets=[], units=[], issuing=issuing, holders=[other])


class Host(Store):
    """A host in a folder; what is done to units is kept in ``acts``."""

    def __init__(self, settings: Settings, root: Path, authority: Authority) -> None:
        super().__init__(settings, root)
        bundle = self.live(program.CA_BUNDLE)
        bundle.parent.mkdir(parents=True, exist_ok=True)
        bundle.write_text(authority.root_pem)
        self.ready()

    def content(self, path: str) -> str:
        return self.live(path).read_text()


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of OpenSSL for each text: the tests ask about the same few over and over."""
    monkeypatch.setattr(program, "read", READ)


@pytest.fixture
def acts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []

    def act(unit: program.Unit) -> str:
        done.append(f"{unit.verb} {unit.name}")
        return ""

    monkeypatch.setattr(program, "act", act)
    monkeypatch.setattr(program, "running", lambda _: True)
    return done


@pytest.fixture
def host(tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Host:
    return make(config(), tmp_path, authority, monkeypatch)


def make(
    settings: Settings, folder: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> Host:
    # The tests need not be root: every file belongs to whoever runs them.
    own = program.replace
    monkeypatch.setattr(
        program, "replace", lambda path, content, _, __, mode: own(path, content, ME, GROUP, mode)
    )
    return Host(settings, folder, authority)


class Holding(Protocol):
    def __call__(self, *, first: bool) -> Host: ...


@pytest.fixture
def holding_host(tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Holding:
    """Makes one of the two hosts that hold the certificate."""
    return lambda *, first: make(holding(first=first), tmp_path, authority, monkeypatch)


Answers = dict[str, str | Exception]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """What the holders say to whoever asks; ``None``: the asker has it."""
    said: Answers = {}

    def fetch(settings: Settings, holder: Holder, mark: str, patience: int) -> str | None:
        answer = said.get(holder.name, Failed(f"{holder.name}: no route to host"))
        if isinstance(answer, Exception):
            raise answer
        if answer is not None and program.read(answer).mark == mark:
            return None
        return answer

    monkeypatch.setattr(program, "fetch", fetch)
    return said


# -- what is taken ----------------------------------------------------------------------------


def test_a_good_one_is_put_in_place_and_its_daemons_are_told(
    host: Host, issued: Issued, answers: Answers, acts: list[str]
) -> None:
    answers["one"] = text(issued)
    program.pull_once(host)
    combined = host.content("/etc/certs/imap/combined.pem")
    assert combined.startswith("-----BEGIN PRIVATE KEY-----")
    assert combined.count("-----BEGIN CERTIFICATE-----") == 2
    chain = host.live("/etc/certs/web/chain.pem")
    assert "PRIVATE KEY" not in chain.read_text()
    assert chain.stat().st_mode & 0o777 == 0o644
    assert host.live("/etc/certs/imap/combined.pem").stat().st_mode & 0o777 == 0o600
    assert host.copy.stat().st_mode & 0o777 == 0o600
    assert acts == ["reload imap.service", "restart web.service"]


def test_the_same_again_touches_nothing(
    host: Host, issued: Issued, answers: Answers, acts: list[str]
) -> None:
    answers["one"] = text(issued)
    program.pull_once(host)
    before = host.live("/etc/certs/imap/combined.pem").stat().st_ino
    acts.clear()
    program.pull_once(host)
    assert acts == []
    assert host.live("/etc/certs/imap/combined.pem").stat().st_ino == before


def test_while_the_first_holder_is_down_the_second_is_asked(
    host: Host, issued: Issued, answers: Answers, acts: list[str]
) -> None:
    answers["two"] = text(issued)
    program.pull_once(host)
    assert host.current() == program.read(text(issued))


def test_an_older_one_is_left(
    host: Host, authority: Authority, issued: Issued, answers: Answers, acts: list[str]
) -> None:
    answers["one"] = text(issued)
    program.pull_once(host)
    answers |= {"one": aged(authority, 20), "two": text(issued)}
    program.pull_once(host)
    assert host.current() == program.read(text(issued))


def test_a_newer_one_at_the_second_holder_is_found(
    host: Host, authority: Authority, issued: Issued, answers: Answers, acts: list[str]
) -> None:
    answers["one"] = old = aged(authority, 20)
    program.pull_once(host)
    assert host.current() == program.read(old)
    # The first came back with what it had, before the others asked the second.
    answers |= {"one": aged(authority, 30), "two": text(issued)}
    program.pull_once(host)
    assert host.current() == program.read(text(issued))


def other_key(authority: Authority, issued: Issued) -> str:
    return f"{authority.issue(['x.pelican.example']).key}{issued.chain}"


Bad = Callable[[Authority, Issued], str]
BAD: dict[str, tuple[Bad, str]] = {
    "without the intermediate": (
        lambda _, i: i.key + i.chain[: i.chain.index("-----END CERTIFICATE-----") + 26],
        "unable to get local issuer certificate",
    ),
    "of another authority": (
        lambda a, _: text(Authority(a.folder / "other").issue(NAMES)),
        "certificate signature failure",
    ),
    "with another key": (other_key, "the key does not belong"),
    "for other names": (
        lambda a, _: text(a.issue(["*.pelican.example"])),
        "it is not for mx.deep.pelican.example",
    ),
    "that has ended": (
        lambda a, _: text(Authority(a.folder, now=lambda: NOW - 50 * DAY).issue(NAMES, days=30)),
        "certificate has expired",
    ),
    "that is none": (lambda *_: "hello", "0 private keys and 0 certificates"),
    "with two keys": (lambda _, i: i.key + text(i), "2 private keys"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_must_not_be_shown_is_refused(
    what: str,
    host: Host,
    authority: Authority,
    issued: Issued,
    answers: Answers,
    acts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad, words = BAD[what]
    answers["one"] = bad(authority, issued)
    with pytest.raises(Failed):
        program.pull_once(host)
    assert re.search(words, capsys.readouterr().out)
    assert not host.live("/etc/certs").exists()
    assert acts == []


def test_a_bad_one_leaves_what_is_there_and_fails(
    host: Host, authority: Authority, issued: Issued, answers: Answers, acts: list[str]
) -> None:
    answers["one"] = text(issued)
    program.pull_once(host)
    answers["one"] = text(Authority(authority.folder / "other").issue(NAMES))
    with pytest.raises(Failed, match="goes on with what it has"):
        program.pull_once(host)
    assert host.current() == program.read(text(issued))


def test_silence_is_a_failure_only_after_a_while(
    host: Host, issued: Issued, answers: Answers, acts: list[str]
) -> None:
    answers["one"] = text(issued)
    program.pull_once(host)
    answers.clear()
    program.pull_once(host)
    long_ago = NOW.timestamp() - program.SILENCE_SECONDS - 60
    os.utime(host.heard, (long_ago, long_ago))
    with pytest.raises(Failed, match="goes on with what it has"):
        program.pull_once(host)


def test_a_busy_holder_is_no_failure(
    host: Host, issued: Issued, answers: Answers, acts: list[str]
) -> None:
    answers["one"] = text(issued)
    program.pull_once(host)
    answers |= {"one": Busy("one is being issued a new one")}
    program.pull_once(host)
    assert host.current() == program.read(text(issued))


# -- switching --------------------------------------------------------------------------------


def test_a_file_that_somebody_changed_is_put_right(
    host: Host, issued: Issued, answers: Answers, acts: list[str]
) -> None:
    answers["one"] = text(issued)
    program.pull_once(host)
    acts.clear()
    host.live("/etc/certs/web/chain.pem").write_text("oops")
    program.pull_once(host)
    assert host.content("/etc/certs/web/chain.pem") == f"{program.read(text(issued)).chain}\n"
    assert acts == ["restart web.service"]


def test_a_reload_that_failed_is_tried_again(
    host: Host, issued: Issued, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers["one"] = text(issued)
    fail = True
    done: list[str] = []

    def act(unit: program.Unit) -> str:
        done.append(unit.name)
        return "it did not want to" if fail and unit.name == "imap.service" else ""

    monkeypatch.setattr(program, "act", act)
    monkeypatch.setattr(program, "running", lambda _: True)
    with pytest.raises(Failed, match="it did not want to"):
        program.pull_once(host)
    assert not host.in_place(program.read(text(issued)))
    fail = False
    done.clear()
    program.pull_once(host)
    assert done == ["imap.service", "web.service"]
    assert host.in_place(program.read(text(issued)))


def test_no_file_is_switched_before_all_are_written(
    host: Host, issued: Issued, answers: Answers, acts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers["one"] = text(issued)
    blocked = host.live("/etc/certs/web")
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder should be")
    with pytest.raises(OSError):
        program.pull_once(host)
    assert not host.live("/etc/certs/imap/combined.pem").exists()
    assert acts == []


def test_a_daemon_that_does_not_run_is_not_told(
    host: Host, issued: Issued, answers: Answers, acts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "running", lambda unit: unit == "web.service")
    answers["one"] = text(issued)
    program.pull_once(host)
    assert acts == ["restart web.service"]
    assert host.in_place(program.read(text(issued)))


def test_a_host_that_has_it_starts_without_asking(
    host: Host, issued: Issued, answers: Answers, acts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(program, "systemctl", lambda *words: told.append(" ".join(words)))
    answers["one"] = text(issued)
    program.start(host)
    assert host.content("/etc/certs/imap/combined.pem")
    # A push gives it little time: what runs already is told by another unit.
    assert acts == []
    assert told == ["start --no-block mail-certificates-pull.service"]
    program.pull_once(host)
    assert acts == ["reload imap.service", "restart web.service"]
    answers.clear()
    monkeypatch.setattr(program, "pull", lambda *_: pytest.fail("it asked"))
    program.start(host)


def test_a_host_without_one_says_who_gave_none(
    host: Host, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "START_SECONDS", -1.0)
    with pytest.raises(Failed, match=r"imap\.pelican\.example.* one and two gave none; see there"):
        program.start(host)


# -- when to renew ----------------------------------------------------------------------------


def certificate(left: float, lifetime: float = 90, names: Sequence[str] = NAMES) -> Certificate:
    ends = NOW + left * DAY
    return Certificate("", "", frozenset(names), "01", ends - lifetime * DAY, ends)


@pytest.mark.parametrize(
    ("first", "left", "lifetime", "due"),
    [
        (True, 31, 90, False),
        (True, 29, 90, True),
        (False, 29, 90, False),
        (False, 21, 90, False),
        (False, 19, 90, True),
        # A short one is renewed after two thirds of its life.
        (True, 2.1, 6, False),
        (True, 1.9, 6, True),
        (False, 1.9, 6, False),
        (False, 1.2, 6, True),
    ],
)
def test_the_first_renews_and_the_second_steps_in_later(
    first: bool, left: float, lifetime: float, due: bool
) -> None:
    why = program.why_due(holding(first=first), certificate(left, lifetime), NOW)
    assert bool(why) is due
    assert not due or f"ends in {left:.1f} days" in why


def test_other_names_are_a_reason() -> None:
    settings = holding(first=True)
    assert program.why_due(settings, None, NOW) == "there is none"
    few, many = certificate(80, names=NAMES[:1]), certificate(80, names=(*NAMES, "more"))
    assert NAMES[1] in program.why_due(settings, few, NOW)
    assert "fewer" in program.why_due(settings, many, NOW)


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch, issued: Issued) -> list[str]:
    """Who went to the authority; it gives a good certificate."""
    orders: list[str] = []

    def order(store: Store) -> str:
        orders.append("order")
        return text(issued)

    monkeypatch.setattr(program, "order", order)
    return orders


@pytest.mark.parametrize("first", [True, False])
def test_a_replaced_holder_takes_the_others_copy(
    first: bool, issued: Issued, answers: Answers, ordered: list[str], holding_host: Holding
) -> None:
    holder = holding_host(first=first)
    answers |= {"one": text(issued), "two": text(issued)}
    program.issue(holder)
    assert ordered == []
    assert holder.copy.stat().st_mode & 0o777 == 0o640
    assert holder.current() == program.read(text(issued))


def test_a_new_holder_that_is_alone_asks_for_the_other_once(
    issued: Issued, answers: Answers, ordered: list[str], holding_host: Holding
) -> None:
    holder = holding_host(first=True)
    program.start(holder)
    answers["two"] = text(issued)
    program.issue(holder)
    assert ordered == ["order"]
    holder.copy.unlink()
    os.utime(holder.alone, (0, 0))
    program.issue(holder)
    assert ordered == ["order"]
    assert holder.current() == program.read(text(issued))


@pytest.mark.parametrize(
    ("answer", "orders"),
    [
        (Busy("one is being issued a new one"), []),
        (Failed("one: no route to host"), ["order"]),
        ("for other names", []),
    ],
)
def test_the_second_orders_only_while_the_first_is_away(
    answer: str | Exception,
    orders: list[str],
    authority: Authority,
    answers: Answers,
    ordered: list[str],
    holding_host: Holding,
) -> None:
    holder = holding_host(first=False)
    other = text(authority.issue(["x.pelican.example"]))
    answers["one"] = other if isinstance(answer, str) else answer
    program.issue(holder)
    assert ordered == orders


def test_the_first_waits_for_what_the_second_is_getting(
    issued: Issued,
    answers: Answers,
    ordered: list[str],
    monkeypatch: pytest.MonkeyPatch,
    holding_host: Holding,
) -> None:
    holder = holding_host(first=True)
    answers["two"] = Busy("two is being issued a new one")
    monkeypatch.setattr(program.time, "sleep", lambda _: answers.update(two=text(issued)))
    program.issue(holder)
    assert ordered == []
    assert holder.current() == program.read(text(issued))


def test_near_the_end_the_second_orders_even_if_the_first_is_there(
    authority: Authority, answers: Answers, ordered: list[str], holding_host: Holding
) -> None:
    holder = holding_host(first=False)
    old = Authority(authority.folder, now=lambda: NOW - 80 * DAY).issue(NAMES, days=90)
    answers["one"] = text(old)
    program.issue(holder)
    assert ordered == ["order"]


def test_only_one_run_at_a_time(ordered: list[str], holding_host: Holding) -> None:
    holder = holding_host(first=True)
    with holder.locked("issuing"), pytest.raises(Busy):
        program.issue(holder)
    assert ordered == []


def test_a_certificate_with_names_that_nobody_asked_for_is_not_used(
    authority: Authority, answers: Answers, monkeypatch: pytest.MonkeyPatch, holding_host: Holding
) -> None:
    holder = holding_host(first=True)
    more = text(authority.issue([*NAMES, "more.example"]))
    monkeypatch.setattr(program, "order", lambda _: more)
    with pytest.raises(Failed, match=r"one for .*more\.example.* instead of"):
        program.issue(holder)
    assert not holder.copy.exists()


def test_a_renewal_that_fails_leaves_the_old_one(
    issued: Issued, answers: Answers, monkeypatch: pytest.MonkeyPatch, holding_host: Holding
) -> None:
    holder = holding_host(first=True)
    answers["two"] = text(issued)
    program.issue(holder)

    def order(_: Store) -> str:
        raise Failed("lego got no certificate")

    monkeypatch.setattr(program, "order", order)
    with pytest.raises(Failed, match="lego got no certificate"):
        program.issue(holder, force=True)
    assert holder.current() == program.read(text(issued))


# -- reading ----------------------------------------------------------------------------------


def test_what_is_read_of_a_certificate(issued: Issued) -> None:
    found = program.read(text(issued))
    assert found.names == frozenset(NAMES)
    assert int(found.serial, 16) == issued.certificate.serial_number
    assert found.begins == issued.certificate.not_valid_before_utc
    assert found.ends == issued.certificate.not_valid_after_utc


def test_a_wildcard_stands_for_one_label() -> None:
    found = certificate(1, names=("*.pelican.example",))
    assert found.missing(["a.pelican.example"]) == []
    wanted = ["pelican.example", "a.b.pelican.example"]
    assert found.missing(wanted) == wanted
