"""What one step costs in quality: `python -m benchmarks.quality [PRESET ...] [--quick] [-- flags of train_dmd.py]`.

For each preset, by `train_dmd.py` itself, one teacher is distilled again and again, with the same seed and the same
cached teacher and pairs, and every student is measured against that teacher from the same noise:

  both             the preset as it is: the student against its teacher
  objective        the paper's ablation: distribution matching alone (also at a tenth of the rate: the paper too lowers
                   it there, lest it diverge), and regression alone
  critic           2 and 5 updates of the fake score for one of the student
  lambda           the weight of the regression a quarter and four times the preset's
  pairs            a quarter and a sixteenth of the noise-image pairs

Then the teacher itself is measured at fewer steps (`--curve`), with the student's noise: how many network evaluations
are the student's one worth?

`--arms` chooses. Every run and every point of the curve has a folder in `--folder` and is resumed or kept, so that an
interrupted table goes on. `--plot` writes the curves as SVG.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import charts, common
from benchmarks.charts import Line
from benchmarks.common import finish, say_machine
from dmd import build
from dmd.checkpoint import write_json
from dmd.config import PRESETS, Config, preset, read
from dmd.evaluation import Judge
from dmd.noise import Karras
from dmd.pipeline import Pipeline

SCRIPT = Path(__file__).resolve().parent.parent / "train_dmd.py"
FIGURES = {
    "accuracy": "accuracy", "caption_agreement": "agreement", "precision": "precision", "recall": "recall",
    "diversity": "diversity",
}  # fmt: skip
"""Of the table, where there are such, and their titles."""
QUICK = {
    "digits": ["--teach-steps", "100", "--pairs", "64", "--max-train-steps", "20", "--final-samples", "64"],
    "shapes": [
        "--pairs", "16", "--teacher-steps", "4", "--max-train-steps", "4", "--final-samples", "32",
        "--compare-steps", "8",
    ],
}  # fmt: skip
QUICK_ALL = ["--eval-samples", "32", "--log-every", "2"]
GROUPS = ("both", "objective", "critic", "lambda", "pairs")


def arms(config: Config) -> dict[str, dict[str, list[str]]]:
    """Flags of the runs, by group and name; "both" is the preset itself."""
    d, pairs = config.distill, config.pairs.pairs
    slow = str(d.learning_rate / 10)
    return {
        "both": {"both": []},
        "objective": {
            "matching only": ["--objective", "matching"],
            "matching, slower": ["--objective", "matching", "--learning-rate", slow],
            "regression only": ["--objective", "regression"],
        },
        "critic": {f"critic {n}:1": ["--critic-steps-per-generator-step", str(n)] for n in (2, 5)},
        "lambda": {f"lambda {v:g}": ["--lambda-reg", str(v)] for v in (d.lambda_reg / 4, 4 * d.lambda_reg)},
        "pairs": {f"{n:,} pairs": ["--pairs", str(n)] for n in (pairs // 4, pairs // 16)},
    }


def distilled(name: str, folder: Path, flags: Sequence[str]) -> dict[str, Any]:
    """The summary of a run, which is made or resumed where it is not whole."""
    subprocess.run([sys.executable, str(SCRIPT), name, "--output-dir", str(folder), *flags], check=True)
    return json.loads((folder / "summary.json").read_text())


def steps_of(config: Config, teacher: Pipeline, most: int) -> Iterator[tuple[str, int]]:
    """(solver, its steps) of the curve, up to the steps that the run compared its student with."""
    if isinstance(teacher.denoiser.schedule, Karras):
        evaluations = 2 * most - 1
        yield from (("ddim", n) for n in sorted({1, 2, 4, 8, 18, evaluations}) if n <= evaluations)
        yield from (("heun", n) for n in sorted({2, 4, 9, most}) if 1 < n <= most)
    else:
        yield from (("ddim", n) for n in sorted({1, 2, 4, 8, 18, 35, most}) if n <= most)
        yield from (("dpm-solver", n) for n in sorted({2, 4, 8, 18, most}) if 1 < n <= most)


def curve(run: Path, folder: Path, quick: bool) -> list[dict[str, Any]]:
    """The figures of a run's teacher at several numbers of steps, on the noise of its final comparison.

    Args:
        run: a finished run directory.
        folder: points lie there as JSON; those that are there are not measured again.
    """
    config = read(run / "config.json")
    place = build.workplace(config)
    data = build.image_set(config) if config.data.data else None
    teacher = build.load_teacher(config, data, place, build.teacher_source(config, data))
    asked = build.judged_prompts(config, build.prompts(config, data))
    judge = build.judge(config, teacher, data, build.reference_set(config, data), asked, place)
    most = config.evaluation.compare_steps or config.pairs.teacher_steps
    found = list(steps_of(config, teacher, most))
    digest = teacher.digest()
    return [
        point(config, teacher, judge, solver, steps, folder / f"{solver}-{steps}.json", digest)
        for solver, steps in (found[:2] if quick else found)
    ]


def point(
    config: Config, teacher: Pipeline, judge: Judge, solver: Any, steps: int, file: Path, digest: str
) -> dict[str, Any]:
    """A point of the curve, from its file if that is of this teacher and as many samples."""
    count = config.evaluation.final_samples
    facts = {"solver": solver, "steps": steps, "samples": count, "guidance": config.pairs.guidance, "teacher": digest}
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    if {k: known.get(k) for k in facts} == facts:
        return known
    with_solver = replace(config, pairs=replace(config.pairs, solver=solver))
    generator, evaluations = build.many_step(with_solver, build.guided(config, teacher), steps)
    x, rate = judge.samples(generator, count, 0, f"{solver}, {steps} steps")
    made = facts | {"evaluations": evaluations, "images_per_second": rate, "figures": judge.figures(x)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, made)
    return made


def table(name: str, metric: str, runs: dict[str, dict[str, Any]]) -> str:
    """A line for the teacher, and one for each student."""
    teacher = next(iter(runs.values()))["teacher"]
    shown = {k: title for k, title in FIGURES.items() if k in teacher}
    titles = "".join(f"{t:>11}" for t in shown.values())
    lines = [f"{name:18}{metric:>18}{'ratio':>8}{titles}{'updates':>9}{'s':>7}"]
    lines.append(f"{'teacher':18}{teacher['fd']:18.4f}{1:8.2f}" + "".join(f"{teacher[f]:11.4f}" for f in shown))
    for arm, summary in runs.items():
        student = summary["student"]
        figures = "".join(f"{student[f]:11.4f}" for f in shown)
        ends = f"{summary['generator_updates']:9}{summary['distil_seconds']:7.0f}"
        lines.append(f"{arm:18}{student['fd']:18.4f}{summary['fd_ratio']:8.2f}{figures}{ends}")
    return "\n".join(lines)


def chart(name: str, result: dict[str, Any]) -> str:
    """The teacher's distance over its network evaluations, with the student's as a dot."""
    solvers = list(dict.fromkeys(p["solver"] for p in result["curve"]))
    found = [
        Line(f"teacher, {s}", [(p["evaluations"], p["figures"]["fd"]) for p in result["curve"] if p["solver"] == s])
        for s in solvers
    ]
    student = result["arms"].get("both")
    if student is not None:
        found.append(Line("student", [(1, student["student"]["fd"])]))
    title = f"{name}: distance against network evaluations, {result['samples']:,} samples"
    return charts.lines(title, "network evaluations of an image", result["metric"], found)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("presets", nargs="*", metavar="PRESET", default=["digits"], help=", ".join(PRESETS))
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="where the runs go")
    parser.add_argument("--arms", nargs="+", choices=GROUPS, help="both and objective if left out")
    parser.add_argument("--curve", action="store_true", help="measure the teacher at fewer steps too")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write the curves there as SVG")
    parser.add_argument("--quick", action="store_true", help="a few steps of two arms, two points: a smoke test")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, flags = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    unknown = [name for name in options.presets if name not in PRESETS]
    if unknown:
        parser.error(f"there is no preset {unknown[0]!r}: choose of {', '.join(PRESETS)}")
    if options.quick and not set(options.presets) <= set(QUICK):
        parser.error(f"--quick knows {' and '.join(QUICK)}")
    say_machine()
    results = {}
    for name in options.presets:
        small = [*QUICK[name], *QUICK_ALL] if options.quick else []
        every = arms(preset(name))
        chosen = {k: v for g in dict.fromkeys(["both", *(options.arms or ["objective"])]) for k, v in every[g].items()}
        if options.quick:
            chosen = dict(list(chosen.items())[:1] + list(chosen.items())[-1:])
        base = options.folder / name
        runs = {k: distilled(name, base / slug(k), [*small, *v, *flags]) for k, v in chosen.items()}
        first = runs["both"]
        measured = curve(base / slug("both"), base / "curve", options.quick) if options.curve or options.quick else []
        results[name] = {
            "metric": first["metric"],
            "samples": first["samples"],
            "teacher": without_folder(first["teacher"]),
            "arms": {k: kept(s) for k, s in runs.items()},
            "curve": measured,
        }
        print("\n" + table(name, first["metric"], runs))
        for p in results[name]["curve"]:
            taken = f"{p['solver']:10} {p['evaluations']:4} evaluations"
            print(f"teacher, {taken}: {first['metric']} {p['figures']['fd']:.4f}")
        if options.plot is not None and results[name]["curve"]:
            options.plot.mkdir(parents=True, exist_ok=True)
            (options.plot / f"quality-{name}.svg").write_text(chart(name, results[name]), encoding="utf-8")
    finish("quality", results, options.json)


KEPT = ("fd_ratio", "generator_updates", "critic_updates", "images_seen", "distil_seconds", "speedup")
"""Of a run's summary, beside the student's figures."""


def kept(summary: dict[str, Any]) -> dict[str, Any]:
    return {n: summary[n] for n in KEPT if n in summary} | {"student": without_folder(summary["student"])}


def without_folder(figures: dict[str, Any]) -> dict[str, Any]:
    """Where a run lies on a machine is nobody's business."""
    return {k: v for k, v in figures.items() if k != "folder"}


def slug(arm: str) -> str:
    """An arm's name as a folder."""
    return arm.replace(", ", "-").replace(" ", "-").replace(":", "-").replace(",", "")


if __name__ == "__main__":
    main()
