"""The certificate authority of a rehearsal.

A root, an intermediate and leaf certificates, as a public authority has them: services present
leaf and intermediate, hosts trust the root alone (:attr:`mailsite.model.World.ca_certificates`),
so a service that forgets its chain is seen. Everything lies in one folder that only its owner may
read and is issued once: a second run finds the same certificates, and nothing changes on a host.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from rehearsal.state import write_atomic

_YEAR = datetime.timedelta(days=365)
_SLACK = datetime.timedelta(hours=1)
_RENEW = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Issued:
    """A certificate with what belongs to it; all three are PEM.

    ``chain`` is what a service presents: the leaf, then the intermediate.
    """

    chain: str
    key: str
    names: tuple[str, ...]

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.chain.encode())

    @property
    def public_key_sha256(self) -> str:
        """Digest of the public key as in a TLSA record ``3 1 1`` (RFC 6698), in hexadecimal."""
        public = self.certificate.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha256(public).hexdigest()


@dataclass(frozen=True)
class _Signer:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


class Authority:
    """Issues the certificates of a rehearsal and keeps them below ``folder``.

    :param folder: where keys and certificates are kept; made with mode 0700.
    :param now: the clock, for tests.
    """

    def __init__(
        self,
        folder: Path,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self.folder = folder
        self._now = now

    @property
    def root_pem(self) -> str:
        """The root certificate: what a host has to trust."""
        return _pem(self._root().certificate)

    def issue(self, names: Sequence[str], *, days: int = 365) -> Issued:
        """A certificate for ``names`` (domain names, wildcards or addresses).

        The same names give the same certificate until 30 days before its end.
        """
        return self._kept("issued", names, days, self._intermediate)

    def self_signed(self, names: Sequence[str], *, days: int = 365) -> Issued:
        """A certificate for ``names`` that no authority vouches for (for DANE-EE, RFC 7672)."""
        return self._kept("self-signed", names, days, None)

    def _root(self) -> _Signer:
        return self._authority("root", "Rehearsal Root CA", None, path_length=1)

    def _intermediate(self) -> _Signer:
        return self._authority("intermediate", "Rehearsal CA", self._root(), path_length=0)

    def _authority(
        self, stem: str, common_name: str, parent: _Signer | None, *, path_length: int
    ) -> _Signer:
        path = self.folder / f"{stem}.pem"
        if not path.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            name = _name(common_name)
            certificate = (
                self._builder(name, parent.certificate.subject if parent else name, key, 10 * _YEAR)
                .add_extension(x509.BasicConstraints(True, path_length), critical=True)
                .add_extension(_usage(authority=True), critical=True)
                .sign(parent.key if parent else key, hashes.SHA256())
            )
            self._write(path, _pem(certificate) + _key_pem(key), keep=True)
        return _load(path.read_text(encoding="ascii"))

    def _kept(
        self,
        kind: str,
        names: Sequence[str],
        days: int,
        signer: Callable[[], _Signer] | None,
    ) -> Issued:
        if not names:
            raise ValueError("a certificate needs a name; give at least one")
        digest = hashlib.sha256("\n".join([str(days), *names]).encode()).hexdigest()[:16]
        path = self.folder / kind / f"{digest}.pem"
        if path.exists():
            issued = _split(path.read_text(encoding="ascii"), tuple(names))
            left = issued.certificate.not_valid_after_utc - self._now()
            if left > min(_RENEW, datetime.timedelta(days=days) / 3):
                return issued
        parent = signer() if signer else None
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(names[0])
        certificate = (
            self._builder(
                subject,
                parent.certificate.subject if parent else subject,
                key,
                datetime.timedelta(days=days),
            )
            .add_extension(x509.BasicConstraints(False, None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .add_extension(
                x509.SubjectAlternativeName([_general_name(n) for n in names]), critical=False
            )
            .sign(parent.key if parent else key, hashes.SHA256())
        )
        chain = _pem(certificate) + (_pem(parent.certificate) if parent else "")
        self._write(path, chain + _key_pem(key), keep=not path.exists())
        return _split(path.read_text(encoding="ascii"), tuple(names))

    def _builder(
        self,
        subject: x509.Name,
        issuer: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        lifetime: datetime.timedelta,
    ) -> x509.CertificateBuilder:
        now = self._now()
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SLACK)
            .not_valid_after(now + lifetime)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
        )

    def _write(self, path: Path, text: str, *, keep: bool = False) -> None:
        for folder in (self.folder, path.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, text, keep=keep)


def _name(common_name: str) -> x509.Name:
    # RFC 5280 ends a common name at 64 characters; verifiers look at the alternative names alone.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode("ascii")


def _split(text: str, names: tuple[str, ...]) -> Issued:
    chain, mark, key = text.partition("-----BEGIN PRIVATE KEY-----")
    return Issued(chain, mark + key, names)


def _load(text: str) -> _Signer:
    issued = _split(text, ())
    key = serialization.load_pem_private_key(issued.key.encode(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("the authority's key is of another kind; remove its folder")
    return _Signer(issued.certificate, key)
