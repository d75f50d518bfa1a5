"""Many mail clients at once: none of them meets an error."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from secrets import token_hex

from rehearsal import network
from verify.context import Context, each, eventually, expect
from verify.maildrop import await_equal, direct, frontend_doors, owners, replicas

CONNECTIONS = 50
"""Of one user from one address: as many as Dovecot lets in (mail_max_userip_connections)."""
CLIENTS, SECONDS = 6, 60
"""On each replica."""
BACK = 0.05
"""So large a part of the folders may be there again: see docs/mailboxes.md."""


def test_one_user_has_fifty_connections_through_two_frontends(platform_up: Context) -> None:
    owner = owners(platform_up)[0]
    doors = frontend_doors(platform_up)
    two = [next(d for d in doors if d.name == f.name) for f in platform_up.frontends[:2]]
    client = two[0].client
    with ExitStack() as sessions:

        def enter(number: int) -> str:
            door = two[number % 2]
            here = type(door)(client, door.name, door.address)
            session = sessions.enter_context(here.enter(platform_up, owner))
            session.look_into("INBOX")
            return str(session.noop()[0])

        assert each(range(CONNECTIONS), enter, workers=10) == ["OK"] * CONNECTIONS


def test_a_mix_of_commands_on_both_replicas_meets_no_error(platform_up: Context) -> None:
    owner = owners(platform_up)[0]
    authorities = "\n".join(platform_up.platform.world.ca_certificates)
    place, prefix = "mail-obs-local", f"probe-mix-{token_hex(4)}"

    def mix(number: int) -> dict[str, dict[str, int] | list[str]]:
        plan = {
            "address": str(platform_up.internal(replicas(platform_up)[number])[0]),
            "name": platform_up.platform.names.imap,
            "user": owner.user,
            "password": owner.password,
            "ca": authorities,
            "clients": [number * CLIENTS + n for n in range(CLIENTS)],
            "seconds": SECONDS,
            "seed": 1,
            "prefix": prefix,
        }
        done = network.run_in(
            place,
            [sys.executable, str(Path(__file__).with_name("imap_mix.py"))],
            input=json.dumps(plan),
            timeout=SECONDS + 60,
        )
        told: dict[str, dict[str, int] | list[str]] = json.loads(done.stdout)
        return told

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(mix, (0, 1)))
    deleted = 0
    for told in results:
        assert told["errors"] == []
        commands = told["commands"]
        assert isinstance(commands, dict)
        assert {"append", "fetch", "move", "expunge", "idle", "rename"} <= commands.keys()
        deleted += commands["delete"]
    await_equal(platform_up, owner, lambda contents: None, time.monotonic())
    with direct(platform_up, replicas(platform_up)[0]).enter(platform_up, owner) as session:

        def all_gone() -> None:
            left = [f.name for f in session.folders() if f.name.startswith(prefix)]
            expect(len(left) <= BACK * deleted, f"of {deleted}, {left} are there again")

        eventually(all_gone, seconds=15)
