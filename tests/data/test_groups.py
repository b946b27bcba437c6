"""The reader: every image of every caption once, in an order that is known; and nothing of an archive is believed."""

import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from dmd.data import groups, tar
from dmd.data.groups import Broken, ImageGroups, collate
from dmd.errors import InputError


def picture(number, size=(6, 5), mode="RGB", kind="PNG"):
    """Bytes of an image whose first pixel tells its number."""
    array = np.full((size[1], size[0], 3), number % 256, np.uint8)
    array[0, 0] = (number // 256, number % 256, 7)
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)).save(buffer, kind)
    return buffer.getvalue()


def number_of(image):
    return int(image[0, 0, 0]) * 256 + int(image[1, 0, 0])


def archive(path, members, **options):
    """A tar file of (name or TarInfo, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as file:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def sample(number, caption, **facts):
    stem = f"{number:09d}"
    found = [(f"{stem}.png", picture(number)), (f"{stem}.txt", caption.encode())]
    return found + ([(f"{stem}.json", json.dumps({"caption": caption} | facts).encode())] if facts else [])


def dataset(folder, shards=5, captions=6, replicas=3):
    """A data set as this project writes them, with images that know their numbers."""
    table = {}
    for shard in range(shards):
        rows = [
            ((shard * captions + c) * replicas + r, shard * captions + c, r)
            for c in range(captions)
            for r in range(replicas)
        ]
        content = [m for n, c, r in rows for m in sample(n, f"caption {c}", caption_id=c, replica=r)]
        archive(folder / f"{shard:05d}.tar", content)
        table[f"{shard:05d}"] = {"images": len(rows)}
    (folder / "manifest.json").write_text(manifest(table))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """30 captions with 3 images each in 5 shards; image 3 c + r is replica r of caption c."""
    return dataset(tmp_path_factory.mktemp("set"))


# ----------------------------------------------------------------------------- what is read


def test_every_image_comes_with_its_caption(made):
    found = list(ImageGroups(made, 3, shuffle=False))
    assert [i.caption_id for i in found] == list(range(30))
    for item in found:
        assert item.caption == f"caption {item.caption_id}" and item.replicas == (0, 1, 2)
        assert [number_of(x) for x in item.images] == [3 * item.caption_id + r for r in range(3)]
        assert all(x.dtype == torch.uint8 and x.shape == (3, 5, 6) for x in item.images)


def test_an_epoch_has_each_caption_once_and_different_images(made):
    for epoch in range(3):
        found = list(ImageGroups(made, 2, seed=4, epoch=epoch))
        assert sorted(i.caption_id for i in found) == list(range(30))
        for item in found:
            assert len(set(item.replicas)) == 2
            assert [number_of(x) for x in item.images] == [3 * item.caption_id + r for r in item.replicas]


def test_the_order_is_a_function_of_seed_and_epoch(made):
    def order(**options):
        return [(i.caption_id, i.replicas) for i in ImageGroups(made, 2, **options)]

    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert order(seed=1, epoch=2) != order(seed=1, epoch=3) != order(seed=2, epoch=3)


def test_replicas_are_chosen_evenly():
    """Over epochs each of three replicas is in two thirds of the pairs."""
    group = groups.Group("c", 0, tuple((r, groups.Place(Path("none"), 0, 0)) for r in range(3)))
    counts = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "decode", lambda place: torch.zeros(3, 1, 1))
        patch.setattr(groups, "parts", lambda path: [])
        for epoch in range(900):
            counts.update(ImageGroups("x", 2, epoch=epoch)._item(group, 5).replicas)
    assert all(abs(counts[r] - 600) < 5 * (900 * 2 / 9) ** 0.5 for r in range(3))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (7, 0), (1, 2), (2, 2)])
def test_processes_and_workers_share_an_epoch(made, world, workers):
    found = []
    for rank in range(world):
        data = ImageGroups(made, 2, seed=4, epoch=1, rank=rank, world=world)
        batches = DataLoader(data, batch_size=3, collate_fn=list, num_workers=workers) if workers else [data]
        items = [item for batch in batches for item in batch]
        found += [(i.caption_id, i.replicas) for i in items]
    assert sorted(found) == sorted((i.caption_id, i.replicas) for i in ImageGroups(made, 2, seed=4, epoch=1))


@settings(max_examples=50)
@given(st.integers(0, 40), st.integers(1, 9))
def test_shards_are_dealt_out_evenly_and_the_rest_is_cut(count, shares):
    order = list(range(100, 100 + count))
    dealt = [list(groups.dealt(order, share, shares)) for share in range(shares)]
    whole = [[p for p, _, slots in d if slots == 1] for d in dealt]
    assert len({len(w) for w in whole}) == 1 and len({p for w in whole for p in w}) == sum(map(len, whole))
    if shares > 1:
        rest = [[(p, slot) for p, slot, slots in d if slots == shares] for d in dealt]
        assert sorted(p for r in rest for p, _ in r) == sorted(order[count - count % shares :] * shares)
        assert all(slot == i for i, r in enumerate(rest) for _, slot in r)


def test_a_batch_has_one_label_for_equal_captions(made):
    items = list(ImageGroups(made, 2, shuffle=False))[:3]
    batch = collate([items[0], items[1], items[0]])
    assert batch.images.shape == (6, 3, 5, 6) and batch.labels.tolist() == [0, 0, 1, 1, 0, 0]
    assert batch.captions == ["caption 0", "caption 1", "caption 0"]


def test_a_transform_is_applied_to_each_image(made):
    item = next(iter(ImageGroups(made, 2, shuffle=False, transform=lambda x: x.float().mean())))
    assert item.images[1] == pytest.approx(picture_mean(1))


def picture_mean(number):
    return np.asarray(Image.open(io.BytesIO(picture(number)))).mean()


def test_shards_of_others_are_read_by_their_captions(tmp_path):
    """webdataset's and img2dataset's ways: no ids, other members, long names, captions in .txt or .json."""
    long = "d" * 120 + "/000000007"
    content = [
        *sample(3, "a cat"), ("000000003.cls", b"5"), *sample(4, "a dog"), *sample(5, "a cat"),
        ("000000006.jpeg", picture(6, kind="JPEG")), ("000000006.json", b'{"caption": "a dog", "url": "http://x"}'),
        (f"{long}.webp", picture(7, kind="WEBP")), (f"{long}.json", b'{"caption": null}'), (f"{long}.txt", b" a cat "),
    ]  # fmt: skip
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        archive(tmp_path / "x.tar", content, format=form)
        for path in (tmp_path / "x.tar", tmp_path):
            found = list(ImageGroups(path, 1, shuffle=False))
            assert [(i.caption, i.caption_id) for i in found] == [("a cat", None), ("a dog", None)]
        assert [len(g.replicas) for g in groups.shard_groups(tmp_path / "x.tar", None, Broken(0))] == [3, 2]


def test_folders_of_real_images_are_read_by_their_captions(tmp_path):
    (tmp_path / "sub").mkdir()
    for i in range(4):
        (tmp_path / "sub" / f"{i}.png").write_bytes(picture(i))
    rows = [{"file_name": f"sub/{i}.png", "text": ("a cat", "a dog")[i % 2]} for i in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(ImageGroups(tmp_path, 2, shuffle=False))
    assert [(i.caption, [number_of(x) for x in i.images]) for i in found] == [("a cat", [0, 2]), ("a dog", [1, 3])]


def test_real_images_are_read_as_pillow_reads_them():
    root = os.environ.get("DMD_TEST_DATA")
    if not root:
        pytest.skip("DMD_TEST_DATA does not name a folder of real data")
    found = list(Path(root).glob("lpips/examples/*.png"))
    for file in found:
        image = groups.decode(groups.Place(file, 0, file.stat().st_size))
        with Image.open(file) as expected:
            assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.asarray(expected.convert("RGB")).copy()))
    assert found


# ----------------------------------------------------------------------------- what is not believed


def limited(path, limit, m=1):
    data = ImageGroups(path, m, shuffle=False, max_broken=limit)
    return [i.caption for i in data], data.broken


def refused(path, *parts, limit=0):
    with pytest.raises(InputError) as caught:
        limited(path, limit)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


BROKEN = {
    "cut image": [("1.png", picture(1)[:40]), ("1.txt", b"x")],
    "no image": [("1.png", b""), ("1.txt", b"x")],
    "text as image": [("1.jpg", b"hello"), ("1.txt", b"x")],
    "another format": [("1.png", picture(1, kind="BMP")), ("1.txt", b"x")],
    "GIF": [("1.png", picture(1, kind="GIF")), ("1.txt", b"x")],
    "16 bits": [("1.png", picture(1, mode="I;16")), ("1.txt", b"x")],
    "a name of PNG only": [("1.png", b"\x89PNG\r\n\x1a\n"), ("1.txt", b"x")],
    "no caption": [("1.png", picture(1))],
    "empty caption": [("1.png", picture(1)), ("1.txt", b" ")],
    "caption with NUL": [("1.png", picture(1)), ("1.txt", b"a\0b")],
    "caption not UTF-8": [("1.png", picture(1)), ("1.txt", b"\xff\xfe")],
    "json is none": [("1.png", picture(1)), ("1.txt", b"x"), ("1.json", b"{")],
    "deep json": [("1.png", picture(1)), ("1.txt", b"x"), ("1.json", b"[" * 100_000)],
    "caption is a number": [("1.png", picture(1)), ("1.json", b'{"caption": 3}')],
    "altered image": [("1.png", picture(1)), ("1.json", json.dumps({"caption": "x", "sha256": "0" * 64}).encode())],
    "a bomb": [("1.png", picture(1)[:16] + struct.pack(">II", 60_000, 60_000) + picture(1)[24:]), ("1.txt", b"x")],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_counted_up_to_the_limit(tmp_path, name):
    path = archive(tmp_path / "x.tar", [*sample(0, "good"), *BROKEN[name], *sample(2, "also good")])
    captions, broken = limited(path, 1)
    assert captions == ["good", "also good"] and broken.count == 1
    refused(path, "1 images are broken or missing, and 0 are allowed", str(path))


def test_a_broken_replica_is_replaced_by_another(tmp_path):
    content = [*sample(0, "a"), ("1.png", b"?"), ("1.txt", b"a"), *sample(2, "a"), ("3.png", b"?"), ("3.txt", b"b")]
    data = ImageGroups(archive(tmp_path / "x.tar", content), 2, shuffle=False, max_broken=5)
    # "b" has one image only, and it is not even looked at
    assert [(i.caption, i.replicas) for i in data] == [("a", (0, 2))] and data.broken.count == 1


def test_too_few_images_of_a_caption_are_said(made):
    with pytest.raises(InputError, match="at most 3 images of a caption, and 4 were asked for"):
        next(iter(ImageGroups(made, 4)))


@pytest.mark.parametrize("part", [0.0, 0.1, 0.35, 0.5, 0.77, 0.999])
def test_a_cut_shard_is_found_against_the_manifest(tmp_path, part):
    folder = dataset(tmp_path, shards=2)
    path = folder / "00001.tar"
    data = path.read_bytes()
    whole = 18 * 3 * 2 * 512  # members and headers; what follows is padding
    path.write_bytes(data[: int(part * whole)])
    with pytest.raises(InputError, match="00001.tar .*broken or missing|broken or missing.*00001.tar"):
        list(ImageGroups(folder))
    data = ImageGroups(folder, 1, max_broken=18)
    found = list(data)
    assert data.broken.count >= 1 and 6 <= len(found) <= 12


def test_a_cut_shard_without_a_manifest_is_refused(tmp_path):
    path = archive(tmp_path / "x.tar", [m for i in range(9) for m in sample(i, f"caption {i}")])
    path.write_bytes(path.read_bytes()[: 512 * 20 + 100])
    refused(path, "is not a whole .tar file", limit=100)


def test_surplus_images_are_refused(tmp_path):
    folder = dataset(tmp_path, shards=1)
    archive(folder / "00000.tar", [m for i in range(19) for m in sample(i, f"caption {i}")])
    refused(folder, "holds 19 images instead of 18", limit=99)


def manifest(shards=None, kind=groups.KIND, complete=True):
    return json.dumps({"kind": kind, "complete": complete, "shards": shards or {}})


MANIFESTS = {
    "not JSON": ("{", "is damaged"),
    "a list": ("[]", "is damaged"),
    "another": (manifest(kind="x"), "another program"),
    "not complete": (manifest(complete=False), "not complete"),
    "path": (manifest({"../../etc/x": {"images": 1}}), "a shard's name is a number"),
    "negative": (manifest({"00000": {"images": -1}}), "of -1 images"),
    "missing": (manifest({"00007": {"images": 1}}), "00007.tar is missing"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_wrong_manifests_get_a_sentence(tmp_path, name):
    content, sentence = MANIFESTS[name]
    (tmp_path / "manifest.json").write_text(content)
    archive(tmp_path / "00000.tar", sample(0, "x"))
    refused(tmp_path, sentence)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_of_an_archive_runs_or_is_written(tmp_path, monkeypatch):
    """Pickles under every name that webdataset would unpickle, members that lead out, links, devices, commands."""
    monkeypatch.chdir(tmp_path)
    trap, folder = tmp_path / "trap", tmp_path / "set"
    payload = pickle.dumps(Payload(trap))
    link, hard, device, sub = (tarfile.TarInfo(n) for n in ("5.png", "6.png", "7.png", "8.png"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../secret"
    device.type, sub.type = tarfile.CHRTYPE, tarfile.DIRTYPE
    content = [
        *sample(0, "good"), *((f"000000000.{e}", payload) for e in ("pyd", "pickle", "pkl", "pth", "bin", "npy")),
        ("../evil.txt", b"x"), ("../evil.png", picture(1)), ("/tmp/evil2.png", picture(2)), ("/tmp/evil2.txt", b"y"),
        (link, b""), ("5.txt", b"x"), (hard, b""), (device, b""), (sub, b""), ("9.sh", b"#!/bin/sh\nmkdir trap"),
        ("pipe:mkdir trap.png", picture(3)), ("pipe:mkdir trap.txt", b"pipe:mkdir trap"),
    ]  # fmt: skip
    archive(folder / "x.tar", content)
    before = set(tmp_path.rglob("*"))
    found = list(ImageGroups(folder, 1, shuffle=False))
    assert [i.caption for i in found] == ["good", "x", "y", "pipe:mkdir trap"]  # names are no paths
    assert set(tmp_path.rglob("*")) == before and not Path("/tmp/evil2.png").exists()


@pytest.mark.parametrize(
    "path", ["pipe:mkdir trap", "http://127.0.0.1/x.tar", "s3://x/{000..100}.tar", "/dev/null", "a\0b", "", "x.tar"]
)
def test_what_is_no_path_is_not_opened(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path / ".")
    if path == "":
        with pytest.raises(InputError, match="holds neither manifest.json"):
            groups.parts(path)
    elif path == "a\0b":
        with pytest.raises((InputError, ValueError)):
            groups.parts(path)
    else:
        with pytest.raises(InputError, match="is no data set.*URLs and pipes are not opened"):
            groups.parts(path)
    assert not list(tmp_path.iterdir())


def test_metadata_does_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(1))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text('{"file_name": "../secret.png", "text": "x"}')
    refused(folder, "leads out of the folder")


# ----------------------------------------------------------------------------- tar


def test_members_are_those_of_the_standard_library(tmp_path):
    content = [("a.txt", b"1"), ("b" * 150 + ".png", b"22" * 600), ("c/ü.json", b""), ("d.txt", b"x" * 512)]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        some = content if form != tarfile.USTAR_FORMAT else [content[0], *content[2:]]
        path = archive(tmp_path / "x.tar", some, format=form)
        with tarfile.open(path) as file:
            assert [tuple(m) for m in tar.members(path)] == [(m.name, m.offset_data, m.size) for m in file]
        data = path.read_bytes()
        assert [data[m.offset : m.offset + m.size] for m in tar.members(path)] == [c for _, c in some]


def test_every_cut_is_seen(tmp_path):
    path = archive(tmp_path / "x.tar", [("a.txt", b"1" * 700), ("b.txt", b"2")])
    data = path.read_bytes()
    for length in (*range(0, 5 * 512, 97), 512, 1536, 2048, 2560 - 1):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match="is not a whole .tar file"):
            list(tar.members(path))
    path.write_bytes(data[: 6 * 512])  # members and one empty block
    assert len(list(tar.members(path))) == 2


def header(size, kind=b"0"):
    """A header whose size is any number, with its right checksum."""
    info = tarfile.TarInfo("a.txt")
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = size
    raw[156:157] = kind
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


@pytest.mark.parametrize(
    "size", [b"\xff" * 12, b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"77777777777\0", b"99999999999\0", b"-0000000001\0"]
)
@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"S", b"5"])
def test_impossible_sizes_are_refused_at_once(tmp_path, size, kind):
    """Negative ones would go round for ever, large ones fill the memory."""
    path = tmp_path / "x.tar"
    path.write_bytes(header(size, kind) + bytes(1024))
    with pytest.raises(InputError):
        list(tar.members(path))


def test_a_large_extended_header_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(header(b"%011o\0" % 2**17, b"x") + bytes(2**17) + bytes(1024))
    with pytest.raises(InputError, match="an extended header claims 131072 bytes"):
        list(tar.members(path))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_read_or_refused(tmp_path, data):
    """Random bytes over a shard: images, counted faults, or one sentence; never another error."""
    path = archive(tmp_path / "x.tar", [m for i in range(3) for m in sample(i, f"c{i}", caption_id=i)])
    content = bytearray(path.read_bytes()[: 512 * 20])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.binary(min_size=1, max_size=20))
        content[place : place + len(new)] = new
    path.write_bytes(bytes(content))
    try:
        assert len(list(ImageGroups(path, 1, max_broken=9))) <= 4
    except InputError as error:
        assert "\n" not in str(error)


def test_known_sums_are_those_of_the_bytes(tmp_path):
    data = picture(3)
    facts = {"caption": "x", "sha256": hashlib.sha256(data).hexdigest()}
    path = archive(tmp_path / "x.tar", [("1.png", data), ("1.json", json.dumps(facts).encode())])
    assert limited(path, 0)[0] == ["x"]
