"""The exact denoiser against autograd, torch.distributions and brute-force integration."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from dmd.denoiser import score
from dmd.mixture import MixtureDenoiser
from dmd.noise import DDPM, Karras


def diffused(mixture, t):
    """p_t as torch.distributions has it, at one time."""
    alpha, sigma = (float(v) for v in mixture.schedule(torch.tensor(t)))
    std = torch.full_like(mixture.means, math.sqrt((alpha * mixture.std) ** 2 + sigma**2))
    return MixtureSameFamily(Categorical(mixture.log_weights.exp()), Independent(Normal(alpha * mixture.means, std), 1))


def at_times(mixture, rng, n=64):
    """Points of p_t at n times, float64."""
    t = torch.linspace(0.02, 1.0, n)
    x0 = mixture.draw(torch.rand(n, generator=rng), torch.randn(n, 2, generator=rng, dtype=torch.float64))
    return mixture.schedule.diffuse(x0, torch.randn(n, 2, generator=rng, dtype=torch.float64), t), t


@pytest.mark.parametrize("t", [0.02, 0.5, 1.0])
def test_density_is_that_of_torch_distributions(schedule, ring, rng, t):
    mixture = ring(schedule)
    x_t = diffused(mixture, t).sample((64,))
    got = mixture.log_prob(x_t, torch.full((64,), t))
    torch.testing.assert_close(got, diffused(mixture, t).log_prob(x_t), rtol=1e-10, atol=1e-10)


def test_posterior_mean_is_tweedies(schedule, ring, rng):
    """(x_t + sigma^2 grad log p_t) / alpha, and `score` gives that gradient back."""
    mixture = ring(schedule)
    x_t, t = at_times(mixture, rng)
    x_t.requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob(x_t, t).sum(), x_t)
    alpha, sigma = (v[:, None].double() for v in schedule(t))
    x_t = x_t.detach()
    x0 = mixture(x_t, t, {})
    # multiplied by alpha, which is 0 at the end of the straight line
    torch.testing.assert_close(alpha * x0, x_t + sigma**2 * gradient, rtol=0, atol=1e-12 * float(x_t.abs().max()))
    error = (score(x_t, x0, t, schedule) - gradient).abs()
    assert bool((error <= 2e-7 * (x_t.abs() / sigma**2 + gradient.abs())).all())  # `score` squares a float32 sigma


@pytest.mark.parametrize("t", [0.1, 0.4, 0.7, 1.0])
def test_posterior_mean_is_the_integral_over_all_clean_samples(schedule, t):
    """E[x0 | x_t] = int x0 p(x_t | x0) p(x0) / int p(x_t | x0) p(x0), on a grid of x0, in one dimension."""
    means, std, weights = [-1.0, 0.2, 1.5], 0.25, [1.0, 3.0, 2.0]
    mixture = MixtureDenoiser(schedule, torch.tensor(means, dtype=torch.float64)[:, None], std, torch.tensor(weights))
    alpha, sigma = (float(v) for v in schedule(torch.tensor(t)))
    grid = np.linspace(-4, 5, 90_001)
    prior = sum(w * np.exp(-0.5 * ((grid - m) / std) ** 2) for m, w in zip(means, weights, strict=True))
    points = alpha * np.array([-1.4, -0.3, 0.4, 1.6]) + sigma * np.array([0.5, -1.0, 0.1, 2.0])
    expected = []
    for point in points:
        exponent = -0.5 * ((point - alpha * grid) / sigma) ** 2
        posterior = prior * np.exp(exponent - exponent.max())
        expected.append((grid * posterior).sum() / posterior.sum())
    got = mixture(torch.from_numpy(points)[:, None], torch.full((4,), t), {})[:, 0]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-7, atol=1e-7)


def test_only_the_ratio_of_sigma_to_alpha_matters(ring, rng):
    """The same observation, x_t / alpha at equal sigma / alpha, has the same mean under DDPM and Karras."""
    t = torch.linspace(0.05, 0.95, 32)
    alpha, sigma = DDPM()(t)
    karras_t = Karras(sigma_max=200.0).inverse(sigma / alpha)
    x_t = torch.randn(32, 2, generator=rng, dtype=torch.float64)
    ours = ring(DDPM())(alpha[:, None] * x_t, t, {})
    theirs = ring(Karras(sigma_max=200.0))(x_t, karras_t, {})
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # the inverse is float32


def test_far_points_have_finite_means(schedule, ring):
    """No component explains them: only a sum in the log domain stays finite."""
    x_t = torch.tensor([[1e4, -1e4], [-1e4, 0.0]], dtype=torch.float64)
    t = torch.full((2,), 0.02)
    mixture = ring(schedule, std=0.01)
    assert bool(torch.isfinite(mixture(x_t, t, {})).all() and torch.isfinite(mixture.log_prob(x_t, t)).all())


def test_draws_have_the_components_shares(ring):
    """Components are far apart at a small std, so the nearest mean tells who made a draw."""
    mixture, n = ring(Karras(), std=0.02), 36_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    x0 = mixture.draw(uniform, torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    distance, nearest = torch.cdist(x0, mixture.means).min(1)
    assert torch.bincount(nearest).tolist() == [1000 * k for k in range(1, 9)]
    assert float((distance**2).mean()) == pytest.approx(2 * 0.02**2, rel=0.02)


def test_draws_at_the_ends_of_the_unit_interval_are_valid(ring):
    """0 is the first component, also where weights are equal and sums land on the boundary."""
    mixture = MixtureDenoiser(Karras(), torch.tensor([[0.0], [1.0], [2.0], [3.0]]), 0.0)
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2.0**-24])
    assert mixture.draw(uniform, torch.zeros(5, 1)).flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 3.0]
