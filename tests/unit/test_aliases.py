"""Postfix's virtual tables: what they hold, and what Postfix makes of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mailsite import inbound_rules
from mailsite.aliases import (
    DISCARD_ADDRESS,
    Directory,
    Entry,
    limited_addresses,
    main_address,
    route,
    virtual_aliases,
    virtual_domains,
)
from mailsite.loader import load_platform
from mailsite.model import Mailbox, MailboxTarget, MailDomain, Nowhere, Platform

EXAMPLE = load_platform(Path(__file__).parents[2] / "sites" / "example")
PROD = load_platform(Path(__file__).parents[2] / "sites" / "prod")
BOTH = pytest.mark.parametrize("platform", [EXAMPLE, PROD], ids=lambda p: p.name)

Addresses = Mapping[str, str | list[str]]


def with_domains(domains: Mapping[str, MailDomain]) -> Platform:
    return EXAMPLE.model_copy(update={"domains": dict(domains)})


def domain(name: str, addresses: Addresses | None = None, **more: object) -> MailDomain:
    data = {"name": name, "addresses": dict(addresses or {}), **more}
    return MailDomain.model_validate(data)


def platform_of(*domains: MailDomain) -> Platform:
    return with_domains({d.name: d for d in domains})


# -- what Postfix does with a table -----------------------------------------------------------


def look_up(table: Mapping[str, tuple[str, ...]], address: str) -> tuple[str, ...] | None:
    """One lookup as virtual(5) describes it: the address, then without extension, then @domain.

    An extension that was cut off is put on the results (propagate_unmatched_extensions); a
    catch-all swallows it.
    """
    local, _, name = address.rpartition("@")
    if address in table:
        return table[address]
    user, plus, extension = local.partition("+")
    if plus and f"{user}@{name}" in table:
        found = (target.rpartition("@") for target in table[f"{user}@{name}"])
        return tuple(f"{head}+{extension}@{tail}" for head, _, tail in found)
    return table.get(f"@{name}")


def expand(table: Mapping[str, tuple[str, ...]], address: str) -> set[str]:
    """Everything that mail to ``address`` is sent to, lookups repeated until nothing is found."""
    ends: set[str] = set()
    waiting = [address]
    for _ in range(1000):  # virtual_alias_recursion_limit
        if not waiting:
            return ends
        here = waiting.pop()
        found = look_up(table, here)
        if found is None:
            ends.add(here)
        else:
            waiting += found
    raise AssertionError(f"{address} never ends")


# -- the sites --------------------------------------------------------------------------------


def test_the_tables_of_the_example() -> None:
    assert virtual_domains(EXAMPLE) == ("example.org", "lists.example.net", "office.example.org")
    table = virtual_aliases(EXAMPLE)
    box = "maildrop.hosts.example.org"
    assert table["alice@example.org"] == (f"alice@{box}",)
    assert table["sales@example.org"] == (f"alice+sales@{box}", "bob@example.org")
    assert table["partner@example.org"] == ("someone@partner.example",)
    assert table["noreply@example.org"] == (DISCARD_ADDRESS,)
    assert table["@lists.example.net"] == (f"bob+lists@{box}",)
    assert table["sales@office.example.org"] == ("sales@example.org",)
    assert table["bob@office.example.org"] == (f"alice+office@{box}",)
    assert "@office.example.org" not in table


@BOTH
def test_every_line_is_one_address_in_a_virtual_domain_and_leads_to_addresses(
    platform: Platform,
) -> None:
    domains = virtual_domains(platform)
    for key, targets in virtual_aliases(platform).items():
        assert key.rpartition("@")[2] in domains
        assert targets and all(not t.startswith("@") and t.count("@") == 1 for t in targets)
        assert not any(c.isspace() or c in ',"\\/|:' for c in "".join((key, *targets)))


@BOTH
def test_tables_are_sorted_and_do_not_depend_on_the_order_of_the_files(platform: Platform) -> None:
    lines = list(virtual_aliases(platform).items())
    split = [(k.rpartition("@")[2], k.rpartition("@")[0]) for k, _ in lines]
    assert split == sorted(split)
    assert list(virtual_domains(platform)) == sorted(virtual_domains(platform))
    for order in permutations(platform.domains, len(platform.domains)):
        shuffled = platform.model_copy(
            update={"domains": {name: platform.domains[name] for name in order}}
        )
        assert list(virtual_aliases(shuffled).items()) == lines
        assert virtual_domains(shuffled) == virtual_domains(platform)


@BOTH
def test_all_mail_ends_in_a_known_mailbox_elsewhere_or_nowhere(platform: Platform) -> None:
    table, domains = virtual_aliases(platform), virtual_domains(platform)
    for key in table:
        address = f"somebody{key}" if key.startswith("@") else key
        for end in expand(table, address):
            local, _, name = end.rpartition("@")
            assert name not in domains, f"{address} bounces at {end}"
            if name == platform.maildrop_domain:
                assert local.partition("+")[0] in platform.mailboxes


@BOTH
def test_every_domain_has_postmaster_and_abuse_that_somebody_reads(platform: Platform) -> None:
    table = virtual_aliases(platform)
    for name in virtual_domains(platform):
        for local in ("postmaster", "abuse"):
            assert expand(table, f"{local}@{name}") - {DISCARD_ADDRESS}


# -- kinds of domains -------------------------------------------------------------------------


def test_domains_that_take_no_mail_are_not_there_and_retired_ones_are() -> None:
    table = {"postmaster": "alice", "abuse": "alice"}
    platform = platform_of(
        domain("gone.example.org", receives=False, sends=False),
        domain("old.example.org", table, retired=True),
    )
    assert virtual_domains(platform) == ("old.example.org",)
    assert {k.rpartition("@")[2] for k in virtual_aliases(platform)} == {"old.example.org"}


def test_a_domain_alias_knows_what_its_target_knows_and_no_more() -> None:
    platform = platform_of(
        domain("a.example.org", {"info": "alice+info", "noc": ["alice", "bob"]}),
        domain("b.example.org", alias_of="a.example.org"),
    )
    table = virtual_aliases(platform)
    for local in ("info", "info+y", "info+x", "info+x+y", "noc", "noc+z"):
        assert look_up(table, f"{local}@b.example.org") is not None
        there = expand(table, f"{local}@a.example.org")
        assert expand(table, f"{local}@b.example.org") == there
    for local in ("nobody", "nobody+info", "infox", ""):
        assert look_up(table, f"{local}@b.example.org") is None


def test_an_alias_of_a_domain_that_takes_everything_takes_everything() -> None:
    platform = platform_of(
        domain("a.example.org", {"info": "alice", "*": ["bob+all", "x@partner.example"]}),
        domain("b.example.org", {"info": "bob"}, alias_of="a.example.org"),
    )
    table = virtual_aliases(platform)
    whatever = expand(table, "whatever+x@b.example.org")
    assert whatever == expand(table, "whatever@a.example.org") != set()
    assert expand(table, "info@b.example.org") == {f"bob@{platform.maildrop_domain}"}
    assert expand(table, "info@a.example.org") == {f"alice@{platform.maildrop_domain}"}


def test_a_change_of_one_address_changes_one_line() -> None:
    before = virtual_aliases(EXAMPLE)
    org = EXAMPLE.domains["example.org"]
    target = (MailboxTarget("bob"),)
    changed = org.model_copy(update={"addresses": org.addresses | {"sales": target}})
    after = virtual_aliases(with_domains(EXAMPLE.domains | {"example.org": changed}))
    assert {k for k in before if before[k] != after[k]} == {"sales@example.org"}
    assert list(before) == list(after)


def test_an_extension_reaches_the_mailbox_behind_its_tag() -> None:
    table = virtual_aliases(EXAMPLE)
    assert expand(table, "alice+shop@office.example.org") == {
        f"alice+shop@{EXAMPLE.maildrop_domain}"
    }
    assert expand(table, "sales+shop@example.org") == {
        f"alice+sales+shop@{EXAMPLE.maildrop_domain}",
        f"bob+shop@{EXAMPLE.maildrop_domain}",
    }


def test_nothing_outside_can_be_meant_by_the_address_that_swallows_mail() -> None:
    local, _, name = DISCARD_ADDRESS.rpartition("@")
    assert local and name.rpartition(".")[2] == "invalid"
    assert route(EXAMPLE, Nowhere()) == DISCARD_ADDRESS


# -- any platform -----------------------------------------------------------------------------

LOCALS = ("a", "b", "c", "e.f")
NAMES = ("one.example.org", "two.example.org")
ALIAS = "alias.example.org"

HERE = [f"{p}@{n}" for p in (*LOCALS, "A", "b+y", "b+y", "a+x", "d") for n in (*NAMES, ALIAS)]
ENDS = ["alice", "bob+tag", "/dev/null", "x@elsewhere.example"]
#: As many ends as addresses that lead on. One choice, since most of the time goes into choosing.
TARGETS = st.sampled_from([*HERE, *ENDS * (len(HERE) // len(ENDS))])
TABLES = st.dictionaries(
    st.sampled_from([*LOCALS, "*"]), st.lists(TARGETS, min_size=1, max_size=3, unique=True)
)
OWN = st.dictionaries(st.sampled_from(LOCALS), st.lists(TARGETS, min_size=1, max_size=2))
PROBES = [f"{p}@{n}" for p in (*LOCALS, "d", "a+y", "b+x", "d+x") for n in (*NAMES, ALIAS)]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(one=TABLES, two=TABLES, own=OWN)
def test_what_the_rules_let_pass_postfix_can_deliver(
    one: Addresses, two: Addresses, own: Addresses
) -> None:
    """The directory that judges the site data and Postfix's lookups in the table agree."""
    platform = platform_of(
        domain(NAMES[0], one), domain(NAMES[1], two), domain(ALIAS, own, alias_of=NAMES[0])
    )
    assume(not list(inbound_rules.forwards_within_the_platform_arrive(platform)))
    directory = Directory(platform)
    loops = bool(list(inbound_rules.addresses_do_not_lead_back(platform)))
    table = {k.lower(): tuple(t.lower() for t in v) for k, v in virtual_aliases(platform).items()}
    for probe in PROBES:
        local, _, name = probe.rpartition("@")
        found = directory.find(local, name)
        assert (found is None) == (look_up(table, probe) is None)
        if found is None or loops:
            continue
        ends = expand(table, probe)
        assert not any(end.rpartition("@")[2] in (*NAMES, ALIAS) for end in ends)
        expected = {route(platform, t) for t in directory.outcome(found).ends}
        assert {bare(e) for e in ends} == {bare(e) for e in expected}
        if name == ALIAS and local.partition("+")[0] not in own:
            assert ends == expand(table, f"{local}@{NAMES[0]}")


@settings(max_examples=200, deadline=None)
@given(one=TABLES, two=TABLES)
def test_every_circle_of_addresses_is_found(one: Addresses, two: Addresses) -> None:
    platform = platform_of(domain(NAMES[0], one), domain(NAMES[1], two))
    found = list(inbound_rules.addresses_do_not_lead_back(platform))
    table = {k: tuple(t.lower() for t in v) for k, v in virtual_aliases(platform).items()}
    endless = False
    for key in table:
        try:
            expand(table, f"d{key}" if key.startswith("@") else key)
        except AssertionError:
            endless = True
    assert endless == bool(found)


def bare(address: str) -> str:
    """The address without extensions: they pile up on the way."""
    local, _, name = address.rpartition("@")
    return f"{local.partition('+')[0]}@{name}"


def test_a_long_chain_of_addresses_is_followed_to_its_end() -> None:
    chain = {f"a{n}": f"a{n + 1}@one.example.org" for n in range(5000)}
    platform = platform_of(domain("one.example.org", {**chain, "a5000": "alice"}))
    directory = Directory(platform)
    first = directory.outcome(Entry("one.example.org", "a0"))
    assert (first.ends, first.loop) == ({MailboxTarget("alice")}, ())
    round_ = platform_of(domain("one.example.org", {**chain, "a5000": "a0@one.example.org"}))
    (found,) = inbound_rules.addresses_do_not_lead_back(round_)
    assert found.message.startswith("mail to a0@one.example.org comes back")
    assert len(found.message) < 400


# -- scale ------------------------------------------------------------------------------------

DOMAINS = 5000
PER_DOMAIN = 10


def crowd() -> Platform:
    """5,000 domains with 50,000 addresses; every tenth is an alias of its neighbour."""
    domains = {}
    for number in range(DOMAINS):
        name = f"d{number}.example"
        if number % 10 == 9:
            domains[name] = domain(name, alias_of=f"d{number - 1}.example", sends=False)
            continue
        addresses: dict[str, str | list[str]] = {"postmaster": "alice", "abuse": "alice"}
        for user in range(PER_DOMAIN):
            forward = f"user{user}@elsewhere.example"
            addresses[f"user{user}"] = [f"bob+d{number}", forward] if user % 3 else forward
        domains[name] = domain(name, addresses, sends=False)
    return with_domains({**EXAMPLE.domains, **domains})


def test_five_thousand_domains_are_no_effort() -> None:
    platform = crowd()
    assert sum(len(d.addresses) for d in platform.domains.values()) > 50_000
    start = time.process_time()
    table, domains = virtual_aliases(platform), virtual_domains(platform)
    tables_after = time.process_time() - start
    assert len(table) > 50_000 and len(domains) > 5_000
    assert tables_after < 2
    start = time.process_time()
    for _, function in inbound_rules.BOOK.rules:
        assert not list(function(platform))
    assert time.process_time() - start < 10


# -- mailboxes --------------------------------------------------------------------------------


def with_quotas(*domains: MailDomain, **quotas: str | None) -> Platform:
    boxes = {
        name: Mailbox.model_validate({"name": name, "description": "invented", "quota": quota})
        for name, quota in quotas.items()
    }
    return platform_of(*domains).model_copy(update={"mailboxes": boxes})


def test_smtp_in_asks_about_addresses_of_one_mailbox_that_has_a_quota() -> None:
    addresses: Addresses = {
        "small": "small",
        "tagged": "small+tag",
        "twice": ["small+one", "small+two"],
        "behind": "small@a.example.org",
        "endless": "endless",
        "both": ["small", "endless"],
        "elsewhere": ["small", "friend@partner.example"],
        "gone": "/dev/null",
        "*": "small+rest",
    }
    platform = with_quotas(
        domain("a.example.org", addresses),
        domain("b.example.org", {"own": "small", "tagged": "endless"}, alias_of="a.example.org"),
        small="1 GiB",
        endless=None,
    )
    assert limited_addresses(platform) == (
        "behind@a.example.org",
        "behind@b.example.org",
        "own@b.example.org",
        "small@a.example.org",
        "small@b.example.org",
        "tagged@a.example.org",
        "twice@a.example.org",
        "twice@b.example.org",
    )


def test_the_main_address_is_the_one_written_like_the_mailbox_at_home_first() -> None:
    elsewhere = domain("a.example.org", {"first": "box", "box": "box"})
    assert main_address(platform_of(elsewhere), "box") == "box@a.example.org"
    home = domain(EXAMPLE.domain, {"first": "box", "box": "box+tag"})
    assert main_address(platform_of(elsewhere, home), "box") == f"box@{EXAMPLE.domain}"
    unlike = domain("a.example.org", {"*": "box", "one": "box", "two": "box"})
    assert main_address(platform_of(unlike), "box") == "one@a.example.org"
    assert main_address(platform_of(domain("a.example.org", {"*": "box"})), "box") is None
