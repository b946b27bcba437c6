"""All figures of a source of images against a reference, each with its interval: what `dmd evaluate` computes.

Images are seen once. Whatever looks at them leaves numbers for each image, and the figures are statistics of those.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmd import checkpoint
from dmd.data import shapes
from dmd.data.images import to_float
from dmd.data.shapes import Scene
from dmd.errors import InputError
from dmd.log import progress
from dmd.metrics import bootstrap, caption, clip_score, sources
from dmd.metrics.backbones import Extractor
from dmd.metrics.bootstrap import Statistic, mean_of
from dmd.metrics.clip import PretrainedClip
from dmd.metrics.evaluate import MANIFOLD_SAMPLES, Reference, spread
from dmd.metrics.frechet import Moments, frechet_distance, moments, resampled_distance
from dmd.metrics.kernel import kernel_distance, resampled_kernel_distance
from dmd.metrics.manifold import diversity, members
from dmd.metrics.protocols import Step
from dmd.metrics.sources import THREADS, Pixels, Source

ENOUGH = 10_000
"""Figures of fewer samples are marked: their Fréchet distances are not comparable with published ones."""

Look = Callable[[Sequence[Pixels], int], Tensor]
"""Images, and the number of the first, to numbers for each: (B, ...) on the CPU."""


@dataclass(frozen=True)
class Figure:
    """A number, and the 95 % interval of it with other samples; None where that was not asked for."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass
class Census:
    """What images were like: how many of each (height, width), and how many were grey."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    grey: int = 0

    def add(self, images: Sequence[Pixels]) -> None:
        self.sizes.update(image.shape[:2] for image in images)
        self.grey += sum(image.shape[2] == 1 for image in images)


# ----------------------------------------------------------------------------- looking


@torch.no_grad()
def look(source: Source, looks: Mapping[str, Look], batch: int, show: bool) -> tuple[dict[str, Tensor], Census]:
    """What each look leaves of all images, (N, ...), and what the images were like.

    Raises:
        InputError: an image cannot be read, or a look refuses it.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in looks}
    census, first = Census(), 0
    with progress(len(source), 0, source.name, show, "img") as bar:
        for images in source.batches(batch):
            census.add(images)
            for name, each in looks.items():
                found[name].append(each(images, first))
            first += len(images)
            bar.update(len(images))
    if not first:
        raise InputError(f"{source.name} holds no image: at least 4 are needed")
    return {name: torch.cat(parts) for name, parts in found.items()}, census


def features(source: Source, extractor: Extractor, before: Step, device: torch.device) -> Look:
    """Features (B, D) of images, in float32. InputError names an image of which they cannot be had."""
    net = extractor.net.to(device)

    def see(images: Sequence[Pixels], first: int) -> Tensor:
        def prepare(item: tuple[int, Pixels]) -> np.ndarray:
            try:
                return extractor.prepare(before(item[1]))
            except InputError as error:
                raise InputError(f"{source.where(first + item[0])}: {error}") from None

        with ThreadPoolExecutor(THREADS) as pool:
            inputs = torch.from_numpy(np.stack(list(pool.map(prepare, enumerate(images)))))
        found = net(inputs.to(device)).float().cpu()
        broken = ~found.isfinite().all(1)
        if broken.any():
            where = source.where(first + int(broken.nonzero()[0]))
            raise InputError(
                f"the features of {where} by {extractor.network} are not finite: its weights are broken, or their "
                "numbers too large for the precision"
            )
        return found

    return see


def clip_cosines(source: Source, clip: PretrainedClip, prefix: str, before: Step) -> Look:
    """Cosines (B,) of images and their captions, see `clip_score.of_pixels`. InputError if the source has none."""
    captions = _captions(source, "a CLIP score")
    return lambda images, first: clip_score.of_pixels(
        clip, images, captions[first : first + len(images)], prefix, before
    )


def caption_hits(source: Source) -> Look:
    """Whether images show what their captions of the world of shapes say: bool (B, 7), see `caption.matches`.

    Raises:
        InputError: the source has no captions, or one is of another world; by the look, for images of another size.
    """
    scenes: list[Scene] = []
    for number, text in enumerate(_captions(source, "agreement with captions")):
        try:
            scenes.append(shapes.parse(text))
        except InputError as error:
            raise InputError(f"the caption of {source.where(number)} cannot be read: {error}") from None

    def see(images: Sequence[Pixels], first: int) -> Tensor:
        for number, image in enumerate(images):
            if image.shape != (shapes.SIZE, shapes.SIZE, 3):
                height, width, channels = image.shape
                raise InputError(
                    f"{source.where(first + number)} has {height}x{width} pixels and {channels} channels: captions of "
                    f"shapes are read from colour images of {shapes.SIZE}x{shapes.SIZE}"
                )
        pixels = to_float(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
        return torch.stack(list(caption.matches(pixels, scenes[first : first + len(images)]).values()), dim=1)

    return see


def _captions(source: Source, what: str) -> Sequence[str]:
    if source.captions is None:
        raise InputError(
            f"{source.name} has no captions, which {what} needs: give a folder with metadata.jsonl, tar shards with "
            ".txt members, or --prompts of a network"
        )
    return source.captions


# ----------------------------------------------------------------------------- the reference


def reference_of(
    source: Source,
    content: str,
    extractor: Extractor,
    before: Step,
    protocol: str,
    cache: Path,
    device: torch.device,
    batch: int,
    show: bool,
) -> Reference:
    """Statistics of a reference set, from `cache` if the same images were measured in the same way before.

    A cached file is named by the content of all images, the network's weights and the protocol, and counts only if it
    has the SHA-256 that was noted beside it.

    Args:
        source: the reference set.
        content: its digest.
        extractor, before, protocol: how it is measured.
        cache: folder of what is kept.

    Raises:
        InputError: an image is refused, or there are fewer than 4.
    """
    facts = {"images": content, "network": extractor.identity(), "protocol": protocol}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    file, note = cache / f"{name}.safetensors", cache / f"{name}.json"
    found = _cached(file, note, extractor.label)
    if found is None:
        seen, _ = look(source, {"features": features(source, extractor, before, device)}, batch, show)
        _check_count(source, len(seen["features"]))
        labels = torch.zeros(len(source), dtype=torch.int64) if source.labels is None else source.labels
        found = Reference.of_features(seen["features"], labels, extractor.label)
        tensors = {"mean": found.moments.mean, "cov": found.moments.cov}
        tensors |= {"features": found.features, "labels": found.labels}
        checkpoint.save_tensors(tensors, file, {"count": str(found.count)})
        checkpoint.write_json(note, facts | {"name": source.name, "sha256": checkpoint.describe(file)["sha256"]})
    return found


def _cached(file: Path, note: Path, label: str) -> Reference | None:
    try:
        if json.loads(note.read_text(encoding="utf-8"))["sha256"] != checkpoint.describe(file)["sha256"]:
            return None
        with safe_open(file, "pt") as opened:
            t = {key: opened.get_tensor(key) for key in ("mean", "cov", "features", "labels")}
            count = int(opened.metadata()["count"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    return Reference(Moments(t["mean"], t["cov"], count), t["features"], t["labels"], count, label)


def _check_count(source: Source, count: int) -> None:
    if count < 4:
        raise InputError(f"{source.name} holds {count} image{'s' * (count != 1)}: at least 4 are needed")


# ----------------------------------------------------------------------------- figures


def figures(
    source: Source,
    seen: Mapping[str, Tensor],
    label: str,
    reference: Reference | None,
    head: torch.nn.Module | None,
    seed: int,
    resamples: int,
) -> dict[str, Figure]:
    """All figures of what was seen of a source.

    Args:
        source: whose captions or labels say which images were asked for the same.
        seen: "features" (N, D), "clip" (N,) and "captions" (N, 7), as far as they were looked at.
        label: of the Fréchet distance.
        reference: for features.
        head: features to logits of classes that are those of the source.
        seed: of resamples and subsets.
        resamples: how many the intervals are of; 0 leaves them out.

    Returns:
        FID or FD-...: Fréchet distance of all features.
        KID or KD-...: kernel distance, from `MANIFOLD_SAMPLES` of the reference at most.
        precision, recall, density, coverage: k = 3, from `MANIFOLD_SAMPLES` of each side at most. Their intervals leave
            the balls as they are.
        diversity: mean cosine distance of features within a caption or class, or of all images.
        accuracy: part of the images that the network gives their label.
        CLIP: mean cosine of images and captions.
        caption_agreement and its parts: see `dmd.metrics.caption.matches`.

    Raises:
        InputError: there are fewer than 4 images.
    """
    count = len(next(iter(seen.values())))
    _check_count(source, count)

    def judged(
        value: float, statistic: Callable[[], Statistic], n: int, title: str, low: float, high: float = float("inf")
    ) -> Figure:
        if not resamples:
            return Figure(value)
        return Figure(value, *bootstrap.interval(value, statistic(), n, resamples, seed, title, (low, high)))

    def mean(values: Tensor, title: str, low: float = 0.0, high: float = 1.0) -> Figure:
        return judged(values.double().mean().item(), lambda: mean_of(values), len(values), title, low, high)

    found: dict[str, Figure] = {}
    if "features" in seen and reference is not None:
        x = seen["features"]
        kernel = label.replace("F", "K", 1)
        real, few = reference.features, x[spread(count, MANIFOLD_SAMPLES)]
        distance = frechet_distance(reference.moments, moments(x))
        found[label] = judged(distance, lambda: resampled_distance(reference.moments, x), count, label, 0.0)
        distance = kernel_distance(real, x, seed)
        found[kernel] = judged(distance, lambda: resampled_kernel_distance(real, few), len(few), kernel, -float("inf"))
        inside = members(real, few)
        found["precision"] = mean(inside.precise, "precision")
        found["recall"] = mean(inside.recalled, "recall")
        found["density"] = mean(inside.dense, "density", high=float("inf"))
        found["coverage"] = mean(inside.covered, "coverage")
        known = sources.groups(source)
        asked = torch.zeros(count, dtype=torch.int64) if known is None else known
        if len(asked.unique()) < count:
            found["diversity"] = judged(diversity(x, asked), lambda: _diversity(x, asked), count, "diversity", 0.0, 2.0)
        if head is not None and source.labels is not None:
            with torch.no_grad():
                right = head(x.to(next(head.parameters()).device)).cpu().argmax(1) == source.labels
            found["accuracy"] = mean(right, "accuracy")
    if "clip" in seen:
        found["CLIP"] = mean(seen["clip"], "CLIP", -1.0)
    if "captions" in seen:
        for column, name in enumerate(("agreement", *caption.ATTRIBUTES)):
            found[f"caption_{name}"] = mean(seen["captions"][:, column], name)
    return found


def _diversity(x: Tensor, asked: Tensor) -> Statistic:
    """Diversity of a weighted set, NaN where a resample has no pair of samples in any group."""

    def statistic(weights: Tensor) -> float:
        try:
            return diversity(x, asked, weights)
        except ValueError:
            return float("nan")

    return statistic


# ----------------------------------------------------------------------------- what to know about them


def too_few(name: str, count: int, dimensions: int, label: str) -> list[str]:
    """A sentence where a distance called `label` is of no more images than features have dimensions."""
    if count > dimensions:
        return []
    return [
        f"{name} has {count:,} images, not more than the features of {label} have dimensions, {dimensions:,}: their "
        f"covariance cannot be known in all directions, so {label} is far too large, even for images from the "
        "reference itself"
    ]


def notes(
    source: Source,
    census: Census,
    extractor: Extractor | None,
    dimensions: int,
    reference: Reference | None,
    resizes: bool,
) -> list[str]:
    """Sentences on what limits the figures of a source, to be printed beside them."""
    count = sum(census.sizes.values())
    found = []
    if count < ENOUGH:
        found.append(
            f"{source.name} has {count:,} samples, fewer than {ENOUGH:,}: its figures are marked with *, and are not "
            "comparable with figures of other counts"
        )
    if extractor is not None and reference is not None:
        for name, number in ((source.name, count), ("the reference", reference.count)):
            found += too_few(name, number, dimensions, extractor.label)
    if len(census.sizes) > 1:
        smallest, largest = min(census.sizes), max(census.sizes)
        found.append(
            f"{source.name} has images of {len(census.sizes)} sizes, from {smallest[0]}x{smallest[1]} to "
            f"{largest[0]}x{largest[1]} pixels: each was resized by itself"
        )
    if census.grey and resizes:
        found.append(
            f"{census.grey:,} of {count:,} images of {source.name} are grey: the grey was taken for all colours"
        )
    return found
