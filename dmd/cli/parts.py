"""`dmd teach`, `dmd pairs` and `dmd report`: the links of the chain that people also want alone."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from dmd.cli import flags
from dmd.config import Config, RunOptions
from dmd.errors import InputError

if TYPE_CHECKING:
    from dmd.build import Workplace
    from dmd.teach_miniature import MiniatureOptions


def teach(argv: Sequence[str], prog: str) -> None:
    """Train a teacher and say where it is."""
    if argv[:1] == ["shapes"]:
        return flags.guarded(lambda: _teach_shapes(argv[1:], f"{prog} shapes"))
    if argv[:1] == ["folder"]:
        return flags.guarded(lambda: _teach_folder(argv[1:], f"{prog} folder"))

    def work(config: Config) -> None:
        from dmd import build

        place = build.workplace(config)
        if config.teacher.teacher is not None:
            raise InputError(f"--teacher is {config.teacher.teacher}: this command makes one, so leave it out")
        data = build.image_set(config)
        folder = Path(build.teacher_source(config, data))
        build.check_shares(config, place)
        done = (folder / "model.safetensors").exists() and not (folder / "checkpoints").exists()
        place.accelerator.wait_for_everyone()
        if (done or build.teach(config, data, place, folder)) and place.main:
            print(f"teacher: {folder}")

    _with_config(argv, prog, "Train the many-step teacher on real images.", work, default="digits")


def _teach_shapes(argv: Sequence[str], prog: str) -> None:
    from dmd import teach_shapes

    options = flags.read(tyro.conf.OmitArgPrefixes[teach_shapes.ShapesOptions], argv, prog)
    _teach_miniature(options.training, lambda place: teach_shapes.teach(options, place))


def _teach_folder(argv: Sequence[str], prog: str) -> None:
    from dmd import teach_folder

    options = flags.read(tyro.conf.OmitArgPrefixes[teach_folder.FolderOptions], argv, prog)
    _teach_miniature(options.training, lambda place: teach_folder.teach(options, place))


def _teach_miniature(training: "MiniatureOptions", work: "Callable[[Workplace], bool]") -> None:
    from dmd import build

    precision: Any = "bf16" if training.mixed_precision else "no"
    place = build.start(RunOptions(cpu=training.cpu, mixed_precision=precision))
    if work(place) and place.main:
        print(f"teacher: {training.output_dir}")


def pairs(argv: Sequence[str], prog: str) -> None:
    """Make a teacher's noise-image pairs, or what is missing of them, and say where they are."""

    def work(config: Config) -> None:
        from dmd import build

        place = build.workplace(config)
        data = place.together(lambda: build.image_set(config)) if config.data.data else None
        asked = build.prompts(config, data)
        source = build.teacher_source(config, data)
        if config.teacher.teacher is None and not (Path(source) / "model.safetensors").exists():
            raise InputError(
                f"no teacher has been taught with these options: run `dmd teach {config.preset}` with the same ones "
                "first, or give one as --teacher"
            )
        teacher = build.load_teacher(config, data, place, source)
        spec = build.pair_spec(config, teacher, asked)
        folder = build.pair_folder(config, spec)
        store = build.make_pairs(config, teacher, asked, spec, place, folder)
        if place.main:
            print(f"{len(store)} pairs: {folder}")

    _with_config(argv, prog, "Make noise-image pairs with a teacher's deterministic sampler.", work)


@dataclass(frozen=True)
class ReportOptions:
    """Write report.html of a run directory again."""

    run: Annotated[str, tyro.conf.Positional]
    """The run directory."""


def report(argv: Sequence[str], prog: str) -> None:
    def work() -> None:
        options = flags.read(ReportOptions, argv, prog)
        folder = Path(options.run)
        if not (folder / "config.json").exists():
            raise InputError(f"{folder} is not a run directory: it has no config.json")
        print(_writer(folder)(folder))

    flags.guarded(work)


def _writer(folder: Path) -> Callable[[Path], Path]:
    """What writes the report of a run of this kind."""
    from dmd import report
    from dmd.cli import clipgen, represent
    from dmd.clipgen import report as clipgen_report
    from dmd.represent import run_report

    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return report.write
    if isinstance(raw, dict) and represent.RUNS.mark in raw:
        return run_report.write
    return clipgen_report.write if isinstance(raw, dict) and clipgen.RUNS.mark in raw else report.write


def _with_config(argv: Sequence[str], prog: str, description: str, work: "flags.Work", default: str = "shapes") -> None:
    def guarded() -> None:
        command = flags.parse(argv, prog, description, default)
        if command.dry_run:
            flags.show(command.config)
        else:
            work(command.config)

    flags.guarded(guarded)
