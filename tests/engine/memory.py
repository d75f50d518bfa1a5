"""The world of the stand-ins in memory: hypervisors, hosts and zones that only take notes.

Everything that is done goes into one journal, in order. Parts can be made to fail.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from rehearsal.standins.base import Call, ProviderError
from rehearsal.standins.command import Outcome
from rehearsal.standins.hypervisors import Domain, Volume, by_uri
from rehearsal.standins.publisher import Data
from rehearsal.standins.values import Properties


@dataclass(frozen=True)
class Run:
    """A command that ran: the resource, the host it went to, what it was and what it was fed."""

    name: str
    host: str
    command: str
    stdin: str


@dataclass
class World:
    """Everything outside of the engine.

    ``failing``: names of commands whose host refuses, with what it says. ``broken``: domains
    that do not start. ``slow``: domains that start when their event is set; they are in
    ``starting`` until then.
    """

    uris: Mapping[str, str] = field(default_factory=dict)
    zone_names: Mapping[str, str] = field(default_factory=dict)
    journal: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    domains: dict[str, Domain] = field(default_factory=dict)
    served: dict[tuple[str, Data], int] = field(default_factory=dict)
    failing: dict[str, str] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    slow: dict[str, threading.Event] = field(default_factory=dict)
    starting: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def copy(self) -> World:
        """The same world with an empty journal and nothing that fails."""
        return World(
            self.uris, self.zone_names, domains=dict(self.domains), served=dict(self.served)
        )

    def note(self, line: str) -> None:
        with self.lock:
            self.journal.append(line)


class Hypervisors:
    """:class:`rehearsal.standins.hypervisors.Hypervisors` in memory."""

    def __init__(self, world: World) -> None:
        self._world = world

    def of(self, uri: str) -> str:
        return by_uri(uri, self._world.uris)

    def create_volume(self, hypervisor: str, volume: Volume) -> None:
        self._world.note(f"create {volume.name}")

    def delete_volume(self, hypervisor: str, volume: Volume, domain: str | None) -> None:
        self._world.note(f"delete {volume.name}")

    def start(self, hypervisor: str, domain: Domain) -> None:
        if domain.name in self._world.broken:
            raise ProviderError("error creating libvirt domain: internal error: it is broken")
        if domain.name in self._world.slow:
            self._world.starting.add(domain.name)
            assert self._world.slow[domain.name].wait(30)
        self._world.note(f"start {domain.name}")
        with self._world.lock:
            self._world.domains[domain.name] = domain

    def destroy(self, hypervisor: str, domain: str) -> None:
        self._world.note(f"destroy {domain}")
        with self._world.lock:
            self._world.domains.pop(domain, None)

    def running(self, hypervisor: str, domain: str) -> bool:
        with self._world.lock:
            return domain in self._world.domains


class Hosts:
    """:class:`rehearsal.standins.command.Shell` in memory: every host agrees to everything."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def run(
        self,
        connection: Properties,
        command: str,
        stdin: str,
        logged: frozenset[str],
        call: Call,
    ) -> Outcome:
        self._world.note(f"run {call.name}: {command}")
        with self._world.lock:
            self._world.runs.append(Run(call.name, connection["host"], command, stdin))
        if call.name in self._world.failing:
            said = self._world.failing[call.name]
            raise ProviderError(f'Process exited with status 1: running "{command}":\n{said}')
        if "stdout" in logged:
            call.info(f"applied on {connection['host']}")
        return Outcome(f"applied on {connection['host']}", "")


class Zones:
    """:class:`rehearsal.standins.publisher.Publisher` in memory."""

    def __init__(self, world: World) -> None:
        self._world = world

    def zones(self) -> Mapping[str, str]:
        return self._world.zone_names

    def records(self, zone: str, name: str) -> frozenset[Data]:
        with self._world.lock:
            return frozenset(data for owner, data in self._world.served if owner == name)

    def change(
        self, zone: str, remove: tuple[str, Data] | None, add: tuple[str, int, Data] | None
    ) -> None:
        with self._world.lock:
            if remove is not None:
                self._world.served.pop(remove, None)
                self._world.journal.append(f"withdraw {remove[0]} {remove[1].type}")
            if add is not None:
                name, ttl, data = add
                self._world.served[name, data] = ttl
                self._world.journal.append(f"publish {name} {data.type}")
