"""The libvirt stand-in, asked as the engine asks it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rehearsal.standins.base import serving
from rehearsal.standins.hypervisors import Seed, Volume
from rehearsal.standins.libvirt import CloudInitDisk, DomainResource, Libvirt, VolumeResource
from rehearsal.standins.store import Store
from rehearsal.standins.values import UNKNOWN
from tests.engine.client import Client, Object, Refused, connection
from tests.engine.memory import Hypervisors, World

URIS = {"one": "qemu+ssh://root@one.example.net/system", "two": "qemu:///system"}
VOLUME, DISK, DOMAIN = VolumeResource.token, CloudInitDisk.token, DomainResource.token
GIB = 2**30


@pytest.fixture
def world() -> World:
    return World(uris=URIS)


@pytest.fixture
def provider(world: World, tmp_path: Path) -> Libvirt:
    return Libvirt(Store(tmp_path / "libvirt.json"), Hypervisors(world))


@pytest.fixture
def port(provider: Libvirt) -> Iterator[int]:
    with serving(provider) as server:
        yield server.port


@pytest.fixture
def one(port: int) -> Iterator[Client]:
    """A connection to the hypervisor ``one``."""
    with connection(port, uri=URIS["one"]) as client:
        yield client


@pytest.fixture
def two(port: int) -> Iterator[Client]:
    with connection(port, uri=URIS["two"]) as client:
        yield client


def volume(client: Client, name: str, **more: object) -> Object:
    return client.create(VOLUME, {"name": name, "size": GIB, **more})


def domain(client: Client, name: str, *disks: Object, **more: object) -> Object:
    leg = {"bridge": "br0", "mac": "52:54:00:AB:00:01"}
    return client.create(
        DOMAIN,
        {
            "name": name,
            "disks": [{"volumeId": disk.id} for disk in disks],
            "networkInterfaces": [leg],
            **more,
        },
    )


def test_a_machine_has_its_volumes_its_legs_and_its_seed(one: Client, world: World) -> None:
    base = one.create(VOLUME, {"name": "debian", "source": "debian.qcow2"})
    root = volume(one, "a-root", baseVolumeId=base.id, size=8 * GIB)
    data = volume(one, "a-data")
    seed = one.create(DISK, {"name": "a.iso", "userData": "#cloud-config\n", "metaData": "m"})
    made = domain(one, "a", root, data, cloudinit=seed.id)
    assert world.domains["a"].disks == (
        Volume("a-root", "default", 8 * GIB, is_root=True),
        Volume("a-data", "default", GIB, is_root=False),
    )
    assert world.domains["a"].legs == (("br0", "52:54:00:ab:00:01"),)
    assert world.domains["a"].seed == Seed("#cloud-config\n", "m", "")
    assert made.state["machine"] == "pc"
    assert root.state["format"] == "qcow2"


def test_instances_are_told_apart_by_their_connection(one: Client, two: Client) -> None:
    volume(one, "same")
    volume(two, "same")
    with pytest.raises(Refused, match="storage volume 'same' exists already"):
        volume(one, "same")


def test_an_unknown_uri_is_refused(port: int) -> None:
    with (
        pytest.raises(Refused, match="no hypervisor of the site data has this uri"),
        connection(port, uri="qemu+ssh://elsewhere/system"),
    ):
        pass


def test_a_domain_name_is_taken_once_on_all_hypervisors(one: Client, two: Client) -> None:
    domain(one, "a")
    with pytest.raises(Refused, match="domain 'a' already exists with uuid"):
        domain(one, "a")
    with pytest.raises(Refused, match="still exists on one"):
        domain(two, "a")


def test_a_volume_in_use_is_not_deleted(one: Client, world: World) -> None:
    data = volume(one, "a-data")
    machine = domain(one, "a", data)
    with pytest.raises(Refused, match="'a-data' is still in use by a"):
        one.delete(data)
    one.delete(machine)
    one.delete(data)
    assert world.journal[-2:] == ["destroy a", "delete a-data"]


def test_a_base_volume_in_use_is_not_deleted(one: Client) -> None:
    base = volume(one, "base")
    volume(one, "root", baseVolumeId=base.id)
    with pytest.raises(Refused, match="in use by root"):
        one.delete(base)


def test_a_disk_of_another_machine_is_locked(one: Client) -> None:
    data = volume(one, "a-data")
    domain(one, "a", data)
    with pytest.raises(Refused, match='Failed to get "write" lock'):
        domain(one, "b", data)


def test_what_is_missing_is_named(one: Client) -> None:
    with pytest.raises(Refused, match="can't retrieve volume /nowhere"):
        domain(one, "a", Object(VOLUME, "/nowhere", {}, {}))
    with pytest.raises(Refused, match="can't retrieve volume ID '/nowhere'"):
        volume(one, "root", baseVolumeId="/nowhere")
    with pytest.raises(Refused, match=r"can't retrieve volume lost\.iso"):
        domain(one, "a", cloudinit="lost.iso;1234")


def test_a_volume_is_not_smaller_than_its_base(one: Client) -> None:
    base = volume(one, "base", size=2 * GIB)
    with pytest.raises(Refused, match="smaller than the backing store"):
        volume(one, "root", baseVolumeId=base.id, size=GIB)
    assert volume(one, "same").state["size"] == GIB
    inherited = one.create(VOLUME, {"name": "root", "baseVolumeId": base.id})
    assert inherited.state["size"] == 2 * GIB


def test_a_source_sets_the_size(one: Client) -> None:
    _, failures = one.check(VOLUME, {"name": "x", "source": "x.qcow2", "size": GIB})
    assert list(failures) == ["size"]


def test_a_machine_that_does_not_start_is_not_left_behind(one: Client, world: World) -> None:
    world.broken.add("a")
    with pytest.raises(Refused, match="error creating libvirt domain"):
        domain(one, "a")
    world.broken.clear()
    domain(one, "a")


def test_a_name_may_be_left_out_and_stays_the_same(one: Client) -> None:
    checked, _ = one.check(VOLUME, {"size": GIB})
    assert checked["name"].startswith("it-")
    again, _ = one.check(VOLUME, {"size": 2 * GIB}, checked)
    assert again["name"] == checked["name"]
    assert not one.diff(VOLUME, checked, again).delete_first


def test_a_given_name_makes_a_replacement_delete_first(one: Client) -> None:
    old, _ = one.check(DOMAIN, {"name": "a", "memory": 512})
    more, _ = one.check(DOMAIN, {"name": "a", "memory": 1024})
    answer = one.diff(DOMAIN, old, more)
    assert (answer.replaces, answer.delete_first) == (["memory"], True)
    assert answer.paths == {"memory": "UPDATE_REPLACE"}
    other, _ = one.check(DOMAIN, {"name": "b", "memory": 512})
    assert not one.diff(DOMAIN, old, other).delete_first


def test_a_change_in_place_replaces_nothing(one: Client) -> None:
    old, _ = one.check(DOMAIN, {"name": "a", "cloudinit": "x"})
    new, _ = one.check(DOMAIN, {"name": "a", "cloudinit": "y", "autostart": True})
    answer = one.diff(DOMAIN, old, new)
    assert answer.changed
    assert answer.replaces == []
    assert answer.paths == {"autostart": "UPDATE", "cloudinit": "UPDATE"}
    assert not one.diff(DOMAIN, old, new, ignoreChanges=["autostart", "cloudinit"]).changed


def test_a_stopped_machine_is_seen_and_started_again(one: Client, world: World) -> None:
    machine = domain(one, "a")
    del world.domains["a"]
    found = one.read(machine)
    assert found is not None
    assert found["running"] is False
    one.update(machine, machine.inputs)
    assert "a" in world.domains
    one.update(machine, {**machine.inputs, "running": False})
    assert "a" not in world.domains


def test_what_was_deleted_elsewhere_is_gone(one: Client) -> None:
    data, machine = volume(one, "data"), domain(one, "a")
    for it in (machine, data):
        assert one.read(it) is not None
        one.delete(it)
        assert one.read(it) is None
        one.delete(it)


def test_a_preview_makes_nothing_and_knows_no_more_than_is_given(one: Client, world: World) -> None:
    outputs = one.preview(VOLUME, {"name": "x", "baseVolumeId": UNKNOWN, "size": GIB})
    assert outputs["size"] == GIB
    assert outputs["format"] is UNKNOWN
    one.preview(DOMAIN, {"name": "a", "disks": [{"volumeId": UNKNOWN}]})
    assert world.journal == []


def test_an_interface_needs_a_bridge(one: Client) -> None:
    _, failures = one.check(DOMAIN, {"networkInterfaces": [{"networkName": "default"}]})
    assert list(failures) == ["networkInterfaces[0]"]


def test_the_books_outlive_the_server(one: Client, world: World, tmp_path: Path) -> None:
    domain(one, "a", volume(one, "a-data"), autostart=True)
    domain(one, "b")
    world.domains.clear()
    again = Libvirt(Store(tmp_path / "libvirt.json"), Hypervisors(world))
    assert again.autostart() == ["a"]
    assert list(world.domains) == ["a"]
    assert again.autostart() == []


def test_a_connection_that_was_not_configured_says_what_to_do(port: int) -> None:
    import grpc

    with (
        grpc.insecure_channel(
            f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]
        ) as channel,
        pytest.raises(Refused, match="run the command again"),
    ):
        volume(Client(channel), "x")


def test_another_resource_is_named(one: Client) -> None:
    with pytest.raises(Refused, match="has no libvirt:index/pool:Pool"):
        one.check("libvirt:index/pool:Pool", {})
