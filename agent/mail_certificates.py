#!/usr/bin/python3 -IB
"""Brings the platform's certificate to this host, and on two hosts gets it from the authority.

Every host that shows a certificate has a copy: key and chain in one file, for root alone. Two of
them are *holders*: they hand their copy to the others, by ssh and a forced command that knows
nothing else. The first holder lets lego renew it in time. The second one does so only when the
first has not for days, or is gone: that moment comes later by so much that they never race.

  mail-certificates start    at boot and after a change: see that the daemons have what they load
  mail-certificates pull     ask the holders for a newer one, switch to it, reload what shows it
  mail-certificates issue    on a holder: renew it if it is time, or with --force at once
  mail-certificates ready    on a holder: have one, whatever it takes
  mail-certificates status   say as JSON what is here

What is pulled is switched to only if it verifies: chain, names, key, dates, and no older than what
is here. A renewal that fails leaves everything as it is, and its unit failed.

Standard library only. Settings: /etc/mail-certificates/config.json.

Exit codes: 0 done; 1 failed, everything is as it was; 69 failed, and waiting does not help.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import grp
import hashlib
import json
import os
import pwd
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = "mail-certificates"
CONFIG = "/etc/mail-certificates/config.json"
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
PULL_UNIT = "mail-certificates-pull.service"
ISSUE_UNIT = "mail-certificates-issue.service"
ACME_UNIT = "mail-acme.service"
BUSY = 75  # what the forced command says while its host is being issued a certificate
GIVEN_UP = 69
#: How long a holder may take to let us in, and then to answer.
CONNECT_SECONDS, ANSWER_SECONDS = 10, 10
#: The agent gives a restarted unit 15 s; two holders that do not answer cost 4 s a round. TCP
#: repeats a first packet that got lost after one second.
START_CONNECT_SECONDS, START_SECONDS = 2, 4.0
#: A new holder that was alone when it started does not ask the other one again within so long.
ALONE_SECONDS = 30.0
#: A host that has a certificate and hears of no holder for so long says so by a failed unit.
SILENCE_SECONDS = 600.0
#: How long the first holder waits for the second one's order, and how often it looks.
BUSY_SECONDS, BUSY_PAUSE = 900.0, 5.0
UNIT_SECONDS = 60
DAY = datetime.timedelta(days=1)

_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.S)
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.S)


class Failed(Exception):
    """What did not work. Everything is as it was."""


class Busy(Failed):
    """A holder is being issued a certificate at this moment."""


# -- settings ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holder:
    """A host where a copy can be had. Its ssh key is in known_hosts by its name."""

    name: str
    address: str


@dataclass(frozen=True)
class Target:
    """A file that a daemon loads, and what it holds: ``key``, ``chain``, or both."""

    path: str
    owner: str
    group: str
    mode: int
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Unit:
    """A unit that shows what is in ``paths``. ``verb``: reload or restart."""

    name: str
    verb: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Issuing:
    """What a holder does. ``first``: it renews, the other one steps in.

    ``renew`` and ``takeover`` are days before the end; both shrink for short certificates.
    ``group`` may read the copy, to hand it out.
    """

    first: bool
    renew: int
    takeover: int
    group: str


@dataclass(frozen=True)
class Settings:
    """``names``: those that the copy must be for; on a holder exactly those, and no others."""

    names: tuple[str, ...]
    port: int
    login: str
    holders: tuple[Holder, ...]
    targets: tuple[Target, ...]
    units: tuple[Unit, ...]
    issuing: Issuing | None

    @classmethod
    def parse(cls, text: str) -> Settings:
        """Read config.json.

        Raises:
            KeyError, TypeError, ValueError: it is not one.
        """
        value: dict[str, Any] = json.loads(text)
        issuing = value["issuing"]
        return cls(
            names=tuple(value["names"]),
            port=int(value["port"]),
            login=str(value["login"]),
            holders=tuple(Holder(**holder) for holder in value["holders"]),
            targets=tuple(
                Target(**{**t, "mode": int(t["mode"], 8), "parts": tuple(t["parts"])})
                for t in value["targets"]
            ),
            units=tuple(Unit(u["name"], u["verb"], tuple(u["paths"])) for u in value["units"]),
            issuing=None if issuing is None else Issuing(**issuing),
        )


# -- certificates -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """A private key with its certificate and the intermediates, all PEM."""

    key: str
    chain: str
    names: frozenset[str]
    serial: str
    begins: datetime.datetime
    ends: datetime.datetime

    @property
    def text(self) -> str:
        return f"{self.key}\n{self.chain}\n"

    @property
    def mark(self) -> str:
        """A name for it that says nothing of the key: the digest of the lines of its chain."""
        return hashlib.sha256(f"{self.chain}\n".encode()).hexdigest()

    @property
    def lifetime(self) -> datetime.timedelta:
        return self.ends - self.begins

    def content(self, parts: Sequence[str]) -> str:
        return "".join(f"{self.key if part == 'key' else self.chain}\n" for part in parts)

    def missing(self, wanted: Sequence[str]) -> list[str]:
        """Those of ``wanted`` that it is not for; a wildcard stands for one label."""
        return [
            name
            for name in wanted
            if name not in self.names and f"*.{name.partition('.')[2]}" not in self.names
        ]


def read(text: str) -> Certificate:
    """Read key and chain, in any order.

    Raises:
        Failed: they are not there, or OpenSSL cannot read them.
    """
    keys, chain = _KEY.findall(text), _CERTIFICATE.findall(text)
    if len(keys) != 1 or not chain:
        raise Failed(f"{len(keys)} private keys and {len(chain)} certificates instead of one each")
    told = openssl(
        "x509", "-noout", "-serial", "-startdate", "-enddate", "-dateopt", "iso_8601",
        "-ext", "subjectAltName", stdin=chain[0],
    )  # fmt: skip
    fields = dict(line.split("=", 1) for line in told.splitlines() if re.match(r"\w+=", line))
    return Certificate(
        key=keys[0],
        chain="\n".join(chain),
        names=frozenset(re.findall(r"DNS:([^\s,]+)", told)),
        serial=fields["serial"].lower(),
        begins=datetime.datetime.fromisoformat(fields["notBefore"].replace("Z", "+00:00")),
        ends=datetime.datetime.fromisoformat(fields["notAfter"].replace("Z", "+00:00")),
    )


def openssl(*arguments: str, stdin: str = "") -> str:
    done = subprocess.run(["openssl", *arguments], input=stdin, capture_output=True, text=True)
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines() or ["failed"]
        reasons = [line for line in words if re.match(r"error \d+ at ", line)]
        raise Failed(f"openssl {arguments[0]}: {(reasons or words)[-1]}")
    return done.stdout


class Store:
    """What is on this host. Tests give another ``root`` and another ``act``."""

    def __init__(self, settings: Settings, root: Path = Path("/")) -> None:
        self.settings = settings
        self.root = root
        self.folder = root / "var/lib/mail-certificates"
        self.copy = self.folder / "certificate.pem"
        self.due = self.folder / "reload.json"
        self.heard = self.folder / "heard"
        self.alone = self.folder / "alone"

    def live(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def ready(self) -> None:
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold a lock.

        Raises:
            Busy: somebody else holds it, and ``wait`` is False.
        """
        with (self.folder / name).open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise Busy("another run is at it") from None
            yield

    def verified(self, text: str) -> Certificate:
        """The certificate in ``text``, if daemons of this host may show it.

        Raises:
            Failed: why they may not.
        """
        found = read(text)
        with tempfile.TemporaryDirectory(prefix=f"{PROGRAM}-") as name:
            folder = Path(name)
            whole, leaf, rest, trust = (folder / n for n in ("whole", "leaf", "rest", "trust"))
            whole.touch(0o600)
            whole.write_text(found.text, encoding="ascii")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            try:
                context.load_cert_chain(whole)
            except ssl.SSLError as error:
                raise Failed(f"the key does not belong to the certificate ({error})") from None
            certificates = _CERTIFICATE.findall(found.chain)
            leaf.write_text(certificates[0], encoding="ascii")
            rest.write_text("\n".join(certificates[1:]), encoding="ascii")
            trust.write_text(self._authorities(), encoding="utf-8")
            untrusted = ("-untrusted", str(rest)) if certificates[1:] else ()
            openssl(
                "verify", "-purpose", "sslserver", "-no-CApath", "-no-CAstore",
                "-CAfile", str(trust), *untrusted, str(leaf),
            )  # fmt: skip
        missing = found.missing(self.settings.names)
        if missing:
            raise Failed(f"it is not for {', '.join(missing)}")
        return found

    def _authorities(self) -> str:
        places = (self.live(CA_BUNDLE), self.live("/etc/mail-certificates/authorities.pem"))
        return "\n".join(p.read_text(encoding="utf-8") for p in places if p.exists())

    def current(self) -> Certificate | None:
        """This host's copy; None where there is none that it may show."""
        try:
            return self.verified(self.copy.read_text(encoding="ascii"))
        except FileNotFoundError:
            return None
        except (Failed, ValueError) as error:
            say(f"the copy of this host is of no use: {error}")
            return None

    # changing

    def keep(self, certificate: Certificate) -> None:
        """Make ``certificate`` the copy of this host."""
        issuing = self.settings.issuing
        group = "root" if issuing is None else issuing.group
        mode = 0o600 if issuing is None else 0o640
        replace(self.copy, certificate.text, "root", group, mode)

    def install(self, certificate: Certificate) -> None:
        """Put it where the daemons load it; what has to be reloaded is noted, see :meth:`tell`.

        All files are written before the first is switched.
        """
        stale = [t for t in self.settings.targets if not self._in_place(t, certificate)]
        changed = {target.path for target in stale}
        showing = [unit for unit in self.settings.units if changed & set(unit.paths)]
        # One that does not run loads it when it starts, which may be what waits for us at boot.
        due = {unit.name for unit in showing if running(unit.name)} | self._due()
        if due:
            replace(self.due, json.dumps(sorted(due)), "root", "root", 0o600)
        with contextlib.ExitStack() as stack:
            for target in stale:
                stack.enter_context(
                    replacing(
                        self.live(target.path),
                        certificate.content(target.parts),
                        target.owner,
                        target.group,
                        target.mode,
                    )
                )
        for path in sorted(changed):
            say(f"wrote {path}")

    def tell(self) -> None:
        """Let the daemons show what was put in place, also by a run that was interrupted.

        Raises:
            Failed: a unit could not be reloaded; the next run tries again.
        """
        due = self._due()
        words = [act(unit) for unit in self.settings.units if unit.name in due]
        failed = [word for word in words if word]
        if failed:
            raise Failed("\n".join(failed))
        self.due.unlink(missing_ok=True)

    def in_place(self, certificate: Certificate) -> bool:
        """Whether the daemons' files are its, and nothing is left to be reloaded."""
        targets = self.settings.targets
        return not self.due.exists() and all(self._in_place(t, certificate) for t in targets)

    def _due(self) -> set[str]:
        try:
            return set(json.loads(self.due.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return set()

    def _in_place(self, target: Target, certificate: Certificate) -> bool:
        path = self.live(target.path)
        try:
            about = path.lstat()
            content = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        owner = (pwd.getpwnam(target.owner).pw_uid, grp.getgrnam(target.group).gr_gid)
        return (
            not path.is_symlink()
            and content == certificate.content(target.parts)
            and (about.st_uid, about.st_gid) == owner
            and about.st_mode & 0o777 == target.mode
        )


@contextlib.contextmanager
def replacing(path: Path, content: str, owner: str, group: str, mode: int) -> Iterator[None]:
    """Write a file beside its place, and put it there when the block ends well."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{PROGRAM}")
    fresh.unlink(missing_ok=True)
    try:
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fchown(handle, pwd.getpwnam(owner).pw_uid, grp.getgrnam(group).gr_gid)
            os.fchmod(handle, mode)
            os.fsync(handle)
        yield
        fresh.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
    finally:
        fresh.unlink(missing_ok=True)


def replace(path: Path, content: str, owner: str, group: str, mode: int) -> None:
    with replacing(path, content, owner, group, mode):
        pass


def running(unit: str) -> bool:
    return systemctl("is-active", "--quiet", unit).returncode == 0


def act(unit: Unit) -> str:
    """Let a unit that runs show the new certificate. Returns what went wrong, if anything."""
    if not running(unit.name):
        return ""
    verb = "try-reload-or-restart" if unit.verb == "reload" else "try-restart"
    done = systemctl(verb, unit.name)
    say(f"{unit.verb} {unit.name}")
    return f"systemctl {verb} {unit.name}: {done.stderr.strip()}" if done.returncode else ""


def systemctl(*arguments: str, seconds: float = UNIT_SECONDS) -> subprocess.CompletedProcess[str]:
    command = ["systemctl", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer after {seconds:.0f} s")


def say(line: str) -> None:
    print(line, flush=True)


# -- pulling ----------------------------------------------------------------------------------


def fetch(settings: Settings, holder: Holder, mark: str, patience: int) -> str | None:
    """What ``holder`` has; None if it is what ``mark`` names.

    ``patience``: seconds that it may take to let us in.

    Raises:
        Busy: it is being issued a new one.
        Failed: it cannot be reached, or has none.
    """
    options = {
        "BatchMode": "yes",
        "CheckHostIP": "no",
        "ConnectTimeout": str(patience),
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": holder.name,
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "IdentityFile": "/etc/mail-certificates/pull-key",
        "LogLevel": "ERROR",
        "PreferredAuthentications": "publickey",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "UserKnownHostsFile": "/etc/mail-certificates/known_hosts",
    }
    command = [
        *("ssh", "-F", "none", "-T", "-p", str(settings.port)),
        *(f"-o{key}={value}" for key, value in options.items()),
        f"{settings.login}@{holder.address}",
        mark or "none",
    ]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience + ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{holder.name}: no answer after {ANSWER_SECONDS} s") from None
    if done.returncode == BUSY:
        raise Busy(f"{holder.name} is being issued a new one")
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or ["it has none"]
        raise Failed(f"{holder.name}: {words[-1]}")
    return done.stdout or None


@dataclass(frozen=True)
class Round:
    """What the holders said: the best certificate there is, and what did not work."""

    best: Certificate | None
    answered: tuple[str, ...]
    busy: tuple[str, ...]
    problems: tuple[str, ...]


def ask(store: Store, own: Certificate | None, patience: int) -> Round:
    """Ask the holders in turn, until one has what is here or something better."""
    answered, busy, problems = [], [], []
    for holder in store.settings.holders:
        try:
            text = fetch(store.settings, holder, own.mark if own else "", patience)
        except Busy as error:
            busy.append(holder.name)
            problems.append(str(error))
            continue
        except Failed as error:
            problems.append(str(error))
            continue
        answered.append(holder.name)
        if text is None:
            return Round(own, tuple(answered), tuple(busy), tuple(problems))
        try:
            offered = store.verified(text)
        except Failed as error:
            problems.append(f"{holder.name} offers one that is refused: {error}")
            continue
        if own is None or offered.begins > own.begins:
            return Round(offered, tuple(answered), tuple(busy), tuple(problems))
        say(f"{holder.name} offers one that is older than what is here")
    return Round(own, tuple(answered), tuple(busy), tuple(problems))


def pull(store: Store, own: Certificate | None, patience: int = CONNECT_SECONDS) -> Round:
    """Switch the files to the best certificate there is. ``own``: this host's copy."""
    found = ask(store, own, patience)
    for problem in found.problems:
        say(problem)
    if found.best is None:
        return found
    with store.locked("lock"):
        if found.best is not own:
            store.keep(found.best)
            say(f"took the certificate {found.best.serial}, good until {found.best.ends:%Y-%m-%d}")
        store.install(found.best)
    return found


def pull_once(store: Store) -> None:
    """What the timer does.

    Raises:
        Failed: no holder had an answer that can be used, or a daemon did not reload.
    """
    found = pull(store, store.current())
    store.tell()
    if store.settings.issuing is not None:
        return  # whether it has one is the matter of its other timer
    useless = len(found.problems) == len(store.settings.holders) and not found.busy
    if found.best is not None and not useless:
        store.heard.touch()
        return
    silent = time.time() - store.heard.stat().st_mtime if store.heard.exists() else None
    if found.best is None or found.answered or silent is None or silent > SILENCE_SECONDS:
        raise Failed("no holder gave a certificate; this host goes on with what it has")
    say("no holder answers; it is tried again")


def start(store: Store) -> None:
    """See that the files are there before the daemons start; a holder that is down must not
    hold up a host that has them. Daemons that run are told by the next :func:`pull_once`, which
    has more time for it.

    Raises:
        Failed: there is no certificate for this host.
    """
    own = store.current()
    if own is not None and store.in_place(own):
        return
    until = time.monotonic() + START_SECONDS
    while (found := pull(store, own, START_CONNECT_SECONDS)).best is None:
        if store.settings.issuing is not None:
            if not (found.answered or found.busy):
                store.alone.touch()
            return
        if time.monotonic() > until:
            holders = " and ".join(h.name for h in store.settings.holders)
            raise Failed(
                f"there is no certificate for {', '.join(store.settings.names)} here, and {holders}"
                " gave none; see there: mail-certificates status, journalctl -u mail-acme"
            )
        time.sleep(1)
    if store.due.exists():
        systemctl("start", "--no-block", PULL_UNIT)


# -- issuing ----------------------------------------------------------------------------------


def why_due(settings: Settings, own: Certificate | None, now: datetime.datetime) -> str:
    """Why this holder should ask for a certificate; empty if it should not."""
    issuing = settings.issuing
    if issuing is None:
        raise Failed("this host is no holder")
    if own is None:
        return "there is none"
    if own.names != frozenset(settings.names):
        added = sorted(set(settings.names) - own.names)
        return f"it has to be for other names ({', '.join(added) or 'fewer'})"
    days, part = (issuing.renew, 3) if issuing.first else (issuing.takeover, 4.5)
    left = own.ends - now
    if left < min(days * DAY, own.lifetime / part):
        return f"it ends in {left / DAY:.1f} days"
    return ""


def issue(store: Store, *, force: bool = False) -> None:
    """Renew the certificate, if it is time.

    Raises:
        Failed: the authority gave none, or one that must not be used.
    """
    settings = store.settings
    with store.locked("issuing", wait=False):
        found = _other_done(store)
        own = found.best
        reason = "it was asked for" if force else why_due(settings, own, now())
        if not reason:
            say(f"nothing to do: {describe(own)}")
            return
        issuing = settings.issuing
        if issuing is not None and not issuing.first and not force:
            expiring = own is not None and own.names == frozenset(settings.names)
            if found.busy or (found.answered and not expiring):
                say(f"the certificate is due ({reason}); the first holder is there to renew it")
                return
        say(f"asking for a new certificate: {reason}")
        fresh = store.verified(order(store))
        if fresh.names != frozenset(settings.names):
            raise Failed(
                f"the authority gave one for {', '.join(sorted(fresh.names))} instead of"
                f" {', '.join(settings.names)}"
            )
        with store.locked("lock"):
            store.keep(fresh)
            store.install(fresh)
        store.tell()
        say(f"issued: {describe(fresh)}")


def _other_done(store: Store) -> Round:
    """What the other holder has. The first waits for the second to end, if it is just being issued
    one; the second leaves it to the first, so that they do not wait for each other.
    """
    issuing = store.settings.issuing
    until = time.monotonic() + BUSY_SECONDS
    own = store.current()
    if own is None and _is_alone(store):
        return Round(None, (), (), ())
    # On a new platform the other one is not there yet.
    found = pull(store, own, CONNECT_SECONDS if own else START_CONNECT_SECONDS)
    while found.busy and issuing is not None and issuing.first and time.monotonic() < until:
        time.sleep(BUSY_PAUSE)
        found = pull(store, found.best)
    return found


def _is_alone(store: Store) -> bool:
    """Whether the other holder was away when this one started, a moment ago."""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - store.alone.stat().st_mtime < ALONE_SECONDS
    return False


def order(store: Store) -> str:
    """Let lego get a certificate. Returns key and chain.

    Raises:
        Failed: with lego's last words.
    """
    done = systemctl("start", ACME_UNIT, seconds=1200)
    if done.returncode != 0 and "accountDoesNotExist" in last_words(ACME_UNIT):
        # Another authority under the same name, or an account that was closed: register anew.
        say("the authority does not know this account any more; making a new one")
        shutil.rmtree(store.live("/var/lib/mail-acme/accounts"))
        done = systemctl("start", ACME_UNIT, seconds=1200)
    if done.returncode != 0:
        raise Failed(f"lego got no certificate:\n{last_words(ACME_UNIT)}")
    folder = store.live("/var/lib/mail-acme/certificates")
    parts = [p for p in sorted(folder.iterdir()) if p.suffix in (".key", ".crt")]
    parts = [p for p in parts if not p.name.endswith(".issuer.crt")]
    text = "".join(p.read_text(encoding="ascii") for p in parts)
    for path in folder.iterdir():
        path.unlink()
    return text


def last_words(unit: str) -> str:
    done = subprocess.run(
        ["journalctl", "--unit", unit, "--lines=12", "--output=cat", "-q"],
        capture_output=True,
        text=True,
    )
    return "\n".join(f"  {line}" for line in done.stdout.strip().splitlines())


def ready(store: Store) -> int:
    """Have a certificate for all names on a holder; a push waits for this. Returns an exit code."""
    for attempt in ("found", "issued"):
        own = store.current()
        if own is not None and own.names == frozenset(store.settings.names):
            return 0
        if attempt == "found":
            systemctl("start", ISSUE_UNIT, seconds=1200)
    print(f"there is no certificate for the platform:\n{last_words(ISSUE_UNIT)}", file=sys.stderr)
    return GIVEN_UP


# -- command line -----------------------------------------------------------------------------


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def describe(certificate: Certificate | None) -> str:
    if certificate is None:
        return "there is none"
    left = (certificate.ends - now()) / DAY
    return f"{certificate.serial}, good until {certificate.ends:%Y-%m-%d} ({left:.0f} days)"


def status(store: Store) -> Mapping[str, object]:
    own = store.current()
    issuing = store.settings.issuing
    return {
        "holder": None if issuing is None else "first" if issuing.first else "second",
        "wanted": store.settings.names,
        "names": sorted(own.names) if own else [],
        "serial": own.serial if own else None,
        "begins": own.begins.isoformat() if own else None,
        "ends": own.ends.isoformat() if own else None,
        "in_place": own is not None and store.in_place(own),
    }


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=PROGRAM, description="The platform's certificate.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("start", help="see that the daemons have what they load")
    commands.add_parser("pull", help="ask the holders for a newer one")
    renew = commands.add_parser("issue", help="on a holder: renew it, if it is time")
    renew.add_argument("--force", action="store_true", help="renew it now")
    commands.add_parser("ready", help="on a holder: have one, whatever it takes")
    commands.add_parser("status", help="say as JSON what is here")
    return top


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    os.umask(0o022)
    try:
        store = Store(Settings.parse(Path(CONFIG).read_text(encoding="utf-8")))
        store.ready()
        match options.command:
            case "start":
                start(store)
            case "pull":
                pull_once(store)
            case "issue":
                issue(store, force=options.force)
            case "ready":
                return ready(store)
            case "status":
                print(json.dumps(status(store), indent=1))
    except Busy as error:
        say(str(error))
    except Failed as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    except (OSError, KeyError, ValueError, TypeError) as error:
        print(f"{PROGRAM}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
