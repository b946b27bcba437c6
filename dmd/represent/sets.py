"""Labelled sets that features are probed on: folders, .npz, tars, torchvision's data sets, digits and shapes.

Every set becomes a `Source` of the metrics with labels, read a few images at a time, of any sizes. Where a set comes
without parts of its own (digits, Caltech101, ...), its parts are drawn here by class, the same ones every time.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dmd.data import images, shapes, tar
from dmd.data.images import CIFAR10_FOLDER, FASHION_FOLDER, SUFFIXES, ImageSet, plain
from dmd.errors import InputError
from dmd.log import progress
from dmd.metrics.sources import MAX_MEMBER, THREADS, Arrays, Encoded, Entry, Pixels, Source, listed
from dmd.seeding import Stream, bits

Part = Literal["train", "val", "test"]
PARTS = ("train", "val", "test")

KINDS = (
    "digits, shapes, torchvision:NAME:FOLDER, a folder of train/CLASS/* and test/CLASS/* or of CLASS/*, an .npz with "
    "'images' and 'labels', tar shards with .cls members or a \"label\" in .json, or a folder with metadata.jsonl and "
    'a "label" in its lines'
)
TEST_SHARE = 0.25
"""Of a set that comes without parts."""
SHAPES_TRAIN, SHAPES_TEST = 4000, 2000
SHAPES_FROM = 1 << 43
"""Scenes and drawings from this index on are for probes; nothing else is drawn from there."""


class Selectable(Source, Protocol):
    """A source of which a part can be taken."""

    def select(self, index: Iterable[int]) -> "Selectable": ...


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """A part of a data set.

    Attributes:
        source: N images.
        labels: int64 (N,) in [0, len(classes)).
        classes: their names.
        mean_class: the set's protocol averages accuracy over classes, not images.
    """

    source: Selectable
    labels: Tensor
    classes: tuple[str, ...]
    mean_class: bool = False

    def __len__(self) -> int:
        return len(self.labels)


def read(specification: str, part: Part, show: bool = False) -> LabelledSet:
    """A part of a labelled set by `KINDS`.

    Raises:
        InputError: there is no such set or part, it has no labels or no images, or a file is broken.
    """
    if specification == "digits":
        return _of_images("digits", drawn_part(images.digits(), part))
    if specification == "shapes":
        return _of_images("shapes", shapes_part(part))
    kind, _, rest = specification.partition(":")
    if kind == "torchvision":
        return _torchvision(rest, part, show)
    path = Path(specification)
    if not path.exists():
        raise InputError(f"there is no labelled set {specification!r}: give {KINDS}")
    if path.is_dir() and not any(path.iterdir()):
        raise InputError(f"folder {path} is empty: give {KINDS}")
    if path.suffix.lower() == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return _tars(path)
    if (path / "metadata.jsonl").is_file():
        return _table(path)
    if path.suffix.lower() == ".npz" or any((path / f"{name}.npz").is_file() for name in PARTS):
        return _npz(path, part)
    if (path / CIFAR10_FOLDER).is_dir() or (path / FASHION_FOLDER).is_dir():
        if part == "val":
            raise InputError(
                f"{path} has no validation part: leave out --val, and it is drawn from the training images"
            )
        return _of_images(str(path), images.load(path, part))
    return _class_folders(path, part)


def _of_images(name: str, found: ImageSet) -> LabelledSet:
    return LabelledSet(Arrays.of(name, found), found.labels, found.classes)


# ----------------------------------------------------------------------------- parts


def drawn(labels: Tensor, share: float | int, seed: int = 0) -> Tensor:
    """bool (N,): which images of each class are drawn, a share of them (at least 1 and not all), or so many.

    Which ones depends on the seed and the labels alone. A class of a single image is not drawn from.
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    words = bits(seed, Stream.PROBE_SPLIT, 0, torch.arange(len(labels)), 1)[:, 0]
    for c in labels.unique():
        members = torch.nonzero(labels == c)[:, 0]
        count = max(1, round(share * len(members))) if isinstance(share, float) else share
        chosen[members[words[members].argsort(stable=True)[: min(count, len(members) - 1)]]] = True
    return chosen


def drawn_part(whole: ImageSet, part: Part) -> ImageSet:
    """The training or test part of a set that comes without parts. InputError for the validation part."""
    if part == "val":
        raise InputError("the set has no validation part: leave out --val, and it is drawn from the training images")
    test = drawn(whole.labels, TEST_SHARE)
    return whole.select(test if part == "test" else ~test)


def shapes_part(part: Part) -> ImageSet:
    """Drawings of single things, whose class is their colour and shape; 4,000 to train and 2,000 others to test."""
    if part == "val":
        raise InputError("shapes have no validation part: leave out --val, and it is drawn from the training images")
    count, first = (SHAPES_TEST, 1 << 20) if part == "test" else (SHAPES_TRAIN, 0)
    index = SHAPES_FROM + first + torch.arange(4 * count)
    single = [(s, i) for s, i in zip(shapes.scenes(0, index), index.tolist(), strict=True) if len(s.things) == 1][
        :count
    ]
    labels = [shapes.PAIRS.index((s.things[0].shape, s.things[0].colour)) for s, _ in single]
    drawings = shapes.batch([s for s, _ in single], 0, torch.tensor([i for _, i in single]))
    names = tuple(f"{colour} {shape}" for shape, colour in shapes.PAIRS)
    return ImageSet(drawings, torch.tensor(labels), names)


# ----------------------------------------------------------------------------- files


def _npz(path: Path, part: Part) -> LabelledSet:
    file = path if path.is_file() else path / f"{part}.npz"
    if not file.is_file():
        raise InputError(f"{file} does not exist, though the folder holds another part: add it")
    return _of_images(str(file), images.load(file, "train"))  # a single file has one part, whatever it is called


def _class_folders(path: Path, part: Part) -> LabelledSet:
    files, labels, names = class_files(path, part)
    entries = tuple(Entry(file, 0, file.stat().st_size, str(file)) for file in files)
    return _encoded(str(path / part if (path / part).is_dir() else path), entries, labels, names)


def class_files(path: Path, part: Part) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """CLASS/* at any depth below a class, of a part or of the folder itself; a class has one label in all parts.

    Returns:
        image files, their labels, and the classes' names.

    Raises:
        InputError: there is no such folder or part, or it holds no image in a class's folder.
    """
    if not path.is_dir():
        raise InputError(f"{path} is of no known kind: give {KINDS}")
    roots = [path / name for name in PARTS if (path / name).is_dir()]
    root = path / part if roots else path
    if not root.is_dir():
        raise InputError(f"{root} does not exist, though {path} holds {roots[0].name}: add it, or give another set")
    names = sorted({folder.name for base in roots or [path] for folder in _folders(base)})
    found = [(label, file) for label, name in enumerate(names) for file in _files(root / name)]
    if not found:
        loose = any(file.suffix.lower() in SUFFIXES for file in root.iterdir())
        why = "holds images without labels" if loose else "holds no image"
        raise InputError(f"{root} {why}: put each class into a folder of its own, or give {KINDS}")
    return [file for _, file in found], torch.tensor([label for label, _ in found]), tuple(names)


def _folders(path: Path) -> list[Path]:
    return [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():  # this part lacks a class of another
        return []
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _encoded(name: str, entries: tuple[Entry, ...], labels: Tensor, classes: tuple[str, ...]) -> LabelledSet:
    return LabelledSet(Encoded(name, entries, None, tuple(labels.tolist())), labels, classes)


def _table(path: Path) -> LabelledSet:
    """A folder with metadata.jsonl whose lines have a "label", a word or a number, beside the file_name."""
    entries, found = listed(path, lambda where, line: _label(json.loads(line), where))
    return _encoded(str(path), entries, *_numbered(found))


def _tars(path: Path) -> LabelledSet:
    """Webdataset shards whose samples have a .cls member, or a .json with a "label"."""
    shards = [path] if path.is_file() else sorted(path.glob("*.tar"))
    entries, found = [], []
    for shard in shards:
        for entry, label in _samples(shard):
            entries.append(entry)
            found.append(label)
    if not entries:
        raise InputError(f"{path} holds no image: its samples need a member that ends in {', '.join(SUFFIXES)}")
    return _encoded(str(path), tuple(entries), *_numbered(found))


def _samples(shard: Path) -> Iterator[tuple[Entry, str | int]]:
    """Image and label of each run of members whose names are equal up to their extension."""
    runs: dict[str, dict[str, tar.Member]] = {}
    for member in tar.members(shard):
        sample, extension = tar.split(member.name)
        runs.setdefault(sample, {}).setdefault(extension, member)
    with open(shard, "rb") as file:
        for parts in runs.values():
            image = next((parts[s[1:]] for s in SUFFIXES if s[1:] in parts), None)
            if image is None:
                continue
            where = f"{shard}, member {image.name!r}"
            if image.size > MAX_MEMBER:
                raise InputError(f"{where} has {image.size} bytes: an image has at most {MAX_MEMBER}")
            label = next((parts[e] for e in ("cls", "json") if e in parts), None)
            text = b""
            if label is not None and label.size <= 2**20:
                file.seek(label.offset)
                text = file.read(label.size)
            yield Entry(shard, image.offset, image.size, where), _label(_facts(text), where)


def _facts(text: bytes) -> Any:
    """A .json, or the number or word of a .cls, as {"label": ...}."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = text.decode("utf-8", "replace").strip() or None
    return found if isinstance(found, dict) else {"label": found}


def _label(facts: Any, where: str) -> str | int:
    label = facts.get("label") if isinstance(facts, dict) else None
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise InputError(f"{where} has no label: a probe needs images of known classes, such as {KINDS}")
    return label


def _numbered(found: Sequence[str | int]) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as numbers and the classes' names, in the order of numbers, or of the alphabet."""
    if all(isinstance(label, int) for label in found):
        names = sorted(set(found))
    else:
        found = [str(label) for label in found]
        names = sorted(set(found))
    at = {name: number for number, name in enumerate(names)}
    return torch.tensor([at[label] for label in found]), tuple(map(str, names))


# ----------------------------------------------------------------------------- torchvision


@dataclass(frozen=True)
class Known:
    """How a torchvision data set is asked for its parts.

    Attributes:
        parts: arguments by part; none at all for a set that comes whole.
        mean_class: its protocol averages over classes (SynCLR, arXiv 2312.17742, appendix).
        train: images of each class that are drawn to train on, of a set that comes whole.
        names: its attribute with the classes' names; None for a set that has numbers only.
        given: arguments of every part. Nothing is ever downloaded here.
    """

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    mean_class: bool = False
    train: float | int = 1 - TEST_SHARE
    names: str | None = "classes"
    given: dict[str, Any] = field(default_factory=lambda: {"download": False})


def _named(train: str = "train", test: str = "test", val: str | None = None) -> dict[str, dict[str, Any]]:
    found = {"train": {"split": train}, "test": {"split": test}}
    return found | ({"val": {"split": val}} if val else {})


FLAGGED: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}

TORCHVISION = {
    "CIFAR10": Known(FLAGGED), "CIFAR100": Known(FLAGGED), "MNIST": Known(FLAGGED), "FashionMNIST": Known(FLAGGED),
    "KMNIST": Known(FLAGGED), "QMNIST": Known(FLAGGED),
    "EMNIST": Known(FLAGGED, given={"split": "balanced", "download": False}), "USPS": Known(FLAGGED, names=None),
    "STL10": Known(_named()), "SVHN": Known(_named(), names=None), "FER2013": Known(_named(), names=None, given={}),
    "Food101": Known(_named()), "StanfordCars": Known(_named()), "GTSRB": Known(_named(), names=None),
    "DTD": Known(_named(val="val")), "Flowers102": Known(_named(val="val"), True),
    "FGVCAircraft": Known(_named(val="val"), True), "OxfordIIITPet": Known(_named("trainval"), True),
    "Country211": Known(_named(val="valid")), "RenderedSST2": Known(_named(val="val")),
    "PCAM": Known(_named(val="val"), names=None), "CLEVRClassification": Known(_named(test="val"), names=None),
    "ImageNet": Known(_named(test="val"), given={}), "Imagenette": Known(_named(test="val")),
    "Places365": Known(_named("train-standard", "val"), given={"small": True, "download": False}),
    "Caltech101": Known(mean_class=True, train=30, names="categories"),
    "Caltech256": Known(train=60, names="categories"), "SUN397": Known(train=50), "EuroSAT": Known(),
    "SEMEION": Known(names=None),
}  # fmt: skip
"""By torchvision's name. Caltech101 is torchvision's, without the background class; to train on 30 images of a class of
it, 60 of Caltech256 and 50 of SUN397 is the custom. EMNIST is its balanced part, Places365 that of 256 pixels. None of
them unpickles a file, but for CIFAR, whose files must have their authors' checksums, as in `dmd.data.images`."""


def _torchvision(rest: str, part: Part, show: bool) -> LabelledSet:
    from torchvision import datasets

    name, _, folder = rest.partition(":")
    if name not in TORCHVISION or not folder:
        raise InputError(
            f"'torchvision:{rest}' names no labelled set: give torchvision:NAME:FOLDER, with one of "
            f"{', '.join(TORCHVISION)} and the folder that torchvision keeps it in"
        )
    known = TORCHVISION[name]
    if part not in (known.parts or ("train", "test")):
        raise InputError(f"{name} has no part {part!r}: leave out --val, and it is drawn from the training images")
    if not Path(folder).is_dir():  # some would make it
        raise InputError(f"{name} cannot be read from {folder}, which is no folder: let torchvision download it there")
    try:
        found = getattr(datasets, name)(folder, **known.given, **known.parts.get(part, {}))
    except Exception as error:  # a parser fails on a cut or foreign file in whatever way
        raise InputError(
            f"{name} cannot be read from {folder} ({_why(error)}): let torchvision download it there"
        ) from None
    source = TorchvisionSource.of(f"{name} ({part})", found, show)
    names = [c if isinstance(c, str) else str(c[0]) for c in getattr(found, known.names)] if known.names else []
    count = int(source.labels.max()) + 1
    classes = tuple(names) if len(names) >= count else tuple(map(str, range(count)))
    if not known.parts:
        # by content, since some list their files as the disk does
        source = source.select(sorted(range(len(source)), key=source.sums.__getitem__))
        train = drawn(source.labels, known.train)
        source = source.select(torch.nonzero(train if part == "train" else ~train)[:, 0].tolist())
    return LabelledSet(source, source.labels, classes, known.mean_class)


def _why(error: Exception) -> str:
    """The first line of an error's text, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True, eq=False)
class TorchvisionSource:
    """A torchvision data set of (PIL image, class) as a `Source`.

    Attributes:
        name: what it is called.
        dataset: the whole set.
        index: int64 (N,) which of its images.
        labels: int64 (N,).
        sums: SHA-256 of each image's pixels.
    """

    name: str
    dataset: Any
    index: Tensor
    labels: Tensor
    sums: tuple[bytes, ...]
    captions: None = None

    @classmethod
    def of(cls, name: str, dataset: Any, show: bool) -> "TorchvisionSource":
        """All images, which are read once for their labels and their sums.

        Raises:
            InputError: the set is empty, or an image is missing, broken, without a label, or not of 8 bits.
        """
        labels, sums = [], []
        read = partial(_item, name, dataset)
        with ThreadPoolExecutor(THREADS) as pool, progress(len(dataset), 0, f"reading {name}", show, "img") as bar:
            for pixels, label in pool.map(read, range(len(dataset))):
                sums.append(hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).data).digest())
                labels.append(label)
                bar.update()
        if not labels:
            raise InputError(f"{name} holds no image: give {KINDS}")
        return cls(name, dataset, torch.arange(len(labels)), torch.tensor(labels), tuple(sums))

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, size: int) -> Iterator[list[Pixels]]:
        read = partial(_item, self.name, self.dataset)
        with ThreadPoolExecutor(THREADS) as pool:
            for part in self.index.split(size):
                yield [pixels for pixels, _ in pool.map(read, part.tolist())]

    def where(self, index: int) -> str:
        return f"{self.name}, image {int(self.index[index])}"

    def digest(self) -> str:
        return hashlib.sha256(b"".join(self.sums)).hexdigest()

    def select(self, index: Iterable[int]) -> "TorchvisionSource":
        """A part of the images."""
        kept = torch.tensor(list(index), dtype=torch.int64)
        sums = tuple(self.sums[i] for i in kept.tolist())
        return TorchvisionSource(self.name, self.dataset, self.index[kept], self.labels[kept], sums)


def _item(name: str, dataset: Any, index: int) -> tuple[Pixels, int]:
    """Pixels and label of an image of a torchvision set. InputError if it is missing, broken or has no label."""
    try:
        image, label = dataset[index]
        return plain(image), int(label)
    except Exception as error:  # of a decoder, or of an image without a label
        raise InputError(f"{name}, image {index}, cannot be read: {_why(error)}") from None


# ----------------------------------------------------------------------------- two sets together


def check(found: LabelledSet) -> LabelledSet:
    """The set, if it can be probed. Raises InputError if it has one class only."""
    present = found.labels.unique()
    if len(present) < 2:
        raise InputError(
            f"all {len(found):,} images of {found.source.name} are of one class, {found.classes[int(present[0])]!r}: "
            "a probe tells classes apart, so give at least two"
        )
    return found


def require_apart(parts: Mapping[str, LabelledSet]) -> None:
    """Raises InputError if two parts, by what they were asked for with, have the same images."""
    seen: dict[str, str] = {}
    for flag, part in parts.items():
        first = seen.setdefault(part.source.digest(), flag)
        if first != flag:
            raise InputError(
                f"{flag} has the same images as {first}, {part.source.name}: give others, or a set that has parts"
            )


def aligned(other: LabelledSet, train: LabelledSet, role: str) -> Tensor:
    """Labels of another part, (N,), in the numbers of the training set's classes of the same names.

    Raises:
        InputError: a class of it is not among those that there are training images of.
    """
    if other.classes == train.classes and set(other.labels.tolist()) <= set(train.labels.tolist()):
        return other.labels  # even where two classes have one name, as ImageNet's cranes
    seen = {train.classes[c]: c for c in train.labels.unique().tolist()}
    names = [other.classes[c] for c in other.labels.unique().tolist()]
    strange = [name for name in names if name not in seen]
    if strange:
        shown = ", ".join(list(seen)[:10]) + (", ..." if len(seen) > 10 else "")
        raise InputError(
            f"the labels of the two sets disagree: {other.source.name} ({role}) has the class {strange[0]!r}, and "
            f"{train.source.name} (train) has images of {shown} only"
        )
    return torch.tensor([seen.get(name, -1) for name in other.classes])[other.labels]
