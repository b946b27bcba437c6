"""CLIP-GEN from end to end: CLIP, tokenizer, tokens, transformer, evaluation, report. Each stage resumes by itself.

What several runs can share (a small CLIP, a tokenizer, tokens) is kept in the cache, named by what determines it.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dmd import build, checkpoint, evaluation, log, shipped
from dmd.build import Workplace
from dmd.clipgen import clip as clips
from dmd.clipgen import config as options
from dmd.clipgen import evaluation as judging
from dmd.clipgen import images, model, report, tokenizer, transformer, world
from dmd.clipgen.batches import CaptionBatches, ImageBatches, TokenBatches
from dmd.clipgen.clip import Clip, Contrasting, SmallClip, SmallClipConfig, SmallClipNet
from dmd.clipgen.config import Config, SamplingOptions
from dmd.clipgen.evaluation import Asked, Features
from dmd.clipgen.gap import Gap
from dmd.clipgen.model import Model
from dmd.clipgen.networks import ConvSizes, PatchDiscriminator
from dmd.clipgen.sampling import Sampler
from dmd.clipgen.tokenizer import Adversary, Distance, Tokenizer, TokenizerConfig, Tokenizing
from dmd.clipgen.transformer import ConditionalTransformer, Modelling, Reembed, TransformerConfig
from dmd.data import captioned, shapes
from dmd.data.captioned import Captioned
from dmd.data.images import to_float
from dmd.ema import Ema
from dmd.errors import InputError
from dmd.metrics import assess, backbones
from dmd.metrics.backbones import Extractor
from dmd.run import Cadence, Progress, Run, Stopped, Task, clip_and_check
from dmd.teachers.stable_diffusion import TextEncoder

INPUTS, MODEL, SUMMARY, ELAPSED = "inputs.json", "model", "summary.json", "elapsed.json"
BETAS = (0.9, 0.95)  # of AdamW
FEW_CODES = 0.5
"""A tokenizer that uses a smaller part of its codes gets a warning."""
SMALLEST = 64  # pixels of images that LPIPS sees: its trunks have nothing left of smaller ones than 32
WORDS = 4000  # of captions that a small CLIP knows whole; it reads others by letters


class Chain:
    """Runs a config in a directory. All that the user gives is read here, before anything is written.

    Args:
        config: what to do.
        place: processes and device.
        folder: run directory.

    Raises:
        InputError: images or given networks are not what they should be.
    """

    def __init__(self, config: Config, place: Workplace, folder: Path):
        self.config = config
        self.place = place
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self.sinks: Sequence[log.Sink] = ()  # of all stages, beside their own
        place.share().split(config.tokenizer.tokenizer_batch_size, "--tokenizer-batch-size")
        place.share().split(config.clip.clip_batch_size, "--clip-batch-size")
        place.share().split(config.transformer.batch_size, "--batch-size")
        self.images = self._images()
        self.inputs = {"data": images.digest(self.images)}

    @classmethod
    def whole(cls, config: Config, place: Workplace, folder: Path) -> "Chain":
        """A chain for `run`: what CLIP and the evaluation will need is checked now too."""
        options.require_clip(config)
        _check_files(config)
        chain = cls(config, place, folder)
        place.together(lambda: check_features(config, place.device))
        return chain

    def run(self) -> None:
        """All stages that are not done yet. Raises `Stopped` if one was told to stop."""
        watch = log.Stopwatch(self.folder / ELAPSED)
        self.sinks = [watch]
        environment = build.environment(self.place)
        self.place.first(lambda: checkpoint.write_json(self.folder / "environment.json", environment))
        clip, clip_source = self.clip()
        self._check_mean(clip)
        found = self.tokenizer()
        self.place.first(lambda: self._keep_figures(clip_source))
        tokens, embeddings = self.tokens(found, clip)
        use = torch.bincount(tokens.flatten().long(), minlength=found.config.codes).count_nonzero().item()
        self.inputs |= {"tokenizer": checkpoint.digest(found), "clip": clip.digest()}
        self.place.together(self._require_same_inputs)
        trained = self._transformer(found, clip, tokens, embeddings)
        o = self.config.transformer
        figures = {"codebook_use": use / found.config.codes, "images": len(tokens), "updates": o.max_train_steps}
        figures["images_seen"] = o.max_train_steps * o.batch_size
        if self.place.main:
            trained = with_texts(self.config, trained)
            model.save(trained, self.folder / MODEL, clip_source, cast(dict[str, object], figures))
            print(f"model: {self.folder / MODEL}")
            summary = figures | {"seconds": self.seconds, "wall_seconds": watch.seconds}
            conclude(self.config, trained, self.folder, summary)
            watch.keep()
        self.place.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------- data

    def _check_mean(self, clip: Clip) -> None:
        """Raises InputError if the evaluation would lack the mean of texts, before anything is trained for it."""
        missing = clip.text_mean is None and self.config.evaluation.centre_prompts is None
        if missing and "centre" in self.config.transformer.gap and has_tests(self.config):
            raise InputError(
                f"--gap {self.config.transformer.gap} needs the mean embedding of texts, which the CLIP "
                f"{self.config.clip.clip} does not bring along: give --centre-prompts, a file with some hundred "
                f"captions, or --gap noise"
            )

    def _images(self) -> Tensor:
        d = self.config.data
        if d.data == "shapes":
            return world.drawings(self.config.run.seed, 0, d.images, "train")[0]
        return images.read(d.data, d.size)

    def _captioned(self) -> Captioned:
        """What a small CLIP learns from: the only place where training reads captions."""
        options.require_clip(self.config)
        d = self.config.data
        if d.captioned is not None:
            return captioned.load(d.captioned, d.size)
        return world.captioned(self.config.run.seed, self.config.clip.clip_images)

    def _require_same_inputs(self) -> None:
        """Raises InputError if the run directory was made with other images or networks; else notes these."""
        path = self.folder / INPUTS
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        for name, digest in self.inputs.items():
            if known.get(name, digest) != digest:
                raise InputError(
                    f"{self.folder} holds a run with another --{name}: give that one, another --output-dir, or start "
                    f"over with --fresh"
                )
        self.place.first(lambda: checkpoint.write_json(path, self.inputs))

    def _keep_figures(self, clip: str) -> None:
        """Copy what tokenizer and small CLIP said while they were taught in the cache; others' networks say nothing."""
        own = self.config.tokenizer.tokenizer or self._cached("tokenizer", self._tokenizer_facts())
        for name, source in (("tokenizer", Path(own)), ("clip", Path(clip))):
            if (source / "metrics.jsonl").is_file():
                (self.folder / report.STAGES / name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / "metrics.jsonl", self.folder / report.STAGES / name / "metrics.jsonl")

    def _cached(self, kind: str, facts: dict[str, Any]) -> Path:
        return Path(self.config.run.cache_dir) / "clipgen" / kind / build.short_hash(facts)

    # ------------------------------------------------------------------------- stages

    def clip(self) -> tuple[Clip, str]:
        """A given CLIP, or a small one, taught if it is not there yet; and where it is."""
        o = self.config.clip
        if o.clip is not None:
            return self.place.together(lambda: clips.load(str(o.clip), self.place.device)), o.clip
        folder = self.teach_clip()
        return clips.load(folder, self.place.device), str(folder)

    def teach_clip(self) -> Path:
        """The folder of a small CLIP, taught if it is not there yet."""
        o = self.config.clip
        data = self.place.together(self._captioned)
        facts = asdict(o) | {"seed": self.config.run.seed, "size": self.config.data.size}
        facts |= {"data": images.digest(data.images), "captions": build.text_digest(data.captions)}
        start = None if o.clip_text is None else clips.text_start(o.clip_text)
        if start is not None:
            facts["clip_text"] = checkpoint.digest(start.network)
        folder = self._cached("clip", facts)
        if not (folder / clips.WEIGHTS).exists():
            self._teach_clip(data, folder, start)
        return folder

    def _teach_clip(self, data: Captioned, folder: Path, start: TextEncoder | None) -> None:
        from dmd.teachers import miniature, stable_diffusion

        o, place = self.config.clip, self.place
        drawn = self.config.data.captioned is None
        sizes = ConvSizes(o.clip_patch, o.clip_widths, o.clip_blocks)
        if start is None:
            words = shapes.words() if drawn else miniature.common_words(data.captions, WORDS)
            place.first(lambda: miniature.write_tokenizer(words, o.clip_tokens, folder / clips.WORDS))
            count = len(json.loads((folder / clips.WORDS / "vocab.json").read_text(encoding="utf-8")))
            text = (o.clip_text_width, o.clip_text_layers, o.clip_tokens, count)
            net = self._fresh(lambda: SmallClipNet(SmallClipConfig(self.config.data.size, sizes, *text, o.clip_width)))
        else:
            place.first(lambda: start.tokenizer.save_pretrained(folder / clips.WORDS))
            size, locked = self.config.data.size, o.clip_lock_text
            net = self._fresh(lambda: clips.beginning_with(start, size, sizes, o.clip_width, locked))
        small = SmallClip(net, stable_diffusion.tokenizer(folder / clips.WORDS))
        tokens = torch.cat([small.tokens(data.captions[i : i + 500]).cpu() for i in range(0, len(data), 500)])
        numbers = {text: i for i, text in enumerate(dict.fromkeys(data.captions))}
        caption = torch.tensor([numbers[text] for text in data.captions])
        seed, share = self.config.run.seed, place.share()
        batches = CaptionBatches(seed, data.images, tokens, caption, 2 if drawn else 1, o.clip_batch_size, share)
        ema = Ema(net, 0.99)
        task = Contrasting(net, build.adam(net, o.clip_lr, BETAS, o.clip_weight_decay), ema, 1.0, clip_and_check)
        cadence = _short(o.clip_steps)
        self._train(folder, task, batches, cadence, "clip")
        taught: Any = ema.shadow

        def finish() -> None:
            small = SmallClip(taught, stable_diffusion.tokenizer(folder / clips.WORDS))
            taught.text_mean.copy_(model.embed_texts(small, data.captions).mean(0))
            clips.save(taught, folder)

        place.first(finish)

    def tokenizer(self) -> Tokenizer:
        """A given tokenizer, or one taught on the images if it is not there yet."""
        place, o = self.place, self.config.tokenizer
        if o.tokenizer is not None:
            return place.together(lambda: tokenizer.load(str(o.tokenizer), place.device))
        return tokenizer.load(self.teach_tokenizer(), place.device)

    def teach_tokenizer(self) -> Path:
        """The folder of a tokenizer, taught on the images if it is not there yet."""
        folder = self._cached("tokenizer", self._tokenizer_facts())
        if not (folder / tokenizer.WEIGHTS).exists():
            self._teach_tokenizer(folder)
        return folder

    def _tokenizer_facts(self) -> dict[str, Any]:
        run, o = self.config.run, self.config.tokenizer
        facts = asdict(o) | {"seed": run.seed, "precision": run.mixed_precision, "size": self.config.data.size}
        return facts | {"data": self.inputs["data"], "lpips_weights": build.file_digest(o.lpips_weights)}

    def _teach_tokenizer(self, folder: Path) -> None:
        o, place = self.config.tokenizer, self.place
        distance = self._distance()
        net = self._fresh(lambda: Tokenizer(tokenizer_config(self.config)))
        adversary = self._adversary()
        task = Tokenizing(
            net, build.adam(net, o.tokenizer_lr, BETAS, 0.0), distance, o.perceptual_weight, adversary, 1.0,
            clip_and_check, self.config.run.seed, place.autocast,
        )  # fmt: skip
        batches = ImageBatches(self.config.run.seed, self.images, o.tokenizer_batch_size, place.share())
        self._train(folder, task, batches, _short(o.tokenizer_steps), "tokenizer")
        place.first(lambda: tokenizer.save(net, folder))

    def _distance(self) -> Distance:
        o = self.config.tokenizer
        if o.perceptual == "l2":
            return lambda a, b: (a - b).square().flatten(1).mean(1)
        from dmd.metrics.perceptual import lpips_distance

        weights = Path(o.lpips_weights) if o.lpips_weights else None
        backbone: Any = o.perceptual.removeprefix("lpips-")
        return lpips_distance(backbone, weights, max(self.config.data.size, SMALLEST), self.place.device)

    def _adversary(self) -> Adversary | None:
        o = self.config.tokenizer
        if o.adversarial == 0.0:
            return None
        net = self._fresh(lambda: PatchDiscriminator(o.discriminator_width, o.discriminator_layers))
        return Adversary(net, build.adam(net, o.tokenizer_lr, BETAS, 0.0), o.adversarial, o.adversarial_from)

    @torch.no_grad()
    def tokens(self, found: Tokenizer, clip: Clip) -> tuple[Tensor, Tensor]:
        """Tokens (N, length) and embeddings (N, D) of all images, made once.

        Raises:
            InputError: the tokenizer is for images of another size.
        """
        size = self.config.data.size
        if found.config.size != size:
            raise InputError(
                f"the tokenizer is for images of {found.config.size} pixels, but --size is {size}: give that size, or "
                f"another tokenizer"
            )
        facts = {"data": self.inputs["data"], "tokenizer": checkpoint.digest(found), "clip": clip.digest()}
        path = self._cached("tokens", facts).with_suffix(".safetensors")

        def make() -> None:
            tokens, embeddings = [], []
            with log.progress(len(self.images), 0, "tokens", True, "img") as bar:
                for x in self.images.split(100):
                    pixels = to_float(x.to(self.place.device))
                    tokens.append(found.encode(pixels).to(torch.int32).cpu())
                    embeddings.append(clip.images(pixels).cpu())
                    bar.update(len(x))
            checkpoint.save_tensors({"tokens": torch.cat(tokens), "embeddings": torch.cat(embeddings)}, path)

        fresh = not path.exists()
        self.place.accelerator.wait_for_everyone()
        if fresh:
            self.place.first(make)
        held = load_file(path)
        used = held["tokens"].unique().numel() / found.config.codes
        if used < FEW_CODES and self.place.main:
            warnings.warn(
                f"the images use only {used:.0%} of the tokenizer's {found.config.codes:,} codes: teach one with fewer "
                f"--codes, a larger --tokenizer-batch-size, or a higher --dead-below",
                stacklevel=2,
            )
        return held["tokens"], held["embeddings"]

    def _transformer(self, found: Tokenizer, clip: Clip, tokens: Tensor, embeddings: Tensor) -> Model:
        o, run, place = self.config.transformer, self.config.run, self.place
        gap = make_gap(self.config, embeddings, clip)
        t = found.config
        sizes = TransformerConfig(
            t.codes, t.code_width, t.length, clip.width, o.layers, o.width, o.heads, o.dropout, o.prefix
        )
        net = self._fresh(lambda: ConditionalTransformer(sizes, found.codebook.cpu()))
        ema = Ema(net, o.ema)
        task = Modelling(
            net, transformer.optimizers(net, o.learning_rate, o.weight_decay, o.muon), ema, o.embedding_weight,
            reembedding(found, clip), o.max_grad_norm, clip_and_check, run.seed, place.accelerator.process_index,
            place.autocast,
        )  # fmt: skip
        batches = TokenBatches(run.seed, tokens, embeddings, gap, o.batch_size, place.share(), o.condition_dropout)
        cadence = Cadence(
            o.max_train_steps, run.log_every, run.checkpointing_steps, 0, run.checkpoints_total_limit,
            o.lr_warmup_steps, o.lr_cooldown_steps,
        )  # fmt: skip
        sinks = build.sinks(cast(Any, self.config), self.folder)
        self._train(self.folder, task, batches, cadence, "transformer", sinks)
        average: Any = ema.shadow
        return Model(average, found, clip, gap.to(place.device))

    # ------------------------------------------------------------------------- training

    def _fresh(self, make: Callable[[], nn.Module]) -> Any:
        """A network whose first weights are a function of the seed; convolutions in the layout that CPUs prefer."""
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.config.run.seed % 2**32)
            net = make()
        return net.to(self.place.device).to(memory_format=torch.channels_last)

    def _train(
        self, folder: Path, task: Task, batches: Callable[[int], Any], cadence: Cadence, title: str,
        sinks: Callable[[int], Sequence[log.Sink]] | None = None,
    ) -> Progress:  # fmt: skip
        """Run a stage to its end. Raises `Stopped` if it was told to stop before."""
        plain = lambda step: [log.JsonLines(folder / "metrics.jsonl", step)]  # noqa: E731
        every = lambda step: [*(sinks or plain)(step), *self.sinks]  # noqa: E731
        run = Run(folder, task, batches, cadence, self.place.accelerator, title=title, sinks=every)
        progress = run.train()
        self.seconds[title] = progress.seconds
        if progress.step < cadence.steps:
            raise Stopped(f"stopped after step {progress.step} of the {title}; the same command goes on")
        return progress


def _check_files(config: Config) -> None:
    """Whether what is read at the end is there at the beginning; its content is not looked at."""
    d, prompts = config.data, config.evaluation.centre_prompts
    for flag, folder in (("--test", d.test), ("--captioned", d.captioned)):
        if folder is not None and not captioned.is_captioned(folder):
            raise InputError(f"{flag} {folder} has neither metadata.jsonl nor shards: give captioned images")
    if prompts is not None and not Path(prompts).exists():
        raise InputError(f"--centre-prompts {prompts} does not exist: give a file of captions")


def tokenizer_config(config: Config) -> TokenizerConfig:
    """What a config's tokenizer is made of."""
    o = config.tokenizer
    sizes = ConvSizes(o.patch, o.widths, o.blocks, o.groups, o.attention, o.square_blocks)
    alike = o.tokenizer_batch_size * options.grid(config) ** 2 / o.codes
    return TokenizerConfig(
        config.data.size, sizes, o.codes, o.code_width, o.commitment, o.code_decay, o.dead_below * alike
    )


def make_gap(config: Config, embeddings: Tensor, clip: Clip) -> Gap:
    """What is done about the modality gap, from the embeddings (N, D) of the images that are learnt from."""
    o = config.transformer
    noise = o.gap_noise if "noise" in o.gap else 0.0
    if "centre" in o.gap:
        text = None if clip.text_mean is None else clip.text_mean.cpu()
        return Gap(embeddings.float().mean(0), text, noise)
    zero = torch.zeros(embeddings.shape[1])
    return Gap(zero, zero.clone(), noise)  # in a file no two tensors may share their memory


def reembedding(found: Tokenizer, clip: Clip) -> Reembed:
    """Mixtures of codes to CLIP's embedding of the image that they stand for."""
    return lambda mixture: clip.images(found.draw(mixture.float() @ found.codebook).clamp(-1.0, 1.0))


def _short(steps: int) -> Cadence:
    """The cadence of a stage that is cached when it is done."""
    log_every = min(50, max(steps // 20, 1))
    return Cadence(steps, log_every, max(steps // 10, 1), keep=1, warmup=min(100, steps // 10), cooldown=steps // 2)


# ----------------------------------------------------------------------------- the end


def has_tests(config: Config) -> bool:
    """Whether there are captioned images to judge a model by."""
    return config.data.test is not None or config.data.data == "shapes"


def tests(config: Config) -> list[Asked]:
    """What a model is asked for at the end; none if no captioned images are given."""
    d, count = config.data, config.evaluation.final_samples
    if d.test is not None:
        found = captioned.load(d.test, d.size)
        kept = torch.arange(min(count, len(found))) * len(found) // min(count, len(found))
        return [Asked("test", [found.captions[i] for i in kept.tolist()], found.images[kept])]
    made: list[Asked] = []
    if not has_tests(config):
        return made
    for name, split in (("seen", "train"), ("held_out", "test")):
        drawn, scenes = world.drawings(config.run.seed, world.UNSEEN, count, cast(Any, split))
        made.append(Asked(name, [shapes.caption(s) for s in scenes], drawn, scenes))
    return made


def make_sampler(o: SamplingOptions) -> Sampler:
    """How tokens are chosen, of a command's options."""
    return Sampler(o.temperature, o.top_k, o.top_p, o.guidance)


def features(config: Config, trained: Model) -> tuple[str, Features]:
    """What FD-k is on, and its name. Raises InputError if the network or its weights cannot be had."""
    if config.evaluation.features is None:
        return f"FD-{trained.clip.name}", judging.of_clip(trained)
    extractor = _extractor(config, config.evaluation.features)
    return extractor.label, judging.of_network(extractor, trained.device)


def check_features(config: Config, device: torch.device) -> None:
    """Raises InputError if the network that FD-k is to be on cannot be had, or takes no images of this size."""
    if config.evaluation.features is not None and has_tests(config):
        size = config.data.size
        judging.of_network(_extractor(config, config.evaluation.features), device)(torch.zeros(1, 3, size, size))


def _extractor(config: Config, network: str) -> Extractor:
    e = config.evaluation
    weights = None if e.features_weights is None else Path(e.features_weights)
    return backbones.load(str(shipped.resolve(network)), weights, e.features_download, Path(config.run.cache_dir))


def conclude(config: Config, trained: Model, folder: Path, facts: dict[str, Any]) -> None:
    """Judge a model, and write summary.json, samples/final.png and report.html.

    `facts` go into the summary, which also keeps what an earlier one has of them.
    """
    asked = tests(config)
    summary: dict[str, Any] = {"preset": config.preset} | _summary(folder) | facts
    if asked:
        o, (label, seen) = config.sampling, features(config, trained)
        total = 2 * o.candidates * sum(len(a.images) for a in asked)
        with log.progress(total, 0, "evaluation", True, "img") as bar:
            judged = judging.judge(
                trained, asked, make_sampler(o), o.candidates, o.sample_batch_size, config.evaluation.blur, seen,
                tick=bar.update,
            )  # fmt: skip
        rows = [x for key, x in judged.pictures.items()]
        scale = max(1, 64 // config.data.size)
        evaluation.save_grid(rows, folder / "samples" / "final.png", scale, list(judged.pictures))
        summary |= judging.headline(judged.figures)
        few = [note for a in asked for note in assess.too_few(a.name, len(a.images), judged.dimensions, label)]
        summary |= {
            "metric": label, "figures": judged.figures, "gap_handling": config.transformer.gap, "notes": few,
            "images_per_second": judged.images_per_second, "samples": min(len(a.images) for a in asked),
            "captions": list(asked[0].captions[:8]), "sampling": asdict(o),
        }  # fmt: skip
        for note in few:
            print(f"note: {note}")
    checkpoint.write_json(folder / SUMMARY, summary)
    print(f"report: {report.write(folder)}")


def with_texts(config: Config, trained: Model) -> Model:
    """The model with the mean of the given captions' embeddings, if such are given."""
    path = config.evaluation.centre_prompts
    if path is None or "centre" not in config.transformer.gap:
        return trained
    from dmd.data import prompts

    return trained.with_texts(prompts.read(path).texts)


def _summary(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SUMMARY).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
