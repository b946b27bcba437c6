"""What a picture of the world of shapes shows, read without a network, and whether it is what a caption asked for.

An image is read in four steps. The background is the median of its border. Things are the connected regions whose
colour lies more than half as far from the background as their surroundings reach. A thing's colour is the mean of its
strongest pixels; every pixel's share of that colour gives a soft mask. Its shape is the drawn template that the mask,
brought to a standard area and centre, is most like; its size follows from the mask's area, its place from its centre.

Nothing is forced into a class: what is too far from every colour, shape, size or place is None.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd.data import shapes
from dmd.data.shapes import COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Figure, Scene, Thing
from dmd.errors import InputError

ATTRIBUTES = ("count", "background", "shape", "colour", "size", "where")

VISIBLE = 0.2  # least distance from the background, in RGB of [0, 1], of a pixel that belongs to a thing
LEAST_AREA = 16  # of a region, in pixels; smaller ones are specks, and ignored
COLOUR_LIMIT = 0.23  # half the distance of the two nearest colours: no colour is near two
MIXED_LIMIT = 0.25  # a pixel farther than this from the line between background and colour is of another colour
MIXED_PART = 0.15  # more such pixels, and the thing has no one colour
LIKENESS = 0.93  # least likeness of a mask and the template of its shape; 1 is equal
PLACE_LIMIT = 7.0  # half the distance of the two nearest places, in pixels
SLANT = 1.3  # a relation's distance must exceed the distance across it by this factor
UNITS = (4.5, 14.0)  # smallest and largest thing, see `shapes.SIZES`

GRID = 28  # points along a side of a standard mask
REACH = 1.05  # from its centre to its side, in square roots of the thing's area
CHUNK = 256  # images at a time


@dataclass(frozen=True)
class Seen:
    """A thing in an image: what it looks like, None where that is unclear, and its centre in pixels."""

    shape: str | None
    colour: str | None
    size: str | None
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """Background, None where it is unclear, and things, the largest first: any number of them, also none."""

    background: str | None
    things: tuple[Seen, ...]


# ----------------------------------------------------------------------------- agreement


def agreement(images: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Parts of N images that show what they were asked for: the means of `matches`.

    Raises:
        ValueError: as `matches`, or there are no images.
    """
    if len(images) == 0:
        raise ValueError("there are no images to compare with their captions: at least one is needed")
    return {name: hits.double().mean().item() for name, hits in matches(images, scenes).items()}


def matches(images: Tensor, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """For each image, whether it shows what it was asked for; bool (N,) each.

    Args:
        images: float (N, 3, 64, 64), made for [-1, 1] and clamped to it.
        scenes: N scenes; a size that a scene leaves open is always right.

    Returns:
        agreement: everything below is right.
        count: there are as many things as asked for; if not, nothing but the background can be right.
        background: its colour.
        shape, colour, size: of all things. Of two, those are compared that have most in common.
        where: the place, or the relation.

    Raises:
        ValueError: wrong shapes or counts, or pixels that are not finite.
    """
    if len(images) != len(scenes):
        raise ValueError(f"there are {len(images)} images but {len(scenes)} scenes: each image needs one")
    rows = [_compare(seen, scene) for seen, scene in zip(read(images), scenes, strict=True)]
    table = torch.tensor(rows, dtype=torch.bool).reshape(-1, len(ATTRIBUTES))
    return {"agreement": table.all(1)} | dict(zip(ATTRIBUTES, table.T, strict=True))


def _compare(reading: Reading, scene: Scene) -> tuple[bool, ...]:
    """Whether each of `ATTRIBUTES` is right."""
    background = reading.background == scene.background
    if len(reading.things) != len(scene.things):
        return (False, background, False, False, False, False)
    orders = itertools.permutations(reading.things)
    return True, background, *max((_compare_things(order, scene) for order in orders), key=sum)


def _compare_things(seen: Sequence[Seen], scene: Scene) -> tuple[bool, bool, bool, bool]:
    pairs = list(zip(seen, scene.things, strict=True))
    return (
        all(s.shape == t.shape for s, t in pairs),
        all(s.colour == t.colour for s, t in pairs),
        all(t.size is None or s.size == t.size for s, t in pairs),
        _where(seen) == scene.where,
    )


def recognise(images: Tensor) -> list[Scene | None]:
    """The scenes that images (as in `matches`) show, None where something is unclear or no scene of this world.

    Sizes are always named; of two things the first is above or left of the second.
    """
    return [_scene(reading) for reading in read(images)]


def _scene(reading: Reading) -> Scene | None:
    seen = sorted(reading.things, key=lambda s: (s.x, s.y))
    where = _where(seen)
    if where in ("below", "right of"):
        seen, where = seen[::-1], _where(seen[::-1])
    if where is None or reading.background is None or any(None in (s.shape, s.colour, s.size) for s in seen):
        return None
    try:
        return Scene(tuple(Thing(s.shape or "", s.colour or "", s.size) for s in seen), where, reading.background)
    except InputError:  # things of the background's colour, or two equal ones
        return None


def _where(seen: Sequence[Seen]) -> str | None:
    """The place of a lone thing, or the relation of the first of two to the second; None if it is not clear."""
    if len(seen) == 1:
        distance, name = min((math.dist((seen[0].x, seen[0].y), point), name) for name, point in PLACES.items())
        return name if distance <= PLACE_LIMIT else None
    if len(seen) != 2:
        return None
    x, y = seen[0].x - seen[1].x, seen[0].y - seen[1].y
    along, across, name = max((x * u + y * v, abs(x * v) + abs(y * u), name) for name, (u, v) in RELATIONS.items())
    return name if along > SLANT * across else None


# ----------------------------------------------------------------------------- reading


@torch.no_grad()
def read(images: Tensor) -> list[Reading]:
    """What images (as in `matches`) show, attribute by attribute; each reading depends on its image alone.

    Raises:
        ValueError: images have a wrong shape or type, or pixels that are not finite.
    """
    wanted = (3, shapes.SIZE, shapes.SIZE)
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1:] != wanted:
        raise ValueError(f"images must be float (N, {wanted[0]}, {wanted[1]}, {wanted[2]}), not {tuple(images.shape)}")
    broken = ~images.flatten(1).isfinite().all(1)
    if broken.any():
        raise ValueError(f"image {int(broken.nonzero()[0])} is not finite: pixels must be free of NaN and infinity")
    return [reading for chunk in images.split(CHUNK) for reading in _read(chunk)]


def _read(images: Tensor) -> list[Reading]:
    pixels = (images.float().cpu().clamp(-1, 1) + 1) / 2
    border = torch.ones(pixels.shape[-2:], dtype=torch.bool)
    border[2:-2, 2:-2] = False
    ground = pixels[:, :, border].median(2).values
    image, regions = _regions(_distance(_smooth(pixels), ground))
    things: list[list[tuple[float, Seen]]] = [[] for _ in pixels]
    if len(image):
        for row, area, seen in zip(image.tolist(), *_things(pixels[image], ground[image], regions), strict=True):
            things[row].append((area, seen))
    return [
        Reading(name, tuple(seen for _, seen in sorted(found, key=lambda pair: -pair[0])))
        for name, found in zip(_colours(ground), things, strict=True)
    ]


def _smooth(x: Tensor) -> Tensor:
    """A binomial blur (1, 2, 1) / 4 along both axes of (N, C, H, W)."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = (x[..., :-2] + x[..., 2:]) / 4 + x[..., 1:-1] / 2
    return (x[..., :-2, :] + x[..., 2:, :]) / 4 + x[..., 1:-1, :] / 2


def _distance(pixels: Tensor, colour: Tensor) -> Tensor:
    """Of each pixel (N, 3, H, W) from a colour (N, 3): (N, H, W)."""
    return (pixels - colour[:, :, None, None]).square().sum(1).sqrt()


def _spread(x: Tensor, radius: int) -> Tensor:
    """The largest value of (N, H, W), at least 0, within `radius` pixels along each axis."""
    for _ in range(radius):  # slices are several times faster than max_pool2d
        x = F.pad(x, (1, 1, 1, 1))
        x = torch.maximum(torch.maximum(x[..., :-2], x[..., 2:]), x[..., 1:-1])
        x = torch.maximum(torch.maximum(x[:, :-2], x[:, 2:]), x[:, 1:-1])
    return x


def _regions(distance: Tensor) -> tuple[Tensor, Tensor]:
    """Connected regions of what stands out: the image (R,) that each is in, and its mask, bool (R, H, W)."""
    mask = distance > torch.clamp(0.5 * _spread(distance, 3), min=VISIBLE)
    labels = _label(mask)
    numbers, inverse, areas = labels.unique(return_inverse=True, return_counts=True)
    kept = numbers[(numbers > 0) & (areas >= LEAST_AREA)]
    image = ((kept - 1) // mask[0].numel()).long()
    return image, labels[image] == kept[:, None, None]


def _label(mask: Tensor) -> Tensor:
    """A number for each 8-connected region of (N, H, W), unique over the batch; 0 elsewhere. At most 2^24 pixels."""
    labels = torch.arange(1, mask.numel() + 1, dtype=torch.float32).reshape(mask.shape) * mask
    active = torch.arange(len(mask))
    while len(active):
        before = labels[active]
        after = before
        for _ in range(8):
            after = _spread(after, 1) * mask[active]
        labels[active] = after
        active = active[(after != before).flatten(1).any(1)]
    return labels


def _things(pixels: Tensor, ground: Tensor, regions: Tensor) -> tuple[list[float], list[Seen]]:
    """Areas of, and what is seen in, R regions (R, H, W) of images (R, 3, H, W) with backgrounds (R, 3)."""
    smooth = _smooth(pixels)
    strength = _distance(smooth, ground) * regions
    strong = (strength >= 0.9 * strength.amax((1, 2), keepdim=True)).float()
    colour = (pixels * strong[:, None]).sum((2, 3)) / strong.sum((1, 2))[:, None]
    direction = colour - ground
    mask = _share(pixels, ground, direction).clamp(0, 1) * _spread(regions.float(), 2)
    area = mask.sum((1, 2))
    axis = torch.arange(shapes.SIZE) + 0.5
    x, y = (mask.sum(1) * axis).sum(1) / area, (mask.sum(2) * axis).sum(1) / area
    # The blurred image against its own share: an edge lies between the two colours, whatever its width.
    mixture = _share(smooth, ground, direction).clamp(0, 1 + MIXED_LIMIT)[:, None] * direction[:, :, None, None]
    mixed = (_distance(smooth - mixture, ground) > MIXED_LIMIT) & regions
    one_colour = mixed.sum((1, 2)) <= MIXED_PART * regions.sum((1, 2))
    shape = _shapes(_standard(mask, x, y, area))
    seen = [
        Seen(s, c if one else None, _size(s, a), *centre)
        for s, c, one, a, *centre in zip(
            shape, _colours(colour), one_colour.tolist(), area.tolist(), x.tolist(), y.tolist(), strict=True
        )
    ]
    return area.tolist(), seen


def _share(pixels: Tensor, ground: Tensor, direction: Tensor) -> Tensor:
    """Where pixels (R, 3, H, W) lie along a line: (R, H, W), 0 at ground (R, 3), 1 at ground + direction (R, 3)."""
    length = direction.square().sum(1).clamp(min=VISIBLE**2)
    return torch.einsum("rchw,rc->rhw", pixels - ground[:, :, None, None], direction) / length[:, None, None]


def _colours(colours: Tensor) -> list[str | None]:
    """Names of colours (N, 3) in [0, 1]."""
    palette = torch.tensor(list(COLOURS.values())) / 255
    distance, nearest = torch.cdist(colours, palette).min(1)
    names = list(COLOURS)
    return [names[k] if d <= COLOUR_LIMIT else None for d, k in zip(distance.tolist(), nearest.tolist(), strict=True)]


def _size(shape: str | None, area: float) -> str | None:
    if shape is None:
        return None
    unit = math.sqrt(area / _templates()[2][shape])
    limit = math.sqrt(SIZES["small"][1] * SIZES["large"][0])
    if not UNITS[0] <= unit <= UNITS[1]:
        return None
    return "small" if unit < limit else "large"


def _standard(mask: Tensor, x: Tensor, y: Tensor, area: Tensor) -> Tensor:
    """Soft masks (R, H, W), moved to the centre and brought to equal area: (R, GRID * GRID)."""
    steps = torch.linspace(-REACH, REACH, GRID) * area.sqrt()[:, None]
    to_unit = 2 / shapes.SIZE  # grid_sample's coordinates run from -1 to 1 between the image's outer edges
    xs = (x[:, None] + steps) * to_unit - 1
    ys = (y[:, None] + steps) * to_unit - 1
    grid = torch.stack(torch.broadcast_tensors(xs[:, None, :], ys[:, :, None]), dim=-1)
    return F.grid_sample(mask[:, None], grid, align_corners=False)[:, 0].flatten(1)


@functools.cache
def _templates() -> tuple[Tensor, list[str], dict[str, float]]:
    """Standard masks of drawn things, (T, GRID * GRID); the shape of each; and each shape's area at unit 1."""
    middle, unit = shapes.SIZE / 2, sum(SIZES["large"]) / 2
    area = {s: shapes.coverage([Figure(s, middle, middle, 24.0, 0.0)]).sum().item() / 24.0**2 for s in SHAPES}
    units, turns = (sum(SIZES["small"]) / 2, unit), [math.radians(d) for d in range(-15, 16, 3)]
    figures = [Figure(s, middle, middle, u, turn) for s in SHAPES for u in units for turn in turns]
    sharp = shapes.coverage(figures)[:, None]
    soft = _smooth(_smooth(_smooth(sharp)))
    masks = torch.cat((sharp, soft, _smooth(_smooth(_smooth(soft)))))[:, 0]
    centre = torch.full((len(masks),), middle)
    return _standard(masks, centre, centre, masks.sum((1, 2))), 3 * [f.shape for f in figures], area


def _shapes(masks: Tensor) -> list[str | None]:
    """The shapes of standard masks (R, GRID * GRID)."""
    templates, names, _ = _templates()
    likeness = 2 * masks @ templates.T / (masks.square().sum(1)[:, None] + templates.square().sum(1))
    best, which = likeness.max(1)
    return [names[k] if value >= LIKENESS else None for value, k in zip(best.tolist(), which.tolist(), strict=True)]
