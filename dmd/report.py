"""report.html of a run: one self-contained page, made from the files of the run directory and nothing else.

`read` collects what there is as `RunFiles`, `page` turns that into a `Page` of plain values ready to print, and the
template report.html.jinja lays them out. The plots (`dmd.plots`) are small SVGs without text; labels are HTML around
them, so that they keep their size on a phone. The same files give the same bytes: the page has no date of its own.
"""

import base64
import io
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmd.plots import (
    Chart,
    Level,
    Series,
    Tick,
    curve,
    drawable,
    duration,
    in_words,
    linear_axis,
    log_axis,
    number,
    percent,
    place,
    show,
    step_axis,
    step_texts,
    tick_texts,
)

if TYPE_CHECKING:
    from PIL import Image


FEW_SAMPLES = 10_000
"""A Fréchet distance from fewer samples is visibly biased upwards."""
MAX_ROWS = 200
"""Longer tables of evaluations are thinned."""
MAX_PNG = 64
"""Images up to this size are kept exactly; larger ones become JPEG."""
MAX_TILE = 96
"""Larger sample images are shrunk to this size."""


def write(folder: Path) -> Path:
    """Write `folder/report.html` from the other files there; returns its path.

    Files that are missing or damaged only cost their section. The old report stays until the new one is complete.
    """
    html = render(page(read(folder)))
    path = folder / "report.html"
    temporary = folder / ".tmp-report.html"
    temporary.write_bytes(html.encode("utf-8", "replace"))
    temporary.replace(path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# What the run directory holds


@dataclass(frozen=True)
class RunFiles:
    """The readable content of a run directory.

    Attributes:
        folder: the run directory.
        config, environment, summary, student: content of config.json, environment.json, summary.json and
            student/config.json; empty if the file is missing or damaged.
        metrics: metrics.jsonl by name of the figure.
        damaged_lines: how many of its lines could not be read.
        pictures: (step, path) of samples/step-*.png, in order.
    """

    folder: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    summary: Mapping[str, Any]
    student: Mapping[str, Any]
    metrics: Mapping[str, Series]
    damaged_lines: int
    pictures: Sequence[tuple[int, Path]]

    @property
    def last_step(self) -> int:
        """The last step with figures, 0 if there is none."""
        return max((series[-1][0] for series in self.metrics.values()), default=0)

    def option(self, group: str, name: str) -> Any:
        """A value of config.json, or None."""
        options = self.config.get(group)
        return options.get(name) if isinstance(options, dict) else None

    def final(self, who: str) -> Mapping[str, Any]:
        """Final figures of "teacher" or "student", empty if there are none."""
        figures = self.summary.get(who)
        return figures if isinstance(figures, dict) else {}

    def best(self) -> tuple[int, float] | None:
        """Step and distance of the evaluation whose student is kept: the best, or with prompts the last."""
        finite = [p for p in self.metrics.get("eval/fd", []) if math.isfinite(p[1])]
        if self.keeps_last:
            return finite[-1] if finite else None
        return min(finite, key=lambda p: p[1], default=None)

    @property
    def keeps_last(self) -> bool:
        """Whether this run asks for prompts, and so keeps the student of its last evaluation."""
        return self.option("data", "prompts") is not None


def read(folder: Path) -> RunFiles:
    """Everything readable in a run directory."""
    metrics, damaged = _read_metrics(folder / "metrics.jsonl")
    return RunFiles(
        folder,
        _read_object(folder / "config.json"),
        _read_object(folder / "environment.json"),
        _read_object(folder / "summary.json"),
        _read_object(folder / "student" / "config.json"),
        metrics,
        damaged,
        _step_pictures(folder / "samples"),
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_metrics(path: Path) -> tuple[dict[str, Series], int]:
    """Figures by name, and how many lines were not whole. A step that is there twice counts once: the later line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return {}, 0
    figures: dict[str, dict[int, float]] = {}
    damaged = 0
    for line in lines:
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
            continue
        if type(step) is not int or not 0 <= step < 2**53:
            damaged += 1
            continue
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                figures.setdefault(name, {})[step] = drawable(value)
    return {name: sorted(values.items()) for name, values in figures.items()}, damaged


def _step_pictures(folder: Path) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(r"step-(\d+)\.png", p.name), p) for p in folder.glob("step-*.png"))
    return sorted((int(match[1]), path) for match, path in found if match)


# ---------------------------------------------------------------------------------------------------------------------
# Which charts there are


@dataclass(frozen=True)
class Plan:
    """A chart to draw if its figures are there.

    Attributes:
        series: names in metrics.jsonl and their labels.
        hint: one sentence about what healthy looks like; "{clip}" stands for the clipping limit.
        log: use a logarithmic axis if the greatest value is more than 20 times the least.
        zero: let the axis include 0 and draw a line there.
        level: the teacher's final figure that is drawn as a reference line.
    """

    title: str
    series: Sequence[tuple[str, str]]
    hint: str
    log: bool = False
    zero: bool = False
    level: str | None = None


LOSSES = (
    Plan(
        "Matching loss",
        [("loss/matching", "matching")],
        "Starts at 0, since the fake score starts as the teacher, then rises and settles. It need not fall: the "
        "distance above is the judge.",
        log=True,
    ),
    Plan(
        "Regression loss",
        [("loss/regression", "regression")],
        "Falls and flattens while the student learns the teacher’s images of the same noise.",
    ),
    Plan(
        "Fake score’s loss",
        [("loss/fake", "fake score")],
        "Steady or slowly falling: the fake score keeps up with the student. A steady rise means that it lags "
        "behind and needs more updates per step.",
    ),
)

HEALTH = (
    Plan(
        "Accuracy",
        [("eval/accuracy", "student")],
        "Climbs to the teacher’s line: samples show the class that they were asked for.",
        level="accuracy",
    ),
    Plan(
        "Caption agreement",
        [("eval/caption_agreement", "student")],
        "Climbs to the teacher’s line: images show all that their captions say.",
        level="caption_agreement",
    ),
    Plan(
        "Diversity within a class or prompt",
        [("eval/diversity", "student")],
        "Ends near the teacher’s line. Far below it the student repeats itself, whatever its distance.",
        level="diversity",
    ),
    Plan(
        "Fake–real gap",
        [("health/fake_real_gap", "mean |x0_fake − x0_real|")],
        "Rises from 0, then levels off or falls. Growth without end means that the student is leaving the data.",
    ),
    Plan(
        "Parts of the matching gradient",
        [("health/matching_part", "matching"), ("health/guidance_part", "guidance")],
        "The guidance part starts large and falls as the student comes to what guidance asks for; the matching part "
        "answers it.",
    ),
    Plan(
        "Normaliser",
        [("health/normaliser", "mean |x − x0_real|")],
        "Smooth and well above 0: the matching gradient is divided by it.",
    ),
    Plan(
        "Drift from the teacher",
        [("health/brightness_drift", "brightness"), ("health/contrast_drift", "contrast")],
        "Both move towards 0: the student’s images are as bright and as rich in contrast as the teacher’s.",
        zero=True,
    ),
    Plan(
        "Gradient norms",
        [("grad/student", "student"), ("grad/fake", "fake score")],
        "Steady, without spikes, and mostly below the clipping limit{clip}.",
        log=True,
    ),
)


def _charts(run: RunFiles, plans: Sequence[Plan]) -> list[Chart]:
    return [chart for plan in plans if (chart := _chart(run, plan)) is not None]


def _distance_chart(run: RunFiles) -> Chart | None:
    """The distance at every evaluation, with the best one and the teacher's final one marked."""
    best = run.best()
    if best is None:
        return None
    kept = "the last" if run.keeps_last else "the best"
    hint = (
        f"Falls towards the teacher’s line and may pass it. The student of step {best[0]:,}, {kept}, is the one kept."
    )
    counted, final = run.metrics.get("eval/count"), number(run.final("teacher").get("count"))
    if counted and final and counted[-1][1] != final:
        hint += (
            f" The curve is measured with {show(counted[-1][1])} samples and the line with {show(final)}: "
            f"fewer samples give larger distances."
        )
    return _chart(run, Plan(_metric(run), [("eval/fd", "student")], hint, log=True, level="fd"), best)


def _chart(run: RunFiles, plan: Plan, best: tuple[int, float] | None = None) -> Chart | None:
    named = [(label, run.metrics[name]) for name, label in plan.series if name in run.metrics]
    values = [v for _, series in named for _, v in series if math.isfinite(v)]
    if not values:
        return None
    level = number(run.final("teacher").get(plan.level)) if plan.level else None
    shown = values + ([level] if level is not None else []) + ([0.0] if plan.zero else [])
    positive = [v for v in shown if v > 0]
    log = plan.log and len(positive) == len(shown) and max(shown) > 20 * min(shown)
    y = log_axis(min(shown), max(shown)) if log else linear_axis(min(shown), max(shown))
    x = step_axis(run.last_step)
    clip = number(run.option("distill", "max_grad_norm"))
    y_texts, unit = tick_texts(y)
    return Chart(
        plan.title,
        "logarithmic scale" if log else unit,
        plan.hint.replace("{clip}", f" of {show(clip)}" if clip else ""),
        [curve(label, series, x, y) for label, series in named],
        Level(f"teacher {show(level)}", percent(1 - y.at(level))) if level is not None else None,
        percent(1 - y.at(0.0)) if plan.zero else None,
        (f"kept: {show(best[1])} at step {best[0]:,}", *place(best, x, y)) if best else None,
        [Tick(text, percent(1 - y.at(t))) for t, text in zip(y.ticks, y_texts, strict=True)],
        [Tick(text, percent(x.at(t))) for t, text in zip(x.ticks, step_texts(x), strict=True)],
        in_words(plan.title, named, level),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True)
class Strip:
    """A row of samples: a data URI and its size in pixels."""

    label: str
    source: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Panel:
    """Rows of samples of the same noise, one above the other. `columns` is 0 if the single images are not known."""

    title: str
    strips: Sequence[Strip]
    columns: int
    pixelated: bool


def panels(path: Path, size: int | None, title: str, columns: int, most: int) -> list[Panel]:
    """The rows of a picture that `dmd.evaluation.save_grid` wrote, cut after every `columns` images.

    Args:
        path: the picture; its PNG text "rows" names the rows.
        size: height and width of one sample; if it does not fit the picture, the rows are not cut.
        title: of the panels, and part of the alternative texts.
        columns: images per panel.
        most: panels.

    Returns:
        panels; none if the file is missing or damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            labels = str(file.info.get("rows", "")).split(" | ")
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return []
    height = image.height // len(labels)
    if height == 0:
        return []
    rows = [image.crop((0, i * height, image.width, (i + 1) * height)) for i in range(len(labels))]
    tiles = _tiles_across(rows[0], size)
    if size is None or tiles == 0:
        return [Panel(title, [_strip(t, r, f"{t}, {title}") for t, r in zip(labels, rows, strict=True)], 0, False)]
    found = []
    for first in range(0, min(tiles, columns * most), columns):
        last = min(first + columns, tiles)
        strips = [
            _strip(label, _cut(row, size, first, last), f"{label}, {title}: samples {first + 1} to {last}")
            for label, row in zip(labels, rows, strict=True)
        ]
        found.append(Panel(title, strips, last - first, size <= 64))
    return found


def _tiles_across(row: "Image.Image", size: int | None) -> int:
    """How many images of `size` and their 1 pixel frames make up the row; 0 if it cannot be so."""
    if size is None or size < 1 or row.height % (size + 2):
        return 0
    scale = row.height // (size + 2)
    tiles, rest = divmod(row.width - scale, (size + 1) * scale)
    return tiles if rest == 0 else 0


def _cut(row: "Image.Image", size: int, first: int, last: int) -> "Image.Image":
    """Images first..last-1 of a row in their own resolution, or MAX_TILE if that is less, with clear gaps."""
    from PIL import Image

    scale = row.height // (size + 2)
    shown = min(size, MAX_TILE)
    gap = max(1, shown // 16)
    between = (0, 0, 0, 0) if shown <= MAX_PNG else (128, 128, 128, 255)
    strip = Image.new("RGBA", ((last - first) * (shown + gap) - gap, shown), between)
    for i in range(first, last):
        left = i * (size + 1) * scale
        tile = row.crop((left, 0, left + size * scale, size * scale))
        filter = Image.Resampling.NEAREST if shown == size else Image.Resampling.LANCZOS
        strip.paste(tile.resize((shown, shown), filter), ((i - first) * (shown + gap), 0))
    return strip


def _strip(label: str, image: "Image.Image", alt: str) -> Strip:
    """Small images as PNG, exact and with clear gaps; large ones as JPEG, so that the page stays light."""
    if image.width > 1024:
        image = image.resize((1024, max(1, image.height * 1024 // image.width)))
    buffer = io.BytesIO()
    if image.height <= MAX_PNG:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        image.convert("RGB").save(buffer, format="JPEG", quality=85)
        kind = "jpeg"
    code = base64.b64encode(buffer.getvalue()).decode()
    return Strip(label, f"data:image/{kind};base64,{code}", image.width, image.height, alt)


def _sample_size(run: RunFiles) -> int | None:
    for size in (run.student.get("size"), run.option("data", "size")):
        if isinstance(size, int):
            return size
    return None


def _development(run: RunFiles) -> list[Panel]:
    """Samples of the first, the last and two evaluations between."""
    found = run.pictures
    chosen = [found[i] for i in sorted({round(k * (len(found) - 1) / 3) for k in range(4)})] if found else []
    return [p for step, path in chosen for p in panels(path, _sample_size(run), f"step {step:,}", columns=8, most=1)]


# ---------------------------------------------------------------------------------------------------------------------
# Words and tables


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


@dataclass(frozen=True)
class Difference:
    """An option that is not as in the preset."""

    flag: str
    here: str
    preset: str


@dataclass(frozen=True)
class Page:
    """Everything on the page, ready to print."""

    name: str
    finished: bool
    headline: str
    facts: Sequence[str]
    cautions: Sequence[str]
    comparison: Sequence[Panel]
    comparison_caption: str
    figures: Sequence[FigureRow]
    figures_note: str
    distance: Chart | None
    evaluations: Evaluations | None
    losses: Sequence[Chart]
    health: Sequence[Chart]
    has_bands: bool
    development: Sequence[Panel]
    command: Sequence[str]
    environment: Sequence[tuple[str, str]]
    preset: str
    differences: Sequence[Difference]
    config: str


def page(run: RunFiles) -> Page:
    """The page of a run."""
    preset, differences = _differences(run)
    losses, health = _charts(run, LOSSES), _charts(run, HEALTH)
    return Page(
        name=run.folder.resolve().name,
        finished=_is_finished(run),
        headline=_headline(run),
        facts=_facts(run),
        cautions=list(_cautions(run)),
        comparison=panels(run.folder / "samples" / "final.png", _sample_size(run), "final samples", 10, 2),
        comparison_caption=_comparison_caption(run),
        figures=_figures(run),
        figures_note=_figures_note(run),
        distance=_distance_chart(run),
        evaluations=_evaluations(run),
        losses=losses,
        health=health,
        has_bands=any(curve.bands for chart in (*losses, *health) for curve in chart.curves),
        development=_development(run),
        command=_command(run),
        environment=_environment(run),
        preset=preset,
        differences=differences,
        config=json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else "",
    )


def render(page: Page) -> str:
    """The page as HTML. Everything that comes from files is escaped."""
    return str(_template().render(page=page))


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _metric(run: RunFiles) -> str:
    name = run.summary.get("metric")
    return name if isinstance(name, str) else "Fréchet distance"


def _is_finished(run: RunFiles) -> bool:
    return bool(run.final("student")) and bool(run.final("teacher"))


def _headline(run: RunFiles) -> str:
    ratio, speed = number(run.summary.get("fd_ratio")), number(run.summary.get("speedup"))
    if _is_finished(run) and ratio is not None and speed is not None:
        agreement = run.final("student").get("caption_agreement"), run.final("teacher").get("caption_agreement")
        ours, theirs = map(number, agreement)
        shows = (
            f"{ours:.1%} of its images show their caption ({theirs:.1%} of its teacher’s), " if ours and theirs else ""
        )
        return (
            f"At one step, {shows}the student’s distance is {show(ratio)} times its teacher’s, and it is "
            f"{speed:.1f} times as fast."
        )
    if _is_finished(run):
        return "The run is finished."
    total, best = number(run.option("distill", "max_train_steps")), run.best()
    if run.last_step == 0:
        return "This run is not finished: it has not begun to distil."
    done = f"step {run.last_step:,}" + (f" of {show(total)}" if total else "")
    text = f"This run is not finished: it has reached {done}."
    so_far = "last" if run.keeps_last else "best"
    return text + (f" The {so_far} distance so far is {show(best[1])}, at step {best[0]:,}." if best else "")


OBJECTIVES = {"dmd": "matching and regression", "matching": "matching only", "regression": "regression only"}


def _facts(run: RunFiles) -> list[str]:
    """What was done, in a few short pieces."""
    objective = run.option("distill", "objective")
    found = [
        f"preset {run.config['preset']}" if isinstance(run.config.get("preset"), str) else None,
        OBJECTIVES.get(objective) if isinstance(objective, str) else None,
        _count(run.summary.get("generator_updates"), "generator updates"),
        _count(run.summary.get("critic_updates"), "critic updates"),
        _count(run.summary.get("images_seen"), "images seen"),
    ]
    distil, wall = number(run.summary.get("distil_seconds")), number(run.summary.get("wall_seconds"))
    if distil is None and run.metrics.get("seconds"):
        distil = run.metrics["seconds"][-1][1]
    if distil is not None:
        found.append(f"{duration(distil)} of distillation" + (f", {duration(wall)} in all" if wall else ""))
    return [f for f in found if f]


def _count(value: Any, what: str) -> str | None:
    found = number(value)
    return None if found is None else f"{show(found)} {what}"


def _cautions(run: RunFiles) -> Iterator[str]:
    """What the headline alone would hide."""
    teacher, student = run.final("teacher"), run.final("student")
    poor = []
    for name in ("recall", "diversity"):
        ours, theirs = number(student.get(name)), number(teacher.get(name))
        if ours is not None and theirs is not None and ours < theirs / 2:
            poor.append(f"{name} {ours:.3f} against {theirs:.3f}")
    if poor:
        figures = ", ".join(poor)
        yield f"The student is much less varied than its teacher ({figures}). The distance alone does not show this."
    series, best = run.metrics.get("eval/fd", []), run.best()
    if _is_finished(run) and not run.keeps_last and best and len(series) > 2 and best[0] == series[-1][0]:
        yield (
            "The last evaluation was the best, so the student may still be improving: "
            "the same command with a larger --max-train-steps goes on from here."
        )
    updates = number(run.summary.get("generator_updates"))
    if updates is not None and run.last_step > updates:
        yield (
            f"The run has gone on to step {run.last_step:,} since its final figures were taken at step "
            f"{show(updates)}; they are renewed when it ends."
        )
    if (run.folder / "summary.json").exists() and not _is_finished(run):
        yield "summary.json could not be read."
    if run.damaged_lines:
        lines = "1 line" if run.damaged_lines == 1 else f"{run.damaged_lines:,} lines"
        yield f"{lines} of metrics.jsonl could not be read and {'is' if run.damaged_lines == 1 else 'are'} left out."


def _comparison_caption(run: RunFiles) -> str:
    text = "Each column starts from the same noise."
    nfe = number(run.final("teacher").get("nfe"))
    if nfe:
        text += f" The student evaluates its network once, the teacher {show(nfe)} times."
    classes = run.student.get("classes")
    if isinstance(classes, list) and 1 < len(classes) <= 12:
        text += f" Classes in turn: {', '.join(map(str, classes))}."
    prompts = run.summary.get("prompts")
    if isinstance(prompts, list) and prompts:
        text += " Captions in turn: " + "; ".join(f"{i}. {p}" for i, p in enumerate(prompts, 1)) + "."
    return text


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


def _figures(run: RunFiles) -> list[FigureRow]:
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
        rows.append(FigureRow(title or _metric(run), hint, _cell(name, a), _cell(name, b), _cell("ratio", ratio)))
    return rows


def _cell(name: str, value: float | None) -> Cell:
    if value is None:
        return Cell("–")
    if name in FRACTIONS:
        return Cell(f"{value:.3f}".replace("-", "−"), value)
    if name == "ratio":
        return Cell(f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else show(value), value)
    return Cell(show(value), value)


def _figures_note(run: RunFiles) -> str:
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


def _evaluations(run: RunFiles) -> Evaluations | None:
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


def _command(run: RunFiles) -> list[str]:
    """The command line of the run in pieces that belong on one line, ready to paste; empty if it is not known."""
    argv = run.environment.get("command")
    if not isinstance(argv, list) or not argv or not all(isinstance(a, str) for a in argv):
        return []
    program = Path(argv[0])
    start = [program.name]
    if program.name == "__main__.py":
        start = [*_launcher(run), "-m", program.parent.name]
    elif program.suffix == ".py":
        start = [*_launcher(run), argv[0]]
    pieces = [start]
    for argument in argv[1:]:
        if argument.startswith("--"):
            pieces.append([])
        pieces[-1].append(argument)
    return [shlex.join(p) for p in pieces]


def _launcher(run: RunFiles) -> list[str]:
    processes = number(run.environment.get("processes"))
    if processes is None or processes <= 1:
        return ["python"]
    return ["accelerate", "launch", "--num_processes", f"{processes:.0f}"]


ENVIRONMENT = {
    "dmd": "dmd",
    "commit": "commit",
    "torch": "PyTorch",
    "python": "Python",
    "platform": "system",
    "device": "device",
    "processes": "processes",
    "threads": "threads per process",
    "cpus": "CPU cores",
}


def _environment(run: RunFiles) -> list[tuple[str, str]]:
    known = run.environment
    names = [*ENVIRONMENT, *sorted(set(known) - {*ENVIRONMENT, "command"})]
    return [(ENVIRONMENT.get(n, n), str(known[n])) for n in names if known.get(n) is not None]


def _differences(run: RunFiles) -> tuple[str, list[Difference]]:
    """The preset's name, and the options in which the run differs from it."""
    from dmd.config import PRESETS, Config, to_json

    name = run.config.get("preset")
    default = PRESETS.get(name, Config()) if isinstance(name, str) else Config()
    before, here = dict(_leaves(to_json(default))), dict(_leaves(run.config))
    found = [
        Difference("--" + key.rpartition(".")[2].replace("_", "-"), _value(value), _value(before.get(key)))
        for key, value in here.items()
        if key != "preset" and (key not in before or before[key] != value)
    ]
    return default.preset, found


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _value(value: Any) -> str:
    """An option's value as on the command line."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
