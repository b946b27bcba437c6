"""What a preset's default run is to reach, beside what a run has reached."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmd.plots import number, show
from dmd.report.files import RunFiles


@dataclass(frozen=True)
class Target:
    """A bound of a figure of the student.

    Attributes:
        figure: its name in summary.json.
        bound: the least good value.
        most: smaller values are better.
        ratio: the bound is of student / teacher.
    """

    name: str
    figure: str
    bound: float
    most: bool = False
    ratio: bool = False


def distance(bound: float) -> Target:
    return Target("Distance, student / teacher", "fd", bound, most=True, ratio=True)


TARGETS: Mapping[str, Sequence[Target]] = {
    "digits": (distance(2.0), Target("Accuracy", "accuracy", 0.97)),
    "fashion": (distance(1.15),),
    "cifar10": (distance(1.15),),
    "shapes": (
        Target("Caption agreement, student / teacher", "caption_agreement", 0.9, ratio=True),
        distance(1.3),
        Target("Diversity, student / teacher", "diversity", 0.9, ratio=True),
    ),
    "sd15": (Target("Images per second, student / teacher", "images_per_second", 24.0, ratio=True),),
    "sd15-24gb": (Target("Images per second, student / teacher", "images_per_second", 24.0, ratio=True),),
}
"""By preset."""


@dataclass(frozen=True)
class Outcome:
    """A target and what was reached, as text."""

    name: str
    reached: str
    target: str
    met: bool


def outcomes(run: RunFiles) -> list[Outcome]:
    """The targets of the run's preset whose figures are there."""
    preset = run.config.get("preset")
    found = []
    for target in TARGETS.get(preset, ()) if isinstance(preset, str) else ():
        value, teacher = (number(run.final(who).get(target.figure)) for who in ("student", "teacher"))
        if target.ratio:
            value = value / teacher if value is not None and teacher else None
        if value is not None:
            met = value <= target.bound if target.most else value >= target.bound
            sign = "at most" if target.most else "at least"
            found.append(Outcome(target.name, show(value), f"{sign} {show(target.bound)}", met))
    return found
