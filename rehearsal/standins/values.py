"""Property values as the engine sends them: JSON-like data with secrets and unknowns.

The wire format is protobuf's ``Struct``. Secrets are objects with a signature, values that are
not known yet (in a preview) are fixed strings; see "Properties and values" in Pulumi's developer
documentation. Numbers are floats on the wire; whole ones become ``int`` here, so that a port
reads 22 and not 22.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from google.protobuf import struct_pb2

SIGNATURE: Final = "4dabf18193072939515e22adb298388d"
SECRET: Final = "1b47061264138c4ac30d75fd1eb44270"
OUTPUT: Final = "d0e6a833031e9bbcd3f4e8bde6ca49a4"

_UNKNOWN_STRING: Final = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
_UNKNOWNS: Final = frozenset(
    {
        _UNKNOWN_STRING,
        "1c4a061d-8072-4f0a-a4cb-0ff528b18fe7",  # boolean
        "3eeb2bf0-c639-47a8-9e75-3b44932eb421",  # number
        "6a19a0b0-7e62-4c92-b797-7f8e31da9cc2",  # array
        "030794c1-ac77-496b-92df-f27374a8bd58",  # asset
        "e48ece36-62e2-4504-bad9-02848725956a",  # archive
        "dd056dcd-154b-4c76-9bd3-c8f88648b5ff",  # object
    }
)


class Unknown:
    """A value that only an ``up`` will know. There is one: :data:`UNKNOWN`."""

    _instance: Unknown | None = None

    def __new__(cls) -> Unknown:
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __repr__(self) -> str:
        return "UNKNOWN"

    def __bool__(self) -> bool:
        raise TypeError("an unknown value has no truth; ask has_unknown() first")


UNKNOWN: Final = Unknown()


@dataclass(frozen=True, repr=False)
class Secret:
    """A value that must not be shown. Its ``repr`` does not show it either."""

    value: Value

    def __repr__(self) -> str:
        return "Secret(...)"


Value: TypeAlias = Any
"""None, bool, int, float, str, list, dict, :class:`Secret` or :data:`UNKNOWN`."""

Properties: TypeAlias = dict[str, Value]


def _decode(value: struct_pb2.Value) -> Value:
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        return UNKNOWN if value.string_value in _UNKNOWNS else value.string_value
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() else number
    if kind == "bool_value":
        return value.bool_value
    if kind == "list_value":
        return [_decode(item) for item in value.list_value.values]
    if kind == "struct_value":
        fields = value.struct_value.fields
        signature = fields[SIGNATURE].string_value if SIGNATURE in fields else ""
        if signature == SECRET:
            return Secret(_decode(fields["value"]))
        if signature == OUTPUT:
            inner = _decode(fields["value"]) if "value" in fields else UNKNOWN
            return Secret(inner) if fields["secret"].bool_value else inner
        return {key: _decode(item) for key, item in fields.items()}
    return None


def _encode(value: Value) -> struct_pb2.Value:
    if value is None:
        return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
    if value is UNKNOWN:
        return struct_pb2.Value(string_value=_UNKNOWN_STRING)
    if isinstance(value, Secret):
        inner = struct_pb2.Struct()
        inner.fields[SIGNATURE].string_value = SECRET
        inner.fields["value"].CopyFrom(_encode(value.value))
        return struct_pb2.Value(struct_value=inner)
    if isinstance(value, bool):
        return struct_pb2.Value(bool_value=value)
    if isinstance(value, int | float):
        return struct_pb2.Value(number_value=value)
    if isinstance(value, str):
        return struct_pb2.Value(string_value=value)
    if isinstance(value, Mapping):
        return struct_pb2.Value(struct_value=to_struct(value))
    if isinstance(value, list | tuple):
        return struct_pb2.Value(
            list_value=struct_pb2.ListValue(values=[_encode(item) for item in value])
        )
    raise TypeError(f"no property value: {type(value).__name__}")


def from_struct(struct: struct_pb2.Struct) -> Properties:
    """Decode the properties of a request. Nulls are dropped: the engine means "not set"."""
    decoded = {key: _decode(item) for key, item in struct.fields.items()}
    return {key: item for key, item in decoded.items() if item is not None}


def to_struct(properties: Mapping[str, Value]) -> struct_pb2.Struct:
    """Encode properties for a response."""
    struct = struct_pb2.Struct()
    for key, item in properties.items():
        struct.fields[key].CopyFrom(_encode(item))
    return struct


def plain(value: Value) -> Value:
    """The value without its secret marks, at any depth."""
    if isinstance(value, Secret):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _walk(value: Value) -> Iterator[Value]:
    yield value
    if isinstance(value, Secret):
        yield from _walk(value.value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _walk(item)


def has_unknown(value: Value) -> bool:
    """True if the value, or anything inside it, is not known yet."""
    return any(item is UNKNOWN for item in _walk(value))


def has_secret(value: Value) -> bool:
    """True if the value, or anything inside it, is marked secret."""
    return any(isinstance(item, Secret) for item in _walk(value))
