"""Which secrets a host needs, and what they are called.

Names are plain strings: ``dkim/<domain>/<selector>``, ``sasl/<user>``,
``certificate/<fqdn>/chain``, ``certificate/<fqdn>/key``, ``ssh-host-key/<host>``, ``srs/<key>``,
``redis/password``, ``rspamd/controller-hash``, ``rspamd/controller-password``,
``mailbox/<name>``, ``pairsync/secret``, ``sasl-password/<user>``, ``roundcube/des-key``,
``acme/<VARIABLE>``, and the key pairs
``pull-key/<host>`` and ``holder-key/<host>``, with ``.../public``.
"""

from __future__ import annotations

from mailsite.bundle import compose
from mailsite.model import Host, Platform
from mailsite.secret_names import (
    acme_secret,
    certificate_chain,
    certificate_key,
    dkim_key,
    holder_key,
    mailbox_hash,
    pairsync_secret,
    public,
    pull_key,
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
    "acme_secret",
    "certificate_chain",
    "certificate_key",
    "dkim_key",
    "holder_key",
    "mailbox_hash",
    "pairsync_secret",
    "public",
    "pull_key",
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
