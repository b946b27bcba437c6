"""How the miniature Stable Diffusion that ships was made: `dmd teach shapes` draws a world of captioned shapes and
teaches an autoencoder, a text encoder and, on what both make of them, a UNet, and writes the pipeline's folder with its
card.
"""

import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd import build, checkpoint, evaluation, log, seeding
from dmd.batches import TeachBatches
from dmd.build import Workplace
from dmd.data import shapes
from dmd.data.images import to_float
from dmd.data.shapes import Scene
from dmd.denoiser import Cond, Guided
from dmd.ema import Ema
from dmd.errors import InputError
from dmd.generate import images, teacher_generator
from dmd.metrics import caption
from dmd.run import Cadence, Progress, Run, Task, clip_and_check
from dmd.seeding import Stream
from dmd.solvers import ddim
from dmd.teach import Autoencoding, Describing, ImageBatch, Teacher, TextBatch
from dmd.teachers import layout, miniature, stable_diffusion
from dmd.teachers.miniature import Describer, MiniatureConfig
from dmd.teachers.stable_diffusion import TextEncoder, TimestepNet

UNSEEN = 1 << 40
"""Drawings from this index on are for judging, those below for teaching."""

BETAS = (0.9, 0.99)  # of AdamW


@dataclass(frozen=True)
class ShapesOptions:
    """Teach a miniature Stable Diffusion on drawings of captioned shapes."""

    output_dir: str = "runs/shapes-teacher"
    """The pipeline's folder, and beside it in `stages/` what a stopped command goes on from."""
    seed: int = 0
    """Key of all randomness."""
    autoencoder_steps: int = 5000
    """Updates of the autoencoder, each on drawings that it has not seen."""
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
    """Updates of the text encoder, which learns by itself to say where what is."""
    text_batch_size: int = 256
    text_lr: float = 1e-3
    drawings: int = 60_000
    """How many drawings the denoiser learns from."""
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
    """Samples behind the card's figures, half of them of two things."""
    mixed_precision: bool = False
    """Run the networks in bf16."""
    cpu: bool = False
    """Use the CPU though there is a GPU."""
    network: MiniatureConfig = field(default_factory=MiniatureConfig)


def drawings(seed: int, index: Tensor) -> tuple[Tensor, list[Scene]]:
    """Drawings (B, 3, 64, 64) in [-1, 1] and what they show."""
    scenes = shapes.scenes(seed, index)
    return to_float(shapes.batch(scenes, seed, index)), scenes


def teach(options: ShapesOptions, place: Workplace) -> bool:
    """Do what is missing. Returns whether all is done (not stopped)."""
    folder = Path(options.output_dir)
    stages = folder / "stages"
    started = time.monotonic()
    place.first(lambda: _open(stages, options))
    tokens = miniature.write_tokenizer(shapes.words(), options.network.tokens, folder / "tokenizer")
    tokenizer = stable_diffusion.tokenizer(folder / "tokenizer")
    vae, vae_progress = _autoencoder(options, place, stages / "autoencoder")
    if vae_progress.step < options.autoencoder_steps:
        return False
    text, text_progress = _text(options, place, tokenizer, tokens, stages / "text")
    if text_progress.step < options.text_steps:
        return False
    latents, scale = _latents(options, place, vae, stages / "latents.safetensors")
    net, progress = _denoiser(options, place, latents, TextEncoder(tokenizer, text), stages / "denoiser")
    if progress.step < options.steps:
        return False
    vae, sharp_progress = _decoder(options, place, vae, scale, stages / "decoder")
    if sharp_progress.step < options.decoder_steps:
        return False

    def conclude() -> None:
        miniature.save(vae, net, text, scale, folder)
        seconds = {"autoencoder": vae_progress.seconds + sharp_progress.seconds}
        seconds |= {"text encoder": text_progress.seconds, "denoiser": progress.seconds}
        _card(options, place, folder, seconds | {"this start": time.monotonic() - started})

    place.first(conclude)
    return True


def _open(stages: Path, options: ShapesOptions) -> None:
    """Raises InputError if the folder was begun with other options."""
    stages.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(asdict(options)))
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


def _seeded(options: ShapesOptions, make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed % 2**32)
        return make()


def _autoencoder(options: ShapesOptions, place: Workplace, folder: Path) -> tuple[Any, Progress]:
    vae = _seeded(options, lambda: miniature.autoencoder(options.network)).to(place.device)
    return _reconstruct(options, place, vae, options.autoencoder_lr, options.autoencoder_steps, 0, 0.0, folder)


def _decoder(options: ShapesOptions, place: Workplace, vae: Any, scale: float, folder: Path) -> tuple[Any, Progress]:
    """The decoder goes on by itself, on drawings that the autoencoder has not seen."""
    vae = copy.deepcopy(vae).requires_grad_(True)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    jitter, first = options.decoder_noise / scale, options.autoencoder_steps
    return _reconstruct(options, place, vae, options.decoder_lr, options.decoder_steps, first, jitter, folder)


def _reconstruct(
    options: ShapesOptions, place: Workplace, vae: Any, lr: float, steps: int, first: int, jitter: float, folder: Path
) -> tuple[Any, Progress]:
    """Train what of the autoencoder is not frozen, on the drawings of steps from `first` on; its average."""
    vae.to(memory_format=torch.channels_last)
    ema = Ema(vae, options.ema)
    size = options.autoencoder_batch_size

    def batches(step: int) -> list[ImageBatch]:
        found = []
        for index in place.share().split(size, "--autoencoder-batch-size"):
            x, _ = drawings(options.seed, (first + step) * size + index)
            noise = seeding.normal(options.seed, Stream.LATENT_NOISE, first + step, index, options.network.shape)
            found.append(ImageBatch(x.to(place.device), noise.to(place.device)))
        return found

    task = Autoencoding(vae, build.adam(vae, lr, BETAS, 0.0), ema, options.kl_weight, jitter, 1.0, clip_and_check)
    return ema.shadow, _train(folder, task, batches, steps, place, folder.name)


@torch.no_grad()
def _latents(options: ShapesOptions, place: Workplace, vae: Any, path: Path) -> tuple[Tensor, float]:
    """Latents of unit variance of all drawings, (N, c, h, w), made once; and the scale that they are times."""
    from safetensors.torch import load_file

    def make() -> None:
        found = []
        with log.progress(options.drawings, 0, "latents", place.main, "img") as bar:
            for index in torch.arange(options.drawings).split(200):
                x, _ = drawings(options.seed, index)
                found.append(miniature.encode(vae, x.to(place.device)).cpu())
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
    options: ShapesOptions, place: Workplace, tokenizer: Any, vocabulary: int, folder: Path
) -> tuple[Any, Progress]:
    """A text encoder that knows what its captions say of each place, and nothing of the empty caption."""

    def make() -> Describer:
        return Describer(miniature.text_encoder(options.network, vocabulary), shapes.ANSWERS)

    describer = _seeded(options, make).to(place.device)
    ema = Ema(describer, options.ema)

    def batches(step: int) -> list[TextBatch]:
        found = []
        for index in place.share().split(options.text_batch_size, "--text-batch-size"):
            scenes = shapes.scenes(options.seed, step * options.text_batch_size + index)
            dropped = seeding.uniform(options.seed, Stream.CONDITION_DROPOUT, step, index) < options.caption_dropout
            captions = ["" if drop else shapes.caption(s) for drop, s in zip(dropped.tolist(), scenes, strict=True)]
            tokens = tokenizer(captions, padding="max_length", max_length=options.network.tokens, return_tensors="pt")
            right = torch.tensor([shapes.answers(s) for s in scenes]) * ~dropped[:, None]
            found.append(TextBatch(tokens.input_ids.to(place.device), right.to(place.device)))
        return found

    task = Describing(describer, build.adam(describer, options.text_lr, BETAS, 0.0), ema, 1.0, clip_and_check)
    progress = _train(folder, task, batches, options.text_steps, place, "text encoder")
    shadow: Any = ema.shadow
    return shadow.text.requires_grad_(False), progress


def _denoiser(
    options: ShapesOptions, place: Workplace, latents: Tensor, text: TextEncoder, folder: Path
) -> tuple[TimestepNet, Progress]:
    autocast = torch.bfloat16 if options.mixed_precision else None
    denoiser = _seeded(options, lambda: miniature.denoiser(options.network, autocast)).to(place.device)
    denoiser.net.to(memory_format=torch.channels_last)
    captions = [shapes.caption(s) for s in shapes.scenes(options.seed, torch.arange(len(latents)))]
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


def judge(
    pipeline: stable_diffusion.StableDiffusion, scenes: Sequence[Scene], guidance: float, steps: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """The pipeline's images (N, 3, 64, 64) of scenes, seeds 0 to N - 1."""
    real = Guided(pipeline.denoiser, guidance, pipeline.null())
    prompts = [shapes.caption(s) for s in scenes]
    number = torch.arange(len(scenes))
    with log.progress(len(scenes), 0, "samples", True, "img") as bar:
        latents = images(
            teacher_generator(real, ddim, steps), number, lambda n: pipeline.encode([prompts[i] for i in n.tolist()]),
            number, pipeline.shape, device, 100, bar.update,
        )  # fmt: skip
    with torch.no_grad():
        return torch.cat([pipeline.codec.decode(z.to(device)).cpu() for z in latents.split(100)])


@torch.no_grad()
def _card(options: ShapesOptions, place: Workplace, folder: Path, seconds: dict[str, float]) -> None:
    """Measure the pipeline as it lies on the disk, and write README.md, card.json and samples.png beside it."""
    pipeline = stable_diffusion.load(folder, device=place.device)
    index = torch.arange(UNSEEN, UNSEEN + 40 * options.samples)
    x, scenes = drawings(options.seed, index[: options.samples])
    decoded = [pipeline.codec.decode(pipeline.codec.encode(c.to(place.device))).cpu() for c in x.split(100)]
    figures: dict[str, Any] = {"autoencoder": caption.agreement(torch.cat(decoded), scenes)}
    figures["autoencoder"]["psnr"] = -10 * ((torch.cat(decoded) - x).square().mean() / 4).log10().item()
    found = shapes.scenes(options.seed, index[options.samples :])
    shown = []
    for count, name in ((1, "one thing"), (2, "two things")):
        asked = [s for s in found if len(s.things) == count][: options.samples // 2]
        made = judge(pipeline, asked, options.guidance, 50, place.device)
        figures[name] = caption.agreement(made, asked)
        shown += list(zip(made[:32], asked[:32], strict=True))
    grid = [torch.stack([image for image, _ in shown[i : i + 8]]) for i in range(0, len(shown), 8)]
    evaluation.save_grid(grid, folder / "samples.png", 1, [shapes.caption(s) for _, s in shown])
    weights = sorted(p for part in layout.STEMS for p in (folder / part).glob("*.safetensors"))
    card = {
        "command": " ".join(["dmd", "teach", "shapes", *sys.argv[3:]]),
        "environment": build.environment(place) | {"command": sys.argv},
        "options": asdict(options),
        "seconds": seconds,
        "sampler": f"DDIM, 50 steps, guidance {options.guidance}",
        "samples": options.samples // 2,
        "figures": figures,
        "files": {str(p.relative_to(folder)): checkpoint.describe(p) for p in weights},
    }
    checkpoint.write_json(folder / "card.json", card)
    (folder / "README.md").write_text(card_text(card), encoding="utf-8")


def card_text(card: dict[str, Any]) -> str:
    """The card for people, from card.json."""
    e, f = card["environment"], card["figures"]
    rows = [f"| {name} | {f[name]['agreement']:.1%} |" for name in ("one thing", "two things", "autoencoder")]
    files = [f"| `{name}` | {facts['size']:,} | `{facts['sha256']}` |" for name, facts in card["files"].items()]
    minutes = {k: v / 60 for k, v in card["seconds"].items()}
    return "\n".join([
        "---", "license: apache-2.0", "library_name: diffusers", "pipeline_tag: text-to-image", "---", "",
        "# A miniature Stable Diffusion of captioned shapes", "",
        "64 x 64 images of one or two coloured shapes, from captions such as *a small red circle at the left on a blue "
        "background* or *a red circle above a large blue square on a white background*. It has the classes and the "
        "folder layout of Stable Diffusion 1.5 and is meant as a teacher for trying distillation on a laptop. It "
        "knows nothing beyond its shapes, colours, sizes, places and relations.", "",
        f"- Made by `{card['command']}`, dmd {e['dmd']} at commit {e['commit']}, torch {e['torch']}.",
        f"- On {e['device']}, {e['threads']} threads: autoencoder {minutes['autoencoder']:.0f} minutes, text encoder "
        f"{minutes['text encoder']:.0f} minutes, UNet {minutes['denoiser']:.0f} minutes.",
        "- Learnt from nothing but drawings that the command makes by itself.",
        f"- Sampled with {card['sampler']}, {card['samples']} unseen captions a row; the last row is drawings through "
        "the autoencoder and back, the ceiling of what can be reached.", "",
        "| shows all that its caption says | |", "|---|---|", *rows, "",
        "| file | bytes | sha256 |", "|---|---|---|", *files, "",
    ])  # fmt: skip
