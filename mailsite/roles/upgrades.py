"""upgrades: security upgrades of our machines, each at an hour of its own, and time itself.

No two members of a cluster have one hour. A member upgrades only while the others serve, and what
comes out of it unwell fails a unit, at which the next one stops.
"""

from __future__ import annotations

from collections.abc import Iterator

from mailsite.fragment import Fragment, Service, UnitHealth, templated
from mailsite.model import Host, Platform, Role
from mailsite.roles import smtp_in, smtp_out
from mailsite.roles.dovecot import IMAPS

ROLE = "upgrades"
UNITS = "/etc/systemd/system"
SCRIPT = "/usr/local/lib/mail-platform/upgrade"
SSH = 22


def fragment(platform: Platform, host: Host) -> Fragment:
    """For a machine whose system is the platform's."""
    rules = platform.upgrades
    files = dict(
        (
            templated("base/etc/apt/apt.conf.d/99mail-upgrades.j2"),
            templated(f"base{UNITS}/mail-time.service.j2"),
            templated(f"base{UNITS}/mail-upgrade.service.j2", script=SCRIPT),
            templated(f"base{UNITS}/mail-upgrade.timer.j2", hour=hour(platform, host)),
            templated(
                f"base{SCRIPT}.j2",
                mode=0o755,
                peers=peers(platform, host),
                ports=sorted({SSH, *_ports(platform, *host.roles)}),
                reboot=rules.reboot,
            ),
        )
    )
    return Fragment(
        role=ROLE,
        files=files,
        packages=("systemd-timesyncd", "unattended-upgrades"),
        services=(
            Service("mail-time.service", restart_on=(f"{UNITS}/mail-time.service",), order=6),
            Service("mail-upgrade.timer", restart_on=(f"{UNITS}/mail-upgrade.timer",), order=91),
        ),
        health=(UnitHealth("mail-upgrade.timer"),),
    )


def hour(platform: Platform, host: Host) -> int:
    """The hour of ``host``, UTC: the members of a cluster one after the other."""
    everyone = (platform.hosts | {host.name: host}).values()
    members = [h.name for h in everyone if host.main_role in h.roles]
    number = members.index(host.name)
    return (platform.upgrades.hour + number) % 24


def peers(platform: Platform, host: Host) -> list[tuple[str, str, int]]:
    """The other members of each cluster of ``host``: name, address, and a port that serves us."""
    return [
        (member.name, str(platform.internal_leg(member).ipv4), port)
        for role in host.roles
        for port in _ports(platform, role)
        for member in platform.serving(role)
        if member.name != host.name
    ]


def _ports(platform: Platform, *roles: Role) -> Iterator[int]:
    """A port of each of ``roles`` that is open to all members, and bears a silent visitor."""
    known = {
        Role.SMTP_OUT: smtp_out.SUBMISSION,
        Role.SMTP_IN: smtp_in.SMTP,
        Role.RSPAMD: platform.spam.sentinel_port,
        Role.MAILDROP: IMAPS,
    }
    for role in roles:
        if role in known:
            yield known[role]
