"""webmail, running: NGINX, PHP and Roundcube as configured, from the page to its database."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from mailsite.model import Role
from mailsite.roles import webmail
from tests.render.conftest import all_files, cases
from tests.render.image import Image, Step

# What runs in the machine. What is observed comes back as one JSON object.
_LIVE = r"""
import http.client, json, os, socket, ssl, stat, subprocess, sys, time

order = json.load(sys.stdin)
seen = {}
log = open("/tmp/daemons", "w")
os.makedirs("/srv/mail")
os.makedirs("/run/php")

def run(command):
    return subprocess.run(command, capture_output=True, text=True)

def prepare():
    done = run([order["prepare"]])
    return [done.returncode, done.stdout + done.stderr]

seen["prepared"] = [prepare(), prepare()]
found = os.stat(order["database"])
seen["database"] = [stat.filemode(found.st_mode), found.st_uid, found.st_size > 0]

daemons = [
    subprocess.Popen(command, stdout=log, stderr=log)
    for command in (order["fpm"], ["nginx", "-g", "daemon off;"])
]
context = ssl._create_unverified_context()

def get(path, host=order["name"], address="127.0.0.1"):
    connection = http.client.HTTPSConnection(order["name"], 443, timeout=20)
    connection.sock = context.wrap_socket(
        socket.create_connection((address, 443), 20), server_hostname=order["name"]
    )
    connection.request("GET", path, headers={"Host": host})
    reply = connection.getresponse()
    return [reply.status, dict(reply.getheaders()), reply.read().decode("utf-8", "replace")]

deadline = time.monotonic() + 30
while True:
    try:
        if get("/")[0] == 200:
            break
    except OSError:
        pass
    if time.monotonic() > deadline:
        sys.exit(open("/tmp/daemons").read())
    time.sleep(0.05)

seen["pages"] = {path: get(path) for path in order["paths"]}
seen["strange"] = get("/", host="elsewhere.example")
seen["health"] = [run(command).returncode for command in order["health"]]
daemons[0].terminate()
daemons[0].wait()
seen["sick"] = [run(command).returncode for command in order["health"]]
seen["modules"] = run(["php", "-m"]).stdout.split()
spell = "$p = pspell_new('en'); foreach ($argv as $w) echo json_encode(pspell_check($p, $w)), ' ';"
seen["spelled"] = run(["php", "-r", spell, "mailbox", "mialbxo"]).stdout.split()[1:]
daemons[1].terminate()
daemons[1].wait()
json.dump(seen, sys.stdout)
"""

PAGES = ("/", "/?_task=login", "/index.php", "/program/js/app.min.js", "/skins/elastic/ui.min.js")
HIDDEN = (
    "/config/config.inc.php",
    "/plugins/managesieve/managesieve.php",
    "/plugins/managesieve/config.inc.php",
    "/program/include/iniset.php",
    "/logs/errors.log",
    "/temp/",
    "/installer/",
    "/.htaccess",
    "/skins/../config/secrets.inc.php",
    "/index.php/x.php",
)


@cache
def observed(image: Image) -> dict[str, Any]:
    case = next(c for c in cases() if Role.WEBMAIL in c.host.roles)
    name = case.platform.names.webmail
    order = {
        "name": name,
        "prepare": webmail.PREPARE,
        "database": f"{webmail.DATA}/roundcube.sqlite",
        "fpm": [f"php-fpm{webmail.PHP}", "--nodaemonize"],
        "paths": [*PAGES, *HIDDEN],
        "health": [list(webmail.shows(a, name).command) for a in ("127.0.0.1", "::1")],
    }
    step = Step(("python3", "-I", "-c", _LIVE), input=json.dumps(order))
    (result,) = image.run(all_files(case.platform, case.host), [step])
    assert result.status == 0, result.words
    found: dict[str, Any] = json.loads(result.out)
    return found


def test_the_database_is_made_once_and_is_webmails_alone(image: Image) -> None:
    seen = observed(image)
    assert [status for status, _ in seen["prepared"]] == [0, 0], seen["prepared"]
    assert seen["database"] == ["-rw-------", 33, True]  # www-data, on every Debian


@pytest.mark.parametrize("path", PAGES)
def test_pages_and_what_they_are_made_of_come(image: Image, path: str) -> None:
    status, _, page = observed(image)["pages"][path]
    assert status == 200 and page
    if path in PAGES[:3]:
        assert webmail.MARK in page and "skins/elastic/" in page


@pytest.mark.parametrize("path", HIDDEN)
def test_source_settings_and_logs_stay_where_they_are(image: Image, path: str) -> None:
    status, _, page = observed(image)["pages"][path]
    assert status in (400, 403, 404)
    assert "<?php" not in page and "invented" not in page


def test_a_session_is_for_https_and_its_own_page_alone(image: Image) -> None:
    _, headers, _ = observed(image)["pages"]["/"]
    cookie = {word.strip().lower() for word in headers["Set-Cookie"].split(";")}
    assert {"secure", "httponly", "samesite=lax"} <= cookie
    assert "X-Powered-By" not in headers and headers["Server"] == "nginx"


def test_another_host_name_is_not_believed(image: Image) -> None:
    _, _, page = observed(image)["strange"]
    assert page and "elsewhere.example" not in page


def test_health_sees_the_page_and_misses_it_without_php(image: Image) -> None:
    seen = observed(image)
    assert seen["health"] == [0, 0]
    assert all(seen["sick"])


def test_plugins_find_what_they_need(image: Image) -> None:
    assert {"zip", "pspell", "pdo_sqlite", "mbstring", "intl"} <= set(observed(image)["modules"])
    assert observed(image)["spelled"] == ["true", "false"]
