"""Fidelity and variety of samples, told apart: k-nearest-neighbour manifolds, and spread within a label.

Improved precision and recall: Kynkäänniemi et al. 2019, arXiv 1904.06991. Density and coverage: Naeem et al.
2020, arXiv 2002.09797. A sample's ball is closed and reaches to its k-th nearest neighbour in its own set.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # rows of a distance matrix held at a time: 40 MB in float64 against 5,000 columns


@dataclass(frozen=True)
class Manifold:
    """All in [0, 1], save density, which may exceed 1; higher is better.

    Attributes:
        precision: part of the fakes that lie in the ball of at least one real.
        recall: part of the reals that lie in the ball of at least one fake.
        density: number of real balls that a fake lies in, on average, divided by k.
        coverage: part of the reals whose own ball holds at least one fake.
    """

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True, eq=False)
class Members:
    """What `Manifold` is the mean of, sample by sample.

    Attributes:
        precise: bool (M,): the fake lies in the ball of at least one real.
        recalled: bool (N,): the real lies in the ball of at least one fake.
        dense: float64 (M,): number of real balls that the fake lies in, divided by k.
        covered: bool (N,): the real's own ball holds at least one fake.
    """

    precise: Tensor
    recalled: Tensor
    dense: Tensor
    covered: Tensor


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> Manifold:
    """The means of `members`, which see."""
    found = members(real, fake, k)
    return Manifold(
        precision=found.precise.double().mean().item(),
        recall=found.recalled.double().mean().item(),
        density=found.dense.mean().item(),
        coverage=found.covered.double().mean().item(),
    )


def members(real: Tensor, fake: Tensor, k: int = 3) -> Members:
    """Compare features of real (N, D) and fake (M, D) samples, in float64 and in chunks of `CHUNK` rows.

    Raises:
        ValueError: dimensions differ, or a set has not more than k samples.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features have shapes {tuple(real.shape)} and {tuple(fake.shape)}: (N, D) and (M, D) needed")
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k is {k} with {len(real)} real and {len(fake)} fake samples: both need more than k >= 1")
    real, fake = real.double(), fake.double()
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)
    hits = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    recalled, covered = [], []
    for rows, radius in zip(real.split(CHUNK), real_radius.split(CHUNK), strict=True):
        distance = torch.cdist(rows, fake)
        in_real = distance <= radius[:, None]
        hits += in_real.sum(0)
        covered.append(in_real.any(1))
        recalled.append((distance <= fake_radius).any(1))
    return Members(hits > 0, torch.cat(recalled), hits.double() / k, torch.cat(covered))


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance (N,) of each point to its k-th nearest other point."""
    # The nearest of all is the point itself, so k + 1 are looked at.
    return torch.cat([torch.cdist(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(CHUNK)])


def diversity(features: Tensor, groups: Tensor, weights: Tensor | None = None) -> float:
    """Mean cosine distance 1 - cos(f_i, f_j) over all unordered pairs i < j with groups[i] == groups[j].

    All pairs weigh the same, so a large group weighs more than a small one. In [0, 2], and 0 if the
    features of every group point the same way. A feature vector of zeros counts as orthogonal to all others.

    Args:
        features: (N, D).
        groups: (N,) integers, e.g. class labels or prompt numbers.
        weights: (N,) how often each sample counts; once, if left out. A pair weighs as the product, and a sample is no
            pair with itself, however often it counts.

    Raises:
        ValueError: counts differ, or no two samples share a group.
    """
    if len(features) != len(groups):
        raise ValueError(f"there are {len(features)} feature vectors but {len(groups)} groups: each needs one")
    unit = F.normalize(features.double(), dim=1)
    w = unit.new_ones(len(unit)) if weights is None else weights.double()
    names, index = groups.unique(return_inverse=True)
    # The pairs' cosines sum to (|sum u|^2 - sum |u|^2) / 2 in each group: no N x N matrix is needed.
    sums = unit.new_zeros(len(names), unit.shape[1]).index_add(0, index, w[:, None] * unit)
    counts = unit.new_zeros(len(names)).index_add(0, index, w)
    pairs = (counts.square().sum() - w.square().sum()) / 2
    if pairs <= 0:
        raise ValueError(f"no two of {len(groups)} samples share a group: at least one pair is needed")
    cosines = (sums.square().sum() - (w[:, None] * unit).square().sum()) / 2
    return (1.0 - cosines / pairs).item()
