"""The block lists of the outside world."""

from __future__ import annotations

from ipaddress import ip_address

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest

from rehearsal.world.lists import Lists
from rehearsal.world.world import Listed

ZONE = "bl.invented.example."
OTHER = "deep.bl.invented.example."


@pytest.fixture
def lists() -> Lists:
    found = Lists("lists.dns.example", (ZONE, OTHER))
    found.obey(
        {ZONE: {"mode": "answer", "entries": {"2.0.0.127": ["127.0.0.2", "127.0.0.4"]}}},
    )
    return found


def ask(lists: Lists, name: str, kind: str = "A") -> dns.message.Message:
    reply = lists.answer(dns.message.make_query(name, kind))
    assert reply is not None
    return reply


def test_who_is_listed_gets_the_answers_and_a_text(lists: Lists) -> None:
    reply = ask(lists, f"2.0.0.127.{ZONE}")
    assert reply.flags & dns.flags.AA
    assert sorted(r.to_text() for r in reply.answer[0]) == ["127.0.0.2", "127.0.0.4"]
    assert "127.0.0.2" in ask(lists, f"2.0.0.127.{ZONE}", "TXT").answer[0][0].to_text()
    assert not ask(lists, f"2.0.0.127.{ZONE}", "AAAA").answer


def test_letters_of_either_case_are_the_same(lists: Lists) -> None:
    lists.obey({ZONE: {"mode": "answer", "entries": {"Spam.Example": ["127.0.1.2"]}}})
    assert ask(lists, f"sPAM.example.{ZONE}").answer


@pytest.mark.parametrize(
    ("name", "rcode"),
    [
        ("3.0.0.127.", dns.rcode.NXDOMAIN),
        ("12.0.0.127.", dns.rcode.NXDOMAIN),
        ("1.2.0.0.127.", dns.rcode.NXDOMAIN),
        ("0.127.", dns.rcode.NOERROR),  # a name above an entry exists (RFC 8020)
        ("", dns.rcode.NOERROR),
    ],
)
def test_who_is_not_listed(lists: Lists, name: str, rcode: dns.rcode.Rcode) -> None:
    reply = ask(lists, f"{name}{ZONE}")
    assert (reply.rcode(), reply.answer) == (rcode, [])
    assert reply.authority[0].rdtype == dns.rdatatype.SOA
    assert reply.authority[0].ttl == 1


def test_the_zone_itself(lists: Lists) -> None:
    assert ask(lists, ZONE, "SOA").answer
    assert ask(lists, ZONE, "NS").answer[0][0].to_text() == "lists.dns.example."


def test_the_longest_zone_answers(lists: Lists) -> None:
    assert ask(lists, f"2.0.0.127.{OTHER}").rcode() == dns.rcode.NXDOMAIN
    assert ask(lists, "2.0.0.127.example.").rcode() == dns.rcode.REFUSED


def test_a_dead_list_fails_or_says_nothing_and_the_others_go_on(lists: Lists) -> None:
    lists.obey({ZONE: {"mode": "fail", "entries": {}}})
    assert ask(lists, f"2.0.0.127.{ZONE}").rcode() == dns.rcode.SERVFAIL
    lists.obey({ZONE: {"mode": "silent", "entries": {}}})
    assert lists.answer(dns.message.make_query(f"2.0.0.127.{ZONE}", "A")) is None
    assert ask(lists, f"2.0.0.127.{OTHER}").rcode() == dns.rcode.NXDOMAIN
    lists.obey({})
    assert ask(lists, f"2.0.0.127.{ZONE}").rcode() == dns.rcode.NXDOMAIN


@pytest.mark.parametrize(
    ("what", "name"),
    [
        (ip_address("198.51.100.7"), "7.100.51.198"),
        (
            ip_address("2001:db8::1"),
            "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2",
        ),
        ("Spammer.Example.", "spammer.example"),
    ],
)
def test_names_of_entries(what: object, name: str) -> None:
    assert Listed(ZONE, what, ("127.0.0.2",)).name == name  # type: ignore[arg-type]
