"""torchvision's data sets in the layouts that it keeps them in: labels, parts, names, and files that are hostile."""

import csv
import json
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from dmd.errors import InputError
from dmd.represent import sets

PARTS = {"train": (1, 2), "test": (3, 4), "val": (5, 6)}
"""The images of each part, by their red: odd ones are of the second class, by the alphabet or number, even ones of the
first."""


def write(path, red):
    """A PNG, whatever it is called, so that it stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (7, 6), (red, 9, 255 - red)).save(path, "PNG")


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


def food101(root):
    names, base = ("apple", "pie"), root / "food-101"
    for part in ("train", "test"):
        lines(base / "meta" / f"{part}.json", json.dumps({names[i % 2]: [f"{names[i % 2]}/{i}"] for i in PARTS[part]}))
        for i in PARTS[part]:
            write(base / "images" / names[i % 2] / f"{i}.jpg", i)
    return names


def dtd(root):
    names, base = ("banded", "wavy"), root / "dtd" / "dtd"
    for part, images in PARTS.items():
        lines(base / "labels" / f"{part}1.txt", *(f"{names[i % 2]}/{i}.jpg" for i in images))
        for i in images:
            write(base / "images" / names[i % 2] / f"{i}.jpg", i)
    return names


def aircraft(root):
    names, base = ("707-320", "727 200"), root / "fgvc-aircraft-2013b" / "data"
    lines(base / "variants.txt", *names)
    for part, images in PARTS.items():
        lines(base / f"images_variant_{part}.txt", *(f"{i:07d} {names[i % 2]}" for i in images))
        for i in images:
            write(base / "images" / f"{i:07d}.jpg", i)
    return names


def pets(root):
    base = root / "oxford-iiit-pet"
    for part, file in (("train", "trainval"), ("test", "test")):
        files = {i: f"{('Abyssinian', 'great_pyrenees')[i % 2]}_{i}" for i in PARTS[part]}
        lines(base / "annotations" / f"{file}.txt", *(f"{name} {1 + i % 2} 1 1" for i, name in files.items()))
        for i, name in files.items():
            write(base / "images" / f"{name}.jpg", i)
    return "Abyssinian", "Great Pyrenees"


def cars(root):
    from scipy.io import savemat

    names, base = ("Audi A4", "BMW M3"), root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(1 + i % 2, f"{i}.jpg") for i in PARTS[part]]
        savemat(base / file, {"annotations": np.array(rows, dtype=[("class", "u1"), ("fname", object)])})
        for i in PARTS[part]:
            write(base / f"cars_{part}" / f"{i}.jpg", i)
    return names


def flowers(root):
    from scipy.io import savemat

    base = root / "flowers-102"
    base.mkdir()
    savemat(base / "imagelabels.mat", {"labels": np.array([1 + i % 2 for i in range(1, 7)])})
    ids = {key: np.array(PARTS[part]) for key, part in (("trnid", "train"), ("tstid", "test"), ("valid", "val"))}
    for i in range(1, 7):
        write(base / "jpg" / f"image_{i:05d}.jpg", i)
    savemat(base / "setid.mat", ids)
    return "pink primrose", "hard-leaved pocket orchid"


def gtsrb(root):
    base = root / "gtsrb"
    for i in PARTS["train"]:
        write(base / "GTSRB" / "Training" / f"{i % 2:05d}" / f"{i}.ppm", i)
    for i in PARTS["test"]:
        write(base / "GTSRB" / "Final_Test" / "Images" / f"{i}.ppm", i)
    with open(base / "GT-final_test.csv", "w", newline="") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerows([["Filename", "ClassId"], *([f"{i}.ppm", i % 2] for i in PARTS["test"])])
    return "0", "1"


def clevr(root):
    base = root / "clevr" / "CLEVR_v1.0"
    for part, file in (("train", "train"), ("test", "val")):  # its test part has no labels
        scenes = [{"image_filename": f"{i}.png", "objects": [0] * (i % 2)} for i in PARTS[part]]
        lines(base / "scenes" / f"CLEVR_{file}_scenes.json", json.dumps({"scenes": scenes}))
        for i in PARTS[part]:
            write(base / "images" / file / f"{i}.png", i)
    return "0", "1"


def country211(root):
    return folders(root / "country211", {"train": "train", "test": "test", "val": "valid"}, ("AD", "ZA"))


def rendered_sst2(root):
    parts = {"train": "train", "test": "test", "val": "valid"}
    return folders(root / "rendered-sst2", parts, ("negative", "positive"))


def imagenet(root):
    """Two classes of one name: its cranes."""
    torch.save(({"n1": ("crane",), "n2": ("crane", "bird")}, []), root / "meta.bin")
    folders(root, {"train": "train", "test": "val"}, ("n1", "n2"))
    return "crane", "crane"


def folders(base, parts, names):
    for part, folder in parts.items():
        for i in PARTS[part]:
            write(base / folder / names[i % 2] / f"{i}.png", i)
    return names


def mnist(root):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, name in (("train", "train"), ("test", "t10k")):
        images = np.repeat(np.array(PARTS[part], np.uint8), 36)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 2, 6, 6) + images.tobytes())
        labels = bytes(i % 2 for i in PARTS[part])
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 2) + labels)
    return "0 - zero", "1 - one"


LAYOUTS = {
    "Food101": food101, "DTD": dtd, "FGVCAircraft": aircraft, "OxfordIIITPet": pets, "StanfordCars": cars,
    "Flowers102": flowers, "GTSRB": gtsrb, "CLEVRClassification": clevr, "MNIST": mnist, "Country211": country211,
    "RenderedSST2": rendered_sst2, "ImageNet": imagenet,
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_set_as_torchvision_keeps_it(tmp_path, name, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)  # its sums are of all images
    names = LAYOUTS[name](tmp_path)
    train, test = (sets.read(f"torchvision:{name}:{tmp_path}", part) for part in ("train", "test"))
    for found, images in ((train, PARTS["train"]), (test, PARTS["test"])):
        assert reds(found) == {i: i % 2 for i in images}
        assert tuple(found.classes[:2]) == names
        assert found.mean_class == (name in ("FGVCAircraft", "OxfordIIITPet", "Flowers102"))
    assert sets.aligned(test, train, "test").tolist() == test.labels.tolist()
    if "val" in sets.TORCHVISION[name].parts:
        assert reds(sets.read(f"torchvision:{name}:{tmp_path}", "val")) == {i: i % 2 for i in PARTS["val"]}
        return
    with pytest.raises(InputError, match=f"{name} has no part 'val': leave out --val"):
        sets.read(f"torchvision:{name}:{tmp_path}", "val")


def reds(found):
    """Label by red."""
    seen = [int(image[0, 0, 0]) for batch in found.source.batches(3) for image in batch]
    return dict(zip(seen, found.labels.tolist(), strict=True))


WHOLE = {
    "Caltech101": ("caltech101/101_ObjectCategories/{name}/image_{n:04d}.jpg", ("BACKGROUND_Google", "ant", "wrench")),
    "Caltech256": ("caltech256/256_ObjectCategories/{name}/{c:03d}_{n:04d}.jpg", ("001.ak47", "002.yo-yo")),
    "SUN397": ("SUN397/{name[0]}/{name}/sun_{n}.jpg", ("abbey", "zoo/outdoor")),
    "EuroSAT": ("eurosat/2750/{name}/{n}.jpg", ("Forest", "River")),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_set_that_comes_whole_is_parted_the_same_way_wherever_it_lies(tmp_path, name):
    """Whatever the order in which its disk lists the files, by a number of training images or a share of them."""
    path, names = WHOLE[name]
    count = {"Caltech101": 33, "Caltech256": 63, "SUN397": 53, "EuroSAT": 8}[name]
    for c, word in enumerate(names, 1):
        for n in range(1, count + 1):
            write(tmp_path / path.format(name=word, c=c, n=n), 70 * c + n)
    if name == "SUN397":
        lines(tmp_path / "SUN397" / "ClassName.txt", *(f"/{word[0]}/{word}" for word in names))
    (tmp_path / "turned").mkdir()
    for file in sorted(tmp_path.rglob("*"), reverse=True):  # made last to first
        if file.is_file() and "turned" not in file.parts:
            copy = tmp_path / "turned" / file.relative_to(tmp_path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    train, test = (sets.read(f"torchvision:{name}:{tmp_path}", part) for part in ("train", "test"))
    again = sets.read(f"torchvision:{name}:{tmp_path / 'turned'}", "train")
    assert reds(train) == reds(again) and train.source.digest() == again.source.digest()
    assert not reds(train).keys() & reds(test).keys()
    assert [len(x.labels) for x in (train, test)] == [2 * (count - 3), 6] if name != "EuroSAT" else [12, 4]
    assert train.classes == tuple(names[-2:]) and train.mean_class == (name == "Caltech101")
    assert train.labels.bincount().tolist() == [len(train) // 2] * 2


class Bomb:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("CIFAR10", [f"cifar-10-batches-py/{n}" for n in ("data_batch_1", "test_batch", "batches.meta")]),
        ("CIFAR100", [f"cifar-100-python/{n}" for n in ("train", "test", "meta")]),
        ("MNIST", [f"MNIST/processed/{n}.pt" for n in ("training", "test")]),
        ("EMNIST", [f"EMNIST/processed/{n}_balanced.pt" for n in ("training", "test")]),
        ("QMNIST", [f"QMNIST/processed/{n}.pt" for n in ("train", "test")]),
        ("ImageNet", ["meta.bin"]),
    ],
)
def test_nothing_of_a_user_is_unpickled(tmp_path, name, files):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(pickle.dumps(Bomb(tmp_path / "went-off"), protocol=2))
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match=f"{name} cannot be read from"):
        sets.read(f"torchvision:{name}:{tmp_path}", "train")
    assert not (tmp_path / "went-off").exists()
    pickle.loads((tmp_path / files[0]).read_bytes())  # by its own it does
    assert (tmp_path / "went-off").exists()


@pytest.mark.parametrize("name", sets.TORCHVISION)
def test_a_folder_without_the_set_is_refused_and_nothing_is_fetched(tmp_path, name, monkeypatch):
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("it was to be downloaded"))
    with pytest.raises(InputError, match=f"{name} cannot be read from .*: let torchvision download it there"):
        sets.read(f"torchvision:{name}:{tmp_path}", "train")
    with pytest.raises(InputError, match="which is no folder"):
        sets.read(f"torchvision:{name}:{tmp_path / 'nowhere'}", "train")
    assert not (tmp_path / "nowhere").exists()


def test_files_that_are_cut_are_named(tmp_path):
    mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(InputError, match="MNIST cannot be read from"):
        sets.read(f"torchvision:MNIST:{tmp_path}", "train")
    food101(tmp_path)
    file = tmp_path / "food-101" / "images" / "apple" / "2.jpg"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(InputError, match=r"Food101 \(train\), image 1, cannot be read"):
        sets.read(f"torchvision:Food101:{tmp_path}", "train")
    file.unlink()
    with pytest.raises(InputError, match=r"Food101 \(train\), image 1, cannot be read: .*2.jpg"):
        sets.read(f"torchvision:Food101:{tmp_path}", "train")
