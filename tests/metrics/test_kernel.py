"""The kernel distance against clean-fid's own, loops over pairs, and distributions whose distance is known."""

import pytest
import torch

from dmd.metrics import kernel
from dmd.metrics.kernel import kernel_distance, resampled_kernel_distance


def normal(seed, count, dim, shift=0.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def naive(real, fake):
    """The unbiased estimate, pair by pair."""

    def k(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    def own(points):
        n = len(points)
        return sum(k(points[i], points[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    across = sum(k(x, y) for x in real for y in fake) / (len(real) * len(fake))
    return own(real) + own(fake) - 2 * across


def test_equals_a_naive_double_loop():
    real, fake = normal(0, 15, 4), normal(1, 15, 4, 0.5)
    assert kernel_distance(real, fake) == pytest.approx(naive(real, fake), rel=1e-10)


def test_equals_clean_fid_s_where_a_subset_is_everything():
    module = pytest.importorskip("cleanfid.fid")
    real, fake = normal(2, 200, 16), normal(3, 200, 16, 0.2)
    expected = module.kernel_distance(real.numpy(), fake.numpy(), num_subsets=2)
    assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-9)


def test_equals_clean_fid_s_over_subsets_but_for_their_choice():
    module = pytest.importorskip("cleanfid.fid")
    real, fake = normal(4, 500, 8), normal(5, 400, 8, 0.5)
    expected = module.kernel_distance(real.numpy(), fake.numpy(), num_subsets=200, max_subset_size=100)
    assert kernel_distance(real, fake, subsets=200, size=100) == pytest.approx(expected, rel=0.05)


def test_is_unbiased():
    """Of two sets of one distribution it is zero on average, unlike the Fréchet distance."""
    found = torch.tensor([kernel_distance(normal(2 * s, 20, 4), normal(2 * s + 1, 20, 4)) for s in range(300)])
    assert abs(found.mean()) < 4 * found.std() / 300**0.5
    assert (found < 0).any() and (found > 0).any()


def test_subsets_repeat_nothing_and_are_a_function_of_the_seed():
    chosen = kernel._subset(7, 3, 50, 30)
    assert len(chosen.unique()) == 30 and chosen.max() < 50
    real, fake = normal(6, 60, 4), normal(7, 50, 4, 0.3)
    found = [kernel_distance(real, fake, seed, subsets=5, size=20) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_a_weighted_set_leaves_out_pairs_of_a_sample_with_itself():
    real, fake = normal(8, 10, 3), normal(9, 6, 3, 0.4)
    weights = torch.tensor([2, 0, 1, 1, 2, 0])
    points = [(i, fake[i]) for i in range(6) for _ in range(int(weights[i]))]

    def k(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    pairs = [k(x, y) for a, (i, x) in enumerate(points) for b, (j, y) in enumerate(points) if i != j and a != b]
    own = sum(k(real[i], real[j]) for i in range(10) for j in range(10) if i != j) / 90
    across = sum(k(x, y) for _, x in points for y in real) / (len(points) * 10)
    expected = own + sum(pairs) / len(pairs) - 2 * across
    distance = resampled_kernel_distance(real, fake)
    assert distance(weights) == pytest.approx(expected, rel=1e-9)
    assert distance(torch.ones(6)) == pytest.approx(naive(real, fake), rel=1e-9)


@pytest.mark.parametrize(("real", "fake"), [(normal(0, 5, 3), normal(0, 5, 4)), (normal(0, 1, 3), normal(0, 5, 3))])
def test_wrong_shapes_are_named(real, fake):
    with pytest.raises(ValueError, match=r"\(N, D\) and \(M, D\) needed"):
        kernel_distance(real, fake)
