"""pulumi-tls (5): private keys.

Everything here lives in the stack's state alone; any change of an input makes a new key.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from typing import ClassVar, Final, TypeAlias

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from .base import Call, Created, Failure, Input, Output, Provider, Resource
from .values import UNKNOWN, Properties

Key: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

CURVES: Final[Mapping[str, type[ec.EllipticCurve]]] = {
    "P224": ec.SECP224R1,
    "P256": ec.SECP256R1,
    "P384": ec.SECP384R1,
    "P521": ec.SECP521R1,
}
ALGORITHMS: Final = ("RSA", "ECDSA", "ED25519")


def new_key(algorithm: str, rsa_bits: int, curve: str) -> Key:
    """Generate a key of one of :data:`ALGORITHMS`."""
    if algorithm == "RSA":
        return rsa.generate_private_key(public_exponent=65537, key_size=rsa_bits)
    if algorithm == "ECDSA":
        return ec.generate_private_key(CURVES[curve]())
    return ed25519.Ed25519PrivateKey.generate()


def _pem(key: Key, form: serialization.PrivateFormat) -> str:
    encoded = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return encoded.decode()


def describe(key: Key) -> Properties:
    """Every output of a PrivateKey, in the formats of the real provider.

    ``privateKeyPem`` is PKCS#1 for RSA, SEC 1 for ECDSA and PKCS#8 for Ed25519. OpenSSH knows no
    P224: the outputs in its format are then empty.
    """
    traditional = (
        serialization.PrivateFormat.PKCS8
        if isinstance(key, ed25519.Ed25519PrivateKey)
        else serialization.PrivateFormat.TraditionalOpenSSL
    )
    public = key.public_key()
    has_openssh = not (
        isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP224R1)
    )
    openssh_line, md5, sha256 = "", "", ""
    if has_openssh:
        line = public.public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        ).decode()
        blob = base64.b64decode(line.split()[1])
        openssh_line = f"{line}\n"
        md5 = hashlib.md5(blob, usedforsecurity=False).digest().hex(":")
        digest = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
        sha256 = f"SHA256:{digest}"
    public_pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return {
        "privateKeyPem": _pem(key, traditional),
        "privateKeyPemPkcs8": _pem(key, serialization.PrivateFormat.PKCS8),
        "privateKeyOpenssh": (
            _pem(key, serialization.PrivateFormat.OpenSSH) if has_openssh else ""
        ),
        "publicKeyPem": public_pem.decode(),
        "publicKeyOpenssh": openssh_line,
        "publicKeyFingerprintMd5": md5,
        "publicKeyFingerprintSha256": sha256,
    }


class PrivateKey(Resource):
    """A key pair."""

    token = "tls:index/privateKey:PrivateKey"
    inputs: ClassVar[Mapping[str, Input]] = {
        "algorithm": Input("string", required=True, replaces=True),
        "rsaBits": Input("integer", default=2048, replaces=True),
        "ecdsaCurve": Input("string", default="P224", replaces=True),
    }
    outputs: ClassVar[Mapping[str, Output]] = {
        "privateKeyPem": Output(secret=True),
        "privateKeyPemPkcs8": Output(secret=True),
        "privateKeyOpenssh": Output(secret=True),
        "publicKeyPem": Output(),
        "publicKeyOpenssh": Output(),
        "publicKeyFingerprintMd5": Output(),
        "publicKeyFingerprintSha256": Output(),
    }

    def check(self, inputs: Properties) -> Iterator[Failure]:
        algorithm, curve, bits = inputs["algorithm"], inputs["ecdsaCurve"], inputs["rsaBits"]
        if algorithm is not UNKNOWN and algorithm not in ALGORITHMS:
            yield Failure(
                "algorithm",
                f"Attribute algorithm value must be one of: {list(ALGORITHMS)}, got: {algorithm!r}",
            )
        if curve is not UNKNOWN and curve not in CURVES:
            yield Failure(
                "ecdsaCurve",
                f"Attribute ecdsa_curve value must be one of: {list(CURVES)}, got: {curve!r}",
            )
        if bits is not UNKNOWN and algorithm == "RSA" and bits < 1024:
            yield Failure("rsaBits", f"crypto/rsa: {bits}-bit keys are insecure")

    def create(self, inputs: Properties, call: Call) -> Created:
        key = new_key(inputs["algorithm"], inputs["rsaBits"], inputs["ecdsaCurve"])
        outputs = describe(key)
        der = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return Created(hashlib.sha1(der, usedforsecurity=False).hexdigest(), outputs)


class Tls(Provider):
    """The package ``tls``."""

    package = "tls"

    def __init__(self) -> None:
        super().__init__({PrivateKey.token: PrivateKey()})
