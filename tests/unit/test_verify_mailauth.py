"""How mail is judged, against records made up here."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any, cast

import dkim
import dns.rdatatype
import dns.rrset
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from verify import mailauth
from verify.lookup import Lookup
from verify.smtp import letter

SENDER = ip_address("192.0.2.25")


class Book(Lookup):
    """Answers from a book instead of from the network."""

    def __init__(self, *lines: str) -> None:
        self._sets: dict[tuple[str, str], dns.rrset.RRset] = {}
        for line in lines:
            name, kind, data = line.split(" ", 2)
            known = self._sets.get((name, kind))
            texts = [r.to_text() for r in known] if known else []
            self._sets[name, kind] = dns.rrset.from_text_list(
                f"{name}.", 60, "IN", kind, [*texts, data]
            )

    def answer(self, name: str, kind: str) -> Any:
        return self._sets.get((name.rstrip(".").lower(), kind))


def test_spf_is_what_the_records_say() -> None:
    book = Book(
        'a.example TXT "v=spf1 include:_spf.a.example ~all"',
        '_spf.a.example TXT "v=spf1 ip4:192.0.2.0/24 -all"',
    )
    assert mailauth.check_spf(book, SENDER, "u@a.example", "mx.a.example").result == "pass"
    other = ip_address("198.51.100.1")
    assert mailauth.check_spf(book, other, "u@a.example", "mx.a.example").result == "softfail"
    assert mailauth.check_spf(book, SENDER, "u@b.example", "mx.a.example").result == "none"


def test_spf_of_a_bounce_is_that_of_the_helo_name() -> None:
    book = Book('mx.a.example TXT "v=spf1 ip4:192.0.2.25 -all"')
    assert mailauth.check_spf(book, SENDER, "", "mx.a.example").result == "pass"


def test_two_spf_records_are_an_error() -> None:
    book = Book('a.example TXT "v=spf1 -all"', 'a.example TXT "v=spf1 +all"')
    assert mailauth.check_spf(book, SENDER, "u@a.example", "x.example").result == "permerror"
    assert mailauth.spf_tree(book, "a.example").problems == ("a.example: has 2 SPF records",)


def test_strings_that_join_without_a_space_are_seen() -> None:
    """The seed's record: its two strings join to one term that is none."""
    book = Book('a.example TXT "v=spf1 ip4:192.0.2.0/29" "ip4:198.51.100.0/29 ~all"')
    (problem,) = mailauth.spf_tree(book, "a.example").problems
    assert "'ip4:192.0.2.0/29ip4:198.51.100.0/29' is no SPF term" in problem


def test_lookups_are_counted_through_includes() -> None:
    book = Book(
        'a.example TXT "v=spf1 include:b.example a mx:c.example -all"',
        'b.example TXT "v=spf1 a:b.example exists:%{i}.b.example -all"',
        "a.example A 192.0.2.1",
    )
    tree = mailauth.spf_tree(book, "a.example")
    assert (tree.lookups, tree.void, tree.problems) == (5, 1, ())


def test_an_include_of_itself_ends() -> None:
    book = Book('a.example TXT "v=spf1 include:a.example -all"')
    assert mailauth.spf_tree(book, "a.example").problems == ("a.example: includes itself",)


def test_a_record_without_an_end_is_seen() -> None:
    book = Book('a.example TXT "v=spf1 ip4:192.0.2.0/24"')
    assert mailauth.spf_tree(book, "a.example").problems


@pytest.fixture(scope="module")
def signed() -> tuple[bytes, str]:
    key = rsa.generate_private_key(65537, 1024)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    base64 = "".join(public.decode().splitlines()[1:-1])
    mail = letter("u@sub.a.example", "v@b.example").content
    field = dkim.sign(mail, b"K1", b"a.example", pem, canonicalize=(b"relaxed", b"relaxed"))
    return field + mail, f'k1._domainkey.a.example TXT "v=DKIM1; k=rsa; p={base64}"'


def test_a_signature_is_verified_and_read(signed: tuple[bytes, str]) -> None:
    mail, record = signed
    (found,) = mailauth.signatures(Book(record), mail)
    assert found.valid and not found.error
    assert (found.domain, found.selector) == ("a.example", "K1")
    assert found.canonicalization == "relaxed/relaxed"
    assert found.algorithm == "rsa-sha256"
    assert "from" in found.headers


def test_a_changed_body_is_seen(signed: tuple[bytes, str]) -> None:
    mail, record = signed
    (found,) = mailauth.signatures(Book(record), mail + b"more\r\n")
    assert not found.valid and found.error


def test_a_missing_key_is_seen(signed: tuple[bytes, str]) -> None:
    (found,) = mailauth.signatures(Book(), signed[0])
    assert not found.valid


def test_an_unsigned_mail_has_no_signature() -> None:
    assert mailauth.signatures(Book(), letter("a@a.example", "b@b.example").content) == []


def test_each_signature_counts(signed: tuple[bytes, str]) -> None:
    mail, record = signed
    field = mail[: mail.index(b"From:")]
    assert len(mailauth.signatures(Book(record), field + mail)) == 2


def verdict(book: Book, mail: bytes, sender: str, spf: str) -> mailauth.DmarcVerdict | None:
    def organization(name: str) -> str:
        return ".".join(name.split(".")[-2:])

    found = mailauth.signatures(book, mail)
    return mailauth.check_dmarc(book, organization, mail, sender, mailauth.Spf(spf, ""), found)


def test_dmarc_needs_alignment(signed: tuple[bytes, str]) -> None:
    mail, record = signed
    policy = '_dmarc.a.example TXT "v=DMARC1; p=reject"'
    book = Book(record, policy)
    both = verdict(book, mail, "u@sub.a.example", "pass")
    assert both is not None and both.through == ("spf", "dkim") and both.policy == "reject"
    other = verdict(book, mail, "u@elsewhere.example", "pass")
    assert other is not None and other.through == ("dkim",)
    none = verdict(Book(policy), mail, "u@sub.a.example", "softfail")
    assert none is not None and not none.passes


def test_dmarc_in_strict_mode_takes_no_parent(signed: tuple[bytes, str]) -> None:
    mail, record = signed
    book = Book(record, '_dmarc.a.example TXT "v=DMARC1; p=none; adkim=s; aspf=s"')
    found = verdict(book, mail, "u@a.example", "pass")
    assert found is not None and not found.passes


def test_no_policy_is_no_verdict(signed: tuple[bytes, str]) -> None:
    assert verdict(Book(signed[1]), signed[0], "u@a.example", "pass") is None


def test_lookup_answers_are_texts() -> None:
    book = Book("a.example A 192.0.2.1", "a.example AAAA 2001:db8::1", 'a.example TXT "x" "y"')
    assert book.addresses("a.example") == {ip_address("192.0.2.1"), ip_address("2001:db8::1")}
    assert book.txt("a.example") == ["xy"]
    assert book.texts("b.example", "A") == []
    assert cast(Any, book.answer("a.example", "A"))[0].rdtype == dns.rdatatype.A
