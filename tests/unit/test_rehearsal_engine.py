"""The ways to an engine: in which order they are tried, and when each of them is refused."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rehearsal import engine
from rehearsal.progress import Progress, RehearsalError

QUIET = Progress(quiet=True)
SCRIPT = "#!/bin/sh\necho v{version}\n"


def script(path: Path, version: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SCRIPT.format(version=version))
    path.chmod(0o755)
    return path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for releases, on loopback; nothing is in it."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=partial(serving.serve_forever, 0.01), daemon=True).start()
    monkeypatch.setenv("MAIL_ENGINE_RELEASES", f"http://127.0.0.1:{serving.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield folder
    serving.shutdown()
    serving.server_close()


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine on PATH, and none can be built."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("MAIL_ENGINE", raising=False)

    def fail(*_: object) -> engine.Engine:
        raise RehearsalError("no Go here")

    monkeypatch.setattr(engine, "_build", fail)


def release(folder: Path, *, checksum: str = "", version: str = engine.VERSION) -> None:
    """Put a release there like the official ones: a folder ``pulumi`` with the programs."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name in ("pulumi", "pulumi-language-python"):
            body = SCRIPT.format(version=version).encode()
            entry = tarfile.TarInfo(f"pulumi/{name}")
            entry.size, entry.mode = len(body), 0o755
            tar.addfile(entry, io.BytesIO(body))
    for machine in ("x64", "arm64"):
        name = f"pulumi-v{engine.VERSION}-linux-{machine}.tar.gz"
        (folder / name).write_bytes(data.getvalue())
    digest = checksum or hashlib.sha256(data.getvalue()).hexdigest()
    (folder / f"pulumi-{engine.VERSION}-checksums.txt").write_text(
        "".join(
            f"{digest}  pulumi-v{engine.VERSION}-linux-{machine}.tar.gz\n"
            for machine in ("x64", "arm64")
        )
    )


def test_an_engine_on_path_is_taken_first(
    tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(server)
    own = script(tmp_path / "own/pulumi", "3.300.1")
    monkeypatch.setenv("PATH", f"{own.parent}:/usr/bin:/bin")
    found = engine.ensure(QUIET, tmp_path)
    assert found == engine.Engine(own, None, "3.300.1")


def test_an_old_engine_on_path_is_passed_over(
    tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(server)
    own = script(tmp_path / "own/pulumi", "3.99.0")
    monkeypatch.setenv("PATH", f"{own.parent}:/usr/bin:/bin")
    assert engine.ensure(QUIET, tmp_path).version == engine.VERSION


def test_the_release_is_fetched_once_and_kept(tmp_path: Path, server: Path) -> None:
    release(server)
    found = engine.ensure(QUIET, tmp_path)
    assert found.language_host == found.pulumi.with_name("pulumi-language-python")
    for path in server.iterdir():
        path.unlink()
    assert engine.ensure(QUIET, tmp_path) == found


def test_a_release_with_another_checksum_is_refused(tmp_path: Path, server: Path) -> None:
    release(server, checksum="0" * 64)
    with pytest.raises(RehearsalError, match="has the checksum"):
        engine.ensure(QUIET, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".building", "engine-"))]


def test_where_no_way_leads_to_an_engine_each_says_why(tmp_path: Path, server: Path) -> None:
    with pytest.raises(RehearsalError) as caught:
        engine.ensure(QUIET, tmp_path)
    text = str(caught.value)
    assert "path: no pulumi 3.238.0 or newer on PATH" in text
    assert "release: http://127.0.0.1" in text
    assert "404" in text
    assert "module: no Go here" in text


def test_one_way_can_be_chosen(
    tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(server)
    monkeypatch.setenv("MAIL_ENGINE", "module")
    with pytest.raises(RehearsalError, match="module: no Go here"):
        engine.ensure(QUIET, tmp_path)
    monkeypatch.setenv("MAIL_ENGINE", "wish")
    with pytest.raises(RehearsalError, match="path, release, module"):
        engine.ensure(QUIET, tmp_path)


def test_a_changed_pin_asks_for_another_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine._place(tmp_path, "module")
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "go.mod").write_text("module other\n")
    monkeypatch.setattr(engine, "MODULES", modules)
    assert engine._place(tmp_path, "module") != before
