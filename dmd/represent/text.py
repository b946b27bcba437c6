"""The text tower of StableRep+ and CLIP, and the folder that it is exported to, for classification by prompts.

RUN/text/config.json, model.safetensors    the tower and both projections
RUN/text/tokenizer/                        its words

Images and texts meet by `Text.project(backbone(images)) @ Text(prompts).T`, cosines of vectors of length one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd import checkpoint
from dmd.errors import InputError
from dmd.teachers import stable_diffusion

CONFIG, WEIGHTS, WORDS = "config.json", "model.safetensors", "tokenizer"
KIND = "dmd text tower"
FIRST_LOGIT_SCALE, MAX_LOGIT_SCALE = 2.6592, 4.6052  # ln(1 / 0.07), ln 100
UNIT = 256  # prompts at a time


@dataclass(frozen=True)
class TextConfig:
    """What a text tower is made of.

    Attributes:
        features: of the backbone, whose images are projected beside it.
        width, layers, heads: of the transformer.
        tokens: length of every encoded text.
        vocabulary: how many tokens there are; `begin` and `end` are two of them.
        embedding: numbers in an embedding.
    """

    features: int
    width: int
    layers: int
    heads: int
    tokens: int
    vocabulary: int
    begin: int
    end: int
    embedding: int


class TextNet(nn.Module):
    """CLIP's causal transformer (transformers' own) and linear maps of texts and images into one space.

    Radford et al. 2021 (arXiv 2103.00020, section 2.4). Fresh weights from torch's global state.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        self.config = config
        self.tower: Any = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                projection_dim=config.embedding,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.tokens,
                bos_token_id=config.begin,
                eos_token_id=config.end,
                pad_token_id=config.end,
            )
        )
        self.image_projection = nn.Linear(config.features, config.embedding, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(FIRST_LOGIT_SCALE))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (C, L) to embeddings (C, embedding), of any length."""
        return self.tower(input_ids=tokens).text_embeds

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the scale of cosines at 1 to 100, as CLIP does after every update."""
        self.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)


class Text:
    """A text tower with its words.

    Args:
        net: on its device.
        tokenizer: transformers' CLIPTokenizer.
    """

    def __init__(self, net: TextNet, tokenizer: Any):
        self.net, self.tokenizer = net, tokenizer

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """N > 0 prompts to embeddings (N, embedding) of length one."""
        device = self.net.logit_scale.device
        parts = [prompts[i : i + UNIT] for i in range(0, len(prompts), UNIT)]
        found = [self.net(encode(self.tokenizer, p, self.net.config.tokens).to(device)) for p in parts]
        return F.normalize(torch.cat(found).float(), dim=-1)

    @torch.no_grad()
    def project(self, features: Tensor) -> Tensor:
        """The backbone's features (N, D) to embeddings (N, embedding) of length one.

        Raises:
            InputError: they are not of this tower's backbone.
        """
        if features.shape[-1] != self.net.config.features:
            raise InputError(
                f"features have {features.shape[-1]} numbers, but the text tower was taught beside a backbone of "
                f"{self.net.config.features}: give the backbone of the same run"
            )
        return F.normalize(self.net.image_projection(features.float()), dim=-1)

    @property
    def scale(self) -> float:
        """Factor of cosines before a softmax."""
        return float(self.net.logit_scale.detach().exp())


def encode(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """Texts to tokens (C, length) int64; longer ones are cut."""
    found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found.input_ids


def load_tokenizer(source: str) -> Any:
    """A CLIPTokenizer of a folder or the hub. Raises InputError if it cannot be had."""
    if Path(source).is_dir():
        return stable_diffusion.tokenizer(Path(source))
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises whatever its readers raise
        reason = str(error).split("\n")[0].strip()
        raise InputError(f"--tokenizer {source} cannot be had ({reason}): give a folder or hub id") from None


def save(net: TextNet, tokenizer: Any, folder: Path) -> None:
    """Write a text tower's folder; the weights come last."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / WORDS)
    checkpoint.write_json(folder / CONFIG, {"kind": KIND} | asdict(net.config))
    checkpoint.save_weights(net, folder / WEIGHTS)


def load_text(folder: str | Path, device: torch.device | str = "cpu") -> Text:
    """A text tower that `save` wrote, frozen: prompts to embeddings, and the projection of the backbone's features.

    Raises:
        InputError: the folder holds none, or a damaged one.
    """
    folder = Path(folder)
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if raw.pop("kind") != KIND:
            raise ValueError
        config = TextConfig(**raw)
        net = TextNet(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise InputError(f"{folder} is no text tower: it needs a {CONFIG} that dmd represent has written") from None
    checkpoint.load_weights(net, folder / WEIGHTS)
    return Text(net.to(device).eval().requires_grad_(False), stable_diffusion.tokenizer(folder / WORDS))
