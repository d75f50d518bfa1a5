"""The Cloudflare stand-in: what it publishes and what it refuses."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.tsig
import dns.tsigkeyring
import dns.update
import dns.zone
import pytest

from rehearsal.progress import RehearsalError
from rehearsal.standins.base import ProviderError
from rehearsal.standins.cloudflare import Cloudflare, DnsRecord
from rehearsal.standins.publisher import Data, NameServer
from rehearsal.standins.store import Store
from rehearsal.standins.values import UNKNOWN
from tests.engine.client import Client, Refused, connected
from tests.engine.memory import World, Zones

TYPE = DnsRecord.token
ZONE = "0" * 31 + "1"
A = {"zoneId": ZONE, "name": "mx.example.net", "type": "A", "ttl": 300, "content": "192.0.2.9"}
TXT = {"zoneId": ZONE, "name": "example.net", "type": "TXT", "ttl": 3600}
MX = {"zoneId": ZONE, "name": "example.net", "type": "MX", "ttl": 300, "priority": 10}
CNAME = {"zoneId": ZONE, "name": "www.example.net", "type": "CNAME", "ttl": 300}


@pytest.fixture
def world() -> World:
    return World(zone_names={ZONE: "example.net"})


@pytest.fixture
def client(world: World, tmp_path: Path) -> Iterator[Client]:
    with connected(Cloudflare(Store(tmp_path / "c.json"), Zones(world)), apiToken="t") as one:
        yield one


def test_a_record_is_served_and_withdrawn(client: Client, world: World) -> None:
    made = client.create(TYPE, {**A, "comment": "who answers"})
    assert world.served == {("mx.example.net", Data("A", "192.0.2.9")): 300}
    assert len(made.id) == 32
    assert made.state["proxiable"] is True
    assert made.state["proxied"] is False
    client.delete(made)
    assert world.served == {}
    with pytest.raises(Refused, match=r"404 Not Found.*81044.*Record does not exist\."):
        client.delete(made)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (A, "192.0.2.9"),
        ({**A, "type": "AAAA", "content": "2001:DB8::0:1"}, "2001:db8::1"),
        ({**MX, "content": "mx.example.net"}, "10 mx.example.net."),
        ({**MX, "priority": 0, "content": "."}, "0 ."),
        ({**MX, "data": {"priority": 0, "target": "."}}, "0 ."),
        ({**CNAME, "content": "example.org"}, "example.org."),
        ({**TXT, "content": '"v=spf1 -all"'}, '"v=spf1 -all"'),
        ({**TXT, "content": '"v=DKIM1; p=" "AAAA"'}, '"v=DKIM1; p=" "AAAA"'),
        ({**TXT, "content": r'"a \"quoted\" word"'}, r'"a \"quoted\" word"'),
        ({**TXT, "type": "CAA", "data": {"flags": 0, "tag": "issue", "value": "ca.example"}},
         '0 issue "ca.example"'),
        ({**TXT, "name": "_25._tcp.mx.example.net", "type": "TLSA",
          "data": {"usage": 3, "selector": 1, "matchingType": 1, "certificate": "ab" * 32}},
         "3 1 1 " + "ab" * 32),
        ({**TXT, "name": "_imaps._tcp.example.net", "type": "SRV", "priority": 1,
          "data": {"weight": 2, "port": 993, "target": "imap.example.net"}},
         "1 2 993 imap.example.net."),
    ],
)  # fmt: skip
def test_each_type_is_published(
    client: Client, world: World, inputs: dict[str, Any], text: str
) -> None:
    client.create(TYPE, inputs)
    [(_, data)] = world.served
    assert (data.type, data.text) == (inputs["type"], text)


def test_a_ttl_of_one_is_five_minutes(client: Client, world: World) -> None:
    client.create(TYPE, {**A, "ttl": 1})
    assert list(world.served.values()) == [300]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({**A, "name": "mx"}, "write 'mx' in full, below example.net"),
        ({**A, "name": "mx.example.net."}, "without a dot at the end"),
        ({**A, "name": "mx.anexample.net"}, "in full, below example.net"),
        ({**A, "ttl": 30}, "Invalid TTL"),
        ({**A, "ttl": 100000}, "Invalid TTL"),
        ({**A, "content": "192.0.2.256"}, "Content for A record is invalid"),
        ({**A, "type": "AAAA"}, "Content for AAAA record is invalid"),
        ({**A, "zoneId": "f" * 32}, "Could not route to /zones/f"),
        ({**A, "comment": "x" * 101}, "101 characters; the free plan takes 100"),
        ({**A, "tags": ["a:b"]}, "exceeding the quota of 0"),
        ({**MX, "content": "mx.example.net."}, "no trailing dot"),
        ({**MX, "content": "192.0.2.9"}, "must be a hostname"),
        ({**MX, "content": "2001:db8::9"}, "must be a hostname"),
        ({**MX, "content": "mx"}, "fully qualified"),
        ({**MX, "content": "mx.example.net", "proxied": True}, "cannot be proxied"),
        ({k: v for k, v in MX.items() if k != "priority"} | {"content": "a.example"}, "priority"),
        ({**CNAME, "content": "example.org."}, "no trailing dot"),
        ({**CNAME}, "Content for CNAME record is required"),
        ({**TXT, "content": "v=spf1 -all"}, "double quotes"),
        ({**TXT, "content": '"v=spf1" -all'}, "double quotes"),
        ({**TXT, "content": f'"{"x" * 256}"'}, "256 bytes, more than 255"),
        ({**TXT, "content": '"' + "ä" * 128 + '"'}, "256 bytes, more than 255"),
        ({**TXT, "content": " ".join(['"' + "x" * 255 + '"'] * 17)}, "more than 4096"),
        ({**TXT, "type": "TLSA", "content": "3 1 1 ab"}, "usage is a required data field"),
        ({**TXT, "type": "CAA", "data": {"tag": "issue"}}, "flags, value is a required"),
    ],
)
def test_what_the_api_refuses_is_refused(
    client: Client, world: World, inputs: dict[str, Any], words: str
) -> None:
    with pytest.raises(Refused) as refused:
        client.create(TYPE, inputs)
    assert "failed to make http request: POST" in str(refused.value)
    assert (
        words in json.loads(str(refused.value).split("400 Bad Request ")[1])["errors"][0]["message"]
    )
    assert world.served == {}


def test_a_string_of_255_bytes_is_taken(client: Client) -> None:
    client.create(TYPE, {**TXT, "content": f'"{"x" * 255}" "y"'})
    client.create(TYPE, {**TXT, "content": '"' + r"\"" * 255 + '"'})


def test_an_identical_record_is_refused_whoever_published_it(client: Client, world: World) -> None:
    client.create(TYPE, A)
    client.create(TYPE, {**A, "content": "192.0.2.10"})
    with pytest.raises(Refused, match=r"An identical record already exists\."):
        client.create(TYPE, {**A, "ttl": 600})
    world.served[("foreign.example.net", Data("AAAA", "2001:db8::1"))] = 300
    with pytest.raises(Refused, match=r"An identical record already exists\."):
        client.create(
            TYPE,
            {**A, "name": "foreign.example.net", "type": "AAAA", "content": "2001:db8:0::1"},
        )


def test_a_cname_stands_alone(client: Client, world: World) -> None:
    client.create(TYPE, {**CNAME, "content": "example.org"})
    with pytest.raises(Refused, match="A CNAME record with that host already exists"):
        client.create(TYPE, {**A, "name": "www.example.net"})
    client.create(TYPE, A)
    with pytest.raises(Refused, match="An A, AAAA, or CNAME record with that host"):
        client.create(TYPE, {**CNAME, "name": "mx.example.net", "content": "example.org"})
    client.create(TYPE, {**TXT, "name": "t.example.net", "content": '"x"'})
    with pytest.raises(Refused, match="record of another type"):
        client.create(TYPE, {**CNAME, "name": "t.example.net", "content": "example.org"})


def test_a_change_is_made_in_place(client: Client, world: World) -> None:
    made = client.create(TYPE, A)
    moved = client.update(made, {**A, "content": "192.0.2.10", "ttl": 600})
    assert world.served == {("mx.example.net", Data("A", "192.0.2.10")): 600}
    renamed = client.update(moved, {**A, "name": "mx2.example.net"})
    assert world.served == {("mx2.example.net", Data("A", "192.0.2.9")): 300}
    alias = client.update(
        renamed, {**CNAME, "name": "mx2.example.net", "content": "mx.example.org"}
    )
    assert world.served == {("mx2.example.net", Data("CNAME", "mx.example.org.")): 300}
    world.journal.clear()
    client.update(alias, {**alias.inputs, "comment": "why"})
    assert world.journal == []


def test_a_change_onto_another_record_is_refused(client: Client, world: World) -> None:
    client.create(TYPE, A)
    made = client.create(TYPE, {**A, "content": "192.0.2.10"})
    with pytest.raises(Refused, match=r"PUT .*identical record"):
        client.update(made, A)
    assert len(world.served) == 2


def test_only_another_zone_replaces(client: Client) -> None:
    old, _ = client.check(TYPE, A)
    new = {**old, "name": "x.example.net", "type": "AAAA", "content": "::1", "ttl": 60}
    assert client.diff(TYPE, old, new).replaces == []
    answer = client.diff(TYPE, old, {**old, "zoneId": "2" * 32})
    assert (answer.replaces, answer.delete_first) == (["zoneId"], False)


@pytest.mark.parametrize(
    ("more", "property"),
    [({"type": "SPF"}, "type"), ({"priority": 70000}, "priority"), ({"ttl": "300"}, "ttl")],
)
def test_the_provider_s_own_checks_come_with_the_preview(
    client: Client, more: dict[str, Any], property: str
) -> None:
    _, failures = client.check(TYPE, {**A, **more})
    assert list(failures) == [property]
    _, failures = client.check(TYPE, {key: value for key, value in A.items() if key != "ttl"})
    assert list(failures) == ["ttl"]


def test_a_preview_asks_and_changes_nothing(client: Client, world: World) -> None:
    outputs = client.preview(TYPE, {**TXT, "content": UNKNOWN})
    assert outputs["content"] is UNKNOWN
    assert outputs["createdOn"] is UNKNOWN
    made = client.create(TYPE, A)
    changed = client.update(made, {**A, "content": "192.0.2.10"}, preview=True).state
    assert changed["modifiedOn"] is UNKNOWN
    assert changed["createdOn"] == made.state["createdOn"]
    assert world.served == {("mx.example.net", Data("A", "192.0.2.9")): 300}


def test_a_record_that_was_taken_away_by_hand_is_gone(client: Client, world: World) -> None:
    made = client.create(TYPE, A)
    assert client.read(made) is not None
    world.served.clear()
    assert client.read(made) is None


# The name server: a small one that answers as Knot does, and insists on the key. --------------


class Knot(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, key: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.keyring = dns.tsigkeyring.from_text({"updates": key})
        text = "@ 60 IN SOA . . 1 1 1 1 60\n@ 60 IN NS ns\nmx 300 IN A 192.0.2.1\n"
        self.zone = dns.zone.from_text(text, "example.net", relativize=False)
        self.signed: list[bool] = []


class _Answer(socketserver.StreamRequestHandler):
    server: Knot

    def handle(self) -> None:
        length = int.from_bytes(self.rfile.read(2), "big")
        wire = self.rfile.read(length)
        zone = self.server.zone
        try:
            query = dns.message.from_wire(wire, keyring=self.server.keyring)
        except dns.tsig.BadSignature:
            query = dns.message.from_wire(wire, continue_on_error=True, ignore_trailing=True)
            answer = dns.message.make_response(query)
            answer.set_rcode(dns.rcode.NOTAUTH)
        else:
            answer = dns.message.make_response(query)
            if query.opcode() == dns.opcode.UPDATE:
                self.server.signed.append(query.had_tsig)
                assert isinstance(query, dns.update.UpdateMessage)
                for rrset in query.update:
                    node = zone.find_node(rrset.name, create=True)
                    for rdata in rrset:
                        if rrset.deleting is not None:
                            node.find_rdataset(IN, rdata.rdtype).discard(rdata)
                        else:
                            node.find_rdataset(IN, rdata.rdtype, create=True).add(rdata, rrset.ttl)
            else:
                name = query.question[0].name
                found = zone.get_node(name)
                for rdataset in found.rdatasets if found is not None else ():
                    rrset = answer.find_rrset(answer.answer, name, IN, rdataset.rdtype, create=True)
                    rrset.update(rdataset)
        data = answer.to_wire()
        self.wfile.write(len(data).to_bytes(2, "big") + data)


IN = dns.rdataclass.IN
KEY = "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0IQ=="


@contextmanager
def knot() -> Iterator[Knot]:
    with Knot(KEY) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def access(folder: Path, server: Knot, key: str = KEY) -> Path:
    path = folder / "dns.json"
    path.write_text(
        json.dumps(
            {
                "address": "127.0.0.1",
                "port": server.server_address[1],
                "key_name": "updates",
                "key_algorithm": "hmac-sha256",
                "key_secret": key,
                "zones": {ZONE: "example.net"},
            }
        )
    )
    return path


def test_records_reach_a_name_server_by_signed_updates(tmp_path: Path) -> None:
    with knot() as server:
        publisher = NameServer(access(tmp_path, server), lambda: None)
        with connected(Cloudflare(Store(tmp_path / "c.json"), publisher)) as client:
            with pytest.raises(Refused, match="identical"):
                client.create(TYPE, {**A, "content": "192.0.2.1"})
            made = client.create(TYPE, A)
            long = '"' + "a" * 255 + '" "b; c"'
            client.create(TYPE, {**TXT, "name": "k._domainkey.example.net", "content": long})
            assert publisher.records("example.net", "mx.example.net") == {
                Data("A", "192.0.2.1"),
                Data("A", "192.0.2.9"),
            }
            assert publisher.records("example.net", "k._domainkey.example.net") == {
                Data("TXT", long)
            }
            mx = client.create(TYPE, {**MX, "content": "mx.example.net"})
            assert client.read(mx) is not None
            alias = client.create(TYPE, {**CNAME, "content": "a.example.org"})
            client.update(alias, {**CNAME, "content": "b.example.org"})
            client.update(made, {**A, "content": "192.0.2.77"})
            assert Data("A", "192.0.2.77") in publisher.records("example.net", "mx.example.net")
            client.delete(made)
            assert client.read(made) is None
        assert server.signed == [True] * 7
        assert publisher.records("example.net", "mx.example.net") == {Data("A", "192.0.2.1")}


def test_a_wrong_key_is_said(tmp_path: Path) -> None:
    with knot() as server:
        publisher = NameServer(access(tmp_path, server, "d3JvbmcgIHdyb25n"), lambda: None)
        with pytest.raises(ProviderError, match=r"127\.0\.0\.1 port \d+"):
            publisher.change("example.net", None, ("a.example.net", 60, Data("A", "192.0.2.1")))
        assert server.signed == []


def test_a_name_server_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="make rehearsal"):
        NameServer(tmp_path / "dns.json", lambda: None).zones()
    with knot() as server:
        path = access(tmp_path, server)
    with pytest.raises(ProviderError, match="Connection refused"):
        NameServer(path, lambda: None).records("example.net", "example.net")


def test_nothing_is_sent_where_it_could_lead_out(tmp_path: Path) -> None:
    def guard() -> None:
        raise RehearsalError("there is a way out")

    with knot() as server:
        publisher = NameServer(access(tmp_path, server), guard)
        with pytest.raises(RehearsalError):
            publisher.change("example.net", None, ("a.example.net", 60, Data("A", "192.0.2.1")))
        with pytest.raises(RehearsalError):
            publisher.records("example.net", "a.example.net")
        assert server.signed == []
