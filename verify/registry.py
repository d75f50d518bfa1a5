"""The list of checks: which there are, when each runs, and in which order.

A check is a function of a :class:`verify.context.Context` that returns what it observed, in one
line, or raises :class:`Failed` or :class:`Skipped`::

    @check("OUT-1", live=True)
    def submission_answers(ctx: Context) -> str:
        \"\"\"Submission answers through every frontend.\"\"\"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verify.context import Context

SECTIONS = (
    "OUT", "IN", "SPAM", "BOX", "WEB", "EDGE", "CLIENT", "CERT", "DNS", "HOST", "CHANGE", "HA",
)  # fmt: skip
"""Sections of the contract, in its order."""

_ID = re.compile(r"([A-Z]+)-([1-9][0-9]*)")

Function = Callable[["Context"], str]


class Failed(Exception):
    """What was observed is not what the contract says. The message says both."""


class Skipped(Exception):
    """The check cannot be made here. The message says why, and what it would need."""


class SelectionError(Exception):
    """The checks that were asked for are not there, or not for this platform."""


class Mode(StrEnum):
    """Which checks a run is for."""

    QUICK = "quick"
    ALL = "all"
    LIVE = "live"


class Phase(StrEnum):
    """When a check runs within a run. Members stand in that order."""

    TOGETHER = "together"
    """Only looks, and sends mail: runs beside others."""
    APART = "apart"
    """Changes something of a tier for a moment: beside those that disturb other tiers, and those
    that count on none."""
    STILL = "still"
    """Looks for what nobody else may change meanwhile: beside others of this kind."""
    ALONE = "alone"
    """Changes something for a moment and puts it back: at most some others of this kind run beside
    it."""
    DISRUPTIVE = "disruptive"
    """Takes machines away: beside those at most that do not count on them, and after everything
    else."""


@dataclass(frozen=True)
class Check:
    """One row of the contract.

    Attributes:
        id: The row's id, such as ``OUT-1``.
        function: Makes the check.
        live: Suits a live platform.
        quick: Belongs to the quick set of a rehearsal; live checks always do.
        phase: When it runs.
        disturbs: Tiers that nobody else may count on meanwhile.
        needs: Tiers that nobody may disturb meanwhile.
        late: Comes after the others that disturb the same tiers.
        long: Takes longest of those that only look, so it begins first.
    """

    id: str
    function: Function
    live: bool
    quick: bool
    phase: Phase
    disturbs: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    late: bool = False
    long: bool = False

    @property
    def title(self) -> str:
        """The first line of the function's docstring, without its full stop."""
        return (self.function.__doc__ or "").strip().partition("\n")[0].rstrip(".")

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts by phase, then as the contract does."""
        return (list(Phase).index(self.phase), *contract_order(self.id))

    @property
    def is_exclusive(self) -> bool:
        """Whether nothing at all may run beside it."""
        named = self.disturbs | self.needs
        return self.phase in (Phase.ALONE, Phase.DISRUPTIVE) and not named

    def clashes(self, other: Check) -> bool:
        """Whether it must not run beside another one of its phase."""
        if self.is_exclusive or other.is_exclusive:
            return True
        disturbed = self.disturbs & (other.disturbs | other.needs) | other.disturbs & self.needs
        return bool(disturbed)

    def belongs_to(self, mode: Mode) -> bool:
        match mode:
            case Mode.LIVE:
                return self.live
            case Mode.QUICK:
                return self.live or self.quick
            case Mode.ALL:
                return True


def contract_order(identifier: str) -> tuple[int, int]:
    """Sort key of an id: its section's place in the contract, then its number.

    Raises:
        ValueError: The id is none of the contract's.
    """
    match = _ID.fullmatch(identifier)
    if match is None or match[1] not in SECTIONS:
        raise ValueError(f"{identifier!r} is no id of the contract; write one like 'OUT-1'")
    return SECTIONS.index(match[1]), int(match[2])


class Registry:
    """Checks by id. An id has one check."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def check(
        self,
        identifier: str,
        *,
        live: bool = False,
        quick: bool = False,
        disturbs: Iterable[str] = (),
        needs: Iterable[str] = (),
        calm: bool = False,
        late: bool = False,
        long: bool = False,
        still: bool = False,
        alone: bool = False,
        disruptive: bool = False,
    ) -> Callable[[Function], Function]:
        """Register the decorated function as the check of ``identifier``.

        Args:
            identifier: Id of the contract's row.
            live: Suits a live platform.
            quick: Belongs to the quick set of a rehearsal.
            disturbs: Tiers of which it changes something and puts it back: no check that
                disturbs or needs them may run beside it.
            needs: Tiers that no check beside it may disturb, where it runs beside such.
            calm: Counts on no tier: may run beside those that disturb some.
            late: Comes after the others that disturb the same tiers.
            long: Takes longest of those that only look, so it begins first.
            still: Changes nothing that others look for, but needs that nobody does: runs beside
                others of this kind alone.
            alone: Changes something that those before count on, and puts it back. Where it names
                what it disturbs and needs, others of this kind may run beside it.
            disruptive: Takes machines away: runs after everything else. Where it names what it
                disturbs and needs, others of this kind may run beside it.

        Raises:
            ValueError: The id is none of the contract's, has a check already, or the function
                has no docstring; or a check that would disturb is to be run live.
        """
        contract_order(identifier)
        tiers = frozenset(disturbs)
        if live and (tiers or still or alone or disruptive):
            raise ValueError(f"{identifier}: a live check must not disturb the platform")
        phase = (
            Phase.DISRUPTIVE
            if disruptive
            else Phase.ALONE
            if alone
            else Phase.STILL
            if still
            else Phase.APART
            if tiers or calm
            else Phase.TOGETHER
        )

        def register(function: Function) -> Function:
            if identifier in self._checks:
                other = self._checks[identifier].function
                raise ValueError(
                    f"{identifier} has a check already: {other.__module__}.{other.__qualname__}"
                )
            needed = frozenset(needs)
            added = Check(identifier, function, live, quick, phase, tiers, needed, late, long)
            if not added.title:
                raise ValueError(f"{identifier}: {function.__qualname__} needs a docstring")
            self._checks[identifier] = added
            return function

        return register

    def __getitem__(self, identifier: str) -> Check:
        """The check of ``identifier``.

        Raises:
            SelectionError: There is none; the message lists those that there are.
        """
        try:
            return self._checks[identifier]
        except KeyError:
            there = " ".join(sorted(self._checks, key=contract_order))
            message = f"there is no check {identifier!r}; there are: {there}"
            raise SelectionError(message) from None

    def all(self) -> tuple[Check, ...]:
        """Every check, in the order in which a run makes them."""
        return tuple(sorted(self._checks.values(), key=lambda c: c.order))

    def select(self, mode: Mode, only: Iterable[str] = ()) -> tuple[Check, ...]:
        """The checks of a run in the order to make them: those of ``mode``, or just ``only``.

        Raises:
            SelectionError: An id of ``only`` has no check, or ``mode`` is live and it does not
                suit a live platform.
        """
        wanted = {self[identifier].id for identifier in only}
        if mode is Mode.LIVE:
            unfit = sorted(i for i in wanted if not self[i].live)
            if unfit:
                raise SelectionError(f"{', '.join(unfit)}: not for a live platform")
        if wanted:
            return tuple(c for c in self.all() if c.id in wanted)
        return tuple(c for c in self.all() if c.belongs_to(mode))


checks = Registry()
"""The project's checks."""

check = checks.check
