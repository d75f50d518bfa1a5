"""The Pulumi engine that a rehearsal and the engine tests run: found, fetched or built.

In this order: ``pulumi`` on the caller's PATH if it is new enough, the official release, and
where that cannot be had, the same version built from its Go modules (pinned in
``rehearsal/engine_module/``). What was fetched or built lies in the user's cache.

``MAIL_ENGINE`` chooses one way: ``path``, ``release`` or ``module``.
"""

from __future__ import annotations

import hashlib
import os
import platform as host_platform
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rehearsal import image, tools
from rehearsal.progress import Progress, RehearsalError
from rehearsal.state import locked

VERSION = "3.259.0"
OLDEST = (3, 238, 0)
"""An older engine does not wait for hooks, and does not know what the program asks of it."""

RELEASES = "https://get.pulumi.com/releases/sdk"
MODULES = Path(__file__).resolve().parent / "engine_module"

_CLI = "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi"
_LANGUAGE = "github.com/pulumi/pulumi/sdk/v3/python/cmd/pulumi-language-python"
_SDK = "github.com/pulumi/pulumi/sdk/v3"
_VERSION_VARIABLE = f"{_SDK}/go/common/version.Version"
# A Go that is older cannot fetch the one that go.mod asks for.
_OLDEST_GO = (1, 21)
_CONNECT_SECONDS = 15.0


@dataclass(frozen=True)
class Engine:
    """An engine that can be started.

    ``language_host`` is ``pulumi-language-python``; None where there is none, and then only
    inline programs can be run, not the plain command line.
    """

    pulumi: Path
    language_host: Path | None
    version: str

    @property
    def path(self) -> str:
        """Folders of the engine for a PATH, separated by colons."""
        folders = [self.pulumi.parent]
        if self.language_host is not None and self.language_host.parent not in folders:
            folders.append(self.language_host.parent)
        return ":".join(map(str, folders))


def ensure(progress: Progress, folder: Path | None = None) -> Engine:
    """The engine; from the cache, or the first of the three ways that works.

    Raises :class:`RehearsalError` with the reason of each way when none does.
    """
    cache = folder or tools.cache()
    ways: dict[str, Callable[[], Engine | None]] = {
        "path": on_path,
        "release": lambda: _cached(cache, "release") or _fetch(cache, progress),
        "module": lambda: _cached(cache, "module") or _build(cache, progress),
    }
    chosen = os.environ.get("MAIL_ENGINE")
    if chosen:
        if chosen not in ways:
            raise RehearsalError(
                f"MAIL_ENGINE={chosen}: there is no such way to an engine",
                f"set it to one of: {', '.join(ways)}",
            )
        ways = {chosen: ways[chosen]}
    else:
        found = on_path() or _cached(cache, "release") or _cached(cache, "module")
        if found is not None:
            return found
    reasons: list[str] = []
    with locked(cache / ".engine", progress, "another command gets the engine"):
        for name, way in ways.items():
            try:
                engine = way()
            except RehearsalError as error:
                reasons.append(f"{name}: {error.message}")
                continue
            if engine is not None:
                return engine
            reasons.append(f"{name}: no pulumi {_dotted(OLDEST)} or newer on PATH")
    raise RehearsalError(
        "no Pulumi engine can be had:\n  " + "\n  ".join(reasons),
        "install the pulumi command line, so that it is on PATH",
    )


# On PATH ---------------------------------------------------------------------------------------


def on_path() -> Engine | None:
    """The caller's own engine, if it is new enough."""
    found = shutil.which("pulumi")
    return None if found is None else _engine(Path(found))


def _engine(pulumi: Path) -> Engine | None:
    try:
        said = subprocess.run(
            [str(pulumi), "version"],
            env=tools.environment(PULUMI_SKIP_UPDATE_CHECK="true"),
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)", said)
    if match is None or tuple(map(int, match.groups())) < OLDEST:
        return None
    host = pulumi.with_name("pulumi-language-python")
    return Engine(pulumi, host if host.exists() else None, said.removeprefix("v"))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# In the cache ----------------------------------------------------------------------------------


def _place(cache: Path, way: str) -> Path:
    """Folder of an engine that was got in ``way``, named by what it is made from."""
    digest = hashlib.sha256(f"{VERSION} {host_platform.machine()}".encode())
    if way == "module":
        for path in sorted(MODULES.rglob("go.*")):
            digest.update(path.read_bytes())
    return cache / f"engine-{way}-{digest.hexdigest()[:16]}"


def _cached(cache: Path, way: str) -> Engine | None:
    pulumi = _place(cache, way) / "bin/pulumi"
    return _engine(pulumi) if pulumi.exists() else None


def _keep(cache: Path, way: str, built: Path) -> Engine:
    place = _place(cache, way)
    shutil.rmtree(place, ignore_errors=True)
    built.rename(place)
    engine = _engine(place / "bin/pulumi")
    if engine is None:
        raise RehearsalError(f"{place}/bin/pulumi does not run", f"remove {place} and try again")
    return engine


# The official release --------------------------------------------------------------------------


def _fetch(cache: Path, progress: Progress) -> Engine:
    """Download the official release, compare its checksum and unpack it."""
    known = {"x86_64": "x64", "aarch64": "arm64"}
    machine = known.get(host_platform.machine())
    if machine is None:
        raise RehearsalError(f"there is no release for {host_platform.machine()}")
    base = os.environ.get("MAIL_ENGINE_RELEASES", RELEASES)
    name = f"pulumi-v{VERSION}-linux-{machine}.tar.gz"
    with (
        progress.step(f"fetching the engine: pulumi {VERSION}"),
        image.workshop(cache, "engine") as shop,
    ):
        wanted = _checksum(_get(f"{base}/pulumi-{VERSION}-checksums.txt").decode(), name)
        archive = _get(f"{base}/{name}")
        found = hashlib.sha256(archive).hexdigest()
        if found != wanted:
            raise RehearsalError(f"{name} has the checksum {found}, not {wanted}")
        packed = shop / name
        packed.write_bytes(archive)
        target = shop / "unpacked/bin"
        target.mkdir(parents=True)
        # Python's own tarfile of Debian 12 cannot be told to distrust an archive.
        unpack = ["tar", "--extract", "--gzip", "--strip-components=1", "--no-same-owner"]
        done = subprocess.run(
            [*unpack, f"--file={packed}", f"--directory={target}"],
            env=tools.environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RehearsalError(f"{name} cannot be unpacked: {done.stderr.strip()}")
        return _keep(cache, "release", shop / "unpacked")


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_CONNECT_SECONDS) as answer:
            body: bytes = answer.read()
            return body
    except (urllib.error.URLError, OSError) as error:
        raise RehearsalError(f"{url}: {error}") from error


def _checksum(text: str, name: str) -> str:
    for line in text.splitlines():
        words = line.split()
        if len(words) == 2 and words[1].lstrip("*") == name:
            return words[0]
    raise RehearsalError(f"the list of checksums does not name {name}")


# Built from its modules ------------------------------------------------------------------------

_BUILD_SCRIPT = """\
set -eu
cd "$1/pulumi"
go build -o "$2/pulumi" -ldflags "-s -w -X $VARIABLE=v$VERSION" "$CLI"
cp "$(go list -m -f '{{.Dir}}' "$SDK")/python/cmd/pulumi-language-python-exec" "$2/"
chmod 755 "$2/pulumi-language-python-exec"
cd "$1/language"
go build -o "$2/pulumi-language-python" -ldflags "-s -w" "$LANGUAGE"
"""


def _build(cache: Path, progress: Progress) -> Engine:
    """Build command line and Python language host with Go: the machine's, or Debian's."""
    go = _go()
    what = f"building the engine: pulumi {VERSION} (about ten minutes the first time)"
    variables = {
        "VARIABLE": _VERSION_VARIABLE,
        "VERSION": VERSION,
        "CLI": _CLI,
        "LANGUAGE": _LANGUAGE,
        "SDK": _SDK,
        "GOTOOLCHAIN": "auto",
        "GOFLAGS": "-buildvcs=false",
    }
    with image.workshop(cache, "engine") as shop:
        target = shop / "built/bin"
        target.mkdir(parents=True)
        script = ["sh", "-c", _BUILD_SCRIPT, "sh"]
        if go is not None:
            with progress.step(what):
                environment = tools.environment(**variables)
                environment["PATH"] = f"{go.parent}:{environment['PATH']}"
                _run([*script, str(MODULES), str(target)], environment)
        else:
            kept = cache / "go"
            kept.mkdir(exist_ok=True)
            # This machine's authorities: its way to the modules may have one of its own.
            authorities = Path(
                os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
            )
            image.run_on_golang(
                [*script, "/mnt/modules", "/mnt/target"],
                progress,
                what,
                cache=cache,
                binds={
                    "/mnt/modules": MODULES,
                    "/mnt/target": target,
                    "/mnt/go": kept,
                    "/mnt/authorities": authorities.parent,
                },
                variables={
                    **variables,
                    "GOPATH": "/mnt/go",
                    "GOCACHE": "/mnt/go/build",
                    "SSL_CERT_FILE": f"/mnt/authorities/{authorities.name}",
                },
            )
        engine = _keep(cache, "module", shop / "built")
    if go is None:
        _remove_modules(cache / "go")
    return engine


def _remove_modules(folder: Path) -> None:
    """Remove the modules that were fetched; Go writes them without write permission."""
    subprocess.run(["chmod", "-R", "u+w", str(folder)], check=False, capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


def _go() -> Path | None:
    """The machine's own Go, if it can fetch the version that go.mod asks for."""
    found = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin:/usr/lib/go/bin")
    if found is None:
        return None
    said = subprocess.run([found, "env", "GOVERSION"], capture_output=True, text=True).stdout
    match = re.match(r"go(\d+)\.(\d+)", said)
    if match is None or (int(match[1]), int(match[2])) < _OLDEST_GO:
        return None
    return Path(found)


def _run(argv: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode != 0:
        said = "\n".join(done.stderr.strip().splitlines()[-10:])
        raise RehearsalError(f"the engine cannot be built:\n{said}")
