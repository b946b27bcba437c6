"""Images made while a learner looks at them: fresh ones every epoch, never on the disk.

A generator of one step is fast enough to take the data set's place; one of fifty is not. Every image has a name,
(caption, replica, epoch), and its noise follows from that. A batch is a pure function of its step, so a learner that
resumes sees what it would have seen. Epoch 0 has the images that `dmd synthesize` writes with the same seed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dmd.errors import InputError
from dmd.generate import Source, image_number
from dmd.seeding import Stream, bits


@dataclass(frozen=True)
class FreshBatch:
    """m images of each of C captions, caption by caption.

    Attributes:
        images: (C * m, ...) on the source's device.
        labels: (C * m,) int64 on the CPU: the captions' numbers, for multi-positive losses.
        replicas, epochs: (C * m,) int64 on the CPU: the rest of each image's name.
        captions: C of them.
    """

    images: Tensor
    labels: Tensor
    replicas: Tensor
    epochs: Tensor
    captions: list[str]


@dataclass(eq=False)
class Online(IterableDataset):
    """An endless data set of `FreshBatch`es; iterate over it directly, or through DataLoader with batch_size=None.

    On a GPU the next batch is made on a stream of its own while the learner works on this one. Where the generator
    shall have its own process (a CPU, a second GPU), let DataLoader start it: `num_workers=1`, and on CUDA also
    `multiprocessing_context="spawn"`; the order of the batches is the same with any number of workers.

    Attributes:
        build: makes the source in the process that iterates.
        captions: different ones; each comes once an epoch, in an order of its own.
        captions_per_batch: C, of this process.
        per_caption: m.
        seed: of the order; the source has its own.
        rank, world: of the learner's process, each of which gets other captions.
        first: step to begin with.
        work_unit: images that the source makes at a time; None makes all of a batch together.
        transform: (images (C * m, ...)) to images, on their device: augmentation belongs here or in the learner.

    Raises:
        InputError: a number is out of range, or there are no captions.
    """

    build: Callable[[], Source]
    captions: Sequence[str]
    captions_per_batch: int
    per_caption: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    first: int = 0
    work_unit: int | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    _source: Source | None = field(default=None, init=False, repr=False)
    _side: "torch.cuda.Stream | None" = field(default=None, init=False, repr=False)
    _orders: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not len(self.captions):
            raise InputError("there are no captions to make images of: give at least one")
        for name in ("captions_per_batch", "per_caption", "world"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.rank < self.world or self.first < 0:
            raise InputError(f"process {self.rank} of {self.world} from step {self.first} is not possible")

    def names(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(caption, replica, epoch) of the images of a step, (C * m,) int64 each."""
        count, m = self.captions_per_batch, self.per_caption
        place = (step * self.world + self.rank) * count + torch.arange(count)
        epoch = place // len(self.captions)
        caption = torch.stack([self._order(int(e))[p % len(self.captions)] for e, p in zip(epoch, place, strict=True)])
        return caption.repeat_interleave(m), torch.arange(m).repeat(count), epoch.repeat_interleave(m)

    def batch(self, step: int) -> FreshBatch:
        """The batch of a step."""
        self._source = self._source or self.build()
        caption, replica, epoch = self.names(step)
        images = []
        for e in epoch.unique().tolist():  # a batch may lie across the border of two
            rows = (epoch == e).nonzero()[:, 0]
            for part in rows.split(self.work_unit or len(rows)):
                texts = [self.captions[i] for i in caption[part].tolist()]
                images.append(self._source(texts, image_number(caption[part], replica[part]), e))
        texts = [self.captions[i] for i in caption[:: self.per_caption].tolist()]
        made = torch.cat(images) if self.transform is None else self.transform(torch.cat(images))
        return FreshBatch(made, caption, replica, epoch, texts)

    def __iter__(self) -> Iterator[FreshBatch]:
        worker = get_worker_info()
        step, stride = (self.first, 1) if worker is None else (self.first + worker.id, worker.num_workers)
        waiting = self.begin(step)
        while True:
            step += stride
            following = self.begin(step)  # before the learner takes the device
            yield waiting()
            waiting = following

    def begin(self, step: int) -> Callable[[], FreshBatch]:
        """Set about a batch; returns what waits for it, once. On a GPU the caller's stream waits, and a stream of its
        own makes the batch meanwhile; without one, it is made when it is waited for."""
        if not torch.cuda.is_available():
            return lambda: self.batch(step)
        if self._side is None:  # one, since the allocator keeps memory for each
            self._side = torch.cuda.Stream()
            self._side.wait_stream(torch.cuda.current_stream())  # which may still bring the weights
        side = self._side
        with torch.cuda.stream(side):
            batch = self.batch(step)
            done = side.record_event()  # the stream itself goes on with the batch after

        def wait() -> FreshBatch:
            torch.cuda.current_stream().wait_event(done)
            if batch.images.is_cuda:
                batch.images.record_stream(torch.cuda.current_stream())
            return batch

        return wait

    def _order(self, epoch: int) -> Tensor:
        """The captions of an epoch in their order, (N,) int64; of the last two that were asked for, kept."""
        if epoch not in self._orders:
            words = bits(self.seed, Stream.CAPTION_ORDER, epoch, torch.arange(len(self.captions)), 2)
            self._orders[epoch] = ((words[:, 0] << 31) + (words[:, 1] >> 1)).argsort(stable=True)
            for old in list(self._orders)[:-2]:
                del self._orders[old]
        return self._orders[epoch]
