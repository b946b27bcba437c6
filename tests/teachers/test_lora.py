"""Adapters and gradient checkpointing: the same networks and the same gradients, for less memory."""

import copy

import pytest
import torch
from torch import nn

from dmd.errors import InputError
from dmd.teachers import lora, miniature, switches
from dmd.teachers.miniature import MiniatureConfig

pytest.importorskip("diffusers")
pytest.importorskip("peft")

SMALL = MiniatureConfig(unet_widths=(16, 16), text_width=16, text_layers=1, heads=2)


@pytest.fixture
def denoiser():
    """A UNet of random weights, conditioned on encoded text."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = miniature.denoiser(SMALL)
        for parameter in denoiser.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return denoiser.eval()


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    text = torch.randn(3, SMALL.tokens, SMALL.text_width, generator=g)
    return torch.randn(3, *SMALL.shape, generator=g), torch.tensor([0.1, 0.5, 1.0]), {"text": text}


def gradients(net):
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def test_both_start_as_the_network_and_only_the_fake_moves(denoiser, batch):
    x_t, t, cond = batch
    with torch.no_grad():
        before = denoiser.net(x_t, t, **cond)
    weights = copy.deepcopy(denoiser.net.state_dict())
    adapted = lora.AdaptedNet(denoiser.net, 4)
    bare = lora.BareNet(adapted)
    assert torch.equal(adapted(x_t, t, **cond), before) and torch.equal(bare(x_t, t, **cond), before)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(x_t, t, **cond).square().mean().backward()
        bare(x_t, t, **cond)  # what a real score in between must not disturb
        optimizer.step()
    assert not torch.allclose(adapted(x_t, t, **cond), before, atol=1e-4)
    assert torch.equal(bare(x_t, t, **cond), before)
    after = {n.replace(".base_layer", ""): v for n, v in denoiser.net.state_dict().items() if ".lora_" not in n}
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)


def test_adapters_alone_are_parameters_and_state(denoiser):
    count = sum(p.numel() for p in denoiser.net.parameters())
    widths = [m.weight.shape for n, m in denoiser.net.named_modules() if n.endswith(lora.ATTENTION)]
    adapted = lora.AdaptedNet(denoiser.net, 4)
    assert sum(p.numel() for p in adapted.parameters()) == sum(4 * (a + b) for a, b in widths) < count / 4
    assert adapted.state_dict().keys() == dict(adapted.named_parameters()).keys()


def test_the_gradient_is_that_of_a_product_of_two_matrices(denoiser, batch):
    """Against weights to which B A has been added by hand."""
    x_t, t, cond = batch
    plain = copy.deepcopy(denoiser.net)
    adapted = lora.AdaptedNet(denoiser.net, 2, seed=3)
    with torch.no_grad():
        for _, b in adapted.adapters.values():
            b.weight.normal_(generator=torch.Generator().manual_seed(4))
    parts = {}
    for name, (a, b) in adapted.adapters.items():
        layer = plain.get_submodule(name.replace("/", "."))
        parts[name] = [p.detach().clone().requires_grad_() for p in (a.weight, b.weight)]
        weight = layer.weight.detach()
        del layer.weight
        layer.weight = weight + parts[name][1] @ parts[name][0]
    adapted(x_t, t, **cond).square().mean().backward()
    plain(x_t, t, **cond).square().mean().backward()
    for name, (a, b) in adapted.adapters.items():
        for got, expected in zip((a.weight, b.weight), parts[name], strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("adapt", [False, True])
def test_checkpointed_gradients_are_equal(denoiser, batch, adapt):
    x_t, t, cond = batch
    other = copy.deepcopy(denoiser.net)
    nets = [lora.AdaptedNet(net, 4) if adapt else net for net in (denoiser.net, other)]
    switches.recompute(other, "student")
    calls = []
    other.unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    for net in nets:
        net(x_t, t, **cond).square().mean().backward()
    assert len(calls) == 1 and other.unet.down_blocks[0].gradient_checkpointing
    a, b = (gradients(net) for net in nets)
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-6, atol=1e-9)


def test_checkpointing_keeps_fewer_activations(denoiser, batch):
    """Bytes that autograd saves, weights left out."""
    x_t, t, cond = batch

    def saved(net):
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        found = {}

        def pack(x):
            if x.untyped_storage().data_ptr() not in own:
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            net(x_t, t, **cond)
        return sum(found.values())

    before = saved(denoiser.net)
    switches.recompute(denoiser.net, "student")
    assert saved(denoiser.net) < before / 2


def test_other_networks_are_refused():
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"no layers to_q, to_k, to_v, to_out.0"):
        lora.AdaptedNet(net, 4)
    with pytest.raises(
        InputError, match=r"--gradient-checkpointing is for networks of diffusers, and the student here"
    ):
        switches.recompute(net, "student")


def test_xformers_that_is_not_there_leaves_torchs_attention(denoiser, batch):
    x_t, t, cond = batch
    with torch.no_grad():
        before = denoiser.net(x_t, t, **cond)
        try:
            import xformers  # noqa: F401
        except ImportError:
            with pytest.warns(UserWarning, match=r"xformers cannot be used .*: torch's own attention stays"):
                switches.use_xformers(denoiser.net, "student")
        assert torch.equal(denoiser.net(x_t, t, **cond), before)
