"""Names of secrets. The graph gives each a value; hosts get those that they need."""

from __future__ import annotations


def dkim_key(domain: str, selector: str) -> str:
    """PEM private key of ``<selector>._domainkey.<domain>``."""
    return f"dkim/{domain}/{selector}"


def sasl_hash(user: str) -> str:
    """Dovecot hash of a SASL user's password, ``{SCHEME}...``."""
    return f"sasl/{user}"


def sasl_password(user: str) -> str:
    """The password of a SASL user that is a machine of ours, in one word."""
    return f"sasl-password/{user}"


def mailbox_hash(mailbox: str) -> str:
    """Dovecot hash of a mailbox's password, ``{SCHEME}...``."""
    return f"mailbox/{mailbox}"


def pairsync_secret() -> str:
    """What the two maildrop hosts show each other: 32 characters or more, without spaces."""
    return "pairsync/secret"


def certificate_chain(fqdn: str) -> str:
    """PEM certificate of a service name, followed by its intermediates."""
    return f"certificate/{fqdn}/chain"


def certificate_key(fqdn: str) -> str:
    """PEM private key of the certificate of a service name."""
    return f"certificate/{fqdn}/key"


def ssh_host_key(host: str) -> str:
    """OpenSSH private host key of a virtual machine; used at its first boot only."""
    return f"ssh-host-key/{host}"


def srs_key(key: str) -> str:
    """A key that PostSRSd signs rewritten senders with, one line of text."""
    return f"srs/{key}"


def redis_password() -> str:
    """Password of the spam filter's Redis and Sentinel, without spaces and quotes."""
    return "redis/password"


def rspamd_controller_password() -> str:
    """The password that Rspamd's controller asks for, known to those that train it."""
    return "rspamd/controller-password"


def rspamd_controller_hash() -> str:
    """Hash of the password that Rspamd's controller asks for, as ``rspamadm pw`` prints it."""
    return "rspamd/controller-hash"


def roundcube_key() -> str:
    """The key that Roundcube keeps the passwords of its sessions with: 32 letters and digits."""
    return "roundcube/des-key"


def acme_secret(variable: str) -> str:
    """What the ACME client's DNS provider needs, by the variable that lego takes it from."""
    return f"acme/{variable}"


def pull_key(host: str) -> str:
    """OpenSSH private key with which ``host`` asks the holders for the certificate."""
    return f"pull-key/{host}"


def holder_key(holder: str) -> str:
    """OpenSSH private key with which a holder of the certificate proves who it is."""
    return f"holder-key/{holder}"


def public(pair: str) -> str:
    """The public half of :func:`pull_key` or :func:`holder_key`, an OpenSSH line."""
    return f"{pair}/public"
