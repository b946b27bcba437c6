"""A Gaussian mixture with its exact denoiser: the teacher whose score is known in closed form."""

import math

import torch
from torch import Tensor

from dmd.denoiser import Cond, Denoiser
from dmd.noise import Schedule


class MixtureDenoiser(Denoiser):
    """E[x0 | x_t] for x0 ~ sum_k weights_k N(means_k, std^2 I).

    Args:
        schedule: how x_t is made from x0.
        means: (K, D).
        std: one standard deviation for all components.
        weights: (K,), positive; normalised here. Equal if left out.
    """

    means: Tensor
    log_weights: Tensor

    def __init__(self, schedule: Schedule, means: Tensor, std: float, weights: Tensor | None = None):
        super().__init__()
        weights = torch.ones(len(means)) if weights is None else weights
        self.schedule = schedule
        self.std = std
        self.register_buffer("means", means)
        self.register_buffer("log_weights", torch.log(weights / weights.sum()).to(means))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Exact posterior mean; x_t (B, D), t (B,). `cond` is not used."""
        alpha, sigma, variance, distance = self._components(x_t, t)
        responsibility = torch.softmax(self.log_weights - 0.5 * (distance**2).sum(-1) / variance, dim=-1)  # (B, K)
        gain = alpha * self.std**2 / variance  # (B, 1)
        posterior = self.means + gain[..., None] * distance  # (B, K, D)
        return (responsibility[..., None] * posterior).sum(1)

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p_t(x_t), shape (B,)."""
        _, _, variance, distance = self._components(x_t, t)
        exponent = -0.5 * (distance**2).sum(-1) / variance - 0.5 * x_t.shape[-1] * torch.log(2 * math.pi * variance)
        return torch.logsumexp(self.log_weights + exponent, dim=-1)

    def draw(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """Samples of x0 (B, D) from U[0, 1) numbers (B,) and unit normals (B, D)."""
        cumulative = self.log_weights.exp().cumsum(0)[:-1].contiguous()
        return self.means[torch.bucketize(uniform, cumulative, right=True)] + self.std * normal

    def _components(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, variance of x_t within a component, each (B, 1); x_t minus alpha * means, (B, K, D)."""
        alpha, sigma = (v[:, None].to(x_t) for v in self.schedule(t))
        variance = (alpha * self.std) ** 2 + sigma**2
        return alpha, sigma, variance, x_t[:, None, :] - alpha[..., None] * self.means
