"""Deterministic samplers of the probability-flow ODE, for any Denoiser and any Schedule.

Along the ODE dx = x0 d(alpha) + noise d(sigma), with x0 and noise the denoiser's. Both solvers discretise that, so they
need no sigma / alpha, which is infinite for flow matching at t = 1. On a Karras schedule alpha is constant and Heun's
method is Algorithm 1 of EDM; on a linear one it is Heun's method on the flow's velocity.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dmd.denoiser import Cond, Denoiser, predicted_noise
from dmd.noise import expand

Solver = Callable[[Denoiser, Tensor, int, Cond], Tensor]
"""(denoiser, start x (B, ...) at t = 1, steps, cond) to x0 (B, ...)."""


def one_step(student: Denoiser, z: Tensor, cond: Cond) -> Tensor:
    """The student's sample from unit noise z (B, ...): its denoiser at t = 1 (DMD section 3.1)."""
    return student(student.schedule.start(z), torch.ones(len(z), device=z.device), cond)


def ddim(denoiser: Denoiser, x: Tensor, steps: int, cond: Cond) -> Tensor:
    """DDIM with eta = 0 (Song et al. 2021), first order: `steps` evaluations."""
    return _integrate(denoiser, x, steps, cond, trapezoid=False)


def heun(denoiser: Denoiser, x: Tensor, steps: int, cond: Cond) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, Algorithm 1): 2 * steps - 1 evaluations."""
    return _integrate(denoiser, x, steps, cond, trapezoid=True)


def _integrate(denoiser: Denoiser, x: Tensor, steps: int, cond: Cond, trapezoid: bool) -> Tensor:
    if steps < 1:
        raise ValueError(f"steps is {steps}: a solver needs at least 1")
    schedule = denoiser.schedule
    times = schedule.times(steps).to(x.device, torch.float32)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        t, t_next = t.expand(len(x)), t_next.expand(len(x))
        x0 = denoiser(x, t, cond)
        noise = predicted_noise(x, x0, t, schedule)
        d_alpha, d_sigma = (expand(b - a, x) for a, b in zip(schedule(t), schedule(t_next), strict=True))
        x_next = x + d_alpha * x0 + d_sigma * noise
        if trapezoid:
            x0_next = denoiser(x_next, t_next, cond)
            noise_next = predicted_noise(x_next, x0_next, t_next, schedule)
            x_next = x + 0.5 * d_alpha * (x0 + x0_next) + 0.5 * d_sigma * (noise + noise_next)
        x = x_next
    return denoiser(x, times[-1].expand(len(x)), cond)  # the step to alpha = 1, sigma = 0
