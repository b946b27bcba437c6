"""Which of a student's images are its best and its worst, beside its teacher's of the same noise.

Means hide failures: the few images that went wrong are what a user meets first. A `Ranking` orders images, `extremes`
picks both ends, and `save` leaves them where the report finds them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd import checkpoint
from dmd.data.images import to_float, to_uint8
from dmd.data.shapes import Scene
from dmd.evaluation import save_grid
from dmd.metrics import caption
from dmd.metrics.evaluate import features_of
from dmd.metrics.networks import FeatureNet

EXTREMES = "extremes.json"
"""File beside the pictures best.png and worst.png."""


@dataclass(frozen=True)
class Ranked:
    """What a ranking says of N images.

    Attributes:
        scores: (N,) float64, less is better.
        remarks: what to write below each image.
    """

    scores: Tensor
    remarks: Sequence[str]


@dataclass(frozen=True)
class Ranking:
    """An order of images.

    Attributes:
        by: what is compared, as it follows "by the".
        rank: images (N, C, H, W) in [-1, 1] of student and teacher from the same noise, and the numbers (N,) of their
            prompts.
    """

    by: str
    rank: Callable[[Tensor, Tensor, Tensor], Ranked]


def by_pixels() -> Ranking:
    """By the distance of pixels, where nothing knows what is in them."""

    def rank(student: Tensor, teacher: Tensor, numbers: Tensor) -> Ranked:
        return _distances((_seen(student) - _seen(teacher)).double().flatten(1).square().mean(1).sqrt())

    return Ranking("distance from the teacher’s image (root mean square of pixels in −1 to 1)", rank)


def by_features(net: FeatureNet) -> Ranking:
    """By the Euclidean distance of features, those of the network behind the Fréchet distance."""

    def rank(student: Tensor, teacher: Tensor, numbers: Tensor) -> Ranked:
        a, b = (features_of(_seen(x), net)[0].double() for x in (student, teacher))
        return _distances((a - b).square().sum(1).sqrt())

    return Ranking(f"distance from the teacher’s image, on the features of {net.name.removeprefix('FD-')}", rank)


def by_caption(scenes: Sequence[Scene], among_equals: Ranking) -> Ranking:
    """By how many attributes of their captions images of the world of shapes get wrong; then by another ranking."""

    def rank(student: Tensor, teacher: Tensor, numbers: Tensor) -> Ranked:
        hits = caption.matches(student, [scenes[i] for i in numbers.tolist()])
        wrong = torch.stack([~hits[name] for name in caption.ATTRIBUTES], dim=1)
        other = among_equals.rank(student, teacher, numbers).scores
        words = [name.replace("where", "place") for name in caption.ATTRIBUTES]
        named = [", ".join(n for n, w in zip(words, row, strict=True) if w) for row in wrong.tolist()]
        remarks = [f"wrong: {names}" if names else "all right" for names in named]
        return Ranked(wrong.sum(1) + other / (1 + other), remarks)

    return Ranking(f"attributes of its caption that an image gets wrong, and then by the {among_equals.by}", rank)


def _seen(x: Tensor) -> Tensor:
    """As files would show it: clamped, and rounded to 256 levels."""
    return to_float(to_uint8(x))


def _distances(d: Tensor) -> Ranked:
    return Ranked(d, [f"distance {value:.3g}" for value in d.tolist()])


@dataclass(frozen=True)
class Pick:
    """An image at an end of the order: `index` is its place among the samples."""

    index: int
    seed: int
    prompt: str
    score: float
    remark: str


def extremes(ranked: Ranked, prompts: Sequence[str], first_seed: int, most: int) -> tuple[list[Pick], list[Pick]]:
    """The best images, best first, and the worst, worst first: `most` of each, fewer where they would meet.

    Args:
        prompts: of each image.
        first_seed: of the first image; the others follow.

    Raises:
        ValueError: a score is NaN.
    """
    if ranked.scores.isnan().any():
        raise ValueError(f"image {int(ranked.scores.isnan().nonzero()[0])} has no rank: its score is NaN")
    order = ranked.scores.argsort(stable=True).tolist()
    count = min(most, len(order) // 2)

    def pick(i: int) -> Pick:
        return Pick(i, first_seed + i, prompts[i], ranked.scores[i].item(), ranked.remarks[i])

    return [pick(i) for i in order[:count]], [pick(i) for i in order[::-1][:count]]


def save(
    folder: Path, ranking: Ranking, student: Tensor, teacher: Tensor, picks: tuple[list[Pick], list[Pick]]
) -> None:
    """best.png and worst.png, the student's row above the teacher's, and what is known of each column."""
    facts: dict[str, Any] = {"by": ranking.by, "samples": len(student)}
    for name, found in zip(("best", "worst"), picks, strict=True):
        index = [p.index for p in found]
        if index:
            save_grid((student[index], teacher[index]), folder / f"{name}.png", 1, ("student", "teacher"))
        facts[name] = [{k: v for k, v in asdict(p).items() if k != "index"} for p in found]
    checkpoint.write_json(folder / EXTREMES, facts)
