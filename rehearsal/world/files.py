"""The files of the world's machine, and how they get there.

All of them are data of this module; the machine's own Debian packages bring the daemons alone.
Units start in order at boot: addresses, keys and zones, name server, then everything else. A
running machine is brought up to date by replacing the files that differ and restarting the units
that read them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rehearsal.ca import Authority, Issued
from rehearsal.machine import Machine
from rehearsal.state import write_atomic
from rehearsal.world import knot, plan
from rehearsal.world.zones import Zone

ETC = "/etc/world"
CODE = "/usr/local/lib/world"
KNOT = "/srv/world/knot"
MAIL = "/srv/world/mail"
RUN = "/srv/world/run"
MIRROR = "/srv/world/debian"
ANCHOR = f"{ETC}/root.ds"
ACME_MANAGEMENT_PORT = 15000
_ACME_PORT = 14000
CONTROL_FILE = "control.json"
STATE_FILE = "state.json"
LISTS_CONTROL_FILE = "lists-control.json"
LISTS_STATE_FILE = "lists-state.json"
LISTS_LOG = "lists.jsonl"

_UNITS = "/etc/systemd/system"
_HERE = Path(__file__).parent
_PROGRAMS = (
    "prepare.py", "lists.py", "mx/__init__.py", "mx/__main__.py", "mx/judge.py", "mx/server.py",
)  # fmt: skip
_MASKED = (
    "knot.service",
    "nginx.service",
    "ssh.service",
    "ssh.socket",
    "unbound.service",
    "unbound-resolvconf.service",
    "systemd-resolved.service",
    "systemd-networkd.service",
    "systemd-networkd.socket",
    "systemd-networkd-wait-online.service",
    "cloud-init.target",
)
_STARTED = (
    "world-addresses",
    "world-prepare",
    "world-knot",
    "world-lists",
    "world-unbound",
    "world-mx",
    "world-nginx",
    "world-acme",
)

_ADDRESSES_UNIT = f"""\
[Unit]
Description=Addresses of the outside world
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=ip -batch {ETC}/addresses
[Install]
WantedBy=multi-user.target
"""

_PREPARE_UNIT = f"""\
[Unit]
Description=DNSSEC keys and zones of the outside world
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=python3 {CODE}/prepare.py {ETC}/zones.json {KNOT} {ANCHOR}
"""

_KNOT_UNIT = f"""\
[Unit]
Description=Authoritative name server of the outside world
Requires=world-addresses.service world-prepare.service
After=world-addresses.service world-prepare.service
[Service]
Type=notify
User=knot
Group=knot
AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
NoNewPrivileges=yes
RuntimeDirectory=world-knot
LoadCredential=knot.conf:{ETC}/knot.conf
ExecStart=knotd -c %d/knot.conf
Restart=on-failure
"""

_LISTS_UNIT = f"""\
[Unit]
Description=Block lists of the outside world
Requires=world-addresses.service
After=world-addresses.service
[Service]
Type=notify
Environment=PYTHONDONTWRITEBYTECODE=1
ExecStart=python3 {CODE}/lists.py {ETC}/lists.json
Restart=on-failure
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths={RUN}
PrivateTmp=yes
"""

_UNBOUND_UNIT = f"""\
[Unit]
Description=Resolver of the outside world
Wants=world-knot.service
After=world-knot.service
[Service]
Type=notify
ExecStart=unbound -d -p -c {ETC}/unbound.conf
Restart=on-failure
"""

_MX_UNIT = f"""\
[Unit]
Description=Mail servers of the outside world
Wants=world-addresses.service world-unbound.service
After=world-addresses.service world-unbound.service
[Service]
Type=notify
WorkingDirectory={CODE}
Environment=PYTHONDONTWRITEBYTECODE=1
ExecStart=python3 -m mx {ETC}/mx.json
Restart=on-failure
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths={MAIL} {RUN}
PrivateTmp=yes
"""

_NGINX_UNIT = f"""\
[Unit]
Description=Package mirror of the outside world, and what stands before its authority
Requires=world-addresses.service
After=world-addresses.service
[Service]
ExecStart=nginx -c {ETC}/nginx.conf -g 'daemon off;'
RuntimeDirectory=world-nginx
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths=/run/world-nginx /var/lib/nginx /var/log/nginx
ReadOnlyPaths={MIRROR}
PrivateTmp=yes
Restart=on-failure
"""

_ACME_UNIT = f"""\
[Unit]
Description=Certificate authority of the outside world
Wants=world-addresses.service world-unbound.service
After=world-addresses.service world-unbound.service
[Service]
DynamicUser=yes
CapabilityBoundingSet=
LoadCredential=chain:{ETC}/certificates/{plan.ACME_NAME}.pem
LoadCredential=key:{ETC}/certificates/{plan.ACME_NAME}.key
# It asks for everything at once, and refuses no nonce: its rehearsal of bad days is not ours.
Environment=PEBBLE_VA_NOSLEEP=1 PEBBLE_WFE_NONCEREJECT=0
ExecStart=pebble -config {ETC}/pebble.json -dnsserver 127.0.0.1:53
Restart=on-failure
"""

# Which files, by prefix, a unit has to be restarted for.
_READS = {
    "world-addresses": (f"{ETC}/addresses",),
    "world-prepare": (f"{ETC}/zones.json", f"{CODE}/prepare.py"),
    "world-knot": (f"{ETC}/knot.conf", f"{ETC}/zones.json", f"{CODE}/prepare.py"),
    "world-lists": (f"{ETC}/lists.json", f"{CODE}/lists.py"),
    "world-unbound": (f"{ETC}/unbound.conf",),
    "world-mx": (f"{ETC}/mx.json", f"{ETC}/certificates/", f"{CODE}/mx/"),
    "world-nginx": (f"{ETC}/nginx.conf", f"{ETC}/certificates/{plan.ACME_NAME}."),
    "world-acme": (f"{ETC}/pebble.json", f"{ETC}/certificates/{plan.ACME_NAME}."),
}


def contents(
    *,
    zones: Mapping[str, Zone],
    key: knot.UpdateKey,
    acme: knot.UpdateKey,
    challenges: Sequence[str],
    authority: Authority,
    dane: Issued,
    takes: Mapping[str, Sequence[str]],
    mailboxes: Mapping[str, Sequence[str]],
    lists: Sequence[str],
) -> dict[str, str]:
    """Every file of the machine: path -> content. A target that begins with ``->`` is a link.

    :param acme: the ACME client's key, and ``challenges`` the names that it may change.
    :param dane: the self-signed certificate that the TLSA record vouches for.
    :param takes: domains that a mail server takes mail for beside its own, by its name.
    :param mailboxes: the users that exist on the operator's old server, by domain; in its other
        domains everybody exists.
    :param lists: zones of the block lists.
    """
    units = {
        "world-addresses": _ADDRESSES_UNIT,
        "world-prepare": _PREPARE_UNIT,
        "world-knot": _KNOT_UNIT,
        "world-lists": _LISTS_UNIT,
        "world-unbound": _UNBOUND_UNIT,
        "world-mx": _MX_UNIT,
        "world-nginx": _NGINX_UNIT,
        "world-acme": _ACME_UNIT,
    }
    found = {f"{_UNITS}/{name}.service": text for name, text in units.items()}
    found |= {
        f"{_UNITS}/multi-user.target.wants/{name}.service": f"->{_UNITS}/{name}.service"
        for name in units
    }
    found |= {f"{_UNITS}/{name}": "->/dev/null" for name in _MASKED}
    found |= {
        f"{CODE}/{program}": (_HERE / program).read_text(encoding="utf-8") for program in _PROGRAMS
    }
    found |= {
        f"{ETC}/addresses": _address_batch(),
        f"{ETC}/zones.json": _zone_plan(zones),
        f"{ETC}/knot.conf": knot.configuration(
            zones,
            plan.name_server_addresses(),
            key,
            acme=acme,
            challenges=challenges,
            folder=KNOT,
            run="/run/world-knot",
        ),
        f"{ETC}/pebble.json": _pebble_json(),
        f"{ETC}/unbound.conf": _unbound_conf(),
        f"{ETC}/nginx.conf": _nginx_conf(),
        f"{ETC}/root.pem": authority.root_pem,
        f"{ETC}/mx.json": _mail_settings(takes, mailboxes),
        f"{ETC}/lists.json": _list_settings(lists),
        "/etc/resolv.conf": "nameserver 127.0.0.1\n",
        "/etc/hostname": "world\n",
    }
    found |= _certificates(authority, dane, tuple(mailboxes))
    return found


def install(root: Path, wanted: Mapping[str, str]) -> frozenset[str]:
    """Put files below a machine's root; returns the paths of those that differed."""
    changed: set[str] = set()
    for path, text in wanted.items():
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("->"):
            goal = Path(text[2:])
            if not (target.is_symlink() and target.readlink() == goal):
                target.unlink(missing_ok=True)
                target.symlink_to(goal)
                changed.add(path)
        elif target.is_symlink() or not target.exists() or target.read_text("utf-8") != text:
            target.unlink(missing_ok=True)
            secret = path.endswith((".key", "/knot.conf"))
            write_atomic(target, text, mode=0o600 if secret else 0o644)
            changed.add(path)
    return frozenset(changed)


def restart(machine: Machine, changed: Collection[str]) -> None:
    """Restart what reads the changed files, and start what does not run."""
    if any(path.startswith(_UNITS) for path in changed):
        machine.run(["systemctl", "daemon-reload"])
    due = [
        unit
        for unit, prefixes in _READS.items()
        if any(path.startswith((f"{_UNITS}/{unit}.", *prefixes)) for path in changed)
    ]
    if due:
        machine.run(["systemctl", "restart", *due])
    machine.run(["systemctl", "start", *_STARTED])


def _address_batch() -> str:
    lines = ["link set lo up", "link set eth0 up"]
    for address, bits in zip(plan.LEG, plan.LEG_PREFIXES, strict=True):
        nodad = " nodad" if address.version == 6 else ""
        lines.append(f"address replace {address}/{bits} dev eth0{nodad}")
    lines += (f"address replace {a}/{a.max_prefixlen} dev lo" for a in plan.service_addresses())
    lines += (f"route replace default via {gateway} dev eth0" for gateway in plan.GATEWAY)
    return "".join(f"{line}\n" for line in lines)


def _zone_plan(zones: Mapping[str, Zone]) -> str:
    document = {
        "configuration": f"{ETC}/knot.conf",
        "zones": {
            name: {
                "file": knot.zone_file(name),
                "text": zone.text,
                "signed": zone.signed,
                "bogus": zone.bogus,
                "dynamic": zone.dynamic,
                "children": zone.children,
            }
            for name, zone in zones.items()
        },
    }
    return json.dumps(document, indent=1)


def _unbound_conf() -> str:
    listen = "".join(f"    interface: {a}\n" for a in ("127.0.0.1", "::1", *plan.RESOLVER))
    return f"""\
server:
    username: unbound
    chroot: ""
    directory: /etc/unbound
    use-syslog: no
    do-daemonize: no
{listen}    access-control: 0.0.0.0/0 allow
    access-control: ::/0 allow
    trust-anchor-file: {ANCHOR}
    val-log-level: 2
    # Reverse names of private and documentation addresses: the operator may publish those too.
    unblock-lan-zones: yes
    # What was published a moment ago is seen at once; nobody out here remembers.
    cache-max-ttl: 1
    cache-max-negative-ttl: 1
    infra-host-ttl: 1
    # A chain of trust that expires while it is built is built anew, and short chains expire less.
    val-bogus-ttl: 1
    qname-minimisation: no
    aggressive-nsec: no
    num-threads: 1
remote-control:
    control-enable: no
"""


def _nginx_conf() -> str:
    listen = "".join(
        f"        listen {f'[{a}]' if a.version == 6 else a}:80;\n" for a in plan.MIRROR
    )
    secure = "".join(
        f"        listen {f'[{a}]' if a.version == 6 else a}:443 ssl;\n" for a in plan.ACME
    )
    certificate = _certificate_paths(plan.ACME_NAME)
    return f"""\
user www-data;
worker_processes 1;
pid /run/world-nginx/nginx.pid;
error_log stderr;
events {{ worker_connections 256; }}
http {{
    access_log off;
    default_type application/octet-stream;
    limit_req_zone $server_name zone=orders:64k rate=10r/s;
    server {{
{listen}        server_name {" ".join(plan.MIRROR_NAMES)};
        root {MIRROR};
    }}
    server {{
{secure}        server_name {plan.ACME_NAME};
        ssl_certificate {certificate["chain"]};
        ssl_certificate_key {certificate["key"]};
        proxy_set_header Host $host;
        proxy_ssl_verify on;
        proxy_ssl_name {plan.ACME_NAME};
        proxy_ssl_trusted_certificate {ETC}/root.pem;
        location / {{
            proxy_pass https://127.0.0.1:{_ACME_PORT};
        }}
        # RFC 8555, 8.2: a server tells when to look again; Pebble does not.
        location /chalZ/ {{
            proxy_pass https://127.0.0.1:{_ACME_PORT};
            add_header Retry-After 0;
        }}
        # Pebble stops for good if an order is asked for as it issues the certificate, which it does
        # right after it has answered: whoever asks next waits for a tenth of a second.
        location ~ ^/(finalize-order|my-order)/ {{
            limit_req zone=orders burst=100;
            proxy_pass https://127.0.0.1:{_ACME_PORT};
        }}
    }}
}}
"""


def _list_settings(lists: Sequence[str]) -> str:
    document = {
        "addresses": [str(address) for address in plan.LISTS],
        "server": plan.LISTS_SERVER,
        "zones": list(lists),
        "control": f"{RUN}/{LISTS_CONTROL_FILE}",
        "state": f"{RUN}/{LISTS_STATE_FILE}",
        "log": f"{RUN}/{LISTS_LOG}",
    }
    return json.dumps(document, indent=1)


def _mail_settings(
    takes: Mapping[str, Sequence[str]], mailboxes: Mapping[str, Sequence[str]]
) -> str:
    servers = []
    for mx in plan.MAIL_SERVERS.values():
        has_tls = mx.tls is not plan.Tls.NONE
        servers.append(
            {
                "name": mx.name,
                "host": mx.host,
                "addresses": [str(address) for address in mx.addresses],
                "domains": [mx.domain, *takes.get(mx.name, ())],
                "mailboxes": dict(mailboxes) if mx is plan.HOME else {},
                "mode": str(mx.mode),
                "demands": str(mx.demands),
                "certificate": _certificate_paths(mx.host) if has_tls else None,
                "wrong": _certificate_paths("wrong") if has_tls else None,
            }
        )
    document = {
        "mail": MAIL,
        "control": f"{RUN}/{CONTROL_FILE}",
        "state": f"{RUN}/{STATE_FILE}",
        "servers": servers,
    }
    return json.dumps(document, indent=1)


def _pebble_json() -> str:
    credentials = "/run/credentials/world-acme.service"
    settings = {
        "listenAddress": f"127.0.0.1:{_ACME_PORT}",
        "managementListenAddress": f"127.0.0.1:{ACME_MANAGEMENT_PORT}",
        "certificate": f"{credentials}/chain",
        "privateKey": f"{credentials}/key",
        "httpPort": 80,
        "tlsPort": 443,
        "certificateValidityPeriod": 90 * 86400,
        "retryAfter": {"authz": 1, "order": 1},
    }
    return json.dumps({"pebble": settings}, indent=1)


def _certificate_paths(name: str) -> dict[str, str]:
    folder = f"{ETC}/certificates"
    return {"chain": f"{folder}/{name}.pem", "key": f"{folder}/{name}.key"}


def _certificates(
    authority: Authority, dane: Issued, mailbox_domains: Sequence[str]
) -> dict[str, str]:
    """The old server's certificate is also for the names under which it holds mailboxes."""
    found = {
        "wrong": authority.issue(["somebody.else.example"]),
        plan.ACME_NAME: authority.issue([plan.ACME_NAME]),
    }
    for mx in plan.MAIL_SERVERS.values():
        if mx.tls is plan.Tls.AUTHORITY:
            more = mailbox_domains if mx is plan.HOME else ()
            found[mx.host] = authority.issue([mx.host, *more])
        elif mx.tls is plan.Tls.DANE:
            found[mx.host] = dane
    texts: dict[str, str] = {}
    for name, issued in found.items():
        paths = _certificate_paths(name)
        texts[paths["chain"]] = issued.chain
        texts[paths["key"]] = issued.key
    return texts
