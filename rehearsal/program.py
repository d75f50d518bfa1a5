"""Run the platform's program on the real engine, inside the sealed network.

:class:`Program` is for the command line and the checks; it starts ``python -m rehearsal.program``
in the operator's namespace, which drives the engine through Pulumi's Automation API with the
project's own ``__main__.py`` as inline program. The stack's configuration is the committed one
without its secrets; throwaway ones take their place.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from rehearsal import network, secrets, tools
from rehearsal.engine import Engine
from rehearsal.progress import Progress, RehearsalError
from rehearsal.state import CHECKOUT, State, write_atomic

if TYPE_CHECKING:
    from pulumi import automation
    from pulumi.automation.events import EngineEvent

PROJECT = "mail"
_RECORD = "program"
_SITE = "mail:site"
_LOG = "up.log"
_FIRST_PUSH = re.compile(r"command:remote:Command \S+ created")


class ProgramError(RehearsalError):
    """The engine refused or failed; what it said was printed before."""


@dataclass(frozen=True)
class Settings:
    """What the stack is run with: plain values, and secret ones that come on standard input."""

    plain: Mapping[str, str]
    secret: Mapping[str, str]


def settings(
    stack: str,
    *,
    overlay: Path,
    deploy_key: tuple[str, str],
    certificates: Mapping[str, Mapping[str, str]],
    given: Mapping[str, str],
    zone_ids: Mapping[str, str],
    project: Path = CHECKOUT,
) -> Settings:
    """The configuration of ``stack`` for a rehearsal.

    Plain values are those of ``Pulumi.<stack>.yaml``; its secrets are left out, also where they
    are part of an object. ``given`` are secrets by name (:mod:`mailsite.secret_names`).
    ``zone_ids`` are the world's ids of all zones, for a stack that has no ids at all.
    """
    plain = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in stack_config(stack, project).items()
        if key not in ("mail:live", "mail:deployKey", "mail:certificates", "mail:secrets")
    }
    private, public = deploy_key
    plain.setdefault("mail:zoneIds", json.dumps(dict(zone_ids)))
    plain["mail:rehearsal"] = str(overlay)
    plain["mail:deployPublicKey"] = f"{public} operator"
    return Settings(
        plain=plain,
        secret={
            "mail:deployKey": private,
            "mail:certificates": json.dumps(certificates),
            "mail:secrets": json.dumps(given),
        },
    )


def stack_config(stack: str, project: Path = CHECKOUT) -> dict[str, Any]:
    """The plain values of ``Pulumi.<stack>.yaml``; encrypted ones are dropped."""
    path = project / f"Pulumi.{stack}.yaml"
    try:
        document = YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        known = sorted(p.name.split(".")[1] for p in project.glob("Pulumi.*.yaml"))
        raise RehearsalError(
            f"there is no stack {stack}: {path.name} is missing",
            f"choose one of: {', '.join(known)}",
        ) from None
    values: dict[str, Any] = document.get("config") or {}
    return {k: _plain(v) for k, v in values.items() if not _is_secret(v)}


def _is_secret(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"secure"}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if not _is_secret(v)}
    if isinstance(value, list):
        return [_plain(v) for v in value if not _is_secret(v)]
    return value


# From outside ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """The stack of the rehearsal that is up."""

    state: State
    stack: str
    engine: Engine

    def up(
        self,
        progress: Progress,
        *,
        values: Settings | None = None,
        replace: Sequence[str] = (),
        site: Path | None = None,
    ) -> dict[str, int]:
        """Run ``pulumi up``; returns the number of resources per kind of change.

        ``values`` is the stack's configuration, by default the one that it has. ``replace`` are
        names of resources that are replaced although nothing changed. ``site`` is a folder of
        site data to use this once.
        Raises :class:`ProgramError` when the engine fails; its errors have been printed.
        """
        given = {"plain": values.plain, "secret": values.secret} if values else None
        changes: dict[str, int] = self._run(
            "up", replace=replace, site=site, progress=progress, input=json.dumps(given)
        )["changes"]
        return changes

    def preview(self, *, site: Path | None = None, quiet: bool = False) -> str:
        """Print what ``pulumi preview --diff`` says, unless ``quiet``, and return it.

        ``site`` is a folder of site data to use this once.
        """
        self._run("preview", site=site, quiet=quiet)
        return (self.state.root / _LOG).read_text(encoding="utf-8")

    def is_new(self) -> bool:
        """Whether no run has created anything yet."""
        return not _latest(self.state, self.stack).get("resources")

    def has_reached_a_host(self) -> bool:
        """Whether the run that is on has given a host something."""
        log = self.state.root / _LOG
        return log.exists() and bool(_FIRST_PUSH.search(log.read_text("utf-8", errors="replace")))

    def outputs(self) -> dict[str, Any]:
        """The stack's outputs, secret ones in plain."""
        found: dict[str, Any] = self._run("outputs")["outputs"]
        return found

    def pulumi(self, arguments: Sequence[str]) -> int:
        """Run the plain command line on the stack, for the curious; returns its exit code."""
        done = subprocess.run(
            [*_entrance(), str(self.engine.pulumi), *arguments],
            cwd=_folder(self.state),
            env=self.environment(),
        )
        return done.returncode

    def environment(self) -> dict[str, str]:
        """What the engine finds in its environment; nothing of the caller's gets through."""
        venv = Path(sys.executable).parent
        base = tools.environment()
        ports = self.state.read_json(self.state.standins.name)
        return {
            **base,
            "PATH": f"{venv}:{self.engine.path}:{base['PATH']}",
            "PULUMI_HOME": str(self.state.folder("pulumi")),
            "PULUMI_BACKEND_URL": f"file://{self.state.folder('stack')}",
            "PULUMI_CONFIG_PASSPHRASE_FILE": str(secrets.passphrase(self.state)),
            "PULUMI_DEBUG_PROVIDERS": ",".join(f"{n}:{p}" for n, p in sorted(ports.items())),
            "PULUMI_SKIP_UPDATE_CHECK": "true",
            "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION": "true",
            "PULUMI_DIY_BACKEND_DISABLE_CHECKPOINT_BACKUPS": "true",
            "PULUMI_AUTOMATION_API_SKIP_VERSION_CHECK": "true",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def _run(
        self,
        action: str,
        *,
        replace: Sequence[str] = (),
        site: Path | None = None,
        quiet: bool = False,
        progress: Progress | None = None,
        input: str | None = None,
    ) -> dict[str, Any]:
        end_leftovers(self.state)
        result = self.state.root / f"{_RECORD}.json"
        result.unlink(missing_ok=True)
        started = time.monotonic() if progress is None else progress.started
        child = subprocess.Popen(
            [
                *_entrance(),
                *(sys.executable, "-m", "rehearsal.program", action),
                f"--state={self.state.root}",
                f"--stack={self.stack}",
                f"--pulumi={self.engine.pulumi}",
                f"--started={started}",
                *(f"--replace={name}" for name in replace),
                *([f"--site={site}"] if site else []),
            ],
            cwd=CHECKOUT,
            env=self.environment(),
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.DEVNULL if quiet else None,
            text=True,
            # A group of its own, so that one signal reaches the engine and its helpers, once.
            start_new_session=True,
        )
        try:
            self.state.record(_RECORD, child.pid)
            child.communicate(input)
        except BaseException:
            _interrupt(child)
            raise
        finally:
            self.state.forget(_RECORD)
        if child.returncode != 0:
            raise ProgramError(
                f"the program failed (everything that the engine said is in "
                f"{self.state.root / _LOG})",
                "mend what it names and run the same command again",
            )
        found = self.state.read_json(result.name)
        result.unlink(missing_ok=True)
        return found


def _entrance() -> list[str]:
    return ["nsenter", f"--net={network.NETNS / network.OPERATOR}", "--"]


def _interrupt(child: subprocess.Popen[str]) -> None:
    """Let the engine finish what is under way, as Ctrl-C does; then be less patient."""
    for number, seconds in ((signal.SIGINT, 60), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(child.pid, number)
            child.wait(seconds)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def end_leftovers(state: State) -> None:
    """End the program of a command that was killed: its session outlives it."""
    left = state.processes().get(_RECORD)
    if left is None:
        return
    for process in network.inhabitants([network.OPERATOR]):
        try:
            mine = os.getsid(process.pid) == left.pid
        except ProcessLookupError:
            continue
        if mine:
            process.end()
    state.forget(_RECORD)


# Inside the operator's namespace ---------------------------------------------------------------


def _folder(state: State) -> Path:
    return state.folder("project")


def _latest(state: State, stack: str) -> dict[str, Any]:
    """The stack's state as the engine last wrote it; empty before that."""
    path = state.folder("stack") / f".pulumi/stacks/{PROJECT}/{stack}.json"
    if not path.exists():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    return document["checkpoint"].get("latest") or {}


def is_unrecorded(state: State, stack: str) -> bool:
    """Whether there are machines or records that the stack does not know of.

    The run that creates a platform writes its state when it ends. Killed before, it leaves
    these, and the next run cannot go on: to it they are somebody else's.
    """
    books = (state.root / "standins").glob("*.json")
    made = any(_holds(json.loads(book.read_text(encoding="utf-8"))) for book in books)
    return made and not _latest(state, stack).get("resources")


def _holds(book: Any) -> bool:
    """Whether a stand-in's book has an entry, below chapters that may be empty."""
    return any(map(_holds, book.values())) if isinstance(book, dict) else True


def _keys(path: Path) -> set[str]:
    """What a stack's configuration file sets; to ask the engine would decrypt all of it."""
    if not path.exists():
        return set()
    return set((YAML(typ="safe").load(path) or {}).get("config") or {})


def platform_program() -> None:
    """The platform's own program, unchanged.

    Two thousand lines for those who debug Pulumi are left out. Each would be a call of the engine
    that everything else waits for, and nobody reads them.
    """
    from pulumi import log

    vars(log).update(debug=lambda *_, **__: None)
    runpy.run_path(str(CHECKOUT / "__main__.py"), run_name="__main__")


@dataclass
class _Inside:
    state: State
    stack_name: str
    pulumi: Path
    progress: Progress
    site: Path | None = None

    def stack(self) -> automation.Stack:
        from pulumi import automation

        folder = _folder(self.state)
        text = (CHECKOUT / "Pulumi.yaml").read_text(encoding="utf-8")
        # `main` is for the plain command line, which looks for the program there.
        write_atomic(folder / "Pulumi.yaml", f"{text.rstrip()}\nmain: {CHECKOUT}\n")
        # The Automation API wants the engine at bin/pulumi below a folder.
        root = self.state.folder("engine")
        link = root / "bin/pulumi"
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink() or link.readlink() != self.pulumi:
            link.unlink(missing_ok=True)
            link.symlink_to(self.pulumi)
        return automation.create_or_select_stack(
            self.stack_name,
            project_name=PROJECT,
            program=platform_program,
            opts=automation.LocalWorkspaceOptions(
                work_dir=str(folder),
                pulumi_command=automation.PulumiCommand(str(root), skip_version_check=True),
                env_vars=dict(os.environ),
            ),
        )

    def configure(self, stack: automation.Stack, document: Mapping[str, Mapping[str, str]]) -> None:
        """Set what differs from last time. Secrets go in on standard input, never as arguments."""
        from pulumi import automation

        digests = {
            key: hashlib.sha256(f"{kind} {value}".encode()).hexdigest()
            for kind, values in document.items()
            for key, value in values.items()
        }
        kept = _folder(self.state) / "configured.json"
        known: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
        there = _keys(_folder(self.state) / f"Pulumi.{self.stack_name}.yaml")
        for key in there - digests.keys():
            stack.remove_config(key)

        def due(kind: str) -> dict[str, str]:
            return {
                key: value
                for key, value in document[kind].items()
                if key not in there or known.get(key) != digests[key]
            }

        if plain := due("plain"):
            stack.set_all_config({k: automation.ConfigValue(v) for k, v in plain.items()})
        for key, value in due("secret").items():
            self._set(key, value, secret=True)
        write_atomic(kept, json.dumps(digests))

    def _set(self, key: str, value: str, *, secret: bool) -> None:
        done = subprocess.run(
            [
                *(str(self.pulumi), "config", "set", "--non-interactive"),
                *("--stack", self.stack_name, "--secret" if secret else "--plaintext", key),
            ],
            input=value,
            cwd=_folder(self.state),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RehearsalError(f"pulumi config set {key}: {done.stderr.strip()}")

    @contextmanager
    def _other_site(self, stack: automation.Stack) -> Iterator[None]:
        """The stack has the site data of ``site``, if any, for a while."""
        if self.site is None:
            yield
            return
        own = stack.get_config(_SITE).value
        self._set(_SITE, str(self.site), secret=False)
        try:
            yield
        finally:
            self._set(_SITE, own, secret=False)

    def up(
        self, document: Mapping[str, Mapping[str, str]] | None, replace: Sequence[str]
    ) -> dict[str, Any]:
        stack = self.stack()
        self._unlock(stack)
        interrupted = self._pending()
        if document is not None:
            self.configure(stack, document)
        if not _latest(self.state, self.stack_name).get("resources"):
            # See is_unrecorded(). To write it at each of some six hundred steps takes a quarter
            # of the whole run.
            own = stack.workspace
            own.env_vars = {**own.env_vars, "PULUMI_SKIP_CHECKPOINTS": "true"}
        urns = self._urns(stack, replace)
        running = _Watch(self.progress, self.state.root / _LOG).running()
        _ask_nothing_after(stack)
        with self._other_site(stack), running as watch:
            try:
                self._act(
                    lambda: stack.up(
                        on_output=watch.write,
                        on_event=watch.event,
                        color="never",
                        suppress_outputs=True,
                        show_secrets=False,
                        replace=urns or None,
                    ),
                    watch,
                )
            except RehearsalError as error:
                if not interrupted:
                    raise
                raise RehearsalError(
                    f"{error.message}\nAn earlier run was killed while it created "
                    f"{', '.join(interrupted)}: what exists already is its work.",
                    "run: make down, and then this again",
                ) from error
        return {"changes": watch.changes}

    def _pending(self) -> list[str]:
        """What a killed engine was about to create, and perhaps did without noting it."""
        latest = _latest(self.state, self.stack_name)
        pending = latest.get("pending_operations") or []
        return [_label(p["resource"]["urn"]) for p in pending if p["type"] == "creating"]

    def preview(self) -> dict[str, Any]:
        stack = self.stack()
        self._unlock(stack)
        running = _Watch(Progress(quiet=True), self.state.root / _LOG).running()
        with self._other_site(stack), running as watch:

            def show(line: str) -> None:
                print(line, flush=True)
                watch.write(line)

            self._act(
                lambda: stack.preview(
                    on_output=show, on_event=watch.event, color="never", diff=True
                ),
                watch,
            )
        return {"changes": watch.changes}

    def outputs(self) -> dict[str, Any]:
        return {"outputs": {k: v.value for k, v in self.stack().outputs().items()}}

    def _act(self, act: Callable[[], object], watch: _Watch) -> None:
        from pulumi import automation

        try:
            act()
        except automation.CommandError as error:
            errors = watch.errors or str(error).strip().splitlines()[-10:]
            text = "\n".join(dict.fromkeys(errors))
            raise RehearsalError(f"the engine failed:\n{text}") from error

    def _unlock(self, stack: automation.Stack) -> None:
        """Take away the lock of a killed engine; there is no other, this command has the lock."""
        if any(self.state.folder("stack").glob(".pulumi/locks/**/*.json")):
            stack.cancel()

    def _urns(self, stack: automation.Stack, names: Sequence[str]) -> list[str]:
        if not names:
            return []
        deployment: Mapping[str, Any] = stack.export_stack().deployment or {}
        known = [str(r["urn"]) for r in deployment.get("resources", [])]
        found: list[str] = []
        for name in names:
            matches = [urn for urn in known if urn.rpartition("::")[2] == name]
            if not matches:
                raise RehearsalError(f"the stack has no resource named {name}")
            found += matches
        return found


@dataclass
class _Watch:
    """Turns the engine's events into lines for the operator, and keeps all of its words."""

    progress: Progress
    log: Path
    changes: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    _begun: dict[str, float] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[_Watch]:
        """While it lasts, say every 15 seconds what is being waited for."""
        write_atomic(self.log, "")
        reminder = threading.Thread(target=self._remind, daemon=True)
        reminder.start()
        try:
            yield self
        finally:
            self._over.set()
            reminder.join()

    def _remind(self) -> None:
        while not self._over.wait(15):
            now = time.monotonic()
            for urn, begun in list(self._begun.items()):
                if now - begun >= 10:
                    self.progress.say(f"waiting for {_label(urn)} ({now - begun:.0f} s)")

    def write(self, line: str) -> None:
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(line.rstrip("\n") + "\n")

    def event(self, event: EngineEvent) -> None:
        if event.resource_pre_event is not None:
            metadata = event.resource_pre_event.metadata
            if metadata.op.value not in ("same", "read", "refresh") and _is_custom(metadata.urn):
                self._begun[metadata.urn] = time.monotonic()
        elif event.res_outputs_event is not None:
            metadata = event.res_outputs_event.metadata
            begun = self._begun.pop(metadata.urn, None)
            if begun is not None:
                took = time.monotonic() - begun
                self.progress.say(f"{metadata.op.value} {_label(metadata.urn)} ({took:.1f} s)")
        elif event.res_op_failed_event is not None:
            self._begun.pop(event.res_op_failed_event.metadata.urn, None)
        elif event.diagnostic_event is not None:
            said = event.diagnostic_event
            text = said.message.strip()
            if text and said.severity in ("warning", "error") and not said.ephemeral:
                where = f"{_label(said.urn)}: " if said.urn else ""
                if said.severity == "error":
                    self.errors.append(f"{where}{text}")
                self.progress.say(f"{said.severity}: {where}{text}")
        elif event.summary_event is not None:
            self.changes = {
                str(getattr(op, "value", op)): count
                for op, count in event.summary_event.resource_changes.items()
            }


def _ask_nothing_after(stack: automation.Stack) -> None:
    """Have ``up`` end with the engine.

    The Automation API would ask for the stack's outputs, for the secret ones in plain, and for its
    history: a second's work that nobody here reads.
    """
    from pulumi import automation

    began = datetime.fromtimestamp(0, UTC)
    nothing = automation.UpdateSummary("update", began, "", {}, {}, "succeeded")
    vars(stack).update(outputs=dict, info=lambda show_secrets: nothing)


def _is_custom(urn: str) -> bool:
    kind = urn.split("::")[2].rpartition("$")[2]
    return not kind.startswith(("mail:index:", "pulumi:pulumi:", "pulumi:providers:"))


def _label(urn: str) -> str:
    """``remote.Command smtp-out.example.net-config`` of a URN."""
    kind, name = urn.split("::", 3)[2:]
    kind = kind.rpartition("$")[2].rpartition(":")[2]
    return f"{kind} {name}"


def main() -> int:
    """What runs in the operator's namespace; not meant to be called by hand."""
    parser = argparse.ArgumentParser(prog="python -m rehearsal.program", description=main.__doc__)
    parser.add_argument("action", choices=("up", "preview", "outputs"))
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--stack", required=True)
    parser.add_argument("--pulumi", type=Path, required=True)
    parser.add_argument("--started", type=float, required=True)
    parser.add_argument("--site", type=Path, help="folder of site data to use this once")
    parser.add_argument("--replace", action="append", default=[], help="resource to replace")
    options = parser.parse_args()
    state = State(options.state)
    gc.disable()  # A few seconds' work, nearly all of which is needed to the end.
    # The engine gets the signal too and ends in order; this process has to see it through.
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        network.assert_sealed()
        progress = Progress(started=options.started)
        inside = _Inside(state, options.stack, options.pulumi, progress, options.site)
        result: dict[str, Any] = {}
        if options.action == "up":
            result = inside.up(json.load(sys.stdin), options.replace)
        elif options.action == "preview":
            result = inside.preview()
        else:
            result = inside.outputs()
        state.write(f"{_RECORD}.json", json.dumps(result))
    except RehearsalError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
