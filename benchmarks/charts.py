"""Small charts as SVG, for pages that are light or dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dmd.plots import Axis, linear_axis, log_axis, show, tick_texts

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 62, 48
COLOURS = ("#2563a8", "#b4532a", "#3a7d44", "#7b4ea3", "#8a6d1d", "#4b5563")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2933}.t{font-weight:600;font-size:14px}.k{fill:#52606d}"
    ".m{text-anchor:middle}.e{text-anchor:end}.g{stroke:#dde3ea}.b{fill:#fff}polyline{fill:none;stroke-width:2.2}"
    "@media(prefers-color-scheme:dark){text{fill:#e4e7eb}.k{fill:#a7b2bd}.g{stroke:#34414f}.b{fill:#1b2128}"
    "polyline,circle{filter:brightness(1.5)}}"
)


@dataclass(frozen=True)
class Line:
    """A curve: its name and its points, which are drawn as dots too. A single point is a dot."""

    label: str
    points: Sequence[tuple[float, float]]


def lines(title: str, x_label: str, y_label: str, found: Sequence[Line], log: tuple[bool, bool] = (True, True)) -> str:
    """An SVG of curves; points that are not finite (or on a logarithmic axis not positive) are left out.

    Args:
        log: whether the axes x and y are logarithmic.

    Raises:
        ValueError: there is nothing to draw.
    """
    kept = [Line(line.label, [p for p in line.points if _drawable(p, log)]) for line in found]
    points = [p for line in kept for p in line.points]
    if not points:
        raise ValueError(f"{title}: there is no point to draw")
    x = _axis([p[0] for p in points], log[0])
    y = _axis([p[1] for p in points], log[1])
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + wide * x.at(point[0]), TOP + high * (1 - y.at(point[1]))

    parts = [f'<text class="t" x="12" y="22">{escape(title)}</text>']
    for tick, text in zip(y.ticks, tick_texts(y)[0], strict=True):
        top = TOP + high * (1 - y.at(tick))
        parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(f'<text class="k e" x="{LEFT - 8}" y="{top + 4:.1f}">{escape(text)}</text>')
    for tick, text in zip(x.ticks, tick_texts(x)[0], strict=True):
        left = LEFT + wide * x.at(tick)
        parts.append(f'<text class="k m" x="{left:.1f}" y="{HEIGHT - BOTTOM + 18}">{escape(text)}</text>')
    parts.append(f'<text class="k m" x="{LEFT + wide / 2:.0f}" y="{HEIGHT - 10}">{escape(x_label)}</text>')
    parts.append(f'<text class="k" x="12" y="{TOP - 20}">{escape(y_label)}</text>')
    offset = 12 + 8 * len(y_label)
    for number, line in enumerate(kept):
        colour = COLOURS[number % len(COLOURS)]
        places = [at(p) for p in sorted(line.points)]
        joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline stroke="{colour}" points="{joined}"/>')
        for (a, b), point in zip(places, sorted(line.points), strict=True):
            said = f"{line.label}: {show(point[0])}, {show(point[1])}"
            parts.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"><title>{escape(said)}</title></circle>'
            )
        parts.append(f'<circle cx="{offset + 6}" cy="{TOP - 24}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{offset + 15}" y="{TOP - 20}">{escape(line.label)}</text>')
        offset += 30 + 7 * len(line.label)
    return _whole(title, HEIGHT, parts)


def _dot(x: float, y: float, colour: str, said: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{escape(said)}</title></circle>'


def _whole(title: str, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style><rect class="b" width="100%" height="100%"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _drawable(point: tuple[float, float], log: tuple[bool, bool]) -> bool:
    return all(math.isfinite(v) and (v > 0 or not of) for v, of in zip(point, log, strict=True))


def _axis(values: Sequence[float], log: bool) -> Axis:
    low, high = min(values), max(values)
    if not log:
        return linear_axis(min(low, 0.0), high)
    return log_axis(low, high if high > low else 2 * low)
