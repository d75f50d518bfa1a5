"""Throwaway passwords of a rehearsal."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import bcrypt
import pytest

from mailsite.loader import load_platform
from verify.passwords import FILE, mailbox_password, password_of, rehearsal_passwords

SITE = Path(__file__).resolve().parents[2] / "sites" / "example"


def test_every_user_gets_a_hash_that_fits_the_password(tmp_path: Path) -> None:
    platform = load_platform(SITE)
    hashes = rehearsal_passwords(tmp_path, platform)
    passwords = {f"sasl/{name}": password_of(tmp_path, name) for name in platform.sasl_users}
    passwords |= {
        f"mailbox/{name}": mailbox_password(tmp_path, name) for name in platform.mailboxes
    }
    # Webmail logs in by itself, so it is given the password.
    assert platform.webmail is not None
    user = platform.webmail.sasl_user
    assert hashes.pop(f"sasl-password/{user}") == password_of(tmp_path, user)
    assert set(hashes) == set(passwords)
    for name, password in passwords.items():
        scheme, _, encoded = hashes[name].partition("}")
        assert scheme == "{BLF-CRYPT"
        assert bcrypt.checkpw(password.encode(), encoded.encode())


def test_passwords_last_as_long_as_the_state(tmp_path: Path) -> None:
    platform = load_platform(SITE)
    assert rehearsal_passwords(tmp_path, platform) == rehearsal_passwords(tmp_path, platform)


def test_a_new_user_changes_nobody_elses_password(tmp_path: Path) -> None:
    platform = load_platform(SITE)
    before = rehearsal_passwords(tmp_path, platform)
    user = next(iter(platform.sasl_users.values())).model_copy(update={"name": "newcomer"})
    more = platform.model_copy(update={"sasl_users": {**platform.sasl_users, "newcomer": user}})
    after = rehearsal_passwords(tmp_path, more)
    assert {name: after[name] for name in before} == before
    assert "sasl/newcomer" in after


def test_nobody_else_can_read_them(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        rehearsal_passwords(tmp_path, load_platform(SITE))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_an_unknown_user_is_named(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="no password of 'sasl/nobody'"):
        password_of(tmp_path, "nobody")
