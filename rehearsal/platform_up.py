"""Bring a rehearsal up, step by step; every step finds what an earlier run left and goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mailsite.loader import load_platform
from mailsite.model import CLIENT_ROLES, Host, Platform
from mailsite.secret_names import acme_secret
from rehearsal import cleanup, engine, existing, image, network, program, secrets, tools
from rehearsal.ca import Authority
from rehearsal.progress import Progress, RehearsalError, wait_for
from rehearsal.state import CHECKOUT, ProcessId, State
from rehearsal.world.world import World
from verify.passwords import rehearsal_passwords

_STANDINS = "stand-ins"
_STANDINS_SECONDS = 60.0
_RUN_FILE = "run.json"
_LATE_BOOTS = 2
_FIRST_HOST_SECONDS = 60.0


@dataclass(frozen=True)
class Site:
    """The stack that is rehearsed: its name, its plain configuration and its site data."""

    stack: str
    config: dict[str, Any]
    folder: Path

    @classmethod
    def of(cls, stack: str) -> Site:
        """Read the stack's configuration; raises :class:`RehearsalError` where it names no site."""
        config = program.stack_config(stack)
        site = config.get("mail:site")
        if not site:
            raise RehearsalError(
                f"Pulumi.{stack}.yaml: mail:site is not set",
                f"run: pulumi config set --stack {stack} mail:site sites/<name>",
            )
        return cls(stack, config, CHECKOUT / str(site))

    def platform(self, overlay: Path | None = None) -> Platform:
        """The site data; raises :class:`mailsite.loader.SiteError`."""
        return load_platform(self.folder, overlay)


def built(platform: Platform) -> tuple[Host, ...]:
    """The hosts that the program builds; those of later tiers wait for their components."""
    from components.host import tier  # needs a second to import, which other commands spare

    return tuple(host for host in platform.hosts.values() if tier(host) is not None)


def remember(state: State, site: Site) -> None:
    """Write down which stack is rehearsed; another one must be taken down first."""
    known = state.read_json(_RUN_FILE).get("stack")
    if known is not None and known != site.stack:
        raise RehearsalError(
            f"a rehearsal of stack {known} is up, not of {site.stack}",
            "run: make down, and then this again",
        )
    state.write(_RUN_FILE, json.dumps({"stack": site.stack}))


def current(state: State) -> Site:
    """The stack that is rehearsed; raises :class:`RehearsalError` when none is."""
    known = state.read_json(_RUN_FILE).get("stack")
    if known is None or network.CORE not in network.namespaces():
        raise RehearsalError("no rehearsal is up", "run: make rehearsal")
    return Site.of(str(known))


def stack(state: State, progress: Progress) -> program.Program:
    """The program of the rehearsal that is up, ready for another ``up``."""
    return program.Program(state, current(state).stack, engine.ensure(progress))


def up(site: Site, state: State, progress: Progress) -> dict[str, int]:
    """Bring everything up; returns the number of resources per kind of change.

    Site data is checked before anything else happens.
    """
    platform = site.platform()
    hosts = built(platform)
    tools.ensure(progress)
    found = engine.ensure(progress)
    layers = image.ensure(progress)
    if program.is_unrecorded(state, site.stack):
        progress.say("the run that created this platform was killed; it is built anew")
        cleanup.down(state, progress)
    cleanup.claim(state)
    remember(state, site)
    program.end_leftovers(state)

    sealed = network.Network(platform, state)
    with progress.step("sealed network"):
        sealed.up()
    world = World(state, platform, sealed, layers, site.config.get("mail:zoneIds", {}))
    operators = [
        existing.ExistingMachine(platform, host, sealed, layers.opensmtpd, state)
        for host in hosts
        if host.vm is None
    ]
    steps: list[Step] = [("the outside world", world.up)]
    early = [e for e in operators if not _is_client(e.host)]
    late = [e for e in operators if _is_client(e.host)]
    steps += [*_boots(early), ("stand-in providers", lambda: start_standins(site, state))]
    _at_once(steps, progress)
    trusted = [] if platform.certificates is None else [world.acme_root]
    _write_overlay(state, platform, world, operators, trusted)
    for machine in early:
        machine.trust(trusted)

    rehearsed = program.Program(state, site.stack, found)
    values = program.settings(
        site.stack,
        overlay=state.world_overlay,
        deploy_key=secrets.operator_key(state),
        certificates=secrets.certificates(state, platform, hosts),
        given={**rehearsal_passwords(state.root, platform), **_acme_secrets(platform, world)},
        # A stack without any is that of an operator who loads the zones' text elsewhere.
        zone_ids={zone.rstrip("."): world.zone_id(zone) for zone in world.zone_names},
    )
    failed = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool:
        booting = pool.submit(_boot_late, rehearsed, failed, _boots(late, trusted), progress)
        try:
            with progress.step(f"pulumi up --stack {site.stack}"):
                changes = rehearsed.up(progress, values=values)
        except BaseException:
            failed.set()
            raise
    booting.result()
    return changes


def _boot_late(
    rehearsed: program.Program, failed: threading.Event, steps: Sequence[Step], progress: Progress
) -> None:
    """Boot servers that only send mail, which nobody needs before there is somebody to take it.

    On a new platform everybody waits for the first host, which waits for its certificate: they boot
    meanwhile, and not while others have much to do. Where the run has failed by then, they do not.
    """
    if rehearsed.is_new():
        with contextlib.suppress(RehearsalError):
            wait_for(
                lambda: failed.is_set() or rehearsed.has_reached_a_host(),
                timeout=_FIRST_HOST_SECONDS,
                what="the first host",
            )
    if failed.is_set():
        return
    _at_once(steps, progress, workers=_LATE_BOOTS)


Step = tuple[str, Callable[[], None]]


def _is_client(host: Host) -> bool:
    return set(host.roles) <= set(CLIENT_ROLES)


def _boots(machines: Sequence[existing.ExistingMachine], trusted: Sequence[str] = ()) -> list[Step]:
    return [(f"existing machine {each.host.name}", partial(each.up, trusted)) for each in machines]


def _run(what: str, act: Callable[[], None], progress: Progress) -> None:
    with progress.step(what):
        act()


def _at_once(steps: Sequence[Step], progress: Progress, workers: int | None = None) -> None:
    """Run steps side by side; the first error counts, after all have ended."""
    with ThreadPoolExecutor(max_workers=workers or len(steps)) as pool:
        futures = [pool.submit(_run, *step, progress) for step in steps]
    for future in futures:
        future.result()


def _acme_secrets(platform: Platform, world: World) -> dict[str, str]:
    """What the ACME client changes the world's DNS with, by names of secrets."""
    if platform.certificates is None:
        return {}
    return {acme_secret(variable): value for variable, value in world.acme_secrets.items()}


def _write_overlay(
    state: State,
    platform: Platform,
    world: World,
    operators: Sequence[existing.ExistingMachine],
    acme_roots: Sequence[str],
) -> None:
    """What the world is like: the only thing that a rehearsal changes in the site data."""
    overlay: dict[str, Any] = {
        "trust_anchors": list(world.trust_anchors),
        "ca_certificates": [Authority(state.ca).root_pem, *acme_roots],
        "resolvers": list(existing.resolvers()),
        "ssh_host_keys": {e.host.name: e.public_key for e in operators},
    }
    if platform.certificates is not None:
        overlay["acme"] = world.acme_access
    text = json.dumps(overlay, indent=1) + "\n"
    path = state.world_overlay
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        state.write(path.name, text)


def start_standins(site: Site, state: State) -> None:
    """Start the stand-in providers, unless they run with the same site data and code.

    They ask nothing of the outside world before the engine asks something of them.
    """
    mark = standins_mark(site)
    running = state.process(_STANDINS)
    if running is not None and state.standins.exists():
        if state.read_json("standins.mark.json").get("mark") == mark:
            return
        running.end()
    state.standins.unlink(missing_ok=True)
    with (state.root / "standins.log").open("ab") as log:
        # They outlive this command, and its terminal.
        child = subprocess.Popen(
            [
                *("nsenter", f"--net={network.NETNS / network.OPERATOR}", "--"),
                *(sys.executable, "-m", "rehearsal.standins"),
                *(f"--state={state.root}", f"--site={site.folder}", "--autostart"),
            ],
            cwd=CHECKOUT,
            env=tools.environment(PYTHONUNBUFFERED="1"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        identity = state.record(_STANDINS, child.pid)

        def serving() -> bool:
            if child.poll() is not None or not identity.alive():
                raise RehearsalError(
                    "the stand-in providers ended at once", f"look into {state.root}/standins.log"
                )
            return state.standins.exists()

        wait_for(serving, timeout=_STANDINS_SECONDS, what="the stand-in providers")
    state.write("standins.mark.json", json.dumps({"mark": mark}))


def standins_mark(site: Site) -> str:
    """Changes when the stand-ins would have to be started anew: their code, or the site data."""
    parts: list[str] = [str(site.folder)]
    folders = (CHECKOUT / "rehearsal", CHECKOUT / "mailsite", site.folder)
    paths = [p for f in folders for p in f.rglob("*") if p.suffix in (".py", ".yaml")]
    for path in sorted(paths):
        stat = path.stat()
        parts.append(f"{path} {stat.st_mtime_ns} {stat.st_size}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def standins_process(state: State) -> ProcessId | None:
    return state.process(_STANDINS)
