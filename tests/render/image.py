"""A throwaway host: the image of the rehearsal, a bundle's files on top, no network.

Everything happens in namespaces of its own, so that nothing of it stays.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mailsite.fragment import File
from rehearsal.image import Layers

# $1: the lower layers, $2: upper, $3: work, $4: where the root is put together.
_ENTER = """\
set -eu
ip link set lo up
mount -t overlay -o "lowerdir=$1,upperdir=$2,workdir=$3" overlay "$4"
mount -t proc proc "$4/proc"
mount -t tmpfs tmpfs "$4/dev"
for device in null zero random urandom tty; do
    touch "$4/dev/$device"
    mount --bind "/dev/$device" "$4/dev/$device"
done
mount -t tmpfs tmpfs "$4/run"
mkdir -p "$4/run/sshd"
exec chroot "$4" python3 -c "$RUN"
"""

_RUN = """\
import json, subprocess, sys
from pathlib import Path
subprocess.run(["ssh-keygen", "-A"], check=True, capture_output=True)
subprocess.run(["systemd-tmpfiles", "--create", "opendkim.conf"], capture_output=True)
order = json.load(sys.stdin)
results = []
for step in order:
    for path, content in step["files"].items():
        place = Path(path)
        place.write_text(content)
    done = subprocess.run(step["command"], input=step["input"], capture_output=True, text=True)
    results.append([done.returncode, done.stdout, done.stderr])
json.dump(results, sys.stdout)
"""


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def words(self) -> str:
        return self.err + self.out


@dataclass(frozen=True)
class Step:
    """A command in the machine; before it, ``files`` get new content, owner and mode unchanged."""

    command: Sequence[str]
    input: str = ""
    files: Mapping[str, str] | None = None


class Root:
    """Image layers, the uppermost last, and the users that their packages made."""

    def __init__(self, layers: Sequence[Path]) -> None:
        self.lower = ":".join(str(layer) for layer in reversed(layers))
        top = next(x for x in reversed(layers) if (x / "etc/passwd").exists())
        self.users = _numbers(top / "etc/passwd")
        self.groups = _numbers(top / "etc/group")


class Image:
    """The layers of an image, of which each machine takes those with its mail server."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers

    def _root(self, files: Mapping[str, File]) -> Root:
        """The layers with the mail server that ``files`` configure."""
        return Root(self._layers.opensmtpd if "/etc/smtpd.conf" in files else self._layers.postfix)

    def run(self, files: Mapping[str, File], steps: Sequence[Step]) -> list[Result]:
        """Run ``steps`` one after the other on one machine that has ``files``."""
        order = [
            {"command": list(s.command), "input": s.input, "files": dict(s.files or {})}
            for s in steps
        ]
        root = self._root(files)
        with _upper(root, files) as top:
            done = subprocess.run(
                [
                    *("unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child"),
                    *("sh", "-c", _ENTER, "sh", root.lower),
                    *(str(top / name) for name in ("upper", "work", "root")),
                ],
                input=json.dumps(order),
                capture_output=True,
                text=True,
                timeout=120,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "RUN": _RUN},
            )
        assert done.returncode == 0, f"the machine does not come up: {done.stderr}"
        return [Result(*result) for result in json.loads(done.stdout)]

    @contextmanager
    def prepared(self, files: Mapping[str, File]) -> Iterator[tuple[str, Path]]:
        """The layers as overlayfs takes them, and folders for what a machine writes."""
        root = self._root(files)
        with _upper(root, files) as top:
            yield root.lower, top

    def run_one(self, files: Mapping[str, File], *command: str) -> Result:
        return self.run(files, [Step(command)])[0]


@contextmanager
def _upper(root: Root, files: Mapping[str, File]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mail-render-", dir="/var/tmp") as folder:
        top = Path(folder)
        for name in ("upper", "work", "root"):
            (top / name).mkdir()
        for path, file in files.items():
            place = top / "upper" / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(file.content, encoding="utf-8")
            place.chmod(file.mode)
            os.chown(place, root.users[file.owner], root.groups[file.group])
        yield top


def _numbers(path: Path) -> dict[str, int]:
    rows = (line.split(":") for line in path.read_text(encoding="utf-8").splitlines())
    return {row[0]: int(row[2]) for row in rows}
