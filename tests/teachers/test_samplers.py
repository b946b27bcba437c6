"""The stock samplers: their trajectories are the stock pipeline's, their ends those of the ODE where that is known."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dmd.denoiser import Denoiser, Guided
from dmd.noise import DDPM, Karras
from dmd.solvers import heun, one_step
from dmd.teachers import miniature, stable_diffusion
from dmd.teachers.samplers import SAMPLERS, dpm_solver, pndm

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

DATA = Path(os.environ.get("DMD_TEST_DATA", ""))
REAL = DATA / "sd-configs" / "sd-v1-5" / "scheduler" / "scheduler_config.json"
V1_5 = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
"""The scheduler of version 1.5 as its folder has it; other samplers are built from the same by `from_config`."""
STOCK = {"pndm": "PNDMScheduler", "ddim-leading": "DDIMScheduler", "dpm-solver": "DPMSolverMultistepScheduler"}
PROMPTS = ["a small red circle", "two blue squares", ""]
EACH = pytest.mark.parametrize("name", SAMPLERS)


class Counting(Denoiser):
    """Another denoiser, noting the table indices of its calls."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.indices = []

    def forward(self, x_t, t, cond):
        assert t.shape == (len(x_t),)
        self.indices += self.schedule.index(t[:1]).tolist()
        return self.denoiser(x_t, t, cond)


@dataclasses.dataclass(frozen=True)
class From(DDPM):
    """A grid from the table's entry `first` down to 0."""

    first: int = 999

    def times(self, steps):
        return torch.linspace(self.first, 0, steps, dtype=torch.float64).round() / (self.steps - 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Prediction type to the folder of a tiny random pipeline."""
    torch.manual_seed(0)
    config = miniature.MiniatureConfig(16, 4, (8, 8), (16, 32), 16, 1, 2, 16)
    made = {}
    for prediction in ("epsilon", "v_prediction"):
        folder = made[prediction] = tmp_path_factory.mktemp(prediction)
        words = miniature.write_tokenizer(["red", "circle"], config.tokens, folder / "tokenizer")
        net: Any = miniature.denoiser(config).net
        text = miniature.text_encoder(config, words)
        miniature.save(miniature.autoencoder(config), net, text, 0.5, folder)
        scheduler = folder / "scheduler" / "scheduler_config.json"
        scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": prediction}))
    return made


@pytest.mark.skipif(not REAL.is_file(), reason="DMD_TEST_DATA does not name a folder of real data")
def test_the_settings_are_those_of_version_1_5():
    real = json.loads(REAL.read_text())
    assert {k: v for k, v in real.items() if not k.startswith("_")} == V1_5


@EACH
@pytest.mark.parametrize(("steps", "scale"), [(2, 1.0), (7, 7.5), (20, 7.5)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_trajectories_are_the_stock_pipeline_s(folders, name, steps, scale, prediction, rng):
    """All states between the steps, and the end. With PNDM the stock pipeline is given the noise that v means."""
    settings = V1_5 | {"prediction_type": "epsilon" if name == "pndm" else prediction}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        folders[prediction], scheduler=getattr(diffusers, STOCK[name]).from_config(settings), local_files_only=True
    ).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if settings["prediction_type"] != prediction:
        pipe.unet.register_forward_hook(noise_of_v)
    z = torch.randn(3, 4, 8, 8, generator=rng)
    told, theirs = [], []

    def record(pipe, step, index, kept):
        told.append(int(index))
        theirs.append(kept["latents"])
        return kept

    facts = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "latent"}
    pipe(PROMPTS, latents=z, callback_on_step_end=record, **facts)

    ours = stable_diffusion.load(folders[prediction])
    counting = Counting(ours.denoiser)
    seen = []
    guided = Guided(counting, scale, ours.null())
    guided.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    end = SAMPLERS[name][0](guided, z, steps, ours.encode(PROMPTS))
    assert counting.indices == told
    for state, expected in zip([*seen[1:], end], theirs, strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=5e-5)


def noise_of_v(unet, args, out):
    """alpha v + sigma x_t, at a UNet's inputs."""
    x_t, index = args[:2]
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[index]
    return (alpha_bar.sqrt().float() * out[0] + (1 - alpha_bar).sqrt().float() * x_t,)


@EACH
@pytest.mark.parametrize("steps", [2, 3, 7, 50])
def test_network_evaluations(name, steps, ring, rng):
    solver, evaluations = SAMPLERS[name]
    counting = Counting(ring(DDPM()))
    solver(counting, torch.randn(3, 2, generator=rng, dtype=torch.float64), steps, {})
    assert len(counting.indices) == evaluations(steps)


def error(solver, schedule, steps, ring, rng):
    """Rms error in data of rms 1: a mixture's samples against those of Heun's method with 250 steps.

    The leading grids begin lower, and leave the noise of entry 0: so does the reference, and the exact denoiser then
    takes that away.
    """
    z = torch.randn(128, 2, generator=rng.manual_seed(0), dtype=torch.float64)
    counting = Counting(ring(schedule))
    end = solver(counting, z, steps, {})
    if counting.indices[-1] == 1:
        end = ring(schedule)(end, torch.zeros(len(z)), {})
    fine = From(schedule.steps, schedule.beta_start, schedule.beta_end, counting.indices[0])
    truth = heun(ring(fine), z, 250, {})
    return float((end - truth).square().mean().sqrt())


@pytest.mark.parametrize(
    ("name", "few", "many"), [("pndm", 0.08, 0.002), ("ddim-leading", 0.2, 0.022), ("dpm-solver", 0.18, 0.02)]
)
def test_samples_approach_the_exact_solution(name, few, many, ring, rng):
    errors = [error(SAMPLERS[name][0], DDPM(), steps, ring, rng) for steps in (5, 10, 20, 50)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < few
    assert errors[-1] < many


@EACH
def test_the_table_is_the_denoiser_s(name, ring, rng):
    assert error(SAMPLERS[name][0], DDPM(500, 0.001, 0.03), 50, ring, rng) < 0.03


def test_pndm_keeps_its_order_with_differences_of_noise_only(ring, rng):
    """As `pndm` tells: those of v, which the stock pipeline takes where v is predicted, are hardly better than DDIM."""

    def of_v(denoiser, x, steps, cond):
        scheduler = diffusers.PNDMScheduler.from_config(V1_5 | {"prediction_type": "v_prediction"})
        scheduler.set_timesteps(steps)
        for index in scheduler.timesteps:
            t = (index / 999).float().expand(len(x))
            alpha, sigma = (value[:, None] for value in denoiser.schedule(t))
            x = scheduler.step((alpha * x - denoiser(x, t, cond)) / sigma, index, x).prev_sample
        return x

    ddim, noise, v = (error(s, DDPM(), 50, ring, rng) for s in (SAMPLERS["ddim-leading"][0], pndm, of_v))
    assert v > 5 * noise
    assert v > 0.6 * ddim


def test_one_step_of_dpm_solver_is_the_student_s(ring, rng):
    z = torch.randn(8, 2, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(dpm_solver(ring(DDPM()), z, 1, {}), one_step(ring(DDPM()), z, {}), rtol=0, atol=1e-6)


@EACH
def test_a_sampler_keeps_nothing_between_calls(name, ring, rng):
    solver, _ = SAMPLERS[name]
    z = torch.randn(8, 2, generator=rng, dtype=torch.float64)
    first = solver(ring(DDPM()), z, 6, {})
    solver(ring(DDPM()), -z, 4, {})
    assert torch.equal(solver(ring(DDPM()), z, 6, {}), first)


@EACH
def test_what_it_cannot_do_is_refused(name, ring):
    solver, _ = SAMPLERS[name]
    with pytest.raises(ValueError, match=r"the schedule is Karras\(.*need a DDPM table"):
        solver(ring(Karras()), torch.zeros(1, 2, dtype=torch.float64), 4, {})
    for steps in (0, 1000):
        with pytest.raises(ValueError, match=rf"steps is {steps}: .*Scheduler can make [12] to 999"):
            solver(ring(DDPM()), torch.zeros(1, 2, dtype=torch.float64), steps, {})


def test_pndm_needs_two_steps(ring):
    with pytest.raises(ValueError, match="steps is 1: PNDMScheduler can make 2 to 999"):
        pndm(ring(DDPM()), torch.zeros(1, 2, dtype=torch.float64), 1, {})
