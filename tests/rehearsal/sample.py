"""A small platform with site-local and public networks, for tests of what lies below."""

from __future__ import annotations

from typing import Any

from mailsite.model import Platform

DOMAIN = "pelican.example"


def network(site: str, kind: str, number: int) -> dict[str, Any]:
    prefix4 = f"10.70.{number}" if kind == "site-local" else f"100.80.{number}"
    prefix6 = f"fd70:{number}::" if kind == "site-local" else f"2001:db8:{number}::"
    return {
        "site": site,
        "kind": kind,
        "bridge": f"br-{kind}",
        "ipv4": {"prefix": f"{prefix4}.0/24", "gateway": f"{prefix4}.1"},
        "ipv6": {"prefix": f"{prefix6}/64", "gateway": f"{prefix6}1"},
    }


def document() -> dict[str, Any]:
    """The sample's site data; a test may change it before it makes the platform."""
    return {
        "name": "pelican",
        "domain": DOMAIN,
        "internal_domain": f"net.{DOMAIN}",
        "home_page": f"https://{DOMAIN}/",
        "names": {
            name: f"{name.replace('_', '-')}.{DOMAIN}"
            for name in ("smtp_out", "smtp_in", "imap", "webmail", "frontend", "spf")
        },
        "spf": {"ipv4": ["100.80.3.0/24"], "ipv6": ["2001:db8:3::/48"]},
        "outbound": {"primary": f"a.net.{DOMAIN}"},
        "inbound": {"srs_domain": f"srs.{DOMAIN}"},
        "management": {"networks": ["10.79.0.0/24", "fd79::/64"]},
        "site_local": {"ipv4": "10.70.0.0/16", "ipv6": "fd70::/16"},
        "sites": {"north": {"description": "north"}, "south": {"description": "south"}},
        "networks": {
            "north-local": network("north", "site-local", 1),
            "south-local": network("south", "site-local", 2),
            "north-public": network("north", "public", 3),
        },
        "egress": {
            f"gw0.{DOMAIN}": {"site": "north", "ipv4": "100.80.3.20", "ipv6": "2001:db8:3::20"},
            f"gw1.{DOMAIN}": {"site": "south", "ipv4": "100.80.9.20", "ipv6": "2001:db8:9::20"},
        },
        "hypervisors": {},
        "hosts": {},
        "domains": {},
        "sasl_users": {},
    }


def platform(**changes: Any) -> Platform:
    return Platform.model_validate({**document(), **changes})
