"""The losses of Distribution Matching Distillation (Yin et al., CVPR 2024, arXiv 2311.18828) as pure functions.

All take and return float32. Means run over every axis but the first for per-sample quantities, and over all axes for
losses, so that `lambda_reg = 0.25` weighs the same against any image size.
"""

import torch.nn.functional as F
from torch import Tensor


def normaliser(x: Tensor, x0_real: Tensor, floor: float = 1e-6) -> Tensor:
    """mean |x - x0_real| of each sample (DMD eq. 8), shape (B, 1, ...).

    `floor` only keeps a sample that the real score reproduces exactly from dividing by zero.
    """
    return (x - x0_real).abs().flatten(1).mean(1).clamp_min(floor).reshape(-1, *(1,) * (x.ndim - 1))


def matching_gradient(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """Gradient of the matching loss with respect to the student's sample x (DMD eq. 7 and 8; Algorithm 2).

    grad = (x0_fake - x0_real) / mean|x - x0_real|, the mean over each sample. In terms of scores this is
    w_t (s_fake - s_real) with w_t = sigma^2 / alpha / mean|x - x0_real|; like the authors' Algorithm 2 it leaves out
    the factor alpha_t that eq. 7 has on paper. Another member of the family (SiD, f-distill, ...) is another such
    function.

    Args:
        x: student samples (B, ...).
        x0_real, x0_fake: what the real (guided) and fake denoisers make of the diffused x, same shape.
    """
    return (x0_fake - x0_real) / normaliser(x, x0_real)


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient in x is `gradient / x.numel()` (Algorithm 2): mse(x, sg(x - gradient)) / 2."""
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def denoising_loss(x0_hat: Tensor, x0: Tensor, out: Tensor) -> Tensor:
    """The native training loss of a network with x0 = skip * x_t + out * F: mean(((x0_hat - x0) / out)^2) (DMD eq. 6).

    It is epsilon-MSE for epsilon networks, v-MSE for v, and EDM's lambda(sigma) weight for `karras`, because the
    network's target is affine in x0 with slope 1 / out.

    Args:
        x0_hat, x0: prediction and truth, (B, ...).
        out: the prediction's second coefficient, broadcastable against x0.
    """
    return (((x0_hat - x0) / out) ** 2).mean()


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Per-sample mean squared distance, shape (B,): the regression metric where no perceptual network is at hand."""
    return ((a - b) ** 2).flatten(1).mean(1)
