"""From conditions and seeds to tokens: temperature, top-k, top-p, guidance, and a cache of keys and values.

A sample's choices are numbers of (seed, candidate) alone, and it is drawn by the inverse of its distribution function:
so it depends neither on the batch nor on what else is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd import seeding
from dmd.clipgen.transformer import ConditionalTransformer
from dmd.seeding import Stream


@dataclass(frozen=True)
class Sampler:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it, > 0.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens that together reach this probability, in (0, 1].
        guidance: uncond + s (cond - uncond) of the logits; at 1 nothing is evaluated without the condition.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0


def probabilities(logits: Tensor, sampler: Sampler) -> Tensor:
    """What tokens are drawn from, (B, K) float64: softmax(logits / temperature), cut to top-k, then to top-p, rescaled.

    Of equal logits at top-k's border all stay. The token that crosses top-p stays (Holtzman et al. 2020).
    """
    logits = logits.double() / sampler.temperature
    if 0 < sampler.top_k < logits.shape[-1]:
        least = logits.topk(sampler.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = logits.softmax(-1)
    if sampler.top_p < 1.0:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        p = torch.zeros_like(p).scatter(-1, order, ordered.masked_fill(before >= sampler.top_p, 0.0))
        p = p / p.sum(-1, keepdim=True)
    return p


def choose(p: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (B,) by the inverse distribution function of p (B, K) at uniform (B,) in (0, 1)."""
    reach = p.cumsum(-1)
    token = torch.searchsorted(reach, (uniform.double() * reach[..., -1])[:, None], right=True)[:, 0]
    likeliest = p.argmax(-1)  # rounding may carry the last number beyond the end, or onto a token that is cut away
    token = token.clamp_max(p.shape[-1] - 1)
    return torch.where(p.gather(-1, token[:, None])[:, 0] > 0, token, likeliest)


@torch.no_grad()
def tokens(
    net: ConditionalTransformer, condition: Tensor, seeds: Tensor, sampler: Sampler, candidate: int = 0
) -> Tensor:
    """Tokens (B, length) of images for conditions (B, D) and seeds (B,) below 2^56.

    Args:
        candidate: number of a further try with the same seed.
    """
    length, device = net.config.length, condition.device
    uniform = seeding.as_uniform(seeding.bits(0, Stream.TOKEN, candidate, seeds.cpu(), length)).to(device)
    guided = sampler.guidance != 1.0
    prefix = net.prefix(condition)
    if guided:
        nothing = torch.ones(len(condition), dtype=torch.bool, device=device)
        prefix = torch.cat((prefix, net.prefix(condition, nothing)))
    logits, past = net.start(prefix)
    found: list[Tensor] = []
    while True:
        found.append(choose(probabilities(_guided(logits, sampler.guidance), sampler), uniform[:, len(found)]))
        if len(found) == length:
            return torch.stack(found, dim=1)
        logits, past = net.following(found[-1].repeat(2) if guided else found[-1], past)


def _guided(logits: Tensor, scale: float) -> Tensor:
    if scale == 1.0:
        return logits
    cond, uncond = logits.double().chunk(2)
    return uncond + scale * (cond - uncond)


@torch.no_grad()
def in_units(
    make: Callable[[Tensor, Tensor], Tensor], conditions: Tensor, seeds: Tensor, unit: int,
    tick: Callable[[int], object] = lambda n: None,
) -> Tensor:  # fmt: skip
    """make(conditions, seeds) for all rows, in work units of one size, (N, ...) on the CPU.

    The last unit is filled up with copies of its last row, since a network's rounding depends on the batch size.
    """
    size = min(unit, max(len(seeds), 1))
    parts = []
    for start in range(0, len(seeds), size):
        rows = torch.arange(start, start + size).clamp_max(len(seeds) - 1)
        done = min(size, len(seeds) - start)
        parts.append(make(conditions[rows.to(conditions.device)], seeds[rows])[:done].cpu())
        tick(done)
    return torch.cat(parts)


def rerank(scores: Tensor) -> Tensor:
    """The best candidate of each image: (C, N) scores to (N,) int64; of equal ones the first."""
    return scores.argmax(0)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of embeddings (N, D) and (N, D): (N,). Times 100 it is the CLIP score (Hessel et al. 2021)."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1)
