"""The composition root: from a config to data, teacher, pairs, distiller, judge. Only here is it known which class goes
with which; everything below receives built objects."""

import copy
import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object, parse_flag_from_env
from torch import Tensor

import dmd
from dmd import allocator, checkpoint, evaluation, log, pairs, ranking, seeding, sharding, shipped, teachers
from dmd.batches import DistillBatches, Share, TeachBatches
from dmd.codec import Codec
from dmd.config import Config, RunOptions, check, real_guidance
from dmd.data import shapes
from dmd.data.images import ImageSet, to_float, to_uint8
from dmd.denoiser import Guided, NetworkDenoiser
from dmd.distill import Distance, Distiller
from dmd.ema import Ema
from dmd.errors import InputError
from dmd.generate import Generator, teacher_generator, work_unit
from dmd.losses import squared_distance
from dmd.metrics.networks import FeatureNet
from dmd.noise import Karras
from dmd.pipeline import Pipeline, conditions
from dmd.run import Cadence, Run, clip_and_check
from dmd.seeding import Stream
from dmd.solvers import Solver, ddim, heun
from dmd.teach import Teacher, lognormal_times
from dmd.teachers import lora, pixel, samplers, switches

T = TypeVar("T")


SOLVERS: dict[str, tuple[Solver, Callable[[int], int]]] = {
    "heun": (heun, lambda n: 2 * n - 1),
    "ddim": (ddim, lambda n: n),
    **samplers.SAMPLERS,
}
"""Solver and its network evaluations for n steps, by the option's value."""


@dataclass(frozen=True)
class Workplace:
    """Processes, device and dtype of a command."""

    accelerator: Accelerator
    autocast: torch.dtype | None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def share(self, accumulation: int = 1) -> Share:
        a = self.accelerator
        return Share(a.process_index, a.num_processes, accumulation, a.device)

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every process. If it fails on one, all raise, so that none waits for it and one can say why."""
        failure: Exception | None = None
        try:
            value = work()
        except (InputError, ArithmeticError, OSError) as error:
            failure = error
        failures = [f for f in gather_object([failure]) if f is not None]
        if failures:
            raise failure or failures[0]
        return value

    def first(self, work: Callable[[], object]) -> None:
        """Do `work` on the main process while the others wait; if it fails, all raise."""
        self.together(lambda: work() if self.main else None)


def workplace(config: Config) -> Workplace:
    """Start processes and choose the device."""
    check(config)
    return start(config.run)


PATIENCE = timedelta(days=1)
"""How long processes wait for each other. torch's own 10 minutes (NCCL) are less than what one does alone: the last
shard of pairs, or the comparison at the end. A process that dies ends the others at once all the same (torchrun)."""


def start(run: RunOptions) -> Workplace:
    """As `workplace`, for commands without a whole config.

    Raises:
        InputError: a package that it needs is missing, or there are several processes that cannot join.
    """
    if run.report_to == "wandb":
        log.require_wandb()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" not in os.environ:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but LOCAL_RANK is not set, so that each process would take "
            f"itself for the only one: start them with torchrun, which sets both, or start one without WORLD_SIZE"
        )
    cpu = run.cpu or not torch.accelerator.is_available()  # told, accelerate joins the processes of a CPU; else it
    # would take each for the only one, and all would write into one folder
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    torch.backends.cuda.matmul.allow_tf32 = run.allow_tf32
    torch.backends.cudnn.allow_tf32 = run.allow_tf32
    if accelerator.device.type == "cpu":
        allocator.keep_freed()
    return Workplace(accelerator, torch.bfloat16 if run.mixed_precision == "bf16" else None)


SHAPES_IMAGES = 5000
"""Drawings of the world of shapes that samples are measured against."""
SHAPES_TAUGHT = 10_000
"""Drawings of single things that its feature network learns from."""
UNSEEN = 1 << 41
"""Scenes and drawings from this index on are for judging, those below for prompts and teaching."""


def image_set(config: Config, split: str = "train") -> ImageSet:
    """Real images of a config, padded to its size."""
    from dmd.data import images

    o = config.data
    assert o.data is not None  # else nobody asks
    if o.data == "digits":
        found = images.digits()
    elif o.data == "shapes":
        found = shapes_set(config.run.seed, split)
    else:
        if o.download:
            images.download(config.preset, o.data)
        found = images.load(o.data, split, channels=o.channels)  # type: ignore[arg-type]
    if max(found.shape[1:]) > o.size:
        raise InputError(
            f"images of {o.data} are {found.shape[2]} x {found.shape[1]} pixels: --size {o.size} is too small"
        )
    if found.shape[0] != o.channels:
        raise InputError(f"images of {o.data} have {found.shape[0]} channels, but --channels is {o.channels}")
    return ImageSet(images.pad_to(found.images, o.size), found.labels, found.classes)


def shapes_set(seed: int, split: str) -> ImageSet:
    """Drawings of the world of shapes: single things and what they are ("train"), or all kinds of scenes ("test")."""
    scenes = shapes_scenes(seed, split)
    drawn = shapes.batch(scenes, seed, UNSEEN + torch.arange(len(scenes)))
    labels = [shapes.PAIRS.index((s.things[0].shape, s.things[0].colour)) for s in scenes]
    return ImageSet(drawn, torch.tensor(labels), tuple(f"{colour} {shape}" for shape, colour in shapes.PAIRS))


def shapes_scenes(seed: int, split: str) -> list[shapes.Scene]:
    """What the drawings of `shapes_set` show, in their order."""
    scenes = shapes.scenes(seed, torch.arange(UNSEEN, UNSEEN + 3 * SHAPES_TAUGHT))
    return [s for s in scenes if len(s.things) == 1][:SHAPES_TAUGHT] if split == "train" else scenes[-SHAPES_IMAGES:]


def reference_set(config: Config, data: ImageSet | None) -> ImageSet | None:
    """Real images that samples are measured against: the test part, or all of `digits`, which has none."""
    if data is None or config.data.data == "digits":
        return data
    found = image_set(config, "test")
    if found.classes != data.classes[: len(found.classes)]:
        raise InputError(
            f"the test images of {config.data.data} have the classes {', '.join(found.classes)}, but the train images "
            f"have {', '.join(data.classes)}: they must be the same"
        )
    return found


def prompts(config: Config, data: ImageSet | None) -> Sequence[str]:
    """What images are asked for while training: captions, or else the names of the classes."""
    o = config.data
    if o.prompts is None:
        assert data is not None  # by `check`
        return data.classes
    if o.prompts == "shapes":
        return [shapes.caption(s) for s in shapes.scenes(config.run.seed, torch.arange(o.captions))]
    from dmd.data import prompts

    return prompts.read(o.prompts).texts


def judged_prompts(config: Config, asked: Sequence[str]) -> Sequence[str]:
    """What images are asked for when a student is judged: prompts of their own, or those of training.

    Warns of prompts that are no test, since training sees them. Raises InputError if there are none to be read.
    """
    if config.evaluation.test_prompts is None:
        return asked
    from dmd.data import prompts

    try:
        found = prompts.read(config.evaluation.test_prompts).texts
    except InputError as error:
        raise InputError(f"--test-prompts: {error}") from None
    seen = len(set(found) & set(asked))
    if seen:
        warnings.warn(
            f"{seen} of the {len(set(found))} different --test-prompts are among --prompts, too: training sees them",
            stacklevel=2,
        )
    return found


def is_sharded(config: Config, place: Workplace) -> bool:
    """Whether the networks that are trained are spread over processes: asked for here, or by accelerate's config."""
    asked = config.memory.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    return asked and place.accelerator.num_processes > 1


def check_shares(config: Config, place: Workplace) -> None:
    """Raises InputError for a global batch, or for networks, that cannot be shared among the processes."""
    d, m = config.distill, config.memory
    if is_sharded(config, place) and (m.student_lora_rank or m.fake_lora_rank or m.adam_8bit):
        raise InputError(
            "FSDP spreads networks that are trained whole, with full optimiser states: leave out --student-lora-rank, "
            "--fake-lora-rank and --adam-8bit, or FSDP"
        )
    share = place.share(d.gradient_accumulation_steps)
    if d.objective != "regression":
        share.split(d.batch_size, "--batch-size")
    if d.objective != "matching":
        place.share(d.pair_accumulation_steps or d.gradient_accumulation_steps).split(
            d.pair_batch_size, "--pair-batch-size"
        )
    if config.teacher.teacher is None:
        place.share().split(config.teacher.teach_batch_size, "--teach-batch-size")


def text_digest(texts: Sequence[str]) -> str:
    """SHA-256 of texts in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def file_digest(path: str | None) -> str | None:
    """SHA-256 of a file that the user named. Raises InputError if it is not there."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist: give a file")
    return checkpoint.describe(Path(path))["sha256"]


def pixel_config(config: Config, data: ImageSet) -> pixel.PixelConfig:
    t = config.teacher
    return pixel.PixelConfig(
        data.classes,
        config.data.channels,
        config.data.size,
        t.width,
        t.multipliers,
        t.blocks,
        t.attention,
        t.sigma_data,
    )


def untaught(config: Config, data: ImageSet) -> Pipeline:
    """The teacher that is to be taught, without weights. Raises InputError if the options fit no network."""
    architecture = pixel_config(config, data)
    try:
        with torch.device("meta"):
            return pixel.Pixel(pixel.build(architecture), architecture)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        raise InputError(
            f"--width {config.teacher.width} with --multipliers {config.teacher.multipliers} makes no UNet: {error}"
        ) from None


def teacher_source(config: Config, data: ImageSet | None) -> str | Path:
    """Where the teacher is, or will be: what the user gave, or a place in the cache named by what
    determines it."""
    if config.teacher.teacher is not None:
        return config.teacher.teacher
    assert data is not None  # by `check`
    facts = asdict(config.teacher) | {"flip": config.data.flip, "data": data.digest(), "seed": config.run.seed}
    facts["precision"] = config.run.mixed_precision
    return Path(config.run.cache_dir) / "teachers" / short_hash(facts)


def teach(config: Config, data: ImageSet, place: Workplace, folder: Path) -> bool:
    """Train a teacher into `folder`, resuming what is there. Returns whether it is complete (not stopped)."""
    t = config.teacher
    architecture = pixel_config(config, data)
    denoiser = pixel.build(architecture, config.run.seed, place.autocast).to(place.device)
    denoiser.net.to(memory_format=torch.channels_last)
    ema = Ema(denoiser.net, t.teach_ema)
    if config.memory.compile:
        denoiser.net.compile(dynamic=False)
    optimizer = adam(denoiser.net, t.teach_lr, (0.9, 0.99), 0.0)
    assert isinstance(denoiser.schedule, Karras)
    batches = TeachBatches(
        config.run.seed,
        lambda index: (data.pixels(index), pixel.labels(data.labels[index])),
        len(data),
        lognormal_times(denoiser.schedule, t.p_mean, t.p_std),
        architecture.null(),
        t.teach_batch_size,
        place.share(),
        t.label_dropout,
        config.data.flip,
    )
    run = Run(
        folder,
        Teacher(denoiser, optimizer, ema, 1.0, clip_and_check),
        batches,
        Cadence(
            t.teach_steps,
            config.run.log_every,
            max(t.teach_steps // 10, 1),
            keep=1,
            warmup=100,
            cooldown=t.teach_steps // 3,
        ),
        place.accelerator,
        title="teacher",
        sinks=lambda step: [log.JsonLines(folder / "metrics.jsonl", step)],
    )
    done = run.train().step >= t.teach_steps
    if done:
        place.first(lambda: pixel.save(ema.shadow.get_submodule("unet"), architecture, folder))
    return done


def load_teacher(config: Config, data: ImageSet | None, place: Workplace, source: str | Path) -> Pipeline:
    """The teacher, frozen. Raises InputError if it is not for this data."""
    found = teachers.load(source, place.device, place.autocast, config.teacher.variant)
    found.denoiser.requires_grad_(False)
    if config.data.prompts is None:
        assert data is not None  # by `check`
        found.encode(data.classes)
    if data is not None:
        with torch.no_grad():
            shape = tuple(found.codec.decode(torch.zeros(1, *found.shape, device=place.device)).shape[1:])
        if shape != data.shape:
            raise InputError(
                f"the teacher {source} makes images of {_by(shape)}, but those of {config.data.data} have "
                f"{_by(data.shape)}"
            )
    return found


def load_student(config: Config, teacher: Pipeline) -> Pipeline | None:
    """The student to go on from, if there is one; on the CPU, as only its weights are needed.

    Args:
        teacher: may be one without weights.

    Raises:
        InputError: as `teachers.load`, and if its network, schedule or prediction is not the teacher's.
    """
    source = config.distill.student
    if source is None:
        return None
    found = teachers.load(source)
    if _kind(found.denoiser) != _kind(teacher.denoiser):
        raise InputError(
            f"--student {source} has another network, schedule or prediction than the teacher: give one "
            "that was distilled from it"
        )
    return found


def _kind(denoiser: NetworkDenoiser) -> tuple[object, ...]:
    weights = {name: tensor.shape for name, tensor in denoiser.net.state_dict().items()}
    return weights, denoiser.schedule, denoiser.prediction


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def pair_spec(config: Config, teacher: Pipeline, asked: Sequence[str]) -> pairs.PairSpec:
    p = config.pairs
    return pairs.PairSpec(
        teacher.digest(), p.solver, p.teacher_steps, p.guidance, config.run.seed, len(asked), text_digest(asked),
        teacher.shape, p.pairs, p.pair_shard_size,
    )  # fmt: skip


def pair_folder(config: Config, spec: pairs.PairSpec) -> Path:
    """Where the pairs are, or will be."""
    return Path(config.run.cache_dir) / "pairs" / short_hash(asdict(spec))


def guided(config: Config, teacher: Pipeline) -> Guided:
    """The real score: the teacher with the config's guidance."""
    return Guided(teacher.denoiser, config.pairs.guidance, teacher.null())


def many_step(config: Config, real: Guided, steps: int) -> tuple[Generator, int]:
    """The teacher's sampler, and how many times a sample evaluates the network (guidance doubles each)."""
    solver, evaluations = SOLVERS[config.pairs.solver]
    per_step = 1 if real.scale == 1.0 else 2
    return teacher_generator(real, solver, steps), per_step * evaluations(steps)


def make_pairs(
    config: Config, teacher: Pipeline, asked: Sequence[str], spec: pairs.PairSpec, place: Workplace, folder: Path
) -> pairs.Pairs:
    """Make what is missing of the pairs, shared among processes, and open them."""
    generator, _ = many_step(config, guided(config, teacher), config.pairs.teacher_steps)
    encode = conditions(teacher, asked)

    @torch.no_grad()
    def sample(z: Tensor, number: Tensor, tick: Callable[[int], object]) -> Tensor:
        found, unit = [], work_unit(teacher.shape, teacher.codec)
        for noise, numbers in zip(z.split(unit), number.split(unit), strict=True):
            cond = {k: v.to(place.device) for k, v in encode(numbers).items()}
            found.append(generator(noise.to(place.device), cond).cpu())
            tick(len(noise))
        return torch.cat(found)

    def make(shards: list[int]) -> None:
        total = sum(len(spec.indices(i)) for i in shards)
        with log.progress(total, 0, "pairs", place.main, "pair") as bar:
            for _ in pairs.make(folder, spec, shards, lambda z, number: sample(z, number, bar.update)):
                pass  # a shard is on the disk

    _share(place, folder, spec, make)
    return place.together(lambda: pairs.Pairs(folder, spec))


WATCHED = 16
"""So many pairs are pictured, and measured for drift, at every evaluation."""
WATCHED_AT_ONCE = 4
"""Guidance and decoding at full size leave little memory beside training."""


def watched(
    config: Config, teacher: Pipeline, asked: Sequence[str], store: pairs.Pairs | None, place: Workplace
) -> list[evaluation.Watched]:
    """What a run is looked at by, in work units: the first of its pairs, or a few made for this where it has none."""
    if store is None:
        spec = replace(pair_spec(config, teacher, asked), count=WATCHED, shard_size=WATCHED)
        store = make_pairs(config, teacher, asked, spec, place, pair_folder(config, spec))
    encode, units = conditions(teacher, asked), []
    for index in torch.arange(min(WATCHED, len(store))).split(WATCHED_AT_ONCE):
        y_ref, number = store[index]
        seeds = evaluation.IN_LOOP_SEED + index.to(place.device)
        z, noise = (
            seeding.normal(config.run.seed, Stream.SAMPLE, 0, s, teacher.shape) for s in (seeds, seeds + WATCHED)
        )
        cond = {k: v.to(place.device) for k, v in encode(number).items()}
        units.append(evaluation.Watched(z, noise, store.noise(index.to(place.device)), y_ref.to(place.device), cond))
    return units


def metric(config: Config, device: torch.device) -> Distance:
    """The regression metric, of latents or images."""
    name = config.distill.regression
    if name == "l2":
        return squared_distance
    from dmd.metrics.perceptual import lpips_distance

    weights = Path(config.distill.lpips_weights) if config.distill.lpips_weights else None
    backbone: Any = name.removeprefix("lpips-")
    return lpips_distance(backbone, weights, config.distill.lpips_size, device)


STORAGE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "uint8": (to_uint8, to_float),
    "fp16": (Tensor.half, Tensor.float),
}
"""Images in [-1, 1] to what is stored of them, and back, by the option's value."""


def make_images(
    config: Config, codec: Codec, store: pairs.Pairs | None, place: Workplace
) -> Callable[[Tensor], Tensor] | None:
    """Decode what is missing of the pairs' images by the regression's codec, shared among processes, and open them:
    numbers of pairs to images. None if none are asked for. Decoded once, they are so in float32 whatever the run is."""
    if config.pairs.store_images == "no" or store is None:
        return None
    pack, unpack = STORAGE[config.pairs.store_images]
    spec = pairs.ImageSpec(store.spec, codec.digest(), config.pairs.store_images)
    folder = pair_folder(config, store.spec) / f"images-{short_hash(asdict(spec))}"

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return torch.cat([codec.decode(x.to(place.device)).cpu() for x in latents.split(8)])

    def make(shards: list[int]) -> None:
        with log.progress(sum(len(spec.indices(i)) for i in shards), 0, "images", place.main, "img") as bar:
            for count in pairs.make_images(folder, spec, shards, store, decode, pack):
                bar.update(count)

    _share(place, folder, spec, make)
    stored = place.together(lambda: pairs.Images(folder, spec))
    return lambda index: unpack(stored[index])


def _share(place: Workplace, folder: Path, spec: pairs.Spec, make: Callable[[list[int]], None]) -> None:
    """Make the shards that a folder lacks, shared among processes."""
    absent = place.together(lambda: pairs.missing(folder, spec))
    if absent:
        place.together(lambda: make(absent[place.accelerator.process_index :: place.accelerator.num_processes]))
        place.first(lambda: pairs.finish(folder, spec))


def regression_codec(config: Config, teacher: Pipeline, device: torch.device) -> Codec:
    """What decodes for the regression on images: the teacher's own codec, or a tiny one. Raises InputError if there is
    no such one of the teacher's latents."""
    if config.distill.regression_on == "latents":
        return teacher.codec
    codec = teachers.decoder(config.distill.regression_decoder, teacher, device, flag="--regression-decoder")
    if config.memory.checkpoint_decoder:
        codec.recompute()
    return codec


def regression(config: Config, metric: Distance, codec: Codec, place: Workplace) -> Distance:
    """The regression distance of a sample and its target: of what they decode to, where the target is not stored as an
    image already, or of themselves.

    The decoder runs in the place's precision, as the UNets do: it is the most expensive network of all.
    """
    if config.distill.regression_on == "latents":
        return metric

    def decode(latents: Tensor) -> Tensor:
        with torch.autocast(place.device.type, dtype=place.autocast, enabled=place.autocast is not None):
            return codec.decode(latents)

    if config.pairs.store_images != "no":
        return lambda x, image: metric(decode(x), image)

    def distance(x: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            image = decode(target)
        return metric(decode(x), image)

    return distance


def distiller(config: Config, teacher: Pipeline, place: Workplace, distance: Distance) -> Distiller:
    """Student and fake score begin as copies of the teacher, or as adapters on its weights, which three can share. The
    student may begin as another one instead."""
    d, m = config.distill, config.memory
    student, real, fake = _networks(config, teacher)
    start = load_student(config, teacher)
    if start is not None:
        student.net.load_state_dict(start.denoiser.net.state_dict())
    ema = Ema(student.net, d.ema)
    if is_sharded(config, place):
        for net in (student.net, fake.net, ema.shadow):
            sharding.shard(net, switches.blocks(net), place.device)
    if m.compile:
        for net in (student.net, real.net, fake.net):
            net.compile(dynamic=False)  # a run has few shapes of batch, and kernels for one of them are faster
    betas = (d.adam_beta1, d.adam_beta2)
    optimizer = partial(adam_8bit, place.device) if m.adam_8bit else adam
    return Distiller(
        student,
        Guided(real, real_guidance(config), teacher.null()),
        fake,
        optimizer(student.net, d.learning_rate, betas, d.weight_decay),
        optimizer(fake.net, d.fake_learning_rate or d.learning_rate, betas, d.weight_decay),
        ema,
        distance,
        d.lambda_reg,
        d.max_grad_norm,
        clip_and_check,
        d.critic_warmup_steps,
    )


def _networks(config: Config, teacher: Pipeline) -> tuple[NetworkDenoiser, NetworkDenoiser, NetworkDenoiser]:
    """Student, real and fake score."""
    m, real = config.memory, teacher.denoiser
    if m.enable_xformers_memory_efficient_attention:
        switches.use_xformers(real.net, "teacher")  # and so the copies
    ranks, recompute = (m.student_lora_rank, m.fake_lora_rank), recomputing(config)
    copies = [copy.deepcopy(real).requires_grad_(True) if rank == 0 else None for rank in ranks]
    if m.real_in_bf16:
        real.net.to(torch.bfloat16)
    for denoiser, again, what in zip(copies, recompute, ("student", "fake score"), strict=True):
        if denoiser is not None and again:
            switches.recompute(denoiser.net, what)
    if not any(ranks):
        student, fake = (c for c in copies if c is not None)
        return student, real, fake
    shared = lora.SharedNet(real.net)
    if any(again for again, rank in zip(recompute, ranks, strict=True) if rank):
        switches.recompute(shared.net, "shared network", shared.pinned)

    def on_shared(net: torch.nn.Module) -> NetworkDenoiser:
        return NetworkDenoiser(net, real.schedule, real.prediction, real.autocast)

    student, fake = (
        on_shared(lora.AdaptedNet(shared, rank, (config.run.seed + i) % 2**32)) if found is None else found
        for i, rank, found in zip((1, 0), ranks, copies, strict=True)
    )
    return student, on_shared(lora.BareNet(shared)), fake


def recomputing(config: Config) -> tuple[bool, bool]:
    """Whether the student, and whether the fake score, compute their activations again in the backward pass."""
    m = config.memory
    fake = m.gradient_checkpointing_fake
    return m.gradient_checkpointing, m.gradient_checkpointing if fake is None else fake


def check_method(config: Config, teacher: Pipeline, place: Workplace) -> None:
    """What of distillation depends on the teacher and the machine, tried before teaching and pairs take hours.

    Args:
        teacher: may be one without weights, of those that are to be taught.

    Raises:
        InputError: for an option that cannot be followed.
    """
    m, net = config.memory, teacher.denoiser.net
    _crop(config, teacher.shape)
    regression_codec(config, teacher, place.device)
    if m.adam_8bit:
        class_8bit(place.device)
    if any(recomputing(config)):
        switches.networks(net, "teacher", "--gradient-checkpointing")
    if m.enable_xformers_memory_efficient_attention:
        switches.networks(net, "teacher", switches.XFORMERS)
    if m.student_lora_rank or m.fake_lora_rank:
        lora.SharedNet(net)


def ema_denoiser(task: Distiller) -> NetworkDenoiser:
    """The student with its averaged weights: what is evaluated and exported."""
    s = task.student
    return NetworkDenoiser(task.ema.shadow, s.schedule, s.prediction, s.autocast).eval()


def whole(denoiser: NetworkDenoiser, teacher: Pipeline, place: Workplace) -> NetworkDenoiser:
    """A denoiser that the main process can use by itself: a copy if it is sharded, which all processes must ask for.
    The others get what they gave."""
    state = denoiser.net.state_dict()
    if not any(sharding.is_sharded(tensor) for tensor in state.values()):
        return denoiser
    found = sharding.whole_state(state, keep=place.main)
    if not place.main:
        return denoiser
    alone = copy.deepcopy(teacher.denoiser).float()
    alone.net.load_state_dict(found)
    return alone


def feature_net(config: Config, data: ImageSet) -> FeatureNet:
    """The Fréchet distance's network: a given CIFAR ResNet, the one that ships for the world of shapes, or a small
    classifier trained on the data and cached."""
    from dmd.metrics import networks, shapes_net

    if config.evaluation.features is not None:
        net = networks.load_cifar_resnet(config.evaluation.features)
        if net.shape != data.shape:
            raise InputError(
                f"--features {config.evaluation.features} takes images of {net.shape}, but the data has {data.shape}"
            )
        return net
    if config.data.data == config.data.prompts == "shapes":
        return shapes_net.load(shipped.FOLDER / "shapes-features")
    seed = config.run.seed % 2**32  # what torch's own generator can tell apart
    return networks.train_classifier(data, None, seed, Path(config.run.cache_dir) / "classifiers")


def judge(
    config: Config, teacher: Pipeline, data: ImageSet | None, reference: ImageSet | None, asked: Sequence[str],
    place: Workplace,
) -> evaluation.Judge:  # fmt: skip
    """Measures by what there is: real images, their classes, or the world of shapes, which can be read back.

    The feature network is trained (or loaded) by the main process first, so that the others find it cached.
    """
    measures: list[evaluation.Measure] = []
    name, count = "", 0
    by_class = config.data.prompts is None
    if data is not None and reference is not None:
        place.first(lambda: feature_net(config, data))
        net = feature_net(config, data).to(place.device)
        measured = evaluation.Reference.of(reference, net)
        measures.append((evaluation.class_measure if by_class else evaluation.prompt_measure)(net, measured))
        name, count = net.name, measured.count
    if config.data.prompts == "shapes":
        scenes = _scenes(config)
        measures.append(evaluation.caption_measure(scenes))
        asked = [shapes.caption(s) for s in scenes]
    best, repeats = ("eval/fd", 1) if by_class else (None, config.evaluation.repeats)
    return evaluation.Judge(teacher, asked, measures, name, count, place.device, best, repeats, show=place.main)


def order_of_images(config: Config, judge: evaluation.Judge, data: ImageSet | None) -> ranking.Ranking:
    """How good single images are, by what there is: captions that can be read back, a network's features, pixels."""
    near = ranking.by_pixels()
    if judge.name and data is not None:
        near = ranking.by_features(feature_net(config, data).to(judge.device))
    return ranking.by_caption(_scenes(config), near) if config.data.prompts == "shapes" else near


def _scenes(config: Config) -> list[shapes.Scene]:
    """Of the captions that a student of the world of shapes is judged by; no training has seen them."""
    return shapes.scenes(config.run.seed, torch.arange(UNSEEN, UNSEEN + config.data.captions))


def distill_batches(
    config: Config, teacher: Pipeline, asked: Sequence[str], store: pairs.Pairs | None, place: Workplace,
    targets: Callable[[Tensor], Tensor] | None = None,
) -> DistillBatches:  # fmt: skip
    d = config.distill
    return DistillBatches(
        config.run.seed,
        teacher.shape,
        len(asked),
        conditions(teacher, asked),
        0 if d.objective == "regression" else d.batch_size,
        store,
        d.pair_batch_size,
        place.share(d.gradient_accumulation_steps),
        d.match_pairs,
        (d.t_min, d.t_max),
        d.critic_steps_per_generator_step,
        None if d.guidance_t_min is None or d.guidance_t_max is None else (d.guidance_t_min, d.guidance_t_max),
        d.pair_accumulation_steps,
        _crop(config, teacher.shape),
        targets,
    )


def _crop(config: Config, shape: Sequence[int]) -> int | None:
    crop = config.distill.regression_crop
    if crop is not None and crop > min(shape[-2:]):
        raise InputError(f"--regression-crop is {crop}, but samples have {shape[-2]} x {shape[-1]}: give less")
    return crop


def sinks(config: Config, folder: Path) -> Callable[[int], Sequence[log.Sink]]:
    """Where a run's figures go, from the step at which it resumes."""

    def make(step: int) -> Sequence[log.Sink]:
        found: list[log.Sink] = [log.JsonLines(folder / "metrics.jsonl", step)]
        if config.run.report_to == "tensorboard":
            found.append(log.TensorBoard(folder / "tensorboard", step))
        if config.run.report_to == "wandb":
            found.append(log.Wandb(folder, asdict(config)))
        return found

    return make


def environment(place: Workplace) -> dict[str, Any]:
    """Versions, commit, device and command: what a figure needs beside it."""
    import platform

    return {
        "dmd": dmd.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(place.device),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "processes": place.accelerator.num_processes,
        "command": sys.argv,
    }


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, device.type)


def _commit() -> str | None:
    try:
        root = Path(__file__).parent
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, timeout=5
        )
        return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "") if head.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        return None


def adam(net: torch.nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW whose groups know their full rate, as `dmd.run` expects."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
    return optimizer


def class_8bit(device: torch.device) -> Any:
    """AdamW with states of 8 bits (Dettmers et al. 2022). Raises InputError where that cannot be."""
    if device.type != "cuda":
        raise InputError(f"--adam-8bit needs a CUDA GPU, and the device here is {device.type}: leave it out")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError("--adam-8bit needs the package bitsandbytes: pip install 'dmd-one-step[cuda]'") from None
    return AdamW8bit


def adam_8bit(
    device: torch.device, net: torch.nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
) -> Any:
    """As `adam`, by `class_8bit`."""
    optimizer = class_8bit(device)(net.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
    return optimizer


def short_hash(facts: Any) -> str:
    """16 hex digits that name a cached thing by what determines it."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
