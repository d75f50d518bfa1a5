"""Site data on disk: what loads, and how each thing that is wrong is told to the operator."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mailsite.loader import PARTS, SiteError, load_platform, load_site
from mailsite.model import Platform
from tests.site_data import read, write

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "sites" / "example"
BAD_SITES = Path(__file__).parent / "bad_sites"

Case = dict[str, Any]


def cases(kind: str = "*") -> list[Case]:
    """The bad sites of one file of ``bad_sites/``, or of all."""
    return [case for path in sorted(BAD_SITES.glob(f"{kind}.yaml")) for case in read(path)]


CASES = cases()


def patch(folder: Path, change: Case) -> None:
    """Apply one change to the copy of the example site; it must fit in exactly one place."""
    path = folder / change["file"]
    if change.get("remove"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif "write" in change:
        path.write_text(change["write"])
    elif "write_crowd" in change:
        crowd = "".join(f"  - user{n}@partner.example\n" for n in range(change["write_crowd"]))
        path.write_text(
            f"sends: false\naddresses:\n postmaster: bob\n abuse: bob\n everybody:\n{crowd}"
        )
    elif "write_open_brackets" in change:
        path.write_text("[" * change["write_open_brackets"])
    elif "write_hex" in change:
        path.write_bytes(bytes.fromhex(change["write_hex"]))
    elif "replace_line" in change:
        lines = path.read_text().splitlines(keepends=True)
        hits = [n for n, line in enumerate(lines) if line.startswith(change["replace_line"])]
        assert len(hits) == 1, hits
        lines[hits[0]] = change["by"]
        path.write_text("".join(lines))
    else:
        text = path.read_text()
        # A unique text, or the first of several that a longer one would not tell apart.
        assert change["replace"] in text, f"{change['replace']!r} is not in {change['file']}"
        path.write_text(text.replace(change["replace"], change["by"], 1))


def expected_line(folder: Path, expect: Case) -> int:
    if "line" in expect:
        return int(expect["line"])
    text: str = (folder / expect["file"]).read_text()
    if "line_of_after" in expect:
        first, then = expect["line_of_after"]
        at: int = text.index(then, text.index(first))
    elif "line_of_last" in expect:
        at = text.rindex(expect["line_of_last"])
    else:
        at = text.index(expect["line_of"])
    return text.count("\n", 0, at) + 1


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A copy of the example site, to be damaged."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "site"))


def problems(folder: Path) -> tuple[Any, ...]:
    with pytest.raises(SiteError) as caught:
        load_platform(folder)
    return caught.value.problems


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_a_bad_site_is_told_by_file_line_and_remedy(case: Case, site: Path) -> None:
    changes = case["patch"] if isinstance(case["patch"], list) else [case["patch"]]
    for change in changes:
        patch(site, change)
    expect = case["expect"]
    file, line = str(site / expect["file"]), None
    if (site / expect["file"]).is_file():
        line = expected_line(site, expect)

    found = problems(site)

    hits = [p for p in found if expect["says"] in p.message and expect["remedy"] in p.remedy]
    assert [(p.file, p.line) for p in hits[:1]] == [(file, line or 0)], "\n".join(map(str, found))
    if not expect.get("more"):
        assert found == (hits[0],), "one fault gives one error"
    told = "\n".join(f"{p} {p!r}" for p in found)
    if "never_says" in case:
        assert case["never_says"] not in told
    assert "pydantic" not in told and "Input should" not in told


def test_there_are_enough_bad_sites() -> None:
    names = [c["name"] for c in CASES]
    assert len(names) == len(set(names)) >= 30


def test_the_undamaged_copy_loads(site: Path) -> None:
    assert load_platform(site) == load_platform(EXAMPLE)


def test_a_problem_reads_as_one_line_with_file_line_and_remedy(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(site, {"file": "site.yaml", "replace": "tls: dane", "by": "tls: dnae"})
    monkeypatch.chdir(site.parent)
    (problem,) = problems(Path("site"))
    assert str(problem) == (
        f"site/site.yaml:{problem.line}: outbound > tls: 'dnae' is no TLS level; "
        "write one of may, dane, encrypt (did you mean 'dane'?)"
    )
    assert (problem.value, problem.file) == ("dnae", "site/site.yaml")


def test_all_problems_are_told_at_once_in_order_of_files_and_lines(site: Path) -> None:
    """Syntax, model and rules: a problem of one kind hides none of another."""
    patch(site, {"file": "sasl_users.yaml", "replace": "bob:", "by": "alice:"})
    patch(site, {"file": "site.yaml", "replace": "tls: dane", "by": "tls: dnae"})
    patch(site, {"file": "topology.yaml", "replace": "198.51.100.11", "by": "198.51.100.311"})
    patch(site, {"file": "topology.yaml", "replace": "198.51.100.12", "by": "198.51.100.13"})
    patch(site, {"file": "domains/example.com.yaml", "write": "sends: false\nzone: org\n"})
    found = problems(site)
    assert [Path(p.file).name for p in found] == [
        "example.com.yaml",
        "sasl_users.yaml",
        "site.yaml",
        "topology.yaml",
        "topology.yaml",
    ]
    assert list(found) == sorted(found)
    assert "belongs to host 'in1.hosts.example.org' already" in found[-1].message


def test_a_host_that_cannot_be_read_causes_no_second_error(site: Path) -> None:
    """Not: "no host has the role", "primary is no member", "no key", ..."""
    text = (site / "topology.yaml").read_text()
    (site / "topology.yaml").write_text(text.replace("roles: [smtp-out]", "roles: [smtp-oout]"))
    assert [p.value for p in problems(site)] == ["smtp-oout", "smtp-oout"]


@pytest.mark.parametrize("part", [p for parts in PARTS.values() for p in parts])
def test_a_broken_part_never_raises_anything_else(part: str, site: Path) -> None:
    """Every part replaced by nonsense, and taken away: the loader still reports it properly."""
    optional = ("egress", "dmarc", "probe", "site_local", "spam", "upgrades", "certificates")
    for file, parts in PARTS.items():
        if part not in parts:
            continue
        content = read(site / file)
        content[part] = "nonsense/"
        write(site / file, content)
        assert problems(site)[0].file == str(site / file)
        del content[part]
        write(site / file, content)
        if part in optional:
            load_platform(site)
        else:
            assert any(f"'{part}' is missing" in p.message for p in problems(site))


def test_a_missing_folder_is_one_clear_error(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path / "nowhere")
    assert "folder does not exist" in str(problem) and str(tmp_path / "nowhere") in str(problem)


def test_readme_and_backup_files_are_left_alone(site: Path) -> None:
    for name in ("README.md", ".hidden", "site.yaml~", "domains/.x.yaml.swp"):
        (site / name).write_text("anything: [")
    load_platform(site)


def test_a_file_that_cannot_be_read_is_told(site: Path) -> None:
    (site / "site.yaml").unlink()
    (site / "site.yaml").mkdir()
    (problem,) = problems(site)
    assert "is a directory" in problem.message


def test_yaml_1_2_words_are_texts(site: Path) -> None:
    """`no` and `on` are texts in YAML 1.2, and 1e1 is no login in disguise."""
    (site / "sasl_users.yaml").write_text(
        "no: {description: on}\n1e1: {description: '12:30'}\nmail: {description: ours}\n"
    )
    patch(site, {"file": "site.yaml", "replace": "sasl_user: webmail", "by": "sasl_user: no"})
    users = load_platform(site).sasl_users
    assert list(users) == ["no", "1e1", "mail"]
    assert users["no"].description == "on"


def test_keys_become_names(site: Path) -> None:
    platform = load_platform(site)
    assert all(h.name == key for key, h in platform.hosts.items())
    assert all(d.name == key for key, d in platform.domains.items())
    assert all(u.name == key for key, u in platform.sasl_users.items())


def test_an_anchor_can_be_used_twice(site: Path) -> None:
    patch(
        site,
        {
            "file": "sasl_users.yaml",
            "replace": "description: person",
            "by": "description: &p person",
        },
    )
    patch(
        site,
        {"file": "sasl_users.yaml", "replace": "description: all servers", "by": "description: *p"},
    )
    assert load_platform(site).sasl_users["servers"].description == "person"


class TestWorld:
    """The overlay that says what the outside looks like."""

    def test_yaml_and_json_overlays(self, site: Path, tmp_path: Path) -> None:
        overlay = tmp_path / "world.yaml"
        for text in ("trust_anchors: ['. DS 1']\n", '{"trust_anchors": [". DS 1"]}'):
            overlay.write_text(text)
            assert load_platform(site, overlay).world.trust_anchors == (". DS 1",)
        assert load_platform(site).world.trust_anchors == ()

    def test_a_bad_overlay_is_told_by_its_own_file(self, site: Path, tmp_path: Path) -> None:
        overlay = tmp_path / "world.yaml"
        overlay.write_text("ca_certificates: []\ntrust_anchor: []\n")
        with pytest.raises(SiteError) as caught:
            load_platform(site, overlay)
        (problem,) = caught.value.problems
        assert (problem.file, problem.line) == (str(overlay), 2)
        assert problem.remedy == "did you mean 'trust_anchors'?"

    def test_a_missing_overlay_is_told(self, site: Path, tmp_path: Path) -> None:
        with pytest.raises(SiteError, match="does not exist"):
            load_platform(site, tmp_path / "none.yaml")


class TestSource:
    """Where a value comes from, for errors that are found long after loading."""

    def test_values_are_traced_to_file_and_line(self, site: Path) -> None:
        source = load_site(site).source
        text = (site / "topology.yaml").read_text().splitlines()
        file, line = source.where("hosts", "box2.hosts.example.org", "interfaces", 0, "ipv4")
        assert file == str(site / "topology.yaml")
        assert text[line - 1].strip() == "ipv4: 198.51.100.78"
        file, line = source.where("hosts", "box2.hosts.example.org", "login")
        assert text[line - 1].strip() == "box2.hosts.example.org:"

    def test_domains_and_logins_too(self, site: Path) -> None:
        source = load_site(site).source
        file, line = source.where("domains", "lists.example.net", "dkim", 1, "selector")
        assert Path(file).name == "lists.example.net.yaml"
        assert "s2025" in Path(file).read_text().splitlines()[line - 1]
        file, line = source.where("sasl_users", "bob", "suspended")
        assert "suspended" in Path(file).read_text().splitlines()[line - 1]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(alphabet=st.sampled_from("ab:-#'\"[]{}\n \t&*!|>%@`?,\0\u2028é0"), max_size=60))
def test_no_text_makes_the_loader_crash(text: str, site: Path) -> None:
    (site / "sasl_users.yaml").write_text(text)
    try:
        load_platform(site)
    except SiteError as error:
        assert error.problems


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.just([[[]]]),
    st.just({"a": {"b": 1}}),
)


def leaves(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every location in a tree of mappings and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    found = []
    for key, value in items:
        found.append((*at, key))
        if isinstance(value, dict | list):
            found += leaves(value, (*at, key))
    return found


MUTATED = (*PARTS, "mailboxes.yaml", "domains/example.org.yaml", "domains/office.example.org.yaml")


def _mutator() -> Callable[[Path, str, int, Any], None]:
    originals = {f: read(EXAMPLE / f) for f in MUTATED}

    def mutate(site: Path, file: str, choice: int, value: Any) -> None:
        content = copy.deepcopy(originals[file])
        places = leaves(originals[file])
        *path, last = places[choice % len(places)]
        here = content
        for step in path:
            here = here[step]
        here[last] = value
        write(site / file, content)

    return mutate


MUTATE = _mutator()


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(file=st.sampled_from(MUTATED), choice=st.integers(0, 10_000), value=SCALARS)
def test_no_value_makes_the_loader_crash(file: str, choice: int, value: Any, site: Path) -> None:
    """Any value replaced by nonsense: a platform, or problems that name a file and a line."""
    for name in MUTATED:
        shutil.copy(EXAMPLE / name, site / name)
    MUTATE(site, file, choice, value)
    try:
        platform = load_platform(site)
    except SiteError as error:
        for problem in error.problems:
            assert problem.file and problem.line and problem.message and problem.remedy, problem
    else:
        assert isinstance(platform, Platform)
