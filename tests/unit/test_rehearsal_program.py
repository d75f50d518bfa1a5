"""What of the committed stack reaches a rehearsal, and what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rehearsal import program, secrets, tools
from rehearsal.engine import Engine
from rehearsal.platform_up import Site
from rehearsal.progress import RehearsalError
from rehearsal.state import State

STACK = """
config:
  mail:site: sites/pelican
  mail:live: true
  mail:deployPublicKey: ssh-ed25519 AAAA-the-real-one operator
  mail:deployKey:
    secure: v1:cipher
  mail:zoneIds:
    pelican.example: 0123456789abcdef0123456789abcdef
  mail:certificates:
    smtp-out.pelican.example:
      chain: a real chain
      key: {secure: v1:cipher}
  mail:secrets:
    sasl/someone: {secure: v1:cipher}
  cloudflare:apiToken:
    secure: v1:cipher
  mail:other:
    open: 1
    closed: {secure: v1:cipher}
    list: [{secure: v1:cipher}, plain]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "Pulumi.pelican.yaml").write_text(STACK)
    (tmp_path / "Pulumi.tern.yaml").write_text("config: {}\n")
    return tmp_path


def settings(project: Path, stack: str = "pelican") -> program.Settings:
    return program.settings(
        stack,
        overlay=Path("/rehearsal/world.yaml"),
        deploy_key=("throwaway private", "ssh-ed25519 throwaway"),
        certificates={"smtp-out.pelican.example": {"chain": "c", "key": "k"}},
        given={"sasl/someone": "{BLF-CRYPT}x"},
        zone_ids={"pelican.example": "f" * 32, "tern.example": "e" * 32},
        project=project,
    )


def test_encrypted_values_are_left_out_wherever_they_stand(project: Path) -> None:
    found = settings(project)
    assert "cipher" not in json.dumps([dict(found.plain), dict(found.secret)])
    assert json.loads(found.plain["mail:other"]) == {"open": 1, "list": ["plain"]}
    assert "cloudflare:apiToken" not in found.plain


def test_plain_values_pass_unchanged(project: Path) -> None:
    found = settings(project)
    assert found.plain["mail:site"] == "sites/pelican"
    assert json.loads(found.plain["mail:zoneIds"]) == {
        "pelican.example": "0123456789abcdef0123456789abcdef"
    }


def test_a_stack_without_zone_ids_gets_the_worlds(project: Path) -> None:
    assert json.loads(settings(project, "tern").plain["mail:zoneIds"]) == {
        "pelican.example": "f" * 32,
        "tern.example": "e" * 32,
    }


def test_the_operators_secrets_are_replaced_by_throwaway_ones(project: Path) -> None:
    found = settings(project)
    assert found.secret["mail:deployKey"] == "throwaway private"
    assert found.plain["mail:deployPublicKey"] == "ssh-ed25519 throwaway operator"
    assert "real" not in json.dumps([dict(found.plain), dict(found.secret)])


def test_a_rehearsal_is_never_live(project: Path) -> None:
    found = settings(project)
    assert "mail:live" not in found.plain
    assert found.plain["mail:rehearsal"] == "/rehearsal/world.yaml"


def test_an_unknown_stack_names_those_there_are(project: Path) -> None:
    with pytest.raises(RehearsalError, match=r"Pulumi.gull.yaml is missing\n.*pelican, tern"):
        program.stack_config("gull", project)


def test_a_stack_without_site_data_says_what_to_run(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program.stack_config, "__defaults__", (project,))
    with pytest.raises(RehearsalError, match="pulumi config set --stack tern mail:site"):
        Site.of("tern")


def test_nothing_of_the_callers_credentials_reaches_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = ("SSH_AUTH_SOCK", "PULUMI_ACCESS_TOKEN", "PULUMI_CONFIG_PASSPHRASE", "AWS_PROFILE")
    bad += ("CLOUDFLARE_API_TOKEN", "PYTHONPATH", "LD_PRELOAD")
    for name in bad:
        monkeypatch.setenv(name, "the caller's")
    monkeypatch.setenv("https_proxy", "http://proxy.pelican.example:3128")
    state = State(tmp_path)
    made = program.Program(state, "pelican", Engine(Path("/e/bin/pulumi"), None, "3.259.0"))
    found = made.environment()
    assert not [name for name in bad if name in found]
    assert "the caller's" not in found.values()
    assert tools.environment()["https_proxy"] == "http://proxy.pelican.example:3128"
    assert found["PULUMI_BACKEND_URL"] == f"file://{tmp_path}/stack"
    passphrase = Path(found["PULUMI_CONFIG_PASSPHRASE_FILE"])
    assert passphrase.stat().st_mode & 0o777 == 0o600
    assert passphrase.read_text() not in found.values()


@pytest.mark.parametrize(
    ("book", "latest", "expected"),
    [
        ({"kvm": {"volumes": {"root": {"size": 1}}}}, None, True),
        ({"kvm": {"volumes": {"root": {"size": 1}}}}, {"resources": []}, True),
        ({"kvm": {"volumes": {"root": {"size": 1}}}}, {"resources": [{"urn": "urn:x"}]}, False),
        ({"kvm": {"volumes": {}, "domains": {}}}, None, False),
        (None, None, False),
    ],
)
def test_a_platform_that_its_killed_run_never_wrote_down_is_known(
    tmp_path: Path, book: Any, latest: Any, expected: bool
) -> None:
    state = State(tmp_path)
    if book is not None:
        (state.folder("standins") / "libvirt.json").write_text(json.dumps(book))
        stacks = state.folder("stack", ".pulumi", "stacks", "mail")
        (stacks / "pelican.json").write_text(json.dumps({"checkpoint": {"latest": latest}}))
    assert program.is_unrecorded(state, "pelican") is expected


def test_a_configured_stack_tells_its_keys_without_being_decrypted(project: Path) -> None:
    assert "cloudflare:apiToken" in program._keys(project / "Pulumi.pelican.yaml")
    assert program._keys(project / "Pulumi.tern.yaml") == set()
    assert program._keys(project / "Pulumi.gull.yaml") == set()


def test_throwaway_secrets_stay_the_same_and_are_nobody_elses(tmp_path: Path) -> None:
    state = State(tmp_path)
    private, public = secrets.operator_key(state)
    assert (private, public) == secrets.operator_key(state)
    assert secrets.host_key(state, "a.pelican.example")[1] != public
    assert secrets.passphrase(state).read_text() == secrets.passphrase(state).read_text()
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.suffix != ".pub":
            assert path.stat().st_mode & 0o077 == 0, path
    assert "PRIVATE KEY" in private
    assert public.startswith("ssh-ed25519 ")


def test_labels_of_resources_name_kind_and_name() -> None:
    urn = "urn:pulumi:prod::mail::mail:index:Host$command:remote:Command::a.example-config"
    assert program._label(urn) == "Command a.example-config"
    assert program._is_custom(urn)
    assert not program._is_custom("urn:pulumi:prod::mail::mail:index:Host::a.example")


def test_events_become_lines(tmp_path: Path) -> None:
    said: list[str] = []

    class Heard(program.Progress):
        def say(self, text: str) -> None:
            said.append(text)

    watch = program._Watch(Heard(), tmp_path / "log")
    urn = "urn:pulumi:prod::mail::command:remote:Command::a-config"
    watch.event(_event(diagnostic_event=_said("error", "no\n", urn)))
    watch.event(_event(diagnostic_event=_said("info", "chatter", urn)))
    assert said == ["error: Command a-config: no"]
    assert watch.errors == ["Command a-config: no"]


def _said(severity: str, message: str, urn: str) -> Any:
    class Diagnostic:
        ephemeral = False

    found: Any = Diagnostic()
    found.severity, found.message, found.urn = severity, message, urn
    return found


def _event(**parts: Any) -> Any:
    class Event:
        resource_pre_event = None
        res_outputs_event = None
        res_op_failed_event = None
        diagnostic_event = None
        summary_event = None

    found: Any = Event()
    for name, value in parts.items():
        setattr(found, name, value)
    return found
