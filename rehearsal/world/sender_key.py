"""The key with which remote senders sign their mail (DKIM, RFC 6376)."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path

import dkim  # type: ignore[import-untyped]
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from rehearsal.state import write_atomic
from rehearsal.world import plan


@dataclass(frozen=True)
class SenderKey:
    """An RSA key in PEM; ``public`` is what its DNS record says, base64."""

    public: str
    pem: bytes = field(repr=False)

    @classmethod
    def kept(cls, path: Path) -> SenderKey:
        """The key in ``path``, made and written there (0600) when it is missing."""
        if not path.exists():
            made = rsa.generate_private_key(65537, 2048)
            text = made.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
            write_atomic(path, text.decode("ascii"), keep=True)
        pem = path.read_bytes()
        key = serialization.load_pem_private_key(pem, None)
        der = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return cls(base64.b64encode(der).decode("ascii"), pem)

    def sign(self, message: bytes, domain: str) -> bytes:
        """The message, signed by ``domain``. Lines end with CRLF."""
        signature: bytes = dkim.sign(
            message,
            plan.SENDER_SELECTOR.encode(),
            domain.encode(),
            self.pem,
            canonicalize=(b"relaxed", b"relaxed"),
        )
        return signature + message

    def seal(self, message: bytes, domain: str) -> bytes:
        """The message as ``domain`` passes it on: its first set of ARC headers (RFC 8617) in front.

        They vouch for results that ``domain`` itself found, which are put in front too.
        """
        name = f"mail.{domain}"
        results = f"Authentication-Results: {name}; spf=pass smtp.mailfrom={domain}\r\n".encode()
        headers: list[bytes] = dkim.arc_sign(
            results + message,
            plan.SENDER_SELECTOR.encode(),
            domain.encode(),
            self.pem,
            name.encode(),
        )
        return b"".join(headers) + results + message
