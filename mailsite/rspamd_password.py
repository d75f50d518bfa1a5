"""Password hashes as Rspamd's controller takes them, made without Rspamd at hand.

``rspamadm pw`` salts at random, so its output would be another one in each run. Here the salt is
given: the same password and salt make the same hash.
"""

from __future__ import annotations

from hashlib import blake2b

ROUNDS = 16000
SALT_BYTES = 20
_KEY_BYTES = 32
_ALPHABET = "ybndrfg8ejkmcpqxot1uwisza345h769"


def password_hash(password: str, salt: bytes) -> str:
    """``$1$<salt>$<key>``: PBKDF2 with keyed BLAKE2b (Rspamd, src/libcryptobox/cryptobox.c).

    Args:
        password: At most 64 bytes in UTF-8.
        salt: 20 bytes.

    Raises:
        ValueError: The password or the salt has another length.
    """
    secret = password.encode()
    if not 0 < len(secret) <= blake2b.MAX_KEY_SIZE or len(salt) != SALT_BYTES:
        raise ValueError("a password of 1 to 64 bytes and a salt of 20 bytes are wanted")
    block = blake2b(salt + (1).to_bytes(4, "big"), key=secret).digest()
    mixed = int.from_bytes(block)
    for _ in range(ROUNDS - 1):
        block = blake2b(block, key=secret).digest()
        mixed ^= int.from_bytes(block)
    key = mixed.to_bytes(blake2b.MAX_DIGEST_SIZE)[:_KEY_BYTES]
    return f"$1${_base32(salt)}${_base32(key)}"


def _base32(data: bytes) -> str:
    """Rspamd's own base 32: z-base-32's letters, the lowest bits first."""
    bits, number = len(data) * 8, int.from_bytes(data, "little")
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(0, bits, 5))
