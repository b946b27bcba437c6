"""Images without captions, from whatever they lie in: folders at any depth, .tar shards, .npz files, or drawn shapes.

Whatever lies beside the images, captions above all, is not opened.
"""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmd import log
from dmd.data import tar
from dmd.data.images import NPZ_ERRORS, SUFFIXES, read_image
from dmd.errors import InputError

LAYOUTS = f"a folder of images ({', '.join(SUFFIXES)}) or of .tar shards, a .tar file, or an .npz file with 'images'"
MAX_MEMBER = 2**26  # bytes of an image in a shard; a broken or hostile header must not fill the memory


def read(path: str | Path, size: int) -> Tensor:
    """All images of a file or folder in the order of their names: (N, 3, size, size) uint8, N > 0.

    Grey becomes colour. Images of another size are scaled until the shorter side fits, and cut to the middle.

    Raises:
        InputError: there is no such file, it is of no known layout, holds no image, or an image is broken. The sentence
            names the file, and the member or row.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: give {LAYOUTS}")
    found = []
    with log.progress(0, 0, f"reading {path.name}", True, "img") as bar:
        for pixels in _images(path):
            found.append(fit(pixels, size))
            bar.update()
    if not found:
        raise InputError(f"{path} holds no image: give {LAYOUTS}")
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def read_one(file: Path, size: int) -> Tensor:
    """One image file: (1, 3, size, size) uint8, fitted as by `read`. Raises InputError if it is missing or broken."""
    return torch.from_numpy(fit(read_image(file, None), size).copy()).permute(2, 0, 1)[None]


def _images(path: Path) -> Iterator[np.ndarray]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        for file in files:
            if file.suffix.lower() in SUFFIXES:
                yield read_image(file, None)
            elif file.suffix.lower() == ".tar":
                yield from _shard(file)
    elif path.suffix.lower() == ".tar":
        yield from _shard(path)
    elif path.suffix.lower() == ".npz":
        yield from _npz(path)
    else:
        raise InputError(f"{path} is of no known layout: give {LAYOUTS}")


class _Member(io.BytesIO):
    """A member of a shard, which says in messages what it is."""

    def __init__(self, content: bytes, where: str):
        super().__init__(content)
        self._where = where

    def __str__(self) -> str:
        return self._where


def _shard(path: Path) -> Iterator[np.ndarray]:
    """Images of a .tar file; members with other names are passed over unread."""
    for member in tar.members(path):
        if Path(member.name).suffix.lower() in SUFFIXES:
            content = tar.content(path, member, MAX_MEMBER, "an image")
            source: Any = _Member(content, f"{path}, member {member.name!r}")
            yield read_image(source, None)


def _npz(path: Path) -> Iterator[np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:  # object arrays are pickles: refused with ValueError
            images = np.asarray(file["images"]) if "images" in file.files else None
    except NPZ_ERRORS:  # numpy's sentence is left out: it suggests unpickling
        raise InputError(f"{path} is not a readable .npz file of plain (not object) arrays") from None
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        found = "lacks 'images'" if images is None else f"has images {images.dtype} {images.shape}"
        raise InputError(f"{path} {found}: 'images' must be uint8 (N, H, W, 1 or 3)")
    yield from images


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 1 or 3) uint8 to (size, size, 3): scaled (Lanczos) so that the shorter side fits, its middle cut out."""
    from PIL import Image

    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    scale = size / min(height, width)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize((wide, high), Image.Resampling.LANCZOS)
    left, top = (wide - size) // 2, (high - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def digest(images: Tensor) -> str:
    """SHA-256 (hex) of uint8 images and their shape."""
    sha = hashlib.sha256(repr(tuple(images.shape)).encode())
    sha.update(images.contiguous().numpy().data)
    return sha.hexdigest()
