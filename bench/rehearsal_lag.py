"""The same as bench.pairsync_lag, on the two replicas of the rehearsal's platform.

    python -m bench.rehearsal_lag [--stack prod] [--users 20] [--rate 20] [--seconds 60]

The rehearsal must be up, and otherwise idle. The users are on both replicas for as long as it
takes: lines in the two files that Dovecot has of them, which the agent puts back. Mails are
delivered by LMTP to the socket that Postfix uses on the first; on the second one client per user
asks by IMAPS every 100 ms, from an observer in a site-local network. CPU is that of the whole
machine, in percent of one core.
"""

from __future__ import annotations

import argparse
import imaplib
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from secrets import token_hex

from bench.pairsync_lag import CHANGES, measure_changes, measure_mails
from mailsite.model import Host
from mailsite.roles.maildrop import HOMES, PASSWORDS, USERS
from rehearsal.machine import cgroups
from verify.__main__ import rehearsal
from verify.context import Context, each, eventually, expect
from verify.lab import LabMachine
from verify.maildrop import Owner, direct, replicas, status
from verify.registry import Failed, Skipped
from verify.stack import Stack, StackError

_SENDERS = 8
_DELIVER = """\
import smtplib, sys, time
for line in sys.stdin:
    user, tag, size = line.split()
    text = f"From: x@x.invalid\\r\\nSubject: {tag}\\r\\nMessage-ID: <{tag}@x.invalid>\\r\\n\\r\\n"
    with smtplib.LMTP("/var/spool/postfix/private/dovecot-lmtp") as client:
        refused = client.sendmail("x@x.invalid", [user], text + "x" * int(size) + "\\r\\n")
        accepted = time.monotonic()
    print(refused or accepted, flush=True)
"""


class Member:
    """A replica in the rehearsal. A context manager."""

    def __init__(self, context: Context, host: Host, password: str) -> None:
        self._context, self._host, self._password = context, host, password
        self._machine = context.lab.machine(host)
        self._door = direct(context, host)
        self._senders: queue.Queue[subprocess.Popen[str]] = queue.Queue()

    @property
    def name(self) -> str:
        return self._host.name

    def __enter__(self) -> Member:
        words = [*self._machine.machine.entrance(), "python3", "-c", _DELIVER]
        for _ in range(_SENDERS):
            self._senders.put(
                subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(_SENDERS):
            with self._senders.get() as sender:
                assert sender.stdin is not None
                sender.stdin.close()

    def imap(self, user: str) -> imaplib.IMAP4:
        return self._door.enter(self._context, Owner(user, self._password))

    def deliver(self, user: str, tag: str, size: int = 100) -> float:
        sender = self._senders.get()
        try:
            assert sender.stdin is not None
            assert sender.stdout is not None
            sender.stdin.write(f"{user} {tag} {size}\n")
            sender.stdin.flush()
            said = sender.stdout.readline().strip()
        finally:
            self._senders.put(sender)
        try:
            return float(said)  # all machines have one monotonic clock
        except ValueError:
            raise Failed(f"{self.name}: a mail for {user}: {said or 'no answer'}") from None

    def cpu_seconds(self) -> float:
        for group in cgroups(self.name):
            usage, stat = group / "cpuacct.usage", group / "cpu.stat"
            if usage.exists():
                return int(usage.read_text()) / 1e9
            fields = dict(x.split() for x in stat.read_text().splitlines()) if stat.exists() else {}
            if "usage_usec" in fields:
                return int(fields["usage_usec"]) / 1e6
        raise Failed(f"{self.name}: the kernel does not tell what CPU it uses")


@contextmanager
def users_for_now(context: Context, count: int, password: str) -> Iterator[list[str]]:
    """Users on both replicas."""
    names = [f"probe-{token_hex(4)}" for _ in range(count)]
    machines = [context.lab.machine(host) for host in replicas(context)]
    try:
        for machine in machines:
            for path, rest in ((USERS, ":::::::"), (PASSWORDS, f":{{PLAIN}}{password}")):
                lines = "".join(f"{name}{rest}\n" for name in names)
                machine.run("tee", "--append", "--", path, input=lines)
        yield names
    finally:
        each(machines, LabMachine.apply)
        for machine in machines:
            machine.run("rm", "-rf", "--", *(f"{HOMES}/{name}" for name in names))


def quiet(context: Context) -> None:
    """Both have carried what there was."""

    def look() -> None:
        for host in replicas(context):
            told = status(context, host)
            expect(told["peer"]["up"] and not told["dirty"], f"{host.name}: {told['dirty']} dirty")

    eventually(look, seconds=60, every=0.5)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stack", default="prod")
    parser.add_argument("--state", type=Path, default=Path(".rehearsal"))
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--rate", type=float, default=20.0, help="mails a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args(words)
    password = token_hex(8)
    try:
        context = rehearsal(Stack.read(options.stack), options.state)
        with ExitStack() as stack:
            users = stack.enter_context(users_for_now(context, options.users, password))
            first, second = (
                stack.enter_context(Member(context, host, password)) for host in replicas(context)
            )
            for user in users:
                with second.imap(user):
                    pass
            quiet(context)
            print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
            print(measure_mails(users, first, second, options.rate, options.seconds), flush=True)
            quiet(context)
            for change, name in CHANGES:
                print(measure_changes(users, second, first, change, name), flush=True)
    except (StackError, Failed, Skipped) as error:
        print(f"rehearsal_lag: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
