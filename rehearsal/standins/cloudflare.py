"""pulumi-cloudflare (6): DNS records, refused for the reasons that Cloudflare's API has.

The stand-in is stricter than Cloudflare in four ways, each of which would otherwise show as a
difference that comes back with every run, or as a broken record: a name must be fully qualified
and without a trailing dot, so must the targets of CNAME and MX; the strings of a TXT record must
be quoted and cut by the program; a comment has at most 100 characters (the free plan's limit,
500 on the others); and no proxying but of addresses and CNAMEs.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

import dns.exception

from .base import Call, Created, Failure, Input, Output, Provider, ProviderError, Resource
from .publisher import Data, Publisher, canonical, types
from .store import Store
from .values import UNKNOWN, Properties

TYPES: Final = (
    *("A", "AAAA", "CAA", "CERT", "CNAME", "DNSKEY", "DS", "HTTPS", "LOC", "MX", "NAPTR", "NS"),
    *("OPENPGPKEY", "PTR", "SMIMEA", "SRV", "SSHFP", "SVCB", "TLSA", "TXT", "URI"),
)
PROXIABLE: Final = frozenset({"A", "AAAA", "CNAME"})
TARGETS: Final = frozenset({"CNAME", "MX", "NS", "PTR"})
COMMENT_LENGTH: Final = 100
AUTOMATIC_TTL: Final = 300
"""Seconds that Cloudflare serves for a TTL of 1, "automatic"."""
TXT_BYTES: Final = 4096
"""Octets that one TXT record may have on the wire."""

_STRING: Final = re.compile(r'"((?:[^"\\]|\\.)*)"')
_SAME_NAME: Final = (
    "For more details, refer to <https://developers.cloudflare.com/dns/manage-dns-records/"
    "troubleshooting/records-with-same-name/>."
)

_DATA: Final[Mapping[str, tuple[str, ...]]] = {
    "MX": ("priority", "target"),
    "SRV": ("priority", "weight", "port", "target"),
    "TLSA": ("usage", "selector", "matchingType", "certificate"),
    "SSHFP": ("algorithm", "type", "fingerprint"),
    "CAA": ("flags", "tag", "value"),
    "DS": ("keyTag", "algorithm", "digestType", "digest"),
}
"""The parts of ``data``, in the order of the presentation format."""


class ApiError(ProviderError):
    """A refusal as the provider reports one of Cloudflare's API."""

    def __init__(self, method: str, path: str, code: int, message: str, status: str) -> None:
        body = {"success": False, "errors": [{"code": code, "message": message}], "result": None}
        super().__init__(
            f'failed to make http request: {method} "https://api.cloudflare.com/client/v4{path}": '
            f"{status} {json.dumps(body)}"
        )


class Refused(Exception):
    """Why a record cannot be: Cloudflare's code and message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Record:
    """A record as Cloudflare keeps it."""

    zone_id: str
    name: str
    ttl: int
    type: str
    text: str
    """Data in presentation format, names absolute."""

    @property
    def data(self) -> Data:
        return Data(self.type, self.text)

    @property
    def served_ttl(self) -> int:
        return AUTOMATIC_TTL if self.ttl == 1 else self.ttl


def _strings(content: str) -> list[str]:
    """The strings of a TXT record's content. Raises :class:`Refused`."""
    if not re.fullmatch(rf"(?:{_STRING.pattern})(?:\s+{_STRING.pattern})*", content.strip()):
        raise Refused(
            9207,
            'TXT content must be enclosed in double quotes, several strings apart: "..." "..."',
        )
    strings = [match.group(1) for match in _STRING.finditer(content)]
    for text in strings:
        length = len(re.sub(r"\\(\d{3}|.)", "x", text).encode())
        if length > 255:
            raise Refused(
                9208,
                f"a string of the TXT content has {length} bytes, more than 255: cut it, or "
                "Cloudflare does and the difference returns with every run",
            )
    return strings


def _text(inputs: Properties) -> str:
    """The record's data in presentation format. Raises :class:`Refused`."""
    kind, content, data = inputs["type"], inputs.get("content"), inputs.get("data")
    if data is not None:
        parts = _DATA.get(kind)
        if parts is None:
            raise Refused(9000, f"DNS record has data, but a {kind} record has content")
        if kind == "SRV" and "priority" in inputs:
            data = {"priority": inputs["priority"], **data}
        missing = [part for part in parts if part not in data]
        if missing:
            raise Refused(9101, f"{', '.join(missing)} is a required data field.")
        if kind in ("MX", "SRV"):
            target = str(data["target"])
            _target(kind, target)
            data = {**data, "target": target if target == "." else f"{target}."}
        if kind == "CAA":
            data = {**data, "value": json.dumps(data["value"])}
        return " ".join(str(data[part]) for part in parts)
    if content is None:
        raise Refused(9020, f"Content for {kind} record is required.")
    if kind in _DATA and kind != "MX":
        raise Refused(9101, f"{_DATA[kind][0]} is a required data field.")
    if kind in TARGETS:
        _target(kind, content)
        absolute = content if content == "." else f"{content}."
        if kind != "MX":
            return absolute
        if "priority" not in inputs:
            raise Refused(9100, "priority is a required field for a MX record.")
        return f"{inputs['priority']} {absolute}"
    if kind == "TXT":
        strings = _strings(content)
        wire = sum(len(text.encode()) + 1 for text in strings)
        if wire > TXT_BYTES:
            raise Refused(9209, f"TXT content has {wire} bytes, more than {TXT_BYTES}")
    return str(content)


def _target(kind: str, target: str) -> None:
    if target == "." and kind in ("MX", "SRV"):
        return  # null MX (RFC 7505), no service (RFC 2782)
    if target.endswith("."):
        raise Refused(
            9009, f"Content for {kind} record must have no trailing dot: {target.rstrip('.')}"
        )
    if re.fullmatch(r"[0-9.]+|.*:.*", target):
        raise Refused(9009, f"Content for {kind} record must be a hostname, not an address.")
    if "." not in target:
        raise Refused(9009, f"Content for {kind} record is invalid. Must be a fully qualified name")


def validate(inputs: Properties, zone: str) -> Record:
    """The record that ``inputs`` describe. Raises :class:`Refused`, as the API would."""
    kind, name, ttl = inputs["type"], inputs["name"], inputs["ttl"]
    if name.endswith(".") or not (name == zone or name.endswith(f".{zone}")):
        raise Refused(
            9000,
            f"DNS name is invalid: write {name!r} in full, below {zone}, without a dot at the end",
        )
    if ttl != 1 and not 60 <= ttl <= 86400:
        raise Refused(
            9021, "Invalid TTL. Must be between 60 and 86,400 seconds, or 1 for Automatic."
        )
    if inputs.get("proxied") and kind not in PROXIABLE:
        raise Refused(9004, "This record type cannot be proxied.")
    if len(inputs.get("comment", "")) > COMMENT_LENGTH:
        raise Refused(
            9300,
            f"DNS record comment has {len(inputs['comment'])} characters; the free plan takes "
            f"{COMMENT_LENGTH}",
        )
    if inputs.get("tags"):
        raise Refused(9301, "DNS record has 1 or more tags, exceeding the quota of 0.")
    try:
        data = canonical(kind, _text(inputs))
    except (dns.exception.DNSException, ValueError) as error:
        raise Refused(9005, f"Content for {kind} record is invalid: {error}") from error
    return Record(inputs["zoneId"], name, ttl, kind, data.text)


def conflict(record: Record, others: frozenset[Data]) -> Refused | None:
    """Why ``record`` cannot stand beside the ``others`` of its name."""
    if record.data in others:
        return Refused(81058, "An identical record already exists.")
    if record.type == "CNAME" and types(others) & PROXIABLE:
        return Refused(
            81053, f"An A, AAAA, or CNAME record with that host already exists. {_SAME_NAME}"
        )
    if record.type == "CNAME" and others:
        return Refused(
            81055, f"A record of another type with that host already exists. {_SAME_NAME}"
        )
    if "CNAME" in types(others):
        return Refused(81054, f"A CNAME record with that host already exists. {_SAME_NAME}")
    return None


class DnsRecord(Resource):
    """A record of a zone."""

    token = "cloudflare:index/dnsRecord:DnsRecord"
    inputs: ClassVar[Mapping[str, Input]] = {
        "zoneId": Input("string", required=True, replaces=True),
        "name": Input("string", required=True),
        "type": Input("string", required=True),
        "ttl": Input("number", required=True),
        "content": Input("string"),
        "data": Input("map"),
        "priority": Input("number"),
        "proxied": Input("boolean", default=False),
        "comment": Input("string"),
        "tags": Input("list"),
        "settings": Input("map"),
        "privateRouting": Input("boolean"),
        "includeShadowMetadata": Input("boolean"),
    }
    outputs: ClassVar[Mapping[str, Output]] = {
        "createdOn": Output(),
        "modifiedOn": Output(volatile=True),
        "commentModifiedOn": Output(volatile=True),
        "meta": Output(),
        "proxiable": Output(),
    }

    def __init__(self, store: Store, publisher: Publisher) -> None:
        self._store = store
        self._publisher = publisher
        self._lock = threading.Lock()
        self._names: dict[str, threading.Lock] = {}

    def check(self, inputs: Properties) -> Iterator[Failure]:
        kind, priority = inputs["type"], inputs.get("priority", 0)
        if kind is not UNKNOWN and kind not in TYPES:
            yield Failure(
                "type", f"Attribute type value must be one of: {list(TYPES)}, got: {kind!r}"
            )
        if priority is not UNKNOWN and not 0 <= priority <= 65535:
            yield Failure(
                "priority", "Attribute priority value must be between 0.000000 and 65535.000000"
            )

    def _zone(self, zone_id: str) -> str:
        zone = self._publisher.zones().get(zone_id)
        if zone is None:
            raise Refused(
                7003,
                f"Could not route to /zones/{zone_id}/dns_records, perhaps your object "
                "identifier is invalid?",
            )
        return zone

    @contextmanager
    def _alone(self, *names: str) -> Iterator[None]:
        """Nobody else changes what has these names. The name server signs what comes for others
        meanwhile in one go.
        """
        with self._lock:
            locks = [self._names.setdefault(name, threading.Lock()) for name in sorted({*names})]
        with ExitStack() as held:
            for lock in locks:
                held.enter_context(lock)
            yield

    def _publish(
        self, inputs: Properties, old: Record | None, refuse: Callable[[Refused], ApiError]
    ) -> Record:
        """Put a record into its zone, in place of ``old``."""
        try:
            zone = self._zone(inputs["zoneId"])
            record = validate(inputs, zone)
            if old is not None and (old.name, old.data, old.served_ttl) == (
                record.name,
                record.data,
                record.served_ttl,
            ):
                return record
            with self._alone(record.name, *([old.name] if old is not None else [])):
                others = self._publisher.records(zone, record.name)
                if old is not None and old.name == record.name:
                    others -= {old.data}
                problem = conflict(record, others)
                if problem is not None:
                    raise problem
                self._publisher.change(
                    zone,
                    (old.name, old.data) if old is not None else None,
                    (record.name, record.served_ttl, record.data),
                )
        except Refused as problem:
            raise refuse(problem) from None
        return record

    def create(self, inputs: Properties, call: Call) -> Created:
        path = f"/zones/{inputs['zoneId']}/dns_records"
        record = self._publish(
            inputs,
            None,
            lambda why: ApiError("POST", path, why.code, why.message, "400 Bad Request"),
        )
        id, now = secrets.token_hex(16), _now()
        with self._store.edit() as data:
            data.setdefault("records", {})[id] = {**asdict(record), "created_on": now}
        return Created(id, self._computed(inputs, now, now))

    def _computed(self, inputs: Properties, created: str, modified: str) -> Properties:
        computed: Properties = {
            "createdOn": created,
            "modifiedOn": modified,
            "meta": "{}",
            "proxiable": inputs["type"] in PROXIABLE,
        }
        if inputs.get("comment"):
            computed["commentModifiedOn"] = modified
        return computed

    def _find(self, id: str) -> tuple[Record, str] | None:
        with self._store.view() as data:
            kept: dict[str, Any] | None = data.get("records", {}).get(id)
        if kept is None:
            return None
        created = kept["created_on"]
        return Record(**{key: kept[key] for key in kept if key != "created_on"}), created

    def read(self, id: str, state: Properties, call: Call) -> Properties | None:
        found = self._find(id)
        if found is None:
            return None
        record, _ = found
        zone = self._publisher.zones().get(record.zone_id)
        if zone is None or record.data not in self._publisher.records(zone, record.name):
            return None
        return state

    def update(self, id: str, old: Properties, new: Properties, call: Call) -> Properties:
        path = f"/zones/{new['zoneId']}/dns_records/{id}"
        found = self._find(id)
        if found is None:
            raise ApiError("PUT", path, 81044, "Record does not exist.", "404 Not Found")
        record, created = found
        changed = self._publish(
            new,
            record,
            lambda why: ApiError("PUT", path, why.code, why.message, "400 Bad Request"),
        )
        with self._store.edit() as data:
            data["records"][id] = {**asdict(changed), "created_on": created}
        return self._computed(new, created, _now())

    def delete(self, id: str, state: Properties, call: Call) -> None:
        path = f"/zones/{state['zoneId']}/dns_records/{id}"
        found = self._find(id)
        if found is None:
            raise ApiError("DELETE", path, 81044, "Record does not exist.", "404 Not Found")
        record, _ = found
        zone = self._publisher.zones().get(record.zone_id)
        if zone is not None:
            with self._alone(record.name):
                self._publisher.change(zone, (record.name, record.data), None)
        with self._store.edit() as data:
            del data["records"][id]

    def undo(self, created: Created, inputs: Properties, call: Call) -> None:
        self.delete(created.id, inputs, call)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Cloudflare(Provider):
    """The package ``cloudflare``. Credentials are taken and not used."""

    package = "cloudflare"
    config: ClassVar[Mapping[str, Input]] = {
        "apiKey": Input("string"),
        "apiToken": Input("string"),
        "apiUserServiceKey": Input("string"),
        "baseUrl": Input("string"),
        "email": Input("string"),
        "userAgentOperatorSuffix": Input("string"),
    }

    def __init__(self, store: Store, publisher: Publisher) -> None:
        super().__init__({DnsRecord.token: DnsRecord(store, publisher)})
