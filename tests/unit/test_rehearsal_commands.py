"""The commands of a rehearsal as an operator meets them, before anything is started."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rehearsal import cli, existing, image, tools
from rehearsal.progress import Progress, RehearsalError, wait_for
from rehearsal.state import CHECKOUT, ProcessId, State, locked, write_atomic
from tests.rehearsal.sample import network as sample_network
from tests.rehearsal.sample import platform

COMMANDS = ("up", "status", "verify", "contract", "shell", "logs", "mail", "preview", "down")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert command in capsys.readouterr().out


def test_a_misspelled_command_is_misuse() -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["upp"])
    assert left.value.code == 2


def test_an_unknown_stack_is_refused_before_anything_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "require_root", _must_not_be_called)
    assert cli.main(["up", "--stack", "nosuch"]) == 1
    said = capsys.readouterr().err
    assert "there is no stack nosuch" in said
    assert "remedy: choose one of: " in said


def test_bad_site_data_is_refused_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    shutil.copytree(CHECKOUT / "sites/example", site)
    topology = site / "topology.yaml"
    topology.write_text(topology.read_text().replace("sites:", "sitez:", 1))
    monkeypatch.setattr(tools, "require_root", _must_not_be_called)
    monkeypatch.setattr(
        "rehearsal.program.stack_config", lambda stack, project=None: {"mail:site": str(site)}
    )
    assert cli.main(["up", "--stack", "any"]) == 1
    assert "topology.yaml:" in capsys.readouterr().err


def _must_not_be_called(*_: object) -> None:
    raise AssertionError("went on with bad input")


def test_progress_says_what_is_waited_for_and_how_long_it_took(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rehearsal.progress._HEARTBEAT", 0.01)
    monkeypatch.setattr("rehearsal.progress._QUIET_BELOW", 0.0)
    progress = Progress()
    with progress.step("the kettle"):
        wait_for(lambda: "the kettle ... (" in capsys.readouterr().err, timeout=5, what="a word")
    assert "the kettle: done (" in capsys.readouterr().err
    with pytest.raises(KeyError), progress.step("the cup"):
        raise KeyError
    assert "the cup: failed after" in capsys.readouterr().err


def test_waiting_in_vain_names_what_was_waited_for() -> None:
    with pytest.raises(RehearsalError, match=r"0.05 s in vain for godot\n  remedy: go home"):
        wait_for(lambda: False, timeout=0.05, what="godot", remedy="go home")


def test_a_file_is_private_from_its_first_moment(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "secret", "one")
    assert path.stat().st_mode & 0o777 == 0o600
    write_atomic(path, "two", mode=0o644)
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]


def test_a_lock_whose_file_was_removed_protects_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, None, ""):
        path.unlink()
        taken = subprocess.run(
            ["flock", "--nonblock", str(path), "true"], capture_output=True, check=False
        )
        assert taken.returncode == 0
    with locked(path, None, ""):
        taken = subprocess.run(["flock", "--nonblock", str(path), "true"], check=False)
        assert taken.returncode != 0


def test_a_process_is_known_by_its_start_too(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        known = State(tmp_path).record("child", child.pid)
        assert known.alive()
        assert not ProcessId(known.pid, known.start + 1).alive()
        known.end()
        assert not known.alive()
        assert State(tmp_path).process("child") is None
    finally:
        child.kill()
        child.wait()


def test_state_that_is_no_state_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(RehearsalError, match="make down"):
        State(tmp_path).read_json("run.json")


def test_the_recipe_names_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Progress(quiet=True)
    before = image._Builder(tmp_path, quiet).layers()
    monkeypatch.setattr(image, "MAIL_PACKAGES", (*image.MAIL_PACKAGES, "another"))
    after = image._Builder(tmp_path, quiet).layers()
    assert after.base == before.base
    for name in ("postfix", "opensmtpd"):
        changed = zip(getattr(before, name), getattr(after, name), strict=True)
        assert [one != other for one, other in changed] == [False, True, True, True]
    assert after.aptrepo != before.aptrepo
    assert after.world == before.world


def test_a_machine_has_the_layer_of_its_mail_server(tmp_path: Path) -> None:
    layers = image._Builder(tmp_path, Progress(quiet=True)).layers()
    assert layers.of(["dovecot-core", "postfix"]) == layers.postfix
    assert layers.of(["opensmtpd", "rspamd"]) == layers.opensmtpd
    assert layers.postfix[:-1] == layers.opensmtpd[:-1]


def test_fields_of_package_lists_are_read() -> None:
    text = "Package: a\nDescription: one\n two\n\nPackage: b\nVersion: 1:2\n"
    assert [*image._parse(text.splitlines())] == [
        {"Package": "a", "Description": "one"},
        {"Package": "b", "Version": "1:2"},
    ]


def test_an_existing_machine_has_its_addresses_routes_and_own_things() -> None:
    host = {
        "name": "nginx0.net.pelican.example",
        "roles": ["frontend"],
        "site": "north",
        "interfaces": [
            {"network": "north-public", "ipv4": "100.80.3.5", "ipv6": "2001:db8:3::5"},
            {"network": "north-local", "ipv4": "10.70.1.5", "ipv6": "fd70:1::5"},
        ],
    }
    made = platform(
        hosts={str(host["name"]): host},
        networks={
            "north-public": sample_network("north", "public", 3),
            "north-local": sample_network("north", "site-local", 1),
        },
    )
    (only,) = made.hosts.values()
    found = existing.files(made, only, "PRIVATE", "ssh-ed25519 AAAA", "PEM")
    outer = found["etc/systemd/network/10-leg0.network"]
    inner = found["etc/systemd/network/10-leg1.network"]
    assert "Address=100.80.3.5/24\nAddress=2001:db8:3::5/64\n" in outer
    assert "Destination=0.0.0.0/0\nGateway=100.80.3.1\n" in outer
    assert "DNS=" in outer
    assert "DNS=" not in inner
    assert "Destination=10.70.0.0/16\nGateway=10.70.1.1\n" in inner
    assert found["var/www/operator/index.html"] == existing.WEBSITE
    assert "table inet operator" in found["etc/nftables.conf"]
    assert found["etc/ssh/ssh_host_ed25519_key"] == "PRIVATE"
