"""What the render tests share: the image, secrets, and every host of both sites."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from mailsite.bundle import ROLES, compose, compose_secrets
from mailsite.fragment import File
from mailsite.loader import load_platform
from mailsite.model import Host, Platform, World
from mailsite.rspamd_password import SALT_BYTES, password_hash
from mailsite.secrets import required
from rehearsal import image as layers
from rehearsal.progress import Progress, RehearsalError
from tests.render.image import Image

SITES = Path(__file__).resolve().parents[2] / "sites"
PASSWORD_HASH = "{BLF-CRYPT}$2b$04$abcdefghijklmnopqrstuuTg4oQ0dzZrmuQmMFjCGpjKxUzWHGxS6"
#: Of the password "invented", as the platform makes it.
CONTROLLER_HASH = password_hash("invented", bytes(range(SALT_BYTES)))


@pytest.fixture(scope="session")
def image() -> Image:
    if os.geteuid() != 0:
        pytest.skip("needs root: the checkers run on an image of the host, in namespaces")
    try:
        return Image(layers.ensure(Progress()))
    except RehearsalError as error:
        pytest.skip(f"no image of a host: {error}")


@cache
def key() -> rsa.RSAPrivateKey:
    """One key for every purpose: making them takes longest."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@cache
def key_pem() -> str:
    return (
        key()
        .private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        .decode()
    )


@cache
def certificate(name: str, *more: str) -> str:
    """A self-signed certificate for ``name`` and ``more`` names, PEM."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    names = [x509.DNSName(n) for n in (name, *more)]
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key().public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=9))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key(), hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )


def secret_values(platform: Platform, host: Host) -> Mapping[str, str]:
    """A value for each secret of ``host``."""
    made = {}
    for name in required(platform, host):
        match name.split("/"):
            case ["sasl" | "mailbox", _]:
                made[name] = PASSWORD_HASH
            case ["certificate", fqdn, "chain"]:
                made[name] = certificate(*platform.certificate_names(fqdn))
            case ["srs" | "redis" | "sasl-password", given]:
                made[name] = f"invented{given}0123456789abcdef"
            case ["pairsync", given] | ["rspamd", "controller-password" as given]:
                made[name] = f"invented{given}0123456789abcdef0123456789"
            case ["sasl-password", _] | ["roundcube", _]:
                made[name] = "invented0123456789abcdef01234567"
            case ["rspamd", _]:
                made[name] = CONTROLLER_HASH
            case _:
                made[name] = key_pem()
    return made


def all_files(platform: Platform, host: Host) -> dict[str, File]:
    """Everything that ``host`` gets, the secret files too."""
    secret = compose_secrets(platform, host, secret_values(platform, host))
    return {**compose(platform, host).files, **secret}


@dataclass(frozen=True)
class Case:
    """A host of a site."""

    site: str
    platform: Platform
    host: Host

    @property
    def id(self) -> str:
        return f"{self.site}-{self.host.name}"


def cases() -> list[Case]:
    """Every host of both sites that has a role of ours, and one of each other role."""
    found = []
    for folder in sorted(p for p in SITES.iterdir() if (p / "site.yaml").exists()):
        platform = load_platform(folder)
        ours = [h for h in platform.hosts.values() if set(h.roles) & set(ROLES)]
        others = {h.main_role: h for h in platform.hosts.values() if h not in ours}
        found += [Case(folder.name, platform, host) for host in (*ours, *others.values())]
    return found


def in_rehearsal(platform: Platform) -> Platform:
    """The platform with a world of its own: another trust anchor and an authority."""
    digest = "0123456789ABCDEF" * 4
    world = platform.world.model_dump() | {
        "trust_anchors": (f". 86400 IN DS 12345 13 2 {digest}",),
        "ca_certificates": (certificate("authority.invented.example"),),
    }
    return platform.with_world(World.model_validate(world))
