"""Samples of a run as strips of small images, inside the page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmd.report.files import RunFiles

if TYPE_CHECKING:
    from PIL import Image


MAX_PNG = 64
"""Images up to this size are kept exactly; larger ones become JPEG."""
MAX_TILE = 96
"""Larger sample images are shrunk to this size."""
MAX_SINGLE = 192
"""The same where few are shown."""


@dataclass(frozen=True)
class Strip:
    """A row of samples: a data URI and its size in pixels."""

    label: str
    source: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Panel:
    """Rows of samples of the same noise, one above the other. `columns` is 0 if the single images are not known."""

    title: str
    strips: Sequence[Strip]
    columns: int
    pixelated: bool


@dataclass(frozen=True)
class Card:
    """A student's image with its teacher's on the right, and what is to be said of it."""

    strip: Strip
    prompt: str
    note: str
    pixelated: bool


def panels(path: Path, size: int | None, title: str, columns: int, most: int) -> list[Panel]:
    """The rows of a picture that `dmd.evaluation.save_grid` wrote, cut after every `columns` images.

    Args:
        path: the picture; its PNG text "rows" names the rows.
        size: height and width of one sample; if it does not fit the picture, the rows are not cut.
        title: of the panels, and part of the alternative texts.
        columns: images per panel.
        most: panels.

    Returns:
        panels; none if the file is missing or damaged.
    """
    found = _rows(path)
    if not found:
        return []
    tiles = _tiles_across(found[0][1], size)
    if size is None or tiles == 0:
        return [Panel(title, [_strip(label, row, f"{label}, {title}") for label, row in found], 0, False)]
    cut = []
    for first in range(0, min(tiles, columns * most), columns):
        last = min(first + columns, tiles)
        strips = [
            _strip(label, _cut([row], size, first, last, MAX_TILE), f"{label}, {title}: samples {first + 1} to {last}")
            for label, row in found
        ]
        cut.append(Panel(title, strips, last - first, size <= MAX_PNG))
    return cut


def cards(run: RunFiles, which: str) -> list[Card]:
    """The "best" or "worst" samples with what samples/extremes.json says of them; none if anything is missing."""
    size, known = sample_size(run), run.extremes.get(which)
    rows = [row for _, row in _rows(run.folder / "samples" / f"{which}.png")]
    if size is None or len(rows) != 2 or not isinstance(known, list) or not all(isinstance(f, dict) for f in known):
        return []
    if not known or any(_tiles_across(row, size) != len(known) for row in rows):
        return []
    found = []
    for i, facts in enumerate(known):
        prompt, seed, remark = (str(facts.get(k, "")) for k in ("prompt", "seed", "remark"))
        strip = _strip("", _cut(rows, size, i, i + 1, MAX_SINGLE), f"{which} {i + 1}, student and teacher: {prompt}")
        found.append(Card(strip, prompt, f"seed {seed}, {remark}", size <= MAX_PNG))
    return found


def _rows(path: Path) -> "list[tuple[str, Image.Image]]":
    """Names and rows of a picture that `dmd.evaluation.save_grid` wrote; none if it is missing or damaged."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            labels = str(file.info.get("rows", "")).split(" | ")
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return []
    height = image.height // len(labels)
    if height == 0:
        return []
    return [(label, image.crop((0, i * height, image.width, (i + 1) * height))) for i, label in enumerate(labels)]


def _tiles_across(row: "Image.Image", size: int | None) -> int:
    """How many images of `size` and their 1 pixel frames make up the row; 0 if it cannot be so."""
    if size is None or size < 1 or row.height % (size + 2):
        return 0
    scale = row.height // (size + 2)
    tiles, rest = divmod(row.width - scale, (size + 1) * scale)
    return tiles if rest == 0 else 0


def _cut(rows: "Sequence[Image.Image]", size: int, first: int, last: int, most: int) -> "Image.Image":
    """Images first..last-1 of all rows, column by column, in their own resolution or `most`, with clear gaps."""
    from PIL import Image

    scale = rows[0].height // (size + 2)
    shown = min(size, most)
    gap = max(1, shown // 16)
    between = (0, 0, 0, 0) if shown <= MAX_PNG else (128, 128, 128, 255)
    tiles = [(row, i * (size + 1) * scale) for i in range(first, last) for row in rows]
    strip = Image.new("RGBA", (len(tiles) * (shown + gap) - gap, shown), between)
    for k, (row, left) in enumerate(tiles):
        tile = row.crop((left, 0, left + size * scale, size * scale))
        filter = Image.Resampling.NEAREST if shown == size else Image.Resampling.LANCZOS
        strip.paste(tile.resize((shown, shown), filter), (k * (shown + gap), 0))
    return strip


def _strip(label: str, image: "Image.Image", alt: str) -> Strip:
    """Small images as PNG, exact and with clear gaps; large ones as JPEG, so that the page stays light."""
    if image.width > 1024:
        image = image.resize((1024, max(1, image.height * 1024 // image.width)))
    buffer = io.BytesIO()
    if image.height <= MAX_PNG:
        image.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        image.convert("RGB").save(buffer, format="JPEG", quality=85)
        kind = "jpeg"
    code = base64.b64encode(buffer.getvalue()).decode()
    return Strip(label, f"data:image/{kind};base64,{code}", image.width, image.height, alt)


def sample_size(run: RunFiles) -> int | None:
    for size in (run.student.get("size"), run.option("data", "size")):
        if isinstance(size, int):
            return size
    return None


def comparison(run: RunFiles) -> list[Panel]:
    """Samples of student and teacher at the end; fewer beside each other where they are large."""
    size = sample_size(run)
    columns = 10 if size is None or size <= 32 else 8
    return panels(run.folder / "samples" / "final.png", size, "final samples", columns, 2)


def development(run: RunFiles) -> list[Panel]:
    """Samples of the first, the last and two evaluations between."""
    found = run.pictures
    chosen = [found[i] for i in sorted({round(k * (len(found) - 1) / 3) for k in range(4)})] if found else []
    return [p for step, path in chosen for p in panels(path, sample_size(run), f"step {step:,}", columns=8, most=1)]
