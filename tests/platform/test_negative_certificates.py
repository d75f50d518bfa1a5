"""Faults of certificates: of what is issued, of how it spreads, and of a renewal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import dns.update
import pytest

from mailsite.model import Host, Role
from rehearsal.ca import Authority
from rehearsal.progress import RehearsalError
from rehearsal.world import plan
from verify.context import Context

from .faults import expect_green, expect_red

COPY = "/var/lib/mail-certificates/certificate.pem"
KEPT = "/root/certificate.pem"
ISSUE = "mail-certificates-issue.service"
PULL_TIMER = "mail-certificates-pull.timer"


@pytest.fixture(autouse=True)
def acme(platform_up: Context) -> None:
    if platform_up.platform.certificates is None:
        pytest.skip("the stack's certificates are given: its site.yaml has no 'certificates'")


@pytest.fixture
def member(platform_up: Context) -> Host:
    return platform_up.members[-1]


@pytest.fixture
def holders(platform_up: Context) -> tuple[Host, ...]:
    return platform_up.platform.members(Role.CERTIFICATES)


@contextmanager
def not_pulling(context: Context, host: Host) -> Iterator[None]:
    """The host takes no newer certificate for a while."""
    machine = context.lab.machine(host)
    machine.run("systemctl", "stop", PULL_TIMER)
    try:
        yield
    finally:
        machine.run("systemctl", "start", PULL_TIMER)


@contextmanager
def mode(context: Context, host: Host, path: str, bits: str) -> Iterator[None]:
    machine = context.lab.machine(host)
    before = machine.run("stat", "-c", "%a", path).strip()
    machine.run("chmod", bits, path)
    try:
        yield
    finally:
        machine.run("chmod", before, path)


def test_a_certificate_of_another_authority_turns_cert_1_red(
    platform_up: Context, member: Host
) -> None:
    """Clients trust this one too, but it is not from ACME."""
    machine = platform_up.lab.machine(member)
    name = platform_up.platform.names.smtp_out
    issued = Authority(platform_up.lab.state.ca).issue([name])
    with machine.presenting(issued.chain, issued.key):
        expect_red(platform_up, "CERT-1", f"{member.name} port 587 .*CERTIFICATE_VERIFY_FAILED")
    expect_green(platform_up, "CERT-1")


def test_a_key_that_others_can_read_turns_cert_1_red(platform_up: Context, member: Host) -> None:
    path = f"/etc/certs/{platform_up.platform.names.smtp_out}/combined.pem"
    with not_pulling(platform_up, member), mode(platform_up, member, path, "0640"):
        expect_red(platform_up, "CERT-1", f"{member.name}: its daemons' files are not")


def test_a_token_that_others_can_read_turns_cert_1_red(
    platform_up: Context, holders: tuple[Host, ...]
) -> None:
    (variable,) = platform_up.platform.acme.secrets
    path = f"/etc/mail-certificates/acme-{variable}"
    with mode(platform_up, holders[0], path, "0644"):
        expect_red(platform_up, "CERT-1", f"{path} is 644")


def test_a_second_holder_without_a_copy_turns_cert_1_red(
    platform_up: Context, holders: tuple[Host, ...]
) -> None:
    """It shows only while the first is away."""
    machine = platform_up.lab.machine(holders[1])
    with not_pulling(platform_up, holders[1]):
        machine.run("mv", COPY, KEPT)
        try:
            expect_red(platform_up, "CERT-1", "a host that has none gets none")
        finally:
            machine.run("mv", KEPT, COPY)
    expect_green(platform_up, "CERT-1")


def test_a_host_that_asks_for_nothing_turns_cert_2_red(platform_up: Context, member: Host) -> None:
    with not_pulling(platform_up, member):
        expect_red(platform_up, "CERT-2", f"{member.name} port 587 .*: still shows")
    expect_green(platform_up, "CERT-2")


def test_a_renewal_that_fails_keeps_the_old_one_and_turns_cert_3_red(
    platform_up: Context, holders: tuple[Host, ...]
) -> None:
    machine = platform_up.lab.machine(holders[0])
    before = json.loads(machine.run("mail-certificates", "status"))
    drop_in = f"/run/systemd/system/{ISSUE}.d"
    try:
        for address in plan.ACME:
            machine.run("ip", "route", "add", "unreachable", str(address))
        machine.run("mkdir", "-p", drop_in)
        forced = "[Service]\nExecStart=\nExecStart=mail-certificates issue --force\n"
        machine.run("tee", f"{drop_in}/force.conf", input=forced)
        machine.run("systemctl", "daemon-reload")
        assert machine.call("systemctl", "start", ISSUE).returncode != 0
        expect_red(platform_up, "CERT-3", f"{holders[0].name}: the last renewal failed")
        assert json.loads(machine.run("mail-certificates", "status")) == before
    finally:
        machine.run("rm", "-rf", drop_in)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "reset-failed", ISSUE, "mail-acme.service")
        for address in plan.ACME:
            machine.call("ip", "route", "del", "unreachable", str(address))
    expect_green(platform_up, "CERT-3")


def test_a_margin_that_is_too_wide_turns_cert_3_red(
    platform_up: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = platform_up.platform.certificates
    assert settings is not None
    wide = settings.model_copy(update={"margin_days": 100})
    monkeypatch.setitem(platform_up.platform.__dict__, "certificates", wide)
    expect_red(platform_up, "CERT-3", r"ends in \d+\.\d days, not 100")


def test_the_acme_clients_key_changes_challenges_alone(platform_up: Context) -> None:
    outside, zone = platform_up.lab.outside, platform_up.platform.domain
    challenge = f"_acme-challenge.{zone}."

    def change(owner: str, kind: str, data: str) -> None:
        message = dns.update.UpdateMessage(zone, keyring=outside.acme_key.keyring)
        message.add(owner, 60, kind, data)
        outside.update(message)

    for owner, kind, data in ((f"www.{zone}.", "TXT", '"x"'), (challenge, "A", "192.0.2.1")):
        with pytest.raises(RehearsalError, match="refuses the DNS update"):
            change(owner, kind, data)
    change(challenge, "TXT", '"x"')
    message = dns.update.UpdateMessage(zone, keyring=outside.acme_key.keyring)
    message.delete(challenge, "TXT")
    outside.update(message)
