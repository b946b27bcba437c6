"""What a step needs of the other processes; without a process group each function gives what one process has."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return distributed.get_rank() if world() > 1 else 0


def gathered(x: Tensor) -> Tensor:
    """(B, ...) of every process as (W * B, ...), with the gradient of every process's loss."""
    return x if world() == 1 else _Gathered.apply(x)


@torch.no_grad()
def collected(x: Tensor) -> Tensor:
    """(B, ...) of every process as (W * B, ...), without gradient: labels, and keys of a teacher."""
    if world() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    distributed.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def summed(x: Tensor) -> Tensor:
    """The sum over processes, with the gradient of every process's loss."""
    return x if world() == 1 else _Summed.apply(x)


@torch.no_grad()
def total(x: Tensor) -> Tensor:
    """The sum over processes, without gradient."""
    found = x.detach().clone(memory_format=torch.contiguous_format)
    if world() > 1:
        distributed.all_reduce(found)
    return found


@torch.no_grad()
def largest(x: Tensor) -> Tensor:
    """The maximum over processes, without gradient."""
    found = x.detach().clone(memory_format=torch.contiguous_format)
    if world() > 1:
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return found


class _Gathered(torch.autograd.Function):
    """torch.distributed.nn has deprecated its own, and what replaces it is not in the older releases of torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return collected(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient).chunk(world())[rank()]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient)


def mean(values: Tensor, weights: Tensor) -> Tensor:
    """This process's part of a weighted mean over all processes: the parts' average is the mean, as is that of their
    gradients, which is how `dmd.run.average_gradients` brings them together. 0 if all weights are.

    Args:
        values, weights: of one shape; the weights without gradient.
    """
    return (values * weights).sum() * (world() / total(weights.sum()).clamp_min(torch.finfo(values.dtype).tiny))
