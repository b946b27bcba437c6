"""Draws do not depend on processes or accumulation; times, classes, flips and dropped labels are distributed right."""

import dataclasses

import pytest
import scipy.stats
import torch

from dmd.batches import DistillBatches, Share, TeachBatches
from dmd.errors import InputError

SHAPE = (1, 2, 2)


class Store:
    """Pairs whose numbers can be read off their values: z = i, y = -i, condition i mod 5."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return -self.noise(index), index % 5

    def noise(self, index):
        return index.float().reshape(-1, 1, 1, 1).expand(-1, *SHAPE)


def labels(number):
    return {"label": number}


def distil(share=Share(), **changes):  # noqa: B008 (frozen)
    arguments = {
        "seed": 3,
        "shape": SHAPE,
        "count": 5,
        "conditions": labels,
        "batch_size": 16,
        "pairs": Store(),
        "pair_batch_size": 8,
        "share": share,
        "critic_steps": 3,
    }
    return DistillBatches(**(arguments | changes))


def image(index):
    """Images whose left column is their number, right column zero; label number mod 5."""
    x = torch.zeros(len(index), *SHAPE)
    x[..., 0] = index.float()[:, None, None]
    return x, {"label": index % 5}


def teach(share=Share(), **changes):  # noqa: B008 (frozen)
    arguments = {
        "seed": 3,
        "data": image,
        "size": 100,
        "times": lambda u: u,
        "null": {"label": torch.tensor([5])},
        "batch_size": 16,
        "share": share,
    }
    return TeachBatches(**(arguments | changes))


def rows(batch):
    """Every drawn tensor of a batch by name, conditions split into unpaired and paired rows."""
    found = {k: v for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    unpaired = len(batch.z) if hasattr(batch, "z") else len(batch.x0)
    return found | {"label": batch.cond["label"][:unpaired], "paired": batch.cond["label"][unpaired:]}


def joined(batches):
    """Micro-batches, in order of their processes, as one."""
    parts = [rows(b) for b in batches]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


SPLITS = [(2, 1), (1, 4), (2, 2), (4, 2)]


@pytest.mark.parametrize(("world", "accumulation"), SPLITS)
def test_processes_and_accumulation_share_one_global_batch(world, accumulation):
    whole = distil()(7)
    parts = [distil(Share(rank, world, accumulation))(7) for rank in range(world)]
    assert equal(joined([b for p in parts for b in p.batches]), joined(whole.batches))
    for k in range(2):
        assert equal(joined([b for p in parts for b in p.critic[k]]), joined(whole.critic[k]))


@pytest.mark.parametrize(("world", "accumulation"), SPLITS)
def test_processes_and_accumulation_share_one_global_batch_of_images(world, accumulation):
    parts = [b for rank in range(world) for b in teach(Share(rank, world, accumulation), flip=True)(7)]
    assert equal(joined(parts), joined(teach(flip=True)(7)))


@pytest.mark.parametrize("world", [2, 4])
def test_matched_pairs_keep_their_draws_on_any_number_of_processes(world):
    """Per process the matched rows are its unpaired ones, then its paired ones; globally each row keeps its draw."""
    (whole,) = distil(match_pairs=True)(7).batches
    parts = [distil(Share(rank, world), match_pairs=True)(7).batches[0] for rank in range(world)]
    n = 16 // world
    for name in ("t", "noise", "critic_t", "critic_noise"):
        unpaired = torch.cat([getattr(p, name)[:n] for p in parts])
        paired = torch.cat([getattr(p, name)[n:] for p in parts])
        assert len(paired) == 8
        assert torch.equal(torch.cat((unpaired, paired)), getattr(whole, name))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="batch size 16 is not divisible by 3 processes x 1"):
        distil(Share(0, 3))(0)
    with pytest.raises(InputError, match="pair batch size 8 is not divisible by 4 processes x 4"):
        distil(Share(0, 4, 4))(0)


def test_the_same_step_twice_is_equal_and_other_steps_and_seeds_differ():
    for build in (distil, teach):
        first, again, later = (build()(s) for s in (4, 4, 5))
        other = build(seed=4)(4)
        batches = [x.batches[0] if build is distil else x[0] for x in (first, again, later, other)]
        assert equal(rows(batches[0]), rows(batches[1]))
        for b in batches[2:]:
            assert not any(torch.equal(rows(b)[k], v) for k, v in rows(batches[0]).items() if v.numel() > 1)


def test_no_two_draws_of_an_iteration_are_equal():
    """Start noise, matching noise, critic noise and those of further critic updates: all pixels are different."""
    iteration = distil(match_pairs=True)(0)
    (batch,) = iteration.batches
    noises = [batch.z, batch.noise, batch.critic_noise]
    noises += [x for (c,) in iteration.critic for x in (c.z, c.noise)]
    values = torch.cat([x.flatten() for x in noises])
    assert len(values) == 4 * (16 + 24 + 24 + 2 * (16 + 16))
    assert len(values.unique()) > 0.999 * len(values)
    times = torch.cat([batch.t, batch.critic_t, *(c.t for (c,) in iteration.critic)])
    assert len(times.unique()) > 0.98 * len(times)


def test_matching_times_keep_to_their_range_and_critic_times_have_all():
    (batch,) = distil(batch_size=4096, t_range=(0.3, 0.5))(0).batches
    assert scipy.stats.kstest(batch.t.numpy(), "uniform", (0.3, 0.2)).pvalue > 1e-3
    assert float(batch.t.min()) >= 0.3 and float(batch.t.max()) <= 0.5
    assert scipy.stats.kstest(batch.critic_t.numpy(), "uniform").pvalue > 1e-3


def test_conditions_are_equally_likely():
    (batch,) = distil(batch_size=5000, pair_batch_size=0)(0).batches
    counts = torch.bincount(batch.cond["label"], minlength=5)
    assert len(counts) == 5 and scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_pairs_come_with_their_own_noise_image_and_condition():
    (batch,) = distil(pair_batch_size=2000)(0).batches
    number = batch.z_ref[:, 0, 0, 0]
    assert torch.equal(batch.y_ref, -batch.z_ref)
    assert torch.equal(batch.cond["label"][16:], number.long() % 5)
    assert scipy.stats.kstest(number.numpy(), "uniform", (0, 1000)).pvalue > 1e-3


def test_objectives_leave_out_what_they_do_not_need():
    matching = distil(pairs=None)(0)
    assert [len(getattr(matching.batches[0], k)) for k in ("z", "z_ref", "y_ref", "t")] == [16, 0, 0, 16]
    assert len(matching.batches[0].cond["label"]) == 16
    regression = distil(batch_size=0, match_pairs=True)(0)
    assert [len(getattr(regression.batches[0], k)) for k in ("z", "z_ref", "y_ref", "t", "noise")] == [0, 8, 8, 0, 0]
    assert regression.critic == []


def test_leaving_out_pairs_does_not_change_the_unpaired_draws():
    """So that ablations differ by their loss alone."""
    (both,), (alone,) = distil()(3).batches, distil(pairs=None)(3).batches
    for name in ("z", "t", "noise", "critic_t", "critic_noise"):
        assert torch.equal(getattr(both, name), getattr(alone, name))
    assert torch.equal(both.cond["label"][:16], alone.cond["label"])


def test_images_are_drawn_evenly_and_keep_their_labels():
    (batch,) = teach(batch_size=10_000, dropout=0.0)(0)
    number = batch.x0[:, 0, 0, 0].long()
    assert torch.equal(batch.cond["label"], number % 5)
    counts = torch.bincount(number, minlength=100)
    assert len(counts) == 100 and scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_half_of_the_images_are_mirrored():
    (plain,), (batch,) = teach(batch_size=4000)(0), teach(batch_size=4000, flip=True)(0)
    flipped = (batch.x0 != plain.x0).flatten(1).any(1)
    assert torch.equal(batch.x0[flipped], plain.x0.flip(-1)[flipped])
    assert scipy.stats.binomtest(int(flipped.sum()), int((plain.x0 != 0).flatten(1).any(1).sum())).pvalue > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.25, 1.0])
def test_labels_are_dropped_to_the_empty_condition(dropout):
    (kept,), (batch,) = teach(batch_size=4000, dropout=0.0)(0), teach(batch_size=4000, dropout=dropout)(0)
    empty = batch.cond["label"] == 5
    assert torch.equal(batch.cond["label"][~empty], kept.cond["label"][~empty])
    assert scipy.stats.binomtest(int(empty.sum()), 4000, dropout).pvalue > 1e-3
    assert torch.equal(batch.x0, kept.x0)


def test_times_of_teaching_are_the_given_function_of_uniform_numbers():
    (batch,) = teach(batch_size=2000, times=lambda u: 0.5 * u)(0)
    assert scipy.stats.kstest(batch.t.numpy(), "uniform", (0, 0.5)).pvalue > 1e-3


def test_shares_partition_the_global_indices():
    whole = dataclasses.replace(Share(), accumulation=1).split(24, "batch")
    parts = [i for rank in range(3) for i in Share(rank, 3, 2).split(24, "batch")]
    assert torch.equal(torch.cat(parts), whole[0]) and {len(p) for p in parts} == {4}


@pytest.mark.parametrize("match_pairs", [False, True])
def test_pairs_apart_are_the_same_draws(match_pairs):
    """Micro-batches of noises alone and of pairs alone hold what one batch of both holds, row for row."""
    (whole,) = distil(match_pairs=match_pairs)(7).batches
    parts = distil(Share(accumulation=2), match_pairs=match_pairs, pair_accumulation=4)(7).batches
    assert [(len(p.z), len(p.z_ref)) for p in parts] == [(8, 0)] * 2 + [(0, 2)] * 4
    for name in ("z", "z_ref", "y_ref", "t", "noise", "critic_t", "critic_noise"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)), name
    assert torch.equal(torch.cat([p.cond["label"] for p in parts]), whole.cond["label"])


def test_guidance_has_times_of_its_own_where_asked():
    (plain,), (apart,) = distil()(7).batches, distil(guidance_t_range=(0.5, 0.75))(7).batches
    assert plain.t_guidance is None
    assert equal(rows(plain), {k: v for k, v in rows(apart).items() if k != "t_guidance"})
    assert ((apart.t_guidance > 0.5) & (apart.t_guidance < 0.75)).all()
    assert len(apart.t_guidance.unique()) == len(apart.t)


def test_crops_are_everywhere_alike_and_cover_all_places():
    """One square a step, wherever the work is done; over many steps each place is equally likely."""
    shape, crop = (1, 4, 6), 3
    seen = []
    for step in range(600):
        (window,) = (b.window for b in distil(crop=crop, shape=shape, pairs=None)(step).batches)
        for rank in (0, 1) if step < 20 else ():
            shared = distil(Share(rank, 2, 2), crop=crop, shape=shape, pairs=None)(step).batches
            assert [b.window for b in shared] == [window, window]
        x = torch.arange(24).reshape(shape)[window]
        assert x.shape == (1, crop, crop)
        seen.append(int(x[0, 0, 0]))
    places, counts = torch.tensor(seen).unique(return_counts=True)
    assert places.tolist() == [6 * row + column for row in (0, 1) for column in (0, 1, 2, 3)]
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_without_a_crop_all_is_compared():
    x = torch.arange(6).reshape(2, 3)
    assert torch.equal(x[distil()(0).batches[0].window], x)
