"""`dmd evaluate` from its command line to its files."""

import json
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from dmd import checkpoint
from dmd.cli.evaluate import EvaluateOptions, check, evaluate, main
from dmd.config import preset
from dmd.data import shapes
from dmd.data.images import digits, to_float
from dmd.errors import InputError
from dmd.metrics import networks
from dmd.metrics.evaluate import Reference
from dmd.metrics.evaluate import evaluate as figures_of
from dmd.metrics.networks import train_classifier
from dmd.settings import to_json
from dmd.teachers import pixel
from dmd.teachers.pixel import PixelConfig
from tests import tiny_clips


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    net = train_classifier(digits(), None, 0, folder, steps=10)
    return net, next(folder.iterdir())


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Two .npz files of digits, and the images of the second."""
    folder, images = tmp_path_factory.mktemp("halves"), digits()
    for name, index in (("a", torch.arange(300)), ("b", torch.arange(300, 500))):
        part = images.select(index)
        np.savez(folder / f"{name}.npz", images=part.images.permute(0, 2, 3, 1).numpy(), labels=part.labels.numpy())
    return folder / "a.npz", folder / "b.npz", images


def run(tmp_path, *what, **options):
    given = {"cache_dir": str(tmp_path / "cache"), "out": str(tmp_path / "out"), "cpu": True, "bootstrap": 0}
    evaluate(EvaluateOptions(tuple(map(str, what)), **(given | options)))
    return json.loads((tmp_path / "out" / "evaluation.json").read_text())


def values(result):
    return {name: figure["value"] for name, figure in result["figures"].items()}


def test_files_against_files(tmp_path, classifier, halves, capsys):
    net, folder = classifier
    a, b, images = halves
    found = run(tmp_path, b, a, reference=str(a), network=str(folder), bootstrap=20)
    fake = images.select(torch.arange(300, 500))
    theirs = figures_of(to_float(fake.images), fake.labels, net, Reference.of(images.select(torch.arange(300)), net))
    first, itself = found["results"]
    mine = values(first)
    assert mine["FD-SmallConvNet"] == pytest.approx(theirs["fd"], rel=1e-5)
    for name in ("precision", "recall", "density", "coverage", "diversity", "accuracy"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert values(itself)["FD-SmallConvNet"] < 1e-6
    assert (first["samples"], first["few_samples"]) == (200, True)
    assert found["network"]["name"] == "SmallConvNet" and found["seed"] == 0
    assert found["environment"]["commit"] and found["reference"]["samples"] == 300
    low, high = (first["figures"]["FD-SmallConvNet"][end] for end in ("low", "high"))
    assert high - low > 0.01 * mine["FD-SmallConvNet"]  # resamples differ
    printed = capsys.readouterr().out
    assert "FD-SmallConvNet (lower is better)" in printed and "200*" in printed
    assert "fewer than 10,000" in printed
    drawing = ElementTree.parse(tmp_path / "out" / "evaluation.svg").getroot()
    circles = drawing.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == sum(len(r["figures"]) for r in found["results"])


def save_run(folder, config, classes=10):
    """A run of a student that was never trained, with the summary that names its teacher."""
    net = PixelConfig(tuple(map(str, range(classes))), 1, 8, 8, (1, 2), 1, (False, True), 0.75)
    for name, seed in (("student", 0), ("teacher", 1)):
        pixel.save(pixel.build(net, seed).net.get_submodule("unet"), net, folder / name)
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    (folder / "summary.json").write_text(json.dumps({"teacher": {"folder": str(folder / "teacher")}}))
    return folder


def test_a_run_is_measured_as_it_measured_itself(tmp_path, monkeypatch, capsys):
    """The same noise, classes, network and reference as the comparison at the end of a run."""
    from dmd import build, evaluation, teachers
    from dmd.generate import student_generator

    monkeypatch.setattr(networks, "MIN_STEPS", 10)
    monkeypatch.setattr(networks, "MIN_EPOCHS", 0)
    config = preset("digits")
    config = replace(
        config,
        evaluation=replace(config.evaluation, final_samples=60),
        run=replace(config.run, cache_dir=str(tmp_path / "shared"), cpu=True),
        pairs=replace(config.pairs, teacher_steps=2),
    )
    folder = save_run(tmp_path / "run", config)
    found = run(tmp_path, folder, teacher=True)
    place = build.workplace(config)
    data = build.image_set(config)
    student = teachers.load(folder / "student")
    judge = build.judge(config, student, data, build.reference_set(config, data), student.classes, place)
    x, _ = judge.samples(student_generator(student.denoiser), 60, 0, "x")
    theirs = judge.figures(x)
    mine = values(found["results"][0])
    assert mine["FD-SmallConvNet"] == pytest.approx(theirs["fd"], rel=1e-5)
    for name in ("precision", "recall", "accuracy", "diversity"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
    names = [r["source"] for r in found["results"]]
    assert names == [f"{folder} (one step)", "teacher (2 steps of heun, guidance 1)"]
    teacher = teachers.load(folder / "teacher")
    generator, _ = build.many_step(config, build.guided(config, teacher), 2)
    x, _ = judge.samples(generator, 60, 0, "x")
    assert values(found["results"][1])["FD-SmallConvNet"] == pytest.approx(judge.figures(x)["fd"], rel=1e-5)
    assert evaluation.IN_LOOP_SEED > 60


def test_captions_of_drawings_are_read(tmp_path):
    index = torch.arange(8)
    scenes = shapes.scenes(3, index)
    rows = []
    (tmp_path / "images").mkdir()
    for i, (image, scene) in enumerate(zip(shapes.batch(scenes, 3, index), scenes, strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": shapes.caption(scene)}))
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(rows))
    found = run(tmp_path, tmp_path / "images", read_captions=True)
    assert values(found["results"][0])["caption_agreement"] == 1.0
    assert found["network"] is None and found["reference"] is None


def test_coco_s_name_is_not_that_of_any_images(tmp_path, monkeypatch):
    """With a stand-in for Inception: the label, and what is said of all that differs."""
    from torch import nn

    from dmd.metrics import backbones
    from dmd.metrics.backbones import Extractor
    from dmd.metrics.protocols import bicubic

    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 3))
    monkeypatch.setattr(backbones, "load", lambda *a: Extractor("Inception-v3", "FID", bicubic(8, 8), net, "bicubic"))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", images=rng.integers(0, 256, (6, 20, 30, 3), dtype=np.uint8))
    found = run(tmp_path, tmp_path / "a.npz", reference=str(tmp_path / "a.npz"), protocol="coco30k")
    (result,) = found["results"]
    assert {"FID-COCO", "KID-COCO"} <= set(result["figures"]) and "FID-COCO30k" not in result["figures"]
    assert result["figures"]["FID-COCO"]["value"] < 1e-6
    notes = " ".join(result["notes"])
    for words in ("30,000 images, and these are 6", "512x512", "captions that nothing tells", "this reference has 6"):
        assert words in notes
    assert "Lanczos" in found["protocol"]["text"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "FID-COCO30k"),
        ({"count": 29_999}, "FID-COCO"),
        ({"sizes": {(512, 512): 29_999, (512, 511): 1}}, "FID-COCO"),
        ({"different": 28_999}, "FID-COCO"),
        ({"different": 0}, "FID-COCO"),
        ({"photographs": 40_503}, "FID-COCO"),
    ],
)
def test_coco_s_name_needs_its_count_size_captions_and_photographs(change, name):
    from collections import Counter

    from dmd.cli import evaluate as command
    from dmd.metrics.assess import Census
    from dmd.metrics.backbones import Extractor
    from dmd.metrics.protocols import COCO_30K, bicubic
    from dmd.metrics.sources import Arrays

    with_ = {"count": 30_000, "sizes": {(512, 512): 30_000}, "different": 29_500, "photographs": 40_504} | change
    captions = tuple(f"caption {i % with_['different']}" for i in range(with_["count"])) if with_["different"] else None
    source = Arrays("a", np.zeros((with_["count"], 1, 1, 1), dtype=np.uint8), None, captions)
    extractor = Extractor("Inception-v3", "FID", bicubic(8, 8), torch.nn.Identity(), "bicubic")
    reference = SimpleNamespace(count=with_["photographs"])
    assert command._label(extractor, COCO_30K, source, Census(Counter(with_["sizes"])), reference) == name


def test_drawings_of_shapes_have_their_captions(tmp_path, monkeypatch):
    """Those of the scenes that are drawn, so the reader finds all that they say."""
    from dmd import build

    monkeypatch.setattr(build, "SHAPES_TAUGHT", 60)
    monkeypatch.setattr(build, "SHAPES_IMAGES", 40)
    (result,) = run(tmp_path, "shapes", read_captions=True)["results"]
    assert values(result)["caption_agreement"] > 0.97 and result["samples"] == 40


def test_images_are_scored_against_their_captions_by_a_clip_of_open_clip(tmp_path):
    """Against the cosines of open_clip's own functions; the result says which CLIP it was."""
    import open_clip

    folder, shown = tiny_clips.of_open_clip(tmp_path / "tiny"), tmp_path / "shown"
    shown.mkdir()
    lines, images, captions = [], [], ["red", "a ball", "two", "red red"]
    for number, text in enumerate(captions):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        images.append(Image.fromarray(pixels))
        images[-1].save(shown / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (shown / "metadata.jsonl").write_text("\n".join(lines))
    found = run(tmp_path, shown, clip=f"open_clip:{folder}", clip_prefix="A ")
    net, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([f"A {text}" for text in captions])
    with torch.no_grad():
        a, b = net.eval()(torch.stack([prepare(image) for image in images]), tokens)[:2]
    assert values(found["results"][0])["CLIP"] == pytest.approx((a * b).sum(1).mean().item(), abs=1e-5)
    assert found["clip"] == {"name": "CLIP-tiny", "weights": checkpoint.digest(net), "prefix": "A "}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"what": ()}, "what should be measured"),
        ({"samples": 3}, "--samples is 3: at least 4"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"bootstrap": 1}, "--bootstrap is 1: it must be 0, or at least 2"),
        ({"seed": -1}, "--seed is -1"),
        ({"protocol": "clean-fid", "network": "inception"}, "leave out --network"),
        ({"weights": "x"}, "--weights are for"),
        ({"clip_prefix": "A "}, "is for --clip"),
    ],
)
def test_options_are_checked_first(options, sentence):
    with pytest.raises(InputError, match=sentence):
        check(EvaluateOptions(**({"what": ("x",)} | options)))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "nothing does not exist"),
        (["owner/name"], "owner/name does not exist: give a run, a folder or images; a hub id needs --steps"),
        (["EMPTY", "--reference", "A"], "EMPTY holds no image"),
        (["ONE", "--reference", "A", "--network", "NET"], "ONE holds 1 image: at least 4 are needed"),
        (["B", "--reference", "ONE", "--network", "NET"], "ONE holds 1 image: at least 4 are needed"),
        (["B", "--reference", "A"], "by which network"),
        (["B"], "there is nothing to measure by"),
        (["B", "--network", "NET"], "--reference is missing"),
        (["B", "--reference", "A", "--protocol", "clean-fid"], "FID needs inception-2015-12-05.pt"),
        (["B", "--reference", "A", "--protocol", "clean-fid", "--weights", "A"], "is not inception-2015-12-05.pt"),
        (["B", "--reference", "A", "--network", "NET", "--samples", "201"], "--samples 201 are more than there are"),
        (["B", "--teacher"], "is no network, so it has no teacher"),
        (["B", "--read-captions"], "has no captions"),
        (["BROKEN", "--reference", "A", "--network", "NET"], "x.jpg is not a readable 8-bit image"),
        (["COLOUR", "--reference", "A", "--network", "NET"], "in colour, but FD-SmallConvNet takes grey"),
        (["PIXEL", "--reference", "A", "--network", "NET"], "say its --steps"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    tmp_path, monkeypatch, capsys, classifier, halves, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    for name, size in (("ONE", (8, 8)), ("COLOUR", (8, 8, 3)), ("BROKEN", (8, 8))):
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    (tmp_path / "BROKEN" / "x.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    if "PIXEL" in arguments:
        save_run(tmp_path / "made", preset("digits"))
        (tmp_path / "made" / "teacher").rename(tmp_path / "PIXEL")
    places = {"A": str(halves[0]), "B": str(halves[1]), "NET": str(classifier[1])}
    argv = [places.get(word, word) for word in arguments]
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--cpu", "--out", "out", "--cache-dir", "cache", "--bootstrap", "0"])
    assert stop.value.code == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error: ") and sentence in printed
    assert not (tmp_path / "out").exists()
