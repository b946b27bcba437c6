"""What diffusers' networks can be told: recompute activations, use another attention."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from dmd.errors import InputError

Function = Callable[..., Any]

XFORMERS = "--enable-xformers-memory-efficient-attention"


def recompute(net: nn.Module, what: str, pinned: Callable[[Function], Function] = lambda function: function) -> None:
    """Keep only each block's input for the backward pass and compute the rest again (Chen et al. 2016, gradient
    checkpointing): about a sixth of the activations for a quarter more arithmetic. The gradients are the same.

    Args:
        what: the network's name in sentences.
        pinned: makes of a block's forward one that computes the same later (`lora.SharedNet.pinned`).

    Raises:
        InputError: there is no network of diffusers in `net`.
    """

    def again(function: Function, *arguments: Any) -> Any:
        return checkpoint(pinned(function), *arguments, use_reentrant=False)

    for part in networks(net, what, "--gradient-checkpointing"):
        part.enable_gradient_checkpointing(again)


@contextlib.contextmanager
def kept(*nets: nn.Module) -> Iterator[None]:
    """Within this, networks that `recompute` keep their activations after all: to count what they compute once."""
    parts = [part for net in nets for part in net.modules() if vars(part).get("gradient_checkpointing")]
    for part in parts:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True  # type: ignore[assignment]


def blocks(net: nn.Module) -> list[nn.Module]:
    """The large parts of a UNet of diffusers, which are used one after the other; none of other networks."""
    from diffusers import UNet2DConditionModel

    unets: list[Any] = [part for part in net.modules() if isinstance(part, UNet2DConditionModel)]
    return [block for unet in unets for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)]


def use_xformers(net: nn.Module, what: str) -> None:
    """Use xformers' attention where it is installed and can run; else torch's own stays, with a warning.

    Raises:
        InputError: there is no network of diffusers in `net`.
    """
    for part in networks(net, what, XFORMERS):
        try:
            part.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
            warnings.warn(f"xformers cannot be used ({error}): torch's own attention stays", stacklevel=2)
            return


def networks(net: nn.Module, what: str, flag: str) -> list[Any]:
    """The networks of diffusers in `net`. Raises InputError, for a sentence with the flag, if there are none."""
    from diffusers import ModelMixin

    found = [part for part in net.modules() if isinstance(part, ModelMixin)]
    if not found:
        raise InputError(f"{flag} is for networks of diffusers, and the {what} here is none: leave it out")
    return found
