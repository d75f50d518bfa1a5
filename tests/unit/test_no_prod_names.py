"""No name or address of prod occurs outside its site data: the code serves any platform."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from mailsite.loader import load_platform
from mailsite.model import IPNetwork, Platform

ROOT = Path(__file__).parents[2]

#: Prod's own data, and what the operator of prod sets for it.
ALLOWED = re.compile(r"sites/prod/|Pulumi\.prod\.yaml$")

#: Prose may say where the platform comes from: the owner's name, and nothing more of it.
PROSE = re.compile(r"(README|docs/.*)\.md$|LICENSE$")

#: Files of hashes, written by tools.
SKIPPED = re.compile(r"uv\.lock$|go\.sum$")

ADDRESS = re.compile(
    r"(?<![\w.:-])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-fA-F]{1,4}:[0-9a-fA-F:]*:[0-9a-fA-F:]*)(?![\w.])"
)


class Footprint:
    """Names and address space of a platform, and where a text mentions them."""

    def __init__(self, platform: Platform) -> None:
        names = {
            platform.domain,
            platform.internal_domain,
            *platform.domains,
            *platform.hosts,
            *platform.egress,
            *platform.sites,
            *platform.hypervisors,
            *(name for _, name in platform.names),
        }
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        self.names = re.compile(rf"(?<![\w-])({longest_first})(?![\w-])", re.IGNORECASE)
        self.owner = re.compile(re.escape(platform.domain.split(".")[0]), re.IGNORECASE)
        self.prefixes: list[IPNetwork] = [
            *platform.spf.ipv4,
            *platform.spf.ipv6,
            *platform.management.networks,
            *(s.prefix for n in platform.networks.values() for s in (n.ipv4, n.ipv6)),
        ]
        if platform.site_local is not None:
            self.prefixes += [platform.site_local.ipv4, platform.site_local.ipv6]
        self.prefixes += [ip_network(a) for e in platform.egress.values() for a in (e.ipv4, e.ipv6)]

    def mentions(self, text: str, *, prose: bool = False) -> Iterator[tuple[int, str]]:
        """Yield (line, what) for each thing of the platform that ``text`` mentions."""
        for number, line in enumerate(text.splitlines(), 1):
            for match in self.names.finditer(line):
                yield number, match[0]
            if not prose and self.owner.search(line):
                yield number, line.strip()
            for match in ADDRESS.finditer(line):
                try:
                    address = ip_address(match[0])
                except ValueError:
                    continue
                if any(address.version == p.version and address in p for p in self.prefixes):
                    yield number, match[0]


@pytest.fixture(scope="module")
def prod() -> Footprint:
    return Footprint(load_platform(ROOT / "sites" / "prod"))


def tracked() -> list[str]:
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    return [f for f in listing.stdout.split("\0") if f and (ROOT / f).is_file()]


def test_no_tracked_file_outside_its_site_data_mentions_prod(prod: Footprint) -> None:
    found = []
    for file in tracked():
        if ALLOWED.match(file) or SKIPPED.search(file):
            continue
        try:
            text = (ROOT / file).read_text()
        except UnicodeDecodeError:
            continue
        prose = bool(PROSE.match(file))
        found += [f"{file}:{line}: {what}" for line, what in prod.mentions(text, prose=prose)]
        found += [f"{file}: its name" for _ in prod.mentions(file, prose=prose)]
    assert not found, "\n".join(found)


def test_the_search_finds_what_it_looks_for(prod: Footprint) -> None:
    """Each name and address of prod, planted in a line of code, is found."""
    platform = load_platform(ROOT / "sites" / "prod")
    things = [
        *platform.hosts,
        *platform.domains,
        *platform.egress,
        *platform.sites,
        *(str(a) for h in platform.hosts.values() for a in h.addresses),
        *(str(s.prefix) for n in platform.networks.values() for s in (n.ipv4, n.ipv6)),
        *(str(b) for b in (*platform.spf.ipv4, *platform.spf.ipv6)),
        *(str(n) for n in platform.management.networks),
    ]
    for thing in things:
        line = f'    assert host == "{thing}"  # {thing}'
        assert list(prod.mentions(line, prose=True)), thing
        assert list(prod.mentions(line.upper(), prose=True)), thing


def test_the_search_leaves_other_texts_alone(prod: Footprint) -> None:
    text = "submission.example.org 198.51.100.7 2001:db8::7 12:30:45 a::b pinging mail.example"
    assert not list(prod.mentions(text))


def test_prose_may_name_the_owner_and_code_may_not(prod: Footprint) -> None:
    owner = load_platform(ROOT / "sites" / "prod").domain.split(".")[0]
    line = f"The design is that of {owner.upper()} Networks."
    assert not list(prod.mentions(line, prose=True))
    assert list(prod.mentions(line))
