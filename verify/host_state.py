"""What every machine's own books say, also after a reboot of all of them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mailsite.bundle import compose
from mailsite.model import Role
from verify import maildrop
from verify.context import Context, each, eventually, expect
from verify.lab import AGENT, LabMachine
from verify.reachability import Tables
from verify.smtp import letter
from verify.smtp_out import frontend_doors, submit

DAEMONS = re.compile(
    r"postfix|dovecot|opendkim|postsrsd|rspamd|redis|smtpd|opensmtpd|nginx|unbound|pairsync|mail-"
)
"""Whose lines in the journal are read, by the name that they log with."""
WARNING = 4
"""Priorities from here on downwards are warnings and errors (syslog(3))."""
SHOWN = 15
PROMPT = 60.0
_BOOT_SECONDS = 180.0
_BACK_SECONDS = 90.0


@dataclass(frozen=True)
class Allowed:
    """A line that may be there. ``why``: what it is, and why nobody needs to do anything."""

    program: str
    text: str
    why: str

    def covers(self, program: str, text: str) -> bool:
        return bool(re.match(self.program, program) and re.search(self.text, text))


ALLOWED: tuple[Allowed, ...] = (
    # What others do, or the world outside; it is logged as it should be.
    Allowed(
        "postfix/",
        "SASL (PLAIN|LOGIN) authentication failed|RBL lookup error|does not resolve to address"
        "|hostname .* verification failed|TLS library problem|non-SMTP command|numeric domain name"
        "|Connection (rate|concurrency) limit exceeded|Message delivery request rate"
        "|Illegal address syntax from",
        "a client guesses a password, breaks off, comes too often or writes what is no address; a"
        " block list does not answer",
    ),
    Allowed("rspamd", "_error_handler: http error occurred: IO read error", "a client hangs up"),
    Allowed("postfix/", "reject_warning", "a list that only warns knows a client"),
    Allowed(
        "rspamd",
        "map; .*cannot resolve (maps.rspamd.com|sa-update.surbl.org)",
        "the world of a rehearsal has no lists of Rspamd's makers; it asks again",
    ),
    # What a daemon says when it starts for the first time, or before the others of its cluster.
    Allowed("rspamd", "cannot load controller stats from .*: No such file", "its first start"),
    Allowed(
        "rspamd",
        "cannot get (masters|slaves) data from Redis Sentinel",
        "members start one after the other; each asks every Sentinel, and one is enough",
    ),
    Allowed(
        "rspamd",
        "cannot get bayes statistics for",
        "no writer is chosen yet; the figures are asked for again, and mail does not wait for them",
    ),
    # What a machine says that waits seconds for its turn on two processors, with twenty others.
    Allowed(
        "dovecot|rspamd",
        r"Time moved forward by|lost \d+ heartbeats? from worker",
        "it had no processor for a while, and goes on",
    ),
    Allowed(
        "pairsync|redis",
        r": lost: |Disconnecting timedout replica",
        "the other one starts, or had no processor; both join again, and BOX-10 and SPAM-6"
        " see how soon",
    ),
    Allowed(
        "dovecot|pairsync",
        r"Mailbox doesn't exist: probe-|Import mailbox probe-\S+: \w+ failed: Mailbox was deleted",
        "a check deleted a folder of its own as a sync of it began; BOX-3 sees both equal",
    ),
    Allowed("dovecot", "SIGHUP received - reloading", "a push or a renewed certificate reloads it"),
    Allowed(
        "dovecot",
        "doveadm client disconnected before handshake: EOF",
        "the other replica gave a sync up before it began; it comes again, and BOX-3 sees both"
        " equal",
    ),
    Allowed(
        "rspamd",
        "timeout while connecting the server",
        "Redis had no processor for half a second; mail goes on without what it knows, and SPAM-2"
        " and OUT-8 see that it counts",
    ),
    Allowed("redis", r"^[+-](monitor|sdown|tilt)", "Sentinel's own notes; SPAM-6 sees who serves"),
    Allowed(
        "smtpd", "purge_task: opendir", "OpenSMTPD's first start: nothing to purge is there yet"
    ),
    Allowed(
        "postfix/",
        "file system clock is 1 seconds ahead of local clock|resetting file time stamps",
        "Linux 6.13 and later stamps files more finely than the clock tells that time(2) reads: at"
        " the turn of a second a file is from the next one; Postfix stamps it again",
    ),
    Allowed(
        "redis-(server|sentinel)",
        "Memory overcommit must be enabled",
        "a rehearsal has its host's kernel; elsewhere redis-server.service sets it",
    ),
)


def read_the_books(ctx: Context) -> str:
    """Look at units, processes, journals and packages of every machine. Says what was seen."""
    machines = list(ctx.lab.machines)

    def look(machine: LabMachine) -> tuple[int, int]:
        _expect_no_failed_unit(machine)
        _expect_no_ordering_cycle(machine)
        running = _expect_installed(machine)
        return running, _expect_quiet(machine, ctx.disturbed)

    counts = each(machines, look)
    running, excused = (sum(column) for column in zip(*counts, strict=True))
    equal = _expect_equal_packages(ctx)
    return (
        f"{len(machines)} hosts without a failed unit; {running} processes run the installed "
        f"programs; no warning of a mail daemon ({excused} lines excused, {len(ALLOWED)} kinds); "
        f"{equal}"
    )


def _expect_no_failed_unit(machine: LabMachine) -> None:
    rows = machine.run("systemctl", "list-units", "--failed", "--plain", "--no-legend", "--all")
    failed = [row.split()[0] for row in rows.splitlines()]
    expect(not failed, f"{machine.name}: failed: {' '.join(failed)}")


def _expect_no_ordering_cycle(machine: LabMachine) -> None:
    """Out of a cycle systemd leaves a unit, another one at each boot: it may be any of them."""
    said = machine.machine.logs("-b", "_PID=1", "--output=cat", "--grep=[Oo]rdering cycle")
    expect(not said, f"{machine.name}: {said.strip()}")


_PROCESSES = """
import os

for name in filter(str.isdigit, os.listdir("/proc")):
    try:
        print(os.readlink(f"/proc/{name}/exe"))
        with open(f"/proc/{name}/maps", errors="replace") as maps:
            gone = {row.split(None, 5)[5] for row in maps if row.endswith(" (deleted)\\n")}
    except OSError:  # it has ended, or is one of the kernel's
        continue
    for path in sorted(gone):
        if path.startswith("/usr/"):
            print("deleted", name, path.strip())
"""


def _expect_installed(machine: LabMachine) -> int:
    """No process runs a program, or a library, that was replaced on the disk."""
    rows = machine.run("python3", "-IBc", _PROCESSES).splitlines()
    old = [row for row in rows if row.endswith("(deleted)") or row.startswith("deleted ")]
    told = "; ".join(sorted(set(old))[:SHOWN])
    expect(not old, f"{machine.name}: what runs was replaced on the disk: {told}")
    return len(rows)


def _expect_quiet(machine: LabMachine, since: float) -> int:
    """No warning or error of a mail daemon since the boot, or since a check disturbed something.

    Returns how many lines are excused.
    """
    lines = [*_warnings(machine, since)]
    bad = [f"{p}: {t}" for p, t in lines if not any(a.covers(p, t) for a in ALLOWED)]
    kinds = list(dict.fromkeys(re.sub(r"[0-9A-F]{6,}|\d+", "N", line) for line in bad))
    expect(
        not bad,
        f"{machine.name}: {len(bad)} warnings in the journal, of {len(kinds)} kinds:\n  "
        + "\n  ".join(bad[:SHOWN]),
    )
    return len(lines)


def _warnings(machine: LabMachine, since: float) -> Iterator[tuple[str, str]]:
    """Program and text of each line, of this boot."""
    fields = "--output-fields=SYSLOG_IDENTIFIER,MESSAGE"
    said = machine.run(
        *("journalctl", "-b", f"--since=@{since:.3f}", f"-p{WARNING}", "-o", "json"),
        *(fields, "--no-pager"),
    )
    for line in said.splitlines():
        entry = json.loads(line)
        program, text = entry.get("SYSLOG_IDENTIFIER"), entry.get("MESSAGE")
        if isinstance(program, str) and isinstance(text, str) and DAEMONS.search(program):
            yield program, text


Versions = dict[str, dict[str, list[str]]]
"""Package -> version -> hosts that have it."""


def _expect_equal_packages(ctx: Context) -> str:
    """Members of a cluster have the same packages, and each in one version."""
    versions: dict[Role, Versions] = {}

    def look(machine: LabMachine) -> tuple[LabMachine, list[list[str]]]:
        rows = machine.run("dpkg-query", "-W", "-f", "${db:Status-Status} ${Package} ${Version}\n")
        return machine, [r.split()[1:] for r in rows.splitlines() if r.startswith("installed ")]

    managed = [machine for machine in ctx.lab.machines if machine.host.is_managed]
    for machine, rows in each(managed, look):
        cluster = versions.setdefault(machine.host.main_role, {})
        for package, version in rows:
            cluster.setdefault(package, {}).setdefault(version, []).append(machine.name)
    different = [
        f"{package}: " + ", ".join(f"{v} on {' '.join(names)}" for v, names in found.items())
        for cluster in versions.values()
        for package, found in cluster.items()
        if len(found) > 1
    ]
    expect(not different, "members of a cluster differ: " + "; ".join(different[:SHOWN]))
    packages = {package for cluster in versions.values() for package in cluster}
    return f"{len(packages)} packages in equal versions within {len(versions)} clusters"


def reboot_every_machine(ctx: Context) -> str:
    """Reboot all at once, and look whether they are what they were. Says in which order."""
    machines = list(ctx.lab.machines)
    order = random.SystemRandom()
    order.shuffle(machines)
    before = {machine.name: _boot(machine) for machine in machines}
    each(machines, lambda machine: machine.machine.stop(), workers=4)
    order.shuffle(machines)
    each(machines, lambda machine: machine.machine.boot(), workers=4)
    each(machines, lambda machine: machine.machine.wait_booted(_BOOT_SECONDS))
    same = [m.name for m in machines if _boot(m) == before[m.name]]
    expect(not same, f"not rebooted: {', '.join(same)}")
    each(machines, lambda machine: _expect_back(ctx, machine))
    flows = _mail_flows(ctx)
    return (
        f"all {len(machines)} machines rebooted at once, {machines[0].name} first and "
        f"{machines[-1].name} last: every service and every port is back, nothing differs from "
        f"what was pushed, {flows}"
    )


def _boot(machine: LabMachine) -> str:
    """Tells one boot from the next."""
    return machine.run("stat", "-c", "%y", "/proc/1").strip()


def _expect_back(ctx: Context, machine: LabMachine) -> None:
    services = [service.unit for service in compose(ctx.platform, machine.host).services]
    own = machine.observer.client()

    def active() -> None:
        states = machine.call("systemctl", "is-active", "--", *services).stdout.split()
        down = [u for u, state in zip(services, states, strict=True) if state != "active"]
        expect(not down, f"{machine.name}: not active after the reboot: {' '.join(down)}")

    def serving() -> None:
        for port in Tables(ctx.platform).of(machine.host):
            for address in ctx.internal(machine.host):
                own.connect(address, port).close()

    if services:
        eventually(active, seconds=_BACK_SECONDS, every=0.5)
    eventually(serving, seconds=_BACK_SECONDS, every=0.5, what=machine.name)
    _expect_no_failed_unit(machine)
    drift = machine.call(AGENT, "drift")
    expect(drift.returncode == 0, f"{machine.name}: drift after the reboot: {drift.stdout.strip()}")


def _mail_flows(ctx: Context) -> str:
    world = ctx.lab.world
    mail = letter(f"{{token}}@{ctx.sending_domains[0]}", f"{{token}}@{world.domain('strict')}")
    submit(ctx, frontend_doors(ctx)[0], mail)
    world.arrival("strict", mail.recipient, PROMPT)
    if not ctx.platform.replicas:
        return "mail leaves"
    inward = maildrop.through_the_mx(ctx, maildrop.owners(ctx)[0].user)

    def arrived() -> None:
        expect(world.copies(inward.token), f"mail to {inward.recipient} did not arrive")

    eventually(arrived, seconds=PROMPT)
    return "mail leaves and comes in"
