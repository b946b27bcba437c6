"""CLIP: images and texts into one space. One that others have trained (`dmd.metrics.clip`), or a small one of ours.

Radford et al. 2021 (arXiv 2103.00020). Every path here takes images in [-1, 1] and applies the network's own mean and
deviation itself; embeddings are float32 and of length one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dmd import checkpoint, shipped
from dmd.clipgen.networks import ConvSizes, Encoder, sizes_from
from dmd.clipgen.tokenizer import Update
from dmd.ema import Ema
from dmd.errors import InputError
from dmd.metrics import clip as pretrained
from dmd.teachers import stable_diffusion
from dmd.teachers.stable_diffusion import TextEncoder

CONFIG, WEIGHTS, WORDS = "config.json", "model.safetensors", "tokenizer"
KIND = "dmd-small-clip"
MAX_LOGIT_SCALE = 4.6052  # ln 100
TEXT_HEADS = 4
SQUEEZED = 16  # channels of each place of the grid before all places are joined


class Clip(Protocol):
    """An encoder of images and texts.

    Attributes:
        name: what distances on its features are called after.
        width: D, numbers in an embedding.
        text_mean: (D,), mean embedding of the texts that it was taught on, None where that is not known.
    """

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def text_mean(self) -> Tensor | None: ...

    def images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to embeddings (B, D); differentiable."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to embeddings (B, D). Longer ones than the network reads are cut."""

    def digest(self) -> str:
        """SHA-256 of all weights."""


# ----------------------------------------------------------------------------- a small one


@dataclass(frozen=True)
class SmallClipConfig:
    """What a small CLIP is made of.

    Attributes:
        size: height and width of its images.
        sizes: of the convolutional image encoder.
        text_width, text_layers: of the text encoder, which has 4 heads.
        tokens: length of every encoded text.
        vocabulary: how many tokens there are; the last two are the marks of begin and end.
        width: numbers in an embedding.
    """

    size: int
    sizes: ConvSizes
    text_width: int
    text_layers: int
    tokens: int
    vocabulary: int
    width: int


class SmallClipNet(nn.Module):
    """A convolutional image encoder and transformers' CLIP text encoder; fresh weights from torch's global state.

    Convolutions rather than a vision transformer, which needs many more images to learn what an edge is. All places of
    the grid enter the embedding by weights of their own, so that it knows where things are.
    """

    text_mean: Tensor

    def __init__(self, config: SmallClipConfig):
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        self.config = config
        channels, grid = config.sizes.widths[-1], config.size // config.sizes.reduction
        self.vision = nn.Sequential(
            Encoder(config.sizes),
            nn.Conv2d(channels, SQUEEZED, 1),
            nn.Flatten(),
            nn.Linear(SQUEEZED * grid**2, config.width),
        )
        self.text: Any = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.text_width,
                intermediate_size=4 * config.text_width,
                projection_dim=config.width,
                num_hidden_layers=config.text_layers,
                num_attention_heads=TEXT_HEADS,
                max_position_embeddings=config.tokens,
                bos_token_id=config.vocabulary - 2,
                eos_token_id=config.vocabulary - 1,
                pad_token_id=config.vocabulary - 1,
            )
        )
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1 / 0.07)
        self.register_buffer("text_mean", torch.zeros(config.width))

    def of_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to embeddings (B, width) of length one."""
        return F.normalize(self.vision(images).float(), dim=-1)

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) to embeddings (B, width) of length one."""
        return F.normalize(self.text(input_ids=tokens).text_embeds.float(), dim=-1)


def text_start(source: str) -> TextEncoder:
    """The text encoder of a pipeline: of a folder in Stable Diffusion's layout, or of one that ships.

    Raises:
        InputError: there is none, or a small CLIP cannot begin with it.
    """
    found = stable_diffusion.text_encoder(Path(shipped.resolve(source)))
    c = found.network.config
    if (c.num_attention_heads, c.intermediate_size) != (TEXT_HEADS, 4 * c.hidden_size):
        raise InputError(
            f"the text encoder of {source} has {c.num_attention_heads} heads and layers of {c.intermediate_size}: a "
            f"small CLIP can begin with {TEXT_HEADS} heads and {4 * c.hidden_size}"
        )
    return found


def beginning_with(start: TextEncoder, size: int, sizes: ConvSizes, width: int, locked: bool = False) -> SmallClipNet:
    """A fresh network but for its text encoder, which is `start`'s: what words mean need not be learnt again.

    With `locked` that encoder learns no further, only its projection and the image encoder do: locked-image tuning
    (Zhai et al. 2022, arXiv 2111.07991) the other way about.
    """
    c = start.network.config
    text = (c.hidden_size, c.num_hidden_layers, c.max_position_embeddings, c.vocab_size)
    net = SmallClipNet(SmallClipConfig(size, sizes, *text, width))
    weights = start.network.state_dict()  # which has the prefix in transformers 4 only
    net.text.text_model.load_state_dict({name.removeprefix("text_model."): v for name, v in weights.items()})
    net.text.text_model.requires_grad_(not locked)
    return net


class SmallClip:
    """`SmallClipNet` with its words: a `Clip`.

    Args:
        net: on its device.
        tokenizer: transformers' CLIPTokenizer.
    """

    name = "SmallCLIP"

    def __init__(self, net: SmallClipNet, tokenizer: Any):
        self.net = net
        self.tokenizer = tokenizer
        self.width = net.config.width

    @property
    def text_mean(self) -> Tensor:
        return self.net.text_mean

    def images(self, images: Tensor) -> Tensor:
        size = self.net.config.size
        x = images.float()
        if tuple(x.shape[-2:]) != (size, size):
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(-1.0, 1.0)
        return self.net.of_images(x)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Texts to (B, L) int64 on the network's device."""
        length = self.net.config.tokens
        found = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return found.input_ids.to(self.net.logit_scale.device)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.net.of_tokens(self.tokens(texts))

    def digest(self) -> str:
        return checkpoint.digest(self.net)


def save(net: SmallClipNet, folder: Path) -> None:
    """Write a small CLIP's folder around the tokenizer that is there already; the weights come last."""
    checkpoint.write_json(folder / CONFIG, {"kind": KIND} | asdict(net.config))
    checkpoint.save_weights(net, folder / WEIGHTS)


def load(source: str | Path, device: torch.device) -> Clip:
    """A frozen CLIP: the folder of a small one, or one that others have trained, see `dmd.metrics.clip.load`.

    Raises:
        InputError: there is none, it cannot be had, or it is damaged.
    """
    if Path(source).is_dir() and _is_small(Path(source)):
        return _load_small(Path(source), device)
    return pretrained.load(str(source), device, download=True)


def _is_small(folder: Path) -> bool:
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and raw.get("kind") == KIND


def _load_small(folder: Path, device: torch.device) -> SmallClip:
    raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    try:
        del raw["kind"]
        net = SmallClipNet(SmallClipConfig(**raw | {"sizes": sizes_from(raw["sizes"])}))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{folder / CONFIG} does not describe a small CLIP: teach it again ({error})") from None
    checkpoint.load_weights(net, folder / WEIGHTS)
    words = stable_diffusion.tokenizer(folder / WORDS)
    net = net.to(device).to(memory_format=torch.channels_last)
    return SmallClip(net.eval().requires_grad_(False), words)


# ----------------------------------------------------------------------------- training


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy; of several texts that say the same, each has an equal share.

    Args:
        image, text: embeddings (B, D) of length one, row by row of one pair.
        scale: factor of their cosines.
        same: bool (B, B), whether the texts of two rows are equal; true on the diagonal.
    """
    logits = scale * image @ text.T
    target = same / same.sum(1, keepdim=True)  # symmetric where `same` is an equivalence, as equality is
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


@dataclass(frozen=True)
class CaptionBatch:
    """Images (B, 3, H, W) in [-1, 1], tokens (B, L) of their captions, and the captions' numbers (B,), equal where
    they say the same."""

    images: Tensor
    tokens: Tensor
    caption: Tensor


class Contrasting:
    """A `dmd.run.Task`: one update of a small CLIP a step. Micro-batches, and processes, are contrasted by themselves.

    Args:
        net: what is trained.
        optimizer: its groups know their full rate.
        ema: its average, which is exported.
        max_norm: gradients are clipped to it.
        update: see `dmd.clipgen.tokenizer.Update`.
    """

    def __init__(self, net: SmallClipNet, optimizer: Optimizer, ema: Ema, max_norm: float, update: Update):
        self.net = net.train()
        self.optimizer = optimizer
        self.ema = ema
        self.max_norm = max_norm
        self.update = update

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net, "ema": self.ema.shadow}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"net": self.optimizer}

    def step(self, step: int, batches: Sequence[CaptionBatch]) -> dict[str, Tensor]:
        """One update over the micro-batches. Raises `NotFinite` (by `update`) before a bad one."""
        self.optimizer.zero_grad()
        rows = []
        for b in batches:
            image, text = self.net.of_images(b.images), self.net.of_tokens(b.tokens)
            same = b.caption[:, None] == b.caption
            loss = contrastive_loss(image, text, self.net.logit_scale.exp(), same)
            (loss / len(batches)).backward()
            nearest = (image @ text.T).detach().argmax(1)
            right = same.gather(1, nearest[:, None]).float().mean()
            rows.append(torch.stack((loss.detach(), right)))
        figures = dict(zip(("loss/contrastive", "right"), torch.stack(rows).mean(0), strict=True))
        figures["grad/net"] = self.update(list(self.net.parameters()), self.max_norm, figures)
        self.optimizer.step()
        with torch.no_grad():
            self.net.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        self.ema.update(self.net, step)
        return figures
