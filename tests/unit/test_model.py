"""What one object of the site data may look like."""

from __future__ import annotations

import base64
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from mailsite import model
from mailsite.loader import load_platform
from mailsite.model import (
    AddressTarget,
    Base,
    Host,
    Interface,
    MailboxTarget,
    MailDomain,
    NetworkKind,
    Nowhere,
    Platform,
    Prefix,
    Role,
    Route,
    SaslUser,
    SshPublicKey,
    Target,
    World,
    answer_octets,
    parse_target,
)

EXAMPLE = Path(__file__).parents[2] / "sites" / "example"
PREFIX: TypeAdapter[Any] = TypeAdapter(Prefix)
HOST = "out1.hosts.example.org"


@pytest.fixture(scope="module")
def example() -> Platform:
    return load_platform(EXAMPLE)


def message_of(adapter: Any, value: object) -> str:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(adapter).validate_python(value)
    (error,) = caught.value.errors()
    return str(error["msg"])


MODELS = [
    m
    for m in vars(model).values()
    if isinstance(m, type) and issubclass(m, BaseModel) and m.__module__ == model.__name__
]


@pytest.mark.parametrize("cls", MODELS, ids=lambda m: m.__name__)
def test_every_model_is_frozen_and_refuses_unknown_keys(cls: type[BaseModel]) -> None:
    assert cls.model_config.get("frozen") is True
    assert cls.model_config.get("extra") == "forbid"
    assert cls.__doc__ or len(cls.model_fields) < 8


def test_a_platform_cannot_be_changed(example: Platform) -> None:
    with pytest.raises(ValidationError):
        example.name = "other"


class TestAddresses:
    @settings(max_examples=60, deadline=None)
    @given(address=st.ip_addresses(), length=st.integers(0, 128))
    def test_a_prefix_is_taken_exactly_when_no_bit_is_set_behind_its_length(
        self, address: Any, length: int
    ) -> None:
        length %= address.max_prefixlen + 1
        text = f"{address}/{length}"
        enclosing = ip_interface(text).network
        if enclosing.network_address == address:
            assert PREFIX.validate_python(text) == enclosing == ip_network(text)
        else:
            assert f"write '{enclosing}'" in message_of(Prefix, text)

    @settings(max_examples=60, deadline=None)
    @given(value=st.one_of(st.text(max_size=20), st.integers(), st.none(), st.booleans()))
    def test_nothing_but_a_prefix_is_a_prefix(self, value: object) -> None:
        try:
            found = PREFIX.validate_python(value)
        except ValidationError as error:
            (detail,) = error.errors()
            assert "; " in detail["msg"], "a remedy follows"
        else:
            assert ip_network(value) == found  # type: ignore[arg-type]

    def test_objects_of_the_standard_library_are_taken(self) -> None:
        leg = Interface(
            network="lan", ipv4=IPv4Address("192.0.2.1"), ipv6=IPv6Address("2001:db8::1")
        )
        assert leg == Interface.model_validate(
            {"network": "lan", "ipv4": "192.0.2.1", "ipv6": "2001:DB8:0::1"}
        )
        assert PREFIX.validate_python(IPv4Network("192.0.2.0/24")).prefixlen == 24

    @pytest.mark.parametrize(
        ("adapter", "value", "remedy"),
        [
            (model.Address4, "2001:db8::1", "write an IPv4 one"),
            (model.Address6, "192.0.2.1", "write an IPv6 one"),
            (model.Prefix4, "2001:db8::/32", "write an IPv4 one"),
            (model.Prefix6, "192.0.2.0/24", "write an IPv6 one"),
            (model.Address4, "192.0.2.010", "write one like"),
            (model.Address6, "fe80::1%eth0", "without '%'"),
            (model.Address4, "192.0.2.1/24", "'192.0.2.1'"),
            (model.Address4, None, "write an address"),
            (model.Prefix4, "192.0.2.0/ 24", "as a number"),
        ],
    )
    def test_mixed_up_values_come_with_a_remedy(
        self, adapter: Any, value: object, remedy: str
    ) -> None:
        assert remedy in message_of(adapter, value)


class TestNames:
    @pytest.mark.parametrize(
        "name", ["example.org", "_spf.example.org", "a.b.c.example.org", "xn--bcher-kva.example"]
    )
    def test_domain_names(self, name: str) -> None:
        assert TypeAdapter(model.Fqdn).validate_python(name) == name

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "org",
            "example.org.",
            "Example.org",
            "a..org",
            "-a.org",
            "a-.org",
            "bücher.example",
            "*.example.org",
            "a b.org",
            f"{'a' * 64}.org",
            ".".join(["abcdefgh"] * 29),
        ],
    )
    def test_no_domain_names(self, name: str) -> None:
        assert "; write" in message_of(model.Fqdn, name)

    @pytest.mark.parametrize("address", ["user", "@example.org", "user@", "a b@example.org"])
    def test_no_mail_addresses(self, address: str) -> None:
        assert "; write" in message_of(model.EmailAddress, address)


class TestSshKeys:
    KEY = (
        "ssh-ed25519 "
        + base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes(range(32))).decode()
    )

    def test_a_public_key_is_taken(self) -> None:
        assert TypeAdapter(SshPublicKey).validate_python(self.KEY) == self.KEY

    @pytest.mark.parametrize(
        "damage",
        [
            lambda k: k[:-8],
            lambda k: k.replace("ssh-ed25519", "ssh-rsa"),
            lambda k: "host.example.org " + k,
            lambda k: k + " root@host",
            lambda k: k.partition(" ")[2],
            lambda k: "",
        ],
    )
    def test_a_damaged_one_is_not(self, damage: Any) -> None:
        assert "ssh-keyscan" in message_of(SshPublicKey, damage(self.KEY))


def test_a_password_hash_is_shown_nowhere() -> None:
    """Neither in errors nor in the representation that a traceback would print."""
    hashed = "{BLF-CRYPT}$2b$12$" + "a" * 53
    user = SaslUser(name="alice", description="person", password_hash=hashed)
    assert user.password_hash == hashed
    assert hashed not in repr(user)


class TestPlatform:
    def test_members_keep_the_order_of_the_topology(self, example: Platform) -> None:
        members = example.members(Role.SMTP_OUT)
        assert [m.name for m in members] == [HOST, "out2.hosts.example.org"]
        assert all(m.main_role is Role.SMTP_OUT for m in members)

    def test_addresses_of_a_role(self, example: Platform) -> None:
        assert [str(a) for a in example.addresses_of(Role.FRONTEND)] == [
            "198.51.100.16",
            "2001:db8:1::16",
            "198.51.100.80",
            "2001:db8:2::16",
        ]

    def test_what_the_platform_manages(self, example: Platform) -> None:
        host = example.hosts[HOST]
        edge = example.hosts["edge1.hosts.example.org"]
        assert host.is_managed and not edge.is_managed
        assert edge.model_copy(update={"base": Base.MANAGED}).is_managed
        assert host.short == "out1-hosts"

    def test_legs(self, example: Platform) -> None:
        host = example.hosts[HOST]
        assert example.leg(host, NetworkKind.SITE_LOCAL) is None
        assert example.internal_leg(host) == host.interfaces[0]
        assert example.network_of(host.interfaces[0]).bridge == "br0"

    def test_the_first_leg_carries_the_default_routes(self, example: Platform) -> None:
        host = example.hosts[HOST]
        assert example.routes(host, host.interfaces[0]) == (
            Route.model_validate({"prefix": "0.0.0.0/0", "gateway": "198.51.100.1"}),
            Route.model_validate({"prefix": "::/0", "gateway": "2001:db8:1::1"}),
        )

    def test_a_second_site_local_leg_carries_the_site_local_routes(self, example: Platform) -> None:
        inner = model.Network.model_validate(
            {
                "site": "north",
                "kind": "site-local",
                "bridge": "br1",
                "ipv4": {"prefix": "10.1.0.0/24", "gateway": "10.1.0.1"},
                "ipv6": {"prefix": "fd00:1::/64", "gateway": "fd00:1::1"},
            }
        )
        leg = Interface.model_validate(
            {"network": "inner", "ipv4": "10.1.0.9", "ipv6": "fd00:1::9"}
        )
        first = example.hosts[HOST]
        host: Host = first.model_copy(update={"interfaces": (*first.interfaces, leg)})
        space = model.SiteLocal.model_validate({"ipv4": "10.0.0.0/8", "ipv6": "fd00::/16"})
        platform = example.model_copy(
            update={"networks": {**example.networks, "inner": inner}, "site_local": space}
        )
        assert platform.internal_leg(host) == leg
        assert [(str(r.prefix), str(r.gateway)) for r in platform.routes(host, leg)] == [
            ("10.0.0.0/8", "10.1.0.1"),
            ("fd00::/16", "fd00:1::1"),
        ]
        public = inner.model_copy(update={"kind": NetworkKind.PUBLIC})
        platform = platform.model_copy(update={"networks": {**example.networks, "inner": public}})
        assert platform.routes(host, leg) == ()

    def test_another_world(self, example: Platform) -> None:
        changed = example.with_world(World(trust_anchors=(". DS 1",)))
        assert changed.world.trust_anchors == (". DS 1",)
        assert example.world == World()

    def test_a_domain_s_zone_and_signing_key(self, example: Platform) -> None:
        lists = example.domains["lists.example.net"]
        assert (lists.dns_zone, example.domains["example.org"].dns_zone) == (
            "example.net",
            "example.org",
        )
        assert lists.signing_key is not None and lists.signing_key.selector == "s2026"
        assert example.domains["example.com"].signing_key is None


class TestTargets:
    """Where the mail of an address goes."""

    @pytest.mark.parametrize(
        ("text", "target"),
        [
            ("box", MailboxTarget("box")),
            ("box.1_a", MailboxTarget("box.1_a")),
            ("box+tag", MailboxTarget("box", "tag")),
            ("user@example.org", AddressTarget("user", "example.org")),
            ("User.Name+x@example.org", AddressTarget("User.Name+x", "example.org")),
            ("/dev/null", Nowhere()),
        ],
    )
    def test_a_target_is_read_and_written_alike(self, text: str, target: Target) -> None:
        assert parse_target(text) == target
        assert str(target) == text
        assert parse_target(target) is target

    @pytest.mark.parametrize(
        "text",
        [
            *("", "+", "+tag", "box+", "box+a+b", "Box", "a b", "a,b", "*", "/dev/zero", "|cat"),
            *(":include:/etc/passwd", "@example.org", "a@", "a@b", "a b@example.org", "-a"),
            *("a%b@example.org", "a!b@example.org", '"a b"@example.org', "a@b@example.org"),
            *("a..b@example.org", ".a@example.org", "a.@example.org", "a@Example.org", "a\n"),
            *("x" * 65 + "@example.org", "ä@example.org", "a@example.org,b@example.org"),
        ],
    )
    def test_what_postfix_could_read_as_something_else_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="; write"):
            parse_target(text)

    @given(st.text(max_size=12))
    def test_whatever_is_read_is_one_word(self, text: str) -> None:
        try:
            target = parse_target(text)
        except ValueError:
            return
        assert str(target) == text
        assert text.isascii() and not any(c.isspace() or c in ',;:|"\\()<>%!' for c in text)

    def test_one_target_or_several(self) -> None:
        data = {"name": "example.org", "addresses": {"a": "box", "b": ["box", "x@example.net"]}}
        domain = MailDomain.model_validate(data)
        assert domain.addresses == {
            "a": (MailboxTarget("box"),),
            "b": (MailboxTarget("box"), AddressTarget("x", "example.net")),
        }


class TestAnswers:
    """Filters of DNSBL answers, in Postfix's notation."""

    @pytest.mark.parametrize(
        ("text", "last"),
        [
            ("127.0.0.2", {2}),
            ("127.0.0.[2..4]", {2, 3, 4}),
            ("127.0.0.[2;4..5;255]", {2, 4, 5, 255}),
        ],
    )
    def test_each_part_is_a_set_of_numbers(self, text: str, last: set[int]) -> None:
        assert answer_octets(text) == ({127}, {0}, {0}, last)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "127.0.0", "127.0.0.256", "127.0.0.[]", "127.0.0.[3..2]", "127.0.0.[2..]"),
            *("127.0.0.2/8", "127.0.0.*", "127.0.0.[2,3]", "127.0.0.2 ", "127.0.0.[1..300]"),
        ],
    )
    def test_other_texts_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError):
            answer_octets(text)


def test_tiers_have_names_inside(example: Platform) -> None:
    assert example.internal_name(Role.RSPAMD) == "rspamd.hosts.example.org"
    assert example.maildrop_domain == "maildrop.hosts.example.org"
