"""The key of remote senders: what it signs and seals, others can verify."""

from __future__ import annotations

from pathlib import Path

import dkim  # type: ignore[import-untyped]

from rehearsal.world import plan
from rehearsal.world.sender_key import SenderKey

MESSAGE = (
    b"From: someone@there.example\r\nTo: user@here.example\r\nSubject: hello\r\n"
    b"Date: Sun, 22 Nov 2026 10:00:00 +0000\r\nMessage-ID: <1@there.example>\r\n\r\nhello\r\n"
)


def test_a_sealed_mail_has_a_chain_that_verifies(tmp_path: Path) -> None:
    key = SenderKey.kept(tmp_path / "key.pem")
    sealed = key.seal(MESSAGE, "there.example")

    def record(name: bytes, timeout: int = 5) -> bytes:
        assert name == f"{plan.SENDER_SELECTOR}._domainkey.there.example.".encode()
        return f"v=DKIM1; k=rsa; p={key.public}".encode()

    status, results, reason = dkim.arc_verify(sealed, dnsfunc=record)
    assert status == dkim.CV_Pass, reason
    assert len(results) == 1
    assert sealed.endswith(MESSAGE)
