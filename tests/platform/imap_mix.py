"""Clients of mailboxes that do everything at once, as a program of its own.

    python -m tests.platform.imap_mix < plan.json

The plan: ``address`` and ``name`` (that its certificate is for) of the server, ``user``,
``password``, ``ca`` (PEM), ``clients`` (their numbers), ``seconds``, ``seed``, ``prefix`` of the
folders' names. Prints a JSON document: ``commands`` (how many of each succeeded), ``errors`` (what
went wrong, in words).

Each session has a folder of its own beside those that all share, so that what another client
removed is no error. A folder is not renamed twice in a second: two replicas that are kept equal
by dsync do not tell such changes apart.
"""

from __future__ import annotations

import json
import random
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError

PORT = 993
_PATIENCE = 10.0
_MAIL = "From: x@probe.invalid\r\nSubject: {}\r\nMessage-ID: <{}@probe.invalid>\r\n\r\n{}\r\n"


class Mix:
    """One client after another in one thread: logs in, does a few dozen things, logs out."""

    def __init__(self, plan: dict[str, Any], number: int, done: Counter[str]) -> None:
        self._plan, self._number, self._done = plan, number, done
        self._random = random.Random(f"{plan['seed']}-{number}")
        self._own = ""
        self._folders = self._sent = 0
        self._named = 0.0

    def run(self, until: float) -> None:
        context = ssl.create_default_context(cadata=self._plan["ca"])
        while time.monotonic() < until:
            with IMAPClient(self._plan["name"], PORT, ssl_context=context, timeout=30) as client:
                client.login(self._plan["user"], self._plan["password"])
                self._session(client, until)

    def _session(self, client: IMAPClient, until: float) -> None:
        self._own = self._new_name()
        self._until_there(client, lambda: client.create_folder(self._own))
        self._did("create")
        for _ in range(self._random.randrange(20, 60)):
            if time.monotonic() > until:
                break
            step = self._random.choice(self._steps)
            step(self, client)
            self._did(step.__name__.lstrip("_"))
        client.select_folder("INBOX", readonly=True)
        client.delete_folder(self._own)
        self._did("delete")

    def _until_there(self, client: IMAPClient, make: Callable[[], object]) -> None:
        """Have a folder made or renamed.

        One Dovecot alone refuses a few of such commands when several sessions give them at once,
        and during a sync a folder may have the name before for a moment.
        """
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                make()
                return
            except IMAPClientError:
                if client.folder_exists(self._own):
                    return
                if time.monotonic() > until:
                    raise

    def _new_name(self) -> str:
        self._folders += 1
        self._named = time.monotonic()
        return f"{self._plan['prefix']}-{self._number}-{self._folders}"

    def _did(self, what: str) -> None:
        self._done[what] += 1

    def _some(self, client: IMAPClient) -> list[int]:
        client.select_folder(self._own)
        found = client.search("ALL")
        return self._random.sample(found, min(3, len(found)))

    def _append(self, client: IMAPClient) -> None:
        self._sent += 1
        tag = f"{self._number}-{self._sent}-{self._random.randrange(10**9)}"
        text = _MAIL.format(tag, tag, "x" * self._random.randrange(20_000))
        client.append(self._own, text, flags=self._random.sample(["\\Seen", "mixed"], 1))

    def _fetch(self, client: IMAPClient) -> None:
        some = self._some(client)
        if some:
            found = client.fetch(some, ["FLAGS", "ENVELOPE", "BODYSTRUCTURE", "BODY.PEEK[]"])
            assert set(found) == set(some)

    def _store(self, client: IMAPClient) -> None:
        some = self._some(client)
        if some:
            client.add_flags(some, [self._random.choice(["\\Flagged", "\\Answered", "mixed"])])
            client.remove_flags(some, ["mixed"])

    def _expunge(self, client: IMAPClient) -> None:
        some = self._some(client)
        if some:
            client.delete_messages(some)
            client.expunge()

    def _copy(self, client: IMAPClient) -> None:
        some = self._some(client)
        if some:
            client.copy(some, self._own)

    def _move(self, client: IMAPClient) -> None:
        some = self._some(client)
        if some:
            client.move(some, "Trash")
            self._empty_trash(client)

    def _empty_trash(self, client: IMAPClient) -> None:
        client.select_folder("Trash")
        mine = client.search(["HEADER", "MESSAGE-ID", f"<{self._number}-"])
        if mine:
            client.delete_messages(mine)
            client.uid_expunge(mine)

    def _search(self, client: IMAPClient) -> None:
        self._some(client)
        client.search(["OR", "FLAGGED", "SUBJECT", "1"])

    def _sort_and_thread(self, client: IMAPClient) -> None:
        self._some(client)
        client.sort("REVERSE ARRIVAL")
        client.thread("REFERENCES")

    def _list(self, client: IMAPClient) -> None:
        names = {name for _, _, name in client.list_folders()}
        assert "INBOX" in names and self._own in names
        client.list_sub_folders()

    def _status(self, client: IMAPClient) -> None:
        assert b"MESSAGES" in client.folder_status("INBOX")

    def _examine(self, client: IMAPClient) -> None:
        client.select_folder("INBOX", readonly=True)
        client.noop()

    def _idle(self, client: IMAPClient) -> None:
        client.select_folder("INBOX", readonly=True)
        client.idle()
        client.idle_check(timeout=0.2)
        client.idle_done()

    def _rename(self, client: IMAPClient) -> None:
        if time.monotonic() < self._named + 1.5:
            return
        # Dovecot ends a session that renames the folder it is in, replicas or not.
        client.select_folder("INBOX", readonly=True)
        before, self._own = self._own, self._new_name()
        self._until_there(client, lambda: client.rename_folder(before, self._own))

    def _subscribe(self, client: IMAPClient) -> None:
        client.subscribe_folder(self._own)
        client.unsubscribe_folder(self._own)

    _steps: tuple[Callable[[Mix, IMAPClient], None], ...] = (
        _append, _append, _append, _fetch, _fetch, _store, _expunge, _copy, _move, _search,
        _sort_and_thread, _list, _status, _examine, _idle, _rename, _subscribe,
    )  # fmt: skip


def _answer_with(name: str, address: str) -> None:
    """``name`` has that address; nothing else is looked up."""
    real = socket.getaddrinfo

    def look_up(host: str, *rest: Any, **more: Any) -> Any:
        assert host == name
        return real(address, *rest, **more)

    socket.getaddrinfo = look_up


def main() -> int:
    plan = json.load(sys.stdin)
    _answer_with(plan["name"], plan["address"])
    done: Counter[str] = Counter()
    errors: list[str] = []
    until = time.monotonic() + plan["seconds"]

    def work(number: int) -> None:
        try:
            Mix(plan, number, done).run(until)
        except Exception as error:  # whatever a server does to a client is told, not only BAD
            errors.append(f"client {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(n,)) for n in plan["clients"]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump({"commands": dict(done), "errors": errors}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
