"""report.html of a run of `dmd represent`, from the files of the run directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmd.plots import number, show
from dmd.report import files, sheet
from dmd.report.curves import Plan, charts
from dmd.report.files import RunFiles
from dmd.report.sheet import Sheet, Table
from dmd.represent.config import METHODS

LOSSES = (
    Plan(
        "Contrast of images",
        [("loss/contrast", "loss"), ("excess", "excess")],
        "The excess is the part that learning can remove, and falls towards 0; the loss ends above it by the logarithm "
        "of the number of positives.",
    ),
    Plan(
        "Small crops",
        [("loss/local", "loss"), ("local/excess", "excess")],
        "Falls as that of whole crops does, and stays above it: a small crop shows less.",
    ),
    Plan(
        "Masked patches",
        [("loss/ibot", "loss")],
        "Falls from the logarithm of the number of prototypes, and may rise while the teacher’s temperature does.",
    ),
    Plan(
        "Contrast of images and texts",
        [("loss/text", "loss"), ("text/excess", "excess")],
        "The excess falls towards 0.",
    ),
    Plan("Cross-entropy of classes", [("loss/classes", "loss")], "Falls from the logarithm of the number of classes."),
)
HEALTH = (
    Plan("Right classes", [("right", "right")], "Climbs: the part of the images that are told right."),
    Plan(
        "Left out",
        [("dropped", "images"), ("local/dropped", "small crops"), ("text/dropped", "images and texts")],
        "0: each has something that it is to be near to. Those that have not are no part of the loss.",
        zero=True,
    ),
    Plan("Scale of text", [("text/scale", "1 / temperature")], "Rises from 14 and stays at most 100."),
    Plan("Gradient norm", [("grad/net", "all networks")], "Steady, without spikes.", log=True),
    Plan("Learning rate", [("rate", "rate")], "Rises, then falls as half a cosine."),
)

COUNTS = (("captions", "captions"), ("updates", "updates"), ("images_seen", "images seen"))


def write(folder: Path) -> Path:
    """Write `folder/report.html` from the other files there; missing ones cost only their section. Returns its path."""
    run = files.read(folder)
    shown = "What the first step sees of some captions or images, a row each: what should be near to each other."
    kind = (METHODS.get(str(run.config.get("method"))), run.summary.get("backbone"))
    page = Sheet(
        kind="Representation",
        headline=headline(run),
        facts=sheet.facts(run, COUNTS, [text for text in kind if isinstance(text, str)]),
        cautions=[] if run.summary else ["Figures come when the last step is done."],
        pictures=sheet.pictures(folder / "samples" / "views.png", "Views", shown),
        tables=_tables(run),
        charts=[("Losses", charts(run, LOSSES)), ("Signs of health", charts(run, HEALTH))],
    )
    return sheet.write(run, page)


def _probe(run: RunFiles) -> dict[str, Mapping[str, Any]]:
    """Figures of the probe at the end, by name."""
    found = run.summary.get("probe")
    figures = found.get("figures") if isinstance(found, dict) else None
    return {k: v for k, v in figures.items() if isinstance(v, dict)} if isinstance(figures, dict) else {}


def headline(run: RunFiles) -> str:
    """What a run has reached, in a sentence."""
    method = run.config.get("method")
    if not run.summary:
        total = number(run.option("learn", "max_train_steps"))
        of = f" of {show(total)}" if total and not run.option("learn", "epochs") else ""
        return f"This run of {method} is not finished: it has reached step {run.last_step:,}{of}."
    said = []
    for name in ("kNN-20", "linear", "zero-shot"):
        value = number(_probe(run).get(name, {}).get("value"))
        if value is not None:
            said.append(f"{value:.1%} by {name}")
    if not said:
        return f"The backbone has been trained by {method}; without --probe there are no figures."
    return f"Frozen features of {method} classify {run.summary['probe'].get('set')}: {', '.join(said)}."


def _tables(run: RunFiles) -> list[Table]:
    rows = []
    for name, figure in _probe(run).items():
        low, high = number(figure.get("low")), number(figure.get("high"))
        interval = "–" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        value = number(figure.get("value"))
        rows.append((name, ["–" if value is None else f"{value:.4g}", interval]))
    note = "Of the frozen backbone on real images that it has not seen; intervals by bootstrap over test images."
    return [Table("Probe", note, ["Figure", "Value", "95 % interval"], rows)] if rows else []
