"""Which secrets a host needs, and what they are called.

Names are plain strings: ``dkim/<domain>/<selector>``, ``sasl/<user>``,
``certificate/<fqdn>/chain``, ``certificate/<fqdn>/key``, ``ssh-host-key/<host>``, ``srs/<key>``,
``redis/password``, ``rspamd/controller-hash``, ``rspamd/controller-password``,
``mailbox/<name>``, ``pairsync/secret``, ``sasl-password/<user>`` and ``roundcube/des-key``.
"""

from __future__ import annotations

from mailsite.bundle import compose
from mailsite.model import Host, Platform
from mailsite.secret_names import (
    certificate_chain,
    certificate_key,
    dkim_key,
    mailbox_hash,
    pairsync_secret,
    redis_password,
    roundcube_key,
    rspamd_controller_hash,
    rspamd_controller_password,
    sasl_hash,
    sasl_password,
    srs_key,
    ssh_host_key,
)

__all__ = [
    "certificate_chain",
    "certificate_key",
    "dkim_key",
    "mailbox_hash",
    "pairsync_secret",
    "redis_password",
    "required",
    "roundcube_key",
    "rspamd_controller_hash",
    "rspamd_controller_password",
    "sasl_hash",
    "sasl_password",
    "srs_key",
    "ssh_host_key",
]


def required(platform: Platform, host: Host) -> tuple[str, ...]:
    """The names of all secrets in the secret bundle of ``host``, sorted, each once."""
    return compose(platform, host).secrets
