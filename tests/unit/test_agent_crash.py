"""Whatever happens to a run, the live files are the old ones or the new ones, never a mix.

The runs work on real files below a temporary root. They die, or the disk fills, at any of their
calls that change a file system.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import mail_agent
from agent.mail_agent import AgentError
from tests.agent.fake import Host, Tree, attributes, bundle

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners of files can be set by root only")

CALLS = ("link", "rename", "replace", "unlink", "mkdir", "rmdir", "fchown", "fchmod", "fsync")
GROWING = ("link", "mkdir", "open")


MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


class Crash(BaseException):
    """The process is gone: nothing may catch this."""


@dataclass
class Faults:
    """``at``: number of the call that ``fault`` is called in; with ``lasting`` all later ones."""

    at: int
    fault: Callable[[], None]
    lasting: bool = False
    calls: tuple[str, ...] = (*CALLS, "open")
    count: int = field(default=0, init=False)

    def strike(self) -> None:
        self.count += 1
        if self.count == self.at or (self.lasting and self.count > self.at):
            self.fault()


@contextmanager
def faulty(faults: Faults) -> Iterator[Faults]:
    """Let calls of the os module that change a file system fail. Nothing is forced to disk."""
    originals = {name: getattr(os, name) for name in (*CALLS, "open")}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            creates = name != "open" or arguments[1] & os.O_CREAT
            if name in faults.calls and creates:
                faults.strike()
            return None if name == "fsync" else originals[name](*arguments, **options)

        return call

    for name in originals:
        setattr(os, name, wrap(name))
    try:
        yield faults
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


# What lies on the machine and what is wanted there

Content = tuple[str, str, str]  # text, owner, mode
LINK = "link"


@dataclass(frozen=True)
class Place:
    """A path: what lies there (``link:...``: a link), whether it is ours, and what is wanted."""

    before: Content | None
    ours: bool
    after: Content | None


Scene = Mapping[str, Place]

SCENE: Scene = {
    "/etc/created": Place(None, False, ("new\n", "root", "0644")),
    "/etc/changed": Place(("old\n", "root", "0644"), True, ("new\n", "daemon", "0600")),
    "/etc/chmodded": Place(("same\n", "root", "0644"), True, ("same\n", "root", "0600")),
    "/etc/kept": Place(("same\n", "root", "0644"), True, ("same\n", "root", "0644")),
    "/etc/removed": Place(("old\n", "mail", "0640"), True, None),
    "/etc/foreign": Place(("theirs\n", "daemon", "0755"), False, ("ours\n", "root", "0444")),
    "/etc/resolv.conf": Place((LINK, "", ""), False, ("nameserver ::1\n", "root", "0644")),
    "/etc/new/deep/file": Place(None, False, ("new\n", "root", "0644")),
    "/etc/new/other": Place(None, False, ("new\n", "mail", "0640")),
    "/usr/local/bystander": Place(("theirs\n", "daemon", "0600"), False, None),
}


def lay(root: Path, scene: Scene) -> Host:
    """A machine on which ``scene`` lies."""
    host = Host(root)
    ours = {}
    for path, place in scene.items():
        live = root / path.lstrip("/")
        if place.before is None:
            continue
        live.parent.mkdir(parents=True, exist_ok=True)
        text, owner, mode = place.before
        if text == LINK:
            live.symlink_to("../run/somewhere")
            continue
        live.write_text(text)
        os.chown(live, *host.system.ids(owner, owner))
        live.chmod(int(mode, 8))
        if place.ours:
            entry = mail_agent.File(text.encode(), owner, owner, int(mode, 8), "").entry()
            ours[path] = entry
    manifest = {"generation": 3, "files": ours, "services": [], "bundle": "", "secrets": ""}
    (host.system.state / "active.json").write_text(json.dumps(manifest))
    return host


def wanted(scene: Scene, **parts: Any) -> str:
    files = {path: place.after for path, place in scene.items() if place.after is not None}
    return bundle(
        {path: text for path, (text, _, _) in files.items()},
        {path: attributes(owner, owner, mode) for path, (_, owner, mode) in files.items()},
        **parts,
    )


def outcome(host: Host, old: Tree, new: Tree) -> str:
    """Which of the two the machine is; fails where it is neither, or something is left over."""
    generation = host.active()["generation"]
    seen = host.tree()
    assert not [path for path in seen if "mail-agent-" in path]
    assert seen == (old if generation == 3 else new)
    left = [p.name for p in host.system.state.iterdir() if p.name == "transaction"]
    assert not left
    return "old" if generation == 3 else "new"


def both(scene: Scene, folder: Path) -> tuple[Tree, Tree]:
    """The trees before and after an undisturbed run."""
    host = lay(folder, scene)
    before = host.tree()
    host.apply(wanted(scene))
    return before, host.tree()


@pytest.mark.parametrize("boot", [False, True])
def test_a_run_killed_at_any_call_is_undone_or_completed(folder: Path, boot: bool) -> None:
    old, new = both(SCENE, folder / "calm")
    seen = []
    for at in range(1, 1000):
        host = lay(folder / str(at), SCENE)
        try:
            with faulty(Faults(at, fault=_crash)):
                host.apply(wanted(SCENE))
        except Crash:
            host.settle(boot=boot)
            seen.append(outcome(host, old, new))
        else:
            assert outcome(host, old, new) == "new"
            break
    # It was killed before and after its one commit point, and there is only one.
    assert seen.count("old") > 50
    assert "new" in seen
    assert seen == sorted(seen, reverse=True)


def test_undoing_may_be_killed_at_any_call_too(folder: Path) -> None:
    old, new = both(SCENE, folder / "calm")
    calls = Faults(0, fault=_crash)
    with faulty(calls):
        lay(folder / "count", SCENE).apply(wanted(SCENE))
    for second in range(1, 1000):
        host = lay(folder / str(second), SCENE)
        # Two thirds of the way: half of the files are switched.
        with pytest.raises(Crash), faulty(Faults(calls.count * 2 // 3, fault=_crash)):
            host.apply(wanted(SCENE))
        try:
            with faulty(Faults(second, fault=_crash)):
                host.settle()
        except Crash:
            host.settle()
            assert outcome(host, old, new) == "old"
        else:
            assert outcome(host, old, new) == "old"
            return
    pytest.fail("undoing never ended")


def _crash() -> None:
    raise Crash


def _fail(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_full_disk_at_any_call_leaves_the_old_files(folder: Path) -> None:
    old, new = both(SCENE, folder / "calm")
    refused = 0
    for at in range(1, 1000):
        host = lay(folder / str(at), SCENE)
        faults = Faults(at, _fail(errno.ENOSPC), lasting=True, calls=GROWING)
        with faulty(faults):
            try:
                host.apply(wanted(SCENE))
            except (AgentError, OSError) as error:
                assert "No space left" in str(error)
                refused += 1
        # Undoing needed no space: the disk is still full.
        if faults.count < at:
            break
        if host.active()["generation"] != 3:
            host.settle()
        assert outcome(host, old, new) in ("old", "new")
    assert refused > 15


def test_taking_back_needs_no_space(folder: Path) -> None:
    text = wanted(SCENE, health=[{"kind": "command", "command": ["ask"], "timeout": 0}])
    for at in range(1, 1000):
        host = lay(folder / str(at), SCENE)
        before = host.tree()
        host.system.commands["ask"] = lambda _: mail_agent.Done(1, "", "no answer")
        faults = Faults(at, _fail(errno.ENOSPC), lasting=True, calls=GROWING)
        with pytest.raises((AgentError, OSError)), faulty(faults):
            host.apply(text)
        assert host.tree() == before
        if faults.count < at:
            return
    pytest.fail("the run never ended")


def test_one_failed_call_leaves_old_or_new(folder: Path) -> None:
    old, new = both(SCENE, folder / "calm")
    for at in range(1, 1000):
        host = lay(folder / str(at), SCENE)
        faults = Faults(at, _fail(errno.EIO))
        with faulty(faults), suppress(AgentError, OSError):
            host.apply(wanted(SCENE))
        if faults.count < at:
            return
        host.settle()
        outcome(host, old, new)
    pytest.fail("the run never ended")


def test_unhealthy_is_taken_back_exactly(folder: Path) -> None:
    host = lay(folder, SCENE)
    before = host.tree()
    host.system.commands["ask"] = lambda _: mail_agent.Done(1, "", "no answer")
    sick = [{"kind": "command", "command": ["ask"], "timeout": 0}]
    with pytest.raises(AgentError, match=r"no answer\n.*previous generation is back") as caught:
        host.apply(wanted(SCENE, health=sick))
    assert caught.value.code == mail_agent.EXIT_ROLLED_BACK
    assert host.tree() == before


PATHS = ("/etc/a", "/etc/b", "/etc/d/c", "/etc/d/e/f", "/usr/g", "/etc/d/e/h")
CONTENTS = st.tuples(
    st.sampled_from(["", "one\n", "two\n"]),
    st.sampled_from(["root", "daemon", "mail"]),
    st.sampled_from(["0644", "0600", "0755", "0440"]),
)
PLACES = st.builds(
    Place,
    before=st.none() | CONTENTS | st.just((LINK, "", "")),
    ours=st.booleans(),
    after=st.none() | CONTENTS,
)
SCENES = st.fixed_dictionaries(dict.fromkeys(PATHS, PLACES))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(scene=SCENES, first=st.integers(1, 140), second=st.integers(1, 60), boot=st.booleans())
def test_any_change_killed_anywhere_twice(
    scene: Scene, first: int, second: int, boot: bool
) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        old, new = both(scene, Path(name) / "calm")
        host = lay(Path(name) / "killed", scene)
        _in_a_process(lambda: host.apply(wanted(scene)), first)
        _in_a_process(lambda: host.settle(boot=boot), second)
        host.settle()
        outcome(host, old, new)


def _in_a_process(action: Callable[[], object], at: int) -> None:
    """Do it in a process that is gone, without any ado, at its ``at``-th call."""
    child = os.fork()
    if child == 0:
        try:
            with faulty(Faults(at, lambda: os._exit(0))):
                action()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
