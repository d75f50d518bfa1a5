"""How often a run stalls while both servers are written: Dovecot's own TLS against the relay.

    python -m bench.pairsync_stalls [--runs 1500] [--users 3]

Both servers get mails and flags for the same users all the time. First as pairsync does it: the
daemons at work. Then without the daemons: on each server every user is synchronised again and
again over ``tcps:``, Dovecot's own TLS, with the same time limit. A run is stalled when dsync
sent nothing for that long. Measured on two busy cores: none in 1,545 runs over the relay, none in
1,533 over tcps (an earlier prototype saw 7 in some 1,500 over tcps).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from pairsync.doveadm import Doveadm
from rehearsal import image
from rehearsal.progress import Progress
from tests.pairsync.pair import Pair, Server

_LIMIT_SECONDS = 5
_PORT = 63302
_SHOWN = 10
_TLS = f"""\
ssl = yes
ssl_client_ca_file = /etc/pairsync/ca.pem
ssl_server_cert_file = /etc/pairsync/cert.pem
ssl_server_key_file = /etc/pairsync/key.pem
doveadm_password = invented-for-the-benchmark
service doveadm {{
  inet_listener tls {{
    port = {_PORT}
    ssl = yes
  }}
}}
"""


def write_both(pair: Pair, users: Sequence[str], done: Callable[[], bool]) -> None:
    """Mails and flags on both servers until ``done``."""
    stop = threading.Event()

    def write(server: Server, flag: str) -> None:
        count = 0
        clients = {user: server.imap(user) for user in users}
        for client in clients.values():
            client.select()
        while not stop.wait(0.1):
            user = users[count % len(users)]
            server.deliver(user, f"{user}-{server.name}-{time.monotonic_ns()}", size=2000)
            if count % 3 == 0:
                clients[user].noop()
                clients[user].store("1:*", "+FLAGS" if count % 2 else "-FLAGS", f"({flag})")
            count += 1

    threads = [
        threading.Thread(target=write, args=(server, flag))
        for server, flag in zip(pair.both, ("\\Flagged", "\\Answered"), strict=True)
    ]
    for thread in threads:
        thread.start()
    while not done():
        time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()


def with_relay(pair: Pair, users: Sequence[str], runs: int) -> Counter[str]:
    def count() -> Counter[str]:
        found: Counter[str] = Counter()
        for server in pair.both:
            found.update(server.status()["runs"])
        return found

    before = count()
    write_both(pair, users, lambda: sum((count() - before).values()) >= runs)
    return count() - before


def with_tcps(pair: Pair, users: Sequence[str], runs: int) -> Counter[str]:
    counted: Counter[str] = Counter()
    stop = threading.Event()

    async def one(doveadm: Doveadm, server: Server, user: str) -> None:
        state = ""
        while not stop.is_set():
            words = ["sync", *([] if state else ["-f"]), "-l", "30", "-T", str(_LIMIT_SECONDS)]
            began = time.monotonic()
            reply = await doveadm.run(user, *words, "-s", state, f"tcps:{server.peer}:{_PORT}")
            took = time.monotonic() - began
            if not reply.code:
                state = reply.values[0]
                counted["ok"] += 1
            elif reply.code == "CHANGED":
                counted["changed"] += 1
            else:
                state = ""
                counted["stalled" if took > _LIMIT_SECONDS - 0.5 else "failed"] += 1
                if counted["failed"] + counted["stalled"] <= _SHOWN:
                    print(f"{server.name} {user}: {took:.1f} s: {reply.log}", flush=True)
            await asyncio.sleep(0.05)

    async def every() -> None:
        async with asyncio.TaskGroup() as group:
            for server in pair.both:
                doveadm = Doveadm(server.path("/run/dovecot/pairsync"))
                for user in users:
                    group.create_task(one(doveadm, server, user))

    syncing = threading.Thread(target=lambda: asyncio.run(every()))
    syncing.start()
    write_both(pair, users, lambda: sum(counted.values()) >= runs)
    stop.set()
    syncing.join()
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1500)
    parser.add_argument("--users", type=int, default=3)
    parser.add_argument("--no-relay", dest="relay", action="store_false")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pairsync-bench-", dir="/var/tmp"))
    pair = Pair(image.ensure(Progress()).postfix, folder, 2 * arguments.users)
    try:
        pair.up()
        print(f"load: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        users = pair.fresh(arguments.users)
        if arguments.relay:
            print("relay:", dict(with_relay(pair, users, arguments.runs)), flush=True)
            pair.wait_equal(users, 30)
        for server in pair.both:
            server.kill_pairsync()
            text = server.path("/etc/dovecot/dovecot.conf").read_text()
            server.write("/etc/dovecot/dovecot.conf", text + _TLS)
            server.stop_dovecot()
            server.start_dovecot()
        users = pair.fresh(arguments.users)
        print("tcps: ", dict(with_tcps(pair, users, arguments.runs)), flush=True)
    finally:
        pair.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
