"""Whose turn it is: the queue of users, and per user one run at a time over both servers.

Nothing here waits or reads a clock: callers hand in the time (seconds, monotonic).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

_CAP = 10
"""A user who never rests gets a run after so many times the debounce."""
_LONGEST_REST, _AWAKE = 3.0, 2.0
"""A user who is to rest all the time gets a run after so many seconds; who was not told to for so
long has come to rest."""
_RETRY_FIRST = 0.2
_PUT_OFF = 0.5
_CHANGED_LIMIT = 5
"""After so many runs in a row with changes meanwhile, the next is a full one."""


class Outcome(enum.Enum):
    """How a run ended."""

    OK = "ok"
    CHANGED = "changed"
    """Somebody changed the mailbox meanwhile: run again at once."""
    BUSY = "busy"
    """The other server is at this user: try again shortly."""
    FAILED = "failed"
    STALLED = "stalled"
    UNKNOWN = "unknown"
    """The other server has no such user (yet)."""
    GONE = "gone"
    """This server has no such user any more."""
    PUT_OFF = "put off"
    """The peer or a Dovecot went away; says nothing about the user."""


FAILURES = frozenset({Outcome.FAILED, Outcome.STALLED, Outcome.UNKNOWN})


@dataclass(frozen=True)
class Job:
    """A run to be done."""

    user: str
    full: bool
    background: bool


@dataclass
class _Entry:
    due: float
    cap: float
    full: bool = False
    background: bool = False
    failures: int = 0
    changed: int = 0
    noticed: float = float("-inf")
    """Last notification."""

    @property
    def is_second_class(self) -> bool:
        return self.background or self.failures > 0


class Queue:
    """Users that are due for a run.

    At most ``parallel`` runs side by side; those of the background and those that failed before
    never take more than half of the places.
    """

    def __init__(self, parallel: int, debounce: float, retry_max: float) -> None:
        self._parallel = parallel
        self._behind = max(1, parallel // 2)
        self._debounce = debounce
        self._retry_max = retry_max
        self._waiting: dict[str, _Entry] = {}
        self._running: dict[str, _Entry] = {}
        self._held = True
        self._rests: dict[str, float] = {}
        self._restless: dict[str, tuple[float, float]] = {}
        """User -> when :meth:`rest` was called first since the last run, and last."""

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Users that wait, without those of the background."""
        return sum(not e.background for e in self._waiting.values())

    @property
    def background(self) -> int:
        return sum(e.background for e in (*self._waiting.values(), *self._running.values()))

    @property
    def failing(self) -> dict[str, int]:
        """Users whose last run failed -> failures in a row."""
        entries = {**self._waiting, **self._running}
        return {user: e.failures for user, e in entries.items() if e.failures}

    def has(self, user: str) -> bool:
        return user in self._waiting or user in self._running

    def notice(self, user: str, now: float, *, full: bool = False) -> None:
        """A user changed."""
        entry = self._waiting.get(user)
        if entry is None:
            entry = self._waiting[user] = _Entry(
                due=now + self._debounce, cap=now + _CAP * self._debounce
            )
        elif entry.background and not entry.failures:
            entry.cap = now + _CAP * self._debounce
            entry.due = now + self._debounce
        elif not entry.failures:
            entry.due = max(entry.due, min(entry.cap, now + self._debounce))
        entry.background = False
        entry.full |= full
        entry.noticed = now

    def add_background(self, user: str, now: float) -> None:
        """A full run for the user when there is room."""
        entry = self._waiting.get(user)
        if entry is None:
            self._waiting[user] = _Entry(due=now, cap=now, full=True, background=True)
        else:
            entry.full = True

    def settle(self, user: str, now: float) -> None:
        """A full run for the user, with the next that is due or else now."""
        self._waiting.setdefault(user, _Entry(due=now, cap=now)).full = True

    def ask(self, user: str, now: float) -> None:
        """A full run for the user as soon as possible."""
        entry = self._waiting.setdefault(user, _Entry(due=now, cap=now))
        entry.due, entry.full, entry.background, entry.failures = now, True, False, 0

    def rest(self, user: str, until: float, now: float) -> None:
        """Begin no run for the user before ``until``, unless there was none for too long."""
        first, last = self._restless.get(user, (now, now))
        if last < now - _AWAKE:
            first = now
        self._restless[user] = (first, now)
        if until <= first + _LONGEST_REST:
            self._rests[user] = until

    def rested(self, user: str) -> None:
        """A run for the user has ended well, the peer's or ours."""
        self._restless.pop(user, None)

    def rests(self, user: str, now: float) -> bool:
        """Whether no run may begin, the peer's neither."""
        if self._rests.get(user, now) > now:
            return True
        self._rests.pop(user, None)
        return False

    def hold(self) -> None:
        """Begin no run."""
        self._held = True

    def resume(self, now: float) -> None:
        """The peer is back: all that waited is due, as full runs (the background as it was)."""
        self._held = False
        for entry in self._waiting.values():
            if not entry.background:
                entry.due, entry.full, entry.failures = now, True, 0

    def take(self, now: float) -> Job | None:
        """The next run to begin, or None."""
        if self._held or len(self._running) >= self._parallel:
            return None
        behind = sum(e.is_second_class for e in self._running.values())
        ready = [
            (entry.is_second_class, entry.background, entry.due, user)
            for user, entry in self._waiting.items()
            if entry.due <= now
            and user not in self._running
            and not self.rests(user, now)
            and not (entry.is_second_class and behind >= self._behind)
        ]
        if not ready:
            return None
        user = min(ready)[-1]
        entry = self._waiting.pop(user)
        self._running[user] = entry
        if entry.noticed > now - self._debounce:
            # What was just notified of may not be done: this run may miss it.
            rest = entry.noticed + self._debounce
            self._waiting[user] = _Entry(due=rest, cap=rest, noticed=entry.noticed)
        return Job(user, entry.full, entry.background)

    def finish(self, user: str, outcome: Outcome, now: float) -> None:
        """The run that :meth:`take` gave has ended."""
        entry = self._running.pop(user)
        later = self._waiting.get(user)
        if outcome is Outcome.GONE:
            self._waiting.pop(user, None)
            return
        if outcome is Outcome.OK:
            self.rested(user)
            return
        again = replace(entry, noticed=later.noticed if later else float("-inf"))
        if outcome is Outcome.CHANGED:
            again.changed, again.failures = entry.changed + 1, 0
            again.full |= again.changed >= _CHANGED_LIMIT
            again.due = now + self._debounce
        elif outcome is Outcome.BUSY:
            again.due = now + _RETRY_FIRST
        elif outcome is Outcome.PUT_OFF:
            again.due, again.full = now + _PUT_OFF, True
        else:
            again.failures += 1
            again.full = True
            wait = _RETRY_FIRST * 2.0 ** min(again.failures - 1, 20)
            again.due = now + min(self._retry_max, wait)
        if later is not None:
            again.full |= later.full
            again.background &= later.background
        again.cap = again.due
        self._waiting[user] = again

    def next_due(self) -> float | None:
        """When :meth:`take` may have something again; None: not before something else happens."""
        if self._held or len(self._running) >= self._parallel:
            return None
        behind = sum(e.is_second_class for e in self._running.values())
        return min(
            (
                max(entry.due, self._rests.get(user, entry.due))
                for user, entry in self._waiting.items()
                if user not in self._running
                and not (entry.is_second_class and behind >= self._behind)
            ),
            default=None,
        )


@dataclass
class _Turn:
    own: bool = False
    """Ours waits for the peer's word, or runs."""
    runs: bool = False
    theirs: int = 0


class Turns:
    """Who may run for a user: this server or the other one, never both.

    Each asks the other for each run. Where both ask at the same time, the one with precedence
    goes first, and the other's request waits until that run is done.
    """

    def __init__(self, precedence: bool) -> None:
        self._precedence = precedence
        self._turns: dict[str, _Turn] = {}

    def begin(self, user: str) -> bool:
        """Whether a run of ours may ask the peer now; then :meth:`end` must follow."""
        turn = self._turns.setdefault(user, _Turn())
        if turn.theirs:
            return False
        turn.own = True
        return True

    def granted(self, user: str) -> None:
        """The peer has agreed: our run is on."""
        self._turns[user].runs = True

    def end(self, user: str) -> None:
        turn = self._turns[user]
        turn.own = turn.runs = False
        self._tidy(user)

    def admit(self, user: str) -> bool:
        """Whether the peer's run may begin now; then :meth:`leave` must follow."""
        turn = self._turns.setdefault(user, _Turn())
        if turn.runs or (turn.own and self._precedence) or turn.theirs:
            return False
        turn.theirs += 1
        return True

    def leave(self, user: str) -> None:
        self._turns[user].theirs -= 1
        self._tidy(user)

    def _tidy(self, user: str) -> None:
        turn = self._turns[user]
        if not turn.own and not turn.theirs:
            del self._turns[user]
