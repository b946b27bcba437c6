"""The CLIP score against transformers' own CLIP from its processor to its logits."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dmd.errors import InputError
from dmd.metrics import clip_score
from dmd.metrics.protocols import lanczos_square

pytest.importorskip("transformers")

CAPTIONS = ["red", "a red ball", "blue " * 200, ""]


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    from tests.teachers.tiny import write_tokenizer

    folder = tmp_path_factory.mktemp("clip") / "clip"
    words = write_tokenizer(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": words, "bos_token_id": words - 2, "eos_token_id": words - 1}
    vision = small | {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "resample": 3}
    settings |= {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_rescale": True}
    settings |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return clip_score.load(str(folder), None, False, torch.device("cpu"))


def test_cosines_are_those_of_transformers_from_files_to_logits(folder, clip):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    images = [pixels(40, 50, 3, seed=i) for i in range(4)]
    net = CLIPModel.from_pretrained(folder).eval()
    pictures = CLIPImageProcessor.from_pretrained(folder)(images=[Image.fromarray(i) for i in images])
    tokens = CLIPTokenizer.from_pretrained(folder)(CAPTIONS, padding=True, truncation=True, max_length=77)
    with torch.no_grad():
        out = net(
            pixel_values=torch.as_tensor(np.stack(pictures["pixel_values"])),
            **{k: torch.tensor(v) for k, v in tokens.items()},
        )
    expected = (out.logits_per_image / net.logit_scale.exp()).diagonal()
    torch.testing.assert_close(clip.cosines(images, CAPTIONS), expected, rtol=1e-4, atol=1e-5)


def test_an_image_s_score_is_its_own(clip):
    images = [pixels(32, 32, 3, seed=i) for i in range(4)]
    whole = clip.cosines(images, CAPTIONS)
    alone = torch.cat([clip.cosines([i], [c]) for i, c in zip(images, CAPTIONS, strict=True)])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)


def test_grey_is_repeated_and_a_prefix_and_a_crop_come_first(clip):
    from dataclasses import replace

    grey, wide = pixels(32, 32, 1), pixels(64, 90, 3)
    assert torch.equal(clip.cosines([grey], ["red"]), clip.cosines([np.repeat(grey, 3, 2)], ["red"]))
    prefixed = replace(clip, prefix="a ")
    assert torch.equal(prefixed.cosines([wide], ["red"]), clip.cosines([wide], ["a red"]))
    cropped = replace(clip, before=lanczos_square(40))
    assert torch.equal(cropped.cosines([wide], ["red"]), clip.cosines([lanczos_square(40)(wide)], ["red"]))


def test_counts_must_agree(clip):
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        clip.cosines([pixels(32, 32, 3)], ["a", "b"])


def test_what_is_no_clip_is_refused(tmp_path):
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match="cannot be had .* or allow --download"):
        clip_score.load(str(tmp_path / "nothing"), None, False, cpu)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InputError, match="is a vit, not a CLIP"):
        clip_score.load(str(tmp_path), None, False, cpu)
    with pytest.raises(InputError, match="is for open_clip:NAME"):
        clip_score.load(str(tmp_path), tmp_path / "w", False, cpu)


def test_open_clip_is_asked_for_by_name(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match="pip install open_clip_torch"):
        clip_score.load("open_clip:ViT-B-32", None, False, torch.device("cpu"))


def test_open_clip_s_cosines_are_its_own(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    small = {"width": 16, "layers": 1, "heads": 2}
    settings = {"embed_dim": 8, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}}
    settings["text_cfg"] = small | {"context_length": 77, "vocab_size": 49408}
    (tmp_path / "tiny-clip.json").write_text(json.dumps(settings))
    open_clip.add_model_config(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net, _, prepare = open_clip.create_model_and_transforms("tiny-clip")
    torch.save(net.state_dict(), tmp_path / "w.pt")
    clip = clip_score.load("open_clip:tiny-clip", tmp_path / "w.pt", False, torch.device("cpu"))
    images = [pixels(50, 40, 3, seed=i) for i in range(3)]
    shown = torch.stack([prepare(Image.fromarray(image)) for image in images])
    with torch.no_grad():
        a, b = net.eval()(shown, open_clip.get_tokenizer("tiny-clip")(CAPTIONS[:3]))[:2]
    torch.testing.assert_close(clip.cosines(images, CAPTIONS[:3]), (a * b).sum(1), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="needs weights: give a file as --clip-weights, or allow --download"):
        clip_score.load("open_clip:tiny-clip", None, False, torch.device("cpu"))
    with pytest.raises(InputError, match="open_clip has no network 'nothing'"):
        clip_score.load("open_clip:nothing", None, False, torch.device("cpu"))
    (tmp_path / "w.pt").write_bytes(b"cut")
    with pytest.raises(InputError, match="open_clip:tiny-clip cannot be had from"):
        clip_score.load("open_clip:tiny-clip", tmp_path / "w.pt", False, torch.device("cpu"))
