"""certificates: one certificate for the platform, issued by ACME, held by two hosts.

Roles ask for certificates as secret files, :func:`mailsite.roles.postfix.certificate_file`. Where
the platform gets its own, :func:`pulled` takes these files out of a host's fragments and lets the
host pull the platform's certificate to the same places; the program that does so, and that has it
issued on the holders, is ``agent/mail_certificates.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mailsite.fragment import (
    Check,
    CommandHealth,
    File,
    Fragment,
    PortRule,
    SecretFile,
    Service,
    UnitHealth,
    templated,
)
from mailsite.loader import Problem, SiteError
from mailsite.model import AcmeAccess, Host, IPNetwork, Platform, Role
from mailsite.roles.base import internal_networks_of
from mailsite.secret_names import acme_secret, holder_key, public, pull_key

ROLE = Role.CERTIFICATES.value
PROGRAM = "/usr/local/sbin/mail-certificates"
SOURCE = "agent/mail_certificates.py"
#: The files of the daemons lie below this folder.
ETC = "/etc/mail-certificates"
CONFIG = f"{ETC}/config.json"
LIBRARY = "/usr/local/lib/mail-platform"
STAND_IN = f"{LIBRARY}/stand-in-certificates"
SERVE = f"{LIBRARY}/serve-certificate"
UNITS = "/etc/systemd/system"
STATE = "/var/lib/mail-certificates"
COPY = f"{STATE}/certificate.pem"
#: The login that hands the copy out, and knows nothing else.
LOGIN = "mail-certs"

_CERTIFICATE = "certificate/"
_START, _PULL, _ISSUE = "mail-certificates", "mail-certificates-pull", "mail-certificates-issue"
_SSHD, _USER, _ACME = "mail-certificates-sshd", "mail-certificates-user", "mail-acme"


@dataclass(frozen=True)
class Target:
    """A file that a daemon loads. ``parts``: ``key``, ``chain``, or both in that order."""

    path: str
    name: str
    owner: str
    group: str
    mode: int
    parts: tuple[str, ...]


def targets(fragments: Iterable[Fragment]) -> tuple[Target, ...]:
    """The certificates that ``fragments`` ask for, in order of paths."""
    found = [
        _target(path, file)
        for fragment in fragments
        for path, file in fragment.secret_files.items()
        if _is_certificate(file)
    ]
    return tuple(sorted(found, key=lambda target: target.path))


def asked_names(platform: Platform, fragments: Iterable[Fragment]) -> tuple[str, ...]:
    """The names that clients and hops verify on a host with ``fragments``, sorted."""
    found = (platform.certificate_names(target.name) for target in targets(fragments))
    return tuple(sorted({name for names in found for name in names}))


def issued_names(platform: Platform, asked: Iterable[str]) -> tuple[str, ...]:
    """What the one certificate is for, so that it serves all names that are ``asked``.

    A wildcard stands for exactly one label (RFC 9525, section 6.3): names directly below the
    platform's domain and internal domain are covered by one, deeper ones stand for themselves.
    """
    return tuple(sorted({_issued(platform, name) for name in asked}))


def challenge_names(platform: Platform, asked: Iterable[str]) -> tuple[str, ...]:
    """Where the authority looks for the answer to its challenge (RFC 8555, section 8.4)."""
    issued = issued_names(platform, asked)
    return tuple(sorted({f"_acme-challenge.{name.removeprefix('*.')}" for name in issued}))


def pulled(
    platform: Platform,
    host: Host,
    fragments: Sequence[Fragment],
    asked: Mapping[str, Sequence[str]],
) -> tuple[Fragment, ...]:
    """``fragments`` of ``host``, whose certificates are pulled instead of given.

    ``asked``: the names that each host of the platform has to prove to be.
    """
    wanted = targets(fragments)
    holds = Role.CERTIFICATES in host.roles
    if not wanted and not holds:
        return tuple(fragments)
    if wanted and holds:
        raise SiteError(
            [
                Problem(
                    file="topology.yaml",
                    line=0,
                    value=host.name,
                    message=f"{host.name} holds the platform's certificate and shows one itself, so"
                    " its daemons could not start before the first one is issued",
                    remedy="give the role 'certificates' to hosts without a certificate of their"
                    " own, such as those of rspamd",
                )
            ]
        )
    rest = tuple(
        replace(
            fragment,
            secret_files={
                path: file
                for path, file in fragment.secret_files.items()
                if not _is_certificate(file)
            },
        )
        for fragment in fragments
    )
    services = [service for fragment in fragments for service in fragment.services]
    own = _pulling(platform, host, wanted, services, asked)
    return (own, *rest, *((_holding(platform, host, asked),) if holds else ()))


def holders(platform: Platform) -> tuple[Host, ...]:
    """The hosts that hold the certificate; the first renews it."""
    return platform.serving(Role.CERTIFICATES)


# -- every host that has the certificate -------------------------------------------------------


def _pulling(
    platform: Platform,
    host: Host,
    wanted: Sequence[Target],
    services: Sequence[Service],
    asked: Mapping[str, Sequence[str]],
) -> Fragment:
    holds = Role.CERTIFICATES in host.roles
    config = File(content=_config(platform, host, wanted, services, asked))
    others = [holder for holder in holders(platform) if holder.name != host.name]
    daemons = sorted({service.unit for service in services}) if wanted else []
    files = dict(
        (
            program(),
            (CONFIG, config),
            templated(f"certificates{UNITS}/{_START}.service.j2", daemons=daemons, holds=holds),
            templated(f"certificates{UNITS}/{_PULL}.service.j2"),
            templated(f"certificates{UNITS}/{_PULL}.timer.j2"),
            templated(f"certificates{STAND_IN}.j2", mode=0o755),
        )
    )
    authorities = platform.world.ca_certificates
    if authorities:
        text = "".join(f"{pem.strip()}\n" for pem in authorities)
        files[f"{ETC}/authorities.pem"] = File(content=text)
    paths = tuple(target.path for target in wanted)
    return Fragment(
        role="certificate",
        files=files,
        secret_files={
            f"{ETC}/pull-key": SecretFile(secrets=(pull_key(host.name),)),
            f"{ETC}/known_hosts": SecretFile(
                secrets=tuple(public(holder_key(other.name)) for other in others),
                template="certificates/etc/mail-certificates/known_hosts.j2",
                context={"holders": {o.name: public(holder_key(o.name)) for o in others}},
            ),
        },
        packages=("ca-certificates", "openssh-client", "openssl"),
        # Where checkers look the first certificate is not there yet.
        checks=(Check("certificates", (STAND_IN, *paths), ("/",)),) if paths else (),
        services=(
            Service(
                f"{_START}.service",
                restart_on=(PROGRAM, ETC, f"{UNITS}/{_START}.service"),
                order=26,
            ),
            Service(f"{_PULL}.timer", restart_on=(f"{UNITS}/{_PULL}.timer",), order=27),
        ),
        health=(UnitHealth(f"{_START}.service"),),
        produced=(COPY, *paths),
    )


def _config(
    platform: Platform,
    host: Host,
    wanted: Sequence[Target],
    services: Sequence[Service],
    asked: Mapping[str, Sequence[str]],
) -> str:
    settings = platform.certificates
    if settings is None:
        raise ValueError("certificates are given")
    known = holders(platform)
    holds = Role.CERTIFICATES in host.roles
    everybody = {name for names in asked.values() for name in names}
    document = {
        "names": issued_names(platform, everybody) if holds else asked.get(host.name, ()),
        "port": settings.port,
        "login": LOGIN,
        "holders": [
            {"name": holder.name, "address": str(platform.internal_leg(holder).ipv4)}
            for holder in known
            if holder.name != host.name
        ],
        "targets": [
            {
                "path": target.path,
                "owner": target.owner,
                "group": target.group,
                "mode": f"{target.mode:04o}",
                "parts": target.parts,
            }
            for target in wanted
        ],
        "units": [*_units(wanted, services)],
        "issuing": {
            "first": host.name == known[0].name,
            "renew": settings.renew_days,
            "takeover": settings.takeover_days,
            "group": LOGIN,
        }
        if holds
        else None,
    }
    return json.dumps(document, indent=1) + "\n"


def _units(wanted: Sequence[Target], services: Sequence[Service]) -> Iterator[dict[str, object]]:
    """What has to be done to services when a file changes, as the agent would do it."""
    for service in sorted(services, key=lambda service: (service.order, service.unit)):
        restart = [t.path for t in wanted if _under(t.path, service.restart_on)]
        reload = [t.path for t in wanted if _under(t.path, service.reload_on)]
        if restart:
            yield {"name": service.unit, "verb": "restart", "paths": restart}
        elif reload:
            yield {"name": service.unit, "verb": "reload", "paths": reload}


def _under(path: str, prefixes: Iterable[str]) -> bool:
    return any(path == p or path.startswith(p if p.endswith("/") else f"{p}/") for p in prefixes)


def program() -> tuple[str, File]:
    """The program that pulls and issues, as it stands in the checkout."""
    source = Path(__file__).resolve().parents[2] / SOURCE
    return PROGRAM, File(content=source.read_text("utf-8"), mode=0o755, template=SOURCE)


# -- the two that hold it ----------------------------------------------------------------------


def _holding(platform: Platform, host: Host, asked: Mapping[str, Sequence[str]]) -> Fragment:
    settings = platform.certificates
    if settings is None:
        raise ValueError("certificates are given")
    access = platform.acme
    everybody = {name for names in asked.values() for name in names}
    clients = [*_clients(platform, host, asked)]
    sshd_config, sshd_files = f"{ETC}/sshd_config", _sshd_files(platform, host, clients)
    files = dict(
        (
            templated("certificates/etc/mail-certificates/sshd_config.j2", port=settings.port,
                      login=LOGIN),
            templated("certificates/etc/sysusers.d/mail-certificates.conf.j2", login=LOGIN,
                      state=STATE),
            templated(f"certificates{SERVE}.j2", mode=0o755, copy=COPY, state=STATE),
            templated(f"certificates{UNITS}/{_USER}.service.j2"),
            templated(f"certificates{UNITS}/{_SSHD}.service.j2", login=LOGIN, etc=ETC),
            templated(f"certificates{UNITS}/{_ISSUE}.service.j2"),
            templated(f"certificates{UNITS}/{_ISSUE}.timer.j2"),
            templated(
                f"certificates{UNITS}/{_ACME}.service.j2",
                access=access,
                email=settings.acme.email,
                names=issued_names(platform, everybody),
                secrets={variable: _secret_path(variable) for variable in access.secrets},
                delegated=settings.acme.challenge_zone is not None,
            ),
        )
    )  # fmt: skip
    return Fragment(
        role=ROLE,
        files=files,
        secret_files=sshd_files | dict(_acme_files(access)),
        ports=(
            PortRule(
                settings.port,
                _sources(platform, clients),
                "the platform's certificate: the hosts that show it",
            ),
        ),
        packages=("lego", "openssh-server"),
        checks=(
            Check(
                "certificates-sshd",
                ("sshd", "-t", "-f", sshd_config, "-h", f"{ETC}/holder-key"),
                (ETC,),
                stderr_is_failure=True,
            ),
        ),
        services=(
            Service(
                f"{_SSHD}.service",
                restart_on=(sshd_config, *sshd_files, f"{UNITS}/{_SSHD}.service"),
                order=25,
            ),
            Service(f"{_ISSUE}.timer", restart_on=(f"{UNITS}/{_ISSUE}.timer",), order=28),
        ),
        health=(
            UnitHealth(f"{_SSHD}.service"),
            # An authority may take minutes to see the challenge in the DNS.
            CommandHealth((PROGRAM, "ready"), timeout=900),
        ),
    )


def _clients(platform: Platform, host: Host, asked: Mapping[str, Sequence[str]]) -> Iterator[Host]:
    """Who may ask ``host`` for the certificate: everyone who shows it, and the other holder."""
    known = {holder.name for holder in holders(platform)}
    for other in platform.hosts.values():
        if other.name != host.name and (other.name in known or asked.get(other.name)):
            yield other


def _sources(platform: Platform, clients: Iterable[Host]) -> tuple[IPNetwork, ...]:
    return internal_networks_of(platform, clients)


def _sshd_files(platform: Platform, host: Host, clients: Sequence[Host]) -> dict[str, SecretFile]:
    keys = {client.name: public(pull_key(client.name)) for client in clients}
    return {
        f"{ETC}/holder-key": SecretFile(secrets=(holder_key(host.name),)),
        f"{ETC}/authorized_keys": SecretFile(
            secrets=tuple(keys.values()),
            template="certificates/etc/mail-certificates/authorized_keys.j2",
            context={
                "command": SERVE,
                "clients": [
                    (name, keys[name], internal_networks_of(platform, [platform.hosts[name]]))
                    for name in keys
                ],
            },
        ),
    }


def _acme_files(access: AcmeAccess) -> Iterator[tuple[str, SecretFile]]:
    for variable in access.secrets:
        yield _secret_path(variable), SecretFile(secrets=(acme_secret(variable),))


def _secret_path(variable: str) -> str:
    return f"{ETC}/acme-{variable}"


# -- parts -------------------------------------------------------------------------------------


def _issued(platform: Platform, name: str) -> str:
    parent = name.partition(".")[2]
    return f"*.{parent}" if parent in (platform.domain, platform.internal_domain) else name


def _is_certificate(file: SecretFile) -> bool:
    return all(name.startswith(_CERTIFICATE) for name in file.secrets)


def _target(path: str, file: SecretFile) -> Target:
    names = {secret.split("/")[1] for secret in file.secrets}
    if len(names) != 1:
        raise ValueError(f"{path} is made of {len(names)} certificates; give each its own file")
    return Target(
        path=path,
        name=names.pop(),
        owner=file.owner,
        group=file.group,
        mode=file.mode,
        parts=tuple(secret.split("/")[2] for secret in file.secrets),
    )
