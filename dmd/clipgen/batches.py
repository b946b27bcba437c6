"""What each step of CLIP-GEN's three trainings sees, as pure functions of (seed, step, process)."""

from dataclasses import dataclass

from torch import Tensor

from dmd import seeding
from dmd.batches import Share
from dmd.clipgen.clip import CaptionBatch
from dmd.clipgen.gap import Gap
from dmd.clipgen.transformer import TokenBatch
from dmd.data.images import to_float
from dmd.seeding import Stream


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """Images (b, 3, H, W) in [-1, 1], drawn with replacement, for a tokenizer.

    Attributes:
        seed: key of all draws.
        images: (N, 3, H, W) uint8.
        batch_size: over all processes.
        share: this process's part.
    """

    seed: int
    images: Tensor
    batch_size: int
    share: Share

    def __call__(self, step: int) -> list[Tensor]:
        found = []
        for index in self.share.split(self.batch_size, "--tokenizer-batch-size"):
            rows = seeding.integers(self.seed, Stream.DATA, step, index, len(self.images))
            found.append(to_float(self.images[rows].to(self.share.device)))
        return found


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """Tokens and the conditions that they are learnt from, for a transformer.

    Attributes:
        seed: key of all draws.
        tokens: (N, length), integers.
        embeddings: (N, D), CLIP's of the same images.
        gap: makes conditions of them.
        batch_size: over all processes.
        share: this process's part.
        dropout: probability that a condition is left out.
    """

    seed: int
    tokens: Tensor
    embeddings: Tensor
    gap: Gap
    batch_size: int
    share: Share
    dropout: float

    def __call__(self, step: int) -> list[TokenBatch]:
        device = self.share.device
        found = []
        for index in self.share.split(self.batch_size, "--batch-size"):
            rows = seeding.integers(self.seed, Stream.DATA, step, index, len(self.tokens))
            embedding = self.embeddings[rows].float()
            noise = seeding.normal(self.seed, Stream.EMBEDDING_NOISE, step, index, (embedding.shape[1],))
            dropped = seeding.uniform(self.seed, Stream.CONDITION_DROPOUT, step, index) < self.dropout
            condition = self.gap.training(embedding, noise)
            found.append(
                TokenBatch(
                    self.tokens[rows].long().to(device), condition.to(device), embedding.to(device), dropped.to(device)
                )
            )
        return found


@dataclass(frozen=True, eq=False)
class CaptionBatches:
    """Captioned images for a small CLIP, drawn with replacement in blocks of consecutive rows.

    Attributes:
        seed: key of all draws.
        images: (N, 3, H, W) uint8.
        tokens: (N, L) of their captions.
        caption: (N,) numbers of the captions, equal where they say the same.
        block: rows that are drawn together; divides N and each process's part of a batch.
        batch_size: over all processes.
        share: this process's part.
    """

    seed: int
    images: Tensor
    tokens: Tensor
    caption: Tensor
    block: int
    batch_size: int
    share: Share

    def __call__(self, step: int) -> list[CaptionBatch]:
        device = self.share.device
        found = []
        for index in self.share.split(self.batch_size, "--clip-batch-size"):
            high = len(self.images) // self.block
            first = seeding.integers(self.seed, Stream.CLIP_DATA, step, index // self.block, high)
            rows = first * self.block + index % self.block
            found.append(
                CaptionBatch(
                    to_float(self.images[rows].to(device)), self.tokens[rows].to(device), self.caption[rows].to(device)
                )
            )
        return found
