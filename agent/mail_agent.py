#!/usr/bin/python3 -IB
"""Applies a configuration to the machine it runs on, and takes it back when it does not work.

A push hands over one JSON document of files, packages, checks, services and health checks. The
agent installs missing packages without starting them, builds maps and runs the daemons' own
checkers in a private mount namespace where the wanted files lie at their final paths. It stages
the files beside the live ones. Only then it switches, as a journalled series of renames, reloads
what changed, and asks whether the machine is healthy. Any failure brings back every file and
service as it was; that takes renames alone, so it works on a full disk.

One commit point: the rename to ``active.json``. A transaction that has not reached it is undone,
by the run itself, by systemd when the run was killed, by the next run, or at boot (``recover``).

Standard library only: it must run on a bare Debian. State is in /var/lib/mail-agent, for root
alone.

Exit codes: 0 active and healthy; 1 wrong use or an internal error; 2 the document is bad;
3 drift found; 4 refused by a checker, nothing changed; 5 unhealthy, taken back; 6 another run
holds the lock; 7 the lock-out timer had taken the change back, it is applied again, unconfirmed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import grp
import hashlib
import io
import json
import os
import pwd
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

FORMAT = 1
AGENT_PATH = "/usr/local/sbin/mail-agent"
LOCKOUT_UNIT = "mail-agent-lockout"
LOCKOUT_SECONDS = 90
REAPPLIED_LOCKOUT_SECONDS = 600
LOCK_SECONDS = 900
RUN_SECONDS = 3600
START_SECONDS = 60
RELOAD_SECONDS = 15
STEADY_SECONDS = 1.0
POLICY_RC_D = "/usr/sbin/policy-rc.d"
POLICY_ASIDE = "/usr/sbin/.policy-rc.d.before-mail-agent"
POLICY_TEXT = "#!/bin/sh\n# mail-agent: services stay down while packages are installed\nexit 101\n"
KEPT_RUNS = 10
JOURNAL_FORMAT = 1
NEW, OLD = "new", "old"

EXIT_ERROR, EXIT_BAD, EXIT_DRIFT, EXIT_REFUSED, EXIT_ROLLED_BACK, EXIT_LOCKED, EXIT_AGAIN = range(
    1, 8
)

_CLONE_NEWNS = 0x00020000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x1, 0x20, 0x1000, 0x4000, 0x40000


class AgentError(Exception):
    """A failure that the operator is told about. ``code`` is the exit code."""

    def __init__(self, message: str, code: int = EXIT_ERROR) -> None:
        super().__init__(message)
        self.code = code


class BadDocument(AgentError):
    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_BAD)


class Refused(AgentError):
    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_REFUSED)


class Unhealthy(AgentError):
    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_ROLLED_BACK)


# -- the machine ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


class System:
    """The machine as the agent uses it. Tests give another root and another ``run``."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.state = root / "var/lib/mail-agent"

    def live(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def run(self, command: Sequence[str], timeout: float = 600) -> Done:
        """Run a command. What it says goes to memory: neither a full disk nor a daemon that
        keeps its standard output open can hold it up."""
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
            "APT_LISTCHANGES_FRONTEND": "none",
            "NEEDRESTART_SUSPEND": "1",
            "UCF_FORCE_CONFFOLD": "1",
            # Every unit has a file of its own; to tell the old init scripts makes systemd read
            # all units three times over.
            "SYSTEMCTL_SKIP_SYSV": "1",
        }
        with memory_file() as out, memory_file() as err:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                return Done(127, "", f"{command[0]}: {error.strerror}")
            if not ended_within(process.pid, timeout):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return Done(124, read_all(out), f"{command[0]}: no answer after {timeout:.0f} s")
            code = process.wait()
            return Done(code, read_all(out), read_all(err))

    def ids(self, owner: str, group: str) -> tuple[int, int]:
        """Numeric owner and group.

        Raises:
            AgentError: no such user or group; packages that bring it are installed before.
        """
        try:
            return pwd.getpwnam(owner).pw_uid, grp.getgrnam(group).gr_gid
        except KeyError as error:
            raise AgentError(f"no such user or group: {owner}:{group}") from error

    def names(self, uid: int, gid: int) -> tuple[str, str]:
        try:
            owner = pwd.getpwuid(uid).pw_name
        except KeyError:
            owner = str(uid)
        try:
            group = grp.getgrgid(gid).gr_name
        except KeyError:
            group = str(gid)
        return owner, group


def memory_file() -> BinaryIO:
    return os.fdopen(os.memfd_create("mail-agent"), "w+b")


def read_all(stream: BinaryIO) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


def ended_within(pid: int, seconds: float) -> bool:
    """Wait for a child to end, without polling."""
    handle = os.pidfd_open(pid)
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def opened(root: Path, path: str) -> Iterator[tuple[int, str]]:
    """The folder of ``path`` below ``root``, as an open handle, and the last part of the path.

    Every step is a real folder: whoever may write to one on the way cannot lead the agent
    somewhere else with a symbolic link.

    Raises:
        AgentError: the path leads through a symbolic link.
        FileNotFoundError: the folder is missing.
    """
    *folders, name = path.strip("/").split("/")
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for number, part in enumerate(folders, start=1):
            try:
                deeper = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    way = "/".join(("", *folders[:number]))
                    raise AgentError(
                        f"{path} leads through {way}, a symbolic link or a file"
                    ) from error
                raise
            os.close(handle)
            handle = deeper
        yield handle, name
    finally:
        os.close(handle)


def beside(name: str, what: str) -> str:
    """Name of the staged (``NEW``) or kept (``OLD``) file beside the live one ``name``."""
    return f".{name}.mail-agent-{what}"


def remove(name: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def exists(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def write_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file so that after a crash it is there whole, or as it was."""
    fresh = path.with_name(f".{path.name}.mail-agent")
    fresh.unlink(missing_ok=True)
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fchmod(handle, mode)
        os.fsync(handle)
    fresh.replace(path)
    sync_folder(path.parent)


def age(file: int | Path) -> None:
    """Date a file back by two seconds.

    Until then every Postfix command waits before it reads its configuration, for somebody may still
    be writing it (dict_load_file_xt). What we put in place is whole.
    """
    before = time.time_ns() - 2 * 10**9
    os.utime(file, ns=(before, before))


def write_json(path: Path, content: object) -> None:
    write_file(path, json.dumps(content, indent=1, sort_keys=True).encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AgentError(
            f"{path} is damaged ({type(error).__name__}); when it is moved away, the next push"
            " takes the files over as they lie"
        ) from error


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -- documents --------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A wanted file. ``template`` tells where it comes from in the checkout."""

    content: bytes
    owner: str
    group: str
    mode: int
    template: str
    secret: bool = False

    def entry(self) -> dict[str, Any]:
        return {
            "sha256": digest(self.content),
            "owner": self.owner,
            "group": self.group,
            "mode": f"{self.mode:04o}",
            "template": self.template,
            "secret": self.secret,
        }


@dataclass(frozen=True)
class Service:
    unit: str
    reload_on: tuple[str, ...]
    restart_on: tuple[str, ...]
    order: int
    foreign: bool


@dataclass(frozen=True)
class Check:
    name: str
    command: tuple[str, ...]
    paths: tuple[str, ...]
    stderr_is_failure: bool


@dataclass(frozen=True)
class MapBuild:
    command: tuple[str, ...]
    source: str
    output: str


_PATH = re.compile(r"(/[^/\0]+)+")


def checked_path(path: object) -> str:
    if (
        not isinstance(path, str)
        or not _PATH.fullmatch(path)
        or any(part in (".", "..") for part in path.split("/"))
        or len(path.rsplit("/", 1)[-1].encode(errors="replace")) > 230
    ):
        raise BadDocument(f"{path!r} is no absolute path of a file")
    return path


def parse_files(document: Mapping[str, Any], secret: bool) -> dict[str, File]:
    """The files of a document.

    Raises:
        BadDocument: what is wrong, without a word of any content.
    """
    files: dict[str, File] = {}
    contents, attributes = document.get("files"), document.get("attributes")
    if not isinstance(contents, dict) or not isinstance(attributes, dict):
        raise BadDocument("the document has no files or no attributes")
    for path, content in contents.items():
        about = attributes.get(checked_path(path))
        if not isinstance(content, str) or not isinstance(about, dict):
            raise BadDocument(f"{path}: content or attributes are missing")
        try:
            mode = int(str(about["mode"]), 8)
            owner, group = str(about["owner"]), str(about["group"])
        except (KeyError, ValueError) as error:
            raise BadDocument(f"{path}: owner, group or mode is missing or wrong") from error
        if mode & ~0o777:
            raise BadDocument(f"{path}: mode {mode:o} has bits beyond permissions")
        if secret and mode & 0o007:
            raise BadDocument(f"{path}: a secret that others may read (mode {mode:04o})")
        try:
            encoded = content.encode()
        except UnicodeEncodeError:
            # Not chained: the error would carry the content.
            raise BadDocument(f"{path}: its content is no text") from None
        template = str(about.get("template", ""))
        files[path] = File(encoded, owner, group, mode, template, secret)
    return files


@dataclass(frozen=True)
class Bundle:
    """The public document of a push, parsed. ``digest`` is that of its text."""

    host: str
    digest: str
    files: Mapping[str, File]
    secret_paths: tuple[str, ...]
    packages: tuple[str, ...]
    maps: tuple[MapBuild, ...]
    checks: tuple[Check, ...]
    services: tuple[Service, ...]
    health: tuple[Mapping[str, Any], ...]
    guarded: tuple[str, ...]
    #: Whether the packages that are there stay, whatever those of the bundle conflict with.
    keep_packages: bool = False
    #: What services of the bundle write: not compared, and gone when it leaves the bundle.
    produced: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Bundle:
        """Read a document.

        Raises:
            BadDocument: it is not one of this format.
        """
        document = load_document(text)
        try:
            return cls(
                host=str(document["host"]),
                digest=digest(text.encode(errors="surrogatepass")),
                files=parse_files(document, secret=False),
                secret_paths=tuple(checked_path(p) for p in document["secret_paths"]),
                packages=tuple(str(p) for p in document["packages"]),
                maps=tuple(
                    MapBuild(
                        tuple(m["command"]), checked_path(m["source"]), checked_path(m["output"])
                    )
                    for m in document["maps"]
                ),
                checks=tuple(
                    Check(
                        str(c["name"]),
                        tuple(c["command"]),
                        tuple(c["paths"]),
                        bool(c["stderr_is_failure"]),
                    )
                    for c in document["checks"]
                ),
                services=tuple(
                    sorted(
                        (
                            Service(
                                str(s["unit"]),
                                tuple(s["reload_on"]),
                                tuple(s["restart_on"]),
                                int(s["order"]),
                                bool(s.get("foreign", False)),
                            )
                            for s in document["services"]
                        ),
                        key=lambda s: (s.order, s.unit),
                    )
                ),
                health=tuple(dict(h) for h in document["health"]),
                guarded=tuple(str(p) for p in document["guarded"]),
                keep_packages=bool(document.get("keep_packages", False)),
                produced=tuple(checked_path(p) for p in document.get("produced", ())),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadDocument(
                f"the document is not a host bundle: {type(error).__name__}: {error}"
            ) from error


def load_document(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise BadDocument(f"standard input is no JSON document: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BadDocument(f"the document is not of format {FORMAT}; the agent may be too old")
    return document


def under(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == p or path.startswith(p if p.endswith("/") else f"{p}/") for p in prefixes)


# -- live files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Live:
    """What lies at a path now: ``kind`` is ``none``, ``file`` or ``link``."""

    kind: str
    sha256: str = ""
    target: str = ""
    uid: int = 0
    gid: int = 0
    mode: int = 0


def look(path: Path) -> Live:
    """What lies at ``path``, without following a link.

    Raises:
        AgentError: a directory or a device lies there.
    """
    try:
        about = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return Live("none")
    if stat.S_ISLNK(about.st_mode):
        return Live("link", target=str(path.readlink()), uid=about.st_uid, gid=about.st_gid)
    if not stat.S_ISREG(about.st_mode):
        raise AgentError(f"{path} is no file; move it away, the platform has a file there")
    return Live(
        "file",
        sha256=digest(path.read_bytes()),
        uid=about.st_uid,
        gid=about.st_gid,
        mode=stat.S_IMODE(about.st_mode),
    )


# -- transactions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """One path that a transaction changes. ``new`` None: the file goes."""

    path: str
    before: Live
    new: Mapping[str, Any] | None


class Transaction:
    """A journalled change of files, in ``<state>/transaction``.

    The wanted file is staged beside the live one, and a second link keeps what lay there. The
    journal is on disk before the first of these; it says ``ready`` before the first rename that
    the machine can see. To undo takes renames alone: no space, no writing. Every step may be
    repeated, so undoing works from any point at which the machine died.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.folder = system.state / "transaction"

    @property
    def exists(self) -> bool:
        return (self.folder / "journal.json").exists()

    def journal(self) -> dict[str, Any]:
        journal: dict[str, Any] = read_json(self.folder / "journal.json")
        return journal

    # what is noted on the way

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the generation that this transaction brings."""
        manifest: dict[str, Any] = read_json(self.folder / "manifest.json")
        return manifest

    @property
    def pending(self) -> bool:
        """Whether the generation is in place, healthy, and waits to be confirmed."""
        return (self.folder / "pending").exists()

    def set_pending(self) -> None:
        write_file(self.folder / "pending", b"")

    def note(self, verb: str, unit: str) -> None:
        """Note what is about to be done to a unit, where there is something to take back."""
        if not self.exists:
            return
        with (self.folder / "touched").open("a", encoding="utf-8") as stream:
            stream.write(f"{verb} {unit}\n")
            stream.flush()
            os.fsync(stream.fileno())

    def touched(self) -> list[tuple[str, str]]:
        """Verbs and units, in the order in which they were noted."""
        path = self.folder / "touched"
        if not path.exists():
            return []
        rows = (line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines())
        return [(verb, unit) for verb, _, unit in rows if unit]

    # the change itself

    def prepare(
        self,
        identity: str,
        operations: Sequence[Operation],
        content: Mapping[str, bytes],
        services: Mapping[str, Any],
        manifest: Mapping[str, Any],
    ) -> None:
        """Write everything that is needed to switch and to undo. ``services``: their states.

        Raises:
            AgentError, OSError: it cannot be done. The live files are as they were.
        """
        self.discard()
        self.folder.mkdir(mode=0o700)
        # Another version of the agent may have to undo this; a lock-out timer runs it, too.
        write_file(self.folder / "mail-agent", Path(__file__).read_bytes(), 0o700)
        write_json(self.folder / "manifest.json", manifest)
        folders = sorted({f for o in operations if o.new for f in self._missing_folders(o.path)})
        journal = {
            "format": JOURNAL_FORMAT,
            "identity": identity,
            "ready": False,
            "operations": [
                {"path": o.path, "before": vars(o.before), "new": o.new} for o in operations
            ],
            "folders": folders,
            "mounts": sorted({self._mount_point(o.path) for o in operations}),
            "services": services,
        }
        write_json(self.folder / "journal.json", journal)
        sync_folder(self.system.state)
        for folder in folders:
            with opened(self.system.root, folder) as (parent, name):
                os.mkdir(name, 0o755, dir_fd=parent)
                os.fsync(parent)
        for operation in operations:
            self._stage(operation, content.get(operation.path, b""))
        self._sync(o.path for o in operations)
        write_json(self.folder / "journal.json", journal | {"ready": True})

    def _stage(self, operation: Operation, content: bytes) -> None:
        path = operation.path
        with opened(self.system.root, path) as (folder, name):
            new, old = beside(name, NEW), beside(name, OLD)
            remove(new, folder)
            remove(old, folder)
            if operation.before.kind != "none":
                try:
                    os.link(name, old, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
                except OSError as error:
                    raise AgentError(
                        f"{path} cannot be kept: {error.strerror}; is it a mount point, or has"
                        " it gone?"
                    ) from error
                if look(self.system.live(path).with_name(old)) != operation.before:
                    raise AgentError(f"{path} changed while the run was under way")
            if operation.new is not None:
                uid, gid = self.system.ids(operation.new["owner"], operation.new["group"])
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                with os.fdopen(os.open(new, flags, 0o600, dir_fd=folder), "wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fchown(stream.fileno(), uid, gid)
                    os.fchmod(stream.fileno(), int(operation.new["mode"], 8))
                    age(stream.fileno())
                    os.fsync(stream.fileno())

    def _sync(self, paths: Iterable[str]) -> None:
        """Bring the folders of ``paths`` to disk."""
        for folder in sorted({str(Path(path).parent) for path in paths}):
            with (
                contextlib.suppress(FileNotFoundError),
                opened(self.system.root, f"{folder.rstrip('/')}/.") as (handle, _),
            ):
                os.fsync(handle)

    def _missing_folders(self, path: str) -> Iterator[str]:
        folder = Path(path).parent
        while str(folder) != "/" and not self.system.live(str(folder)).exists():
            yield str(folder)
            folder = folder.parent

    def _mount_point(self, path: str) -> str:
        """The mount point, below the root, that the file is on."""
        folder = Path(path).parent
        while str(folder) != "/" and not self.system.live(str(folder)).is_mount():
            folder = folder.parent
        return str(folder)

    def switch(self) -> None:
        """Put the new files in place."""
        rows = self.journal()["operations"]
        for row in rows:
            with opened(self.system.root, row["path"]) as (folder, name):
                if row["new"] is None:
                    remove(name, folder)
                else:
                    os.rename(beside(name, NEW), name, src_dir_fd=folder, dst_dir_fd=folder)
        self._sync(row["path"] for row in rows)

    def undo(self) -> None:
        """Put back what lay there: content, owner, mode, links, and absence.

        Raises:
            AgentError, OSError: something cannot be put back; it may be tried again.
        """
        journal = self.journal()
        self._mount(journal["mounts"])
        for row in reversed(journal["operations"]):
            with contextlib.suppress(FileNotFoundError):
                self._put_back(row, journal["ready"])
        self._sync(row["path"] for row in journal["operations"])
        for folder in reversed(journal["folders"]):
            with contextlib.suppress(OSError):
                self.system.live(folder).rmdir()

    def _put_back(self, row: Mapping[str, Any], ready: bool) -> None:
        with opened(self.system.root, row["path"]) as (folder, name):
            new, old = beside(name, NEW), beside(name, OLD)
            switched = ready and not exists(new, folder)
            if switched and row["before"]["kind"] == "none":
                remove(name, folder)
            elif switched and exists(old, folder):
                # Where the live file is still the old one, this does nothing, and keeps both.
                os.rename(old, name, src_dir_fd=folder, dst_dir_fd=folder)
            remove(old, folder)
            remove(new, folder)

    def _mount(self, points: Sequence[str]) -> None:
        """Make sure of the file systems that hold the files: early at boot they may be missing."""
        for point in points:
            if point != "/" and not self.system.live(point).is_mount():
                done = self.system.run(["mount", point], timeout=60)
                if done.code != 0:
                    raise AgentError(f"{point} is not mounted: {done.err.strip()}")

    def finish(self) -> None:
        """Forget what lay there before, after the commit."""
        rows = self.journal()["operations"]
        for row in rows:
            with (
                contextlib.suppress(FileNotFoundError),
                opened(self.system.root, row["path"]) as (folder, name),
            ):
                remove(beside(name, OLD), folder)
                remove(beside(name, NEW), folder)
        self._sync(row["path"] for row in rows)
        self.discard()

    def abandon(self) -> None:
        """Remove what an attempt to prepare left."""
        if self.exists:
            self.undo()
        self.discard()

    def discard(self) -> None:
        """Forget the transaction, journal first: half a transaction must not look like one."""
        if not self.folder.exists():
            return
        (self.folder / "journal.json").unlink(missing_ok=True)
        sync_folder(self.folder)
        shutil.rmtree(self.folder)


# -- the store --------------------------------------------------------------------------------


class Store:
    """Everything that the agent keeps, under ``<state>``."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.folder = system.state
        self.transaction = Transaction(system)
        self.awaited = ""

    def ready(self) -> None:
        for folder in (self.folder, *(self.folder / n for n in ("incoming", "runs", "secrets"))):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)

    @contextlib.contextmanager
    def locked(self, say: Callable[[str], None], seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """Hold the host's lock.

        Raises:
            AgentError: another run held it all the time.
        """
        with (self.folder / "lock").open("w") as handle:
            deadline = time.monotonic() + seconds
            said = False
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise AgentError(
                            f"another run still holds {self.folder}/lock after {seconds:.0f} s;"
                            " see 'mail-agent status'",
                            EXIT_LOCKED,
                        ) from error
                    if not said:
                        say("waiting for another run on this host to end")
                        said = True
                    time.sleep(0.1)
            yield

    def active(self) -> dict[str, Any]:
        """The manifest of the active generation; empty before the first."""
        path = self.folder / "active.json"
        if not path.exists():
            return {"generation": 0, "files": {}, "services": [], "bundle": "", "secrets": ""}
        manifest: dict[str, Any] = read_json(path)
        return manifest

    @property
    def committed(self) -> bool:
        """Whether the transaction that lies there has reached its commit point."""
        return bool(self.active().get("transaction") == self.transaction.journal()["identity"])

    def pending(self) -> dict[str, Any] | None:
        """A generation that is in place and waits to be confirmed."""
        transaction = self.transaction
        if not transaction.exists or not transaction.pending or self.committed:
            return None
        return transaction.manifest

    def commit(self) -> None:
        """Make the transaction's generation the active one: the one commit point."""
        (self.transaction.folder / "manifest.json").rename(self.folder / "active.json")
        # From here on it must not be undone, not even for a disk that reports errors.
        with contextlib.suppress(OSError):
            sync_folder(self.folder)

    def complete(self) -> None:
        """What is left to do after the commit point."""
        self.transaction.finish()
        self.forget_secrets()

    def forget_secrets(self) -> None:
        """Remove staged secrets, but for the active generation's and those of this run."""
        kept = {str(self.active()["secrets"]), self.awaited}
        for path in (self.folder / "secrets").glob("*.json"):
            if path.stem not in kept:
                path.unlink()

    def secrets_path(self, label: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", label):
            raise BadDocument("the digest of the secrets is not 64 hexadecimal digits")
        return self.folder / "secrets" / f"{label}.json"

    def remember_push(self, text: str, label: str) -> None:
        """Keep the public part of a push: ``confirm`` may have to apply it again."""
        write_json(self.folder / "incoming" / "last.json", {"bundle": text, "secrets": label})

    def last_push(self) -> tuple[str, str]:
        path = self.folder / "incoming" / "last.json"
        if not path.exists():
            return "", ""
        last = read_json(path)
        return str(last["bundle"]), str(last["secrets"])

    def new_run(self) -> Path:
        """A folder for a run. Names sort by age, whatever the clock does."""
        runs = self.folder / "runs"
        while True:
            last = max((int(p.name, 16) for p in runs.iterdir()), default=0)
            folder = runs / f"{max(time.time_ns(), last + 1):016x}"
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                continue
            return folder

    def prune_runs(self) -> None:
        for old in sorted((self.folder / "runs").iterdir())[:-KEPT_RUNS]:
            unit = f"mail-agent-{old.name}.service"
            state = self.system.run(["systemctl", "is-active", unit]).out.strip()
            if (old / "result").exists() or state not in ("active", "activating"):
                shutil.rmtree(old, ignore_errors=True)


# -- validation -------------------------------------------------------------------------------


class Sandbox:
    """A private mount namespace in which wanted files lie at their final paths.

    Every file system but /proc, /sys and /dev lies below an overlay there, with its upper layer
    on a tmpfs, so whatever a checker writes (a pid file, a missing folder of a queue) goes with
    it. (The root of a machine may be an overlay itself, which cannot carry another's upper layer.)
    """

    KEPT = ("/proc", "/sys", "/dev")

    def __init__(self, system: System) -> None:
        self.system = system

    def run(
        self,
        files: Mapping[str, File],
        removed: Sequence[str],
        maps: Sequence[MapBuild],
        checks: Sequence[Check],
    ) -> dict[str, Any]:
        """Build ``maps`` and run ``checks`` over live files with ``files`` in place.

        Returns:
            ``{"outputs": {path: {content as latin-1, uid, gid, mode}}, "failed": {...} | None}``
        """
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                answer = self._inside(files, removed, maps, checks)
            except BaseException as error:
                words = str(error) if isinstance(error, AgentError) else told(error)
                answer = {"outputs": {}, "failed": {"name": "the sandbox", "words": words}}
            with os.fdopen(writer, "w") as stream:
                json.dump(answer, stream)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            text = stream.read()
        os.waitpid(child, 0)
        try:
            result: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise AgentError("the process that runs the checkers died") from error
        return result

    def _inside(
        self,
        files: Mapping[str, File],
        removed: Sequence[str],
        maps: Sequence[MapBuild],
        checks: Sequence[Check],
    ) -> dict[str, Any]:
        self._cover({path.split("/")[1] for path in files})
        for path in removed:
            Path(path).unlink(missing_ok=True)
        for path, file in files.items():
            place = Path(path)
            place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            uid, gid = self.system.ids(file.owner, file.group)
            write_file(place, file.content)
            age(place)
            os.chown(place, uid, gid)
            place.chmod(file.mode)
        outputs: dict[str, Any] = {}
        built: set[tuple[str, ...]] = set()
        for build in maps:
            if build.command not in built:
                built.add(build.command)
                done = self.system.run(build.command)
                if done.code != 0:
                    words = done.err.strip() or done.out.strip()
                    return {"outputs": {}, "failed": {"name": build.source, "words": words}}
            output = Path(build.output)
            if not output.is_file():
                words = f"{' '.join(build.command)}: made no {output}"
                return {"outputs": {}, "failed": {"name": build.source, "words": words}}
            about = output.stat()
            outputs[build.output] = {
                "content": output.read_bytes().decode("latin-1"),
                "uid": about.st_uid,
                "gid": about.st_gid,
                "mode": stat.S_IMODE(about.st_mode),
            }
        for check in checks:
            done = self.system.run(check.command, timeout=120)
            # Many print the whole configuration to standard output.
            words = done.err.strip() or done.out.strip()
            if done.code != 0 or (check.stderr_is_failure and done.err.strip()):
                return {"outputs": outputs, "failed": {"name": check.name, "words": words}}
        return {"outputs": outputs, "failed": None}

    def _cover(self, tops: Set[str]) -> None:
        """Enter the namespace. ``tops``: top-level folders that files are going to be under."""
        libc = ctypes.CDLL(None, use_errno=True)

        def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
            words = [None if x is None else os.fsencode(x) for x in (source, target, kind, data)]
            if libc.mount(words[0], words[1], words[2], flags, words[3]) != 0:
                number = ctypes.get_errno()
                raise OSError(number, f"mount {target}: {os.strerror(number)}")

        base = self.system.state / "sandbox"
        base.mkdir(mode=0o700, exist_ok=True)
        for top in tops:
            Path("/", top).mkdir(exist_ok=True)
        if libc.unshare(_CLONE_NEWNS) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"unshare: {os.strerror(number)}")
        mount("none", "/", None, _MS_REC | _MS_PRIVATE)
        places = {f"/{p.name}" for p in Path("/").iterdir() if p.is_dir() and not p.is_symlink()}
        places |= {point for point in mount_points() if point != "/"}
        mount("tmpfs", str(base), "tmpfs", 0, "mode=0700")
        # From here on by relative paths: base itself is going to be covered.
        os.chdir(base)
        Path("old").mkdir()
        mount("/", "old", None, _MS_BIND | _MS_REC)
        for number, place in enumerate(sorted(places)):
            if under(place, (*self.KEPT, str(base))):
                continue
            try:
                self._cover_place(mount, place, number)
            except OSError:
                # What is mounted below the top can be missed: an empty folder lies there then.
                if place.count("/") == 1:
                    raise
        os.chdir("/")

    @staticmethod
    def _cover_place(mount: Callable[..., None], place: str, number: int) -> None:
        old = f"old{place}"
        if Path(old).is_dir():
            upper, work = f"u{number}", f"w{number}"
            Path(upper).mkdir()
            Path(work).mkdir()
            shutil.copystat(old, upper)
            about = Path(old).stat()
            os.chown(upper, about.st_uid, about.st_gid)
            lower = re.sub(r"([\\:,])", r"\\\1", old)
            layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
            try:
                mount("overlay", place, "overlay", 0, layers)
            except OSError:
                # Not every file system can be a lower layer; then at least read-only.
                pass
            else:
                return
        mount(old, place, None, _MS_BIND)
        mount("none", place, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY)


_REMOTE = re.compile(r"nfs|cifs|smb|fuse|autofs|9p|ceph")


def mount_points() -> set[str]:
    """Where something is mounted in this mount namespace, but for what may hang when looked at."""

    def plain(word: str) -> str:
        return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), word)

    table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    return {
        plain(line.split()[4])
        for line in table.splitlines()
        if not _REMOTE.match(line.partition(" - ")[2])
    }


def told(error: BaseException) -> str:
    """An unexpected error in words; never its repr, which may hold what was being worked on."""
    return f"{type(error).__name__}: {error}"


_LINE = r"[:,]?\s+(?:on\s+|at\s+)?line\s+(\d+)"
_PLACE = rf"(?:{_LINE}|:(\d+)(?::\d+(?:-\d+)?)?)"
_MOST_LINES = 20


def explain(words: str, files: Mapping[str, File], paths: Sequence[str] = ()) -> list[str]:
    """A checker's words as ``path:line: words (template)``, where they concern one of our files.

    ``paths``: what the checker reads. Where its words name a setting or a value and no line, the
    line is looked for there. What is said twice is told once.
    """
    spoken = [line.strip() for line in words.splitlines() if line.strip()]
    lines = list(dict.fromkeys(_explain(line, files, paths) for line in spoken))
    left = len(lines) - _MOST_LINES
    return lines if left <= 0 else [*lines[:_MOST_LINES], f"and {left} lines more"]


def _explain(line: str, files: Mapping[str, File], paths: Sequence[str]) -> str:
    path = next((p for p in sorted(files, key=len, reverse=True) if _names(line, p)), None)
    number: str | None = None
    if path is None:
        readable = [p for p in files if under(p, paths) and not files[p].secret]
        path, number = _find(line, {p: files[p].content for p in readable}, certain=True)
    else:
        named = re.escape(path)
        found = re.search(named + _PLACE, line) or re.search(_LINE, line)
        number = next(filter(None, found.groups()), None) if found else None
        if number is None and not files[path].secret:
            _, number = _find(line, {path: files[path].content}, certain=False)
    if path is None:
        return line
    where = f"{path}:{number}" if number else path
    said = re.sub(rf"^{re.escape(path)}(?:{_PLACE})?[:,]?\s*", "", line) or line
    template = f" (template {files[path].template})" if files[path].template else ""
    return f"{where}: {said}{template}"


def _names(line: str, path: str) -> bool:
    """Whether a path, and not a longer one, is in a line."""
    return re.search(rf"(?<![\w./-]){re.escape(path)}(?![\w/-]|\.\w)", line) is not None


def _find(
    words: str, contents: Mapping[str, bytes], certain: bool
) -> tuple[str, str] | tuple[None, None]:
    """The file and line that a checker means when it repeats a part of it.

    ``certain``: nothing but a setting or something in quotes tells which file it is.
    """
    quoted = re.findall(r"\"([^\"]+)\"|'([^']+)'", words)
    settings = re.findall(r"\b[A-Za-z0-9]+_\w+", words)
    settings += re.findall(r"(?:parameter|setting|option): +(\w+)", words)
    others = [] if certain else [x for x in re.split(r"[\s,;]+", words) if re.search(r"[/:]\w", x)]
    rows = [
        (path, number, " ".join(row.split()))
        for path, content in contents.items()
        for number, row in enumerate(content.decode(errors="replace").splitlines(), start=1)
        if row.strip() and not row.lstrip().startswith(("#", ";", "//"))
    ]
    for setting in settings:
        found = [x for x in rows if re.match(rf"(-o )?{re.escape(setting)}\b", x[2])]
        if found:
            # Of two, the last one counts.
            return found[-1][0], str(found[-1][1])
    for part in (*(one or other for one, other in quoted), *settings, *others):
        text = re.escape(" ".join(part.rstrip(":").split()))
        found = [x for x in rows if re.search(rf"(?<![\w.]){text}(?![\w])", x[2])]
        if len(found) == 1:
            return found[0][0], str(found[0][1])
    return None, None


def fragments(content: bytes) -> set[str]:
    """What of a secret file must not be repeated: its lines, and the long words in them."""
    text = content.decode(errors="replace")
    lines = {line.strip() for line in text.splitlines()}
    words = {word for line in lines for word in re.split(r"[\s:=\"';]+", line)}
    return {x for x in lines if len(x) >= 8} | {x for x in words if len(x) >= 16}


# -- packages ---------------------------------------------------------------------------------


class Packages:
    def __init__(self, system: System, say: Callable[[str], None]) -> None:
        self.system = system
        self.say = say

    def missing(self, wanted: Sequence[str]) -> list[str]:
        done = self.system.run(
            ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package}\n", *wanted]
        )
        installed = {
            line.split()[1] for line in done.out.splitlines() if line.startswith("installed ")
        }
        return [name for name in wanted if name not in installed]

    def install(self, wanted: Sequence[str], keep: bool = False) -> None:
        """Install what is missing, with service start blocked.

        Args:
            wanted: names of packages.
            keep: Refuse where something that is there would have to go.

        Raises:
            AgentError: apt failed; its last words are in the message. Or something has to stay.
        """
        missing = self.missing(wanted) if wanted else []
        if not missing:
            return
        self.say(f"installing {' '.join(missing)}")
        apt = [
            "apt-get", "-q", "-y",
            "-o", "DPkg::Lock::Timeout=300",
            "-o", "Acquire::Retries=2",
            "-o", "Acquire::http::Timeout=30",
            "-o", "Acquire::https::Timeout=30",
            "-o", "Dpkg::Options::=--force-confdef",
            "-o", "Dpkg::Options::=--force-confold",
        ]  # fmt: skip
        with self._services_blocked():
            install = [*apt, "--no-install-recommends", "install", *missing]
            updated = self.system.run([*apt, "update"])
            if keep:
                self._refuse_to_remove(missing, install)
            done = self.system.run(install, timeout=1500)
            if done.code != 0:
                tail = (done.err + done.out + updated.err).strip().splitlines()[-12:]
                raise AgentError(
                    f"apt-get could not install {' '.join(missing)}:\n  " + "\n  ".join(tail)
                )

    def _refuse_to_remove(self, missing: Sequence[str], install: Sequence[str]) -> None:
        """Ask apt what it would remove.

        Raises:
            AgentError: something that is not the platform's.
        """
        lines = self.system.run([*install, "--simulate"]).out.splitlines()
        gone = [line.split()[1] for line in lines if line.startswith("Remv ")]
        if gone:
            raise AgentError(
                f"{' '.join(missing)} would take the place of {' '.join(gone)}, which this machine"
                " had before: write 'mta: replace' for this host in topology.yaml to let it go, or"
                " 'mta: operator' to leave the machine's mail alone"
            )

    @contextlib.contextmanager
    def _services_blocked(self) -> Iterator[None]:
        policy, aside = self.system.live(POLICY_RC_D), self.system.live(POLICY_ASIDE)
        if policy.exists():
            policy.rename(aside)
        write_file(policy, POLICY_TEXT.encode(), 0o755)
        try:
            yield
        finally:
            self._lift()

    def _lift(self) -> None:
        policy, aside = self.system.live(POLICY_RC_D), self.system.live(POLICY_ASIDE)
        if aside.exists():
            aside.replace(policy)
        else:
            policy.unlink(missing_ok=True)

    def clean(self) -> None:
        """Finish what a killed run left: packages half configured, service start blocked."""
        policy = self.system.live(POLICY_RC_D)
        if policy.exists() and policy.read_bytes() == POLICY_TEXT.encode():
            self.system.run(["dpkg", "--configure", "-a", "--force-confold"], timeout=1500)
            self._lift()
        elif self.system.live(POLICY_ASIDE).exists():
            self._lift()


# -- services ---------------------------------------------------------------------------------


@dataclass
class Touched:
    """What was done to services, so that it can be undone."""

    reloaded: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)


_UNIT_FOLDERS = ("/etc/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd")
_RUNNING = ("active", "reloading", "activating", "refreshing")


class Services:
    """The units of a bundle. ``note`` is told of each step before it is taken."""

    def __init__(
        self, system: System, say: Callable[[str], None], note: Callable[[str, str], None]
    ) -> None:
        self.system = system
        self.say = say
        self.note = note

    def states(self, units: Sequence[str]) -> dict[str, dict[str, str]]:
        """Load, activity and enablement of ``units``."""
        if not units:
            return {}
        names = "LoadState,ActiveState,UnitFileState,CanReload,NRestarts"
        done = self.system.run(["systemctl", "show", "--property", names, "--", *units])
        blocks = done.out.strip("\n").split("\n\n")
        if done.code != 0 or len(blocks) != len(units):
            raise AgentError(f"systemctl show: {done.err.strip() or 'no answer'}")
        found: dict[str, dict[str, str]] = {}
        for unit, block in zip(units, blocks, strict=True):
            row = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            found[unit] = {
                "load": row.get("LoadState", ""),
                "active": row.get("ActiveState", ""),
                "enabled": row.get("UnitFileState", ""),
                "can_reload": row.get("CanReload", ""),
                "restarts": row.get("NRestarts", "0"),
            }
        return found

    def retire(self, units: Sequence[str]) -> None:
        """Stop and disable units that are no longer part of the host, while their files exist.

        Raises:
            Unhealthy: systemd could not.
        """
        for unit, state in self.states(units).items():
            if state["load"] == "not-found":
                continue
            self.say(f"stopping {unit}: no longer part of this host")
            self.note("retire", unit)
            if state["enabled"] == "enabled":
                self._systemctl("disable", "--quiet", unit)
            self._systemctl("stop", unit, seconds=START_SECONDS)

    def reread(self, changed: Sequence[str]) -> None:
        """Let systemd read its units again, where they changed.

        Raises:
            Unhealthy: systemd could not.
        """
        if any(under(path, _UNIT_FOLDERS) for path in changed):
            self._systemctl("daemon-reload")

    def hand_back(self, units: Sequence[str]) -> None:
        """Let units that stay the operator's go on without our files.

        Raises:
            Unhealthy: systemd could not.
        """
        for unit, state in self.states(units).items():
            if state["active"] in _RUNNING:
                self._act("reload" if state["can_reload"] == "yes" else "restart", unit, [])

    def bring(self, services: Sequence[Service], changed: Sequence[str]) -> Touched:
        """Start, reload or restart what ``changed`` paths call for.

        Raises:
            Unhealthy: systemd could not.
        """
        touched = Touched()
        states = self._enable([s.unit for s in services], changed)
        for service in services:
            unit, state = service.unit, states[service.unit]
            if state["active"] not in _RUNNING:
                self.system.run(["systemctl", "reset-failed", unit])
                self._act("start", unit, touched.started)
            elif any(under(path, service.restart_on) for path in changed):
                self._act("restart", unit, touched.restarted)
            elif any(under(path, service.reload_on) for path in changed):
                if state["can_reload"] == "yes":
                    self._act("reload", unit, touched.reloaded)
                else:
                    self._act("restart", unit, touched.restarted)
        return touched

    def _enable(
        self, units: Sequence[str], changed: Sequence[str]
    ) -> Mapping[str, Mapping[str, str]]:
        """Have systemd start ``units`` at boot. Returns their states.

        All at once: systemd reads every unit again after each change of what is enabled.
        """
        states = self.states(units)
        masked = [unit for unit in units if states[unit]["load"] == "masked"]
        for unit in masked:
            self.note("unmask", unit)
            self._systemctl("unmask", "--quiet", unit)
        states |= self.states(masked)
        fresh = [unit for unit in units if states[unit]["enabled"] in ("disabled", "")]
        for unit in fresh:
            self.note("enable", unit)
        again = [
            unit
            for unit in units
            if states[unit]["enabled"] == "enabled" and f"/etc/systemd/system/{unit}" in changed
        ]
        for verb, named in (("enable", fresh), ("reenable", again)):
            if named:
                self._systemctl(verb, "--quiet", "--no-reload", *named)
        if fresh or again:
            self._systemctl("daemon-reload")
        return states

    def _act(self, verb: str, unit: str, acted: list[str]) -> None:
        self.say(f"{verb} {unit}")
        self.note(verb, unit)
        acted.append(unit)
        self._systemctl(verb, unit, seconds=START_SECONDS if verb == "start" else RELOAD_SECONDS)

    def _systemctl(self, *arguments: str, seconds: float = 60) -> None:
        done = self.system.run(["systemctl", *arguments], timeout=seconds)
        if done.code != 0:
            words = [f"systemctl {' '.join(arguments)}: {done.err.strip() or done.code}"]
            if arguments[-1].endswith((".service", ".mount", ".socket")):
                log = self.system.run(
                    ["journalctl", "--unit", arguments[-1], "--lines=12", "--output=cat", "-q"]
                )
                words += [f"  {line}" for line in log.out.strip().splitlines()]
            raise Unhealthy("\n".join(words))

    # taking back

    def withdraw(
        self,
        before: Mapping[str, Mapping[str, str]],
        touched: Sequence[tuple[str, str]],
        boot: bool = False,
    ) -> None:
        """Stop and disable what was started and enabled, while its files still exist."""
        for verb, unit in reversed(touched):
            was = before.get(unit)
            if was is None:
                continue
            if verb == "start" and was["active"] not in _RUNNING and not boot:
                self._stop(unit)
            elif verb == "enable":
                self.system.run(["systemctl", "disable", "--quiet", unit])
                if boot:
                    # Its start is queued already.
                    self.system.run(["systemctl", "stop", "--no-block", unit])

    def restore(
        self,
        before: Mapping[str, Mapping[str, str]],
        touched: Sequence[tuple[str, str]],
        boot: bool = False,
    ) -> list[str]:
        """Bring units back to the states ``before``, under restored files. Returns what failed.

        Only units that were touched, or are no longer active, are acted upon. At ``boot`` what
        is enabled is started by systemd, later.
        """
        failed: list[str] = []
        self.system.run(["systemctl", "daemon-reload"], timeout=60)
        done = {unit: {verb for verb, about in touched if about == unit} for unit in before}
        for unit, was in before.items():
            if "unmask" in done[unit] and was["load"] == "masked":
                self.system.run(["systemctl", "mask", "--quiet", unit])
            if "retire" in done[unit] and was["enabled"] == "enabled":
                self.system.run(["systemctl", "enable", "--quiet", unit])
        if boot:
            return failed
        states = self.states(list(before))
        for unit, was in before.items():
            running = states[unit]["active"] == "active"
            acted = done[unit] & {"start", "reload", "restart", "retire"}
            if was["active"] not in _RUNNING or (running and not acted):
                continue
            self.system.run(["systemctl", "reset-failed", unit])
            answer = Done(1, "", "")
            if running and acted == {"reload"} and was["can_reload"] == "yes":
                answer = self.system.run(["systemctl", "reload", unit], timeout=RELOAD_SECONDS)
            if answer.code != 0:
                answer = self._restart(unit)
            if answer.code != 0:
                failed.append(f"{unit}: {answer.err.strip()}")
        return failed

    def _stop(self, unit: str) -> None:
        if self.system.run(["systemctl", "stop", unit], timeout=RELOAD_SECONDS).code == 124:
            self.system.run(["systemctl", "kill", "--signal=SIGKILL", unit])
            self.system.run(["systemctl", "stop", unit], timeout=RELOAD_SECONDS)

    def _restart(self, unit: str) -> Done:
        """Restart a unit, even one that hangs while it starts or stops."""
        done = self.system.run(["systemctl", "restart", unit], timeout=RELOAD_SECONDS)
        if done.code == 124:
            self.system.run(["systemctl", "kill", "--signal=SIGKILL", unit])
            done = self.system.run(["systemctl", "restart", unit], timeout=START_SECONDS)
        return done


class Health:
    """Asks until everything answers, each within its own time."""

    def __init__(self, system: System) -> None:
        self.system = system

    def wait(
        self, wanted: Sequence[Mapping[str, Any]], services: Services, steady: float = 0.0
    ) -> None:
        """Return when all of ``wanted`` hold, and still hold ``steady`` seconds from now.

        Raises:
            Unhealthy: something does not; the message says what was seen last.
        """
        units = [str(h["unit"]) for h in wanted if h["kind"] == "unit"]
        restarts = {u: s["restarts"] for u, s in services.states(units).items()}
        start = time.monotonic()
        problems = self._problems(wanted, start)
        if not problems and steady:
            # A daemon that dies of its configuration may answer once before it does.
            time.sleep(max(0.0, start + steady - time.monotonic()))
            problems = self._problems(wanted, start)
        for unit, state in services.states(units).items():
            if state["active"] != "active" or state["restarts"] != restarts[unit]:
                problems.append(f"{unit} does not stay up ({state['active']})")
        if problems:
            raise Unhealthy("\n".join(dict.fromkeys(problems)))

    def _problems(self, wanted: Sequence[Mapping[str, Any]], start: float) -> list[str]:
        """Ask until all hold; each has its own time from ``start`` on. What does not, in words."""
        problems: list[str] = []
        for health in wanted:
            deadline = start + float(health.get("timeout", 10))
            pause = 0.02
            while (seen := self.ask(health, deadline - time.monotonic())) is not None:
                # What systemd has given up does not come back by waiting, nor does what says so.
                given_up = (
                    seen.endswith(("is failed", "is inactive"))
                    if health["kind"] == "unit"
                    else health["kind"] == "command" and f": exit {os.EX_UNAVAILABLE}: " in seen
                )
                if given_up or time.monotonic() >= deadline:
                    problems.append(seen)
                    break
                time.sleep(pause)
                pause = min(0.25, pause * 1.5)
        return problems

    def ask(self, health: Mapping[str, Any], seconds: float = 5.0) -> str | None:
        """None if it holds, else what was seen. It may take ``seconds``, and at least one."""
        seconds = max(1.0, seconds)
        match health["kind"]:
            case "tcp":
                return self._tcp(health, min(5.0, seconds))
            case "unit":
                done = self.system.run(["systemctl", "is-active", str(health["unit"])])
                if done.out.strip() != "active":
                    return f"{health['unit']} is {done.out.strip() or 'not there'}"
                return None
            case "command":
                command = [str(word) for word in health["command"]]
                done = self.system.run(command, timeout=seconds)
                if done.code != 0:
                    words = (done.err or done.out).strip()
                    return f"{' '.join(command)}: exit {done.code}: {words}"
                return None
        return f"unknown health check {health['kind']!r}"

    def _tcp(self, health: Mapping[str, Any], seconds: float) -> str | None:
        address, port, expect = str(health["address"]), int(health["port"]), str(health["expect"])
        try:
            with socket.create_connection((address, port), timeout=seconds) as connection:
                seen = b""
                while len(seen) < len(expect.encode()) and b"\n" not in seen:
                    chunk = connection.recv(512)
                    if not chunk:
                        break
                    seen += chunk
        except OSError as error:
            return f"{address} port {port}: {error.strerror or error}"
        if not seen.startswith(expect.encode()):
            banner = seen.decode(errors="replace").strip()
            return f"{address} port {port} says {banner!r} instead of {expect!r}"
        return None


# -- the run ----------------------------------------------------------------------------------


class Agent:
    """One machine's agent. ``say`` takes the lines that the operator follows."""

    def __init__(
        self,
        system: System,
        say: Callable[[str], None],
        sandbox: Sandbox | None = None,
        arm: Callable[[str, int], None] | None = None,
    ) -> None:
        self.system = system
        self.store = Store(system)
        self.packages = Packages(system, self.say)
        self.services = Services(system, self.say, self.store.transaction.note)
        self.health = Health(system)
        self.sandbox = sandbox or Sandbox(system)
        self._arm = arm or self._arm_timer
        self._say = say
        self._hidden: list[str] = []

    def say(self, line: str) -> None:
        """Tell the operator. Never fails: nobody may listen, and the disk may be full."""
        with contextlib.suppress(OSError, ValueError):
            self._say(self.veil(line))

    def veil(self, words: str) -> str:
        """Words of a daemon or a checker, without what it repeats of a secret file."""
        for secret in self._hidden:
            words = words.replace(secret, "***")
        return words

    def _hide(self, files: Mapping[str, File]) -> None:
        found = {x for file in files.values() if file.secret for x in fragments(file.content)}
        self._hidden = sorted(found, key=len, reverse=True)

    # secrets

    def stage_secrets(self, text: str) -> str:
        """Keep a secret document under its label, inactive. Returns the label."""
        document = load_document(text)
        label = str(document.get("digest", ""))
        path = self.store.secrets_path(label)
        parse_files(document, secret=True)
        write_file(path, text.encode())
        return label

    def _secret_files(self, bundle: Bundle, label: str) -> dict[str, File]:
        if not label:
            if bundle.secret_paths:
                raise BadDocument(f"{bundle.host} needs secrets; name them with --secrets")
            return {}
        path = self.store.secrets_path(label)
        if not path.exists():
            raise BadDocument(
                f"no secrets are staged under {label[:12]}; run the host's -secrets push again"
            )
        document = load_document(path.read_text(encoding="utf-8"))
        if document.get("host") != bundle.host:
            raise BadDocument(f"the secrets under {label[:12]} are of another host")
        files = parse_files(document, secret=True)
        if sorted(files) != sorted(bundle.secret_paths):
            raise BadDocument(f"the secrets under {label[:12]} are not those that the files expect")
        return files

    # apply

    def apply(self, text: str, label: str, lockout: int = LOCKOUT_SECONDS) -> str:
        """Make a bundle active. Returns the closing line.

        Raises:
            AgentError: it was refused or taken back; the machine is as it was.
        """
        bundle = Bundle.parse(text)
        self.store.awaited = label
        self.settle(confirm=True)
        wanted = dict(bundle.files) | self._secret_files(bundle, label)
        self._hide(wanted)
        self.packages.install(bundle.packages, bundle.keep_packages)
        active = self.store.active()
        derived = {build.output for build in bundle.maps}
        changed, gone = self._compare(wanted, active, derived | set(bundle.produced))
        maps = [b for b in bundle.maps if b.source in changed or self._stale(b.output, active)]
        manifest = self._manifest(bundle, label, wanted, active)
        units = [s.unit for s in bundle.services]
        lost = [unit for unit in active["services"] if unit not in units]
        foreign = [unit for unit in lost if unit in active.get("foreign", ())]
        if not changed and not gone and not maps and not lost:
            return self._unchanged(bundle, manifest, active)
        outputs = self._validate(bundle, wanted, changed, gone, maps)
        content, operations = self._operations(wanted, changed, gone, outputs)
        manifest["files"] |= {
            path: entry | {"derived": True} for path, (entry, _) in outputs.items()
        }
        for path in derived - set(outputs):
            manifest["files"][path] = active["files"][path]
        identity = manifest["transaction"] = secrets.token_hex(8)
        paths = [operation.path for operation in operations]
        guarded = any(under(path, bundle.guarded) for path in paths)
        try:
            states = self.services.states([*units, *lost])
            self.store.transaction.prepare(identity, operations, content, states, manifest)
            for path in paths:
                self.say(f"{'removing' if path in gone else 'writing'} {path}")
            self.services.retire([unit for unit in lost if unit not in foreign])
            self.store.transaction.switch()
            self.services.reread(paths)
            self.services.hand_back(foreign)
            touched = self.services.bring(bundle.services, paths)
            restarted = len(touched.restarted) + len(touched.started)
            # A reload takes effect after systemctl has answered.
            steady = STEADY_SECONDS if restarted or touched.reloaded else 0.0
            self.health.wait(bundle.health, self.services, steady)
            if guarded:
                self._arm(identity, lockout)
                self.store.transaction.set_pending()
            else:
                self.store.commit()
        except Exception as error:
            self._take_back(error)
        if not guarded:
            self.store.complete()
        else:
            self.say(f"confirm: {identity}")
            self.say(f"taken back in {lockout} s unless a new connection confirms it")
        return (
            f"applied generation {manifest['generation']}: {len(paths)} files changed,"
            f" {len(touched.reloaded)} services reloaded, {restarted} restarted"
        )

    def _stale(self, output: str, active: Mapping[str, Any]) -> bool:
        """Whether a map has to be built although its source is as it was."""
        entry = active["files"].get(output)
        return entry is None or not self._matches(output, entry)

    def _compare(
        self, wanted: Mapping[str, File], active: Mapping[str, Any], others: set[str]
    ) -> tuple[list[str], list[str]]:
        """Paths that differ from what lies there, and paths that left the bundle.

        ``others``: what maps are built to and services write; it belongs to the bundle.
        """
        changed = []
        for path, file in sorted(wanted.items()):
            if not self._matches(path, file.entry()):
                changed.append(path)
                entry = active["files"].get(path)
                if entry is not None and entry == file.entry():
                    self.say(f"{path} was changed by hand; it is put right")
        gone = [
            path
            for path in sorted({*active["files"], *active.get("produced", ())})
            if path not in wanted
            and path not in others
            and look(self.system.live(path)).kind != "none"
        ]
        return changed, gone

    def _matches(self, path: str, entry: Mapping[str, Any]) -> bool:
        live = look(self.system.live(path))
        if live.kind != "file" or live.sha256 != entry["sha256"]:
            return False
        owner, group = self.system.names(live.uid, live.gid)
        return (owner, group, f"{live.mode:04o}") == (entry["owner"], entry["group"], entry["mode"])

    def _manifest(
        self, bundle: Bundle, label: str, wanted: Mapping[str, File], active: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {
            "host": bundle.host,
            "generation": active["generation"] + 1,
            "bundle": bundle.digest,
            "secrets": label,
            "files": {path: file.entry() for path, file in wanted.items()},
            "services": [s.unit for s in bundle.services],
            "foreign": [s.unit for s in bundle.services if s.foreign],
            "produced": bundle.produced,
        }

    def _unchanged(
        self, bundle: Bundle, manifest: dict[str, Any], active: Mapping[str, Any]
    ) -> str:
        touched = self.services.bring(bundle.services, ())
        self.health.wait(bundle.health, self.services, STEADY_SECONDS if touched.started else 0.0)
        if (active["bundle"], active["secrets"]) != (bundle.digest, manifest["secrets"]):
            # The same files, said in other words: remember the words.
            derived = {p: e for p, e in active["files"].items() if e.get("derived")}
            manifest["files"] = derived | manifest["files"]
            write_json(self.store.folder / "active.json", manifest)
            self.store.forget_secrets()
        if touched.started:
            return f"unchanged; started {' '.join(touched.started)}, which had stopped"
        return "unchanged"

    def _validate(
        self,
        bundle: Bundle,
        wanted: Mapping[str, File],
        changed: Sequence[str],
        gone: Sequence[str],
        maps: Sequence[MapBuild],
    ) -> dict[str, tuple[dict[str, Any], bytes]]:
        """Run the checkers that the change concerns. Returns the built maps."""
        concerned = (*changed, *gone, *(build.output for build in maps))
        checks = [c for c in bundle.checks if any(under(p, c.paths) for p in concerned)]
        if checks:
            self.say(f"checking with {', '.join(check.name for check in checks)}")
        elif not maps:
            return {}
        for path in (*changed, *gone):
            with contextlib.suppress(FileNotFoundError), opened(self.system.root, path):
                pass
        staged = {path: wanted[path] for path in changed}
        answer = self.sandbox.run(staged, gone, maps, checks)
        failed = answer["failed"]
        if failed is not None:
            paths = next((c.paths for c in checks if c.name == failed["name"]), ())
            lines = explain(str(failed["words"]), wanted, paths)
            raise Refused("\n".join([f"{failed['name']} refuses the change:", *lines]))
        outputs = {}
        for path, built in answer["outputs"].items():
            content = built["content"].encode("latin-1")
            owner, group = self.system.names(built["uid"], built["gid"])
            sources = [wanted.get(build.source) for build in maps if build.output == path]
            secret = any(source is not None and source.secret for source in sources)
            if secret and built["mode"] & 0o007:
                raise Refused(f"{path} is made from secrets, and others might read it")
            entry = File(content, owner, group, built["mode"], "", secret).entry()
            outputs[path] = (entry, content)
        return outputs

    def _operations(
        self,
        wanted: Mapping[str, File],
        changed: Sequence[str],
        gone: Sequence[str],
        outputs: Mapping[str, tuple[dict[str, Any], bytes]],
    ) -> tuple[dict[str, bytes], list[Operation]]:
        entries: dict[str, dict[str, Any] | None] = {p: wanted[p].entry() for p in changed}
        content = {path: wanted[path].content for path in changed}
        for path, (entry, built) in outputs.items():
            if not self._matches(path, entry):
                entries[path] = entry
                content[path] = built
        entries |= dict.fromkeys(gone)
        return content, [
            Operation(path, look(self.system.live(path)), entry) for path, entry in entries.items()
        ]

    def _take_back(self, error: Exception) -> NoReturn:
        words = str(error) if isinstance(error, AgentError) else told(error)
        transaction = self.store.transaction
        if not transaction.exists or not transaction.journal()["ready"]:
            code = error.code if isinstance(error, AgentError) else EXIT_ERROR
            transaction.abandon()
            raise AgentError(f"{words}\nnothing was changed", code) from error
        code = error.code if isinstance(error, AgentError) else EXIT_ROLLED_BACK
        self.say("taking the change back")
        try:
            failed = self._undo()
        except Exception as second:
            words += f"\nit could not be taken back: {told(second)}"
            raise AgentError(f"{words}\nmend that, then run 'mail-agent recover'", code) from error
        if failed:
            words += "\nafter taking it back: " + "; ".join(failed)
        raise AgentError(f"{words}\nthe previous generation is back in place", code) from error

    def _undo(self, boot: bool = False) -> list[str]:
        """Bring files and services back. Returns services that could not be brought back."""
        transaction = self.store.transaction
        journal = transaction.journal()
        failed: list[str] = []
        if journal["ready"]:
            touched = transaction.touched()
            self.services.withdraw(journal["services"], touched, boot)
            transaction.undo()
            failed = self.services.restore(journal["services"], touched, boot)
        else:
            transaction.undo()
        transaction.discard()
        return failed

    # settling what earlier runs left

    def settle(self, confirm: bool = False, boot: bool = False) -> str | None:
        """Bring an earlier transaction to its end. Returns what was done.

        ``confirm``: a generation that waits to be confirmed is confirmed; a new run is asked for
        over a new connection, which proves that the host can be reached. Otherwise it goes on
        waiting, except at boot: its timer is gone, so it is undone.
        """
        if not boot:
            self.packages.clean()
        transaction = self.store.transaction
        if not transaction.exists:
            transaction.discard()
            return None
        journal = transaction.journal()
        if journal.get("format") != JOURNAL_FORMAT:
            return self._settle_otherwise(boot)
        if self.store.committed:
            self.store.complete()
            return "completed an interrupted change"
        pending = self.store.pending()
        if pending is not None and confirm:
            return self.confirm_pending(pending)
        if pending is not None and not boot:
            return (
                f"generation {pending['generation']} waits to be confirmed; 'mail-agent confirm'"
                " keeps it, else it is taken back soon"
            )
        failed = self._undo(boot)
        words = "undid an interrupted change"
        self.say(words + (": " + "; ".join(failed) if failed else ""))
        return words

    def _settle_otherwise(self, boot: bool) -> str:
        """Let the agent that began the transaction end it."""
        agent = self.store.transaction.folder / "mail-agent"
        command = [sys.executable, "-IB", str(agent), "_settle", *(["--boot"] if boot else [])]
        done = self.system.run(command)
        if done.code != 0:
            raise AgentError(
                f"another version's change cannot be ended: {done.err.strip() or done.out.strip()}"
            )
        return done.out.strip()

    def confirm_pending(self, pending: Mapping[str, Any]) -> str:
        self.store.commit()
        self.store.complete()
        self._disarm(str(pending["transaction"]))
        words = f"confirmed generation {pending['generation']}"
        self.say(words)
        return words

    def lock_out(self, identity: str) -> None:
        """The timer ran out: bring the previous generation back."""
        transaction = self.store.transaction
        if (
            not transaction.exists
            or transaction.journal()["identity"] != identity
            or self.store.committed
        ):
            return
        self.say("no new connection confirmed the change; taking it back")
        for line in self._undo():
            self.say(line)

    def _arm_timer(self, identity: str, seconds: int) -> None:
        # The agent itself may be one of the files that are taken back.
        agent = self.store.transaction.folder / "mail-agent"
        done = self.system.run(
            [
                "systemd-run", "--quiet", "--collect", f"--unit={LOCKOUT_UNIT}-{identity}",
                f"--on-active={seconds}", "--timer-property=AccuracySec=1s",
                "--property=Type=oneshot", "--property=Restart=on-failure",
                "--property=RestartSec=5",
                "--description=Take an unconfirmed change back",
                "--property=SyslogIdentifier=mail-agent",
                sys.executable, "-IB", str(agent), "_lockout", identity,
            ]
        )  # fmt: skip
        if done.code != 0:
            raise Unhealthy(f"the lock-out timer did not start: {done.err.strip()}")

    def _disarm(self, identity: str) -> None:
        unit = f"{LOCKOUT_UNIT}-{identity}"
        self.system.run(["systemctl", "stop", f"{unit}.timer", f"{unit}.service"])

    # looking

    def drift(self) -> list[str]:
        """Paths where the host differs from its active generation, each with what differs."""
        manifest = self.store.pending() or self.store.active()
        found = []
        for path, entry in sorted(manifest["files"].items()):
            try:
                live = look(self.system.live(path))
            except AgentError:
                found.append(f"{path}: replaced by something that is no file")
                continue
            if live.kind == "none":
                found.append(f"{path}: missing")
            elif live.kind == "link":
                found.append(f"{path}: replaced by a link to {live.target}")
            else:
                if live.sha256 != entry["sha256"]:
                    found.append(f"{path}: content changed")
                owner, group = self.system.names(live.uid, live.gid)
                seen, wanted = (
                    f"{owner}:{group} {live.mode:04o}",
                    f"{entry['owner']}:{entry['group']} {entry['mode']}",
                )
                if seen != wanted:
                    found.append(f"{path}: {seen} instead of {wanted}")
        for unit, state in self.services.states(manifest["services"]).items():
            if state["active"] != "active":
                found.append(f"{unit}: {state['active']} instead of active")
            if state["enabled"] in ("disabled", "masked"):
                found.append(f"{unit}: {state['enabled']}, does not start at boot")
        return found

    def status(self) -> dict[str, Any]:
        active, pending = self.store.active(), self.store.pending()
        return {
            "generation": active["generation"],
            "bundle": active["bundle"],
            "secrets": str(active["secrets"])[:12],
            "files": sorted(active["files"]),
            "services": active["services"],
            "pending": None if pending is None else pending["generation"],
            "interrupted": self.store.transaction.exists and pending is None,
        }


# -- command line -----------------------------------------------------------------------------


def follow(system: System, store: Store, text: str, label: str, lockout: int) -> int:
    """Run ``apply`` as a unit of its own and print its log until it ends."""
    bundle = Bundle.parse(text)
    folder = store.new_run()
    write_file(folder / "bundle.json", text.encode())
    write_file(folder / "log", b"")
    program = Path(__file__).resolve()
    offered = bundle.files.get(AGENT_PATH)
    if offered is not None and offered.content != program.read_bytes():
        program = folder / "mail-agent"
        write_file(program, offered.content, 0o700)
        tested = system.run([sys.executable, "-IB", str(program), "--self-test"], timeout=30)
        if tested.code != 0:
            shutil.rmtree(folder)
            words = (tested.err or tested.out).strip()
            raise Refused(f"{AGENT_PATH}: the new agent fails its own test: {words}")
    unit = f"mail-agent-{folder.name}"
    # When the run is killed, this undoes what it left.
    ended = f"test ! -e {store.transaction.folder} || {sys.executable} -IB {program} _ended"
    started = system.run(
        [
            "systemd-run", "--quiet", "--collect", f"--unit={unit}", "--service-type=exec",
            "--property=KillMode=mixed", f"--property=RuntimeMaxSec={RUN_SECONDS}",
            "--description=Apply a configuration of the mail platform",
            "--property=SyslogIdentifier=mail-agent",
            f"--property=ExecStopPost=/bin/sh -c '{ended}'",
            sys.executable, "-IB", str(program), "_run", folder.name, label or "-", str(lockout),
        ]
    )  # fmt: skip
    if started.code != 0:
        raise AgentError(f"systemd-run: {started.err.strip()}")
    code = watch(system, folder, unit)
    if code is None:
        # systemd has called the agent to undo it, but that may have been killed along with it.
        agent = Agent(system, print)
        with store.locked(agent.say):
            settled = agent.settle() or "nothing is left of it"
        raise AgentError(f"the run was killed; {settled}; see the journal of {unit}")
    return code


def watch(system: System, folder: Path, unit: str) -> int | None:
    """Print a run's log until it ends. Returns its exit code, None when it was killed."""
    asked = time.monotonic()
    died = False
    with (folder / "log").open(encoding="utf-8", errors="replace") as log:
        while True:
            ended = (folder / "result").exists()
            sys.stdout.write(log.read())
            sys.stdout.flush()
            if ended:
                return int(read_json(folder / "result")["code"])
            if died:
                return None
            if time.monotonic() - asked > 1:
                state = system.run(["systemctl", "is-active", f"{unit}.service"]).out.strip()
                died = state not in ("active", "activating", "deactivating")
                asked = time.monotonic()
            else:
                time.sleep(0.03)


def run_unit(system: System, identity: str, label: str, lockout: int) -> int:
    """What the transient unit does: apply, and leave log and result behind."""
    store = Store(system)
    folder = store.folder / "runs" / identity
    with (folder / "log").open("a", encoding="utf-8", buffering=1) as log:

        def say(line: str) -> None:
            log.write(line + "\n")
            print(line, flush=True)

        agent = Agent(system, say)
        code = EXIT_ERROR
        try:
            with store.locked(agent.say):
                text = (folder / "bundle.json").read_text(encoding="utf-8")
                label = "" if label == "-" else label
                store.remember_push(text, label)
                store.prune_runs()
                agent.say(agent.apply(text, label, lockout))
            code = 0
        except AgentError as error:
            code = error.code
            for line in str(error).splitlines():
                agent.say(f"mail-agent: {line}")
        except OSError as error:
            agent.say(f"mail-agent: {error}")
        except Exception:
            agent.say("mail-agent: internal error")
            for line in traceback.format_exc(limit=-4).splitlines():
                agent.say(f"mail-agent: {line}")
        finally:
            (folder / "bundle.json").unlink(missing_ok=True)
            write_json(folder / "result", {"code": code})
    return code


def confirm(system: System, store: Store, expected: str, label: str) -> int:
    """Confirm what is pending.

    ``expected`` is the digest of the bundle that should be active, ``label`` that of its secrets.
    """
    agent = Agent(system, print)
    with store.locked(print):
        pending = store.pending()
        if pending is not None:
            agent.confirm_pending(pending)
        active = store.active()
    if not expected or (active["bundle"], active["secrets"]) == (expected, label):
        if pending is None:
            print("nothing to confirm")
        return 0
    text, pushed = store.last_push()
    if (digest(text.encode()), pushed) != (expected, label):
        raise AgentError(
            "the configuration to confirm is not the active one, and its push is gone;"
            " push it again: pulumi up --target-replace with this host's -config resource"
        )
    code = follow(system, store, text, label, REAPPLIED_LOCKOUT_SECONDS)
    if code != 0:
        return code
    print(
        "mail-agent: this change had been taken back, because no new connection confirmed it."
        f" It is applied again for {REAPPLIED_LOCKOUT_SECONDS} s: run 'pulumi up' again to"
        " confirm it"
    )
    return EXIT_AGAIN


def self_test() -> int:
    """Enough to tell that this file runs on this machine."""
    text = json.dumps(
        {
            "format": FORMAT, "host": "test", "files": {}, "attributes": {}, "secret_paths": [],
            "packages": [], "maps": [], "checks": [], "services": [], "health": [], "guarded": [],
        }
    )  # fmt: skip
    Bundle.parse(text)
    print("ok")
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mail-agent",
        description="Apply a configuration of the mail platform to this machine.",
        epilog="exit codes: 0 done; 2 bad document; 3 drift; 4 refused by a checker, nothing"
        " changed; 5 unhealthy, taken back; 6 locked; 7 applied again, unconfirmed",
    )
    top.add_argument("--self-test", action="store_true", help="tell whether this agent runs here")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("stage-secrets", help="keep secrets from standard input, inactive")
    apply = commands.add_parser("apply", help="make the bundle on standard input active")
    apply.add_argument("--secrets", default="", metavar="DIGEST", help="staged secrets to activate")
    apply.add_argument(
        "--lockout",
        type=int,
        default=LOCKOUT_SECONDS,
        metavar="SECONDS",
        help="time to confirm a guarded change in (default: %(default)s)",
    )
    agree = commands.add_parser("confirm", help="disarm the lock-out timer of a guarded change")
    agree.add_argument("token", nargs="?", default="")
    agree.add_argument("--secrets", default="", metavar="DIGEST", help="secrets to be active")
    commands.add_parser("drift", help="list what differs from the active generation")
    commands.add_parser("status", help="show the active generation, as JSON")
    recover = commands.add_parser("recover", help="undo or complete an interrupted change")
    recover.add_argument("--boot", action="store_true", help="leave services to systemd")
    return top


def stdin_text() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise AgentError("a document is expected on standard input")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise BadDocument("standard input is not UTF-8") from None


def inner(system: System, command: str, arguments: Sequence[str]) -> int | None:
    """The commands that the agent gives itself. None: it is none of these."""
    store = Store(system)
    match command:
        case "_run":
            return run_unit(system, arguments[0], arguments[1], int(arguments[2]))
        case "_lockout":
            agent = Agent(system, print)
            with store.locked(agent.say):
                agent.lock_out(arguments[0])
            return 0
        case "_ended":
            try:
                with store.locked(print, seconds=0):
                    print(Agent(system, print).settle() or "")
            except AgentError as error:
                if error.code != EXIT_LOCKED:
                    raise
                # The next run has begun, and has settled this one's matters.
            return 0
        case "_settle":
            print(Agent(system, print).settle(boot="--boot" in arguments))
            return 0
    return None


def main(arguments: Sequence[str]) -> int:
    os.umask(0o022)
    # Secrets are in memory.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    system = System()
    if arguments and (code := inner(system, arguments[0], arguments[1:])) is not None:
        return code
    options = parser().parse_args(arguments)
    if options.self_test:
        return self_test()
    if options.command is None:
        parser().print_help()
        return EXIT_ERROR
    if os.geteuid() != 0:
        raise AgentError("this needs root: sudo mail-agent ...")
    store = Store(system)
    store.ready()
    agent = Agent(system, print)
    match options.command:
        case "stage-secrets":
            text = stdin_text()
            with store.locked(agent.say):
                print(f"staged {agent.stage_secrets(text)[:12]}")
            return 0
        case "apply":
            return follow(system, store, stdin_text(), options.secrets, max(1, options.lockout))
        case "confirm":
            if not options.token:
                tty = sys.stdin is None or sys.stdin.isatty()
                expected = "" if tty else stdin_text().strip()
                return confirm(system, store, expected, options.secrets)
            pending = store.pending()
            if pending is None or pending["transaction"] != options.token:
                raise AgentError(f"{options.token} is not what waits to be confirmed")
            return confirm(system, store, "", "")
        case "drift":
            with store.locked(agent.say):
                found = agent.drift()
            print("\n".join(found) if found else "no drift")
            return EXIT_DRIFT if found else 0
        case "status":
            print(json.dumps(agent.status(), indent=1))
            return 0
        case "recover":
            with store.locked(agent.say):
                print(agent.settle(boot=options.boot) or "nothing to recover")
            return 0
    return EXIT_ERROR


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        sys.exit(main(sys.argv[1:]))
    except AgentError as problem:
        for problem_line in str(problem).splitlines():
            print(f"mail-agent: {problem_line}", file=sys.stderr)
        sys.exit(problem.code)
    except OSError as problem:
        print(f"mail-agent: {problem}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
