"""`sample.py` and `dmd sample`: images from a student (one step) or its teacher, by class and seed."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dmd.cli.flags import guarded, read
from dmd.errors import InputError

MAX_SEEDS = 1_000_000


@dataclass(frozen=True)
class SampleOptions:
    """Make images: one for each asked class and seed."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Class names (the digits model: 0 to 9). Left out, all of them."""
    student: str = "runs/digits/student"
    """Folder of a student or teacher (config.json, model.safetensors)."""
    seeds: str = "0-7"
    """Seeds, as in "0-7" or "1,5,9". A seed makes the same image whatever is sampled with it."""
    out: str = "out"
    """Folder for the PNGs."""
    steps: int = 1
    """1 runs the folder's network once, as a student; more run Heun's method on it, as a teacher."""
    guidance: float = 1.0
    """Guidance scale when sampling with many steps; students have theirs built in."""
    grid: bool = True
    """Also write grid.png: a row per class."""
    batch_size: int = 256
    """Images at a time."""
    cpu: bool = False
    """Use the CPU though there is a GPU."""


def main(argv: Sequence[str], prog: str = "sample.py") -> None:
    guarded(lambda: sample(read(SampleOptions, argv, prog)))


def parse_seeds(text: str) -> list[int]:
    """ "0-7" or "1,5,9" or both to seeds. Raises InputError for anything else, and for seeds of 2^56 or more."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise InputError(f"--seeds is {text!r}: it should look like 0-7 or 1,5,9")
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first) or int(last or first) >= 2**56:
            raise InputError(f"--seeds has the range {part!r}: it must rise and stay below 2**56")
        if int(last or first) - int(first) >= MAX_SEEDS:
            raise InputError(f"--seeds has the range {part!r}: at most {MAX_SEEDS} seeds can be asked for at once")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def sample(options: SampleOptions) -> None:
    """Write PNGs and print images per second."""
    seeds = parse_seeds(options.seeds)
    if options.steps < 1 or options.batch_size < 1:
        raise InputError(f"--steps is {options.steps} and --batch-size {options.batch_size}: both must be at least 1")
    import torch

    from dmd.checkpoint import digest
    from dmd.data.images import to_uint8
    from dmd.denoiser import Guided
    from dmd.evaluation import save_grid
    from dmd.generate import images, student_generator, teacher_generator
    from dmd.log import progress
    from dmd.solvers import heun
    from dmd.teachers import pixel

    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    denoiser, config = pixel.load(Path(options.student))
    denoiser = denoiser.to(device)
    numbers = class_numbers(options.what, config.classes)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    real = Guided(denoiser, options.guidance, config.null())
    generator = student_generator(denoiser) if options.steps == 1 else teacher_generator(real, heun, options.steps)

    pairs = [(n, s) for n in numbers for s in seeds]
    asked, seed = (torch.tensor(v) for v in zip(*pairs, strict=True))
    with progress(len(pairs), 0, "images", True, "img") as bar:
        started = time.perf_counter()
        x = images(generator, seed, pixel.labels, asked, config.shape, device, options.batch_size, bar.update)
        seconds = time.perf_counter() - started

    facts = {"network": digest(denoiser.net), "steps": str(options.steps)}
    for pixels, (n, s) in zip(to_uint8(x), pairs, strict=True):
        _save_png(pixels, out / f"class-{n:03d}-seed-{s}.png", facts | {"class": config.classes[n], "seed": str(s)})
    if options.grid:
        rows = list(x.view(len(numbers), len(seeds), *config.shape))
        save_grid(rows, out / "grid.png", max(1, 32 // config.size), [config.classes[n] for n in numbers])
    print(f"{len(pairs)} images in {out}, {len(pairs) / seconds:.0f} images per second on {device.type}")


def class_numbers(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Numbers of the named classes, all if none is named. Raises InputError for an unknown name."""
    unknown = [n for n in names if n not in classes]
    if unknown:
        raise InputError(f"there is no class {unknown[0]!r}: this network knows {', '.join(classes)}")
    return [classes.index(n) for n in names] or list(range(len(classes)))


def _save_png(pixels: Any, path: Path, facts: dict[str, str]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    array = pixels.permute(1, 2, 0).contiguous().numpy()
    info = PngInfo()
    for key, value in facts.items():
        info.add_text(key, value)
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path, pnginfo=info)
