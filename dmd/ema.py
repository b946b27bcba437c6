"""Exponential moving average of a network's weights, in float32."""

import copy

import torch
from torch import Tensor, nn

Tensors = tuple[list[Tensor], list[Tensor]]
"""Parameters and buffers of a network."""


def follow(shadow: nn.Module, source: nn.Module, decay: float) -> None:
    """Move float32 `shadow` towards `source`, of the same architecture: decay * shadow + (1 - decay) * source. Buffers
    are copied."""
    _move(_tensors(shadow), _tensors(source), decay)


def _tensors(net: nn.Module) -> Tensors:
    return list(net.parameters()), list(net.buffers())


@torch.no_grad()
def _move(shadow: Tensors, source: Tensors, decay: float) -> None:
    torch._foreach_lerp_(shadow[0], [p.float() for p in source[0]], 1.0 - decay)
    for s, b in zip(shadow[1], source[1], strict=True):
        s.copy_(b)


class Ema:
    """Follows `source`: shadow = decay * shadow + (1 - decay) * source after each update.

    The decay grows to its final value as (1 + n) / (10 + n) over the first n updates, so that the start is forgotten.

    Args:
        source: the trained network; the shadow begins as its copy.
        decay: final decay, in [0, 1).
    """

    def __init__(self, source: nn.Module, decay: float):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay is {decay}: it must be at least 0 and below 1")
        self.decay = decay
        self.shadow = copy.deepcopy(source).float().eval().requires_grad_(False)
        self._known: tuple[nn.Module, Tensors, Tensors] | None = None

    def update(self, source: nn.Module, updates: int) -> None:
        """Moves the shadow towards `source`; `updates` counts the updates before this one."""
        if self._known is None or self._known[0] is not source:
            # found once, since a walk over the modules is slow, and no sooner, since sharding makes new parameters
            self._known = (source, _tensors(self.shadow), _tensors(source))
        _move(*self._known[1:], min(self.decay, (1 + updates) / (10 + updates)))
