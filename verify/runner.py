"""Makes the checks of a run: those that only look side by side, then those that disturb one tier
beside those that disturb another, those that want stillness beside one another, and the others one
by one."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from verify.context import Context, describe
from verify.registry import Check, Failed, Phase, Skipped
from verify.report import Report, Result, Status

WORKERS = 8
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
    if check.phase is not Phase.TOGETHER:
        context.disturb()
    if status is Status.FAIL:
        context.keep_transcript(check.id, fresh.transcript)
    return Result(check.id, status, observed, seconds, tuple(fresh.notes))


def groups(checks: Sequence[Check]) -> list[list[Check]]:
    """The checks, those together that share a tier, straight or through others, in their order."""
    found: list[list[Check]] = []
    for check in checks:
        mine = [g for g in found if any(check.disturbs & other.disturbs for other in g)]
        found = [g for g in found if g not in mine] + [[*chain.from_iterable(mine), check]]
    order = {check.id: number for number, check in enumerate(checks)}
    return [sorted(group, key=lambda c: (c.late, order[c.id])) for group in found]


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
    together.sort(key=lambda check: not check.long)
    results: list[Result] = []
    if together:
        progress(f"side by side: {' '.join(c.id for c in together)}")
        with ThreadPoolExecutor(max_workers=WORKERS) as pool:
            results += pool.map(one, together)

    def in_turn(group: Sequence[Check]) -> list[Result]:
        return [one(check) for check in group]

    apart = groups([c for c in checks if c.phase is Phase.APART])
    if apart:
        named = ", ".join(" ".join(c.id for c in group) for group in apart)
        progress(f"in turn, beside one another: {named}")
        with ThreadPoolExecutor(max_workers=len(apart)) as pool:
            results += chain.from_iterable(pool.map(in_turn, apart))
    still = [c for c in checks if c.phase is Phase.STILL]
    if still:
        progress(f"undisturbed: {' '.join(c.id for c in still)}")
        with ThreadPoolExecutor(max_workers=len(still)) as pool:
            results += pool.map(one, still)
    for check in checks:
        if check.phase in (Phase.ALONE, Phase.DISRUPTIVE):
            progress(f"{check.id}: {check.title} ...")
            results.append(one(check))
    results += [Result(c.id, Status.SKIP, reason) for c in left_out]
    return Report(tuple(results), time.monotonic() - started)
