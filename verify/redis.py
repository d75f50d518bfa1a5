"""Redis as one of its clients speaks it (RESP2), as much of it as the checks need."""

from __future__ import annotations

from types import TracebackType

from mailsite.model import IPAddress
from verify.client import Client
from verify.registry import Failed

Answer = str | int | None | list["Answer"]


class Refused(Failed):
    """Redis answers with an error."""


class Redis:
    """One connection. A context manager; the connection is open.

    Args:
        client: Who connects.
        address: The server's address.
        port: Its port.
        password: To log in with; empty: none.
        timeout: Seconds for each step.

    Raises:
        OSError: No connection.
        Refused: The password is wrong.
    """

    def __init__(
        self,
        client: Client,
        address: IPAddress | str,
        port: int,
        password: str = "",
        *,
        timeout: float = 3.0,
    ) -> None:
        self._socket = client.connect(address, port, timeout=timeout)
        self._lines = self._socket.makefile("rb")
        if password:
            try:
                self.call("AUTH", password)
            except BaseException:
                self.close()
                raise

    def call(self, *words: str | float) -> Answer:
        """Send a command and wait for its answer.

        Raises:
            OSError: The connection broke.
            Refused: The answer is an error.
        """
        parts = [str(word).encode() for word in words]
        request = b"*%d\r\n" % len(parts)
        self._socket.sendall(request + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts))
        return self._answer()

    def text(self, *words: str | float) -> str:
        """The same, where the answer is a string; empty where there is none."""
        answer = self.call(*words)
        return "" if answer is None else str(answer)

    def texts(self, *words: str | float) -> list[str]:
        """The same, where the answer is a list of strings."""
        answer = self.call(*words)
        return [str(item) for item in answer] if isinstance(answer, list) else []

    def _answer(self) -> Answer:
        line = self._lines.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("Redis hung up")
        kind, rest = line[:1], line[1:-2].decode("utf-8", "replace")
        match kind:
            case b"+":
                return rest
            case b"-":
                raise Refused(rest)
            case b":":
                return int(rest)
            case b"$":
                length = int(rest)
                if length < 0:
                    return None
                return self._lines.read(length + 2)[:-2].decode("utf-8", "replace")
            case b"*":
                return [self._answer() for _ in range(int(rest))]
            case _:
                raise ConnectionError(f"no answer of Redis: {line!r}")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Redis:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
