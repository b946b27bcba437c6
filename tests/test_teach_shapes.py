"""`dmd teach shapes`, at a size for seconds: it resumes, its card tells the truth, and its latents have unit scale."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from dmd import teach_miniature, teach_shapes
from dmd.build import Workplace
from dmd.data import shapes
from dmd.errors import InputError
from dmd.metrics import caption
from dmd.teach_miniature import MiniatureOptions
from dmd.teach_shapes import Shapes, ShapesOptions
from dmd.teachers import stable_diffusion
from dmd.teachers.miniature import MiniatureConfig

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TRAINING = MiniatureOptions(
    autoencoder_steps=4, autoencoder_batch_size=4, decoder_steps=3, text_steps=3, text_batch_size=8,
    steps=4, batch_size=8, samples=8, cpu=True,
    network=MiniatureConfig(vae_widths=(8, 8, 8, 8), unet_widths=(16, 16), text_width=16, text_layers=1, heads=2),
)  # fmt: skip


def options(folder, **changes):
    return ShapesOptions(64, replace(TRAINING, output_dir=str(folder), **changes))


WORLD = Shapes(0, 64)


@pytest.fixture(scope="module")
def place():
    return Workplace(Accelerator(cpu=True), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, place):
    folder = tmp_path_factory.mktemp("taught") / "teacher"
    assert teach_shapes.teach(options(folder), place)
    return folder


def test_the_card_tells_sizes_checksums_and_figures(folder):
    card = json.loads((folder / "card.json").read_text())
    assert set(card["files"]) == {
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }  # fmt: skip
    text = (folder / "README.md").read_text()
    for name, facts in card["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"]
        assert facts["sha256"] in text
    pipeline = stable_diffusion.load(folder)
    index = torch.arange(teach_shapes.UNSEEN, teach_shapes.UNSEEN + 8)
    images, scenes = WORLD.images(index), WORLD.scenes(index)
    with torch.no_grad():
        rebuilt = pipeline.codec.decode(pipeline.codec.encode(images))
    figures = card["figures"]
    agreement = caption.agreement(rebuilt, scenes)["agreement"]
    assert figures["drawings through the autoencoder, agreement"] == pytest.approx(agreement)
    assert figures["drawings through the autoencoder, PSNR in dB"] == pytest.approx(
        10 * torch.log10(4 / (rebuilt - images).square().mean()).item(), abs=1e-3
    )


def test_latents_have_unit_scale(folder):
    raw = load_file(folder / "stages" / "latents.safetensors")["latents"]
    pipeline = stable_diffusion.load(folder)
    images = WORLD.images(torch.arange(64))
    with torch.no_grad():
        latents = pipeline.codec.encode(images)
    assert latents.std().item() == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close(latents, raw / raw.std(), rtol=0, atol=0.05)  # weights are rounded to float16


def test_a_stopped_command_goes_on_to_the_same_end(folder, place, tmp_path, monkeypatch):
    """Killed in all four trainings; equal weights to the last bit."""
    again = options(tmp_path / "again")
    whole, steps = teach_miniature.Run._step, []

    class Kill(BaseException):
        pass

    def killed(run, step):
        steps.append(step)
        if len(steps) in (3, 6, 11, 15):
            raise Kill
        whole(run, step)

    monkeypatch.setattr(teach_miniature.Run, "_step", killed)
    for _ in range(4):
        with pytest.raises(Kill):
            teach_shapes.teach(again, place)
    assert teach_shapes.teach(again, place)
    for name in json.loads((folder / "card.json").read_text())["files"]:
        a, b = load_file(folder / name), load_file(tmp_path / "again" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name


def test_the_decoder_goes_on_by_itself(folder):
    """It moves, and the encoder, whose latents the denoiser has learnt, does not."""
    newest = [max((folder / "stages" / s / "checkpoints").iterdir()) for s in ("autoencoder", "decoder")]
    before, after = (load_file(path / "ema.safetensors") for path in newest)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_other_options_are_refused(folder, place):
    with pytest.raises(InputError, match=r"was begun with lr = 0.001, now 0.5: give another --output-dir"):
        teach_shapes.teach(options(folder, lr=0.5), place)


def test_teaching_and_judging_share_no_drawing():
    """Indices that judge lie beyond all that can be taught from."""
    o = ShapesOptions()
    last = max(
        (o.training.autoencoder_steps + o.training.decoder_steps) * o.training.autoencoder_batch_size, o.drawings
    )
    assert last < teach_shapes.UNSEEN
    taught = {shapes.caption(s) for s in shapes.scenes(0, torch.arange(200))}
    unseen = {shapes.caption(s) for s in shapes.scenes(0, torch.arange(teach_shapes.UNSEEN, teach_shapes.UNSEEN + 200))}
    assert len(taught & unseen) < 20


def test_the_text_encoder_learns_what_captions_say(tmp_path, place):
    """All sixteen answers about a caption at once, which chance gets right once in a thousand million."""
    network = replace(TRAINING.network, text_width=64, text_layers=2)
    training = replace(TRAINING, text_steps=150, text_batch_size=128, text_lr=3e-3, network=network)
    count = WORLD.write_tokenizer(network.tokens, tmp_path / "tokenizer")
    tokenizer = stable_diffusion.tokenizer(tmp_path / "tokenizer")
    teach_miniature._text(training, WORLD, place, tokenizer, count, tmp_path / "text")
    lines = [json.loads(line) for line in (tmp_path / "text" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["right"] > 0.2
