"""Rules about where the platform's certificate comes from, see :mod:`mailsite.rules`."""

from __future__ import annotations

from collections.abc import Iterator

from mailsite.model import Platform, Role
from mailsite.rulebook import Finding, RuleBook

BOOK = RuleBook()
rule = BOOK.rule

#: One renews, the other steps in.
HOLDERS = 2


@rule("hosts", "certificates")
def two_hosts_hold_the_certificate(platform: Platform) -> Iterator[Finding]:
    holders = platform.serving(Role.CERTIFICATES)
    if platform.certificates is None:
        for host in holders:
            yield Finding(
                ("hosts", host.name, "roles"),
                Role.CERTIFICATES,
                f"'{host.name}' holds certificates, and site.yaml does not say which",
                "write 'certificates' there, or take the role away: then you give them as secrets",
            )
    elif len(holders) != HOLDERS:
        yield Finding(
            ("certificates",),
            "",
            f"{len(holders)} hosts have the role 'certificates'",
            "give it to two hosts at different sites, which show no certificate themselves, such as"
            " those of rspamd",
        )


@rule()
def the_second_holder_gives_the_first_time(platform: Platform) -> Iterator[Finding]:
    settings = platform.certificates
    if settings is None:
        return
    if settings.takeover_days >= settings.renew_days:
        yield Finding(
            ("certificates", "takeover_days"),
            str(settings.takeover_days),
            f"the second holder would renew {settings.takeover_days} days before the end, the first"
            f" {settings.renew_days}: they would do it at once",
            f"write less than {settings.renew_days}",
        )
    if settings.margin_days >= settings.takeover_days:
        yield Finding(
            ("certificates", "margin_days"),
            str(settings.margin_days),
            f"a check would complain {settings.margin_days} days before the end, when the second"
            f" holder has not had its turn ({settings.takeover_days})",
            f"write less than {settings.takeover_days}",
        )
