"""What checks expect to become of mail, and the relay attempts that they make."""

from __future__ import annotations

from pathlib import Path

import pytest

from mailsite.aliases import DISCARD_DOMAIN, virtual_aliases
from mailsite.loader import load_platform
from mailsite.model import CATCH_ALL, MailDomain, Platform
from verify import addresses
from verify.relay import STRANGER, attempts
from verify.smtp_in import first_answer

SITES = Path(__file__).parents[2] / "sites"
VALUES = {
    "victim": "user@there.invalid",
    "user": "user",
    "there": "there.invalid",
    "ours": "ours.invalid",
    "known": "known",
    "mx": "mx.invalid",
    "member": "member.invalid",
    "srs": "srs.invalid",
    "internal": "inside.invalid",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
}


@pytest.fixture(scope="module")
def site() -> Platform:
    return load_platform(SITES / "example")


def with_domain(site: Platform, name: str, **fields: object) -> Platform:
    domain = MailDomain.model_validate({"name": name, **fields})
    return site.model_copy(update={"domains": {**site.domains, name: domain}})


@pytest.mark.parametrize(
    ("address", "mailboxes", "forwards"),
    [
        ("alice@{d}", {"alice@{b}"}, set()),
        ("ALICE@{d}", {"alice@{b}"}, set()),
        ("alice+x@{d}", {"alice+x@{b}"}, set()),
        ("postmaster+x@{d}", {"alice+postmaster+x@{b}"}, set()),
        ("sales@{d}", {"alice+sales@{b}", "bob@{b}"}, set()),
        ("partner@{d}", set(), {"someone@partner.example"}),
        ("partner+x@{d}", set(), {"someone+x@partner.example"}),
        ("noreply@{d}", set(), set()),
        ("bob@{a}", {"alice+office@{b}"}, set()),
        ("alice+x@{a}", {"alice+x@{b}"}, set()),
        ("whoever+x@{c}", {"bob+lists@{b}"}, set()),
    ],
)
def test_where_mail_ends(
    site: Platform, address: str, mailboxes: set[str], forwards: set[str]
) -> None:
    alias = next(d.name for d in site.domains.values() if d.alias_of)
    catches = next(d.name for d in site.domains.values() if CATCH_ALL in d.addresses)
    names = {"d": site.domain, "a": alias, "c": catches, "b": site.maildrop_domain}
    found = addresses.way(site, address.format(**names))
    assert found is not None
    assert found.mailboxes == {m.format(**names) for m in mailboxes}
    assert found.forwards == forwards


def test_who_does_not_exist(site: Platform) -> None:
    alias = next(d.name for d in site.domains.values() if d.alias_of)
    for domain in (site.domain, alias, "elsewhere.invalid"):
        assert addresses.way(site, f"nobody@{domain}") is None
    closed = with_domain(site, "held.invalid", receives=False, addresses={"x": "alice"})
    assert addresses.way(closed, "x@held.invalid") is None


@pytest.mark.parametrize("name", ["example", "prod"])
def test_the_tables_say_the_same(name: str) -> None:
    """Two ways of reading the site data, neither of which knows the other."""
    site = load_platform(SITES / name)
    table = virtual_aliases(site)

    def ends(address: str) -> set[str]:
        if address not in table:
            return set() if address.endswith(f"@{DISCARD_DOMAIN}") else {address}
        return {end for target in table[address] for end in ends(target)}

    for address in table:
        if not address.startswith("@"):
            found = addresses.way(site, address)
            assert found is not None
            assert found.mailboxes | found.forwards == ends(address), address


def test_there_are_a_hundred_ways_to_ask_a_server_to_relay() -> None:
    found = [attempt.filled(VALUES) for attempt in attempts()]
    assert len(found) >= 100
    assert len(set(found)) == len(found)
    assert (STRANGER, "USER@THERE.INVALID") in found
    assert ("", "user%there.invalid@ours.invalid") in found
    sorts = {attempt.sort for attempt in attempts()}
    assert {"percent_hack", "quoted", "source_routes", "bang_paths", "forged_srs"} <= sorts


def test_an_attempt_with_an_unknown_name_is_an_error() -> None:
    attempt = attempts()[0]
    with pytest.raises(KeyError):
        attempt.filled({})


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        ("127.0.0.[2..11]", "127.0.0.2"),
        ("127.0.[1;3].2", "127.0.1.2"),
        ("127.0.0.4", "127.0.0.4"),
    ],
)
def test_an_answer_that_counts(pattern: str, first: str) -> None:
    assert first_answer(pattern) == first
