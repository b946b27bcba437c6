"""`dmd clipgen teach-tokenizer | teach-clip | train | sample | evaluate`: text to image learnt from images alone."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from dmd.cli import directory, flags
from dmd.cli.sample import find_device, parse_seeds, save_png, slug
from dmd.clipgen.config import (
    PRESETS,
    RESUMABLE,
    Config,
    EvaluationOptions,
    SamplingOptions,
    check,
    preset,
    read,
)  # fmt: skip
from dmd.errors import InputError

RUNS = directory.Kind(
    "dmd clipgen", Config, "transformer", RESUMABLE,
    (
        "checkpoints", "model", "samples", "stages", "tensorboard", "wandb", "environment.json", "inputs.json",
        "metrics.jsonl", "summary.json", "elapsed.json", "report.html", "config.json",
    ),
)  # fmt: skip


def main(argv: Sequence[str], prog: str = "dmd clipgen") -> None:
    """One of `COMMANDS` by its name."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(f"usage: {prog} COMMAND [--help]\n")
        print("\n".join(f"  {command:16} {text}" for command, (_, text) in COMMANDS.items()))
        return
    flags.guarded(lambda: _command(name)(argv[1:], f"{prog} {name}"))


def _command(name: str) -> Callable[[Sequence[str], str], None]:
    if name not in COMMANDS:
        raise InputError(f"there is no command dmd clipgen {name!r}: choose one of {', '.join(COMMANDS)}")
    return COMMANDS[name][0]


# ----------------------------------------------------------------------------- training


def parse(argv: Sequence[str], prog: str, description: str) -> flags.Command[Config]:
    """Flags over a preset (the first argument, or `shapes`), see `flags.over_preset`."""
    return flags.over_preset(argv, prog, description, PRESETS, preset, check)


def train(argv: Sequence[str], prog: str) -> None:
    """Everything that is missing, up to the report."""
    command = parse(argv, prog, "CLIP-GEN from images to a model: small CLIP, tokenizer, transformer, evaluation.")
    if command.dry_run:
        return flags.show(command.config)
    from dmd.clipgen.chain import Chain

    directory.run(Chain.whole, RUNS, command.config, command.fresh)


def teach_tokenizer(argv: Sequence[str], prog: str) -> None:
    """Teach a tokenizer and say where it is."""
    _one_stage(argv, prog, "Teach the image tokenizer on images without captions.", "tokenizer")


def teach_clip(argv: Sequence[str], prog: str) -> None:
    """Teach a small CLIP and say where it is."""
    _one_stage(argv, prog, "Teach a small CLIP on captioned images.", "clip")


def _one_stage(argv: Sequence[str], prog: str, description: str, stage: str) -> None:
    command = parse(argv, prog, description)
    config = command.config
    if command.dry_run:
        return flags.show(config)
    if {"tokenizer": config.tokenizer.tokenizer, "clip": config.clip.clip}[stage] is not None:
        raise InputError(f"--{stage} is given, and this command makes one: leave it out")
    from dmd import build
    from dmd.clipgen.chain import Chain
    from dmd.run import Stopped

    place = build.start(config.run)
    chain = place.together(lambda: Chain(config, place, Path(config.run.output_dir)))
    try:
        folder = chain.teach_clip() if stage == "clip" else chain.teach_tokenizer()
    except Stopped as stopped:
        return print(stopped) if place.main else None
    if place.main:
        print(f"{stage}: {folder}")


# ----------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class EvaluateOptions:
    """Judge a run's model again, and renew its summary and report."""

    evaluation: EvaluationOptions
    sampling: SamplingOptions
    cpu: bool = False
    """Use the CPU though there is a GPU."""


def evaluate(argv: Sequence[str], prog: str) -> None:
    """Figures of a run's model, by options that start from the run's own."""
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    config = read(Path(name) / "config.json") if name else Config()
    kind: Any = tyro.conf.OmitArgPrefixes[EvaluateOptions]
    default = EvaluateOptions(config.evaluation, config.sampling, config.run.cpu)
    o = flags.read(kind, argv[1:] if name else argv, f"{prog} RUN", default=default)
    if not name:
        raise InputError("which run? Give its directory first, as in dmd clipgen evaluate runs/clipgen-shapes")
    centre_prompts = config.evaluation.centre_prompts
    config = replace(config, evaluation=o.evaluation, sampling=o.sampling, run=replace(config.run, cpu=o.cpu))
    check(config)
    from dmd import build
    from dmd.clipgen import chain, model

    place = build.start(config.run)
    trained = model.load(Path(name) / chain.MODEL, place.device)
    if trained.gap.text_mean is None or o.evaluation.centre_prompts != centre_prompts:
        trained = chain.with_texts(config, trained)
    chain.conclude(config, trained, Path(name), {})


# ----------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class SampleOptions:
    """Make images: one for each prompt, or image, and seed."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Prompts, each in quotes."""
    image: tuple[str, ...] = ()
    """Files of images, to make others of what they show."""
    model: str = "runs/clipgen-shapes/model"
    """Folder of a model."""
    tokenizer: str | None = None
    """Folder of its tokenizer, if that does not lie in the model's."""
    clip: str | None = None
    """Its CLIP, named as in training, if it is no longer where the model was trained with it."""
    centre_prompts: str | None = None
    """File of captions whose mean is taken from text embeddings, for a CLIP that brings no mean along."""
    seeds: str = "0-7"
    """Seeds, as in "0-7" or "1,5,9". A seed makes the same image whatever is sampled with it."""
    out: str = "out"
    """Folder for the PNGs."""
    grid: bool = True
    """Also write grid.png: a row per prompt."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; "auto" takes a GPU where there is one."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)


def sample(argv: Sequence[str], prog: str) -> None:
    """Write PNGs and print images per second."""
    kind: Any = tyro.conf.OmitArgPrefixes[SampleOptions]
    o: SampleOptions = flags.read(kind, argv, prog)
    check(replace(Config(), sampling=o.sampling))
    seeds = parse_seeds(o.seeds)
    asked = [*o.what, *o.image]
    if not asked:
        raise InputError("what should the images show? Give a prompt in quotes, or --image FILE")
    import torch

    from dmd.clipgen import images, model
    from dmd.clipgen.chain import make_sampler
    from dmd.data import prompts
    from dmd.data.images import to_float, to_uint8
    from dmd.evaluation import save_grid
    from dmd.log import progress

    device = find_device(o.device)
    found = model.load(o.model, device, o.tokenizer, o.clip)
    if o.centre_prompts is not None:
        found = found.with_texts(prompts.read(o.centre_prompts).texts)
    conditions, targets = [], []
    if o.what:
        targets.append(model.embed_texts(found.clip, o.what))
        conditions.append(found.text_conditions(targets[-1].to(device)))
    if o.image:
        size = found.tokenizer.config.size
        pictures = torch.cat([images.read_one(Path(file), size) for file in o.image])
        targets.append(model.embed_images(found.clip, to_float(pictures), device))
        conditions.append(found.gap.image(targets[-1].to(device)))
    rows = torch.arange(len(asked)).repeat_interleave(len(seeds))
    with progress(len(rows) * o.sampling.candidates, 0, "sample", True, "img") as bar:
        started = time.perf_counter()
        x = found.images(
            torch.cat(conditions)[rows.to(device)], torch.cat(targets)[rows], torch.tensor(seeds).repeat(len(asked)),
            make_sampler(o.sampling), o.sampling.candidates, o.sampling.sample_batch_size, bar.update,
        )  # fmt: skip
        rate = len(x) / (time.perf_counter() - started)
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    for image, row, seed in zip(x, rows.tolist(), seeds * len(asked), strict=True):
        name = asked[row] if row < len(o.what) else Path(asked[row]).stem
        save_png(
            to_uint8(image), out / f"{row:03d}-{slug(name)}-seed-{seed}.png", {"prompt": asked[row], "seed": str(seed)}
        )
    if o.grid:
        save_grid(list(x.split(len(seeds))), out / "grid.png", max(1, 64 // x.shape[-1]), asked)
    print(f"{len(x)} images in {out}, {rate:.3g} images per second on {device.type}")


COMMANDS: dict[str, tuple[Callable[[Sequence[str], str], None], str]] = {
    "train": (train, "everything: small CLIP, tokenizer, transformer, evaluation, report; each stage resumes"),
    "teach-tokenizer": (teach_tokenizer, "the image tokenizer alone"),
    "teach-clip": (teach_clip, "a small CLIP on captioned images alone"),
    "sample": (sample, "images from texts or images"),
    "evaluate": (evaluate, "a run's figures again, with other sampling or more images"),
}
