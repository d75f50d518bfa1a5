"""The part of a provider that all stand-ins share: Pulumi's resource provider protocol.

A :class:`Provider` serves one package. Its resources are described by tables (:class:`Input`,
:class:`Output`): what is required, what has a default, what forces a replacement, what is a
secret, what only an ``up`` knows. From the tables come Check, Diff and the previews, in which no
resource's own code runs.

One server process serves many provider *instances*: the engine opens a connection for each
``Provider`` resource of the program, and configures it there. So instances are told apart by
their connection (:class:`Session`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, TypeVar

import grpc
from google.protobuf import empty_pb2
from pulumi.runtime.proto import (
    engine_pb2,
    engine_pb2_grpc,
    plugin_pb2,
    provider_pb2,
    provider_pb2_grpc,
)

from rehearsal.progress import RehearsalError

from .diff import Change, Kind, changes
from .values import (
    UNKNOWN,
    Properties,
    Secret,
    Value,
    from_struct,
    has_secret,
    has_unknown,
    plain,
    to_struct,
)

log = logging.getLogger(__name__)

MAX_MESSAGE: Final = 400 * 1024 * 1024
"""Bytes of one gRPC message, as the engine's own limit."""

_DEFAULTS: Final = "__defaults"

ValueType = Literal["string", "integer", "number", "boolean", "list", "map"]


class ProviderError(Exception):
    """An operation failed. The text is what the operator reads below the resource's name."""


@dataclass(frozen=True)
class Failure:
    """An input that Check refuses."""

    property: str
    reason: str


@dataclass(frozen=True)
class Input:
    """One input property of a resource."""

    type: ValueType
    required: bool = False
    default: Value = None
    replaces: bool = False
    """A change of it replaces the resource."""
    secret: bool = False
    """Always a secret, whether the program marks it or not."""


@dataclass(frozen=True)
class Output:
    """One property that the provider computes."""

    secret: bool = False
    volatile: bool = False
    """An update may change it, so that a preview of an update does not know it."""


@dataclass
class Session:
    """One provider instance: a connection of an engine and the configuration it sent there."""

    config: Properties = field(default_factory=dict)
    name: str = ""
    """Name of the ``Provider`` resource; empty for a default provider."""
    engine: engine_pb2_grpc.EngineStub | None = None
    cancelled: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _listeners: list[Callable[[], object]] = field(default_factory=list)

    def cancel(self) -> None:
        """The operator interrupted the run: tell whatever is at work."""
        with self._lock:
            self.cancelled = True
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    @contextmanager
    def listening(self, listener: Callable[[], object]) -> Iterator[None]:
        """Have ``listener`` called when the run is cancelled; at once if it is already."""
        with self._lock:
            self._listeners.append(listener)
            late = self.cancelled
        if late:
            listener()
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)


@dataclass(frozen=True)
class Call:
    """The circumstances of one operation on one resource."""

    urn: str
    session: Session
    rpc: grpc.ServicerContext
    timeout: float | None = None
    """Seconds; None: the program sets no CustomTimeouts."""

    @property
    def name(self) -> str:
        """The resource's name in the program."""
        return self.urn.rpartition("::")[2]

    @contextmanager
    def interruptible(self, listener: Callable[[], object]) -> Iterator[None]:
        """Have ``listener`` called when the operator interrupts the run or the engine is gone."""
        done = threading.Event()

        def ended() -> None:
            if not done.is_set():
                listener()

        if not self.rpc.add_callback(ended):
            listener()
        try:
            with self.session.listening(listener):
                yield
        finally:
            done.set()

    def info(self, message: str, *, transient: bool = False) -> None:
        """Show a line beside the resource; a transient one only while it is being worked on."""
        self._log(engine_pb2.INFO, message, transient)

    def warning(self, message: str) -> None:
        """Show a warning beside the resource and in the summary."""
        self._log(engine_pb2.WARNING, message, False)

    def _log(self, severity: engine_pb2.LogSeverity.ValueType, message: str, brief: bool) -> None:
        if self.session.engine is None:
            return
        request = engine_pb2.LogRequest(
            severity=severity, message=message, urn=self.urn, streamId=0, ephemeral=brief
        )
        try:
            self.session.engine.Log(request, timeout=5)
        except grpc.RpcError as error:
            log.debug("the engine takes no log line: %s", error)


@dataclass(frozen=True)
class Created:
    """A new object: its id and the outputs that are not inputs."""

    id: str
    outputs: Properties = field(default_factory=dict)


class Resource:
    """One resource type. Subclasses state the tables and do the work.

    :meth:`create`, :meth:`update` and :meth:`delete` get plain values; the marks of secrets are
    kept and put back by the provider. They raise :class:`ProviderError`.
    """

    token: ClassVar[str]
    inputs: ClassVar[Mapping[str, Input]]
    outputs: ClassVar[Mapping[str, Output]] = {}
    autonamed: ClassVar[bool] = False
    """``name`` may be left out. Given, it makes a replacement delete first, as the bridge does
    (two objects of one name cannot exist)."""

    def check(self, inputs: Properties) -> Iterator[Failure]:
        """Refuse bad inputs. Values may be :data:`UNKNOWN`, at any depth."""
        yield from ()

    def create(self, inputs: Properties, call: Call) -> Created:
        raise NotImplementedError

    def read(self, id: str, state: Properties, call: Call) -> Properties | None:
        """Outputs (inputs among them) as they really are, or None where nothing is left."""
        return state

    def update(self, id: str, old: Properties, new: Properties, call: Call) -> Properties:
        """Change the object in place; ``old`` is its state. Returns the computed outputs."""
        return {key: old[key] for key in self.outputs if key in old}

    def delete(self, id: str, state: Properties, call: Call) -> None:
        """Remove the object. One that is gone already is no error."""

    def undo(self, created: Created, inputs: Properties, call: Call) -> None:
        """The engine is gone and will never know of what was created for it.

        A real provider leaves the object behind, in the way of the next run. Here a killed
        rehearsal goes on where it stopped.
        """


def _expected(kind: ValueType, value: Value) -> bool:
    if kind == "boolean":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    python: dict[str, type | tuple[type, ...]] = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "list": list,
        "map": dict,
    }
    return isinstance(value, python[kind])


class Connections:
    """The sessions of one provider, by connection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def open(self, peer: str, engine_address: str) -> Session:
        """A new connection says hello; whatever used its port before is forgotten."""
        session = Session()
        if engine_address:
            channel = grpc.insecure_channel(engine_address)
            session.engine = engine_pb2_grpc.EngineStub(channel)
        with self._lock:
            self._sessions[peer] = session
        return session

    def get(self, peer: str) -> Session:
        with self._lock:
            return self._sessions.setdefault(peer, Session())


_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Method = Callable[["Provider", _Request, grpc.ServicerContext], _Response]


def _answers(method: _Method[_Request, _Response]) -> _Method[_Request, _Response]:
    """Turn exceptions into gRPC's status: the message and nothing else reaches the operator."""

    @functools.wraps(method)
    def wrapper(self: Provider, request: _Request, context: grpc.ServicerContext) -> _Response:
        try:
            return method(self, request, context)
        except (ProviderError, RehearsalError) as error:
            log.info("%s %s: refused", self.package, method.__name__)
            context.abort(grpc.StatusCode.UNKNOWN, str(error))
        except Exception as error:
            log.exception("%s %s failed", self.package, method.__name__)
            context.abort(
                grpc.StatusCode.INTERNAL,
                f"the stand-in of {self.package} failed in {method.__name__}: "
                f"{type(error).__name__}: {error}; its log has the details",
            )
        raise AssertionError("abort raises")

    return wrapper


class Provider(provider_pb2_grpc.ResourceProviderServicer):
    """A server for one package: subclasses name it and list its resources."""

    package: ClassVar[str]
    config: ClassVar[Mapping[str, Input]] = {}

    def __init__(self, resources: Mapping[str, Resource]) -> None:
        self.resources = resources
        self.connections = Connections()

    # What a package may add.

    def configure(self, session: Session) -> None:
        """The instance got its configuration. Raises :class:`ProviderError`."""

    def close(self) -> None:
        """The server ends."""

    # Life of a connection.

    @_answers
    def Handshake(
        self, request: provider_pb2.ProviderHandshakeRequest, context: grpc.ServicerContext
    ) -> provider_pb2.ProviderHandshakeResponse:
        self.connections.open(context.peer(), request.engine_address)
        return provider_pb2.ProviderHandshakeResponse(
            accept_secrets=True, accept_resources=False, accept_outputs=False
        )

    @_answers
    def Attach(
        self, request: plugin_pb2.PluginAttach, context: grpc.ServicerContext
    ) -> empty_pb2.Empty:
        if self.connections.get(context.peer()).engine is None:
            self.connections.open(context.peer(), request.address)
        return empty_pb2.Empty()

    @_answers
    def GetPluginInfo(
        self, request: empty_pb2.Empty, context: grpc.ServicerContext
    ) -> plugin_pb2.PluginInfo:
        # The engine warns where a provider is older than the SDK of the program.
        version = importlib.metadata.version(f"pulumi-{self.package}")
        return plugin_pb2.PluginInfo(version=version)

    @_answers
    def Configure(
        self, request: provider_pb2.ConfigureRequest, context: grpc.ServicerContext
    ) -> provider_pb2.ConfigureResponse:
        session = self.connections.get(context.peer())
        session.config = from_struct(request.args)
        session.name = request.name
        self.configure(session)
        return provider_pb2.ConfigureResponse(
            acceptSecrets=True, supportsPreview=True, acceptResources=False, acceptOutputs=False
        )

    @_answers
    def Cancel(self, request: empty_pb2.Empty, context: grpc.ServicerContext) -> empty_pb2.Empty:
        self.connections.get(context.peer()).cancel()
        return empty_pb2.Empty()

    # Configuration of the provider resource.

    @_answers
    def CheckConfig(
        self, request: provider_pb2.CheckRequest, context: grpc.ServicerContext
    ) -> provider_pb2.CheckResponse:
        news = from_struct(request.news)
        failures = list(_check_table(self.config, news, extra={"version", "pluginDownloadURL"}))
        return _check_response(news, failures)

    @_answers
    def DiffConfig(
        self, request: provider_pb2.DiffRequest, context: grpc.ServicerContext
    ) -> provider_pb2.DiffResponse:
        found = changes(
            from_struct(request.old_inputs), from_struct(request.news), request.ignoreChanges
        )
        return _diff_response([c for c in found if c.top != "version"], {}, delete_first=False)

    # Resources.

    def _resource(self, urn: str) -> Resource:
        token = urn.split("::")[2].rpartition("$")[2]
        try:
            return self.resources[token]
        except KeyError:
            raise ProviderError(
                f"the stand-in of {self.package} has no {token}; it has "
                + ", ".join(sorted(self.resources))
            ) from None

    def _call(self, request: Any, context: grpc.ServicerContext) -> Call:
        return Call(
            urn=request.urn,
            session=self.connections.get(context.peer()),
            rpc=context,
            timeout=getattr(request, "timeout", 0) or None,
        )

    @_answers
    def Check(
        self, request: provider_pb2.CheckRequest, context: grpc.ServicerContext
    ) -> provider_pb2.CheckResponse:
        resource = self._resource(request.urn)
        olds, news = from_struct(request.olds), from_struct(request.news)
        news.pop(_DEFAULTS, None)
        failures = list(_check_table(resource.inputs, news))
        for key, entry in resource.inputs.items():
            if key not in news and entry.default is not None:
                news[key] = entry.default
            if entry.secret and key in news and not isinstance(news[key], Secret):
                news[key] = Secret(news[key])
        if resource.autonamed and "name" not in news:
            if "name" in olds.get(_DEFAULTS, []):
                news["name"] = olds["name"]
            else:
                seed = bytes(request.randomSeed) or secrets.token_bytes(8)
                news["name"] = f"{request.urn.rpartition('::')[2]}-{seed.hex()[:7]}"
            news[_DEFAULTS] = ["name"]
        if not failures:
            failures = list(resource.check(plain(news)))
        return _check_response(news, failures)

    @_answers
    def Diff(
        self, request: provider_pb2.DiffRequest, context: grpc.ServicerContext
    ) -> provider_pb2.DiffResponse:
        resource = self._resource(request.urn)
        olds, news = from_struct(request.old_inputs), from_struct(request.news)
        delete_first = (
            resource.autonamed
            and "name" not in news.get(_DEFAULTS, [])
            and plain(olds.get("name")) == plain(news.get("name"))
        )
        found = changes(olds, news, request.ignoreChanges)
        return _diff_response(found, resource.inputs, delete_first=delete_first)

    @_answers
    def Create(
        self, request: provider_pb2.CreateRequest, context: grpc.ServicerContext
    ) -> provider_pb2.CreateResponse:
        resource = self._resource(request.urn)
        inputs = from_struct(request.properties)
        if request.preview:
            computed = {key: UNKNOWN for key in resource.outputs if key not in inputs}
            return provider_pb2.CreateResponse(
                properties=to_struct(_state(resource, inputs, computed))
            )
        _require_known(inputs)
        call = self._call(request, context)
        created = resource.create(plain(_public(inputs)), call)
        if not context.is_active():
            log.warning("%s: nobody waits for it any more, undone", request.urn)
            resource.undo(created, plain(_public(inputs)), call)
        return provider_pb2.CreateResponse(
            id=created.id, properties=to_struct(_state(resource, inputs, created.outputs))
        )

    @_answers
    def Read(
        self, request: provider_pb2.ReadRequest, context: grpc.ServicerContext
    ) -> provider_pb2.ReadResponse:
        resource = self._resource(request.urn)
        inputs, state = from_struct(request.inputs), from_struct(request.properties)
        found = resource.read(request.id, plain(state), self._call(request, context))
        if found is None:
            return provider_pb2.ReadResponse()
        wanted = set(inputs) or set(resource.inputs)
        now = {key: value for key, value in found.items() if key in wanted}
        marked = {key: _remark(inputs.get(key), value) for key, value in now.items()}
        marked |= {key: value for key, value in inputs.items() if key.startswith("__")}
        return provider_pb2.ReadResponse(
            id=request.id,
            inputs=to_struct(marked),
            properties=to_struct(_state(resource, {**state, **marked}, found)),
        )

    @_answers
    def Update(
        self, request: provider_pb2.UpdateRequest, context: grpc.ServicerContext
    ) -> provider_pb2.UpdateResponse:
        resource = self._resource(request.urn)
        olds, news = from_struct(request.olds), from_struct(request.news)
        if request.preview:
            computed = {
                key: UNKNOWN if entry.volatile else olds[key]
                for key, entry in resource.outputs.items()
                if key not in news and (entry.volatile or key in olds)
            }
        else:
            _require_known(news)
            computed = resource.update(
                request.id,
                plain(_public(olds)),
                plain(_public(news)),
                self._call(request, context),
            )
        return provider_pb2.UpdateResponse(properties=to_struct(_state(resource, news, computed)))

    @_answers
    def Delete(
        self, request: provider_pb2.DeleteRequest, context: grpc.ServicerContext
    ) -> empty_pb2.Empty:
        resource = self._resource(request.urn)
        state = plain(_public(from_struct(request.properties)))
        resource.delete(request.id, state, self._call(request, context))
        return empty_pb2.Empty()


def _check_table(
    table: Mapping[str, Input], news: Properties, extra: frozenset[str] | set[str] = frozenset()
) -> Iterator[Failure]:
    for key, value in news.items():
        if key in extra or key.startswith("__"):
            continue
        entry = table.get(key)
        bare = plain(value)
        if entry is None:
            yield Failure(key, f"Invalid or unknown key. Check `pulumi` for a name like {key!r}.")
        elif bare is not UNKNOWN and not _expected(entry.type, bare):
            yield Failure(key, f"expected {entry.type} type, got a {type(bare).__name__}")
    for key, entry in table.items():
        if entry.required and key not in news:
            yield Failure(key, f"Missing required property '{key}'")


def _check_response(news: Properties, failures: list[Failure]) -> provider_pb2.CheckResponse:
    return provider_pb2.CheckResponse(
        inputs=to_struct(news),
        failures=[
            provider_pb2.CheckFailure(property=failure.property, reason=failure.reason)
            for failure in failures
        ],
    )


def _diff_response(
    found: list[Change], table: Mapping[str, Input], *, delete_first: bool
) -> provider_pb2.DiffResponse:
    kinds: dict[tuple[Kind, bool], provider_pb2.PropertyDiff.Kind.ValueType] = {
        (Kind.ADD, False): provider_pb2.PropertyDiff.ADD,
        (Kind.ADD, True): provider_pb2.PropertyDiff.ADD_REPLACE,
        (Kind.DELETE, False): provider_pb2.PropertyDiff.DELETE,
        (Kind.DELETE, True): provider_pb2.PropertyDiff.DELETE_REPLACE,
        (Kind.UPDATE, False): provider_pb2.PropertyDiff.UPDATE,
        (Kind.UPDATE, True): provider_pb2.PropertyDiff.UPDATE_REPLACE,
    }

    def replaces(change: Change) -> bool:
        return change.top in table and table[change.top].replaces

    replacing = sorted({change.top for change in found if replaces(change)})
    return provider_pb2.DiffResponse(
        changes=(
            provider_pb2.DiffResponse.DIFF_SOME if found else provider_pb2.DiffResponse.DIFF_NONE
        ),
        diffs=sorted({change.top for change in found}),
        replaces=replacing,
        deleteBeforeReplace=bool(replacing) and delete_first,
        hasDetailedDiff=True,
        detailedDiff={
            change.path: provider_pb2.PropertyDiff(
                kind=kinds[change.kind, replaces(change)], inputDiff=True
            )
            for change in found
        },
    )


def _public(properties: Properties) -> Properties:
    """Properties without the bridge's own notes."""
    return {key: value for key, value in properties.items() if not key.startswith("__")}


def _remark(marked: Value, value: Value) -> Value:
    """``value`` as secret as ``marked`` was."""
    if plain(marked) == value:
        return marked
    return Secret(value) if has_secret(marked) else value


def _state(resource: Resource, inputs: Properties, computed: Properties) -> Properties:
    """The state to record: inputs with their marks, then what the provider computed."""
    state = _public(inputs)
    for key, value in computed.items():
        if key in state and plain(state[key]) == plain(value):
            continue
        entry = resource.outputs.get(key)
        secret = (entry is not None and entry.secret) or has_secret(state.get(key))
        state[key] = Secret(plain(value)) if secret else value
    return state


def _require_known(inputs: Properties) -> None:
    unknown = sorted(key for key, value in inputs.items() if has_unknown(value))
    if unknown:
        raise ProviderError(f"unknown value outside a preview in {', '.join(unknown)}")


class Server:
    """A provider that listens on a free port of 127.0.0.1."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=64, thread_name_prefix=provider.package),
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.max_send_message_length", MAX_MESSAGE),
                ("grpc.so_reuseport", 0),
            ],
        )
        provider_pb2_grpc.add_ResourceProviderServicer_to_server(provider, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def stop(self) -> None:
        """Refuse new calls, give running ones 5 seconds."""
        self._server.stop(grace=5).wait()
        self.provider.close()


@contextmanager
def serving(provider: Provider) -> Iterator[Server]:
    """Serve ``provider`` for the length of a block."""
    server = Server(provider)
    try:
        yield server
    finally:
        server.stop()
