"""Remove what a rehearsal leaves on a machine, however it ended.

Nothing here relies on the state being whole: machines are known by their folders and found by
their cgroups, processes by the namespaces that they are in, mounts and loop devices by the state
folder that they lie in. Machines of another state folder are left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from rehearsal import machine, network
from rehearsal.progress import Progress, RehearsalError, wait_for
from rehearsal.state import ProcessId, State, write_atomic

RUN = Path("/run/mail-rehearsal")
"""One rehearsal per machine: its lock, and in ``owner`` the state folder that it has."""


def owner() -> Path | None:
    """State folder of the rehearsal that is up on this machine, or was when it was killed."""
    try:
        return Path((RUN / "owner").read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return None


def claim(state: State) -> None:
    """Make ``state`` the rehearsal of this machine.

    Remains of another one are removed; one that runs is an error.
    """
    other = owner()
    if other is not None and other != state.root:
        if other.exists() and any(p.alive() for p in State(other).processes().values()):
            raise RehearsalError(
                f"another rehearsal is up on this machine, with its state in {other}",
                f"run: make down, in {other.parent}",
            )
        clean(other)
    RUN.mkdir(mode=0o700, exist_ok=True)
    write_atomic(RUN / "owner", f"{state.root}\n")


def down(state: State, progress: Progress) -> None:
    """End the rehearsal of ``state`` and remove everything of it but the cache."""
    roots = [state.root]
    other = owner()
    if other is not None and other not in roots:
        if other.exists() and any(p.alive() for p in State(other).processes().values()):
            progress.say(f"another rehearsal is up, with its state in {other}: left alone")
            _remove_folder(state.root)
            return
        roots.append(other)
    left: list[str] = []
    with progress.step("taking the rehearsal down"):
        for root in roots:
            machines = _machines(root)
            clean(root)
            _remove_folder(root)
            left += leftovers(root, machines)
        (RUN / "owner").unlink(missing_ok=True)
        network.forget_folder()
    if left:
        raise RehearsalError(
            "left behind: " + "; ".join(left), "run: make down, once more; then restart the machine"
        )


def clean(root: Path) -> None:
    """End the processes and remove mounts, loop devices, namespaces and cgroups.

    ``root`` is the state folder that they belong to; it stays, see :func:`down`.
    """
    machines = _machines(root)
    processes = _processes(root)
    for process in processes:
        process.send(signal.SIGKILL)
    for process in processes:
        with contextlib.suppress(RehearsalError):
            wait_for(_gone(process), timeout=5, what=f"process {process.pid} to die")
    for mount in _mounts(root):
        subprocess.run(["umount", str(mount)], check=False, capture_output=True)
    for loop in _loops(root):
        subprocess.run(["losetup", "--detach", loop], check=False, capture_output=True)
    network.tear_down(_namespaces(root))
    for name in machines:
        machine.remove_cgroups(name)
    machine.remove_empty_cgroups()


def leftovers(root: Path, machines: Sequence[str] | None = None) -> list[str]:
    """What is still there of a rehearsal, in words.

    ``machines``: their names, if the state folder does not tell them any more.
    """
    names = _machines(root) if machines is None else machines
    namespaces = [*network.fixed_namespaces(), *map(network.machine_namespace, names)]
    found = [f"process {p.pid}" for p in _processes(root)]
    found += [f"mount {m}" for m in _mounts(root)]
    found += [f"loop device {d}" for d in _loops(root)]
    found += [f"namespace {n}" for n in namespaces if (network.NETNS / n).exists()]
    found += [f"cgroup {g}" for n in names for g in machine.cgroups(n)]
    return found


def _gone(process: ProcessId) -> Callable[[], bool]:
    return lambda: not process.alive()


def _machines(root: Path) -> list[str]:
    """Names of the machines that the state folder has, or had before somebody removed it."""
    folder = root / "machines"
    if folder.is_dir():
        return sorted(p.name for p in folder.iterdir())
    if owner() != root:
        return []
    prefix = network.MACHINE_PREFIX
    return [n.removeprefix(prefix) for n in network.namespaces() if n.startswith(prefix)]


def _namespaces(root: Path) -> list[str]:
    machines = [network.machine_namespace(name) for name in _machines(root)]
    return [*network.fixed_namespaces(), *machines]


def _processes(root: Path) -> list[ProcessId]:
    """Those recorded, those in the machines' cgroups, those in the namespaces."""
    found: dict[int, ProcessId] = {}
    if (root / "processes.json").exists():
        with contextlib.suppress(json.JSONDecodeError, KeyError, RehearsalError):
            for process in State(root).processes().values():
                if process.alive():
                    found[process.pid] = process
    for group in (g for name in _machines(root) for g in machine.cgroups(name)):
        for procs in group.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                for word in procs.read_text(encoding="ascii").split():
                    identity = ProcessId.of(int(word))
                    if identity is not None:
                        found[identity.pid] = identity
    for process in network.inhabitants(_namespaces(root)):
        found[process.pid] = process
    found.pop(os.getpid(), None)
    return list(found.values())


def _mounts(root: Path) -> list[Path]:
    """Mounts at or below the state folder, the innermost first."""
    found: list[Path] = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        place = Path(line.split(" ")[4].encode().decode("unicode_escape"))
        if place.is_relative_to(root):
            found.append(place)
    return found[::-1]


def _loops(root: Path) -> list[str]:
    """Loop devices whose files lie in the state folder; also when the file is gone."""
    done = subprocess.run(
        ["losetup", "--json", "--list", "--output=NAME,BACK-FILE"], capture_output=True, text=True
    )
    devices = json.loads(done.stdout or '{"loopdevices": []}')["loopdevices"]
    return [
        str(d["name"])
        for d in devices
        if Path(str(d["back-file"]).removesuffix(" (deleted)")).is_relative_to(root)
    ]


def _remove_folder(root: Path) -> None:
    if _mounts(root):
        raise RehearsalError(
            f"something is still mounted below {root}", f"see what holds it: fuser -vm {root}"
        )
    shutil.rmtree(root, ignore_errors=True)
