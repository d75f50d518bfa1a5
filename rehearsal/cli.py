"""The commands of a rehearsal: ``python -m rehearsal --help``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from mailsite.loader import SiteError
from mailsite.model import Platform, Role
from rehearsal import cleanup, image, network, tools
from rehearsal.machine import Machine
from rehearsal.progress import Progress, RehearsalError
from rehearsal.state import CHECKOUT, State, locked

_PLACES = {
    "operator": network.OPERATOR,
    "core": network.CORE,
    **{name: f"mail-obs-{name}" for name in network.OBSERVERS},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 failed, 2 misused, 130 interrupted."""
    options = _parser().parse_args(arguments)
    progress = Progress()
    command: Callable[[argparse.Namespace, Progress], int] = options.command
    try:
        return command(options, progress)
    except (RehearsalError, SiteError) as error:
        print(f"\nrehearsal: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has seen enough: `... mail | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(
            "\nrehearsal: interrupted; the same command goes on where this one stopped,"
            " `make down` removes everything",
            file=sys.stderr,
        )
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rehearsal",
        description="The whole mail platform on this one machine, in a sealed network.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable[[argparse.Namespace, Progress], int], text: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        made.set_defaults(command=command)
        return made

    made = add("up", _up, "bring the platform up, or up to date with the site data")
    made.add_argument("--stack", default="prod", help="the Pulumi stack (prod)")
    add("status", _status, "list what of the rehearsal runs")
    made = add("verify", _verify, "make the checks of the mail contract")
    made.add_argument("--all", action="store_true", help="the slow and disruptive ones too")
    made.add_argument("--quick", action="store_true", help="what takes seconds (the default)")
    made.add_argument("--only", default="", metavar="IDS", help="just these, such as OUT-1,EDGE")
    add("contract", _contract, "make every check of the mail contract, the disruptive ones too")
    made = add("shell", _shell, "open a root shell on a host, in the world, or in a network")
    made.add_argument("host", help=f"a host's name, world, or one of: {', '.join(_PLACES)}")
    made.add_argument("words", nargs=argparse.REMAINDER, help="a command instead of the shell")
    made = add("logs", _logs, "print the journal of a host; of a dead one too")
    made.add_argument("host", help="a host's name, or world")
    made.add_argument(
        "words", nargs=argparse.REMAINDER, help="options of journalctl (-n 100, -u postfix@-, -f)"
    )
    made = add("mail", _mail, "list what arrived at the remote mail servers, or print one mail")
    made.add_argument("server", nargs="?", help="a server of the world, such as strict")
    made.add_argument("id", nargs="?", help="the mail to print")
    made = add("open", _open, "serve the webmail of the sealed network on a loopback port")
    made.add_argument("--port", type=int, default=8443, help="the port (8443)")
    add("preview", _preview, "print what up would change: file by file, line by line")
    made = add("pulumi", _pulumi, "run the plain command line on the rehearsal's stack")
    made.add_argument("words", nargs=argparse.REMAINDER, help="such as: stack export")
    add("image", _image, "build the image layers and get the engine, and leave")
    add("down", _down, "stop the rehearsal and remove everything of it but the cache")
    return parser


# Commands --------------------------------------------------------------------------------------


def _up(options: argparse.Namespace, progress: Progress) -> int:
    from rehearsal import platform_up

    site = platform_up.Site.of(options.stack)
    site.platform()  # bad site data is refused before anything is asked of this machine
    with _exclusively(progress):
        changes = platform_up.up(site, State(), progress)
    counted = ", ".join(f"{count} {op}" for op, count in sorted(changes.items()))
    progress.say(f"the platform is up ({counted or 'nothing to do'})")
    return 0


def _exclusively(progress: Progress) -> AbstractContextManager[None]:
    """One command at a time changes the rehearsal."""
    tools.require_root()
    return locked(cleanup.RUN / "lock", progress, "another command works on the rehearsal")


def _status(options: argparse.Namespace, progress: Progress) -> int:
    from rehearsal import platform_up

    state = State()
    site = platform_up.current(state)
    rows = [("stack", site.stack, "")]
    there = set(network.namespaces())
    rows += [("network", n, "up") for n in sorted(there) if not n.startswith("mail-m-")]
    standins = platform_up.standins_process(state)
    rows.append(("stand-ins", "", f"process {standins.pid}" if standins else "down"))
    for machine in Machine.all(state):
        said = "down"
        if machine.alive():
            done = machine.run(["systemctl", "is-system-running"], check=False)
            said = done.stdout.strip() or "booting"
            if said == "degraded":
                failed = machine.run(
                    ["systemctl", "--failed", "--plain", "--no-legend"], check=False
                ).stdout.split("\n")
                said += ": " + ", ".join(line.split()[0] for line in failed if line)
        rows.append(("machine", machine.name, said))
    rows += [("pairsync", host, said) for host, said in _replicas(state, site.platform())]
    wide = max(len(r[1]) for r in rows)
    for kind, name, said in rows:
        print(f"{kind:<10} {name:<{wide}} {said}".rstrip())
    report = state.root / "report.json"
    if report.exists():
        age = time.time() - report.stat().st_mtime
        print(f"report     {report} ({age / 60:.0f} minutes old)")
    return 0


def _replicas(state: State, platform: Platform) -> Iterator[tuple[str, str]]:
    """Each replica of the mailboxes, and what its pairsync says of itself."""
    for host in platform.members(Role.MAILDROP):
        machine = Machine.load(host.name, state)
        if machine is None or not machine.alive():
            continue
        done = machine.run(["pairsync", "status", "--json"], check=False)
        if not done.stdout:
            yield host.name, done.stderr.strip() or "does not answer"
            continue
        document = json.loads(done.stdout)
        lag, oldest = document["lag"], document["oldest"]
        failing = document["failing"]
        yield (
            host.name,
            f"peer {'up' if document['peer']['up'] else 'AWAY'};"
            f" lag p50 {lag['p50']:.3f} s, p95 {lag['p95']:.3f} s, p99 {lag['p99']:.3f} s;"
            f" {document['dirty']} dirty users, the oldest for {oldest['seconds']:.1f} s;"
            f" {len(failing)} failing",
        )
        for user, about in sorted(failing.items()):
            yield "", f"{user}: {about['failures']} failed runs: {about['words']}"


def _verify(options: argparse.Namespace, progress: Progress) -> int:
    words = ["--all"] if options.all else ["--quick"]
    if options.only:
        words += ["--only", options.only]
    return _run_checks(words, progress)


def _contract(options: argparse.Namespace, progress: Progress) -> int:
    return _run_checks(["--all"], progress)


def _run_checks(words: Sequence[str], progress: Progress) -> int:
    from rehearsal import platform_up

    state = State()
    site = platform_up.current(state)
    return subprocess.run(
        [
            *(sys.executable, "-m", "verify", "--stack", site.stack),
            *("--state", str(state.root), *words),
        ],
        cwd=CHECKOUT,
        env=tools.environment(PYTHONUNBUFFERED="1"),
    ).returncode


def _machine(name: str, state: State) -> Machine:
    """The machine called ``name``; a beginning that fits one machine alone is enough."""
    known = {m.name: m for m in Machine.all(state)}
    fitting = [name] if name in known else [n for n in known if n.startswith(name)]
    if len(fitting) == 1:
        return known[fitting[0]]
    problem = f"{name} may be {', '.join(fitting)}" if fitting else f"there is no machine {name}"
    raise RehearsalError(
        problem, f"choose one of: {', '.join(known) or 'none, run: make rehearsal'}"
    )


def _shell(options: argparse.Namespace, progress: Progress) -> int:
    tools.require_root()
    environment = {**tools.environment(), "TERM": os.environ.get("TERM", "dumb")}
    if options.host in _PLACES:
        entrance = ["nsenter", f"--net={network.NETNS / _PLACES[options.host]}", "--"]
        if _PLACES[options.host] not in network.namespaces():
            raise RehearsalError("no rehearsal is up", "run: make rehearsal")
    else:
        entrance = _machine(options.host, State()).entrance()
    words = options.words or ["bash", "-l"]
    return subprocess.run([*entrance, *words], env=environment).returncode


def _logs(options: argparse.Namespace, progress: Progress) -> int:
    machine = _machine(options.host, State())
    if machine.alive():
        argv = [*machine.entrance(), "journalctl", "--no-pager", *options.words]
        return subprocess.run(argv, env=tools.environment()).returncode
    print(machine.logs(*options.words), end="")
    return 0


def _mail(options: argparse.Namespace, progress: Progress) -> int:
    from rehearsal import platform_up
    from rehearsal.world import plan
    from rehearsal.world.world import Message

    state = State()
    platform_up.current(state)
    servers = [options.server] if options.server else list(plan.MAIL_SERVERS)
    for server in servers:
        if server not in plan.MAIL_SERVERS:
            raise RehearsalError(
                f"the world has no mail server {server}",
                f"choose one of: {', '.join(plan.MAIL_SERVERS)}",
            )
        folder = state.world / "mail" / server
        found = [Message.read(p) for p in sorted(folder.glob("*.json"))]
        for message in sorted(found, key=lambda m: m.at):
            if options.id is None:
                when = time.strftime("%H:%M:%S", time.localtime(message.at))
                dkim = ", ".join(f"{s.d} {s.result}" for s in message.dkim) or "none"
                print(
                    f"{when} {server} {message.id}: {message.mail_from or '<>'} -> "
                    f"{', '.join(message.rcpt_to)}: {message.subject}\n"
                    f"         from {message.peer}, spf {message.spf}, dkim {dkim}, "
                    f"dmarc {message.dmarc}, {message.reply}"
                )
            elif message.id == options.id:
                sys.stdout.buffer.write(message.content)
                return 0
    if options.id is not None:
        raise RehearsalError(f"{options.server} has no mail {options.id}", "see: ... mail")
    return 0


def _open(options: argparse.Namespace, progress: Progress) -> int:
    from rehearsal import door, platform_up
    from verify.passwords import mailbox_password

    tools.require_root()
    state = State()
    platform = platform_up.current(state).platform(state.world_overlay)
    way = door.Door(platform, state)
    boxes = [box.name for box in platform.mailboxes.values() if not box.suspended]
    try:
        server = door.Server(way.connect, way.name, options.port)
    except OSError as error:
        raise RehearsalError(
            f"port {options.port}: {error.strerror}", "choose another one with --port"
        ) from None
    with server:
        print(f"{way.name} of the rehearsal: {server.address}")
        for box in boxes:
            print(f"  login {box}, password {mailbox_password(state.root, box)}")
        print("Ctrl-C closes it.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


def _preview(options: argparse.Namespace, progress: Progress) -> int:
    from rehearsal import platform_up

    with _exclusively(progress):
        state = State()
        platform_up.current(state).platform()
        platform_up.stack(state, progress).preview()
    return 0


def _pulumi(options: argparse.Namespace, progress: Progress) -> int:
    from rehearsal import platform_up

    with _exclusively(progress):
        return platform_up.stack(State(), progress).pulumi(options.words)


def _image(options: argparse.Namespace, progress: Progress) -> int:
    from rehearsal import engine

    tools.ensure(progress)
    layers = image.ensure(progress)
    found = engine.ensure(progress)
    for path in (*layers.postfix, layers.world[-1], layers.aptrepo, found.pulumi):
        print(path)
    return 0


def _down(options: argparse.Namespace, progress: Progress) -> int:
    root = CHECKOUT / ".rehearsal"
    with _exclusively(progress):
        cleanup.down(State(root), progress)
    return 0
