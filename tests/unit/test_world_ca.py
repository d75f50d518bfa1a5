"""The rehearsal's certificate authority, seen by OpenSSL's own verification."""

from __future__ import annotations

import datetime
import hashlib
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from rehearsal.ca import Authority, Issued


def handshake(tmp_path: Path, issued: Issued, trust: str, name: str) -> None:
    """Present ``issued`` to a client that trusts ``trust`` and expects ``name``."""
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_text(issued.chain)
    key.write_text(issued.key)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(chain, key)
    client = ssl.create_default_context(cadata=trust)
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(ours, server_hostname=name).close()
    finally:
        ours.close()
        thread.join()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.mark.parametrize("name", ["mail.site.org", "a.wild.org", "192.0.2.7"])
def test_clients_take_the_chain_for_its_names(
    tmp_path: Path, authority: Authority, name: str
) -> None:
    issued = authority.issue(["mail.site.org", "*.wild.org", "192.0.2.7"])
    handshake(tmp_path, issued, authority.root_pem, name)


@pytest.mark.parametrize("name", ["other.site.org", "wild.org", "a.b.wild.org"])
def test_clients_refuse_other_names(tmp_path: Path, authority: Authority, name: str) -> None:
    issued = authority.issue(["mail.site.org", "*.wild.org"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, issued, authority.root_pem, name)


def test_a_service_that_forgets_the_intermediate_is_refused(
    tmp_path: Path, authority: Authority
) -> None:
    issued = authority.issue(["mail.site.org"])
    leaf = issued.certificate.public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, Issued(leaf, issued.key, ()), authority.root_pem, "mail.site.org")


def test_another_authority_is_refused(tmp_path: Path, authority: Authority) -> None:
    other = Authority(tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, other.issue(["mail.site.org"]), authority.root_pem, "mail.site.org")


def test_self_signed_is_refused_but_has_its_digest(tmp_path: Path, authority: Authority) -> None:
    issued = authority.self_signed(["mx.dane.org"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, issued, authority.root_pem, "mx.dane.org")
    public = issued.certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert issued.public_key_sha256 == hashlib.sha256(public).hexdigest()


def test_a_second_run_finds_the_same(tmp_path: Path, authority: Authority) -> None:
    again = Authority(tmp_path / "ca")
    assert again.issue(["mail.site.org"]) == authority.issue(["mail.site.org"])
    assert again.root_pem == authority.root_pem
    assert again.issue(["mail.site.net"]).key != authority.issue(["mail.site.org"]).key


def test_a_certificate_near_its_end_is_issued_anew(tmp_path: Path, authority: Authority) -> None:
    first = authority.issue(["mail.site.org"], days=90)
    early = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=59)
    late = early + datetime.timedelta(days=2)
    assert Authority(tmp_path / "ca", lambda: early).issue(["mail.site.org"], days=90) == first
    assert Authority(tmp_path / "ca", lambda: late).issue(["mail.site.org"], days=90) != first


def test_only_the_owner_may_read(tmp_path: Path, authority: Authority) -> None:
    authority.issue(["mail.site.org"])
    authority.self_signed(["mx.dane.org"])
    found = [*(tmp_path / "ca").rglob("*"), tmp_path / "ca"]
    assert len(found) == 7
    assert all(path.stat().st_mode & 0o077 == 0 for path in found)


def test_no_name_no_certificate(authority: Authority) -> None:
    with pytest.raises(ValueError, match="needs a name"):
        authority.issue([])
