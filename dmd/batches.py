"""What each training step sees, as a pure function of (seed, step, process): nothing to save, nothing to replay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmd import seeding
from dmd.denoiser import Cond
from dmd.distill import Batch, CriticBatch, Iteration
from dmd.errors import InputError
from dmd.noise import expand
from dmd.pairs import Pairs
from dmd.seeding import Stream, Streams

Conditions = Callable[[Tensor], Cond]
"""Condition numbers (B,) int64 to what the networks take (labels, encoded prompts, ...)."""


@dataclass(frozen=True)
class Share:
    """This process's part of every global batch: rank of world, in `accumulation` micro-batches, on `device`."""

    rank: int = 0
    world: int = 1
    accumulation: int = 1
    device: torch.device = torch.device("cpu")

    def split(self, total: int, what: str) -> list[Tensor]:
        """Global indices within a batch of `total`, one tensor a micro-batch. InputError if it does not divide."""
        parts = self.world * self.accumulation
        if total % parts:
            raise InputError(
                f"{what} {total} is not divisible by {self.world} processes x {self.accumulation} accumulation steps: "
                f"give a multiple of {parts}"
            )
        size = total // parts
        first = self.rank * self.accumulation
        return [torch.arange((first + i) * size, (first + i + 1) * size) for i in range(self.accumulation)]


@dataclass(frozen=True)
class DistillBatches:
    """Draws the iterations of `dmd.distill`.

    Attributes:
        seed: key of all draws.
        shape: of one sample.
        count: how many conditions there are, all equally likely.
        conditions: turns their numbers into `Cond`.
        batch_size: B, unpaired noises per iteration over all processes; 0 leaves out distribution matching.
        pairs: the store; None leaves out regression.
        pair_batch_size: R, pairs per iteration over all processes.
        match_pairs: also match the paired samples, as the paper does for text to image.
        t_range: times of the matching loss; the fake score always sees (0, 1).
        critic_steps: critic updates per generator update.
        guidance_t_range: times of the real score's guidance; None takes it at those of the matching loss.
        pair_accumulation: micro-batches of the pairs, apart from those of the noises, as regression on decoded images
            needs several times their memory; None puts a part of both into each.
        crop: regression compares a square of this height and width, at a random place in each step; None all.
        targets: numbers of pairs to what regression compares with, where that is not the pairs' samples.
    """

    seed: int
    shape: tuple[int, ...]
    count: int
    conditions: Conditions
    batch_size: int
    pairs: Pairs | None
    pair_batch_size: int
    share: Share
    match_pairs: bool = False
    t_range: tuple[float, float] = (0.02, 0.98)
    critic_steps: int = 1
    guidance_t_range: tuple[float, float] | None = None
    pair_accumulation: int | None = None
    crop: int | None = None
    targets: Callable[[Tensor], Tensor] | None = None

    def __call__(self, step: int) -> Iteration:
        own = self.share.split(self.batch_size, "batch size")
        apart = replace(self.share, accumulation=self.pair_accumulation or self.share.accumulation)
        paired = apart.split(self.pair_batch_size if self.pairs else 0, "pair batch size")
        if self.pair_accumulation is None:
            work = list(zip(own, paired, strict=True))
        else:
            work = [(i, i[:0]) for i in own if len(i)] + [(r[:0], r) for r in paired if len(r)]
        batches = [self._batch(step, i, r) for i, r in work]
        extra = range(1, self.critic_steps) if self.batch_size else ()
        return Iteration(batches, [[self._critic(step, k, i) for i in own] for k in extra])

    def _batch(self, step: int, index: Tensor, pair_index: Tensor) -> Batch:
        matched = index
        if self.match_pairs and self.batch_size:
            matched = torch.cat((index, self.batch_size + pair_index))
        noises = (Stream.START, Stream.MATCH_NOISE, Stream.CRITIC_NOISE)
        z, noise, critic_noise = self._normal(noises, step, matched)
        label, t, critic_t, guidance_t, choice = self._single(step, matched, pair_index)
        t_guidance = None
        if self.guidance_t_range is not None:
            low, high = self.guidance_t_range
            t_guidance = low + (high - low) * seeding.as_uniform(guidance_t)
        z, number = z[: len(index)], seeding.as_integers(label[: len(index)], self.count)
        z_ref, y_ref, target = z[:0], z[:0], None
        if self.pairs is not None and len(pair_index):
            chosen = seeding.as_integers(choice, len(self.pairs))
            y_ref, number_ref = self.pairs[chosen]
            z_ref = self.pairs.noise(self._to(chosen))
            number = torch.cat((number, number_ref))
            target = None if self.targets is None else self._to(self.targets(chosen))
        low, high = self.t_range
        return Batch(
            z=z,
            z_ref=z_ref,
            y_ref=self._to(y_ref),
            cond=self._cond(number),
            t=self._to(low + (high - low) * seeding.as_uniform(t)),
            noise=noise,
            critic_t=self._to(seeding.as_uniform(critic_t)),
            critic_noise=critic_noise,
            t_guidance=None if t_guidance is None else self._to(t_guidance),
            window=self._window(step),
            target=target,
        )

    def _single(self, step: int, matched: Tensor, pair_index: Tensor) -> tuple[Tensor, ...]:
        """One word of each stream that needs no more, the first four of the matched rows and the last of the pairs, in
        one call: starting it is what it costs."""
        streams = (Stream.LABEL, Stream.MATCH_TIME, Stream.CRITIC_TIME, Stream.GUIDANCE_TIME, Stream.PAIR_CHOICE)
        words = seeding.bits(self.seed, streams, step, torch.cat((matched, pair_index)), 1)[..., 0]
        return *words[:-1, : len(matched)], words[-1, len(matched) :]

    def _window(self, step: int) -> tuple[Any, ...]:
        """Where the crop is, the same for all micro-batches and processes, so that their number changes nothing."""
        if self.crop is None:
            return (...,)
        free = torch.tensor(self.shape[-2:]) - self.crop + 1
        words = seeding.bits(self.seed, Stream.CROP, step, torch.zeros(1, dtype=torch.int64), 2)[0]
        return (..., *(slice(first, first + self.crop) for first in ((words * free) >> 32).tolist()))

    def _critic(self, step: int, k: int, index: Tensor) -> CriticBatch:
        """Draws of the k-th further critic update; its indices lie beyond those of the generator's batch."""
        index = index + 2 * k * (self.batch_size + self.pair_batch_size)
        z, noise = self._normal((Stream.START, Stream.CRITIC_NOISE), step, index)
        return CriticBatch(
            z=z,
            cond=self._cond(seeding.integers(self.seed, Stream.LABEL, step, index, self.count)),
            t=self._to(seeding.uniform(self.seed, Stream.CRITIC_TIME, step, index)),
            noise=noise,
        )

    def _normal(self, stream: Streams, step: int, index: Tensor) -> Tensor:
        """Drawn on the device: millions of numbers a step would keep a GPU waiting for the CPU."""
        return seeding.normal(self.seed, stream, step, self._to(index), self.shape)

    def _cond(self, number: Tensor) -> Cond:
        return {k: v.to(self.share.device, non_blocking=True) for k, v in self.conditions(number).items()}

    def _to(self, x: Tensor) -> Tensor:
        return x.to(self.share.device, non_blocking=True)


@dataclass(frozen=True)
class TeachBatch:
    """x0, noise (B, ...), t (B,), cond with B rows."""

    x0: Tensor
    cond: Cond
    t: Tensor
    noise: Tensor


@dataclass(frozen=True)
class TeachBatches:
    """Draws the batches of `dmd.teach`.

    Attributes:
        data: numbers (B,) to (x0 (B, C, H, W), conditions of B rows).
        size: how many images there are.
        times: U(0, 1) numbers to t (the distribution of noise levels).
        null: the empty condition, tensors of one row, which takes the place of a dropped one.
        dropout: probability of dropping the condition, for guidance.
        flip: mirror half of the images.
    """

    seed: int
    data: Callable[[Tensor], tuple[Tensor, Cond]]
    size: int
    times: Callable[[Tensor], Tensor]
    null: Cond
    batch_size: int
    share: Share
    dropout: float = 0.1
    flip: bool = False

    def __call__(self, step: int) -> Sequence[TeachBatch]:
        return [self._batch(step, index) for index in self.share.split(self.batch_size, "batch size")]

    def _batch(self, step: int, index: Tensor) -> TeachBatch:
        words = seeding.bits(self.seed, Stream.DATA, step, index, 2)
        x0, cond = self.data((words[:, 0] * self.size) >> 32)
        if self.flip:
            x0 = torch.where((words[:, 1] & 1).bool()[:, None, None, None], x0.flip(-1), x0)
        dropped = seeding.uniform(self.seed, Stream.CONDITION_DROPOUT, step, index) < self.dropout
        cond = {k: torch.where(expand(dropped, v), self.null[k], v) for k, v in cond.items()}
        device = self.share.device
        return TeachBatch(
            x0.to(device, non_blocking=True),
            {k: v.to(device, non_blocking=True) for k, v in cond.items()},
            self.times(seeding.uniform(self.seed, Stream.TEACH_TIME, step, index)).to(device, non_blocking=True),
            seeding.normal(self.seed, Stream.TEACH_NOISE, step, index.to(device, non_blocking=True), x0.shape[1:]),
        )
