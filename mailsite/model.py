"""The typed model of a platform: what the operator's site data may say.

Every class is frozen and refuses unknown keys. The model holds facts only; what a host gets
from them is computed in :mod:`mailsite.bundle`, what DNS says of them in
:mod:`mailsite.records`. Rules that span several objects live in :mod:`mailsite.rules`.

Units: memory in MiB, disks in GiB, message sizes in bytes, times in seconds. Domain names are
lower-case, without a trailing dot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
)
from typing import Annotated, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_SLUG = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


def _fqdn(value: str) -> str:
    """Accept a lower-case domain name of two labels or more (RFC 1035, section 2.3.1)."""
    if value.endswith("."):
        raise ValueError(f"{value!r} ends with a dot; write {value.rstrip('.')!r}")
    if value != value.lower():
        raise ValueError(f"{value!r} has upper-case letters; write {value.lower()!r}")
    labels = value.split(".")
    if len(value) > 253 or len(labels) < 2 or not all(_LABEL.fullmatch(x) for x in labels):
        raise ValueError(f"{value!r} is no domain name; write one like 'mail.example.org'")
    return value


def _slug(value: str) -> str:
    if not _SLUG.fullmatch(value):
        raise ValueError(f"{value!r} is no plain name; use lower-case letters, digits and dashes")
    return value


def _email(value: str) -> str:
    local, at, domain = value.rpartition("@")
    if not at or not local or any(c.isspace() for c in local):
        raise ValueError(f"{value!r} is no mail address; write one like 'user@example.org'")
    _fqdn(domain)
    return value


Fqdn = Annotated[str, AfterValidator(_fqdn)]
Slug = Annotated[str, AfterValidator(_slug)]
EmailAddress = Annotated[str, AfterValidator(_email)]
Ttl = Annotated[int, Field(ge=60, le=86400)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Frozen(BaseModel):
    """Base of all site data: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Role(StrEnum):
    """What a host is for. A host may have several; the first one listed is its main role."""

    SMTP_OUT = "smtp-out"
    SMTP_IN = "smtp-in"
    RSPAMD = "rspamd"
    MAILDROP = "maildrop"
    WEBMAIL = "webmail"
    FRONTEND = "frontend"
    HYPERVISOR = "hypervisor"
    ROUTER = "router"
    SERVER = "server"


class TlsLevel(StrEnum):
    """Security level of Postfix towards the internet (postconf(5), smtp_tls_security_level)."""

    MAY = "may"
    DANE = "dane"
    ENCRYPT = "encrypt"


class Base(StrEnum):
    """How much of a machine the platform owns.

    ``managed``: resolver, sshd and firewall too (every VM of ours). ``operator``: only the
    platform's own files, its own nft table and snippets in include directories.
    """

    MANAGED = "managed"
    OPERATOR = "operator"


class NetworkKind(StrEnum):
    SITE_LOCAL = "site-local"
    PUBLIC = "public"


class Subnet4(Frozen):
    prefix: IPv4Network
    gateway: IPv4Address


class Subnet6(Frozen):
    prefix: IPv6Network
    gateway: IPv6Address


class Network(Frozen):
    """One layer-2 network of a site. ``bridge`` is its name on the site's hypervisors."""

    site: Slug
    kind: NetworkKind
    bridge: Slug
    ipv4: Subnet4
    ipv6: Subnet6


class Site(Frozen):
    """A point of presence: where hypervisors, networks and hosts are."""

    description: str


class Hypervisor(Frozen):
    """A libvirt host that carries our VMs. ``uri`` is libvirt's connection URI."""

    site: Slug
    uri: str
    pool: Slug = "default"
    image: str = Field(description="URL or path of the Debian cloud image, qcow2")


class Egress(Frozen):
    """A gateway that site-local hosts reach the internet through (source NAT)."""

    site: Slug
    ipv4: IPv4Address
    ipv6: IPv6Address


class VmSize(Frozen):
    """Size of a virtual machine. ``data_gib`` is the volume that survives a replacement."""

    hypervisor: Slug
    cpus: int = Field(ge=1, le=128)
    memory_mib: int = Field(ge=512)
    root_gib: int = Field(ge=4)
    data_gib: int = Field(ge=1)


class Interface(Frozen):
    """A host's leg in a network. Prefix lengths and gateways come from the network."""

    network: Slug
    ipv4: IPv4Address
    ipv6: IPv6Address


class Host(Frozen):
    """A machine of the platform.

    Without ``vm`` it is an existing machine: it stays the operator's, see :class:`Base`.
    The default route leaves through the first interface.
    """

    name: Fqdn = Field(description="internal FQDN; the key in the topology file")
    roles: tuple[Role, ...] = Field(min_length=1)
    site: Slug
    interfaces: tuple[Interface, ...] = Field(min_length=1)
    vm: VmSize | None = None
    base: Base = Base.OPERATOR
    ssh_host_key: str | None = Field(default=None, description="existing machines: pinned public key")
    login: Slug = "deploy"

    @property
    def main_role(self) -> Role:
        return self.roles[0]

    @property
    def short(self) -> str:
        """Name without the internal domain's labels is not unique; this is the first two labels."""
        return "-".join(self.name.split(".")[:2])

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        return tuple(a for i in self.interfaces for a in (i.ipv4, i.ipv6))

    @property
    def is_managed(self) -> bool:
        return self.vm is not None or self.base is Base.MANAGED


class DkimKey(Frozen):
    """A DKIM key pair, published at ``<selector>._domainkey.<domain>``.

    ``signing`` is true for the one key that signs; others stay published while a rotation runs.
    """

    selector: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$")]
    bits: int = Field(default=2048, ge=2048, le=4096)
    signing: bool = True


class DmarcPolicy(StrEnum):
    NONE = "none"
    QUARANTINE = "quarantine"
    REJECT = "reject"


class Dmarc(Frozen):
    policy: DmarcPolicy = DmarcPolicy.NONE
    subdomain_policy: DmarcPolicy | None = None
    rua: tuple[EmailAddress, ...] = ()


class MailDomain(Frozen):
    """A domain that sends (and later receives) mail through the platform.

    ``sends: false`` publishes a null MX (RFC 7505) and ``v=spf1 -all``. ``zone`` is the DNS
    zone that holds the domain, by default the domain itself. ``spf`` are terms of the
    operator's own, merged in front of the platform's include.
    """

    name: Fqdn
    zone: Fqdn | None = None
    sends: bool = True
    receives: bool = True
    retired: bool = False
    dkim: tuple[DkimKey, ...] = ()
    spf: tuple[str, ...] = ()
    spf_all: str = Field(default="~all", pattern=r"^[~?+-]all$")
    dmarc: Dmarc | None = Field(default=None, description="None: the site's default")

    @property
    def dns_zone(self) -> str:
        return self.zone or self.name

    @property
    def signing_key(self) -> DkimKey | None:
        return next((k for k in self.dkim if k.signing), None)


class SaslUser(Frozen):
    """A login of the submission service: a person, or a group of servers (null clients)."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    description: str
    suspended: bool = False
    password_hash: str | None = Field(
        default=None, description="Dovecot {SCHEME} hash; None: generated in the graph"
    )


class ServiceNames(Frozen):
    """Public names of the services. ``spf`` is the label of the shared SPF record."""

    smtp_out: Fqdn
    smtp_in: Fqdn
    imap: Fqdn
    webmail: Fqdn
    frontend: Fqdn
    spf: Fqdn


class SpfBlocks(Frozen):
    """What the shared SPF records allow, in order of publication."""

    ipv4: tuple[IPv4Network, ...]
    ipv6: tuple[IPv6Network, ...]
    all: str = Field(default="~all", pattern=r"^[~?+-]all$")


class ClientLimits(Frozen):
    """Postfix's limits per client address (postconf(5), anvil(8)); rates per minute."""

    connections: int = Field(default=4, ge=1)
    connection_rate: int = Field(default=10, ge=1)
    message_rate: int = Field(default=60, ge=1)


class Outbound(Frozen):
    tls: TlsLevel = TlsLevel.DANE
    limits: ClientLimits = ClientLimits()
    message_size_limit: int = Field(default=52428800, ge=1048576)
    header_size_limit: int = Field(default=4096000, ge=102400)
    primary: Fqdn = Field(description="member that the frontends prefer")


class Management(Frozen):
    """Who may reach ssh: the networks of the operators."""

    networks: tuple[IPv4Network | IPv6Network, ...] = Field(min_length=1)


class World(Frozen):
    """What the outside looks like. The default is the real one; a rehearsal overlays it."""

    trust_anchors: tuple[str, ...] = Field(
        default=(), description="DS records of the root; empty: Debian's dns-root-data"
    )
    ca_certificates: tuple[str, ...] = Field(
        default=(), description="PEM of CAs that hosts trust beside Debian's"
    )


class Platform(Frozen):
    """Everything that the site data of one platform says."""

    name: Slug
    domain: Fqdn
    internal_domain: Fqdn
    home_page: str
    names: ServiceNames
    spf: SpfBlocks
    dmarc: Dmarc = Dmarc()
    outbound: Outbound
    management: Management
    sites: dict[Slug, Site]
    networks: dict[Slug, Network]
    egress: dict[Fqdn, Egress] = {}
    hypervisors: dict[Slug, Hypervisor]
    hosts: dict[Fqdn, Host]
    domains: dict[Fqdn, MailDomain]
    sasl_users: dict[str, SaslUser]
    world: World = World()

    def members(self, role: Role) -> tuple[Host, ...]:
        """Hosts with ``role``, in the order of the topology file: the rolling order."""
        return tuple(h for h in self.hosts.values() if role in h.roles)

    def network_of(self, interface: Interface) -> Network:
        return self.networks[interface.network]

    def leg(self, host: Host, kind: NetworkKind) -> Interface | None:
        """The host's first interface in a network of ``kind``."""
        return next(
            (i for i in host.interfaces if self.networks[i.network].kind is kind), None
        )

    def internal_leg(self, host: Host) -> Interface:
        """Where other hosts of the platform reach ``host``: site-local if it has a leg there."""
        return self.leg(host, NetworkKind.SITE_LOCAL) or host.interfaces[0]

    def addresses_of(self, role: Role) -> Iterator[IPAddress]:
        """Every address of every member of ``role``, both families."""
        for host in self.members(role):
            yield from host.addresses

    def with_world(self, world: World) -> Self:
        return self.model_copy(update={"world": world})
