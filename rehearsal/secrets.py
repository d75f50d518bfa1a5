"""Throwaway secrets of a rehearsal; production's are never needed and never used.

All of them are made once, kept in the state folder with mode 0600, and gone with it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from mailsite.model import Host, Platform
from mailsite.secrets import required
from rehearsal.ca import Authority
from rehearsal.state import State

_CERTIFICATE = "certificate/"


def passphrase(state: State) -> Path:
    """File with the passphrase that the stack's state is encrypted with."""
    path = state.root / "passphrase"
    if not path.exists():
        state.write(path.name, secrets.token_urlsafe(32), keep=True)
    return path


def operator_key(state: State) -> tuple[str, str]:
    """The operator's ssh key: private in OpenSSH's format, and the public line."""
    return _ssh_key(state, state.operator_key.name, "operator")


def host_key(state: State, host: str) -> tuple[str, str]:
    """The ssh key of an existing machine: private in OpenSSH's format, and the public line."""
    return _ssh_key(state, f"host_keys/{host}", host)


def _ssh_key(state: State, name: str, comment: str) -> tuple[str, str]:
    path = state.root / name
    if not path.exists():
        pem = Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
        )
        state.write(name, pem.decode("ascii"), keep=True)
    private = path.read_text(encoding="ascii")
    public = load_ssh_private_key(private.encode(), password=None).public_key()
    line = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")
    state.write(f"{name}.pub", f"{line} {comment}\n", mode=0o644)
    return private, line


def certificates(
    state: State, platform: Platform, hosts: tuple[Host, ...]
) -> Mapping[str, Mapping[str, str]]:
    """What ``mail:certificates`` holds: name -> chain and key, from the rehearsal's authority.

    One certificate for each that the bundle of one of ``hosts`` asks for.
    """
    wanted = {
        name.removeprefix(_CERTIFICATE).rpartition("/")[0]
        for host in hosts
        for name in required(platform, host)
        if name.startswith(_CERTIFICATE)
    }
    authority = Authority(state.ca)
    found: dict[str, dict[str, str]] = {}
    for name in sorted(wanted):
        issued = authority.issue(platform.certificate_names(name))
        found[name] = {"chain": issued.chain, "key": issued.key}
    return found
