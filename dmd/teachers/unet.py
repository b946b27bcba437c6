"""A small class-conditional UNet for pixels, with the preconditioning of EDM (Karras et al. 2022, arXiv 2206.00364)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd.noise import Schedule, expand


class Block(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution twice, the second scaled and shifted by the embedding, around a skip."""

    def __init__(self, channels_in: int, channels_out: int, channels_emb: int):
        super().__init__()
        self.norm0 = nn.GroupNorm(min(32, channels_in // 4), channels_in)
        self.conv0 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.affine = nn.Linear(channels_emb, 2 * channels_out)
        self.norm1 = nn.GroupNorm(min(32, channels_out // 4), channels_out)
        self.conv1 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        nn.init.zeros_(self.conv1.weight)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(torch.addcmul(shift, self.norm1(h), scale + 1)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over pixels with heads of 64 channels or fewer, around a skip."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(1, channels // 64)
        self.norm = nn.GroupNorm(min(32, channels // 4), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(out.transpose(-1, -2).reshape(b, c, h, w))


class Stage(nn.Module):
    """Blocks of one resolution, each followed by attention where asked."""

    def __init__(self, sizes: list[tuple[int, int]], channels_emb: int, attention: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(i, o, channels_emb) for i, o in sizes)
        self.attentions = nn.ModuleList(Attention(o) if attention else nn.Identity() for _, o in sizes)

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor] | None = None) -> list[Tensor]:
        """The output of every block; on the way up each block takes the last of `skips` off the list as well."""
        outputs = []
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x if skips is None else torch.cat((x, skips.pop()), dim=1), emb))
            outputs.append(x)
        return outputs


class UNet(nn.Module):
    """F(x, clock, label): images (B, C, H, W), clock (B,), label (B,) int64 in [0, classes]; `classes` means "none".

    Args:
        in_channels: C.
        classes: number of labels; one more row is learnt for the empty condition.
        width: channels of the first resolution.
        multipliers: channels of each resolution, as multiples of `width`; resolutions halve from one to the next.
        blocks: blocks per resolution on the way down, and on the way up (there one more at the first resolution).
        attention: whether each resolution has attention.
    """

    frequencies: Tensor

    def __init__(
        self,
        in_channels: int,
        classes: int,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 2,
        attention: tuple[bool, ...] = (False, True),
    ):
        super().__init__()
        emb = 4 * width
        widths = [width * m for m in multipliers]
        self.register_buffer("frequencies", torch.exp2(torch.linspace(-2.0, 5.0, width // 2)), persistent=False)
        self.embed_clock = nn.Linear(width, emb)
        self.embed_label = nn.Embedding(classes + 1, emb)
        self.embed_out = nn.Linear(emb, emb)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)

        self.down = nn.ModuleList()
        skips, current = [width], width
        for w, attend in zip(widths, attention, strict=True):
            sizes = [(current if i == 0 else w, w) for i in range(blocks)]
            self.down.append(Stage(sizes, emb, attend))
            skips += [w] * blocks
            current = w
        self.middle = Stage([(current, current)], emb, attention[-1])
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            sizes = []
            for _ in range(blocks + (level == 0)):  # the one more block takes the skip of conv_in
                sizes.append((current + skips.pop(), widths[level]))
                current = widths[level]
            self.up.append(Stage(sizes, emb, attention[level]))
        self.norm_out = nn.GroupNorm(min(32, current // 4), current)
        self.conv_out = nn.Conv2d(current, in_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor, clock: Tensor, label: Tensor) -> Tensor:
        angle = clock[:, None] * self.frequencies * math.pi
        emb = self.embed_clock(torch.cat((angle.cos(), angle.sin()), dim=1)) + self.embed_label(label)
        emb = F.silu(self.embed_out(F.silu(emb)))
        x = self.conv_in(x)
        skips = [x]
        for i, stage in enumerate(self.down):
            x = F.avg_pool2d(x, 2) if i > 0 else x
            skips += stage(x, emb)
            x = skips[-1]
        x = self.middle(x, emb)[-1]
        for i, stage in enumerate(self.up):
            x = F.interpolate(x, scale_factor=2, mode="nearest") if i > 0 else x
            x = stage(x, emb, skips)[-1]
        return self.conv_out(F.silu(self.norm_out(x)))


class KarrasNet(nn.Module):
    """Adapter: scales the input by c_in and tells the UNet c_noise = ln(sigma / alpha) / 4 (EDM, table 1).

    Use with `dmd.denoiser.karras(sigma_data)` as the prediction.
    """

    def __init__(self, unet: nn.Module, schedule: Schedule, sigma_data: float):
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.sigma_data = sigma_data

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        alpha, sigma = self.schedule(t)
        c_in = (alpha**2 * self.sigma_data**2 + sigma**2).rsqrt()
        return self.unet(expand(c_in, x_t) * x_t, 0.25 * torch.log(sigma / alpha), label)
