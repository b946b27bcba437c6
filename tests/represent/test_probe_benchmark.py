"""The parts of `benchmarks.representation` that have no network in them."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from benchmarks import representation as bench
from dmd.data.images import ImageSet
from dmd.errors import InputError
from dmd.settings import require_same, to_json


def test_captions_say_in_which_half_of_its_class_an_image_is():
    levels = torch.tensor([10, 20, 30, 40, 200, 210, 220, 230])
    pixels = levels.reshape(8, 1, 1, 1).expand(8, 1, 2, 2).to(torch.uint8)
    found = ImageSet(pixels, torch.arange(8) // 4, ("cat", "dog"))
    other = torch.tensor([1.0, 5, 2, 6, 3, 7, 4, 8])
    real = bench.described(found, [(bench.brightness(found), ("dark", "light")), (other, ("low", "high"))])
    said = [real.data.classes[label] for label in real.data.labels]
    assert said[:4] == ["dark low cat", "dark high cat", "light low cat", "light high cat"]
    assert said[4:] == ["dark low dog", "dark high dog", "light low dog", "light high dog"]
    assert [real.classes[real.of_caption[label]] for label in real.data.labels] == ["cat"] * 4 + ["dog"] * 4
    assert {t.replace("{}", "cat") for t in real.templates} == set(said[:4])
    flat = bench.described(found, [(torch.zeros(8), ("dark", "light"))])
    assert flat.data.labels.bincount().tolist() == [
        2,
        2,
        2,
        2,
    ]  # a number that is the same for all divides all the same


def test_shapes_are_single_things_with_their_class():
    real = bench.drawn_shapes(None, True)
    assert len(set(real.data.classes)) == len(real.of_caption) == 24 and len(real.data) == 120
    for caption, c in zip(real.data.classes, real.of_caption, strict=True):
        assert real.classes[c] in caption
    assert not torch.equal(real.data.images[0], real.data.images[1])


def test_of_flags_that_come_twice_the_last_counts():
    assert bench.merged(["--a", "1", "--b", "--a", "2", "3"]) == ["--b", "--a", "2", "3"]


REAL = {name: cache(bench.WORLDS[name].real) for name in ("digits", "shapes")}


def experiment(tmp_path, letter, monkeypatch, world="digits"):
    """Its arms by name, with what they are given of settings, and no network run."""
    made = bench.Bench(world, replace(bench.WORLDS[world], real=REAL[world]), tmp_path, tmp_path, False)

    def synthetic(self, name, replicas, *flags):
        captions = self.real.data.classes
        labels = torch.arange(len(captions)).repeat_interleave(replicas)
        pixels = torch.zeros(len(labels), *self.real.data.shape, dtype=torch.uint8)
        return self.stored(name, lambda: ImageSet(pixels, labels, captions))

    monkeypatch.setattr(bench.Bench, "synthetic", synthetic)
    monkeypatch.setattr(bench.Bench, "student", lambda self: "shapes-student")
    monkeypatch.setattr(bench.Bench, "learnt", lambda *a: {})
    monkeypatch.setattr(bench.features, "load", lambda name: None)
    monkeypatch.setattr(bench.features, "features", lambda source, *a: torch.eye(len(source))[:, :8])
    monkeypatch.setattr(bench, "diversity", lambda x, labels: float(len(labels)))
    return {name: (arm, arm.config(0)) for name, arm in bench.EXPERIMENTS[letter](made).items()}


def seen(config):
    """Updates, and images in each."""
    return config.learn.max_train_steps, config.data.captions_per_batch * config.data.per_caption


@pytest.mark.parametrize("world", ["digits", "shapes"])
def test_fresh_and_stored_images_are_seen_alike(tmp_path, monkeypatch, world):
    (_, stored), (_, fresh) = experiment(tmp_path, "b", monkeypatch, world).values()
    assert fresh.data.online and not stored.data.online and fresh.data.data is None
    assert seen(stored) == seen(fresh) and stored.data.captions_per_batch == fresh.data.captions_per_batch
    assert stored.data.data == str(tmp_path / "shards" / "student-10")  # as shards: each caption once in an epoch
    rest = ("data", "captions", "student", "online", "output_dir", "workers")
    require_same(stored, fresh, rest, "")


@pytest.mark.parametrize("world", ["digits", "shapes"])
def test_real_images_are_two_and_a_half_times_as_many(tmp_path, monkeypatch, world):
    arms = experiment(tmp_path, "c", monkeypatch, world)
    counts = [int(name.split()[1].replace(",", "")) for name in arms]
    assert counts[0] == counts[1] == counts[2] and counts[3] == pytest.approx(2.5 * counts[0], rel=0.01)
    assert {seen(config) for _, config in arms.values()} == {(200, 256)}
    from dmd.data import images

    sizes = [len(images.load(config.data.data, "train")) for _, config in arms.values()]
    assert sizes == counts


@pytest.mark.parametrize("world", ["digits", "shapes"])
def test_m_and_guidance_are_compared_at_equal_images(tmp_path, monkeypatch, world):
    arms = experiment(tmp_path, "d", monkeypatch, world)
    assert [config.data.per_caption for _, config in arms.values()] == [2, 4, 8, 4, 4, 4, 4]
    captions = {"digits": 20, "shapes": 600}[world]
    assert {seen(config) for _, config in arms.values()} == {(200, min(256, 2 * captions))}
    for arm, config in arms.values():
        assert config.data.captions_per_batch <= captions and "shards" in config.data.data
        assert arm.beside["diversity"] >= config.data.per_caption * captions  # of all images of the set


def test_a_run_with_other_settings_is_not_taken_for_the_same(tmp_path, monkeypatch):
    arms = experiment(tmp_path, "b", monkeypatch)
    arm, config = arms["10 stored images of a caption"]
    assert not arm.done(0)
    run = tmp_path / "runs" / "b-stored-0"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(to_json(config)))
    (run / "summary.json").write_text("{}")
    assert arm.done(0) and not arm.done(1)
    longer = replace(arm, bench=replace(arm.bench, learn=("--max-train-steps", "300")))
    with pytest.raises(InputError, match="max_train_steps was 200, now 300"):
        longer.done(0)
    with pytest.raises(InputError, match="data was .*, now 'elsewhere'"):
        replace(arm, flags=(*arm.flags, "--data", "elsewhere")).done(0)
    with pytest.raises(InputError, match="max_train_steps was 200"):
        bench.measured({"one": longer}, [0])


def test_the_time_that_is_left_is_that_of_earlier_seeds():
    assert bench.time_left({"a": [10.0, 14.0], "b": [60.0]}, ["a", "b", "b", "c"]) == 12 + 60 + 60 + 28
    assert bench.time_left({"a": [10.0]}, []) == 0


def test_a_table_over_seeds():
    found = bench.summarised({"arm": [{"linear": 0.5}, {"linear": 0.7}, {"linear": 0.9}]})
    row = found["arm"]["linear"]
    assert (row["low"], row["high"]) == (0.5, 0.9)
    assert row["mean"] == pytest.approx(0.7) and row["std"] == pytest.approx(np.std([0.5, 0.7, 0.9], ddof=1))
    assert bench.summarised({"arm": [{"linear": 0.5}]})["arm"]["linear"]["std"] == 0
    assert list(bench.summarised({"arm": [{"linear": 0.5, "RankMe": 3.0}, {"linear": 0.5}]})["arm"]) == ["linear"]


def test_a_target_is_met_or_missed(tmp_path):
    def row(value):
        return {"linear": {"mean": value}}

    near = {"StableRep, teacher": row(0.90), "StableRep, student": row(0.892), "SimCLR, student": row(0.80)}
    far = near | {"StableRep, student": row(0.70)}
    world = bench.Bench("digits", bench.WORLDS["digits"], tmp_path, tmp_path, True)
    assert [v["met"] for v in bench.verdicts(world, near)] == [True, True]
    assert [v["met"] for v in bench.verdicts(world, far)] == [False, False]
    assert bench.verdicts(world, far)[0]["value"] == pytest.approx(20)


def test_sets_are_cut_by_caption_and_relabelled_by_class(tmp_path):
    world = bench.Bench("digits", bench.WORLDS["digits"], tmp_path, tmp_path, True)
    whole = world.by_caption()
    from dmd.data import images

    found, by_class = images.load(whole, "train"), images.load(world.by_class("real", whole), "train")
    assert torch.equal(found.images, by_class.images) and by_class.classes == tuple("0123456789")
    assert all(
        found.classes[a].endswith(by_class.classes[b]) for a, b in zip(found.labels, by_class.labels, strict=True)
    )
    some = images.load(world.some("real-some", whole, 200), "train")
    counts = some.labels.bincount(minlength=20)
    assert len(some) == 200 and counts.min() == counts.max() == 10
    every = images.load(world.some("real-every", whole, len(found)), "train")
    assert len(every) == len(found)  # no image of a caption is kept back
    assert world.by_caption().stat().st_mtime_ns == whole.stat().st_mtime_ns
