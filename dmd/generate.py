"""From (condition, seed) to images: the one-step student and the many-step teacher behind one signature."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dmd import seeding
from dmd.codec import Codec
from dmd.denoiser import Cond, Denoiser, Guided
from dmd.noise import Karras
from dmd.pipeline import Pipeline
from dmd.seeding import Stream
from dmd.solvers import Solver, ddim, heun, one_step

UNIT_PIXELS = 2**21
"""Pixels of the images that a network makes at a time: 8 images of 512 x 512, which are 16 rows with guidance and keep
a GPU busy."""
UNIT = 250
"""How many images it makes at a time where they are small."""

Generator = Callable[[Tensor, Cond], Tensor]
"""(unit noise (B, ...), cond) to samples x0 (B, ...)."""


def student_generator(student: Denoiser) -> Generator:
    """One evaluation at t = 1."""
    return lambda z, cond: one_step(student, z, cond)


def teacher_generator(teacher: Denoiser, solver: Solver, steps: int) -> Generator:
    """The probability-flow ODE from t = 1 in `steps` steps."""
    return lambda z, cond: solver(teacher, teacher.schedule.start(z), steps, cond)


def guided_steps(pipeline: Pipeline, scale: float, steps: int, negative: str | None = None) -> Generator:
    """Many guided steps of a pipeline's own denoiser: Heun's for pixels, DDIM's for latents. Guidance leads away from
    the empty prompt, or from a negative one."""
    null = pipeline.null() if negative is None else pipeline.encode([negative])
    solver = heun if isinstance(pipeline.denoiser.schedule, Karras) else ddim
    return teacher_generator(Guided(pipeline.denoiser, scale, null), solver, steps)


def work_unit(shape: Sequence[int], codec: Codec) -> int:
    """How many samples of a shape (c, h, w) are made at a time where nobody says it. Rounding depends on it (`images`),
    so it is a function of the network, and not of the machine or of how many samples there are."""
    return max(1, min(UNIT, UNIT_PIXELS // (shape[-2] * shape[-1] * codec.factor**2)))


def decoded(generator: Generator, codec: Codec) -> Generator:
    """The generator's samples as images."""
    return lambda z, cond: codec.decode(generator(z, cond))


@torch.no_grad()
def images(
    generator: Generator,
    seeds: Tensor,
    conditions: Callable[[Tensor], Cond],
    numbers: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    batch_size: int = 256,
    tick: Callable[[int], object] = lambda n: None,
    finish: Callable[[Tensor], Tensor] = Tensor.float,
) -> Tensor:
    """Samples for (seed, condition number) pairs, shaped as the generator makes them, (N, ...) on the CPU.

    Work goes in chunks of one size, `batch_size` or all if those are fewer (the last is padded), because a network's
    rounding depends on the batch: among calls with one work unit, a sample's bits depend on its place in it at most.

    Args:
        seeds, numbers: (N,) int64 each.
        shape: of a sample's noise.
        tick: told the number of samples of each finished chunk.
        finish: what is done to samples before they leave the device, where bytes are a quarter of the floats to move.
    """
    chunks = []
    size = min(batch_size, max(len(seeds), 1))
    for start in range(0, len(seeds), size):
        index = torch.arange(start, start + size).clamp_max(len(seeds) - 1)
        z = seeding.normal(0, Stream.SAMPLE, 0, seeds[index].to(device), shape)
        cond = {k: v.to(device) for k, v in conditions(numbers[index]).items()}
        done = min(size, len(seeds) - start)
        chunks.append(finish(generator(z, cond)[:done]).cpu())
        tick(done)
    return torch.cat(chunks) if chunks else torch.zeros(0, *shape)


Source = Callable[[Sequence[str], Tensor, int], Tensor]
"""(captions, numbers of the images (B,) int64 by `image_number`, epoch) to images (B, C, H, W) in [-1, 1], float32 on
some device; a function of these, up to rounding that may depend on what else is in the batch."""

REPLICAS = 1 << 16
CAPTIONS = 1 << 40
"""How many images a caption can have in an epoch, and how many captions there can be."""


def image_number(caption: Tensor, replica: Tensor) -> Tensor:
    """The number of an image among all that can be: int64 (B,), below 2^56."""
    return caption * REPLICAS + replica


def caption_source(pipeline: Pipeline, generator: Generator, codec: Codec, seed: int, device: torch.device) -> Source:
    """Images of captions. Their noise is drawn on the device, from the seed, the epoch and the image's number."""

    @torch.no_grad()
    def source(captions: Sequence[str], numbers: Tensor, epoch: int) -> Tensor:
        z = seeding.normal(seed, Stream.SYNTHESIS, epoch, numbers.to(device), pipeline.shape)
        cond = {k: v.to(device, non_blocking=True) for k, v in pipeline.encode(captions).items()}
        return codec.decode(generator(z, cond))

    return source
