"""CLIPs of others: their embeddings against transformers and open_clip run by hand, and what must be refused."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dmd.errors import InputError
from dmd.metrics import clip as clips
from tests import tiny_clips

CPU = torch.device("cpu")
TEXTS = ["red", "a red ball", "blue " * 200, ""]


def pixels(height, width, seed=0):
    """Noise that is smooth enough for the rounding of a resize not to matter much."""
    noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return (F.avg_pool2d(noise, 5, 1, 2)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def as_tensor(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Transformers:
    """What its own classes make of a folder."""

    def __init__(self, folder):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self.source = str(folder)
        self.net = CLIPModel.from_pretrained(folder).eval()
        self.processor = CLIPImageProcessor.from_pretrained(folder)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)

    def show(self, images):
        return self.processor(images=[Image.fromarray(i) for i in images], return_tensors="pt").pixel_values

    def both(self, shown, texts):
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        out = self.net(pixel_values=shown, **tokens)
        return out.image_embeds, out.text_embeds


class OpenClip:
    """What its own functions make of a folder."""

    def __init__(self, folder):
        import open_clip

        self.source = f"open_clip:{folder}"
        self.net, _, self.prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

    def show(self, images):
        return torch.stack([self.prepare(Image.fromarray(i)) for i in images])

    def both(self, shown, texts):
        return self.net.eval()(shown, self.tokenizer(texts))[:2]


@pytest.fixture(scope="module", params=["transformers", "open_clip"])
def theirs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "tiny"
    if request.param == "transformers":
        return Transformers(tiny_clips.of_transformers(folder))
    return OpenClip(tiny_clips.of_open_clip(folder))


@pytest.fixture(scope="module")
def ours(theirs):
    return clips.load(theirs.source, CPU, download=False)


@torch.no_grad()
def test_pixels_and_texts_have_the_embeddings_of_the_package(theirs, ours):
    images = [pixels(40, 50, seed=i) for i in range(4)]
    shown, read = theirs.both(theirs.show(images), TEXTS)
    torch.testing.assert_close(ours.pixels(images), shown, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.texts(TEXTS), read, rtol=1e-5, atol=1e-6)
    assert ours.width == shown.shape[1] and ours.name == "CLIP-tiny" and ours.text_mean is None


@torch.no_grad()
@pytest.mark.parametrize(("height", "width", "off"), [(32, 32, 1e-5), (64, 64, 0.02), (24, 24, 0.02), (40, 60, 0.02)])
def test_tensors_are_seen_as_pixels_are(ours, height, width, off):
    """Exactly at the network's own size; else but for the rounding of a resize to 256 levels. Wide images are cut."""
    images = [pixels(height, width, seed=i) for i in range(3)]
    torch.testing.assert_close(ours.images(as_tensor(images)), ours.pixels(images), rtol=0, atol=off)
    bare = F.normalize(ours.see(ours.fit(as_tensor(images))), dim=-1)  # as the published code of CLIP-GEN does
    assert (bare - ours.pixels(images)).abs().max() > 0.05


def test_squashed_images_are_squashed(tmp_path):
    """open_clip's SigLIP resizes each side by itself."""
    folder = tiny_clips.of_open_clip(tmp_path / "squash", resize_mode="squash", interpolation="bilinear")
    ours, images = clips.load(f"open_clip:{folder}", CPU, download=False), [pixels(40, 90)]
    assert torch.equal(ours.pixels(images), F.normalize(OpenClip(folder).net.eval().encode_image(
        OpenClip(folder).show(images)), dim=-1))  # fmt: skip
    torch.testing.assert_close(ours.images(as_tensor(images)), ours.pixels(images), rtol=0, atol=0.02)


@torch.no_grad()
def test_grey_is_repeated_and_an_embedding_is_its_own(ours):
    grey = pixels(48, 48)[..., :1]
    three = np.repeat(grey, 3, 2)
    assert torch.equal(ours.pixels([grey]), ours.pixels([three]))
    assert torch.equal(ours.images(as_tensor([grey])), ours.images(as_tensor([three])))
    images = [pixels(32, 32, seed=i) for i in range(4)]
    alone = torch.cat([ours.pixels([image]) for image in images])
    torch.testing.assert_close(ours.pixels(images), alone, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_image_through_resizing_and_standardisation(ours):
    """Against a difference quotient; the weights are frozen."""
    x = as_tensor([pixels(24, 24)]).requires_grad_()
    towards, direction = torch.randn(2, 3 * 24 * 24, generator=torch.Generator().manual_seed(3))
    towards, direction = towards[: ours.width], direction.reshape(x.shape)
    (slope,) = torch.autograd.grad(ours.images(x)[0] @ towards, x)
    with torch.no_grad():
        h = 1e-2
        quotient = (ours.images(x + h * direction) - ours.images(x - h * direction))[0] @ towards / (2 * h)
    assert (slope * direction).sum().item() == pytest.approx(quotient.item(), rel=0.02)
    assert not any(p.requires_grad for p in ours.net.parameters())


@torch.no_grad()
def test_a_network_saved_without_its_processor_is_shown_images_as_openai_s(tmp_path):
    ours = clips.load(str(tiny_clips.of_transformers(tmp_path / "bare", preprocessing=False)), CPU, download=False)
    image = pixels(32, 32)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    shown = ((torch.from_numpy(image) / 255 - mean) / std).permute(2, 0, 1)[None]
    expected = F.normalize(ours.see(shown), dim=-1)
    torch.testing.assert_close(ours.pixels([image]), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.images(as_tensor([image])), expected, rtol=1e-5, atol=1e-5)


def test_the_digest_knows_the_weights(theirs, ours):
    again = clips.load(theirs.source, CPU, download=False)
    assert again.digest() == ours.digest()
    with torch.no_grad():
        next(again.net.parameters()).view(-1)[0] += 1.0
    assert again.digest() != ours.digest()


# ----------------------------------------------------------------------------- open_clip's own names


@pytest.fixture
def named(tmp_path):
    """open_clip knows "tiny-clip" by name; a state dict of it, and what it makes of an image."""
    import open_clip
    from open_clip import factory

    before = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    (tmp_path / "tiny-clip.json").write_text(json.dumps(tiny_clips.ARCHITECTURE))
    open_clip.add_model_config(tmp_path)
    net, _, prepare = tiny_clips.seeded(lambda: open_clip.create_model_and_transforms("tiny-clip"))
    yield net.eval(), prepare
    factory._MODEL_CONFIG_PATHS[:], factory._MODEL_CONFIGS = before


@torch.no_grad()
@pytest.mark.parametrize("inside", ["state dict", "checkpoint of open_clip's training"])
def test_a_name_and_a_file(tmp_path, named, inside):
    net, prepare = named
    state = net.state_dict()
    if inside != "state dict":
        state = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(state, tmp_path / "w.pt")
    ours = clips.load(f"open_clip:tiny-clip:{tmp_path / 'w.pt'}", CPU, download=False)
    image = pixels(50, 40)
    expected = F.normalize(net.encode_image(prepare(Image.fromarray(image))[None]), dim=-1)
    torch.testing.assert_close(ours.pixels([image]), expected, rtol=1e-5, atol=1e-6)
    assert ours.name == "CLIP-tiny-clip-w"


@pytest.mark.parametrize(
    ("rest", "download", "sentence"),
    [
        ("tiny-clip", False, "open_clip:tiny-clip needs weights: give them as open_clip:tiny-clip:FILE, or allow"),
        ("tiny-clip", True, "open_clip:tiny-clip needs weights"),
        ("ViT-B-32:laion2b_e16", False, "needs weights: give them as open_clip:ViT-B-32:FILE, or allow --download"),
        ("ViT-B-32:laion9", True, "laion9 is neither a file nor one of open_clip's weights of ViT-B-32, which are op"),
        ("nothing", True, "open_clip has no network 'nothing'"),
        ("", True, "open_clip has no network ''"),
        ("owner/name", False, "open_clip:owner/name is neither a folder here nor to be fetched"),
        ("owner/name", True, "the CLIP open_clip:owner/name cannot be had"),  # since tests are offline
    ],
)
def test_what_open_clip_has_not_is_refused(named, rest, download, sentence):
    with pytest.raises(InputError, match=sentence):
        clips.load(f"open_clip:{rest}", CPU, download)


def test_open_clip_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match="pip install 'open_clip_torch>=3'"):
        clips.load("open_clip:ViT-B-32", CPU, download=False)


# ----------------------------------------------------------------------------- damage and hostility


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_pickles_are_not_opened(tmp_path, named):
    """Neither as a file for open_clip, nor in its folders, nor in those of transformers."""
    marker, weights = tmp_path / "marker", tmp_path / "w.pt"
    torch.save({"state_dict": Bomb(marker)}, weights)
    folder, other = tiny_clips.of_open_clip(tmp_path / "a"), tiny_clips.of_transformers(tmp_path / "b")
    (folder / "open_clip_model.safetensors").unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(weights.read_bytes())
    (other / "model.safetensors").unlink()
    (other / "pytorch_model.bin").write_bytes(weights.read_bytes())
    for source in (f"open_clip:tiny-clip:{weights}", f"open_clip:{folder}", str(other)):
        with pytest.raises(InputError, match="cannot be had"):
            clips.load(source, CPU, download=False)
    assert not marker.exists()
    torch.load(weights, weights_only=False)
    assert marker.exists(), "it would have gone off"


def test_code_beside_a_tokenizer_is_not_run(tmp_path):
    """A folder of open_clip may ask for transformers' tokenizers, and in their settings for code of its own."""
    folder = tiny_clips.of_open_clip(tmp_path / "a")
    config = json.loads((folder / "open_clip_config.json").read_text())
    words = {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    config["model_cfg"]["text_cfg"] |= words
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "mine"}))
    asked = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(asked))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(InputError, match="cannot be had"):
        clips.load(f"open_clip:{folder}", CPU, download=False)
    assert not (tmp_path / "marker").exists()


def test_what_is_no_clip_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be had .* or allow --download"):
        clips.load(str(tmp_path / "nothing"), CPU, download=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InputError, match="is a vit, not a CLIP"):
        clips.load(str(tmp_path), CPU, download=False)


def test_missing_and_broken_weights_are_refused(tmp_path, named):
    from safetensors.torch import load_file, save_file

    folder, other = tiny_clips.of_open_clip(tmp_path / "a"), tiny_clips.of_transformers(tmp_path / "b")
    for each, file, lost in (
        (folder, "open_clip_model.safetensors", "visual.proj"),
        (other, "model.safetensors", "visual_projection.weight"),
    ):
        state = load_file(each / file)
        del state[lost]
        save_file(state, each / file, {"format": "pt"})
    with pytest.raises(InputError, match="cannot be had .*(state_dict|visual.proj)"):
        clips.load(f"open_clip:{folder}", CPU, download=False)
    with pytest.raises(InputError, match="is no CLIP: it lacks the weights of visual_projection.weight"):
        clips.load(str(other), CPU, download=False)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be had"):
        clips.load(f"open_clip:{folder}", CPU, download=False)
    (tmp_path / "w.pt").write_bytes(b"cut")
    with pytest.raises(InputError, match=f"open_clip:tiny-clip:{tmp_path / 'w.pt'} cannot be had"):
        clips.load(f"open_clip:tiny-clip:{tmp_path / 'w.pt'}", CPU, download=False)
