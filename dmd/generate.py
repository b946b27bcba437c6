"""From (condition, seed) to images: the one-step student and the many-step teacher behind one signature."""

from collections.abc import Callable

import torch
from torch import Tensor

from dmd import seeding
from dmd.codec import Codec
from dmd.denoiser import Cond, Denoiser
from dmd.seeding import Stream
from dmd.solvers import Solver, one_step

Generator = Callable[[Tensor, Cond], Tensor]
"""(unit noise (B, ...), cond) to samples x0 (B, ...)."""


def student_generator(student: Denoiser) -> Generator:
    """One evaluation at t = 1."""
    return lambda z, cond: one_step(student, z, cond)


def teacher_generator(teacher: Denoiser, solver: Solver, steps: int) -> Generator:
    """The probability-flow ODE from t = 1 in `steps` steps."""
    return lambda z, cond: solver(teacher, teacher.schedule.start(z), steps, cond)


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
) -> Tensor:
    """Samples for (seed, condition number) pairs, shaped as the generator makes them, (N, ...) float32 on the CPU.

    Work goes in chunks of one size, `batch_size` or all if those are fewer (the last is padded), because a network's
    rounding depends on the batch: among calls with one work unit, a sample's bits depend on its place in it at most.

    Args:
        seeds, numbers: (N,) int64 each.
        shape: of a sample's noise.
        tick: told the number of samples of each finished chunk.
    """
    chunks = []
    size = min(batch_size, max(len(seeds), 1))
    for start in range(0, len(seeds), size):
        index = torch.arange(start, start + size).clamp_max(len(seeds) - 1)
        z = seeding.normal(0, Stream.SAMPLE, 0, seeds[index], shape).to(device)
        cond = {k: v.to(device) for k, v in conditions(numbers[index]).items()}
        done = min(size, len(seeds) - start)
        chunks.append(generator(z, cond)[:done].float().cpu())
        tick(done)
    return torch.cat(chunks) if chunks else torch.zeros(0, *shape)
