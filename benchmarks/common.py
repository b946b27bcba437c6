"""What every benchmark prints: the machine before, one JSON line after; and how it times."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dmd.build import device_name


def machine() -> dict[str, Any]:
    """Device, versions and commit."""
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": device,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git.stdout.strip() or "unknown",
    }


def say_machine() -> None:
    facts = machine()
    print(", ".join(f"{k} {v}" for k, v in facts.items()), flush=True)


def finish(name: str, results: Any) -> None:
    """The last line of every benchmark."""
    print(json.dumps({"benchmark": name, "machine": machine(), "results": results}))


def seconds(work: Callable[[], object], runs: int, warm_up: int = 2) -> list[float]:
    """Wall times of `runs` calls after some to warm up; the device is waited for."""
    times = []
    for i in range(warm_up + runs):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= warm_up:
            times.append(time.perf_counter() - started)
    return times


def middle(times: list[float]) -> tuple[float, float]:
    """Median, and half of the range between the quartiles."""
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / 2


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    median, _ = middle(seconds(lambda: a @ b, 7))
    return 2 * n**3 / median


def peak_memory() -> float:
    """MiB that the device has held at most; without a GPU, the process (its resident set)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
