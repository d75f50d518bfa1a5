"""Virtual machines on libvirt. The only module that knows which provider makes them.

pulumi-libvirt is no longer maintained; a successor is a change of this file alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pulumi
import pulumi_libvirt as libvirt

from mailsite import cloud_init
from mailsite.model import Host, Hypervisor, Platform

_GIB = 2**30


@dataclass(frozen=True)
class Carrier:
    """A hypervisor as the graph sees it: how to talk to it, and its copy of the base image."""

    hypervisor: Hypervisor
    provider: libvirt.Provider
    image: libvirt.Volume


@dataclass(frozen=True)
class HypervisorsArgs:
    platform: Platform
    hosts: Iterable[Host]


class Hypervisors(pulumi.ComponentResource):
    """One explicit provider and one base image for each hypervisor that carries ``hosts``."""

    def __init__(
        self,
        name: str,
        args: HypervisorsArgs,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        super().__init__("mail:index:Hypervisors", name, {}, opts)
        used = dict.fromkeys(host.vm.hypervisor for host in args.hosts if host.vm is not None)
        self.carriers: Mapping[str, Carrier] = {
            key: self._carrier(key, args.platform.hypervisors[key]) for key in used
        }
        self.register_outputs({})

    def _carrier(self, key: str, hypervisor: Hypervisor) -> Carrier:
        provider = libvirt.Provider(
            key, uri=hypervisor.uri, opts=pulumi.ResourceOptions(parent=self)
        )
        # A new image is a new volume: machines that run keep the one that they are built on.
        image_name = f"debian-13-{hashlib.sha256(hypervisor.image.encode()).hexdigest()[:12]}"
        image = libvirt.Volume(
            f"{key}-{image_name}",
            name=image_name,
            pool=hypervisor.pool,
            source=hypervisor.image,
            format="qcow2",
            opts=pulumi.ResourceOptions(
                parent=self,
                provider=provider,
                custom_timeouts=pulumi.CustomTimeouts(create="30m"),
            ),
        )
        return Carrier(hypervisor, provider, image)


@dataclass(frozen=True)
class VmArgs:
    """``host_key`` and ``host_public_key``: the machine's own ssh key pair, OpenSSH format.

    ``after`` must be done before anything of the machine that a replacement takes down changes.
    """

    platform: Platform
    host: Host
    carrier: Carrier
    deploy_public_key: str
    host_key: pulumi.Output[str]
    host_public_key: pulumi.Output[str]
    after: Sequence[pulumi.Resource]


class Vm(pulumi.ComponentResource):
    """A machine with a disposable root volume and a data volume that outlives it.

    Most changes of a domain replace it, and libvirt's unique names make the old one go first:
    the members of a cluster must not be replaced at the same time, which ``after`` sees to.

    cloud-init runs at the first boot only. So what it says of the networks is part of the root
    volume's name: with another address the volume is replaced, and the domain with it.
    """

    def __init__(self, name: str, args: VmArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("mail:index:Vm", name, {}, opts)
        host, carrier = args.host, args.carrier
        if host.vm is None:
            raise ValueError(f"{host.name} is an existing machine, not a VM")
        pool = carrier.hypervisor.pool
        generation = cloud_init.generation(args.platform, host)
        root = libvirt.Volume(
            f"{name}-root",
            name=f"{host.name}-root-{generation}",
            pool=pool,
            base_volume_id=carrier.image.id,
            size=host.vm.root_gib * _GIB,
            opts=pulumi.ResourceOptions(
                parent=self,
                provider=carrier.provider,
                depends_on=list(args.after),
                delete_before_replace=True,
            ),
        )
        # A volume that changes size is a volume deleted and made anew: it grows out of band.
        data = libvirt.Volume(
            f"{name}-data",
            name=f"{host.name}-data",
            pool=pool,
            size=host.vm.data_gib * _GIB,
            opts=pulumi.ResourceOptions(
                parent=self,
                provider=carrier.provider,
                protect=True,
                ignore_changes=["size", "source", "base_volume_id", "format", "xml"],
            ),
        )
        user_data: pulumi.Output[str] = pulumi.Output.secret(
            pulumi.Output.all(args.host_key, args.host_public_key).apply(
                lambda keys: cloud_init.user_data(host, args.deploy_public_key, keys[0], keys[1])
            )
        )
        # cloud-init does not run again on a machine that lives: later changes are pushed. One
        # that is built anew gets a new disk under a new name, since a disk that is replaced
        # would keep the old text of everything that is ignored.
        init = libvirt.CloudInitDisk(
            f"{name}-init-{generation}",
            name=f"{host.name}-init-{generation}.iso",
            pool=pool,
            user_data=user_data,
            meta_data=cloud_init.meta_data(host),
            network_config=cloud_init.network_config(args.platform, host),
            opts=pulumi.ResourceOptions(
                parent=self,
                provider=carrier.provider,
                ignore_changes=["user_data", "meta_data", "network_config"],
            ),
        )
        self.domain = libvirt.Domain(
            name,
            name=host.name,
            memory=host.vm.memory_mib,
            vcpu=host.vm.cpus,
            cpu=libvirt.DomainCpuArgs(mode="host-passthrough"),
            # The provider attaches the cloud-init disk by IDE, which q35 machines do not have.
            machine="pc",
            disks=[
                libvirt.DomainDiskArgs(volume_id=root.id),
                libvirt.DomainDiskArgs(volume_id=data.id),
            ],
            cloudinit=init.id,
            network_interfaces=[
                libvirt.DomainNetworkInterfaceArgs(
                    bridge=args.platform.network_of(leg).bridge,
                    mac=cloud_init.mac_address(host, leg),
                )
                for leg in host.interfaces
            ],
            consoles=[libvirt.DomainConsoleArgs(type="pty", target_type="serial", target_port="0")],
            qemu_agent=False,
            autostart=True,
            running=True,
            opts=pulumi.ResourceOptions(
                parent=self,
                provider=carrier.provider,
                depends_on=list(args.after),
                delete_before_replace=True,
            ),
        )
        self.register_outputs({})
