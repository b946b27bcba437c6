"""How different the images of one caption are: what multi-positive learning lives from, and one-step students may lose.

Two figures on one network, LPIPS's backbone: the mean cosine distance of its deepest features, and LPIPS itself, both
over all pairs of images of a caption. They bear the backbone's name and compare only with figures of the same one.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd.metrics.manifold import diversity
from dmd.metrics.perceptual import Backbone, lpips_network

LEAST = 64
"""Pixels to which smaller images are enlarged, since the backbones halve them five times."""


@dataclass(frozen=True)
class Diversity:
    """Attributes:
    feature_cosine: mean of 1 - cos over the pairs within a caption, in [0, 2]; 0 if all are alike.
    lpips: mean LPIPS over the same pairs.
    """

    feature_cosine: float
    lpips: float


class CaptionDiversity:
    """Measures sets of images.

    Args:
        backbone, weights: as `dmd.metrics.perceptual.lpips_distance`, which also says what is raised.
    """

    def __init__(self, backbone: Backbone, weights: Path | None, device: torch.device):
        self.name = f"LPIPS-{backbone}"
        self._net, self._device = lpips_network(backbone, weights, device), device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Diversity:
        """Of C captions with m images each: (C, m, 1 or 3, H, W) in [-1, 1], m >= 2.

        Raises:
            ValueError: fewer than two images of a caption.
        """
        captions, replicas = images.shape[:2]
        if replicas < 2:
            raise ValueError(f"there are {replicas} images of a caption: at least 2 are compared")
        features, distances = [], []
        first, second = torch.triu_indices(replicas, replicas, 1)
        for group in images:
            x = group.to(self._device).float().clamp(-1, 1).expand(-1, 3, -1, -1)
            if min(x.shape[-2:]) < LEAST:
                x = F.interpolate(x, (LEAST, LEAST), mode="bilinear", antialias=False)
            deepest = self._net.net(self._net.scaling_layer(x))[-1]
            features.append(deepest.mean((2, 3)).cpu())
            distances.append(self._net(x[first], x[second]).flatten().cpu())
        groups = torch.arange(captions).repeat_interleave(replicas)
        return Diversity(diversity(torch.cat(features), groups), torch.cat(distances).double().mean().item())
