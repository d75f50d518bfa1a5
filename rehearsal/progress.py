"""Tell the operator what is being done, what is being waited for, and for how long.

Output goes to standard error, one line per event, so that it can be piped and logged::

    [   0.4 s] image layer mail: installing packages ...
    [  15.4 s] image layer mail: installing packages ... (15 s)
    [  41.0 s] image layer mail: installing packages: done (40.6 s)
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

T = TypeVar("T")

_HEARTBEAT = 15.0
_QUIET_BELOW = 1.0


class RehearsalError(Exception):
    """Something the operator has to know: what is wrong, and what to do about it.

    ``remedy`` is one sentence in the imperative, without a final full stop.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}\n  remedy: {remedy}" if remedy else message)
        self.message = message
        self.remedy = remedy


class Progress:
    """Prints timed lines; safe to use from several threads."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        quiet: bool = False,
        started: float | None = None,
    ) -> None:
        """``started`` is :attr:`started` of the command that this process is a part of."""
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self.started = time.monotonic() if started is None else started
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Print one line with the time since the start of the command."""
        if self._quiet:
            return
        with self._lock:
            self._stream.write(f"[{time.monotonic() - self.started:7.1f} s] {text}\n")
            self._stream.flush()

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Announce ``what``, repeat it while it lasts, and print how long it took."""
        self.say(f"{what} ...")
        began = time.monotonic()
        over = threading.Event()

        def remind() -> None:
            while not over.wait(_HEARTBEAT):
                self.say(f"{what} ... ({time.monotonic() - began:.0f} s)")

        reminder = threading.Thread(target=remind, daemon=True)
        reminder.start()
        try:
            yield
        except BaseException:
            self.say(f"{what}: failed after {time.monotonic() - began:.1f} s")
            raise
        else:
            took = time.monotonic() - began
            if took >= _QUIET_BELOW:
                self.say(f"{what}: done ({took:.1f} s)")
        finally:
            over.set()
            reminder.join()


def wait_for(
    condition: Callable[[], T | None],
    *,
    timeout: float,
    what: str,
    remedy: str = "",
    interval: float = 0.05,
) -> T:
    """Poll ``condition`` until it returns something true, and return that.

    Raises :class:`RehearsalError` naming ``what`` after ``timeout`` seconds. ``interval`` is the
    pause between two tries in seconds; it grows to ten times that for a slow condition.
    """
    deadline = time.monotonic() + timeout
    pause = interval
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() >= deadline:
            raise RehearsalError(f"waited {timeout:g} s in vain for {what}", remedy)
        time.sleep(pause)
        pause = min(pause * 1.2, interval * 10)
