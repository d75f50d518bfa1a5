"""When each user's nightly full run is due: spread evenly over the hours of the night."""

from __future__ import annotations

import time
import zlib

from pairsync.config import PassConfig

_DAY = 86400


def last_slot(user: str, now: float, config: PassConfig) -> float:
    """The latest moment up to ``now`` (seconds since 1970) that was the user's in a night."""
    share = zlib.crc32(user.encode()) / 2**32
    local = time.localtime(now)
    midnight = int(now) - (local.tm_hour * 3600 + local.tm_min * 60 + local.tm_sec)
    slot = midnight + config.start_seconds + share * config.hours * 3600
    while slot > now:
        slot -= _DAY
    return slot
