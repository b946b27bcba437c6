"""What a run is looked at by: rows of a picture and drift, from denoisers that can be worked out by hand."""

import pytest
import torch

from dmd import evaluation
from dmd.denoiser import Denoiser
from dmd.noise import Karras


class Affine(Denoiser):
    """a * x_t + the condition, noting the times that it was called at."""

    schedule = Karras()

    def __init__(self, a):
        super().__init__()
        self.a = a
        self.times = []

    def forward(self, x_t, t, cond):
        self.times.append(t.tolist())
        return self.a * x_t + cond["shift"][:, None, None, None]


def test_rows_are_the_samples_what_both_scores_make_of_them_and_a_pair():
    student, real, fake = Affine(0.5), Affine(2.0), Affine(-1.0)
    z, noise, z_ref, y_ref = torch.randn(4, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    watched = evaluation.Watched(z, noise, z_ref, y_ref, {"shift": torch.tensor([1.0, -2.0])})
    rows = evaluation.inspect(student, real, fake, watched, 0.25)
    sigma = (80 ** (1 / 7) + 0.75 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # EDM's table 1, at t = 0.25
    shift = torch.tensor([1.0, -2.0])[:, None, None, None]
    x = 40.0 * z + shift
    x_t = x + sigma * noise
    for row, expected in zip(rows, (x, 2 * x_t + shift, shift - x_t, 40.0 * z_ref + shift, y_ref), strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-4)
    assert student.times == [[1.0, 1.0]] * 2 and real.times == fake.times == [[0.25, 0.25]]


def test_drift_is_brighter_and_flatter():
    y = torch.tensor([-1.0, 0.0, 1.0, 0.0]).reshape(1, 1, 2, 2).repeat(8, 1, 1, 1)
    found = evaluation.drift(0.25 * y + 0.5, y)
    std = (2 * 8 / (4 * 8 - 1)) ** 0.5
    assert found == pytest.approx({"health/brightness_drift": 0.5, "health/contrast_drift": -0.75 * std})
