"""What the libvirt stand-in makes of volumes and domains.

The provider (:mod:`.libvirt`) keeps the books: which names are taken, what is in use. The muscle
is behind :class:`Hypervisors`: :class:`Machines` boots real machines of the
rehearsal.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from mailsite.model import Hypervisor, Platform
from rehearsal.machine import Machine
from rehearsal.network import Network
from rehearsal.state import State

from .base import ProviderError

SEED: Final = "var/lib/cloud/seed/nocloud"
"""Where cloud-init's NoCloud data source looks, below a machine's root."""

DATA_DEVICES: Final = ("/dev/vdb", "/dev/vdc", "/dev/vdd")
"""Devices of the disks after the root disk, in the order of the domain."""


@dataclass(frozen=True)
class Volume:
    """A storage volume. ``is_root``: it starts from a base image, and carries a system."""

    name: str
    pool: str
    size: int
    """Bytes."""
    is_root: bool


@dataclass(frozen=True)
class Seed:
    """Content of a cloud-init disk."""

    user_data: str
    meta_data: str
    network_config: str


@dataclass(frozen=True)
class Domain:
    """A virtual machine. ``legs``: bridge on the hypervisor and MAC address of each interface."""

    name: str
    disks: tuple[Volume, ...]
    """The root volume, then data volumes."""
    legs: tuple[tuple[str, str], ...]
    seed: Seed | None


class Hypervisors(Protocol):
    """The hypervisors of a platform, by name. Methods raise :class:`ProviderError`."""

    def of(self, uri: str) -> str:
        """Name of the hypervisor that a connection URI leads to."""

    def create_volume(self, hypervisor: str, volume: Volume) -> None: ...

    def delete_volume(self, hypervisor: str, volume: Volume, domain: str | None) -> None:
        """Remove a volume's content; ``domain`` is the last one that used it."""

    def start(self, hypervisor: str, domain: Domain) -> None:
        """Start the domain; returns when its init runs."""

    def destroy(self, hypervisor: str, domain: str) -> None:
        """Pull the plug of a domain, as virDomainDestroy does. Its volumes stay."""

    def running(self, hypervisor: str, domain: str) -> bool: ...


def by_uri(uri: str, uris: Mapping[str, str]) -> str:
    """Name of the hypervisor with this connection URI. Raises :class:`ProviderError`."""
    for name, known in uris.items():
        if known == uri:
            return name
    raise ProviderError(
        f"failed to connect to libvirt at {uri!r}: no hypervisor of the site data has this uri; "
        f"there are {', '.join(sorted(uris.values())) or 'none'}"
    )


class Machines:
    """Hypervisors whose domains are machines of the rehearsal (:mod:`rehearsal.machine`).

    A domain's root is an overlay on image layers, kept until its root volume is deleted; a data
    volume is a sparse image file under ``volumes/<hypervisor>/``. The interfaces are plugged
    into the bridges of the sealed network that stand for the hypervisor's own.

    :param layers: image layers for a new machine of this name, lowest first
    """

    def __init__(
        self,
        platform: Platform,
        network: Network,
        state: State,
        layers: Callable[[str], Sequence[Path]],
    ) -> None:
        self._platform = platform
        self._network = network
        self._state = state
        self._layers = layers

    def of(self, uri: str) -> str:
        return by_uri(uri, {name: one.uri for name, one in self._platform.hypervisors.items()})

    def _image(self, hypervisor: str, volume: Volume) -> Path:
        return self._state.folder("volumes", hypervisor) / f"{volume.pool}-{volume.name}.img"

    def create_volume(self, hypervisor: str, volume: Volume) -> None:
        if volume.is_root:
            return
        with self._image(hypervisor, volume).open("xb") as image:
            image.truncate(volume.size)

    def delete_volume(self, hypervisor: str, volume: Volume, domain: str | None) -> None:
        if volume.is_root:
            machine = Machine.load(domain, self._state) if domain is not None else None
            if machine is not None:
                machine.destroy()
            return
        image = self._image(hypervisor, volume)
        _detach(image)
        image.unlink(missing_ok=True)

    def _bridge(self, hypervisor: Hypervisor, bridge: str) -> str:
        for name, network in self._platform.networks.items():
            if network.site == hypervisor.site and network.bridge == bridge:
                return self._network.bridge_of(name)
        raise ProviderError(
            "error creating libvirt domain: Cannot get interface MTU on "
            f"'{bridge}': No such device (no network of site {hypervisor.site} has this bridge)"
        )

    def start(self, hypervisor: str, domain: Domain) -> None:
        data = [volume for volume in domain.disks if not volume.is_root]
        legs = [
            (self._bridge(self._platform.hypervisors[hypervisor], bridge), mac)
            for bridge, mac in domain.legs
        ]
        machine = Machine(
            name=domain.name,
            layers=self._layers(domain.name),
            legs=legs,
            state=self._state,
            disks={
                device: self._image(hypervisor, volume)
                for device, volume in zip(DATA_DEVICES, data, strict=False)
            },
        )
        previous = Machine.load(domain.name, self._state)
        if previous is not None and previous.upper.exists():
            machine.layers = previous.layers  # a root volume stays on the image it began with
        if domain.seed is not None:
            _plant(machine.mount() / SEED, domain.seed)
        machine.boot()

    def destroy(self, hypervisor: str, domain: str) -> None:
        machine = Machine.load(domain, self._state)
        if machine is not None:
            machine.kill()

    def running(self, hypervisor: str, domain: str) -> bool:
        machine = Machine.load(domain, self._state)
        return machine is not None and machine.alive()


def _plant(folder: Path, seed: Seed) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)  # the user data holds the ssh host keys
    for name, text in (
        ("user-data", seed.user_data),
        ("meta-data", seed.meta_data),
        ("network-config", seed.network_config),
    ):
        path = folder / name
        if text or name != "network-config":
            path.write_text(text)
        else:
            path.unlink(missing_ok=True)


def _detach(image: Path) -> None:
    """Free the loop devices of an image that no machine uses any more."""
    listed = subprocess.run(
        ["losetup", "--noheadings", "--output", "NAME", "--associated", str(image)],
        capture_output=True,
        text=True,
        check=True,
    )
    for device in listed.stdout.split():
        subprocess.run(["losetup", "--detach", device], capture_output=True, check=True)
