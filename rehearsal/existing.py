"""Existing machines: those of the topology without a ``vm``, as their operator left them.

They are no work of the platform's: they run before the engine does, have an address configuration
of their own, the frontends a website and a firewall table too, and were made ready for the platform
once, by ``agent/bootstrap.sh``. What is on them beside must be unchanged after every ``up``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mailsite.cloud_init import mac_address
from mailsite.model import Host, Platform, Role
from rehearsal import secrets
from rehearsal.ca import Authority
from rehearsal.machine import Machine
from rehearsal.network import Network
from rehearsal.state import CHECKOUT, State
from rehearsal.world import plan

WEBSITE = "This website has nothing to do with mail.\n"
"""What the operator's own website answers on port 80."""

FIREWALL_TABLE = ("inet", "operator")
"""Family and name of the operator's own firewall table."""

_NGINX = """\
server {
    listen 80 default_server;
    listen [::]:80 default_server;
    server_name _;
    root /var/www/operator;
}
"""

_NFTABLES = f"""\
#!/usr/sbin/nft -f
flush ruleset

table {FIREWALL_TABLE[0]} {FIREWALL_TABLE[1]} {{
    set blocked {{
        type inet_service
        elements = {{ 23, 2323 }}
    }}
    chain input {{
        type filter hook input priority filter; policy accept;
        tcp dport @blocked counter drop
    }}
}}
"""

_AUTHORITIES = "etc/ssl/certs/ca-certificates.crt"
_ENABLED = {"nginx.service": "multi-user.target", "nftables.service": "sysinit.target"}
_AGENT_FILES = ("bootstrap.sh", "mail_agent.py", "mail-agent-recover.service")
_TOOLBOX = "/root/agent"


def files(
    platform: Platform, host: Host, private_key: str, public_key: str, authority: str
) -> dict[str, str]:
    """What the operator has on ``host``: path without the leading slash -> content.

    Like everybody in the world outside, it trusts the ``authority`` there (PEM).
    """
    found = {
        "etc/hostname": host.short + "\n",
        "etc/hosts": (
            f"127.0.0.1 localhost\n127.0.1.1 {host.name} {host.short}\n"
            "::1 localhost ip6-localhost ip6-loopback\n"
        ),
        "etc/cloud/cloud-init.disabled": "",
        "etc/ssh/ssh_host_ed25519_key": private_key,
        "etc/ssh/ssh_host_ed25519_key.pub": f"{public_key}\n",
        _AUTHORITIES: authority,
        "etc/systemd/resolved.conf.d/operator.conf": "[Resolve]\nLLMNR=no\nMulticastDNS=no\n",
    }
    if Role.FRONTEND in host.roles:
        found |= {
            "etc/nftables.conf": _NFTABLES,
            "etc/nginx/sites-enabled/default": _NGINX,
            "var/www/operator/index.html": WEBSITE,
        }
    for number, interface in enumerate(host.interfaces):
        network = platform.network_of(interface)
        lines = [
            "[Match]",
            f"MACAddress={mac_address(host, interface)}",
            "[Network]",
            f"Address={interface.ipv4}/{network.ipv4.prefix.prefixlen}",
            f"Address={interface.ipv6}/{network.ipv6.prefix.prefixlen}",
            "IPv6AcceptRA=no",
        ]
        if number == 0:
            lines += [f"DNS={address}" for address in plan.RESOLVER]
        for route in platform.routes(host, interface):
            lines += ["[Route]", f"Destination={route.prefix}", f"Gateway={route.gateway}"]
        found[f"etc/systemd/network/10-leg{number}.network"] = "\n".join([*lines, ""])
    return found


class ExistingMachine:
    """One existing machine of the platform."""

    def __init__(
        self,
        platform: Platform,
        host: Host,
        network: Network,
        layers: tuple[Path, ...],
        state: State,
    ) -> None:
        self.host = host
        self._platform = platform
        self._state = state
        # Made when first asked for, so not in up(), which runs for several machines at once.
        self._authority = Authority(state.ca).root_pem
        kept = Machine.load(host.name, state)
        self.machine = Machine(
            name=host.name,
            # A machine keeps its Debian for life: what was installed on it lies on that layer.
            layers=kept.layers if kept is not None else layers,
            legs=tuple(
                (network.bridge_of(i.network), mac_address(host, i)) for i in host.interfaces
            ),
            state=state,
        )
        self._moved = kept is not None and kept.legs != self.machine.legs

    def up(self, trusted: Sequence[str] = ()) -> None:
        """Boot the machine if it does not run, and make it ready for the platform.

        Args:
            trusted: Roots that it trusts besides the rehearsal's own, PEM, as Debian trusts many.
        """
        if self._moved and self.machine.alive():
            self.machine.stop()
        if not self.machine.alive():
            self._install()
            self.machine.boot()
        self.machine.wait_booted()
        self.trust(trusted)
        self._bootstrap()

    def trust(self, more: Sequence[str]) -> None:
        """Let programs that start from now on trust the roots ``more`` besides the rehearsal's."""
        wanted = "".join((self._authority, *more))
        path = f"/{_AUTHORITIES}"
        if more and self.machine.run(["cat", path]).stdout != wanted:
            self.machine.run(["tee", path], input=wanted)

    def _install(self) -> None:
        root = self.machine.mount()
        fresh = not (root / "etc/cloud/cloud-init.disabled").exists()
        private, public = secrets.host_key(self._state, self.host.name)
        for name, content in files(
            self._platform, self.host, private, public, self._authority
        ).items():
            path = root / name
            if not fresh and not name.startswith("etc/systemd/network/"):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.touch(mode=0o600 if name.endswith("_key") else 0o644)
            path.write_text(content, encoding="utf-8")
        if fresh and Role.FRONTEND in self.host.roles:
            for unit, target in _ENABLED.items():
                wants = root / f"etc/systemd/system/{target}.wants"
                wants.mkdir(parents=True, exist_ok=True)
                (wants / unit).symlink_to(f"/usr/lib/systemd/system/{unit}")

    def _bootstrap(self) -> None:
        """Run the script that the operator runs once on each machine; repeating it is harmless."""
        _, public = secrets.operator_key(self._state)
        for name in _AGENT_FILES:
            content = (CHECKOUT / "agent" / name).read_text(encoding="utf-8")
            self.machine.run(["install", "-D", "/dev/stdin", f"{_TOOLBOX}/{name}"], input=content)
        script = f"{_TOOLBOX}/bootstrap.sh"
        self.machine.run(["sh", script, "--login", self.host.login, f"{public} operator"])
        self.machine.run(["rm", "-r", _TOOLBOX])

    @property
    def public_key(self) -> str:
        """The ssh key that the machine shows."""
        return secrets.host_key(self._state, self.host.name)[1]


def resolvers() -> tuple[str, ...]:
    """The world's resolvers, IPv4 first, for the overlay."""
    return tuple(str(address) for address in plan.RESOLVER)
