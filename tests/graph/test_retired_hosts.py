"""Hosts on their way out, as the engine sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from mailsite.loader import load_platform
from mailsite.model import Host, Role

from .graph import COMMAND, DNS_RECORD, ROOT, Graph, Registration

PROD = load_platform(ROOT / "sites/prod")
EDGE = PROD.members(Role.FRONTEND)[-1]
MEMBER = next(h for h in PROD.members(Role.SMTP_OUT) if h.name != PROD.outbound.primary)


@pytest.fixture(scope="module")
def leaving(edited: Callable[..., Graph]) -> Callable[[Host, str], Graph]:
    """The graph of the platform with a host that leaves, each built once."""

    @cache
    def get(name: str, how: str) -> Graph:
        def change(data: Any) -> None:
            data["hosts"][name][how] = True

        return edited("prod", "topology.yaml", change)

    return lambda host, how: get(host.name, how)


@pytest.fixture
def before(graphs: Callable[[str, bool], Graph]) -> Graph:
    return graphs("prod", False)


def of(graph: Graph, host: Host) -> dict[str, Registration]:
    """The resources of a host by URN."""
    return {r.urn: r for r in graph.registrations.values() if graph.owner(r) == host.name}


def gone_records(before: Graph, after: Graph) -> set[str]:
    names = {r.name for r in after.of_type(DNS_RECORD)}
    return {r.name for r in before.of_type(DNS_RECORD)} - names


def service_records(host: Host, name: str) -> set[str]:
    """What the platform's DNS says of ``host`` under the name of a service."""
    kinds = {4: "A", 6: "AAAA"}
    return {f"{name}-{kinds[address.version]}-{address}" for address in host.addresses}


def test_a_retired_frontend_is_pushed_to_without_its_role(
    leaving: Callable[[Host, str], Graph],
) -> None:
    graph = leaving(EDGE, "retired")
    commands = [r for r in of(graph, EDGE).values() if r.type == COMMAND]
    assert {r.name for r in commands} == {f"{EDGE.name}-config", f"{EDGE.name}-confirm"}
    [config] = [r for r in commands if r.name.endswith("-config")]
    document = json.loads(config.inputs["stdin"])
    assert list(document["files"]) == ["/usr/local/sbin/mail-agent"]
    assert document["services"] == []
    assert config.inputs["create"].endswith("mail-agent apply")


def test_a_retired_frontend_is_the_last_and_in_no_cluster(
    leaving: Callable[[Host, str], Graph],
) -> None:
    graph = leaving(EDGE, "retired")
    owner = graph.one("mail:index:Host", EDGE.name)
    assert owner.parent.endswith("mail:index:RetiredHosts::retired-hosts")
    config = graph.one(COMMAND, f"{EDGE.name}-config")
    others = [r for r in graph.of_type(COMMAND) if graph.owner(r) != EDGE.name]
    assert len(others) > len(PROD.members(Role.SMTP_OUT))
    for other in others:
        assert graph.reaches(config, other.urn)
        assert not graph.reaches(other, config.urn)
    for record in graph.of_type(DNS_RECORD):
        assert not graph.reaches(record, config.urn), record.name
        if not record.parent.endswith("::dns-mx"):  # which leads to no frontend
            assert graph.reaches(config, record.urn), record.name


def test_retired_machines_do_not_wait_for_each_other(edited: Callable[..., Graph]) -> None:
    """One of them may be dead."""
    first, second = PROD.members(Role.FRONTEND)[-2:]

    def change(data: Any) -> None:
        for host in (first, second):
            data["hosts"][host.name]["retired"] = True

    graph = edited("prod", "topology.yaml", change)
    pushes = [graph.one(COMMAND, f"{host.name}-config") for host in (first, second)]
    for one, other in (pushes, reversed(pushes)):
        assert not graph.reaches(one, graph.one(COMMAND, f"{other.name[:-7]}-confirm").urn)


@pytest.mark.parametrize("how", ["draining", "retired"])
def test_no_service_leads_to_a_frontend_that_leaves(
    leaving: Callable[[Host, str], Graph], before: Graph, how: str
) -> None:
    after = leaving(EDGE, how)
    wanted = service_records(EDGE, PROD.names.frontend)
    assert gone_records(before, after) == wanted & {r.name for r in before.of_type(DNS_RECORD)}
    assert len(gone_records(before, after)) == 2


def test_a_draining_frontend_keeps_serving(
    leaving: Callable[[Host, str], Graph], before: Graph
) -> None:
    after = leaving(EDGE, "draining")
    assert of(after, EDGE).keys() == of(before, EDGE).keys()
    name = f"{EDGE.name}-config"
    assert after.one(COMMAND, name).inputs["stdin"] == before.one(COMMAND, name).inputs["stdin"]


def test_a_draining_member_keeps_its_machine_and_gets_no_new_mail(
    leaving: Callable[[Host, str], Graph], before: Graph
) -> None:
    after = leaving(MEMBER, "draining")
    mine = of(after, MEMBER)
    assert mine.keys() == of(before, MEMBER).keys()
    for urn, found in mine.items():
        if found.type != COMMAND:
            assert found.inputs == before.registrations[urn].inputs
    assert gone_records(before, after) == service_records(
        MEMBER, f"{Role.SMTP_OUT}.{PROD.internal_domain}"
    )
    leg = str(PROD.internal_leg(MEMBER).ipv4)
    for frontend in PROD.members(Role.FRONTEND):
        streams = json.loads(after.one(COMMAND, f"{frontend.name}-config").inputs["stdin"])
        text = streams["files"]["/etc/nginx/mail-streams.d/smtp-out.conf"]
        assert leg not in text
        assert str(PROD.internal_leg(PROD.hosts[PROD.outbound.primary]).ipv4) in text


def test_a_platform_that_nobody_leaves_has_no_retired_hosts(before: Graph) -> None:
    [component] = before.of_type("mail:index:RetiredHosts")
    assert not [r for r in before.registrations.values() if r.parent == component.urn]
