"""The graphs that the tests look at, each built once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mailsite.loader import load_platform
from mailsite.model import Platform
from mailsite.secrets import required
from tests.site_data import read, write

from .graph import MARK, ROOT, Graph, build

SITES = ("example", "prod")


def stack_config(site: str) -> dict[str, Any]:
    """The committed file of the stack of ``site``, by key without the project's name."""
    file = read(ROOT / f"Pulumi.{site}.yaml")
    return {key.removeprefix("mail:"): value for key, value in file["config"].items()}


@cache
def needed(site: str) -> frozenset[str]:
    """The secrets that some host of the committed site asks for."""
    platform = load_platform(ROOT / site)
    return frozenset(n for host in platform.hosts.values() for n in required(platform, host))


def live_config(stack: str, /, **changes: Any) -> dict[str, Any]:
    """What the operator of a live platform has set, with marked secrets."""
    config = stack_config(stack)
    wanted = sorted(needed(config["site"]))
    certified = [name.split("/")[1] for name in wanted if name.startswith("certificate/")]
    tokens = {name: f"{MARK} {name}" for name in wanted if name.startswith("acme/")}
    certificate = {"chain": "-----BEGIN CERTIFICATE-----", "key": f"-----BEGIN KEY----- {MARK}"}
    return config | {
        "live": "true",
        "deployKey": f"KEY {MARK}",
        "certificates": dict.fromkeys(certified, certificate),
        **({"secrets": tokens} if tokens else {}),
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


@pytest.fixture(scope="session")
def acme_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, with a certificate of its own that the hosts of its spam filter hold."""
    folder = tmp_path_factory.mktemp("acme") / "site"
    shutil.copytree(ROOT / "sites/example", folder)
    site, topology = (read(folder / name) for name in ("site.yaml", "topology.yaml"))
    acme = {
        "provider": "cloudflare",
        "secrets": ["CLOUDFLARE_DNS_API_TOKEN"],
        "email": "hostmaster@example.org",
    }
    site["certificates"] = {"acme": acme}
    for host in topology["hosts"].values():
        if "rspamd" in host["roles"]:
            host["roles"] = ["certificates", "rspamd"]
    write(folder / "site.yaml", site)
    write(folder / "topology.yaml", topology)
    return folder


@pytest.fixture(scope="session")
def acme(acme_site: Path) -> Graph:
    """The graph of :func:`acme_site`."""
    token = {"acme/CLOUDFLARE_DNS_API_TOKEN": f"{MARK} token"}
    return build(live_config("example", site=str(acme_site), secrets=token))


@pytest.fixture(scope="session")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Graph]:
    """Build the graph of a site whose data has been changed by a function on its YAML."""

    def get(
        site: str, file: str, change: Callable[[Any], None], graph: Graph | None = None
    ) -> Graph:
        folder = tmp_path_factory.mktemp("edited") / "site"
        shutil.copytree(ROOT / "sites" / site, folder)
        data = read(folder / file)
        change(data)
        write(folder / file, data)
        return build(live_config(site, site=str(folder)), graph=graph)

    return get
