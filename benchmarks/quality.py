"""The paper's ablation: `python -m benchmarks.quality [PRESET] [--quick] [-- flags of train_dmd.py]`.

Distils one teacher four times, by `train_dmd.py` itself, with the same seed and the same cached teacher and pairs: both
losses, distribution matching alone (also at a tenth of the `digits` rate: the paper too lowers it there, lest it
diverge), and regression alone. Every student is measured against that teacher, from the same noise. A run that is
already in `--folder` is resumed, so an interrupted table goes on.
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import common
from benchmarks.common import finish, say_machine

VARIANTS = {
    "both": [],
    "matching only": ["--objective", "matching"],
    "matching, slower": ["--objective", "matching", "--learning-rate", "2e-4"],
    "regression only": ["--objective", "regression"],
}
QUICK = ["--teach-steps", "200", "--pairs", "200", "--max-train-steps", "40", "--final-samples", "100"]
FIGURES = ("fd", "accuracy", "precision", "recall", "diversity")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("preset", nargs="?", default="digits")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="where the runs go")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: a smoke test")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, flags = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    say_machine()
    script = Path(__file__).resolve().parent.parent / "train_dmd.py"
    results = {}
    for name, change in VARIANTS.items():
        folder = options.folder / options.preset / name.replace(" ", "-")
        command = [sys.executable, str(script), options.preset, "--output-dir", str(folder)]
        subprocess.run([*command, *(QUICK if options.quick else []), *change, *flags], check=True)
        results[name] = json.loads((folder / "summary.json").read_text())

    teacher = next(iter(results.values()))["teacher"]
    metric = next(iter(results.values()))["metric"]
    print(f"{'':18}{metric:>16}{'ratio':>8}" + "".join(f"{f:>11}" for f in FIGURES[1:]) + f"{'updates':>9}{'s':>7}")
    print(f"{'teacher':18}{teacher['fd']:16.4f}{1:8.2f}" + "".join(f"{teacher[f]:11.4f}" for f in FIGURES[1:]))
    for name, summary in results.items():
        student = summary["student"]
        print(
            f"{name:18}{student['fd']:16.4f}{summary['fd_ratio']:8.2f}"
            + "".join(f"{student[f]:11.4f}" for f in FIGURES[1:])
            + f"{summary['generator_updates']:9}{summary['distil_seconds']:7.0f}"
        )
    finish("quality", {name: {k: s[k] for k in ("fd_ratio", "teacher", "student")} for name, s in results.items()})


if __name__ == "__main__":
    main()
