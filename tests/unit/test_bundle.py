"""Bundles: the same for the same site data, complete, and without a secret."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable

import pytest

from mailsite.bundle import Bundle, compose, fragments, merge, secrets_json
from mailsite.fragment import (
    CommandHealth,
    File,
    Fragment,
    PortRule,
    SecretFile,
    Service,
    TcpHealth,
    UnitHealth,
)
from mailsite.loader import SiteError, load_platform
from mailsite.model import Host, Platform, Role
from tests.unit.test_loader import EXAMPLE

PLATFORM = load_platform(EXAMPLE)
HOSTS = list(PLATFORM.hosts.values())
OUT = PLATFORM.members(Role.SMTP_OUT)[0]
EDGE = PLATFORM.members(Role.FRONTEND)[0]


def lies_under(path: str, prefixes: Iterable[str]) -> bool:
    """As the agent matches paths: a prefix is a folder, or the path itself."""
    return any(path == p or path.startswith(p.rstrip("/") + "/") for p in prefixes)


@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_the_same_site_data_gives_the_same_document(host: Host) -> None:
    again = load_platform(EXAMPLE)
    first = compose(PLATFORM, host).public_json()
    assert first == compose(again, again.hosts[host.name]).public_json()


def test_the_document_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "import sys, hashlib; from pathlib import Path; from mailsite.bundle import compose;"
        "from mailsite.loader import load_platform; p = load_platform(Path(sys.argv[1]));"
        "t = ''.join(compose(p, h).public_json() for h in p.hosts.values());"
        "print(hashlib.sha256(t.encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, str(EXAMPLE)],
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"},
            cwd=EXAMPLE.parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_the_document_has_a_line_per_line_of_a_file() -> None:
    """The preview shows a changed line only if the file is a plain value of its path."""
    document = json.loads(compose(PLATFORM, OUT).public_json())
    content = document["files"]["/etc/postfix/main.cf"]
    assert f"myhostname = {PLATFORM.names.smtp_out}" in content.splitlines()
    assert document["attributes"]["/etc/postfix/main.cf"] == {
        "owner": "root",
        "group": "root",
        "mode": "0644",
        "template": "templates/smtp_out/etc/postfix/main.cf.j2",
    }


@pytest.mark.parametrize("host", [OUT, EDGE], ids=lambda h: h.name)
def test_the_document_has_what_the_agent_reads(host: Host) -> None:
    bundle = compose(PLATFORM, host)
    document = json.loads(bundle.public_json())
    assert set(document) == {
        *("format", "host", "files", "attributes", "packages", "maps", "checks", "services"),
        *("health", "guarded", "keep_packages", "produced", "secret_paths"),
    }
    assert document["format"] == 1
    assert document["host"] == host.name
    assert set(document["files"]) == set(document["attributes"])
    assert document["secret_paths"] == sorted(bundle.secret_files)
    assert not set(document["secret_paths"]) & set(document["files"])
    orders = [service["order"] for service in document["services"]]
    assert orders == sorted(orders)
    kinds = {"tcp": {"address", "port", "expect", "timeout"}, "unit": {"unit"}}
    kinds["command"] = {"command", "timeout"}
    for health in document["health"]:
        assert set(health) == {"kind"} | kinds[health["kind"]]


def test_one_changed_value_changes_the_files_that_show_it_and_no_other() -> None:
    limits = PLATFORM.outbound.limits.model_copy(update={"connections": 7})
    outbound = PLATFORM.outbound.model_copy(update={"limits": limits})
    other = PLATFORM.model_copy(update={"outbound": outbound})
    before, after = compose(PLATFORM, OUT), compose(other, OUT)
    assert [p for p in before.files if before.files[p] != after.files[p]] == [
        "/etc/postfix/main.cf"
    ]
    assert compose(PLATFORM, EDGE) == compose(other, EDGE)


# -- composition -------------------------------------------------------------------------------


def part(role: str, **content: object) -> Fragment:
    return Fragment(role=role, **content)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second", "claim"),
    [
        ({"files": {"/etc/x": File("1")}}, {"files": {"/etc/x": File("1")}}, "/etc/x"),
        (
            {"files": {"/etc/x": File("1")}},
            {"secret_files": {"/etc/x": SecretFile(("sasl/a",))}},
            "/etc/x",
        ),
        (
            {"ports": (PortRule(587, None, "a"),)},
            {"ports": (PortRule(587, None, "b"),)},
            "port 587/tcp",
        ),
    ],
    ids=["two files", "a file and a secret file", "a port"],
)
def test_two_roles_that_claim_one_thing_are_an_error(
    first: dict[str, object], second: dict[str, object], claim: str
) -> None:
    with pytest.raises(SiteError) as caught:
        merge("mx.invented.example", [part("this", **first), part("that", **second)])
    (problem,) = caught.value.problems
    assert problem.value == "mx.invented.example"
    assert f"this and that both claim {claim}" in problem.message
    assert problem.remedy == "give the two roles to different hosts"


def test_two_roles_of_a_site_that_clash_are_an_error() -> None:
    both = OUT.model_copy(update={"roles": (Role.SMTP_OUT, Role.FRONTEND)})
    with pytest.raises(SiteError, match="smtp-out and frontend both claim port 587/tcp"):
        compose(PLATFORM, both)


def test_parts_of_shared_things_are_united() -> None:
    same = TcpHealth("127.0.0.1", 25)
    bundle = merge(
        "mx.invented.example",
        [
            part(
                "this",
                packages=("postfix", "unbound"),
                services=(Service("b.service", ("/etc/b",), order=20), Service("a.service")),
                health=(same,),
                guarded=("/etc/z",),
            ),
            part(
                "that",
                packages=("nginx", "postfix"),
                services=(Service("b.service", ("/etc/c",), ("/etc/d",), order=30),),
                health=(UnitHealth("b.service"), same, CommandHealth(("true",))),
                guarded=("/etc/y", "/etc/z"),
            ),
        ],
    )
    assert bundle.packages == ("nginx", "postfix", "unbound")
    assert bundle.services == (
        Service("b.service", ("/etc/b", "/etc/c"), ("/etc/d",), order=20),
        Service("a.service"),
    )
    assert bundle.health == (same, UnitHealth("b.service"), CommandHealth(("true",)))
    assert bundle.guarded == ("/etc/y", "/etc/z")


def test_unit_files_are_checked_by_systemd() -> None:
    bundle = merge(
        "mx.invented.example",
        [
            part(
                "this",
                files={
                    "/etc/systemd/system/own.service": File(""),
                    "/etc/systemd/system/used.service.d/x.conf": File(""),
                    "/etc/systemd/system/absent.service.d/x.conf": File(""),
                    "/etc/systemd/journald.conf.d/x.conf": File(""),
                },
                services=(Service("used.service"),),
            )
        ],
    )
    (check,) = bundle.checks
    assert check.command[-2:] == ("own.service", "used.service")
    assert check.stderr_is_failure
    assert merge("mx.invented.example", [part("this")]).checks == ()


# -- completeness ------------------------------------------------------------------------------

#: Files that no daemon reads, or that are read anew each time.
READ_BY_NOBODY = {
    "/etc/cloud/cloud-init.disabled",
    "/etc/hostname",
    "/etc/apt/apt.conf.d/99mail-upgrades",
    "/usr/local/lib/mail-platform/check-dkim",
    "/usr/local/lib/mail-platform/mail-queue",
    "/usr/local/lib/mail-platform/upgrade",
    "/usr/local/sbin/mail-agent",
}
#: Units that start with the daemons that need them, and one that must not start.
STARTED_BY_OTHERS = {
    "/etc/systemd/system/mail-upgrade.service",
    "/etc/systemd/system/systemd-resolved.service.d/mail.conf",
}


@pytest.mark.parametrize("host", [OUT, EDGE], ids=lambda h: h.name)
def test_a_change_of_any_file_reaches_the_daemon_that_reads_it(host: Host) -> None:
    bundle = compose(PLATFORM, host)
    prefixes = [p for s in bundle.services for p in (*s.reload_on, *s.restart_on)]
    paths = {*bundle.files, *bundle.secret_files} - READ_BY_NOBODY - STARTED_BY_OTHERS
    assert {path for path in paths if not lies_under(path, prefixes)} == set()


@pytest.mark.parametrize("host", [OUT, EDGE], ids=lambda h: h.name)
def test_each_file_of_a_daemon_is_checked_before_it_is_used(host: Host) -> None:
    bundle = compose(PLATFORM, host)
    prefixes = [p for c in bundle.checks for p in c.paths]
    # Nobody but the reader checks these, and they hold nothing that can be wrong in form.
    free = {"/etc/resolv.conf", "/etc/hosts", "/etc/default/unbound"}
    free |= {"/etc/systemd/journald.conf.d/mail.conf"} | READ_BY_NOBODY
    paths = {*bundle.files, *bundle.secret_files} - free
    assert {path for path in paths if not lies_under(path, prefixes)} == set()


@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_every_prefix_matches_a_file(host: Host) -> None:
    """A prefix that matches nothing is a typing error in a role."""
    bundle = compose(PLATFORM, host)
    paths = {*bundle.files, *bundle.secret_files}
    # Filled by a rehearsal's world only.
    optional = {"/usr/local/share/ca-certificates"}
    prefixes = {p for s in bundle.services for p in (*s.reload_on, *s.restart_on)}
    prefixes |= {p for c in bundle.checks for p in c.paths} | set(bundle.guarded)
    unmatched = {p for p in prefixes if not any(lies_under(path, [p]) for path in paths)}
    assert unmatched <= optional


@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_every_host_gets_the_agent_as_it_is_in_the_checkout(host: Host) -> None:
    file = compose(PLATFORM, host).files["/usr/local/sbin/mail-agent"]
    source = EXAMPLE.parents[1] / "agent/mail_agent.py"
    assert file.content == source.read_text(encoding="utf-8")
    assert (file.owner, file.mode) == ("root", 0o755)


# -- secrets -----------------------------------------------------------------------------------


def with_given_hashes() -> tuple[Platform, str]:
    given = "{BLF-CRYPT}$2b$10$" + "S" * 53
    users = {
        name: user.model_copy(update={"password_hash": given})
        for name, user in PLATFORM.sasl_users.items()
    }
    return PLATFORM.model_copy(update={"sasl_users": users}), given


@pytest.mark.parametrize("host", HOSTS, ids=lambda h: h.name)
def test_no_secret_is_in_the_public_document(host: Host) -> None:
    platform, given = with_given_hashes()
    text = compose(platform, host).public_json()
    assert given not in text
    assert "PRIVATE KEY" not in text
    assert "{BLF-CRYPT}" not in text


def test_the_secret_document() -> None:
    text = secrets_json("mx.invented.example", "a" * 64, {"/etc/k": File("K", "u", "g", 0o600)})
    assert json.loads(text) == {
        "format": 1,
        "host": "mx.invented.example",
        "digest": "a" * 64,
        "files": {"/etc/k": "K"},
        "attributes": {"/etc/k": {"owner": "u", "group": "g", "mode": "0600", "template": ""}},
    }


def test_the_base_comes_first() -> None:
    assert [f.role for f in fragments(PLATFORM, OUT)] == ["base", "smtp-out", "upgrades"]
    assert isinstance(compose(PLATFORM, OUT), Bundle)
