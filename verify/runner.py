"""Makes the checks of a run, phase by phase (:class:`verify.registry.Phase`): within one, beside
one another, but for those that clash."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from verify.context import Context, describe, interrupted
from verify.registry import Check, Failed, Phase, Skipped
from verify.report import Report, Result, Status

WORKERS = 8
"""Checks side by side. They mostly wait for the platform."""

_HOW = {
    Phase.TOGETHER: "side by side",
    Phase.APART: "beside one another, in turn for each tier",
    Phase.STILL: "undisturbed",
    Phase.ALONE: "beside few others",
    Phase.DISRUPTIVE: "each beside those that do not count on what it takes away",
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
        if check.is_exclusive or check.phase is Phase.DISRUPTIVE:
            progress(f"{check.id}: {check.title} ...")
        result = make(check, context)
        progress(f"{check.id}: {result.status} ({result.seconds:.1f} s)")
        return result

    interrupted.clear()
    results: list[Result] = []
    for phase in Phase:
        mine = [c for c in checks if c.phase is phase]
        mine.sort(key=lambda check: (check.is_exclusive, not check.long, check.late))
        beside = [c.id for c in mine if not c.is_exclusive]
        if beside:
            progress(f"{_HOW[phase]}: {' '.join(beside)}")
        results += _beside(mine, one, WORKERS if phase is Phase.TOGETHER else len(mine), progress)
    results += [Result(c.id, Status.SKIP, reason) for c in left_out]
    return Report(tuple(results), time.monotonic() - started)


def _beside(
    checks: Sequence[Check], one: Callable[[Check], Result], workers: int, progress: Progress
) -> list[Result]:
    """Make checks beside one another, each as soon as it clashes with none that runs.

    Those that run alone come last, in the calling thread, so that an interrupt reaches them. The
    others hear of one as soon as they wait for something.
    """
    waiting, running = list(checks), dict[Future[Result], Check]()
    made: list[Result] = []
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        try:
            while waiting or running:
                for check in tuple(waiting):
                    if any(check.clashes(other) for other in running.values()):
                        continue
                    waiting.remove(check)
                    if check.is_exclusive:
                        made.append(one(check))
                    else:
                        running[pool.submit(one, check)] = check
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    made.append(future.result())  # raises where the check was interrupted
        except BaseException:
            interrupted.set()
            if running:
                left = " ".join(sorted(check.id for check in running.values()))
                progress(f"interrupted; these put back what they changed: {left}")
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return made
