"""``/etc/pairsync.toml``: what may stand there, with types, ranges and defaults."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

PATH = Path("/etc/pairsync.toml")
SECRET_LENGTH = 32


class ConfigError(Exception):
    """What is wrong, where, and what to write instead."""


@dataclass(frozen=True)
class PeerConfig:
    """The other server. ``address`` empty: its name."""

    name: str
    address: str = ""
    port: int = 63301


@dataclass(frozen=True)
class ListenConfig:
    addresses: tuple[str, ...] = ("0.0.0.0", "::")  # noqa: S104 - the firewall is the platform's
    port: int = 63301


@dataclass(frozen=True)
class TlsConfig:
    """``certificate`` with its chain, PEM; ``ca`` is who may have signed the peer's."""

    certificate: Path
    key: Path
    ca: Path = Path("/etc/ssl/certs/ca-certificates.crt")


@dataclass(frozen=True)
class FilesConfig:
    secret: Path = Path("/etc/pairsync/secret")
    state: Path = Path("/var/lib/pairsync")
    run: Path = Path("/run/pairsync")
    metrics: Path = Path("/run/pairsync/metrics.prom")


@dataclass(frozen=True)
class DovecotConfig:
    """``homes`` holds one folder per user, of the user's name."""

    socket: Path = Path("/run/dovecot/pairsync")
    homes: Path = Path("/var/dovecot/users")


@dataclass(frozen=True)
class SieveConfig:
    """The folder of scripts and the link to the active one, in a user's home."""

    scripts: str = "sieve"
    active: str = ".dovecot.sieve"


@dataclass(frozen=True)
class SyncConfig:
    """Times in seconds.

    :param parallel: runs side by side that this server begins
    :param debounce: from the last notification to the run; Dovecot notifies of a deleted folder
        7 ms before it is gone
    :param silence: a run in which nothing was sent for so long is ended
    :param silence_full: the same for a full run, which first reads a whole mailbox, unless that
        is known to be small; and for the run after one that was ended
    :param retry_max: longest time until a failed run is tried again
    """

    parallel: int = 4
    debounce: float = 0.03
    silence: float = 5.0
    silence_full: float = 30.0
    retry_max: float = 8.0


@dataclass(frozen=True)
class HeartbeatConfig:
    """Seconds between two, and without an answer until the peer counts as away."""

    interval: float = 1.0
    lost_after: float = 3.0


@dataclass(frozen=True)
class PassConfig:
    """Every night each user gets a full run, spread over ``hours`` from ``start`` (local time)."""

    start: str = "01:00"
    hours: float = 4.0

    @property
    def start_seconds(self) -> int:
        hour, minute = self.start.split(":")
        return int(hour) * 3600 + int(minute) * 60


@dataclass(frozen=True)
class Config:
    name: str
    peer: PeerConfig
    tls: TlsConfig
    listen: ListenConfig = field(default_factory=ListenConfig)
    files: FilesConfig = field(default_factory=FilesConfig)
    dovecot: DovecotConfig = field(default_factory=DovecotConfig)
    sieve: SieveConfig | None = None
    sync: SyncConfig = field(default_factory=SyncConfig)
    heartbeat: HeartbeatConfig = field(default_factory=HeartbeatConfig)
    night: PassConfig = field(default_factory=PassConfig)

    @property
    def precedence(self) -> bool:
        """Whether this server decides where only one of the two may."""
        return self.name < self.peer.name


_RANGES: Mapping[str, tuple[float, float]] = {
    "peer.port": (1, 65535),
    "listen.port": (1, 65535),
    "sync.parallel": (1, 64),
    "sync.debounce": (0.02, 5),
    "sync.silence": (1, 600),
    "sync.silence_full": (1, 3600),
    "sync.retry_max": (0.5, 3600),
    "heartbeat.interval": (0.1, 60),
    "heartbeat.lost_after": (0.3, 600),
    "night.hours": (0.1, 24),
}


def load(path: Path = PATH) -> Config:
    """Read the configuration. Raises :class:`ConfigError` naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; write it as pairsync/README.md says"
        ) from error
    return parse(text, str(path))


def parse(text: str, name: str = str(PATH)) -> Config:
    """Make a configuration of TOML. ``name`` is the file's, for errors."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {error}; mend the TOML there") from error
    return _Reader(text, name).config(document)


def read_secret(path: Path) -> bytes:
    """The secret that both servers share. Raises :class:`ConfigError`."""
    remedy = f"put the same {SECRET_LENGTH} or more random characters there on both servers"
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; {remedy}, readable by vmail") from error
    if len(secret) < SECRET_LENGTH:
        raise ConfigError(f"{path}: only {len(secret)} characters; {remedy}")
    return secret


class _Reader:
    def __init__(self, text: str, name: str) -> None:
        self._lines = text.splitlines()
        self._name = name

    def config(self, document: Mapping[str, Any]) -> Config:
        config: Config = self._section(Config, document, "")
        if config.name == config.peer.name:
            raise self._error("peer.name", "both servers have one name", "give each its own")
        if config.heartbeat.lost_after < 2 * config.heartbeat.interval:
            raise self._error(
                "heartbeat.lost_after",
                "shorter than two intervals, so one late answer is a lost peer",
                "make it at least twice heartbeat.interval",
            )
        return config

    def _section(self, kind: type[Any], document: Mapping[str, Any], prefix: str) -> Any:
        hints = get_type_hints(kind)
        known = {f.name: f for f in fields(kind)}
        for key in document:
            if key not in known:
                raise self._error(
                    prefix + key, "unknown key", f"known here: {', '.join(sorted(known))}"
                )
        values: dict[str, Any] = {}
        for key, about in known.items():
            if key in document:
                values[key] = self._value(hints[key], document[key], prefix + key)
            elif about.default is MISSING and about.default_factory is MISSING:
                raise self._error(prefix + key, "missing", f"write {key} = ...", absent=True)
        return kind(**values)

    def _value(self, hint: Any, value: Any, key: str) -> Any:
        for section in (
            *(PeerConfig, ListenConfig, TlsConfig, FilesConfig, DovecotConfig, SieveConfig),
            *(SyncConfig, HeartbeatConfig, PassConfig),
        ):
            if hint in (section, section | None):
                if not isinstance(value, dict):
                    raise self._error(key, "not a section", f"write [{key}] and its keys below")
                return self._section(section, value, f"{key}.")
        if hint is Path:
            if not isinstance(value, str) or not value.startswith("/"):
                raise self._error(key, "not an absolute path", 'write "/..."')
            return Path(value)
        if hint == tuple[str, ...]:
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise self._error(key, "not a list of addresses", 'write ["0.0.0.0", "::"]')
            return tuple(value)
        if hint is str:
            return self._text(value, key)
        if isinstance(value, bool) or not isinstance(value, int if hint is int else (int, float)):
            raise self._error(key, "not a number", f"write {key.rpartition('.')[2]} = 5")
        low, high = _RANGES[key]
        if not low <= value <= high:
            raise self._error(key, f"{value} is out of range", f"between {low} and {high}")
        return hint(value)

    def _text(self, value: Any, key: str) -> str:
        if not isinstance(value, str) or not value:
            raise self._error(key, "not a text", 'write "..."')
        if key == "night.start" and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value):
            raise self._error(key, "not a time of day", 'write "01:00"')
        if key.startswith("sieve.") and ("/" in value or value in (".", "..")):
            raise self._error(key, "not a name in the user's home", "write a name without /")
        return value

    def _error(self, key: str, wrong: str, remedy: str, *, absent: bool = False) -> ConfigError:
        line = self._line(key, absent)
        return ConfigError(f"{self._name}:{line}: {key}: {wrong}; {remedy}")

    def _line(self, key: str, absent: bool) -> int:
        """Where a key stands; of an absent one, where its section begins."""
        section, _, name = key.rpartition(".")
        here, at = "", 1
        for number, line in enumerate(self._lines, 1):
            if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
                here = header[1]
                if here == key or (absent and here == section):
                    at = number
            elif here == section and re.match(rf"\s*[\"']?{re.escape(name)}[\"']?\s*=", line):
                return number
        return at
