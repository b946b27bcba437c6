"""A learner's step against its bare network calls: `python -m benchmarks.learner METHOD|all [PRESET] [--flags]`.

The bare calls are forward and backward of backbone, heads and text tower on a batch that is there, and the teacher's
forward in SynCLR. The step also contrasts, assigns patches to prototypes, clips and checks gradients, and updates
weights and teacher. Images are random; what makes a batch is timed by itself. Target: bare calls are 90 % of a step.
Captions as classes are the step of `supervised`.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.common import finish, in_turns, middle, peak_memory, ratio, say_machine, seconds
from dmd import build
from dmd.build import Workplace
from dmd.cli import represent
from dmd.errors import InputError
from dmd.represent import text
from dmd.represent.batches import Crops, Views
from dmd.represent.chain import TEXT, Chain
from dmd.represent.config import METHODS, WITH_TEXT, Config
from dmd.represent.heads import by_view
from dmd.represent.learners import Attraction, Classifying, Learner, Reading, Synclr

IMAGES, CLASSES = 2048, 64


def random_images(config: Config, folder: Path) -> Config:
    """The config with random images of its size, in an .npz, and without a probe."""
    size, channels = config.backbone.image_size, config.backbone.channels
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (IMAGES, size, size, channels), dtype=np.uint8)
    np.savez(folder / "train.npz", images=images, labels=np.arange(IMAGES) % CLASSES)
    data = replace(config.data, data=str(folder / "train.npz"), online=False, workers=0, captions=None)
    learn = replace(config.learn, epochs=0.0)
    return replace(config, data=data, learn=learn, probe=replace(config.probe, probe=None))


def bare(task: Learner, batch: Views) -> Callable[[], None]:
    """Forward and backward of all networks of a learner."""
    nets = list(task.modules().values())

    def outputs() -> list[torch.Tensor]:
        features, found = task.backbone(batch.images), []
        for term in task.terms.values():
            if isinstance(term, Attraction):
                found.append(by_view(term.head, features, batch.views))
            if isinstance(term, Classifying):
                found.append(term.linear(features))
            if isinstance(term, Reading):
                found += [term.net.image_projection(features), term.net(batch.tokens)]
        return found

    return lambda: _pass(nets, outputs, task.practice.autocast, batch.images.device)


def bare_synclr(task: Synclr, batch: Crops) -> Callable[[], None]:
    """The same of SynCLR, and the teacher's forward."""
    student, teacher = task.student, task.teacher
    nets = [student, task.predictor]

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            features, tokens = teacher.backbone.both(batch.images)
            teacher.projection(features)
            teacher.ibot(tokens[batch.mask])
        features, tokens = student.backbone.both(batch.images, batch.mask, student.mask_token)
        seen = [features, student.backbone(batch.local)] if len(batch.local) else [features]
        return [task.predictor(student.projection(x)) for x in seen] + [student.ibot(tokens[batch.mask])]

    return lambda: _pass(nets, outputs, task.practice.autocast, batch.images.device)


def _pass(nets: list[Any], outputs: Callable[[], list[torch.Tensor]], dtype: Any, device: torch.device) -> None:
    for net in nets:
        net.zero_grad()
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        found = outputs()
    torch.stack([x.float().square().sum() for x in found]).sum().backward()


def measured(config: Config, place: Workplace, runs: int) -> dict[str, Any]:
    """Times of a method's step, of its bare calls and of making its batch."""
    with tempfile.TemporaryDirectory() as folder:
        config = random_images(config, Path(folder))
        if config.text.tokenizer is not None:  # words need not be fetched to be timed
            config = replace(config, text=replace(config.text, tokenizer=None))
        chain = Chain(config, place, Path(folder))
        if config.method in WITH_TEXT:
            chain.write_words()
            chain.tokenizer = text.load_tokenizer(str(Path(folder) / TEXT / text.WORDS))
        task, batches = chain.task()
        drawing, _ = middle(seconds(partial(batches, 0), 3))
        batch = batches(0).to(place.device)
    parts = bare_synclr(task, batch) if isinstance(task, Synclr) else bare(task, batch)
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = in_turns({"step": lambda: task.step(0, batch), "bare": parts}, runs, 2)
    step, spread = middle(found["step"])
    alone, alone_spread = middle(found["bare"])
    share, share_spread = ratio(found["bare"], found["step"])
    views = len(batch.images) + (len(batch.local) if isinstance(batch, Crops) else 0)
    print(f"{config.method} {config.preset}: {config.backbone.backbone}, {views} views a step")
    print(f"  step           {step * 1e3:9.1f} +- {spread * 1e3:.1f} ms, {views / step:.0f} views per second")
    print(f"  its bare calls {alone * 1e3:9.1f} +- {alone_spread * 1e3:.1f} ms")
    print(f"  bare / step    {share:9.3f} +- {share_spread:.3f}   (target 0.90)")
    print(f"  a batch        {drawing * 1e3:9.1f} ms to read and augment, without workers", flush=True)
    return {
        "method": config.method, "preset": config.preset, "views": views, "step_ms": step * 1e3, "bare_ms": alone * 1e3,
        "ratio": share, "ratio_spread": share_spread, "batch_ms": drawing * 1e3, "peak_mib": peak_memory(),
    }  # fmt: skip


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="5 runs")
    options, rest = parser.parse_known_args()
    method, *rest = rest or ["all"]
    try:
        configs = [
            represent.parse([m, *rest], "python -m benchmarks.learner").config
            for m in (METHODS if method == "all" else [method])
        ]
        say_machine()
        place = build.start(configs[0].run)
        rows = [measured(config, place, 5 if options.quick else options.runs) for config in configs]
    except InputError as error:
        parser.error(str(error))
    finish("learner", {"flags": rest, "methods": rows}, options.json)


if __name__ == "__main__":
    main()
