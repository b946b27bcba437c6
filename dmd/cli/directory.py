"""Run directories: whether one can be begun or gone on with, and opening it."""

import json
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmd import settings
from dmd.errors import InputError

if TYPE_CHECKING:
    from dmd.build import Workplace


@dataclass(frozen=True)
class Kind:
    """The runs of a command.

    Attributes:
        command: its name.
        config: dataclass of its config.json.
        mark: group of the config that other commands' do not have.
        resumable: options in which a run that is gone on with may differ.
        content: names of what a run writes, which `--fresh` deletes; other files there are the user's.
    """

    command: str
    config: type[Any]
    mark: str
    resumable: Collection[str]
    content: Sequence[str]


def check(folder: Path, kind: Kind, config: Any, fresh: bool) -> None:
    """Whether a run can be made or resumed here; writes nothing.

    Raises:
        InputError: the folder holds another run, or something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder as --output-dir")
    found = [p.name for p in folder.iterdir() if not p.name.startswith(".tmp-")] if folder.exists() else []
    if found and not is_run(folder, kind):
        raise InputError(f"{folder} is not empty and not a run directory of {kind.command}: give another --output-dir")
    if found and not fresh:
        old = settings.read(kind.config, folder / "config.json", kind.command)
        settings.require_same(old, config, kind.resumable, str(folder))


def open_run(folder: Path, kind: Kind, config: Any, fresh: bool) -> None:
    """Make a run directory, or go on with one that has been checked; if `fresh`, without what a run has written."""
    from dmd.checkpoint import write_json

    for name in kind.content if fresh else ():
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", settings.to_json(config))


def run(chain: Callable[[Any, "Workplace", Path], Any], kind: Kind, config: Any, fresh: bool) -> None:
    """Open the config's run directory and do what is missing there.

    Args:
        chain: (config, processes, folder) to what has `run()`, which raises `dmd.run.Stopped` when it is told to stop.
    """
    from dmd import build
    from dmd.run import Stopped

    folder = Path(config.run.output_dir)
    place = build.start(config.run)
    place.first(lambda: check(folder, kind, config, fresh))
    made = place.together(lambda: chain(config, place, folder))
    place.first(lambda: open_run(folder, kind, config, fresh))
    try:
        made.run()
    except Stopped as stopped:
        if place.main:
            print(stopped)


def is_run(folder: Path, kind: Kind) -> bool:
    """Many programs write a config.json: it is a run's if it says so or, when damaged, has a run's files beside it."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (folder / "config.json").is_file() and (folder / "environment.json").is_file()
    return isinstance(raw, dict) and {"preset", kind.mark, "run"} <= raw.keys()
