"""Start the stand-ins."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .base import Provider, Server
from .cloudflare import Cloudflare
from .command import Command, Shell
from .hypervisors import Hypervisors
from .libvirt import Libvirt
from .publisher import Publisher
from .random import Random
from .store import Store, write_private
from .tls import Tls

PORTS: Final = "standins.json"
"""In the state folder: ``{"libvirt": port, ...}``, while they run."""


@dataclass(frozen=True)
class Context:
    """What the stand-ins work on.

    ``state`` is the rehearsal's folder; they keep their memory in ``standins/`` below it.
    """

    state: Path
    hypervisors: Hypervisors
    publisher: Publisher
    shell: Shell


class Servers:
    """All stand-ins, serving."""

    def __init__(self, context: Context) -> None:
        self._file = context.state / PORTS
        books = context.state / "standins"
        self.libvirt = Libvirt(Store(books / "libvirt.json"), context.hypervisors)
        providers: list[Provider] = [
            self.libvirt,
            Cloudflare(Store(books / "cloudflare.json"), context.publisher),
            Command(context.shell),
            Random(),
            Tls(),
        ]
        self._servers = {provider.package: Server(provider) for provider in providers}
        write_private(self._file, json.dumps(self.ports))

    @property
    def ports(self) -> dict[str, int]:
        """Port on 127.0.0.1 of each package."""
        return {package: server.port for package, server in self._servers.items()}

    @property
    def debug_providers(self) -> str:
        """Value of the engine's environment variable PULUMI_DEBUG_PROVIDERS."""
        return debug_providers(self.ports)

    def stop(self) -> None:
        """Refuse new calls, give running ones a moment, and take the port file away."""
        self._file.unlink(missing_ok=True)
        for server in self._servers.values():
            server.stop()


def debug_providers(ports: dict[str, int]) -> str:
    """Value of PULUMI_DEBUG_PROVIDERS for the ports of :data:`PORTS`."""
    return ",".join(f"{package}:{port}" for package, port in sorted(ports.items()))


def start_all(context: Context) -> Servers:
    """Start every stand-in; they serve until :meth:`Servers.stop`."""
    return Servers(context)
