"""Stable Diffusion 1.x and 2.x as a denoiser: any pipeline in diffusers' folder layout, from the disk or the hub.

Only safetensors are read, and no code but that of diffusers and transformers runs.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd import checkpoint, codec
from dmd.codec import Codec, cast
from dmd.denoiser import Cond, NetworkDenoiser
from dmd.errors import InputError
from dmd.noise import DDPM
from dmd.teachers import export, layout, lora


class TimestepNet(nn.Module):
    """Adapter: tells a UNet the table index of the very noise level that x_t has.

    Args:
        unet: diffusers' UNet2DConditionModel, in any precision; inputs are cast to it.
        schedule: the table that t is read in.
    """

    def __init__(self, unet: nn.Module, schedule: DDPM):
        super().__init__()
        self.unet = unet
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """x_t (B, c, h, w), t (B,) in [0, 1], text (B, L, D); the network's raw output, shaped like x_t."""
        index = self.schedule.index(t)
        return self.unet(cast(x_t, self.unet), index, cast(text, self.unet), return_dict=False)[0]


class TextEncoder:
    """Prompts to the conditions of a UNet.

    Args:
        tokenizer, network: transformers' CLIPTokenizer and CLIPTextModel.
    """

    def __init__(self, tokenizer: Any, network: Any):
        self.tokenizer = tokenizer
        self.network = network
        self.length = min(tokenizer.model_max_length, network.config.max_position_embeddings)
        self._warned = False

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"text": (B, L, D) float32} on the network's device, L = 77 tokens for Stable Diffusion.

        Longer prompts are cut; the first that is cut gives a warning, once per encoder.
        """
        ids = self._tokens(prompts, truncation=False)
        too_long = [len(row) for row in ids if len(row) > self.length]
        if too_long:
            self._warn(too_long[0])
            ids = self._tokens(prompts, truncation=True)
        return {"text": self.network(torch.tensor(ids, device=self.network.device))[0].float()}

    def _tokens(self, prompts: Sequence[str], truncation: bool) -> list[list[int]]:
        found = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=truncation, verbose=False
        )
        ids: list[list[int]] = found.input_ids
        return ids

    @functools.cached_property
    def null(self) -> Cond:
        """The condition of the empty prompt, one row; computed once."""
        return self.encode([""])

    def _warn(self, count: int) -> None:
        if not self._warned:
            warnings.warn(
                f"a prompt has {count} tokens and the text encoder reads {self.length}: the last "
                f"{count - self.length} are dropped (further such prompts are not reported)",
                stacklevel=4,
            )
        self._warned = True


@dataclass(frozen=True, eq=False)
class StableDiffusion:
    """A pipeline, read as a denoiser of latents.

    Attributes:
        denoiser: conditioned on {"text": (B, L, D)}; x0 are latents of about unit variance.
        text: prompts to conditions; frozen.
        codec: images in [-1, 1] to latents and back; frozen.
        settings: what its configs say.
        folder: where it was read.
        name: of that, for those who do not know this machine.
        variant: of its weights' files.
    """

    denoiser: NetworkDenoiser
    text: TextEncoder
    codec: Codec
    settings: layout.Settings
    folder: Path
    name: str
    variant: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.settings.shape

    def encode(self, prompts: Sequence[str]) -> Cond:
        """See `TextEncoder.encode`."""
        return self.text.encode(prompts)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def null(self) -> Cond:
        """The empty condition, one row."""
        return self.text.null

    def digest(self) -> str:
        """SHA-256 of the weights of UNet and text encoder."""
        return checkpoint.digest(nn.ModuleList([self.denoiser.net, self.text.network]))

    def save(self, denoiser: NetworkDenoiser, folder: Path, figures: Mapping[str, object]) -> None:
        """See `export.save_student`. Of an adapted network also the adapters alone, in a folder beside it."""
        licence = layout.licence(self.folder)
        card = export.model_card(folder.name, self.name, figures, licence)
        weights = {name.removeprefix("unet."): v for name, v in lora.plain_state(denoiser.net).items()}
        export.save_student(weights, self.folder, folder, variant=self.variant, card=card)
        if isinstance(denoiser.net, lora.AdaptedNet):
            beside = folder.with_name(f"{folder.name}-lora")
            card = export.adapters_card(beside.name, self.name, figures, licence)
            export.save_adapters(denoiser.net.matrices(), self.settings, beside, card)


def load(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    revision: str | None = None,
    autocast: torch.dtype | None = None,
) -> StableDiffusion:
    """Read a Stable Diffusion pipeline.

    Args:
        source: a folder in diffusers' layout (with model_index.json), or an id on the hub, OWNER/NAME.
        dtype: of the weights of all three networks; schedules, x0 and images are float32 whatever it is.
        variant: e.g. "fp16", to read `diffusion_pytorch_model.fp16.safetensors`.
        revision: branch, tag or commit on the hub.
        autocast: see `NetworkDenoiser`.

    Raises:
        InputError: another kind of pipeline, missing or damaged files, pickles only, a schedule or prediction type that
            is not of Stable Diffusion, or a hub id that cannot be had.
    """
    folder = layout.locate(source, variant, revision)
    settings = layout.read(folder)
    for part in layout.STEMS:
        layout.weights(folder, part, variant)
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    unet = _network(UNet2DConditionModel, folder / "unet", variant, dtype, device)
    vae = _network(classes[settings.vae], folder / "vae", variant, dtype, device).requires_grad_(False)
    make = codec.KL if settings.vae == "AutoencoderKL" else codec.Tiny
    return StableDiffusion(
        NetworkDenoiser(TimestepNet(unet, settings.schedule), settings.schedule, settings.prediction, autocast).eval(),
        text_encoder(folder, variant, dtype, device),
        make(vae, vae.config.scaling_factor),
        settings,
        folder,
        export.public_name(source),
        variant,
    )


def text_encoder(
    folder: Path,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """The text encoder of a pipeline's folder with its tokenizer, frozen.

    Raises:
        InputError: one of them is missing or damaged, or they do not belong together.
    """
    from transformers import CLIPTextModel

    words = tokenizer(folder / "tokenizer")
    network = _network(CLIPTextModel, folder / "text_encoder", variant, dtype, device).requires_grad_(False)
    if len(words) > network.config.vocab_size:
        raise InputError(
            f"{folder / 'tokenizer'} has {len(words)} tokens, but the text encoder knows "
            f"{network.config.vocab_size}: they are not of one pipeline"
        )
    return TextEncoder(words, network)


def load_tiny(source: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> codec.Tiny:
    """A tiny autoencoder (madebyollin/taesd): a folder of diffusers' AutoencoderTiny, or its id on the hub.

    Raises:
        InputError: there is no such folder, no such id or none that can be had now, or it is something else.
    """
    from diffusers import AutoencoderTiny

    try:
        vae = AutoencoderTiny.from_pretrained(source, use_safetensors=True)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{source} is no AutoencoderTiny that can be read or had from the hub ({layout.first_sentence(error)}): "
            "give the folder of one"
        ) from None
    vae = nn.Module.to(vae, device=device, dtype=dtype).eval().requires_grad_(False)
    return codec.Tiny(vae, vae.config.scaling_factor)


def _network(kind: Any, folder: Path, variant: str | None, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A network of diffusers or transformers. Both would leave missing tensors at random with a mere warning."""
    try:
        network, info = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, variant=variant, output_loading_info=True
        )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{folder} holds no readable {kind.__name__}: {layout.first_sentence(error)}") from None
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise InputError(f"{folder} lacks tensors of its {kind.__name__}: {len(wrong)} of them, such as {wrong[0]!r}")
    network = nn.Module.to(network, device=device, dtype=dtype)  # diffusers' own `to` logs an empty notice
    return network.to(memory_format=torch.channels_last).eval()  # which convolutions are faster in, everywhere


def tokenizer(path: Path) -> Any:
    """transformers' CLIPTokenizer of a folder. Raises InputError if there is none, or a damaged one."""
    from transformers import CLIPTokenizer

    try:
        names = {p.name for p in path.iterdir()}
        if not ({"vocab.json", "merges.txt"} <= names or "tokenizer.json" in names):
            raise OSError("it needs vocab.json and merges.txt, or tokenizer.json")
        return CLIPTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for damaged files
        raise InputError(f"{path} holds no readable CLIP tokenizer: {layout.first_sentence(error)}") from None
