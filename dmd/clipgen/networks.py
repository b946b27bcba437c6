"""Small convolutional networks: an encoder from images to a coarse grid, a decoder back, and a patch discriminator.

With `patch=1`, four halvings, two blocks and attention these are the sizes of VQGAN (Esser et al. 2021, arXiv
2012.09841); small images save most of the arithmetic by `patch=2`, which folds squares of pixels into channels.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ConvSizes:
    """Sizes of an encoder, and of the decoder that is its mirror.

    Attributes:
        patch: side of the pixel squares that are folded into channels.
        widths: channels of each resolution, from fine to coarse.
        blocks: residual blocks of each resolution.
        groups: of the normalisations; divides all widths.
        attention: whether the coarsest resolution has attention.
    """

    patch: int
    widths: tuple[int, ...]
    blocks: int
    groups: int = 1
    attention: bool = False

    @property
    def reduction(self) -> int:
        """How many times fewer rows the grid has than the image."""
        return self.patch * 2 ** (len(self.widths) - 1)


class Block(nn.Module):
    """x + two normalised 3 x 3 convolutions, the second of which starts at zero."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """x + attention of one head over all places of the grid."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        found = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.out(found.transpose(1, 2).reshape(x.shape))


class Upsample(nn.Module):
    """Twice the rows and columns, then a 3 x 3 convolution."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _blocks(width: int, count: int, sizes: ConvSizes, coarsest: bool) -> list[nn.Module]:
    found: list[nn.Module] = [Block(width, sizes.groups) for _ in range(count)]
    return found + ([Attention(width, sizes.groups)] if coarsest and sizes.attention else [])


class Encoder(nn.Sequential):
    """Images (B, 3, H, W) in [-1, 1] to features (B, widths[-1], H / reduction, W / reduction)."""

    def __init__(self, sizes: ConvSizes):
        widths, last = sizes.widths, len(sizes.widths) - 1
        parts: list[nn.Module] = [nn.PixelUnshuffle(sizes.patch)]
        parts.append(nn.Conv2d(3 * sizes.patch**2, widths[0], 3, padding=1))
        for i, width in enumerate(widths):
            if i:
                parts.append(nn.Conv2d(widths[i - 1], width, 3, stride=2, padding=1))
            parts += _blocks(width, sizes.blocks, sizes, i == last)
        super().__init__(*parts, nn.GroupNorm(sizes.groups, widths[-1]), nn.SiLU())


class Decoder(nn.Module):
    """Features as of the encoder to images (B, 3, H, W), not clamped to [-1, 1].

    Attributes:
        last: the last convolution, at whose weights VQGAN balances its gradients.
    """

    def __init__(self, sizes: ConvSizes):
        super().__init__()
        widths = sizes.widths[::-1]
        parts: list[nn.Module] = [nn.Conv2d(widths[0], widths[0], 3, padding=1)]
        for i, width in enumerate(widths):
            if i:
                parts.append(Upsample(widths[i - 1], width))
            parts += _blocks(width, sizes.blocks + 1, sizes, i == 0)
        self.body = nn.Sequential(*parts, nn.GroupNorm(sizes.groups, widths[-1]), nn.SiLU())
        self.last = nn.Conv2d(widths[-1], 3 * sizes.patch**2, 3, padding=1)
        self.patch = sizes.patch

    def forward(self, features: Tensor) -> Tensor:
        return F.pixel_shuffle(self.last(self.body(features)), self.patch)


class PatchDiscriminator(nn.Sequential):
    """A score for each patch of images (B, 3, H, W): (B, 1, h, w); pix2pix's PatchGAN (Isola et al. 2017).

    Its normalisations are over each image by itself, so that a score depends on no other image of the batch.
    """

    def __init__(self, width: int, layers: int):
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        before = width
        for i in range(1, layers):
            after = width * min(2**i, 8)
            parts += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(1, after), nn.LeakyReLU(0.2)]
            before = after
        super().__init__(*parts, nn.Conv2d(before, 1, 3, padding=1))


def sizes_from(raw: dict[str, Any]) -> ConvSizes:
    """`ConvSizes` of a config.json, which has lists for tuples."""
    return ConvSizes(**raw | {"widths": tuple(raw["widths"])})
