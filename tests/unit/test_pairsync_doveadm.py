"""What Dovecot's doveadm is asked, and how its answers are read."""

from __future__ import annotations

import hashlib

import pytest

from pairsync.doveadm import guid_of, mails_of


@pytest.mark.parametrize("mail", ["1.M2P3.host", "", "ab" * 15, "ab" * 17, "zz" * 16])
def test_a_guid_of_another_form_is_known_by_a_digest(mail: str) -> None:
    assert guid_of(mail) == hashlib.sha1(mail.encode()).hexdigest()[-32:]
    assert guid_of(guid_of(mail)) == guid_of(mail)


def test_mails_are_asked_for_by_their_folders_name_and_guid() -> None:
    assert mails_of("-x", "G") == ("mailbox", "-x", "mailbox-guid", "G")
    assert mails_of("-x", "G", "1:2,4")[-2:] == ("uid", "1:2,4")
