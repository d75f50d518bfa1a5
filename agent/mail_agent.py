#!/usr/bin/env python3
"""Applies a configuration to the machine it runs on, and takes it back when it does not work.

A push hands over one JSON document of files, packages, checks, services and health checks. The
agent stages the files, installs missing packages without starting them, builds maps and runs the
daemons' own checkers in a private mount namespace where the staged files lie at their final
paths. Only then it switches, as a journalled series of renames, reloads what changed, and asks
whether the machine is healthy. Any failure brings back every file and service as it was.

One commit point: the rename of ``active.json``. A transaction that has not reached it is undone,
by the run itself, by the next run, or at boot (``recover``).

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
import fcntl
import grp
import hashlib
import json
import os
import pwd
import re
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

FORMAT = 1
AGENT_PATH = "/usr/local/sbin/mail-agent"
LOCKOUT_UNIT = "mail-agent-lockout"
LOCKOUT_SECONDS = 90
REAPPLIED_LOCKOUT_SECONDS = 600
LOCK_SECONDS = 900
POLICY_RC_D = "/usr/sbin/policy-rc.d"
POLICY_TEXT = "#!/bin/sh\n# mail-agent: services stay down while packages are installed\nexit 101\n"
KEPT_RUNS = 10

EXIT_ERROR, EXIT_BAD, EXIT_DRIFT, EXIT_REFUSED, EXIT_ROLLED_BACK, EXIT_LOCKED, EXIT_AGAIN = range(
    1, 8
)

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


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
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
        }
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                env=environment,
                check=False,
            )
        except FileNotFoundError:
            return Done(127, "", f"{command[0]}: no such command")
        except subprocess.TimeoutExpired:
            return Done(124, "", f"{command[0]}: no answer after {timeout:.0f} s")
        return Done(done.returncode, done.stdout, done.stderr)

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

    def give(self, path: Path, uid: int, gid: int) -> None:
        os.chown(path, uid, gid, follow_symlinks=False)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file so that after a crash it is there whole, or as it was."""
    fresh = path.with_name(f".{path.name}.mail-agent")
    fresh.unlink(missing_ok=True)
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.chmod(mode)
    fresh.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, content: object) -> None:
    write_file(path, json.dumps(content, indent=1, sort_keys=True).encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


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
    ):
        raise BadDocument(f"{path!r} is no absolute path of a file")
    return path


def parse_files(document: Mapping[str, Any], secret: bool) -> dict[str, File]:
    files: dict[str, File] = {}
    attributes = document.get("attributes", {})
    for path, content in document.get("files", {}).items():
        about = attributes.get(path)
        if not isinstance(content, str) or not isinstance(about, dict):
            raise BadDocument(f"{path}: content or attributes are missing")
        mode = int(str(about["mode"]), 8)
        if mode & ~0o777:
            raise BadDocument(f"{path}: mode {mode:o} has bits beyond permissions")
        if secret and mode & 0o007:
            raise BadDocument(f"{path}: a secret that others may read (mode {mode:04o})")
        files[checked_path(path)] = File(
            content.encode(),
            str(about["owner"]),
            str(about["group"]),
            mode,
            str(about.get("template", "")),
            secret,
        )
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
                digest=digest(text.encode()),
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
                            )
                            for s in document["services"]
                        ),
                        key=lambda s: (s.order, s.unit),
                    )
                ),
                health=tuple(dict(h) for h in document["health"]),
                guarded=tuple(str(p) for p in document["guarded"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadDocument(f"the document is not a host bundle: {error!r}") from error


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


def refuse_links(system: System, path: str) -> None:
    """Refuse a path that leads through a symbolic link: files would land somewhere else."""
    folder = system.root
    for part in path.strip("/").split("/")[:-1]:
        folder = folder / part
        if folder.is_symlink():
            raise AgentError(f"{path} leads through {folder}, a symbolic link")


# -- transactions -----------------------------------------------------------------------------


@dataclass
class Operation:
    """One path that a transaction changes. ``new`` None: the file goes."""

    path: str
    before: Live
    new: dict[str, Any] | None
    index: int


class Transaction:
    """A journalled change of files, in ``<state>/transaction``.

    ``new/<i>`` holds the wanted content of operation i and ``old/<i>`` what lay there. The
    journal is complete on disk before the first rename. Every step may be repeated, so undoing
    works from any point at which the machine died.
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

    def prepare(
        self,
        identity: str,
        operations: Sequence[Operation],
        content: Mapping[str, bytes],
        services: Mapping[str, Any],
    ) -> None:
        """Write everything that is needed to switch and to undo. ``services``: their states."""
        self.discard()
        for name in ("new", "old"):
            (self.folder / name).mkdir(mode=0o700, parents=True)
        self.folder.chmod(0o700)
        made: list[str] = []
        rows = []
        for operation in operations:
            if operation.before.kind == "file":
                old = self.system.live(operation.path).read_bytes()
                if digest(old) != operation.before.sha256:
                    raise AgentError(f"{operation.path} changed while the run was under way")
                write_file(self.folder / "old" / str(operation.index), old)
            if operation.new is not None:
                write_file(self.folder / "new" / str(operation.index), content[operation.path])
                made += self._missing_folders(operation.path)
            rows.append(
                {
                    "path": operation.path,
                    "index": operation.index,
                    "before": vars(operation.before),
                    "new": operation.new,
                }
            )
        write_json(
            self.folder / "journal.json",
            {
                "identity": identity,
                "operations": rows,
                "folders": sorted(set(made)),
                "services": services,
            },
        )
        sync_folder(self.system.state)

    def _missing_folders(self, path: str) -> list[str]:
        missing = []
        folder = Path(path).parent
        while str(folder) != "/" and not self.system.live(str(folder)).exists():
            missing.append(str(folder))
            folder = folder.parent
        return missing

    def note_services(self, services: Mapping[str, Any]) -> None:
        """Add what is known of services, before anything is done to them."""
        journal = self.journal()
        journal["services"] = services
        write_json(self.folder / "journal.json", journal)

    def switch(self) -> None:
        """Put the new files in place."""
        journal = self.journal()
        for folder in journal["folders"]:
            path = self.system.live(folder)
            path.mkdir(mode=0o755, exist_ok=True)
            path.chmod(0o755)
        for row in journal["operations"]:
            live = self.system.live(row["path"])
            if row["new"] is None:
                live.unlink(missing_ok=True)
                if live.parent.is_dir():
                    sync_folder(live.parent)
                continue
            uid, gid = self.system.ids(row["new"]["owner"], row["new"]["group"])
            content = (self.folder / "new" / str(row["index"])).read_bytes()
            self._put(live, content, uid, gid, int(row["new"]["mode"], 8))

    def undo(self) -> None:
        """Put back what lay there: content, owner, mode, links, and absence."""
        journal = self.journal()
        for row in reversed(journal["operations"]):
            live = self.system.live(row["path"])
            fresh = live.with_name(f".{live.name}.mail-agent")
            fresh.unlink(missing_ok=True)
            before = Live(**row["before"])
            if before.kind == "none":
                live.unlink(missing_ok=True)
            elif before.kind == "link":
                fresh.symlink_to(before.target)
                self.system.give(fresh, before.uid, before.gid)
                fresh.replace(live)
            else:
                content = (self.folder / "old" / str(row["index"])).read_bytes()
                self._put(live, content, before.uid, before.gid, before.mode)
            if live.parent.is_dir():
                sync_folder(live.parent)
        for folder in sorted(journal["folders"], reverse=True):
            with contextlib.suppress(OSError):
                self.system.live(folder).rmdir()

    def _put(self, live: Path, content: bytes, uid: int, gid: int, mode: int) -> None:
        fresh = live.with_name(f".{live.name}.mail-agent")
        fresh.unlink(missing_ok=True)
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            self.system.give(fresh, uid, gid)
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        fresh.replace(live)
        sync_folder(live.parent)

    def discard(self) -> None:
        """Forget the transaction, journal first: half a transaction must not look like one."""
        (self.folder / "journal.json").unlink(missing_ok=True)
        if self.folder.exists():
            sync_folder(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)


# -- the store --------------------------------------------------------------------------------


class Store:
    """Everything that the agent keeps, under ``<state>``."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.folder = system.state
        self.transaction = Transaction(system)

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

    def pending(self) -> dict[str, Any] | None:
        """A generation that is in place and waits to be confirmed."""
        path = self.folder / "pending.json"
        if not path.exists() or not self.transaction.exists:
            return None
        pending: dict[str, Any] = read_json(path)
        return pending

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Make ``manifest`` the active generation: the one commit point."""
        write_json(self.folder / "active.json", manifest)
        (self.folder / "pending.json").unlink(missing_ok=True)
        self.transaction.discard()
        self._prune_secrets(str(manifest["secrets"]))

    def secrets_path(self, label: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", label):
            raise BadDocument("the digest of the secrets is not 64 hexadecimal digits")
        return self.folder / "secrets" / f"{label}.json"

    def _prune_secrets(self, kept: str) -> None:
        for path in (self.folder / "secrets").glob("*.json"):
            if path.stem != kept:
                path.unlink()


# -- validation -------------------------------------------------------------------------------


class Sandbox:
    """A private mount namespace in which wanted files lie at their final paths.

    Overlays on the top directories, with their upper layers on a tmpfs: the root of a machine
    may be an overlay itself, which cannot carry another's upper layer.
    """

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
                answer = {"outputs": {}, "failed": {"name": "sandbox", "words": repr(error)}}
            with os.fdopen(writer, "w") as stream:
                json.dump(answer, stream)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            text = stream.read()
        os.waitpid(child, 0)
        if not text:
            raise AgentError("the checkers' process died")
        result: dict[str, Any] = json.loads(text)
        return result

    def _inside(
        self,
        files: Mapping[str, File],
        removed: Sequence[str],
        maps: Sequence[MapBuild],
        checks: Sequence[Check],
    ) -> dict[str, Any]:
        libc = ctypes.CDLL(None, use_errno=True)

        def mount(source: str, target: str, kind: str | None, flags: int, data: str) -> None:
            encoded = [x.encode() if x else None for x in (source, target, kind, data)]
            if libc.mount(encoded[0], encoded[1], encoded[2], flags, encoded[3]) != 0:
                number = ctypes.get_errno()
                raise OSError(number, f"mount {target}: {os.strerror(number)}")

        if libc.unshare(_CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        mount("none", "/", None, _MS_REC | _MS_PRIVATE, "")
        base = self.system.state / "sandbox"
        base.mkdir(mode=0o700, exist_ok=True)
        mount("tmpfs", str(base), "tmpfs", 0, "mode=0700")
        for number, top in enumerate(sorted({p.split("/")[1] for p in (*files, *removed)})):
            upper, work = base / f"u{number}", base / f"w{number}"
            upper.mkdir(mode=0o755)
            work.mkdir()
            (self.system.root / top).mkdir(exist_ok=True)
            shutil.copystat(self.system.root / top, upper)
            mount(
                "overlay",
                f"/{top}",
                "overlay",
                0,
                f"lowerdir=/{top},upperdir={upper},workdir={work}",
            )
        for path in removed:
            Path(path).unlink(missing_ok=True)
        for path, file in files.items():
            place = Path(path)
            place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            uid, gid = self.system.ids(file.owner, file.group)
            write_file(place, file.content, file.mode)
            os.chown(place, uid, gid)
        outputs: dict[str, Any] = {}
        built: set[tuple[str, ...]] = set()
        for build in maps:
            if build.command not in built:
                built.add(build.command)
                done = self.system.run(build.command)
                if done.code != 0:
                    return {
                        "outputs": {},
                        "failed": {"name": build.source, "words": done.err + done.out},
                    }
            output = Path(build.output)
            about = output.stat()
            outputs[build.output] = {
                "content": output.read_bytes().decode("latin-1"),
                "uid": about.st_uid,
                "gid": about.st_gid,
                "mode": stat.S_IMODE(about.st_mode),
            }
        for check in checks:
            done = self.system.run(check.command, timeout=120)
            words = (done.err.strip() + "\n" + done.out.strip()).strip()
            if done.code != 0 or (check.stderr_is_failure and done.err.strip()):
                return {"outputs": outputs, "failed": {"name": check.name, "words": words}}
        return {"outputs": outputs, "failed": None}


def explain(words: str, files: Mapping[str, File]) -> list[str]:
    """A checker's words as ``path:line: words (template)``, where they name one of our files."""
    told = []
    for line in filter(None, (x.strip() for x in words.splitlines())):
        for path in sorted(files, key=len, reverse=True):
            if path not in line:
                continue
            found = re.search(re.escape(path) + r"(?:[:,]?\s*(?:line|on line)?\s*(\d+))?", line)
            number = found.group(1) if found else None
            if number is None and not files[path].secret:
                number = _line_of(line, files[path].content)
            where = f"{path}:{number}" if number else path
            template = f" (template {files[path].template})" if files[path].template else ""
            told.append(f"{where}: {line}{template}")
            break
        else:
            told.append(line)
    return told


def _line_of(words: str, content: bytes) -> str | None:
    """The line of a parameter that a checker names without its line, as postconf does."""
    named = re.search(r"parameter[: ]+\"?([A-Za-z0-9_]+)", words)
    if named is None:
        return None
    for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
        if re.match(rf"\s*(-o\s+)?{re.escape(named.group(1))}\s*=", line):
            return str(number)
    return None


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

    def install(self, wanted: Sequence[str]) -> None:
        """Install what is missing, with service start blocked.

        Raises:
            AgentError: apt failed; its last words are in the message.
        """
        missing = self.missing(wanted) if wanted else []
        if not missing:
            return
        self.say(f"installing {' '.join(missing)}")
        apt = [
            "apt-get", "-q", "-y",
            "-o", "DPkg::Lock::Timeout=300",
            "-o", "Dpkg::Options::=--force-confdef",
            "-o", "Dpkg::Options::=--force-confold",
        ]  # fmt: skip
        with self._services_blocked():
            install = [*apt, "--no-install-recommends", "install", *missing]
            updated = self.system.run([*apt, "update"])
            done = self.system.run(install, timeout=1500)
            if done.code != 0:
                tail = (done.err + done.out + updated.err).strip().splitlines()[-12:]
                raise AgentError(
                    f"apt-get could not install {' '.join(missing)}:\n  " + "\n  ".join(tail)
                )

    @contextlib.contextmanager
    def _services_blocked(self) -> Iterator[None]:
        policy = self.system.live(POLICY_RC_D)
        theirs = policy.exists()
        if not theirs:
            policy.parent.mkdir(parents=True, exist_ok=True)
            write_file(policy, POLICY_TEXT.encode(), 0o755)
        try:
            yield
        finally:
            if not theirs:
                policy.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove a block that a killed run left behind."""
        policy = self.system.live(POLICY_RC_D)
        if policy.exists() and policy.read_bytes() == POLICY_TEXT.encode():
            policy.unlink()
            # A killed dpkg leaves packages half configured.
            self.system.run(["dpkg", "--configure", "-a", "--force-confold"])


# -- services ---------------------------------------------------------------------------------


@dataclass
class Touched:
    """What was done to services, so that it can be undone."""

    reloaded: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)


class Services:
    def __init__(self, system: System, say: Callable[[str], None]) -> None:
        self.system = system
        self.say = say

    def states(self, units: Sequence[str]) -> dict[str, dict[str, str]]:
        """Load, activity and enablement of ``units``."""
        if not units:
            return {}
        names = "Id,LoadState,ActiveState,UnitFileState,CanReload,NRestarts"
        found: dict[str, dict[str, str]] = {}
        for unit in units:
            done = self.system.run(["systemctl", "show", "--property", names, unit])
            row = dict(line.split("=", 1) for line in done.out.splitlines() if "=" in line)
            found[unit] = {
                "load": row.get("LoadState", ""),
                "active": row.get("ActiveState", ""),
                "enabled": row.get("UnitFileState", ""),
                "can_reload": row.get("CanReload", ""),
                "restarts": row.get("NRestarts", "0"),
            }
        return found

    def bring(
        self, services: Sequence[Service], changed: Sequence[str], gone: Sequence[str]
    ) -> Touched:
        """Start, reload or restart what ``changed`` paths call for; stop units in ``gone``.

        Raises:
            Unhealthy: systemd could not.
        """
        touched = Touched()
        if any(under(p, ("/etc/systemd", "/usr/local/lib/systemd")) for p in changed):
            self._systemctl("daemon-reload")
        for unit in gone:
            self.say(f"stopping {unit}: no longer part of this host")
            self._systemctl("disable", "--now", unit)
        states = self.states([s.unit for s in services])
        for service in services:
            state = states[service.unit]
            if state["load"] == "masked":
                self._systemctl("unmask", service.unit)
            if state["enabled"] in ("disabled", ""):
                self._systemctl("enable", "--quiet", service.unit)
            if state["active"] not in ("active", "reloading", "activating"):
                self.system.run(["systemctl", "reset-failed", service.unit])
                self._act("start", service.unit, touched.started)
            elif any(under(p, service.restart_on) for p in changed):
                self._act("restart", service.unit, touched.restarted)
            elif any(under(p, service.reload_on) for p in changed):
                if state["can_reload"] == "yes":
                    self._act("reload", service.unit, touched.reloaded)
                else:
                    self._act("restart", service.unit, touched.restarted)
        return touched

    def _act(self, verb: str, unit: str, noted: list[str]) -> None:
        self.say(f"{verb} {unit}")
        noted.append(unit)
        self._systemctl(verb, unit)

    def _systemctl(self, *arguments: str) -> None:
        done = self.system.run(["systemctl", *arguments], timeout=120)
        if done.code != 0:
            words = [f"systemctl {' '.join(arguments)}: {done.err.strip() or done.code}"]
            if arguments[-1].endswith(".service"):
                log = self.system.run(
                    ["journalctl", "--unit", arguments[-1], "--lines=12", "--output=cat", "-q"]
                )
                words += [f"  {line}" for line in log.out.strip().splitlines()]
            raise Unhealthy("\n".join(words))

    def restore(self, before: Mapping[str, Mapping[str, str]]) -> list[str]:
        """Bring units back to the states ``before``, under restored files. Returns what failed."""
        self.system.run(["systemctl", "daemon-reload"])
        failed = []
        for unit, state in before.items():
            active = state["active"] in ("active", "reloading", "activating")
            if not active:
                self.system.run(["systemctl", "stop", unit], timeout=120)
            if state["enabled"] == "disabled":
                self.system.run(["systemctl", "disable", "--quiet", unit])
            elif state["enabled"] == "enabled":
                self.system.run(["systemctl", "enable", "--quiet", unit])
            if active:
                self.system.run(["systemctl", "reset-failed", unit])
                verb = "reload-or-restart" if state["can_reload"] == "yes" else "restart"
                done = self.system.run(["systemctl", verb, unit], timeout=120)
                if done.code != 0:
                    done = self.system.run(["systemctl", "restart", unit], timeout=120)
                if done.code != 0:
                    failed.append(f"{unit}: {done.err.strip()}")
        return failed


class Health:
    """Asks until everything answers, each within its own time."""

    def __init__(self, system: System) -> None:
        self.system = system

    def wait(self, wanted: Sequence[Mapping[str, Any]], services: Services) -> None:
        """Return when all of ``wanted`` hold.

        Raises:
            Unhealthy: something does not; the message says what was seen last.
        """
        units = [str(h["unit"]) for h in wanted if h["kind"] == "unit"]
        restarts = {u: s["restarts"] for u, s in services.states(units).items()}
        start = time.monotonic()
        problems: list[str] = []
        for health in wanted:
            deadline = start + float(health.get("timeout", 10))
            while (seen := self.ask(health)) is not None:
                if time.monotonic() >= deadline:
                    problems.append(seen)
                    break
                time.sleep(0.05)
        # A daemon in a restart loop answers now and then.
        for unit, state in services.states(units).items():
            if state["active"] != "active" or state["restarts"] != restarts[unit]:
                problems.append(f"{unit} does not stay up ({state['active']})")
        if problems:
            raise Unhealthy("\n".join(dict.fromkeys(problems)))

    def ask(self, health: Mapping[str, Any]) -> str | None:
        """None if it holds, else what was seen."""
        match health["kind"]:
            case "tcp":
                return self._tcp(health)
            case "unit":
                done = self.system.run(["systemctl", "is-active", str(health["unit"])])
                if done.out.strip() != "active":
                    return f"{health['unit']} is {done.out.strip() or 'not there'}"
                return None
            case "command":
                command = [str(word) for word in health["command"]]
                done = self.system.run(command, timeout=float(health.get("timeout", 10)))
                if done.code != 0:
                    return (
                        f"{' '.join(command)}: exit {done.code}: {(done.err or done.out).strip()}"
                    )
                return None
        return f"unknown health check {health['kind']!r}"

    def _tcp(self, health: Mapping[str, Any]) -> str | None:
        address, port, expect = str(health["address"]), int(health["port"]), str(health["expect"])
        try:
            with socket.create_connection((address, port), timeout=5) as connection:
                seen = b""
                while len(seen) < len(expect) and b"\n" not in seen:
                    chunk = connection.recv(512)
                    if not chunk:
                        break
                    seen += chunk
        except OSError as error:
            return f"{address} port {port}: {error.strerror or error}"
        if not seen.decode(errors="replace").startswith(expect):
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
        arm: Callable[[int], None] | None = None,
    ) -> None:
        self.system = system
        self.say = say
        self.store = Store(system)
        self.packages = Packages(system, say)
        self.services = Services(system, say)
        self.health = Health(system)
        self.sandbox = sandbox or Sandbox(system)
        self._arm = arm or self._arm_timer

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
        files = parse_files(load_document(path.read_text(encoding="utf-8")), secret=True)
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
        self.settle()
        wanted = dict(bundle.files) | self._secret_files(bundle, label)
        self.packages.install(bundle.packages)
        active = self.store.active()
        derived = {build.output for build in bundle.maps}
        changed, gone = self._compare(wanted, active, derived)
        maps = [b for b in bundle.maps if b.source in changed or self._absent(b.output)]
        manifest = self._manifest(bundle, label, wanted, active)
        lost = [u for u in active["services"] if u not in {s.unit for s in bundle.services}]
        if not changed and not gone and not maps and not lost:
            return self._unchanged(bundle, manifest, active)
        for path in changed:
            refuse_links(self.system, path)
        outputs = self._validate(bundle, wanted, changed, gone, maps)
        content, operations = self._operations(wanted, changed, gone, outputs)
        manifest["files"] |= {
            path: entry | {"derived": True} for path, (entry, _) in outputs.items()
        }
        for path in derived - set(outputs):
            if path in active["files"]:
                manifest["files"][path] = active["files"][path]
        units = [s.unit for s in bundle.services]
        identity = secrets.token_hex(8)
        manifest["transaction"] = identity
        self.store.transaction.prepare(
            identity, operations, content, self.services.states([*units, *lost])
        )
        paths = [operation.path for operation in operations]
        try:
            for path in paths:
                self.say(f"{'removing' if path in gone else 'writing'} {path}")
            self.store.transaction.switch()
            touched = self.services.bring(bundle.services, paths, lost)
            self.health.wait(bundle.health, self.services)
        except Exception as error:
            self._take_back(error)
        closing = (
            f"applied generation {manifest['generation']}: {len(paths)} files changed,"
            f" {len(touched.reloaded)} services reloaded,"
            f" {len(touched.restarted) + len(touched.started)} restarted"
        )
        if any(under(path, bundle.guarded) for path in paths):
            write_json(self.store.folder / "pending.json", manifest)
            self._arm(lockout)
            self.say(f"confirm: {identity}")
            self.say(f"taken back in {lockout} s unless a new connection confirms it")
        else:
            self.store.commit(manifest)
        return closing

    def _absent(self, path: str) -> bool:
        return look(self.system.live(path)).kind != "file"

    def _compare(
        self, wanted: Mapping[str, File], active: Mapping[str, Any], derived: set[str]
    ) -> tuple[list[str], list[str]]:
        """Paths that differ from what lies there, and paths that left the bundle."""
        changed = []
        for path, file in sorted(wanted.items()):
            if not self._matches(path, file.entry()):
                changed.append(path)
                entry = active["files"].get(path)
                if entry is not None and entry == file.entry():
                    self.say(f"{path} was changed by hand; it is put right")
        gone = [
            path
            for path in sorted(active["files"])
            if path not in wanted
            and path not in derived
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
        }

    def _unchanged(
        self, bundle: Bundle, manifest: dict[str, Any], active: Mapping[str, Any]
    ) -> str:
        touched = self.services.bring(bundle.services, (), ())
        self.health.wait(bundle.health, self.services)
        if (active["bundle"], active["secrets"]) != (bundle.digest, manifest["secrets"]):
            # The same files, said in other words: remember the words.
            derived = {p: e for p, e in active["files"].items() if e.get("derived")}
            manifest["files"] = derived | manifest["files"]
            self.store.commit(manifest)
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
        staged = {path: wanted[path] for path in changed}
        answer = self.sandbox.run(staged, gone, maps, checks)
        failed = answer["failed"]
        if failed is not None:
            told = explain(str(failed["words"]), wanted)
            raise Refused("\n".join([f"{failed['name']} refuses the change:", *told]))
        outputs = {}
        for path, built in answer["outputs"].items():
            content = built["content"].encode("latin-1")
            owner, group = self.system.names(built["uid"], built["gid"])
            entry = File(content, owner, group, built["mode"], "").entry()
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
            Operation(path, look(self.system.live(path)), entry, index)
            for index, (path, entry) in enumerate(entries.items())
        ]

    def _take_back(self, error: Exception) -> NoReturn:
        self.say("taking the change back")
        failed = self._undo()
        words = str(error) if isinstance(error, AgentError) else repr(error)
        if failed:
            words += "\nafter taking it back: " + "; ".join(failed)
        raise AgentError(
            f"{words}\nthe previous generation is back in place",
            error.code if isinstance(error, AgentError) else EXIT_ROLLED_BACK,
        ) from error

    def _undo(self, restart: bool = True) -> list[str]:
        transaction = self.store.transaction
        states = transaction.journal()["services"]
        transaction.undo()
        failed = self.services.restore(states) if restart else []
        (self.store.folder / "pending.json").unlink(missing_ok=True)
        transaction.discard()
        return failed

    # settling what earlier runs left

    def settle(self, boot: bool = False) -> str | None:
        """Bring an earlier transaction to its end. Returns what was done.

        A generation that waits to be confirmed is confirmed by any new run: its ssh connection
        is the proof that the host can be reached.
        """
        self.packages.clean()
        transaction = self.store.transaction
        if not transaction.exists:
            transaction.discard()
            return None
        pending = self.store.pending()
        if pending is not None and not boot:
            return self.confirm_pending(pending)
        if self.store.active().get("transaction") == transaction.journal()["identity"]:
            (self.store.folder / "pending.json").unlink(missing_ok=True)
            transaction.discard()
            return "completed an interrupted change"
        failed = self._undo(restart=not boot)
        told = "undid an interrupted change"
        self.say(told + (": " + "; ".join(failed) if failed else ""))
        return told

    def confirm_pending(self, pending: Mapping[str, Any]) -> str:
        self.store.commit(pending)
        self.system.run(["systemctl", "stop", f"{LOCKOUT_UNIT}.timer"])
        told = f"confirmed generation {pending['generation']}"
        self.say(told)
        return told

    def lock_out(self, identity: str) -> None:
        """The timer ran out: bring the previous generation back."""
        pending = self.store.pending()
        if pending is None or pending["transaction"] != identity:
            return
        self.say("no new connection confirmed the change; taking it back")
        for line in self._undo():
            self.say(line)

    def _arm_timer(self, seconds: int) -> None:
        pending = self.store.pending()
        if pending is None:
            raise AgentError("nothing is pending")
        # The agent itself may be one of the files that are taken back.
        copy = self.store.transaction.folder / "mail-agent"
        write_file(copy, Path(__file__).read_bytes(), 0o700)
        self.system.run(["systemctl", "stop", f"{LOCKOUT_UNIT}.timer"])
        done = self.system.run(
            [
                "systemd-run", "--quiet", "--collect", f"--unit={LOCKOUT_UNIT}",
                f"--on-active={seconds}", "--timer-property=AccuracySec=1s",
                sys.executable, "-IB", str(copy), "_lockout", str(pending["transaction"]),
            ]
        )  # fmt: skip
        if done.code != 0:
            self._take_back(Unhealthy(f"the lock-out timer did not start: {done.err.strip()}"))

    # looking

    def drift(self) -> list[str]:
        """Paths where the host differs from its active generation, each with what differs."""
        manifest = self.store.pending() or self.store.active()
        found = []
        for path, entry in sorted(manifest["files"].items()):
            live = look(self.system.live(path))
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
            if state["enabled"] == "disabled":
                found.append(f"{unit}: not enabled at boot")
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
    identity = f"{time.time_ns():x}"
    folder = store.folder / "runs" / identity
    folder.mkdir(mode=0o700)
    write_file(folder / "bundle.json", text.encode())
    write_file(store.folder / "incoming" / "last.json", text.encode())
    write_file(folder / "log", b"")
    agent = Path(__file__).resolve()
    offered = bundle.files.get(AGENT_PATH)
    if offered is not None and offered.content != agent.read_bytes():
        agent = folder / "mail-agent"
        write_file(agent, offered.content, 0o700)
        tested = system.run([sys.executable, "-IB", str(agent), "--self-test"])
        if tested.code != 0:
            words = (tested.err or tested.out).strip()
            raise Refused(f"{AGENT_PATH}: the new agent fails its own test: {words}")
    unit = f"mail-agent-{identity}"
    started = system.run(
        [
            "systemd-run", "--quiet", "--collect", f"--unit={unit}", "--service-type=exec",
            "--property=KillMode=mixed", sys.executable, "-IB", str(agent),
            "_run", identity, label or "-", str(lockout),
        ]
    )  # fmt: skip
    if started.code != 0:
        raise AgentError(f"systemd-run: {started.err.strip()}")
    prune_runs(store)
    with (folder / "log").open(encoding="utf-8") as log:
        while True:
            ended = (folder / "result").exists()
            sys.stdout.write(log.read())
            sys.stdout.flush()
            if ended:
                return int(read_json(folder / "result")["code"])
            state = system.run(["systemctl", "is-active", f"{unit}.service"]).out.strip()
            if state not in ("active", "activating", "deactivating"):
                if (folder / "result").exists():
                    continue
                print("mail-agent: the run died; the next one undoes what it left", flush=True)
                return EXIT_ERROR
            time.sleep(0.1)


def prune_runs(store: Store) -> None:
    runs = sorted((store.folder / "runs").iterdir(), key=lambda p: p.name)
    for old in runs[:-KEPT_RUNS]:
        if (old / "result").exists():
            shutil.rmtree(old, ignore_errors=True)


def run_unit(system: System, identity: str, label: str, lockout: int) -> int:
    """What the transient unit does: apply, and leave log and result behind."""
    store = Store(system)
    folder = store.folder / "runs" / identity
    with (folder / "log").open("a", encoding="utf-8", buffering=1) as log:

        def say(line: str) -> None:
            log.write(line + "\n")

        code = EXIT_ERROR
        try:
            with store.locked(say):
                text = (folder / "bundle.json").read_text(encoding="utf-8")
                say(Agent(system, say).apply(text, "" if label == "-" else label, lockout))
            code = 0
        except AgentError as error:
            code = error.code
            for line in str(error).splitlines():
                say(f"mail-agent: {line}")
        except Exception:
            say("mail-agent: internal error")
            for line in traceback.format_exc(limit=-4).splitlines():
                say(f"mail-agent: {line}")
        finally:
            (folder / "bundle.json").unlink(missing_ok=True)
            write_json(folder / "result", {"code": code})
    return code


def confirm(system: System, store: Store, expected: str) -> int:
    """Confirm what is pending; ``expected`` is the digest of the bundle that should be active."""
    agent = Agent(system, print)
    with store.locked(print):
        pending = store.pending()
        if pending is not None:
            agent.confirm_pending(pending)
        active = str(store.active()["bundle"])
    if not expected or active == expected:
        if pending is None:
            print("nothing to confirm")
        return 0
    last = store.folder / "incoming" / "last.json"
    text = last.read_text(encoding="utf-8") if last.exists() else ""
    if digest(text.encode()) != expected:
        raise AgentError(
            "the configuration to confirm is not the active one, and its push is gone;"
            " push it again: pulumi up --target-replace with this host's -config resource"
        )
    with store.locked(print):
        staged = sorted((store.folder / "secrets").glob("*.json"), key=lambda p: p.stat().st_mtime)
    label = staged[-1].stem if staged else ""
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
    agree = commands.add_parser("confirm", help="disarm the lock-out timer of a guarded change")
    agree.add_argument("token", nargs="?", default="")
    commands.add_parser("drift", help="list what differs from the active generation")
    commands.add_parser("status", help="show the active generation, as JSON")
    recover = commands.add_parser("recover", help="undo or complete an interrupted change")
    recover.add_argument("--boot", action="store_true", help="leave services to systemd")
    return top


def stdin_text() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise AgentError("a document is expected on standard input")
    return sys.stdin.read()


def main(arguments: Sequence[str]) -> int:
    system = System()
    if arguments[:1] == ["_run"]:
        return run_unit(system, arguments[1], arguments[2], int(arguments[3]))
    if arguments[:1] == ["_lockout"]:
        store = Store(system)
        with store.locked(print):
            Agent(system, print).lock_out(arguments[1])
        return 0
    options = parser().parse_args(arguments)
    if options.self_test:
        return self_test()
    if options.command is None:
        parser().print_help()
        return EXIT_ERROR
    if os.geteuid() != 0:
        raise AgentError("this needs root: sudo mail-agent ...")
    os.umask(0o022)
    store = Store(system)
    store.ready()
    agent = Agent(system, print)
    match options.command:
        case "stage-secrets":
            with store.locked(print):
                print(f"staged {agent.stage_secrets(stdin_text())[:12]}")
            return 0
        case "apply":
            return follow(system, store, stdin_text(), options.secrets, LOCKOUT_SECONDS)
        case "confirm":
            expected = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().strip()
            pending = store.pending()
            if options.token and (pending is None or pending["transaction"] != options.token):
                raise AgentError(f"{options.token} is not what waits to be confirmed")
            return confirm(system, store, expected)
        case "drift":
            found = agent.drift()
            print("\n".join(found) if found else "no drift")
            return EXIT_DRIFT if found else 0
        case "status":
            print(json.dumps(agent.status(), indent=1))
            return 0
        case "recover":
            with store.locked(print):
                print(agent.settle(boot=options.boot) or "nothing to recover")
            return 0
    return EXIT_ERROR


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except AgentError as problem:
        for problem_line in str(problem).splitlines():
            print(f"mail-agent: {problem_line}", file=sys.stderr)
        sys.exit(problem.code)
