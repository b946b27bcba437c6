"""Teaching: the distribution of noise levels, and a teacher that finds the analytic denoiser."""

import math

import pytest
import scipy.stats
import torch
from torch import nn

from dmd import seeding
from dmd.batches import Share, TeachBatch, TeachBatches
from dmd.denoiser import NetworkDenoiser, karras
from dmd.ema import Ema
from dmd.mixture import MixtureDenoiser
from dmd.noise import Karras
from dmd.run import NotFinite, clip_and_check
from dmd.seeding import Stream
from dmd.teach import Teacher, lognormal_times


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.5, 0.8)])
def test_log_noise_levels_are_normal(mean, std):
    """EDM's ln sigma ~ N(mean, std^2); its tails beyond [sigma_min, sigma_max] are a 1e-4th."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    _, sigma = Karras()(lognormal_times(Karras(), mean, std)(u))
    log = sigma.double().log()
    assert float(log.mean()) == pytest.approx(mean, abs=2e-3)
    assert float(log.std()) == pytest.approx(std, rel=2e-3)
    assert scipy.stats.kstest(log.numpy(), "norm", (mean, std)).statistic < 1e-3


def test_the_ends_of_the_unit_interval_are_times():
    t = lognormal_times(Karras(), -1.2, 1.2)(torch.tensor([0.0, 0.5, 1 - 2.0**-24]))
    assert bool(torch.isfinite(t).all()) and float(t.min()) >= 0 and float(t.max()) <= 1
    assert float(Karras()(t)[1][1]) == pytest.approx(math.exp(-1.2), rel=1e-3)


MEAN, STD, SIGMA_DATA = 0.6, 0.25, 0.5


class Affine(nn.Module):
    """F = a(c) x + b(c), for which the best denoiser of a Gaussian is within reach; c = ln sigma."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, x_t, t, label):
        _, sigma = Karras()(t)
        a, b = self.body(sigma.log()[:, None]).chunk(2, dim=1)
        x = x_t / (sigma**2 + SIGMA_DATA**2).sqrt()[:, None, None, None]
        return a[:, :, None, None] * x + b[:, :, None, None]


def gaussian_images(index):
    return MEAN + STD * seeding.normal(0, Stream.DATA, 12345, index, (1, 2, 2)), {"label": index * 0}


def build(lr):
    denoiser = NetworkDenoiser(Affine(), Karras(), karras(SIGMA_DATA))
    optimizer = torch.optim.Adam(denoiser.net.parameters(), lr=lr)
    return Teacher(denoiser, optimizer, Ema(denoiser.net, 0.99), 1.0, clip_and_check)


def draws(batch_size=64, accumulation=1):
    times = lognormal_times(Karras(), -1.2, 1.2)
    null, share = {"label": torch.tensor([1])}, Share(accumulation=accumulation)
    return TeachBatches(0, gaussian_images, 2**20, times, null, batch_size, share, dropout=0.0)


def test_a_teacher_of_gaussian_images_finds_the_analytic_denoiser():
    teacher, batches, steps = build(3e-2), draws(256), 300
    for step in range(steps):
        for group in teacher.optimizer.param_groups:
            group["lr"] = 3e-2 * (1 - step / steps)
        teacher.step(step, batches(step))
    exact = MixtureDenoiser(Karras(), torch.full((1, 4), MEAN), STD)
    _, sigma = Karras()(t := Karras().inverse(torch.logspace(-1.3, 0.3, 40)))
    x_t = MEAN + (STD**2 + sigma**2).sqrt()[:, None] * torch.linspace(-2, 2, 4)
    averaged = NetworkDenoiser(teacher.ema.shadow, Karras(), karras(SIGMA_DATA))
    with torch.no_grad():
        x0 = averaged(x_t.reshape(-1, 1, 2, 2), t, {"label": torch.zeros(40)}).reshape(-1, 4)
    posterior_std = STD * sigma / (STD**2 + sigma**2).sqrt()
    error = (x0 - exact(x_t, t, {})).square().mean(1).sqrt() / posterior_std
    assert float(error.max()) < 0.1  # of the spread that no denoiser can remove


def test_micro_batches_add_up_to_the_whole_batch():
    whole, parted = build(1e-3), build(1e-3)
    a, b = whole.step(0, draws(64)(0)), parted.step(0, draws(64, accumulation=4)(0))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for p, q in zip(whole.denoiser.net.parameters(), parted.denoiser.net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_the_loss_is_edms(rng):
    """lambda(sigma) |D - x0|^2 with lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, before the update."""
    teacher = build(1e-3)
    x0, noise = torch.randn(2, 16, 1, 2, 2, generator=rng)
    t, cond = torch.rand(16, generator=rng), {"label": torch.zeros(16)}
    sigma = Karras()(t)[1][:, None, None, None]
    with torch.no_grad():
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        expected = (weight * (teacher.denoiser(x0 + sigma * noise, t, cond) - x0) ** 2).mean()
    got = teacher.step(0, [TeachBatch(x0, cond, t, noise)])["loss/denoising"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


def test_a_bad_image_changes_no_weight():
    teacher, (batch,) = build(1e-3), draws()(0)
    batch.x0[3, 0, 0, 0] = float("nan")
    before = [p.clone() for m in teacher.modules().values() for p in m.parameters()]
    with pytest.raises(NotFinite):
        teacher.step(0, [batch])
    after = [p for m in teacher.modules().values() for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
