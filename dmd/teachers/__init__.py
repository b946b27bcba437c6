"""Networks behind `dmd.pipeline.Pipeline`: what they are on the disk, and how they are read."""

from pathlib import Path

import torch

from dmd import shipped
from dmd.codec import Codec
from dmd.pipeline import Pipeline
from dmd.teachers import pixel, stable_diffusion


def load(
    source: str | Path,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    variant: str | None = None,
) -> Pipeline:
    """A teacher or student: a folder that `pixel.save` wrote, or a Stable Diffusion pipeline (folder, id on
    the hub, or the name of one that ships), whose weights may be of a variant ("fp16").

    Raises:
        InputError: as `pixel.load` and `stable_diffusion.load`.
    """
    source = shipped.resolve(source)
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        return pixel.load(folder, device, autocast)
    return stable_diffusion.load(source, device=device, autocast=autocast, variant=variant)


TINY = "madebyollin/taesd"


def tiny_codec(source: str, device: torch.device | str) -> Codec:
    """A distilled decoder: a folder of diffusers' AutoencoderTiny, or "tiny" for the hub's `TINY`.

    Raises:
        InputError: there is none, or it cannot be had.
    """
    return stable_diffusion.load_tiny(TINY if source == "tiny" else source, device)
