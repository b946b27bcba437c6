"""`dmd captions`: captions by templates or by a language model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from dmd.captions.mixture import Mixture
from dmd.cli.flags import guarded, read
from dmd.errors import InputError

if TYPE_CHECKING:
    from dmd.captions.grammar import Draw

BATCH = 5000  # attempts by templates between two savings


@dataclass(frozen=True)
class CaptionOptions:
    """Make captions: by templates, or by a language model (--llm). The same command goes on where it was stopped."""

    out: str = "captions.jsonl"
    """The file, .jsonl: id, caption, concept, template."""
    count: int = 10_000
    """How many different captions."""
    world: Literal["natural", "shapes", "digits"] = "natural"
    """What they are about: the concepts of --concepts, or those of the small worlds."""
    concepts: str | None = None
    """Own concepts: .txt (one a line) or .json (docs/dataset.md); lists that ship if left out."""
    mixture: tyro.conf.OmitArgPrefixes[Mixture] = field(default_factory=Mixture)
    llm: str | None = None
    """Folder or hub id of a causal language model that writes the captions from three examples."""
    llm_precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the language model's weights."""
    batch_size: int = 32
    """Captions at a time by the language model."""
    device: str = "auto"
    """Of the language model."""
    seed: int = 0
    """Another seed makes other captions."""
    fresh: bool = False
    """Delete what --out holds and start over."""


def main(argv: Sequence[str], prog: str = "dmd captions") -> None:
    guarded(lambda: captions(read(CaptionOptions, argv, prog)))


def captions(options: CaptionOptions) -> None:
    """Write the file and say what is in it. Raises InputError as `dmd.captions.store.write`."""
    if options.count < 1 or options.batch_size < 1:
        raise InputError(f"--count is {options.count} and --batch-size {options.batch_size}: both must be at least 1")
    if not 0 <= options.seed < 2**64:
        raise InputError(f"--seed is {options.seed}: it must be at least 0 and below 2**64")
    if options.world != "natural" and (options.llm or options.concepts):
        raise InputError(f"--world {options.world} has captions of its own: leave out --llm and --concepts")
    from dmd.captions import store
    from dmd.log import progress

    draw, spec, batch = _drawer(options)
    out = Path(options.out)
    if options.fresh and out.suffix == ".jsonl":
        store.remove(out)
    with progress(options.count, 0, "captions", True, "caption") as bar:
        done = store.write(out, spec, options.count, draw, batch, bar.update)
    print(f"{out}: {store.summary(done)}")


def _drawer(options: CaptionOptions) -> tuple["Draw", dict[str, Any], int]:
    """What makes the captions, what determines them, and how many attempts go between two savings."""
    from dmd.captions import concepts, grammar

    spec: dict[str, Any] = {"world": options.world, "seed": options.seed}
    if options.world == "digits":
        return grammar.of_names(grammar.DIGITS), spec, len(grammar.DIGITS)
    if options.world == "shapes":
        return grammar.of_shapes(options.seed), spec, BATCH
    found = concepts.shipped() if options.concepts is None else concepts.read(options.concepts)
    spec |= {"concepts": found.digest(), "mixture": vars(options.mixture), "llm": None}
    if options.llm is None:
        return grammar.templates(found, options.mixture, options.seed), spec, BATCH
    import torch

    from dmd import checkpoint
    from dmd.captions import language
    from dmd.cli.sample import find_device

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.llm_precision]
    model = language.LanguageModel(options.llm, find_device(options.device), dtype)
    spec["llm"] = {"weights": checkpoint.digest(model.model), "precision": options.llm_precision}
    return language.captions(model, found, options.mixture, options.seed), spec, options.batch_size
