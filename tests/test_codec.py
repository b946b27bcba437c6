"""Codecs against diffusers' own calls, and what any codec promises."""

import pytest
import torch

from dmd import codec

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def kl():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.18215,
    ).eval()


@pytest.fixture(scope="module")
def tiny():
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


@pytest.fixture
def images(rng):
    return 2 * torch.rand(2, 3, 16, 16, generator=rng) - 1


@torch.no_grad()
def test_kl_is_the_mean_of_the_posterior_scaled(kl, images):
    ours = codec.KL(kl, 0.18215)
    latents = ours.encode(images)
    assert latents.shape == (2, 4, 8, 8)
    torch.testing.assert_close(latents, kl.encode(images).latent_dist.mode() * 0.18215, rtol=0, atol=0)
    stock = kl.decode(latents / kl.config.scaling_factor, return_dict=False)[0]
    torch.testing.assert_close(ours.decode(latents), stock, rtol=0, atol=0)


@torch.no_grad()
def test_kl_with_a_shift_is_as_in_later_pipelines(kl, images):
    """encode: (mean - shift) * scale; decode: latents / scale + shift (diffusers' Stable Diffusion 3 and Flux)."""
    ours = codec.KL(kl, 1.5305, 0.0609)
    mean = kl.encode(images).latent_dist.mean
    torch.testing.assert_close(ours.encode(images), (mean - 0.0609) * 1.5305)
    torch.testing.assert_close(ours.decode(ours.encode(images)), kl.decode(mean).sample, rtol=0, atol=1e-5)


@torch.no_grad()
def test_tiny_is_the_distilled_autoencoder(tiny, images):
    ours = codec.Tiny(tiny)
    assert torch.equal(ours.encode(images), tiny.encode(images).latents)
    assert torch.equal(ours.decode(ours.encode(images)), tiny.decode(tiny.encode(images).latents).sample)
    half = codec.Tiny(tiny, 0.5)
    torch.testing.assert_close(half.encode(images), 0.5 * ours.encode(images))
    torch.testing.assert_close(half.decode(half.encode(images)), ours.decode(ours.encode(images)))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_slices_change_neither_images_nor_their_order(kl, tiny, rng, monkeypatch, rows):
    """Of five images, cut where `rows` of them fit; the last slice is smaller."""
    latents = torch.randn(5, 4, 4, 6, generator=rng)
    for ours in (codec.KL(kl, 0.18215), codec.Tiny(tiny)):
        whole = ours.decode(latents)
        assert whole.shape[-1] == latents.shape[-1] * ours.factor
        seen = []
        handle = ours.vae.decoder.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(len(x[0])))
        with monkeypatch.context() as patch:
            patch.setattr(codec, "SLICE", rows * whole[0, 0].numel() + 1)
            sliced = ours.decode(latents)
        handle.remove()
        assert max(seen) == rows and sum(seen) == 5
        torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-5)


def test_a_backward_pass_sees_the_batch_as_a_whole(kl, images, monkeypatch):
    monkeypatch.setattr(codec, "SLICE", 1)
    seen = []
    handle = kl.decoder.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    codec.KL(kl, 0.18215).decode(torch.zeros(3, 4, 2, 2))
    handle.remove()
    assert seen == [3]


def test_identity_changes_precision_only(images):
    for found in (codec.Identity().encode(images.half()), codec.Identity().decode(images.half())):
        assert found.dtype == torch.float32
        assert torch.equal(found, images.half().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_results_are_float32_whatever_the_network_is(kl, tiny, images, dtype):
    import copy

    for ours in (codec.KL(copy.deepcopy(kl).to(dtype), 0.18215), codec.Tiny(copy.deepcopy(tiny).to(dtype))):
        latents = ours.encode(images)
        assert latents.dtype == ours.decode(latents).dtype == torch.float32


def test_gradients_pass_through_both_directions(kl, tiny, images):
    for ours in (codec.KL(kl, 0.18215), codec.Tiny(tiny), codec.Identity()):
        pixels = images.clone().requires_grad_()
        latents = ours.encode(pixels)
        weight = torch.randn(ours.decode(latents).shape, generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad((ours.decode(latents) * weight).sum(), pixels)
        assert gradient.abs().sum() > 0


def test_decoding_has_the_gradient_of_finite_differences(kl, rng):
    double = codec.KL(kl, 0.18215)
    latents = (0.5 * torch.randn(1, 4, 4, 4, generator=rng)).requires_grad_()
    direction = torch.randn(1, 4, 4, 4, generator=rng)
    (gradient,) = torch.autograd.grad(double.decode(latents).square().sum(), latents)
    with torch.no_grad():
        h = 1e-2
        up, down = (double.decode(latents + s * h * direction).double().square().sum() for s in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float((up - down) / (2 * h)), rel=1e-2)
