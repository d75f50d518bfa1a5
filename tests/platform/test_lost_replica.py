"""A replica loses its disk, and gets everything back from the other while mail comes in."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verify.context import Context, eventually, expect
from verify.imap import IMAPS
from verify.maildrop import (
    Contents,
    await_equal,
    direct,
    hand_over,
    mail_for,
    owners,
    replicas,
    through_the_mx,
)
from verify.smtp_in import members

MAILS = 200


@contextmanager
def mail_comes_in(context: Context, user: str) -> Iterator[list[str]]:
    """Mail through the MX, one after the other, all of it accepted; what tells each is listed."""
    tokens: list[str] = []
    over = threading.Event()
    failures: list[Exception] = []

    def send() -> None:
        try:
            # A server that stays below the limits of smtp-in.
            while not over.wait(60.0 / context.platform.inbound.limits.connection_rate * 1.2):
                tokens.append(through_the_mx(context, user).token)
        except Exception as error:  # told at the end, in the test's own thread
            failures.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield tokens
    finally:
        over.set()
        thread.join()
    assert not failures, failures
    assert tokens


def test_a_primary_with_an_empty_disk_is_filled_again(platform_up: Context) -> None:
    owner = owners(platform_up)[0]
    lost, other = replicas(platform_up)
    before = [mail_for(platform_up, owner) for _ in range(MAILS)]
    for mail in before:
        hand_over(platform_up, other, mail)
    tokens = [mail.token for mail in before]

    def complete(found: Contents) -> None:
        names = [name for _, name, _ in found.mails]
        for token in tokens:
            copies = sum(token in name for name in names)
            expect(copies == 1, f"{copies} copies of an accepted mail")

    await_equal(platform_up, owner, complete, time.monotonic() + 30)
    machine = platform_up.lab.machine(lost)
    with mail_comes_in(platform_up, owner.user) as more:
        machine.kill()
        (image,) = (Path(disk) for disk in machine.machine.disks.values())
        size = image.stat().st_size
        with image.open("r+b") as disk:
            disk.truncate(0)
            disk.truncate(size)
        platform_up.lab.replace(lost)
        fresh = platform_up.lab.machine(lost)
        eventually(
            lambda: direct(platform_up, lost).client.connect(
                platform_up.internal(lost)[0], IMAPS
            ).close(),
            seconds=60,
            what=f"{lost.name} to serve again",
        )  # fmt: skip
        said = fresh.run("pairsync", "refill").splitlines()
    assert said[-1] == "done"
    tokens += more

    def all_arrived() -> None:
        for member in members(platform_up):
            platform_up.lab.machine(member).hurry()
        missing = [token for token in more if not platform_up.lab.world.copies(token)]
        expect(not missing, f"{len(missing)} of {len(more)} mails are on their way")

    eventually(all_arrived, seconds=60, every=2.0)
    await_equal(platform_up, owner, complete, time.monotonic())
