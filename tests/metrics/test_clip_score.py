"""The CLIP score against transformers' own CLIP from its processor to its logits."""

import numpy as np
import pytest
import torch
from PIL import Image

from dmd.metrics import clip as clips
from dmd.metrics import clip_score
from dmd.metrics.protocols import lanczos_square
from tests import tiny_clips

CAPTIONS = ["red", "a red ball", "blue " * 200, ""]


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clips.of_transformers(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def clip(folder):
    return clips.load(str(folder), torch.device("cpu"), download=False)


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
    torch.testing.assert_close(clip_score.of_pixels(clip, images, CAPTIONS), expected, rtol=1e-4, atol=1e-5)


def test_tensors_score_as_their_pixels_do(clip):
    images = [pixels(32, 32, 3, seed=i) for i in range(4)]
    tensors = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = clip_score.of_pixels(clip, images, CAPTIONS)
    torch.testing.assert_close(clip_score.of_tensors(clip, tensors, CAPTIONS), expected, rtol=1e-4, atol=1e-5)


def test_a_prefix_and_a_crop_come_first(clip):
    wide = pixels(64, 90, 3)
    prefixed = clip_score.of_pixels(clip, [wide], ["red"], prefix="a ")
    assert torch.equal(prefixed, clip_score.of_pixels(clip, [wide], ["a red"]))
    cropped = clip_score.of_pixels(clip, [wide], ["red"], before=lanczos_square(40))
    assert torch.equal(cropped, clip_score.of_pixels(clip, [lanczos_square(40)(wide)], ["red"]))
    assert not torch.equal(cropped, clip_score.of_pixels(clip, [wide], ["red"]))


def test_counts_must_agree(clip):
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        clip_score.of_pixels(clip, [pixels(32, 32, 3)], ["a", "b"])
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        clip_score.of_tensors(clip, torch.zeros(1, 3, 32, 32), ["a", "b"])
