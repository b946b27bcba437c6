"""A small Stable Diffusion of a folder of captioned images, at a size for seconds."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file

from dmd import teach_folder, teach_miniature
from dmd.build import Workplace
from dmd.cli import evaluate, parts, sample, train
from dmd.data import prompts, shapes
from dmd.data.captioned import Captioned
from dmd.teach_folder import Folder, FolderOptions
from dmd.teach_miniature import MiniatureOptions
from dmd.teachers import miniature, stable_diffusion
from dmd.teachers.miniature import MiniatureConfig

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

DATA = Path(os.environ.get("DMD_TEST_DATA", "/nonexistent"))
TRAINING = MiniatureOptions(
    autoencoder_steps=2, autoencoder_batch_size=4, decoder_steps=1, text_steps=2, text_batch_size=8,
    steps=2, batch_size=4, samples=4, cpu=True,
    network=MiniatureConfig(
        vae_widths=(8, 8, 8, 8), unet_widths=(16, 16), text_width=16, text_layers=1, heads=2, tokens=77
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def place():
    return Workplace(Accelerator(cpu=True), None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    miniature.write_tokenizer(shapes.words(), 77, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty drawings and their captions as a folder."""
    folder = tmp_path_factory.mktemp("data")
    scenes = shapes.scenes(0, torch.arange(40))
    drawn = shapes.batch(scenes, 0, torch.arange(40))
    lines = []
    for i, (scene, image) in enumerate(zip(scenes, drawn, strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": shapes.caption(scene)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def captions(*texts):
    return Captioned(torch.arange(len(texts)).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8).to(torch.uint8), list(texts))


def test_every_image_comes_once_in_a_round_with_its_caption(tokenizer):
    texts = [f"picture {i}" for i in range(17)]
    world = Folder(captions(*texts), captions("x"), tokenizer, 5, 3)
    index = torch.arange(17, 34)
    numbers = ((world.images(index)[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert sorted(numbers) == list(range(17)) and numbers != list(range(17))
    assert world.captions(index) == [texts[i] for i in numbers]
    assert torch.equal(world.images(index - 17), world.images(index))


def test_answers_are_the_commonest_words_of_a_caption(tokenizer):
    world = Folder(captions("Red hat, red!", "a red dog", "a blue hat", "a"), captions("x"), tokenizer, 3, 0)
    assert set(world.words) == {"red", "hat", "a"}
    assert world.questions == [2, 2, 2]
    for text, row in zip(world.captions(torch.arange(4)), world.answers(torch.arange(4)).tolist(), strict=True):
        plain = text.lower().replace(",", "").replace("!", "").split()
        assert row == [int(word in plain) for word in world.words]


def test_a_folder_becomes_a_pipeline_with_its_tokenizer(data, tokenizer, place, tmp_path):
    options = FolderOptions(str(data), str(tokenizer), 50, replace(TRAINING, output_dir=str(tmp_path / "t")))
    assert teach_folder.teach(options, place)
    assert "license" not in (tmp_path / "t" / "README.md").read_text()  # the images are the user's
    pipeline = stable_diffusion.load(tmp_path / "t")
    assert pipeline.text.length == 77
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "t" / "tokenizer" / name).read_bytes() == (tokenizer / name).read_bytes()
    card = json.loads((tmp_path / "t" / "card.json").read_text())
    # every twentieth image is unseen: numbers 19 and 39
    seen = [np.asarray(Image.open(data / f"{i}.png")).astype(np.float32) / 127.5 - 1 for i in (19, 39)]
    x = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2)
    with torch.no_grad():
        error = (pipeline.codec.decode(pipeline.codec.encode(x)) - x).square().mean().item()
    told = card["figures"]["unseen images through the autoencoder, PSNR in dB"]
    assert told == pytest.approx(10 * np.log10(4 / error), abs=0.01)
    shown = np.asarray(Image.open(tmp_path / "t" / "samples.png"))
    assert np.array_equal(shown[66:130, :64], np.asarray(Image.open(data / "19.png")))


def test_other_images_in_the_same_folder_are_refused(data, tokenizer, place, tmp_path, capsys):
    options = FolderOptions(str(data), str(tokenizer), 50, replace(TRAINING, output_dir=str(tmp_path / "t")))
    world = Folder(captions("a", "b"), captions("x"), tokenizer, 5, 0)
    teach_miniature._open(tmp_path / "t" / "stages", options.training, world)
    with pytest.raises(teach_miniature.InputError, match="was begun with images ="):
        teach_folder.teach(options, place)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--data", "nowhere"], "nowhere/metadata.jsonl does not exist"),
        (["--tokenizer", "nowhere"], "nowhere holds no readable CLIP tokenizer"),
        (["--autoencoder-batch-size", "three"], "three"),
    ],
)
def test_wrong_input_is_answered_by_a_sentence(data, tokenizer, change, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"--data": str(data), "--tokenizer": str(tokenizer), "--output-dir": str(tmp_path / "t")}
    given |= dict([change])
    with pytest.raises(SystemExit) as stop:
        parts.teach(["folder", *(word for pair in given.items() for word in pair), "--cpu"], "dmd teach")
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and sentence in error


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "emoji64").is_dir(), reason="DMD_TEST_DATA does not name a folder of real data")
def test_emoji_with_the_real_tokenizer(place, tmp_path):
    """The whole path on real pictures: the autoencoder gets nearer to unseen ones within a minute's teaching, the
    preset distils what was taught, and the student draws every held-out caption."""
    import subprocess
    import sys

    from torchvision.models import resnet18

    subprocess.run([sys.executable, DATA / "unpack.py", "emoji64", tmp_path / "emoji"], check=True)
    figures = []
    for steps in (5, 150):
        training = replace(
            TRAINING, output_dir=str(tmp_path / f"t{steps}"), autoencoder_steps=steps, autoencoder_batch_size=16,
            autoencoder_lr=2e-3, text_batch_size=32,
        )  # fmt: skip
        options = FolderOptions(str(tmp_path / "emoji"), str(DATA / "clip-tokenizer" / "hf"), 100, training)
        assert teach_folder.teach(options, place)
        card = json.loads((tmp_path / f"t{steps}" / "card.json").read_text())
        figures.append(card["figures"]["unseen images through the autoencoder, PSNR in dB"])
    assert figures[1] > figures[0] + 3

    run = tmp_path / "run"
    few = "--pairs 8 --pair-shard-size 4 --teacher-steps 2 --max-train-steps 2 --batch-size 4 --pair-batch-size 4"
    few += " --eval-every 2 --eval-samples 16 --final-samples 16 --mixed-precision no --report-to none --cpu"
    where = ["--teacher", str(tmp_path / "t150"), "--prompts", str(tmp_path / "emoji" / "train")]
    test = str(tmp_path / "emoji" / "test")
    where += ["--test-prompts", test, "--output-dir", str(run), "--cache-dir", str(tmp_path / "cache")]
    train.main(["emoji", *few.split(), *where])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["generator_updates"] == 2
    assert summary["prompts"] == 4 * prompts.read(test).texts[:4]  # each of them four times, in turn

    network = ["--network", "torchvision:resnet18", "--weights", str(tmp_path / "resnet.safetensors")]
    save_file(resnet18().state_dict(), tmp_path / "resnet.safetensors")
    against = ["--reference", test, "--bootstrap", "0", "--samples", "8", "--steps", "2", "--cpu"]
    evaluate.main([str(run), "--teacher", *against, *network, "--out", str(tmp_path / "evaluation")])
    measured = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert measured["reference"]["samples"] == 593
    assert [r["figures"].keys() >= {"FD-resnet18", "diversity"} for r in measured["results"]] == [True, True]

    unseen = ["--prompts", test, "--seeds", "0", "--out", str(tmp_path / "out")]
    sample.main([*unseen, "--student", str(run / "student"), "--no-grid", "--device", "cpu"])
    told = [json.loads(line) for line in (tmp_path / "emoji" / "test" / "metadata.jsonl").read_text().splitlines()]
    found = []
    for file in sorted((tmp_path / "out").iterdir()):
        with Image.open(file) as image:
            assert image.size == (64, 64)
            found.append(image.text["prompt"])
    assert len(found) == 593 and found == [line["text"] for line in told]
