"""Numbers as text, and the geometry of small plots: from series of (step, value) to axes, ticks and SVG points.

A plot here is values, not markup: positions are per cent of the plotting area, from its left and top.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Series = list[tuple[int, float]]
"""(step, value), in order of steps. A value may be NaN: the curve has a gap there."""

MAX_POINTS = 300
"""Longer curves become means of stretches, on a band from the least to the greatest."""


# ---------------------------------------------------------------------------------------------------------------------
# Numbers as text


def drawable(value: int | float) -> float:
    """NaN for what is so large that it cannot be drawn."""
    return float(value) if -1e100 < value < 1e100 else math.nan


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(drawable(value)):
        return None
    return value


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def show(value: float) -> str:
    """A number with three or so digits that mean something: 12,800, 29.7, 0.0605, 3.25×10⁻⁸."""
    if value < 0:
        return "−" + show(-value)
    if value == int(value) and value < 1e15:
        return f"{int(value):,}"
    if 1e-3 <= value < 1e9:
        decimals = max(0, 2 - math.floor(math.log10(value)))
        return f"{value:,.{decimals}f}"
    digits, power = f"{value:.2e}".split("e")
    return f"{digits}×10{_superscript(int(power))}"


def duration(seconds: float) -> str:
    """81.3 is "1 min 21 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


# ---------------------------------------------------------------------------------------------------------------------
# Plots


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis."""

    text: str
    at: float


@dataclass(frozen=True)
class Curve:
    """A line of a chart. `segments` and `bands` are SVG points of polylines and polygons, `dots` the marked points."""

    label: str
    latest: str
    segments: Sequence[str]
    bands: Sequence[str]
    dots: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Level:
    """A horizontal reference line."""

    label: str
    at: float


@dataclass(frozen=True)
class Chart:
    """A plot with everything around it. `best` is the ringed point and its label; `alt` says the plot in words."""

    title: str
    unit: str
    hint: str
    curves: Sequence[Curve]
    level: Level | None
    zero: float | None
    best: tuple[str, float, float] | None
    y_ticks: Sequence[Tick]
    x_ticks: Sequence[Tick]
    alt: str


@dataclass(frozen=True)
class Axis:
    """Maps values to 0..1."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def at(self, value: float) -> float:
        if self.log:
            return (math.log10(value) - self.low) / (self.high - self.low)
        return (value - self.low) / (self.high - self.low)


def linear_axis(low: float, high: float, intervals: int = 4) -> Axis:
    """An axis from one round number to another that covers low..high."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(high) / 2 or 0.5
        low, high = low - pad, high + pad
    step = _round_step((high - low) / intervals)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [k * step for k in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis from and to 1, 2 or 5 times a power of ten; ticks at all of those, or at powers if many."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    round_values = [float(f"{m}e{k}") for k in powers for m in (1, 2, 5)]
    first = max(v for v in round_values if v <= low)
    last = min(v for v in round_values if v >= high)
    ticks = [v for v in round_values if first <= v <= last]
    if len(ticks) > 7:
        decades = [v for v in ticks if f"{v:e}".startswith("1.0")]
        ticks = decades[:: math.ceil(len(decades) / 5)]
    return Axis(math.log10(first), math.log10(last), ticks, log=True)


def step_axis(last: int) -> Axis:
    """Steps from 0 to the last one, which need not be round."""
    step = max(1, _round_step(last / 4))
    return Axis(0, max(last, 1), [k * step for k in range(int(last / step) + 1)])


def _round_step(rough: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(m for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * (1 - 1e-9)) * magnitude


def tick_texts(axis: Axis) -> tuple[list[str], str]:
    """Labels of the ticks, and the power of ten that they are to be multiplied by, in words."""
    largest = max(abs(t) for t in axis.ticks)
    if axis.log:
        return [_log_text(t) for t in axis.ticks], ""
    if 0 < largest < 1e-3 or largest >= 1e6:
        power = math.floor(math.log10(largest) + 1e-9)
        return _decimals([t / 10.0**power for t in axis.ticks]), f"in units of 10{_superscript(power)}"
    if largest >= 10_000:
        return [f"{t / 1000:g}k" if t else "0" for t in axis.ticks], ""
    return _decimals(axis.ticks), ""


def _log_text(tick: float) -> str:
    """0.05, 20, 10⁻³, 2×10⁴."""
    if 0.01 <= tick < 1e4:
        return f"{tick:g}"
    digits, power = f"{tick:.0e}".split("e")
    return ("" if digits == "1" else f"{digits}×") + f"10{_superscript(int(power))}"


def step_texts(axis: Axis) -> list[str]:
    if axis.high >= 10_000:
        return [f"{t / 1000:g}k" if t else "0" for t in axis.ticks]
    return [f"{t:g}" for t in axis.ticks]


def _decimals(ticks: Sequence[float]) -> list[str]:
    """Evenly spaced numbers, all with as many decimals as they need."""
    gap = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    decimals = next((d for d in range(6) if abs(round(gap, d) - gap) < 1e-6 * gap), 6)
    return [f"{t + 0.0:.{decimals}f}".replace("-", "−") for t in ticks]


def _superscript(power: int) -> str:
    return str(power).translate(SUPERSCRIPTS)


def in_words(title: str, named: Sequence[tuple[str, Series]], level: float | None) -> str:
    parts = []
    for label, series in named:
        whole = [p for p in series if math.isfinite(p[1])]
        if whole:
            (s0, v0), (s1, v1) = whole[0], whole[-1]
            parts.append(f"{label}: {show(v0)} at step {s0:,}, {show(v1)} at step {s1:,}")
    if level is not None:
        parts.append(f"teacher: {show(level)}")
    return f"{title}. " + "; ".join(parts)


def curve(label: str, series: Series, x: Axis, y: Axis) -> Curve:
    pieces = list(_finite_runs(series))
    points = sum(map(len, pieces))
    size = math.ceil(points / MAX_POINTS)
    stretches = [[piece[i : i + size] for i in range(0, len(piece), size)] for piece in pieces]
    lines = [[place(_mean(part), x, y) for part in piece] for piece in stretches]
    bands = [_band(piece, x, y) for piece in stretches] if size > 1 else []
    return Curve(
        label,
        show(pieces[-1][-1][1]) if pieces else "",
        [_points(line) for line in lines],
        [_points(band) for band in bands],
        [place for line in lines for place in line if points <= 30 or len(line) == 1],
    )


def _finite_runs(series: Series) -> Iterator[Series]:
    """The pieces between values that are not finite."""
    piece: Series = []
    for step, value in series:
        if math.isfinite(value):
            piece.append((step, value))
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def _mean(part: Series) -> tuple[float, float]:
    return sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)


def _band(piece: Sequence[Series], x: Axis, y: Axis) -> list[tuple[float, float]]:
    """Outline of the least and greatest values of each stretch."""
    least = [place((_mean(part)[0], min(v for _, v in part)), x, y) for part in piece]
    greatest = [place((_mean(part)[0], max(v for _, v in part)), x, y) for part in piece]
    return greatest + least[::-1]


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:g},{b:g}" for a, b in places)


def place(point: tuple[float, float], x: Axis, y: Axis) -> tuple[float, float]:
    return percent(x.at(point[0])), percent(1 - y.at(point[1]))


def percent(part: float) -> float:
    return round(100 * part, 2) + 0.0
