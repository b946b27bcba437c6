"""The miniature Stable Diffusion that ships: `dmd teach shapes` draws captioned shapes and teaches it what they are."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dmd import build, evaluation, teach_miniature
from dmd.build import Workplace
from dmd.data import shapes
from dmd.data.images import to_float
from dmd.data.shapes import Scene
from dmd.metrics import caption
from dmd.teach_miniature import MiniatureOptions
from dmd.teachers import miniature
from dmd.teachers.stable_diffusion import StableDiffusion

UNSEEN = 1 << 40
"""Drawings from this index on are for judging, those below for teaching."""


@dataclass(frozen=True)
class ShapesOptions:
    """Teach a miniature Stable Diffusion on drawings of captioned shapes."""

    drawings: int = 60_000
    """How many drawings the denoiser learns from."""
    training: MiniatureOptions = field(
        default_factory=lambda: MiniatureOptions(
            output_dir="runs/shapes-teacher", steps=9600, decoder_steps=1500, guidance=3.0
        )
    )


@dataclass(frozen=True)
class Shapes:
    """A `teach_miniature.World`: all drawings of a seed."""

    seed: int
    count: int

    @property
    def digest(self) -> str:
        return build.short_hash({"sizes": shapes.SIZES, "colours": shapes.COLOURS, **asdict(self)})

    @property
    def questions(self) -> list[int]:
        return shapes.ANSWERS

    @property
    def licence(self) -> str:
        return "apache-2.0"

    def scenes(self, index: Tensor) -> list[Scene]:
        return shapes.scenes(self.seed, index)

    def images(self, index: Tensor) -> Tensor:
        return to_float(shapes.batch(self.scenes(index), self.seed, index))

    def captions(self, index: Tensor) -> list[str]:
        return [shapes.caption(s) for s in self.scenes(index)]

    def answers(self, index: Tensor) -> Tensor:
        return torch.tensor([shapes.answers(s) for s in self.scenes(index)])

    def write_tokenizer(self, length: int, folder: Path) -> int:
        return miniature.write_tokenizer(shapes.words(), length, folder)

    def measure(
        self, pipeline: StableDiffusion, options: MiniatureOptions, device: torch.device, folder: Path
    ) -> dict[str, float]:
        """Caption agreement of many-step samples, half of the captions of each kind, and of rebuilt drawings."""
        half = options.samples // 2
        index = torch.arange(UNSEEN, UNSEEN + 40 * options.samples)
        x = self.images(index[: options.samples])
        back = teach_miniature.rebuilt(pipeline, x, device)
        known, found = self.scenes(index[: options.samples]), self.scenes(index[options.samples :])
        figures: dict[str, float] = {}
        shown: list[tuple[Tensor, str]] = []
        for count, name in ((1, "one thing"), (2, "two things")):
            asked = [s for s in found if len(s.things) == count][:half]
            prompts = [shapes.caption(s) for s in asked]
            made = teach_miniature.sample(pipeline, prompts, options.guidance, 50, device)
            figures[f"{name}, agreement with its caption"] = caption.agreement(made, asked)["agreement"]
            shown += list(zip(made[:32], prompts, strict=False))
        figures["drawings through the autoencoder, agreement"] = caption.agreement(back, known)["agreement"]
        figures["drawings through the autoencoder, PSNR in dB"] = teach_miniature.psnr(back, x)
        grid = [torch.stack([image for image, _ in shown[i : i + 8]]) for i in range(0, len(shown), 8)]
        evaluation.save_grid(grid, folder / "samples.png", 1, [prompt for _, prompt in shown])
        return figures

    def describe(self, options: MiniatureOptions) -> list[str]:
        return [
            "# A miniature Stable Diffusion of captioned shapes",
            "",
            "64 x 64 images of one or two coloured shapes, from captions such as *a small red circle at the left on a "
            "blue background* or *a red circle above a large blue square on a white background*. It has the classes "
            "and the folder layout of Stable Diffusion 1.5 and is meant as a teacher for trying distillation on a "
            "laptop. It knows nothing beyond its shapes, colours, sizes, places and relations, and has learnt from "
            "nothing but drawings that the command makes by itself.",
            "",
            "Agreement is the part of images that show all that their captions say (`dmd.metrics.caption`). Samples "
            f"are by DDIM, 50 steps, guidance {options.guidance:g}, {options.samples // 2} unseen captions a row; "
            "drawings through the autoencoder and back are the ceiling of what can be reached.",
        ]


def teach(options: ShapesOptions, place: Workplace) -> bool:
    """See `teach_miniature.teach`."""
    world = Shapes(options.training.seed, options.drawings)
    return teach_miniature.teach(options.training, world, place)
