"""One bundle per host: every file and everything else that its roles want of it.

Pure functions of the site data: no property of a file is ever unknown in a preview. Secrets go
another way, see :func:`compose_secrets`; the bundle names only the paths that they will have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mailsite.fragment import (
    Check,
    CommandHealth,
    File,
    Fragment,
    Health,
    MapBuild,
    SecretFile,
    Service,
    TcpHealth,
    UnitHealth,
)
from mailsite.loader import Problem, SiteError
from mailsite.model import Host, Mta, Platform, Role
from mailsite.roles import (
    base,
    certificates,
    frontend,
    maildrop,
    null_client,
    rspamd,
    smtp_in,
    smtp_out,
    upgrades,
    webmail,
)

FORMAT = 1
UNITS = "/etc/systemd/system/"

__all__ = [
    "Bundle",
    "Check",
    "CommandHealth",
    "File",
    "Fragment",
    "Health",
    "MapBuild",
    "SecretFile",
    "Service",
    "TcpHealth",
    "UnitHealth",
    "compose",
    "compose_secrets",
    "fragments",
    "merge",
    "secrets_json",
]

#: The roles that put something on a host, beside its base.
ROLES: Mapping[Role, Callable[[Platform, Host], Fragment]] = {
    Role.SMTP_OUT: smtp_out.fragment,
    Role.SMTP_IN: smtp_in.fragment,
    Role.RSPAMD: rspamd.fragment,
    Role.MAILDROP: maildrop.fragment,
    Role.WEBMAIL: webmail.fragment,
    Role.FRONTEND: frontend.fragment,
}


@dataclass(frozen=True)
class Bundle:
    """Everything public that a host gets; ``secret_files`` come apart, see with_secrets().

    ``keep_packages``: nothing that is on the machine may make room for ``packages``.
    """

    host: str
    files: Mapping[str, File]
    secret_files: Mapping[str, SecretFile]
    packages: tuple[str, ...]
    maps: tuple[MapBuild, ...]
    checks: tuple[Check, ...]
    services: tuple[Service, ...]
    health: tuple[Health, ...]
    guarded: tuple[str, ...]
    keep_packages: bool = False
    produced: tuple[str, ...] = ()

    @property
    def secrets(self) -> tuple[str, ...]:
        """The names of all secrets that the secret files need, sorted, each once."""
        return tuple(sorted({n for file in self.secret_files.values() for n in file.secrets}))

    def with_secrets(self, values: Mapping[str, str]) -> dict[str, File]:
        """The secret files, path -> file, from ``values``: secret name -> value.

        Raises:
            KeyError: ``values`` lacks a name of :attr:`secrets`.
        """
        return {path: file.build(values) for path, file in sorted(self.secret_files.items())}

    def public_json(self) -> str:
        """The document that the push hands to the agent: the same text for the same site data.

        The files come as ``path: content``, so that a preview shows their changed lines.
        """
        return _document(
            {
                "format": FORMAT,
                "host": self.host,
                "files": {path: file.content for path, file in self.files.items()},
                "attributes": _attributes(self.files),
                "packages": self.packages,
                "maps": [
                    {"command": m.command, "source": m.source, "output": m.output}
                    for m in self.maps
                ],
                "checks": [
                    {
                        "name": c.name,
                        "command": c.command,
                        "paths": c.paths,
                        "stderr_is_failure": c.stderr_is_failure,
                    }
                    for c in self.checks
                ],
                "services": [
                    {
                        "unit": s.unit,
                        "reload_on": s.reload_on,
                        "restart_on": s.restart_on,
                        "order": s.order,
                        "foreign": s.foreign,
                    }
                    for s in self.services
                ],
                "health": [_health(h) for h in self.health],
                "guarded": self.guarded,
                "keep_packages": self.keep_packages,
                "produced": self.produced,
                "secret_paths": sorted(self.secret_files),
            }
        )


def compose(platform: Platform, host: Host) -> Bundle:
    """The bundle of ``host``, from all its roles.

    Raises:
        SiteError: two roles claim one path, or a role cannot work with this site data.
    """
    keep = not host.is_managed and host.mta is not Mta.REPLACE
    return replace(merge(host.name, fragments(platform, host)), keep_packages=keep)


def compose_secrets(platform: Platform, host: Host, values: Mapping[str, str]) -> dict[str, File]:
    """The secret files of ``host``, path -> file, from ``values``: secret name -> value.

    Raises:
        KeyError: ``values`` lacks a name of :func:`mailsite.secrets.required`.
    """
    return compose(platform, host).with_secrets(values)


def secrets_json(host: str, digest: str, files: Mapping[str, File]) -> str:
    """The document that stages secrets on a host. ``digest``: 64 lower-case hex digits."""
    return _document(
        {
            "format": FORMAT,
            "host": host,
            "digest": digest,
            "files": {path: file.content for path, file in files.items()},
            "attributes": _attributes(files),
        }
    )


def fragments(platform: Platform, host: Host) -> tuple[Fragment, ...]:
    """What each role of ``host`` contributes, the base first; of a retired one, the base alone."""
    own = _of_roles(platform, host)
    if host.has_null_client and not host.retired:
        own = (*own, null_client.fragment(platform, host))
    if host.is_managed:
        own = (*own, upgrades.fragment(platform, host))
    if platform.certificates is not None and not host.retired:
        own = certificates.pulled(platform, host, own, asked_names(platform))
    ports = tuple(port for fragment in own for port in fragment.ports)
    return (base.fragment(platform, host, ports), *own)


def _of_roles(platform: Platform, host: Host) -> tuple[Fragment, ...]:
    roles = () if host.retired else host.roles
    return tuple(ROLES[role](platform, host) for role in roles if role in ROLES)


#: The platform that was asked about last, and the answer: it takes rendering every host.
_asked: list[tuple[Platform, Mapping[str, tuple[str, ...]]]] = []


def asked_names(platform: Platform) -> Mapping[str, tuple[str, ...]]:
    """The names that each host must prove to be, by host; only hosts that have some.

    Raises:
        SiteError: a role cannot work with this site data.
    """
    for known, names in _asked:
        if known is platform:
            return names
    found = {
        host.name: asked
        for host in platform.hosts.values()
        if (asked := certificates.asked_names(platform, _of_roles(platform, host)))
    }
    _asked[:] = [(platform, found)]
    return found


def merge(host: str, parts: Iterable[Fragment]) -> Bundle:
    """Put the fragments of one host together.

    Raises:
        SiteError: two fragments claim one path or one port.
    """
    parts = tuple(parts)
    owners: dict[str, str] = {}
    problems = []
    for part in parts:
        ports = (f"port {port.port}/{port.protocol}" for port in part.ports)
        for claim in (*part.files, *part.secret_files, *part.produced, *ports):
            other = owners.setdefault(claim, part.role)
            if other != part.role:
                problems.append(
                    Problem(
                        file="topology.yaml",
                        line=0,
                        value=host,
                        message=f"{host}: the roles {other} and {part.role} both claim {claim}",
                        remedy="give the two roles to different hosts",
                    )
                )
    if problems:
        raise SiteError(problems)
    files = {path: file for part in parts for path, file in part.files.items()}
    secret_files = {path: file for part in parts for path, file in part.secret_files.items()}
    services = _merge_services(service for part in parts for service in part.services)
    return Bundle(
        host=host,
        files={path: files[path] for path in sorted(files)},
        secret_files={path: secret_files[path] for path in sorted(secret_files)},
        packages=tuple(sorted({name for part in parts for name in part.packages})),
        maps=tuple(entry for part in parts for entry in part.maps),
        checks=(*_check_units(files, services), *(c for part in parts for c in part.checks)),
        services=services,
        health=tuple(dict.fromkeys(health for part in parts for health in part.health)),
        guarded=tuple(sorted({prefix for part in parts for prefix in part.guarded})),
        produced=tuple(sorted({path for part in parts for path in part.produced})),
    )


def _check_units(files: Iterable[str], services: Sequence[Service]) -> Iterator[Check]:
    """systemd's own check of the unit files and drop-ins; it only warns of what it ignores."""
    known = {service.unit for service in services}
    units = set()
    for path in files:
        if not path.startswith(UNITS):
            continue
        unit, slash, _ = path.removeprefix(UNITS).partition("/")
        if not slash:
            units.add(unit)
        # A drop-in may be for a unit that not every image has.
        elif unit.removesuffix(".d") in known:
            units.add(unit.removesuffix(".d"))
    if units:
        command = ("systemd-analyze", "verify", "--man=no", "--recursive-errors=no")
        yield Check("systemd", (*command, *sorted(units)), (UNITS,), stderr_is_failure=True)


def _merge_services(services: Iterable[Service]) -> tuple[Service, ...]:
    """One entry per unit: several roles may have files that it reads."""
    found: dict[str, Service] = {}
    for service in services:
        known = found.get(service.unit)
        if known is not None:
            service = replace(
                known,
                reload_on=_union(known.reload_on, service.reload_on),
                restart_on=_union(known.restart_on, service.restart_on),
                order=min(known.order, service.order),
                foreign=known.foreign and service.foreign,
            )
        found[service.unit] = service
    return tuple(sorted(found.values(), key=lambda service: (service.order, service.unit)))


def _union(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))


def _attributes(files: Mapping[str, File]) -> dict[str, dict[str, str]]:
    return {
        path: {
            "owner": file.owner,
            "group": file.group,
            "mode": f"{file.mode:04o}",
            "template": file.template,
        }
        for path, file in files.items()
    }


def _health(health: Health) -> dict[str, object]:
    match health:
        case TcpHealth(address, port, expect, timeout):
            return {
                "kind": "tcp",
                "address": address,
                "port": port,
                "expect": expect,
                "timeout": timeout,
            }
        case UnitHealth(unit):
            return {"kind": "unit", "unit": unit}
        case CommandHealth(command, timeout):
            return {"kind": "command", "command": command, "timeout": timeout}


def _document(content: Mapping[str, object]) -> str:
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
