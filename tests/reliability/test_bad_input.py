"""Wrong input: one sentence on stderr, exit code 2, nothing written and nothing lost."""

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dmd import checkpoint
from dmd.cli import sample, train
from dmd.teachers import pixel


def copied(source, target):
    shutil.copytree(source, target)
    return target


def save_npz(folder, **changes):
    """train.npz and test.npz, right but for `changes` in train.npz."""
    folder.mkdir()
    good = {"images": np.zeros((24, 8, 8, 1), np.uint8), "labels": np.arange(24) % 3, "class_names": np.array([*"abc"])}
    np.savez(folder / "test.npz", **good)
    np.savez(folder / "train.npz", **{k: v for k, v in (good | changes).items() if v is not None})


def class_folders(folder):
    for split in ("train", "test"):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / split / name / "1.png")


def damaged_png(folder):
    class_folders(folder)
    file = folder / "train" / "b" / "1.png"
    file.write_bytes(file.read_bytes()[:40])


def text_file(folder):
    class_folders(folder)
    (folder / "train" / "a" / "notes.txt").write_text("hello")


DATA = {
    "missing folder": (lambda f: None, r"data does not exist: give an .npz file or a folder"),
    "empty folder": (lambda f: f.mkdir(), r"data is empty: it must hold train.npz"),
    "larger images": (lambda f: save_npz(f, images=np.zeros((24, 9, 9, 1), np.uint8)), r"9 x 9 pixels: --size 8"),
    "colour": (
        lambda f: save_npz(f, images=np.arange(24 * 192, dtype=np.uint8).reshape(24, 8, 8, 3)),
        r"train.npz: images are in colour, but 1 channel",
    ),
    "floats": (lambda f: save_npz(f, images=np.zeros((24, 8, 8, 1))), r"train.npz: images must be uint8.*not float64"),
    "no channel axis": (lambda f: save_npz(f, images=np.zeros((24, 8, 8), np.uint8)), r"must be uint8 \(N, H, W, 1"),
    "label out of range": (lambda f: save_npz(f, labels=np.arange(24)), r"train.npz: label 3 is not in 0 to 2"),
    "negative label": (lambda f: save_npz(f, labels=np.arange(24) - 1), r"train.npz: label -1 is not in 0 to 2"),
    "labels that are no integers": (
        lambda f: save_npz(f, labels=np.arange(24) / 8),
        r"train.npz: labels must be integers, not float64",
    ),
    "no labels": (lambda f: save_npz(f, labels=None), r"train.npz lacks 'labels'"),
    "pickled arrays": (lambda f: save_npz(f, labels=np.array([{}] * 24, object)), r"train.npz is not a readable"),
    "other classes to test": (
        lambda f: save_npz(f, class_names=np.array([*"xyz"])),
        r"test images of .* have the classes a, b, c, but the train images have x, y, z",
    ),
    "no test images": (lambda f: (save_npz(f), (f / "test.npz").unlink()), r"test.npz does not exist"),
    "text file in a class folder": (text_file, r"notes.txt is not an image: class folders hold only .png"),
    "damaged png": (damaged_png, r"b.1.png is not a readable 8-bit image"),
}


@pytest.mark.parametrize("name", DATA)
def test_wrong_data_are_refused_before_anything_is_written(world, refused, tmp_path, name):
    spoil, sentence = DATA[name]
    spoil(tmp_path / "data")
    out = tmp_path / "run"
    flags = world.flags(out, "--data", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "cache"))
    assert re.search(sentence, refused(train.main, flags, out, tmp_path / "cache", tmp_path))


def rewrite(folder, **changes):
    file = folder / "config.json"
    raw = {k: v for k, v in (json.loads(file.read_text()) | changes).items() if v != "absent"}
    file.write_text(json.dumps(raw))


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


TEACHERS = {
    "missing folder": (shutil.rmtree, r"teacher is no folder, and no id on the hub"),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        r"has neither model_index.json, .* nor the config.json of a pixel",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model.safetensors does not exist"),
    "unknown key": (lambda f: rewrite(f, wdith=8), r"config.json has the unknown key 'wdith': known are .*width"),
    "missing key": (lambda f: rewrite(f, width="absent"), r"config.json is incomplete: .*'width'"),
    "text for a number": (lambda f: rewrite(f, width="wide"), r"config.json describes no network that can be built"),
    "another kind": (lambda f: rewrite(f, kind="latent"), r"kind 'latent': this command reads 'pixel'"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), r"config.json is not a JSON object"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), r"config.json is not a JSON object"),
    "another architecture": (lambda f: rewrite(f, width=12), r"safetensors belongs to another architecture: tensor"),
    "other image size": (lambda f: rewrite(f, size=16), r"makes images of 1 x 16 x 16, but those of .* have 1 x 8 x 8"),
    "pickled weights": (
        lambda f: torch.save({"weight": Payload()}, f / "model.safetensors"),
        r"model.safetensors is not a readable safetensors file",
    ),
    "truncated weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        r"model.safetensors is not a readable safetensors file",
    ),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(world, refused, tmp_path, monkeypatch, name):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "executed"))
    spoil, sentence = TEACHERS[name]
    teacher = copied(world.teacher, tmp_path / "teacher")
    spoil(teacher)
    flags = world.flags(tmp_path / "run", "--teacher", str(teacher))
    assert re.search(sentence, refused(train.main, flags, tmp_path, world.root / "cache"))
    if teacher.exists():
        flags = ["--student", str(teacher), "--out", str(tmp_path / "out"), "--device", "cpu"]
        if name != "other image size":  # a student of any size can be sampled
            assert re.search(sentence, refused(sample.main, flags, tmp_path))
    assert not (tmp_path / "executed").exists()


def other_architecture(run):
    """The newest checkpoint is whole, but of a wider network."""
    newest = checkpoint.latest(run / "checkpoints")
    wide = pixel.PixelConfig(("a", "b", "c"), 1, 8, 16, (1,), 1, (False,))
    net = pixel.build(wide).net
    for name in ("student", "fake", "ema"):
        checkpoint.save_weights(net, newest / f"{name}.safetensors")
    files = [p for p in sorted(newest.iterdir()) if p.name != "manifest.json"]
    checkpoint.write_json(newest / "manifest.json", {"files": {p.name: checkpoint.describe(p) for p in files}})


RUNS = {
    "a changed learning rate": (
        lambda f: None,
        ["--learning-rate", "0.5"],
        r"holds another run \(learning_rate was 0.002, now 0.5\): give another --output-dir, or start over with --fre",
    ),
    "a changed seed": (lambda f: None, ["--seed", "9"], r"holds another run \(seed was 0, now 9\)"),
    "an unknown key": (
        lambda f: rewrite(f, speed=3),
        [],
        r"run.config.json has the unknown key 'speed': Config knows preset, data",
    ),
    "a number for a group": (lambda f: rewrite(f, distill=3), [], r"run.config.json has 3 where an object is due"),
    "a config that is not JSON": (
        lambda f: (f / "config.json").write_text('{"preset": "dig'),
        [],
        r"run.config.json is not valid JSON: restore it, or start over with --fresh",
    ),
    "someone's files": (
        lambda f: (shutil.rmtree(f), f.mkdir(), (f / "thesis.tex").write_text("x")),
        [],
        r"run is not empty and not a run directory of dmd train: give another --output-dir",
    ),
    "a teacher": (
        lambda f: (shutil.rmtree(f / "student" / "..", ignore_errors=True), f.mkdir(exist_ok=True), a_model(f)),
        [],
        r"run is not empty and not a run directory of dmd train: give another --output-dir",
    ),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), [], r"run is a file: give a folder as --output-dir"),
}


def a_model(folder):
    (folder / "config.json").write_text('{"kind": "pixel"}')
    (folder / "model.safetensors").write_bytes(b"precious")


@pytest.mark.parametrize("name", RUNS)
def test_an_output_folder_of_something_else_is_refused_and_left_alone(world, refused, tmp_path, name):
    spoil, more, sentence = RUNS[name]
    run = copied(world.reference, tmp_path / "run")
    spoil(run)
    assert re.search(sentence, refused(train.main, world.flags(run, *more), tmp_path, world.root))


@pytest.mark.parametrize("name", ["someone's files", "a teacher", "a file"])
def test_fresh_deletes_nothing_but_runs(world, refused, tmp_path, name):
    spoil, _, sentence = RUNS[name]
    run = copied(world.reference, tmp_path / "run")
    spoil(run)
    assert re.search(sentence, refused(train.main, world.flags(run, "--fresh"), tmp_path))


@pytest.mark.parametrize(
    "spoil", [lambda f: None, lambda f: (f / "config.json").write_text("{")], ids=["run", "damaged"]
)
def test_fresh_starts_a_run_over_and_keeps_other_files(world, tmp_path, spoil):
    run = copied(world.reference, tmp_path / "run")
    spoil(run)
    (run / "notes.txt").write_text("mine")
    (run / "checkpoints" / "step-00000099").mkdir()
    train.main(world.flags(run, "--fresh"))
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "checkpoints" / "step-00000099").exists()
    assert world.outcome(run) == world.outcome(world.reference)


def test_fresh_deletes_nothing_if_the_input_is_refused(world, refused, tmp_path):
    run = copied(world.reference, tmp_path / "run")
    flags = world.flags(run, "--fresh", "--data", str(tmp_path / "nowhere"))
    assert "nowhere does not exist" in refused(train.main, flags, run)


def test_a_checkpoint_of_another_architecture_is_refused_and_kept(world, refused, tmp_path):
    run = copied(world.reference, tmp_path / "run")
    other_architecture(run)
    sentence = refused(train.main, world.flags(run, "--max-train-steps", "8"), run / "checkpoints", run / "student")
    assert re.search(r"step-00000006.\w+.safetensors belongs to another architecture: tensor '.*' is \(", sentence)


def test_a_resumed_run_needs_the_same_data_and_teacher(world, refused, tmp_path):
    run = copied(world.reference, tmp_path / "run")
    data = copied(world.root / "data", tmp_path / "data")
    train.main(world.flags(run, "--data", str(data)))  # the same content elsewhere is the same
    with np.load(data / "train.npz") as file:
        arrays = dict(file)
    arrays["images"][0, 0, 0, 0] ^= 1
    np.savez(data / "train.npz", **arrays)
    sentence = refused(train.main, world.flags(run, "--data", str(data)), tmp_path)
    assert re.search(r"run holds a run with another content of --data: give that one", sentence)
    teacher = copied(world.teacher, tmp_path / "teacher")
    weights = load_file(teacher / "model.safetensors")
    weights["conv_out.bias"] += 0.1
    save_file(weights, teacher / "model.safetensors")
    sentence = refused(train.main, world.flags(run, "--teacher", str(teacher)), tmp_path)
    assert re.search(r"run holds a run with another content of --teacher: give that one", sentence)


FLAGS = {
    "nosuch": r"there is no preset 'nosuch': choose one of digits",
    "--learning-speed 3": r"Unrecognized options: --learning-speed.*see train_dmd.py \[PRESET\] --help",
    "--seed -1": r"--seed is -1: it must be at least 0 and below 2\*\*64",
    "--seed abc": r"--seed.*'abc'",
    "--seed 1.5": r"--seed.*'1.5'",
    "--seed": r"--seed.*1",
    "--objective gan": r"'gan'.*--objective.*'dmd', 'matching', 'regression'",
    "--pairs 0": r"--pairs is 0 and --pair-batch-size 4: the regression loss needs at least 1",
    "--batch-size 6 --gradient-accumulation-steps 4": r"--batch-size 6 is not divisible by 1 processes x 4",
    "--pair-batch-size 5 --gradient-accumulation-steps 2": r"--pair-batch-size 5 is not divisible.*a multiple of 2",
    "--learning-rate nan": r"--learning-rate is nan: it must be a number greater than 0",
    "--width 6": r"--width is 6: it must be a multiple of 4",
    "--width 132": r"--width 132 with --multipliers \(1,\) makes no UNet",
    "--size 2": r"--size is 2: the network that measures images takes 4 or more",
    "--final-samples 3": r"--final-samples 3: both must be at least 16",
    "--t-min 0.9 --t-max 0.1": r"--t-min 0.9 and --t-max 0.1: they must be in order",
    "--attention True False": r"--multipliers and --attention must be equally long",
    "--features nowhere.th": r"nowhere.th does not exist",
    "--store-images uint8 --regression-on latents": r"--store-images uint8 is for the regression on whole decoded",
    "--store-images fp16 --regression-crop 2": r"--store-images fp16 is for the regression on whole decoded",
    "--student-lora-rank -1": r"--student-lora-rank is -1: it must be a number of at least 0",
    "--student-lora-rank 4": r"--student-lora-rank is 4 and --fake-lora-rank 0: adapters are for .* --teacher",
}


@pytest.mark.parametrize("text", FLAGS)
def test_wrong_flags_are_refused(world, refused, tmp_path, text):
    flags = world.flags(tmp_path / "run")
    flags = [text, *flags] if not text.startswith("-") else [*flags, *text.split()]
    assert re.search(FLAGS[text], refused(train.main, flags, tmp_path, world.root / "cache"))


SAMPLE = {
    "--seeds abc": r"--seeds is 'abc': it should look like 0-7 or 1,5,9",
    "--seeds=-1": r"--seeds is '-1'",
    "--seeds 7-3": r"--seeds has the range '7-3': it must rise",
    "--seeds 0-99999999999": r"--seeds has the range '0-99999999999': at most 1000000 seeds",
    "--steps 0": r"--steps is 0 .*must be at least 1",
    "--student nowhere": r"nowhere is no folder, and no id on the hub",
    "zebra": r"there is no class 'zebra': this network knows a, b, c",
    "--bogus": r"Unrecognized options: --bogus; see sample.py --help",
}


@pytest.mark.parametrize("text", SAMPLE)
def test_wrong_questions_to_the_sampler_are_refused(world, refused, tmp_path, text):
    flags = ["--student", str(world.teacher), "--out", str(tmp_path / "out"), "--device", "cpu", *text.split()]
    assert re.search(SAMPLE[text], refused(sample.main, flags, tmp_path))


def test_the_sampler_does_not_write_into_a_file(world, refused, tmp_path):
    (tmp_path / "out").write_text("mine")
    flags = ["--student", str(world.teacher), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert re.search(r"out: File exists; give a folder", refused(sample.main, flags, tmp_path))


@pytest.fixture
def read_only(tmp_path):
    """A folder that even root cannot write to."""
    folder = tmp_path / "fixed"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
        return
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a read-only disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_disk_is_named(world, refused, read_only):
    sentence = refused(train.main, world.flags(read_only / "run"), read_only)
    assert re.search(r"fixed.run: (Read-only file system|Permission denied); give a folder that can be", sentence)
    flags = ["--student", str(world.teacher), "--out", str(read_only / "out"), "--device", "cpu"]
    assert re.search(r"fixed.out: (Read-only file system|Permission denied)", refused(sample.main, flags, read_only))


def test_a_path_where_no_folder_can_be_is_named(world, refused):
    if not os.path.isdir("/proc/self"):
        pytest.skip("there is no /proc here")
    out = "/proc/nope/run"
    assert re.search(r"/proc/nope.*: No such file or directory", refused(train.main, [*world.flags(out)]))
