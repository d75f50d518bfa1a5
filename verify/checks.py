"""Every check of the project: importing this module registers them all."""

from verify import (
    certificates,
    change,
    host,
    mail_dns,
    maildrop,
    nginx_streams,
    null_clients,
    rspamd,
    smtp_in,
    smtp_out,
    webmail,
)
from verify.registry import checks

MODULES = (
    smtp_out,
    smtp_in,
    rspamd,
    maildrop,
    webmail,
    nginx_streams,
    null_clients,
    certificates,
    mail_dns,
    host,
    change,
)

__all__ = ["MODULES", "checks"]
