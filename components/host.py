"""One host of the platform: a machine, made or found, and the configuration pushed to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pulumi
from pulumi_command import Provider, remote

from components.config_push import ConfigPush, ConfigPushArgs
from components.secrets import SecretStore
from components.vm import Carrier, Vm, VmArgs
from mailsite import secret_names
from mailsite.bundle import Bundle, compose
from mailsite.model import CLIENT_ROLES, Platform, Role
from mailsite.model import Host as SiteHost

#: Each role that the platform builds -> type of the component that owns its hosts.
CLUSTERS: Mapping[Role, str] = {
    Role.CERTIFICATES: "mail:index:Certificates",
    Role.SMTP_OUT: "mail:index:SmtpOutCluster",
    Role.SMTP_IN: "mail:index:SmtpInCluster",
    Role.RSPAMD: "mail:index:RspamdCluster",
    Role.MAILDROP: "mail:index:MaildropPair",
    Role.WEBMAIL: "mail:index:Webmail",
    Role.FRONTEND: "mail:index:NginxStreams",
    **dict.fromkeys(CLIENT_ROLES, "mail:index:NullClients"),
}

_DIAL_SECONDS = 15


def tier(host: SiteHost) -> Role | None:
    """The role whose cluster owns ``host``: the first of its roles that is built."""
    return next((role for role in host.roles if role in CLUSTERS), None)


@dataclass(frozen=True)
class Fleet:
    """What every host is built with, computed from site data before anything is registered."""

    platform: Platform
    bundles: Mapping[str, Bundle]
    needed: Mapping[str, tuple[str, ...]]

    @classmethod
    def plan(cls, platform: Platform) -> Fleet:
        """Compose the bundle of every host of a built tier.

        Raises:
            mailsite.loader.SiteError: the site data does not make a configuration.
            HostKeyError: an existing machine has no pinned ssh key.
        """
        hosts = [host for host in platform.hosts.values() if tier(host) is not None]
        for host in hosts:
            if host.vm is None:
                pinned_key(platform, host)
        bundles = {host.name: compose(platform, host) for host in hosts}
        return cls(platform, bundles, {name: bundle.secrets for name, bundle in bundles.items()})

    @property
    def hosts(self) -> tuple[SiteHost, ...]:
        """Every host that is built, in the order of the topology file."""
        return tuple(self.platform.hosts[name] for name in self.bundles)

    @property
    def machines(self) -> tuple[SiteHost, ...]:
        """Those that are VMs of the platform."""
        return tuple(host for host in self.hosts if host.vm is not None)

    @property
    def secrets(self) -> tuple[str, ...]:
        """Every secret that some bundle asks for."""
        return tuple(dict.fromkeys(name for names in self.needed.values() for name in names))

    def members(self, role: Role) -> tuple[SiteHost, ...]:
        """Hosts that the cluster of ``role`` owns, in rolling order: those that drain, too."""
        return tuple(host for host in self.hosts if tier(host) is role and not host.retired)

    @property
    def retired(self) -> tuple[SiteHost, ...]:
        """Existing machines that get their last push, which takes their roles away."""
        return tuple(host for host in self.hosts if host.retired)


class HostKeyError(ValueError):
    """An existing machine would be logged in to without knowing its ssh key."""


def pinned_key(platform: Platform, host: SiteHost) -> str:
    """The ssh key that an existing machine must show.

    Raises:
        HostKeyError: the site data has none.
    """
    key = platform.world.ssh_host_keys.get(host.name, host.ssh_host_key)
    if key is None:
        raise HostKeyError(
            f"topology.yaml: {host.name} is an existing machine without ssh_host_key; write the"
            f" output of 'ssh-keyscan -t ed25519 {host.name}', as checked on the machine itself"
        )
    return key


@dataclass(frozen=True)
class Access:
    """How hosts are logged in to. ``private_key`` None: the ssh agent of whoever runs the engine.

    The agent's socket is not named anywhere: it changes with every login, and each command
    whose connection changes runs again.
    """

    provider: Provider
    public_key: str
    private_key: pulumi.Output[str] | None


@dataclass(frozen=True)
class HostArgs:
    """``after`` must be done before anything that serves on this host changes, ``certificates``
    before its configuration is pushed: the machine may be made meanwhile.
    """

    fleet: Fleet
    host: SiteHost
    carriers: Mapping[str, Carrier]
    secrets: SecretStore
    access: Access
    after: Sequence[pulumi.Resource]
    certificates: Sequence[pulumi.Resource] = ()


class Host(pulumi.ComponentResource):
    """A VM or an existing machine, and its configuration.

    ``done`` is the resource that another host waits for to come after this one.
    """

    def __init__(
        self, name: str, args: HostArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("mail:index:Host", name, {}, opts)
        host, platform = args.host, args.fleet.platform
        machine: pulumi.Resource | None = None
        host_key: pulumi.Input[str]
        if host.vm is not None:
            secret = secret_names.ssh_host_key(host.name)
            host_key = args.secrets.public(secret)
            machine = Vm(
                name,
                VmArgs(
                    platform=platform,
                    host=host,
                    carrier=args.carriers[host.vm.hypervisor],
                    deploy_public_key=args.access.public_key,
                    host_key=args.secrets.get(secret),
                    host_public_key=args.secrets.public(secret),
                    after=args.after,
                ),
                pulumi.ResourceOptions(parent=self),
            ).domain
        else:
            host_key = pinned_key(platform, host)
        push = ConfigPush(
            name,
            ConfigPushArgs(
                host=host,
                bundle=args.fleet.bundles[host.name],
                secrets={s: args.secrets.get(s) for s in args.fleet.needed[host.name]},
                digest_key=args.secrets.digest_key,
                connection=remote.ConnectionArgs(
                    host=str(platform.internal_leg(host).ipv4),
                    port=22,
                    user=host.login,
                    private_key=args.access.private_key,
                    host_key=host_key,
                    dial_error_limit=-1,
                    per_dial_timeout=_DIAL_SECONDS,
                ),
                provider=args.access.provider,
                machine=machine,
                # The machine, which the push waits for, has waited for ``after``.
                after=[*(args.after if machine is None else ()), *args.certificates],
            ),
            pulumi.ResourceOptions(parent=self),
        )
        self.done: pulumi.Resource = push.done
        self.register_outputs({})


@dataclass(frozen=True)
class ClusterArgs:
    """What the hosts of one tier are built with.

    ``after`` must be done before the first of them changes, ``certificates`` before it is
    configured.
    """

    fleet: Fleet
    carriers: Mapping[str, Carrier]
    secrets: SecretStore
    access: Access
    after: Sequence[pulumi.Resource] = ()
    certificates: Sequence[pulumi.Resource] = ()


def rolling(
    parent: pulumi.Resource, members: Sequence[SiteHost], args: ClusterArgs
) -> tuple[Host, ...]:
    """Build ``members`` so that each changes only when the one before it is done and healthy.

    The order is by ``depends_on`` alone. No Output of one member may reach another: replacing
    the first would then take all of them down before any comes back.
    """
    built: list[Host] = []
    for member in members:
        after = [built[-1].done] if built else list(args.after)
        built.append(
            Host(
                member.name,
                HostArgs(
                    fleet=args.fleet,
                    host=member,
                    carriers=args.carriers,
                    secrets=args.secrets,
                    access=args.access,
                    after=after,
                    certificates=() if built else args.certificates,
                ),
                pulumi.ResourceOptions(parent=parent, transformations=[_moving(member)]),
            )
        )
    return tuple(built)


def last(members: Sequence[Host]) -> list[pulumi.Resource]:
    """What to wait for to come after all ``members``, which :func:`rolling` built: each of them
    waits for the one before it, so that the last one speaks for all.
    """
    return [member.done for member in members[-1:]]


def _moving(host: SiteHost) -> pulumi.ResourceTransformation:
    """Let ``host`` keep its machine when it begins or ends to hold the certificate.

    Another cluster owns it then, and each of its resources has another URN. All of them know
    their old one, not the host alone: a run that ends early leaves some at the old place.
    """
    owner = tier(host)
    owners = {CLUSTERS[role] for role in (Role.CERTIFICATES, *host.roles) if role in CLUSTERS}
    owners -= {CLUSTERS[owner]} if owner is not None else set()
    of_stack = f"urn:pulumi:{pulumi.get_stack()}::{pulumi.get_project()}"
    types: dict[pulumi.Resource | None, str] = {}

    def transform(args: pulumi.ResourceTransformationArgs) -> pulumi.ResourceTransformationResult:
        above = types.get(args.opts.parent)
        chain = args.type_ if above is None else f"{above}${args.type_}"
        types[args.resource] = chain
        known = [f"{of_stack}::{cluster}${chain}::{args.name}" for cluster in sorted(owners)]
        more = pulumi.ResourceOptions(aliases=known)
        return pulumi.ResourceTransformationResult(
            args.props, pulumi.ResourceOptions.merge(args.opts, more)
        )

    return transform
