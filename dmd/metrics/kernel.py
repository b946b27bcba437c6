"""The kernel distance of two sets of features: squared maximum mean discrepancy with the kernel (x.y / D + 1)^3.

Binkowski et al. 2018, arXiv 1801.01401. On Inception-v3 features it is KID; on those of other networks it bears their
name. Unlike the Fréchet distance it is unbiased: it may be below 0, and few samples make it noisy, not too large.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dmd import seeding
from dmd.seeding import Stream


def kernel_distance(real: Tensor, fake: Tensor, seed: int = 0, subsets: int = 100, size: int = 1000) -> float:
    """The mean over random subsets, as clean-fid takes it; in float64.

    Args:
        real, fake: (N, D) and (M, D).
        seed: of the subsets. Where both sets have at most `size` samples, and equally many, all subsets are the same.
        subsets: how many.
        size: samples of each set in a subset, or those of the smaller set where they are fewer.

    Raises:
        ValueError: dimensions differ, or a set has fewer than 2 samples.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or min(len(real), len(fake)) < 2:
        raise ValueError(f"features have shapes {tuple(real.shape)} and {tuple(fake.shape)}: (N, D) and (M, D) needed")
    size = min(len(real), len(fake), size)
    if len(real) == len(fake) == size:
        subsets = 1
    real, fake = real.double(), fake.double()
    total = 0.0
    for number in range(subsets):
        x = real[_subset(seed, 2 * number, len(real), size)]
        y = fake[_subset(seed, 2 * number + 1, len(fake), size)]
        total += (_off_diagonal(x) + _off_diagonal(y) - 2 * _kernel(x, y).mean()).item()
    return total / subsets


def resampled_kernel_distance(real: Tensor, fake: Tensor) -> Callable[[Tensor], float]:
    """The distance of a weighted set of fakes (M, D) from all reals (N, D), prepared for many weightings.

    Returns:
        Weights (M,), which say how often each fake counts, to the distance. A fake is no pair with itself.
    """
    real, fake = real.double(), fake.double()
    own = _kernel(fake, fake).fill_diagonal_(0.0)
    across = _kernel(fake, real).mean(1)
    constant = _off_diagonal(real)

    def distance(weights: Tensor) -> float:
        w = weights.double()
        pairs = w.sum().square() - w.square().sum()
        return (constant + w @ own @ w / pairs - 2 * (w @ across) / w.sum()).item()

    return distance


def _subset(seed: int, number: int, count: int, size: int) -> Tensor:
    """`size` of `count` indices, without repetition."""
    return seeding.uniform(seed, Stream.SUBSET, number, torch.arange(count)).argsort()[:size]


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal(x: Tensor) -> Tensor:
    """Mean kernel of all ordered pairs of two samples."""
    kernel = _kernel(x, x)
    return (kernel.sum() - kernel.diagonal().sum()) / (len(x) * (len(x) - 1))
