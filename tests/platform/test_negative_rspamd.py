"""Faults of the spam filter, and around it, that its checks must see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from mailsite.model import Host
from verify import rspamd
from verify.context import Context, eventually
from verify.rspamd import mx_members
from verify.spam_filter import filters

from .faults import changed_by_hand, edit, expect_green, expect_red, open_port, setting

POSTFIX, RSPAMD = "postfix.service", "rspamd.service"
LOCAL = "/etc/rspamd/local.d"

CONTROLLER = "/etc/rspamd/override.d/worker-controller.inc"


@pytest.fixture
def alone(platform_up: Context, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A member of the MX that checks take for the only one: they take less time."""
    member = mx_members(platform_up)[-1]
    monkeypatch.setattr(rspamd, "mx_members", lambda context: (member,))
    return member


@contextmanager
def changed_everywhere(context: Context, *commands: tuple[str, ...]) -> Iterator[None]:
    """Change files on every member of the filter."""
    with ExitStack() as changes:
        for member in filters(context):
            changes.enter_context(changed_by_hand(context, member, *commands, restart=RSPAMD))
            _wait(context, member)
        yield
    for member in filters(context):
        _wait(context, member)


def _wait(context: Context, member: Host) -> None:
    """The filter listens some time after systemd says that it is active."""
    client = context.lab.machine(member).observer.client()
    port = context.platform.spam.milter_port
    eventually(lambda: client.connect(context.internal(member)[0], port).close(), seconds=30)


@contextmanager
def stopped(context: Context, unit: str, *hosts: Host) -> Iterator[None]:
    machines = [context.lab.machine(host) for host in hosts]
    try:
        for machine in machines:
            machine.run("systemctl", "stop", unit)
        yield
    finally:
        for machine in machines:
            machine.run("systemctl", "start", unit)


def test_a_member_without_the_filter_turns_spam_1_red(platform_up: Context, alone: Host) -> None:
    with changed_by_hand(platform_up, alone, setting("smtpd_milters="), restart=POSTFIX):
        expect_red(platform_up, "SPAM-1", f"{alone.name}.*GTUBE is answered with 250")
    expect_green(platform_up, "SPAM-1")


@pytest.mark.usefixtures("alone")
def test_another_score_turns_spam_1_red(platform_up: Context) -> None:
    score = edit(f"{LOCAL}/actions.conf", "s/^add_header = .*/add_header = 14.9;/")
    with changed_everywhere(platform_up, score):
        expect_red(platform_up, "SPAM-1", "doubtful mail arrived with 0 headers X-Spam")


@pytest.mark.usefixtures("alone")
def test_results_that_are_not_told_turn_spam_1_red(platform_up: Context) -> None:
    silent = edit(f"{LOCAL}/milter_headers.conf", "s/^use = .*/use = [];/")
    with changed_everywhere(platform_up, silent):
        expect_red(platform_up, "SPAM-1", "spf=missing|with [02-9] headers Authentication-Results")


def test_no_greylisting_turns_spam_2_red(platform_up: Context) -> None:
    off = edit(f"{LOCAL}/greylist.conf", "s/^enabled = .*/enabled = false;/")
    with changed_everywhere(platform_up, off):
        expect_red(platform_up, "SPAM-2", "a first try is answered with 250")


def test_members_that_remember_each_for_itself_turn_spam_2_red(platform_up: Context) -> None:
    """What a member is told it keeps where the others do not look: in another database."""
    alone = edit(f"{LOCAL}/redis.conf", "s/^timeout = .*/&\\ndb = 7;/")
    first = mx_members(platform_up)[0]
    near = next(m for m in filters(platform_up) if m.site == first.site)
    with changed_by_hand(platform_up, near, alone, restart=RSPAMD):
        _wait(platform_up, near)
        expect_red(platform_up, "SPAM-2", "the retry after the wait is answered with 4")
    _wait(platform_up, near)


def test_mail_that_waits_for_the_filter_turns_spam_3_red(platform_up: Context) -> None:
    member = mx_members(platform_up)[0]
    tempfail = edit("/etc/postfix/main.cf", "s/default_action=accept/default_action=tempfail/")
    with changed_by_hand(platform_up, member, tempfail, restart=POSTFIX):
        expect_red(platform_up, "SPAM-3", f"{member.name}.*all of them dead: .*answered with 4")


def test_an_open_port_turns_spam_5_red(platform_up: Context) -> None:
    member = filters(platform_up)[-1]
    with open_port(platform_up, member, platform_up.platform.spam.redis_port):
        expect_red(platform_up, "SPAM-5", f"redis of {member.name} .* answers")
    expect_green(platform_up, "SPAM-5")


def test_a_controller_without_a_password_turns_spam_5_red(platform_up: Context) -> None:
    member = filters(platform_up)[0]
    trusting = edit(CONTROLLER, "s/^secure_ip = .*/secure_ip = [127.0.0.0\\/8];/")
    with changed_by_hand(platform_up, member, trusting, restart=RSPAMD):
        _wait(platform_up, member)
        expect_red(platform_up, "SPAM-5", f"controller of {member.name} answers 200")
    _wait(platform_up, member)


def test_a_writer_that_nobody_watches_turns_spam_6_red(platform_up: Context) -> None:
    with stopped(platform_up, "redis-sentinel.service", *filters(platform_up)[1:]):
        expect_red(platform_up, "SPAM-6", "another writer than .*: not within 10 s")
    expect_green(platform_up, "SPAM-5")


def test_submitted_mail_that_nobody_looks_at_turns_out_8_red(platform_up: Context) -> None:
    member = platform_up.members[-1]
    without = edit("/etc/postfix/main.cf", "/^ *\\{ inet:127.0.0.1:11332/d")
    with changed_by_hand(platform_up, member, without, restart=POSTFIX):
        expect_red(platform_up, "OUT-8", f"{member.name}.*GTUBE is answered with 250")


@pytest.mark.parametrize("what", ["messages", "recipients"])
def test_a_limit_that_is_none_turns_out_8_red(platform_up: Context, what: str) -> None:
    selector = f"prepend\\('{what}:'\\)"
    higher = edit(f"{LOCAL}/ratelimit.conf", f"/{selector}/,/rate =/ s/burst = .*/burst = 100000;/")
    with changed_everywhere(platform_up, higher):
        expect_red(platform_up, "OUT-8", f"{what} an hour are answered with 250")


def test_senders_that_nobody_checks_turn_out_8_red(platform_up: Context) -> None:
    member = platform_up.members[0]
    with changed_by_hand(
        platform_up, member, setting("smtpd_sender_restrictions="), restart=POSTFIX
    ):
        expect_red(platform_up, "OUT-8", f"{member.name}.* is answered with 250")


def test_a_login_with_two_names_turns_out_8_red(platform_up: Context) -> None:
    """As another name it would have limits of its own, and no senders."""
    member = platform_up.members[0]
    loose = edit(
        "/etc/dovecot/dovecot.conf",
        "s/^auth_username_format = .*//",
        "s/passwd_file_path = .*/&\\n  auth_username_format = %{user | username | lower}/",
    )
    with changed_by_hand(platform_up, member, loose, restart="dovecot.service"):
        expect_red(platform_up, "OUT-8", f"{member.name}.* is answered with 250")
    expect_green(platform_up, "OUT-8")
