"""Throwaway passwords of a rehearsal's SASL users and mailboxes.

The platform knows a login by a hash alone, so a check that logs in needs the password itself. In
a rehearsal every one gets a random one, kept in ``passwords.json`` of the state
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
from mailsite.secret_names import mailbox_hash, sasl_hash, sasl_password

FILE = "passwords.json"

_ROUNDS = 5  # Dovecot's own default for BLF-CRYPT; the passwords are random, and logins many


def rehearsal_passwords(state: Path, platform: Platform) -> dict[str, str]:
    """Give every SASL user and mailbox a password that lasts as long as the rehearsal.

    Args:
        state: The rehearsal's state folder.
        platform: Whose users.

    Returns:
        Secret name -> Dovecot hash (``sasl/<user>`` -> ``{BLF-CRYPT}$2b$...``), and for logins
        of the platform's own machines the password too; the same in every call as long as the
        state folder lives.
    """
    path = state / FILE
    known = _read(path)
    wanted = [sasl_hash(name) for name in platform.sasl_users]
    wanted += [mailbox_hash(name) for name in platform.mailboxes]
    missing = [name for name in wanted if name not in known]
    for name in missing:
        password = secrets.token_urlsafe(18)
        salt = bcrypt.gensalt(_ROUNDS)
        known[name] = {
            "password": password,
            "hash": "{BLF-CRYPT}" + bcrypt.hashpw(password.encode(), salt).decode(),
        }
    if missing:
        _write(path, known)
    found = {name: known[name]["hash"] for name in wanted}
    if platform.webmail is not None:
        user = platform.webmail.sasl_user
        found[sasl_password(user)] = known[sasl_hash(user)]["password"]
    return found


def password_of(state: Path, user: str) -> str:
    """The password of a SASL user of the rehearsal.

    Raises:
        LookupError: The rehearsal has none for that user.
    """
    return _password(state, sasl_hash(user))


def mailbox_password(state: Path, mailbox: str) -> str:
    """The password of a mailbox's owner in the rehearsal.

    Raises:
        LookupError: The rehearsal has none for that mailbox.
    """
    return _password(state, mailbox_hash(mailbox))


def _password(state: Path, name: str) -> str:
    try:
        return _read(state / FILE)[name]["password"]
    except KeyError:
        raise LookupError(
            f"{state / FILE} has no password of {name!r}; `python -m rehearsal up` writes it"
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
