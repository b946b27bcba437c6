"""The deterministic samplers that users of Stable Diffusion run, as solvers: diffusers' schedulers and our denoisers.

Each solves the same ODE as `dmd.solvers`, on the time grid and with the last step of the stock pipeline, so a teacher
can be compared as its users know it. A call makes its own scheduler, since schedulers have state and solvers have not.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmd.denoiser import Cond, Denoiser, predicted_noise
from dmd.noise import DDPM, Schedule
from dmd.solvers import Solver

Reading = Callable[[Tensor, Tensor, Tensor, Schedule], Tensor]
"""(x_t, x0, t, schedule) to what a scheduler's `step` takes for the network's output."""


def pndm(denoiser: Denoiser, x: Tensor, steps: int, cond: Cond) -> Tensor:
    """PNDM without its Runge-Kutta steps, or PLMS (Liu et al. 2022): `steps` + 1 evaluations. Version 1.5's default.

    Shapes are those of `dmd.solvers.Solver`. The grid is "leading", which for few steps begins well below the noise
    that x has; the samples of PNDM and of `ddim_leading` keep the noise of the table's first entry, std 0.03.
    The differences are those of the noise, whatever the network predicts. The stock pipeline takes those of v where
    that is predicted, which costs the method its order: on a known distribution 50 steps then err 9 times as much.

    Raises:
        ValueError: the denoiser's schedule is not DDPM, or `steps` not between 2 and the length of its table less 1.
    """
    from diffusers import PNDMScheduler

    # the scheduler knows no x0 as the network's output
    kind = _scheduler(PNDMScheduler, denoiser, skip_prk_steps=True, prediction_type="epsilon", **LEADING)
    return _follow(kind, predicted_noise, denoiser, x, steps, cond, least=2)


def ddim_leading(denoiser: Denoiser, x: Tensor, steps: int, cond: Cond) -> Tensor:
    """DDIM with eta = 0 on the "leading" grid of version 1.5: `steps` evaluations. `dmd.solvers.ddim` is "trailing".

    Shapes and grid: see `pndm`.

    Raises:
        ValueError: the denoiser's schedule is not DDPM, or `steps` not between 1 and the length of its table less 1.
    """
    from diffusers import DDIMScheduler

    kind = _scheduler(DDIMScheduler, denoiser, clip_sample=False, prediction_type="sample", **LEADING)
    return _follow(kind, _as_it_is, denoiser, x, steps, cond)


def dpm_solver(denoiser: Denoiser, x: Tensor, steps: int, cond: Cond) -> Tensor:
    """DPM-Solver++(2M), multistep of second order (Lu et al. 2022, arXiv 2211.01095): `steps` evaluations.

    Shapes as `dmd.solvers.Solver`. The grid is even in the table, from its last entry, and the last step goes to no
    noise.

    Raises:
        ValueError: the denoiser's schedule is not DDPM, or `steps` not between 1 and the length of its table less 1.
    """
    from diffusers import DPMSolverMultistepScheduler

    kind = _scheduler(
        DPMSolverMultistepScheduler,
        denoiser,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        timestep_spacing="linspace",
        final_sigmas_type="zero",
        use_karras_sigmas=False,
        prediction_type="sample",
    )
    return _follow(kind, _as_it_is, denoiser, x, steps, cond)


LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
"""The time grid of version 1.5: it ends at the table's entry 1, and the step from there at entry 0."""


def _as_it_is(x_t: Tensor, x0: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    return x0


def _scheduler(kind: Any, denoiser: Denoiser, **settings: Any) -> Any:
    """A scheduler of diffusers with the denoiser's table."""
    table = denoiser.schedule
    if not isinstance(table, DDPM):
        raise ValueError(f"the schedule is {table}: samplers of Stable Diffusion need a DDPM table")
    return kind(
        num_train_timesteps=table.steps,
        beta_start=table.beta_start,
        beta_end=table.beta_end,
        beta_schedule="scaled_linear",
        **settings,
    )


def _follow(
    scheduler: Any, reading: Reading, denoiser: Denoiser, x: Tensor, steps: int, cond: Cond, least: int = 1
) -> Tensor:
    """The stock pipeline's loop. Indices stay on the CPU, where the scheduler looks them up without waiting for x."""
    last = len(scheduler) - 1
    if not least <= steps <= last:
        raise ValueError(f"steps is {steps}: {type(scheduler).__name__} can make {least} to {last}")
    scheduler.set_timesteps(steps)
    times = (scheduler.timesteps.double() / last).to(x.device, torch.float32)
    for index, t in zip(scheduler.timesteps, times, strict=True):
        t = t.expand(len(x))
        x0 = denoiser(x, t, cond)
        x = scheduler.step(reading(x, x0, t, denoiser.schedule), index, x, return_dict=False)[0]
    return x


SAMPLERS: dict[str, tuple[Solver, Callable[[int], int]]] = {
    "pndm": (pndm, lambda n: n + 1),
    "ddim-leading": (ddim_leading, lambda n: n),
    "dpm-solver": (dpm_solver, lambda n: n),
}
"""Sampler and its network evaluations for n steps, by the option's value."""
