"""The modality gap: CLIP puts images and texts into two cones, and a model that learns from one is asked from another.

Liang et al. 2022 (arXiv 2203.02053) describe it. Two remedies, alone or together: subtract each modality's mean, and
train with noise on the embeddings as LAFITE does (Zhou et al. 2022, arXiv 2111.13792), so that what separates an image
from its text is one more disturbance.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def noised(embedding: Tensor, noise: Tensor, share: float) -> Tensor:
    """normalise((1 - share) e + share n / |n|), LAFITE's fixed perturbation.

    Args:
        embedding: (B, D) of length one.
        noise: (B, D), normal numbers: their direction is uniform.
        share: a in [0, 1); 0 changes nothing.
    """
    return F.normalize((1.0 - share) * embedding + share * F.normalize(noise, dim=-1), dim=-1)


@dataclass(frozen=True, eq=False)
class Gap:
    """What is done to embeddings before a transformer sees them. Zero means and no noise leave them as they are.

    Attributes:
        image_mean: (D,), subtracted from embeddings of images.
        text_mean: (D,), subtracted from those of texts; None where it is needed and not known.
        noise: share of noise in training.
    """

    image_mean: Tensor
    text_mean: Tensor | None
    noise: float = 0.0

    @property
    def centres(self) -> bool:
        """Whether means are subtracted."""
        return bool(self.image_mean.any())

    def image(self, embedding: Tensor) -> Tensor:
        """Conditions of images' embeddings (B, D): length one."""
        return F.normalize(embedding - self.image_mean, dim=-1)

    def text(self, embedding: Tensor) -> Tensor:
        """Conditions of texts' embeddings (B, D): length one. Needs `text_mean`."""
        assert self.text_mean is not None  # callers refuse texts without
        return F.normalize(embedding - self.text_mean, dim=-1)

    def training(self, embedding: Tensor, noise: Tensor) -> Tensor:
        """What a transformer learns from: conditions of images' embeddings with noise (B, D) of normal numbers."""
        return noised(self.image(embedding), noise, self.noise)

    def to(self, device: torch.device) -> "Gap":
        text = None if self.text_mean is None else self.text_mean.to(device)
        return Gap(self.image_mean.to(device), text, self.noise)
