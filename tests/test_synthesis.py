"""Synthesis: whoever makes a shard, and however often they are killed, its bytes are the same."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import tarfile
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stub import CAPTIONS, Noting, job, slow_stub, spec, stub

from dmd import shards, synthesis
from dmd.data import groups
from dmd.data.images import to_uint8
from dmd.errors import InputError
from dmd.generate import REPLICAS


def content(folder):
    """SHA-256 of all that is a function of the spec, and the manifest."""
    files = [*folder.glob("*.tar"), *folder.glob("*.parquet"), folder / "manifest.json"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A data set that one worker made without a break: 120 images in 10 shards."""
    folder = tmp_path_factory.mktemp("whole")
    assert synthesis.work(job(folder)).made == 120
    return folder


def test_images_are_the_sources_and_lie_by_caption(whole):
    """Read with the standard library and Pillow alone: names, captions, facts, and the pixels up to JPEG's loss."""
    names = []
    for number in range(10):
        with tarfile.open(whole / f"{number:05d}.tar") as archive:
            names += [(m.name, m.mtime, m.uname, m.mode) for m in archive]
            for i in range(number * 12, number * 12 + 12):
                stem = f"{number:05d}{i % 12:02d}"
                caption, replica = CAPTIONS[i // 4], i % 4
                facts = json.loads(archive.extractfile(f"{stem}.json").read())
                data = archive.extractfile(f"{stem}.jpg").read()
                assert archive.extractfile(f"{stem}.txt").read().decode() == caption == facts["caption"]
                assert (facts["caption_id"], facts["replica"], facts["epoch"], facts["seed"]) == (i // 4, replica, 0, 5)
                assert facts["sha256"] == hashlib.sha256(data).hexdigest() and facts["key"] == stem
                with Image.open(archive.extractfile(f"{stem}.jpg")) as image:
                    found = np.asarray(image).astype(float)
                wanted = to_uint8(stub([caption], torch.tensor([i // 4 * REPLICAS + replica]), 0))[0]
                assert np.abs(found - wanted.permute(1, 2, 0).numpy()).mean() < 8
    wanted = [f"{i // 12:05d}{i % 12:02d}.{e}" for i in range(120) for e in ("jpg", "txt", "json")]
    assert names == [(name, 0, "", 0o644) for name in wanted]


def test_tables_and_stats_agree_with_the_images(whole):
    from pyarrow import parquet

    rows = [row for i in range(10) for row in parquet.read_table(whole / f"{i:05d}.parquet").to_pylist()]
    assert [(r["caption_id"], r["replica"]) for r in rows] == [divmod(i, 4) for i in range(120)]
    assert {r["status"] for r in rows} == {"success"} and {r["width"] for r in rows} == {16}
    stats = json.loads((whole / "00003_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (12, 12, {"success": 12})
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["complete"] and manifest["counts"] == {
        "captions": 30, "replicas": 4, "shards": 10, "images": 120, "dropped": 0,
    }  # fmt: skip
    for shard in manifest["shards"].values():
        for name, facts in shard["files"].items():
            data = (whole / name).read_bytes()
            assert facts == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_webdataset_reads_the_shards(whole):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(p) for p in sorted(whole.glob("*.tar"))]
    found = [s["txt"].decode() for s in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)]
    assert found == [CAPTIONS[i // 4] for i in range(120)]


def test_names_are_img2datasets():
    """5 digits of the shard and 4 of the sample, of shards of 10,000; both grow where that is too few."""
    large = spec(count=600_000_000, shard_size=10_000, replicas=1)
    assert (large.name(0), large.key(12_345)) == ("00000", "000012345")
    assert (large.name(59_999), large.key(599_999_999)) == ("59999", "599999999")
    larger = spec(count=2_000_000, shard_size=10, replicas=1)
    assert (larger.name(7), larger.key(1_999_999)) == ("000007", "1999999")


def test_work_units_do_not_depend_on_the_worker(tmp_path):
    """Batches begin with their shard and are filled up, so a network sees the same ones in every run."""
    calls = []
    synthesis.work(job(tmp_path, Noting(calls)))
    assert {len(c) for c in calls} == {5}
    number = [i // 4 * REPLICAS + i % 4 for i in range(120)]
    assert calls[:3] == [number[0:5], number[5:10], [*number[10:12], *[number[11]] * 3]]
    assert calls[3][0] == number[12]


def test_encoders_and_workers_do_not_change_a_byte(whole, tmp_path):
    synthesis.work(job(tmp_path / "threads", encoders=4))
    for worker in (2, 0, 3, 1):
        synthesis.work(job(tmp_path / "four"), worker, 4)
    assert content(tmp_path / "threads") == content(tmp_path / "four") == content(whole)


def worker(folder, number, count):
    torch.set_num_threads(1)
    synthesis.work(job(folder, slow_stub), number, count)


def run(folder, count):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=worker, args=(folder, i, count)) for i in range(count)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.parametrize("count", [1, 2, 4])
def test_workers_killed_at_random_moments_leave_no_hole_and_no_duplicate(whole, tmp_path, count):
    rng, hits = random.Random(count), 0
    for _ in range(4):
        before = len(list(tmp_path.glob("*.tar")))
        processes = run(tmp_path, count)
        while len(list(tmp_path.glob("*.tar"))) == before and any(p.is_alive() for p in processes):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
            hits += process.exitcode == -signal.SIGKILL
        for path in tmp_path.glob("*.tar"):  # whatever has a name is whole
            assert path.read_bytes() == (whole / path.name).read_bytes()
    assert hits > 0
    for process in run(tmp_path, count):
        process.join()
        assert process.exitcode == 0
    assert content(tmp_path) == content(whole)
    assert not list(tmp_path.glob(".tmp-*"))
    found = [(i.caption_id, i.replicas) for i in groups.ImageGroups(tmp_path, 4, shuffle=False)]
    assert found == [(c, (0, 1, 2, 3)) for c in range(30)]


def copy(source, target):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def cut(path):
    path.write_bytes(path.read_bytes()[:-700])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "cut": (cut, "00004.tar"), "one bit": (flip, "00004.tar"), "gone": (Path.unlink, "00004.tar"),
    "empty": (lambda p: p.write_bytes(b""), "00004.tar"), "table cut": (cut, "00004.parquet"),
    "table bit": (flip, "00004.parquet"), "stats cut": (cut, "00004_stats.json"),
    "stats gone": (Path.unlink, "00004_stats.json"), "stats a list": (lambda p: p.write_text("[]"), "00004_stats.json"),
    "another shard's": (lambda p: p.write_bytes((p.parent / "00005.tar").read_bytes()), "00004.tar"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_shard_is_found_and_made_again_alone(whole, tmp_path, name):
    folder = copy(whole, tmp_path / "set")
    damage, file = DAMAGE[name]
    damage(folder / file)
    calls = []
    assert synthesis.work(job(folder, Noting(calls))).made == 12
    assert len(calls) == 3 and content(folder) == content(whole)
    assert synthesis.work(job(folder, Noting(calls))).made == 0 and len(calls) == 3


@pytest.mark.slow
def test_every_bit_of_a_shard_counts(whole, tmp_path):
    """200 random flips and cuts in all files of a shard: all found."""
    folder, rng = copy(whole, tmp_path / "set"), random.Random(0)
    digest = spec().digest()
    for _ in range(200):
        path = folder / rng.choice(["00002.tar", "00002.parquet"])
        data = path.read_bytes()
        place = rng.randrange(len(data))
        altered = (
            data[:place]
            if rng.random() < 0.5
            else data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        )
        path.write_bytes(altered)
        assert shards.whole(folder, "00002", digest, deep=True) is None
        path.write_bytes(data)
    assert shards.whole(folder, "00002", digest, deep=True) is not None


def test_another_spec_or_other_files_are_refused_and_kept(whole, tmp_path):
    before = content(whole)
    with pytest.raises(InputError, match="images with seed = 5, but 6 is asked for: give another --out"):
        synthesis.work(job(whole, seed=6))
    with pytest.raises(InputError, match='captions = "abc", but "def"'):
        synthesis.open_folder(whole, spec(captions="def"))
    assert content(whole) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds 'notes.txt' and no manifest.json"):
        synthesis.work(job(tmp_path))
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["notes.txt"]
    with pytest.raises(InputError, match="is a file"):
        synthesis.work(job(tmp_path / "notes.txt"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"spec": {}, "kind": "else"}')
    with pytest.raises(InputError, match="of another program"):
        synthesis.work(job(tmp_path / "other"))


def hold(folder, number, ready, done):
    with synthesis.Locks(synthesis.lock_path(folder)) as locks:
        assert locks.take(number)
        ready.set()
        done.wait(60)


def test_two_jobs_on_one_folder_share_it(whole, tmp_path):
    """What another process holds is left to it; the last to finish completes the data set."""
    synthesis.open_folder(tmp_path, spec())
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, 3, ready, done))
    process.start()
    assert ready.wait(60)
    outcome = synthesis.work(job(tmp_path))
    assert (outcome.made, outcome.busy, outcome.shards) == (108, 1, None) and not (tmp_path / "00003.tar").exists()
    with pytest.raises(InputError, match="not complete"):
        groups.ImageGroups(tmp_path)
    done.set()
    process.join()
    assert synthesis.work(job(tmp_path)).made == 12 and content(tmp_path) == content(whole)


def fill(folder, limit, answer):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        synthesis.work(job(folder))
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        answer.write_text(f"{errno.errorcode[error.errno]} {error.filename}")


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_in_mid_shard_is_named_and_what_was_whole_stays(whole, disk):
    with pytest.raises(OSError) as caught:
        synthesis.work(job(disk / "set"))
    assert caught.value.errno == errno.ENOSPC and str(disk / "set") in str(caught.value.filename)
    kept = sorted(p.name for p in (disk / "set").glob("*_stats.json"))
    assert kept and not list((disk / "set").glob(".tmp-*"))
    for name in kept:
        tar = f"{name[:5]}.tar"
        assert (disk / "set" / tar).read_bytes() == (whole / tar).read_bytes()


def test_a_file_that_cannot_grow_is_named(tmp_path):
    """The same without a disk of its own: files are limited to less than a shard."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=fill, args=(tmp_path / "set", 20_000, tmp_path / "answer"))
    process.start()
    process.join()
    assert (tmp_path / "answer").read_text() == f"EFBIG {tmp_path / 'set' / '00000.tar'}"
    assert {p.name for p in (tmp_path / "set").iterdir()} == {"manifest.json", ".lock"}


def test_an_error_of_the_source_leaves_nothing_half_made(whole, tmp_path):
    def broken(captions, numbers, epoch):
        if numbers[0] >= 12 * REPLICAS:
            raise RuntimeError("out of memory")
        return stub(captions, numbers, epoch)

    with pytest.raises(RuntimeError, match="out of memory"):
        synthesis.work(job(tmp_path, broken))
    assert not list(tmp_path.glob(".tmp-*")) and len(list(tmp_path.glob("*.tar"))) <= 4
    synthesis.work(job(tmp_path))
    assert content(tmp_path) == content(whole)


def test_images_that_are_not_finite_are_not_written(tmp_path):
    def nan(captions, numbers, epoch):
        x = stub(captions, numbers, epoch)
        x[numbers == 2 * REPLICAS + 1] = float("nan")
        return x

    with pytest.raises(ArithmeticError, match="image 0000009, of 'caption 2 .* is not finite"):
        synthesis.work(job(tmp_path, nan))
    assert not list(tmp_path.glob("*.tar"))


def test_images_are_resized_on_their_device_and_say_from_what(tmp_path):
    synthesis.work(job(tmp_path, pixels=8, image_format="png"))
    item = next(iter(groups.ImageGroups(tmp_path, 1, shuffle=False)))
    wanted = torch.nn.functional.interpolate(
        stub(CAPTIONS[:1], torch.tensor([0]), 0), (8, 8), mode="bicubic", antialias=True
    )
    assert torch.equal(item.images[0], to_uint8(wanted)[0])  # PNG loses nothing
    with tarfile.open(tmp_path / "00000.tar") as archive:
        facts = json.loads(archive.extractfile("0000000.json").read())
    assert [facts[k] for k in ("width", "height", "original_width", "original_height")] == [8, 8, 16, 16]


@pytest.mark.parametrize("image_format", ["jpg", "webp", "png"])
def test_formats_come_back_as_what_they_are(tmp_path, image_format):
    synthesis.work(job(tmp_path, image_format=image_format, count=3))
    found = list(groups.ImageGroups(tmp_path, 4, shuffle=False))
    assert len(found) == 3
    loss = {"jpg": 8, "webp": 12, "png": 0}[image_format]
    for item in found:
        numbers = torch.arange(4) + item.caption_id * REPLICAS
        wanted = to_uint8(stub([item.caption] * 4, numbers, 0)).float()
        assert (torch.stack(item.images) - wanted).abs().mean() <= loss


def test_grey_images_stay_grey(tmp_path):
    synthesis.work(job(tmp_path, lambda c, n, e: stub(c, n, e)[:, :1], count=3, image_format="png"))
    assert next(iter(groups.ImageGroups(tmp_path))).images[0].shape == (1, 16, 16)


def score(images, captions):
    """A number in [0, 1) of each image."""
    return (images.double().mean((1, 2, 3)) * 1000) % 1.0


def test_a_filter_leaves_images_out_and_the_table_says_so(tmp_path):
    from pyarrow import parquet

    keep = synthesis.Filter(score, 0.5)
    changes = {"dropping": {"clip": "x", "at_least": 0.5}}
    outcome = synthesis.work(job(tmp_path / "a", keep=keep, **changes))
    for number in (1, 0):
        synthesis.work(job(tmp_path / "b", keep=keep, **changes), number, 2)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    rows = [row for i in range(10) for row in parquet.read_table(tmp_path / "a" / f"{i:05d}.parquet").to_pylist()]
    numbers = torch.tensor([r["caption_id"] * REPLICAS + r["replica"] for r in rows])
    wanted = score(stub([r["caption"] for r in rows], numbers, 0), None)
    assert [r["clip_score"] for r in rows] == pytest.approx(wanted.tolist())
    kept = [r for r in rows if r["status"] == "success"]
    assert [r for r in rows if r["clip_score"] >= 0.5] == kept and 20 < len(kept) < 100
    assert sum(s.images for s in outcome.shards.values()) == len(kept)
    read = [(i.caption_id, i.replicas[0]) for i in groups.ImageGroups(tmp_path / "a", 1, shuffle=False)]
    assert read == list({r["caption_id"]: (r["caption_id"], r["replica"]) for r in reversed(kept)}.values())[::-1]


def test_the_contact_sheet_shows_rows_of_captions(whole):
    synthesis.contact_sheet(whole, spec())
    with Image.open(whole / "contact_sheet.png") as image:
        assert image.size == (4 * (4 * 17 + 1), 4 * 12 * 18)
        assert image.text["rows"].split(" | ")[0] == CAPTIONS[0]


def test_memory_does_not_grow_with_images(tmp_path, monkeypatch):
    """Between the device and the disk lie a few batches at most, however slow the disk is."""
    made = gone = most = 0
    real = shards.encode

    def collected():
        nonlocal gone
        gone += 1

    def source(captions, numbers, epoch):
        nonlocal made, most
        x = stub(captions, numbers, epoch)
        weakref.finalize(x, collected)
        made += 1
        most = max(most, made - gone)
        return x

    def slow(*values):
        time.sleep(0.002)
        return real(*values)

    monkeypatch.setattr(shards, "encode", slow)
    synthesis.work(job(tmp_path, source))
    assert made == 30 and most <= synthesis.WAITING + 4


def test_the_background_raises_its_first_error_and_leaves_the_rest_out():
    done = []

    def fail():
        raise ValueError("first")

    backlog = synthesis.Backlog(2)
    backlog.put(lambda: done.append(1))
    with pytest.raises(ValueError, match="first"):
        for task in (fail, lambda: time.sleep(0.01), lambda: done.append(2), lambda: done.append(3)):
            backlog.put(task)
        backlog.wait()
    with contextlib.suppress(ValueError):
        backlog.put(lambda: done.append(4))
    backlog.close()
    assert done == [1]


def test_locks_end_with_their_process(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, 7, ready, done))
    process.start()
    assert ready.wait(60)
    with synthesis.Locks(synthesis.lock_path(tmp_path)) as locks:
        assert not locks.take(7) and locks.take(8) and locks.work
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert locks.take(7)


def test_an_actor_makes_the_shards_it_is_given_and_says_what_is_wrong(whole, tmp_path):
    """Ray's worker without Ray: it checks, makes what is not whole, and returns a sentence instead of an error."""
    synthesis.open_folder(tmp_path / "a", spec())
    actor = synthesis.RayWorker(lambda: job(tmp_path / "a"))
    for numbers, made in (([3, 4], 24), ([4], 0), ([0], 12)):
        assert actor({"shard": np.array(numbers)}) == {"images": [made], "error": [""]}
    assert synthesis.missing(tmp_path / "a", spec()) == [1, 2, 5, 6, 7, 8, 9]
    flip(tmp_path / "a" / "00003.tar")
    assert synthesis.missing(tmp_path / "a", spec())[2] == 3
    assert actor({"shard": np.array([3])})["images"] == [12]
    assert (tmp_path / "a" / "00003.tar").read_bytes() == (whole / "00003.tar").read_bytes()
    nan = synthesis.RayWorker(lambda: job(tmp_path / "a", lambda c, n, e: stub(c, n, e) * float("nan")))
    answer = nan({"shard": np.array([9])})
    assert answer["images"] == [0] and "is not finite" in answer["error"][0]
