"""Faults of the machines' own mail that its checks must see."""

from __future__ import annotations

import pytest

from mailsite.model import Host, Role
from verify import null_clients
from verify.context import Context

from .faults import changed_by_hand, edit, expect_green, expect_red, setting

CONFIGURATION = "/etc/smtpd.conf"
SECRETS = "/etc/mail/secrets"
SMTPD = "opensmtpd.service"
POSTFIX = "postfix.service"
MASTER = "/etc/postfix/master.cf"


@pytest.fixture
def client(platform_up: Context, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A machine that checks take for the only one that has something to say."""
    return _alone(platform_up, monkeypatch, Role.SERVER)


def _alone(context: Context, monkeypatch: pytest.MonkeyPatch, role: Role) -> Host:
    every = null_clients.senders(context)
    mine = next(s for s in every if s.machine.host.main_role is role)
    monkeypatch.setattr(null_clients, "senders", lambda _: [mine])
    return mine.machine.host


def test_an_envelope_of_its_own_turns_client_1_red(platform_up: Context, client: Host) -> None:
    own = edit(CONFIGURATION, 's/ mail-from "[^"]*"//')
    with changed_by_hand(platform_up, client, own, restart=SMTPD):
        expect_red(platform_up, "CLIENT-1", f"{client.name}: the envelope sender is <root@")
    expect_green(platform_up, "CLIENT-1")


def test_the_login_of_another_group_turns_client_1_red(platform_up: Context, client: Host) -> None:
    group = platform_up.platform.group_of(client)
    machines = [m for m in platform_up.lab.machines if m.host.has_null_client]
    other = next(m for m in machines if platform_up.platform.group_of(m.host) != group)
    line = other.run("tail", "-n1", SECRETS).split()[1]
    stolen = ("sh", "-c", f'echo "{group} {line}" >{SECRETS}')
    with changed_by_hand(platform_up, client, stolen, restart=SMTPD):
        expect_red(platform_up, "CLIENT-1", f"{client.name}: smtp-out says that .* logged in, not")


def test_a_client_that_delivers_by_itself_turns_client_1_red(
    platform_up: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = _alone(platform_up, monkeypatch, Role.SMTP_IN)
    direct = edit(MASTER, "/content_filter=own:/d")
    with changed_by_hand(platform_up, host, direct, restart=POSTFIX):
        expect_red(platform_up, "CLIENT-1", "strict refused mail .*DKIM: no signature")


def test_forwards_by_smtp_out_turn_client_1_red(platform_up: Context, client: Host) -> None:
    members = platform_up.platform.members(Role.SMTP_IN)
    relay = setting(f"default_transport=own:[{platform_up.platform.submission_host}]:587")
    with changed_by_hand(platform_up, members[0], relay, restart=POSTFIX):
        expect_red(
            platform_up, "CLIENT-1", "what it forwards leaves through smtp-out|DKIM: no signature"
        )


def test_a_queue_that_gives_up_at_once_turns_client_2_red(
    platform_up: Context, client: Host
) -> None:
    hasty = edit(CONFIGURATION, "s/^listen on localhost/queue ttl 1s\\n&/")
    with changed_by_hand(platform_up, client, hasty, restart=SMTPD):
        expect_red(platform_up, "CLIENT-2", "no mail for .* (waits|at strict)")


def test_a_client_that_listens_to_everyone_turns_client_3_red(
    platform_up: Context, client: Host
) -> None:
    address = client.interfaces[0].ipv4
    wide = edit(CONFIGURATION, f"s/^listen on localhost/&\\nlisten on {address}/")
    with changed_by_hand(platform_up, client, wide, restart=SMTPD):
        expect_red(platform_up, "CLIENT-3", f"{client.name}: OpenSMTPD listens on {address}:25")


def test_a_login_that_everybody_reads_turns_client_3_red(
    platform_up: Context, client: Host
) -> None:
    with changed_by_hand(platform_up, client, ("chmod", "0644", SECRETS)):
        expect_red(platform_up, "CLIENT-3", f"{SECRETS} is root:root 644, not root:root 600")
