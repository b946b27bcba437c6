"""How well images fit their captions: the cosine of CLIP's embeddings of both (Hessel et al. 2021, arXiv 2104.08718).

The figure is the plain mean cosine, about 0.3 for good images, as the papers on one-step students print it; Hessel's
own score is 2.5 times its positive part. It depends on the CLIP, whose name stands beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmd.errors import InputError
from dmd.metrics.protocols import Step, as_colour, as_it_is
from dmd.metrics.sources import Pixels


@dataclass(frozen=True)
class Clip:
    """A CLIP.

    Attributes:
        name: what it is called in results.
        embed_images: colour images (H, W, 3) uint8 to (B, D).
        embed_texts: captions to (B, D).
        prefix: put before every caption.
        before: done to each image before the CLIP's own preparation.
    """

    name: str
    embed_images: Callable[[Sequence[Pixels]], Tensor]
    embed_texts: Callable[[Sequence[str]], Tensor]
    prefix: str = ""
    before: Step = as_it_is

    @torch.no_grad()
    def cosines(self, images: Sequence[Pixels], captions: Sequence[str]) -> Tensor:
        """(B,) float32 on the CPU, in [-1, 1].

        Raises:
            ValueError: counts differ.
        """
        if len(images) != len(captions):
            raise ValueError(f"there are {len(images)} images but {len(captions)} captions: each image needs one")
        shown = self.embed_images([np.ascontiguousarray(as_colour(self.before(image))) for image in images])
        asked = self.embed_texts([self.prefix + caption for caption in captions])
        return F.cosine_similarity(shown.float(), asked.float(), dim=1).cpu()


def load(source: str, weights: Path | None, download: bool, device: torch.device) -> Clip:
    """A CLIP of transformers, by folder or id on the hub, or of open_clip, as "open_clip:ViT-g-14".

    Args:
        source: as above.
        weights: of an open_clip network, a file; left out, open_clip's first published ones, if `download`.
        download: fetch what is not on the disk.

    Raises:
        InputError: a package or the weights are missing, or the folder holds something else.
    """
    kind, _, name = source.partition(":")
    if kind == "open_clip" and name:
        return _open_clip(name, weights, download, device)
    if weights is not None:
        raise InputError(f"--clip-weights {weights} is for open_clip:NAME: transformers' folders hold their weights")
    return _transformers(source, download, device)


def _transformers(source: str, download: bool, device: torch.device) -> Clip:
    from transformers import AutoConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    facts: dict[str, Any] = {"local_files_only": not download, "trust_remote_code": False}
    try:
        kind = AutoConfig.from_pretrained(source, **facts).model_type
        if kind != "clip":
            raise InputError(f"{source} is a {kind}, not a CLIP: give one such as openai/clip-vit-base-patch16")
        net: Any = CLIPModel.from_pretrained(source, use_safetensors=True, **facts)
        net = net.to(device).eval()
        prepare = CLIPImageProcessor.from_pretrained(source, **facts)
        tokenizer = CLIPTokenizer.from_pretrained(source, **facts)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = "give a folder that holds it" if download else "give a folder that holds it, or allow --download"
        raise InputError(f"the CLIP {source} cannot be had ({why}): {advice}") from None

    def embed_images(images: Sequence[Pixels]) -> Tensor:
        pixels = prepare(images=list(images), return_tensors="pt")["pixel_values"].to(device)
        return net.visual_projection(net.vision_model(pixel_values=pixels).pooler_output)

    def embed_texts(texts: Sequence[str]) -> Tensor:
        length = net.config.text_config.max_position_embeddings
        tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        found = net.text_model(**{k: v.to(device) for k, v in tokens.items()})
        return net.text_projection(found.pooler_output)

    return Clip(source, embed_images, embed_texts)


def _open_clip(name: str, weights: Path | None, download: bool, device: torch.device) -> Clip:
    from PIL import Image

    try:
        import open_clip
    except ImportError:
        raise InputError(f"open_clip:{name} needs the package open_clip: pip install open_clip_torch") from None
    if name not in open_clip.list_models():
        raise InputError(f"open_clip has no network {name!r}: it has ViT-B-32, ViT-g-14 and others")
    if weights is None and not download:
        raise InputError(f"open_clip:{name} needs weights: give a file as --clip-weights, or allow --download")
    if weights is not None and not weights.is_file():
        raise InputError(f"{weights} does not exist: give the weights of open_clip:{name}")
    pretrained = str(weights) if weights is not None else (open_clip.list_pretrained_tags_by_model(name) or [None])[0]
    try:
        net, _, prepare = open_clip.create_model_and_transforms(name, pretrained=pretrained, device=device)
    except Exception as error:  # a foreign file can fail anywhere in its reader
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"open_clip:{name} cannot be had from {pretrained} ({why})") from None
    tokenizer = open_clip.get_tokenizer(name)
    net.eval()

    def embed_images(images: Sequence[Pixels]) -> Tensor:
        return net.encode_image(torch.stack([prepare(Image.fromarray(image)) for image in images]).to(device))

    def embed_texts(texts: Sequence[str]) -> Tensor:
        return net.encode_text(tokenizer(list(texts)).to(device))

    return Clip(f"{name} ({pretrained})", embed_images, embed_texts)
