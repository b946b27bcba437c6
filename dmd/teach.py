"""Training a small teacher: plain denoising score matching (EDM, arXiv 2206.00364), and the autoencoder and text
encoder of a latent one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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


@dataclass(frozen=True)
class ImageBatch:
    """Images (B, 3, H, W) in [-1, 1], and noise (B, c, h, w) for their latents."""

    images: Tensor
    noise: Tensor


class Autoencoding:
    """A `dmd.run.Task`: one update of a variational autoencoder a step (Kingma & Welling 2014; Rombach et al. 2022).

    The loss is mean |x - x_hat| + mean (x - x_hat)^2 + kl_weight * KL(q(z|x) || N(0, I)) / dim(z): the first term for
    sharp edges, the second against a few pixels that are far off. Worlds of photographs need a perceptual and an
    adversarial term besides, which flat shapes do without.

    Args:
        vae: diffusers' AutoencoderKL.
        kl_weight: small, since latents are only to stay near unit scale and smooth.
        jitter: standard deviation of noise on the latents besides the posterior's.
    """

    def __init__(
        self, vae: Any, optimizer: Optimizer, ema: Ema, kl_weight: float, jitter: float, max_norm: float,
        update: Update,
    ):  # fmt: skip
        self.vae = vae.train()
        self.optimizer = optimizer
        self.ema = ema
        self.kl_weight = kl_weight
        self.jitter = jitter
        self.max_norm = max_norm
        self.update = update

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.vae, "ema": self.ema.shadow}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"net": self.optimizer}

    def step(self, step: int, batches: Sequence[ImageBatch]) -> dict[str, Tensor]:
        """One update over the micro-batches. Raises `NotFinite` (by `update`) before a bad one."""
        self.optimizer.zero_grad()
        rows = []
        for b in batches:
            posterior = self.vae.encode(b.images).latent_dist
            std = (posterior.var + self.jitter**2).sqrt()
            error = self.vae.decode(posterior.mean + std * b.noise).sample - b.images
            l1, l2, kl = error.abs().mean(), error.square().mean(), posterior.kl().mean() / b.noise[0].numel()
            ((l1 + l2 + self.kl_weight * kl) / len(batches)).backward()
            rows.append(torch.stack((l1, l2, kl)).detach())
        figures = dict(zip(("loss/l1", "loss/l2", "loss/kl"), torch.stack(rows).mean(0), strict=True))
        figures["grad/net"] = self.update(list(self.vae.parameters()), self.max_norm, figures)
        self.optimizer.step()
        self.ema.update(self.vae, step)
        return figures


@dataclass(frozen=True)
class TextBatch:
    """Tokens (B, L) of captions, and the right answer to each of Q questions about each, (B, Q); both int64."""

    tokens: Tensor
    answers: Tensor


class Describing:
    """A `dmd.run.Task`: one update of a text encoder that answers questions about its captions, by cross-entropy.

    Args:
        describer: see `dmd.teachers.miniature.Describer`.
    """

    def __init__(self, describer: nn.Module, optimizer: Optimizer, ema: Ema, max_norm: float, update: Update):
        self.describer = describer.train()
        self.optimizer = optimizer
        self.ema = ema
        self.max_norm = max_norm
        self.update = update

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.describer, "ema": self.ema.shadow}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"net": self.optimizer}

    def step(self, step: int, batches: Sequence[TextBatch]) -> dict[str, Tensor]:
        """One update over the micro-batches. Raises `NotFinite` (by `update`) before a bad one."""
        self.optimizer.zero_grad()
        rows = []
        for b in batches:
            scores, row = self.describer(b.tokens)
            wanted = b.answers[row].T
            loss = torch.stack([F.cross_entropy(s, w) for s, w in zip(scores, wanted, strict=True)]).mean()
            (loss / len(batches)).backward()
            right = torch.stack([s.argmax(1) == w for s, w in zip(scores, wanted, strict=True)]).all(0)
            rows.append(torch.stack((loss.detach(), right.float().mean())))
        figures = dict(zip(("loss/describing", "right"), torch.stack(rows).mean(0), strict=True))
        figures["grad/net"] = self.update(list(self.describer.parameters()), self.max_norm, figures)
        self.optimizer.step()
        self.ema.update(self.describer, step)
        return figures
