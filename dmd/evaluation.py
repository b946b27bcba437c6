"""Judging a student while it trains and at the end: figures against the data, and pictures beside the teacher's."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmd.data.images import to_uint8
from dmd.denoiser import Cond, Denoiser
from dmd.generate import Generator, images
from dmd.log import progress
from dmd.metrics.evaluate import Reference, evaluate
from dmd.metrics.networks import FeatureNet

IN_LOOP_SEED = 1 << 32
"""Evaluations in the loop choose the best student, so the final comparison uses other noise: seeds from 0."""


@dataclass(frozen=True)
class Judge:
    """Makes samples and measures them.

    Attributes:
        net, reference: feature network and the real images' features.
        conditions: condition numbers to `Cond`.
        classes: number of conditions; sample i is asked for class i mod classes.
        shape: of a sample.
        device, batch_size: where and in what work unit samples are made.
        show: draw a progress bar.
    """

    net: FeatureNet
    reference: Reference
    conditions: Callable[[Tensor], Cond]
    classes: int
    shape: tuple[int, ...]
    device: torch.device
    batch_size: int = 250
    show: bool = True

    def samples(self, generator: Generator, count: int, first_seed: int, title: str) -> tuple[Tensor, float]:
        """(count, *shape) samples of consecutive seeds, and images per second."""
        seeds = torch.arange(first_seed, first_seed + count)
        with progress(count, 0, title, self.show, "img") as bar:
            started = time.perf_counter()
            x = images(
                generator,
                seeds,
                self.conditions,
                self.labels(count),
                self.shape,
                self.device,
                self.batch_size,
                bar.update,
            )
            return x, count / (time.perf_counter() - started)

    def labels(self, count: int) -> Tensor:
        return torch.arange(count) % self.classes

    def figures(self, x: Tensor) -> dict[str, float]:
        """Everything of `dmd.metrics.evaluate.evaluate`, without the prefix."""
        return evaluate(x, self.labels(len(x)), self.net, self.reference)

    def in_loop(self, generator: Generator, count: int) -> dict[str, float]:
        """Figures of `count` samples, as "eval/..."."""
        x, _ = self.samples(generator, count, IN_LOOP_SEED, "evaluate")
        return {f"eval/{k}": v for k, v in self.figures(x).items()}


def inspect(
    student: Denoiser, real: Denoiser, fake: Denoiser, z: Tensor, y_ref: Tensor, cond: Cond, t: float, noise: Tensor
) -> list[Tensor]:
    """What the method sees, for a picture: student's x from paired noise, x0_real, x0_fake, and the teacher's y_ref.

    Shapes (B, ...) each. The losses alone do not show convergence; these rows do: x0_real and x0_fake should look
    alike, x like y_ref in kind.
    """
    from dmd.solvers import one_step

    with torch.no_grad():
        x = one_step(student, z, cond)
        times = torch.full((len(z),), t, device=z.device)
        x_t = student.schedule.diffuse(x, noise, times)
        return [x, real(x_t, times, cond), fake(x_t, times, cond), y_ref]


def save_grid(rows: Sequence[Tensor], path: Path, scale: int, titles: Sequence[str] = ()) -> None:
    """Write rows of images (B, C, H, W) in [-1, 1] as one PNG, each pixel `scale` wide, atomically.

    `titles` are stored as PNG text, so that a viewer or the report can tell the rows apart.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    grid = torch.cat([_pad(torch.cat(list(_pad(to_uint8(r.float().cpu()))), dim=-1)[None])[0] for r in rows], dim=-2)
    array = grid.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(array).resize((array.shape[1] * scale, array.shape[0] * scale), Image.Resampling.NEAREST)
    info = PngInfo()
    info.add_text("rows", " | ".join(titles))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    image.save(temporary, format="PNG", pnginfo=info)
    temporary.replace(path)


def _pad(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 1, 0, 1), value=128)


def compare(
    judge: Judge, student: Generator, teacher: Generator, count: int, evaluations: int
) -> tuple[dict[str, dict[str, float]], Tensor, Tensor]:
    """Final figures of student and teacher on the same noise and classes, and the samples of both.

    Args:
        evaluations: network evaluations that one sample of the teacher costs.
    """
    x_student, student_rate = judge.samples(student, count, 0, "student samples")
    x_teacher, teacher_rate = judge.samples(teacher, count, 0, "teacher samples")
    figures = {
        "teacher": judge.figures(x_teacher) | {"nfe": evaluations, "images_per_second": teacher_rate},
        "student": judge.figures(x_student) | {"nfe": 1, "images_per_second": student_rate},
    }
    return figures, x_student, x_teacher
