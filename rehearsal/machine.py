"""Machines of a rehearsal: systemd-nspawn with a real init on shared image layers.

A machine's root is an overlay: read-only image layers (:mod:`rehearsal.image`) below, its own
folder ``machines/<name>/upper`` above. Its network is a namespace made before it boots, which
holds its interfaces with their MAC addresses, so that cloud-init and systemd-networkd find them
as they would find the ones of a real machine. It sees a cgroup tree of version 2 of its own,
whichever version the host runs.

A machine is three processes on the host: a shell that starts it again when it reboots (recorded
in the state), its child systemd-nspawn, and that one's child, the machine's init. To pull the
plug means to kill init: with nspawn killed the machine would go on running.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rehearsal import network
from rehearsal.progress import RehearsalError, wait_for
from rehearsal.state import ProcessId, State, children

CGROUPS = Path("/sys/fs/cgroup")
_GROUP = "mail-rehearsal"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BOOT_SECONDS = 30
_STOP_SECONDS = 20


_INSTANCES = Path("/proc/sys/fs/inotify/max_user_instances")
_WANTED_INSTANCES = 1024


def _let_units_watch() -> None:
    """Let all machines' systemd watch their files: the kernel counts for root of all together.

    A machine takes up to ten inotify instances, Debian allows 128, and a unit that cannot watch
    its PID file fails (inotify(7)).
    """
    if int(_INSTANCES.read_text()) < _WANTED_INSTANCES:
        _INSTANCES.write_text(f"{_WANTED_INSTANCES}\n")


class MachineError(RehearsalError):
    """A machine could not be started, reached or removed."""


@dataclass
class Machine:
    """One machine.

    :param name: FQDN, the name of its folder, its namespace (``mail-m-<name>``) and its cgroup
    :param layers: image layers, the lowest one first (``Layers.postfix`` and the like)
    :param legs: (bridge in core, MAC address) of eth0, eth1, ...
    :param binds: path on the host -> path in the machine, writable there
    :param disks: device in the machine (``/dev/vdb``) -> image file on the host
    :param state: where the machine lives
    :param init_arguments: further words for the machine's init (systemd's kernel command line)
    """

    name: str
    layers: Sequence[Path]
    legs: Sequence[tuple[str, str]]
    state: State
    binds: Mapping[Path, str] = field(default_factory=dict)
    disks: Mapping[str, Path] = field(default_factory=dict)
    init_arguments: Sequence[str] = ()

    # Folders -----------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return self.state.machines / self.name

    @property
    def root(self) -> Path:
        """The machine's root directory while it is mounted (see :meth:`mount`)."""
        return self.folder / "root"

    @property
    def upper(self) -> Path:
        """What differs from the image layers."""
        return self.folder / "upper"

    @property
    def console(self) -> Path:
        """What init said on its console, and what systemd-nspawn complained about."""
        return self.folder / "console.log"

    @property
    def namespace(self) -> str:
        return network.machine_namespace(self.name)

    # Definition --------------------------------------------------------------------------------

    def save(self) -> None:
        """Keep the definition, so that other commands find the machine (:meth:`load`)."""
        document = {
            "layers": [str(p) for p in self.layers],
            "legs": [list(leg) for leg in self.legs],
            "binds": {str(k): v for k, v in self.binds.items()},
            "disks": {k: str(v) for k, v in self.disks.items()},
            "init_arguments": list(self.init_arguments),
        }
        self.state.write(f"machines/{self.name}/machine.json", json.dumps(document, indent=1))

    @classmethod
    def load(cls, name: str, state: State) -> Machine | None:
        """The machine ``name`` as it was saved; None where there is none."""
        document: dict[str, Any] = state.read_json(f"machines/{name}/machine.json")
        if not document:
            return None
        return cls(
            name=name,
            layers=tuple(Path(p) for p in document["layers"]),
            legs=tuple((str(b), str(m)) for b, m in document["legs"]),
            state=state,
            binds={Path(k): str(v) for k, v in document["binds"].items()},
            disks={str(k): Path(v) for k, v in document["disks"].items()},
            init_arguments=tuple(document["init_arguments"]),
        )

    @classmethod
    def all(cls, state: State) -> tuple[Machine, ...]:
        """Every machine that has a folder in the state, running or not."""
        names = sorted(p.parent.name for p in state.machines.glob("*/machine.json"))
        found = (cls.load(n, state) for n in names)
        return tuple(m for m in found if m is not None)

    # Life --------------------------------------------------------------------------------------

    def mount(self) -> Path:
        """Mount the machine's root and return it; files can be put in before the first boot."""
        self.save()
        for path in (self.upper, self.folder / "work", self.root):
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not os.path.ismount(self.root):
            lower = ":".join(_escaped(p) for p in reversed(self.layers))
            options = (
                f"lowerdir={lower},upperdir={_escaped(self.upper)},"
                f"workdir={_escaped(self.folder / 'work')}"
            )
            _do(
                ["mount", "-t", "overlay", "-o", options, "mail-rehearsal", str(self.root)],
                f"{self.name}: cannot mount its root",
                "put the checkout on a plain file system such as ext4 or xfs",
            )
        return self.root

    def boot(self) -> None:
        """Start the machine; returns when its init runs. Nothing happens if it runs already."""
        if self.alive():
            return
        self._clean()
        _let_units_watch()
        self.mount()
        try:
            network.plug(self.name, self.legs)
            self._start()
        except BaseException:
            self._clean()
            raise

    def _start(self) -> None:
        arguments = [
            "systemd-nspawn",
            "--quiet",
            "--boot",
            "--register=no",
            "--keep-unit",
            f"--machine={self.name}",
            f"--directory={self.root}",
            f"--network-namespace-path={network.NETNS / self.namespace}",
            "--capability=CAP_NET_ADMIN",
            "--console=pipe",
            "--link-journal=no",
            "--resolv-conf=off",
            "--timezone=off",
            *(f"--bind={_colons(str(k))}:{_colons(v)}" for k, v in self.binds.items()),
            *self._attach_disks(),
            *self.init_arguments,
        ]
        groups = " ".join(str(d / "cgroup.procs") for d in self._make_cgroups())
        # nspawn runs in the machine's own cgroups: machines that share one would share the
        # cgroups of their units too. 133 is its answer when the machine wants to reboot.
        script = (
            f'while :; do (for f in {groups}; do echo 0 > "$f"; done; exec "$@"); '
            'code=$?; [ "$code" = 133 ] || exit "$code"; done'
        )
        environment = {
            "PATH": _PATH,
            "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
            "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
        }
        with self.console.open("ab") as log:
            started = log.tell()
            supervisor = subprocess.Popen(
                ["sh", "-c", script, "sh", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self.state.record(f"machine {self.name}", supervisor.pid)

        def running() -> bool:
            if supervisor.poll() is not None:
                raise MachineError(f"{self.name} did not start: {self._said(started)}")
            init = self._init()
            return init is not None and _is_init(init.pid)

        wait_for(
            running,
            timeout=_BOOT_SECONDS,
            interval=0.02,
            what=f"the init of {self.name}",
            remedy=f"look into {self.console}",
        )

    def _said(self, offset: int) -> str:
        with self.console.open("rb") as log:
            log.seek(offset)
            lines = log.read().decode(errors="replace").strip().splitlines()
        return " / ".join(lines[-5:]) or "it said nothing"

    def wait_booted(self, timeout: float = 60.0) -> None:
        """Wait until init has no more start-up jobs (``running`` or ``degraded``)."""

        def booted() -> bool:
            if not self.alive():
                raise MachineError(f"{self.name} died while it booted", f"look into {self.console}")
            done = self.run(["systemctl", "is-system-running"], check=False)
            return done.stdout.strip() in ("running", "degraded")

        wait_for(booted, timeout=timeout, interval=0.1, what=f"{self.name} to finish booting")

    def kill(self) -> None:
        """Pull the plug: the machine is gone at once, without a word on the network."""
        init = self._init()
        for number in range(len(self.legs)):
            try:
                network.cut(self.name, number)
            except RehearsalError:
                continue
        if init is not None:
            init.send(signal.SIGKILL)
        self._reap()

    def stop(self, timeout: float = _STOP_SECONDS) -> None:
        """Shut the machine down in order; after ``timeout`` seconds the plug is pulled."""
        init = self._init()
        if init is not None and init.send(signal.SIGRTMIN + 4):
            try:
                wait_for(
                    lambda: not self.alive(), timeout=timeout, what=f"{self.name} to shut down"
                )
            except RehearsalError:
                init.send(signal.SIGKILL)
        self._reap()

    def alive(self) -> bool:
        return self._init() is not None

    def destroy(self) -> None:
        """Kill the machine and remove everything of it; its disks' image files stay."""
        self.kill()
        self._clean()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            raise MachineError(
                f"{self.folder} cannot be removed", f"see what holds it: fuser -vm {self.folder}"
            )

    # Inside ------------------------------------------------------------------------------------

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str | bytes | None = None,
        check: bool = True,
        timeout: float | None = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine as root, with its own environment, not the caller's.

        Raises :class:`MachineError` with what the command said when ``check`` is true and it
        fails, when it takes more than ``timeout`` seconds, and when the machine does not run.
        """
        text = input.decode() if isinstance(input, bytes) else input
        try:
            done = subprocess.run(
                [*self.entrance(), *argv],
                input=text,
                stdin=subprocess.DEVNULL if text is None else None,
                text=True,
                errors="replace",
                capture_output=True,
                timeout=timeout,
                env={"PATH": _PATH},
            )
        except subprocess.TimeoutExpired:
            raise MachineError(
                f"{self.name}: {' '.join(argv)}: not done after {timeout} s"
            ) from None
        if check and done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip())[-2000:]
            raise MachineError(f"{self.name}: {' '.join(argv)}: exit {done.returncode}: {said}")
        return done

    def entrance(self) -> list[str]:
        """Words in front of a command that let it run in the machine (for shells and the like)."""
        init = self._init()
        if init is None:
            raise MachineError(f"{self.name} does not run", "run: make rehearsal")
        return [
            *("nsenter", f"--target={init.pid}", "--all", "--"),
            *("env", "-i", f"PATH={_PATH}", "HOME=/root", "LANG=C.UTF-8", "TERM=linux"),
        ]

    def logs(self, *arguments: str) -> str:
        """The machine's journal (``arguments`` are journalctl's); of a dead machine too."""
        if self.alive():
            return self.run(["journalctl", "--quiet", "--no-pager", *arguments], check=False).stdout
        journal = self.upper / "var/log/journal"
        done = subprocess.run(
            ["journalctl", "--quiet", "--no-pager", f"--directory={journal}", *arguments],
            text=True,
            capture_output=True,
        )
        return done.stdout

    # Parts -------------------------------------------------------------------------------------

    def _supervisor(self) -> ProcessId | None:
        return self.state.process(f"machine {self.name}")

    def _init(self) -> ProcessId | None:
        """The machine's first process. It changes at a reboot; the supervisor does not."""
        supervisor = self._supervisor()
        if supervisor is None:
            return None
        for nspawn in children(supervisor.pid):
            for pid in children(nspawn):
                identity = ProcessId.of(pid)
                if identity is not None:
                    return identity
        return None

    def _reap(self) -> None:
        """Wait for the supervisor, which ends when its machine is gone; then unplug."""
        supervisor = self._supervisor()
        if supervisor is not None:
            try:
                wait_for(
                    lambda: not supervisor.alive(),
                    timeout=5,
                    what=f"the supervisor of {self.name} to end",
                )
            except RehearsalError:
                self._end_supervisor(supervisor)
        network.unplug(self.name)
        self.state.forget(f"machine {self.name}")

    @staticmethod
    def _end_supervisor(supervisor: ProcessId) -> None:
        nspawns = [ProcessId.of(pid) for pid in children(supervisor.pid)]
        supervisor.send(signal.SIGKILL)
        for nspawn in nspawns:
            if nspawn is not None:
                nspawn.send(signal.SIGKILL)

    def _clean(self) -> None:
        """Remove what a dead machine may have left on the host, except its folder."""
        supervisor = self._supervisor()
        if supervisor is not None:
            self._end_supervisor(supervisor)
        for process in network.inhabitants([self.namespace]):
            process.send(signal.SIGKILL)
        network.unplug(self.name)
        self.state.forget(f"machine {self.name}")
        while os.path.ismount(self.root):
            _do(["umount", str(self.root)], f"{self.name}: its root is in use", "run: make down")
        self._detach_disks()
        remove_cgroups(self.name)

    def _attach_disks(self) -> list[str]:
        """Loop devices for the disks; also bound under their own names, for blkid's sake."""
        arguments: list[str] = []
        for device, image in self.disks.items():
            done = _do(
                ["losetup", "--find", "--show", str(image)],
                f"{self.name}: no loop device for {image}",
                "free one: losetup --list shows who uses them",
            )
            loop = done.stdout.strip()
            arguments += [f"--bind={loop}:{device}", f"--bind={loop}"]
        return arguments

    def _detach_disks(self) -> None:
        for image in self.disks.values():
            detach(image)

    def _make_cgroups(self) -> list[Path]:
        made: list[Path] = []
        for hierarchy in _hierarchies():
            path = hierarchy / _GROUP / self.name
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise MachineError(
                    f"cannot make the cgroup {path}: {error.strerror}",
                    "run on a machine or container that may make cgroups",
                ) from error
            made.append(path)
        return made


def destroy_all(state: State) -> None:
    """Remove every machine of the state."""
    for machine in Machine.all(state):
        machine.destroy()
    remove_empty_cgroups()


def cgroups(name: str) -> tuple[Path, ...]:
    """A machine's cgroup in each hierarchy where it exists."""
    return tuple(g for g in (h / _GROUP / name for h in _hierarchies()) if g.exists())


def remove_empty_cgroups() -> None:
    """Remove the cgroup above those of the machines, unless another rehearsal has machines."""
    for hierarchy in _hierarchies():
        with contextlib.suppress(OSError):
            (hierarchy / _GROUP).rmdir()


def detach(image: Path) -> None:
    """Free every loop device that has ``image`` behind it."""
    done = subprocess.run(
        ["losetup", "--noheadings", "--output=NAME", f"--associated={image}"],
        text=True,
        capture_output=True,
    )
    for loop in done.stdout.split():
        subprocess.run(["losetup", "--detach", loop], check=False, capture_output=True)


def remove_cgroups(name: str) -> None:
    """Remove a machine's cgroups in every hierarchy, from the leaves up."""
    for hierarchy in _hierarchies():
        _remove_tree(hierarchy / _GROUP / name)


def _remove_tree(path: Path) -> None:
    for folder, _, _ in os.walk(path, topdown=False):
        try:
            Path(folder).rmdir()
        except OSError:
            continue


def _hierarchies() -> tuple[Path, ...]:
    """Roots of the cgroup hierarchies: one with version 2 alone, else those that we count in."""
    if (CGROUPS / "cgroup.controllers").exists():
        return (CGROUPS,)
    wanted = ("systemd", "unified", "memory", "cpu", "cpuacct", "pids")
    return tuple(CGROUPS / w for w in wanted if (CGROUPS / w / "cgroup.procs").exists())


def _is_init(pid: int) -> bool:
    """Whether the machine's first process has become its init (it starts as nspawn's child)."""
    try:
        return Path(f"/proc/{pid}/exe").readlink().name != "systemd-nspawn"
    except OSError:
        return False


def _escaped(path: Path) -> str:
    """A path in the options of mount(8) for overlay."""
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def _colons(path: str) -> str:
    """A path in systemd-nspawn's ``--bind=``."""
    return path.replace("\\", "\\\\").replace(":", "\\:")


def _do(argv: Sequence[str], failure: str, remedy: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, text=True, capture_output=True)
    if done.returncode != 0:
        raise MachineError(f"{failure}: {done.stderr.strip()}", remedy)
    return done
