"""Images that a network makes as they are looked at, as a source for the metrics: none of them has to be kept."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmd.data.images import to_uint8
from dmd.generate import Generator, decoded, images
from dmd.metrics.sources import Pixels
from dmd.pipeline import Pipeline, conditions


@dataclass(frozen=True, eq=False)
class Sampled:
    """One image for each seed from `first_seed` on, as a `dmd.metrics.sources.Source`.

    Attributes:
        name: what the results call it.
        pipeline: whose prompts and codec are used; its denoiser by way of `generator`.
        generator: noise and condition to samples.
        how: in words, how the generator samples; with the pipeline's weights it determines the images.
        prompts: what images are asked for.
        numbers: int64 (N,) which prompt each image is asked for.
        batch_size: work unit in which samples are made (`dmd.generate.images`).
    """

    name: str
    pipeline: Pipeline
    generator: Generator
    how: str
    prompts: Sequence[str]
    numbers: Tensor
    device: torch.device
    first_seed: int
    batch_size: int

    @property
    def captions(self) -> Sequence[str]:
        return [self.prompts[i] for i in self.numbers.tolist()]

    @property
    def labels(self) -> Tensor | None:
        """The numbers of the prompts, where those are all the classes of the network."""
        return self.numbers if self.pipeline.classes and tuple(self.prompts) == self.pipeline.classes else None

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, size: int) -> Iterator[list[Pixels]]:
        """The images in work units of their own, whatever `size` is: a network's rounding depends on them."""
        unit = min(self.batch_size, len(self))
        for start in range(0, len(self), unit):
            index = torch.arange(start, start + unit).clamp_max(len(self) - 1)
            x = images(
                decoded(self.generator, self.pipeline.codec),
                self.first_seed + index,
                conditions(self.pipeline, self.prompts),
                self.numbers[index],
                self.pipeline.shape,
                self.device,
                unit,
            )
            yield list(to_uint8(x[: len(self) - start]).permute(0, 2, 3, 1).numpy())

    def where(self, index: int) -> str:
        return f"{self.name}, seed {self.first_seed + index}"

    def digest(self) -> str:
        facts = [self.pipeline.digest(), self.how, list(self.captions), self.first_seed, self.batch_size]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
