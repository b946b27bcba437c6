"""`dmd probe`: what frozen features are good for, by nearest neighbours, linear classifiers and pictures."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dmd.cli.flags import guarded, read
from dmd.config import RunOptions
from dmd.errors import InputError

if TYPE_CHECKING:
    from dmd.build import Workplace
    from dmd.represent.features import Frozen
    from dmd.represent.gallery import Hung
    from dmd.represent.probe import Found, Protocol, Seen
    from dmd.represent.sets import LabelledSet

Probe = Literal["knn", "linear", "logistic", "few-shot", "geometry", "zero-shot"]
TRAINED: tuple[Probe, ...] = ("knn", "linear", "logistic", "few-shot", "geometry")


@dataclass(frozen=True)
class ProbeOptions:
    """Probe frozen networks on labelled images."""

    what: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Networks, side by side: runs of dmd represent or their backbone/ folders, timm:NAME, torchvision:NAME,
    transformers:FOLDER_OR_ID, resnetNN-*.th files or the folders of classifiers."""
    train: str | None = None
    """Labelled images: digits, shapes, torchvision:NAME:FOLDER, a folder of train/CLASS/* or CLASS/*, .npz, tars with
    .cls, or a folder with metadata.jsonl and labels."""
    test: str | None = None
    """Labelled images that figures are of. Left out, the test part of --train."""
    val: str | None = None
    """Labelled images that settings are chosen on. Left out, a fifth of each class's training images."""
    probes: tuple[Probe, ...] | None = None
    """Which ones. Left out, all that need no text, and zero-shot for runs that learnt from text."""
    metric: Literal["accuracy", "mean-class"] | None = None
    """Accuracy over images or averaged over classes. Left out, the set's protocol (mean-class for Aircraft, Flowers,
    Pets and Caltech101)."""
    neighbours: tuple[int, ...] = (20, 200)
    """Numbers of neighbours that vote."""
    temperature: float = 0.07
    """Of the votes, which are weighted by exp(cosine / temperature)."""
    linear_rates: tuple[float, ...] | None = None
    """Base learning rates of the linear probe. Left out, the ten of StableRep, 0.001 to 0.5."""
    linear_epochs: int = 90
    """Of the linear probe."""
    linear_batch: int = 256
    """Of the linear probe; the learning rate is the base rate * batch / 256."""
    shots: tuple[int, ...] = (1, 5)
    """Labelled images of each class in few-shot tasks."""
    ways: int = 5
    """Classes of a few-shot task."""
    tasks: int = 600
    """Few-shot tasks."""
    text: str | None = None
    """The text half for zero-shot classification: a CLIP of transformers (folder or hub id), open_clip:NAME,
    open_clip:NAME:TAG_OR_FILE or open_clip:FOLDER_OR_ID. Left out, that of the run, or of the CLIP that is probed."""
    templates: str | None = None
    """File of prompt templates, a line each, with {} where the class belongs."""
    image_size: int | None = None
    """Height and width that images are resized to. Left out, the network's own."""
    weights: str | None = None
    """A single network's state dict, for timm: and torchvision:."""
    download: bool = False
    """Fetch weights that are not given."""
    pictures: int = 4
    """Classes that pictures of patch tokens show; 0 leaves them out."""
    map: Literal["tsne", "pca", "none"] = "tsne"
    """Layout of the map of the test images."""
    bootstrap: int = 100
    """Resamples behind the 95 per cent intervals; 0 leaves them out."""
    seed: int = 0
    """Of everything that is drawn."""
    out: str = "probe"
    """Folder for probe.json, probe.svg, probe.html and the pictures."""
    cache_dir: str = "runs/cache"
    """Where features are kept."""
    batch_size: int = 64
    """Images at a time that the network sees."""
    cpu: bool = False
    """Use the CPU though there is a GPU."""


def main(argv: Sequence[str], prog: str = "dmd probe") -> None:
    guarded(lambda: probe(read(ProbeOptions, argv, prog)))


def check(options: ProbeOptions) -> None:
    """Raises InputError for options that are out of range or exclude each other."""
    o = options
    if not o.what:
        raise InputError(
            "what should be probed? Give a run of dmd represent or a network: dmd probe runs/x --train SET"
        )
    if o.train is None:
        raise InputError("--train is missing: give labelled images, such as digits or a folder of train/ and test/")
    positive = {
        "--linear-epochs": o.linear_epochs, "--linear-batch": o.linear_batch, "--tasks": o.tasks - 1,
        "--ways": o.ways - 1, "--batch-size": o.batch_size, "--image-size": o.image_size,
    }  # fmt: skip
    positive |= {"--neighbours": min(o.neighbours, default=1), "--shots": min(o.shots, default=1)}
    for flag, value in positive.items():
        if value is not None and value < 1:
            least = 2 if flag in ("--tasks", "--ways") else 1
            raise InputError(f"{flag} is {value + least - 1}: it must be at least {least}")
    if not 0 < o.temperature < float("inf"):
        raise InputError(f"--temperature is {o.temperature}: it must be above 0")
    for rate in o.linear_rates if o.linear_rates is not None else (1.0,):
        if not 0 < rate < float("inf"):
            raise InputError(f"--linear-rates has {rate}: rates must be above 0")
    if o.linear_rates == () or o.probes == () or o.neighbours == ():
        raise InputError("--linear-rates, --probes and --neighbours need at least one value each: leave them out")
    if o.bootstrap == 1 or o.bootstrap < 0:
        raise InputError(f"--bootstrap is {o.bootstrap}: it must be 0, or at least 2")
    if o.pictures < 0:
        raise InputError(f"--pictures is {o.pictures}: it must be 0 or more")
    if not 0 <= o.seed < 2**55:
        raise InputError(f"--seed is {o.seed}: it must be at least 0 and below 2**55")
    if o.weights is not None and len(o.what) > 1:
        raise InputError("--weights are of one network: probe the others by themselves, or leave it out")
    out = Path(o.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a folder as --out")


def probe(options: ProbeOptions) -> None:
    """Write probe.json, probe.svg, probe.html and the pictures, and print the table."""
    check(options)
    from dmd import build, checkpoint, scoreboard
    from dmd.represent import features, report, sets

    place = build.start(RunOptions(cpu=options.cpu))
    if not place.main:
        return
    train, val, test = _sets(options)
    test = replace(test, labels=sets.aligned(test, train, "test"), classes=train.classes)
    if val is not None:
        val = replace(val, labels=sets.aligned(val, train, "val"), classes=train.classes)
    protocol = _protocol(options, train, test)
    weights, cache = Path(options.weights) if options.weights else None, Path(options.cache_dir)
    # all before the first one works, so that a wrong name costs no time
    networks = [features.load(name, options.image_size, weights, options.download, cache) for name in options.what]
    texts = [_texts(options, name, net, place) for name, net in zip(options.what, networks, strict=True)]
    rows, results, sections = [], [], []
    for number, (net, text) in enumerate(zip(networks, texts, strict=True)):
        prefix = f"{number + 1}-" * (len(networks) > 1) + (re.sub(r"[^\w.-]+", "-", net.name).strip("-") or "network")
        found, hung, facts = _probed(options, protocol, net, text, (train, val, test), place, prefix)
        scores = {name: scoreboard.Score(f.value, f.low, f.high) for name, f in found.figures.items()}
        rows.append(scoreboard.Row(net.name, len(test), False, scores))
        sections.append(report.Section(net.name, hung.files))
        results.append(facts)
    out = Path(options.out)
    counts = {"train": len(train), "val": None if val is None else len(val), "test": len(test)}
    whole = {
        "sets": {"train": options.train, "val": options.val, "test": options.test or options.train},
        "counts": counts, "classes": len(train.classes), "protocol": asdict(protocol), "seed": options.seed,
        "results": results, "environment": build.environment(place),
    }  # fmt: skip
    checkpoint.write_json(out / "probe.json", whole)
    title = f"Frozen features on {test.source.name}"
    foot = "Bars: 95 % intervals by bootstrap over test images; few-shot: over tasks." * bool(options.bootstrap)
    svg = scoreboard.svg(rows, title, foot)
    (out / "probe.svg").write_text(svg, encoding="utf-8")
    notes = list(dict.fromkeys(f"{r['network']}: {note}" for r in results for note in r["notes"]))
    report.write(out / "probe.html", title, svg, rows, sections, notes, whole)
    print(scoreboard.table(rows))
    if protocol.mean_class:
        print("accuracies are means over classes")
    for note in notes:
        print(f"note: {note}")
    print(f"written: {out / 'probe.json'}, {out / 'probe.html'}")


def _probed(
    options: ProbeOptions, protocol: "Protocol", net: "Frozen", text: Any,
    sets: "tuple[LabelledSet, LabelledSet | None, LabelledSet]", place: "Workplace", prefix: str,
) -> "tuple[Found, Hung, dict[str, Any]]":  # fmt: skip
    """The figures and pictures of one network, and what probe.json says of it."""
    from dmd.represent import features, gallery, probe

    cache, device = Path(options.cache_dir) / "features", place.device

    def seen(part: "LabelledSet") -> "Seen":
        x = features.features(part.source, net, cache, device, options.batch_size, True)
        return probe.Seen(x.to(device), part.labels.to(device))

    train, val, test = sets
    split = probe.parts(
        seen(train), None if val is None else seen(val), seen(test), len(train.classes), protocol
    )  # fmt: skip
    found, hung = probe.Found(), gallery.Hung()
    for name in options.probes or TRAINED:
        if name != "zero-shot":
            print(f"{net.name}: {name}", flush=True)
            found.add(probe.PROBES[name](split, protocol))
    if text is not None:
        found.add(probe.zero(split, protocol, train.classes, *text))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.pictures:
        hung.add(gallery.tokens(net, test, options.pictures, out, prefix, device, options.batch_size))
    if options.map != "none":
        hung.add(gallery.atlas(net, test, split.test.x.cpu(), options.map, out, prefix, options.seed))
    facts = {
        "network": net.name, "facts": net.facts, "features": split.test.x.shape[1],
        "figures": {name: asdict(figure) for name, figure in found.figures.items()},
        "details": found.details, "notes": found.notes + hung.notes,
        "pictures": [file.name for file in hung.files.values()],
    }  # fmt: skip
    return found, hung, facts


def _sets(options: ProbeOptions) -> "tuple[LabelledSet, LabelledSet | None, LabelledSet]":
    """Training, validation and test images, checked."""
    from dmd.represent import sets

    assert options.train is not None  # by `check`
    train = sets.check(sets.read(options.train, "train", True))
    val = None if options.val is None else sets.read(options.val, "val", True)
    test = sets.check(sets.read(options.test or options.train, "test", True))
    sets.require_apart({"--train": train, **({} if val is None else {"--val": val}), "--test": test})
    return train, val, test


def _protocol(options: ProbeOptions, train: "LabelledSet", test: "LabelledSet") -> "Protocol":
    from dmd.represent import linear, zero_shot
    from dmd.represent.probe import Protocol

    o = options
    mean_class = train.mean_class or test.mean_class if o.metric is None else o.metric == "mean-class"
    templates: Sequence[str] = zero_shot.TEMPLATES
    if o.templates is not None:
        try:
            lines = Path(o.templates).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise InputError(f"{o.templates} is not UTF-8: save it as UTF-8") from None
        templates = tuple(line.strip() for line in lines if line.strip())
        zero_shot.check_templates(templates)
    return Protocol(
        neighbours=o.neighbours, temperature=o.temperature, rates=o.linear_rates or linear.RATES,
        epochs=o.linear_epochs, batch=o.linear_batch, ways=o.ways, shots=o.shots, tasks=o.tasks,
        templates=templates, mean_class=mean_class, resamples=o.bootstrap, seed=o.seed,
    )  # fmt: skip


def _texts(options: ProbeOptions, name: str, net: "Frozen", place: "Workplace") -> Any:
    """(features to embeddings, prompts to embeddings) for zero-shot classification; None where it is not asked for, or
    the network has no text half.
    """
    asked = options.probes is not None and "zero-shot" in options.probes
    if options.probes is not None and not asked:
        return None
    kind, _, rest = name.partition(":")
    source = rest if options.text is None and kind == "transformers" and asked else options.text
    if source is None and net.folder is not None and (net.folder / "text").is_dir():
        from dmd.represent.text import load_text

        text = load_text(net.folder / "text", place.device)
        return text.project, text
    if source is None:
        if asked:
            raise InputError(f"{name} has no text half, which zero-shot classification needs: give --text")
        return None
    from dmd.metrics import clip

    return (lambda x: x), clip.load(source, place.device, options.download).texts
