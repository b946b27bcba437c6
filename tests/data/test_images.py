"""Loaders: every layout gives the pixels that were written, and every wrong input its sentence."""

import gzip
import hashlib
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmd.data.images import ImageSet, digits, download, load, pad_to, to_float, to_uint8
from dmd.errors import InputError


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_npz(path, images=None, labels=None, **others):
    images = pixels(6, 8, 8, 3) if images is None else images
    labels = np.arange(len(images)) % 3 if labels is None else labels
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=images, labels=labels, **others)
    return path


def write_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def nchw(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------- ImageSet and pure functions


def a_set(count=4, classes=("a", "b")):
    return ImageSet(nchw(pixels(count, 5, 4, 3)), torch.arange(count) % len(classes), classes)


def test_pixels_map_0_to_minus_1_and_255_to_1():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    found = ImageSet(images, torch.zeros(1, dtype=torch.int64), ("a",)).pixels(torch.tensor([0]))
    expected = torch.arange(256, dtype=torch.float64) / 255 * 2 - 1
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.flatten().double(), expected, atol=1e-7, rtol=0)
    assert torch.equal(to_uint8(found), images)


def test_to_uint8_clamps_and_rounds_to_the_nearest_level():
    step = 2 / 255
    x = torch.tensor([-7.0, 7.0, -1 + 0.4 * step, -1 + 0.6 * step, -1 + 200.4 * step])
    assert to_uint8(x).tolist() == [0, 255, 0, 1, 200]
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_pixels_and_select_follow_the_index():
    images, index = a_set(), torch.tensor([3, 0, 3])
    assert torch.equal(images.pixels(index), to_float(images.images)[[3, 0, 3]])
    part = images.select(index)
    assert torch.equal(part.images, images.images[[3, 0, 3]])
    assert part.labels.tolist() == [1, 0, 1]


def test_digest_depends_on_content_alone():
    images = a_set()
    copy = ImageSet(images.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), images.labels, ("a", "b"))
    assert copy.digest() == images.digest()
    pixel = images.images.clone()
    pixel[2, 1, 0, 0] ^= 1
    others = [
        ImageSet(pixel, images.labels, images.classes),
        ImageSet(images.images, images.labels.flip(0), images.classes),
        ImageSet(images.images, images.labels, ("a", "c")),
        ImageSet(images.images.reshape(4, 3, 4, 5), images.labels, images.classes),
    ]
    assert len({images.digest(), *(other.digest() for other in others)}) == 5


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), "must be uint8"),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), r"not torch.uint8 \(2, 4, 4\)"),
        (torch.zeros(0, 3, 4, 4).byte(), torch.zeros(0).long(), "N > 0"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2), "labels must be int64"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2, 1).long(), "labels must be int64"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), "2 images but 3 labels"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.tensor([0, 2]), "label 2 is not in 0 to 1"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.tensor([0, -1]), "label -1 is not in 0 to 1"),
    ],
)
def test_an_image_set_validates_itself(images, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        ImageSet(images, labels, ("a", "b"))


@pytest.mark.parametrize(("dtype", "black"), [(torch.uint8, 0), (torch.float32, -1)])
def test_pad_to_centres_on_black(dtype, black):
    images = torch.ones(2, 1, 28, 27, dtype=dtype)
    padded = pad_to(images, 32)
    assert torch.equal(padded[..., 2:30, 2:29], images)
    assert padded.double().sum() == images.double().sum() + black * 2 * (32 * 32 - 28 * 27)
    assert torch.equal(pad_to(images[..., :28, :], 28)[..., :27], images)


def test_pad_to_refuses_to_crop():
    with pytest.raises(ValueError, match="33x20 pixels do not fit into 32x32"):
        pad_to(torch.zeros(1, 1, 33, 20), 32)


def test_digits_are_scikit_learn_s():
    from sklearn.datasets import load_digits

    images, bunch = digits(), load_digits()
    assert images.shape == (1, 8, 8)
    assert np.array_equal(images.labels, bunch.target)
    assert np.array_equal(np.rint(images.images[:, 0].numpy() * (16 / 255)), bunch.images)
    assert (images.images.min(), images.images.max()) == (0, 255)


# ----------------------------------------------------------------------------- npz


def test_npz_folder_has_two_splits(tmp_path):
    images = pixels(6, 8, 8, 3)
    write_npz(tmp_path / "train.npz", images, class_names=np.array(["cat", "dog", "owl"]))
    write_npz(tmp_path / "test.npz", images[:2], np.array([2, 0], dtype=">i2"))
    train, test = load(tmp_path, "train", 8, 3), load(tmp_path, "test")
    assert torch.equal(train.images, nchw(images))
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert train.classes == ("cat", "dog", "owl")
    assert torch.equal(test.images, nchw(images[:2]))
    assert (test.labels.tolist(), test.classes) == ([2, 0], ("0", "1", "2"))


def test_a_single_npz_serves_both_splits(tmp_path):
    path = write_npz(tmp_path / "my.npz")
    assert load(path, "train").digest() == load(str(path), "test").digest()


def test_channels_change_only_where_nothing_is_lost(tmp_path):
    grey, colour = pixels(3, 4, 4, 1), pixels(3, 4, 4, 3)
    path = write_npz(tmp_path / "grey.npz", grey)
    assert torch.equal(load(path, "train", channels=3).images, nchw(grey.repeat(3, axis=3)))
    path = write_npz(tmp_path / "grey3.npz", grey.repeat(3, axis=3))
    assert torch.equal(load(path, "train", channels=1).images, nchw(grey))
    path = write_npz(tmp_path / "colour.npz", colour)
    with pytest.raises(InputError, match=r"colour.npz: images are in colour, but 1 channel was asked for"):
        load(path, "train", channels=1)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"images": pixels(4, 8, 8, 3).astype(np.float32)}, r"must be uint8 .*not float32 \(4, 8, 8, 3\)"),
        ({"images": pixels(4, 8, 8)}, r"not uint8 \(4, 8, 8\)"),
        ({"images": pixels(4, 3, 8, 8)}, r"not uint8 \(4, 3, 8, 8\)"),
        ({"images": pixels(0, 8, 8, 3)}, "N > 0"),
        ({"images": pixels(4, 7, 8, 3)}, "7x8 pixels instead of 8x8"),
        ({"labels": np.zeros(6)}, "labels must be integers, not float64"),
        ({"labels": np.zeros((6, 1), int)}, "labels must be int64"),
        ({"labels": np.zeros(5, int)}, "6 images but 5 labels"),
        ({"labels": np.array([0, 1, 2, 0, 1, -2])}, "label -2 is not in 0 to 2"),
        ({"labels": np.array([0, 1, 2, 0, 1, 10**12])}, "label 1000000000000 is not in 0 to 65535"),
        ({"class_names": np.array(["a", "b"])}, "label 2 is not in 0 to 1"),
        ({"class_names": np.array([1, 2, 3])}, "class_names must be a list of strings, not int64"),
        ({"class_names": np.array([{"a": 1}], dtype=object)}, "plain .not object. arrays"),
        ({"labels": np.array([0, 1, 2, None, 1, 2], dtype=object)}, "plain .not object. arrays"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, arrays, sentence):
    path = write_npz(tmp_path / "train.npz", **arrays)
    with pytest.raises(InputError, match=sentence) as caught:
        load(tmp_path, "train", 8)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_keys_are_named(tmp_path):
    np.savez(tmp_path / "train.npz", images=pixels(2, 8, 8, 3), data=np.zeros(2))
    with pytest.raises(InputError, match=r"train.npz lacks 'labels': it needs 'images' and 'labels'"):
        load(tmp_path, "train")


@pytest.mark.parametrize("cut", [0, 1, 30, 200, -100])
def test_a_cut_npz_is_named(tmp_path, cut):
    path = write_npz(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"a.npz is not a readable .npz file"):
        load(path, "train")


def test_a_damaged_npz_is_named(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    content = bytearray(path.read_bytes())
    content[700] ^= 255
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a.npz is not a readable .npz file"):
        load(path, "train")


class Payload:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_calls_itself_npz_is_not_loaded(tmp_path):
    path, mark = tmp_path / "a.npz", tmp_path / "mark"
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(InputError, match=r"not a readable .npz file"):
        load(path, "train")
    np.savez(path, images=np.array([Payload(mark)], dtype=object), labels=np.zeros(1))
    with pytest.raises(InputError, match=r"not a readable .npz file"):
        load(path, "train")
    assert not mark.exists()


# ----------------------------------------------------------------------------- folders of images


@pytest.fixture
def tree(tmp_path):
    """Two splits; the class `bee` is in the test part only."""
    a, b, c = pixels(8, 8, 3, seed=1), pixels(8, 8, 3, seed=2), pixels(8, 8, seed=3)
    write_png(tmp_path / "train" / "cat" / "1.png", a)
    (tmp_path / "train" / "ant").mkdir()
    Image.fromarray(b).save(tmp_path / "train" / "ant" / "2.webp", lossless=True)
    write_png(tmp_path / "test" / "bee" / "3.PNG", c)
    write_png(tmp_path / "test" / "cat" / "4.png", a)
    (tmp_path / "train" / "cat" / ".DS_Store").write_text("x")
    return tmp_path, a, b, c


def test_image_folders_keep_one_label_per_class(tree):
    root, a, b, c = tree
    train, test = load(root, "train"), load(root, "test", 8)
    assert train.classes == test.classes == ("ant", "bee", "cat")
    assert torch.equal(train.images, nchw(np.stack([b, a])))
    assert train.labels.tolist() == [0, 2]
    grey = np.repeat(c[..., None], 3, axis=2)  # beside a colour image
    assert torch.equal(test.images, nchw(np.stack([grey, a])))
    assert test.labels.tolist() == [1, 2]


def test_class_folders_without_splits_serve_both(tree):
    root, a, b, _ = tree
    for split in ("train", "test"):
        assert torch.equal(load(root / "train", split).images, nchw(np.stack([b, a])))


def test_palette_opaque_alpha_and_bilevel_images_are_read(tmp_path):
    grey = pixels(8, 8)
    write_png(tmp_path / "x" / "a.png", grey)
    Image.fromarray(grey).convert("P").save(tmp_path / "x" / "b.png")
    Image.fromarray(grey).convert("RGBA").save(tmp_path / "x" / "c.png")
    Image.fromarray(grey).convert("LA").save(tmp_path / "x" / "d.png")
    Image.fromarray(grey > 127).save(tmp_path / "x" / "e.png")
    found = load(tmp_path, "train", channels=1).images
    assert torch.equal(found[:4], torch.from_numpy(grey).expand(4, 1, 8, 8))
    assert np.array_equal(found[4, 0].numpy(), np.where(grey > 127, 255, 0))


def test_jpeg_is_read(tmp_path):
    write_png(tmp_path / "x" / "a.jpg", np.full((8, 8, 3), 100, np.uint8))
    assert (load(tmp_path, "train").images.int() - 100).abs().max() <= 2


def test_sizes_are_named_and_never_changed(tree):
    root, *_ = tree
    with pytest.raises(InputError, match=r"2.webp is 8x8 pixels instead of 16x16"):
        load(root, "train", 16)
    write_png(root / "train" / "cat" / "9.png", pixels(8, 12, 3))
    with pytest.raises(InputError, match=r"9.png is 8x12 pixels instead of 8x8"):
        load(root, "train")


def test_foreign_files_are_named(tree):
    root, *_ = tree
    note = root / "train" / "cat" / "notes.txt"
    note.write_text("hello")
    with pytest.raises(InputError, match=r"notes.txt is not an image: class folders hold only .png"):
        load(root, "train")
    note.unlink()
    (root / "train" / "cat" / "deep.png").mkdir()
    with pytest.raises(InputError, match=r"deep.png is not an image"):
        load(root, "train")


@pytest.mark.parametrize("cut", [0, 20, 100])
def test_broken_images_are_named(tree, cut):
    root, *_ = tree
    file = root / "train" / "cat" / "1.png"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(InputError, match=r"1.png is not a readable 8-bit image"):
        load(root, "train")


def test_a_decompression_bomb_is_not_decoded(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IEND", b""))
    for size in (None, 8):
        with pytest.raises(InputError, match=r"a.png is not a readable 8-bit image"):
            load(tmp_path, "train", size)


def test_lossy_modes_are_refused(tmp_path):
    file = write_png(tmp_path / "x" / "a.png", pixels(8, 8).astype(np.uint16) * 257)
    with pytest.raises(InputError, match=r"a.png is not a readable 8-bit image: its mode is I;16"):
        load(tmp_path, "train")
    write_png(file, pixels(8, 8, 4))
    with pytest.raises(InputError, match=r"a.png is not a readable 8-bit image: it is transparent"):
        load(tmp_path, "train")


def test_an_empty_class_folder_is_named(tree):
    root, *_ = tree
    (root / "train" / "dog").mkdir()
    with pytest.raises(InputError, match=r"class folder .*dog is empty"):
        load(root, "train")


# ----------------------------------------------------------------------------- places that hold nothing


def test_missing_empty_and_unknown_places_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere does not exist: give an .npz file or a folder"):
        load(tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match=r"is empty: it must hold train.npz and test.npz, .*FashionMNIST/raw/"):
        load(tmp_path, "train")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"has no known layout: it must hold train.npz and test.npz"):
        load(tmp_path, "train")
    with pytest.raises(InputError, match=r"a.txt is not a readable .npz file"):
        load(tmp_path / "docs" / "a.txt", "train")


def test_a_missing_split_is_named(tmp_path, tree):
    root, *_ = tree
    write_npz(tmp_path / "npz" / "train.npz")
    with pytest.raises(InputError, match=r"test.npz does not exist, though"):
        load(tmp_path / "npz", "test")
    (root / "test").rename(root / "other")
    with pytest.raises(InputError, match=r"test does not exist, though"):
        load(root, "test")


def test_a_split_of_loose_images_is_named(tmp_path):
    write_png(tmp_path / "train" / "a.png", pixels(8, 8, 3))
    with pytest.raises(InputError, match=r"train holds no CLASS/\*.png"):
        load(tmp_path, "train")


def test_wrong_arguments_are_named(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    with pytest.raises(InputError, match="split 'val' is unknown: it must be 'train' or 'test'"):
        load(path, "val")
    with pytest.raises(InputError, match="channels 4 is not possible: it must be 1 or 3"):
        load(path, "train", channels=4)
    with pytest.raises(InputError, match="data set 'mnist' cannot be downloaded: choose from cifar10, fashion"):
        download("mnist", tmp_path)


# ----------------------------------------------------------------------------- torchvision's layouts


def write_cifar(root, monkeypatch, payload=None):
    """A small CIFAR-10 in the authors' format, whose checksums torchvision is told."""
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images, sums = pixels(12, 3, 32, 32), {}
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    contents = {
        name: {"data": images[2 * i : 2 * i + 2].reshape(2, -1), "labels": [i, 9 - i]} for i, name in enumerate(names)
    }
    contents["batches.meta"] = {"label_names": list("abcdefghij")}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    if payload is not None:
        (folder / "data_batch_1").write_bytes(pickle.dumps(payload))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    return images


def test_cifar10_in_its_authors_format(tmp_path, monkeypatch):
    images = write_cifar(tmp_path, monkeypatch)
    train, test = load(tmp_path, "train", 32, 3), load(tmp_path, "test")
    assert torch.equal(train.images, torch.from_numpy(images[:10]))
    assert train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert torch.equal(test.images, torch.from_numpy(images[10:]))
    assert test.classes == tuple("abcdefghij")


def test_a_foreign_cifar10_pickle_is_not_loaded(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, payload=Payload(tmp_path / "mark"))
    with pytest.raises(InputError, match="cifar-10-batches-py is incomplete or damaged: download it again"):
        load(tmp_path, "train")
    assert not (tmp_path / "mark").exists()


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


def test_fashion_mnist_in_its_authors_format(tmp_path):
    raw, images = tmp_path / "FashionMNIST" / "raw", pixels(5, 28, 28)
    for name, part in (("train", images[:3]), ("t10k", images[3:])):
        write_idx(raw / f"{name}-images-idx3-ubyte", part)
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(len(part), dtype=np.uint8))
    train, test = load(tmp_path, "train", 28, 1), load(tmp_path, "test")
    assert torch.equal(train.images[:, 0], torch.from_numpy(images[:3]))
    assert (train.labels.tolist(), train.classes[2]) == ([0, 1, 2], "Pullover")
    assert torch.equal(test.images[:, 0], torch.from_numpy(images[3:]))
    with pytest.raises(InputError, match="28x28 pixels instead of 32x32"):
        load(tmp_path, "train", 32)
    (raw / "train-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x03")
    with pytest.raises(InputError, match="FashionMNIST/raw must hold the four unpacked idx files"):
        load(tmp_path, "train")


# ----------------------------------------------------------------------------- real data, where it is at hand


@pytest.fixture
def data_folder():
    if "DMD_TEST_DATA" not in os.environ:
        pytest.skip("DMD_TEST_DATA does not name a folder of real data")
    return Path(os.environ["DMD_TEST_DATA"])


@pytest.fixture
def unpacked(data_folder, tmp_path):
    def unpack(name):
        command = [sys.executable, data_folder / "unpack.py", name, tmp_path / name, "--limit", "1000"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return tmp_path / name

    return unpack


def test_real_fashion_mnist(unpacked, data_folder):
    images = load(unpacked("fashion-mnist"), "test", 28, 1)
    with gzip.open(next((data_folder / "fashion-mnist").glob("t10k-images-*.gz"))) as file:
        expected = np.frombuffer(file.read(16 + 784 * 50), np.uint8, offset=16).reshape(50, 1, 28, 28)
    assert np.array_equal(images.images[:50], expected)


def test_real_cifar10(unpacked):
    images = load(unpacked("cifar10"), "test", 32, 3)
    assert images.classes[:3] == ("airplane", "automobile", "bird")
    published = torch.tensor([0.4914, 0.4822, 0.4465])  # the data set's channel means in [0, 1]
    torch.testing.assert_close(images.images.double().mean((0, 2, 3)) / 255, published.double(), atol=0.02, rtol=0)


def test_the_real_emoji_have_captions_not_classes(unpacked):
    with pytest.raises(InputError, match=r"train holds no CLASS/\*.png"):
        load(unpacked("emoji64"), "train", 64)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_levels_of_large_batches_are_those_of_numpy(layout, rng):
    """More values than are converted at a time, in two memory layouts."""
    x = (1.3 * torch.randn(3, 3, 300, 301, generator=rng)).contiguous(memory_format=layout)
    expected = np.rint((np.clip(x.numpy(), -1, 1) + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    assert np.array_equal(to_uint8(x).numpy(), expected)
