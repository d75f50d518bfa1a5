"""The typed model of a platform: what the operator's site data may say.

Every class is frozen and refuses unknown keys. The model holds facts only; what a host gets
from them is computed in :mod:`mailsite.bundle`, what DNS says of them in
:mod:`mailsite.records`. Rules that span several objects live in :mod:`mailsite.rules`.

Units: memory in MiB, disks in GiB, message sizes in bytes, times in seconds. Domain names and
local parts of our own addresses are lower-case; domain names have no trailing dot.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import Annotated, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WrapValidator,
)

IPAddress: TypeAlias = IPv4Address | IPv6Address
IPNetwork: TypeAlias = IPv4Network | IPv6Network

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_SLUG = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_LOCAL_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_+=~'&#-]|\.(?![.]|$))*")
_MAILBOX = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_TAG = re.compile(r"[a-z0-9][a-z0-9._-]*")
_OCTET = r"(\d{1,3}|\[\d{1,3}(?:\.\.\d{1,3})?(?:;\d{1,3}(?:\.\.\d{1,3})?)*\])"
_ANSWERS = re.compile(r"\.".join([_OCTET] * 4))

#: The local part that stands for every one that its domain does not list.
CATCH_ALL = "*"

#: What separates a local part from its extension (postconf(5), recipient_delimiter).
DELIMITER = "+"

#: The target that swallows mail.
NOWHERE = "/dev/null"


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


def _text(value: object, wanted: str) -> str:
    if value is None:
        raise ValueError(f"there is no value; write {wanted}")
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text; write {wanted}")
    return value


def _address(value: object) -> IPAddress:
    """Accept an IPv4 or IPv6 address without prefix length or zone."""
    if isinstance(value, IPv4Address | IPv6Address):
        return value
    text = _text(value, "an address such as '192.0.2.1' in quotes")
    if "/" in text:
        bare = text.partition("/")[0]
        raise ValueError(f"{text!r} has a prefix length; write the address alone: '{bare}'")
    if "%" in text:
        raise ValueError(f"{text!r} has a zone; write a global address, without '%'")
    try:
        return ip_address(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is no IP address; write one like '192.0.2.1' or '2001:db8::1'"
        ) from None


def _address4(value: object) -> IPv4Address:
    address = _address(value)
    if not isinstance(address, IPv4Address):
        raise ValueError(f"'{address}' is an IPv6 address; write an IPv4 one here")
    return address


def _address6(value: object) -> IPv6Address:
    address = _address(value)
    if not isinstance(address, IPv6Address):
        raise ValueError(f"'{address}' is an IPv4 address; write an IPv6 one here")
    return address


def _prefix(value: object) -> IPNetwork:
    """Accept a prefix in CIDR notation: length given, no host bits set (RFC 4632, section 3.1)."""
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    text = _text(value, "a prefix such as '192.0.2.0/24'")
    _, slash, length = text.partition("/")
    if not slash:
        raise ValueError(f"{text!r} lacks a prefix length; write one like '{text}/24'")
    if not length.isascii() or not length.isdigit():
        raise ValueError(f"{text!r} is no prefix; write its length as a number, like '/24'")
    try:
        enclosing = ip_interface(text).network
    except ValueError:
        raise ValueError(
            f"{text!r} is no IP prefix; write one like '192.0.2.0/24' or '2001:db8::/64'"
        ) from None
    try:
        return ip_network(text)
    except ValueError:
        raise ValueError(
            f"{text!r} has bits set behind its prefix length; write '{enclosing}'"
        ) from None


def _prefix4(value: object) -> IPv4Network:
    prefix = _prefix(value)
    if not isinstance(prefix, IPv4Network):
        raise ValueError(f"'{prefix}' is an IPv6 prefix; write an IPv4 one here")
    return prefix


def _prefix6(value: object) -> IPv6Network:
    prefix = _prefix(value)
    if not isinstance(prefix, IPv6Network):
        raise ValueError(f"'{prefix}' is an IPv4 prefix; write an IPv6 one here")
    return prefix


def _https(value: str) -> str:
    if not re.fullmatch(r"https://[a-z0-9.-]+(/[!-~]*)?", value):
        raise ValueError(f"{value!r} is no web page; write one like 'https://www.example.org/'")
    return value


def _libvirt_uri(value: str) -> str:
    """Accept a connection URI of libvirt's QEMU driver (https://libvirt.org/uri.html)."""
    if not re.fullmatch(r"qemu(\+[a-z0-9]+)?://[^\s/]*/system(\?\S*)?", value):
        raise ValueError(
            f"{value!r} is no libvirt URI; write one like 'qemu+ssh://root@hv.example.org/system'"
        )
    return value


def _ssh_public_key(value: str) -> str:
    """Accept ``<type> <base64>`` as in known_hosts, without host name and comment."""
    remedy = "write it like 'ssh-ed25519 AAAA...', the output of 'ssh-keyscan -t ed25519 HOST'"
    kind, _, encoded = value.partition(" ")
    try:
        blob = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise ValueError(f"{value!r} is no ssh public key; {remedy}") from None
    name = kind.encode()
    if not blob.startswith(len(name).to_bytes(4, "big") + name) or len(blob) < len(name) + 32:
        raise ValueError(f"{value!r} is no ssh public key; {remedy}")
    if kind == "ssh-ed25519" and len(blob) != 51:
        raise ValueError(f"{value!r} is cut short or too long; {remedy}")
    return value


def _password_hash(value: str) -> str:
    if not re.fullmatch(r"\{[A-Z0-9][A-Z0-9.-]*\}[!-9;-~]+", value):
        raise ValueError(
            "this is no Dovecot password hash; write the output of 'doveadm pw -s BLF-CRYPT'"
        )
    return value


#: Bytes in a unit that a size may have.
_UNITS = {"MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


def _size(value: object) -> int:
    """Accept a size with a unit, such as ``2 GiB``, and return its bytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit; write it like '{value} MiB' or '{value} GiB'")
    text = _text(value, "a size such as '2 GiB'")
    found = re.fullmatch(r"([1-9][0-9]{0,8}) ?([A-Za-z]+)", text)
    if found is None or found[2] not in _UNITS:
        units = ", ".join(_UNITS)
        raise ValueError(f"{text!r} is no size; write a whole number with one of {units}")
    return int(found[1]) * _UNITS[found[2]]


def _selector(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", value):
        raise ValueError(f"{value!r} is no selector; use letters, digits and dashes")
    return value


def _login(value: str) -> str:
    """Accept a login without a domain: Dovecot looks up the part before the @ alone."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", value):
        raise ValueError(
            f"{value!r} is no login; use lower-case letters, digits, dots, dashes and underscores"
        )
    return value


def _label(value: str) -> str:
    """Accept one label of a domain name for machines (RFC 1123, section 2.1)."""
    if len(value) > 63 or not _SLUG.fullmatch(value):
        raise ValueError(f"{value!r} is no label; use lower-case letters, digits and dashes")
    return value


def _local_part(value: str) -> str:
    """Accept a local part of ours, or ``*`` for every other one of its domain.

    Narrower than RFC 5321, section 4.1.2: what a relay could read as a route (``%``, ``!``),
    quotes, and a dash in front, which Postfix refuses (postconf(5), allow_min_user), are out.
    """
    if value == CATCH_ALL:
        return value
    if value != value.lower():
        raise ValueError(f"{value!r} has upper-case letters; write {value.lower()!r}")
    if "@" in value:
        raise ValueError(f"{value!r} has a domain; write {value.partition('@')[0]!r} alone")
    if len(value) > 64 or not _LOCAL_PART.fullmatch(value):
        raise ValueError(f"{value!r} is no local part; use letters, digits, dots and dashes")
    bare, plus, _ = value.partition(DELIMITER)
    if plus:
        # One that leads back to the part in front of it would make Postfix go in circles.
        raise ValueError(f"{value!r} has an extension, which {bare!r} takes too; write {bare!r}")
    return value


def _answers(value: str) -> str:
    """Accept a filter of DNSBL answers, ``d.d.d.d`` with patterns (postconf(5))."""
    try:
        answer_octets(value)
    except ValueError:
        raise ValueError(
            f"{value!r} is no filter of answers; write one like '127.0.0.[2..11]', in quotes"
        ) from None
    return value


def answer_octets(text: str) -> tuple[frozenset[int], ...]:
    """The numbers that each of the four parts of a DNSBL filter takes.

    For example ``127.0.0.[2;4..6]``; syntax as in postconf(5), reject_rbl_client.

    Raises:
        ValueError: ``text`` is no such filter.
    """
    parts = _ANSWERS.fullmatch(text)
    if parts is None:
        raise ValueError(text)
    return tuple(frozenset(_numbers(part)) for part in parts.groups())


def _numbers(pattern: str) -> Iterator[int]:
    for item in pattern.strip("[]").split(";"):
        low, dots, high = item.partition("..")
        first, last = int(low), int(high if dots else low)
        if not first <= last <= 255:
            raise ValueError(pattern)
        yield from range(first, last + 1)


def _sender(value: str) -> str:
    """Accept a mail address, or ``@domain`` for all of a domain."""
    local, at, domain = value.rpartition("@")
    if not at or (local and not _LOCAL_PART.fullmatch(local)):
        raise ValueError(
            f"{value!r} is no sender; write an address like 'user@example.org', or '@example.org'"
        )
    _fqdn(domain)
    return value


def _variable(value: str) -> str:
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", value):
        raise ValueError(f"{value!r} is no variable; write one like 'CLOUDFLARE_DNS_API_TOKEN'")
    return value


def _setting(value: str) -> str:
    """Accept what can stand in a unit file as it is (systemd.exec(5), Environment=)."""
    if not re.fullmatch(r"[A-Za-z0-9 .,:/@_+=-]*", value):
        raise ValueError(
            f"{value!r} cannot stand in a unit file; use letters, digits and '.,:/@_+=-' alone"
        )
    return value


def _spf_all(value: str) -> str:
    if value not in ("-all", "~all", "?all", "+all"):
        raise ValueError(f"{value!r} is no end of an SPF record; write '~all' or '-all'")
    return value


Fqdn = Annotated[str, AfterValidator(_fqdn)]
Slug = Annotated[str, AfterValidator(_slug)]
EmailAddress = Annotated[str, AfterValidator(_email)]
Ttl = Annotated[int, Field(ge=60, le=86400)]
HttpsUrl = Annotated[str, AfterValidator(_https)]
LibvirtUri = Annotated[str, AfterValidator(_libvirt_uri)]
SshPublicKey = Annotated[str, AfterValidator(_ssh_public_key)]
PasswordHash = Annotated[str, AfterValidator(_password_hash)]
SpfAll = Annotated[str, AfterValidator(_spf_all)]
Address4 = Annotated[IPv4Address, PlainValidator(_address4)]
Address6 = Annotated[IPv6Address, PlainValidator(_address6)]
Prefix = Annotated[IPNetwork, PlainValidator(_prefix)]
Prefix4 = Annotated[IPv4Network, PlainValidator(_prefix4)]
Prefix6 = Annotated[IPv6Network, PlainValidator(_prefix6)]
Port = Annotated[int, Field(ge=1, le=65535)]
Score = Annotated[float, Field(ge=0.1, le=1000)]
LocalPart = Annotated[str, AfterValidator(_local_part)]
Answers = Annotated[str, AfterValidator(_answers)]
Label = Annotated[str, AfterValidator(_label)]
Size = Annotated[int, PlainValidator(_size)]
Variable = Annotated[str, AfterValidator(_variable)]
Setting = Annotated[str, AfterValidator(_setting)]


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
    CERTIFICATES = "certificates"
    HYPERVISOR = "hypervisor"
    ROUTER = "router"
    SERVER = "server"


#: Roles of machines that have nothing to do with mail but to send some of their own.
CLIENT_ROLES = (Role.SERVER, Role.HYPERVISOR, Role.ROUTER)

#: Roles that bring Postfix, which Debian installs instead of another mail server.
POSTFIX_ROLES = frozenset({Role.SMTP_OUT, Role.SMTP_IN, Role.MAILDROP})

#: The group of the machines that the platform itself consists of.
PLATFORM_GROUP = "mail"


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


class Mta(StrEnum):
    """What happens to the mail server that an existing machine has already.

    Without a word, a machine that has one is refused. ``replace``: the null client takes its
    place. ``operator``: it stays, and the machine gets no null client.
    """

    REPLACE = "replace"
    OPERATOR = "operator"


class NetworkKind(StrEnum):
    SITE_LOCAL = "site-local"
    PUBLIC = "public"


class Subnet4(Frozen):
    prefix: Prefix4
    gateway: Address4


class Subnet6(Frozen):
    prefix: Prefix6
    gateway: Address6


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
    uri: LibvirtUri
    pool: Slug = "default"
    image: str = Field(description="URL or path of the Debian cloud image, qcow2")


class Egress(Frozen):
    """A gateway that site-local hosts reach the internet through (source NAT)."""

    site: Slug
    ipv4: Address4
    ipv6: Address6


class VmSize(Frozen):
    """Size of a virtual machine. ``data_gib`` is the volume that survives a replacement."""

    hypervisor: Slug
    cpus: int = Field(ge=1, le=128)
    memory_mib: int = Field(ge=512, le=4 * 1024 * 1024)
    root_gib: int = Field(ge=4, le=64 * 1024)
    data_gib: int = Field(ge=1, le=64 * 1024)


class Interface(Frozen):
    """A host's leg in a network. Prefix lengths and gateways come from the network."""

    network: Slug
    ipv4: Address4
    ipv6: Address6


class Host(Frozen):
    """A machine of the platform.

    Without ``vm`` it is an existing machine: it stays the operator's, see :class:`Base`.
    The default route leaves through the first interface.

    A host leaves in two steps. ``draining``: nothing leads to it any more, no name in DNS and no
    frontend, while it serves who still comes and delivers what it has. ``retired``, for existing
    machines: it is pushed to once more, without its roles, so that what was the platform's goes.
    """

    name: Fqdn = Field(description="internal FQDN; the key in the topology file")
    roles: tuple[Role, ...] = Field(min_length=1)
    site: Slug
    interfaces: tuple[Interface, ...] = Field(min_length=1)
    vm: VmSize | None = None
    base: Base = Base.OPERATOR
    ssh_host_key: SshPublicKey | None = Field(
        default=None, description="existing machines: pinned public key"
    )
    login: Slug = "deploy"
    draining: bool = False
    retired: bool = False
    group: Annotated[str, AfterValidator(_login)] | None = Field(
        default=None, description="SASL user that its own mail is sent with; None: by its role"
    )
    mta: Mta | None = Field(default=None, description="existing machines: the mail server there")

    @property
    def is_leaving(self) -> bool:
        return self.draining or self.retired

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

    @property
    def has_postfix(self) -> bool:
        return not POSTFIX_ROLES.isdisjoint(self.roles)

    @property
    def has_null_client(self) -> bool:
        """Whether OpenSMTPD sends what the machine itself has to say."""
        return not self.has_postfix and self.mta is not Mta.OPERATOR


class DkimKey(Frozen):
    """A DKIM key pair, published at ``<selector>._domainkey.<domain>``.

    ``signing`` is true for the one key that signs; others stay published while a rotation runs.
    """

    selector: Annotated[str, AfterValidator(_selector)]
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


@dataclass(frozen=True)
class MailboxTarget:
    """A mailbox of the platform. Its owner sees by ``tag`` which address the mail came to."""

    mailbox: str
    tag: str = ""

    def __str__(self) -> str:
        return f"{self.mailbox}{DELIMITER}{self.tag}" if self.tag else self.mailbox


@dataclass(frozen=True)
class AddressTarget:
    """A mail address: another one of the platform's, or a forward elsewhere."""

    local: str
    domain: str

    def __str__(self) -> str:
        return f"{self.local}@{self.domain}"


@dataclass(frozen=True)
class Nowhere:
    """Mail is accepted and thrown away."""

    def __str__(self) -> str:
        return NOWHERE


Target: TypeAlias = MailboxTarget | AddressTarget | Nowhere


def parse_target(value: object) -> Target:
    """Read where mail goes: ``box``, ``box+tag``, ``user@example.org`` or ``/dev/null``."""
    if isinstance(value, MailboxTarget | AddressTarget | Nowhere):
        return value
    text = _text(value, f"a mailbox, a mail address in quotes or {NOWHERE}")
    if text == NOWHERE:
        return Nowhere()
    local, at, domain = text.rpartition("@")
    if at:
        if len(local) > 64 or not _LOCAL_PART.fullmatch(local):
            raise ValueError(f"{text!r} is no mail address; write one like 'user@example.org'")
        return AddressTarget(local, _fqdn(domain))
    mailbox, plus, tag = text.partition(DELIMITER)
    if not _MAILBOX.fullmatch(mailbox) or (plus and not _TAG.fullmatch(tag)):
        raise ValueError(
            f"{text!r} is no target; write a mailbox like 'box' or 'box+tag', "
            f"an address like 'user@example.org', or {NOWHERE}"
        )
    return MailboxTarget(mailbox, tag)


def _one_or_several(
    value: object, several: Callable[[object], tuple[Target, ...]]
) -> tuple[Target, ...]:
    """A list of targets, or one alone."""
    if isinstance(value, list | tuple):
        return several(tuple(value))
    return (parse_target(value),)


Targets = Annotated[
    tuple[Annotated[Target, PlainValidator(parse_target)], ...],
    Field(min_length=1),
    WrapValidator(_one_or_several),
]


class MailDomain(Frozen):
    """A domain that sends or receives mail through the platform, or does neither.

    ``sends: false`` publishes ``v=spf1 -all``, and with ``receives: false`` a null MX (RFC 7505).
    ``zone`` is the DNS zone that holds the domain, by default the domain itself. ``spf`` are
    terms of the operator's own, merged in front of the platform's include.

    ``addresses`` says for each local part where its mail goes, see :func:`parse_target`; ``*``
    takes every other one. Extensions need no line: ``user+anything`` goes where ``user`` goes.
    ``alias_of`` names a domain whose addresses exist here too; ``addresses`` beside it are
    exceptions and additions. ``retired: true`` withdraws the MX while mail is still taken.
    """

    name: Fqdn
    zone: Fqdn | None = None
    sends: bool = True
    receives: bool = True
    retired: bool = False
    dkim: tuple[DkimKey, ...] = ()
    spf: tuple[str, ...] = ()
    spf_all: SpfAll = "~all"
    dmarc: Dmarc | None = Field(default=None, description="None: the site's default")
    addresses: dict[LocalPart, Targets] = {}
    alias_of: Fqdn | None = None

    @property
    def dns_zone(self) -> str:
        return self.zone or self.name

    @property
    def signing_key(self) -> DkimKey | None:
        return next((k for k in self.dkim if k.signing), None)


class Mailbox(Frozen):
    """A mailbox on the maildrop hosts. Addresses lead to it, see :class:`MailDomain`.

    Its owner reads and sends mail with one name and password; ``submission: false`` takes the
    sending away, for owners with a login of their own in the SASL users. While it is
    ``suspended`` nobody logs in, and mail still comes in. ``quota`` is in bytes.
    """

    name: Annotated[str, AfterValidator(_login)]
    description: str
    quota: Size | None = Field(default=None, description="None: as much as the disk holds")
    submission: bool = True
    suspended: bool = False
    password_hash: PasswordHash | None = Field(
        default=None,
        repr=False,
        description="Dovecot {SCHEME} hash; None: generated in the graph",
    )


class SaslUser(Frozen):
    """A login of the submission service: a person, or a group of servers (null clients)."""

    name: Annotated[str, AfterValidator(_login)]
    description: str
    suspended: bool = False
    senders: tuple[Annotated[str, AfterValidator(_sender)], ...] = Field(
        default=(),
        description="envelope senders that it may use: 'user@example.org', or '@example.org' "
        "for a whole domain; empty: any",
    )
    password_hash: PasswordHash | None = Field(
        default=None,
        repr=False,
        description="Dovecot {SCHEME} hash; None: generated in the graph",
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

    ipv4: tuple[Prefix4, ...]
    ipv6: tuple[Prefix6, ...]
    all: SpfAll = "~all"


class ClientLimits(Frozen):
    """Postfix's limits per client address (postconf(5), anvil(8)); rates per minute."""

    connections: int = Field(default=4, ge=1)
    connection_rate: int = Field(default=10, ge=1)
    message_rate: int = Field(default=60, ge=1)


class Outbound(Frozen):
    """How mail leaves. The size limits hold for mail that comes in too."""

    tls: TlsLevel = TlsLevel.DANE
    limits: ClientLimits = ClientLimits()
    message_size_limit: int = Field(default=52428800, ge=1048576)
    header_size_limit: int = Field(default=4096000, ge=102400)
    primary: Fqdn = Field(description="member that the frontends prefer")


class DnsblKind(StrEnum):
    """What is looked up in a list; Postfix's reject_... restrictions (postconf(5))."""

    RBL_CLIENT = "rbl_client"
    RHSBL_SENDER = "rhsbl_sender"
    RHSBL_HELO = "rhsbl_helo"
    RHSBL_REVERSE_CLIENT = "rhsbl_reverse_client"


class Dnsbl(Frozen):
    """A DNS block list that every client of port 25 is looked up in.

    ``answers`` are the ones that count, in Postfix's notation: ``127.0.0.[2..11]``. All others,
    error codes above all, refuse nothing. ``warn_only``: what counts is logged, not refused.
    """

    kind: DnsblKind
    zone: Fqdn
    answers: Answers
    warn_only: bool = False


class InboundLimits(ClientLimits):
    """Limits per client address of the MX: other people's mail servers, so wider."""

    connections: int = Field(default=20, ge=1)
    connection_rate: int = Field(default=60, ge=1)
    message_rate: int = Field(default=120, ge=1)


class Inbound(Frozen):
    """How mail comes in.

    ``srs_domain`` is a name of its own that forwarded mail is sent from (Sender Rewriting
    Scheme); nothing else uses it. ``srs_keys`` name the secrets that sign such addresses: the
    first signs, all verify. To rotate, put a new name in front, and take the old one away when
    its last bounce can have come (PostSRSd takes addresses of the last 21 days).
    ``dnsbl`` is asked in the order written, and the first list that knows a client refuses it.
    """

    srs_domain: Fqdn
    srs_keys: tuple[Label, ...] = Field(default=("srs1",), min_length=1)
    limits: InboundLimits = InboundLimits()
    dnsbl: tuple[Dnsbl, ...] = ()


class SpamScores(Frozen):
    """Rspamd's score from which on a message is greylisted, tagged (X-Spam) and refused."""

    greylist: Score = 4
    add_header: Score = 6
    reject: Score = 15


class UserLimits(Frozen):
    """What one SASL user may send in an hour, counted over all members."""

    messages: int = Field(default=200, ge=1)
    recipients: int = Field(default=1000, ge=1)


class Spam(Frozen):
    """The spam filter. ``greylist``: whether doubtful mail has to come twice.

    Its hosts serve Postfix at ``milter_port``, learning and statistics at ``controller_port``,
    their shared memory at ``redis_port``, and watch over it at ``sentinel_port``.
    """

    greylist: bool = False
    scores: SpamScores = SpamScores()
    user_limits: UserLimits = UserLimits()
    milter_port: Port = 11332
    controller_port: Port = 11334
    redis_port: Port = 6379
    sentinel_port: Port = 26379


class Maildrop(Frozen):
    """The two hosts of the mailboxes, each with all of them.

    ``primary`` is the one that mail and clients prefer; the other takes over while it is away.
    ``managesieve`` are the networks that filters may be edited from.
    """

    primary: Fqdn
    managesieve: tuple[Prefix, ...] = Field(min_length=1)


class Upgrades(Frozen):
    """When our machines install security upgrades.

    The first member of each cluster does so at ``hour`` (UTC), the next ones an hour later each.
    With ``reboot`` a machine whose kernel was upgraded reboots then; otherwise none ever does by
    itself.
    """

    hour: int = Field(default=1, ge=0, le=23)
    reboot: bool = False


class Webmail(Frozen):
    """Webmail, for the networks of ``networks`` alone; others are led to the home page.

    It sends the mail of all its users with one login of submission, ``sasl_user``. The first of
    its hosts serves, and the next one while it is away.
    """

    sasl_user: str
    networks: tuple[Prefix, ...] = Field(min_length=1)


class AcmeAccess(Frozen):
    """How lego gets a certificate: the authority, and how it changes the DNS for the challenge.

    ``provider`` is lego's name of the DNS provider (https://go-acme.github.io/lego/dns/),
    ``environment`` what that provider needs beside secrets. ``secrets`` are the variables whose
    values are secrets of the stack, ``acme/<variable>``; lego gets each as a file.
    """

    directory: Annotated[str, AfterValidator(_https), AfterValidator(_setting)] = (
        "https://acme-v02.api.letsencrypt.org/directory"
    )
    provider: Slug
    environment: dict[Variable, Setting] = {}
    secrets: tuple[Variable, ...] = ()


class Acme(AcmeAccess):
    """``email`` is told of the account's matters.

    ``challenge_zone``: every ``_acme-challenge`` name is a CNAME into this zone, which the
    operator publishes, so that the token of the DNS provider can be one for this zone alone.
    """

    email: Annotated[str, AfterValidator(_email), AfterValidator(_setting)]
    challenge_zone: Fqdn | None = None


class Certificates(Frozen):
    """The platform gets its own certificate, by ACME; None: the operator gives them as secrets.

    Two hosts with the role ``certificates`` hold it. The first renews it ``renew_days`` before
    its end; if it has not, the second does ``takeover_days`` before. The others ask both for it
    at ``port``. A check complains ``margin_days`` before the end.
    """

    acme: Acme
    port: Port = 2022
    renew_days: int = Field(default=30, ge=2, le=365)
    takeover_days: int = Field(default=20, ge=1, le=365)
    margin_days: int = Field(default=14, ge=1, le=365)


class Management(Frozen):
    """Who may reach ssh: the networks of the operators."""

    networks: tuple[Prefix, ...] = Field(min_length=1)


class SiteLocal(Frozen):
    """The address space of all site-local networks together, unreachable from the internet.

    Hosts that also have a public leg route these prefixes through their site-local one, and
    the gateways do not translate traffic within them.
    """

    ipv4: Prefix4
    ipv6: Prefix6


class Route(Frozen):
    """A static route of a host: ``prefix`` is reached through ``gateway``."""

    prefix: Prefix
    gateway: Annotated[IPAddress, PlainValidator(_address)]


class World(Frozen):
    """What the outside looks like. The default is the real one; a rehearsal overlays it."""

    trust_anchors: tuple[str, ...] = Field(
        default=(), description="DS records of the root; empty: Debian's dns-root-data"
    )
    ca_certificates: tuple[str, ...] = Field(
        default=(), description="PEM of CAs that hosts trust beside Debian's"
    )
    resolvers: tuple[Annotated[IPAddress, PlainValidator(_address)], ...] = Field(
        default=(IPv4Address("9.9.9.9"), IPv6Address("2620:fe::fe")),
        description="what a new VM asks until its own Unbound is installed",
    )
    ssh_host_keys: dict[Fqdn, SshPublicKey] = Field(
        default={}, description="existing machines: keys to expect instead of the pinned ones"
    )
    acme: AcmeAccess | None = Field(
        default=None, description="the authority and DNS provider to use; None: the site's"
    )


class Probe(Frozen):
    """The account that live checks log in with. Its password stands in no file of the platform.

    ``sender`` is the address that it sends as, ``mailbox`` one outside that checks may send to.
    """

    user: str
    sender: EmailAddress
    mailbox: EmailAddress | None = None


class Platform(Frozen):
    """Everything that the site data of one platform says."""

    name: Slug
    domain: Fqdn
    internal_domain: Fqdn
    home_page: HttpsUrl
    names: ServiceNames
    spf: SpfBlocks
    dmarc: Dmarc = Dmarc()
    outbound: Outbound
    inbound: Inbound
    spam: Spam = Spam()
    maildrop: Maildrop | None = Field(
        default=None, description="None: the platform has no mailboxes"
    )
    webmail: Webmail | None = Field(default=None, description="None: the platform has no webmail")
    certificates: Certificates | None = Field(
        default=None, description="None: the operator gives certificates, as secrets"
    )
    management: Management
    upgrades: Upgrades = Upgrades()
    probe: Probe | None = None
    site_local: SiteLocal | None = Field(
        default=None, description="None: the platform has no site-local networks"
    )
    sites: dict[Slug, Site]
    networks: dict[Slug, Network]
    egress: dict[Fqdn, Egress] = {}
    hypervisors: dict[Slug, Hypervisor]
    hosts: dict[Fqdn, Host]
    domains: dict[Fqdn, MailDomain]
    sasl_users: dict[str, SaslUser]
    mailboxes: dict[str, Mailbox] = {}
    world: World = World()

    def members(self, role: Role) -> tuple[Host, ...]:
        """Hosts that others are led to for ``role``, in the order of the topology file."""
        return tuple(h for h in self.serving(role) if not h.is_leaving)

    def serving(self, role: Role) -> tuple[Host, ...]:
        """Hosts that run the daemons of ``role``: its members, and those that drain."""
        return tuple(h for h in self.hosts.values() if role in h.roles and not h.retired)

    def group_of(self, host: Host) -> str:
        """The SASL user that ``host`` sends its own mail with: one for each group of servers."""
        if host.group is not None:
            return host.group
        return host.main_role.value if host.main_role in CLIENT_ROLES else PLATFORM_GROUP

    def internal_name(self, role: Role) -> str:
        """The name that stands for all members of ``role`` inside the platform."""
        return f"{role}.{self.internal_domain}"

    @property
    def submission_host(self) -> str:
        """The name of all members of smtp-out inside: clients try one after the other."""
        return self.internal_name(Role.SMTP_OUT)

    def certificate_names(self, fqdn: str) -> tuple[str, ...]:
        """The names that a certificate is for: clients inside know smtp-out by one of its own."""
        if fqdn == self.names.smtp_out:
            return (fqdn, self.submission_host)
        return (fqdn,)

    @property
    def acme(self) -> AcmeAccess:
        """How certificates are got in this world.

        Raises:
            ValueError: the operator gives them.
        """
        if self.certificates is None:
            raise ValueError("this platform has no ACME; its certificates are given")
        return self.world.acme or self.certificates.acme

    @property
    def maildrop_domain(self) -> str:
        """The domain whose addresses are the mailboxes."""
        return self.internal_name(Role.MAILDROP)

    @property
    def webmail_backend(self) -> str:
        """The name that webmail knows the mailboxes by: both replicas, without a preference."""
        return f"{Role.MAILDROP}0.{self.internal_domain}"

    @property
    def webmail_aliases(self) -> tuple[str, str]:
        """Names that lead to webmail's own: the one inside the platform, and without a domain."""
        return (self.internal_name(Role.WEBMAIL), Role.WEBMAIL.value)

    @property
    def replicas(self) -> tuple[Host, ...]:
        """The hosts of the mailboxes, the primary first."""
        primary = self.maildrop.primary if self.maildrop is not None else ""
        members = self.members(Role.MAILDROP)
        return tuple(sorted(members, key=lambda host: host.name != primary))

    def network_of(self, interface: Interface) -> Network:
        return self.networks[interface.network]

    def leg(self, host: Host, kind: NetworkKind) -> Interface | None:
        """The host's first interface in a network of ``kind``."""
        return next((i for i in host.interfaces if self.networks[i.network].kind is kind), None)

    def internal_leg(self, host: Host) -> Interface:
        """Where other hosts of the platform reach ``host``: site-local if it has a leg there."""
        return self.leg(host, NetworkKind.SITE_LOCAL) or host.interfaces[0]

    def routes(self, host: Host, interface: Interface) -> tuple[Route, ...]:
        """Static routes that ``host`` needs through ``interface``.

        The first interface carries the default routes. A later one in a site-local network
        carries the routes to all other site-local networks, the operators' among them.
        """
        network = self.networks[interface.network]
        if interface == host.interfaces[0]:
            prefixes: tuple[IPNetwork, IPNetwork] = (
                IPv4Network("0.0.0.0/0"),
                IPv6Network("::/0"),
            )
        elif network.kind is NetworkKind.SITE_LOCAL and self.site_local is not None:
            prefixes = (self.site_local.ipv4, self.site_local.ipv6)
        else:
            return ()
        return (
            Route(prefix=prefixes[0], gateway=network.ipv4.gateway),
            Route(prefix=prefixes[1], gateway=network.ipv6.gateway),
        )

    def addresses_of(self, role: Role) -> Iterator[IPAddress]:
        """Every address of every member of ``role``, both families."""
        for host in self.members(role):
            yield from host.addresses

    def with_world(self, world: World) -> Self:
        return self.model_copy(update={"world": world})
