"""The network that is kept: timm's, with the preparation of its input, and the folder that it is exported to.

RUN/backbone/config.json           timm's own keys (architecture, model_args, pretrained_cfg), and ours under "dmd"
RUN/backbone/model.safetensors     timm's state dict, without any prefix

So `load_backbone(folder)` reads it, and so does `timm.create_model("local-dir:FOLDER", pretrained=True)`, save where a
stem was changed for small images.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd import checkpoint
from dmd.errors import InputError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_mini": ("vit_tiny_patch16_224", {"embed_dim": 128, "depth": 6, "num_heads": 4}),
    "resnet_mini": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256)}),
}
"""Names beside timm's, for small images and small machines: timm's architecture and what differs in it."""


@dataclass(frozen=True)
class BackboneConfig:
    """What determines a backbone except its weights.

    Attributes:
        architecture: timm's name of it.
        size: height and width of the images that it is trained on.
        channels: of the images, 1 or 3.
        arguments: of `timm.create_model` besides `num_classes`, `in_chans` and, for vision transformers, `img_size`.
        small_stem: in place of a ResNet's first convolution of stride 2 and its pooling, one of 3 x 3 and stride 1, for
            images of 32 pixels and less (as SimCLR's on CIFAR-10).
        mean, std: per channel, of images in [0, 1], which are standardised by them.
        method: what it was trained by.
    """

    architecture: str
    size: int
    channels: int = 3
    arguments: Mapping[str, Any] = field(default_factory=dict)
    small_stem: bool = False
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    method: str = ""


class Backbone(nn.Module):
    """A timm network that takes images in [-1, 1].

    Args:
        net: a vision transformer or another network of timm without a classifier.
        config: what it is.
    """

    mean: Tensor
    std: Tensor
    net: Any

    def __init__(self, net: Any, config: BackboneConfig):
        super().__init__()
        self.net = net
        self.config = config
        self.features = int(net.num_features)
        self.patch = patch_size(net)
        # of images in [-1, 1]
        mean = torch.tensor(config.mean) * 2.0 - 1.0
        self.register_buffer("mean", mean.reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).reshape(-1, 1, 1) * 2.0, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to features (B, D): the class token, or the mean of the last map.

        Raises:
            InputError: the height or width is not divisible by the patch size, or the channels are others.
        """
        return self.net(self.standardised(images))

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to (B, N, D), row by row of `grid`: patch tokens after the last normalisation,
        or the last map. Raises InputError as `forward`."""
        return self.both(images)[1]

    def both(self, images: Tensor, mask: Tensor | None = None, token: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features and tokens from one pass.

        Args:
            mask: bool (B, N), patches of a vision transformer in whose place `token` (D,) stands, before positions are
                added; None hides nothing.
        """
        x = self.standardised(images)
        if mask is None:
            found = self.net.forward_features(x)
        else:
            x = self.net.patch_embed(x)  # (B, rows, columns, D), since sizes are dynamic
            x = torch.where(mask.reshape(*x.shape[:3], 1), token.to(x.dtype), x)  # type: ignore[union-attr]
            x = self.net.norm_pre(self.net.patch_drop(self.net._pos_embed(x)))
            found = self.net.norm(self.net.blocks(x))
        tokens = found[:, self.net.num_prefix_tokens :] if found.ndim == 3 else found.flatten(2).transpose(1, 2)
        return self.net.forward_head(found), tokens

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of images of this size."""
        if self.patch is not None:
            return height // self.patch[0], width // self.patch[1]
        with torch.no_grad():
            probe = torch.zeros(1, self.config.channels, height, width, device=self.mean.device)
            rows, columns = self.net.forward_features(probe).shape[-2:]
        return rows, columns

    def standardised(self, images: Tensor) -> Tensor:
        """Images as the network takes them. Raises InputError as `forward`."""
        channels, height, width = images.shape[1:]
        if channels != self.config.channels:
            raise InputError(f"images have {channels} channels, but the backbone takes {self.config.channels}")
        if self.patch is not None:
            require_divisible(height, width, self.patch)
        return (images - self.mean) / self.std


def patch_size(net: Any) -> tuple[int, int] | None:
    """Height and width of a vision transformer's patches; None for other networks."""
    from timm.models.vision_transformer import VisionTransformer

    return net.patch_embed.patch_size if isinstance(net, VisionTransformer) else None


def require_divisible(height: int, width: int, patch: tuple[int, int]) -> None:
    """Raises InputError if images cannot be cut into patches."""
    if height % patch[0] or width % patch[1]:
        raise InputError(
            f"images of {height} x {width} pixels cannot be cut into patches of {patch[0]} x {patch[1]}: give a size "
            f"that the patch size divides, such as {max(1, round(height / patch[0])) * patch[0]}"
        )


def describe(
    name: str, size: int, channels: int, patch: int | None = None, drop_path: float = 0.0, small_stem: bool = False,
    method: str = "",
) -> BackboneConfig:  # fmt: skip
    """The config of a backbone by its name, one of timm's or of `SMALL`.

    Args:
        patch: of a vision transformer; None leaves the architecture's own.
        drop_path: probability of the last block; those before it have less (stochastic depth).
    """
    architecture, arguments = SMALL.get(name, (name, {}))
    arguments = dict(arguments)
    if patch is not None:
        arguments["patch_size"] = patch
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    grey = channels == 1
    mean = (sum(IMAGENET_MEAN) / 3,) if grey else IMAGENET_MEAN
    std = (sum(IMAGENET_STD) / 3,) if grey else IMAGENET_STD
    return BackboneConfig(architecture, size, channels, arguments, small_stem, mean, std, method)


def build(config: BackboneConfig) -> Backbone:
    """A backbone with fresh weights from torch's global state.

    Raises:
        InputError: timm knows no such architecture, or it does not take these arguments or images of this size.
    """
    import timm

    own: dict[str, Any] = {"num_classes": 0, "in_chans": config.channels}
    try:
        cls = timm.model_entrypoint(config.architecture)
        transformer = cls.__module__ == "timm.models.vision_transformer"
        if transformer:
            own |= {"img_size": config.size, "dynamic_img_size": True}
            patch = config.arguments.get("patch_size", _own_patch(config.architecture))
            require_divisible(config.size, config.size, (patch, patch))
        net = timm.create_model(config.architecture, **dict(config.arguments), **own)
    except (RuntimeError, ValueError, TypeError, AssertionError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"timm makes no backbone {config.architecture!r} with {dict(config.arguments)} for images of {config.size} "
            f"pixels ({first}): give a vision transformer or a convolutional network of timm, or {', '.join(SMALL)}"
        ) from None
    if config.small_stem:
        _shrink_stem(net, config)
    return Backbone(net, config)


def _own_patch(architecture: str) -> int:
    """The patch size that stands in a vision transformer's name."""
    found = [part for part in architecture.split("_") if part.startswith("patch")]
    return int(found[0].removeprefix("patch")) if found else 16


def _shrink_stem(net: Any, config: BackboneConfig) -> None:
    from timm.models.resnet import ResNet

    if not isinstance(net, ResNet) or not isinstance(net.conv1, nn.Conv2d):
        raise InputError(f"--small-stem is for ResNets with one convolution in their stem, not {config.architecture}")
    stem = nn.Conv2d(config.channels, net.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    net.add_module("conv1", stem)
    net.add_module("maxpool", nn.Identity())


# ----------------------------------------------------------------------------- on the disk


def save(backbone: Backbone, folder: Path) -> None:
    """Write a backbone's folder; the weights come last, so that a folder with them is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    config = backbone.config
    arguments = dict(config.arguments)
    if backbone.patch is not None:
        arguments |= {"img_size": config.size, "dynamic_img_size": True}
    prepared = {
        "input_size": [config.channels, config.size, config.size], "mean": config.mean, "std": config.std,
        "interpolation": "bicubic", "crop_pct": 1.0, "num_classes": 0, "fixed_input_size": False,
    }  # fmt: skip
    timm_keys = {
        "architecture": config.architecture, "num_classes": 0, "num_features": backbone.features,
        "model_args": {**arguments, "in_chans": config.channels}, "pretrained_cfg": prepared,
    }  # fmt: skip
    checkpoint.write_json(folder / CONFIG, timm_keys | {"dmd": asdict(config)})
    checkpoint.save_weights(backbone.net, folder / WEIGHTS)


def load_backbone(folder: str | Path, device: torch.device | str = "cpu") -> Backbone:
    """A backbone that `save` wrote, frozen, in evaluation mode.

    Raises:
        InputError: the folder holds none, or a damaged one.
    """
    folder = Path(folder)
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["dmd"]
        raw |= {
            "mean": _numbers(raw["mean"]), "std": _numbers(raw["std"]),
            "arguments": {k: tuple(v) if isinstance(v, list) else v for k, v in raw["arguments"].items()},
        }  # fmt: skip
        config = BackboneConfig(**raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder} is no backbone: it needs a {CONFIG} that dmd represent has written") from None
    net = build(config)
    checkpoint.load_weights(net.net, folder / WEIGHTS)
    return net.to(device).eval().requires_grad_(False)


def _numbers(values: Any) -> tuple[float, ...]:
    found = tuple(float(v) for v in values)
    if not all(map(math.isfinite, found)):
        raise ValueError
    return found
