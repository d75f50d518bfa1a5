"""Machines that have nothing to do with mail, but to send some of their own."""

from __future__ import annotations

from dataclasses import replace

import pulumi

from components.host import CLUSTERS, ClusterArgs, rolling
from mailsite.model import CLIENT_ROLES


class NullClients(pulumi.ComponentResource):
    """The first machine by itself, then all others side by side: what fails, fails on one.

    It owns those that have no other role; the others get the same from their own tiers. ``done``:
    all of them take mail.
    """

    def __init__(
        self, name: str, args: ClusterArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__(CLUSTERS[CLIENT_ROLES[0]], name, {}, opts)
        machines = [host for role in CLIENT_ROLES for host in args.fleet.members(role)]
        first = rolling(self, machines[:1], args)
        rest = replace(args, after=[host.done for host in first])
        others = [host for machine in machines[1:] for host in rolling(self, [machine], rest)]
        self.done = [host.done for host in (*first, *others)]
        self.register_outputs({})
