"""Judging a student while it trains and at the end: figures against the data, and pictures beside the teacher's."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmd.data.images import to_uint8
from dmd.data.shapes import Scene
from dmd.denoiser import Cond, Denoiser
from dmd.generate import Generator, decoded, images, work_unit
from dmd.log import progress
from dmd.metrics import caption
from dmd.metrics.evaluate import Reference, evaluate
from dmd.metrics.networks import FeatureNet
from dmd.pipeline import Pipeline, conditions
from dmd.solvers import one_step

IN_LOOP_SEED = 1 << 32
"""Evaluations in the loop choose the best student, so the final comparison uses other noise: seeds from 0."""


Measure = Callable[[Tensor, Tensor], dict[str, float]]
"""Images (N, C, H, W) in [-1, 1] and the numbers (N,) of their prompts to figures."""


@dataclass(frozen=True)
class Judge:
    """Makes images and measures them.

    Attributes:
        pipeline: whose prompts and codec are used; its denoiser is not.
        prompts: what images are asked for.
        measures: their results are joined.
        name: of the network behind "fd".
        reference_images: how many real images it is measured against.
        best: the figure whose smallest value marks the student to keep; None keeps the latest.
        repeats: images of every prompt, in a sample of few images; many take all prompts in turn.
        show: draw a progress bar.
    """

    pipeline: Pipeline
    prompts: Sequence[str]
    measures: Sequence[Measure]
    name: str
    reference_images: int
    device: torch.device
    best: str | None = None
    repeats: int = 1
    show: bool = True

    def samples(self, generator: Generator, count: int, first_seed: int, title: str) -> tuple[Tensor, float]:
        """(count, C, H, W) images of consecutive seeds, and images per second, end to end."""
        seeds = torch.arange(first_seed, first_seed + count)
        with progress(count, 0, title, self.show, "img") as bar:
            started = time.perf_counter()
            x = images(
                decoded(generator, self.pipeline.codec),
                seeds,
                conditions(self.pipeline, self.prompts),
                self.numbers(count),
                self.pipeline.shape,
                self.device,
                work_unit(self.pipeline.shape, self.pipeline.codec),
                bar.update,
            )
            return x, count / (time.perf_counter() - started)

    def numbers(self, count: int) -> Tensor:
        """Which prompt each of `count` images is asked for."""
        return torch.arange(count) % min(len(self.prompts), max(1, count // self.repeats))

    def figures(self, x: Tensor) -> dict[str, float]:
        """What all measures say, without a prefix."""
        numbers = self.numbers(len(x))
        return {k: v for measure in self.measures for k, v in measure(x, numbers).items()}

    def in_loop(self, generator: Generator, count: int) -> dict[str, float]:
        """Figures of `count` samples, as "eval/..."."""
        x, _ = self.samples(generator, count, IN_LOOP_SEED, "evaluate")
        return {f"eval/{k}": v for k, v in self.figures(x).items()}


def class_measure(net: FeatureNet, reference: Reference) -> Measure:
    """Everything of `dmd.metrics.evaluate.evaluate`; a prompt's number is its class."""
    return lambda x, numbers: evaluate(x, numbers, net, reference)


def prompt_measure(net: FeatureNet, reference: Reference) -> Measure:
    """The same for prompts of any kind: diversity is that within a prompt, and there is no accuracy."""
    return lambda x, numbers: evaluate(x, None, net, reference, groups=numbers)


def caption_measure(scenes: Sequence[Scene]) -> Measure:
    """The part of images that show all that their captions say, of one and of two things, and by attribute."""

    def measure(x: Tensor, numbers: Tensor) -> dict[str, float]:
        asked = [scenes[i] for i in numbers.tolist()]
        hits = caption.matches(x, asked)
        two = torch.tensor([len(s.things) == 2 for s in asked])
        figures = {f"caption_{name}": h.double().mean().item() for name, h in hits.items()}
        for name, rows in (("one_thing", ~two), ("two_things", two)):
            if rows.any():
                figures[f"caption_{name}"] = hits["agreement"][rows].double().mean().item()
        return figures

    return measure


@dataclass(frozen=True, eq=False)
class Watched:
    """A few fixed noises by which a run is looked at, whatever it is trained on. N rows each.

    Attributes:
        z, noise: start of the student's samples, and what they are diffused with.
        z_ref, y_ref: pairs: noise, and what the guided teacher's sampler makes of it.
        cond: of both.
    """

    z: Tensor
    noise: Tensor
    z_ref: Tensor
    y_ref: Tensor
    cond: Cond


@torch.no_grad()
def inspect(student: Denoiser, real: Denoiser, fake: Denoiser, watched: Watched, t: float) -> tuple[Tensor, ...]:
    """What the method sees: x, x0_real and x0_fake of the diffused x, student(z_ref), y_ref; (N, ...) each.

    The losses alone do not show convergence; these do: x0_real and x0_fake come to look alike, student(z_ref) like
    y_ref in kind.
    """
    x = one_step(student, watched.z, watched.cond)
    times = torch.full((len(x),), t, device=x.device)
    x_t = student.schedule.diffuse(x, watched.noise, times)
    x_ref = one_step(student, watched.z_ref, watched.cond)
    return x, real(x_t, times, watched.cond), fake(x_t, times, watched.cond), x_ref, watched.y_ref


def drift(x_ref: Tensor, y_ref: Tensor) -> dict[str, float]:
    """Brightness (mean) and contrast (standard deviation) of the student's images (N, C, H, W) minus those of the
    teacher's from the same noise, in [-1, 1]."""
    return {
        "health/brightness_drift": (x_ref.mean() - y_ref.mean()).item(),
        "health/contrast_drift": (x_ref.std() - y_ref.std()).item(),
    }


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
