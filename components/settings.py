"""What the stack's configuration says, read once and checked before anything is registered.

Secrets leave this module as secret Outputs only; no error repeats a value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pulumi

from mailsite import secret_names
from mailsite.loader import load_platform
from mailsite.model import Platform

_ZONE_ID = re.compile(r"[0-9a-f]{32}")
_SECRET_NAME = re.compile(
    r"(dkim/[^/]+/[^/]+|(sasl|sasl-password|mailbox)/[^/]+|ssh-host-key/[^/]+|srs/[^/]+"
    r"|redis/password|rspamd/controller-password|pairsync/secret|roundcube/des-key"
    r"|acme/[A-Z0-9_]+|(pull|holder)-key/[^/]+)"
)
#: Those that go into configuration files as they are.
_WORD = re.compile(r"(srs/.*|redis/password|rspamd/controller-password|pairsync/secret)")
_SECRET_KEYS = ("secrets", "certificates", "deployKey")
_CERTIFICATE_PARTS = {
    "chain": secret_names.certificate_chain,
    "key": secret_names.certificate_key,
}


class SettingsError(ValueError):
    """The stack's configuration is wrong or incomplete. The text says which command mends it."""


#: The providers that a rehearsal must stand in for; the others may be real ones there too.
_STAND_INS = {"libvirt", "cloudflare"}


@dataclass(frozen=True)
class Settings:
    """The configuration of one stack.

    ``rehearsal`` is the overlay file of a rehearsal, or None for the real world. ``given`` holds
    the secrets that the operator brought, by the names of :mod:`mailsite.secret_names`.
    ``zone_ids`` maps a DNS zone to Cloudflare's id; zones without one are not published.
    """

    site: Path
    live: bool
    rehearsal: Path | None
    deploy_public_key: str
    deploy_key: pulumi.Output[str] | None
    zone_ids: Mapping[str, str]
    given: Mapping[str, pulumi.Output[str]]

    @classmethod
    def load(cls, root: Path, config: pulumi.Config | None = None) -> Settings:
        """Read the configuration; relative paths count from ``root``.

        Raises:
            SettingsError: a key is missing or has the wrong shape.
        """
        config = config or pulumi.Config("mail")
        for key in _SECRET_KEYS:
            _refuse_plain(config, key)
        site, overlay = config.get("site"), config.get("rehearsal")
        if not site:
            raise SettingsError(
                "mail:site is not set; run: pulumi config set mail:site sites/<name>"
            )
        public_key = config.get("deployPublicKey")
        if not public_key:
            raise SettingsError(
                "mail:deployPublicKey is not set, so nobody could log in to a new host; run:"
                ' pulumi config set mail:deployPublicKey "$(cat ~/.ssh/id_ed25519.pub)"'
            )
        return cls(
            site=root / site,
            live=config.get_bool("live") or False,
            rehearsal=root / overlay if overlay else None,
            deploy_public_key=public_key,
            deploy_key=config.get_secret("deployKey"),
            zone_ids=_zone_ids(config),
            given={**_secrets(config), **_certificates(config)},
        )

    def platform(self) -> Platform:
        """The platform of the site data, in the rehearsal's world if there is one."""
        return load_platform(self.site, self.rehearsal)

    def refuse_up_unless_live(self) -> None:
        """Stop an update that would reach for real hosts which nobody meant to touch.

        Previews pass: they change nothing. Rehearsals pass where the engine is attached to their
        stand-ins, so that no real hypervisor and no real DNS can be reached.

        Raises:
            SettingsError: this is an update and the stack is neither live nor a rehearsal.
        """
        if pulumi.runtime.is_dry_run():
            return
        if self.rehearsal is not None:
            attached = {
                provider.partition(":")[0]
                for provider in os.environ.get("PULUMI_DEBUG_PROVIDERS", "").split(",")
            }
            if not attached >= _STAND_INS:
                raise SettingsError(
                    f"stack {pulumi.get_stack()!r} has mail:rehearsal set, but the engine is not"
                    " attached to the rehearsal's stand-ins; run: make rehearsal, or for real"
                    " hosts: pulumi config rm mail:rehearsal"
                )
            return
        if not self.live:
            raise SettingsError(
                f"stack {pulumi.get_stack()!r} is not live, so up refuses to touch its hosts; to"
                " try the platform out, run: make rehearsal; if the hosts in"
                f" {self.site.name!r} are yours, run: pulumi config set mail:live true"
            )
        if self.deploy_key is None and not os.environ.get("SSH_AUTH_SOCK"):
            raise SettingsError(
                "no key to log in with: start an ssh agent and add the key whose public half is"
                " mail:deployPublicKey (eval $(ssh-agent); ssh-add)"
            )


def _refuse_plain(config: pulumi.Config, key: str) -> None:
    if config.get(key) is not None and not pulumi.runtime.is_config_secret(f"mail:{key}"):
        raise SettingsError(
            f"mail:{key} stands unencrypted in the stack's file, so consider it known; make new"
            f" secrets, run: pulumi config rm mail:{key}, and set them anew with --secret"
        )


def _object(config: pulumi.Config, key: str) -> Mapping[str, Any]:
    try:
        value = config.get_object(key)
    except pulumi.ConfigTypeError:
        value = ""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SettingsError(f"mail:{key} is no mapping; write its entries as 'name: value' lines")
    return value


def _zone_ids(config: pulumi.Config) -> Mapping[str, str]:
    found = _object(config, "zoneIds")
    for zone, identifier in found.items():
        if not isinstance(identifier, str) or not _ZONE_ID.fullmatch(identifier):
            raise SettingsError(
                f"mail:zoneIds: {zone}: {identifier!r} is no zone id; write the 32 hexadecimal"
                " digits that Cloudflare shows as 'Zone ID' on the zone's overview page"
            )
    return {str(zone): str(identifier) for zone, identifier in found.items()}


def _secrets(config: pulumi.Config) -> Mapping[str, pulumi.Output[str]]:
    found = _object(config, "secrets")
    for name, value in found.items():
        if not _SECRET_NAME.fullmatch(name):
            raise SettingsError(
                f"mail:secrets: {name!r} is no secret of the platform; write"
                " 'dkim/<domain>/<selector>', 'sasl/<user>', 'mailbox/<name>', 'srs/<key>',"
                " 'ssh-host-key/<host>', 'sasl-password/<user>', 'redis/password',"
                " 'rspamd/controller-password', 'pairsync/secret', 'roundcube/des-key',"
                " 'acme/<VARIABLE>', 'pull-key/<host>' or 'holder-key/<host>'"
            )
        if not isinstance(value, str) or not value.strip():
            raise SettingsError(f"mail:secrets: {name} is no text; set it with --secret --path")
        if name.startswith(("sasl/", "mailbox/")) and not value.startswith("{"):
            raise SettingsError(
                f"mail:secrets: {name} is no Dovecot hash; write the output of:"
                " doveadm pw -s BLF-CRYPT"
            )
        if name.startswith("sasl-password/") and not re.fullmatch(r"[A-Za-z0-9_-]{16,64}", value):
            raise SettingsError(
                f"mail:secrets: {name} is no password of 16 to 64 letters, digits, dashes and"
                " underscores; write the output of: openssl rand -hex 16"
            )
        if name == "roundcube/des-key" and not re.fullmatch(r"[A-Za-z0-9]{32}", value):
            raise SettingsError(
                f"mail:secrets: {name} is no key of 32 letters and digits; write the output of:"
                " openssl rand -hex 16"
            )
        if _WORD.fullmatch(name) and not re.fullmatch(r"[A-Za-z0-9]{32,64}", value):
            raise SettingsError(
                f"mail:secrets: {name} is no word of 32 to 64 letters and digits; write the output"
                " of: openssl rand -hex 24"
            )
    return {name: pulumi.Output.secret(value) for name, value in found.items()}


def _certificates(config: pulumi.Config) -> Mapping[str, pulumi.Output[str]]:
    given: dict[str, pulumi.Output[str]] = {}
    for name, pair in _object(config, "certificates").items():
        if not isinstance(pair, dict) or set(pair) != set(_CERTIFICATE_PARTS):
            raise SettingsError(
                f"mail:certificates: {name}: write the two entries 'chain' and 'key' there"
            )
        for part in _CERTIFICATE_PARTS:
            value = pair[part]
            if not isinstance(value, str) or "-----BEGIN " not in value:
                raise SettingsError(f"mail:certificates: {name}: {part} is not in PEM format")
            given[_CERTIFICATE_PARTS[part](name)] = pulumi.Output.secret(value)
    return given
