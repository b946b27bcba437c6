"""LPIPS (Zhang et al. 2018) by the package `lpips`, as the distance of the regression loss."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dmd.errors import InputError

Backbone = Literal["vgg", "alex", "squeeze"]


def lpips_distance(
    backbone: Backbone, weights: Path | None, size: int, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Per-sample LPIPS v0.1 of images in [-1, 1]: (B, C, H, W) twice to (B,); float32, differentiable.

    Args:
        backbone: the trunk; its linear layers come with the package.
        weights: state dict of the trunk by torchvision's names ("features.0.weight", ...), .pth or .safetensors. None
            takes torchvision's, downloading it into torch's cache if it is not there.
        size: images smaller than this are enlarged (bilinear) first; the paper uses 224 for CIFAR-10.

    Raises:
        InputError: the weights cannot be had, or are those of another network.
    """
    net = lpips_network(backbone, weights, device)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return net(_prepare(a, size), _prepare(b, size)).flatten()

    return distance


def lpips_network(backbone: Backbone, weights: Path | None, device: torch.device) -> Any:
    """The frozen network of LPIPS: (B, 3, H, W) twice in [-1, 1] to (B, 1, 1, 1). Arguments and errors as above."""
    import lpips

    try:
        net = lpips.LPIPS(net=backbone, pnet_rand=weights is not None, verbose=False)
    except OSError as error:
        raise InputError(
            f"the pretrained weights of LPIPS-{backbone} could not be downloaded ({error}): "
            "give a file by --lpips-weights"
        ) from None
    if weights is not None:
        _load_trunk(net.net, _read(weights), weights)
    return net.to(device).eval().requires_grad_(False)  # the linear layers arrive as trainable


def _prepare(x: Tensor, size: int) -> Tensor:
    x = x.float().expand(-1, 3, -1, -1)
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=False) if x.shape[-1] < size else x


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"--lpips-weights {path} does not exist: give the backbone's state dict")
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # each format raises its own types
        raise InputError(f"--lpips-weights {path} is not a readable state dict ({type(error).__name__})") from None


def _load_trunk(trunk: Any, tensors: dict[str, Tensor], path: Path) -> None:
    """Fill lpips' slices ("slice1.0.weight") from torchvision's names ("features.0.weight", or "0.weight" alone)."""
    for name, parameter in trunk.named_parameters():
        layer = re.sub(r"^slice\d+\.", "", name)
        source = tensors.get(f"features.{layer}", tensors.get(layer))
        if source is None or source.shape != parameter.shape:
            raise InputError(f"--lpips-weights {path} belongs to another network: it has no fitting {name!r}")
        parameter.data.copy_(source)
