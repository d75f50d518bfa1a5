"""Clients of the checks: addresses, SMTP dialogues."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from mailsite.model import IPAddress
from verify.client import Client, Observer, Pool
from verify.registry import Failed
from verify.smtp import Refused, Session, letter


def pairs(count: int) -> Iterator[tuple[IPv4Address, IPv6Address]]:
    for number in range(count):
        yield IPv4Address(f"192.0.2.{number}"), IPv6Address(f"2001:db8::{number}")


def test_a_client_has_addresses_that_no_other_had() -> None:
    given: list[IPAddress] = []
    pool = Pool(pairs(20), lambda *addresses: given.extend(addresses))
    observer = Observer("somewhere", addresses=pool)
    clients = [observer.client() for _ in range(20)]
    assert len({c.ipv4 for c in clients}) == 20
    assert given == [a for c in clients for a in (c.ipv4, c.ipv6)]
    assert str(clients[0]) == "somewhere (192.0.2.0, 2001:db8::)"


def test_an_address_that_has_rested_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("verify.client.time.sleep", slept.append)
    pool = Pool(pairs(1), lambda *addresses: None)
    first = pool()
    assert pool() == first
    assert slept and 55 < slept[0] <= Pool.REST


def test_a_place_without_addresses_says_so() -> None:
    with pytest.raises(LookupError, match="no address is left"):
        Pool(pairs(0), lambda *addresses: None)()


def test_an_observer_without_addresses_leaves_them_to_the_kernel() -> None:
    client = Observer("here").client()
    assert client.source(ip_address("192.0.2.1")) is None
    assert str(client) == "here"


class Server:
    """Answers one connection from a script: reply to the connection, then to each line."""

    def __init__(self, *replies: str) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.got: list[str] = []
        self.thread = threading.Thread(target=self._serve, args=(replies,), daemon=True)
        self.thread.start()

    def _serve(self, replies: tuple[str, ...]) -> None:
        with closing(self._listener):
            connection, _ = self._listener.accept()
        with connection, connection.makefile("rb") as lines:
            connection.sendall(f"{replies[0]}\r\n".encode())
            for reply in replies[1:]:
                self.got.append(lines.readline().decode().strip())
                connection.sendall(f"{reply}\r\n".encode())


LOOPBACK = Client("this machine", Observer("").enter, IPv4Address("127.0.0.1"))


def test_a_banner_has_a_public_and_an_internal_name() -> None:
    server = Server("220 out.example.org ESMTP Postfix (a.net.example.org)", "221 bye")
    with Session(LOOPBACK, "127.0.0.1", server.port) as session:
        assert session.banner.name == "out.example.org"
        assert session.banner.inner == "a.net.example.org"


def test_a_banner_without_parentheses_has_no_internal_name() -> None:
    server = Server("220 out.example.org ESMTP Postfix", "221 bye")
    with Session(LOOPBACK, "127.0.0.1", server.port) as session:
        assert session.banner.inner == ""


def test_another_greeting_than_220_is_an_answer_too() -> None:
    server = Server("421 4.7.0 out.example.org Error: too many connections")
    with pytest.raises(Refused, match="too many connections") as refused:
        Session(LOOPBACK, "127.0.0.1", server.port)
    assert refused.value.code == 421
    assert isinstance(refused.value, Failed)


def test_passwords_stay_out_of_the_transcript() -> None:
    said: list[str] = []
    server = Server("220 out.example.org ESMTP x", "535 5.7.8 no", "221 bye")
    with Session(LOOPBACK, "127.0.0.1", server.port, say=said.append) as session:
        assert session.authenticate("user", "hunter2") == (535, "5.7.8 no")
    assert server.got[0].startswith("AUTH PLAIN ")
    assert "hunter2" not in "".join(said)
    assert server.got[0].split()[2] not in "".join(said)
    assert "C: (secret)" in said


def test_the_first_refusal_of_a_transaction_is_its_outcome() -> None:
    server = Server("220 out.example.org ESMTP x", "250 ok", "554 5.7.1 Relay access denied", "221")
    with Session(LOOPBACK, "127.0.0.1", server.port) as session:
        code, text = session.submit("a@a.example", ["b@b.example"], b"Subject: x\r\n\r\n")
    assert (code, text) == (554, "5.7.1 Relay access denied")


def test_a_preamble_goes_before_everything() -> None:
    server = Server("220 out.example.org ESMTP x", "250 ok")
    header = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"
    session = Session(LOOPBACK, "127.0.0.1", server.port, preamble=header)
    session.close()
    server.thread.join(timeout=5)
    assert server.got == [header.decode().strip()]


def test_letters_are_told_apart_by_their_token() -> None:
    one, other = (letter("{token}@a.example", "{token}@b.example") for _ in range(2))
    assert one.token != other.token
    assert one.sender == f"{one.token}@a.example"
    assert f"To: {one.recipient}\r\n".encode() in one.content
    assert b"\n" not in one.content.replace(b"\r\n", b"")
