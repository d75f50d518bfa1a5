"""Users written on both servers at once, whose flags an incremental run may leave different.

dsync answers success for it. Seen with Dovecot 2.4.1: flags set on both servers on mails that were
just carried, 16 of some hundred mails different for good. A full run afterwards finds it, so such
users get one when they have rested, or when they do not come to rest. So do users one of whose runs
had broken off: Dovecot may repair a mailbox only while the next one is on (pairsync.repair).

Nothing here reads a clock: callers hand in the time (seconds, monotonic).
"""

from __future__ import annotations

_TOGETHER = 5.0
_REST = 1.0
_LONGEST = 8.0


class Unsettled:
    """Who needs a full run, and when."""

    def __init__(self) -> None:
        self._guests: dict[str, float] = {}
        self._since: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, user: str) -> bool:
        return user in self._since

    def guest(self, user: str, now: float) -> None:
        """A run of the peer's has ended."""
        self._guests[user] = now

    def ran(self, user: str, now: float, *, full: bool, changed: bool) -> None:
        """A run of ours has ended, and not failed.

        ``changed``: it saw changes meanwhile, or one before it had broken off.
        """
        if changed or (not full and self._guests.get(user, now - _TOGETHER) > now - _TOGETHER):
            self._since.setdefault(user, now)
            self._last[user] = now
        elif full:
            self._since.pop(user, None)
            self._last.pop(user, None)

    def forget(self, user: str) -> None:
        """The user is gone."""
        for times in (self._guests, self._since, self._last):
            times.pop(user, None)

    def due(self, now: float) -> list[str]:
        """Users that need a full run now."""
        for user in [u for u, at in self._guests.items() if at < now - _TOGETHER]:
            del self._guests[user]
        found = [
            user
            for user, since in self._since.items()
            if self._last[user] < now - _REST or since < now - _LONGEST
        ]
        for user in found:
            # Not again before this one has ended.
            self._since[user] = self._last[user] = now
        return found
