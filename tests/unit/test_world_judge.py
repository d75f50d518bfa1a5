"""DMARC, DKIM and the strict mail server's decision."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import dkim
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from rehearsal.world.mx import judge

MESSAGE = b"From: a@news.sender.org\r\nTo: b@c.example\r\nSubject: x\r\n\r\nHello\r\n"


def last_two(domain: str) -> str:
    return ".".join(domain.split(".")[-2:])


def dmarc(
    records: dict[str, list[str]],
    *,
    spf: str | None = None,
    dkim: tuple[str, ...] = (),
    message: bytes = MESSAGE,
) -> judge.Dmarc:
    return judge.dmarc_of(message, spf, dkim, last_two, lambda name: records.get(name, []))


@pytest.mark.parametrize(
    ("record", "spf", "dkim", "result"),
    [
        ("v=DMARC1; p=reject", "news.sender.org", (), "pass"),
        ("v=DMARC1; p=reject", "sender.org", (), "pass"),
        ("v=DMARC1; p=reject; aspf=s", "sender.org", (), "fail"),
        ("v=DMARC1; p=reject; aspf=s", "news.sender.org", (), "pass"),
        ("v=DMARC1; p=reject", None, ("sender.org",), "pass"),
        ("v=DMARC1; p=reject", None, ("other.org", "sender.org"), "pass"),
        ("v=DMARC1; p=reject; adkim=s", None, ("sender.org",), "fail"),
        ("v=DMARC1; p=reject", "other.org", ("other.org",), "fail"),
        ("v=DMARC1; p=none", None, (), "fail"),
        ("v=spf1 -all", "sender.org", (), "none"),
    ],
)
def test_alignment(record: str, spf: str | None, dkim: tuple[str, ...], result: str) -> None:
    assert dmarc({"_dmarc.news.sender.org": [record]}, spf=spf, dkim=dkim).result == result


def test_the_organizational_domains_policy_for_subdomains() -> None:
    found = dmarc({"_dmarc.sender.org": ["v=DMARC1; p=reject; sp=quarantine"]}, spf="sender.org")
    assert (found.result, found.policy, found.domain) == ("pass", "quarantine", "news.sender.org")


def test_the_domains_own_record_goes_first() -> None:
    records = {
        "_dmarc.news.sender.org": ["v=DMARC1; p=none"],
        "_dmarc.sender.org": ["v=DMARC1; p=reject"],
    }
    assert dmarc(records).policy == "none"


def test_two_policy_records_are_none() -> None:
    both = {"_dmarc.news.sender.org": ["v=DMARC1; p=none", "v=DMARC1; p=reject"]}
    assert dmarc(both, spf="sender.org").result == "none"


def test_no_answer_is_no_verdict() -> None:
    def fails(name: str) -> list[str]:
        raise judge.TemporaryError("SERVFAIL")

    assert judge.dmarc_of(MESSAGE, "sender.org", (), last_two, fails).result == "temperror"


@pytest.mark.parametrize(
    "header",
    [b"", b"From: a@x.org\r\nFrom: b@x.org\r\n", b"From: a@x.org, b@y.org\r\n", b"From: x\r\n"],
)
def test_no_single_author_is_an_error(header: bytes) -> None:
    assert dmarc({}, message=header + b"Subject: x\r\n\r\n").result == "permerror"


KEY = rsa.generate_private_key(65537, 2048)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    public = KEY.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    records = {"s1._domainkey.sender.org.": [f"v=DKIM1; p={base64.b64encode(public).decode()}"]}
    monkeypatch.setattr(judge, "txt", lambda name: records.get(name, []))
    yield records


def signed(message: bytes, selector: bytes = b"s1") -> bytes:
    pem = KEY.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    signature: bytes = dkim.sign(
        message, selector, b"sender.org", pem, canonicalize=(b"relaxed", b"relaxed")
    )
    return signature + message


def test_each_signature_is_verified(published: dict[str, list[str]]) -> None:
    found = judge.signatures_of(signed(signed(MESSAGE), b"s2"))
    assert [(s.d, s.s, s.c, s.result) for s in found] == [
        ("sender.org", "s2", "relaxed/relaxed", "permerror"),
        ("sender.org", "s1", "relaxed/relaxed", "pass"),
    ]


def test_a_changed_body_fails(published: dict[str, list[str]]) -> None:
    (found,) = judge.signatures_of(signed(MESSAGE).replace(b"Hello", b"Hullo"))
    assert found.result == "fail"


def test_a_changed_header_fails(published: dict[str, list[str]]) -> None:
    (found,) = judge.signatures_of(signed(MESSAGE).replace(b"Subject: x", b"Subject: y"))
    assert found.result == "fail"


def test_two_key_records_are_no_key(published: dict[str, list[str]]) -> None:
    published["s1._domainkey.sender.org."] *= 2
    (found,) = judge.signatures_of(signed(MESSAGE))
    assert found.result == "permerror"


def test_a_resolver_that_fails_is_a_temporary_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> list[str]:
        raise judge.TemporaryError("SERVFAIL")

    monkeypatch.setattr(judge, "txt", fails)
    (found,) = judge.signatures_of(signed(MESSAGE))
    assert found.result == "temperror"


def test_a_signature_that_is_none(published: dict[str, list[str]]) -> None:
    (found,) = judge.signatures_of(b"DKIM-Signature: v=1; a=rsa-sha256; d=\r\n" + MESSAGE)
    assert found.result in ("fail", "permerror")
    assert judge.signatures_of(MESSAGE) == ()


def verdict(spf: str, dkim: tuple[str, ...], dmarc: str) -> judge.Verdict:
    signatures = tuple(judge.Signature("d", "s", "a", "c", "i", r, "") for r in dkim)
    return judge.Verdict(spf, "", signatures, judge.Dmarc(dmarc, domain="d"))


@pytest.mark.parametrize(
    ("spf", "dkim", "dmarc", "reply"),
    [
        ("pass", ("pass",), "pass", None),
        ("none", ("pass",), "pass", None),
        ("pass", (), "pass", "550 5.7.20"),
        ("pass", ("pass", "fail"), "pass", "550 5.7.20"),
        ("softfail", ("pass",), "pass", "550 5.7.23"),
        ("fail", ("pass",), "pass", "550 5.7.23"),
        ("permerror", ("pass",), "pass", "550 5.7.23"),
        ("pass", ("pass",), "fail", "550 5.7.1 "),
        ("pass", ("pass",), "none", "550 5.7.1 "),
        ("temperror", ("pass",), "pass", "451 4.7.0"),
        ("pass", ("temperror",), "fail", "451 4.7.0"),
    ],
)
def test_what_a_strict_server_takes(
    spf: str, dkim: tuple[str, ...], dmarc: str, reply: str | None
) -> None:
    found = judge.objection(verdict(spf, dkim, dmarc))
    assert found == reply or (reply is not None and str(found).startswith(reply))


@pytest.mark.parametrize(
    ("spf", "dmarc", "policy", "reply"),
    [
        ("pass", "pass", "reject", None),
        ("pass", "none", "", None),
        ("pass", "fail", "none", None),
        ("pass", "fail", "reject", "550 5.7.1 DMARC"),
        ("pass", "fail", "quarantine", "550 5.7.1 DMARC"),
        ("none", "pass", "reject", "550 5.7.23 SPF: none"),
        ("neutral", "pass", "reject", "550 5.7.23 SPF: neutral"),
        ("softfail", "pass", "reject", "550 5.7.23 SPF: softfail"),
        ("fail", "pass", "reject", "550 5.7.23 SPF: fail"),
        ("temperror", "pass", "reject", "451 4.7.0"),
        ("pass", "temperror", "", "451 4.7.0"),
    ],
)
def test_what_the_end_of_a_forward_takes(
    spf: str, dmarc: str, policy: str, reply: str | None
) -> None:
    verdict = judge.Verdict(spf, "", (), judge.Dmarc(dmarc, policy, "sender.org", "why"))
    found = judge.unauthorized(verdict)
    assert found is None if reply is None else (found or "").startswith(reply)
