"""The command stand-in over real ssh, to a server of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh
import grpc
import pytest
from google.protobuf import empty_pb2
from pulumi.runtime.proto import engine_pb2, engine_pb2_grpc, provider_pb2

from rehearsal.progress import RehearsalError
from rehearsal.standins.base import serving
from rehearsal.standins.command import Command, RemoteCommand, Ssh
from rehearsal.standins.values import UNKNOWN, Properties, Secret, plain, to_struct
from tests.engine.client import Client, Refused, connected, connection, urn

TYPE = RemoteCommand.token
HOST_KEY, OTHER_KEY, USER_KEY = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(3))


@functools.cache  # it is padded anew each time
def private(key: asyncssh.SSHKey) -> str:
    return key.export_private_key().decode()


def public(key: asyncssh.SSHKey) -> str:
    return key.export_public_key().decode()


@dataclass
class Sshd:
    """An ssh server on a port of 127.0.0.1 that runs commands with sh."""

    port: int
    commands: list[str] = field(default_factory=list)
    sessions: int = 0
    """Commands that are running."""

    @property
    def connection(self) -> Properties:
        return {
            "host": "127.0.0.1",
            "port": self.port,
            "user": "deploy",
            "privateKey": private(USER_KEY),
            "hostKey": public(HOST_KEY),
            "dialErrorLimit": 1,
        }

    async def handle(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        self.commands.append(process.command or "")
        self.sessions += 1
        pipe = asyncio.subprocess.PIPE
        shell = await asyncio.create_subprocess_shell(
            process.command or "true",
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
        )

        async def copy(source: Any, target: Any) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()

        async def feed() -> None:
            await copy(process.stdin, shell.stdin)
            assert shell.stdin is not None
            shell.stdin.close()

        async def hang_up() -> None:
            await process.wait_closed()
            os.killpg(shell.pid, signal.SIGKILL)

        beside = [asyncio.create_task(feed()), asyncio.create_task(hang_up())]
        await asyncio.gather(copy(shell.stdout, process.stdout), copy(shell.stderr, process.stderr))
        status = await shell.wait()
        self.sessions -= 1
        for task in beside:
            task.cancel()
        if status < 0:
            process.exit_with_signal("KILL")
        else:
            process.exit(status)


class _Login(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return True


@contextmanager
def listening(port: int = 0) -> Iterator[Sshd]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    sshd = Sshd(port)

    async def start() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            port,
            server_host_keys=[HOST_KEY],
            authorized_client_keys=asyncssh.import_authorized_keys(public(USER_KEY)),
            process_factory=sshd.handle,
            server_factory=_Login,
            encoding=None,
        )

    acceptor = asyncio.run_coroutine_threadsafe(start(), loop).result()
    sshd.port = acceptor.get_port()
    try:
        yield sshd
    finally:

        async def stop() -> None:
            acceptor.close()
            rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in rest:
                task.cancel()
            if rest:
                await asyncio.wait(rest, timeout=1)

        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def sshd() -> Iterator[Sshd]:
    with listening() as server:
        yield server


@pytest.fixture
def client() -> Iterator[Client]:
    with connected(Command(Ssh(lambda: None))) as one:
        yield one


def wait_until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_a_command_gets_its_input_and_its_output_is_kept(client: Client, sshd: Sshd) -> None:
    made = client.create(
        TYPE,
        {
            "connection": sshd.connection,
            "create": "cat; echo; echo warned >&2",
            "stdin": "one\ntwo",
        },
    )
    assert made.state["stdout"] == "one\ntwo"
    assert made.state["stderr"] == "warned"
    assert made.id.startswith("it")
    assert isinstance(made.state["connection"], Secret)


def test_a_large_bundle_arrives_whole(client: Client, sshd: Sshd) -> None:
    text = "x" * 79 + "\n"
    made = client.create(
        TYPE, {"connection": sshd.connection, "create": "wc -c", "stdin": text * 40_000}
    )
    assert made.state["stdout"].strip() == str(80 * 40_000)


def test_without_input_a_command_reads_nothing(client: Client, sshd: Sshd) -> None:
    made = client.create(TYPE, {"connection": sshd.connection, "create": "wc -c"})
    assert made.state["stdout"].strip() == "0"


def test_a_failure_shows_the_command_and_what_it_said_but_not_its_input(
    client: Client, sshd: Sshd
) -> None:
    with pytest.raises(Refused) as failed:
        client.create(
            TYPE,
            {
                "connection": sshd.connection,
                "create": 'echo "line 7"; echo bad >&2; cat >/dev/null; exit 3',
                "stdin": "a secret",
            },
        )
    text = str(failed.value)
    assert text.startswith(
        'Process exited with status 3: running "echo \\"line 7\\"; echo bad >&2;'
    )
    assert "\nline 7\n" in text
    assert "\nbad\n" in text
    assert "a secret" not in text
    assert private(USER_KEY).splitlines()[1] not in text


def test_a_killed_command_says_so(client: Client, sshd: Sshd) -> None:
    with pytest.raises(Refused, match="from signal KILL"):
        client.create(TYPE, {"connection": sshd.connection, "create": "kill -9 $$"})


def test_another_host_key_is_refused(client: Client, sshd: Sshd) -> None:
    there = {**sshd.connection, "hostKey": public(OTHER_KEY)}
    with pytest.raises(Refused, match=r"after 1 failed attempts: .*host key mismatch"):
        client.create(TYPE, {"connection": there, "create": "true"})
    assert sshd.commands == []


def test_another_login_key_is_refused(client: Client, sshd: Sshd) -> None:
    there = {**sshd.connection, "privateKey": private(OTHER_KEY)}
    with pytest.raises(Refused, match="handshake failed: ssh: unable to authenticate"):
        client.create(TYPE, {"connection": there, "create": "true"})


@pytest.mark.skipif(shutil.which("ssh-agent") is None, reason="no ssh-agent (openssh-client)")
def test_a_key_may_come_from_an_agent(client: Client, sshd: Sshd, tmp_path: Path) -> None:
    key, path = tmp_path / "key", tmp_path / "agent"
    key.touch(mode=0o600)
    key.write_text(private(USER_KEY))
    there = {k: v for k, v in sshd.connection.items() if k != "privateKey"}
    with subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL) as agent:
        try:
            wait_until(path.exists)
            subprocess.run(
                ["ssh-add", "-q", key], env={"SSH_AUTH_SOCK": str(path)}, check=True, timeout=10
            )
            there["agentSocketPath"] = str(path)
            made = client.create(TYPE, {"connection": there, "create": "echo in"})
        finally:
            agent.terminate()
    assert made.state["stdout"] == "in"


def test_a_stale_agent_is_an_error_at_once(client: Client, sshd: Sshd) -> None:
    there = {**sshd.connection, "agentSocketPath": "/nowhere/agent", "dialErrorLimit": -1}
    with pytest.raises(Refused, match="dial unix /nowhere/agent: connect: No such file"):
        client.create(TYPE, {"connection": there, "create": "true"})


def test_the_caller_s_own_agent_is_not_asked(
    client: Client, sshd: Sshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "stale"))
    client.create(TYPE, {"connection": sshd.connection, "create": "true"})


def test_a_key_that_is_none_is_refused_at_once(client: Client, sshd: Sshd) -> None:
    there = {**sshd.connection, "privateKey": "no key"}
    with pytest.raises(Refused, match="ssh: no key found") as failed:
        client.create(TYPE, {"connection": there, "create": "true"})
    assert "no key\n" not in str(failed.value)
    there = {**sshd.connection, "hostKey": "no key"}
    with pytest.raises(Refused, match="failed to parse host key"):
        client.create(TYPE, {"connection": there, "create": "true"})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def test_a_closed_port_is_tried_as_often_as_wanted(client: Client) -> None:
    there = {"host": "127.0.0.1", "port": free_port(), "user": "deploy", "dialErrorLimit": 2}
    with pytest.raises(
        Refused, match=r"after 2 failed attempts: dial tcp 127.0.0.1:\d+: connect: connection ref"
    ):
        client.create(TYPE, {"connection": there, "create": "true"})


def test_a_host_that_comes_up_late_is_waited_for(client: Client, sshd: Sshd) -> None:
    port = free_port()
    there = {**sshd.connection, "port": port, "dialErrorLimit": -1}
    with futures.ThreadPoolExecutor() as pool:
        coming = pool.submit(client.create, TYPE, {"connection": there, "create": "echo up"})
        assert not futures.wait([coming], timeout=0.5).done
        with listening(port):
            assert coming.result().state["stdout"] == "up"


def test_a_silent_host_is_given_up_after_the_time_for_one_dial(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        there = {
            "host": "127.0.0.1",
            "port": deaf.getsockname()[1],
            "dialErrorLimit": 0,
            "perDialTimeout": 1,
        }
        with pytest.raises(Refused, match=r"i/o timeout|handshake failed"):
            client.create(TYPE, {"connection": there, "create": "true"})


def test_the_program_s_timeout_ends_waiting_and_running(client: Client, sshd: Sshd) -> None:
    nowhere = {**sshd.connection, "port": free_port(), "dialErrorLimit": -1}
    with pytest.raises(Refused, match="context deadline exceeded"):
        client.create(TYPE, {"connection": nowhere, "create": "true"}, timeout=0.3)
    with pytest.raises(Refused, match="context deadline exceeded"):
        client.create(TYPE, {"connection": sshd.connection, "create": "sleep 60"}, timeout=0.5)


def test_an_interruption_ends_a_running_command(client: Client, sshd: Sshd) -> None:
    with futures.ThreadPoolExecutor() as pool:
        running = pool.submit(
            client.create, TYPE, {"connection": sshd.connection, "create": "sleep 60"}
        )
        wait_until(lambda: sshd.sessions)
        client.cancel()
        with pytest.raises(Refused, match="context canceled"):
            running.result(timeout=10)


def test_an_engine_that_is_gone_ends_its_command(client: Client, sshd: Sshd) -> None:
    inputs = {"connection": sshd.connection, "create": "sleep 60"}
    request = provider_pb2.CreateRequest(urn=urn(TYPE), properties=to_struct(inputs))
    call = client.stub.Create.future(request)
    wait_until(lambda: sshd.sessions)
    call.cancel()
    wait_until(lambda: not sshd.sessions)


def test_an_update_runs_update_or_create_and_a_deletion_delete(client: Client, sshd: Sshd) -> None:
    inputs = {
        "connection": sshd.connection,
        "create": "echo created",
        "addPreviousOutputInEnv": False,
    }
    made = client.create(TYPE, {**inputs, "delete": "echo deleted"})
    again = client.update(made, {**inputs, "stdin": "changed", "delete": "echo deleted"})
    assert again.state["stdout"] == "created"
    changed = client.update(again, {**inputs, "update": "echo updated"})
    assert changed.state["stdout"] == "updated"
    client.delete(changed)
    client.delete(again)
    assert sshd.commands == ["echo created", "echo created", "echo updated", "echo deleted"]


def test_only_triggers_replace(client: Client, sshd: Sshd) -> None:
    old, _ = client.check(TYPE, {"connection": sshd.connection, "create": "x", "stdin": "a"})
    answer = client.diff(
        TYPE, old, {**old, "stdin": "b", "connection": {**sshd.connection, "host": "::1"}}
    )
    assert answer.replaces == []
    assert answer.paths == {"connection.host": "UPDATE", "stdin": "UPDATE"}
    answer = client.diff(TYPE, old, {**old, "triggers": [1]})
    assert (answer.replaces, answer.delete_first) == (["triggers"], False)


def test_a_preview_runs_nothing(client: Client, sshd: Sshd) -> None:
    inputs = {"connection": {**sshd.connection, "host": UNKNOWN}, "create": "true"}
    outputs = client.preview(TYPE, inputs)
    assert outputs["stdout"] is UNKNOWN
    made = client.create(TYPE, {"connection": sshd.connection, "create": "echo x"})
    later = client.update(
        made, {"connection": sshd.connection, "create": "echo x", "stdin": "y"}, preview=True
    )
    assert later.state["stdout"] is UNKNOWN
    assert sshd.commands == ["echo x"]


@pytest.mark.parametrize(
    ("more", "property"),
    [
        ({"environment": {"A": "b"}}, "environment"),
        ({"logging": "loud"}, "logging"),
        ({"connection": {"host": "h", "proxy": {"host": "p"}}}, "connection.proxy"),
        ({"connection": {"host": "h", "hots": "p"}}, "connection.hots"),
        ({"connection": {"user": "u"}}, "connection.host"),
        ({"connection": {"host": "h", "port": "22"}}, "connection.port"),
        ({"craete": "x"}, "craete"),
    ],
)
def test_bad_inputs_are_refused(client: Client, more: dict[str, Any], property: str) -> None:
    _, failures = client.check(TYPE, {"connection": {"host": "h"}, "create": "x", **more})
    assert list(failures) == [property]


def test_no_connection_is_opened_where_it_could_lead_out(sshd: Sshd) -> None:
    def guard() -> None:
        raise RehearsalError("there is a way out")

    with (
        connected(Command(Ssh(guard))) as client,
        pytest.raises(Refused, match="there is a way out"),
    ):
        client.create(TYPE, {"connection": sshd.connection, "create": "true"})
    assert sshd.commands == []


class Engine(engine_pb2_grpc.EngineServicer):
    """The part of the engine that takes log lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, bool]] = []

    def Log(self, request: engine_pb2.LogRequest, context: grpc.ServicerContext) -> empty_pb2.Empty:
        self.lines.append((request.message, request.ephemeral))
        return empty_pb2.Empty()


@pytest.mark.parametrize(
    ("logging", "expected"),
    [
        (None, ["out", "err"]),
        ("stdoutAndStderr", ["out", "err"]),
        ("stdout", ["out"]),
        ("stderr", ["err"]),
        ("none", []),
    ],
)
def test_the_operator_sees_the_streams_that_the_program_wants(
    sshd: Sshd, logging: str | None, expected: list[str]
) -> None:
    engine = Engine()
    host = grpc.server(futures.ThreadPoolExecutor())
    engine_pb2_grpc.add_EngineServicer_to_server(engine, host)
    address = f"127.0.0.1:{host.add_insecure_port('127.0.0.1:0')}"
    host.start()
    try:
        with serving(Command(Ssh(lambda: None))) as server, connection(server.port) as client:
            hello = provider_pb2.ProviderHandshakeRequest(engine_address=address)
            client.call("Handshake", hello)
            inputs: Properties = {
                "connection": sshd.connection,
                "create": "echo out; sleep 0.2; echo err >&2",
            }
            if logging is not None:
                inputs["logging"] = logging
            made = client.create(TYPE, inputs)
    finally:
        host.stop(None)
    assert [line for line, _ in engine.lines] == expected
    assert (made.state["stdout"], made.state["stderr"]) == ("out", "err")


def test_the_connection_is_secret_though_the_program_forgot(client: Client, sshd: Sshd) -> None:
    checked, _ = client.check(TYPE, {"connection": sshd.connection})
    assert isinstance(checked["connection"], Secret)
    assert plain(checked["connection"])["host"] == "127.0.0.1"
