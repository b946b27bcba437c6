"""RESULTS.md: its figures are those of the measurements, and the page in the repository is up to date."""

import json
import re
from xml.etree import ElementTree

import pytest

from benchmarks import charts, results
from benchmarks.charts import Line

MACHINE = {"device": "NVIDIA X", "threads": 4, "torch": "2.14", "diffusers": "0.42", "commit": "abc"}


def write(folder, key, benchmark, found, arguments=()):
    line = {"benchmark": benchmark, "machine": MACHINE, "arguments": list(arguments), "results": found}
    (folder / f"{key}.json").write_text(json.dumps(line))


def cells(text):
    """Rows of all tables."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def sampled(batch, mode, ms):
    """A batch of benchmarks.sampling: 2 TFLOP an image with the full decoder and 1 with the tiny one."""
    row = {"batch": batch, "mode": mode}
    for decoder, flops in (("full", 2e12), ("tiny", 1e12)):
        row[f"one step, {decoder}"] = {
            "ms_per_image": ms, "spread_ms": 0.1, "flops": flops * batch, "peak_mib": 2048.0,
        }  # fmt: skip
        row[f"teacher, {decoder}"] = {"ms_per_image": 30 * ms}
        row |= {f"speedup, {decoder}": 30.0, f"overhead, {decoder}": 0.015}
    return row


SAMPLING = {
    "networks": "SD", "pixels": 512, "dtype": "float16", "matmul_flops_per_second": 5e14, "steps": 50,
    "teacher_steps_run": 50, "extrapolated": False, "batches": [sampled(1, "eager", 16.0), sampled(8, "eager", 6.0)],
}  # fmt: skip


def test_the_page_in_the_repository_is_what_its_measurements_give():
    text, plots = results.page(results.read(results.FOLDER))
    assert results.PAGE.read_text(encoding="utf-8") == text, "run python -m benchmarks.results"
    assert {p.name: p.read_text(encoding="utf-8") for p in results.FOLDER.glob("*.svg")} == plots


def test_an_experiment_is_drawn_with_its_lowest_and_highest_seed(tmp_path):
    arms = {
        arm: {"linear": {"mean": mean, "std": 0.01, "low": mean - 0.02, "high": mean + 0.03}}
        for arm, mean in (("StableRep, student", 0.8), ("SimCLR, student", 0.7))
    }
    found = {
        "experiment": "a", "world": "digits", "train_images": 1347, "seeds": [0, 1, 2], "arms": arms,
        "targets": [{"what": "points above SimCLR", "value": 10.0, "met": True}],
    }  # fmt: skip
    write(tmp_path, "representation-a", "representation", found)
    text, plots = results.page(results.read(tmp_path))
    assert ["StableRep, student", "0.8000 ± 0.0100"] in cells(text) and "points above SimCLR: 10.00, met" in text
    assert "![representation-a](results/representation-a.svg)" in text
    assert "StableRep, student: 0.800 [0.780, 0.830]" in plots["representation-a.svg"]
    assert (
        "3 seeds" in plots["representation-a.svg"] and ElementTree.fromstring(plots["representation-a.svg"]) is not None
    )


def test_clip_gen_stands_beside_the_student_and_its_costs(tmp_path):
    row = {"caption_agreement": 0.123, "fd_0": 0.5, "clip_score": 30.0, "images_per_second": 12.3}
    found = {"metric": "FD-X", "samples": 512, "steps": 50, "rows": {"held_out/student, 1 step": row}}
    write(tmp_path, "text_to_image-x", "text_to_image", found)
    step = {"step_seconds": 0.2, "bare_seconds": 0.19, "bare_share": 0.95}
    cache = {"uncached_seconds": 7.0, "cached_seconds": 1.0, "times_faster": 7.0, "logits_apart": 6e-7}
    stage = {"gflop_per_image": 0.41, "images": 70400, "tflop": 29.0}
    costs = {"cache": cache, "tokenizer": step, "transformer": step, "operations": {"clip": stage}}
    write(tmp_path, "clipgen-x", "clipgen", costs)
    text, plots = results.page(results.read(tmp_path))
    table = {line[0]: line[1:] for line in cells(text)}
    assert table["held out: student, 1 step"] == ["12.3 %", "0.5000", "30.0", "12.3"] and "| FD-X |" in text
    assert table["tokenizer step and its bare calls, ms"] == ["200", "190", "0.950"]
    assert table["clip"] == ["0.41", "70,400", "29"] and "at most 6.0e-07" in text and not plots


def test_a_learners_step_stands_beside_its_bare_calls(tmp_path):
    row = {"method": "simclr", "preset": "digits", "views": 256, "step_ms": 200.0, "bare_ms": 190.0, "ratio": 0.95}
    found = {"flags": [], "methods": [row | {"ratio_spread": 0.01, "batch_ms": 30.5}]}
    write(tmp_path, "learner-x", "learner", found)
    text, _ = results.page(results.read(tmp_path))
    assert ["simclr", "256", "200", "190", "0.950 ± 0.010", "30.5"] in cells(text) and "| Preset digits |" in text


def test_sampling_is_compared_with_the_floor_of_its_own_device(tmp_path):
    """2 TFLOP at 500 TFLOP/s are 4 ms, whatever the batch."""
    write(tmp_path, "sampling-x", "sampling", SAMPLING, ["--json", "/home/me/s.json", "--batch-sizes", "1", "8"])
    text, plots = results.page(results.read(tmp_path))
    table = {row[0]: row[1:] for row in cells(text)}
    assert table["eager, batch 1, full decoder"] == ["16 ± 0.100", "4", "4.00", "480", "30.0", "+1.5 %", "2.00"]
    assert table["eager, batch 8, tiny decoder"][1:3] == ["2", "3.00"]
    assert "NVIDIA X; torch 2.14, diffusers 0.42; commit abc. `python -m benchmarks.sampling --batch-sizes 1 8`" in text
    assert "/home" not in text
    assert list(plots) == ["sampling-x.svg"] and "(results/sampling-x.svg)" in text
    assert "full, floor: 8, 4" in plots["sampling-x.svg"]


def test_missed_targets_are_said(tmp_path):
    line = {"what": "a", "value": 2.0, "unit": "s", "target": 1.0, "least": False, "note": "", "met": False}
    lines = [line | {"name": "P1"}, line | {"name": "P3", "least": True, "met": True}]
    lines.append(line | {"name": "P8", "value": None, "met": None})
    write(tmp_path, "all-x", "all", {"lines": lines})
    assert cells(results.page(results.read(tmp_path))[0])[2:] == [
        ["P1 a", "2 s", "≤ 1 s", "**missed**", ""],
        ["P3 a", "2 s", "≥ 1 s", "met", ""],
        ["P8 a", "not measured", "≤ 1 s", "", ""],
    ]


def test_quality_shows_students_and_the_curve(tmp_path):
    teacher = {"fd": 2.0, "precision": 0.5, "nfe": 35}
    student = {"fd": 3.0, "precision": 0.25}
    curve = [{"solver": "heun", "evaluations": n, "figures": teacher | {"fd": 70 / n}} for n in (7, 35)]
    arms = {"both": {"student": student, "fd_ratio": 1.5, "generator_updates": 1500}}
    found = {"digits": {"metric": "FD-X", "samples": 5000, "teacher": teacher, "arms": arms, "curve": curve}}
    write(tmp_path, "quality-x", "quality", found)
    text, plots = results.page(results.read(tmp_path))
    table = {row[0]: row[1:] for row in cells(text)}
    assert table["teacher, heun, 7 evaluations"] == ["10", "5.00", "0.500", ""]
    assert table["**student**"] == ["3", "1.50", "0.250", "1,500"]
    assert "biased upwards" in text and set(plots) == {"quality-x-digits.svg"}


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match="x.json is not the last line of a benchmark"):
        results.read(tmp_path)
    write(tmp_path, "x", "unheard", {})
    with pytest.raises(ValueError, match="benchmarks.unheard, which has no section"):
        results.page(results.read(tmp_path))


def test_a_chart_places_its_points():
    """On logarithmic axes a power law is a straight line: equal steps right are equal steps down."""
    drawing = charts.lines("t", "x <", "y", [Line("a & b", [(10.0**k, 10.0**-k) for k in range(4)] + [(-1.0, 1.0)])])
    root = ElementTree.fromstring(drawing)
    (line,) = root.iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(points, points[1:], strict=False)]
    assert len(points) == 4 and all(s == pytest.approx(steps[0], abs=0.11) for s in steps)
    assert points[0][0] == charts.LEFT and points[-1][0] == charts.WIDTH - charts.RIGHT
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a & b" in texts and "x <" in texts and not re.search("nan|inf", drawing)
    with pytest.raises(ValueError, match="no point"):
        charts.lines("t", "x", "y", [Line("a", [(float("nan"), 1.0)])])
