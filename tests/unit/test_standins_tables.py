"""The stand-ins' tables against the real providers' packages and schemas."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from components import cloudflare
from rehearsal.standins.base import Input, Resource
from rehearsal.standins.cloudflare import DnsRecord
from rehearsal.standins.command import RemoteCommand
from rehearsal.standins.diff import Change, Kind, changes
from rehearsal.standins.libvirt import CloudInitDisk, DomainResource, VolumeResource
from rehearsal.standins.random import RandomBytes, RandomId, RandomPassword, RandomString
from rehearsal.standins.tls import PrivateKey
from rehearsal.standins.values import (
    UNKNOWN,
    Secret,
    from_struct,
    has_secret,
    has_unknown,
    plain,
    to_struct,
)

SDK: dict[type[Resource], str] = {
    DnsRecord: "pulumi_cloudflare.dns_record.DnsRecord",
    RemoteCommand: "pulumi_command.remote.Command",
    VolumeResource: "pulumi_libvirt.Volume",
    CloudInitDisk: "pulumi_libvirt.CloudInitDisk",
    DomainResource: "pulumi_libvirt.Domain",
    RandomString: "pulumi_random.RandomString",
    RandomPassword: "pulumi_random.RandomPassword",
    RandomBytes: "pulumi_random.RandomBytes",
    RandomId: "pulumi_random.RandomId",
    PrivateKey: "pulumi_tls.PrivateKey",
}

# `willReplaceOnChanges` of the packages' schemas; the plan modifiers of the providers' own
# sources where the schema does not say (random, tls, cloudflare).
ALL = "all"
REPLACES: dict[type[Resource], str] = {
    DnsRecord: "zoneId",
    RemoteCommand: "triggers",
    VolumeResource: ALL,
    CloudInitDisk: ALL,
    DomainResource: "cmdlines coreosIgnition cpu description disks filesystems firmware fwCfgName "
    "graphics memory name nvram type vcpu",
    RandomString: ALL,
    RandomPassword: ALL,
    RandomBytes: ALL,
    RandomId: ALL,
    PrivateKey: ALL,
}


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.title() for word in rest)


@functools.cache
def cloudflare_package() -> None:
    """Have ``pulumi_cloudflare`` load a module alone: all of them take ten seconds to compile."""
    spec = importlib.util.find_spec("pulumi_cloudflare")
    assert spec is not None
    package = sys.modules[spec.name] = ModuleType(spec.name)
    package.__path__ = list(spec.submodule_search_locations or ())
    for shared in ("outputs", "_inputs"):
        empty = sys.modules[f"{spec.name}.{shared}"] = ModuleType(f"{spec.name}.{shared}")
        setattr(package, shared, empty)
    importlib.import_module(f"{spec.name}.dns_record")


def sdk(resource: type[Resource]) -> Any:
    """The resource's class in the package. Its modules load one another when they are used."""
    cloudflare_package()
    package, *path = SDK[resource].split(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return functools.reduce(getattr, path, importlib.import_module(package))


@pytest.fixture(params=SDK, ids=lambda resource: resource.token)
def resource(request: pytest.FixtureRequest) -> type[Resource]:
    found: type[Resource] = request.param
    return found


def test_inputs_are_those_of_the_package(resource: type[Resource]) -> None:
    module = sys.modules[sdk(resource).__module__]
    arguments = getattr(module, f"{sdk(resource).__name__}Args").__init__
    parameters = list(inspect.signature(arguments).parameters.values())[1:]
    assert {camel(p.name): p.default is inspect.Parameter.empty for p in parameters} == {
        key: entry.required for key, entry in resource.inputs.items()
    }


def test_the_platforms_own_dns_record_is_that_of_the_package() -> None:
    parameters = inspect.signature(cloudflare.DnsRecord.__init__).parameters.values()
    sent = {camel(p.name) for p in parameters if p.kind is p.KEYWORD_ONLY} - {"opts"}
    assert cloudflare.DnsRecord.pulumi_type == sdk(DnsRecord).pulumi_type
    assert sent <= set(DnsRecord.inputs)
    assert {key for key, entry in DnsRecord.inputs.items() if entry.required} <= sent


def test_outputs_are_outputs_of_the_package(resource: type[Resource]) -> None:
    known = {
        camel(name) for name, value in vars(sdk(resource)).items() if isinstance(value, property)
    }
    assert set(resource.outputs) <= known


def test_secrets_are_those_of_the_package(resource: type[Resource]) -> None:
    source = Path(inspect.getfile(sdk(resource))).read_text()
    named = re.search(r"additional_secret_outputs=\[(.*?)\]", source)
    expected = set(re.findall(r'"(\w+)"', named.group(1))) if named else set()
    marked = {key for key, entry in resource.outputs.items() if entry.secret}
    marked |= {key for key, entry in resource.inputs.items() if entry.secret}
    assert marked == expected


def test_replacing_inputs_are_those_of_the_schema(resource: type[Resource]) -> None:
    expected = resource.inputs if REPLACES[resource] == ALL else REPLACES[resource].split()
    assert {key for key, entry in resource.inputs.items() if entry.replaces} == set(expected)


def test_defaults_have_the_type_of_their_input(resource: type[Resource]) -> None:
    types: dict[str, tuple[type, ...]] = {
        "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
    }  # fmt: skip

    def fits(entry: Input) -> bool:
        return entry.default is None or isinstance(entry.default, types[entry.type])

    assert all(fits(entry) for entry in resource.inputs.values())


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 1.0}, [Change("a", Kind.UPDATE)]),
        ({"a": 1}, {"b": 1}, [Change("a", Kind.DELETE), Change("b", Kind.ADD)]),
        ({"a": {"b": 1, "c.d": 2}}, {"a": {"b": 2, "c.d": 3}},
         [Change("a.b", Kind.UPDATE), Change('a["c.d"]', Kind.UPDATE)]),
        ({"a": [1, 2]}, {"a": [1, 3, 4]}, [Change("a[1]", Kind.UPDATE), Change("a[2]", Kind.ADD)]),
        ({"a": [1, 2]}, {"a": [1]}, [Change("a[1]", Kind.DELETE)]),
        ({"a": Secret("x")}, {"a": "x"}, []),
        ({"a": Secret("x")}, {"a": Secret("y")}, [Change("a", Kind.UPDATE)]),
        ({"a": "x"}, {"a": UNKNOWN}, [Change("a", Kind.UPDATE)]),
        ({"a": True}, {"a": 1}, [Change("a", Kind.UPDATE)]),
        ({"__defaults": ["name"]}, {}, []),
    ],
)  # fmt: skip
def test_changes_are_found_by_path(
    old: dict[str, Any], new: dict[str, Any], expected: list[Change]
) -> None:
    assert changes(old, new) == expected


def test_ignored_paths_count_with_everything_below_them() -> None:
    old = {"disks": [{"volumeId": "a"}], "diskless": 1, "cpu": {"mode": "x"}}
    new = {"disks": [{"volumeId": "b"}], "diskless": 2, "cpu": {"mode": "y"}}
    assert [change.path for change in changes(old, new, ["disks", "cpu.mode"])] == ["diskless"]


def test_values_survive_the_wire() -> None:
    value = {
        "text": "ä\n", "whole": 22, "broken": 1.5, "yes": True, "none": {},
        "list": [1, "a", [False]],
        "secret": Secret({"key": "k"}), "unknown": UNKNOWN, "both": Secret(UNKNOWN),
    }  # fmt: skip
    back = from_struct(to_struct(value))
    assert back == value
    assert isinstance(back["whole"], int)
    assert has_secret(back["both"])
    assert has_unknown(back["both"])
    assert plain(back["secret"]) == {"key": "k"}


def test_what_is_not_set_is_left_out() -> None:
    assert from_struct(to_struct({"a": None, "b": 1})) == {"b": 1}


def test_a_secret_is_not_shown_and_an_unknown_has_no_truth() -> None:
    assert "hidden" not in repr({"key": Secret("hidden")})
    with pytest.raises(TypeError):
        bool(UNKNOWN)
