"""Which folder has which name, where both servers and dsync gave it some."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairsync import changelog, history
from pairsync.doveadm import Doveadm, DovecotError, Reply
from pairsync.renames import Renames
from pairsync.state import States
from pairsync.told import (
    NOTHING,
    Change,
    Standing,
    Told,
    add,
    follow,
    given_at,
    latest,
    next_rename,
    read,
    relics,
)
from tests.index_logs import BEGAN, DSYNC, append, done, log, wish


def test_a_rename_is_known_by_the_folder() -> None:
    told, missing = add(NOTHING, [Change("a", "b", 1.0)], {"G": "b"})
    assert told == Told({"G": ("b", 1.0)}, {"a": ("G", 1.0)}, {"b": 1.0})
    assert not missing


def test_of_renames_one_after_the_other_the_last_counts() -> None:
    changes = [Change("a", "b", 1.0), Change("x", "y", 2.0), Change("b", "c", 3.0)]
    told, missing = add(NOTHING, changes, {"G": "c", "X": "y"})
    assert told.renamed == {"G": ("c", 3.0), "X": ("y", 2.0)}
    assert told.left == {"a": ("G", 1.0), "b": ("G", 3.0), "x": ("X", 2.0)}
    assert not missing


def test_a_folder_whose_name_dsync_took_back_is_found_by_the_old_one() -> None:
    told, missing = add(NOTHING, [Change("a", "b", 1.0)], {"G": "a"})
    assert told.renamed == {"G": ("b", 1.0)}
    assert not missing


def test_a_new_folder_of_the_old_name_is_another_one() -> None:
    changes = [Change("a", "b", 1.0), Change("", "a", 2.0)]
    told, missing = add(NOTHING, changes, {"H": "a"})
    assert told == Told({}, {}, {"b": 1.0, "a": 2.0})
    assert missing


def test_what_is_in_no_list_is_missing_and_what_was_known_is_kept() -> None:
    known = Told({"G": ("b", 1.0)})
    assert add(known, [], {}) == (known, False)
    _, missing = add(NOTHING, [Change("a", "b", 1.0)], {"H": "x"})
    assert missing


def test_of_two_folders_of_one_guid_the_name_that_was_given_last_counts() -> None:
    """dsync had made the old name again, and a user renamed that too."""
    changes = [Change("a", "b", 1.0), Change("a", "c", 2.0)]
    for names in ({"G": "b"}, {"G": "c"}):
        told, missing = add(NOTHING, changes, names, {"a": ("G", 0.0)}, {"b": "G", "c": "G"})
        assert (told.renamed, told.left, missing) == (
            {"G": ("c", 2.0)},
            {"a": ("G", 2.0)},
            False,
        )


def test_the_last_name_of_both_servers_counts() -> None:
    one, other = Told({"G": ("b", 1.0), "X": ("y", 1.0)}), Told({"G": ("c", 2.0)})
    assert latest(one, other) == latest(other, one) == {"G": ("c", 2.0), "X": ("y", 1.0)}


def test_a_name_that_another_folder_has_is_left_alone() -> None:
    assert next_rename({"G": "a", "H": "b"}, {"G": "b"}) is None
    assert next_rename({"H": "b"}, {"G": "c"}) is None


@given(st.permutations(["a", "b", "c", "d"]))
def test_folders_exchange_their_names(order: list[str]) -> None:
    names: dict[str, str] = {f"G{name}": name for name in "abcd"}
    wanted = dict(zip(names, order, strict=True))
    for _ in range(2 * len(wanted)):
        step = next_rename(names, wanted)
        if step is None:
            break
        old, new = step
        assert new not in names.values()
        names = {guid: new if name == old else name for guid, name in names.items()}
    assert names == wanted


def test_what_dsync_made_of_an_earlier_name_is_told_from_what_a_user_made() -> None:
    left = Told(renamed={"G": ("b", 2.0)}, left={"a": ("G", 2.0)})
    names = {"G": "b", "H": "a"}
    assert relics(names, left, NOTHING) == relics(names, NOTHING, left) == {"a": ("G", 2.0)}
    assert relics(names, left, Told(made={"a": 1.0})) == {"a": ("G", 2.0)}
    assert relics(names, left, Told(made={"a": 3.0})) == {}
    assert relics({"H": "a"}, left, NOTHING) == {"a": ("G", 2.0)}
    assert relics({"G": "a"}, left, NOTHING) == {}


def test_a_folder_is_not_unwanted_for_the_name_of_a_deleted_one() -> None:
    told, missing = add(NOTHING, [Change("", "a", 1.0), Change("a", "", 2.0)], {})
    assert told == Told({}, {"a": ("", 2.0)}, {})
    assert not missing
    assert relics({"G": "a"}, told, NOTHING) == relics({"G": "a"}, NOTHING, told) == {}
    # Nor for the one that had it before that.
    before = Told(left={"a": ("H", 1.0)})
    assert relics({"G": "a"}, told, before) == relics({"G": "a"}, before, told) == {}
    again, _ = add(told, [Change("", "a", 3.0)], {"G": "a"})
    assert again == Told({}, {}, {"a": 3.0})


def test_a_renamed_folder_that_is_deleted_is_not_missed() -> None:
    told, missing = add(NOTHING, [Change("a", "b", 1.0), Change("b", "", 2.0)], {})
    assert told == Told({}, {"a": ("", 2.0), "b": ("", 2.0)}, {})
    assert not missing


def test_a_folder_that_is_deleted_before_its_rename_is_learned_is_known_by_what_was_seen() -> None:
    seen = {"a": ("G", 0.5), "b": ("H", 0.5)}
    renamed, missing = add(NOTHING, [Change("a", "c", 1.0)], {}, seen)
    assert renamed == Told({"G": ("c", 1.0)}, {"a": ("G", 1.0)}, {"c": 1.0})
    assert missing
    told, _ = add(renamed, [Change("c", "", 2.0)], {})
    assert told == Told({}, dict.fromkeys("ac", ("", 2.0)), {})


def test_a_name_that_another_folder_got_is_not_deleted_with_the_one_that_had_it() -> None:
    changes = [Change("a", "b", 1.0), Change("q", "a", 2.0), Change("b", "", 3.0)]
    told, _ = add(NOTHING, changes, {"Q": "a"}, {"a": ("G", 0.5), "q": ("Q", 0.5)})
    assert told == Told({"Q": ("a", 2.0)}, {"b": ("", 3.0), "q": ("Q", 2.0)}, {"a": 2.0})
    made = [Change("a", "b", 1.0), Change("", "a", 2.0), Change("b", "", 3.0)]
    told, _ = add(NOTHING, made, {"N": "a"}, {"a": ("G", 0.5)})
    assert told == Told({}, {"b": ("", 3.0)}, {"a": 2.0})


def test_a_folder_that_is_there_is_not_taken_for_one_that_is_gone() -> None:
    told, missing = add(NOTHING, [Change("q", "c", 1.0)], {"X": "d"}, {"q": ("X", 0.5)})
    assert told.renamed == {}
    assert missing


@pytest.mark.parametrize("first", [Change("", "a", 1.0), Change("a", "", 1.0)])
def test_another_folder_of_the_name_is_not_taken_for_what_was_seen(first: Change) -> None:
    changes = [first, Change("", "a", 2.0), Change("a", "c", 3.0)]
    told, missing = add(NOTHING, changes, {}, {"a": ("G", 0.5)})
    assert told.renamed == {}
    assert missing


def test_what_was_seen_only_after_a_change_is_not_what_that_tells_of() -> None:
    """Else a folder that another server made anew would go with the one that was deleted."""
    deleted = Change("a", "", 2.0)
    assert follow([deleted], {"a": ("G", 1.0)}) == ({}, {"G": 2.0})
    assert follow([deleted], {"a": ("G", 2.1)}) == ({"a": ("G", 2.1)}, {})
    assert follow([Change("a", "b", 2.0), Change("b", "", 2.0)], {"a": ("G", 2.0)})[1] == {"G": 2.0}
    changes = [deleted, Change("", "a", 3.0), Change("a", "b", 5.0)]
    assert follow(changes, {"a": ("H", 4.0)}) == ({"b": ("H", 5.0)}, {})
    assert follow(changes, {"a": ("G", 1.0)}) == ({"b": ("", 5.0)}, {"G": 2.0})


def test_a_folder_that_was_renamed_before_is_deleted_under_all_of_its_names() -> None:
    renamed, _ = add(NOTHING, [Change("a", "b", 1.0)], {"G": "b"})
    told, missing = add(renamed, [Change("b", "c", 2.0), Change("c", "", 3.0)], {})
    assert told == Told({}, dict.fromkeys("abc", ("", 3.0)), {})
    assert not missing


def test_what_the_peer_is_told_arrives() -> None:
    told = Told({"G": ("b", 2.5)}, {"a": ("G", 2.5)}, {"b": 2.5}, {"H": 2.0})
    assert Told.of(told.document()) == told
    assert Told.of(None) == NOTHING
    assert not NOTHING
    assert Told(gone={"H": 2.0})


def test_an_earlier_release_tells_of_no_deletions() -> None:
    told = Told({"G": ("b", 2.5)}, {"a": ("G", 2.5)}, {"b": 2.5})
    document = told.document()
    del document["gone"]
    assert Told.of(document) == told


class Dovecot(Doveadm):
    """Knows folders by their GUIDs; ``lists`` are what it says one after the other."""

    def __init__(self, *lists: Mapping[str, str]) -> None:
        super().__init__(Path("/nowhere"))
        self.lists = [dict(names) for names in lists]
        self.did: list[tuple[str, ...]] = []
        self.mails: list[tuple[str, ...]] = []
        self.twins: list[tuple[str, str]] = []
        self.inbox = Path("/nowhere")

    async def run(self, user: str, *words: str) -> Reply:
        if words[:3] == ("mailbox status", "--", "uidnext guid"):
            names = self.lists[0]
            found = [*((name, guid) for guid, name in names.items()), *self.twins]
            return Reply("", tuple(v for name, guid in found for v in (name, "9", guid)), "")
        if words[0] == "mailbox status":
            names = self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]
            found = [*((name, guid) for guid, name in names.items()), *self.twins]
            return Reply("", tuple(value for row in found for value in row), "")
        if words[0] == "fetch":
            return Reply("", tuple(value for row in self.mails for value in row), "")
        if words[0] == "mailbox path":
            return Reply("", (str(self.inbox.parent / words[-1]),), "")
        self.did.append(words)
        if words[0] == "mailbox rename":
            (names,) = self.lists
            assert words[2] in {*names.values(), *dict(self.twins)}
            names.update({guid: words[3] for guid, name in names.items() if name == words[2]})
        return Reply("", (), "")


class Full(Dovecot):
    """Deletes no folder, for there are mails in it."""

    async def run(self, user: str, *words: str) -> Reply:
        reply = await super().run(user, *words)
        return Reply("NOTPOSSIBLE", (), "") if words[0] == "mailbox delete" else reply


def made(tmp_path: Path, dovecot: Dovecot) -> Renames:
    states = States(tmp_path / "users")
    states.prepare()
    (tmp_path / "dirty").mkdir(exist_ok=True)
    return Renames([tmp_path / "dirty", tmp_path / "run"], states, dovecot)


def saw(renames: Renames, at: float = 0.0) -> None:
    """The folders were listed for the first time then."""
    asyncio.run(renames._names("jane/x"))
    known = renames._seen["jane/x"]
    renames._seen["jane/x"] = {name: (guid, at) for name, (guid, _) in known.items()}


def hook(tmp_path: Path, old: str, new: str, at: float) -> str:
    path = tmp_path / "dirty" / f"!jane%2Fx!{at}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{old}\n{new}\n")
    os.utime(path, (at, at))
    return path.name


def test_what_the_hook_left_is_learned_once_and_kept_until_the_peer_knows(tmp_path: Path) -> None:
    renames = made(tmp_path, Dovecot({"G": "b"}))
    assert renames.note("jane") is None
    assert renames.note(hook(tmp_path, "a", "b", 5.0)) == "jane/x"
    told = asyncio.run(renames.learn("jane/x"))
    assert told.renamed == {"G": ("b", 5.0)}
    assert not list((tmp_path / "dirty").iterdir())
    again = made(tmp_path, Dovecot({"G": "b"}))
    assert asyncio.run(again.learn("jane/x")) == told
    again.done("jane/x", told)
    assert asyncio.run(again.learn("jane/x")) == NOTHING


def test_a_later_rename_is_not_taken_for_told(tmp_path: Path) -> None:
    renames = made(tmp_path, Dovecot({"G": "b"}, {"G": "c"}))
    renames.note(hook(tmp_path, "a", "b", 5.0))
    told = asyncio.run(renames.learn("jane/x"))
    renames.note(hook(tmp_path, "b", "c", 6.0))
    asyncio.run(renames.learn("jane/x"))
    renames.done("jane/x", told)
    assert asyncio.run(renames.learn("jane/x")).renamed == {"G": ("c", 6.0)}


def test_what_was_left_while_nobody_watched_is_found(tmp_path: Path) -> None:
    renames = made(tmp_path, Dovecot({"G": "b"}))
    hook(tmp_path, "a", "b", 5.0)
    renames.scan()
    assert asyncio.run(renames.learn("jane/x")).renamed == {"G": ("b", 5.0)}


def test_a_folder_that_is_in_no_list_for_a_moment_is_looked_for_again(tmp_path: Path) -> None:
    renames = made(tmp_path, Dovecot({}, {"G": "b"}))
    renames.note(hook(tmp_path, "a", "b", 5.0))
    assert asyncio.run(renames.learn("jane/x")).renamed == {"G": ("b", 5.0)}


def test_the_inbox_is_never_renamed(tmp_path: Path) -> None:
    hook(tmp_path, "Inbox", "b", 5.0)
    hook(tmp_path, "", "c", 6.0)
    assert read((tmp_path / "dirty").iterdir()) == [Change("", "c", 6.0)]


def test_nothing_is_forgotten_when_dovecot_does_not_answer(tmp_path: Path) -> None:
    class Dead(Dovecot):
        async def run(self, user: str, *words: str) -> Reply:
            raise DovecotError("no answer")

    dovecot = Dead({})
    renames = made(tmp_path, dovecot)
    renames.note(hook(tmp_path, "a", "b", 5.0))
    with pytest.raises(DovecotError):
        asyncio.run(renames.learn("jane/x"))
    assert list((tmp_path / "dirty").iterdir())
    renames._doveadm = Dovecot({"G": "b"})
    assert asyncio.run(renames.learn("jane/x")).renamed == {"G": ("b", 5.0)}


def test_a_user_who_is_gone_is_left_to_the_run(tmp_path: Path) -> None:
    class Gone(Dovecot):
        async def run(self, user: str, *words: str) -> Reply:
            return Reply("NOUSER", (), "")

    renames = made(tmp_path, Gone({}))
    renames.note(hook(tmp_path, "a", "b", 5.0))
    told = asyncio.run(renames.learn("jane/x"))
    assert told.renamed == {}
    asyncio.run(renames.carry_out("jane/x", told, Told({"G": ("b", 1.0)}), Standing()))


def test_a_folder_is_not_taken_away_that_was_just_made(tmp_path: Path) -> None:
    left = Told(left={"a": ("H", 2.0)})
    dovecot = Dovecot({"G": "a"})
    renames = made(tmp_path, dovecot)
    renames.note(hook(tmp_path, "", "a", 5.0))
    asyncio.run(renames.carry_out("jane/x", left, NOTHING, Standing()))
    assert dovecot.did == []
    # Nor when that was learned in the meantime.
    asyncio.run(renames.learn("jane/x"))
    asyncio.run(renames.carry_out("jane/x", left, NOTHING, Standing()))
    assert dovecot.did == []


def test_news_of_other_folders_keep_none(tmp_path: Path) -> None:
    left = Told(left={"a": ("H", 2.0)})
    dovecot = Dovecot({"G": "a"})
    renames = made(tmp_path, dovecot)
    for other in (("", "b", 5.0), ("a", "c", 1.0)):
        renames.note(hook(tmp_path, *other))
    asyncio.run(renames.carry_out("jane/x", left, NOTHING, Standing()))
    assert dovecot.did == [("mailbox delete", "-e", "--", "a")]


def deleted(folder: Path, guid: str, seconds: int) -> Path:
    """Dovecot's log tells that a folder was deleted; where the inbox's index is."""
    inbox = folder / "mdbox" / "mailboxes" / "INBOX"
    inbox.mkdir(parents=True, exist_ok=True)
    record = bytes([1, 0, 0, 0]) + bytes.fromhex(guid) + struct.pack(">I", seconds)
    (folder / "mdbox" / changelog.LOGS[-1]).write_bytes(record)
    return inbox


GUID, OTHER = "ab" * 16, "cd" * 16


@pytest.mark.parametrize(("logged", "known"), [(20, {GUID: 20.0}), (19, {GUID: 19.0}), (90, {})])
def test_which_folder_was_deleted_is_learned_before_dovecots_log_forgets_it(
    tmp_path: Path, logged: int, known: dict[str, float]
) -> None:
    dovecot = Dovecot({OTHER: "a"})
    dovecot.inbox = deleted(tmp_path, GUID, logged)
    renames = made(tmp_path, dovecot)
    renames.note(hook(tmp_path, "a", "", 20.9))
    assert asyncio.run(renames.learn("jane/x")).gone == known
    deleted(tmp_path, OTHER, 21)
    assert asyncio.run(renames.learn("jane/x")).gone == known
    renames.done("jane/x", Told(gone={GUID: 5.0}))
    assert asyncio.run(renames.learn("jane/x")).gone == known
    renames.done("jane/x", Told(gone=known))
    assert asyncio.run(renames.learn("jane/x")).gone == {}


@pytest.mark.parametrize(
    ("lists", "is_there"),
    [([{}], False), ([{GUID: "b"}], True), ([{}, {GUID: "c"}], True)],
    ids=["gone", "there", "there-by-another-name"],
)
def test_which_folder_was_deleted_is_known_without_dovecots_log(
    tmp_path: Path, lists: list[dict[str, str]], is_there: bool
) -> None:
    dovecot = Dovecot({GUID: "a"}, *lists)
    dovecot.inbox = deleted(tmp_path, OTHER, 1)
    renames = made(tmp_path, dovecot)
    saw(renames)
    renames.note(hook(tmp_path, "a", "", 20.5))
    told = asyncio.run(renames.learn("jane/x"))
    assert told.gone == ({} if is_there else {GUID: 20.5})


@pytest.mark.parametrize(
    ("at", "number", "is_gone"), [(0.5, 2, True), (1.5, 2, False), (0.5, 3, False)]
)
def test_a_deleted_folder_that_dsync_has_made_again_by_now_is_known_by_its_log(
    tmp_path: Path, at: float, number: int, is_gone: bool
) -> None:
    """Seen: where Dovecot's log of folders does not tell of the deletion either."""
    dovecot = Dovecot({GUID: "a"})
    dovecot.inbox = deleted(tmp_path, OTHER, 1)
    (dovecot.inbox.parent / "a").mkdir()
    log_of_it = dovecot.inbox.parent / "a" / history.LOGS[-1]
    log_of_it.write_bytes(log(append(1, "0a" * 16, DSYNC), number=number))
    renames = made(tmp_path, dovecot)
    saw(renames)
    renames.began("jane/x")
    renames.note(hook(tmp_path, "a", "", BEGAN + at))
    told = asyncio.run(renames.learn("jane/x"))
    assert told.gone == ({GUID: BEGAN + at} if is_gone else {})


def test_a_folder_that_is_renamed_and_deleted_is_known_by_its_first_name(tmp_path: Path) -> None:
    renames = made(tmp_path, Dovecot({GUID: "a"}, {}))
    saw(renames)
    renames.note(hook(tmp_path, "a", "b", 5.0))
    asyncio.run(renames.learn("jane/x"))
    renames.note(hook(tmp_path, "b", "", 6.0))
    assert asyncio.run(renames.learn("jane/x")).gone == {GUID: 6.0}


def test_what_is_in_no_list_for_a_moment_is_not_added_to_what_dsync_finds(tmp_path: Path) -> None:
    dovecot = Dovecot({GUID: "a"}, {}, {GUID: "b"})
    dovecot.inbox = deleted(tmp_path, OTHER, 1)
    log = tmp_path / "mdbox" / changelog.LOGS[-1]
    before = log.read_bytes()
    renames = made(tmp_path, dovecot)
    saw(renames)
    renames.note(hook(tmp_path, "a", "", 20.5))
    asyncio.run(renames.attest("jane/x", (), NOTHING))
    assert log.read_bytes() == before


@pytest.mark.parametrize(
    ("there", "name", "ended", "theirs", "goes"),
    [
        pytest.param(GUID, "p/a", 21.0, NOTHING, True, id="it-is-the-one"),
        pytest.param(OTHER, "p/a", 21.0, NOTHING, False, id="another-of-its-name"),
        pytest.param(GUID, "b", 21.0, NOTHING, False, id="no-name-of-it"),
        pytest.param(GUID, "p/a", 19.9, NOTHING, False, id="no-dsync-brought-it-back"),
        pytest.param(GUID, "p/a", 30.0, Told({GUID: ("p/a", 25.0)}), False, id="renamed-since"),
        pytest.param(GUID, "p/a", 30.0, Told({GUID: ("p/a", 15.0)}), True, id="renamed-before"),
        pytest.param(
            GUID, "p/a", 30.0, Told(made={"p": 25.0}), False, id="within-one-renamed-since"
        ),
        pytest.param(GUID, "p/a", 30.0, Told(made={"p/a": 20.1}), True, id="made-before"),
    ],
)
def test_the_very_folder_that_was_deleted_here_goes_with_the_mails_that_were_in_it(
    tmp_path: Path, there: str, name: str, ended: float, theirs: Told, goes: bool
) -> None:
    dovecot = Dovecot({there: name})
    dovecot.inbox = tmp_path / "INBOX"
    saved = {1: 19, 2: 20, 3: 20, 4: 20, 5: 21}
    guids = {uid: f"{uid:032x}" for uid in saved}
    dovecot.mails = [(str(uid), guids[uid], str(when)) for uid, when in saved.items()]
    index = tmp_path / "p" / "a"
    index.mkdir(parents=True)
    # dsync brought the second and the fifth; of the third, a user's, it made the fourth.
    (index / history.LOGS[-1]).write_bytes(
        log(
            append(2, guids[2], DSYNC),
            append(3, guids[3]),
            append(4, guids[3], DSYNC),
            done(3, guids[3], DSYNC),
            append(5, guids[5], DSYNC),
        )
    )
    dovecot.mails[3] = ("4", guids[3], "20")
    renames = made(tmp_path, dovecot)
    renames._ended["jane"] = ended
    # Names that it had when it was deleted.
    mine = Told(left={"p/a": ("", 20.5)}, gone={GUID: 20.0})
    known = Standing(carried={GUID: [guids[2], guids[3]]})
    asyncio.run(renames.carry_out("jane", mine, theirs, known))
    expunged = ("expunge", "--", "mailbox", "p/a", "mailbox-guid", GUID, "uid", "1:2")
    taken_away = ("mailbox delete", "-e", "--", "p/a")
    assert dovecot.did == ([expunged, taken_away] if goes else [])


def test_who_does_not_know_what_the_other_one_has_leaves_mails_of_the_second_alone(
    tmp_path: Path,
) -> None:
    dovecot = Full({GUID: "a"})
    dovecot.inbox = tmp_path / "INBOX"
    guids = {uid: f"{uid:032x}" for uid in (1, 2)}
    dovecot.mails = [("1", guids[1], "19"), ("2", guids[2], "20")]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / history.LOGS[-1]).write_bytes(
        log(*(append(u, guids[u], DSYNC) for u in guids))
    )
    renames = made(tmp_path, dovecot)
    renames._ended["jane"] = 21.0
    mine = Told(left={"a": ("", 20.5)}, gone={GUID: 20.0})
    stands = asyncio.run(renames.carry_out("jane", mine, NOTHING))
    assert dovecot.did[0] == ("expunge", "--", "mailbox", "a", "mailbox-guid", GUID, "uid", "1")
    assert (stands.stay, stands.is_unsure) == (["a"], True)
    stands = asyncio.run(renames.carry_out("jane", mine, NOTHING, Standing()))
    assert (stands.stay, stands.is_unsure) == (["a"], False)


def test_a_folder_is_left_alone_that_was_renamed_while_others_were_looked_at(
    tmp_path: Path,
) -> None:
    dovecot = Dovecot({GUID: "a"}, {GUID: "b"})
    renames = made(tmp_path, dovecot)
    renames._ended["jane"] = 21.0
    mine = Told(left={"a": ("", 20.5)}, gone={GUID: 20.0})
    asyncio.run(renames.carry_out("jane", mine, NOTHING, Standing()))
    assert dovecot.did == []


def test_what_was_deleted_on_the_other_server_is_left_to_dsync(tmp_path: Path) -> None:
    dovecot = Dovecot({GUID: "a"})
    dovecot.inbox = deleted(tmp_path, GUID, 20)
    theirs = Told(left={"a": ("", 20.9)}, gone={GUID: 20.0})
    renames = made(tmp_path, dovecot)
    renames._ended["jane"] = 30.0
    asyncio.run(renames.carry_out("jane", NOTHING, theirs, Standing()))
    assert dovecot.did == []


@pytest.mark.parametrize("is_deleted_here", [False, True])
def test_what_came_into_a_folder_that_was_deleted_on_the_other_server_goes_to_the_inbox(
    tmp_path: Path, is_deleted_here: bool
) -> None:
    dovecot = Dovecot({GUID: "a"})
    dovecot.inbox = tmp_path / "INBOX"
    guids = {uid: f"{uid:032x}" for uid in range(1, 6)}
    # The first was there at the last good run; the third and the fifth came from there after it.
    dovecot.mails = [(str(uid), guids[uid], "20" if uid > 3 else "19") for uid in guids]
    index = tmp_path / "a"
    index.mkdir()
    news = (append(1, guids[1]), append(2, guids[2]), append(3, guids[3], DSYNC))
    (index / history.LOGS[-1]).write_bytes(
        log(*news, append(4, guids[4]), append(5, guids[5], DSYNC))
    )
    renames = made(tmp_path, dovecot)
    state = bytes([1, 0, 0, 0]) + struct.pack("<16sIIQQI", bytes.fromhex(GUID), 1, 1, 0, 0, 0)
    renames._states.of("jane").sync = base64.b64encode(state + bytes(4)).decode()
    theirs = Told(left={"a": ("", 20.9)}, gone={GUID: 20.0})
    mine = Told(gone={GUID: 30.0} if is_deleted_here else {})
    stands = asyncio.run(renames.carry_out("jane", mine, theirs))
    moved = ("move", "--", "INBOX", "mailbox", "a", "mailbox-guid", GUID, "uid", "2,4")
    assert dovecot.did == ([] if is_deleted_here else [moved])
    assert stands.carried == ({} if is_deleted_here else {GUID: [guids[5]]})
    assert Standing.of(stands.document()) == stands


def test_who_does_not_know_what_both_had_moves_only_what_the_log_tells_of(tmp_path: Path) -> None:
    dovecot = Dovecot({GUID: "a"})
    dovecot.inbox = tmp_path / "INBOX"
    guids = {uid: f"{uid:032x}" for uid in (1, 2)}
    dovecot.mails = [(str(uid), guids[uid], "19") for uid in guids]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / history.LOGS[-1]).write_bytes(log(append(2, guids[2])))
    theirs = Told(left={"a": ("", 20.9)}, gone={GUID: 20.0})
    renames = made(tmp_path, dovecot)
    asyncio.run(renames.carry_out("jane", NOTHING, theirs))
    moved = ("move", "--", "INBOX", "mailbox", "a", "mailbox-guid", GUID, "uid", "2")
    assert dovecot.did == [moved]
    # Nor is it looked into again until something comes or dsync was there.
    asyncio.run(renames.attest("jane", (), theirs))
    assert dovecot.did == [moved]
    stays = Standing(stay=["a"])
    asyncio.run(renames.ended("jane", NOTHING, theirs))
    asyncio.run(renames.attest("jane", (), theirs, stays))
    assert dovecot.did == [moved]
    asyncio.run(renames.attest("jane", (), theirs))
    assert dovecot.did == [moved, moved]


def test_dsync_finds_renames_and_deletions_that_dovecot_did_not_keep(tmp_path: Path) -> None:
    dovecot = Dovecot({"G": "b"})
    dovecot.inbox = deleted(tmp_path, GUID, 5)
    log = tmp_path / "mdbox" / changelog.LOGS[-1]
    before = log.read_bytes()
    renames = made(tmp_path, dovecot)
    told = Told(renamed={"G": ("b", 7.5)}, gone={GUID: 5.0, OTHER: 6.0})
    renames._states.of("jane/x").told = told.document()
    asyncio.run(renames.attest("jane/x", (), NOTHING))
    name = hashlib.sha1(b"b").digest()[:16]
    added = bytes([3, 0, 0, 0]) + name + struct.pack(">I", 7)
    added += bytes([1, 0, 0, 0]) + bytes.fromhex(OTHER) + struct.pack(">I", 6)
    assert log.read_bytes() == before + added


def test_a_folder_with_mails_on_the_other_server_stays_and_one_here_is_told_of(
    tmp_path: Path,
) -> None:
    told = Told({"G": ("b", 2.0)}, {"a": ("G", 2.0)})
    full = Full({"G": "b", "H": "a"})
    stands = asyncio.run(made(tmp_path, full).carry_out("jane", NOTHING, told))
    assert (stands.stay, stands.is_unsure) == (["a"], True)
    dovecot = Dovecot({"G": "b", "H": "a"})
    renames = made(tmp_path, dovecot)
    asyncio.run(renames.carry_out("jane", told, NOTHING, stands))
    assert dovecot.did == []
    asyncio.run(renames.carry_out("jane", told, NOTHING, Standing()))
    assert dovecot.did == [("mailbox delete", "-e", "--", "a")]


def test_a_name_that_a_user_gives_while_others_are_carried_out_stays(tmp_path: Path) -> None:
    """Seen: it was taken back, with a time that was later than the user's, on both servers."""

    class Renamed(Dovecot):
        async def run(self, user: str, *words: str) -> Reply:
            reply = await super().run(user, *words)
            if words[0] == "mailbox rename":
                self.lists[0]["H"] = "z"
            return reply

    dovecot = Renamed({"G": "a", "H": "y"})
    told = Told({"G": ("b", 1.0), "H": ("y", 1.0)})
    asyncio.run(made(tmp_path, dovecot).carry_out("jane", told, NOTHING))
    assert dovecot.did == [("mailbox rename", "--", "a", "b")]
    # The same where he did it right before, as the hook tells.
    dovecot = Dovecot({"H": "z"})
    renames = made(tmp_path, dovecot)
    renames._files["jane"] = {tmp_path / "dirty" / hook(tmp_path, "y", "z", 2.0)}
    asyncio.run(renames.carry_out("jane", told, NOTHING))
    assert dovecot.did == []
    # The other server's name is later than that.
    asyncio.run(renames.carry_out("jane", told, Told({"H": ("x", 3.0)})))
    assert dovecot.did == [("mailbox rename", "--", "z", "x")]


def test_a_folder_that_stays_whatever_is_done_is_given_up(tmp_path: Path) -> None:
    told = Told({"G": ("b", 2.0)}, {"a": ("G", 2.0)})
    full = Full({"G": "b", "H": "a"})
    renames = made(tmp_path, full)

    def run(*, ends_well: bool) -> bool:
        stands = asyncio.run(renames.carry_out("jane", NOTHING, told))
        if ends_well:
            renames.tried("jane", stands)
        return stands.is_unsure

    # Those that break off do not count.
    assert all(run(ends_well=False) for _ in range(20))
    assert [run(ends_well=True) for _ in range(10)] == [True] * 8 + [False] * 2
    # One that is gone since begins anew.
    del full.lists[0]["H"]
    assert not run(ends_well=True)
    full.lists[0]["H"] = "a"
    assert run(ends_well=True)


def test_a_run_whose_end_nobody_saw_may_have_brought_a_folder_back(tmp_path: Path) -> None:
    renames = made(tmp_path, Dovecot({GUID: "a"}))
    mine = Told(left={"a": ("", 20.5)}, gone={GUID: 20.0})
    folder = ("jane", GUID, "a", 20.0, mine, NOTHING)
    assert renames._came_back(*folder) is None
    renames.began("jane")
    assert renames._came_back(*folder) == 20.5


def test_a_mail_whose_move_failed_is_moved_right_before_dsync_begins(tmp_path: Path) -> None:
    """Seen by reading: the user renames the folder that it was to be moved to."""
    mail, told = "0a" * 16, Told({"G": ("b", 2.0)}, {"a": ("G", 2.0)})
    dovecot = Dovecot({"G": "b", OTHER: "a"})
    dovecot.inbox = tmp_path / "INBOX"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / history.LOGS[-1]).write_bytes(log(append(3, mail)))
    renames = made(tmp_path, dovecot)
    asyncio.run(renames.carry_out("jane", told, NOTHING, Standing()))
    # In the target's list is the same mail, but by then it is still in the other one as well.
    dovecot.mails, dovecot.lists[0]["G"] = [("3", mail)], "c"
    del dovecot.did[:]
    asyncio.run(renames.attest("jane", (), NOTHING, Standing()))
    assert dovecot.did == [
        ("mailbox update", "-N", "10009", "--", "c"),
        ("move", "--", "c", "mailbox", "a", "mailbox-guid", OTHER, "uid", "3"),
    ]


def test_what_a_user_renames_while_it_is_cleared_stays_on_the_other_server(tmp_path: Path) -> None:
    class Renamed(Dovecot):
        async def run(self, user: str, *words: str) -> Reply:
            reply = await super().run(user, *words)
            if words[0] == "fetch":
                self.lists[0]["H"] = "c"
            return reply

    told = Told({"G": ("b", 2.0)}, {"a": ("G", 2.0)})
    dovecot = Renamed({"G": "b", "H": "a"})
    stands = asyncio.run(made(tmp_path, dovecot).carry_out("jane", NOTHING, told))
    assert (stands.stay, dovecot.did) == (["a"], [])
    # The same where the hook has told of it by then.
    dovecot = Dovecot({"G": "b", "H": "a"})
    renames = made(tmp_path, dovecot)
    renames._files["jane"] = {tmp_path / "dirty" / hook(tmp_path, "", "a", 3.0)}
    stands = asyncio.run(renames.carry_out("jane", NOTHING, told))
    assert (stands.stay, dovecot.did) == (["a"], [])


def test_dsync_does_not_begin_where_a_folder_was_deleted_since_the_other_server_was_told(
    tmp_path: Path,
) -> None:
    renames = made(tmp_path, Dovecot({"I": "INBOX"}))
    told = Told(gone={GUID: 5.0})
    renames._states.of("jane").told = told.document()
    assert asyncio.run(renames.attest("jane", told.gone, NOTHING))
    assert not asyncio.run(renames.attest("jane", (), NOTHING))


def test_what_came_under_an_earlier_name_is_moved_before_the_other_server_deletes_that(
    tmp_path: Path,
) -> None:
    dovecot = Dovecot({"G": "b", OTHER: "a"})
    dovecot.inbox = tmp_path / "INBOX"
    dovecot.mails = [("1", "0a" * 16), ("2", "0b" * 16), ("9", "0c" * 16)]
    (tmp_path / "a").mkdir()
    known = log(append(1, "0a" * 16, DSYNC), append(2, "0b" * 16), append(9, "0c" * 16))
    (tmp_path / "a" / history.LOGS[-1]).write_bytes(known)
    told = Told({"G": ("b", 2.0)}, {"a": ("G", 2.0)})
    renames = made(tmp_path, dovecot)
    asyncio.run(renames.attest("jane", (), told))
    assert dovecot.did == []
    asyncio.run(renames.carry_out("jane", NOTHING, told))
    del dovecot.did[:]
    # Meanwhile a user has renamed it, and 9 has come.
    dovecot.lists[0][OTHER] = "c"
    (tmp_path / "a").rename(tmp_path / "c")
    asyncio.run(renames.attest("jane", (), told))
    assert dovecot.did == [
        ("mailbox update", "-N", "10009", "--", "b"),
        ("move", "--", "b", "mailbox", "c", "mailbox-guid", OTHER, "uid", "9"),
    ]
    asyncio.run(renames.ended("jane", NOTHING, told))
    asyncio.run(renames.attest("jane", (), told))
    assert len(dovecot.did) == 2


def test_what_dsync_made_with_the_guid_of_the_renamed_folder_gets_another(tmp_path: Path) -> None:
    """Seen: a mail that was moved into it went with one that had been in the renamed folder."""
    dovecot = Dovecot({"G": "b", OTHER: "c"})
    dovecot.twins = [("a", "G")]
    dovecot.inbox = tmp_path / "INBOX"
    for name, number in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / history.LOGS[-1]).write_bytes(log(number=number))
    left = BEGAN + 0.5
    told = Told({"G": ("b", left)}, {"a": ("G", left)})
    # The peer renamed it before, and knows of none of the two names.
    asyncio.run(made(tmp_path, dovecot)._part("jane", told, Told({"G": ("z", 2.0)})))
    ((what, flag, guid, dash, name),) = dovecot.did
    assert (what, flag, dash, name) == ("mailbox update", "-g", "--", "a")
    assert len(bytes.fromhex(guid)) == 16 and guid != "G"


@pytest.mark.parametrize(
    ("began", "renamed", "left", "kept"),
    [
        pytest.param({}, "a", {"b": 2.0}, "a", id="the-last-name-where-no-log-tells"),
        pytest.param({}, "z", {"a": 2.0}, "b", id="as-dsync-where-nothing-tells"),
        pytest.param({"b": 0}, "z", {"b": 0.9}, "a", id="the-older-one"),
        pytest.param({"b": 0}, "z", {"b": 1.9}, "a", id="its-log-is-stamped-a-second-before"),
        pytest.param({"a": 0, "b": 0}, "z", {"a": 0.5, "b": 5.0}, "b", id="older-than-the-rename"),
        pytest.param({"a": 0, "b": 2}, "z", {"a": 5.0, "b": 1.0}, "a", id="older-than-the-other"),
        pytest.param({"a": 0, "b": 0}, "b", {"a": 0.5, "b": 0.5}, "b", id="both-are-younger"),
    ],
)
def test_of_two_folders_of_one_guid_the_one_that_a_user_renamed_keeps_it(
    tmp_path: Path, began: dict[str, int], renamed: str, left: dict[str, float], kept: str
) -> None:
    """Times are since the logs of what dsync made begin; other logs have begun anew since."""
    dovecot = Dovecot({"G": "b"})
    dovecot.twins = [("a", "G")]
    dovecot.inbox = tmp_path / "INBOX"
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / history.LOGS[-1]).write_bytes(
            log(number=2 if name in began else 3, began=BEGAN + began.get(name, 0))
        )
    when = {name: ("G", BEGAN + at) for name, at in left.items()}
    told = Told({"G": (renamed, BEGAN + 2.0)}, when)
    asyncio.run(made(tmp_path, dovecot)._part("jane", NOTHING, told))
    (words,) = dovecot.did
    assert words[-1] == {"a": "b", "b": "a"}[kept]


@pytest.mark.parametrize("first", ["a", "b"], ids=["by-its-letters", "or-the-other-one"])
def test_what_dsync_made_and_a_user_renamed_gets_an_earlier_name_again(
    tmp_path: Path, first: str
) -> None:
    """Seen: he saw the folder under that once more. He means the folder, and gets it."""
    last = {"a": "b", "b": "a"}[first]
    dovecot = Dovecot({"G": first, OTHER: "old"})
    dovecot.twins = [(last, "G")]
    dovecot.inbox = tmp_path / "INBOX"
    for name, number in ((first, 3), (last, 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / history.LOGS[-1]).write_bytes(log(number=number))
    left = {"older": ("G", BEGAN - 1.0), "old": ("G", BEGAN + 0.5), "x": (OTHER, BEGAN + 0.9)}
    told = Told({"G": (last, BEGAN + 1.0)}, left)
    asyncio.run(made(tmp_path, dovecot)._part("jane", told, NOTHING))
    rename, update = dovecot.did
    # Another folder has the last of the names by now.
    assert rename == ("mailbox rename", "--", last, "older")
    assert (update[:2], update[-1]) == (("mailbox update", "-g"), "older")


@pytest.mark.parametrize(
    ("others", "left"),
    [
        pytest.param({}, {}, id="no-earlier-name"),
        pytest.param({OTHER: "old"}, {"old": 0.5}, id="another-folder-has-it"),
        pytest.param({OTHER: "b/c"}, {"old": 0.5}, id="there-is-a-folder-within-it"),
    ],
)
def test_what_a_user_renamed_keeps_the_name_where_no_earlier_one_is_free(
    tmp_path: Path, others: dict[str, str], left: dict[str, float]
) -> None:
    """The folder is there twice then, as dsync would leave it, but the name is the one he gave."""
    dovecot = Dovecot({"G": "a", **others})
    dovecot.twins = [("b", "G")]
    dovecot.inbox = tmp_path / "INBOX"
    for name, number in (("a", 3), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / history.LOGS[-1]).write_bytes(log(number=number))
    when = {name: ("G", BEGAN + at) for name, at in left.items()}
    told = Told({"G": ("b", BEGAN + 1.0)}, when)
    asyncio.run(made(tmp_path, dovecot)._part("jane", told, NOTHING))
    (update,) = dovecot.did
    assert (update[:2], update[-1]) == (("mailbox update", "-g"), "a")


def test_two_folders_of_which_nobody_told_are_left_to_dsync(tmp_path: Path) -> None:
    dovecot = Dovecot({"G": "a", OTHER: "c"})
    dovecot.twins = [("b", "G")]
    told = Told({OTHER: ("c", 1.0)}, {"old": (OTHER, 1.0)})
    asyncio.run(made(tmp_path, dovecot)._part("jane", told, NOTHING))
    assert dovecot.did == []


def test_what_a_user_put_under_an_earlier_name_is_moved_though_the_renamed_folder_has_it(
    tmp_path: Path,
) -> None:
    """That one is the one that he has just taken out of it, on this server or the other one."""
    put, told_of, copied = "0a" * 16, "0b" * 16, "0c" * 16
    told = Told({"G": ("b", 2.0)}, {"a": ("G", 2.0)})
    dovecot = Dovecot({"G": "b", OTHER: "a"})
    dovecot.inbox = tmp_path / "INBOX"
    (tmp_path / "a").mkdir()
    lives = log(append(1, put), append(2, told_of, DSYNC), append(3, copied, DSYNC))
    (tmp_path / "a" / history.LOGS[-1]).write_bytes(lives)

    # Both folders have the same mails.
    dovecot.mails = [("1", put), ("2", told_of), ("3", copied)]
    renames = made(tmp_path, dovecot)
    stands = asyncio.run(renames.carry_out("jane", told, NOTHING))
    folder = ("mailbox", "a", "mailbox-guid", OTHER, "uid")
    assert stands.put == {"a": [put]}
    assert dovecot.did[0] == ("expunge", "--", *folder, "2:3")
    del dovecot.did[:]
    there = Standing(put={"a": [told_of]})
    asyncio.run(renames.carry_out("jane", told, NOTHING, there))
    assert dovecot.did[0] == ("expunge", "--", *folder, "3")
    assert dovecot.did[2] == ("move", "--", "b", *folder, "1:2")


def test_what_no_log_tells_of_was_not_put_there_by_a_user(tmp_path: Path) -> None:
    """Nor was what pairsync itself gave another UID: all of it would be moved twice.

    But what he put there is his under that one too.
    """
    old, moved, brought, put = "0a" * 16, "0b" * 16, "0c" * 16, "0d" * 16
    dovecot = Dovecot({"G": "b", OTHER: "a"})
    dovecot.inbox = tmp_path / "INBOX"
    (tmp_path / "a").mkdir()
    first = (append(2, moved, DSYNC), append(3, put))
    again = (append(5, moved), append(6, put), wish(2), wish(3), done(2, moved), done(3, put))
    lives = log(*first, *again, append(7, brought, DSYNC))
    (tmp_path / "a" / history.LOGS[-1]).write_bytes(lives)
    dovecot.mails = [("1", old), ("5", moved), ("6", put), ("7", brought)]
    renames = made(tmp_path, dovecot)
    renames._states.note("jane", {}, {OTHER: {(2, moved), (3, put)}})
    told = Told({"G": ("b", 2.0)}, {"a": ("G", 2.0)})
    assert asyncio.run(renames.carry_out("jane", told, NOTHING)).put == {"a": [put]}
    # Where no log tells of it, and the renamed folder has it under another UID, it is his.
    lives = history.read([log()], [(1, old), (2, moved)])
    assert history.put_by_users(lives, [log()], [(1, old), (9, moved)]) == {moved}


def test_the_other_server_is_told_of_what_was_taken_away(tmp_path: Path) -> None:
    renames = made(tmp_path, Dovecot({"G": "b", OTHER: "a"}))
    told = Told({"G": ("b", 2.0)}, {"a": ("G", 2.0)})
    asyncio.run(renames.carry_out("jane", NOTHING, told))
    assert set(renames.known("jane").gone) == {OTHER}


def test_a_folder_within_one_that_was_renamed_has_its_name_from_a_user() -> None:
    told = Told({"G": ("y", 1.0)}, {"Q/x": ("G", 1.0)})
    assert relics({"G": "y", "X": "Q/x"}, told, NOTHING) == {"Q/x": ("G", 1.0)}
    renamed = Told(made={"Q": 2.0})
    assert relics({"G": "y", "X": "Q/x"}, told, renamed) == {}
    assert given_at({"Q": 2.0, "Q/x": 1.0}, "Q/x/z") == 2.0
    assert given_at({"Q": 2.0}, "Qx") == 0.0


def test_what_is_told_while_a_file_is_learned_does_not_come_back(tmp_path: Path) -> None:
    class Slow(Dovecot):
        async def run(self, user: str, *words: str) -> Reply:
            renames.done("jane/x", told)
            return await super().run(user, *words)

    dovecot = Slow({"G": "b"})
    renames = made(tmp_path, dovecot)
    told = Told(left={"a": ("", 5.0)})
    renames._states.of("jane/x").told = told.document()
    renames.note(hook(tmp_path, "", "b", 6.0))
    assert asyncio.run(renames.learn("jane/x")) == Told(made={"b": 6.0})


def test_what_is_told_while_a_deleted_folder_is_looked_at_stays_told(tmp_path: Path) -> None:
    class Slow(Dovecot):
        async def run(self, user: str, *words: str) -> Reply:
            if words[0] == "mailbox path":
                renames._took_away(user, OTHER)
            return await super().run(user, *words)

    dovecot = Slow({GUID: "a"})
    dovecot.inbox = deleted(tmp_path, OTHER, 1)
    renames = made(tmp_path, dovecot)
    saw(renames)
    renames.began("jane/x")
    renames.note(hook(tmp_path, "a", "", 5.0))
    assert set(asyncio.run(renames.learn("jane/x")).gone) == {OTHER}


def test_a_folder_of_which_a_later_list_knows_another_name_blocks_nobody(tmp_path: Path) -> None:
    """Two of one GUID, of which the whole list has the other one last."""
    dovecot = Dovecot({GUID: "c", OTHER: "d"}, {GUID: "c"}, {GUID: "a"})
    dovecot.inbox = deleted(tmp_path, "ef" * 16, 90)
    renames = made(tmp_path, dovecot)
    saw(renames)
    renames.note(hook(tmp_path, "b", "c", 5.0))
    renames.note(hook(tmp_path, "d", "", 6.0))
    told = asyncio.run(renames.learn("jane/x"))
    assert (told.renamed, told.gone) == ({GUID: ("c", 5.0)}, {OTHER: 6.0})


def test_a_name_of_the_peers_gets_its_time_and_one_of_ours_keeps_it(tmp_path: Path) -> None:
    log = tmp_path / "mdbox" / changelog.LOGS[-1]
    dovecot = Dovecot({"G": "a", "H": "b"})
    dovecot.inbox = log.parent / "mailboxes" / "INBOX"
    dovecot.inbox.mkdir(parents=True)
    content = b"".join(
        bytes([3, 0, 0, 0]) + hashlib.sha1(name).digest()[:16] + struct.pack(">I", 9)
        for name in (b"a", b"b")
    )
    log.write_bytes(content)
    theirs = Told({"G": ("a", 5.0), "H": ("b", 5.0)}, made={"a": 5.0, "b": 5.0})
    mine = Told(made={"b": 9.0})
    asyncio.run(made(tmp_path, dovecot).carry_out("jane", mine, theirs, Standing()))
    assert log.read_bytes() == content[:20] + struct.pack(">I", 5) + content[24:]


def test_both_servers_give_the_last_name(tmp_path: Path) -> None:
    dovecot = Dovecot({"G": "a", "H": "x"})
    renames = made(tmp_path, dovecot)
    mine, theirs = Told({"G": ("b", 1.0)}), Told({"G": ("c", 2.0)})
    asyncio.run(renames.carry_out("jane", mine, theirs, Standing()))
    assert dovecot.did == [("mailbox rename", "--", "a", "c")]
