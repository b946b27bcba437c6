"""From captions to shards: one worker function under all engines.

A worker takes a shard by a lock, checks it, and makes it if it is not whole. Workers share nothing else, so they may be
processes of torchrun, tasks of a SLURM array, actors of Ray, or the same command in several terminals; they may come,
go and be killed, and a shard's bytes do not depend on who makes it. Each checks its own part of the shards by their
SHA-256 sums and the others' by their sizes, and helps where shards are still to be made. Whoever is last sees that all
are whole, and completes the manifest.

Generation, encoding and writing overlap: the device makes a batch while threads encode the one before.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd import shards
from dmd.data import groups
from dmd.data.images import to_float, to_uint8
from dmd.errors import InputError
from dmd.evaluation import save_grid
from dmd.generate import Source, image_number
from dmd.locks import Locks
from dmd.metrics.evaluate import spread
from dmd.shards import Facts, ShardWriter, Spec

FOLDER_LOCK = 1 << 40
"""Number of the lock on the manifest; shards have the numbers below."""
WAITING = 2  # batches between the device and the disk

Score = Callable[[Tensor, Sequence[str]], Tensor]
"""Images (B, C, H, W) in [-1, 1] and their captions to a number each, (B,)."""


@dataclass(frozen=True)
class Filter:
    """Leaves out images whose score is below a limit."""

    score: Score
    at_least: float


@dataclass(frozen=True)
class Job:
    """What is to be made, where, and of what.

    Attributes:
        captions: `spec.count` of them.
        source: makes the images.
        encoders: threads that encode them.
        keep: leaves some out; None keeps all.
    """

    folder: Path
    spec: Spec
    captions: Sequence[str]
    source: Source
    encoders: int = 1
    keep: Filter | None = None


def open_folder(folder: Path, spec: Spec) -> None:
    """Make the folder, or go on with it. Raises InputError as `shards.start`, or if the folder is a file."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder as --out")
    folder.mkdir(parents=True, exist_ok=True)
    with Locks(lock_path(folder)) as locks:
        locks.take(FOLDER_LOCK, wait=True)
        shards.start(folder, spec)


def lock_path(folder: Path) -> Path:
    return folder / ".lock"


@dataclass(frozen=True)
class Outcome:
    """What a worker has done: images that it made, shards that others hold, and the whole data set, if it is whole."""

    made: int
    busy: int
    shards: dict[str, shards.Shard] | None


def work(job: Job, worker: int = 0, workers: int = 1, tick: Callable[[int], object] = lambda n: None) -> Outcome:
    """Make what is missing of a data set, together with any other workers.

    Args:
        worker, workers: this one's number, and how many there are; its part is every `workers`-th shard.
        tick: told the images of each shard that is found or made, by whichever thread.

    Raises:
        InputError: the folder is of another spec.
        ArithmeticError: an image is not finite.
        OSError: a file cannot be written; shards that are whole stay.
    """
    if not 0 <= worker < workers:
        raise InputError(f"--worker is {worker} of {workers}: it must be at least 0 and below --workers")
    open_folder(job.folder, job.spec)
    own = range(worker, job.spec.shards, workers)
    others = [(worker + i) % job.spec.shards for i in range(job.spec.shards) if i % workers]
    with Locks(lock_path(job.folder)) as locks, Maker(job, locks, tick) as maker:
        locks.take(FOLDER_LOCK, wait=True)  # shows whether there are locks
        locks.release(FOLDER_LOCK)
        held = maker.run(own, deep=True)
        held_others = maker.run(others, deep=False) if locks.work else []  # else nobody knows what the others are at
        held = maker.run(held, deep=True) + maker.run(held_others, deep=False)
        digest = job.spec.digest()
        busy = [i for i in held if shards.whole(job.folder, job.spec.name(i), digest, deep=False) is None]
        locks.take(FOLDER_LOCK, wait=True)
        found = None if busy else shards.finish(job.folder, job.spec)
        locks.release(FOLDER_LOCK)
        return Outcome(maker.made, len(busy), found)


class Maker:
    """Checks and makes shards; a context, at whose end nothing half made is left.

    Args:
        locks: of the data set's folder.
    """

    def __init__(self, job: Job, locks: Locks, tick: Callable[[int], object] = lambda n: None):
        self.job, self.locks, self.tick = job, locks, tick
        self.made = 0
        self._open: dict[int, ShardWriter] = {}
        self._encoders = ThreadPoolExecutor(job.encoders, thread_name_prefix="encode")
        self._backlog = Backlog(WAITING)

    def __enter__(self) -> "Maker":
        return self

    def __exit__(self, *_: object) -> None:
        self._backlog.close()
        self._encoders.shutdown()
        for shard, writer in self._open.items():
            writer.abandon()
            self.locks.release(shard)

    def run(self, numbers: Iterable[int], deep: bool) -> list[int]:
        """Make those shards that are not whole (`shards.whole`); returns those that other processes hold."""
        busy, digest = [], self.job.spec.digest()
        for shard in numbers:
            if not self.locks.take(shard):
                busy.append(shard)
                continue
            if shards.whole(self.job.folder, self.job.spec.name(shard), digest, deep) is None:
                self._make(shard, digest)
            else:
                self.locks.release(shard)
                self.tick(len(self.job.spec.indices(shard)))
        self._backlog.wait()
        return busy

    def _make(self, shard: int, digest: str) -> None:
        """Generate a shard; it is written, and its lock given up, in the background."""
        spec = self.job.spec
        writer = ShardWriter(self.job.folder, spec.name(shard), digest)
        self._open[shard] = writer
        indices = spec.indices(shard)
        for start in range(0, len(indices), spec.batch_size):
            real = indices[start : start + spec.batch_size]
            index = torch.tensor([*real, *[real[-1]] * (spec.batch_size - len(real))])
            self._backlog.put(self._generate(writer, index, len(real)))
        self._backlog.put(lambda: self._finish(shard))

    def _generate(self, writer: ShardWriter, index: Tensor, count: int) -> Callable[[], None]:
        """Have the device make a work unit; returns what writes its first `count` images."""
        job, spec = self.job, self.job.spec
        caption, replica = index // spec.replicas, index % spec.replicas
        texts = [job.captions[i] for i in caption.tolist()]
        images = job.source(texts, image_number(caption, replica), 0)
        height, width = images.shape[-2:]
        finite = fetched(all_finite, images[:count])
        images = resized(images, spec.pixels)
        score = job.keep.score(images, texts) if job.keep else None
        bytes_ = fetched(to_uint8, images[:count])
        scores = None if score is None else fetched(lambda x: x, score[:count])

        def write() -> None:
            good, levels = finite(), bytes_()
            if not bool(good.all()):
                first = int((~good).nonzero()[0])
                raise ArithmeticError(f"image {spec.key(int(index[first]))}, of {texts[first][:60]!r}, is not finite")
            arrays = levels.permute(0, 2, 3, 1).contiguous().numpy()
            files = self._encoders.map(lambda a: shards.encode(a, spec.image_format, spec.quality), arrays)
            values = scores().tolist() if scores else [None] * count
            for i, (file, value) in enumerate(zip(files, values, strict=True)):
                facts = Facts(
                    texts[i], int(caption[i]), int(replica[i]), 0, spec.seed, arrays.shape[2], arrays.shape[1],
                    width, height, value,
                )  # fmt: skip
                if job.keep and value < job.keep.at_least:
                    writer.drop(spec.key(int(index[i])), "low clip score", facts)
                else:
                    writer.add(spec.key(int(index[i])), file, spec.image_format, facts)

        return write

    def _finish(self, shard: int) -> None:
        done = self._open[shard].finish()
        del self._open[shard]
        self.locks.release(shard)
        self.made += done.images
        self.tick(done.images + done.dropped)


def resized(images: Tensor, pixels: int | None) -> Tensor:
    """Images (B, C, H, W) with a height and width of `pixels`: bicubic with antialiasing, on their device."""
    if pixels is None or images.shape[-2:] == (pixels, pixels):
        return images
    return F.interpolate(images, (pixels, pixels), mode="bicubic", antialias=True)


def all_finite(images: Tensor) -> Tensor:
    """(B, ...) to (B,) booleans, in one pass: NaN and infinity stay in sums."""
    return images.sum(tuple(range(1, images.dim())), dtype=torch.float32).isfinite()


def fetched(change: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Begin to change a tensor and to copy it to the CPU, and return what waits for it: the device goes on meanwhile.

    What is on the CPU already is changed by whoever waits, so that the thread of the networks need not.
    """
    if x.device.type == "cpu":
        return lambda: change(x)
    x = change(x)
    if x.device.type != "cuda":
        x = x.cpu()
        return lambda: x
    target = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return target

    return wait


class Backlog:
    """Does tasks one after the other in a thread, with at most `depth` of them waiting. After one has failed, the rest
    are left out, and its error is raised by the next call."""

    def __init__(self, depth: int):
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="write", daemon=True)
        self._thread.start()

    def put(self, task: Callable[[], None]) -> None:
        """Wait for room, and leave a task there."""
        self._tasks.put(task)
        self._raise()

    def wait(self) -> None:
        """Until all tasks are done."""
        self._tasks.join()
        self._raise()

    def close(self) -> None:
        """Leave out what has not begun, and end the thread. Errors are not raised again."""
        self._error = self._error or RuntimeError("closed")
        self._tasks.put(None)
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if self._error is None:
                    task()
            except BaseException as error:
                self._error = error
            finally:
                self._tasks.task_done()
        self._tasks.task_done()


def sampled(job: Job, captions: int) -> Tensor:
    """All images of some captions, evenly spaced over the data set: (captions, replicas, C, H, W), as they are written
    but for the files' format."""
    spec = job.spec
    caption = spread(spec.count, captions).repeat_interleave(spec.replicas)
    numbers = image_number(caption, torch.arange(spec.replicas).repeat(captions))
    found = []
    for part in torch.arange(len(caption)).split(spec.batch_size):
        texts = [job.captions[i] for i in caption[part].tolist()]
        found.append(resized(job.source(texts, numbers[part], 0), spec.pixels).float().cpu())
    return torch.cat(found).unflatten(0, (captions, spec.replicas))


SHEET_CAPTIONS, SHEET_REPLICAS, SHEET_PIXELS = 12, 8, 128


def contact_sheet(folder: Path, spec: Spec) -> None:
    """contact_sheet.png: a row of images for each of some captions, evenly spaced over the data set."""
    rows, titles = [], []
    chosen = spread(spec.count, SHEET_CAPTIONS).tolist()
    per_shard = spec.shard_size // spec.replicas
    for shard in sorted({i // per_shard for i in chosen}):
        for group in groups.shard_groups(folder / f"{spec.name(shard)}.tar", None, groups.Broken(0)):
            if group.caption_id in chosen:
                places = [place for _, place in group.replicas[:SHEET_REPLICAS]]
                row = torch.stack([to_float(groups.decode(place)) for place in places])
                rows.append(resized(row, SHEET_PIXELS) if max(row.shape[-2:]) > SHEET_PIXELS else row)
                titles.append(group.caption)
    widest = max((len(row) for row in rows), default=0)
    rows = [F.pad(row, (0, 0, 0, 0, 0, 0, 0, widest - len(row))) for row in rows]  # where some were dropped
    if rows:
        save_grid(rows, folder / "contact_sheet.png", max(1, 64 // rows[0].shape[-1]), titles)


# ----------------------------------------------------------------------------- Ray


class RayWorker:
    """An actor of Ray Data, which makes the shards that it is given. What it cannot have or do comes back as a
    sentence, since Ray would start an actor again that raises, and show its frames.

    Args:
        build: makes the job, in the actor: networks do not travel.
    """

    def __init__(self, build: Callable[[], Job]):
        self.wrong, self._stack = "", contextlib.ExitStack()
        try:
            job = build()
            locks = self._stack.enter_context(Locks(lock_path(job.folder)))
            self.maker = self._stack.enter_context(Maker(job, locks))
        except (InputError, ArithmeticError, OSError) as error:
            self.wrong = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Numbers of shards to how many images were made, and what is wrong, as a sentence."""
        if self.wrong:
            return {"images": [0], "error": [self.wrong]}
        before = self.maker.made
        try:
            self.maker.run(batch["shard"].tolist(), deep=True)
        except (InputError, ArithmeticError, OSError) as error:
            return {"images": [0], "error": [str(error)]}
        return {"images": [self.maker.made - before], "error": [""]}


def missing(folder: Path, spec: Spec) -> list[int]:
    """Shards that are not whole, by their SHA-256 sums."""
    digest = spec.digest()
    return [i for i in range(spec.shards) if shards.whole(folder, spec.name(i), digest, deep=True) is None]


def work_with_ray(
    build: Callable[[], Job], folder: Path, spec: Spec, actors: int, gpus: float,
    tick: Callable[[int], object] = lambda n: None,
) -> Outcome:  # fmt: skip
    """As `work`, with actors of the Ray cluster that this process is connected to (or a local one).

    Args:
        build: makes the job in each actor; it travels by pickle, from this process to the user's own cluster.
        actors: how many.
        gpus: of each actor.

    Raises:
        InputError: Ray is not installed; else as `work`.
    """
    try:
        import ray.data  # which also needs pandas
    except ImportError:
        raise InputError("--engine ray needs Ray with its part `data`: pip install 'dmd-one-step[ray]'") from None
    open_folder(folder, spec)
    absent = missing(folder, spec)
    tick(spec.images - sum(len(spec.indices(i)) for i in absent))
    made = 0
    if absent:
        todo = ray.data.from_items([{"shard": i} for i in absent], override_num_blocks=len(absent))
        pool = ray.data.ActorPoolStrategy(size=min(actors, len(absent)))
        done = todo.map_batches(RayWorker, fn_constructor_args=(build,), batch_size=1, compute=pool, num_gpus=gpus)
        for row in done.iter_rows():
            if row["error"]:
                raise InputError(f"an actor of Ray stopped: {row['error']}; the same command goes on")
            made += int(row["images"])
            tick(int(row["images"]))
    with Locks(lock_path(folder)) as locks:
        locks.take(FOLDER_LOCK, wait=True)
        return Outcome(made, 0, shards.finish(folder, spec))
