"""Times of renames in Dovecot's log of a user's folders."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest

from pairsync.changelog import LOGS, attest, backdate, deletions

DELETE, RENAME, SUBSCRIBE = 1, 3, 4
OLDER, NAME = LOGS
GUID = "0123456789abcdef" * 2


def record(kind: int, name: str, seconds: int) -> bytes:
    digest = hashlib.sha1(name.encode()).digest()[:16]
    return bytes([kind, 0, 0, 0]) + digest + struct.pack(">I", seconds)


def test_a_rename_gets_the_users_time_and_nothing_else_does(tmp_path: Path) -> None:
    others = [
        record(SUBSCRIBE, "näme", 9),
        record(RENAME, "other", 9),
        record(RENAME, "näme", 4),
    ]
    log = tmp_path / NAME
    log.write_bytes(b"".join([*others, record(RENAME, "näme", 9)]))
    assert backdate(tmp_path, {"näme": 5.9, "nowhere": 1.0}) == 1
    assert log.read_bytes() == b"".join([*others, record(RENAME, "näme", 5)])
    assert backdate(tmp_path, {"näme": 5.9}) == 0


def test_the_older_log_is_looked_into_as_well(tmp_path: Path) -> None:
    older = tmp_path / OLDER
    older.write_bytes(record(RENAME, "a", 9))
    assert backdate(tmp_path, {"a": 5.0}) == 1
    assert older.read_bytes() == record(RENAME, "a", 5)


@pytest.mark.parametrize("left", [0, 1, 23])
def test_a_record_that_is_being_written_is_left_alone(tmp_path: Path, left: int) -> None:
    log = tmp_path / NAME
    content = record(RENAME, "a", 4) + record(RENAME, "a", 9)[:left]
    log.write_bytes(content)
    assert backdate(tmp_path, {"a": 5.0}) == 0
    assert log.read_bytes() == content


def gone(guid: str, seconds: int) -> bytes:
    return bytes([DELETE, 0, 0, 0]) + bytes.fromhex(guid) + struct.pack(">I", seconds)


def test_a_rename_that_is_not_known_is_added(tmp_path: Path) -> None:
    (tmp_path / OLDER).write_bytes(record(RENAME, "a", 5))
    log = tmp_path / NAME
    there = record(RENAME, "b", 4) + record(SUBSCRIBE, "c", 9)
    log.write_bytes(there)
    given = dict.fromkeys("abc", 5.9)
    assert attest(tmp_path, given) == 2
    assert log.read_bytes() == there + record(RENAME, "b", 5) + record(RENAME, "c", 5)
    assert attest(tmp_path, given) == 0


def test_deletions_are_known_by_the_folders_guids(tmp_path: Path) -> None:
    (tmp_path / OLDER).write_bytes(gone(GUID, 3) + record(RENAME, "a", 5))
    (tmp_path / NAME).write_bytes(gone(GUID, 4) + gone("f" * 32, 9)[:-1])
    assert deletions(tmp_path) == {GUID: 4}


def test_a_deletion_that_is_not_known_any_more_is_added(tmp_path: Path) -> None:
    log = tmp_path / NAME
    log.write_bytes(gone(GUID, 9))
    assert attest(tmp_path, {}, {GUID: 3.0, "f" * 32: 4.0}) == 1
    assert log.read_bytes() == gone(GUID, 9) + gone("f" * 32, 4)
    assert attest(tmp_path, {}, {"f" * 32: 4.0}) == 0


def test_no_new_log_is_made_for_what_is_added(tmp_path: Path) -> None:
    """Dovecot has just put the last one aside: some session may do it again with a new one."""
    (tmp_path / OLDER).write_bytes(record(RENAME, "a", 5))
    assert attest(tmp_path, {"b": 6.0}) == 1
    assert (tmp_path / OLDER).read_bytes() == record(RENAME, "a", 5) + record(RENAME, "b", 6)
    assert not (tmp_path / NAME).exists()


def test_there_may_be_no_log(tmp_path: Path) -> None:
    assert backdate(tmp_path, {"a": 5.0}) == 0
    assert list(tmp_path.iterdir()) == []
