"""What stands on a backbone while it learns, and is thrown away: projections, predictors, prototypes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd import processes
from dmd.represent.losses import full

Layer = Callable[[int], nn.Module]
"""Width to what follows a linear map of that width: a normalisation and its nonlinearity."""


def batch_relu(width: int) -> nn.Module:
    """SimCLR's and StableRep's."""
    return nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(inplace=True))


def layer_gelu(width: int) -> nn.Module:
    """SynCLR's; its code can have `batch_relu`, too."""
    return nn.Sequential(nn.LayerNorm(width), nn.GELU())


def mlp(features: int, hidden: int, out: int, layers: int, between: Layer, last: nn.Module | None = None) -> nn.Module:
    """`layers` linear maps, with `between` after each but the last, and `last` after that.

    StableRep: (D, 4096, 256, 3, batch_relu). SynCLR: (D, 4096, 256, 3, layer_gelu, standardise(256)), and as predictor
    (256, 4096, 256, 2, layer_gelu, standardise(256)).
    """
    widths = [features, *[hidden] * (layers - 1), out]
    parts: list[nn.Module] = []
    for i in range(layers):
        parts.append(nn.Linear(widths[i], widths[i + 1]))
        if i + 1 < layers:
            parts.append(between(widths[i + 1]))
    return nn.Sequential(*parts, *([last] if last is not None else []))


def standardise(width: int) -> nn.Module:
    """Each sample's mean removed and divided by its deviation, without weights."""
    return nn.LayerNorm(width, elementwise_affine=False)


def batch_standardise(width: int) -> nn.Module:
    """Each number's mean over the batch removed and divided by its deviation, without weights: MoCo v3's."""
    return nn.BatchNorm1d(width, affine=False)


class Prototypes(nn.Module):
    """Features (B, D) to g_k cos(feature, prototype_k), (B, K): the last layer of DINO's and iBOT's heads.

    Args:
        features: D.
        count: K.
    """

    def __init__(self, features: int, count: int):
        super().__init__()
        self.directions = nn.Parameter(torch.randn(count, features) / features**0.5)
        self.lengths = nn.Parameter(torch.ones(count, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=1e-3) @ (self.lengths * F.normalize(self.directions, dim=1)).T


def ibot_head(features: int, hidden: int, bottleneck: int, count: int) -> nn.Module:
    """Three linear maps with GELU between them, then `Prototypes`. The paper: (D, 2048, 256, 65536)."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck),
        Prototypes(bottleneck, count),
    )  # fmt: skip


def by_view(head: nn.Module, features: Tensor, views: int) -> Tensor:
    """A head applied to each view by itself, so that a batch normalisation has statistics of one view at a time.

    Args:
        features: (V * B, D), view by view.
        views: V.
    """
    return torch.cat([head(x) for x in features.chunk(views)])


# ----------------------------------------------------------------------------- several processes


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the statistics of all processes, for CPUs, where torch's SyncBatchNorm does not run."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or processes.world() == 1:
            return super().forward(input)
        x = full(input)
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        count = processes.total(x.new_tensor(x.numel() // x.shape[1]))
        mean = processes.summed(x.sum(axes)) / count
        centred = x - mean.reshape(shape)
        variance = processes.summed(centred.square().sum(axes)) / count
        if self.running_mean is not None and self.running_var is not None:
            rate = float(self.momentum or 0.0)
            unbiased = variance.detach() * (count / (count - 1).clamp_min(1))
            self.running_mean.lerp_(mean.detach().to(self.running_mean), rate)
            self.running_var.lerp_(unbiased.to(self.running_var), rate)
        x = centred * (variance + self.eps).rsqrt().reshape(shape)
        if self.weight is not None:
            x = x * self.weight.reshape(shape) + self.bias.reshape(shape)
        return x.to(input.dtype)


def synchronised(net: Any, device: torch.device) -> Any:
    """The network with batch statistics of all processes, where there are several; weights and names stay.

    Raises:
        TypeError: on the CPU, a batch normalisation of another kind than torch's.
    """
    if processes.world() == 1:
        return net
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(net)
    for name, child in list(net.named_children()):
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            shared = SharedBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            shared.load_state_dict(child.state_dict())
            setattr(net, name, shared.to(device))
        elif isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, SharedBatchNorm):
            raise TypeError(f"{type(child).__name__} cannot be shared among processes on the CPU")
        else:
            synchronised(child, device)
    return net
