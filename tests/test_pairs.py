"""The pair store: resumed, repaired and shared among workers, it holds the same pairs bit for bit."""

import dataclasses
import json

import pytest
import torch

from dmd import pairs, seeding
from dmd.data.images import to_uint8
from dmd.errors import InputError
from dmd.pairs import ImageSpec, PairSpec
from dmd.seeding import Stream

SPEC = PairSpec(
    teacher="abc", solver="heun", steps=3, guidance=1.5, seed=9, conditions=4, prompts="abcd", shape=(1, 2, 2),
    count=23, shard_size=5,
)  # fmt: skip


def teacher(z, condition):
    """Images that depend on noise and condition, exact in float16 after rounding once."""
    return torch.tanh(z) * 0.5 + 0.1 * condition[:, None, None, None]


class Noting:
    """The teacher, noting the shards' sizes."""

    def __init__(self):
        self.sizes = []

    def __call__(self, z, condition):
        self.sizes.append(len(z))
        return teacher(z, condition)


def make(folder, shards=None, sample=teacher, spec=SPEC):
    counts = list(pairs.make(folder, spec, pairs.missing(folder, spec) if shards is None else shards, sample))
    pairs.finish(folder, spec)
    return counts


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_pairs_are_the_teachers_images_of_their_own_noise(tmp_path):
    """Noise and conditions are not read from the disk: they are re-derived from seed and index."""
    assert make(tmp_path) == [5, 5, 5, 5, 3]
    index = torch.tensor([0, 22, 7, 7, 14])
    y, condition = pairs.Pairs(tmp_path, SPEC)[index]
    z = SPEC.noise(index)
    assert torch.equal(z, seeding.normal(9, Stream.PAIR, 0, index, (1, 2, 2)))
    assert torch.equal(condition, seeding.integers(9, Stream.PAIR_LABEL, 0, index, 4))
    torch.testing.assert_close(y, teacher(z, condition), rtol=2.0**-11, atol=2.0**-14)
    assert y.dtype == torch.float32 and len(pairs.Pairs(tmp_path, SPEC)) == 23


def test_an_interrupted_maker_goes_on_where_it_stopped(tmp_path):
    make(tmp_path / "whole")
    maker = pairs.make(tmp_path / "cut", SPEC, pairs.missing(tmp_path / "cut", SPEC), teacher)
    next(maker), next(maker)
    maker.close()
    assert pairs.missing(tmp_path / "cut", SPEC) == [2, 3, 4]
    assert make(tmp_path / "cut") == [5, 5, 3]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_two_workers_make_what_one_makes(tmp_path):
    make(tmp_path / "one")
    for worker in (1, 0):
        list(pairs.make(tmp_path / "two", SPEC, pairs.missing(tmp_path / "two", SPEC)[worker::2][:5], teacher))
    list(pairs.make(tmp_path / "two", SPEC, pairs.missing(tmp_path / "two", SPEC), teacher))
    pairs.finish(tmp_path / "two", SPEC)
    assert files(tmp_path / "two") == files(tmp_path / "one")


def alter(path):
    """One bit of the last image: the file still reads."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [alter, truncate, remove])
@pytest.mark.parametrize("name", ["00002.safetensors", "00002.json"])
def test_only_the_damaged_shard_is_made_again(tmp_path, damage, name):
    make(tmp_path)
    before = files(tmp_path)
    damage(tmp_path / name)
    assert pairs.missing(tmp_path, SPEC) == [2]
    with pytest.raises(InputError, match="lacks 1 of 5 pair shards, first 00002"):
        pairs.Pairs(tmp_path, SPEC)
    noting = Noting()
    make(tmp_path, sample=noting)
    assert noting.sizes == [5]
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [("teacher", "other"), ("steps", 4), ("guidance", 2.0), ("seed", 10), ("shape", (1, 4, 4)), ("count", 24)],
)
def test_pairs_of_another_kind_are_refused_by_name(tmp_path, field, value):
    make(tmp_path)
    other = dataclasses.replace(SPEC, **{field: value})
    for use in (pairs.missing, pairs.Pairs):
        with pytest.raises(
            InputError, match=f"holds pairs with {field} = .*{value!r}".replace("(", ".").replace(")", ".")
        ):
            use(tmp_path, other)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"spec": 3}'])
def test_a_damaged_manifest_is_one_sentence(tmp_path, text):
    make(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="manifest.json is damaged: remove the folder"):
        pairs.missing(tmp_path, SPEC)


def test_the_manifest_lists_every_shard_with_its_checksum(tmp_path):
    import hashlib

    make(tmp_path)
    table = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    assert {name: facts["sha256"] for name, facts in table.items()} == {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.glob("*.safetensors")
    }


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_images_that_are_not_finite_are_not_stored(tmp_path, value):
    """1e6 is infinite in float16."""
    calls = []

    def diverging(z, condition):
        calls.append(len(z))
        return teacher(z, condition) if len(calls) == 1 else torch.full_like(z, value)

    maker = pairs.make(tmp_path, SPEC, [0, 1], diverging)
    next(maker)
    with pytest.raises(ArithmeticError, match="shard 1 are not finite"):
        next(maker)
    assert pairs.missing(tmp_path, SPEC) == [1, 2, 3, 4]


def test_noise_of_a_pair_does_not_depend_on_how_many_there_are():
    """A longer store begins with the shorter one's pairs, whatever the shard size."""
    longer = dataclasses.replace(SPEC, count=1000, shard_size=100)
    index = SPEC.indices(4)
    assert index.tolist() == [20, 21, 22]
    assert torch.equal(SPEC.noise(index), longer.noise(longer.indices(0))[20:23])
    assert torch.equal(SPEC.condition(index), longer.condition(longer.indices(0))[20:23])


# ---- images of pairs -----------------------------------------------------------------------------------------------

IMAGES = ImageSpec(SPEC, "decoder", "uint8")


def decode(y):
    """Images of twice the side, some beyond what bytes can hold."""
    return 1.5 * torch.sin(3.0 * y).repeat_interleave(2, -1).repeat_interleave(2, -2)


def make_images(folder, store, shards=None, decode=decode, spec=IMAGES):
    shards = pairs.missing(folder, spec) if shards is None else shards
    counts = list(pairs.make_images(folder, spec, shards, store, decode, to_uint8))
    pairs.finish(folder, spec)
    return counts


def test_images_are_what_the_pairs_decode_to(tmp_path):
    make(tmp_path)
    store = pairs.Pairs(tmp_path, SPEC)
    assert make_images(tmp_path / "images", store) == [5, 5, 5, 5, 3]
    index = torch.tensor([0, 22, 7, 7, 14])
    found = pairs.Images(tmp_path / "images", IMAGES)[index]
    expected = decode(store[index][0]).clamp(-1, 1)
    assert found.dtype == torch.uint8 and (expected.abs() == 1).any()
    assert (found / 127.5 - 1 - expected).abs().max() <= 0.5 / 127.5 + 1e-6


def test_images_are_resumed_repaired_and_checked(tmp_path):
    make(tmp_path)
    store, folder = pairs.Pairs(tmp_path, SPEC), tmp_path / "images"
    make_images(tmp_path / "whole", store)
    maker = pairs.make_images(folder, IMAGES, pairs.missing(folder, IMAGES), store, decode, to_uint8)
    next(maker), next(maker)
    maker.close()
    with pytest.raises(InputError, match="lacks 3 of 5 pair shards, first 00002"):
        pairs.Images(folder, IMAGES)
    damaged = folder / "00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    assert pairs.missing(folder, IMAGES) == [1, 2, 3, 4]
    make_images(folder, store)
    assert files(folder) == files(tmp_path / "whole")
    with pytest.raises(InputError, match="holds pairs with decoder = 'decoder', but 'another' is asked for"):
        pairs.missing(folder, dataclasses.replace(IMAGES, decoder="another"))


def test_images_that_are_not_finite_do_not_become_bytes(tmp_path):
    make(tmp_path)
    store = pairs.Pairs(tmp_path, SPEC)
    with pytest.raises(ArithmeticError, match="not finite"):
        make_images(tmp_path / "images", store, decode=lambda y: decode(y) / 0.0)
    assert not list((tmp_path / "images").glob("*.safetensors"))
