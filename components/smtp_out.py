"""The outbound tier: submission on 587, DKIM signing, delivery to the world."""

from __future__ import annotations

import pulumi

from components.host import CLUSTERS, ClusterArgs, last, rolling
from mailsite.model import Role


class SmtpOutCluster(pulumi.ComponentResource):
    """Interchangeable members, changed one at a time. ``done``: all of them serve."""

    def __init__(
        self, name: str, args: ClusterArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__(CLUSTERS[Role.SMTP_OUT], name, {}, opts)
        members = rolling(self, args.fleet.members(Role.SMTP_OUT), args)
        self.done = last(members)
        self.register_outputs({})
