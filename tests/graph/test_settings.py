"""What the program refuses to start with, before anything is registered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pulumi
import pytest
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from components.secrets import SecretStore, SecretStoreArgs, public_half
from mailsite.loader import load_platform
from mailsite.records import public_key_base64

from .conftest import live_config, stack_config
from .graph import COMMAND, MARK, PRIVATE_KEY, ROOT, SECRET_KEYS, Graph, build

HOST = "out1.hosts.example.org"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA/7Nhj+QV63qMIL+VztXuUc6z0XFWi87ZXyrbfcj3cb"


def refusal(config: Mapping[str, Any], *, preview: bool = False) -> str:
    """The text that the operator reads; nothing may have been registered by then."""
    seen = Graph()
    with pytest.raises(pulumi.RunError) as caught:
        build(config, preview=preview, graph=seen)
    assert seen.registrations == {}
    return str(caught.value)


def without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.fixture
def overlay(tmp_path: Path) -> Callable[[Mapping[str, Any]], str]:
    def write(world: Mapping[str, Any]) -> str:
        path = tmp_path / "world.yaml"
        path.write_text(json.dumps(world))
        return str(path)

    return write


# -- live or not ------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", ["prod", "example"])
def test_up_refuses_the_committed_stacks(stack: str) -> None:
    text = refusal(without(live_config(stack), "live"))
    assert "is not live" in text
    assert "make rehearsal" in text
    assert "pulumi config set mail:live true" in text


def test_up_refuses_a_stack_that_says_that_it_is_not_live() -> None:
    assert "is not live" in refusal(live_config("example", live="false"))


@pytest.mark.parametrize("stack", ["prod", "example"])
def test_a_preview_of_the_committed_stacks_works_as_they_are(stack: str) -> None:
    graph = build(stack_config(stack), preview=True)
    assert graph.of_type(COMMAND)
    (warning,) = [line for line in graph.log if "missing from the stack's config" in line]
    acme = load_platform(ROOT / stack_config(stack)["site"]).certificates
    key = "certificates" if acme is None else "secrets"
    assert f"pulumi config set --secret --path 'mail:{key}[" in warning


def test_a_preview_without_certificates_has_the_resources_of_an_update(
    graphs: Callable[[str, bool], Graph],
) -> None:
    bare = build(without(live_config("example"), "certificates"), preview=True)
    assert set(bare.registrations) == set(graphs("example", False).registrations)


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULUMI_DEBUG_PROVIDERS", "libvirt:1,cloudflare:2,command:3")


@pytest.mark.usefixtures("attached")
def test_a_rehearsal_needs_no_live_stack(overlay: Callable[[Mapping[str, Any]], str]) -> None:
    config = without(live_config("example"), "live") | {"rehearsal": overlay({})}
    assert build(config).of_type(COMMAND)


@pytest.mark.parametrize("providers", ["", "command:3", "libvirt:1,command:3"])
def test_a_rehearsal_that_is_not_attached_to_its_stand_ins_is_refused(
    overlay: Callable[[Mapping[str, Any]], str], monkeypatch: pytest.MonkeyPatch, providers: str
) -> None:
    monkeypatch.setenv("PULUMI_DEBUG_PROVIDERS", providers)
    text = refusal(live_config("example") | {"rehearsal": overlay({})})
    assert "not attached to the rehearsal's stand-ins" in text


@pytest.mark.usefixtures("attached")
def test_existing_machines_of_a_rehearsal_have_keys_of_their_own(
    overlay: Callable[[Mapping[str, Any]], str],
) -> None:
    keys = {f"edge{n}.hosts.example.org": KEY for n in (1, 2)}
    graph = build(live_config("example", rehearsal=overlay({"ssh_host_keys": keys})))
    for name in keys:
        found = graph.one(COMMAND, f"{name}-config")
        assert found.inputs["connection"]["hostKey"] == KEY


# -- what is missing or wrong -----------------------------------------------------------------


def test_up_without_the_token_of_the_acme_client_names_the_command_that_gives_it(
    acme_site: Path,
) -> None:
    text = refusal(live_config("example", site=str(acme_site)))
    name = "acme/CLOUDFLARE_DNS_API_TOKEN"
    assert f"--secret --path 'mail:secrets[\"{name}\"]' < CLOUDFLARE_DNS_API_TOKEN.txt" in text


def test_up_without_a_certificate_names_the_command_that_gives_it() -> None:
    text = refusal(without(live_config("example"), "certificates"))
    for part in ("chain", "key"):
        assert f"'mail:certificates[\"submission.example.org\"].{part}'" in text


def test_up_without_any_key_to_log_in_with_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    config = without(live_config("example"), "deployKey")
    assert "start an ssh agent" in refusal(config)
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent.1")
    for push in build(config).of_type(COMMAND):
        # The socket's path is new at every login: as an input it would run every push again.
        assert not {"privateKey", "agentSocketPath"} & set(push.inputs["connection"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"site": None}, "mail:site is not set"),
        ({"deployPublicKey": None}, "mail:deployPublicKey is not set"),
        ({"site": "sites/none"}, "does not exist"),
        ({"zoneIds": {"example.org": "short"}}, "32 hexadecimal"),
        ({"zoneIds": {"example.edu": "0" * 32}}, "'example.edu' is no zone of the platform"),
        ({"zoneIds": "nonsense"}, "mail:zoneIds is no mapping"),
        ({"secrets": {"dkim/example.org": MARK}}, "'dkim/example.org' is no secret"),
        ({"secrets": {"sasl/alice": MARK}}, "sasl/alice is no Dovecot hash"),
        ({"secrets": {"sasl/alice": ""}}, "sasl/alice is no text"),
        ({"secrets": {"srs/srs1": MARK}}, "srs/srs1 is no word of 32 to 64 letters"),
        ({"secrets": {"redis/password": f"{MARK} with spaces"}}, "redis/password is no word"),
        ({"secrets": {"sasl-password/webmail": f"{MARK} x"}}, "webmail is no password of 16"),
        ({"secrets": {"roundcube/des-key": MARK}}, "roundcube/des-key is no key of 32 letters"),
        (
            {"secrets": {"sasl/webmail": f"{{BLF-CRYPT}}{MARK}"}},
            "give the other one too, run: pulumi config set --secret --path"
            " 'mail:secrets[\"sasl-password/webmail\"]'",
        ),
        (
            {"secrets": {"sasl-password/webmail": "sixteenormoreletters"}},
            "'mail:secrets[\"sasl/webmail\"]'",
        ),
        ({"certificates": {"submission.example.org": {"key": MARK}}}, "'chain' and 'key'"),
        (
            {"certificates": {"submission.example.org": {"key": MARK, "chain": MARK}}},
            "not in PEM format",
        ),
    ],
)
def test_bad_configuration_is_one_clear_error_that_shows_no_value(
    changes: Mapping[str, Any], words: str
) -> None:
    config = {k: v for k, v in live_config("example", **changes).items() if v is not None}
    for preview in (False, True):
        text = refusal(config, preview=preview)
        assert words in text
        assert MARK not in text


def test_bad_site_data_is_refused_with_file_and_line(
    edited: Callable[..., Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def misspell(data: Any) -> None:
        data["hosts"][HOST]["rolls"] = ["smtp-out"]

    with pytest.raises(pulumi.RunError, match=r"topology\.yaml:\d+: unknown key 'rolls'"):
        edited("example", "topology.yaml", misspell)


def test_dns_that_cannot_work_is_refused_before_anything_is_registered(
    edited: Callable[..., Graph],
) -> None:
    def too_many(data: Any) -> None:
        data["spf"]["ipv4"] += [f"203.0.113.{n}/32" for n in range(250)]

    seen = Graph()
    with pytest.raises(pulumi.RunError, match=r"bytes; 4096 are possible"):
        edited("example", "site.yaml", too_many, graph=seen)
    assert seen.registrations == {}


@pytest.mark.parametrize("key", ["secrets", "certificates", "deployKey"])
def test_secrets_in_a_plain_stack_file_are_refused(key: str) -> None:
    config = live_config("example", secrets={"sasl/alice": f"{{BLF-CRYPT}}{MARK}"})
    seen = Graph()
    with pytest.raises(pulumi.RunError, match=f"mail:{key} stands unencrypted") as caught:
        build(config, graph=seen, secret_keys=[k for k in SECRET_KEYS if k != key])
    assert MARK not in str(caught.value)
    assert seen.registrations == {}


# -- secrets that the operator brought --------------------------------------------------------


def pem(key: Any, private_format: Any = form.PrivateFormat.TraditionalOpenSSL) -> str:
    encoded = key.private_bytes(form.Encoding.PEM, private_format, form.NoEncryption())
    return str(encoded.decode())


@dataclass(frozen=True)
class Brought:
    """Secrets by name, one of each kind, and the graph of the example with them."""

    secrets: Mapping[str, str]
    graph: Graph


@pytest.fixture(scope="module")
def brought() -> Brought:
    dkim = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    host_key = ed25519.Ed25519PrivateKey.generate()
    secrets = {
        "dkim/example.org/s2026": pem(dkim),
        "sasl/webmail": f"{{BLF-CRYPT}}$2y$05${MARK}webmail",
        "sasl-password/webmail": f"{MARK}0123456789abcdef",
        "sasl/alice": f"{{BLF-CRYPT}}$2y$05${MARK}alice",
        f"ssh-host-key/{HOST}": pem(host_key, form.PrivateFormat.OpenSSH),
    }
    return Brought(secrets, build(live_config("example", secrets=secrets)))


def test_a_given_dkim_key_is_used_and_its_public_half_published(brought: Brought) -> None:
    graph, given = brought.graph, brought.secrets["dkim/example.org/s2026"]
    public = form.load_pem_private_key(given.encode(), None).public_key()
    encoded = public.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    assert "dkim-example.org-s2026" not in {r.name for r in graph.of_type(PRIVATE_KEY)}
    assert public_key_base64(encoded.decode()) in graph.outputs["zones"].replace('" "', "")
    push = graph.one(COMMAND, f"{HOST}-secrets")
    assert json.dumps(given)[1:-1] in push.inputs["stdin"]
    body = given.splitlines()[1]
    assert not any(body in r.visible for r in graph.registrations.values())


def test_webmail_logs_in_with_a_password_that_was_given_with_its_hash(brought: Brought) -> None:
    graph = brought.graph
    hashed, plain = (brought.secrets[f"{kind}/webmail"] for kind in ("sasl", "sasl-password"))
    assert plain in graph.one(COMMAND, "web1.hosts.example.org-secrets").inputs["stdin"]
    assert hashed in graph.one(COMMAND, f"{HOST}-secrets").inputs["stdin"]
    assert plain not in graph.one(COMMAND, f"{HOST}-secrets").inputs["stdin"]


def test_a_given_hash_replaces_the_generated_password(brought: Brought) -> None:
    assert "alice" not in brought.graph.outputs["sasl_passwords"]
    push = brought.graph.one(COMMAND, f"{HOST}-secrets")
    assert brought.secrets["sasl/alice"] in push.inputs["stdin"]


def test_a_given_host_key_is_expected_of_the_host(brought: Brought) -> None:
    expected = public_half(brought.secrets[f"ssh-host-key/{HOST}"])
    assert expected.startswith("ssh-ed25519 ")
    config = brought.graph.one(COMMAND, f"{HOST}-config")
    assert config.inputs["connection"]["hostKey"] == expected


def test_no_secret_that_was_given_is_visible(brought: Brought) -> None:
    assert not any(MARK in r.visible for r in brought.graph.registrations.values())


def test_secret_keys_of_the_configuration_are_secret_inputs_only(
    graphs: Callable[[str, bool], Graph],
) -> None:
    for push in graphs("example", False).of_type(COMMAND):
        assert "connection.privateKey" in push.secret or "connection" in push.secret


def test_the_stack_files_name_sites_that_load() -> None:
    for stack in ("prod", "example"):
        config = stack_config(stack)
        assert "live" not in config
        platform = load_platform(ROOT / config["site"])
        assert set(config.get("zoneIds", {})) <= {d.dns_zone for d in platform.domains.values()}


def test_a_registration_before_a_refusal_would_be_seen() -> None:
    def late() -> None:
        pulumi.ComponentResource("mail:index:Host", "early")
        raise pulumi.RunError("too late")

    seen = Graph()
    with pytest.raises(pulumi.RunError):
        build(live_config("example"), program=late, graph=seen)
    assert [r.name for r in seen.registrations.values()] == ["early"]


def test_whatever_the_store_hands_out_is_a_secret() -> None:
    platform = load_platform(ROOT / "sites/example")
    hashed = platform.sasl_users["bob"].model_copy(update={"password_hash": "{PLAIN}x"})
    platform = platform.model_copy(
        update={"sasl_users": {**platform.sasl_users, hashed.name: hashed}}
    )
    names = ["dkim/example.org/s2026", "sasl/alice", "sasl/bob", f"ssh-host-key/{HOST}"]
    secrecy: dict[str, bool] = {}

    def program() -> None:
        store = SecretStore("secrets", SecretStoreArgs(platform, {}, [HOST], []))
        outputs = {name: store.get(name) for name in names} | {"digest": store.digest_key}

        async def look() -> None:
            for name, output in outputs.items():
                secrecy[name] = await output.is_secret()

        pulumi.Output.from_input(look())

    build(live_config("example"), program=program)
    assert secrecy == dict.fromkeys([*names, "digest"], True)
