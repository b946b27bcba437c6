"""Samplers against closed-form trajectories, a literal EDM Algorithm 1, diffusers' schedulers, and their own order."""

import math

import numpy as np
import pytest
import torch

from dmd.denoiser import Denoiser, NetworkDenoiser, epsilon, flow, karras
from dmd.mixture import MixtureDenoiser
from dmd.noise import DDPM, Karras, Linear
from dmd.solvers import ddim, heun, one_step


class Counting(Denoiser):
    """Another denoiser, noting the times of its calls."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.times = []

    def forward(self, x_t, t, cond):
        assert t.shape == (len(x_t),)
        self.times.append(float(t[0]))
        return self.denoiser(x_t, t, cond)


class Noise(torch.nn.Module):
    """A smooth epsilon network without weights."""

    def forward(self, x_t, t):
        return torch.sin(3 * x_t) * (0.5 + t[:, None, None, None]) + 0.3 * x_t


class Flow(torch.nn.Module):
    """A smooth flow network without weights."""

    def forward(self, x_t, t):
        return torch.cos(2 * x_t) * (0.5 + t[:, None, None, None]) + x_t


def gaussian(schedule, mean=0.7, std=0.4):
    return MixtureDenoiser(schedule, torch.tensor([[mean, -mean]], dtype=torch.float64), std)


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (heun, 2)])
@pytest.mark.parametrize("schedule", [Karras(0.02, 10.0), Linear(1.0), Linear(3.0)], ids=["karras", "lin1", "lin3"])
def test_error_falls_with_the_solvers_order(schedule, solver, order, ring, rng):
    """Twice the steps, half (a quarter of) the error, against the same solver on a much finer grid of one end point.

    The last step, to no noise at all, is outside the comparison: its length depends on the grid for linear schedules.
    """
    if isinstance(schedule, Linear):
        schedule = Ending(schedule.shift)
    mixture = ring(schedule, std=0.5)
    x = schedule.start(torch.randn(64, 2, generator=rng, dtype=torch.float64))
    truth = heun(mixture, x, 1025, {})
    error = [float((solver(mixture, x, n + 1, {}) - truth).square().mean().sqrt()) for n in (16, 32, 64)]
    measured = [math.log2(a / b) for a, b in zip(error[:-1], error[1:], strict=True)]
    assert measured == pytest.approx([order, order], abs=0.35)


class Ending(Linear):
    """The straight line from 1 to a fixed last time, so that every grid ends at the same noise."""

    def times(self, steps):
        return torch.linspace(1.0, 0.05, steps, dtype=torch.float64)


@pytest.mark.parametrize(("solver", "order"), [(ddim, 1), (heun, 2)])
def test_error_falls_with_the_solvers_order_on_the_table(solver, order, ring, rng):
    """The table has 1000 entries and no more, so all of them are the reference; 999 = 27 * 37 gives nested grids."""

    class Nested(DDPM):
        def times(self, steps):
            return torch.linspace(1.0, 0.0, steps, dtype=torch.float64)

    mixture = ring(Nested(), std=0.5)
    x = torch.randn(64, 2, generator=rng, dtype=torch.float64)
    truth = heun(mixture, x, 1000, {})
    coarse, fine = (float((solver(mixture, x, n + 1, {}) - truth).square().mean().sqrt()) for n in (37, 111))
    assert math.log(coarse / fine, 3) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("solver", [ddim, heun])
def test_gaussian_follows_its_closed_form_trajectory(schedule, solver, rng):
    """For N(m, s^2) the ODE leaves u = (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) as it is, to the last time of the
    grid; the step to no noise is the posterior mean m + alpha s^2 / sqrt(alpha^2 s^2 + sigma^2) u."""
    mixture, steps = gaussian(schedule), 250
    x = schedule.start(torch.randn(32, 2, generator=rng, dtype=torch.float64))
    (alpha, sigma), (alpha_n, sigma_n) = ([float(v) for v in schedule(t)] for t in schedule.times(steps)[[0, -1]])
    u = (x - alpha * mixture.means) / math.hypot(alpha * mixture.std, sigma)
    exact = mixture.means + alpha_n * mixture.std**2 / math.hypot(alpha_n * mixture.std, sigma_n) * u
    error = float((solver(mixture, x, steps, {}) - exact).abs().max())
    assert error < (2e-2 if solver is ddim else 3e-4)


def test_heun_on_karras_is_algorithm_1_of_edm(ring, rng):
    """Written as in arXiv 2206.00364, without churn: sigma_N = 0, and no correction in the last step."""
    mixture, n = ring(Karras()), 18
    z = torch.randn(16, 2, generator=rng, dtype=torch.float64)

    def denoise(x, sigma):
        distance = x[:, None] - mixture.means
        logits = mixture.log_weights - 0.5 * (distance**2).sum(-1) / (mixture.std**2 + sigma**2)
        mean = mixture.means + mixture.std**2 / (mixture.std**2 + sigma**2) * distance
        return (torch.softmax(logits, 1)[..., None] * mean).sum(1)

    sigmas = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)] + [0.0]
    x = sigmas[0] * z
    for i in range(n):
        d = (x - denoise(x, sigmas[i])) / sigmas[i]
        x_next = x + (sigmas[i + 1] - sigmas[i]) * d
        if sigmas[i + 1] != 0:
            d_next = (x_next - denoise(x_next, sigmas[i + 1])) / sigmas[i + 1]
            x_next = x + (sigmas[i + 1] - sigmas[i]) * 0.5 * (d + d_next)
        x = x_next
    torch.testing.assert_close(heun(mixture, 80.0 * z, n, {}), x, rtol=0, atol=2e-5)  # our sigmas are float32


def test_ddim_on_karras_is_eulers_method(ring, rng):
    mixture = ring(Karras())
    x = got = 80 * torch.randn(8, 2, generator=rng, dtype=torch.float64)
    sigmas = [*Karras()(Karras().times(12))[1].tolist(), 0.0]
    for a, b in zip(sigmas[:-1], sigmas[1:], strict=True):
        t = Karras().inverse(torch.full((8,), a))
        x = x + (b - a) * (x - mixture(x, t, {})) / a
    torch.testing.assert_close(ddim(mixture, got, 12, {}), x, rtol=0, atol=1e-4)  # the inverse is float32


@pytest.mark.parametrize(("solver", "evaluations"), [(ddim, lambda n: n), (heun, lambda n: 2 * n - 1)])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_network_evaluations(schedule, solver, evaluations, steps, ring, rng):
    counting = Counting(ring(schedule))
    solver(counting, torch.randn(3, 2, generator=rng, dtype=torch.float64), steps, {})
    assert len(counting.times) == evaluations(steps)
    assert sorted(set(counting.times), reverse=True) == schedule.times(steps).float().tolist()


def test_one_step_is_the_denoiser_at_the_start(schedule, ring, rng):
    """And so are both solvers with a single step."""
    z = torch.randn(8, 2, generator=rng, dtype=torch.float64)
    start = 80.0 * z if isinstance(schedule, Karras) else z
    expected = ring(schedule)(start, torch.ones(8), {})
    assert torch.equal(one_step(ring(schedule), z, {}), expected)
    for solver in (ddim, heun):
        assert torch.equal(solver(ring(schedule), start, 1, {}), expected)


def test_the_condition_reaches_every_evaluation(rng):
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x_t, t, label):
            seen.append(label.tolist())
            return 0 * x_t

    heun(NetworkDenoiser(Net(), Linear(), flow), torch.randn(2, 3, generator=rng), 3, {"label": torch.tensor([4, 9])})
    assert seen == [[4, 9]] * 5


def test_a_sample_does_not_depend_on_its_batch(schedule, ring, rng):
    x = schedule.start(torch.randn(16, 2, generator=rng, dtype=torch.float64))
    together = heun(ring(schedule), x, 9, {})
    alone = torch.cat([heun(ring(schedule), row[None], 9, {}) for row in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", [ddim, heun])
def test_no_steps_are_refused(solver, ring):
    with pytest.raises(ValueError, match="steps is 0"):
        solver(ring(Karras()), torch.zeros(1, 2, dtype=torch.float64), 0, {})


class TestDiffusers:
    """Parity with the library whose checkpoints are read."""

    @pytest.mark.parametrize("steps", [1, 4, 10, 50])
    def test_ddim(self, steps, rng):
        diffusers = pytest.importorskip("diffusers")
        stock = diffusers.DDIMScheduler(
            num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False,
        )  # fmt: skip
        stock.set_timesteps(steps)
        z = torch.randn(2, 4, 8, 8, generator=rng)
        x = z
        for index in stock.timesteps:
            x = stock.step(Noise()(x, (index / 999).expand(2)), int(index), x, eta=0.0).prev_sample
        got = ddim(NetworkDenoiser(Noise(), DDPM(), epsilon), z, steps, {})
        torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_flow_euler(self, shift, rng):
        diffusers = pytest.importorskip("diffusers")
        stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        steps = 12
        stock.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
        z = torch.randn(2, 4, 8, 8, generator=rng)
        x = z
        for timestep, t in zip(stock.timesteps, Linear(shift).times(steps).float(), strict=True):
            x = stock.step(Flow()(x, t.expand(2)), timestep, x).prev_sample
        got = ddim(NetworkDenoiser(Flow(), Linear(shift), flow), z, steps, {})
        torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)

    def test_edm_euler(self, rng):
        diffusers = pytest.importorskip("diffusers")
        stock, steps = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5), 12
        stock.set_timesteps(steps)
        z = torch.randn(2, 4, 8, 8, generator=rng)

        class Net(torch.nn.Module):
            """What the scheduler's user would write: the raw network sees the scaled input."""

            def forward(self, x_t, t):
                _, sigma = Karras()(t)
                return torch.tanh(x_t / (sigma[:, None, None, None] ** 2 + 0.25).sqrt())

        x = 80.0 * z
        for timestep, t in zip(stock.timesteps, Karras().times(steps).float(), strict=True):
            assert stock.scale_model_input(x, timestep) is not None  # the scheduler insists on the call
            x = stock.step(Net()(x, t.expand(2)), timestep, x).prev_sample
        got = ddim(NetworkDenoiser(Net(), Karras(), karras(0.5)), 80.0 * z, steps, {})
        torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)
