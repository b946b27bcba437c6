"""`train_dmd.py` and `dmd train`: data, teacher, pairs, distillation, evaluation, report; each step resumes."""

from collections.abc import Sequence
from pathlib import Path

from dmd.cli import directory, flags
from dmd.config import RESUMABLE, Config

RUNS = directory.Kind(
    "dmd train", Config, "distill", RESUMABLE,
    (
        "checkpoints", "student", "student-lora", "samples", "tensorboard", "wandb", "environment.json", "inputs.json",
        "metrics.jsonl", "summary.json", "elapsed.json", "report.html", "config.json",
    ),
)  # fmt: skip

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
    place.first(lambda: directory.check(folder, RUNS, config, fresh))
    chain = place.together(lambda: Chain(config, place, folder))
    if not fresh:
        place.together(chain.require_same_inputs)
    place.first(lambda: directory.open_run(folder, RUNS, config, fresh))
    chain.run()
