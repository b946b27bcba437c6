"""A network's pictures as PNG files: patch tokens in colours, and the map of the test images."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dmd.errors import InputError
from dmd.metrics.evaluate import spread
from dmd.represent import features, maps, pictures
from dmd.represent.features import Frozen
from dmd.represent.sets import LabelledSet

COLUMNS = 6
"""Images of a class in the pictures of tokens."""


@dataclass
class Hung:
    """Files by what they show, and why one was left out."""

    files: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, other: "Hung") -> None:
        self.files |= other.files
        self.notes += other.notes


def tokens(
    net: Frozen, test: LabelledSet, classes: int, out: Path, prefix: str, device: torch.device, batch: int
) -> Hung:
    """OUT/PREFIX-tokens.png: images of some classes, and below them their tokens; each class by its own components."""
    if net.tokens is None:
        return Hung(notes=["no pictures of patch tokens: where this network's tokens are is not known"])
    pages = []
    try:
        for c in test.labels.unique()[:classes].tolist():
            index = torch.nonzero(test.labels == c)[:COLUMNS, 0].tolist()
            prepared = net.prepared(next(test.source.select(index).batches(len(index))))
            shown = pictures.colours(features.grids(prepared, net, device, batch))
            pages.append(pictures.page(_row(prepared.round().to(torch.uint8)), _row(shown), COLUMNS))
    except InputError as error:
        return Hung(notes=[f"no pictures of patch tokens: {error}"])
    return Hung({"Images, and the principal components of their tokens": _save(pages, out / f"{prefix}-tokens.png")})


def _row(images: Tensor) -> Tensor:
    """(COLUMNS, C, H, W), filled with white."""
    return torch.cat((images, images.new_full((COLUMNS - len(images), *images.shape[1:]), 255)))


def atlas(net: Frozen, test: LabelledSet, x: Tensor, method: maps.Method, out: Path, prefix: str, seed: int) -> Hung:
    """OUT/PREFIX-map.png: the test images, of features (N, D), on a plane."""
    index = spread(len(x), maps.MOST)
    title = f"{net.name}, {method}, {len(index):,} images of {test.source.name}"
    page = maps.draw(maps.places(x[index], method, seed), test.labels[index], test.classes, title)
    return Hung({"Map of the test images": _save([page], out / f"{prefix}-map.png")})


def _save(pages: list[Tensor], path: Path) -> Path:
    from PIL import Image

    whole = torch.cat(pages, dim=1)
    Image.fromarray(whole.permute(1, 2, 0).contiguous().numpy()).save(path)
    return path
