"""Shared fixtures. All runs offline, on the CPU and on one thread, so that figures do not depend on the machine."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import math

import pytest
import torch

from dmd.mixture import MixtureDenoiser
from dmd.noise import DDPM, Karras, Linear

torch.set_num_threads(1)

SCHEDULES = {"ddpm": DDPM(), "karras": Karras(), "linear1": Linear(1.0), "linear3": Linear(3.0)}


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES.keys())
def schedule(request):
    """Every family of noise schedules."""
    return request.param


@pytest.fixture
def rng():
    """A generator of fixed seed."""
    return torch.Generator().manual_seed(20240617)


@pytest.fixture
def ring():
    """schedule -> an uneven mixture of eight Gaussians on a circle, float64."""

    def build(schedule, std=0.3, dtype=torch.float64):
        angle = torch.arange(8, dtype=dtype) * (2 * math.pi / 8)
        means = torch.stack((angle.cos(), angle.sin()), dim=1)
        return MixtureDenoiser(schedule, means, std, torch.arange(1, 9, dtype=dtype))

    return build
