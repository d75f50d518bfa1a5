"""Configuration of the world's authoritative name server (Knot DNS), and its update key.

Operator zones live in their zone files, which Knot rewrites after each DNS update, so that they
survive a restart of the machine; all others are loaded anew from the files that
:mod:`rehearsal.world.zones` describes.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import dns.name
import dns.tsig
import dns.tsigkeyring

from mailsite.model import IPAddress
from rehearsal.state import write_atomic
from rehearsal.world.zones import Zone

ALGORITHM = "hmac-sha256"
_KEY_NAME = "operator.rehearsal."
_ACME_KEY_NAME = "acme.rehearsal."


@dataclass(frozen=True)
class UpdateKey:
    """A TSIG key (RFC 8945) for DNS updates of operator zones: the operator's own may change and
    transfer everything, that of the ACME client only answer challenges.
    """

    name: str
    secret: str

    @classmethod
    def kept(cls, path: Path, name: str = _KEY_NAME) -> UpdateKey:
        """The key in ``path``, made and written there (0600) when it is missing."""
        if not path.exists():
            secret = base64.b64encode(secrets.token_bytes(32)).decode("ascii")
            write_atomic(path, json.dumps({"name": name, "secret": secret}), keep=True)
        value = json.loads(path.read_text(encoding="ascii"))
        return cls(value["name"], value["secret"])

    @classmethod
    def of_acme(cls, path: Path) -> UpdateKey:
        """The key of the ACME client, kept in ``path``."""
        return cls.kept(path, _ACME_KEY_NAME)

    @property
    def keyring(self) -> dict[dns.name.Name, dns.tsig.Key]:
        """The key as dnspython takes it."""
        name = dns.name.from_text(self.name)
        return {name: dns.tsig.Key(name, self.secret, ALGORITHM)}

    def __repr__(self) -> str:
        return f"UpdateKey({self.name!r})"


def zone_file(zone: str) -> str:
    """File name of a zone; the root has no name to make one of."""
    return f"{zone.rstrip('.') or 'root'}.zone"


def configuration(
    zones: Mapping[str, Zone],
    addresses: Iterable[IPAddress],
    key: UpdateKey,
    *,
    acme: UpdateKey,
    challenges: Sequence[str],
    folder: str,
    run: str,
) -> str:
    """``knot.conf``.

    :param acme: the key that may change TXT records of the names ``challenges`` alone.

    :param addresses: what the server listens on.
    :param folder: where zone files, journals and DNSSEC keys are, on the machine.
    :param run: run-time folder, on the machine.
    """
    listen = ", ".join(f"{address}@53" for address in addresses)
    lines = [
        "server:",
        f"    rundir: {run}",
        "    user: knot:knot",
        f"    listen: [{listen}]",
        # One machine answers for the whole internet; two cores carry all of it.
        "    udp-workers: 1",
        "    tcp-workers: 2",
        "    background-workers: 2",
        "log:",
        "  - target: stderr",
        "    any: notice",
        "database:",
        f"    storage: {folder}",
        "key:",
        f"  - id: {key.name}",
        f"    algorithm: {ALGORITHM}",
        f"    secret: {key.secret}",
        f"  - id: {acme.name}",
        f"    algorithm: {ALGORITHM}",
        f"    secret: {acme.secret}",
        "acl:",
        *_challenge_acl(acme, challenges),
        "  - id: operator",
        f"    key: {key.name}",
        "    action: [transfer, update]",
        "  - id: transfer",
        f"    key: {key.name}",
        "    action: transfer",
        "policy:",
        "  - id: world",
        "    algorithm: ecdsap256sha256",
        "    single-type-signing: on",
        "    ksk-lifetime: 0",
        "    cds-cdnskey-publish: none",
        "template:",
        "  - id: default",
        f"    storage: {folder}/zones",
        "    serial-policy: unixtime",
        "    dnssec-policy: world",
        "    semantic-checks: on",
        # Loaded anew, signed anew: nothing of an earlier site can linger.
        "    zonefile-load: difference-no-serial",
        "    zonefile-sync: -1",
        "    journal-content: all",
        "    acl: transfer",
        "  - id: dynamic",
        f"    storage: {folder}/zones",
        "    serial-policy: unixtime",
        "    dnssec-policy: world",
        "    semantic-checks: on",
        "    zonefile-load: whole",
        "    zonefile-sync: 0",
        "    journal-content: changes",
        f"    acl: [{'operator, challenges' if challenges else 'operator'}]",
        "zone:",
    ]
    for name, zone in sorted(zones.items()):
        lines += [
            f"  - domain: {name}",
            f"    file: {zone_file(name)}",
            f"    template: {'dynamic' if zone.dynamic else 'default'}",
            f"    dnssec-signing: {'on' if zone.signed else 'off'}",
        ]
    return "".join(f"{line}\n" for line in lines)


def _challenge_acl(key: UpdateKey, names: Sequence[str]) -> Iterator[str]:
    """What a provider that can limit a token would allow: challenges, and nothing else."""
    if names:
        yield "  - id: challenges"
        yield f"    key: {key.name}"
        yield "    action: update"
        yield "    update-type: TXT"
        yield "    update-owner: name"
        yield "    update-owner-match: equal"
        yield f"    update-owner-name: [{', '.join(f'{name}.' for name in names)}]"
