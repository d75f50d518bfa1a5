"""CHANGE: what changing a running platform does, and what it must not do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mailsite.loader import SiteError, load_platform
from verify.context import Context, each, expect
from verify.lab import LabMachine
from verify.registry import Failed, check
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


@check("CHANGE-1", quick=True, alone=True)
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


Edit = Callable[[Path], tuple[str, int]]
"""Spoils a copy of the site data. Returns the file and the line that are now wrong."""


@check("CHANGE-8", quick=True)
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
    member = ctx.members[0]
    other = next(h for h in ctx.platform.hosts.values() if h is not member)
    leg = member.interfaces[0]
    network = ctx.platform.networks[leg.network]
    topology, site = "topology.yaml", "site.yaml"
    twin = next(
        (
            i
            for h in ctx.platform.hosts.values()
            if h is not member
            for i in h.interfaces
            if i.network == leg.network
        ),
        None,
    )

    def after(file: str, pattern: str, spoil: Callable[[str], str]) -> Edit:
        """Change the first line that matches ``pattern``."""

        def edit(folder: Path) -> tuple[str, int]:
            path = folder / file
            lines = path.read_text("utf-8").splitlines()
            number = next(n for n, text in enumerate(lines) if re.search(pattern, text))
            lines[number] = spoil(lines[number])
            path.write_text("\n".join(lines) + "\n", "utf-8")
            return file, number + 1

        return edit

    def added(file: str, line: str) -> Edit:
        def edit(folder: Path) -> tuple[str, int]:
            path = folder / file
            text = path.read_text("utf-8").rstrip("\n") + "\n" + line + "\n"
            path.write_text(text, "utf-8")
            return file, text.count("\n")

        return edit

    mine = re.escape(str(leg.ipv4)) + r"\b"
    cases = {
        "unknown key": added(site, "colour: green"),
        "bad YAML": added(site, "names: {smtp_out: ["),
        "address outside its network": after(
            topology, mine, lambda t: t.replace(str(leg.ipv4), "203.0.113.77")
        ),
        "bad address": after(topology, mine, lambda t: t.replace(str(leg.ipv4), "300.1.2.3")),
        "host in no network": after(topology, mine, lambda t: t.replace(leg.network, "nowhere")),
        "missing gateway": after(
            topology,
            re.escape(str(network.ipv4.prefix)),
            lambda t: re.sub(r",\s*gateway:\s*[^},]+", "", t),
        ),
        "unknown TLS level": after(site, r"^\s+tls:", lambda t: t.split(":")[0] + ": sometimes"),
        "primary that is no member": after(
            site, r"^\s+primary:", lambda t: f"{t.split(':')[0]}: {other.name}x.example.org"
        ),
        "unknown role": after(
            topology, r"roles: \[smtp-out\]", lambda t: t.replace("smtp-out", "smtp-outt")
        ),
        "bad domain name": after(site, r"^domain:", lambda t: "domain: Not_A_Domain."),
    }
    if twin is not None:
        cases["duplicate address"] = after(
            topology,
            re.escape(str(twin.ipv4)) + r"\b",
            lambda t: t.replace(str(twin.ipv4), str(leg.ipv4)),
        )
    if member.vm is not None:
        hypervisor = member.vm.hypervisor
        cases["unknown hypervisor"] = after(
            topology, rf"hypervisor: {hypervisor}\b", lambda t: t.replace(hypervisor, "nobody")
        )
    return cases
