"""The world of shapes: captions and scenes are one-to-one, drawings are what geometry says, chance is a function."""

import contextlib
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy import ndimage

from dmd.data import shapes
from dmd.data.shapes import COLOURS, HELD_OUT, PLACES, RELATIONS, SHAPES, SIZES, Figure, Scene, Thing
from dmd.errors import InputError

OPTIONAL_SIZES = (*SIZES, None)


def lone_scenes():
    names = itertools.product(SHAPES, COLOURS, OPTIONAL_SIZES, PLACES, COLOURS)
    return [Scene((Thing(s, c, z),), p, b) for s, c, z, p, b in names if c != b]


things = st.builds(Thing, st.sampled_from(SHAPES), st.sampled_from(list(COLOURS)), st.sampled_from(OPTIONAL_SIZES))


@st.composite
def pairs(draw):
    first, second = draw(things), draw(things)
    background = draw(st.sampled_from([c for c in COLOURS if c not in (first.colour, second.colour)]))
    if (first.shape, first.colour) == (second.shape, second.colour):
        second = Thing(SHAPES[(SHAPES.index(first.shape) + 1) % len(SHAPES)], second.colour, second.size)
    return Scene((first, second), draw(st.sampled_from(list(RELATIONS))), background)


# ----------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (
            Scene((Thing("circle", "red", "small"),), "left", "blue"),
            "a small red circle at the left on a blue background",
        ),
        (Scene((Thing("star", "pink"),), "centre", "black"), "a pink star in the centre on a black background"),
        (
            Scene((Thing("circle", "red"), Thing("square", "blue", "large")), "above", "white"),
            "a red circle above a large blue square on a white background",
        ),
        (
            Scene((Thing("ring", "green", "small"), Thing("ring", "white")), "left of", "purple"),
            "a small green ring left of a white ring on a purple background",
        ),
    ],
)
def test_captions_are_plain_english(scene, text):
    assert shapes.caption(scene) == text
    assert shapes.parse(text) == scene


def test_every_scene_of_one_thing_has_its_own_caption_and_comes_back():
    scenes = lone_scenes()
    captions = [shapes.caption(scene) for scene in scenes]
    assert [shapes.parse(text) for text in captions] == scenes
    assert len(set(captions)) == len(scenes) == shapes.caption_counts()[0]


@given(pairs())
@settings(max_examples=300, deadline=None)
def test_scenes_of_two_things_come_back(scene):
    assert shapes.parse(shapes.caption(scene)) == scene


def test_captions_of_two_things_are_counted_right():
    looks = list(itertools.product(SHAPES, COLOURS))
    orders = sum(b not in (c, d) for (_, c), (_, d) in itertools.permutations(looks, 2) for b in COLOURS)
    assert shapes.caption_counts()[1] == orders * 3 * 3 * 4


def test_case_spaces_and_a_full_stop_do_not_matter():
    text = "a red ring at the top on a white background"
    assert shapes.parse("  A red  RING at\nthe top on a White background. ") == shapes.parse(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is no caption"),
        ("a red circle", "is no caption"),
        ("a red circle at the centre on a blue background", "is no caption"),
        ("a red circle in the left on a blue background", "is no caption"),
        ("a red small circle at the left on a blue background", "is no caption"),
        ("a red circle above on a blue background", "is no caption"),
        ("a orange circle at the left on a blue background", "'orange' is not a word"),
        ("ein roter Kreis", "'ein' is not a word"),
        ("a red circle at the left on a red background", "a red circle cannot be seen on a red background"),
        ("a small red star above a red star on a blue background", "two things are a red star"),
        ("a red circle at the left\0 on a blue background", "is not a word"),
        ("x" * 10_000, "is not a word"),
        ("a " * 10_000, "is no caption"),
    ],
)
def test_a_foreign_caption_is_answered_by_a_short_sentence(text, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        shapes.parse(text)
    assert len(str(error.value)) < 400


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_scene_or_an_input_error(text):
    with contextlib.suppress(InputError):
        assert isinstance(shapes.parse(text), Scene)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Thing("heart", "red"),
        lambda: Thing("star", "orange"),
        lambda: Thing("star", "red", "huge"),
        lambda: Scene((Thing("star", "red"),), "above", "blue"),
        lambda: Scene((Thing("star", "red"),), "left", "cyan"),
        lambda: Scene((Thing("star", "red"), Thing("ring", "red")), "left", "blue"),
        lambda: Scene((), "left", "blue"),
        lambda: Scene((Thing("star", "red"), Thing("ring", "red"), Thing("ring", "pink")), "above", "blue"),
    ],
)
def test_scenes_out_of_this_world_are_refused(build):
    with pytest.raises(InputError):
        build()


# ----------------------------------------------------------------------------- scenes at random


def counts_are_uniform(values, names, sigmas=4.5):
    """Each name's count lies within `sigmas` of its binomial expectation."""
    found, share = Counter(values), 1 / len(names)
    assert set(found) == set(names)
    deviation = math.sqrt(len(values) * share * (1 - share))
    assert max(abs(count - len(values) * share) for count in found.values()) < sigmas * deviation


def test_scenes_have_uniform_marginals():
    scenes = shapes.scenes(5, torch.arange(6000))
    counts_are_uniform([len(s.things) for s in scenes], [1, 2])
    counts_are_uniform([s.background for s in scenes], COLOURS)
    counts_are_uniform([s.where for s in scenes if len(s.things) == 1], PLACES)
    counts_are_uniform([s.where for s in scenes if len(s.things) == 2], RELATIONS)
    for k in (0, 1):
        chosen = [s.things[k] for s in scenes if len(s.things) > k]
        counts_are_uniform([t.shape for t in chosen], SHAPES)
        counts_are_uniform([t.colour for t in chosen], COLOURS)
        counts_are_uniform([t.size for t in chosen], OPTIONAL_SIZES)


def test_a_scene_depends_on_seed_and_index_alone():
    whole = shapes.scenes(3, torch.arange(50))
    assert [shapes.scene(3, i) for i in range(50)] == whole
    assert shapes.scenes(3, torch.tensor([40, 2, 2])) == [whole[40], whole[2], whole[2]]
    assert shapes.scenes(4, torch.arange(50)) != whole
    assert shapes.scenes(3, torch.arange(0)) == []


def test_splits_share_no_held_out_pair():
    index = torch.arange(400)
    train, test = shapes.scenes(2, index, "train"), shapes.scenes(2, index, "test")
    assert not any(map(shapes.held_out, train)) and all(map(shapes.held_out, test))
    assert shapes.scene(2, 7, "test") == test[7]
    free = shapes.scenes(2, index)
    assert [a for a in free if not shapes.held_out(a)] == [t for t, a in zip(train, free, strict=True) if t == a]


def test_held_out_pairs_are_a_tenth_and_leave_every_name_to_training():
    assert 0.08 < len(HELD_OUT) / (len(SHAPES) * len(COLOURS)) < 0.13
    kept = set(itertools.product(SHAPES, COLOURS)) - HELD_OUT
    assert {s for s, _ in kept} == set(SHAPES) and min(Counter(c for _, c in kept).values()) >= len(SHAPES) - 1
    shape, colour = min(HELD_OUT)
    lone = Scene((Thing(shape, colour),), "left", next(c for c in COLOURS if c != colour))
    assert shapes.held_out(lone)


# ----------------------------------------------------------------------------- drawings


def drawn(count, seed=0):
    index = torch.arange(count)
    scenes = shapes.scenes(seed, index)
    return scenes, shapes.batch(scenes, seed, index)


def test_a_drawing_depends_on_scene_seed_and_index_alone():
    scenes, images = drawn(40)
    assert images.shape == (40, 3, 64, 64) and images.dtype == torch.uint8
    assert all(torch.equal(shapes.draw(scenes[i], 0, i), images[i]) for i in range(40))
    order = torch.tensor([17, 3, 39])
    assert torch.equal(shapes.batch([scenes[i] for i in order], 0, order), images[order])
    assert not torch.equal(shapes.draw(scenes[0], 1, 0), images[0])
    assert not torch.equal(shapes.draw(scenes[0], 0, 1), images[0])


def test_counts_of_scenes_and_indices_must_agree():
    assert shapes.batch([], 0, torch.arange(0)).shape == (0, 3, 64, 64)
    with pytest.raises(ValueError, match="1 scenes but 2 indices"):
        shapes.batch([shapes.scene(0, 0)], 0, torch.arange(2))


def masks_of(scene, image):
    """Each thing's pixels of pure colour, found in the drawing."""
    pixels = image.permute(1, 2, 0).numpy()
    return [(pixels == np.array(COLOURS[thing.colour])).all(-1) for thing in scene.things]


def test_drawings_show_the_scene_uncut_and_apart():
    """Read with scipy's labels: as many regions as things, in their colours, off the border, rightly related."""
    for scene, image in zip(*drawn(300, seed=9), strict=True):
        pixels = image.permute(1, 2, 0).numpy().astype(int)
        foreground = (pixels != np.array(COLOURS[scene.background])).any(-1)
        assert not foreground[[0, 1, -1, -2]].any() and not foreground[:, [0, 1, -1, -2]].any()
        labels, count = ndimage.label(foreground, np.ones((3, 3)))
        assert count == len(scene.things)
        boxes = ndimage.find_objects(labels)
        if len(boxes) == 2:  # at least GAP apart, less a pixel of soft edge on each side
            gaps = [max(a.start - b.stop, b.start - a.stop) for a, b in zip(*boxes, strict=True)]
            assert max(gaps) >= shapes.GAP - 2
        points = [np.argwhere(mask) for mask in masks_of(scene, image)]
        assert all(len(p) for p in points)
        if scene.things[0].colour == scene.things[-1].colour:
            continue
        centres = [p.mean(0)[::-1] + 0.5 for p in points]
        if len(centres) == 1:
            assert scene.where == min(PLACES, key=lambda name: math.dist(PLACES[name], centres[0]))
        else:
            direction = centres[0] - centres[1]
            assert scene.where == max(RELATIONS, key=lambda name: direction @ RELATIONS[name])


def test_sizes_are_far_apart_and_an_open_size_is_either():
    def areas(shape, size):
        scenes = [Scene((Thing(shape, "black", size),), "centre", "white")] * 40
        images = shapes.batch(scenes, 0, torch.arange(40)).float()
        return (245 - images[:, 0]).sum((1, 2)) / 220

    for shape in SHAPES:
        small, large, either = (areas(shape, size) for size in ("small", "large", None))
        assert large.min() > 1.5 * small.max()
        assert (either < 1.2 * small.max()).any() and (either > 0.8 * large.min()).any()
        assert small.std() > 0 and large.std() > 0


AREAS = {
    "circle": math.pi,
    "square": (2 * 0.88) ** 2,
    "triangle": 0.75 * math.sqrt(3) * 1.3**2,
    # A pentagram is ten triangles between the centre, a tip, and an inner corner 36 degrees beside it.
    "star": 10 * 0.5 * 1.25 * (1.25 * math.cos(math.radians(72)) / math.cos(math.radians(36))) * math.sin(math.pi / 5),
    "cross": 2 * (2.2 * 0.8) - 0.8**2,
    "ring": math.pi * (1.08**2 - 0.56**2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_area_and_centre_of_geometry(shape):
    figures = [Figure(shape, 30.3, 33.8, unit, angle) for unit in (6.5, 11.0, 20.0) for angle in (0.0, 0.1, -0.17)]
    cover = shapes.coverage(figures)
    assert cover.min() == 0 and cover.max() == 1
    axis = torch.arange(64) + 0.5
    for figure, mask in zip(figures, cover, strict=True):
        area = mask.sum().item()
        assert area == pytest.approx(AREAS[shape] * figure.unit**2, rel=0.02)
        assert (mask.sum(0) @ axis).item() / area == pytest.approx(30.3, abs=0.1)
        assert (mask.sum(1) @ axis).item() / area == pytest.approx(33.8, abs=0.1)


@pytest.mark.parametrize("shape", ["square", "triangle", "star", "cross"])
def test_coverage_equals_polygons_that_pil_draws(shape):
    """At 16 times the resolution, then averaged: turned clockwise, as y points down."""
    inner = 1.25 * math.cos(math.radians(72)) / math.cos(math.radians(36))
    radii = {"square": [0.88 * math.sqrt(2)], "triangle": [1.3], "star": [1.25, inner]}.get(shape)
    if radii:
        count = {"square": 4, "triangle": 3, "star": 10}[shape]
        turn = math.pi / 4 if shape == "square" else 0.0
        rays = [(radii[k % len(radii)], 2 * math.pi * k / count + turn) for k in range(count)]
        corners = [(r * math.sin(a), -r * math.cos(a)) for r, a in rays]
    else:
        quarter = [(0.4, -1.1), (0.4, -0.4), (1.1, -0.4)]
        corners = [(math.cos(k * math.pi / 2) * x - math.sin(k * math.pi / 2) * y,
                    math.sin(k * math.pi / 2) * x + math.cos(k * math.pi / 2) * y)
                   for k in range(4) for x, y in quarter]  # fmt: skip
    x, y, unit, angle = 27.4, 35.1, 10.7, 0.15
    cos, sin = math.cos(angle), math.sin(angle)
    canvas = Image.new("L", (1024, 1024))
    points = [(16 * (x + unit * (cos * u - sin * v)), 16 * (y + unit * (sin * u + cos * v))) for u, v in corners]
    ImageDraw.Draw(canvas).polygon(points, fill=1)
    truth = np.asarray(canvas, dtype=np.float32).reshape(64, 16, 64, 16).mean((1, 3))
    found = shapes.coverage([Figure(shape, x, y, unit, angle)])[0].numpy()
    assert np.abs(found - truth).mean() < 1e-3
    assert np.abs(found - truth).max() < 0.25


def test_colours_are_far_apart():
    assert min(math.dist(a, b) for a, b in itertools.combinations(COLOURS.values(), 2)) > 120


def test_answers_are_equal_where_captions_mean_the_same():
    """Of two things each may come first; nothing else that a caption says can change and the answers stay."""
    meanings: dict[tuple[int, ...], set[frozenset]] = {}
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    for scene in shapes.scenes(1, torch.arange(3000)):
        ways = {scene}
        if len(scene.things) == 2:
            ways.add(shapes.Scene(scene.things[::-1], opposite[scene.where], scene.background))
        found = {tuple(shapes.answers(way)) for way in ways}
        assert len(found) == 1
        numbers = found.pop()
        assert all(0 <= n < count for n, count in zip(numbers, shapes.ANSWERS, strict=True))
        meanings.setdefault(numbers, set()).add(frozenset(ways))
    assert all(len(scenes) == 1 for scenes in meanings.values())
