"""The spam filter as its operator sees it: its hosts, and the memory that they share."""

from __future__ import annotations

from contextlib import suppress

from mailsite.model import Host, Role
from verify.context import Context, expect
from verify.redis import Redis, Refused

GTUBE = "XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
"""The test string that every spam filter refuses (SpamAssassin's, as EICAR's of virus scanners)."""


def filters(ctx: Context) -> tuple[Host, ...]:
    """The members of the filter."""
    return ctx.platform.members(Role.RSPAMD)


def redis(ctx: Context, member: Host, *, seen_from: Host | None = None) -> Redis:
    """A connection to a member's Redis with its password, from another member or itself.

    Raises:
        OSError: It does not answer.
        Failed: It does not take the password.
    """
    machine = ctx.lab.machine(seen_from or member)
    password = machine.run("sed", "-n", "s/^requirepass //p", "/etc/redis/auth.conf").strip()
    address = ctx.internal(member)[0]
    return Redis(machine.observer.client(), address, ctx.platform.spam.redis_port, password)


def writer(ctx: Context, among: tuple[Host, ...] | None = None) -> Host:
    """The member whose Redis takes writes.

    Raises:
        Failed: None does, or more than one.
    """
    found = []
    for member in among or filters(ctx):
        with suppress(OSError, Refused), redis(ctx, member) as connection:
            if connection.texts("ROLE")[:1] == ["master"]:
                found.append(member)
    expect(len(found) == 1, f"writers of the filter's memory: {_names(found) or 'none'}")
    return found[0]


def _names(hosts: list[Host]) -> str:
    return ", ".join(h.name for h in hosts)


def keys(connection: Redis, pattern: str, kind: str) -> set[str]:
    """All keys that match ``pattern`` and hold a ``kind``: ``string``, ``hash``, ..."""
    found: set[str] = set()
    cursor = "0"
    while True:
        answer = connection.call("SCAN", cursor, "MATCH", pattern, "COUNT", 1000, "TYPE", kind)
        assert isinstance(answer, list) and isinstance(answer[1], list)
        found |= {str(key) for key in answer[1]}
        cursor = str(answer[0])
        if cursor == "0":
            return found
