"""Two processes train tokenizer and transformer as one does with the whole batch."""

from pathlib import Path

import pytest
import tiny_tasks
import torch
import two_processes

from dmd.batches import Share


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of what two processes have trained."""
    folder = tmp_path_factory.mktemp("together")
    done = two_processes.run([str(Path(tiny_tasks.__file__)), str(folder)])
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
