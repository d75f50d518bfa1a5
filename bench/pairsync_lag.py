"""How long after a change on one server it is on the other, and what it costs.

    python -m bench.pairsync_lag [--users 20] [--all-users 5000] [--rate 20] [--seconds 60]

Two real Dovecots with pairsync on this machine (tests/pairsync/pair.py). Mails are delivered by
LMTP to one at a steady rate; on the other one IMAP client per user asks every 100 ms. The lag of a
mail is from the answer to its DATA until a client's answer shows it, so it has 0 to 100 ms of that
polling in it. Flags, moves and deletes go the other way: made by IMAP on the second, seen on
the first.

Compared with (research of 2026, two cores, polling every 100 ms): Dovecot 2.3's replicator and a
prototype. CPU is in percent of one core per server: Dovecot, pairsync and, on the reading server,
the polling clients' Dovecot processes.
"""

from __future__ import annotations

import argparse
import imaplib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from rehearsal import image
from rehearsal.progress import Progress
from tests.pairsync.pair import Pair

_POLL_SECONDS = 0.1
_SETTLE_SECONDS = 10.0
_BASELINE = """\
                                      p50    p95    p99    max    CPU a  CPU b
Dovecot 2.3 replicator, mails 20/s    0.15   0.23   0.28          83 %   81 %
Dovecot 2.3 replicator, flags         0.59
prototype, mails 20/s                 0.10   0.15   0.16   0.16   39 %   31 %
prototype, flags                      0.07   0.07
"""


Change = Callable[[imaplib.IMAP4, int, "Watcher"], Callable[[], float | None]]
"""Does something to a mail; what it returns tells when the watcher saw it."""


class Replica(Protocol):
    """One of the two servers."""

    @property
    def name(self) -> str: ...

    def imap(self, user: str) -> imaplib.IMAP4:
        """A client that is logged in."""

    def deliver(self, user: str, tag: str, size: int = 100) -> float:
        """One mail by LMTP, with the subject ``tag``; when it was accepted (time.monotonic)."""

    def cpu_seconds(self) -> float:
        """What all of its processes have used so far."""


class Watcher(threading.Thread):
    """Sees mails and flags of one user over IMAP."""

    def __init__(self, server: Replica, user: str, stop: threading.Event) -> None:
        super().__init__()
        self._server, self._user, self._stopped = server, user, stop
        self.mails: dict[str, float] = {}
        self.flags: dict[str, float] = {}
        self.gone: list[float] = []
        self.ready = threading.Event()

    def run(self) -> None:
        client = self._server.imap(self._user)
        client.select()
        known = int(client.response("EXISTS")[1][-1] or 0)
        self.ready.set()
        while not self._stopped.wait(_POLL_SECONDS):
            client.noop()
            now = time.monotonic()
            for line in client.response("FETCH")[1] or []:
                if isinstance(line, bytes) and (found := re.match(rb"(\d+) .*important", line)):
                    self.flags.setdefault(found[1].decode(), now)
            gone = [row for row in client.response("EXPUNGE")[1] or [] if row]
            self.gone += [now] * len(gone)
            known -= len(gone)
            exists = client.response("EXISTS")[1]
            count = int(exists[-1]) if exists and exists[-1] else known
            if count > known:
                self._look(client, known + 1, count, now)
                known = count
        client.logout()

    def _look(self, client: imaplib.IMAP4, first: int, last: int, now: float) -> None:
        _, rows = client.fetch(f"{first}:{last}", "(BODY.PEEK[HEADER.FIELDS (SUBJECT)])")
        for row in rows:
            if isinstance(row, tuple):
                self.mails.setdefault(row[1].decode().split(":", 1)[1].strip(), now)
        client.response("FETCH")


def row(name: str, lags: Sequence[float], missing: int, cpu: Sequence[float] = ()) -> str:
    ordered = sorted(lags)
    if not ordered:
        return f"{name:<36}  nothing arrived, {missing} missing"
    picked = [ordered[min(len(ordered) - 1, int(len(ordered) * p))] for p in (0.5, 0.95, 0.99)]
    values = "   ".join(f"{v:.2f}" for v in (*picked, ordered[-1]))
    costs = "".join(f"   {c:3.0f} %" for c in cpu)
    return f"{name:<36}  {values}{costs}   {len(lags)} seen, {missing} missing"


def measure_mails(
    users: Sequence[str], there: Replica, here: Replica, rate: float, seconds: float
) -> str:
    stop = threading.Event()
    watchers = {user: Watcher(here, user, stop) for user in users}
    for watcher in watchers.values():
        watcher.start()
    for watcher in watchers.values():
        watcher.ready.wait(30)
    accepted: dict[str, tuple[str, float]] = {}
    lock = threading.Lock()
    workers = min(len(users), max(2, round(rate / 4)))

    def deliver(number: int) -> None:
        """Every so manyth mail."""
        due, count = time.monotonic() + number / rate, number
        while due < end:
            time.sleep(max(0.0, due - time.monotonic()))
            user = users[count % len(users)]
            tag = f"{user}-{count}-{time.monotonic_ns()}"
            at = there.deliver(user, tag, size=3000)
            with lock:
                accepted[tag] = (user, at)
            count += workers
            due += workers / rate

    before = [server.cpu_seconds() for server in (there, here)]
    began = time.monotonic()
    end = began + seconds
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(deliver, range(workers)))  # raises what one of them raised
    took = time.monotonic() - began
    cpu = [
        (server.cpu_seconds() - was) / took * 100
        for server, was in zip((there, here), before, strict=True)
    ]
    limit = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < limit and any(
        tag not in watchers[user].mails for tag, (user, _) in accepted.items()
    ):
        time.sleep(_POLL_SECONDS)
    stop.set()
    for watcher in watchers.values():
        watcher.join()
    lags = [
        watchers[user].mails[tag] - at
        for tag, (user, at) in accepted.items()
        if tag in watchers[user].mails
    ]
    name = f"mails {len(accepted) / took:.1f}/s, {len(users)} users"
    return row(name, lags, len(accepted) - len(lags), cpu)


def flag(client: imaplib.IMAP4, number: int, watcher: Watcher) -> Callable[[], float | None]:
    client.store(str(number), "+FLAGS", "(important)")
    return lambda: watcher.flags.get(str(number))


def move(client: imaplib.IMAP4, number: int, watcher: Watcher) -> Callable[[], float | None]:
    before = len(watcher.gone)
    assert client.xatom("MOVE", "1", "Sent")[0] == "OK"
    return lambda: watcher.gone[before] if len(watcher.gone) > before else None


def delete(client: imaplib.IMAP4, number: int, watcher: Watcher) -> Callable[[], float | None]:
    before = len(watcher.gone)
    client.store("1", "+FLAGS", "(\\Deleted)")
    client.expunge()
    return lambda: watcher.gone[before] if len(watcher.gone) > before else None


CHANGES: Sequence[tuple[Change, str]] = ((flag, "flags"), (move, "moves"), (delete, "deletes"))


def measure_changes(
    users: Sequence[str], there: Replica, here: Replica, change: Change, name: str
) -> str:
    """One after the other, three for each user."""
    stop = threading.Event()
    lags, missing = [], 0
    for user in users:
        watcher = Watcher(here, user, stop)
        watcher.start()
        watcher.ready.wait(30)
        with there.imap(user) as client:
            client.create("Sent")
            client.select()
            for number in (1, 2, 3):
                seen = change(client, number, watcher)
                at = time.monotonic()
                while seen() is None and time.monotonic() < at + _SETTLE_SECONDS:
                    time.sleep(_POLL_SECONDS / 5)
                when = seen()
                if when is None:
                    missing += 1
                else:
                    lags.append(when - at)
        stop.set()
        watcher.join()
        stop.clear()
    return row(name, lags, missing)


def idle(pair: Pair, seconds: float = 10.0) -> None:
    """What a daemon takes while nothing happens."""
    for server in pair.both:
        proc = server.path(f"/proc/{server.pairsync_pid()}")
        status = (proc / "status").read_text()
        peak = next(line.split()[1] for line in status.splitlines() if "VmRSS" in line)
        ticks = [_ticks(proc / "stat")]
        time.sleep(seconds / 2)
        ticks.append(_ticks(proc / "stat"))
        cpu = (ticks[1] - ticks[0]) / os.sysconf("SC_CLK_TCK") / (seconds / 2) * 100
        print(f"{server.name}: the daemon has {int(peak) // 1024} MiB and takes {cpu:.1f} % idle")


def _ticks(path: Path) -> int:
    return sum(int(f) for f in path.read_text().rpartition(")")[2].split()[11:13])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--all-users", type=int, default=0, help="of which --users are busy")
    parser.add_argument("--rate", type=float, nargs="*", default=[1.0, 5.0, 20.0])
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pairsync-bench-", dir="/var/tmp"))
    everybody = max(arguments.users, arguments.all_users)
    pair = Pair(image.ensure(Progress()).postfix, folder, everybody)
    try:
        began = time.monotonic()
        pair.up(timeout=1200)
        print(f"up, with a first full run for {everybody} users: {time.monotonic() - began:.0f} s")
        idle(pair)
        pair.users = pair.users[: arguments.users]
        print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print(_BASELINE, end="", flush=True)
        for rate in arguments.rate:
            print(measure_mails(pair.users, pair.a, pair.b, rate, arguments.seconds), flush=True)
            print("    as the daemon counts it, to the end of the run:", pair.a.status()["lag"])
        pair.wait_quiet(60)
        for change, name in CHANGES:
            print(measure_changes(pair.users, pair.b, pair.a, change, name), flush=True)
        for server in pair.both:
            print(server.name, server.status()["runs"])
    finally:
        pair.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
