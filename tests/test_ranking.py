"""The order of images: what it says of each is true, and both ends are found."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

from dmd import ranking
from dmd.data import shapes
from dmd.data.images import to_float, to_uint8
from dmd.metrics.networks import FeatureNet
from dmd.ranking import Ranked


def seen(x):
    return to_float(to_uint8(x))


def images(count, size=8, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2.4 - 1.2


def test_pixels_against_a_plain_loop():
    student, teacher = images(7), images(7, seed=1)
    found = ranking.by_pixels().rank(student, teacher, torch.arange(7))
    for i, score in enumerate(found.scores.tolist()):
        a, b = (to_uint8(x[i]).tolist() for x in (student, teacher))
        flat = [(p - q) / 127.5 for m, n in zip(a, b) for r, s in zip(m, n) for p, q in zip(r, s)]  # noqa: B905
        assert score == pytest.approx((sum(v * v for v in flat) / len(flat)) ** 0.5, rel=1e-5)
        assert found.remarks[i] == f"distance {score:.3g}"


def test_features_are_those_of_the_network():
    """A trunk that sees the mean of each channel alone: images that differ elsewhere are at no distance."""
    net = FeatureNet("FD-Mean", (3, 8, 8), nn.Sequential(nn.AvgPool2d(8), nn.Flatten()), nn.Linear(3, 2))
    student = images(5).clamp(-1, 1)
    order = ranking.by_features(net)
    assert order.by.endswith("features of Mean")
    found = order.rank(student, student.flip(-1), torch.arange(5)).scores
    torch.testing.assert_close(found, torch.zeros(5, dtype=torch.float64), atol=1e-5, rtol=0)
    means = [seen(x).double().mean((2, 3)) for x in (student, images(5, seed=2))]  # normalised, they are the same
    expected = (means[0] - means[1]).square().sum(1).sqrt()
    torch.testing.assert_close(
        order.rank(student, images(5, seed=2), torch.arange(5)).scores, expected, rtol=1e-4, atol=1e-5
    )


def test_captions_count_first_and_the_distance_among_equals():
    scenes = shapes.scenes(0, torch.arange(6))
    student = to_float(shapes.batch(scenes, 0, torch.arange(6)))
    teacher = student.clone()
    teacher[2] += 0.5  # as right as others, but farther from its teacher
    student[4] = student[4].mean((1, 2), keepdim=True)  # the things are gone
    found = ranking.by_caption(scenes, ranking.by_pixels()).rank(student, teacher, torch.arange(6))
    assert found.scores.argsort().tolist()[-2:] == [2, 4]
    assert [r == "all right" for r in found.remarks] == [True] * 4 + [False, True]
    assert "count" in found.remarks[4] and found.scores[4] >= 1 > found.scores[2] > 0
    turned = ranking.by_caption(scenes, ranking.by_pixels()).rank(student, teacher, torch.arange(6).flip(0))
    assert not torch.equal(turned.scores, found.scores), "the numbers say which caption an image was asked for"


def test_both_ends_in_their_order_and_never_the_same_image():
    scores = torch.tensor([0.3, 0.1, 0.5, 0.2, 0.4], dtype=torch.float64)
    ranked = Ranked(scores, [f"r{i}" for i in range(5)])
    best, worst = ranking.extremes(ranked, list("abcde"), 100, 2)
    assert [(p.index, p.seed, p.prompt, p.remark) for p in best] == [(1, 101, "b", "r1"), (3, 103, "d", "r3")]
    assert [(p.index, p.score) for p in worst] == [(2, 0.5), (4, 0.4)]
    best, worst = ranking.extremes(ranked, list("abcde"), 0, 8)
    assert not {p.index for p in best} & {p.index for p in worst} and len(best) == len(worst) == 2


def test_nan_is_not_ranked():
    scores = torch.tensor([0.0, float("nan")], dtype=torch.float64)
    with pytest.raises(ValueError, match="image 1 has no rank"):
        ranking.extremes(Ranked(scores, ["", ""]), ["a", "b"], 0, 1)


def test_what_is_saved_are_the_images(tmp_path):
    student, teacher = images(6), images(6, seed=1)
    order = ranking.by_pixels()
    ranked = order.rank(student, teacher, torch.arange(6))
    picks = ranking.extremes(ranked, list("abcdef"), 7, 2)
    ranking.save(tmp_path, order, student, teacher, picks)
    facts = json.loads((tmp_path / ranking.EXTREMES).read_text())
    assert (facts["by"], facts["samples"]) == (order.by, 6)
    for name, found in zip(("best", "worst"), picks, strict=True):
        assert [f["seed"] for f in facts[name]] == [p.seed for p in found] == [7 + p.index for p in found]
        image = torch.tensor(list(Image.open(tmp_path / f"{name}.png").tobytes()), dtype=torch.uint8)
        image = image.view(2 * (8 + 2), 2 * (8 + 1) + 1, 3)
        for k, pick in enumerate(found):
            for row, x in enumerate((student, teacher)):
                tile = image[10 * row : 10 * row + 8, 9 * k : 9 * k + 8]
                assert torch.equal(tile.permute(2, 0, 1), to_uint8(x[pick.index]))
