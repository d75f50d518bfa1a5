"""The door for a person's browser: requests reach webmail by its name, answers fit the loopback."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mailsite.loader import load_platform
from rehearsal import door
from rehearsal.progress import RehearsalError
from rehearsal.state import State
from tests.unit.test_loader import EXAMPLE

NAME = "webmail.invented.example"


class Webmail(BaseHTTPRequestHandler):
    """Says what it was asked, as Roundcube behind a frontend would."""

    seen: list[tuple[str, str, str, bytes]] = []  # noqa: RUF012 - the test's

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        asked = (self.path, self.headers["Host"], self.headers.get("Origin", ""), body)
        self.seen.append(asked)
        self.send_response(302)
        self.send_header("Location", f"https://{NAME}/?_task=mail")
        self.send_header("Set-Cookie", "session=1; path=/; secure; HttpOnly")
        self.send_header("Strict-Transport-Security", "max-age=1")
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"page")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[door.Server]:
    with HTTPServer(("127.0.0.1", 0), Webmail) as behind:
        port = behind.server_address[1]
        with door.Server(lambda: http.client.HTTPConnection("127.0.0.1", port), NAME, 0) as front:
            threads = [threading.Thread(target=s.serve_forever) for s in (behind, front)]
            for thread in threads:
                thread.start()
            yield front
            for server in (behind, front):
                server.shutdown()
            for thread in threads:
                thread.join()


def test_a_request_is_for_webmail_and_its_answer_for_the_loopback(served: door.Server) -> None:
    here = served.address.rstrip("/")
    connection = http.client.HTTPConnection("127.0.0.1", served.server_address[1], timeout=10)
    connection.request("POST", "/?_task=login", b"_user=a", {"Origin": here})
    reply = connection.getresponse()
    assert Webmail.seen[-1] == ("/?_task=login", NAME, f"https://{NAME}", b"_user=a")
    assert (reply.status, reply.read()) == (302, b"page")
    assert reply.headers["Location"] == f"{here}/?_task=mail"
    assert reply.headers["Set-Cookie"] == "session=1; path=/; HttpOnly"
    assert "Strict-Transport-Security" not in reply.headers


def test_nobody_but_this_machine_is_served(served: door.Server) -> None:
    assert served.address.startswith("http://127.0.0.1:")
    assert served.server_address[0] == "127.0.0.1"


def test_webmail_that_is_away_is_a_bad_gateway() -> None:
    def refused() -> http.client.HTTPConnection:
        raise ConnectionRefusedError("nobody is there")

    with door.Server(refused, NAME, 0) as front:
        thread = threading.Thread(target=front.handle_request)
        thread.start()
        connection = http.client.HTTPConnection("127.0.0.1", front.server_address[1], timeout=10)
        connection.request("GET", "/")
        reply = connection.getresponse()
        assert reply.status == 502 and b"nobody is there" in reply.read()
        connection.close()
        thread.join()


def test_a_site_without_webmail_has_no_door() -> None:
    platform = load_platform(EXAMPLE).model_copy(update={"webmail": None})
    with pytest.raises(RehearsalError, match="no webmail"):
        door.Door(platform, State())
