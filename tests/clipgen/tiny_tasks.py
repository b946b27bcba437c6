"""A few steps of CLIP-GEN's tasks on random data, for tests; as a program, each by its processes."""

import sys
from pathlib import Path

import little
import torch
from accelerate import Accelerator

from dmd.batches import Share
from dmd.clipgen.batches import ImageBatches, TokenBatches
from dmd.clipgen.gap import Gap
from dmd.clipgen.networks import PatchDiscriminator
from dmd.clipgen.tokenizer import Adversary, Tokenizer, TokenizerConfig, Tokenizing
from dmd.clipgen.transformer import Modelling
from dmd.ema import Ema
from dmd.run import clip_and_check

STEPS, BATCH = 4, 8
DEAD = 3.0
"""Features of a batch below which a code is replaced: 128 features are shared by 32 codes."""


def adam(net):
    """Near to plain descent, so that rounding stays what it is."""
    return torch.optim.AdamW(net.parameters(), lr=1e-2, eps=0.1)


def tokenizing(share):
    """With a discriminator from the second step on, codes chosen from the first batch, and some replaced."""
    images = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    config = TokenizerConfig(16, little.SIZES, codes=32, code_width=4, decay=0.8, dead_below=DEAD)
    net, judge = little.seeded(lambda: Tokenizer(config)), little.seeded(lambda: PatchDiscriminator(8, 2))
    task = Tokenizing(
        net, adam(net), lambda a, b: (a - b).square().flatten(1).mean(1), 1.0, Adversary(judge, adam(judge), 0.8, 1),
        1.0, clip_and_check, seed=5,
    )  # fmt: skip
    return _trained(task, ImageBatches(5, images, BATCH, share))


def modelling(share):
    """With the embedding loss, noise on the conditions and some of them left out."""
    draw = torch.Generator().manual_seed(1)
    c = little.SHAPE
    tokens = torch.randint(0, c.codes, (24, c.length), generator=draw)
    embeddings = torch.nn.functional.normalize(torch.randn(24, c.condition, generator=draw), dim=-1)
    codes = torch.randn(c.codes, c.condition, generator=draw)
    net = little.transformer(c)
    task = Modelling(
        net, {"net": adam(net)}, Ema(net, 0.9), 0.5, lambda mixture: (mixture @ codes).mean(1), 1.0, clip_and_check, 5,
        share.rank,
    )  # fmt: skip
    gap = Gap(embeddings.mean(0), None, 0.3)
    return _trained(task, TokenBatches(5, tokens, embeddings, gap, BATCH, share, 0.25))


TASKS = {"tokenizing": tokenizing, "modelling": modelling}


def _trained(task, batches):
    """All weights and codes after some steps, the first ones, and the figures that are the same in all processes."""
    first = {k: v.clone() for k, v in little.states(task).items()}
    figures = [{k: v for k, v in task.step(k, batches(k)).items() if k.startswith(("grad", "health"))}
               for k in range(STEPS)]  # fmt: skip
    return {"first": first, "last": little.states(task), "figures": figures}


def main(folder):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    share = Share(accelerator.process_index, accelerator.num_processes)
    for name, make in TASKS.items():
        torch.save(make(share), folder / f"{name}-{share.rank}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
