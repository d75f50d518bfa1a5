"""Users written on both servers at once get a full run."""

from __future__ import annotations

from pairsync.settle import Unsettled


def test_a_user_written_on_both_servers_gets_a_full_run_at_rest() -> None:
    unsettled = Unsettled()
    unsettled.guest("u", 10.0)
    unsettled.ran("u", 11.0, full=False, changed=False)
    assert unsettled.due(11.5) == []
    assert unsettled.due(12.5) == ["u"]
    unsettled.ran("u", 13.0, full=True, changed=False)
    assert len(unsettled) == 0


def test_changes_during_a_run_count_too_and_in_a_full_one_again() -> None:
    unsettled = Unsettled()
    unsettled.ran("u", 10.0, full=False, changed=True)
    assert unsettled.due(11.5) == ["u"]
    unsettled.ran("u", 12.0, full=True, changed=True)
    assert unsettled.due(14.0) == ["u"]


def test_a_user_who_is_gone_needs_none() -> None:
    unsettled = Unsettled()
    unsettled.ran("u", 10.0, full=False, changed=True)
    unsettled.forget("u")
    assert len(unsettled) == 0
    assert unsettled.due(20.0) == []


def test_who_never_rests_gets_one_nevertheless() -> None:
    unsettled = Unsettled()
    now, due = 10.0, []
    while not due:
        unsettled.ran("u", now, full=False, changed=True)
        due = unsettled.due(now)
        now += 0.5
        assert now < 20.0
    assert due == ["u"]
    assert unsettled.due(now) == []


def test_a_user_written_on_one_server_gets_none() -> None:
    unsettled = Unsettled()
    unsettled.guest("u", 1.0)
    unsettled.ran("u", 10.0, full=False, changed=False)
    unsettled.ran("v", 10.0, full=False, changed=False)
    assert unsettled.due(20.0) == []
