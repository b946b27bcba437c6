"""What each step of a learner sees, as a pure function of (seed, step, process)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dmd.batches import Share
from dmd.data.images import to_float
from dmd.errors import InputError
from dmd.represent import augment
from dmd.represent.augment import Transform
from dmd.represent.sources import Source
from dmd.represent.text import encode
from dmd.seeding import Stream

B = TypeVar("B", bound="OnDevice")


class OnDevice(Protocol):
    """A batch that can be brought to a device."""

    def to(self: B, device: torch.device) -> B: ...


@dataclass(frozen=True)
class Views:
    """Views of images that attract each other.

    Attributes:
        images: (V * C, channels, H, W) uint8, view by view: V of each of C captions, or of each of C images.
        labels: (V * C,) int64, equal where views attract each other.
        views: V.
        tokens: (C, L) of the captions; None where no text is read.
        texts: (C,) int64, equal where captions are: which images are of a text.
    """

    images: Tensor
    labels: Tensor
    views: int
    tokens: Tensor | None = None
    texts: Tensor | None = None

    def to(self, device: torch.device) -> "Views":
        """On a device, the images as float32 in [-1, 1]."""
        tokens, texts = (None if x is None else x.to(device) for x in (self.tokens, self.texts))
        return Views(to_float(self.images.to(device)), self.labels.to(device), self.views, tokens, texts)


@dataclass(frozen=True)
class Crops:
    """Whole and small crops of images, for a student and its teacher.

    Attributes:
        images: (B, channels, H, W) uint8.
        local: (L * B, channels, h, w) uint8, crop by crop.
        labels: (B,) int64, equal where captions are.
        mask: bool (B, N), patches of `images` that the student does not see; (B, 0) without masks.
    """

    images: Tensor
    local: Tensor
    labels: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "Crops":
        """On a device, the images as float32 in [-1, 1]."""
        images, local = (to_float(x.to(device)) for x in (self.images, self.local))
        return Crops(images, local, self.labels.to(device), self.mask.to(device))


def places(step: int, captions: int, share: Share) -> tuple[Tensor, Tensor]:
    """This process's places in a step's batch, and in the endless sequence of captions. InputError if it does not
    divide."""
    (within,) = share.split(captions, "--captions-per-batch")
    return within, step * captions + within


@dataclass(frozen=True, eq=False)
class ViewBatches:
    """For StableRep, SimCLR, CLIP and classes.

    Attributes:
        seed: key of all draws.
        source: of images.
        captions: C of a step, over all processes.
        per_caption: m, images of a caption.
        crops: of an image.
        transform: makes a crop.
        share: this process's part.
        instances: whether an image attracts only its own crops, and not those of its caption.
        tokenizer, length: of the captions; None reads no text.
    """

    seed: int
    source: Source
    captions: int
    per_caption: int
    crops: int
    transform: Transform
    share: Share
    instances: bool = False
    tokenizer: Any = None
    length: int = 0

    def __call__(self, step: int) -> Views:
        within, place = places(step, self.captions, self.share)
        drawn = self.source.draw(step, place)
        m, v = self.per_caption, self.per_caption * self.crops
        # view k of caption c is crop k // m of its image k % m
        order = [(c * m + k % m, k) for k in range(v) for c in range(len(within))]
        index = torch.cat([within * augment.VIEWS + k for k in range(v)])
        images = [drawn.images[i] for i, _ in order]
        made = augment.views(self.transform, images, self.seed, Stream.VIEW, step, index)
        labels = drawn.labels.repeat(v)
        if self.instances:
            labels = torch.cat([place * m + k % m for k in range(v)])
        if self.tokenizer is None:
            return Views(made, labels, v)
        return Views(made, labels, v, encode(self.tokenizer, drawn.captions, self.length), drawn.labels)


@dataclass(frozen=True, eq=False)
class CropBatches:
    """For SynCLR.

    Attributes:
        seed, source, captions, per_caption, share: as of `ViewBatches`.
        whole, local: make a crop for both networks, and a small one.
        local_crops: of an image.
        grid: rows and columns of patches; None masks nothing.
        mask_images, mask_patches: parts of images, and of their patches, that are masked.
    """

    seed: int
    source: Source
    captions: int
    per_caption: int
    whole: Transform
    local: Transform
    local_crops: int
    share: Share
    grid: tuple[int, int] | None
    mask_images: float
    mask_patches: float

    def __call__(self, step: int) -> Crops:
        within, place = places(step, self.captions, self.share)
        drawn = self.source.draw(step, place)
        m = self.per_caption
        number = (within[:, None] * m + torch.arange(m)).flatten()
        images = augment.views(self.whole, drawn.images, self.seed, Stream.VIEW, step, number)
        small = [
            augment.views(self.local, drawn.images, self.seed, Stream.LOCAL_VIEW, step, number * augment.VIEWS + k)
            for k in range(self.local_crops)
        ]
        mask = torch.zeros(len(number), 0, dtype=torch.bool)
        if self.grid is not None:
            mask = augment.masks(self.seed, step, number, self.grid, self.mask_images, self.mask_patches)
        local = torch.cat(small) if small else images[:0]
        return Crops(images, local, drawn.labels.repeat_interleave(m), mask)


@dataclass(eq=False)
class Prefetched:
    """Batches brought to a device, made by other processes while the learner works.

    Attributes:
        batches: step to a batch; a pure function.
        workers: processes; 0 makes batches when they are asked for.
        steps: how many steps there are.
        device: where batches go.
    """

    batches: Any
    workers: int
    steps: int
    device: torch.device
    _next: int = field(default=-1, init=False)
    _loader: Iterator[Any] = field(default_factory=lambda: iter(()), init=False)

    def __call__(self, step: int) -> Any:
        if not self.workers:
            return self.batches(step).to(self.device)
        if step != self._next:
            self._loader = self._start(step)
        self._next = step + 1
        return next(self._loader).to(self.device)

    def _start(self, step: int) -> Iterator[Any]:
        from torch.utils.data import DataLoader

        rows: Any = _Steps(self.batches, self.steps)
        order = range(step, self.steps)
        return iter(DataLoader(rows, batch_size=None, sampler=order, num_workers=self.workers, pin_memory=False))


@dataclass(frozen=True)
class _Steps:
    """Batches as a data set of steps."""

    batches: Any
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Any:
        return self.batches(step)


def check_source(source: Source, captions: int, apart: bool) -> None:
    """Raises InputError if captions cannot be told apart, or an epoch has fewer captions than a batch."""
    if apart and source.captions < 2:
        raise InputError("the data has images of one caption only: there must be at least two different ones")
    if source.count < captions:
        raise InputError(
            f"the data has {source.count} captions (or groups of images), fewer than --captions-per-batch {captions}: "
            "give less"
        )
