"""A frontend is retired, forgotten and brought back, each time by `pulumi up`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ruamel.yaml import YAML

from mailsite.model import Host
from verify.context import Context, each
from verify.nginx_streams import paths_of
from verify.smtp_out import Door, enter, frontend_doors

from .faults import expect_green


@contextmanager
def edited_site(context: Context, folder: Path) -> Iterator[Path]:
    """Site data of its own for `up`, with which the test can do as an operator does."""
    site = Path(shutil.copytree(context.site, folder / "site"))
    try:
        with context.lab.using(site):
            yield site
    finally:
        context.lab.up()


def say(site: Path, host: Host, **how: bool) -> None:
    """Write in the topology how ``host`` leaves; nothing: it is not there any more."""
    path = site / "topology.yaml"
    yaml = YAML()
    data = yaml.load(path)
    for word in ("draining", "retired"):
        data["hosts"][host.name].pop(word, None)
    data["hosts"][host.name].update(how)
    if not how:
        del data["hosts"][host.name]
    yaml.dump(data, path)


def published(context: Context) -> set[str]:
    """Addresses that the name of all frontends leads to."""
    name = context.platform.names.frontend
    zones = (zone.rstrip(".") for zone in context.lab.outside.zone_names)
    zone = max((z for z in zones if f".{name}".endswith(f".{z}")), key=len)
    return {
        entry.data
        for entry in context.lab.world.records(zone)
        if entry.owner == f"{name}." and entry.type in ("A", "AAAA")
    }


def logs_in(context: Context, door: Door) -> None:
    enter(context, door).close()


def test_a_frontend_is_drained_retired_forgotten_and_brought_back(
    platform_up: Context, tmp_path: Path
) -> None:
    context, lab = platform_up, platform_up.lab
    frontend = context.frontends[-1]
    machine = lab.machine(frontend)
    mine = {str(address) for address in context.public(frontend)}
    ours = paths_of(context.platform, frontend) - {"/usr/local/sbin/mail-agent"}
    there = machine.present(ours)
    assert "table inet mail" in there
    foreign = machine.foreign_state(ours)
    started = machine.run("systemctl", "show", "--property=MainPID", "nginx.service")
    assert mine <= published(context)
    doors: dict[bool, list[Door]] = {True: [], False: []}
    for door in frontend_doors(context):
        doors[door.name == frontend.name].append(door)

    with edited_site(context, tmp_path) as site:
        say(site, frontend, draining=True)
        lab.up()
        # Whoever has the name in a cache is served still.
        assert not mine & published(context)
        each([*doors[True], *doors[False]], lambda door: logs_in(context, door))

        say(site, frontend, retired=True)
        lab.up()
        assert machine.present(ours) == []
        assert machine.foreign_state(ours) == foreign
        assert not mine & published(context)
        assert not [door for door in doors[True] if door.is_open()]
        each(doors[False], lambda door: logs_in(context, door))

        say(site, frontend)
        summary = lab.up()
        assert summary["delete"] > 0
        assert machine.present(ours) == []
        assert machine.foreign_state(ours) == foreign

    assert mine <= published(context)
    assert machine.present(ours) == there
    assert machine.foreign_state(ours) == foreign
    each([*doors[True], *doors[False]], lambda door: logs_in(context, door))
    assert machine.run("systemctl", "show", "--property=MainPID", "nginx.service") == started
    expect_green(context, "EDGE-4")
    assert set(lab.up()) == {"same"}
