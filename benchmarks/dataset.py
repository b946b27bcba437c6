"""From a generator to shards: `python -m benchmarks.dataset [--quick] [--images 100000]`.

Without networks, but for `learner`: a generator that takes its time on another device (it sleeps), and images of 1/f
noise, which have the spectrum of photographs. What is measured:

  encode       JPEG q95 of 512 x 512 pixels by Pillow, by one thread
  writer       float images to whole shards on the disk, with uint8 conversion, JPEG, hashes, tar and table
  throughput   images per second with a generator of a given rate, as a part of the bare generator's
  memory       resident size after every shard of many small images, in a process of its own; it must not grow
  captions     10,000 by templates
  online       a learner that takes as long as the generator, both asleep: in turns, and a process for the generator
  learner      a step of `dmd represent stablerep --online` with the student that ships: in turns, and with the batch
               after begun ahead, by another process on the CPU and on a stream of its own on a GPU

Figures per core are images per second of processor time, which other programs on the machine change little; figures by
the clock need a quiet machine with a free core.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import common
from benchmarks.common import finish, say_machine
from dmd import build, shards, synthesis
from dmd.captions import concepts, grammar, store
from dmd.captions.mixture import Mixture
from dmd.cli import represent
from dmd.data.images import to_uint8
from dmd.generate import Source
from dmd.online import Online
from dmd.represent.batches import Prefetched
from dmd.represent.chain import Chain
from dmd.represent.sources import Fresh
from dmd.shards import Spec
from dmd.synthesis import Job

GROWTH_MIB = 20
"""What memory may grow by after the first shard: the allocator's unrest, and not a thousandth of the images."""


def noise_images(count: int, size: int, seed: int = 0) -> Tensor:
    """1/f noise (count, 3, size, size) in [-1, 1]: the power spectrum of natural images (Field 1987)."""
    draw = torch.Generator().manual_seed(seed)
    white = torch.randn(count, 3, size, size, generator=draw)
    fx, fy = torch.fft.rfftfreq(size), torch.fft.fftfreq(size)
    amplitude = (fx.square() + fy[:, None].square()).sqrt().clamp_min(1 / size)
    x = torch.fft.irfft2(torch.fft.rfft2(white) / amplitude, s=(size, size))
    return (x / x.std((-1, -2), keepdim=True) * 0.45).clamp(-1, 1)


def source_of(images: Tensor, seconds_per_image: float = 0.0) -> Source:
    """Hands out the first of given images, at least a batch, after a time in which a device would have made them."""

    def source(captions: Sequence[str], numbers: Tensor, epoch: int) -> Tensor:
        time.sleep(seconds_per_image * len(captions))
        return images[: len(captions)]

    return source


def spec_of(images: int, shard_size: int, batch_size: int) -> Spec:
    return Spec("benchmark", images // 4, 4, 0, {"kind": "noise"}, None, "jpg", 95, shard_size, batch_size)


def made(spec: Spec, source: Source, folder: Path, encoders: int, tick: Callable[[int], object]) -> dict[str, float]:
    """Make a data set, and how long it took by the clock and by the processor."""
    shutil.rmtree(folder, ignore_errors=True)
    captions = [f"a photo of number {i}" for i in range(spec.count)]
    wall, cpu = time.perf_counter(), time.process_time()
    outcome = synthesis.work(Job(folder, spec, captions, source, encoders), tick=tick)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert outcome.made == spec.images
    return {"images_per_second": spec.images / wall, "images_per_second_per_core": spec.images / cpu}


def encode_rate(images: Tensor, count: int) -> float:
    arrays = to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy()
    started = time.process_time()
    for i in range(count):
        shards.encode(arrays[i % len(arrays)], "jpg", 95)
    return count / (time.process_time() - started)


def conversion_rate(images: Tensor, count: int) -> float:
    started = time.process_time()
    for _ in range(max(1, count // len(images))):
        to_uint8(images).permute(0, 2, 3, 1).contiguous()
    return max(1, count // len(images)) * len(images) / (time.process_time() - started)


def memory(images: int, folder: Path) -> dict[str, float]:
    """Resident MiB of this process after the first shard and the last, and the most by which it grew between."""
    sizes: list[float] = []
    process = psutil.Process()
    spec = spec_of(images, min(10_000, images // 40 * 4), 64)
    pictures = noise_images(64, 32)
    done = made(spec, source_of(pictures), folder, 1, lambda n: sizes.append(process.memory_info().rss / 2**20))
    growth = max(sizes[1:]) - sizes[0]
    return {"first_shard_mib": sizes[0], "last_mib": sizes[-1], "growth_mib": growth, "bound_mib": GROWTH_MIB} | done


def throughput(images: Tensor, rate: float, count: int, encoders: int, folder: Path) -> dict[str, float]:
    """A generator that alone makes `rate` images per second, and the data set made with it."""
    source, batch = source_of(images, 1 / rate), 32
    started = time.perf_counter()
    for _ in range(max(1, count // batch)):
        source([""] * batch, torch.arange(batch), 0)
    bare = max(1, count // batch) * batch / (time.perf_counter() - started)
    done = made(spec_of(count, count // 2, batch), source, folder, encoders, lambda n: None)
    return {"bare": bare, "data_set": done["images_per_second"], "part": done["images_per_second"] / bare}


def captions(count: int, folder: Path) -> float:
    """Seconds for `count` captions by templates."""
    path = folder / "captions.jsonl"
    started = time.perf_counter()
    store.write(path, {}, count, grammar.templates(concepts.shipped(), Mixture(), 0), 5000)
    return time.perf_counter() - started


class Sleeper:
    """Builds a source that takes `seconds` a batch; a class, since it goes to another process."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self) -> Source:
        def source(texts: Sequence[str], numbers: Tensor, epoch: int) -> Tensor:
            time.sleep(self.seconds)
            return torch.zeros(len(texts), 3, 64, 64)

        return source


def online(steps: int, seconds: float) -> dict[str, float]:
    """Seconds a step of a learner that takes `seconds`, with a generator that takes as long."""
    data = Online(Sleeper(seconds), [f"caption {i}" for i in range(1000)], 8, 4)
    found = {}
    loaders: dict[str, Any] = {"in turns": data, "process": DataLoader(data, batch_size=None, num_workers=1)}
    for name, loader in loaders.items():
        batches = iter(loader)
        next(batches)
        started = time.perf_counter()
        for _ in islice(batches, steps):
            time.sleep(seconds)
        found[name] = (time.perf_counter() - started) / steps
    return found


def learner(steps: int, folder: Path) -> dict[str, float]:
    """Seconds a step of the preset `shapes` with batches of 64 images; mean of `steps`."""
    argv = ["stablerep", "shapes", "--online", "--probe", "None", "--captions-per-batch", "16"]
    config = represent.parse(argv, "benchmarks").config
    place = build.start(config.run)
    chain = Chain(config, place, folder)
    task, batches = chain.task()
    fresh = batches.source
    asked: Any = SimpleNamespace(  # as `Online`, but nothing is begun before it is asked for
        captions=fresh.online.captions,
        per_caption=fresh.online.per_caption,
        begin=lambda step: lambda: fresh.online.batch(step),
    )
    ahead = ("stream", 0) if place.device.type == "cuda" else ("process", 1)
    warm_up = 3  # more than DataLoader prepares beforehand
    found = {}
    for name, source, workers in (("in turns", Fresh(asked, ""), 0), (ahead[0], fresh, ahead[1])):
        seen = Prefetched(replace(batches, source=source), workers, warm_up + steps, place.device)
        times = []
        for step in range(warm_up + steps):
            times += common.seconds(partial(lambda seen, step: task.step(step, seen(step)), seen, step), 1, 0)
        found[name] = statistics.fmean(times[warm_up:])
    return found


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=int, default=100_000, help="of the memory's measurement")
    parser.add_argument("--rate", type=float, default=95, help="images per second of the generator (SD 1.5 on an H200)")
    parser.add_argument("--seconds", type=float, default=30, help="of the throughput's measurement")
    parser.add_argument("--encoders", type=int, default=1, help="threads")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    if options.images < 100 or options.rate <= 0 or options.encoders < 1:
        parser.error("--images must be at least 100, --rate above 0, --encoders at least 1")
    if options.quick:
        options.images, options.seconds = 1000, 10.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    say_machine()
    pictures = noise_images(32, 512)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "set"
        for name in options.only:
            torch.set_num_threads(threads if name == "learner" else 1)
            results[name] = PARTS[name](options, pictures, folder)
            print(f"{name:12}" + ", ".join(f"{k} {v:.4g}" for k, v in results[name].items()), flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    finish("dataset", results | {"encoders": options.encoders, "free_cores": (os.cpu_count() or 1) - 1}, options.json)


def _encode(options: argparse.Namespace, pictures: Tensor, folder: Path) -> dict[str, float]:
    count = 320 if options.quick else 1000
    return {"encode_per_core": encode_rate(pictures, count), "uint8_per_core": conversion_rate(pictures, count)}


def _writer(options: argparse.Namespace, pictures: Tensor, folder: Path) -> dict[str, float]:
    def written(count: int, where: Path) -> dict[str, float]:
        return made(spec_of(count, count // 2, 32), source_of(pictures), where, options.encoders, lambda n: None)

    written(64, folder.with_name("warm-up"))  # the table's package is read once, which takes most of a second
    return written(320 if options.quick else 2000, folder)


def _throughput(options: argparse.Namespace, pictures: Tensor, folder: Path) -> dict[str, float]:
    count = max(64, int(options.rate * options.seconds) // 64 * 64)
    return throughput(pictures, options.rate, count, options.encoders, folder)


def _memory(options: argparse.Namespace, pictures: Tensor, folder: Path) -> dict[str, float]:
    """In a fresh process: what other parts have held would hide what this one needs."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        return alone.submit(memory, options.images // 40 * 40, folder).result()


def _captions(options: argparse.Namespace, pictures: Tensor, folder: Path) -> dict[str, float]:
    return {"seconds": captions(1000 if options.quick else 10_000, folder)}


def _online(options: argparse.Namespace, pictures: Tensor, folder: Path) -> dict[str, float]:
    return online(5 if options.quick else 30, 0.05 if options.quick else 0.2)


def _learner(options: argparse.Namespace, pictures: Tensor, folder: Path) -> dict[str, float]:
    return learner(3 if options.quick else 20, folder)


PARTS = {
    "encode": _encode, "writer": _writer, "throughput": _throughput, "memory": _memory, "captions": _captions,
    "online": _online, "learner": _learner,
}  # fmt: skip


if __name__ == "__main__":
    main()
