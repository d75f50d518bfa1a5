"""What all stand-ins share: the protocol, the memory on disk, start and end."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from pulumi.runtime.proto import provider_pb2

from rehearsal.standins.base import (
    Call,
    Created,
    Input,
    Output,
    Provider,
    ProviderError,
    Resource,
)
from rehearsal.standins.server import PORTS, Context, start_all
from rehearsal.standins.store import Store
from rehearsal.standins.values import Properties, Secret, from_struct, has_secret, to_struct
from rehearsal.state import CHECKOUT
from tests.engine.client import Client, Refused, connected, connection, urn
from tests.engine.memory import Hosts, Hypervisors, World, Zones


class Thing(Resource):
    """A resource that waits for its engine to go away when its size is 2."""

    token = "random:index/thing:Thing"
    inputs: ClassVar[Mapping[str, Input]] = {
        "size": Input("integer", default=1),
        "text": Input("string"),
    }
    outputs: ClassVar[Mapping[str, Output]] = {"made": Output(), "text": Output()}

    def __init__(self) -> None:
        self.begun, self.undone = threading.Event(), threading.Event()

    def create(self, inputs: Properties, call: Call) -> Created:
        if inputs["size"] == 0:
            raise ValueError("a fault")
        if inputs["size"] == 2:
            gone = threading.Event()
            with call.interruptible(gone.set):
                self.begun.set()
                assert gone.wait(10)
        if inputs["size"] == 3:
            raise ProviderError("too large")
        return Created("id", {"made": True, "text": inputs.get("text", "none")})

    def undo(self, created: Created, inputs: Properties, call: Call) -> None:
        self.undone.set()


class Things(Provider):
    package = "random"

    def __init__(self, thing: Thing) -> None:
        super().__init__({thing.token: thing})


@pytest.fixture
def thing() -> Thing:
    return Thing()


@pytest.fixture
def client(thing: Thing) -> Iterator[Client]:
    with connected(Things(thing)) as one:
        yield one


def test_a_default_is_filled_in_and_recorded(client: Client) -> None:
    made = client.create(Thing.token, {})
    assert made.inputs == {"size": 1}
    assert made.state == {"size": 1, "made": True, "text": "none"}


def test_a_secret_stays_a_secret_in_the_state(client: Client) -> None:
    made = client.create(Thing.token, {"text": Secret("hidden")})
    assert made.state["text"] == Secret("hidden")
    request = provider_pb2.ReadRequest(
        id="id",
        urn=urn(Thing.token),
        properties=to_struct(made.state),
        inputs=to_struct(made.inputs),
    )
    answer = client.call("Read", request)
    assert has_secret(from_struct(answer.properties))
    assert has_secret(from_struct(answer.inputs))


def test_a_refusal_is_told_in_its_own_words(client: Client) -> None:
    with pytest.raises(Refused, match=r"^too large$"):
        client.create(Thing.token, {"size": 3})


def test_a_fault_of_the_stand_in_is_told_as_one(client: Client) -> None:
    with pytest.raises(Refused, match="stand-in of random failed in Create: ValueError: a fault"):
        client.create(Thing.token, {"size": 0})


def test_what_nobody_waits_for_any_more_is_undone(client: Client, thing: Thing) -> None:
    request = provider_pb2.CreateRequest(urn=urn(Thing.token), properties=to_struct({"size": 2}))
    call = client.stub.Create.future(request)
    assert thing.begun.wait(10)
    call.cancel()
    assert thing.undone.wait(10)


def test_what_is_waited_for_stays(client: Client, thing: Thing) -> None:
    assert client.create(Thing.token, {}).id == "id"
    assert not thing.undone.is_set()


def test_the_memory_outlives_its_process_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "deeper/memory.json"
    store = Store(path)
    with store.edit() as data:
        data["a"] = 1
    with pytest.raises(RuntimeError), store.edit() as data:
        data["b"] = 2
        raise RuntimeError
    with Store(path).view() as data:
        assert data == {"a": 1, "b": 2}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_memory_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    path.write_text('{"a":\n')
    with pytest.raises(RuntimeError, match=r"memory\.json:\d+: .*make down"):
        Store(path)


def test_all_serve_and_their_ports_are_written_while_they_do(tmp_path: Path) -> None:
    world = World()
    servers = start_all(Context(tmp_path, Hypervisors(world), Zones(world), Hosts(world)))
    try:
        ports = json.loads((tmp_path / PORTS).read_text())
        assert sorted(ports) == ["cloudflare", "command", "libvirt", "random", "tls"]
        assert servers.debug_providers == ",".join(f"{n}:{p}" for n, p in sorted(ports.items()))
        with connection(ports["random"]) as client:
            client.create("random:index/randomId:RandomId", {"byteLength": 4})
    finally:
        servers.stop()
    assert not (tmp_path / PORTS).exists()


def test_they_do_not_start_outside_the_sealed_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rehearsal.standins", f"--state={tmp_path}"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "rehearsal.standins: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
