"""Training a small teacher: plain denoising score matching on real images (EDM, arXiv 2206.00364)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd.batches import TeachBatch
from dmd.denoiser import NetworkDenoiser
from dmd.distill import Update
from dmd.ema import Ema
from dmd.losses import denoising_loss
from dmd.noise import Karras


def lognormal_times(schedule: Karras, mean: float = -1.2, std: float = 1.2) -> Callable[[Tensor], Tensor]:
    """EDM's training distribution, ln sigma ~ N(mean, std^2), as a map from U(0, 1) to t."""

    def times(u: Tensor) -> Tensor:
        normal = torch.special.ndtri(u.double())
        return schedule.inverse(torch.exp(mean + std * normal))

    return times


class Teacher:
    """A `dmd.run.Task`: one denoising update a step."""

    def __init__(self, denoiser: NetworkDenoiser, optimizer: Optimizer, ema: Ema, max_norm: float, update: Update):
        self.denoiser = denoiser
        self.optimizer = optimizer
        self.ema = ema
        self.max_norm = max_norm
        self.update = update

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.denoiser.net, "ema": self.ema.shadow}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"net": self.optimizer}

    def step(self, step: int, batches: Sequence[TeachBatch]) -> dict[str, Tensor]:
        """One update over the micro-batches. Raises `NotFinite` (by `update`) before a bad one."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=batches[0].x0.device)
        for b in batches:
            x_t = self.denoiser.schedule.diffuse(b.x0, b.noise, b.t)
            _, out = self.denoiser.coefficients(b.t, x_t)
            loss = denoising_loss(self.denoiser(x_t, b.t, b.cond), b.x0, out) / len(batches)
            loss.backward()
            total = total + loss.detach()
        figures = {"loss/denoising": total}
        figures["grad/net"] = self.update(list(self.denoiser.net.parameters()), self.max_norm, figures)
        self.optimizer.step()
        self.ema.update(self.denoiser.net, step)
        return figures
