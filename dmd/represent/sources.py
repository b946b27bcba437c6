"""Where a learner's images come from: shards and folders, labelled sets, or a student that makes them as it goes.

A source is a pure function of places in an endless sequence of captions, so there is nothing to save, a run resumes
exactly, and several processes that share a batch see what one would see.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dmd.data import groups
from dmd.data.groups import Broken, Group
from dmd.data.images import SUFFIXES, read_image, to_uint8
from dmd.errors import InputError
from dmd.online import FreshBatch, Online
from dmd.represent import sets
from dmd.seeding import Stream, bits
from dmd.shards import MANIFEST


class Drawn(NamedTuple):
    """m images of each of C captions.

    Attributes:
        images: C * m of them, (C, H, W) uint8 each, caption by caption.
        labels: (C,) int64, equal where the captions are.
        captions: C of them.
    """

    images: Sequence[Tensor]
    labels: Tensor
    captions: list[str]


class Source(Protocol):
    """Images by caption.

    Attributes:
        count: captions (or groups of images of a class) in an epoch.
        captions: how many different ones there are, at least; where classes are asked for, how many, and labels are
            below it.
        digest: names the content.
    """

    count: int
    captions: int
    digest: str

    def draw(self, step: int, place: Tensor) -> Drawn:
        """Captions at this process's places (C,) int64 of the sequence, C consecutive ones, in a step."""


def caption_label(caption: str) -> int:
    """63 bits that are equal for equal captions, in whatever process and file."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big") >> 1


class Recent:
    """The last few values of a function, kept; as `functools.lru_cache`, but it can be sent to another process."""

    def __init__(self, make: Callable[..., Any], size: int):
        self._make, self._size = make, size
        self._kept: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *key: Any) -> Any:
        self._kept[key] = value = self._kept.pop(key) if key in self._kept else self._make(*key)
        if len(self._kept) > self._size:
            del self._kept[next(iter(self._kept))]
        return value


# ----------------------------------------------------------------------------- on the disk


class Stored:
    """Shards, or a folder of images with metadata.jsonl. Its order of shards and captions is that of
    `dmd.data.groups.ImageGroups`, and captions with fewer than m images are left out.

    Args:
        path: see `dmd.data.groups.parts`.
        per_caption: m, different images of a caption, chosen anew each epoch.
        seed: of order and choice.
        channels: 1 or 3; grey images become colour, colour ones are refused where 1 is asked for.
        max_broken: images that may be broken before a run stops.
        classes: give captions the labels 0, 1, ..., as a classifier needs; keeps all in memory.

    Raises:
        InputError: as `parts`; no caption has m images, or (when drawn) too many are broken.
    """

    def __init__(
        self, path: str | Path, per_caption: int, seed: int, channels: int = 3, max_broken: int = 0,
        classes: bool = False,
    ):  # fmt: skip
        self.path, self.per_caption, self.seed, self.channels = Path(path), per_caption, seed, channels
        self._parts = groups.parts(path)
        self._broken = Broken(max_broken)
        self._load = Recent(self._usable, 4)
        self._orders = Recent(self._order, 16)
        self._numbers: dict[str, int] = {}
        self._sizes = torch.tensor(self._counts(classes))
        self.count = int(self._sizes.sum())
        self.captions = len(self._numbers) or self.count
        self.digest = self._digest()

    def _counts(self, classes: bool) -> list[int]:
        """Captions of each part with m images; by the manifest where it tells, since reading all takes long."""
        facts = _manifest(self.path)
        spec = facts.get("spec", {})
        whole = spec.get("dropping") == {} and isinstance(spec.get("replicas"), int) and not classes
        most = spec["replicas"] if whole else 0
        counts = []
        for part in self._parts:
            if whole and most >= self.per_caption:
                counts.append(facts["shards"][part.name.removesuffix(".tar")]["images"] // most)
                continue
            found = part.load(self._broken)
            most = max([most, *(len(g.replicas) for g in found)])
            kept = [g for g in found if len(g.replicas) >= self.per_caption]
            counts.append(len(kept))
            for group in kept if classes else ():
                self._numbers.setdefault(group.caption, len(self._numbers))
        if not sum(counts):
            raise InputError(
                f"{self.path} has at most {most} images of a caption, and --per-caption asks for {self.per_caption}: "
                "ask for fewer, or make more"
            )
        return counts

    def _usable(self, part: int) -> list[Group]:
        found = [g for g in self._parts[part].load(self._broken) if len(g.replicas) >= self.per_caption]
        if len(found) < int(self._sizes[part]):
            raise InputError(f"{self._parts[part].name} of {self.path} was changed while it was read: start again")
        return found

    def _order(self, epoch: int, which: int, count: int) -> list[int]:
        """A permutation: of the parts (0), or of the captions of a part (1 and on)."""
        index = (which << 32) + torch.arange(count)
        return bits(self.seed, Stream.READ_ORDER, epoch, index, 1)[:, 0].argsort(stable=True).tolist()

    def draw(self, step: int, place: Tensor) -> Drawn:
        images: list[Tensor] = []
        captions = []
        for p in place.tolist():
            group, chosen = self._at(p // self.count, p % self.count)
            captions.append(group.caption)
            images += chosen
        label = [self._numbers[c] if self._numbers else caption_label(c) for c in captions]
        return Drawn(images, torch.tensor(label), captions)

    def _at(self, epoch: int, place: int) -> tuple[Group, list[Tensor]]:
        """The group at a place of an epoch, and m of its images."""
        order = self._orders(epoch, 0, len(self._parts))
        ends = self._sizes[order].cumsum(0)
        slot = int(torch.searchsorted(ends, place, right=True))
        part = order[slot]
        size = int(self._sizes[part])
        i = self._orders(epoch, 1 + part, size)[place - int(ends[slot]) + size]
        group = self._load(part)[i]
        words = bits(self.seed, Stream.READ_CHOICE, epoch, torch.tensor([part << 32 | i]), len(group.replicas))[0]
        found: list[Tensor] = []
        for k in words.argsort(stable=True).tolist():
            try:
                found.append(_with_channels(groups.decode(group.replicas[k][1]), self.channels))
            except InputError as error:
                self._broken.add(str(error))
            if len(found) == self.per_caption:
                return group, found
        raise InputError(
            f"{self.path} has only {len(found)} whole images of {group.caption[:60]!r}, and {self.per_caption} are "
            "asked for: make the data set again by its command"
        )

    def _digest(self) -> str:
        """Of the manifest, or of names and sizes: enough to see that a resumed run has the same images."""
        facts = _manifest(self.path)
        if "spec" in facts:
            known: Any = {"spec": facts["spec"], "shards": {k: v["images"] for k, v in facts["shards"].items()}}
        else:
            known = [[part.name, int(size)] for part, size in zip(self._parts, self._sizes, strict=True)]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _manifest(path: Path) -> dict[str, Any]:
    """A data set's manifest, which `parts` has checked; nothing where there is none."""
    file = path / MANIFEST
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def require_captions(path: str | Path, digest: str, file: str) -> None:
    """Raises InputError if a data set holds images of other captions than a file's, or does not say of which.

    Args:
        digest: SHA-256 of the file's captions.
    """
    found = _manifest(Path(path)).get("spec", {}).get("captions")
    if found is None:
        raise InputError(f"--data {path} does not say which captions it was made of: leave out --captions {file}")
    if found != digest:
        raise InputError(
            f"--data {path} holds images of other captions than those of --captions {file}: give the file that it was "
            "made of, or leave --captions out"
        )


def all_captions(path: str | Path) -> list[str]:
    """The captions of a data set, for a tokenizer of their words. Raises InputError as `parts`."""
    return [g.caption for part in groups.parts(path) for g in part.load(Broken(2**31))]


def _with_channels(image: Tensor, channels: int) -> Tensor:
    if image.shape[0] == channels:
        return image
    if channels == 3:
        return image.expand(3, -1, -1)
    if torch.equal(image[:1].expand_as(image), image):
        return image[:1]
    raise InputError("it is in colour, but --channels is 1")


# ----------------------------------------------------------------------------- labelled sets


class Pictures(Protocol):
    """N images with one label each, as `dmd.data.images.ImageSet` has them in memory."""

    @property
    def labels(self) -> Tensor: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    def pick(self, index: Tensor) -> list[Tensor]:
        """Images (C, H, W) uint8 at places (M,)."""

    def digest(self) -> str:
        """Names the content."""


@dataclass(frozen=True, eq=False)
class Listed:
    """Image files of any sizes, which are decoded when they are drawn.

    Attributes:
        files: N of them.
        labels: (N,) int64.
        classes: their names.
        channels: as of `Stored`.
    """

    files: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]
    channels: int

    @classmethod
    def folder(cls, path: Path, channels: int, alone: bool) -> "Listed":
        """Class folders, see `dmd.represent.sets.class_files`; their training part where there are parts.

        Args:
            alone: where images lie in no class's folder, take each for a class of its own.

        Raises:
            InputError: it holds no image, or no classes.
        """
        root = path / "train" if (path / "train").is_dir() else path
        if alone and any(file.suffix.lower() in SUFFIXES for file in root.iterdir()):
            files = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            return cls(tuple(files), torch.arange(len(files)), tuple(str(f.relative_to(root)) for f in files), channels)
        found, labels, classes = sets.class_files(path, "train")
        return cls(tuple(found), labels, classes, channels)

    def pick(self, index: Tensor) -> list[Tensor]:
        found = []
        for i in index.tolist():
            image = torch.from_numpy(read_image(self.files[i], None).copy()).permute(2, 0, 1)
            try:
                found.append(_with_channels(image, self.channels))
            except InputError as error:
                raise InputError(f"{self.files[i]}: {error}") from None
        return found

    def digest(self) -> str:
        """Of names, sizes and labels: enough to see that a resumed run has the same images."""
        known = [[f.name, f.stat().st_size, c] for f, c in zip(self.files, self.labels.tolist(), strict=True)]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


class Labelled:
    """Images with classes for captions. An epoch holds every image once, in groups of m of one class; what is left of
    a class is left out, and so are classes of fewer images. Labels number the classes that are left.

    Args:
        data: images and labels.
        per_caption: m.
        seed: of the order.

    Raises:
        InputError: no class has m images.
    """

    def __init__(self, data: Pictures, per_caption: int, seed: int):
        self.data, self.per_caption, self.seed = data, per_caption, seed
        self._sizes = data.labels.bincount(minlength=len(data.classes))
        self._epoch = Recent(self._groups, 2)
        self.count = int((self._sizes // per_caption).sum())
        self.captions = int((self._sizes >= per_caption).sum())
        self._number = (self._sizes >= per_caption).cumsum(0) - 1
        self.digest = data.digest()
        if not self.count:
            most = int(self._sizes.max())
            raise InputError(f"no class has more than {most} images, and --per-caption asks for {per_caption}")

    def _groups(self, epoch: int) -> Tensor:
        """Numbers of the images of an epoch, (count, m)."""
        labels, m = self.data.labels, self.per_caption
        mixed = bits(self.seed, Stream.CLASS_ORDER, epoch, torch.arange(len(labels)), 1)[:, 0].argsort(stable=True)
        mixed = mixed[labels[mixed].argsort(stable=True)]  # class by class, each in an order of its own
        turn = torch.arange(len(labels)) - (self._sizes.cumsum(0) - self._sizes)[labels[mixed]]
        found = mixed[turn < (self._sizes // m * m)[labels[mixed]]].reshape(-1, m)
        order = bits(self.seed, Stream.READ_ORDER, epoch, torch.arange(len(found)), 1)[:, 0].argsort(stable=True)
        return found[order]

    def draw(self, step: int, place: Tensor) -> Drawn:
        rows = torch.stack([self._epoch(p // self.count)[p % self.count] for p in place.tolist()])
        classes = self.data.labels[rows[:, 0]]
        captions = [self.data.classes[c] for c in classes.tolist()]
        return Drawn(self.data.pick(rows.flatten()), self._number[classes], captions)


# ----------------------------------------------------------------------------- made while they are looked at


class Fresh:
    """Images of a student, new in every epoch, on its device. On a GPU those of the step after are begun while the
    learner works; steps in any order give the same images.

    Args:
        online: makes them; its batches are this process's.
        digest: names student, captions and seed.
    """

    def __init__(self, online: Online, digest: str):
        self.online, self.digest = online, digest
        self.count = self.captions = len(online.captions)
        self._begun: dict[int, Callable[[], FreshBatch]] = {}

    def draw(self, step: int, place: Tensor) -> Drawn:
        waiting = self._begun.pop(step, None) or self.online.begin(step)
        self._begun = {step + 1: self.online.begin(step + 1)}  # before the learner takes the device
        batch = waiting()
        m = self.online.per_caption
        return Drawn(list(to_uint8(batch.images)), batch.labels[::m], batch.captions)
