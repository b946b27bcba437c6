"""Frozen features: what a network says of every image of a set, kept on the disk by the content of both."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dmd import checkpoint
from dmd.errors import InputError
from dmd.metrics import assess, backbones
from dmd.metrics.backbones import Extractor, ImageTower, Standardised
from dmd.metrics.protocols import Prepare, bicubic
from dmd.metrics.sources import Pixels, Source
from dmd.represent.backbones import CONFIG, Backbone, load_backbone, require_divisible

NETWORKS = (
    "a run of dmd represent, its backbone/ folder, timm:NAME, torchvision:NAME, transformers:FOLDER_OR_ID, inception, "
    "or a classifier's file or folder"
)
OWN_SIZE = "the size that the network was made for"


@dataclass(frozen=True, eq=False)
class Frozen:
    """A network that is probed.

    Attributes:
        extractor: the network and the preparation of its input.
        facts: what determines the features of an image, besides the weights.
        tokens: prepared images (B, C, h, w), 0 to 255, to a grid of features (B, rows, columns, D); None where the
            network's are not known.
        folder: of a run of `dmd represent`, or None.
    """

    extractor: Extractor
    facts: dict[str, Any]
    tokens: Callable[[Tensor], Tensor] | None = None
    folder: Path | None = None

    @property
    def name(self) -> str:
        return self.extractor.network

    def prepared(self, images: list[Pixels]) -> Tensor:
        """Images as the network takes them, float32 (B, C, h, w) of 0 to 255."""
        return torch.from_numpy(np.stack([self.extractor.prepare(middle_square(image)) for image in images]))


def middle_square(image: Pixels) -> Pixels:
    """The largest square in the middle of an image: resized, it is what a centre crop of the resized image is."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


# ----------------------------------------------------------------------------- networks


def load(
    specification: str, size: int | None = None, weights: Path | None = None, download: bool = False,
    cache: Path = Path("runs/cache"),
) -> Frozen:  # fmt: skip
    """A network by `NETWORKS`, on the CPU.

    Args:
        size: height and width of its input; None takes the size that it was made for.
        weights, download, cache: as in `dmd.metrics.backbones.load`.

    Raises:
        InputError: there is no such network, its weights cannot be had, or it does not take images of that size.
    """
    folder = _backbone_folder(Path(specification))
    if folder is not None:
        if weights is not None:
            raise InputError(f"--weights {weights} cannot be used with {specification}, whose folder holds its weights")
        return of_backbone(load_backbone(folder), specification, size, folder.parent)
    extractor = backbones.load(specification, weights, download, cache, size)
    if size is not None:
        _require_size(extractor, size)
    kind = specification.partition(":")[0]
    facts = {"network": extractor.identity(), "crop": "middle square"}
    return Frozen(extractor, facts, TOKENS[kind](extractor.net) if kind in TOKENS else None)


def _backbone_folder(path: Path) -> Path | None:
    """The folder that `dmd represent` has written, of a run or by itself."""
    for folder in (path / "backbone", path):
        try:
            if "dmd" in json.loads((folder / CONFIG).read_text(encoding="utf-8")):
                return folder
        except (OSError, ValueError, TypeError):
            continue
    return None


def of_backbone(backbone: Backbone, name: str, size: int | None = None, folder: Path | None = None) -> Frozen:
    """A backbone of `dmd represent`. Raises InputError if its patches do not divide the size."""
    side = size or backbone.config.size
    if backbone.patch is not None:
        require_divisible(side, side, backbone.patch)
    resizing = f"antialiased bicubic to {side}x{side}"
    prepare = _channels(bicubic(side, side), backbone.config.channels, name)
    extractor = Extractor(name, f"FD-{name}", prepare, _OfBackbone(backbone), resizing)
    identity = {"weights": checkpoint.digest(backbone.net), "config": asdict(backbone.config), "size": side}
    facts = {"network": identity, "crop": "middle square"}

    def tokens(images: Tensor) -> Tensor:
        found = backbone.tokens(images / 127.5 - 1)
        return found.unflatten(1, backbone.grid(*images.shape[2:]))

    return Frozen(extractor, facts, tokens, folder)


class _OfBackbone(nn.Module):
    """A backbone that takes images of 0 to 255."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images / 127.5 - 1)


def _channels(prepare: Prepare, channels: int, name: str) -> Prepare:
    """A preparation to so many channels. InputError, by the result, for colour where the network knows grey."""
    if channels == 3:
        return prepare

    def grey(image: Pixels) -> NDArray[np.float32]:
        if in_colour(image):
            raise InputError(f"an image is in colour, but {name} takes grey ones: probe it with grey images")
        return prepare(image)[:1]

    return grey


def in_colour(image: Pixels) -> bool:
    """Whether the channels of an image (H, W, C) differ anywhere."""
    return bool((image != image[..., :1]).any())


def require_grey(source: Source, first: int = 64) -> None:
    """Raises InputError if one of the first images of a set is in colour, for networks that take grey ones: a sign
    before the work, where all images would take as long as the work."""
    if any(in_colour(image) for image in next(iter(source.batches(first)), [])):
        raise InputError(f"{source.name} has images in colour, but the backbone takes grey ones: give --channels 3")


def _require_size(extractor: Extractor, size: int) -> None:
    """Raises InputError if a network refuses images of a size, as it finds by one."""
    try:
        with torch.no_grad():
            extractor.net(torch.zeros(1, 3, size, size))
    except (AssertionError, ValueError, RuntimeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{extractor.network} takes no images of {size}x{size} pixels ({why}): give another") from None


def _timm_tokens(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Patch tokens of a vision transformer, or the last map of another network of timm."""
    from timm.models.vision_transformer import VisionTransformer

    assert isinstance(net, Standardised)
    trunk: Any = net.trunk

    def tokens(images: Tensor) -> Tensor:
        found = trunk.forward_features((images / 255 - net.mean) / net.std)
        if isinstance(trunk, VisionTransformer):
            rows, columns = trunk.patch_embed.grid_size
            return found[:, trunk.num_prefix_tokens :].unflatten(1, (rows, columns))
        return found.permute(0, 2, 3, 1)

    return tokens


def _transformers_tokens(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """The last hidden states of a network of transformers: a map, or the patches, which come last."""
    assert isinstance(net, Standardised)
    trunk: Any = net.trunk.clip.vision_model if isinstance(net.trunk, ImageTower) else net.trunk
    patch = trunk.config.to_dict().get("patch_size")
    high, wide = (patch, patch) if isinstance(patch, int) else patch or (1, 1)  # without patches, more than there are

    def tokens(images: Tensor) -> Tensor:
        found = trunk(pixel_values=(images / 255 - net.mean) / net.std).last_hidden_state
        if found.ndim == 4:
            return found.permute(0, 2, 3, 1)
        rows, columns = images.shape[2] // high, images.shape[3] // wide
        if found.shape[1] < rows * columns:
            raise InputError(f"where the {found.shape[1]} tokens of a {type(trunk).__name__} are is not known")
        return found[:, -rows * columns :].unflatten(1, (rows, columns))

    return tokens


TOKENS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "timm": _timm_tokens,
    "transformers": _transformers_tokens,
}
"""By the word before the colon. Other packages' networks have no common way to their tokens."""


# ----------------------------------------------------------------------------- looking


def features(source: Source, net: Frozen, cache: Path, device: torch.device, batch: int, show: bool) -> Tensor:
    """Features of all images, float32 (N, D) on the CPU, from `cache` if the same images were seen by the same network.

    A file is named by the SHA-256 of what determines it, and counts only if its content has the sum in its header.

    Raises:
        InputError: an image cannot be read or is refused, or its features are not finite.
    """
    facts = net.facts | {"images": source.digest(), "dtype": "float32"}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    file = cache / f"{name}.safetensors"
    found = _cached(file)
    if found is None:
        look = assess.features(source, net.extractor, middle_square, device)
        seen, _ = assess.look(source, {"features": look}, batch, show)
        found = seen["features"].contiguous()
        checkpoint.save_tensors({"features": found}, file, {"sha256": _sum(found)})
    return found


def _sum(x: Tensor) -> str:
    return hashlib.sha256(x.numpy().data).hexdigest()


def _cached(file: Path) -> Tensor | None:
    """What a whole file holds."""
    try:
        with safe_open(file, "pt") as opened:
            found = opened.get_tensor("features")
            return found if (opened.metadata() or {}).get("sha256") == _sum(found) else None
    except (OSError, ValueError, SafetensorError):
        return None


@torch.no_grad()
def grids(images: Tensor, net: Frozen, device: torch.device, batch: int) -> Tensor:
    """Patch tokens of prepared images, float32 (B, rows, columns, D) on the CPU. For networks with `tokens` only."""
    assert net.tokens is not None
    net.extractor.net.to(device)
    return torch.cat([net.tokens(part.to(device)).float().cpu() for part in images.split(batch)])
