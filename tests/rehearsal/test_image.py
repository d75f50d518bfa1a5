"""The image layers as they were built here: what is on them, and what the mirror offers."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from mailsite.bundle import compose
from mailsite.loader import load_platform
from rehearsal import image
from rehearsal.machine import Machine
from rehearsal.network import Network
from rehearsal.progress import Progress, RehearsalError
from rehearsal.state import CHECKOUT, State

from .isolation import isolated, needs_machines
from .sample import platform

pytestmark = needs_machines


@pytest.fixture(scope="module")
def layers() -> image.Layers:
    return image.ensure(Progress())


def test_layers_are_found_again_and_not_built(layers: image.Layers) -> None:
    lines: list[str] = []

    class Heard(Progress):
        def say(self, text: str) -> None:
            lines.append(text)

    assert image.ensure(Heard()) == layers
    assert not lines


def test_no_key_and_no_identity_is_in_an_image(layers: image.Layers) -> None:
    for layer in {*layers.postfix, *layers.world}:
        assert not [*layer.glob("etc/ssh/ssh_host_*")]
        for path in (layer / "etc/machine-id", layer / "etc/hostname"):
            assert not path.exists() or path.read_text() == ""
        assert not (layer / "usr/sbin/policy-rc.d").exists()


def test_what_rspamd_compiles_is_there_and_nothing_else_of_it(layers: image.Layers) -> None:
    (place,) = (layer for layer in layers.postfix if layer.name.startswith("compiled-"))
    compiled = [p for p in place.rglob("*") if p.is_file()]
    assert compiled
    assert all(p.parent.match("var/cache/rspamd") and ".hs" in p.name for p in compiled)
    # The suffixes of top-level domains, ten thousand.
    assert max(p.stat().st_size for p in compiled) > 10 << 20


@isolated
def test_a_machine_on_the_mail_layer_runs_no_mail_daemon(
    names: None, tmp_path: Path, layers: image.Layers
) -> None:
    state = State(tmp_path)
    Network(platform(), state).up()
    probe = Machine("layer.net.pelican.example", layers.postfix, (), state)
    try:
        probe.boot()
        enabled = probe.run(
            ["systemctl", "--root=/", "list-unit-files", "--state=enabled", "--no-legend"]
        ).stdout
        assert "ssh.service" in enabled
        for unit in ("postfix", "dovecot", "opendkim", "nginx", "unbound"):
            assert unit not in enabled
            probe.run(["test", "-e", f"/usr/lib/systemd/system/{unit}.service"])
        assert probe.run(["apt-mark", "showhold"]).stdout == ""
    finally:
        probe.destroy()


def test_every_package_that_a_bundle_names_is_on_a_layer() -> None:
    named: set[str] = set()
    for site in ("prod", "example"):
        loaded = load_platform(CHECKOUT / "sites" / site)
        for host in loaded.hosts.values():
            named |= set(compose(loaded, host).packages)
    servers = (*image.POSTFIX_PACKAGES, *image.OPENSMTPD_PACKAGES)
    assert named <= {*image.MAIL_PACKAGES, *servers}


def test_the_mirror_serves_what_debian_signed(layers: image.Layers) -> None:
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    for archive, suite in image.SUITES:
        dists = layers.aptrepo / archive / "dists" / suite
        verified = subprocess.run(
            ["gpgv", "--keyring", keyring, str(dists / "InRelease")], capture_output=True, text=True
        )
        assert verified.returncode == 0, verified.stderr
        signed = (dists / "InRelease").read_text()
        lists = [*dists.rglob("Packages.xz")]
        assert lists
        for path in lists:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert digest in signed
            assert (path.parent / "by-hash/SHA256" / digest).samefile(path)


def test_the_mirror_has_the_packages_that_the_mail_layer_adds(layers: image.Layers) -> None:
    names = {p.name.partition("_")[0] for p in layers.aptrepo.rglob("*.deb")}
    for package in ("postfix", "dovecot-core", "opendkim", "unbound", "nginx"):
        assert package in names


def test_a_failed_build_leaves_no_layer_and_names_the_reason(
    tmp_path: Path, layers: image.Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "MAIL_PACKAGES", ("there-is-no-such-package",))
    builder = image._Builder(tmp_path, Progress(quiet=True))
    builder._base.symlink_to(layers.base[0])
    with pytest.raises(RehearsalError, match="there-is-no-such-package"):
        builder.build()
    assert not builder._mail.exists()
    assert not [*tmp_path.glob(".building-*")]
