"""One update of a learner: `dmd.run.Task`s. What contrasts views or tells classes apart is one learner with one or two
terms; SynCLR, with its teacher, is another."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd.chance import pinned
from dmd.ema import follow
from dmd.represent import losses
from dmd.represent.backbones import Backbone
from dmd.represent.batches import Crops, Views
from dmd.represent.caching import cached
from dmd.represent.heads import by_view
from dmd.represent.schedules import cosine, ramp, warm_cosine
from dmd.represent.sinkhorn import assignments
from dmd.represent.text import TextNet
from dmd.seeding import Stream

Update = Callable[[Sequence[nn.Parameter], float, Mapping[str, Tensor]], Tensor]
"""(parameters, largest norm of the gradient, losses) to the norm: average over processes, clip, refuse what is not
finite, as `dmd.run.clip_and_check`."""


def optimizer(modules: Sequence[nn.Module], lr: float, beta2: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (0.9, beta2) whose groups know their full rate, as `dmd.run` expects, and whether they decay: biases,
    normalisations and all else of one dimension do not."""
    parameters = [p for m in modules for p in m.parameters()]
    groups = [
        {
            "params": [p for p in parameters if p.ndim >= 2],
            "initial_lr": lr,
            "weight_decay": weight_decay,
            "decays": True,
        },
        {"params": [p for p in parameters if p.ndim < 2], "initial_lr": lr, "weight_decay": 0.0, "decays": False},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


@dataclass(frozen=True)
class Pace:
    """How the optimiser's numbers change: the rate rises linearly and falls as half a cosine, weight decay goes from
    its first value to its last as a cosine."""

    steps: int
    warmup: int
    weight_decay: tuple[float, float]

    def set(self, optimizer: Optimizer, step: int) -> None:
        """Give an optimiser of `optimizer` its numbers of a step counted from 0."""
        decay = cosine(step, self.steps, *self.weight_decay)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * warm_cosine(step, self.steps, self.warmup)
            if group["decays"]:
                group["weight_decay"] = decay


@dataclass(frozen=True)
class Practice:
    """What both learners share beside their networks.

    Attributes:
        pace: of the optimiser.
        update: see `Update`.
        max_norm: of gradients.
        chunk: images that pass the backbone at a time; 0 is all.
        seed, rank: key stochastic depth.
        autocast: dtype of the networks' arithmetic; losses are float32.
    """

    pace: Pace
    update: Update
    max_norm: float
    chunk: int = 0
    seed: int = 0
    rank: int = 0
    autocast: torch.dtype | None = None

    @contextlib.contextmanager
    def forward(self, step: int, part: int, device: torch.device) -> Iterator[None]:
        """What the forward pass of a part of a step runs under, the same every time."""
        with (
            pinned(self.seed, Stream.DROP_PATH, step, self.rank << 20 | part, device),
            torch.autocast(device.type, self.autocast, enabled=self.autocast is not None),
        ):
            yield

    def parts(self, count: int) -> list[slice]:
        """Chunks of so many images."""
        size = self.chunk or count
        return [slice(i, min(i + size, count)) for i in range(0, count, size)] or [slice(0, 0)]


# ----------------------------------------------------------------------------- views and classes


class Term(Protocol):
    """A loss on the backbone's features, with what it trains beside it: an `nn.Module`."""

    def __call__(self, features: Tensor, batch: Views) -> dict[str, Tensor]:
        """Features (V * C, D) to figures; the first is the loss, the others are detached."""

    def after(self) -> None:
        """What is done after each update."""


class Attraction(nn.Module):
    """Multi-positive contrast of projected features: StableRep where labels are captions, SimCLR where images.

    Args:
        head: features (b, D) to (b, d).
        temperature: tau.
    """

    def __init__(self, head: nn.Module, temperature: float):
        super().__init__()
        self.head, self.temperature = head, temperature

    def forward(self, features: Tensor, batch: Views) -> dict[str, Tensor]:
        found = losses.multi_positive(by_view(self.head, features, batch.views), batch.labels, self.temperature)
        return {"loss/contrast": found.loss, "excess": found.excess, "dropped": found.dropped}

    def after(self) -> None:
        pass


class Reading(nn.Module):
    """Contrast of images and their captions: CLIP, and the second term of StableRep+.

    Args:
        net: text tower and projections.
    """

    def __init__(self, net: TextNet):
        super().__init__()
        self.net = net

    def forward(self, features: Tensor, batch: Views) -> dict[str, Tensor]:
        assert batch.tokens is not None and batch.texts is not None  # batches of methods with text have them
        images, texts = self.net.image_projection(features), self.net(batch.tokens)
        scale = self.net.logit_scale.exp()
        of_images = batch.texts.repeat(batch.views)
        found = losses.image_text(images, texts, of_images, batch.texts, scale)
        return {
            "loss/text": found.loss, "text/excess": found.excess, "text/dropped": found.dropped,
            "text/scale": scale.detach(),
        }  # fmt: skip

    def after(self) -> None:
        self.net.clamp_scale()


class Classifying(nn.Module):
    """Supervised cross-entropy.

    Args:
        features: D.
        classes: how many there are.
        smoothing: of labels.
    """

    def __init__(self, features: int, classes: int, smoothing: float):
        super().__init__()
        self.linear, self.smoothing = nn.Linear(features, classes), smoothing

    def forward(self, features: Tensor, batch: Views) -> dict[str, Tensor]:
        logits = self.linear(features)
        right = (logits.detach().argmax(1) == batch.labels).float().mean()
        return {"loss/classes": losses.classification(logits, batch.labels, self.smoothing), "right": right}

    def after(self) -> None:
        pass


class Learner:
    """A `dmd.run.Task`: loss = sum of weighted terms on the features of views.

    Args:
        backbone: what is kept.
        terms: by name, each an `nn.Module`.
        weights: of the terms.
        optimizer: of all of them, see `optimizer`.
        practice: see there.
    """

    def __init__(
        self, backbone: Backbone, terms: Mapping[str, Any], weights: Mapping[str, float], optimizer: Optimizer,
        practice: Practice,
    ):  # fmt: skip
        self.backbone = backbone.train()
        self.terms: Any = nn.ModuleDict(dict(terms)).train()
        self.weights = weights
        self.optimizer = optimizer
        self.practice = practice

    def modules(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "terms": self.terms}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"learner": self.optimizer}

    def step(self, step: int, batch: Views) -> dict[str, Tensor]:
        """One update. Raises `NotFinite` (by `update`) before a bad one."""
        self.practice.pace.set(self.optimizer, step)
        figures = self.gradient(step, batch)
        figures["grad/net"] = self.practice.update(self._parameters(), self.practice.max_norm, figures)
        self.optimizer.step()
        for term in self.terms.values():
            term.after()
        figures["rate"] = torch.tensor(self.optimizer.param_groups[0]["lr"], device=batch.images.device)
        return figures

    def gradient(self, step: int, batch: Views) -> dict[str, Tensor]:
        """This process's part of the gradient, into the parameters, and the figures."""
        self.optimizer.zero_grad()
        p, device = self.practice, batch.images.device
        parts = p.parts(len(batch.images))

        def compute(i: int) -> Sequence[Tensor]:
            with p.forward(step, i, device):
                return [self.backbone(batch.images[parts[i]])]

        (features,), finish = cached(compute, len(parts), self.backbone)
        figures: dict[str, Tensor] = {}
        loss = torch.zeros((), device=device)
        for name, term in self.terms.items():
            with torch.autocast(device.type, p.autocast, enabled=p.autocast is not None):
                found = term(features, batch)
            loss = loss + self.weights[name] * next(iter(found.values()))
            figures |= {k: v.detach() for k, v in found.items()}
        loss.backward()
        finish()
        return figures

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.backbone.parameters(), *self.terms.parameters()]


# ----------------------------------------------------------------------------- SynCLR


@dataclass(frozen=True)
class Slow:
    """The teacher of SynCLR, and its targets.

    Attributes:
        momentum: at the first step; 1 at the last, as a cosine.
        temperature: of the contrast.
        hide_own: see `losses.momentum_contrast`; for small crops.
        ibot_weight: of masked patches; 0 leaves them out.
        sharpness: (first, last, steps) of the teacher's temperature over prototypes.
        iterations: of Sinkhorn-Knopp.
    """

    momentum: float
    temperature: float
    hide_own: bool
    ibot_weight: float
    sharpness: tuple[float, float, int]
    iterations: int


STUDENT_TEMPERATURE = 0.1
"""Of the student's logits over prototypes, as in iBOT."""


class Student(nn.Module):
    """Backbone, projection, prototypes and the token in place of masked patches: what a teacher has too.

    Args:
        ibot: tokens (M, D) to logits (M, K).
    """

    def __init__(self, backbone: Backbone, projection: nn.Module, ibot: nn.Module):
        super().__init__()
        self.backbone, self.projection, self.ibot = backbone, projection, ibot
        self.mask_token = nn.Parameter(torch.zeros(backbone.features))


class Synclr:
    """A `dmd.run.Task`: SynCLR (arXiv 2312.17742, equation 4),

        L = L(whole crops) + mean over small crops L(small crop) + L_iBOT(whole crops).

    The student sees whole crops with patches masked and small ones; the teacher, its moving average, sees whole crops
    as they are and gives the keys.

    Args:
        student: what learns.
        predictor: projected features to what is compared with keys; the teacher has none.
        optimizer: of both.
        slow: see there.
        practice: see there.
    """

    def __init__(
        self, student: Student, predictor: nn.Module, optimizer: Optimizer, slow: Slow, practice: Practice
    ):  # fmt: skip
        self.student, self.predictor = student.train(), predictor.train()
        self.teacher = copy.deepcopy(student).float().eval().requires_grad_(False)
        self.optimizer = optimizer
        self.slow = slow
        self.practice = practice

    def modules(self) -> dict[str, nn.Module]:
        return {"student": self.student, "predictor": self.predictor, "teacher": self.teacher}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"learner": self.optimizer}

    def step(self, step: int, batch: Crops) -> dict[str, Tensor]:
        """One update. Raises `NotFinite` (by `update`) before a bad one."""
        pace = self.practice.pace
        pace.set(self.optimizer, step)
        figures = self.gradient(step, batch)
        parameters = [*self.student.parameters(), *self.predictor.parameters()]
        figures["grad/net"] = self.practice.update(parameters, self.practice.max_norm, figures)
        self.optimizer.step()
        follow(self.teacher, self.student, cosine(step, pace.steps, self.slow.momentum, 1.0))
        figures["rate"] = torch.tensor(self.optimizer.param_groups[0]["lr"], device=batch.images.device)
        return figures

    def gradient(self, step: int, batch: Crops) -> dict[str, Tensor]:
        """This process's part of the gradient, into the parameters, and the figures."""
        self.optimizer.zero_grad()
        keys, target = self._targets(step, batch)
        (whole, patches), finish = self._whole(step, batch)
        found = losses.momentum_contrast(
            self._queries(whole), keys, batch.labels, batch.labels, self.slow.temperature
        )  # fmt: skip
        figures = {"loss/contrast": found.loss, "excess": found.excess, "dropped": found.dropped}
        finishes = [finish]
        if len(batch.local):
            (local,), finish = self._local(step, batch)
            repeats = len(batch.local) // len(batch.images)
            small = losses.momentum_contrast(
                self._queries(local), keys, batch.labels.repeat(repeats), batch.labels, self.slow.temperature,
                self.slow.hide_own,
            )  # fmt: skip
            figures |= {"loss/local": small.loss, "local/excess": small.excess, "local/dropped": small.dropped}
            finishes.append(finish)
        if self.slow.ibot_weight:
            with self._autocast(batch.images.device):
                logits = self.student.ibot(patches)
            figures["loss/ibot"] = losses.masked_patches(logits, target, batch.mask, STUDENT_TEMPERATURE)
        weights = {"loss/ibot": self.slow.ibot_weight}
        total = sum(weights.get(k, 1.0) * v for k, v in figures.items() if k.startswith("loss/"))
        assert isinstance(total, Tensor)
        total.backward()
        for finish in finishes:
            finish()
        return {k: v.detach() for k, v in figures.items()}

    @torch.no_grad()
    def _targets(self, step: int, batch: Crops) -> tuple[Tensor, Tensor]:
        """The teacher's keys (B, d), and its assignments (M, K) of the masked patches."""
        keys, logits = [], []
        for part in self.practice.parts(len(batch.images)):
            with self._autocast(batch.images.device):
                features, tokens = self.teacher.backbone.both(batch.images[part])
                keys.append(self.teacher.projection(features))
                if self.slow.ibot_weight:
                    logits.append(self.teacher.ibot(tokens[batch.mask[part]]))
        first, last, over = self.slow.sharpness
        if not logits:
            return torch.cat(keys), keys[0][:0]
        sharp = ramp(step, over, first, last)
        return torch.cat(keys), assignments(torch.cat(logits), sharp, self.slow.iterations)

    def _whole(self, step: int, batch: Crops) -> tuple[list[Tensor], Callable[[], None]]:
        """Features (B, D) of whole crops, and tokens (M, D) of their masked patches."""
        p, student = self.practice, self.student
        parts = p.parts(len(batch.images))

        def compute(i: int) -> Sequence[Tensor]:
            mask = batch.mask[parts[i]]
            with p.forward(step, i, batch.images.device):
                if not self.slow.ibot_weight:
                    features = student.backbone(batch.images[parts[i]])
                    return [features, features[:0]]
                features, tokens = student.backbone.both(batch.images[parts[i]], mask, student.mask_token)
                return [features, tokens[mask]]

        return cached(compute, len(parts), student)

    def _local(self, step: int, batch: Crops) -> tuple[list[Tensor], Callable[[], None]]:
        """Features (L * B, D) of small crops."""
        p = self.practice
        parts = p.parts(len(batch.local))

        def compute(i: int) -> Sequence[Tensor]:
            with p.forward(step, 1 << 19 | i, batch.local.device):
                return [self.student.backbone(batch.local[parts[i]])]

        return cached(compute, len(parts), self.student)

    def _queries(self, features: Tensor) -> Tensor:
        with self._autocast(features.device):
            return self.predictor(self.student.projection(features))

    def _autocast(self, device: torch.device) -> Any:
        return torch.autocast(device.type, self.practice.autocast, enabled=self.practice.autocast is not None)
