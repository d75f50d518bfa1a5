"""What a run that broke off may have left out."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairsync.doveadm import Doveadm, Reply
from pairsync.repair import common, holes, latest, look
from pairsync.state import States

#: As Dovecot 2.4.1 gave it for one INBOX with five mails.
STATE = "AQAAAMBENhCmewdrIQAAAEb+Pw6mewdrBwAAAAQAAAAAAAAAAAAAAAAAAAAFAAAAyum5DA=="
INBOX = "c0443610a67b076b2100000046fe3f0e"
G = "0a" * 16


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


def test_what_pairsync_deleted_is_remembered_while_its_folder_is_in_no_list(tmp_path: Path) -> None:
    """One that is just being renamed. Without it, a user's deletion would be seen in it."""

    class Dovecot(Doveadm):
        async def run(self, user: str, *words: str) -> Reply:
            said = {"fetch": ("F", "1", G), "mailbox status": ("INBOX", "F")}
            return Reply("", said.get(words[0], (str(tmp_path),)), "")

    states = States(tmp_path)
    states.note("jane", {"F": {(9, G)}, "renamed": {(3, G)}}, {"renamed": {(4, G)}})
    box = asyncio.run(look(Dovecot(tmp_path), states, "jane"))
    assert box.here("F") == {(1, G)}
    assert states.doubles("jane") == {"renamed": {(3, G)}}
    assert states.renumbered("jane") == {"renamed": {(4, G)}}
