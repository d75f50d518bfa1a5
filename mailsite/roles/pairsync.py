"""pairsync: keeps the mailboxes of the two maildrop hosts equal. Its code is in ``pairsync/``."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

from mailsite.fragment import (
    File,
    Fragment,
    PortRule,
    SecretFile,
    Service,
    UnitHealth,
    templated,
)
from mailsite.model import Host, IPAddress, Platform
from mailsite.roles.postfix import certificate_path
from mailsite.secret_names import pairsync_secret

PORT = 63301
UNIT = "pairsync.service"
LIBRARY = "/usr/local/lib/pairsync"
COMMAND = "/usr/local/sbin/pairsync"
HOOK = f"{LIBRARY}/notify.lua"
CONFIG = "/etc/pairsync.toml"
SECRET = "/etc/pairsync/secret"  # noqa: S105 - where it lies
UNITS = "/etc/systemd/system"
#: Where systemd puts what only the daemon may read (systemd.exec(5), LoadCredential=).
CREDENTIALS = f"/run/credentials/{UNIT}"

_SOURCE = Path(__file__).resolve().parents[2] / "pairsync"


@dataclass(frozen=True)
class Peer:
    """The other host: the name that its certificate must have, and where it is."""

    name: str
    address: IPAddress


def code() -> dict[str, File]:
    """The daemon as it stands in the checkout, and where each file of it goes."""
    folders = {
        "*.py": f"{LIBRARY}/pairsync",
        "*.lua": LIBRARY,
        "README.md": LIBRARY,
        "bin/*": COMMAND.rpartition("/")[0],
        "*.service": UNITS,
    }
    return {
        f"{folder}/{path.name}": File(
            content=path.read_text("utf-8"),
            mode=0o755 if pattern == "bin/*" else 0o644,
            template=str(path.relative_to(_SOURCE.parent)),
        )
        for pattern, folder in folders.items()
        for path in sorted(_SOURCE.glob(pattern))
    }


def fragment(platform: Platform, host: Host, peer: Host) -> Fragment:
    """What ``host`` needs to be kept equal with ``peer``."""
    leg = platform.internal_leg(peer)
    certificate = certificate_path(host.name)
    files = dict(
        (
            templated(
                "maildrop/etc/pairsync.toml.j2",
                host=host.name,
                # One address: a name with two would be tried twice while the peer is away.
                peer=Peer(peer.name, leg.ipv4),
                port=PORT,
                credentials=CREDENTIALS,
                homes="/var/dovecot/users",
            ),
            templated(
                f"maildrop{UNITS}/{UNIT}.d/mail.conf.j2", certificate=certificate, secret=SECRET
            ),
            templated(f"maildrop{UNITS}/var-lib-pairsync.mount.j2"),
        )
    )
    return Fragment(
        role="pairsync",
        files={**code(), **files},
        secret_files={SECRET: SecretFile(secrets=(pairsync_secret(),))},
        ports=(
            PortRule(
                PORT, tuple(ip_network(a) for a in (leg.ipv4, leg.ipv6)), "pairsync: the peer"
            ),
        ),
        services=(
            Service(
                UNIT,
                restart_on=(
                    LIBRARY,
                    COMMAND,
                    CONFIG,
                    SECRET,
                    certificate,
                    f"{UNITS}/{UNIT}",
                    f"{UNITS}/{UNIT}.d/",
                    f"{UNITS}/mail-mailboxes.service",
                    f"{UNITS}/var-dovecot.mount",
                    f"{UNITS}/var-lib-pairsync.mount",
                ),
                order=31,
            ),
        ),
        health=(UnitHealth(UNIT),),
    )
