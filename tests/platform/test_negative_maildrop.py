"""Faults of the mailboxes, and around them, that their checks must see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mailsite.model import Host
from verify import maildrop, rspamd
from verify.context import Context, eventually
from verify.maildrop import HOMES, IMAP, owners, replicas
from verify.managesieve import MANAGESIEVE
from verify.smtp_in import members

from .faults import changed_by_hand, edit, expect_green, expect_red, open_port

DOVECOT_CONF = "/etc/dovecot/dovecot.conf"
DOVECOT, NGINX, PAIRSYNC, POSTFIX = (
    f"{name}.service" for name in ("dovecot", "nginx", "pairsync", "postfix")
)


@contextmanager
def without_sync(context: Context) -> Iterator[Host]:
    """The daemon of the second replica is stopped, and does not come back by itself."""
    replica = replicas(context)[1]
    machine = context.lab.machine(replica)
    machine.run("systemctl", "mask", "--runtime", "--now", PAIRSYNC)
    try:
        yield replica
    finally:
        machine.run("systemctl", "unmask", "--runtime", PAIRSYNC)
        machine.run("systemctl", "start", PAIRSYNC)
        eventually(
            lambda: machine.run("pairsync", "status", "--json"), seconds=15, what="the daemon"
        )


def test_imap_without_tls_turns_box_1_red(platform_up: Context) -> None:
    replica = replicas(platform_up)[-1]
    clear = edit(DOVECOT_CONF, f"/inet_listener imap \\{{/,/\\}}/ s/port = 0/port = {IMAP}/")
    with (
        changed_by_hand(platform_up, replica, clear, restart=DOVECOT),
        open_port(platform_up, replica, IMAP),
    ):
        expect_red(platform_up, "BOX-1", f"{replica.name}.*port {IMAP} answers")
    expect_green(platform_up, "BOX-1")


def test_a_file_of_another_user_turns_box_2_red(platform_up: Context) -> None:
    replica = replicas(platform_up)[-1]
    machine = platform_up.lab.machine(replica)
    stranger = f"{HOMES}/{owners(platform_up)[0].user}/stranger"
    machine.run("touch", stranger)
    try:
        expect_red(platform_up, "BOX-2", f"{replica.name}: not vmail's: {stranger}")
    finally:
        machine.run("rm", "--", stranger)


def test_a_sync_that_does_not_run_turns_box_3_4_and_10_red(
    platform_up: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maildrop, "LOST", 5.0)
    with without_sync(platform_up):
        expect_red(platform_up, "BOX-3", "not within 5 s.*the change is not there")
        expect_red(platform_up, "BOX-4", "not within 15 s.* differ")
        expect_red(platform_up, "BOX-10", "not within 15 s.* differ")
    expect_green(platform_up, "BOX-4")


def test_scripts_that_do_not_run_before_turn_box_5_red(platform_up: Context) -> None:
    idle = edit(DOVECOT_CONF, "s/^sieve_script before \\{/sieve_script before {\\n  cause = copy/")
    with changed_by_hand(platform_up, replicas(platform_up)[0], idle, restart=DOVECOT):
        expect_red(platform_up, "BOX-5", "tagged mail has the keywords .* not \\$Junk")


def test_filters_that_anyone_edits_turn_box_6_red(platform_up: Context) -> None:
    frontend = platform_up.frontends[-1]
    anyone = edit("/etc/nginx/mail-streams.d/managesieve.conf", "s/deny all;/allow all;/")
    with (
        changed_by_hand(platform_up, frontend, anyone, restart=NGINX),
        open_port(platform_up, frontend, MANAGESIEVE),
    ):
        expect_red(platform_up, "BOX-6", f"{frontend.name}.*port {MANAGESIEVE} greets")


def test_a_member_that_does_not_ask_for_room_turns_box_7_red(
    platform_up: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maildrop, "FORGOTTEN", 20.0)
    member = members(platform_up)[-1]
    trusting = edit("/etc/postfix/main.cf", "/check_recipient_access lmdb:.*limited/d")
    with changed_by_hand(platform_up, member, trusting, restart=POSTFIX):
        expect_red(platform_up, "BOX-7", f"{member.name}.* full mailbox .* is answered with 250")


def test_a_second_replica_that_is_preferred_turns_box_8_red(platform_up: Context) -> None:
    first, second = replicas(platform_up)
    member, conf = members(platform_up)[0], "/etc/unbound/unbound.conf"
    name = platform_up.platform.maildrop_domain
    swapped = edit(conf, f"s/({name}\\. 300 IN MX) [0-9]+ ({first.name})/\\1 90 \\2/")
    with changed_by_hand(platform_up, member, swapped, restart="unbound.service"):
        expect_red(platform_up, "BOX-8", f"mail goes to {second.name} while {first.name} is alive")


def test_an_owner_without_a_login_turns_box_9_red(platform_up: Context) -> None:
    sender = next(
        box.name
        for box in platform_up.platform.mailboxes.values()
        if box.submission and not box.suspended
    )
    gone = edit("/etc/dovecot/sasl-users", f"/^{sender}:/d")
    with changed_by_hand(platform_up, platform_up.members[0], gone, restart=DOVECOT):
        expect_red(platform_up, "BOX-9", "the right password is answered with 535")


def test_moves_that_teach_nothing_turn_spam_4_red(
    platform_up: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rspamd, "LEARNED", 5.0)
    deaf = edit(DOVECOT_CONF, "/sieve_script report-spam/,/\\}/ s/cause = copy/cause = flag/")
    with changed_by_hand(platform_up, replicas(platform_up)[0], deaf, restart=DOVECOT):
        expect_red(platform_up, "SPAM-4", "learned spam and ham are .*, not ")
