"""Students that everyone can load: a folder for diffusers' stock pipeline, or one file in the original layout.

Nothing here builds a network: weights go from file to file, so an export does not depend on the installed versions of
diffusers and transformers, and neither do those who read it.
"""

import importlib.metadata
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dmd import checkpoint
from dmd.errors import InputError
from dmd.teachers import layout, original

TOKENIZER = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
CARD = "card.json"
"""What a student was made of, for programs; `README.md` says it to people."""
ADAPTERS = "pytorch_lora_weights.safetensors"
"""File of adapters in the folder that `load_lora_weights` of diffusers is given."""
FORMAT = {"format": "pt"}
"""Header of all weights: transformers asks for it."""


def save_student(
    weights: Mapping[str, Tensor],
    source: str | Path,
    folder: Path,
    *,
    half: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    card: str | None = None,
) -> None:
    """Write a student as a stock StableDiffusionPipeline.

    `pipe(prompt, num_inference_steps=1, guidance_scale=0)` makes what `dmd.solvers.one_step` makes, decoded. Tokenizer,
    text encoder, VAE and the UNet's config are those of `source`, byte for byte; only what some version of transformers
    would misread is written anew: weights without `text_model.`, a tokenizer without vocab.json, and a text encoder's
    config that does not say float32, in which diffusers loads the rest. Licence files come along.

    The folder appears when it is whole; a student that was there is replaced then.

    Args:
        weights: state of the student's network, which is of the architecture of the UNet in `source`.
        source, variant, revision: the teacher, as for `stable_diffusion.load`.
        half: UNet weights in float16 rather than float32.
        card: text of README.md; left out, `model_card` without figures.

    Raises:
        InputError: `source` is not whole or has another UNet, weights are not finite, or `folder` holds something else.
        OSError: it could not be written (a full disk, ...).
    """
    origin = layout.locate(source, variant, revision)
    _require_same_network(weights, origin, variant)
    text = model_card(folder.name, public_name(source), licence=layout.licence(origin)) if card is None else card
    _write(weights, origin, folder, torch.float16 if half else torch.float32, variant, text)


def save_adapters(
    matrices: Mapping[str, tuple[Tensor, Tensor]], settings: layout.Settings, folder: Path, card: str
) -> None:
    """Write a student's adapters alone, for the teacher's stock pipeline.

    `pipe.load_lora_weights(folder, weight_name=ADAPTERS)` reads them, and `LCMScheduler.from_pretrained(folder)` the
    scheduler that goes with them: then the pipeline is the student of `save_student`.

    Args:
        matrices: (A, B) of each linear layer, by its name in the pipeline ("unet.mid_block..."); B A is added.
        settings: of the teacher.
        card: text of README.md.

    Raises:
        InputError: values are not finite.
        OSError: it could not be written.
    """
    tensors = {f"{name}.lora_A.weight": a for name, (a, _) in matrices.items()}
    tensors |= {f"{name}.lora_B.weight": b for name, (_, b) in matrices.items()}
    checkpoint.save_tensors(_cast(tensors, torch.float32), folder / ADAPTERS, FORMAT)
    checkpoint.write_json(folder / "scheduler_config.json", scheduler_config(settings))
    (folder / "README.md").write_text(card, encoding="utf-8")


def convert_student(student: Path, folder: Path, *, half: bool = False) -> None:
    """Write the folder of a student again in float16 or float32.

    Raises:
        InputError: as `save_student`, and for a folder that holds no student.
    """
    layout.read(student)
    if not is_student(student):
        raise InputError(f"{student} is no one-step student: its scheduler is not LCMScheduler, so export a student")
    readme = student / "README.md"
    card = readme.read_text(encoding="utf-8") if readme.is_file() else model_card(folder.name, "not known")
    _write(_read(student, "unet"), student, folder, torch.float16 if half else torch.float32, None, card)
    if (student / CARD).is_file():
        _copy(student / CARD, folder / CARD)


def single_file(folder: Path, path: Path, *, half: bool = False) -> None:
    """Write a pipeline as one safetensors file in the layout that ComfyUI and A1111 read.

    Args:
        folder: of a student or teacher.
        path: the file; replaced if it is there.
        half: everything in float16, rather than each tensor as it is stored.

    Raises:
        InputError: `folder` is not whole, or has a network that the layout cannot hold.
        OSError: it could not be written.
    """
    settings = layout.read(folder)
    if settings.vae != "AutoencoderKL":
        raise InputError(f"{folder} has an {settings.vae}: the original layout holds none but AutoencoderKL")
    # readers take the text encoder's activation from its names
    act = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8")).get("hidden_act")
    text = original.open_clip if act == "gelu" else original.clip
    tensors = original.unet(_read(folder, "unet")) | original.vae(_read(folder, "vae"))
    tensors |= text(_read(folder, "text_encoder"))
    checkpoint.save_tensors(_cast(tensors, torch.float16) if half else tensors, path, FORMAT)


def is_student(folder: Path) -> bool:
    """Whether a folder's pipeline has the scheduler that `save_student` writes."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return index["scheduler"] == ["diffusers", "LCMScheduler"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def scheduler_config(settings: layout.Settings) -> dict[str, Any]:
    """Config of an LCMScheduler whose single step is the student's: at the last entry of its table, to x0 itself.

    The scheduler steps at k * original_inference_steps - 1, where k is the table's length divided by that, rounded
    down: the last entry if it divides the length. Its output is c_out * x0 + c_skip * z with c_skip of about
    1 / (2 * timestep_scaling * entry)^2: 2.5e-9 here, with its default of 10 for tables of 1000 and more for shorter.
    """
    schedule = settings.schedule
    names = {prediction: name for name, prediction in layout.PREDICTIONS.items()}
    return {
        "_class_name": "LCMScheduler",
        "_diffusers_version": importlib.metadata.version("diffusers"),
        "num_train_timesteps": schedule.steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": names[settings.prediction],
        "original_inference_steps": math.gcd(schedule.steps, 50),
        "timestep_scaling": max(10.0, 10_000.0 / schedule.steps),
        "clip_sample": False,
        "thresholding": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,  # LCMScheduler does not read it, but the pipeline warns of 0
    }


def model_card(
    name: str,
    teacher: str,
    figures: Mapping[str, object] | None = None,
    licence: Mapping[str, str] | None = None,
) -> str:
    """README.md of a student.

    Args:
        name: of the student.
        teacher: id on the hub, or another name.
        figures: what was measured, by what it is.
        licence: of the teacher (`layout.licence`), which binds weights that were made of it.
    """
    lines = [
        *_head(teacher, licence, ["one-step", "distillation", "dmd"]),
        f"# {name}", "",
        f"Images from text in one step. A student of `{teacher}`, made by Distribution Matching Distillation",
        "(Yin et al., CVPR 2024, arXiv 2311.18828). Tokenizer, text encoder and autoencoder are the teacher's.",
        f"{_licence_sentence(licence)} There is no safety checker inside.", "",
        "## Use", "",
        "```python",
        "from diffusers import StableDiffusionPipeline",
        "",
        'pipe = StableDiffusionPipeline.from_pretrained("FOLDER")',
        'pipe("a prompt", num_inference_steps=1, guidance_scale=0).images[0].save("image.png")',
        "```", "",
        "or, with the program that made it, `python sample.py \"a prompt\" --student FOLDER`.", "",
        "Always one step and `guidance_scale=0`: guidance is built in, and diffusers' default of 7.5 spoils the",
        "images. For the same reason there is no negative prompt. In ComfyUI, with the single-file export: one step,",
        "cfg 1, sampler `euler`, scheduler `simple`.", "",
        *_table(figures),
    ]  # fmt: skip
    return "\n".join(lines)


def adapters_card(
    name: str,
    teacher: str,
    figures: Mapping[str, object] | None = None,
    licence: Mapping[str, str] | None = None,
) -> str:
    """README.md of adapters alone; arguments as of `model_card`."""
    lines = [
        *_head(teacher, licence, ["lora", "one-step", "distillation", "dmd"]),
        f"# {name}", "",
        f"Low-rank adapters that make of `{teacher}` a student that draws in one step, by Distribution Matching",
        f"Distillation (Yin et al., CVPR 2024, arXiv 2311.18828). {_licence_sentence(licence)}", "",
        "## Use", "",
        "```python",
        "from diffusers import LCMScheduler, StableDiffusionPipeline",
        "",
        'pipe = StableDiffusionPipeline.from_pretrained("TEACHER")',
        'pipe.scheduler = LCMScheduler.from_pretrained("FOLDER")',
        f'pipe.load_lora_weights("FOLDER", weight_name="{ADAPTERS}")',
        'pipe("a prompt", num_inference_steps=1, guidance_scale=0).images[0].save("image.png")',
        "```", "",
        "Always one step and `guidance_scale=0`: guidance is built in. For the same reason there is no negative",
        "prompt.", "",
        *_table(figures),
    ]  # fmt: skip
    return "\n".join(lines)


def _head(teacher: str, licence: Mapping[str, str] | None, tags: list[str]) -> list[str]:
    facts = ["library_name: diffusers", "pipeline_tag: text-to-image", f"tags: [{', '.join(tags)}]"]
    facts += [f"base_model: {teacher}"] if re.fullmatch(r"[\w.-]+/[\w.-]+", teacher, re.ASCII) else []
    for key, value in (licence or {}).items():
        plain = re.fullmatch(r"[A-Za-z][\w.-]*", value, re.ASCII)  # else YAML may take it for something else
        facts.append(f"{key}: {value if plain else json.dumps(value)}")
    return ["---", *facts, "---", ""]


def _licence_sentence(licence: Mapping[str, str] | None) -> str:
    told = (licence or {}).get("license_name") or (licence or {}).get("license")
    return f"The teacher's licence applies: {told}." if told else "The teacher's licence applies."


def _table(figures: Mapping[str, object] | None) -> list[str]:
    rows = [f"| {what} | {value} |" for what, value in (figures or {}).items()]
    return ["## Figures", "", "| | |", "|---|---|", *rows, ""] if rows else []


def _write(
    weights: Mapping[str, Tensor], origin: Path, folder: Path, dtype: torch.dtype, variant: str | None, card: str
) -> None:
    settings = layout.read(origin)
    tensors = _cast(weights, dtype)
    parts = {part: layout.weights(origin, part, variant) for part in ("vae", "text_encoder")}
    folder = folder.absolute()
    _require_free(folder, origin)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = folder.with_name(f".tmp-{folder.name}"), folder.with_name(f".old-{folder.name}")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        for part, files in parts.items():
            (temporary / part).mkdir()
            copy = _copy_text_config if part == "text_encoder" else _copy
            copy(origin / part / "config.json", temporary / part / "config.json")
            _copy_weights(files, part, temporary / part / f"{layout.STEMS[part]}.safetensors")
        _copy_tokenizer(origin / "tokenizer", temporary / "tokenizer")
        for path in layout.licence_files(origin):
            _copy(path, temporary / path.name)
        (temporary / "scheduler").mkdir()
        checkpoint.write_json(temporary / "scheduler" / "scheduler_config.json", scheduler_config(settings))
        _copy(origin / "unet" / "config.json", temporary / "unet" / "config.json")
        checkpoint.save_tensors(tensors, temporary / "unet" / f"{layout.STEMS['unet']}.safetensors", FORMAT)
        (temporary / "README.md").write_text(_with_files(card, temporary), encoding="utf-8")
        _sync(temporary / "README.md")
        checkpoint.write_json(temporary / "model_index.json", _index(settings))
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _with_files(card: str, folder: Path) -> str:
    """A card with the sizes and checksums of the weights in a folder, in place of those that it had."""
    rows = ["", "## Files", "", "| | bytes | sha256 |", "|---|---|---|"]
    for path in sorted(folder.glob("*/*.safetensors")):
        facts = checkpoint.describe(path)
        rows.append(f"| `{path.relative_to(folder)}` | {facts['size']:,} | `{facts['sha256']}` |")
    return "\n".join([card.split("\n## Files\n")[0].rstrip(), *rows, ""])


def _index(settings: layout.Settings) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": importlib.metadata.version("diffusers"),
        "scheduler": ["diffusers", "LCMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", settings.vae],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }


def _require_same_network(weights: Mapping[str, Tensor], origin: Path, variant: str | None) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in layout.weights(origin, "unet", variant):
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    for name in sorted(shapes.keys() | weights.keys()):
        wanted, given = shapes.get(name), tuple(weights[name].shape) if name in weights else None
        if wanted != given:
            raise InputError(
                f"{origin / 'unet'} is of another architecture than the student: tensor {name!r} is "
                f"{wanted or 'absent'} there and {given or 'absent'} in the student"
            )


def _require_free(folder: Path, origin: Path) -> None:
    if folder.resolve() == origin.resolve():
        raise InputError(f"{folder} is what the export is made of: give another folder")
    if folder.exists() and not is_student(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is no one-step student that could be replaced: give another folder")


def public_name(source: str | Path) -> str:
    """An id on the hub as it is, and of a folder no more than its name: where it lies is nobody's business."""
    return Path(source).resolve().name if Path(source).is_dir() else str(source)


def _read(folder: Path, part: str) -> dict[str, Tensor]:
    """All tensors of a part."""
    return {name: tensor for file in layout.weights(folder, part) for name, tensor in load_file(file).items()}


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    found = {name: v.to(dtype) if v.is_floating_point() else v for name, v in tensors.items()}
    wrong = [name for name, v in found.items() if v.is_floating_point() and not v.isfinite().all()]
    if wrong:
        raise InputError(f"the tensor {wrong[0]!r} has values that are not finite as {str(dtype).split('.')[1]}")
    return found


def _copy_text_config(source: Path, target: Path) -> None:
    """The config, which must not have half precision loaded beside a UNet in float32.

    transformers 5 loads in the precision that the config tells, or else in that of the weights; diffusers in float32.
    """
    config = json.loads(source.read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"
    if config.get(key) == "float32":
        _copy(source, target)
    else:
        checkpoint.write_json(target, config | {key: "float32"})


def _copy_weights(files: list[Path], part: str, plain: Path) -> None:
    """A part's weights as one file: a copy where that can be, else the same tensors."""
    if len(files) == 1 and (part != "text_encoder" or _has_prefix(files[0])):
        return _copy(files[0], plain)
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    checkpoint.save_tensors(original.with_prefix(tensors) if part == "text_encoder" else tensors, plain, FORMAT)


def _has_prefix(file: Path) -> bool:
    with safe_open(file, framework="pt") as opened:
        return all(name.startswith("text_model.") for name in opened.keys())  # noqa: SIM118


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files, and vocab.json with merges.txt, which transformers 4 needs and 5 does not write."""
    for name in TOKENIZER:
        if (source / name).is_file():
            _copy(source / name, folder / name)
    if (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
        return
    try:
        whole = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = whole["model"]["vocab"] | {token["content"]: token["id"] for token in whole["added_tokens"]}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{source} holds no CLIP tokenizer: it needs vocab.json and merges.txt, or tokenizer.json"
        ) from None
    checkpoint.write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    _sync(folder / "merges.txt")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        raise InputError(f"{source} does not exist: the folder is not complete") from None
    _sync(target)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
