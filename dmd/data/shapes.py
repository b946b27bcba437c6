"""A world of captioned shapes: scenes, their captions, and their drawings of 64 x 64 pixels.

A scene is one thing at a place, or two things in a relation, on a background:

    a small red circle at the left on a blue background
    a red circle above a large blue square on a white background

Every scene has one caption and every caption one scene (`caption`, `parse`). A caption may leave a size out, which
means *any size*: `draw` picks one, and a checker takes either. Drawings are exact about everything that a caption
says, and random within it: position, size within its class, and a slight rotation.

Coordinates are in pixels, x to the right and y downwards, from the top left corner of the image.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dmd.data.images import Split
from dmd.errors import InputError
from dmd.seeding import Stream, bits

T = TypeVar("T")

SIZE = 64
"""Height and width of a drawing."""

COLOURS = {
    "red": (222, 45, 50),
    "yellow": (250, 212, 50),
    "green": (40, 160, 75),
    "blue": (35, 95, 220),
    "purple": (160, 60, 195),
    "pink": (250, 140, 180),
    "black": (25, 25, 30),
    "white": (245, 245, 245),
}
"""Name to (red, green, blue), 0 to 255. Any two are at least 120 apart."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

SIZES = {"small": (7.4, 8.2), "large": (10.4, 11.2)}
"""Name to the range of a thing's unit in pixels: about the radius of a disc that looks as big."""

PLACES = {"left": (18, 32), "right": (46, 32), "top": (32, 18), "bottom": (32, 46), "centre": (32, 32)}
"""Name to the point that a lone thing's centre is near."""

RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
"""Name to the direction from the second thing to the first."""

PLACE_JITTER = 3.0  # of a lone thing's centre, in pixels, along both axes
SIDE_JITTER = 4.0  # of each of two things' centres, across their relation
ROTATION = math.radians(10)
MARGIN = 2.5  # between a thing and the border
GAP = 6.0  # least distance between two things, along their relation

PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
HELD_OUT = frozenset((shape, list(COLOURS)[(3 * i + 1) % len(COLOURS)]) for i, shape in enumerate(SHAPES))
"""One colour per shape, all different: 6 of the 48 pairs. Every shape and every colour is seen in other pairs."""


@dataclass(frozen=True)
class Thing:
    """A shape of a colour; size None is any size.

    Raises:
        InputError: a name is not of this world.
    """

    shape: str
    colour: str
    size: str | None = None

    def __post_init__(self) -> None:
        _known("shape", self.shape, SHAPES)
        _known("colour", self.colour, COLOURS)
        if self.size is not None:
            _known("size", self.size, SIZES)


@dataclass(frozen=True)
class Scene:
    """One thing at a place, or two in a relation, on a background.

    Attributes:
        things: one or two, which then differ in shape or colour.
        where: one of `PLACES` for one thing; for two, one of `RELATIONS`: things[0] is `where` things[1].
        background: a colour that no thing has.

    Raises:
        InputError: it is not as above.
    """

    things: tuple[Thing, ...]
    where: str
    background: str

    def __post_init__(self) -> None:
        _known("background", self.background, COLOURS)
        if len(self.things) not in (1, 2):
            raise InputError(f"a scene of {len(self.things)} things is not possible: it has one or two")
        _known("place", self.where, PLACES) if len(self.things) == 1 else _known("relation", self.where, RELATIONS)
        for thing in self.things:
            if thing.colour == self.background:
                raise InputError(f"a {thing.colour} {thing.shape} cannot be seen on a {self.background} background")
        if len({(thing.shape, thing.colour) for thing in self.things}) < len(self.things):
            shape = f"{self.things[0].colour} {self.things[0].shape}"
            raise InputError(f"two things are a {shape}: they must differ in shape or colour")


def _known(what: str, name: str, names: Sequence[str] | dict) -> None:
    if name not in names:
        raise InputError(f"{what} '{_short(name)}' is unknown: choose from {', '.join(names)}")


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


# ----------------------------------------------------------------------------- captions


def caption(scene: Scene) -> str:
    """The one caption of a scene."""
    things = [" ".join(("a", *filter(None, (t.size, t.colour, t.shape)))) for t in scene.things]
    middle = f"at the {scene.where}" if len(things) == 1 else f"{scene.where} {things[1]}"
    middle = "in the centre" if scene.where == "centre" else middle
    return f"{things[0]} {middle} on a {scene.background} background"


def _alternatives(names: Sequence[str] | dict) -> str:
    return "|".join(names)


_THING = rf"a (?:({_alternatives(SIZES)}) )?({_alternatives(COLOURS)}) ({_alternatives(SHAPES)})"
_ON = rf" on a ({_alternatives(COLOURS)}) background"
_ONE = re.compile(rf"{_THING} (?:at the (left|right|top|bottom)|in the (centre)){_ON}")
_TWO = re.compile(rf"{_THING} ({_alternatives(RELATIONS)}) {_THING}{_ON}")
_WORDS = {"a", "at", "in", "the", "on", "background", *SIZES, *COLOURS, *SHAPES, *PLACES}
_WORDS |= {word for relation in RELATIONS for word in relation.split()}


def words() -> list[str]:
    """All words of captions, in a fixed order."""
    return sorted(_WORDS)


def parse(text: str) -> Scene:
    """The scene of a caption; letter case, further spaces and a full stop at the end do not matter.

    Raises:
        InputError: the text is no caption of this world.
    """
    plain = " ".join(text.lower().split()).removesuffix(".")
    if match := _ONE.fullmatch(plain):
        size, colour, shape, side, centre, background = match.groups()
        return Scene((Thing(shape, colour, size),), side or centre, background)
    if match := _TWO.fullmatch(plain):
        size, colour, shape, relation, size2, colour2, shape2, background = match.groups()
        return Scene((Thing(shape, colour, size), Thing(shape2, colour2, size2)), relation, background)
    foreign = [word for word in plain.split() if word not in _WORDS]
    if foreign:
        raise InputError(
            f"'{_short(foreign[0])}' is not a word of the world of shapes: it knows the shapes {', '.join(SHAPES)}, "
            f"the colours {', '.join(COLOURS)}, and the sizes {', '.join(SIZES)}"
        )
    raise InputError(
        f"'{_short(plain)}' is no caption of the world of shapes: write for example 'a small red circle at the left "
        "on a blue background' or 'a red circle above a large blue square on a white background'"
    )


def caption_counts() -> tuple[int, int]:
    """How many captions there are: of one thing, and of two."""
    sizes = len(SIZES) + 1
    visible = len(SHAPES) * (len(COLOURS) - 1)
    one = len(COLOURS) * visible * sizes * len(PLACES)
    return one, len(COLOURS) * visible * (visible - 1) * sizes**2 * len(RELATIONS)


def held_out(scene: Scene) -> bool:
    """Whether a thing of the scene is one of the `HELD_OUT` pairs, which training on the "train" split never shows."""
    return any((thing.shape, thing.colour) in HELD_OUT for thing in scene.things)


PLACED = {"above": ("top", "bottom"), "below": ("bottom", "top"), "left of": ("left", "right")}
PLACED |= {"right of": ("right", "left")}
"""Where the two things of a relation are."""
ANSWERS = [len(COLOURS) + 1, *[len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 2] * len(PLACES)]
"""How many answers there are to each of the questions that a caption answers, see `answers`."""


def answers(scene: Scene) -> list[int]:
    """The background's number, and for each of `PLACES` those of shape, colour and size there; 0 is none."""
    found = {name: [0, 0, 0] for name in PLACES}
    at = (scene.where,) if len(scene.things) == 1 else PLACED[scene.where]
    for place, thing in zip(at, scene.things, strict=True):
        size = 1 + [*SIZES, None].index(thing.size)
        found[place] = [1 + SHAPES.index(thing.shape), 1 + list(COLOURS).index(thing.colour), size]
    return [1 + list(COLOURS).index(scene.background), *(number for numbers in found.values() for number in numbers)]


# ----------------------------------------------------------------------------- scenes at random


def scenes(seed: int, index: Tensor, split: Split | None = None) -> list[Scene]:
    """The scenes at int64 (N,) `index`, a function of seed, split and each index alone.

    Half of all scenes have one thing. Backgrounds, shapes, places and relations are uniform, colours uniform over
    those that the background leaves, sizes over small, large and any; the second thing over what the first leaves.
    A split shifts this a little, as it redraws what it lacks.

    Args:
        seed: 0 to 2^64 - 1.
        index: 0 to 2^56 - 1.
        split: "train" has no scene that is `held_out`, "test" has no other; None has all.

    Raises:
        ValueError: seed or index is out of its range.
    """
    found: list[Scene | None] = [None] * len(index)
    rows, attempt = list(range(len(index))), 0
    while rows:
        words = bits(seed, Stream.SHAPES_SCENE, attempt, index[rows], 8).tolist()
        for row, drawn in zip(rows, map(_scene, words), strict=True):
            if split is None or held_out(drawn) == (split == "test"):
                found[row] = drawn
        rows, attempt = [row for row in rows if found[row] is None], attempt + 1
    return [each for each in found if each is not None]


def scene(seed: int, index: int, split: Split | None = None) -> Scene:
    """`scenes` at a single index."""
    return scenes(seed, torch.tensor([index]), split)[0]


def _scene(words: Sequence[int]) -> Scene:
    """A scene from eight random 32-bit words."""

    def choose(names: Iterable[T], word: int) -> T:
        among = list(names)
        return among[len(among) * words[word] >> 32]

    background = choose(COLOURS, 0)
    visible = [pair for pair in PAIRS if pair[1] != background]
    shape, colour = choose(visible, 1)
    sizes = (*SIZES, None)
    thing = Thing(shape, colour, choose(sizes, 2))
    if choose((1, 2), 3) == 1:
        return Scene((thing,), choose(PLACES, 4), background)
    shape2, colour2 = choose([pair for pair in visible if pair != (shape, colour)], 5)
    return Scene((thing, Thing(shape2, colour2, choose(sizes, 6))), choose(RELATIONS, 7), background)


# ----------------------------------------------------------------------------- outlines


def _polygon(count: int, radius: float, turn: float = 0.0) -> tuple[tuple[float, float], ...]:
    """Corners of a regular polygon around 0, the first at the top, turned by `turn` radians."""
    angles = (2 * math.pi * k / count + turn for k in range(count))
    return tuple((radius * math.sin(a), -radius * math.cos(a)) for a in angles)


# In units: half the side of the square, half the length and width of the cross's bars, radii of the others' rims.
_SQUARE, _ARM, _ARM_WIDTH, _RING, _HOLE, _TRIANGLE_RIM, _STAR_RIM = 0.88, 1.1, 0.4, 1.08, 0.56, 1.3, 1.25
_TRIANGLE, _STAR = _polygon(3, 1.0), _polygon(5, 1.0)  # directions of their corners
_CORNERS = {
    "square": _polygon(4, _SQUARE * math.sqrt(2), math.pi / 4),
    "triangle": _polygon(3, _TRIANGLE_RIM),
    "star": _polygon(5, _STAR_RIM),
    "cross": tuple(
        (a * x, b * y) for x, y in ((_ARM, _ARM_WIDTH), (_ARM_WIDTH, _ARM)) for a in (-1, 1) for b in (-1, 1)
    ),
}
_RADIUS = {"circle": 1.0, "ring": _RING}


def outline(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """How far points lie outside a shape around (0, 0), negative inside; everything in the shape's units.

    Near an edge it is the distance, elsewhere at most that. Made of sums, products, minima and maxima, so that a
    point's value does not depend on the tensor that it is in.

    Args:
        shape: one of `SHAPES`.
        x, y: tensors of one shape.
    """
    if shape == "circle":
        return (x * x + y * y).sqrt() - 1.0
    if shape == "ring":
        return ((x * x + y * y).sqrt() - (_RING + _HOLE) / 2).abs() - (_RING - _HOLE) / 2
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - _SQUARE
    if shape == "cross":
        x, y = x.abs(), y.abs()
        return torch.minimum(torch.maximum(x - _ARM, y - _ARM_WIDTH), torch.maximum(x - _ARM_WIDTH, y - _ARM))
    if shape == "triangle":
        return torch.stack([-(x * u + y * v) for u, v in _TRIANGLE]).amax(0) - _TRIANGLE_RIM / 2
    # A five-pointed star is what lies inside at least four of the five lines that bound it.
    lines = [x * u + y * v for u, v in _STAR]
    most = second = torch.full_like(x, -math.inf)
    for line in lines:
        second = torch.maximum(second, torch.minimum(most, line))
        most = torch.maximum(most, line)
    return second - _STAR_RIM * math.cos(math.radians(72))


def _extent(shape: str, angle: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """How far a turned shape reaches from its centre, in units: (left, right), (up, down)."""
    if shape in _RADIUS:
        return ((_RADIUS[shape],) * 2,) * 2
    cos, sin = math.cos(angle), math.sin(angle)
    xs = [cos * x - sin * y for x, y in _CORNERS[shape]]
    ys = [sin * x + cos * y for x, y in _CORNERS[shape]]
    return (-min(xs), max(xs)), (-min(ys), max(ys))


# ----------------------------------------------------------------------------- drawing


class Figure(NamedTuple):
    """A thing as it is drawn: its centre and unit in pixels, turned clockwise by `angle` radians."""

    shape: str
    x: float
    y: float
    unit: float
    angle: float


def coverage(figures: Sequence[Figure], size: int = SIZE) -> Tensor:
    """Which part of each pixel a figure covers: float32 (N, size, size) in [0, 1]."""
    # Two by two points a pixel, each blended over its own width: smooth edges, and sharp corners.
    points = (torch.arange(2 * size, dtype=torch.float32) + 0.5) / 2
    result = torch.empty(len(figures), size, size)
    for shape in sorted({figure.shape for figure in figures}):
        rows = [row for row, figure in enumerate(figures) if figure.shape == shape]
        chosen = [figures[row] for row in rows]
        turns = [(f.x, f.y, math.cos(f.angle) / f.unit, math.sin(f.angle) / f.unit, f.unit) for f in chosen]
        x, y, cos, sin, unit = torch.tensor(turns, dtype=torch.float64).float().T[:, :, None, None]
        dx, dy = points - x, points[:, None] - y
        distance = unit * outline(shape, cos * dx + sin * dy, cos * dy - sin * dx)
        inside = (0.5 - 2 * distance).clamp(0, 1)
        quarters = (inside[:, ::2, ::2] + inside[:, ::2, 1::2]) + (inside[:, 1::2, ::2] + inside[:, 1::2, 1::2])
        result[rows] = quarters / 4
    return result


def figures(scene: Scene, words: Sequence[int]) -> list[Figure]:
    """Where the things of a scene stand, from twelve random 32-bit words."""
    free = [(word + 0.5) / 2**32 for word in words]
    if len(scene.things) == 1:
        bare = _bare(scene.things[0], free[:3])
        x, y = PLACES[scene.where]
        return [_moved(bare, x + (2 * free[3] - 1) * PLACE_JITTER, y + (2 * free[4] - 1) * PLACE_JITTER)]
    first, second = (_bare(thing, free[k : k + 3]) for thing, k in zip(scene.things, (0, 3), strict=True))
    (dx, dy), sides = RELATIONS[scene.where], [SIZE / 2 + (2 * u - 1) * SIDE_JITTER for u in free[6:8]]
    backwards = dx + dy > 0  # the first thing is the lower one, or the one to the right
    near, far = (second, first) if backwards else (first, second)
    along = _along(near, far, vertical=dx == 0, free=free[8:10])
    placed = [
        _moved(f, side, a) if dx == 0 else _moved(f, a, side)
        for f, a, side in zip((near, far), along, sides, strict=True)
    ]
    return placed[::-1] if backwards else placed


def _bare(thing: Thing, free: Sequence[float]) -> Figure:
    """A thing at (0, 0)."""
    size = thing.size or list(SIZES)[int(free[0] * len(SIZES))]
    low, high = SIZES[size]
    angle = 0.0 if thing.shape in _RADIUS else (2 * free[2] - 1) * ROTATION
    return Figure(thing.shape, 0.0, 0.0, low + (high - low) * free[1], angle)


def _moved(figure: Figure, x: float, y: float) -> Figure:
    """The figure at (x, y), or as near as the margin allows."""
    (left, right), (up, down) = _extent(figure.shape, figure.angle)
    x = min(max(x, MARGIN + figure.unit * left), SIZE - MARGIN - figure.unit * right)
    y = min(max(y, MARGIN + figure.unit * up), SIZE - MARGIN - figure.unit * down)
    return figure._replace(x=x, y=y)


def _along(near: Figure, far: Figure, vertical: bool, free: Sequence[float]) -> tuple[float, float]:
    """Centres of two figures along the axis of their relation: the room that they leave is shared out at random."""
    a, b = (near.unit * e for e in _extent(near.shape, near.angle)[vertical])
    c, d = (far.unit * e for e in _extent(far.shape, far.angle)[vertical])
    room = SIZE - 2 * MARGIN - GAP - (a + b + c + d)
    before, after = sorted(free)
    first = MARGIN + room * before + a
    return first, first + b + GAP + room * (after - before) + c


def batch(scenes: Sequence[Scene], seed: int, index: Tensor) -> Tensor:
    """Drawings of N scenes: uint8 (N, 3, 64, 64), each a function of its scene, the seed and its own index alone.

    Args:
        scenes: N scenes.
        seed: 0 to 2^64 - 1.
        index: (N,) int64, 0 to 2^56 - 1: which of a scene's many drawings.

    Raises:
        ValueError: the counts differ, or seed or index is out of its range.
    """
    if len(scenes) != len(index):
        raise ValueError(f"there are {len(scenes)} scenes but {len(index)} indices: each drawing needs both")
    words = bits(seed, Stream.SHAPES_DRAWING, 0, index, 12).tolist()
    placed = [figures(scene, row) for scene, row in zip(scenes, words, strict=True)]
    images = _levels([scene.background for scene in scenes])[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    for k in range(max(map(len, placed), default=0)):
        rows = [row for row, figure in enumerate(placed) if len(figure) > k]
        cover = coverage([placed[row][k] for row in rows])[:, None]
        colour = _levels([scenes[row].things[k].colour for row in rows])[:, :, None, None]
        images = images.index_copy(0, torch.tensor(rows), images[rows] * (1 - cover) + colour * cover)
    return images.round().to(torch.uint8)


def _levels(colours: Sequence[str]) -> Tensor:
    return torch.tensor([COLOURS[colour] for colour in colours], dtype=torch.float32).reshape(-1, 3)


def draw(scene: Scene, seed: int, index: int) -> Tensor:
    """One drawing of a scene: uint8 (3, 64, 64), a function of the three arguments. See `batch`."""
    return batch([scene], seed, torch.tensor([index]))[0]
