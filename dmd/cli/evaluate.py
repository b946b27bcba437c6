"""`dmd evaluate`: figures of networks, folders, .npz files and tar shards against a reference."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dmd import shipped
from dmd.cli.directory import is_run
from dmd.cli.flags import guarded, read
from dmd.cli.train import RUNS
from dmd.config import Config, RunOptions
from dmd.config import read as read_config
from dmd.errors import InputError

if TYPE_CHECKING:
    from dmd.build import Workplace
    from dmd.metrics.assess import Census, Look
    from dmd.metrics.backbones import Extractor
    from dmd.metrics.evaluate import Reference
    from dmd.metrics.protocols import Protocol
    from dmd.metrics.sources import Source
    from dmd.pipeline import Pipeline

DRAWN = ("digits", "shapes")
"""Names of image sets that need no files."""

SAMPLES = 5000
"""Of networks, where nothing says how many."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure images, and networks that make them, against a reference."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """What is measured, side by side: run directories, students, teachers (folders or hub ids), folders of images (png,
    jpg, webp), .npz files, tars or folders of tars; also "digits" and "shapes"."""
    reference: str | None = None
    """Real images: a folder, .npz, tars, "digits" or "shapes". Left out, those of the run that a student lies in."""
    teacher: bool = False
    """Beside a run's student also measure its teacher, from the same noise."""
    protocol: Literal["clean-fid", "coco30k", "dinov2"] | None = None
    """Network and resizing of published figures. Left out, --network, or that of the student's run."""
    network: str | None = None
    """inception, timm:NAME, torchvision:NAME, transformers:FOLDER_OR_ID, a resnetNN-*.th file, the folder of a run's
    classifier, or shapes-features, which ships."""
    weights: str | None = None
    """The network's state dict, .safetensors or .pth; for FID the file inception-2015-12-05.pt."""
    download: bool = False
    """Fetch weights that are not given. Nothing is fetched otherwise, but hub ids of networks that make images."""
    samples: int | None = None
    """How many images. Left out, all files; of networks, as many as the protocol or the run says, or 5,000."""
    prompts: str | None = None
    """What text-to-image networks are asked for: a file or folder of prompts, or "shapes"."""
    repeats: int = 1
    """Images of every prompt, where there are more prompts than that takes."""
    steps: int | None = None
    """Steps of networks; students take 1, teachers need it said."""
    solver: Literal["heun", "ddim", "pndm", "ddim-leading", "dpm-solver"] | None = None
    """Of many steps. Left out, Heun for pixel networks and DDIM for latents."""
    guidance_scale: float | None = None
    """Of many steps: uncond + s (cond - uncond). Left out, the run's, or 1."""
    clip: str | None = None
    """A CLIP that scores images against their captions: a folder or hub id of transformers, open_clip:ViT-g-14,
    open_clip:NAME:TAG_OR_FILE, or open_clip:FOLDER_OR_ID."""
    clip_prefix: str = ""
    """Put before every caption; DMD2 takes "A photo depicts "."""
    read_captions: bool = False
    """Read drawings of the world of shapes and compare them with their captions; a run of shapes does so anyway."""
    bootstrap: int = 100
    """Resamples behind the 95 per cent intervals; 0 leaves them out."""
    seed: int = 0
    """First seed of networks' images, and of the resamples."""
    out: str = "evaluation"
    """Folder for evaluation.json and evaluation.svg."""
    cache_dir: str = "runs/cache"
    """Statistics of references, and a downloaded Inception."""
    batch_size: int = 64
    """Images at a time that the measuring network sees."""
    sample_batch_size: int | None = None
    """Images at a time that networks make; it may change their last digits. Left out, 250 small ones, 8 of 512
    pixels."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Of the networks that make images."""
    cpu: bool = False
    """Use the CPU though there is a GPU."""


def main(argv: Sequence[str], prog: str = "dmd evaluate") -> None:
    guarded(lambda: evaluate(read(EvaluateOptions, argv, prog)))


def check(options: EvaluateOptions) -> None:
    """Raises InputError for options that are out of range or exclude each other."""
    o = options
    if not o.what:
        raise InputError("what should be measured? Give a run, a network's folder, or images: dmd evaluate runs/digits")
    positive = {"--samples": o.samples, "--repeats": o.repeats, "--steps": o.steps, "--batch-size": o.batch_size}
    for flag, value in (positive | {"--sample-batch-size": o.sample_batch_size}).items():
        if value is not None and value < 1:
            raise InputError(f"{flag} is {value}: it must be at least 1")
    if o.samples is not None and o.samples < 4:
        raise InputError(f"--samples is {o.samples}: at least 4 are needed")
    if o.bootstrap == 1 or o.bootstrap < 0:
        raise InputError(f"--bootstrap is {o.bootstrap}: it must be 0, or at least 2")
    if not 0 <= o.seed < 2**55:
        raise InputError(f"--seed is {o.seed}: it must be at least 0 and below 2**55")
    if o.protocol is not None and o.network is not None:
        raise InputError(f"--protocol {o.protocol} has a network of its own: leave out --network, or --protocol")
    if o.weights is not None and o.protocol is None and o.network is None:
        raise InputError("--weights are for --protocol or --network: give one of them")
    if o.clip is None and o.clip_prefix:
        raise InputError("--clip-prefix is for --clip: give it")
    out = Path(o.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a folder as --out")


def evaluate(options: EvaluateOptions) -> None:
    """Write evaluation.json and evaluation.svg, and print the table."""
    check(options)
    from dmd import build, checkpoint, scoreboard
    from dmd.metrics import assess, protocols
    from dmd.metrics import clip as clips

    place = build.start(RunOptions(cpu=options.cpu, mixed_precision=options.mixed_precision))
    if not place.main:
        return
    protocol = protocols.PROTOCOLS[options.protocol] if options.protocol else None
    runs = [_run_of(name) for name in options.what]
    config = next((config for config in runs if config is not None), None)
    found = [_sources(name, options, run, protocol, place) for name, run in zip(options.what, runs, strict=True)]
    measured = [source for each in found for source in each]
    extractor, reference, against = _yardstick(options, config, protocol, place)
    clip = None if options.clip is None else clips.load(options.clip, place.device, options.download)
    agree = options.read_captions or options.prompts == "shapes"
    agree = agree or (options.prompts is None and config is not None and config.data.prompts == "shapes")
    if extractor is None and clip is None and not agree:
        raise InputError(
            "there is nothing to measure by: give --reference with --protocol or --network, --clip, or --read-captions"
        )
    before = protocol.before if protocol else protocols.as_it_is
    looks: list[dict[str, Look]] = []
    for source in measured:
        each: dict[str, Look] = {}
        if extractor is not None:
            each["features"] = assess.features(source, extractor, before, place.device)
        if clip is not None:
            each["clip"] = assess.clip_cosines(source, clip, options.clip_prefix, before)
        if agree:
            each["captions"] = assess.caption_hits(source)
        looks.append(each)
    rows: list[scoreboard.Row] = []
    results: list[dict[str, Any]] = []
    for source, each in zip(measured, looks, strict=True):
        seen, census = assess.look(source, each, options.batch_size, True)
        label = _label(extractor, protocol, source, census, reference)
        head = extractor.head if extractor is not None and _knows_classes(extractor, source) else None
        figures = assess.figures(source, seen, label, reference, head, options.seed, options.bootstrap)
        dimensions = seen["features"].shape[1] if "features" in seen else 0
        resizes = extractor is None or extractor.resizing != "no resizing"
        notes = assess.notes(source, census, extractor, dimensions, reference, resizes)
        notes += _protocol_notes(protocol, source, census, reference)
        few = len(source) < assess.ENOUGH
        scores = {name: scoreboard.Score(f.value, f.low, f.high) for name, f in figures.items()}
        rows.append(scoreboard.Row(source.name, len(source), few, scores))
        results.append(
            {
                "source": source.name,
                "samples": len(source),
                "few_samples": few,
                "figures": {name: asdict(figure) for name, figure in figures.items()},
                "notes": notes,
            }
        )
    whole = {
        "protocol": None if protocol is None else {"name": protocol.name, "text": protocol.text},
        "network": None if extractor is None else {"name": extractor.network, "resizing": extractor.resizing},
        "weights": None if extractor is None else checkpoint.digest(extractor.net),
        "reference": against,
        "clip": None if clip is None else {"name": clip.name, "weights": clip.digest(), "prefix": options.clip_prefix},
        "seed": options.seed,
        "bootstrap": options.bootstrap,
        "results": results,
        "environment": build.environment(place),
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(out / "evaluation.json", whole)
    title = f"Measured against {against['name']}" if against else "Measured against captions"
    foot = "Bars: 95 % intervals by bootstrap over samples. " * bool(options.bootstrap)
    foot += "*: fewer than 10,000 samples." * any(row.few for row in rows)
    (out / "evaluation.svg").write_text(scoreboard.svg(rows, title, foot), encoding="utf-8")
    print(scoreboard.table(rows))
    for note in dict.fromkeys(note for result in results for note in result["notes"]):
        print(f"note: {note}")
    print(f"written: {out / 'evaluation.json'}, {out / 'evaluation.svg'}")


# ----------------------------------------------------------------------------- what is measured


def _run_of(name: str) -> Config | None:
    """The config of the run that a folder is, or is the student of."""
    folder = Path(name).resolve()
    run = folder.parent if folder.name == "student" else folder
    if folder.is_dir() and (run / "student").is_dir() and is_run(run, RUNS):
        return read_config(run / "config.json")
    return None


def _sources(
    name: str, options: EvaluateOptions, run: Config | None, protocol: "Protocol | None", place: "Workplace"
) -> "list[Source]":
    """A network, with its teacher if asked for; or images."""
    folder = Path(shipped.resolve(name))
    if run is None and (name in DRAWN or not _is_network(folder, name)):
        if options.teacher:
            raise InputError(f"{name} is no network, so it has no teacher: leave out --teacher")
        return [_part(_images(name, options.seed), options.samples)]
    if run is not None and folder.resolve().name != "student":
        folder = folder / "student"
    alone = 1 if options.teacher else options.steps or (1 if run is not None else _one_step(folder))
    found = [_network(str(folder), name, options, run, protocol, place, alone, None)]
    if options.teacher:
        from dmd.cli.sample import teacher_of

        source, guidance = teacher_of(folder)
        usual = 50 if run is None else run.evaluation.compare_steps or run.pairs.teacher_steps
        steps = options.steps or usual
        found.append(_network(source, "teacher", options, run, protocol, place, steps, guidance))
    return found


def _is_network(folder: Path, name: str) -> bool:
    if folder.is_dir():
        return (folder / "model_index.json").is_file() or (folder / "model.safetensors").is_file()
    return not folder.exists() and not folder.suffix and name.count("/") == 1 and not name.startswith((".", "/"))


def _one_step(folder: Path) -> int:
    """1 for a student outside a run; anything else must say its steps."""
    from dmd.teachers import export

    if not folder.exists():
        raise InputError(f"{folder} does not exist: give a run, a folder or images; a hub id needs --steps")
    if (folder / "model_index.json").is_file() and export.is_student(folder):
        return 1
    raise InputError(f"{folder} may be a student or a teacher: say its --steps, 1 or more")


def _images(name: str, seed: int) -> Any:
    from dmd.metrics import sources

    if name not in DRAWN:
        return sources.read(name)
    from dmd import build
    from dmd.data import images, shapes

    if name == "digits":
        return sources.Arrays.of(name, images.digits())
    drawn = sources.Arrays.of(name, build.shapes_set(seed, "test"))  # whose labels are of one thing only
    captions = tuple(shapes.caption(scene) for scene in build.shapes_scenes(seed, "test"))
    return replace(drawn, labels=None, captions=captions)


def _part(source: Any, samples: int | None) -> "Source":
    """All images, or so many of them, evenly spread."""
    if samples is None:
        return source
    if len(source) < samples:
        raise InputError(f"{source.name} holds {len(source):,} images: --samples {samples:,} are more than there are")
    from dmd.metrics.evaluate import spread

    return source.select(spread(len(source), samples).tolist())


def _network(
    folder: str, name: str, options: EvaluateOptions, run: Config | None, protocol: "Protocol | None",
    place: "Workplace", steps: int, guidance: float | None,
) -> "Source":  # fmt: skip
    """Images of a network: `guidance` is that of many steps, where no option says it."""
    import torch

    from dmd import build, teachers
    from dmd.denoiser import Guided
    from dmd.generate import student_generator, teacher_generator, work_unit
    from dmd.noise import Karras
    from dmd.sampled import Sampled

    pipeline = teachers.load(folder, place.device, place.autocast)
    prompts, repeats = _prompts(options, run, pipeline, name)
    count = options.samples or (protocol.samples if protocol else None)
    count = count or (SAMPLES if run is None else run.evaluation.final_samples)
    how = "one step"
    generator = student_generator(pipeline.denoiser)
    if steps > 1:
        usual = 1.0 if guidance is None else guidance
        scale = usual if options.guidance_scale is None else options.guidance_scale
        solver = options.solver or ("heun" if isinstance(pipeline.denoiser.schedule, Karras) else "ddim")
        if run is not None and options.solver is None:
            solver = run.pairs.solver
        how = f"{steps} steps of {solver}, guidance {scale:g}"
        generator = teacher_generator(
            Guided(pipeline.denoiser, scale, pipeline.null()), build.SOLVERS[solver][0], steps
        )
    elif options.guidance_scale is not None and not options.teacher:
        raise InputError(f"--guidance-scale {options.guidance_scale} is for many steps: add --steps, or leave it out")
    numbers = torch.arange(count) % min(len(prompts), max(1, count // repeats))
    return Sampled(
        f"{name} ({how})", pipeline, generator, how, prompts, numbers, place.device, options.seed,
        options.sample_batch_size or work_unit(pipeline.shape, pipeline.codec),
    )  # fmt: skip


def _prompts(
    options: EvaluateOptions, run: Config | None, pipeline: "Pipeline", name: str
) -> tuple[Sequence[str], int]:
    """What a network is asked for, and how often each."""
    if pipeline.classes:
        if options.prompts is not None:
            raise InputError(f"--prompts are for text to image, and {name} knows classes: leave them out")
        return pipeline.classes, 1
    asked = options.prompts
    if asked is None and run is not None:
        asked = run.evaluation.test_prompts or run.data.prompts
    if asked is None:
        raise InputError(f"what should {name} draw? Give --prompts, a file or folder of prompts")
    repeats = options.repeats if run is None or options.repeats > 1 else run.evaluation.repeats
    if asked == "shapes":
        return _scene_captions(run), repeats
    from dmd.data import prompts

    return prompts.read(asked).texts, repeats


def _scene_captions(run: Config | None) -> list[str]:
    """Captions of scenes that no training has seen, those of the run's own evaluation."""
    import torch

    from dmd import build
    from dmd.data import shapes

    config = run or Config()
    index = torch.arange(build.UNSEEN, build.UNSEEN + config.data.captions)
    return [shapes.caption(s) for s in shapes.scenes(config.run.seed, index)]


# ----------------------------------------------------------------------------- by what


def _yardstick(
    options: EvaluateOptions, config: Config | None, protocol: "Protocol | None", place: "Workplace"
) -> "tuple[Extractor | None, Reference | None, dict[str, Any] | None]":
    """The network, the reference's statistics, and what the result says of the reference; all None without both."""
    from dmd import build
    from dmd.metrics import assess, backbones, protocols, sources

    source: Any = None
    data = None
    if options.reference is not None:
        source = _images(options.reference, options.seed)
    elif config is not None and config.data.data is not None:
        data = build.image_set(config)
        real = build.reference_set(config, data)
        assert real is not None  # since there are data
        source = sources.Arrays.of(config.data.data, real)
    specification = protocol.network if protocol else options.network
    if source is None:
        if specification is not None:
            raise InputError("--reference is missing: give real images that the others are measured against")
        return None, None, None
    if specification is not None:
        weights = Path(options.weights) if options.weights else None
        size = protocol.size if protocol else None
        specification = str(shipped.resolve(specification))
        extractor = backbones.load(specification, weights, options.download, Path(options.cache_dir), size)
    elif config is not None and config.data.data is not None:
        net = build.feature_net(config, data if data is not None else build.image_set(config))
        extractor = backbones.of_classifier(net)
    else:
        raise InputError(
            f"by which network should images be compared with {options.reference}? Give --protocol clean-fid, coco30k "
            "or dinov2, or --network"
        )
    before = protocol.before if protocol else protocols.as_it_is
    name = protocol.name if protocol else "network"
    cache = Path(options.cache_dir) / "references"
    content = source.digest()
    reference = assess.reference_of(
        source, content, extractor, before, name, cache, place.device, options.batch_size, True
    )
    if protocol is protocols.DINOV2:
        extractor = replace(extractor, label=protocol.label)
    return extractor, reference, {"name": source.name, "samples": reference.count, "sha256": content}


def _label(
    extractor: "Extractor | None", protocol: "Protocol | None", source: "Source", census: "Census",
    reference: "Reference | None",
) -> str:  # fmt: skip
    """What the distance is called: FID-COCO30k only where nothing differs from the protocol that can be seen."""
    if extractor is None:
        return ""
    if protocol is None or protocol.name != "coco30k":
        return extractor.label
    return "FID-COCO" if _off_coco(source, census, reference) else protocol.label


def _off_coco(source: "Source", census: "Census", reference: "Reference | None") -> list[str]:
    """In what images and reference differ from the coco30k protocol, as far as they tell."""
    from dmd.metrics.protocols import COCO_30K, COCO_PHOTOGRAPHS, COCO_PROMPTS

    found = []
    if len(source) != COCO_30K.samples:
        found.append(f"it is of {COCO_30K.samples:,} images, and these are {len(source):,}")
    if set(census.sizes) != {(512, 512)}:
        found.append("it is of images of 512x512 pixels, and these are not, or not all")
    different = len(set(source.captions or ()))
    if different < COCO_PROMPTS:
        known = f"of {different:,} different captions" if source.captions else "of captions that nothing tells"
        found.append(f"it is of an image for each of 30,000 captions, and these are {known}")
    if reference is not None and reference.count != COCO_PHOTOGRAPHS:
        found.append(f"it is against {COCO_PHOTOGRAPHS:,} photographs, and this reference has {reference.count:,}")
    return found


def _knows_classes(extractor: "Extractor", source: "Source") -> bool:
    """Whether the network's classes are as many as the source's, which are then taken for the same."""
    if extractor.head is None or source.labels is None:
        return False
    last = list(extractor.head.parameters())[-1]
    return len(source.labels.unique()) == len(last)


def _protocol_notes(
    protocol: "Protocol | None", source: "Source", census: "Census", reference: "Reference | None"
) -> list[str]:
    if protocol is None:
        return []
    if protocol.name == "coco30k":
        return [f"{source.name}: not the protocol coco30k: {why}" for why in _off_coco(source, census, reference)]
    if len(source) == protocol.samples:
        return []
    return [
        f"{source.name}: figures by {protocol.name} are published with {protocol.samples:,} samples, these have "
        f"{len(source):,}"
    ]
