"""The nearest-neighbour probe: an image has the class that most of its neighbours in the training set vote for.

Nothing is trained and nothing chosen, so this is the first figure to look at. The weighted form is that of Wu et al.
2018 (arXiv 1805.01978, section 3.4), with the temperature that DINO uses (arXiv 2104.14294, appendix).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

COMPARED = 2**26
"""Pairs of query and training image that are compared at a time."""


@torch.no_grad()
def predict(
    train: Tensor, labels: Tensor, queries: Tensor, classes: int, ks: Sequence[int], temperature: float = 0.07
) -> Tensor:
    """The class of each query for each number of neighbours: int64 (len(ks), Q) on the queries' device.

    A neighbour of cosine s votes with weight exp(s / temperature). The class with the lowest number wins a tie.

    Args:
        train: features (M, D), of any length: they are normalised here.
        labels: int64 (M,) in [0, classes).
        queries: features (Q, D).
        classes: K.
        ks: numbers of neighbours, 1 to M.
        temperature: above 0.

    Raises:
        ValueError: a number of neighbours is not in 1 to M.
    """
    for k in ks:
        if not 1 <= k <= len(train):
            raise ValueError(f"{k} neighbours are not possible among {len(train)} training images")
    bank = F.normalize(train.float(), dim=1)
    found = []
    for part in F.normalize(queries.float(), dim=1).split(max(1, COMPARED // len(bank))):
        cosines, index = (part @ bank.T).topk(max(ks), dim=1)
        # relative to the nearest, which changes no vote's share, so that no temperature overflows
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        voted, none = labels[index], weights.new_zeros(len(part), classes)
        votes = [none.scatter_add(1, voted[:, :k], weights[:, :k]) for k in ks]
        found.append(torch.stack([v.argmax(1) for v in votes]))
    return torch.cat(found, dim=1)
