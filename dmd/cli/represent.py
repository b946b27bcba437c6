"""`dmd represent METHOD [PRESET]`: a backbone learnt from images and captions, made by a one-step student or found."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from dmd.cli import directory, flags
from dmd.errors import InputError
from dmd.represent.config import METHODS, PRESETS, RESUMABLE, Config, check, preset

RUNS = directory.Kind(
    "dmd represent", Config, "backbone", RESUMABLE,
    (
        "checkpoints", "backbone", "text", "samples", "tensorboard", "wandb", "environment.json", "inputs.json",
        "metrics.jsonl", "summary.json", "report.html", "elapsed.json", "config.json",
    ),
)  # fmt: skip


def main(argv: Sequence[str], prog: str = "dmd represent") -> None:
    """One of `METHODS` by its name."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {prog} METHOD [PRESET] [--help]\n\nmethods:")
        print("\n".join(f"  {name:16} {words}" for name, words in METHODS.items()))
        print("\npresets:")
        return print("\n".join(f"  {name:16} {words}" for name, words in PRESETS.items()))
    flags.guarded(lambda: represent(argv, prog))


def parse(argv: Sequence[str], prog: str) -> flags.Command[Config]:
    """Flags over a method's preset (the first two words; the second may be left out), see `flags.over_preset`."""
    method, *rest = argv
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}")
    text = f"{method}: {METHODS[method]}."
    settings = partial(_without_data if "--online" in rest else preset, method)
    return flags.over_preset(rest, f"{prog} {method}", text, PRESETS, settings, check)


def _without_data(method: str, name: str) -> Config:
    """A preset whose images are made as they are looked at, whatever it reads otherwise."""
    config = preset(method, name)
    return replace(config, data=replace(config.data, data=None))


def represent(argv: Sequence[str], prog: str) -> None:
    """Everything that is missing, up to the probe."""
    command = parse(argv, prog)
    if command.dry_run:
        return flags.show(command.config)
    from dmd.represent.chain import Chain

    directory.run(Chain, RUNS, command.config, command.fresh)
