"""A cluster of three on the real engine: what changes when, and what a failure stops.

The members are built as the platform builds its own: a data volume that is protected, a domain
that waits for the member before it, and a push of its configuration that is replaced with it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pulumi
import pulumi_command as command
import pulumi_libvirt as libvirt
import pytest

from rehearsal.engine import Engine
from rehearsal.progress import wait_for
from rehearsal.state import children

from .memory import World
from .project import Outcome, Program, Project, Step

URI = "qemu+ssh://root@hypervisor.example.net/system"
GIB = 2**30
MEMBERS = ("a", "b", "c")


@dataclass(frozen=True)
class Cluster:
    """The data that the program is made from."""

    memory: int = 512
    data_gib: int = 1
    files: Mapping[str, str] = field(default_factory=lambda: {"/etc/motd": "one\ntwo\nthree\n"})
    protected: bool = True
    explicit_provider: bool = True
    leak: bool = False
    """A member's name contains an output of the one before it."""

    @property
    def document(self) -> str:
        return json.dumps({"format": 1, "files": dict(self.files)}, indent=1, sort_keys=True)

    def program(self) -> Program:
        return self._build

    def _build(self) -> None:
        hypervisor = libvirt.Provider("hypervisor", uri=URI)
        ssh = command.Provider("ssh") if self.explicit_provider else None
        here = pulumi.ResourceOptions(provider=hypervisor)
        last: command.remote.Command | None = None
        before: pulumi.Input[str] = ""
        for name in MEMBERS:
            root = libvirt.Volume(f"{name}-root", name=f"{name}-root", size=GIB, opts=here)
            data = libvirt.Volume(
                f"{name}-data",
                name=f"{name}-data",
                size=self.data_gib * GIB,
                opts=pulumi.ResourceOptions(provider=hypervisor, protect=self.protected),
            )
            domain = libvirt.Domain(
                name,
                name=pulumi.Output.concat(name, before) if self.leak else name,
                memory=self.memory,
                disks=[{"volume_id": root.id}, {"volume_id": data.id}],
                network_interfaces=[{"bridge": "br0", "mac": f"52:54:00:00:00:0{name}"}],
                opts=pulumi.ResourceOptions(
                    provider=hypervisor, depends_on=[last] if last is not None else None
                ),
            )
            before = domain.id.apply(lambda id: f"-{id[:4]}")
            last = command.remote.Command(
                f"{name}-push",
                create="apply",
                delete="drain",
                stdin=self.document,
                add_previous_output_in_env=False,
                connection={"host": f"10.0.0.{MEMBERS.index(name) + 1}", "user": "deploy"},
                opts=pulumi.ResourceOptions(
                    provider=ssh, depends_on=[domain], replace_with=[domain]
                ),
            )
        pulumi.export("done", last.stdout if last is not None else None)


@pytest.fixture(scope="module")
def created(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Project, Outcome]]:
    """The cluster, created once, and how that went."""
    folder = tmp_path_factory.mktemp("cluster")
    project = Project(folder, engine, World(uris={"hypervisor": URI}))
    outcome = project.up(Cluster().program())
    yield project, outcome
    project.close()


@pytest.fixture
def cluster(created: tuple[Project, Outcome], tmp_path: Path) -> Iterator[Project]:
    """A cluster of its own for a test, as it was created."""
    project = created[0].copy(tmp_path)
    yield project
    project.close()


def of_members(journal: list[str]) -> list[str]:
    """The journal without the volumes, which come in any order."""
    return [line for line in journal if not line.endswith(("-data", "-root"))]


def test_members_are_created_one_after_the_other(created: tuple[Project, Outcome]) -> None:
    _, outcome = created
    assert outcome.ok, outcome.error
    assert of_members(outcome.journal) == [
        *("start a", "run a-push: apply"),
        *("start b", "run b-push: apply"),
        *("start c", "run c-push: apply"),
    ]


def test_a_second_run_touches_nothing(cluster: Project) -> None:
    outcome = cluster.up(Cluster().program())
    assert outcome.ok, outcome.error
    assert outcome.steps == []
    assert outcome.journal == []


def test_a_changed_file_is_pushed_to_one_member_at_a_time(cluster: Project) -> None:
    changed = Cluster(files={"/etc/motd": "one\n2\nthree\n"})
    outcome = cluster.up(changed.program())
    assert outcome.journal == [f"run {name}-push: apply" for name in MEMBERS]
    assert [run.stdin for run in cluster.world.runs] == [changed.document] * 3
    assert outcome.steps == [Step("update", f"{name}-push") for name in MEMBERS]


def test_the_preview_shows_the_changed_line_and_contacts_nobody(cluster: Project) -> None:
    changed = Cluster(files={"/etc/motd": "one\n2\nthree\n", "/etc/issue": "new\n"})
    outcome = cluster.preview(changed.program())
    assert outcome.journal == []
    lines = [line.strip() for line in outcome.text.splitlines()]
    assert lines.count("- two") == 3, outcome.text
    assert lines.count("+ 2") == 3
    assert any(line.startswith("~ /etc/motd") for line in lines)
    assert any(line.startswith("+ /etc/issue") for line in lines)
    assert not any("three" in line and line[0] in "+-" for line in lines)


def test_a_replaced_member_is_drained_and_configured_before_the_next_one_goes(
    cluster: Project,
) -> None:
    outcome = cluster.up(Cluster(memory=1024).program())
    assert outcome.ok, outcome.error
    assert outcome.journal == [
        line
        for name in MEMBERS
        for line in (
            f"run {name}-push: drain",
            f"destroy {name}",
            f"start {name}",
            f"run {name}-push: apply",
        )
    ]


def test_a_refusing_member_stops_the_roll_out_and_is_tried_again(cluster: Project) -> None:
    changed = Cluster(files={"/etc/motd": "broken\n"})
    cluster.world.failing["b-push"] = "postfix: fatal: /etc/postfix/main.cf, line 7"
    outcome = cluster.up(changed.program())
    assert not outcome.ok
    assert outcome.journal == ["run a-push: apply", "run b-push: apply"]
    assert "postfix: fatal: /etc/postfix/main.cf, line 7" in outcome.text
    assert "Process exited with status 1" in outcome.text

    cluster.world.failing.clear()
    again = cluster.up(changed.program())
    assert again.ok, again.error
    assert again.journal == ["run b-push: apply", "run c-push: apply"]


def test_a_domain_that_does_not_start_leaves_the_others_running(cluster: Project) -> None:
    cluster.world.broken.add("a")
    outcome = cluster.up(Cluster(memory=1024).program())
    assert not outcome.ok
    assert outcome.journal == ["run a-push: drain", "destroy a"]
    assert sorted(cluster.world.domains) == ["b", "c"]

    cluster.world.broken.clear()
    again = cluster.up(Cluster(memory=1024).program())
    assert again.ok, again.error
    resumed = [line for line in again.journal if not line.endswith("drain")]
    assert resumed[:2] == ["start a", "run a-push: apply"]


def test_a_protected_data_volume_is_not_replaced(cluster: Project) -> None:
    outcome = cluster.up(Cluster(data_gib=2).program())
    assert not outcome.ok
    assert "protect" in outcome.text
    assert not any(line.startswith(("delete", "destroy")) for line in outcome.journal)


def test_a_refresh_finds_everything_as_it_was_left(cluster: Project) -> None:
    outcome = cluster.refresh(Cluster().program())
    assert outcome.ok, outcome.error
    assert cluster.up(Cluster().program()).steps == []
    assert cluster.world.journal == []


def test_a_machine_that_was_switched_off_is_started_again_after_a_refresh(
    cluster: Project,
) -> None:
    del cluster.world.domains["b"]
    assert cluster.refresh(Cluster().program()).ok
    outcome = cluster.up(Cluster().program())
    assert outcome.ok, outcome.error
    assert outcome.journal == ["start b"]


def test_an_unprotected_data_volume_would_be_lost(cluster: Project) -> None:
    """What the test above guards against: without protection the volume goes."""
    cluster.up(Cluster(protected=False).program())
    outcome = cluster.up(Cluster(data_gib=2, protected=False).program())
    assert outcome.ok, outcome.error
    assert "delete a-data" in outcome.journal


def test_an_output_that_flows_between_members_takes_all_of_them_down_at_once(
    engine: Engine, tmp_path: Path
) -> None:
    """Why members may only share static data (and why a graph test looks for it)."""
    project = Project(tmp_path, engine, World(uris={"hypervisor": URI}))
    try:
        leaking = Cluster(leak=True)
        assert project.up(leaking.program()).ok
        outcome = project.up(replace(leaking, memory=1024).program())
    finally:
        project.close()
    changes = [line.split()[0] for line in outcome.journal if "run" not in line]
    assert changes[:4] == ["destroy", "destroy", "destroy", "start"]


def test_a_killed_run_is_finished_by_the_next(engine: Engine, tmp_path: Path) -> None:
    world = World(uris={"hypervisor": URI}, slow={"b": threading.Event()})
    project = Project(tmp_path, engine, world)
    try:
        with ThreadPoolExecutor() as pool:
            run = pool.submit(project.up, Cluster().program())
            wait_for(lambda: "b" in world.starting, timeout=30, what="b to be started")
            [pid] = [pid for pid in children(os.getpid()) if is_engine(pid)]
            os.kill(pid, signal.SIGKILL)
            assert not run.result().ok
        world.slow.pop("b").set()
        wait_for(lambda: "destroy b" in world.journal, timeout=10, what="b to be undone")
        project.select(Cluster().program()).cancel()  # takes the dead engine's lock away
        outcome = project.up(Cluster().program())
    finally:
        project.close()
    assert outcome.ok, outcome.error
    assert of_members(outcome.journal) == [
        *("start b", "run b-push: apply"),
        *("start c", "run c-push: apply"),
    ]


def is_engine(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == "pulumi"


def test_a_follower_of_a_replacement_needs_a_provider_of_its_own(
    engine: Engine, tmp_path: Path
) -> None:
    project = Project(tmp_path, engine, World(uris={"hypervisor": URI}))
    try:
        plain = Cluster(explicit_provider=False)
        assert project.up(plain.program()).ok
        outcome = project.up(replace(plain, memory=1024).program())
        assert "unknown provider" in outcome.text
    finally:
        project.close()
