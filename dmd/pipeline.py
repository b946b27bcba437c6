"""What surrounds a denoiser: prompts in, images out. Pixel networks and Stable Diffusion look alike from here."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dmd.codec import Codec
from dmd.denoiser import Cond, NetworkDenoiser


class Pipeline(Protocol):
    """A teacher, or a student that was made of one.

    Attributes:
        denoiser: of what the codec makes of images; conditioned on what `encode` returns.
        codec: images in [-1, 1] to what the denoiser sees, and back.
        shape: (c, h, w) of what the denoiser sees.
        classes: the prompts that it knows, all there are; none for one that takes any text.
    """

    @property
    def denoiser(self) -> NetworkDenoiser: ...

    @property
    def codec(self) -> Codec: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Prompts, or names of classes, to conditions of as many rows. InputError for what it does not know."""

    def null(self) -> Cond:
        """The empty condition, one row."""

    def digest(self) -> str:
        """SHA-256 of all weights that determine what the denoiser makes of a prompt."""

    def save(self, denoiser: NetworkDenoiser, folder: Path, figures: Mapping[str, object]) -> None:
        """Write a folder like this pipeline's own with another denoiser of its kind: a student, whole or not at all.

        `figures` go into its README.md, by what they are.
        """


def conditions(pipeline: Pipeline, prompts: Sequence[str]) -> Callable[[Tensor], Cond]:
    """Numbers of prompts (B,) to their conditions, encoded anew each time."""
    return lambda numbers: pipeline.encode([prompts[i] for i in numbers.tolist()])
