r"""Anything at any time on both servers: they hold the same when it is over.

All clients take a step at the same time, and now and then a daemon is killed, the cable cut or, in
some, a server's plug pulled. Seeded; the environment asks for more:

    PAIRSYNC_SEEDS="$(seq -s' ' 20)" PAIRSYNC_OPERATIONS=1000 python -m pytest -k is_over \
        tests/pairsync/test_random.py

PAIRSYNC_EVIDENCE names a folder for the mailboxes and logs of both servers when something is wrong.
"""

from __future__ import annotations

import calendar
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from imaplib import IMAP4
from pathlib import Path
from smtplib import SMTPDataError, SMTPServerDisconnected
from typing import Any

import pytest

from tests.pairsync.conftest import running, tell
from tests.pairsync.pair import Pair, Server, wait_for

SEEDS = [int(seed) for seed in os.environ.get("PAIRSYNC_SEEDS", "1 2 3").split()]
OPERATIONS = int(os.environ.get("PAIRSYNC_OPERATIONS", "120"))
HEALED = 15.0
_CYCLE, _BEGIN, _HEAL = 6, 1, 4
"""In steps."""
_UNTOLD = 3.0
"""Within so many seconds a change is carried, also where something was broken a moment ago."""
_USERS = 4

Reply = tuple[str, list[Any]]
"""As imaplib gives it."""


@dataclass
class Journal:
    """What was done, in order: time, server, to which mail or folder."""

    rows: list[tuple[float, str, str, str]] = field(default_factory=list)

    def note(self, server: str, what: str, about: str = "") -> None:
        self.rows.append((time.time(), server[:1], what, about))

    def of(self, about: str) -> list[str]:
        """Lines about a mail, with everything that broke."""
        return [
            f"{at:.3f} {server} {what} {to}"
            for at, server, what, to in self.rows
            if to in ("", about)
        ]


class Mails:
    """Those of a user; each has one owner, who alone moves or deletes it.

    Where two clients move one mail on two servers at the same time, it is in two folders: nobody
    can say which of the two is meant.
    """

    def __init__(self) -> None:
        self.owned: dict[str, list[str]] = {"a": [], "b": []}
        self.deleted: set[str] = set()
        self.unsure: set[str] = set()
        """Whose client got no answer when it sent or deleted them."""
        self.half_moved: set[str] = set()
        """The same when it moved them: such a mail may be in both folders."""

    @property
    def kept(self) -> set[str]:
        return {tag for tags in self.owned.values() for tag in tags}


class Client:
    """Does things to one user on one server."""

    def __init__(
        self, server: Server, user: str, mails: Mails, chance: random.Random, journal: Journal
    ) -> None:
        self.server, self.user, self._all, self._chance = server, user, mails, chance
        self.own = server.name[0]
        self._journal = journal
        self._count = 0
        self._scripts: list[str] = []
        self._found = self._doing = self._moving = ""
        self.plugs = False

    @property
    def mails(self) -> list[str]:
        return self._all.owned[self.own]

    def step(self) -> None:
        steps: list[Callable[[], None]] = [
            *[self.deliver] * 4,
            *[self.flag] * 3,
            *[self.move] * 3,
            *(self.expunge, self.create, self.rename, self.delete, self.subscribe),
            *(self.put_script, self.delete_script),
        ]
        self._doing = self._moving = ""
        self._chance.choice(steps)()

    def step_or_log_in_again(self) -> None:
        """A client is told to log in again when its folder is taken away under it or repaired.

        And where plugs are pulled, to send its mail again when the storage is repaired. Nobody
        waits for long, also not for what a server left when it lost its power.
        """
        began = time.monotonic()
        try:
            self.step()
        except (IMAP4.abort, SMTPDataError, SMTPServerDisconnected) as error:
            if not (isinstance(error, IMAP4.abort) or self.plugs):
                raise
            if isinstance(error, SMTPDataError) and error.smtp_code // 100 != 4:
                raise
            self._journal.note(self.own, f"no answer: {error!r}", self._doing)
            if self._moving:
                self._all.half_moved.add(self._moving)
            if self._doing:
                self._all.unsure.add(self._doing)
                for tags in self._all.owned.values():
                    if self._doing in tags:
                        tags.remove(self._doing)
        waited = time.monotonic() - began
        assert waited < HEALED, f"{self.user} on {self.server.name} waited {waited:.0f} s"

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{self.own}{kind}{self._count}"

    def deliver(self) -> None:
        self._doing = tag = f"{self.user}-{self._name('')}"
        self.server.deliver(self.user, tag)
        self._journal.note(self.own, "delivered", tag)
        self._all.owned[self._chance.choice("ab")].append(tag)

    def _in(self, imap: IMAP4, folder: str, tag: str) -> list[bytes]:
        """Select a folder; the sequence numbers of a mail there."""
        if imap.select(folder)[0] != "OK":
            return []
        found: list[bytes] = imap.search(None, "HEADER", "MESSAGE-ID", f'"<{tag}@x>"')[1][0].split()
        return found

    def _find(self, imap: IMAP4, tag: str) -> str | None:
        """Select the folder that a mail is in; its sequence number there."""
        for folder in ("INBOX", *self._folders(imap)):
            if found := self._in(imap, folder, tag):
                self._found = folder
                uid = imap.fetch(found[0].decode(), "(UID)")[1]
                self._journal.note(self.own, f"found in {folder} {uid}", tag)
                return found[0].decode()
        return None

    def _is_twice(self, imap: IMAP4, tag: str) -> bool:
        """Whether a mail is there more than once.

        Who moves one while dsync gives it another UID has it so until that run has ended, some
        tenths of a second. Who is quick enough to move that copy as well has the mail twice, as
        pairsync/README.md says.
        """
        folders = ("INBOX", *self._folders(imap))
        return sum(len(self._in(imap, folder, tag)) for folder in folders) > 1

    def flag(self) -> None:
        with self.server.imap(self.user) as imap:
            if int(imap.select()[1][0] or 0):
                flag = self._chance.choice(["\\Seen", "\\Flagged", "\\Answered", "important"])
                sign = self._chance.choice("++-")
                which = self._chance.choice(["1", "*", "1:*"])
                imap.store(which, f"{sign}FLAGS", f"({flag})")

    def _folders(self, imap: IMAP4) -> list[str]:
        """Those that were made here, by the names that they have now."""
        rows = [row.decode().split()[-1] for row in imap.list()[1] if isinstance(row, bytes)]
        return sorted(name for name in rows if name.startswith(self.own))

    def _unless_gone(self, imap: IMAP4, folder: str, command: Callable[[], Reply]) -> str:
        """Do it until it is done or the folder is gone: one that is just being renamed is not
        there for a moment.
        """
        said = ""

        def is_done() -> bool:
            nonlocal said
            said = command()[0]
            return said == "OK" or folder not in self._folders(imap)

        wait_for(f"{folder} can be used or is gone", is_done)
        return said

    def move(self) -> None:
        with self.server.imap(self.user) as imap:
            folders = ["INBOX", *self._folders(imap)]
            if self.mails:
                tag = self._chance.choice(self.mails)
                folder = self._chance.choice(folders)
                if self._is_twice(imap, tag):
                    return
                number = self._find(imap, tag)
                if number and folder != self._found:
                    self._moving = tag
                    move = partial(imap.xatom, "MOVE", number, folder)
                    said = self._unless_gone(imap, folder, move)
                    self._journal.note(self.own, f"moved to {folder}: {said}", tag)

    def expunge(self) -> None:
        """Wherever it is: one that was moved while dsync gave it another UID is there twice until
        that run is over.
        """
        if self.mails:
            tag = self._chance.choice(self.mails)
            with self.server.imap(self.user) as imap:
                while number := self._find(imap, tag):
                    self._doing = tag
                    imap.store(number, "+FLAGS", "(\\Deleted)")
                    said = imap.expunge()
                    self._journal.note(self.own, f"expunged: {said}", tag)
                    if tag in self.mails:
                        self.mails.remove(tag)
                        self._all.deleted.add(tag)

    def create(self) -> None:
        with self.server.imap(self.user) as imap:
            name = self._name("folder")
            # Where dsync finds it half made it may be the one that makes it, or be in the way.
            wait_for(
                f"{name} is made",
                lambda: imap.create(name)[0] == "OK" or name in self._folders(imap),
            )

    def rename(self) -> None:
        with self.server.imap(self.user) as imap:
            folders = self._folders(imap)
            if folders:
                old = self._chance.choice(folders)
                new = self._name("renamed")
                said = self._unless_gone(imap, old, partial(imap.rename, old, new))
                self._journal.note(self.own, f"{self.user}: {old} renamed to {new}: {said}")

    def delete(self) -> None:
        """An empty folder, so that no mail goes with it."""
        with self.server.imap(self.user) as imap:
            for folder in self._folders(imap):
                if imap.select(folder)[1] == [b"0"]:
                    imap.close()
                    said = self._unless_gone(imap, folder, partial(imap.delete, folder))
                    self._journal.note(self.own, f"{self.user}: {folder} deleted: {said}")
                    return

    def subscribe(self) -> None:
        with self.server.imap(self.user) as imap:
            folders = self._folders(imap)
            if folders:
                how = self._chance.choice([imap.subscribe, imap.unsubscribe])
                how(self._chance.choice(folders))

    def put_script(self) -> None:
        name = self._chance.choice(self._scripts or [self._name("script")])
        self.server.put_script(self.user, name, f"keep; # {self._count}\n")
        if name not in self._scripts:
            self._scripts.append(name)

    def delete_script(self) -> None:
        if self._scripts:
            self.server.sieve(self.user, f'DELETESCRIPT "{self._scripts.pop()}"')


class Faults:
    """One thing at a time is broken for a while."""

    def __init__(self, pair: Pair, chance: random.Random, journal: Journal, *, plugs: bool) -> None:
        self._pair, self._chance, self._journal = pair, chance, journal
        self._kinds = [self._kill_daemon, self._cut, *[self._pull_plug] * plugs]
        self._heal: Callable[[], None] | None = None
        self.dead: Server | None = None

    def begin(self) -> None:
        self._chance.choice(self._kinds)()

    def heal(self) -> None:
        if self._heal is not None:
            self._heal()
            self._journal.note("-", "healed")
        self._heal = self.dead = None

    def _kill_daemon(self) -> None:
        server = self._chance.choice(self._pair.both)
        server.kill_pairsync()
        self._journal.note(server.name, "daemon killed")
        self._heal = server.start_pairsync

    def _cut(self) -> None:
        self._pair.a.cut()
        self._journal.note("-", "cut")
        self._heal = self._pair.a.heal

    def _pull_plug(self) -> None:
        server = self._chance.choice(self._pair.both)
        # The other one goes on; what this one has accepted must survive.
        self.dead = server
        server.pull_the_plug()
        self._journal.note(server.name, "plug pulled")

        def boot() -> None:
            server.boot()
            self._pair.connect_again()
            server.start_dovecot()
            server.start_pairsync()

        self._heal = boot


def places(server: Server, user: str) -> dict[str, list[str]]:
    """Tag of each mail -> where it is, with UID, GUID and flags."""
    found: dict[str, list[str]] = {}
    for folder, mails in server.contents(user)["folders"].items():
        for uid, guid, flags, message in mails:
            tag = message.strip("<>").removesuffix("@x")
            found.setdefault(tag, []).append(f"{folder} {uid} {guid} {flags}")
    return found


def repairs(server: Server, user: str) -> list[float]:
    """When Dovecot repaired a user's storage, in whole seconds."""
    log = server.path("/var/log/dovecot.log").read_text(errors="replace")
    lines = [x for x in log.splitlines() if f"({user})" in x and "rebuilding indexes" in x]
    year = time.gmtime().tm_year
    return [
        float(calendar.timegm(time.strptime(f"{year} {line[:15]}", "%Y %b %d %H:%M:%S")))
        for line in lines
    ]


def forgotten(pair: Pair, user: str, journal: Journal) -> set[str]:
    """Mails that a client moved or deleted right before Dovecot repaired the storage, or right
    after it.

    It begins its logs anew then. So neither server knows any more of a change that no run has
    carried yet, nor that two mails in a folder are one of which dsync made the other. Mostly this
    is after the server lost its power, and sometimes after a doveadm was killed at its work.

    Nor does a server know then that a mail in a folder, which was deleted on the other one, came
    from there: it keeps that in the inbox, also one that a client has just moved elsewhere.
    """
    found = set()
    for server in pair.both:
        repaired = repairs(server, user)
        mine = [row for row in journal.rows if row[1] == server.name[0]]
        pulled = [at for at, _, what, _ in mine if what == "plug pulled"]
        for at, _, what, tag in mine:
            if what.startswith(("moved", "expunged")) and (
                any(when - _UNTOLD < at < when + _UNTOLD for when in repaired)
                or any(
                    at < plug < at + _UNTOLD and any(plug < when + 1 for when in repaired)
                    for plug in pulled
                )
            ):
                found.add(tag)
        source: dict[str, str] = {}
        for at, _, what, tag in [row for row in journal.rows if row not in mine]:
            if what.startswith("found in "):
                source[tag] = what.split()[2]
            elif what.startswith("moved") and any(abs(when - at) < _UNTOLD for when in repaired):
                deleted = f"{user}: {source[tag]} deleted: OK"
                if any(later > at and said == deleted for later, _, said, _ in journal.rows):
                    found.add(tag)
    return found


def restored(pair: Pair, user: str, journal: Journal) -> set[str]:
    """Mails that were deleted before Dovecot repaired the storage of a server.

    It puts back what it finds in a storage and in no folder, such as one whose saving broke off
    before it came again (mdbox-storage-rebuild.c). It may be the only one, so it is kept.
    """
    last = max((at for server in pair.both for at in repairs(server, user)), default=0.0) + 1
    rows = journal.rows
    return {tag for at, _, what, tag in rows if what.startswith("expunged") and at < last}


@contextmanager
def kept(pair: Pair, users: Iterable[str], journal: Journal) -> Iterator[None]:
    """Keep what tells why, if it is wanted, when something is wrong."""
    try:
        yield
    except BaseException:
        if place := os.environ.get("PAIRSYNC_EVIDENCE"):
            Path(place).mkdir(parents=True, exist_ok=True)
            (Path(place) / "journal").write_text("\n".join(map(str, journal.rows)))
            for server in pair.both:
                folder = Path(place) / server.name
                for user in users:
                    homes = server.path(f"/var/dovecot/users/{user}/mdbox/mailboxes")
                    shutil.copytree(homes, folder / user, dirs_exist_ok=True)
                for log in ("dovecot.log", "pairsync.log"):
                    shutil.copy(server.path(f"/var/log/{log}"), folder)
                (folder / "processes").write_text(server.shell("ps -eo pid,lstart,wchan,args"))
                locks = server.path("/proc/locks").read_text()
                (folder / "locks").write_text(locks + server.shell("lsof -n || true"))
        raise


def evidence(pair: Pair, user: str, tags: Sequence[str], journal: Journal) -> str:
    """All that is known of mails that are not as they should be."""
    lines = []
    placed: list[Mapping[str, list[str]]] = [places(server, user) for server in pair.both]
    for tag in tags:
        lines += [f"--- {tag}", *journal.of(tag)]
        for server, found in zip(pair.both, placed, strict=True):
            lines.append(f"on {server.name}: {found.get(tag)}")
    return "\n".join(lines)


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """With few users: each new daemon has a full run for each of them."""
    with running(_USERS) as made:
        yield made
        if request.session.testsfailed:
            tell(made)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_hold_the_same_when_it_is_over(pair: Pair, seed: int) -> None:
    work(pair, seed, plugs=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_hold_the_same_when_plugs_were_pulled(pair: Pair, seed: int) -> None:
    """But for :func:`forgotten` moves and deletions, and for :func:`restored` mails."""
    work(pair, seed, plugs=True)


def work(pair: Pair, seed: int, *, plugs: bool) -> None:
    """Do it all, and see what is there in the end."""
    chance = random.Random(seed)
    journal = Journal()
    mails = {user: Mails() for user in pair.fresh(2)}
    for user in mails:
        # Where both make an inbox, one has to tell its clients to log in again.
        with pair.a.imap(user) as imap:
            imap.select()
    wait_for("a first run", lambda: all("INBOX" in pair.b.contents(u)["folders"] for u in mails))
    pair.wait_quiet()
    clients = [
        Client(server, user, mails[user], random.Random(f"{seed} {server.name} {user}"), journal)
        for server in pair.both
        for user in mails
    ]
    for client in clients:
        client.plugs = plugs
    faults = Faults(pair, chance, journal, plugs=plugs)
    with kept(pair, mails, journal):
        with ThreadPoolExecutor(len(clients)) as pool:
            for number in range(OPERATIONS // len(clients)):
                if number % _CYCLE == _BEGIN:
                    faults.begin()
                elif number % _CYCLE == _HEAL:
                    faults.heal()
                alive = [client for client in clients if client.server is not faults.dead]
                list(pool.map(Client.step_or_log_in_again, alive))
        faults.heal()
        limit = time.monotonic() + HEALED
        # Who is written on both servers gets one run more when he rests.
        pair.wait_quiet(HEALED)
        pair.wait_equal(list(mails), max(0.1, limit - time.monotonic()))
        for user, sent in mails.items():
            placed = places(pair.a, user)
            lost = sorted(sent.kept - set(placed))
            assert not lost, f"lost\n{evidence(pair, user, lost, journal)}"
            excused = forgotten(pair, user, journal)
            twice = {t for t, where in placed.items() if len(where) > 1 + (t in sent.half_moved)}
            surplus = {
                "twice": sorted(twice - excused),
                "deleted, and there again": sorted(
                    set(placed) - sent.kept - sent.unsure - excused - restored(pair, user, journal)
                ),
            }
            for what, tags in surplus.items():
                assert not tags, f"{what}\n{evidence(pair, user, tags, journal)}"
