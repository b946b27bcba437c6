"""`train_dmd.py` and `dmd train`: data, teacher, pairs, distillation, evaluation, report; each step resumes."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from dmd.cli import flags
from dmd.config import Config, read, require_same, to_json
from dmd.errors import InputError

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
    if place.main:
        open_directory(folder, config, fresh)
    place.accelerator.wait_for_everyone()
    Chain(config, place, folder).run()


def open_directory(folder: Path, config: Config, fresh: bool) -> None:
    """Make a run directory or accept the one that is there.

    Raises:
        InputError: it holds another run, or something else.
    """
    from dmd.checkpoint import write_json

    known = folder / "config.json"
    if fresh and known.exists():
        shutil.rmtree(folder)
    if known.exists():
        require_same(read(known), config, str(folder))
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty and not a run directory: give another --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(known, to_json(config))


def read_summary(folder: Path) -> dict[str, object]:
    """summary.json of a finished run, or nothing."""
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
