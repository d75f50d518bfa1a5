"""Image layers: the Debian that machines run on, made once and shared by all of them.

- ``base``: what Debian's cloud image brings (systemd, cloud-init, sshd, sudo, python3, ...)
- ``mail``: on ``base``, the packages of every tier but the mail servers, all services disabled
- ``compiled``: on ``mail``, what Rspamd compiles when it first runs on a processor
- ``postfix`` and ``opensmtpd``: on ``mail``, the one or the other, for they exclude each other
- ``world``: on ``base``, what plays the outside (:mod:`rehearsal.world`)
- ``browser``: on ``base``, the browser that checks look at webmail with
- ``aptrepo``: Debian's own signed package lists, and the packages that these layers have beyond
  ``base``, so that the world can serve them to a bare host under Debian's names

Layers lie in the user's cache, in folders named by a hash of what they are made from. A layer
is built beside its place and renamed, so that what is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import platform as host_platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rehearsal import tools
from rehearsal.progress import Progress, RehearsalError
from rehearsal.state import locked
from rehearsal.world.packages import PACKAGES as WORLD_PACKAGES

ARCHIVES: Mapping[str, str] = {
    "debian": "http://deb.debian.org/debian",
    "debian-security": "http://deb.debian.org/debian-security",
}
"""Folder in ``aptrepo`` -> address that machines know it by."""

SUITES: Sequence[tuple[str, str]] = (
    ("debian", "trixie"),
    ("debian", "trixie-updates"),
    ("debian-security", "trixie-security"),
)

BASE_PACKAGES: Sequence[str] = (
    "ca-certificates",
    "cloud-init",
    "dbus",
    "debian-archive-keyring",
    "e2fsprogs",
    "iproute2",
    "iputils-ping",
    "libnss-myhostname",
    "netbase",
    "nftables",
    "openssh-server",
    "openssl",
    "procps",
    "python3",
    "sudo",
    "systemd",
    "systemd-resolved",
    "systemd-sysv",
    "tzdata",
)
"""Of what Debian's cloud image has, all that somebody here relies on. ``netplan.io`` is left out:
it matches network cards by their permanent hardware address, which a virtual one has not."""

MAIL_PACKAGES: Sequence[str] = (
    "aspell-en",
    "ca-certificates",
    "dns-root-data",
    "dovecot-core",
    "dovecot-imapd",
    "dovecot-lmtpd",
    "dovecot-managesieved",
    "dovecot-sieve",
    "lego",
    "libnginx-mod-stream",
    "nftables",
    "nginx",
    "opendkim",
    "opendkim-tools",
    "openssh-client",
    "openssh-server",
    "openssl",
    "php8.4-fpm",
    "php8.4-pspell",
    "php8.4-zip",
    "postsrsd",
    "redis-sentinel",
    "redis-server",
    "roundcube-core",
    "roundcube-plugins",
    "roundcube-sqlite3",
    "rspamd",
    "systemd-timesyncd",
    "unattended-upgrades",
    "unbound",
)
"""The packages of every tier; :func:`mailsite.bundle.compose` must not name another, but those of
one mail server."""

POSTFIX_PACKAGES: Sequence[str] = ("libsasl2-modules", "postfix", "postfix-lmdb")
OPENSMTPD_PACKAGES: Sequence[str] = ("opensmtpd",)

BROWSER_PACKAGES: Sequence[str] = (
    "chromium-headless-shell",
    "fonts-dejavu-core",
    "libnss3-tools",
)

_GO_PACKAGES: Sequence[str] = ("gcc", "golang-go", "libc6-dev")

_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_LAYER_KEYRING = "/usr/share/keyrings/debian-archive-keyring.pgp"

# Units that cost time at each start and that nothing here needs; not masked are those that
# order others or let users in (systemd-user-sessions).
_TRIMMED: Sequence[str] = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dev-hugepages.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "getty.target",
    "ldconfig.service",
    "systemd-firstboot.service",
    "systemd-journal-catalog-update.service",
    "systemd-logind.service",
    "systemd-network-generator.service",
    "systemd-pstore.service",
    "systemd-remount-fs.service",
    "systemd-update-done.service",
    "systemd-update-utmp.service",
)

_FILES: Mapping[str, str] = {
    "etc/apt/sources.list.d/debian.sources": "\n".join(
        f"Types: deb\nURIs: {ARCHIVES[archive]}\nSuites: {suite}\nComponents: main\n"
        f"Signed-By: {_LAYER_KEYRING}\n"
        for archive, suite in SUITES
    ),
    "etc/apt/apt.conf.d/90rehearsal": (
        "// The package lists are as old as this image, however long ago that was.\n"
        'Acquire::Check-Valid-Until "false";\n'
    ),
    # As in Debian's cloud image.
    "etc/cloud/cloud.cfg.d/01_debian_cloud.cfg": (
        "apt_preserve_sources_list: true\nmanage_etc_hosts: true\n"
    ),
    # Only ever this one; the others would be looked for on the network.
    "etc/cloud/cloud.cfg.d/90_datasource.cfg": "datasource_list: [NoCloud, None]\n",
    "etc/systemd/system.conf.d/90-rehearsal.conf": (
        "# A machine that is shut down must not keep the operator waiting.\n"
        "[Manager]\nDefaultTimeoutStopSec=10s\n"
    ),
}

_BASE_SCRIPT = f"""\
set -eu
rm -f /etc/apt/sources.list /etc/hostname /etc/ssh/ssh_host_*
: >/etc/machine-id
ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
systemctl enable systemd-networkd.service systemd-resolved.service
systemctl disable cloud-init-hotplugd.socket sshd-keygen.service
systemctl mask {" ".join(_TRIMMED)}
# None of the internet's authorities is in the world outside, and to list them anew beside the
# rehearsal's own takes seconds on each machine.
sed -i 's/^mozilla/!mozilla/' /etc/ca-certificates.conf
update-ca-certificates --fresh >/dev/null
mkdir -p /var/log/journal
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log
"""

_INSTALL_SCRIPT = """\
set -eu
export DEBIAN_FRONTEND=noninteractive
apt="apt-get -q -o Dpkg::Use-Pty=0 -o APT::Keep-Downloaded-Packages=true"
printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
systemctl list-unit-files --no-legend --state=enabled | cut -d' ' -f1 | sort >/run/enabled
$apt update
$apt install --yes --no-install-recommends $PACKAGES
systemctl list-unit-files --no-legend --state=enabled | cut -d' ' -f1 | sort >/run/enabled.now
new=$(comm -13 /run/enabled /run/enabled.now)
[ -z "$new" ] || systemctl disable $new
dpkg-query -W -f '${Package} ${Version} ${Architecture}\\n' >/run/out/packages
# Debian's lists as they are signed: what apt keeps is packed in another way.
echo "$ARCHIVES" | while read -r stem url suite; do
    mkdir -p "/run/out/$stem"
    cp "/var/lib/apt/lists/${stem}_InRelease" "/run/out/$stem/InRelease"
    awk -v arch="$(dpkg --print-architecture)" '
        /^Architectures: (.* )?all( |$)/ { all = 1 }
        /^No-Support-for-Architecture-all: Packages/ { merged = 1 }
        length($1) == 64 && ($3 == "main/binary-" arch "/Packages.xz" \
            || $3 == "main/i18n/Translation-en.xz" \
            || ($3 == "main/binary-all/Packages.xz" && all && !merged)) { print $1, $3 }
    ' "/run/out/$stem/InRelease" | while read -r digest list; do
        mkdir -p "/run/out/$stem/${list%/*}"
        /usr/lib/apt/apt-helper -o APT::Sandbox::User=root download-file \
            "$url/dists/$suite/${list%/*}/by-hash/SHA256/$digest" \
            "/run/out/$stem/$list" "SHA256:$digest"
    done
done
rm -rf /usr/sbin/policy-rc.d /etc/ssh/ssh_host_* /var/lib/apt/lists/* /var/cache/apt/*.bin
rm -rf /var/log/apt /var/log/dpkg.log
: >/etc/machine-id
"""

# On a machine of its own a first start takes care of this; three at once would keep the two cores
# of a rehearsal busy for half a minute. A bare host still does it by itself. What is compiled does
# not depend on the configuration (options.inc.j2), so Debian's does, and nothing is looked up.
_COMPILE_SCRIPT = """\
set -eu
cache=/var/cache/rspamd log=/var/log/rspamd/rspamd.log
rm -f "$log"
install -d -o _rspamd -g _rspamd -m 0755 "$cache"
unshare --net setpriv --reuid _rspamd --regid _rspamd --clear-groups \
    rspamd -f -c /etc/rspamd/rspamd.conf "--var=DBDIR=$cache" &
while ! grep -qs 'received hyperscan cache loaded' "$log"; do
    kill -0 $! || { cat "$log" >&2; exit 1; }
    sleep 0.2
done
kill $!
wait $! || :
find "$cache" -type f ! -name '*.hs*' -delete
rm -rf "$cache"/*.sock /var/log/rspamd/*
"""

# What happens in namespaces of its own vanishes with them: a killed build leaves no mount.
_NAMESPACES: Sequence[str] = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child")
_CHROOT_SCRIPT = 'mount -t proc proc "$1/proc" && exec chroot "$1" sh -c "$SCRIPT"'
_ENTER_SCRIPT = """\
set -eu
hostname debian
root=$1 lower=$2 upper=$3 work=$4
shift 4
mount -t overlay -o "lowerdir=$lower,upperdir=$upper,workdir=$work" overlay "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount --bind /dev "$root/dev"
mkdir -p "$root/run/systemd/resolve"
cp -L /etc/resolv.conf "$root/run/systemd/resolve/stub-resolv.conf"
echo "$BINDS" | while read -r to from; do
    [ -n "$to" ] || continue
    mkdir -p "$root$to"
    mount --bind "$from" "$root$to"
done
exec chroot "$root" "$@"
"""


@dataclass(frozen=True)
class Layers:
    """The layers of a build; each attribute but ``aptrepo`` is ready for ``Machine(layers=...)``.

    ``aptrepo`` has a folder per archive of :data:`ARCHIVES`, each with ``dists/`` and ``pool/``:
    serve it as the document root of ``http://deb.debian.org/``.
    """

    base: tuple[Path, ...]
    postfix: tuple[Path, ...]
    opensmtpd: tuple[Path, ...]
    world: tuple[Path, ...]
    aptrepo: Path
    browser: tuple[Path, ...] = ()

    def of(self, packages: Iterable[str]) -> tuple[Path, ...]:
        """The layers of a machine that is to have ``packages``: those with its mail server."""
        return self.postfix if set(POSTFIX_PACKAGES) & {*packages} else self.opensmtpd


def ensure(progress: Progress, folder: Path | None = None) -> Layers:
    """The image layers, built where they are missing (about two minutes for all of them).

    ``folder`` is the cache, by default the user's. Raises :class:`RehearsalError` with the words
    of the tool that failed.
    """
    cache = folder or tools.cache()
    builder = _Builder(cache, progress)
    layers = builder.layers()
    if not builder.complete():
        tools.ensure(progress)
        with locked(cache / ".images", progress, "another command builds image layers"):
            builder.build()
    return layers


def machine() -> str:
    """Debian's name of this machine's architecture."""
    known = {"x86_64": "amd64", "aarch64": "arm64"}
    try:
        return known[host_platform.machine()]
    except KeyError:
        raise RehearsalError(
            f"no rehearsal on this architecture ({host_platform.machine()})",
            "use an amd64 or arm64 machine",
        ) from None


def _processor() -> list[str]:
    """What this machine's processor can do: what is compiled for it fits no other."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = (line.partition(":") for line in lines)
    return next((sorted(v.split()) for k, _, v in fields if k.strip() in ("flags", "Features")), [])


class _Builder:
    def __init__(self, cache: Path, progress: Progress) -> None:
        self._cache = cache
        self._progress = progress
        base = (
            machine(),
            [list(s) for s in SUITES],
            dict(ARCHIVES),
            sorted(BASE_PACKAGES),
            dict(_FILES),
            _BASE_SCRIPT,
        )
        recipe = (base, _INSTALL_SCRIPT, _ENTER_SCRIPT)
        self._base = self._place("base", base)
        self._mail = self._place("mail", (recipe, sorted(MAIL_PACKAGES)))
        self._compiled = self._place(
            "compiled", (recipe, sorted(MAIL_PACKAGES), _COMPILE_SCRIPT, _processor())
        )
        mta = {"postfix": POSTFIX_PACKAGES, "opensmtpd": OPENSMTPD_PACKAGES}
        self._mta = {
            name: self._place(name, (recipe, sorted(MAIL_PACKAGES), sorted(packages)))
            for name, packages in mta.items()
        }
        self._world = self._place("world", (recipe, sorted(WORLD_PACKAGES)))
        self._browser = self._place("browser", (recipe, sorted(BROWSER_PACKAGES)))
        self._golang = self._place("golang", (recipe, sorted(_GO_PACKAGES)))
        served = sorted((*MAIL_PACKAGES, *POSTFIX_PACKAGES, *OPENSMTPD_PACKAGES))
        self._aptrepo = self._place("aptrepo", (recipe, served))

    def _place(self, name: str, inputs: object) -> Path:
        text = json.dumps(inputs, sort_keys=True)
        return self._cache / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def layers(self) -> Layers:
        return Layers(
            base=(self._base,),
            postfix=(self._base, self._mail, self._compiled, self._mta["postfix"]),
            opensmtpd=(self._base, self._mail, self._compiled, self._mta["opensmtpd"]),
            world=(self._base, self._world),
            aptrepo=self._aptrepo,
            browser=(self._base, self._browser),
        )

    def complete(self) -> bool:
        layers = (
            *(self._base, self._mail, self._compiled, self._world, self._aptrepo, self._browser),
            *self._mta.values(),
        )
        return all(p.exists() for p in layers)

    def build(self) -> None:
        self._clean()
        self._build_base()
        if not all(p.exists() for p in (self._mail, *self._mta.values(), self._aptrepo)):
            self._build_mail()
        if not self._compiled.exists():
            what = "image layer compiled: what Rspamd looks for"
            with self._progress.step(what), workshop(self._cache) as shop:
                _enter(
                    shop,
                    (self._base, self._mail),
                    ["sh", "-c", _COMPILE_SCRIPT],
                    binds={},
                    failure="Rspamd does not compile what it looks for",
                    variables={},
                )
                _publish(shop / "upper", self._compiled)
        if not self._world.exists():
            what = "image layer world: the packages of the outside"
            with self._progress.step(what), workshop(self._cache) as shop:
                self._install(shop, WORLD_PACKAGES, (self._base,))
                _publish(shop / "upper", self._world)
        if not self._browser.exists():
            what = "image layer browser: Chromium, to look at webmail"
            with self._progress.step(what), workshop(self._cache) as shop:
                self._install(shop, BROWSER_PACKAGES, (self._base,))
                _publish(shop / "upper", self._browser)

    def _build_mail(self) -> None:
        """The layers of the packages, and the mirror that has them all: of one and the same day."""
        with ExitStack() as stack:
            stack.enter_context(
                self._progress.step("image layers mail, postfix, opensmtpd: the packages")
            )
            shop, *others = (stack.enter_context(workshop(self._cache)) for _ in (0, *self._mta))
            self._install(shop, MAIL_PACKAGES, (self._base,))
            mta = (POSTFIX_PACKAGES, OPENSMTPD_PACKAGES)
            for other, packages in zip(others, mta, strict=True):
                self._install(other, packages, (self._base, shop / "upper"))
            self._build_aptrepo((shop, *others))
            _publish(others[-1] / "aptrepo", self._aptrepo)
            for built, place in zip(
                (shop, *others), (self._mail, *self._mta.values()), strict=True
            ):
                _publish(built / "upper", place)

    def build_golang(self) -> tuple[Path, ...]:
        self._clean()
        self._build_base()
        if not self._golang.exists():
            with (
                self._progress.step("image layer golang: Debian's Go, to build the engine"),
                workshop(self._cache) as shop,
            ):
                self._install(shop, _GO_PACKAGES, (self._base,))
                _publish(shop / "upper", self._golang)
        return (self._base, self._golang)

    def _clean(self) -> None:
        """Remove what killed builds left; nobody else builds while the lock is held."""
        for left in self._cache.glob(".building-image-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _build_base(self) -> None:
        if self._base.exists():
            return
        with (
            self._progress.step("image layer base: Debian 13 by mmdebstrap"),
            workshop(self._cache) as shop,
        ):
            root = shop / "base"
            sources = [
                f"deb [signed-by={_KEYRING}] {ARCHIVES[archive]} {suite} main"
                for archive, suite in SUITES
            ]
            _call(
                [
                    "mmdebstrap",
                    "--quiet",
                    "--mode=root",
                    "--variant=minbase",
                    "--format=directory",
                    f"--architectures={machine()}",
                    f"--include={','.join(BASE_PACKAGES)}",
                    "trixie",
                    str(root),
                    *sources,
                ],
                "the Debian base cannot be installed",
            )
            for name, content in _FILES.items():
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
            _call(
                [*_NAMESPACES, "sh", "-c", _CHROOT_SCRIPT, "sh", str(root)],
                "the Debian base cannot be set up",
                SCRIPT=_BASE_SCRIPT,
            )
            _publish(root, self._base)

    def _install(self, shop: Path, packages: Sequence[str], layers: Sequence[Path]) -> None:
        """Install packages on ``layers``; what they add is in ``upper`` of ``shop`` afterwards."""
        (shop / "out").mkdir()
        debs = self._cache / "debs"
        (debs / "partial").mkdir(parents=True, exist_ok=True)
        _enter(
            shop,
            layers,
            ["sh", "-c", _INSTALL_SCRIPT],
            binds={"/var/cache/apt/archives": debs, "/run/out": shop / "out"},
            failure=f"these packages cannot be installed: {' '.join(packages)}",
            variables={
                "PACKAGES": " ".join(packages),
                "ARCHIVES": "\n".join(f"{_stem(a, s)} {ARCHIVES[a]} {s}" for a, s in SUITES),
            },
        )

    def _build_aptrepo(self, shops: Sequence[Path]) -> None:
        """Lay out the packages that were installed in ``shops``, and Debian's signed lists.

        They are in ``aptrepo`` of the last one afterwards, whose lists are the newest.
        """
        shop = shops[-1]
        lists = [(each / "out/packages").read_text(encoding="utf-8") for each in shops]
        installed = {line for text in lists for line in text.splitlines()}
        wanted = installed - _installed(self._base)
        missing = set(wanted)
        for archive, suite in SUITES:
            top = shop / "aptrepo" / archive
            dists = top / "dists" / suite
            dists.parent.mkdir(parents=True, exist_ok=True)
            (shop / "out" / _stem(archive, suite)).rename(dists)
            for target in [*dists.rglob("*.xz")]:
                digest = hashlib.sha256(target.read_bytes()).hexdigest()
                by_hash = target.parent / "by-hash" / "SHA256" / digest
                by_hash.parent.mkdir(parents=True, exist_ok=True)
                os.link(target, by_hash)
                if target.stem == "Packages":
                    missing -= _collect(_stanzas(target), wanted, self._cache / "debs", top)
        if missing:
            raise RehearsalError(
                f"packages that no list names: {', '.join(sorted(missing))}",
                f"remove {self._cache / 'debs'} and try again",
            )


@contextmanager
def workshop(cache: Path, purpose: str = "image") -> Iterator[Path]:
    """A folder in the cache in which something is made; nothing of it stays there."""
    path = Path(tempfile.mkdtemp(prefix=f".building-{purpose}-", dir=cache))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _enter(
    shop: Path,
    layers: Sequence[Path],
    argv: Sequence[str],
    *,
    binds: Mapping[str, Path],
    failure: str,
    variables: Mapping[str, str],
) -> None:
    """Run a command on image layers, with the network of this machine.

    ``binds`` are folders in the layers -> folders of this machine. What the command writes
    elsewhere is in ``upper`` of ``shop`` afterwards.
    """
    for name in ("root", "upper", "work"):
        (shop / name).mkdir(mode=0o755)
    places = [shop / "root", ":".join(map(str, reversed(layers))), shop / "upper", shop / "work"]
    _call(
        [*_NAMESPACES, "sh", "-c", _ENTER_SCRIPT, "sh", *map(str, places), *argv],
        failure,
        BINDS="\n".join(f"{to} {place}" for to, place in binds.items()),
        **variables,
    )


def run_on_golang(
    argv: Sequence[str],
    progress: Progress,
    what: str,
    *,
    cache: Path,
    binds: Mapping[str, Path],
    variables: Mapping[str, str],
) -> None:
    """Run a command on Debian 13 with its Go, for machines that have none that is new enough.

    ``binds`` are folders there -> folders of this machine.
    """
    tools.ensure(progress)
    with locked(cache / ".images", progress, "another command builds image layers"):
        layers = _Builder(cache, progress).build_golang()
    with progress.step(what), workshop(cache, "engine") as shop:
        _enter(shop, layers, argv, binds=binds, failure=f"{what}: failed", variables=variables)


def _call(argv: Sequence[str], failure: str, **variables: str) -> None:
    done = subprocess.run(
        argv,
        env=tools.environment(**variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise RehearsalError(
            f"{failure}:\n{said}",
            "see that the network can be reached from here, then try again",
        )


def _stem(archive: str, suite: str) -> str:
    """How apt names the files of a suite in its folder of lists."""
    address = ARCHIVES[archive].removeprefix("http://").replace("/", "_")
    return f"{address}_dists_{suite}"


def _publish(built: Path, place: Path) -> None:
    """Put a layer in its place; of one that is there already machines may be running."""
    if not place.exists():
        built.rename(place)


def _installed(root: Path) -> set[str]:
    """``package version architecture`` of what dpkg has installed below ``root``."""
    status = root / "var/lib/dpkg/status"
    return {
        f"{s['Package']} {s['Version']} {s['Architecture']}"
        for s in _parse(status.read_text(encoding="utf-8").splitlines())
    }


def _parse(lines: Sequence[str]) -> Iterator[dict[str, str]]:
    """Single-line fields of the stanzas of a Debian control file (deb-src-control(5))."""
    stanza: dict[str, str] = {}
    for line in lines:
        if not line:
            if stanza:
                yield stanza
            stanza = {}
        elif line[0] not in " \t":
            name, _, value = line.partition(":")
            stanza[name] = value.strip()
    if stanza:
        yield stanza


def _stanzas(path: Path) -> Iterator[dict[str, str]]:
    """Stanzas of a compressed package list."""
    return _parse(lzma.decompress(path.read_bytes()).decode().splitlines())


def _collect(
    stanzas: Iterator[dict[str, str]], wanted: set[str], debs: Path, top: Path
) -> set[str]:
    """Copy the packages of ``wanted`` that ``stanzas`` name into the pool below ``top``."""
    found: set[str] = set()
    for stanza in stanzas:
        name = f"{stanza['Package']} {stanza['Version']} {stanza['Architecture']}"
        if name not in wanted:
            continue
        version = stanza["Version"].replace(":", "%3a")
        deb = debs / f"{stanza['Package']}_{version}_{stanza['Architecture']}.deb"
        target = top / stanza["Filename"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(deb, target)
        found.add(name)
    return found
