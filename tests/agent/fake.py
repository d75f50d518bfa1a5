"""A machine that is a folder: files are real, units and commands are a table."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import mail_agent
from agent.mail_agent import Agent, Done, System

LABEL = "ab" * 32

# What lies at a path: (kind, content or target, mode, uid, gid)
Tree = dict[str, tuple[str, bytes, int, int, int]]


@dataclass
class Unit:
    active: str = "active"
    enabled: str = "enabled"
    can_reload: str = "yes"
    load: str = "loaded"
    fails: tuple[str, ...] = ()


class Folder(System):
    """``commands``: answers by the first word; what is not there succeeds and says nothing."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.units: dict[str, Unit] = {}
        self.commands: dict[str, Callable[[Sequence[str]], Done]] = {}
        self.calls: list[list[str]] = []

    def run(self, command: Sequence[str], timeout: float = 600) -> Done:
        words = [str(word) for word in command]
        self.calls.append(words)
        if words[0] in self.commands:
            return self.commands[words[0]](words)
        if words[0] == "systemctl":
            return self._systemctl(words[1:])
        if words[0] == "dpkg-query":
            return Done(0, "".join(f"installed {name}\n" for name in words[4:]), "")
        return Done(0, "", "")

    def _systemctl(self, words: list[str]) -> Done:
        verb, units = words[0], [w for w in words[1:] if "." in w and not w.startswith("-")]
        if verb == "show":
            blocks = []
            for name in units:
                unit = self.units.get(name, Unit("inactive", "", "no", "not-found"))
                blocks.append(
                    f"LoadState={unit.load}\nActiveState={unit.active}\n"
                    f"UnitFileState={unit.enabled}\nCanReload={unit.can_reload}\nNRestarts=0\n"
                )
            return Done(0, "\n".join(blocks), "")
        if verb == "is-active":
            state = self.units[units[0]].active if units[0] in self.units else "inactive"
            return Done(0 if state == "active" else 3, state + "\n", "")
        for name in units:
            unit = self.units.get(name)
            if unit is None:
                continue
            if verb in unit.fails:
                unit.active = "failed"
                return Done(1, "", f"Job for {name} failed")
            if verb in ("start", "restart"):
                unit.active = "active"
            elif verb == "stop":
                unit.active = "inactive"
            elif verb in ("enable", "disable", "mask"):
                unit.enabled = f"{verb}d" if verb != "mask" else "masked"
                unit.load = "masked" if verb == "mask" else unit.load
            elif verb == "unmask":
                unit.load, unit.enabled = "loaded", "disabled"
        return Done(0, "", "")

    def verbs(self, *of: str) -> list[str]:
        """What was done to units, as ``verb unit``; ``of``: only these verbs."""
        wanted = of or ("start", "stop", "restart", "reload", "enable", "disable")
        return [f"{c[1]} {c[-1]}" for c in self.calls if c[0] == "systemctl" and c[1] in wanted]


class Checkers:
    """Stands in for the sandbox: builds the maps it is given, and answers ``words``."""

    def __init__(self, words: str = "", name: str = "checker") -> None:
        self.words = words
        self.name = name
        self.outputs: dict[str, bytes] = {}
        self.seen: list[tuple[list[str], list[str], list[str], list[str]]] = []

    def run(
        self,
        files: Mapping[str, mail_agent.File],
        removed: Sequence[str],
        maps: Sequence[mail_agent.MapBuild],
        checks: Sequence[mail_agent.Check],
    ) -> dict[str, Any]:
        self.seen.append(
            (sorted(files), list(removed), [m.output for m in maps], [c.name for c in checks])
        )
        outputs = {
            m.output: {
                "content": (b"map of " + files[m.source].content).decode("latin-1")
                if m.source in files
                else self.outputs.get(m.output, b"rebuilt").decode("latin-1"),
                "uid": 0,
                "gid": 0,
                "mode": 0o644,
            }
            for m in maps
        }
        failed = {"name": self.name, "words": self.words} if self.words else None
        return {"outputs": outputs, "failed": failed}


@dataclass
class Host:
    """A fake machine with an agent on it."""

    root: Path
    system: Folder = field(init=False)
    checkers: Checkers = field(default_factory=Checkers)
    said: list[str] = field(default_factory=list)
    armed: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.system = Folder(self.root)
        (self.root / "etc").mkdir(parents=True, exist_ok=True)
        self.agent_that_ran = self.agent
        self.agent.store.ready()

    @property
    def agent(self) -> Agent:
        """A new agent, as every run is a new process."""
        return Agent(
            self.system,
            self.said.append,
            sandbox=self.checkers,  # type: ignore[arg-type]
            arm=lambda identity, seconds: self.armed.append((identity, seconds)),
        )

    def apply(self, text: str, label: str = "") -> str:
        self.agent_that_ran = self.agent
        return self.agent_that_ran.apply(text, label)

    def settle(self, **options: bool) -> str | None:
        return self.agent.settle(**options)

    def tree(self) -> Tree:
        """Everything but the agent's own state."""
        return tree(self.root)

    def active(self) -> dict[str, Any]:
        return self.agent.store.active()


def tree(root: Path) -> Tree:
    found: Tree = {}
    for folder, folders, names in os.walk(root):
        if Path(folder) == root / "var/lib":
            folders.remove("mail-agent")
        for name in (*folders, *names):
            path = Path(folder) / name
            about = path.lstat()
            kind, content = "folder", b""
            if stat.S_ISLNK(about.st_mode):
                kind, content = "link", os.fsencode(path.readlink())
            elif stat.S_ISREG(about.st_mode):
                kind, content = "file", path.read_bytes()
            mode = 0 if kind == "link" else stat.S_IMODE(about.st_mode)
            place = str(path.relative_to(root))
            found[f"/{place}"] = (kind, content, mode, about.st_uid, about.st_gid)
    return found


def attributes(
    owner: str = "root", group: str = "root", mode: str = "0644", template: str = ""
) -> dict[str, str]:
    return {"owner": owner, "group": group, "mode": mode, "template": template}


def bundle(
    files: Mapping[str, str],
    about: Mapping[str, Mapping[str, str]] | None = None,
    **parts: Any,
) -> str:
    """The text of a public document."""
    document: dict[str, Any] = {
        "format": 1,
        "host": "host.example.org",
        "files": dict(files),
        "attributes": {p: dict((about or {}).get(p, attributes())) for p in files},
        "packages": [],
        "maps": [],
        "checks": [],
        "services": [],
        "health": [],
        "guarded": [],
        "secret_paths": [],
    }
    return json.dumps(document | parts, indent=1, sort_keys=True)


def secret_bundle(
    files: Mapping[str, str], about: Mapping[str, Mapping[str, str]] | None = None, **parts: Any
) -> str:
    document: dict[str, Any] = {
        "format": 1,
        "host": "host.example.org",
        "digest": LABEL,
        "files": dict(files),
        "attributes": {p: dict((about or {}).get(p, attributes(mode="0640"))) for p in files},
    }
    return json.dumps(document | parts)


def service(unit: str, reload_on: Sequence[str] = (), restart_on: Sequence[str] = ()) -> Any:
    return {"unit": unit, "reload_on": [*reload_on], "restart_on": [*restart_on], "order": 10}


def check(name: str, *paths: str) -> Any:
    return {"name": name, "command": [name], "paths": [*paths], "stderr_is_failure": False}
