"""One update: gradients against what they should be, chunks, the teacher, resume, and that something is learnt."""

import copy
import math
from dataclasses import replace

import pytest
import tiny_learners as little
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from dmd.ema import follow
from dmd.represent import heads, learners, losses
from dmd.represent.caching import cached
from dmd.represent.heads import SharedBatchNorm
from dmd.represent.learners import Pace
from dmd.represent.schedules import cosine, ramp, warm_cosine
from dmd.run import Cadence, NotFinite, Run

CPU = torch.device("cpu")


def gradients(task):
    return {f"{n}.{k}": p.grad for n, net in task.modules().items() for k, p in net.named_parameters()}


def doubled(task):
    for net in task.modules().values():
        net.double()
    return task


def states(task):
    return {f"{m}.{k}": v for m, net in task.modules().items() for k, v in net.state_dict().items()}


# ---- the loss that a learner follows


def test_stablerep_heads_each_view_by_itself():
    task = little.learner()
    batch = little.view_batches()(0).to(CPU)
    figures = task.gradient(0, batch)
    net, head = copy.deepcopy(task.backbone), copy.deepcopy(task.terms["images"].head)
    z = torch.cat([head(x) for x in net(batch.images).split(8)])
    expected = losses.multi_positive(z, batch.labels, 0.1).loss
    torch.testing.assert_close(figures["loss/contrast"], expected.detach())
    assert not torch.allclose(head(net(batch.images)), z)  # statistics of all views together are others


def test_stablerep_plus_is_the_sum_of_both():
    batch = little.double(little.view_batches(text=True)(0).to(CPU))
    both = doubled(little.learner("views-and-text"))
    both.gradient(0, batch)
    total = gradients(both)
    for weights in ({"images": 1.0, "text": 0.0}, {"images": 0.0, "text": 1.0}):
        task = doubled(little.learner("views-and-text"))
        task.weights = weights
        task.gradient(0, batch)
        for name, g in gradients(task).items():
            if g is not None:
                total[name] = total[name] - g
    assert all(g.abs().max() < 1e-9 for g in total.values())


def test_equal_captions_of_a_batch_are_positives_of_each_other():
    """Eight groups of four classes: an image attracts the images of its class in all groups, and both texts."""
    batch = little.view_batches(text=True)(0)
    assert len(batch.texts.unique()) < len(batch.texts)
    assert torch.equal(batch.labels, batch.texts.repeat(3))
    figures = little.learner("views-and-text").gradient(0, batch.to(CPU))
    count = (batch.labels[:, None] == batch.labels).sum(1) - 1
    loss, excess = float(figures["loss/contrast"]), float(figures["excess"])
    assert excess == pytest.approx(loss - float(count.double().log().mean()), abs=1e-5)


def test_supervised_is_cross_entropy_of_smoothed_labels():
    task = little.learner("classes")
    batch = little.view_batches(m=1)(0).to(CPU)
    figures = task.gradient(0, batch)
    logits = task.terms["classes"].linear(copy.deepcopy(task.backbone)(batch.images))
    smooth = 0.9 * F.one_hot(batch.labels, 4) + 0.1 / 4
    assert float(figures["loss/classes"]) == pytest.approx(
        float(-(smooth * logits.log_softmax(1)).sum(1).mean().detach()), rel=1e-5
    )


def test_synclr_is_the_sum_of_its_terms():
    """Equation 4 by hand: masked whole crops and small ones against the teacher's keys, and the masked patches."""
    task = little.synclr()
    batch = little.crop_batches()(0).to(CPU)
    figures = task.gradient(3, batch)
    s, t = task.student, task.teacher
    with torch.no_grad():
        features, tokens = t.backbone.both(batch.images)
        keys = F.normalize(t.projection(features), dim=1)
        sharp = 0.04 + 0.03 * 3 / 4
        target = learners.assignments(t.ibot(tokens[batch.mask]).double(), sharp)
        hidden, patches = s.backbone.both(batch.images, batch.mask, s.mask_token)
        logs = (s.ibot(patches[batch.mask]) / 0.1).log_softmax(1)
        whole = F.normalize(task.predictor(s.projection(hidden)), dim=1)
        small = F.normalize(task.predictor(s.projection(s.backbone(batch.local))), dim=1)

    def contrast(queries):
        terms = []
        for i, q in enumerate(queries):
            logits = keys @ q / 0.08
            logits[i % 16] = -math.inf
            same = (batch.labels == batch.labels[i % 16]) & (torch.arange(16) != i % 16)
            terms.append(-logits.log_softmax(0)[same].mean())
        return float(sum(terms) / len(terms))

    each = iter(-(target * logs).sum(1))
    rows = [[next(each) for _ in range(int(n))] for n in batch.mask.sum(1)]
    images = [sum(r) / len(r) for r in rows if r]
    assert float(figures["loss/contrast"]) == pytest.approx(contrast(whole), rel=1e-5)
    assert float(figures["loss/local"]) == pytest.approx(contrast(small), rel=1e-5)
    assert float(figures["loss/ibot"]) == pytest.approx(float(sum(images) / len(images)), rel=1e-4)


def test_an_images_key_does_not_depend_on_its_batch():
    """A teacher whose heads normalise by batch does so by the running statistics that it has from the student."""
    task = little.synclr(batch_norm=True)
    batches = little.crop_batches()
    task.step(0, batches(0).to(CPU))
    batch = batches(1).to(CPU)
    half = replace(batch, images=batch.images[:8], mask=batch.mask[:8])
    torch.testing.assert_close(task._targets(1, half)[0], task._targets(1, batch)[0][:8])
    statistics = [b for b in task.teacher.projection.buffers() if b.ndim]
    assert all(not torch.equal(b, torch.full_like(b, float(b.flatten()[0]))) for b in statistics)


def test_a_masked_patch_is_not_seen():
    net = little.backbone("vit_mini")
    batch = little.crop_batches()(0).to(CPU)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, 5] = True  # the second row's second patch
    other = batch.images.clone()
    other[..., 4:8, 4:8] = 0.7
    token = torch.randn(net.features)
    torch.testing.assert_close(net.both(batch.images, mask, token), net.both(other, mask, token))
    torch.testing.assert_close(net.both(batch.images, mask & False, token), net.both(batch.images))
    assert not torch.allclose(net.both(batch.images, mask, token)[0], net.both(batch.images)[0])


# ---- chunks


@pytest.mark.parametrize("kind", ["views", "views-and-text", "classes"])
def test_chunks_give_the_gradient_of_the_whole(kind):
    """With stochastic depth too: both passes of a chunk leave out the same blocks."""
    batch = little.double(little.view_batches(text=kind == "views-and-text")(0).to(CPU))
    found = []
    for chunk in (0, 5):
        task = doubled(little.learner(kind, little.backbone("vit_mini"), chunk=chunk))
        figures = task.gradient(0, batch)
        found.append((figures, gradients(task)))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value)
    for name, g in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_chunks_of_synclr_give_the_gradient_of_the_whole(batch_norm):
    batch = little.double(little.crop_batches()(0).to(CPU))
    found = []
    for chunk in (0, 3):
        task = doubled(little.synclr(chunk=chunk, batch_norm=batch_norm))
        task.gradient(0, batch)
        found.append({k: g for k, g in gradients(task).items() if g is not None})
    assert found[0].keys() == found[1].keys()
    for name, g in found[0].items():  # timm interpolates positions for small crops in float32
        torch.testing.assert_close(found[1][name], g, rtol=1e-6, atol=1e-8)


def test_both_passes_of_a_chunk_leave_out_the_same_blocks():
    """Were they not the same, the cached gradient would not be that of micro-batches under the same numbers."""
    net = little.backbone("vit_mini", drop_path=0.5).double()
    practice = little.practice(seed=3, chunk=4)
    x = little.double(little.view_batches()(0).to(CPU)).images
    parts = practice.parts(len(x))

    def compute(i):
        with practice.forward(0, i, CPU):
            return [net(x[parts[i]])]

    (leaf,), finish = cached(compute, len(parts), net)
    leaf.square().sum().backward()
    finish()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    plain = torch.cat([compute(i)[0] for i in range(len(parts))])
    torch.testing.assert_close(plain, leaf)
    plain.square().sum().backward()
    for a, p in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_running_statistics_move_once():
    x = little.view_batches()(0).to(CPU).images
    nets = [little.backbone() for _ in range(2)]
    for i in range(3):
        nets[0](x[i * 8 : i * 8 + 8])
    (leaf,), finish = cached(lambda i: [nets[1](x[i * 8 : i * 8 + 8])], 3, nets[1])
    leaf.sum().backward()
    finish()
    for (name, a), b in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
        assert "num_batches" in name or torch.equal(a, b), name


# ---- optimiser, schedules, teacher


def test_biases_and_normalisations_do_not_decay():
    task = little.learner("views", little.backbone("vit_mini"))
    decayed, free = task.optimizer.param_groups
    named = {id(p): k for net in task.modules().values() for k, p in net.named_parameters()}
    assert all("bias" not in named[id(p)] and "norm" not in named[id(p)] for p in decayed["params"])
    assert {named[id(p)] for p in free["params"]} == {
        k for k in named.values() if k.endswith("bias") or "norm" in k
    } | {k for net in task.modules().values() for k, p in net.named_parameters() if p.ndim == 1}
    pace = Pace(10, 4, (0.1, 0.5))
    rates, decays = [], []
    for step in range(10):
        pace.set(task.optimizer, step)
        rates.append(decayed["lr"])
        decays.append(decayed["weight_decay"])
        assert free["lr"] == decayed["lr"] and free["weight_decay"] == 0
    expected = [0.25, 0.5, 0.75, 1.0] + [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert rates == pytest.approx([1e-2 * r for r in expected])
    assert decays == pytest.approx([0.3 - 0.2 * math.cos(math.pi * k / 9) for k in range(10)])


def test_schedules():
    assert [ramp(s, 4, 0.04, 0.08) for s in (0, 2, 4, 9)] == pytest.approx([0.04, 0.06, 0.08, 0.08])
    assert ramp(0, 0, 0.1, 0.2) == 0.2 and warm_cosine(0, 5, 0) == 1.0
    assert cosine(0, 11, 0.994, 1.0) == pytest.approx(0.994) and cosine(10, 11, 0.994, 1.0) == pytest.approx(1.0)
    assert cosine(5, 11, 0.994, 1.0) == pytest.approx(0.997)


def test_the_teacher_follows_the_student_and_learns_nothing_itself():
    task = little.synclr()
    before, source = copy.deepcopy(task.teacher.state_dict()), little.crop_batches()
    task.step(2, source(0).to(CPU))
    m = 1 - (1 - 0.9) * (1 + math.cos(math.pi * 2 / 5)) / 2
    now = task.student.state_dict()
    for name, value in task.teacher.state_dict().items():
        torch.testing.assert_close(value, m * before[name] + (1 - m) * now[name], msg=name)
    assert any(not torch.equal(now[k], before[k]) for k in now)
    assert not any(p.requires_grad or p.grad is not None for p in task.teacher.parameters())


def test_the_scale_of_text_stays_at_most_a_hundred():
    task = little.learner("views-and-text")
    net = task.terms["text"].net
    with torch.no_grad():
        net.logit_scale.fill_(9.0)
    task.step(0, little.view_batches(text=True)(0).to(CPU))
    assert float(net.logit_scale.detach().exp()) == pytest.approx(100, rel=1e-3)


def test_follow_is_the_moving_average():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * a.weight.detach() + 0.1 * b.weight.detach()
    follow(a, b, 0.9)
    torch.testing.assert_close(a.weight.detach(), expected)


# ---- heads


def test_a_shared_normalisation_alone_is_torchs():
    x = torch.randn(6, 4, 3, 3)
    own, torchs = SharedBatchNorm(4), torch.nn.BatchNorm2d(4)
    assert torch.equal(own(x), torchs(x)) and torch.equal(own.running_var, torchs.running_var)


def test_prototypes_are_cosines():
    net = heads.Prototypes(5, 7)
    x = torch.randn(3, 5)
    expected = F.cosine_similarity(x[:, None], net.directions[None], dim=-1)
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net(x * 9), expected)


# ---- many steps


@pytest.mark.parametrize("kind", ["views", "synclr"])
def test_stopping_and_going_on_gives_the_same_weights(tmp_path, kind):
    """Crops, masks, stochastic depth and teacher are as if nothing had happened, bit for bit."""

    def make():
        net = little.backbone("vit_mini", drop_path=0.3)
        return little.synclr(net, seed=2) if kind == "synclr" else little.learner("views", net, seed=2)

    source = little.crop_batches() if kind == "synclr" else little.view_batches()
    accelerator = Accelerator(cpu=True)

    def train(folder, steps):
        task = make()
        Run(tmp_path / folder, task, lambda s: source(s).to(CPU), Cadence(steps, 1, 1), accelerator).train()
        return states(task)

    whole = train("whole", 6)
    train("parts", 2)
    train("parts", 3)
    again = train("parts", 6)
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize("kind", ["views", "synclr"])
def test_bf16_keeps_losses_and_weights_in_float32(kind):
    found = []
    for autocast in (None, torch.bfloat16):
        task = little.synclr(autocast=autocast) if kind == "synclr" else little.learner(autocast=autocast)
        source = little.crop_batches() if kind == "synclr" else little.view_batches()
        figures = task.step(0, source(0).to(CPU))
        assert all(v.dtype == torch.float32 for v in states(task).values() if v.is_floating_point())
        found.append(figures["loss/contrast"])
    assert found[1].dtype == torch.float32 and not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=0.1, atol=0.05)


def test_a_loss_that_is_no_number_changes_nothing():
    task = little.learner()
    batch = little.view_batches()(0).to(CPU)
    before = copy.deepcopy({k: p for k, p in states(task).items() if "running" not in k and "num_batches" not in k})
    batch.images[0, 0, 0, 0] = math.nan
    with pytest.raises(NotFinite):
        task.step(0, batch)
    assert all(torch.equal(states(task)[k], v) for k, v in before.items())


@pytest.mark.parametrize("kind", ["views", "synclr"])
def test_something_is_learnt(kind):
    """Classes have colours of their own, which colour changes do not hide altogether."""
    task = little.synclr(pace=24) if kind == "synclr" else little.learner(kind, pace=24)
    source = little.crop_batches() if kind == "synclr" else little.view_batches()
    values = [float(task.step(s, source(s).to(CPU))["loss/contrast"]) for s in range(24)]
    assert sum(values[-6:]) / 6 < 0.95 * sum(values[:3]) / 3
