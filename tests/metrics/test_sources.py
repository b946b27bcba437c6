"""Sources: every layout gives the pixels that were written, in order, and every wrong input its sentence."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from dmd.errors import InputError
from dmd.metrics.sources import Arrays, groups, read


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def everything(source, size=3):
    batches = list(source.batches(size))
    assert all(len(b) == size for b in batches[:-1])
    return [image for batch in batches for image in batch]


def refused(what, *parts):
    with pytest.raises(InputError) as caught:
        what()
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in parts:
        assert str(part) in sentence
    return sentence


@pytest.fixture
def folder(tmp_path):
    images = [pixels(9, 7, 3, seed=i) for i in range(7)]
    for i, image in enumerate(images):
        write(tmp_path / "images" / f"{i}.png", encoded(image))
    return tmp_path / "images", images


def test_a_folder_gives_its_images_in_the_order_of_their_names(folder):
    path, images = folder
    write(path / "notes.md", "not an image")
    write(path / ".hidden.png", "not shown")
    source = read(path)
    assert len(source) == 7
    for a, b in zip(everything(source), images, strict=True):
        assert (a == b).all()
    assert source.where(2) == str(path / "2.png")
    assert groups(source) is None


def test_folders_in_a_folder_are_classes(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        write(tmp_path / name, encoded(pixels(4, 4, 3)))
    assert groups(read(tmp_path)).tolist() == [0, 0, 1]


def test_captions_come_from_metadata(folder):
    path, images = folder
    rows = [{"file_name": f"{i}.png", "text": f"number {i % 2}"} for i in (5, 0, 1)]
    write(path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    source = read(path)
    assert list(source.captions) == ["number 1", "number 0", "number 1"]
    assert groups(source).tolist() == [0, 1, 0]
    assert [(a == images[i]).all() for a, i in zip(everything(source), (5, 0, 1), strict=True)] == [True] * 3


def test_tars_give_images_and_captions(tmp_path):
    images = [pixels(6, 5, 3, seed=i) for i in range(4)]
    first = [("0.png", encoded(images[0])), ("0.txt", b"a cat"), ("0.json", b'{"x": 1}')]
    second = [("1.json", b'{"caption": "a dog"}'), ("1.png", encoded(images[1]))]
    shard(tmp_path / "b.tar", [("2.webp", encoded_lossless(images[2])), ("2.txt", b"a cat"), ("2.pyd", b"evil")])
    shard(tmp_path / "a.tar", first + second)
    source = read(tmp_path)
    assert list(source.captions) == ["a cat", "a dog", "a cat"]
    for a, b in zip(everything(source), images[:3], strict=True):
        assert (a == b).all()
    assert "a.tar, member '1.png'" in source.where(1)


def encoded_lossless(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def test_captions_that_are_not_all_there_are_none(tmp_path):
    path = shard(
        tmp_path / "a.tar",
        [("0.png", encoded(pixels(4, 4, 3))), ("0.txt", b"a"), ("1.png", encoded(pixels(4, 4, 3)))],
    )
    assert read(path).captions is None


@pytest.mark.parametrize("key", ["images", "arr_0"])
def test_npz_files_of_both_habits(tmp_path, key):
    images = pixels(5, 4, 4, 3)
    np.savez(tmp_path / "x.npz", **{key: images}, labels=np.array([1, 1, 0, 2, 2]))
    source = read(tmp_path / "x.npz")
    assert (np.stack(everything(source, 2)) == images).all()
    assert groups(source).tolist() == [1, 1, 0, 2, 2]


def test_parts_are_the_same_images(folder, tmp_path):
    path, images = folder
    part = read(path).select([1, 4, 6])
    assert [(a == images[i]).all() for a, i in zip(everything(part), (1, 4, 6), strict=True)] == [True] * 3
    array = Arrays("x", np.stack(images), torch.arange(7), tuple("abcdefg")).select([0, 3])
    assert (array.labels.tolist(), array.captions) == ([0, 3], ("a", "d"))
    assert (array.images == np.stack([images[0], images[3]])).all()


def test_a_digest_is_of_the_content_alone(folder, tmp_path):
    path, images = folder
    other = tmp_path / "elsewhere"
    for i, image in enumerate(images):
        write(other / f"x{i}.png", encoded(image))
    assert read(path).digest() == read(other).digest()
    parts = b"".join(hashlib.sha256((path / f"{i}.png").read_bytes()).digest() for i in range(7))
    assert read(path).digest() == hashlib.sha256(parts).hexdigest()
    changed = images[3].copy()
    changed[0, 0, 0] ^= 1
    write(other / "x3.png", encoded(changed))
    assert read(path).digest() != read(other).digest()
    assert read(path).select([0, 1]).digest() != read(path).select([1, 0]).digest()


def test_grey_and_opaque_images_are_read_and_transparent_ones_refused(tmp_path):
    write(tmp_path / "a.png", encoded(pixels(4, 4)))
    rgba = pixels(4, 4, 4, seed=1)
    rgba[..., 3] = 255
    write(tmp_path / "b.png", encoded(rgba))
    grey, opaque = everything(read(tmp_path))
    assert grey.shape == (4, 4, 1) and (opaque == rgba[..., :3]).all()
    rgba[0, 0, 3] = 128
    write(tmp_path / "c.png", encoded(rgba))
    refused(lambda: everything(read(tmp_path)), tmp_path / "c.png", "transparent", "background")


def test_broken_images_are_named(folder, tmp_path):
    path, _ = folder
    whole = encoded(pixels(64, 64, 3), "JPEG")
    write(path / "8.jpg", whole[: len(whole) // 2])
    refused(lambda: everything(read(path)), path / "8.jpg", "not a readable")
    write(path / "8.jpg", b"text")
    refused(lambda: everything(read(path)), path / "8.jpg", "of no known kind")


def test_wrong_places_are_named(tmp_path):
    refused(lambda: read(tmp_path / "nothing"), tmp_path / "nothing", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(lambda: read(tmp_path / "empty"), "empty holds no image", "tar")
    refused(lambda: read(write(tmp_path / "x.zip", b"")), "x.zip is of no known kind")
    refused(lambda: read(shard(tmp_path / "x.tar", [("0.txt", b"a")])), "x.tar holds no image")
    np.savez(tmp_path / "y.npz", latents=np.zeros(3))
    refused(lambda: read(tmp_path / "y.npz"), "y.npz holds latents", "'images' or 'arr_0'")
    np.savez(tmp_path / "z.npz", images=np.zeros((2, 4, 4, 3)))
    refused(lambda: read(tmp_path / "z.npz"), "must be uint8 (N, H, W, 1 or 3), not float64")
    np.savez(tmp_path / "w.npz", images=np.array([{}], dtype=object))
    refused(lambda: read(tmp_path / "w.npz"), "w.npz is not a readable .npz file")
    np.savez(tmp_path / "v.npz", images=pixels(2, 4, 4, 3), labels=np.zeros(3, dtype=np.int64))
    refused(lambda: read(tmp_path / "v.npz"), "'labels' must be 2 integers")
    write(tmp_path / "m" / "metadata.jsonl", json.dumps({"file_name": "../x.png", "text": "a"}))
    refused(lambda: read(tmp_path / "m"), "line 1", "leads out of the folder")
    write(tmp_path / "m" / "metadata.jsonl", json.dumps({"file_name": "x.png", "text": "a"}))
    refused(lambda: read(tmp_path / "m"), "line 1", "x.png", "does not exist")


def test_cut_tars_are_refused(tmp_path):
    path = shard(tmp_path / "x.tar", [(f"{i}.png", encoded(pixels(20, 20, 3, seed=i))) for i in range(5)])
    content = path.read_bytes()
    write(path, content[:3000])
    refused(lambda: read(path), path, "not a whole .tar file")
    damaged = bytearray(content)
    damaged[512 + 1536 : 512 + 1546] = b"\1" * 10
    write(path, bytes(damaged))
    with pytest.raises(InputError):
        everything(read(path))


def test_links_in_tars_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    refused(lambda: read(tmp_path / "x.tar"), "holds no image")


def test_a_data_set_of_ours_must_be_whole(tmp_path):
    """What its manifest says against what is there: the images, or a sentence."""
    import stub

    from dmd import synthesis

    job = stub.job(tmp_path / "set")
    synthesis.work(job)
    source = read(job.folder)
    assert len(source) == 120 and len(set(source.captions)) == 30
    manifest = (job.folder / "manifest.json").read_text()
    (job.folder / "manifest.json").write_text(manifest.replace('"complete": true', '"complete": false'))
    refused(lambda: read(job.folder), "not complete")
    (job.folder / "manifest.json").write_text(manifest)
    members = [(f"{i}.png", encoded(pixels(4, 4, 3, seed=i))) for i in range(3)]
    shard(job.folder / "00002.tar", members)
    refused(lambda: read(job.folder), "holds 111 images", "says 120")
    (job.folder / "00002.tar").unlink()
    refused(lambda: read(job.folder), "00002.tar is missing")
