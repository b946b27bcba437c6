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
    dtype: torch.dtype = torch.float32,
) -> Pipeline:
    """A teacher or student: a folder that `pixel.save` wrote, or a Stable Diffusion pipeline (folder, id on
    the hub, or the name of one that ships), whose weights may be of a variant ("fp16").

    Args:
        autocast: dtype of the denoiser's arithmetic, with weights that stay as they are: for training.
        dtype: of the weights of all networks of a Stable Diffusion: for sampling. A pixel network keeps its own, and
            takes this for `autocast`.

    Raises:
        InputError: as `pixel.load` and `stable_diffusion.load`.
    """
    source = shipped.resolve(source)
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        return pixel.load(folder, device, autocast if dtype == torch.float32 else dtype)
    return stable_diffusion.load(source, dtype, device, variant, autocast=autocast)


TINY = "madebyollin/taesd"


def tiny_codec(source: str, device: torch.device | str) -> Codec:
    """A distilled decoder: a folder of diffusers' AutoencoderTiny, or "tiny" for the hub's `TINY`.

    Raises:
        InputError: there is none, or it cannot be had.
    """
    return stable_diffusion.load_tiny(TINY if source == "tiny" else source, device)
