"""`dmd probe`: what frozen features are good for, by nearest neighbours, linear classifiers and pictures."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dmd.cli.flags import guarded, read
from dmd.config import RunOptions
from dmd.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dmd.build import Workplace
    from dmd.represent.features import Frozen
    from dmd.represent.probe import Found, Protocol
    from dmd.represent.sets import LabelledSet

Probe = Literal["knn", "linear", "logistic", "few-shot", "geometry", "zero-shot"]
TRAINED: tuple[Probe, ...] = ("knn", "linear", "logistic", "few-shot", "geometry")
PICTURED = 6
"""Images of a class in the pictures of tokens."""


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
    """The text half for zero-shot classification: a CLIP of transformers (folder or id) or open_clip:NAME. Left out,
    that of the run, or of the CLIP that is probed."""
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
    from dmd.represent import probe as probes

    place = build.start(RunOptions(cpu=options.cpu))
    if not place.main:
        return
    train, val, test = _sets(options)
    labels = {"train": train.labels, "test": sets.aligned(test, train, "test")}
    if val is not None:
        labels["val"] = sets.aligned(val, train, "val")
    protocol = _protocol(options, train, test)
    weights = Path(options.weights) if options.weights else None
    cache = Path(options.cache_dir)
    networks = [
        features.load(name, options.image_size, weights, options.download, cache) for name in options.what
    ]  # all before the first one works, so that a wrong name costs no time
    texts = [_texts(options, name, net, place) for name, net in zip(options.what, networks, strict=True)]
    out = Path(options.out)
    rows, results, sections = [], [], []
    for number, (net, text) in enumerate(zip(networks, texts, strict=True)):

        def see(part: "LabelledSet", net: "Frozen" = net) -> "Tensor":
            found = features.features(part.source, net, cache / "features", place.device, options.batch_size, True)
            return found.to(place.device)

        def seen(name: str, part: "LabelledSet") -> "probes.Seen":
            return probes.Seen(see(part), labels[name].to(place.device))

        split = probes.parts(
            seen("train", train), None if val is None else seen("val", val), seen("test", test), len(train.classes),
            protocol,
        )  # fmt: skip
        found = probes.Found()
        for name in options.probes or TRAINED:
            if name != "zero-shot":
                print(f"{net.name}: {name}", flush=True)
                found.add(probes.PROBES[name](split, protocol))
        if text is not None:
            found.add(probes.zero(split, protocol, train.classes, *text))
        out.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^\w.-]+", "-", net.name).strip("-") or "network"
        prefix = slug if len(networks) == 1 else f"{number + 1}-{slug}"
        files = _pictures(options, net, test, split.test.x.cpu(), place.device, out, prefix, found)
        scores = {name: scoreboard.Score(f.value, f.low, f.high) for name, f in found.figures.items()}
        rows.append(scoreboard.Row(net.name, len(test), False, scores))
        sections.append(report.Section(net.name, files))
        results.append({
            "network": net.name, "facts": net.facts, "features": split.test.x.shape[1],
            "figures": {name: asdict(figure) for name, figure in found.figures.items()},
            "details": found.details, "notes": found.notes, "pictures": [file.name for file in files],
        })  # fmt: skip
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


def _sets(options: ProbeOptions) -> "tuple[LabelledSet, LabelledSet | None, LabelledSet]":
    """Training, validation and test images, checked."""
    from dmd.represent import sets

    assert options.train is not None  # by `check`
    train = sets.check(sets.read(options.train, "train", True))
    val = None if options.val is None else sets.read(options.val, "val", True)
    test = sets.check(sets.read(options.test or options.train, "test", True))
    for name, other in (("--val", val), ("--test", test)):
        if other is not None and other.source.digest() == train.source.digest():
            raise InputError(
                f"{name} has the same images as --train, {train.source.name}: give others, or a set that has parts"
            )
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


Texts = tuple[Callable[["Tensor"], "Tensor"], Callable[[Sequence[str]], "Tensor"]]
"""Features to embeddings, and prompts to embeddings."""


def _texts(options: ProbeOptions, name: str, net: "Frozen", place: "Workplace") -> "Texts | None":
    """What zero-shot classification of a network compares; None where it is not asked for, or the network has none."""
    asked = options.probes is not None and "zero-shot" in options.probes
    if options.probes is not None and not asked:
        return None
    source = options.text
    kind, _, rest = name.partition(":")
    if source is None and kind == "transformers" and asked:
        source = rest
    if source is None:
        if asked:
            raise InputError(
                f"{name} has no text half, which zero-shot classification needs: give --text, or leave it out"
            )
        return None
    import torch

    from dmd.metrics import clip_score

    clip = clip_score.load(source, None, options.download, place.device)
    return lambda x: x, torch.no_grad()(clip.embed_texts)


def _pictures(
    options: ProbeOptions, net: "Frozen", test: "LabelledSet", x: "Tensor", device: "torch.device", out: Path,
    prefix: str, found: "Found",
) -> list[Path]:  # fmt: skip
    """Pictures of patch tokens and the map, as PNG files; why one is left out becomes a note."""
    from dmd.metrics.evaluate import spread
    from dmd.represent import features, maps, pictures

    files = []
    if options.pictures and net.tokens is None:
        found.notes.append("no pictures of patch tokens: where this network's tokens are is not known")
    elif options.pictures:
        try:
            page = _token_page(options.pictures, net, test, device, options.batch_size, features, pictures)
            files.append(_save(page, out / f"{prefix}-tokens.png"))
        except InputError as error:
            found.notes.append(f"no pictures of patch tokens: {error}")
    if options.map != "none":
        index = spread(len(x), maps.MOST)
        at = maps.places(x[index], options.map, options.seed)
        title = f"{net.name}, {options.map}, {len(index):,} images of {test.source.name}"
        files.append(_save(maps.draw(at, test.labels[index], test.classes, title), out / f"{prefix}-map.png"))
    return files


def _token_page(
    classes: int, net: "Frozen", test: "LabelledSet", device: "torch.device", batch: int, features: Any, pictures: Any
) -> "Tensor":
    """A row of images and a row of their tokens for each of some classes, each class by components of its own."""
    import torch

    pages = []
    for c in test.labels.unique()[:classes].tolist():
        index = torch.nonzero(test.labels == c)[:PICTURED, 0].tolist()
        images = next(test.source.select(index).batches(len(index)))
        prepared = net.prepared(images)
        shown = pictures.colours(features.grids(prepared, net, device, batch))
        both = [torch.cat((part, part.new_full((PICTURED - len(part), *part.shape[1:]), 255))) for part in (
            prepared.round().to(torch.uint8), shown
        )]  # fmt: skip
        pages.append(pictures.page(*both, PICTURED))
    return torch.cat(pages, dim=1)


def _save(image: "Tensor", path: Path) -> Path:
    from PIL import Image

    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path)
    return path
