"""Labelled sets from every layout, and the sentences for those that cannot be probed."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from dmd.data import images
from dmd.errors import InputError
from dmd.represent import sets


def png(path, level, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 0, 255 - level)).save(path)


def levels(found):
    return [int(image[0, 0, 0]) for batch in found.source.batches(2) for image in batch]


def test_class_folders_of_any_sizes_with_parts(tmp_path):
    for part, name, level, size in (
        ("train", "cat", 10, (6, 5)), ("train", "ant", 20, (9, 9)), ("train", "ant", 21, (4, 4)),
        ("test", "cat", 30, (5, 5)), ("val", "bee", 40, (5, 5)),
    ):  # fmt: skip
        png(tmp_path / part / name / f"{level}.png", level, size)
    train, test = sets.read(str(tmp_path), "train"), sets.read(str(tmp_path), "test")
    assert train.classes == test.classes == ("ant", "bee", "cat")
    assert levels(train) == [20, 21, 10] and train.labels.tolist() == [0, 0, 2]
    assert levels(test) == [30] and test.labels.tolist() == [2]
    assert train.source.labels.tolist() == [0, 0, 2]
    with pytest.raises(InputError, match=r"\(val\) has the class 'bee', and .* has images of ant, cat only"):
        sets.aligned(sets.read(str(tmp_path), "val"), train, "val")


def test_labels_of_two_sets_meet_by_name(tmp_path):
    for level, name in ((1, "b"), (2, "a"), (3, "c")):
        png(tmp_path / "one" / name / f"{level}.png", level)
    for level, name in ((4, "c"), (5, "b")):
        png(tmp_path / "two" / name / f"{level}.png", level)
    one, two = (sets.read(str(tmp_path / name), "train") for name in ("one", "two"))
    assert two.labels.tolist() == [0, 1] and sets.aligned(two, one, "test").tolist() == [1, 2]


def write_tar(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def encoded(level):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_tars_with_cls_or_json(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", encoded(1)), ("a.cls", b"7"), ("b.cls", b"10"), ("b.png", encoded(2))])
    write_tar(tmp_path / "1.tar", [("c.png", encoded(3)), ("c.json", json.dumps({"label": 7}).encode())])
    found = sets.read(str(tmp_path), "train")
    assert levels(found) == [1, 2, 3]
    assert found.classes == ("7", "10") and found.labels.tolist() == [0, 1, 0]
    words = [("a.png", encoded(1)), ("a.cls", b"dog"), ("b.png", encoded(2)), ("b.json", b'{"label": "ape"}')]
    write_tar(tmp_path / "words.tar", words)
    found = sets.read(str(tmp_path / "words.tar"), "train")
    assert found.classes == ("ape", "dog") and found.labels.tolist() == [1, 0]


def test_a_table_with_labels(tmp_path):
    lines = []
    for level, label in ((1, "x"), (2, "y"), (3, "x")):
        png(tmp_path / f"{level}.png", level)
        lines.append(json.dumps({"file_name": f"{level}.png", "label": label}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found = sets.read(str(tmp_path), "train")
    assert levels(found) == [1, 2, 3] and found.labels.tolist() == [0, 1, 0] and found.classes == ("x", "y")


def test_parts_that_are_drawn_share_nothing_and_have_every_class():
    whole = images.digits()
    train, test = (sets.read("digits", part) for part in ("train", "test"))
    assert len(train) + len(test) == len(whole)
    assert abs(len(test) / len(whole) - sets.TEST_SHARE) < 0.01
    seen = {image.tobytes() for batch in train.source.batches(500) for image in batch}
    repeated = sum(image.tobytes() in seen for batch in test.source.batches(500) for image in batch)
    assert repeated <= 2  # the data set itself has hardly any doubles
    assert len(test.labels.unique()) == 10
    labels = torch.tensor([0] * 10 + [1] * 3 + [2])
    assert labels[sets.drawn(labels, 0.25)].tolist() == [0, 0, 1]
    assert labels[sets.drawn(labels, 2)].tolist() == [0, 0, 1, 1]


def test_shapes_are_what_their_labels_say():
    from dmd.metrics import caption

    found = sets.shapes_part("test").select(torch.arange(40))
    from dmd.data import shapes

    index = sets.SHAPES_FROM + (1 << 20) + torch.arange(400)
    scenes = [s for s in shapes.scenes(0, index) if len(s.things) == 1][:40]
    for scene, label in zip(scenes, found.labels, strict=True):
        assert found.classes[label] == f"{scene.things[0].colour} {scene.things[0].shape}"
    assert caption.agreement(images.to_float(found.images), scenes)["agreement"] > 0.9


@pytest.fixture
def cifar(tmp_path):
    """A torchvision data set of 12 images in 3 classes, written in STL-10's layout."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 5)):
        (folder / f"{part}_X.bin").write_bytes(rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tobytes())
        (folder / f"{part}_y.bin").write_bytes(np.array([i % 3 + 1 for i in range(count)], np.uint8).tobytes())
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    return tmp_path


def test_a_torchvision_data_set(cifar, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    found = sets.read(f"torchvision:STL10:{cifar}", "train")
    assert found.classes == ("airplane", "bird", "car") and found.labels.tolist() == [i % 3 for i in range(12)]
    theirs = datasets.STL10(str(cifar), "train")
    ours = [image for batch in found.source.batches(5) for image in batch]
    assert all((np.asarray(theirs[i][0]) == image).all() for i, image in enumerate(ours))
    test = sets.read(f"torchvision:STL10:{cifar}", "test")
    assert len(test) == 5 and test.source.digest() != found.source.digest()
    part = found.source.select([3, 1])
    assert part.labels.tolist() == [0, 1] and (next(part.batches(2))[0] == ours[3]).all()


def test_a_set_that_comes_whole_has_a_training_and_a_test_part_only(tmp_path):
    for i, name in enumerate(("Forest", "River")):
        for k in range(8):
            png(tmp_path / "eurosat" / "2750" / name / f"{k}.png", 100 * i + k)
    train, test = (sets.read(f"torchvision:EuroSAT:{tmp_path}", part) for part in ("train", "test"))
    assert sorted(levels(train) + levels(test)) == [*range(8), *range(100, 108)] and len(test) == 4
    with pytest.raises(InputError, match="EuroSAT has no part 'val': leave out --val"):
        sets.read(f"torchvision:EuroSAT:{tmp_path}", "val")


def test_parts_with_the_same_images_are_refused_whichever_they_are(tmp_path):
    one, other = (sets.read(npz(tmp_path / f"{n}.npz", n, [0, 1] * (n // 2)), "train") for n in (4, 6))
    sets.require_apart({"--train": one, "--test": other})
    with pytest.raises(InputError, match="--test has the same images as --val, .*6.npz"):
        sets.require_apart({"--train": one, "--val": other, "--test": other})


def npz(path, count=4, labels=None):
    pixels = np.arange(count * 48, dtype=np.uint8).reshape(count, 4, 4, 3)
    np.savez(path, images=pixels, **({} if labels is None else {"labels": np.asarray(labels)}))
    return str(path)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: str(p / "nowhere"), "there is no labelled set"),
        (lambda p: str(p), "is empty: give digits"),
        (lambda p: png(p / "a.png", 1) or str(p), "holds images without labels: put each class into a folder"),
        (lambda p: npz(p / "a.npz"), "lacks 'labels'"),
        (lambda p: (p / "cat").mkdir() or str(p), "holds no image"),
        (lambda p: png(p / "train" / "cat" / "a.png", 1) or str(p), "test does not exist, though .* holds train"),
        (lambda p: write_tar(p / "a.tar", [("a.png", encoded(1))]) or str(p / "a.tar"), "'a.png' has no label"),
        (
            lambda p: write_tar(p / "a.tar", [("a.png", encoded(1)), ("a.json", b'{"caption": "x"}')]) or str(p),
            "'a.png' has no label: a probe needs images of known classes",
        ),
        (
            lambda p: (p / "metadata.jsonl").write_text('{"file_name": "a.png"}') and png(p / "a.png", 1) or str(p),
            "line 1 has no label",
        ),
        (lambda p: "torchvision:FakeData:x", "names no labelled set: give torchvision:NAME:FOLDER"),
        (lambda p: f"torchvision:CIFAR10:{p}", "CIFAR10 cannot be read from"),
    ],
)
def test_a_set_that_is_none_says_why(tmp_path, make, sentence):
    with pytest.raises(InputError, match=sentence):
        sets.read(make(tmp_path), "test")


def test_one_class_only_is_no_set_to_probe(tmp_path):
    found = sets.read(npz(tmp_path / "a.npz", 4, [2, 2, 2, 2]), "train")
    with pytest.raises(InputError, match="all 4 images of .* are of one class, '2'"):
        sets.check(found)
    assert sets.check(sets.read(npz(tmp_path / "b.npz", 4, [2, 2, 1, 2]), "train")).classes == ("0", "1", "2")
