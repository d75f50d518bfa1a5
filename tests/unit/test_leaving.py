"""Hosts on their way out: who is led to them, what they still do, what is taken from them."""

from __future__ import annotations

from typing import Any

import pytest

from mailsite.bundle import compose
from mailsite.loader import load_platform
from mailsite.model import Base, Platform, Role
from mailsite.records import RecordType, Stage, senders, static_records
from mailsite.roles import frontend, rspamd
from mailsite.roles.base import internal_names
from mailsite.roles.smtp_out import proxy_sources
from tests.unit.test_loader import EXAMPLE

PLATFORM = load_platform(EXAMPLE)
OUT, IN, EDGE = (f"{name}.hosts.example.org" for name in ("out2", "in2", "edge2"))


def leaving(name: str, **how: bool) -> Platform:
    host = PLATFORM.hosts[name].model_copy(update=how)
    return PLATFORM.model_copy(update={"hosts": {**PLATFORM.hosts, name: host}})


def service_addresses(platform: Platform) -> set[str]:
    """Addresses that names of services and of clusters lead to, in DNS and inside."""
    own = set(platform.hosts)
    inside = (n for n in internal_names(platform) if n.name not in own)
    return {
        record.content
        for record in static_records(platform)
        if record.stage is Stage.SERVICE and record.type in (RecordType.A, RecordType.AAAA)
    } | {str(address) for name in inside for address in name.addresses}


@pytest.mark.parametrize(
    ("name", "how"),
    [(OUT, "draining"), (IN, "draining"), (EDGE, "draining"), (EDGE, "retired")],
)
def test_nothing_leads_to_a_host_that_leaves(name: str, how: str) -> None:
    platform = leaving(name, **{how: True})
    addresses = {str(address) for address in platform.hosts[name].addresses}
    assert addresses <= service_addresses(PLATFORM)
    assert not addresses & service_addresses(platform)
    assert not addresses & {str(server.address) for server in frontend.servers(platform)}
    assert all(platform.hosts[name] not in platform.members(role) for role in Role)


@pytest.mark.parametrize("name", [OUT, IN, EDGE])
def test_a_host_keeps_its_own_names_until_it_is_gone(name: str) -> None:
    how = {"retired": True} if name == EDGE else {"draining": True}

    def own(platform: Platform) -> list[Any]:
        return [r for r in static_records(platform) if r.stage is Stage.HOST]

    assert own(leaving(name, **how)) == own(PLATFORM)


@pytest.mark.parametrize("name", [OUT, IN, EDGE])
def test_a_host_that_drains_has_all_that_it_had(name: str) -> None:
    platform = leaving(name, draining=True)
    before, after = (compose(p, p.hosts[name]) for p in (PLATFORM, platform))
    assert after.files.keys() == before.files.keys()
    assert after.secret_files.keys() == before.secret_files.keys()
    assert after.services == before.services
    assert after.health == before.health


@pytest.mark.parametrize("name", [OUT, IN])
def test_what_drains_may_still_send_and_have_its_mail_looked_at(name: str) -> None:
    platform = leaving(name, draining=True)
    host = platform.hosts[name]
    assert senders(platform) == senders(PLATFORM)
    filters = compose(platform, platform.members(Role.RSPAMD)[0]).files["/etc/nftables.conf"]
    assert str(host.interfaces[0].ipv4) in filters.content
    assert rspamd.members(platform) == rspamd.members(PLATFORM)


def test_texts_of_helo_names_stay_while_forwards_are_in_the_queue() -> None:
    def texts(platform: Platform) -> set[str]:
        found = static_records(platform)
        return {r.name for r in found if r.type is RecordType.TXT}

    assert texts(leaving(IN, draining=True)) == texts(PLATFORM)


def test_clients_that_still_come_through_a_draining_frontend_are_let_in() -> None:
    assert proxy_sources(leaving(EDGE, draining=True)) == proxy_sources(PLATFORM)
    address = PLATFORM.hosts[EDGE].interfaces[0].ipv4
    sources = {str(source) for source in proxy_sources(leaving(EDGE, retired=True))}
    assert f"{address}/32" not in sources
    assert sources


def test_a_retired_machine_gets_the_agent_and_nothing_else() -> None:
    platform = leaving(EDGE, retired=True)
    bundle = compose(platform, platform.hosts[EDGE])
    assert set(bundle.files) == {"/usr/local/sbin/mail-agent"}
    assert not bundle.secret_files
    assert not (*bundle.services, *bundle.health, *bundle.checks, *bundle.packages)


def test_a_retired_machine_that_we_manage_keeps_resolver_firewall_and_ssh() -> None:
    """To take them would leave a machine that resolves no name."""
    host = PLATFORM.hosts[EDGE].model_copy(update={"base": Base.MANAGED, "retired": True})
    bundle = compose(PLATFORM.model_copy(update={"hosts": {**PLATFORM.hosts, EDGE: host}}), host)
    assert {"/etc/nftables.conf", "/etc/unbound/unbound.conf"} <= set(bundle.files)
    assert not [path for path in bundle.files if "nginx" in path]
    assert "nginx.service" not in {service.unit for service in bundle.services}
