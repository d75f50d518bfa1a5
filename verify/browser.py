"""A real browser, somewhere in the network of a rehearsal.

Chromium runs on an image layer of its own, in the namespace of whoever opens it: it has that
place's addresses, asks the world's resolver, and trusts the rehearsal's authorities and no
others. Playwright leads it through pipes, which need no network.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from verify.client import Client
from verify.registry import Failed

if TYPE_CHECKING:
    from playwright.sync_api import Page

SECONDS = 20.0
"""For how long a page or a part of one is waited for; the machine may be busy."""

# $1: lower layers, $2: folder with upper, work, root. Everything vanishes with the namespaces.
_ENTER = """\
#!/bin/sh
set -eu
exec unshare --mount --pid --fork --kill-child sh -c '
set -eu
lower=$1 top=$2
shift 2
mount --make-rprivate /
mount -t overlay -o "lowerdir=$lower,upperdir=$top/upper,workdir=$top/work" overlay "$top/root"
mount -t proc proc "$top/root/proc"
mount -t tmpfs tmpfs "$top/root/dev"
mkdir "$top/root/dev/shm"
for device in null zero random urandom; do
    touch "$top/root/dev/$device"
    mount --bind "/dev/$device" "$top/root/dev/$device"
done
inside() { chroot "$top/root" env -i HOME=/root PATH=/usr/bin:/bin LC_ALL=C.UTF-8 "$@"; }
inside certutil -d sql:/root/.pki/nssdb -N --empty-password
for file in "$top"/upper/root/authorities/*.pem; do
    [ -e "$file" ] || continue
    name=${file##*/}
    inside certutil -d sql:/root/.pki/nssdb -A -t C,, -n "$name" -i "/root/authorities/$name"
done
inside chromium-headless-shell "$@"
' sh {lower} {top} "$@"
"""


@contextmanager
def opened(
    client: Client,
    *,
    layers: Sequence[Path],
    authorities: Sequence[str],
    resolver: object,
    names: dict[str, object] | None = None,
) -> Iterator[Page]:
    """An empty page of a fresh browser.

    Args:
        client: Who looks: the browser runs at its place.
        layers: The image that has the browser, the lowest layer first.
        authorities: PEM of the certificate authorities that it trusts.
        resolver: Address of the name server that it asks.
        names: Host name -> address, for names that must lead to one address alone.

    Raises:
        Failed: What the page was asked for did not come.
    """
    from playwright.sync_api import Error, sync_playwright  # a second that other checks spare

    with tempfile.TemporaryDirectory(prefix="mail-browser-", dir="/var/tmp") as folder:
        top = Path(folder)
        command = _prepare(top, layers, authorities, resolver)
        rules = ", ".join(f"MAP {name} {_literal(to)}" for name, to in (names or {}).items())
        try:
            # A process belongs to the network in which it was started.
            with client.enter():
                driver = sync_playwright().start()
            try:
                browser = driver.chromium.launch(
                    executable_path=command,
                    args=["--disable-gpu", *([f"--host-resolver-rules={rules}"] if rules else [])],
                    env={"PATH": os.environ["PATH"]},
                )
                page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-US")
                page.set_default_timeout(SECONDS * 1000)
                yield page
                browser.close()
            finally:
                driver.stop()
        except Error as error:
            raise Failed(f"the browser: {error.message}") from error


def _literal(address: object) -> str:
    return f"[{address}]" if ":" in str(address) else str(address)


def _prepare(
    top: Path, layers: Sequence[Path], authorities: Sequence[str], resolver: object
) -> Path:
    """Lay out the browser's own part of the file system. Returns the command that starts it."""
    for name in ("upper/etc", "upper/root/.pki/nssdb", "upper/root/authorities", "work", "root"):
        (top / name).mkdir(parents=True)
    (top / "upper/etc/resolv.conf").write_text(f"nameserver {resolver}\n", encoding="ascii")
    for number, pem in enumerate(authorities):
        (top / f"upper/root/authorities/{number}.pem").write_text(pem, encoding="ascii")
    command = top / "browser"
    lower = ":".join(str(layer) for layer in reversed(layers))
    command.write_text(
        _ENTER.replace("{lower}", shlex.quote(lower)).replace("{top}", shlex.quote(str(top))),
        encoding="utf-8",
    )
    command.chmod(0o755)
    return command
