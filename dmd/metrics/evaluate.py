"""All figures of a set of images against a reference set, on the features of one network."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from dmd.data.images import ImageSet, to_float, to_uint8
from dmd.metrics.frechet import Moments, frechet_distance, moments
from dmd.metrics.manifold import diversity, precision_recall
from dmd.metrics.networks import FeatureNet

MANIFOLD_SAMPLES = 5000


@torch.no_grad()
def features_of(images: Tensor | Iterable[Tensor], net: FeatureNet, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Features (N, D) and logits (N, K) of float images in [-1, 1]; float32, on the CPU.

    Args:
        images: (N, C, H, W), cut into batches of `batch`; or batches (B, C, H, W), taken as they come.
        net: the network, on any device.
        batch: images at a time; it does not change the result beyond rounding.

    Raises:
        ValueError: there are no images, or they have a wrong shape.
    """
    device = net.mean.device
    batches = images.split(batch) if isinstance(images, Tensor) else images
    results = [net(x.to(device)) for x in tqdm(batches, desc=net.name, unit="batch", delay=2, leave=False) if len(x)]
    if not results:
        raise ValueError(f"there are no images to take {net.name} features of: at least one is needed")
    features, logits = zip(*results, strict=True)
    return torch.cat(features).float().cpu(), torch.cat(logits).float().cpu()


def spread(count: int, most: int) -> Tensor:
    """At most `most` of the indices 0 to count - 1, int64, evenly spaced: all of them where count <= most.

    Not the first ones: data sets are often sorted by class.
    """
    kept = min(count, most)
    return torch.arange(kept) * count // max(1, kept)


@dataclass(frozen=True, eq=False)
class Reference:
    """What images are measured against, kept so that the reference set is passed through the network once.

    Attributes:
        moments: of the features of all `count` images.
        features: (M, D), of `MANIFOLD_SAMPLES` images at most, see `spread`.
        labels: (M,), of the same images.
        count: how many images there were.
        net_name: the network.
    """

    moments: Moments
    features: Tensor
    labels: Tensor
    count: int
    net_name: str

    @classmethod
    def of(cls, images: ImageSet, net: FeatureNet, batch: int = 256) -> "Reference":
        """Measure a reference set of at least 2 images (ValueError otherwise)."""
        pieces = (images.pixels(index) for index in torch.arange(len(images)).split(batch))
        features, _ = features_of(pieces, net)
        return cls.of_features(features, images.labels, net.name)

    @classmethod
    def of_features(cls, features: Tensor, labels: Tensor, net_name: str) -> "Reference":
        """Features (N, D) that are known already, and labels (N,). ValueError as `moments`."""
        kept = spread(len(features), MANIFOLD_SAMPLES)
        return cls(moments(features), features[kept], labels[kept], len(features), net_name)


def evaluate(
    images: Tensor,
    labels: Tensor | None,
    net: FeatureNet,
    reference: Reference,
    batch: int = 256,
    groups: Tensor | None = None,
) -> dict[str, float]:
    """Figures of images against a reference, as they would be of PNG files: rounded to 256 levels first.

    Args:
        images: float (N, C, H, W), made for [-1, 1] and clamped to it; N >= 4.
        labels: (N,) the class that each image was asked for, or None.
        net: the network that `reference` was measured with.
        reference: `Reference.of(...)`.
        batch: images at a time.
        groups: (N,) equal where images were asked for the same; `labels` if left out.

    Returns:
        fd: Fréchet distance of the features of all images; small counts bias it upwards.
        precision, recall, density, coverage: k = 3, on at most `MANIFOLD_SAMPLES` of each side (`spread`).
        diversity: mean cosine distance of features within a group (`manifold.diversity`), or within all
            images if there are no groups; left out if no two images share one.
        accuracy: part of the images that the network gives their label; left out without labels.
        brightness: mean of all pixels, in [-1, 1].
        contrast: standard deviation of an image's pixels and channels, averaged over the images.
        count: N.

    Raises:
        ValueError: wrong shapes or counts, pixels that are not finite, or a reference of another network.
    """
    _check(images, labels, net, reference)
    pixels = to_float(to_uint8(images))
    features, logits = features_of(pixels, net, batch)
    kept = spread(len(features), MANIFOLD_SAMPLES)
    manifold = precision_recall(reference.features, features[kept])
    figures = {
        "fd": frechet_distance(reference.moments, moments(features)),
        "precision": manifold.precision,
        "recall": manifold.recall,
        "density": manifold.density,
        "coverage": manifold.coverage,
        "brightness": pixels.mean().item(),
        "contrast": pixels.flatten(1).std(1, correction=0).mean().item(),
        "count": float(len(pixels)),
    }
    if labels is not None:
        figures["accuracy"] = (logits.argmax(1) == labels.cpu()).double().mean().item()
    groups = labels if groups is None else groups
    groups = torch.zeros(len(features), dtype=torch.int64) if groups is None else groups.cpu()
    if len(groups.unique()) < len(groups):
        figures["diversity"] = diversity(features, groups)
    return figures


def _check(images: Tensor, labels: Tensor | None, net: FeatureNet, reference: Reference) -> None:
    if reference.net_name != net.name:
        raise ValueError(f"the reference is of {reference.net_name}, not of {net.name}: measure it with this network")
    if not images.is_floating_point() or images.ndim != 4:
        raise ValueError(f"images must be float (N, C, H, W), not {images.dtype} {tuple(images.shape)}")
    if min(len(images), reference.count) < 4:
        raise ValueError(f"{len(images)} images against {reference.count}: at least 4 of each are needed")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"there are {len(images)} images but {len(labels)} labels: each image needs one")
    broken = ~images.flatten(1).isfinite().all(1)
    if broken.any():
        raise ValueError(f"image {int(broken.nonzero()[0])} is not finite: pixels must be free of NaN and infinity")
