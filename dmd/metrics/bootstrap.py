"""How much a figure would differ with other samples of the same kind: the bootstrap (Efron 1979).

A figure is a function of weights, which say how often each sample counts. A resample draws N of N samples with
replacement. The interval is the figure plus and minus 1.96 standard deviations over resamples, not their quantiles:
a Fréchet distance is biased upwards by few samples, and repeating some biases a resample further, so that its quantiles
would lie above the figure. The interval tells the noise of the samples at their count, not that bias.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from dmd import seeding
from dmd.seeding import Stream

NORMAL_95 = 1.959964
"""A normal variable lies within so many standard deviations with a probability of 95 %."""

Statistic = Callable[[Tensor], float]
"""Weights (N,) that sum to N to a figure; NaN where a resample has none, which then does not count."""


def weights(seed: int, resample: int, count: int) -> Tensor:
    """How often a resample draws each of `count` samples: float64 (N,), summing to N."""
    drawn = seeding.integers(seed, Stream.RESAMPLE, resample, torch.arange(count), count)
    return drawn.bincount(minlength=count).double()


def deviation(statistic: Statistic, count: int, resamples: int, seed: int = 0, title: str = "bootstrap") -> float:
    """The standard deviation of a figure of `count` samples over resamples.

    Raises:
        ValueError: fewer than 2 resamples.
    """
    if resamples < 2:
        raise ValueError(f"{resamples} resamples have no standard deviation: at least 2 are needed")
    numbers = tqdm(range(resamples), desc=title, unit="resample", delay=2, leave=False)
    found = torch.tensor([statistic(weights(seed, n, count)) for n in numbers], dtype=torch.float64)
    return found[found.isfinite()].std().item()


def interval(
    value: float,
    statistic: Statistic,
    count: int,
    resamples: int,
    seed: int = 0,
    title: str = "bootstrap",
    within: tuple[float, float] = (-float("inf"), float("inf")),
) -> tuple[float, float]:
    """The 95 % interval around a figure, cut to the range that it can have."""
    half = NORMAL_95 * deviation(statistic, count, resamples, seed, title)
    return max(within[0], value - half), min(within[1], value + half)


def mean_of(values: Tensor) -> Statistic:
    """The weighted mean of one number (N,) per sample."""
    numbers = values.double()
    return lambda w: (w @ numbers / w.sum()).item()
