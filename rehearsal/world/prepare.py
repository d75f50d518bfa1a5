"""Runs on the world's machine before its name server: makes DNSSEC keys, writes zone files.

``prepare.py PLAN FOLDER ANCHOR``: the plan is JSON, ``{"configuration": path of knot.conf, "zones":
{name: {"file", "text", "signed", "bogus", "dynamic", "children"}}}``. Keys are made once and
kept below FOLDER, whose ``ds.json`` says the DS data of each signed zone; the root's goes to the
file ANCHOR too, where everybody may read it. The zone file of a dynamic zone is written once and
then belongs to the server.

Standard library alone: it runs under Debian's own Python.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

_TTL = 3600
_SHA256 = "2"


def main(arguments: list[str]) -> int:
    """Prepare everything; running it again changes nothing."""
    if len(arguments) != 3:
        print("usage: prepare.py PLAN FOLDER ANCHOR", file=sys.stderr)
        return 2
    plan = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    folder = Path(arguments[1])
    (folder / "zones").mkdir(parents=True, exist_ok=True)
    give_to_server(folder)
    ds = delegation_signers(plan["zones"], plan["configuration"], folder / "ds.json")
    write(Path(arguments[2]), f". IN DS {ds['.']}\n", mode=0o644)
    for name, zone in plan["zones"].items():
        path = folder / "zones" / zone["file"]
        if not (zone["dynamic"] and path.exists()):
            write(path, zone["text"] + "".join(delegations(name, plan["zones"], ds)))
    give_to_server(folder)
    return 0


def give_to_server(folder: Path) -> None:
    """Knot's programs give up root before they touch their files."""
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, "knot", "knot")


def delegation_signers(
    zones: dict[str, dict[str, Any]], configuration: str, path: Path
) -> dict[str, str]:
    """DS data of every signed zone; keys are made for those that have none."""
    found: dict[str, str] = {}
    if path.exists():
        found = json.loads(path.read_text(encoding="ascii"))
    missing = [name for name, zone in zones.items() if zone["signed"] and name not in found]
    for name in missing:
        keys = keymgr(configuration, name, "list")
        if not keys.strip() or "no keys" in keys.lower():
            keymgr(
                configuration, name, "generate", "algorithm=ecdsap256sha256", "ksk=yes", "zsk=yes"
            )
        for line in keymgr(configuration, name, "ds").splitlines():
            _, _, rest = line.partition(" DS ")
            if rest.split()[2] == _SHA256:
                found[name] = rest
    if missing:
        write(path, json.dumps(found, indent=1))
    return found


def delegations(name: str, zones: dict[str, dict[str, Any]], ds: dict[str, str]) -> list[str]:
    """DS records for the signed children of zone ``name``."""
    return [
        f"{child} {_TTL} IN DS {broken(ds[child]) if zones[child]['bogus'] else ds[child]}\n"
        for child in zones[name]["children"]
        if zones[child]["signed"]
    ]


def broken(ds: str) -> str:
    """DS data with the digest of a key that does not exist."""
    tag, algorithm, kind, digest = ds.split()
    return f"{tag} {algorithm} {kind} {digest[::-1]}"


def keymgr(configuration: str, zone: str, *arguments: str) -> str:
    done = subprocess.run(
        ["keymgr", "-c", configuration, zone, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def write(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file whole, unless it is as wanted."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    new = path.with_name(f".{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
