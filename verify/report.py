"""What a run of the checks found, for people on the terminal and for programs as JSON."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from verify.registry import contract_order


class Status(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Result:
    """The outcome of one check.

    Attributes:
        id: The row of the contract.
        status: A skip is never a pass.
        observed: What was seen; for a failure what was expected too, for a skip the reason.
        seconds: How long it took.
        notes: What the operator should know beside it: warnings, records to publish.
    """

    id: str
    status: Status
    observed: str
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All results of a run, in the contract's order.

    Raises:
        ValueError: An id stands twice.
    """

    results: tuple[Result, ...]
    seconds: float = 0.0

    def __post_init__(self) -> None:
        ids = [r.id for r in self.results]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"more than one result for {', '.join(twice)}")
        ordered = tuple(sorted(self.results, key=lambda r: contract_order(r.id)))
        object.__setattr__(self, "results", ordered)

    def count(self, status: Status) -> int:
        return sum(r.status is status for r in self.results)

    @property
    def failed(self) -> bool:
        """Whether the run must exit non-zero: something failed, or nothing was checked."""
        return self.count(Status.FAIL) > 0 or self.count(Status.PASS) == 0

    def summary(self) -> str:
        parts = [f"{self.count(s)} {s}" for s in Status]
        return f"{', '.join(parts)} in {self.seconds:.1f} s"

    def json(self) -> str:
        """The report as the contract words it: a list of objects, one per id."""
        rows = [
            {
                "id": r.id,
                "status": str(r.status),
                "observed": r.observed,
                "seconds": round(r.seconds, 2),
            }
            for r in self.results
        ]
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"

    def table(self, width: int | None = None) -> str:
        """The report for the terminal.

        Args:
            width: Columns; by default those of the terminal.
        """
        columns = max(60, width or shutil.get_terminal_size((100, 24)).columns)
        lines = [line for r in self.results for line in _row(r, columns)]
        notes = [line for r in self.results for n in r.notes for line in _note(r.id, n)]
        if notes:
            lines += ["", "To know:", *notes]
        return "\n".join([*lines, "", self.summary()]) + "\n"

    def write(self, path: Path) -> None:
        """Write the JSON to ``path``, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".new")
        staged.write_text(self.json(), encoding="utf-8")
        staged.replace(path)


def _row(result: Result, columns: int) -> Iterable[str]:
    head = f"{result.id:<9} {result.status:<4} {result.seconds:6.1f} s  "
    return _hang(head, result.observed.splitlines() or [""], columns)


def _note(identifier: str, note: str) -> Iterable[str]:
    """Notes keep their lines: some are records to copy."""
    first, *rest = note.splitlines()
    return [f"  {identifier}: {first}", *(f"    {line}" for line in rest)]


def _hang(head: str, paragraphs: Sequence[str], columns: int) -> list[str]:
    indent = " " * len(head)
    wrapped = [
        line
        for paragraph in paragraphs
        for line in (
            textwrap.wrap(
                paragraph,
                columns - len(head),
                break_long_words=False,
                break_on_hyphens=False,
                subsequent_indent="  ",
            )
            or [""]
        )
    ]
    return [(head if n == 0 else indent) + line for n, line in enumerate(wrapped)]
