"""Machines for real: boot, network, plug, reboot, disks, and what is left of them."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from rehearsal import cleanup, image, machine, network
from rehearsal.machine import Machine, MachineError
from rehearsal.network import Network
from rehearsal.progress import Progress, wait_for
from rehearsal.state import State, children

from .isolation import isolated, needs_machines
from .sample import platform

pytestmark = [needs_machines, pytest.mark.usefixtures("names")]

NAME = "probe.net.pelican.example"
MAC = "52:54:00:aa:bb:01"
ADDRESS = "10.70.1.50"
USER_DATA = {
    "hostname": "probe",
    "fqdn": NAME,
    "locale": False,
    "manage_etc_hosts": True,
    "write_files": [{"path": "/root/told", "content": "by cloud-init\n"}],
}
NETWORK_CONFIG = {
    "version": 2,
    "ethernets": {
        "leg0": {
            "match": {"macaddress": MAC},
            "addresses": [f"{ADDRESS}/24", "fd70:1::50/64"],
            "routes": [
                {"to": "0.0.0.0/0", "via": "10.70.1.1"},
                {"to": "::/0", "via": "fd70:1::1"},
            ],
        }
    },
}


@pytest.fixture(scope="module")
def layers() -> image.Layers:
    return image.ensure(Progress())


def prepared(state: State, layers: image.Layers, **more: object) -> Machine:
    """A machine with a seed for cloud-init in a network that is up."""
    sealed = Network(platform(), state)
    sealed.up()
    legs = ((sealed.bridge_of("north-local"), MAC),)
    made = Machine(NAME, layers.base, legs, state, **more)  # type: ignore[arg-type]
    seed = made.mount() / "var/lib/cloud/seed/nocloud"
    seed.mkdir(parents=True)
    (seed / "meta-data").write_text("instance-id: probe\n")
    (seed / "user-data").write_text("#cloud-config\n" + json.dumps(USER_DATA))
    (seed / "network-config").write_text(json.dumps(NETWORK_CONFIG))
    return made


def banner(address: str, timeout: float = 0.3) -> str:
    """What port 22 says; empty when nobody answers."""
    try:
        with (
            network.enter(network.OPERATOR),
            socket.create_connection((address, 22), timeout=timeout) as caller,
        ):
            return caller.recv(7).decode()
    except OSError:
        return ""


@isolated
def test_a_machine_lives_through_plug_reboot_and_removal(
    tmp_path: Path, layers: image.Layers
) -> None:
    state = State(tmp_path / "state")
    disk = tmp_path / "disk.img"
    disk.touch()
    os.truncate(disk, 64 << 20)
    probe = prepared(state, layers, disks={"/dev/vdb": disk})
    try:
        probe.boot()
        probe.wait_booted()
        assert probe.run(["systemctl", "is-system-running"]).stdout.strip() == "running"
        assert probe.run(["cat", "/root/told"]).stdout == "by cloud-init\n"
        assert probe.run(["hostname", "-f"]).stdout.strip() == NAME
        for address in (ADDRESS, "fd70:1::50"):
            wait_for(lambda a=address: banner(a), timeout=5, what=address)  # type: ignore[misc]
        probe.run(["mkfs.ext4", "-q", "-L", "probe", "/dev/vdb"])
        probe.run(
            ["sh", "-c", "mount /dev/vdb /mnt && echo kept >/mnt/file && sync && umount /mnt"]
        )

        with pytest.raises(MachineError, match="exit 3: no"):
            probe.run(["sh", "-c", "echo no >&2; exit 3"])

        # The plug: at once, no word on the network, and it comes back with its files.
        probe.run(["sh", "-c", "echo kept >/root/file; sync"])
        probe.kill()
        assert not probe.alive()
        assert banner(ADDRESS) == ""
        assert "Started" in probe.logs("-n", "200")
        with pytest.raises(MachineError, match="does not run"):
            probe.run(["true"])
        probe.boot()
        probe.wait_booted()
        assert probe.run(["cat", "/root/file"]).stdout == "kept\n"
        probe.run(["mount", "/dev/vdb", "/mnt"])
        assert probe.run(["cat", "/mnt/file"]).stdout == "kept\n"

        # A reboot from inside keeps the machine ours.
        before = probe._init()
        probe.run(["systemctl", "reboot"], check=False)
        wait_for(lambda: probe.alive() and probe._init() != before, timeout=20, what="another init")
        probe.wait_booted()

        network.cut(NAME)
        assert banner(ADDRESS) == ""
        network.heal(NAME)
        wait_for(lambda: banner(ADDRESS), timeout=10, what="the healed machine")

        probe.stop()
        assert not probe.alive()
        found = Machine.load(NAME, state)
        assert found == probe
    finally:
        probe.destroy()
    assert cleanup.leftovers(state.root) == [f"namespace {n}" for n in network.fixed_namespaces()]
    assert not probe.folder.exists()
    assert disk.exists()


@isolated
def test_two_machines_do_not_share_cgroups(tmp_path: Path, layers: image.Layers) -> None:
    state = State(tmp_path)
    probe = prepared(state, layers)
    other = Machine("other.net.pelican.example", layers.base, (), state)
    try:
        for one in (probe, other):
            one.boot()
        groups = [
            Path(f"/proc/{one._init().pid}/cgroup").read_text()  # type: ignore[union-attr]
            for one in (probe, other)
        ]
        assert all(f"mail-rehearsal/{NAME}/" in line for line in unified(groups[0]))
        assert all("mail-rehearsal/other" in line for line in unified(groups[1]))
        # The pair of machines has a systemd each, on a tree of version 2 of its own.
        for one in (probe, other):
            said = one.run(["stat", "-fc", "%T", "/sys/fs/cgroup"]).stdout.strip()
            assert said == "cgroup2fs"
    finally:
        probe.destroy()
        other.destroy()
    assert not machine.cgroups(NAME)


def unified(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("0::")]


@isolated
def test_a_machine_whose_image_is_broken_says_why(tmp_path: Path, layers: image.Layers) -> None:
    state = State(tmp_path)
    probe = prepared(state, layers)
    init = probe.root / "usr/lib/systemd/systemd"
    init.unlink()
    with pytest.raises(MachineError, match=f"{NAME} did not start: .*"):
        probe.boot()
    assert not probe.alive()
    assert not network.inhabitants([probe.namespace])
    probe.destroy()


@isolated
def test_a_machine_whose_supervisor_was_killed_is_replaced(
    tmp_path: Path, layers: image.Layers
) -> None:
    state = State(tmp_path)
    probe = prepared(state, layers)
    try:
        probe.boot()
        probe.wait_booted()
        shell = state.process(f"machine {NAME}")
        assert shell is not None
        (nspawn,) = children(shell.pid)
        os.kill(shell.pid, signal.SIGKILL)
        os.kill(nspawn, signal.SIGKILL)
        wait_for(lambda: not shell.alive(), timeout=5, what="the supervisor to die")
        assert network.inhabitants([probe.namespace]), "the machine itself lives on"
        probe.boot()
        probe.wait_booted()
        assert probe.run(["hostname"]).stdout.strip() == "probe"
    finally:
        probe.destroy()
