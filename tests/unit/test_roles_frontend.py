"""frontend: the streams lead to the members by address, the primary first."""

from __future__ import annotations

import pytest

from mailsite.bundle import compose
from mailsite.fragment import CommandHealth, TcpHealth
from mailsite.loader import SiteError, load_platform
from mailsite.model import Platform, Role
from mailsite.roles import frontend
from mailsite.roles.dovecot import greets
from tests.unit.test_loader import EXAMPLE

PLATFORM = load_platform(EXAMPLE)
MEMBERS = PLATFORM.members(Role.SMTP_OUT)
EDGE = PLATFORM.members(Role.FRONTEND)[0]


def preferring(name: str) -> Platform:
    outbound = PLATFORM.outbound.model_copy(update={"primary": name})
    return PLATFORM.model_copy(update={"outbound": outbound})


@pytest.mark.parametrize("primary", [m.name for m in MEMBERS])
def test_the_primary_is_first_and_the_others_are_backups(primary: str) -> None:
    servers = frontend.servers(preferring(primary))
    assert servers[0].name == primary
    assert [s.backup for s in servers] == [False, *(True for _ in MEMBERS[1:])]
    assert {s.name for s in servers} == {m.name for m in MEMBERS}
    assert {s.port for s in servers} == {10587}


def test_a_member_is_one_address_and_no_name() -> None:
    """Two addresses of a dead member cost clients the connect timeout twice."""
    text = compose(PLATFORM, EDGE).files["/etc/nginx/mail-streams.d/smtp-out.conf"].content
    rows = [line.strip() for line in text.splitlines() if line.strip().startswith("server ")]
    upstream = [row for row in rows if "fail_timeout" in row]
    assert len(upstream) == len(MEMBERS)
    for row in upstream:
        assert not any(m.name in row.split(";")[0] for m in MEMBERS)


def test_a_primary_that_is_no_member_is_an_error() -> None:
    with pytest.raises(SiteError) as caught:
        compose(preferring(EDGE.name), EDGE)
    (problem,) = caught.value.problems
    assert problem.value == EDGE.name
    assert all(m.name in problem.remedy for m in MEMBERS)


def test_health_goes_through_the_stream() -> None:
    banner = f"220 {PLATFORM.names.smtp_out} ESMTP"
    found = [h for h in frontend.fragment(PLATFORM, EDGE).health if isinstance(h, TcpHealth)]
    assert {(h.address, h.port, h.expect) for h in found} == {
        ("127.0.0.1", 587, banner),
        ("::1", 587, banner),
    }


# -- mailboxes --------------------------------------------------------------------------------


def test_a_platform_without_mailboxes_has_no_streams_to_them() -> None:
    on = frontend.fragment(PLATFORM, EDGE)
    assert {rule.port for rule in on.ports} == {80, 443, 587, 993, 4190}
    without = {"maildrop": None, "webmail": None}
    off = frontend.fragment(PLATFORM.model_copy(update=without), EDGE)
    assert {rule.port for rule in off.ports} == {587}


def stream(name: str) -> tuple[frontend.Stream, str]:
    (found,) = (s for s in frontend.streams(PLATFORM) if s.name == name)
    files = frontend.fragment(PLATFORM, EDGE).files
    return found, files[f"/etc/nginx/mail-streams.d/{name}.conf"].content


@pytest.mark.parametrize(
    ("name", "public", "behind"), [("imap", 993, 10993), ("managesieve", 4190, 14190)]
)
def test_mail_clients_are_led_to_the_primary_replica(name: str, public: int, behind: int) -> None:
    found, text = stream(name)
    assert PLATFORM.maildrop is not None
    assert [s.backup for s in found.servers] == [False, True]
    assert found.servers[0].name == PLATFORM.maildrop.primary
    assert {s.port for s in found.servers} == {behind}
    assert f"listen [::]:{public} so_keepalive=on;" in text
    assert f"upstream {name} {{" in text and f"proxy_pass {name};" in text
    assert "proxy_protocol on;" in text
    # An IMAP client may say nothing for 29 minutes (RFC 2177).
    assert "proxy_timeout 35m;" in text


def test_filters_are_edited_from_the_networks_of_the_site_data_alone() -> None:
    assert PLATFORM.maildrop is not None
    networks = PLATFORM.maildrop.managesieve
    _, text = stream("managesieve")
    rows = [line.strip() for line in text.splitlines()]
    allowed = [row for row in rows if row.startswith(("allow ", "deny "))]
    assert allowed == [*(f"allow {network};" for network in networks), "deny all;"]
    _, imap = stream("imap")
    assert "deny" not in imap
    rules = {r.port: r.sources for r in frontend.fragment(PLATFORM, EDGE).ports}
    assert (rules[4190], rules[993], rules[587]) == (networks, None, None)


def test_health_sees_a_mailbox_server_behind_the_stream() -> None:
    health = frontend.fragment(PLATFORM, EDGE).health
    for address in ("127.0.0.1", "::1"):
        assert CommandHealth(greets(address, 993)) in health
