"""Documents that are not what they should be: refused with a reason, and without their content."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent import mail_agent
from agent.mail_agent import BadDocument, Bundle, parse_files
from tests.agent.fake import attributes, bundle, check, secret_bundle, service

PATH = "/etc/postfix/main.cf"


def changed(**parts: Any) -> str:
    return json.dumps(json.loads(bundle({PATH: "a\n"})) | parts)


def test_a_good_document_is_read() -> None:
    read = Bundle.parse(
        bundle(
            {PATH: "ü\n"},
            {PATH: attributes("root", "mail", "0640", "templates/x.j2")},
            services=[service("b.service"), service("a.service")],
            checks=[check("postfix", "/etc/postfix")],
            packages=["postfix"],
        )
    )
    assert read.files[PATH] == mail_agent.File(
        "ü\n".encode(), "root", "mail", 0o640, "templates/x.j2"
    )
    assert [s.unit for s in read.services] == ["a.service", "b.service"]
    assert read.packages == ("postfix",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON document"),
        ("[]", "not of format 1"),
        (changed(format=2), "not of format 1; the agent may be too old"),
        (changed(files=[]), "has no files"),
        (changed(attributes=None), "no attributes"),
        (changed(attributes={}), "content or attributes are missing"),
        (changed(files={PATH: 1}), "content or attributes are missing"),
        (changed(attributes={PATH: {"owner": "root"}}), "owner, group or mode is missing"),
        (changed(attributes={PATH: attributes(mode="rw-")}), "mode is missing or wrong"),
        (changed(attributes={PATH: attributes(mode="4755")}), "bits beyond permissions"),
        (changed(packages=None), "not a host bundle"),
        (changed(services=[{"unit": "a"}]), "not a host bundle: KeyError: 'reload_on'"),
        (changed(services=[1]), "not a host bundle"),
        (changed(health=[1]), "not a host bundle"),
        (changed(maps=[{"command": ["x"], "source": "a", "output": "/b"}]), "no absolute path"),
        (changed(secret_paths=["etc"]), "no absolute path"),
    ],
)
def test_a_bad_document_is_refused(text: str, words: str) -> None:
    with pytest.raises(BadDocument, match=words) as caught:
        Bundle.parse(text)
    assert caught.value.code == mail_agent.EXIT_BAD


@pytest.mark.parametrize(
    "path",
    ["", "/", "etc/x", "/etc/../x", "/etc/./x", "//x", "/etc/", "/etc//x", "/a\0", "/" + "n" * 240],
)
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(BadDocument, match="no absolute path of a file"):
        Bundle.parse(bundle({path: "x"}))


def test_a_refused_secret_is_not_repeated() -> None:
    text = secret_bundle({PATH: "hush\ud800hush"})
    with pytest.raises(BadDocument) as caught:
        parse_files(json.loads(text), secret=True)
    error: BaseException | None = caught.value
    while error is not None:
        assert "hush" not in repr(error)
        error = error.__cause__


def test_an_unexpected_error_is_told_without_what_it_holds() -> None:
    try:
        "hush\ud800".encode()
    except UnicodeEncodeError as error:
        assert "hush" in repr(error)
        assert "hush" not in mail_agent.told(error)


def test_the_agents_own_test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert mail_agent.main(["--self-test"]) == 0
    assert capsys.readouterr().out == "ok\n"
