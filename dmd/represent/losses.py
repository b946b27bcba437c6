"""Losses of representation learning, in float32 (or float64, if given that), from the labels of each call.

All contrastive ones are one function, `contrast`: queries, keys, and which keys are positives.

    StableRep (Tian et al. 2023, arXiv 2306.00984)      `multi_positive`; labels are captions
    SimCLR (Chen et al. 2020, arXiv 2002.05709)         `multi_positive`; labels are images, of each two views
    SynCLR (Tian et al. 2023, arXiv 2312.17742)         `momentum_contrast`, `masked_patches`
    CLIP (Radford et al. 2021, arXiv 2103.00020)        `image_text`; one image of each caption
    StableRep+                                          `multi_positive` + `image_text`; m images of each caption
    supervised                                          `classification`

With a process group, features of all processes are contrasted, and the average over processes of the losses and of
their gradients is that of one process with the whole batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd import processes


@dataclass(frozen=True)
class Contrast:
    """A contrastive loss, and what to watch beside it; scalars whose averages over processes are the figures.

    Attributes:
        loss: mean over the queries that have positives; 0 if none has.
        excess: loss - mean log(number of positives) = KL(p || q), detached: 0 is perfect whatever the number.
        dropped: queries without a positive, detached.
    """

    loss: Tensor
    excess: Tensor
    dropped: Tensor


def contrast(
    queries: Tensor, keys: Tensor, positive: Tensor, scale: float | Tensor, hidden: Tensor | None = None
) -> Contrast:
    """Cross-entropy of a uniform distribution over each query's positives and the softmax over all keys (SupCon's
    L_out: Khosla et al. 2020, arXiv 2004.11362, equation 2; StableRep, equations 1 to 3).

        q_ij = exp(s cos(query_i, key_j)) / sum_k exp(s cos(query_i, key_k));  loss_i = -1/|P_i| sum_{j in P_i} log q_ij

    Args:
        queries: (B, D) of this process; of any length and type.
        keys: (N, D) of all processes.
        positive: bool (B, N).
        scale: s, the inverse of the temperature.
        hidden: bool (B, N), keys that a query does not see: they are neither positives nor in the denominator.
    """
    with torch.autocast(queries.device.type, enabled=False):
        logits = scale * unit(queries) @ unit(keys).T
        if hidden is not None:
            logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)  # not -inf: of one image all are hidden
            positive = positive & ~hidden
        count = positive.sum(1)
        logs = logits.log_softmax(1).masked_fill(~positive, 0.0)
        each = -logs.sum(1) / count.clamp_min(1)
        kept = (count > 0).to(each.dtype)
        excess = each.detach() - count.clamp_min(1).log()
        dropped = (1.0 - kept).sum() * processes.world()  # the average over processes is then the sum
        return Contrast(processes.mean(each, kept), processes.mean(excess, kept), dropped)


def unit(features: Tensor) -> Tensor:
    """Features (B, D) at length one. Those below 1e-3 stay shorter, so that the gradient of a feature of zeros is a
    number in float16 too."""
    return F.normalize(full(features), dim=1, eps=1e-3)


def full(x: Tensor) -> Tensor:
    """Numbers in float32, or wider if they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def multi_positive(features: Tensor, labels: Tensor, temperature: float) -> Contrast:
    """StableRep's loss: every image is told from all others but those of its caption. With two of each, NT-Xent.

    Args:
        features: (B, D) of this process.
        labels: (B,) integers, equal where two images are of one caption, on whatever process.
        temperature: tau.
    """
    everything = processes.gathered(features)
    positive = labels[:, None] == processes.collected(labels)
    return contrast(features, everything, positive, 1.0 / temperature, own(features, everything))


def own(queries: Tensor, keys: Tensor) -> Tensor:
    """bool (B, N): where a key, gathered from all processes, is of the query's own image.

    Args:
        queries: (B, D) with B a multiple of this process's keys, which they repeat view by view.
        keys: (N, D) of all processes.
    """
    mine = len(keys) // processes.world()
    place = torch.arange(len(queries), device=queries.device) % mine + processes.rank() * mine
    return place[:, None] == torch.arange(len(keys), device=queries.device)


def momentum_contrast(
    queries: Tensor, keys: Tensor, query_labels: Tensor, key_labels: Tensor, temperature: float, hide_own: bool = True
) -> Contrast:
    """SynCLR's contrastive term: a student's crops against a teacher's features of whole images, without gradient.

    Args:
        queries: (V * B, D): V crops of each of this process's images, crop by crop.
        keys: (B, D) of this process's images.
        query_labels: (V * B,) integers.
        key_labels: (B,) integers.
        temperature: tau.
        hide_own: whether a query does not see the key of its own image.
    """
    everything = processes.collected(keys)
    positive = query_labels[:, None] == processes.collected(key_labels)
    return contrast(queries, everything, positive, 1.0 / temperature, own(queries, everything) if hide_own else None)


def image_text(images: Tensor, texts: Tensor, image_labels: Tensor, text_labels: Tensor, scale: Tensor) -> Contrast:
    """CLIP's symmetric loss, and StableRep+'s: of a text all images of its caption are positives, each alike, and of an
    image its text. Texts that are equal are positives of each other's images.

    Args:
        images: (B, D) of this process.
        texts: (C, D) of this process.
        image_labels: (B,), text_labels: (C,) integers, equal where an image is of a text's caption.
        scale: of cosines, a scalar.
    """
    of_texts, of_images = processes.gathered(texts), processes.gathered(images)
    one = contrast(images, of_texts, image_labels[:, None] == processes.collected(text_labels), scale)
    two = contrast(texts, of_images, text_labels[:, None] == processes.collected(image_labels), scale)
    return Contrast(0.5 * (one.loss + two.loss), 0.5 * (one.excess + two.excess), one.dropped + two.dropped)


def classification(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of (B, K) logits and (B,) classes."""
    return F.cross_entropy(full(logits), labels, label_smoothing=smoothing)


def masked_patches(student: Tensor, target: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """iBOT's loss (Zhou et al. 2021, arXiv 2111.07832, equation 2): what a masked patch is, told from the others.

    Cross-entropy of each masked patch, averaged over those of its image, and then over the images that have any.

    Args:
        student: (M, K) logits of the masked patches, image by image and row by row.
        target: (M, K) of sum 1, without gradient.
        mask: bool (B, N), M of them true.
        temperature: of the student.
    """
    with torch.autocast(student.device.type, enabled=False):
        each = -(full(target) * (full(student) / temperature).log_softmax(1)).sum(1)
        count = mask.sum(1)
        weights = (1.0 / count.clamp_min(1))[:, None].expand(mask.shape)[mask]
        return processes.mean(each, weights)  # the weights of an image have the sum 1
