"""The whole method against mathematics: a student of a score that is known exactly covers all eight modes."""

import math

import pytest
import torch

from benchmarks.ring import FAMILIES, distil, draw, mmd, ring


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_student_of_the_exact_score_covers_every_mode(name):
    found = distil(name, steps=4500, batch=256, count=8192)
    assert found["share_min"] > 0.85 and found["share_max"] < 1.15
    assert found["within_4_std"] >= 0.97
    assert found["mmd"] < found["mmd_untrained"] / 10


def test_discrepancy_of_a_known_shift():
    """Two points at distance d: MMD^2 = 2 - 2 mean over widths of exp(-d^2 / 2w^2)."""
    a, b = torch.zeros(1, 2), torch.tensor([[0.3, 0.4]])
    kernel = sum(math.exp(-0.25 / (2 * w**2)) for w in (0.05, 0.1, 0.2, 0.4, 0.8)) / 5
    assert mmd(a, b) == pytest.approx(math.sqrt(2 - 2 * kernel), rel=1e-5)
    assert mmd(a, a) == 0.0


def test_the_ring_has_unit_variance_and_equal_modes():
    real = ring(FAMILIES["karras"][0])
    x = draw(real, 80_000, 0)
    assert x.var(0).tolist() == pytest.approx([1.01, 1.01], rel=0.02)  # radius^2 / 2 + std^2
    counts = (x[:, None] - real.means).norm(dim=-1).argmin(1).bincount(minlength=8)
    assert counts.tolist() == pytest.approx([10_000] * 8, rel=0.05)
