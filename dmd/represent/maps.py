"""A data set on a plane: t-SNE or the first two principal components of its features, a dot for each image."""

import colorsys
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd.errors import InputError
from dmd.represent.pictures import components

Method = Literal["tsne", "pca"]
MOST = 3000
"""Images of a map; more are hard to see, and slow to lay out."""
LEGEND = 24
"""Classes that are named beside it; the others' dots are grey."""


def places(x: Tensor, method: Method, seed: int) -> Tensor:
    """Where each image lies, float64 (N, 2) in [0, 1], the longer side from 0 to 1.

    Args:
        x: features (N, D), which are normalised here.
        method: scikit-learn's t-SNE (van der Maaten and Hinton 2008) from the principal components on, or these alone.
        seed: of t-SNE.

    Raises:
        InputError: there are fewer than 3 images.
    """
    if len(x) < 3:
        raise InputError(f"a map of {len(x)} images is none: at least 3 are needed")
    z = F.normalize(x.double(), dim=1)
    if method == "pca":
        found = (z - z.mean(0)) @ components(z, 2).T
    else:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(z) - 1) / 3)
        init = ((z - z.mean(0)) @ components(z, 2).T).numpy()
        init = init / max(init[:, 0].std(), 1e-12) * 1e-4  # as scikit-learn scales its own
        layout = TSNE(perplexity=perplexity, init=init, learning_rate="auto", random_state=seed % 2**32)
        found = torch.from_numpy(layout.fit_transform(z.numpy())).double()
    low, high = found.amin(0), found.amax(0)
    return (found - low) / (high - low).max().clamp(min=1e-300)


def palette(count: int) -> list[tuple[int, int, int]]:
    """So many colours that differ in hue, and neighbours in brightness too."""
    hues = ((i * 0.61803398875) % 1.0 for i in range(count))
    found = [colorsys.hsv_to_rgb(h, (0.85, 0.6)[i % 2], (0.8, 0.95, 0.6)[i % 3]) for i, h in enumerate(hues)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in found]


def draw(at: Tensor, labels: Tensor, classes: Sequence[str], title: str, side: int = 800) -> Tensor:
    """A map with its legend: uint8 (3, H, W), on white.

    Args:
        at: as `places` gives them.
        labels: int64 (N,); the largest `LEGEND` classes have colours.
        classes: their names.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    counts = labels.bincount(minlength=len(classes))
    named = [c for c in counts.argsort(descending=True, stable=True).tolist() if counts[c]][:LEGEND]
    colour = dict(zip(sorted(named), palette(len(named)), strict=True))
    scale, margin, legend = 2, 40, 230  # drawn twice as large, for smooth dots
    page = Image.new("RGB", ((side + legend) * scale, side * scale), "white")
    pen = ImageDraw.Draw(page)
    span, radius = (side - 2 * margin) * scale, 3 * scale
    for (x, y), label in zip(at.tolist(), labels.tolist(), strict=True):
        left, top = margin * scale + span * x, margin * scale + span * (1 - y)
        pen.ellipse((left - radius, top - radius, left + radius, top + radius), colour.get(label, (190, 190, 190)))
    font = ImageFont.load_default(13 * scale)
    pen.text((margin * scale, 12 * scale), title, "black", font)
    for line, (label, shade) in enumerate(colour.items()):
        top = (margin + 24 * line) * scale
        pen.rectangle((side * scale, top, (side + 14) * scale, top + 14 * scale), shade)
        name = classes[label] if len(classes[label]) <= 24 else f"{classes[label][:22]}..."
        pen.text(((side + 22) * scale, top), name, "black", font)
    small = page.resize((side + legend, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)
