"""A Pulumi project in a temporary folder: the real engine, the stand-ins, a world in memory."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from pulumi import automation
from pulumi.automation.events import EngineEvent, OpType

from rehearsal.engine import Engine
from rehearsal.standins.server import Context, Servers, start_all

from .memory import Hosts, Hypervisors, World, Zones

Program = Callable[[], None]

CALM = {
    "PULUMI_CONFIG_PASSPHRASE": "a passphrase",
    "PULUMI_SKIP_UPDATE_CHECK": "1",
    "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION": "1",
    "PULUMI_DIY_BACKEND_DISABLE_CHECKPOINT_BACKUPS": "1",
    "NO_COLOR": "1",
}


@dataclass(frozen=True)
class Step:
    """What the engine did, or would do, with one resource."""

    op: str
    name: str


@dataclass
class Outcome:
    """A run of the engine: its steps without the unchanged ones, what it printed, what happened
    outside."""

    steps: list[Step]
    text: str
    journal: list[str]
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error


class Project:
    """One stack, run by ``engine``."""

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        world: World,
        *,
        name: str = "trial",
        stack: str = "dev",
        config: Mapping[str, Any] | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.engine, self.world = folder, engine, world
        self.name, self.stack_name = name, stack
        self.config = dict(config or {})
        self._secrets = dict(secrets or {})
        for part in ("home", "backend", "work", "root/bin", "state"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        link = folder / "root/bin/pulumi"
        if not link.exists():
            link.symlink_to(engine.pulumi)
        self.servers: Servers = start_all(
            Context(
                state=folder / "state",
                hypervisors=Hypervisors(world),
                publisher=Zones(world),
                shell=Hosts(world),
            )
        )

    @property
    def environment(self) -> dict[str, str]:
        """What the engine needs in its environment, beside the caller's."""
        return {
            **CALM,
            "PULUMI_HOME": str(self.folder / "home"),
            "PULUMI_BACKEND_URL": self.backend,
            "PULUMI_DEBUG_PROVIDERS": self.servers.debug_providers,
        }

    @property
    def backend(self) -> str:
        return f"file://{self.folder / 'backend'}"

    def close(self) -> None:
        self.servers.stop()

    def copy(self, folder: Path, config: Mapping[str, Any] | None = None) -> Project:
        """The same stack somewhere else, with the same world as it is now.

        ``config`` are settings that differ.
        """
        for part in ("backend", "work", "state"):
            shutil.copytree(self.folder / part, folder / part)
        return Project(
            folder,
            self.engine,
            self.world.copy(),
            name=self.name,
            stack=self.stack_name,
            config={**self.config, **(config or {})},
            secrets=self._secrets,
        )

    def _attached(self, program: Program) -> Program:
        """``program``, which runs in this process, in the environment that the engine has."""

        def run() -> None:
            with mock.patch.dict(os.environ, self.environment):
                program()

        return run

    def select(self, program: Program) -> automation.Stack:
        """The stack with ``program`` as its program."""
        stack = automation.create_or_select_stack(
            self.stack_name,
            project_name=self.name,
            program=self._attached(program),
            opts=automation.LocalWorkspaceOptions(
                work_dir=str(self.folder / "work"),
                env_vars=self.environment,
                pulumi_command=automation.PulumiCommand(str(self.folder / "root")),
                project_settings=automation.ProjectSettings(
                    name=self.name,
                    runtime="python",
                    backend=automation.ProjectBackend(url=self.backend),
                ),
            ),
        )
        values = {key: automation.ConfigValue(_text(v)) for key, v in self.config.items()}
        values |= {key: automation.ConfigValue(v, secret=True) for key, v in self._secrets.items()}
        if values:
            stack.set_all_config(values)
        return stack

    def up(self, program: Program) -> Outcome:
        """Run ``pulumi up``. A failed one is no exception: see ``Outcome.error``."""
        stack = self.select(program)
        return self._run(lambda out, event: stack.up(on_output=out, on_event=event))

    def preview(self, program: Program) -> Outcome:
        """Run ``pulumi preview --diff``."""
        stack = self.select(program)
        return self._run(lambda out, event: stack.preview(on_output=out, on_event=event, diff=True))

    def refresh(self, program: Program) -> Outcome:
        """Run ``pulumi refresh``."""
        stack = self.select(program)
        return self._run(lambda out, event: stack.refresh(on_output=out, on_event=event))

    def _run(
        self, act: Callable[[Callable[[str], None], Callable[[EngineEvent], None]], object]
    ) -> Outcome:
        lines: list[str] = []
        steps: list[Step] = []
        before = len(self.world.journal)

        def event(one: EngineEvent) -> None:
            if one.resource_pre_event is not None:
                done = one.resource_pre_event.metadata
                if done.op is not OpType.SAME:
                    steps.append(Step(done.op.value, done.urn.rpartition("::")[2]))

        error = ""
        try:
            act(lines.append, event)
        except automation.CommandError as failure:
            error = str(failure)
            _let_program_end()
        return Outcome(steps, "\n".join(lines), self.world.journal[before:], error)

    def state(self) -> list[dict[str, Any]]:
        """The resources of the stack as they are recorded; secrets are encrypted there."""
        path = self.folder / f"backend/.pulumi/stacks/{self.name}/{self.stack_name}.json"
        found: list[dict[str, Any]] = json.loads(path.read_text())["checkpoint"]["latest"][
            "resources"
        ]
        return found


def _let_program_end() -> None:
    """Wait for a program that the engine gave up: it still says so, in a thread of its own."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(
        Path(frame.filename).name == "_server.py" and "automation" in frame.filename
        for stack in sys._current_frames().values()
        for frame in traceback.StackSummary.extract(traceback.walk_stack(stack), lookup_lines=False)
    ):
        time.sleep(0.01)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def scrubbed() -> Iterator[None]:
    """The caller's own Pulumi, Cloudflare and ssh settings stay outside."""
    gone = {
        key: os.environ.pop(key)
        for key in list(os.environ)
        if key.startswith(("PULUMI_", "CLOUDFLARE_")) or key == "SSH_AUTH_SOCK"
    }
    try:
        yield
    finally:
        os.environ.update(gone)
