"""The image tokenizer: nearest codes, the losses' formulas, learning, and exact resumption with a discriminator."""

import math
from dataclasses import replace

import little
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from dmd import build
from dmd.clipgen import tokenizer as tokenizers
from dmd.clipgen.networks import Block, ConvSizes, Decoder, Encoder, PatchDiscriminator, norm
from dmd.clipgen.tokenizer import Adversary, Tokenizer, Tokenizing, adaptive_weight, hinge_discriminator_loss
from dmd.errors import InputError
from dmd.run import NotFinite, clip_and_check


@pytest.fixture(scope="module")
def net():
    return little.tokenizer()


@pytest.fixture(scope="module")
def images():
    """Four colours in four quarters, shuffled from image to image: (8, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(3)
    palette = 2 * torch.rand(6, 3, generator=generator) - 1
    quarters = palette[torch.randint(0, 6, (8, 2, 2), generator=generator)].permute(0, 3, 1, 2)
    return F.interpolate(quarters, scale_factor=8.0)


def l2(a, b):
    return (a - b).square().flatten(1).mean(1)


def task(net, adversary=None, lr=3e-3):
    return Tokenizing(net, build.adam(net, lr, (0.9, 0.95), 0.0), l2, 1.0, adversary, 1.0, clip_and_check, seed=5)


def test_tokens_are_the_nearest_codes(net, images):
    """By a loop over all places, and by the package's own forward pass."""
    tokens = net.encode(images)
    with torch.no_grad():
        features = net.quantizer.project_in(net.encoder(images).flatten(2).transpose(1, 2))
        _, theirs, _ = net(images)
    for i in range(len(images)):
        for k in range(net.config.length):
            cosines = [float(F.cosine_similarity(features[i, k], code, dim=0)) for code in net.codebook]
            assert cosines[int(tokens[i, k])] == pytest.approx(max(cosines), abs=1e-6)
    assert torch.equal(tokens, theirs.flatten(1))
    assert net.codebook.norm(dim=1).tolist() == pytest.approx([1.0] * 16, abs=1e-5)


def test_decoding_tokens_gives_the_reconstruction(net, images):
    with torch.no_grad():
        rebuilt, _, _ = net(images)
        torch.testing.assert_close(net.decode(net.encode(images)), rebuilt, rtol=1e-4, atol=1e-5)


def test_neither_tokens_nor_images_depend_on_the_batch(net, images):
    whole = net.encode(images)
    alone = torch.cat([net.encode(x[None]) for x in images])
    assert torch.equal(whole, alone)
    with torch.no_grad():
        torch.testing.assert_close(net.decode(whole)[5:6], net.decode(whole[5:6]), rtol=1e-4, atol=1e-5)


def test_beta_is_on_the_encoders_term(images):
    """beta |z - sg(code)|^2, whose gradient moves the encoder and leaves the codes alone."""
    net = little.tokenizer().train()
    with torch.no_grad():
        z = net.quantizer.project_in(net.encoder(images).flatten(2).transpose(1, 2))
        z = F.normalize(z, dim=-1)
        expected = 0.25 * (z - net.codebook[(z @ net.codebook.T).argmax(-1)]).square().mean()
    _, _, commitment = net(images)
    assert commitment.item() == pytest.approx(expected.item(), rel=1e-4)
    commitment.backward()
    assert net.encoder[1].weight.grad.abs().sum() > 0
    assert not net.quantizer._codebook.embed.requires_grad


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    last = nn.Parameter(torch.tensor([0.5, -2.0]))
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    assert adaptive_weight(last @ a, last @ b, last).item() == pytest.approx(5.0 / (0.5 + 1e-4))
    assert adaptive_weight(1e9 * last @ a, last @ b, last).item() == 1e4


def test_the_hinge_loss_is_its_formula(rng):
    real, fake = torch.randn(2, 3, 1, 4, 4, generator=rng)
    a = [max(0.0, 1 - v) for v in real.flatten().tolist()]
    b = [max(0.0, 1 + v) for v in fake.flatten().tolist()]
    expected = 0.5 * (sum(a) / len(a) + sum(b) / len(b))
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(expected, rel=1e-5)


def test_a_patch_score_sees_its_patch_and_a_discriminator_no_other_image(rng):
    net = little.seeded(lambda: PatchDiscriminator(8, 3)).eval()
    x = torch.randn(3, 3, 32, 32, generator=rng)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-4, atol=1e-6)
    assert net(x).shape == (3, 1, 4, 4)


def test_the_papers_sizes_make_16_by_16_tokens():
    """VQGAN f = 16, with fewer weights than the published one (29.3 and 42.5 million without the quantizer)."""
    sizes = ConvSizes(1, (128, 128, 256, 256, 512), 2, 32, True)
    with torch.device("meta"):
        encoder, decoder = Encoder(sizes), Decoder(sizes)
        assert decoder(encoder(torch.zeros(1, 3, 256, 256))).shape == (1, 3, 256, 256)
        assert encoder(torch.zeros(1, 3, 256, 256)).shape == (1, 512, 16, 16)
    count = [sum(p.numel() for p in part.parameters()) for part in (encoder, decoder)]
    assert count == [18_620_032, 28_653_955]


@torch.no_grad()
def test_with_square_blocks_a_token_is_of_its_square_alone(rng):
    """Squares of 8 pixels: a square moved to another place of another image takes its token along."""
    config = replace(little.CONFIG, sizes=ConvSizes(4, (16, 32), 1, 0, square_blocks=2), codes=64)
    net = little.tokenizer(config)
    for block in net.encoder.children():  # second convolutions start at zero
        if isinstance(block, Block):
            nn.init.normal_(block.conv2.weight, std=0.1)
    images = torch.rand(6, 3, 16, 16, generator=rng) * 2 - 1
    tokens = net.encode(images).view(6, 2, 2)
    assert tokens.unique().numel() > 6
    other = torch.rand(6, 3, 16, 16, generator=rng) * 2 - 1
    other[:, :, 8:, :8] = images[:, :, :8, 8:]
    torch.testing.assert_close(net.encode(other).view(6, 2, 2)[:, 1, 0], tokens[:, 0, 1], rtol=0, atol=0)
    around = little.tokenizer(replace(config, sizes=ConvSizes(4, (16, 32), 1, 0)))
    a, b = around.encoder(images)[:, :, 0, 1], around.encoder(other)[:, :, 1, 0]
    assert (a - b).abs().max() > 1e-3  # VQGAN's encoder sees what is beside


@torch.no_grad()
@pytest.mark.parametrize("groups", [0, 1])
def test_without_groups_each_place_is_normalised_by_itself(rng, groups):
    """Beside a bright square elsewhere GroupNorm changes every place."""
    x = torch.randn(2, 6, 4, 4, generator=rng)
    layer = norm(6, groups)
    other = x.clone()
    other[:, :3, 3, 3] += 5.0
    moved = (layer(x) - layer(other)).abs().amax(dim=(0, 1))
    assert moved[3, 3] > 0.1 and bool((moved[:3] > 0.01).all()) == bool(groups)
    if not groups:
        assert moved[:3].max() == 0.0
        naive = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(layer(x), naive, rtol=1e-5, atol=1e-6)


def test_it_learns_one_batch_and_uses_its_codes(images):
    net = little.seeded(lambda: Tokenizer(little.CONFIG))
    trained = task(net)
    first = trained.step(0, [images])
    for step in range(1, 200):
        last = trained.step(step, [images])
    assert last["loss/l1"] < 0.1 * first["loss/l1"] and last["loss/l1"] < 0.05
    with torch.no_grad():
        rebuilt = net.eval().decode(net.encode(images))
    assert (rebuilt - images).abs().mean() < 0.06


def test_unused_codes_are_replaced(images):
    """Codes far from all features are dead; after some steps nearly all serve."""
    net = little.tokenizer().train()
    codebook = net.quantizer._codebook
    with torch.no_grad():
        codebook.embed[0, 4:] = F.normalize(torch.ones(12, 4) * torch.tensor([1.0, 1e-3, 0, 0]), dim=-1)
        codebook.embed_avg[0, 4:] = codebook.embed[0, 4:]
        codebook.cluster_size[0, 4:] = 0.0
    before = net.use()[0].item()
    trained = task(net)
    varied = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for step in range(20):
        figures = trained.step(step, [varied])
    assert before < 0.5 and figures["codebook/use"] >= 0.9
    assert len(net.eval().encode(varied).unique()) >= 0.9 * 16


def test_perplexity_is_the_number_of_codes_that_would_serve_as_well_if_used_alike():
    net = little.tokenizer()
    size = net.quantizer._codebook.cluster_size
    size.fill_(3.0)
    assert [v.item() for v in net.use()] == pytest.approx([1.0, 1.0])
    size[0] = torch.tensor([12.0, 6.0, 3.0, 3.0, *[0.0] * 12])  # a half, a quarter and two eighths: 1.75 bits
    assert [v.item() for v in net.use()] == pytest.approx([4 / 16, 2**1.75 / 16], rel=1e-4)
    size[0, 1:] = 0.0
    assert [v.item() for v in net.use()] == pytest.approx([1 / 16, 1 / 16])


def with_adversary():
    net = little.seeded(lambda: Tokenizer(little.CONFIG))
    critic = little.seeded(lambda: PatchDiscriminator(4, 2), 1)
    return task(net, Adversary(critic, build.adam(critic, 1e-3, (0.5, 0.9), 0.0), 0.8, first=2))


def test_it_resumes_exactly(tmp_path, images):
    """Through the start of the discriminator, with dead codes replaced, with torch's random state elsewhere."""
    accelerator = Accelerator(cpu=True)
    batches = lambda step: [images.roll(step, 0)[:4]]  # noqa: E731
    whole = with_adversary()
    little.run(tmp_path / "whole", whole, batches, 5, accelerator)
    little.run(tmp_path / "parts", with_adversary(), batches, 1, accelerator)
    torch.rand(7)
    little.run(tmp_path / "parts", with_adversary(), batches, 3, accelerator)
    parts = with_adversary()
    little.run(tmp_path / "parts", parts, batches, 5, accelerator)
    a, b = little.states(whole), little.states(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_discriminator_waits_and_then_tells_apart(images):
    trained = with_adversary()
    critic = trained.adversary.net
    before = [p.clone() for p in critic.parameters()]
    figures = [trained.step(step, [images]) for step in range(2)]
    assert all(torch.equal(p, q) for p, q in zip(critic.parameters(), before, strict=True))
    assert figures[1]["loss/discriminator"] == 0 and figures[1]["health/adaptive_weight"] == 0
    later = [trained.step(step, [images]) for step in range(2, 30)]
    assert later[0].keys() == figures[0].keys()
    assert later[-1]["loss/discriminator"] < later[0]["loss/discriminator"]
    assert later[0]["health/adaptive_weight"] > 0


def test_a_bad_image_changes_nothing(images):
    trained = with_adversary()
    trained.step(0, [images])
    before = {k: v.clone() for k, v in little.states(trained).items()}
    bad = images.clone()
    bad[0, 0, 0, 0] = math.nan
    with pytest.raises(NotFinite):
        trained.step(1, [bad])
    after = little.states(trained)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_folder_gives_the_same_tokenizer(tmp_path, net, images):
    tokenizers.save(net, tmp_path)
    again = tokenizers.load(tmp_path, torch.device("cpu"))
    assert torch.equal(again.encode(images), net.encode(images)) and again.config == net.config
    (tmp_path / "config.json").write_text('{"kind": "something else"}')
    with pytest.raises(InputError, match="not the folder of an image tokenizer"):
        tokenizers.load(tmp_path, torch.device("cpu"))
