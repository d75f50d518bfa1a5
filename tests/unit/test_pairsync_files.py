"""Markers, states, scripts, configuration: what pairsync keeps and reads on disk."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairsync import locks
from pairsync.config import ConfigError, PassConfig, SieveConfig, load, parse, read_secret
from pairsync.doveadm import Doveadm, Reply, escape, unescape
from pairsync.markers import Markers, file_name, user_name
from pairsync.night import last_slot
from pairsync.sieve import Scripts, is_newer
from pairsync.state import States, UserState

CODE = Path(__file__).parents[2] / "pairsync"
MINIMAL = """\
name = "a"
[peer]
name = "b"
[tls]
certificate = "/c"
key = "/k"
"""


# Locks -----------------------------------------------------------------------------------------


def test_locks_of_before_the_boot_are_removed(tmp_path: Path) -> None:
    names = {
        "mdbox/subscriptions.lock",
        "mdbox/dovecot.list.index.log.newlock",
        "mdbox/storage/dovecot.map.index.log.newlock",
        "mdbox/mailboxes/Lists/mailboxes/debian/dbox-Mails/dovecot.index.log.newlock",
    }
    others = {"mdbox/subscriptions", "mdbox/dovecot.list.index.log", "mdbox/mailboxes.lock"}
    booted = locks.booted()
    assert 0 < booted < time.time()
    for home, times in (("old", (booted - 1, booted - 1)), ("new", None)):
        for name in names | others:
            path = tmp_path / home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.utime(path, times)
    assert locks.remove(tmp_path / "old", booted) == len(names)
    assert locks.remove(tmp_path / "new", booted) == 0
    assert {name for name in names | others if (tmp_path / "old" / name).exists()} == others
    assert all((tmp_path / "new" / name).exists() for name in names)


# Markers ---------------------------------------------------------------------------------------


def test_changed_subscriptions_are_no_marker_and_are_told_once(tmp_path: Path) -> None:
    markers = Markers([tmp_path])
    markers.prepare()
    (tmp_path / "dirty" / "~a%2Fb").touch()
    assert markers.dirty() == {}
    assert markers.take_subscribed("a%2Fb") is None
    assert markers.take_subscribed("~a%2Fb") == "a/b"
    assert not list((tmp_path / "dirty").iterdir())


@given(st.text(min_size=1, max_size=60))
def test_a_markers_name_tells_the_user(user: str) -> None:
    try:
        user.encode()
    except UnicodeEncodeError:
        return
    name = file_name(user)
    assert "/" not in name
    assert not name.startswith(".")
    assert user_name(name) == user


@pytest.mark.parametrize("name", [".probe", ".x.new", "a%2", "%FF", "%41", "a/b", ""])
def test_other_names_are_no_markers(name: str) -> None:
    assert user_name(name) is None


@pytest.mark.skipif(shutil.which("lua") is None, reason="no lua here; Dovecot's runs the hook too")
def test_the_hook_names_markers_alike() -> None:
    hook = (CODE / "notify.lua").read_text().split("local function leave(")[0]
    for user in ("u1", "u@example.org", ".x", "a b/c", "ü%"):
        said = subprocess.run(
            ["lua", "-e", hook + "io.write(file_name(arg[1]))", "x", user],
            capture_output=True,
            text=True,
        )
        assert said.stdout == file_name(user)


@pytest.fixture
def markers(tmp_path: Path) -> Markers:
    made = Markers((tmp_path / "state", tmp_path / "run"))
    made.prepare()
    return made


def test_a_marker_lives_until_a_good_run_that_began_after_it(markers: Markers) -> None:
    markers.mark("u")
    assert set(markers.dirty()) == {"u"}
    assert markers.begin("u") is not None
    assert markers.dirty() == {}
    markers.mark("u")
    markers.done("u")
    assert set(markers.dirty()) == {"u"}


def test_a_failed_run_leaves_the_marker_with_the_time_of_the_first_change(
    markers: Markers,
) -> None:
    markers.mark("u")
    path = markers.folders[0] / "u"
    os.utime(path, (1000, 1000))
    assert markers.begin("u") == 1000
    markers.mark("u")
    markers.undone("u")
    assert markers.dirty() == {"u": 1000}


def test_a_killed_daemon_loses_no_marker(markers: Markers, tmp_path: Path) -> None:
    markers.mark("begun")
    markers.begin("begun")
    markers.mark("waiting")
    again = Markers((tmp_path / "state", tmp_path / "run"))
    again.prepare()
    assert set(again.dirty()) == {"begun", "waiting"}


def test_a_full_run_that_is_due_outlives_the_daemon(markers: Markers, tmp_path: Path) -> None:
    for user in ("jane", "john"):
        markers.unsettle(user)
    markers.settle("john")
    again = Markers((tmp_path / "state", tmp_path / "run"))
    again.prepare()
    assert set(again.dirty()) == {"jane"}


def test_markers_of_the_second_place_count_alike(markers: Markers) -> None:
    (markers.folders[1] / "u").touch()
    assert set(markers.dirty()) == {"u"}
    markers.begin("u")
    markers.done("u")
    assert not list(markers.folders[1].iterdir())


def test_a_place_that_takes_no_file_is_noticed(markers: Markers) -> None:
    markers.probe()
    assert markers.dirty() == {}
    shutil.rmtree(markers.folders[0])
    with pytest.raises(OSError, match="No such file"):
        markers.probe()


def test_the_hook_writes_where_the_daemon_looks() -> None:
    hook = (CODE / "notify.lua").read_text()
    files = parse(MINIMAL).files
    for place in (files.state, files.run):
        assert f'"{place}/dirty/"' in hook


# States ----------------------------------------------------------------------------------------


def test_a_state_is_found_again(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.of("u@x").sync = "abc"
    states.of("u@x").deleted = {"s": 1.5}
    states.save("u@x", sync=True)
    found = States(tmp_path)
    assert found.of("u@x") == UserState(sync="abc", deleted={"s": 1.5})
    assert list(found.users()) == ["u@x"]


def test_a_damaged_state_is_none(tmp_path: Path) -> None:
    (tmp_path / "u").write_text('{"sync": ')
    (tmp_path / "v").write_text('{"unknown": 1}')
    assert States(tmp_path).of("u") == UserState()
    assert States(tmp_path).of("v") == UserState()


def test_another_store_makes_all_syncs_void_but_not_deletions(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.of("u").sync = "abc"
    states.of("u").deleted = {"s": 1.0}
    states.save("u")
    states.forget_syncs()
    assert States(tmp_path).of("u") == UserState(deleted={"s": 1.0})


def test_doubles_are_remembered_until_no_log_tells_of_them(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.note("u", {"i": {(4, "g"), (3, "h")}, "j": set()}, {"i": {(7, "k")}})
    assert States(tmp_path).doubles("u") == {"i": {(4, "g"), (3, "h")}}
    states.note("u", {"i": {(4, "g")}}, {"i": {(7, "k")}})
    assert States(tmp_path).doubles("u") == {"i": {(4, "g")}}
    assert States(tmp_path).renumbered("u") == {"i": {(7, "k")}}


def test_a_state_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    states = States(tmp_path / "missing")
    states.of("u").sync = "abc"
    states.save("u")
    assert "cannot be written" in states.problem
    assert states.of("u").sync == "abc"


# Scripts ---------------------------------------------------------------------------------------


class FakeDoveadm(Doveadm):
    """Deletes scripts as Dovecot does."""

    def __init__(self, homes: Path) -> None:
        super().__init__(Path("/nowhere"))
        self._homes = homes

    async def run(self, user: str, *words: str) -> Reply:
        assert words[:3] == ("sieve delete", "-a", "--")
        (self._homes / user / "sieve" / f"{words[3]}.sieve").unlink()
        return Reply("", ("",), "")


class Homes:
    def __init__(self, tmp_path: Path) -> None:
        self.noticed: list[str] = []
        self.homes = tmp_path / "homes"
        self.states = States(tmp_path / "states")
        self.states.prepare()
        (self.homes / "u" / "sieve").mkdir(parents=True)

    def watch(self) -> Scripts:
        made = Scripts(
            self.homes,
            SieveConfig(),
            self.states,
            FakeDoveadm(self.homes),
            self.noticed.append,
        )
        made.start()
        self.noticed.clear()
        return made

    def put(self, name: str, changed: float) -> Path:
        path = self.homes / "u" / "sieve" / f"{name}.sieve"
        path.write_text("keep;")
        os.utime(path, (changed, changed))
        return path


@pytest.fixture
def homes(tmp_path: Path) -> Homes:
    return Homes(tmp_path)


def test_scripts_and_the_active_link_are_noticed(homes: Homes) -> None:
    scripts = homes.watch()
    homes.put("one", 5.0)
    scripts.handle_events()
    assert set(homes.noticed) == {"u"}
    homes.noticed.clear()
    (homes.homes / "u" / ".dovecot.sieve").symlink_to("sieve/one.sieve")
    scripts.handle_events()
    assert homes.noticed == ["u"]


def test_what_is_no_script_is_not_noticed(homes: Homes) -> None:
    scripts = homes.watch()
    (homes.homes / "u" / "mdbox").mkdir()
    (homes.homes / "u" / "sieve" / "tmp").mkdir()
    scripts.handle_events()
    assert homes.noticed == []


def test_a_new_home_is_watched(homes: Homes) -> None:
    scripts = homes.watch()
    (homes.homes / "new" / "sieve").mkdir(parents=True)
    scripts.handle_events()
    (homes.homes / "new" / "sieve" / "x.sieve").write_text("keep;")
    scripts.handle_events()
    assert "new" in homes.noticed


def test_a_deletion_is_remembered_with_the_version_that_went(homes: Homes) -> None:
    path = homes.put("one", 5.25)
    scripts = homes.watch()
    path.unlink()
    scripts.handle_events()
    assert homes.noticed
    assert States(homes.states._folder).of("u").deleted == {"one": 5.25}


def test_a_deletion_while_nobody_watched_is_found(homes: Homes) -> None:
    path = homes.put("one", 5.25)
    homes.watch()
    path.unlink()
    homes.watch()
    assert homes.states.of("u").deleted == {"one": 5.25}


def test_a_script_that_is_there_again_before_anybody_looked_is_another_version(
    homes: Homes,
) -> None:
    path = homes.put("one", 5.25)
    scripts = homes.watch()
    path.unlink()
    path = homes.put("one", 7.5)
    scripts.handle_events()
    assert homes.states.of("u").deleted == {"one": 5.25}
    asyncio.run(scripts.delete("u", homes.states.of("u").deleted))
    assert path.exists()


def test_the_peers_deletion_is_done_and_not_taken_for_our_own(homes: Homes) -> None:
    path = homes.put("one", 5.0)
    scripts = homes.watch()
    asyncio.run(scripts.delete("u", {"one": 5.25, "unknown": 9.0}))
    scripts.handle_events()
    assert not path.exists()
    assert homes.states.of("u").deleted == {}


@pytest.mark.parametrize(
    ("here", "deleted", "newer"),
    [
        (5.0, 5.25, False),  # a copy, cut off to the second, of what was deleted
        (5.25, 5.0, False),  # the original of a copy that was deleted
        (5.25, 5.25, False),
        (6.0, 5.25, True),
        (5.5, 5.25, True),
        (6.25, 5.0, True),
    ],
)
def test_which_version_is_newer(here: float, deleted: float, newer: bool) -> None:
    assert is_newer(here, deleted) is newer


# Configuration ---------------------------------------------------------------------------------


def test_the_readmes_configuration_is_right() -> None:
    text = (CODE / "README.md").read_text().split("```toml\n")[1].split("```")[0]
    plain = parse(text)
    assert plain.sieve == SieveConfig()
    for line in text.splitlines():
        if line.startswith("# ") and " = " in line:
            text = text.replace(line, line[2:])
    shown = parse(text)
    assert shown.peer.address
    assert (shown.files, shown.listen, shown.sync) == (plain.files, plain.listen, plain.sync)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "[sync]\nparalel = 3\n", "7:.*8: sync.paralel: unknown key; known here: deb"),
        (MINIMAL.replace('name = "b"\n', ""), ":2: peer.name: missing; write name = ..."),
        (MINIMAL + "[sync]\ndebounce = 0.001\n", ":8: sync.debounce: 0.001 is out of range"),
        (MINIMAL + "[sync]\nparallel = true\n", ":8: sync.parallel: not a number"),
        (MINIMAL + "[night]\nstart = '25:00'\n", ":8: night.start: not a time of day"),
        (MINIMAL.replace('"/k"', '"k"'), ":6: tls.key: not an absolute path"),
        (MINIMAL.replace('"b"', '"a"'), ":3: peer.name: both servers have one name"),
        (MINIMAL + "[sieve]\nscripts = 'a/b'\n", ":8: sieve.scripts: not a name"),
        (MINIMAL + "[heartbeat]\nlost_after = 1.5\n", ":8: heartbeat.lost_after: shorter than two"),
        (MINIMAL + "[listen]\naddresses = 'x'\n", ":8: listen.addresses: not a list"),
        ("sync = 3\n" + MINIMAL, ":1: sync: not a section"),
        ("name = \n", "line 1"),
    ],
)
def test_bad_configuration_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.removeprefix("7:.*")):
        parse(text, "pairsync.toml")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.toml")


def test_a_secret_must_be_long(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="only 5 characters"):
        read_secret(path)
    path.write_text("x" * 40 + "\n")
    assert read_secret(path) == b"x" * 40


# The rest --------------------------------------------------------------------------------------


@given(st.text(alphabet="a1t\x01\t\n\r", max_size=20))
def test_words_survive_escaping(word: str) -> None:
    assert "\t" not in escape(word)
    assert unescape(escape(word)) == word


@given(st.text(min_size=1, max_size=8), st.floats(1.6e9, 1.9e9), st.floats(0, 86400))
def test_every_user_has_one_slot_a_night(user: str, now: float, later: float) -> None:
    config = PassConfig()
    slot = last_slot(user, now, config)
    assert now - 86400 - 3601 <= slot <= now
    assert last_slot(user, now + later, config) >= slot
