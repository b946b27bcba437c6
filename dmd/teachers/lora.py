"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): one frozen network is several, bare and with sets of adapters.

So a fake score, or a student, costs the memory of its adapters rather than of a second UNet with its gradients and
optimiser states, as in ProlificDreamer and SwiftBrush. With both as adapters, one UNet is student, real and fake score.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmd.errors import InputError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Linear layers of attention in diffusers' networks."""


class SharedNet:
    """A frozen network under several sets of adapters, at most one of which is on.

    It is no module, so that those who share the network do not own its weights.

    Args:
        net: frozen and changed in place, when adapters come.
        targets: ends of the names of the linear layers that get them.

    Raises:
        InputError: the network has no such layers.
    """

    def __init__(self, net: nn.Module, targets: Sequence[str] = ATTENTION):
        if not any(name.endswith(tuple(targets)) for name, _ in net.named_modules()):
            raise InputError(f"the network has no layers {', '.join(targets)}, which low-rank adapters go to")
        self.net = net.requires_grad_(False)
        self.targets = list(targets)
        self.layers: dict[str, Any] = {}  # peft's, by the names of what they wrap; the same for all adapters
        self._count = 0
        self._on: str | None = None

    def add(self, rank: int, seed: int) -> str:
        """New adapters, which change nothing yet; returns their name. `seed` is of their random half."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        name = f"adapters-{self._count}"
        self._count += 1
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=self.targets)  # alpha / rank: no other factor
        trained = {p: p.requires_grad for layer in self.layers.values() for p in layer.parameters()}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # which is what is wanted
            torch.manual_seed(seed)
            inject_adapter_in_model(config, self.net, name)
        self.layers = {n: m for n, m in self.net.named_modules() if isinstance(m, LoraLayer)}
        self._on = name
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)  # peft has just frozen the adapters that were there
        return name

    def use(self, name: str | None) -> None:
        """Turn these adapters on and all others off; None turns off all.

        Not by peft's `set_adapter`, which also freezes those that are off: their backward pass may be still to come.
        """
        if name != self._on:
            self._on = name
            for layer in self.layers.values():
                layer._active_adapter = [] if name is None else [name]

    def pinned(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the adapters that are on now, whenever it is called."""
        name = self._on

        def call(*arguments: Any) -> Any:
            self.use(name)
            return function(*arguments)

        return call


class AdaptedNet(nn.Module):
    """A network with adapters of its own, which alone are its parameters and its state: float32, at first zero.

    A deep copy has adapters of its own on the same network.
    """

    def __init__(self, shared: SharedNet, rank: int, seed: int = 0):
        super().__init__()
        self.shared = shared
        self.rank = rank
        self.name = shared.add(rank, seed)
        self.adapters = nn.ModuleDict(
            {
                name.replace(".", "/"): nn.ModuleList([layer.lora_A[self.name], layer.lora_B[self.name]])
                for name, layer in shared.layers.items()
            }
        ).float()

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.shared.use(self.name)
        return self.shared.net(x_t, t, **cond)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdaptedNet":
        copy = AdaptedNet(self.shared, self.rank)
        copy.load_state_dict(self.state_dict())
        memo[id(self)] = copy
        return copy

    def matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, B) of each layer, whose weight becomes W + B A, by the name that the layer has without adapters."""
        layers = self.shared.layers.items()
        return {n: (m.lora_A[self.name].weight.detach(), m.lora_B[self.name].weight.detach()) for n, m in layers}


class BareNet(nn.Module):
    """The shared network as it was: without adapters and without gradients."""

    def __init__(self, shared: SharedNet):
        super().__init__()
        self.shared = shared

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.shared.use(None)
        return self.shared.net(x_t, t, **cond)


def plain_state(net: nn.Module) -> dict[str, Tensor]:
    """A network's state as that of one without adapters: those of an `AdaptedNet` are added to its weights, in float32.

    Tensors that adapters change lie in main memory, whatever the network's device.
    """
    if not isinstance(net, AdaptedNet):
        return net.state_dict()
    state = net.shared.net.state_dict()
    found = {name.replace(".base_layer.", "."): v for name, v in state.items() if ".lora_" not in name}
    for layer, (a, b) in net.matrices().items():
        found[f"{layer}.weight"] = (found[f"{layer}.weight"].float() + b @ a).cpu()
    return found
