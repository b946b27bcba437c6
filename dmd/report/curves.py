"""Which curves the report draws, and what a healthy one looks like."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dmd.plots import (
    Chart,
    Level,
    Tick,
    curve,
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
from dmd.report.files import RunFiles


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
        "Both move towards 0: images of the student are as bright and as rich in contrast as the teacher’s of the same "
        "noise. Growth without end means that it saturates or fades.",
        zero=True,
    ),
    Plan(
        "Gradient norms",
        [("grad/student", "student"), ("grad/fake", "fake score")],
        "Steady, without spikes, and mostly below the clipping limit{clip}.",
        log=True,
    ),
)


def charts(run: RunFiles, plans: Sequence[Plan]) -> list[Chart]:
    return [chart for plan in plans if (chart := _chart(run, plan)) is not None]


def distance_chart(run: RunFiles) -> Chart | None:
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
    return _chart(run, Plan(run.metric, [("eval/fd", "student")], hint, log=True, level="fd"), best)


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
