"""Images without captions: all layouts give the same, nothing beside them is opened, bad ones are refused."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmd.batches import Share
from dmd.clipgen import images, world
from dmd.clipgen.batches import CaptionBatches, ImageBatches, TokenBatches
from dmd.clipgen.gap import Gap
from dmd.data import captioned, shapes
from dmd.errors import InputError

REAL = Path(os.environ.get("DMD_TEST_DATA", "/nowhere"))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)


def png(array):
    held = io.BytesIO()
    Image.fromarray(array).save(held, format="PNG")
    return held.getvalue()


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, pixels):
    """The same five images as a nested folder, as shards and as an .npz; all with captions that cannot be read."""
    root = tmp_path_factory.mktemp("layouts")
    (root / "folder" / "b").mkdir(parents=True)
    (root / "shards").mkdir()
    for i, image in enumerate(pixels):
        place = root / "folder" / ("b" if i > 2 else "") / f"{i}.png"
        place.write_bytes(png(image))
        place.with_suffix(".txt").write_bytes(b"\xff\xfe no text")
    (root / "folder" / "metadata.jsonl").write_text("{ not json")
    for k, rows in enumerate((range(3), range(3, 5))):
        with tarfile.open(root / "shards" / f"{k}.tar", "w") as archive:
            for i in rows:
                for name, content in ((f"{i}.png", png(pixels[i])), (f"{i}.txt", b"\xff"), (f"{i}.json", b"{")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    np.savez(root / "images.npz", images=pixels, captions=np.array([None], dtype=object))
    return root


@pytest.mark.parametrize("name", ["folder", "shards", "images.npz"])
def test_all_layouts_give_the_same_images(layouts, pixels, name):
    opened = []
    listen = [True]
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if listen[0] and event == "open" else None)
    found = images.read(layouts / name, 12)
    listen[0] = False
    assert torch.equal(found, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    touched = {p for p in opened if str(layouts) in p}
    assert touched and all(p.endswith((".png", ".tar", ".npz")) for p in touched)


def test_other_sizes_are_scaled_and_cut_to_the_middle():
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    fitted = images.fit(wide, 20)
    assert fitted.shape == (20, 20, 3)
    assert np.abs(fitted[:, 6:-6].astype(int) - 200).max() <= 2  # the middle square; at its ends Lanczos rings
    grey = images.fit(np.full((8, 8, 1), 7, dtype=np.uint8), 8)
    assert grey.shape == (8, 8, 3) and (grey == 7).all()
    tall = np.random.default_rng(1).integers(0, 256, (16, 8, 3), dtype=np.uint8)
    assert np.array_equal(images.fit(tall, 8), tall[4:12])


def test_bad_input_gets_a_sentence(tmp_path, layouts):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no image: give a folder of images"):
        images.read(tmp_path / "empty", 8)
    with pytest.raises(InputError, match="does not exist"):
        images.read(tmp_path / "nowhere", 8)
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 4, 4, 3)))
    with pytest.raises(InputError, match="must be uint8"):
        images.read(tmp_path / "floats.npz", 8)
    np.savez(tmp_path / "pickle.npz", images=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="not a readable .npz"):
        images.read(tmp_path / "pickle.npz", 8)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(png(np.zeros((4, 4, 3), dtype=np.uint8))[:40])
    with pytest.raises(InputError, match=r"a\.png is not a readable"):
        images.read(tmp_path / "broken", 4)
    whole = (layouts / "shards" / "0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    with pytest.raises(InputError, match=r"cut\.tar"):
        images.read(tmp_path / "cut.tar", 12)
    (tmp_path / "damaged.tar").write_bytes(
        whole.replace(b"1.png", b"\1.png", 1)
    )  # the fourth header's checksum is wrong
    with pytest.raises(InputError, match=r"damaged\.tar is not a whole \.tar file: byte \d+ begins no member"):
        images.read(tmp_path / "damaged.tar", 12)


def test_batches_are_pure_and_shared_out(pixels):
    """Two processes together see what one sees; a step's batch is the same whenever it is asked for."""
    held = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    whole = ImageBatches(3, held, 8, Share())
    parts = [ImageBatches(3, held, 8, Share(rank, 2)) for rank in range(2)]
    assert torch.equal(whole(5)[0], torch.cat([p(5)[0] for p in parts]))
    assert not torch.equal(whole(5)[0], whole(6)[0])
    tokens, e = torch.arange(20).reshape(5, 4), torch.nn.functional.normalize(torch.randn(5, 6), dim=-1)
    gap = Gap(e.mean(0), None, 0.3)
    one = TokenBatches(3, tokens, e, gap, 64, Share(), 0.25)(2)[0]
    two = [TokenBatches(3, tokens, e, gap, 64, Share(rank, 2), 0.25)(2)[0] for rank in range(2)]
    for name in ("tokens", "condition", "embedding", "dropped"):
        assert torch.equal(getattr(one, name), torch.cat([getattr(b, name) for b in two])), name
    rows = one.tokens[:, 0] // 4
    assert torch.equal(one.embedding, e[rows]) and torch.equal(one.tokens, tokens[rows])
    assert 4 <= int(one.dropped.sum()) <= 30


def test_captioned_rows_come_in_blocks(pixels):
    held = torch.from_numpy(pixels[:4]).permute(0, 3, 1, 2).contiguous()
    number = torch.arange(4)
    batch = CaptionBatches(1, held, number[:, None], number, 2, 16, Share())(0)[0]
    assert (batch.caption[0::2] % 2 == 0).all() and torch.equal(batch.caption[1::2], batch.caption[0::2] + 1)
    assert torch.equal(batch.tokens[:, 0], batch.caption) and len(batch.caption.unique()) == 4


def test_neighbours_differ_in_one_word(rng):
    """Captions of a scene and its neighbour have the same words but one (or, of a relation, a pair)."""
    found = world.captioned(0, 400)
    assert len(found) == 400
    kinds = set()
    for k in range(0, 400, 2):
        a, b = (found.captions[i].replace("left of", "left-of").replace("right of", "right-of") for i in (k, k + 1))
        a, b = ([w for w in text.split() if w not in ("at", "the", "in")] for text in (a, b))
        assert len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1
        kinds |= {x for x, y in zip(a, b, strict=True) if x != y}
        assert not torch.equal(found.images[k], found.images[k + 1])
        assert not any(shapes.held_out(shapes.parse(found.captions[i])) for i in (k, k + 1))
    assert kinds & set(shapes.SHAPES) and kinds & set(shapes.COLOURS) and kinds & set(shapes.SIZES)
    assert kinds & set(shapes.PLACES) and kinds & {"above", "below", "left-of", "right-of"}


def test_pairs_of_unlike_shapes_come_most_often():
    """Three times as often as each other kind; a thing has a shape, a colour and in half of the scenes a size."""
    found = [shapes.parse(text) for text in world.captioned(0, 4000).captions]
    things = [(a.things, b.things) for a, b in zip(found[0::2], found[1::2], strict=True)]
    shape = sum(any(x.shape != y.shape for x, y in zip(a, b, strict=True)) for a, b in things) / len(things)
    colour = sum(any(x.colour != y.colour for x, y in zip(a, b, strict=True)) for a, b in things) / len(things)
    assert shape == pytest.approx(3 * colour, rel=0.15)


def test_no_split_shares_a_drawing():
    """Tokenizer and transformer, the small CLIP, and the judges see other indices; held-out pairs are the judges'."""
    assert 10**9 < world.CAPTIONED < world.UNSEEN - 10**9
    _, taught = world.drawings(0, 0, 300, "train")
    _, unseen = world.drawings(0, world.UNSEEN, 100, "test")
    assert not any(shapes.held_out(s) for s in taught) and all(shapes.held_out(s) for s in unseen)


@pytest.mark.skipif(not (REAL / "unpack.py").is_file(), reason="DMD_TEST_DATA does not name a folder of real data")
def test_real_pictures_are_read_with_and_without_their_captions(tmp_path):
    """The layout of the emoji preset: the same pixels for those who read captions and for those who do not."""
    command = [sys.executable, str(REAL / "unpack.py"), "emoji64", str(tmp_path), "--limit", "12"]
    subprocess.run(command, check=True, capture_output=True)
    for split in ("train", "test"):
        found = captioned.load(tmp_path / split, 64)
        assert torch.equal(images.read(tmp_path / split, 64), found.images) and len(found) == 12
    assert images.digest(images.read(tmp_path / "train", 64)) != images.digest(images.read(tmp_path / "test", 64))
