"""Read a platform from a folder of site data, or say everything that is wrong with it.

A folder holds::

    site.yaml           names, SPF blocks, DMARC, outbound and management settings
    topology.yaml       sites, networks, egress, hypervisors, hosts
    domains/NAME.yaml   one mail domain each; the file name is the domain
    sasl_users.yaml     logins of the submission service
    mailboxes.yaml      mailboxes; may be missing where there are none

The files are YAML 1.2 of the plain kind: mappings, lists, texts, whole numbers, true and false.
Every problem is reported with the file and line that it comes from and with what to write
instead, all of them at once. Nothing but these files is read.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from yaml.composer import Composer
from yaml.cyaml import CBaseLoader
from yaml.error import MarkedYAMLError, YAMLError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

from mailsite import rules
from mailsite.model import Platform
from mailsite.rulebook import closest, nearest

Data: TypeAlias = Any
Location: TypeAlias = tuple[str | int, ...]

SITE_FILE = "site.yaml"
TOPOLOGY_FILE = "topology.yaml"
SASL_USERS_FILE = "sasl_users.yaml"
MAILBOXES_FILE = "mailboxes.yaml"
DOMAINS_FOLDER = "domains"

#: Top-level keys of the two files that hold several parts, in the order to write them in.
PARTS: Mapping[str, tuple[str, ...]] = {
    SITE_FILE: (
        "name",
        "domain",
        "internal_domain",
        "home_page",
        "names",
        "spf",
        "dmarc",
        "outbound",
        "inbound",
        "spam",
        "maildrop",
        "webmail",
        "certificates",
        "management",
        "upgrades",
        "probe",
        "site_local",
    ),
    TOPOLOGY_FILE: ("sites", "networks", "egress", "hypervisors", "hosts"),
}

#: Parts that map a name to an object: a bad object is reported and the others still checked.
COLLECTIONS = frozenset(
    {"sites", "networks", "egress", "hypervisors", "hosts", "domains", "sasl_users", "mailboxes"}
)

#: Collections whose objects carry their key as ``name``.
NAMED = frozenset({"hosts", "domains", "sasl_users", "mailboxes"})

#: Values of these keys are never shown.
SECRET_KEYS = frozenset({"password_hash"})

_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong with the site data.

    ``line`` counts from 1; 0 where no line is to blame. ``value`` is the offending value as
    text, empty where it is missing or secret. ``remedy`` says what to write instead.
    """

    file: str
    line: int
    value: str
    message: str
    remedy: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.line else f"{self.file}: " if self.file else ""
        return f"{place}{self.message}; {self.remedy}" if self.remedy else f"{place}{self.message}"


class SiteError(Exception):
    """The site data is wrong. ``problems`` holds all that was found, in order of files."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


@dataclass(frozen=True)
class Source:
    """Where each value of the site data stands: location in the tree -> (file, line)."""

    places: Mapping[Location, tuple[str, int]]

    def where(self, *location: str | int) -> tuple[str, int]:
        """File and line of the value at ``location``, or of the nearest thing around it.

        For example ``where("hosts", "mx.example.org", "interfaces", 0, "ipv4")``.
        """
        for length in range(len(location), -1, -1):
            place = self.places.get(location[:length])
            if place is not None:
                return place
        return ("", 0)


@dataclass
class _Reader:
    """Collects data, the place of each value, and problems."""

    problems: list[Problem] = field(default_factory=list)
    places: dict[Location, tuple[str, int]] = field(default_factory=dict)
    #: Locations whose content could not be read; nothing more is said about them.
    unreadable: set[Location] = field(default_factory=set)

    def fault(self, file: str, line: int, value: object, message: str, remedy: str) -> None:
        self.problems.append(Problem(file, line, str(value), message, remedy))

    def read(self, path: Path, at: Location, *, what: str) -> Data | None:
        """Return the content of the YAML file ``path`` (a mapping), or None after a problem."""
        name = _display(path)
        self.places[at] = (name, 1)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            self.fault(name, 0, "", "the file does not exist", f"write it; it holds {what}")
            return None
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            self.fault(
                name, line, "", "the file is not UTF-8 text", "save it with the encoding UTF-8"
            )
            return None
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            self.fault(name, 0, "", f"cannot be read: {reason}", "make it a readable file")
            return None
        try:
            node = _compose(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            if error.context == "while scanning a simple key":
                mark = error.context_mark  # the line without a colon, not the one after it
            line = mark.line + 1 if mark is not None else 1
            lines = text.splitlines()
            # At the end of the file the line to blame is the last one with something on it.
            while line > 1 and (line > len(lines) or not lines[line - 1].strip()):
                line -= 1
            blamed = lines[line - 1] if lines else ""
            shown = blamed.strip()
            secret = any(key in shown for key in SECRET_KEYS)
            tabbed = blamed.lstrip(" ").startswith("\t")
            if path.name in (SASL_USERS_FILE, MAILBOXES_FILE):
                shown = ""
            self.fault(name, line, shown, *_syntax(error, shown, secret=secret, tabbed=tabbed))
            return None
        except ReaderError as error:
            line = text.encode()[: error.position].count(b"\n") + 1
            what = f"the character {chr(error.character)!a} is not allowed in YAML"
            self.fault(name, line, "", what, "remove it")
            return None
        except (YAMLError, ValueError) as error:
            reason = str(error).splitlines()[0]
            self.fault(name, 1, "", f"bad YAML: {reason}", "mend the syntax")
            return None
        except RecursionError:
            self.fault(name, 1, "", "nested too deeply", "remove the superfluous brackets")
            return None
        if node is None:
            self.fault(name, 1, "", "the file is empty", f"write {what} into it")
            return None
        if not isinstance(node, MappingNode):
            self.fault(
                name,
                node.start_mark.line + 1,
                "",
                f"{_kind(node)} where 'key: value' lines belong",
                f"write {what} as 'key: value' lines",
            )
            return None
        return self.convert(node, name, at, ())

    def convert(self, node: Node, file: str, at: Location, above: tuple[int, ...]) -> Data:
        """Turn a node into plain data and note the place of everything in it."""
        line = node.start_mark.line + 1
        self.places.setdefault(at, (file, line))
        if id(node) in above:
            self.fault(file, line, "", "an alias contains itself", "write the value out")
            return None
        above = (*above, id(node))
        if isinstance(node, MappingNode):
            return self.convert_mapping(node, file, at, above)
        if isinstance(node, SequenceNode):
            return [
                self.convert(item, file, (*at, index), above)
                for index, item in enumerate(node.value)
            ]
        if isinstance(node, ScalarNode):
            return self.convert_scalar(node, file, at)
        raise AssertionError(f"unknown YAML node {node!r}")

    def convert_mapping(
        self, node: MappingNode, file: str, at: Location, above: tuple[int, ...]
    ) -> Data:
        data: dict[str, Data] = {}
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                self.fault(file, line, "", f"{_kind(key_node)} as a key", "write a plain name")
                continue
            key = key_node.value
            if key == "<<" and key_node.tag == f"{_TAG}merge":
                self.fault(
                    file, line, key, "merge keys ('<<') are not understood", "write the keys out"
                )
                continue
            if key in seen:
                self.fault(
                    file,
                    line,
                    key,
                    f"the key '{key}' stands here a second time (first in line {seen[key]})",
                    "keep one of the two",
                )
                continue
            seen[key] = line
            self.places[(*at, key)] = (file, line)
            data[key] = self.convert(value_node, file, (*at, key), above)
            if isinstance(value_node, ScalarNode) and value_node.value:
                self.places[(*at, key)] = (file, value_node.start_mark.line + 1)
        return data

    def convert_scalar(self, node: ScalarNode, file: str, at: Location) -> Data:
        text: str = node.value
        tag = str(node.tag).removeprefix(_TAG)
        if any("\ud800" <= c <= "\udfff" for c in text):
            line = node.start_mark.line + 1
            self.fault(file, line, "", "the text has half a character", "write it without '\\u'")
            self.unreadable.add(at)
            return None
        if tag in ("str", "timestamp", "value"):
            return text
        if tag == "null":
            return None
        if tag == "bool":
            return text.lower() == "true"
        if tag in ("int", "float"):
            return _number(text)
        line = node.start_mark.line + 1
        self.fault(file, line, "", f"the YAML tag '{node.tag}' is not understood", "remove it")
        self.unreadable.add(at)
        return None


class _Parser(Composer, CBaseLoader):
    """libyaml, and what words mean in YAML 1.2 (core schema): ``no`` and ``1:30`` are texts.

    The composer is Python's: libyaml's own crashes the process where a file is nested too deeply.
    """

    def __init__(self, text: str) -> None:
        CBaseLoader.__init__(self, text)
        Composer.__init__(self)


for _name, _words, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Parser.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_words})\Z"), _first)


@lru_cache(maxsize=32)
def _compose(text: str) -> Node | None:
    """Parse YAML; a process that loads a platform again pays for the changed files alone."""
    node: Node | None = _Parser(text).get_single_node()
    return node


def _number(text: str) -> int | float | str:
    """The number that ``text`` is in YAML 1.2 (core schema), or the text if it is too large."""
    digits = text.replace("_", "")
    try:
        for prefix, base in (("0x", 16), ("0o", 8)):
            if digits.lower().lstrip("+-").startswith(prefix):
                return int(digits, base)
        if digits.lstrip("+-").isdigit():
            return int(digits)
        number = float(digits)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def _display(path: Path) -> str:
    """The path as the operator would type it: relative to where the command runs, if below."""
    absolute = path if path.is_absolute() else Path.cwd() / path
    try:
        return str(absolute.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _kind(node: Node) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    if isinstance(node, MappingNode):
        return "a mapping"
    return f"the bare value '{node.value}'"


def _syntax(error: MarkedYAMLError, shown: str, *, secret: bool, tabbed: bool) -> tuple[str, str]:
    """Say what a YAML syntax error means: message and remedy.

    ``shown`` is the line to blame, empty where it may hold a secret; ``secret`` says that it does,
    ``tabbed`` that tabs indent it.
    """
    problem = str(error.problem or error.context or "bad syntax")
    if secret:
        return f"bad YAML: {problem}", "put the value of this line in single quotes"
    excerpt = f" at '{shown}'" if shown else ""
    message = f"bad YAML{excerpt}: {problem}"
    if tabbed or "tab" in problem:
        return message, "indent with spaces, not with tabs"
    if "mapping values are not allowed" in problem:
        return message, "put the value in quotes if it contains ': ', or mend the indentation"
    if any(f"expected {what}" in problem for what in ("key", "':'", "'-' indicator")):
        return message, "indent the line like its neighbours and write 'key: value'"
    if "quoted scalar" in f"{error.context} {problem}":
        return message, "close the quote"
    if "expected ',' or" in problem or "flow" in str(error.context):
        return message, "close the bracket, and put a comma between entries"
    if "undefined alias" in problem:
        return message, "put the value in quotes if it starts with '*'"
    if "single document" in problem or "another document" in problem:
        return message, "remove the '---' between the two parts"
    return message, "mend the syntax of this line or of the one above"


# -- What a pydantic error means ------------------------------------------------------------


def _strip(annotation: Any) -> Any:
    """The type inside ``Annotated`` and ``X | None``."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, UnionType):
            inner = [a for a in get_args(annotation) if a is not NoneType]
            if len(inner) != 1:
                return annotation
            annotation = inner[0]
        else:
            return annotation


def _type_at(root: type[BaseModel], location: Location) -> Any:
    """The type that the models ask for at ``location``."""
    here: Any = root
    for step in location:
        here = _strip(here)
        if isinstance(here, type) and issubclass(here, BaseModel):
            if step not in here.model_fields:
                return None
            here = here.model_fields[str(step)].annotation
        elif get_origin(here) is dict:
            here = get_args(here)[1]
        elif get_origin(here) is tuple:
            here = get_args(here)[0]
        else:
            return None
    return _strip(here)


def _keys_at(root: type[BaseModel], location: Location) -> list[str]:
    """The keys that an operator may write at ``location``."""
    model = _type_at(root, location)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return []
    named = len(location) == 2 and location[0] in NAMED
    return [k for k in model.model_fields if not (named and k == "name")]


def show(location: Location) -> str:
    """A location as operators read it: ``hosts > mx.example.org > interfaces[1] > ipv4``."""
    text = ""
    for step in location:
        if isinstance(step, int):
            text += f"[{step + 1}]"
        else:
            text += f" > {step}" if text else step
    return text


#: Units by the ending of the key.
_UNITS = {"mib": " (MiB)", "gib": " (GiB)", "limit": " (bytes)"}

_WANTED = {
    "int_type": "a whole number, without quotes",
    "int_parsing": "a whole number, without quotes",
    "int_from_float": "a whole number, without a fraction",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "float_type": "a number, without quotes",
    "float_parsing": "a number, without quotes",
    "string_type": "a text; put it in quotes",
    "tuple_type": "a list, one '- item' a line",
    "dict_type": "'name: ...' lines below it",
    "model_type": "'key: value' lines below it",
    "model_attributes_type": "'key: value' lines below it",
}


def _explain(root: type[BaseModel], error: Mapping[str, Any]) -> tuple[Location, str, str, str]:
    """Return (location, offending value, message, remedy) of one pydantic error."""
    location: Location = tuple(error["loc"]) or ("",)
    is_key = bool(location) and location[-1] == "[key]"
    is_name = len(location) == 3 and location[0] in NAMED and location[-1] == "name"
    if is_key or is_name:
        location = location[:-1]
    kind = error["type"]
    context = error.get("ctx", {})
    last = location[-1] if location else ""
    value = error.get("input")
    secret = last in SECRET_KEYS
    shown = "" if secret or isinstance(value, dict | list) else _yaml(value)
    here = show(location)

    if kind == "missing":
        parent = show(location[:-1])
        where = f" in {parent}" if parent else ""
        return location, "", f"'{last}' is missing{where}", f"write a line '{last}: ...' there"
    if kind == "extra_forbidden":
        parent = show(location[:-1])
        remedy = closest(str(last), _keys_at(root, location[:-1]))
        return location, str(last), f"unknown key '{last}' in {parent}", remedy
    if kind == "enum":
        wanted = _type_at(root, location)
        names = [m.value for m in wanted]
        what = re.sub(r"(?<!^)(?=[A-Z])", " ", wanted.__name__).lower().replace("tls", "TLS")
        options = ", ".join(names)
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        return location, shown, f"{here}: '{shown}' is no {what}", f"write one of {options}{hint}"
    if value is None and kind in _WANTED:
        return location, "", f"{here} has no value", f"write {_WANTED[kind]}"
    if kind in _WANTED:
        given = f"'{shown}' is not" if shown and not secret else "the value is not"
        wanted_words = _WANTED[kind]
        return location, shown, f"{here}: {given} what belongs here", f"write {wanted_words}"
    if kind == "value_error":
        message, _, remedy = str(context["error"]).partition("; ")
        return location, shown, f"{here}: {message}", remedy
    if kind in ("greater_than_equal", "less_than_equal"):
        bound, word = (
            (context["ge"], "small") if kind == "greater_than_equal" else (context["le"], "large")
        )
        at = "at least" if word == "small" else "at most"
        unit = _UNITS.get(str(last).rpartition("_")[2], "")
        return location, shown, f"{here}: {shown} is too {word}", f"write {at} {bound}{unit}"
    if kind == "too_short":
        return location, "", f"{here} is empty", "list at least one entry"
    return location, shown, f"{here}: {str(error['msg']).lower()}", "mend the value"


def _yaml(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


# -- Reading a folder -----------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedSite:
    """A valid platform and where its values stand."""

    platform: Platform
    source: Source


def load_platform(folder: Path, world: Path | None = None) -> Platform:
    """Return the platform that the site data in ``folder`` describes.

    ``world`` is a YAML or JSON file with the fields of :class:`mailsite.model.World`: what the
    outside looks like, where it is not the real one.

    Raises :class:`SiteError` with every problem.
    """
    return load_site(folder, world).platform


def load_site(folder: Path, world: Path | None = None) -> LoadedSite:
    """Like :func:`load_platform`, and say of every value which file and line it comes from."""
    reader = _Reader()
    data: dict[str, Data] = {}
    if not folder.is_dir():
        reader.fault(
            _display(folder), 0, "", "the site data folder does not exist", "check the path"
        )
        raise SiteError(reader.problems)
    _read_parts(reader, folder, data)
    _read_people(reader, folder, data)
    _read_domains(reader, folder, data)
    _refuse_strangers(reader, folder)
    if world is not None:
        overlay = reader.read(world, ("world",), what="what the outside looks like")
        if overlay is not None:
            data["world"] = overlay
    _insert_names(reader, data)

    platform, incomplete = _validate(reader, data)
    source = Source(reader.places)
    for finding in rules.check(platform, incomplete):
        file, line = source.where(*finding.location)
        message = finding.message
        if finding.other is not None:
            message += " ({}:{})".format(*source.where(*finding.other))
        reader.fault(file, line, finding.value, message, finding.remedy)
    if reader.problems:
        raise SiteError(sorted(set(reader.problems)))
    return LoadedSite(platform, source)


def _read_parts(reader: _Reader, folder: Path, data: dict[str, Data]) -> None:
    homes = {part: file for file, parts in PARTS.items() for part in parts}
    homes |= {
        "sasl_users": SASL_USERS_FILE,
        "mailboxes": MAILBOXES_FILE,
        "domains": f"{DOMAINS_FOLDER}/",
    }
    for file, parts in PARTS.items():
        path = folder / file
        content = reader.read(path, (), what=f"the keys {', '.join(parts)}")
        for part in parts:
            reader.places.setdefault((part,), (_display(path), 1))
        if content is None:
            reader.unreadable |= {(part,) for part in parts}
            continue
        for key, value in content.items():
            where = reader.places[(key,)]
            if key in parts:
                data[key] = value
            elif key in homes:
                reader.fault(*where, key, f"'{key}' does not belong here", f"see {homes[key]}")
            else:
                reader.fault(*where, key, f"unknown key '{key}'", closest(key, parts))
                near = nearest(key, parts)
                if near is not None and near not in content:
                    reader.unreadable.add((near,))


def _read_people(reader: _Reader, folder: Path, data: dict[str, Data]) -> None:
    for file, part, what in (
        (SASL_USERS_FILE, "sasl_users", "the logins of the submission service"),
        (MAILBOXES_FILE, "mailboxes", "the mailboxes"),
    ):
        path = folder / file
        if part == "mailboxes" and not path.exists():
            reader.places[(part,)] = (_display(path), 0)
            continue
        content = reader.read(path, (part,), what=what)
        if content is None:
            reader.unreadable.add((part,))
        else:
            data[part] = content


def _read_domains(reader: _Reader, folder: Path, data: dict[str, Data]) -> None:
    domains = folder / DOMAINS_FOLDER
    reader.places[("domains",)] = (_display(domains), 0)
    if not domains.is_dir():
        reader.fault(
            _display(domains), 0, "", "the folder does not exist", "make one file per mail domain"
        )
        reader.unreadable.add(("domains",))
        return
    data["domains"] = {}
    for path in sorted(domains.iterdir()):
        if _is_ignored(path):
            continue
        if path.suffix != ".yaml":
            reader.fault(
                _display(path), 0, path.name, "not a '.yaml' file", f"name it '{path.stem}.yaml'"
            )
            continue
        content = reader.read(path, ("domains", path.stem), what="the settings of the domain")
        if content is None:
            reader.unreadable.add(("domains", path.stem))
        else:
            data["domains"][path.stem] = content


def _refuse_strangers(reader: _Reader, folder: Path) -> None:
    """A misspelt file name must not pass silently."""
    known = [*PARTS, SASL_USERS_FILE, MAILBOXES_FILE, DOMAINS_FOLDER]
    for path in sorted(folder.iterdir()):
        if path.name not in known and not _is_ignored(path):
            reader.fault(
                _display(path), 0, path.name, "unknown file in the site data",
                closest(path.name, known),
            )  # fmt: skip


def _is_ignored(path: Path) -> bool:
    return path.name.startswith(".") or path.name.endswith("~") or path.suffix == ".md"


def _insert_names(reader: _Reader, data: dict[str, Data]) -> None:
    """Give the objects of named collections their key as ``name``."""
    for collection in NAMED:
        objects = data.get(collection)
        if not isinstance(objects, dict):
            continue
        for key, value in objects.items():
            if not isinstance(value, dict):
                continue
            if "name" in value:
                file, line = reader.places[(collection, key, "name")]
                reader.fault(
                    file, line, value["name"],
                    f"'name' does not belong here: '{key}' is the name already", "remove the line",
                )  # fmt: skip
            value["name"] = key


def _validate(reader: _Reader, data: dict[str, Data]) -> tuple[Platform, frozenset[str]]:
    """Return the platform as far as it is valid, and the names of the parts that are not whole."""
    incomplete = {str(x[0]) for x in reader.unreadable}
    try:
        return Platform.model_validate_json(json.dumps(data), strict=True), frozenset(incomplete)
    except ValidationError as error:
        bad: set[Location] = set()
        source = Source(reader.places)
        entries = error.errors(include_url=False)
        misspelt = {
            (*entry["loc"][:-1], nearest(str(entry["loc"][-1]), known))
            for entry in entries
            if entry["type"] == "extra_forbidden"
            and (known := _keys_at(Platform, entry["loc"][:-1]))
        }
        for entry in entries:
            if entry["type"] == "missing" and entry["loc"] in misspelt:
                bad.add(entry["loc"][: 2 if entry["loc"][0] in COLLECTIONS else 1])
                continue  # reported as an unknown key
            if entry["type"] == "too_short" and entry["input"]:
                continue  # its items are wrong, and reported themselves
            location, value, message, remedy = _explain(Platform, entry)
            depth = 2 if location[0] in COLLECTIONS else 1
            bad.add(location[:depth])
            incomplete.add(str(location[0]))
            if location in reader.unreadable or location[:1] in reader.unreadable:
                continue
            file, line = source.where(*location)
            reader.fault(file, line, value, message, remedy)
        return _partial(data, bad), frozenset(incomplete)


def _partial(data: Mapping[str, Data], bad: set[Location]) -> Platform:
    """A platform of the valid parts alone, for the rules that can still be checked."""
    values: dict[str, Data] = {}
    for part in Platform.model_fields:
        if (part,) in bad or part not in data:
            if part in COLLECTIONS:
                values[part] = {}
            continue
        content = data[part]
        if part in COLLECTIONS:
            content = {k: v for k, v in content.items() if (part, k) not in bad}
        values[part] = _adapter(part).validate_json(json.dumps(content), strict=True)
    return Platform.model_construct(**values)


@cache
def _adapter(part: str) -> TypeAdapter[Any]:
    annotation: Any = Platform.model_fields[part].annotation
    return TypeAdapter(annotation)
