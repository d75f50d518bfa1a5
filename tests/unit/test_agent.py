"""What the agent does with a push: files, maps, checkers, services, secrets, confirmation."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from agent import mail_agent
from agent.mail_agent import AgentError, Done, Refused
from tests.agent.fake import (
    LABEL,
    Host,
    Unit,
    attributes,
    bundle,
    check,
    secret_bundle,
    service,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners of files can be set by root only")

MAIN = "/etc/postfix/main.cf"
KEY = "/etc/keys/private"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(mail_agent, "STEADY_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    (tmp_path / "usr/sbin").mkdir(parents=True)
    return Host(tmp_path)


def live(host: Host, path: str) -> str:
    return (host.root / path.lstrip("/")).read_text()


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and change time of everything: what was touched differs in one of them."""
    paths = [p for p in root.rglob("*") if "mail-agent" not in p.parts]
    return {str(p): (p.lstat().st_ino, p.lstat().st_ctime_ns) for p in paths}


# Files


def test_a_first_push_writes_everything(host: Host) -> None:
    about = {MAIN: attributes("root", "mail", "0640")}
    assert host.apply(bundle({MAIN: "a = b\n"}, about)).startswith("applied generation 1: 1 files")
    assert live(host, MAIN) == "a = b\n"
    found = (host.root / MAIN[1:]).stat()
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert host.system.names(found.st_uid, found.st_gid) == ("root", "mail")
    assert host.active()["generation"] == 1
    assert stat.S_IMODE((host.root / "etc/postfix").stat().st_mode) == 0o755


def test_postfix_does_not_wait_for_a_file_to_be_written(host: Host) -> None:
    """It does, for one that is of this second or the one before."""
    host.apply(bundle({MAIN: "a = b\n"}))
    assert int((host.root / MAIN[1:]).stat().st_mtime) < int(time.time()) - 1


def test_the_same_push_again_touches_nothing(host: Host) -> None:
    host.system.units["postfix.service"] = Unit()
    text = bundle({MAIN: "a = b\n"}, services=[service("postfix.service", [MAIN])])
    host.apply(text)
    before = stamps(host.root)
    host.system.calls.clear()
    assert host.apply(text) == "unchanged"
    assert stamps(host.root) == before
    assert not host.system.verbs()
    assert host.active()["generation"] == 1
    assert len(host.checkers.seen) == 0


def test_the_same_files_in_other_words_are_unchanged(host: Host) -> None:
    host.apply(bundle({MAIN: "a\n"}))
    other = bundle({MAIN: "a\n"}, health=[{"kind": "command", "command": ["true"]}])
    assert host.apply(other) == "unchanged"
    assert host.active()["bundle"] == mail_agent.digest(other.encode())


def test_files_that_left_the_bundle_are_removed(host: Host) -> None:
    host.apply(bundle({MAIN: "a\n", "/etc/gone": "b\n"}))
    (host.root / "etc/theirs").write_text("c\n")
    host.apply(bundle({MAIN: "a\n"}))
    assert not (host.root / "etc/gone").exists()
    assert live(host, "/etc/theirs") == "c\n"
    assert "removing /etc/gone" in host.said


def test_what_a_service_writes_is_left_alone_and_goes_with_it(host: Host) -> None:
    pulled = host.root / "etc/certs/imap.pem"
    host.apply(bundle({MAIN: "a\n"}, produced=["/etc/certs/imap.pem"]))
    pulled.parent.mkdir()
    pulled.write_text("pulled\n")
    host.apply(bundle({MAIN: "b\n"}, produced=["/etc/certs/imap.pem"]))
    assert pulled.read_text() == "pulled\n"
    assert host.agent.drift() == []
    host.apply(bundle({MAIN: "b\n"}))
    assert not pulled.exists()
    assert "removing /etc/certs/imap.pem" in host.said


def test_a_file_may_change_hands_without_being_away(host: Host) -> None:
    """From a push to a service, and back."""
    path = "/etc/certs/imap.pem"
    host.apply(bundle({MAIN: "a\n", path: "given\n"}))
    host.apply(bundle({MAIN: "a\n"}, produced=[path]))
    assert live(host, path) == "given\n"
    (host.root / path[1:]).write_text("pulled\n")
    host.apply(bundle({MAIN: "a\n", path: "given again\n"}))
    assert live(host, path) == "given again\n"


def test_what_was_pulled_comes_back_when_its_removal_fails(host: Host) -> None:
    path = "/etc/certs/imap.pem"
    host.apply(bundle({MAIN: "a\n"}, produced=[path]))
    (host.root / "etc/certs").mkdir()
    (host.root / path[1:]).write_text("pulled\n")
    host.system.commands["false"] = lambda _: Done(1, "", "no")
    bad = {"kind": "command", "command": ["false"], "timeout": 0.1}
    with pytest.raises(AgentError, match="the previous generation is back in place"):
        host.apply(bundle({MAIN: "b\n"}, health=[bad]))
    assert live(host, path) == "pulled\n"
    assert live(host, MAIN) == "a\n"


def test_a_command_that_says_that_waiting_does_not_help_is_not_waited_for(host: Host) -> None:
    asked: list[str] = []

    def no(words: object) -> Done:
        asked.append("asked")
        return Done(os.EX_UNAVAILABLE, "", "there will be none")

    host.system.commands["ready"] = no
    health = {"kind": "command", "command": ["ready"], "timeout": 600}
    with pytest.raises(AgentError, match="there will be none"):
        host.apply(bundle({MAIN: "a\n"}, health=[health]))
    assert asked == ["asked"]


def test_a_file_changed_by_hand_is_put_right(host: Host) -> None:
    text = bundle({MAIN: "a\n"})
    host.apply(text)
    (host.root / MAIN[1:]).write_text("by hand\n")
    host.apply(text)
    assert live(host, MAIN) == "a\n"
    assert f"{MAIN} was changed by hand; it is put right" in host.said


def test_attributes_alone_are_a_change(host: Host) -> None:
    host.apply(bundle({MAIN: "a\n"}))
    host.apply(bundle({MAIN: "a\n"}, {MAIN: attributes(mode="0600")}))
    assert stat.S_IMODE((host.root / MAIN[1:]).stat().st_mode) == 0o600


def test_a_link_is_replaced_and_not_followed(host: Host) -> None:
    (host.root / "run").mkdir()
    (host.root / "run/stub").write_text("theirs\n")
    (host.root / "etc/resolv.conf").symlink_to("../run/stub")
    host.apply(bundle({"/etc/resolv.conf": "ours\n"}))
    assert not (host.root / "etc/resolv.conf").is_symlink()
    assert live(host, "/run/stub") == "theirs\n"


@pytest.mark.parametrize("at", ["etc/postfix", "etc"])
def test_a_path_through_a_link_is_refused(host: Host, at: str) -> None:
    (host.root / "etc").rmdir()
    (host.root / "elsewhere/postfix").mkdir(parents=True)
    if at != "etc":
        (host.root / "etc").mkdir()
    (host.root / at).symlink_to("/elsewhere" if at == "etc" else "../elsewhere")
    with pytest.raises(AgentError, match=rf"leads through /{at}, a symbolic link"):
        host.apply(bundle({MAIN: "a\n"}))
    assert not list((host.root / "elsewhere").rglob("*.cf"))


def test_a_directory_in_the_way_is_refused(host: Host) -> None:
    (host.root / MAIN[1:]).mkdir(parents=True)
    with pytest.raises(AgentError, match="is no file; move it away"):
        host.apply(bundle({MAIN: "a\n"}))


def test_an_unknown_owner_leaves_everything(host: Host) -> None:
    before = host.tree()
    about = {"/etc/b": attributes("nobody-here", "root")}
    with pytest.raises(AgentError, match=r"no such user or group: nobody-here:root\nnothing was"):
        host.apply(bundle({"/etc/a/a": "a\n", "/etc/b": "b\n"}, about))
    assert host.tree() == before


def test_a_file_that_changes_meanwhile_is_noticed(host: Host) -> None:
    (host.root / "etc/a").write_text("theirs\n")
    states = mail_agent.Services.states

    def meddle(services: mail_agent.Services, units: Any) -> Any:
        (host.root / "etc/a").write_text("theirs, newer\n")
        return states(services, units)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mail_agent.Services, "states", meddle)
        with pytest.raises(AgentError, match="/etc/a changed while the run was under way"):
            host.apply(bundle({"/etc/a": "ours\n"}))
    assert live(host, "/etc/a") == "theirs, newer\n"


@pytest.mark.parametrize("ready", [False, True])
def test_undoing_what_was_not_switched_leaves_a_newcomer(host: Host, ready: bool) -> None:
    real = mail_agent.write_json

    def die(path: Path, content: Any) -> None:
        if ready:
            real(path, content)
        if path.name == "journal.json" and content["ready"]:
            raise KeyboardInterrupt
        real(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mail_agent, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            host.apply(bundle({"/etc/a": "ours\n"}))
    assert host.agent.store.transaction.journal()["ready"] == ready
    if not ready:
        # Not even that was staged yet.
        (host.root / "etc/.a.mail-agent-new").unlink()
    (host.root / "etc/a").write_text("theirs\n")
    host.settle()
    assert live(host, "/etc/a") == "theirs\n"


# Health


def test_a_service_that_answers_once_and_dies_is_unhealthy(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail_agent, "STEADY_SECONDS", 0.05)
    host.system.units["a.service"] = Unit("inactive", "disabled")
    answers = iter([Done(0, "", "")])
    host.system.commands["ask"] = lambda _: next(answers, Done(1, "", "gone"))
    health = [{"kind": "command", "command": ["ask"], "timeout": 0.1}]
    with pytest.raises(AgentError, match="ask: exit 1: gone"):
        host.apply(bundle({MAIN: "a"}, services=[service("a.service")], health=health))


def test_a_service_may_take_its_time(host: Host) -> None:
    answers = iter([Done(1, "", "not yet")] * 3)
    host.system.commands["ask"] = lambda _: next(answers, Done(0, "", ""))
    health = [{"kind": "command", "command": ["ask"], "timeout": 5}]
    host.apply(bundle({MAIN: "a"}, health=health))


def test_a_unit_that_starts_over_and_over_is_unhealthy(host: Host) -> None:
    counts = iter(range(100))

    def show(words: Any) -> Done:
        if words[1] != "show":
            return Done(0, "active\n", "")
        return Done(0, f"LoadState=loaded\nActiveState=active\nNRestarts={next(counts)}\n", "")

    host.system.commands["systemctl"] = show
    with pytest.raises(AgentError, match=r"a\.service does not stay up"):
        host.apply(bundle({MAIN: "a"}, health=[{"kind": "unit", "unit": "a.service"}]))


# Maps and checkers

MAP = {"command": ["postmap", "/etc/aliases"], "source": "/etc/aliases", "output": "/etc/aliases.x"}


def test_maps_are_built_when_their_source_changes(host: Host) -> None:
    host.apply(bundle({"/etc/aliases": "a\n"}, maps=[MAP]))
    assert live(host, "/etc/aliases.x") == "map of a\n"
    host.apply(bundle({"/etc/aliases": "a\n", "/etc/other": "x\n"}, maps=[MAP]))
    assert [seen[2] for seen in host.checkers.seen] == [["/etc/aliases.x"]]
    host.apply(bundle({"/etc/aliases": "b\n", "/etc/other": "x\n"}, maps=[MAP]))
    assert live(host, "/etc/aliases.x") == "map of b\n"
    assert host.agent.drift() == []


@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_a_map_that_was_harmed_is_built_again(host: Host, harm: str) -> None:
    text = bundle({"/etc/aliases": "a\n"}, maps=[MAP])
    host.apply(text)
    output = host.root / "etc/aliases.x"
    output.unlink() if harm == "missing" else output.write_text("harmed")
    assert host.agent.drift() != []
    host.apply(text)
    assert output.read_text() == "rebuilt"
    assert host.agent.drift() == []


def test_a_map_that_left_the_bundle_is_removed(host: Host) -> None:
    host.apply(bundle({"/etc/aliases": "a\n"}, maps=[MAP]))
    host.apply(bundle({"/etc/aliases": "a\n"}))
    assert not (host.root / "etc/aliases.x").exists()


def test_a_map_made_from_secrets_must_not_be_world_readable(host: Host) -> None:
    build = {"command": ["postmap", KEY], "source": KEY, "output": f"{KEY}.x"}
    stage(host, "hush\n")
    with pytest.raises(Refused, match="made from secrets, and others might read it"):
        host.apply(secretive(maps=[build]), LABEL)
    assert not (host.root / KEY[1:]).exists()


def test_only_the_checkers_that_are_concerned_run(host: Host) -> None:
    checks = [check("postfix", "/etc/postfix"), check("nginx", "/etc/nginx/")]
    host.apply(bundle({MAIN: "a\n", "/etc/nginx/n": "n\n"}, checks=checks))
    host.apply(bundle({MAIN: "b\n", "/etc/nginx/n": "n\n"}, checks=checks))
    host.apply(bundle({MAIN: "b\n"}, checks=checks))
    assert [seen[3] for seen in host.checkers.seen] == [
        ["postfix", "nginx"],
        ["postfix"],
        ["nginx"],
    ]
    assert host.checkers.seen[2][1] == ["/etc/nginx/n"]


def test_a_refused_change_touches_nothing(host: Host) -> None:
    host.system.units["postfix.service"] = Unit()
    parts = {
        "checks": [check("checker", "/etc/postfix")],
        "services": [service("postfix.service", ["/etc/postfix"])],
    }
    host.apply(bundle({MAIN: "a\n"}, **parts))
    before = stamps(host.root)
    host.system.calls.clear()
    host.checkers.words = f"postfix: fatal: {MAIN}, line 2: missing '=' after \"foo\""
    about = {MAIN: attributes(template="templates/main.cf.j2")}
    with pytest.raises(Refused) as caught:
        host.apply(bundle({MAIN: "a\nfoo\n"}, about, **parts))
    assert caught.value.code == mail_agent.EXIT_REFUSED
    assert f"{MAIN}:2: postfix: fatal:" in str(caught.value)
    assert "(template templates/main.cf.j2)" in str(caught.value)
    assert stamps(host.root) == before
    assert not host.system.verbs()


# Packages


def test_missing_packages_are_installed_while_services_are_kept_down(host: Host) -> None:
    seen = []

    def apt(words: Any) -> Done:
        seen.append((words[-1], live(host, mail_agent.POLICY_RC_D).endswith("exit 101\n")))
        return Done(0, "", "")

    host.system.commands["apt-get"] = apt
    host.system.commands["dpkg-query"] = lambda _: Done(1, "installed here\n", "no such package")
    host.apply(bundle({}, packages=["here", "missing"]))
    assert seen == [("update", True), ("missing", True)]
    assert not (host.root / mail_agent.POLICY_RC_D[1:]).exists()


@pytest.mark.parametrize("keep", [True, False])
def test_packages_of_the_operator_do_not_make_room(host: Host, keep: bool) -> None:
    def apt(words: Any) -> Done:
        said = "Inst ours (1 Debian)\nRemv theirs [2]\n" if "--simulate" in words else ""
        return Done(0, said, "")

    host.system.commands["apt-get"] = apt
    host.system.commands["dpkg-query"] = lambda _: Done(1, "", "")
    if keep:
        with pytest.raises(
            AgentError, match=r"ours would take the place of theirs.*'mta: replace'"
        ):
            host.apply(bundle({}, packages=["ours"], keep_packages=True))
    else:
        host.apply(bundle({}, packages=["ours"], keep_packages=False))
    installed = [c for c in host.system.calls if "install" in c and "--simulate" not in c]
    assert bool(installed) != keep
    assert not (host.root / mail_agent.POLICY_RC_D[1:]).exists()


def test_a_policy_of_the_operator_is_kept(host: Host) -> None:
    policy = host.root / mail_agent.POLICY_RC_D[1:]
    policy.write_text("theirs")
    host.system.commands["dpkg-query"] = lambda _: Done(1, "", "")
    host.system.commands["apt-get"] = lambda _: Done(100, "", "E: no such package")
    with pytest.raises(AgentError, match="could not install missing"):
        host.apply(bundle({}, packages=["missing"]))
    assert policy.read_text() == "theirs"
    assert [p.name for p in policy.parent.iterdir()] == ["policy-rc.d"]


@pytest.mark.parametrize("theirs", ["", "theirs"])
def test_a_killed_installation_is_finished_by_the_next_run(host: Host, theirs: str) -> None:
    policy = host.root / mail_agent.POLICY_RC_D[1:]
    policy.write_text(mail_agent.POLICY_TEXT)
    if theirs:
        (host.root / mail_agent.POLICY_ASIDE[1:]).write_text(theirs)
    host.settle(boot=True)
    # No package is configured while the machine boots: it might wait for what waits for us.
    assert not host.system.calls
    host.settle()
    assert ["dpkg", "--configure", "-a", "--force-confold"] in host.system.calls
    assert (policy.read_text() if theirs else policy.exists()) == (theirs or False)


# Services


@pytest.fixture
def serving(host: Host) -> Host:
    host.system.units |= {"a.service": Unit(), "b.service": Unit()}
    host.apply(serving_bundle())
    host.system.calls.clear()
    return host


def serving_bundle(a: str = "1", b: str = "1", c: str = "1", **parts: Any) -> str:
    services = [
        service("a.service", reload_on=["/etc/a"], restart_on=["/etc/a/hard"]),
        service("b.service", restart_on=["/etc/b"]),
    ]
    files = {"/etc/a/soft": a, "/etc/a/hard": b, "/etc/b/x": c}
    return bundle(files, **({"services": services} | parts))


def test_reload_where_it_suffices(serving: Host) -> None:
    assert serving.apply(serving_bundle(a="2")).endswith("1 services reloaded, 0 restarted")
    assert serving.system.verbs() == ["reload a.service"]


def test_restart_wins_over_reload(serving: Host) -> None:
    serving.apply(serving_bundle(a="2", b="2"))
    assert serving.system.verbs() == ["restart a.service"]


def test_a_unit_that_cannot_reload_is_restarted(serving: Host) -> None:
    serving.system.units["a.service"].can_reload = "no"
    serving.apply(serving_bundle(a="2"))
    assert serving.system.verbs() == ["restart a.service"]


def test_a_stopped_service_is_started_again(serving: Host) -> None:
    serving.system.units["b.service"].active = "failed"
    assert serving.agent.drift() == ["b.service: failed instead of active"]
    assert serving.apply(serving_bundle()) == "unchanged; started b.service, which had stopped"


def test_a_masked_and_disabled_service_is_brought_up(serving: Host) -> None:
    serving.system.units["b.service"] = Unit("inactive", "masked", load="masked")
    serving.apply(serving_bundle())
    assert vars(serving.system.units["b.service"]) == vars(Unit())


def test_a_service_that_left_the_bundle_is_stopped_before_its_unit_goes(host: Host) -> None:
    unit = "/etc/systemd/system/own.service"
    host.system.units["own.service"] = Unit("inactive", "disabled")
    host.apply(bundle({unit: "[Service]\n"}, services=[service("own.service")]))
    systemctl = host.system.run

    def look(command: Any, timeout: float = 600) -> Done:
        if command[:2] == ["systemctl", "stop"]:
            assert (host.root / unit[1:]).exists()
        return systemctl(command, timeout)

    host.system.run = look  # type: ignore[method-assign]
    host.apply(bundle({}))
    assert vars(host.system.units["own.service"]) == vars(Unit("inactive", "disabled"))
    assert not (host.root / unit[1:]).exists()


def test_a_failed_service_takes_everything_back(serving: Host) -> None:
    before = serving.tree()
    real = serving.system.run

    def mended(command: Any, timeout: float = 600) -> Done:
        wrong = live(serving, "/etc/b/x") == "2"
        serving.system.units["b.service"].fails = ("restart",) if wrong else ()
        return real(command, timeout)

    serving.system.run = mended  # type: ignore[method-assign]
    with pytest.raises(AgentError, match=r"Job for b\.service failed") as caught:
        serving.apply(serving_bundle(a="2", c="2"))
    assert caught.value.code == mail_agent.EXIT_ROLLED_BACK
    assert serving.tree() == before
    # The first was only told to read its old files again; the second had to be started again.
    assert serving.system.verbs("reload", "restart") == [
        "reload a.service",
        "restart b.service",
        "reload a.service",
        "restart b.service",
    ]
    assert {u.active for u in serving.system.units.values()} == {"active"}


def test_taking_back_leaves_untouched_services_alone(serving: Host) -> None:
    serving.system.commands["ask"] = lambda _: Done(1, "", "sick")
    sick = [{"kind": "command", "command": ["ask"], "timeout": 0}]
    with pytest.raises(AgentError, match="sick"):
        serving.apply(serving_bundle(a="2", health=sick))
    assert serving.system.verbs() == ["reload a.service", "reload a.service"]


def test_what_was_restarted_is_restarted_again(serving: Host) -> None:
    serving.system.commands["ask"] = lambda _: Done(1, "", "sick")
    sick = [{"kind": "command", "command": ["ask"], "timeout": 0}]
    with pytest.raises(AgentError, match="sick"):
        serving.apply(serving_bundle(b="2", health=sick))
    assert serving.system.verbs() == ["restart a.service", "restart a.service"]


def test_what_was_started_and_enabled_is_stopped_and_disabled_again(host: Host) -> None:
    host.system.units["new.service"] = Unit("inactive", "disabled")
    host.system.commands["ask"] = lambda _: Done(1, "", "sick")
    sick = [{"kind": "command", "command": ["ask"], "timeout": 0}]
    with pytest.raises(AgentError, match="sick"):
        host.apply(bundle({"/etc/a": "1"}, services=[service("new.service")], health=sick))
    assert vars(host.system.units["new.service"]) == vars(Unit("inactive", "disabled"))


def test_a_killed_run_is_taken_back_with_its_services(serving: Host) -> None:
    before = serving.tree()

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mail_agent.Health, "wait", die)
        with pytest.raises(KeyboardInterrupt):
            serving.apply(serving_bundle(a="2"))
    serving.system.calls.clear()
    assert serving.agent.status()["interrupted"]
    assert serving.settle() == "undid an interrupted change"
    assert serving.tree() == before
    assert serving.system.verbs() == ["reload a.service"]


def test_at_boot_files_come_back_and_services_are_left_to_systemd(serving: Host) -> None:
    before = serving.tree()

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mail_agent.Health, "wait", die)
        with pytest.raises(KeyboardInterrupt):
            serving.apply(serving_bundle(a="2", b="2"))
    serving.system.calls.clear()
    serving.settle(boot=True)
    assert serving.tree() == before
    assert not serving.system.verbs()
    assert ["systemctl", "daemon-reload"] in serving.system.calls


# Secrets


def stage(machine: Host, text: str, **parts: Any) -> None:
    machine.agent.stage_secrets(secret_bundle({KEY: text}, **parts))


def secretive(**parts: Any) -> str:
    return bundle({MAIN: "a\n"}, secret_paths=[KEY], **parts)


def test_secrets_are_staged_inactive_and_activated_by_their_digest(host: Host) -> None:
    stage(host, "hush\n")
    assert not (host.root / KEY[1:]).exists()
    host.apply(secretive(), LABEL)
    assert live(host, KEY) == "hush\n"
    assert stat.S_IMODE((host.root / KEY[1:]).stat().st_mode) == 0o640


def test_staged_secrets_are_for_root_alone(host: Host) -> None:
    stage(host, "hush\n")
    state = host.system.state
    assert {stat.S_IMODE(p.stat().st_mode) for p in state.rglob("*") if p.is_dir()} == {0o700}
    files = [p for p in state.rglob("*") if p.is_file()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o600}


def test_old_secrets_are_forgotten_after_the_commit(host: Host) -> None:
    stage(host, "hush\n")
    host.apply(secretive(), LABEL)
    other = "cd" * 32
    stage(host, "new\n", digest=other)
    host.apply(secretive(), other)
    assert [p.stem for p in (host.system.state / "secrets").iterdir()] == [other]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("", "needs secrets; name them with --secrets"),
        ("ef" * 32, "no secrets are staged under efefefefefef"),
        ("../../etc/passwd", "not 64 hexadecimal digits"),
    ],
)
def test_a_push_without_its_secrets_is_refused(host: Host, label: str, words: str) -> None:
    with pytest.raises(AgentError, match=words):
        host.apply(secretive(), label)
    assert not (host.root / MAIN[1:]).exists()


def test_secrets_of_another_host_are_refused(host: Host) -> None:
    stage(host, "hush\n", host="other.example.org")
    with pytest.raises(AgentError, match="are of another host"):
        host.apply(secretive(), LABEL)


def test_secrets_that_do_not_match_the_files_are_refused(host: Host) -> None:
    stage(host, "hush\n")
    with pytest.raises(AgentError, match="are not those that the files expect"):
        host.apply(bundle({MAIN: "a\n"}, secret_paths=[KEY, "/etc/keys/more"]), LABEL)


@pytest.mark.parametrize("mode", ["0644", "0604", "0641"])
def test_a_world_readable_secret_is_refused(host: Host, mode: str) -> None:
    text = secret_bundle({KEY: "hush"}, {KEY: attributes(mode=mode)})
    with pytest.raises(AgentError, match=f"{KEY}: a secret that others may read"):
        host.agent.stage_secrets(text)
    assert not list((host.system.state / "secrets").iterdir())


SECRET = "alice:{BLF-CRYPT}$2y$05$Zm9vYmFyYmF6cXV4\nmy secret line\n"


def test_secrets_are_never_said(host: Host) -> None:
    """Not by a checker, a unit's journal or a health check that repeats them, nor anywhere else."""
    stage(host, SECRET)
    host.system.units["a.service"] = Unit(fails=("restart",))
    host.system.commands["journalctl"] = lambda _: Done(0, f"bad line: {SECRET}", "")
    told = []
    for words in (f'{KEY}: line 1: bad hash "{SECRET.splitlines()[0]}"', ""):
        host.checkers.words = words
        with pytest.raises(AgentError) as caught:
            host.apply(
                secretive(
                    services=[service("a.service", restart_on=["/etc"])],
                    checks=[check("checker", "/etc")],
                ),
                LABEL,
            )
        told.append(host.agent_that_ran.veil(str(caught.value)))
    assert "***" in told[0] and "***" in told[1]
    everything = "\n".join((*told, *host.said, json.dumps(host.agent.status())))
    assert "Zm9vYmFyYmF6cXV4" not in everything
    assert "my secret line" not in everything
    assert not any("Zm9vYmFy" in word for call in host.system.calls for word in call)


# Confirmation

RULES = "/etc/nftables.conf"


def guarded(text: str, **parts: Any) -> str:
    return bundle({RULES: text}, guarded=["/etc/nftables.conf"], **parts)


def test_a_guarded_change_waits_to_be_confirmed(host: Host) -> None:
    host.apply(guarded("one"))
    ((identity, seconds),) = host.armed
    assert seconds == mail_agent.LOCKOUT_SECONDS
    assert f"confirm: {identity}" in host.said
    assert host.agent.status() | {"pending": 1, "generation": 0} == host.agent.status()
    assert host.agent.drift() == []


def test_an_unguarded_change_is_active_at_once(host: Host) -> None:
    host.apply(bundle({"/etc/other": "x"}, guarded=[RULES]))
    assert host.armed == []
    assert host.active()["generation"] == 1


def confirm(host: Host, expected: str = "", label: str = "") -> int:
    return mail_agent.confirm(host.system, host.agent.store, expected, label)


def test_confirming_makes_it_active(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    text = guarded("one")
    host.apply(text)
    assert confirm(host, mail_agent.digest(text.encode())) == 0
    assert host.active()["generation"] == 1
    assert live(host, RULES) == "one"
    identity = host.armed[0][0]
    unit = f"mail-agent-lockout-{identity}"
    assert ["systemctl", "stop", f"{unit}.timer", f"{unit}.service"] in host.system.calls
    assert confirm(host) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing to confirm"


def test_the_timer_takes_it_back(host: Host) -> None:
    (host.root / "etc/nftables.conf").write_text("before")
    before = host.tree()
    host.apply(guarded("one"))
    host.agent.lock_out(host.armed[0][0])
    assert host.tree() == before
    assert host.active()["generation"] == 0


def test_a_late_timer_does_not_touch_what_was_confirmed(host: Host) -> None:
    host.apply(guarded("one"))
    late = host.armed[0][0]
    confirm(host)
    host.agent.lock_out(late)
    host.apply(guarded("two"))
    host.agent.lock_out(late)
    assert live(host, RULES) == "two"


def test_a_timer_that_runs_out_in_the_commit_does_nothing(host: Host) -> None:
    host.apply(guarded("one"))
    # Committed, and killed before it was tidied up.
    host.agent.store.commit()
    host.agent.lock_out(host.armed[0][0])
    assert live(host, RULES) == "one"
    assert host.settle() == "completed an interrupted change"
    assert host.active()["generation"] == 1


def test_another_push_confirms(host: Host) -> None:
    host.apply(guarded("one"))
    host.apply(guarded("one", services=[]))
    assert host.active()["generation"] == 1


def test_recovering_leaves_what_waits_alone_except_at_boot(host: Host) -> None:
    host.apply(guarded("one"))
    assert "generation 1 waits to be confirmed" in str(host.settle())
    assert live(host, RULES) == "one"
    host.settle(boot=True)
    assert not (host.root / RULES[1:]).exists()


def test_confirming_what_was_taken_back_applies_it_again(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = guarded("one")
    host.apply(text)
    host.agent.store.remember_push(text, "")
    host.agent.lock_out(host.armed[0][0])
    again = []

    def follow(system: Any, store: Any, text: str, label: str, lockout: int) -> int:
        again.append((text, label, lockout))
        return 0

    monkeypatch.setattr(mail_agent, "follow", follow)
    code = confirm(host, mail_agent.digest(text.encode()))
    assert code == mail_agent.EXIT_AGAIN
    assert again == [(text, "", mail_agent.REAPPLIED_LOCKOUT_SECONDS)]
    assert "run 'pulumi up' again" in capsys.readouterr().out


def test_confirming_another_configuration_is_refused(host: Host) -> None:
    host.apply(guarded("one"))
    with pytest.raises(AgentError, match="push it again: pulumi up"):
        confirm(host, "0" * 64)


def test_secrets_that_were_taken_back_are_not_taken_for_confirmed(host: Host) -> None:
    text = guarded("one")
    host.apply(text)
    confirm(host)
    host.agent.store.remember_push(text, "")
    with pytest.raises(AgentError, match="not the active one"):
        confirm(host, mail_agent.digest(text.encode()), LABEL)


def test_secrets_staged_while_a_generation_waits_are_kept(host: Host) -> None:
    host.apply(guarded("one"))
    host.agent.stage_secrets(secret_bundle({KEY: "x\n"}))
    host.apply(guarded("two", secret_paths=[KEY]), LABEL)
    assert live(host, KEY) == "x\n"


def test_a_unit_of_the_operator_goes_on_when_our_files_leave(host: Host) -> None:
    host.system.units["nginx.service"] = Unit()
    ours = service("nginx.service", [MAIN]) | {"foreign": True}
    host.apply(bundle({MAIN: "a\n"}, services=[ours]))
    host.system.calls.clear()
    host.apply(bundle({}))
    assert not (host.root / MAIN[1:]).exists()
    assert host.system.verbs() == ["reload nginx.service"]


def test_a_timer_that_cannot_be_armed_takes_the_change_back(host: Host) -> None:
    host.system.commands["systemd-run"] = lambda _: Done(1, "", "no bus")
    agent = mail_agent.Agent(host.system, host.said.append, host.checkers)  # type: ignore[arg-type]
    with pytest.raises(AgentError, match="lock-out timer did not start: no bus"):
        agent.apply(guarded("one"), "")
    assert not (host.root / RULES[1:]).exists()


# Drift


def test_drift_names_what_differs(host: Host) -> None:
    names = [f"/etc/{name}" for name in ("changed", "folder", "link", "missing", "mode", "same")]
    host.apply(bundle(dict.fromkeys(names, "x")))
    assert host.agent.drift() == []
    etc = host.root / "etc"
    (etc / "changed").write_text("y")
    (etc / "folder").unlink()
    (etc / "folder").mkdir()
    (etc / "link").unlink()
    (etc / "link").symlink_to("same")
    (etc / "missing").unlink()
    (etc / "mode").chmod(0o600)
    assert host.agent.drift() == [
        "/etc/changed: content changed",
        "/etc/folder: replaced by something that is no file",
        "/etc/link: replaced by a link to same",
        "/etc/missing: missing",
        "/etc/mode: root:root 0600 instead of root:root 0644",
    ]


# The lock, and the state


def test_a_run_waits_for_another(host: Host) -> None:
    with host.agent.store.locked(host.said.append):
        with (
            pytest.raises(AgentError, match="another run still holds") as caught,
            host.agent.store.locked(host.said.append, seconds=0.2),
        ):
            pytest.fail("two runs at once")
        assert caught.value.code == mail_agent.EXIT_LOCKED
        assert host.said == ["waiting for another run on this host to end"]
    with host.agent.store.locked(host.said.append, seconds=0):
        pass


def test_a_damaged_state_is_named(host: Host) -> None:
    (host.system.state / "active.json").write_text("{")
    with pytest.raises(AgentError, match=r"active\.json is damaged .* moved away"):
        host.apply(bundle({}))


def test_runs_are_named_by_age_though_the_clock_jumps(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = host.agent.store
    names = [store.new_run().name]
    monkeypatch.setattr(mail_agent.time, "time_ns", lambda: 1)
    names += [store.new_run().name for _ in range(3)]
    assert names == sorted(set(names))


def test_old_runs_are_forgotten_except_those_under_way(host: Host) -> None:
    store = host.agent.store
    runs = [store.new_run() for _ in range(mail_agent.KEPT_RUNS + 3)]
    (runs[0] / "result").write_text("{}")
    host.system.units[f"mail-agent-{runs[1].name}.service"] = Unit("active")
    store.prune_runs()
    assert [run.exists() for run in runs[:4]] == [False, True, False, True]


def test_another_versions_transaction_is_ended_by_that_version(host: Host) -> None:
    folder = host.system.state / "transaction"
    folder.mkdir()
    (folder / "journal.json").write_text(json.dumps({"format": 99}))
    asked = []

    def other(words: Any) -> Done:
        asked.append(words[-2:])
        return Done(0, "undid it\n", "")

    host.system.commands[mail_agent.sys.executable] = other
    assert host.settle(boot=True) == "undid it"
    assert asked == [["_settle", "--boot"]]


# Another version of the agent


def test_the_agent_that_comes_with_the_push_runs_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail_agent, "watch", lambda system, folder, unit: 0)
    text = bundle({mail_agent.AGENT_PATH: "print('newer')\n"})
    assert mail_agent.follow(host.system, host.agent.store, text, "", 90) == 0
    tested, started = (c for c in host.system.calls if mail_agent.sys.executable in c)
    staged = Path(tested[2])
    assert tested[-1] == "--self-test"
    assert staged.read_text() == "print('newer')\n"
    assert str(staged) in started
    assert started[-3:] == ["_run", staged.parent.name, "-"] or started[-1] == "90"


def test_a_new_agent_that_fails_its_test_is_refused(host: Host) -> None:
    failed = Done(1, "", "SyntaxError: invalid syntax")
    host.system.commands[mail_agent.sys.executable] = lambda _: failed
    with pytest.raises(Refused, match="fails its own test: SyntaxError"):
        mail_agent.follow(
            host.system, host.agent.store, bundle({mail_agent.AGENT_PATH: "x("}), "", 90
        )
    assert not any(c[0] == "systemd-run" for c in host.system.calls)
    assert not list((host.system.state / "runs").iterdir())


def test_the_same_agent_runs_itself(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail_agent, "watch", lambda system, folder, unit: 0)
    own = Path(mail_agent.__file__).read_text()
    text = bundle({mail_agent.AGENT_PATH: own})
    mail_agent.follow(host.system, host.agent.store, text, "", 90)
    (started,) = (c for c in host.system.calls if c[0] == "systemd-run")
    assert mail_agent.__file__ in started


def test_the_run_leaves_log_and_result(host: Host) -> None:
    store = host.agent.store
    folder = store.new_run()
    (folder / "bundle.json").write_text("{}")
    assert mail_agent.run_unit(host.system, folder.name, "-", 90) == mail_agent.EXIT_BAD
    assert (folder / "log").read_text() == (
        "mail-agent: the document is not of format 1; the agent may be too old\n"
    )
    assert json.loads((folder / "result").read_text()) == {"code": mail_agent.EXIT_BAD}
    assert not (folder / "bundle.json").exists()
