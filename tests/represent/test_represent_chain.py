"""`dmd represent` from end to end, at a size for seconds: all methods, export, resume, and bad input in a sentence."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import two_processes
from PIL import Image

from dmd.cli import parts
from dmd.cli import represent as cli
from dmd.data import shapes
from dmd.errors import InputError
from dmd.log import read_jsonl
from dmd.plots import show
from dmd.represent import chain as chains
from dmd.represent import config as options
from dmd.represent.backbones import load_backbone
from dmd.represent.chain import shape_captions
from dmd.represent.config import METHODS, preset
from dmd.represent.text import load_text

ROOT = Path(__file__).parents[2]
TINY = [
    "--captions-per-batch", "8", "--per-caption", "2", "--max-train-steps", "3", "--log-every", "1",
    "--head-hidden", "16", "--head-width", "8", "--text-width", "16", "--text-layers", "1", "--text-heads", "2",
    "--embedding", "8", "--prototypes", "16", "--ibot-hidden", "16", "--ibot-bottleneck", "8",
    "--probe", "None", "--report-to", "none", "--cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Drawings of a dozen captions, two of each, as a folder with metadata.jsonl, and the captions' file."""
    folder = tmp_path_factory.mktemp("pictures")
    scenes = shapes.scenes(0, torch.arange(12))
    lines = []
    for r in range(2):
        for i, image in enumerate(shapes.batch(scenes, 0, torch.arange(12) + 12 * r)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}-{r}.png")
            lines.append({"file_name": f"{i}-{r}.png", "text": shapes.caption(scenes[i])})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(method, folder, pictures, *more, size=("--image-size", "16")):
    argv = [method, "shapes", "--data", str(pictures), "--output-dir", str(folder), *TINY, *size]
    if method == "synclr":
        argv += ["--patch-size", "8", "--local-size", "8"]
    if method in ("simclr", "clip", "supervised"):
        argv += ["--per-caption", "1"]
    cli.represent([*argv, *more], "dmd represent")
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_backbone_that_timm_loads(tmp_path, pictures, method):
    folder = run(method, tmp_path / "run", pictures)
    summary = json.loads((folder / "summary.json").read_text())
    images = 8 if method in ("simclr", "clip", "supervised") else 16
    assert summary["method"] == method and summary["updates"] == 3 and summary["images_seen"] == 3 * images
    crops = {"simclr": 2, "synclr": 3}.get(method, 1)  # of synclr, one whole and two small ones
    assert summary["views_seen"] == 3 * images * crops
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3] and all(v == v for r in rows for v in r.values())
    net = load_backbone(folder / "backbone")
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    theirs = timm.create_model(f"local-dir:{folder / 'backbone'}", pretrained=True).eval()
    torch.testing.assert_close(theirs(net.standardised(x)), net(x))
    assert net.config.method == method
    assert (folder / "samples" / "views.png").is_file() and (folder / "text").is_dir() == (method in options.WITH_TEXT)


def test_image_files_of_unequal_sizes_are_enough(tmp_path):
    """Class folders with a class too small for m, and for simclr files without any."""
    generator = np.random.default_rng(0)
    for i in range(17):
        folder = tmp_path / "data" / ("once" if i == 16 else "ab"[i % 2])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (12 + i, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    folder = run("stablerep", tmp_path / "run", tmp_path / "data")
    assert json.loads((folder / "summary.json").read_text())["captions"] == 2
    folder = run("supervised", tmp_path / "classes", tmp_path / "data", "--per-caption", "2")
    assert json.loads((folder / "summary.json").read_text())["captions"] == 2
    folder = run("simclr", tmp_path / "alone", tmp_path / "data" / "a")
    assert json.loads((folder / "summary.json").read_text())["captions"] == 8


def test_the_text_tower_is_exported_with_its_words(tmp_path, pictures):
    folder = run("clip", tmp_path / "run", pictures)
    words, net = load_text(folder / "text"), load_backbone(folder / "backbone")
    prompts = ["a red circle", "a blue square at the left"]
    embedded = words(prompts)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(2))
    images = words.project(net(torch.rand(3, 3, 16, 16)))
    assert (images @ embedded.T).abs().max() <= 1.0001 and 1 <= words.scale <= 100
    torch.testing.assert_close(words(prompts[1:])[0], embedded[1])
    assert len(words.tokenizer("circle").input_ids) == 3  # begin, one token, end
    with pytest.raises(InputError, match="features have 3 numbers, but the text tower"):
        words.project(torch.zeros(1, 3))
    with pytest.raises(InputError, match="is no text tower"):
        load_text(folder / "backbone")


@pytest.mark.parametrize("method", ["stablerep-plus", "synclr"])
def test_stopping_and_going_on_gives_the_same_backbone(tmp_path, pictures, method, monkeypatch):
    more = ("--checkpointing-steps", "1")
    whole = load_backbone(run(method, tmp_path / "whole", pictures, *more) / "backbone").state_dict()
    real = chains.Run.train
    stops = [1, 2]

    def stopped(self):
        if stops:
            limit, at = stops.pop(0), self.batch_at
            self.batch_at = lambda step: (self._request_stop() if step + 1 == limit else None, at(step))[1]
        return real(self)

    monkeypatch.setattr(chains.Run, "train", stopped)
    for _ in range(2):
        run(method, tmp_path / "parts", pictures, *more)
        assert not (tmp_path / "parts" / "backbone").exists()
    (tmp_path / "parts" / "elapsed.json").write_text('{"seconds": 1000}')  # of the starts before
    run(method, tmp_path / "parts", pictures, *more)
    assert 1000 < json.loads((tmp_path / "parts" / "summary.json").read_text())["wall_seconds"] < 1100
    again = load_backbone(tmp_path / "parts" / "backbone").state_dict()
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    seen = [{k: v for k, v in r.items() if k != "seconds"} for r in read_jsonl(tmp_path / "parts" / "metrics.jsonl")]
    assert seen == [
        {k: v for k, v in r.items() if k != "seconds"} for r in read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    ]


SHIPPED = ["--caption-count", "8", "--replicas", "2", "--synthesis-batch-size", "8"]


def test_online_takes_the_place_of_a_presets_data():
    """As the documented command says it; what the user gives beside it is refused."""
    found = cli.parse(["stablerep", "gpu", "--online"], "dmd represent").config
    assert found.data.data is None and replace(found.data, data="data/synthetic", online=False) == (
        preset("stablerep", "gpu").data
    )


def test_another_process_makes_the_images_that_this_one_would(tmp_path):
    """With a student on the CPU: the same learner, step by step."""
    rows = []
    for workers in ("0", "1"):
        folder = tmp_path / workers
        argv = ["stablerep", "--online", "--workers", workers, "--output-dir", str(folder), "--image-size", "32"]
        cli.represent([*argv, *TINY, *SHIPPED], "dmd represent")
        rows.append([r["loss/contrast"] for r in read_jsonl(folder / "metrics.jsonl")])
    assert len(rows[0]) == 3 and rows[0] == pytest.approx(rows[1], rel=1e-3)  # images round alike but for threads


@pytest.mark.parametrize("online", [False, True])
def test_the_shipped_student_supplies_the_images(tmp_path, online):
    """Made first and stored, or made as they are looked at; what was stored can be given, with its captions only."""
    argv = [
        "stablerep", "--output-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache"), *TINY, *SHIPPED,
        *(["--online"] if online else []), "--max-train-steps", "2", "--image-size", "32",
    ]  # fmt: skip
    cli.represent(argv, "dmd represent")
    views = Image.open(tmp_path / "run" / "samples" / "views.png")
    assert views.getextrema() != ((128, 128),) * 3
    stored = list((tmp_path / "cache").glob("synthetic/*/manifest.json"))
    assert len(stored) == (0 if online else 1)
    if online:
        return
    spec = json.loads(stored[0].read_text())["spec"]
    assert (spec["count"], spec["replicas"]) == (8, 2)
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(shape_captions(0, 8)))
    data = ["--data", str(stored[0].parent), "--captions", str(captions), "--output-dir", str(tmp_path / "given")]
    cli.represent(["stablerep", *data, *TINY, "--max-train-steps", "1", "--image-size", "32"], "dmd represent")
    captions.write_text("one caption\nand another\n")
    with pytest.raises(InputError, match="holds images of other captions than those of --captions"):
        cli.represent(["stablerep", *data, "--fresh", *TINY], "dmd represent")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_command_in_two_processes_is_the_command_in_one(tmp_path, pictures):
    """Losses, and the backbone: sums of two halves round differently, and nothing else differs."""
    one = run("stablerep", tmp_path / "one", pictures)
    argv = ["stablerep", "shapes", "--data", str(pictures), "--output-dir", str(tmp_path / "two"), *TINY]
    done = two_processes.run(["-m", "dmd", "represent", *argv, "--image-size", "16"])
    assert done.returncode == 0, done.stderr
    rows = [read_jsonl(folder / "metrics.jsonl") for folder in (one, tmp_path / "two")]
    for a, b in zip(*rows, strict=True):
        assert b["loss/contrast"] == pytest.approx(a["loss/contrast"], rel=1e-4) and a["dropped"] == b["dropped"] == 0
    first, second = rows[0][0], rows[1][0]  # before any update
    for name in ("loss/contrast", "excess", "grad/net"):
        assert second[name] == pytest.approx(first[name], rel=1e-5)
    whole, halves = (load_backbone(folder / "backbone").state_dict() for folder in (one, tmp_path / "two"))
    for name, value in whole.items():
        if value.is_floating_point():
            assert (value - halves[name]).abs().mean() < 1e-3 * value.abs().mean() + 1e-5, name


def test_a_run_is_resumed_with_the_same_images_only(tmp_path, pictures):
    folder = run("stablerep", tmp_path / "run", pictures)
    other = tmp_path / "other"
    other.mkdir()
    for file in pictures.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    with open(other / "metadata.jsonl", "a") as file:
        for r in range(2):
            file.write(json.dumps({"file_name": f"0-{r}.png", "text": "one more"}) + "\n")
    with pytest.raises(InputError, match="holds a run with other images"):
        run("stablerep", folder, other)
    with pytest.raises(InputError, match="temperature was 0.1, now 0.2"):
        run("stablerep", folder, pictures, "--temperature", "0.2")
    with pytest.raises(InputError, match="method was 'stablerep', now 'simclr'"):
        run("simclr", folder, pictures)


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, pictures, capsys):
    alone = tmp_path / "alone"
    alone.mkdir()
    Image.new("RGB", (8, 8)).save(alone / "a.png")
    Image.new("RGB", (8, 8)).save(alone / "b.png")
    lines = [json.dumps({"file_name": f, "text": "a caption"}) for f in ("a.png", "b.png")]
    (alone / "metadata.jsonl").write_text("\n".join(lines))
    one = tmp_path / "one.txt"
    one.write_text("a caption\na caption\n")
    out = tmp_path / "run"

    def refused(sentence, method, *more, data=pictures, size=("--image-size", "16")):
        with pytest.raises(InputError, match=sentence):
            run(method, out, data, *more, size=size)

    refused("images of one caption only", "stablerep", data=alone)
    refused("--per-caption asks for 3", "stablerep", "--per-caption", "3")
    refused("--image-size is 20, which patches of 8 pixels do not divide", "synclr", size=("--image-size", "20"))
    refused("20 x 20 pixels cannot be cut into patches of 16 x 16", "stablerep", "--backbone", "vit_mini",
            size=("--image-size", "20"))  # fmt: skip
    refused("synclr masks patches, which resnet_mini has none of", "synclr", "--backbone", "resnet_mini",
            "--patch-size", "None")  # fmt: skip
    refused("--patch-size 8 is for vision transformers, not resnet18", "stablerep", "--patch-size", "8")
    refused("timm makes no backbone 'resnet19'", "stablerep", "--backbone", "resnet19")
    refused("fewer than --captions-per-batch 64", "stablerep", "--captions-per-batch", "64")
    refused("--data .* has them: give one of both", "stablerep", "--online")
    refused("leaves every image without another", "stablerep", "--per-caption", "1")
    refused("there is no labelled set 'nowhere'", "stablerep", "--probe", "nowhere")
    refused("--temperature is 0", "simclr", "--temperature", "0")
    refused("images of one caption only", "supervised", data=alone)
    refused("--crops is 2: synclr has one whole crop of an image", "synclr", "--crops", "2")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for folder in (tmp_path / "classes" / name, *(tmp_path / "parts" / part / name for part in ("train", "test"))):
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    refused("the test part of --probe has the same images as the training part of --probe", "stablerep", "--probe",
            str(tmp_path / "classes"))  # fmt: skip
    refused("parts/train has images in colour, but the backbone takes grey ones", "stablerep", "--channels", "1",
            "--probe", str(tmp_path / "parts"), data="digits")  # fmt: skip
    refused("--crop-scale is 0.5 0.2", "simclr", "--crop-scale", "0.5", "0.2")
    refused("there is no method 'dino'", "dino")
    refused("--data .* does not say which captions it was made of", "stablerep", "--captions", str(one))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["stablerep", "--data", str(alone), *TINY, "--output-dir", str(out)])
    assert stopped.value.code == 2 and "images of one caption only" in capsys.readouterr().err
    argv = ["stablerep", *TINY, "--output-dir", str(out)]
    for more, sentence in (
        (["--captions", str(one)], "one caption only, 'a caption'"),
        (["--replicas", "1"], "--per-caption is 2, but --replicas makes 1"),
        (["--student", str(tmp_path / "none"), "--online"], "none"),
        (["--caption-count", "100000000"], "ask for at most half"),
    ):
        with pytest.raises(InputError, match=sentence):
            cli.represent([*argv, *more], "dmd represent")
    assert not out.exists()


def test_captions_of_shapes_are_different_and_begin_alike():
    few, many = shape_captions(3, 20), shape_captions(3, 300)
    assert len(set(many)) == 300 and many[:10] == few[:10]
    assert all(shapes.caption(shapes.parse(c)) == c for c in few)


def test_the_report_shows_what_the_files_hold(tmp_path, pictures):
    folder = run("stablerep-plus", tmp_path / "run", pictures)
    whole = (folder / "report.html").read_text()
    rows = read_jsonl(folder / "metrics.jsonl")
    for text in (
        "without --probe there are no figures", "preset shapes", "Contrast of images and texts", "Views",
        f"loss {show(rows[-1]['loss/text'])}", f"excess {show(rows[-1]['excess'])}", "images and texts 0",
    ):  # fmt: skip
        assert text in whole, text
    assert base64.b64encode((folder / "samples" / "views.png").read_bytes()).decode() in whole
    assert "Small crops" not in whole and "Probe" not in whole  # sections of what is not there
    summary = json.loads((folder / "summary.json").read_text())
    figures = {
        "kNN-20": {"value": 0.25, "low": 0.2, "high": 0.3},
        "<linear>": {"value": 0.5, "low": None, "high": None},
    }
    summary["probe"] = {"set": "shapes", "figures": figures}
    (folder / "summary.json").write_text(json.dumps(summary))
    parts.report([str(folder)], "dmd report")
    again = (folder / "report.html").read_text()
    assert "classify shapes: 25.0% by kNN-20" in again and "0.2 to 0.3" in again and "&lt;linear&gt;" in again
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").write_text("no JSON")
    parts.report([str(folder)], "dmd report")
    assert "is not finished: it has reached step 0 of 3" in (folder / "report.html").read_text()
