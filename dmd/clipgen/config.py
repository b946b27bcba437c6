"""Everything that `dmd clipgen` can be told, as frozen dataclasses; presets; JSON in and out."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Suppress

from dmd import settings
from dmd.config import RunOptions
from dmd.errors import InputError

GapKind = Literal["none", "noise", "centre", "centre+noise"]
Perceptual = Literal["l2", "lpips-vgg", "lpips-alex", "lpips-squeeze"]


@dataclass(frozen=True)
class DataOptions:
    """Images without captions, and captioned ones for those who read captions: the small CLIP, and the evaluation."""

    data: str = "shapes"
    """What tokenizer and transformer learn from: "shapes" (drawn here), a folder of images at any depth, a folder of
    .tar shards, or an .npz file with `images`. Captions that lie beside the images are not read."""
    size: int = 64
    """Height and width. Other images are scaled until their shorter side fits, and cut to the middle."""
    images: int = 20_000
    """How many drawings of "shapes" there are."""
    captioned: str | None = None
    """Folder of images with metadata.jsonl, or shards of `dmd synthesize`, that the small CLIP is taught on; with
    "shapes" it is drawn."""
    test: str | None = None
    """Folder of images with metadata.jsonl, or shards, for the evaluation, which alone reads its captions; with
    "shapes" it is drawn."""


@dataclass(frozen=True)
class TokenizerOptions:
    """The autoencoder that turns images into tokens."""

    tokenizer: str | None = None
    """Folder of a tokenizer. Left out, one is taught here, once, and cached."""
    patch: int = 2
    """Pixels of a square of this side are the channels of the first layer."""
    widths: tuple[int, ...] = (32, 64, 96)
    """Channels of each resolution, from fine to coarse. The tokens' grid has size / patch / 2^(count - 1) rows."""
    blocks: int = 1
    """Blocks of each resolution in the encoder; the decoder has one more."""
    groups: int = 1
    """Groups of all normalisations, which are of the whole image. With 0 each place is normalised by itself."""
    attention: bool = False
    """Attention at the coarsest resolution."""
    square_blocks: int = 0
    """Blocks of an encoder that sees each token's square of pixels by itself, as a vision transformer's patches, so
    that empty ground has one token wherever it is; 0 is VQGAN's encoder, which sees around each. The decoder sees all
    tokens around in any case."""
    codes: int = 512
    """How many codes there are."""
    code_width: int = 8
    """Numbers in a code, which has length one."""
    commitment: float = 0.25
    """Weight of the encoder's distance from its codes."""
    code_decay: float = 0.99
    """Of the moving average that codes are."""
    dead_below: float = 0.1
    """A code that is used less than this part of what it would be if all were used alike is replaced."""
    perceptual: Perceptual = "l2"
    """Term beside the L1 distance: LPIPS with a backbone, or the squared error."""
    perceptual_weight: float = 1.0
    lpips_weights: str | None = None
    """File of the LPIPS backbone's weights, where they are not to be downloaded."""
    adversarial: float = 0.0
    """Weight of the adversarial term, on top of its adaptive one; 0 leaves it out."""
    adversarial_from: int = 0
    """First step of the adversarial term and of its discriminator."""
    discriminator_width: int = 64
    discriminator_layers: int = 3
    tokenizer_steps: int = 1000
    tokenizer_batch_size: int = 32
    tokenizer_lr: float = 1e-3


@dataclass(frozen=True)
class ClipOptions:
    """The encoder of images and texts into one space."""

    clip: str | None = None
    """A CLIP that others have trained: a folder or hub id of transformers, open_clip:NAME, open_clip:NAME:TAG_OR_FILE,
    or open_clip:FOLDER_OR_ID; or the folder of a small CLIP. Left out, a small one is taught here on captioned images,
    once, and cached."""
    clip_patch: int = 2
    clip_widths: tuple[int, ...] = (32, 64, 96)
    clip_blocks: int = 1
    clip_text: str | None = None
    """Begin with the text encoder and tokenizer of this pipeline: a folder in Stable Diffusion's layout, or
    "shapes-teacher", which ships and knows already what captions of shapes say. The four sizes below are then its own.
    Left out, texts are learnt from nothing."""
    clip_lock_text: bool = False
    """Leave that text encoder as it is and learn its projection and the image encoder alone (locked-image tuning, Zhai
    et al. 2022, the other way about). What it knows of combinations that no image shows then stays."""
    clip_text_width: int = 128
    clip_text_layers: int = 2
    clip_tokens: int = 24
    """Length of every encoded text."""
    clip_width: int = 128
    """Numbers in an embedding."""
    clip_images: int = 30_000
    """How many captioned drawings of "shapes" the small CLIP learns from."""
    clip_steps: int = 550
    clip_batch_size: int = 128
    clip_lr: float = 2e-3
    clip_weight_decay: float = 0.05


@dataclass(frozen=True)
class TransformerOptions:
    """The causal transformer from an embedding to tokens, and its training."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    dropout: float = 0.0
    prefix: int = 1
    """Inputs that an embedding becomes, by a linear map; the papers' transformers have one."""
    gap: GapKind = "centre+noise"
    """What is done about text embeddings lying elsewhere than image embeddings: subtract each kind's mean ("centre"),
    train with noise on the embeddings ("noise"), both, or nothing."""
    gap_noise: float = 0.4
    """Share a of the noise: normalise((1 - a) e + a n)."""
    condition_dropout: float = 0.1
    """Probability of training without the embedding, which guidance needs."""
    embedding_weight: float = 0.0
    """Weight of the distance between the embedding and that of the image which the tokens stand for; 0 leaves it out,
    as the published code does."""
    max_train_steps: int = 1600
    batch_size: int = 64
    learning_rate: float = 2e-3
    muon: bool = False
    """Update the layers' matrices by Muon, at the same rate, and the rest by AdamW: fewer steps, each a little
    slower."""
    weight_decay: float = 0.05
    lr_warmup_steps: int = 100
    lr_cooldown_steps: int = 1000
    ema: float = 0.995
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class SamplingOptions:
    """How images are made from embeddings."""

    temperature: float = 0.5
    top_k: int = 0
    """Only the k likeliest tokens; 0 is all."""
    top_p: float = 0.95
    """Only the likeliest tokens that together have this probability; 1 is all."""
    guidance: float = 1.5
    """uncond + s (cond - uncond) of the logits; 1 is none."""
    candidates: int = 1
    """Images made for each that is kept: CLIP keeps the nearest."""
    sample_batch_size: int = 64
    """Images at a time."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How the model is judged at the end."""

    final_samples: int = 512
    """Images of each kind: from texts and from images, of seen combinations and of held-out ones."""
    blur: tuple[int, ...] = (0, 1, 2)
    """Radii k of the blurred Fréchet distances FD-k, in pixels."""
    features: str | None = None
    """Network that FD-k is on: inception (by clean-fid's protocol, which makes it FID-k), timm:NAME, torchvision:NAME,
    transformers:FOLDER_OR_ID, shapes-features, which ships, or another --network of dmd evaluate. Left out, the CLIP
    that the model was taught with, which flatters it."""
    features_weights: str | None = None
    """Its state dict, .safetensors or .pth; for inception the file inception-2015-12-05.pt."""
    features_download: bool = False
    """Fetch its weights if they are not given."""
    centre_prompts: str | None = None
    """File or folder of captions whose mean is taken from text embeddings, for a CLIP that brings no mean along. Take
    others than those of --test."""


@dataclass(frozen=True)
class Config:
    """A whole run, from images to report."""

    preset: Suppress[str] = "shapes"  # the first word of a command, not a flag
    data: DataOptions = field(default_factory=DataOptions)
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    clip: ClipOptions = field(default_factory=ClipOptions)
    transformer: TransformerOptions = field(default_factory=TransformerOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    run: RunOptions = field(default_factory=lambda: RunOptions(output_dir="runs/clipgen-shapes"))


RESUMABLE = {
    "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "log_every", "report_to", "cache_dir", "cpu",
    "output_dir", "data", "captioned", "test", "tokenizer", "clip", "lpips_weights", "final_samples", "blur",
    "features", "features_weights", "features_download",
    "centre_prompts", "temperature", "top_k", "top_p", "guidance", "candidates", "sample_batch_size", "allow_tf32",
}  # fmt: skip
"""Options that may differ when a run is resumed; files are compared by content instead."""


def grid(config: Config) -> int:
    """Rows, and columns, of an image's tokens."""
    o = config.tokenizer
    return config.data.size // (o.patch * 2 ** (len(o.widths) - 1))


def check(config: Config) -> None:
    """Raises InputError for values out of range."""
    d, t, c, m = config.data, config.tokenizer, config.clip, config.transformer
    s, e, r = config.sampling, config.evaluation, config.run
    positive = {
        "--size": d.size, "--images": d.images, "--patch": t.patch, "--widths": min(t.widths, default=0),
        "--blocks": t.blocks, "--code-width": t.code_width,
        "--discriminator-width": t.discriminator_width, "--discriminator-layers": t.discriminator_layers,
        "--tokenizer-steps": t.tokenizer_steps, "--tokenizer-batch-size": t.tokenizer_batch_size,
        "--tokenizer-lr": t.tokenizer_lr, "--clip-patch": c.clip_patch, "--clip-widths": min(c.clip_widths, default=0),
        "--clip-blocks": c.clip_blocks, "--clip-text-width": c.clip_text_width,
        "--clip-text-layers": c.clip_text_layers, "--clip-tokens": c.clip_tokens, "--clip-width": c.clip_width,
        "--clip-images": c.clip_images, "--clip-steps": c.clip_steps,
        "--clip-lr": c.clip_lr, "--layers": m.layers, "--width": m.width, "--heads": m.heads, "--prefix": m.prefix,
        "--max-train-steps": m.max_train_steps, "--batch-size": m.batch_size, "--learning-rate": m.learning_rate,
        "--max-grad-norm": m.max_grad_norm, "--temperature": s.temperature, "--candidates": s.candidates,
        "--sample-batch-size": s.sample_batch_size, "--checkpoints-total-limit": r.checkpoints_total_limit,
        "--log-every": r.log_every,
    }  # fmt: skip
    settings.require_positive(positive)
    for flag, count in {"--codes": t.codes, "--clip-batch-size": c.clip_batch_size}.items():
        if count < 2:
            raise InputError(f"{flag} is {count}: it must be at least 2")
    not_negative = {
        "--groups": t.groups, "--square-blocks": t.square_blocks, "--commitment": t.commitment,
        "--dead-below": t.dead_below, "--perceptual-weight": t.perceptual_weight,
        "--adversarial": t.adversarial, "--adversarial-from": t.adversarial_from,
        "--embedding-weight": m.embedding_weight, "--weight-decay": m.weight_decay,
        "--clip-weight-decay": c.clip_weight_decay,
        "--lr-warmup-steps": m.lr_warmup_steps, "--lr-cooldown-steps": m.lr_cooldown_steps, "--top-k": s.top_k,
        "--blur": min(e.blur, default=0), "--checkpointing-steps": r.checkpointing_steps,
    }  # fmt: skip
    settings.require_not_negative(not_negative)
    below_one = {
        "--code-decay": t.code_decay, "--dropout": m.dropout, "--gap-noise": m.gap_noise, "--ema": m.ema,
        "--condition-dropout": m.condition_dropout,
    }  # fmt: skip
    settings.require_below_one(below_one)
    if not 0 < s.top_p <= 1:
        raise InputError(f"--top-p is {s.top_p}: it must be above 0 and at most 1")
    settings.require_finite({"--guidance": s.guidance})
    if e.final_samples < 16:
        raise InputError(f"--final-samples is {e.final_samples}: it must be at least 16, since fewer mean nothing")
    if e.features is None and (e.features_weights is not None or e.features_download):
        raise InputError("--features-weights and --features-download are for --features: give it")
    settings.require_seed(r.seed)
    for flag, patch, widths in (("--widths", t.patch, t.widths), ("--clip-widths", c.clip_patch, c.clip_widths)):
        if d.size % (patch * 2 ** (len(widths) - 1)):
            raise InputError(
                f"--size is {d.size}: it must be divisible by {patch * 2 ** (len(widths) - 1)}, since {flag} "
                f"{' '.join(map(str, widths))} with patches of {patch} pixels makes the image so many times smaller"
            )
    wrong = [w for w in t.widths if t.groups and w % t.groups]
    if wrong:
        raise InputError(f"--widths has {wrong[0]}, which {t.groups} --groups do not divide: give a multiple")
    for flag, width, heads in (("--width", m.width, m.heads), ("--clip-text-width", c.clip_text_width, 4)):
        if width % heads:
            raise InputError(f"{flag} is {width}: it must be a multiple of the {heads} attention heads")
    if c.clip_lock_text and c.clip_text is None:
        raise InputError("--clip-lock-text locks the text encoder of --clip-text: give both, or --no-clip-lock-text")
    if d.data == "shapes" and d.size != 64:
        raise InputError(f"--size is {d.size}: drawings of shapes have 64 pixels")


def require_clip(config: Config) -> None:
    """Raises InputError if no CLIP is given, and there are no captioned images to teach a small one on."""
    if config.data.data != "shapes" and config.data.captioned is None and config.clip.clip is None:
        raise InputError(
            "a small CLIP needs captioned images: give --captioned, a folder of images with metadata.jsonl, or a "
            "trained CLIP's folder or id as --clip"
        )


def read(path: Path) -> Config:
    """The config.json of a run. Raises InputError if it is missing, damaged, or of another command."""
    return settings.read(Config, path, "dmd clipgen")


PRESETS: dict[str, Config] = {
    # captioned shapes at 64 x 64: all stages within 20 minutes on two CPU cores. Small batches, since it is updates
    # that so few minutes lack; little noise, since it hides shapes before it hides the gap, which is small here; tokens
    # of their square alone, since four fifths of a drawing are empty ground, which then needs no learning
    "shapes": Config(
        tokenizer=TokenizerOptions(
            groups=0, square_blocks=3, codes=2048, dead_below=0.02, tokenizer_steps=2600, tokenizer_batch_size=16
        ),
        clip=ClipOptions(clip_text="shapes-teacher", clip_lock_text=True, clip_weight_decay=0.3),
        transformer=TransformerOptions(
            prefix=8, gap_noise=0.1, max_train_steps=4000, batch_size=16, learning_rate=6e-3, muon=True,
            weight_decay=0.3, lr_warmup_steps=200, lr_cooldown_steps=2400, ema=0.998,
        ),
    ),
    # real pictures of 64 x 64; captions come in at the evaluation only, so CLIP is one that others have trained
    "emoji": Config(
        preset="emoji",
        data=DataOptions(data="data/emoji64/train", test="data/emoji64/test"),
        tokenizer=TokenizerOptions(
            patch=1, widths=(64, 64, 128, 128), blocks=2, groups=8, attention=True, codes=2048,
            perceptual="lpips-alex", adversarial=0.8, adversarial_from=10_000, tokenizer_steps=30_000,
            tokenizer_batch_size=64, tokenizer_lr=2e-4,
        ),
        clip=ClipOptions(clip="openai/clip-vit-base-patch32"),
        transformer=TransformerOptions(
            layers=8, width=512, heads=8, dropout=0.1, gap_noise=0.5, max_train_steps=40_000, batch_size=128,
            learning_rate=5e-4, lr_warmup_steps=500, lr_cooldown_steps=20_000, ema=0.9995,
        ),
        sampling=SamplingOptions(temperature=1.0, guidance=2.0, candidates=4),
        evaluation=EvaluationOptions(blur=(0, 1, 2, 4), centre_prompts="data/emoji64/train"),
        run=RunOptions(output_dir="runs/clipgen-emoji", mixed_precision="bf16", checkpointing_steps=2000),
    ),
    # the paper's sizes: 256 x 256 pixels, 16 x 16 tokens of 16,384 codes, 24 layers of width 1,024; for several GPUs
    "paper": Config(
        preset="paper",
        data=DataOptions(data="data/images", size=256, test="data/coco-val"),
        tokenizer=TokenizerOptions(
            patch=1, widths=(128, 128, 256, 256, 512), blocks=2, groups=32, attention=True, codes=16_384,
            perceptual="lpips-vgg", adversarial=0.8, adversarial_from=20_000, tokenizer_steps=400_000,
            tokenizer_batch_size=128, tokenizer_lr=1e-4,
        ),
        clip=ClipOptions(clip="openai/clip-vit-base-patch32"),
        transformer=TransformerOptions(
            layers=24, width=1024, heads=16, dropout=0.1, gap_noise=0.5, max_train_steps=400_000, batch_size=256,
            learning_rate=1e-4, lr_warmup_steps=2000, lr_cooldown_steps=100_000, ema=0.9999,
        ),
        sampling=SamplingOptions(temperature=1.0, guidance=2.0, top_k=500, candidates=8),
        evaluation=EvaluationOptions(
            final_samples=5000, blur=(0, 1, 2, 4, 8), centre_prompts="data/coco-train",
        ),
        run=RunOptions(output_dir="runs/clipgen-paper", mixed_precision="bf16", checkpointing_steps=5000),
    ),
}  # fmt: skip


def preset(name: str) -> Config:
    """A preset by name. Raises InputError listing the names."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r} of dmd clipgen: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def with_run(config: Config, **changes: Any) -> Config:
    """The config with some run options replaced."""
    return replace(config, run=replace(config.run, **changes))
