"""What synthetic images teach: `python -m benchmarks.representation --experiment a --world digits [--seeds 0 1 2]`.

a  The same captions and numbers of images, by the one-step student, by its 50-step teacher, and real ones: StableRep,
   SynCLR, SimCLR, supervised by class, and captions as classes. Targets: StableRep on the student's images within 1
   point of StableRep on the teacher's, and above SimCLR on the same images; an image at 1/30 of the teacher's cost.
b  Images that the student makes fresh in every step, against 10 stored ones of each caption: as many updates, the same
   captions in each of them.
c  StableRep+ on n synthetic images against CLIP on 2.5 n real ones: as many updates of as many images.
d  m, the images of a caption in a step, on the student's images, at equal images of a step, whose captions are all
   different; the guidance scale, on the teacher's; beside the diversity of the images within a caption, which is a mean
   cosine distance of features learnt from real images.

A world has real training images with captions, which teach the generator and the learners on real images, and a test
part that nothing else sees; every figure is of frozen features on the real test part, by `dmd probe`. Captions of
digits, CIFAR-10 and Fashion-MNIST are a class and attributes that are measured on the image; the student of these
worlds is distilled here first, from a teacher that is taught here, by `train_dmd.py`. In `shapes`, both ship.

Every run is a folder in --folder and is resumed, or reused if its settings are the same. Learners differ by seed; the
images do not. Bars in the plot are the lowest and the highest seed. Flags after -- are for `train_dmd.py`.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import finish, say_machine
from dmd import scoreboard, settings
from dmd.cli import represent
from dmd.cli.probe import ProbeOptions
from dmd.cli.probe import probe as run_probe
from dmd.data import images, shapes
from dmd.data.groups import ImageGroups
from dmd.data.images import ImageSet
from dmd.errors import InputError
from dmd.metrics.manifold import diversity
from dmd.metrics.sources import Arrays
from dmd.represent import config as learning
from dmd.represent import features, sets
from dmd.represent.config import Config
from dmd.seeding import Stream, bits

SHOWN = ("zero-shot", "diversity", "kNN-20", "linear", "RankMe")
REPLICAS = 10
"""Stored images of a caption in experiment b."""
M = (2, 4, 8)
GUIDANCE = (1.0, 2.0, 4.0, 8.0)
TEACHER_STEPS = 50


# ----------------------------------------------------------------------------- worlds


@dataclass(frozen=True)
class Real:
    """Real training images.

    Attributes:
        data: (N, C, H, W) uint8, whose classes are captions.
        classes: the class names.
        of_caption: the class of each caption.
        templates: of prompts for zero-shot classification, as captions are built.
    """

    data: ImageSet
    classes: tuple[str, ...]
    of_caption: tuple[int, ...]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """What an experiment is made of.

    Attributes:
        real: its training images; the argument is the folder that the user gives, and whether it is a smoke test.
        tested: what `dmd probe` reads training and test part from; None is the folder that the user gives.
        distil: preset of `train_dmd.py` for the student, or None where one ships.
        preset: of `dmd represent`.
        flags: beside it.
        synclr: and for SynCLR.
    """

    real: Callable[[Path, bool], Real]
    tested: str | None
    distil: str | None
    preset: str
    flags: tuple[str, ...] = ()
    synclr: tuple[str, ...] = ()


def described(found: ImageSet, attributes: Sequence[tuple[Tensor, tuple[str, str]]]) -> Real:
    """Images with "word word class" for captions: for each attribute the word of the half of the class it is in.

    Args:
        attributes: a number (N,) of each image, and the words for the lower and the upper half of its class.
    """
    above = torch.zeros(len(found), len(attributes), dtype=torch.int64)
    for column, (value, _) in enumerate(attributes):
        for c in range(len(found.classes)):
            members = found.labels == c
            rank = value[members].argsort(stable=True).argsort()  # so that equal numbers leave no half empty
            above[members, column] = (2 * rank >= len(rank)).long()
    words = [
        tuple(w[i] for (_, w), i in zip(attributes, bits_of(n, len(attributes)), strict=True))
        for n in range(2 ** len(attributes))
    ]
    number = (above * torch.tensor([2**i for i in range(len(attributes))])).sum(1)
    captions = tuple(" ".join((*w, name)) for name in found.classes for w in words)
    of_caption = tuple(c for c in range(len(found.classes)) for _ in words)
    labels = found.labels * len(words) + number
    templates = tuple(" ".join((*w, "{}")) for w in words)
    return Real(ImageSet(found.images, labels, captions), found.classes, of_caption, templates)


def bits_of(number: int, count: int) -> list[int]:
    return [number >> i & 1 for i in range(count)]


def brightness(found: ImageSet) -> Tensor:
    return found.images.flatten(1).float().mean(1)


def digits(folder: Path, quick: bool) -> Real:
    found = sets.drawn_part(images.digits(), "train")
    return described(found, [(brightness(found), ("thin", "bold"))])


def fashion(folder: Path, quick: bool) -> Real:
    found = loaded(folder, "train", quick)
    area = (found.images > 64).float().flatten(1).mean(1)
    return described(found, [(brightness(found), ("dark", "light")), (area, ("small", "large"))])


def cifar10(folder: Path, quick: bool) -> Real:
    found = loaded(folder, "train", quick)
    red, _, blue = found.images.float().mean((2, 3)).T
    return described(found, [(brightness(found), ("dark", "light")), (red - blue, ("cold", "warm"))])


def loaded(folder: Path, part: images.Split, quick: bool) -> ImageSet:
    """The user's images, padded to 32 pixels as `train_dmd.py` does it."""
    found = images.load(folder, part)
    if quick:
        found = found.select(torch.arange(2000))
    return ImageSet(images.pad_to(found.images, 32), found.labels, found.classes)


def drawn_shapes(folder: Path, quick: bool) -> Real:
    """5 drawings of each of 600 captions of single things: 2.5 times as many as 2 of each, for experiment c."""
    count, each = (24, 5) if quick else (600, 5)
    scenes: dict[str, shapes.Scene] = {}
    start = 0
    while len(scenes) < count:
        for scene in shapes.scenes(0, torch.arange(start, start + 4 * count)):
            if len(scene.things) == 1:
                scenes.setdefault(shapes.caption(scene), scene)
        start += 4 * count
    chosen = dict(list(scenes.items())[:count])
    drawings = shapes.batch([s for s in chosen.values() for _ in range(each)], 0, torch.arange(count * each))
    classes = tuple(f"{colour} {shape}" for shape, colour in shapes.PAIRS)
    of_caption = tuple(shapes.PAIRS.index((s.things[0].shape, s.things[0].colour)) for s in chosen.values())
    labels = torch.arange(count).repeat_interleave(each)
    templates = tuple(
        f"a {size} {{}} in the centre on a {ground} background" for size in shapes.SIZES for ground in shapes.COLOURS
    )
    return Real(ImageSet(drawings, labels, tuple(chosen)), classes, of_caption, templates)


WORLDS = {
    "digits": World(digits, "digits", "digits", "digits", ("--max-train-steps", "200")),
    "shapes": World(
        drawn_shapes, "shapes", None, "shapes", ("--image-size", "32", "--max-train-steps", "200"),
        ("--local-size", "16"),
    ),
    "cifar10": World(cifar10, None, "cifar10", "small"),
    "fashion": World(fashion, None, "fashion", "small", ("--channels", "1")),
}  # fmt: skip
HARMLESS = set(learning.RESUMABLE) - {"data", "captions", "student", "probe"}
"""Options in which a run that is taken from its folder may differ from what is asked for."""
QUICK = {
    "distil": [
        "--teach-steps", "60", "--pairs", "100", "--max-train-steps", "10", "--final-samples", "40",
        "--compare-steps", "4", "--eval-samples", "40",
    ],
    "learn": ["--max-train-steps", "4", "--captions-per-batch", "8"],
}  # fmt: skip


# ----------------------------------------------------------------------------- one step of the chain each


@dataclass(frozen=True)
class Bench:
    """A world in a folder.

    Attributes:
        name, world: which.
        folder: of all that is made.
        data: the user's images, where the world has them from there.
        quick: a smoke test.
        distil: flags of `train_dmd.py` beside the preset's.
        learn: flags of `dmd represent` beside the world's.
    """

    name: str
    world: World
    folder: Path
    data: Path
    quick: bool
    distil: tuple[str, ...] = ()
    learn: tuple[str, ...] = ()

    def dmd(self, *words: str) -> None:
        """Run `python -m dmd ...`."""
        print(f"$ dmd {' '.join(words)}", flush=True)
        subprocess.run([sys.executable, "-m", "dmd", *words], check=True)

    @cached_property
    def tested(self) -> str:
        """What `dmd probe` reads real training and test images from, labelled by class."""
        if self.world.tested is not None:
            return self.world.tested
        for part in ("train", "test"):
            self.stored(f"tested/{part}", lambda part=part: loaded(self.data, part, self.quick))  # type: ignore[misc]
        return str(self.folder / "tested")

    # ------------------------------------------------------------------------- images

    @cached_property
    def real(self) -> Real:
        """Real training images."""
        return self.world.real(self.data, self.quick)

    def captions(self) -> Path:
        """File of the captions, one a line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "captions.txt"
        file.write_text("\n".join(self.real.data.classes) + "\n", encoding="utf-8")
        return file

    def by_caption(self) -> Path:
        """Real training images, labelled by caption."""
        return self.stored("real", lambda: self.real.data)

    def stored(self, name: str, make: Callable[[], ImageSet]) -> Path:
        """NAME.npz, made where it is missing."""
        file = self.folder / f"{name}.npz"
        if not file.is_file():
            found = make()
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".tmp-{file.name}")
            pixels = found.images.permute(0, 2, 3, 1).numpy()
            np.savez(temporary, images=pixels, labels=found.labels.numpy(), class_names=np.array(found.classes))
            temporary.replace(file)
        return file

    def student(self) -> str:
        """The folder of the student, distilled where it is missing, or the one that ships."""
        if self.world.distil is None:
            return "shapes-student"
        folder = self.folder / "dmd"
        if not (folder / "summary.json").is_file():
            flags = ["--data", str(self.by_caption()), "--output-dir", str(folder)]
            flags += ["--cache-dir", str(self.folder / "cache"), *self.distil]
            self.dmd("train", self.world.distil, *flags)
        return str(folder / "student")

    def synthetic(self, name: str, replicas: int, *flags: str) -> Path:
        """NAME.npz, `replicas` images of each caption by the student, or with --teacher by its teacher."""

        def make() -> ImageSet:
            student = self.student()
            out = self.folder / "shards" / name
            self.dmd(
                "synthesize", str(self.captions()), "--student", student, "--out", str(out),
                "--replicas", str(replicas), "--image-format", "png", "--shard-size", str(replicas * 100), *flags,
            )  # fmt: skip
            return self.read(out, replicas)

        return self.stored(name, make)

    def read(self, shards: Path, replicas: int) -> ImageSet:
        """A data set of shards, labelled by caption."""
        captions = self.real.data.classes
        at = {caption: number for number, caption in enumerate(captions)}
        groups = list(ImageGroups(shards, replicas, shuffle=False))
        channels = self.real.data.shape[0]
        pixels = torch.stack([image[:channels] for group in groups for image in group.images])
        labels = torch.tensor([at[group.caption] for group in groups]).repeat_interleave(replicas)
        return ImageSet(pixels, labels, captions)

    def shards(self, name: str, replicas: int, *flags: str) -> Path:
        """The same as shards, of which a step has m images each of different captions, whatever their number."""
        self.synthetic(name, replicas, *flags)
        return self.folder / "shards" / name

    def seconds_per_image(self, name: str) -> float | None:
        """What an image of a data set cost to make, encoding included."""
        stats = [json.loads(f.read_text()) for f in (self.folder / "shards" / name).glob("*_stats.json")]
        made = sum(s["successes"] for s in stats)
        return sum(s["duration"] for s in stats) / made if made else None

    def made(self) -> list[str]:
        """Data sets that were made here; in any case experiment a's two."""
        return sorted({"student", "teacher"} | {f.name for f in (self.folder / "shards").glob("*")})

    def replicas(self) -> int:
        """Images of each caption, so that synthetic sets have as many as there are real ones."""
        return max(4, len(self.real.data) // len(self.real.data.classes))

    def by_class(self, name: str, data: Path) -> Path:
        """A set's images labelled by class."""

        def make() -> ImageSet:
            found, real = images.load(data, "train"), self.real
            return ImageSet(found.images, torch.tensor(real.of_caption)[found.labels], real.classes)

        return self.stored(f"{name}-classes", make)

    def some(self, name: str, data: Path, count: int) -> Path:
        """So many of a set's images, or all, as many of each caption as can be."""

        def make() -> ImageSet:
            found = images.load(data, "train")
            words = bits(0, Stream.PROBE_SPLIT, 0, torch.arange(len(found)), 1)[:, 0]
            turn = torch.empty(len(found), dtype=torch.int64)
            for c in found.labels.unique():
                members = torch.nonzero(found.labels == c)[:, 0]
                turn[members[words[members].argsort(stable=True)]] = torch.arange(len(members))
            return found.select(turn.argsort(stable=True)[:count].sort().values)

        return self.stored(name, make)

    # ------------------------------------------------------------------------- learners and figures

    def flags(self, name: str, method: str, seed: int, *flags: str) -> list[str]:
        """Of `dmd represent` for a run; of a flag that comes twice the last one counts."""
        own = self.world.synclr if method == "synclr" else ()
        words = [*self.world.flags, *own, *flags, "--seed", str(seed), "--output-dir", str(self.run(name, seed))]
        words += ["--probe", "None", "--cache-dir", str(self.folder / "cache"), *self.learn]
        return [method, self.world.preset, *merged(words)]

    def run(self, name: str, seed: int) -> Path:
        return self.folder / "runs" / f"{name}-{seed}"

    def is_learnt(self, name: str, method: str, seed: int, *flags: str) -> bool:
        """Whether a run is there. Raises InputError if it is, but with other settings."""
        run = self.run(name, seed)
        if not (run / "summary.json").is_file():
            return False
        config = represent.parse(self.flags(name, method, seed, *flags), "dmd represent").config
        settings.require_same(learning.read(run / "config.json"), config, HARMLESS, str(run))
        return True

    def learnt(self, name: str, method: str, seed: int, *flags: str) -> dict[str, float]:
        """Train a backbone, or take it from its folder, and probe it on real images."""
        if not self.is_learnt(name, method, seed, *flags):
            self.dmd("represent", *self.flags(name, method, seed, *flags))
        return self.probed(self.run(name, seed), ("knn", "linear", "geometry"))

    @cached_property
    def views(self) -> int:
        """Images of a step in the world's preset, whatever the method."""
        data = learning.preset("clip", self.world.preset).data
        return data.captions_per_batch * data.per_caption

    def probed(self, run: Path, probes: tuple[Any, ...]) -> dict[str, float]:
        """Figures of a run's frozen features on real images; zero-shot too where it has a text half."""
        out = run / "probe"
        if not (out / "probe.json").is_file():
            if (run / "text").is_dir():
                probes = (*probes, "zero-shot")
            run.mkdir(parents=True, exist_ok=True)
            templates = run / "templates.txt"
            templates.write_text("\n".join(self.real.templates) + "\n", encoding="utf-8")
            options = ProbeOptions((str(run),), train=self.tested, probes=probes, map="none", pictures=0, bootstrap=0)
            options = replace(options, out=str(out), cache_dir=str(self.folder / "cache"), templates=str(templates))
            run_probe(replace(options, linear_epochs=4) if self.quick else options)
        (result,) = json.loads((out / "probe.json").read_text())["results"]
        return {k: f["value"] for k, f in result["figures"].items()}


def merged(words: Sequence[str]) -> list[str]:
    """ "--flag value ..." with the last of equal flags only."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            found.pop(word, None)
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return [part for flag, values in found.items() for part in (flag, *values)]


@dataclass(frozen=True)
class Arm:
    """A learner on a set of images, for any seed.

    Attributes:
        bench: where.
        folder: its runs' name.
        method: of `dmd represent`.
        flags: of `dmd represent` beside the world's.
        beside: figures of the images.
    """

    bench: Bench
    folder: str
    method: str
    flags: tuple[str, ...]
    beside: Mapping[str, float] = field(default_factory=dict)

    def config(self, seed: int) -> Config:
        return represent.parse(self._words(seed), "dmd represent").config

    def _words(self, seed: int) -> list[str]:
        return self.bench.flags(self.folder, self.method, seed, *self.flags)

    def done(self, seed: int) -> bool:
        """Raises InputError if a run is there with other settings."""
        return self.bench.is_learnt(self.folder, self.method, seed, *self.flags)

    def figures(self, seed: int) -> dict[str, float]:
        """Trained or taken from its folder, and probed."""
        return self.bench.learnt(self.folder, self.method, seed, *self.flags) | dict(self.beside)

    def cost(self, seed: int) -> dict[str, Any]:
        """What a run that is done has seen, and how long it took."""
        summary = json.loads((self.bench.run(self.folder, seed) / "summary.json").read_text())
        return {k: summary[k] for k in ("method", "updates", "images_seen", "views_seen", "seconds")}


# ----------------------------------------------------------------------------- experiments


def sources(bench: Bench) -> dict[str, Path]:
    """Three sets of the same captions and, up to rounding, the same number of images."""
    count = bench.replicas()
    teacher = ("--teacher", "--steps", str(4 if bench.quick else TEACHER_STEPS))
    return {
        "student": bench.synthetic("student", count),
        "teacher": bench.synthetic("teacher", count, *teacher),
        "real": bench.by_caption(),
    }


def experiment_a(bench: Bench) -> dict[str, Arm]:
    """By way of learning, the dearest last, so that what is stopped early has the others."""
    arms: dict[str, Arm] = {}
    for name, data in sources(bench).items():
        classes = bench.by_class(name, data)
        ways = {
            "StableRep": ("stablerep", data), "SimCLR": ("simclr", data), "supervised": ("supervised", classes),
            "captions as classes": ("supervised", data), "SynCLR": ("synclr", data),
        }  # fmt: skip
        for way, (method, images_of) in ways.items():
            folder = f"a-{name}-{way.replace(' ', '-').lower()}"
            arms[f"{way}, {name}"] = Arm(bench, folder, method, ("--data", str(images_of)))
    return arms


def experiment_b(bench: Bench) -> dict[str, Arm]:
    captions = len(bench.real.data.classes)
    size = ("--captions-per-batch", str(min(64, captions)), "--per-caption", "4")
    stored = bench.shards(f"student-{REPLICAS}", REPLICAS)
    fresh = (
        "--online", "--student", bench.student(), "--captions", str(bench.captions()), "--data", "None",
        "--workers", "0",
    )  # fmt: skip
    return {
        f"{REPLICAS} stored images of a caption": Arm(bench, "b-stored", "stablerep", (*size, "--data", str(stored))),
        "fresh images in every step": Arm(bench, "b-online", "stablerep", (*size, *fresh)),
    }


def experiment_c(bench: Bench) -> dict[str, Arm]:
    real, captions = bench.by_caption(), len(bench.real.data.classes)
    total = len(bench.real.data)
    each = max(2, int(total / 2.5) // captions)
    n, m = each * captions, min(4, each)
    synthetic = bench.synthetic(f"student-{each}", each)
    more, same = bench.some("real-more", real, round(2.5 * n)), bench.some("real-same", real, n)
    size = ("--per-caption", str(m), "--captions-per-batch", str(bench.views // m))
    count = len(images.load(more, "train"))
    return {
        f"StableRep+, {n:,} synthetic": Arm(bench, "c-plus", "stablerep-plus", (*size, "--data", str(synthetic))),
        f"CLIP, {n:,} synthetic": Arm(bench, "c-clip-synthetic", "clip", ("--data", str(synthetic))),
        f"CLIP, {n:,} real": Arm(bench, "c-clip-same", "clip", ("--data", str(same))),
        f"CLIP, {count:,} real": Arm(bench, "c-clip-more", "clip", ("--data", str(more))),
    }


def experiment_d(bench: Bench) -> dict[str, Arm]:
    """A step has each caption once, so that an image has m - 1 positives and no more; with few captions it is small."""
    judge = bench.by_class("real", bench.by_caption())
    bench.learnt("a-real-supervised", "supervised", 0, "--data", str(judge))
    net = features.load(str(bench.run("a-real-supervised", 0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views = min(bench.views, min(M) * len(bench.real.data.classes))

    def arm(folder: str, m: int, name: str, replicas: int, *flags: str) -> Arm:
        data = bench.shards(name, replicas, *flags)
        found = images.load(bench.synthetic(name, replicas, *flags), "train")
        x = features.features(Arrays.of(name, found), net, bench.folder / "cache" / "features", device, 256, True)
        size = ("--per-caption", str(m), "--captions-per-batch", str(views // m))
        beside = {"diversity": diversity(x, found.labels)}
        return Arm(bench, folder, "stablerep", (*size, "--data", str(data)), beside)

    count = max(bench.replicas(), max(M))
    arms = {f"m = {m}, student": arm(f"d-m{m}", m, f"student-{count}", count) for m in M}
    for scale in GUIDANCE[::3] if bench.quick else GUIDANCE:
        steps = ("--teacher", "--steps", str(4 if bench.quick else TEACHER_STEPS), "--guidance-scale", f"{scale:g}")
        name = f"teacher-w{scale:g}"
        arms[f"w = {scale:g}, teacher, m = 4"] = arm(f"d-w{scale:g}", 4, name, max(4, bench.replicas()), *steps)
    return arms


EXPERIMENTS = {"a": experiment_a, "b": experiment_b, "c": experiment_c, "d": experiment_d}


# ----------------------------------------------------------------------------- what comes of it


def summarised(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Arm, figure that all seeds have: mean, deviation, lowest and highest of the seeds."""
    return {
        arm: {
            name: {
                "mean": statistics.mean(v), "std": statistics.stdev(v) if len(v) > 1 else 0.0,
                "low": min(v), "high": max(v),
            }
            for name in runs[0]
            if all(name in run for run in runs)
            for v in [[run[name] for run in runs]]
        }
        for arm, runs in found.items()
    }  # fmt: skip


def verdicts(bench: Bench, results: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Experiment a's targets, each with what was reached."""
    probe = "linear"
    mean = {arm: row[probe]["mean"] for arm, row in results.items()}
    behind = 100 * (mean["StableRep, teacher"] - mean["StableRep, student"])
    above = 100 * (mean["StableRep, student"] - mean["SimCLR, student"])
    found = [
        {"what": f"StableRep ({probe}), points behind the teacher's images", "value": behind, "met": behind <= 1},
        {"what": f"StableRep ({probe}), points above SimCLR", "value": above, "met": above > 0},
    ]
    one, many = bench.seconds_per_image("student"), bench.seconds_per_image("teacher")
    if one and many:
        times = many / one
        what = "times cheaper an image, writing it included (target: 30)"
        found.append({"what": what, "value": times, "met": times >= 30})
    return found


def chart(experiment: str, world: str, seeds: Sequence[int], arms: Mapping[str, Mapping[str, Any]]) -> str:
    """An SVG of what `summarised` gives: means, and bars from the lowest to the highest seed."""
    rows = [
        scoreboard.Row(
            arm, len(seeds), False,
            {n: scoreboard.Score(row[n]["mean"], row[n]["low"], row[n]["high"]) for n in SHOWN if n in row},
        )
        for arm, row in arms.items()
    ]  # fmt: skip
    title = f"Experiment {experiment}, {world}: real test images, {len(seeds)} seeds"
    return scoreboard.svg(rows, title, "Bars: lowest and highest seed.")


def measured(arms: Mapping[str, Arm], seeds: Sequence[int]) -> dict[str, list[dict[str, float]]]:
    """Figures of every arm and seed, with the time that is left.

    Raises:
        InputError: a run is there, but with other settings; before any is trained.
    """
    todo = [name for name, arm in arms.items() for seed in seeds if not arm.done(seed)]
    steps = sorted({arm.config(seeds[0]).learn.max_train_steps for arm in arms.values()})
    updates = " or ".join(f"{count:,}" for count in steps)
    print(f"{len(arms) * len(seeds)} learners of {updates} updates, {len(todo)} of them to be trained", flush=True)
    seconds: dict[str, list[float]] = {}
    found: dict[str, list[dict[str, float]]] = {}
    for name, arm in arms.items():
        for seed in seeds:
            started, was_there = time.monotonic(), arm.done(seed)
            found.setdefault(name, []).append(arm.figures(seed))
            if not was_there:
                seconds.setdefault(name, []).append(time.monotonic() - started)
                todo.remove(name)
                rest = time_left(seconds, todo) / 60
                print(f"{name}, seed {seed}: {seconds[name][-1]:.0f} s; {len(todo)} to go, about {rest:.0f} min")
    return found


def time_left(seconds: Mapping[str, Sequence[float]], todo: Sequence[str]) -> float:
    """Seconds for what is to be trained: as earlier seeds of the same arm took, or as all took in the mean.

    Args:
        seconds: by arm, of those that were trained; at least one.
        todo: arms, as often as they are to be trained.
    """
    mean = {name: statistics.mean(times) for name, times in seconds.items()}
    usual = statistics.mean(time for times in seconds.values() for time in times)
    return sum(mean.get(name, usual) for name in todo)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--experiment", choices=list(EXPERIMENTS), default="a")
    parser.add_argument("--world", choices=list(WORLDS), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, help="images of cifar10 or fashion, as train_dmd.py reads them")
    parser.add_argument("--folder", type=Path, default=Path("runs/representation"), help="where everything goes")
    parser.add_argument("--steps", type=int, help="of each learner; left out, the world's")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="arms whose names begin so")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: a smoke test")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, distil = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    say_machine()
    folder = options.folder / (f"{options.world}-quick" if options.quick else options.world)
    data = options.data or Path("data") / options.world
    learn = ["--max-train-steps", str(options.steps)] if options.steps else []
    if options.quick:
        distil, learn = [*QUICK["distil"], *distil], [*QUICK["learn"], *learn]
    bench = Bench(options.world, WORLDS[options.world], folder, data, options.quick, tuple(distil), tuple(learn))
    arms = EXPERIMENTS[options.experiment](bench)
    if options.only:
        arms = {name: arm for name, arm in arms.items() if name.startswith(tuple(options.only))}
        if not arms:
            parser.error(f"no arm of experiment {options.experiment} begins with {' or '.join(options.only)}")
    try:
        found = measured(arms, options.seeds)
    except InputError as error:
        parser.error(str(error))
    results = summarised(found)
    shown = [name for name in SHOWN if any(name in row for row in results.values())]
    print(f"{'':36}" + "".join(f"{name:>18}" for name in shown))
    for arm, row in results.items():
        cells = (f"{row[n]['mean']:.4f} ± {row[n]['std']:.4f}" if n in row else "-" for n in shown)
        print(f"{arm:36}" + "".join(f"{cell:>18}" for cell in cells))
    plot = folder / f"experiment-{options.experiment}.svg"
    plot.write_text(chart(options.experiment, options.world, options.seeds, results), encoding="utf-8")
    whole_a = options.experiment == "a" and not options.quick and not options.only
    targets = verdicts(bench, results) if whole_a else []
    for target in targets:
        print(f"{target['what']}: {target['value']:.2f}, {'met' if target['met'] else 'MISSED'}")
    print(f"plot: {plot}")
    whole = {
        "experiment": options.experiment, "world": options.world, "quick": options.quick, "seeds": options.seeds,
        "train_images": len(bench.real.data), "captions": len(bench.real.data.classes),
        "seconds_per_image": {name: bench.seconds_per_image(name) for name in bench.made()},
        "learners": {name: [arm.cost(seed) for seed in options.seeds] for name, arm in arms.items()},
        "arms": results, "targets": targets,
    }  # fmt: skip
    finish("representation", whole, options.json)


if __name__ == "__main__":
    main()
