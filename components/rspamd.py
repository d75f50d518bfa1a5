"""The spam filter: what Postfix asks about each mail that comes in or leaves."""

from __future__ import annotations

import pulumi

from components.host import CLUSTERS, ClusterArgs, last, rolling
from mailsite.model import Role


class RspamdCluster(pulumi.ComponentResource):
    """Members that share their memory, changed one at a time. ``done``: all of them serve."""

    def __init__(
        self, name: str, args: ClusterArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__(CLUSTERS[Role.RSPAMD], name, {}, opts)
        members = rolling(self, args.fleet.members(Role.RSPAMD), args)
        self.done = last(members)
        self.register_outputs({})
