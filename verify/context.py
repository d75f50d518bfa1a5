"""What a check gets to work with: the site data, places to connect from, the world outside."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mailsite.model import Host, Interface, IPAddress, NetworkKind, Platform, Role
from verify.client import Observer
from verify.lookup import Lookup
from verify.registry import Failed, Skipped

if TYPE_CHECKING:
    from verify.lab import Lab

_DISTURBED = "disturbed"
T = TypeVar("T")
U = TypeVar("U")

SUBMISSION = 587
"""RFC 6409."""
SUBMISSION_PROXY = 10587
"""Where smtp-out expects a PROXY header; open to the frontends alone."""


@dataclass(frozen=True)
class Probe:
    """An account that checks log in with.

    Attributes:
        user: SASL user.
        password: Its password.
        sender: Address that it sends as.
    """

    user: str
    password: str = field(repr=False)
    sender: str


@dataclass(frozen=True)
class Context:
    """The platform as one check sees it.

    Attributes:
        platform: The site data, with what the world is like laid over it.
        site: Folder of the site data.
        stack: Name of the Pulumi stack.
        state: Folder for what a run leaves behind.
        internet: A client somewhere on the internet.
        office: A client in a network of the operators; None where there is none.
        local: A client that the members serve directly: in a site-local network, or in the
            operators' where there is none; None on a live platform.
        lookup: Resolves names as a client on the internet does.
    """

    platform: Platform
    site: Path
    stack: str
    state: Path
    internet: Observer
    lookup: Lookup
    office: Observer | None = None
    local: Observer | None = None
    given_probe: Probe | None = None
    given_lab: Lab | None = None
    transcript: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_live(self) -> bool:
        return self.given_lab is None

    @property
    def lab(self) -> Lab:
        """The rehearsal: its machines and its world.

        Raises:
            Skipped: The platform is a live one.
        """
        if self.given_lab is None:
            raise Skipped("needs a rehearsal: it looks into machines or at the world outside")
        return self.given_lab

    @property
    def probe(self) -> Probe:
        """The account to log in with.

        Raises:
            Skipped: There is none.
        """
        if self.given_probe is None:
            raise Skipped(
                "no probe account: name one under 'probe' in site.yaml, and give the file with"
                " its password: make verify PROBE=FILE"
            )
        return self.given_probe

    def fresh(self) -> Context:
        """The same for another check: transcript and notes are empty."""
        return replace(self, transcript=[], notes=[])

    def say(self, line: str) -> None:
        """Add a line to the transcript, which is kept if the check fails."""
        self.transcript.append(line)

    def keep_transcript(self, identifier: str, lines: Sequence[str]) -> None:
        """Keep a failed check's dialogues in ``transcripts/`` of the state folder."""
        folder = self.state / "transcripts"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / f"{identifier}.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")

    @property
    def disturbed(self) -> float:
        """When a check last changed something or took something away, in seconds since 1970.

        What daemons said until then has its reason. 0: none did.
        """
        try:
            return (self.state / _DISTURBED).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def disturb(self) -> None:
        """Remember that a check changed something just now."""
        if self.state.is_dir():
            (self.state / _DISTURBED).touch()

    def note(self, text: str) -> None:
        """Tell the operator something beside the outcome: a warning, records to publish."""
        self.notes.append(text)

    # What the site data says, as checks ask for it

    @property
    def members(self) -> tuple[Host, ...]:
        return self.platform.members(Role.SMTP_OUT)

    @property
    def frontends(self) -> tuple[Host, ...]:
        return self.platform.members(Role.FRONTEND)

    def public(self, host: Host) -> tuple[IPAddress, ...]:
        """The host's addresses in public networks."""
        return public_addresses(self.platform, host)

    def internal(self, host: Host) -> tuple[IPAddress, ...]:
        """Where other hosts of the platform reach ``host``, both families."""
        leg: Interface = self.platform.internal_leg(host)
        return (leg.ipv4, leg.ipv6)

    @property
    def doors(self) -> tuple[tuple[str, IPAddress], ...]:
        """Every frontend address in each family, with the frontend's name."""
        return tuple((h.name, a) for h in self.frontends for a in self.public(h))

    @property
    def sending_domains(self) -> tuple[str, ...]:
        """Domains with a key that signs."""
        return tuple(
            d.name for d in self.platform.domains.values() if d.sends and d.signing_key is not None
        )

    def tls(self) -> ssl.SSLContext:
        """A client's TLS: the CAs that a client of this platform trusts, names verified."""
        return trust(self.platform)


def public_addresses(platform: Platform, host: Host) -> tuple[IPAddress, ...]:
    """The host's addresses in public networks."""
    return tuple(
        a
        for i in host.interfaces
        if platform.network_of(i).kind is NetworkKind.PUBLIC
        for a in (i.ipv4, i.ipv6)
    )


def trust(platform: Platform) -> ssl.SSLContext:
    """What a client of the platform trusts."""
    return _tls(platform.world.ca_certificates)


@cache
def _tls(authorities: tuple[str, ...]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for pem in authorities:
        context.load_verify_locations(cadata=pem)
    return context


def expect(condition: object, otherwise: str) -> None:
    """Raise :class:`Failed` with ``otherwise`` unless ``condition`` holds."""
    if not condition:
        raise Failed(otherwise)


def each(items: Iterable[T], look: Callable[[T], U], *, workers: int = 8) -> list[U]:
    """Look at all items side by side.

    Every item is looked at, whatever the others show, so that one failure names all.

    Raises:
        Failed: Some items failed; the message has a line for each.
        Skipped: Some were skipped and none failed.
    """
    wanted = list(items)
    if not wanted:
        raise Failed("nothing to look at: the site data names no such host")
    with ThreadPoolExecutor(max_workers=min(workers, len(wanted))) as pool:
        futures = [pool.submit(look, item) for item in wanted]
    errors = [f.exception() for f in futures]
    failed = [e for e in errors if e is not None and not isinstance(e, Skipped)]
    if failed:
        raise Failed("\n".join(dict.fromkeys(describe(e) for e in failed)))
    for error in errors:
        if error is not None:
            raise error
    return [f.result() for f in futures]


def describe(error: BaseException) -> str:
    """The error for the report: its own words, with its kind unless a check raised it."""
    if isinstance(error, Failed | Skipped):
        return str(error)
    return f"{type(error).__name__}: {error}"


interrupted = threading.Event()
"""Nobody waits any more: the run of checks was interrupted."""


def eventually(look: Callable[[], T], *, seconds: float, every: float = 0.1, what: str = "") -> T:
    """Look until it does not fail.

    Args:
        look: Raises :class:`Failed` or :class:`OSError` as long as it does not hold.
        seconds: For how long to try.
        every: Pause between two looks, in seconds.
        what: What is waited for, for the message.

    Returns:
        What ``look`` returned.

    Raises:
        Failed: It did not hold in time, the message is that of the last look; or the run was
            interrupted: what else a check has to do is to put back what it took away.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return look()
        except (Failed, OSError) as error:
            if interrupted.is_set():
                raise Failed(f"interrupted: {describe(error)}") from error
            if time.monotonic() >= deadline:
                wanted = f"{what}: " if what else ""
                raise Failed(f"{wanted}not within {seconds:g} s: {describe(error)}") from error
        time.sleep(every)
