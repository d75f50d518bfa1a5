"""Makes the checks of a run, phase by phase (:class:`verify.registry.Phase`): within one, beside
one another, but for those that clash."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from verify.context import Context, describe
from verify.registry import Check, Failed, Phase, Skipped
from verify.report import Report, Result, Status

WORKERS = 8
"""Checks side by side. They mostly wait for the platform."""

_HOW = {
    Phase.TOGETHER: "side by side",
    Phase.APART: "beside one another, in turn for each tier",
    Phase.STILL: "undisturbed",
    Phase.ALONE: "beside few others",
    Phase.DISRUPTIVE: "one by one",
}

Progress = Callable[[str], None]


def make(check: Check, context: Context) -> Result:
    """Make one check. Whatever it raises becomes its result."""
    fresh = context.fresh()
    started = time.monotonic()
    try:
        observed, status = check.function(fresh), Status.PASS
    except Skipped as skipped:
        observed, status = str(skipped), Status.SKIP
    except Exception as error:  # a defect of the check is a failure of its row, not of the run
        status = Status.FAIL
        observed = describe(error)
        if not isinstance(error, Failed):
            fresh.say(traceback.format_exc())
    seconds = time.monotonic() - started
    if check.disturbs or check.phase not in (Phase.TOGETHER, Phase.APART):
        context.disturb()
    if status is Status.FAIL:
        context.keep_transcript(check.id, fresh.transcript)
    return Result(check.id, status, observed, seconds, tuple(fresh.notes))


def run(
    checks: Sequence[Check],
    context: Context,
    *,
    left_out: Sequence[Check] = (),
    reason: str = "",
    progress: Progress = lambda line: None,
) -> Report:
    """Make ``checks`` and report them together with those that were left out.

    Args:
        checks: In the order to make them.
        context: The platform.
        left_out: Checks that this run is not for; each is reported as a skip.
        reason: Why they are left out.
        progress: Takes a line when something is done.
    """
    started = time.monotonic()

    def one(check: Check) -> Result:
        if check.is_exclusive:
            progress(f"{check.id}: {check.title} ...")
        result = make(check, context)
        progress(f"{check.id}: {result.status} ({result.seconds:.1f} s)")
        return result

    results: list[Result] = []
    for phase in Phase:
        mine = [c for c in checks if c.phase is phase]
        mine.sort(key=lambda check: (not check.long, check.late))
        beside = [c.id for c in mine if not c.is_exclusive]
        if beside:
            progress(f"{_HOW[phase]}: {' '.join(beside)}")
        results += _beside(mine, one, WORKERS if phase is Phase.TOGETHER else len(mine))
    results += [Result(c.id, Status.SKIP, reason) for c in left_out]
    return Report(tuple(results), time.monotonic() - started)


def _beside(checks: Sequence[Check], one: Callable[[Check], Result], workers: int) -> list[Result]:
    """Make checks beside one another, each after those before it that it clashes with.

    One that runs alone does so in the calling thread, so that an interrupt reaches it.
    """
    made: list[tuple[Check, Future[Result]]] = []
    is_over = threading.Event()

    def after(before: Sequence[Future[Result]], check: Check) -> Result:
        for future in before:
            future.result()  # raises where that one was interrupted
        if is_over.is_set():
            raise CancelledError
        return one(check)

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        try:
            for check in checks:
                before = [future for other, future in made if check.clashes(other)]
                if check.is_exclusive:
                    future: Future[Result] = Future()
                    future.set_result(after(before, check))
                else:
                    future = pool.submit(after, before, check)
                made.append((check, future))
            return [future.result() for _, future in made]
        except BaseException:
            is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
