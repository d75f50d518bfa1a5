"""Rules that span several objects: each one can fail, and none fails for another's fault."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path

import pytest
import spf  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from mailsite import inbound_rules, loader, mailbox_rules, rules
from mailsite.loader import SiteError, load_platform
from mailsite.model import Platform, Role
from mailsite.rulebook import Rule, RuleBook, closest
from tests.unit.test_loader import EXAMPLE, cases, patch

PROD = EXAMPLE.parent / "prod"


@pytest.mark.parametrize("folder", [EXAMPLE, PROD], ids=lambda f: f.name)
def test_good_sites_break_no_rule(folder: Path) -> None:
    assert rules.check(load_platform(folder)) == []


def test_every_rule_is_broken_by_some_bad_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: set[str] = set()
    books = (rules, inbound_rules, mailbox_rules)
    original = [entry for book in books for entry in book.BOOK.rules]

    def watch(function: Rule) -> Rule:
        def watched(platform: Platform):  # type: ignore[no-untyped-def]
            for finding in function(platform):
                broken.add(function.__name__)
                yield finding

        return watched

    for book in books:
        watched = [(whole, watch(f)) for whole, f in book.BOOK.rules]
        monkeypatch.setattr(book, "BOOK", RuleBook(watched))
    for number, case in enumerate([*cases("rules"), *cases("inbound"), *cases("mailboxes")]):
        folder = Path(shutil.copytree(EXAMPLE, tmp_path / str(number)))
        for change in case["patch"] if isinstance(case["patch"], list) else [case["patch"]]:
            patch(folder, change)
        with pytest.raises(SiteError):
            load_platform(folder)
    assert broken == {f.__name__ for _, f in original}


def test_rules_need_no_part_that_is_not_named() -> None:
    """With any one or two parts of the data gone, the other rules still run, and find nothing."""
    platform = load_platform(PROD)
    values = {name: getattr(platform, name) for name in Platform.model_fields}
    collections = loader.COLLECTIONS
    for gone in combinations(Platform.model_fields, 2):
        left = {
            k: ({} if k in collections else None) if k in gone else v for k, v in values.items()
        }
        for name in set(gone) - collections:
            del left[name]
        assert rules.check(Platform.model_construct(**left), frozenset(gone)) == [], gone


class TestClaims:
    """Two roles that want one path."""

    @settings(max_examples=40, deadline=None)
    @given(roles=st.lists(st.sampled_from(list(Role)), min_size=1, max_size=4, unique=True))
    def test_a_conflict_is_found_whatever_the_order(self, roles: list[Role]) -> None:
        platform = load_platform(EXAMPLE)
        name = next(iter(platform.hosts))
        host = platform.hosts[name].model_copy(update={"roles": tuple(roles)})
        changed = platform.model_copy(update={"hosts": {**platform.hosts, name: host}})
        found = list(rules.roles_do_not_claim_one_path(changed))
        owners = [r for r in roles if r in (Role.SMTP_OUT, Role.SMTP_IN, Role.MAILDROP)]
        assert len(found) == len(list(combinations(owners, 2)))

    def test_one_finding_per_pair_of_roles(self) -> None:
        """smtp-out and maildrop collide on two paths: one error, not two."""
        platform = load_platform(EXAMPLE)
        name = next(iter(platform.hosts))
        host = platform.hosts[name].model_copy(update={"roles": (Role.MAILDROP, Role.SMTP_OUT)})
        changed = platform.model_copy(update={"hosts": {**platform.hosts, name: host}})
        assert len(list(rules.roles_do_not_claim_one_path(changed))) == 1


GOOD_TERMS = [
    "ip4:192.0.2.0/24",
    "ip4:192.0.2.1",
    "-ip4:192.0.2.1",
    "ip6:2001:db8::/32",
    "include:_spf.example.net",
    "?include:example.net",
    "a",
    "mx",
    "a/24",
    "a:mail.example.net/24//64",
    "mx:example.net",
    "exists:%{i}._spf.example.net",
    "exists:%{ir}.%{v}._spf.%{d2}",
]

BAD_TERMS = [
    "",
    "192.0.2.0/24",
    "ip4:192.0.2.0/33",
    "ip4:192.0.2.1/24",
    "ip4:2001:db8::1",
    "ip6:192.0.2.1",
    "ipv4:192.0.2.1",
    "include",
    "include:",
    "include: example.net",
    "includes:example.net",
    "a:",
    "a:1",
    "mx:192.0.2.1",
    "include:localhost",
    "exists",
    "mx:example.net mx",
    "all",
    "-all",
    "v=spf1",
    "redirect=example.net",
    "ptr",
    "ptr:example.net",
    "a:ex\x00ample.net",
    "include:%{x}.example.net",
]


class TestSpfTerms:
    @pytest.mark.parametrize("term", GOOD_TERMS)
    def test_a_good_term_is_taken_here_and_by_pyspf(self, term: str) -> None:
        assert rules.spf_term_fault(term) is None
        spf.query("192.0.2.1", "user@example.org", "example.org").validate_mechanism(term)

    @pytest.mark.parametrize("term", BAD_TERMS)
    def test_a_bad_term_is_told_with_a_remedy(self, term: str) -> None:
        fault = rules.spf_term_fault(term)
        assert fault is not None and all(fault)

    @settings(max_examples=100, deadline=None)
    @given(term=st.text(alphabet="aimxncludep46:/.%{}-~12 v=", max_size=14))
    def test_whatever_is_taken_pyspf_takes_too(self, term: str) -> None:
        if rules.spf_term_fault(term) is None:
            spf.query("192.0.2.1", "user@example.org", "example.org").validate_mechanism(term)

    @pytest.mark.parametrize(
        ("terms", "lookups"),
        [
            ((), 0),
            (("ip4:192.0.2.1", "ip6:2001:db8::1"), 0),
            (("a", "mx", "a:x.example", "a/24", "mx//64"), 5),
            (("include:a.example", "?exists:b.example"), 2),
            (("exp=explain.example",), 0),
        ],
    )
    def test_lookups(self, terms: tuple[str, ...], lookups: int) -> None:
        assert rules.spf_lookups(terms) == lookups


def test_a_misspelt_word_finds_the_nearest_or_all() -> None:
    assert closest("gatway", ["prefix", "gateway"]) == "did you mean 'gateway'?"
    assert closest("zzz", ["prefix", "gateway"]) == "known are: prefix, gateway"
    assert closest("zzz", []) == "there is none yet"


def test_of_many_known_words_a_few_are_shown() -> None:
    told = closest("zzz", [f"name{n}" for n in range(5000)])
    assert told.startswith("known are 5000, among them name0, name1") and len(told) < 150
