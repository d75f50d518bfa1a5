"""The queue and the turns, with a clock of our own."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairsync.schedule import Job, Outcome, Queue, Turns

DEBOUNCE = 0.03


def queue(parallel: int = 4) -> Queue:
    made = Queue(parallel, DEBOUNCE, retry_max=8.0)
    made.resume(0.0)
    return made


def taken(q: Queue, now: float) -> list[str]:
    found = []
    while job := q.take(now):
        found.append(job.user)
    return found


def test_a_change_waits_for_the_debounce() -> None:
    q = queue()
    q.notice("u", 1.0)
    assert q.take(1.02) is None
    assert q.next_due() == pytest.approx(1.03)
    assert q.take(1.03) == Job("u", full=False, background=False)


def test_changes_of_one_user_become_one_run() -> None:
    q = queue()
    for number in range(5):
        q.notice("u", 1.0 + number * 0.01)
    assert taken(q, 1.05) == []
    assert taken(q, 1.07) == ["u"]
    q.finish("u", Outcome.OK, 1.2)
    assert q.next_due() is None


def test_a_user_who_never_rests_gets_a_run_and_then_another() -> None:
    q = queue()
    now = 1.0
    while not (job := q.take(now)):
        q.notice("u", now)
        now += 0.01
        assert now < 2.0
    assert job.user == "u"
    q.finish("u", Outcome.OK, now)
    assert q.take(now + DEBOUNCE) is not None


def test_a_change_during_a_run_makes_another_run() -> None:
    q = queue()
    q.notice("u", 1.0)
    assert taken(q, 1.1) == ["u"]
    q.notice("u", 1.12)
    assert taken(q, 1.5) == []
    q.finish("u", Outcome.OK, 1.5)
    assert taken(q, 1.5) == ["u"]


def test_no_more_runs_than_allowed_side_by_side() -> None:
    q = queue(parallel=2)
    for user in "abc":
        q.notice(user, 1.0)
    assert taken(q, 2.0) == ["a", "b"]
    assert q.next_due() is None
    q.finish("a", Outcome.OK, 2.1)
    assert taken(q, 2.1) == ["c"]


def test_a_pass_leaves_half_of_the_places_to_changes() -> None:
    q = queue(parallel=4)
    for number in range(10):
        q.add_background(f"p{number}", 1.0)
    assert taken(q, 1.0) == ["p0", "p1"]
    q.notice("u", 1.0)
    assert taken(q, 1.1) == ["u"]
    assert q.background == 10


def test_users_that_fail_leave_half_of_the_places_to_others() -> None:
    q = queue(parallel=4)
    for user in "abcd":
        q.notice(user, 1.0)
    for user in taken(q, 2.0):
        q.finish(user, Outcome.STALLED, 3.0)
    assert len(taken(q, 9.0)) == 2
    q.notice("e", 9.0)
    assert taken(q, 9.1) == ["e"]


def test_a_change_takes_a_user_out_of_the_background_and_stays_full() -> None:
    q = queue(parallel=2)
    for user in "abc":
        q.add_background(user, 1.0)
    assert taken(q, 1.0) == ["a"]
    q.notice("c", 1.0)
    assert q.take(1.1) == Job("c", full=True, background=False)


def test_failures_are_tried_again_later_and_later_and_in_full() -> None:
    q = queue()
    q.notice("u", 0.0)
    now, waits = 1.0, []
    for _ in range(8):
        job = q.take(now)
        assert job is not None
        q.finish("u", Outcome.FAILED, now)
        due = q.next_due()
        assert due is not None
        waits.append(round(due - now, 3))
        now = due
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 8.0, 8.0]
    assert q.take(now) == Job("u", full=True, background=False)
    assert q.failing == {"u": 8}


def test_a_new_change_does_not_hurry_a_user_that_fails() -> None:
    q = queue()
    q.notice("u", 1.0)
    q.take(1.1)
    q.finish("u", Outcome.FAILED, 1.1)
    q.notice("u", 1.11)
    assert taken(q, 1.2) == []
    assert taken(q, 1.31) == ["u"]


@pytest.mark.parametrize(
    ("outcome", "wait", "full"),
    [
        (Outcome.CHANGED, DEBOUNCE, False),
        (Outcome.BUSY, 0.2, False),
        (Outcome.PUT_OFF, 0.5, True),
        (Outcome.UNKNOWN, 0.2, True),
    ],
)
def test_how_long_until_the_next_try(outcome: Outcome, wait: float, full: bool) -> None:
    q = queue()
    q.notice("u", 1.0)
    q.take(1.1)
    q.finish("u", outcome, 2.0)
    assert q.next_due() == pytest.approx(2.0 + wait)
    assert q.take(2.0 + wait) == Job("u", full=full, background=False)


def test_after_changes_in_five_runs_the_next_is_full() -> None:
    q = queue()
    q.notice("u", 1.0)
    now, kinds = 2.0, []
    for _ in range(6):
        job = q.take(now)
        assert job is not None
        kinds.append(job.full)
        q.finish("u", Outcome.CHANGED, now)
        now += 1.0
    assert kinds == [False] * 5 + [True]


def test_nothing_begins_while_the_peer_is_away() -> None:
    q = queue()
    q.hold()
    q.notice("u", 1.0)
    assert taken(q, 9.0) == []
    assert q.next_due() is None


def test_a_user_at_rest_waits_and_nobody_else_does() -> None:
    q = queue()
    q.rest("u", 2.0, 1.0)
    q.notice("u", 1.0)
    q.notice("other", 1.0)
    assert taken(q, 1.9) == ["other"]
    assert q.rests("u", 1.9)
    assert q.next_due() == 2.0
    assert taken(q, 2.0) == ["u"]
    assert not q.rests("u", 2.0)


def test_a_user_who_is_to_rest_all_the_time_gets_a_run_and_rests_again_then() -> None:
    q = queue()
    q.notice("u", 0.0)
    for tenths in range(1, 60):
        now = tenths / 10
        q.rest("u", float(int(now) + 1), now)
        if q.take(now):
            break
    assert now == 3.0
    q.rest("u", 4.0, 3.1)
    assert not q.rests("u", 3.1)
    q.finish("u", Outcome.OK, 3.2)
    q.rest("u", 4.0, 3.3)
    assert q.rests("u", 3.3)


def test_a_run_of_the_peers_lets_a_user_rest_again_and_so_does_time() -> None:
    q = queue()
    for user in ("guest", "later"):
        q.rest(user, 3.0, 0.0)
        q.rest(user, 5.0, 1.9)
        assert not q.rests(user, 4.0)
    q.rested("guest")
    q.rest("guest", 5.0, 4.0)
    q.rest("later", 5.0, 4.0)
    assert q.rests("guest", 4.5) and q.rests("later", 4.5)


def test_the_peers_return_makes_all_due_in_full() -> None:
    q = queue()
    for user in ("slow", "u"):
        q.notice(user, 1.0)
    q.take(1.1)
    q.finish("slow", Outcome.FAILED, 1.1)
    q.hold()
    q.add_background("p", 1.2)
    q.resume(5.0)
    assert [q.take(5.0) for _ in range(3)] == [
        Job("slow", full=True, background=False),
        Job("u", full=True, background=False),
        Job("p", full=True, background=True),
    ]


def test_a_user_who_is_gone_is_forgotten() -> None:
    q = queue()
    q.notice("u", 1.0)
    q.take(1.1)
    q.notice("u", 1.2)
    q.finish("u", Outcome.GONE, 1.3)
    assert not q.has("u")


def test_asked_for_is_due_at_once_in_full() -> None:
    q = queue()
    q.notice("u", 1.0)
    q.take(1.1)
    q.finish("u", Outcome.UNKNOWN, 1.2)
    q.ask("u", 1.3)
    assert q.take(1.3) == Job("u", full=True, background=False)


_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["notice", "take", "finish", "background", "hold", "resume", "wait"]),
        st.sampled_from("abc"),
        st.sampled_from([o for o in Outcome if o is not Outcome.GONE]),
        st.floats(0, 1),
    ),
    max_size=60,
)


@given(_EVENTS)
def test_no_change_is_ever_forgotten(
    events: Iterable[tuple[str, str, Outcome, float]],
) -> None:
    """After a change of a user, a run that begins later ends well, or one is still to come."""
    q = queue(parallel=2)
    now = 1.0
    open_: dict[str, bool] = {}
    running: dict[str, bool] = {}
    for what, user, outcome, wait in events:
        now += wait
        match what:
            case "notice":
                q.notice(user, now)
                open_[user] = True
                if user in running:
                    running[user] = False
            case "take":
                if job := q.take(now):
                    assert job.user not in running
                    running[job.user] = True
            case "finish":
                if user in running:
                    q.finish(user, outcome, now)
                    if running.pop(user) and outcome is Outcome.OK:
                        open_[user] = False
            case "background":
                q.add_background(user, now)
            case "hold":
                q.hold()
            case "resume":
                q.resume(now)
        assert len(running) <= 2
        for changed, still in open_.items():
            assert not still or q.has(changed)
    for user in list(running):
        q.finish(user, Outcome.OK, now)
    q.resume(now)
    now += 60
    rounds = 0
    while job := q.take(now):
        q.finish(job.user, Outcome.OK, now)
        now += 1
        rounds += 1
        assert rounds < 20
    assert not any(q.has(user) for user in "abc")


def test_one_of_two_that_ask_at_the_same_time_goes_first() -> None:
    first, second = Turns(precedence=True), Turns(precedence=False)
    assert first.begin("u")
    assert second.begin("u")
    assert not first.admit("u")
    assert second.admit("u")
    first.granted("u")
    # The other's request still waits at the first one, until its run is over.
    assert not first.admit("u")
    first.end("u")
    second.leave("u")
    assert first.admit("u")
    second.granted("u")
    assert not second.admit("u")


def test_no_run_of_ours_asks_while_the_peers_is_on() -> None:
    turns = Turns(precedence=False)
    assert turns.admit("u")
    assert not turns.begin("u")
    assert turns.begin("v")
    turns.leave("u")
    assert turns.begin("u")


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["begin", "step"])), max_size=80))
def test_both_never_run_for_one_user(steps: list[tuple[bool, str]]) -> None:
    """Two servers and the requests on their way, in any order."""
    sides = (Turns(precedence=True), Turns(precedence=False))
    state = ["idle", "idle"]
    for of_first, what in steps:
        me, other = (0, 1) if of_first else (1, 0)
        if state[me] == "idle" and what == "begin":
            if sides[me].begin("u"):
                state[me] = "asks"
        elif state[me] == "asks":
            if sides[other].admit("u"):
                state[me] = "runs"
                sides[me].granted("u")
        elif state[me] == "runs":
            sides[me].end("u")
            sides[other].leave("u")
            state[me] = "idle"
        assert state != ["runs", "runs"]
    for _ in range(4):
        for me, other in ((0, 1), (1, 0)):
            if state[me] == "asks" and sides[other].admit("u"):
                sides[me].granted("u")
                state[me] = "runs"
            elif state[me] == "runs":
                sides[me].end("u")
                sides[other].leave("u")
                state[me] = "idle"
    assert state == ["idle", "idle"], "they wait for each other"
