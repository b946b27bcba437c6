"""Probes put together: features of training and test images to figures with intervals.

Whatever has a setting to choose (a learning rate, a regularisation) chooses it on validation images, which are given or
drawn from the training images by class, and is then fitted to all of them. The test images are looked at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmd.errors import InputError
from dmd.metrics.assess import Figure
from dmd.metrics.evaluate import spread
from dmd.represent import few_shot, geometry, linear, logistic, neighbours, scores, zero_shot
from dmd.represent.scaling import scale_of
from dmd.represent.sets import drawn

RANK_SAMPLES = 25_600
"""Images that RankMe looks at, as its authors do."""


@dataclass(frozen=True)
class Protocol:
    """How features are probed.

    Attributes:
        neighbours: numbers of neighbours; those beyond the training images are left out.
        temperature: of their votes.
        rates: base learning rates of the linear probe.
        epochs, batch: of the linear probe.
        regularisations: l2 of the logistic regression, from the strongest on.
        iterations: of L-BFGS for each.
        validation: part of each class's training images that settings are chosen on, where no set is given.
        ways, shots, queries, tasks: of few-shot tasks.
        templates: that class names are written into for zero-shot classification.
        mean_class: average accuracies over classes, not images.
        resamples: behind the intervals; 0 leaves them out.
        seed: of everything that is drawn.
    """

    neighbours: Sequence[int] = (20, 200)
    temperature: float = 0.07
    rates: Sequence[float] = linear.RATES
    epochs: int = 90
    batch: int = 256
    regularisations: Sequence[float] = logistic.REGULARISATIONS
    iterations: int = 1000
    validation: float = 0.2
    ways: int = 5
    shots: Sequence[int] = (1, 5)
    queries: int = 15
    tasks: int = 600
    templates: Sequence[str] = zero_shot.TEMPLATES
    mean_class: bool = False
    resamples: int = 100
    seed: int = 0


class Seen(NamedTuple):
    """Features float32 (N, D) and labels int64 (N,) of one part, on one device."""

    x: Tensor
    labels: Tensor

    def where(self, chosen: Tensor) -> "Seen":
        """Those of bool (N,) `chosen`."""
        return Seen(self.x[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Parts:
    """What probes see.

    Attributes:
        fit: to try settings on.
        val: to choose them by.
        whole: both, for the final fit.
        test: for the figures.
        classes: their number.
    """

    fit: Seen
    val: Seen
    whole: Seen
    test: Seen
    classes: int


@dataclass
class Found:
    """Figures by name, what else there is to say of each, and sentences for the reader."""

    figures: dict[str, Figure] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        self.figures |= other.figures
        self.details |= other.details
        self.notes += other.notes


def parts(train: Seen, val: Seen | None, test: Seen, classes: int, protocol: Protocol) -> Parts:
    """The parts of a probe.

    Raises:
        InputError: features are not finite, or the training images are of one class, or too few to draw from.
    """
    for name, seen in (("training", train), ("validation", val), ("test", test)):
        if seen is not None:
            _require_finite(seen.x, name)
    if len(train.labels.unique()) < 2:
        raise InputError("the training images are of one class: a probe tells classes apart, so give at least two")
    if val is not None:
        whole = Seen(torch.cat((train.x, val.x)), torch.cat((train.labels, val.labels)))
        return Parts(train, val, whole, test, classes)
    chosen = drawn(train.labels.cpu(), protocol.validation, protocol.seed).to(train.x.device)
    if not chosen.any():
        raise InputError("no class has two training images, so none can be kept to choose settings on: give --val")
    return Parts(train.where(~chosen), train.where(chosen), train, test, classes)


def _require_finite(x: Tensor, name: str) -> None:
    broken = ~x.isfinite().all(1)
    if broken.any():
        raise InputError(
            f"the features of {int(broken.sum())} of {len(x)} {name} images are not finite (the first is image "
            f"{int(broken.nonzero()[0])}): the network's weights are broken, or its numbers too large"
        )


# ----------------------------------------------------------------------------- one by one


def nearest(p: Parts, protocol: Protocol) -> Found:
    """The weighted vote of neighbours; nothing is chosen, so the bank is all there is beside the test images."""
    found = Found()
    count = len(p.whole.x)
    ks = [k for k in protocol.neighbours if k <= count]
    found.notes += [f"kNN-{k} is left out: there are {count} training images" for k in protocol.neighbours if k > count]
    if ks:
        rows = neighbours.predict(p.whole.x, p.whole.labels, p.test.x, p.classes, ks, protocol.temperature)
        for k, row in zip(ks, rows, strict=True):
            found.figures[f"kNN-{k}"] = _figure(row, p, protocol, f"kNN-{k}")
    return found


def linear_sweep(p: Parts, protocol: Protocol) -> Found:
    """The linear probe at the rate that is best on validation images; the papers' best on the test images beside it."""
    scale = scale_of(p.fit.x)
    settings = (p.classes, protocol.rates, protocol.epochs, protocol.batch, protocol.seed)
    tried = linear.train(scale(p.fit.x), p.fit.labels, *settings)
    by_val = [_score(row, p.val.labels, protocol) for row in tried.predict(scale(p.val.x))]
    scale = scale_of(p.whole.x)
    heads = linear.train(scale(p.whole.x), p.whole.labels, *settings)
    finite = (tried.finite() & heads.finite()).tolist()
    diverged = [rate for rate, good in zip(protocol.rates, finite, strict=True) if not good]
    found = Found()
    if diverged:
        found.notes.append(f"the linear probe has diverged at {len(diverged)} learning rates, which do not count")
    if not any(finite):
        return found
    rows = heads.predict(scale(p.test.x))
    by_test = [_score(row, p.test.labels, protocol) for row in rows]
    usable = [i for i, good in enumerate(finite) if good]
    best, lucky = max(usable, key=lambda i: by_val[i]), max(usable, key=lambda i: by_test[i])
    found.figures["linear"] = _figure(rows[best], p, protocol, "linear")
    found.details["linear"] = {
        "rate": protocol.rates[best], "rates": list(protocol.rates), "validation": by_val, "diverged": diverged,
        "best_on_test": {"rate": protocol.rates[lucky], "value": by_test[lucky]},
    }  # fmt: skip
    return found


def logistic_path(p: Parts, protocol: Protocol) -> Found:
    """Logistic regression with the l2 that is best on validation images, fitted again to all training images."""
    scale = scale_of(p.fit.x)
    x, val = scale(p.fit.x), scale(p.val.x)
    by_val = []
    for fit in logistic.path(x, p.fit.labels, p.classes, protocol.regularisations, protocol.iterations):
        by_val.append(_score(fit.predict(val), p.val.labels, protocol))
    best = max(range(len(by_val)), key=lambda i: by_val[i])  # the first of equals, which is the strongest
    l2 = protocol.regularisations[best]
    scale = scale_of(p.whole.x)
    (fit,) = logistic.path(scale(p.whole.x), p.whole.labels, p.classes, (l2,), protocol.iterations)
    found = Found()
    found.figures["logistic"] = _figure(fit.predict(scale(p.test.x)), p, protocol, "logistic")
    found.details["logistic"] = {
        "l2": l2, "regularisations": list(protocol.regularisations), "validation": by_val, "gradient": fit.gradient,
    }  # fmt: skip
    return found


def few_shots(p: Parts, protocol: Protocol) -> Found:
    """Tasks of test images, centred by the training images' mean."""
    found = Found()
    centre = p.whole.x.mean(0)
    for shots in protocol.shots:
        sizes = p.test.labels.bincount()
        ways = min(protocol.ways, int((sizes >= shots + protocol.queries).sum()))
        name = f"{ways}-way {shots}-shot"
        if ways < 2:
            each = shots + protocol.queries
            found.notes.append(f"{shots}-shot tasks are left out: fewer than 2 classes have {each} test images")
            continue
        tasks = few_shot.episodes(
            p.test.x, p.test.labels, centre, ways, shots, protocol.queries, protocol.tasks, protocol.seed
        )
        found.figures[name] = scores.mean_of_tasks(tasks)
        found.details[name] = {"tasks": protocol.tasks, "queries": protocol.queries}
    return found


def arrangement(p: Parts, protocol: Protocol) -> Found:
    """Effective rank, alignment and uniformity of the test images' features."""
    found = Found()
    x = p.test.x[spread(len(p.test.x), RANK_SAMPLES)]
    try:
        found.figures["RankMe"] = Figure(geometry.rank_me(x))
        found.figures["alignment"] = Figure(geometry.alignment(p.test.x, p.test.labels))
        found.figures["uniformity"] = Figure(geometry.uniformity(p.test.x))
    except ValueError as error:
        found.notes.append(f"the geometry is not whole: {error}")
    found.details["RankMe"] = {"at_most": min(x.shape)}
    return found


PROBES: dict[str, Callable[[Parts, Protocol], Found]] = {
    "knn": nearest, "linear": linear_sweep, "logistic": logistic_path, "few-shot": few_shots, "geometry": arrangement,
}  # fmt: skip
"""By their names on the command line; zero-shot classification, which needs texts, is beside them."""


def zero(
    p: Parts, protocol: Protocol, names: Sequence[str], embed_images: Callable[[Tensor], Tensor],
    embed_texts: zero_shot.EmbedTexts,
) -> Found:  # fmt: skip
    """Zero-shot classification: no training image is looked at.

    Args:
        names: of the classes.
        embed_images: features to the embeddings that texts are compared with.
        embed_texts: prompts to embeddings.
    """
    classes = zero_shot.class_embeddings(embed_texts, names, protocol.templates)
    images = embed_images(p.test.x)
    if images.shape[1] != classes.shape[1]:
        raise InputError(
            f"images have embeddings of {images.shape[1]} numbers and texts of {classes.shape[1]}: give the text half "
            "of the same network"
        )
    found = Found()
    found.figures["zero-shot"] = _figure(zero_shot.predict(images, classes), p, protocol, "zero-shot")
    found.details["zero-shot"] = {"templates": list(protocol.templates)}
    return found


def _score(predicted: Tensor, labels: Tensor, protocol: Protocol) -> float:
    return (scores.mean_class_accuracy if protocol.mean_class else scores.accuracy)(predicted, labels)


def _figure(predicted: Tensor, p: Parts, protocol: Protocol, title: str) -> Figure:
    return scores.figure(predicted, p.test.labels, protocol.mean_class, protocol.resamples, protocol.seed, title)
