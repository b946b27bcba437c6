"""Everything that `dmd represent` can be told, as frozen dataclasses; methods, presets; JSON in and out."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from tyro.conf import Suppress

from dmd import settings
from dmd.config import RunOptions
from dmd.errors import InputError

METHODS = {
    "stablerep": "images of a caption attract each other (multi-positive contrast)",
    "stablerep-plus": "and images and captions too",
    "synclr": "the same against a slow teacher, with small crops and masked patches",
    "simclr": "two crops of an image attract each other",
    "clip": "images and captions attract each other",
    "supervised": "classes are told apart; of captioned images, each caption is a class",
}
WITH_TEXT = ("stablerep-plus", "clip")
WITH_CAPTIONS = ("stablerep", "stablerep-plus", "synclr", "clip", "supervised")
"""Methods that tell captions or classes apart, and so need more than one."""


@dataclass(frozen=True)
class DataOptions:
    """What is learnt from, and what a step sees of it."""

    data: str | None = None
    """Shards of `dmd synthesize` or other webdataset shards, a folder with metadata.jsonl, or, with classes for
    captions, "digits", an .npz file, or a folder of class folders. Left out, --student makes images of --captions."""
    online: bool = False
    """Have --student make fresh images in every step, which are never stored, in place of a preset's --data."""
    student: str = "shapes-student"
    """Folder of a student, or the one that ships. Its noise has the run's --seed."""
    captions: str | None = None
    """File of captions as `dmd synthesize` reads it. Left out, captions of the world of shapes, where --student makes
    the images. With --data, that must be the images of these captions."""
    caption_count: int = 2000
    """How many captions of shapes there are."""
    replicas: int = 4
    """Images of each caption that --student makes, once, and that are kept in --cache-dir."""
    synthesis_batch_size: int = 64
    """Images that the student makes at a time."""
    per_caption: int = 4
    """m: images of a caption in a step."""
    captions_per_batch: int = 64
    """C: captions in a step, over all processes; the batch has C m images."""
    max_broken: int = 0
    """Images that may be broken in each worker."""
    workers: int = 0
    """Processes that read and augment images, and with --online make them; 0 does it in the process that trains. With
    --online on a GPU this does not count: a stream of its own makes images ahead."""


@dataclass(frozen=True)
class BackboneOptions:
    """The network that is kept."""

    backbone: str = "resnet_mini"
    """timm's name of a vision transformer or convolutional network, or vit_mini or resnet_mini, which are small."""
    image_size: int = 64
    """Height and width of what the network sees."""
    channels: int = 3
    """1 for grey, 3 for colour."""
    patch_size: int | None = None
    """Of a vision transformer; left out, the architecture's own."""
    small_stem: bool = False
    """A first convolution of stride 1 and no pooling, for ResNets on images of 32 pixels and less."""
    drop_path: float = 0.0
    """Stochastic depth: probability that the last block is left out; those before it less."""


@dataclass(frozen=True)
class AugmentOptions:
    """How an image is changed before it is seen."""

    crop_scale: tuple[float, float] = (0.4, 1.0)
    """Least and largest part of the image's area that a crop holds."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strength of changes in brightness, contrast, saturation and hue."""
    jitter_probability: float = 0.0
    grey: float = 0.0
    """Probability of losing colour."""
    blur: float = 0.0
    """Probability of Gaussian blur; of synclr's small crops, whose whole ones have its own rule."""
    flip: bool = False
    """Mirror half of the images. Leave it off where captions speak of left and right."""
    downsample: float = 0.0
    """Probability of scaling an image to a half or a quarter and back first (StableRep: 0.05)."""
    local_crops: int = 4
    """Small crops of each image (synclr)."""
    local_size: int = 32
    """Their height and width."""
    local_scale: tuple[float, float] = (0.08, 0.32)
    """Their part of the image's area."""


@dataclass(frozen=True)
class LearnOptions:
    """Heads, losses and the optimiser."""

    temperature: float = 0.1
    """Of the contrast among images."""
    head_hidden: int = 512
    """Width of the heads' inner layers."""
    head_width: int = 128
    """Numbers in a contrasted feature."""
    crops: int = 2
    """Crops of an image that are views of it: 2 in simclr; 1 in the others unless said otherwise. See --local-crops for
    synclr."""
    image_weight: float = 1.0
    text_weight: float = 1.0
    """Of the two terms of stablerep-plus."""
    label_smoothing: float = 0.0
    """Of supervised."""
    max_train_steps: int = 250
    epochs: float = 0.0
    """Length in passes over all captions (or images), in place of --max-train-steps; 0 is by steps."""
    warmup: float = 0.04
    """Part of the steps in which the learning rate rises; after it, it falls as half a cosine."""
    learning_rate: float = 1e-3
    """Of the batch as it is: the papers' is their base rate times images / 256."""
    weight_decay: float = 0.1
    weight_decay_end: float | None = None
    """Reached at the last step as a cosine; left out, it stays. Biases and normalisations have none."""
    adam_beta2: float = 0.98
    max_grad_norm: float = 10.0
    """Gradients are clipped to it; the papers' are not clipped."""
    chunk: int = 0
    """Images of a process that pass the backbone at a time, for batches larger than memory; 0 is all. Costs one more
    forward pass."""


@dataclass(frozen=True)
class TeacherOptions:
    """synclr: the slow teacher and the masked patches."""

    momentum: float = 0.994
    """Of the teacher at the first step; 1 at the last, as a cosine."""
    ibot_weight: float = 1.0
    """Of the masked patches; 0 leaves them out, as convolutional networks must."""
    prototypes: int = 1024
    ibot_hidden: int = 512
    ibot_bottleneck: int = 128
    mask_images: float = 0.5
    """Part of the images that are masked."""
    mask_patches: float = 0.5
    """Part of the patches of such an image."""
    teacher_temperature: float = 0.07
    teacher_temperature_first: float = 0.04
    teacher_temperature_steps: int = 4000
    """The temperature rises to its value over so many steps."""
    sinkhorn_iterations: int = 3
    hide_own: bool = True
    """Small crops are not contrasted with the teacher's feature of their own image."""
    batch_norm: bool = False
    """Heads with batch normalisation and ReLU, as the published code can have them, for layer normalisation and GELU.
    A network that knows nothing gives all images nearly one feature; this tells them apart from the first update."""


@dataclass(frozen=True)
class TextOptions:
    """stablerep-plus and clip: the text tower, CLIP's."""

    tokenizer: str | None = None
    """Folder or hub id of a CLIP tokenizer. Left out, one is made of the captions' words."""
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    text_tokens: int = 24
    """Length of every encoded text."""
    embedding: int = 128
    """Numbers in an embedding of image or text."""


@dataclass(frozen=True)
class ProbeOptions:
    """How the backbone is judged at the end, on real images that it has not seen."""

    probe: str | None = "shapes"
    """"shapes" (drawings of single things, by what they are), "digits", or another set with train and test parts as
    `dmd probe` reads it; None judges nothing."""


@dataclass(frozen=True)
class Config:
    """A whole run: images, learner, probe."""

    method: Suppress[str] = "stablerep"  # the first word of a command, not a flag
    preset: Suppress[str] = "shapes"  # the second
    data: DataOptions = field(default_factory=DataOptions)
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    learn: LearnOptions = field(default_factory=LearnOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    text: TextOptions = field(default_factory=TextOptions)
    probe: ProbeOptions = field(default_factory=ProbeOptions)
    run: RunOptions = field(default_factory=RunOptions)


RESUMABLE = {
    "checkpointing_steps", "checkpoints_total_limit", "log_every", "report_to", "cache_dir", "cpu", "output_dir",
    "allow_tf32", "data", "captions", "student", "tokenizer", "workers", "chunk", "probe",
    "max_broken", "synthesis_batch_size",
}  # fmt: skip
"""Options that may differ when a run is resumed; what is learnt from is compared by content instead."""


def views(config: Config) -> int:
    """Images that a caption, an image or a pair has in a step: m, or crops of one."""
    return config.data.per_caption * config.learn.crops


def crops_of_image(config: Config) -> int:
    """Crops of an image that the networks see in a step; of synclr one whole one and the small ones."""
    return 1 + config.augment.local_crops if config.method == "synclr" else config.learn.crops


def check(config: Config) -> None:
    """Raises InputError for values out of range or that do not go together."""
    d, b, a, m = config.data, config.backbone, config.augment, config.learn
    t, x, r = config.teacher, config.text, config.run
    if config.method not in METHODS:
        raise InputError(f"there is no method {config.method!r}: choose one of {', '.join(METHODS)}")
    positive = {
        "--caption-count": d.caption_count, "--replicas": d.replicas, "--per-caption": d.per_caption,
        "--synthesis-batch-size": d.synthesis_batch_size, "--image-size": b.image_size,
        "--patch-size": 1 if b.patch_size is None else b.patch_size, "--temperature": m.temperature,
        "--head-hidden": m.head_hidden, "--head-width": m.head_width, "--crops": m.crops,
        "--max-train-steps": m.max_train_steps, "--learning-rate": m.learning_rate,
        "--max-grad-norm": m.max_grad_norm, "--prototypes": t.prototypes, "--ibot-hidden": t.ibot_hidden,
        "--ibot-bottleneck": t.ibot_bottleneck, "--teacher-temperature": t.teacher_temperature,
        "--teacher-temperature-first": t.teacher_temperature_first, "--sinkhorn-iterations": t.sinkhorn_iterations,
        "--text-width": x.text_width, "--text-layers": x.text_layers, "--text-heads": x.text_heads,
        "--text-tokens": x.text_tokens - 2, "--embedding": x.embedding, "--local-size": a.local_size,
        "--checkpoints-total-limit": r.checkpoints_total_limit,
        "--log-every": r.log_every,
    }  # fmt: skip
    settings.require_positive(positive)
    not_negative = {
        "--max-broken": d.max_broken, "--workers": d.workers, "--local-crops": a.local_crops, "--epochs": m.epochs,
        "--image-weight": m.image_weight, "--text-weight": m.text_weight, "--weight-decay": m.weight_decay,
        "--weight-decay-end": m.weight_decay_end or 0.0, "--chunk": m.chunk, "--ibot-weight": t.ibot_weight,
        "--teacher-temperature-steps": t.teacher_temperature_steps, "--checkpointing-steps": r.checkpointing_steps,
        "--jitter": min(a.jitter),
    }  # fmt: skip
    settings.require_not_negative(not_negative)
    parts = {
        "--jitter-probability": a.jitter_probability, "--grey": a.grey, "--blur": a.blur, "--downsample": a.downsample,
        "--warmup": m.warmup, "--mask-images": t.mask_images, "--mask-patches": t.mask_patches,
        "--momentum": t.momentum,
    }  # fmt: skip
    for flag, value in parts.items():
        if not 0 <= value <= 1:
            raise InputError(f"{flag} is {value}: it must be within 0 and 1")
    below_one = {
        "--drop-path": b.drop_path, "--label-smoothing": m.label_smoothing, "--adam-beta2": m.adam_beta2,
    }  # fmt: skip
    settings.require_below_one(below_one)
    for flag, (low, high) in {"--crop-scale": a.crop_scale, "--local-scale": a.local_scale}.items():
        if not 0 < low <= high <= 1:
            raise InputError(f"{flag} is {low} {high}: two parts of an area, rising, above 0 and at most 1")
    if a.jitter[3] > 0.5:
        raise InputError(f"--jitter ends with {a.jitter[3]}: a change of hue is at most 0.5")
    if b.channels not in (1, 3):
        raise InputError(f"--channels is {b.channels}: it must be 1 or 3")
    settings.require_seed(r.seed)
    if x.text_width % x.text_heads:
        raise InputError(f"--text-width is {x.text_width}: it must be a multiple of --text-heads {x.text_heads}")
    if d.captions_per_batch < 2:
        raise InputError(f"--captions-per-batch is {d.captions_per_batch}: it must be at least 2")
    if d.online and d.data is not None:
        raise InputError(f"--online makes images, and --data {d.data} has them: give one of both")
    if d.data is None and not d.online and d.per_caption > d.replicas:
        raise InputError(
            f"--per-caption is {d.per_caption}, but --replicas makes {d.replicas} images of each caption: ask for "
            "fewer in a step, or make more"
        )
    if config.method in ("stablerep", "stablerep-plus", "simclr") and views(config) < 2:
        raise InputError(
            f"--per-caption {d.per_caption} with --crops {m.crops} leaves every image without another to attract: "
            "give 2 or more of one of them"
        )
    if max(views(config), a.local_crops) > 256:
        raise InputError(f"--per-caption {d.per_caption} with --crops {m.crops} makes too many views: at most 256")
    if config.method == "synclr" and d.per_caption < 2:
        raise InputError(f"--per-caption is {d.per_caption}: synclr needs at least 2 images of a caption")
    if config.method == "synclr" and m.crops != 1:
        raise InputError(f"--crops is {m.crops}: synclr has one whole crop of an image, and --local-crops small ones")
    if b.patch_size is not None:
        for flag, size in {"--image-size": b.image_size, "--local-size": a.local_size}.items():
            if size % b.patch_size and (flag == "--image-size" or config.method == "synclr"):
                raise InputError(
                    f"{flag} is {size}, which patches of {b.patch_size} pixels do not divide: give a multiple of "
                    f"{b.patch_size}"
                )


def read(path: Path) -> Config:
    """The config.json of a run. Raises InputError if it is missing, damaged, or of another command."""
    return settings.read(Config, path, "dmd represent")


# ----------------------------------------------------------------------------- presets

STRONG = AugmentOptions(
    crop_scale=(0.08, 1.0), jitter_probability=0.8, grey=0.2, blur=0.5, flip=True, local_size=96,
)  # fmt: skip
"""StableRep's augmentation."""
SYNCLR = replace(STRONG, crop_scale=(0.32, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), downsample=0.05)

PRESETS: dict[str, str] = {
    "shapes": "on the CPU: the shipped student draws captioned shapes, a small ResNet learns, real drawings judge",
    "digits": "on the CPU: scikit-learn's digits, their classes as captions",
    "small": "one GPU: images of 32 pixels (CIFAR-10, Fashion-MNIST), ResNet-18",
    "gpu": "one GPU: images of 224 pixels, ViT-S/16, with gradient caching",
    "paper": "the papers' sizes: ViT-B/16, thousands of captions a step, many GPUs",
}


def preset(method: str, name: str = "shapes") -> Config:
    """A method's settings by the name of a preset.

    Raises:
        InputError: there is no such method or preset.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}")
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r} of dmd represent: choose one of {', '.join(PRESETS)}")
    return _for_method(
        {"shapes": _shapes, "digits": _digits, "small": _small, "gpu": _gpu, "paper": _paper}[name](method)
    )


def _for_method(config: Config) -> Config:
    """What a method needs in any preset: as many images in a step, dealt out in its own way."""
    d, m = config.data, config.learn
    images = d.captions_per_batch * d.per_caption
    out = replace(config.run, output_dir=f"runs/{config.method}-{config.preset}")
    if config.method == "simclr":
        d = replace(d, captions_per_batch=images // 2, per_caption=1)
        m = replace(m, crops=2)
    else:
        m = replace(m, crops=1)
    if config.method in ("clip", "supervised"):
        d = replace(d, captions_per_batch=images, per_caption=1)
    return replace(config, data=d, learn=m, run=out)


def _shapes(method: str) -> Config:
    config = Config(method=method, preset="shapes")
    if method != "synclr":
        return config
    # a few hundred updates: a teacher that follows at once, and heads that tell features apart from the start
    return replace(
        config,
        backbone=replace(config.backbone, backbone="vit_mini", patch_size=8),
        data=replace(config.data, captions_per_batch=32),
        augment=replace(config.augment, local_crops=2),
        learn=replace(
            config.learn, temperature=0.08, learning_rate=2e-3, weight_decay=0.04, weight_decay_end=0.2,
            adam_beta2=0.999,
        ),
        teacher=replace(config.teacher, momentum=0.9, batch_norm=True, teacher_temperature_steps=50),
    )  # fmt: skip


def _digits(method: str) -> Config:
    return replace(
        _shapes(method),
        preset="digits",
        data=DataOptions(data="digits", captions_per_batch=64, per_caption=4),
        backbone=BackboneOptions(
            "vit_mini" if method == "synclr" else "resnet_mini", image_size=8, channels=1,
            patch_size=2 if method == "synclr" else None, small_stem=method != "synclr",
        ),
        augment=AugmentOptions(crop_scale=(0.5, 1.0), local_size=4, local_crops=0),  # which show too little of a digit
        probe=ProbeOptions("digits"),
    )  # fmt: skip


def _small(method: str) -> Config:
    vit = method == "synclr"
    return Config(
        method, "small",
        data=DataOptions(data="data/cifar10", captions_per_batch=128, per_caption=4, workers=8),
        backbone=BackboneOptions("vit_tiny_patch16_224" if vit else "resnet18", 32, 3, 4 if vit else None, not vit),
        augment=replace(STRONG, crop_scale=(0.2, 1.0), blur=0.0, local_size=16),
        learn=LearnOptions(
            head_hidden=2048, head_width=256, max_train_steps=20_000, temperature=0.08 if vit else 0.1,
            weight_decay=0.04 if vit else 0.1, weight_decay_end=0.2 if vit else None,
            adam_beta2=0.999 if vit else 0.98,
        ),
        teacher=TeacherOptions(prototypes=4096, ibot_hidden=2048, ibot_bottleneck=256),
        text=TextOptions(text_width=256, text_layers=4, embedding=256),
        probe=ProbeOptions(None),
        run=RunOptions(mixed_precision="bf16", checkpointing_steps=1000, log_every=50),
    )  # fmt: skip


def _gpu(method: str) -> Config:
    paper = _paper(method)
    vit = "vit_small_patch16_224"
    return replace(
        paper,
        preset="gpu",
        data=replace(paper.data, captions_per_batch=256, per_caption=4, workers=8),
        backbone=replace(paper.backbone, backbone=vit, drop_path=0.0),
        learn=replace(
            paper.learn,
            epochs=0.0,
            max_train_steps=50_000,
            learning_rate=2e-4 * 1024 / 256,
            chunk=256,
        ),
        teacher=replace(paper.teacher, prototypes=8192),
        run=replace(paper.run, checkpointing_steps=1000),
    )


def _paper(method: str) -> Config:
    """StableRep on CC12M, 1x: 1,376 captions of 6 images, 15 epochs of which the first half warms up. SynCLR's final
    run: 8,192 captions of 4 images, 500,000 steps, 80,000 of them to warm up."""
    run = RunOptions(mixed_precision="bf16", checkpointing_steps=2000, log_every=100)
    text = TextOptions("openai/clip-vit-base-patch32", 512, 12, 8, 77, 512)
    heads = LearnOptions(head_hidden=4096, head_width=256, max_grad_norm=1e6)
    if method == "synclr":
        return Config(
            method, "paper",
            data=DataOptions("data/synthetic", captions_per_batch=8192, per_caption=4, workers=16),
            backbone=BackboneOptions("vit_base_patch16_224", 224, drop_path=0.1),
            augment=SYNCLR,
            learn=replace(
                heads, temperature=0.08, max_train_steps=500_000, warmup=0.16, learning_rate=2e-3, weight_decay=0.04,
                weight_decay_end=0.2, adam_beta2=0.999,
            ),
            teacher=TeacherOptions(prototypes=65_536, ibot_hidden=2048, ibot_bottleneck=256),
            text=text, probe=ProbeOptions(None), run=run,
        )  # fmt: skip
    return Config(
        method, "paper",
        data=DataOptions("data/synthetic", captions_per_batch=1376, per_caption=6, workers=16),
        backbone=BackboneOptions("vit_base_patch16_224", 224),
        augment=STRONG,
        learn=replace(heads, epochs=15.0, warmup=0.5 / 15, learning_rate=2e-4 * 1376 * 6 / 256 * 0.5),
        text=text, probe=ProbeOptions(None), run=run,
    )  # fmt: skip
