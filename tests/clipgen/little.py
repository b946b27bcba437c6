"""Networks of a few thousand weights, for tests of CLIP-GEN."""

import torch

from dmd.clipgen.networks import ConvSizes
from dmd.clipgen.tokenizer import Tokenizer, TokenizerConfig
from dmd.clipgen.transformer import ConditionalTransformer, TransformerConfig
from dmd.run import Cadence, Run

SIZES = ConvSizes(4, (16, 32), 1)
CONFIG = TokenizerConfig(16, SIZES, codes=16, code_width=4, dead_below=0.5)
SHAPE = TransformerConfig(codes=11, code_width=4, length=9, condition=6, layers=2, width=16, heads=2)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def tokenizer(config=CONFIG):
    """A tokenizer whose codes have been chosen from some images, in evaluation mode."""
    net = seeded(lambda: Tokenizer(config))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        net.train()(torch.randn(32, 3, config.size, config.size))
    return net.eval()


def transformer(config=SHAPE):
    """With codes that stand for nothing."""
    codebook = torch.nn.functional.normalize(seeded(lambda: torch.randn(config.codes, config.code_width)), dim=-1)
    return seeded(lambda: ConditionalTransformer(config, codebook)).eval()


def run(folder, task, batches, steps, accelerator, checkpoint=0):
    """Train to a step; a later call with more steps goes on."""
    return Run(folder, task, batches, Cadence(steps, 1, checkpoint), accelerator).train()


def states(task):
    """All tensors of a task, by module and name."""
    return {f"{m}.{k}": v for m, net in task.modules().items() for k, v in net.state_dict().items()}
