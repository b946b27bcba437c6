"""What diffusers' networks can be told: recompute activations, use another attention."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from dmd.errors import InputError

Function = Callable[..., Any]


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

    for part in _networks(net, what, "--gradient-checkpointing"):
        part.enable_gradient_checkpointing(again)


def use_xformers(net: nn.Module, what: str) -> None:
    """Use xformers' attention where it is installed and can run; else torch's own stays, with a warning.

    Raises:
        InputError: there is no network of diffusers in `net`.
    """
    for part in _networks(net, what, "--enable-xformers-memory-efficient-attention"):
        try:
            part.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
            warnings.warn(f"xformers cannot be used ({error}): torch's own attention stays", stacklevel=2)
            return


def _networks(net: nn.Module, what: str, flag: str) -> list[Any]:
    from diffusers import ModelMixin

    found = [part for part in net.modules() if isinstance(part, ModelMixin)]
    if not found:
        raise InputError(f"{flag} is for networks of diffusers, and the {what} here is none: leave it out")
    return found
