"""Faults that tests put into the platform, and take out again whatever happens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import dns.rdatatype
import dns.update

from mailsite.model import Host
from verify import runner
from verify.checks import checks
from verify.context import Context, eventually, expect
from verify.lab import Entry, LabMachine
from verify.report import Status

KNOTC = ("knotc", "--socket", "/run/world-knot/knot.sock")
"""Controls the name server of the world outside."""


def expect_red(context: Context, identifier: str, words: str) -> None:
    """The check fails, and says ``words`` (a regular expression) of it."""
    result = runner.make(checks[identifier], context)
    assert result.status is Status.FAIL, f"{identifier} did not see it: {result.observed}"
    assert re.search(words, result.observed), f"{identifier} saw something else: {result.observed}"


def expect_green(context: Context, identifier: str) -> None:
    result = runner.make(checks[identifier], context)
    assert result.status is Status.PASS, f"{identifier}: {result.observed}"


@contextmanager
def changed_by_hand(
    context: Context, host: Host, *commands: tuple[str, ...], restart: str = ""
) -> Iterator[LabMachine]:
    """Run commands on a host that change the platform's files, and restart a service.

    Afterwards the agent puts every file back, as the next push would.
    """
    machine = context.lab.machine(host)
    try:
        for command in commands:
            machine.run(*command)
        if restart:
            _restart(machine, restart)
        yield machine
    finally:
        machine.apply()
        if restart:
            _restart(machine, restart)


def _restart(machine: LabMachine, unit: str) -> None:
    machine.call("systemctl", "reset-failed", unit)  # systemd counts how often a unit starts
    machine.run("systemctl", "restart", unit)
    eventually(lambda: machine.run("systemctl", "is-active", unit), seconds=10)
    if unit == "opensmtpd.service":  # it forks before it listens
        eventually(
            lambda: expect(machine.run("ss", "-Hltn", "sport = :25"), f"{machine.name} is silent"),
            seconds=10,
        )


@contextmanager
def open_port(context: Context, host: Host, port: int) -> Iterator[None]:
    """The platform's packet filter on a host lets everyone reach a TCP port."""
    machine = context.lab.machine(host)
    table, unit = (
        ("filter", "nftables.service") if host.is_managed else ("mail", "mail-nftables.service")
    )
    rule = f"tcp dport {port} accept"
    try:
        machine.run("nft", "insert", "rule", "inet", table, "input", *rule.split())
        yield
    finally:
        machine.run("systemctl", "reload", unit)


def edit(path: str, *expressions: str) -> tuple[str, ...]:
    """A command that edits a file in place and fails where nothing changes."""
    program = " ; ".join(expressions)
    return (
        "sh", "-c",
        'cp "$1" /tmp/before && sed -E -i "$2" "$1" && ! cmp -s "$1" /tmp/before',
        "sh", path, program,
    )  # fmt: skip


def setting(*words: str) -> tuple[str, ...]:
    """A command that sets parameters of Postfix's main.cf."""
    return ("postconf", "-e", *words)


@contextmanager
def changed_zone(
    context: Context, zone: str, *, without: tuple[Entry, ...] = (), with_: tuple[Entry, ...] = ()
) -> Iterator[None]:
    """Take records out of an operator's zone and put others in, behind the program's back."""
    _update(context, zone, without, with_)
    try:
        forget_answers(context)
        yield
    finally:
        _update(context, zone, with_, without)
        forget_answers(context)


def _update(context: Context, zone: str, gone: tuple[Entry, ...], new: tuple[Entry, ...]) -> None:
    outside = context.lab.outside
    message: dns.update.UpdateMessage = outside.new_update(zone)
    for entry in gone:
        message.delete(entry.owner, entry.type, entry.data)
    for entry in new:
        message.add(entry.owner, entry.ttl, entry.type, entry.data)
    outside.update(message)


@contextmanager
def without_pointer(context: Context, reverse: str, zone: str) -> Iterator[None]:
    """Take a PTR record out of one of the world's own reverse zones."""
    world = context.lab.outside.machine
    found = world.run([*KNOTC, "zone-read", zone, reverse, "PTR"]).stdout.split()
    ttl, target = found[2], found[4]

    def change(*words: str) -> None:
        world.run([*KNOTC, "zone-begin", zone])
        world.run([*KNOTC, *words])
        world.run([*KNOTC, "zone-commit", zone])

    change("zone-unset", zone, reverse, "PTR")
    try:
        forget_answers(context)
        yield
    finally:
        change("zone-set", zone, reverse, ttl, "PTR", target)
        forget_answers(context)


def forget_answers(context: Context) -> None:
    """Empty the caches of the resolver that the outside asks."""
    unit = "world-unbound.service"
    for action in ("reset-failed", "restart"):  # systemd counts how often a unit starts
        context.lab.outside.machine.run(["systemctl", action, unit])
    name = context.platform.domain
    eventually(
        lambda: expect(context.lookup.texts(name, "SOA"), f"{name} does not resolve"),
        seconds=10,
        what="the resolver of the outside",
    )


def entry(context: Context, zone: str, owner: str, kind: str, containing: str = "") -> Entry:
    """The one record of a zone with that owner and type."""
    assert dns.rdatatype.from_text(kind)
    found = [
        e
        for e in context.lab.world.records(zone)
        if e.owner == f"{owner}.".lower() and e.type == kind and containing in e.data
    ]
    assert len(found) == 1, f"{owner} {kind}: {found}"
    return found[0]
