"""probe.html: one self-contained page with the table, the plot and the pictures."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd import scoreboard

TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; font: 1rem/1.55 system-ui, sans-serif; }
img { max-width: 100%; image-rendering: pixelated; }
.scroll { overflow-x: auto; }
pre { overflow-x: auto; }
</style></head><body>
<h1>{{ title }}</h1>
<div class="scroll"><pre>{{ table }}</pre></div>
{% for note in notes %}<p>{{ note }}</p>
{% endfor %}
{{ svg | safe }}
{% for section in sections %}
<h2>{{ section.name }}</h2>
{% for name, picture in section.pictures %}
<figure><figcaption>{{ name }}</figcaption><img src="{{ picture }}" alt="{{ name }}"></figure>
{% endfor %}
{% endfor %}
<h2>Repeat it</h2>
<pre>{{ command }}</pre>
<details><summary>Protocol and environment</summary><pre>{{ facts }}</pre></details>
</body></html>
"""


@dataclass(frozen=True)
class Section:
    """A network's pictures: PNG files by what they show."""

    name: str
    files: Mapping[str, Path]

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """What they show, and data URLs."""
        return [
            (name, "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode())
            for name, file in self.files.items()
        ]


def write(
    path: Path, title: str, svg: str, rows: Sequence[scoreboard.Row], sections: Sequence[Section],
    notes: Sequence[str], facts: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the page, atomically."""
    import jinja2

    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE)
    html = page.render(
        title=title, table=scoreboard.table(rows), notes=notes, svg=svg, sections=sections,
        command=" ".join(map(str, facts["environment"].get("command", []))),
        facts=json.dumps({k: v for k, v in facts.items() if k != "results"}, indent=1, ensure_ascii=False),
    )  # fmt: skip
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(html, encoding="utf-8", errors="replace")
    temporary.replace(path)
