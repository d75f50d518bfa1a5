"""One real machine for all tests here: systemd as init, Debian's own daemons, no network.

It has names and cgroups of its own, so that a rehearsal on the same computer is not disturbed
and does not disturb it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rehearsal import image, machine, network
from rehearsal.machine import Machine
from rehearsal.progress import Progress, wait_for
from rehearsal.state import State, locked
from tests.agent.fake import bundle, check, service

AGENT_FOLDER = Path(__file__).parents[2] / "agent"
AGENT = "/usr/local/sbin/mail-agent"
STATE = "/var/lib/mail-agent"

LOCK = Path("/run/lock/mail-agent-test")

NGINX, UNBOUND, RESOLV = "/etc/nginx/nginx.conf", "/etc/unbound/unbound.conf", "/etc/resolv.conf"


def variant(*changes: tuple[str, str]) -> str:
    """The agent's source with some of its text changed, each of which must be there once."""
    source = (AGENT_FOLDER / "mail_agent.py").read_text()
    for old, new in (("STEADY_SECONDS = 1.0\n", "STEADY_SECONDS = 0.3\n"), *changes):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "machine: needs root and systemd-nspawn")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.machine)


@dataclass
class Scratch:
    """The machine, and what the tests do with it."""

    machine: Machine

    def boot(self) -> None:
        self.machine.boot()
        self.machine.wait_booted()

    def run(self, *argv: str, input: str | None = None, check: bool = True) -> str:
        """What a command said."""
        return self.machine.run(argv, input=input, check=check).stdout.strip()

    def shell(self, script: str, check: bool = True) -> str:
        return self.run("sh", "-c", script, check=check)

    def agent(self, *argv: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
        return self.machine.run([AGENT, *argv], input=input, check=False)

    def apply(self, text: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self.agent("apply", *options, input=text)

    def applied(self, text: str, *options: str) -> str:
        """Apply what must succeed. Returns the closing line."""
        done = self.apply(text, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip().splitlines()[-1]

    def start(self, *argv: str, input: str = "") -> subprocess.Popen[str]:
        """Start a command and do not wait for it."""
        process = subprocess.Popen(
            [*self.machine.entrance(), *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdin is not None
        process.stdin.write(input)
        process.stdin.close()
        process.stdin = None
        return process

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(AGENT, "status"))
        return found

    def read(self, path: str) -> str:
        return self.run("cat", path)

    def file(self, path: str, content: str, mode: str = "0644") -> None:
        self.machine.run(["sh", "-c", f'cat >"{path}" && chmod {mode} "{path}"'], input=content)

    def property(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "--value", "--property", name, unit)

    def wait(self, what: str, script: str, timeout: float = 20) -> None:
        """Wait until a script succeeds in the machine."""
        wait_for(
            lambda: self.machine.run(["sh", "-c", script], check=False).returncode == 0,
            timeout=timeout,
            what=what,
        )

    def tree(self, *folders: str) -> dict[str, str]:
        """Everything in folders: path -> kind, mode, owner, target and checksum."""
        listed = self.shell(
            f"find {' '.join(folders)} -xdev -printf '%p\\t%y %m %U %G %l\\n' | sort;"
            f"find {' '.join(folders)} -xdev -type f -exec sha256sum {{}} +"
        )
        found: dict[str, str] = {}
        for line in listed.splitlines():
            if "\t" in line:
                path, about = line.split("\t")
                found[path] = about
            else:
                checksum, path = line.split("  ", 1)
                found[path] += f" {checksum}"
        return found

    def ask(self, path: str = "") -> str:
        """What nginx answers."""
        fetch = "import sys,urllib.request as r;print(r.urlopen(sys.argv[1]).read().decode())"
        url = f"http://127.0.0.1:8080/{path}"
        return self.run("python3", "-c", fetch, url, check=False)

    @staticmethod
    def bundle(
        answer: str = "one",
        port: int = 8080,
        ttl: str = "60",
        files: Mapping[str, str] | None = None,
        services: Sequence[Any] = (),
        checks: Sequence[Any] = (),
        health: Sequence[Any] = (),
        about: Mapping[str, Mapping[str, str]] | None = None,
        packages: Sequence[str] = (),
        **parts: Any,
    ) -> str:
        """A resolver and a web server, each with its checker and its health check."""
        wanted = {
            NGINX: "user www-data;\npid /run/nginx.pid;\nevents {}\nhttp {\n  access_log off;\n"
            f"  server {{\n    listen 127.0.0.1:{port};\n"
            f"    location / {{ return 200 {answer}; }}\n  }}\n}}\n",
            UNBOUND: "server:\n  username: unbound\n  chroot: ''\n  interface: 127.0.0.1\n"
            "  do-daemonize: no\n  pidfile: ''\n  local-zone: x.example. static\n"
            f"  cache-max-ttl: {ttl}\nremote-control:\n  control-enable: yes\n"
            "  control-interface: /run/unbound.ctl\n",
            **(files or {}),
        }
        paths = {
            path: {"owner": "root", "group": "root", "mode": "0644", "template": f"templates{path}"}
            for path in wanted
        }
        return bundle(
            wanted,
            {**paths, **(about or {})},
            checks=[
                check("unbound-checkconf", "/etc/unbound"),
                {**check("nginx", "/etc/nginx"), "command": ["nginx", "-t", "-q"]},
                *checks,
            ],
            services=[
                service("unbound.service", reload_on=["/etc/unbound"]),
                service("nginx.service", reload_on=["/etc/nginx"]),
                *services,
            ],
            health=[
                {"kind": "unit", "unit": "unbound.service"},
                {"kind": "tcp", "address": "127.0.0.1", "port": 53, "expect": "", "timeout": 3},
                {"kind": "tcp", "address": "127.0.0.1", "port": 8080, "expect": "", "timeout": 3},
                *health,
            ],
            packages=["nginx", "unbound", *packages],
            **parts,
        )


@pytest.fixture(scope="package")
def machine_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scratch]:
    # Not longer than these tests last: the names are the whole process's.
    if os.geteuid() != 0 or shutil.which("systemd-nspawn") is None:
        pytest.skip("machines need root and systemd-nspawn")
    # Another run of these tests would take this one's machine for a dead one's, and remove it.
    with locked(LOCK, None, ""), pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "MACHINE_PREFIX", "mail-agent-test-")
        patch.setattr(machine, "_GROUP", "mail-agent-test")
        layers = image.ensure(Progress())
        state = State(tmp_path_factory.mktemp("state"))
        scratch = Scratch(Machine("agent.example.org", layers.postfix, (), state))
        _furnish(scratch.machine.mount())
        try:
            scratch.boot()
            yield scratch
        finally:
            machine.destroy_all(state)


def _furnish(root: Path) -> None:
    units = root / "etc/systemd/system"
    for unit in ("systemd-networkd", "systemd-networkd-wait-online", "systemd-resolved", "ssh"):
        (units / f"{unit}.service").unlink(missing_ok=True)
        (units / f"{unit}.service").symlink_to("/dev/null")
    (root / "etc/cloud").mkdir(exist_ok=True)
    (root / "etc/cloud/cloud-init.disabled").touch()
    agent = root / AGENT[1:]
    agent.parent.mkdir(parents=True, exist_ok=True)
    agent.write_text(variant())
    agent.chmod(0o755)
    recover = units / "mail-agent-recover.service"
    recover.write_bytes((AGENT_FOLDER / recover.name).read_bytes())
    wanted = units / "sysinit.target.wants" / recover.name
    wanted.parent.mkdir(exist_ok=True)
    wanted.symlink_to(f"../{recover.name}")


Install = Callable[..., None]


@pytest.fixture
def install(machine_host: Scratch) -> Iterator[Install]:
    """Put a variant of the agent on the machine for the time of a test."""

    def put(*changes: tuple[str, str]) -> None:
        machine_host.file(AGENT, variant(*changes), "0755")

    yield put
    if not machine_host.machine.alive():
        machine_host.boot()
    put()


@pytest.fixture
def host(machine_host: Scratch) -> Scratch:
    """The machine with the plain bundle on it, confirmed and healthy."""
    if not machine_host.machine.alive():
        machine_host.boot()
    machine_host.applied(Scratch.bundle())
    assert machine_host.ask() == "one"
    return machine_host
