"""The platform's certificate: two hosts that have it issued, and hand it to all others."""

from __future__ import annotations

import pulumi

from components.host import CLUSTERS, ClusterArgs, last, rolling
from mailsite.model import Role


class Certificates(pulumi.ComponentResource):
    """Two holders, changed one after the other. There are none where certificates are given.

    ``issued``: the first one has a certificate for all names, which is all that hosts wait for;
    ``done``: both have it.
    """

    def __init__(
        self, name: str, args: ClusterArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__(CLUSTERS[Role.CERTIFICATES], name, {}, opts)
        holders = rolling(self, args.fleet.members(Role.CERTIFICATES), args)
        self.done = last(holders)
        self.issued = last(holders[:1])
        self.register_outputs({})
