"""Randomness as a function of (seed, stream, step, global sample index).

Nothing here has state, so a resumed run draws what an uninterrupted one would have drawn, and a sample does not
depend on the batch, the process or the device that computes it.

The bits come from Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), evaluated
for a whole batch at once. `torch.Generator` is not used: its CPU engine keeps only the low 32 bits of a seed, and one
generator per sample costs more than a small network's step.
"""

import enum
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Stream(enum.IntEnum):
    """Names of independent random streams. Numbers are part of the on-disk contract: never reuse or renumber."""

    SAMPLE = 0  # start noise of images that users ask for, and of evaluation
    PAIR = 1  # start noise of the regression pairs
    PAIR_LABEL = 2  # their condition
    PAIR_CHOICE = 3  # which pairs a training step sees
    START = 4  # start noise of the student in training
    LABEL = 5  # condition of training samples
    MATCH_TIME = 6  # t and noise of the distribution-matching term
    MATCH_NOISE = 7
    CRITIC_TIME = 8  # t and noise of the fake score's denoising loss
    CRITIC_NOISE = 9
    DATA = 10  # which real images a teacher's step sees
    TEACH_TIME = 11
    TEACH_NOISE = 12
    CONDITION_DROPOUT = 13
    SHAPES_SCENE = 16  # what the world of captioned shapes shows
    SHAPES_DRAWING = 17  # and where exactly: jitter of place, size and rotation
    GUIDANCE_TIME = 19  # t of the real score's guidance, where it has its own
    CROP = 20  # which part of paired samples the regression compares
    LATENT_NOISE = 18  # of an autoencoder's posterior while it is taught
    TOKEN = 70  # the choice of each image token while sampling
    CODE_REPLACEMENT = 71  # what replaces an image tokenizer's dead codes, and its first codes
    EMBEDDING_NOISE = 72  # on CLIP embeddings while a conditional transformer learns
    TRANSFORMER_DROPOUT = 73
    CLIP_DATA = 74  # which captioned images a small CLIP's step sees
    SHAPES_NEIGHBOUR = 75  # which part of a scene its neighbour differs in, and how
    CAPTION = 50  # concept, template and words of a synthetic caption
    CAPTION_EXAMPLES = 51  # which examples a language model is shown
    CAPTION_TOKEN = 52  # and which tokens it says
    SYNTHESIS = 53  # start noise of synthetic data sets: step is the epoch, index the caption and the replica
    CAPTION_ORDER = 54  # of captions that are synthesised online
    READ_ORDER = 55  # of shards and captions that are read
    READ_CHOICE = 56  # and which of a caption's images
    VIEW = 80  # crops, colours and blur of images that a learner sees
    LOCAL_VIEW = 81  # and of small crops
    PATCH_MASK = 82  # which patches are masked
    DROP_PATH = 83  # which blocks are left out
    CLASS_ORDER = 84  # images of labelled sets, class by class
    PROBE_SPLIT = 90  # which training images a probe chooses its settings on
    PROBE_ORDER = 91  # in which a linear probe sees features
    EPISODE = 92  # classes and images of a few-shot task
    RESAMPLE = 40  # which samples a bootstrap draws
    SUBSET = 41  # which samples a subset of the kernel distance holds


Streams = Stream | Sequence[Stream]
"""One stream, or several whose draws are stacked."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


Words = TypeVar("Words", Tensor, NDArray[np.int64])


def philox(counter: tuple[Words, ...], key: tuple[int, int]) -> tuple[Words, ...]:
    """Philox-4x32-10: four 32-bit words of the counter and two of the key to four random 32-bit words.

    Words are held in int64 tensors or arrays of one broadcastable shape; the values are in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps in int64, yet all 64 bits are right
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def bits(seed: int, stream: Streams, step: int, index: Tensor, count: int) -> Tensor:
    """Random 32-bit words, shape (B, count), int64 in [0, 2^32), one row per global sample index.

    Args:
        seed: 0 to 2^64 - 1.
        stream: which independent sequence. Several, here and below, give their draws stacked, shape (streams, B, ...),
            for about the time of one: a small batch costs what its many operations cost to start.
        step: 0 to 2^32 - 1.
        index: (B,) int64, 0 to 2^56 - 1.
        count: words per sample.

    Raises:
        ValueError: a number is out of its range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is out of range: it must be at least 0 and below 2**64")
    if not 0 <= step <= _MASK:
        raise ValueError(f"step {step} is out of range: it must be at least 0 and below 2**32")
    blocks = -(-count // 4)
    block = torch.arange(blocks, device=index.device)
    index = index[:, None]
    number = torch.tensor(stream, device=index.device)[..., None, None]
    high = ((index >> 32) & 0xFFFFFF) << 8 | number
    counter = (block, index & _MASK, torch.full_like(index, step), high)
    key = (seed & _MASK, seed >> 32)
    if index.device.type == "cpu":  # NumPy starts an operation in a third of torch's time, and there are 120
        words = tuple(torch.from_numpy(w) for w in philox(tuple(c.numpy() for c in counter), key))
    else:
        words = philox(counter, key)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :count]


def as_uniform(words: Tensor) -> Tensor:
    """Random words as `uniform` numbers of the same shape."""
    return ((words >> 9).float() + 0.5) * 2.0**-23


def as_integers(words: Tensor, high: int) -> Tensor:
    """Random words as `integers` of the same shape."""
    return (words * high) >> 32


def uniform(seed: int, stream: Streams, step: int, index: Tensor) -> Tensor:
    """U(0, 1), shape (B,), float32 with 23 random bits, one number per sample; never 0, where sigma may be 0, nor 1."""
    return as_uniform(bits(seed, stream, step, index, 1)[..., 0])


def integers(seed: int, stream: Streams, step: int, index: Tensor, high: int) -> Tensor:
    """Uniform integers in [0, high), shape (B,), int64. The bias is below high / 2^32."""
    return as_integers(bits(seed, stream, step, index, 1)[..., 0], high)


def normal(seed: int, stream: Streams, step: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """N(0, I), shape (B, *shape), float32 (Box-Muller). The bits are equal on all devices, the last ulp may not be."""
    count = math.prod(shape)
    words = bits(seed, stream, step, index, 2 * -(-count // 2))
    radius = torch.sqrt(-2.0 * torch.log(((words[..., 0::2] >> 8).float() + 0.5) * 2.0**-24))
    angle = (words[..., 1::2] >> 8).float() * (2.0 * math.pi * 2.0**-24)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(-2)[..., :count].unflatten(-1, shape)
