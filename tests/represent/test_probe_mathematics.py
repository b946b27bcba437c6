"""The probes against scikit-learn, naive loops and closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from dmd.represent import few_shot, geometry, linear, logistic, neighbours, scores, zero_shot
from dmd.represent.scaling import scale_of


@pytest.fixture(scope="module")
def blobs():
    """Features of 400 + 200 images of 7 classes that overlap."""
    x, y = make_blobs(600, 12, centers=7, cluster_std=6.0, random_state=3)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    return x[:400], y[:400], x[400:], y[400:]


# ----------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_neighbours_vote_as_in_scikit_learn(blobs, temperature):
    x, y, queries, _ = blobs
    found = neighbours.predict(x, y, queries, 7, (1, 20, 200), temperature)
    for row, k in zip(found, (1, 20, 200), strict=True):
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
        assert row.tolist() == theirs.fit(x.double(), y).predict(queries.double()).tolist()


def test_neighbours_do_not_depend_on_how_many_are_compared_at_a_time(blobs, monkeypatch):
    x, y, queries, _ = blobs
    whole = neighbours.predict(x, y, queries, 7, (20,))
    monkeypatch.setattr(neighbours, "COMPARED", 3 * len(x))
    assert torch.equal(neighbours.predict(x, y, queries, 7, (20,)), whole)


def test_a_cold_temperature_leaves_the_nearest_and_nothing_overflows(blobs):
    x, y, queries, _ = blobs
    nearest, among = neighbours.predict(x, y, queries, 7, (1,)), neighbours.predict(x, y, queries, 7, (200,), 1e-6)
    assert torch.equal(nearest, among)


def test_more_neighbours_than_images_are_refused(blobs):
    x, y, queries, _ = blobs
    with pytest.raises(ValueError, match="401 neighbours are not possible among 400"):
        neighbours.predict(x, y, queries, 7, (401,))


# ----------------------------------------------------------------------------- linear


def test_heads_side_by_side_are_those_of_torchs_sgd_one_by_one(blobs):
    x, y, _, _ = blobs
    rates, epochs, batch = (0.01, 0.3, 5.0), 3, 100
    found = linear.train(x, y, 7, rates, epochs, batch, seed=5)
    from dmd.seeding import Stream, bits

    steps = len(x) // batch
    for rate, weight, bias in zip(rates, found.weight, found.bias, strict=True):
        head = torch.nn.Linear(12, 7)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        sgd = torch.optim.SGD(head.parameters(), lr=rate * batch / 256, momentum=0.9)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs * steps)
        for epoch in range(epochs):
            order = bits(5, Stream.PROBE_ORDER, epoch, torch.arange(len(x)), 1)[:, 0].argsort(stable=True)
            assert sorted(order.tolist()) == list(range(len(x)))
            for part in order[: steps * batch].split(batch):
                sgd.zero_grad()
                F.cross_entropy(head(x[part]), y[part]).backward()
                sgd.step()
                cosine.step()
        scale = head.weight.abs().max()
        assert (head.weight - weight).abs().max() < 1e-4 * scale
        assert (head.bias - bias).abs().max() < 1e-4 * scale
        single = linear.Heads(weight[None], bias[None]).predict(x)[0]
        assert torch.equal(single, (x @ weight.T + bias).argmax(1))


def test_a_linear_probe_finds_what_a_line_separates():
    angle = torch.linspace(0, 2 * math.pi, 301)[:-1]
    x = torch.stack((angle.cos(), angle.sin()), 1)
    y = (angle / (2 * math.pi) * 3).long()
    heads = linear.train(x, y, 3, (0.0001, 0.5), epochs=60, batch=32)
    slow, fast = (F.cross_entropy(x @ w.T + b, y).item() for w, b in zip(heads.weight, heads.bias, strict=True))
    assert fast < 0.15 and math.log(3) - 0.02 < slow < math.log(3)  # which hardly moves in 60 epochs
    assert scores.accuracy(heads.predict(x)[1], y) > 0.99


def test_a_diverged_head_says_so():
    x = torch.full((8, 2), 1e30)
    heads = linear.train(x, torch.tensor([0, 1] * 4), 2, (0.1, 1e9), epochs=2, batch=4)
    assert heads.finite().tolist() == [False, False]
    assert linear.train(x / 1e30, torch.tensor([0, 1] * 4), 2, (0.1,), epochs=2, batch=4).finite().all()


# ----------------------------------------------------------------------------- logistic


@pytest.mark.parametrize("l2", [1e4, 10.0, 0.1, 1e-3])
def test_logistic_regression_is_scikit_learns(blobs, l2):
    scale = scale_of(blobs[0])
    x, y, queries = scale(blobs[0]), blobs[1], scale(blobs[2])
    (fit,) = logistic.path(x, y, 7, (l2,), iterations=10_000, tolerance=1e-9)
    theirs = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=10_000).fit(x.double().numpy(), y.numpy())
    assert fit.gradient <= 1e-6
    ours = torch.addmm(fit.bias, queries.double(), fit.weight.T).softmax(1)
    assert np.abs(ours.numpy() - theirs.predict_proba(queries.double().numpy())).max() < 1e-4
    assert np.abs(fit.weight.numpy() - theirs.coef_).max() < 1e-4 * max(1.0, np.abs(theirs.coef_).max())


def test_a_path_ends_where_single_fits_do(blobs):
    x, y = scale_of(blobs[0])(blobs[0]), blobs[1]
    for fit in logistic.path(x, y, 7, (100.0, 1.0, 0.1)):
        (alone,) = logistic.path(x, y, 7, (fit.l2,))
        assert (fit.weight - alone.weight).abs().max() < 0.01 * alone.weight.abs().max()


def test_the_papers_values():
    assert len(logistic.REGULARISATIONS) == 45
    assert logistic.REGULARISATIONS[0] == pytest.approx(1e5) and logistic.REGULARISATIONS[-1] == pytest.approx(1e-6)


def test_features_that_are_not_finite_do_not_go_unnoticed():
    x = torch.full((4, 2), float("inf"))
    with pytest.raises(ArithmeticError, match="not finite"):
        list(logistic.path(x, torch.tensor([0, 1, 0, 1]), 2, (1.0,)))


def test_a_constant_feature_is_centred_and_divides_nothing_by_zero():
    x = torch.tensor([[1.0, 0.1], [3.0, 0.1], [8.0, 0.1]])
    scaled = scale_of(x)(x)
    assert scaled.isfinite().all() and scaled[:, 1].abs().max() < 1e-4
    assert scaled[:, 0].mean().abs() < 1e-6 and scaled[:, 0].square().mean() == pytest.approx(1.0)


# ----------------------------------------------------------------------------- few-shot


def test_a_task_is_classified_as_by_scikit_learns_nearest_centroid():
    """One task that uses every image there is: only their order is drawn, which decides nothing with equal halves."""
    digits = load_digits()
    x, y = torch.from_numpy(digits.data).float(), torch.from_numpy(digits.target)
    centre = x.mean(0)
    found = few_shot.episodes(x, y, centre, ways=10, shots=100, queries=70, count=3, seed=1)
    z = F.normalize(x - centre, dim=1).numpy()
    reference = NearestCentroid().fit(z, y).score(z, y)
    assert found.mean().item() == pytest.approx(reference, abs=0.03) and found.std() > 0


def test_tasks_follow_from_the_seed_and_shots_help():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(10).repeat_interleave(30)
    x = F.one_hot(y, 10) + 0.7 * torch.randn(300, 10, generator=generator)
    one, five = (few_shot.episodes(x, y, x.mean(0), 5, shots, 15, 100, seed=4) for shots in (1, 5))
    assert torch.equal(one, few_shot.episodes(x, y, x.mean(0), 5, 1, 15, 100, seed=4))
    assert not torch.equal(one, few_shot.episodes(x, y, x.mean(0), 5, 1, 15, 100, seed=5))
    assert torch.equal(one[:10], few_shot.episodes(x, y, x.mean(0), 5, 1, 15, 10, seed=4))
    assert five.mean() > one.mean() > 0.3


def test_perfect_features_leave_no_error_and_none_gives_chance():
    y = torch.arange(5).repeat_interleave(20)
    perfect = F.one_hot(y, 5).float()
    assert few_shot.episodes(perfect, y, perfect.mean(0), count=20).min() == 1
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, 64, generator=generator)
    assert few_shot.episodes(noise, y, noise.mean(0), count=400).mean().item() == pytest.approx(0.2, abs=0.03)


def test_too_few_images_for_a_task_are_refused():
    y = torch.arange(5).repeat_interleave(19)
    with pytest.raises(ValueError, match="0 classes have 20 images, and a task needs 5"):
        few_shot.episodes(torch.zeros(95, 3), y, torch.zeros(3))


# ----------------------------------------------------------------------------- geometry


def test_the_rank_of_isotropic_features_is_their_dimension_and_of_a_line_1():
    x = torch.linalg.qr(torch.randn(64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    assert geometry.rank_me(5 * x) == pytest.approx(16, abs=1e-9)
    assert geometry.rank_me(x[:, :1] @ torch.randn(1, 16, dtype=torch.float64)) == pytest.approx(1, abs=1e-9)
    assert geometry.rank_me(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    with pytest.raises(ValueError, match="have no rank"):
        geometry.rank_me(torch.zeros(3, 2))


def test_alignment_and_uniformity_against_double_loops(blobs):
    x, y = blobs[0][:60], blobs[1][:60]
    z = F.normalize(x.double(), dim=1)
    pairs = [(i, j) for i in range(60) for j in range(60) if i != j]
    apart = {(i, j): (z[i] - z[j]).square().sum().item() for i, j in pairs}
    same = [apart[i, j] for i, j in pairs if y[i] == y[j]]
    assert geometry.alignment(x, y) == pytest.approx(sum(same) / len(same))
    spread = sum(math.exp(-2 * apart[p]) for p in pairs) / len(pairs)
    assert geometry.uniformity(x) == pytest.approx(math.log(spread))


def test_known_arrangements():
    cross = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0], [0.0, -4.0]])  # distances^2: 4 across, 2 aside
    assert geometry.alignment(cross, torch.tensor([0, 0, 1, 1])) == pytest.approx(4)
    assert geometry.alignment(cross, torch.tensor([0, 1, 0, 1])) == pytest.approx(2)
    assert geometry.uniformity(cross) == pytest.approx(math.log((math.exp(-8) + 2 * math.exp(-4)) / 3))
    assert geometry.alignment(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64)) == 0
    assert geometry.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="no class has two images"):
        geometry.alignment(cross, torch.arange(4))


# ----------------------------------------------------------------------------- zero-shot


def test_prompts_are_averaged_as_unit_vectors():
    """A text tower that counts letters."""

    def embed(texts):
        return torch.tensor([[t.count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for t in texts]).float()

    found = zero_shot.class_embeddings(embed, ["bee_eater", "cat"], ["{}", "one {} two"])
    rows = []
    for name in ("bee eater", "cat"):
        parts = [embed([t])[0] for t in (name, f"one {name} two")]
        mean = sum(p / p.norm() for p in parts) / 2
        rows.append(mean / mean.norm())
    assert torch.allclose(found, torch.stack(rows), atol=1e-6)
    images = torch.stack((5 * rows[1], 0.1 * rows[0], rows[1] + 0.2 * rows[0]))
    assert zero_shot.predict(images, found).tolist() == [1, 0, 1]


# ----------------------------------------------------------------------------- figures


def test_mean_class_accuracy_is_scikit_learns_balanced_accuracy(blobs):
    _, _, _, y = blobs
    uneven = y[(y < 2) | (torch.arange(len(y)) % 4 == 0)]
    guess = (uneven + (torch.arange(len(uneven)) % 3 == 0)) % 7
    mine = scores.mean_class_accuracy(guess, uneven)
    assert mine == pytest.approx(balanced_accuracy_score(uneven, guess))
    assert mine != pytest.approx(scores.accuracy(guess, uneven), abs=1e-4)
    found = scores.figure(guess, uneven, True, 200, 0, "test")
    assert found.value == pytest.approx(mine) and found.low < mine < found.high
    right = (guess == uneven).double().mean().item()
    plain = scores.figure(guess, uneven, False, 400, 0, "test")
    half = 1.96 * math.sqrt(right * (1 - right) / len(uneven))
    assert plain.high - plain.value == pytest.approx(half, rel=0.15)


def test_the_interval_over_tasks():
    found = scores.mean_of_tasks(torch.tensor([0.4, 0.6] * 50))
    assert found.value == pytest.approx(0.5)
    assert found.high - found.value == pytest.approx(1.96 * 0.1005 / 10, rel=1e-3)
