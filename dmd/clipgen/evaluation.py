"""Judging CLIP-GEN: blurred Fréchet distances, CLIP scores, and in the world of shapes agreement with the caption.

Each test set is asked for twice, by its captions' embeddings and by its images'. What the second has over the first is
what the modality gap costs. Held-out combinations are things that no training has shown.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd.clipgen import sampling
from dmd.clipgen.model import Model, embed_images, embed_texts
from dmd.clipgen.sampling import Sampler
from dmd.data.images import to_float, to_uint8
from dmd.data.shapes import Scene
from dmd.metrics import assess, caption
from dmd.metrics.backbones import Extractor
from dmd.metrics.frechet import Moments, frechet_distance, moments
from dmd.metrics.protocols import as_it_is
from dmd.metrics.sources import Arrays

PART, SEEN = 250, 64
"""Images that are blurred at a time, and that a network beside CLIP sees at a time."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked for, and what it should look like.

    Attributes:
        name: "seen", "held_out", "test", ...
        captions: N of them.
        images: (N, 3, H, W) uint8, one for each caption.
        scenes: what the captions say, where that can be read back from images; else None.
    """

    name: str
    captions: Sequence[str]
    images: Tensor
    scenes: Sequence[Scene] | None = None


def blurred(images: Tensor, radius: float) -> Tensor:
    """Images (B, C, H, W) after a Gaussian blur of standard deviation `radius` pixels; 0 leaves them as they are.

    The kernel is cut at three deviations, and the border mirrored (not twice), so that the mean of a flat image stays.
    FD-k compares images so blurred: the protocol of DALL-E (arXiv 2102.12092) and CogView (arXiv 2105.13290).
    """
    reach = min(int(3 * radius + 0.5), images.shape[-1] - 1, images.shape[-2] - 1)
    if reach == 0:
        return images
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (at / radius) ** 2)
    kernel = (kernel / kernel.sum()).to(images)
    flat = F.pad(images.flatten(0, 1)[:, None], (reach,) * 4, mode="reflect")
    flat = F.conv2d(F.conv2d(flat, kernel[None, None, None, :]), kernel[None, None, :, None])
    return flat[:, 0].unflatten(0, images.shape[:2])


Features = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W) in [-1, 1] to what distances are taken of: (N, D) on the CPU."""


def of_clip(model: Model) -> Features:
    """A model's own CLIP, which has taught it and therefore flatters it."""
    return lambda images: embed_images(model.clip, images, model.device)


def of_network(extractor: Extractor, device: torch.device) -> Features:
    """Another network by its own protocol, which prepares images of 256 levels.

    Raises:
        InputError: by the result, for images of a size that the network does not take, or features that are not finite.
    """

    def see(images: Tensor) -> Tensor:
        source = Arrays("the evaluation", to_uint8(images).permute(0, 2, 3, 1).numpy())
        looks = {"features": assess.features(source, extractor, as_it_is, device)}
        return assess.look(source, looks, SEEN, show=False)[0]["features"]

    return see


def blurred_moments(images: Tensor, features: Features, radii: Sequence[int]) -> dict[int, Moments]:
    """For each radius, mean and covariance of the features of images (N, 3, H, W) in [-1, 1] that are so blurred."""
    return {k: moments(torch.cat([features(blurred(x, k)) for x in images.split(PART)])) for k in radii}


def distances(images: Tensor, real: Mapping[int, Moments], features: Features) -> dict[str, float]:
    """ "fd_k" for each radius k of the `blurred_moments` of real images: Fréchet distance of images (N, 3, H, W) in
    [-1, 1] that are blurred alike."""
    found = blurred_moments(images, features, list(real))
    return {f"fd_{k}": frechet_distance(found[k], real[k]) for k in real}


def scores(images: Tensor, texts: Tensor, pictures: Tensor, model: Model) -> dict[str, float]:
    """CLIP scores (100 cos) of images against embeddings of their captions, and of the pictures behind them, (N, D)."""
    found = embed_images(model.clip, images, model.device)
    return {
        "clip_score": 100 * sampling.similarity(found, texts).mean().item(),
        "clip_score_image": 100 * sampling.similarity(found, pictures).mean().item(),
    }


def agreement(images: Tensor, asked: Asked) -> dict[str, float]:
    """Caption agreement and its attributes, where captions can be read back; else nothing."""
    if asked.scenes is None:
        return {}
    found = caption.agreement(images, asked.scenes)
    return {"caption_agreement" if name == "agreement" else f"caption_{name}": v for name, v in found.items()}


@dataclass(frozen=True)
class Judged:
    """Figures by test set and source, "seen/text" and so on, the first images of each for a picture, and how many
    numbers a feature of the distances has."""

    figures: dict[str, dict[str, float]]
    pictures: dict[str, Tensor]
    images_per_second: float
    dimensions: int


@torch.no_grad()
def judge(
    model: Model, tests: Sequence[Asked], sampler: Sampler, candidates: int, unit: int, radii: Sequence[int],
    features: Features, shown: int = 8, tick: Callable[[int], object] = lambda n: None,
) -> Judged:  # fmt: skip
    """All figures of a model on test sets of at least 2 images each; seeds are 0 to N - 1 for each source.

    Beside "text" and "image", "rebuilt" is the test images through the tokenizer and back, the most that tokens can
    say, and "real" the images themselves.
    """
    figures: dict[str, dict[str, float]] = {}
    pictures: dict[str, Tensor] = {}
    made, seconds, dimensions = 0, 0.0, 0
    for asked in tests:
        real = to_float(asked.images)
        texts = embed_texts(model.clip, asked.captions)
        images = embed_images(model.clip, real, model.device)
        rebuilt = torch.cat(
            [model.tokenizer.decode(model.tokenizer.encode(x.to(model.device))).cpu() for x in real.split(unit)]
        )
        found = {"real": real, "rebuilt": rebuilt.clamp(-1.0, 1.0)}
        seeds = torch.arange(len(real))
        sources = {
            "image": (model.gap.image(images.to(model.device)), images),
            "text": (model.text_conditions(texts.to(model.device)), texts),
        }
        for source, (conditions, targets) in sources.items():
            started = time.perf_counter()
            found[source] = model.images(conditions, targets, seeds, sampler, candidates, unit, tick)
            made, seconds = made + len(real), seconds + time.perf_counter() - started
        goal = blurred_moments(real, features, radii)
        dimensions = max((len(m.mean) for m in goal.values()), default=0)
        for source, x in found.items():
            key = f"{asked.name}/{source}"
            figures[key] = agreement(x, asked) | scores(x, texts, images, model)
            if source != "real":
                figures[key] |= distances(x, goal, features)
            pictures[key] = x[:shown]
    return Judged(figures, pictures, made / seconds, dimensions)


def headline(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the figures come to; each only where its parts are there.

    Returns:
        gap: CLIP score of images made from images minus that of images made from texts, on the first test set.
        text_of_image: caption agreement from text as a part of that from images.
        held_out_of_seen: caption agreement from text on held-out combinations as a part of that on seen ones.
    """
    first = next(iter(figures)).split("/")[0]
    text, image = figures[f"{first}/text"], figures[f"{first}/image"]
    found = {"gap": image["clip_score"] - text["clip_score"]}
    if "caption_agreement" in text:
        found["text_of_image"] = _ratio(text["caption_agreement"], image["caption_agreement"])
    held_out = figures.get("held_out/text", {})
    if "caption_agreement" in held_out:
        found["held_out_of_seen"] = _ratio(held_out["caption_agreement"], text["caption_agreement"])
    return {k: v for k, v in found.items() if math.isfinite(v)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
