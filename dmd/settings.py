"""What the configs of all commands share: frozen dataclasses of groups to JSON and back, ranges of numbers, and whether
a run may go on with other options."""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from dmd.errors import InputError

C = TypeVar("C")


def to_json(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries; `from_json` takes them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(kind: type[C], raw: Any, where: str) -> C:
    """A dataclass, whose fields may be dataclasses, from `to_json`'s form.

    Raises:
        InputError: something is no object or has an unknown key; names it and `where` it is.
    """
    types = get_type_hints(kind)
    if not isinstance(raw, Mapping):
        raise InputError(f"{where} has {raw!r} where an object is due, with the keys {', '.join(types)}")
    values = {}
    for key, value in raw.items():
        if key not in types:
            raise InputError(f"{where} has the unknown key {key!r}: {kind.__name__} knows {', '.join(types)}")
        if dataclasses.is_dataclass(types[key]):
            value = from_json(types[key], value, where)
        values[key] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def read(kind: type[C], path: Path, command: str) -> C:
    """The config.json of a run of `command`. Raises InputError if it is missing, damaged or of something else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{path} does not exist: give a run directory of {command}") from None
    except ValueError:
        raise InputError(f"{path} is not valid JSON: restore it, or start over with --fresh") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path} is not a JSON object: it should be a run's configuration")
    return from_json(kind, raw, str(path))


def require_same(old: Any, new: Any, resumable: Collection[str], where: str) -> None:
    """Raises InputError naming the first option, other than the `resumable` ones, in which a resumed run differs."""
    for f in fields(old):
        before, now = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(before):
            require_same(before, now, resumable, where)
        elif f.name not in {"preset", *resumable} and before != now:  # a preset's name is no option
            raise InputError(
                f"{where} holds another run ({f.name} was {before!r}, now {now!r}): give another --output-dir, or "
                f"start over with --fresh"
            )


def require_positive(values: Mapping[str, float]) -> None:
    """Raises InputError for the first number, by its flag, that is not greater than 0 and finite."""
    for flag, value in values.items():
        if not 0 < value < math.inf:
            raise InputError(f"{flag} is {value}: it must be a number greater than 0")


def require_not_negative(values: Mapping[str, float]) -> None:
    """The same for at least 0."""
    for flag, value in values.items():
        if not 0 <= value < math.inf:
            raise InputError(f"{flag} is {value}: it must be a number of at least 0")


def require_below_one(values: Mapping[str, float]) -> None:
    """The same for at least 0 and below 1."""
    for flag, value in values.items():
        if not 0 <= value < 1:
            raise InputError(f"{flag} is {value}: it must be at least 0 and below 1")


def require_finite(values: Mapping[str, float]) -> None:
    """The same for any number that is finite."""
    for flag, value in values.items():
        if not math.isfinite(value):
            raise InputError(f"{flag} is {value}: it must be a finite number")


def require_seed(value: int) -> None:
    """Raises InputError for what is no key of `dmd.seeding`."""
    if not 0 <= value < 2**64:
        raise InputError(f"--seed is {value}: it must be at least 0 and below 2**64")
