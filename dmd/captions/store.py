"""Captions on the disk: FILE.jsonl, and beside it FILE.state.json, from which a stopped command goes on exactly.

    captions.jsonl          one object a line: id, caption, concept, template; ids are 0, 1, 2, ...
    captions.state.json     what determines them, how many attempts were made, what was dropped, how long the file was

The state is written after the captions that it counts, so whatever the file holds beyond it is cut off on resume, and a
caption is neither lost nor there twice.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dmd import checkpoint
from dmd.captions.grammar import Draw, Row
from dmd.errors import InputError
from dmd.locks import Locks

PATIENCE = 20_000
"""Attempts without a new caption after which there are no more."""


@dataclass
class Progress:
    """What has been done.

    Attributes:
        attempts: captions that were tried for.
        kept: captions in the file.
        size: of the file in bytes.
        dropped: attempts without a caption, by the reason.
        templates: captions by template.
    """

    attempts: int = 0
    kept: int = 0
    size: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    templates: dict[str, int] = field(default_factory=dict)


def write(
    path: Path,
    spec: Mapping[str, Any],
    count: int,
    draw: Draw,
    batch: int,
    tick: Callable[[int], object] = lambda n: None,
) -> Progress:
    """Write `count` different captions, or what is missing of them.

    Args:
        path: ends in .jsonl; its folder is made.
        spec: what determines the captions besides their count: a file of another spec is refused.
        draw: makes captions.
        batch: attempts at a time, after each of which the state is saved.
        tick: told how many captions each batch added; first, how many there were.

    Raises:
        InputError: the file is of another spec or no file of captions, another process writes it, or there are not as
            many different captions.
    """
    if path.suffix != ".jsonl":
        raise InputError(f"--out is {path}: its name must end in .jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with Locks(path.with_name(f".{path.name}.lock")) as locks:
        if not locks.take(0):
            raise InputError(f"{path} is being written by another process: wait for it, or give another --out")
        return _write(path, spec, count, draw, batch, tick)


def remove(path: Path) -> None:
    """Delete captions and their state."""
    for file in (path, state_of(path)):
        file.unlink(missing_ok=True)


def state_of(path: Path) -> Path:
    return path.with_suffix(".state.json")


def _write(
    path: Path, spec: Mapping[str, Any], count: int, draw: Draw, batch: int, tick: Callable[[int], object]
) -> Progress:
    progress, seen = _opened(path, spec)
    tick(progress.kept)
    last_new = progress.attempts
    with open(path, "ab") as file:
        while progress.kept < count:
            rows = draw(torch.arange(progress.attempts, progress.attempts + batch))
            before = progress.kept
            for row in rows:
                progress.attempts += 1
                reason = _unusable(row, seen)
                if isinstance(row, str) or reason is not None:
                    _count(progress.dropped, reason or str(row))
                    continue
                seen.add(row.caption)
                _count(progress.templates, row.template)
                file.write(line(progress.kept, row))
                progress.kept += 1
                last_new = progress.attempts
                if progress.kept == count:
                    break
            file.flush()
            os.fsync(file.fileno())
            progress.size = file.tell()
            _save(path, spec, progress)
            tick(progress.kept - before)
            if progress.attempts - last_new >= PATIENCE:
                raise InputError(
                    f"there are no more than {progress.kept} different captions, and {count} were asked for: they are "
                    f"in {path}; give --count {max(progress.kept, 1)}, more concepts, or --llm"
                )
    return progress


def line(number: int, row: Row) -> bytes:
    """A caption as a line of the file."""
    return (json.dumps({"id": number, **row._asdict()}, ensure_ascii=False) + "\n").encode()


def _unusable(row: Row | str, seen: set[str]) -> str | None:
    if isinstance(row, str):
        return row
    return "repeated" if row.caption in seen else None


def _count(table: dict[str, int], name: str) -> None:
    table[name] = table.get(name, 0) + 1


def _save(path: Path, spec: Mapping[str, Any], progress: Progress) -> None:
    checkpoint.write_json(state_of(path), {"spec": dict(spec), "progress": asdict(progress)})


def _opened(path: Path, spec: Mapping[str, Any]) -> tuple[Progress, set[str]]:
    """What is there already; what a killed command left beyond it is cut off."""
    if not path.exists():  # the state comes first: a file without it is not ours
        _save(path, spec, Progress())
        return Progress(), set()
    try:
        state = json.loads(state_of(path).read_text(encoding="utf-8"))
        found, progress = dict(state["spec"]), Progress(**state["progress"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is there already, and {state_of(path).name} beside it does not say how it was made: give another "
            "--out, or --fresh to replace it"
        ) from None
    for name, value in json.loads(json.dumps(dict(spec))).items():
        if found.get(name) != value:
            raise InputError(
                f"{path} holds captions with {name} = {str(found.get(name))[:80]!r}, but {str(value)[:80]!r} is asked "
                "for: give another --out, or --fresh to replace it"
            )
    with open(path, "rb+") as file:
        captions = [_caption(row) for row in file.read(progress.size).splitlines()]
        if len(captions) != progress.kept or None in captions or file.tell() != progress.size:
            raise InputError(f"{path} was changed since it was written: give another --out, or --fresh to replace it")
        file.truncate(progress.size)
    return progress, {c for c in captions if c is not None}


def _caption(row: bytes) -> str | None:
    try:
        return str(json.loads(row)["caption"])
    except (ValueError, KeyError, TypeError):
        return None


def summary(progress: Progress) -> str:
    """What was kept and dropped, in words."""
    kept = ", ".join(f"{v} {k}" for k, v in Counter(progress.templates).most_common())
    dropped = ", ".join(f"{v} {k}" for k, v in Counter(progress.dropped).most_common()) or "none"
    return f"{progress.kept} captions ({kept}); dropped: {dropped}"
