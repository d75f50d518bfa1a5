"""Every secret of the platform: given by the operator, or generated once and kept in the state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_random as random
import pulumi_tls as tls

from mailsite import secret_names
from mailsite.model import Platform
from mailsite.records import dkim_keys
from mailsite.rspamd_password import SALT_BYTES, password_hash

_PASSWORD_LENGTH = 32  # bcrypt reads 72 bytes, Rspamd 64


_CERTIFICATE = "certificate/"
_SASL_PASSWORD = "sasl-password/"  # noqa: S105 - a name
_ACME = "acme/"
_SSH_PAIRS = ("pull-key/", "holder-key/")
#: What the graph cannot make, so that the operator has to give it.
_GIVEN = (_CERTIFICATE, _ACME)


class MissingSecretsError(ValueError):
    """Secrets that only the operator can give are not in the stack's configuration."""


@dataclass(frozen=True)
class SecretStoreArgs:
    """``given``: secrets by name, as secret Outputs. ``hosts``: VMs that need an ssh host key.

    ``needed`` are the names that some host's bundle asks for.
    """

    platform: Platform
    given: Mapping[str, pulumi.Output[str]]
    hosts: Iterable[str]
    needed: Iterable[str]


class SecretStore(pulumi.ComponentResource):
    """DKIM keys, ssh host keys, passwords and certificates, by name.

    Names are those of :mod:`mailsite.secret_names`. A generated secret stays the same from run to
    run; its password hash too, so that no push happens for a fresh salt.
    """

    def __init__(
        self, name: str, args: SecretStoreArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("mail:index:SecretStore", name, {}, opts)
        self._private: dict[str, pulumi.Output[str]] = {}
        self._public: dict[str, pulumi.Output[str]] = {}
        #: Those that were generated, for whoever is to log in.
        self.sasl_passwords: dict[str, pulumi.Output[str]] = {}
        self.mailbox_passwords: dict[str, pulumi.Output[str]] = {}
        child = pulumi.ResourceOptions(parent=self)

        for domain, key in dkim_keys(args.platform):
            secret = secret_names.dkim_key(domain.name, key.selector)
            if not self._take(args.given, secret):
                pair = tls.PrivateKey(
                    f"dkim-{domain.name}-{key.selector}",
                    algorithm="RSA",
                    rsa_bits=key.bits,
                    opts=child,
                )
                self._put(secret, pair.private_key_pem, pair.public_key_pem)
        for host in args.hosts:
            secret = secret_names.ssh_host_key(host)
            if not self._take(args.given, secret):
                pair = tls.PrivateKey(f"{host}-ssh-host-key", algorithm="ED25519", opts=child)
                self._put(secret, pair.private_key_openssh, pair.public_key_openssh)
        for user in args.platform.sasl_users.values():
            generated = self._login(
                secret_names.sasl_hash(user.name), user.password_hash, args.given, child
            )
            if generated is not None:
                self.sasl_passwords[user.name] = generated
                self._put(secret_names.sasl_password(user.name), generated)
        for mailbox in args.platform.mailboxes.values():
            generated = self._login(
                secret_names.mailbox_hash(mailbox.name), mailbox.password_hash, args.given, child
            )
            if generated is not None:
                self.mailbox_passwords[mailbox.name] = generated
        for secret in args.needed:
            if secret in self._private or self._take(args.given, secret):
                continue
            if secret == secret_names.rspamd_controller_hash():
                self._put(secret, self._controller_hash(args.given, child))
            elif secret.startswith(_GIVEN):
                # Only previews come here, see require(): it is not there yet.
                self._put(secret, _unknown())
            elif secret.startswith(_SSH_PAIRS):
                self._ssh_pair(secret.removesuffix("/public"), args.given, child)
            else:
                self._put(secret, _password(secret, child).result)
        #: Makes the digests of secret bundles useless to whoever guesses at their content.
        self.digest_key: pulumi.Output[str] = pulumi.Output.secret(
            random.RandomPassword("digest-key", length=64, special=False, opts=child).result
        )
        self.register_outputs({})

    def get(self, name: str) -> pulumi.Output[str]:
        """The secret ``name``, as a secret Output.

        Raises:
            KeyError: no such secret was asked for when the store was made.
        """
        return self._private[name]

    def public(self, name: str) -> pulumi.Output[str]:
        """The public half of a key pair: PEM of a DKIM key, OpenSSH line of a host key."""
        return self._public[name]

    def _login(
        self,
        secret: str,
        known: str | None,
        given: Mapping[str, pulumi.Output[str]],
        child: pulumi.ResourceOptions,
    ) -> pulumi.Output[str] | None:
        """Put the hash that ``secret`` names. Returns the password where it is generated here."""
        if known is not None:
            self._put(secret, pulumi.Output.from_input(known))
            return None
        if self._take(given, secret):
            return None
        password = _password(secret, child)
        self._put(secret, password.bcrypt_hash.apply(lambda h: "{BLF-CRYPT}" + h))
        return pulumi.Output.secret(password.result)

    def _ssh_pair(
        self, secret: str, given: Mapping[str, pulumi.Output[str]], child: pulumi.ResourceOptions
    ) -> None:
        """Put both halves of an ssh key; the public one is a secret's name too."""
        if not self._take(given, secret):
            kind, _, host = secret.partition("/")
            pair = tls.PrivateKey(f"{host}-{kind}", algorithm="ED25519", opts=child)
            self._put(secret, pair.private_key_openssh, pair.public_key_openssh)
        self._put(secret_names.public(secret), self._public[secret])

    def _controller_hash(
        self, given: Mapping[str, pulumi.Output[str]], child: pulumi.ResourceOptions
    ) -> pulumi.Output[str]:
        """The hash of the controller's password, the same from run to run."""
        plain = secret_names.rspamd_controller_password()
        if plain not in self._private and not self._take(given, plain):
            self._put(plain, _password(plain, child).result)
        salt = f"{secret_names.rspamd_controller_hash()}-salt"
        return pulumi.Output.all(self._private[plain], _password(salt, child).result).apply(
            lambda both: password_hash(
                both[0], hashlib.sha256(both[1].encode()).digest()[:SALT_BYTES]
            )
        )

    def _put(
        self,
        name: str,
        private: pulumi.Output[str],
        public: pulumi.Output[str] | None = None,
    ) -> None:
        self._private[name] = pulumi.Output.secret(private)
        if public is not None:
            self._public[name] = pulumi.Output.unsecret(public).apply(str.strip)

    def _take(self, given: Mapping[str, pulumi.Output[str]], name: str) -> bool:
        if name not in given:
            return False
        is_pair = name.startswith(("dkim/", "ssh-host-key/", *_SSH_PAIRS))
        self._put(name, given[name], given[name].apply(public_half) if is_pair else None)
        return True


def _password(name: str, opts: pulumi.ResourceOptions) -> random.RandomPassword:
    """A password of letters and digits alone, which every configuration file takes as it is."""
    return random.RandomPassword(
        name.replace("/", "-"), length=_PASSWORD_LENGTH, special=False, opts=opts
    )


def _unknown() -> pulumi.Output[str]:
    value: Any = pulumi.UNKNOWN
    return pulumi.Output.from_input(value)


def require(needed: Iterable[str], given: Mapping[str, pulumi.Output[str]]) -> None:
    """Make sure that the operator gave what the graph cannot generate.

    A preview only warns of certificates, so that it works before the first one is there.

    Raises:
        MissingSecretsError: an update lacks a certificate; or of the login of a machine only one
            of password and hash was given.
    """
    needed = tuple(needed)
    for name in (n for n in needed if n.startswith(_SASL_PASSWORD)):
        user = name.removeprefix(_SASL_PASSWORD)
        both = (name, secret_names.sasl_hash(user))
        absent = [part for part in both if part not in given]
        if len(absent) == 1:
            raise MissingSecretsError(
                f"a machine of the platform logs in as {user}, and mail:secrets has one alone of"
                " password and hash; give the other one too, run: pulumi config set --secret --path"
                f" 'mail:secrets[\"{absent[0]}\"]', or remove both to have them generated"
            )
    missing = sorted(name for name in set(needed) if name.startswith(_GIVEN) and name not in given)
    if not missing:
        return
    text = "\n".join(_remedies(missing))
    if not pulumi.runtime.is_dry_run():
        raise MissingSecretsError(text)
    pulumi.log.warn(text)


def _remedies(missing: Iterable[str]) -> Iterator[str]:
    """What to run to give the secrets ``missing``, in lines."""
    command = "  pulumi config set --secret --path"
    certificates = [name for name in missing if name.startswith(_CERTIFICATE)]
    if certificates:
        yield "certificates are missing from the stack's configuration; run:"
    for name in certificates:
        _, service, part = name.split("/")
        path = f'mail:certificates["{service}"].{part}'
        yield f"{command} '{path}' < {service}.{part}.pem"
    tokens = [name for name in missing if name.startswith(_ACME)]
    if tokens:
        yield "secrets of the ACME client are missing from the stack's configuration; run:"
    for name in tokens:
        yield f"{command} 'mail:secrets[\"{name}\"]' < {name.removeprefix(_ACME)}.txt"


def public_half(private: str) -> str:
    """The public key of an RSA key in PEM, or of an ssh key in OpenSSH's format."""
    from cryptography.hazmat.primitives import serialization as form

    data = private.encode()
    if "BEGIN OPENSSH PRIVATE KEY" in private:
        public = form.load_ssh_private_key(data, password=None).public_key()
        return public.public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode()
    key = form.load_pem_private_key(data, password=None).public_key()
    return key.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo).decode()
