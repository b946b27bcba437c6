"""How well images fit their captions: the cosine of CLIP's embeddings of both (Hessel et al. 2021, arXiv 2104.08718).

The figure is the plain cosine, about 0.3 for good images, as the papers on one-step students print it; Hessel's own
score is 2.5 times its positive part. It depends on the CLIP, whose name stands beside it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dmd.metrics.clip import PretrainedClip
from dmd.metrics.protocols import Step, as_it_is
from dmd.metrics.sources import Pixels


@torch.no_grad()
def of_tensors(clip: PretrainedClip, images: Tensor, captions: Sequence[str]) -> Tensor:
    """Cosine of each image (B, 1 or 3, H, W) in [-1, 1] and its caption: (B,) float32 on the CLIP's device.

    Raises:
        ValueError: counts differ.
    """
    _check_counts(len(images), len(captions))
    return (clip.images(images) * clip.texts(captions)).sum(-1)


def of_pixels(
    clip: PretrainedClip, images: Sequence[Pixels], captions: Sequence[str], prefix: str = "", before: Step = as_it_is
) -> Tensor:
    """Cosine of each uint8 image (H, W, 1 or 3) and its caption: (B,) float32 on the CPU.

    Args:
        prefix: put before every caption.
        before: done to each image before the CLIP's own preparation.

    Raises:
        ValueError: counts differ.
    """
    _check_counts(len(images), len(captions))
    asked = clip.texts([prefix + caption for caption in captions])
    return (clip.pixels([before(image) for image in images]) * asked).sum(-1).cpu()


def _check_counts(images: int, captions: int) -> None:
    if images != captions:
        raise ValueError(f"there are {images} images but {captions} captions: each image needs one")
