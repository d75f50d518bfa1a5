"""``down`` and what comes after a rehearsal that was killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rehearsal import cleanup, image, network
from rehearsal.machine import Machine
from rehearsal.network import Network
from rehearsal.progress import Progress, RehearsalError, wait_for
from rehearsal.state import State

from .isolation import isolated, needs_machines
from .sample import platform

pytestmark = [needs_machines, pytest.mark.usefixtures("names")]

NAME = "left.net.pelican.example"
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def layers() -> image.Layers:
    return image.ensure(Progress())


def bring_up(root: Path, layers: image.Layers) -> None:
    """Network, a machine with a disk, and a process in the operator's network."""
    state = State(root)
    cleanup.claim(state)
    sealed = Network(platform(), state)
    sealed.up()
    disk = state.folder("volumes") / "disk.img"
    disk.touch()
    os.truncate(disk, 16 << 20)
    Machine(
        NAME,
        layers.base,
        ((sealed.bridge_of("north-local"), "52:54:00:aa:bb:02"),),
        state,
        disks={"/dev/vdb": disk},
    ).boot()
    left = subprocess.Popen(
        ["nsenter", f"--net={network.NETNS / network.OPERATOR}", "--", "sleep", "600"],
        start_new_session=True,
    )
    state.record("left", left.pid)


def bring_up_and_die(root: Path, layers: image.Layers) -> None:
    child = multiprocessing.get_context("fork").Process(
        target=lambda: (bring_up(root, layers), os.kill(os.getpid(), signal.SIGKILL))
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@isolated
def test_down_after_a_killed_run_leaves_nothing(tmp_path: Path, layers: image.Layers) -> None:
    root = tmp_path / "state"
    bring_up_and_die(root, layers)
    kinds = {line.split()[0] for line in cleanup.leftovers(root)}
    assert kinds == {"process", "mount", "loop", "namespace", "cgroup"}
    cleanup.down(State(root), QUIET)
    assert not root.exists()
    assert not cleanup.leftovers(root, [NAME])
    assert cleanup.owner() is None
    assert network.namespaces() == ()


@isolated
def test_down_works_without_the_records_of_the_run(tmp_path: Path, layers: image.Layers) -> None:
    root = tmp_path / "state"
    bring_up_and_die(root, layers)
    for name in ("processes.json", "network.json", f"machines/{NAME}/machine.json"):
        (root / name).unlink()
    cleanup.down(State(root), QUIET)
    assert not root.exists()
    assert not cleanup.leftovers(root, [NAME])


@isolated
def test_the_next_run_takes_over_from_a_killed_one(tmp_path: Path, layers: image.Layers) -> None:
    root = tmp_path / "state"
    bring_up_and_die(root, layers)
    state = State(root)
    machine = Machine.load(NAME, state)
    assert machine is not None
    assert machine.alive()
    before = machine._init()
    cleanup.claim(state)
    Network(platform(), state).up()
    machine.boot()
    assert machine._init() == before, "a machine that runs is not touched"
    cleanup.down(state, QUIET)
    assert not cleanup.leftovers(root, [NAME])


@isolated
def test_one_machine_carries_one_rehearsal(tmp_path: Path, layers: image.Layers) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    bring_up_and_die(first, layers)
    with pytest.raises(RehearsalError, match=f"its state in {first}"):
        cleanup.claim(State(second))
    cleanup.down(State(second), QUIET)
    assert Machine.all(State(first))[0].alive(), "another one's rehearsal is left alone"
    assert not second.exists()

    # With nothing of it running any more it is only remains, and those are removed.
    for process in cleanup._processes(first):
        process.send(signal.SIGKILL)
    wait_for(lambda: not cleanup._processes(first), timeout=10, what="all of it to die")
    state = State(second)
    cleanup.claim(state)
    assert cleanup.owner() == second
    assert network.namespaces() == ()
    cleanup.down(state, QUIET)


def test_a_process_id_that_was_given_again_is_not_killed(tmp_path: Path) -> None:
    state = State(tmp_path)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        known = state.record("ours", stranger.pid)
        (tmp_path / "processes.json").write_text(
            f'{{"ours": {{"pid": {known.pid}, "start": {known.start - 1}}}}}'
        )
        assert state.process("ours") is None
        assert not state.processes()["ours"].send(signal.SIGKILL)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
