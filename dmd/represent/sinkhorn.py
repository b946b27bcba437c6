"""Sinkhorn-Knopp in the log domain, over all processes: soft assignments that use every prototype alike.

SwAV (Caron et al. 2020, arXiv 2006.09882, section 3.2), as iBOT heads take it in SynCLR (arXiv 2312.17742). Published
code exponentiates the logits first: in float32 it overflows from 3.5 on at temperature 0.04, and a prototype that no
sample is near gives 0/0. Subtracting each sample's maximum first is another iteration, not the same one.
"""

import torch
from torch import Tensor

from dmd import processes
from dmd.represent.losses import full


@torch.no_grad()
def assignments(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Soft assignments, float32 or wider; each row has the sum 1.

    Prototypes (columns) are divided by their sums over all samples of all processes, then samples (rows) by theirs, in
    turn; constant factors of the published code cancel.

    Args:
        logits: (M, K) samples by prototypes; M may be 0 on some processes.
        temperature: the logits are divided by it.
        iterations: how many times both are done.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logs = full(logits) / temperature  # of a step's tensors the largest, so what follows is in place
        for _ in range(iterations):
            logs -= _columns(logs)
            logs -= logs.logsumexp(1, keepdim=True)
        return logs.exp_()


def _columns(logs: Tensor) -> Tensor:
    """log of the sum of exponentials of each column over all processes, (K,)."""
    top = logs.amax(0) if len(logs) else logs.new_full(logs.shape[1:], torch.finfo(logs.dtype).min)
    top = processes.largest(top)
    return processes.total((logs - top).exp_().sum(0)).log() + top
