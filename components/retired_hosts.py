"""Existing machines on their way out: what was the platform's is taken from them."""

from __future__ import annotations

import pulumi

from components.host import ClusterArgs, rolling


class RetiredHosts(pulumi.ComponentResource):
    """Machines that are pushed to without their roles, so that their agent removes every file.

    Each by itself: one that does not answer holds up no other. The next run may forget them.
    """

    def __init__(
        self, name: str, args: ClusterArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("mail:index:RetiredHosts", name, {}, opts)
        for host in args.fleet.retired:
            rolling(self, [host], args)
        self.register_outputs({})
