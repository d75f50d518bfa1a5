"""What changes on one server is on the other, whichever it was."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.pairsync.pair import Pair, Server, wait_for

Change = Callable[[Server, str], None]


def deliver(server: Server, user: str) -> None:
    server.deliver(user, f"more-{time.monotonic_ns()}")


def flag(server: Server, user: str) -> None:
    with server.imap(user) as imap:
        imap.select()
        imap.store("1", "+FLAGS", "(\\Flagged)")


def keyword(server: Server, user: str) -> None:
    with server.imap(user) as imap:
        imap.select()
        imap.store("1", "+FLAGS", "(important)")


def read(server: Server, user: str) -> None:
    with server.imap(user) as imap:
        imap.select()
        imap.fetch("1", "(BODY[])")


def move(server: Server, user: str) -> None:
    with server.imap(user) as imap:
        imap.select()
        assert imap.xatom("MOVE", "1", "Sent")[0] == "OK"


def expunge(server: Server, user: str) -> None:
    with server.imap(user) as imap:
        imap.select()
        imap.store("1", "+FLAGS", "(\\Deleted)")
        imap.expunge()


def folders(server: Server, user: str, *commands: tuple[str, ...]) -> None:
    with server.imap(user) as imap:
        for name, *arguments in commands:
            said = getattr(imap, name)(*arguments)
            assert said[0] == "OK", (name, said)


CHANGES: dict[str, Change] = {
    "a mail": deliver,
    "a flag": flag,
    "a keyword": keyword,
    "read": read,
    "moved": move,
    "expunged": expunge,
    "a new folder": lambda s, u: folders(s, u, ("create", "New/Deep")),
    "a renamed folder": lambda s, u: folders(s, u, ("rename", "Work", "Play")),
    "a deleted folder": lambda s, u: folders(s, u, ("delete", "Play")),
    "a subscription": lambda s, u: folders(s, u, ("subscribe", "Work")),
    "a script": lambda s, u: s.put_script(u, "more"),
    "an active script": lambda s, u: s.sieve(u, 'SETACTIVE "kept"'),
    "no active script": lambda s, u: s.sieve(u, 'SETACTIVE ""'),
    "a changed script": lambda s, u: s.put_script(u, "kept", "stop;\n"),
    "a deleted script": lambda s, u: s.sieve(u, 'DELETESCRIPT "old"'),
    "a renamed script": lambda s, u: s.sieve(u, 'RENAMESCRIPT "more" "new"'),
}


def test_every_change_is_carried_both_ways(pair: Pair) -> None:
    for there, here in ((pair.a, pair.b), (pair.b, pair.a)):
        (user,) = pair.fresh(1)
        for number in range(4):
            there.deliver(user, f"{user}-{number}")
        folders(there, user, ("create", "Work"), ("create", "Sent"))
        for script in ("kept", "old"):
            there.put_script(user, script)
        pair.wait_equal([user], 5)
        for what, change in CHANGES.items():
            if what == "a subscription":
                folders(there, user, ("create", "Work"))
            before = here.contents(user)
            change(there, user)
            pair.wait_equal([user], 5)
            if what != "no active script":
                assert here.contents(user) != before or "script" in what, what
        assert here.scripts(user) == {"kept": False, "new": False}


def test_a_flag_on_a_mail_that_came_from_there_is_carried_back(pair: Pair, user: str) -> None:
    """Seen: it was not, where the state of this server's last run was older than the mail."""
    with pair.b.imap(user) as imap:
        imap.select()
    wait_for("a run of B's", lambda: "INBOX" in pair.a.contents(user)["folders"])
    pair.wait_quiet()
    for number in range(5):
        pair.a.deliver(user, f"{user}-{number}")
        pair.wait_equal([user], 5)
    time.sleep(6)  # Who is written on both servers at once gets a full run.
    with pair.b.imap(user) as imap:
        imap.select()
        imap.store("1", "+FLAGS", "(important)")
    pair.wait_equal([user], 5)


def test_what_a_sync_writes_asks_for_no_sync(pair: Pair, user: str) -> None:
    before = pair.b.status()["runs"]
    for number in range(3):
        pair.a.deliver(user, f"{user}-{number}")
        pair.wait_equal([user], 5)
    pair.wait_quiet()
    assert pair.b.status()["runs"] == before


def test_a_folder_deleted_while_dovecot_notifies_is_deleted_there(pair: Pair, user: str) -> None:
    """Dovecot notifies 7 ms before the folder is gone."""
    for server in pair.both * 5:
        folders(server, user, ("create", "Brief"))
        pair.wait_equal([user], 5)
        folders(server, user, ("delete", "Brief"))
        pair.wait_equal([user], 5)
        assert "Brief" not in server.contents(user)["folders"]


def test_a_folder_that_is_renamed_again_and_again_keeps_its_last_name(pair: Pair) -> None:
    """While runs are on all the time, in both directions."""
    users = pair.fresh(2)
    for user in users:
        pair.a.deliver(user, "first")
    pair.wait_equal(users)
    over = threading.Event()

    def disturb(server: Server, user: str) -> None:
        while not over.wait(0.03):
            deliver(server, user)

    def rename(server: Server, user: str) -> str:
        chance, name = random.Random(f"{server.name} {user}"), f"{server.name[0]}0"
        with server.imap(user) as imap:
            # A Dovecot alone refuses a few where several sessions make folders at once.
            wait_for(
                f"{name} is made",
                lambda name=name: "OK" in (imap.create(name)[0], imap.status(name, "(UIDNEXT)")[0]),
            )
            imap.append(name, "", "", b"Message-ID: <kept@x>\r\n\r\n")
            for number in range(1, 9):
                time.sleep(chance.random() * 1.5)
                old, name = name, f"{server.name[0]}{number}"
                # For a moment it may have the name before again.
                what = f"{old} is there to be renamed"
                wait_for(what, lambda old=old, name=name: imap.rename(old, name)[0] == "OK")
        return name

    places = [(server, user) for server in pair.both for user in users]
    with ThreadPoolExecutor(len(places) * 2) as pool:
        disturbing = [pool.submit(disturb, *place) for place in places]
        try:
            names = list(pool.map(lambda place: rename(*place), places))
        finally:
            over.set()
        for work in disturbing:
            work.result()
    pair.wait_equal(users)
    for user in users:
        own = {n for n, (_, of) in zip(names, places, strict=True) if of == user}
        held = pair.b.contents(user)["folders"]
        assert set(held) - {"INBOX"} == own
        assert [len(held[name]) for name in own] == [1, 1]


def test_a_rename_and_subscriptions_within_a_second_are_carried(pair: Pair, user: str) -> None:
    folders(pair.a, user, ("create", "Work/2026"), ("subscribe", "Work/2026"))
    pair.wait_equal([user], 5)
    folders(
        pair.b,
        user,
        ("rename", "Work/2026", "Work/2027"),
        ("unsubscribe", "Work/2026"),
        ("subscribe", "Work/2027"),
    )
    pair.wait_equal([user], 8)
    found = pair.a.contents(user)
    assert found["subscribed"] == ["Work/2027"]
    assert "Work/2026" not in found["folders"]


def test_subscriptions_changed_back_and_forth_are_carried(pair: Pair, user: str) -> None:
    folders(pair.a, user, ("create", "Work"))
    for number in range(6):
        pair.wait_quiet()  # A run that is on would carry the change within its second.
        server = pair.both[number % 2]
        folders(server, user, ("subscribe" if number % 2 == 0 else "unsubscribe", "Work"))
        pair.wait_equal([user], 8)
        assert server.contents(user)["subscribed"] == (["Work"] if number % 2 == 0 else [])


@pytest.mark.parametrize("how", ["managesieve", "doveadm"])
def test_a_deleted_script_stays_deleted(pair: Pair, how: str) -> None:
    (user,) = pair.fresh(1)
    for there, here in ((pair.a, pair.b), (pair.b, pair.a)):
        there.put_script(user, "gone")
        pair.wait_equal([user], 5)
        assert "gone" in here.scripts(user)
        if how == "managesieve":
            there.sieve(user, 'DELETESCRIPT "gone"')
        else:
            there.run("doveadm", "sieve", "delete", "-u", user, "gone")
        # Something else happens to both at once: neither may bring it back.
        for server in pair.both:
            server.deliver(user, f"{server.name}-{time.monotonic_ns()}")
        pair.wait_equal([user], 5)
        pair.wait_quiet()
        assert here.scripts(user) == there.scripts(user) == {}


@pytest.mark.parametrize("name", ["gone", "-x"])
def test_a_script_deleted_while_the_daemon_is_down_stays_deleted(
    pair: Pair, user: str, name: str
) -> None:
    pair.a.put_script(user, name)
    pair.wait_equal([user], 5)
    pair.a.kill_pairsync()
    pair.a.sieve(user, f'DELETESCRIPT "{name}"')
    pair.b.deliver(user, f"{user}-meanwhile")
    pair.a.start_pairsync()
    pair.wait_equal([user])
    assert pair.b.scripts(user) == {}


def test_a_script_put_again_after_its_deletion_stays(pair: Pair, user: str) -> None:
    for server in pair.both:
        server.put_script(user, "again", "keep;\n")
        pair.wait_equal([user], 5)
        # A sync compares whole seconds: of two changes in one, the newer is not known.
        second = int(time.time())
        wait_for("the second is over", lambda now=second: time.time() >= now + 1)  # type: ignore[misc]
        size = len("stop;\n")
        server.sieve(user, 'DELETESCRIPT "again"', f'PUTSCRIPT "again" {{{size}+}}\r\nstop;\n')
        pair.wait_equal([user], 5)
        pair.wait_quiet()
        for one in pair.both:
            assert one.path(f"/var/dovecot/users/{user}/sieve/again.sieve").read_text() == "stop;\n"


def test_a_new_user_is_carried(pair: Pair) -> None:
    for server in pair.both:
        server.add_user("newcomer")
    pair.b.deliver("newcomer", "hello")
    pair.wait_equal(["newcomer"], 5)
    pair.b.put_script("newcomer", "first")
    pair.wait_equal(["newcomer"], 5)
    assert pair.a.scripts("newcomer") == {"first": False}


def test_a_user_whom_the_peer_does_not_know_yet_is_carried_later(pair: Pair) -> None:
    pair.a.add_user("early")
    pair.a.deliver("early", "hello")
    wait_for("it is visible", lambda: "early" in pair.a.status()["failing"])
    pair.b.add_user("early")
    pair.wait_equal(["early"])
    assert pair.b.tags("early") == ["hello"]


def test_a_pass_ends_without_a_user_whom_the_peer_does_not_know(pair: Pair) -> None:
    pair.a.add_user("alone")
    pair.a.deliver("alone", "hello")
    wait_for("it is visible", lambda: "alone" in pair.a.status()["failing"])
    said = pair.a.run("pairsync", "refill", check=False).splitlines()[-1]
    assert said == "done, but for 1 that are tried again: alone"
    pair.b.add_user("alone")
    pair.a.run("pairsync", "sync", "alone")
    pair.wait_equal(["alone"], 5)
    assert pair.b.tags("alone") == ["hello"]
