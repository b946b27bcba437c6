"""A sample is its seed's and condition's alone; work goes in padded units of one size."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dmd import codec, seeding
from dmd.denoiser import NetworkDenoiser, flow
from dmd.generate import images, student_generator, teacher_generator, work_unit
from dmd.mixture import MixtureDenoiser
from dmd.noise import Karras, Linear
from dmd.seeding import Stream
from dmd.solvers import ddim, heun, one_step

SHAPE = (2, 4, 4)
CPU = torch.device("cpu")


class Net(nn.Module):
    """A small convolutional network with labels; notes the size of every call."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.label = nn.Embedding(5, 2)
            self.body = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 2, 3, padding=1))
        self.calls = []

    def forward(self, x_t, t, label):
        self.calls.append(len(x_t))
        return self.body(x_t * (1 + t[:, None, None, None]) + self.label(label)[:, :, None, None])


def labels(number):
    return {"label": number}


@pytest.fixture
def student():
    return NetworkDenoiser(Net(), Linear(), flow)


def sample(student, seeds, numbers, batch_size=8, **options):
    seeds, numbers = torch.tensor(seeds), torch.tensor(numbers)
    return images(student_generator(student), seeds, labels, numbers, SHAPE, CPU, batch_size, **options)


def test_samples_are_the_students_from_their_seeds_noise(student):
    seeds, numbers = [3, 2**40, 0], [4, 0, 1]
    z = seeding.normal(0, Stream.SAMPLE, 0, torch.tensor(seeds), SHAPE)
    with torch.no_grad():
        expected = one_step(student, z, labels(torch.tensor(numbers)))
    torch.testing.assert_close(sample(student, seeds, numbers), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_a_sample_does_not_depend_on_the_other_seeds_or_the_batch(student, batch_size):
    seeds, numbers = list(range(100, 121)), [i % 5 for i in range(21)]
    together = sample(student, seeds, numbers, batch_size)
    alone = torch.cat([sample(student, [s], [n]) for s, n in zip(seeds, numbers, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    backwards = sample(student, seeds[::-1], numbers[::-1], batch_size).flip(0)
    torch.testing.assert_close(together, backwards, rtol=1e-5, atol=1e-5)


def test_with_full_work_units_a_sample_keeps_its_bits(student):
    """The same place in its unit, other neighbours, another place in the list."""
    first = sample(student, list(range(24)), [0] * 24)
    other = sample(student, [90, 91, 92, 93, 94, 95, 96, 97, 0, 77, 78, 79, 80, 81, 82, 83], [0] + [3] * 7 + [0] * 8)
    assert torch.equal(first[0], other[8])


def test_the_last_unit_is_padded_and_the_padding_dropped(student):
    ticks = []
    x = sample(student, list(range(19)), [0] * 19, tick=ticks.append)
    assert student.net.calls == [8, 8, 8]
    assert ticks == [8, 8, 3]
    assert torch.equal(x[16:], sample(student, [16, 17, 18] + [18] * 5, [0] * 8)[:3])


def test_no_seeds_are_no_images(student):
    assert sample(student, [], []).shape == (0, *SHAPE)
    assert student.net.calls == []


def test_no_graph_is_kept(student):
    assert not sample(student, [1], [1]).requires_grad


@pytest.mark.parametrize(("solver", "evaluations"), [(heun, 9), (ddim, 5)])
def test_the_teacher_samples_with_its_solver(student, solver, evaluations):
    generator = teacher_generator(student, solver, 5)
    z = seeding.normal(0, Stream.SAMPLE, 0, torch.tensor([7, 8]), SHAPE)
    cond = labels(torch.tensor([1, 2]))
    with torch.no_grad():
        expected = solver(student, z, 5, cond)
        student.net.calls.clear()
        assert torch.equal(generator(z, cond), expected)
    assert student.net.calls == [2] * evaluations


def test_the_teacher_starts_at_its_own_noise_level():
    """sigma_max z for Karras: a Gaussian's ODE keeps (x - mean) / sqrt(std^2 + sigma^2)."""
    teacher = MixtureDenoiser(Karras(), torch.tensor([[0.3, -0.3]]), 0.5)
    seeds = torch.arange(6)
    x = images(teacher_generator(teacher, heun, 100), seeds, lambda n: {}, seeds, (2,), CPU)
    z = seeding.normal(0, Stream.SAMPLE, 0, seeds, (2,))
    expected = teacher.means + 0.5 * (80 * z - teacher.means) / math.hypot(80, 0.5)
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-3)


def test_many_steps_of_a_pixel_network_are_heuns(tmp_path, monkeypatch, capsys):
    """`sample.py --steps n` is the sampler that the network's pairs come from: 2 n - 1 evaluations."""
    from dmd.cli import sample as command
    from dmd.teachers import pixel

    config = pixel.PixelConfig(("a", "b"), 1, 4, 8, (1,), 1, (False,))
    pixel.save(pixel.build(config).net.get_submodule("unet"), config, tmp_path / "net")
    calls = []
    forward = pixel.KarrasNet.forward
    monkeypatch.setattr(pixel.KarrasNet, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    options = ["--student", str(tmp_path / "net"), "--out", str(tmp_path / "out"), "--device", "cpu", "--seeds", "0-1"]
    command.main(["b", *options])
    assert len(calls) == 1
    command.main(["b", "--steps", "3", *options])
    assert len(calls) == 1 + 5
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000-b-seed-0.png", "000-b-seed-1.png", "grid.png"]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 64, 64), 8), ((4, 96, 96), 3), ((4, 8, 8), 250), ((4, 16, 16), 128), ((4, 512, 512), 1)],
)
def test_the_work_unit_of_latents_is_by_the_images_that_they_decode_to(shape, expected):
    """8 images of 512 x 512, which an autoencoder of four resolutions makes of 64 x 64, or as many pixels."""
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(1, 2, 3, 4)))
    assert work_unit(shape, codec.KL(vae, 1.0)) == expected


@pytest.mark.parametrize(("size", "expected"), [(8, 250), (32, 250), (128, 128), (256, 32)])
def test_the_work_unit_of_pixels_is_by_themselves(size, expected):
    assert work_unit((3, size, size), codec.Identity()) == expected
