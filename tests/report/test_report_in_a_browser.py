"""The report as a browser draws it: at the widths of a phone and a desk, light and dark. Judged by the pixels."""

import base64
import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from dmd import report
from tests.report.runs import make

TEXTS = """() => {
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim();
    if (!text) continue;
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const r = range.getClientRects()[0], e = walker.currentNode.parentElement;
    if (!r) { found.push([text, 0, 0, 0, 0, getComputedStyle(e).color, e.closest('section')?.id]); continue; }
    found.push([text, r.left + scrollX, r.top + scrollY, r.right + scrollX, r.bottom + scrollY,
                getComputedStyle(e).color, e.closest('section')?.id]);
  }
  return found;
}"""
CURVES = """() => [...document.querySelectorAll('.curve')].map(g => {
  const box = g.closest('.plot').getBoundingClientRect();
  return [g.closest('.chart').querySelector('h3').textContent + ': ' + g.dataset.label,
          box.left + scrollX, box.top + scrollY, box.right + scrollX, box.bottom + scrollY,
          getComputedStyle(g.querySelector('polyline')).stroke];
})"""
IMAGES = """() => [...document.images].map(i => {
  const box = i.getBoundingClientRect();
  return [i.src, box.left + scrollX, box.top + scrollY, box.right + scrollX, box.bottom + scrollY, i.naturalWidth];
})"""
OUTSIDE = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll > *') &&
  (e.getBoundingClientRect().right > innerWidth + .5 || e.getBoundingClientRect().left < -.5))
  .map(e => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run, with an environment that has words longer than a phone is wide."""
    folder = make(tmp_path_factory.mktemp("drawn") / "run")
    (folder / "environment.json").write_text(json.dumps({"platform": "x" * 300, "command": ["a.py", "--b", "y" * 300]}))
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("there is no chromium on the PATH, and CI must look at the report")
        pytest.skip("there is no chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, folder, scheme, width=1280):
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    page.goto((folder / "report.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    return page


def drawn(page):
    """The whole page, (H, W, 3) in [0, 255]."""
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as image:
        return np.asarray(image.convert("RGB")).astype(np.float64)


def rgb(colour):
    return np.array([float(v) for v in colour[colour.index("(") + 1 : -1].split(",")[:3]])


def luminance(pixels):
    """Relative luminance of WCAG 2."""
    v = pixels / 255
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def contrast(a, b):
    low, high = np.minimum(a, b), np.maximum(a, b)
    return (high + 0.05) / (low + 0.05)


def part(pixels, left, top, right, bottom):
    return pixels[int(np.floor(top)) : int(np.ceil(bottom)), int(np.floor(left)) : int(np.ceil(right))]


def weak_texts(page, pixels):
    """Texts that cannot be read: of no size, or with less contrast than 4.5 between their colour and what they are on,
    or whose colour is nowhere near any pixel of theirs."""
    weak = []
    for text, *box, colour, _ in page.evaluate(TEXTS):
        here = part(pixels, *box)
        if here.size == 0:
            weak.append(text)
            continue
        values, counts = np.unique(here.reshape(-1, 3), axis=0, return_counts=True)
        ground = values[counts.argmax()]
        inked = contrast(luminance(here.reshape(-1, 3)), luminance(ground)).max()
        if contrast(luminance(rgb(colour)), luminance(ground)) < 4.5 or inked < 3:
            weak.append(text)
    return weak


def empty_curves(page, pixels):
    """Curves whose colour is in less than 40 % of their plot's columns."""
    empty = []
    for name, *box, colour in page.evaluate(CURVES):
        near = np.abs(part(pixels, *box) - rgb(colour)).max(-1) < 40
        if near.any(0).mean() < 0.4:
            empty.append(name)
    return empty


def wrong_images(page, pixels, ground):
    """Images that are not drawn as their files have them: no size, or other colours."""
    wrong = []
    for source, *box, natural in page.evaluate(IMAGES):
        here = part(pixels, *(round(v) for v in box))
        if natural == 0 or here.size == 0:
            wrong.append(source[:60])
            continue
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            on = Image.new("RGBA", image.size, tuple(int(v) for v in ground))
            theirs = Image.alpha_composite(on, image.convert("RGBA")).convert("RGB")
        shape = (max(1, theirs.width // 4), max(1, theirs.height // 4))
        shown = Image.fromarray(here.astype(np.uint8)).resize(shape, Image.Resampling.BOX)
        expected = theirs.resize(shape, Image.Resampling.BOX)
        if np.abs(np.asarray(shown, dtype=float) - np.asarray(expected, dtype=float)).mean() > 20:
            wrong.append(source[:60])
    return wrong


@pytest.mark.parametrize(("scheme", "width"), [("light", 320), ("light", 390), ("dark", 390), ("dark", 1280)])
def test_everything_is_drawn_and_can_be_read(browser, folder, scheme, width):
    page = opened(browser, folder, scheme, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE) == []
    pixels = drawn(page)
    assert pixels.shape[1] == width
    ground = pixels[2, 2]
    assert luminance(ground) > 0.9 if scheme == "light" else luminance(ground) < 0.05
    assert weak_texts(page, pixels) == []
    assert empty_curves(page, pixels) == []
    assert wrong_images(page, pixels, ground) == []
    page.close()


def test_the_figures_are_on_the_page(browser, folder):
    """On a phone the table is not cut off: each of its numbers lies within the screen."""
    page = opened(browser, folder, "light", 390)
    shown = {text: box for text, *box, _, section in page.evaluate(TEXTS) if section == "figures"}
    student = json.loads((folder / "summary.json").read_text())["student"]
    for text in ("FD-SmallConvNet", "9.96", f"{student['accuracy']:.3f}", "2,375", "at most 2", "met"):
        left, _, right, _ = shown[text]
        assert 0 <= left < right <= 390
    page.close()


def test_the_page_asks_for_nothing_and_says_nothing(browser, folder):
    page = browser.new_page()
    messages, requests = [], []
    page.on("console", lambda m: messages.append(m.text))
    page.on("pageerror", lambda e: messages.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    url = (folder / "report.html").as_uri()
    page.goto(url)
    assert messages == [] and [u for u in requests if not u.startswith("data:")] == [url]
    page.close()


def test_what_is_not_drawn_is_found(browser, folder):
    """The checks above can fail."""
    page = opened(browser, folder, "light")
    style = ".curve { opacity: 0 } td { color: var(--ground) !important } .hint { opacity: .2 }"
    page.add_style_tag(content=f"{style} .strip img {{ visibility: hidden }}")
    pixels = drawn(page)
    assert len(empty_curves(page, pixels)) == len(page.evaluate(CURVES)) == 12
    weak = weak_texts(page, pixels)
    assert "9.96" in weak and "Smooth and well above 0: the matching gradient is divided by it." in weak
    assert "Figures" not in weak
    assert len(wrong_images(page, pixels, pixels[2, 2])) == page.evaluate("document.querySelectorAll('.strip').length")
    page.close()
