"""CLIP: its loss by a naive loop, those of others by name, and a small one that learns."""

import math

import little
import pytest
import torch
import torch.nn.functional as F

from dmd import build
from dmd.clipgen import clip as clips
from dmd.clipgen.clip import CaptionBatch, Contrasting, SmallClip, SmallClipConfig, SmallClipNet, contrastive_loss
from dmd.clipgen.networks import ConvSizes
from dmd.ema import Ema
from dmd.errors import InputError
from dmd.metrics import clip as metrics_clip
from dmd.run import clip_and_check
from dmd.teachers import miniature, stable_diffusion
from tests import tiny_clips

WORDS = ["a", "blue", "green", "red", "square"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """(folder, token count) of a tokenizer that knows `WORDS`."""
    folder = tmp_path_factory.mktemp("words")
    return folder, miniature.write_tokenizer(WORDS, 8, folder)


def naive(image, text, scale, captions):
    """CLIP's loss, a number at a time; the target of a row is spread over all that say the same."""
    n, total = len(image), 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(n):
            logits = [scale * float(a[i] @ b[j]) for j in range(n)]
            log_sum = math.log(sum(math.exp(v) for v in logits))
            same = [j for j in range(n) if captions[j] == captions[i]]
            total += sum(log_sum - logits[j] for j in same) / len(same) / (2 * n)
    return total


@pytest.mark.parametrize("captions", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1]])
def test_the_contrastive_loss_is_that_of_a_naive_loop(rng, captions):
    image, text = F.normalize(torch.randn(2, 5, 7, generator=rng), dim=-1)
    number = torch.tensor(captions)
    got = contrastive_loss(image, text, torch.tensor(9.0), number[:, None] == number)
    assert got.item() == pytest.approx(naive(image, text, 9.0, captions), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_a_clip_of_others_is_read_as_the_metrics_read_it(tmp_path, rng, kind):
    """By the same notation as `dmd evaluate --clip`; tests/metrics/test_clip.py compares it with the packages."""
    make = {"transformers": tiny_clips.of_transformers, "open_clip": tiny_clips.of_open_clip}[kind]
    source = ("open_clip:" if kind == "open_clip" else "") + str(make(tmp_path / "clip"))
    found, other = clips.load(source, torch.device("cpu")), metrics_clip.load(source, torch.device("cpu"), False)
    x = torch.rand(2, 3, 32, 32, generator=rng) * 2 - 1
    assert torch.equal(found.images(x), other.images(x)) and torch.equal(found.texts(["red"]), other.texts(["red"]))
    assert (found.digest(), found.width, found.text_mean) == (other.digest(), other.width, None)


def test_what_is_no_clip_is_refused(tmp_path):
    with pytest.raises(InputError, match="the CLIP .*nothing cannot be had"):
        clips.load(tmp_path / "nothing", torch.device("cpu"))
    (tmp_path / "config.json").write_text('{"kind": "dmd-small-clip", "size": 3}')
    with pytest.raises(InputError, match="does not describe a small CLIP"):
        clips.load(tmp_path, torch.device("cpu"))


def small(words, length=8):
    folder, count = words
    sizes = ConvSizes(4, (8, 16), 1)
    net = little.seeded(lambda: SmallClipNet(SmallClipConfig(16, sizes, 16, 1, length, count, 8)))
    return SmallClip(net, stable_diffusion.tokenizer(folder))


def test_a_small_clip_may_begin_with_the_text_encoder_of_a_pipeline():
    """What ships knows captions of shapes; what the small CLIP says of their words is the same before it learns."""
    start = clips.text_start("shapes-teacher")
    net = little.seeded(lambda: clips.beginning_with(start, 16, ConvSizes(4, (8, 16), 1), 8)).eval()
    texts = ["a small red circle at the left on a blue background", "a red ring above a large blue star on a pink one"]
    tokens = start.tokenizer(texts, padding="max_length", max_length=start.length, return_tensors="pt").input_ids
    assert torch.equal(net.text(input_ids=tokens).last_hidden_state, start.encode(texts)["text"])
    assert SmallClip(net, start.tokenizer).texts(texts).shape == (2, 8)


def test_a_text_encoder_that_does_not_fit_is_refused(tmp_path, words):
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "tokenizer").symlink_to(words[0])
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 8}
    two = CLIPTextConfig(
        vocab_size=words[1], num_attention_heads=2, bos_token_id=words[1] - 2, eos_token_id=words[1] - 1, **sizes
    )
    CLIPTextModel(two).save_pretrained(folder / "text_encoder")
    with pytest.raises(InputError, match="has 2 heads and layers of 64: a small CLIP can begin with 4 heads and 64"):
        clips.text_start(str(folder))


def test_a_small_clip_learns_which_text_is_whose(tmp_path, words):
    encoder = small(words)
    texts = ["a red square", "a green square", "a blue square", "red", "green", "blue"]
    colours = torch.eye(3).repeat(2, 1)[:, :, None, None] * 2 - 1
    images = colours.expand(-1, -1, 16, 16).clone()
    images[3:, :, 4:] = 0.0  # a bar: one of its places is what tells it from the full square
    task = Contrasting(
        encoder.net, build.adam(encoder.net, 3e-3, (0.9, 0.95), 0.0), Ema(encoder.net, 0.5), 1.0, clip_and_check
    )
    batch = CaptionBatch(images, encoder.tokens(texts), torch.arange(6))
    first = task.step(0, [batch])["loss/contrastive"]
    for step in range(1, 80):
        last = task.step(step, [batch])
    assert last["right"] == 1.0 and last["loss/contrastive"] < 0.2 * first
    assert encoder.net.logit_scale.item() <= math.log(100) + 1e-4
    average = SmallClip(task.ema.shadow, encoder.tokenizer)
    found = average.images(images) @ average.texts(texts).T
    assert found.argmax(1).tolist() == list(range(6))
    for file in words[0].iterdir():
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        (tmp_path / "tokenizer" / file.name).write_bytes(file.read_bytes())
    task.ema.shadow.text_mean.copy_(average.texts(texts).mean(0))
    clips.save(task.ema.shadow, tmp_path)
    again = clips.load(tmp_path, torch.device("cpu"))
    torch.testing.assert_close(again.images(images) @ again.texts(texts).T, found)
    torch.testing.assert_close(again.text_mean, average.texts(texts).mean(0))
    assert again.digest() == average.digest() != encoder.digest()
