"""Online synthesis: every image has its name, every batch is a function of its step, and nobody waits in vain."""

from itertools import islice

import pytest
import torch
from stub import CAPTIONS, stub
from torch.utils.data import DataLoader

from dmd import seeding
from dmd.errors import InputError
from dmd.generate import REPLICAS, caption_source, student_generator
from dmd.online import Online
from dmd.seeding import Stream
from dmd.teachers import pixel


def online(**changes):
    values = {"build": lambda: stub, "captions": CAPTIONS, "captions_per_batch": 4, "per_caption": 3, "seed": 2}
    return Online(**(values | changes))


def equal(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.captions == b.captions


def test_images_are_those_of_their_names():
    batch = online().batch(9)  # captions 36 to 39 of a sequence of 30: the second epoch
    assert batch.epochs.tolist() == [1] * 12 and batch.replicas.tolist() == [0, 1, 2] * 4
    for image, label, replica, epoch in zip(batch.images, batch.labels, batch.replicas, batch.epochs, strict=True):
        number = torch.tensor([int(label) * REPLICAS + int(replica)])
        assert torch.equal(image, stub([CAPTIONS[int(label)]], number, int(epoch))[0])
    assert batch.captions == [CAPTIONS[i] for i in batch.labels[::3].tolist()]


def test_an_epoch_has_each_caption_once_in_another_order():
    """30 captions in batches of 4: the eighth batch lies across the border, and each epoch is still whole."""
    labels = torch.cat([online().names(step)[0][::3] for step in range(15)])
    epochs = torch.cat([online().names(step)[2][::3] for step in range(15)])
    first, second = labels[:30], labels[30:]
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(30))
    assert first.tolist() != second.tolist() != list(range(30)) and epochs.tolist() == [0] * 30 + [1] * 30
    assert online(seed=3).names(0)[0].tolist() != online().names(0)[0].tolist()


def test_processes_share_the_global_batch():
    whole = online(captions_per_batch=8).batch(3)
    halves = [online(rank=rank, world=2).batch(3) for rank in range(2)]
    assert torch.equal(torch.cat([h.images for h in halves]), whole.images)
    assert [c for h in halves for c in h.captions] == whole.captions


def test_a_run_is_repeated_from_any_step():
    all_of_it = list(islice(online(), 9))
    assert all(equal(a, b) for a, b in zip(all_of_it[5:], islice(online(first=5), 4), strict=True))
    assert all(equal(a, online().batch(step)) for step, a in enumerate(all_of_it))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_of_its_own_gives_the_same_batches(workers):
    loader = DataLoader(online(), batch_size=None, num_workers=workers)
    assert all(equal(a, b) for a, b in zip(islice(loader, 5), islice(online(), 5), strict=True))


def test_work_units_bound_what_the_source_makes_at_once():
    sizes = []

    def noting(captions, numbers, epoch):
        sizes.append(len(captions))
        return stub(captions, numbers, epoch)

    batch = online(build=lambda: noting, work_unit=5).batch(0)
    assert sizes == [5, 5, 2] and equal(batch, online().batch(0))


def test_a_transform_sees_the_whole_batch():
    batch = online(transform=lambda x: x.flip(-1)).batch(0)
    assert torch.equal(batch.images, online().batch(0).images.flip(-1))


def test_the_source_is_built_once_and_only_when_it_is_needed():
    built = []

    def build():
        built.append(1)
        return stub

    data = online(build=build)
    assert not built
    list(islice(data, 3))
    assert built == [1]


@pytest.mark.parametrize(
    "wrong", [{"captions": []}, {"captions_per_batch": 0}, {"per_caption": 0}, {"rank": 1}, {"world": 0}, {"first": -1}]
)
def test_wrong_numbers_get_a_sentence(wrong):
    with pytest.raises(InputError):
        online(**wrong)


def test_a_students_images_follow_from_caption_replica_and_epoch():
    """By the networks' own functions: noise of (seed, epoch, number), one evaluation, and not what else is asked."""
    config = pixel.PixelConfig(("a", "b", "c"), 1, 4, 8, (1,), 1, (False,))
    denoiser = pixel.build(config, seed=1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter += 0.1 * torch.sin(torch.arange(parameter.numel()).reshape(parameter.shape) * 1.0)
    student = pixel.Pixel(denoiser, config)
    source = caption_source(student, student_generator(denoiser), student.codec, 11, torch.device("cpu"))
    numbers = torch.tensor([2 * REPLICAS + 1, 5, REPLICAS])
    found = source(["c", "a", "b"], numbers, 3)
    z = seeding.normal(11, Stream.SYNTHESIS, 3, numbers, (1, 4, 4))
    with torch.no_grad():
        x = denoiser(denoiser.schedule.start(z), torch.ones(3), {"label": torch.tensor([2, 0, 1])})
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(source(["a"], numbers[1:2], 3), found[1:2], rtol=0, atol=1e-5)
    assert not torch.allclose(source(["a"], numbers[1:2], 4), found[1:2], atol=1e-2)


@pytest.mark.gpu
def test_a_stream_of_its_own_gives_the_same_batches():
    """While the learner keeps the device busy, and writes over what it was given."""

    def source(captions, numbers, epoch):
        return stub(captions, numbers, epoch).cuda()

    learner = torch.randn(2048, 2048, device="cuda")
    for step, batch in enumerate(islice(online(build=lambda: source), 20)):
        for _ in range(20):
            learner = torch.nn.functional.normalize(learner @ learner)
        assert torch.equal(batch.images.cpu(), online().batch(step).images)
        batch.images.zero_()
