"""frontend: the streams lead to the members by address, the primary first."""

from __future__ import annotations

import pytest

from mailsite.bundle import compose
from mailsite.fragment import TcpHealth
from mailsite.loader import SiteError, load_platform
from mailsite.model import Platform, Role
from mailsite.roles import frontend
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
    found = [h for h in compose(PLATFORM, EDGE).health if isinstance(h, TcpHealth)]
    assert {(h.address, h.port, h.expect) for h in found} == {
        ("127.0.0.1", 587, banner),
        ("::1", 587, banner),
    }
