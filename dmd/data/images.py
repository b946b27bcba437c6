"""Labelled image sets: one value, `ImageSet`, and the layouts on disk that it is read from.

Images are uint8 NCHW at the rim and float32 in [-1, 1] inside. Nothing is resized, cropped or recoloured in
silence. Nothing that a user downloads is unpickled, save CIFAR-10 batches with their authors' checksums.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dmd.errors import InputError

Split = Literal["train", "test"]
SPLITS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_CLASSES = 2**16  # without names; a broken label must not fill the memory with them
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
LAYOUTS = (
    "train.npz and test.npz, train/CLASS/*.png and test/CLASS/*.png, CLASS/*.png (png, jpg or webp), "
    "cifar-10-batches-py/ or FashionMNIST/raw/"
)
# What numpy raises for a file that is cut, foreign, or claims to be larger than memory.
NPZ_ERRORS = (OSError, ValueError, EOFError, TypeError, RuntimeError, MemoryError, ZlibError, BadZipFile)
CIFAR10_FOLDER, FASHION_FOLDER = "cifar-10-batches-py", "FashionMNIST/raw"


def to_float(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]; 0 is -1 and 255 is 1."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Float images to the nearest of 256 levels, clamped to [-1, 1] first: what a PNG file of them holds."""
    if images.device.type != "cpu" or images.dim() != 4:
        return _levels(images).to(torch.uint8)
    found = torch.empty(images.shape, dtype=torch.uint8, memory_format=torch.channels_last)  # as encoders read them
    some = max(1, IN_CACHE // max(1, images[:1].numel()))
    for part, bytes_ in zip(images.split(some), found.split(some), strict=True):
        bytes_.copy_(_levels(part))
    return found


IN_CACHE = 1 << 18
"""Values that stay in a core's cache from one operation to the next."""


def _levels(images: Tensor) -> Tensor:
    return images.float().clamp(-1.0, 1.0).add_(1.0).mul_(127.5).round_()


def pad_to(images: Tensor, size: int) -> Tensor:
    """Centre images (..., H, W) on a black size x size canvas; an odd rest goes to the bottom and the right.

    Black is 0 for uint8 and -1 for float images.

    Raises:
        ValueError: the images are larger than the canvas.
    """
    height, width = images.shape[-2:]
    if max(height, width) > size:
        raise ValueError(f"images of {height}x{width} pixels do not fit into {size}x{size} pixels")
    top, left = (size - height) // 2, (size - width) // 2
    black = 0 if images.dtype == torch.uint8 else -1
    return F.pad(images, (left, size - width - left, top, size - height - top), value=black)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with one label each.

    Attributes:
        images: (N, C, H, W) uint8, N > 0.
        labels: (N,) int64 in [0, len(classes)).
        classes: the class names, in the order of the labels.

    Raises:
        ValueError: a type, shape, count or label is not as above.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0:
            raise ValueError(f"images must be uint8 (N > 0, C, H, W), not {images.dtype} {tuple(images.shape)}")
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise ValueError(f"labels must be int64 (N,), not {labels.dtype} {tuple(labels.shape)}")
        if len(labels) != len(images):
            raise ValueError(f"there are {len(images)} images but {len(labels)} labels: each image needs one")
        wrong = labels[(labels < 0) | (labels >= len(self.classes))]
        if len(wrong):
            raise ValueError(f"label {int(wrong[0])} is not in 0 to {len(self.classes) - 1}, the classes' range")

    def __len__(self) -> int:
        return len(self.images)

    def pick(self, index: Tensor) -> list[Tensor]:
        """Images (C, H, W) at places (M,)."""
        return list(self.images[index])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def pixels(self, index: Tensor) -> Tensor:
        """The images at int64 (B,) `index`: float32 (B, C, H, W) in [-1, 1]."""
        return to_float(self.images[index])

    def select(self, index: Tensor) -> "ImageSet":
        """The part at int64 (M,) or bool (N,) `index`, with the same classes."""
        return ImageSet(self.images[index], self.labels[index], self.classes)

    def digest(self) -> str:
        """SHA-256 (hex) of shape, classes, labels and pixels: equal if and only if the content is."""
        sha = hashlib.sha256(repr((tuple(self.images.shape), self.classes)).encode())
        sha.update(self.labels.cpu().contiguous().numpy().data)
        sha.update(self.images.cpu().contiguous().numpy().data)
        return sha.hexdigest()


def digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, (1, 8, 8); its grey levels 0..16 become 0..255, rounded."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)
    return ImageSet(images[:, None], torch.from_numpy(bunch.target).long(), tuple(str(c) for c in range(10)))


def load(path: str | Path, split: Split, size: int | None = None, channels: int | None = None) -> ImageSet:
    """Read one split of a labelled image set.

    `path` is a single .npz file (the same for both splits) or a folder in one of these layouts:

    * `train.npz` and `test.npz`: `images` uint8 (N, H, W, C), `labels` integer (N,), maybe `class_names`;
    * `train/CLASS/*` and `test/CLASS/*` (.png, .jpg, .webp): a class has one label in both splits;
    * `CLASS/*`: the same images for both splits;
    * torchvision's `cifar-10-batches-py/` or `FashionMNIST/raw/` (see `download`).

    Args:
        path: a file or folder.
        split: "train" or "test".
        size: height and width that every image must have; None takes those of the first.
        channels: 1 or 3; None keeps what the files have. Grey becomes colour by repetition, and
            colour becomes grey only where that loses nothing.

    Raises:
        InputError: path or split is missing, the layout is unknown, or a file is broken or not as asked for.
    """
    path = Path(path)
    if split not in SPLITS:
        raise InputError(f"split '{split}' is unknown: it must be 'train' or 'test'")
    if channels not in (None, 1, 3):
        raise InputError(f"channels {channels} is not possible: it must be 1 or 3")
    raw = _read(path, split, size)
    try:
        _check(raw, size)
        images = _with_channels(torch.from_numpy(raw.images).permute(0, 3, 1, 2), channels).contiguous()
        return ImageSet(images, torch.from_numpy(raw.labels.astype(np.int64)), raw.classes)
    except ValueError as error:
        raise InputError(f"{raw.source}: {error}") from error


def download(name: str, path: str | Path) -> None:
    """Fetch "cifar10" or "fashion" into the folder `path` with torchvision, for `load(path, ...)` to read.

    Raises:
        InputError: another name, or the download failed.
    """
    from torchvision import datasets

    sources = {"cifar10": datasets.CIFAR10, "fashion": datasets.FashionMNIST}
    if name not in sources:
        raise InputError(f"data set '{name}' cannot be downloaded: choose from {', '.join(sources)}")
    try:
        sources[name](str(path), download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{name} could not be downloaded, so put it into {path}: {error}") from error


class _Raw(NamedTuple):
    """What a reader found: images (N, H, W, C) and labels (N,), not yet checked."""

    source: Path
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


def _read(path: Path, split: str, size: int | None) -> _Raw:
    if not path.exists():
        raise InputError(f"{path} does not exist: give an .npz file or a folder of images")
    if path.is_file():
        return _read_npz(path)
    if not any(path.iterdir()):
        raise InputError(f"folder {path} is empty: it must hold {LAYOUTS}")
    if any((path / f"{s}.npz").is_file() for s in SPLITS):
        return _read_npz(_existing(path / f"{split}.npz"))
    if (path / CIFAR10_FOLDER).is_dir():
        return _read_cifar10(path, split)
    if (path / FASHION_FOLDER).is_dir():
        return _read_fashion(path, split)
    if any((path / s).is_dir() for s in SPLITS):
        classes = sorted({folder.name for s in SPLITS for folder in _folders(path / s)})
        return _read_folder(_existing(path / split), classes, size)
    if any(file.suffix.lower() in SUFFIXES for folder in _folders(path) for file in folder.iterdir()):
        return _read_folder(path, [folder.name for folder in _folders(path)], size)
    raise InputError(f"folder {path} has no known layout: it must hold {LAYOUTS}")


def is_packed(path: Path) -> bool:
    """Whether a folder holds arrays, which are read whole, and not image files."""
    packed = [path / f"{split}.npz" for split in SPLITS] + [path / CIFAR10_FOLDER, path / FASHION_FOLDER]
    return any(file.exists() for file in packed)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path} does not exist, though the folder holds the other split: add it")
    return path


def _check(raw: _Raw, size: int | None) -> None:
    images, labels = raw.images, raw.labels
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise InputError(f"images must be uint8 (N, H, W, 1 or 3), not {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu":
        raise InputError(f"labels must be integers, not {labels.dtype}")
    if size is not None and images.shape[1:3] != (size, size):
        raise InputError(_size_sentence("images are", images.shape[1:3], (size, size)))


def _size_sentence(what: str, found: Sequence[int], wanted: Sequence[int]) -> str:
    height, width = wanted
    return f"{what} {found[0]}x{found[1]} pixels instead of {height}x{width}: resize first, it is not done here"


def _with_channels(images: Tensor, channels: int | None) -> Tensor:
    if channels is None or images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    if not (images == images[:, :1]).all():
        raise InputError("images are in colour, but 1 channel was asked for: ask for 3 or make them grey")
    return images[:, :1]


def _read_npz(path: Path) -> _Raw:
    arrays = _npz_arrays(path)
    missing = [key for key in ("images", "labels") if key not in arrays]
    if missing:
        keys = ", ".join(arrays) or "nothing"
        raise InputError(f"{path} lacks '{missing[0]}': it needs 'images' and 'labels', and holds {keys}")
    labels = arrays["labels"]
    if "class_names" not in arrays:
        count = int(labels.max()) + 1 if labels.size and labels.dtype.kind in "iu" else 0
        return _Raw(path, arrays["images"], labels, tuple(str(c) for c in range(min(count, MAX_CLASSES))))
    names = arrays["class_names"]
    if names.dtype.kind not in "US" or names.ndim != 1:
        raise InputError(f"{path}: class_names must be a list of strings, not {names.dtype} {names.shape}")
    return _Raw(path, arrays["images"], labels, tuple(names.astype(str).tolist()))


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:  # object arrays are pickles: refused with ValueError
            keys = [key for key in file.files if key in ("images", "labels", "class_names")]
            return {key: np.asarray(file[key]) for key in keys}
    except NPZ_ERRORS as error:  # numpy's sentence is left out: it suggests unpickling
        raise InputError(f"{path} is not a readable .npz file of plain (not object) arrays") from error


def _read_cifar10(path: Path, split: str) -> _Raw:
    from torchvision.datasets import CIFAR10

    # These batches are pickles. torchvision compares the MD5 of every file with the published one before it
    # opens any of them and raises RuntimeError otherwise, so only the authors' own pickles are ever loaded.
    try:
        data: Any = CIFAR10(str(path), train=split == "train", download=False)
    except RuntimeError as error:
        raise InputError(f"{path / CIFAR10_FOLDER} is incomplete or damaged: download it again") from error
    return _Raw(path / CIFAR10_FOLDER, data.data, np.asarray(data.targets), tuple(data.classes))


def _read_fashion(path: Path, split: str) -> _Raw:
    from torchvision.datasets import FashionMNIST

    # Plain binary idx files; the parser fails in several ways on a cut or foreign one.
    try:
        data: Any = FashionMNIST(str(path), train=split == "train", download=False)
    except (RuntimeError, ValueError, TypeError, AssertionError, KeyError, IndexError, OSError) as error:
        raise InputError(f"{path / FASHION_FOLDER} must hold the four unpacked idx files, whole") from error
    images, labels = data.data.numpy()[..., None], data.targets.numpy()
    return _Raw(path / FASHION_FOLDER, images, labels, tuple(data.classes))


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _read_folder(path: Path, classes: Sequence[str], size: int | None) -> _Raw:
    listing = [(label, file) for label, name in enumerate(classes) for file in _image_files(path / name)]
    if not listing:
        raise InputError(f"folder {path} holds no CLASS/*.png, .jpg or .webp: put each class in a folder")
    wanted = None if size is None else (size, size)
    images = []
    for _, file in tqdm(listing, desc=f"reading {path.name}", unit="image", delay=2, leave=False):
        images.append(read_image(file, wanted))
        wanted = images[0].shape[:2]
    labels = np.asarray([label for label, _ in listing])
    depth = max(image.shape[2] for image in images)  # grey files may stand among colour ones
    images = [np.broadcast_to(image, (*image.shape[:2], depth)) for image in images]
    return _Raw(path, np.stack(images), labels, tuple(classes))


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():  # this split lacks a class of the other
        return []
    files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    for file in files:
        if file.suffix.lower() not in SUFFIXES or not file.is_file():
            raise InputError(f"{file} is not an image: class folders hold only {', '.join(SUFFIXES)} files")
    if not files:
        raise InputError(f"class folder {folder} is empty: put images into it or remove it")
    return files


def read_image(file: Path | BinaryIO, wanted: tuple[int, int] | None, name: str | None = None) -> np.ndarray:
    """(H, W, 1 or 3) uint8, of height and width `wanted`, which are compared before the pixels are decoded.

    Args:
        file: a path, or the opened content of a file that is called `name`.

    Raises:
        InputError: the file is missing or broken, of another size, transparent, or of more than 8 bits.
    """
    from PIL import Image, UnidentifiedImageError

    name = str(file) if name is None else name
    try:
        with Image.open(file) as image:
            found = (image.height, image.width)
            if wanted in (None, found):
                return plain(image)
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a readable 8-bit image: it is of no known kind, or cut") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} is not a readable 8-bit image: {error}") from error
    raise InputError(_size_sentence(f"{name} is", found, wanted))


def plain(image: Any) -> np.ndarray:
    """A PIL image without palette and transparency."""
    if image.mode not in MODES:
        raise InputError(f"its mode is {image.mode}, and only 8-bit grey, palette, RGB and RGBA are read")
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None]
    pixels = np.asarray(image.convert("RGBA"))
    if (pixels[..., 3] != 255).any():
        raise InputError("it is transparent, so put it on a background first")
    return pixels[..., :1] if image.mode == "LA" else pixels[..., :3]
