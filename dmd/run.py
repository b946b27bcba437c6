"""The loop: drives any task object to its last step, and survives whatever happens on the way.

Distillation, teaching and representation training share it. A `Task` owns networks and optimisers and does one update;
`Run` owns the directory, the clock, the processes and the signals. Each turn: report, save, stop?, step.
"""

import contextlib
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd import checkpoint, log, sharding
from dmd.errors import InputError


class Task(Protocol):
    """What `Run` drives."""

    def modules(self) -> Mapping[str, nn.Module]:
        """Networks to checkpoint, by name."""

    def optimizers(self) -> Mapping[str, Optimizer]:
        """Optimisers to checkpoint and to warm up, by name. Each group has its full rate under "initial_lr"."""

    def step(self, step: int, batch: Any) -> Mapping[str, Tensor]:
        """One update; returns detached scalars without waiting for the device. Raises NotFinite before a bad update."""


class NotFinite(ArithmeticError):
    """A loss or gradient is NaN or infinite; no weight has been changed by it."""


class Stopped(Exception):
    """A run was told to stop before its end; all is saved."""


@dataclass(frozen=True)
class Cadence:
    """How long a run is, and how often it does what. All in steps; 0 means never (except for the last step).

    The learning rate rises linearly over the first `warmup` steps and falls linearly to 0 over the last `cooldown`.
    """

    steps: int
    log: int = 20
    checkpoint: int = 500
    evaluate: int = 0
    keep: int = 2
    warmup: int = 0
    cooldown: int = 0

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step counted from 0."""
        up = (step + 1) / self.warmup if self.warmup else 1.0
        down = (self.steps - step) / self.cooldown if self.cooldown else 1.0
        return min(1.0, up, down)


@dataclass
class Progress:
    """What a resumed run must know beside weights.

    Attributes:
        step: finished steps.
        seconds: spent on them, over all starts.
        best: metric, value and step of the best evaluation.
        evaluated: step of the last evaluation, so that resuming there does not repeat it.
        unreported: figures of the steps since the last line of metrics.jsonl, averaged over processes.
    """

    step: int = 0
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    evaluated: int = 0
    unreported: list[dict[str, float]] = field(default_factory=list)


class Run:
    """Trains `task` in `directory`, resuming from its newest valid checkpoint.

    Args:
        directory: checkpoints/, metrics.jsonl and tensorboard/ go here.
        task: what is trained.
        batch_at: step (counted from 0) to this process's batch; a pure function, so data needs no state.
        cadence: length and intervals.
        accelerator: processes and device.
        title: shown by the progress bar.
        evaluate: step to figures; called on every process, results of the main one are used.
        best: name of the figure whose smallest value marks the best step, or None.
        keep_best: called on the main process when that figure has improved.
        sinks: where figures go; built by the caller from the step at which the run resumes.
    """

    def __init__(
        self,
        directory: Path,
        task: Task,
        batch_at: Callable[[int], Any],
        cadence: Cadence,
        accelerator: Accelerator,
        *,
        title: str = "train",
        evaluate: Callable[[int], Mapping[str, float]] | None = None,
        best: str | None = None,
        keep_best: Callable[[int], None] | None = None,
        sinks: Callable[[int], Sequence[log.Sink]] = lambda step: (),
    ):
        self.directory = directory
        self.task = task
        self.batch_at = batch_at
        self.cadence = cadence
        self.accelerator = accelerator
        self.title = title
        self.evaluate = evaluate
        self.best = best
        self.keep_best = keep_best
        self.sinks = sinks
        self._stop = False

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def train(self) -> Progress:
        """Run to `cadence.steps`; returns where it stopped. `stopped_early` runs have `progress.step < cadence.steps`.

        Raises:
            NotFinite: a loss or gradient was NaN or infinite; names the step.
            OSError: a checkpoint could not be written; the older ones still load.
        """
        progress = self.resume()
        self._sinks = self.sinks(progress.step) if self.accelerator.is_main_process else ()
        self._pending: list[Mapping[str, Tensor]] = []
        self._saved = progress.step
        bar = log.progress(self.cadence.steps, progress.step, self.title, self.accelerator.is_main_process)
        started = time.monotonic() - progress.seconds
        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
            stack.enter_context(_signals(self._request_stop))
            stack.enter_context(bar)
            while True:
                progress.seconds = time.monotonic() - started
                self._report(progress, bar)
                stop = progress.step >= self.cadence.steps or self._stop_agreed()
                self._save(progress, last=stop)
                if stop:
                    break
                self._step(progress.step)
                progress.step += 1
                bar.update()
        return progress

    def resume(self) -> Progress:
        """Load the newest valid checkpoint into the task, if there is one.

        Raises:
            InputError: there are checkpoints, but all are damaged, or of another architecture.
        """
        path = checkpoint.latest(self.checkpoints)
        damaged = [p for p in checkpoint.steps(self.checkpoints) if path is None or p > path]
        self.accelerator.wait_for_everyone()
        names = ", ".join(p.name for p in damaged)
        if path is None:
            if damaged:
                raise InputError(
                    f"{self.checkpoints} holds no checkpoint that is whole: {names} differ from their manifests; put "
                    f"back a copy of one, or remove that folder to start over (as --fresh does)"
                )
            return Progress()
        if damaged and self.accelerator.is_main_process:
            print(f"note: {names} in {self.checkpoints} is damaged: going on from {path.name}", file=sys.stderr)
        step, extra = checkpoint.load(path, self.task.modules(), self.task.optimizers())
        return Progress(step, **extra)

    def _step(self, step: int) -> None:
        scale = self.cadence.rate(step)
        for optimizer in self.task.optimizers().values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
        try:
            self._pending.append(self.task.step(step, self.batch_at(step)))
        except NotFinite as error:
            raise NotFinite(f"step {step}: {error}; the update was not made") from None

    def _report(self, progress: Progress, bar: Any) -> None:
        """Write the mean of the figures since the last report, and evaluate if it is time."""
        last = progress.step >= self.cadence.steps
        if _due(progress.step, self.cadence.log) or last:
            self._collect(progress)
        if progress.unreported and (_due(progress.step, self.cadence.log) or last):
            rows, progress.unreported = progress.unreported, []
            figures = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
            self._write(progress.step, {**figures, "seconds": progress.seconds})
            bar.set_postfix({k: f"{v:.3g}" for k, v in figures.items() if k.startswith("loss/")}, refresh=False)
        evaluate = progress.step != progress.evaluated and (_due(progress.step, self.cadence.evaluate) or last)
        if self.evaluate and evaluate:
            figures = dict(self.evaluate(progress.step))
            progress.evaluated = progress.step
            self._write(progress.step, figures)
            best = progress.best.get("value", math.inf)
            if self.best and figures and figures[self.best] < best:  # never for NaN, which no later value would beat
                progress.best = {"metric": self.best, "value": figures[self.best], "step": progress.step}
                if self.keep_best and self.accelerator.is_main_process:
                    self.keep_best(progress.step)

    def _write(self, step: int, figures: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, figures)

    def _collect(self, progress: Progress) -> None:
        """Wait for the figures of the last steps and keep their average over processes, as a checkpoint can hold it.

        Each step is averaged by itself and in a fixed order, so that figures do not depend on when a run was stopped.
        """
        if self._pending:
            names = sorted(self._pending[0])
            values = torch.stack([torch.stack([p[n].float() for n in names]) for p in self._pending])
            means = self.accelerator.gather(values[None]).cpu().double().mean(0)
            progress.unreported += [dict(zip(names, row, strict=True)) for row in means.tolist()]
            self._pending = []

    def _save(self, progress: Progress, last: bool) -> None:
        """Write a checkpoint when it is time; the main process writes, all wait."""
        if progress.step == self._saved or not (last or _due(progress.step, self.cadence.checkpoint)):
            return
        self._collect(progress)
        extra = {k: v for k, v in asdict(progress).items() if k != "step"}
        failure, main = None, self.accelerator.is_main_process
        state = checkpoint.collect(self.task.modules(), self.task.optimizers(), keep=main)
        if main:
            try:
                checkpoint.write(self.checkpoints, progress.step, state, extra, self.cadence.keep)
            except OSError as error:
                failure = error
        if self._any(failure is not None):
            raise InputError(
                f"the checkpoint of step {progress.step} could not be written to {self.checkpoints} ({failure}): free "
                f"some space there and start the command again; it goes on from the previous checkpoint"
            ) from failure
        self._saved = progress.step

    def _request_stop(self) -> None:
        self._stop = True

    def _stop_agreed(self) -> bool:
        """Whether any process was told to stop: all must leave at the same step."""
        return self._any(self._stop)

    def _any(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return bool(total.item() > 0)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step > 0 and step % interval == 0


class _signals:
    """While active, SIGTERM and SIGINT ask for a clean stop; a second SIGINT interrupts as usual.

    A second SIGTERM changes nothing: schedulers send it to torchrun and to its processes, and torchrun passes it on.
    """

    def __init__(self, request_stop: Callable[[], None]):
        self._request_stop = request_stop

    def __enter__(self) -> None:
        self._old = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        for number in self._old:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self._request_stop()
        if number == signal.SIGINT:
            signal.signal(number, self._old[signal.SIGINT])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over processes, once per update, after accumulation; nothing to do in a single process, nor
    for sharded ones, which the backward pass has averaged.

    One flat all-reduce per 64 MiB: with two networks and several losses this is simpler to reason about than hooks that
    fire inside backward, and it makes 1 and N processes compute the same update.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not sharding.is_sharded(p.grad)]
    bucket: list[Tensor] = []
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        if i + 1 == len(gradients) or sum(g.numel() for g in bucket) >= 1 << 24:
            flat = torch.cat([g.flatten() for g in bucket])
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view_as(g))
            bucket = []


def clip_and_check(parameters: Sequence[nn.Parameter], max_norm: float, losses: Mapping[str, Tensor]) -> Tensor:
    """Average over processes, clip to a total norm and make sure that the update is finite. Waits for the device once.

    Returns:
        the gradient norm before clipping.

    Raises:
        NotFinite: a gradient or loss is NaN or infinite; names which.
    """
    average_gradients(parameters)
    norm = sharding.whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True))
    value = norm.item()
    if not math.isfinite(value):
        values = {k: v.item() for k, v in losses.items()}
        raise NotFinite(f"the gradient norm is {value} (losses: {values})")
    if value > max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm
