"""`sample.py` and `dmd sample`: images by prompt and seed, from a student in one step or any network in many."""

import json
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dmd import shipped
from dmd.cli.flags import guarded, read
from dmd.errors import InputError

MAX_SEEDS = 1_000_000
MANY = 50
"""Steps of a teacher, where nobody says it."""
EXAMPLE = "a small red circle at the left on a blue background"


@dataclass(frozen=True)
class SampleOptions:
    """Make images: one for each prompt (or class) and seed."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Prompts, each in quotes; for a class-conditional network names of classes, all of them if left out."""
    prompts: str | None = None
    """File or folder of further prompts: .txt, .jsonl, .parquet, webdataset, or images with metadata.jsonl."""
    student: str = "shapes-student"
    """Folder of a student or a teacher, pixels or text to image; or shapes-student or shapes-teacher, which ship."""
    teacher: bool = False
    """Beside it also sample its teacher, in many steps from the same noise."""
    steps: int | None = None
    """Steps of the teacher (DDIM; Heun for pixels), 50 if left out. Without --teacher, of the given folder itself."""
    guidance_scale: float | None = None
    """Guidance of many steps, uncond + s (cond - uncond); left out, what the student was distilled with, or 1. Students
    have theirs built in."""
    negative_prompt: str | None = None
    """Of many steps: guidance leads away from this prompt instead of the empty one. One-step students take none."""
    seeds: str = "0-7"
    """Seeds, as in "0-7" or "1,5,9". A seed makes the same image whatever is sampled with it."""
    out: str = "out"
    """Folder for the PNGs."""
    grid: bool = True
    """Also write grid.png: a row per prompt."""
    decoder: str = "full"
    """Of latents: "full", "tiny" (madebyollin/taesd from the hub), or the folder of an AutoencoderTiny."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the networks' arithmetic."""
    batch_size: int = 64
    """Images at a time."""
    variant: str | None = None
    """Which weights of the teacher (with --teacher), or else of --student, are read where there are several: "fp16" for
    files named *.fp16.safetensors."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; "auto" takes a GPU where there is one."""


def main(argv: Sequence[str], prog: str = "sample.py") -> None:
    guarded(lambda: sample(read(SampleOptions, argv, prog)))


def parse_seeds(text: str) -> list[int]:
    """ "0-7" or "1,5,9" or both to seeds. Raises InputError for anything else, and for seeds of 2^56 or more."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text, re.ASCII):
        raise InputError(f"--seeds is {text[:100]!r}: it should look like 0-7 or 1,5,9")
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if max(len(first), len(last)) > 17 or int(last or first) < int(first) or int(last or first) >= 2**56:
            raise InputError(f"--seeds has the range {part[:100]!r}: it must rise and stay below 2**56")
        if int(last or first) - int(first) >= MAX_SEEDS:
            raise InputError(f"--seeds has the range {part!r}: at most {MAX_SEEDS} seeds can be asked for at once")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def sample(options: SampleOptions) -> None:
    """Write PNGs and print images per second."""
    seeds = parse_seeds(options.seeds)
    steps = 1 if options.steps is None else options.steps
    many = options.teacher or steps > 1
    if steps < 1 or options.batch_size < 1:
        raise InputError(f"--steps is {steps} and --batch-size {options.batch_size}: both must be at least 1")
    if options.negative_prompt is not None and not many:
        raise InputError(
            "--negative-prompt needs guidance at every step, and a one-step student has its guidance built in: leave "
            "it out, and say in the prompt what the image should show; or add --teacher or --steps"
        )
    if options.guidance_scale is not None and not many:
        raise InputError(
            f"--guidance-scale {options.guidance_scale} is for many steps: a one-step student has its guidance built "
            "in; add --teacher or --steps"
        )
    prompts = _read_prompts(options.what, options.prompts)
    import torch

    from dmd import teachers
    from dmd.data.images import to_float
    from dmd.evaluation import save_grid
    from dmd.generate import Generator, student_generator
    from dmd.pipeline import Pipeline

    device = find_device(options.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    student = teachers.load(options.student, device, variant=None if options.teacher else options.variant, dtype=dtype)
    codec = teachers.decoder(options.decoder, student, device, dtype)
    prompts = prompts or list(student.classes)
    if not prompts:
        raise InputError(f"what should the images show? Give a prompt, such as: sample.py {EXAMPLE!r}")

    student.encode(prompts[:1] if not student.classes else prompts)  # refuses unknown classes before anything is made

    if options.teacher or not many:
        runs: list[tuple[str, Pipeline, Generator]] = [("student", student, student_generator(student.denoiser))]
    else:
        scale = 1.0 if options.guidance_scale is None else options.guidance_scale
        runs = [("many steps", student, _many(options, student, scale))]
    if options.teacher:
        source, guidance = teacher_of(Path(options.student))
        teacher = teachers.load(source, device, variant=options.variant, dtype=dtype)
        scale = guidance if options.guidance_scale is None else options.guidance_scale
        runs.append(("teacher", teacher, _many(options, teacher, scale)))

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Any] = []
    for name, pipeline, generator in runs:
        x, rate = _images(pipeline, generator, codec, prompts, seeds, options.batch_size, device, name)
        facts = {
            "network": pipeline.digest(),
            "sampled": name,
            "steps": str(1 if name == "student" else options.steps or MANY),
        }
        if options.negative_prompt is not None and name != "student":
            facts["negative prompt"] = options.negative_prompt
        prefix = "" if len(runs) == 1 else f"{name}-"
        for image, (n, s) in zip(x, [(n, s) for n in range(len(prompts)) for s in seeds], strict=True):
            path = out / f"{prefix}{n:03d}-{slug(prompts[n])}-seed-{s}.png"
            save_png(image, path, facts | {"prompt": prompts[n], "seed": str(s)})
        rows.append(x.unflatten(0, (len(prompts), len(seeds))))
        print(f"{name}: {len(x)} images in {out}, {rate:.3g} images per second on {device.type}")
    if options.grid:
        grid = [to_float(row) for each in zip(*rows, strict=True) for row in each]
        titles = [f"{name}: {prompt}" for prompt in prompts for name, _, _ in runs]
        save_grid(grid, out / "grid.png", max(1, 64 // grid[0].shape[-1]), titles)


def _many(options: SampleOptions, pipeline: Any, scale: float) -> Any:
    """The guided steps that are asked for. Raises InputError for a negative prompt that nothing is led away from."""
    from dmd.generate import guided_steps

    if options.negative_prompt is not None and scale == 1.0:
        raise InputError("--negative-prompt does nothing at guidance 1: give a --guidance-scale, such as 7.5")
    return guided_steps(pipeline, scale, options.steps or MANY, options.negative_prompt)


def _images(
    pipeline: Any, generator: Any, codec: Any, prompts: Sequence[str], seeds: Sequence[int], batch_size: int,
    device: Any, title: str,
) -> tuple[Any, float]:  # fmt: skip
    """(len(prompts) * len(seeds), C, H, W) uint8 images, prompt by prompt, and how many a second."""
    import torch

    from dmd.data.images import to_uint8
    from dmd.generate import decoded, images
    from dmd.log import progress
    from dmd.pipeline import conditions

    number = torch.arange(len(prompts)).repeat_interleave(len(seeds))
    seed = torch.tensor(seeds).repeat(len(prompts))
    with progress(len(seed), 0, title, True, "img") as bar, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: bar.write(f"note: {message}", file=sys.stderr)
        started = time.perf_counter()
        x = images(
            decoded(generator, codec), seed, conditions(pipeline, prompts), number, pipeline.shape, device, batch_size,
            bar.update, to_uint8,
        )  # fmt: skip
        return x, len(seed) / (time.perf_counter() - started)


def teacher_of(student: Path) -> tuple[str, float]:
    """A student's teacher and the guidance scale that it was distilled with, from the run that the student lies in or
    from its own card.

    Raises:
        InputError: the folder is not in a finished run, and its card names no teacher that could be had.
    """
    student = Path(shipped.resolve(student))
    run = student.resolve().parent
    try:
        guidance = json.loads((run / "config.json").read_text(encoding="utf-8"))["pairs"]["guidance"]
        return json.loads((run / "summary.json").read_text(encoding="utf-8"))["teacher"]["folder"], float(guidance)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        card = json.loads((student / "card.json").read_text(encoding="utf-8"))
        return str(card["teacher"]), float(card["guidance"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{student} is not in a finished run and has no card.json, so its teacher is not known: give the teacher's "
            "folder as --student with --steps 50"
        ) from None


def slug(prompt: str) -> str:
    """A prompt as part of a file's name: letters and digits of any script, at most 40 of them."""
    return re.sub(r"[\W_]+", "-", prompt[:40]).strip("-").lower() or "image"


def _read_prompts(words: Sequence[str], path: str | None) -> list[str]:
    from dmd.data import prompts

    given = [prompts.checked(f"the prompt {word[:60]!r}", word) for word in words]
    return given if path is None else given + prompts.read(path).texts


def find_device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device is {name!r}, which is not there: give auto, cpu, cuda or mps") from None
    return device


def save_png(image: Any, path: Path, facts: dict[str, str]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    array = image.permute(1, 2, 0).contiguous().numpy()
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, value)
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(path, pnginfo=info)
