"""Noise schedules against closed forms and diffusers' tables."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd.noise import DDPM, Karras, Linear, expand

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_ddpm_table_is_the_product_of_the_betas():
    roots = [math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085)) for i in range(1000)]
    alpha_bar, expected = 1.0, []
    for root in roots:
        alpha_bar *= 1.0 - root**2
        expected.append(alpha_bar)
    alpha, sigma = DDPM()(torch.arange(1000) / 999)
    np.testing.assert_allclose(alpha.numpy(), np.sqrt(expected), rtol=1e-6)
    np.testing.assert_allclose(sigma.numpy(), np.sqrt(1 - np.array(expected)), rtol=1e-6)


def test_ddpm_index_hits_every_entry():
    """float32 times i / 999 come back as i, and times between entries go to the nearest."""
    assert DDPM().index(torch.arange(1000) / 999).tolist() == list(range(1000))
    assert DDPM().index(torch.tensor([0.0, 0.4 / 999, 0.6 / 999, 998.4 / 999, 1.0])).tolist() == [0, 0, 1, 998, 999]


def test_karras_is_equation_5_of_edm():
    schedule, n = Karras(), 18
    alpha, sigma = schedule(schedule.times(n))
    i = np.arange(n)
    expected = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma.numpy(), expected, rtol=1e-6)
    assert alpha.tolist() == [1.0] * n
    np.testing.assert_allclose(sigma.numpy()[[0, -1]], [80, 0.002], rtol=1e-6)


@given(st.floats(0.002, 80.0))
@settings(max_examples=50, deadline=None)
def test_karras_inverse_finds_the_noise_level(sigma):
    schedule = Karras()
    _, back = schedule(schedule.inverse(torch.tensor([sigma])))
    assert float(back) == pytest.approx(sigma, rel=1e-4)


def test_karras_inverse_stays_in_range():
    assert Karras().inverse(torch.tensor([0.0, 1e-5, 1e4])).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_linear_is_the_shifted_straight_line(shift):
    """The shift multiplies the ratio sigma / alpha, which is what Esser et al. 2024 ask of it."""
    t = torch.linspace(0.01, 0.99, 50)
    alpha, sigma = (v.double().numpy() for v in Linear(shift)(t))
    np.testing.assert_allclose(alpha + sigma, 1.0, rtol=1e-6)
    np.testing.assert_allclose(sigma / alpha, shift * t.double().numpy() / (1 - t.double().numpy()), rtol=1e-5)
    ends = Linear(shift)(torch.tensor([0.0, 1.0]))
    assert [v.tolist() for v in ends] == [[1.0, 0.0], [0.0, 1.0]]


def test_time_1_is_the_noisiest(schedule):
    alpha, sigma = (v.double() for v in schedule(torch.arange(0, 1000) / 999))
    ratio = sigma / alpha.clamp_min(1e-12)
    assert bool((ratio.diff() > 0).all())


def test_coefficients_of_a_time_do_not_depend_on_the_batch(schedule):
    t = torch.linspace(0, 1, 13)
    alone = [[float(v) for v in schedule(one[None])] for one in t]
    together = [list(pair) for pair in zip(*(v.tolist() for v in schedule(t)), strict=True)]
    assert alone == together
    assert all(v.dtype == torch.float32 for v in schedule(t.double()))


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_diffuse_is_alpha_x0_plus_sigma_noise(schedule, rng, shape):
    x0, noise = torch.randn(5, *shape, generator=rng), torch.randn(5, *shape, generator=rng)
    t = torch.rand(5, generator=rng)
    got = schedule.diffuse(x0, noise, t)
    for i in range(5):
        alpha, sigma = (float(v) for v in schedule(t[i : i + 1]))
        np.testing.assert_allclose(got[i], alpha * x0[i] + sigma * noise[i], rtol=1e-6, atol=1e-6)


def test_expand_appends_axes():
    like = torch.zeros(2, 3, 4, 5)
    product = expand(torch.tensor([2.0, 3.0]), like) * torch.ones_like(like)
    assert product.sum(dim=(1, 2, 3)).tolist() == [120.0, 180.0]


def test_start_is_the_stock_samplers_noise(rng):
    """Stable Diffusion and flow start from z, EDM from sigma_max z: each within the schedule's own x at t = 1."""
    z = torch.randn(4, 2, generator=rng)
    for schedule in (DDPM(), Linear(1.0), Linear(3.0)):
        assert torch.equal(schedule.start(z), z)
        sigma = schedule(torch.ones(1))[1]
        assert float(sigma) == pytest.approx(1.0, abs=3e-3)
    assert torch.equal(Karras(sigma_max=40.0).start(z), 40.0 * z)
    assert torch.equal(Karras().start(z), Karras().diffuse(torch.zeros_like(z), z, torch.ones(4)))


def test_every_grid_starts_at_the_students_time(schedule):
    for steps in (1, 2, 5, 50):
        times = schedule.times(steps)
        assert len(times) == steps and float(times[0]) == 1.0
        assert bool((times.diff() < 0).all()) and float(times[-1]) >= 0.0


class TestDiffusers:
    """Parity with the library whose checkpoints are read."""

    def test_alpha_bar(self):
        diffusers = pytest.importorskip("diffusers")
        alpha, _ = DDPM()(torch.arange(1000) / 999)
        theirs = diffusers.DDPMScheduler(**SD).alphas_cumprod
        torch.testing.assert_close(alpha**2, theirs, rtol=0, atol=1e-6)

    def test_add_noise(self, rng):
        diffusers = pytest.importorskip("diffusers")
        x0, noise = torch.randn(2, 8, 3, 4, 4, generator=rng)
        index = torch.tensor([0, 1, 20, 250, 500, 981, 998, 999])
        theirs = diffusers.DDPMScheduler(**SD).add_noise(x0, noise, index)
        torch.testing.assert_close(DDPM().diffuse(x0, noise, index / 999), theirs, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("steps", [1, 2, 4, 5, 10, 20, 25, 50, 100, 1000])
    def test_trailing_timesteps(self, steps):
        diffusers = pytest.importorskip("diffusers")
        scheduler = diffusers.DDIMScheduler(**SD, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        assert DDPM().index(DDPM().times(steps)).tolist() == scheduler.timesteps.tolist()

    @pytest.mark.parametrize("steps", [2, 18, 40])
    def test_karras_ramp(self, steps):
        diffusers = pytest.importorskip("diffusers")
        scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
        scheduler.set_timesteps(steps)
        _, sigma = Karras().__call__(Karras().times(steps))
        torch.testing.assert_close(torch.cat((sigma, torch.zeros(1))), scheduler.sigmas, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_shifted_sigmas(self, shift):
        diffusers = pytest.importorskip("diffusers")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7).tolist())
        _, sigma = Linear(shift)(Linear(shift).times(7))
        torch.testing.assert_close(torch.cat((sigma, torch.zeros(1))), scheduler.sigmas, rtol=1e-6, atol=0)
