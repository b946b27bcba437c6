"""The small UNet: every weight matters, attention is attention, conditions are heard; folders are read strictly."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from dmd import checkpoint
from dmd.denoiser import NetworkDenoiser
from dmd.errors import InputError
from dmd.noise import Karras, Linear
from dmd.teachers import pixel
from dmd.teachers.unet import Attention, Block, KarrasNet, UNet

CONFIG = pixel.PixelConfig(("a", "b", "c"), 1, 8, 16, (1, 2), 1, (False, True))


def perturbed(module, seed=0):
    """Zero-initialised layers hide what lies before them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return module


@pytest.mark.parametrize(
    ("multipliers", "blocks", "attention", "size"),
    [((1,), 1, (False,), 4), ((1, 2), 1, (False, True), 8), ((1, 2, 2), 2, (True, False, True), 8)],
)
def test_every_parameter_receives_a_gradient(multipliers, blocks, attention, size, rng):
    """And the skips fit for every depth. Both labels are used, so all rows of the embedding but the third are."""
    net = perturbed(UNet(2, 2, 16, multipliers, blocks, attention))
    x = torch.randn(2, 2, size, size, generator=rng)
    out = net(x, torch.tensor([0.1, -0.7]), torch.tensor([0, 1]))
    assert out.shape == x.shape
    out.square().mean().backward()
    silent = [name for name, p in net.named_parameters() if not bool((p.grad != 0).any())]
    assert silent == []
    assert bool((net.embed_label.weight.grad[2] == 0).all()) and bool((net.embed_label.weight.grad[:2] != 0).all())


def test_a_fresh_denoiser_is_edms_skip(rng):
    """The last layer begins at zero, so the denoiser begins as skip * x_t (and out times the last bias)."""
    denoiser = pixel.build(CONFIG)
    x_t, t = torch.randn(3, 1, 8, 8, generator=rng), torch.tensor([0.2, 0.6, 1.0])
    sigma = Karras()(t)[1][:, None, None, None]
    out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    expected = 0.25 / (sigma**2 + 0.25) * x_t + out * denoiser.net.unet.conv_out.bias
    torch.testing.assert_close(denoiser(x_t, t, pixel.labels(torch.tensor([0, 1, 3]))), expected, rtol=1e-5, atol=1e-5)


def test_a_block_is_an_affine_norm_between_two_convolutions_around_a_skip(rng):
    block = perturbed(Block(8, 16, 4))
    x, emb = torch.randn(2, 8, 4, 4, generator=rng), torch.randn(2, 4, generator=rng)
    weights = block.affine(emb)
    h = F.conv2d(
        F.silu(F.group_norm(x, 2, block.norm0.weight, block.norm0.bias)),
        block.conv0.weight,
        block.conv0.bias,
        padding=1,
    )
    h = F.group_norm(h, 4, block.norm1.weight, block.norm1.bias)
    h = F.silu((1 + weights[:, :16, None, None]) * h + weights[:, 16:, None, None])
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    torch.testing.assert_close(block(x, emb), block.skip(x) + h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [16, 64, 128])
def test_attention_is_the_naive_softmax_over_pixels(channels, rng):
    """One head up to 64 channels, two at 128; q, k, v are consecutive thirds of the projection."""
    layer = perturbed(Attention(channels))
    x = torch.randn(2, channels, 3, 2, generator=rng)
    h = layer.qkv(layer.norm(x)).flatten(2)
    q, k, v = h[:, :channels], h[:, channels : 2 * channels], h[:, 2 * channels :]
    heads, width = max(1, channels // 64), min(channels, 64)
    out = torch.zeros(2, channels, 6)
    for b in range(2):
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            for i in range(6):
                logits = torch.stack([(q[b, rows, i] * k[b, rows, j]).sum() / math.sqrt(width) for j in range(6)])
                share = logits.exp() / logits.exp().sum()
                out[b, rows, i] = sum(share[j] * v[b, rows, j] for j in range(6))
    torch.testing.assert_close(layer(x), x + layer.proj(out.reshape(x.shape)), rtol=1e-4, atol=1e-5)


def test_output_hears_clock_label_and_image(rng):
    net = perturbed(UNet(1, 2, 16))
    x, clock, label = torch.randn(1, 1, 8, 8, generator=rng), torch.tensor([0.3]), torch.tensor([1])
    out = net(x, clock, label)
    for other in (net(x + 0.1, clock, label), net(x, clock + 0.01, label), net(x, clock, label - 1)):
        assert float((other - out).abs().max().detach()) > 1e-4


def test_a_row_does_not_depend_on_its_batch(rng):
    net = perturbed(UNet(1, 2, 16))
    x, clock, label = torch.randn(5, 1, 8, 8, generator=rng), torch.linspace(-1, 1, 5), torch.tensor([0, 1, 2, 1, 0])
    alone = torch.cat([net(x[i : i + 1], clock[i : i + 1], label[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(net(x, clock, label), alone, rtol=1e-4, atol=1e-5)


def test_adapter_scales_the_input_and_tells_the_noise_level():
    """c_in and c_noise of EDM (arXiv 2206.00364, table 1), on its own schedule and, in its frame, on any other."""
    seen = []

    def unet(x, clock, label):
        seen.append((x, clock))
        return x

    class Net(torch.nn.Module):
        forward = staticmethod(unet)

    for schedule in (Karras(), Linear()):
        t = torch.tensor([0.2, 0.5, 0.9])
        alpha, sigma = schedule(t)
        x_t = torch.ones(3, 1, 2, 2)
        KarrasNet(Net(), schedule, 0.7)(x_t, t, torch.zeros(3))
        x, clock = seen.pop()
        ratio = sigma / alpha
        torch.testing.assert_close(clock, ratio.log() / 4)
        torch.testing.assert_close(x[:, 0, 0, 0], 1 / alpha / (ratio**2 + 0.49).sqrt())


def test_fresh_weights_are_the_seeds_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = pixel.build(CONFIG, 1), pixel.build(CONFIG, 1), pixel.build(CONFIG, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert checkpoint.digest(a.net) == checkpoint.digest(b.net) != checkpoint.digest(c.net)


@pytest.fixture
def folder(tmp_path):
    """A saved network whose weights are all its own."""
    pixel.save(perturbed(pixel.build(CONFIG).net.unet), CONFIG, tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_folder_gives_back_network_and_config(folder, rng):
    found = pixel.load(folder)
    denoiser, config = found.denoiser, found.config
    assert config == CONFIG
    expected = NetworkDenoiser(
        KarrasNet(perturbed(pixel.build(CONFIG).net.unet), Karras(), 0.5), denoiser.schedule, denoiser.prediction
    )
    x_t, t = torch.randn(2, 1, 8, 8, generator=rng), torch.tensor([0.3, 1.0])
    cond = pixel.labels(torch.tensor([1, 3]))
    torch.testing.assert_close(denoiser(x_t, t, cond), expected(x_t, t, cond), rtol=1e-5, atol=1e-6)
    unlabelled = denoiser(x_t, t, {"label": torch.tensor([3, 3])})
    torch.testing.assert_close(unlabelled[1], expected(x_t, t, cond)[1], rtol=1e-5, atol=1e-6)
    assert config.null()["label"].tolist() == [3]


def edit(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del raw[key]
        else:
            raw[key] = value
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"colour": 3}, "config.json has the unknown key 'colour'"),
        ({"width": None}, "config.json is incomplete: .*'width'"),
        ({"kind": "latent"}, "config.json has kind 'latent'"),
        ({"kind": None}, "config.json has kind None"),
        ({"width": 32}, "model.safetensors belongs to another architecture: tensor "),
        ({"classes": ["a"]}, "model.safetensors belongs to another architecture: tensor 'embed_label.weight'"),
        ({"width": "wide"}, "config.json describes no network that can be built"),
        ({"attention": [True]}, "config.json describes no network that can be built"),
    ],
)
def test_a_wrong_config_is_one_sentence(folder, changes, sentence):
    edit(folder, **changes)
    with pytest.raises(InputError, match=sentence) as caught:
        pixel.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "3", "{"])
def test_a_config_of_another_form_is_one_sentence(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json is not a JSON object"):
        pixel.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} does not exist"):
        pixel.load(folder)


def test_cut_weights_are_one_sentence(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        pixel.load(folder)
