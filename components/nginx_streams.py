"""The public entrance: frontends that pass TCP streams on to the tiers behind them."""

from __future__ import annotations

import pulumi

from components.host import CLUSTERS, ClusterArgs, last, rolling
from mailsite.model import Role


class NginxStreams(pulumi.ComponentResource):
    """Frontends with equal streams, changed one at a time. ``done``: all of them serve."""

    def __init__(
        self, name: str, args: ClusterArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__(CLUSTERS[Role.FRONTEND], name, {}, opts)
        frontends = rolling(self, args.fleet.members(Role.FRONTEND), args)
        self.done = last(frontends)
        self.register_outputs({})
