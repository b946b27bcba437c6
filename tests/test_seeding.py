"""Philox against its published answers and a scalar re-implementation; draws against their distributions."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd import seeding
from dmd.seeding import Stream

FULL = 0xFFFFFFFF


def scalar_philox(counter, key):
    """Philox-4x32-10 with Python's integers, as Salmon et al. 2011 write it."""
    c, k = list(counter), list(key)
    for r in range(10):
        if r:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 // 2**32) ^ c[1] ^ k[0], p1 % 2**32, (p0 // 2**32) ^ c[3] ^ k[1], p0 % 2**32]
    return c


def run_philox(counter, key):
    words = seeding.philox(tuple(torch.tensor([c]) for c in counter), key)
    return [int(w) for w in words]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers_of_random123(counter, key, answer):
    assert run_philox(counter, key) == list(answer)
    assert scalar_philox(counter, key) == list(answer)


word = st.integers(0, FULL)


@settings(max_examples=60, deadline=None)
@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_philox_equals_scalar_implementation(counter, key):
    assert run_philox(counter, key) == scalar_philox(counter, key)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.sampled_from(Stream),
    step=word,
    index=st.integers(0, 2**56 - 1),
    count=st.integers(1, 11),
)
def test_bits_layout(seed, stream, step, index, count):
    """Counter: block, low index, step, high index and stream; key: low and high half of the seed."""
    expected = []
    for block in range(math.ceil(count / 4)):
        high = (index >> 32) * 256 + stream.value
        expected += scalar_philox((block, index % 2**32, step, high), (seed % 2**32, seed // 2**32))
    assert seeding.bits(seed, stream, step, torch.tensor([index]), count)[0].tolist() == expected[:count]


def test_several_streams_are_each_stream_stacked():
    index, streams = torch.tensor([0, 9, 2**40 + 3]), (Stream.START, Stream.MATCH_NOISE, Stream.DATA)

    def same(draw):
        return torch.equal(draw(streams), torch.stack([draw(s) for s in streams]))

    assert same(lambda s: seeding.bits(5, s, 2, index, 7))
    assert same(lambda s: seeding.uniform(5, s, 2, index))
    assert same(lambda s: seeding.integers(5, s, 2, index, 10))
    assert same(lambda s: seeding.normal(5, s, 2, index, (3, 5, 5)))


def test_normal_is_box_muller_of_the_bits():
    index = torch.arange(5)
    words = seeding.bits(3, Stream.PAIR, 7, index, 6).numpy().astype(np.float64)
    u1 = (np.floor(words[:, 0::2] / 256) + 0.5) / 2**24
    u2 = np.floor(words[:, 1::2] / 256) / 2**24
    radius = np.sqrt(-2 * np.log(u1))
    expected = np.stack((radius * np.cos(2 * np.pi * u2), radius * np.sin(2 * np.pi * u2)), axis=-1).reshape(5, 6)
    got = seeding.normal(3, Stream.PAIR, 7, index, (5,)).numpy()
    np.testing.assert_allclose(got, expected[:, :5], atol=2e-6)


@pytest.mark.parametrize("shape", [(1,), (3, 5, 5), (3, 8, 8)])
def test_a_sample_does_not_depend_on_batch_or_order(shape):
    index = torch.cat((torch.arange(61), torch.tensor([2**40 + 3, 2**56 - 1])))
    whole = seeding.normal(5, Stream.START, 9, index, shape)
    one_by_one = torch.cat([seeding.normal(5, Stream.START, 9, i[None], shape) for i in index])
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole, one_by_one)
    assert torch.equal(whole[order], seeding.normal(5, Stream.START, 9, index[order], shape))
    assert torch.equal(whole[7:20], seeding.normal(5, Stream.START, 9, index[7:20], shape))


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    seeding.normal(0, Stream.START, 0, torch.arange(4), (3,))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("what", ["seed", "step", "stream", "index", "seed_high", "index_high"])
def test_each_coordinate_gives_an_independent_sequence(what):
    """Correlation below 5 standard errors, and no equal words; 2^32 apart is what a 32-bit seed would confuse."""
    n, index = 40_000, torch.arange(40_000)
    base = {"seed": 11, "stream": Stream.START, "step": 4, "index": index}
    other = {
        "seed": {"seed": 12},
        "step": {"step": 5},
        "stream": {"stream": Stream.MATCH_NOISE},
        "index": {"index": index + n},
        "seed_high": {"seed": 11 + 2**32},
        "index_high": {"index": index + 2**32},
    }[what]
    a = seeding.normal(**base, shape=(1,))[:, 0].double()
    b = seeding.normal(**{**base, **other}, shape=(1,))[:, 0].double()
    assert abs((a * b).mean()) < 5 / math.sqrt(n)
    assert abs((a.square() * b.square()).mean() - 1) < 5 * math.sqrt(8 / n)
    assert (a == b).double().mean() < 1e-3


def test_components_of_one_sample_are_independent():
    """Covariance of four components, of which two come from one Box-Muller pair, is the identity."""
    x = seeding.normal(1, Stream.START, 0, torch.arange(40_000), (4,)).double()
    covariance = x.T @ x / len(x)
    assert (covariance - torch.eye(4)).abs().max() < 5 * math.sqrt(2 / len(x))


def test_all_streams_differ_pairwise():
    index = torch.arange(4000)
    u = torch.stack([seeding.uniform(0, s, 0, index) for s in Stream]).double()
    correlation = torch.corrcoef(u).fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / math.sqrt(4000)


def test_normal_and_uniform_pass_kolmogorov_smirnov():
    index = torch.arange(20_000)
    for seed in (0, 2**63 + 17):
        normal = seeding.normal(seed, Stream.START, 1, index, (3,)).flatten().numpy()
        uniform = seeding.uniform(seed, Stream.MATCH_TIME, 1, index).numpy()
        assert scipy.stats.kstest(normal, "norm").pvalue > 1e-3
        assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_uniform_is_the_upper_23_bits_and_a_half():
    index = torch.arange(2000)
    words = seeding.bits(0, Stream.LABEL, 0, index, 1)[:, 0].tolist()
    u = seeding.uniform(0, Stream.LABEL, 0, index)
    assert u.tolist() == [(w // 512 + 0.5) / 2**23 for w in words]


def test_extreme_bits_stay_finite(monkeypatch):
    """All-zero and all-one words are the ends of Box-Muller's logarithm."""
    for word in (0, FULL):
        monkeypatch.setattr(seeding, "bits", lambda *a, word=word: torch.full((1, 4), word))
        x = seeding.normal(0, Stream.START, 0, torch.arange(1), (4,))
        assert bool(torch.isfinite(x).all())
        assert float(x.abs().max()) <= math.sqrt(-2 * math.log(2**-25)) + 1e-5
        assert 0.0 < float(seeding.uniform(0, Stream.START, 0, torch.arange(1))) < 1.0


@pytest.mark.parametrize("high", [2, 10, 1000])
def test_integers_are_uniform(high):
    x = seeding.integers(0, Stream.LABEL, 3, torch.arange(50_000), high)
    counts = torch.bincount(x, minlength=high).numpy()
    assert len(counts) == high  # none beyond
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_a_single_choice_is_always_taken():
    assert seeding.integers(0, Stream.LABEL, 0, torch.arange(100), 1).tolist() == [0] * 100


@pytest.mark.parametrize(
    ("seed", "step", "named"),
    [(-1, 0, "seed -1"), (2**64, 0, f"seed {2**64}"), (0, -1, "step -1"), (0, 2**32, f"step {2**32}")],
)
def test_numbers_out_of_range_are_refused(seed, step, named):
    with pytest.raises(ValueError, match=named):
        seeding.bits(seed, Stream.START, step, torch.arange(1), 1)


def test_contract_on_disk():
    """Pairs and seeds that users hold stay what they were: stream numbers and values may never change."""
    assert {s.name: s.value for s in Stream if s.value <= 13} == {
        "SAMPLE": 0, "PAIR": 1, "PAIR_LABEL": 2, "PAIR_CHOICE": 3, "START": 4, "LABEL": 5, "MATCH_TIME": 6,
        "MATCH_NOISE": 7, "CRITIC_TIME": 8, "CRITIC_NOISE": 9, "DATA": 10, "TEACH_TIME": 11, "TEACH_NOISE": 12,
        "CONDITION_DROPOUT": 13,
    }  # fmt: skip
    assert len({s.value for s in Stream}) == len(Stream.__members__)
    got = seeding.normal(42, Stream.SAMPLE, 0, torch.tensor([0, 7]), (3,))
    golden = [[-0.97018987, 0.19401889, -1.23562026], [-0.59763247, 0.40132973, -0.51159030]]
    torch.testing.assert_close(got, torch.tensor(golden), rtol=0, atol=2e-6)
