"""Denoisers: the posterior mean E[x0 | x_t]. Student, real score and fake score are all of this one type.

A prediction type is not a name but two coefficients, x0 = skip * x_t + out * F, as functions of (alpha, sigma); the
native training loss of any network follows from them (`dmd.losses.denoising_loss`).
"""

import abc
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dmd.noise import Schedule, expand

Cond = Mapping[str, Tensor]
"""What an image is conditioned on: batch-first tensors by name, handed to the network as keyword arguments."""

Prediction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(alpha, sigma) to (skip, out) of x0 = skip * x_t + out * F."""


def epsilon(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """F is the noise (Ho et al. 2020)."""
    return 1.0 / alpha, -sigma / alpha


def velocity(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """F is v = alpha * noise - sigma * x0 (Salimans & Ho 2022)."""
    norm = alpha**2 + sigma**2
    return alpha / norm, -sigma / norm


def flow(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """F is noise - x0 (rectified flow)."""
    return 1.0 / (alpha + sigma), -sigma / (alpha + sigma)


def sample(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """F is x0 itself."""
    return torch.zeros_like(alpha), torch.ones_like(alpha)


class karras:
    """EDM's preconditioning (arXiv 2206.00364, table 1), any alpha: c_skip and c_out for data of std `sigma_data`."""

    def __init__(self, sigma_data: float = 0.5):
        self.sigma_data = sigma_data

    def __call__(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        variance = (alpha * self.sigma_data) ** 2 + sigma**2
        return alpha * self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt()


class Denoiser(nn.Module, abc.ABC):
    """Posterior mean of the clean sample: forward(x_t, t, cond) -> x0, float32, shaped like x_t."""

    schedule: Schedule

    @abc.abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t of shape (B, ...), t of shape (B,) in [0, 1], cond with tensors of B rows; returns x0 like x_t."""


class NetworkDenoiser(Denoiser):
    """A network F(x_t, t, **cond) read through its prediction type: x0 = skip * x_t + out * F, in float32.

    Args:
        net: called as net(x_t, t, **cond). Adapters that scale the input or translate t live in `dmd.teachers`.
        schedule, prediction: how x_t was made and what F means.
        autocast: run the network (not the conversion) in this dtype; None keeps the network's own.
    """

    def __init__(self, net: nn.Module, schedule: Schedule, prediction: Prediction, autocast: torch.dtype | None = None):
        super().__init__()
        self.net = net
        self.schedule = schedule
        self.prediction = prediction
        self.autocast = autocast

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with torch.autocast(x_t.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            out_net = self.net(x_t, t, **cond)
        skip, out = self.coefficients(t, x_t)
        return skip * x_t + out * out_net.float()

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(skip, out) at times t, broadcastable against `like`, float32."""
        skip, out = self.prediction(*self.schedule(t))
        return expand(skip, like), expand(out, like)


class Guided(Denoiser):
    """Classifier-free guidance (Ho & Salimans 2022): x0 = uncond + scale * (cond - uncond).

    Scale 1 is conditional only and costs one call; otherwise both halves go through the network as one batch.

    Args:
        denoiser: the conditional denoiser.
        scale: guidance scale.
        null: the empty condition, tensors of one row.
    """

    def __init__(self, denoiser: Denoiser, scale: float, null: Cond):
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.scale = scale
        self.null = dict(null)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x0_cond, guidance = self.parts(x_t, t, cond)
        return x0_cond if guidance is None else x0_cond + guidance

    def parts(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """x0_cond and the guidance (scale - 1) (x0_cond - x0_uncond), whose sum is `forward`; None at scale 1."""
        if self.scale == 1.0:
            return self.denoiser(x_t, t, cond), None
        both = {k: torch.cat((self.null[k].to(v.device, v.dtype).expand_as(v), v)) for k, v in cond.items()}
        x0_uncond, x0_cond = self.denoiser(torch.cat((x_t, x_t)), torch.cat((t, t)), both).chunk(2)
        return x0_cond, (self.scale - 1.0) * (x0_cond - x0_uncond)


def score(x_t: Tensor, x0: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """grad log p_t(x_t) = (alpha * x0 - x_t) / sigma^2 (Tweedie; DMD eq. 4)."""
    alpha, sigma = schedule(t)
    return (expand(alpha, x_t) * x0 - x_t) / expand(sigma, x_t) ** 2


def predicted_noise(x_t: Tensor, x0: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The noise that, with x0, makes x_t: (x_t - alpha * x0) / sigma."""
    alpha, sigma = schedule(t)
    return (x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t)
