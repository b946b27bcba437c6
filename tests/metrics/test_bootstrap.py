"""The bootstrap against the deviations and coverage that statistics knows."""

import math

import pytest
import torch

from dmd.metrics.bootstrap import deviation, interval, mean_of, weights


def sample(seed, count=200):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_resample_draws_as_many_and_each_about_once():
    total = sum(weights(0, n, 50) for n in range(400))
    assert weights(0, 3, 50).sum() == 50
    assert torch.equal(weights(0, 3, 50), weights(0, 3, 50))
    assert not torch.equal(weights(0, 3, 50), weights(0, 4, 50))
    assert not torch.equal(weights(0, 3, 50), weights(1, 3, 50))
    assert (total / 400 - 1).abs().max() < 5 * math.sqrt(1 / 400)  # each count is about Poisson(1)


def test_the_deviation_of_a_mean_is_known():
    x = sample(0)
    expected = x.std(correction=0).item() / math.sqrt(len(x))
    assert deviation(mean_of(x), len(x), 2000) == pytest.approx(expected, rel=0.06)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    covered = 0
    for seed in range(200):
        x = sample(seed, 60)
        low, high = interval(x.mean().item(), mean_of(x), 60, 60, seed)
        covered += low <= 0 <= high
    assert 0.88 < covered / 200 <= 0.99


def test_intervals_are_cut_to_what_is_possible():
    hits = torch.tensor([1.0] * 49 + [0.0])
    low, high = interval(0.98, mean_of(hits), 50, 100, within=(0.0, 1.0))
    assert 0.9 < low < 0.98 and high == 1.0


def test_resamples_without_a_figure_do_not_count():
    x = sample(1)

    def sometimes(w):
        return float("nan") if w[0] == 0 else mean_of(x)(w)

    assert deviation(sometimes, len(x), 500) == pytest.approx(deviation(mean_of(x), len(x), 500), rel=0.2)


def test_one_resample_is_too_few():
    with pytest.raises(ValueError, match="1 resamples"):
        deviation(mean_of(sample(0)), 200, 1)
