"""The list of checks: ids, order, and which run belongs to whom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from verify.checks import MODULES, checks
from verify.context import Context
from verify.registry import Check, Failed, Mode, Phase, Registry, SelectionError, contract_order

BUILT = {
    *(f"OUT-{n}" for n in range(1, 9)),
    *(f"IN-{n}" for n in range(1, 8)),
    *(f"SPAM-{n}" for n in range(1, 7)),
    *(f"BOX-{n}" for n in range(1, 11)),
    *(f"EDGE-{n}" for n in range(1, 5)),
    *(f"DNS-{n}" for n in range(1, 4)),
    *(f"CLIENT-{n}" for n in range(1, 4)),
    *(f"HOST-{n}" for n in range(1, 7)),
    *("CHANGE-1", "CHANGE-2", "CHANGE-8"),
}


def looks(context: Context) -> str:
    """Looks at something."""
    return "seen"


def test_every_id_of_the_tiers_that_exist_has_a_check() -> None:
    assert {c.id for c in checks.all()} >= BUILT


def test_the_live_and_quick_sets_are_the_contracts() -> None:
    live = {c.id for c in checks.select(Mode.LIVE)}
    quick = {c.id for c in checks.select(Mode.QUICK)}
    assert live & BUILT == {
        *("OUT-1", "OUT-2", "IN-1", "IN-3", "BOX-1", "BOX-6", "DNS-1", "DNS-2", "DNS-3"),
    }
    assert BUILT - quick == {
        *("OUT-5", "SPAM-3", "SPAM-6", "BOX-4", "BOX-8", "BOX-10", "EDGE-1", "EDGE-3"),
        *("CLIENT-2", "HOST-5", "HOST-6", "CHANGE-2"),
    }


def test_every_check_says_in_one_line_what_it_shows() -> None:
    for check in checks.all():
        assert check.title and not check.title.endswith(".")
        assert len(check.title) <= 96


def test_a_check_lives_in_the_module_of_its_section() -> None:
    sections = {"OUT": "smtp_out", "IN": "smtp_in", "EDGE": "nginx_streams", "DNS": "mail_dns"}
    sections |= {"HOST": "host", "CHANGE": "change", "SPAM": "rspamd", "BOX": "maildrop"}
    sections |= {"CLIENT": "null_clients", "WEB": "webmail"}
    sections |= {"CERT": "certificates"}
    for check in checks.all():
        assert check.function.__module__ == f"verify.{sections[check.id.partition('-')[0]]}"


def test_no_module_with_checks_is_forgotten() -> None:
    folder = Path(__file__).resolve().parents[2] / "verify"
    with_checks = {
        path.stem
        for path in folder.glob("*.py")
        if re.search(r"^@check\(", path.read_text("utf-8"), re.MULTILINE)
    }
    assert with_checks == {module.__name__.removeprefix("verify.") for module in MODULES}


def test_checks_that_take_hosts_away_stay_off_those_that_count_on_them() -> None:
    def beside(one: str, other: str) -> bool:
        return not checks[one].clashes(checks[other])

    assert beside("SPAM-3", "BOX-10")
    # Hosts of the filter hold the certificate.
    assert not beside("SPAM-3", "CERT-2")
    # While its seconds are counted no machine boots.
    assert not any(beside("SPAM-6", other) for other in ("BOX-4", "BOX-10", "WEB-3", "CERT-2"))
    assert not any(beside("BOX-10", other) for other in ("BOX-8", "WEB-3", "EDGE-1", "EDGE-3"))
    assert all(checks[i].is_exclusive for i in ("CLIENT-2", "HOST-5", "HOST-6", "CHANGE-2"))


def test_disruptive_checks_come_last_and_each_phase_is_in_the_contracts_order() -> None:
    registry = Registry()
    registry.check("EDGE-1", disruptive=True)(looks)
    registry.check("CHANGE-1", still=True)(looks)
    registry.check("HOST-4", alone=True)(looks)
    registry.check("OUT-10")(looks)
    registry.check("DNS-1")(looks)
    registry.check("OUT-2")(looks)
    registry.check("BOX-1", disturbs=("maildrop",))(looks)
    registry.check("OUT-6", disturbs=("smtp_out",))(looks)
    registry.check("DNS-2", calm=True, live=True)(looks)
    assert [c.id for c in registry.all()] == [
        "OUT-2", "OUT-10", "DNS-1", "OUT-6", "BOX-1", "DNS-2", "CHANGE-1", "HOST-4", "EDGE-1",
    ]  # fmt: skip
    assert registry["EDGE-1"].phase is Phase.DISRUPTIVE


def test_an_id_has_one_check() -> None:
    registry = Registry()
    registry.check("OUT-1")(looks)
    with pytest.raises(ValueError, match=r"OUT-1 has a check already: .*looks"):
        registry.check("OUT-1")(looks)


@pytest.mark.parametrize("identifier", ["OUT", "OUT-0", "out-1", "MAIL-1", "OUT-1a", ""])
def test_an_id_is_one_of_the_contracts(identifier: str) -> None:
    with pytest.raises(ValueError, match="no id of the contract"):
        Registry().check(identifier)


def test_a_check_without_a_title_is_refused() -> None:
    def silent(context: Context) -> str:
        return ""

    with pytest.raises(ValueError, match="needs a docstring"):
        Registry().check("OUT-1")(silent)


@pytest.mark.parametrize(
    "how", [{"still": True}, {"alone": True}, {"disruptive": True}, {"disturbs": ["rspamd"]}]
)
def test_what_disturbs_is_not_for_a_live_platform(how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must not disturb"):
        Registry().check("OUT-1", live=True, **how)


def test_only_some_ids_are_selected_in_the_order_of_a_run() -> None:
    registry = Registry()
    for identifier in ("OUT-1", "OUT-2", "OUT-3"):
        registry.check(identifier)(looks)
    assert [c.id for c in registry.select(Mode.QUICK, ["OUT-3", "OUT-1"])] == ["OUT-1", "OUT-3"]
    with pytest.raises(SelectionError, match="no check 'OUT-9'; there are: OUT-1 OUT-2 OUT-3"):
        registry.select(Mode.ALL, ["OUT-9"])


def test_a_live_run_refuses_what_is_not_live_even_when_it_is_named() -> None:
    registry = Registry()
    registry.check("EDGE-1", disruptive=True)(looks)
    with pytest.raises(SelectionError, match="EDGE-1: not for a live platform"):
        registry.select(Mode.LIVE, ["EDGE-1"])


def test_sections_are_sorted_as_in_the_contract() -> None:
    ids = ["HA-1", "CHANGE-8", "OUT-7", "EDGE-1", "IN-1"]
    assert sorted(ids, key=contract_order) == ["OUT-7", "IN-1", "EDGE-1", "CHANGE-8", "HA-1"]


def test_failed_is_no_assertion_that_python_may_drop() -> None:
    assert not issubclass(Failed, AssertionError)
    assert Check("OUT-1", looks, False, False, Phase.TOGETHER).title == "Looks at something"
