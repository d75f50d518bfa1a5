"""smtp-in: what makes a host a member."""

from __future__ import annotations

import re

import pytest

from mailsite.bundle import compose, compose_secrets
from mailsite.loader import SiteError, load_platform
from mailsite.model import Base, Host, Platform, Role
from mailsite.records import own_names
from mailsite.roles import postfix, smtp_in
from mailsite.secrets import required, srs_key
from tests.unit.test_bundle import lies_under
from tests.unit.test_loader import EXAMPLE

PLATFORM = load_platform(EXAMPLE)
MEMBERS = PLATFORM.members(Role.SMTP_IN)
IN = MEMBERS[0]


def test_every_member_has_the_same_tables() -> None:
    bundles = [compose(PLATFORM, member) for member in MEMBERS]
    assert len(bundles) > 1
    for path in (smtp_in.VIRTUAL, smtp_in.VIRTUAL_DOMAINS, smtp_in.POSTSRSD):
        assert len({bundle.files[path].content for bundle in bundles}) == 1
    assert len({required(PLATFORM, member) for member in MEMBERS}) == 1


def with_one_more_address() -> Platform:
    name, domain = next((n, d) for n, d in PLATFORM.domains.items() if d.addresses)
    more = {**domain.addresses, "invented": next(iter(domain.addresses.values()))}
    domains = {**PLATFORM.domains, name: domain.model_copy(update={"addresses": more})}
    return PLATFORM.model_copy(update={"domains": domains})


def test_one_more_address_changes_the_table_alone_and_wakes_no_daemon() -> None:
    before, after = compose(PLATFORM, IN), compose(with_one_more_address(), IN)
    changed = [p for p in after.files if after.files[p] != before.files.get(p)]
    assert changed == [smtp_in.VIRTUAL]
    for service in after.services:
        assert not lies_under(smtp_in.VIRTUAL, (*service.reload_on, *service.restart_on))
    assert smtp_in.VIRTUAL in {build.source for build in after.maps}


def test_hosts_of_other_tiers_do_not_change_with_an_address() -> None:
    platform = with_one_more_address()
    for role in (Role.SMTP_OUT, Role.FRONTEND, Role.RSPAMD):
        for host in PLATFORM.members(role):
            assert compose(PLATFORM, host) == compose(platform, host)


def test_every_srs_key_is_there_and_the_first_one_signs() -> None:
    inbound = PLATFORM.inbound.model_copy(update={"srs_keys": ("new", "old")})
    platform = PLATFORM.model_copy(update={"inbound": inbound})
    values = {name: f"<{name}>" for name in required(platform, IN)}
    assert {srs_key("new"), srs_key("old")} <= set(values)
    file = compose_secrets(platform, IN, values)[smtp_in.SRS_SECRET]
    assert file.content == "<srs/new>\n<srs/old>\n"
    assert (file.owner, file.mode) == ("root", 0o600)


def test_only_rewritten_addresses_of_our_srs_domain_are_asked_for() -> None:
    pattern = smtp_in.Srs("srs.invented.example").pattern.strip("/")
    assert re.search(pattern, "SRS0=ab=cd=there.example=user@srs.invented.example")
    assert re.search(pattern, "SRS1+ab=there.example==cd=user@srs.invented.example")
    for other in (
        "user@srs.invented.example",
        "SRS0=ab=cd=there.example=user@srsxinvented.example",
        "SRS0=ab=cd=there.example=user@srs.invented.example.other.example",
        "SRS0=ab=cd=there.example=user@elsewhere.example",
    ):
        assert not re.search(pattern, other)


def test_the_helo_name_resolves_to_the_member() -> None:
    addresses = {own.name: own.addresses for own in own_names(PLATFORM)}
    for member in MEMBERS:
        name = smtp_in.helo_name(PLATFORM, member)
        assert member.interfaces[0].ipv4 in addresses[name]
        assert member.interfaces[0].ipv6 in addresses[name]


def test_postfix_starts_after_what_it_asks() -> None:
    services = {s.unit: s.order for s in compose(PLATFORM, IN).services}
    for unit in ("nftables.service", "unbound.service", "postsrsd.service", "nginx.service"):
        assert services[unit] < services["postfix.service"]


def test_everyone_reaches_both_ports_and_nobody_submission() -> None:
    fragment = smtp_in.fragment(PLATFORM, IN)
    assert {rule.port: rule.sources for rule in fragment.ports} == {25: None, 465: None}


def test_it_does_not_go_on_a_machine_that_stays_the_operators() -> None:
    changed = IN.model_copy(update={"vm": None, "base": Base.OPERATOR})
    platform = PLATFORM.model_copy(update={"hosts": PLATFORM.hosts | {IN.name: changed}})
    with pytest.raises(SiteError, match="stays the operator's machine") as caught:
        compose(platform, changed)
    assert "base: managed" in caught.value.problems[0].remedy


# -- the way to the spam filter ----------------------------------------------------------------


def servers(host: Host) -> dict[str, bool]:
    return {server.name: server.backup for server in postfix.filter_servers(PLATFORM, host)}


def test_the_filter_of_the_own_site_comes_first() -> None:
    for host in MEMBERS:
        near = {m.name for m in PLATFORM.members(Role.RSPAMD) if m.site == host.site}
        found = servers(host)
        assert near and {name for name, backup in found.items() if not backup} == near
        assert set(found) == {m.name for m in PLATFORM.members(Role.RSPAMD)}


def test_without_a_filter_at_its_site_a_host_asks_all_of_them() -> None:
    found = servers(IN.model_copy(update={"site": "elsewhere"}))
    assert found and not any(found.values())


def test_no_mail_waits_longer_than_five_seconds_for_the_filter() -> None:
    milter = postfix.spam_filter()
    assert milter.default_action == "accept"
    assert milter.command_timeout is not None and milter.content_timeout is not None
    assert milter.connect_timeout + max(milter.command_timeout, milter.content_timeout) <= 5
    relay = compose(PLATFORM, IN).files[postfix.NGINX].content
    (seconds,) = re.findall(r"proxy_next_upstream_timeout (\d+)s;", relay)
    assert int(seconds) < milter.command_timeout


def test_a_milter_without_times_of_its_own_has_postfixs() -> None:
    milter = postfix.Milter("inet:127.0.0.1:1", "tempfail", 5, "why")
    assert milter.entry == "{ inet:127.0.0.1:1, default_action=tempfail, connect_timeout=5s }"
