"""How an image becomes a network's input, and the protocols by which published figures were measured.

A distance is comparable with another only where network, resizing, reference and number of samples are the same, so a
protocol fixes the first two, and says which number its figures are published with.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmd.errors import InputError
from dmd.metrics.sources import Pixels

Prepare = Callable[[Pixels], NDArray[np.float32]]
"""An image (H, W, 1 or 3) to a network's input: float32 (C, h, w), 0 to 255."""

Step = Callable[[Pixels], Pixels]
"""What is done to an image before: (H, W, 1 or 3) uint8 to another."""


def as_colour(image: Pixels) -> Pixels:
    """(H, W, 3); grey is repeated."""
    return np.broadcast_to(image, (*image.shape[:2], 3))


def as_it_is(image: Pixels) -> Pixels:
    """Nothing is done."""
    return image


def lanczos_square(size: int) -> Step:
    """Crop the middle square of an image's shorter side, and resize it by Pillow's Lanczos to size x size, 256 levels.

    As GigaGAN and DMD2 prepare COCO's photographs and 512 px samples (`eval_res` 256).
    """
    from PIL import Image

    def prepare(image: Pixels) -> Pixels:
        height, width = image.shape[:2]
        side = min(height, width)
        # torchvision's center_crop rounds a half to even
        top, left = round((height - side) / 2), round((width - side) / 2)
        square = np.ascontiguousarray(as_colour(image)[top : top + side, left : left + side])
        return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS))

    return prepare


def bicubic(height: int, width: int) -> Prepare:
    """Resize each channel by Pillow's antialiased bicubic in floating point, without rounding to 256 levels.

    What clean-fid does (Parmar et al. 2022, arXiv 2104.11222); sides are scaled each by itself.
    """
    from PIL import Image

    def prepare(image: Pixels) -> NDArray[np.float32]:
        channels = np.moveaxis(as_colour(image), 2, 0).astype(np.float32)
        resized = [Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC) for c in channels]
        return np.stack([np.asarray(c) for c in resized]).clip(0, 255)

    return prepare


def exactly(channels: int, height: int, width: int, name: str) -> Prepare:
    """No resizing: images must be as the network knows them. Grey becomes colour by repetition.

    Raises:
        InputError: by the result, for an image of another size, or in colour where the network knows grey ones.
    """

    def prepare(image: Pixels) -> NDArray[np.float32]:
        if image.shape[:2] != (height, width):
            raise InputError(
                f"an image has {image.shape[0]}x{image.shape[1]} pixels, but {name} takes {height}x{width} and "
                "resizes nothing: resize the images first, or measure with another network"
            )
        if channels == 1 and image.shape[2] == 3:
            if not (image == image[..., :1]).all():
                raise InputError(f"an image is in colour, but {name} takes grey ones: measure with another network")
            image = image[..., :1]
        shown = image if channels == 1 else as_colour(image)
        return np.moveaxis(shown, 2, 0).astype(np.float32)

    return prepare


@dataclass(frozen=True)
class Protocol:
    """A way to measure that others have used.

    Attributes:
        name: what the command and the results call it.
        network: the network's specification, see `dmd.metrics.backbones.load`.
        label: of its Fréchet distance.
        before: what is done to each image before the network's own preparation.
        size: the network's input in pixels; None takes its own.
        samples: how many samples its published figures have.
        text: the whole protocol in a sentence.
    """

    name: str
    network: str
    label: str
    before: Step
    size: int | None
    samples: int
    text: str


CLEAN_FID = Protocol(
    "clean-fid", "inception", "FID", as_it_is, None, 50_000,
    "Inception-v3 (TensorFlow's weights of 2015), images resized to 299 px in floating point by antialiased bicubic",
)  # fmt: skip
COCO_30K = Protocol(
    "coco30k", "inception", "FID-COCO30k", lanczos_square(256), None, 30_000,
    "one image of 512 px for each of 30,000 captions of COCO 2014 val, its middle square resized by Lanczos to 256 px, "
    "against all 40,504 photographs treated alike, then as clean-fid",
)  # fmt: skip
COCO_PHOTOGRAPHS = 40_504
"""Of COCO 2014 val."""
COCO_PROMPTS = 29_000
"""Different captions among 30,000 at least: people have given a few photographs the same one."""
DINOV2 = Protocol(
    "dinov2", "timm:vit_large_patch14_dinov2.lvd142m", "FD-DINOv2", as_it_is, 224, 50_000,
    "DINOv2 ViT-L/14's class token at 224 px, antialiased bicubic (Stein et al. 2023, arXiv 2306.04675)",
)  # fmt: skip

PROTOCOLS = {p.name: p for p in (CLEAN_FID, COCO_30K, DINOV2)}
"""By name."""
