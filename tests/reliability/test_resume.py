"""A run that is stopped, or crashes, at any step ends as the one that never stopped: equal in every bit."""

import dataclasses
from pathlib import Path

import pytest
from small import Crash, Job, assert_same, bare, run

VARIANTS = {
    "plain": {},
    "accumulation": {"accumulation": 3},
    "within the accumulation": {"accumulation": 3, "micro_batch": 1},
    "critic": {"critic_steps": 3},
    "critic first": {"critic_warmup": 3, "accumulation": 2},
    "bf16": {"bf16": True, "accumulation": 2, "critic_steps": 2},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def job(request, tmp_path):
    return Job(str(tmp_path / "run"), **request.param)


def changed(job, **changes):
    return dataclasses.replace(job, **changes)


def test_an_undisturbed_run_equals_the_bare_loop(job):
    assert_same(run(changed(job, checkpoint=2)), bare(job))


def test_a_run_stopped_after_every_single_step_ends_the_same(job):
    for step in range(job.steps - 1):
        stopped = run(changed(job, stop_at=step))
        assert stopped["progress"]["step"] == step + 1
    assert_same(run(job), bare(job))


@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_a_run_stopped_once_ends_the_same(tmp_path, step):
    job = Job(str(tmp_path / "run"), accumulation=2, critic_steps=2)
    run(changed(job, stop_at=step))
    assert_same(run(job), bare(job))


@pytest.mark.parametrize("micro_batch", [None, 0, 2])
def test_a_crash_costs_at_most_the_steps_since_the_last_checkpoint(tmp_path, micro_batch):
    job = Job(str(tmp_path / "run"), accumulation=3, checkpoint=2, log=1, micro_batch=micro_batch)
    for step in (1, 3, 4, 6):
        with pytest.raises(Crash):
            run(changed(job, crash_at=step))
        newest = max((int(p.name[5:]) for p in Path(job.directory).glob("checkpoints/step-*")), default=0)
        assert newest == step // 2 * 2
    assert_same(run(job), bare(job))


def test_a_finished_run_is_left_as_it_is(tmp_path):
    job = Job(str(tmp_path / "run"))
    first = run(job)
    files = {p: p.read_bytes() for p in Path(job.directory).rglob("*") if p.is_file()}
    assert_same(run(job), first)
    assert {p: p.read_bytes() for p in Path(job.directory).rglob("*") if p.is_file()} == files


def test_a_lengthened_run_goes_on_from_its_end(tmp_path):
    short = Job(str(tmp_path / "run"), steps=4, evaluate=0, log=1)
    run(short)
    longer = run(changed(short, steps=9))
    assert [r["step"] for r in longer["records"] if "loss/fake" in r] == list(range(1, 10))


def test_figures_of_steps_before_a_stop_are_reported_after_it(tmp_path):
    job = Job(str(tmp_path / "run"), log=5, evaluate=0)
    assert run(changed(job, stop_at=2))["records"] == []
    every_step = bare(changed(job, directory=str(tmp_path / "other"), log=1))["records"]
    mean = sum(r["loss/fake"] for r in every_step[:5]) / 5
    assert run(job)["records"][0]["loss/fake"] == pytest.approx(mean, rel=1e-12)
