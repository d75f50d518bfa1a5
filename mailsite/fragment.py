"""The vocabulary of host bundles: what a role contributes to a host, and what a host gets.

Everything here is frozen data. Roles return a :class:`Fragment`; :mod:`mailsite.bundle` puts
the fragments of all roles of a host together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from mailsite.model import IPNetwork
from mailsite.render import render, source, target


@dataclass(frozen=True)
class File:
    """A file on a host. ``template`` is where it comes from in the checkout, for errors."""

    content: str
    owner: str = "root"
    group: str = "root"
    mode: int = 0o644
    template: str = ""


@dataclass(frozen=True)
class SecretFile:
    """A file made of secrets, which reach it apart from the public files.

    ``secrets`` are names as in :mod:`mailsite.secrets`. Without ``template`` the content is the
    one secret itself; with it the template is rendered with ``secrets``, a mapping of name to
    value, and ``context``.
    """

    secrets: tuple[str, ...]
    owner: str = "root"
    group: str = "root"
    mode: int = 0o600
    template: str = ""
    context: Mapping[str, object] = field(default_factory=dict)

    def build(self, values: Mapping[str, str]) -> File:
        """The file with its content.

        Raises:
            KeyError: a secret is missing in ``values``.
        """
        known = {name: values[name] for name in self.secrets}
        if self.template:
            content = render(self.template, secrets=known, **self.context)
        else:
            (content,) = known.values()
        return File(
            content=content,
            owner=self.owner,
            group=self.group,
            mode=self.mode,
            template=source(self.template) if self.template else "",
        )


@dataclass(frozen=True)
class MapBuild:
    """A command that builds ``output`` from ``source``, both paths on the host."""

    command: tuple[str, ...]
    source: str
    output: str


@dataclass(frozen=True)
class Check:
    """A daemon's own checker; runs when a changed file lies under one of ``paths``.

    ``stderr_is_failure``: the checker exits 0 for what it only warns of, so any line on standard
    error counts as a refusal.
    """

    name: str
    command: tuple[str, ...]
    paths: tuple[str, ...]
    stderr_is_failure: bool = False


@dataclass(frozen=True)
class Service:
    """A unit that must run, and the path prefixes whose change reloads or restarts it.

    Restart wins over reload. Units are handled in rising ``order``. A ``foreign`` unit is the
    operator's: when it leaves the bundle it is reloaded, never stopped or disabled.
    """

    unit: str
    reload_on: tuple[str, ...] = ()
    restart_on: tuple[str, ...] = ()
    order: int = 50
    foreign: bool = False


@dataclass(frozen=True)
class TcpHealth:
    """A port answers, with a banner that begins with ``expect``. ``timeout`` in seconds."""

    address: str
    port: int
    expect: str = ""
    timeout: int = 10


@dataclass(frozen=True)
class UnitHealth:
    """A unit is active."""

    unit: str


@dataclass(frozen=True)
class CommandHealth:
    """A command exits with 0. ``timeout`` in seconds.

    With 69 (EX_UNAVAILABLE, sysexits.h) it says that waiting does not help.
    """

    command: tuple[str, ...]
    timeout: int = 10


Health: TypeAlias = TcpHealth | UnitHealth | CommandHealth


@dataclass(frozen=True)
class PortRule:
    """A port that the host serves. ``sources``: who may reach it; None: everyone."""

    port: int
    sources: tuple[IPNetwork, ...] | None
    why: str
    protocol: Literal["tcp", "udp"] = "tcp"


@dataclass(frozen=True)
class Fragment:
    """What one role contributes to a host: its own files, and its part of shared ones.

    ``produced`` are files that its services write: nobody compares them, and they go when the
    role goes.
    """

    role: str
    files: Mapping[str, File] = field(default_factory=dict)
    secret_files: Mapping[str, SecretFile] = field(default_factory=dict)
    ports: tuple[PortRule, ...] = ()
    packages: tuple[str, ...] = ()
    maps: tuple[MapBuild, ...] = ()
    checks: tuple[Check, ...] = ()
    services: tuple[Service, ...] = ()
    health: tuple[Health, ...] = ()
    guarded: tuple[str, ...] = ()
    produced: tuple[str, ...] = ()


def templated(template: str, *, mode: int = 0o644, **context: object) -> tuple[str, File]:
    """The path on the host and the rendered file of ``template``, owned by root."""
    return target(template), File(
        content=render(template, **context), mode=mode, template=source(template)
    )
