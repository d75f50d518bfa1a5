"""A graph of the program as the engine is asked for it: every registration, with its options.

The program runs unchanged in this process against Pulumi's mock monitor. What the mocks of the
SDK do not notice is noticed here: duplicate names, dependencies, providers, protection.
"""

from __future__ import annotations

import asyncio
import json
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pulumi
from google.protobuf.json_format import MessageToDict
from pulumi.runtime import mocks as sdk
from pulumi.runtime import resource as sdk_resource
from pulumi.runtime.proto import engine_pb2, resource_pb2
from pulumi.runtime.proto.source_pb2 import StackTrace

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "mail"

_SECRET = "4dabf18193072939515e22adb298388d"
_SECRET_SIGNATURE = "1b47061264138c4ac30d75fd1eb44270"
_UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"

#: Marks every secret that the mocks generate: no input may show it outside of a secret.
MARK = "SECRETMARK"

SECRET_KEYS = ("secrets", "certificates", "deployKey")

COMMAND = "command:remote:Command"
DOMAIN = "libvirt:index/domain:Domain"
VOLUME = "libvirt:index/volume:Volume"
CLOUD_INIT = "libvirt:index/cloudInitDisk:CloudInitDisk"
DNS_RECORD = "cloudflare:index/dnsRecord:DnsRecord"
PRIVATE_KEY = "tls:index/privateKey:PrivateKey"
PASSWORD = "random:index/randomPassword:RandomPassword"


class UnknownResource(KeyError):
    """The program registers a resource that the mocks have no outputs for."""


@dataclass(frozen=True)
class Registration:
    """One resource as registered. ``inputs`` are plain; ``secret`` and ``unknown`` name paths."""

    urn: str
    type: str
    name: str
    parent: str
    custom: bool
    inputs: Mapping[str, Any]
    secret: frozenset[str]
    unknown: frozenset[str]
    visible: str
    dependencies: frozenset[str]
    property_dependencies: Mapping[str, frozenset[str]]
    provider: str
    protect: bool
    ignore_changes: tuple[str, ...]
    replace_with: tuple[str, ...]
    delete_before_replace: bool
    aliases: tuple[str, ...]
    additional_secret_outputs: frozenset[str]
    retain_on_delete: bool
    order: int


@dataclass
class Graph:
    """All registrations by URN, in order, and what the stack exports."""

    registrations: dict[str, Registration] = field(default_factory=dict)
    duplicates: list[str] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    secret_outputs: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)

    def of_type(self, token: str) -> tuple[Registration, ...]:
        return tuple(r for r in self.registrations.values() if r.type == token)

    def one(self, token: str, name: str) -> Registration:
        (found,) = [r for r in self.of_type(token) if r.name == name]
        return found

    def ancestors(self, registration: Registration) -> Iterator[Registration]:
        while registration.parent in self.registrations:
            registration = self.registrations[registration.parent]
            yield registration

    def owner(self, registration: Registration) -> str | None:
        """The host that a resource belongs to."""
        chain = (registration, *self.ancestors(registration))
        return next((r.name for r in chain if r.type == "mail:index:Host"), None)

    def reaches(self, start: Registration, goal: str) -> bool:
        """Whether ``start`` waits for ``goal`` (a URN), over any number of steps."""
        seen: set[str] = set()
        todo = [start.urn]
        while todo:
            urn = todo.pop()
            if urn == goal:
                return True
            if urn in seen or urn not in self.registrations:
                continue
            seen.add(urn)
            todo += self.registrations[urn].dependencies
        return False


class _Mocks(sdk.Mocks):
    """Outputs of the providers, as far as the program reads them. Unread types raise."""

    def new_resource(self, args: sdk.MockResourceArgs) -> tuple[str | None, dict[str, Any]]:
        state = dict(args.inputs)
        match args.typ:
            case _ if not args.custom or args.typ.startswith("pulumi:providers:"):
                return f"{args.name}-id", state
            case "tls:index/privateKey:PrivateKey":
                state |= {
                    "privateKeyPem": f"PEM {MARK} {args.name}",
                    "privateKeyOpenssh": f"OPENSSH {MARK} {args.name}",
                    "publicKeyPem": _pem(args.name),
                    "publicKeyOpenssh": f"ssh-ed25519 {args.name}\n",
                }
            case "random:index/randomPassword:RandomPassword":
                state |= {
                    "result": f"{MARK} {args.name}",
                    "bcryptHash": f"$2a$10${MARK}{args.name}",
                }
            case "command:remote:Command":
                state |= {"stdout": "", "stderr": ""}
            case (
                "libvirt:index/domain:Domain"
                | "libvirt:index/volume:Volume"
                | "libvirt:index/cloudInitDisk:CloudInitDisk"
                | "cloudflare:index/dnsRecord:DnsRecord"
            ):
                pass
            case _:
                raise UnknownResource(args.typ)
        return f"{args.name}-id", state

    def call(self, args: sdk.MockCallArgs) -> tuple[dict[str, Any], None]:
        raise UnknownResource(args.token)


class _PreviewMocks(_Mocks):
    """A first preview: whatever a provider would make is unknown."""

    def new_resource(self, args: sdk.MockResourceArgs) -> tuple[str | None, dict[str, Any]]:
        _, _ = super().new_resource(args)
        return "", dict(args.inputs)


def _pem(name: str) -> str:
    body = (name.encode().hex() * 20)[:392]
    lines = "\n".join(body[i : i + 64] for i in range(0, len(body), 64))
    return f"-----BEGIN PUBLIC KEY-----\n{lines}\n-----END PUBLIC KEY-----\n"


class _Monitor(sdk.MockMonitor):
    def __init__(self, mocks: sdk.Mocks, graph: Graph) -> None:
        super().__init__(mocks)
        self.graph = graph

    def RegisterResource(self, request: Any) -> Any:
        urn = self._urn(request)
        if request.type == "pulumi:pulumi:Stack":
            return resource_pb2.RegisterResourceResponse(urn=urn)
        if urn in self.graph.registrations:
            self.graph.duplicates.append(urn)
        raw = MessageToDict(request.object)
        secret: set[str] = set()
        unknown: set[str] = set()
        inputs = _plain(raw, "", secret, unknown)
        self.graph.registrations[urn] = Registration(
            urn=urn,
            type=request.type,
            name=request.name,
            parent=request.parent,
            custom=request.custom,
            inputs=inputs,
            secret=frozenset(secret),
            unknown=frozenset(unknown),
            visible=json.dumps(_masked(raw)),
            dependencies=frozenset(request.dependencies),
            property_dependencies={
                key: frozenset(value.urns) for key, value in request.propertyDependencies.items()
            },
            provider=request.provider,
            protect=request.protect,
            ignore_changes=tuple(request.ignoreChanges),
            replace_with=tuple(request.replace_with),
            delete_before_replace=request.deleteBeforeReplace,
            aliases=tuple(request.aliasURNs) + tuple(a.urn or str(a) for a in request.aliases),
            additional_secret_outputs=frozenset(request.additionalSecretOutputs),
            retain_on_delete=request.retainOnDelete,
            order=len(self.graph.registrations),
        )
        return super().RegisterResource(request)

    def make_urn(self, parent: str, type_: str, name: str) -> str:
        """URNs as the engine makes them: with the types of all ancestors."""
        if parent and "pulumi:pulumi:Stack" not in parent:
            type_ = f"{parent.split('::')[2]}${type_}"
        return f"urn:pulumi:test::{PROJECT}::{type_}::{name}"

    def _urn(self, request: Any) -> str:
        return self.make_urn(request.parent, request.type, request.name)


class _Engine(sdk.MockEngine):
    def __init__(self, graph: Graph) -> None:
        super().__init__(None)
        self.graph = graph

    def Log(self, request: Any) -> None:
        if request.severity != engine_pb2.DEBUG:
            self.graph.log.append(request.message)


def platform_program() -> None:
    """The project's own program, as the engine runs it."""
    runpy.run_path(str(ROOT / "__main__.py"))


def build(
    config: Mapping[str, Any],
    *,
    preview: bool = False,
    program: Callable[[], None] = platform_program,
    graph: Graph | None = None,
    secret_keys: Sequence[str] = SECRET_KEYS,
) -> Graph:
    """Run ``program`` with ``config`` and return what it registered.

    ``config``: values by key without the project's name, strings or objects; those of
    ``secret_keys`` are encrypted in the stack file. ``graph`` receives the registrations, for
    callers that expect a failure.
    """
    graph = graph if graph is not None else Graph()
    # The SDK sends its stack with each registration: a sixth of the time, for nothing here.
    no_stack = patch.object(sdk_resource, "_get_stack_trace", StackTrace)
    # It has an event loop of its own.
    with ThreadPoolExecutor(1) as thread, no_stack:
        thread.submit(_run, config, preview, program, graph, secret_keys).result()
    return graph


def _run(
    config: Mapping[str, Any],
    preview: bool,
    program: Callable[[], None],
    graph: Graph,
    secret_keys: Sequence[str],
) -> None:
    mocks = _PreviewMocks() if preview else _Mocks()
    texts = {
        f"{PROJECT}:{key}": value if isinstance(value, str) else json.dumps(value)
        for key, value in config.items()
    }
    pulumi.runtime.set_all_config(texts, [f"{PROJECT}:{k}" for k in secret_keys if k in config])
    asyncio.set_event_loop(asyncio.new_event_loop())
    monitor = _Monitor(mocks, graph)
    sdk.set_mocks(mocks, project=PROJECT, stack="test", preview=preview, monitor=monitor)
    pulumi.runtime.settings.SETTINGS.engine = _Engine(graph)

    @pulumi.runtime.test
    def run() -> pulumi.Output[None]:
        program()
        return _exports(graph)

    run()


def _exports(graph: Graph) -> pulumi.Output[None]:
    stack = pulumi.runtime.get_root_resource()
    assert stack is not None
    outputs = {
        name: pulumi.Output.from_input(value)
        for name, value in stack.outputs.items()  # type: ignore[attr-defined]
    }

    async def read() -> None:
        for name, output in outputs.items():
            graph.outputs[name] = await output.future()
            if await output.is_secret():
                graph.secret_outputs.add(name)

    return pulumi.Output.from_input(read())


def _is_secret(value: Any) -> bool:
    return isinstance(value, dict) and value.get(_SECRET) == _SECRET_SIGNATURE


def _plain(value: Any, path: str, secret: set[str], unknown: set[str]) -> Any:
    if _is_secret(value):
        secret.add(path)
        return _plain(value["value"], path, secret, unknown)
    if isinstance(value, dict):
        return {
            k: _plain(v, f"{path}.{k}" if path else k, secret, unknown) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_plain(v, f"{path}[{i}]", secret, unknown) for i, v in enumerate(value)]
    if value == _UNKNOWN:
        unknown.add(path)
    return value


def _masked(value: Any) -> Any:
    """What a state file, a preview and a log may show of the inputs."""
    if _is_secret(value):
        return "[secret]"
    if isinstance(value, dict):
        return {k: _masked(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_masked(v) for v in value]
    return value
