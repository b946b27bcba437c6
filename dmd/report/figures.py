"""Tables of figures: student beside teacher, and every evaluation while training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dmd.plots import number, show
from dmd.report.files import RunFiles

FEW_SAMPLES = 10_000
"""A Fréchet distance from fewer samples is visibly biased upwards."""
MAX_ROWS = 200
"""Longer tables of evaluations are thinned."""


@dataclass(frozen=True)
class Cell:
    """A figure of a table: its text, and its exact value."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class FigureRow:
    """One line of the comparison."""

    name: str
    hint: str
    teacher: Cell
    student: Cell
    ratio: Cell


@dataclass(frozen=True)
class Evaluations:
    """Figures of the evaluations while training; `best` is the position of the best row, `left_out` counts others."""

    names: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    best: int
    left_out: int


FIGURES = {
    "fd": ("", "lower is better"),
    "accuracy": ("Accuracy", "samples that show their class"),
    "caption_agreement": ("Caption agreement", "images that show all of their caption"),
    "caption_one_thing": ("– of one thing", ""),
    "caption_two_things": ("– of two things", ""),
    "caption_count": ("– how many things", ""),
    "caption_shape": ("– their shapes", ""),
    "caption_colour": ("– their colours", ""),
    "caption_size": ("– their sizes", ""),
    "caption_where": ("– place or relation", ""),
    "caption_background": ("– background", ""),
    "precision": ("Precision", "samples that look real"),
    "recall": ("Recall", "real images that are covered"),
    "density": ("Density", "precision, robust to outliers"),
    "coverage": ("Coverage", "recall, robust to outliers"),
    "diversity": ("Diversity", "within a class or prompt"),
    "brightness": ("Brightness", "mean, −1 to 1"),
    "contrast": ("Contrast", "within an image"),
    "images_per_second": ("Images per second", ""),
    "nfe": ("Network evaluations", "per image"),
    "count": ("Samples", ""),
}
"""Names and explanations of final figures, in the order of the table."""

FRACTIONS = {"accuracy", "precision", "recall", "density", "coverage", "diversity", "brightness", "contrast"}
FRACTIONS |= {name for name in FIGURES if name.startswith("caption_")}
NO_RATIO = {"count", "brightness"}


def figures(run: RunFiles) -> list[FigureRow]:
    """The comparison, row by row; figures that this page does not know come last, under their own names."""
    teacher, student = run.final("teacher"), run.final("student")
    names = [n for n in (*FIGURES, *sorted({*teacher, *student} - set(FIGURES))) if n in teacher or n in student]
    rows = []
    for name in names:
        a, b = number(teacher.get(name)), number(student.get(name))
        if a is None and b is None:
            continue
        title, hint = FIGURES.get(name, (name, ""))
        ratio = b / a if a and b is not None and name not in NO_RATIO else None
        rows.append(FigureRow(title or run.metric, hint, _cell(name, a), _cell(name, b), _cell("ratio", ratio)))
    return rows


def _cell(name: str, value: float | None) -> Cell:
    if value is None:
        return Cell("–")
    if name in FRACTIONS:
        return Cell(f"{value:.3f}".replace("-", "−"), value)
    if name == "ratio":
        return Cell(f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else show(value), value)
    return Cell(show(value), value)


def figures_note(run: RunFiles) -> str:
    samples, reference = number(run.summary.get("samples")), number(run.summary.get("reference_images"))
    if samples is None:
        return ""
    against = f", measured against {show(reference)} real images" if reference else ""
    text = f"Both made {show(samples)} samples from the same noise{against}."
    if samples < FEW_SAMPLES:
        text += (
            f" Distances from fewer than {FEW_SAMPLES:,} samples are biased upwards: compare them only with others "
            f"of the same count, and use --final-samples for a figure to publish."
        )
    return text


def evaluations(run: RunFiles) -> Evaluations | None:
    """Figures of every evaluation, as a table."""
    best = run.best()
    if best is None:
        return None
    shown = ("fd", "accuracy", "caption_agreement", "precision", "recall", "diversity")
    columns = [n for n in shown if f"eval/{n}" in run.metrics]
    by_step = {n: dict(run.metrics[f"eval/{n}"]) for n in columns}
    steps = list(by_step["fd"])
    every = math.ceil(len(steps) / MAX_ROWS)
    kept = [s for i, s in enumerate(steps) if i % every == 0 or s in (best[0], steps[-1])]
    rows = [(f"{s:,}", [_cell(n, number(by_step[n].get(s))) for n in columns]) for s in kept]
    names = [FIGURES[n][0] or "Distance" for n in columns]
    return Evaluations(names, rows, kept.index(best[0]), len(steps) - len(kept))
