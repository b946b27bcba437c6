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
        groups: of the normalisations; divides all widths. With none each place is normalised by itself, so that what
            the encoder says of a place depends on what is near it alone: GroupNorm's statistics are of the whole image.
        attention: whether the coarsest resolution has attention.
        square_blocks: blocks of an encoder that sees each square of `reduction` pixels by itself; 0 for one that is the
            decoder's mirror.
    """

    patch: int
    widths: tuple[int, ...]
    blocks: int
    groups: int = 1
    attention: bool = False
    square_blocks: int = 0

    @property
    def reduction(self) -> int:
        """How many times fewer rows the grid has than the image."""
        return self.patch * 2 ** (len(self.widths) - 1)


def norm(width: int, groups: int) -> nn.Module:
    """GroupNorm of so many groups; for none, LayerNorm over the channels of each place by itself."""
    from timm.layers import LayerNorm2d  # here, since timm takes a second to import

    return nn.GroupNorm(groups, width) if groups else LayerNorm2d(width, eps=1e-5)


class Block(nn.Module):
    """x + two normalised convolutions, the second of which starts at zero."""

    def __init__(self, width: int, groups: int, kernel: int = 3):
        super().__init__()
        self.norm1, self.norm2 = norm(width, groups), norm(width, groups)
        self.conv1 = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """x + attention of one head over all places of the grid."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = norm(width, groups)
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
        super().__init__(*parts, norm(widths[-1], sizes.groups), nn.SiLU())


class SquareEncoder(nn.Sequential):
    """Images (B, 3, H, W) in [-1, 1] to features (B, widths[-1], H / reduction, W / reduction) as `Encoder`'s, but each
    is of its own square of pixels and of nothing beside it: the same square has the same features wherever it is."""

    WIDTH = 256  # of its blocks, whose convolutions are 1 x 1

    def __init__(self, sizes: ConvSizes):
        first = nn.Conv2d(3 * sizes.reduction**2, self.WIDTH, 1)
        blocks = [Block(self.WIDTH, 0, kernel=1) for _ in range(sizes.square_blocks)]
        last = nn.Conv2d(self.WIDTH, sizes.widths[-1], 1)
        super().__init__(nn.PixelUnshuffle(sizes.reduction), first, *blocks, norm(self.WIDTH, 0), nn.SiLU(), last)


def encoder(sizes: ConvSizes) -> nn.Sequential:
    """The encoder of these sizes."""
    return SquareEncoder(sizes) if sizes.square_blocks else Encoder(sizes)


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
        self.body = nn.Sequential(*parts, norm(widths[-1], sizes.groups), nn.SiLU())
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
