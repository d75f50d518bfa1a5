"""Site data that CHANGE-8 spoils: each case is wrong where it says, in every layout."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from mailsite.loader import SiteError, load_platform
from mailsite.model import Host, Platform, Role
from verify import change

SITES = Path(__file__).parents[2] / "sites"


@dataclass(frozen=True)
class Context:
    """What the cases are made from."""

    site: Path

    @cached_property
    def platform(self) -> Platform:
        return load_platform(self.site)

    @property
    def members(self) -> tuple[Host, ...]:
        return self.platform.members(Role.SMTP_OUT)


def in_blocks(site: Path, folder: Path) -> Path:
    """A copy of a site whose topology has no braces and brackets."""
    copy = Path(shutil.copytree(site, folder / site.name))
    yaml = YAML()
    data = yaml.load(copy / "topology.yaml")
    nodes: list[Any] = [data]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict | list):
            node.fa.set_block_style()  # type: ignore[union-attr]
            nodes += node.values() if isinstance(node, dict) else node
    yaml.dump(data, copy / "topology.yaml")
    return copy


@pytest.mark.parametrize("blocks", [False, True], ids=["as it is", "in blocks"])
@pytest.mark.parametrize("name", ["example", "prod"])
def test_every_case_is_refused_where_it_is_wrong(name: str, blocks: bool, tmp_path: Path) -> None:
    site = in_blocks(SITES / name, tmp_path) if blocks else SITES / name
    cases = change.spoilers(Context(site))  # type: ignore[arg-type]
    assert len(cases) == 12
    for number, (what, edit) in enumerate(cases.items()):
        copy = Path(shutil.copytree(site, tmp_path / str(number)))
        file, line = edit(copy)
        with pytest.raises(SiteError) as caught:
            load_platform(copy)
        blamed = [(Path(p.file).name, p.line) for p in caught.value.problems]
        assert (file, line) in blamed, what
