"""A distillation small enough to be stopped at every step, and a bare loop to compare it with.

Run as a script (by torchrun, for several processes) it does the jobs of a JSON file, one after the other.
"""

import copy
import json
import os
import signal
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dmd import log, pairs
from dmd.batches import DistillBatches, Share
from dmd.denoiser import Guided
from dmd.distill import Distiller
from dmd.ema import Ema
from dmd.losses import squared_distance
from dmd.run import Cadence, Progress, Run, clip_and_check
from dmd.teachers import pixel

CONFIG = pixel.PixelConfig(("a", "b", "c"), 1, 4, 8, (1,), 1, (False,))
SPEC = pairs.PairSpec("none", "tanh", 1, 1.0, 5, 3, "abc", CONFIG.shape, 12, 6)


@dataclass(frozen=True)
class Job:
    """What to run, and how it is hurt on the way.

    Attributes:
        eps: Adam's. The usual one makes steps of signs, which rounding can turn; a large one is near to plain descent.
        stop_at: the step during which SIGTERM comes to process `stop_rank`.
        crash_at: the step during which the process ends.
        micro_batch: the micro-batch of that step in whose loss it happens, counted from 0; None: before the step.
    """

    directory: str
    steps: int = 7
    accumulation: int = 1
    critic_steps: int = 1
    critic_warmup: int = 0
    bf16: bool = False
    checkpoint: int = 0
    evaluate: int = 3
    log: int = 4
    keep: int = 1
    eps: float = 1e-8
    stop_at: int | None = None
    stop_rank: int = 0
    crash_at: int | None = None
    micro_batch: int | None = None

    @property
    def cadence(self) -> Cadence:
        return Cadence(self.steps, self.log, self.checkpoint, self.evaluate, self.keep, warmup=3, cooldown=3)


class Crash(BaseException):
    """The end of a process that could not save anything."""


def pair_store(folder: Path) -> pairs.Pairs:
    if pairs.missing(folder, SPEC):
        list(pairs.make(folder, SPEC, [0, 1], lambda z, condition: z.tanh()))
    return pairs.Pairs(folder, SPEC)


def build(job: Job, share: Share) -> tuple[Distiller, DistillBatches]:
    """Fresh networks, whose last layers are not zero, as after some training."""
    teacher = pixel.build(CONFIG, seed=1, autocast=torch.bfloat16 if job.bf16 else None)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    teacher.to(memory_format=torch.channels_last)
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    distiller = Distiller(
        student, Guided(teacher, 1.0, CONFIG.null()), fake, adam(student, job.eps), adam(fake, job.eps),
        Ema(student.net, 0.9), squared_distance, 0.25, 1.0, clip_and_check, job.critic_warmup,
    )  # fmt: skip
    batches = DistillBatches(
        3, CONFIG.shape, 3, pixel.labels, 12, pair_store(Path(job.directory).parent / "pairs"), 12,
        replace(share, accumulation=job.accumulation), critic_steps=job.critic_steps,
    )  # fmt: skip
    return distiller, batches


def adam(denoiser: torch.nn.Module, eps: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-2, eps=eps, fused=True)
    optimizer.param_groups[0]["initial_lr"] = 1e-2
    return optimizer


def probe(distiller: Distiller) -> float:
    """An evaluation: one number of the averaged student."""
    return sum(float(p.double().sum()) for p in distiller.ema.shadow.parameters())


def run(job: Job, accelerator: Accelerator | None = None, batch: Any = lambda step, batch: batch) -> dict[str, Any]:
    """Start or resume a job; what it ends with. `batch` may change the batch of a step."""
    accelerator = accelerator or Accelerator(cpu=True)
    share = Share(accelerator.process_index, accelerator.num_processes)
    distiller, batches = build(job, share)
    directory = Path(job.directory)
    now, losses = -1, 0

    def hurt() -> None:
        if now == job.stop_at and share.rank == job.stop_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        if now == job.crash_at:
            raise Crash

    def batch_at(step: int) -> Any:
        nonlocal now, losses
        now, losses = step, 0
        if job.micro_batch is None:
            hurt()
        return batch(step, batches(step))

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Asked once in each micro-batch."""
        nonlocal losses
        if losses == job.micro_batch:
            begun = any(p.grad is not None for p in distiller.student.parameters())
            assert begun == (losses > 0), "not within the accumulation"
            hurt()
        losses += 1
        return squared_distance(x, y)

    distiller.distance = distance

    progress = Run(
        directory, distiller, batch_at, job.cadence, accelerator, best="eval/probe",
        evaluate=lambda step: {"eval/probe": probe(distiller)},
        sinks=lambda step: [log.JsonLines(directory / "metrics.jsonl", step)],
    ).train()  # fmt: skip
    return snapshot(distiller, progress, lines(directory))


def bare(job: Job) -> dict[str, Any]:
    """The same without `Run`: no checkpoints, signals or files; what every interrupted job must end with."""
    distiller, batches = build(job, Share())
    progress = Progress()
    records: list[dict[str, Any]] = []
    window: list[dict[str, float]] = []
    for step in range(job.steps):
        rate = 1e-2 * min(1.0, (step + 1) / 3, (job.steps - step) / 3)
        for optimizer in distiller.optimizers().values():
            optimizer.param_groups[0]["lr"] = rate
        figures = distiller.step(step, batches(step))
        window.append({k: v.float().item() for k, v in figures.items()})
        progress.step = step + 1
        last = progress.step == job.steps
        if progress.step % job.log == 0 or last:
            means = {k: statistics.fmean(row[k] for row in window) for k in sorted(window[0])}
            records.append({"step": progress.step, **means})
            window = []
        if (job.evaluate and progress.step % job.evaluate == 0) or last:
            value = probe(distiller)
            records.append({"step": progress.step, "eval/probe": value})
            progress.evaluated = progress.step
            if not progress.best or value < progress.best["value"]:
                progress.best = {"metric": "eval/probe", "value": value, "step": progress.step}
    return snapshot(distiller, progress, records)


def snapshot(distiller: Distiller, progress: Progress, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Copies of everything that training changes."""
    optimizers = {k: o.state_dict() for k, o in distiller.optimizers().items()}
    return {
        "modules": {k: copy.deepcopy(m.state_dict()) for k, m in distiller.modules().items()},
        "moments": {k: copy.deepcopy(s["state"]) for k, s in optimizers.items()},
        # through JSON, since a tuple and a list of betas are the same
        "groups": json.loads(json.dumps({k: s["param_groups"] for k, s in optimizers.items()})),
        "progress": {k: v for k, v in asdict(progress).items() if k != "seconds"},
        "records": records,
    }


def lines(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in log.read_jsonl(directory / "metrics.jsonl")]


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Deep equality: types, keys, shapes and every bit of every number."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    else:
        assert found == expected, where


def train_forever(job: Job) -> None:
    """Target of a process that will be killed."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the bar would fill the test's output)
    run(job)


def main(jobs: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    for i, fields in enumerate(json.loads(jobs.read_text())):
        result = run(Job(**fields), accelerator)
        torch.save(result, jobs.with_name(f"{jobs.stem}-{i}-{accelerator.process_index}.pt"))
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
