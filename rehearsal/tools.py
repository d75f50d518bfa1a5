"""Programs that a rehearsal needs from the machine that it runs on, and how they are called.

On a Debian machine what is missing is installed by apt-get, with a word about it; elsewhere the
error names what to install.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from rehearsal.progress import Progress, RehearsalError

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Command -> Debian package.
TOOLS: Mapping[str, str] = {
    "systemd-nspawn": "systemd-container",
    "journalctl": "systemd",
    "mmdebstrap": "mmdebstrap",
    "nft": "nftables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "losetup": "mount",
    "mount": "mount",
    "mkfs.ext4": "e2fsprogs",
}
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_PASSED_ON = (
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "GOPROXY",
    "GONOSUMDB",
    "GOSUMDB",
    "GOFLAGS",
    "SSL_CERT_FILE",
    "TERM",
    "XDG_CACHE_HOME",
)


def environment(**extra: str) -> dict[str, str]:
    """An environment made from an allow-list: no agent socket, token or setting of the caller.

    Unix sockets cross network namespaces, so a ssh agent or a credential that slipped in would
    be usable in the sealed network.
    """
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {
        "PATH": _PATH,
        "HOME": str(Path.home()),
        "LANG": "C.UTF-8",
        **kept,
        **extra,
    }


def cache() -> Path:
    """Where image layers and the engine are kept for every checkout of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base) / "mail-rehearsal"
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    return path


def missing(tools: Iterable[str] = tuple(TOOLS)) -> tuple[str, ...]:
    """Debian packages of the tools that this machine lacks."""
    lacking = {TOOLS[t] for t in tools if shutil.which(t, path=_PATH) is None}
    if not _KEYRING.exists():
        lacking.add("debian-archive-keyring")
    return tuple(sorted(lacking))


def require_root() -> None:
    """Raise unless this process may make namespaces, mounts and machines."""
    if os.geteuid() != 0:
        raise RehearsalError(
            "a rehearsal makes namespaces, mounts and machines, which only root may do",
            "run it as root, on a machine where nothing else matters",
        )


def ensure(progress: Progress) -> None:
    """Install what is missing (see :func:`missing`)."""
    require_root()
    lacking = missing()
    if not lacking:
        return
    names = " ".join(lacking)
    if shutil.which("apt-get") is None:
        raise RehearsalError(
            f"programs of these Debian packages are missing: {names}",
            "install them, or use a Debian machine",
        )
    apt = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
    variables = environment(DEBIAN_FRONTEND="noninteractive")
    with progress.step(f"installing {names} on this machine"):
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *lacking]):
            done = subprocess.run([*apt, *command], env=variables, capture_output=True, text=True)
            if done.returncode != 0 and command[0] == "install":
                raise RehearsalError(
                    f"apt-get install {names}: {done.stderr.strip()[-1000:]}",
                    f"install these packages by hand: {names}",
                )
    still = missing()
    if still:
        raise RehearsalError(
            f"still missing after their installation: {' '.join(still)}",
            "install them by hand",
        )
