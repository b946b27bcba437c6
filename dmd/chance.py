"""Random numbers of libraries that draw from torch's global generators, tied to (seed, stream, step) as all others."""

import contextlib
from collections.abc import Iterator

import torch

from dmd import seeding
from dmd.seeding import Stream


@contextlib.contextmanager
def pinned(seed: int, stream: Stream, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Within it, torch's generators start from a number that the arguments determine; afterwards they are as before.

    For dropout and for the replacement of dead codes, which draw inside libraries. So a resumed run repeats them.
    """
    word = int(seeding.bits(seed, stream, step, torch.tensor([rank]), 1).item())
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(word)
        yield
