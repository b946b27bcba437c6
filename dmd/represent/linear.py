"""The linear probe: a linear classifier on frozen features by SGD, for a sweep of learning rates side by side.

StableRep trains ten heads at once, one for each rate (arXiv 2306.00984; its main_linear.py): SGD with momentum 0.9,
no weight decay, a learning rate of `rate * batch / 256` that falls to 0 along half a cosine, 90 epochs. Here the heads
are one tensor, so that a sweep costs one matrix product a step. The features are frozen and cached, so images are not
augmented, as they are in the papers' own probe.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmd.seeding import Stream, bits

RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Base learning rates of StableRep; SynCLR's are nine of these."""

MOMENTUM = 0.9


class Heads(NamedTuple):
    """R linear classifiers.

    Attributes:
        weight: (R, K, D).
        bias: (R, K).
    """

    weight: Tensor
    bias: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """Features (N, D) to each head's classes: int64 (R, N)."""
        return torch.stack([torch.addmm(b, x, w.T).argmax(1) for w, b in zip(self.weight, self.bias, strict=True)])

    def finite(self) -> Tensor:
        """bool (R,): which heads have not diverged."""
        return self.weight.isfinite().flatten(1).all(1) & self.bias.isfinite().all(1)


@torch.no_grad()
def train(
    x: Tensor, labels: Tensor, classes: int, rates: Sequence[float] = RATES, epochs: int = 90, batch: int = 256,
    seed: int = 0,
) -> Heads:  # fmt: skip
    """Train a head for each base learning rate, all from zero and on the same batches.

    Args:
        x: features (N, D) float32, as a rule standardised.
        labels: int64 (N,) in [0, classes).
        classes: K.
        rates: R base learning rates.
        epochs: passes over the features, in an order of its own each; the last images of a pass that fill no batch
            are left out of it.
        batch: images a step; all of them where there are fewer.
        seed: of the orders.
    """
    batch = min(batch, len(x))
    steps = len(x) // batch
    peak = torch.tensor(rates, device=x.device) * (batch / 256)
    index = torch.arange(len(x))
    heads = Heads(x.new_zeros(len(rates), classes, x.shape[1]), x.new_zeros(len(rates), classes))
    moving = Heads(torch.zeros_like(heads.weight), torch.zeros_like(heads.bias))
    for epoch in range(epochs):
        order = bits(seed, Stream.PROBE_ORDER, epoch, index, 1)[:, 0].argsort(stable=True).to(x.device)
        for step, part in enumerate(order[: steps * batch].split(batch)):
            rate = peak * 0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (epochs * steps)))
            for parameter, momentum, gradient in zip(
                heads, moving, _gradient(heads, x[part], labels[part]), strict=True
            ):
                momentum.mul_(MOMENTUM).add_(gradient)
                parameter.sub_(momentum * rate.reshape(-1, *[1] * (parameter.ndim - 1)))
    return heads


def _gradient(heads: Heads, x: Tensor, labels: Tensor) -> Heads:
    """Of the mean cross-entropy of each head: (softmax - one-hot) times the features."""
    rates, classes, width = heads.weight.shape
    logits = (x @ heads.weight.reshape(-1, width).T).unflatten(1, (rates, classes)) + heads.bias
    error = logits.softmax(-1)
    error.scatter_add_(2, labels[:, None, None].expand(-1, rates, 1), -torch.ones_like(error[..., :1]))
    error /= len(x)
    return Heads((error.flatten(1).T @ x).reshape(heads.weight.shape), error.sum(0))
