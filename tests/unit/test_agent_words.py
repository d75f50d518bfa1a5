"""A checker's words become file, line and template. The words are those of Debian 13's daemons."""

from __future__ import annotations

import pytest

from agent.mail_agent import File, explain, fragments

MAIN, MASTER = "/etc/postfix/main.cf", "/etc/postfix/master.cf"
DOVECOT, NFT = "/etc/dovecot/dovecot.conf", "/etc/nftables.conf"
OPENDKIM, SSHD = "/etc/opendkim.conf", "/etc/ssh/sshd_config.d/10-mail.conf"
UNIT, NGINX = "/etc/systemd/system/mail-queue.service", "/etc/nginx/conf.d/mail.conf"
UNBOUND, PASSWORDS = "/etc/unbound/unbound.conf", "/etc/postfix/passwords"

CONTENT = {
    MAIN: """\
# message_size_limit is what it is
message_size_limit = 10
mynetworks = 127.0.0.0/8
inet_protocols = ipv7
message_size_limit = abc
mydestination = $nonexist_x, localhost
""",
    MASTER: """\
# service type ...
smtp      inet  n  -  y  -  -  smtpd
smtpx     bad   n  -  y  -  -  smtpd
  -o nonsense=1
""",
    DOVECOT: "ssl = maybe\n",
    NFT: "table inet q {\n}\n",
    OPENDKIM: "# Mode s\nMode q\nKeyTable refile:/etc/opendkim/nokeys\n",
    SSHD: "Port 22\n",
    UNIT: "[Service]\nFoo=1\n",
    NGINX: "nonsense on;\n",
    UNBOUND: "server:\n  interface: 127.0.0.1\n  interface: 300.1.2.3\n",
    PASSWORDS: "line one\n",
}
FILES = {
    path: File(text.encode(), "root", "root", 0o644, f"templates{path}.j2", path == PASSWORDS)
    for path, text in CONTENT.items()
}

CASES = [
    (
        f"postconf: warning: {MASTER}: unused parameter: nonsense=1",
        "/etc/postfix/",
        f"{MASTER}:4: postconf: warning: {MASTER}: unused parameter: nonsense=1",
    ),
    (
        f"postconf: fatal: {MAIN}, line 84: missing '=' after attribute name: \"foo bar\"",
        "/etc/postfix/",
        f"{MAIN}:84: postconf: fatal: {MAIN}, line 84: missing '='",
    ),
    (
        f"postconf: warning: {MAIN}, line 84: overriding earlier entry: inet_protocols=all",
        "/etc/postfix/",
        f"{MAIN}:84: postconf: warning:",
    ),
    (
        f"postconf: fatal: file {MASTER}: line 55: bad field count",
        "/etc/postfix/",
        f"{MASTER}:55: postconf: fatal:",
    ),
    (
        f"postconf: warning: {MAIN}: undefined parameter: nonexist_x",
        "/etc/postfix/",
        f"{MAIN}:6: postconf: warning:",
    ),
    # No file is named, and of two settings the last one counts.
    (
        "postfix: fatal: bad numerical configuration: message_size_limit = abc",
        "/etc/postfix/",
        f"{MAIN}:5: postfix: fatal: bad numerical",
    ),
    (
        'postfix: fatal: unknown inet_protocols value "ipv7" in "ipv7"',
        "/etc/postfix/",
        f"{MAIN}:4: postfix: fatal: unknown",
    ),
    (
        '/usr/sbin/postconf: fatal: invalid type field "bad" in "smtpx bad n - y - - smtpd"',
        "/etc/postfix/",
        f"{MASTER}:3: /usr/sbin/postconf: fatal: invalid type",
    ),
    (
        f"doveconf: Fatal: Error in configuration file {DOVECOT} line 27: ssl: Invalid value: x",
        "/etc/dovecot/",
        f"{DOVECOT}:27: doveconf: Fatal:",
    ),
    (
        f"doveconf: Fatal: Error in configuration file {DOVECOT}: Missing '}}' (section started at"
        f" {DOVECOT}:27)",
        "/etc/dovecot/",
        f"{DOVECOT}:27: doveconf: Fatal:",
    ),
    (
        f"{NFT}:41:22-22: Error: syntax error, unexpected newline",
        NFT,
        f"{NFT}:41: Error: syntax error, unexpected newline (template",
    ),
    (
        f"opendkim: {OPENDKIM}: configuration error at line 28: unrecognized parameter",
        OPENDKIM,
        f"{OPENDKIM}:28: opendkim:",
    ),
    (f'opendkim: {OPENDKIM}: unknown mode "q"', OPENDKIM, f"{OPENDKIM}:2: opendkim:"),
    (
        f"opendkim: {OPENDKIM}: refile:/etc/opendkim/nokeys: dkimf_db_open(): No such file",
        OPENDKIM,
        f"{OPENDKIM}:3: opendkim:",
    ),
    (
        f"{SSHD}: line 18: Bad configuration option: Foo",
        "/etc/ssh/",
        f"{SSHD}:18: Bad configuration option: Foo (template",
    ),
    (
        f"{SSHD} line 18: Badly formatted port number.",
        "/etc/ssh/",
        f"{SSHD}:18: Badly formatted port number. (template",
    ),
    (
        f"{UNIT}:17: Unknown key 'Foo' in section [Service], ignoring.",
        "/etc/systemd/system/",
        f"{UNIT}:17: Unknown key 'Foo' in section [Service], ignoring. (template",
    ),
    (
        f'2026/11/22 22:31:25 [emerg] 1918#1918: unknown directive "nonsense" in {NGINX}:1',
        "/etc/nginx/",
        f"{NGINX}:1: 2026/11/22 22:31:25 [emerg]",
    ),
    (
        f"{UNBOUND}:93: error: unknown keyword 'nonsense'",
        "/etc/unbound/",
        f"{UNBOUND}:93: error: unknown keyword 'nonsense' (template",
    ),
    (
        "[1795386685] unbound-checkconf[1924:0] fatal error: cannot parse interface specified as"
        " '300.1.2.3'",
        "/etc/unbound/",
        f"{UNBOUND}:3: [1795386685] unbound-checkconf",
    ),
    (
        f"postmap: warning: {PASSWORDS}, line 1: expected format: key whitespace value",
        "",
        f"{PASSWORDS}:1: postmap: warning:",
    ),
]


@pytest.mark.parametrize(("words", "paths", "told"), CASES)
def test_words_name_file_line_and_template(words: str, paths: str, told: str) -> None:
    (line,) = explain(words, FILES, [paths] if paths else [])
    path = told.split(":")[0]
    assert line.startswith(told)
    assert line.endswith(f" (template templates{path}.j2)")


def test_words_about_no_file_of_ours_stay_as_they_are() -> None:
    words = 'nginx: [emerg] host not found in upstream "backend"'
    assert explain(words, FILES, ["/etc/nginx/"]) == [words]
    longer = f"{MAIN}.proto: line 3: whatever"
    assert explain(longer, FILES) == [longer]


def test_a_value_in_two_places_is_not_guessed() -> None:
    words = 'fatal: bad word "smtpd"'
    assert explain(words, FILES, ["/etc/postfix/"]) == [words]


def test_secret_files_are_not_searched() -> None:
    assert explain('bad: "line one"', FILES, ["/etc/postfix/"]) == ['bad: "line one"']


def test_what_is_said_twice_is_told_once_and_floods_are_cut() -> None:
    assert len(explain("same\nsame\n\n", {})) == 1
    many = explain("\n".join(f"line {n}" for n in range(100)), {})
    assert len(many) == 21
    assert many[-1] == "and 80 lines more"


def test_fragments_of_a_secret_are_its_lines_and_long_words() -> None:
    assert fragments(b"alice:{BLF-CRYPT}$2y$05$abcdefghijkl:::\nshort\nuser=bob\n") == {
        "alice:{BLF-CRYPT}$2y$05$abcdefghijkl:::",
        "{BLF-CRYPT}$2y$05$abcdefghijkl",
        "user=bob",
    }
