"""Two servers with a real Dovecot and pairsync each, connected by a cable that can be cut.

Each is a first process of its own in namespaces of its own (mounts, processes, network, name),
with the image of the rehearsal as its root. Nothing has a name on the host, so this meets no
rehearsal, and all of it is gone when the first processes are.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import imaplib
import json
import os
import shutil
import signal
import smtplib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

T = TypeVar("T")
CODE = Path(__file__).parents[2] / "pairsync"
NAMES = ("a.pair.example", "b.pair.example")
ADDRESSES = ("10.99.0.1", "10.99.0.2")
PASSWORD = "invented"
SECRET = "invented-for-the-tests-0123456789abcdef"
VMAIL = 5000
_LOOPBACK = "127.0.0.1"  # its own address goes with the cable
_CLONE_NEWNET = 0x40000000
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# $1: the lower layers, $2: upper, $3: work, $4: where the root is put together, $5: the name.
_ENTER = """\
set -eu
hostname "$5"
ip link set lo up
mount -t overlay -o "lowerdir=$1,upperdir=$2,workdir=$3" overlay "$4"
mount -t proc proc "$4/proc"
mount -t sysfs sysfs "$4/sys"
mount -t tmpfs tmpfs "$4/dev"
for device in null zero random urandom tty; do
    touch "$4/dev/$device"
    mount --bind "/dev/$device" "$4/dev/$device"
done
ln -s /proc/self/fd "$4/dev/fd"
mount -t tmpfs tmpfs "$4/run"
mount -t tmpfs tmpfs "$4/tmp"
mkdir -p "$4/.old"
cd "$4"
pivot_root . .old
umount -l /.old
exec python3 -c "$INIT"
"""

_INIT = """\
import os, time
print("up", flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.05)
"""

_DOVECOT = """\
dovecot_config_version = 2.4.0
dovecot_storage_version = 2.4.0
protocols {
  imap = yes
  lmtp = yes
  sieve = yes
}
log_path = /var/log/dovecot.log
ssl = no
auth_allow_cleartext = yes
auth_mechanisms = plain login
mail_driver = mdbox
mail_path = ~/mdbox
mail_home = /var/dovecot/users/%{user}
mail_uid = vmail
mail_gid = vmail
first_valid_uid = 1000
mail_max_userip_connections = 200
passdb static {
  password = {PLAIN}invented
}
userdb passwd-file {
  passwd_file_path = /etc/dovecot/users
}
namespace inbox {
  inbox = yes
  separator = /
}
sieve_script personal {
  type = personal
  path = ~/sieve
  active_path = ~/.dovecot.sieve
}
service imap-login {
  inet_listener imap {
    port = 143
  }
  inet_listener imaps {
    port = 0
  }
}
service lmtp {
  inet_listener lmtp {
    port = 24
  }
}
service managesieve-login {
  inet_listener sieve {
    port = 4190
  }
}
protocol lmtp {
  mail_plugins {
    sieve = yes
  }
}
"""

_TOML = """\
name = "{name}"

[peer]
name = "{peer}"

[tls]
certificate = "/etc/pairsync/cert.pem"
key = "/etc/pairsync/key.pem"
ca = "/etc/pairsync/ca.pem"

[sieve]
"""


def wait_for(what: str, condition: Callable[[], T], timeout: float = 15.0) -> T:
    """The first true value of ``condition``; fails after ``timeout`` seconds."""
    limit = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < limit, f"not within {timeout:g} s: {what}"
        time.sleep(0.02)


class Authority:
    """Signs certificates for servers."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
        ca = x509.BasicConstraints(ca=True, path_length=None)
        self.pem = self._sign(self._name, self._key.public_key(), [(ca, True)])

    def issue(self, name: str) -> tuple[str, str]:
        """Certificate and key for a server's name, PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        pem = self._sign(subject, key.public_key(), [(names, False)])
        secret = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return pem, secret.decode()

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        extensions: Sequence[tuple[x509.ExtensionType, bool]],
    ) -> str:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=9))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        signed = builder.sign(self._key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM).decode()


class Server:
    """One of the two."""

    def __init__(self, number: int, layers: Sequence[Path], folder: Path) -> None:
        self.name = NAMES[number]
        self.address = ADDRESSES[number]
        self.peer = NAMES[1 - number]
        self.folder = folder
        self._lower = ":".join(str(layer) for layer in reversed(layers))
        self._process: subprocess.Popen[str] | None = None
        for name in ("upper", "work", "root"):
            (folder / name).mkdir(parents=True)

    @property
    def upper(self) -> Path:
        return self.folder / "upper"

    @property
    def pid(self) -> int:
        """Of the first process."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return int(children.read_text().split()[0])

    def boot(self) -> None:
        places = [str(self.folder / name) for name in ("upper", "work", "root")]
        self._process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "SIGKILL"),
                *("unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child"),
                *("sh", "-c", _ENTER, "sh", self._lower, *places, self.name),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "console").open("a"),
            text=True,
            env={"PATH": _PATH, "INIT": _INIT, "LC_ALL": "C.UTF-8"},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "up\n"
        self._process.stdout.close()

    def pull_the_plug(self) -> None:
        assert self._process is not None
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        # What the kernel keeps of the last root until its namespace is gone.
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        (self.folder / "work").mkdir(exist_ok=True)

    def close(self) -> None:
        if self._process is not None:
            self.pull_the_plug()

    # Commands ----------------------------------------------------------------------------------

    def words(self, *argv: str) -> list[str]:
        return [
            *("nsenter", f"--target={self.pid}", "--mount", "--net", "--uts", "--pid", "--"),
            *("env", "-i", f"PATH={_PATH}", "HOME=/root", "LC_ALL=C.UTF-8", *argv),
        ]

    def run(self, *argv: str, input: str = "", check: bool = True) -> str:
        """What a command says."""
        done = subprocess.run(
            self.words(*argv), input=input, text=True, capture_output=True, timeout=120
        )
        if check:
            assert done.returncode == 0, f"{argv}: {done.returncode}: {done.stderr}{done.stdout}"
        return done.stdout

    def shell(self, script: str, check: bool = True) -> str:
        return self.run("sh", "-c", script, check=check)

    def write(self, path: str, content: str, owner: int = 0, mode: int = 0o644) -> None:
        """Put a file into the server before it boots, or later."""
        root = self.upper if self._process is None else Path(f"/proc/{self.pid}/root")
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        made = place.with_name(f".{place.name}.made")
        made.write_text(content)
        os.chown(made, owner, owner)
        made.chmod(mode)
        made.rename(place)

    def path(self, path: str) -> Path:
        """A path in the running server, seen from here."""
        return Path(f"/proc/{self.pid}/root{path}")

    # Dovecot -----------------------------------------------------------------------------------

    def start_dovecot(self) -> None:
        # Its children keep what it was given as output.
        self.shell("dovecot >/run/dovecot.out 2>&1 </dev/null || { cat /run/dovecot.out; exit 1; }")
        wait_for("Dovecot listens", lambda: self.listens(143) and self.listens(24))

    def stop_dovecot(self) -> None:
        self.run("doveadm", "stop", check=False)
        wait_for("Dovecot has ended", lambda: not self.listens(143))

    def listens(self, port: int) -> bool:
        try:
            with self.inside():
                socket.create_connection((_LOOPBACK, port), timeout=1).close()
        except OSError:
            return False
        return True

    def add_user(self, user: str) -> None:
        """Dovecot knows the user when this returns; it looks at its file once a second."""
        path = "/etc/dovecot/users"
        self.write(path, self.path(path).read_text() + _row(user))
        wait_for(f"{self.name} knows {user}", lambda: self.knows(user))

    def users(self) -> set[str]:
        return {row.split(":")[0] for row in self.path("/etc/dovecot/users").read_text().split()}

    def knows(self, user: str) -> bool:
        return (
            subprocess.run(self.words("doveadm", "user", user), capture_output=True).returncode == 0
        )

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that this thread makes meanwhile are in the server's network."""
        here, target = Path("/proc/thread-self/ns/net"), Path(f"/proc/{self.pid}/ns/net")
        with here.open() as home, target.open() as there:
            _setns(there.fileno())
            try:
                yield
            finally:
                _setns(home.fileno())

    def imap(self, user: str) -> imaplib.IMAP4:
        with self.inside():
            client = imaplib.IMAP4(_LOOPBACK, 143, timeout=30)
        client.login(user, PASSWORD)
        return client

    def deliver(self, user: str, tag: str, size: int = 100) -> float:
        """One mail by LMTP. Returns when it was accepted, by the monotonic clock."""
        with self.inside():
            client = smtplib.LMTP(_LOOPBACK, 24, timeout=30)
        text = f"From: x@example.org\r\nSubject: {tag}\r\nMessage-ID: <{tag}@x>\r\n\r\n"
        with client:
            refused = client.sendmail("x@example.org", [user], text + "x" * size + "\r\n")
            accepted = time.monotonic()
        assert not refused
        return accepted

    def cpu_seconds(self) -> float:
        """Of all processes, also of those that ended."""
        ticks, todo = 0, [self.pid]
        while todo:
            pid = todo.pop()
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except OSError:
                continue
            ticks += sum(int(f) for f in fields[11:15])
            todo += [int(child) for child in children]
        return ticks / os.sysconf("SC_CLK_TCK")

    def sieve(self, user: str, *commands: str) -> None:
        """ManageSieve commands, each of which must succeed."""
        with self.inside():
            connection = socket.create_connection((_LOOPBACK, 4190), timeout=30)
        with connection, connection.makefile("rb") as answers:
            token = subprocess.run(
                ["base64", "-w0"], input=f"\0{user}\0{PASSWORD}".encode(), capture_output=True
            ).stdout.decode()
            _managesieve(answers, "greeting")
            for command in (f'AUTHENTICATE "PLAIN" "{token}"', *commands):
                connection.sendall(command.encode() + b"\r\n")
                _managesieve(answers, command)

    def put_script(self, user: str, name: str, text: str = "keep;\n") -> None:
        size = len(text.encode())
        self.sieve(user, f'PUTSCRIPT "{name}" {{{size}+}}\r\n{text}')

    def scripts(self, user: str) -> dict[str, bool]:
        """Scripts -> whether active."""
        return _scripts(self.run("doveadm", "sieve", "list", "-u", user))

    # pairsync ----------------------------------------------------------------------------------

    def start_pairsync(self, *, wait: bool = True) -> None:
        self.shell(
            "mkdir -p /run/pairsync && touch /var/log/pairsync.log && "
            "chown vmail:vmail /run/pairsync /var/log/pairsync.log && "
            "exec setpriv --reuid=vmail --regid=vmail --clear-groups "
            "sh -c 'umask 077; exec setsid /usr/local/sbin/pairsync daemon "
            ">>/var/log/pairsync.log 2>&1 </dev/null & echo $! >/run/pairsync/pid'"
        )
        if wait:
            wait_for(f"{self.name}: pairsync answers", self.status)

    def pairsync_pid(self) -> int:
        """In the server."""
        return int(self.path("/run/pairsync/pid").read_text())

    def kill_pairsync(self, number: int = signal.SIGKILL) -> None:
        pid = self.pairsync_pid()
        self.run("kill", f"-{number}", str(pid))
        wait_for("pairsync has ended", lambda: not self.path(f"/proc/{pid}/cmdline").exists())

    def status(self) -> dict[str, Any]:
        """What `pairsync status --json` shows, without a process for it; empty: no daemon."""
        try:
            with socket.socket(socket.AF_UNIX) as asked:
                asked.settimeout(30)
                asked.connect(str(self.path("/run/pairsync/control")))
                asked.sendall(b'{"do": "status"}\n')
                found: dict[str, Any] = json.loads(asked.makefile().readline() or "{}")
        except (FileNotFoundError, ConnectionError):
            return {}
        return found

    def metric(self, name: str) -> float:
        for line in self.path("/run/pairsync/metrics.prom").read_text().splitlines():
            if line.startswith(f"pairsync_{name} "):
                return float(line.split()[1])
        raise KeyError(name)

    def pairsync_log(self) -> str:
        return self.path("/var/log/pairsync.log").read_text()

    # The cable ---------------------------------------------------------------------------------

    def cut(self) -> None:
        """Packets from and to the other server are lost without a word."""
        self.run(
            "nft",
            "-f",
            "-",
            input="table inet cut {\n"
            'chain in { type filter hook input priority 0; iifname "pair" drop; }\n'
            'chain out { type filter hook output priority 0; oifname "pair" drop; }\n}\n',
        )

    def heal(self) -> None:
        self.run("nft", "delete", "table", "inet", "cut")

    # Contents ----------------------------------------------------------------------------------

    def contents(self, user: str) -> dict[str, Any]:
        """Folders with uid, flags and message id of every mail; subscriptions; scripts."""
        listed, subscribed, scripts, mails = self.shell(
            f"doveadm mailbox list -u {user}; echo ----;"
            f"doveadm mailbox list -s -u {user}; echo ----;"
            f"doveadm sieve list -u {user}; echo ----;"
            f"doveadm -f tab fetch -u {user} "
            "'mailbox uid guid flags hdr.message-id' all"
        ).split("----\n")
        folders: dict[str, list[tuple[str, ...]]] = {f: [] for f in listed.splitlines()}
        for line in mails.splitlines()[1:]:
            mailbox, uid, guid, flags, message = line.split("\t")
            kept = " ".join(sorted(f for f in flags.split() if f != "\\Recent"))
            # One that came between the two commands is not listed yet.
            folders.setdefault(mailbox, []).append((uid, guid, kept, message))
        return {
            "folders": {name: sorted(found) for name, found in folders.items()},
            "subscribed": sorted(subscribed.splitlines()),
            "scripts": _scripts(scripts),
        }

    def tags(self, user: str) -> list[str]:
        """Message ids of every mail, sorted."""
        found = self.contents(user)["folders"]
        return sorted(m[3].strip("<>").removesuffix("@x") for box in found.values() for m in box)


class Pair:
    """Both, with users ``u0`` ... that they have in common."""

    def __init__(self, layers: Sequence[Path], folder: Path, users: int = 20) -> None:
        self.authority = Authority()
        self.users = [f"u{number}" for number in range(users)]
        self._unused = list(self.users)
        self.a = Server(0, layers, folder / "a")
        self.b = Server(1, layers, folder / "b")

    @property
    def both(self) -> tuple[Server, Server]:
        return self.a, self.b

    def up(self, timeout: float = 60.0) -> None:
        for server in self.both:
            self._furnish(server)
            server.boot()
            # The command writes no bytecode, and many starts of it are timed here.
            server.run("python3", "-m", "compileall", "-q", "/usr/local/lib/pairsync")
        self.connect()
        with ThreadPoolExecutor() as pool:
            list(pool.map(Server.start_dovecot, self.both))
            list(pool.map(Server.start_pairsync, self.both))
        self.wait_up(timeout)

    def connect(self) -> None:
        """Plug in the cable between the two."""
        pids = [str(server.pid) for server in self.both]
        words = f"ip link add pair netns {pids[0]} type veth peer name pair netns {pids[1]}"
        subprocess.run(words.split(), check=True)
        for server in self.both:
            server.run("ip", "address", "add", f"{server.address}/24", "dev", "pair")
            server.run("ip", "link", "set", "pair", "up")

    def connect_again(self) -> None:
        """Plug in another cable: the old one goes with the machine that lost its power, but not as
        long as a client holds a connection to that.
        """
        for server in self.both:
            server.run("ip", "link", "delete", "pair", check=False)
        self.connect()

    def wait_up(self, timeout: float = 60.0) -> None:
        for server in self.both:
            wait_for(
                f"{server.name} sees its peer and has no pass",
                lambda s=server: (d := s.status()) and d["peer"]["up"] and not d["pass"],  # type: ignore[misc]
                timeout=timeout,
            )

    def close(self) -> None:
        for server in self.both:
            server.close()

    def fresh(self, count: int) -> list[str]:
        """Users that nobody had before."""
        found, self._unused = self._unused[:count], self._unused[count:]
        assert len(found) == count, "the pair has too few users"
        return found

    def mend(self) -> None:
        """Undo what a failed test left broken."""
        for server in self.both:
            server.shell("nft delete table inet cut 2>/dev/null", check=False)
            if not server.listens(143):
                server.start_dovecot()
            if not server.status():
                server.start_pairsync()
        for one, other in (self.both, self.both[::-1]):
            for user in sorted(one.users() - other.users()):
                other.add_user(user)

    def certify(self, server: Server, name: str | None = None) -> None:
        """Give a server a certificate, by default for its own name."""
        certificate, key = self.authority.issue(name or server.name)
        server.write("/etc/pairsync/key.pem", key, VMAIL, 0o400)
        server.write("/etc/pairsync/cert.pem", certificate)

    def contents(self, user: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What each has of a user."""
        with ThreadPoolExecutor() as pool:
            one, other = pool.map(lambda server: server.contents(user), self.both)
        return one, other

    def wait_quiet(self, timeout: float = 15.0) -> None:
        """Until no daemon has anything to do."""
        wait_for("both are quiet", self.quiet, timeout)

    def quiet(self) -> bool:
        found = [server.status() for server in self.both]
        return all(
            f
            and f["peer"]["up"]
            and not f["unsettled"] + f["dirty"] + f["waiting"] + f["running"] + f["background"]
            and not (f["pass"] or f["pass_due"])
            for f in found
        )

    def wait_equal(self, users: Sequence[str], timeout: float = 15.0) -> None:
        """Until both hold the same of ``users``."""
        limit = time.monotonic() + timeout
        for user in users:
            while True:
                one, other = self.contents(user)
                if one == other:
                    break
                assert time.monotonic() < limit, (
                    f"{user} is not equal after {timeout:g} s:\n{_difference(one, other)}"
                )
                time.sleep(0.1)

    def _furnish(self, server: Server) -> None:
        for name in ("passwd", "group", "shadow"):
            lower = next(
                Path(layer) / "etc" / name
                for layer in server._lower.split(":")
                if (Path(layer) / "etc" / name).exists()
            )
            more = {
                "passwd": f"vmail:x:{VMAIL}:{VMAIL}::/var/dovecot:/usr/sbin/nologin\n",
                "group": f"vmail:x:{VMAIL}:\n",
                "shadow": "vmail:!:1::::::\n",
            }
            server.write(f"/etc/{name}", lower.read_text() + more[name])
        (server.upper / "var/dovecot/users").mkdir(parents=True)
        os.chown(server.upper / "var/dovecot/users", VMAIL, VMAIL)
        (server.upper / "var/lib/pairsync").mkdir(parents=True, mode=0o700)
        os.chown(server.upper / "var/lib/pairsync", VMAIL, VMAIL)
        hosts = "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True))
        server.write("/etc/hosts", f"127.0.0.1 localhost\n{hosts}")
        server.write("/etc/dovecot/dovecot.conf", _DOVECOT + snippet())
        server.write("/etc/dovecot/users", "".join(map(_row, self.users)))
        server.write("/etc/pairsync.toml", _TOML.format(name=server.name, peer=server.peer))
        server.write("/etc/pairsync/secret", SECRET + "\n", VMAIL, 0o400)
        server.write("/etc/pairsync/ca.pem", self.authority.pem)
        self.certify(server)
        for path in CODE.glob("*.py"):
            server.write(f"/usr/local/lib/pairsync/pairsync/{path.name}", path.read_text())
        lua = (CODE / "notify.lua").read_text()
        server.write("/usr/local/lib/pairsync/notify.lua", lua)
        server.write("/usr/local/sbin/pairsync", (CODE / "bin/pairsync").read_text(), mode=0o755)


def _row(user: str) -> str:
    return f"{user}:::::/var/dovecot/users/{user}::\n"


def snippet() -> str:
    """The part of Dovecot's configuration that the README shows."""
    text = (CODE / "README.md").read_text()
    return text.split("## Dovecot\n", 1)[1].split("```\n", 2)[1]


def _setns(handle: int) -> None:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.setns(handle, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _managesieve(answers: Any, command: str) -> None:
    while True:
        line = answers.readline().decode()
        if line.startswith("OK"):
            return
        assert line and not line.startswith(("NO", "BYE")), f"{command}: {line}"


def _scripts(said: str) -> dict[str, bool]:
    return {line.split()[0]: "ACTIVE" in line for line in said.splitlines()}


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    lines = [
        f"{part}: {one[part]} against {other[part]}"
        for part in ("subscribed", "scripts")
        if one[part] != other[part]
    ]
    for name in sorted({*one["folders"], *other["folders"]}):
        mails = [set(side["folders"].get(name, ())) for side in (one, other)]
        if mails[0] != mails[1] or (name in one["folders"]) != (name in other["folders"]):
            lines.append(f"{name}: {sorted(mails[0] - mails[1])} against")
            lines.append(f"    {sorted(mails[1] - mails[0])}")
    return "\n".join(lines)[:3000]
