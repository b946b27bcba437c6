"""The checker against drawings whose truth is known: right on real and degraded ones, and able to say no."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage

from dmd.data import shapes
from dmd.data.images import to_float, to_uint8
from dmd.data.shapes import COLOURS, PLACES, RELATIONS, SHAPES, Scene, Thing
from dmd.metrics.caption import ATTRIBUTES, agreement, matches, read, recognise


def drawn(count, seed):
    index = torch.arange(count)
    scenes = shapes.scenes(seed, index)
    return scenes, to_float(shapes.batch(scenes, seed, index))


@pytest.fixture(scope="module")
def some():
    return drawn(300, seed=1)


def blur(images, sigma):
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


def noise(images, std):
    return images + std * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def jpeg(images, quality):
    def through(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    stack = np.stack([through(image) for image in to_uint8(images).permute(0, 2, 3, 1).numpy()])
    return to_float(torch.from_numpy(stack).permute(0, 3, 1, 2))


def halved(images):
    return F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")


def shifted(images):
    return images + 0.1 * (2 * torch.rand(len(images), 3, 1, 1, generator=torch.Generator().manual_seed(0)) - 1)


# ----------------------------------------------------------------------------- it says yes


def test_real_drawings_are_read_right():
    """Measured: all of them."""
    scenes, images = drawn(2000, seed=7)
    found = agreement(images, scenes)
    print(found)
    assert found["agreement"] >= 0.999
    assert set(found) == {"agreement", *ATTRIBUTES}


@pytest.mark.slow
def test_many_real_drawings_are_read_right():
    scenes, images = drawn(20_000, seed=8)
    assert agreement(images, scenes)["agreement"] >= 0.9995


@pytest.mark.parametrize(
    ("degrade", "least"),
    [
        (lambda x: blur(x, 1.0), 0.98),
        (lambda x: noise(x, 0.05), 0.98),
        (lambda x: jpeg(x, 75), 0.98),
        (halved, 0.98),
        (shifted, 0.98),
        (lambda x: x + 0.8 * (x - blur(x, 1.5)), 0.98),
        (lambda x: noise(shifted(halved(blur(x, 0.7))), 0.05), 0.96),  # thin small things lose their colours
    ],
    ids=["blur", "noise", "jpeg", "halved", "shifted", "ringing", "all"],
)
def test_degraded_drawings_are_read_right(some, degrade, least):
    scenes, images = some
    found = agreement(degrade(images), scenes)
    print(found)
    assert found["agreement"] >= least


def test_recognised_scenes_name_sizes_and_order_things():
    """What is read, drawn again, is read alike; with the sizes given it is the scene, or its mirror in words."""
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    scenes, images = drawn(150, seed=4)
    for scene, seen in zip(scenes, recognise(images), strict=True):
        assert seen is not None and all(t.size for t in seen.things)
        assert seen.where in ("above", "left of", *PLACES)
        if scene.where in ("below", "right of"):
            scene = Scene(scene.things[::-1], opposite[scene.where], scene.background)
        filled = [replace(t, size=t.size or s.size) for t, s in zip(scene.things, seen.things, strict=True)]
        assert seen == replace(scene, things=tuple(filled))


def test_a_picture_from_elsewhere_is_read_right():
    """Drawn by PIL, not by the world itself: hard edges, and other proportions."""
    canvas = Image.new("RGB", (64, 64), (250, 250, 250))
    pen = ImageDraw.Draw(canvas)
    pen.ellipse((20, 4, 42, 26), fill=(220, 30, 40))
    pen.rectangle((24, 42, 36, 54), fill=(30, 90, 210))
    image = to_float(torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1))[None]
    assert recognise(image) == [shapes.parse("a large red circle above a small blue square on a white background")]


# ----------------------------------------------------------------------------- it says no


def test_swapped_scenes_agree_by_chance(some):
    scenes, images = some
    found = agreement(images, scenes[1:] + scenes[:1])
    assert found["agreement"] <= 0.01
    assert found["background"] == pytest.approx(1 / 8, abs=0.07)
    assert found["count"] == pytest.approx(1 / 2, abs=0.12)


def another(names, name, step=1):
    names = list(names)
    return names[(names.index(name) + step) % len(names)]


def wrong_shape(scene):
    first = scene.things[0]
    taken = {first.shape} | {t.shape for t in scene.things}
    return _with(scene, replace(first, shape=next(s for s in SHAPES if s not in taken)))


def wrong_colour(scene):
    taken = {scene.background} | {t.colour for t in scene.things}
    return _with(scene, replace(scene.things[0], colour=next(c for c in COLOURS if c not in taken)))


def wrong_size(scene):
    return _with(scene, replace(scene.things[0], size="small" if scene.things[0].size == "large" else "large"))


def wrong_place(scene):
    return replace(scene, where=another(PLACES if len(scene.things) == 1 else RELATIONS, scene.where))


def wrong_background(scene):
    taken = {scene.background} | {t.colour for t in scene.things}
    return replace(scene, background=next(c for c in COLOURS if c not in taken))


def _with(scene, first):
    return replace(scene, things=(first, *scene.things[1:]))


@pytest.mark.parametrize(
    ("attribute", "spoil"),
    [
        ("shape", wrong_shape),
        ("colour", wrong_colour),
        ("size", wrong_size),
        ("where", wrong_place),
        ("background", wrong_background),
    ],
)
def test_each_wrong_attribute_is_caught_and_no_other(some, attribute, spoil):
    chosen = [i for i, scene in enumerate(some[0]) if all(t.size for t in scene.things)][:60]
    scenes, images = [spoil(some[0][i]) for i in chosen], some[1][chosen]
    found = agreement(images, scenes)
    assert found["agreement"] == 0 and found[attribute] == 0
    assert all(found[other] == 1 for other in ATTRIBUTES if other != attribute)


def test_swapped_things_are_a_wrong_relation():
    """A caption that gives each thing the other's place is told from the right one."""
    scene = shapes.parse("a large red circle above a small blue square on a white background")
    images = to_float(shapes.batch([scene], 0, torch.arange(1)))
    wrong = shapes.parse("a small blue square above a large red circle on a white background")
    same = shapes.parse("a small blue square below a large red circle on a white background")
    assert agreement(images, [same])["agreement"] == 1
    assert agreement(images, [wrong]) == {"agreement": 0.0} | dict.fromkeys(ATTRIBUTES, 1.0) | {"where": 0.0}


def test_colours_that_change_their_owners_are_caught():
    scene = shapes.parse("a red circle above a blue square on a white background")
    images = to_float(shapes.batch([scene], 0, torch.arange(1)))
    assert agreement(images, [shapes.parse("a blue circle above a red square on a white background")])["agreement"] == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.flip(1) * 0.2,  # hardly any colour
        lambda x: torch.zeros_like(x),
        lambda x: noise(torch.zeros_like(x), 1.0),
        lambda x: blur(x, 8.0),
        lambda x: torch.where(torch.arange(64) < 32, x, x.roll(1, dims=1)),  # green and blue halves
        lambda x: x.roll(26, dims=3),  # cut in two by the border, or between two places
    ],
    ids=["faint", "blank", "noise", "blurred", "two worlds", "moved"],
)
def test_spoilt_images_do_not_agree(spoil):
    scene = shapes.parse("a large red star at the left on a green background")
    images = to_float(shapes.batch([scene] * 8, 0, torch.arange(8)))
    assert agreement(images, [scene] * 8)["agreement"] == 1
    assert agreement(spoil(images), [scene] * 8)["agreement"] == 0


def test_a_missing_or_further_thing_is_caught():
    one = shapes.parse("a large red star at the left on a green background")
    two = shapes.parse("a large red star left of a pink ring on a green background")
    images = to_float(torch.stack([shapes.draw(one, 0, 0), shapes.draw(two, 0, 0)]))
    hits = matches(images, [two, one])
    assert not hits["count"].any() and not hits["agreement"].any() and hits["background"].all()
    images[0, :, 50:56, 50:56] = 1.0
    assert not matches(images[:1], [one])["count"].any()


def half(colour, other, shape="circle"):
    """A shape whose right half has another colour, on black."""
    scenes = [Scene((Thing(shape, c, "large"),), "centre", "black") for c in (colour, other)]
    left, right = (to_float(shapes.draw(scene, 0, 0)) for scene in scenes)
    return torch.where(torch.arange(64) < 32, left, right)


def test_a_thing_of_two_colours_has_none():
    readings = read(torch.stack([half("red", "red"), half("red", "green"), half("white", "blue")]))
    assert [[thing.colour for thing in reading.things] for reading in readings] == [["red"], [None], [None]]


def test_other_shapes_are_none():
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    radius = (x * x + y * y).sqrt()
    foreign = [
        (x / 1.3).square() + (y * 1.3).square() < 100,  # an ellipse
        (x.abs() < 14) & (y.abs() < 8),  # an oblong
        (radius < 12) & (y < 0),  # half a disc
        (radius < 12) & (radius > 6) & (x < 4),  # a broken ring
        (y > -6) & (0.5 * y + 0.866 * x.abs() < 6.5),  # a triangle upside down
    ]
    images = torch.stack([mask.float() * 2 - 1 for mask in foreign])[:, None].expand(-1, 3, -1, -1)
    assert [thing.shape for reading in read(images) for thing in reading.things] == [None] * len(foreign)
    assert recognise(images) == [None] * len(foreign)


# ----------------------------------------------------------------------------- arguments


def test_a_reading_depends_on_its_image_alone(some):
    images = noise(some[1][:20], 0.1)
    whole = read(images)
    assert [read(image[None])[0] for image in images] == whole
    assert read(images[[7, 3]]) == [whole[7], whole[3]]


def test_other_precisions_and_ranges_are_taken(some):
    scenes, images = some[0][:20], some[1][:20]
    assert agreement(images.double() * 3, scenes)["count"] == 1  # clamped
    assert agreement(images.bfloat16(), scenes)["agreement"] == 1


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (torch.zeros(1, 3, 32, 32), "must be float"),
        (torch.zeros(1, 1, 64, 64), "must be float"),
        (torch.zeros(3, 64, 64), "must be float"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "must be float"),
        (torch.full((1, 3, 64, 64), torch.nan), "image 0 is not finite"),
        (torch.zeros(2, 3, 64, 64), "2 images but 1 scenes"),
        (torch.zeros(0, 3, 64, 64), "no images"),
    ],
)
def test_wrong_images_are_refused(images, sentence):
    scenes = [shapes.scene(0, 0)] * (1 if images.ndim == 4 and len(images) else len(images))
    with pytest.raises(ValueError, match=sentence):
        agreement(images, scenes)
