"""pulumi-command (1.2): commands on remote hosts, over real ssh.

As in the real provider a change of any input runs ``update`` (or ``create`` where there is
none) on the host, ``triggers`` replace, every command opens a connection of its own and tries
again when it cannot, whatever the reason. Unlike it, a time-out of the program's and an
interruption end a running command too, and no agent is taken from the caller's environment.
"""

from __future__ import annotations

import asyncio
import errno
import json
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol, TypeVar

import asyncssh

from .base import Call, Created, Failure, Input, Output, Provider, ProviderError, Resource
from .values import UNKNOWN, Properties

_Result = TypeVar("_Result")

FIRST_DELAY: Final = 0.1
BACKOFF: Final = 1.5
LONGEST_DELAY: Final = 5.0
"""Seconds between dials: the first pause, its growth and its limit."""

KEEPALIVE: Final = 15
"""Seconds between signs of life that are asked of a host while a command runs."""

_CONNECTION: Final = {
    "host": str,
    "port": int,
    "user": str,
    "password": str,
    "privateKey": str,
    "privateKeyPassword": str,
    "agentSocketPath": str,
    "hostKey": str,
    "dialErrorLimit": int,
    "perDialTimeout": int,
    "proxy": dict,
}


def _quote(text: str) -> str:
    """The text as Go's %q shows it."""
    return json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True)
class Target:
    """Where a command runs and how to get there: the ``connection`` of a Command."""

    host: str
    port: int
    user: str
    host_key: asyncssh.SSHKey | None
    client_key: asyncssh.SSHKey | None
    password: str | None
    agent: str | None
    dial_limit: int
    dial_timeout: int

    @classmethod
    def of(cls, connection: Properties) -> Target:
        """Read a connection. Raises :class:`ProviderError` for a key that is none."""
        try:
            text = connection.get("hostKey")
            host_key = asyncssh.import_public_key(text) if text is not None else None
        except asyncssh.KeyImportError as error:
            raise ProviderError(f"failed to parse host key: {error}") from error
        try:
            text = connection.get("privateKey")
            client_key = (
                asyncssh.import_private_key(text, connection.get("privateKeyPassword"))
                if text is not None
                else None
            )
        except asyncssh.KeyImportError as error:
            raise ProviderError(f"ssh: no key found: {error}") from error
        return cls(
            host=connection["host"],
            port=connection.get("port", 22),
            user=connection.get("user", "root"),
            host_key=host_key,
            client_key=client_key,
            password=connection.get("password"),
            agent=connection.get("agentSocketPath"),
            dial_limit=connection.get("dialErrorLimit", 10),
            dial_timeout=connection.get("perDialTimeout", 15),
        )

    @property
    def endpoint(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def explain(self, error: BaseException) -> str:
        """Why a dial failed, in the real provider's words."""
        handshake = "ssh: handshake failed: "
        if isinstance(error, TimeoutError):
            return f"dial tcp {self.endpoint}: i/o timeout"
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            return f"{handshake}ssh: host key mismatch"
        if isinstance(error, asyncssh.PermissionDenied):
            return f"{handshake}ssh: unable to authenticate: {error.reason}"
        if isinstance(error, asyncssh.ConnectionLost):
            return f"{handshake}EOF"
        if isinstance(error, asyncssh.Error):
            return f"{handshake}{error.reason}"
        if isinstance(error, OSError):
            words = {
                errno.ECONNREFUSED: "connection refused",
                errno.EHOSTUNREACH: "no route to host",
                errno.ENETUNREACH: "network is unreachable",
                errno.ECONNRESET: "connection reset by peer",
            }
            reason = words.get(error.errno or 0, error.strerror or str(error))
            return f"dial tcp {self.endpoint}: connect: {reason}"
        raise error

    @asynccontextmanager
    async def keys(self) -> AsyncIterator[list[asyncssh.SSHKey | asyncssh.SSHKeyPair]]:
        """What to log in with: the program's key, then those of the agent that it names."""
        own = [self.client_key] if self.client_key is not None else []
        if self.agent is None:
            yield [*own]
            return
        try:
            agent = await asyncssh.connect_agent(self.agent)
        except OSError as error:
            raise ProviderError(f"dial unix {self.agent}: connect: {error.strerror}") from error
        async with agent:
            yield [*own, *await agent.get_keys()]

    async def connect(
        self, keys: list[asyncssh.SSHKey | asyncssh.SSHKeyPair]
    ) -> asyncssh.SSHClientConnection:
        """Dial once."""
        options: dict[str, Any] = {}
        if self.host_key is not None:
            algorithm = self.host_key.algorithm.decode()
            options["server_host_key_algs"] = [algorithm]
            options["known_hosts"] = ([self.host_key], [], [])
        else:
            options["known_hosts"] = None
        return await asyncssh.connect(
            self.host,
            self.port,
            username=self.user,
            client_keys=keys or None,
            password=self.password,
            agent_path=None,
            config=None,
            connect_timeout=self.dial_timeout or None,
            login_timeout=self.dial_timeout,
            keepalive_interval=KEEPALIVE,
            **options,
        )

    async def dial(self, call: Call) -> asyncssh.SSHClientConnection:
        """Dial until it works, at most ``dial_limit`` times more than once (-1: for ever)."""
        async with self.keys() as keys:
            return await self._dial(keys, call)

    async def _dial(
        self, keys: list[asyncssh.SSHKey | asyncssh.SSHKeyPair], call: Call
    ) -> asyncssh.SSHClientConnection:
        failed, delay = 0, FIRST_DELAY
        while True:
            try:
                return await self.connect(keys)
            except (OSError, asyncssh.Error) as error:
                reason = self.explain(error)
            if -1 < self.dial_limit <= failed:
                raise ProviderError(f"after {failed} failed attempts: {reason}")
            failed += 1
            limit = "inf" if self.dial_limit == -1 else str(self.dial_limit)
            await asyncio.to_thread(
                call.info, f"Dial {failed}/{limit} failed: retrying ({reason})", transient=True
            )
            await asyncio.sleep(delay)
            delay = min(delay * BACKOFF, LONGEST_DELAY)


class Loop:
    """An event loop in a thread of its own, for work that gRPC's threads wait for."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ssh", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _Result], call: Call) -> _Result:
        """Wait for ``work``, at most for the operation's time-out, and while nobody interrupts."""
        future: Future[_Result] = asyncio.run_coroutine_threadsafe(
            asyncio.wait_for(work, call.timeout), self._loop
        )
        with call.interruptible(lambda: bool(future.cancel())):
            try:
                return future.result()
            except TimeoutError:
                raise ProviderError("context deadline exceeded") from None
            except CancelledError:
                raise ProviderError("context canceled") from None

    def close(self) -> None:
        """End the loop; what still runs in it is cancelled."""

        async def drain() -> None:
            rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in rest:
                task.cancel()
            if rest:
                await asyncio.wait(rest, timeout=5)

        asyncio.run_coroutine_threadsafe(drain(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass
class Outcome:
    """What a command printed."""

    stdout: str
    stderr: str


class Shell(Protocol):
    """Runs commands on hosts."""

    async def run(
        self,
        connection: Properties,
        command: str,
        stdin: str,
        logged: frozenset[str],
        call: Call,
    ) -> Outcome:
        """Run ``command`` in the login shell of the connection's user.

        ``logged`` says which of its streams the operator sees, line by line. Raises
        :class:`ProviderError` with the command and its output, never its input.
        """


class Ssh:
    """Real ssh. ``guard`` is called before each connection; it raises where it could lead out."""

    def __init__(self, guard: Callable[[], None]) -> None:
        self._guard = guard

    async def run(
        self,
        connection: Properties,
        command: str,
        stdin: str,
        logged: frozenset[str],
        call: Call,
    ) -> Outcome:
        target = Target.of(connection)
        self._guard()
        client = await target.dial(call)
        try:
            process = await client.create_process(command, encoding=None)
            return await _follow(process, command, stdin, logged, call)
        except (asyncssh.Error, OSError) as error:
            raise ProviderError(f"{error}: running {_quote(command)}") from error
        finally:
            client.abort()


async def _follow(
    process: asyncssh.SSHClientProcess[bytes],
    command: str,
    stdin: str,
    logged: frozenset[str],
    call: Call,
) -> Outcome:
    if stdin:
        process.stdin.write(stdin.encode())
    process.stdin.write_eof()

    kept: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    both: list[bytes] = []

    async def gather(name: str, stream: asyncssh.SSHReader[bytes]) -> None:
        while line := await stream.readline():
            kept[name].append(line)
            both.append(line)
            if name in logged:
                await asyncio.to_thread(call.info, line.decode(errors="replace").rstrip("\n"))

    await asyncio.gather(gather("stdout", process.stdout), gather("stderr", process.stderr))
    await process.wait_closed()
    if process.exit_status != 0:
        said = b"".join(both).decode(errors="replace")
        raise ProviderError(f"{_ending(process)}: running {_quote(command)}:\n{said}")

    def text(name: str) -> str:
        return b"".join(kept[name]).decode(errors="replace").removesuffix("\n")

    return Outcome(text("stdout"), text("stderr"))


def _ending(process: asyncssh.SSHClientProcess[bytes]) -> str:
    if process.exit_signal is not None:
        return f"Process exited with status 128 from signal {process.exit_signal[0]}"
    if process.exit_status is None:
        return "wait: remote command exited without exit status or exit signal"
    return f"Process exited with status {process.exit_status}"


LOGGED: Final[Mapping[str, frozenset[str]]] = {
    "stdout": frozenset({"stdout"}),
    "stderr": frozenset({"stderr"}),
    "stdoutAndStderr": frozenset({"stdout", "stderr"}),
    "none": frozenset(),
}


class RemoteCommand(Resource):
    """A command on a host: ``command.remote.Command``."""

    token = "command:remote:Command"
    inputs: ClassVar[Mapping[str, Input]] = {
        "connection": Input("map", required=True, secret=True),
        "create": Input("string"),
        "update": Input("string"),
        "delete": Input("string"),
        "stdin": Input("string"),
        "logging": Input("string"),
        "environment": Input("map"),
        "addPreviousOutputInEnv": Input("boolean"),
        "triggers": Input("list", replaces=True),
    }
    outputs: ClassVar[Mapping[str, Output]] = {
        "stdout": Output(volatile=True),
        "stderr": Output(volatile=True),
    }

    def __init__(self, loop: Loop, shell: Shell) -> None:
        self._loop = loop
        self._shell = shell

    def check(self, inputs: Properties) -> Iterator[Failure]:
        if inputs.get("logging", "none") is not UNKNOWN:
            logging = inputs.get("logging", "none")
            if logging not in LOGGED:
                yield Failure("logging", f"{logging!r} is none of {', '.join(LOGGED)}")
        if inputs.get("environment"):
            yield Failure(
                "environment",
                "sshd takes only the variables that its AcceptEnv lists, and the stand-in sends "
                "none; prefix the command with VAR=value, or use stdin",
            )
        connection = inputs["connection"]
        if connection is UNKNOWN:
            return
        if "host" not in connection:
            yield Failure("connection.host", "Missing required property 'host'")
        for key, value in connection.items():
            kind = _CONNECTION.get(key)
            if kind is None:
                yield Failure(f"connection.{key}", "Invalid or unknown key")
            elif value is not UNKNOWN and not isinstance(value, kind):
                yield Failure(f"connection.{key}", f"expected {kind.__name__}")
        if "proxy" in connection:
            yield Failure("connection.proxy", "the stand-in knows no way over a bastion")

    def _run(
        self, command: str | None, inputs: Properties, call: Call, previous: Properties
    ) -> Properties:
        if command is None:
            return {key: previous.get(key, "") for key in self.outputs}
        if inputs.get("addPreviousOutputInEnv", True):
            for key in self.outputs:
                if previous.get(key):
                    call.warning(
                        f"Unable to set 'PULUMI_COMMAND_{key.upper()}'. This only works if your "
                        "SSH server is configured to accept these variables via AcceptEnv; "
                        "set addPreviousOutputInEnv to false"
                    )
        outcome = self._loop.run(
            self._shell.run(
                inputs["connection"],
                command,
                inputs.get("stdin", ""),
                LOGGED[inputs.get("logging", "stdoutAndStderr")],
                call,
            ),
            call,
        )
        return {"stdout": outcome.stdout, "stderr": outcome.stderr}

    def create(self, inputs: Properties, call: Call) -> Created:
        outputs = self._run(inputs.get("create"), inputs, call, {})
        return Created(call.name + secrets.token_hex(4), outputs)

    def update(self, id: str, old: Properties, new: Properties, call: Call) -> Properties:
        return self._run(new.get("update", new.get("create")), new, call, old)

    def delete(self, id: str, state: Properties, call: Call) -> None:
        self._run(state.get("delete"), state, call, state)


class Command(Provider):
    """The package ``command``."""

    package = "command"

    def __init__(self, shell: Shell) -> None:
        self._loop = Loop()
        super().__init__({RemoteCommand.token: RemoteCommand(self._loop, shell)})

    def close(self) -> None:
        self._loop.close()
