"""What a step sees: the same views whatever process, batch or resume; captions and images as they should be."""

import dataclasses
import io
import json
import pickle
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tiny_learners as little
import torch
from PIL import Image
from torchvision.transforms import v2

from dmd import shards
from dmd.batches import Share
from dmd.data.groups import ImageGroups
from dmd.data.images import ImageSet, read_image
from dmd.errors import InputError
from dmd.online import Online
from dmd.represent import augment, sources
from dmd.represent.batches import Prefetched, check_source
from dmd.represent.config import AugmentOptions
from dmd.represent.sources import Fresh, Labelled, Listed, Stored
from dmd.seeding import Stream, bits

CPU = torch.device("cpu")


def member(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((12, 12, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three shards: captions 0 to 10, four images of each, whose grey level is 4 caption + replica."""
    for shard, captions in enumerate((range(5), range(5, 8), range(8, 11))):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for c in captions:
                for r in range(4):
                    facts = {"caption": f"caption {c}", "caption_id": c, "replica": r}
                    member(tar, f"{c:03d}{r}.png", png(4 * c + r))
                    member(tar, f"{c:03d}{r}.json", json.dumps(facts).encode())
    return tmp_path


# ---- sources


def test_the_order_is_that_of_image_groups(folder):
    """The reader that the data set comes with, for two epochs: captions and choice of images."""
    source = Stored(folder, 3, seed=7)
    assert source.count == 11
    theirs = []
    for epoch in range(2):
        theirs += list(ImageGroups(folder, 3, seed=7, epoch=epoch))
    drawn = [source.draw(0, torch.arange(i, i + 2)) for i in range(0, 22, 2)]
    assert [c for d in drawn for c in d.captions] == [item.caption for item in theirs]
    ours = torch.stack([image for d in drawn for image in d.images])
    assert torch.equal(ours, torch.stack([image for item in theirs for image in item.images]))
    label = {c: int(x) for d in drawn for c, x in zip(d.captions, d.labels, strict=True)}
    assert len(set(label.values())) == 11


def test_places_can_be_drawn_in_any_order(folder):
    source = Stored(folder, 2, seed=1)
    whole = source.draw(0, torch.arange(30))
    again = Stored(folder, 2, seed=1)
    for p in (29, 3, 17, 11):
        one = again.draw(5, torch.tensor([p]))
        assert one.captions[0] == whole.captions[p] and torch.equal(one.images[1], whole.images[2 * p + 1])


def test_captions_become_classes_that_are_dense(folder):
    source = Stored(folder, 1, seed=1, classes=True)
    drawn = source.draw(0, torch.arange(22))
    assert source.captions == 11 and sorted(set(drawn.labels.tolist())) == list(range(11))
    number = dict(zip(drawn.captions, drawn.labels.tolist(), strict=True))
    assert [number[c] for c in drawn.captions] == drawn.labels.tolist()


def test_equal_captions_of_two_shards_have_one_label(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for r, caption in enumerate(("the same", f"of {shard}")):
                member(tar, f"{r}.png", png(r))
                member(tar, f"{r}.txt", caption.encode())
    drawn = Stored(tmp_path, 1, seed=0).draw(0, torch.arange(4))
    same = {int(x) for c, x in zip(drawn.captions, drawn.labels, strict=True) if c == "the same"}
    assert len(same) == 1 and len(drawn.labels.unique()) == 3


def test_more_images_than_there_are(folder):
    with pytest.raises(InputError, match="at most 4 images of a caption, and --per-caption asks for 5"):
        Stored(folder, 5, seed=0)


def test_a_broken_image_gives_way_to_another(folder):
    with open(folder / "00001.tar", "r+b") as file:
        data = file.read()
        at = data.index(b"\x89PNG")
        file.seek(at + 8)
        file.write(bytes(20))
    with pytest.raises(InputError, match="1 images are broken"):
        Stored(folder, 3, seed=0).draw(0, torch.arange(33))
    found = Stored(folder, 3, seed=0, max_broken=5).draw(0, torch.arange(11))
    assert len(found.images) == 33
    with pytest.raises(InputError, match="3 whole images of 'caption 5', and 4"):
        Stored(folder, 4, seed=0, max_broken=5).draw(0, torch.arange(11))


def test_shards_of_another_caption_file(tmp_path):
    spec = {"captions": "abc"}
    (tmp_path / shards.MANIFEST).write_text(json.dumps({"spec": spec}))
    sources.require_captions(tmp_path, "abc", "captions.txt")
    with pytest.raises(InputError, match="holds images of other captions than those of --captions captions.txt"):
        sources.require_captions(tmp_path, "abd", "captions.txt")
    with pytest.raises(InputError, match="does not say which captions"):
        sources.require_captions(tmp_path / "nothing", "abd", "captions.txt")


def test_one_caption_only_and_small_epochs(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for r in range(4):
            member(tar, f"{r}.png", png(r))
            member(tar, f"{r}.txt", b"a lonely caption")
    source = Stored(tmp_path, 2, seed=0)
    with pytest.raises(InputError, match="images of one caption only"):
        check_source(source, 1, True)
    with pytest.raises(InputError, match="fewer than --captions-per-batch 8"):
        check_source(source, 8, False)


def test_an_epoch_of_a_labelled_set_has_every_image_once():
    data = little.images(50)
    source = Labelled(data, 3, seed=4)
    assert source.count == 4 * 4  # 13, 13, 12 and 12 images
    number = {bytes(x.numpy().tobytes()): i for i, x in enumerate(data.images)}
    for epoch in range(2):
        drawn = source.draw(0, epoch * source.count + torch.arange(source.count))
        seen = [number[x.numpy().tobytes()] for x in drawn.images]
        assert max(Counter(seen).values()) == 1 and len(seen) == 48
        assert torch.equal(data.labels[seen], drawn.labels.repeat_interleave(3))
        assert drawn.captions == ["abcd"[i] for i in drawn.labels]
    with pytest.raises(InputError, match="no class has more than 13 images"):
        Labelled(data, 14, seed=0)


def test_class_folders_are_drawn_as_the_same_images_in_memory(tmp_path, monkeypatch):
    """And decoded only then, whatever their sizes."""
    data = little.images(20)
    for i, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        folder = tmp_path / "train" / data.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    order = data.labels.argsort(stable=True)
    whole = Labelled(ImageSet(data.images[order], data.labels[order], data.classes), 2, seed=4)
    opened = []
    monkeypatch.setattr(sources, "read_image", lambda file, size: opened.append(file) or read_image(file, size))
    listed = Labelled(Listed.folder(tmp_path, 3, False), 2, seed=4)
    assert not opened and listed.count == whole.count
    for epoch in range(2):
        place = epoch * whole.count + torch.arange(whole.count)
        one, two = whole.draw(0, place), listed.draw(0, place)
        assert one.captions == two.captions and torch.equal(one.labels, two.labels)
        assert all(torch.equal(a, b) for a, b in zip(one.images, two.images, strict=True))
    Image.new("L", (30, 9)).save(tmp_path / "train" / "a" / "grey.png")
    every = Listed.folder(tmp_path, 3, False)
    assert {tuple(x.shape) for x in every.pick(torch.arange(21))} == {tuple(data.shape), (3, 9, 30)}
    assert every.digest() != listed.digest
    with pytest.raises(InputError, match="00.png: it is in colour, but --channels is 1"):
        Listed.folder(tmp_path, 1, False).pick(torch.arange(1))


def test_images_without_classes_are_enough_for_simclr(tmp_path):
    for i in range(5):
        Image.new("RGB", (4 + i, 6), (i, i, i)).save(tmp_path / f"{i}.png")
    source = Labelled(Listed.folder(tmp_path, 1, True), 1, seed=0)
    drawn = source.draw(0, torch.arange(5))
    assert sorted(int(x[0, 0, 0]) for x in drawn.images) == list(range(5)) and len(set(drawn.labels.tolist())) == 5
    assert {x.shape[0] for x in drawn.images} == {1}  # a file in colour that shows none
    with pytest.raises(InputError, match="holds images without labels: put each class into a folder"):
        Listed.folder(tmp_path, 3, False)


def test_absent_and_small_classes_leave_no_hole_in_the_labels():
    """A classifier has an output for each class that is drawn, and no other."""
    labels = torch.tensor([1, 1, 1, 3, 4, 4])
    pixels = (10 * labels).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).to(torch.uint8)
    source = Labelled(ImageSet(pixels, labels, tuple("abcde")), 2, seed=0)
    drawn = source.draw(0, torch.arange(source.count))
    assert source.captions == 2
    assert sorted(zip(drawn.labels.tolist(), drawn.captions, strict=True)) == [(0, "b"), (1, "e")]
    assert {int(image[0, 0, 0]) for image in drawn.images} == {10, 40}


def test_fresh_images_are_those_of_online():
    def build():
        return lambda captions, numbers, epoch: (numbers[:, None, None, None] % 97 / 48.5 - 1).expand(-1, 3, 6, 6)

    def online(**more):
        return Online(build, [f"c{i}" for i in range(7)], 4, 2, seed=3, **more)

    drawn = Fresh(online(), "x").draw(2, torch.arange(8, 12))
    batch = online().batch(2)
    assert drawn.captions == batch.captions and torch.equal(drawn.labels.repeat_interleave(2), batch.labels)
    assert torch.equal(torch.stack(list(drawn.images)).float(), ((batch.images + 1) * 127.5).round())


def test_fresh_images_are_begun_a_step_ahead_and_do_not_depend_on_that():
    """What a step's images are does not depend on the steps before, and no step's are begun twice in a run."""
    begun = []

    @dataclasses.dataclass(eq=False)
    class Noting(Online):
        def begin(self, step):
            begun.append(step)
            return super().begin(step)

    def build():
        return lambda captions, numbers, epoch: (numbers[:, None, None, None] % 97 / 48.5 - 1).expand(-1, 3, 6, 6)

    def online():
        return Noting(build, [f"c{i}" for i in range(7)], 4, 2, seed=3)

    fresh, place = Fresh(online(), "x"), torch.arange(4)
    for step in (0, 1, 2, 7, 2):
        alone = Fresh(online(), "x").draw(step, place)
        del begun[-2:]
        drawn = fresh.draw(step, place)
        assert torch.equal(torch.stack(list(drawn.images)), torch.stack(list(alone.images)))
        assert drawn.captions == alone.captions
    assert begun == [0, 1, 2, 3, 7, 8, 2, 3]


# ---- views


def test_a_view_is_torchvisions_and_depends_on_its_number_alone():
    transform = augment.standard(little.STRONG, 16)
    data = little.images()
    index = torch.tensor([5, 900, 17])
    state = torch.random.get_rng_state()
    found = augment.views(transform, list(data.images[:3]), 9, Stream.VIEW, 4, index)
    assert torch.equal(torch.random.get_rng_state(), state)
    alone = augment.views(transform, [data.images[1]], 9, Stream.VIEW, 4, index[1:2])
    assert torch.equal(found[1], alone[0])
    assert not torch.equal(found[1], augment.views(transform, [data.images[1]], 9, Stream.VIEW, 5, index[1:2])[0])
    halved, quartered = v2.Lambda(lambda x: augment.shrunk(x, 2)), v2.Lambda(lambda x: augment.shrunk(x, 4))
    theirs = v2.Compose([
        v2.RandomApply([v2.RandomChoice([halved, quartered])], 0.3),
        v2.RandomResizedCrop(16, (0.3, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(3, (0.1, 2.0))], 0.5), v2.RandomHorizontalFlip(0.5),
    ])  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(int(bits(9, Stream.VIEW, 4, index[1:2], 1)[0, 0]))
        assert torch.equal(theirs(data.images[1]), alone[0])


def test_without_options_a_view_is_a_crop():
    plain = AugmentOptions(crop_scale=(1.0, 1.0))
    image = little.images().images[0]
    square = augment.views(augment.standard(plain, 20), [image], 0, Stream.VIEW, 0, torch.zeros(1).long())[0]
    assert square.shape == image.shape and len(augment.standard(plain, 20).transforms) == 1


def test_downsampling_keeps_the_size_and_loses_detail():
    image = little.images().images[0]
    small = augment.shrunk(image, 4)
    assert small.shape == image.shape and small.float().std() < 0.8 * image.float().std()


def test_masks_hide_the_part_asked_for():
    index = torch.arange(400)
    found = augment.masks(3, 1, index, (4, 6), 0.5, 0.25)
    counts = found.sum(1)
    assert set(counts.tolist()) == {0, 6} and 160 < int((counts > 0).sum()) < 240
    assert torch.equal(found[37:40], augment.masks(3, 1, index[37:40], (4, 6), 0.5, 0.25))
    share = found[counts > 0].float().mean(0)
    assert share.min() > 0.15 and share.max() < 0.35  # everywhere alike


@pytest.mark.parametrize("make", [little.view_batches, little.crop_batches])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_views_of_one(make, world):
    whole = make()(3)
    parts = [make(Share(rank, world))(3) for rank in range(world)]
    if make is little.view_batches:
        rows = [torch.stack(p.images.split(8 // world)) for p in parts]
        assert torch.equal(torch.cat(rows, 1).flatten(0, 1), whole.images)
        assert torch.equal(torch.cat([p.labels.reshape(3, -1) for p in parts], 1).flatten(), whole.labels)
    else:
        assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
        local = [p.local.unflatten(0, (2, -1)) for p in parts]
        assert torch.equal(torch.cat(local, 1).flatten(0, 1), whole.local)
        assert torch.equal(torch.cat([p.mask for p in parts]), whole.mask)
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)


def test_views_of_one_label_are_of_one_caption_or_image():
    """A source whose images are their own numbers, and no augmentation."""
    data = ImageSet(torch.arange(60).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous(),
                    torch.arange(60) % 5, tuple("abcde"))  # fmt: skip
    plain = augment.standard(AugmentOptions(crop_scale=(1.0, 1.0)), 4)
    source = Labelled(data, 3, seed=0)
    made = replace(little.view_batches(m=3), source=source, transform=plain, tokenizer=None)(0)
    shown = made.images[:, 0, 0, 0]
    assert torch.equal(shown % 5, made.labels) and len(shown.unique()) == 24  # three different images of each
    crops = replace(
        little.view_batches(m=1, crops=2, instances=True), source=Labelled(data, 1, 0), transform=plain, tokenizer=None
    )(0)
    shown = crops.images[:, 0, 0, 0]
    assert torch.equal(shown[:8], shown[8:]) and torch.equal(crops.labels[:8], crops.labels[8:])
    assert len(shown.unique()) == len(crops.labels.unique()) == 8


def test_batches_that_do_not_divide():
    with pytest.raises(InputError, match="--captions-per-batch 8 is not divisible by 3 processes"):
        little.view_batches(Share(1, 3))(0)


def test_workers_make_the_same_batches():
    batches = pickle.loads(pickle.dumps(little.view_batches()))  # as for processes that are not forked
    with_workers = Prefetched(batches, 2, 9, CPU)
    for step in (0, 1, 2, 7, 8, 3):
        found, expected = with_workers(step), batches(step).to(CPU)
        assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)
    assert found.images.dtype == torch.float32 and -1 <= found.images.min() < found.images.max() <= 1
