"""A whole CLIP-GEN model: texts or images in, images out. Its folder holds all that is needed, save a CLIP of others.

MODEL/transformer.json, transformer.safetensors     the transformer, and what it belongs to
MODEL/means.safetensors                             mean embeddings, see `dmd.clipgen.gap`
MODEL/tokenizer/                                    config.json, model.safetensors
MODEL/clip/                                         a small CLIP; one of others stays where it was loaded from
"""

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dmd import checkpoint
from dmd.clipgen import clip as clips
from dmd.clipgen import sampling, tokenizer, transformer
from dmd.clipgen.clip import Clip
from dmd.clipgen.gap import Gap
from dmd.clipgen.sampling import Sampler
from dmd.clipgen.tokenizer import Tokenizer
from dmd.clipgen.transformer import ConditionalTransformer
from dmd.errors import InputError

MEANS, TOKENIZER, CLIP = "means.safetensors", "tokenizer", "clip"
UNIT = 256  # images or texts that CLIP sees at a time


@dataclass(frozen=True, eq=False)
class Model:
    """Transformer, tokenizer and CLIP that belong together, all on one device."""

    net: ConditionalTransformer
    tokenizer: Tokenizer
    clip: Clip
    gap: Gap

    @property
    def device(self) -> torch.device:
        return self.net.null.device

    def text_conditions(self, embeddings: Tensor) -> Tensor:
        """Conditions (N, D) of texts' embeddings (N, D).

        Raises:
            InputError: the model centres embeddings, and the mean of texts is not known.
        """
        if self.gap.text_mean is None:
            raise InputError(
                "this model centres embeddings, and its CLIP brings no mean of texts along: give --centre-prompts, a "
                "file with some hundred captions of the kind that you will ask for"
            )
        return self.gap.text(embeddings)

    def with_texts(self, texts: Sequence[str]) -> "Model":
        """The model with the mean of the embeddings of these texts as that of all texts. Raises InputError if the model
        subtracts no means."""
        if not self.gap.centres:
            raise InputError("this model subtracts no mean embeddings: leave out --centre-prompts")
        mean = embed_texts(self.clip, texts).mean(0)
        return replace(self, gap=replace(self.gap, text_mean=mean.to(self.device)))

    def images(
        self, conditions: Tensor, targets: Tensor, seeds: Tensor, sampler: Sampler, candidates: int = 1, unit: int = 64,
        tick: Callable[[int], object] = lambda n: None,
    ) -> Tensor:  # fmt: skip
        """Images (N, 3, H, W) in [-1, 1] on the CPU, for N > 0 conditions and seeds.

        Args:
            conditions: (N, D).
            targets: (N, D) embeddings; of several candidates that whose embedding is nearest is kept.
            seeds: (N,) int64.
            candidates: how many images are made of each, at least 1.
            unit: images at a time.
            tick: told how many images of a finished unit have been made.
        """
        tries, scores = [], []
        for c in range(candidates):
            make = functools.partial(self._make, sampler=sampler, candidate=c)
            made = sampling.in_units(make, conditions, seeds, unit, tick)
            if candidates == 1:
                return made
            tries.append(made)
            scores.append(sampling.similarity(embed_images(self.clip, made, self.device), targets.cpu()))
        best = sampling.rerank(torch.stack(scores))
        return torch.stack(tries)[best, torch.arange(len(best))]

    def _make(self, conditions: Tensor, seeds: Tensor, sampler: Sampler, candidate: int) -> Tensor:
        tokens = sampling.tokens(self.net, conditions, seeds, sampler, candidate)
        return self.tokenizer.decode(tokens).clamp(-1.0, 1.0)


@torch.no_grad()
def embed_images(clip: Clip, images: Tensor, device: torch.device) -> Tensor:
    """Embeddings (N, D) on the CPU of float images (N, 3, H, W) in [-1, 1]."""
    return torch.cat([clip.images(x.to(device)).cpu() for x in images.split(UNIT)])


@torch.no_grad()
def embed_texts(clip: Clip, texts: Sequence[str]) -> Tensor:
    """Embeddings (N, D) on the CPU of N > 0 texts."""
    return torch.cat([clip.texts(texts[i : i + UNIT]).cpu() for i in range(0, len(texts), UNIT)])


def save(model: Model, folder: Path, clip_source: str, figures: dict[str, object]) -> None:
    """Write a model's folder; the transformer's weights come last, so that a folder with them is whole.

    Args:
        clip_source: where its CLIP was loaded from; a small one is copied into the folder.
        figures: go into transformer.json.
    """
    tokenizer.save(model.tokenizer, folder / TOKENIZER)
    source = Path(clip_source)
    if source.is_dir() and isinstance(model.clip, clips.SmallClip):
        passing = shutil.ignore_patterns("checkpoints", "metrics.jsonl", ".tmp-*")
        shutil.copytree(source, folder / CLIP, dirs_exist_ok=True, ignore=passing)
    means = {"image_mean": model.gap.image_mean}
    if model.gap.text_mean is not None:
        means["text_mean"] = model.gap.text_mean
    checkpoint.save_tensors(means, folder / MEANS)
    facts = {
        "tokenizer": checkpoint.digest(model.tokenizer),
        "clip": model.clip.digest(),
        "clip_source": clip_source,
        "gap_noise": model.gap.noise,
        "figures": figures,
    }
    transformer.save(model.net, folder, facts)


def load(
    folder: str | Path, device: torch.device, tokenizer_source: str | None = None, clip_source: str | None = None
) -> Model:
    """A model, frozen.

    Args:
        tokenizer_source, clip_source: in place of those in the folder, or named there; they must be the same ones.

    Raises:
        InputError: a part is missing or damaged, or parts do not belong together.
    """
    folder = Path(folder)
    net, facts = transformer.load(folder, device)
    images = tokenizer.load(tokenizer_source or folder / TOKENIZER, device)
    require_tokenizer(net, images, facts.get("tokenizer"), str(tokenizer_source or folder / TOKENIZER))
    own = folder / CLIP
    source = clip_source or (str(own) if own.is_dir() else str(facts.get("clip_source")))
    encoder = clips.load(source, device)
    require_clip(net, encoder, facts.get("clip"), source, str(facts.get("clip_source")))
    try:
        means = load_file(folder / MEANS)
        gap = Gap(means["image_mean"], means.get("text_mean"), float(facts["gap_noise"])).to(device)
    except Exception as error:  # safetensors raises its own types
        raise InputError(f"{folder / MEANS} is missing or damaged ({error}): train the model again") from None
    return Model(net, images, encoder, gap)


def require_tokenizer(net: ConditionalTransformer, found: Tokenizer, digest: object, where: str) -> None:
    """Raises InputError if a transformer was not taught on the tokens of this tokenizer."""
    sizes, has = net.config, found.config
    if (sizes.codes, sizes.length) != (has.codes, has.length):
        raise InputError(
            f"the tokenizer {where} makes {has.length} tokens of {has.codes} codes, but the transformer was taught on "
            f"{sizes.length} of {sizes.codes}: give the tokenizer that it was taught with"
        )
    if checkpoint.digest(found) != digest:
        raise InputError(
            f"the tokenizer {where} has the sizes but not the weights of the one that the transformer was taught "
            f"with, so its codes mean something else: give that one"
        )


def require_clip(net: ConditionalTransformer, found: Clip, digest: object, where: str, wanted: str) -> None:
    """Raises InputError if a transformer was not taught on the embeddings of this CLIP."""
    if found.width != net.config.condition:
        raise InputError(
            f"the CLIP {where} makes embeddings of {found.width} numbers, but the transformer was taught on "
            f"{net.config.condition}: give the CLIP that it was taught with, {wanted}"
        )
    if found.digest() != digest:
        raise InputError(
            f"the CLIP {where} is another one than the transformer was taught with: give that one, {wanted}"
        )
