"""The conditional transformer: causal, cached as uncached, able to learn a batch, exact in resuming with dropout."""

from dataclasses import replace

import little
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from dmd.clipgen import transformer
from dmd.clipgen.transformer import Modelling, TokenBatch, embedding_loss
from dmd.ema import Ema
from dmd.errors import InputError
from dmd.run import clip_and_check


@pytest.fixture
def batch(rng):
    tokens = torch.randint(0, 11, (5, 9), generator=rng)
    e = F.normalize(torch.randn(5, 6, generator=rng), dim=-1)
    return TokenBatch(tokens, e, e, torch.tensor([False, False, True, False, False]))


def task(config=little.SHAPE, weight=0.0, reembed=None, lr=1e-2, muon=False):
    net = little.transformer(config)
    optimizers = transformer.optimizers(net, lr, 0.0, muon)
    return Modelling(net, optimizers, Ema(net, 0.9), weight, reembed or (lambda m: m), 1.0, clip_and_check, seed=3)


@torch.no_grad()
@pytest.mark.parametrize("prefix", [1, 3])
def test_the_cache_changes_no_logit(batch, prefix):
    net = little.transformer(replace(little.SHAPE, prefix=prefix))
    full = net(batch.condition, batch.tokens, batch.dropped)
    logits, past = net.start(net.prefix(batch.condition, batch.dropped))
    steps = [logits]
    for t in range(8):
        logits, past = net.following(batch.tokens[:, t], past)
        steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, dim=1), full, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("t", "prefix"), [(0, 1), (4, 1), (8, 1), (4, 3)])
def test_a_token_is_told_by_the_condition_and_those_before_it(batch, t, prefix):
    net = little.transformer(replace(little.SHAPE, prefix=prefix))
    before = net(batch.condition, batch.tokens)
    other = batch.tokens.clone()
    other[:, t:] = (other[:, t:] + 1) % 11
    after = net(batch.condition, other)
    torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=1e-6)
    if t < 8:
        assert (after[:, t + 1 :] - before[:, t + 1 :]).abs().amax() > 1e-3
    assert (net(-batch.condition, batch.tokens) - before).abs().amax(dim=(0, 2)).min() > 1e-4


@torch.no_grad()
def test_without_a_condition_all_rows_are_alike(batch):
    net = little.transformer()
    nothing = torch.ones(5, dtype=torch.bool)
    same = batch.tokens[:1].expand(5, -1)
    logits = net(batch.condition, same, nothing)
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("muon", "lr", "steps"), [(False, 1e-2, 150), (True, 3e-3, 400)])
def test_it_overfits_one_batch(batch, muon, lr, steps):
    trained = task(lr=lr, muon=muon)
    first = trained.step(0, [batch])["loss/tokens"]
    for step in range(1, steps):
        last = trained.step(step, [batch])
    assert first > 2.0 and last["loss/tokens"] < 0.02 and last["right"] == 1.0


def test_every_weight_has_one_optimizer_and_muon_the_matrices_of_the_layers():
    net = little.transformer()
    names = {id(p): name for name, p in net.named_parameters()}
    for muon in (False, True):
        found = transformer.optimizers(net, 1e-2, 0.1, muon)
        owned = [names[id(p)] for o in found.values() for g in o.param_groups for p in g["params"]]
        assert sorted(owned) == sorted(names.values())
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    layers = {names[id(p)] for g in found["layers"].param_groups for p in g["params"]}
    assert layers == {f"gpt.h.{i}.{part}.weight" for i in range(2) for part in parts}


def test_a_step_of_muon_is_as_large_as_one_of_adamw(batch):
    """0.2 times the rate for a number of a matrix in the mean square, so that AdamW's rate serves (Liu et al. 2025).
    Newton and Schulz's five iterations make singular values of 0.7 to 1.2."""
    trained = task(muon=True)
    weights = trained.optimizers()["layers"].param_groups[0]["params"]
    before = [w.detach().clone() for w in weights]
    trained.step(0, [batch])
    moved = [(w.detach() - b).square().mean().sqrt().item() for w, b in zip(weights, before, strict=True)]
    assert len(moved) == 8 and all(0.5 * 0.2e-2 < m < 1.3 * 0.2e-2 for m in moved), moved


@torch.no_grad()
def test_tokens_of_like_codes_are_learnt_together(rng):
    """The own part of a vector is the token's; the rest is a function of its code."""
    vectors = transformer.CodeVectors(little.SHAPE)
    codes = F.normalize(torch.randn(11, 4, generator=rng), dim=-1)
    codes[7] = codes[2]
    first, _, last = vectors.shared
    x = 2.0 * codes  # unit variance: the root of four numbers
    shared = F.gelu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    found = vectors(codes)
    torch.testing.assert_close(found, vectors.own + 0.1 * shared, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[7] - found[2], vectors.own[7] - vectors.own[2], rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_negative_log_probability(batch):
    trained = task()
    with torch.no_grad():
        log_p = trained.net.eval()(batch.condition, batch.tokens, batch.dropped).log_softmax(-1)
    values = [-log_p[i, t, int(batch.tokens[i, t])].item() for i in range(5) for t in range(9)]
    trained.net.train()
    assert trained.step(0, [batch])["loss/tokens"].item() == pytest.approx(sum(values) / 45, rel=1e-5)


def test_micro_batches_add_up(batch):
    whole, parted = task(), task()
    halves = [
        TokenBatch(*(getattr(batch, f)[rows] for f in ("tokens", "condition", "embedding", "dropped")))
        for rows in (slice(0, 2), slice(2, 4))
    ]
    both = TokenBatch(*(torch.cat([getattr(h, f) for h in halves]) for f in vars(batch)))
    a, b = whole.step(0, [both]), parted.step(0, halves)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for p, q in zip(whole.net.parameters(), parted.net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_the_embedding_loss_looks_at_the_likeliest_tokens(rng):
    """Its value is that of the hard tokens, its gradient that of their probabilities."""
    codes = torch.randn(11, 6, generator=rng)
    logits = torch.randn(2, 9, 11, generator=rng, requires_grad=True)
    target = F.normalize(torch.randn(2, 6, generator=rng), dim=-1)
    reembed = lambda mixture: (mixture @ codes).sum(1)  # noqa: E731
    loss = embedding_loss(logits, target, reembed)
    hard = codes[logits.argmax(-1)].sum(1)
    expected = sum(1 - F.cosine_similarity(h, t, dim=0).item() for h, t in zip(hard, target, strict=True)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    (got,) = torch.autograd.grad(loss, logits)
    leaf = torch.nn.functional.one_hot(logits.argmax(-1), 11).float().requires_grad_(True)
    value = 1 - F.cosine_similarity(reembed(leaf), target, dim=-1).mean()
    (at_tokens,) = torch.autograd.grad(value, leaf)
    (expected_gradient,) = torch.autograd.grad(logits.softmax(-1), logits, at_tokens)
    torch.testing.assert_close(got, expected_gradient, rtol=1e-4, atol=1e-7)


def test_the_embedding_loss_is_learnt_where_asked_for():
    """On two draws, since what so small a network begins with is luck."""
    for seed in (1, 2):
        rng = torch.Generator().manual_seed(seed)
        tokens, e = torch.randint(0, 11, (5, 9), generator=rng), F.normalize(torch.randn(5, 6, generator=rng), dim=-1)
        batch = TokenBatch(tokens, e, e, torch.tensor([False, False, True, False, False]))
        codes = torch.randn(11, 6, generator=rng)
        trained = task(weight=10.0, reembed=lambda m, codes=codes: -(m @ codes).sum(1), lr=3e-3)
        losses = [trained.step(step, [batch])["loss/embedding"].item() for step in range(60)]
        assert losses[0] > 0.9 and losses[-1] < 0.4 * losses[0]  # cosines from about 0 to more than 0.6


@pytest.mark.parametrize("muon", [False, True])
def test_it_resumes_exactly_with_dropout(tmp_path, batch, muon):
    accelerator, config = Accelerator(cpu=True), replace(little.SHAPE, dropout=0.3)
    batches = lambda step: [batch]  # noqa: E731
    whole = task(config, muon=muon)
    little.run(tmp_path / "whole", whole, batches, 6, accelerator)
    little.run(tmp_path / "parts", task(config, muon=muon), batches, 2, accelerator)
    torch.rand(3)
    parts = task(config, muon=muon)
    little.run(tmp_path / "parts", parts, batches, 6, accelerator)
    a, b = little.states(whole), little.states(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)
    plain = task(muon=muon)
    little.run(tmp_path / "plain", plain, batches, 6, accelerator)
    assert any(not torch.equal(a[name], v) for name, v in little.states(plain).items())  # dropout did something


def test_a_damaged_folder_is_refused(tmp_path):
    net = little.transformer()
    transformer.save(net, tmp_path, {"clip_source": "somewhere"})
    again, facts = transformer.load(tmp_path, torch.device("cpu"))
    assert facts["clip_source"] == "somewhere"
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), net.parameters(), strict=True))
    assert torch.equal(again.codebook, net.codebook) and net.codebook.any()
    (tmp_path / "transformer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a model of dmd clipgen"):
        transformer.load(tmp_path, torch.device("cpu"))
