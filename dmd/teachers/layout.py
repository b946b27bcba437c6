"""The folder layout of Stable Diffusion: what its configs say, whether its weights are whole, and where a hub id lies.

All that can be refused is refused here, before a network is built: each in one sentence that names the file.
"""

import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd.denoiser import Prediction, epsilon, velocity
from dmd.errors import InputError
from dmd.noise import DDPM

PREDICTIONS: dict[str, Prediction] = {"epsilon": epsilon, "v_prediction": velocity}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": (
        "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
        "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
        "LMSDiscreteScheduler", "PNDMScheduler", "TCDScheduler", "UniPCMultistepScheduler",
    ),
}  # fmt: skip
"""Classes of each part that are read; the schedulers are those of one DDPM table."""

ABSENT = {
    "unet": {
        "addition_embed_type": "an SDXL-like network with a pooled text or size condition",
        "class_embed_type": "an upscaler or unCLIP network",
        "num_class_embeds": "an upscaler",
        "encoder_hid_dim_type": "a network with an image condition",
        "time_cond_proj_dim": "a network distilled with guidance as its input",
    },
    "vae": {"shift_factor": "not of the scaling of Stable Diffusion", "latents_mean": "not of its scaling"},
    "text_encoder": {"use_attention_mask": "a masked text encoder"},
    "scheduler": {
        "trained_betas": "a noise schedule of its own",
        "rescale_betas_zero_snr": "a schedule without signal at its end, where a one-step student would start blind",
        "use_flow_sigmas": "flow matching",
        "clip_sample": "pixels rather than latents",
        "thresholding": "pixels rather than latents",
    },
}
"""Settings that must be none or false, and what a folder that has them is."""

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
"""Patterns of files that go with all that is made of a pipeline."""


@dataclass(frozen=True)
class Settings:
    """What the configs of a pipeline say.

    Attributes:
        schedule, prediction: of its UNet.
        shape: (c, h, w) of its latents.
        vae: class name of its autoencoder.
    """

    schedule: DDPM
    prediction: Prediction
    shape: tuple[int, int, int]
    vae: str


def read(folder: Path) -> Settings:
    """Settings of a pipeline's folder from its five JSON files; weights are not looked at.

    Raises:
        InputError: a file is missing or no JSON object, or the pipeline is not Stable Diffusion 1.x or 2.x for text to
            image with a scaled linear DDPM table and epsilon or v prediction.
    """
    index = _json(folder / "model_index.json", "give the folder of a diffusers pipeline, or its id on the hub")
    _check_index(folder / "model_index.json", index)
    configs = {part: _json(folder / part / "config.json") for part in STEMS}
    configs["scheduler"] = _json(folder / "scheduler" / "scheduler_config.json")
    paths = {part: folder / part / "config.json" for part in STEMS}
    paths["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    for part, keys in ABSENT.items():
        for key, meaning in keys.items():
            if configs[part].get(key) not in (None, False):
                raise InputError(
                    f"{paths[part]} has {key} = {configs[part][key]!r}, so this is {meaning}: "
                    "it cannot be read as Stable Diffusion 1.x or 2.x"
                )
    schedule, prediction = _schedule(paths["scheduler"], configs["scheduler"])
    shape = _latents(paths["unet"], configs["unet"])
    latents = configs["vae"].get("latent_channels", 4)
    if latents != shape[0]:
        raise InputError(f"{paths['vae']} has {latents} latent channels, but the UNet takes {shape[0]}")
    width, reads = configs["text_encoder"].get("hidden_size", 512), configs["unet"].get("cross_attention_dim", 1280)
    if width != reads:
        raise InputError(f"{paths['text_encoder']} has hidden_size {width}, but the UNet reads text of width {reads}")
    return Settings(schedule, prediction, shape, index["vae"][1])


def weights(folder: Path, part: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of a part, each with a whole header and of the length that it tells.

    Raises:
        InputError: they are missing, cut, damaged, a git-lfs pointer, or there are pickles only.
    """
    name = _name(part, variant)
    single = folder / part / f"{name}.safetensors"
    shards = folder / part / _index_name(STEMS[part], variant)
    if single.is_file() or not shards.is_file():
        files = [single]
    else:
        names = _json(shards).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError(f"{shards} has no weight_map: download it again")
        files = [folder / part / name for name in sorted(set(map(str, names.values())))]
    for file in files:
        if not file.is_file():
            raise InputError(_missing(folder, file))
        _check_safetensors(file)
    return files


def licence(folder: Path) -> dict[str, str]:
    """What the README.md of a pipeline tells of its licence as hubs read it: license, and for those without an
    identifier license_name and license_link. Empty if it tells nothing that can be read.
    """
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        facts = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, YAMLError):
        return {}
    return {k: str(facts[k]) for k in ("license", "license_name", "license_link") if facts.get(k)}


def licence_files(folder: Path) -> list[Path]:
    """Files with the text of a pipeline's licence."""
    return sorted(p for pattern in LICENCE_FILES for p in folder.glob(pattern) if p.is_file())


def locate(source: str | Path, variant: str | None, revision: str | None) -> Path:
    """The folder that `source` names: itself, or the cached snapshot of a hub id, downloaded where allowed.

    Configs come first and are checked, then only the safetensors weights that are used. HF_HUB_OFFLINE=1 keeps off the
    network.

    Raises:
        InputError: there is no such folder, and no such id or none that can be had now; the configs are refused.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source), re.ASCII):
        raise InputError(f"{source} is no folder, and no id on the hub such as OWNER/NAME: give one of them")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    ends = (".safetensors", "-?????-of-?????.safetensors")
    wanted = [f"{part}/{_name(part, variant)}{end}" for part in STEMS for end in ends]
    try:
        configs = ["*.json", "tokenizer/*", "README.md", *LICENCE_FILES]
        found = Path(snapshot_download(str(source), revision=revision, allow_patterns=configs))
        read(found)
        snapshot_download(str(source), revision=found.name, allow_patterns=wanted)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if HF_HUB_OFFLINE:
            raise InputError(
                f"{source} is no folder, and as an id on the hub it is not wholly in the cache, while HF_HUB_OFFLINE "
                "keeps from downloading: unset that, or give a folder"
            ) from None
        why = f"{type(error).__name__}: {first_sentence(error)}"
        raise InputError(f"{source} is no folder, and as an id it cannot be had from the hub ({why})") from None
    return found


def _check_index(path: Path, index: dict[str, Any]) -> None:
    name = index.get("_class_name")
    if name != "StableDiffusionPipeline":
        raise InputError(
            f"{path} has _class_name {name!r}: a teacher is a StableDiffusionPipeline, 1.x or 2.x for text to image"
        )
    for part, classes in CLASSES.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if found not in classes:
            raise InputError(f"{path} has {found!r} as its {part}: what can be read is {' or '.join(classes[:2])}")
    if index.get("text_encoder_2"):
        raise InputError(f"{path} has a second text encoder, as SDXL has: a teacher is Stable Diffusion 1.x or 2.x")


def _schedule(path: Path, config: dict[str, Any]) -> tuple[DDPM, Prediction]:
    """Absent keys have diffusers' defaults."""
    kind = config.get("beta_schedule", "linear")
    if kind != "scaled_linear":
        raise InputError(f"{path} has beta_schedule {kind!r}: a teacher's must be 'scaled_linear'")
    if config.get("timestep_type", "discrete") != "discrete":
        raise InputError(f"{path} has timestep_type {config['timestep_type']!r}: a teacher's must be 'discrete'")
    steps = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    if not isinstance(steps, int) or steps < 2:
        raise InputError(f"{path} has num_train_timesteps {steps!r}: it must be a whole number of at least 2")
    if not (isinstance(start, float) and isinstance(end, float) and 0.0 < start < end < 1.0):
        raise InputError(f"{path} has beta_start {start!r} and beta_end {end!r}: they must rise between 0 and 1")
    name = config.get("prediction_type", "epsilon")
    if name not in PREDICTIONS:
        raise InputError(f"{path} has prediction_type {name!r}: a teacher's must be {' or '.join(PREDICTIONS)}")
    return DDPM(steps, start, end), PREDICTIONS[name]


def _latents(path: Path, config: dict[str, Any]) -> tuple[int, int, int]:
    channels, out = config.get("in_channels", 4), config.get("out_channels", 4)
    if channels != out:
        kind = {9: "inpainting", 8: "editing or depth", 7: "upscaling", 5: "depth"}.get(channels, "another task")
        raise InputError(
            f"{path} has in_channels {channels} and out_channels {out}, as networks for {kind} have: "
            "a teacher for text to image takes what it makes"
        )
    size = config.get("sample_size")
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if not (isinstance(height, int) and isinstance(width, int)):
        raise InputError(f"{path} has sample_size {size!r}: it must be the height and width of the latents")
    return channels, height, width


def _json(path: Path, advice: str = "the folder is not complete, so download it again") -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{path} cannot be read: {advice}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON: download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object: download it again")
    return value


def _name(part: str, variant: str | None) -> str:
    return STEMS[part] if variant is None else f"{STEMS[part]}.{variant}"


def _index_name(stem: str, variant: str | None) -> str:
    return f"{stem}.safetensors.index.json" if variant is None else f"{stem}.safetensors.index.{variant}.json"


def _missing(folder: Path, file: Path) -> str:
    """Why a weights file that should be there is not."""
    stem = file.name.split(".")[0].split("-")[0]
    beside = sorted(p.name for p in file.parent.glob("*") if p.name.startswith((stem, "pytorch_model")))
    variants = [n for n in beside if n.endswith(".safetensors")]
    pickles = [n for n in beside if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    blobs = [folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else []
    if any(p for root in (folder, *blobs) for p in root.rglob("*.incomplete")):
        return f"{file} is missing, and *.incomplete files beside it tell of an interrupted download: start it again"
    if variants:
        name = variants[0].split(".")[1].split("-")[0]
        advice = "choose it by --variant" if name == "safetensors" else f"choose it by --variant {name}"
        return f"{file} does not exist, but {variants[0]} does: {advice}"
    if pickles:
        return (
            f"{file} does not exist, and {pickles[0]} is a pickle, which could run code: "
            "convert it to safetensors or take a checkpoint that has them"
        )
    return f"{file} does not exist: the download was interrupted, or the checkpoint has no safetensors weights"


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    with open(file, "rb") as raw:
        if raw.read(20).startswith(b"version https://git"):
            raise InputError(f"{file} is a git-lfs pointer, not the weights: run git lfs pull")
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise InputError(f"{file} is cut or damaged ({first_sentence(error)}): download it again") from None


def first_sentence(error: BaseException) -> str:
    """What an exception of another package says, without its advice."""
    text = " ".join(str(error).split()) or type(error).__name__
    return textwrap.shorten(text.split(". ")[0].rstrip(".:"), 300, placeholder=" ...")
