"""What a machine has to be given: packages, and the agent itself."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.conftest import AGENT, AGENT_FOLDER, Scratch
from tests.agent.fake import attributes, service

PACKAGE = "dummy-daemon"
UNIT = "[Service]\nExecStart=/bin/sleep 600\n[Install]\nWantedBy=multi-user.target\n"
# What debhelper writes for a package with a unit.
POSTINST = f"""\
#!/bin/sh
set -e
getent passwd dummy >/dev/null || useradd --system --user-group dummy
if [ "$1" = configure ]; then
    deb-systemd-helper enable {PACKAGE}.service >/dev/null
    if [ -d /run/systemd/system ]; then
        systemctl --system daemon-reload
        deb-systemd-invoke start {PACKAGE}.service
    fi
fi
"""


@pytest.fixture(scope="module")
def repository(
    machine_host: Scratch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scratch]:
    """A package repository on the machine, which has nothing but that package."""
    folder = tmp_path_factory.mktemp("package")
    for name, content, mode in (
        ("DEBIAN/postinst", POSTINST, 0o755),
        (f"usr/lib/systemd/system/{PACKAGE}.service", UNIT, 0o644),
        (
            "DEBIAN/control",
            f"Package: {PACKAGE}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@localhost>\n"
            "Description: a daemon\n",
            0o644,
        ),
    ):
        path = folder / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(mode)
    package = folder / f"{PACKAGE}.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", folder / "tree", package],
        check=True,
        capture_output=True,
    )
    shop = machine_host.machine.root / "srv/repository"
    shop.mkdir()
    content = package.read_bytes()
    (shop / package.name).write_bytes(content)
    control = (folder / "tree/DEBIAN/control").read_text()
    (shop / "Packages").write_text(
        f"{control}Filename: ./{package.name}\nSize: {len(content)}\n"
        f"SHA256: {hashlib.sha256(content).hexdigest()}\n"
    )
    machine_host.shell(
        "mkdir /root/apt && mv /etc/apt/sources.list* /root/apt && mkdir /etc/apt/sources.list.d"
        " && echo 'deb [trusted=yes] file:/srv/repository ./' >/etc/apt/sources.list"
    )
    yield machine_host
    machine_host.shell("rm -r /etc/apt/sources.list* && mv /root/apt/* /etc/apt")


def test_a_missing_package_is_installed_with_its_service_kept_down(repository: Scratch) -> None:
    host = repository
    about = {"/etc/dummy": attributes("dummy", "dummy", "0600")}
    text = host.bundle(files={"/etc/dummy": "x\n"}, about=about, packages=[PACKAGE])
    done = host.apply(text)
    assert done.returncode == 0, done.stdout
    assert f"installing {PACKAGE}" in done.stdout.splitlines()
    assert host.property(PACKAGE, "ActiveState") == "inactive"
    assert host.property(PACKAGE, "ActiveEnterTimestampMonotonic") == "0"
    assert host.run("stat", "-c", "%U", "/etc/dummy") == "dummy"
    assert host.shell("ls -A /usr/sbin | grep policy-rc", check=False) == ""
    # Without the block the package does start its service.
    host.run("dpkg-reconfigure", PACKAGE, check=False)
    host.run("apt-get", "-y", "-qq", "--reinstall", "install", PACKAGE)
    assert host.property(PACKAGE, "ActiveState") == "active"
    host.run("systemctl", "stop", PACKAGE)
    # And the platform starts it where a bundle says so.
    host.applied(host.bundle(services=[service(f"{PACKAGE}.service")]))
    assert host.property(PACKAGE, "ActiveState") == "active"


def test_a_package_that_is_not_to_be_had_is_named(repository: Scratch) -> None:
    before = repository.tree("/etc")
    text = repository.bundle(answer="two", packages=["no-such-package"])
    done = repository.apply(text)
    assert done.returncode == 1
    assert "apt-get could not install no-such-package" in done.stdout
    assert "Unable to locate package no-such-package" in done.stdout
    changed = {path for path, about in repository.tree("/etc").items() if before.get(path) != about}
    assert changed == set()


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDExampleExampleExampleExampleExampleExamp me"


def test_bootstrapping_gives_the_login_the_agent_and_nothing_else(host: Scratch) -> None:
    folder = host.machine.root / "root/bootstrap"
    folder.mkdir(exist_ok=True)
    for name in ("bootstrap.sh", "mail_agent.py", "mail-agent-recover.service"):
        (folder / name).write_bytes((AGENT_FOLDER / name).read_bytes())
    script = ("sh", "/root/bootstrap/bootstrap.sh", "--login", "pushes", KEY)
    for _ in range(2):
        assert host.run(*script).startswith("ready: pushes may run the agent on ")
    assert host.read("/home/pushes/.ssh/authorized_keys") == KEY
    assert host.run("stat", "-c", "%U %a", "/home/pushes/.ssh/authorized_keys") == "pushes 600"
    as_login = ("runuser", "-u", "pushes", "--", "sudo", "-n")
    assert '"generation"' in host.run(*as_login, AGENT, "status")
    refused = host.machine.run([*as_login, "id"], check=False)
    assert refused.returncode != 0
    assert "password is required" in refused.stderr
    assert host.property("mail-agent-recover", "UnitFileState") == "enabled"


@pytest.mark.parametrize(
    "words", [[], ["not a key"], ["--login", "x ALL=(ALL) ALL", KEY], [KEY, KEY]]
)
def test_bootstrapping_refuses_what_it_does_not_understand(
    host: Scratch, words: list[str], tmp_path: Path
) -> None:
    (host.machine.root / "root/bootstrap.sh").write_bytes(
        (AGENT_FOLDER / "bootstrap.sh").read_bytes()
    )
    before = host.tree("/etc", "/home")
    assert host.machine.run(["sh", "/root/bootstrap.sh", *words], check=False).returncode == 1
    assert host.tree("/etc", "/home") == before
