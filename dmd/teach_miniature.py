"""How a miniature Stable Diffusion is taught: an autoencoder, a text encoder and, on what both make of their images and
captions, a UNet; then the decoder once more. Every stage resumes. `teach_shapes` and `teach_folder` say what of.
"""

import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd import build, checkpoint, log, seeding
from dmd.batches import TeachBatches
from dmd.build import Workplace
from dmd.denoiser import Cond, Guided
from dmd.ema import Ema
from dmd.errors import InputError
from dmd.generate import decoded, images, teacher_generator
from dmd.pipeline import conditions
from dmd.run import Cadence, Progress, Run, Task, clip_and_check
from dmd.seeding import Stream
from dmd.solvers import ddim
from dmd.teach import Autoencoding, Describing, ImageBatch, Teacher, TextBatch
from dmd.teachers import layout, miniature, stable_diffusion
from dmd.teachers.miniature import Describer, MiniatureConfig
from dmd.teachers.stable_diffusion import StableDiffusion, TextEncoder, TimestepNet

BETAS = (0.9, 0.99)  # of AdamW


class World(Protocol):
    """Captioned images by number. Numbers have no end; those of a finite set come again after its last.

    Attributes:
        digest: names all of it.
        count: how many images the denoiser learns from.
        questions: how many answers there are to each question about a caption.
        licence: of what is learnt from them, as hubs name it; None where only the user knows.
    """

    @property
    def digest(self) -> str: ...

    @property
    def count(self) -> int: ...

    @property
    def questions(self) -> Sequence[int]: ...

    @property
    def licence(self) -> str | None: ...

    def images(self, index: Tensor) -> Tensor:
        """Numbers (B,) to images (B, 3, H, W) in [-1, 1]."""

    def captions(self, index: Tensor) -> list[str]:
        """What they show."""

    def answers(self, index: Tensor) -> Tensor:
        """What their captions answer, (B, Q) int64; an empty caption answers 0 to every question."""

    def write_tokenizer(self, length: int, folder: Path) -> int:
        """Write a CLIPTokenizer's files; returns its token count."""

    def measure(
        self, pipeline: StableDiffusion, options: "MiniatureOptions", device: torch.device, folder: Path
    ) -> dict[str, float]:
        """Figures of a finished pipeline by what they are, for its card; and pictures of what it makes, beside it."""

    def describe(self, options: "MiniatureOptions") -> list[str]:
        """What the pipeline is and what its figures mean: title and paragraphs of its card."""


@dataclass(frozen=True)
class MiniatureOptions:
    """How large the networks are, and how long they are taught."""

    output_dir: str = "runs/miniature"
    """The pipeline's folder, and beside it in `stages/` what a stopped command goes on from."""
    seed: int = 0
    """Key of all randomness."""
    autoencoder_steps: int = 5000
    """Updates of the autoencoder."""
    autoencoder_batch_size: int = 16
    autoencoder_lr: float = 1e-3
    kl_weight: float = 4e-4
    """Weight of the latents' divergence from unit noise."""
    decoder_steps: int = 3000
    """Further updates of the decoder alone, which leave the latents as they are."""
    decoder_lr: float = 1e-3
    decoder_noise: float = 0.1
    """Noise on the latents that the decoder then learns from, which makes it forgive a denoiser's small errors."""
    text_steps: int = 1000
    """Updates of the text encoder, which learns by itself to answer what captions say."""
    text_batch_size: int = 256
    text_lr: float = 1e-3
    steps: int = 12_000
    """Updates of the UNet."""
    batch_size: int = 64
    lr: float = 1e-3
    ema: float = 0.999
    caption_dropout: float = 0.1
    """Probability of teaching without the caption, which guidance needs."""
    guidance: float = 2.0
    """Guidance scale of the samples that the card reports."""
    samples: int = 1000
    """Samples behind the card's figures."""
    mixed_precision: bool = False
    """Run the networks in bf16."""
    cpu: bool = False
    """Use the CPU though there is a GPU."""
    network: MiniatureConfig = field(default_factory=MiniatureConfig)


def teach(options: MiniatureOptions, world: World, place: Workplace) -> bool:
    """Do what is missing. Returns whether all is done (not stopped)."""
    folder = Path(options.output_dir)
    stages = folder / "stages"
    started = time.monotonic()
    place.first(lambda: _open(stages, options, world))
    tokens = world.write_tokenizer(options.network.tokens, folder / "tokenizer")
    tokenizer = stable_diffusion.tokenizer(folder / "tokenizer")
    vae, vae_progress = _autoencoder(options, world, place, stages / "autoencoder")
    if vae_progress.step < options.autoencoder_steps:
        return False
    text, text_progress = _text(options, world, place, tokenizer, tokens, stages / "text")
    if text_progress.step < options.text_steps:
        return False
    latents, scale = _latents(world, place, vae, stages / "latents.safetensors")
    net, progress = _denoiser(options, world, place, latents, TextEncoder(tokenizer, text), stages / "denoiser")
    if progress.step < options.steps:
        return False
    vae, sharp_progress = _decoder(options, world, place, vae, scale, stages / "decoder")
    if sharp_progress.step < options.decoder_steps:
        return False

    def conclude() -> None:
        miniature.save(vae, net, text, scale, folder)
        seconds = {"autoencoder": vae_progress.seconds + sharp_progress.seconds}
        seconds |= {"text encoder": text_progress.seconds, "denoiser": progress.seconds}
        _card(options, world, place, folder, seconds | {"this start": time.monotonic() - started})

    place.first(conclude)
    return True


def _open(stages: Path, options: MiniatureOptions, world: World) -> None:
    """Raises InputError if the folder was begun with other options or images."""
    stages.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(asdict(options) | {"images": world.digest}))
    path = stages / "options.json"
    free = {"output_dir", "guidance", "samples", "cpu", "steps", "decoder_steps", "decoder_lr", "decoder_noise"}
    if path.exists():
        found = json.loads(path.read_text())
        for name, value in wanted.items():
            if name not in free and found.get(name) != value:
                raise InputError(
                    f"{stages.parent} was begun with {name} = {found.get(name)!r}, now {value!r}: "
                    f"give another --output-dir"
                )
    checkpoint.write_json(path, wanted)


def _train(
    folder: Path, task: Task, batches: Callable[[int], Any], steps: int, place: Workplace, title: str
) -> Progress:
    cadence = Cadence(steps, 50, max(steps // 20, 1), keep=1, warmup=100, cooldown=steps // 2)
    sinks = lambda step: [log.JsonLines(folder / "metrics.jsonl", step)]  # noqa: E731
    return Run(folder, task, batches, cadence, place.accelerator, title=title, sinks=sinks).train()


def _seeded(options: MiniatureOptions, make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed % 2**32)
        return make()


def _autoencoder(options: MiniatureOptions, world: World, place: Workplace, folder: Path) -> tuple[Any, Progress]:
    vae = _seeded(options, lambda: miniature.autoencoder(options.network)).to(place.device)
    return _reconstruct(options, world, place, vae, options.autoencoder_lr, options.autoencoder_steps, 0, 0.0, folder)


def _decoder(
    options: MiniatureOptions, world: World, place: Workplace, vae: Any, scale: float, folder: Path
) -> tuple[Any, Progress]:
    """The decoder goes on by itself, on the images that come next."""
    vae = copy.deepcopy(vae).requires_grad_(True)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    jitter, first = options.decoder_noise / scale, options.autoencoder_steps
    return _reconstruct(options, world, place, vae, options.decoder_lr, options.decoder_steps, first, jitter, folder)


def _reconstruct(
    options: MiniatureOptions, world: World, place: Workplace, vae: Any, lr: float, steps: int, first: int,
    jitter: float, folder: Path,
) -> tuple[Any, Progress]:  # fmt: skip
    """Train what of the autoencoder is not frozen, on the images of steps from `first` on; its average."""
    vae.to(memory_format=torch.channels_last)
    ema = Ema(vae, options.ema)
    size = options.autoencoder_batch_size

    def batches(step: int) -> list[ImageBatch]:
        found = []
        for index in place.share().split(size, "--autoencoder-batch-size"):
            x = world.images((first + step) * size + index)
            index = index.to(place.device)
            noise = seeding.normal(options.seed, Stream.LATENT_NOISE, first + step, index, options.network.shape)
            found.append(ImageBatch(x.to(place.device), noise))
        return found

    task = Autoencoding(vae, build.adam(vae, lr, BETAS, 0.0), ema, options.kl_weight, jitter, 1.0, clip_and_check)
    return ema.shadow, _train(folder, task, batches, steps, place, folder.name)


@torch.no_grad()
def _latents(world: World, place: Workplace, vae: Any, path: Path) -> tuple[Tensor, float]:
    """Latents of unit variance of all images, (N, c, h, w), made once; and the scale that they are times."""

    def make() -> None:
        found = []
        with log.progress(world.count, 0, "latents", place.main, "img") as bar:
            for index in torch.arange(world.count).split(200):
                found.append(miniature.encode(vae, world.images(index).to(place.device)).cpu())
                bar.update(len(index))
        raw = torch.cat(found)
        checkpoint.save_tensors({"latents": raw, "digest": _digest(vae)}, path)

    fresh = not path.exists() or not torch.equal(load_file(path)["digest"], _digest(vae))
    place.accelerator.wait_for_everyone()
    if fresh:
        place.first(make)
    raw = load_file(path)["latents"]
    scale = 1.0 / raw.std().item()
    return raw * scale, scale


def _digest(vae: nn.Module) -> Tensor:
    return torch.tensor(list(bytes.fromhex(checkpoint.digest(vae))), dtype=torch.uint8)


def _text(
    options: MiniatureOptions, world: World, place: Workplace, tokenizer: Any, vocabulary: int, folder: Path
) -> tuple[Any, Progress]:
    """A text encoder that knows what its captions say, and nothing of the empty caption."""

    def make() -> Describer:
        return Describer(miniature.text_encoder(options.network, vocabulary), world.questions)

    describer = _seeded(options, make).to(place.device)
    ema = Ema(describer, options.ema)

    def batches(step: int) -> list[TextBatch]:
        found = []
        for index in place.share().split(options.text_batch_size, "--text-batch-size"):
            number = step * options.text_batch_size + index
            dropped = seeding.uniform(options.seed, Stream.CONDITION_DROPOUT, step, index) < options.caption_dropout
            captions = ["" if d else c for d, c in zip(dropped.tolist(), world.captions(number), strict=True)]
            tokens = tokenizer(
                captions, padding="max_length", max_length=options.network.tokens, truncation=True, return_tensors="pt"
            )
            right = world.answers(number) * ~dropped[:, None]
            found.append(TextBatch(tokens.input_ids.to(place.device), right.to(place.device)))
        return found

    task = Describing(describer, build.adam(describer, options.text_lr, BETAS, 0.0), ema, 1.0, clip_and_check)
    progress = _train(folder, task, batches, options.text_steps, place, "text encoder")
    shadow: Any = ema.shadow
    return shadow.text.requires_grad_(False), progress


def _denoiser(
    options: MiniatureOptions, world: World, place: Workplace, latents: Tensor, text: TextEncoder, folder: Path
) -> tuple[TimestepNet, Progress]:
    autocast = torch.bfloat16 if options.mixed_precision else None
    denoiser = _seeded(options, lambda: miniature.denoiser(options.network, autocast)).to(place.device)
    denoiser.net.to(memory_format=torch.channels_last)
    captions = world.captions(torch.arange(len(latents)))
    kept = torch.empty(len(captions), options.network.tokens, options.network.text_width, dtype=torch.float16)
    with log.progress(len(captions), 0, "captions", place.main, "text") as bar:
        for first in range(0, len(captions), 500):  # those that are seen dozens of times are encoded once
            kept[first : first + 500] = text.encode(captions[first : first + 500])["text"].cpu()
            bar.update(min(500, len(captions) - first))

    def data(index: Tensor) -> tuple[Tensor, Cond]:
        return latents[index], {"text": kept[index].float()}

    null = {k: v.cpu() for k, v in text.null.items()}
    batches = TeachBatches(
        options.seed, data, len(latents), lambda u: u, null, options.batch_size, place.share(), options.caption_dropout
    )
    ema = Ema(denoiser.net, options.ema)
    task = Teacher(denoiser, build.adam(denoiser.net, options.lr, BETAS, 0.0), ema, 1.0, clip_and_check)
    progress = _train(folder, task, batches, options.steps, place, "denoiser")
    return ema.shadow, progress  # type: ignore[return-value]


# ----------------------------------------------------------------------------- card


@torch.no_grad()
def _card(options: MiniatureOptions, world: World, place: Workplace, folder: Path, seconds: dict[str, float]) -> None:
    """Measure the pipeline as it lies on the disk, and write README.md and card.json beside it."""
    pipeline = stable_diffusion.load(folder, device=place.device)
    weights = sorted(p for part in layout.STEMS for p in (folder / part).glob("*.safetensors"))
    card = {
        "command": " ".join(["dmd", *sys.argv[1:]]),
        "environment": build.environment(place) | {"command": ["dmd", *sys.argv[1:]]},
        "options": asdict(options),
        "images": world.digest,
        "seconds": seconds,
        "figures": world.measure(pipeline, options, place.device, folder),
        "files": {str(p.relative_to(folder)): checkpoint.describe(p) for p in weights},
    }
    checkpoint.write_json(folder / "card.json", card)
    (folder / "README.md").write_text(card_text(card, world.describe(options), world.licence), encoding="utf-8")


def card_text(card: dict[str, Any], about: Sequence[str], licence: str | None) -> str:
    """The card for people, from card.json."""
    e, minutes = card["environment"], {k: v / 60 for k, v in card["seconds"].items()}
    rows = [f"| {name} | {value:.4g} |" for name, value in card["figures"].items()]
    files = [f"| `{name}` | {facts['size']:,} | `{facts['sha256']}` |" for name, facts in card["files"].items()]
    facts = [f"license: {licence}"] if licence else []
    return "\n".join([
        "---", *facts, "library_name: diffusers", "pipeline_tag: text-to-image", "---", "",
        *about, "",
        f"- Made by `{card['command']}`, dmd {e['dmd']} at commit {e['commit']}, torch {e['torch']}.",
        f"- On {e['device']}, {e['threads']} threads: autoencoder {minutes['autoencoder']:.0f} minutes, text encoder "
        f"{minutes['text encoder']:.0f} minutes, UNet {minutes['denoiser']:.0f} minutes.", "",
        "| | |", "|---|---|", *rows, "",
        "| file | bytes | sha256 |", "|---|---|---|", *files, "",
    ])  # fmt: skip


def sample(
    pipeline: StableDiffusion, prompts: Sequence[str], guidance: float, steps: int, device: torch.device
) -> Tensor:
    """The pipeline's images (N, 3, H, W) of N prompts, seeds 0 to N - 1, by DDIM."""
    real = Guided(pipeline.denoiser, guidance, pipeline.null())
    number = torch.arange(len(prompts))
    with log.progress(len(prompts), 0, "samples", True, "img") as bar:
        return images(
            decoded(teacher_generator(real, ddim, steps), pipeline.codec), number, conditions(pipeline, prompts),
            number, pipeline.shape, device, 100, bar.update,
        )  # fmt: skip


def psnr(x: Tensor, y: Tensor) -> float:
    """Of images in [-1, 1], in dB."""
    return -10 * ((x - y).square().mean() / 4).log10().item()


@torch.no_grad()
def rebuilt(pipeline: StableDiffusion, x: Tensor, device: torch.device) -> Tensor:
    """Images through the autoencoder and back."""
    codec = pipeline.codec
    return torch.cat([codec.decode(codec.encode(c.to(device))).cpu() for c in x.split(100)])
