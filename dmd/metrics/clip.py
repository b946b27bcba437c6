"""CLIP (Radford et al. 2021, arXiv 2103.00020) by transformers: how well an image fits its caption, and features."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd.checkpoint import digest
from dmd.errors import InputError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """A CLIP model and its tokenizer, frozen.

    Args:
        source: a folder in transformers' layout, or an id on the hub; safetensors only.

    Raises:
        InputError: it cannot be had, or is no CLIP model.
    """

    def __init__(self, source: str, device: torch.device):
        from transformers import CLIPModel, CLIPTokenizer

        if Path(source).exists() and not (Path(source) / "config.json").is_file():
            raise InputError(f"--clip is {source}, which has no config.json: give the folder of a CLIP model")
        try:
            model: Any = CLIPModel.from_pretrained(source, use_safetensors=True)
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"--clip is {source}, which cannot be loaded as a CLIP model: {first}") from None
        self.model = model.to(device).eval().requires_grad_(False)
        self.size: int = self.model.config.vision_config.image_size
        self.tokens: int = self.model.config.text_config.max_position_embeddings
        self.device = device

    def digest(self) -> str:
        """SHA-256 of the weights and their names."""
        return hashlib.sha256(digest(self.model).encode()).hexdigest()

    @torch.no_grad()
    def embed(self, images: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, D) of images (B, 1 or 3, H, W) in [-1, 1], and of their captions, float32."""
        x = (images.to(self.device).float().clamp(-1, 1).expand(-1, 3, -1, -1) + 1) / 2
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v, device=self.device).reshape(3, 1, 1) for v in (MEAN, STD))
        text = self.tokenizer(
            list(captions), padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        ).to(self.device)
        out = self.model(
            input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=(x - mean) / std
        )
        return F.normalize(out.image_embeds.float(), dim=-1), F.normalize(out.text_embeds.float(), dim=-1)

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each image and its caption, (B,) in [-1, 1]."""
        image, text = self.embed(images, captions)
        return (image * text).sum(-1)
