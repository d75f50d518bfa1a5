"""How a configuration reaches a host: three commands over ssh, each handing the agent a document.

1. ``<host>-secrets`` stages the secret files, inactive, under a keyed digest of them.
2. ``<host>-config`` hands over the public files and activates both. It names the digest that it
   expects as an argument: its document is made of site data alone, so that every preview knows
   it and shows the change of each file line by line, also while a secret is still unknown.
3. ``<host>-confirm`` is a second connection, which proves that the host can still be reached;
   it names the digest too, so that it runs again when only a secret changed.
   Without it the agent takes back a change of firewall, sshd or addresses.

Health checks are part of the second command's exit code: a gate that failed is tried again by
the next run. A command has no ``delete``, ``triggers`` or ``environment``: a replacement would
run the old ``delete`` against the new machine.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pulumi
from pulumi_command import Provider, remote

from mailsite.bundle import Bundle, File, secrets_json
from mailsite.cloud_init import AGENT
from mailsite.model import Host

#: What `cloud-init status --wait` looks for, which is another Python on a machine that boots.
#: The first push turns cloud-init off; nothing has to be waited for from then on.
_WAIT = (
    "until [ -e /run/cloud-init/result.json ] || [ -e /etc/cloud/cloud-init.disabled ];"
    " do sleep 0.2; done; "
)


@dataclass(frozen=True)
class ConfigPushArgs:
    """``secrets``: values by name, all that the host's bundle asks for.

    ``machine`` is the resource whose replacement calls for a new push, None for a machine that
    the platform did not make. It and ``after`` must be done before the host is configured.
    """

    host: Host
    bundle: Bundle
    secrets: Mapping[str, pulumi.Output[str]]
    digest_key: pulumi.Output[str]
    connection: remote.ConnectionArgs
    provider: Provider
    machine: pulumi.Resource | None
    after: Sequence[pulumi.Resource]


class ConfigPush(pulumi.ComponentResource):
    """The configuration of one host. ``done`` is the command that ends its push."""

    def __init__(
        self, name: str, args: ConfigPushArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("mail:index:ConfigPush", name, {}, opts)
        self._args = args
        public = args.bundle.public_json()
        before = list(args.after)
        if args.machine is not None:
            before.append(args.machine)
        label: pulumi.Output[str] | None = None
        if args.secrets:
            secret = self._secret_document()
            label = digest_of(secret)
            # A new machine answers before cloud-init has brought the agent.
            wait = _WAIT if args.machine else ""
            staged = self._command(
                f"{name}-secrets",
                f"{wait}sudo -n {AGENT} stage-secrets",
                stdin=secret,
                depends_on=before,
                logging=remote.Logging.NONE,
            )
            before = [staged]
        config = self._command(
            f"{name}-config", _agent("apply", label), stdin=public, depends_on=before
        )
        self.done = self._command(
            f"{name}-confirm",
            _agent("confirm", label),
            stdin=hashlib.sha256(public.encode()).hexdigest(),
            depends_on=[config],
        )
        self.register_outputs({})

    def _secret_document(self) -> pulumi.Output[str]:
        args = self._args
        names = sorted(args.secrets)
        values = pulumi.Output.all(args.digest_key, *(args.secrets[name] for name in names))

        def build(resolved: Sequence[str]) -> str:
            key, *rest = resolved
            files = args.bundle.with_secrets(dict(zip(names, rest, strict=True)))
            return sealed_json(args.host.name, files, key)

        return pulumi.Output.secret(values.apply(build))

    def _command(
        self,
        name: str,
        create: pulumi.Input[str],
        *,
        stdin: pulumi.Input[str],
        depends_on: Sequence[pulumi.Resource],
        logging: remote.Logging = remote.Logging.STDOUT_AND_STDERR,
    ) -> remote.Command:
        args = self._args
        return remote.Command(
            name,
            connection=args.connection,
            create=create,
            stdin=stdin,
            logging=logging,
            add_previous_output_in_env=False,
            opts=pulumi.ResourceOptions(
                parent=self,
                provider=args.provider,
                depends_on=list(depends_on),
                replace_with=[args.machine] if args.machine is not None else None,
                # Dialling goes on until the host answers; the first boot installs packages.
                custom_timeouts=pulumi.CustomTimeouts(create="30m", update="30m"),
            ),
        )


def _agent(command: str, label: pulumi.Output[str] | None) -> pulumi.Input[str]:
    """The line that runs the agent; ``label`` names the secrets that it shall find staged."""
    line = f"sudo -n {AGENT} {command}"
    return line if label is None else label.apply(lambda digest: f"{line} --secrets {digest}")


def sealed_json(host: str, files: Mapping[str, File], key: str) -> str:
    """The document of the secret files, under a digest that says nothing without ``key``.

    ``host`` is the FQDN, ``files`` maps paths on the host to files.
    """
    plain = secrets_json(host, "", files)
    digest = hmac.new(key.encode(), plain.encode(), hashlib.sha256).hexdigest()
    return secrets_json(host, digest, files)


def digest_of(document: pulumi.Output[str]) -> pulumi.Output[str]:
    """The digest that a secret document carries. It is public: only the key's owner can use it."""

    def read(text: str) -> str:
        digest = json.loads(text)["digest"]
        if not isinstance(digest, str):
            raise TypeError("a secret document without a digest")
        return digest

    return pulumi.Output.unsecret(document.apply(read))
