"""Hashes for Rspamd's controller; tests/render has Rspamd's own word on them."""

from __future__ import annotations

import re

import pytest

from mailsite.rspamd_password import password_hash

SALT = bytes(range(20))


def test_the_same_password_and_salt_make_the_same_hash() -> None:
    first = password_hash("correct horse", SALT)
    assert first == password_hash("correct horse", SALT)
    assert first != password_hash("correct horsf", SALT)
    assert first != password_hash("correct horse", SALT[::-1])


def test_it_has_the_form_that_the_configuration_is_checked_for() -> None:
    assert re.fullmatch(r"\$1\$[a-z0-9]{32}\$[a-z0-9]{52}", password_hash("x", SALT))


@pytest.mark.parametrize(("password", "salt"), [("", SALT), ("x" * 65, SALT), ("x", b"short")])
def test_what_rspamd_would_cut_is_refused(password: str, salt: bytes) -> None:
    with pytest.raises(ValueError, match="1 to 64 bytes"):
        password_hash(password, salt)
