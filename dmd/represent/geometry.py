"""What can be said of features without a classifier: their effective rank, their alignment and their uniformity."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048


@torch.no_grad()
def rank_me(x: Tensor) -> float:
    """RankMe, the exponential of the entropy of the singular values' shares: 1 to min(N, D).

    D for features that are alike in all directions, 1 for features on a line through the origin. They are not centred
    (Garrido et al. 2023, arXiv 2210.02885, equation 3).

    Args:
        x: features (N, D).

    Raises:
        ValueError: all features are 0.
    """
    values = torch.linalg.svdvals(x.double())
    total = values.sum()
    if total == 0:
        raise ValueError("all features are 0, so they have no rank")
    return torch.special.entr(values / total).sum().exp().item()


@torch.no_grad()
def alignment(x: Tensor, labels: Tensor) -> float:
    """Mean squared distance of two normalised features of one class, over all pairs: 0 to 4, lower is better.

    Wang and Isola 2020 (arXiv 2005.10242), with alpha = 2; their positives are two views of an image, these are two
    images of a class. In closed form by the classes' sums, not pair by pair.

    Args:
        x: features (N, D).
        labels: int64 (N,).

    Raises:
        ValueError: no class has two images.
    """
    z = F.normalize(x.double(), dim=1)
    classes, number = labels.unique(return_inverse=True)
    sums = z.new_zeros(len(classes), x.shape[1]).index_add_(0, number, z)
    counts = number.bincount(minlength=len(classes)).double()
    pairs = (counts * (counts - 1)).sum()
    if pairs == 0:
        raise ValueError("no class has two images, so there are no pairs to align")
    own = torch.zeros_like(counts).index_add_(0, number, z.square().sum(1))  # 1 each, or 0 for a feature of 0
    apart = (2 * counts * own - 2 * sums.square().sum(1)).sum()
    return max(0.0, (apart / pairs).item())


@torch.no_grad()
def uniformity(x: Tensor) -> float:
    """log of the mean of exp(-2 d^2) over all pairs of normalised features: -8 to 0, lower is better.

    Wang and Isola 2020 (arXiv 2005.10242), with t = 2.

    Args:
        x: features (N, D).

    Raises:
        ValueError: fewer than 2 features.
    """
    count = len(x)
    if count < 2:
        raise ValueError(f"{count} features have no pairs")
    z = F.normalize(x.double(), dim=1)
    total = sum((torch.exp(4 * (part @ z.T) - 4).sum() for part in z.split(CHUNK)), start=z.new_zeros(()))
    itself = torch.exp(4 * z.square().sum(1) - 4).sum()
    return ((total - itself) / (count * (count - 1))).log().item()
