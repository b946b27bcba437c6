"""`dmd represent` from end to end: images (found, made first, or made as it goes), learner, export, probe. Each stage
resumes by itself."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmd import build, checkpoint, evaluation, generate, log, shards, synthesis, teachers
from dmd.batches import Share
from dmd.build import Workplace
from dmd.data import images, shapes
from dmd.data.images import ImageSet, to_float
from dmd.errors import InputError
from dmd.online import Online
from dmd.represent import augment, backbones, features, heads, learners, probe, run_report, sets, sources, text
from dmd.represent.backbones import Backbone, BackboneConfig
from dmd.represent.batches import CropBatches, Prefetched, ViewBatches, check_source
from dmd.represent.config import WITH_CAPTIONS, WITH_TEXT, Config, crops_of_image
from dmd.represent.learners import Attraction, Classifying, Learner, Pace, Practice, Reading, Slow, Student, Synclr
from dmd.represent.sources import Fresh, Labelled, Listed, Source, Stored
from dmd.represent.text import TextConfig, TextNet
from dmd.run import Cadence, Run, Stopped, clip_and_check
from dmd.shards import Spec
from dmd.teachers import miniature

INPUTS, BACKBONE, TEXT, SUMMARY, ELAPSED = "inputs.json", "backbone", "text", "summary.json", "elapsed.json"
VIEWS = "samples/views.png"
SHOWN = 8  # captions in samples/views.png
WORDS = 4000  # of captions that a tokenizer knows whole; it reads others by letters
NEIGHBOURS = (20, 200)


class Chain:
    """Runs a config in a directory. What the user gives is read here, before anything is written.

    Args:
        config: what to do.
        place: processes and device.
        folder: run directory.

    Raises:
        InputError: images, captions, student or backbone are not what they should be.
    """

    def __init__(self, config: Config, place: Workplace, folder: Path):
        self.config, self.place, self.folder = config, place, folder
        self.seconds: dict[str, float] = {}
        place.share().split(config.data.captions_per_batch, "--captions-per-batch")
        self.backbone = self._fresh(lambda: backbones.build(self._architecture()))
        if config.method == "synclr" and config.teacher.ibot_weight and self.backbone.patch is None:
            raise InputError(
                f"synclr masks patches, which {config.backbone.backbone} has none of: give a vision transformer, or "
                "--ibot-weight 0"
            )
        self.captions = self._captions()
        self.source = None if config.data.data is None and not config.data.online else self._checked(self._source())
        self.tokenizer: Any = text.load_tokenizer(str(config.text.tokenizer)) if self._reads(given=True) else None
        self.judged = None if config.probe.probe is None else self._judged(str(config.probe.probe))

    def run(self) -> None:
        """All that is not done yet. Raises `Stopped` if it was told to stop before the end."""
        watch = log.Stopwatch(self.folder / ELAPSED)
        place, config = self.place, self.config
        environment = build.environment(place)
        place.first(lambda: checkpoint.write_json(self.folder / "environment.json", environment))
        if self.source is None:
            self.seconds["synthesis"] = self._synthesise()
            self.source = place.together(lambda: self._checked(Stored(self._cached(), *self._stored())))
        place.together(self._require_same_inputs)
        if self._reads(given=False):
            place.first(self.write_words)
            self.tokenizer = text.load_tokenizer(str(self.folder / TEXT / text.WORDS))
        task, batches = self.task()
        steps = self.steps
        if place.main and not (self.folder / VIEWS).exists():
            self._show(batches(0).images)
        run = Run(
            self.folder,
            task,
            Prefetched(batches, self._workers(), steps, place.device),
            Cadence(
                steps, config.run.log_every, config.run.checkpointing_steps, keep=config.run.checkpoints_total_limit
            ),
            place.accelerator,
            title=config.method,
            sinks=lambda step: [*build.sinks(cast(Any, config), self.folder)(step), watch],
        )
        progress = run.train()
        self.seconds["training"] = progress.seconds
        if progress.step < steps:
            raise Stopped(f"stopped after step {progress.step} of {steps}; the same command goes on")
        learnt = task.teacher.backbone if isinstance(task, Synclr) else task.backbone
        if place.main:
            self._export(task, learnt)
            self._conclude(learnt, watch)
        place.accelerator.wait_for_everyone()

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        m = self.config.learn
        assert self.source is not None  # by `run`
        whole = m.epochs * self.source.count / self.config.data.captions_per_batch
        return math.ceil(whole) if m.epochs else m.max_train_steps

    def _workers(self) -> int:
        """Processes that make batches ahead: none beside a student on a GPU, which begins them on a stream."""
        return 0 if self.config.data.online and self.place.device.type == "cuda" else self.config.data.workers

    # ------------------------------------------------------------------------- images

    def _captions(self) -> list[str]:
        """What a student is asked for, or what a data set should be of; empty where nobody asks."""
        d = self.config.data
        if d.captions is not None:
            from dmd.data import prompts

            found = list(dict.fromkeys(prompts.read(d.captions).texts))
            if d.data is not None:
                sources.require_captions(d.data, build.text_digest(found), d.captions)
        elif d.data is not None:
            return []
        else:
            found = shape_captions(self.config.run.seed, d.caption_count)
        if len(found) < 2:
            raise InputError(
                f"there is one caption only, {found[0][:60]!r}: contrast needs at least two different ones"
            )
        return found

    def _source(self) -> Source:
        """Images that are there, or that are made as they are looked at."""
        d, seed = self.config.data, self.config.run.seed
        if d.data is None:
            return self._online()
        if d.data == "digits":  # without those that `dmd probe` judges by
            return Labelled(self._coloured(sets.drawn_part(images.digits(), "train")), d.per_caption, seed)
        path = Path(d.data)
        if path.suffix.lower() == ".tar" or (path.is_dir() and (any(path.glob("*.tar")) or _lists(path))):
            return Stored(path, *self._stored())
        channels = self.config.backbone.channels
        if path.is_dir() and not images.is_packed(path):
            return Labelled(Listed.folder(path, channels, self.config.method == "simclr"), d.per_caption, seed)
        return Labelled(images.load(path, "train", channels=channels), d.per_caption, seed)

    def _checked(self, source: Source) -> Source:
        check_source(source, self.config.data.captions_per_batch, self.config.method in WITH_CAPTIONS)
        return source

    def _coloured(self, found: ImageSet) -> ImageSet:
        if self.config.backbone.channels == found.shape[0]:
            return found
        return ImageSet(found.images.expand(-1, 3, -1, -1), found.labels, found.classes)

    def _stored(self) -> tuple[int, int, int, int, bool]:
        """What `Stored` takes besides the path."""
        d = self.config.data
        classes = self.config.method == "supervised"
        return d.per_caption, self.config.run.seed, self.config.backbone.channels, d.max_broken, classes

    def _online(self) -> Source:
        d, share = self.config.data, self.place.share()
        pipeline = teachers.load(d.student, self.place.device, self.place.autocast)
        pipeline.encode(self.captions if pipeline.classes else self.captions[:1])  # refuses unknown classes
        facts = {"student": pipeline.digest(), "captions": build.text_digest(self.captions)}
        made = self._made_by(pipeline)
        online = Online(
            lambda: made, self.captions, d.captions_per_batch // share.world, d.per_caption, self.config.run.seed,
            share.rank, share.world, work_unit=d.synthesis_batch_size,
        )  # fmt: skip
        return Fresh(online, build.short_hash(facts))

    def _made_by(self, pipeline: Any) -> generate.Source:
        by = generate.student_generator(pipeline.denoiser)
        return generate.caption_source(pipeline, by, pipeline.codec, self.config.run.seed, self.place.device)

    def _synthesise(self) -> float:
        """Have the student make what is missing of the data set in the cache; seconds that it took."""
        started = time.monotonic()
        d, run, place = self.config.data, self.config.run, self.place
        pipeline = place.together(lambda: teachers.load(d.student, place.device, place.autocast))
        place.together(lambda: pipeline.encode(self.captions if pipeline.classes else self.captions[:1]))
        made = {"kind": "one step", "network": pipeline.digest(), "precision": run.mixed_precision}
        per_shard = max(1, 2048 // d.replicas) * d.replicas
        self._spec = spec = Spec(
            build.text_digest(self.captions), len(self.captions), d.replicas, run.seed, made, None, "png", 95,
            per_shard, min(d.synthesis_batch_size, per_shard),
        )  # fmt: skip
        job = synthesis.Job(self._cached(), spec, self.captions, self._made_by(pipeline))
        accelerator = place.accelerator
        with log.progress(spec.images, 0, "synthesis", place.main, "img") as bar:
            place.together(
                lambda: synthesis.work(job, accelerator.process_index, accelerator.num_processes, bar.update)
            )
        accelerator.wait_for_everyone()
        place.first(lambda: synthesis.work(job))  # completes the manifest, if another process held the last shard
        return time.monotonic() - started

    def _cached(self) -> Path:
        """The data set that the student makes, named by what determines it."""
        return Path(self.config.run.cache_dir) / "synthetic" / self._spec.digest()[:16]

    def _require_same_inputs(self) -> None:
        """Raises InputError if the run directory was made with other images; else notes these."""
        assert self.source is not None  # by `run`
        path = self.folder / INPUTS
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        if known.get("data", self.source.digest) != self.source.digest:
            raise InputError(
                f"{self.folder} holds a run with other images: give the same --data, --student and --captions, another "
                "--output-dir, or start over with --fresh"
            )
        self.place.first(lambda: checkpoint.write_json(path, {"data": self.source.digest if self.source else None}))

    # ------------------------------------------------------------------------- texts

    def _reads(self, given: bool) -> bool:
        """Whether captions are read, by a tokenizer that the user gave or by one that is made here."""
        return self.config.method in WITH_TEXT and (self.config.text.tokenizer is not None) == given

    def write_words(self) -> None:
        """Make a tokenizer of the captions' words in the run directory, if it is not there."""
        folder = self.folder / TEXT / text.WORDS
        if (folder / "vocab.json").exists():
            return
        source = self.source
        if isinstance(source, Labelled):
            captions: Sequence[str] = source.data.classes
        else:
            captions = self.captions or sources.all_captions(str(self.config.data.data))
        words = miniature.common_words(captions, WORDS)
        miniature.write_tokenizer(words, self.config.text.text_tokens, folder)

    def _text_net(self) -> TextNet:
        o = self.config.text
        sizes = TextConfig(
            self.backbone.features, o.text_width, o.text_layers, o.text_heads, o.text_tokens, len(self.tokenizer),
            self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, o.embedding,
        )  # fmt: skip
        return self._fresh(lambda: TextNet(sizes))

    # ------------------------------------------------------------------------- learner

    def _architecture(self) -> BackboneConfig:
        o = self.config.backbone
        return backbones.describe(
            o.backbone, o.image_size, o.channels, o.patch_size, o.drop_path, o.small_stem, self.config.method
        )

    def _fresh(self, make: Callable[[], nn.Module]) -> Any:
        """A network whose first weights are a function of the seed; convolutions in the layout that CPUs prefer."""
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.config.run.seed % 2**32)
            net = make()
        net = net.to(self.place.device).to(memory_format=torch.channels_last)
        return heads.synchronised(net, self.place.device)

    def _practice(self) -> Practice:
        m, run, steps = self.config.learn, self.config.run, self.steps
        last = m.weight_decay if m.weight_decay_end is None else m.weight_decay_end
        pace = Pace(steps, round(m.warmup * steps), (m.weight_decay, last))
        rank = self.place.accelerator.process_index
        return Practice(pace, clip_and_check, m.max_grad_norm, m.chunk, run.seed, rank, self.place.autocast)

    def task(self) -> tuple[Any, Any]:
        """The learner, and what it sees."""
        if self.config.method == "synclr":
            return self._synclr(), self._crops()
        return self._learner(), self._views()

    def _learner(self) -> Learner:
        config, m, width = self.config, self.config.learn, self.backbone.features
        terms: dict[str, nn.Module] = {}
        if config.method in ("stablerep", "stablerep-plus", "simclr"):
            head = self._fresh(lambda: heads.mlp(width, m.head_hidden, m.head_width, 3, heads.batch_relu))
            terms["images"] = Attraction(head, m.temperature)
        if config.method in WITH_TEXT:
            terms["text"] = Reading(self._text_net())
        if config.method == "supervised":
            assert self.source is not None  # by `run`
            classes = self.source.captions
            terms["classes"] = self._fresh(lambda: Classifying(width, classes, m.label_smoothing))
        both = config.method == "stablerep-plus"
        weights = {"images": m.image_weight, "text": m.text_weight} if both else dict.fromkeys(terms, 1.0)
        trained = [self.backbone, *terms.values()]
        made = learners.optimizer(trained, m.learning_rate, m.adam_beta2, m.weight_decay)
        return Learner(self.backbone, terms, weights, made, self._practice())

    def _views(self) -> ViewBatches:
        d, m, o = self.config.data, self.config.learn, self.config.text
        assert self.source is not None  # by `run`
        return ViewBatches(
            self.config.run.seed, self.source, d.captions_per_batch, d.per_caption, m.crops,
            augment.standard(self.config.augment, self.config.backbone.image_size), self._share(),
            self.config.method == "simclr", self.tokenizer, o.text_tokens,
        )  # fmt: skip

    def _synclr(self) -> Synclr:
        m, t, width = self.config.learn, self.config.teacher, self.backbone.features
        between, last = heads.layer_gelu, heads.standardise
        if t.batch_norm:
            between, last = heads.batch_relu, heads.batch_standardise

        def projection(inputs: int, layers: int) -> nn.Module:
            return heads.mlp(inputs, m.head_hidden, m.head_width, layers, between, last(m.head_width))

        ibot = self._fresh(lambda: heads.ibot_head(width, t.ibot_hidden, t.ibot_bottleneck, t.prototypes))
        student = Student(self.backbone, self._fresh(lambda: projection(width, 3)), ibot).to(self.place.device)
        predictor = self._fresh(lambda: projection(m.head_width, 2))
        made = learners.optimizer([student, predictor], m.learning_rate, m.adam_beta2, m.weight_decay)
        slow = Slow(
            t.momentum, m.temperature, t.hide_own, t.ibot_weight,
            (t.teacher_temperature_first, t.teacher_temperature, t.teacher_temperature_steps), t.sinkhorn_iterations,
        )  # fmt: skip
        return Synclr(student, predictor, made, slow, self._practice())

    def _crops(self) -> CropBatches:
        d, a, t, size = self.config.data, self.config.augment, self.config.teacher, self.config.backbone.image_size
        assert self.source is not None  # by `run`
        grid = self.backbone.grid(size, size) if t.ibot_weight else None
        return CropBatches(
            self.config.run.seed, self.source, d.captions_per_batch, d.per_caption, augment.whole(a, size),
            augment.local(a), a.local_crops, self._share(), grid, t.mask_images, t.mask_patches,
        )  # fmt: skip

    def _share(self) -> Share:
        """This process's part of a batch, which is made on the CPU, or where a student makes images."""
        a = self.place.accelerator
        return Share(a.process_index, a.num_processes)

    # ------------------------------------------------------------------------- the end

    def _show(self, views: Tensor) -> None:
        """`VIEWS`: what the first step sees of some captions, a row each."""
        count = self.config.data.captions_per_batch // self.place.accelerator.num_processes
        if self.config.method == "synclr":
            rows = views.reshape(count, -1, *views.shape[1:])[:SHOWN]
        else:
            rows = views.reshape(-1, count, *views.shape[1:]).transpose(0, 1)[:SHOWN]
        scale = max(1, 64 // self.config.backbone.image_size)
        evaluation.save_grid([to_float(r) for r in rows], self.folder / VIEWS, scale)

    def _export(self, task: Any, learnt: Backbone) -> None:
        backbones.save(learnt, self.folder / BACKBONE)
        if self.config.method in WITH_TEXT:
            text.save(task.terms["text"].net, self.tokenizer, self.folder / TEXT)
        print(f"backbone: {self.folder / BACKBONE}")
        if self.config.backbone.small_stem:
            print("note: timm knows no small stems, so this one is for dmd.represent.backbones.load_backbone")

    def _judged(self, name: str) -> tuple[sets.LabelledSet, sets.LabelledSet]:
        """The real images that the backbone is probed on."""
        train, test = (sets.check(sets.read(name, part)) for part in ("train", "test"))
        sets.require_apart({"the training part of --probe": train, "the test part of --probe": test})
        sets.aligned(test, train, "test")
        for part in (train, test) if self.config.backbone.channels == 1 else ():
            features.require_grey(part.source)
        return train, test

    def _conclude(self, learnt: Backbone, watch: log.Stopwatch) -> None:
        """Probe the backbone, and write summary.json."""
        d, views = self.config.data, crops_of_image(self.config)
        assert self.source is not None  # by `run`
        seen = self.steps * d.captions_per_batch * d.per_caption
        summary: dict[str, Any] = {
            "preset": self.config.preset, "method": self.config.method, "updates": self.steps, "images_seen": seen,
            "views_seen": seen * views, "captions": self.source.captions,
            "backbone": self.config.backbone.backbone, "features": learnt.features,
            "parameters": sum(p.numel() for p in learnt.parameters()), "seconds": self.seconds,
            "views_per_second": seen * views / max(self.seconds["training"], 1e-9),
            "final": _last_figures(self.folder / "metrics.jsonl"),
        }  # fmt: skip
        if self.judged is not None:
            started = time.monotonic()
            found = probed(learnt, *self.judged, self._texts(), self.config, self.place.device)
            self.seconds["probe"] = time.monotonic() - started
            summary["probe"] = {"set": self.config.probe.probe, "figures": found}
            for name, figure in found.items():
                print(f"{name:10} {figure['value']:.4g}")
        summary["wall_seconds"] = watch.seconds
        watch.keep()
        checkpoint.write_json(self.folder / SUMMARY, summary)
        print(f"report: {run_report.write(self.folder)}")

    def _texts(self) -> text.Text | None:
        if self.config.method not in WITH_TEXT:
            return None
        return text.load_text(self.folder / TEXT, self.place.device)


def probed(
    backbone: Backbone, train: sets.LabelledSet, test: sets.LabelledSet, words: text.Text | None, config: Config,
    device: torch.device,
) -> dict[str, dict[str, float | None]]:  # fmt: skip
    """kNN, linear probe, geometry and, with a text tower, zero-shot accuracy: value and 95 % interval of each.

    `dmd probe` has more, with pictures; these are its figures, by its own protocol.
    """
    net = features.of_backbone(backbone.eval(), "backbone")
    cache = Path(config.run.cache_dir) / "features"
    parts = []
    for part, labels in ((train, train.labels), (test, sets.aligned(test, train, "test"))):
        x = features.features(part.source, net, cache, device, 256, True)
        parts.append(probe.Seen(x.to(device), labels.to(device)))
    protocol = probe.Protocol(neighbours=NEIGHBOURS, seed=config.run.seed % 2**55)
    split = probe.parts(parts[0], None, parts[1], len(train.classes), protocol)
    found = probe.Found()
    for name in ("knn", "linear", "geometry"):
        found.add(probe.PROBES[name](split, protocol))
    if words is not None:
        found.add(probe.zero(split, protocol, train.classes, words.project, words))
    return {name: {"value": f.value, "low": f.low, "high": f.high} for name, f in found.figures.items()}


def shape_captions(seed: int, count: int) -> list[str]:
    """Different captions of the world of shapes. Raises InputError if there are not as many."""
    if count > sum(shapes.caption_counts()) // 2:
        raise InputError(
            f"--caption-count is {count}: there are {sum(shapes.caption_counts())} captions of shapes, ask for at most "
            "half of them"
        )
    found: dict[str, None] = {}
    start = 0
    while len(found) < count:
        found |= dict.fromkeys(shapes.caption(s) for s in shapes.scenes(seed, torch.arange(start, start + count)))
        start += count
    return list(found)[:count]


def _lists(path: Path) -> bool:
    """Whether a folder is of captioned images, by the files that say so."""
    return (path / "metadata.jsonl").is_file() or (path / shards.MANIFEST).is_file()


def _last_figures(path: Path) -> dict[str, float]:
    rows = [row for row in log.read_jsonl(path) if "excess" in row or "loss/classes" in row or "loss/text" in row]
    return {k: v for k, v in rows[-1].items() if k != "seconds"} if rows else {}
