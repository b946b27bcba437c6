"""Contrastive batches that are larger than memory: features first, their gradients next, then chunk by chunk again.

GradCache (Gao et al. 2021, arXiv 2101.06983). A contrastive loss needs all features at once but not all activations:
features are computed without a graph, the loss gives their gradients, and each chunk is computed again to pass its part
of them on. The gradient is that of the whole batch for networks whose samples do not see each other; batch
normalisation sees a chunk at a time.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn


def cached(
    compute: Callable[[int], Sequence[Tensor]], chunks: int, net: nn.Module
) -> tuple[list[Tensor], Callable[[], None]]:
    """What a network makes of all chunks, and what is to be called after the loss's backward pass.

    Args:
        compute: number of a chunk to its outputs, the same both times; along their first axis chunks are joined. A
            single chunk is computed once, with its graph.
        chunks: how many there are.
        net: whose running statistics only the second pass moves.
    """
    if chunks == 1:
        return list(compute(0)), lambda: None
    rows: list[Sequence[Tensor]] = []
    with torch.no_grad(), _statistics_kept(net):
        for i in range(chunks):
            rows.append(compute(i))
    leaves = [torch.cat(column).float().requires_grad_() for column in zip(*rows, strict=True)]
    sizes = [[len(x) for x in column] for column in zip(*rows, strict=True)]

    def backward() -> None:
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        parts = zip(*(g.split(s) for g, s in zip(gradients, sizes, strict=True)), strict=True)
        for i, part in enumerate(parts):
            again = compute(i)
            torch.autograd.backward(list(again), [g.to(x.dtype) for g, x in zip(part, again, strict=True)])

    return leaves, backward


@contextlib.contextmanager
def _statistics_kept(net: nn.Module) -> Iterator[None]:
    """Within it, batch normalisations do not move their running statistics."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    rates = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, rate in zip(norms, rates, strict=True):
            m.momentum = rate
