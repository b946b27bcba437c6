"""The losses against published values, double loops, closed forms and what must not change them."""

import math

import pytest
import torch
import torch.nn.functional as F

from dmd.represent import losses
from dmd.represent.losses import contrast, image_text, masked_patches, momentum_contrast, multi_positive
from dmd.represent.sinkhorn import assignments


def draws(seed, *shapes):
    """torch's own normal numbers from a seed, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


(FEATURES,) = draws(0, (12, 16))


def naive(queries, keys, query_labels, key_labels, temperature, hidden=lambda i, j: False):
    """A double loop in float64: the mean over the queries with positives."""
    q, k = F.normalize(queries.double(), dim=1), F.normalize(keys.double(), dim=1)
    terms = []
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if not hidden(i, j)]
        logits = {j: float(q[i] @ k[j]) / temperature for j in seen}
        top = max(logits.values())
        total = top + math.log(sum(math.exp(v - top) for v in logits.values()))
        positives = [j for j in seen if query_labels[i] == key_labels[j]]
        if positives:
            terms.append(sum(total - logits[j] for j in positives) / len(positives))
    return sum(terms) / len(terms)


# ---- golden values, by the authors' code and by pytorch-metric-learning


@pytest.mark.parametrize(
    ("labels", "value", "dropped"),
    [
        ([0, 1, 2, 3] * 3, 4.369274, 0),
        ([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], 4.581926, 0),
        ([0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7], 5.024068, 4),  # the authors' mean counts those without positives as 0
    ],
)
def test_stablerep_has_the_published_values(labels, value, dropped):
    found = multi_positive(FEATURES, torch.tensor(labels), 0.1)
    assert float(found.loss) == pytest.approx(value, abs=1e-5)
    assert float(found.dropped) == dropped
    assert float(found.loss) * (12 - dropped) / 12 == pytest.approx(3.349379 if dropped else value, abs=1e-5)


def test_stablerep_plus_has_the_published_values():
    image, embedded, text = draws(1, (12, 8), (12, 8), (4, 8))
    labels = torch.arange(4).repeat(3)
    one = multi_positive(image, labels, 0.1).loss
    two = image_text(embedded, text, labels, torch.arange(4), torch.tensor(1 / 0.07)).loss
    assert float(one) == pytest.approx(5.411775, abs=1e-5) and float(two) == pytest.approx(6.796636, abs=1e-5)
    assert float(one + two) == pytest.approx(12.20841, abs=1e-5)


def test_synclr_has_the_published_values():
    _, queries, keys = draws(0, (12, 16), (12, 8), (4, 8))
    labels = torch.tensor([1, 1, 2, 2])
    whole = momentum_contrast(queries[:4], keys, labels, labels, 0.08)
    local = momentum_contrast(queries[4:], keys, labels.repeat(2), labels, 0.08)
    assert float(whole.loss) == pytest.approx(4.93449, abs=1e-5)
    assert float(local.loss) == pytest.approx(3.7803, abs=1e-4)  # as many digits as were published


# ---- double loops and closed forms


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_all_forms_equal_a_double_loop(temperature):
    queries, keys = draws(3, (8, 5), (6, 5))
    labels, own = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3]), torch.tensor([0, 1, 2, 0, 1, 2])
    found = multi_positive(queries, labels, temperature)
    expected = naive(queries, queries, labels, labels, temperature, lambda i, j: i == j)
    assert float(found.loss) == pytest.approx(expected, rel=1e-5) and float(found.dropped) == 1
    found = momentum_contrast(queries[:6].repeat(2, 1), keys, own.repeat(2), own, temperature)
    expected = naive(queries[:6].repeat(2, 1), keys, own.repeat(2), own, temperature, lambda i, j: i % 6 == j)
    assert float(found.loss) == pytest.approx(expected, rel=1e-5)
    found = momentum_contrast(queries[:6], keys, own, own, temperature, hide_own=False)
    assert float(found.loss) == pytest.approx(naive(queries[:6], keys, own, own, temperature), rel=1e-5)
    texts = torch.tensor([0, 1, 1, 2, 3, 9])  # 1 is there twice; 9 has no image
    found = image_text(queries, keys, labels, texts, torch.tensor(1 / temperature))
    one = naive(queries, keys, labels, texts, temperature)
    two = naive(keys, queries, texts, labels, temperature)
    assert float(found.loss) == pytest.approx((one + two) / 2, rel=1e-5) and float(found.dropped) == 1


def test_equal_features_give_the_log_of_the_others():
    found = multi_positive(torch.ones(12, 4), torch.arange(4).repeat(3), 0.1)
    assert float(found.loss) == pytest.approx(math.log(11), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("m", [2, 3])
def test_captions_at_right_angles_give_the_closed_form(m, temperature):
    """Images of a caption fall together and captions are orthogonal: nothing is better as the temperature falls."""
    labels = torch.arange(4).repeat(m)
    found = multi_positive(torch.eye(4)[labels] * 3, labels, temperature)
    expected = math.log((m - 1) + (4 * m - m) * math.exp(-1 / temperature))
    assert float(found.loss) == pytest.approx(expected, abs=1e-5)
    assert float(found.excess) == pytest.approx(expected - math.log(m - 1), abs=1e-5)


def test_two_of_each_is_nt_xent():
    """SimCLR as everybody writes it: the cross-entropy of the other view's place."""
    (x,) = draws(4, (10, 6))
    z = F.normalize(x, dim=1)
    logits = (z @ z.T / 0.2).fill_diagonal_(-math.inf)
    expected = F.cross_entropy(logits, torch.cat((torch.arange(5, 10), torch.arange(5))))
    torch.testing.assert_close(multi_positive(x, torch.arange(5).repeat(2), 0.2).loss, expected)


def test_one_image_of_a_text_is_clip():
    image, text = (F.normalize(x, dim=1) for x in draws(5, (6, 8), (6, 8)))
    logits = 14.0 * image @ text.T
    y = torch.arange(6)
    expected = (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2
    torch.testing.assert_close(image_text(image, text, y, y, torch.tensor(14.0)).loss, expected)


def test_order_names_and_length_do_not_matter():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    expected = multi_positive(FEATURES, labels, 0.1).loss
    order = torch.randperm(12, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(multi_positive(FEATURES[order], labels[order], 0.1).loss, expected)
    torch.testing.assert_close(multi_positive(FEATURES * 7, 1000 - labels * 2**40, 0.1).loss, expected)


def test_labels_are_those_of_the_call():
    """The published code keeps the first batch's mask as long as the batch size stays: 4.3693 twice."""
    first = multi_positive(FEATURES, torch.arange(4).repeat(3), 0.1).loss
    second = multi_positive(FEATURES, torch.arange(4).repeat_interleave(3), 0.1).loss
    assert float(first) == pytest.approx(4.369274, abs=1e-5) and float(second) == pytest.approx(4.581926, abs=1e-5)


# ---- what must not break them


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_losses_and_gradients_are_finite(dtype, temperature):
    """float16 has no 1e-12, so normalising zeros there is 0 / 0."""
    x = FEATURES.clone()
    x[0] = 0.0
    x = x.to(dtype).requires_grad_()
    labels = torch.arange(4).repeat(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = multi_positive(x, labels, temperature).loss
    loss.backward()
    expected = naive(x.detach().float(), x.detach().float(), labels, labels, temperature, lambda i, j: i == j)
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert x.grad.isfinite().all() and x.grad[1:].abs().sum() > 0


@pytest.mark.parametrize("count", [1, 12])
def test_no_positives_at_all_is_zero_and_moves_nothing(count):
    x = FEATURES[:count].clone().requires_grad_()
    found = multi_positive(x, torch.arange(count), 0.1)
    found.loss.backward()
    assert float(found.loss.detach()) == 0 and float(found.dropped) == count and not x.grad.any()


def test_gradients_are_those_of_the_double_loop():
    x = FEATURES[:6, :4].clone().double().requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 1, 2])

    def loop(x):
        z = F.normalize(x, dim=1)
        total = x.new_zeros(())
        for i in range(5):
            others = [j for j in range(6) if j != i]
            logs = (z[i] @ z[others].T / 0.1).log_softmax(0)
            mine = [logs[k] for k, j in enumerate(others) if labels[j] == labels[i]]
            total = total - sum(mine) / len(mine)
        return total / 5

    (expected,) = torch.autograd.grad(loop(x), x)
    single = x.detach().float().requires_grad_()
    (found,) = torch.autograd.grad(multi_positive(single, labels, 0.1).loss, single)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_hidden_keys_are_as_if_they_were_not_there():
    queries, keys = draws(6, (3, 4), (7, 4))
    positive = torch.tensor([[1, 0, 1, 0, 0, 0, 1]] * 3).bool()
    hidden = torch.tensor([[0, 0, 1, 1, 0, 0, 0]] * 3).bool()
    left = [0, 1, 4, 5, 6]
    torch.testing.assert_close(
        contrast(queries, keys, positive, 5.0, hidden).loss, contrast(queries, keys[left], positive[:, left], 5.0).loss
    )


def test_classification_is_of_float32():
    logits, labels = draws(7, (5, 3))[0] * 4, torch.tensor([0, 1, 2, 1, 0])
    expected = -sum(row.double().log_softmax(0)[y] for row, y in zip(logits, labels, strict=True)) / 5
    assert float(losses.classification(logits, labels)) == pytest.approx(float(expected), rel=1e-6)
    assert losses.classification(logits.half(), labels).dtype == torch.float32


# ---- iBOT and Sinkhorn-Knopp


def test_masked_patches_equal_a_loop_over_images():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    student, logits = draws(8, (5, 6), (5, 6))
    target = logits.softmax(1)
    patch, images = 0, []
    for row in mask:
        terms = []
        for _ in range(int(row.sum())):
            terms.append(-(target[patch].double() * (student[patch].double() / 0.1).log_softmax(0)).sum())
            patch += 1
        if terms:
            images.append(sum(terms) / len(terms))
    expected = sum(images) / len(images)
    assert float(masked_patches(student, target, mask, 0.1)) == pytest.approx(float(expected), rel=1e-5)
    assert float(masked_patches(student[:0], target[:0], mask & False, 0.1)) == 0


def exact(logits, temperature, iterations):
    """As published, in float64 and for logits that it can bear."""
    q = (logits.double() / temperature).exp().T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * len(q)
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_assignments_equal_the_published_iteration(iterations):
    logits = draws(9, (64, 32))[0].double()
    found = assignments(logits, 0.1, iterations)
    torch.testing.assert_close(found, exact(logits, 0.1, iterations), rtol=0, atol=1e-12)
    assert (assignments(logits.float(), 0.1, iterations) - found).abs().max() < 1e-4


def test_many_iterations_use_all_prototypes_alike():
    found = assignments(draws(10, (60, 12))[0].double(), 0.2, 200)
    torch.testing.assert_close(found.sum(1), torch.ones(60).double())
    torch.testing.assert_close(found.sum(0), torch.full((12,), 5.0).double())


def test_assignments_are_finite_where_the_published_are_not():
    (logits,) = draws(11, (64, 32))
    logits[:, 7] = -5.0
    unused = assignments(logits.clamp(-1, 1).where(torch.arange(32) != 7, -5.0), 0.04)
    for found in (assignments(30 * logits, 0.04), unused):
        assert found.isfinite().all()
        torch.testing.assert_close(found.sum(1), torch.ones(64))
    expected = exact(logits.clamp(-1, 1).where(torch.arange(32) != 7, -5.0), 0.04, 3)
    torch.testing.assert_close(unused.double(), expected, rtol=1e-3, atol=1e-5)
