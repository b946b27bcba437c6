"""Few-shot classification: tasks of few classes with few labelled images each.

A task's images have the class of the nearest mean, of features that are centred by the training set's mean and
normalised: CL2N of SimpleShot (Wang et al. 2019, arXiv 1911.04623). StableRep reports tasks of 5 classes (arXiv
2306.00984).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd.seeding import Stream, bits


@torch.no_grad()
def episodes(
    x: Tensor, labels: Tensor, centre: Tensor, ways: int = 5, shots: int = 5, queries: int = 15, count: int = 600,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """The accuracy of each task, float32 (count,) in [0, 1].

    A task draws `ways` of the classes that have enough images, and `shots + queries` images of each, without
    replacement; it is a function of (seed, its number).

    Args:
        x: features (N, D) of the images that tasks are made of.
        labels: int64 (N,).
        centre: (D,) the mean of the training features.
        ways, shots, queries: classes of a task, labelled images of each class, and images to be classified.
        count: of tasks.

    Raises:
        ValueError: fewer than `ways` classes have `shots + queries` images.
    """
    z = F.normalize(x.float() - centre.float(), dim=1)
    each = shots + queries
    members = [
        group for group in (torch.nonzero(labels.cpu() == c)[:, 0] for c in labels.unique()) if len(group) >= each
    ]
    if len(members) < ways:
        raise ValueError(f"{len(members)} classes have {each} images, and a task needs {ways} of them")
    found = []
    for number in range(count):
        words = bits(seed, Stream.EPISODE, number, torch.arange(ways + 1), max(len(members), *map(len, members)))
        chosen = words[ways, : len(members)].argsort(stable=True)[:ways].tolist()
        drawn = torch.stack(
            [
                members[c][w[: len(members[c])].argsort(stable=True)[:each]]
                for c, w in zip(chosen, words[:ways], strict=True)
            ]
        )
        task = z[drawn.to(z.device)]  # (ways, shots + queries, D)
        means = task[:, :shots].mean(1)
        nearest = torch.cdist(task[:, shots:].flatten(0, 1), means).argmin(1).unflatten(0, (ways, queries))
        found.append((nearest == torch.arange(ways, device=z.device)[:, None]).float().mean())
    return torch.stack(found).cpu()
