"""What the logs of folders tell about mails that are on one server and not on the other."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairsync.history import (
    HEAD,
    Life,
    Repair,
    appends,
    from_there,
    linked,
    read,
    repaired,
    repairs,
    spared,
    surplus,
    unwanted,
)
from pairsync.repair import Mailbox, Plan, all_of, listed, plans
from tests.index_logs import (
    APPEND,
    BEGAN,
    DATA,
    DONE,
    DSYNC,
    EXPUNGE,
    INTRO,
    append,
    boundary,
    done,
    log,
    record,
    saved,
    wish,
)
from tests.index_logs import appends as appended

G, H = "0a" * 16, "0b" * 16


def gone(*histories: Sequence[Life]) -> set[int]:
    return {uid for uid, _ in unwanted(histories)}


def test_a_log_tells_who_took_a_mail_away() -> None:
    here = log(append(1, G), append(2, H), wish(1), done(1, G), wish(2, DSYNC), done(2, H))
    assert read([here], [(3, H)]) == [
        *(Life(1, G, taken=True), Life(2, H), Life(3, H, is_there=True))
    ]


def test_what_a_user_took_away_is_unwanted_on_the_other_server() -> None:
    here = read([log(append(4, G), wish(4), done(4, G))], [])
    there = read([log(append(4, G, DSYNC))], [(4, G)])
    assert unwanted([here, there]) == {(4, G)}


def test_another_mail_with_the_same_uid_is_not_touched() -> None:
    here = read([log(append(4, G), wish(4), done(4, G))], [])
    there = read([log(append(4, H))], [(4, H)])
    assert unwanted([here, there]) == {(4, G)}


def test_a_mail_that_was_moved_back_stays() -> None:
    here = read([log(append(4, G), wish(4), done(4, G), append(7, G))], [(7, G)])
    there = read([log(append(4, G, DSYNC), append(7, G, DSYNC))], [(4, G), (7, G)])
    assert gone(here, there) == {4}


def test_a_copy_that_dsync_made_while_the_user_took_it_away_is_unwanted() -> None:
    """Seen: dsync gives a mail another UID by copying it, also one that is gone by then."""
    here = read(
        [log(append(1, G), wish(1), done(1, G), append(4, G, DSYNC), wish(1, DSYNC))], [(4, G)]
    )
    assert gone(here) == {1, 4}
    there = read([log(append(4, G, DSYNC))], [(4, G)])
    assert gone(here, there) == {1, 4}


def test_a_mail_moved_back_while_dsync_copied_it_stays() -> None:
    """Seen: 1 was moved to 3; dsync made 4 of 1, then 8 of 3, then 10 of 8."""
    here = log(
        *(append(1, G), append(3, G), wish(1), done(1, G), append(4, G, DSYNC), wish(1, DSYNC)),
        *(append(8, G, DSYNC), done(3, "00" * 16, DSYNC)),
        *(append(10, G, DSYNC), wish(8, DSYNC), done(8, G)),
    )
    there = log(append(4, G, DSYNC), append(10, G, DSYNC))
    both = [(4, G), (10, G)]
    assert gone(read([here], both), read([there], both)) == {1, 4}


def test_a_mail_taken_away_under_another_uid_is_unwanted() -> None:
    """Seen: a run that broke off brought 5 as 8, and there it was moved; here it became 10."""
    here = log(append(8, G, DSYNC), wish(8), done(8, G), append(17, G, DSYNC))
    there = log(
        *(append(5, G), append(10, G, DSYNC), wish(5, DSYNC), done(5, G)),
        *(append(17, G, DSYNC), wish(10, DSYNC), done(10, G)),
    )
    assert gone(read([here], [(17, G)]), read([there], [(17, G)])) == {5, 8, 10, 17}


def test_a_mail_that_came_back_from_the_other_server_is_unwanted() -> None:
    """Seen: 7 went there as 13 and was deleted; 15 is 13 that came back, and 19 both of them."""
    here = log(
        *(append(7, G), wish(7), done(7, G), append(15, G, DSYNC)),
        *(append(19, G, DSYNC), wish(15, DSYNC), done(15, G)),
    )
    there = log(append(13, G, DSYNC), append(19, G, DSYNC), wish(13, DSYNC), done(13, G))
    assert gone(read([here], [(19, G)]), read([there], [(19, G)])) == {7, 13, 15, 19}


def test_a_mail_that_came_back_by_a_second_run_is_unwanted() -> None:
    """Seen: it came as 3, for 1 was given away there; 3 came back after 1 had been deleted."""
    here = log(append(1, G), wish(1), done(1, G), append(3, G, DSYNC))
    there = log(append(3, G, DSYNC))
    both = [(3, G)]
    assert gone(read([here], both), read([there], both)) == {1, 3}


def test_a_mail_that_the_other_server_may_have_moved_back_stays() -> None:
    """Seen: 92 was moved away there and back as 120, and came from there as 129."""
    here = log(append(92, G, DSYNC), wish(92), done(92, G), append(129, G, DSYNC))
    there = log(
        *(append(92, G, DSYNC), wish(92), done(92, G), append(120, G), append(127, G, DSYNC)),
        *(wish(120, DSYNC), done(120, G)),
    )
    assert {uid for uid, _ in unwanted([read([here], [(129, G)])])} == {92}
    assert gone(read([here], [(129, G)]), read([there], [(127, G)])) == {92}


def test_a_mail_moved_back_stays_where_the_second_of_it_was_deleted_as_a_double() -> None:
    """Seen: 35 was moved away and back as 50; a broken run left 50 and 61, and 50 was deleted."""
    here = log(
        *(append(35, G), wish(35), done(35, G), append(50, G), append(61, G, DSYNC)),
        *(wish(50), done(50, G)),
    )
    there = log(append(35, G, DSYNC), wish(35, DSYNC), done(35, G), append(61, G, DSYNC))
    both = [(61, G)]
    assert gone(read([here], both), read([there], both)) == {35, 50}
    known = [spared(read([here], both), {(50, G)}), read([there], both)]
    assert {uid for uid, _ in unwanted(known)} == {35}


def test_of_a_mail_that_was_there_twice_one_stays_when_the_other_is_taken_away() -> None:
    """Seen: what a broken run left as 39 and 48 was there as 48 alone then."""
    here = log(append(39, G), append(48, G, DSYNC), wish(39), done(39, G))
    there = log(append(48, G, DSYNC))
    both = [(48, G)]
    assert gone(read([here], both), read([there], both)) == {39}


def test_a_mail_that_may_be_another_one_stays() -> None:
    """Seen: one server made 38 and 40 of 33 and 34, the other one of 23, which was taken away."""
    here = log(append(23, G, DSYNC), append(38, G, DSYNC), append(40, G, DSYNC), wish(23, DSYNC))
    there = log(
        *(append(16, G), append(21, G), wish(16), done(16, G)),
        *(append(23, G, DSYNC), wish(16, DSYNC), append(33, G, DSYNC), done(21, G, DSYNC)),
        *(append(34, G), wish(23), done(23, G)),
        *(append(38, G, DSYNC), append(40, G, DSYNC), wish(33, DSYNC), wish(34, DSYNC)),
    )
    both = [(38, G), (40, G)]
    assert gone(read([here], both), read([there], both)) == {16, 23}


def test_a_mail_that_was_moved_back_stays_where_the_log_of_its_first_move_is_gone() -> None:
    """Seen: 25 was moved away, here too, and back as 68; then Dovecot began its log anew."""
    here = log(append(68, G), append(79, G, DSYNC), wish(68, DSYNC), done(68, G))
    there = log(append(25, G, DSYNC), wish(25), done(25, G), append(79, G, DSYNC))
    both = [(79, G)]
    assert gone(read([here], both), read([there], both)) == {25}


def test_a_copy_of_a_mail_that_nothing_is_known_of_stays() -> None:
    here = log(append(4, G, DSYNC), done(3, "00" * 16, DSYNC))
    there = log(append(2, G), wish(2), done(2, G))
    assert gone(read([here], [(4, G)]), read([there], [])) == {2}


@pytest.mark.parametrize("cut", range(4))
def test_a_record_that_is_being_written_ends_the_log(cut: int) -> None:
    whole = log(append(1, G), wish(1), done(1, G))
    assert read([whole + record(EXPUNGE, bytes(20))[:cut]], []) == read([whole], [])
    assert read([b"x" * cut], [(1, G)]) == [Life(1, G, is_there=True)]


def test_a_uid_that_comes_again_is_another_mail() -> None:
    """Seen: Dovecot repairs a folder after a crash, and forgets which UIDs it had given."""
    old = log(append(41, H), wish(41), done(41, H))
    assert read([old, log(append(41, G))], [(41, G)]) == [Life(41, G, is_there=True)]


def test_what_another_mail_of_a_uid_went_through_is_not_said_of_this_one() -> None:
    """As where what is there is in another folder of the same GUID."""
    assert read([log(append(1, H), wish(1), done(1, H))], [(1, G)]) == [Life(1, G, is_there=True)]
    brought = log(append(1, H, DSYNC))
    assert read([brought], [(1, G)]) == [Life(1, G, is_there=True)]


def test_a_mail_that_a_broken_run_left_twice_is_kept_once() -> None:
    """Seen: it ends after dsync has copied mails and before it deletes them, or just does so."""
    here = read([log(append(4, G), append(9, G, DSYNC))], [(4, G), (9, G)])
    there = read([log(append(4, G, DSYNC))], [(4, G)])
    assert surplus([here, there], 0) == surplus([here, []], 8) == {(4, G)}
    assert surplus([here, there], 9) == surplus([there, there], 0) == set()


def test_mails_that_dsync_did_not_copy_can_be_left_aside() -> None:
    whole = log(append(1, G), append(2, H), append(3, G, DSYNC), wish(1, DSYNC), done(1, G))
    lives = read([whole], [])
    assert read([whole], [], copied=True) == [life for life in lives if life.guid == G]


def test_a_mail_of_which_a_double_was_deleted_stays() -> None:
    """Seen: 116 was one; the log told of it as of a user's deletion, so all others were deleted."""
    there = (append(116, G, DSYNC), append(119, G, DSYNC), wish(116), done(116, G))
    here = log(
        *(append(113, G), append(117, G, DSYNC), wish(113, DSYNC), done(113, G)),
        *(append(119, G, DSYNC), wish(117, DSYNC), done(117, G)),
    )
    mine, theirs = read([here], [(119, G)]), read([log(*there)], [(119, G)])
    assert gone(mine, spared(theirs, {(116, G)})) == set()
    # Without the note, or where a user deletes what was left, all of them go.
    assert 119 in gone(mine, theirs)
    later = read([log(*there, wish(119), done(119, G))], [])
    assert 119 in gone(mine, spared(later, {(116, G)}))


def test_what_was_there_when_dovecot_repaired_a_folder_is_unclear() -> None:
    records = (appended([(3, G), (7, H), (9, G)]), boundary(), append(10, H))
    whole = log(*records, number=3)
    assert repaired([whole]) == ({3, 7, 9}, set())
    # A new folder, and one that goes on.
    for other in (log(*records), log(*records, number=3, before=2), log(number=3), b""):
        assert repaired([other]) == (set(), set())


def test_repairs_are_told_from_others_by_the_heads_of_the_logs() -> None:
    first, second = (log(append(9, G), number=n)[:HEAD] for n in (3, 4))
    assert repairs([first, second]) == {Repair(3, BEGAN), Repair(4, BEGAN)}
    assert repairs([log(), log(number=3, before=2), first[:-1], b""]) == set()


def put_back(uid: int, guid: str, at: int = BEGAN) -> bytes:
    return boundary() + append(uid, guid) + saved(uid, at)


def test_what_dovecot_put_back_when_it_repaired_a_storage_is_known() -> None:
    first = boundary() + appended([(3, G), (7, H)])
    again = [put_back(8, H), put_back(9, G)]
    assert repaired([log(first, *again, number=3)]) == ({3, 7}, {8, 9})
    # There was nothing before.
    assert repaired([log(boundary(), *again, number=3)]) == (set(), {8, 9})
    # Seen: a size was to be counted, and what had been deleted in the moment of the repair went.
    counted = boundary() + record(INTRO | DONE, struct.pack("<IIIHHHH", 7, 0, 16, 0, 8, 0, 0))
    between = (counted, again[0] + done(7, H), counted, again[1])
    assert repaired([log(first, *between, number=3)]) == ({3, 7}, {8, 9})
    # The folder that it was in has another name by now: Dovecot makes one, in a repair of others.
    new = log(boundary(), *again)
    assert repaired([new], {BEGAN}) == (set(), {8, 9})
    assert repaired([new], {BEGAN - 1}) == repaired([new]) == (set(), set())
    assert repaired([log(first, *again)], {BEGAN}) == (set(), set())
    # Somebody saved it later, or copied it with what is known of it.
    assert repaired([log(first, put_back(8, H, BEGAN + 1), again[1], number=3)])[1] == set()
    copied = again[0] + record(INTRO | DONE, struct.pack("<IIIHHHH", 3, 0, 0, 4, 4, 1, 0))
    copied += record(DATA | DONE, struct.pack("<II", 8, 44))
    assert repaired([log(first, copied, number=3)])[1] == set()
    assert repaired([log(first, boundary() + append(8, H), number=3)])[1] == set()
    # dsync did, or somebody who had read it.
    by_dsync = boundary() + append(8, H, DSYNC) + saved(8, BEGAN)
    assert repaired([log(first, by_dsync, number=3)])[1] == set()
    read_before = boundary() + record(APPEND | DONE, struct.pack("<IB3x", 8, 8)) + saved(8, BEGAN)
    assert repaired([log(first, read_before, number=3)])[1] == set()


def test_what_dovecot_put_back_goes_if_the_mail_is_in_another_folder() -> None:
    """Seen: a user moved a mail; the other server lost its power while it carried this."""
    mine = Mailbox({"i": [Life(4, G, taken=True)], "x": [there(1, G)]})
    theirs = Mailbox({"i": [there(9, G)]}, restored={"i": {9}})
    told = Mailbox.of(over_the_link(theirs.document()))
    for plan in (*plans(mine, theirs), *plans(mine, told)):
        assert plan.doubles == {"i": [(9, G)]}
    # It may be the only one, on its way back from another folder.
    for moved in (Life(1, G, taken=True), Life(1, G, is_there=True, taken=True)):
        mine = Mailbox({"i": [Life(4, G, taken=True)], "x": [moved]})
        assert plans(mine, theirs)[0].doubles == {}
        assert (9, G) not in plans(mine, theirs)[0].expunge["i"]


def test_what_dovecot_put_back_stays_where_the_mail_may_be_nowhere_else() -> None:
    theirs = Mailbox({"i": [there(9, G)]}, restored={"i": {9}})
    # Of the other folder, dsync may take it for deleted: one server has had it there, and has not.
    mine = Mailbox({"i": [Life(4, G, taken=True)], "x": [there(1, G)]})
    assert plans(mine, theirs, {"x": 1})[0].doubles == {}
    both = Mailbox({**theirs.histories, "x": [there(1, G)]}, restored=theirs.restored)
    assert plans(mine, both, {"x": 1})[0].doubles == {"i": [(9, G)]}
    # A good run has carried it, and the user copied it.
    assert plans(mine, both, {"x": 1, "i": 9})[0].doubles == {}
    # Only one folder tells of it.
    mine = Mailbox({"i": [Life(4, G, taken=True)], "x": []})
    assert plans(mine, theirs) == (Plan({"i": [(4, G)]}, {}), Plan({"i": [(4, G)]}, {}))
    # What tells of it in another folder is asked for.
    mine = Mailbox({"i": [], "x": [there(1, G), there(2, H)]})
    assert all_of(theirs.moot({"i": 9}), mine.moot({"x": 2})) == {"i": {G}, "x": set()}
    whole = Mailbox({**theirs.histories, "x": [there(1, G)]}, restored=theirs.restored)
    assert whole.moot({"i": 9, "x": 2}) == {"i": {G}, "x": {G}}


def test_what_a_user_moved_goes_where_a_repair_has_forgotten_that_dsync_had_made_it() -> None:
    """Seen: dsync had given it another UID, a user moved it on the other server, and this one lost
    its power before it knew.
    """
    moved = {"i": [Life(7, G, by_dsync=True, before=(6,), taken=True)], "x": [there(8, G)]}
    theirs = Mailbox({"i": [there(9, G)], "x": []}, unclear={"i": {9}})
    told = Mailbox.of(over_the_link(theirs.document()))
    for plan in (*plans(Mailbox(moved), theirs), *plans(Mailbox(moved), told)):
        assert plan.doubles == {"i": [(9, G)]}
    # Nobody took it away, or it is nowhere else, or both had it at the last good run.
    left = {"i": [Life(7, G, by_dsync=True)], "x": [there(8, G)]}
    assert plans(Mailbox(left), theirs)[0].doubles == {}
    assert plans(Mailbox({**moved, "x": []}), theirs)[0].doubles == {}
    assert plans(Mailbox(moved), theirs, {"i": 9})[0].doubles == {}
    # The user took it away before the last good run, and this one may have put it back.
    assert plans(Mailbox(moved), theirs, {"i": 8})[0].doubles == {}
    # Or the user did.
    back = {**moved, "i": [*moved["i"], there(9, G)]}
    assert plans(Mailbox(back), theirs)[0].doubles == {}


def test_of_a_mail_in_two_folders_that_each_server_finds_needless_in_one_of_them_one_stays() -> (
    None
):
    copied = [Life(3, G, taken=True), Life(5, G, by_dsync=True, before=(3,), is_there=True)]
    mine = Mailbox({"i": [there(9, G)], "x": copied}, restored={"i": {9}})
    theirs = Mailbox({"i": [there(9, G)], "x": [there(5, G)]}, unclear={"x": {5}})
    for plan in plans(mine, theirs):
        went = [
            mail for mails in (*plan.doubles.values(), *plan.expunge.values()) for mail in mails
        ]
        assert not {(9, G), (5, G)} <= set(went)


def test_of_a_mail_that_both_servers_put_back_in_different_folders_one_stays() -> None:
    mine = Mailbox({"i": [there(9, G)], "x": []}, restored={"i": {9}})
    theirs = Mailbox({"i": [], "x": [there(3, G)]}, restored={"x": {3}})
    assert plans(mine, theirs) == (Plan({}, {}), Plan({}, {}))


def test_what_is_unclear_may_be_a_double() -> None:
    """Seen: a run that broke off left a mail twice, and then Dovecot repaired its folder."""
    lives = [there(4, G), there(9, G)]
    known = Mailbox({"i": lives}, unclear={"i": {4, 9}})
    told = Mailbox.of(over_the_link(known.only({"i": {G}}).document()))
    assert told.unclear == known.unclear
    plan, _ = plans(told, box(), broken=True)
    assert plan.doubles == {"i": [(4, G)]}
    # One of them is the user's copy.
    for uids in ({4}, {9}, set()):
        some = Mailbox({"i": lives}, unclear={"i": uids})
        assert plans(some, box(), broken=True)[0].doubles == {}
    assert plans(told, box(there(4, G)), broken=True)[0].doubles == {}


def test_of_a_mail_that_a_repair_left_twice_that_one_stays_which_both_have() -> None:
    """Of the other, the user may have deleted it on the one that has it no more."""
    mine = Mailbox({"i": [there(7, G), there(10, H)]}, unclear={"i": {7, 10}})
    theirs = Mailbox({"i": [there(7, G), there(9, G), there(10, H)]}, unclear={"i": {7, 9, 10}})
    for plan in plans(mine, theirs, {"i": 10}):
        assert plan.doubles == {"i": [(9, G)]}
    theirs = Mailbox({"i": [there(8, G), there(9, G)]}, unclear={"i": {8, 9}})
    assert plans(mine, theirs, {"i": 10})[0].doubles == {}


def test_a_mail_that_a_repair_left_twice_is_found_when_both_have_it_so_too() -> None:
    """Seen: Dovecot repaired the folder while dsync was at work, which made 9 of 4 then."""
    lives = [Life(4, G), there(7, G), Life(9, G, by_dsync=True, before=(4,), is_there=True)]
    mine = Mailbox({"i": [*lives, there(8, H)]}, unclear={"i": {4, 7, 8}})
    # It was delivered there.
    theirs = box(Life(2, G), Life(7, G, by_dsync=True, is_there=True), lives[2], there(8, H))
    after = {"i": 9}
    assert mine.moot(after) == {"i": {G}}
    for plan in plans(mine.only({"i": {G}}), theirs.only({"i": {G}}), after):
        assert plan.doubles == {"i": [(7, G)]}
    # A user copied it.
    assert plans(box(*lives), theirs, after)[0].doubles == {}


def test_what_a_user_copied_into_the_same_folder_is_no_double() -> None:
    here = read([log(append(4, G), append(9, G))], [(4, G), (9, G)])
    there = read([log(append(4, G, DSYNC), append(9, G, DSYNC))], [(4, G), (9, G)])
    assert surplus([here, there], 0) == set()


def test_doubles_are_deleted_as_such() -> None:
    copy = Life(9, G, by_dsync=True, is_there=True)
    one, other = plans(box(there(4, G), copy), box(there(4, G)), broken=True)
    assert one == other == Plan({}, {}, {"i": [(4, G)]})
    assert Plan.of(over_the_link(one.document())) == one


def test_an_older_log_counts_too() -> None:
    assert read([log(append(1, G), wish(1)), log(done(1, G))], []) == [Life(1, G, taken=True)]


@given(st.binary(max_size=200))
def test_whatever_a_log_holds_the_mails_that_are_there_are_known(content: bytes) -> None:
    assert (1, G) in [(life.uid, life.guid) for life in read([log() + content], [(1, G)])]


def _lives(guids: str, size: int, **more: st.SearchStrategy[bool]) -> st.SearchStrategy[list[Life]]:
    life = st.builds(
        Life,
        uid=st.integers(1, 9),
        guid=st.sampled_from(guids),
        by_dsync=st.booleans(),
        before=st.lists(st.integers(1, 9), max_size=2).map(tuple),
        taken=st.booleans(),
        **more,
    )
    return st.lists(life, unique_by=lambda life: life.uid, max_size=size)


_LIVES = _lives("gh", 6)


@given(_LIVES, _LIVES)
def test_what_nobody_took_away_stays(here: list[Life], there: list[Life]) -> None:
    taken = {life.guid for life in (*here, *there) if life.taken}
    assert {guid for _, guid in unwanted([here, there])} == taken


def box(*lives: Life) -> Mailbox:
    return Mailbox({"i": lives}, {"i": "INBOX"})


def there(uid: int, guid: str) -> Life:
    return Life(uid, guid, is_there=True)


def test_only_what_nobody_took_away_is_left_out() -> None:
    mine = box(there(1, "a"), there(2, G), there(3, H), there(4, "d"))
    theirs = box(there(1, "a"), Life(2, G, taken=True), there(4, "d"))
    one, other = plans(mine, theirs)
    assert one.expunge == {"i": [(2, G)]}
    assert one.renumber == {"i": [3]}
    assert other.renumber == {}


def test_a_mail_below_one_that_both_had_is_left_out() -> None:
    """Seen: dsync finds in the logs that both had 9, which was deleted, and deleted 8 for it."""
    mine = box(there(7, G), there(8, "left out"), Life(9, H))
    theirs = box(there(7, G), Life(9, H, taken=True))
    assert plans(mine, theirs)[0].renumber == {"i": [8]}


def test_a_mail_that_is_there_under_an_older_uid_is_not_left_out() -> None:
    """Seen: 27 was common; a run broke off after it had become 32 here."""
    mine = box(there(32, G), there(33, H))
    theirs = box(there(27, G), there(33, H))
    assert plans(mine, theirs) == (Plan({}, {}), Plan({}, {}))


def test_a_mail_gets_no_uid_under_which_the_other_server_no_longer_has_it() -> None:
    """Seen: moved away and back here, 4 became 9 there by a run that broke off; 9 was deleted there
    for it, and 8 got 9 here. dsync took the two for one mail, and deleted it.
    """
    known = Life(8, G, by_dsync=True, before=(7,), is_there=True)
    mine = box(Life(4, G, taken=True), Life(7, G), known)
    theirs = box(Life(4, G), Life(9, G, by_dsync=True, before=(4,), is_there=True), there(3, H))
    one, other = plans(mine, theirs)
    assert (9, G) in one.expunge["i"]
    assert one.used == {"i": 9}
    assert other.used == {}
    # Of a mail that is not here any more, nobody can make another.
    assert plans(box(Life(4, G, taken=True)), theirs)[0].used == {}
    # A user moved it there, after many others, which keep their UIDs.
    many = box(Life(4, G), Life(5000, G, taken=True), there(4999, H))
    assert plans(mine, many)[0].used == {}


def over_the_link(document: object) -> Any:
    return json.loads(json.dumps(document))


_BOXES = _lives("ghij", 9, is_there=st.booleans()).map(lambda lives: box(*lives))


@given(_BOXES, _BOXES, st.integers(0, 9), st.booleans())
def test_what_is_moot_is_all_that_the_plans_need(
    mine: Mailbox, theirs: Mailbox, newest: int, broken: bool
) -> None:
    after = {"i": newest}
    moot = all_of(mine.moot(after), over_the_link(listed(theirs.moot(after))))
    told = Mailbox.of(over_the_link(theirs.only(moot).document()))
    whole = plans(mine, theirs, after, broken=broken)
    assert plans(mine.only(moot), told, after, broken=broken) == whole
    assert Plan.of(over_the_link(whole[1].document())) == whole[1]


def test_what_many_mails_cost_grows_with_their_number() -> None:
    mails = [(uid, f"{uid:032x}") for uid in range(1, 40_001)]
    whole = log(
        *(append(uid, guid, DSYNC) for uid, guid in mails),
        *(wish(uid) + done(uid, guid) for uid, guid in mails[::2]),
    )
    began = time.process_time()
    lives = read([whole], mails[1::2])
    mine, theirs = Mailbox({"i": lives}), Mailbox({"i": lives[1:] + lives[:1]})
    told = Mailbox.of(over_the_link(theirs.only(mine.moot({})).document()))
    plan, _ = plans(mine, told, broken=True)
    assert len(plan.expunge["i"]) == 20_000
    # Some times as much as it takes; what grows with the square takes minutes.
    assert time.process_time() - began < 10


def test_what_the_other_server_has_sent_is_told_from_what_dsync_made_here() -> None:
    known = log(
        *(append(1, G, DSYNC), append(2, H)),
        # Both get another UID.
        *(append(3, G, DSYNC), append(4, H, DSYNC), wish(1, DSYNC), wish(2, DSYNC)),
        *(done(1, G, DSYNC), done(2, H, DSYNC)),
    )
    assert appends([known]) == {1, 2, 3, 4}
    assert from_there(read([known], [(3, G), (4, H)])) == {1, 3}


def test_a_mail_that_came_from_there_and_was_moved_back_is_ours() -> None:
    known = log(append(1, G, DSYNC), wish(1), done(1, G), append(2, G))
    assert from_there(read([known], [(2, G)])) == {1}


def test_what_pairsync_gave_another_uid_is_the_same_mail_still() -> None:
    here = log(append(4, G, DSYNC), wish(4), done(4, G), append(9, G, DSYNC))
    there = log(
        append(1, G),
        # After runs that broke off, pairsync moved it to the end of its folder, twice.
        *(append(2, G), wish(1), done(1, G)),
        *(append(5, G), wish(2), done(2, G)),
        *(append(9, G, DSYNC), wish(5, DSYNC), done(5, G, DSYNC)),
    )
    mine, theirs = read([here], [(9, G)]), read([there], [(9, G)])
    assert 9 not in gone(mine, theirs)
    moved = linked(theirs, {(1, G), (2, G)})
    assert [(life.uid, life.before, life.taken) for life in moved] == [
        *((1, (), False), (2, (1,), False), (5, (2,), False), (9, (5,), False))
    ]
    assert gone(mine, moved) == {1, 2, 4, 5, 9}
    # What the user moved within the folder is another mail.
    assert linked(theirs, {(1, H), (7, G)}) == theirs
