"""A provider's client, as the engine is one: for tests of single operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import empty_pb2
from pulumi.runtime.proto import provider_pb2, provider_pb2_grpc

from rehearsal.standins.base import Provider, serving
from rehearsal.standins.values import Properties, from_struct, to_struct


class Refused(Exception):
    """The provider answered with an error."""


@dataclass
class Diff:
    """The answer to Diff."""

    changed: bool
    replaces: list[str]
    delete_first: bool
    paths: dict[str, str]


@dataclass
class Object:
    """A resource as the engine records it."""

    type: str
    id: str
    inputs: Properties
    state: Properties
    name: str = "it"

    @property
    def urn(self) -> str:
        return urn(self.type, self.name)


@dataclass
class Client:
    """One connection to a provider: one provider instance."""

    channel: grpc.Channel
    stub: provider_pb2_grpc.ResourceProviderStub = field(init=False)

    def __post_init__(self) -> None:
        self.stub = provider_pb2_grpc.ResourceProviderStub(self.channel)

    def configure(self, **config: Any) -> None:
        self.call("Handshake", provider_pb2.ProviderHandshakeRequest(engine_address=""))
        self.call("Configure", provider_pb2.ConfigureRequest(args=to_struct(config), name="p"))

    def call(self, method: str, request: Any, timeout: float = 30) -> Any:
        try:
            return getattr(self.stub, method)(request, timeout=timeout)
        except grpc.RpcError as error:
            raise Refused(error.details()) from error

    def check(
        self, type: str, inputs: Mapping[str, Any], olds: Mapping[str, Any] | None = None
    ) -> tuple[Properties, dict[str, str]]:
        """Checked inputs and failures, by property."""
        answer = self.call(
            "Check",
            provider_pb2.CheckRequest(
                urn=urn(type), news=to_struct(inputs), olds=to_struct(olds or {})
            ),
        )
        failures = {failure.property: failure.reason for failure in answer.failures}
        return from_struct(answer.inputs), failures

    def diff(self, type: str, olds: Properties, news: Properties, **more: Any) -> Diff:
        answer = self.call(
            "Diff",
            provider_pb2.DiffRequest(
                urn=urn(type), old_inputs=to_struct(olds), news=to_struct(news), **more
            ),
        )
        kinds = provider_pb2.PropertyDiff.Kind
        return Diff(
            changed=answer.changes == provider_pb2.DiffResponse.DIFF_SOME,
            replaces=list(answer.replaces),
            delete_first=answer.deleteBeforeReplace,
            paths={path: kinds.Name(one.kind) for path, one in answer.detailedDiff.items()},
        )

    def create(
        self, type: str, inputs: Mapping[str, Any], *, name: str = "it", timeout: float = 0
    ) -> Object:
        """Check and Create, as an update does."""
        checked, failures = self.check(type, inputs)
        if failures:
            raise Refused(str(failures))
        answer = self.call(
            "Create",
            provider_pb2.CreateRequest(
                urn=urn(type, name), properties=to_struct(checked), timeout=timeout
            ),
        )
        return Object(type, answer.id, checked, from_struct(answer.properties), name)

    def preview(self, type: str, inputs: Mapping[str, Any]) -> Properties:
        """Outputs that a preview of a creation shows."""
        checked, failures = self.check(type, inputs)
        assert not failures, failures
        answer = self.call(
            "Create",
            provider_pb2.CreateRequest(urn=urn(type), properties=to_struct(checked), preview=True),
        )
        assert answer.id == ""
        return from_struct(answer.properties)

    def update(self, old: Object, inputs: Mapping[str, Any], *, preview: bool = False) -> Object:
        checked, failures = self.check(old.type, inputs, old.inputs)
        if failures:
            raise Refused(str(failures))
        answer = self.call(
            "Update",
            provider_pb2.UpdateRequest(
                id=old.id,
                urn=old.urn,
                olds=to_struct(old.state),
                news=to_struct(checked),
                old_inputs=to_struct(old.inputs),
                preview=preview,
            ),
        )
        return Object(old.type, old.id, checked, from_struct(answer.properties), old.name)

    def read(self, it: Object) -> Properties | None:
        """Outputs as they are now; None if it is gone."""
        answer = self.call(
            "Read",
            provider_pb2.ReadRequest(
                id=it.id, urn=it.urn, properties=to_struct(it.state), inputs=to_struct(it.inputs)
            ),
        )
        return from_struct(answer.properties) if answer.id else None

    def delete(self, it: Object) -> None:
        self.call(
            "Delete",
            provider_pb2.DeleteRequest(id=it.id, urn=it.urn, properties=to_struct(it.state)),
        )

    def cancel(self) -> None:
        self.call("Cancel", empty_pb2.Empty())


def urn(type: str, name: str = "it") -> str:
    return f"urn:pulumi:dev::trial::{type}::{name}"


@contextmanager
def connected(provider: Provider, **config: Any) -> Iterator[Client]:
    """Serve ``provider`` and connect to it once, configured."""
    with serving(provider) as server, connection(server.port, **config) as client:
        yield client


@contextmanager
def connection(port: int, **config: Any) -> Iterator[Client]:
    """One more connection to a provider that is served already."""
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
    with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        client = Client(channel)
        client.configure(**config)
        yield client
