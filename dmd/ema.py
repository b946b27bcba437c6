"""Exponential moving average of a network's weights, in float32."""

import copy
import functools

import torch
from torch import Tensor, nn


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
        self._buffers = list(self.shadow.buffers())
        self._followed: tuple[nn.Module | None, list[nn.Parameter]] = (None, [])

    @functools.cached_property
    def _weights(self) -> list[Tensor]:
        """Found at the first update, since sharding replaces them before."""
        return list(self.shadow.parameters())

    @torch.no_grad()
    def update(self, source: nn.Module, updates: int) -> None:
        """Moves the shadow towards `source`; `updates` counts the updates before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        if self._followed[0] is not source:  # found once: a walk over the modules is slow
            self._followed = (source, list(source.parameters()))
        torch._foreach_lerp_(self._weights, [p.float() for p in self._followed[1]], 1.0 - decay)
        for s, b in zip(self._buffers, source.buffers(), strict=True):
            s.copy_(b)
