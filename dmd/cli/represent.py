"""`dmd represent METHOD [PRESET]`: a backbone learnt from images and captions, made by a one-step student or found."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dmd.cli import flags
from dmd.cli.train import accept_directory, open_directory
from dmd.represent.config import METHODS, PRESETS, Config, check, preset, read, require_same, to_json

CONTENT = (
    "checkpoints", "backbone", "text", "samples", "tensorboard", "wandb", "environment.json", "inputs.json",
    "metrics.jsonl", "summary.json", "config.json",
)  # fmt: skip
"""What a run writes into its directory, and `--fresh` deletes; other files there are the user's."""


@dataclass(frozen=True)
class Command:
    """A config, and what to do with it."""

    config: Config
    fresh: bool = False
    """Delete what the run directory holds and start over; what is cached stays."""
    dry_run: bool = False
    """Print the resolved config and stop."""


def main(argv: Sequence[str], prog: str = "dmd represent") -> None:
    """One of `METHODS` by its name."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {prog} METHOD [PRESET] [--help]\n\nmethods:")
        print("\n".join(f"  {name:16} {words}" for name, words in METHODS.items()))
        print("\npresets:")
        return print("\n".join(f"  {name:16} {words}" for name, words in PRESETS.items()))
    flags.guarded(lambda: represent(argv, prog))


def parse(argv: Sequence[str], prog: str) -> Command:
    """Flags over a method's preset (the first two words; the second may be left out).

    Raises:
        InputError: unknown method, preset or flag, or a value that is out of range or of another kind.
    """
    method, *rest = argv
    name = rest.pop(0) if rest and not rest[0].startswith("-") else "shapes"
    default = Command(preset(method, name))
    kind: Any = tyro.conf.OmitArgPrefixes[Annotated[Command, tyro.conf.arg(name="")]]
    text = f"{method}: {METHODS[method]}.\n\nPresets: {', '.join(PRESETS)}. The defaults below are those of {name!r}."
    command = flags.read(kind, rest, f"{prog} {method} [PRESET]", default=default, description=text)
    check(command.config)
    return command


def represent(argv: Sequence[str], prog: str) -> None:
    """Everything that is missing, up to the probe."""
    command = parse(argv, prog)
    config, folder = command.config, Path(command.config.run.output_dir)
    if command.dry_run:
        return print(json.dumps(to_json(config), indent=2))
    from dmd import build
    from dmd.represent.chain import Chain, Stopped

    place = build.start(config.run)
    place.first(lambda: check_directory(folder, config, command.fresh))
    chain = place.together(lambda: Chain(config, place, folder))
    place.first(lambda: open_directory(folder, to_json(config), CONTENT, command.fresh))
    try:
        chain.run()
    except Stopped as stopped:
        if place.main:
            print(stopped)


def check_directory(folder: Path, config: Config, fresh: bool) -> None:
    """Whether a run can be made or resumed here; writes nothing. Raises InputError if it holds something else."""
    if accept_directory(folder):
        old = read(folder / "config.json")
        if not fresh:
            require_same(old, config, str(folder))
