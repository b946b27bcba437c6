"""Where images that are measured come from: folders, .npz files and tar shards, read a few at a time.

Nothing is resized, cropped or put on a background here; that is the protocol's business, or the user's.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmd.data import captioned, prompts, tar
from dmd.data.groups import MANIFEST, archives
from dmd.data.images import NPZ_ERRORS, SUFFIXES, ImageSet, read_image
from dmd.errors import InputError

T = TypeVar("T")

Pixels = NDArray[np.uint8]
"""An image (H, W, 1 or 3)."""

KINDS = (
    "a folder of images (png, jpg or webp, at any depth, maybe with metadata.jsonl), an .npz file with 'images' or "
    "'arr_0', a .tar file, or a folder of tars"
)
MAX_MEMBER = 2**28  # bytes of an image in a tar; a broken or hostile header must not fill the memory
MAX_CAPTION = 2**20
THREADS = 8  # that read and decode; Pillow lets go of Python's lock


class Source(Protocol):
    """Images in a fixed order.

    Attributes:
        name: what the user calls it.
        captions: what each image was asked for, or None.
        labels: int64 (N,) the class of each image, or None.
    """

    @property
    def name(self) -> str: ...

    @property
    def captions(self) -> Sequence[str] | None: ...

    @property
    def labels(self) -> Tensor | None: ...

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[list[Pixels]]:
        """All images, `size` at a time. InputError for one that cannot be read."""

    def where(self, index: int) -> str:
        """The image's file, or whatever else tells a user which one it is."""

    def digest(self) -> str:
        """SHA-256 of all that the images are, in their order."""


def groups(source: Source) -> Tensor | None:
    """(N,) equal where images were asked for the same caption, or else class; None if nothing is known."""
    if source.captions is not None:
        numbers = {text: i for i, text in enumerate(dict.fromkeys(source.captions))}
        return torch.tensor([numbers[text] for text in source.captions])
    return source.labels


@dataclass(frozen=True)
class Entry:
    """An encoded image: `size` bytes of a file from `start`."""

    path: Path
    start: int
    size: int
    name: str

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass(frozen=True)
class Encoded:
    """Image files, on their own or inside tars, as a `Source`."""

    name: str
    entries: tuple[Entry, ...]
    captions: tuple[str, ...] | None = None
    classes: tuple[int, ...] | None = None

    @property
    def labels(self) -> Tensor | None:
        return None if self.classes is None else torch.tensor(self.classes)

    def __len__(self) -> int:
        return len(self.entries)

    def batches(self, size: int) -> Iterator[list[Pixels]]:
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(self), size):
                yield list(pool.map(_decode, self.entries[start : start + size]))

    def where(self, index: int) -> str:
        return self.entries[index].name

    def digest(self) -> str:
        total = hashlib.sha256()
        for entry in self.entries:
            total.update(hashlib.sha256(entry.read()).digest())
        return total.hexdigest()

    def select(self, index: Iterable[int]) -> "Encoded":
        """A part of the images."""
        kept = list(index)
        return replace(
            self,
            entries=tuple(self.entries[i] for i in kept),
            captions=None if self.captions is None else tuple(self.captions[i] for i in kept),
            classes=None if self.classes is None else tuple(self.classes[i] for i in kept),
        )


def _decode(entry: Entry) -> Pixels:
    return read_image(io.BytesIO(entry.read()), None, entry.name)


@dataclass(frozen=True, eq=False)
class Arrays:
    """Images of one size in memory, (N, H, W, 1 or 3) uint8, as a `Source`."""

    name: str
    images: Pixels
    labels: Tensor | None = None
    captions: tuple[str, ...] | None = None

    @classmethod
    def of(cls, name: str, images: ImageSet) -> "Arrays":
        return cls(name, images.images.permute(0, 2, 3, 1).numpy(), images.labels)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[list[Pixels]]:
        for start in range(0, len(self), size):
            yield list(self.images[start : start + size])

    def where(self, index: int) -> str:
        return f"{self.name}, image {index}"

    def digest(self) -> str:
        total = hashlib.sha256(repr(self.images.shape).encode())
        total.update(np.ascontiguousarray(self.images).data)
        return total.hexdigest()

    def select(self, index: Iterable[int]) -> "Arrays":
        """A part of the images."""
        kept = torch.tensor(list(index), dtype=torch.int64)
        return Arrays(
            self.name,
            self.images[kept.numpy()],
            None if self.labels is None else self.labels[kept],
            None if self.captions is None else tuple(self.captions[i] for i in kept.tolist()),
        )


def read(path: str | Path) -> Encoded | Arrays:
    """What a path holds (`KINDS`); images are decoded later.

    Raises:
        InputError: there is no such file, it holds no image, or it is broken.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: give {KINDS}")
    if path.suffix.lower() == ".npz":
        return _npz(path)
    if path.suffix.lower() == ".tar":
        return _tars(path, [path])
    raise InputError(f"{path} is of no known kind: give {KINDS}")


def _folder(path: Path) -> Encoded:
    if (path / "metadata.jsonl").is_file():
        return _captioned(path)
    tars = sorted(path.glob("*.tar"))
    if (path / MANIFEST).is_file() and (tars or (path / "contact_sheet.png").is_file()):
        return _data_set(path)
    if tars:
        return _tars(path, tars)
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and _shown(p, path))
    if not files:
        raise InputError(f"{path} holds no image: give {KINDS}")
    parents = sorted({p.parent for p in files})
    classes = tuple(parents.index(p.parent) for p in files) if len(parents) > 1 else None
    return Encoded(str(path), tuple(map(_file, files)), None, classes)


def _data_set(path: Path) -> Encoded:
    """The images of `dmd synthesize`, which must be whole."""
    shards = archives(path)
    found, asked = _tars(path, list(shards)), sum(shards.values())
    if len(found) != asked:
        raise InputError(
            f"{path} holds {len(found):,} images, but its {MANIFEST} says {asked:,}: make it again by its command"
        )
    return found


def _shown(file: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(root).parts)


def _file(path: Path) -> Entry:
    return Entry(path, 0, path.stat().st_size, str(path))


def _captioned(path: Path) -> Encoded:
    entries, captions = listed(path, prompts.caption_of)
    return Encoded(str(path), entries, tuple(captions))


def listed(path: Path, told: Callable[[str, str], T]) -> tuple[tuple[Entry, ...], list[T]]:
    """The images of a folder's metadata.jsonl, and what `told` of each: (where the line is, the line) to a value.

    Raises:
        InputError: no image is named, or one that is not there.
    """
    entries, found = [], []
    for where, line in prompts.lines(path / "metadata.jsonl"):
        if not line.strip():
            continue
        file = captioned.image_file(path, where, line)
        if not file.is_file():
            raise InputError(f"{where} names {file.name}, which does not exist: add it, or remove the line")
        found.append(told(where, line))
        entries.append(_file(file))
    if not entries:
        raise InputError(f"{path / 'metadata.jsonl'} names no image")
    return tuple(entries), found


def _npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:  # object arrays are pickles: refused with ValueError
            key = next((k for k in ("images", "arr_0") if k in file.files), None)
            if key is None:
                keys = ", ".join(file.files) or "nothing"
                raise InputError(f"{path} holds {keys}: it needs 'images' or 'arr_0', uint8 (N, H, W, 1 or 3)")
            images = np.asarray(file[key])
            labels = np.asarray(file["labels"]) if "labels" in file.files else None
    except NPZ_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a readable .npz file of plain (not object) arrays") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise InputError(f"{path}: '{key}' must be uint8 (N, H, W, 1 or 3), not {images.dtype} {images.shape}")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        raise InputError(f"{path}: 'labels' must be {len(images)} integers, not {labels.dtype} {labels.shape}")
    return Arrays(str(path), images, None if labels is None else torch.from_numpy(labels.astype(np.int64)))


def _tars(path: Path, shards: Sequence[Path]) -> Encoded:
    """Images of webdataset shards, with captions where every image has one."""
    entries: list[Entry] = []
    captions: list[str | None] = []
    for shard in shards:
        for entry, caption in _samples(shard):
            entries.append(entry)
            captions.append(caption)
    if not entries:
        raise InputError(f"{path} holds no image: its samples need a member that ends in {', '.join(SUFFIXES)}")
    whole = tuple(text for text in captions if text)
    return Encoded(str(path), tuple(entries), whole if len(whole) == len(entries) else None)


def _samples(shard: Path) -> Iterator[tuple[Entry, str | None]]:
    """Image and caption of each sample: a run of members whose names are equal up to their extension."""
    for members in tar.samples(shard):
        images = [member for extension, member in members.items() if f".{extension}" in SUFFIXES]
        if not images:
            continue
        where = f"{shard}, member {images[-1].name!r}"
        if images[-1].size > MAX_MEMBER:
            raise InputError(f"{where} has {images[-1].size} bytes: an image has at most {MAX_MEMBER}")
        texts = {e: _text(shard, member) for e, member in members.items() if e in ("txt", "json")}
        yield Entry(shard, images[-1].offset, images[-1].size, where), _caption(where, texts)


def _text(shard: Path, member: tar.Member) -> str:
    try:
        return tar.content(shard, member, MAX_CAPTION, "a caption").decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{shard}, member {member.name!r} is not UTF-8: save the caption as UTF-8") from None


def _caption(where: str, texts: dict[str, str]) -> str | None:
    """A sample's .txt, or the text or caption of its .json."""
    if "txt" in texts:
        return texts["txt"].strip()
    if "json" not in texts:
        return None
    try:
        return prompts.caption_of(where, texts["json"])
    except InputError:  # a .json with other facts
        return None
