"""Networks whose features distances are taken of: Inception, timm's, torchvision's, transformers', and our own.

Each becomes an `Extractor`, which knows how an image becomes its input and what distances on its features are called.
Nothing is downloaded unless that was asked for, and no file is unpickled.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd import checkpoint
from dmd.errors import InputError
from dmd.metrics import inception, networks, shapes_net
from dmd.metrics.networks import IMAGENET_MEAN, IMAGENET_STD, FeatureNet
from dmd.metrics.protocols import Prepare, bicubic, exactly

SPECIFICATIONS = (
    "inception, timm:NAME, torchvision:NAME, transformers:FOLDER_OR_ID, a resnetNN-*.th file of "
    "pytorch_resnet_cifar10, the folder of a classifier that a run has trained, or shapes-features"
)


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network that turns images into features.

    Attributes:
        network: its name.
        label: what its Fréchet distance is called: FID for Inception, FD-... for all others.
        prepare: an image to its input, (C, h, w) of 0 to 255.
        net: inputs (B, C, h, w) to features (B, D), in evaluation mode.
        resizing: in words, what `prepare` does.
        head: features (B, D) to logits (B, K), for a classifier of classes that sources know; else None.
    """

    network: str
    label: str
    prepare: Prepare
    net: nn.Module
    resizing: str
    head: nn.Module | None = None

    def identity(self) -> str:
        """What determines the features of an image: a network's weights, name and preparation."""
        return f"{self.network}, {self.resizing}, {checkpoint.digest(self.net)}"


class Standardised(nn.Module):
    """A trunk that takes images with each channel's mean removed and divided by its deviation, as many are trained.

    Args:
        trunk: standardised images to features (B, D), or to what `pool` makes them of.
        mean, std: per channel, of images in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pool: Callable[[Any], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.trunk, self.pool = trunk, pool
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, h, w) of 0 to 255."""
        return self.pool(self.trunk((images / 255 - self.mean) / self.std))


class OfClassifier(nn.Module):
    """The features of a `FeatureNet`, of images of 0 to 255."""

    def __init__(self, net: FeatureNet) -> None:
        super().__init__()
        self.classifier = net

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images / 127.5 - 1)[0]


def load(
    specification: str, weights: Path | None = None, download: bool = False, cache: Path = Path("runs/cache"),
    size: int | None = None,
) -> Extractor:  # fmt: skip
    """A network by `SPECIFICATIONS`, on the CPU.

    Args:
        specification: as above.
        weights: its state dict, .safetensors or a .pth of tensors alone; for "inception" its TorchScript file. Not for
            networks that are files themselves.
        download: fetch weights that are not given.
        cache: where a downloaded Inception is kept; other packages have their own caches.
        size: the input's height and width; None takes the network's own.

    Raises:
        InputError: an unknown specification or network, or weights that cannot be had or are those of another one.
    """
    kind, _, name = specification.partition(":")
    if specification == "inception":
        return _inception(weights, download, cache)
    if kind in LIBRARIES and name:
        return LIBRARIES[kind](name, weights, download, size)
    if weights is not None:
        raise InputError(f"--weights {weights} cannot be used with {specification}: give a network of {SPECIFICATIONS}")
    path = Path(specification)
    if path.is_dir():
        return of_classifier(_classifier(path))
    if path.suffix == ".th" or path.is_file():
        return of_classifier(networks.load_cifar_resnet(path))
    raise InputError(f"there is no network {specification!r}: give {SPECIFICATIONS}")


def _classifier(folder: Path) -> FeatureNet:
    """A network that a run has trained, or that of the world of shapes."""
    try:
        name = json.loads((folder / networks.CONFIG).read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None  # for the reader to complain of
    return shapes_net.load(folder) if name == shapes_net.NAME else networks.load_classifier(folder)


def of_classifier(net: FeatureNet) -> Extractor:
    """A classifier of this package, which takes images of its own size only."""
    prepare = exactly(*net.shape, net.name)
    return Extractor(net.name.removeprefix("FD-"), net.name, prepare, OfClassifier(net), "no resizing", net.head)


def _inception(weights: Path | None, download: bool, cache: Path) -> Extractor:
    file = cache / inception.FILE if weights is None else weights
    if weights is None and download:
        file = inception.download(cache)
    elif weights is None and not file.is_file():
        raise InputError(f"FID needs {inception.FILE}: give it as --weights, or --download it ({inception.URL}, 96 MB)")
    size = inception.SIZE
    return Extractor("Inception-v3", "FID", bicubic(size, size), inception.Inception(file), _resized(size, size))


def _resized(height: int, width: int) -> str:
    return f"antialiased bicubic to {height}x{width} in floating point"


def _timm(name: str, weights: Path | None, download: bool, size: int | None) -> Extractor:
    """The features that timm's own head would see (`forward_head` with pre-logits)."""
    try:
        import timm
    except ImportError:
        raise InputError(f"timm:{name} needs the package timm: pip install timm") from None
    plain = name.split(".")[0]
    if plain not in timm.list_models():
        raise InputError(f"timm has no network {plain!r}: choose one of https://huggingface.co/timm")
    net = _fetched(f"timm:{name}", weights, download, lambda pretrained: timm.create_model(name, pretrained=pretrained))
    if weights is not None:
        checkpoint.fill(net, read_state(weights), weights)
    settings = timm.data.resolve_data_config(net.pretrained_cfg)
    if size is not None:
        if isinstance(net, timm.models.VisionTransformer):  # its embedded positions are interpolated
            patch = net.patch_embed.patch_size[0]
            if size % patch:
                raise InputError(f"timm:{name} cuts images into patches of {patch} px, which do not divide {size} px")
            net.set_input_size(img_size=(size, size))
        settings["input_size"] = (3, size, size)
    net.reset_classifier(0)
    _, height, width = settings["input_size"]
    trunk = Standardised(net, settings["mean"], settings["std"])
    return Extractor(plain, f"FD-{plain}", bicubic(height, width), trunk, _resized(height, width))


def _torchvision(name: str, weights: Path | None, download: bool, size: int | None) -> Extractor:
    """A classifier without its last linear layer, at 224 px where no other size is asked for."""
    from torchvision import models

    if name not in models.list_models(module=models):
        raise InputError(
            f"torchvision has no classifier {name!r}: it has {', '.join(models.list_models(module=models))}"
        )
    net = _fetched(
        f"torchvision:{name}",
        weights,
        download,
        lambda pretrained: models.get_model(name, weights="DEFAULT" if pretrained else None),
    )
    if weights is not None:
        checkpoint.fill(net, read_state(weights), weights)
    last = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not last:
        raise InputError(f"torchvision:{name} ends in no linear layer, so where its features are is not known")
    parent, _, child = last[-1].rpartition(".")
    setattr(net.get_submodule(parent), child, nn.Identity())
    side = size or 224
    trunk = Standardised(net, IMAGENET_MEAN, IMAGENET_STD)
    return Extractor(name, f"FD-{name}", bicubic(side, side), trunk, _resized(side, side))


def _transformers(name: str, weights: Path | None, download: bool, size: int | None) -> Extractor:
    """An image model's pooled output (CLIP: its image embedding), or else its first token, at its own size."""
    from transformers import AutoImageProcessor, AutoModel, CLIPModel

    if weights is not None:
        raise InputError(f"--weights {weights} cannot be used with transformers:{name}: its folder holds the weights")
    facts: dict[str, Any] = {"local_files_only": not download, "trust_remote_code": False}
    try:
        processor = AutoImageProcessor.from_pretrained(name, **facts)
        net = AutoModel.from_pretrained(name, use_safetensors=True, **facts)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            _unavailable(f"transformers:{name}", error, download, "a folder that it was saved to")
        ) from None
    height, width = (size, size) if size else _sides(dict(processor.crop_size or processor.size or {}), name)
    trunk: nn.Module = net.eval()
    if isinstance(net, CLIPModel):
        trunk, pool = ImageTower(net), _pooled
    else:
        pool = _pooled
    short = re.sub(r"[^\w.-]+", "-", Path(name).name)
    standardised = Standardised(trunk, tuple(processor.image_mean), tuple(processor.image_std), pool)
    return Extractor(short, f"FD-{short}", bicubic(height, width), standardised, _resized(height, width))


class ImageTower(nn.Module):
    """CLIP's image half."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor) -> Any:
        return self.clip.get_image_features(pixel_values=images)


def _pooled(output: Any) -> Tensor:
    """(B, D) of what an image model returns."""
    if isinstance(output, Tensor):
        return output
    pooled = output.get("pooler_output")
    if pooled is not None:
        return pooled.flatten(1)
    last = output["last_hidden_state"]
    return last[:, 0] if last.ndim == 3 else last.mean((2, 3))


def _sides(size: dict[str, int], name: str) -> tuple[int, int]:
    if "height" in size and "width" in size:
        return size["height"], size["width"]
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    raise InputError(f"transformers:{name} has a preprocessor_config.json without a size: add one")


def _fetched(name: str, weights: Path | None, download: bool, build: Callable[[bool], Any]) -> Any:
    """A network, with its published weights if they are not given and may be fetched."""
    if weights is None and not download:
        raise InputError(
            f"{name} needs weights: give its state dict as --weights, or let them be fetched by --download"
        )
    if weights is not None:
        with torch.random.fork_rng(devices=[]):
            return build(False)
    try:
        return build(True)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(_unavailable(name, error, download, "its state dict as --weights")) from None


def _unavailable(name: str, error: Exception, download: bool, instead: str) -> str:
    why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    advice = f"give {instead}" if download else f"give {instead}, or allow --download"
    return f"{name} cannot be had ({why}): {advice}"


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict, .safetensors or a file of torch.save that holds tensors alone.

    Raises:
        InputError: it is missing, broken, or holds something else.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a state dict, .safetensors or .pth")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # each format raises its own types
        raise InputError(f"{path} is not a readable state dict ({type(error).__name__})") from None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} is not a state dict: it holds something else than tensors by name")
    return {str(k): v for k, v in state.items()}


LIBRARIES: dict[str, Callable[[str, Path | None, bool, int | None], Extractor]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}
"""By the word before the colon."""
