"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): one frozen network is two, with the adapters and without.

So the fake score costs the memory of its adapters rather than of a second UNet with its gradients and optimiser states,
as in ProlificDreamer and SwiftBrush.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmd.errors import InputError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Linear layers of attention in diffusers' networks."""


class AdaptedNet(nn.Module):
    """A frozen network with adapters, which alone are its parameters and its state.

    The network itself is not a submodule: it is shared with `bare` and stays where its owner keeps it.

    Args:
        net: frozen and changed in place; adapters begin as zero, so it computes what it did.
        rank: of the adapters; float32 whatever precision the network has.
        seed: of their random half.
        targets: ends of the names of the linear layers that get one.

    Raises:
        InputError: the network has no such layers.
    """

    def __init__(self, net: nn.Module, rank: int, seed: int = 0, targets: Sequence[str] = ATTENTION):
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        if not any(name.endswith(tuple(targets)) for name, _ in net.named_modules()):
            raise InputError(f"the network has no layers {', '.join(targets)}, which low-rank adapters go to")
        net.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), net)
        self.net = (net,)  # in a tuple, so that it is no submodule
        layers: list[tuple[str, Any]] = [(n, m) for n, m in net.named_modules() if isinstance(m, LoraLayer)]
        self.layers = tuple(layer for _, layer in layers)
        self.adapters = nn.ModuleDict(
            {
                name.replace(".", "/"): nn.ModuleList([layer.lora_A["default"], layer.lora_B["default"]])
                for name, layer in layers
            }
        ).float()

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """With the adapters."""
        return self.net[0](x_t, t, **cond)


class BareNet(nn.Module):
    """The network of an `AdaptedNet` as it was: without adapters and without gradients.

    Adapters are on again when it returns. A backward pass with gradient checkpointing must therefore not have a call of
    it between its forward pass and itself; `Distiller` has none there.
    """

    def __init__(self, adapted: AdaptedNet):
        super().__init__()
        self.adapted = (adapted,)

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        layers = self.adapted[0].layers
        for layer in layers:
            layer.enable_adapters(False)
        try:
            return self.adapted[0].net[0](x_t, t, **cond)
        finally:
            for layer in layers:
                layer.enable_adapters(True)
