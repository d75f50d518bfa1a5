"""What every machine with a Postfix queue shares."""

from __future__ import annotations

from collections.abc import Mapping

from mailsite.fragment import File, Health, UnitHealth, templated
from mailsite.model import Host

QUEUE = "/var/spool/postfix"
QUEUE_MOUNT = "var-spool-postfix.mount"

#: A change of one of these makes daemons restart that keep their state in the queue.
QUEUE_UNITS = (
    "/etc/systemd/system/mail-queue.service",
    f"/etc/systemd/system/{QUEUE_MOUNT}",
)


def queue_files(host: Host) -> Mapping[str, File]:
    """Units that put Postfix's queue on the data volume; none where there is no such volume."""
    if host.vm is None:
        return {}
    return dict(
        (
            templated("postfix/usr/local/lib/mail-platform/mail-queue.j2", mode=0o755),
            templated("postfix/etc/systemd/system/mail-queue.service.j2"),
            templated(f"postfix/etc/systemd/system/{QUEUE_MOUNT}.j2"),
        )
    )


def queue_health(host: Host) -> tuple[Health, ...]:
    """The queue lies on the data volume."""
    return () if host.vm is None else (UnitHealth(QUEUE_MOUNT),)
