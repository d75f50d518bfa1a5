"""Every row of the mail contract whose tier exists, on the rehearsal's platform."""

from __future__ import annotations

import json
import sys

import pytest

from verify import runner
from verify.checks import checks
from verify.context import Context
from verify.registry import Mode
from verify.report import Report, Result, Status


@pytest.fixture(scope="module")
def report(platform_up: Context) -> Report:
    """One run of all checks; the rows are judged one by one."""
    made = runner.run(
        checks.select(Mode.ALL), platform_up, progress=lambda line: print(line, file=sys.stderr)
    )
    made.write(platform_up.state / "report.json")
    return made


@pytest.mark.parametrize("identifier", [c.id for c in checks.all()])
def test_the_contract_holds(report: Report, identifier: str) -> None:
    result: Result = next(r for r in report.results if r.id == identifier)
    if result.status is Status.SKIP:
        pytest.skip(result.observed)
    assert result.status is Status.PASS, result.observed


def test_the_report_has_every_row(report: Report, platform_up: Context) -> None:
    rows = json.loads((platform_up.state / "report.json").read_text("utf-8"))
    assert [r["id"] for r in rows] == [r.id for r in report.results]
    assert {r["id"] for r in rows} == {c.id for c in checks.all()}
    assert all(r["observed"] for r in rows)
