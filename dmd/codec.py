"""Codecs: images in [-1, 1] to the latents that a denoiser sees, and back.

Networks may be bf16 or fp16; scaling and results are float32. A codec does not own its network's device, precision or
`requires_grad`, and gradients pass through both directions.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dmd import checkpoint

SLICE = 2**20
"""Pixels that autoencoders decode at a time, where no backward pass is to come: 4 images of 512 x 512. The largest
tensors of Stable Diffusion's decoder, 256 float32 channels of all pixels, then take 1 GiB each; no GPU needs more
images to be busy."""


class Codec(Protocol):
    """Pixels to latents and back.

    Attributes:
        factor: an image's height and width over those of its latents.
    """

    @property
    def factor(self) -> int: ...

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] to latents (B, c, h, w) of about unit variance, float32."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) to images (B, C, H, W), float32, not clamped to [-1, 1].

        Without gradients, many or large images are decoded in slices of the batch: memory does not grow with B but for
        the images themselves.
        """

    def recompute(self) -> None:
        """Keep little of `decode` for a backward pass and compute the rest again: the same gradients, less memory."""

    def digest(self) -> str:
        """Names what determines images: weights and scaling."""


def cast(x: Tensor, net: nn.Module) -> Tensor:
    """x in a network's precision. diffusers' own `net.dtype` looks at every module, a millisecond for a small UNet."""
    return x.to(next(net.parameters()).dtype)


def _in_slices(decode: Callable[[Tensor], Tensor], latents: Tensor, factor: int) -> Tensor:
    if torch.is_grad_enabled():
        return decode(latents)
    rows = max(1, SLICE // (latents.shape[-2] * latents.shape[-1] * factor**2))
    parts = [decode(part) for part in latents.split(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Identity:
    """Latents are the pixels themselves."""

    factor = 1

    def encode(self, images: Tensor) -> Tensor:
        return images.float()

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float()

    def recompute(self) -> None:
        """There is nothing to keep."""

    def digest(self) -> str:
        return "identity"


class KL:
    """A variational autoencoder: latents = scale * (posterior mean - shift), as Stable Diffusion defines them.

    Args:
        vae: diffusers' AutoencoderKL.
        scale, shift: its `scaling_factor` and `shift_factor` (0 where that is none).
    """

    def __init__(self, vae: Any, scale: float, shift: float = 0.0):
        self.vae = vae
        self.scale = scale
        self.shift = shift
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, images: Tensor) -> Tensor:
        mean = self.vae.encode(cast(images, self.vae)).latent_dist.mean
        return (mean.float() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return _in_slices(self._decode, latents, self.factor)

    def _decode(self, latents: Tensor) -> Tensor:
        raw = latents.float() / self.scale + self.shift
        return self.vae.decode(cast(raw, self.vae)).sample.float()

    def recompute(self) -> None:
        self.vae.enable_gradient_checkpointing()

    def digest(self) -> str:
        return f"{checkpoint.digest(self.vae)} / {self.scale!r} + {self.shift!r}"


class Tiny:
    """A distilled autoencoder (madebyollin/taesd): its latents are already those of the denoiser, up to a scale.

    Args:
        vae: diffusers' AutoencoderTiny.
        scale: its `scaling_factor`.
    """

    def __init__(self, vae: Any, scale: float = 1.0):
        self.vae = vae
        self.scale = scale
        self.factor = 2 ** (len(vae.config.decoder_block_out_channels) - 1)

    def encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(cast(images, self.vae)).latents.float() * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return _in_slices(self._decode, latents, self.factor)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(cast(latents.float() / self.scale, self.vae)).sample.float()

    def recompute(self) -> None:
        self.vae.enable_gradient_checkpointing()

    def digest(self) -> str:
        return f"{checkpoint.digest(self.vae)} / {self.scale!r}"
