"""Adapters and gradient checkpointing: the same networks and the same gradients, for less memory."""

import copy

import pytest
import torch
from torch import nn

from dmd.ema import Ema
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
    shared = lora.SharedNet(denoiser.net)
    adapted, bare = lora.AdaptedNet(shared, 4), lora.BareNet(shared)
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
    adapted = lora.AdaptedNet(lora.SharedNet(denoiser.net), 4)
    assert sum(p.numel() for p in adapted.parameters()) == sum(4 * (a + b) for a, b in widths) < count / 4
    assert adapted.state_dict().keys() == dict(adapted.named_parameters()).keys()


def test_the_gradient_is_that_of_a_product_of_two_matrices(denoiser, batch):
    """Against weights to which B A has been added by hand."""
    x_t, t, cond = batch
    plain = copy.deepcopy(denoiser.net)
    adapted = lora.AdaptedNet(lora.SharedNet(denoiser.net), 2, seed=3)
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


def randomised(adapted, seed):
    """Adapters that are no longer zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    return adapted


def by_hand(net, adapted):
    """A copy of a network with B A added to its weights."""
    plain = copy.deepcopy(net)
    with torch.no_grad():
        for name, (a, b) in adapted.adapters.items():
            plain.get_submodule(name.replace("/", ".")).weight.add_(b.weight @ a.weight)
    return plain


def test_checkpointed_gradients_are_equal(denoiser, batch):
    x_t, t, cond = batch
    other = copy.deepcopy(denoiser.net)
    switches.recompute(other, "student")
    calls = []
    other.unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    for net in (denoiser.net, other):
        net(x_t, t, **cond).square().mean().backward()
    assert len(calls) == 1 and other.unet.down_blocks[0].gradient_checkpointing
    a, b = (gradients(net) for net in (denoiser.net, other))
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_network_is_student_real_and_fake_score(denoiser, batch, checkpointing):
    """In the order of an iteration, against three networks: real and fake score come between the student's forward
    and its backward pass, which recomputes the blocks with the student's adapters."""
    x_t, t, cond = batch
    original = copy.deepcopy(denoiser.net)
    shared = lora.SharedNet(denoiser.net)
    student, fake, bare = lora.AdaptedNet(shared, 3, 1), lora.AdaptedNet(shared, 2, 2), lora.BareNet(shared)
    randomised(student, 5), randomised(fake, 6)
    if checkpointing:
        switches.recompute(shared.net, "shared network", shared.pinned)
    plain = {net: by_hand(original, net) for net in (student, fake)}
    for net in plain.values():
        net.requires_grad_(True)

    def iteration(student, real, fake):
        x = student(x_t, t, **cond)
        with torch.no_grad():
            seen = [real(x, t, **cond), fake(x, t, **cond)]
        (x * (seen[1] - seen[0])).sum().backward()
        loss = fake(x.detach(), t, **cond).square().sum()
        loss.backward()
        return [x.detach(), *seen, loss.detach()]

    for found, expected in zip(
        iteration(student, bare, fake), iteration(plain[student], original, plain[fake]), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for adapted, merged in plain.items():
        for name, (a, b) in adapted.adapters.items():
            whole = merged.get_submodule(name.replace("/", ".")).weight.grad  # of W + B A
            torch.testing.assert_close(a.weight.grad, b.weight.T @ whole, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(b.weight.grad, whole @ a.weight.T, rtol=1e-3, atol=1e-5)
    assert not gradients(original) and all("lora" in name for name in gradients(denoiser.net))


def test_a_copy_has_adapters_of_its_own(denoiser, batch):
    """So that an average can follow them on the same network."""
    x_t, t, cond = batch
    original = copy.deepcopy(denoiser.net)
    student = randomised(lora.AdaptedNet(lora.SharedNet(denoiser.net), 2), 5)
    average = Ema(student, 0.5)
    before = average.shadow(x_t, t, **cond)
    torch.testing.assert_close(before, student(x_t, t, **cond), rtol=0, atol=0)
    first = copy.deepcopy(student.state_dict())
    randomised(student, 6)
    average.update(student, 100)
    middle = copy.deepcopy(first)
    for name, value in student.state_dict().items():
        middle[name] = (first[name] + value) / 2
    expected = lora.AdaptedNet(lora.SharedNet(copy.deepcopy(original)), 2)
    expected.load_state_dict(middle)
    torch.testing.assert_close(average.shadow(x_t, t, **cond), expected(x_t, t, **cond), rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in average.shadow.parameters())
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_state_is_that_of_one_network(denoiser, dtype):
    names = list(denoiser.net.state_dict())
    original = copy.deepcopy(denoiser.net.to(dtype))
    adapted = randomised(lora.AdaptedNet(lora.SharedNet(denoiser.net), 2), 5)
    state, expected = lora.plain_state(adapted), by_hand(original.float(), adapted).state_dict()
    assert sorted(state) == sorted(names)
    for name, value in expected.items():
        torch.testing.assert_close(state[name].float(), value, rtol=1e-6, atol=1e-6)
    assert lora.plain_state(original).keys() == original.state_dict().keys()


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
        lora.SharedNet(net)
    with pytest.raises(
        InputError, match=r"--gradient-checkpointing is for networks of diffusers, and the student here"
    ):
        switches.recompute(net, "student")


def test_xformers_that_cannot_run_leaves_torchs_attention(denoiser, batch, monkeypatch):
    """Whether it is installed here or not."""
    from diffusers import ModelMixin

    def unavailable(self):
        raise ValueError("no such GPU")

    monkeypatch.setattr(ModelMixin, "enable_xformers_memory_efficient_attention", unavailable)
    x_t, t, cond = batch
    with torch.no_grad():
        before = denoiser.net(x_t, t, **cond)
        with pytest.warns(UserWarning, match=r"xformers cannot be used \(no such GPU\): torch's own") as told:
            switches.use_xformers(denoiser.net, "student")
        assert len(told) == 1
        assert torch.equal(denoiser.net(x_t, t, **cond), before)
