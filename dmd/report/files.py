"""What a run directory holds, as far as it can be read."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd.plots import Series, drawable


@dataclass(frozen=True)
class RunFiles:
    """The readable content of a run directory.

    Attributes:
        folder: the run directory.
        config, environment, summary, student, extremes: content of config.json, environment.json, summary.json,
            student/config.json and samples/extremes.json; empty if the file is missing or damaged.
        metrics: metrics.jsonl by name of the figure.
        damaged_lines: how many of its lines could not be read.
        pictures: (step, path) of samples/step-*.png, in order.
    """

    folder: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    summary: Mapping[str, Any]
    student: Mapping[str, Any]
    extremes: Mapping[str, Any]
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
    def finished(self) -> bool:
        """Whether there are final figures."""
        return bool(self.final("student")) and bool(self.final("teacher"))

    @property
    def metric(self) -> str:
        """The name of the distance."""
        name = self.summary.get("metric")
        return name if isinstance(name, str) else "Fréchet distance"

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
        _read_object(folder / "samples" / "extremes.json"),
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
