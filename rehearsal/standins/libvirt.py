"""pulumi-libvirt (0.5.4): volumes, cloud-init disks and domains.

Differences that are meant: a volume whose name is taken is refused (the real provider may adopt
it), so is the deletion of one that a domain or another volume still uses (as an LVM pool would;
a directory pool pulls the file from under the guest), and a domain that does not start is
undefined again.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Final

from rehearsal.progress import RehearsalError

from .base import Call, Created, Failure, Input, Output, Provider, ProviderError, Resource, Session
from .hypervisors import Domain, Hypervisors, Seed, Volume
from .store import Store
from .values import UNKNOWN, Properties, has_unknown

_IMAGES: Final = "/var/lib/libvirt"
_DEFAULT_ROOT: Final = 2 * 1024**3
"""Bytes of a volume whose size comes from its image, which the rehearsal does not look at."""


class Libvirt(Provider):
    """The package ``libvirt``: one instance per hypervisor, told apart by its connection."""

    package = "libvirt"
    config: ClassVar[Mapping[str, Input]] = {"uri": Input("string")}

    def __init__(self, store: Store, hypervisors: Hypervisors) -> None:
        self._books = Books(store, hypervisors)
        resources: list[Resource] = [
            VolumeResource(self._books),
            CloudInitDisk(self._books),
            DomainResource(self._books),
        ]
        super().__init__({resource.token: resource for resource in resources})

    def configure(self, session: Session) -> None:
        uri = session.config.get("uri", "")
        if uri is not UNKNOWN:
            session.config["hypervisor"] = self._books.hypervisors.of(uri)

    def autostart(self) -> list[str]:
        """Start the domains that have ``autostart`` and do not run, as libvirtd does when it
        starts. Returns their names."""
        return self._books.autostart()


class Books:
    """What exists on which hypervisor.

    ``{"<hypervisor>": {"volumes": {key: {...}}, "disks": {id: {...}}, "domains": {id: {...}}}}``
    """

    def __init__(self, store: Store, hypervisors: Hypervisors) -> None:
        self._store = store
        self.hypervisors = hypervisors
        self._locks: dict[str, threading.Lock] = {}

    def hypervisor(self, call: Call) -> str:
        """The hypervisor whose connection a call came over."""
        name: str | None = call.session.config.get("hypervisor")
        if name is None:
            raise ProviderError(
                "failed to connect to libvirt: this connection of the engine was not configured "
                "(a stand-in that was started anew?); run the command again"
            )
        return name

    @contextmanager
    def open(self, hypervisor: str) -> Iterator[dict[str, dict[str, Any]]]:
        """The books of one hypervisor; every change is kept when the block ends."""
        with self._store.edit() as data:
            mine: dict[str, dict[str, Any]] = data.setdefault(hypervisor, {})
            for chapter in ("volumes", "disks", "domains"):
                mine.setdefault(chapter, {})
            yield mine

    def elsewhere(self, hypervisor: str, domain: str) -> str | None:
        """Another hypervisor that has a domain of this name."""
        with self._store.view() as data:
            for other, books in data.items():
                names = [entry["name"] for entry in books.get("domains", {}).values()]
                if other != hypervisor and domain in names:
                    return str(other)
        return None

    @contextmanager
    def busy(self, name: str) -> Iterator[None]:
        """One operation at a time on a machine."""
        with self._store.view():
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            yield

    def domain(self, hypervisor: str, id: str) -> Domain:
        """A domain with its disks and seed as they are in the books."""
        with self.open(hypervisor) as books:
            entry = books["domains"][id]
            seed = books["disks"].get(entry["cloudinit"]) if entry["cloudinit"] else None
            return Domain(
                name=entry["name"],
                disks=tuple(volume_of(books["volumes"][key]) for key in entry["disks"]),
                legs=tuple((bridge, mac) for bridge, mac in entry["legs"]),
                seed=Seed(**seed["content"]) if seed is not None else None,
            )

    def autostart(self) -> list[str]:
        with self._store.view() as data:
            wanted = [
                (hypervisor, id)
                for hypervisor, books in data.items()
                for id, entry in books.get("domains", {}).items()
                if entry["autostart"]
            ]
        started = []
        for hypervisor, id in wanted:
            domain = self.domain(hypervisor, id)
            with self.busy(domain.name):
                if not self.hypervisors.running(hypervisor, domain.name):
                    self.hypervisors.start(hypervisor, domain)
                    started.append(domain.name)
        return started


def volume_of(entry: Mapping[str, Any]) -> Volume:
    """A volume as the books have it."""
    return Volume(entry["name"], entry["pool"], entry["size"], entry["base"] is not None)


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Put the provider's words in front of what went wrong below."""
    try:
        yield
    except (RehearsalError, OSError) as error:
        raise ProviderError(f"{what}: {error}") from error


class VolumeResource(Resource):
    """A storage volume. Its id is libvirt's key: the path of its file."""

    token = "libvirt:index/volume:Volume"
    autonamed = True
    inputs: ClassVar[Mapping[str, Input]] = {
        "baseVolumeId": Input("string", replaces=True),
        "baseVolumeName": Input("string", replaces=True),
        "baseVolumePool": Input("string", replaces=True),
        "format": Input("string", replaces=True),
        "name": Input("string", replaces=True),
        "pool": Input("string", default="default", replaces=True),
        "size": Input("integer", replaces=True),
        "source": Input("string", replaces=True),
        "xml": Input("map", replaces=True),
    }
    outputs: ClassVar[Mapping[str, Output]] = {"size": Output(), "format": Output()}

    def __init__(self, books: Books) -> None:
        self._books = books

    def check(self, inputs: Properties) -> Iterator[Failure]:
        if "source" in inputs:
            for other in ("size", "baseVolumeId", "baseVolumeName"):
                if other in inputs:
                    yield Failure(
                        other, f"'{other}' can't be specified when also 'source' is given"
                    )
        if "baseVolumeId" in inputs and "baseVolumeName" in inputs:
            yield Failure(
                "baseVolumeName",
                "'base_volume_name' can't be specified when also 'base_volume_id' is given",
            )
        size = inputs.get("size", 1)
        if size is not UNKNOWN and size < 1:
            yield Failure("size", f"expected size to be at least (1), got {size}")

    def create(self, inputs: Properties, call: Call) -> Created:
        hypervisor = self._books.hypervisor(call)
        name, pool = inputs["name"], inputs["pool"]
        key = f"{_IMAGES}/{'images' if pool == 'default' else pool}/{name}"
        with self._books.open(hypervisor) as books:
            if key in books["volumes"]:
                raise ProviderError(
                    f"error creating libvirt volume: storage volume '{name}' exists already"
                )
            base = self._base(inputs, books)
            size = inputs.get("size", base["size"] if base is not None else _DEFAULT_ROOT)
            if base is not None and size < base["size"]:
                raise ProviderError(
                    "when 'size' is specified, it shouldn't be smaller than the backing store "
                    "specified with 'base_volume_id' or 'base_volume_name/base_volume_pool'"
                )
            origin = base["key"] if base is not None else inputs.get("source")
            entry = {"key": key, "name": name, "pool": pool, "size": size, "base": origin}
            with _saying("error creating libvirt volume"):
                self._books.hypervisors.create_volume(hypervisor, volume_of(entry))
            books["volumes"][key] = entry
        image = inputs.get("format", "qcow2" if origin is not None else "raw")
        return Created(key, {"size": size, "format": image})

    def _base(self, inputs: Properties, books: Mapping[str, Any]) -> dict[str, Any] | None:
        volumes: dict[str, dict[str, Any]] = books["volumes"]
        if "baseVolumeId" in inputs:
            if inputs["baseVolumeId"] not in volumes:
                raise ProviderError(
                    f"can't retrieve volume ID '{inputs['baseVolumeId']}': Storage volume not "
                    "found: no storage vol with matching key"
                )
            return volumes[inputs["baseVolumeId"]]
        if "baseVolumeName" in inputs:
            for entry in volumes.values():
                pool = inputs.get("baseVolumePool", inputs["pool"])
                if (entry["name"], entry["pool"]) == (inputs["baseVolumeName"], pool):
                    return entry
            raise ProviderError(
                f"can't retrieve base volume with name '{inputs['baseVolumeName']}': Storage "
                "volume not found"
            )
        return None

    def read(self, id: str, state: Properties, call: Call) -> Properties | None:
        with self._books.open(self._books.hypervisor(call)) as books:
            return state if id in books["volumes"] else None

    def delete(self, id: str, state: Properties, call: Call) -> None:
        hypervisor = self._books.hypervisor(call)
        with self._books.open(hypervisor) as books:
            entry = books["volumes"].get(id)
            if entry is None:
                return
            users = [one["name"] for one in books["domains"].values() if id in one["disks"]]
            users += [one["name"] for one in books["volumes"].values() if one["base"] == id]
            if users:
                raise ProviderError(
                    f"can't delete volume {id}: internal error: volume '{entry['name']}' is still "
                    f"in use by {', '.join(sorted(users))}"
                )
            owner = entry.get("domain")
            if owner in [one["name"] for one in books["domains"].values()]:
                owner = None
            if owner is not None and self._books.elsewhere(hypervisor, owner) is not None:
                owner = None
            with _saying(f"can't delete volume {id}"):
                self._books.hypervisors.delete_volume(hypervisor, volume_of(entry), owner)
            del books["volumes"][id]

    def undo(self, created: Created, inputs: Properties, call: Call) -> None:
        self.delete(created.id, inputs, call)


class CloudInitDisk(Resource):
    """A disk with cloud-init's data. Its id is the key of its volume and a UUID."""

    token = "libvirt:index/cloudInitDisk:CloudInitDisk"
    autonamed = True
    inputs: ClassVar[Mapping[str, Input]] = {
        "metaData": Input("string", replaces=True),
        "name": Input("string", replaces=True),
        "networkConfig": Input("string", replaces=True),
        "pool": Input("string", default="default", replaces=True),
        "userData": Input("string", replaces=True),
    }

    def __init__(self, books: Books) -> None:
        self._books = books

    def create(self, inputs: Properties, call: Call) -> Created:
        name, pool = inputs["name"], inputs["pool"]
        with self._books.open(self._books.hypervisor(call)) as books:
            taken = [(one["name"], one["pool"]) for one in books["disks"].values()]
            if (name, pool) in taken:
                raise ProviderError(f"storage volume '{name}' already exists")
            id = f"{_IMAGES}/{'images' if pool == 'default' else pool}/{name};{uuid.uuid4()}"
            books["disks"][id] = {
                "name": name,
                "pool": pool,
                "content": {
                    "user_data": inputs.get("userData", ""),
                    "meta_data": inputs.get("metaData", ""),
                    "network_config": inputs.get("networkConfig", ""),
                },
            }
        return Created(id)

    def read(self, id: str, state: Properties, call: Call) -> Properties | None:
        with self._books.open(self._books.hypervisor(call)) as books:
            return state if id in books["disks"] else None

    def delete(self, id: str, state: Properties, call: Call) -> None:
        with self._books.open(self._books.hypervisor(call)) as books:
            books["disks"].pop(id, None)

    def undo(self, created: Created, inputs: Properties, call: Call) -> None:
        self.delete(created.id, inputs, call)


class DomainResource(Resource):
    """A virtual machine. Its id is a UUID."""

    token = "libvirt:index/domain:Domain"
    autonamed = True
    inputs: ClassVar[Mapping[str, Input]] = {
        "arch": Input("string"),
        "autostart": Input("boolean", default=False),
        "bootDevices": Input("list"),
        "cloudinit": Input("string"),
        "cmdlines": Input("list", replaces=True),
        "consoles": Input("list"),
        "coreosIgnition": Input("string", replaces=True),
        "cpu": Input("map", replaces=True),
        "description": Input("string", replaces=True),
        "disks": Input("list", replaces=True),
        "emulator": Input("string"),
        "filesystems": Input("list", replaces=True),
        "firmware": Input("string", replaces=True),
        "fwCfgName": Input("string", default="opt/com.coreos/config", replaces=True),
        "graphics": Input("map", replaces=True),
        "initrd": Input("string"),
        "kernel": Input("string"),
        "machine": Input("string"),
        "memory": Input("integer", default=512, replaces=True),
        "metadata": Input("string"),
        "name": Input("string", replaces=True),
        "networkInterfaces": Input("list"),
        "nvram": Input("map", replaces=True),
        "qemuAgent": Input("boolean", default=False),
        "running": Input("boolean", default=True),
        "tpm": Input("map"),
        "type": Input("string", default="kvm", replaces=True),
        "vcpu": Input("integer", default=1, replaces=True),
        "video": Input("map"),
        "xml": Input("map"),
    }
    outputs: ClassVar[Mapping[str, Output]] = {
        "arch": Output(),
        "emulator": Output(),
        "machine": Output(),
    }

    def __init__(self, books: Books) -> None:
        self._books = books

    def check(self, inputs: Properties) -> Iterator[Failure]:
        for number, interface in enumerate(inputs.get("networkInterfaces", [])):
            if has_unknown(interface):
                continue
            if "bridge" not in interface:
                yield Failure(
                    f"networkInterfaces[{number}]", "the stand-in plugs machines into bridges only"
                )
        for number, disk in enumerate(inputs.get("disks", [])):
            if disk is not UNKNOWN and "volumeId" not in disk:
                yield Failure(f"disks[{number}]", "the stand-in takes disks by volumeId only")

    def _define(self, inputs: Properties, books: Mapping[str, Any]) -> dict[str, Any]:
        """The entry for a domain. Raises :class:`ProviderError` for what is not there."""
        name, disks = inputs["name"], [disk["volumeId"] for disk in inputs.get("disks", [])]
        for key in disks:
            if key not in books["volumes"]:
                raise ProviderError(
                    f"can't retrieve volume {key}: Storage volume not found: no storage vol with "
                    "matching key"
                )
        for other in books["domains"].values():
            shared = sorted(set(disks) & set(other["disks"]))
            if other["name"] != name and shared:
                raise ProviderError(
                    f'error creating libvirt domain: Failed to get "write" lock: {shared[0]} is '
                    f"a disk of {other['name']}"
                )
        cloudinit = inputs.get("cloudinit")
        if cloudinit is not None and cloudinit not in books["disks"]:
            raise ProviderError(
                f"can't retrieve volume {cloudinit.partition(';')[0]}: Storage volume not found"
            )
        legs = [
            (interface["bridge"], (interface.get("mac") or _mac(name, number)).lower())
            for number, interface in enumerate(inputs.get("networkInterfaces", []))
        ]
        return {
            "name": name,
            "disks": disks,
            "cloudinit": cloudinit,
            "legs": legs,
            "autostart": inputs["autostart"],
        }

    def create(self, inputs: Properties, call: Call) -> Created:
        hypervisor, name = self._books.hypervisor(call), inputs["name"]
        with self._books.busy(name):
            with self._books.open(hypervisor) as books:
                for other, entry in books["domains"].items():
                    if entry["name"] == name:
                        raise ProviderError(
                            "error defining libvirt domain: operation failed: domain "
                            f"'{name}' already exists with uuid {other}"
                        )
                elsewhere = self._books.elsewhere(hypervisor, name)
                if elsewhere is not None:
                    raise ProviderError(
                        f"error defining libvirt domain: '{name}' still exists on {elsewhere}; "
                        "two machines of one name and address cannot run side by side"
                    )
                id = str(uuid.uuid4())
                books["domains"][id] = self._define(inputs, books)
                for key in books["domains"][id]["disks"]:
                    books["volumes"][key]["domain"] = name
            try:
                if inputs["running"]:
                    with _saying("error creating libvirt domain"):
                        self._books.hypervisors.start(
                            hypervisor, self._books.domain(hypervisor, id)
                        )
            except BaseException:
                with self._books.open(hypervisor) as books:
                    del books["domains"][id]
                raise
        return Created(id, self._computed(inputs))

    def _computed(self, inputs: Properties) -> Properties:
        machine = inputs.get("machine", "pc")
        emulator = inputs.get("emulator", "/usr/bin/qemu-system-x86_64")
        return {"arch": inputs.get("arch", "x86_64"), "emulator": emulator, "machine": machine}

    def read(self, id: str, state: Properties, call: Call) -> Properties | None:
        hypervisor = self._books.hypervisor(call)
        with self._books.open(hypervisor) as books:
            entry = books["domains"].get(id)
        if entry is None:
            return None
        running = self._books.hypervisors.running(hypervisor, entry["name"])
        return {**state, "running": running, "autostart": entry["autostart"]}

    def update(self, id: str, old: Properties, new: Properties, call: Call) -> Properties:
        hypervisor, name = self._books.hypervisor(call), new["name"]
        with self._books.busy(name):
            with self._books.open(hypervisor) as books:
                if id not in books["domains"]:
                    raise ProviderError(
                        f"error retrieving libvirt domain by update: Domain not found: no domain "
                        f"with matching uuid '{id}' ({name})"
                    )
                books["domains"][id] = self._define(new, books)
            running = self._books.hypervisors.running(hypervisor, name)
            with _saying("error updating libvirt domain"):
                if new["running"] and not running:
                    self._books.hypervisors.start(hypervisor, self._books.domain(hypervisor, id))
                elif running and not new["running"]:
                    self._books.hypervisors.destroy(hypervisor, name)
        return self._computed(new)

    def delete(self, id: str, state: Properties, call: Call) -> None:
        hypervisor, name = self._books.hypervisor(call), state["name"]
        with self._books.busy(name):
            with self._books.open(hypervisor) as books:
                if id not in books["domains"]:
                    return
            with _saying("error destroying libvirt domain"):
                self._books.hypervisors.destroy(hypervisor, name)
            with self._books.open(hypervisor) as books:
                del books["domains"][id]

    def undo(self, created: Created, inputs: Properties, call: Call) -> None:
        self.delete(created.id, inputs, call)


def _mac(domain: str, number: int) -> str:
    """A MAC address for an interface that the program gives none, in QEMU's range."""
    digest = hashlib.sha256(f"{domain} {number}".encode()).digest()
    return f"52:54:00:{digest[:3].hex(':')}"
