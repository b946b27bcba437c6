"""`--compile`: the numbers of an eager run, and checkpoints that do not tell which it was."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from small import lines
from torch._dynamo.utils import counters

from dmd.cli import train


@pytest.fixture
def graphs():
    """How many graphs have been compiled since the test began."""
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


def compared(a, b, bound):
    """Whether two runs' lines say the same, up to a part of each number and the same of 1 in all."""
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for mine, theirs in zip(a, b, strict=True):
        assert mine == pytest.approx(theirs, rel=bound, abs=bound)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU, and it is not installed")
def test_a_compiled_run_has_an_eager_one_s_losses_and_goes_on_without_compilation(world, tmp_path, graphs):
    """Losses and gradients' norms of the first step agree to 1e-4, those of later ones, whose weights Adam has moved by
    rounded gradients, to 1e-2."""
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    each = ("--log-every", "1", "--lr-cooldown-steps", "1")
    train.main(world.flags(eager, *each))
    assert graphs() == 0
    train.main(world.flags(compiled, *each, "--max-train-steps", "2", "--compile"))
    made = graphs()
    assert made >= 3  # student, real and fake score
    newest = max((compiled / "checkpoints").iterdir())
    for name in ("student", "fake", "ema"):
        expected = load_file(max((eager / "checkpoints").iterdir()) / f"{name}.safetensors")
        assert load_file(newest / f"{name}.safetensors").keys() == expected.keys(), name
    train.main(world.flags(compiled, *each))
    assert graphs() == made
    a, b = ([line for line in lines(run) if "loss/fake" in line] for run in (eager, compiled))
    compared(a[:1], b[:1], 1e-4)
    compared(a, b, 1e-2)
