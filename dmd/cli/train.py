"""`train_dmd.py` and `dmd train`: data, teacher, pairs, distillation, evaluation, report; each step resumes."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmd.cli import flags
from dmd.config import Config, read, require_same, to_json
from dmd.errors import InputError

CONTENT = (
    "checkpoints", "student", "student-lora", "samples", "tensorboard", "wandb", "environment.json", "inputs.json",
    "metrics.jsonl", "summary.json", "report.html", "config.json",
)  # fmt: skip
"""What a run writes into its directory, and `--fresh` deletes; other files there are the user's."""

DESCRIPTION = "Distil a diffusion teacher into a one-step student (Distribution Matching Distillation)."


def main(argv: Sequence[str], prog: str = "train_dmd.py") -> None:
    def work() -> None:
        command = flags.parse(argv, prog, DESCRIPTION)
        if command.dry_run:
            flags.show(command.config)
        else:
            train(command.config, command.fresh)

    flags.guarded(work)


def train(config: Config, fresh: bool = False) -> None:
    """The whole chain in `config.run.output_dir`. Returns early, with everything saved, when told to stop."""
    from dmd import build
    from dmd.chain import Chain

    place = build.workplace(config)
    folder = Path(config.run.output_dir)
    place.first(lambda: check_directory(folder, config, fresh))
    chain = place.together(lambda: Chain(config, place, folder))
    if not fresh:
        place.together(chain.require_same_inputs)
    place.first(lambda: open_directory(folder, to_json(config), CONTENT, fresh))
    chain.run()


def check_directory(folder: Path, config: Config, fresh: bool) -> None:
    """Whether a run can be made or resumed here; writes nothing.

    Raises:
        InputError: it holds another run, or something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder as --output-dir")
    found = [p.name for p in folder.iterdir() if not p.name.startswith(".tmp-")] if folder.exists() else []
    if found and not is_run(folder):
        raise InputError(f"{folder} is not empty and not a run directory: give another --output-dir")
    if found and not fresh:
        require_same(read(folder / "config.json"), config, str(folder))


def accept_directory(folder: Path) -> bool:
    """Whether a folder holds a run, of whatever command, by its config.json; False if it is empty or not there.

    Raises:
        InputError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder as --output-dir")
    found = [p.name for p in folder.iterdir() if not p.name.startswith(".tmp-")] if folder.exists() else []
    if found and not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not empty and not a run directory: give another --output-dir")
    return bool(found)


def open_directory(folder: Path, config: Mapping[str, Any], content: Sequence[str], fresh: bool) -> None:
    """Make a run directory, or go on with one that has been accepted (`check_directory`).

    Args:
        config: plain, as config.json is to hold it.
        content: names of what a run of this kind writes, deleted first if `fresh`.
    """
    from dmd.checkpoint import write_json

    for name in content if fresh else ():
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)


def is_run(folder: Path) -> bool:
    """Many programs write a config.json: it is a run's if it says so or, when damaged, has a run's files beside it."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (folder / "config.json").is_file() and (folder / "environment.json").is_file()
    return isinstance(raw, dict) and {"preset", "distill", "run"} <= raw.keys()
