"""The graphs that the tests look at, each built once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from mailsite.loader import load_platform
from mailsite.model import Platform
from mailsite.secrets import required

from .graph import MARK, ROOT, Graph, build

SITES = ("example", "prod")


def stack_config(site: str) -> dict[str, Any]:
    """The committed file of the stack of ``site``, by key without the project's name."""
    file = YAML(typ="safe").load(ROOT / f"Pulumi.{site}.yaml")
    return {key.removeprefix("mail:"): value for key, value in file["config"].items()}


@cache
def certified(site: str) -> frozenset[str]:
    """The names that some host of the committed site must prove to be."""
    platform = load_platform(ROOT / site)
    wanted = {name for host in platform.hosts.values() for name in required(platform, host)}
    return frozenset(name.split("/")[1] for name in wanted if name.startswith("certificate/"))


def live_config(stack: str, /, **changes: Any) -> dict[str, Any]:
    """What the operator of a live platform has set, with marked secrets."""
    config = stack_config(stack)
    certificate = {"chain": "-----BEGIN CERTIFICATE-----", "key": f"-----BEGIN KEY----- {MARK}"}
    return config | {
        "live": "true",
        "deployKey": f"KEY {MARK}",
        "certificates": dict.fromkeys(sorted(certified(config["site"])), certificate),
        **changes,
    }


@pytest.fixture(scope="session")
def graphs() -> Callable[[str, bool], Graph]:
    """Build the graph of a site, as an update or as a first preview; each only once."""
    built: dict[tuple[str, bool], Graph] = {}

    def get(site: str, preview: bool) -> Graph:
        if (site, preview) not in built:
            built[site, preview] = build(live_config(site), preview=preview)
        return built[site, preview]

    return get


@pytest.fixture(scope="session", params=SITES)
def site(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def platform(site: str) -> Platform:
    return load_platform(ROOT / "sites" / site)


@pytest.fixture(scope="session")
def graph(site: str, graphs: Callable[[str, bool], Graph]) -> Graph:
    return graphs(site, False)


@pytest.fixture(scope="session")
def preview(site: str, graphs: Callable[[str, bool], Graph]) -> Graph:
    return graphs(site, True)


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Graph]:
    """Build the graph of a site whose data has been changed by a function on its YAML."""

    def get(
        site: str, file: str, change: Callable[[Any], None], graph: Graph | None = None
    ) -> Graph:
        folder = tmp_path / "site"
        shutil.copytree(ROOT / "sites" / site, folder)
        yaml = YAML()
        data = yaml.load(folder / file)
        change(data)
        yaml.dump(data, folder / file)
        return build(live_config(site, site=str(folder)), graph=graph)

    return get
