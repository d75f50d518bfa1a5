"""rspamd: the spam filter, a cluster that shares its memory.

Each member looks at mail by itself; statistics, greylisting and rate limits lie in Redis, of
which one member is the writer and the others have copies. Sentinel, on each member too, moves
the writer when most of them cannot see it. Without Redis mail is still looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mailsite.fragment import (
    Check,
    CommandHealth,
    Fragment,
    PortRule,
    SecretFile,
    Service,
    TcpHealth,
    UnitHealth,
    templated,
)
from mailsite.loader import Problem, SiteError
from mailsite.model import Host, Platform, Role
from mailsite.roles.base import internal_networks
from mailsite.secret_names import redis_password, rspamd_controller_hash

ROLE = Role.RSPAMD.value
#: What Sentinel calls the writer.
MASTER = "rspamd"
UNITS = "/etc/systemd/system"
LIBRARY = "/usr/local/lib/mail-platform"
CHECK_REDIS = f"{LIBRARY}/check-redis"
REDIS_STATE = f"{LIBRARY}/redis-state"
REDIS_MOUNT = "var-lib-redis.mount"
#: What Rspamd compiles: it depends on the processor and on packages, not on what it knows.
CACHE = "/var/cache/rspamd"
CONTROLLER = "/etc/rspamd/override.d/worker-controller.inc"

_LOCAL = (
    *("options.inc", "logging.inc", "worker-normal.inc", "worker-proxy.inc", "actions.conf"),
    *("greylist.conf", "classifier-bayes.conf", "ratelimit.conf", "milter_headers.conf"),
    *("arc.conf", "dkim_signing.conf", "neural.conf", "history_redis.conf"),
)
_OVERRIDE = ("ratelimit.conf", "fuzzy_check.conf")

# It answers when Rspamd has compiled what it looks for; the first time that takes a while.
_PING = (
    "import sys, urllib.request\n"
    "with urllib.request.urlopen(sys.argv[1], timeout=2) as answer:\n"
    "    sys.exit(answer.read().strip() != b'pong')"
)
# To a hash that is cut short any password fits, and configtest does not mind.
_HAS_HASHES = (
    '[ "$(grep -Ec \'^(enable_)?password = "\\$[12]\\$[a-z0-9]{32,}\\$[a-z0-9]{50,}";$\' "$0")"'
    " = 2 ] || { echo \"$0: no password hashes; write what 'rspamadm pw' prints\" >&2; exit 1; }"
)
# The password comes from the file, so that it is in no list of processes.
_REDIS_ANSWERS = (
    "REDISCLI_AUTH=$(sed -n 's/^requirepass //p' /etc/redis/auth.conf)"
    ' redis-cli -p "$0" ping | grep -qx PONG'
)


@dataclass(frozen=True)
class Member:
    """A member's Redis and Sentinel, as the others reach them."""

    address: str
    redis_port: int
    sentinel_port: int

    @property
    def redis(self) -> str:
        return f"{self.address}:{self.redis_port}"

    @property
    def sentinel(self) -> str:
        return f"{self.address}:{self.sentinel_port}"

    @property
    def pattern(self) -> str:
        return re.escape(self.address)


def members(platform: Platform) -> tuple[Member, ...]:
    """The members, in the order of the topology: the first is the writer of a new cluster."""
    return tuple(
        Member(
            address=str(platform.internal_leg(host).ipv4),
            redis_port=platform.spam.redis_port,
            sentinel_port=platform.spam.sentinel_port,
        )
        for host in platform.members(Role.RSPAMD)
    )


def quorum(platform: Platform) -> int:
    """How many Sentinels must miss the writer: most of them."""
    return len(platform.members(Role.RSPAMD)) // 2 + 1


def learning_host(platform: Platform) -> Host:
    """The one member that learning goes to: more of them would learn one message twice."""
    return platform.members(Role.RSPAMD)[0]


def fragment(platform: Platform, host: Host) -> Fragment:
    """What makes ``host`` a member of the spam filter."""
    problems = [*_problems(host)]
    if problems:
        raise SiteError(problems)
    spam = platform.spam
    known = members(platform)
    volume = host.vm is not None
    context: dict[str, Any] = {
        "master": MASTER,
        "members": known,
        "first": known[0].address,
        "address": str(platform.internal_leg(host).ipv4),
        "quorum": quorum(platform),
        "redis_port": spam.redis_port,
        # With two members the writer would stop as soon as one is away.
        "replicas": len(known) > 2,
        "memory_mib": (host.vm.memory_mib if host.vm else 2048) // 4,
        "port": spam.milter_port,
        "count": host.vm.cpus if host.vm else 2,
        "scores": spam.scores,
        "greylist": spam.greylist,
        "limits": spam.user_limits,
        "volume": volume,
        "cache": CACHE,
    }
    files = dict(
        (
            *(templated(f"rspamd/etc/rspamd/local.d/{name}.j2", **context) for name in _LOCAL),
            *(
                templated(f"rspamd/etc/rspamd/override.d/{name}.j2", **context)
                for name in _OVERRIDE
            ),
            templated("rspamd/etc/rspamd/lua.local.d/sentinel.lua.j2"),
            templated("rspamd/etc/redis/redis.conf.j2", **{**context, "port": spam.redis_port}),
            templated(
                "rspamd/etc/redis/sentinel.conf.j2", **{**context, "port": spam.sentinel_port}
            ),
            templated(f"rspamd{REDIS_STATE}.j2", mode=0o755, **context),
            templated(f"rspamd{CHECK_REDIS}.j2", mode=0o755, **context),
            *(
                templated(f"rspamd{UNITS}/{unit}.service.d/mail.conf.j2", **context)
                for unit in ("redis-server", "redis-sentinel", "rspamd")
            ),
        )
    )
    if volume:
        files |= dict(
            (
                templated(f"rspamd{UNITS}/mail-redis.service.j2"),
                templated(f"rspamd{UNITS}/{REDIS_MOUNT}.j2"),
            )
        )
    # Another place of its state makes a daemon restart.
    moved = (f"{UNITS}/mail-redis.service", f"{UNITS}/{REDIS_MOUNT}") if volume else ()
    return Fragment(
        role=ROLE,
        files=files,
        secret_files=_secret_files(context, spam.controller_port),
        ports=_ports(platform),
        packages=("redis-sentinel", "redis-server", "rspamd"),
        checks=(
            Check("rspamd", ("rspamadm", "configtest"), ("/etc/rspamd/",)),
            Check("rspamd-password", ("sh", "-c", _HAS_HASHES, CONTROLLER), (CONTROLLER,)),
            Check(
                "redis",
                (CHECK_REDIS,),
                ("/etc/redis/", REDIS_STATE, CHECK_REDIS),
                stderr_is_failure=True,
            ),
        ),
        services=(
            Service(
                "redis-server.service",
                restart_on=(
                    "/etc/redis/redis.conf",
                    "/etc/redis/auth.conf",
                    REDIS_STATE,
                    f"{UNITS}/redis-server.service.d/",
                    *moved,
                ),
                order=28,
            ),
            Service(
                "redis-sentinel.service",
                restart_on=(
                    "/etc/redis/sentinel.conf",
                    "/etc/redis/sentinel-auth.conf",
                    REDIS_STATE,
                    f"{UNITS}/redis-sentinel.service.d/",
                    *moved,
                ),
                order=29,
            ),
            Service(
                "rspamd.service",
                # A reload starts new workers, but not with other sockets.
                restart_on=("/etc/rspamd/", f"{UNITS}/rspamd.service.d/"),
                order=30,
            ),
        ),
        health=(
            *((UnitHealth(REDIS_MOUNT),) if volume else ()),
            UnitHealth("redis-server.service"),
            UnitHealth("redis-sentinel.service"),
            CommandHealth(("sh", "-c", _REDIS_ANSWERS, str(spam.redis_port))),
            TcpHealth("127.0.0.1", spam.sentinel_port),
            UnitHealth("rspamd.service"),
            CommandHealth(
                (
                    *("python3", "-I", "-c", _PING),
                    f"http://127.0.0.1:{spam.controller_port}/ping",
                ),
                timeout=180,
            ),
        ),
    )


def _secret_files(context: dict[str, Any], controller_port: int) -> dict[str, SecretFile]:
    password, controller = redis_password(), rspamd_controller_hash()
    secret = context | {"password": password}
    return {
        "/etc/redis/auth.conf": SecretFile(
            (password,), "root", "redis", 0o640, "rspamd/etc/redis/auth.conf.j2", secret
        ),
        "/etc/redis/sentinel-auth.conf": SecretFile(
            (password,), "root", "redis", 0o640, "rspamd/etc/redis/sentinel-auth.conf.j2", secret
        ),
        "/etc/rspamd/local.d/redis.conf": SecretFile(
            (password,), "root", "_rspamd", 0o640, "rspamd/etc/rspamd/local.d/redis.conf.j2", secret
        ),
        CONTROLLER: SecretFile(
            (controller,),
            "root",
            "_rspamd",
            0o640,
            "rspamd/etc/rspamd/override.d/worker-controller.inc.j2",
            {"hash": controller, "port": controller_port},
        ),
    }


def _ports(platform: Platform) -> tuple[PortRule, ...]:
    spam = platform.spam
    own = internal_networks(platform, Role.RSPAMD)
    postfix = internal_networks(platform, Role.SMTP_IN, Role.SMTP_OUT)
    return (
        PortRule(spam.milter_port, postfix, "milter: Postfix on smtp-in and smtp-out"),
        PortRule(
            spam.controller_port,
            internal_networks(platform, Role.MAILDROP),
            "learning: the mailboxes' hosts",
        ),
        PortRule(spam.redis_port, own, "redis: the other members"),
        PortRule(spam.sentinel_port, own, "sentinel: the other members"),
    )


def _problems(host: Host) -> Iterator[Problem]:
    if not host.is_managed:
        yield Problem(
            file="topology.yaml",
            line=0,
            value=host.name,
            message=f"{host.name} is rspamd but stays the operator's machine, and rspamd owns"
            " Redis's main configuration",
            remedy="give it a 'vm', or write 'base: managed'",
        )
