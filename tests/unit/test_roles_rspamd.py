"""rspamd: what makes a host a member of the spam filter."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from mailsite.bundle import compose, compose_secrets
from mailsite.loader import SiteError, load_platform
from mailsite.model import Base, Platform, Role
from mailsite.roles import rspamd
from mailsite.secrets import redis_password, required, rspamd_controller_hash
from tests.unit.test_loader import EXAMPLE

PLATFORM = load_platform(EXAMPLE)
MEMBERS = PLATFORM.members(Role.RSPAMD)
FILTER = MEMBERS[0]
STATE = "/usr/local/lib/mail-platform/redis-state"


def sources(port: int) -> set[str]:
    (rule,) = (r for r in rspamd.fragment(PLATFORM, FILTER).ports if r.port == port)
    assert rule.sources is not None
    return {str(source) for source in rule.sources}


def legs(*roles: Role) -> set[str]:
    hosts = [h for h in PLATFORM.hosts.values() if {*h.roles} & {*roles}]
    inside = [PLATFORM.internal_leg(h) for h in hosts]
    return {str(ip_network(a)) for leg in inside for a in (leg.ipv4, leg.ipv6)}


def test_each_port_is_open_to_those_that_need_it_alone() -> None:
    spam = PLATFORM.spam
    assert sources(spam.milter_port) == legs(Role.SMTP_IN, Role.SMTP_OUT)
    assert sources(spam.controller_port) == legs(Role.MAILDROP)
    assert sources(spam.redis_port) == sources(spam.sentinel_port) == legs(Role.RSPAMD)
    assert {r.port for r in rspamd.fragment(PLATFORM, FILTER).ports} == {
        *(spam.milter_port, spam.controller_port, spam.redis_port, spam.sentinel_port)
    }


def test_the_password_is_in_no_public_file_and_in_every_secret_one_of_redis() -> None:
    values = {redis_password(): "the-password", rspamd_controller_hash(): "$2$the-hash"}
    own = {name: "the-login" for name in required(PLATFORM, FILTER) if name not in values}
    assert {*own} == {"sasl-password/mail"}
    files = compose_secrets(PLATFORM, FILTER, values | own)
    assert "the-login" in files.pop("/etc/mail/secrets").content
    for path, file in files.items():
        assert (file.owner, file.mode) == ("root", 0o640), path
        assert file.group == ("redis" if path.startswith("/etc/redis/") else "_rspamd")
        assert ("the-password" in file.content) != ("$2$the-hash" in file.content)
    public = compose(PLATFORM, FILTER).public_json()
    assert "the-password" not in public and "the-hash" not in public


def test_nobody_is_let_in_to_the_controller_without_a_password() -> None:
    values = dict.fromkeys(required(PLATFORM, FILTER), "x")
    files = compose_secrets(PLATFORM, FILTER, values)
    content = files["/etc/rspamd/override.d/worker-controller.inc"].content
    assert "secure_ip = [];" in content.splitlines()


def grown(count: int) -> Platform:
    """The platform with ``count`` members of the filter."""
    hosts = dict(PLATFORM.hosts)
    for number in range(len(MEMBERS), count):
        name = f"more{number}.{PLATFORM.internal_domain}"
        hosts[name] = FILTER.model_copy(update={"name": name})
    return PLATFORM.model_copy(update={"hosts": hosts})


@pytest.mark.parametrize(("count", "expected"), [(2, 2), (3, 2), (5, 3)])
def test_most_sentinels_must_agree(count: int, expected: int) -> None:
    assert rspamd.quorum(grown(count)) == expected


def test_a_cut_off_writer_stops_where_others_can_take_over() -> None:
    def line(platform: Platform) -> bool:
        content = compose(platform, FILTER).files["/etc/redis/redis.conf"].content
        return "min-replicas-to-write 1" in content.splitlines()

    assert line(grown(3))
    assert not line(grown(2))


def test_the_first_member_begins_as_the_writer_and_the_others_as_its_copies() -> None:
    first, *others = (compose(PLATFORM, m).files[STATE].content for m in MEMBERS)
    writer = PLATFORM.internal_leg(FILTER).ipv4
    assert "replicaof " + str(writer) not in first
    assert others and all(f'"replicaof {writer} 6379"' in other for other in others)


def test_scores_and_limits_are_the_site_datas() -> None:
    scores = PLATFORM.spam.scores.model_copy(
        update={"reject": 12.5, "add_header": 7, "greylist": 3}
    )
    limits = PLATFORM.spam.user_limits.model_copy(update={"messages": 17, "recipients": 71})
    for greylist in (True, False):
        spam = PLATFORM.spam.model_copy(
            update={"scores": scores, "user_limits": limits, "greylist": greylist}
        )
        bundle = compose(PLATFORM.model_copy(update={"spam": spam}), FILTER)
        folder = "/etc/rspamd/local.d"
        actions = bundle.files[f"{folder}/actions.conf"].content.splitlines()
        assert {"reject = 12.5;", "add_header = 7;"} < {*actions}
        assert f"greylist = {3 if greylist else 'null'};" in actions
        rates = bundle.files[f"{folder}/ratelimit.conf"].content
        assert 'rate = "17 / 1h";' in rates and 'rate = "71 / 1h";' in rates
        switch = bundle.files[f"{folder}/greylist.conf"].content.splitlines()
        assert f"enabled = {'true' if greylist else 'false'};" in switch


def test_state_lies_on_the_data_volume() -> None:
    bundle = compose(PLATFORM, FILTER)
    mount = bundle.files["/etc/systemd/system/var-lib-redis.mount"].content
    assert "What=/srv/mail/redis\nWhere=/var/lib/redis\n" in mount
    for unit in ("redis-server", "redis-sentinel"):
        drop_in = bundle.files[f"/etc/systemd/system/{unit}.service.d/mail.conf"].content
        assert "\nRequiresMountsFor=/var/lib/redis\n" in drop_in


def test_what_is_compiled_stays_with_the_machine() -> None:
    files = compose(PLATFORM, FILTER).files
    options = files["/etc/rspamd/local.d/options.inc"].content.splitlines()
    # Without the slash Rspamd saves its largest part as /var/cache/rspamdhsmp-..., and may not.
    assert f'hs_cache_dir = "{rspamd.CACHE}/";' in options
    drop_in = files["/etc/systemd/system/rspamd.service.d/mail.conf"].content.splitlines()
    assert "CacheDirectory=rspamd" in drop_in


def test_it_does_not_go_on_a_machine_that_stays_the_operators() -> None:
    changed = FILTER.model_copy(update={"vm": None, "base": Base.OPERATOR})
    platform = PLATFORM.model_copy(update={"hosts": PLATFORM.hosts | {FILTER.name: changed}})
    with pytest.raises(SiteError, match="stays the operator's machine"):
        compose(platform, changed)


def test_one_member_learns() -> None:
    assert rspamd.learning_host(PLATFORM) == FILTER
