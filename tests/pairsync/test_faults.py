"""Whatever breaks: nothing is lost, nothing is there twice, and it heals without a hand.

"Within 15 seconds" counts from when the cause is gone.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from pairsync import history
from pairsync.doveadm import Doveadm, guid_of
from pairsync.history import Life
from pairsync.repair import Mailbox, Plan, look, mend
from pairsync.state import States
from tests.index_logs import FLAGS, record
from tests.pairsync.pair import SECRET, VMAIL, Pair, Server, wait_for

HEALED = 15.0


class Stream:
    """Mail to users on some servers, a number of them a second, until it is closed.

    ``sent`` are the tags of what was accepted, by user.
    """

    def __init__(self, servers: Sequence[Server], users: Sequence[str], rate: float) -> None:
        self.sent: dict[str, list[str]] = {user: [] for user in users}
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._deliver, args=(server, list(users), rate, number))
            for number, server in enumerate(servers)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _deliver(self, server: Server, users: list[str], rate: float, number: int) -> None:
        count = 0
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            user = users[count % len(users)]
            tag = f"{user}-{number}-{count}-{time.monotonic_ns()}"
            count += 1
            due += 1 / rate
            server.deliver(user, tag)
            self.sent[user].append(tag)


@contextmanager
def stream(servers: Sequence[Server], users: Sequence[str], rate: float) -> Iterator[Stream]:
    flow = Stream(servers, users, rate)
    try:
        yield flow
    finally:
        flow.close()


def assert_all_there(pair: Pair, sent: dict[str, list[str]], timeout: float = HEALED) -> None:
    """Both hold the same, and of each accepted mail exactly one."""
    limit = time.monotonic() + timeout
    for user, tags in sent.items():
        pair.wait_equal([user], max(0.1, limit - time.monotonic()))
        assert pair.a.tags(user) == sorted(tags), user


def flag_all(server: Server, user: str, flag: str) -> None:
    with server.imap(user) as imap:
        imap.select()
        assert imap.store("1:*", "+FLAGS", f"({flag})")[0] == "OK"


def until_dirty(server: Server, user: str) -> None:
    wait_for(f"{user} is dirty on {server.name}", lambda: server.status()["dirty"] > 0)


def test_both_are_written_while_they_cannot_reach_each_other(pair: Pair) -> None:
    users = pair.fresh(5)
    for user in users:
        pair.a.deliver(user, f"{user}-first")
        pair.a.deliver(user, f"{user}-second")
    pair.wait_equal(users, 5)
    pair.wait_quiet()
    pair.a.cut()
    with stream(pair.both, users, 5) as flow:
        for server in pair.both:
            wait_for("the cut is noticed", lambda s=server: not s.status()["peer"]["up"])  # type: ignore[misc]
            assert server.metric("peer_up") in (0, 1)
        for user in users:
            with pair.a.imap(user) as imap:
                imap.select()
                imap.store("1", "+FLAGS", "(\\Flagged important)")
            with pair.b.imap(user) as imap:
                imap.select()
                imap.store("1", "+FLAGS", "(\\Seen)")
                imap.store("2", "+FLAGS", "(\\Deleted)")
                imap.expunge()
                imap.create("Fresh")
        time.sleep(3)
    for server in pair.both:
        wait_for("it is visible", lambda s=server: s.metric("oldest_dirty_seconds") > 2)  # type: ignore[misc]
        assert server.metric("peer_up") == 0
    pair.a.heal()
    expected = {user: [*flow.sent[user], f"{user}-first"] for user in users}
    assert_all_there(pair, expected)
    for user in users:
        found = pair.a.contents(user)["folders"]
        assert "Fresh" in found
        first = next(m for m in found["INBOX"] if f"{user}-first" in m[3])
        assert first[2] == "\\Flagged \\Seen important"


def test_mail_for_a_folder_that_was_deleted_there_meanwhile_goes_to_the_inbox(pair: Pair) -> None:
    (user,) = pair.fresh(1)
    with pair.a.imap(user) as imap:
        imap.create("Brief")
        imap.append("Brief", "", "", b"Message-ID: <had@x>\r\n\r\n")
    pair.wait_equal([user])
    pair.wait_quiet()
    pair.a.cut()
    try:
        with pair.b.imap(user) as imap:
            assert imap.append("Brief", "", "", b"Message-ID: <unseen@x>\r\n\r\n")[0] == "OK"
        with pair.a.imap(user) as imap:
            assert imap.delete("Brief")[0] == "OK"
    finally:
        pair.a.heal()
    wait_for("it is known there", lambda: "Brief" not in pair.b.contents(user)["folders"])
    pair.wait_equal([user])
    found = pair.a.contents(user)["folders"]
    assert "Brief" not in found
    assert [message for *_, message in found["INBOX"]] == ["<unseen@x>"]


def test_the_plug_of_one_is_pulled(pair: Pair) -> None:
    users = pair.fresh(4)
    with stream([pair.a], users, 10) as flow:
        time.sleep(1)
        pair.b.pull_the_plug()
        wait_for("it is noticed", lambda: not pair.a.status()["peer"]["up"])
    pair.b.boot()
    pair.connect_again()
    pair.b.start_pairsync()
    pair.b.start_dovecot()
    assert_all_there(pair, flow.sent)
    pair.wait_up()


def test_a_run_that_stalls_holds_nobody_else_up(pair: Pair) -> None:
    stuck, *others = pair.fresh(5)
    pair.a.deliver(stuck, f"{stuck}-0")
    pair.wait_equal([stuck], 5)
    before = pair.a.status()["runs"]["stalled"]
    with stopped_run(pair, stuck):
        wait_for("it is counted", lambda: pair.a.status()["runs"]["stalled"] > before, 20)
        assert stuck in pair.a.status()["failing"]
        for user in others:
            pair.a.deliver(user, f"{user}-meanwhile")
        pair.wait_equal(others, 5)
    pair.wait_equal([stuck], HEALED)
    wait_for("no more failing", lambda: not pair.a.status()["failing"])


def test_a_full_run_that_stalls_ends_soon_where_there_is_little_to_read(
    pair: Pair, user: str
) -> None:
    pair.a.deliver(user, f"{user}-0")
    pair.wait_equal([user], 5)
    assert pair.a.run("pairsync", "sync", user).startswith(f"{user}: ok, ")
    before = pair.a.status()["runs"]["stalled"]
    stopped = _processes(pair.b, "doveadm-server")
    with ThreadPoolExecutor(1) as pool:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            asked = pool.submit(pair.a.run, "pairsync", "sync", user, check=False)
            wait_for("it ends", lambda: pair.a.status()["runs"]["stalled"] > before, HEALED)
            assert "stalled" in asked.result()
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
    pair.a.deliver(user, f"{user}-1")
    assert_all_there(pair, {user: [f"{user}-0", f"{user}-1"]})


@contextmanager
def stopped_run(pair: Pair, user: str) -> Iterator[None]:
    """Stop B's dsync in the midst of a run of A's for the user."""
    stop = threading.Event()
    caught: list[int] = []

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            pair.a.deliver(user, f"{user}-{number}", size=50_000)

    busy = threading.Thread(target=change)
    busy.start()
    try:
        wait_for("a run to stop", lambda: _stop_one(pair, user, caught), 20)
    finally:
        stop.set()
        busy.join()
    try:
        yield
    finally:
        for pid in caught:
            os.kill(pid, signal.SIGCONT)


def _stop_one(pair: Pair, user: str, caught: list[int]) -> bool:
    """Stop a doveadm process of B's that has a file of the user's open, if that stops the run."""
    for pid in _processes(pair.b, "doveadm-server"):
        links = Path(f"/proc/{pid}/fd")
        try:
            files = [str(link.readlink()) for link in links.iterdir()]
        except OSError:
            continue
        if any(f"/users/{user}/" in file for file in files):
            os.kill(pid, signal.SIGSTOP)
            files = [str(link.readlink()) for link in links.iterdir()]
            if any(f"/users/{user}/" in file for file in files) and _no_run_ends(pair.a):
                caught.append(pid)
                return True
            os.kill(pid, signal.SIGCONT)
    return False


def _no_run_ends(server: Server) -> bool:
    """Whether no run ends well for a second; the process may have been done with its own."""
    before = server.status()["runs"]["ok"]
    limit = time.monotonic() + 1.0
    while time.monotonic() < limit:
        if server.status()["runs"]["ok"] > before:
            return False
        time.sleep(0.02)
    return True


def _processes(server: Server, name: str) -> list[int]:
    """Processes of a server by a part of their name, numbered as here."""
    found = []
    todo = [server.pid]
    while todo:
        pid = todo.pop()
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        todo += [int(child) for child in children]
        if name.encode() in words:
            found.append(pid)
    return found


def broken(
    pair: Pair,
    user: str,
    breaks: Callable[[], None],
    mends: Callable[[], None],
    words: str,
    b_tells: Callable[[], bool] = lambda: True,
) -> None:
    """Break something of B's, see that both tell, mend it, see that all is carried."""
    pair.b.kill_pairsync(signal.SIGTERM)
    breaks()
    pair.b.start_pairsync()
    wait_for(words, lambda: words in pair.a.status()["peer"]["problem"])
    wait_for("it is measured", lambda: pair.a.metric("peer_up") == 0)
    wait_for("it is measured there too", b_tells)
    for server in pair.both:
        server.deliver(user, f"{user}-{server.name}")
    until_dirty(pair.a, user)
    mends()
    assert_all_there(pair, {user: [f"{user}-{server.name}" for server in pair.both]})


def test_a_certificate_for_another_name_is_refused(pair: Pair, user: str) -> None:
    broken(
        pair,
        user,
        lambda: pair.certify(pair.b, "c.pair.example"),
        lambda: pair.certify(pair.b),
        "certificate refused: Hostname mismatch",
    )


def test_another_secret_is_refused(pair: Pair, user: str) -> None:
    def secret(text: str) -> None:
        pair.b.write("/etc/pairsync/secret", text, VMAIL, 0o400)

    broken(
        pair,
        user,
        lambda: secret("another-" + SECRET),
        lambda: secret(SECRET),
        "wrong secret",
        lambda: pair.b.metric("refused_total") > 0,
    )


def test_a_dovecot_that_is_down_is_awaited(pair: Pair, user: str) -> None:
    for down, other in ((pair.a, pair.b), (pair.b, pair.a)):
        down.stop_dovecot()
        tag = f"{user}-{down.name}"
        other.deliver(user, tag)
        wait_for(
            "it is visible",
            lambda o=other: "Dovecot" in str(o.status()["failing"]) and o.metric("problems") > 0,  # type: ignore[misc]
        )
        down.start_dovecot()
        pair.wait_equal([user])
        assert tag in down.tags(user)


def test_both_are_hot_with_the_same_users(pair: Pair) -> None:
    users = pair.fresh(3)
    before = [server.status()["runs"]["stalled"] for server in pair.both]
    with stream(pair.both, users, 10) as flow:
        wait_for("mails", lambda: all(flow.sent.values()))
        for _ in range(5):
            for user in users:
                for server, flag in zip(pair.both, ("\\Flagged", "\\Answered"), strict=True):
                    flag_all(server, user, flag)
            time.sleep(0.3)
    assert_all_there(pair, flow.sent)
    assert [server.status()["runs"]["stalled"] for server in pair.both] == before


def test_the_daemon_is_killed_at_any_moment(pair: Pair) -> None:
    chance = random.Random(5)
    users = pair.fresh(4)
    with stream(pair.both, users, 8) as flow:
        for number in range(6):
            time.sleep(chance.uniform(0.1, 0.6))
            server = pair.both[number % 2]
            server.kill_pairsync()
            time.sleep(chance.uniform(0.0, 0.3))
            server.start_pairsync()
    assert_all_there(pair, flow.sent)


def test_runs_that_break_off_lose_no_mail(pair: Pair) -> None:
    """dsync keeps what it has of such a run, and takes what is missing for deleted."""
    chance = random.Random(7)
    users = pair.fresh(6)
    sent: dict[str, list[str]] = {user: [] for user in users}
    for number in range(4):
        with stream(pair.both, users, 20) as flow:
            for _ in range(2):
                time.sleep(chance.uniform(0.1, 0.5))
                server = pair.both[number % 2]
                server.kill_pairsync()
                server.start_pairsync()
        for user, tags in flow.sent.items():
            sent[user] += tags
    assert_all_there(pair, sent)


@contextmanager
def not_synchronised(pair: Pair, order: Sequence[int] = (0, 1)) -> Iterator[None]:
    """Daemons are dead for a while, those of the servers with these numbers, and are back in this
    order.
    """
    servers = [pair.both[number] for number in order]
    for server in servers:
        server.kill_pairsync()
    try:
        yield
    finally:
        for server in servers:
            server.start_pairsync()


def make_again(server: Server, user: str, old: str, new: str) -> None:
    """Make the earlier name of a folder with its GUID, as dsync does."""
    status = f"doveadm mailbox status -u {user} guid -- {new}"
    guid = server.shell(f"{status} | sed 's/.*=//'").strip()
    server.shell(f"doveadm mailbox create -u {user} -- {old}")
    server.shell(f"doveadm mailbox update -u {user} -g {guid} -- {old}")


@pytest.mark.parametrize(("first", "old", "new"), [(0, "old", "new"), (1, "-x", "--new")])
def test_what_comes_under_a_name_that_dsync_just_gave_back_stays_when_mails_are_compared(
    pair: Pair, user: str, first: int, old: str, new: str
) -> None:
    """Until dsync begins anew both folders have one GUID. In the renamed one a mail of the same UID
    was taken away before.
    """
    for tag in ("before", "after"):
        pair.b.deliver(user, tag)
    with pair.b.imap(user) as imap:
        imap.select()
        assert (imap.create(old)[0], imap.xatom("MOVE", "1", old)[0]) == ("OK", "OK")
        imap.select(old)
        imap.store("1", "+FLAGS", "(\\Deleted)")
        assert imap.expunge() == ("OK", [b"1"])
    pair.wait_equal([user], 5)
    with not_synchronised(pair, (first, 1 - first)), pair.b.imap(user) as imap:
        imap.select()
        assert imap.rename(old, new)[0] == "OK"
        make_again(pair.b, user, old, new)
        assert imap.xatom("MOVE", "1", old)[0] == "OK"
    assert_all_there(pair, {user: ["after"]})
    folders = pair.b.contents(user)["folders"]
    assert (len(folders[new]), old in folders) == (1, False)


def next_second() -> None:
    """A folder's log knows in whole seconds when it was begun."""
    now = int(time.time())
    wait_for("the next second but one", lambda: time.time() >= now + 2)


@pytest.mark.parametrize("dead", [(0, 1), (0,)], ids=["both-learned-at-once", "one-by-one"])
def test_who_renames_what_dsync_just_gave_back_has_the_folder_once(
    pair: Pair, user: str, dead: Sequence[int]
) -> None:
    """He saw it under its earlier name once more. dsync has made it with the folder's GUID."""
    for tag in ("before", "after"):
        pair.b.deliver(user, tag)
    with pair.b.imap(user) as imap:
        imap.select()
        assert (imap.create("old")[0], imap.xatom("MOVE", "1", "old")[0]) == ("OK", "OK")
    pair.wait_equal([user], 5)
    next_second()
    news = pair.b.path("/var/lib/pairsync/dirty")
    with not_synchronised(pair, dead), pair.b.imap(user) as imap:
        imap.select()
        assert imap.rename("old", "new")[0] == "OK"
        if 1 not in dead:
            wait_for("the rename is learned", lambda: not list(news.glob("!*")))
        make_again(pair.b, user, "old", "new")
        next_second()
        assert imap.rename("old", "newest")[0] == "OK"
        assert imap.xatom("MOVE", "1", "newest")[0] == "OK"
    assert_all_there(pair, {user: ["before", "after"]})
    folders = pair.b.contents(user)["folders"]
    assert {"old", "new", "newest"} & set(folders) == {"newest"}
    assert len(folders["newest"]) == 2


def test_what_dovecot_puts_back_while_mails_are_compared_goes_again(pair: Pair, user: str) -> None:
    """Its storage is found broken by a crash when a mail is deleted. It has a mail of which the
    folder's index was not written, and which was moved on the other server.
    """
    mdbox = pair.b.path(f"/var/dovecot/users/{user}/mdbox")
    index, before = mdbox / "mailboxes/INBOX/dbox-Mails", mdbox / "before"
    pair.a.deliver(user, "deleted")
    pair.wait_equal([user], 5)
    pair.b.shell(f"cd /var/dovecot/users/{user}/mdbox && cp -a mailboxes/INBOX/dbox-Mails before")
    pair.a.deliver(user, "moved")
    pair.wait_equal([user], 5)
    with not_synchronised(pair):
        shutil.rmtree(index)
        before.rename(index)
        pair.b.deliver(user, "new")
        with pair.a.imap(user) as imap:
            imap.select()
            assert (imap.create("x")[0], imap.xatom("MOVE", "2", "x")[0]) == ("OK", "OK")
            imap.store("1", "+FLAGS", "(\\Deleted)")
            assert imap.expunge()[1][-1] == b"1"
        with (mdbox / "storage/dovecot.map.index.log").open("ab") as log:
            log.write(record(FLAGS, struct.pack("<II4x", 1, 1)))  # the index has it not
    assert_all_there(pair, {user: ["moved", "new"]})
    assert len(pair.a.contents(user)["folders"]["x"]) == 1
    log = pair.b.path("/var/log/dovecot.log").read_text()
    assert re.search(rf"\({user}\).* rebuilding indexes", log)


def test_a_change_outlives_a_killed_daemon(pair: Pair, user: str) -> None:
    pair.a.kill_pairsync()
    pair.a.deliver(user, f"{user}-meanwhile")
    assert pair.a.path(f"/var/lib/pairsync/dirty/{user}").exists()
    pair.a.start_pairsync()
    assert_all_there(pair, {user: [f"{user}-meanwhile"]})
    pair.wait_quiet()
    assert not list(pair.a.path("/var/lib/pairsync/dirty").iterdir())


@contextmanager
def full_disk(server: Server, folder: str) -> Iterator[None]:
    """A folder in which no file can be made."""
    server.run("mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=1,mode=0777", "full", folder)
    try:
        yield
    finally:
        server.run("umount", folder)


def test_a_full_disk_of_markers_keeps_no_mail_out(pair: Pair, user: str) -> None:
    with full_disk(pair.a, "/var/lib/pairsync/dirty"):
        pair.a.deliver(user, f"{user}-0")
        assert_all_there(pair, {user: [f"{user}-0"]}, 5)
        wait_for("it is visible", lambda: pair.a.metric("markers_writable") == 0)
        assert "cannot be noted" in pair.a.run("pairsync", "status", check=False)
    wait_for("it is over", lambda: pair.a.metric("markers_writable") == 1)


def test_a_change_that_could_not_be_noted_is_found_by_the_pass(pair: Pair, user: str) -> None:
    # A pass that is on since the test before would find it at once.
    pair.wait_quiet()
    with (
        full_disk(pair.a, "/var/lib/pairsync/dirty"),
        full_disk(pair.a, "/run/pairsync/dirty"),
    ):
        pair.a.deliver(user, f"{user}-unnoted")
        wait_for("it is visible", lambda: pair.a.metric("markers_writable") == 0)
        assert "cannot mark" in pair.a.shell("tail -n 20 /var/log/dovecot.log")
        assert pair.b.tags(user) == []
    assert_all_there(pair, {user: [f"{user}-unnoted"]})


def test_a_lost_disk_is_refilled_while_mail_flows(pair: Pair) -> None:
    users = pair.fresh(4)
    for user in users:
        for number in range(5):
            pair.b.deliver(user, f"{user}-{number}")
    pair.wait_equal(users, 10)
    pair.wait_quiet()
    pair.b.kill_pairsync()
    pair.b.stop_dovecot()
    pair.b.shell("rm -rf /var/dovecot/users/* /var/dovecot/users/.pairsync-id /var/lib/pairsync/*")
    with stream([pair.a], users, 5) as flow:
        pair.b.start_dovecot()
        pair.b.start_pairsync()
        wait_for("a pass", lambda: pair.a.status()["pass"])
        said = pair.a.run("pairsync", "refill")
    assert said.splitlines()[-1] == "done"
    assert " users/s" in said
    expected = {
        user: [*flow.sent[user], *(f"{user}-{number}" for number in range(5))] for user in users
    }
    assert_all_there(pair, expected)


def test_one_user_can_be_synchronised_by_hand(pair: Pair, user: str) -> None:
    pair.a.deliver(user, f"{user}-0")
    assert pair.a.run("pairsync", "sync", user).startswith(f"{user}: ok, ")
    assert_all_there(pair, {user: [f"{user}-0"]}, 1)
    assert "nothing is wrong" in pair.a.run("pairsync", "check")


def test_a_mail_that_was_left_out_gets_a_uid_that_the_other_server_never_gave(
    pair: Pair, user: str, tmp_path: Path
) -> None:
    """Nor does one that comes meanwhile. Under such a UID, dsync takes two mails for one."""
    for tag in ("one", "two"):
        pair.a.deliver(user, tag)
    pair.wait_equal([user], 5)
    with not_synchronised(pair):
        doveadm, states = Doveadm(pair.a.path("/run/dovecot/pairsync")), States(tmp_path)
        (folder,) = asyncio.run(doveadm.folders(user))
        mails = [(int(m[0]), m[1]) for m in pair.a.contents(user)["folders"]["INBOX"]]
        lives = [Life(uid, guid, is_there=True) for uid, guid in mails]
        box = Mailbox({folder: lives}, {folder: "INBOX"})
        pair.a.deliver(user, "meanwhile")
        used = mails[-1][0] + 30
        plan = Plan({}, {folder: [mails[0][0]]}, used={folder: used})
        assert asyncio.run(mend(doveadm, states, user, box, plan)) == 2
        assert states.renumbered(user)[folder] > {mails[0]}
        found = {m[3].strip("<>"): int(m[0]) for m in pair.a.contents(user)["folders"]["INBOX"]}
        assert found["two@x"] == mails[1][0]
        assert min(found["one@x"], found["meanwhile@x"]) > used
    assert_all_there(pair, {user: ["one", "two", "meanwhile"]})


def test_a_comparison_sees_to_a_folder_whose_name_looks_like_an_option(
    pair: Pair, user: str, tmp_path: Path
) -> None:
    name = "-x"
    with pair.a.imap(user) as imap:
        imap.create(name)
        for tag in ("gone", "left", "stays"):
            imap.append(name, "", "", f"Message-ID: <{tag}@x>\r\n\r\n".encode())
    pair.wait_equal([user], 5)
    with not_synchronised(pair):
        doveadm, states = Doveadm(pair.a.path("/run/dovecot/pairsync")), States(tmp_path)
        box = asyncio.run(look(doveadm, states, user))
        (folder,) = (guid for guid, known in box.names.items() if known == name)
        gone, left, stays = sorted(box.here(folder))
        used = stays[0] + 30
        plan = Plan({folder: [gone]}, {folder: [left[0]]}, used={folder: used})
        assert asyncio.run(mend(doveadm, states, user, box, plan)) == 1
        found = [(int(m[0]), m[3]) for m in pair.a.contents(user)["folders"][name]]
        assert found == [(stays[0], "<stays@x>"), (used + 1, "<left@x>")]
        # What doveadm changes asks for no run.
        pair.a.deliver(user, "another")
    pair.wait_equal([user])
    assert len(pair.b.contents(user)["folders"][name]) == 2


def test_a_mail_that_was_taken_from_a_maildir_is_known_as_its_folders_log_has_it(
    pair: Pair, user: str
) -> None:
    pair.a.kill_pairsync()
    try:
        maildir = f"/var/dovecot/{user}-maildir"
        pair.a.shell(
            f"mkdir -p {maildir}/cur {maildir}/new {maildir}/tmp"
            f" && printf 'Message-ID: <old@x>\\r\\n\\r\\n' > '{maildir}/cur/1.M2P3.host:2,S'"
            f" && chown -R vmail: {maildir} && doveadm sync -1 -R -u {user} maildir:{maildir}"
        )
        doveadm = Doveadm(pair.a.path("/run/dovecot/pairsync"))
        ((mail,),) = asyncio.run(doveadm.rows(user, 1, "fetch", "guid", "mailbox", "INBOX"))
        assert mail == "1.M2P3.host"
        index = pair.a.path(str(asyncio.run(doveadm.index(user, "INBOX"))))
        assert [life.guid for life in history.read(history.logs_of(index), ())] == [guid_of(mail)]
        assert asyncio.run(doveadm.fetch(user, "guid", "mailbox", "INBOX")) == [(guid_of(mail),)]
    finally:
        pair.a.start_pairsync()
    pair.a.deliver(user, "new")
    assert_all_there(pair, {user: ["old", "new"]})


def test_a_folder_that_was_made_as_the_plug_was_pulled_keeps_nobody_waiting(
    pair: Pair, user: str
) -> None:
    """Dovecot would wait for three minutes for whoever made its log."""
    pair.b.pull_the_plug()
    mailboxes = f"/var/dovecot/users/{user}/mdbox/mailboxes"
    log = f"{mailboxes}/Brief/dbox-Mails/dovecot.index.log.newlock"
    pair.b.write(log, "\1\3", VMAIL, 0o600)
    os.utime(pair.b.upper / log.lstrip("/"), (time.time() - 5, time.time() - 5))
    for folder in ("Brief", "Brief/dbox-Mails"):
        os.chown(pair.b.upper / mailboxes.lstrip("/") / folder, VMAIL, VMAIL)
    pair.b.boot()
    pair.connect_again()
    pair.b.start_dovecot()
    pair.b.start_pairsync()
    began = time.monotonic()
    with pair.b.imap(user) as imap:
        assert imap.select("Brief")[0] == "OK"
        assert imap.append("Brief", "", "", b"Message-ID: <kept@x>\r\n\r\n")[0] == "OK"
    assert time.monotonic() - began < HEALED
    pair.wait_equal([user])
    assert [message for *_, message in pair.a.contents(user)["folders"]["Brief"]] == ["<kept@x>"]
    pair.wait_quiet(60)  # a pass may only be due yet
