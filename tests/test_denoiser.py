"""Predictions, guidance and scores against their definitions and diffusers."""

import pytest
import torch
from torch import nn

from dmd.denoiser import (
    Denoiser,
    Guided,
    NetworkDenoiser,
    epsilon,
    flow,
    karras,
    predicted_noise,
    sample,
    score,
    velocity,
)
from dmd.noise import DDPM, Karras, Linear

SIGMA_DATA = 0.7
PREDICTIONS = {"epsilon": epsilon, "velocity": velocity, "flow": flow, "sample": sample, "karras": karras(SIGMA_DATA)}


def target(name, x0, noise, alpha, sigma):
    """What a network of each kind is trained to return, from the papers' definitions."""
    if name == "epsilon":
        return noise
    if name == "velocity":
        return alpha * noise - sigma * x0
    if name == "flow":
        return noise - x0
    if name == "sample":
        return x0
    ratio = sigma / alpha  # EDM, table 1, in the frame where alpha = 1
    skip = SIGMA_DATA**2 / (ratio**2 + SIGMA_DATA**2)
    out = ratio * SIGMA_DATA / (ratio**2 + SIGMA_DATA**2).sqrt()
    return (x0 - skip * (x0 + ratio * noise)) / out


class Given(nn.Module):
    """A network that returns a fixed tensor and notes its calls."""

    def __init__(self, out):
        super().__init__()
        self.out = out
        self.calls = []

    def forward(self, x_t, t, **cond):
        self.calls.append((x_t, t, cond))
        return self.out


class Mlp(nn.Module):
    """A small random network that depends on all of its inputs."""

    def __init__(self, seed=0, dim=2, classes=4):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.label = nn.Embedding(classes + 1, 8)
            self.body = nn.Sequential(nn.Linear(dim + 9, 16), nn.Tanh(), nn.Linear(16, dim))
        self.rows = []

    def forward(self, x_t, t, label):
        self.rows.append(len(x_t))
        return self.body(torch.cat((x_t / (1 + x_t.abs()), t[:, None].to(x_t), self.label(label)), dim=1))


@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_native_target_gives_back_x0(schedule, name, rng):
    x0, noise = torch.randn(2, 64, 3, generator=rng)
    t = torch.linspace(0.02, 0.98, 64)
    alpha, sigma = (v[:, None] for v in schedule(t))
    x_t = alpha * x0 + sigma * noise
    native = target(name, x0.double(), noise.double(), alpha.double(), sigma.double()).float()
    got = NetworkDenoiser(Given(native), schedule, PREDICTIONS[name])(x_t, t, {})
    skip, out = PREDICTIONS[name](alpha, sigma)
    rounding = (skip * x_t).abs() + (out * native).abs()  # both terms are rounded, then cancel
    assert bool(((got - x0).abs() <= 1e-6 * (rounding + x0.abs())).all())


def test_flow_is_finite_where_the_signal_is_gone():
    """alpha = 0 at t = 1 of a linear schedule, where a sigma / alpha frame is infinite."""
    alpha, sigma = Linear()(torch.ones(1))
    assert (float(alpha), float(sigma)) == (0.0, 1.0)
    assert [float(v) for v in flow(alpha, sigma)] == [1.0, -1.0]
    assert [float(v) for v in velocity(alpha, sigma)] == [0.0, -1.0]


def test_network_is_told_the_condition_and_the_time(schedule):
    net = Given(torch.zeros(3, 2))
    x_t, t, text = torch.ones(3, 2), torch.tensor([0.1, 0.5, 1.0]), torch.arange(3)
    x0 = NetworkDenoiser(net, schedule, sample)(x_t, t, {"text": text})
    (seen_x, seen_t, cond) = net.calls[0]
    assert torch.equal(seen_x, x_t) and torch.equal(seen_t, t) and torch.equal(cond["text"], text)
    assert torch.equal(x0, torch.zeros(3, 2))


def test_autocast_reaches_the_network_only(rng):
    """The network's matrix product is bf16; coefficients, conversion and result are float32."""
    layer = nn.Linear(4, 4, bias=False)
    x_t, t = 30 * torch.randn(6, 4, generator=rng), torch.rand(6, generator=rng)

    class Net(nn.Module):
        def forward(self, x_t, t):
            return layer(x_t)

    got = NetworkDenoiser(Net(), Karras(), karras(0.5), autocast=torch.bfloat16)(x_t, t, {})
    raw = (x_t.bfloat16() @ layer.weight.bfloat16().T).float()
    _, s = Karras()(t)
    s = s[:, None].double()
    expected = 0.25 / (s**2 + 0.25) * x_t.double() + 0.5 * s / (s**2 + 0.25).sqrt() * raw.double()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.75, 7.5])
def test_guidance_is_the_same_in_x0_and_in_noise(schedule, scale, rng):
    x_t, t = 2 * torch.randn(5, 2, generator=rng), torch.linspace(0.1, 0.9, 5)
    label, null = torch.arange(5) % 4, torch.full((5,), 4)
    net = Mlp()
    x0 = Guided(NetworkDenoiser(net, schedule, epsilon), scale, {"label": torch.tensor([4])})(x_t, t, {"label": label})
    assert net.rows == [10]  # one call for both halves
    with torch.no_grad():
        uncond, cond = net(x_t, t, null), net(x_t, t, label)
    alpha, sigma = (v[:, None] for v in schedule(t))
    expected = (x_t - sigma * (uncond + scale * (cond - uncond))) / alpha
    torch.testing.assert_close(x0, expected, rtol=1e-5, atol=2e-6 * float((sigma / alpha).max() * (1 + scale)) + 1e-5)


def test_guidance_of_scale_1_is_the_conditional_in_one_call(schedule, rng):
    x_t, t, label = torch.randn(5, 2, generator=rng), torch.rand(5, generator=rng), torch.arange(5) % 4
    net = Mlp()
    plain = NetworkDenoiser(net, schedule, flow)
    guided = Guided(plain, 1.0, {"label": torch.tensor([4])})(x_t, t, {"label": label})
    assert net.rows == [5]
    assert torch.equal(guided, plain(x_t, t, {"label": label}))


def test_guidance_of_scale_0_is_the_unconditional(schedule, rng):
    x_t, t, label = torch.randn(5, 2, generator=rng), torch.rand(5, generator=rng), torch.arange(5) % 4
    plain = NetworkDenoiser(Mlp(), schedule, flow)
    guided = Guided(plain, 0.0, {"label": torch.tensor([4])})(x_t, t, {"label": label})
    torch.testing.assert_close(guided, plain(x_t, t, {"label": torch.full((5,), 4)}), rtol=1e-6, atol=1e-6)


def test_null_condition_is_repeated_for_every_row():
    """Text-like conditions of several axes, given in another precision."""

    class Sum(Denoiser):
        schedule = Linear()

        def forward(self, x_t, t, cond):
            return x_t * 0 + cond["text"].flatten(1).sum(1, keepdim=True)

    text = torch.arange(12.0).reshape(2, 3, 2)
    null = {"text": torch.full((1, 3, 2), 0.5, dtype=torch.float64)}
    got = Guided(Sum(), 3.0, null)(torch.zeros(2, 1), torch.ones(2), {"text": text})
    assert got.flatten().tolist() == [3 + 3 * (15 - 3), 3 + 3 * (51 - 3)]


def test_predicted_noise_undoes_diffusion(schedule, rng):
    x0, noise = torch.randn(2, 16, 3, generator=rng, dtype=torch.float64)
    t = torch.linspace(0.05, 1.0, 16)
    torch.testing.assert_close(
        predicted_noise(schedule.diffuse(x0, noise, t), x0, t, schedule), noise, rtol=0, atol=1e-9
    )


def test_score_of_a_known_sample_is_minus_noise_over_sigma(schedule, rng):
    """grad log N(x_t; alpha x0, sigma^2) by autograd; sigma is emitted in float32, so its square is rounded once."""
    x0, noise = torch.randn(2, 16, 3, generator=rng, dtype=torch.float64)
    t = torch.linspace(0.05, 1.0, 16)
    alpha, sigma = (v[:, None].double() for v in schedule(t))
    x_t = (alpha * x0 + sigma * noise).requires_grad_()
    log_prob = torch.distributions.Normal(alpha * x0, sigma).log_prob(x_t).sum()
    (expected,) = torch.autograd.grad(log_prob, x_t)
    torch.testing.assert_close(score(x_t.detach(), x0, t, schedule), expected, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("name", ["epsilon", "sample", "karras"])
def test_only_the_ratio_of_sigma_to_alpha_matters(name):
    """x_t / alpha is the variance-exploding x_t: there epsilon, x0 and EDM outputs mean the same F (v and flow not)."""
    alpha = torch.tensor([0.3, 0.9], dtype=torch.float64)
    ratio = torch.tensor([2.0, 0.1], dtype=torch.float64)
    skip, out = PREDICTIONS[name](alpha, alpha * ratio)
    skip_ve, out_ve = PREDICTIONS[name](torch.ones_like(alpha), ratio)
    torch.testing.assert_close(skip * alpha, skip_ve)
    torch.testing.assert_close(out, out_ve)


class TestDiffusers:
    """Parity with the library whose checkpoints are read."""

    @pytest.fixture
    def scheduler(self):
        diffusers = pytest.importorskip("diffusers")

        def build(kind):
            return diffusers.DDIMScheduler(
                num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                prediction_type=kind, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False,
            )  # fmt: skip

        return build

    def test_velocity_target(self, scheduler, rng):
        x0, noise = torch.randn(2, 6, 3, 4, 4, generator=rng)
        index = torch.tensor([0, 20, 500, 750, 980, 999])
        x_t = DDPM().diffuse(x0, noise, index / 999)
        theirs = scheduler("v_prediction").get_velocity(x0, noise, index)
        got = NetworkDenoiser(Given(theirs), DDPM(), velocity)(x_t, index / 999, {})
        torch.testing.assert_close(got, x0, rtol=0, atol=5e-6)

    @pytest.mark.parametrize(
        ("kind", "prediction"), [("epsilon", epsilon), ("v_prediction", velocity), ("sample", sample)]
    )
    def test_one_step_from_pure_noise(self, scheduler, kind, prediction, rng):
        z, out = torch.randn(2, 3, 4, 8, 8, generator=rng)
        stock = scheduler(kind)
        stock.set_timesteps(1)
        assert stock.timesteps.tolist() == [999]
        theirs = stock.step(out, 999, z).prev_sample
        got = NetworkDenoiser(Given(out), DDPM(), prediction)(z, torch.ones(3), {})
        torch.testing.assert_close(got, theirs, rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("sigma", [0.002, 0.5, 3.0, 80.0])
    def test_edm_preconditioning(self, sigma, rng):
        diffusers = pytest.importorskip("diffusers")
        stock = diffusers.EDMEulerScheduler(sigma_data=0.5)
        x_t, out = torch.randn(2, 3, 4, generator=rng)
        theirs = stock.precondition_outputs(x_t, out, torch.tensor(sigma))
        t = Karras().inverse(torch.tensor([sigma] * 3))
        got = NetworkDenoiser(Given(out), Karras(), karras(0.5))(x_t, t, {})
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-6)
