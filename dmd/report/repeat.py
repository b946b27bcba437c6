"""How to do a run again: its command, its options and where it ran."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd.plots import number
from dmd.report.files import RunFiles


@dataclass(frozen=True)
class Difference:
    """An option that is not as in the preset."""

    flag: str
    here: str
    preset: str


def command(run: RunFiles) -> list[str]:
    """The command line of the run in pieces that belong on one line, ready to paste; empty if it is not known."""
    argv = run.environment.get("command")
    if not isinstance(argv, list) or not argv or not all(isinstance(a, str) for a in argv):
        return []
    program = Path(argv[0])
    start = [program.name]
    if program.name == "__main__.py":
        start = [*_launcher(run), "-m", program.parent.name]
    elif program.suffix == ".py":
        start = [*_launcher(run), argv[0]]
    pieces = [start]
    for argument in argv[1:]:
        if argument.startswith("--"):
            pieces.append([])
        pieces[-1].append(argument)
    return [shlex.join(p) for p in pieces]


def _launcher(run: RunFiles) -> list[str]:
    processes = number(run.environment.get("processes"))
    if processes is None or processes <= 1:
        return ["python"]
    return ["accelerate", "launch", "--num_processes", f"{processes:.0f}"]


ENVIRONMENT = {
    "dmd": "dmd",
    "commit": "commit",
    "torch": "PyTorch",
    "python": "Python",
    "platform": "system",
    "device": "device",
    "processes": "processes",
    "threads": "threads per process",
    "cpus": "CPU cores",
}


def environment(run: RunFiles) -> list[tuple[str, str]]:
    known = run.environment
    names = [*ENVIRONMENT, *sorted(set(known) - {*ENVIRONMENT, "command"})]
    return [(ENVIRONMENT.get(n, n), str(known[n])) for n in names if known.get(n) is not None]


def differences(run: RunFiles) -> tuple[str, list[Difference]]:
    """The preset's name, and the options in which the run differs from it."""
    from dmd.config import PRESETS, Config
    from dmd.settings import to_json

    name = run.config.get("preset")
    default = PRESETS.get(name, Config()) if isinstance(name, str) else Config()
    before, here = dict(_leaves(to_json(default))), dict(_leaves(run.config))
    found = [
        Difference("--" + key.rpartition(".")[2].replace("_", "-"), _value(value), _value(before.get(key)))
        for key, value in here.items()
        if key != "preset" and (key not in before or before[key] != value)
    ]
    return default.preset, found


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _value(value: Any) -> str:
    """An option's value as on the command line."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
