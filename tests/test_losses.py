"""Losses against naive loops, hand-computed numbers, autograd, and the closed-form divergence of two Gaussians."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dmd.denoiser import NetworkDenoiser, epsilon, flow, karras, sample, score, velocity
from dmd.losses import denoising_loss, matching_gradient, normaliser, squared_distance, surrogate
from dmd.mixture import MixtureDenoiser
from dmd.noise import DDPM, Karras, Linear

SIGMA_DATA = 0.7


class Given(nn.Module):
    """A network that returns a fixed tensor."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x_t, t):
        return self.out


def test_normaliser_is_the_mean_absolute_error_of_each_sample(rng):
    x, x0_real = torch.randn(2, 5, 3, 2, 2, generator=rng)
    expected = []
    for a, b in zip(x.tolist(), x0_real.tolist(), strict=True):
        total = [abs(a[c][h][w] - b[c][h][w]) for c in range(3) for h in range(2) for w in range(2)]
        expected.append(sum(total) / len(total))
    got = normaliser(x, x0_real)
    np.testing.assert_allclose(got.flatten(), expected, rtol=1e-6)
    assert got.shape == (5, 1, 1, 1)


def test_a_sample_that_the_real_score_reproduces_divides_by_the_floor():
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    gradient = matching_gradient(x, torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[1.5, 2.0], [0.0, 4.0]]))
    torch.testing.assert_close(gradient, torch.tensor([[0.5e6, 0.0], [0.0, 0.0]]))


def test_matching_gradient_golden():
    """Sample 0: mean|x - real| = (1 + 3) / 2 = 2; sample 1: (0.5 + 0.5) / 2 = 0.5."""
    x = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    real = torch.tensor([[0.0, 2.0], [0.5, 1.5]])
    fake = torch.tensor([[4.0, 1.0], [0.5, 1.0]])
    assert matching_gradient(x, real, fake).tolist() == [[2.0, -0.5], [0.0, -1.0]]


def test_gradient_is_exactly_zero_when_fake_equals_real(schedule, ring, rng):
    x, noise = torch.randn(2, 64, 2, generator=rng, dtype=torch.float64)
    t = torch.linspace(0.02, 0.98, 64)
    x_t = schedule.diffuse(x, noise, t)
    gradient = matching_gradient(x, ring(schedule)(x_t, t, {}), ring(schedule)(x_t, t, {}))
    assert torch.equal(gradient, torch.zeros_like(x))


def test_gradient_is_the_weighted_score_difference(schedule, ring, rng):
    """w_t (s_fake - s_real) with w_t = sigma^2 / alpha / mean|x - x0_real| (DMD eq. 7 and 8, as in Algorithm 2)."""
    x, noise = torch.randn(2, 64, 2, generator=rng, dtype=torch.float64)
    t = torch.linspace(0.02, 0.98, 64)
    x_t = schedule.diffuse(x, noise, t)
    x0_real, x0_fake = ring(schedule)(x_t, t, {}), ring(schedule, std=0.5)(x_t, t, {})
    alpha, sigma = (v[:, None].double() for v in schedule(t))
    difference = score(x_t, x0_fake, t, schedule) - score(x_t, x0_real, t, schedule)
    expected = sigma**2 / alpha / (x - x0_real).abs().mean(1, keepdim=True) * difference
    got = matching_gradient(x, x0_real, x0_fake)
    # scores are built from float32 coefficients, and a score difference cancels x_t
    scale = (x_t / alpha).abs().amax(1, keepdim=True) / (x - x0_real).abs().mean(1, keepdim=True)
    assert bool(((got - expected).abs() <= 2e-7 * (scale + got.abs())).all())


def test_gradient_does_not_know_the_units_of_the_image(rng):
    """Each sample by a factor of its own: the gradient is dimensionless, so the other samples' scale has no say."""
    x, real, fake = torch.randn(3, 4, 3, 2, 2, generator=rng, dtype=torch.float64)
    factor = torch.tensor([1e-2, 1.0, 7.0, 300.0], dtype=torch.float64)[:, None, None, None]
    scaled = matching_gradient(factor * x, factor * real, factor * fake)
    torch.testing.assert_close(scaled, matching_gradient(x, real, fake), rtol=1e-12, atol=1e-12)


def test_gradient_of_a_sample_does_not_depend_on_its_batch(rng):
    x, real, fake = torch.randn(3, 6, 3, 4, 4, generator=rng)
    alone = torch.cat([matching_gradient(x[i : i + 1], real[i : i + 1], fake[i : i + 1]) for i in range(6)])
    assert torch.equal(alone, matching_gradient(x, real, fake))


def test_surrogate_has_the_given_gradient(rng):
    x, gradient = torch.randn(2, 3, 2, 4, generator=rng, dtype=torch.float64)
    x.requires_grad_()
    gradient.requires_grad_()
    loss = surrogate(x, gradient)
    through_x, through_gradient = torch.autograd.grad(loss, (x, gradient), allow_unused=True)
    torch.testing.assert_close(through_x, gradient / x.numel(), rtol=1e-12, atol=1e-12)
    assert through_gradient is None
    assert float(loss.detach()) == pytest.approx(float((gradient.detach() ** 2).mean() / 2))


PREDICTIONS = {
    "epsilon": epsilon, "velocity": velocity, "flow": flow, "sample": sample, "karras": karras(SIGMA_DATA),
}  # fmt: skip


def native_target(family, x_t, x0, noise, alpha, sigma):
    """What a network of this family is taught to say. EDM's, of x_t / alpha = x0 + s * noise, is from its table 1."""
    s = sigma / alpha
    c_skip, c_out = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2), s * SIGMA_DATA / (s**2 + SIGMA_DATA**2).sqrt()
    return {
        "epsilon": noise,
        "velocity": alpha * noise - sigma * x0,
        "flow": noise - x0,
        "sample": x0,
        "karras": (x0 - c_skip * x_t / alpha) / c_out,
    }[family]


@pytest.mark.parametrize("family", PREDICTIONS)
def test_denoising_loss_is_the_error_of_the_native_output(schedule, family, rng):
    """epsilon-, v-, flow-, x0-MSE and EDM's, each from the network's own output and target."""
    x0, noise, output = torch.randn(3, 64, 3, generator=rng, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 64)
    alpha, sigma = (v[:, None].double() for v in schedule(t))
    x_t = alpha * x0 + sigma * noise
    skip, out = PREDICTIONS[family](alpha, sigma)
    native = ((output - native_target(family, x_t, x0, noise, alpha, sigma)) ** 2).mean()
    torch.testing.assert_close(denoising_loss(skip * x_t + out * output, x0, out), native, rtol=1e-9, atol=0)


@pytest.mark.parametrize("family", PREDICTIONS)
def test_denoising_loss_of_a_float32_network_is_its_native_error(schedule, family, rng):
    """The same through `NetworkDenoiser`, in the precision of training."""
    x0, noise, output = torch.randn(3, 256, 3, generator=rng)
    t = torch.linspace(0.02, 0.98, 256)
    alpha, sigma = (v[:, None].double() for v in schedule(t))
    denoiser = NetworkDenoiser(Given(output), schedule, PREDICTIONS[family])
    x_t = schedule.diffuse(x0, noise, t)
    _, out = denoiser.coefficients(t, x_t)
    got = denoising_loss(denoiser(x_t, t, {}), x0, out)
    x0, noise = x0.double(), noise.double()
    target = native_target(family, alpha * x0 + sigma * noise, x0, noise, alpha, sigma)
    torch.testing.assert_close(got, ((output - target) ** 2).mean().float(), rtol=1e-4, atol=0)


def test_denoising_loss_is_finite_at_every_time_that_is_drawn(schedule, rng):
    """Near t = 0 both the error and `out` of a flow network vanish; at t = 0 itself their ratio would be NaN."""
    t = torch.tensor([0.5 * 2.0**-23, 1.5 * 2.0**-23, 1 - 2.0**-24])
    x0, noise, output = torch.randn(3, 3, 8, generator=rng)
    for prediction in (epsilon, velocity, flow, karras(0.5)):
        if prediction is epsilon and float(schedule(torch.ones(1))[0]) == 0:
            continue  # no signal is left at t = 1 of a linear schedule, so epsilon says nothing about x0
        denoiser = NetworkDenoiser(Given(output), schedule, prediction)
        x_t = schedule.diffuse(x0, noise, t)
        loss = denoising_loss(denoiser(x_t, t, {}), x0, denoiser.coefficients(t, x_t)[1])
        assert math.isfinite(float(loss))


def test_denoising_loss_of_karras_is_edms_weighted_loss(rng):
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (arXiv 2206.00364, table 1)."""
    x0, x0_hat = torch.randn(2, 64, 3, generator=rng, dtype=torch.float64)
    _, sigma = Karras()(torch.linspace(0, 1, 64))
    sigma = sigma[:, None].double()
    _, out = karras(SIGMA_DATA)(torch.ones_like(sigma), sigma)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    torch.testing.assert_close(denoising_loss(x0_hat, x0, out), (weight * (x0_hat - x0) ** 2).mean(), rtol=1e-9, atol=0)


def test_denoising_loss_of_karras_is_the_papers_weight_for_the_fake_score():
    """DMD's appendix: SNR + 1 / 0.5^2 for EDM, and SNR for Stable Diffusion's epsilon network."""
    one = torch.ones(1, dtype=torch.float64)
    for schedule, prediction, extra in ((Karras(), karras(0.5), 4.0), (DDPM(), epsilon, 0.0)):
        for t in (0.1, 0.5, 0.9):
            alpha, sigma = (v.double() for v in schedule(torch.tensor([t])))
            _, out = prediction(alpha, sigma)
            assert float(denoising_loss(one, 0 * one, out)) == pytest.approx(float((alpha / sigma) ** 2 + extra))


def test_squared_distance_is_a_mean_per_sample(rng):
    a, b = torch.randn(2, 3, 2, 4, 4, generator=rng)
    expected = [np.mean((a[i].numpy().astype(np.float64) - b[i].numpy()) ** 2) for i in range(3)]
    np.testing.assert_allclose(squared_distance(a, b).numpy(), expected, rtol=1e-6)


def gauss_hermite(n):
    """Nodes and weights for an expectation over N(0, 1), exact for polynomials up to degree 2n - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights / math.sqrt(2 * math.pi))


@pytest.mark.parametrize("t", [0.02, 0.3, 0.6, 0.98])
def test_expected_gradient_is_that_of_the_divergence_of_two_gaussians(schedule, t):
    """KL(p_fake_t || p_real_t) of the diffused laws in the student's mean and scale; x = mean + scale * z.

    The gradient of the objective in x is alpha (s_fake - s_real) = alpha^2 / sigma^2 (x0_fake - x0_real), which is
    `matching_gradient` with its per-sample weight taken off. Integrated by Gauss-Hermite over z and the noise.
    """
    mean, scale, mean_real, scale_real = 0.8, 0.6, -0.3, 1.1
    nodes, weights = gauss_hermite(24)
    z, noise = (v.reshape(-1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight = (weights[:, None] * weights).reshape(-1, 1)
    times = torch.full((len(z),), t)
    alpha, sigma = (float(v) for v in schedule(torch.tensor(t)))

    x = mean + scale * z
    x_t = schedule.diffuse(x, noise, times)
    real = MixtureDenoiser(schedule, torch.tensor([[mean_real]], dtype=torch.float64), scale_real)
    fake = MixtureDenoiser(schedule, torch.tensor([[mean]], dtype=torch.float64), scale)
    x0_real, x0_fake = real(x_t, times, {}), fake(x_t, times, {})
    gradient = matching_gradient(x, x0_real, x0_fake) * normaliser(x, x0_real) * alpha**2 / sigma**2
    got_mean, got_scale = float((weight * gradient).sum()), float((weight * gradient * z).sum())

    parameters = torch.tensor([mean, scale], dtype=torch.float64, requires_grad=True)
    student_t = torch.distributions.Normal(
        alpha * parameters[0], ((alpha * parameters[1]) ** 2 + sigma**2).sqrt(), validate_args=False
    )
    real_t = torch.distributions.Normal(alpha * mean_real, math.sqrt((alpha * scale_real) ** 2 + sigma**2))
    expected = torch.autograd.grad(torch.distributions.kl_divergence(student_t, real_t), parameters)[0].tolist()
    assert got_mean == pytest.approx(expected[0], rel=1e-2)
    assert got_scale == pytest.approx(expected[1], rel=1e-2)


@pytest.mark.parametrize("schedule", [DDPM(), Karras(), Linear(3.0)], ids=["ddpm", "karras", "linear"])
def test_following_the_gradient_brings_a_gaussian_student_to_the_teacher(schedule):
    """The weights are positive, so the fixed point is the teacher's law whatever the schedule."""
    nodes, weights = gauss_hermite(16)
    z, noise = (v.reshape(-1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight = (weights[:, None] * weights).reshape(-1, 1)
    mean, scale = 1.5, 0.3
    real = MixtureDenoiser(schedule, torch.tensor([[-0.5]], dtype=torch.float64), 0.8)
    for step in range(400):
        t = torch.full((len(z),), 0.02 + 0.96 * ((step * 0.618034) % 1))
        x = mean + scale * z
        x_t = schedule.diffuse(x, noise, t)
        fake = MixtureDenoiser(schedule, torch.tensor([[mean]], dtype=torch.float64), scale)
        gradient = matching_gradient(x, real(x_t, t, {}), fake(x_t, t, {}))
        mean -= 0.05 * float((weight * gradient).sum())
        scale -= 0.05 * float((weight * gradient * z).sum())
    assert (mean, scale) == (pytest.approx(-0.5, abs=0.02), pytest.approx(0.8, abs=0.02))
