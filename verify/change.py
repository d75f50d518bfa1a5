"""CHANGE: what changing a running platform does, and what it must not do."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

from ruamel.yaml import YAML

from mailsite.loader import SiteError, load_platform
from mailsite.model import Host, MailDomain, Role
from verify import addresses, smtp_in
from verify.context import Context, describe, each, eventually, expect
from verify.lab import LabMachine
from verify.registry import Failed, Skipped, check
from verify.stack import PROJECT


@dataclass(frozen=True)
class Snapshot:
    """What a second ``up`` must not touch on a host.

    Attributes:
        units: Unit -> its invocation, its main process and when it started.
        files: Path -> inode, size, times, owner and mode.
    """

    units: dict[str, str]
    files: dict[str, str]

    def differences(self, later: Snapshot) -> list[str]:
        return [
            *(f"unit {u}" for u in _differing(self.units, later.units)),
            *_differing(self.files, later.files),
        ]


def _differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))


FOLDERS = ("/etc", "/usr/local", "/var/lib/mail-agent")


def snapshot(machine: LabMachine) -> Snapshot:
    """The services and files of a host as they are now."""
    names = machine.run(
        "systemctl", "list-units", "--type=service", "--state=running", "--no-legend", "--plain"
    )
    services = [line.split()[0] for line in names.splitlines() if line.split()]
    lasting = [s for s in services if not s.startswith(("user@", "run-", "mail-agent-", "session"))]
    shown = machine.run(
        "systemctl", "show", "--property=Id,InvocationID,MainPID,ActiveEnterTimestamp", *lasting
    )
    blocks = (
        dict(line.split("=", 1) for line in b.splitlines()) for b in shown.strip().split("\n\n")
    )
    units = {b["Id"]: " ".join(sorted(b.values())) for b in blocks}
    listed = machine.run(
        "find", *FOLDERS, "-xdev", "-type", "f",
        "-printf", "%p\\t%i %s %T@ %C@ %u:%g %m\\n",
    )  # fmt: skip
    files = dict(line.split("\t", 1) for line in listed.splitlines())
    return Snapshot(units, files)


@check("CHANGE-1", quick=True, still=True)
def second_up_changes_nothing(ctx: Context) -> str:
    """A second `up` with unchanged data changes nothing on any host and restarts nothing."""
    machines = list(ctx.lab.machines)
    before = each(machines, snapshot)
    summary = ctx.lab.up()
    after = each(machines, snapshot)
    changed = {kind: count for kind, count in summary.items() if kind != "same" and count}
    expect(
        not changed,
        "the engine reports changes: " + ", ".join(f"{n} {k}" for k, n in sorted(changed.items())),
    )
    expect(summary.get("same"), "the engine reports no resource at all")
    for machine, one, other in zip(machines, before, after, strict=True):
        differences = one.differences(other)
        expect(not differences, f"{machine.name}: changed by `up`: {', '.join(differences[:10])}")
    return (
        f"{summary['same']} resources unchanged; on {len(machines)} hosts "
        f"{sum(len(s.units) for s in before)} services run on, and "
        f"{sum(len(s.files) for s in before)} files are untouched"
    )


@check("CHANGE-2", disruptive=True)
def an_alias_is_added(ctx: Context) -> str:
    """One alias added: smtp-in's tables alone change, one host at a time, nobody is refused."""
    lab = ctx.lab
    exchangers = ctx.platform.members(Role.SMTP_IN)
    domain, mailbox = _domain_for_an_alias(ctx)
    user = f"added-{secrets.token_hex(4)}"
    address = f"{user}@{domain.name}"
    machines = list(lab.machines)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ctx.site.name
        shutil.copytree(ctx.site, copy)
        _add_alias(copy / "domains" / f"{domain.name}.yaml", user, mailbox)
        line = f"{address} {mailbox}@{ctx.platform.maildrop_domain}"
        shown = [t.strip() for t in lab.preview(copy).splitlines() if address in t]
        expect(
            any(t.startswith("+") and line in t for t in shown),
            f"the preview does not show the line '{line}': {shown[:5] or 'nothing of it'}",
        )
        before = each(machines, snapshot)
        started = time.time()
        try:
            with Stream(ctx) as stream:
                summary = lab.up(copy)
            after = each(machines, snapshot)
            told = stream.judged()
            changed = {kind: n for kind, n in summary.items() if kind != "same" and n}
            expect(
                changed == {"update": 2 * len(exchangers)},
                f"the engine reports {changed}, not a push and its confirmation for each of"
                f" {len(exchangers)} hosts",
            )
            _expect_tables_alone(machines, before, after, exchangers)
            _expect_one_at_a_time(ctx, exchangers, started)
            _expect_arrival(ctx, address)
        finally:
            lab.up()
    return (
        f"{address}: the preview shows its line; {len(exchangers)} hosts changed one after the"
        f" other, nothing but {', '.join(_TABLES)}; Postfix ran on; {told}"
    )


_TABLES = ("/etc/postfix/virtual", "/etc/postfix/virtual.lmdb")


def _domain_for_an_alias(ctx: Context) -> tuple[MailDomain, str]:
    """A domain with addresses of its own, and a mailbox that one more may lead to."""
    for domain in addresses.receiving(ctx.platform):
        if domain.addresses and ctx.platform.mailboxes:
            return domain, next(iter(ctx.platform.mailboxes))
    raise Skipped("no domain of the site data has addresses")


def _add_alias(path: Path, user: str, mailbox: str) -> None:
    """Write a line below ``addresses:``, indented like the next one."""
    lines = path.read_text("utf-8").splitlines()
    number = next(n for n, text in enumerate(lines) if text.startswith("addresses:"))
    after = lines[number + 1]
    indent = after[: len(after) - len(after.lstrip())]
    lines.insert(number + 1, f"{indent}{user}: {mailbox}")
    path.write_text("\n".join(lines) + "\n", "utf-8")


class Stream:
    """Connections to every address of smtp-in, one after the other, as long as it is open.

    Each says EHLO and names a recipient, as a mail server that has mail would.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._over = threading.Event()
        self._failures: list[str] = []
        self._counts: list[int] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._threads = [
            threading.Thread(target=self._run, args=(door,))
            for door in smtp_in.doors(self._ctx, helo="stream.probe.invalid")
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, door: smtp_in.Door) -> None:
        recipient = smtp_in.existing(self._ctx)
        rest = 60.0 / self._ctx.platform.inbound.limits.connection_rate * 1.2
        number = 0
        while number == 0 or not self._over.wait(rest):  # a client that stays below its limit
            number += 1
            try:
                with door.session(self._ctx) as session:
                    session.ehlo()
                    code, text = session.envelope("", recipient)
                    if code != 250:
                        self._failures.append(f"{door}: RCPT is answered with {code} {text}")
            except (OSError, Failed) as error:
                self._failures.append(f"{door}: {describe(error)}")
        self._counts.append(number)

    def judged(self) -> str:
        """What became of the connections.

        Raises:
            Failed: One of them was refused, or cut off.
        """
        total = sum(self._counts)
        expect(total, "no connection was made while the change was under way")
        failed = "; ".join(self._failures[:3])
        expect(not failed, f"{len(self._failures)} of {total} connections failed: {failed}")
        return f"{total} connections meanwhile, none refused"


def _expect_tables_alone(
    machines: list[LabMachine],
    before: list[Snapshot],
    after: list[Snapshot],
    exchangers: tuple[Host, ...],
) -> None:
    for machine, one, other in zip(machines, before, after, strict=True):
        differences = [
            d for d in one.differences(other)
            if not d.startswith("/var/lib/mail-agent/")
        ]  # fmt: skip
        wanted = list(_TABLES) if machine.host in exchangers else []
        expect(
            differences == wanted,
            f"{machine.name}: changed are {', '.join(differences) or 'no files'}, not"
            f" {', '.join(wanted) or 'none'}",
        )


def _expect_one_at_a_time(ctx: Context, exchangers: tuple[Host, ...], since: float) -> None:
    """No run of the agent on a member begins before the one on the member before has ended."""
    runs = []
    for host in exchangers:
        lines = ctx.lab.machine(host).machine.logs(
            f"--since=@{since:.3f}", "--output=short-unix", f"--grep={_RUN_OF_THE_AGENT}"
        )
        times = [float(line.split()[0]) for line in lines.splitlines() if line[:1].isdigit()]
        expect(len(times) >= 2, f"{host.name}: the journal shows no run of the agent: {lines}")
        runs.append((times[0], times[-1], host.name))
    for one, other in itertools.pairwise(runs):
        expect(
            one[1] <= other[0],
            f"{other[2]} began to change {one[1] - other[0]:.1f} s before {one[2]} had ended",
        )


_RUN_OF_THE_AGENT = r"(Started|Starting) mail-agent-.*\.service|mail-agent-.*: Deactivated"


def _expect_arrival(ctx: Context, address: str) -> None:
    """Every member takes mail for the new address, and it arrives."""
    sender = ctx.lab.sender("careful")
    for member in ctx.platform.members(Role.SMTP_IN):
        mail = smtp_in.write(sender, address)
        door = next(d for d in smtp_in.remote_doors(ctx, sender) if d.member is member)
        with door.session(ctx) as session:
            session.ehlo()
            code, text = session.submit(mail.sender, [mail.recipient], mail.content)
            expect(code == 250, f"{door}: mail to {address} is answered with {code} {text}")
        eventually(
            lambda mail=mail: expect(  # type: ignore[misc]
                ctx.lab.world.copies(mail.token), f"mail to {address} did not arrive"
            ),
            seconds=20,
        )


Edit = Callable[[Path], tuple[str, int]]
"""Spoils a copy of the site data. Returns the file and the line that are now wrong."""


@check("CHANGE-8", quick=True, calm=True)
def bad_data_is_refused(ctx: Context) -> str:
    """Bad site data is refused before anything is contacted, with file, line and remedy."""
    cases = spoilers(ctx)

    def look(case: tuple[str, Edit]) -> str:
        what, edit = case
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / ctx.site.name
            shutil.copytree(ctx.site, copy)
            file, line = edit(copy)
            try:
                load_platform(copy)
            except SiteError as error:
                problems = error.problems
            else:
                raise Failed(f"{what} ({file}:{line}): not refused")
        expect(
            any(Path(p.file).name == Path(file).name and p.line == line for p in problems),
            f"{what}: blames {', '.join(f'{p.file}:{p.line}' for p in problems)}, "
            f"not {file}:{line}",
        )
        expect(
            all(p.remedy for p in problems),
            f"{what}: does not say what to do: {problems[0]}",
        )
        return what

    told = each(sorted(cases.items()), look, workers=2)
    refused = "" if ctx.is_live else f"; {_refused_by_the_program(ctx, cases['unknown key'])}"
    return f"refused with file, line and remedy: {', '.join(told)}{refused}"


PROGRAM = """
import os, runpy, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "subprocess.Popen"):
        os.write(2, f"contacted something: {event} {arguments}".encode())
        os._exit(97)

sys.addaudithook(watch)
runpy.run_path(sys.argv[1], run_name="__main__")
"""
"""Runs the platform's program and ends it where it tries to reach anything."""


def _refused_by_the_program(ctx: Context, edit: Edit) -> str:
    """The whole program, where there is no network at all, refuses in the same words."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ctx.site.name
        shutil.copytree(ctx.site, copy)
        file, line = edit(copy)
        config = {
            "mail:site": str(copy),
            "mail:rehearsal": str(ctx.lab.state.world_overlay),
            "mail:deployPublicKey": "ssh-ed25519 AAAA",
        }
        done = subprocess.run(
            ["unshare", "--net", sys.executable, "-c", PROGRAM, str(PROJECT / "__main__.py")],
            cwd=PROJECT,
            env={"PATH": os.environ["PATH"], "PULUMI_CONFIG": json.dumps(config)},
            text=True,
            capture_output=True,
            timeout=60,
        )
    expect(
        done.returncode not in (0, 97) and f"{file}:{line}: " in done.stderr,
        f"the program, given bad site data, ends with {done.returncode}: "
        f"{done.stderr.strip()[-500:] or 'silence'}",
    )
    return "the program itself refuses where there is no network"


def spoilers(ctx: Context) -> dict[str, Edit]:
    """Ways to spoil the site data, by what is then wrong."""
    topology, site = (_Layout.of(ctx.site, name) for name in ("topology.yaml", "site.yaml"))
    member = ctx.members[0]
    leg = member.interfaces[0]
    first = ("hosts", member.name, "interfaces", 0)
    twin = next(
        (
            ("hosts", host.name, "interfaces", index, "ipv4")
            for host in ctx.platform.hosts.values()
            if host.name != member.name
            for index, interface in enumerate(host.interfaces)
            if interface.network == leg.network
        ),
        None,
    )
    networks = ctx.platform.networks.values()
    outside = next(
        address
        for address in ("203.0.113.77", "198.51.100.77", "192.0.2.77", "100.64.77.77")
        if not any(ip_address(address) in network.ipv4.prefix for network in networks)
    )
    cases = {
        "unknown key": site.added("colour: green"),
        "bad YAML": site.added("names: {smtp_out: ["),
        "address outside its network": topology.changed(*first, "ipv4", to=outside),
        "bad address": topology.changed(*first, "ipv4", to="300.1.2.3"),
        "host in no network": topology.changed(*first, "network", to="nowhere"),
        "missing gateway": topology.without("networks", leg.network, "ipv4", "gateway"),
        "primary that is no member": site.changed("outbound", "primary", to="nobody.example.org"),
        "unknown role": topology.changed("hosts", member.name, "roles", 0, to="smtp-outt"),
        "bad domain name": site.changed("domain", to="Not_A_Domain."),
    }
    if "tls" in site.data["outbound"]:
        cases["unknown TLS level"] = site.changed("outbound", "tls", to="sometimes")
    if twin is not None:
        cases["duplicate address"] = topology.changed(*twin, to=str(leg.ipv4))
    if member.vm is not None:
        cases["unknown hypervisor"] = topology.changed(
            "hosts", member.name, "vm", "hypervisor", to="nobody"
        )
    return cases


@dataclass(frozen=True)
class _Layout:
    """A file of the site data and where in it values stand, whatever the style of its YAML."""

    name: str
    data: Any

    @classmethod
    def of(cls, site: Path, name: str) -> _Layout:
        return cls(name, YAML().load((site / name).read_text("utf-8")))

    def changed(self, *keys: str | int, to: str) -> Edit:
        """Write another value at the place that ``keys`` lead to."""
        *path, last = keys
        node = self._at(path)
        line, column = node.lc.value(last) if isinstance(last, str) else node.lc.item(last)

        def spoil(text: str) -> str:
            return text[:column] + re.sub(rf"^{_SCALAR}", to, text[column:])

        return self._line(line, spoil, blamed=line)

    def without(self, *keys: str) -> Edit:
        """Leave a key out; the one that it is missing under is to blame."""
        *path, parent, last = keys
        line, _ = self._at([*path, parent]).lc.key(last)
        blamed, _ = self._at(path).lc.key(parent)

        def spoil(text: str) -> str:
            return re.sub(rf"(,\s*)?\b{last}:\s*{_SCALAR}", "", text)

        return self._line(line, spoil, blamed=blamed)

    def added(self, line: str) -> Edit:
        """Write a line at the end."""

        def edit(folder: Path) -> tuple[str, int]:
            path = folder / self.name
            text = path.read_text("utf-8").rstrip("\n") + "\n" + line + "\n"
            path.write_text(text, "utf-8")
            return self.name, text.count("\n")

        return edit

    def _at(self, keys: Iterable[str | int]) -> Any:
        node = self.data
        for key in keys:
            node = node[key]
        return node

    def _line(self, number: int, spoil: Callable[[str], str], *, blamed: int) -> Edit:
        def edit(folder: Path) -> tuple[str, int]:
            path = folder / self.name
            lines = path.read_text("utf-8").splitlines()
            lines[number] = spoil(lines[number])
            path.write_text("\n".join(lines) + "\n", "utf-8")
            return self.name, blamed + 1

        return edit


_SCALAR = r"""("[^"]*"|'[^']*'|[^\s,}\]]+)"""
"""A value on one line of YAML."""
