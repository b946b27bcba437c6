"""Shared fixtures. All runs offline, on the CPU and on one thread, so that figures do not depend on the machine."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import ipaddress
import math
import socket

import pytest
import torch

from dmd.mixture import MixtureDenoiser
from dmd.noise import DDPM, Karras, Linear

torch.set_num_threads(1)


def reaches_out(family, kind, address):
    """Whether connecting there would leave this machine. Datagram sockets are connected without a packet being sent,
    which libraries do to learn the machine's own address."""
    if family == socket.AF_UNIX or kind & socket.SOCK_DGRAM:
        return False
    host = address[0]
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


@pytest.fixture(autouse=True, scope="session")
def offline():
    """A test that connects to another machine fails, whatever catches the error. Other processes are not watched."""
    connect = socket.socket.connect

    def watched(self, address):
        if reaches_out(self.family, self.type, address):
            pytest.fail(f"a test connects to {address}: all must run offline")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        yield


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
