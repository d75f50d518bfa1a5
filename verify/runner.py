"""Makes the checks of a run: those that only look side by side, the others one by one."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from verify.context import Context, describe
from verify.registry import Check, Failed, Phase, Skipped
from verify.report import Report, Result, Status

WORKERS = 6
"""Checks side by side. They mostly wait for the platform."""

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
        result = make(check, context)
        progress(f"{check.id}: {result.status} ({result.seconds:.1f} s)")
        return result

    together = [c for c in checks if c.phase is Phase.TOGETHER]
    results: list[Result] = []
    if together:
        progress(f"side by side: {' '.join(c.id for c in together)}")
        with ThreadPoolExecutor(max_workers=WORKERS) as pool:
            results += pool.map(one, together)
    for check in checks:
        if check.phase is not Phase.TOGETHER:
            progress(f"{check.id}: {check.title} ...")
            results.append(one(check))
    results += [Result(c.id, Status.SKIP, reason) for c in left_out]
    return Report(tuple(results), time.monotonic() - started)
