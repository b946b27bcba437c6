"""Half-precision networks: how far samples are from the float64 formulas, and how much nearer than diffusers' own.

The stock pipeline keeps latents in the networks' dtype; here only what enters and leaves the network is rounded.
"""

import pytest
import torch

from dmd.denoiser import NetworkDenoiser, epsilon
from dmd.noise import DDPM
from dmd.solvers import Solver, ddim, one_step
from dmd.teachers.samplers import SAMPLERS
from dmd.teachers.stable_diffusion import TimestepNet

diffusers = pytest.importorskip("diffusers")

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = TABLE | {"steps_offset": 1, "set_alpha_to_one": False}
ALPHA_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
STOCK: dict[str, tuple[Solver, str, dict]] = {
    "ddim": (ddim, "DDIMScheduler", TABLE | {"timestep_spacing": "trailing", "clip_sample": False}),
    "pndm": (SAMPLERS["pndm"][0], "PNDMScheduler", LEADING | {"skip_prk_steps": True}),
    "ddim-leading": (SAMPLERS["ddim-leading"][0], "DDIMScheduler", LEADING | {"clip_sample": False}),
    "dpm-solver": (SAMPLERS["dpm-solver"][0], "DPMSolverMultistepScheduler", TABLE),
}


class Gaussian(torch.nn.Module):
    """A UNet that knows the noise of data N(0, 0.9^2) exactly, but for rounding it and its input to a dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x_t, index, text=None, return_dict=False):
        alpha_bar = ALPHA_BAR[index].reshape(-1, 1, 1, 1)
        noise = (1 - alpha_bar).sqrt() / (alpha_bar * 0.9**2 + 1 - alpha_bar) * x_t.to(self.dtype).double()
        return (noise.to(self.dtype),)


def rms(x):
    return float(x.double().square().mean().sqrt())


def denoiser(dtype):
    return NetworkDenoiser(TimestepNet(Gaussian(dtype), DDPM()), DDPM(), epsilon)


@pytest.mark.parametrize(
    ("dtype", "ours", "stock"),
    [(torch.bfloat16, 0.025, 0.062), (torch.float16, 0.0031, 0.0057)],
    ids=["bf16", "fp16"],
)
def test_one_step(dtype, ours, stock, rng):
    """Data of std 0.9 and the noise in it, rounded: LCMScheduler, which makes one-step images, against our x0."""
    z, x0 = (torch.randn(8, 4, 64, 64, generator=rng) for _ in range(2))
    x0 = 0.9 * x0.double()
    alpha, sigma = ALPHA_BAR[-1].sqrt(), (1 - ALPHA_BAR[-1]).sqrt()
    noise = ((z - alpha * x0) / sigma).to(dtype)

    class Knowing(Gaussian):
        def forward(self, x_t, index, text, return_dict):
            return (noise,)

    net = TimestepNet(Knowing(dtype), DDPM())
    found = one_step(NetworkDenoiser(net, DDPM(), epsilon), z, {"text": torch.zeros(8, 77, 16)})
    scheduler = diffusers.LCMScheduler(**TABLE)
    scheduler.set_timesteps(1)
    theirs = scheduler.step(noise, 999, z.to(dtype)).denoised
    assert found.dtype == torch.float32 and theirs.dtype == dtype
    assert rms(found - x0) <= ours
    assert rms(theirs - x0) == pytest.approx(stock, rel=0.05)


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize(("dtype", "ours"), [(torch.bfloat16, 0.002), (torch.float16, 0.0002)], ids=["bf16", "fp16"])
def test_many_steps(name, dtype, ours, rng):
    """25 steps to samples of std 0.9: rounding errors of the latents themselves would add up."""
    solver, kind, settings = STOCK[name]
    z = torch.randn(4, 4, 32, 32, generator=rng)
    text = {"text": torch.zeros(4, 77, 16)}
    exact = solver(denoiser(torch.float64), z.double(), 25, text)
    found = solver(denoiser(dtype), z, 25, text)
    scheduler = getattr(diffusers, kind)(**settings)
    scheduler.set_timesteps(25)
    theirs = z.to(dtype)
    for index in scheduler.timesteps:
        (noise,) = Gaussian(dtype)(theirs, index)
        theirs = scheduler.step(noise, index, theirs).prev_sample
    assert found.dtype == torch.float32 and theirs.dtype == dtype
    assert rms(found - exact) <= ours
    assert rms(theirs - exact) > 5 * rms(found - exact)
