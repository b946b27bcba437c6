"""Figures of several sources side by side: a table for the terminal, and a plot with intervals as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from dmd.plots import linear_axis, show, tick_texts

LOWER_IS_BETTER = ("FID", "FD-", "KID", "KD-", "alignment", "uniformity")


@dataclass(frozen=True)
class Score:
    """A figure with its 95 % interval, (None, None) without one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """A source.

    Attributes:
        name: of the source.
        count: of its samples.
        few: they are too few for figures that are comparable with published ones.
        scores: by the name of the figure.
    """

    name: str
    count: int
    few: bool
    scores: dict[str, Score] = field(default_factory=dict)


def table(rows: Sequence[Row]) -> str:
    """One line for each figure, a column for each source; figures of few samples bear a star."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    cells = [["", *(row.name for row in rows)], ["samples", *(f"{row.count:,}{_star(row)}" for row in rows)]]
    cells += [[_titled(name), *(_cell(row, name) for row in rows)] for name in names]
    widths = [max(len(line[column]) for line in cells) for column in range(len(rows) + 1)]
    lines = [
        "  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(c, widths, strict=True)))
        for c in cells
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * (sum(widths) + 2 * len(rows)), *lines[1:]])


def _titled(name: str) -> str:
    return f"{name} (lower is better)" if name.startswith(LOWER_IS_BETTER) else name


def _star(row: Row) -> str:
    return "*" if row.few else ""


def _cell(row: Row, name: str) -> str:
    score = row.scores.get(name)
    if score is None:
        return "-"
    text = f"{show(score.value)}{_star(row)}"
    if score.low is None or score.high is None:
        return text
    return f"{text} [{show(score.low)}, {show(score.high)}]"


# ----------------------------------------------------------------------------- plot

WIDTH, LINE, HEAD, FOOT, LEFT, RIGHT = 720, 22, 34, 30, 210, 40
"""Of a panel, in pixels: whole width, a source's height, the title's, the axis's, and the margins."""

COLOURS = ("#2563a8", "#b4532a", "#3a7d44", "#7b4ea3", "#8a6d1d", "#4b5563")

STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2933}.t{font-weight:600;font-size:13px}.n{text-anchor:end}"
    ".k{text-anchor:middle;fill:#52606d}line{stroke:#cbd2d9}.w{stroke-width:2}rect.b{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e4e7eb}.k{fill:#9aa5b1}line{stroke:#3e4c59}rect.b{fill:#1b2128}}"
)


def svg(rows: Sequence[Row], title: str, footnote: str) -> str:
    """A panel for each figure, a dot with its interval for each source; readable on light and dark pages."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    panels, top = [], 40.0
    for name in names:
        shown = [row for row in rows if name in row.scores and math.isfinite(row.scores[name].value)]
        if shown:
            panels.append(_panel(name, shown, [rows.index(row) for row in shown], top))
            top += HEAD + LINE * len(shown) + FOOT
    height = top + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style><rect class="b" width="100%" height="100%"/>'
        f'<text class="t" x="12" y="24">{escape(title)}</text>{"".join(panels)}'
        f'<text class="k" style="text-anchor:start" x="12" y="{height - 10:.0f}">{escape(footnote)}</text></svg>\n'
    )


def _panel(name: str, rows: Sequence[Row], numbers: Sequence[int], top: float) -> str:
    scores = [row.scores[name] for row in rows]
    ends = [v for s in scores for v in (s.value, s.low, s.high) if v is not None and math.isfinite(v)]
    axis = linear_axis(min(ends), max(ends))
    scale = WIDTH - LEFT - RIGHT

    def x(value: float) -> float:
        return LEFT + scale * axis.at(value)

    bottom = top + HEAD + LINE * len(rows)
    texts, unit = tick_texts(axis)
    parts = [f'<text class="t" x="12" y="{top + 20:.0f}">{escape(_titled(name))} {escape(unit)}</text>']
    for tick, text in zip(axis.ticks, texts, strict=True):
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top + HEAD - 4:.0f}" y2="{bottom:.0f}"/>')
        parts.append(f'<text class="k" x="{x(tick):.1f}" y="{bottom + 16:.0f}">{escape(text)}</text>')
    for line, (row, score, number) in enumerate(zip(rows, scores, numbers, strict=True)):
        y = top + HEAD + LINE * (line + 0.5)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<text class="n" x="{LEFT - 10}" y="{y + 4:.1f}">{escape(_short(row.name))}{_star(row)}</text>')
        if score.low is not None and score.high is not None:
            parts.append(
                f'<line class="w" style="stroke:{colour}" x1="{x(score.low):.1f}" x2="{x(score.high):.1f}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        parts.append(
            f'<circle cx="{x(score.value):.1f}" cy="{y:.1f}" r="4.5" fill="{colour}">'
            f"<title>{escape(row.name)}: {escape(_cell(row, name))}</title></circle>"
        )
    return "".join(parts)


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"...{name[-25:]}"
