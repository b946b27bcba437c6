"""Networks whose trained parameters are spread over processes (FSDP2, `torch.distributed.fsdp.fully_shard`).

A process keeps a part of each parameter, of its gradient and of the optimiser's states, and gathers a block's weights
while it computes with them. Gradients are averaged over processes within the backward pass. What must be written, shown
or compared is made whole here, by all processes together.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def shard(net: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Spread a network's parameters over all processes, in place: `blocks` each by itself, the rest together.

    Parameters are new objects afterwards, so whatever holds them (optimisers) must come later.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    net.to(memory_format=torch.contiguous_format)  # which it asks for
    for part in (*blocks, net):
        fully_shard(part, mesh=mesh)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process has no more than a part of it."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its parts. All processes must call this for a sharded one, in one order."""
    part: Any = tensor
    return part.full_tensor() if is_sharded(tensor) else tensor


def whole_state(state: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """`whole` of many tensors; sharded ones go to main memory, one after the other. Empty where they are not kept."""
    found = {}
    for name, tensor in state.items():
        value = whole(tensor.detach()).cpu() if is_sharded(tensor) else tensor
        if keep:
            found[name] = value
    return found


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, which every process has, spread as `reference` is."""
    if not is_sharded(reference):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    to: Any = reference
    return distribute_tensor(tensor.to(to.device), to.device_mesh, to.placements, src_data_rank=None)
