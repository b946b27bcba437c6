"""Where a run's figures go: metrics.jsonl, TensorBoard, Weights & Biases if asked, and the progress bar."""

import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from dmd.errors import InputError


class Sink(Protocol):
    """Takes the scalars of a step."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line. On resume, lines after the resumed step are dropped, so that no step is there twice."""

    def __init__(self, path: Path, resume_step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_jsonl(path) if r["step"] <= resume_step]
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        temporary.replace(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files in `folder`."""

    def __init__(self, folder: Path, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def require_wandb() -> None:
    """Raises InputError if Weights & Biases is not installed."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise InputError("--report-to wandb needs the package wandb: pip install wandb") from None


class Wandb:
    """Weights & Biases, offline unless the user's environment says otherwise; needs `pip install wandb`.

    A run directory keeps its run's id, so that a resumed run goes on there and another one of the same name does not.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb

        known = folder / "wandb" / "id"
        if not known.exists():
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project="dmd", dir=str(folder), id=known.read_text(), name=folder.resolve().name, resume="allow",
            config=dict(config), mode=os.environ.get("WANDB_MODE", "offline"),
        )  # fmt: skip

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class Stopwatch:
    """Seconds that a run has taken over all its starts: a sink, since each line of figures keeps what has passed in
    `path`. What a kill cost since the last one is not known.

    Args:
        started: when this start began, by `time.monotonic`; left out, now.
    """

    def __init__(self, path: Path, started: float | None = None):
        self._path, self._started = path, time.monotonic() if started is None else started
        try:
            self._before = float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            self._before = 0.0

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def keep(self) -> None:
        temporary = self._path.with_name(f".tmp-{self._path.name}")
        temporary.write_text(json.dumps({"seconds": self.seconds}), encoding="utf-8")
        temporary.replace(self._path)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self.keep()

    def close(self) -> None:
        self.keep()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def progress(total: int, initial: int, title: str, show: bool, unit: str = "it") -> "tqdm[Any]":
    """A bar with rate and time left; silent when `show` is false (other ranks)."""
    return tqdm(
        total=total, initial=initial, desc=title, disable=not show, dynamic_ncols=True, mininterval=0.5, unit=unit
    )
