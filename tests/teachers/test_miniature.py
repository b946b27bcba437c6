"""The miniature: its tokenizer knows the words of the world, and its folder is one of the stock pipeline."""

from typing import Any

import pytest
import torch

from dmd.data import shapes
from dmd.denoiser import Guided
from dmd.solvers import ddim
from dmd.teachers import miniature, stable_diffusion
from dmd.teachers.miniature import Describer, MiniatureConfig

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SMALL = MiniatureConfig(vae_widths=(8, 8, 8, 8), unet_widths=(16, 16), text_width=16, text_layers=1, heads=2)
CAPTIONS = [shapes.caption(s) for s in shapes.scenes(3, torch.arange(500))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of random weights, away from the zeros that some layers begin with."""
    folder = tmp_path_factory.mktemp("miniature")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        count = miniature.write_tokenizer(shapes.words(), SMALL.tokens, folder / "tokenizer")
        net: Any = miniature.denoiser(SMALL).net
        text = miniature.text_encoder(SMALL, count)
        vae = miniature.autoencoder(SMALL)
        for parameter in (*net.parameters(), *text.parameters(), *vae.parameters()):
            parameter.data += 0.05 * torch.randn_like(parameter)
    miniature.save(vae, net, text, 0.7, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return stable_diffusion.tokenizer(folder / "tokenizer")


def test_a_caption_is_one_token_a_word(tokenizer):
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    seen = set()
    for caption in CAPTIONS:
        ids = tokenizer(caption).input_ids
        assert (ids[0], ids[-1]) == (start, end)
        assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == [f"{word}</w>" for word in caption.split()]
        seen.update(ids[1:-1])
    assert len(seen) == len(shapes.words())
    assert max(len(tokenizer(c).input_ids) for c in CAPTIONS) <= SMALL.tokens


@pytest.mark.parametrize("text", ["redder circles", "красный круг", "赤い丸", "a/b\\c", "🔴"])
def test_other_text_is_read_by_bytes(tokenizer, text):
    ids = tokenizer(text).input_ids[1:-1]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("words", [["aab", "ab", "b"], ["ababab", "abab", "ab", "baba"], ["left", "leftleft", "lef"]])
def test_any_words_become_single_tokens(tmp_path, words):
    """Merges of one word occur within others; greedy byte-pair encoding has to find each word all the same."""
    count = miniature.write_tokenizer(words, 16, tmp_path)
    tokenizer = stable_diffusion.tokenizer(tmp_path)
    assert len(tokenizer) == count
    for word in words:
        assert tokenizer.convert_ids_to_tokens(tokenizer(word).input_ids[1:-1]) == [f"{word}</w>"]


def test_the_folder_is_read_by_the_stock_pipeline_and_samples_alike(folder):
    """DDIM with trailing steps, as the folder's scheduler says, against our solver: the same latents."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    ours = stable_diffusion.load(folder)
    z = torch.randn(2, *SMALL.shape, generator=torch.Generator().manual_seed(1))
    theirs = pipeline(CAPTIONS[:2], num_inference_steps=4, guidance_scale=3.0, latents=z, output_type="latent").images
    with torch.no_grad():
        x0 = ddim(Guided(ours.denoiser, 3.0, ours.null()), z, 4, ours.encode(CAPTIONS[:2]))
        decoded = ours.codec.decode(x0)
    assert theirs.std() > 0.05
    torch.testing.assert_close(x0, theirs, rtol=1e-4, atol=1e-4 * theirs.std().item())
    shown = pipeline.vae.decode(theirs / 0.7).sample
    torch.testing.assert_close(decoded, shown, rtol=1e-3, atol=1e-4)


def test_weights_are_kept_in_half_precision_within_its_rounding(folder):
    loaded = stable_diffusion.load(folder)
    for parameter in loaded.denoiser.parameters():
        assert torch.equal(parameter, parameter.half().float())


def test_the_describer_answers_from_the_end_mark_on():
    """Against a loop over captions and tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        describer = Describer(miniature.text_encoder(SMALL, 600), [3, 2]).eval()
        for parameter in describer.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    begin, end = 598, 599
    tokens = torch.full((2, SMALL.tokens), end)
    tokens[0, :4] = torch.tensor([begin, 5, 6, 7])
    tokens[1, :2] = torch.tensor([begin, 9])
    scores, row = describer(tokens)
    wanted, rows = [], []
    for i, words in enumerate((4, 2)):
        features = describer.text(tokens[i : i + 1])[0][0]
        for k in range(words, SMALL.tokens):
            wanted.append(describer.head.weight @ features[k] + describer.head.bias)
            rows.append(i)
    assert row.tolist() == rows
    assert [s.shape[1] for s in scores] == [3, 2]
    torch.testing.assert_close(torch.cat(scores, 1), torch.stack(wanted), rtol=1e-4, atol=1e-5)
