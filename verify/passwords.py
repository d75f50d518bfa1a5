"""Throwaway passwords of a rehearsal's SASL users.

The platform knows a SASL user by a hash alone, so a check that logs in needs the password
itself. In a rehearsal every user gets a random one, kept in ``passwords.json`` of the state
folder, which only root can read; the stack gets the hashes as given secrets. On a live platform
the probe account's password comes from the operator.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

import bcrypt

from mailsite.model import Platform

FILE = "passwords.json"

_ROUNDS = 5  # Dovecot's own default for BLF-CRYPT; the passwords are random, and logins many


def rehearsal_passwords(state: Path, platform: Platform) -> dict[str, str]:
    """Give every SASL user a password that lasts as long as the rehearsal.

    Args:
        state: The rehearsal's state folder.
        platform: Whose users.

    Returns:
        Secret name -> Dovecot hash (``sasl/<user>`` -> ``{BLF-CRYPT}$2b$...``), the same in
        every call as long as the state folder lives.
    """
    path = state / FILE
    known = _read(path)
    missing = [name for name in platform.sasl_users if name not in known]
    for name in missing:
        password = secrets.token_urlsafe(18)
        salt = bcrypt.gensalt(_ROUNDS)
        known[name] = {
            "password": password,
            "hash": "{BLF-CRYPT}" + bcrypt.hashpw(password.encode(), salt).decode(),
        }
    if missing:
        _write(path, known)
    return {f"sasl/{name}": known[name]["hash"] for name in platform.sasl_users}


def password_of(state: Path, user: str) -> str:
    """The password of a SASL user of the rehearsal.

    Raises:
        LookupError: The rehearsal has none for that user.
    """
    try:
        return _read(state / FILE)[user]["password"]
    except KeyError:
        raise LookupError(
            f"{state / FILE} has no password of {user!r}; `python -m rehearsal up` writes it"
        ) from None


def _read(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    read: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    return read


def _write(path: Path, known: dict[str, dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".new")
    staged.unlink(missing_ok=True)
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(known, file, indent=1, sort_keys=True)
    staged.replace(path)
