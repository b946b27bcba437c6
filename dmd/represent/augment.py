"""Views of an image: torchvision's transforms, whose numbers follow from (seed, stream, step, number of the view).

torchvision draws from torch's global generator. It is set anew for each view, so that a view depends on no other, on no
process and on no resume; afterwards it is as before. Images are uint8 until the network, on whatever device they lie.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmd import seeding
from dmd.represent.config import AugmentOptions
from dmd.seeding import Stream

Transform = Callable[[Tensor], Tensor]
"""An image (C, H, W) uint8 of any size to a view (C, size, size) uint8."""

VIEWS = 1 << 8
"""Views that an image can have in a step."""


def standard(o: AugmentOptions, size: int) -> Transform:
    """StableRep's and SimCLR's: crop, change of colours, loss of colours, blur, mirror; the options switch each."""
    from torchvision.transforms import v2

    return v2.Compose(
        [*_first(o), _crop(o.crop_scale, size), *_colours(o), *_sometimes(_blur(size), o.blur), *_last(o)]
    )


def whole(o: AugmentOptions, size: int) -> Transform:
    """SynCLR's for the crop that a teacher sees too: blurred always, or else seldom blurred and sometimes solarised."""
    from torchvision.transforms import v2

    rules: list[Any] = []
    if o.blur:
        seldom = v2.Compose([*_sometimes(_blur(size), 0.1), v2.RandomSolarize(128, 0.2)])
        rules = [v2.RandomChoice([_blur(size), seldom])]
    return v2.Compose([*_first(o), _crop(o.crop_scale, size), *_last(o), *_colours(o), *rules])


def local(o: AugmentOptions) -> Transform:
    """SynCLR's for small crops."""
    from torchvision.transforms import v2

    crop = _crop(o.local_scale, o.local_size)
    return v2.Compose([*_first(o), crop, *_last(o), *_colours(o), *_sometimes(_blur(o.local_size), o.blur)])


def _first(o: AugmentOptions) -> list[Any]:
    from torchvision.transforms import v2

    halved, quartered = (v2.Lambda(partial(shrunk, factor=f)) for f in (2, 4))
    return _sometimes(v2.RandomChoice([halved, quartered]), o.downsample)


def shrunk(image: Tensor, factor: int) -> Tensor:
    """An image at a part of its resolution, and back: hides that images come in different ones (StableRep)."""
    from torchvision.transforms.v2 import functional

    height, width = image.shape[-2:]
    small = functional.resize(image, [max(1, height // factor), max(1, width // factor)], antialias=True)
    return functional.resize(small, [height, width], antialias=True)


def _crop(scale: tuple[float, float], size: int) -> Any:
    from torchvision.transforms import v2

    return v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


def _colours(o: AugmentOptions) -> list[Any]:
    from torchvision.transforms import v2

    return [
        *_sometimes(v2.ColorJitter(*o.jitter), o.jitter_probability),
        *([v2.RandomGrayscale(o.grey)] * (o.grey > 0)),
    ]


def _blur(size: int) -> Any:
    """Of deviation 0.1 to 2 pixels, cut off at a tenth of the image as in SimCLR."""
    from torchvision.transforms import v2

    return v2.GaussianBlur(max(3, size // 10 | 1), (0.1, 2.0))


def _last(o: AugmentOptions) -> list[Any]:
    from torchvision.transforms import v2

    return [v2.RandomHorizontalFlip(0.5)] if o.flip else []


def _sometimes(transform: Any, probability: float) -> list[Any]:
    from torchvision.transforms import v2

    return [v2.RandomApply([transform], probability)] if probability else []


def views(
    transform: Transform, images: Sequence[Tensor], seed: int, stream: Stream, step: int, index: Tensor
) -> Tensor:
    """A view of each image, (B, C, size, size) uint8.

    Args:
        images: B of them, (C, H, W) uint8 each.
        index: (B,) int64, numbers of the views among all of the step.
    """
    words = seeding.bits(seed, stream, step, index, 1)[:, 0].tolist()
    made = []
    with torch.random.fork_rng(devices=[]):
        for image, word in zip(images, words, strict=True):
            torch.random.default_generator.manual_seed(word)
            made.append(transform(image))
    return torch.stack(made)


def masks(seed: int, step: int, index: Tensor, grid: tuple[int, int], images: float, patches: float) -> Tensor:
    """Which patches of images are masked: bool (B, rows * columns).

    Args:
        index: (B,) int64, numbers of the images among all of the step.
        grid: rows and columns of patches.
        images: probability that an image is masked at all.
        patches: part of its patches, chosen at random.
    """
    count = grid[0] * grid[1]
    words = seeding.bits(seed, Stream.PATCH_MASK, step, index, count + 1)
    chosen = words[:, 1:].argsort(1).argsort(1) < round(patches * count)
    return chosen & (seeding.as_uniform(words[:, :1]) < images)
