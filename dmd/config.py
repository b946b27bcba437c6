"""Everything a user can set, as frozen dataclasses; presets; JSON in and out. The commands' flags are these fields."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Suppress

from dmd import settings
from dmd.errors import InputError


@dataclass(frozen=True)
class DataOptions:
    """Real images that the teacher learns and that samples are measured against."""

    data: str | None = "digits"
    """"digits" (ships with scikit-learn), "shapes" (drawn here), or a folder: train.npz, class/*.png, or torchvision's
    own layout. None measures nothing against real images."""
    prompts: str | None = None
    """What a text-to-image teacher is asked for: a file or folder of prompts (.txt, .jsonl, .parquet, webdataset, or
    images with metadata.jsonl), or "shapes". Left out, the names of the data's classes."""
    captions: int = 10_000
    """How many captions of "shapes" there are."""
    size: int = 8
    """Height and width of the images. Smaller ones are padded with black, larger ones refused."""
    channels: int = 1
    """1 for grey, 3 for colour."""
    flip: bool = False
    """Mirror half of the images when teaching."""
    download: bool = False
    """Let torchvision download CIFAR-10 or Fashion-MNIST into --data if it is not there."""


@dataclass(frozen=True)
class TeacherOptions:
    """The many-step diffusion model that is distilled."""

    teacher: str | None = None
    """Folder of a teacher: a pixel network (config.json, model.safetensors) or a Stable Diffusion pipeline
    (model_index.json), or its id on the hub. Left out, a pixel network is taught here, once,
    and cached."""
    variant: str | None = None
    """Which of a Stable Diffusion teacher's weights are read where there are several: "fp16" for files named
    *.fp16.safetensors."""
    width: int = 24
    """Channels of the UNet's first resolution."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels of each resolution as multiples of the width."""
    blocks: int = 1
    """Blocks per resolution."""
    attention: tuple[bool, ...] = (False, True)
    """Whether each resolution has self-attention."""
    sigma_data: float = 0.75
    """Standard deviation of the images in [-1, 1]."""
    teach_steps: int = 3000
    """Updates of the teacher's own training."""
    teach_batch_size: int = 64
    """Images per update of the teacher, over all processes."""
    teach_lr: float = 2e-3
    """Learning rate of the teacher."""
    teach_ema: float = 0.999
    """EMA decay of the teacher's weights; the EMA is the teacher."""
    label_dropout: float = 0.1
    """Probability of teaching without the label, which guidance needs."""
    p_mean: float = -1.2
    """Mean of ln sigma in the teacher's training (EDM)."""
    p_std: float = 1.2
    """Standard deviation of ln sigma in the teacher's training (EDM)."""


@dataclass(frozen=True)
class PairOptions:
    """Noise-image pairs of the regression loss."""

    pairs: int = 8000
    """How many pairs."""
    solver: Literal["heun", "ddim", "pndm", "ddim-leading", "dpm-solver"] = "heun"
    """The teacher's deterministic sampler: our Heun and DDIM ("trailing" steps, which begin where a student works), or
    the stock ones of Stable Diffusion."""
    teacher_steps: int = 18
    """Steps of the teacher's sampler, for pairs and for comparison (Heun: 2 n - 1 evaluations)."""
    guidance: float = 1.0
    """Guidance scale of pairs, of the teacher in comparisons, and of the real score where --matching-guidance is left
    out: uncond + s (cond - uncond), so 1 means conditional only."""
    pair_shard_size: int = 1000
    """Pairs per file."""
    store_images: Literal["no", "uint8", "fp16"] = "no"
    """Store the decoded images of the pairs, too, so that the regression on images need not decode its targets: as
    bytes, which cuts them to what pixels can show, or as they are in half precision."""


@dataclass(frozen=True)
class DistillOptions:
    """Distribution Matching Distillation."""

    objective: Literal["dmd", "matching", "regression"] = "dmd"
    """Both losses, or one alone (the paper's ablations)."""
    student: str | None = None
    """A student of this teacher to go on from: a folder, or one that ships. Left out, it begins as the teacher."""
    critic_warmup_steps: int = 0
    """Steps at the start that train the fake score alone: as the teacher's copy it does not know a --student's images
    yet, and would push it the wrong way."""
    max_train_steps: int = 1500
    """Steps: generator updates, after --critic-warmup-steps of the fake score alone."""
    batch_size: int = 64
    """Unpaired noises per generator update, over all processes."""
    pair_batch_size: int = 64
    """Noise-image pairs per generator update, over all processes."""
    match_pairs: bool = False
    """Match the paired samples too, as the paper does for text to image."""
    learning_rate: float = 2e-3
    """Learning rate of the student."""
    fake_learning_rate: float | None = None
    """Learning rate of the fake score; the student's if left out."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.01
    lr_warmup_steps: int = 50
    """Steps over which the learning rates rise linearly."""
    lr_cooldown_steps: int = 750
    """Steps at the end over which the learning rates fall linearly to 0."""
    max_grad_norm: float = 10.0
    """Gradients are clipped to this norm, each network by itself."""
    ema: float = 0.995
    """EMA decay of the student; the EMA is what users get."""
    lambda_reg: float = 4.0
    """Weight of the regression loss. The paper's 0.25 is for LPIPS, whose values are far larger than squared errors."""
    regression: Literal["l2", "lpips-vgg", "lpips-alex", "lpips-squeeze"] = "l2"
    """Distance of the regression loss. The papers use LPIPS with VGG, which needs pretrained weights."""
    regression_on: Literal["images", "latents"] = "images"
    """Compare decoded images, through the decoder and back for every pair, or the latents themselves, which costs
    nothing. The same for pixel networks."""
    regression_crop: int | None = None
    """Compare no more than a random square of the latents, of this height and width, decoded or not: a quarter of the
    cost at half the side."""
    regression_decoder: str = "full"
    """What decodes latents for the regression on images: "full", "tiny" (madebyollin/taesd from the hub, a fifteenth of
    the cost), or the folder of an AutoencoderTiny."""
    lpips_weights: str | None = None
    """File with the backbone of LPIPS (torchvision's state dict, .pth or .safetensors)."""
    lpips_size: int = 64
    """Images are enlarged to this size before LPIPS (the paper: 224)."""
    critic_steps_per_generator_step: int = 1
    """Updates of the fake score, each on fresh samples, per update of the student."""
    t_min: float = 0.02
    t_max: float = 0.98
    """Times of the matching loss; the fake score is trained on all of (0, 1)."""
    matching_guidance: float | None = None
    """Guidance scale of the real score in the matching loss; left out, that of the pairs."""
    guidance_t_min: float | None = None
    guidance_t_max: float | None = None
    """Times of the guidance part of the matching gradient; left out, those of the matching part."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per update, for all losses."""
    pair_accumulation_steps: int | None = None
    """Micro-batches of the pairs, apart from those of the noises: regression on decoded images takes several times
    their memory. Left out, each micro-batch has a part of both."""


@dataclass(frozen=True)
class MemoryOptions:
    """What large networks need to fit. None of it changes what is learnt, but adapters and 8-bit states."""

    gradient_checkpointing: bool = False
    """Recompute the activations of student and fake score in the backward pass: a sixth of them for a quarter more
    arithmetic."""
    gradient_checkpointing_fake: bool | None = None
    """The same for the fake score alone, where it should not be as for the student. Adapters on one network recompute
    together."""
    checkpoint_decoder: bool = False
    """The same for the decoder of the regression on images, whose activations are the largest of all."""
    real_in_bf16: bool = False
    """Keep the weights of the frozen real score in bf16."""
    fake_lora_rank: int = 0
    """Train adapters of this rank on the frozen teacher as the fake score, instead of a second network; 0 is a second
    network."""
    student_lora_rank: int = 0
    """Train adapters of this rank on the frozen teacher as the student, too; 0 trains a whole network. The student is
    written whole and, beside it, as adapters alone."""
    adam_8bit: bool = False
    """Keep the optimisers' states in 8 bits (needs CUDA and bitsandbytes)."""
    enable_xformers_memory_efficient_attention: bool = False
    """Use xformers' attention where it is installed; torch's own is as fast or faster."""
    fsdp: bool = False
    """Spread what is trained over the processes (FSDP2): weights, gradients, optimiser states and average of student
    and fake score. On by itself where accelerate is configured for FSDP."""
    compile: bool = False
    """Compile the networks with torch.compile, while teaching too: the first steps take minutes, the others less."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How the student is judged, against its own teacher from the same noise."""

    features: str | None = None
    """File of a pretrained CIFAR ResNet (.th) whose features measure the Fréchet distance. Left out, a small classifier
    is trained on the data, once, and cached."""
    eval_every: int = 250
    """Steps between evaluations; the best student by Fréchet distance is kept."""
    eval_samples: int = 1000
    """Samples of evaluations in the loop."""
    final_samples: int = 5000
    """Samples of the final comparison with the teacher, from noise that no evaluation in the loop has used."""
    test_prompts: str | None = None
    """Prompts that no training sees, in the forms of --prompts: what student and teacher are compared on. Left out,
    --prompts; "shapes" has such ones of its own."""
    repeats: int = 4
    """Images for each prompt in an evaluation, which diversity needs; classes are taken in turn instead."""
    compare_steps: int | None = None
    """Steps of the teacher in the final comparison; those of its pairs if left out."""


@dataclass(frozen=True)
class RunOptions:
    """Where and how the command runs."""

    output_dir: str = "runs/digits"
    """The run directory. The same command with the same directory resumes."""
    cache_dir: str = "runs/cache"
    """Teachers, pairs and classifiers that several runs share."""
    seed: int = 0
    """Key of all randomness, 0 to 2^64 - 1."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Dtype of the networks' arithmetic; conversions, losses and averages stay float32."""
    cpu: bool = False
    """Use the CPU though there is a GPU."""
    checkpointing_steps: int = 250
    """Steps between checkpoints."""
    checkpoints_total_limit: int = 2
    """How many checkpoints to keep."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where figures go beside metrics.jsonl. wandb runs offline unless WANDB_MODE says otherwise."""
    allow_tf32: bool = True
    """Let CUDA use TF32 in float32 matrix products and convolutions."""


@dataclass(frozen=True)
class Config:
    """A whole run, from data to report."""

    preset: Suppress[str] = "digits"  # the first word of a command, not a flag
    data: DataOptions = field(default_factory=DataOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    pairs: PairOptions = field(default_factory=PairOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    run: RunOptions = field(default_factory=RunOptions)


RESUMABLE = {
    "max_train_steps", "eval_every", "eval_samples", "final_samples", "checkpointing_steps", "checkpoints_total_limit",
    "log_every", "report_to", "cache_dir", "cpu", "output_dir", "download", "lpips_weights", "features", "data",
    "teacher", "student", "prompts", "test_prompts", "repeats", "compare_steps", "gradient_checkpointing",
    "gradient_checkpointing_fake", "checkpoint_decoder", "compile", "variant", "fsdp",
    "enable_xformers_memory_efficient_attention",
}  # fmt: skip
"""Options that may differ when a run is resumed; files are compared by content instead."""


def real_guidance(config: Config) -> float:
    """Guidance scale of the real score."""
    own = config.distill.matching_guidance
    return config.pairs.guidance if own is None else own


def check(config: Config) -> None:
    """Raises InputError for values out of range."""
    d, e, r = config.distill, config.evaluation, config.run
    positive = {
        "--size": config.data.size, "--width": config.teacher.width, "--blocks": config.teacher.blocks,
        "--multipliers": min(config.teacher.multipliers, default=0), "--sigma-data": config.teacher.sigma_data,
        "--teach-batch-size": config.teacher.teach_batch_size, "--teach-lr": config.teacher.teach_lr,
        "--max-train-steps": d.max_train_steps, "--gradient-accumulation-steps": d.gradient_accumulation_steps,
        "--critic-steps-per-generator-step": d.critic_steps_per_generator_step,
        "--teacher-steps": config.pairs.teacher_steps,
        "--pair-shard-size": config.pairs.pair_shard_size, "--checkpoints-total-limit": r.checkpoints_total_limit,
        "--learning-rate": d.learning_rate, "--max-grad-norm": d.max_grad_norm, "--log-every": r.log_every,
        "--pair-accumulation-steps": 1 if d.pair_accumulation_steps is None else d.pair_accumulation_steps,
        "--regression-crop": 1 if d.regression_crop is None else d.regression_crop,
        "--captions": config.data.captions, "--repeats": e.repeats,
        "--compare-steps": config.pairs.teacher_steps if e.compare_steps is None else e.compare_steps,
        "--p-std": config.teacher.p_std, "--lpips-size": d.lpips_size,
        "--fake-learning-rate": d.learning_rate if d.fake_learning_rate is None else d.fake_learning_rate,
    }  # fmt: skip
    settings.require_positive(positive)
    not_negative = {
        "--teach-steps": config.teacher.teach_steps, "--lr-warmup-steps": d.lr_warmup_steps,
        "--lr-cooldown-steps": d.lr_cooldown_steps, "--weight-decay": d.weight_decay, "--lambda-reg": d.lambda_reg,
        "--critic-warmup-steps": d.critic_warmup_steps,
        "--fake-lora-rank": config.memory.fake_lora_rank, "--student-lora-rank": config.memory.student_lora_rank,
        "--eval-every": e.eval_every, "--checkpointing-steps": r.checkpointing_steps,
    }  # fmt: skip
    settings.require_not_negative(not_negative)
    below_one = {
        "--ema": d.ema, "--teach-ema": config.teacher.teach_ema,
        "--adam-beta1": d.adam_beta1, "--adam-beta2": d.adam_beta2,
    }  # fmt: skip
    settings.require_below_one(below_one)
    finite = {"--guidance": config.pairs.guidance, "--p-mean": config.teacher.p_mean}
    settings.require_finite(finite | {"--matching-guidance": real_guidance(config)})
    if not 0 <= config.teacher.label_dropout <= 1:
        raise InputError(f"--label-dropout is {config.teacher.label_dropout}: it must be within 0 and 1")
    given = config.teacher.teacher is not None
    if config.data.prompts is not None and not given:
        raise InputError("--prompts are for a text-to-image teacher: give its folder or id as --teacher")
    if config.data.prompts is None and config.data.data is None:
        raise InputError("neither --data nor --prompts is given: without them nothing says what images are asked for")
    if e.test_prompts is not None and config.data.prompts in (None, "shapes"):
        raise InputError(
            f"--test-prompts is {e.test_prompts}: it is for prompts of your own, and classes and shapes are judged "
            "without it; leave it out"
        )
    if config.teacher.width % 4:
        raise InputError(
            f"--width is {config.teacher.width}: it must be a multiple of 4, for the UNet's normalisations"
        )
    if e.features is None and config.data.size < 4:
        raise InputError(f"--size is {config.data.size}: the network that measures images takes 4 or more")
    if not 0.0 <= d.t_min < d.t_max <= 1.0:
        raise InputError(f"--t-min {d.t_min} and --t-max {d.t_max}: they must be in order and within 0 and 1")
    if (d.guidance_t_min is None) != (d.guidance_t_max is None):
        raise InputError("--guidance-t-min and --guidance-t-max belong together: give both or none")
    low, high = d.guidance_t_min, d.guidance_t_max
    if low is not None and high is not None:
        if not 0.0 <= low < high <= 1.0:
            raise InputError(f"--guidance-t-min {low} and --guidance-t-max {high}: they must rise within 0 and 1")
        if real_guidance(config) == 1.0:
            raise InputError("--guidance-t-min needs --guidance other than 1: without guidance there is no such part")
    ranks = (config.memory.student_lora_rank, config.memory.fake_lora_rank)
    if any(ranks) and not given:
        raise InputError(
            f"--student-lora-rank is {ranks[0]} and --fake-lora-rank {ranks[1]}: adapters are for Stable Diffusion, so "
            "give its folder or id as --teacher"
        )
    if d.student is not None and ranks[0]:
        raise InputError(
            f"--student {d.student} with --student-lora-rank {ranks[0]}: adapters begin as the teacher: leave one out"
        )
    if d.critic_warmup_steps and d.objective == "regression":
        raise InputError(
            f"--critic-warmup-steps is {d.critic_warmup_steps}, but --objective regression has no fake score: give 0"
        )
    if d.critic_warmup_steps >= d.max_train_steps:
        raise InputError(
            f"--critic-warmup-steps is {d.critic_warmup_steps} of {d.max_train_steps} steps: it must be less"
        )
    if config.pairs.store_images != "no" and (d.regression_on == "latents" or d.regression_crop is not None):
        raise InputError(
            f"--store-images {config.pairs.store_images} is for the regression on whole decoded images: leave it out "
            "with --regression-on latents or --regression-crop"
        )
    settings.require_seed(r.seed)
    if config.data.channels not in (1, 3):
        raise InputError(f"--channels is {config.data.channels}: it must be 1 or 3")
    if d.objective != "regression" and d.batch_size < 1:
        raise InputError(f"--batch-size is {d.batch_size}: distribution matching needs at least 1")
    if d.objective != "matching" and (d.pair_batch_size < 1 or config.pairs.pairs < 1):
        raise InputError(
            f"--pairs is {config.pairs.pairs} and --pair-batch-size {d.pair_batch_size}: the regression loss needs at "
            f"least 1 of each; or use --objective matching"
        )
    if e.final_samples < 16 or (e.eval_every and e.eval_samples < 16):
        raise InputError(
            f"--eval-samples is {e.eval_samples} and --final-samples {e.final_samples}: both must be at least 16, "
            f"since a Fréchet distance of fewer means nothing"
        )
    if len(config.teacher.multipliers) != len(config.teacher.attention):
        raise InputError("--multipliers and --attention must be equally long: one entry for each resolution")
    if not given and config.data.size % 2 ** (len(config.teacher.multipliers) - 1):
        raise InputError(
            f"--size is {config.data.size}: it must be divisible by {2 ** (len(config.teacher.multipliers) - 1)}, "
            f"since the UNet halves it {len(config.teacher.multipliers) - 1} times"
        )


def read(path: Path) -> Config:
    """The config.json of a run. Raises InputError if it is missing, damaged, or of another command."""
    return settings.read(Config, path, "dmd train")


PRESETS: dict[str, Config] = {
    # 8 x 8 handwritten digits: the whole chain in minutes on two CPU cores. Measured in docs/log.md.
    "digits": Config(),
    # 28 x 28 clothes, padded to 32; for one GPU
    "fashion": Config(
        preset="fashion",
        data=DataOptions(data="data/fashion", size=32, channels=1),
        teacher=TeacherOptions(
            width=64, multipliers=(1, 2, 2), blocks=2, attention=(False, True, False), sigma_data=0.7,
            teach_steps=30_000, teach_batch_size=256, teach_lr=5e-4, teach_ema=0.9995,
        ),
        pairs=PairOptions(pairs=50_000),
        distill=DistillOptions(
            max_train_steps=30_000, batch_size=128, pair_batch_size=128, learning_rate=1e-4, lr_warmup_steps=500,
            lr_cooldown_steps=10_000, ema=0.9995,
        ),
        evaluation=EvaluationOptions(eval_every=2000, eval_samples=5000, final_samples=10_000),
        run=RunOptions(output_dir="runs/fashion", mixed_precision="bf16", checkpointing_steps=2000, log_every=100),
    ),
    # 32 x 32 photographs: the paper's loss, rate and warm-up, a smaller network and fewer steps; for one GPU
    "cifar10": Config(
        preset="cifar10",
        data=DataOptions(data="data/cifar10", size=32, channels=3, flip=True),
        teacher=TeacherOptions(
            width=128, multipliers=(1, 2, 2), blocks=2, attention=(False, True, False), sigma_data=0.5,
            teach_steps=100_000, teach_batch_size=256, teach_lr=4e-4, teach_ema=0.9998,
        ),
        pairs=PairOptions(pairs=100_000),
        distill=DistillOptions(
            max_train_steps=100_000, batch_size=256, pair_batch_size=256, learning_rate=5e-5, lr_warmup_steps=500,
            lr_cooldown_steps=20_000, lambda_reg=0.25, regression="lpips-vgg", ema=0.9995,
        ),
        evaluation=EvaluationOptions(eval_every=5000, eval_samples=5000, final_samples=50_000),
        run=RunOptions(output_dir="runs/cifar10", mixed_precision="bf16", checkpointing_steps=5000, log_every=100),
    ),
    # text to image: one or two captioned shapes at 64 x 64, from the miniature Stable Diffusion that ships
    "shapes": Config(
        preset="shapes",
        data=DataOptions(data="shapes", prompts="shapes", size=64, channels=3),
        teacher=TeacherOptions(teacher="shapes-teacher"),
        pairs=PairOptions(pairs=1000, solver="ddim", teacher_steps=20, guidance=3.0, pair_shard_size=250),
        distill=DistillOptions(
            max_train_steps=400, batch_size=32, pair_batch_size=16, learning_rate=5e-4,
            lr_warmup_steps=25, lr_cooldown_steps=200, ema=0.99, lambda_reg=4.0, regression_on="latents",
            matching_guidance=2.0,  # the pairs' 3 costs a tenth of the diversity within a caption
        ),
        evaluation=EvaluationOptions(eval_every=200, eval_samples=200, final_samples=400, compare_steps=50),
        run=RunOptions(output_dir="runs/shapes", checkpointing_steps=200),
    ),
    # captioned images of 64 x 64 pixels and the teacher that `dmd teach folder` makes of them; for one GPU
    "emoji": Config(
        preset="emoji",
        data=DataOptions(data=None, prompts="data/emoji64/train", size=64, channels=3),
        teacher=TeacherOptions(teacher="runs/emoji-teacher"),
        pairs=PairOptions(pairs=50_000, solver="ddim", teacher_steps=50, guidance=3.0),
        distill=DistillOptions(
            max_train_steps=20_000, batch_size=128, pair_batch_size=128, learning_rate=1e-4, lr_warmup_steps=500,
            lr_cooldown_steps=10_000, ema=0.999, lambda_reg=1.0, regression_on="latents",
        ),
        evaluation=EvaluationOptions(
            eval_every=2000, eval_samples=64, final_samples=4 * 593, test_prompts="data/emoji64/test",
        ),
        run=RunOptions(output_dir="runs/emoji", mixed_precision="bf16", checkpointing_steps=2000, log_every=100),
    ),
    # Stable Diffusion v1.5 as the paper distilled it (appendix, "aesthetic score above 6.25"): 72 A100, 36 hours. On 8
    # GPUs of 80 GB a micro-batch is 8 noises and 4 pairs of each (40 GiB, counted by benchmarks.memory)
    "sd15": Config(
        preset="sd15",
        data=DataOptions(data=None, prompts="captions.txt", size=512, channels=3),
        teacher=TeacherOptions(teacher="stable-diffusion-v1-5/stable-diffusion-v1-5"),
        pairs=PairOptions(pairs=500_000, solver="pndm", teacher_steps=50, guidance=3.0),
        distill=DistillOptions(
            max_train_steps=20_000, batch_size=2304, pair_batch_size=1152, match_pairs=True, learning_rate=1e-5,
            lr_warmup_steps=500, lr_cooldown_steps=0, ema=0.999, lambda_reg=0.25, regression="lpips-vgg",
            lpips_size=224, gradient_accumulation_steps=36,
        ),
        memory=MemoryOptions(gradient_checkpointing=True, checkpoint_decoder=True, real_in_bf16=True),
        evaluation=EvaluationOptions(eval_every=500, eval_samples=64, final_samples=1024),
        run=RunOptions(output_dir="runs/sd15", mixed_precision="bf16", checkpointing_steps=500, log_every=50),
    ),
    # the same on one GPU of 24 GB (`python -m benchmarks.memory` counts what it needs), 16 + 8 by accumulation
    "sd15-24gb": Config(
        preset="sd15-24gb",
        data=DataOptions(data=None, prompts="captions.txt", size=512, channels=3),
        teacher=TeacherOptions(teacher="stable-diffusion-v1-5/stable-diffusion-v1-5"),
        pairs=PairOptions(pairs=20_000, solver="pndm", teacher_steps=50, guidance=3.0),
        distill=DistillOptions(
            max_train_steps=20_000, batch_size=16, pair_batch_size=8, gradient_accumulation_steps=16,
            pair_accumulation_steps=8, learning_rate=1e-5, fake_learning_rate=1e-4, lr_warmup_steps=500,
            lr_cooldown_steps=5000, ema=0.999, lambda_reg=0.25, regression="lpips-vgg", lpips_size=224,
        ),
        memory=MemoryOptions(
            gradient_checkpointing=True, checkpoint_decoder=True, real_in_bf16=True, fake_lora_rank=64, adam_8bit=True,
        ),
        evaluation=EvaluationOptions(eval_every=500, eval_samples=16, final_samples=256),
        run=RunOptions(output_dir="runs/sd15-24gb", mixed_precision="bf16", checkpointing_steps=500, log_every=50),
    ),
}  # fmt: skip


def preset(name: str) -> Config:
    """A preset by name. Raises InputError listing the names."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def with_run(config: Config, **changes: Any) -> Config:
    """The config with some run options replaced."""
    return replace(config, run=replace(config.run, **changes))
