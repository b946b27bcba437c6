"""A small Stable Diffusion of the user's own captioned images: `dmd teach folder --data DIR --tokenizer DIR`."""

import functools
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd import evaluation, seeding, teach_miniature
from dmd.build import Workplace
from dmd.data import captioned
from dmd.data.captioned import Captioned
from dmd.data.images import to_float
from dmd.errors import InputError
from dmd.seeding import Stream
from dmd.teach_miniature import MiniatureOptions
from dmd.teachers import stable_diffusion
from dmd.teachers.miniature import MiniatureConfig
from dmd.teachers.stable_diffusion import StableDiffusion

TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
LAST = 2**32 - 1
"""A step that no training has, whose draws are the order of the images."""


@dataclass(frozen=True)
class FolderOptions:
    """Teach a small Stable Diffusion on a folder of captioned images.

    The defaults are for some 10,000 drawings of 64 x 64 pixels, such as emoji, and one GPU.
    """

    data: str
    """Folder with metadata.jsonl (file_name, text), or with train/ and test/ that have one each."""
    tokenizer: str
    """Folder of a CLIPTokenizer, as in Stable Diffusion's `tokenizer/`."""
    words: int = 1000
    """How many of the captions' words, the commonest, the text encoder learns to tell."""
    training: MiniatureOptions = field(
        default_factory=lambda: MiniatureOptions(
            output_dir="runs/emoji-teacher",
            autoencoder_steps=20_000, autoencoder_batch_size=64, decoder_steps=10_000, text_steps=3000,
            steps=60_000, batch_size=256, lr=5e-4, ema=0.9995, guidance=3.0, samples=64,
            network=MiniatureConfig(
                vae_widths=(32, 64, 128, 128), unet_widths=(192, 320), text_width=256, text_layers=4, heads=8, tokens=77
            ),
        )
    )  # fmt: skip


class Folder:
    """A `teach_miniature.World`: captioned images in an order of chance, again and again.

    A text encoder learns which of the commonest words a caption has. That is little beside what CLIP's knows, and all
    that captions by themselves can teach; a pipeline of real size takes CLIP's.

    Args:
        train: images to learn from.
        test: images to judge by.
        tokenizer: folder of a CLIPTokenizer.
        words: how many words the text encoder learns to tell.
        seed: of the order.

    Raises:
        InputError: the tokenizer cannot be read.
    """

    def __init__(self, train: Captioned, test: Captioned, tokenizer: Path, words: int, seed: int):
        stable_diffusion.tokenizer(tokenizer)
        self.train, self.test, self.tokenizer = train, test, tokenizer
        counts = Counter(word for text in train.captions for word in sorted(set(words_of(text))))
        self.words = {word: i for i, (word, _) in enumerate(counts.most_common(words))}
        self.order = seeding.bits(seed, Stream.DATA, LAST, torch.arange(len(train)), 1)[:, 0].argsort(stable=True)

    @functools.cached_property
    def digest(self) -> str:
        found = hashlib.sha256(self.train.images.numpy().tobytes())
        for text in (*self.train.captions, *self.words):
            found.update(text.encode() + b"\0")
        return found.hexdigest()

    @property
    def count(self) -> int:
        return len(self.train)

    @property
    def questions(self) -> Sequence[int]:
        return [2] * len(self.words)

    @property
    def licence(self) -> None:
        """That of the images, which nobody told."""

    def images(self, index: Tensor) -> Tensor:
        return to_float(self.train.images[self._rows(index)])

    def captions(self, index: Tensor) -> list[str]:
        return [self.train.captions[i] for i in self._rows(index).tolist()]

    def answers(self, index: Tensor) -> Tensor:
        found = torch.zeros(len(index), len(self.words), dtype=torch.int64)
        for row, text in enumerate(self.captions(index)):
            found[row, [self.words[w] for w in set(words_of(text)) if w in self.words]] = 1
        return found

    def _rows(self, index: Tensor) -> Tensor:
        return self.order[index % len(self.train)]

    def write_tokenizer(self, length: int, folder: Path) -> int:
        """A copy; it must read no more tokens than `length`, which is the text encoder's."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER:
            if (self.tokenizer / name).is_file():
                shutil.copyfile(self.tokenizer / name, folder / name)
        return len(stable_diffusion.tokenizer(folder))

    def measure(
        self, pipeline: StableDiffusion, options: MiniatureOptions, device: torch.device, folder: Path
    ) -> dict[str, float]:
        """How well unseen images are rebuilt; and samples.png: unseen captions' images above what they are of."""
        x = to_float(self.test.images[: options.samples])
        back = teach_miniature.rebuilt(pipeline, x, device)
        prompts = self.test.captions[: min(32, options.samples)]
        made = teach_miniature.sample(pipeline, prompts, options.guidance, 50, device)
        rows: list[Any] = []
        for first in range(0, len(prompts), 8):
            rows += [made[first : first + 8], x[first : first + len(made[first : first + 8])]]
        evaluation.save_grid(rows, folder / "samples.png", 1, [prompts[i] for i in range(len(prompts))])
        return {"unseen images through the autoencoder, PSNR in dB": teach_miniature.psnr(back, x)}

    def describe(self, options: MiniatureOptions) -> list[str]:
        side = options.network.size
        return [
            "# A small Stable Diffusion",
            "",
            f"{side} x {side} images, learnt from {len(self.train):,} captioned ones. It has the classes and the "
            "folder layout of Stable Diffusion 1.5. In samples.png every other row is made (DDIM, 50 steps, guidance "
            f"{options.guidance:g}) from the captions of the unseen images below it.",
        ]


def words_of(text: str) -> list[str]:
    """The words of a caption, in small letters, without marks."""
    return re.findall(r"\w+", text.lower())


def teach(options: FolderOptions, place: Workplace) -> bool:
    """See `teach_miniature.teach`.

    Raises:
        InputError: the folder or the tokenizer cannot be read, or there are too few images.
    """
    folder, size = Path(options.data), options.training.network.size
    if (folder / "train").is_dir():
        train, test = (captioned.load(folder / part, size) for part in ("train", "test"))
    else:
        whole = captioned.load(folder, size)
        train, test = _every(whole, held_out=False), _every(whole, held_out=True)
    if len(train) < 2 or len(test) < 1:
        raise InputError(f"{folder} has {len(train)} images to learn from and {len(test)} to judge by: give more")
    world = Folder(train, test, Path(options.tokenizer), options.words, options.training.seed)
    return teach_miniature.teach(options.training, world, place)


def _every(whole: Captioned, held_out: bool) -> Captioned:
    """Every twentieth image, or all others."""
    rows = [i for i in range(len(whole)) if (i % 20 == 19) == held_out]
    return Captioned(whole.images[rows], [whole.captions[i] for i in rows])
