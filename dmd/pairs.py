"""Noise-image pairs for the regression loss: a resumable, sharded, checksummed store.

A pair is (z, y): unit noise and what the teacher's deterministic sampler makes of it (DMD section 3.3). The noise is
not stored, since it follows from the seed and the pair's index. Each shard is a safetensors file with a sidecar that
holds its size and SHA-256; a shard without a valid sidecar does not count and is made again, alone.

    pairs/manifest.json            what the pairs are: teacher, sampler, steps, guidance, seed, shapes, shard table
    pairs/00000.safetensors        condition (N,) int64, image (N, C, H, W) float16
    pairs/00000.json               size and sha256 of that file

Where pairs are latents, the images that they decode to can be kept in a folder of the same form (`ImageSpec`), so that
training need not decode them again and again.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dmd import checkpoint, seeding
from dmd.errors import InputError
from dmd.seeding import Stream


@dataclass(frozen=True)
class PairSpec:
    """What determines every pair. Two stores with equal specs hold equal pairs.

    Attributes:
        teacher: SHA-256 of the teacher's weights.
        solver, steps, guidance: how the teacher samples.
        seed: key of noise and conditions.
        conditions: how many conditions there are; pair i has one of them, drawn from the seed.
        prompts: SHA-256 of what they are.
        shape: (C, H, W) of noise and image.
        count: number of pairs.
        shard_size: pairs per shard; also the fixed work unit, so pairs do not depend on how many processes made them.
    """

    teacher: str
    solver: str
    steps: int
    guidance: float
    seed: int
    conditions: int
    prompts: str
    shape: tuple[int, ...]
    count: int
    shard_size: int

    def indices(self, shard: int) -> Tensor:
        """Global indices of a shard's pairs."""
        return torch.arange(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def noise(self, index: Tensor) -> Tensor:
        """Unit noise z (B, C, H, W) of pairs."""
        return seeding.normal(self.seed, Stream.PAIR, 0, index, self.shape)

    def condition(self, index: Tensor) -> Tensor:
        """Number of the condition of each pair, (B,) int64."""
        return seeding.integers(self.seed, Stream.PAIR_LABEL, 0, index, self.conditions)

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)


@dataclass(frozen=True)
class ImageSpec:
    """What determines the stored images of pairs.

    Attributes:
        pairs: of which.
        decoder: SHA-256 of what makes images of them.
        storage: how they are stored.
    """

    pairs: PairSpec
    decoder: str
    storage: str

    def indices(self, shard: int) -> Tensor:
        """Global indices of a shard's pairs."""
        return self.pairs.indices(shard)

    @property
    def shards(self) -> int:
        return self.pairs.shards


Spec = PairSpec | ImageSpec

Sample = Callable[[Tensor, Tensor], Tensor]
"""(unit noise (B, C, H, W), condition numbers (B,)) to the teacher's images in [-1, 1]."""


def missing(folder: Path, spec: Spec) -> list[int]:
    """Shards that are absent, truncated or altered.

    Raises:
        InputError: the folder holds what another spec determines.
    """
    manifest = folder / "manifest.json"
    if manifest.exists():
        _require_same(manifest, spec)
    return [i for i in range(spec.shards) if not _valid(folder, i)]


def make(folder: Path, spec: PairSpec, shards: list[int], sample: Sample) -> Iterator[int]:
    """Make the given shards; yields the number of pairs of each as it is safely on the disk.

    Processes can share the work by taking different shards. `finish` writes the manifest once all are there.
    """

    def tensors(index: Tensor) -> dict[str, Tensor]:
        condition = spec.condition(index)
        return {"condition": condition, "image": sample(spec.noise(index), condition).to("cpu", torch.float16)}

    yield from _make(folder, spec, shards, tensors)


def make_images(
    folder: Path, spec: ImageSpec, shards: list[int], store: "Pairs",
    decode: Callable[[Tensor], Tensor], pack: Callable[[Tensor], Tensor],
) -> Iterator[int]:  # fmt: skip
    """As `make`, of images: `decode` makes them of the samples of pairs, and `pack` what is stored of them."""

    def tensors(index: Tensor) -> dict[str, Tensor]:
        image = decode(store.samples(index))
        _require_finite(image)  # before bytes hide it
        return {"image": pack(image)}

    yield from _make(folder, spec, shards, tensors)


def _make(folder: Path, spec: Spec, shards: list[int], tensors: Callable[[Tensor], dict[str, Tensor]]) -> Iterator[int]:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "manifest.json").exists():
        checkpoint.write_json(folder / "manifest.json", {"spec": _plain(spec), "shards": {}})
    for shard in shards:
        index = spec.indices(shard)
        found = tensors(index)
        _require_finite(found["image"], f" of pair shard {shard}")
        path = folder / f"{shard:05d}.safetensors"
        checkpoint.save_tensors(found, path)
        checkpoint.write_json(path.with_suffix(".json"), checkpoint.describe(path))
        yield len(index)


def _require_finite(image: Tensor, where: str = "") -> None:
    if not bool(torch.isfinite(image).all()):
        raise ArithmeticError(f"the teacher's images{where} are not finite")


def finish(folder: Path, spec: Spec) -> None:
    """Write the manifest with the table of all shards."""
    table = {f"{i:05d}.safetensors": _sidecar(folder, i) for i in range(spec.shards)}
    checkpoint.write_json(folder / "manifest.json", {"spec": _plain(spec), "shards": table})


class Pairs:
    """Read access to a complete store; files are memory-mapped, so only the images that are used cost memory.

    Raises:
        InputError: a shard is missing, truncated or altered.
    """

    def __init__(self, folder: Path, spec: PairSpec):
        shards = _open(folder, spec)
        self.spec = spec
        self._images = [shard["image"] for shard in shards]
        self._condition = torch.cat([shard["condition"] for shard in shards])

    def __len__(self) -> int:
        return self.spec.count

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(y, condition numbers) of pairs `index` (B,): float32 (B, C, H, W) and int64 (B,)."""
        return self.samples(index), self._condition[index]

    def noise(self, index: Tensor) -> Tensor:
        """Their z, float32 (B, C, H, W), on the device of `index`."""
        return self.spec.noise(index)

    def samples(self, index: Tensor) -> Tensor:
        """y of pairs `index` (B,): float32 (B, C, H, W)."""
        return _rows(self._images, self.spec.shard_size, index).float()


class Images:
    """Read access to the complete images of pairs, as `Pairs`.

    Raises:
        InputError: a shard is missing, truncated or altered.
    """

    def __init__(self, folder: Path, spec: ImageSpec):
        self.spec = spec
        self._images = [shard["image"] for shard in _open(folder, spec)]

    def __getitem__(self, index: Tensor) -> Tensor:
        """Images (B, C, H, W) of pairs `index` (B,), in the dtype that is stored."""
        return _rows(self._images, self.spec.pairs.shard_size, index)


def _open(folder: Path, spec: Spec) -> list[dict[str, Tensor]]:
    absent = missing(folder, spec)
    if absent:
        raise InputError(f"{folder} lacks {len(absent)} of {spec.shards} pair shards, first {absent[0]:05d}: make them")
    return [load_file(folder / f"{i:05d}.safetensors") for i in range(spec.shards)]


def _rows(shards: list[Tensor], size: int, index: Tensor) -> Tensor:
    return torch.stack([shards[i // size][i % size] for i in index.tolist()])


def _valid(folder: Path, shard: int) -> bool:
    facts = _sidecar(folder, shard)
    path = folder / f"{shard:05d}.safetensors"
    return facts is not None and path.exists() and checkpoint.describe(path) == facts


def _sidecar(folder: Path, shard: int) -> Mapping[str, object] | None:
    try:
        return json.loads((folder / f"{shard:05d}.json").read_text())
    except (OSError, ValueError):
        return None


def _plain(spec: Spec) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(spec)))


def _require_same(manifest: Path, spec: Spec) -> None:
    try:
        found = dict(json.loads(manifest.read_text())["spec"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{manifest} is damaged: remove the folder {manifest.parent}, its pairs will be made again"
        ) from None
    wanted = _plain(spec)
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(
                f"{manifest.parent} holds pairs with {name} = {found.get(name)!r}, but {value!r} is asked for: "
                f"give another folder, or remove this one"
            )
