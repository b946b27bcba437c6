"""Stable Diffusion as a denoiser: parity with diffusers on a tiny random pipeline, precision, and every refusal."""

import copy
import fnmatch
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SCHEDULE, edit, save_pipeline

from dmd import codec
from dmd.denoiser import Guided, NetworkDenoiser, epsilon, velocity
from dmd.errors import InputError
from dmd.noise import DDPM
from dmd.solvers import ddim, one_step
from dmd.teachers import layout, stable_diffusion

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

DATA = Path(os.environ.get("DMD_TEST_DATA", ""))
WITH_DATA = pytest.mark.skipif(
    not (DATA / "sd-configs").is_dir(), reason="DMD_TEST_DATA does not name a folder of real data"
)
INDEX, UNET, VAE = "model_index.json", "unet/config.json", "vae/config.json"
TEXT, SCHEDULER = "text_encoder/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PROMPTS = ["a red circle", "kaksi sinistä neliötä, 赤い丸 🔴", ""]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A tiny random pipeline and its folder."""
    folder = tmp_path_factory.mktemp("pipeline")
    return save_pipeline(folder), folder / "tiny"


@pytest.fixture
def folder(pipeline, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(pipeline[1], tmp_path / "copy")


def stock(pipe, kind, z, steps, scale, prediction="epsilon", **settings):
    """Latents of diffusers' own pipeline with another scheduler."""
    import diffusers

    pipe.scheduler = getattr(diffusers, kind)(**SCHEDULE, prediction_type=prediction, clip_sample=False, **settings)
    done = pipe(PROMPTS, latents=z, num_inference_steps=steps, guidance_scale=scale, output_type="latent")
    return done.images


@pytest.fixture
def z(rng):
    return torch.randn(3, 4, 8, 8, generator=rng)


# ----------------------------------------------------------------------------- parity


def test_what_is_loaded(pipeline):
    pipe, path = pipeline
    ours = stable_diffusion.load(path)
    assert ours.denoiser.schedule == DDPM()
    assert ours.denoiser.prediction is epsilon
    assert ours.shape == (4, 8, 8)
    assert isinstance(ours.codec, codec.KL)
    assert not any(module.training for module in ours.denoiser.modules())
    assert all(p.requires_grad for p in ours.denoiser.parameters())
    assert not any(p.requires_grad for n in (ours.text.network, ours.codec.vae) for p in n.parameters())
    saved = pipe.unet.state_dict()
    assert all(torch.equal(saved[k], v) for k, v in ours.denoiser.net.unet.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "settings"), [("LCMScheduler", {}), ("DDIMScheduler", {"timestep_spacing": "trailing"})]
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_one_step_is_the_stock_pipeline_s(pipeline, folder, z, kind, settings, prediction):
    edit(folder / SCHEDULER, prediction_type=prediction)
    ours = stable_diffusion.load(folder)
    found = one_step(ours.denoiser, z, ours.encode(PROMPTS))
    expected = stock(pipeline[0], kind, z, 1, 0.0, prediction, **settings)
    assert expected.std() > 0.2
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("steps", "scale"), [(10, 7.5), (4, 2.0)])
@torch.no_grad()
def test_guided_ddim_is_the_stock_pipeline_s(pipeline, folder, z, steps, scale, prediction):
    edit(folder / SCHEDULER, prediction_type=prediction)
    ours = stable_diffusion.load(folder)
    found = ddim(Guided(ours.denoiser, scale, ours.null()), z, steps, ours.encode(PROMPTS))
    expected = stock(pipeline[0], "DDIMScheduler", z, steps, scale, prediction, timestep_spacing="trailing")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_the_unet_is_told_the_index_of_the_noise_level(pipeline, z):
    class Telling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, timestep, text, return_dict):
            self.told = timestep
            return (torch.zeros_like(x),)

    unet = Telling()
    denoiser = NetworkDenoiser(stable_diffusion.TimestepNet(unet, DDPM()), DDPM(), epsilon)
    table = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    for t in (torch.tensor([0.0, 0.5, 1.0]), torch.rand(3, generator=torch.Generator().manual_seed(1))):
        x0 = denoiser(z, t, {"text": torch.zeros(3, 77, 16)})
        assert unet.told.dtype == torch.int64
        alpha = table[unet.told].sqrt().float()  # F = 0, so x0 = x_t / alpha
        torch.testing.assert_close(x0, z / alpha[:, None, None, None])


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(pipeline, z):
    ours = stable_diffusion.load(pipeline[1])
    together = one_step(ours.denoiser, z, ours.encode(PROMPTS))
    alone = [one_step(ours.denoiser, z[i : i + 1], ours.encode(PROMPTS[i : i + 1])) for i in range(3)]
    assert (together - torch.cat(alone)).square().mean().sqrt() <= 1e-5


# ----------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.025), (torch.float16, 0.0031)])
def test_x0_of_a_rounded_output_is_near_the_float64_formula(dtype, bound, rng):
    """At t = 1 an error of epsilon is multiplied by 14.65; no other rounding may be added to it."""

    class Exact(torch.nn.Module):
        def __init__(self, out):
            super().__init__()
            self.out = torch.nn.Parameter(out.to(dtype), requires_grad=False)

        def forward(self, x, timestep, text, return_dict):
            assert x.dtype == text.dtype == dtype
            return (self.out,)

    z = torch.randn(16, 4, 64, 64, generator=rng)
    x0 = 0.9 * torch.randn(16, 4, 64, 64, generator=rng).double()
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[-1]
    noise = (z - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    net = stable_diffusion.TimestepNet(Exact(noise), DDPM())
    found = one_step(NetworkDenoiser(net, DDPM(), epsilon), z, {"text": torch.zeros(16, 77, 16)})
    assert found.dtype == torch.float32
    assert 0.5 * bound < float((found.double() - x0).square().mean().sqrt()) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_networks_may_be_of_half_precision(pipeline, z, dtype):
    """All results are float32, and x0 is the float64 formula of what the network said, to float32's rounding."""
    ours = stable_diffusion.load(pipeline[1], dtype=dtype)
    assert {p.dtype for p in ours.denoiser.parameters()} == {dtype} == {p.dtype for p in ours.codec.vae.parameters()}
    cond = ours.encode(PROMPTS)
    assert cond["text"].dtype == ours.null()["text"].dtype == torch.float32
    said = []
    ours.denoiser.net.register_forward_hook(lambda module, args, out: said.append(out))
    x0 = one_step(ours.denoiser, z, cond)
    assert x0.dtype == ours.codec.decode(x0).dtype == torch.float32
    assert said[0].dtype == dtype
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[-1]
    exact = (z.double() - (1 - alpha_bar).sqrt() * said[0].double()) / alpha_bar.sqrt()
    torch.testing.assert_close(x0.double(), exact, rtol=1e-6, atol=2e-5)


def test_gradients_reach_weights_and_input(pipeline, z):
    ours = stable_diffusion.load(pipeline[1], autocast=torch.bfloat16)
    student = copy.deepcopy(ours.denoiser)
    x0 = student(z.requires_grad_(), torch.ones(3), ours.encode(PROMPTS))
    assert x0.dtype == torch.float32
    x0.square().mean().backward()
    assert z.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in student.parameters())
    assert all(p.grad is None for p in ours.denoiser.parameters())


# ----------------------------------------------------------------------------- text


@torch.no_grad()
def test_encode_is_the_stock_pipeline_s(pipeline):
    pipe, path = pipeline
    ours = stable_diffusion.load(path)
    expected, empty = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    found = ours.encode(PROMPTS)
    assert found.keys() == {"text"}
    assert found["text"].shape == (3, 77, 16)
    torch.testing.assert_close(found["text"], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.null()["text"], empty[:1], rtol=0, atol=1e-6)
    assert ours.null() is ours.null()


@torch.no_grad()
def test_a_long_prompt_is_cut_with_one_warning(pipeline):
    pipe, path = pipeline
    ours = stable_diffusion.load(path)
    long = "x " * 5000
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.encode(["x " * 75])
        assert not caught
        found = ours.encode(["short", "x " * 89, long])
        ours.encode([long])
    assert [str(w.message) for w in caught] == [
        "a prompt has 91 tokens and the text encoder reads 77: the last 14 are dropped "
        "(further such prompts are not reported)"
    ]
    expected, _ = pipe.encode_prompt(["short", "x " * 89, long], "cpu", 1, False)
    torch.testing.assert_close(found["text"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prompt", ["\0", "a\0b", "/../..", "<|endoftext|>", "\ufeff", "\u202edda", "🏳️‍🌈" * 50])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:a prompt has")
def test_odd_prompts_are_encoded(pipeline, prompt):
    assert stable_diffusion.load(pipeline[1]).encode([prompt])["text"].isfinite().all()


# ----------------------------------------------------------------------------- codec


@torch.no_grad()
def test_the_codec_has_the_scaling_of_the_pipeline(pipeline, folder, rng):
    pipe, _ = pipeline
    edit(folder / VAE, scaling_factor=0.3)
    for path, scale in ((pipeline[1], 0.18215), (folder, 0.3)):
        ours = stable_diffusion.load(path)
        images = 2 * torch.rand(2, 3, 16, 16, generator=rng) - 1
        latents = ours.codec.encode(images)
        assert latents.shape == (2, *ours.shape)
        torch.testing.assert_close(latents, pipe.vae.encode(images).latent_dist.mean * scale)
        torch.testing.assert_close(ours.codec.decode(latents), pipe.vae.decode(latents / scale).sample)


def test_a_tiny_autoencoder_can_stand_in(pipeline, folder):
    from diffusers import AutoencoderTiny

    shutil.rmtree(folder / "vae")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(folder / "vae")
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    ours = stable_diffusion.load(folder)
    assert isinstance(ours.codec, codec.Tiny)
    assert ours.codec.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)


# ----------------------------------------------------------------------------- layouts


@torch.no_grad()
def test_variants_and_shards(pipeline, folder, z):
    pipe, path = pipeline
    shutil.rmtree(folder / "unet")
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="40KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    expected = stable_diffusion.load(path)
    ours = stable_diffusion.load(folder)
    cond = ours.encode(PROMPTS)
    assert torch.equal(one_step(ours.denoiser, z, cond), one_step(expected.denoiser, z, cond))

    variant = shutil.copytree(path, folder / "variant")
    for part, stem in layout.STEMS.items():
        (variant / part / f"{stem}.safetensors").rename(variant / part / f"{stem}.fp16.safetensors")
    ours = stable_diffusion.load(variant, variant="fp16")
    assert torch.equal(one_step(ours.denoiser, z, cond), one_step(expected.denoiser, z, cond))
    with pytest.raises(
        InputError, match=r"but diffusion_pytorch_model.fp16.safetensors does: choose it by --variant fp16"
    ):
        stable_diffusion.load(variant)

    next((folder / "unet").glob("*-00002-*")).unlink()
    with pytest.raises(InputError, match=r"unet/diffusion_pytorch_model-00002-of-.* does not exist"):
        stable_diffusion.load(folder)


@torch.no_grad()
def test_the_names_of_version_1_5_are_known(pipeline, folder, z):
    """Its files are older than today's classes: text tensors have a prefix, the autoencoder's attention other names."""
    text, vae = folder / "text_encoder" / "model.safetensors", folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(text).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, text, {"format": "pt"})
    tensors, old = load_file(vae), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        tensors = {k.replace(f".{new}.", f".{name}."): v for k, v in tensors.items()}
    assert any(".query." in k for k in tensors)
    save_file(tensors, vae, {"format": "pt"})
    expected, found = stable_diffusion.load(pipeline[1]), stable_diffusion.load(folder)
    assert torch.equal(found.encode(PROMPTS)["text"], expected.encode(PROMPTS)["text"])
    assert torch.equal(found.codec.decode(z), expected.codec.decode(z))


def test_the_table_is_that_of_the_scheduler(folder):
    edit(folder / SCHEDULER, num_train_timesteps=500, beta_end=0.02, prediction_type="v_prediction")
    settings = layout.read(folder)
    assert settings == layout.Settings(DDPM(500, 0.00085, 0.02), velocity, (4, 8, 8), "AutoencoderKL")


def replace(path, content):
    path.write_bytes(content)


def add_token(path):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<mine>"])
    tokenizer.save_pretrained(path)


def drop(path, name):
    """Remove a tensor from a file."""
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        (INDEX, {"_class_name": "StableDiffusionXLPipeline"}, "_class_name 'StableDiffusionXLPipeline': a teacher is"),
        (INDEX, {"_class_name": "StableDiffusionInpaintPipeline"}, "_class_name 'StableDiffusionInpaintPipeline'"),
        (INDEX, {"_class_name": "StableVideoDiffusionPipeline"}, "_class_name 'StableVideoDiffusionPipeline'"),
        (INDEX, {"_class_name": "TextToVideoSDPipeline"}, "_class_name 'TextToVideoSDPipeline'"),
        (INDEX, {"_class_name": "StableDiffusion3Pipeline"}, "_class_name 'StableDiffusion3Pipeline'"),
        (INDEX, {"_class_name": "FluxPipeline"}, "_class_name 'FluxPipeline'"),
        (INDEX, {"_class_name": ["pipeline", "Mine"]}, r"_class_name \['pipeline', 'Mine'\]"),
        (INDEX, {"unet": ["diffusers", "UNet3DConditionModel"]}, "'UNet3DConditionModel' as its unet: what can be"),
        (INDEX, {"unet": ["diffusers", "UNetMotionModel"]}, "'UNetMotionModel' as its unet"),
        (INDEX, {"unet": None}, "None as its unet"),
        (INDEX, {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "'FlowMatch.*' as its scheduler"),
        (INDEX, {"vae": ["diffusers", "AutoencoderKLTemporalDecoder"]}, "'AutoencoderKLTemporalDecoder' as its vae"),
        (INDEX, {"text_encoder": ["transformers", "T5EncoderModel"]}, "'T5EncoderModel' as its text_encoder"),
        (INDEX, {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "second text encoder, as SDXL"),
        (UNET, {"in_channels": 9}, "in_channels 9 and out_channels 4, as networks for inpainting have"),
        (UNET, {"in_channels": 8}, "in_channels 8 .* for editing"),
        (UNET, {"addition_embed_type": "text_time"}, "addition_embed_type = 'text_time', so this is an SDXL-like"),
        (UNET, {"time_cond_proj_dim": 256}, "time_cond_proj_dim = 256, so this is a network distilled with guidance"),
        (UNET, {"num_class_embeds": 1000}, "num_class_embeds = 1000, so this is an upscaler"),
        (UNET, {"cross_attention_dim": 768}, "hidden_size 16, but the UNet reads text of width 768"),
        (UNET, {"sample_size": None}, "sample_size None"),
        (VAE, {"latent_channels": 16}, "16 latent channels, but the UNet takes 4"),
        (VAE, {"shift_factor": 0.06}, "shift_factor = 0.06"),
        (SCHEDULER, {"beta_schedule": "linear"}, "beta_schedule 'linear': a teacher's must be 'scaled_linear'"),
        (SCHEDULER, {"beta_schedule": None}, "beta_schedule 'linear'"),
        (SCHEDULER, {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule 'squaredcos_cap_v2'"),
        (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True, so this is a schedule without"),
        (SCHEDULER, {"num_train_timesteps": 1}, "num_train_timesteps 1: it must be"),
        (SCHEDULER, {"num_train_timesteps": "1000"}, "num_train_timesteps '1000': it must be"),
        (SCHEDULER, {"beta_end": 0.0001}, "beta_start 0.00085 and beta_end 0.0001: they must rise"),
        (SCHEDULER, {"timestep_type": "continuous"}, "timestep_type 'continuous'"),
        (SCHEDULER, {"clip_sample": True}, "clip_sample = True"),
        (SCHEDULER, {"prediction_type": "sample"}, "prediction_type 'sample': a teacher's must be epsilon or v_pred"),
        (SCHEDULER, {"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
    ],
)
def test_another_kind_of_pipeline_is_refused(folder, file, changes, sentence):
    edit(folder / file, **changes)
    with pytest.raises(InputError, match=sentence) as caught:
        stable_diffusion.load(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / INDEX).unlink(), r"model_index.json cannot be read: give the folder of a diffusers pipeline"),
        (lambda f: replace(f / INDEX, b'{"_class'), r"model_index.json is not JSON: download it again"),
        (lambda f: replace(f / INDEX, b"[]"), r"model_index.json is not a JSON object"),
        (lambda f: (f / UNET).unlink(), r"unet/config.json cannot be read: the folder is not complete"),
        (lambda f: (f / SCHEDULER).unlink(), r"scheduler_config.json cannot be read"),
        (lambda f: shutil.rmtree(f / "text_encoder"), r"text_encoder/config.json cannot be read"),
        (lambda f: shutil.rmtree(f / "tokenizer"), r"tokenizer holds no readable CLIP tokenizer"),
        (
            lambda f: [replace(p, b"{") for p in (f / "tokenizer").iterdir()],
            r"tokenizer holds no readable CLIP tokenizer",
        ),
        (lambda f: add_token(f / "tokenizer"), r"tokenizer has 517 tokens, but the text encoder knows 516"),
        (lambda f: (f / WEIGHTS).unlink(), r"diffusion_pytorch_model.safetensors does not exist: the download was"),
        (
            lambda f: (f / WEIGHTS).rename(f / f"{WEIGHTS}.incomplete"),
            r"safetensors is missing, and \*.incomplete files beside it tell of an interrupted download",
        ),
        (
            lambda f: (f / WEIGHTS).rename(f / "unet/diffusion_pytorch_model.bin"),
            r"and diffusion_pytorch_model.bin is a pickle, which could run code: convert it to safetensors",
        ),
        (
            lambda f: (f / "text_encoder/model.safetensors").rename(f / "text_encoder/pytorch_model.bin"),
            r"and pytorch_model.bin is a pickle",
        ),
        (lambda f: replace(f / WEIGHTS, (f / WEIGHTS).read_bytes()[:-1]), r"safetensors is cut or damaged"),
        (lambda f: replace(f / WEIGHTS, (f / WEIGHTS).read_bytes()[:999]), r"safetensors is cut or damaged"),
        (lambda f: replace(f / WEIGHTS, b""), r"safetensors is cut or damaged"),
        (lambda f: replace(f / WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), r"is a git-lfs pointer"),
        (
            lambda f: drop(f / WEIGHTS, "conv_in.bias"),
            r"unet (lacks tensors of its|holds no readable) UNet2DConditionModel: .*conv_in.bias",
        ),
        (lambda f: edit(f / UNET, block_out_channels=[8, 8]), r"unet holds no readable UNet2DConditionModel: .* shape"),
        (lambda f: edit(f / TEXT, num_hidden_layers=3), r"text_encoder lacks tensors of its CLIPTextModel"),
        (
            lambda f: edit(f / TEXT, vocab_size=100),
            r"text_encoder (holds no readable|lacks tensors of its) CLIPText",
        ),
        (lambda f: edit(f / VAE, layers_per_block=2), r"vae (lacks tensors of its|holds no readable) AutoencoderKL"),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, sentence):
    damage(folder)
    with pytest.raises(InputError, match=sentence) as caught:
        stable_diffusion.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(folder)) + 400


def test_a_pickle_beside_safetensors_is_not_opened(folder):
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not even a pickle")
    stable_diffusion.load(folder)


@pytest.mark.parametrize("source", ["somewhere", "a/b/c", Path("/no/such/folder"), "https://example.com/model", "../x"])
def test_what_is_neither_folder_nor_id_is_refused(source):
    with pytest.raises(InputError, match=r"is no folder, and no id on the hub such as OWNER/NAME"):
        stable_diffusion.load(source)


def test_a_hub_id_that_is_not_cached_is_refused_offline():
    with pytest.raises(
        InputError, match=r"owner/name is no folder, and as an id on the hub it is not wholly in the cache, while"
    ):
        stable_diffusion.load("owner/name")


def test_a_cached_hub_id_is_read_offline(pipeline, tmp_path, monkeypatch, z):
    """The cache as the hub's client lays it out; without one of its files it is an interrupted download."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cache, commit = tmp_path / "models--owner--name", "0123456789abcdef0123456789abcdef01234567"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(pipeline[1], cache / "snapshots" / commit)
    ours = stable_diffusion.load("owner/name")
    assert ours.shape == (4, 8, 8)
    (cache / "snapshots" / commit / WEIGHTS).unlink()
    (cache / "blobs").mkdir()
    (cache / "blobs" / "0123.incomplete").write_bytes(b"")
    with pytest.raises(InputError, match=r"missing, and \*.incomplete files|is not wholly in the cache"):
        stable_diffusion.load("owner/name")


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub with one pipeline, and the files that were downloaded from it."""
    import huggingface_hub

    snapshot, taken = tmp_path / "snapshots" / "0123", []

    def download(name, revision, allow_patterns):
        assert (name, revision) == ("owner/name", "v2" if not taken else "0123")
        files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
        for file in {f for f in files for pattern in allow_patterns if fnmatch.fnmatch(f, pattern)} - set(taken):
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / file, snapshot / file)
            taken.append(file)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return taken


def test_only_what_is_used_is_downloaded(hub, folder):
    for file in (
        "v1-5-pruned.ckpt",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ):
        (folder / file).write_bytes(b"large")
    stable_diffusion.load("owner/name", revision="v2")
    large = sorted(file for file in hub if not file.endswith((".json", ".txt")))
    assert large == [f"{part}/{stem}.safetensors" for part, stem in sorted(layout.STEMS.items())]


def test_configs_are_refused_before_weights_are_downloaded(hub, folder):
    edit(folder / UNET, in_channels=9)
    with pytest.raises(InputError, match="inpainting"):
        stable_diffusion.load("owner/name", revision="v2")
    assert not [file for file in hub if file.endswith(".safetensors")]


def test_what_the_hub_says_is_one_sentence(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    def fail(*args, **kwargs):
        raise OSError("404 Client Error.\n\nRepository Not Found for url: x.\nPlease log in")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        InputError,
        match=r"^owner/name is no folder, and as an id it cannot be had from the hub \(OSError: 404 Client Error\)$",
    ):
        stable_diffusion.load("owner/name")


# ----------------------------------------------------------------------------- the real thing


@WITH_DATA
@pytest.mark.parametrize(
    ("name", "unet_size", "text_size"),
    [("sd-v1-5", 859_520_964, 123_060_480), ("sd-2-1-base", 865_910_724, 340_387_840)],
)
def test_real_configs_are_accepted(name, unet_size, text_size):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = DATA / "sd-configs" / name
    settings = layout.read(folder)
    assert settings == layout.Settings(DDPM(1000, 0.00085, 0.012), epsilon, (4, 64, 64), "AutoencoderKL")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    sizes = [sum(p.numel() for p in network.parameters()) for network in (unet, vae, text)]
    assert sizes == [unet_size, 83_653_863, text_size]
    net = stable_diffusion.TimestepNet(unet, settings.schedule)
    out = net(
        torch.zeros(2, 4, 64, 64, device="meta"),
        torch.zeros(2, device="meta"),
        torch.zeros(2, 77, text.config.hidden_size, device="meta"),
    )
    assert out.shape == (2, *settings.shape)


@WITH_DATA
def test_the_real_sdxl_config_is_refused():
    with pytest.raises(InputError, match=r"model_index.json has _class_name 'StableDiffusionXLPipeline'"):
        layout.read(DATA / "sd-configs" / "sdxl-base-1.0")


@WITH_DATA
def test_the_real_tokenizer(tmp_path):
    from transformers import CLIPTextConfig

    shutil.copytree(DATA / "clip-tokenizer" / "hf", tmp_path / "tokenizer")
    tokenizer = stable_diffusion.tokenizer(tmp_path / "tokenizer")
    seen = []

    class Seeing(torch.nn.Module):
        config = CLIPTextConfig()
        device = torch.device("cpu")

        def forward(self, ids):
            seen.append(ids)
            return (ids[..., None],)

    text = stable_diffusion.TextEncoder(tokenizer, Seeing())
    text.encode(["a photo of a cat", ""])
    assert seen[0].tolist() == [[49406, 320, 1125, 539, 320, 2368, *[49407] * 71], [49406, *[49407] * 76]]
