"""Networks behind `dmd.pipeline.Pipeline`: what they are on the disk, and how they are read."""

from pathlib import Path

import torch

from dmd import shipped
from dmd.codec import Codec
from dmd.errors import InputError
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
        InputError: as `pixel.load` and `stable_diffusion.load`, and for a folder of neither.
    """
    source = shipped.resolve(source)
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} has neither model_index.json, as folders of diffusers' pipelines have, nor the config.json "
                "of a pixel network: give the folder of a teacher or student"
            )
        return pixel.load(folder, device, autocast if dtype == torch.float32 else dtype)
    return stable_diffusion.load(source, dtype, device, variant, autocast=autocast)


TINY = "madebyollin/taesd"


def decoder(
    choice: str,
    pipeline: Pipeline,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    flag: str = "--decoder",
) -> Codec:
    """What decodes a pipeline's latents: its own codec ("full"), or a distilled one, of a folder of diffusers'
    AutoencoderTiny or "tiny" for the hub's `TINY`.

    Args:
        dtype: of a distilled one's weights.
        flag: by which it was chosen, for sentences.

    Raises:
        InputError: there is none, it cannot be had, or it decodes other latents.
    """
    if choice == "full":
        return pipeline.codec
    tiny = stable_diffusion.load_tiny(TINY if choice == "tiny" else choice, device, dtype)
    channels, own = tiny.vae.config.latent_channels, pipeline.shape[0]
    if channels != own:
        raise InputError(
            f"{flag} {choice} decodes latents of {channels} channels, but the network makes {own}: give the folder of "
            f"an AutoencoderTiny of its own latents, or leave {flag} out"
        )
    return tiny
