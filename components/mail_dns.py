"""Publishes the platform's DNS records, in stages that follow the mail path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pulumi

from components.cloudflare import DnsRecord
from components.secrets import SecretStore
from mailsite import secret_names
from mailsite.model import Platform
from mailsite.records import (
    Record,
    RecordType,
    Stage,
    dkim_keys,
    dkim_record,
    records,
    static_records,
    zone_text,
    zones,
)


@dataclass(frozen=True)
class Entry:
    """A record to publish. ``content`` stands for the record's own where a key is generated."""

    record: Record
    content: pulumi.Input[str]


@dataclass(frozen=True)
class ZoneData:
    """All records of the platform, DKIM keys included, before anyone publishes them."""

    entries: tuple[Entry, ...]
    text: pulumi.Output[str]

    @classmethod
    def of(cls, platform: Platform, secrets: SecretStore) -> ZoneData:
        entries = [Entry(record, record.wire) for record in static_records(platform)]
        public: dict[str, pulumi.Output[str]] = {}
        for domain, key in dkim_keys(platform):
            half = secrets.public(secret_names.dkim_key(domain.name, key.selector))
            public[f"{domain.name}/{key.selector}"] = half
            record = partial(dkim_record, platform, domain, key)
            entries.append(Entry(record(""), half.apply(partial(_wire, record))))
        labels = sorted(public)
        text = pulumi.Output.all(*(public[label] for label in labels)).apply(
            lambda halves: zone_text(records(platform, dict(zip(labels, halves, strict=True))))
        )
        return cls(tuple(entries), text)


def _wire(record: Callable[[str], Record], public: str) -> str:
    return record(public).wire


@dataclass(frozen=True)
class MailDnsArgs:
    """``zone_ids``: Cloudflare's id of each zone that it holds; others are left to the operator.

    ``after`` must be done before any of the records appears.
    """

    zone_data: ZoneData
    zone_ids: Mapping[str, str]
    stage: Stage
    after: Sequence[pulumi.Resource] = ()


class MailDns(pulumi.ComponentResource):
    """The records of one stage. ``done``: all of them are published."""

    def __init__(
        self, name: str, args: MailDnsArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("mail:index:MailDns", name, {}, opts)
        self.done: list[pulumi.Resource] = [
            self._publish(entry, args.zone_ids[entry.record.zone], args.after)
            for entry in args.zone_data.entries
            if entry.record.stage is args.stage and entry.record.zone in args.zone_ids
        ]
        self.register_outputs({})

    def _publish(
        self, entry: Entry, zone_id: str, after: Sequence[pulumi.Resource]
    ) -> pulumi.Resource:
        record = entry.record
        return DnsRecord(
            record.key,
            zone_id=zone_id,
            name=record.name,
            type=record.type.value,
            ttl=record.ttl,
            content=entry.content,
            priority=record.priority,
            proxied=False,  # a proxy in front of a mail host speaks HTTP
            comment=record.why,
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=list(after),
                # A CNAME and what it replaces cannot stand side by side for a moment.
                delete_before_replace=record.type is RecordType.CNAME,
            ),
        )


class ZoneIdError(ValueError):
    """The configuration gives an id of a zone that the platform does not have."""


def unpublished(platform: Platform, zone_ids: Mapping[str, str]) -> tuple[str, ...]:
    """Zones whose records the operator publishes from the stack's outputs.

    Raises:
        ZoneIdError: ``zone_ids`` names a zone that the platform does not have.
    """
    known = zones(platform)
    for zone in zone_ids:
        if zone not in known:
            raise ZoneIdError(
                f"mail:zoneIds: {zone!r} is no zone of the platform ({', '.join(known)}); remove"
                " the entry, or add the domain to the site data"
            )
    return tuple(zone for zone in known if zone not in zone_ids)
