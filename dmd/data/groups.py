"""Images by caption, for learners: m images of each caption from shards, or from a folder of captioned images.

What is read may come from anybody. Of an archive only members ending in .jpg, .jpeg, .png, .webp, .txt and .json are
looked at; nothing is extracted, unpickled or run, no name is used as a path, and a path that is no file or folder is
never a URL or a command. Broken images are counted and passed over, up to a limit.

The order is a function of (seed, epoch) and does not depend on how many processes share it, save in which of them a
caption turns up.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dmd.data import captioned, prompts
from dmd.data.images import plain
from dmd.data.tar import members, split
from dmd.errors import InputError
from dmd.seeding import Stream, bits
from dmd.shards import KIND, MANIFEST

IMAGES = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_TEXT, MAX_IMAGE = 2**20, 2**26
"""Bytes of a caption and of an image file; a broken or hostile header must not fill the memory."""
MAX_PIXELS = 2**26
LAYOUTS = (
    "the folder of a data set (manifest.json), of webdataset shards (*.tar), or of images with metadata.jsonl, or one "
    ".tar file; URLs and pipes are not opened"
)


class Place(NamedTuple):
    """Where the bytes of an image file are, and their SHA-256 if it is known."""

    file: Path
    offset: int
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Group:
    """A caption and its images.

    Attributes:
        caption_id: its number in the data set; None where images came without one.
        replicas: (number of the replica, where it is).
    """

    caption: str
    caption_id: int | None
    replicas: tuple[tuple[int, Place], ...]


class Item(NamedTuple):
    """m images of a caption: uint8 (C, H, W) each, or what the transform made of them."""

    caption: str
    caption_id: int | None
    replicas: tuple[int, ...]
    images: list[Any]


@dataclass
class Broken:
    """Counts broken images. Raises InputError when there are more than `limit`, naming the first."""

    limit: int
    count: int = 0
    first: str = ""

    def add(self, why: str, count: int = 1) -> None:
        self.first = self.first or why
        self.count += count
        if self.count > self.limit:
            raise InputError(
                f"{self.count} images are broken or missing, and {self.limit} are allowed; the first: {self.first}; "
                "make the data set again by its command, or allow more"
            )


@dataclass(frozen=True)
class Part:
    """One archive or folder: its captions and images, read by `load` when it is its turn."""

    name: str
    load: Callable[[Broken], list[Group]]


# ----------------------------------------------------------------------------- what there is


def parts(path: str | Path) -> list[Part]:
    """The archives of a data set, or a single one, or a folder of images.

    Raises:
        InputError: it is of no known layout, its manifest is damaged or says that it is not complete, or an archive of
            the manifest is missing.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() == ".tar":
        return [_shard(path, None)]
    if not path.is_dir():
        raise InputError(f"{str(path)[:200]} is no data set: give {LAYOUTS}")
    if (path / MANIFEST).is_file():
        return [_shard(archive, count) for archive, count in archives(path).items()]
    if (path / "metadata.jsonl").is_file():
        return [Part(path.name, partial(_captioned, path))]
    tars = sorted(path.glob("*.tar"))
    if not tars:
        raise InputError(f"{path} holds neither {MANIFEST} nor metadata.jsonl nor *.tar: give {LAYOUTS}")
    return [_shard(tar, None) for tar in tars]


def archives(folder: Path) -> dict[Path, int]:
    """The archives of a data set of ours and their numbers of images. Raises InputError as `parts`."""
    return {folder / f"{name}.tar": count for name, count in _manifest(folder).items()}


def _manifest(folder: Path) -> dict[str, int]:
    """Shard names and their numbers of images."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind, complete = raw["kind"], raw["complete"]
        found = {str(name): int(shard["images"]) for name, shard in raw["shards"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged: make the data set again by its command") from None
    if kind != KIND:
        raise InputError(f"{path} is of another program: it should say {KIND!r}")
    if complete is not True or not found:
        raise InputError(f"{path} says that the data set is not complete: run its command again")
    for name, count in found.items():
        if not re.fullmatch(r"[0-9]{5,12}", name, re.ASCII) or count < 0:
            raise InputError(f"{path} names the shard {name[:60]!r} of {count} images: a shard's name is a number")
        if not (folder / f"{name}.tar").is_file():
            raise InputError(f"{folder / name}.tar is missing: make it again by the data set's command")
    return found


def _shard(path: Path, count: int | None) -> Part:
    return Part(path.name, partial(shard_groups, path, count))


def shard_groups(path: Path, count: int | None, broken: Broken) -> list[Group]:
    """The captions of a webdataset shard in the order of their first images.

    Images with one "caption_id" in their .json, or else of equal captions, are of one group.

    Args:
        count: how many images there must be; None does not know.
        broken: told what is missing or wrong.

    Raises:
        InputError: the archive is cut short and its count is not known; or too much is broken.
    """
    groups: dict[tuple[int | None, str], list[tuple[int, Place]]] = {}
    images = 0
    for sample in _samples(path, count, broken):
        images += 1
        try:
            key, replica, place = _checked(path, sample)
        except InputError as error:
            broken.add(str(error))
            continue
        known = groups.setdefault(key, [])
        known.append((len(known) if replica is None else replica, place))
    if count is not None and images < count:
        broken.add(f"{path} holds {images} images instead of {count}", count - images)
    if count is not None and images > count:
        raise InputError(f"{path} holds {images} images instead of {count}: make it again by the data set's command")
    return [Group(caption, number, tuple(places)) for (number, caption), places in groups.items()]


@dataclass
class _Sample:
    """Members of one name."""

    key: str
    image: Place | None = None
    text: bytes | None = None
    facts: bytes | None = None


def _samples(path: Path, count: int | None, broken: Broken) -> Iterator[_Sample]:
    """Runs of members whose names are equal up to the first dot of the file name, those with an image."""
    current = _Sample("")
    try:
        with open(path, "rb") as file:
            for member in members(path):
                key, extension = split(member.name)
                if key != current.key:
                    if current.image is not None:
                        yield current
                    current = _Sample(key)
                if extension in IMAGES and current.image is None:
                    current.image = Place(path, member.offset, member.size)
                elif extension in ("txt", "json") and member.size <= MAX_TEXT:
                    file.seek(member.offset)
                    content = file.read(member.size)
                    if extension == "txt":
                        current.text = content
                    else:
                        current.facts = content
    except (OSError, InputError) as error:
        if count is None or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
            raise InputError(str(error)) from None
        broken.add(str(error), 0)
        return  # what is missing is counted against the manifest; the last sample may lack a member
    if current.image is not None:
        yield current


def _checked(path: Path, sample: _Sample) -> tuple[tuple[int | None, str], int | None, Place]:
    """What group a sample is of, its replica, and its image. Raises InputError for what cannot be used."""
    where = f"{path}, image {sample.key.removeprefix('/')[:100]!r}"
    assert sample.image is not None
    if sample.image.size > MAX_IMAGE:
        raise InputError(f"{where} has {sample.image.size} bytes: at most {MAX_IMAGE} are read")
    facts: Mapping[str, Any] = {}
    if sample.facts is not None:
        try:
            found = json.loads(sample.facts)
        except (ValueError, RecursionError):
            raise InputError(f"{where} has a .json that is none") from None
        facts = found if isinstance(found, dict) else {}
    text: Any = next((facts[k] for k in prompts.KEYS if k in facts), None)
    if text is None and sample.text is not None:
        try:
            text = sample.text.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{where} has a caption that is not UTF-8") from None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise InputError(f"{where} has no caption")
    sha = facts.get("sha256")
    place = sample.image._replace(sha256=sha if isinstance(sha, str) else None)
    return (_number(facts.get("caption_id")), text.strip()), _number(facts.get("replica")), place


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**56 else None


def _captioned(folder: Path, broken: Broken) -> list[Group]:
    """Images of metadata.jsonl by their captions; lines without a caption do not count."""
    groups: dict[str, list[tuple[int, Place]]] = {}
    for where, line in prompts.lines(folder / "metadata.jsonl"):
        caption = prompts.caption_of(where, line) if line.strip() else ""
        if not caption:
            continue
        file = captioned.image_file(folder, where, line)
        try:
            size = file.stat().st_size
        except OSError as error:
            broken.add(f"{where}: {file} cannot be read: {error.strerror}")
            continue
        known = groups.setdefault(caption, [])
        known.append((len(known), Place(file, 0, size)))
    return [Group(caption, None, tuple(places)) for caption, places in groups.items()]


def decode(place: Place) -> Tensor:
    """An image: uint8 (1 or 3, H, W).

    Raises:
        InputError: it is broken, too large, no JPEG, PNG or WebP, transparent, of more than 8 bits, or its SHA-256 is
            not the known one.
    """
    from PIL import Image

    try:
        if place.size > MAX_IMAGE:
            raise InputError(f"it has {place.size} bytes, and at most {MAX_IMAGE} are read")
        with open(place.file, "rb") as file:
            file.seek(place.offset)
            data = file.read(place.size)
        if place.sha256 is not None and hashlib.sha256(data).hexdigest() != place.sha256:
            raise InputError("its bytes were changed")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"it has {image.width} x {image.height} pixels, and at most {MAX_PIXELS} are read")
            return torch.from_numpy(plain(image).copy()).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{place.file}, image at byte {place.offset}, cannot be read: {error}") from None


# ----------------------------------------------------------------------------- in which order


@dataclass(eq=False)
class ImageGroups(IterableDataset):
    """Captions with `per_caption` images each, once an epoch, for torch's DataLoader with any number of workers.

    Shards come in random order and the captions of a shard too; where shards cannot be dealt out evenly among processes
    and workers, the last ones are cut. A caption with fewer images than `per_caption`, because some are broken or were
    dropped, is left out.

    Attributes:
        path: see `parts`.
        per_caption: m, different images, chosen anew each epoch.
        seed, epoch: determine order and choice; set `epoch` between epochs.
        rank, world: of the process.
        shuffle: False keeps the order of the files and takes the first m.
        max_broken: images that may be broken, in each worker and epoch.
        transform: of each image, uint8 (C, H, W).

    Raises:
        InputError: (when made) as `parts`; (when iterated) too many broken images, or no caption has enough.
    """

    path: str | Path
    per_caption: int = 1
    seed: int = 0
    epoch: int = 0
    rank: int = 0
    world: int = 1
    shuffle: bool = True
    max_broken: int = 0
    transform: Callable[[Tensor], Any] | None = None
    broken: Broken = field(init=False)

    def __post_init__(self) -> None:
        if self.per_caption < 1:
            raise InputError(f"{self.per_caption} images of a caption are not possible: ask for at least 1")
        if not 0 <= self.rank < self.world:
            raise InputError(f"process {self.rank} of {self.world} is not possible: it counts from 0")
        self._parts = parts(self.path)
        self.broken = Broken(self.max_broken)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        share = self.rank if worker is None else self.rank * worker.num_workers + worker.id
        shares = self.world if worker is None else self.world * worker.num_workers
        self.broken = Broken(self.max_broken)
        for number, slot, slots in dealt(self._order(0, len(self._parts)), share, shares):
            groups = self._parts[number].load(self.broken)
            self._require_enough(self._parts[number].name, groups)
            for i in self._order(1 + number, len(groups))[slot::slots]:
                item = self._item(groups[i], number << 32 | i)
                if item is not None:
                    yield item

    def _order(self, which: int, count: int) -> list[int]:
        """A permutation: of the parts (0), or of the captions of a part (1 and on)."""
        if not self.shuffle:
            return list(range(count))
        index = (which << 32) + torch.arange(count)
        return bits(self.seed, Stream.READ_ORDER, self.epoch, index, 1)[:, 0].argsort(stable=True).tolist()

    def _require_enough(self, name: str, groups: Sequence[Group]) -> None:
        most = max((len(group.replicas) for group in groups), default=0)
        if 0 < most < self.per_caption:
            raise InputError(
                f"{name} of {self.path} has at most {most} images of a caption, and {self.per_caption} were asked for: "
                "ask for fewer, or make more"
            )

    def _item(self, group: Group, number: int) -> Item | None:
        if len(group.replicas) < self.per_caption:
            return None
        order = list(range(len(group.replicas)))
        if self.shuffle:
            words = bits(self.seed, Stream.READ_CHOICE, self.epoch, torch.tensor([number]), len(order))[0]
            order = words.argsort(stable=True).tolist()
        images: list[Any] = []
        chosen: list[int] = []
        for replica, place in (group.replicas[i] for i in order):
            try:
                image = decode(place)
            except InputError as error:
                self.broken.add(str(error))
                continue
            images.append(image if self.transform is None else self.transform(image))
            chosen.append(replica)
            if len(images) == self.per_caption:
                return Item(group.caption, group.caption_id, tuple(chosen), images)
        return None


def dealt(order: Sequence[int], share: int, shares: int) -> Iterator[tuple[int, int, int]]:
    """(part, slot, slots) of one share: whole parts while they last for all, then a slot of each that remains."""
    even = len(order) - len(order) % shares
    for part in order[share:even:shares]:
        yield part, 0, 1
    for part in order[even:]:
        yield part, share, shares


class GroupBatch(NamedTuple):
    """m images of each of C captions, caption by caption.

    Attributes:
        images: (C * m, ...).
        labels: (C * m,) int64, equal where the captions are, for multi-positive losses.
        captions: C of them.
    """

    images: Tensor
    labels: Tensor
    captions: list[str]


def collate(items: Sequence[Item]) -> GroupBatch:
    """Items as a batch, for DataLoader's `collate_fn`. A caption that is there twice has one label.

    Raises:
        InputError: images differ in size: resize or crop them in the transform.
    """
    captions = [item.caption for item in items]
    first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    labels = torch.tensor([first[item.caption] for item in items for _ in item.images])
    images = [image for item in items for image in item.images]
    if len({tuple(image.shape) for image in images}) > 1:
        raise InputError("the images of a batch differ in size: give a transform that resizes or crops them")
    return GroupBatch(torch.stack(images), labels, captions)
