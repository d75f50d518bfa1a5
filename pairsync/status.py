"""What the daemon counts, and how it is shown: a document, a page for people, metrics."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pairsync.schedule import Outcome

_KEPT = 1000
_LAG_BOUNDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_WARN_SECONDS = 60.0


@dataclass
class Counts:
    """Since the daemon began. ``lag``: from a user's first change to the end of a good run."""

    runs: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    bytes: int = 0
    lags: Counter[float] = field(default_factory=Counter)
    lag_sum: float = 0.0
    lag_count: int = 0
    recent_lags: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    last_success: float = 0.0

    def run(self, outcome: Outcome, seconds: float, size: int, now: float) -> None:
        self.runs[outcome.value] += 1
        self.seconds += seconds
        self.bytes += size
        if outcome is Outcome.OK:
            self.last_success = now

    def lag(self, seconds: float) -> None:
        self.lag_sum += seconds
        self.lag_count += 1
        self.recent_lags.append(seconds)
        for bound in _LAG_BOUNDS:
            if seconds <= bound:
                self.lags[bound] += 1

    def percentile(self, share: float) -> float:
        """Of the last thousand lags, seconds."""
        ordered = sorted(self.recent_lags)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def problems(document: Mapping[str, Any]) -> list[str]:
    """What is wrong, for the operator."""
    found = []
    if not document["peer"]["up"]:
        found.append(f"peer away: {document['peer']['problem']}")
    if document["oldest"]["seconds"] > _WARN_SECONDS:
        oldest = document["oldest"]
        found.append(f"{oldest['user']} not synchronised for {oldest['seconds']:.0f} s")
    found += [
        f"{user}: {about['failures']} failed runs: {about['words']}"
        for user, about in sorted(document["failing"].items())
    ]
    found += document["problems"]
    return found


def page(document: Mapping[str, Any]) -> str:
    """The status for people."""
    peer, runs = document["peer"], document["runs"]
    lines = [
        f"{document['name']}, pairsync {document['version']}",
        f"peer     {peer['name']} {'up' if peer['up'] else 'AWAY'} since {peer['since']:.0f} s"
        + (f", {peer['round_trip'] * 1000:.1f} ms" if peer["up"] else ""),
        f"dirty    {document['dirty']} users, oldest {document['oldest']['seconds']:.1f} s"
        + (f" ({document['oldest']['user']})" if document["oldest"]["user"] else ""),
        f"running  {document['running']} here, {document['running_peer']} of the peer's",
        "runs     " + ", ".join(f"{count} {name}" for name, count in sorted(runs.items())),
        "lag      p50 {p50:.3f} s, p95 {p95:.3f} s, p99 {p99:.3f} s".format(**document["lag"]),
    ]
    if document["pass"]:
        lines.append("pass     {done} of {total} users ({reason})".format(**document["pass"]))
    lines += [f"PROBLEM  {problem}" for problem in problems(document)]
    return "\n".join(lines)


def metrics(document: Mapping[str, Any], counts: Counts) -> str:
    """The same for Prometheus (text format 0.0.4)."""
    lines: list[str] = []

    def add(name: str, kind: str, what: str, *rows: tuple[str, float]) -> None:
        full = f"pairsync_{name}"
        lines.append(f"# HELP {full} {what}")
        lines.append(f"# TYPE {full} {kind}")
        lines.extend(f"{full}{labels} {value:.10g}" for labels, value in rows)

    def one(name: str, what: str, value: float) -> None:
        add(name, "gauge", what, ("", value))

    def count(name: str, what: str, value: float) -> None:
        add(name, "counter", what, ("", value))

    one("peer_up", "Whether the peer answers heartbeats", document["peer"]["up"])
    one("peer_round_trip_seconds", "Of a heartbeat", document["peer"]["round_trip"])
    one("dirty_users", "Users with changes the peer may not have", document["dirty"])
    one("oldest_dirty_seconds", "Age of the oldest such change", document["oldest"]["seconds"])
    one("waiting_users", "Users in the queue", document["waiting"])
    one("background_users", "Users that wait for a full run in a pass", document["background"])
    one("unsettled_users", "Written on both servers, before a full run", document["unsettled"])
    one("running", "Runs that this server began and that are on", document["running"])
    one("running_of_peer", "Runs that the peer began and that are on", document["running_peer"])
    one("failing_users", "Users whose last run failed", len(document["failing"]))
    one("problems", "Lines of `pairsync status` that start with PROBLEM", len(problems(document)))
    one("markers_writable", "Whether changed users can be noted", document["markers_writable"])
    one("last_success_timestamp_seconds", "Of a run", counts.last_success)
    add(
        "runs_total",
        "counter",
        "Runs by how they ended",
        *((f'{{result="{o.value}"}}', counts.runs[o.value]) for o in Outcome),
    )
    count("run_seconds_total", "Time in runs", counts.seconds)
    count("run_bytes_total", "Bytes of dsync, both directions", counts.bytes)
    count("renumbered_total", "Mails that broken-off runs had left out", document["renumbered"])
    count("refused_total", "Connections of others than the peer", document["refused"])
    add(
        "lag_seconds",
        "histogram",
        "From a change to the end of a good run",
        *((f'_bucket{{le="{bound:g}"}}', counts.lags[bound]) for bound in _LAG_BOUNDS),
        ('_bucket{le="+Inf"}', counts.lag_count),
        ("_sum", counts.lag_sum),
        ("_count", counts.lag_count),
    )
    done = document["pass"] or {"done": 0, "total": 0}
    one("pass_users_done", "Of the pass over all users that is on", done["done"])
    one("pass_users_total", "Of the pass over all users that is on", done["total"])
    return "\n".join(lines) + "\n"
