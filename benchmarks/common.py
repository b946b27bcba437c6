"""What every benchmark prints: the machine before, one JSON line after; and how it times."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dmd.build import device_name
from dmd.checkpoint import write_json

HERE = Path(__file__).parent
PACKAGES = ("diffusers", "transformers", "accelerate")


def plain_parser(text: str | None) -> argparse.ArgumentParser:
    """Flags of a command whose help is its docstring as it stands."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def parser(text: str | None) -> argparse.ArgumentParser:
    """A benchmark's flags: as above, and `--json`."""
    found = plain_parser(text)
    found.add_argument("--json", type=Path, metavar="FILE", help="write the last line there too")
    return found


def machine() -> dict[str, Any]:
    """Device, versions and commit."""
    gpu = torch.cuda.is_available()
    return {
        "device": device_name(torch.device("cuda" if gpu else "cpu")),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit that runs; "+changes" if files differ from it, other than measurements that lie in the repository.

    Where there is no git (a copy on another machine), DMD_COMMIT may say it.
    """
    done = [
        subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False)
        for arguments in (
            ("rev-parse", "--short", "HEAD"),
            ("status", "--porcelain", "-uno", "--", "..", ":!results", ":!RESULTS.md"),
        )
    ]
    if done[0].returncode:
        return os.environ.get("DMD_COMMIT", "unknown")
    return done[0].stdout.strip() + ("+changes" if done[1].stdout.strip() else "")


def say_machine() -> None:
    facts = machine()
    print(", ".join(f"{k} {v}" for k, v in facts.items()), flush=True)


def finish(name: str, results: Any, file: Path | None) -> None:
    """The last line of every benchmark; also into `file`, atomically."""
    arguments = without_places(sys.argv[1:])
    line = {"benchmark": name, "machine": machine(), "arguments": arguments, "results": results}
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, line)
    print(json.dumps(line))


def without_places(arguments: Sequence[str]) -> list[str]:
    """A command's arguments but for where things lay on its machine: of an absolute path only the last name stays."""
    pairs = zip(("", *arguments), arguments, strict=False)
    kept = [word for before, word in pairs if not {before, word} & {"--json", "--plot", "--folder"}]
    return [Path(word).name if Path(word).is_absolute() else word for word in kept]


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


def ratio(a: list[float], b: list[float]) -> tuple[float, float]:
    """Of two works that were timed in turns: the median of a / b over the turns, and half of their quartiles' range."""
    return middle([x / y for x, y in zip(a, b, strict=True)])


def in_turns(todo: Mapping[str, Callable[[], object]], runs: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Wall times of every work, `runs` times each, in turns, so that a busy moment of the machine meets all.

    The order is turned about in every other round: what comes after a long work finds another cache than what comes
    before it.
    """
    times: dict[str, list[float]] = {name: [] for name in todo}
    for work in todo.values():
        seconds(work, 0, warm_up)
    for run in range(runs):
        for name in list(todo)[:: -1 if run % 2 else 1]:
            times[name] += seconds(todo[name], 1, 0)
    return times
