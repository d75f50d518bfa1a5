"""What became of the mails of a folder, from Dovecot's log of it (``dovecot.index.log``).

The log tells two things that nothing else does (mail-transaction-log.h, Dovecot 2.4): whether a
mail is missing because a user took it away or because it never came, and under which UID dsync put
a mail that it found in the way of another one's.

Logs older than two days are gone. What they would have told is unknown then, never wrong.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

LOGS = ("dovecot.index.log.2", "dovecot.index.log")
"""In the folder of a folder's index, the older one first."""

_HEADER = struct.Struct("<xxH")
_NUMBERS = struct.Struct("<8xII4xI")
"""Number of a log in a folder's index, and of the one before it; 0: it does not go on from one.
Then when it was begun, in seconds since 1970.
"""
HEAD = _NUMBERS.size
"""Bytes of a log that tell who began it."""
_FIRST = 2
"""A new folder begins with these."""
_RECORD = struct.Struct("<II")
_WRITTEN = 0x80808080
_APPEND, _INTRO, _DATA, _EXPUNGE = 0x2, 0x40, 0x200, 0x2000 | 0xCD90
_BOUNDARY = 0x80000
_TOLD = frozenset({_APPEND, _INTRO, _DATA, _EXPUNGE, _BOUNDARY})
_TYPE, _DONE, _DSYNC = 0x0FFFFFFF, 0x10000000, 0x20000000
_NEW = struct.Struct("<IB3x")
_WITH_GUID = struct.Struct("<I16s")
# Data of so many bytes for each mail, aligned so: mdbox's GUIDs, and nothing else.
_INTRODUCED, _GUIDS = struct.Struct("<12xHH"), (16, 1)
_MDBOX, _SAVED = 8, struct.Struct("<III")
"""What mdbox has of each mail: where it is in the storage, and when it was saved there."""
_UNKNOWN = "0" * 32

Mail = tuple[int, str]
"""UID and GUID."""


class Life(NamedTuple):
    """A mail under one UID of a folder, on one server.

    :param by_dsync: whether dsync put it there
    :param before: the UID that dsync took it from, in this folder; there may be several to choose
        from, and none where it came from the other server
    :param taken: whether somebody deleted it or moved it away, other than dsync
    :param after: UIDs under which somebody had taken it away before dsync put it there
    """

    uid: int
    guid: str
    by_dsync: bool = False
    before: tuple[int, ...] = ()
    taken: bool = False
    is_there: bool = False
    after: tuple[int, ...] = ()


History = Sequence[Life]
"""Of one folder, on one server: what is there, and what was as far as its log tells."""


def logs_of(index: Path, size: int = -1) -> list[bytes]:
    """The logs of the folder whose index is there, the older one first; the first bytes of each
    where there is a ``size``.
    """
    found = []
    for log in LOGS:
        with contextlib.suppress(OSError), (index / log).open("rb") as file:
            found.append(file.read(size))
    return found


def appends(logs: Sequence[bytes]) -> set[int]:
    """UIDs of mails of which the logs tell that they were put there."""
    return {
        uid
        for log in logs
        for kind, body in _records(log)
        if kind & _TYPE == _APPEND
        for uid, _ in _whole(_NEW, body)
    }


def repaired(logs: Sequence[bytes], others: Container[int] = ()) -> tuple[set[int], set[int]]:
    """What tells of Dovecot's last repairs of a folder, where it begins the log anew: UIDs of mails
    that were there, put there by nobody knows whom; and of mails that Dovecot put back and are
    still there, for it found them in the storage and in no folder (mdbox-storage-rebuild.c).

    ``others``: when repairs of other folders of the user began. In such a second it makes a folder
    in which a mail was first, and which has another name now.
    """
    unclear: set[int] = set()
    restored: set[int] = set()
    for log in logs:
        repair = _repair(log)
        began = made_at([log]) if repair is None else repair.began
        if began is None or (repair is None and began not in others):
            continue
        transactions = _transactions(log)
        for kind, body in next(transactions, ()) if repair else ():
            if kind & _TYPE == _APPEND:
                unclear.update(uid for uid, _ in _whole(_NEW, body))
        for transaction in transactions:
            if all(kind & _TYPE != _APPEND for kind, _ in transaction):
                continue
            uids = _put_back(transaction, began)
            if not uids:
                break
            restored |= uids
    if restored:
        for log in logs:
            for kind, body in _records(log):
                if kind & _TYPE == _EXPUNGE:
                    restored.difference_update(uid for uid, _ in _whole(_WITH_GUID, body))
    return unclear, restored


class Repair(NamedTuple):
    """A log that Dovecot began in a repair of a folder.

    :param began: seconds since 1970
    """

    number: int
    began: int


def repairs(logs: Iterable[bytes]) -> frozenset[Repair]:
    """Dovecot's last repairs of a folder; the first :data:`HEAD` bytes of its logs are enough."""
    return frozenset(repair for log in logs if (repair := _repair(log)) is not None)


def _repair(log: bytes) -> Repair | None:
    """The repair that began the log; None: it goes on from another one, or is a new folder's."""
    if len(log) < _NUMBERS.size:
        return None
    number, before, began = _NUMBERS.unpack_from(log)
    return None if number <= _FIRST or before else Repair(number, began)


def is_made_since(logs: Sequence[bytes], at: float) -> bool:
    """Whether the folder of the logs was made at that time (seconds since 1970) or later."""
    made = made_at(logs)
    return made is not None and made >= int(at)


def made_at(logs: Sequence[bytes]) -> int | None:
    """When the folder of the logs was made (seconds since 1970); None: before they begin."""
    if len(logs) != 1 or len(logs[0]) < _NUMBERS.size:
        return None
    number, before, began = _NUMBERS.unpack_from(logs[0])
    return None if number > _FIRST or before else int(began)


def disputed(log: bytes, start: int = 0) -> bool:
    """Whether somebody took mails away while dsync was at work, as a log tells from there on.

    dsync may just have given such a mail another UID on the other server. Then it is a new one to
    dsync.
    """
    is_at_work = is_taken = False
    for kind, _ in _records(log, start):
        what = kind & _TYPE
        is_at_work |= what in (_APPEND, _EXPUNGE) and bool(kind & _DSYNC)
        is_taken |= what == _EXPUNGE and not kind & (_DSYNC | _DONE)
    return is_at_work and is_taken


def _transactions(log: bytes) -> Iterator[list[tuple[int, bytes]]]:
    """The records of each transaction of a log."""
    records: list[tuple[int, bytes]] = []
    for kind, body in _records(log):
        if kind & _TYPE == _BOUNDARY and records:
            yield records
            records = []
        records.append((kind, body))
    if records:
        yield records


def _put_back(transaction: Iterable[tuple[int, bytes]], began: int) -> set[int]:
    """UIDs that Dovecot put back by a transaction, in a repair that began then; none: it is of
    somebody else. Whoever saves or copies a mail tells more of it, and hardly in that second.
    """
    uids: set[int] = set()
    saved: set[int] = set()
    size = 0
    for kind, body in transaction:
        what = kind & _TYPE
        if what == _APPEND:
            new = list(_whole(_NEW, body))
            if kind & _DSYNC or any(flags for _, flags in new):
                return set()
            uids.update(uid for uid, _ in new)
        elif what == _INTRO and len(body) >= _INTRODUCED.size:
            size, _ = _INTRODUCED.unpack_from(body)
        elif what == _DATA and size == _MDBOX:
            saved.update(at for _, _, at in _whole(_SAVED, body))
        elif what == _DATA and size != _GUIDS[0]:
            return set()
    return uids if saved == {began} else set()


def from_there(history: History) -> set[int]:
    """UIDs of mails that dsync has brought from the other server, or made of such."""
    found: set[int] = set()
    for life in sorted(history):
        if life.by_dsync and (not life.before or found.intersection(life.before)):
            found.add(life.uid)
    return found


def put_by_users(history: History, logs: Sequence[bytes], copied: Iterable[Mail]) -> set[str]:
    """Mails (their GUIDs) that are in a folder because a user put them there.

    ``copied``: what is in the folder that dsync has copied, with its UIDs: of a mail that is there
    too, and of which the logs do not tell any more, dsync has made this one.
    """
    unclear, _ = repaired(logs)
    told, same = appends(logs), set(copied)
    lives = {life.uid: life for life in history}

    def is_put(life: Life) -> bool:
        before = [lives[uid] for uid in life.before if uid in lives]
        if before or life.by_dsync or life.uid in unclear:
            return any(map(is_put, before))
        return life.uid in told or (life.uid, life.guid) not in same

    return {life.guid for life in history if life.is_there and is_put(life)}


def unseen(
    logs: Sequence[bytes], present: Sequence[Mail], brought: Set[int], had: int | None
) -> list[int]:
    """UIDs of mails in a folder that the other server has not had.

    ``brought``: what :func:`from_there` finds. ``had``: UID up to which both had the same; None
    where that is not known, and then what is older than the logs may be known there.
    """
    told = appends(logs)
    return [
        uid
        for uid, _ in present
        if uid > (had or 0) and uid not in brought and (had is not None or uid in told)
    ]


def read(logs: Sequence[bytes], present: Sequence[Mail], *, copied: bool = False) -> History:
    """The history that logs tell, the older one first; ``present`` is what is in the folder now.

    ``copied``: only that of mails of which dsync made others.
    """
    guids: dict[int, str] = {}
    taken: dict[int, int] = {}
    added: dict[int, int] = {}
    came: dict[int, int] = {}
    went: dict[int, int] = {}
    here = set(present)
    # dsync copies first, then it deletes what it copied.
    batch, deletes = 0, False
    names_guids = False
    records = (record for log in logs for record in _records(log))
    for place, (kind, body) in enumerate(records):
        what = kind & _TYPE
        if what == _INTRO:
            names_guids = len(body) >= _INTRODUCED.size and _INTRODUCED.unpack_from(body) == _GUIDS
        elif what == _DATA and names_guids:
            guids.update((uid, guid.hex()) for uid, guid in _whole(_WITH_GUID, body))
        elif what == _APPEND:
            uids = [uid for uid, _ in _whole(_NEW, body)]
            for uid in uids:
                # Where Dovecot repaired the folder after a crash, a UID may come again.
                for known in (guids, came, went, taken):
                    known.pop(uid, None)
            added.update(dict.fromkeys(uids, place))
            if kind & _DSYNC:
                batch, deletes = batch + deletes, False
                came.update(dict.fromkeys(uids, batch))
        elif what == _EXPUNGE:
            gone = {uid: guid.hex() for uid, guid in _whole(_WITH_GUID, body)}
            guids.update((uid, guid) for uid, guid in gone.items() if guid != _UNKNOWN)
            if kind & _DSYNC:
                deletes = True
                went.update(dict.fromkeys(gone, batch))
            elif not kind & _DONE:
                taken.update(dict.fromkeys(gone, place))
    for uid, guid in present:
        if guids.get(uid, guid) != guid:
            # It is none of those that the logs tell of.
            for known in (came, went, taken):
                known.pop(uid, None)
    guids.update(present)
    olds: dict[tuple[int, str], list[int]] = {}
    for old, number in went.items():
        olds.setdefault((number, guids.get(old, _UNKNOWN)), []).append(old)
    earlier: dict[str, list[int]] = {}
    for uid in taken:
        earlier.setdefault(guids.get(uid, _UNKNOWN), []).append(uid)
    found = []
    wanted = {guid for _, guid in olds} if copied else None
    for uid, guid in guids.items():
        if wanted is not None and guid not in wanted:
            continue
        number = came.get(uid, -1)
        before = tuple(old for old in olds.get((number, guid), ()) if old < uid)
        # It may be made of one that nothing more is known of.
        unclear = not before and (number, _UNKNOWN) in olds
        by_dsync = uid in came and not unclear
        after: tuple[int, ...] = ()
        if by_dsync and not before:
            after = tuple(u for u in earlier.get(guid, ()) if taken[u] < added[uid])
        found.append(Life(uid, guid, by_dsync, before, uid in taken, (uid, guid) in here, after))
    return found


def spared(history: History, doubles: Set[Mail]) -> History:
    """The history without the deletions of such mails, which no user has made."""
    return [
        life._replace(taken=False) if life.taken and (life.uid, life.guid) in doubles else life
        for life in history
    ]


def linked(history: History, renumbered: Set[Mail]) -> History:
    """The history with what pairsync gave another UID told as if dsync had.

    ``renumbered``: such mails, under the UIDs that they had before. Each was copied to the next UID
    of its own, then deleted.
    """
    lives = {life.uid: life for life in sorted(history)}
    for uid, guid in sorted(renumbered):
        old = lives.get(uid)
        news = (n for n, life in lives.items() if n > uid and life.guid == guid)
        new = next((n for n in news if not lives[n].by_dsync), None)
        if old is not None and old.guid == guid and old.taken and new is not None:
            lives[uid] = old._replace(taken=False)
            lives[new] = lives[new]._replace(by_dsync=True, before=(uid,))
    return list(lives.values())


def _whole(shape: struct.Struct, body: bytes) -> Iterator[tuple[Any, ...]]:
    return shape.iter_unpack(body[: len(body) // shape.size * shape.size])


def _records(log: bytes, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """Type and content of each record that is whole, from a place on."""
    if len(log) < _HEADER.size:
        return
    at = at or _HEADER.unpack_from(log)[0]
    end = len(log) - _RECORD.size
    while at <= end:
        coded, kind = _RECORD.unpack_from(log, at)
        size = coded & 0x7F
        for shift in (8, 16, 24):
            size = size << 7 | coded >> shift & 0x7F
        size <<= 2
        # One that is being written has not all of these bits yet.
        if coded & _WRITTEN != _WRITTEN or size < _RECORD.size:
            return
        if kind & _TYPE in _TOLD:
            yield kind, log[at + _RECORD.size : at + size]
        at += size


def unwanted(histories: Sequence[History]) -> set[Mail]:
    """What a folder must not have on any of the servers whose histories these are.

    Those of mails that somebody took away: such a mail is there again, or still, where the run
    that would have told the other server broke off, or where dsync was just giving it another UID.
    Who takes a mail away takes all that dsync made of it, here and there. What came by other means
    (the same mail moved back) is another one, and so is what may be.
    """
    found: set[Mail] = set()
    taken = {life.guid for history in histories for life in history if life.taken}
    for guid, lives in _by_guid(histories, taken).items():
        found.update((uid, guid) for uid in _dead(lives))
    return found


def surplus(histories: Sequence[History], newest: int) -> set[Mail]:
    """What is in a folder more than once, where the last of it is newer than a UID; all but that.

    A run that broke off right after dsync had copied mails to give them new UIDs leaves both. None
    of them is missed: they have one GUID, so one content. The last one stays, for that dsync may
    not have ended yet, and is just about to delete what it has copied. But where a user copied a
    mail into its own folder, so that dsync made at most one of them, all stay.
    """
    found: set[Mail] = set()
    several: set[str] = set()
    for history in histories:
        known: set[str] = set()
        for life in history:
            if life.is_there:
                (several if life.guid in known else known).add(life.guid)
    for guid, lives in _by_guid(histories, several).items():
        uids = {uid for known in lives for uid, life in known.items() if life.is_there}
        others = {uid for known in lives for uid, life in known.items() if not life.by_dsync}
        if (kept := max(uids)) > newest and len(uids & others) < 2:
            found.update((uid, guid) for uid in uids - {kept})
    return found


def _by_guid(
    histories: Sequence[History], guids: Set[str]
) -> Mapping[str, Sequence[Mapping[int, Life]]]:
    """GUID -> the lives of that mail, by UID, for each server."""
    found: dict[str, list[dict[int, Life]]] = {}
    for number, history in enumerate(histories):
        for life in history:
            if life.guid in guids:
                lives = found.setdefault(life.guid, [{} for _ in histories])
                lives[number][life.uid] = life
    return found


def _dead(lives: Sequence[Mapping[int, Life]]) -> set[int]:
    """UIDs of one mail whose lives are over or should be; ``lives`` for each server."""
    uids = {uid for known in lives for uid in known}
    parents = {uid: _parents(uid, lives, uids) for uid in uids}
    origins = {uid: set() if before else {uid} for uid, before in parents.items()}
    while grown := {
        uid: more
        for uid, before in parents.items()
        if (more := set().union(*(origins[parent] for parent in before)) - origins[uid])
    }:
        for uid, more in grown.items():
            origins[uid] |= more
    taken = {uid for known in lives for uid, life in known.items() if life.taken}
    over = set().union(*(origins[uid] for uid in taken if len(origins[uid]) == 1))
    # Where a mail may have come from several, all of them must be over.
    return taken | {uid for uid, found in origins.items() if found and found <= over}


def _parents(uid: int, lives: Sequence[Mapping[int, Life]], uids: Set[int]) -> set[int]:
    """From which of the UIDs dsync may have made this one; none: it did not, or nobody knows."""
    if not all(known[uid].by_dsync for known in lives if uid in known):
        return set()
    found: set[int] = set()
    for known in lives:
        if uid in known:
            found.update(known[uid].before)
            others = [other for other in lives if other is not known]
            if not known[uid].before and not any(uid in other for other in others):
                # A mail that finds its UID given away gets one that neither server has had.
                found.update(u for other in others for u in other if u < uid)
    if not found and len(lives) > 1 and all(uid in known for known in lives):
        found = _came_back(uid, lives, {u for u in uids if u < uid})
    return found - {uid} if found <= uids else set()


def _came_back(uid: int, lives: Sequence[Mapping[int, Life]], lower: set[int]) -> set[int]:
    """The lower UIDs, where one server gave a mail this one, and the other got it from there.

    That one had it before then, under one of them. None, where a mail was taken away while it was
    there under this UID too: that was another one.
    """
    taken = [{u for u in lower if u in known and known[u].taken} for known in lives]
    before = [set(known[uid].after) for known in lives]
    is_so = any(taken) and all(one <= other for one, other in zip(taken, before, strict=True))
    return lower if is_so else set()
