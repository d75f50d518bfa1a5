"""A mailbox of 100,000 mails: a refill of the other server, and runs for one change.

    python -m bench.pairsync_big [--mails 100000] [--size 2000]

Two real Dovecots with pairsync on this machine (tests/pairsync/pair.py). The mails are imported
on one server while the other is cut off; what follows is as after a lost disk. Then single mails
and flags: from the answer to the change until the run that carried it has ended, as the daemon
counts it, without debounce. The first run after a full one lists every mail once more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from rehearsal import image
from rehearsal.progress import Progress
from tests.pairsync.pair import VMAIL, Pair, wait_for

_CHANGES = 10
_FOLDER = "imported"


def fill(pair: Pair, user: str, mails: int, size: int) -> float:
    """Import mails on A. Returns the seconds."""
    place = pair.a.path("/var/tmp") / "mbox"
    place.mkdir()
    with (place / _FOLDER).open("w") as stream:
        for number in range(mails):
            stream.write(
                f"From x@example.org Thu Jan  1 00:00:00 2026\nFrom: x@example.org\n"
                f"Subject: {number}\nMessage-ID: <{user}-{number}@x>\n\n{'x' * size}\n\n"
            )
    for path in (place, place / _FOLDER):
        os.chown(path, VMAIL, VMAIL)
    began = time.monotonic()
    for words in (
        ("import", "-u", user, "mbox:/var/tmp/mbox", "", "mailbox", _FOLDER),
        ("move", "-u", user, "INBOX", "mailbox", _FOLDER, "all"),
    ):
        subprocess.run(pair.a.words("doveadm", *words), check=True)
    shutil.rmtree(place)
    return time.monotonic() - began


def change(pair: Pair, user: str, kind: str) -> list[float]:
    """Seconds of the runs for some changes."""
    found = []
    for number in range(_CHANGES):
        pair.wait_quiet()
        time.sleep(1.1)  # The metrics are written once a second.
        before = pair.a.metric("run_seconds_total"), pair.a.status()["runs"]["ok"]
        if kind == "mail":
            pair.a.deliver(user, f"{user}-more-{number}")
        else:
            with pair.a.imap(user) as imap:
                imap.select()
                imap.store(str(number + 1), "+FLAGS", "(\\Flagged)")
        wait_for("a run", lambda n=before[1]: pair.a.status()["runs"]["ok"] > n, 60)  # type: ignore[misc]
        time.sleep(1.1)
        found.append(pair.a.metric("run_seconds_total") - before[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mails", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=2000)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pairsync-bench-", dir="/var/tmp"))
    pair = Pair(image.ensure(Progress()).postfix, folder, 2)
    try:
        pair.up()
        user = pair.users[0]
        pair.a.deliver(user, "first")
        pair.wait_equal([user])
        pair.a.cut()
        took = fill(pair, user, arguments.mails, arguments.size)
        print(f"imported {arguments.mails} mails in {took:.0f} s", flush=True)
        pair.a.heal()
        wait_for("the peer is there", lambda: pair.a.status()["peer"]["up"])
        began, load = time.monotonic(), os.getloadavg()[0]
        words = pair.a.words("pairsync", "refill")
        said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        took = time.monotonic() - began
        rate = arguments.mails / took
        print(f"refilled in {took:.0f} s, {rate:.0f} mails/s (load {load:.1f}); it said:")
        lines = said.splitlines()
        print("\n".join(lines[:: max(1, len(lines) // 5)]), flush=True)
        pair.wait_quiet(60)
        count = len(pair.b.tags(user))
        assert count == arguments.mails + 1, count
        for kind in ("mail", "flag"):
            first, *runs = change(pair, user, kind)
            runs.sort()
            print(
                f"a run for one {kind}: the first {first:.2f} s, the others p50 "
                f"{runs[len(runs) // 2]:.2f} s, max {runs[-1]:.2f} s"
            )
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    finally:
        pair.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
