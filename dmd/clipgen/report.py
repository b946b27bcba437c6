"""report.html of a CLIP-GEN run: one self-contained page from the files of the run directory."""

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmd import log
from dmd.plots import show

TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; font: 1rem/1.55 system-ui, sans-serif; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child { text-align: left; }
img { max-width: 100%; image-rendering: pixelated; }
svg { width: 100%; height: 9rem; background: #8881; }
polyline { fill: none; stroke: #27c; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.scroll { overflow-x: auto; }
pre { white-space: pre-wrap; }
</style></head><body>
<h1>CLIP-GEN: {{ name }}</h1>
<p>{{ headline }}</p>
{% if picture %}
<h2>Samples</h2>
<p>Row by row: {{ rows | join("; ") }}. The columns of the first set are {{ captions | join("; ") }}.</p>
<img src="{{ picture }}" alt="samples, row by row as listed above">
{% endif %}
{% if figures %}
<h2>Figures</h2>
<p>"text" is made from the captions' embeddings, "image" from those of the test images; "rebuilt" is the test images
through the tokenizer and back. fd_k is {{ metric }} after a blur of k pixels, {{ samples }} images a row.</p>
<div class="scroll"><table><thead><tr><th>set</th>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr></thead><tbody>
{% for row, cells in figures %}<tr><th>{{ row }}</th>{% for c in cells %}<td>{{ c }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endif %}
{% if charts %}
<h2>Training of the transformer</h2>
<div class="charts">
{% for c in charts %}
<figure><figcaption>{{ c.name }}: {{ c.first }} at step {{ c.start }}, {{ c.last }} at step {{ c.end }}</figcaption>
<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{{ c.name }}">
<polyline points="{{ c.points }}"/></svg></figure>
{% endfor %}
</div>
{% endif %}
<h2>Repeat it</h2>
<pre>{{ command }}</pre>
<details><summary>Environment and all options</summary><pre>{{ environment }}</pre><pre>{{ config }}</pre></details>
</body></html>
"""
CHARTS = ("loss/tokens", "right", "loss/embedding", "grad/net")


def write(folder: Path) -> Path:
    """Write `folder/report.html` from the other files there; missing ones cost only their section. Returns its path."""
    import jinja2

    summary, environment = _object(folder / "summary.json"), _object(folder / "environment.json")
    figures = summary.get("figures") or {}
    columns = list(dict.fromkeys(name for row in figures.values() for name in row))
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE)
    html = page.render(
        name=folder.resolve().name,
        headline=headline(summary),
        picture=_picture(folder / "samples" / "final.png"),
        rows=list(figures),
        captions=[f"{i}. {text}" for i, text in enumerate(summary.get("captions", []), 1)],
        figures=[(name, [_cell(row.get(c)) for c in columns]) for name, row in figures.items()],
        columns=columns,
        metric=summary.get("metric", "the Fréchet distance"),
        samples=summary.get("samples", 0),
        charts=_charts(log.read_jsonl(folder / "metrics.jsonl")),
        command=" ".join(map(str, environment.get("command", []))),
        environment=json.dumps(environment, indent=1, ensure_ascii=False),
        config=json.dumps(_object(folder / "config.json"), indent=1, ensure_ascii=False),
    )
    path = folder / "report.html"
    temporary = folder / ".tmp-report.html"
    temporary.write_text(html, encoding="utf-8", errors="replace")
    temporary.replace(path)
    return path


def headline(summary: dict[str, Any]) -> str:
    """What a finished run has reached, in a sentence or two."""
    if not summary:
        return "This run is not finished."
    parts = []
    seen = (summary.get("figures") or {}).get("seen/text", {})
    if "caption_agreement" in seen:
        parts.append(f"{seen['caption_agreement']:.1%} of images made from text show their caption")
    if "text_of_image" in summary:
        parts.append(f"{summary['text_of_image']:.0%} of what image embeddings reach")
    if "held_out_of_seen" in summary:
        parts.append(f"held-out combinations reach {summary['held_out_of_seen']:.0%} of seen ones")
    if "gap" in summary:
        parts.append(f"the modality gap costs {summary['gap']:.2f} points of CLIP score")
    if "codebook_use" in summary:
        parts.append(f"{summary['codebook_use']:.0%} of the codes are in use")
    text = ", ".join(parts) or "the model is trained; without captioned test images there are no figures"
    return text[0].upper() + text[1:] + "."


def _charts(lines: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    found = []
    for name in CHARTS:
        series = [(r["step"], r[name]) for r in lines if math.isfinite(r.get(name, math.nan))]
        if len(series) < 2:
            continue
        steps, values = zip(*series, strict=True)
        low, high = min(values), max(values)
        width, height = max(steps[-1] - steps[0], 1), (high - low) or 1.0
        points = (f"{100 * (s - steps[0]) / width:.2f},{98 - 96 * (v - low) / height:.2f}" for s, v in series)
        found.append({
            "name": name, "points": " ".join(points), "start": f"{steps[0]:,}", "end": f"{steps[-1]:,}",
            "first": show(values[0]), "last": show(values[-1]),
        })  # fmt: skip
    return found


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def _picture(path: Path) -> str:
    try:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return ""


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
