"""The report: what it shows equals the run's files, whatever state they are in, and no file can break out of it."""

import base64
import io
import json
import math
import shutil
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dmd import plots, report
from dmd.config import preset
from dmd.data.images import to_uint8
from dmd.report import figures, pictures
from dmd.report.files import read
from dmd.report.page import page
from dmd.report.repeat import Difference
from tests.report.runs import EVALUATE, LOG, ROWS, STEPS, STUDENT, TEACHER, curves, extremes, make, picture, write_lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def folder(finished, tmp_path):
    """A run of one's own to damage."""
    return shutil.copytree(finished, tmp_path / "run")


class Seen(HTMLParser):
    """What a browser would find in a report."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.images, self.sections = [], [], [], []
        self.text, self.headline = [], ""
        self.rows, self.points, self.rings = [], {}, 0
        self._open, self._chart = [], ""
        self.feed(html)
        self.text = " ".join(self.text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self._open.append(tag)
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "section":
            self.sections.append(attributes["id"])
        elif tag == "img":
            self.images.append(attributes)
        elif tag == "tr":
            self.rows.append((self.sections[-1], []))
        elif tag == "data":
            self.rows[-1][1].append(float(attributes["value"]))
        elif tag == "g":
            self._curve = (self._chart, attributes["data-label"])
            self.points[self._curve] = 0
        elif tag == "polyline":
            self.points[self._curve] += len(attributes["points"].split())
        elif tag == "i":
            self.rings += 1

    def handle_data(self, data):
        self.text.append(data)
        if "h3" in self._open[-1:]:
            self._chart = data
        if "h1" in self._open[-1:]:
            self.headline += data

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass


def see(folder):
    return Seen(report.write(folder).read_text(encoding="utf-8"))


ALL = ["samples", "figures", "extremes", "distance", "losses", "health", "development", "repeat"]


def test_a_finished_run_has_every_section_in_order(folder):
    assert see(folder).sections == ALL


def test_headline_gives_the_ratios_of_the_summary(folder):
    seen = see(folder)
    assert "1.03 times its teacher’s" in seen.headline and "8.0 times as fast" in seen.headline
    assert "1 min 21 s" in seen.text and "12,800 images seen" in seen.text


def test_figures_are_those_of_the_summary(folder):
    shown = [values for section, values in see(folder).rows if section == "figures" and values]
    names = [name for name in figures.FIGURES if name in TEACHER]
    assert len(shown) == len(names)
    for name, (teacher, student, *ratio) in zip(names, shown, strict=True):
        assert (teacher, student) == (TEACHER[name], STUDENT[name])
        assert ratio == [] if name in figures.NO_RATIO else ratio == [STUDENT[name] / TEACHER[name]]


def test_unknown_figures_are_shown_under_their_own_names(folder):
    summary = json.loads((folder / "summary.json").read_text())
    summary["teacher"]["clip_score"], summary["student"]["clip_score"] = 0.5, 0.25
    (folder / "summary.json").write_text(json.dumps(summary))
    seen = see(folder)
    assert "clip_score" in seen.text
    assert [v for section, v in seen.rows if section == "figures" and v][-1] == [0.5, 0.25, 0.5]


@pytest.mark.parametrize(("samples", "warned"), [(200, True), (9_999, True), (10_000, False)])
def test_few_samples_are_pointed_out(folder, samples, warned):
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"samples": samples}))
    assert ("biased upwards" in see(folder).text) is warned


def test_every_line_of_metrics_is_a_point(folder):
    seen = see(folder)
    assert seen.points == {
        ("FD-SmallConvNet", "student"): STEPS // EVALUATE,
        ("Matching loss", "matching"): STEPS // LOG,
        ("Regression loss", "regression"): STEPS // LOG,
        ("Fake score’s loss", "fake score"): STEPS // LOG,
        ("Accuracy", "student"): STEPS // EVALUATE,
        ("Diversity within a class or prompt", "student"): STEPS // EVALUATE,
        ("Fake–real gap", "mean |x0_fake − x0_real|"): STEPS // LOG,
        ("Normaliser", "mean |x − x0_real|"): STEPS // LOG,
        ("Drift from the teacher", "brightness"): STEPS // EVALUATE,
        ("Drift from the teacher", "contrast"): STEPS // EVALUATE,
        ("Gradient norms", "student"): STEPS // LOG,
        ("Gradient norms", "fake score"): STEPS // LOG,
    }
    assert [len(v) for section, v in seen.rows if section == "distance"] == [0] + [3] * (STEPS // EVALUATE)


def test_best_step_and_the_teachers_level_are_marked(folder):
    chart = page(read(folder)).distance
    label, x, y = chart.best
    assert label == "kept: 10.6 at step 60"
    assert x == 60.0
    assert (x, y) in chart.curves[0].dots
    assert y == max(v for _, v in chart.curves[0].dots), "the least distance is the lowest point"
    assert chart.level.label == "teacher 9.64" and y < chart.level.at <= 100
    assert see(folder).rings == 1


def test_a_resumed_run_has_no_step_twice_and_the_later_line_counts(folder):
    again = [line for line in curves() if line["step"] > 50]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line | ({"eval/fd": 1.5} if "eval/fd" in line else {})) + "\n" for line in again)
    run = read(folder)
    assert [s for s, _ in run.metrics["loss/fake"]] == list(range(LOG, STEPS + 1, LOG))
    assert run.metrics["eval/fd"][-3:] == [(60, 1.5), (80, 1.5), (100, 1.5)]


def test_a_run_that_went_on_after_its_summary_says_so(folder):
    write_lines(folder / "metrics.jsonl", curves(steps=140))
    assert "gone on to step 140" in see(folder).text


def test_lost_variety_is_not_hidden_by_a_good_distance(folder):
    assert "less varied" not in see(folder).text
    summary = json.loads((folder / "summary.json").read_text())
    summary["student"]["recall"] = 0.026
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "much less varied than its teacher (recall 0.026 against 0.926)" in see(folder).text


def test_an_earlier_best_is_the_one_that_is_kept(folder):
    seen = see(folder)
    assert "student of step 60, the best, is the one kept" in seen.text
    assert "may still be improving" not in seen.text


@pytest.mark.parametrize(
    ("objective", "absent"),
    [
        ("regression", ["Matching loss", "Fake score’s loss", "Fake–real gap", "Normaliser"]),
        ("matching", ["Regression loss"]),
    ],
)
def test_ablations_show_what_they_have(tmp_path, objective, absent):
    seen = see(make(tmp_path / "run", objective))
    assert seen.sections == ALL
    charts = {chart for chart, _ in seen.points}
    assert charts.isdisjoint(absent) and "Gradient norms" in charts
    assert f"{objective} only" in seen.text
    labels = {image["alt"].split(",")[0] for image in seen.images if "step" in image["alt"]}
    assert labels == set(ROWS)


def test_an_unfinished_run_says_so_and_shows_what_there_is(folder):
    (folder / "summary.json").unlink()
    (folder / "samples" / "final.png").unlink()
    write_lines(folder / "metrics.jsonl", curves(steps=60))
    seen = see(folder)
    assert "not finished: it has reached step 60 of 100" in seen.headline
    assert "10.6, at step 60" in seen.headline
    assert seen.sections == [s for s in ALL if s not in ("samples", "figures")], "and the extremes of an earlier end"


def test_one_line_of_metrics_is_enough(folder):
    (folder / "summary.json").unlink()
    write_lines(folder / "metrics.jsonl", list(curves())[:1])
    seen = see(folder)
    assert "step 5 of 100" in seen.headline
    assert set(seen.points.values()) == {1}


def test_a_run_that_has_only_its_config(folder):
    for path in folder.iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    seen = see(folder)
    assert "not begun to distil" in seen.headline and seen.sections == ["repeat"]


def test_an_empty_folder(tmp_path):
    assert see(tmp_path).sections == []


OPTIONAL = [
    "config.json", "environment.json", "summary.json", "student/config.json", "metrics.jsonl", "samples/final.png",
    "samples/step-00000020.png", "samples/extremes.json", "samples/best.png",
]  # fmt: skip
RUBBISH = {
    "empty": b"", "bytes": b"\xff\xfe\x00\x89PNG", "list": b"[1, 2]", "null": b"null", "cut": b'{"step": 5, "a": 1',
    "deep": b"[" * 100_000, "surrogate": b'{"preset": "\\ud800", "metric": "\\ud800", "command": ["\\ud800"]}',
    "types": b'{"preset": [1], "teacher": 3, "student": {"fd": "x", "nfe": 1e999}, "size": "8", "classes": {"a": 1},'
             b' "command": [1], "samples": "many", "data": 7, "distill": [], "step": 5, "x": 1%s}' % (b"0" * 400),
}  # fmt: skip


@pytest.mark.parametrize("content", [None, *RUBBISH.values()], ids=["missing", *RUBBISH])
@pytest.mark.parametrize("name", OPTIONAL)
def test_a_damaged_file_costs_its_section_at_most(folder, name, content):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    cost = {
        "summary.json": {"figures"}, "metrics.jsonl": {"distance", "losses", "health"},
        "samples/final.png": {"samples"}, "samples/extremes.json": {"extremes"}, "samples/best.png": {"extremes"},
    }  # fmt: skip
    sections = see(folder).sections
    assert set(ALL) - set(sections) <= cost.get(name, set())


def test_metrics_cut_short_by_a_kill_keep_their_whole_lines(folder):
    before = see(folder).points
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 105, "loss/fa\xff')
    seen = see(folder)
    assert seen.points == before
    assert "1 line of metrics.jsonl could not be read" in seen.text


def test_values_that_are_not_finite_leave_a_gap(folder):
    lines = [line | ({"loss/fake": math.nan} if line["step"] == 50 else {}) for line in curves()]
    write_lines(folder / "metrics.jsonl", [line for line in lines if "loss/fake" in line])
    (curve,) = next(c for c in page(read(folder)).losses if c.title.startswith("Fake")).curves
    assert [len(s.split()) for s in curve.segments] == [9, 10]


def test_long_runs_are_drawn_as_means_on_a_band(folder):
    lines = [{"step": k, "loss/fake": 100.0 if k == 7777 else 1.0, "grad/fake": 1.0} for k in range(1, 20_001)]
    write_lines(folder / "metrics.jsonl", lines)
    (curve,) = page(read(folder)).losses[0].curves
    assert sum(len(s.split()) for s in curve.segments) <= plots.MAX_POINTS
    heights = [float(p.split(",")[1]) for p in curve.bands[0].split()]
    assert min(heights) == 0.0, "the spike of a single step can be seen"
    assert report.write(folder).stat().st_size < 200_000


HOSTILE = """"'><img src=x onerror=alert(1)><script>alert(1)</script></style></pre>{{ 7*7 }}${1}"""


def test_nothing_from_files_becomes_html(tmp_path):
    folder = make(tmp_path / HOSTILE.replace("/", "\\"))
    calm = see(make(tmp_path / "calm"))

    def poison(value):
        if isinstance(value, dict):
            return {k: poison(v) for k, v in value.items()} | {HOSTILE: HOSTILE}
        return [*map(poison, value), HOSTILE] if isinstance(value, list) else value if value == 8 else HOSTILE

    for name in ("config.json", "environment.json", "student/config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(poison(content)))
    summary = json.loads((folder / "summary.json").read_text())
    summary["student"][HOSTILE] = 1.0
    (folder / "summary.json").write_text(json.dumps(summary | {"metric": HOSTILE}))
    picture(folder / "samples" / "final.png", (HOSTILE, HOSTILE), 20, 8)
    picture(folder / "samples" / "step-00000020.png", (HOSTILE,), 16, 8)
    seen = see(folder)
    assert set(seen.tags) <= set(calm.tags) | {"small"}
    assert "script" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert {name for name, _ in seen.attributes} <= {name for name, _ in calm.attributes}
    assert all(image["src"].startswith("data:image/") for image in seen.images)
    assert HOSTILE in seen.text, "it is shown as text"
    assert "49" not in seen.headline


def test_the_page_needs_nothing_from_elsewhere(folder):
    html = report.write(folder).read_text(encoding="utf-8")
    seen = Seen(html)
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    assert not {"script", "iframe", "object", "embed", "form"} & set(seen.tags)
    links = [value for name, value in seen.attributes if name in ("src", "href", "srcset", "data", "xlink:href")]
    assert links and all(link.startswith("data:") for link in links)


def decode(source):
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_samples_keep_their_pixels_and_their_order(folder):
    student, teacher = picture(folder / "samples" / "final.png", ("student", "teacher"), 20, 8)
    first, second = page(read(folder)).comparison
    assert [s.label for s in first.strips] == ["student", "teacher"]
    for panel, start in ((first, 0), (second, 10)):
        for strip, images in zip(panel.strips, (student, teacher), strict=True):
            shown = decode(strip.source).convert("L")
            assert shown.size == (strip.width, strip.height) == (89, 8)
            for i in range(10):
                pixels = torch.tensor(list(shown.crop((9 * i, 0, 9 * i + 8, 8)).tobytes())).view(8, 8)
                assert torch.equal(pixels, to_uint8(images[start + i, 0]))


def test_the_best_and_the_worst_are_the_files_images_with_what_is_known_of_them(folder):
    """Each student's image with its teacher's on the right, in the order of extremes.json."""
    images = extremes(folder)
    found = page(read(folder))
    for k, (cards, (student, teacher)) in enumerate(zip((found.best, found.worst), images, strict=True)):
        assert [c.prompt for c in cards] == ["0", "1", "2", "3"]
        assert [c.note for c in cards] == [f"seed {10 * k + i}, distance {i}.5" for i in range(4)]
        for i, card in enumerate(cards):
            shown = decode(card.strip.source).convert("L")
            assert shown.size == (17, 8)
            for left, expected in ((0, student[i]), (9, teacher[i])):
                pixels = torch.tensor(list(shown.crop((left, 0, left + 8, 8)).tobytes())).view(8, 8)
                assert torch.equal(pixels, to_uint8(expected[0]))
    assert "Of 200 samples, ordered by the distance from the teacher’s image." in see(folder).text


@pytest.mark.parametrize(
    ("preset", "student", "teacher", "met"),
    [
        ("digits", {"fd": 1.9, "accuracy": 0.98}, {"fd": 1.0}, [True, True]),
        ("digits", {"fd": 2.1, "accuracy": 0.96}, {"fd": 1.0}, [False, False]),
        ("cifar10", {"fd": 1.16}, {"fd": 1.0}, [False]),
        ("shapes", {"caption_agreement": 0.9, "fd": 1.3}, {"caption_agreement": 1.0, "fd": 1.0}, [True, True]),
        ("sd15", {"images_per_second": 20.0}, {"images_per_second": 1.0}, [False]),
        ("digits", {"fd": 1.9}, {"fd": 0.0}, []),
        ("unknown", {"fd": 1.9}, {"fd": 1.0}, []),
    ],
)
def test_figures_are_compared_with_the_targets_of_the_preset(folder, preset, student, teacher, met):
    config = json.loads((folder / "config.json").read_text()) | {"preset": preset}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps({"student": student, "teacher": teacher}))
    assert [t.met for t in page(read(folder)).targets] == met
    assert [f" {'met' if m else 'missed'} " in f" {see(folder).text} " for m in set(met)] == [True] * len(set(met))


def test_pictures_of_an_unknown_layout_are_shown_whole(folder):
    Image.new("RGB", (100, 50)).save(folder / "samples" / "final.png")
    (panel,) = page(read(folder)).comparison
    assert panel.columns == 0 and (panel.strips[0].width, panel.strips[0].height) == (100, 50)


def test_development_is_first_middle_and_last(folder):
    assert [p.title for p in page(read(folder)).development] == [
        "step 20",
        "step 40",
        "step 80",
        "step 100",
    ]
    assert all([s.label for s in p.strips] == list(ROWS) for p in page(read(folder)).development)
    assert all(image["alt"] and image["width"] and image["height"] for image in see(folder).images)


def test_large_pictures_stay_light(folder):
    for name in ("config.json", "student/config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"size": 128}))
    picture(folder / "samples" / "final.png", ("student", "teacher"), 20, 128)
    for step in (20, 40, 80, 100):
        picture(folder / "samples" / f"step-{step:08d}.png", ROWS, 8, 128)
    seen = see(folder)
    assert len(seen.images) == 2 * 2 + 4 * len(ROWS) and {int(image["height"]) for image in seen.images} == {
        pictures.MAX_TILE
    }
    assert (folder / "report.html").stat().st_size < 2_000_000, "though noise is the worst case"


def test_the_same_files_give_the_same_bytes(folder):
    first = report.write(folder).read_bytes()
    assert report.write(folder).read_bytes() == first
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 105, "loss/fake": 0.5}\n')
    assert report.write(folder).read_bytes() != first
    assert not list(folder.glob(".tmp*"))


def test_a_report_that_fails_leaves_the_old_one(folder, monkeypatch):
    before = report.write(folder).read_bytes()

    def fail(page):
        raise RuntimeError

    monkeypatch.setattr("dmd.report.page.render", fail)
    with pytest.raises(RuntimeError):
        report.write(folder)
    assert (folder / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "processes", "command"),
    [
        (["train_dmd.py", "--seed", "1"], 1, "python train_dmd.py --seed 1"),
        (["/x/site-packages/dmd/__main__.py", "train", "digits"], 1, "python -m dmd train digits"),
        (["/usr/bin/dmd", "train", "--output-dir", "a b;c"], 1, "dmd train --output-dir 'a b;c'"),
        (["train_dmd.py", "sd15"], 8, "accelerate launch --num_processes 8 train_dmd.py sd15"),
    ],
)
def test_command_can_be_pasted(folder, argv, processes, command):
    (folder / "environment.json").write_text(json.dumps({"command": argv, "processes": processes}))
    assert " ".join(page(read(folder)).command) == command


def test_differences_from_the_preset(folder):
    found = page(read(folder))
    assert (found.preset, found.differences) == (
        "digits",
        [Difference("--max-train-steps", "100", f"{preset('digits').distill.max_train_steps:d}")],
    )
    assert json.loads(found.config) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (12800, "12,800"), (200.0, "200"), (9.644, "9.64"), (29.73, "29.7"), (2375.48, "2,375"),
        (0.06048, "0.0605"), (-0.51, "−0.510"), (3.25e-8, "3.25×10⁻⁸"), (1e-3, "0.00100"),
        (2.5e9, "2,500,000,000"), (1.5e300, "1.50×10³⁰⁰"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert plots.show(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (31.3, "31 s"), (59.7, "1 min 0 s"), (81.3, "1 min 21 s"), (9000, "2 h 30 min")]
)
def test_durations(seconds, text):
    assert plots.duration(seconds) == text


VALUES = st.floats(-1e30, 1e30).filter(lambda v: v == 0 or abs(v) > 1e-30)


@given(VALUES, VALUES)
def test_linear_axes_cover_their_values_with_few_distinct_labels(a, b):
    axis = plots.linear_axis(min(a, b), max(a, b))
    texts, _ = plots.tick_texts(axis)
    assert axis.at(min(a, b)) >= -1e-6 and axis.at(max(a, b)) <= 1 + 1e-6
    assert 2 <= len(texts) == len(set(texts)) <= 7


@given(st.floats(1e-30, 1e30), st.floats(1.01, 1e12))
def test_logarithmic_axes_cover_their_values_with_few_distinct_labels(low, ratio):
    axis = plots.log_axis(low, low * ratio)
    texts, _ = plots.tick_texts(axis)
    assert axis.at(low) >= -1e-9 and axis.at(low * ratio) <= 1 + 1e-9
    assert all(-1e-9 <= axis.at(t) <= 1 + 1e-9 for t in axis.ticks)
    assert 1 <= len(texts) == len(set(texts)) <= 7


@given(st.integers(1, 10**9))
def test_step_axes_end_at_the_last_step(last):
    axis = plots.step_axis(last)
    texts = plots.step_texts(axis)
    assert axis.at(last) == 1 and max(axis.ticks) <= last
    assert len(texts) == len(set(texts)) <= 6
