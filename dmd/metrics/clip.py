"""A CLIP that others have trained: transformers' or open_clip's, by folder or id.

Radford et al. 2021 (arXiv 2103.00020); open_clip: Cherti et al. 2022 (arXiv 2212.07143). Whoever uses it gives images
and texts; resizing, mean and deviation are the network's own. Embeddings are float32 and of length one. Only tensors
are read, by safetensors or torch's weights-only reader, and no code but that of the two packages runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd import checkpoint
from dmd.errors import InputError
from dmd.metrics.protocols import as_colour
from dmd.metrics.sources import Pixels

OPEN_CLIP = "open_clip"
SPECIFICATIONS = (
    "a folder or hub id of transformers' CLIPModel, open_clip:NAME, open_clip:NAME:TAG_OR_FILE, or open_clip: and a "
    "folder or hub id with open_clip_config.json"
)


@dataclass(frozen=True, eq=False)
class PretrainedClip:
    """A frozen CLIP on its device.

    Attributes:
        name: what scores and distances by it are called after.
        width: D, numbers in an embedding.
        net: all its weights.
        device: where they are.
        see: standardised images (B, 3, h, w) to embeddings (B, D) of any length.
        read: texts to embeddings (B, D) of any length; too long ones are cut.
        fit: images (B, 3, H, W) in [0, 1] to the network's size, which may leave that range a little.
        standardise: images in [0, 1] to what `see` takes.
        prepare: colour images (H, W, 3) uint8 to what `see` takes, by the package's own code.
        text_mean: see `dmd.clipgen.clip.Clip`; others' networks do not bring it along.
    """

    name: str
    width: int
    net: nn.Module
    device: torch.device
    see: Callable[[Tensor], Tensor]
    read: Callable[[Sequence[str]], Tensor]
    fit: Callable[[Tensor], Tensor]
    standardise: Callable[[Tensor], Tensor]
    prepare: Callable[[Sequence[Pixels]], Tensor]
    text_mean: Tensor | None = None

    def images(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) in [-1, 1] to embeddings (B, D); differentiable. Grey is repeated."""
        x = (images.to(self.device).float().expand(-1, 3, -1, -1) + 1.0) / 2.0
        return F.normalize(self.see(self.standardise(self.fit(x).clamp(0.0, 1.0))).float(), dim=-1)

    @torch.no_grad()
    def pixels(self, images: Sequence[Pixels]) -> Tensor:
        """Images (H, W, 1 or 3) uint8, each of its own size, to embeddings (B, D), as published figures are made."""
        shown = self.prepare([np.ascontiguousarray(as_colour(image)) for image in images])
        return F.normalize(self.see(shown.to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to embeddings (B, D). Longer ones than the network reads are cut."""
        return F.normalize(self.read(list(texts)).float(), dim=-1)

    def digest(self) -> str:
        """SHA-256 of all weights."""
        return checkpoint.digest(self.net)


def load(source: str, device: torch.device, download: bool) -> PretrainedClip:
    """A CLIP by one of `SPECIFICATIONS`.

    Args:
        source: "openai/clip-vit-base-patch16", "open_clip:ViT-g-14", which takes the first weights that open_clip names
            for it, "open_clip:ViT-B-32:laion2b_s34b_b79k", "open_clip:ViT-B-32:weights.safetensors",
            "open_clip:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", ...
        device: where it will be.
        download: fetch what is not on the disk.

    Raises:
        InputError: a package or the weights are missing, or the source is something else.
    """
    kind, _, rest = source.partition(":")
    return _open_clip(rest, device, download) if kind == OPEN_CLIP else _transformers(source, device, download)


def _transformers(source: str, device: torch.device, download: bool) -> PretrainedClip:
    from torchvision.transforms import v2
    from transformers import AutoConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    facts: dict[str, Any] = {"local_files_only": not download, "trust_remote_code": False}
    try:
        kind = AutoConfig.from_pretrained(source, **facts).model_type
        if kind != "clip":
            raise InputError(f"{source} is a {kind}, not a CLIP: give {SPECIFICATIONS}")
        loaded: Any = CLIPModel.from_pretrained(source, use_safetensors=True, output_loading_info=True, **facts)
        tokenizer = CLIPTokenizer.from_pretrained(source, **facts)
    except InputError:
        raise
    except Exception as error:  # its readers raise whatever they meet
        raise _unavailable(source, error, download) from None
    net, info = loaded
    if info["missing_keys"]:
        raise InputError(f"{source} is no CLIP: it lacks the weights of {min(info['missing_keys'])}")
    net = net.to(device).float().eval().requires_grad_(False)
    size, length = net.config.vision_config.image_size, net.config.text_config.max_position_embeddings
    try:
        processor = CLIPImageProcessor.from_pretrained(source, **facts)
    except (OSError, ValueError):  # networks that were saved without it: as OpenAI's, at the network's size
        processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    def see(images: Tensor) -> Tensor:
        return net.visual_projection(net.vision_model(pixel_values=images).pooler_output)

    def read(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        found = net.text_model(**{k: v.to(device) for k, v in tokens.items()})
        return net.text_projection(found.pooler_output)

    bicubic = v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True)
    return PretrainedClip(
        f"CLIP-{Path(source).name}", net.config.projection_dim, net, device, see, read,
        fit=v2.Compose([bicubic, v2.CenterCrop(size)]),
        standardise=v2.Normalize(processor.image_mean, processor.image_std),
        prepare=lambda images: processor(images=list(images), return_tensors="pt")["pixel_values"],
    )  # fmt: skip


def _open_clip(rest: str, device: torch.device, download: bool) -> PretrainedClip:
    source = f"{OPEN_CLIP}:{rest}"
    try:
        import open_clip
    except ImportError:
        raise InputError(f"{source} needs the package open_clip: pip install 'open_clip_torch>=3'") from None
    from PIL import Image

    name, weights, title = _where(source, rest, open_clip, download)
    try:
        config = open_clip.get_model_config(name)
        # a tokenizer of the hub must not bring code along, whatever the config says
        safe = {"trust_remote_code": False, "local_files_only": not download}
        words = open_clip.get_tokenizer(name, **(safe if config["text_cfg"].get("hf_tokenizer_name") else {}))
        made: Any = open_clip.create_model_from_pretrained(name, weights, device=device, weights_only=True)
    except Exception as error:  # a foreign file can fail anywhere in its reader
        raise _unavailable(source, error, download) from None
    net, prepare = made
    net = net.float().eval().requires_grad_(False)
    *fit, standardise = prepare.transforms  # which take tensors too
    return PretrainedClip(
        f"CLIP-{title}", config["embed_dim"], net, device, net.encode_image,
        read=lambda texts: net.encode_text(words(texts).to(device)),
        fit=lambda images: _applied(fit, images),
        standardise=standardise,
        prepare=lambda images: torch.stack([prepare(Image.fromarray(image)) for image in images]),
    )  # fmt: skip


def _where(source: str, rest: str, open_clip: Any, download: bool) -> tuple[str, str | None, str]:
    """open_clip's name of a network, its weights where the name does not say them, and what it is called.

    Raises:
        InputError: there is no such network, or its weights are not given and may not be fetched.
    """
    if rest and Path(rest).is_dir():
        return f"local-dir:{rest}", None, Path(rest).name
    name, _, weights = rest.partition(":")
    if "/" in name and not weights:
        if not download:
            raise InputError(f"{source} is neither a folder here nor to be fetched: give a folder, or allow --download")
        return f"hf-hub:{name}", None, name.rpartition("/")[2]
    if name not in open_clip.list_models():
        raise InputError(f"open_clip has no network {name!r}: it has ViT-B-32, ViT-g-14 and others")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights and weights not in tags:
        if not Path(weights).is_file():
            raise InputError(
                f"{source}: {weights} is neither a file nor one of open_clip's weights of {name}, which are "
                f"{', '.join(tags) or 'none'}"
            )
        return name, weights, f"{name}-{Path(weights).stem}"
    if not download or not (weights or tags):
        raise InputError(f"{source} needs weights: give them as open_clip:{name}:FILE, or allow --download")
    tag = weights or tags[0]
    return name, tag, f"{name}-{tag}"


def _applied(steps: Sequence[Callable[[Tensor], Tensor]], images: Tensor) -> Tensor:
    for step in steps:
        images = step(images)
    return images


def _unavailable(source: str, error: Exception, download: bool) -> InputError:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    advice = f"give {SPECIFICATIONS}" if download else "give a folder that holds it, or allow --download"
    return InputError(f"the CLIP {source} cannot be had ({why}): {advice}")
