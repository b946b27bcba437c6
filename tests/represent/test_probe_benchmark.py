"""The parts of `benchmarks.representation` that have no network in them."""

import numpy as np
import pytest
import torch

from benchmarks import representation as bench
from dmd.data.images import ImageSet


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
    assert len(set(real.data.classes)) == len(real.of_caption) == 24 and len(real.data) == 96
    for caption, c in zip(real.data.classes, real.of_caption, strict=True):
        assert real.classes[c] in caption
    assert not torch.equal(real.data.images[0], real.data.images[1])


def test_of_flags_that_come_twice_the_last_counts():
    assert bench.merged(["--a", "1", "--b", "--a", "2", "3"]) == ["--b", "--a", "2", "3"]


def test_a_table_over_seeds():
    found = bench.summarised({"arm": [{"linear": 0.5}, {"linear": 0.7}, {"linear": 0.9}]})
    row = found["arm"]["linear"]
    assert (row["low"], row["high"]) == (0.5, 0.9)
    assert row["mean"] == pytest.approx(0.7) and row["std"] == pytest.approx(np.std([0.5, 0.7, 0.9], ddof=1))
    assert bench.summarised({"arm": [{"linear": 0.5}]})["arm"]["linear"]["std"] == 0


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
