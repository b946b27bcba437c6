"""Two processes train tokenizer and transformer as one does with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_tasks
import torch

from dmd.batches import Share

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of what two processes have trained."""
    folder = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(Path(tiny_tasks.__file__)), str(folder)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", tiny_tasks.TASKS)
def test_two_processes_train_as_one_does(together, name):
    """Codes chosen at first, their moving averages, replaced ones and the adaptive weight are of the whole batch."""
    one = tiny_tasks.TASKS[name](Share())
    two = [torch.load(together / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    for key, expected in one["last"].items():
        assert torch.equal(two[0]["last"][key], two[1]["last"][key]), key
        torch.testing.assert_close(two[0]["last"][key], expected, rtol=1e-4, atol=1e-5, msg=key)
    for found, expected in zip(two[0]["figures"], one["figures"], strict=True):
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)
    moved = [(v - one["first"][k]).norm() for k, v in one["last"].items() if v.is_floating_point()]
    assert max(moved) > 0.01, "hardly anything moved, so that agreement shows nothing"
    if name == "tokenizing":
        sizes = one["last"]["net.quantizer._codebook.cluster_size"]
        assert 0 < (sizes == tiny_tasks.DEAD).sum() < sizes.numel(), "no code was replaced in the last step"
        assert one["figures"][-1]["health/adaptive_weight"] > 0
