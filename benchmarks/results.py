"""RESULTS.md from measurements: `python -m benchmarks.results`.

Every benchmark writes its last line to a file with `--json`; those that lie in `benchmarks/results/` become the tables
of `benchmarks/RESULTS.md` and its plots, and nothing else does: device, versions, commit and command stand with each.

`--check` writes nothing and fails if the page is not what the measurements give.

A benchmark may have several files, one for each machine: `sampling-h100.json`, `sampling-cpu.json`. The file's name is
its key, so measuring again with the same name replaces it.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import charts, common
from benchmarks.charts import Line
from benchmarks.quality import FIGURES, chart
from benchmarks.representation import chart as experiment_chart
from dmd.plots import show

FOLDER = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "RESULTS.md"


@dataclass(frozen=True)
class Measured:
    """A benchmark's last line.

    Attributes:
        key: its file's name without the ending.
    """

    key: str
    benchmark: str
    machine: Mapping[str, Any]
    arguments: Sequence[str]
    results: Any

    @property
    def command(self) -> str:
        """As it was given, but for where things lay on that machine."""
        kept = common.without_places(self.arguments)
        return shlex.join(["python", "-m", f"benchmarks.{self.benchmark}", *kept])

    @property
    def where(self) -> str:
        """Below each table."""
        m = self.machine
        versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "diffusers") if m.get(name))
        plural = "s" if m["threads"] > 1 else ""
        threads = "" if str(m["device"]).startswith("NVIDIA") else f", {m['threads']} thread{plural}"
        return f"{m['device']}{threads}; {versions}; commit {m['commit']}. `{self.command}`"


def read(folder: Path) -> list[Measured]:
    """All measurements of a folder, by name.

    Raises:
        ValueError: a file is no benchmark's line.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            line = json.loads(path.read_text(encoding="utf-8"))
            facts = (line["benchmark"], line["machine"], line.get("arguments", []), line["results"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the last line of a benchmark ({error}): measure it again") from None
        found.append(Measured(path.stem, *facts))
    return found


def rows(titles: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are figures."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(row: Mapping[str, Any]) -> str:
    return f"{show(row['ms_per_image'])} ± {show(row['spread_ms'])}"


# ----------------------------------------------------------------------------- sections


@dataclass(frozen=True)
class Section:
    """What a benchmark's measurements become.

    Attributes:
        title: its heading.
        text: what is measured.
        body: tables of a measurement.
        plots: file names and SVGs of it.
    """

    title: str
    text: str
    body: Callable[[Measured], str]
    plots: Callable[[Measured], dict[str, str]] = lambda measured: {}


def targets(measured: Measured) -> str:
    body = []
    for line in measured.results["lines"]:
        value = "not measured" if line["value"] is None else f"{show(line['value'])} {line['unit']}".strip()
        sign = "≥" if line["least"] else "≤"
        bound = "" if line["target"] is None else f"{sign} {show(line['target'])} {line['unit']}".strip()
        verdict = {True: "met", False: "**missed**", None: ""}[line["met"]]
        body.append([f"{line['name']} {line['what']}", value, bound, verdict, line["note"]])
    return rows(["Target", "Measured", "Bound", "", "Note"], body)


def sampling(measured: Measured) -> str:
    r = measured.results
    what = f"{r['networks']}, {r['pixels']} px, {r['dtype']}; a large matrix product reaches "
    what += f"{r['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s"
    if r["extrapolated"]:
        what += f". The teacher's {r['steps']} steps are extrapolated from {r['teacher_steps_run']}"
    body = []
    for b in r["batches"]:
        for decoder in ("full", "tiny"):
            one, many = b[f"one step, {decoder}"], b[f"teacher, {decoder}"]
            floor = 1e3 * one["flops"] / r["matmul_flops_per_second"] / b["batch"]
            body.append([
                f"{b.get('mode', 'eager')}, batch {b['batch']}, {decoder} decoder", milliseconds(one), show(floor),
                f"{one['ms_per_image'] / floor:.2f}", show(many["ms_per_image"]), f"{b[f'speedup, {decoder}']:.1f}",
                f"{100 * b[f'overhead, {decoder}']:+.1f} %", f"{one['peak_mib'] / 1024:.2f}",
            ])  # fmt: skip
    titles = ["", "one step, ms per image", "floor, ms", "times the floor", "teacher, ms", "speedup", "added", "GiB"]
    return f"{what}.\n\n{rows(titles, body)}"


def sampling_plots(measured: Measured) -> dict[str, str]:
    """Latency over batch size, with the floor; there is no curve of a single batch."""
    r = measured.results
    if len({b["batch"] for b in r["batches"]}) < 2:
        return {}
    found = []
    for decoder in ("full", "tiny"):
        for mode in dict.fromkeys(b.get("mode", "eager") for b in r["batches"]):
            kept = [b for b in r["batches"] if b.get("mode", "eager") == mode]
            found.append(
                Line(f"{decoder}, {mode}", [(b["batch"], b[f"one step, {decoder}"]["ms_per_image"]) for b in kept])
            )
        floor = [
            (b["batch"], 1e3 * b[f"one step, {decoder}"]["flops"] / r["matmul_flops_per_second"] / b["batch"])
            for b in r["batches"]
        ]
        found.append(Line(f"{decoder}, floor", sorted(set(floor))))
    return {f"{measured.key}.svg": charts.lines("One step, from prompt to image", "batch size", "ms per image", found)}


def peers(measured: Measured) -> str:
    r = measured.results
    body = [
        [
            f"{row['work']}, batch {row['batch']}, {row['mode']}",
            f"{1e3 * row['ours_seconds']:.3g} ± {1e3 * row['ours_spread']:.2g}",
            f"{1e3 * row['stock_seconds']:.3g} ± {1e3 * row['stock_spread']:.2g}",
            f"{row['ratio']:.3f} ± {row['ratio_spread']:.3f}", f"{row['difference_rms']:.1e}",
        ]
        for row in r["rows"]
    ]  # fmt: skip
    titles = [f"{r['networks']}, {r['dtype']}", "ours, ms", "stock, ms", "stock / ours", "images differ, rms"]
    return rows(titles, body)


def step(measured: Measured) -> str:
    r = measured.results
    calls = ", ".join(f"{name} {count}" for name, count in r["calls"].items())
    memory = f"{r['peak_mib'] / 1024:.2f}" if "peak_mib" in r else "–"
    facts = [
        r["preset"],
        f"{r['step_ms']:.4g}",
        f"{r['bare_ms']:.4g}",
        f"{r['ratio']:.3f}",
        f"{r['mfu']:.3f}",
        memory,
        calls,
    ]
    return rows(
        ["Preset", "iteration, ms", "bare calls, ms", "bare / iteration", "utilisation", "GiB", "calls"], [facts]
    )


def dataset(measured: Measured) -> str:
    body = [
        [f"{part}: {name.replace('_', ' ')}", show(value)]
        for part, figures in measured.results.items()
        if isinstance(figures, dict)
        for name, value in figures.items()
    ]
    return rows(["", "Measured"], body)


def quality(measured: Measured) -> str:
    return "\n\n".join(_preset(name, result) for name, result in measured.results.items())


def _preset(name: str, result: Mapping[str, Any]) -> str:
    shown = {k: title for k, title in FIGURES.items() if k in result["teacher"]}

    def line(title: str, figures: Mapping[str, Any], ratio: float, updates: str) -> list[str]:
        return [title, show(figures["fd"]), f"{ratio:.2f}", *(f"{figures[k]:.3f}" for k in shown), updates]

    teacher = result["teacher"]
    body = [line(f"teacher, {teacher['nfe']} evaluations", teacher, 1.0, "")]
    for p in result["curve"]:
        title = f"teacher, {p['solver']}, {p['evaluations']} evaluation{'s' if p['evaluations'] > 1 else ''}"
        body.append(line(title, p["figures"], p["figures"]["fd"] / teacher["fd"], ""))
    for arm, found in result["arms"].items():
        title = "**student**" if arm == "both" else f"student, {arm}"
        body.append(line(title, found["student"], found["fd_ratio"], f"{found['generator_updates']:,}"))
    few = " Fewer than 10,000 samples: the distances are biased upwards, and comparable with one another only."
    text = f"**{name}**, {result['samples']:,} samples from the same noise.{few if result['samples'] < 10_000 else ''}"
    return f"{text}\n\n{rows([name, result['metric'], 'ratio', *shown.values(), 'updates'], body)}"


def quality_plots(measured: Measured) -> dict[str, str]:
    named = {f"{measured.key}-{name}.svg": (name, result) for name, result in measured.results.items()}
    return {file: chart(name, result) for file, (name, result) in named.items() if result["curve"]}


def representation(measured: Measured) -> str:
    r = measured.results
    names = list(dict.fromkeys(name for row in r["arms"].values() for name in row))
    body = [
        [arm, *(f"{row[n]['mean']:.4f} ± {row[n]['std']:.4f}" if n in row else "–" for n in names)]
        for arm, row in r["arms"].items()
    ]
    text = f"Experiment {r['experiment']}, {r['world']}: {r['train_images']:,} training images, seeds "
    text += ", ".join(map(str, r["seeds"])) + " (mean ± standard deviation)."
    said = [f"{t['what']}: {t['value']:.2f}, {'met' if t['met'] else '**missed**'}" for t in r["targets"]]
    return "\n\n".join([text, rows(["", *names], body), *said])


def representation_plots(measured: Measured) -> dict[str, str]:
    r = measured.results
    return {f"{measured.key}.svg": experiment_chart(r["experiment"], r["world"], r["seeds"], r["arms"])}


def learner(measured: Measured) -> str:
    body = [
        [
            m["method"], f"{m['views']:,}", f"{m['step_ms']:.4g}", f"{m['bare_ms']:.4g}",
            f"{m['ratio']:.3f} ± {m['ratio_spread']:.3f}", f"{m['batch_ms']:.4g}",
        ]
        for m in measured.results["methods"]
    ]  # fmt: skip
    presets = ", ".join(dict.fromkeys(m["preset"] for m in measured.results["methods"]))
    titles = [f"Preset {presets}", "views", "step, ms", "bare calls, ms", "bare / step", "a batch, ms"]
    return rows(titles, body)


def text_to_image(measured: Measured) -> str:
    r = measured.results
    body = []
    for key, row in sorted(r["rows"].items()):
        asked, name = key.split("/", 1)
        agreement = f"{100 * row['caption_agreement']:.1f} %" if "caption_agreement" in row else "–"
        rate = f"{row['images_per_second']:.3g}"
        body.append(
            [f"{asked.replace('_', ' ')}: {name}", agreement, f"{row['fd_0']:.4f}", f"{row['clip_score']:.1f}", rate]
        )
    titles = [f"{r['samples']:,} captions each", "show their caption", r["metric"], "CLIP score", "images per second"]
    return rows(titles, body)


def clipgen(measured: Measured) -> str:
    r = measured.results
    c = r["cache"]
    body = [
        [
            "256 tokens without and with the cache, s",
            f"{c['uncached_seconds']:.3g}",
            f"{c['cached_seconds']:.3g}",
            f"{c['times_faster']:.1f} times",
        ],
        *(
            [
                f"{stage} step and its bare calls, ms",
                f"{1e3 * r[stage]['step_seconds']:.4g}",
                f"{1e3 * r[stage]['bare_seconds']:.4g}",
                f"{r[stage]['bare_share']:.3f}",
            ]
            for stage in ("tokenizer", "transformer")
        ),
    ]
    work = [
        [stage, f"{row['gflop_per_image']:.3g}", f"{row['images']:,}", f"{row['tflop']:.3g}"]
        for stage, row in r["operations"].items()
    ]
    said = f"Logits with and without the cache differ by at most {c['logits_apart']:.1e}."
    counted = rows(["Arithmetic of a stage", "GFLOP an image", "images", "TFLOP"], work)
    return "\n\n".join([rows(["", "whole", "least", ""], body), said, counted])


SECTIONS = {
    "all": Section("Targets P1 to P8", "Each beside its bound.", targets),
    "sampling": Section(
        "Sampling",
        "From a prompt to an image in memory, one step against the guided steps of the teacher. The floor is the "
        "arithmetic of the networks at the rate of a large matrix product on the same device; what the sampler adds is "
        "over the same networks called bare.",
        sampling,
        sampling_plots,
    ),
    "peers": Section(
        "Beside stock diffusers",
        "The same networks, precision and batch in `StableDiffusionPipeline`, in turns; above 1 ours is faster.",
        peers,
    ),
    "step": Section(
        "A training step",
        "An iteration of distillation against the network calls that it cannot do without, and model FLOPs utilisation "
        "against a large matrix product.",
        step,
    ),
    "quality": Section(
        "Quality",
        "Student against its teacher, ablations, and the teacher at fewer steps: distance, its ratio to the teacher's, "
        "and what a distance alone does not show.",
        quality,
        quality_plots,
    ),
    "representation": Section(
        "Representation",
        "Probes of backbones that learnt from synthetic and from real images.",
        representation,
        representation_plots,
    ),
    "learner": Section(
        "A learner's step",
        "Against forward and backward of its networks, target 0.90; and what reading and augmenting a batch takes, "
        "which workers can do meanwhile.",
        learner,
    ),
    "text_to_image": Section(
        "Text to image",
        "One step, many steps and token by token on the same captions of shapes; CLIP-GEN has learnt without captions. "
        "Distance and score are by CLIP-GEN's own CLIP, which flatters it.",
        text_to_image,
    ),
    "clipgen": Section(
        "CLIP-GEN", "What the cache saves, and what a training step adds to its network calls.", clipgen
    ),
    "dataset": Section("Data set", "From a generator to shards; rates are images per second.", dataset),
}
"""By benchmark, in the page's order. Other benchmarks' files are refused: their figures stand where they are used."""


def page(found: Sequence[Measured]) -> tuple[str, dict[str, str]]:
    """RESULTS.md, and its plots by file name.

    Raises:
        ValueError: a measurement is of a benchmark without a section.
    """
    parts = ["# Results", "Made by `python -m benchmarks.results` from `benchmarks/results/*.json`: do not edit."]
    plots: dict[str, str] = {}
    for measured in found:
        if measured.benchmark not in SECTIONS:
            raise ValueError(f"{measured.key}.json is of benchmarks.{measured.benchmark}, which has no section here")
    for name, section in SECTIONS.items():
        own = [m for m in found if m.benchmark == name]
        parts.append(f"## {section.title}\n\n{section.text}")
        if not own:
            parts.append(
                f"Not measured yet: `python -m benchmarks.{name} --json benchmarks/results/{name}-MACHINE.json`."
            )
        for measured in own:
            drawn = section.plots(measured)
            plots |= drawn
            pictures = "".join(f"\n\n![{Path(file).stem}](results/{file})" for file in drawn)
            parts.append(f"{section.body(measured)}{pictures}\n\n{measured.where}")
    return "\n\n".join(parts) + "\n", plots


def main() -> None:
    parser = common.plain_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    options = parser.parse_args()
    try:
        text, plots = page(read(FOLDER))
    except ValueError as error:
        parser.error(str(error))
    wanted = {PAGE: text} | {FOLDER / file: svg for file, svg in plots.items()}
    surplus = [p for p in FOLDER.glob("*.svg") if p not in wanted]
    if options.check:
        stale = [p for p, content in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != content]
        for path in [*stale, *surplus]:
            print(f"{path.name} is not what the measurements give", file=sys.stderr)
        sys.exit(1 if stale or surplus else 0)
    for path, content in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    for path in surplus:
        path.unlink()
    print(f"{PAGE}: {len(re.findall('^## ', text, re.M))} sections, {len(plots)} plots")


if __name__ == "__main__":
    main()
