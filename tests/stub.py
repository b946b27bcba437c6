"""A generator without networks: images that are a function of caption and number, for tests of the data set."""

import time
import zlib
from dataclasses import dataclass

import torch

from dmd.shards import Spec
from dmd.synthesis import Job


def stub(captions, numbers, epoch, size=16):
    """Smooth colours (B, 3, size, size) in [-1, 1]."""
    keys = torch.tensor([zlib.crc32(c.encode()) for c in captions]) + 7919 * numbers + 104729 * epoch
    phase = torch.stack([(keys * p % 1009).float() / 1009 for p in (3, 5, 7)], dim=1)[:, :, None, None]
    ramp = torch.linspace(0, 1, size)
    return torch.sin(6.28 * (phase + ramp[:, None] * 0.5 + ramp * 0.25))


def slow_stub(captions, numbers, epoch):
    time.sleep(0.004)
    return stub(captions, numbers, epoch)


@dataclass
class Noting:
    """The stub, noting what it was asked."""

    calls: list

    def __call__(self, captions, numbers, epoch):
        self.calls.append(numbers.tolist())
        return stub(captions, numbers, epoch)


CAPTIONS = [f"caption {i} of a/b\\c ../é 🔴" for i in range(30)]


def spec(**changes):
    values = {
        "captions": "abc", "count": 30, "replicas": 4, "seed": 5, "source": {"kind": "stub"}, "pixels": None,
        "image_format": "jpg", "quality": 95, "shard_size": 12, "batch_size": 5,
    }  # fmt: skip
    return Spec(**(values | changes))


def job(folder, source=stub, keep=None, encoders=1, captions=CAPTIONS, **changes):
    return Job(folder, spec(**changes), captions, source, encoders, keep)
