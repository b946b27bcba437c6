"""One iteration: what moves, what is called how often, and the gradients of the paper's algorithms written naively."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from dmd.denoiser import Denoiser, Guided, NetworkDenoiser, epsilon, flow, karras
from dmd.distill import Batch, CriticBatch, Distiller, Iteration
from dmd.ema import Ema
from dmd.losses import squared_distance
from dmd.noise import DDPM, Karras, Linear
from dmd.run import NotFinite, clip_and_check

DIM, CLASSES = 3, 4
FAMILIES = {"ddpm": (DDPM(), epsilon), "karras": (Karras(), karras(0.5)), "linear3": (Linear(3.0), flow)}


class Net(nn.Module):
    """A small class-conditional network that notes how many rows each call has."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.label = nn.Embedding(CLASSES + 1, 8)
            self.body = nn.Sequential(nn.Linear(DIM + 9, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, DIM))
        self.calls = []

    def forward(self, x_t, t, label):
        self.calls.append(len(x_t))
        x = x_t / (1 + x_t.abs())
        return self.body(torch.cat((x, t[:, None].to(x), self.label(label)), dim=1))


class Float64(NetworkDenoiser):
    """Without the conversion to float32, so that two orders of summation can be told from two different gradients."""

    def forward(self, x_t, t, cond):
        skip, out = (v.double() for v in self.coefficients(t, x_t))
        return skip * x_t + out * self.net(x_t, t, **cond)


def build(family="karras", *, fake_seed=2, scale=1.0, lambda_reg=0.25, dtype=torch.float64, optimizer=None, **changes):
    schedule, prediction = FAMILIES[family]
    kind = Float64 if dtype == torch.float64 else NetworkDenoiser
    student, real, fake = (kind(Net(s).to(dtype), schedule, prediction) for s in (0, 1, fake_seed))
    optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1))
    arguments = {
        "student": student,
        "real": Guided(real, scale, {"label": torch.tensor([CLASSES])}),
        "fake": fake,
        "student_optimizer": optimizer(student.net.parameters()),
        "fake_optimizer": optimizer(fake.net.parameters()),
        "ema": Ema(student.net, 0.9),
        "distance": squared_distance,
        "lambda_reg": lambda_reg,
        "max_norm": 1e9,
        "update": clip_and_check,
    }
    return Distiller(**(arguments | changes))


def draw(seed, b, r, m, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def normal(n):
        return torch.randn(n, DIM, generator=g, dtype=dtype)

    return Batch(
        z=normal(b),
        z_ref=normal(r),
        y_ref=normal(r),
        cond={"label": torch.randint(CLASSES, (b + r,), generator=g)},
        t=0.02 + 0.96 * torch.rand(m, generator=g),
        noise=normal(m),
        critic_t=torch.rand(m, generator=g),
        critic_noise=normal(m),
    )


def draw_critic(seed, b):
    d = draw(seed, b, 0, b)
    return CriticBatch(d.z, d.cond, d.critic_t, d.critic_noise)


def weights(module):
    return copy.deepcopy(module.state_dict())


def moved(before, module):
    """Names of the tensors that changed."""
    return {k for k, v in module.state_dict().items() if not torch.equal(before[k], v)}


def gradients(denoiser):
    return [p.grad.clone() for p in denoiser.net.parameters()]


def split(batch, parts, b, r):
    """Micro-batches of a batch whose matched rows are the unpaired ones, or unpaired and paired ones."""
    whole = len(batch.t) == b + r and r > 0

    def take(x, i, first, n):
        return x[first + i * n // parts : first + (i + 1) * n // parts]

    def rows(x, i):
        return torch.cat((take(x, i, 0, b), take(x, i, b, r))) if whole else take(x, i, 0, len(batch.t))

    return [
        Batch(
            z=take(batch.z, i, 0, b),
            z_ref=take(batch.z_ref, i, 0, r),
            y_ref=take(batch.y_ref, i, 0, r),
            cond={k: torch.cat((take(v, i, 0, b), take(v, i, b, r))) for k, v in batch.cond.items()},
            **{k: rows(getattr(batch, k), i) for k in ("t", "noise", "critic_t", "critic_noise")},
        )
        for i in range(parts)
    ]


def naive_gradients(distiller, batch, b, scale, lambda_reg):
    """Gradients of student and fake score as Algorithms 1 and 2 of the paper read, sample by sample, by autograd.

    Raw networks and coefficients only: no denoiser, loss or solver of the package.
    """
    s, real, fake = distiller.student.net, distiller.real.denoiser.net, distiller.fake.net
    schedule, prediction = distiller.student.schedule, distiller.student.prediction
    label, null = batch.cond["label"], torch.tensor([CLASSES])

    def coefficients(t):
        alpha, sigma = schedule(t)
        skip, out = prediction(alpha, sigma)
        return tuple(v.double() for v in (alpha, sigma, skip, out))

    def mu(net, x_t, t, y):
        _, _, skip, out = coefficients(t)
        return skip * x_t + out * net(x_t, t, y)

    one = torch.ones(1)
    start = 80.0 if isinstance(schedule, Karras) else 1.0
    x_all = [mu(s, start * z[None], one, label[i : i + 1]) for i, z in enumerate(torch.cat((batch.z, batch.z_ref)))]
    m, r = len(batch.t), len(batch.z_ref)
    loss = torch.zeros((), dtype=torch.float64)
    loss_fake = torch.zeros((), dtype=torch.float64)
    for i in range(m):
        x, y, t = x_all[i], label[i : i + 1], batch.t[i : i + 1]
        with torch.no_grad():
            alpha, sigma, _, _ = coefficients(t)
            x_t = alpha * x + sigma * batch.noise[i]
            pred_fake = mu(fake, x_t, t, y)
            uncond = mu(real, x_t, t, null)
            pred_real = uncond + scale * (mu(real, x_t, t, y) - uncond)
            weighting_factor = (x - pred_real).abs().mean()
            grad = (pred_fake - pred_real) / weighting_factor
        loss = loss + 0.5 * ((x - (x - grad).detach()) ** 2).mean() / m
        t = batch.critic_t[i : i + 1]
        alpha, sigma, _, out = coefficients(t)
        x = x.detach()
        error = mu(fake, alpha * x + sigma * batch.critic_noise[i], t, y) - x
        loss_fake = loss_fake + ((error / out) ** 2).mean() / m
    for i in range(r):
        loss = loss + lambda_reg * ((x_all[b + i] - batch.y_ref[i]) ** 2).mean() / r
    student = torch.autograd.grad(loss, list(s.parameters()))
    return student, torch.autograd.grad(loss_fake, list(fake.parameters())) if m else None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("b", "r", "m", "scale"),
    [(4, 2, 4, 1.0), (4, 2, 6, 2.5), (5, 0, 5, 1.75), (0, 3, 0, 1.0)],
    ids=["paper", "match_pairs_guided", "matching_only", "regression_only"],
)
def test_gradients_are_those_of_the_papers_algorithm(family, b, r, m, scale):
    distiller, batch = build(family, scale=scale, lambda_reg=0.3), draw(5, b, r, m)
    student, fake = naive_gradients(distiller, batch, b, scale, 0.3)
    distiller.step(0, Iteration([batch]))
    for got, expected in zip(gradients(distiller.student), student, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-12)
    if m:
        for got, expected in zip(gradients(distiller.fake), fake, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(
    ("b", "r", "m"),
    [(8, 4, 8), (8, 4, 12), (8, 0, 8), (0, 8, 0)],
    ids=["paper", "match_pairs", "matching", "regression"],
)
def test_micro_batches_add_up_to_the_whole_batch(b, r, m, parts):
    batch = draw(7, b, r, m)
    whole, parted = build(scale=2.0), build(scale=2.0)
    figures = whole.step(0, Iteration([batch]))
    figures_parted = parted.step(0, Iteration(split(batch, parts, b, r)))
    for role in ("student", "fake") if m else ("student",):
        for got, expected in zip(gradients(getattr(parted, role)), gradients(getattr(whole, role)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)
    for name in figures:
        torch.testing.assert_close(figures_parted[name], figures[name], rtol=1e-9, atol=1e-13)


def test_micro_batches_of_further_critic_updates_add_up():
    batch = draw(7, 4, 0, 4)
    c = draw_critic(8, 8)
    halves = [CriticBatch(c.z[i], {"label": c.cond["label"][i]}, c.t[i], c.noise[i]) for i in (slice(4), slice(4, 8))]
    whole, parted = build(), build()
    whole.step(0, Iteration([batch], [[c]]))
    parted.step(0, Iteration([batch], [halves]))
    for got, expected in zip(gradients(parted.fake), gradients(whole.fake), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)


def test_student_fake_and_average_move_and_the_teacher_never():
    distiller = build()
    before = {k: weights(m) for k, m in distiller.modules().items()} | {"real": weights(distiller.real)}
    distiller.step(0, Iteration([draw(1, 8, 8, 8)]))
    for name, module in distiller.modules().items():
        used = {"label.weight", "body.0.weight", "body.0.bias", "body.3.weight", "body.3.bias"}
        assert moved(before[name], module) == used
    assert moved(before["real"], distiller.real) == set()
    assert all(p.grad is None for p in distiller.real.parameters())


def test_the_average_follows_the_updated_student():
    distiller = build()
    first = weights(distiller.ema.shadow)
    distiller.step(0, Iteration([draw(1, 8, 8, 8)]))
    for name, value in distiller.ema.shadow.state_dict().items():
        student = distiller.student.net.state_dict()[name].float()
        torch.testing.assert_close(value, 0.1 * first[name] + 0.9 * student, rtol=1e-5, atol=1e-7)


def test_gradient_does_not_reach_the_fake_score_through_the_student():
    """The fake score's gradient is that of its own loss alone, whatever the weight of the student's losses."""
    batch = draw(2, 4, 4, 4)
    a, b = build(lambda_reg=0.0), build(lambda_reg=100.0)
    a.step(0, Iteration([batch]))
    b.step(0, Iteration([batch]))
    assert all(torch.equal(x, y) for x, y in zip(gradients(a.fake), gradients(b.fake), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_student_stays_when_fake_equals_real(family):
    """Bitwise, with an optimiser that divides by the gradient's size."""
    distiller = build(
        family, fake_seed=1, lambda_reg=0.0, dtype=torch.float32, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2)
    )
    before = weights(distiller.student), weights(distiller.fake)
    figures = distiller.step(0, Iteration([draw(3, 6, 2, 6, torch.float32)]))
    assert moved(before[0], distiller.student) == set()
    assert moved(before[1], distiller.fake) != set()
    assert float(figures["loss/matching"]) == 0.0 == float(figures["health/fake_real_gap"])


@pytest.mark.parametrize("family", FAMILIES)
def test_student_stays_when_fake_equals_the_guided_real(family):
    """Bitwise too: guidance has no formula of its own, in which the parts would only nearly cancel."""

    class Twin(NetworkDenoiser):
        """The guided real score, rounded as it is there."""

        def forward(self, x_t, t, cond):
            return (guided(x_t, t, cond) + 0.0 * super().forward(x_t, t, cond)).float()

    schedule, prediction = FAMILIES[family]
    null = {"label": torch.tensor([CLASSES])}
    guided = Guided(NetworkDenoiser(Net(1), schedule, prediction), 3.0, null).requires_grad_(False)
    distiller = build(
        family, scale=3.0, lambda_reg=0.0, dtype=torch.float32, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2)
    )
    distiller.fake = Twin(distiller.fake.net, schedule, prediction).eval()
    guided.eval()
    before = weights(distiller.student)
    figures = distiller.step(0, Iteration([draw(3, 6, 2, 6, torch.float32)]))
    assert moved(before, distiller.student) == set()
    assert float(figures["loss/matching"]) == 0.0
    assert float(figures["health/guidance_part"]) > 0.0


@pytest.mark.parametrize(
    ("scale", "real_rows"), [(1.0, [6]), (3.0, [12])], ids=["plain", "guided: both halves in one call"]
)
def test_each_network_is_called_no_more_than_the_method_needs(scale, real_rows):
    """Student once, real score once, fake score twice: once without and once with a gradient."""
    distiller = build(scale=scale)
    distiller.step(0, Iteration([draw(0, 6, 3, 6)]))
    assert distiller.student.net.calls == [9]
    assert distiller.real.denoiser.net.calls == real_rows
    assert distiller.fake.net.calls == [6, 6]


def test_further_critic_updates_cost_one_call_of_student_and_fake_each():
    distiller = build()
    distiller.step(0, Iteration([draw(0, 6, 3, 6)], [[draw_critic(1, 5)], [draw_critic(2, 5)]]))
    assert distiller.student.net.calls == [9, 5, 5]
    assert distiller.real.denoiser.net.calls == [6]
    assert distiller.fake.net.calls == [6, 6, 5, 5]


def test_further_critic_updates_move_only_the_fake_score():
    """And they see the student as the generator update left it."""
    batch, fresh = draw(0, 6, 3, 6), draw_critic(1, 5)
    once, twice = build(), build()
    once.step(0, Iteration([batch]))
    twice.step(0, Iteration([batch], [[fresh]]))
    for a, b in ((once.student, twice.student), (once.ema.shadow, twice.ema.shadow), (once.real, twice.real)):
        assert moved(weights(a), b) == set()
    assert moved(weights(once.fake), twice.fake) != set()

    alpha, sigma = (v[:, None].double() for v in Karras()(fresh.t))
    with torch.no_grad():
        x = once.student(80.0 * fresh.z, torch.ones(5), fresh.cond)
    x0 = once.fake(alpha * x + sigma * fresh.noise, fresh.t, fresh.cond)
    loss = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * (x0 - x) ** 2).mean()
    expected = torch.autograd.grad(loss, list(once.fake.net.parameters()))
    for p, before, gradient in zip(twice.fake.net.parameters(), once.fake.net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.data, before.data - 0.1 * gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("m", [6, 9], ids=["noises", "pairs_matched_too"])
def test_a_warm_up_is_the_fake_score_s_part_of_a_step(m):
    """The ordinary step trains it on the samples of the student as it was before the update."""
    batch = draw(0, 6, 3, m)
    warming, usual = build(critic_warmup=1), build()
    before = weights(warming.student), weights(warming.ema.shadow), weights(warming.real)
    figures = warming.step(0, Iteration([batch]))
    expected = usual.step(0, Iteration([batch]))
    for old, module in zip(before, (warming.student, warming.ema.shadow, warming.real), strict=True):
        assert moved(old, module) == set()
    for ours, theirs in zip(warming.fake.net.parameters(), usual.fake.net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for name in ("loss/fake", "grad/fake"):
        torch.testing.assert_close(figures[name], expected[name], rtol=1e-12, atol=1e-12)
    assert warming.student.net.calls == [m] and warming.fake.net.calls == [m]
    assert warming.real.denoiser.net.calls == []

    warming.step(1, Iteration([batch]))
    assert moved(before[0], warming.student) and moved(before[1], warming.ema.shadow)


def test_regression_alone_leaves_real_and_fake_scores_out():
    distiller = build()
    before = weights(distiller.fake)
    figures = distiller.step(0, Iteration([draw(0, 0, 6, 0)]))
    assert moved(before, distiller.fake) == set()
    assert distiller.real.denoiser.net.calls == distiller.fake.net.calls == []
    assert {k for k in figures if k.startswith(("loss/", "grad/"))} == {"loss/regression", "grad/student"}


def test_matching_alone_needs_no_pairs():
    distiller = build()
    figures = distiller.step(0, Iteration([draw(0, 6, 0, 6)]))
    assert {k for k in figures if k.startswith("loss/")} == {"loss/matching", "loss/fake"}


def test_matched_pairs_change_the_gradient_of_the_paired_rows():
    """M = B + R: the student is pulled by the matching loss at z_ref too, with the pairs' own conditions."""
    batch = draw(4, 4, 4, 8)
    plain = dataclasses.replace(batch, **{k: getattr(batch, k)[:4] for k in ("t", "noise", "critic_t", "critic_noise")})
    a, b = build(lambda_reg=0.0), build(lambda_reg=0.0)
    a.step(0, Iteration([batch]))
    b.step(0, Iteration([plain]))
    assert a.fake.net.calls == [8, 8] and b.fake.net.calls == [4, 4]
    assert not torch.allclose(gradients(a.student)[1], gradients(b.student)[1])


@pytest.mark.parametrize("field", ["z", "y_ref", "noise", "critic_noise"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_stops_before_any_weight_changes(field, bad):
    batch = draw(0, 6, 3, 6)
    getattr(batch, field)[1, 0] = bad
    stepped = []

    class Sgd(torch.optim.SGD):
        def step(self, closure=None):
            stepped.append(self)
            return super().step(closure)

    distiller = build(optimizer=lambda p: Sgd(p, lr=0.1))
    before = {k: weights(m) for k, m in distiller.modules().items()}
    with pytest.raises(NotFinite, match="gradient norm is"):
        distiller.step(0, Iteration([draw(1, 6, 3, 6), batch]))
    assert stepped == []
    assert all(moved(before[k], m) == set() for k, m in distiller.modules().items())


def test_a_bad_number_in_a_further_critic_update_spares_the_fake_score():
    fresh = draw_critic(1, 5)
    fresh.noise[0, 0] = float("nan")
    good, bad = build(), build()
    good.step(0, Iteration([draw(0, 6, 3, 6)]))
    with pytest.raises(NotFinite):
        bad.step(0, Iteration([draw(0, 6, 3, 6)], [[fresh]]))
    assert moved(weights(good.fake), bad.fake) == set()


def test_gradients_of_an_earlier_step_are_forgotten():
    once, again = build(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), build()
    once.step(0, Iteration([draw(0, 6, 3, 6)], [[draw_critic(3, 5)]]))
    once.step(1, Iteration([draw(1, 6, 3, 6)]))
    again.step(0, Iteration([draw(1, 6, 3, 6)]))
    for role in ("student", "fake"):
        pairs = zip(gradients(getattr(once, role)), gradients(getattr(again, role)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_dropout_is_off_everywhere():
    distiller = build()
    networks = (distiller.student, distiller.real, distiller.fake, distiller.ema.shadow)
    assert not any(m.training for network in networks for m in network.modules())
    other = build()
    torch.manual_seed(0)
    a = distiller.step(0, Iteration([draw(0, 6, 3, 6)]))
    torch.manual_seed(1)
    b = other.step(0, Iteration([draw(0, 6, 3, 6)]))
    assert {k: float(v) for k, v in a.items()} == {k: float(v) for k, v in b.items()}


def test_figures_are_detached_scalars_of_the_batch():
    """Losses against direct formulas, from copies of the networks before the step."""
    distiller, batch = build(), draw(0, 6, 4, 6)
    student = copy.deepcopy(distiller.student)
    figures = distiller.step(0, Iteration([batch]))
    assert all(v.shape == () and not v.requires_grad for v in figures.values())
    with torch.no_grad():
        x_ref = student(80.0 * batch.z_ref, torch.ones(4), {"label": batch.cond["label"][6:]})
    torch.testing.assert_close(figures["loss/regression"], ((x_ref - batch.y_ref) ** 2).mean())
    norm = torch.cat([g.flatten() for g in gradients(distiller.fake)]).norm()
    torch.testing.assert_close(figures["grad/fake"], norm)


def test_each_network_is_clipped_by_itself():
    free, clipped = build(), build(max_norm=0.01)
    for distiller in (free, clipped):
        distiller.step(0, Iteration([draw(0, 6, 3, 6)]))
    for role in ("student", "fake"):
        before, after = (torch.cat([g.flatten() for g in gradients(getattr(d, role))]) for d in (free, clipped))
        assert float(before.norm()) > 0.01
        torch.testing.assert_close(after, 0.01 * before / before.norm(), rtol=1e-3, atol=0)


def test_networks_on_different_schedules_are_refused():
    class Other(Denoiser):
        schedule = Linear(2.0)

        def forward(self, x_t, t, cond):
            return x_t

    with pytest.raises(ValueError, match="schedules differ"):
        build(real=Other())


@pytest.mark.parametrize("m", [8, 12], ids=["paper", "match_pairs"])
def test_noises_and_pairs_may_have_micro_batches_of_their_own(m):
    """Two of noises, of unequal size, and four of pairs alone: the same gradients as one batch of all."""
    b, r = 8, 4
    batch = draw(7, b, r, m)
    drawn = ("t", "noise", "critic_t", "critic_noise")

    def part(own, paired):
        rows = list(own) + [b + i for i in paired]
        matched = rows if m > b else list(own)
        return Batch(
            batch.z[own.start : own.stop],
            batch.z_ref[paired.start : paired.stop],
            batch.y_ref[paired.start : paired.stop],
            {"label": batch.cond["label"][rows]},
            **{k: getattr(batch, k)[matched] for k in drawn},
        )

    none = range(0)
    parts = [part(range(6), none), part(range(6, 8), none), *(part(none, range(i, i + 1)) for i in range(4))]
    whole, parted = build(scale=2.0), build(scale=2.0)
    figures, figures_parted = whole.step(0, Iteration([batch])), parted.step(0, Iteration(parts))
    for role in ("student", "fake"):
        for got, expected in zip(gradients(getattr(parted, role)), gradients(getattr(whole, role)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)
    for name in ("loss/matching", "loss/regression", "loss/fake", "health/guidance_part", "health/normaliser"):
        torch.testing.assert_close(figures_parted[name], figures[name], rtol=1e-9, atol=1e-13)


def test_guidance_at_the_same_times_of_its_own_changes_nothing():
    batch = draw(3, 4, 2, 6)
    one, other = build(scale=2.5), build(scale=2.5)
    one.step(0, Iteration([batch]))
    other.step(0, Iteration([dataclasses.replace(batch, t_guidance=batch.t)]))
    for got, expected in zip(gradients(other.student), gradients(one.student), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)


def test_guidance_at_times_of_its_own_is_the_formula():
    """Sample by sample, from the denoisers: (x0_fake - x0_cond) / n(t) - (s - 1) (x0_cond - x0_uncond)(t') / n(t')."""
    scale = 2.5
    distiller = build(scale=scale)
    batch = dataclasses.replace(draw(3, 4, 0, 4), t_guidance=torch.tensor([0.9, 0.6, 0.3, 0.1]))
    real, fake, schedule = distiller.real.denoiser, distiller.fake, distiller.student.schedule
    start = schedule.start(batch.z)
    x = distiller.student(start, torch.ones(4), batch.cond)
    expected = []
    with torch.no_grad():
        for i in range(4):
            cond, null = {"label": batch.cond["label"][i : i + 1]}, {"label": torch.tensor([CLASSES])}

            def parts(t, i=i, cond=cond, null=null):
                x_t = schedule.diffuse(x[i : i + 1], batch.noise[i : i + 1], t)
                return x_t, real(x_t, t, cond), real(x_t, t, null)

            x_t, cond_0, null_0 = parts(batch.t[i : i + 1])
            _, cond_1, null_1 = parts(batch.t_guidance[i : i + 1])
            n_0, n_1 = ((x[i] - (u + scale * (c - u))).abs().mean() for c, u in ((cond_0, null_0), (cond_1, null_1)))
            match = (fake(x_t, batch.t[i : i + 1], cond) - cond_0) / n_0
            expected.append(match - (scale - 1) * (cond_1 - null_1) / n_1)
    surrogate = (x * torch.cat(expected)).sum() / x.numel()
    wanted = torch.autograd.grad(surrogate, list(distiller.student.net.parameters()))
    distiller.step(0, Iteration([batch]))
    for got, value in zip(gradients(distiller.student), wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-12)
