"""Faults of webmail that its checks must see."""

from __future__ import annotations

from mailsite.model import Role
from mailsite.roles import webmail
from verify.context import Context

from .faults import changed_by_hand, edit, expect_green, expect_red

SITE = "/etc/nginx/sites-enabled/zz-webmail.conf"
NGINX = "nginx.service"
FPM = f"{webmail.FPM}.service"


def test_flat_lists_in_another_skin_turn_web_1_red(platform_up: Context) -> None:
    """Both hosts: what users see does not depend on which one serves."""
    first = platform_up.platform.members(Role.WEBMAIL)[0]
    flat = edit(webmail.CONFIG, "s/'threads'/'list'/")
    with changed_by_hand(platform_up, first, flat, restart=FPM):
        expect_red(platform_up, "WEB-1", "not shown in threads")
    expect_green(platform_up, "WEB-1")


def test_a_mail_that_does_not_leave_turns_web_1_red(platform_up: Context) -> None:
    first = platform_up.platform.members(Role.WEBMAIL)[0]
    wrong = edit(webmail.SECRETS, r"s/(smtp_pass'\] = ').*'/\1wrong'/")
    with changed_by_hand(platform_up, first, wrong, restart=FPM):
        expect_red(platform_up, "WEB-1", r"Roundcube says: SMTP Error \(535\)")


def test_a_page_for_everybody_turns_web_2_red(platform_up: Context) -> None:
    frontend = platform_up.frontends[0]
    everybody = edit(SITE, "s/default 0;/default 1;/")
    with changed_by_hand(platform_up, frontend, everybody, restart=NGINX):
        expect_red(platform_up, "WEB-2", f"{frontend.name}.* answers 200")
    expect_green(platform_up, "WEB-2")


def test_pages_without_headers_turn_web_2_red(platform_up: Context) -> None:
    frontend = platform_up.frontends[-1]
    bare = edit(SITE, "/add_header Content-Security-Policy/d")
    with changed_by_hand(platform_up, frontend, bare, restart=NGINX):
        expect_red(platform_up, "WEB-2", "content-security-policy says nothing")


def test_a_frontend_without_a_standby_turns_web_3_red(platform_up: Context) -> None:
    frontend = platform_up.frontends[0]
    alone = edit(SITE, "/ backup;/d")
    with changed_by_hand(platform_up, frontend, alone, restart=NGINX):
        expect_red(platform_up, "WEB-3", f"{frontend.name}.*webmail answers 50[24]")
    expect_green(platform_up, "WEB-3")


def test_servers_whose_name_is_not_verified_turn_web_4_red(platform_up: Context) -> None:
    """As Roundcube does where nobody tells it whom to expect."""
    last = platform_up.platform.members(Role.WEBMAIL)[-1]
    trusting = edit(webmail.CONFIG, "s/'verify_peer_name' => true/'verify_peer_name' => false/")
    with changed_by_hand(platform_up, last, trusting, restart=FPM):
        expect_red(platform_up, "WEB-4", "(imap|smtp) tells a server with a certificate for an")
    expect_green(platform_up, "WEB-4")


def test_filters_on_a_server_that_is_not_verified_turn_web_4_red(platform_up: Context) -> None:
    first = platform_up.platform.members(Role.WEBMAIL)[0]
    trusting = edit(
        webmail.SIEVE_CONFIG, "s/'verify_peer(_name)?' => true/'verify_peer\\1' => false/"
    )
    with changed_by_hand(platform_up, first, trusting, restart=FPM):
        expect_red(platform_up, "WEB-4", "sieve tells a server with")


def test_a_way_without_backups_turns_web_5_red(platform_up: Context) -> None:
    first = platform_up.platform.members(Role.WEBMAIL)[0]
    alone = edit(webmail.NGINX, "/ backup;/d")
    with changed_by_hand(platform_up, first, alone, restart=NGINX):
        expect_red(platform_up, "WEB-5", "Roundcube says: Connection to storage server failed")
    expect_green(platform_up, "WEB-5")
