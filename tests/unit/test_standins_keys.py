"""The random and tls stand-ins: what they make is what it says."""

from __future__ import annotations

import base64
import hashlib
import string
from collections import Counter
from collections.abc import Iterator
from typing import Any

import asyncssh
import bcrypt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.standins.random import (
    SPECIAL,
    Random,
    RandomBytes,
    RandomId,
    RandomPassword,
    RandomString,
    generate,
)
from rehearsal.standins.tls import PrivateKey, Tls
from rehearsal.standins.values import UNKNOWN, Secret, has_unknown, plain
from tests.engine.client import Client, connected

KEY = PrivateKey.token
CLASSES = {
    "lower": string.ascii_lowercase,
    "upper": string.ascii_uppercase,
    "numeric": string.digits,
    "special": SPECIAL,
}


@pytest.fixture(scope="module")
def random() -> Iterator[Client]:
    with connected(Random()) as client:
        yield client


@pytest.fixture(scope="module")
def tls() -> Iterator[Client]:
    with connected(Tls()) as client:
        yield client


def test_a_password_is_secret_and_its_hash_is_its_own(random: Client) -> None:
    made = random.create(RandomPassword.token, {"length": 20, "special": False})
    assert isinstance(made.state["result"], Secret)
    assert isinstance(made.state["bcryptHash"], Secret)
    result, digest = plain(made.state["result"]), plain(made.state["bcryptHash"])
    assert len(result) == 20
    assert result.isalnum()
    assert digest.startswith("$2a$10$")
    assert bcrypt.checkpw(result.encode(), digest.encode())
    assert result not in made.id


def test_a_long_password_is_hashed_as_far_as_bcrypt_reads(random: Client) -> None:
    made = random.create(RandomPassword.token, {"length": 100})
    result, digest = plain(made.state["result"]), plain(made.state["bcryptHash"])
    assert bcrypt.checkpw(result.encode()[:72], digest.encode())


def test_no_two_are_alike(random: Client) -> None:
    made = {plain(random.create(RandomBytes.token, {"length": 16}).state["hex"]) for _ in range(20)}
    assert len(made) == 20


@given(
    least=st.fixed_dictionaries({name: st.integers(0, 5) for name in CLASSES}),
    more=st.integers(0, 20),
    off=st.sets(st.sampled_from(sorted(CLASSES)), max_size=3),
)
@settings(max_examples=50)
def test_a_string_keeps_to_its_rules(least: dict[str, int], more: int, off: set[str]) -> None:
    least = {name: 0 if name in off else count for name, count in least.items()}
    inputs: dict[str, Any] = {name: name not in off for name in CLASSES} | {"number": True}
    inputs |= {f"min{name.title()}": count for name, count in least.items()}
    inputs["length"] = sum(least.values()) + more
    result = Counter(generate(inputs))
    assert result.total() == inputs["length"]
    for name, characters in CLASSES.items():
        count = sum(result[character] for character in characters)
        assert count >= least[name]
        assert name not in off or count == 0


def test_special_characters_can_be_chosen(random: Client) -> None:
    made = random.create(
        RandomString.token,
        {"length": 30, "lower": False, "upper": False, "numeric": False, "overrideSpecial": "-."},
    )
    assert set(made.state["result"]) == {"-", "."}


@pytest.mark.parametrize(
    ("token", "inputs", "property"),
    [
        (RandomString.token, {"length": 3, "minLower": 4}, "length"),
        (RandomString.token, {"length": 0}, "length"),
        (RandomBytes.token, {"length": 0}, "length"),
        (RandomId.token, {"byteLength": 0}, "byteLength"),
        (RandomBytes.token, {}, "length"),
        (RandomBytes.token, {"length": "12"}, "length"),
    ],
)
def test_impossible_lengths_are_refused(
    random: Client, token: str, inputs: dict[str, Any], property: str
) -> None:
    _, failures = random.check(token, inputs)
    assert list(failures) == [property]


def test_bytes_are_the_same_in_each_notation(random: Client) -> None:
    made = random.create(RandomBytes.token, {"length": 32})
    octets = base64.b64decode(plain(made.state["base64"]))
    assert len(octets) == 32
    assert octets.hex() == plain(made.state["hex"])
    named = random.create(RandomId.token, {"byteLength": 5, "prefix": "x-"}).state
    octets = base64.b64decode(named["b64Std"].removeprefix("x-"))
    assert named["hex"] == f"x-{octets.hex()}"
    assert named["dec"] == f"x-{int.from_bytes(octets, 'big')}"
    assert named["b64Url"] == "x-" + base64.urlsafe_b64encode(octets).decode().rstrip("=")


def test_values_stay_until_an_input_changes(random: Client) -> None:
    made = random.create(RandomPassword.token, {"length": 20})
    assert not random.diff(RandomPassword.token, made.inputs, made.inputs).changed
    longer, _ = random.check(RandomPassword.token, {"length": 21}, made.inputs)
    assert random.diff(RandomPassword.token, made.inputs, longer).replaces == ["length"]
    assert random.read(made) == made.state


def test_a_preview_makes_no_value(random: Client, tls: Client) -> None:
    outputs = random.preview(RandomPassword.token, {"length": UNKNOWN})
    assert has_unknown(outputs["result"])
    assert has_unknown(tls.preview(KEY, {"algorithm": "RSA"})["publicKeyPem"])


@pytest.mark.parametrize(
    ("inputs", "kind", "head"),
    [
        ({"algorithm": "RSA", "rsaBits": 2048}, rsa.RSAPrivateKey, "RSA PRIVATE KEY"),
        ({"algorithm": "ECDSA", "ecdsaCurve": "P256"}, ec.EllipticCurvePrivateKey, "EC PRIVATE"),
        ({"algorithm": "ED25519"}, ed25519.Ed25519PrivateKey, "PRIVATE KEY"),
    ],
)
def test_a_key_is_the_same_in_each_format(
    tls: Client, inputs: dict[str, Any], kind: type, head: str
) -> None:
    state = tls.create(KEY, inputs).state
    private = ["privateKeyPem", "privateKeyPemPkcs8", "privateKeyOpenssh"]
    assert all(isinstance(state[name], Secret) for name in private)
    pem, pkcs8, openssh = (plain(state[name]) for name in private)
    key = serialization.load_pem_private_key(pem.encode(), None)
    assert isinstance(key, kind)
    assert pem.startswith(f"-----BEGIN {head}")
    assert pkcs8.startswith("-----BEGIN PRIVATE KEY-----\n")
    assert serialization.load_pem_private_key(pkcs8.encode(), None) == key or (
        public_pem(serialization.load_pem_private_key(pkcs8.encode(), None)) == public_pem(key)
    )
    assert public_pem(key) == state["publicKeyPem"]
    ssh = asyncssh.import_private_key(openssh)
    line = ssh.export_public_key().decode().split()[:2]
    assert state["publicKeyOpenssh"] == " ".join(line) + "\n"
    assert state["publicKeyFingerprintSha256"] == ssh.get_fingerprint("sha256")
    assert f"MD5:{state['publicKeyFingerprintMd5']}" == ssh.get_fingerprint("md5")


def public_pem(key: Any) -> str:
    text: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return text.decode()


def test_an_rsa_key_is_as_long_as_wanted(tls: Client) -> None:
    state = tls.create(KEY, {"algorithm": "RSA", "rsaBits": 3072}).state
    key = serialization.load_pem_private_key(plain(state["privateKeyPem"]).encode(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    assert key.key_size == 3072


def test_p224_has_no_openssh_format(tls: Client) -> None:
    state = tls.create(KEY, {"algorithm": "ECDSA"}).state
    assert (plain(state["privateKeyOpenssh"]), state["publicKeyOpenssh"]) == ("", "")


def test_the_id_is_the_hash_of_the_public_key(tls: Client) -> None:
    made = tls.create(KEY, {"algorithm": "ED25519"})
    der = serialization.load_pem_public_key(made.state["publicKeyPem"].encode()).public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert made.id == hashlib.sha1(der).hexdigest()


@pytest.mark.parametrize(
    ("inputs", "property"),
    [
        ({"algorithm": "DSA"}, "algorithm"),
        ({"algorithm": "ECDSA", "ecdsaCurve": "P1"}, "ecdsaCurve"),
        ({"algorithm": "RSA", "rsaBits": 512}, "rsaBits"),
    ],
)
def test_unknown_kinds_of_key_are_refused(
    tls: Client, inputs: dict[str, Any], property: str
) -> None:
    _, failures = tls.check(KEY, inputs)
    assert list(failures) == [property]
