"""Two processes compute the loss and the gradient of one, for all learners."""

from pathlib import Path

import pytest
import tiny_learners as little
import torch
import two_processes

from dmd.batches import Share


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of what two processes have computed."""
    folder = tmp_path_factory.mktemp("together")
    done = two_processes.run([str(Path(little.__file__)), str(folder)])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("kind", little.KINDS)
def test_two_processes_compute_what_one_does(together, kind):
    """Batch statistics, contrast, assignments to prototypes and the count of masked images are of the whole batch."""
    found = torch.load(together / f"{kind}.pt", weights_only=True)
    figures, gradients = little.gradient(kind, Share())
    for name, value in figures.items():
        exact = 1e-9 if value.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(found["figures"][name], value, rtol=exact, atol=exact, msg=name)
    assert gradients.keys() == found["gradients"].keys()
    whole = torch.cat([g.flatten() for g in gradients.values()])
    other = torch.cat([found["gradients"][k].flatten() for k in gradients])
    assert whole.norm() > 0.01 and (whole - other).norm() < 1e-9 * whole.norm()
