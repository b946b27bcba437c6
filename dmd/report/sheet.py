"""The page of a run of another method than distillation: what it says, pictures, tables, curves, how to repeat it.

A method's own `report.py` says what of its files is shown; the rest is the same for all.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmd.plots import Chart, duration, number, show
from dmd.report import repeat
from dmd.report.files import RunFiles
from dmd.report.page import template


@dataclass(frozen=True)
class Picture:
    """A PNG with its heading and what it shows; `source` is a data URL."""

    title: str
    text: str
    source: str


@dataclass(frozen=True)
class Table:
    """Figures under `columns`, the first of which is above the rows' names."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Sheet:
    """Everything on the page but what every run tells of itself.

    Attributes:
        kind: of run, at the head of the page.
        headline: what it has reached, in a sentence.
        facts: what was done, in a few short pieces.
        cautions: what the headline alone would hide.
        charts: curves under their headings.
    """

    kind: str
    headline: str
    facts: Sequence[str]
    cautions: Sequence[str]
    pictures: Sequence[Picture]
    tables: Sequence[Table]
    charts: Sequence[tuple[str, Sequence[Chart]]]


def facts(run: RunFiles, counts: Sequence[tuple[str, str]], kind: Sequence[str] = ()) -> list[str]:
    """What was done, in a few short pieces: the preset, what `kind` says, numbers of the summary, and the time.

    Args:
        counts: names in the summary, and what they count.
    """
    preset, wall = run.config.get("preset"), number(run.summary.get("wall_seconds"))
    found = [f"preset {preset}"] if isinstance(preset, str) else []
    found += kind
    found += [f"{show(run.summary[name])} {what}" for name, what in counts if number(run.summary.get(name)) is not None]
    return found + ([duration(wall)] if wall is not None else [])


def pictures(path: Path, title: str, text: str) -> list[Picture]:
    """A PNG file as the only picture of a list; an empty one if it is not there."""
    try:
        code = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return []
    return [Picture(title, text, f"data:image/png;base64,{code}")]


def write(run: RunFiles, sheet: Sheet) -> Path:
    """Write report.html into the run's folder, atomically; returns its path."""
    facts = {
        **vars(sheet), "name": run.folder.resolve().name, "command": repeat.command(run),
        "environment": repeat.environment(run),
        "config": json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else "",
    }  # fmt: skip
    html = template("sheet.html.jinja").render(sheet=facts)
    path = run.folder / "report.html"
    temporary = run.folder / ".tmp-report.html"
    temporary.write_bytes(html.encode("utf-8", "replace"))
    temporary.replace(path)
    return path
