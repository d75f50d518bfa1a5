"""What a run that broke off may have left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairsync.repair import common, expunged_guids, holes, latest, strays

#: As Dovecot 2.4.1 gave it for one INBOX with five mails.
STATE = "AQAAAMBENhCmewdrIQAAAEb+Pw6mewdrBwAAAAQAAAAAAAAAAAAAAAAAAAAFAAAAyum5DA=="
INBOX = "c0443610a67b076b2100000046fe3f0e"


def test_dsyncs_state_tells_what_both_had() -> None:
    assert common(STATE) == {INBOX: 7}


@pytest.mark.parametrize("state", ["", "x", "AAAA", STATE[:-8], "AgAA" + STATE[4:], "ü"])
def test_a_state_of_another_kind_tells_nothing(state: str) -> None:
    assert common(state) == {}


def test_the_later_of_two_runs_counts() -> None:
    assert latest({"i": 7, "a": 1}, {"i": 9, "b": 2}) == {"i": 9, "a": 1, "b": 2}


def test_a_mail_missing_below_a_common_one_is_a_hole() -> None:
    """Seen: the next full sync deleted 4 and 5."""
    mine = {"i": [(1, "first"), (3, "x"), (4, "p"), (5, "q"), (6, "y"), (7, "z")]}
    theirs = {"i": [(1, "first"), (3, "x"), (6, "y"), (7, "z")]}
    assert holes(mine, theirs) == {"i": [4, 5]}
    assert holes(theirs, mine) == {}


def test_what_comes_after_the_last_common_mail_is_new() -> None:
    assert holes({"i": [(1, "a"), (2, "b")]}, {"i": [(1, "a"), (2, "c")]}) == {}
    assert holes({"i": [(1, "a")]}, {}) == {}


def test_a_mail_that_is_there_under_another_uid_is_no_hole() -> None:
    assert holes({"i": [(1, "a"), (2, "b")]}, {"i": [(2, "b"), (3, "a")]}) == {}


def test_what_a_user_took_from_there_is_no_hole() -> None:
    """Else a mail that was moved after a run broke off was in both folders."""
    mine, theirs = {"i": [(1, "moved"), (2, "left out"), (3, "x")]}, {"i": [(3, "x")]}
    assert holes(mine, theirs, {"i": [(1, "")], "other": [(2, "")]}) == {"i": [2]}
    assert holes(mine, theirs, {"i": [(9, "moved")]}) == {"i": [2]}


def test_what_a_user_took_from_there_goes_here_too_under_whatever_uid() -> None:
    """dsync gives mails that came to both at once new UIDs."""
    mine = {"i": [(8, "moved"), (9, "kept")], "f": [(1, "moved")]}
    theirs = {"i": [(8, "kept")], "f": [(1, "moved")]}
    assert strays(mine, theirs, {"i": [(7, "moved"), (3, "")]}, {}) == {"i": [8]}
    assert strays(mine, mine, {"i": [(7, "moved")]}, {}) == {}, "it is there again"
    assert strays(mine, theirs, {"i": [(7, "moved")]}, {"f": [(1, "moved")]}) == {}


def _log(*records: tuple[int, bytes]) -> bytes:
    data = bytes([3, 0, 40, 0]) + bytes(36)
    for kind, body in records:
        size = (len(body) + 8) >> 2
        parts = [0x80 | size >> shift & 0x7F for shift in (21, 14, 7, 0)]
        data += bytes(parts) + kind.to_bytes(4, "little") + body
    return data


def test_a_folders_log_tells_whose_uids_were_expunged() -> None:
    one, other = bytes(range(16)), bytes(range(16, 32))
    mails = b"\x07\0\0\0" + one + b"\x2c\x01\0\0" + other
    log = _log((0x10000002, bytes(4000)), (0x0000ED90, mails), (0x1000CD91, bytes(8)))
    assert expunged_guids(log) == {7: one.hex(), 300: other.hex()}
    assert expunged_guids(log + bytes(8)) == expunged_guids(log), "a record is being written"
    assert expunged_guids(b"") == expunged_guids(log[:40]) == {}


@given(st.binary(max_size=200))
def test_a_log_of_another_kind_tells_nothing_wrong(log: bytes) -> None:
    assert all(len(guid) == 32 for guid in expunged_guids(log).values())


_MAILS = st.dictionaries(st.integers(1, 12), st.sampled_from("abcdefghij"), max_size=10)


@given(_MAILS, _MAILS)
def test_once_renumbered_nothing_is_missing_below_a_common_mail(
    one: dict[int, str], other: dict[int, str]
) -> None:
    mine, theirs = {"i": sorted(one.items())}, {"i": sorted(other.items())}
    next_uid = 20
    moved = set(holes(mine, theirs).get("i", []))
    again = []
    for uid, guid in mine["i"]:
        if uid in moved:
            uid, next_uid = next_uid, next_uid + 1
        again.append((uid, guid))
    assert {guid for _, guid in again} == set(one.values())
    assert holes({"i": sorted(again)}, theirs) == {}
