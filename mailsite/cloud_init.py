"""What a new virtual machine is told at its first boot, and never again.

Just enough for the first push to arrive: the login and its key, the host's ssh keys, static
addresses, the agent, the data volume. Everything else comes with the host's bundle. The
documents are YAML in its JSON form (https://yaml.org/spec/1.2.2/, section 1.3).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from mailsite.model import Host, Interface, IPAddress, Platform, Subnet4, Subnet6

AGENT = "/usr/local/sbin/mail-agent"
DATA_LABEL = "mail-data"
DATA_MOUNT = "/srv/mail"

_UNITS = "/etc/systemd/system"
_SSHD = "/etc/ssh/sshd_config.d"
_DATA = "mail-data.service"

_ROOT = Path(__file__).resolve().parent.parent

_DATA_SCRIPT = f"""\
#!/bin/sh
# Mount the data volume at {DATA_MOUNT}; format it first if, and only if, it is blank.
set -eu
disk=/dev/vdb
label={DATA_LABEL}
mountpoint -q {DATA_MOUNT} && exit 0
if [ ! -b "$disk" ]; then
    echo "$disk is missing: attach the data volume as the second disk" >&2
    exit 1
fi
found=0
blkid -p "$disk" >/dev/null || found=$?
if [ "$found" -eq 2 ]; then
    # blkid says 2 for a damaged file system too: a blank volume has nothing but zeros in front.
    if ! head -c 1048576 "$disk" | cmp -s -n 1048576 - /dev/zero; then
        echo "$disk has content that is no file system: restore it, or wipe it by hand" >&2
        exit 1
    fi
    mkfs.ext4 -q -L "$label" "$disk"
fi
if [ "$(blkid -p -o value -s LABEL "$disk")" != "$label" ]; then
    echo "$disk is not labelled $label: not the data volume of this host" >&2
    exit 1
fi
mkdir -p {DATA_MOUNT}
# By label where udev knows it; a container has no udev.
source="/dev/disk/by-label/$label"
[ -b "$source" ] || source="$disk"
mount -o nodev,nosuid "$source" {DATA_MOUNT}
resize2fs "$source" >/dev/null 2>&1 || true
"""

_DATA_UNIT = f"""\
[Unit]
Description=Data volume of the mail platform at {DATA_MOUNT}
DefaultDependencies=no
After=systemd-remount-fs.service local-fs-pre.target
Before=local-fs.target umount.target
Conflicts=umount.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/mail-data
ExecStop=umount {DATA_MOUNT}

[Install]
WantedBy=local-fs.target
"""


def mac_address(host: Host, interface: Interface) -> str:
    """Address of a VM's network card: stable, local, from the host's name and the network."""
    digest = hashlib.sha256(f"{host.name} {interface.network}".encode()).digest()
    return ":".join(("52", "54", "00", *(f"{byte:02x}" for byte in digest[:3])))


def agent_file(name: str) -> str:
    """A file of the agent as it stands in this checkout."""
    return (_ROOT / "agent" / name).read_text(encoding="utf-8")


def user_data(host: Host, deploy_public_key: str, host_key: str, host_public_key: str) -> str:
    """The user-data of ``host``.

    ``deploy_public_key`` may log in; ``host_key`` is the host's own private key in OpenSSH's
    format, which makes the whole text a secret.
    """
    recover = agent_file("mail-agent-recover.service")
    return "#cloud-config\n" + _json(
        {
            "hostname": host.short,
            "fqdn": host.name,
            "prefer_fqdn_over_hostname": False,
            "manage_etc_hosts": True,
            "locale": False,
            "package_update": False,
            "disable_root": True,
            "ssh_deletekeys": True,
            "ssh_keys": {
                "ed25519_private": host_key,
                "ed25519_public": host_public_key.strip(),
            },
            "users": [
                {
                    "name": host.login,
                    "gecos": "Mail platform deployment",
                    "shell": "/bin/sh",
                    "lock_passwd": True,
                    "sudo": [f"ALL=(root) NOPASSWD: {AGENT}"],
                    "ssh_authorized_keys": [deploy_public_key.strip()],
                }
            ],
            "write_files": [
                # Before sshd starts. The module for it, `ssh_pwauth`, restarts a running sshd.
                _file(f"{_SSHD}/50-cloud-init.conf", "PasswordAuthentication no\n", "0644"),
                _packed(AGENT, agent_file("mail_agent.py"), "0755"),
                _file("/usr/local/sbin/mail-data", _DATA_SCRIPT, "0755"),
                _file(f"{_UNITS}/{_DATA}", _DATA_UNIT, "0644"),
                _file(f"{_UNITS}/mail-agent-recover.service", recover, "0644"),
            ],
            # The keys are known to whoever made the machine: nobody reads them on its console.
            "no_ssh_fingerprints": True,
            "ssh": {"emit_keys_to_console": False},
            "runcmd": [
                # What is enabled counts from the next boot on: nothing has to be read again.
                ["systemctl", "enable", "--no-reload", "mail-agent-recover.service", _DATA],
                ["systemctl", "start", _DATA],
            ],
        }
    )


def meta_data(host: Host) -> str:
    """The meta-data of ``host``: an instance that stays the same for its whole life."""
    return _json({"instance-id": host.name, "local-hostname": host.short})


def network_config(platform: Platform, host: Host) -> str:
    """Static addresses and routes of ``host``, matched by the cards' hardware addresses.

    Routes are written as prefixes, not as ``default``: cloud-init's networkd renderer refuses
    the word. The resolvers serve until the host's own Unbound is installed.
    """
    return _json(
        {
            "version": 2,
            "ethernets": {
                f"leg{index}": _ethernet(platform, host, interface, first=index == 0)
                for index, interface in enumerate(host.interfaces)
            },
        }
    )


def generation(platform: Platform, host: Host) -> str:
    """A name for what ``host`` is told of its networks: 8 hexadecimal digits.

    A machine hears of its addresses at its first boot only, so whoever is to have other ones is
    built anew. Made from cards, addresses and routes alone, in an order of its own: a change of
    this value replaces machines.
    """
    facts = [
        [
            mac_address(host, leg),
            *(f"{a}/{net.prefix.prefixlen}" for a, net in _addresses(platform, leg)),
            *(f"{route.prefix} {route.gateway}" for route in platform.routes(host, leg)),
        ]
        for leg in host.interfaces
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def _addresses(
    platform: Platform, leg: Interface
) -> tuple[tuple[IPAddress, Subnet4 | Subnet6], ...]:
    network = platform.network_of(leg)
    return ((leg.ipv4, network.ipv4), (leg.ipv6, network.ipv6))


def _ethernet(platform: Platform, host: Host, leg: Interface, *, first: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "match": {"macaddress": mac_address(host, leg)},
        "dhcp4": False,
        "dhcp6": False,
        "accept-ra": False,
        "addresses": [f"{a}/{net.prefix.prefixlen}" for a, net in _addresses(platform, leg)],
        "routes": [
            {"to": str(route.prefix), "via": str(route.gateway)}
            for route in platform.routes(host, leg)
        ],
    }
    if first:
        settings["nameservers"] = {"addresses": [str(a) for a in platform.world.resolvers]}
    return settings


def _file(path: str, content: str, mode: str) -> dict[str, str]:
    return {"path": path, "owner": "root:root", "permissions": mode, "content": content}


def _packed(path: str, content: str, mode: str) -> dict[str, str]:
    """A long file, packed: the state keeps the text of every machine, and is written often."""
    return {**_file(path, _gzip(content), mode), "encoding": "gz+b64"}


@cache
def _gzip(content: str) -> str:
    return base64.b64encode(gzip.compress(content.encode(), mtime=0)).decode()


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
