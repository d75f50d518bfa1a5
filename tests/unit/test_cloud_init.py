"""What a new machine is told at its first boot."""

from __future__ import annotations

import base64
import gzip
import subprocess
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from mailsite import cloud_init
from mailsite.loader import load_platform
from mailsite.model import Host, Interface, Platform, World

SITES = Path(__file__).parents[2] / "sites"
PLATFORMS = [load_platform(SITES / name) for name in ("example", "prod")]
MACHINES = [
    pytest.param(platform, host, id=f"{platform.name}-{host.short}")
    for platform in PLATFORMS
    for host in platform.hosts.values()
    if host.vm is not None
]


def yaml(text: str) -> Any:
    return YAML(typ="safe").load(text)


def user_data(host: Host) -> Any:
    return yaml(cloud_init.user_data(host, "ssh-ed25519 AAAA op\n", "PRIVATE\nKEY\n", "PUBLIC\n"))


@pytest.mark.parametrize(("platform", "host"), MACHINES)
def test_cards_are_matched_by_address_and_get_all_addresses(platform: Platform, host: Host) -> None:
    config = yaml(cloud_init.network_config(platform, host))
    assert config["version"] == 2
    legs = list(config["ethernets"].values())
    assert len(legs) == len(host.interfaces)
    for leg, interface in zip(legs, host.interfaces, strict=True):
        network = platform.network_of(interface)
        assert leg["match"]["macaddress"] == cloud_init.mac_address(host, interface)
        given = [ip_interface(a) for a in leg["addresses"]]
        assert [a.ip for a in given] == [interface.ipv4, interface.ipv6]
        assert [a.network for a in given] == [network.ipv4.prefix, network.ipv6.prefix]
        assert leg["dhcp4"] is leg["dhcp6"] is leg["accept-ra"] is False


def test_a_generation_is_the_same_from_release_to_release() -> None:
    """Where this fails, every operator's machines would be replaced: is that meant?"""
    platform = PLATFORMS[0]
    host = platform.hosts["out1.hosts.example.org"]
    assert cloud_init.generation(platform, host) == "aad64354"


@pytest.mark.parametrize(("platform", "host"), MACHINES)
def test_other_addresses_cards_or_routes_are_another_generation(
    platform: Platform, host: Host
) -> None:
    leg = host.interfaces[0]
    network = platform.network_of(leg)

    def in_network(**changes: Any) -> str:
        changed = network.model_copy(update=changes)
        networks = {**platform.networks, leg.network: changed}
        return cloud_init.generation(platform.model_copy(update={"networks": networks}), host)

    def with_first(changed: Interface) -> str:
        legs = (changed, *host.interfaces[1:])
        return cloud_init.generation(platform, host.model_copy(update={"interfaces": legs}))

    wider = network.ipv4.prefix.supernet()
    found = [
        cloud_init.generation(platform, host),
        cloud_init.generation(platform, host.model_copy(update={"name": f"x{host.name}"})),
        with_first(leg.model_copy(update={"ipv4": leg.ipv4 + 100})),
        with_first(leg.model_copy(update={"ipv6": leg.ipv6 + 100})),
        in_network(ipv4=network.ipv4.model_copy(update={"gateway": leg.ipv4 + 1})),
        in_network(ipv4=network.ipv4.model_copy(update={"prefix": wider})),
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(("platform", "host"), MACHINES)
def test_what_the_agent_brings_later_is_no_other_generation(platform: Platform, host: Host) -> None:
    assert host.vm is not None
    others = World(resolvers=(ip_address("192.0.2.53"),))
    bigger = host.vm.model_copy(update={"memory_mib": 65536})
    changed = host.model_copy(update={"vm": bigger, "login": "other"})
    assert cloud_init.generation(platform.with_world(others), changed) == cloud_init.generation(
        platform, host
    )


@pytest.mark.parametrize(("platform", "host"), MACHINES)
def test_the_first_card_alone_has_the_default_routes(platform: Platform, host: Host) -> None:
    first, *others = yaml(cloud_init.network_config(platform, host))["ethernets"].values()
    assert [r["to"] for r in first["routes"]] == ["0.0.0.0/0", "::/0"]
    for leg in others:
        assert all(ip_network(r["to"]).prefixlen > 0 for r in leg["routes"])


@pytest.mark.parametrize(("platform", "host"), MACHINES)
def test_gateways_are_on_the_link(platform: Platform, host: Host) -> None:
    for leg in yaml(cloud_init.network_config(platform, host))["ethernets"].values():
        networks = [ip_interface(a).network for a in leg["addresses"]]
        for route in leg["routes"]:
            assert any(ip_address(route["via"]) in network for network in networks)


def test_hardware_addresses_are_local_stable_and_all_different() -> None:
    for platform in PLATFORMS:
        found = [
            cloud_init.mac_address(host, interface)
            for host in platform.hosts.values()
            for interface in host.interfaces
        ]
        assert len(set(found)) == len(found)
        assert all(mac.startswith("52:54:00:") and len(mac) == 17 for mac in found)
    host = PLATFORMS[0].hosts["out1.hosts.example.org"]
    assert cloud_init.mac_address(host, host.interfaces[0]) == "52:54:00:bf:89:d8"


def test_the_login_may_run_the_agent_and_nothing_else() -> None:
    host = PLATFORMS[0].hosts["out1.hosts.example.org"]
    data = user_data(host)
    (user,) = data["users"]
    assert user["name"] == host.login
    assert user["sudo"] == ["ALL=(root) NOPASSWD: /usr/local/sbin/mail-agent"]
    assert user["ssh_authorized_keys"] == ["ssh-ed25519 AAAA op"]
    assert user["lock_passwd"] is True
    assert ("/etc/ssh/sshd_config.d/50-cloud-init.conf", "PasswordAuthentication no\n") in [
        (file["path"], file["content"]) for file in data["write_files"]
    ]
    assert "ssh_pwauth" not in data
    assert data["disable_root"] is True


def test_the_host_shows_the_key_that_the_program_made() -> None:
    data = user_data(PLATFORMS[0].hosts["out1.hosts.example.org"])
    assert data["ssh_keys"] == {"ed25519_private": "PRIVATE\nKEY\n", "ed25519_public": "PUBLIC"}
    assert data["ssh_deletekeys"] is True


def test_the_agent_and_its_recovery_come_from_this_checkout() -> None:
    files = {
        f["path"]: f for f in user_data(PLATFORMS[0].hosts["out1.hosts.example.org"])["write_files"]
    }
    agent = Path(__file__).parents[2] / "agent"
    packed = files[cloud_init.AGENT]
    assert packed["encoding"] == "gz+b64"
    content = gzip.decompress(base64.b64decode(packed["content"])).decode()
    assert content == (agent / "mail_agent.py").read_text()
    assert files[cloud_init.AGENT]["permissions"] == "0755"
    unit = files["/etc/systemd/system/mail-agent-recover.service"]
    assert unit["content"] == (agent / "mail-agent-recover.service").read_text()


def test_the_document_says_that_it_is_a_cloud_config() -> None:
    host = PLATFORMS[0].hosts["out1.hosts.example.org"]
    assert cloud_init.user_data(host, "k", "p", "q").startswith("#cloud-config\n")


# -- the data volume, formatted by the real tools ---------------------------------------------


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume"
    with path.open("wb") as file:
        file.truncate(16 * 2**20)
    return path


def run_script(volume: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run the script on a file in place of the disk, with mount and the device test left out."""
    host = PLATFORMS[0].hosts["out1.hosts.example.org"]
    files = {f["path"]: f["content"] for f in user_data(host)["write_files"]}
    script = files["/usr/local/sbin/mail-data"]
    script = script.replace("disk=/dev/vdb", f"disk={volume}").replace("[ ! -b", "[ ! -e")
    script = script.replace("mount -o nodev,nosuid", "echo mounted").replace(
        cloud_init.DATA_MOUNT, str(tmp_path / "mount")
    )
    path = tmp_path / "mail-data"
    path.write_text(script)
    return subprocess.run(["sh", str(path)], capture_output=True, text=True, check=False)


def label(volume: Path) -> str:
    command = ["blkid", "-p", "-o", "value", "-s", "LABEL", str(volume)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def test_a_blank_volume_is_formatted_and_labelled(volume: Path, tmp_path: Path) -> None:
    done = run_script(volume, tmp_path)
    assert (done.returncode, label(volume)) == (0, "mail-data"), done.stderr
    assert "mounted" in done.stdout


def file_system(volume: Path) -> bytes:
    """The UUID of an ext4 file system: what formatting it anew would change."""
    superblock = volume.read_bytes()[1024:2048]
    assert superblock[0x38:0x3A] == b"\x53\xef"
    return superblock[0x68:0x78]


def test_a_volume_with_mail_on_it_is_mounted_as_it_is(volume: Path, tmp_path: Path) -> None:
    run_script(volume, tmp_path)
    before = file_system(volume)
    done = run_script(volume, tmp_path)
    assert done.returncode == 0
    assert "mounted" in done.stdout
    assert file_system(volume) == before


def test_a_damaged_volume_is_never_formatted(volume: Path, tmp_path: Path) -> None:
    run_script(volume, tmp_path)
    with volume.open("r+b") as file:
        file.seek(1024)
        file.write(b"\xff" * 1024)  # the superblock
    before = volume.read_bytes()
    done = run_script(volume, tmp_path)
    assert done.returncode == 1
    assert "restore it" in done.stderr
    assert volume.read_bytes() == before


def test_somebody_elses_file_system_is_left_alone(volume: Path, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-L", "other", str(volume)], check=True)
    done = run_script(volume, tmp_path)
    assert done.returncode == 1
    assert "not labelled mail-data" in done.stderr


def test_a_missing_volume_is_an_error(tmp_path: Path) -> None:
    done = run_script(tmp_path / "absent", tmp_path)
    assert done.returncode == 1
    assert "attach the data volume" in done.stderr
