"""A miniature Stable Diffusion: the classes and the folder layout of version 1.5, at a thousandth of its size.

It is for a closed world of captions, so its tokenizer knows that world's words whole (and any other text by bytes), and
its text encoder is taught what they say (`Describer`) before the UNet, for which it is frozen, as CLIP's is.
"""

import copy
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd import checkpoint, codec
from dmd.denoiser import NetworkDenoiser, velocity
from dmd.noise import DDPM
from dmd.teachers import original
from dmd.teachers.stable_diffusion import TimestepNet

SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
SPECIAL |= {"unk_token": SPECIAL["eos_token"], "pad_token": SPECIAL["eos_token"]}


@dataclass(frozen=True)
class MiniatureConfig:
    """Sizes of the three networks.

    Attributes:
        size: height and width of the images; 2^(len(vae_widths) - 1) times those of the latents.
        latent_channels: of the latents.
        vae_widths, unet_widths: channels of each resolution, one block each; multiples of 8.
        text_width, text_layers: of the text encoder.
        heads: of all attention.
        tokens: length of every encoded prompt.
    """

    size: int = 64
    latent_channels: int = 8
    vae_widths: tuple[int, ...] = (16, 32, 64, 64)
    unet_widths: tuple[int, ...] = (64, 112)
    text_width: int = 128
    text_layers: int = 2
    heads: int = 4
    tokens: int = 24

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents."""
        side = self.size // 2 ** (len(self.vae_widths) - 1)
        return self.latent_channels, side, side


def autoencoder(config: MiniatureConfig) -> Any:
    """diffusers' AutoencoderKL with fresh weights from torch's global random state.

    One group in all normalisations: the channels of flat colours differ in nothing but their levels, which groups of
    two channels each would take away. Posteriors begin narrow, or else their noise drowns the first thousand updates.
    """
    from diffusers import AutoencoderKL

    levels = len(config.vae_widths)
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.vae_widths,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=1,
        sample_size=config.size,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.quant_conv.weight[config.latent_channels :] *= 0.1
        vae.quant_conv.bias[config.latent_channels :] = -4.0
    return vae


def denoiser(config: MiniatureConfig, autocast: torch.dtype | None = None) -> NetworkDenoiser:
    """A UNet with fresh weights from torch's global random state, conditioned on {"text": (B, L, text_width)}.

    It predicts v on Stable Diffusion's DDPM table, as version 2.1 does: at t = 1, where a student works, an error of
    the network is then one of x0, while that of a noise-predicting network is multiplied by sigma / alpha = 14.6.
    """
    from diffusers import UNet2DConditionModel

    levels = len(config.unet_widths)
    unet: Any = UNet2DConditionModel(
        sample_size=config.shape[1],
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=config.unet_widths,
        layers_per_block=1,
        cross_attention_dim=config.text_width,
        attention_head_dim=config.heads,  # diffusers means their number
        norm_num_groups=8,
    )
    schedule = DDPM()
    return NetworkDenoiser(TimestepNet(unet, schedule), schedule, velocity, autocast)


def text_encoder(config: MiniatureConfig, vocabulary: int) -> Any:
    """transformers' CLIPTextModel with fresh weights from torch's global random state.

    Args:
        vocabulary: how many tokens there are; the last two are the marks of begin and end.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.tokens,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


class Describer(nn.Module):
    """A text encoder with one linear answer to each of some questions, read from every token from the end mark on.

    CLIP's encoder comes to Stable Diffusion from 400 million captioned images. This one learns what its captions say
    from the captions alone; the UNet then finds all of it, linearly, in each of the last tokens.

    Args:
        text: transformers' CLIPTextModel.
        answers: how many each question has.
    """

    def __init__(self, text: Any, answers: Sequence[int]):
        super().__init__()
        self.text = text
        self.answers = list(answers)
        self.head = nn.Linear(text.config.hidden_size, sum(answers))

    def forward(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """tokens (B, L) int64; for each question the scores (P, answers) of the P tokens from the end mark on, and the
        rows (P,) that those are of."""
        row, column = (tokens == self.text.config.eos_token_id).nonzero(as_tuple=True)
        scores = self.head(self.text(tokens)[0][row, column])
        return list(scores.split(self.answers, dim=1)), row


def common_words(captions: Sequence[str], count: int) -> list[str]:
    """The most frequent words of captions, in alphabetical order, at most `count`."""
    counts = Counter(word for text in captions for word in text.lower().split() if word.isascii())
    return sorted(word for word, _ in counts.most_common(count))


def write_tokenizer(words: Sequence[str], length: int, folder: Path) -> int:
    """The files of a CLIPTokenizer that has each of `words` as one token and every byte besides; its token count."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges: dict[tuple[str, str], int] = {}  # to their ranks; a later one ranks lower, and so undoes no earlier word
    for word in words:
        while len(parts := _byte_pairs(word, merges)) > 1:
            merges[parts[0], parts[1]] = len(merges)
    whole = dict.fromkeys(a + b for a, b in merges)
    tokens = [*letters, *(c + "</w>" for c in letters), *whole, *list(SPECIAL.values())[:2]]
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
    _write(folder / "tokenizer_config.json", settings | SPECIAL)
    _write(folder / "special_tokens_map.json", SPECIAL)
    return len(tokens)


def _byte_pairs(word: str, merges: Mapping[tuple[str, str], int]) -> list[str]:
    """What byte-pair encoding makes of a word: the neighbours of the best rank are joined until none is left."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while pairs := [pair for pair in itertools.pairwise(parts) if pair in merges]:
        best = min(pairs, key=lambda pair: merges[pair])
        at = list(itertools.pairwise(parts)).index(best)
        parts[at : at + 2] = ["".join(best)]
    return parts


def save(vae: Any, net: TimestepNet, text: Any, scale: float, folder: Path) -> None:
    """Write a pipeline folder in float16 around the tokenizer that is there already.

    Args:
        vae: diffusers' AutoencoderKL.
        net: the UNet.
        text: transformers' CLIPTextModel.
        scale: latents times this have unit variance.
        folder: has `tokenizer/`.
    """
    import diffusers
    from diffusers import DDIMScheduler

    schedule = net.schedule
    vae = copy.deepcopy(vae)
    vae.register_to_config(scaling_factor=scale)
    networks: Mapping[str, Any] = {"vae": vae, "unet": net.unet, "text_encoder": text}
    for name, network in networks.items():
        half = nn.Module.to(copy.deepcopy(network), dtype=torch.float16)
        half.save_pretrained(folder / name, safe_serialization=True)
    _portable(folder / "text_encoder")
    scheduler: Any = DDIMScheduler(
        num_train_timesteps=schedule.steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
    )
    scheduler.save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    _write(folder / "model_index.json", index | parts | {"requires_safety_checker": False})


def _portable(folder: Path) -> None:
    """Make the text encoder what all readers expect: names that transformers 5 leaves out and those before it ask for,
    and no precision in its config, which transformers would load it in beside a UNet in float32."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    checkpoint.save_tensors(original.with_prefix(load_file(weights)), weights, {"format": "pt"})
    _write(config, json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"})


def encode(vae: Any, images: Tensor) -> Tensor:
    """Unscaled latents (posterior means) of images (B, 3, H, W) in [-1, 1]."""
    return codec.KL(vae, 1.0).encode(images)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
