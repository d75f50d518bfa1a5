"""Serve the stand-ins of a rehearsal: ``python -m rehearsal.standins``.

Runs in the operator's network of the rehearsal and refuses to start anywhere else. Its ports
are in ``standins.json`` in the state folder while it runs; SIGTERM ends it.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from mailsite.bundle import compose
from mailsite.loader import load_platform
from rehearsal import image, network
from rehearsal.progress import Progress, RehearsalError
from rehearsal.state import State

from .command import Ssh
from .hypervisors import Machines
from .publisher import NameServer
from .server import Context, start_all

CHECKOUT = Path(__file__).resolve().parents[2]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rehearsal.standins", description=__doc__)
    parser.add_argument("--state", type=Path, default=CHECKOUT / ".rehearsal", help="state folder")
    parser.add_argument("--site", type=Path, default=CHECKOUT / "sites/prod", help="site data")
    parser.add_argument(
        "--autostart",
        action="store_true",
        help="first start the machines that exist and do not run, as libvirtd does",
    )
    return parser.parse_args()


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("asyncssh").setLevel(logging.WARNING)
    network.assert_sealed()
    # Blocked before any thread starts, so that none is interrupted and sigwait() gets them.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    state = State(arguments.state)
    with state.lock("standins"):
        platform = load_platform(arguments.site)
        found = image.ensure(Progress())

        def layers(name: str) -> Sequence[Path]:
            if (state.bare / name).exists():
                return found.base
            return found.of(compose(platform, platform.hosts[name]).packages)

        servers = start_all(
            Context(
                state=state.root,
                hypervisors=Machines(platform, network.Network(platform, state), state, layers),
                publisher=NameServer(state.world / "dns.json", network.assert_sealed),
                shell=Ssh(network.assert_sealed),
            )
        )
        try:
            if arguments.autostart:
                for name in servers.libvirt.autostart():
                    logging.info("started %s", name)
            logging.info("serving: PULUMI_DEBUG_PROVIDERS=%s", servers.debug_providers)
            signal.sigwait(signals)
        finally:
            servers.stop()


if __name__ == "__main__":
    try:
        main()
    except RehearsalError as error:
        sys.exit(f"rehearsal.standins: {error}")
