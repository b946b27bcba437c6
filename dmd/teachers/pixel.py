"""Pixel-space denoisers on the disk: `config.json` beside `model.safetensors`. Teachers and students look the same."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd import checkpoint
from dmd.codec import Codec, Identity
from dmd.denoiser import Cond, NetworkDenoiser, karras
from dmd.errors import InputError
from dmd.noise import Karras
from dmd.teachers.unet import KarrasNet, UNet


@dataclass(frozen=True)
class PixelConfig:
    """Everything that builds a pixel denoiser.

    Attributes:
        classes: names of the labels.
        channels, size: of the images.
        width, multipliers, blocks, attention: see `dmd.teachers.unet.UNet`.
        sigma_data: standard deviation of the images in [-1, 1].
        sigma_min, sigma_max, rho: see `dmd.noise.Karras`.
    """

    classes: tuple[str, ...]
    channels: int
    size: int
    width: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def null(self) -> Cond:
        """The empty condition, one row."""
        return {"label": torch.tensor([len(self.classes)])}


def labels(numbers: Tensor) -> Cond:
    """Class numbers (B,) as the condition of a class-conditional network."""
    return {"label": numbers}


@dataclass(frozen=True, eq=False)
class Pixel:
    """A class-conditional denoiser of pixels as a `dmd.pipeline.Pipeline`; prompts are names of classes."""

    denoiser: NetworkDenoiser
    config: PixelConfig
    codec: Codec = field(default_factory=Identity)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.config.shape

    @property
    def classes(self) -> tuple[str, ...]:
        return self.config.classes

    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"label": (B,) int64}. Raises InputError for a name that is not of a class."""
        classes = self.config.classes
        unknown = [name for name in prompts if name not in classes]
        if unknown:
            raise InputError(f"there is no class {unknown[0]!r}: this network knows {', '.join(classes)}")
        return labels(torch.tensor([classes.index(name) for name in prompts], dtype=torch.int64))

    def null(self) -> Cond:
        return self.config.null()

    def digest(self) -> str:
        return checkpoint.digest(self.denoiser.net)

    def save(self, denoiser: NetworkDenoiser, folder: Path, figures: Mapping[str, object]) -> None:
        save(denoiser.net.get_submodule("unet"), self.config, folder)
        rows = [f"| {what} | {value} |" for what, value in figures.items()]
        text = [
            "# A student of one step",
            "",
            "`python sample.py CLASS --student FOLDER`",
            "",
            "| | |",
            "|---|---|",
            *rows,
        ]
        (folder / "README.md").write_text("\n".join([*text, ""]), encoding="utf-8")


def build(config: PixelConfig, seed: int = 0, autocast: torch.dtype | None = None) -> NetworkDenoiser:
    """A denoiser with fresh weights drawn from `seed`; the global random state is left as it was."""
    schedule = Karras(config.sigma_min, config.sigma_max, config.rho)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(
            config.channels, len(config.classes), config.width, config.multipliers, config.blocks, config.attention
        )
    net = KarrasNet(unet, schedule, config.sigma_data)
    return NetworkDenoiser(net, schedule, karras(config.sigma_data), autocast)


def save(unet: torch.nn.Module, config: PixelConfig, folder: Path) -> None:
    """Write a folder that `load` reads. The weights come last: where they are, the folder is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(folder / "config.json", {"kind": "pixel", **asdict(config)})
    checkpoint.save_weights(unet, folder / "model.safetensors")


def load(folder: Path, device: torch.device | str = "cpu", autocast: torch.dtype | None = None) -> Pixel:
    """A pipeline from a folder that `save` wrote, or from an own state dict with such a `config.json`.

    Raises:
        InputError: files missing or damaged, unknown or missing keys, weights of another architecture.
    """
    config = read_config(folder)
    try:
        denoiser = build(config, autocast=autocast)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'} describes no network that can be built: {error}") from None
    checkpoint.load_weights(denoiser.net.get_submodule("unet"), folder / "model.safetensors")
    denoiser = denoiser.to(device).eval()
    denoiser.net.to(memory_format=torch.channels_last)
    return Pixel(denoiser, config)


def read_config(folder: Path) -> PixelConfig:
    """`config.json` of a folder. Raises InputError in one sentence for whatever is wrong with it."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
        kind = raw.pop("kind", None)
    except OSError:
        raise InputError(
            f"{path} does not exist: give the folder of a teacher or student (config.json, model.safetensors)"
        ) from None
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{path} is not a JSON object: it should describe a pixel denoiser") from None
    if kind != "pixel":
        raise InputError(f"{path} has kind {kind!r}: this command reads 'pixel'")
    known = {f.name for f in fields(PixelConfig)}
    unknown = sorted(raw.keys() - known)
    if unknown:
        raise InputError(f"{path} has the unknown key {unknown[0]!r}: known are {', '.join(sorted(known))}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    try:
        return PixelConfig(**values)
    except TypeError as error:
        raise InputError(f"{path} is incomplete: {error}") from None
