"""Pictures of patch tokens: what a network takes for alike has the same colour.

The tokens of several images of one class are projected on their principal components. The first tells foreground from
background; three components of the foreground alone are red, green and blue (DINOv2, arXiv 2304.07193, figure 1;
SynCLR, arXiv 2312.17742, figure 5).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd.errors import InputError

BACKGROUND = 24
"""Level of the background's three colours."""


def components(x: Tensor, count: int) -> Tensor:
    """The first principal components of features (N, D): unit vectors (count, D), float64.

    Their signs are such that the largest entry of each is positive. Where there are fewer directions than asked for,
    the rest are 0.
    """
    centred = x.double() - x.double().mean(0)
    _, values, rows = torch.linalg.svd(centred, full_matrices=False)
    there = rows[: min(count, int((values > 1e-10 * values[:1].clamp(min=1e-300)).sum()))]
    largest = there.gather(1, there.abs().argmax(1, keepdim=True))
    return F.pad(there * largest.sign(), (0, 0, 0, count - len(there)))


def foreground(tokens: Tensor) -> Tensor:
    """Which patches show the thing and not what is around it: bool (B, rows, columns).

    Those on one side of the mean along the first component; the side that has less of the images' border.

    Args:
        tokens: (B, rows, columns, D).

    Raises:
        InputError: the grid is too coarse to have an inside and a border.
    """
    _, rows, columns, _ = tokens.shape
    if min(rows, columns) < 3:
        raise InputError(
            f"the network leaves {rows} x {columns} tokens of an image, too few for a picture: give a larger image size"
        )
    flat = tokens.flatten(0, 2).double()
    along = (flat - flat.mean(0)) @ components(flat, 1)[0]
    front = (along > 0).unflatten(0, tokens.shape[:3])
    border = torch.ones(rows, columns, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return front if front[:, border].double().mean() <= front[:, ~border].double().mean() else ~front


def colours(tokens: Tensor) -> Tensor:
    """Three components of the foreground's tokens as red, green and blue: uint8 (B, 3, rows, columns).

    One projection for all images, so that equal colours mean the same in all of them. Each component goes from the
    darkest to the brightest level.

    Raises:
        InputError: the tokens are not finite, or the grid is too coarse.
    """
    if not tokens.isfinite().all():
        raise InputError("patch tokens are not finite, so they have no picture: the network's weights are broken")
    front = foreground(tokens)
    shown = tokens[front].double()
    found = torch.full((*tokens.shape[:3], 3), BACKGROUND, dtype=torch.uint8)
    if len(shown):
        along = (shown - shown.mean(0)) @ components(shown, 3).T
        low, high = along.amin(0), along.amax(0)
        scaled = (along - low) / torch.where(high > low, high - low, torch.ones_like(high))
        found[front] = (scaled * 255).round().to(torch.uint8)
    return found.permute(0, 3, 1, 2)


def page(images: Tensor, pictures: Tensor, columns: int, side: int = 96) -> Tensor:
    """Images and their token pictures in turns, a row of each: uint8 (3, H, W).

    Args:
        images: uint8 (N, 1 or 3, h, w), N a multiple of `columns`.
        pictures: uint8 (N, 3, rows, columns).
        columns: images in a row.
        side: height and width of each in the page.
    """
    gap, parts = 2, []
    for start in range(0, len(images), columns):
        for row in (images[start : start + columns].expand(-1, 3, -1, -1), pictures[start : start + columns]):
            large = F.interpolate(row.float(), (side, side), mode="nearest").to(torch.uint8)
            parts.append(F.pad(large, (0, gap, 0, gap), value=255).permute(1, 2, 0, 3).flatten(2))
    return torch.cat(parts, dim=1)
