"""The platform's own program, with prod's own data, on the real engine.

First through the Automation API, as a rehearsal runs it, then with the plain command line.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from mailsite.loader import load_platform
from mailsite.model import Host, Platform, Role
from mailsite.secrets import required
from rehearsal.engine import Engine
from rehearsal.program import platform_program as program
from rehearsal.program import stack_config
from rehearsal.state import CHECKOUT

from .memory import World
from .project import Outcome, Project, Step

STACK = "prod"
CONFIG = stack_config(STACK)
SITE = CHECKOUT / CONFIG["mail:site"]
PEM = "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"


def ssh_key() -> tuple[str, str]:
    """A private key and its public half, in OpenSSH's formats."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private.decode(), public.decode()


def make(engine: Engine, folder: Path, platform: Platform) -> Project:
    """A stack as a rehearsal sets it up."""
    overlay = folder / "world.json"
    existing = [host.name for host in platform.hosts.values() if host.vm is None]
    overlay.write_text(json.dumps({"ssh_host_keys": {name: ssh_key()[1] for name in existing}}))
    private, public = ssh_key()
    return Project(
        folder,
        engine,
        World(
            uris={name: one.uri for name, one in platform.hypervisors.items()},
            zone_names={id: zone for zone, id in CONFIG["mail:zoneIds"].items()},
        ),
        name="mail",
        stack=STACK,
        config={
            **CONFIG,
            "mail:site": str(SITE),
            "mail:rehearsal": str(overlay),
            "mail:deployPublicKey": public,
        },
        secrets={
            "mail:deployKey": private,
            "mail:certificates": json.dumps(
                {name: {"chain": PEM, "key": PEM} for name in _certified(platform)}
            ),
            "mail:secrets": json.dumps(
                {name: "invented" for name in _needed(platform) if name.startswith("acme/")}
            ),
        },
    )


def _certified(platform: Platform) -> set[str]:
    """Names that some host must prove to be."""
    return {n.split("/")[1] for n in _needed(platform) if n.startswith("certificate/")}


def _needed(platform: Platform) -> set[str]:
    return {name for host in platform.hosts.values() for name in required(platform, host)}


@pytest.fixture(scope="module")
def platform() -> Platform:
    return load_platform(SITE)


@pytest.fixture(scope="module")
def members(platform: Platform) -> list[str]:
    """The members of smtp-out, in rolling order."""
    return [host.name for host in platform.members(Role.SMTP_OUT)]


@dataclass(frozen=True)
class Created:
    """The platform as it was created: the first preview, and the update that followed."""

    project: Project
    preview: Outcome
    up: Outcome


@pytest.fixture(scope="module")
def created(
    engine: Engine, platform: Platform, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Created]:
    project = make(engine, tmp_path_factory.mktemp("platform"), platform)
    preview = project.preview(program)
    up = project.up(program)
    yield Created(project, preview, up)
    project.close()


@pytest.fixture
def edited(created: Created, tmp_path: Path) -> Iterator[Callable[[str, str, str], Project]]:
    """The created platform, with a text in a file of its site data replaced everywhere."""
    projects = []

    def get(file: str, old: str, new: str) -> Project:
        site = tmp_path / "site"
        shutil.copytree(SITE, site)
        text = (site / file).read_text()
        assert old in text
        (site / file).write_text(text.replace(old, new))
        projects.append(created.project.copy(tmp_path, {"mail:site": str(site)}))
        return projects[-1]

    yield get
    for project in projects:
        project.close()


def position(journal: list[str], pattern: str) -> list[int]:
    """Where in the journal lines match."""
    found = [number for number, line in enumerate(journal) if re.fullmatch(pattern, line)]
    assert found, f"{pattern} never happened"
    return found


def changed_lines(text: str) -> list[str]:
    """The lines of a preview's diff that were added or removed."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if re.match(r"[+-] ", line)]


def test_everything_is_created(created: Created) -> None:
    assert created.up.ok, created.up.error
    assert {step.op for step in created.up.steps} == {"create"}


def test_the_first_preview_lists_what_the_update_creates(created: Created) -> None:
    assert created.preview.ok, created.preview.error
    assert sorted(created.preview.steps, key=repr) == sorted(created.up.steps, key=repr)
    assert created.preview.journal == []


def test_the_members_of_a_cluster_come_up_one_after_the_other(
    created: Created, members: list[str]
) -> None:
    journal = created.up.journal
    for one, next in itertools.pairwise(members):
        [done] = position(journal, f"run {one}-confirm: .*")
        [begun] = position(journal, f"start {next}")
        assert done < begun


def test_a_machine_gets_its_secrets_before_its_configuration(
    created: Created, members: list[str]
) -> None:
    journal = created.up.journal
    for name in members:
        steps = [
            f"start {name}",
            *(f"run {name}-{x}: .*" for x in ("secrets", "config", "confirm")),
        ]
        at = [position(journal, step)[0] for step in steps]
        assert at == sorted(at)


def test_names_keys_and_policies_are_published_before_and_services_after(
    created: Created, platform: Platform, members: list[str]
) -> None:
    journal = created.up.journal
    first = min(position(journal, f"start {members[0]}"))
    last = max(position(journal, "run .*-confirm: .*"))
    for name in members:
        assert max(position(journal, f"publish {name} A+")) < first
    assert max(position(journal, r"publish .*\._domainkey\..* TXT")) < first
    assert max(position(journal, r"publish _dmarc\..* TXT")) < first
    assert max(position(journal, f"publish {platform.names.spf} TXT")) < first
    assert min(position(journal, f"publish {platform.names.smtp_out} CNAME")) > last


def public_halves(texts: str) -> Iterator[str]:
    """The public keys of all RSA private keys in ``texts``, as OpenSSH and as DNS write them."""
    for pem in re.findall(r"-----BEGIN RSA PRIVATE KEY-----.*?-----END [^\n]*", texts, re.DOTALL):
        key = serialization.load_pem_private_key(pem.encode(), None)
        assert isinstance(key, RSAPrivateKey)
        yield (
            key.public_key()
            .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
            .decode()
        )
        der = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        yield base64.b64encode(der).decode()


def test_no_secret_is_in_the_state_or_in_what_is_printed(created: Created) -> None:
    state = (created.project.folder / f"backend/.pulumi/stacks/mail/{STACK}.json").read_text()
    seen = "\n".join([state, created.up.text, created.preview.text])
    bundles = [run.stdin for run in created.project.world.runs if run.name.endswith("-secrets")]
    seeds = [d.seed.user_data for d in created.project.world.domains.values() if d.seed]
    texts = "\n".join([*bundles, *seeds]).replace("\\n", "\n")
    public = set(re.findall(r"ssh-ed25519 ([A-Za-z0-9+/=]+)", texts))
    labels = set(re.findall(r'"digest": "([0-9a-f]{64})"', texts))
    found = set(re.findall(r"[A-Za-z0-9+/=]{60,}", texts)) - public - labels
    found |= set(re.findall(r"\$2[aby]\$[./A-Za-z0-9$]+", texts))
    # A private key begins with its modulus, which is the public half too.
    halves = "\n".join(public_halves(texts))
    found = {text for text in found if text not in halves}
    assert len(found) > 50
    assert [text for text in public if text in seen]  # what is no secret is there
    assert not [secret for secret in found if secret in seen]


def test_a_second_run_changes_nothing(created: Created, tmp_path: Path) -> None:
    project = created.project.copy(tmp_path)
    try:
        outcome = project.up(program)
    finally:
        project.close()
    assert outcome.ok, outcome.error
    assert outcome.steps == []
    assert outcome.journal == []


def test_a_changed_setting_shows_as_one_line_per_host(
    edited: Callable[[str, str, str], Project], members: list[str]
) -> None:
    project = edited("site.yaml", "connection_rate: 10\n", "connection_rate: 20\n")
    outcome = project.preview(program)
    assert outcome.ok, outcome.error
    assert outcome.journal == []
    assert changed_lines(outcome.text) == [
        "- smtpd_client_connection_rate_limit = 10",
        "+ smtpd_client_connection_rate_limit = 20",
    ] * len(members)
    assert outcome.text.count("~ /etc/postfix/main.cf") == len(members)
    assert {step for step in outcome.steps if not step.name.endswith("-confirm")} == {
        Step("update", f"{name}-config") for name in members
    }


def test_a_refusing_member_stops_the_roll_out(
    edited: Callable[[str, str, str], Project], members: list[str]
) -> None:
    project = edited("site.yaml", "connection_rate: 10\n", "connection_rate: 20\n")
    first, second, *_ = members
    project.world.failing[f"{second}-config"] = "mail-agent: /etc/postfix/main.cf:30: fatal"
    outcome = project.up(program)
    assert not outcome.ok
    assert "mail-agent: /etc/postfix/main.cf:30: fatal" in outcome.text
    touched = [line.split(":")[0] for line in outcome.journal]
    assert touched == [f"run {first}-config", f"run {first}-confirm", f"run {second}-config"]

    project.world.failing.clear()
    again = project.up(program)
    assert again.ok, again.error
    touched = [line.split(":")[0] for line in again.journal]
    assert touched[0] == f"run {second}-config"
    assert not [line for line in touched if first in line]


def test_more_memory_replaces_one_machine_at_a_time_and_keeps_its_data(
    edited: Callable[[str, str, str], Project], members: list[str]
) -> None:
    host = load_platform(SITE).hosts[members[0]]
    assert host.vm is not None
    # The end of one host's address and its size: others have the same size on that hypervisor.
    size = f'{host.interfaces[0].ipv6}"}}\n    vm: {{hypervisor: {host.vm.hypervisor}, cpus: 4, '
    project = edited("topology.yaml", f"{size}memory_mib: 8192", f"{size}memory_mib: 4096")
    outcome = project.up(program)
    assert outcome.ok, outcome.error
    assert [line.split(":")[0] for line in outcome.journal] == [
        f"destroy {members[0]}",
        f"start {members[0]}",
        *(f"run {members[0]}-{part}" for part in ("secrets", "config", "confirm")),
    ]


def free_address(platform: Platform, host: Host) -> IPv4Address:
    """Another address of the network that the host's first interface is in."""
    subnet = platform.network_of(host.interfaces[0]).ipv4
    taken = {a for other in platform.hosts.values() for a in other.addresses} | {subnet.gateway}
    return next(a for a in subnet.prefix.hosts() if a not in taken)


def test_other_addresses_build_one_machine_at_a_time_anew_and_keep_its_data(
    edited: Callable[[str, str, str], Project], platform: Platform, members: list[str]
) -> None:
    first, second = (platform.hosts[name] for name in members[:2])
    moved = {host.name: free_address(platform, host) for host in (first, second)}
    one, two = (str(host.interfaces[0].ipv4) for host in (first, second))
    project = edited("topology.yaml", f"ipv4: {one},", f"ipv4: {moved[first.name]},")
    topology = Path(project.config["mail:site"]) / "topology.yaml"
    topology.write_text(
        topology.read_text().replace(f"ipv4: {two},", f"ipv4: {moved[second.name]},")
    )
    outcome = project.up(program)
    assert outcome.ok, outcome.error
    ends = [0]
    for name, address in moved.items():
        steps = [
            f"destroy {name}",
            f"delete {name}-root-.*",
            f"create {name}-root-.*",
            f"start {name}",
            *(f"run {name}-{part}: .*" for part in ("secrets", "config", "confirm")),
        ]
        at = [n for step in steps for n in position(outcome.journal, step)]
        assert len(at) == len(steps)
        assert at == sorted(at)
        assert at[0] >= ends[-1]
        ends.append(at[-1])
        seed = project.world.domains[name].seed
        assert seed is not None
        assert f'"{address}/' in seed.network_config
        [push] = [run for run in project.world.runs if run.name == f"{name}-config"]
        assert push.host == str(address)
    touched = [x for x in outcome.journal if re.match("create|delete|destroy|start", x)]
    assert len(touched) == 4 * len(moved), touched
    assert not [line for line in touched if line.endswith("-data")]


def test_a_grown_data_volume_changes_nothing(edited: Callable[[str, str, str], Project]) -> None:
    project = edited("topology.yaml", "data_gib: 8}", "data_gib: 16}")
    outcome = project.up(program)
    assert outcome.ok, outcome.error
    assert outcome.journal == []


def test_up_is_refused_for_a_stack_that_is_neither_live_nor_a_rehearsal(
    engine: Engine, platform: Platform, tmp_path: Path
) -> None:
    project = make(engine, tmp_path, platform)
    try:
        del project.config["mail:rehearsal"]
        (tmp_path / "work").mkdir(exist_ok=True)
        outcome = project.up(program)
    finally:
        project.close()
    assert not outcome.ok
    assert "not live" in outcome.text
    assert "Traceback" not in outcome.text
    assert outcome.journal == []
    assert [step for step in outcome.steps if not step.name.startswith("mail-")] == []


class Cli:
    """The plain command line in a checkout of its own, on the state of ``project``."""

    def __init__(self, project: Project, folder: Path) -> None:
        folder.mkdir()
        shared = ("agent", "components", "mailsite", "sites", "templates", "__main__.py", ".venv")
        for name in (*shared, "Pulumi.yaml", "pyproject.toml", "uv.lock"):
            (folder / name).symlink_to(CHECKOUT / name)
        shutil.copy(project.folder / f"work/Pulumi.{STACK}.yaml", folder)
        self._folder = folder
        self._pulumi = str(project.engine.pulumi)
        venv = Path(sys.executable).parent
        path = f"{venv}:{project.engine.path}:{os.environ['PATH']}"
        self._environment = {**os.environ, **project.environment, "PATH": path}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._pulumi, *arguments, "--stack", STACK, "--non-interactive"],
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture
def language_host(engine: Engine) -> None:
    if engine.language_host is None:
        pytest.skip(f"no pulumi-language-python beside {engine.pulumi}")


@pytest.mark.usefixtures("language_host")
def test_the_plain_command_line_sees_the_same_resources_with_the_same_inputs(
    created: Created, tmp_path: Path
) -> None:
    project = created.project.copy(tmp_path)
    try:
        done = Cli(project, tmp_path / "checkout").run("preview", "--expect-no-changes", "--json")
    finally:
        project.close()
    assert done.returncode == 0, done.stdout + done.stderr
    # A step is "same" if the resource of that URN is known and its inputs are equal.
    # Default providers are not counted.
    known = [step for step in created.up.steps if not step.name.startswith("default")]
    assert json.loads(done.stdout)["changeSummary"] == {"same": len(known)}


@pytest.mark.usefixtures("language_host")
def test_the_plain_command_line_previews_and_makes_the_same_change(
    edited: Callable[[str, str, str], Project], members: list[str], tmp_path: Path
) -> None:
    project = edited("site.yaml", "connection_rate: 10\n", "connection_rate: 20\n")
    project.select(program)  # writes the stack's configuration
    cli = Cli(project, tmp_path / "checkout")
    preview = cli.run("preview", "--diff")
    assert preview.returncode == 0, preview.stdout + preview.stderr
    assert changed_lines(preview.stdout) == [
        "- smtpd_client_connection_rate_limit = 10",
        "+ smtpd_client_connection_rate_limit = 20",
    ] * len(members)
    assert project.world.journal == []
    up = cli.run("up", "--yes", "--skip-preview")
    assert up.returncode == 0, up.stdout + up.stderr
    pushed = [line.split(":")[0] for line in project.world.journal]
    assert [line for line in pushed if line.endswith("-config")] == [
        f"run {name}-config" for name in members
    ]
