"""The sealed network, built for real: who reaches whom, and that nobody gets out."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from rehearsal import network
from rehearsal.network import CORE, OPERATOR, Network
from rehearsal.progress import RehearsalError
from rehearsal.state import State

from .isolation import isolated, needs_machines
from .sample import platform

pytestmark = [needs_machines, pytest.mark.usefixtures("names")]


def answer(namespace: str, address: str) -> str:
    """What a TCP connection to a port where nobody listens meets: refused, or nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with network.enter(namespace), socket.socket(family, socket.SOCK_STREAM) as caller:
        caller.settimeout(0.4)
        try:
            caller.connect((address, 9))
        except ConnectionRefusedError:
            return "refused"
        except TimeoutError:
            return "silence"
        except OSError as error:
            return error.strerror or str(error)
    return "open"


@isolated
def test_everybody_reaches_everybody_but_site_local_networks_are_closed(tmp_path: Path) -> None:
    sealed = Network(platform(), State(tmp_path))
    sealed.up()
    for name in ("operator", "obs-office", "obs-local"):
        for address in ("10.70.2.1", "fd70:2::1", "100.80.3.1", "192.0.2.1", "2001:db8:aaaa::10"):
            assert answer(f"mail-{name}", address) == "refused", (name, address)
    for address in map(str, sealed.addresses("obs-local")):
        assert answer(OPERATOR, address) == "refused"
        assert answer("mail-obs-internet", address) == "silence"
    for address in ("10.70.1.1", "fd70:1::1"):
        assert answer("mail-obs-internet", address) == "silence"
    assert answer("mail-obs-internet", "100.80.3.1") == "refused"
    sealed.down()


@isolated
def test_site_local_hosts_leave_through_the_egress_addresses_only(tmp_path: Path) -> None:
    sealed = Network(platform(), State(tmp_path))
    sealed.up()
    for family, target, own in (
        (socket.AF_INET, "203.0.113.10", "100.80.3.20"),
        (socket.AF_INET6, "2001:db8:aaaa::10", "2001:db8:3::20"),
    ):
        with network.enter("mail-obs-internet"):
            listener = socket.create_server((target, 2525), family=family)
        with network.enter("mail-obs-local"):
            caller = socket.create_connection((target, 2525), timeout=2)
        seen = listener.accept()[1][0]
        assert seen == own
        caller.close()
        listener.close()
    sealed.down()


@isolated
def test_building_twice_changes_nothing_and_down_leaves_nothing(tmp_path: Path) -> None:
    def picture() -> list[list[str]]:
        said = [
            subprocess.run(
                ["ip", "-n", name, "-br", kind], capture_output=True, text=True, check=True
            ).stdout
            for name in network.namespaces()
            for kind in ("address", "route")
        ]
        # The kernel adds link-local addresses and learns of a carrier by itself, a bit later.
        own = ("fe80", "UP", "UNKNOWN", "DOWN")
        return [sorted(w for w in text.split() if not w.startswith(own)) for text in said]

    sealed = Network(platform(), State(tmp_path))
    sealed.up()
    first = picture()
    sealed.up()
    assert picture() == first
    assert sealed.is_up
    sealed.down()
    assert network.namespaces() == ()
    assert not sealed.is_up


@isolated
def test_a_half_built_network_is_completed(tmp_path: Path) -> None:
    sealed = Network(platform(), State(tmp_path))
    sealed.up()
    subprocess.run(["ip", "netns", "del", "mail-obs-office"], check=True)
    subprocess.run(["ip", "-n", CORE, "link", "del", "n0"], check=True)
    sealed.up()
    assert answer("mail-obs-office", "10.70.1.1") == "refused"
    sealed.down()


@isolated
def test_a_gateway_keeps_its_address_when_a_machine_dies(tmp_path: Path) -> None:
    sealed = Network(platform(), State(tmp_path))
    sealed.up()
    bridge = sealed.plan.bridges[0].name

    def address() -> str:
        (link,) = network._ip_json(CORE, "link", "show", bridge)
        return str(link["address"])

    before = address()
    for name in ("one", "other"):
        network.plug(name, [(bridge, "02:00:00:00:00:01")])
        assert address() == before
    for name in ("one", "other"):
        network.unplug(name)
        assert address() == before
    sealed.down()


@isolated
def test_sending_is_refused_outside_and_where_a_cable_leads_out(tmp_path: Path) -> None:
    with pytest.raises(RehearsalError, match="real networks"):
        network.assert_sealed()
    sealed = Network(platform(), State(tmp_path))
    sealed.up()
    with network.enter(OPERATOR):
        network.assert_sealed()
    # A namespace that is not ours, although it has no way out either.
    subprocess.run(["ip", "netns", "add", "stranger"], check=True)
    with network.enter("stranger"), pytest.raises(RehearsalError, match="real networks"):
        network.assert_sealed()
    # One cable from core to the outside, and everything refuses.
    subprocess.run(
        f"ip -n {CORE} link add leak type veth peer name leak0 netns stranger".split(), check=True
    )
    network._seal.forget()
    with network.enter(OPERATOR), pytest.raises(RehearsalError, match=f"leak in {CORE} leads out"):
        network.assert_sealed()
    sealed.down()


@isolated
def test_entering_a_network_that_is_not_there_says_what_to_do() -> None:
    with pytest.raises(RehearsalError, match="make rehearsal"), network.enter(OPERATOR):
        pass
