"""Sampling: transformers' own cuts, the model's own distribution, and independence of the batch."""

import little
import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dmd import seeding
from dmd.clipgen import sampling
from dmd.clipgen.sampling import Sampler, choose, probabilities
from dmd.seeding import Stream


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("top_k", [0, 1, 5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_probabilities_are_those_of_transformers(rng, temperature, top_k, top_p):
    logits = 2 * torch.randn(6, 40, generator=rng)
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    got = probabilities(logits, Sampler(temperature, top_k, top_p))
    torch.testing.assert_close(got.float(), expected.softmax(-1), rtol=1e-5, atol=1e-7)


def test_choices_follow_the_probabilities():
    """Evenly spaced numbers fall on each token as often as its probability says; tokens without are never chosen."""
    p = torch.tensor([0.0, 0.25, 0.0, 0.6, 0.15, 0.0], dtype=torch.float64)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    found = choose(p.expand(1000, -1), uniform)
    assert found.bincount(minlength=6).tolist() == [0, 250, 0, 600, 150, 0]
    ends = choose(p.expand(2, -1), torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64))
    assert ends.tolist() == [1, 4]


def naive(net, condition, seed, sampler, candidate):
    """One image, token by token, each from a full pass without a cache."""
    length = net.config.length
    u = seeding.as_uniform(seeding.bits(0, Stream.TOKEN, candidate, torch.tensor([seed]), length))[0]
    tokens = torch.zeros(1, length, dtype=torch.int64)
    for t in range(length):
        cond = net(condition[None], tokens)[0, t].double()
        bare = net(condition[None], tokens, torch.tensor([True]))[0, t].double()
        p = ((bare + sampler.guidance * (cond - bare)) / sampler.temperature).softmax(-1)
        total, tokens[0, t] = 0.0, len(p) - 1
        for k, part in enumerate(p.tolist()):
            total += part
            if u[t].item() < total:
                tokens[0, t] = k
                break
    return tokens[0]


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0, 0.0])
def test_tokens_are_those_of_a_naive_loop(rng, guidance):
    net, sampler = little.transformer(), Sampler(temperature=0.8, guidance=guidance)
    condition, seeds = torch.randn(3, 6, generator=rng), torch.tensor([0, 2**40 + 1, 7])
    got = sampling.tokens(net, condition, seeds, sampler, candidate=2)
    for row, seed in enumerate(seeds.tolist()):
        assert torch.equal(got[row], naive(net, condition[row], seed, sampler, 2))


def test_an_image_does_not_depend_on_its_batch(rng):
    net, sampler = little.transformer(), Sampler(guidance=2.0, top_p=0.95)
    condition, seeds = torch.randn(7, 6, generator=rng), torch.arange(7)
    make = lambda e, s: sampling.tokens(net, e, s, sampler)  # noqa: E731
    whole = sampling.in_units(make, condition, seeds, 7)
    assert torch.equal(sampling.in_units(make, condition, seeds, 3), whole)
    assert torch.equal(sampling.in_units(make, condition.flip(0), seeds.flip(0), 3).flip(0), whole)
    assert torch.equal(sampling.in_units(make, condition[4:5], seeds[4:5], 64)[0], whole[4])
    assert not torch.equal(sampling.in_units(make, condition[4:5], seeds[5:6], 64)[0], whole[4])


def test_candidates_are_other_tries_and_the_nearest_is_kept(rng):
    net, sampler = little.transformer(), Sampler()
    condition, seeds = torch.randn(4, 6, generator=rng), torch.arange(4)
    tries = torch.stack([sampling.tokens(net, condition, seeds, sampler, c) for c in range(3)])
    assert not torch.equal(tries[0], tries[1]) and not torch.equal(tries[1], tries[2])
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.3, 0.8, 0.5, 0.1], [0.2, 0.7, 0.6, 0.2]])
    assert sampling.rerank(scores).tolist() == [1, 0, 2, 0]
