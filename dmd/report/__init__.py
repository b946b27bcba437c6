"""report.html of a run: one self-contained page, made from the files of the run directory and nothing else.

`files.read` collects what there is as `RunFiles`; `words`, `figures`, `curves`, `pictures` and `repeat` turn it into
plain values, which `page.page` gathers as a `Page`; the template page.html.jinja lays them out. The plots (`dmd.plots`)
are small SVGs without text; labels are HTML around them, so that they keep their size on a phone. The same files give
the same bytes: the page has no date of its own.
"""

from pathlib import Path


def write(folder: Path) -> Path:
    """Write `folder/report.html` from the other files there; returns its path.

    Files that are missing or damaged only cost their section. The old report stays until the new one is complete.
    """
    from dmd.report import files, page

    html = page.render(page.page(files.read(folder)))
    path = folder / "report.html"
    temporary = folder / ".tmp-report.html"
    temporary.write_bytes(html.encode("utf-8", "replace"))
    temporary.replace(path)
    return path
