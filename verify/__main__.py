"""Run the mail contract's checks: ``python -m verify --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mailsite.loader import SiteError, load_platform
from verify import runner
from verify.checks import checks
from verify.client import Observer
from verify.context import Context, Probe
from verify.lookup import Lookup
from verify.registry import Mode, SelectionError, Skipped
from verify.report import Report
from verify.stack import Stack, StackError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if nothing failed and something passed, 1 if not, 2 if misused."""
    options = parser().parse_args(arguments)
    try:
        report = verify(options)
    except (StackError, SiteError, SelectionError, Skipped) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    print(report.table(), end="")
    return 1 if report.failed else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m verify",
        description="Make the mail contract's checks on a platform, from outside.",
    )
    made.add_argument("--stack", default="prod", help="the platform's Pulumi stack (prod)")
    which = made.add_mutually_exclusive_group()
    which.add_argument("--live", action="store_true", help="the real platform, not the rehearsal")
    which.add_argument("--quick", action="store_true", help="in the rehearsal, what takes seconds")
    which.add_argument("--all", action="store_true", help="in the rehearsal, everything")
    made.add_argument(
        "--only", metavar="IDS", default="", help="just these, such as OUT-1,OUT-3 or EDGE"
    )
    made.add_argument("--list", action="store_true", help="list the checks and leave")
    made.add_argument(
        "--state", type=Path, default=Path(".rehearsal"), help="the rehearsal's state folder"
    )
    made.add_argument(
        "--probe-password-file",
        metavar="FILE",
        type=Path,
        help="live: file with the password of the site data's probe account",
    )
    return made


def verify(options: argparse.Namespace) -> Report:
    """Make the checks that the options ask for and write the report.

    Raises:
        StackError: The stack is not there, or not live.
        SiteError: Its site data is wrong.
        SelectionError: There is no such check.
        Skipped: No rehearsal is up.
    """
    mode = Mode.LIVE if options.live else Mode.ALL if options.all else Mode.QUICK
    only = expand(options.only, mode)
    chosen = checks.select(mode, only)
    if options.list:
        for check in chosen:
            print(f"{check.id:<9} {check.title}")
        sys.exit(0)
    stack = Stack.read(options.stack)
    context = live(stack, options) if options.live else rehearsal(stack, options.state)
    left_out = () if only else tuple(c for c in checks.all() if c not in chosen)
    reason = (
        "not for a live platform; the rehearsal makes it"
        if options.live
        else "not among the quick ones; run: make contract"
    )
    report = runner.run(
        chosen,
        context,
        left_out=left_out,
        reason=reason,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    report.write(options.state / ("report-live.json" if options.live else "report.json"))
    return report


def expand(text: str, mode: Mode = Mode.ALL) -> list[str]:
    """Ids from ``--only``: a section stands for all its checks that suit a run of ``mode``.

    Raises:
        SelectionError: There is no such check or section.
    """
    found: list[str] = []
    for word in text.replace(",", " ").split():
        section = [c.id for c in checks.all() if c.id.partition("-")[0] == word]
        if mode is Mode.LIVE:
            section = [i for i in section if checks[i].live]
        found += section or [checks[word].id]
    return found


def live(stack: Stack, options: argparse.Namespace) -> Context:
    """The real platform, seen from this machine."""
    stack.require_live()
    observer = Observer("this machine")
    platform = load_platform(stack.site)
    probe = None
    if platform.probe and options.probe_password_file:
        password = options.probe_password_file.read_text(encoding="utf-8").strip()
        probe = Probe(platform.probe.user, password, platform.probe.sender)
    return Context(
        platform=platform,
        site=stack.site,
        stack=stack.name,
        state=options.state,
        internet=observer,
        lookup=Lookup(observer.client()),
        given_probe=probe,
    )


def rehearsal(stack: Stack, state: Path) -> Context:
    """The platform in the rehearsal that is up on this machine.

    Raises:
        Skipped: None is.
    """
    from verify.lab import context  # needs what only a rehearsal has installed

    return context(stack, state)


if __name__ == "__main__":
    sys.exit(main())
