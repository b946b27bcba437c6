"""Exponential moving average of a network's weights, in float32."""

import copy

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(shadow: nn.Module, source: nn.Module, decay: float) -> None:
    """Move float32 `shadow` towards `source`, of the same architecture: decay * shadow + (1 - decay) * source. Buffers
    are copied."""
    weights: list[Tensor] = list(shadow.parameters())
    torch._foreach_lerp_(weights, [p.float() for p in source.parameters()], 1.0 - decay)
    for s, b in zip(shadow.buffers(), source.buffers(), strict=True):
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

    def update(self, source: nn.Module, updates: int) -> None:
        """Moves the shadow towards `source`; `updates` counts the updates before this one."""
        follow(self.shadow, source, min(self.decay, (1 + updates) / (10 + updates)))
