"""Precision, recall, density, coverage and diversity against loops over every pair and cases by hand."""

import math

import pytest
import torch

from dmd.metrics import manifold
from dmd.metrics.manifold import diversity, members, precision_recall


def distance(a, b):
    return math.dist(a.tolist(), b.tolist())


def naive_radius(points, i, k):
    return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]


def naive(real, fake, k):
    """The definitions of both papers, pair by pair."""
    real_radius = [naive_radius(real, i, k) for i in range(len(real))]
    fake_radius = [naive_radius(fake, j, k) for j in range(len(fake))]
    hits = [[distance(x, y) <= r for y in fake] for x, r in zip(real, real_radius, strict=True)]
    precision = sum(any(row[j] for row in hits) for j in range(len(fake))) / len(fake)
    recall = sum(any(distance(x, y) <= r for y, r in zip(fake, fake_radius, strict=True)) for x in real)
    density = sum(map(sum, hits)) / (k * len(fake))
    coverage = sum(any(row) for row in hits) / len(real)
    return precision, recall / len(real), density, coverage


@pytest.mark.parametrize(("k", "chunk"), [(1, 1024), (3, 1024), (3, 7), (5, 1)])
def test_equals_a_naive_double_loop(monkeypatch, k, chunk):
    monkeypatch.setattr(manifold, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(k)
    real = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    fake = 0.7 * torch.randn(25, 3, generator=generator, dtype=torch.float64) + 0.5
    found = precision_recall(real, fake, k)
    expected = naive(real, fake, k)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected, rel=1e-6)
    assert 0 < found.precision < 1 or 0 < found.recall < 1  # the case is not a trivial one


def test_far_apart_sets_score_zero():
    points = torch.arange(10.0)[:, None]
    found = precision_recall(points, points + 1000)
    assert (found.precision, found.recall, found.density, found.coverage) == (0, 0, 0, 0)


def test_a_copy_scores_one():
    real = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    found = precision_recall(real, real.flip(0))
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)


def test_a_collapsed_generator_is_precise_but_does_not_recall():
    real = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    fake = real[:1] + 1e-4 * torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
    found = precision_recall(real, fake)
    assert found.precision == 1.0
    assert found.recall < 0.02
    assert found.coverage < 0.05


def test_duplicates_have_closed_balls_of_radius_zero():
    same = torch.zeros(6, 2)
    assert precision_recall(same, same).precision == 1.0
    assert precision_recall(same, same + 1).precision == 0.0


def test_five_points_by_hand():
    # k = 1 on a line: radii of the reals 0, 1, 5 are 1, 1, 4; of the fakes 2, 9 they are 7, 7.
    real, fake = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[2.0], [9.0]])
    found = precision_recall(real, fake, k=1)
    assert found.precision == 1.0  # 2 is in the balls of 1 and 5, 9 is in that of 5
    assert found.density == 1.5
    assert found.recall == 1.0
    assert found.coverage == pytest.approx(2 / 3)  # the ball of 0 is empty


@pytest.mark.parametrize(
    ("real", "fake", "sentence"),
    [
        (torch.zeros(3, 2), torch.zeros(9, 2), "k is 3 with 3 real and 9 fake samples"),
        (torch.zeros(9, 2), torch.zeros(2, 2), "k is 3 with 9 real and 2 fake samples"),
        (torch.zeros(9, 2), torch.zeros(9, 3), r"shapes \(9, 2\) and \(9, 3\)"),
    ],
)
def test_bad_sets_are_named(real, fake, sentence):
    with pytest.raises(ValueError, match=sentence):
        precision_recall(real, fake)


def test_diversity_equals_a_loop_over_pairs():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, generator=generator)
    features[3] = 0  # orthogonal to all
    groups = torch.randint(0, 5, (30,), generator=generator) * 7
    pairs = [(i, j) for i in range(30) for j in range(i + 1, 30) if groups[i] == groups[j]]
    cosines = [torch.cosine_similarity(features[i], features[j], dim=0).item() for i, j in pairs]
    assert diversity(features, groups) == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-5)


def test_diversity_ignores_length_and_other_groups():
    same = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    assert diversity(same, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.0, abs=1e-12)
    assert diversity(same, torch.tensor([0, 1, 0, 1])) == pytest.approx(1.0)
    assert diversity(torch.tensor([[1.0], [-3.0]]), torch.tensor([4, 4])) == pytest.approx(2.0)


def test_diversity_needs_a_pair_and_equal_counts():
    with pytest.raises(ValueError, match="no two of 3 samples share a group"):
        diversity(torch.ones(3, 2), torch.arange(3))
    with pytest.raises(ValueError, match="3 feature vectors but 2 groups"):
        diversity(torch.ones(3, 2), torch.zeros(2))


def test_members_are_what_the_figures_are_means_of():
    generator = torch.Generator().manual_seed(4)
    real, fake = torch.randn(30, 3, generator=generator), 1.5 * torch.randn(20, 3, generator=generator)
    radius = [naive_radius(real, i, 3) for i in range(len(real))]
    hits = [[distance(x, y) <= r for y in fake] for x, r in zip(real, radius, strict=True)]
    found = members(real, fake, 3)
    assert found.precise.tolist() == [any(row[j] for row in hits) for j in range(len(fake))]
    assert found.dense.tolist() == pytest.approx([sum(row[j] for row in hits) / 3 for j in range(len(fake))])
    assert found.covered.tolist() == [any(row) for row in hits]


def test_weighted_diversity_leaves_out_pairs_of_a_sample_with_itself():
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    groups = torch.tensor([0, 1, 2] * 4)
    weights = torch.tensor([3, 0, 1, 1, 2, 0, 1, 1, 1, 0, 1, 1])
    total = number = 0.0
    for i in range(12):
        for j in range(i):
            if groups[i] == groups[j]:
                both = (weights[i] * weights[j]).item()
                total += both * (1 - torch.cosine_similarity(x[i], x[j], dim=0).item())
                number += both
    assert diversity(x, groups, weights) == pytest.approx(total / number, rel=1e-9)
    assert diversity(x, groups, torch.ones(12)) == pytest.approx(diversity(x, groups), rel=1e-12)
