"""What a rehearsal leaves on disk while it runs, and the processes that belong to it.

Everything lives under ``.rehearsal/`` in the checkout, readable by its owner alone, because
throwaway keys are in it. A process is known by its id and its start time, so that a recycled id
is never taken for one of ours.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehearsal.progress import Progress, RehearsalError, wait_for

CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be mistaken: ``start`` is its start time in clock ticks since boot."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The identity of a running process; None for one that is gone or a zombie."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = stat.rpartition(")")[2].split()
        if fields[0] in "ZX":
            return None
        return cls(pid, int(fields[19]))

    def alive(self) -> bool:
        return ProcessId.of(self.pid) == self

    def send(self, number: int) -> bool:
        """Send a signal, unless the process is gone. Returns whether it was there."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive():
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    def end(self, *, grace: float = 5.0) -> None:
        """Ask the process to end, and kill it when it has not done so within ``grace`` seconds."""
        if not self.send(signal.SIGTERM):
            return
        try:
            wait_for(lambda: not self.alive(), timeout=grace, what=f"process {self.pid} to end")
        except RehearsalError:
            self.send(signal.SIGKILL)
            wait_for(lambda: not self.alive(), timeout=10, what=f"process {self.pid} to die")


def children(pid: int) -> tuple[int, ...]:
    """Process ids of the direct children of ``pid``."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text(encoding="ascii").split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return tuple(found)


class State:
    """The state folder of the rehearsal, by default ``.rehearsal/`` in the checkout."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or CHECKOUT / ".rehearsal").resolve()
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    # Well-known places ---------------------------------------------------------------------

    @property
    def machines(self) -> Path:
        """One folder per machine, named like it."""
        return self.folder("machines")

    @property
    def world_overlay(self) -> Path:
        """What the world is like, as fields of :class:`mailsite.model.World`."""
        return self.root / "world.yaml"

    @property
    def world(self) -> Path:
        """The outside world's own folder; received mail is under ``mail/<mx>/``."""
        return self.folder("world")

    @property
    def standins(self) -> Path:
        """Written by the stand-in providers: ``{"libvirt": port, ...}``."""
        return self.root / "standins.json"

    @property
    def operator_key(self) -> Path:
        """The operator's private ssh key (OpenSSH format); ``.pub`` beside it."""
        return self.root / "operator_key"

    @property
    def ca(self) -> Path:
        """The rehearsal's certificate authority: ``ca.pem`` and its key."""
        return self.folder("ca")

    @property
    def bare(self) -> Path:
        """A file named like a host here makes its next machine start from a bare Debian."""
        return self.folder("bare")

    def folder(self, *parts: str) -> Path:
        """A folder below the state folder, made when it is missing."""
        path = self.root.joinpath(*parts)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    # Files -----------------------------------------------------------------------------------

    def write(self, name: str, text: str, *, mode: int = 0o600, keep: bool = False) -> Path:
        """Write a file below the state folder as :func:`write_atomic` does."""
        path = self.root / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return write_atomic(path, text, mode=mode, keep=keep)

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; empty when the file is missing."""
        try:
            value = json.loads((self.root / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        if not isinstance(value, dict):
            raise RehearsalError(
                f"{self.root / name}: not what a rehearsal writes", "run: make down"
            )
        return value

    # Locks -----------------------------------------------------------------------------------

    @contextmanager
    def lock(self, name: str = "lock", progress: Progress | None = None) -> Iterator[None]:
        """Hold an exclusive lock; says so when another process has it and waits."""
        with locked(self.root / f".{name}", progress, f"another command holds {name}"):
            yield

    # Processes -------------------------------------------------------------------------------

    def record(self, name: str, pid: int) -> ProcessId:
        """Remember a process under ``name``, so that it can be found and ended later."""
        identity = ProcessId.of(pid)
        if identity is None:
            raise RehearsalError(f"{name} (process {pid}) ended at once")
        with self.lock("processes"):
            table = self.read_json("processes.json")
            table[name] = {"pid": identity.pid, "start": identity.start}
            self.write("processes.json", json.dumps(table, indent=1))
        return identity

    def forget(self, name: str) -> None:
        with self.lock("processes"):
            table = self.read_json("processes.json")
            if table.pop(name, None) is not None:
                self.write("processes.json", json.dumps(table, indent=1))

    def processes(self) -> dict[str, ProcessId]:
        """Every remembered process, running or not."""
        table = self.read_json("processes.json")
        return {n: ProcessId(int(e["pid"]), int(e["start"])) for n, e in table.items()}

    def process(self, name: str) -> ProcessId | None:
        """The remembered process if it still runs."""
        found = self.processes().get(name)
        return found if found is not None and found.alive() else None


def write_atomic(path: Path, text: str, *, mode: int = 0o600, keep: bool = False) -> Path:
    """Replace ``path`` in one step; no moment in which it is half there or readable by others.

    ``keep``: leave one that is there, which another thread may just have made.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(text)
        if keep:
            with suppress(FileExistsError):
                path.hardlink_to(temporary)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextmanager
def locked(path: Path, progress: Progress | None, waiting: str) -> Iterator[None]:
    """Hold an exclusive ``flock`` on ``path``; ``waiting`` is said when it is not free."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with progress.step(f"{waiting}; waiting for it") if progress else nullcontext():
                    fcntl.flock(handle, fcntl.LOCK_EX)
            # Whoever had the lock may have removed the file: then it protects nothing.
            if _is(handle, path):
                yield
                return
        finally:
            os.close(handle)


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
