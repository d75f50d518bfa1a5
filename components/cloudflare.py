"""Cloudflare's DNS record, as its provider knows it.

The package ``pulumi_cloudflare`` describes some two hundred kinds of resources and needs four
seconds to import, fifteen the first time. Here is the one that the platform has; a test compares
it with the package, which stays installed for the version of its provider.
"""

from __future__ import annotations

from importlib.metadata import version

import pulumi

_VERSION = version("pulumi-cloudflare")


class DnsRecord(pulumi.CustomResource):
    """One record of a zone.

    ``name`` is absolute, ``content`` as Cloudflare's API takes it, ``ttl`` in seconds.
    """

    pulumi_type = "cloudflare:index/dnsRecord:DnsRecord"

    def __init__(
        self,
        resource_name: str,
        *,
        zone_id: pulumi.Input[str],
        name: pulumi.Input[str],
        type: pulumi.Input[str],
        ttl: pulumi.Input[int],
        content: pulumi.Input[str],
        priority: pulumi.Input[int] | None,
        proxied: pulumi.Input[bool],
        comment: pulumi.Input[str],
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        inputs = {
            "zoneId": zone_id,
            "name": name,
            "type": type,
            "ttl": ttl,
            "content": content,
            "priority": priority,
            "proxied": proxied,
            "comment": comment,
        }
        provider = pulumi.ResourceOptions(version=_VERSION)
        super().__init__(
            self.pulumi_type, resource_name, inputs, pulumi.ResourceOptions.merge(provider, opts)
        )
