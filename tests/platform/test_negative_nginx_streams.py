"""Faults of the frontends that their checks must see."""

from __future__ import annotations

import pytest

from verify.context import SUBMISSION, SUBMISSION_PROXY, Context
from verify.lab import LabMachine

from .faults import changed_by_hand, edit, expect_green, expect_red, open_port, setting

STREAM = "/etc/nginx/mail-streams.d/smtp-out.conf"
NGINX = "nginx.service"


def test_streams_that_do_not_fail_over_turn_edge_1_red(platform_up: Context) -> None:
    """One has no backups; the other keeps NGINX's own 60 s for a connection, as the seed does."""
    alone, *_, patient = platform_up.frontends
    with (
        changed_by_hand(platform_up, alone, edit(STREAM, "/ backup;/d"), restart=NGINX),
        changed_by_hand(
            platform_up, patient, edit(STREAM, "/proxy_connect_timeout/d"), restart=NGINX
        ),
    ):
        failed = rf"{alone.name}[^\n]*two logins in a row failed"
        slow = rf"{patient.name}[^\n]*(login failed only after|a login took)"
        expect_red(platform_up, "EDGE-1", f"(?s)(?=.*{failed})(?=.*{slow})")
    expect_green(platform_up, "EDGE-1")


def test_streams_without_proxy_headers_turn_edge_2_and_out_7_red(platform_up: Context) -> None:
    """As in the seed: Postfix sees and counts the frontend."""
    bare = edit(STREAM, f"s/:{SUBMISSION_PROXY} /:{SUBMISSION} /", "/proxy_protocol on;/d")
    with changed_by_hand(platform_up, platform_up.frontends[0], bare, restart=NGINX):
        expect_red(platform_up, "EDGE-2", "Received shows another client")
        expect_red(platform_up, "OUT-7", "too many connections from")


def test_a_proxy_port_that_anyone_reaches_turns_edge_2_red(platform_up: Context) -> None:
    member = platform_up.members[-1]
    with open_port(platform_up, member, SUBMISSION_PROXY):
        expect_red(platform_up, "EDGE-2", f"port {SUBMISSION_PROXY} takes a PROXY header")


def test_frontends_in_mynetworks_turn_edge_2_red(platform_up: Context) -> None:
    """With the client's address lost, that made an open relay of everybody."""
    member = platform_up.members[-1]
    addresses = [a for f in platform_up.frontends for a in platform_up.internal(f)]
    words = " ".join(f"[{a}]" if a.version == 6 else str(a) for a in addresses)
    with changed_by_hand(
        platform_up, member, setting(f"mynetworks=127.0.0.0/8 [::1]/128 {words}"),
        restart="postfix.service",
    ):  # fmt: skip
        expect_red(platform_up, "EDGE-2", "a frontend relays without AUTH")


def test_a_frontend_of_one_family_turns_edge_3_and_out_1_red(platform_up: Context) -> None:
    one = edit(STREAM, r"/listen \[::\]/d")
    with changed_by_hand(platform_up, platform_up.frontends[0], one, restart=NGINX):
        expect_red(platform_up, "EDGE-3", "Connection refused")
        expect_red(platform_up, "OUT-1", "Connection refused")


def test_a_lost_foreign_table_turns_edge_4_red(platform_up: Context) -> None:
    machine = platform_up.lab.machine(platform_up.frontends[0])
    try:
        machine.run("nft", "delete", *machine.FOREIGN_TABLE.split())
        expect_red(platform_up, "EDGE-4", "firewall table is gone")
    finally:
        machine.run("systemctl", "restart", "nftables.service")


def test_a_changed_foreign_website_turns_edge_4_red(platform_up: Context) -> None:
    machine = platform_up.lab.machine(platform_up.frontends[-1])
    page = machine.run("sh", "-c", "ls /var/www/operator/*").split()[0]
    kept = machine.run("cat", page)
    try:
        machine.run("tee", page, input="Welcome to nginx!\n")
        expect_red(platform_up, "EDGE-4", "Welcome to nginx")
    finally:
        machine.run("tee", page, input=kept)


def test_a_role_that_stays_behind_turns_edge_4_red(
    platform_up: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LabMachine, "apply", lambda *_, **__: "")
    expect_red(platform_up, "EDGE-4", f"still there without the role: .*{STREAM}")
