"""`dmd synthesize`: captions to a data set of images, by a student (one step) or a teacher (many)."""

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dmd.cli.flags import guarded, read
from dmd.errors import InputError

if TYPE_CHECKING:
    from dmd.metrics.diversity import CaptionDiversity
    from dmd.synthesis import Job, Outcome

SLOW = {"png": "14", "webp": "50"}
"""Images of 512 pixels that a core encodes in a second; JPEG: 500."""
LONG = 1000  # characters, of which a text encoder reads a part


@dataclass(frozen=True)
class SynthesizeOptions:
    """Make images of captions into tar shards. The same command makes what is missing, in any number of processes."""

    captions: Annotated[str, tyro.conf.Positional]
    """.jsonl as `dmd captions` writes it, or .txt, .parquet, webdataset, or images with metadata.jsonl."""
    out: str = "data/synthetic"
    """Folder of the data set."""
    student: str = "shapes-student"
    """Folder of a student, or with --steps of a teacher; or shapes-student or shapes-teacher, which ship."""
    teacher: bool = False
    """The student's own teacher makes the images instead."""
    steps: int | None = None
    """Steps of a teacher: 50 with --teacher if left out. Without --teacher, of the given folder itself."""
    guidance_scale: float | None = None
    """Of many steps; left out, what the student was distilled with, or 1."""
    decoder: str = "full"
    """Of latents: "full", "tiny" (madebyollin/taesd from the hub), or the folder of an AutoencoderTiny."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the networks' arithmetic."""
    replicas: int = 4
    """Images of each caption."""
    resize: int | None = None
    """Height and width of the files, resized on the device; left out, as the network makes them."""
    image_format: Literal["jpg", "webp", "png"] = "jpg"
    """JPEG is 10 to 40 times faster to write than the others."""
    quality: int = 95
    """Of JPEG and WebP."""
    shard_size: int = 10_000
    """Images of a shard: a multiple of --replicas."""
    batch_size: int = 64
    """Images that the network makes at a time. Another size may round differently, so it belongs to the data set."""
    seed: int = 0
    """Another seed makes other images."""
    clip: str | None = None
    """A CLIP that scores image and caption: a folder or hub id of transformers, open_clip:NAME,
    open_clip:NAME:TAG_OR_FILE, or open_clip:FOLDER_OR_ID. The scores are stored."""
    min_clip_score: float | None = None
    """Leave out images whose cosine with their caption is below this, such as 0.2."""
    writers: int = 0
    """Threads that encode images; 0 takes what the machine has, up to 8."""
    workers: int | None = None
    """How many processes share the work, for engines that do not say it by WORLD_SIZE (SLURM arrays)."""
    worker: int | None = None
    """Which of them this is, from 0."""
    engine: Literal["local", "ray"] = "local"
    """This process (and those that torchrun or SLURM start beside it), or actors of a Ray cluster."""
    ray_workers: int = 1
    """Actors of Ray."""
    ray_gpus: float = 0.0
    """GPUs of each actor."""
    diversity: int = 0
    """Captions within which the images' diversity is measured at the end, beside the teacher's if it is known."""
    lpips_backbone: Literal["alex", "vgg", "squeeze"] = "alex"
    """Network behind the measures of diversity."""
    lpips_weights: str | None = None
    """Its weights, where they cannot be downloaded."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; "auto" takes a GPU where there is one, by LOCAL_RANK if there are several processes."""


def main(argv: Sequence[str], prog: str = "dmd synthesize") -> None:
    guarded(lambda: synthesize(read(SynthesizeOptions, argv, prog)))


def synthesize(options: SynthesizeOptions) -> None:
    """Make the data set, or this worker's part, and say what is there. Raises InputError before anything is written."""
    check(options)
    worker, workers = place(options)
    first = worker == 0
    from dmd.log import progress

    captions, notes = read_captions(options.captions)
    for note in notes if first else ():
        print(f"note: {note}")
    if first and options.image_format in SLOW:
        slow = SLOW[options.image_format]
        print(f"note: a core writes about {slow} images a second of 512 pixels as {options.image_format}, 500 as jpg")
    job = build(options, captions)
    spec = job.spec
    measure = _measure(options) if options.diversity else None  # its weights may be missing: better said before
    started = time.perf_counter()
    with progress(spec.images, 0, "synthesize", first, "img") as bar:
        outcome = _run(options, job, worker, workers, bar.update)
    rate = outcome.made / (time.perf_counter() - started)
    print(f"worker {worker} of {workers}: made {outcome.made} images, {rate:.3g} images per second")
    if outcome.shards is None:
        print(f"other processes still make shards of {job.folder}: the last of them completes it")
        return
    from dmd import synthesis

    kept, dropped = (sum(getattr(s, k) for s in outcome.shards.values()) for k in ("images", "dropped"))
    synthesis.contact_sheet(job.folder, spec)
    print(f"{job.folder}: {kept} images of {spec.count} captions in {spec.shards} shards, {dropped} dropped")
    if measure:
        _say_diversity(options, job, measure)
    elif spec.replicas > 1:
        print(
            "note: how different the images of a caption are was not measured; --diversity 64 does it for 64 captions"
        )


def check(options: SynthesizeOptions) -> None:
    """Raises InputError for values that are out of range or do not go together."""
    o = options
    for name in ("replicas", "batch_size", "shard_size", "ray_workers"):
        if getattr(o, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(o, name)}: it must be at least 1")
    if o.replicas > 2**16:
        raise InputError(f"--replicas is {o.replicas}: a caption has at most 65536 images")
    if o.shard_size % o.replicas:
        raise InputError(
            f"--shard-size {o.shard_size} is no multiple of --replicas {o.replicas}: a caption's images lie together"
        )
    if not 0 <= o.seed < 2**64:
        raise InputError(f"--seed is {o.seed}: it must be at least 0 and below 2**64")
    if not 1 <= o.quality <= 100:
        raise InputError(f"--quality is {o.quality}: it must be 1 to 100")
    if o.resize is not None and not 1 <= o.resize <= 8192:
        raise InputError(f"--resize is {o.resize}: it must be 1 to 8192 pixels")
    if o.steps is not None and o.steps < 1:
        raise InputError(f"--steps is {o.steps}: it must be at least 1")
    if o.guidance_scale is not None and not o.teacher and (o.steps or 1) == 1:
        raise InputError("--guidance-scale is for many steps: a one-step student has its guidance built in")
    if o.min_clip_score is not None and o.clip is None:
        raise InputError("--min-clip-score needs --clip, the model that gives the score")
    if o.min_clip_score is not None and not -1 <= o.min_clip_score <= 1:
        raise InputError(f"--min-clip-score is {o.min_clip_score}: a cosine is -1 to 1; 0.2 to 0.3 is usual")
    if o.writers < 0 or o.diversity < 0:
        raise InputError(f"--writers is {o.writers} and --diversity {o.diversity}: both must be 0 or more")
    if o.diversity and o.replicas < 2:
        raise InputError("--diversity compares the images of a caption: give --replicas 2 or more")


def place(options: SynthesizeOptions) -> tuple[int, int]:
    """This process's number and how many there are: as given, or as torchrun and accelerate say.

    Raises:
        InputError: only one of both is given, or they do not fit.
    """
    if (options.worker is None) != (options.workers is None):
        raise InputError("--worker and --workers go together: which one, and of how many")
    worker = int(os.environ.get("RANK", 0)) if options.worker is None else options.worker
    workers = int(os.environ.get("WORLD_SIZE", 1)) if options.workers is None else options.workers
    if not 0 <= worker < workers:
        raise InputError(
            f"--worker is {worker} and --workers {workers}: the first counts from 0 to one below the second"
        )
    return worker, workers


def read_captions(path: str) -> tuple[list[str], list[str]]:
    """The different captions of a file in their order, and what there is to say about them.

    Raises:
        InputError: as `dmd.data.prompts.read`.
    """
    from dmd.data import prompts

    found = prompts.read(path)
    captions = list(dict.fromkeys(found.texts))
    notes = []
    if found.empty:
        notes.append(f"{path} has {found.empty} empty lines, which are left out")
    if len(captions) < len(found):
        notes.append(f"{path} has {len(found) - len(captions)} captions that were there before, which are left out")
    long = sum(len(c) > LONG for c in captions)
    if long:
        notes.append(f"{path} has {long} captions of more than {LONG} characters: text encoders read their beginning")
    return captions, notes


def build(options: SynthesizeOptions, captions: list[str] | None = None) -> "Job":
    """Networks, captions and folder of the options: the same job in every process.

    Raises:
        InputError: the student, teacher, decoder or CLIP model cannot be had, or does not know a caption.
    """
    import torch

    from dmd import teachers
    from dmd.build import text_digest
    from dmd.cli.sample import find_device, teacher_of
    from dmd.generate import caption_source, guided_steps, student_generator
    from dmd.shards import Spec
    from dmd.synthesis import Filter, Job

    o = options
    captions = read_captions(o.captions)[0] if captions is None else captions
    device = find_device(_local_device(o.device))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[o.precision]
    folder, scale = teacher_of(Path(o.student)) if o.teacher else (o.student, 1.0)
    scale = scale if o.guidance_scale is None else o.guidance_scale
    pipeline = teachers.load(folder, device, dtype=dtype)
    pipeline.encode(captions if pipeline.classes else captions[:1])  # refuses unknown classes before anything is made
    codec = teachers.decoder(o.decoder, pipeline, device, dtype)
    steps = o.steps or (50 if o.teacher else 1)
    many = o.teacher or steps > 1
    generator = guided_steps(pipeline, scale, steps) if many else student_generator(pipeline.denoiser)
    source = {
        "kind": "many steps" if many else "one step", "network": pipeline.digest(), "steps": steps,
        "guidance": scale if many else _distilled_with(Path(o.student)), "decoder": o.decoder, "precision": o.precision,
    }  # fmt: skip
    keep, dropping = None, {}
    if o.clip is not None:
        from dmd.metrics import clip as clips
        from dmd.metrics import clip_score

        clip = clips.load(o.clip, device, download=True)
        keep = Filter(partial(clip_score.of_tensors, clip), -1.0 if o.min_clip_score is None else o.min_clip_score)
        dropping = {"clip": clip.digest(), "at_least": keep.at_least}
    spec = Spec(
        text_digest(captions), len(captions), o.replicas, o.seed, source, o.resize, o.image_format,
        o.quality, o.shard_size, min(o.batch_size, o.shard_size), dropping,
    )  # fmt: skip
    threads = o.writers or max(1, min(8, len(os.sched_getaffinity(0)) - 1 if hasattr(os, "sched_getaffinity") else 1))
    made_by = caption_source(pipeline, generator, codec, o.seed, device)
    return Job(Path(o.out), spec, captions, made_by, threads, keep)


def _run(options: SynthesizeOptions, job: "Job", worker: int, workers: int, tick: Any) -> "Outcome":
    from dmd import synthesis

    if options.engine == "local":
        return synthesis.work(job, worker, workers, tick)
    remote = partial(_build_in, Path.cwd(), options)
    return synthesis.work_with_ray(remote, job.folder, job.spec, options.ray_workers, options.ray_gpus, tick)


def _build_in(folder: Path, options: SynthesizeOptions) -> "Job":
    """In an actor of Ray: the job of a command that was given in `folder`, which its paths, and those of its run, are
    relative to. Raises InputError if the node has no such folder; else as `build`."""
    try:
        os.chdir(folder)
    except OSError:
        raise InputError(
            f"the node {platform.node()} has no folder {folder}: nodes must see the same folders"
        ) from None
    return build(options)


def _measure(options: SynthesizeOptions) -> "CaptionDiversity":
    from dmd.cli.sample import find_device
    from dmd.metrics.diversity import CaptionDiversity

    weights = Path(options.lpips_weights) if options.lpips_weights else None
    return CaptionDiversity(options.lpips_backbone, weights, find_device(_local_device(options.device)))


def _say_diversity(options: SynthesizeOptions, job: "Job", measure: "CaptionDiversity") -> None:
    """Print and store how different the images of a caption are, and those of the teacher from the same noise."""
    from dmd.checkpoint import write_json
    from dmd.synthesis import sampled

    jobs = {"teacher" if options.teacher else "this data set": job}
    if _distilled_with(Path(options.student)) is not None and not options.teacher and (options.steps or 1) == 1:
        jobs["teacher"] = build(replace(options, teacher=True, guidance_scale=None), list(job.captions))
    if "teacher" not in jobs:
        print(
            f"note: {options.student} does not lie in its run, so its teacher is not known and not measured beside it"
        )
    count = min(options.diversity, job.spec.count)
    print(f"diversity within {count} captions, {measure.name}:  feature cosine distance, LPIPS")
    figures = {}
    for name, each in jobs.items():
        found = measure(sampled(each, count))
        figures[name] = {"network": measure.name, "captions": count, **vars(found)}
        print(f"  {name:14} {found.feature_cosine:.4f}  {found.lpips:.4f}")
    write_json(job.folder / "diversity.json", figures)


def _local_device(name: str) -> str:
    """A GPU of its own for each process of a machine."""
    import torch

    if name == "auto" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return name


def _distilled_with(student: Path) -> float | None:
    """A student's guidance, if it lies in its run."""
    from dmd.cli.sample import teacher_of

    try:
        return teacher_of(student)[1]
    except InputError:
        return None
