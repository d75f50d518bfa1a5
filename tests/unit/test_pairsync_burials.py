"""Copies that dsync made of mails which a user was just taking away."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from pairsync import history
from pairsync.burials import Burials
from pairsync.doveadm import Doveadm, DovecotError, Reply
from pairsync.state import States
from tests.index_logs import DSYNC, append, done, log, wish

FOLDER, MAIL = "ab" * 16, "0a" * 16
BEGAN = 1000.0


class Dovecot(Doveadm):
    """Knows one user's inbox, in which dsync made mail 7 of mail 4, which the user deleted."""

    def __init__(self, index: Path) -> None:
        super().__init__(Path("/nowhere"))
        self.index_path = index
        self.is_dead = False
        self.did: list[tuple[str, ...]] = []

    async def run(self, user: str, *words: str) -> Reply:
        if self.is_dead:
            raise DovecotError("no answer")
        values: tuple[str, ...] = ()
        match words[0]:
            case "mailbox status":
                values = ("INBOX", FOLDER)
            case "mailbox path":
                values = (str(self.index_path),)
            case "fetch":
                values = ("7", MAIL)
            case _:
                self.did.append(words)
        return Reply("", values, "")


@pytest.fixture
def dovecot(tmp_path: Path) -> Dovecot:
    records = (
        *(append(4, MAIL), wish(4), done(4, MAIL)),
        *(append(7, MAIL, DSYNC), wish(4, DSYNC), done(4, MAIL, DSYNC)),
    )
    path = tmp_path / history.LOGS[-1]
    path.write_bytes(log(*records))
    os.utime(path, (BEGAN, BEGAN))
    return Dovecot(tmp_path)


def burials(tmp_path: Path, dovecot: Dovecot) -> Burials:
    states = States(tmp_path / "users")
    states.prepare()
    return Burials(dovecot, states)


GONE = [("expunge", "--", "mailbox", "INBOX", "mailbox-guid", FOLDER, "uid", "7")]


def test_a_copy_is_deleted_when_dsync_has_ended(tmp_path: Path, dovecot: Dovecot) -> None:
    found = burials(tmp_path, dovecot)
    found.open("jane", BEGAN)
    assert list(found) == ["jane"]
    asyncio.run(found.end("jane", BEGAN, changed=True))
    assert dovecot.did == GONE
    assert list(found) == []


def test_who_changed_nothing_has_no_copies(tmp_path: Path, dovecot: Dovecot) -> None:
    found = burials(tmp_path, dovecot)
    found.open("jane", BEGAN)
    asyncio.run(found.end("jane", BEGAN, changed=False))
    assert "jane" not in found
    asyncio.run(found.bury("jane"))
    assert dovecot.did == []


def test_folders_that_nobody_wrote_since_are_not_read(tmp_path: Path, dovecot: Dovecot) -> None:
    found = burials(tmp_path, dovecot)
    found.open("jane", BEGAN + 10)
    asyncio.run(found.bury("jane"))
    assert dovecot.did == []


def test_a_run_that_broke_off_is_looked_at_from_its_begin(tmp_path: Path, dovecot: Dovecot) -> None:
    found = burials(tmp_path, dovecot)
    found.open("jane", BEGAN)
    dovecot.is_dead = True
    with pytest.raises(DovecotError):
        asyncio.run(found.bury("jane"))
    found.open("jane", BEGAN + 10)
    dovecot.is_dead = False
    asyncio.run(found.bury("jane"))
    assert dovecot.did == GONE


def test_who_takes_mails_away_while_dsync_is_at_work_needs_a_comparison(
    tmp_path: Path, dovecot: Dovecot
) -> None:
    """Seen: dsync gave it another UID on the other server meanwhile, from where it came back."""
    found = burials(tmp_path, dovecot)
    path = dovecot.index_path / history.LOGS[-1]

    def run(*records: bytes, changed: bool = True) -> bool:
        found.disputed.clear()
        found.open("jane", BEGAN)
        with path.open("ab") as stream:
            stream.write(b"".join(records))
        asyncio.run(found.end("jane", BEGAN, changed=changed))
        return "jane" in found.disputed

    # What was before is not known yet.
    assert run()
    assert not run()
    brought, taken = append(9, "0b" * 16, DSYNC), wish(9) + done(9, "0b" * 16)
    assert not run(brought)
    assert not run(taken)
    assert run(brought, taken)
    assert run(taken, brought)
    assert not run(brought, taken, changed=False)
    assert not run()
    # Dovecot begins the log anew.
    path.unlink()
    path.write_bytes(log(brought))
    assert not run(taken[:0])
    assert run(brought, taken)
