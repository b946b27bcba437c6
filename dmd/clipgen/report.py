"""report.html of a CLIP-GEN run, from the files of the run directory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmd.plots import number
from dmd.report import files, sheet
from dmd.report.curves import Plan, charts
from dmd.report.sheet import Sheet, Table

STAGES = "stages"
"""Folder of a run with the metrics of the stages before the transformer, which are taught in the cache."""

TOKENIZER = (
    Plan("Reconstruction", [("loss/l1", "L1")], "Falls and flattens: how far rebuilt images are from their originals."),
    Plan("Perceptual loss", [("loss/perceptual", "perceptual")], "Falls with the reconstruction."),
    Plan("Commitment", [("loss/commitment", "commitment")], "Small and steady: features stay near their codes."),
    Plan(
        "Codes in use",
        [("codebook/use", "use"), ("codebook/perplexity", "perplexity")],
        "Parts of all codes. Use is near 1; perplexity is far below it where a few codes do most of the work.",
    ),
    Plan(
        "Discriminator",
        [("loss/discriminator", "discriminator"), ("loss/adversarial", "tokenizer")],
        "Zero until it begins. Then 1 where it cannot tell rebuilt images from real ones, 0 where it always can.",
    ),
    Plan(
        "Adaptive weight",
        [("health/adaptive_weight", "weight")],
        "Positive once the discriminator begins; its limit is 10⁴.",
        log=True,
    ),
)
CLIP = (
    Plan("Contrast", [("loss/contrastive", "contrast")], "Falls from the logarithm of the batch size."),
    Plan(
        "Right captions",
        [("right", "right")],
        "Climbs: the part of images whose nearest text of the batch is their own.",
    ),
)
TRANSFORMER = (
    Plan(
        "Cross-entropy of tokens", [("loss/tokens", "nats a token")], "Falls from the logarithm of the number of codes."
    ),
    Plan("Right tokens", [("right", "right")], "Climbs slowly: many tokens cannot be foreseen."),
    Plan(
        "Embedding loss",
        [("loss/embedding", "1 − cos")],
        "Falls, where it is asked for: images come nearer to their embedding.",
    ),
    Plan("Gradient norm", [("grad/net", "transformer")], "Steady, without spikes.", log=True),
)

COUNTS = (("images", "training images"), ("updates", "updates"), ("images_seen", "images seen"))


def write(folder: Path) -> Path:
    """Write `folder/report.html` from the other files there; missing ones cost only their section. Returns its path."""
    run = files.read(folder)
    summary, captions = run.summary, [str(c) for c in _list(run.summary.get("captions"))]
    figures = _rows(summary)
    shown = f"Row by row: {'; '.join(figures)}. The columns of the first set are "
    shown += "; ".join(f"{i}. {text}" for i, text in enumerate(captions, 1)) + "."
    stages = {name: replace(run, metrics=files.read(folder / STAGES / name).metrics) for name in ("tokenizer", "clip")}
    page = Sheet(
        kind="CLIP-GEN",
        headline=headline(summary),
        facts=sheet.facts(run, COUNTS),
        cautions=[str(note) for note in _list(summary.get("notes"))],
        pictures=sheet.pictures(folder / "samples" / "final.png", "Samples", shown),
        tables=_tables(summary, figures),
        charts=[
            ("Training of the transformer", charts(run, TRANSFORMER)),
            ("Training of the tokenizer", charts(stages["tokenizer"], TOKENIZER)),
            ("Training of the small CLIP", charts(stages["clip"], CLIP)),
        ],
    )
    return sheet.write(run, page)


def _rows(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found = summary.get("figures")
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _tables(summary: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    if not figures:
        return []
    columns = list(dict.fromkeys(name for row in figures.values() for name in row))
    metric, samples = summary.get("metric", "the Fréchet distance"), summary.get("samples", 0)
    note = (
        '"text" is made from the captions\' embeddings, "image" from those of the test images; "rebuilt" is the test '
        f"images through the tokenizer and back. fd_k is {metric} after a blur of k pixels, {samples} images a row."
    )
    rows = [(name, [_cell(row.get(c)) for c in columns]) for name, row in figures.items()]
    return [Table("Figures", note, ["set", *columns], rows)]


def headline(summary: Mapping[str, Any]) -> str:
    """What a finished run has reached, in a sentence or two."""
    if not summary:
        return "This run is not finished."
    parts = []
    agreement = number(_rows(summary).get("seen/text", {}).get("caption_agreement"))
    if agreement is not None:
        parts.append(f"{agreement:.1%} of images made from text show their caption")
    for name, text in (
        ("text_of_image", "{:.0%} of what image embeddings reach"),
        ("held_out_of_seen", "held-out combinations reach {:.0%} of seen ones"),
        ("gap", "from images the CLIP score is {:+.2f} points beside that from text"),
        ("codebook_use", "{:.0%} of the codes are in use"),
    ):
        value = number(summary.get(name))
        if value is not None:
            parts.append(text.format(value))
    text = ", ".join(parts) or "the model is trained; without captioned test images there are no figures"
    return text[0].upper() + text[1:] + "."


def _cell(value: Any) -> str:
    found = number(value)
    return "–" if found is None else f"{found:.3f}"
