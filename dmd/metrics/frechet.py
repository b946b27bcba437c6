"""The Fréchet distance between Gaussians fitted to two sets of features.

Heusel et al. 2017, arXiv 1706.08500, eq. 6; the closed form is by Dowson and Landau 1982.

It is called FID only with Inception-v3 features; with other networks it bears their name (FD-ResNet56, ...).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (D,) and covariance (D, D) of `count` feature vectors, both float64."""

    mean: Tensor
    cov: Tensor
    count: int


def moments(features: Tensor) -> Moments:
    """Mean and unbiased covariance of features (N, D), computed in float64.

    Raises:
        ValueError: not two-dimensional, N < 2, or a number is NaN or infinite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have shape {tuple(features.shape)}: (N, D) with at least 2 rows is needed")
    finite = features.isfinite().all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"features of sample {row} are not finite: they must be free of NaN and infinity")
    x = features.double()
    mean = x.mean(0)
    return Moments(mean, (x - mean).T @ (x - mean) / (len(x) - 1), len(x))


PRECISION = 1e-8
"""Relative error that the faster of two ways to a distance may have."""


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(Sa + Sb - 2 (Sa^1/2 Sb Sa^1/2)^1/2), at least 0.

    With Sa = A A' and Sb = B B' the last trace is the sum of the singular values of A'B. Unlike square roots
    of the product's eigenvalues, these keep full precision for singular covariances (N <= D). Where that precision is
    not needed, for covariances far from singular, eigenvalues give the sum in half the time.

    Raises:
        ValueError: the features have different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features have {len(a.mean)} and {len(b.mean)} dimensions: both sets must come from one network"
        )
    left, right = _factor(a.cov), _factor(b.cov)
    product, rest = left.T @ right, (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()
    if _is_even(left) and _is_even(right):
        cross, error = _by_gram(product)
        if 2 * error <= PRECISION * (rest - 2 * cross):
            return (rest - 2 * cross).item()
    return max(0.0, (rest - 2 * torch.linalg.svdvals(product).sum()).item())


def resampled_distance(reference: Moments, features: Tensor) -> Callable[[Tensor], float]:
    """The distance of a weighted set of features from a reference, prepared for many weightings.

    With the reference's covariance F F', the last trace is the sum of the singular values of what the centred features
    are in F's directions, so that a weighting costs one decomposition, of the smaller of N and D.

    Args:
        reference: of the set that is measured against.
        features: (N, D).

    Returns:
        Weights (N,), which sum to N and say how often each sample counts, to the distance (`frechet_distance`).
    """
    x = features.double()
    factor = _factor(reference.cov)
    projected = x @ factor

    def distance(weights: Tensor) -> float:
        w = weights.double() / len(x)
        mean = w @ x
        root = (weights.double() / (len(x) - 1)).sqrt()[:, None]
        spread = (root * (x - mean)).square().sum()
        rows = root * (projected - w @ projected)
        gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
        cross = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        return max(0.0, ((reference.mean - mean).square().sum() + reference.cov.trace() + spread - 2 * cross).item())

    return distance


def _is_even(factor: Tensor) -> bool:
    """Whether it is Cholesky's with pivots so alike that `_by_gram` is worth trying."""
    if factor.shape[0] != factor.shape[1]:
        return False
    pivots = factor.diagonal()
    return bool((pivots > 1e-2 * pivots.max()).all())


def _by_gram(product: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the singular values from eigenvalues of the Gram matrix, and an estimate of its error from above:
    every eigenvalue has a rounding of the largest's size, which small singular values feel."""
    values = torch.linalg.eigvalsh(product.T @ product)
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]
    low, exact, high = ((values + shift).clamp(min=0).sqrt().sum() for shift in (-rounding, 0, rounding))
    return exact, high - low


def _factor(cov: Tensor) -> Tensor:
    """F (D, rank) with cov = F F' for a symmetric positive semi-definite matrix.

    Cholesky's where no pivot is near rounding, in a tenth of the time; else from eigenvalues, without those that are.
    """
    rounding = len(cov) * torch.finfo(cov.dtype).eps
    lower, failed = torch.linalg.cholesky_ex(cov)
    if not failed and lower.diagonal().min().square() > 1000 * rounding * cov.diagonal().max():
        return lower
    values, vectors = torch.linalg.eigh(cov)
    # Eigenvalues below the rounding error of eigh are noise around zero, of either sign.
    keep = values > values[-1] * rounding
    return vectors[:, keep] * values[keep].sqrt()
