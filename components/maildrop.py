"""The mailboxes: two replicas of each, which serve clients and take what smtp-in brings."""

from __future__ import annotations

import pulumi

from components.host import CLUSTERS, ClusterArgs, last, rolling
from mailsite.model import Role


class MaildropPair(pulumi.ComponentResource):
    """Two replicas, changed one after the other. ``done``: both serve."""

    def __init__(
        self, name: str, args: ClusterArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__(CLUSTERS[Role.MAILDROP], name, {}, opts)
        replicas = rolling(self, args.fleet.members(Role.MAILDROP), args)
        self.done = last(replicas)
        self.register_outputs({})
