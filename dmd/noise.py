"""Noise schedules: x_t = alpha * x0 + sigma * noise, with t in [0, 1] and t = 1 the noisiest.

A schedule is a value: a frozen dataclass that maps t to (alpha, sigma). One time axis serves every teacher, so the
paper's "t from 0.02 T to 0.98 T" is `t ~ U(0.02, 0.98)` for all of them, and the student always runs at t = 1.
A network's own clock (integer steps, sigma, 1000 s) is the business of its adapter in `dmd.teachers`.
"""

import abc
import functools
from dataclasses import dataclass

import torch
from torch import Tensor


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Append axes to (B,) `value` until it broadcasts against `like` of shape (B, ...)."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


class Schedule(abc.ABC):
    """x_t = alpha * x0 + sigma * noise for t from 0 (cleanest) to 1 (noisiest)."""

    @abc.abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Times (B,) in [0, 1] to (alpha, sigma), each (B,) float32; computed in float64."""

    def diffuse(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noise x0 of shape (B, ...) to time t of shape (B,)."""
        alpha, sigma = self(t)
        return expand(alpha, x0) * x0 + expand(sigma, x0) * noise

    def start(self, noise: Tensor) -> Tensor:
        """Where sampling starts at t = 1: unit noise as the teacher's stock sampler scales it."""
        return noise

    def times(self, steps: int) -> Tensor:
        """(steps,) float64 falling times from 1 at which a solver calls the denoiser; after the last it is clean."""
        return 1.0 - torch.arange(steps, dtype=torch.float64) / steps


@functools.cache
def _ddpm_alpha_bar(steps: int, beta_start: float, beta_end: float) -> Tensor:
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


@dataclass(frozen=True)
class DDPM(Schedule):
    """The variance-preserving table of Stable Diffusion ("scaled linear"; Ho et al. 2020, Rombach et al. 2022).

    The table is not interpolated: the noise level and the timestep that the network is told come from one `index(t)`.
    """

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def index(self, t: Tensor) -> Tensor:
        """Nearest table entry, int64 in [0, steps)."""
        return torch.round(t.double() * (self.steps - 1)).long()

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = _ddpm_alpha_bar(self.steps, self.beta_start, self.beta_end).to(t.device)[self.index(t)]
        return alpha_bar.sqrt().float(), (1.0 - alpha_bar).sqrt().float()

    def times(self, steps: int) -> Tensor:
        """ "Trailing" spacing (Lin et al. 2023): it starts at the last table entry, where the student runs too."""
        index = torch.round(self.steps * super().times(steps)) - 1
        return index / (self.steps - 1)


@dataclass(frozen=True)
class Karras(Schedule):
    """Variance exploding, sigma on the rho ramp of Karras et al. 2022 (arXiv 2206.00364, eq. 5); alpha = 1."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma = ((low + t.double() * (high - low)) ** self.rho).float()
        return torch.ones_like(sigma), sigma

    def inverse(self, sigma: Tensor) -> Tensor:
        """The time t in [0, 1] of a noise level, clamped to the schedule's range."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (((sigma.double() ** (1 / self.rho)) - low) / (high - low)).clamp(0.0, 1.0).float()

    def start(self, noise: Tensor) -> Tensor:
        return self.sigma_max * noise

    def times(self, steps: int) -> Tensor:
        """sigma_max to sigma_min in `steps` levels (arXiv 2206.00364, eq. 5); sigma = 0 follows."""
        return torch.linspace(1.0, 0.0, steps, dtype=torch.float64)


@dataclass(frozen=True)
class Linear(Schedule):
    """Rectified flow (Liu et al. 2022; Esser et al. 2024): alpha = 1 - s, sigma = s,
    s = shift t / (1 + (shift - 1) t)."""

    shift: float = 1.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        s = self.shift * t / (1.0 + (self.shift - 1.0) * t)
        return (1.0 - s).float(), s.float()
