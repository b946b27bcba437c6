"""One iteration of Distribution Matching Distillation (Yin et al., CVPR 2024, arXiv 2311.18828, Algorithm 1).

Three denoisers of one type: the student, the frozen real score (guided) and the fake score that is trained online on
the student's own samples. Knows tensors, two optimisers and a distance between images; no files, text or processes.

All networks run in `eval` mode: dropout is off everywhere, as in the paper, and the networks here have no other state
that training mode would change.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd.denoiser import Cond, Guided, NetworkDenoiser
from dmd.ema import Ema
from dmd.losses import denoising_loss, matching_gradient, normaliser, surrogate
from dmd.solvers import one_step

Distance = Callable[[Tensor, Tensor], Tensor]
"""(x0 (B, ...), target (B, ...)) to per-sample distances (B,), differentiable in the first."""

Update = Callable[[Sequence[nn.Parameter], float, Mapping[str, Tensor]], Tensor]
"""(parameters, max_norm, losses) to the gradient norm; clips, and raises before a bad update (`run.clip_and_check`)."""


@dataclass(frozen=True)
class Batch:
    """Everything random of one micro-batch, so that an iteration is a function of weights and batch.

    The student maps B unpaired noises and R paired ones. The first M rows of those B + R are matched and train the fake
    score: M = B (class-conditional, as in the paper), B + R (text to image) or 0 (the regression-only ablation).

    Shapes: z (B, ...), z_ref and y_ref (R, ...), cond rows B + R; noise, critic_noise (M, ...), t, critic_t (M,).
    t_guidance (M,) are times of the real score's guidance, where it has others than the rest of the gradient. `window`
    is the part of samples and targets, an index of (R, ...), that regression compares: all of them if left out.
    `target` (R, ...) is what the distance takes in place of y_ref, where that is something else: decoded images.
    """

    z: Tensor
    z_ref: Tensor
    y_ref: Tensor
    cond: Cond
    t: Tensor
    noise: Tensor
    critic_t: Tensor
    critic_noise: Tensor
    t_guidance: Tensor | None = None
    window: tuple[Any, ...] = (...,)
    target: Tensor | None = None


@dataclass(frozen=True)
class CriticBatch:
    """Fresh samples for one more update of the fake score: z and noise (B, ...), t (B,), cond with B rows."""

    z: Tensor
    cond: Cond
    t: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Iteration:
    """Micro-batches of the generator update and the critic update on its samples; those of further critic updates."""

    batches: Sequence[Batch]
    critic: Sequence[Sequence[CriticBatch]] = ()


@dataclass(frozen=True)
class Samples:
    """What the fake score is trained on: detached samples x, their condition, times and noise to diffuse with."""

    x: Tensor
    cond: Cond
    t: Tensor
    noise: Tensor


class Distiller:
    """Generator update, then critic updates. `step` is one iteration.

    Args:
        student, fake: trained; both start as the teacher.
        real: the frozen teacher, with its guidance.
        student_optimizer, fake_optimizer: over the parameters of student and fake.
        ema: follows the student.
        distance: regression metric between the student's image and the teacher's.
        lambda_reg: weight of the regression loss.
        max_norm: gradients are clipped to this norm.
        update: clips and checks gradients.
        critic_warmup: steps at the start that train the fake score alone, where the student is not the teacher's copy.
    """

    def __init__(
        self,
        student: NetworkDenoiser,
        real: Guided,
        fake: NetworkDenoiser,
        student_optimizer: Optimizer,
        fake_optimizer: Optimizer,
        ema: Ema,
        distance: Distance,
        lambda_reg: float,
        max_norm: float,
        update: Update,
        critic_warmup: int = 0,
    ):
        if not student.schedule == real.schedule == fake.schedule:
            raise ValueError(f"schedules differ: {student.schedule}, {real.schedule}, {fake.schedule}")
        self.student = student.eval()
        self.real = real.eval().requires_grad_(False)
        self.fake = fake.eval()
        self.student_optimizer = student_optimizer
        self.fake_optimizer = fake_optimizer
        self.ema = ema
        self.distance = distance
        self._student_weights = list(student.net.parameters())  # found once: a walk over the modules is slow
        self._fake_weights = list(fake.net.parameters())
        self.lambda_reg = lambda_reg
        self.max_norm = max_norm
        self.update = update
        self.critic_warmup = critic_warmup

    def modules(self) -> dict[str, nn.Module]:
        return {"student": self.student.net, "fake": self.fake.net, "ema": self.ema.shadow}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"student": self.student_optimizer, "fake": self.fake_optimizer}

    def step(self, step: int, iteration: Iteration) -> dict[str, Tensor]:
        """One generator update and 1 + len(iteration.critic) critic updates. Returns detached scalars.

        The first critic update uses the generator's own samples, so it costs no further pass of the student. Both
        gradients are there before either network changes: a bad one stops the run with all weights as they were. A bad
        gradient of a further critic update stops it before that update; the student has moved by then. The first
        `critic_warmup` steps leave out the generator update.

        Raises:
            NotFinite: (by `update`) a gradient or loss is NaN or infinite.
        """
        if step < self.critic_warmup:
            figures = self._fake_update([self._sample(_matched(b)) for b in iteration.batches if len(b.t)])
        else:
            figures = self._generator_update(step, iteration.batches)
        for batches in iteration.critic:
            self._fake_update([self._sample(b) for b in batches])
        return figures

    def _generator_update(self, step: int, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The student's update, and the fake score's on its samples."""
        samples, figures = self._student_gradients(batches)
        if samples:
            figures |= self._fake_gradients(samples)
        figures["grad/student"] = self.update(self._student_weights, self.max_norm, figures)
        if samples:
            figures["grad/fake"] = self.update(self._fake_weights, self.max_norm, figures)
            self.fake_optimizer.step()
        self.student_optimizer.step()
        self.ema.update(self.student.net, step)
        return figures

    def _fake_update(self, samples: Sequence[Samples]) -> dict[str, Tensor]:
        """An update of the fake score alone."""
        figures = self._fake_gradients(samples)
        figures["grad/fake"] = self.update(self._fake_weights, self.max_norm, figures)
        self.fake_optimizer.step()
        return figures

    def _student_gradients(self, batches: Sequence[Batch]) -> tuple[list[Samples], dict[str, Tensor]]:
        """Backward of matching and regression; returns the matched samples, detached, for the fake score.

        Micro-batches may have different numbers of matched and of paired rows, also none: each counts by its rows.
        """
        self.student_optimizer.zero_grad()
        matched, paired = sum(len(b.t) for b in batches), sum(len(b.z_ref) for b in batches)
        samples: list[Samples] = []
        figures: dict[str, Tensor] = {}

        def add(part: float, scalars: Mapping[str, Tensor]) -> None:
            figures.update({k: figures.get(k, 0.0) + part * v for k, v in scalars.items()})

        for batch in batches:
            x_all = one_step(self.student, torch.cat((batch.z, batch.z_ref)), batch.cond)
            x, x_ref = x_all[: len(batch.t)], x_all[len(batch.z) :]
            loss = x_all.new_zeros(())
            if len(x):
                cond = {k: v[: len(x)] for k, v in batch.cond.items()}
                gradient, health = self._match(x.detach(), batch, cond)
                matching, part = surrogate(x, gradient), len(x) / matched
                loss = loss + part * matching
                add(part, health | {"loss/matching": matching.detach()})
                samples.append(Samples(x.detach(), cond, batch.critic_t, batch.critic_noise))
            if len(x_ref):
                regression, part = self._regression(x_ref, batch), len(x_ref) / paired
                loss = loss + part * self.lambda_reg * regression
                add(part, {"loss/regression": regression.detach()})
            loss.backward()
        return samples, figures

    def _regression(self, x_ref: Tensor, batch: Batch) -> Tensor:
        target = batch.y_ref[batch.window] if batch.target is None else batch.target
        return self.distance(x_ref[batch.window], target).mean()

    @torch.no_grad()
    def _match(self, x: Tensor, batch: Batch, cond: Cond) -> tuple[Tensor, dict[str, Tensor]]:
        """The distribution-matching gradient at the diffused samples, and its health.

        Guidance's part of it is the gradient that the real score has against itself without guidance. It is logged
        apart from the rest, and may be taken at other times (Decoupled DMD, arXiv 2511.22677).
        """
        x_t = self.student.schedule.diffuse(x, batch.noise, batch.t)
        x0_cond, guidance = self.real.parts(x_t, batch.t, cond)
        x0_fake = self.fake(x_t, batch.t, cond)
        x0_real = x0_cond if guidance is None else x0_cond + guidance
        gradient = matching_gradient(x, x0_real, x0_fake)
        health = {
            "health/normaliser": normaliser(x, x0_real).mean(),
            "health/fake_real_gap": (x0_fake - x0_real).abs().mean(),
        }
        if guidance is None:
            return gradient, health
        guide = matching_gradient(x, x0_real, x0_cond)
        match = gradient - guide
        if batch.t_guidance is not None:
            x_t = self.student.schedule.diffuse(x, batch.noise, batch.t_guidance)
            x0_cond, guidance = self.real.parts(x_t, batch.t_guidance, cond)
            assert guidance is not None
            guide = matching_gradient(x, x0_cond + guidance, x0_cond)
            gradient = match + guide
        health |= {"health/matching_part": match.abs().mean(), "health/guidance_part": guide.abs().mean()}
        return gradient, health

    def _fake_gradients(self, samples: Sequence[Samples]) -> dict[str, Tensor]:
        """Backward of the fake score's denoising loss on the student's samples."""
        self.fake_optimizer.zero_grad()
        total = samples[0].x.new_zeros(())
        rows = sum(len(s.x) for s in samples)
        for s in samples:
            x_t = self.fake.schedule.diffuse(s.x, s.noise, s.t)
            _, out = self.fake.coefficients(s.t, x_t)
            loss = denoising_loss(self.fake(x_t, s.t, s.cond), s.x, out) * (len(s.x) / rows)
            loss.backward()
            total = total + loss.detach()
        return {"loss/fake": total}

    @torch.no_grad()
    def _sample(self, batch: CriticBatch) -> Samples:
        return Samples(one_step(self.student, batch.z, batch.cond), batch.cond, batch.t, batch.noise)


def _matched(batch: Batch) -> CriticBatch:
    """What of a generator's batch trains the fake score."""
    rows = len(batch.t)
    cond = {k: v[:rows] for k, v in batch.cond.items()}
    return CriticBatch(torch.cat((batch.z, batch.z_ref))[:rows], cond, batch.critic_t, batch.critic_noise)
