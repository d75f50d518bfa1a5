"""The report, and how a run fills it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest

from verify import runner
from verify.context import Context, Probe, each, eventually
from verify.registry import Check, Failed, Phase, Skipped
from verify.report import Report, Result, Status


@pytest.fixture
def context(tmp_path: Path) -> Context:
    nothing = cast(Any, None)
    return Context(
        platform=nothing,
        site=tmp_path,
        stack="example",
        state=tmp_path,
        internet=nothing,
        lookup=nothing,
    )


def check(identifier: str, function: Any, phase: Phase = Phase.TOGETHER) -> Check:
    return Check(identifier, function, live=False, quick=True, phase=phase)


def passes(context: Context) -> str:
    """Passes."""
    return "as it should be"


def fails(context: Context) -> str:
    """Fails."""
    context.say("C: EHLO probe")
    raise Failed("something else")


def skips(context: Context) -> str:
    """Skips."""
    raise Skipped("no root")


def breaks(context: Context) -> str:
    """Has a defect."""
    raise KeyError("unexpected")


def test_the_json_is_the_contracts() -> None:
    report = Report((Result("OUT-1", Status.PASS, "seen", 0.4321, ("a note",)),))
    assert json.loads(report.json()) == [
        {"id": "OUT-1", "status": "pass", "observed": "seen", "seconds": 0.43}
    ]


def test_results_stand_in_the_contracts_order() -> None:
    results = [Result(i, Status.PASS, "") for i in ("HOST-1", "OUT-10", "OUT-2")]
    assert [r.id for r in Report(tuple(results)).results] == ["OUT-2", "OUT-10", "HOST-1"]


def test_an_id_stands_once() -> None:
    with pytest.raises(ValueError, match="more than one result for OUT-1"):
        Report((Result("OUT-1", Status.PASS, ""), Result("OUT-1", Status.SKIP, "")))


def test_a_skip_is_counted_and_is_no_pass() -> None:
    report = Report((Result("OUT-1", Status.PASS, ""), Result("OUT-2", Status.SKIP, "why")), 1.0)
    assert report.summary() == "1 pass, 0 fail, 1 skip in 1.0 s"
    assert not report.failed


def test_a_run_that_checked_nothing_has_failed() -> None:
    assert Report((Result("OUT-1", Status.SKIP, "why"),)).failed
    assert Report(()).failed


def test_the_table_shows_every_row_its_reason_and_the_notes() -> None:
    table = Report(
        (
            Result("OUT-1", Status.FAIL, "AUTH is offered before TLS " * 5, 1.0),
            Result("DNS-3", Status.SKIP, "no lab", 0.0, ("records:\na IN PTR b.",)),
        )
    ).table(80)
    assert "OUT-1     fail    1.0 s  AUTH is offered" in table
    assert "DNS-3     skip" in table
    assert "    a IN PTR b." in table
    assert "0 pass, 1 fail, 1 skip" in table
    assert all(len(line) <= 80 for line in table.splitlines())


def test_the_report_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    Report((Result("OUT-1", Status.PASS, "ü"),)).write(path)
    assert json.loads(path.read_text("utf-8"))[0]["observed"] == "ü"
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_outcomes_of_checks_become_results(context: Context) -> None:
    wanted = [check("OUT-1", passes), check("OUT-2", fails), check("OUT-3", skips)]
    wanted.append(check("OUT-4", breaks))
    found = {r.id: r for r in runner.run(wanted, context).results}
    assert [r.status for r in found.values()] == ["pass", "fail", "skip", "fail"]
    assert found["OUT-1"].observed == "as it should be"
    assert found["OUT-3"].observed == "no root"
    assert found["OUT-4"].observed == "KeyError: 'unexpected'"


def test_a_failed_check_leaves_its_transcript(context: Context, tmp_path: Path) -> None:
    runner.run([check("OUT-2", fails), check("OUT-1", passes)], context)
    assert (tmp_path / "transcripts" / "OUT-2.txt").read_text("utf-8") == "C: EHLO probe\n"
    assert not (tmp_path / "transcripts" / "OUT-1.txt").exists()


def test_what_a_run_leaves_out_is_a_skip_with_the_reason(context: Context) -> None:
    report = runner.run(
        [check("OUT-1", passes)], context, left_out=[check("EDGE-1", fails)], reason="not now"
    )
    assert [(r.id, r.status, r.observed) for r in report.results] == [
        ("OUT-1", Status.PASS, "as it should be"),
        ("EDGE-1", Status.SKIP, "not now"),
    ]


def test_checks_that_only_look_run_side_by_side_and_the_others_alone(context: Context) -> None:
    """So do those that want stillness, but not beside the first ones."""
    together = threading.Barrier(2, timeout=5)
    running: list[str] = []

    def meets(context: Context) -> str:
        """Meets the other."""
        together.wait()
        return ""

    def alone(context: Context) -> str:
        """Is alone."""
        running.append("in")
        assert running == ["in"]
        running.clear()
        return ""

    report = runner.run(
        [
            check("OUT-1", meets),
            check("OUT-2", meets),
            check("OUT-3", meets, Phase.STILL),
            check("OUT-4", meets, Phase.STILL),
            check("OUT-5", alone, Phase.ALONE),
            check("OUT-6", alone, Phase.DISRUPTIVE),
        ],
        context,
    )
    assert report.count(Status.PASS) == 6


def test_what_takes_longest_begins_first(context: Context) -> None:
    began: list[str] = []

    def look(identifier: str, *, long: bool) -> Check:
        def looks(context: Context) -> str:
            """Looks."""
            began.append(identifier)
            return ""

        return Check(identifier, looks, False, True, Phase.TOGETHER, long=long)

    checks = [look(f"OUT-{n}", long=False) for n in range(1, 6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "WORKERS", 1)
        runner.run([*checks, look("BOX-3", long=True)], context)
    assert began == ["BOX-3", "OUT-1", "OUT-2", "OUT-3", "OUT-4", "OUT-5"]


def test_checks_that_disturb_one_tier_take_turns_beside_those_of_another(context: Context) -> None:
    both = threading.Barrier(2, timeout=5)
    busy = {"smtp_out": threading.Lock(), "smtp_in": threading.Lock()}
    order: list[str] = []

    def disturbing(identifier: str, *tiers: str, meets: bool) -> Check:
        def look(context: Context) -> str:
            """Disturbs."""
            for tier in tiers:
                assert busy[tier].acquire(blocking=False), f"another check disturbs {tier}"
            if meets:
                both.wait()
            order.append(identifier)
            for tier in tiers:
                busy[tier].release()
            return ""

        return Check(identifier, look, False, True, Phase.APART, frozenset(tiers))

    report = runner.run(
        [
            disturbing("OUT-3", "smtp_out", meets=True),
            disturbing("OUT-6", "smtp_out", meets=False),
            disturbing("IN-4", "smtp_in", meets=True),
        ],
        context,
    )
    assert report.count(Status.PASS) == 3, report.table()
    assert order.index("OUT-3") < order.index("OUT-6")


def test_late_checks_come_after_the_others_of_their_tier(context: Context) -> None:
    order: list[str] = []

    def disturbing(identifier: str, *tiers: str, late: bool = False) -> Check:
        def look(context: Context) -> str:
            """Disturbs."""
            order.append(identifier)
            return ""

        return Check(identifier, look, False, True, Phase.APART, frozenset(tiers), late=late)

    checks = [
        disturbing("IN-4", "smtp_in", late=True),
        disturbing("BOX-7", "smtp_in", "maildrop"),
        disturbing("BOX-1", "maildrop"),
    ]
    runner.run(checks, context)
    assert order.index("BOX-7") < order.index("BOX-1")
    assert order.index("BOX-7") < order.index("IN-4")


def test_a_check_begins_while_an_earlier_one_still_waits(context: Context) -> None:
    """Those that run alone come last."""
    meet = threading.Barrier(2, timeout=5)
    order: list[str] = []

    def disruptive(identifier: str, disturbs: str = "", *, meets: bool = False) -> Check:
        def look(context: Context) -> str:
            """Takes something away."""
            if meets:
                meet.wait()
            order.append(identifier)
            return ""

        return Check(identifier, look, False, False, Phase.DISRUPTIVE, frozenset(disturbs.split()))

    report = runner.run(
        [
            disruptive("SPAM-3", "rspamd", meets=True),
            disruptive("SPAM-6", "rspamd"),
            disruptive("BOX-4", "maildrop", meets=True),
            disruptive("HOST-6"),
            disruptive("WEB-3", "webmail"),
        ],
        context,
    )
    assert report.count(Status.PASS) == 5, report.table()
    assert order[-1] == "HOST-6"


@pytest.mark.parametrize("phase", [Phase.APART, Phase.DISRUPTIVE])
def test_what_has_not_begun_when_a_run_is_interrupted_does_not_begin(
    context: Context, phase: Phase
) -> None:
    began: list[str] = []

    def interrupted(context: Context) -> str:
        """Is interrupted."""
        began.append("first")
        raise KeyboardInterrupt

    def second(context: Context) -> str:
        """Comes after it."""
        began.append("second")
        return ""

    tiers = frozenset() if phase is Phase.DISRUPTIVE else frozenset({"smtp_out"})
    checks = [
        Check("OUT-1", interrupted, False, False, phase, tiers),
        Check("OUT-2", second, False, False, phase, tiers),
    ]
    with pytest.raises(KeyboardInterrupt):
        runner.run(checks, context)
    assert began == ["first"]


def test_what_runs_when_a_run_is_interrupted_waits_no_longer_and_puts_things_back(
    context: Context,
) -> None:
    waits, told, back = threading.Event(), list[str](), list[str]()

    def interrupt(context: Context) -> str:
        """Is interrupted."""
        waits.wait(5)
        raise KeyboardInterrupt

    def takes(context: Context) -> str:
        """Takes something away, and waits for what does not come."""
        try:
            eventually(never, seconds=60)
        finally:
            back.append("back")
        return ""

    def never() -> None:
        waits.set()
        raise Failed("not yet")

    checks = [
        Check("EDGE-1", interrupt, False, False, Phase.DISRUPTIVE, frozenset({"smtp_out"})),
        Check("WEB-3", takes, False, False, Phase.DISRUPTIVE, frozenset({"webmail"})),
    ]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runner.run(checks, context, progress=told.append)
    assert back == ["back"]
    assert time.monotonic() - began < 30
    assert any("WEB-3" in line and line.startswith("interrupted") for line in told)
    runner.run([check("OUT-1", passes)], context)
    with pytest.raises(Failed, match="not within"):
        eventually(never, seconds=0)


def test_what_a_check_needs_is_not_disturbed_beside_it() -> None:
    def alone(identifier: str, disturbs: str = "", needs: str = "") -> Check:
        tiers = frozenset(disturbs.split()), frozenset(needs.split())
        return Check(identifier, passes, False, True, Phase.ALONE, *tiers)

    edge, web = alone("EDGE-4", "streams", "outside"), alone("WEB-4", "webmail", "outside")
    cut, anything = alone("HOST-1", "outside"), alone("CERT-2")
    assert not edge.clashes(web) and not web.clashes(edge)
    assert edge.clashes(cut) and cut.clashes(edge)
    assert anything.clashes(edge) and edge.clashes(anything)
    assert (anything.is_exclusive, edge.is_exclusive) == (True, False)


def test_each_names_every_failure() -> None:
    def look(number: int) -> int:
        if number % 2:
            raise Failed(f"{number} is odd")
        return number

    with pytest.raises(Failed, match="1 is odd\n3 is odd"):
        each(range(5), look)
    assert each([0, 2], look) == [0, 2]


def test_each_refuses_to_pass_on_nothing() -> None:
    with pytest.raises(Failed, match="nothing to look at"):
        each([], passes)


def test_eventually_gives_the_last_reason_when_time_is_up() -> None:
    def never() -> None:
        raise Failed("still dark")

    with pytest.raises(Failed, match=r"the light: not within 0\.05 s: still dark"):
        eventually(never, seconds=0.05, every=0.01, what="the light")


def test_a_probe_never_shows_its_password() -> None:
    assert "hunter2" not in repr(Probe("probe", "hunter2", "probe@example.org"))
