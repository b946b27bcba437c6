"""How tests start two processes, each on one thread of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def run(arguments: list[str], timeout: float = 600, **more: str) -> subprocess.CompletedProcess[str]:
    """What became of a script, or of "-m" and a module, with its arguments; `more` is added to the environment."""
    return subprocess.run(
        [*TORCHRUN, *arguments], env=ENVIRONMENT | more, capture_output=True, text=True, timeout=timeout, check=False
    )
