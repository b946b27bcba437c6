"""What captions are about: groups of concepts with their backgrounds, relations, places and textures.

The lists that ship (`concepts.json`) were written for this project. A user's own are a text file of one concept a line,
or JSON of the same form:

    {"groups": {NAME: {"weight": 0.5, "concepts": [...], "backgrounds": [...]}},
     "backgrounds": [...], "relations": [...], "places": [...], "textures": [...]}

A background follows its concept ("on a wooden table"); a group without some takes those of the file.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from dmd.data import prompts
from dmd.errors import InputError

LISTS = ("backgrounds", "relations", "places", "textures")
MAX_LENGTH = 200  # of a concept


@dataclass(frozen=True)
class Group:
    """Concepts of one kind.

    Attributes:
        weight: its part of the captions with a concept, relative to the other groups.
        concepts: at least one.
        backgrounds: phrases that may follow them; none is possible.
    """

    name: str
    weight: float
    concepts: tuple[str, ...]
    backgrounds: tuple[str, ...]


@dataclass(frozen=True)
class Concepts:
    """All that captions are made of; any of the last three may be empty."""

    groups: tuple[Group, ...]
    relations: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    textures: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 of the lists."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


def shipped() -> Concepts:
    """The lists that ship: 751 concepts in the six kinds of SynCLR's mixture, 162 places and 46 textures."""
    text = resources.files("dmd.captions").joinpath("concepts.json").read_text(encoding="utf-8")
    return _parsed("concepts.json", json.loads(text))


def read(path: str | Path) -> Concepts:
    """A user's concepts: JSON as above, or text with one concept a line, which have the backgrounds, relations, places
    and textures that ship.

    Raises:
        InputError: there is no such file, it is not UTF-8 or not of this form, or it has no concept.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        try:
            return _parsed(str(path), json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise InputError(f"{path} does not exist: give concepts as .txt (one a line) or .json") from None
        except (ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is not JSON in UTF-8: {error}") from None
    if path.suffix.lower() != ".txt":
        raise InputError(f"{path} is of no known layout for concepts: give .txt (one a line) or .json")
    own, ours = prompts.read(path), shipped()
    found = _strings(str(path), "concept", list(own.texts))
    group = Group(path.stem, 1.0, found, ours.groups[-1].backgrounds)
    return Concepts((group,), ours.relations, ours.places, ours.textures)


def _parsed(where: str, raw: Any) -> Concepts:
    """Raises InputError for what is not of the form above."""
    raw = _object(where, raw, ("groups", *LISTS))
    shared = {name: _strings(where, name, raw.get(name, [])) for name in LISTS}
    groups = raw.get("groups")
    if not isinstance(groups, Mapping) or not groups:
        raise InputError(
            f'{where} has no "groups": it needs at least one, such as {{"animals": {{"concepts": [...]}}}}'
        )
    found = []
    for name, group in groups.items():
        here = f"{where}, group {name!r}"
        group = _object(here, group, ("weight", "concepts", "backgrounds"))
        weight = group.get("weight", 1.0)
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < math.inf:
            raise InputError(f"{here} has the weight {weight!r}: it must be a number above 0")
        concepts = _strings(here, "concepts", group.get("concepts", []))
        if not concepts:
            raise InputError(f'{here} has no "concepts": it needs at least one')
        backgrounds = _strings(here, "backgrounds", group.get("backgrounds", [])) or shared["backgrounds"]
        found.append(Group(name, float(weight), concepts, backgrounds))
    return Concepts(tuple(found), shared["relations"], shared["places"], shared["textures"])


def _object(where: str, raw: Any, keys: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise InputError(f"{where} is not a JSON object: it may have the keys {', '.join(keys)}")
    unknown = sorted(raw.keys() - set(keys))
    if unknown:
        raise InputError(f"{where} has the unknown key {unknown[0]!r}: known are {', '.join(keys)}")
    return raw


def _strings(where: str, what: str, raw: Any) -> tuple[str, ...]:
    """Unique strings of one line, in their order."""
    if not isinstance(raw, list):
        raise InputError(f"{where} has {what} that are no list: give a list of strings")
    for value in raw:
        if not isinstance(value, str) or not value.isprintable() or not 0 < len(value.strip()) <= MAX_LENGTH:
            raise InputError(
                f"{where} has {str(value)[:60]!r} among its {what}: each must be text of 1 to {MAX_LENGTH} characters"
            )
    return tuple(dict.fromkeys(" ".join(v.split()) for v in raw))
