"""Everything on the page, gathered from a run's files and laid out by the template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dmd.plots import Chart
from dmd.report import curves, figures, pictures, repeat, targets, words
from dmd.report.figures import Evaluations, FigureRow
from dmd.report.files import RunFiles
from dmd.report.pictures import Card, Panel
from dmd.report.repeat import Difference
from dmd.report.targets import Outcome


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
    prompts: Sequence[str]
    figures: Sequence[FigureRow]
    figures_note: str
    targets: Sequence[Outcome]
    best: Sequence[Card]
    worst: Sequence[Card]
    extremes_note: str
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
    preset, differences = repeat.differences(run)
    losses, health = curves.charts(run, curves.LOSSES), curves.charts(run, curves.HEALTH)
    return Page(
        name=run.folder.resolve().name,
        finished=run.finished,
        headline=words.headline(run),
        facts=words.facts(run),
        cautions=list(words.cautions(run)),
        comparison=pictures.comparison(run),
        comparison_caption=words.comparison_caption(run),
        prompts=words.prompts(run),
        figures=figures.figures(run),
        figures_note=figures.figures_note(run),
        targets=targets.outcomes(run),
        best=pictures.cards(run, "best"),
        worst=pictures.cards(run, "worst"),
        extremes_note=words.extremes_note(run),
        distance=curves.distance_chart(run),
        evaluations=figures.evaluations(run),
        losses=losses,
        health=health,
        has_bands=any(curve.bands for chart in (*losses, *health) for curve in chart.curves),
        development=pictures.development(run),
        command=repeat.command(run),
        environment=repeat.environment(run),
        preset=preset,
        differences=differences,
        config=json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else "",
    )


def render(page: Page) -> str:
    """The page as HTML. Everything that comes from files is escaped."""
    return str(template("page.html.jinja").render(page=page))


@cache
def template(name: str) -> Any:
    """One of this folder's templates."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
