"""The inbound tier: the MX of the mail domains."""

from __future__ import annotations

import pulumi

from components.host import CLUSTERS, ClusterArgs, last, rolling
from mailsite.model import Role


class SmtpInCluster(pulumi.ComponentResource):
    """Interchangeable members, changed one at a time. ``done``: all of them serve."""

    def __init__(
        self, name: str, args: ClusterArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__(CLUSTERS[Role.SMTP_IN], name, {}, opts)
        members = rolling(self, args.fleet.members(Role.SMTP_IN), args)
        self.done = last(members)
        self.register_outputs({})
