"""One small world for all tests of the commands: data, a teacher, pairs, a classifier, and a run that nothing hit."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from small import lines

from dmd import report
from dmd.cli import train
from dmd.metrics import networks


@dataclass(frozen=True)
class World:
    """Where things are, and the flags that use them."""

    root: Path

    @property
    def reference(self) -> Path:
        """The run directory of the undisturbed run."""
        return self.root / "reference"

    @property
    def teacher(self) -> Path:
        return next((self.root / "cache" / "teachers").iterdir())

    def flags(self, out: Path, *more: str) -> list[str]:
        """The command of the reference run with another output folder; `more` wins over what stands before it."""
        defaults = (
            f"--cpu --data {self.root}/data --cache-dir {self.root}/cache --width 8 --multipliers 1 --attention False "
            "--teach-steps 8 --teach-batch-size 8 --pairs 12 --pair-shard-size 6 --teacher-steps 2 "
            "--max-train-steps 6 --batch-size 4 --pair-batch-size 4 --lr-warmup-steps 2 --eval-every 3 "
            "--eval-samples 16 --final-samples 16 --checkpointing-steps 2 --log-every 2 --report-to none"
        )
        return ["digits", *defaults.split(), "--output-dir", str(out), *more]

    def outcome(self, run: Path) -> dict[str, object]:
        """What a finished run leaves, without its clock: bytes of all weights, figures."""
        weights = [*run.glob("student/*.safetensors"), *run.glob("checkpoints/*/*.safetensors")]
        summary = json.loads((run / "summary.json").read_text())
        return {
            "weights": {str(p.relative_to(run)): p.read_bytes() for p in weights},
            "records": lines(run),
            "figures": [summary["fd_ratio"], summary["best"], summary["generator_updates"]],
        }


def no_report(folder: Path) -> Path:
    return folder / "report.html"


@pytest.fixture(autouse=True)
def without_report(monkeypatch):
    """The report has tests of its own and takes longer than these runs."""
    monkeypatch.setattr(report, "write", no_report)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Made by the command itself. Only the classifier of the metric is trained less than it would be."""
    made = World(tmp_path_factory.mktemp("world"))
    (made.root / "data").mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 48), ("test", 24)):
        write_images(made.root / "data" / f"{name}.npz", rng, count)
    fit = networks._fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", no_report)
        patch.setattr(networks, "_fit", lambda data, seed, steps: fit(data, seed, 5))
        train.main(made.flags(made.reference))
    return made


def write_images(path: Path, rng: np.random.Generator, count: int) -> None:
    """Noisy blocks in one of three corners, which is their class."""
    labels = np.arange(count) % 3
    images = rng.integers(0, 60, (count, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 150
    np.savez(path, images=images, labels=labels, class_names=np.array(["a", "b", "c"]))


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content, folders with None."""
    found = sorted(folder.rglob("*")) if folder.exists() else []
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}


@pytest.fixture
def refused(capsys):
    """Run a command that must refuse: returns its one sentence. `watched` folders must stay as they are."""

    def check(command, flags, *watched: Path, code: int = 2) -> str:
        before = [(p.exists(), listing(p)) for p in watched]
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            command(flags)
        err = capsys.readouterr().err.replace("\r", "\n")
        sentences = [line for line in err.splitlines() if line.strip() and "%|" not in line and "it/s]" not in line]
        assert caught.value.code == code, err
        assert len(sentences) == 1 and sentences[0].startswith("error: "), err
        assert [(p.exists(), listing(p)) for p in watched] == before
        return sentences[0].removeprefix("error: ")

    return check
