"""Atomic checkpoints: a folder is either complete and verified, or it does not count.

A checkpoint is written to a hidden folder, every file is flushed to the disk, a manifest with sizes and SHA-256 sums
goes last, and only then is the folder renamed to `step-NNNNNNNN`; older ones are removed afterwards. So a kill or a
full disk at any moment leaves the previous checkpoint usable. Nothing is pickled: tensors are safetensors, the rest is
JSON.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd import sharding
from dmd.errors import InputError

_NAME = re.compile(r"step-(\d{8})")
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class State:
    """Tensors of a checkpoint, by file and name, and what its optimisers have besides; whole, but not copied."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    optimizers: Mapping[str, Any]


def collect(modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer], keep: bool = True) -> State:
    """What `write` stores of modules and optimisers, by name. With sharded ones all processes must call it; those that
    do not `keep` it get nothing."""
    tensors = {name: sharding.whole_state(module.state_dict(), keep) for name, module in modules.items()}
    scalars = {}
    for name, optimizer in optimizers.items():
        flat, scalars[name] = _flatten_optimizer(optimizer)
        tensors[f"optimizer-{name}"] = sharding.whole_state(flat, keep)
    return State(tensors, scalars)


def save(
    root: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    extra: Mapping[str, Any],
    keep: int,
) -> Path:
    """`write` what `collect` finds, in a single process."""
    return write(root, step, collect(modules, optimizers), extra, keep)


def write(root: Path, step: int, state: State, extra: Mapping[str, Any], keep: int) -> Path:
    """Write `root/step-NNNNNNNN` and keep the newest `keep` checkpoints.

    Args:
        root: folder of all checkpoints of a run; made if missing.
        step: number of finished steps.
        state: what to store.
        extra: JSON-serialisable facts that `load` returns.
        keep: how many checkpoints to keep, at least 1.

    Raises:
        OSError: it could not be written (a full disk, ...); older checkpoints are as they were.
    """
    root.mkdir(parents=True, exist_ok=True)
    final, temporary = root / f"step-{step:08d}", root / f".tmp-step-{step:08d}"
    remove_leftovers(root)
    temporary.mkdir()
    try:
        for name, tensors in state.tensors.items():
            _write_tensors(temporary / f"{name}.safetensors", tensors)
        facts = {"step": step, "optimizers": dict(state.optimizers), "extra": dict(extra)}
        write_json(temporary / "state.json", facts)
        write_json(temporary / _MANIFEST, {"files": {p.name: describe(p) for p in sorted(temporary.iterdir())}})
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_folder(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    older = [p for p in steps(root) if p < final]  # a newer one that `latest` skipped as damaged does not count
    for old in older[: max(0, len(older) + 1 - keep)]:
        shutil.rmtree(old)
    return final


def steps(root: Path) -> list[Path]:
    """Checkpoint folders by rising step, complete or not."""
    return sorted(p for p in root.glob("step-*") if _NAME.fullmatch(p.name)) if root.is_dir() else []


def latest(root: Path) -> Path | None:
    """The newest checkpoint whose files all have the size and checksum of its manifest; None if there is none."""
    return next((p for p in reversed(steps(root)) if verify(p)), None)


def verify(path: Path) -> bool:
    """Whether a folder's manifest is there and agrees with its files."""
    try:
        files = json.loads((path / _MANIFEST).read_text())["files"]
        return "state.json" in files and all(describe(path / name) == facts for name, facts in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def load(
    path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
) -> tuple[int, dict[str, Any]]:
    """Restore what `save` stored; returns (step, extra).

    Raises:
        InputError: the checkpoint belongs to another architecture.
    """
    state = json.loads((path / "state.json").read_text())
    for name, module in modules.items():
        load_weights(module, path / f"{name}.safetensors")
    for name, optimizer in optimizers.items():
        tensors = load_file(path / f"optimizer-{name}.safetensors")
        optimizer.load_state_dict(_unflatten_optimizer(tensors, state["optimizers"][name]))
        _match_layout(optimizer)
    return state["step"], state["extra"]


def load_weights(module: nn.Module, path: Path) -> None:
    """Load safetensors weights into a module of the same architecture.

    Raises:
        InputError: the file is missing or damaged, or its tensors are not those of the module.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give a folder that holds the weights as safetensors") from None
    except Exception as error:  # safetensors raises its own type for damaged headers
        raise InputError(f"{path} is not a readable safetensors file ({error})") from None
    fill(module, tensors, path)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give a module the tensors of a file, all of them and no others.

    Raises:
        InputError: they are not those of the module.
    """
    expected = module.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        want = tuple(expected[name].shape) if name in expected else None
        got = tuple(tensors[name].shape) if name in tensors else None
        if want != got:
            raise InputError(
                f"{path} belongs to another architecture: tensor {name!r} is {got or 'absent'} there, "
                f"but this network has {want or 'none'}"
            )
    module.load_state_dict({name: sharding.like(tensor, expected[name]) for name, tensor in tensors.items()})


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's weights as safetensors, atomically."""
    save_tensors(module.state_dict(), path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, flushed to the disk and atomically; `metadata` goes to the file's header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        _write_tensors(temporary, tensors, metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's weights: names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_json(path: Path, value: Any) -> None:
    """Write JSON and flush it to the disk, atomically."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(root: Path) -> None:
    """Remove what a killed save left."""
    for path in root.glob(".tmp-step-*"):
        shutil.rmtree(path)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    try:
        values = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(values, path, dict(metadata) if metadata else None)
    except SafetensorError as error:  # its own type, also for a full disk; the number stands in its text
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error
    _sync_file(path)


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flatten_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state to tensors by "parameter.name", and the rest, which JSON can hold.

    A name leads through nested mappings, and steps may be numbers: bitsandbytes has both.
    """
    state = optimizer.state_dict()
    flat = {f"{p}.{k}": v for p, entry in state["state"].items() for k, v in _flatten(entry).items()}
    tensors = {k: v for k, v in flat.items() if isinstance(v, Tensor)}
    others = {k: v for k, v in flat.items() if not isinstance(v, Tensor)}
    return tensors, {"param_groups": state["param_groups"], "state": others}


def _flatten(entry: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in entry.items():
        nested = isinstance(value, Mapping)
        flat |= {f"{name}.{k}": v for k, v in _flatten(value).items()} if nested else {name: value}
    return flat


def _unflatten_optimizer(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars.get("state", {})}.items():
        parameter, *path, name = key.split(".")
        entry = state.setdefault(int(parameter), {})
        for part in path:
            entry = entry.setdefault(part, {})
        entry[name] = value
    return {"state": state, "param_groups": scalars["param_groups"]}


def _match_layout(optimizer: Optimizer) -> None:
    """Lay moments out in memory as their parameters are, which files forget.

    Fused optimisers walk both in storage order: contiguous moments of a channels-last weight would be those of other
    elements. The copy also lets go of the file, which `load_file` maps into memory.
    """
    for parameter, entry in optimizer.state.items():
        _lay_out(entry, parameter)


def _lay_out(entry: dict[str, Any], parameter: Tensor) -> None:
    for name, value in entry.items():
        if isinstance(value, dict):
            _lay_out(value, parameter)
        elif isinstance(value, Tensor) and value.shape != parameter.shape:
            entry[name] = value.clone()
        elif isinstance(value, Tensor):
            value = sharding.like(value, parameter)
            entry[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
