"""Webmail: a browser's way to the mailboxes, behind the frontends."""

from __future__ import annotations

import pulumi

from components.host import CLUSTERS, ClusterArgs, last, rolling
from mailsite.model import Role


class Webmail(pulumi.ComponentResource):
    """A primary and its standbys, changed one after the other. ``done``: all of them serve."""

    def __init__(
        self, name: str, args: ClusterArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__(CLUSTERS[Role.WEBMAIL], name, {}, opts)
        hosts = rolling(self, args.fleet.members(Role.WEBMAIL), args)
        self.done = last(hosts)
        self.register_outputs({})
