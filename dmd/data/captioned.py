"""Images with captions: a folder with metadata.jsonl, as image generators and the hub's data sets keep them, or shards.

FOLDER/metadata.jsonl      one object a line: file_name, and text or caption
FOLDER/000000.png ...
FOLDER/*.tar               of `dmd synthesize`, or webdataset's with .txt or .json members
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dmd.data import prompts
from dmd.data.images import SUFFIXES, read_image
from dmd.errors import InputError


@dataclass(frozen=True)
class Captioned:
    """Images with one caption each.

    Attributes:
        images: (N, 3, H, W) uint8.
        captions: N of them, none empty.
    """

    images: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def is_captioned(path: str | Path) -> bool:
    """Whether a path looks like what `load` reads; the content is not looked at."""
    return (Path(path) / "metadata.jsonl").is_file() or _has_shards(Path(path))


def _has_shards(path: Path) -> bool:
    return (path.is_file() and path.suffix.lower() == ".tar") or any(path.glob("*.tar"))


def load(folder: str | Path, size: int) -> Captioned:
    """Read a folder of images with metadata.jsonl, or shards. Grey images become colour; rows without a caption are
    left out.

    Args:
        folder: holds metadata.jsonl and the files that it names, at any depth below it; or shards, or is one.
        size: height and width that every image must have.

    Raises:
        InputError: there is no such folder or file, a line is broken, a name leads out of the folder or is of no image,
            or an image is broken or of another size. The sentence names the line.
    """
    folder = Path(folder)
    table = folder / "metadata.jsonl"
    if not table.is_file() and _has_shards(folder):
        return _of_shards(folder, size)
    if not table.is_file():
        raise InputError(f"{table} does not exist: give a folder of images with metadata.jsonl")
    images, captions = [], []
    lines = [row for row in prompts.lines(table) if row[1].strip()]
    for where, line in tqdm(lines, desc=f"reading {folder.name}", unit="image", delay=2, leave=False):
        caption = prompts.caption_of(where, line)
        if caption:
            image = read_image(image_file(folder, where, line), (size, size))
            images.append(np.broadcast_to(image, (*image.shape[:2], 3)))
            captions.append(caption)
    if not captions:
        raise InputError(f"{table} has no image with a caption")
    return Captioned(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), captions)


def _of_shards(path: Path, size: int) -> Captioned:
    from dmd.data import groups  # which reads folders by this module

    images, captions = [], []
    for part in groups.parts(path):
        for group in part.load(groups.Broken(0)):
            for number, place in group.replicas:
                where = f"{path}, {part.name}, image {number} of {group.caption[:60]!r}"
                try:
                    image = groups.decode(place)
                except InputError as error:
                    raise InputError(f"{where}: {error}") from None
                if tuple(image.shape[1:]) != (size, size):
                    high, wide = image.shape[1:]
                    raise InputError(f"{where} has {wide} x {high} pixels: it must have {size} x {size}")
                images.append(image.expand(3, -1, -1))
                captions.append(group.caption)
    if not captions:
        raise InputError(f"{path} has no image with a caption")
    return Captioned(torch.stack(images), captions)


def image_file(folder: Path, where: str, line: str) -> Path:
    """The image that a line of metadata.jsonl names.

    Raises:
        InputError: it names none, or one that does not lie in the folder.
    """
    name = json.loads(line).get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f"{where} has no file_name: each line names the image that it is about")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{where} has the file_name {name[:100]!r}, which leads out of the folder: it must lie inside")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{where} has the file_name {name[:100]!r}: it must be one of {', '.join(SUFFIXES)}")
    return path
